//! Configuration files as a whole: defaults, the example, and what is said of every mistake.

use std::{path::Path, time::Duration};

use secrecy::ExposeSecret as _;

use crate::access::{Method, Secret};
use crate::config::{
    Config, LinkMode, ListenAddress, LogFormat, LogLevel, SendPolicies, SendPolicy,
    document::{Document, known_keys},
    raw::Raw,
};
use crate::conninfo::FixedSurroundings;
use crate::protocol::link::{Codec, Compression};

const EXAMPLE: &str = include_str!("../../config/walrelay.example.toml");
const CASCADE: &str = include_str!("../../config/relay.cascade.toml");

/// The least that is needed.
pub(super) const LEAST: &str = "[relay]\nname = \"r\"\ndata_dir = \"d\"\n[upstream]\nconninfo = \"host=h\"\n";

pub(super) const VERIFIER: &str = "SCRAM-SHA-256$4096:c2FsdHNhbHRzYWx0c2E=$\
                        MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=:MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=";

pub(super) fn surroundings() -> FixedSurroundings {
    FixedSurroundings::of_user("walrelay")
}

pub(super) fn load_in(text: &str, surroundings: FixedSurroundings) -> Result<Config, String> {
    let surroundings = surroundings.with_file("/etc/walrelay/w.toml", 0o644, text);
    Config::load_in(Path::new("/etc/walrelay/w.toml"), &surroundings).map_err(|error| error.to_string())
}

pub(super) fn load(text: &str) -> Result<Config, String> {
    load_in(text, surroundings())
}

pub(super) fn methods(config: &Config) -> Vec<Method> {
    config.downstream.access.rules.iter().map(|rule| rule.method).collect()
}

/// What is said of the least file with `lines` added, without the file's name.
fn complaint(lines: &str) -> String {
    let text = format!("{lines}\n{LEAST}");
    let text = if lines.starts_with('[') { text } else { format!("{LEAST}{lines}\n") };
    complaint_about(&text)
}

fn complaint_about(text: &str) -> String {
    let said = load(text).unwrap_err();
    let rest = said.strip_prefix("configuration file \"/etc/walrelay/w.toml\"").unwrap_or(&said);
    rest.trim_start_matches([',', ':', ' ']).to_owned()
}

#[test]
fn the_least_file_gives_the_defaults() {
    let config = load(LEAST).unwrap();
    assert_eq!(config.relay.name, "r");
    assert_eq!(config.relay.data_dir, Path::new("/etc/walrelay/d"));
    assert_eq!(config.upstream.slot, None);
    assert!(config.upstream.create_slot);
    assert_eq!(config.upstream.wal_receiver_timeout, Some(Duration::from_secs(60)));
    assert_eq!(config.upstream.wal_receiver_status_interval, Some(Duration::from_secs(10)));
    assert_eq!(config.upstream.wal_retrieve_retry_interval, Duration::from_secs(5));
    assert_eq!(config.upstream.conninfo.application_name.as_deref(), Some("r"));
    assert_eq!(config.downstream.listen, [ListenAddress::Tcp("127.0.0.1:5433".parse().unwrap())]);
    assert_eq!(methods(&config), [Method::Trust; 3]);
    assert!(config.downstream.access.users.is_none() && config.downstream.tls.is_none());
    assert_eq!(config.downstream.send, SendPolicies::for_all(SendPolicy::Received));
    assert_eq!(config.downstream.max_wal_senders, 64);
    assert_eq!(config.store.wal_keep_size, 1 << 30);
    assert_eq!(config.store.tail_size, 64 << 20);
    assert_eq!(config.admin.listen, Some("127.0.0.1:9588".parse().unwrap()));
    assert_eq!((config.log.level, config.log.format), (LogLevel::Info, LogFormat::Auto));
    assert!(config.warnings.is_empty());
}

