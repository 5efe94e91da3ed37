//! The relay as a TLS server: real clients of every major with each `sslmode`, channel binding, certificates that change while
//! clients are connected. What a client may do is compared with what it may do at a primary that has the same certificate.

use rustix::process::Signal;

use crate::support::MB;
use crate::support::certificates::Authority;
use crate::support::compare::assert_equal_clusters;
use crate::support::lab::{self, Installation, chosen_majors};
use crate::support::load::write_wal;
use crate::support::psql::run_psql;
use crate::support::relay::Relay;
use crate::support::tls_site::{Site, read, shown, users_of};
use crate::support::wait::wait_until;

#[test]
fn each_sslmode_of_each_client_gets_what_a_primary_gives_it() {
    let Some(server) = Installation::any() else { return };
    let (authority, other) = (Authority::new("root"), Authority::new("other"));
    let site = Site::new(&server, &authority.issue("server", "IP:127.0.0.1,DNS:localhost"));
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
        let site = Site::new(&installation, &server);
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
    let site = Site::new(&installation, &authority.issue("server", "IP:127.0.0.1"));
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
    let site = Site::new(&installation, &authority.self_signed("ed25519", "ed25519"));
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
    let mut site = Site::new(&installation, &first.issue("server", "IP:127.0.0.1"));
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
    let site = Site::new(&installation, &Authority::new("first").issue("server", "IP:127.0.0.1"));
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
    let site = Site::new(&installation, &first.issue("server", "IP:127.0.0.1"));
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
    relay.write_file("users.toml", &format!("{users}\n{added}"));
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
