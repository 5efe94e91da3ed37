//! The relay as a TLS client of real servers: each `sslmode`, certificates of every making, channel binding. Whether a server
//! may be connected to is compared with what psql, that is libpq, says of the same connection string.

use std::path::Path;

use crate::support::MB;
use crate::support::certificates::{Authority, Pair};
use crate::support::lab::{self, Installation, chosen_majors};
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings};
use crate::support::process::Program;
use crate::support::relay::Relay;
use crate::support::wait::wait_for;

/// A primary that speaks TLS with this certificate; `rules` come before those that let everybody in.
fn primary_with(installation: &Installation, server: &Pair, client_ca: &Path, rules: &str) -> Postgres {
    let mut primary = Settings::new().segment_size_mb(1).start(installation);
    give(&primary, server, client_ca);
    primary.add_settings(
        "ssl = on\nssl_cert_file = 'server.crt'\nssl_key_file = 'server.key'\nssl_ca_file = 'client_ca.crt'",
    );
    primary.sql("create role by_scram replication login password 'secret'");
    primary.sql("create role by_cert replication login");
    let path = primary.data().join("pg_hba.conf");
    let rest = std::fs::read_to_string(&path).unwrap();
    std::fs::write(path, format!("{rules}\n{rest}")).unwrap();
    primary.restart(crate::support::postgres::Stop::Fast);
    primary
}

fn give(primary: &Postgres, server: &Pair, client_ca: &Path) {
    let data = primary.data();
    for (from, to) in [(&server.cert, "server.crt"), (&server.key, "server.key")] {
        std::fs::copy(from, data.join(to)).unwrap();
        lab::give_all_to_server(&data.join(to));
    }
    std::fs::copy(client_ca, data.join("client_ca.crt")).unwrap();
}

const RULES: &str = "hostssl replication,postgres by_scram 127.0.0.1/32 scram-sha-256\n\
    hostnossl replication,postgres by_scram 127.0.0.1/32 reject\n\
    hostssl replication,postgres by_cert 127.0.0.1/32 cert\n\
    hostnossl replication,postgres by_cert 127.0.0.1/32 reject";

/// What psql and the relay make of a connection string.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    /// Whether the connection was encrypted; `None`: there was none.
    ssl: Option<bool>,
    text: String,
}

fn psql(installation: &Installation, conninfo: &str) -> Verdict {
    let query = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";
    let mut program = Program::new(installation.program("psql")).args([
        "-XAtd",
        &format!("{conninfo} dbname=postgres"),
        "-c",
        query,
    ]);
    program.environment.push(("HOME".to_owned(), "/nonexistent".to_owned()));
    let output = program.command().output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    let ssl = output.status.success().then(|| text(&output.stdout) == "t");
    Verdict { ssl, text: text(&output.stderr) }
}

/// The relay, until it streams or has said why it does not.
fn relay(primary: &Postgres, name: &str, conninfo: &str) -> Verdict {
    let mut relay = Relay::new(name, 1).with_conninfo(conninfo);
    relay.unset("upstream.slot");
    relay.environment.push(("HOME".to_owned(), "/nonexistent".to_owned()));
    relay.launch();
    let query = format!(
        "select ssl from pg_stat_replication join pg_stat_ssl using (pid) where application_name = '{name}' and state = 'streaming'"
    );
    wait_for(&format!("{name} to stream or to say why not: {conninfo}"), || {
        if let Some(error) = relay.status()["upstream"]["last_error"].as_str() {
            return Some(Verdict { ssl: None, text: error.to_owned() });
        }
        match primary.sql(&query).as_str() {
            "" => None,
            ssl => Some(Verdict { ssl: Some(ssl == "t"), text: String::new() }),
        }
    })
}

/// Compares, and prints a line of the table.
fn assert_same_verdict(
    installation: &Installation,
    primary: &Postgres,
    count: &mut usize,
    rest: &str,
) -> Option<bool> {
    *count += 1;
    let conninfo = format!("host=127.0.0.1 port={} {rest}", primary.port);
    let expected = psql(installation, &conninfo);
    let found = relay(primary, &format!("client_{count}"), &conninfo);
    let shown = |verdict: &Verdict| match verdict.ssl {
        Some(true) => "TLS".to_owned(),
        Some(false) => "clear".to_owned(),
        None => format!("refused: {}", verdict.text.replace('\n', " ")),
    };
    println!("| {} | {rest} | {} | {} |", installation.major, shown(&expected), shown(&found));
    assert_eq!(found.ssl, expected.ssl, "{conninfo}\npsql: {}\nrelay: {}", expected.text, found.text);
    expected.ssl
}