#[test]
fn the_example_spells_out_exactly_the_defaults() {
    let mut raw: Raw = Document::parse(EXAMPLE).ok().unwrap().read(&Raw::default()).unwrap();
    // Samples: these have no default.
    assert!(raw.upstream.conninfo.take().is_some());
    for sample in [&mut raw.relay.name, &mut raw.relay.data_dir] {
        assert!(sample.take().is_some());
    }
    assert_eq!(raw, Raw::default());
    load(EXAMPLE).unwrap();
}

#[test]
fn the_example_names_every_key_and_no_other() {
    let mut section = String::new();
    let mut named = Vec::new();
    for line in EXAMPLE.lines() {
        // A key without a default is commented out, with no blank after the sign; text has one.
        let line = line.strip_prefix('#').unwrap_or(line);
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']').to_owned();
        } else if let Some((name, _)) = line.split_once(" = ").filter(|_| !line.starts_with(' ')) {
            named.push(format!("{section}.{name}"));
        }
    }
    named.sort();
    let mut known = known_keys(&Raw::default());
    known.sort();
    assert_eq!(named, known);
}

#[test]
fn commented_samples_of_the_example_are_good() {
    let text = EXAMPLE
        .lines()
        .map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line));
    let text = text.collect::<Vec<_>>().join("\n");
    let surroundings = surroundings()
        .with_file("/etc/walrelay/users.toml", 0o600, &format!("standby = \"{VERIFIER}\""))
        .with_file("/etc/walrelay/pg_hba.conf", 0o644, "host replication all 10.1.0.0/16 scram-sha-256")
        .with_file("/etc/walrelay/pg_ident.conf", 0o644, "map root standby")
        .with_file("/etc/walrelay/admin.token", 0o600, "0123456789abcdef\n")
        .with_file("/etc/walrelay/read.token", 0o600, "fedcba9876543210\n");
    let config = load_in(&text, surroundings).unwrap();
    assert_eq!(config.upstream.slot.as_deref(), Some("walrelay_dc1"));
    let access = config.downstream.access;
    let Some(Secret::Scram(verifier)) = &access.users.as_ref().unwrap().user("standby").unwrap().secret
    else {
        panic!()
    };
    assert_eq!(verifier.to_string(), VERIFIER);
    assert_eq!(access.rules.iter().count(), 1);
    assert_eq!(config.downstream.tls.unwrap().cert, Path::new("/etc/walrelay/server.crt"));
    assert_eq!(config.admin.token.unwrap().expose_secret(), "0123456789abcdef");
    assert_eq!(config.admin.read_token.unwrap().expose_secret(), "fedcba9876543210");
}

#[test]
fn links_are_checked() {
    let config = load(LEAST).unwrap();
    assert_eq!(
        (config.upstream.link, config.upstream.link_codecs),
        (LinkMode::Prefer, vec![Codec::Zstd, Codec::Lz4])
    );
    assert_eq!(config.upstream.link_retry_interval, Some(Duration::from_secs(300)));
    assert_eq!(config.downstream.links.compressions, [Compression::Zstd { level: 1 }, Compression::Lz4]);
    assert_eq!((config.downstream.links.link_rate_max, config.downstream.links.links_rate_max), (None, None));
    let lines = "[downstream]\nlink_codecs = [\"lz4\", \"zstd:-3\"]\nlink_rate_max = \"10MB\"\nlinks_rate_max = \"1GB\"\n";
    let links = load(&format!("{LEAST}{lines}")).unwrap().downstream.links;
    assert_eq!(links.compressions, [Compression::Lz4, Compression::Zstd { level: -3 }]);
    assert_eq!(links.link_rate_max.map(u64::from), Some(10 << 20));
    for (line, said) in [
        ("link = \"maybe\"", "expected \"off\", \"prefer\", or \"require\""),
        ("link_codecs = [\"gzip\"]", "expected \"zstd\" or \"lz4\", each at most once"),
        ("link_codecs = [\"zstd\", \"zstd\"]", "each at most once"),
        ("link_codecs = []", "upstream.link = \"off\" turns links off"),
    ] {
        let complaint = complaint(line);
        assert!(complaint.contains(said), "{complaint}");
    }
    for (line, said) in [
        ("link_codecs = [\"zstd:99\"]", "with a level of -7 to 19"),
        ("link_codecs = [\"zstd:1\", \"zstd:3\"]", "each codec at most once"),
        ("link_rate_max = \"7B\"", "from 1kB to 1TB"),
        ("links_rate_max = \"soon\"", "from 1kB to 1TB"),
    ] {
        let complaint = complaint(&format!("[downstream]\n{line}"));
        assert!(complaint.contains(said), "{complaint}");
    }
}

