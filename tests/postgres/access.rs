//! Who may connect: the same `pg_hba.conf` for a server and for the relay, the same users, and the same answers.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::process::Signal;

use crate::support::lab::{Installation, chosen_majors};
use crate::support::postgres::{Postgres, Settings};
use crate::support::powercut::Chance;
use crate::support::process::Program;
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::wait::wait_until;

/// A server with users of every kind, and a relay with the same ones.
struct Pair {
    primary: Postgres,
    relay: Relay,
    hba: PathBuf,
}

/// Lets the tests themselves in, whatever else is in the file.
const HARNESS: &str =
    "host postgres postgres 127.0.0.1/32 trust\nhost replication postgres 127.0.0.1/32 trust\n";

impl Pair {
    fn of(installation: &Installation) -> Self {
        let settings = Settings::new().segment_size_mb(1).line("max_wal_senders = 100");
        let primary = settings.line("password_encryption = 'scram-sha-256'").start(installation);
        for statement in [
            "create role standbys",
            "create role a replication login password 'pencil'",
            "create role \"two words\" replication login password 'pencil' in role standbys",
            "set password_encryption = 'md5'; create role old replication login password 'pencil'",
            "create role expired replication login password 'pencil' valid until '2001-01-01'",
            "create role expired_md5 replication login valid until '2001-01-01'; \
             set password_encryption = 'md5'; alter role expired_md5 password 'pencil'",
            "create role nothing replication login",
            "create role weak login password 'pencil'",
            "create database shop",
            "create database a",
        ] {
            primary.sql(statement);
        }
        let mut relay = Relay::new("relay", primary.port).with_token();
        let hba = primary.data().join("pg_hba.conf");
        std::fs::write(&hba, HARNESS).unwrap();
        let socket = primary.socket_folder().to_str().unwrap().to_owned();
        relay.set("downstream.listen", &format!("[\"127.0.0.1:{}\", {socket:?}]", relay.port));
        relay.set("downstream.hba", &format!("{hba:?}"));
        let users = relay.file("users.toml", 0o600, &users_of(&primary));
        relay.set("downstream.users", &format!("{users:?}"));
        relay.start();
        Self { primary, relay, hba }
    }

    /// Both have these rules from now on.
    fn set_rules(&self, rules: &str) {
        let loaded = "select pg_conf_load_time()";
        let before = self.primary.sql(loaded);
        std::fs::write(&self.hba, format!("{HARNESS}{rules}")).unwrap();
        self.primary.reload();
        wait_until("the server to have read its rules", || self.primary.sql(loaded) != before);
        let (status, told) = self.relay.post("/reload").unwrap();
        assert_eq!(status, 200, "{told}\n{rules}");
        let log = self.primary.log();
        assert!(!log.contains("pg_hba.conf was not reloaded"), "the server refuses\n{rules}\n{log}");
    }
}

/// The users file for the roles of a server, with their own secrets.
fn users_of(primary: &Postgres) -> String {
    let query = "select string_agg(format('%I = { may = [%s], connection_limit = %s', rolname, \
                 case when rolreplication then '\"stream\"' else '\"admin\"' end, rolconnlimit) \
                 || coalesce(', secret = \"' || rolpassword || '\"', '') \
                 || coalesce(', valid_until = \"' || to_char(rolvaliduntil at time zone 'UTC', \
                 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') || '\"', '') \
                 || case when not rolsuper and pg_has_role(oid, 'standbys', 'member') and rolname <> 'standbys' \
                 then ', member_of = [\"standbys\"]' else '' end || ' }', chr(10)) \
                 from pg_authid where rolname !~ '^pg_'";
    primary.sql(query)
}

/// Somebody who wants to come in.
struct Visitor {
    from: Option<Ipv4Addr>,
    user: &'static str,
    /// `true`, `database`, `off`
    replication: &'static str,
    database: &'static str,
}

trait Wire: Read + Write {}
impl<T: Read + Write> Wire for T {}

