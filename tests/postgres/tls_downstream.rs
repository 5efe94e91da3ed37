//! The relay as a TLS server: real clients of every major with each `sslmode`, channel binding, certificates that change while
//! clients are connected. What a client may do is compared with what it may do at a primary that has the same certificate.

use std::path::Path;

use rustix::process::Signal;

use crate::support::MB;
use crate::support::certificates::{Authority, Pair};
use crate::support::compare::{assert_equal_clusters, assert_same_wal};
use crate::support::lab::{self, Installation, chosen_majors};
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings};
use crate::support::psql::run_psql;
use crate::support::receivewal::PgReceivewal;
use crate::support::relay::Relay;
use crate::support::wait::wait_until;

/// A primary with TLS, and a relay behind it with the same certificate and the same user.
struct Site {
    primary: Postgres,
    relay: Relay,
}

impl Site {
    fn new(installation: &Installation, server: &Pair, client_ca: Option<&Path>) -> Self {
        let mut primary = Settings::new().segment_size_mb(1).start(installation);
        let data = primary.data();
        for (from, to) in [(&server.cert, "server.crt"), (&server.key, "server.key")] {
            std::fs::copy(from, data.join(to)).unwrap();
            lab::give_all_to_server(&data.join(to));
        }
        primary.add_settings("ssl = on\nssl_cert_file = 'server.crt'\nssl_key_file = 'server.key'\npassword_encryption = 'scram-sha-256'");
        primary.restart(crate::support::postgres::Stop::Fast);
        primary.sql("create role standby replication login password 'secret'");
        primary.demand("host replication standby 127.0.0.1/32 scram-sha-256", "standby");
        let mut relay = Relay::new("tls_site", primary.port).with_token();
        let users = relay.write_file("users.toml", &users_of(&primary));
        relay.set("downstream.users", &format!("{users:?}"));
        let (cert, key) = (
            relay.write_file("server.crt", &read(&server.cert)),
            relay.write_file("server.key", &read(&server.key)),
        );
        let client_ca = client_ca.map_or(String::new(), |path| format!(", client_ca = {path:?}"));
        relay.set("downstream.tls", &format!("{{ cert = {cert:?}, key = {key:?}{client_ca} }}"));
        relay.start();
        Self { primary, relay }
    }

    /// Both asked the same by the same client. The answer's first row has no position in it.
    fn ask_both(
        &self,
        client: &Installation,
        rest: &str,
    ) -> (Result<String, String>, Result<String, String>) {
        let ask = |port: u16| {
            let conninfo = format!("port={port} user=standby password=secret replication=true {rest}");
            run_psql(client, &conninfo, "IDENTIFY_SYSTEM").map(|row| row.split('|').take(2).collect())
        };
        (ask(self.primary.port), ask(self.relay.port))
    }

    /// Whether a client that trusts only this authority is let in.
    fn is_believed(&self, client: &Installation, authority: &Authority) -> bool {
        self.lets_in(client, ("standby", "secret"), authority)
    }

    fn lets_in(&self, client: &Installation, (user, password): (&str, &str), authority: &Authority) -> bool {
        let conninfo = format!(
            "host=127.0.0.1 port={} user={user} password={password} replication=true sslmode=verify-full sslrootcert={}",
            self.relay.port,
            authority.root().display()
        );
        run_psql(client, &conninfo, "IDENTIFY_SYSTEM").is_ok()
    }

    /// The next clients are to see this certificate.
    fn write_pair(&self, renewed: &Pair) {
        self.relay.write_file("server.crt", &read(&renewed.cert));
        self.relay.write_file("server.key", &read(&renewed.key));
    }

    /// pg_receivewal over TLS.
    fn archive(&self, installation: &Installation, arguments: &[&str]) -> PgReceivewal {
        let conninfo =
            format!("host=127.0.0.1 port={} user=standby password=secret sslmode=require", self.relay.port);
        PgReceivewal::start(installation, self.relay.port, &[&["-d", &conninfo], arguments].concat())
    }