#[test]
fn the_cascade_example_is_good() {
    let users = format!("standby = \"{VERIFIER}\"");
    let config =
        load_in(CASCADE, surroundings().with_file("/etc/walrelay/users.toml", 0o640, &users)).unwrap();
    assert_eq!(config.upstream.conninfo.hosts.len(), 2);
    let listen = config.downstream.listen.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(listen, ["10.2.0.20:5433", "/var/run/walrelay/.s.PGSQL.5433"]);
}

#[test]
fn files_that_are_no_settings_are_refused() {
    assert_eq!(complaint_about("[relay\n"), "line 1: syntax error: unclosed table, expected `]`");
    assert_eq!(
        complaint_about("[relay]\nname = \n"),
        "line 2: syntax error: string values must be quoted, expected literal string"
    );
    assert_eq!(
        complaint_about("[relay]\nname = \"a\"\nname = \"b\"\n"),
        "line 3: syntax error: duplicate key"
    );
    let missing = Config::load_in(Path::new("/none"), &surroundings()).unwrap_err();
    assert_eq!(missing.to_string(), "could not read configuration file \"/none\"");
    let error = Config::load(Path::new("/dev/null")).unwrap_err();
    assert_eq!(error.to_string(), "configuration file \"/dev/null\" is not a plain file");
}

#[test]
fn unknown_keys_are_named_with_the_one_that_was_meant() {
    assert_eq!(
        complaint("[store]\ntailsize = \"1GB\""),
        "line 2: unrecognized configuration parameter \"store.tailsize\" (perhaps you meant \"store.tail_size\")"
    );
    assert_eq!(
        complaint("[store]\nmax_wal_senders = 5"),
        "line 2: unrecognized configuration parameter \"store.max_wal_senders\" \
         (perhaps you meant \"downstream.max_wal_senders\")"
    );
    assert_eq!(complaint("[store]\nx = 5"), "line 2: unrecognized configuration parameter \"store.x\"");
    assert_eq!(complaint("[archive]\nurl = 5"), "line 1: unrecognized configuration parameter \"archive\"");
    assert_eq!(
        complaint_about("name = \"r\"\n[relay]\n"),
        "line 1: unrecognized configuration parameter \"name\" (perhaps you meant \"relay.name\")"
    );
}

#[test]
fn wrong_types_are_named_with_the_right_one() {
    let cases = [
        (
            "[store]\nspare_segments = \"2\"",
            "line 2: invalid value for parameter \"store.spare_segments\": \"2\" (expected an integer)",
        ),
        ("[log]\nlevel = 5", "line 2: invalid value for parameter \"log.level\": 5 (expected a string)"),
        ("slot = true", "line 6: invalid value for parameter \"upstream.slot\": true (expected a string)"),
        (
            "create_slot = \"yes\"",
            "line 6: invalid value for parameter \"upstream.create_slot\": \"yes\" (expected a boolean)",
        ),
        (
            "[store]\ntail_size = true",
            "line 2: invalid value for parameter \"store.tail_size\": true (expected a number with a unit, in quotes)",
        ),
        (
            "[downstream]\nlisten = 5433",
            "line 2: invalid value for parameter \"downstream.listen\": 5433 (expected a string or a list of strings)",
        ),
    ];
    for (lines, expected) in cases {
        assert_eq!(complaint(lines), expected);
    }
    // Never as it was written: it may hold a password.
    assert_eq!(
        complaint_about("[upstream]\nconninfo = [\"password=hush\"]\n"),
        "line 2: invalid value for parameter \"upstream.conninfo\": ******** (expected a string)"
    );
}