impl Visitor {
    /// The first answer: what is asked for, or code and text of an error. Once nothing is asked for, what follows.
    fn first_answer(&self, port: u16, socket_folder: &Path) -> String {
        let mut wire: Box<dyn Wire> = match self.from {
            Some(from) => {
                let socket =
                    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
                socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
                socket.connect(&SocketAddr::from(([127, 0, 0, 1], port)).into()).unwrap();
                Box::new(TcpStream::from(socket))
            }
            None => Box::new(UnixStream::connect(socket_folder.join(format!(".s.PGSQL.{port}"))).unwrap()),
        };
        let mut body = 196_608_u32.to_be_bytes().to_vec();
        let parameters =
            [("user", self.user), ("database", self.database), ("replication", self.replication)];
        for text in parameters.iter().flat_map(|(name, value)| [name, value]) {
            body.extend(text.bytes());
            body.push(0);
        }
        body.push(0);
        let mut packet = u32::try_from(body.len() + 4).unwrap().to_be_bytes().to_vec();
        packet.extend(body);
        wire.write_all(&packet).unwrap();
        loop {
            let mut header = [0; 5];
            wire.read_exact(&mut header).unwrap();
            let length = u32::from_be_bytes(header[1..].try_into().unwrap()) as usize - 4;
            let mut body = vec![0; length];
            wire.read_exact(&mut body).unwrap();
            match header[0] {
                b'E' => {
                    let field = |kind: u8| {
                        let mut fields = body.split(|byte| *byte == 0).filter(|field| !field.is_empty());
                        let found =
                            fields.find(|field| field[0] == kind).map_or(&b""[..], |field| &field[1..]);
                        String::from_utf8_lossy(found).into_owned()
                    };
                    return format!("{} {}", field(b'C'), field(b'M'));
                }
                b'Z' => return "let in".to_owned(),
                b'R' => match u32::from_be_bytes(body[..4].try_into().unwrap()) {
                    0 => {}
                    kind => return format!("asked for {kind}"),
                },
                _ => {}
            }
        }
    }
}

const USERS: [&str; 7] = ["a", "two words", "old", "expired", "nothing", "unknown", "all"];

/// A line that means something, in one of many ways.
fn random_rule(chance: &mut Chance, major: u32) -> String {
    let mut pick = |of: &[&str]| of[usize::try_from(chance.between(0, of.len() as u64)).unwrap()].to_owned();
    let kind = pick(&["local", "host", "host", "host", "hostssl", "hostnossl", "hostnogssenc"]);
    let database = pick(&[
        "all",
        "replication",
        "replication",
        "shop",
        "\"all\"",
        "sameuser",
        "samerole",
        "a,shop",
        "all,replication",
    ]);
    let known =
        ["all", "a", "\"two words\"", "+standbys", "\"+standbys\"", "old,a", "\"all\"", "unknown", "+a"];
    let patterns = ["\"/^t.o w\"", "/d$", "\"/^[a-o]+$\""];
    let user = if major >= 16 { pick(&[&known[..], &patterns[..]].concat()) } else { pick(&known) };
    let address = pick(&[
        "all",
        "samehost",
        "samenet",
        "127.0.0.1/32",
        "127.0.0.0/30",
        "127.0.0.2 255.255.255.255",
        "127.0.0.1/255 ",
        "0.0.0.0/0",
        "::/0",
        "10.0.0.0/8",
    ]);
    // A prefix that is none would spoil the file.
    let address = if kind == "local" { String::new() } else { address.replace("/255 ", " 255.0.0.255") };
    let method = pick(&["trust", "reject", "scram-sha-256", "md5", "scram-sha-256", "md5"]);
    format!("{kind} {database} {user} {address} {method}\n")
}

