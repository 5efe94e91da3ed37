//! The files that say who may connect: what is read, what is refused as wrong or unsafe, and what holds without them.

use crate::access::{Applicant, Method, Origin, Permission, Secret, Wire};
use crate::config::Config;
use crate::config::tests::{LEAST, VERIFIER, load, load_in, methods, surroundings};
use crate::conninfo::FixedSurroundings;
use crate::protocol::frontend::ReplicationMode;

const SCRAM: Method = Method::ScramSha256;

fn users() -> String {
    format!("standby = \"{VERIFIER}\"\n")
}

/// A configuration with these lines of `[downstream]`, and these files beside it.
fn with_files(lines: &str, files: &[(&str, &str)]) -> Result<Config, String> {
    let add = |surroundings: FixedSurroundings, (name, text): &(&str, &str)| {
        surroundings.with_file(&format!("/etc/walrelay/{name}"), 0o600, text)
    };
    load_in(&format!("{LEAST}[downstream]\n{lines}\n"), files.iter().fold(surroundings(), add))
}

/// The method for somebody from an address, over this wire.
fn method_for(config: &Config, address: &str, wire: Wire) -> Option<Method> {
    let origin = if address.is_empty() { Origin::Local } else { Origin::Tcp(address.parse().unwrap()) };
    let mode = ReplicationMode::Physical;
    let applicant = Applicant { origin, wire, mode, database: "", user: "standby" };
    let access = &config.downstream.access;
    access.rule_for(&applicant, &Vec::new).ok().map(|rule| rule.method)
}

#[test]
fn users_files_are_checked() {
    let with_users = |mode, text: &str| {
        let surroundings = surroundings().with_file("/etc/walrelay/u.toml", mode, text);
        load_in(&format!("{LEAST}[downstream]\nusers = \"u.toml\"\n"), surroundings)
    };
    let good = format!("# users\nstandby = \"{VERIFIER}\"\n\"other one\" = \"{VERIFIER}\"\n");
    let config = with_users(0o640, &good).unwrap();
    let users = config.downstream.access.users.as_ref().unwrap();
    assert_eq!(users.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["other one", "standby"]);
    assert!(!format!("{config:?}").contains("SCRAM-SHA-256$4096:c2Fs"));

    let said = |text: &str| with_users(0o600, text).unwrap_err();
    let shape = "has no SCRAM-SHA-256 verifier (expected SCRAM-SHA-256$ITERATIONS:SALT$STOREDKEY:SERVERKEY, as \
                 \"walrelay scram\" prints and pg_authid holds)";
    let place = "users file \"/etc/walrelay/u.toml\"";
    assert_eq!(said("\na = \"hush\"\n"), format!("{place}, line 2: user \"a\" {shape}"));
    // Too large for any integer of ours, and a password nevertheless.
    let number = "31415926535897932384";
    assert_eq!(said(&format!("a = {number}")), format!("{place}, line 1: user \"a\" {shape}"));
    assert_eq!(said(&format!("a = {{ secret = {number} }}")), format!("{place}, line 1: user \"a\" {shape}"));
    assert_eq!(said("a = 5\n"), format!("{place}, line 1: user \"a\" {shape}"));
    assert_eq!(said("a = { secret = [\"hush\"] }\n"), format!("{place}, line 1: user \"a\" {shape}"));
    assert_eq!(
        said(&format!("a = \"{}\"", VERIFIER.replace("4096", "0"))),
        format!("{place}, line 1: user \"a\" {shape}")
    );
    assert_eq!(
        said(""),
        format!("{place}: no user is defined (expected lines as in standby = \"SCRAM-SHA-256$...\")")
    );
    assert_eq!(
        with_users(0o644, &good).unwrap_err(),
        format!("{place} has world access; permissions should be u=rw,g=r (0640) or less")
    );
    let missing = load(&format!("{LEAST}[downstream]\nusers = \"/none\"\n")).unwrap_err();
    assert_eq!(missing, "could not read users file \"/none\"");
}

