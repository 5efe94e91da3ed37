//! Certificates of clients: whom a relay lets in by one is whom a primary lets in that has the same rules, maps, authorities and
//! revocations. Names are OpenSSL's, as in PostgreSQL.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::certificates::{Authority, Pair};
use crate::support::lab::Installation;
use crate::support::psql::run_psql;
use crate::support::tls_site::{Judgement, Site, Verdict, showing};

/// What both say to this user with this certificate.
fn ask(site: &Site, client: &Installation, user: &str, root: &Path, certificate: &str) -> (Verdict, Verdict) {
    let ask = |port: u16| {
        let conninfo = format!(
            "host=127.0.0.1 port={port} user={user} password=secret replication=true sslmode=verify-full sslrootcert={} {certificate}",
            root.display()
        );
        let complaint = |text: String| text.rsplit("FATAL:").next().unwrap_or_default().trim().to_owned();
        run_psql(client, &conninfo, "IDENTIFY_SYSTEM").map(drop).map(|()| String::new()).map_err(complaint)
    };
    (ask(site.primary.port), ask(site.relay.port))
}

/// Asks both, prints a line of the table, and compares; words, too, where the server has any.
fn assert_same(asked: &str, (primary, relay): (Verdict, Verdict), expected: bool) {
    println!("| {asked} | {primary:?} | {relay:?} |");
    assert_eq!((primary.is_ok(), relay.is_ok()), (expected, expected), "{asked}\n{primary:?}\n{relay:?}");
    if primary.as_ref().is_err_and(|text| !text.contains("SSL ")) {
        assert_eq!(relay, primary, "{asked}");
    }
}

#[test]
fn client_certificates_are_demanded_where_a_primary_demands_them() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let (authority, other) = (Authority::new("root"), Authority::new("other"));
    let mut site = Site::new(&installation, &authority.issue("server", "IP:127.0.0.1"));
    site.primary.sql("create role mapped replication login");
    site.primary.sql("create role anyone replication login password 'secret'");
    let rules = "hostssl replication standby 127.0.0.1/32 scram-sha-256 clientcert=verify-full\n\
        hostssl replication mapped 127.0.0.1/32 cert map=machines\n\
        hostssl replication anyone 127.0.0.1/32 scram-sha-256 clientcert=verify-ca\n\
        hostnossl replication standby 127.0.0.1/32 reject\n";
    let root = authority.root();
    site.judge(&Judgement { ca: &root, crl: None, rules, map: "machines  edge1.example  mapped\n" });
    let own = showing(&authority.issue("standby", "DNS:standby"));
    let edge = showing(&authority.issue("edge1.example", "DNS:edge1.example"));
    let foreign = showing(&other.issue("standby", "DNS:standby"));
    println!("| user, certificate | primary | relay |");
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
        let verdicts = ask(&site, &installation, user, &root, certificate);
        assert_same(&format!("{user}, {what}"), verdicts, expected);
    }
}

/// The subject of a certificate, as OpenSSL prints it by RFC 2253.
fn subject_of(pair: &Pair) -> String {
    let arguments = ["x509", "-noout", "-subject", "-nameopt", "RFC2253", "-in"];
    let output = Command::new("openssl").args(arguments).arg(&pair.cert).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.trim_end_matches('\n').strip_prefix("subject=").unwrap().to_owned()
}

#[test]
fn distinguished_names_are_compared_as_a_primary_compares_them() {
    let Some(installation) = Installation::since(14) else { return };
    let authority = Authority::new("root");
    let root = authority.root();
    let mut site = Site::new(&installation, &authority.issue("server", "IP:127.0.0.1"));
    let issue = |name: &str, subject: &str, mask: &str| authority.issue_to(name, subject, mask);
    let named = [
        ("address", issue("address", "/CN=edge/emailAddress=ops@x", "utf8only")),
        ("umlaut", issue("umlaut", "/CN=edge/O=Müller", "utf8only")),
        ("bmp", issue("bmp", "/O=Müller & Söhne", "MASK:0x800")),
        ("number", issue("number", "/CN=edge/serialNumber=17", "default")),
        ("together", issue("together", "/O=acme/OU=plant+CN=edge+serialNumber=18", "utf8only")),
        ("special", issue("special", r"/O=a, b \+ c/CN=#edge\\ ", "utf8only")),
        ("pilot", issue("pilot", "/DC=example/DC=acme/UID=edge", "utf8only")),
    ];
    let mut map = String::new();
    for (user, pair) in &named {
        site.primary.sql(&format!("create role {user} replication login"));
        // As quoted strings are written in these files.
        let subject = subject_of(pair).replace('"', "\"\"");
        println!("{user}: {subject}");
        map.push_str(&format!("names  \"{subject}\"  {user}\n"));
    }
    assert!(
        map.contains("\"emailAddress=ops@x,CN=edge\"") && map.contains("O=M\\C3\\BCller,CN=edge"),
        "{map}"
    );
    let rules = "hostssl replication all 127.0.0.1/32 cert clientname=DN map=names\n";
    site.judge(&Judgement { ca: &root, crl: None, rules, map: &map });
    println!("| user, certificate | primary | relay |");
    // Each refusal costs a little more time: each certificate is tried for one other user.
    let others = named.iter().cycle().skip(1);
    for ((user, own), (owner, another)) in named.iter().zip(others) {
        for (owner, pair) in [(user, own), (owner, another)] {
            let verdicts = ask(&site, &installation, user, &root, &showing(pair));
            assert_same(&format!("{user}, {owner}"), verdicts, user == owner);
        }
    }
    // In two bytes each, which is a name with zero bytes in it to a server.
    let zeros = issue("zeros", "/CN=bmp", "MASK:0x800");
    let verdicts = ask(&site, &installation, "bmp", &root, &showing(&zeros));
    assert_same("bmp, a common name in two bytes", verdicts, false);
}