#[test]
fn each_sslmode_connects_where_libpq_does_and_nowhere_else() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let (authority, other) = (Authority::new("root"), Authority::new("other"));
    let server = authority.issue("server", "IP:127.0.0.1,DNS:localhost");
    let misnamed = authority.issue("elsewhere", "DNS:elsewhere.example");
    let mut count = 0;
    for (what, server) in [("named", &server), ("misnamed", &misnamed)] {
        println!("server certificate: {what}");
        let primary = primary_with(&installation, server, &authority.root(), RULES);
        for mode in ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] {
            for root in [None, Some(authority.root()), Some(other.root())] {
                let root = root.map_or(String::new(), |root| format!("sslrootcert={}", root.display()));
                let rest = format!("user=by_scram password=secret sslmode={mode} {root}");
                assert_same_verdict(&installation, &primary, &mut count, &rest);
            }
        }
        // An address alone is no name: nothing can be verified.
        for mode in ["verify-ca", "verify-full"] {
            let root = authority.root().display().to_string();
            let rest = format!(
                "user=by_scram password=secret sslmode={mode} sslrootcert={root} host='' hostaddr=127.0.0.1"
            );
            let verdict = assert_same_verdict(&installation, &primary, &mut count, &rest);
            assert_eq!(verdict, (mode == "verify-ca").then_some(true), "{rest}");
        }
    }
    // A server without TLS.
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    for mode in ["disable", "allow", "prefer", "require", "verify-full"] {
        let rest = format!("user=postgres sslmode={mode} sslrootcert={}", authority.root().display());
        assert_same_verdict(&installation, &primary, &mut count, &rest);
    }
}

#[test]
fn certificates_of_every_making_are_believed_as_libpq_believes_them() {
    let Some(installation) = Installation::any() else { return };
    let authority = Authority::new("root");
    let mut count = 100;
    let own = |name: &str, algorithm: &str| authority.self_signed(name, algorithm);
    let servers = [
        (
            "the manual's, known by its common name",
            authority.issue_by_the_manual("localhost"),
            authority.root(),
        ),
        ("its own root", own("self", "rsa:2048"), authority.path("self.crt")),
        (
            "its own root, P-384",
            own("p384", "ec -pkeyopt ec_paramgen_curve:secp384r1"),
            authority.path("p384.crt"),
        ),
        ("Ed25519", own("ed25519", "ed25519"), authority.path("ed25519.crt")),
        (
            "signed by RSASSA-PSS",
            own("pss", "rsa:2048 -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:digest"),
            authority.path("pss.crt"),
        ),
    ];
    for (what, server, root) in servers {
        println!("server certificate: {what}");
        let primary = primary_with(&installation, &server, &authority.root(), RULES);
        let base = format!("user=by_scram password=secret sslrootcert={}", root.display());
        let mut verdicts = Vec::new();
        for rest in [
            "sslmode=verify-ca channel_binding=disable",
            "sslmode=verify-full host=localhost channel_binding=disable",
            "sslmode=verify-ca channel_binding=disable ssl_max_protocol_version=TLSv1.2",
        ] {
            verdicts.push(assert_same_verdict(
                &installation,
                &primary,
                &mut count,
                &format!("{base} {rest}"),
            ));
        }
        assert_eq!((verdicts[0], verdicts[2]), (Some(true), Some(true)), "{what}");
        // Where the signature has no hash libpq fails; that there is nothing to bind to is no reason not to connect.
        if what != "Ed25519" {
            for rest in
                ["sslmode=verify-ca channel_binding=require", "sslmode=verify-ca channel_binding=prefer"]
            {
                let verdict =
                    assert_same_verdict(&installation, &primary, &mut count, &format!("{base} {rest}"));
                assert_eq!(verdict, Some(true), "{what}, {rest}");
            }
        } else {
            let conninfo = format!("host=127.0.0.1 port={} {base} sslmode=verify-ca", primary.port);
            assert_eq!(relay(&primary, "no_hash", &conninfo).ssl, Some(true));
            let bound = relay(&primary, "no_binding", &format!("{conninfo} channel_binding=require"));
            assert!(bound.ssl.is_none() && bound.text.contains("channel binding"), "{bound:?}");
        }
    }
}