#[test]
fn the_same_rules_let_the_same_clients_in_as_at_a_server() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let pair = Pair::of(&installation);
        let mut chance = Chance::seeded();
        let mut seen = std::collections::BTreeMap::<String, u32>::new();
        let all_were_seen = |seen: &std::collections::BTreeMap<String, u32>| {
            ANSWERS.iter().all(|answer| seen.contains_key(*answer))
        };
        for round in 0..ROUNDS_MAX {
            if round >= ROUNDS_MIN && all_were_seen(&seen) {
                break;
            }
            let rules: String = (0..chance.between(0, 7)).map(|_| random_rule(&mut chance, major)).collect();
            pair.set_rules(&rules);
            for at in 0..30 {
                let visitor = Visitor {
                    from: [Some([127, 0, 0, 1]), Some([127, 0, 0, 2]), Some([127, 9, 0, 1]), None]
                        [usize::try_from(chance.between(0, 4)).unwrap()]
                    .map(Ipv4Addr::from),
                    user: USERS[at % USERS.len()],
                    replication: if chance.between(0, 2) == 0 { "true" } else { "database" },
                    database: ["shop", "a"][usize::try_from(chance.between(0, 2)).unwrap()],
                };
                let folder = pair.primary.socket_folder();
                let [of_server, of_relay] =
                    [pair.primary.port, pair.relay.port].map(|port| visitor.first_answer(port, folder));
                assert_eq!(
                    of_relay, of_server,
                    "PostgreSQL {major}: {} from {:?}, replication={}, database {}, with\n{rules}",
                    visitor.user, visitor.from, visitor.replication, visitor.database
                );
                *seen.entry(of_server.chars().take(24).collect()).or_default() += 1;
            }
        }
        assert!(all_were_seen(&seen), "not all that can happen did: {seen:?}");
    }
}

/// All that can happen, by the first characters of the answer.
const ANSWERS: [&str; 5] =
    ["let in", "asked for 5", "asked for 10", "28000 no pg_hba.conf ent", "28000 pg_hba.conf reject"];
/// Files of rules that are compared, and how many more at most until each answer was given once: chance may keep one away.
const ROUNDS_MIN: usize = 40;
const ROUNDS_MAX: usize = 400;

/// What psql says to an attempt with a password, at an address or in the folder of a socket.
fn psql(installation: &Installation, (host, port): (&str, u16), user: &str, password: &str) -> String {
    let conninfo =
        format!("host={host} port={port} user='{user}' replication=true sslmode=disable gssencmode=disable");
    let output = std::process::Command::new(installation.program("psql"))
        .args(["-X", "-At", "-d", &conninfo, "-c", "IDENTIFY_SYSTEM"])
        .env("PGPASSWORD", password)
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        return "let in".to_owned();
    }
    let line = complaint.lines().find(|line| line.contains("FATAL")).unwrap_or(&complaint);
    line.split_once("FATAL:").map_or(line, |(_, text)| text).trim().to_owned()
}

#[test]
fn the_same_users_log_in_with_the_same_passwords_as_at_a_server() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let pair = Pair::of(&installation);
        for method in ["md5", "scram-sha-256", "trust"] {
            // Through the socket, where guesses are held back by user alone.
            pair.set_rules(&format!("local replication all {method}\n"));
            let folder = pair.primary.socket_folder().to_str().unwrap();
            for user in
                ["a", "two words", "old", "expired", "expired_md5", "nothing", "weak", "unknown", "standbys"]
            {
                for password in ["pencil", "wrong"] {
                    let [of_server, of_relay] = [pair.primary.port, pair.relay.port]
                        .map(|port| psql(&installation, (folder, port), user, password));
                    // A role that may not log in is none of the relay's users, and a server knows roles of its own.
                    let expected = match of_server.as_str() {
                        "role \"standbys\" is not permitted to log in" => {
                            "permission denied to start WAL sender".to_owned()
                        }
                        _ => of_server,
                    };
                    let of_relay = match of_relay.as_str() {
                        "must be superuser or replication role to start walsender" if user == "standbys" => {
                            "permission denied to start WAL sender".to_owned()
                        }
                        _ => of_relay,
                    };
                    assert_eq!(of_relay, expected, "PostgreSQL {major}: {user} with {password} by {method}");
                }
            }
        }
    }
}

/// What patterns are put together from.
#[rustfmt::skip]
const PIECES: &[&str] = &[
    "a", "b", "1", "-", "_", "\u{e9}", ".", "*", "+", "?", "|", "(", ")", "[", "]", "^", "$", "{", "}", ",", "{1}", "{0,2}",
    "(?:", "[^", "[a-", "[[:alpha:]]", "\\", "\\d", "\\w", "\\S", "\\.", "\\A", "\\Z", "&&", "~~", "--", " ", "\n", "(?i)",
];
const SUBJECTS: &[&str] = &["a", "b", "1", "-", "_", "\u{e9}", " ", "\n", "&", "[", "]", "{", "^", "A"];