#[test]
fn a_user_is_a_secret_or_a_table() {
    let text = format!(
        "plain = \"{VERIFIER}\"\n\
         old = \"md50123456789abcdef0123456789abcdef\"\n\
         full = {{ secret = \"{VERIFIER}\", may = [\"stream\", \"base_backup\"], valid_until = \"2027-01-01T01:00:00+01:00\", \
         connection_limit = 4, member_of = [\"standbys\"] }}\n\
         [certified]\nmay = []\nvalid_until = 2000-01-01T00:00:01Z\nconnection_limit = -1\n"
    );
    let config = with_files("users = \"u.toml\"", &[("u.toml", &text)]).unwrap();
    let users = config.downstream.access.users.as_ref().unwrap();
    let may = |name: &str| {
        let user = users.user(name).unwrap();
        Permission::ALL.into_iter().filter(|one| user.may.has(*one)).collect::<Vec<_>>()
    };
    assert_eq!(may("plain"), [Permission::Stream], "the default");
    assert_eq!(may("full"), [Permission::Stream, Permission::BaseBackup]);
    assert_eq!(may("certified"), []);
    assert!(matches!(users.user("old").unwrap().secret, Some(Secret::Md5(_))));
    let full = users.user("full").unwrap();
    assert_eq!(full.valid_until.unwrap().unix_micros(), 1_798_761_600_000_000);
    assert_eq!((full.connection_limit, full.member_of.contains("standbys")), (Some(4), true));
    let certified = users.user("certified").unwrap();
    assert!(certified.secret.is_none() && certified.connection_limit.is_none());
    assert_eq!(certified.valid_until.unwrap().0, 1_000_000);
    assert_eq!(
        config.warnings,
        [
            "user \"old\" cannot log in with its password: the secret is for MD5, and no rule of \"downstream.hba\" has the \
          method md5"
        ]
    );
}

#[test]
fn what_is_wrong_about_a_user_is_named_without_its_value() {
    let said = |text: &str| {
        let error = with_files("users = \"u.toml\"", &[("u.toml", text)]).unwrap_err();
        error.strip_prefix("users file \"/etc/walrelay/u.toml\", ").unwrap().to_owned()
    };
    let all = "\"stream\", \"base_backup\", \"sql\", \"admin\"";
    assert_eq!(
        said("\na = { may = \"stream\" }"),
        format!("line 2: user \"a\": invalid \"may\" (expected a list of {all})")
    );
    assert_eq!(
        said("a = { may = [\"stream\", \"hush\"] }"),
        format!("line 1: user \"a\": invalid \"may\" (expected a list of {all})")
    );
    let time = "(expected a time with its offset, as in \"2027-01-01T00:00:00Z\")";
    for wrong in ["\"tomorrow\"", "2027-01-01", "5", "\"2027-01-01T00:00:00\""] {
        let text = format!("a = {{ valid_until = {wrong} }}");
        assert_eq!(said(&text), format!("line 1: user \"a\": invalid \"valid_until\" {time}"), "{wrong}");
    }
    for wrong in ["-2", "\"4\"", "1.5", "31415926535897932384"] {
        assert_eq!(
            said(&format!("a = {{ connection_limit = {wrong} }}")),
            "line 1: user \"a\": invalid \"connection_limit\" (expected a number of sessions, or -1 for no limit)"
        );
    }
    assert_eq!(
        said("a = { member_of = \"x\" }"),
        "line 1: user \"a\": invalid \"member_of\" (expected a list of names)"
    );
    assert_eq!(
        said("a = { password = \"hush\" }"),
        "line 1: user \"a\": invalid \"password\" (expected \"secret\", \"may\", \"valid_until\", \"connection_limit\", or \
         \"member_of\")"
    );
}