#[test]
fn a_slot_that_may_be_dropped_must_be_one_that_is_made_again() {
    assert_eq!(
        complaint("create_slot = false\nslot_wal_keep_max = \"1GB\""),
        "line 7: invalid value for parameter \"upstream.slot_wal_keep_max\": \"1GB\" (a slot that is dropped must be made again: upstream.create_slot must be true)"
    );
}

#[test]
fn an_acknowledge_policy_is_explained_in_the_words_of_its_grammar() {
    for (policy, why) in [
        ("ANY 0 (a)", "number of synchronous standbys (0) must be greater than zero"),
        ("ANY 1 (a", "syntax error at end of input"),
    ] {
        let text = complaint(&format!("acknowledge = \"{policy}\""));
        assert!(text.ends_with(&format!("\"upstream.acknowledge\": \"{policy}\" ({why})")), "{text}");
    }
}

#[test]
fn who_may_report_for_a_standby_must_be_somebody_and_where_users_are_known_nobody_else() {
    let with_users = |lines: &str| {
        let text = format!("{LEAST}{lines}\n[downstream]\nusers = \"users.toml\"\n");
        let users = format!("relay_dc2 = \"{VERIFIER}\"\narchiver = \"{VERIFIER}\"");
        load_in(&text, surroundings().with_file("/etc/walrelay/users.toml", 0o600, &users))
    };
    let policy = "acknowledge = \"ANY 1 (dc2_a, dc2_b)\"";
    let bound = |users: &str| format!("{policy}\nacknowledge_users = {{ {users} }}");
    let right = bound("dc2_a = \"relay_dc2\", DC2_B = \"relay_dc2\"");
    assert_eq!(with_users(&right).unwrap().upstream.acknowledge_users.len(), 2);
    for (lines, why) in [
        (
            policy.to_owned(),
            "line 6: invalid value for parameter \"upstream.acknowledge\": \"dc2_a\" (no user is bound to it",
        ),
        (
            bound("dc2_a = \"relay_dc2\""),
            "line 6: invalid value for parameter \"upstream.acknowledge\": \"dc2_b\" (no user is bound",
        ),
        (
            bound("dc2_a = \"relay_dc2\", dc2-b = \"relay_dc2\""),
            "line 7: invalid value for parameter \"upstream.acknowledge_users\": \"dc2-b\" (there is no such name in",
        ),
        (bound("dc2_a = \"relay_dc2\", dc2_b = \"nobody\""), "\"dc2_b\" (user \"nobody\" is not in the file"),
        (
            bound("DC2_A = \"archiver\", dc2_a = \"relay_dc2\", dc2_b = \"relay_dc2\""),
            "\"dc2_a\" (the name is there twice",
        ),
    ] {
        let said = with_users(&lines).unwrap_err();
        assert!(said.contains(why), "{said}");
    }
    // Whoever was let in; and where nobody proves who he is, names that are there are all that can be asked for.
    assert!(with_users("acknowledge = \"ANY 1 (*)\"\nacknowledge_users = { a = \"archiver\" }").is_ok());
    assert!(load(&format!("{LEAST}{policy}")).is_ok());
    assert!(load(&format!("{LEAST}{}", bound("dc2_a = \"whoever\""))).is_ok());
    assert!(complaint(&bound("dc2a = \"whoever\"")).contains("\"dc2a\" (there is no such name"));
    assert!(with_users("acknowledge_users = { gone = \"nobody\" }").is_ok(), "nobody is waited for");
}