    /// Waits until all complete segments up to `upto` are there, and compares them.
    fn wait_archived(&self, archive: &PgReceivewal, upto: u64) {
        let end = upto - upto % MB;
        wait_until("pg_receivewal to have all complete segments", || archive.completed(MB) >= end);
        assert_same_wal(archive.folder(), &self.primary, end);
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

fn shown(verdict: &Result<String, String>) -> String {
    match verdict {
        Ok(_) => "in".to_owned(),
        Err(text) => format!("refused: {}", text.replace('\n', " ")),
    }
}

#[test]
fn each_sslmode_of_each_client_gets_what_a_primary_gives_it() {
    let Some(server) = Installation::any() else { return };
    let (authority, other) = (Authority::new("root"), Authority::new("other"));
    let site = Site::new(&server, &authority.issue("server", "IP:127.0.0.1,DNS:localhost"), None);
    let root = |authority: &Authority| format!("sslrootcert={}", authority.root().display());
    println!("| client | connection | primary | relay |");
    for major in chosen_majors() {
        let Some(client) = Installation::of(major) else { continue };
        let mut cases = Vec::new();
        for mode in ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] {
            cases.push(format!("host=127.0.0.1 sslmode={mode} {}", root(&authority)));
        }
        cases.push(format!("host=localhost sslmode=verify-full {}", root(&authority)));
        cases.push(format!("host=127.0.0.1 sslmode=verify-ca {}", root(&other)));
        for binding in ["disable", "prefer", "require"] {
            cases.push(format!("host=127.0.0.1 sslmode=require channel_binding={binding}"));
        }
        cases.push("host=127.0.0.1 sslmode=disable channel_binding=require".to_owned());
        cases.push("host=127.0.0.1 sslmode=require ssl_max_protocol_version=TLSv1.2".to_owned());
        if major >= 17 && server.major >= 17 {
            cases.push(format!(
                "host=127.0.0.1 sslmode=verify-full sslnegotiation=direct {}",
                root(&authority)
            ));
        }
        for rest in cases {
            let (primary, relay) = site.ask_both(&client, &rest);
            println!("| {major} | {rest} | {} | {} |", shown(&primary), shown(&relay));
            assert_eq!(relay.is_ok(), primary.is_ok(), "{major}: {rest}\n{primary:?}\n{relay:?}");
            assert_eq!(relay.ok(), primary.ok());
        }
        if major >= 17 {
            let rest =
                format!("host=127.0.0.1 sslmode=verify-full sslnegotiation=direct {}", root(&authority));
            assert!(site.ask_both(&client, &rest).1.is_ok(), "direct, whatever the primary can");
        }
        let conninfo = format!(
            "host=127.0.0.1 port={} user=standby password=secret dbname=postgres sslmode=require",
            site.relay.port
        );
        let refused = run_psql(&client, &conninfo, "select 1").unwrap_err();
        assert!(refused.contains("user \"standby\", database \"postgres\", SSL encryption"), "{refused}");
    }
}

#[test]
fn standbys_and_archives_stream_over_bound_connections() {
    let authority = Authority::new("root");
    let server = authority.issue("server", "IP:127.0.0.1");
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let site = Site::new(&installation, &server, None);
        let tls = format!(
            "user=standby password=secret sslmode=verify-full channel_binding=require sslrootcert={}",
            authority.root().display()
        );
        // The server's user must be able to read the root.
        let standby = site.primary.standby("bound", site.relay.port, "");
        let root = standby.data().join("root.crt");
        std::fs::copy(authority.root(), &root).unwrap();
        lab::give_all_to_server(&root);
        standby.add_settings(&format!(
            "primary_conninfo = 'host=127.0.0.1 port={} application_name=bound user=standby password=secret sslmode=verify-full channel_binding=require sslrootcert={}'",
            site.relay.port,
            root.display()
        ));
        standby.reload();
        let conninfo = format!("host=127.0.0.1 port={} {tls}", site.relay.port);
        let archive = site.archive(&installation, &["-d", &conninfo, "--synchronous"]);
        site.relay.wait_downstream("bound", "streaming");
        site.relay.wait_downstream("pg_receivewal", "streaming");
        // What is cold must be read, and not touched, to be encrypted.
        write_wal(&site.primary, 24 * MB);
        let upto = site.primary.flushed();
        standby.wait_replayed(upto);
        assert_equal_clusters(&site.primary, &standby);
        site.wait_archived(&archive, upto);
    }
}

#[test]
fn who_is_far_behind_catches_up_from_files_over_tls() {
    let Some(installation) = Installation::any() else { return };
    let authority = Authority::new("root");
    let site = Site::new(&installation, &authority.issue("server", "IP:127.0.0.1"), None);
    // pg_receivewal's own --create-slot keeps no WAL from the beginning on.
    let conninfo = format!(
        "host=127.0.0.1 port={} user=standby password=secret sslmode=require replication=true",
        site.relay.port
    );
    run_psql(&installation, &conninfo, "CREATE_REPLICATION_SLOT cold PHYSICAL RESERVE_WAL").unwrap();
    // More than is kept in memory.
    write_wal(&site.primary, 96 * MB);
    let upto = site.primary.flushed();
    site.relay.wait_flushed(upto);
    let archive = site.archive(&installation, &["--slot=cold"]);
    site.wait_archived(&archive, upto);
    assert!(
        site.relay.metric("walrelay_downstream_cold_bytes_total").unwrap() > 0.0,
        "nothing was read from files"
    );
}