#[test]
fn patterns_mean_what_they_mean_to_a_server() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    primary.sql(
        "create function is_match(subject text, pattern text) returns text language plpgsql as $$ begin \
         return case when subject collate \"C\" ~ pattern then 'yes' else 'no' end; \
         exception when others then return 'wrong'; end $$",
    );
    let mut chance = Chance::seeded();
    let mut text = |most: u64, pieces: &[&str]| -> String {
        let length = 1 + chance.between(0, most);
        (0..length)
            .map(|_| pieces[usize::try_from(chance.between(0, pieces.len() as u64)).unwrap()])
            .collect()
    };
    let mut compared = 0;
    for _ in 0..300 {
        let mut questions = Vec::new();
        while questions.len() < 20 {
            let pattern = text(6, PIECES);
            if let Ok(regex) = walrelay::access::Regex::compile(&pattern) {
                let subject = text(5, SUBJECTS);
                questions.push((regex.is_match(&subject), subject, pattern));
            }
        }
        let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
        let rows = questions
            .iter()
            .map(|(_, subject, pattern)| format!("({}, {})", quoted(subject), quoted(pattern)));
        let rows = rows.collect::<Vec<_>>().join(", ");
        let query =
            format!("select string_agg(is_match(s, p), ' ') from (values {rows}) as questions (s, p)");
        let answers = primary.sql(&query);
        for ((is_match, subject, pattern), answer) in questions.iter().zip(answers.split(' ')) {
            // What is refused there lets nobody in there.
            if answer != "wrong" {
                compared += 1;
                assert_eq!(*is_match, answer == "yes", "{subject:?} ~ {pattern:?}");
            }
        }
    }
    assert!(compared > 3_000, "only {compared} were compared");
}

#[test]
fn files_are_read_again_and_a_mistake_changes_nothing_and_is_told_until_it_is_mended() {
    let Some(installation) = Installation::any() else { return };
    let pair = Pair::of(&installation);
    let relay = &pair.relay;
    let mut there = RawClient::replication(relay.port).unwrap();
    let at = |relay: &Relay| relay.status()["reload"]["at"].clone();
    // SIGHUP reads the users again, too.
    let users = users_of(&pair.primary);
    relay.file("users.toml", 0o600, &users.replace("a = {", "renamed = {"));
    let before = at(relay);
    relay.process().signal(Signal::HUP);
    wait_until("the files to be read again", || at(relay) != before);
    pair.set_rules("host replication all all trust\n");
    assert!(psql(&installation, ("127.0.0.1", relay.port), "renamed", "").contains("let in"));
    assert_eq!(psql(&installation, ("127.0.0.1", relay.port), "a", ""), "role \"a\" does not exist");

    for (name, mode, text, complaint) in [
        ("pg_hba.conf", 0o600, "host all all all magic\n", "line 1: invalid authentication method \"magic\""),
        ("users.toml", 0o600, "a = \"hush\"", "line 1: user \"a\" has no SCRAM-SHA-256 verifier"),
        ("users.toml", 0o644, &users, "has world access"),
    ] {
        let file = if name == "pg_hba.conf" { pair.hba.clone() } else { relay.file(name, 0o600, "") };
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        let before = at(relay);
        relay.process().signal(Signal::HUP);
        wait_until("the files to be looked at", || at(relay) != before);
        let told = relay.status()["reload"]["error"].as_str().unwrap_or_default().to_owned();
        assert!(told.contains(complaint) && !told.contains("hush"), "{told}");
        assert_eq!(relay.metric("walrelay_reload_failed "), Some(1.0));
        relay.wait_logged(&complaint.replace('"', "\\\""));
        let (status, answer) = relay.post("/reload").unwrap();
        assert_eq!((status, answer["error"].as_str()), (422, Some(told.as_str())));
        // As before: nothing of it holds.
        assert!(psql(&installation, ("127.0.0.1", relay.port), "renamed", "").contains("let in"));
        relay.file("users.toml", 0o600, &users.replace("a = {", "renamed = {"));
        std::fs::write(&pair.hba, format!("{HARNESS}host replication all all trust\n")).unwrap();
    }
    assert_eq!(relay.post("/reload").unwrap().0, 200);
    assert!(relay.status()["reload"]["error"].is_null());
    assert_eq!(relay.metric("walrelay_reload_failed "), Some(0.0));
    assert!(
        there.query("IDENTIFY_SYSTEM").unwrap().iter().any(|message| message.kind == b'D'),
        "who was there"
    );
}