#[test]
fn wrong_values_are_named_with_the_right_ones() {
    let cases = [
        (
            "[store]\ntail_size = \"64mb\"",
            "line 2: invalid value for parameter \"store.tail_size\": \"64mb\" \
             (valid units are \"B\", \"kB\", \"MB\", \"GB\", and \"TB\")",
        ),
        (
            "[store]\nwal_keep_size = 1024",
            "line 2: invalid value for parameter \"store.wal_keep_size\": \"1024\" \
             (valid units are \"B\", \"kB\", \"MB\", \"GB\", and \"TB\")",
        ),
        (
            "[downstream]\nwal_sender_timeout = \"1m\"",
            "line 2: invalid value for parameter \"downstream.wal_sender_timeout\": \"1m\" \
             (valid units are \"us\", \"ms\", \"s\", \"min\", \"h\", and \"d\")",
        ),
        (
            "[downstream]\nwal_sender_timeout = \"30d\"",
            "line 2: 30d is outside the valid range for parameter \"downstream.wal_sender_timeout\" (0 .. 24d)",
        ),
        (
            "[downstream]\nauthentication_timeout = 0",
            "line 2: 0 is outside the valid range for parameter \"downstream.authentication_timeout\" (1s .. 10min)",
        ),
        (
            "[downstream]\nmax_wal_senders = -1",
            "line 2: -1 is outside the valid range for parameter \"downstream.max_wal_senders\" (1 .. 262143)",
        ),
        (
            "[store]\ntail_size = \"1kB\"",
            "line 2: 1kB is outside the valid range for parameter \"store.tail_size\" (1MB .. 1TB)",
        ),
        (
            "[store]\ntail_size = \"32MB\"\nunwritten_size = \"64MB\"",
            "line 3: parameter \"store.unwritten_size\" (64MB) must not be greater than \"store.tail_size\" (32MB)",
        ),
        (
            "[downstream]\nunauthenticated_connections_max = 8",
            "line 2: parameter \"downstream.unauthenticated_connections_per_address_max\" (16) must not be greater than \
             \"downstream.unauthenticated_connections_max\" (8)",
        ),
        (
            "[log]\nlevel = \"loud\"",
            "line 2: invalid value for parameter \"log.level\": \"loud\" \
             (expected \"error\", \"warn\", \"info\", \"debug\", or \"trace\")",
        ),
        (
            "[log]\nformat = \"xml\"",
            "line 2: invalid value for parameter \"log.format\": \"xml\" (expected \"auto\", \"text\", or \"json\")",
        ),
        (
            "slot = \"Bad-Name\"",
            "line 6: invalid value for parameter \"upstream.slot\": \"Bad-Name\" (replication slot names may only contain \
             up to 63 lower case letters, numbers, and underscore characters)",
        ),
        (
            "[admin]\nlisten = \"9588\"",
            "line 2: invalid value for parameter \"admin.listen\": \"9588\" \
             (expected an IP address and a port, as in \"127.0.0.1:9588\" or \"[::1]:9588\")",
        ),
    ];
    for (lines, expected) in cases {
        assert_eq!(complaint(lines), expected);
    }
}

#[test]
fn who_is_sent_what_is_one_of_two() {
    for (key, line) in [("send", "send = \"written\""), ("send_to", "send_to = { archiver = \"written\" }")] {
        let advice = "(expected \"received\" or \"flushed\")";
        assert_eq!(
            complaint(&format!("[downstream]\n{line}")),
            format!("line 2: invalid value for parameter \"downstream.{key}\": \"written\" {advice}")
        );
    }
}

#[test]
fn who_is_sent_what_is_said_once_for_each_application_name() {
    assert_eq!(
        complaint("[downstream]\nsend_to = { archiver = \"flushed\", Archiver = \"received\" }"),
        "line 2: invalid value for parameter \"downstream.send_to\": \"archiver\" \
         (the name is there twice; case does not matter)"
    );
}

#[test]
fn what_has_no_default_must_be_set() {
    assert_eq!(complaint_about(""), "parameter \"relay.name\" must be set, as in name = \"dc1_a\"");
    assert_eq!(
        complaint_about("[relay]\nname = \"r\""),
        "parameter \"relay.data_dir\" must be set, as in data_dir = \"/var/lib/walrelay\""
    );
    assert_eq!(
        complaint_about("[relay]\nname = \"r\"\ndata_dir = \"d\""),
        "parameter \"upstream.conninfo\" must be set, as in \
         conninfo = \"host=10.1.0.10,10.1.0.11 user=replicator target_session_attrs=read-write\""
    );
    let named = |name: &str| complaint_about(&LEAST.replace("\"r\"", &format!("\"{name}\"")));
    let advice = "(expected 1 to 63 printable ASCII characters)";
    assert_eq!(named("é"), format!("line 2: invalid value for parameter \"relay.name\": \"é\" {advice}"));
    let long = "x".repeat(64);
    assert_eq!(
        named(&long),
        format!("line 2: invalid value for parameter \"relay.name\": \"{long}\" {advice}")
    );
}