#[test]
fn without_rules_everybody_proves_who_he_is_and_from_elsewhere_over_tls() {
    let files: &[(&str, &str)] = &[("u.toml", &users())];
    let tls = "tls = { cert = \"c\", key = \"k\" }\n";
    let open = "listen = \"0.0.0.0:1\"\nusers = \"u.toml\"\n";
    for (lines, in_clear) in [
        ("users = \"u.toml\"".to_owned(), None),
        (format!("{open}{tls}"), None),
        (format!("{open}{tls}allow_plaintext = true"), Some(SCRAM)),
        (format!("{open}allow_plaintext = true"), Some(SCRAM)),
    ] {
        let config = with_files(&lines, files).unwrap();
        assert_eq!(method_for(&config, "", Wire::Clear), Some(SCRAM), "{lines}");
        assert_eq!(method_for(&config, "127.0.0.9", Wire::Clear), Some(SCRAM), "{lines}");
        assert_eq!(method_for(&config, "::1", Wire::Clear), Some(SCRAM), "{lines}");
        assert_eq!(method_for(&config, "10.1.2.3", Wire::Clear), in_clear, "{lines}");
        assert_eq!(method_for(&config, "10.1.2.3", Wire::Tls), Some(SCRAM), "{lines}");
    }
    let config = load(LEAST).unwrap();
    assert_eq!(method_for(&config, "", Wire::Clear), Some(Method::Trust));
    assert_eq!(method_for(&config, "127.0.0.9", Wire::Clear), Some(Method::Trust));
    assert_eq!(method_for(&config, "10.1.2.3", Wire::Tls), None);
    assert_eq!(
        with_files(open, files).unwrap_err(),
        "configuration file \"/etc/walrelay/w.toml\", line 7: parameter \"downstream.listen\" names \"0.0.0.0:1\", which is \
         reachable by others, but there is no \"downstream.tls\" to encrypt with (set it, or \"downstream.allow_plaintext\" to \
         true where the network is private, or write rules into a \"downstream.hba\" file)"
    );
}

#[test]
fn rules_hold_instead_of_the_defaults() {
    let rules = "local all,replication all peer map=m\nhostssl replication all 10.0.0.0/8 scram-sha-256\n";
    let files: &[(&str, &str)] = &[("u.toml", &users()), ("hba", rules), ("ident", "m root standby")];
    let lines = "listen = \"0.0.0.0:1\"\nusers = \"u.toml\"\nhba = \"hba\"\nident = \"ident\"\n\
                 tls = { cert = \"c\", key = \"k\" }";
    let config = with_files(lines, files).unwrap();
    assert_eq!(methods(&config), [Method::Peer, SCRAM]);
    assert_eq!(method_for(&config, "10.1.2.3", Wire::Tls), Some(SCRAM));
    assert_eq!(method_for(&config, "10.1.2.3", Wire::Clear), None);
    assert_eq!(method_for(&config, "127.0.0.1", Wire::Clear), None);
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
    // Nobody is trusted for being local, and nothing is asked for that is not there.
    let config =
        with_files("hba = \"hba\"\ntrust_local = false", &[("hba", "local all all peer map=x")]).unwrap();
    assert_eq!(config.warnings, ["/etc/walrelay/hba:1: usermap \"x\" has no line in \"downstream.ident\""]);
    let config = with_files("hba = \"hba\"", &[("hba", "hostssl all all all trust\n")]).unwrap();
    assert_eq!(
        config.warnings,
        ["hba file \"/etc/walrelay/hba\", line 1: hostssl record cannot match because SSL is disabled"]
    );
}

#[test]
fn wrong_lines_and_files_are_named() {
    let said = |rules: &str| with_files("hba = \"hba\"", &[("hba", rules)]).unwrap_err();
    assert_eq!(
        said("# first\nlocal all all magic\n"),
        "hba file \"/etc/walrelay/hba\", line 2: invalid authentication method \"magic\""
    );
    assert_eq!(said("# nothing"), "hba file \"/etc/walrelay/hba\": the file contains no entries");
    assert_eq!(
        said("local @names all trust"),
        "hba file \"/etc/walrelay/hba\", line 1: could not open file \"/etc/walrelay/names\": No such file or directory"
    );
    assert_eq!(
        with_files("hba = \"none\"", &[]).unwrap_err(),
        "could not read hba file \"/etc/walrelay/none\""
    );
    assert_eq!(
        with_files("ident = \"ident\"", &[("ident", "m a")]).unwrap_err(),
        "ident file \"/etc/walrelay/ident\", line 1: missing entry at end of line"
    );
    let included = &[("hba", "local all all trust\ninclude more"), ("more", "\nlocal")];
    assert_eq!(
        with_files("hba = \"hba\"", included).unwrap_err(),
        "hba file \"/etc/walrelay/more\", line 2: end-of-line before database specification"
    );
}