#[test]
fn client_certificates_are_shown_as_libpq_shows_them() {
    let Some(installation) = Installation::in_turn(2) else { return };
    let (authority, other) = (Authority::new("root"), Authority::new("other"));
    let server = authority.issue("server", "IP:127.0.0.1");
    let client = authority.issue("by_cert", "DNS:by_cert");
    let encrypted = authority.encrypted(&client, "hush");
    let by_the_manual = Authority::new("manual");
    let foreign = other.issue("by_cert", "DNS:by_cert");
    let stranger = authority.issue("stranger", "DNS:stranger");
    let primary = primary_with(&installation, &server, &authority.root(), RULES);
    let mut count = 200;
    let base = format!("user=by_cert sslrootcert={}", authority.root().display());
    let shown = |pair: &Pair| format!("sslcert={} sslkey={}", pair.cert.display(), pair.key.display());
    let open =
        crate::support::certificates::Pair { key: authority.path("open.key"), cert: client.cert.clone() };
    std::fs::copy(&client.key, &open.key).unwrap();
    std::os::unix::fs::PermissionsExt::set_mode(
        &mut std::fs::metadata(&open.key).unwrap().permissions(),
        0o644,
    );
    std::fs::set_permissions(&open.key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let cases = [
        (shown(&client), Some(true)),
        (format!("{} sslpassword=hush", shown(&encrypted)), Some(true)),
        (format!("{} sslpassword=wrong", shown(&encrypted)), None),
        (format!("{} sslcertmode=disable", shown(&client)), None),
        (shown(&foreign), None),
        (shown(&stranger), None),
        (shown(&open), None),
        (format!("sslcert={} sslkey=/nonexistent", client.cert.display()), None),
        (String::new(), None),
    ];
    for (rest, expected) in cases {
        // Not all that psql of every major knows.
        if rest.contains("sslcertmode") && installation.major < 16 {
            continue;
        }
        let rest = format!("{base} sslmode=verify-full {rest}");
        assert_eq!(assert_same_verdict(&installation, &primary, &mut count, &rest), expected, "{rest}");
    }
    // One of the first version, as the manual makes them.
    let old = by_the_manual.issue_by_the_manual("by_cert");
    give(&primary, &server, &by_the_manual.root());
    primary.reload();
    let rest = format!("{base} sslmode=verify-full {}", shown(&old));
    crate::support::wait::wait_until("the new root to hold", || {
        psql(&installation, &format!("host=127.0.0.1 port={} {rest}", primary.port)).ssl.is_some()
    });
    assert_eq!(assert_same_verdict(&installation, &primary, &mut count, &rest), Some(true));
    if installation.major >= 16 {
        let rest = format!(
            "user=postgres sslrootcert={} sslcertmode=require sslmode=require",
            authority.root().display()
        );
        assert_eq!(assert_same_verdict(&installation, &primary, &mut count, &rest), None, "none was sent");
    }
}

#[test]
fn revoked_servers_are_refused_and_direct_connections_need_a_server_that_knows_them() {
    let Some(installation) = Installation::since(17) else { return };
    let authority = Authority::new("root");
    let (server, another) =
        (authority.issue("server", "IP:127.0.0.1"), authority.issue("another", "IP:127.0.0.1"));
    let primary = primary_with(&installation, &server, &authority.root(), RULES);
    let mut count = 300;
    let base = format!(
        "user=by_scram password=secret sslmode=verify-full sslrootcert={}",
        authority.root().display()
    );
    for (revoked, expected) in [(&another, Some(true)), (&server, None)] {
        let list = authority.revoke(&[revoked]);
        let rest = format!("{base} sslcrl={}", list.display());
        assert_eq!(assert_same_verdict(&installation, &primary, &mut count, &rest), expected);
    }
    let direct = format!("{base} sslnegotiation=direct");
    assert_eq!(assert_same_verdict(&installation, &primary, &mut count, &direct), Some(true));
    if let Some(older) = Installation::of(15) {
        let primary = primary_with(&older, &server, &authority.root(), RULES);
        assert_eq!(assert_same_verdict(&installation, &primary, &mut count, &direct), None);
    }
}

#[test]
fn wal_arrives_whole_over_tls_from_every_major() {
    let authority = Authority::new("root");
    let server = authority.issue("server", "IP:127.0.0.1");
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = primary_with(&installation, &server, &authority.root(), RULES);
        let conninfo = format!(
            "host=127.0.0.1 port={} user=by_scram password=secret sslmode=verify-full channel_binding=require sslrootcert={}",
            primary.port,
            authority.root().display()
        );
        let mut relay = Relay::new("over_tls", 1).with_conninfo(&conninfo);
        relay.start();
        write_wal(&primary, 20 * MB);
        relay.wait_flushed(primary.flushed());
        crate::support::compare::assert_same_wal(&relay.wal_dir(), &primary, primary.flushed());
        assert!(!relay.log().contains("secret") && !relay.status().to_string().contains("secret"));
    }
}