#[test]
fn conninfo_errors_are_libpqs_and_show_no_password() {
    let conninfo = |text: &str| complaint_about(&LEAST.replace("host=h", text));
    assert_eq!(
        conninfo("host=h sslmod=require password=hush"),
        "line 5: invalid value for parameter \"upstream.conninfo\": invalid connection option \"sslmod\""
    );
    assert_eq!(
        conninfo("host=h port=x"),
        "line 5: invalid value for parameter \"upstream.conninfo\": \
         invalid integer value \"x\" for connection option \"port\""
    );
    let config = load(&LEAST.replace("host=h", "host=h password=hush")).unwrap();
    assert_eq!(
        config.warnings,
        ["configuration file \"/etc/walrelay/w.toml\" holds a password and has world access; \
          permissions should be u=rw,g=r (0640) or less"]
    );
    assert!(!format!("{config:?}").contains("hush"));
}

#[test]
fn only_local_addresses_are_trusted() {
    let listen = |value: &str| load(&format!("{LEAST}[downstream]\nlisten = {value}\n"));
    for good in [
        "\"[::1]:1\"",
        "\"127.8.9.1:1\"",
        "\"localhost:1\"",
        "\"/tmp\"",
        "[\"127.0.0.1:0\", \"127.0.0.1:0\"]",
    ] {
        assert_eq!(methods(&listen(good).unwrap()), [Method::Trust; 3], "{good}");
    }
    for bad in ["0.0.0.0:5433", "[::]:5433", "10.0.0.1:5433", "[::ffff:10.0.0.1]:1"] {
        let said = listen(&format!("[\"127.0.0.1:1\", \"{bad}\"]")).unwrap_err();
        assert!(
            said.contains(&format!("line 7: parameter \"downstream.listen\" names \"{bad}\", which")),
            "{said}"
        );
    }
    assert_eq!(
        complaint("[downstream]\nlisten = \"0.0.0.0:5433\""),
        "line 2: parameter \"downstream.listen\" names \"0.0.0.0:5433\", which is reachable by others, but there is no \
         \"downstream.users\" file to authenticate them with (set it, or listen on 127.0.0.1, [::1] or a Unix-domain \
         socket directory)"
    );
    assert_eq!(
        complaint("[downstream]\ntrust_local = false"),
        "line 2: parameter \"downstream.users\" must be set when \"downstream.trust_local\" is false"
    );
    let wrong = "line 2: invalid value for parameter \"downstream.listen\": \"db1:5433\" (expected an IP address and a port, \
                 as in \"127.0.0.1:5433\" or \"[::]:5433\", or the directory for a Unix-domain socket, as in \
                 \"/var/run/walrelay\")";
    assert_eq!(complaint("[downstream]\nlisten = \"db1:5433\""), wrong);
    assert_eq!(
        complaint("[downstream]\nlisten = []"),
        "parameter \"downstream.listen\" must be set, as in listen = \"127.0.0.1:5433\""
    );
    assert_eq!(
        complaint("[downstream]\nlisten = [\"127.0.0.1:1\", \"localhost:1\"]"),
        "line 2: parameter \"downstream.listen\" names \"127.0.0.1:1\" twice"
    );
    assert_eq!(
        complaint("[admin]\nlisten = \"127.0.0.1:5433\""),
        "line 2: parameter \"admin.listen\" names \"127.0.0.1:5433\" twice"
    );
}