#[test]
fn what_a_rule_needs_must_be_there() {
    let said = |lines: &str, rules: &str| {
        let files: &[(&str, &str)] = &[("u.toml", &users()), ("hba", rules)];
        with_files(&format!("hba = \"hba\"\n{lines}"), files).map(|config| config.warnings)
    };
    assert_eq!(
        said("", "\nhost all all ::1/128 md5").unwrap_err(),
        "hba file \"/etc/walrelay/hba\", line 2: authentication method \"md5\" needs users: parameter \"downstream.users\" \
         must be set"
    );
    let tls = "tls = { cert = \"c\", key = \"k\" }";
    assert_eq!(
        said(tls, "hostssl all all all cert").unwrap_err(),
        "hba file \"/etc/walrelay/hba\", line 1: client certificates can only be checked if a root certificate store is \
         available: \"client_ca\" of parameter \"downstream.tls\" must be set"
    );
    let tls = "tls = { cert = \"c\", key = \"k\", client_ca = \"ca\" }";
    assert_eq!(said(tls, "hostssl all all all cert"), Ok(Vec::new()));
}

#[test]
fn whoever_comes_from_elsewhere_is_trusted_only_where_that_is_said() {
    let said = |lines: &str, rules: &str| {
        let files: &[(&str, &str)] = &[("u.toml", &users()), ("hba", rules)];
        with_files(&format!("hba = \"hba\"\n{lines}"), files).map(|config| config.warnings)
    };
    let (open, trust) =
        ("listen = [\"127.0.0.1:1\", \"10.0.0.1:1\"]", "local all all trust\nhost all all all trust");
    assert_eq!(
        said(open, trust).unwrap_err(),
        "hba file \"/etc/walrelay/hba\", line 2: this line lets in whoever connects from elsewhere, as any user (use \
         scram-sha-256 or cert, or set \"downstream.allow_remote_trust\" to true)"
    );
    assert_eq!(said(&format!("{open}\nallow_remote_trust = true"), trust), Ok(Vec::new()));
    assert_eq!(said("", trust), Ok(Vec::new()), "nobody can come from elsewhere");
    assert_eq!(said(open, "local all all trust\nhost all all samehost trust"), Ok(Vec::new()));
}

#[test]
fn tls_is_files_and_a_version() {
    let tls = |text: &str| {
        load(&format!("{LEAST}[downstream]\ntls = {text}\n")).map(|config| config.downstream.tls)
    };
    let full = tls(
        "{ cert = \"s.crt\", key = \"/k\", client_ca = \"ca\", client_crl = \"crl\", min_version = \"TLSv1.3\" }",
    );
    let full = full.unwrap().unwrap();
    assert_eq!(full.cert, std::path::Path::new("/etc/walrelay/s.crt"));
    assert_eq!(full.key, std::path::Path::new("/k"));
    assert_eq!(full.min_version, crate::config::TlsVersion::V1_3);
    let said = |text: &str| {
        let error = tls(text).unwrap_err();
        error.strip_prefix("configuration file \"/etc/walrelay/w.toml\"").unwrap().to_owned()
    };
    let example = "as in tls = { cert = \"server.crt\", key = \"server.key\" }";
    assert_eq!(said("{}"), format!(": parameter \"downstream.tls.cert\" must be set, {example}"));
    assert_eq!(
        said("{ cert = \"c\" }"),
        format!(": parameter \"downstream.tls.key\" must be set, {example}")
    );
    assert_eq!(
        said("{ cert = \"c\", key = \"k\", min_version = \"TLSv1.1\" }"),
        ", line 7: invalid value for parameter \"downstream.tls.min_version\": \"TLSv1.1\" (expected \"TLSv1.2\" or \
         \"TLSv1.3\")"
    );
    assert!(said("{ cert = \"c\", kei = \"k\" }").contains("expected"), "{}", said("{ kei = \"k\" }"));
    assert!(
        said("{ cert = \"c\", key = \"k\", client_crl = \"l\" }")
            .contains("\"downstream.tls.client_ca\" must be set")
    );
}