#[test]
fn a_certificate_without_a_hash_in_its_signature_keeps_nobody_out() {
    let Some(installation) = Installation::any() else { return };
    let authority = Authority::new("root");
    let site = Site::new(&installation, &authority.self_signed("ed25519", "ed25519"), None);
    for major in chosen_majors() {
        let Some(client) = Installation::of(major) else { continue };
        for rest in ["", "channel_binding=prefer"] {
            let (primary, relay) = site.ask_both(&client, &format!("host=127.0.0.1 sslmode=require {rest}"));
            // A server of PostgreSQL's own offers what its clients then cannot do.
            println!("{major}: primary {}, relay {}", shown(&primary), shown(&relay));
            assert!(relay.is_ok(), "{relay:?}");
        }
    }
}

#[test]
fn new_certificates_are_seen_by_new_clients_and_nobody_is_dropped() {
    let Some(installation) = Installation::any() else { return };
    let (first, second) = (Authority::new("first"), Authority::new("second"));
    let mut site = Site::new(&installation, &first.issue("server", "IP:127.0.0.1"), None);
    let mut archive = site.archive(&installation, &["--no-loop"]);
    site.relay.wait_downstream("pg_receivewal", "streaming");
    let believes = |site: &Site, authority: &Authority| site.is_believed(&installation, authority);
    assert!(believes(&site, &first) && !believes(&site, &second));
    // A half that does not fit changes nothing, and is told.
    let renewed = second.issue("server", "IP:127.0.0.1");
    site.relay.write_file("server.crt", &read(&renewed.cert));
    site.relay.wait_logged("TLS files have changed and cannot be used");
    assert!(believes(&site, &first));
    let expires = |relay: &Relay| {
        relay.metric("walrelay_downstream_tls_certificate_expires_timestamp_seconds").unwrap()
    };
    assert!(expires(&site.relay) > 1.7e9);
    site.relay.write_file("server.key", &read(&renewed.key));
    wait_until("the new certificate to be seen", || believes(&site, &second));
    assert!(!believes(&site, &first));
    assert!(archive.process.is_running(), "{}", archive.log());
    site.relay.assert_running();
}

#[test]
fn a_signal_reads_new_certificates_at_once() {
    let Some(installation) = Installation::any() else { return };
    let site = Site::new(&installation, &Authority::new("first").issue("server", "IP:127.0.0.1"), None);
    let looked = || site.relay.times_logged("TLS files have changed");
    let read_at = || site.relay.status()["reload"]["at"].clone();
    // Where the look from time to time came before the signal nothing is proved, and other files are tried.
    let is_proved = (0..5).any(|attempt| {
        let next = Authority::new(&format!("next_{attempt}"));
        let (before, times) = (read_at(), looked());
        site.write_pair(&next.issue("server", "IP:127.0.0.1"));
        site.relay.process().signal(Signal::HUP);
        wait_until("the files to be read again", || read_at() != before);
        let is_believed = site.is_believed(&installation, &next);
        if looked() != times {
            return false;
        }
        assert!(is_believed, "the signal did not read the TLS files");
        true
    });
    assert!(is_proved, "the look from time to time always came first");
}

#[test]
fn a_refused_reload_changes_neither_tls_nor_anything_else() {
    let Some(installation) = Installation::any() else { return };
    let (first, second, third) = (Authority::new("first"), Authority::new("second"), Authority::new("third"));
    let site = Site::new(&installation, &first.issue("server", "IP:127.0.0.1"), None);
    let believes = |authority: &Authority| site.is_believed(&installation, authority);
    let relay = &site.relay;
    let refused = |words: &str| {
        let (status, told) = relay.post("/reload").unwrap();
        assert!(status == 422 && told["error"].as_str().unwrap().contains(words), "{status} {told}");
    };
    let reloaded = || assert_eq!(relay.post("/reload").unwrap().0, 200);
    let users = users_of(&site.primary);
    // The first half of a pair, which by itself is of no use, and users that are wrong.
    let renewed = second.issue("server", "IP:127.0.0.1");
    relay.write_file("server.crt", &read(&renewed.cert));
    relay.write_file("users.toml", "standby = \"hush\"\n");
    refused("user \"standby\" has no SCRAM-SHA-256 verifier");
    // Now the pair could be used, but it was to come with those users.
    relay.write_file("server.key", &read(&renewed.key));
    relay.wait_logged("they were part of a reload that was refused");
    assert!(believes(&first) && !believes(&second));
    relay.write_file("users.toml", &users);
    reloaded();
    assert!(believes(&second) && !believes(&first));
    // A wrong certificate keeps a new user out.
    let added = Relay::command_with_input(&["scram", "--user", "added"], "pencil\n");
    let is_let_in = || site.lets_in(&installation, ("added", "pencil"), &second);
    relay.write_file("users.toml", &format!("{users}{added}"));
    relay.write_file("server.crt", "nonsense");
    refused("no certificate in it");
    assert!(!is_let_in() && believes(&second));
    relay.write_file("server.crt", &read(&renewed.cert));
    reloaded();
    assert!(is_let_in());
    // What is changed after a reload was refused is nobody's but its own.
    relay.write_file("users.toml", "standby = \"hush\"\n");
    refused("user \"standby\" has no SCRAM-SHA-256 verifier");
    site.write_pair(&third.issue("server", "IP:127.0.0.1"));
    wait_until("the new certificate to be seen", || believes(&third));
    assert!(relay.status()["reload"]["error"].is_string(), "the users are still wrong");
}