#[test]
fn each_login_is_one_line_of_the_log_whatever_the_client_calls_itself() {
    let Some(installation) = Installation::any() else { return };
    let pair = Pair::of(&installation);
    pair.set_rules("host replication all all scram-sha-256\n");
    let relay = &pair.relay;
    assert_eq!(psql(&installation, ("127.0.0.1", relay.port), "a", "pencil"), "let in");
    assert!(
        psql(&installation, ("127.0.0.1", relay.port), "a", "guess")
            .contains("password authentication failed")
    );
    let strange = "new\nline \u{1b}[31mred \"quoted\"";
    let visitor =
        Visitor { from: Some(Ipv4Addr::LOCALHOST), user: strange, replication: "true", database: "" };
    assert_eq!(visitor.first_answer(relay.port, Path::new("")), "asked for 10");
    pair.set_rules("host replication a all scram-sha-256\n");
    assert!(visitor.first_answer(relay.port, Path::new("")).starts_with("28000 no pg_hba.conf entry"));
    relay.wait_logged("no pg_hba.conf entry");
    let log = relay.log();
    assert!(!log.contains('\u{1b}'), "an escape sequence is in the log");
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let logins = |message: &str, user: &str| {
        let of_user = |line: &&serde_json::Value| {
            line["fields"]["message"] == message && line["fields"]["user"] == user
        };
        lines.iter().filter(of_user).cloned().collect::<Vec<_>>()
    };
    let [accepted] = &logins("client connected", "a")[..] else { panic!("{log}") };
    let fields = &accepted["fields"];
    assert_eq!((&fields["result"], &fields["method"]), (&"accepted".into(), &"scram-sha-256".into()));
    let rule = fields["rule"].as_str().unwrap();
    assert!(rule.ends_with("pg_hba.conf:3"), "{rule}");
    assert!(accepted["span"]["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{accepted}");
    let [refused] = &logins("client refused", "a")[..] else { panic!("{log}") };
    let fields = &refused["fields"];
    assert_eq!((&fields["result"], &fields["sqlstate"]), (&"refused".into(), &"28P01".into()));
    assert_eq!(logins("client refused", strange).len(), 1, "{log}");
    let (_, metrics) = crate::support::http::ask(
        relay.admin_port,
        "GET /metrics",
        Some(relay.token().unwrap()),
        std::time::Duration::from_secs(5),
    )
    .unwrap();
    assert!(!metrics.contains("[31m") && !metrics.contains("quoted"), "a name is in the metrics");
    assert_eq!(relay.metric("walrelay_downstream_failed_logins_total "), Some(1.0));
}

#[test]
fn a_relay_that_would_let_in_everybody_does_not_start() {
    let mut relay = Relay::new("relay", 1);
    let hba = relay.file("hba", 0o600, "host replication all all trust\n");
    let check = |relay: &Relay| {
        let path = relay.write_config();
        let (status, _, complaint) = Relay::command(&["config", "check", "--config", path.to_str().unwrap()]);
        (status.success(), complaint)
    };
    relay.set("downstream.listen", "\"0.0.0.0:0\"");
    let (is_good, complaint) = check(&relay);
    assert!(!is_good && complaint.contains("there is no \"downstream.users\" file"), "{complaint}");
    let own = Relay::command_with_input(&["scram", "--user", "standby"], "pencil\n");
    let users = relay.file("users.toml", 0o600, &own);
    relay.set("downstream.users", &format!("{users:?}"));
    let (is_good, complaint) = check(&relay);
    assert!(!is_good && complaint.contains("there is no \"downstream.tls\" to encrypt with"), "{complaint}");
    relay.set("downstream.allow_plaintext", "true");
    assert_eq!(check(&relay), (true, String::new()));
    relay.set("downstream.hba", &format!("{hba:?}"));
    let (is_good, complaint) = check(&relay);
    assert!(!is_good && complaint.contains("line 1: this line lets in whoever connects"), "{complaint}");
    relay.launch();
    assert!(!relay.wait_for_end().success(), "it runs");
    relay.set("downstream.allow_remote_trust", "true");
    assert_eq!(check(&relay), (true, String::new()));
    relay.file("hba", 0o600, "host replication all localhost trust\n");
    let (is_good, complaint) = check(&relay);
    assert!(!is_good && complaint.contains("host name \"localhost\" is not supported"), "{complaint}");
    let ident = relay.file("ident", 0o600, "map\n");
    relay.unset("downstream.hba");
    relay.set("downstream.ident", &format!("{ident:?}"));
    let (is_good, complaint) = check(&relay);
    assert!(!is_good && complaint.contains("line 1: missing entry at end of line"), "{complaint}");
}

#[test]
fn a_standby_comes_through_a_socket_as_its_own_user() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let owner = Program::new("id").arg("-un").for_server_user().run();
    let mut relay = Relay::new("relay", primary.port);
    let hba = relay.file("hba", 0o644, "local replication all peer map=standbys\n");
    let ident = relay.file("ident", 0o644, &format!("standbys {owner} dc2_standby\n"));
    relay.set("downstream.hba", &format!("{hba:?}"));
    relay.set("downstream.ident", &format!("{ident:?}"));
    let socket = primary.socket_folder().to_str().unwrap().to_owned();
    relay.set("downstream.listen", &format!("[\"127.0.0.1:{}\", {socket:?}]", relay.port));
    relay.launch();
    wait_until("the relay to have streamed", || relay.status()["upstream"]["sessions"].as_u64() > Some(0));
    let attempt = |user: &str| {
        let conninfo = format!("host={socket} port={} user={user} replication=true", relay.port);
        Program::new(installation.program("psql"))
            .args(["-X", "-d", &conninfo, "-c", "IDENTIFY_SYSTEM"])
            .for_server_user()
            .succeeds()
    };
    assert!(attempt("dc2_standby"));
    assert!(!attempt(&owner) && !attempt("other"), "as somebody that the map does not name");
    relay.wait_logged("no match in usermap");
}