#[test]
fn revoked_clients_are_turned_away_where_a_primary_turns_them_away() {
    let Some(installation) = Installation::in_turn(2) else { return };
    let authority = Authority::new("root");
    let root = authority.root();
    let mut site = Site::new(&installation, &authority.issue("server", "IP:127.0.0.1"));
    site.primary.sql("create role kept replication login");
    site.primary.sql("create role revoked replication login");
    let (kept, revoked) = (authority.issue("kept", "DNS:kept"), authority.issue("revoked", "DNS:revoked"));
    let rules = "hostssl replication all 127.0.0.1/32 cert\n";
    println!("| user, list | primary | relay |");
    for (what, list, is_revoked) in [("none", None, false), ("of both", Some(()), true)] {
        let crl = list.map(|()| authority.revoke(&[&revoked]));
        site.judge(&Judgement { ca: &root, crl: crl.as_deref(), rules, map: "" });
        for (user, pair, expected) in [("kept", &kept, true), ("revoked", &revoked, !is_revoked)] {
            let verdicts = ask(&site, &installation, user, &root, &showing(pair));
            assert_same(&format!("{user}, {what}"), verdicts, expected);
        }
    }
    // A list of somebody else's says nothing about these: nobody is known not to be revoked.
    let other = Authority::new("other");
    let crl = other.revoke(&[]);
    site.judge(&Judgement { ca: &root, crl: Some(&crl), rules, map: "" });
    assert_same(
        "kept, of another authority",
        ask(&site, &installation, "kept", &root, &showing(&kept)),
        false,
    );
}

#[test]
fn clients_of_authorities_in_between_are_known_where_a_primary_knows_them() {
    let Some(installation) = Installation::in_turn(0) else { return };
    let authority = Authority::new("root");
    let root = authority.root();
    let between = authority.below("between");
    let mut site = Site::new(&installation, &authority.issue("server", "IP:127.0.0.1"));
    site.primary.sql("create role edge replication login");
    let alone = between.issue("edge", "DNS:edge");
    let joined = |name: &str, parts: &[&Path]| -> PathBuf {
        let text: String = parts.iter().map(|part| std::fs::read_to_string(part).unwrap()).collect();
        let path = between.path(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let with_chain =
        Pair { cert: joined("chain.crt", &[&alone.cert, &between.root()]), key: alone.key.clone() };
    let both = joined("both.crt", &[&root, &between.root()]);
    let rules = "hostssl replication all 127.0.0.1/32 cert\n";
    println!("| the server knows, the client shows | primary | relay |");
    for (what, ca, chain_is_known, leaf_is_known) in [
        ("the root", &root, true, false),
        ("the root and the one in between", &both, true, true),
        ("the one in between", &between.root(), false, false),
    ] {
        site.judge(&Judgement { ca, crl: None, rules, map: "" });
        for (shown, pair, expected) in
            [("its chain", &with_chain, chain_is_known), ("its own", &alone, leaf_is_known)]
        {
            let verdicts = ask(&site, &installation, "edge", &root, &showing(pair));
            assert_same(&format!("{what}, {shown}"), verdicts, expected);
        }
    }
    // Lists are needed of all authorities on the way, and are looked at on all of it.
    let revoke_nobody = [&authority, &between].map(|authority| authority.revoke(&[]));
    let lists = joined("none.crl", &[&revoke_nobody[0], &revoke_nobody[1]]);
    site.judge(&Judgement { ca: &root, crl: Some(&lists), rules, map: "" });
    assert_same("lists of both", ask(&site, &installation, "edge", &root, &showing(&with_chain)), true);
    site.judge(&Judgement { ca: &root, crl: Some(&revoke_nobody[0]), rules, map: "" });
    assert_same(
        "a list of the root's",
        ask(&site, &installation, "edge", &root, &showing(&with_chain)),
        false,
    );
    let own = Pair { cert: between.root(), key: between.path("ca.key") };
    let revoked = [authority.revoke(&[&own]), revoke_nobody[1].clone()];
    let lists = joined("one.crl", &[&revoked[0], &revoked[1]]);
    site.judge(&Judgement { ca: &root, crl: Some(&lists), rules, map: "" });
    assert_same(
        "the one in between revoked",
        ask(&site, &installation, "edge", &root, &showing(&with_chain)),
        false,
    );
}