#[test]
fn sockets_are_where_libpq_looks_for_them() {
    let config = load(&format!("{LEAST}[downstream]\nlisten = [\"/run/w/\", \"127.0.0.1:6000\"]\n")).unwrap();
    assert_eq!(config.downstream.listen[0], ListenAddress::Unix("/run/w/.s.PGSQL.6000".into()));
    let config = load(&format!("{LEAST}[downstream]\nlisten = \"/run/w\"\n")).unwrap();
    assert_eq!(config.downstream.listen, [ListenAddress::Unix("/run/w/.s.PGSQL.5433".into())]);
    let config = load(&format!("{LEAST}[downstream]\nlisten = \"@walrelay\"\n")).unwrap();
    assert_eq!(config.downstream.listen, [ListenAddress::Unix("@walrelay/.s.PGSQL.5433".into())]);
}

#[test]
fn pages_that_others_can_reach_want_a_word_about_that_and_a_token() {
    for address in ["0.0.0.0:9588", "[::]:9588", "10.0.0.1:9588", "[::ffff:10.0.0.1]:9588"] {
        assert_eq!(
            complaint(&format!("[admin]\nlisten = \"{address}\"")),
            format!(
                "line 2: parameter \"admin.listen\" names \"{address}\", which is reachable by others, but pages and tokens are \
                 not encrypted there (listen on 127.0.0.1 or [::1], behind a proxy that speaks TLS, or set \
                 \"admin.allow_plaintext\" to true where the network is private)"
            )
        );
    }
    assert_eq!(
        complaint("[admin]\nlisten = \"0.0.0.0:9588\"\nallow_plaintext = true"),
        "line 2: parameter \"admin.token_file\" or \"admin.read_token_file\" must be set when \"admin.listen\" \
         (\"0.0.0.0:9588\") is not a loopback address"
    );
    let with_token = |lines: &str, text: &str| {
        let surroundings = surroundings().with_file("/t", 0o600, text);
        load_in(&format!("{LEAST}[admin]\nlisten = \"0.0.0.0:9588\"\n{lines}\n"), surroundings)
    };
    for key in ["token_file", "read_token_file"] {
        let lines = format!("{key} = \"/t\"\nallow_plaintext = true");
        assert!(with_token(&lines, "0123456789abcdef\n").is_ok());
        for bad in ["", "short", "0123456789 abcdef", "0123456789abcdef\nsecond"] {
            assert_eq!(
                with_token(&lines, bad).unwrap_err(),
                "token file \"/t\": the token must be one line of 16 to 1024 printable ASCII characters without spaces"
            );
        }
        let in_clear = with_token(&format!("{key} = \"/t\""), "0123456789abcdef\n").unwrap_err();
        assert!(in_clear.contains("line 7: parameter \"admin.listen\" names"), "{in_clear}");
    }
    assert_eq!(load(&format!("{LEAST}[admin]\nlisten = \"\"\n")).unwrap().admin.listen, None);
}

#[test]
fn a_token_to_read_is_another_one() {
    let files = |read: &str| {
        let surroundings = surroundings().with_file("/t", 0o600, "0123456789abcdef\n").with_file(
            "/r",
            0o600,
            &format!("{read}\n"),
        );
        load_in(&format!("{LEAST}[admin]\ntoken_file = \"/t\"\nread_token_file = \"/r\"\n"), surroundings)
    };
    let admin = files("fedcba9876543210").unwrap().admin;
    assert_eq!(admin.token.unwrap().expose_secret(), "0123456789abcdef");
    assert_eq!(admin.read_token.unwrap().expose_secret(), "fedcba9876543210");
    assert_eq!(
        files("0123456789abcdef").unwrap_err(),
        "configuration file \"/etc/walrelay/w.toml\", line 8: parameter \"admin.read_token_file\" names a file with the token of \
         \"admin.token_file\", so that whoever may only read could change something (write another token into it)"
    );
}

#[test]
fn timeouts_can_be_turned_off() {
    let text = format!(
        "{LEAST}wal_receiver_timeout = 0\nwal_receiver_status_interval = \"0s\"\n[downstream]\nwal_sender_timeout = \"0\"\n"
    );
    let config = load(&text).unwrap();
    assert_eq!(config.upstream.wal_receiver_timeout, None);
    assert_eq!(config.upstream.wal_receiver_status_interval, None);
    assert_eq!(config.downstream.wal_sender_timeout, None);
}