/// Salt and iterations that a client is told who asks for this user.
fn asked_of(port: u16, user: &str) -> String {
    let mut client = RawClient::connect(port).unwrap();
    client.send_startup(&[("user", user), ("replication", "true")]).unwrap();
    let mut next = || client.read_message(std::time::Duration::from_secs(10)).unwrap().unwrap();
    assert_eq!(next().kind, b'R');
    let first = b"n,,n=,r=rOprNGfwEbeRWgbNEkqO";
    let body = [&b"SCRAM-SHA-256\0"[..], &(first.len() as u32).to_be_bytes(), first].concat();
    client.send(b'p', &body).unwrap();
    let answer = client.read_message(std::time::Duration::from_secs(10)).unwrap().unwrap();
    let text = String::from_utf8_lossy(&answer.body[4..]).into_owned();
    text.split_once(",s=").unwrap_or_else(|| panic!("{text}")).1.to_owned()
}

#[test]
fn whoever_does_not_exist_is_asked_the_same_after_a_restart_with_other_users() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let user = |name: &str| Relay::command_with_input(&["scram", "--user", name], "pencil\n");
    let with_users = |name: &str, text: &str| {
        let mut relay = Relay::new(name, primary.port);
        let users = relay.file("users.toml", 0o600, text);
        relay.set("downstream.users", &format!("{users:?}"));
        relay.start();
        relay
    };
    let (first, second) = (user("standby"), user("added"));
    let mut relay = with_users("relay", &first);
    let [nobody, standby] = ["nobody", "standby"].map(|name| asked_of(relay.port, name));
    assert_ne!(nobody, standby);
    assert_eq!(asked_of(relay.port, "nobody"), nobody);
    relay.terminate();
    relay.file("users.toml", 0o600, &format!("{first}{second}"));
    relay.start();
    assert_eq!(asked_of(relay.port, "standby"), standby);
    assert_eq!(asked_of(relay.port, "nobody"), nobody, "one who does not exist is not asked as others are");
    // It is the directory's secret, and no other's.
    let file = relay.data_dir().join("walrelay.mock_nonce");
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(file).unwrap());
    assert_eq!(mode & 0o777, 0o600);
    assert_ne!(asked_of(with_users("other", &first).port, "nobody"), nobody);
}