/// The users file for the one that there is.
fn users_of(primary: &Postgres) -> String {
    let verifier = primary.sql("select rolpassword from pg_authid where rolname = 'standby'");
    format!("standby = \"{verifier}\"\n")
}

#[test]
fn client_certificates_are_demanded_where_a_primary_demands_them() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let (authority, other) = (Authority::new("root"), Authority::new("other"));
    let server = authority.issue("server", "IP:127.0.0.1");
    let mut site = Site::new(&installation, &server, Some(&authority.root()));
    let rules = "hostssl replication standby 127.0.0.1/32 scram-sha-256 clientcert=verify-full\n\
        hostssl replication mapped 127.0.0.1/32 cert map=machines\n\
        hostssl replication anyone 127.0.0.1/32 scram-sha-256 clientcert=verify-ca\n\
        hostnossl replication standby 127.0.0.1/32 reject\n";
    let map = "machines  edge1.example  mapped\n";
    for role in ["mapped", "anyone"] {
        site.primary.sql(&format!("create role {role} replication login password 'secret'"));
    }
    // The primary, by its own files.
    let data = site.primary.data();
    std::fs::copy(authority.root(), data.join("ca.crt")).unwrap();
    site.primary.add_settings("ssl_ca_file = 'ca.crt'");
    std::fs::write(data.join("pg_ident.conf"), map).unwrap();
    let rest = std::fs::read_to_string(data.join("pg_hba.conf")).unwrap();
    std::fs::write(data.join("pg_hba.conf"), format!("{rules}{rest}")).unwrap();
    site.primary.restart(crate::support::postgres::Stop::Fast);
    // The relay, by the same ones.
    let verifier =
        |role: &str| site.primary.sql(&format!("select rolpassword from pg_authid where rolname = '{role}'"));
    let users = format!(
        "standby = \"{}\"\nanyone = \"{}\"\nmapped = {{}}\n",
        verifier("standby"),
        verifier("anyone")
    );
    site.relay.write_file("users.toml", &users);
    let (hba, ident) =
        (site.relay.write_file("pg_hba.conf", rules), site.relay.write_file("pg_ident.conf", map));
    site.relay.set("downstream.hba", &format!("{hba:?}"));
    site.relay.set("downstream.ident", &format!("{ident:?}"));
    site.relay.terminate();
    site.relay.start();
    let shown = |pair: &Pair| format!("sslcert={} sslkey={}", pair.cert.display(), pair.key.display());
    let own = shown(&authority.issue("standby", "DNS:standby"));
    let edge = shown(&authority.issue("edge1.example", "DNS:edge1.example"));
    let foreign = shown(&other.issue("standby", "DNS:standby"));
    println!("| user | certificate | primary | relay |");
    for (user, what, certificate, expected) in [
        ("standby", "own", &own, true),
        ("standby", "another's", &edge, false),
        ("standby", "none", &String::new(), false),
        ("standby", "of another authority", &foreign, false),
        ("mapped", "mapped", &edge, true),
        ("mapped", "not mapped", &own, false),
        ("anyone", "any", &edge, true),
        ("anyone", "none", &String::new(), false),
    ] {
        let ask = |port: u16| {
            let conninfo = format!(
                "host=127.0.0.1 port={port} user={user} password=secret replication=true sslmode=verify-full sslrootcert={} {certificate}",
                authority.root().display()
            );
            run_psql(&installation, &conninfo, "IDENTIFY_SYSTEM")
                .map(drop)
                .map_err(|text| text.rsplit("FATAL:").next().unwrap_or_default().trim().to_owned())
        };
        let (primary, relay) = (ask(site.primary.port), ask(site.relay.port));
        println!("| {user} | {what} | {primary:?} | {relay:?} |");
        assert_eq!((primary.is_ok(), relay.is_ok()), (expected, expected), "{user}, {what}");
        if primary.as_ref().is_err_and(|text| !text.contains("SSL error")) {
            assert_eq!(relay, primary, "{user}, {what}");
        }
    }
}
