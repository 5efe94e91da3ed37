//! Lines of `pg_hba.conf`: which clients one is about, and what is said of a wrong one.

use super::*;
use crate::access::users::User;

fn rules(text: &str) -> Rules {
    Rules::parse(Path::new("hba"), text, &NoFiles).unwrap_or_else(|error| panic!("{text}: {error:?}"))
}

fn complaint(line: &str) -> String {
    let error = Rules::parse(Path::new("hba"), line, &NoFiles).unwrap_err();
    assert_eq!((error.file.as_path(), error.line), (Path::new("hba"), Some(1)), "{line}");
    error.problem.to_string()
}

fn no_interfaces() -> Vec<Interface> {
    Vec::new()
}

fn from(address: &str) -> Applicant<'static> {
    Applicant {
        origin: Origin::Tcp(address.parse().unwrap()),
        wire: Wire::Clear,
        mode: ReplicationMode::Physical,
        database: "replication",
        user: "standby",
    }
}

/// The line that holds for somebody.
fn line_for(rules: &Rules, applicant: &Applicant<'_>) -> Option<usize> {
    rules.find(applicant, None, &no_interfaces).map(|rule| rule.place.line)
}

#[test]
fn the_first_line_that_fits_holds() {
    let rules = rules(
        "# comment\n\
         host replication standby 10.0.0.0/8 reject\n\
         host replication standby 10.1.0.0/16 trust\n\
         host replication all 0.0.0.0/0 md5\n",
    );
    assert_eq!(line_for(&rules, &from("10.1.2.3")), Some(2));
    assert_eq!(line_for(&rules, &from("11.1.2.3")), Some(4));
    assert_eq!(line_for(&rules, &Applicant { user: "other", ..from("10.1.2.3") }), Some(4));
    assert_eq!(line_for(&rules, &from("::1")), None);
    assert_eq!(rules.iter().map(|rule| rule.method.as_str()).collect::<Vec<_>>(), ["reject", "trust", "md5"]);
    assert_eq!(rules.iter().next().unwrap().place.to_string(), "hba:2");
}

#[test]
fn the_kind_of_connection_must_be_right() {
    let about = |kind: &str| {
        let address = if kind == "local" { "" } else { "all" };
        let rules = rules(&format!("{kind} replication all {address} trust"));
        let tls = Applicant { wire: Wire::Tls, ..from("10.0.0.1") };
        let local = Applicant { origin: Origin::Local, ..from("10.0.0.1") };
        [from("10.0.0.1"), tls, local].map(|applicant| line_for(&rules, &applicant).is_some())
    };
    assert_eq!(about("local"), [false, false, true]);
    assert_eq!(about("host"), [true, true, false]);
    assert_eq!(about("hostssl"), [false, true, false]);
    assert_eq!(about("hostnossl"), [true, false, false]);
    assert_eq!(about("hostgssenc"), [false, false, false]);
    assert_eq!(about("hostnogssenc"), [true, true, false]);
}

#[test]
fn databases_are_names_and_keywords_and_physical_replication_is_in_none() {
    let about = |databases: &str, mode, database: &'static str| {
        let rules = rules(&format!("host {databases} all all trust"));
        line_for(&rules, &Applicant { mode, database, ..from("10.0.0.1") }).is_some()
    };
    use ReplicationMode::{Database, Off, Physical};
    for (databases, mode, database, expected) in [
        ("all", Physical, "replication", false),
        ("replication", Physical, "anything", true),
        ("\"replication\"", Physical, "replication", false),
        ("all", Database, "shop", true),
        ("\"all\"", Database, "shop", false),
        ("\"all\"", Database, "all", true),
        ("replication", Database, "replication", false),
        ("\"replication\"", Database, "replication", true),
        ("shop,\"replication\"", Off, "shop", true),
        ("sameuser", Off, "standby", true),
        ("sameuser", Off, "shop", false),
        ("\"sameuser\"", Off, "sameuser", true),
        ("samerole", Off, "standby", false),
        ("/^sh", Database, "shop", true),
        ("/^sh", Physical, "shop", false),
        ("\"/^sh\"", Database, "shop", true),
    ] {
        assert_eq!(about(databases, mode, database), expected, "{databases} {mode:?} {database}");
    }
}

#[test]
fn users_are_names_groups_and_patterns() {
    let member = User {
        secret: None,
        may: crate::access::users::Permissions::default(),
        valid_until: None,
        connection_limit: None,
        member_of: ["standbys".to_owned()].into(),
    };
    let users = Users::new([("dc2_a".to_owned(), member)].into());
    let about = |names: &str, user: &'static str| {
        let rules = rules(&format!("host replication {names} all trust"));
        rules.find(&Applicant { user, ..from("10.0.0.1") }, Some(&users), &no_interfaces).is_some()
    };
    for (names, user, expected) in [
        ("all", "x", true),
        ("\"all\"", "x", false),
        ("a,b", "b", true),
        ("A", "a", false),
        ("\"two words\"", "two words", true),
        ("+standbys", "dc2_a", true),
        ("+standbys", "standbys", false),
        ("\"+standbys\"", "dc2_a", false),
        ("\"+standbys\"", "+standbys", true),
        ("+dc2_a", "dc2_a", true),
        ("/^dc2_[ab]$", "dc2_b", true),
        ("/^dc2_[ab]$", "dc2_c", false),
    ] {
        assert_eq!(about(names, user), expected, "{names} {user}");
    }
    let samerole = rules("host samerole all all trust");
    let within =
        Applicant { mode: ReplicationMode::Off, database: "standbys", user: "dc2_a", ..from("10.0.0.1") };
    assert!(samerole.find(&within, Some(&users), &no_interfaces).is_some());
}

#[test]
fn addresses_have_masks_of_either_form() {
    let about = |addresses: &str, client: &str| {
        line_for(&rules(&format!("host replication all {addresses} trust")), &from(client)).is_some()
    };
    assert!(about("10.1.0.0/16", "10.1.255.1") && !about("10.1.0.0/16", "10.2.0.1"));
    assert!(about("10.1.0.0 255.255.0.0", "10.1.9.9") && !about("10.1.0.0 255.255.0.0", "10.2.9.9"));
    assert!(about("10.1.2.3/16", "10.1.9.9"), "what the mask leaves out does not matter");
    assert!(about("2001:db8::/32", "2001:db8:1::7") && !about("2001:db8::/32", "2001:db9::7"));
    assert!(about("fe80:: ffff::", "fe80::1") && about("::/0", "::1") && !about("::/0", "127.0.0.1"));
    assert!(about("10.0.0.0/8", "::ffff:10.1.2.3"), "an address of IPv4 that came by IPv6");
    assert!(about("\"10.0.0.0/8\"", "10.1.2.3"));
}

#[test]
fn options_say_what_a_certificate_must_be_and_whose_names_count() {
    let rule = |text: &str| rules(text).0.remove(0);
    let cert = rule("hostssl all all all cert map=m clientname=DN");
    assert_eq!((cert.certificate, cert.map()), (CertificateDemand::VerifyFull, Some("m")));
    assert_eq!(cert.name_in(Some("cn"), "CN=cn,O=o"), Ok("CN=cn,O=o"));
    let full = rule("hostssl all all all scram-sha-256 clientcert=verify-full,clientname=CN");
    assert_eq!(full.certificate, CertificateDemand::VerifyFull);
    assert_eq!(full.name_in(Some("cn"), "CN=cn"), Ok("cn"));
    assert_eq!(full.name_in(None, "O=o"), Err(NoMatch::NoNameInCertificate));
    assert_eq!(full.name_in(Some(""), "O=o"), Err(NoMatch::NoNameInCertificate));
    assert_eq!(rule("hostssl all all all md5 clientcert=verify-ca").certificate, CertificateDemand::VerifyCa);
    assert_eq!(rule("local all all peer map=").map(), None);
    assert_eq!(rule("local all all ident").method, Method::Peer);
}

#[test]
fn only_who_is_elsewhere_and_proves_nothing_is_trusted() {
    let trusts = |line: &str| rules(line).0.remove(0).trusts_others();
    for line in [
        "host all all all trust",
        "host all all 10.0.0.0/8 trust",
        "host all all 127.0.0.0/7 trust",
        "hostssl all all samenet trust",
        "hostnogssenc all all ::/0 trust",
        "hostssl all all all trust clientcert=verify-ca",
    ] {
        assert!(trusts(line), "{line}");
    }
    for line in [
        "local all all trust",
        "host all all 127.0.0.1/32 trust",
        "host all all ::1/128 trust",
        "host all all samehost trust",
        "hostgssenc all all all trust",
        "hostssl all all all trust clientcert=verify-full",
        "hostssl all all all cert",
        "host all all all scram-sha-256",
        "host all all all reject",
    ] {
        assert!(!trusts(line), "{line}");
    }
}

#[test]
fn a_wrong_line_gets_postgresqls_words() {
    for (line, expected) in [
        ("local,host all all trust", "multiple values specified for connection type"),
        ("hosts all all all trust", "invalid connection type \"hosts\""),
        ("host", "end-of-line before database specification"),
        ("host all", "end-of-line before role specification"),
        ("host all all", "end-of-line before IP address specification"),
        ("host all all 10.0.0.0/8,11.0.0.0/8 md5", "multiple values specified for host address"),
        ("host all all 10.0.0.1", "end-of-line before netmask specification"),
        ("host all all 10.0.0.1 255.0.0.0,x md5", "multiple values specified for netmask"),
        ("host all all 10.0.0.1 md5", "invalid IP mask \"md5\""),
        ("host all all 10.0.0.1 ffff:: md5", "IP address and mask do not match"),
        ("host all all 10.0.0.0/33 md5", "invalid CIDR mask in address \"10.0.0.0/33\""),
        ("host all all ::1/129 md5", "invalid CIDR mask in address \"::1/129\""),
        (
            "host all all example.com/8 md5",
            "specifying both host name and CIDR mask is invalid: \"example.com/8\"",
        ),
        ("local all all", "end-of-line before authentication method"),
        ("local all all trust,md5", "multiple values specified for authentication type"),
        ("local all all magic", "invalid authentication method \"magic\""),
        ("local all all ldap", "invalid authentication method \"ldap\": not supported by this build"),
        ("host all all all ident", "invalid authentication method \"ident\": not supported by this build"),
        ("host all all all peer", "peer authentication is only supported on local sockets"),
        ("host all all all cert", "cert authentication is only supported on hostssl connections"),
        ("local all all peer map", "authentication option not in name=value format: map"),
        ("local all all peer color=red", "unrecognized authentication option name: \"color\""),
        (
            "local all all md5 map=m",
            "authentication option \"map\" is only valid for authentication methods peer and cert",
        ),
        (
            "host all all all md5 clientcert=verify-ca",
            "clientcert can only be configured for \"hostssl\" rows",
        ),
        ("host all all all md5 clientname=CN", "clientname can only be configured for \"hostssl\" rows"),
        ("hostssl all all all md5 clientcert=1", "invalid value for clientcert: \"1\""),
        ("hostssl all all all cert clientname=SAN", "invalid value for clientname: \"SAN\""),
        (
            "hostssl all all all cert clientcert=verify-ca",
            "clientcert only accepts \"verify-full\" when using \"cert\" authentication",
        ),
        ("local /[ all trust", "invalid regular expression \"[\": brackets [] not balanced"),
    ] {
        assert_eq!(complaint(line), expected, "{line}");
    }
    assert!(complaint("host all all db1.example.com md5").starts_with(
        "host name \"db1.example.com\" is not supported: whoever answers for the client's address in DNS"
    ));
    assert!(complaint("host all all all password").contains("passwords are never asked for in clear"));
    let empty = Rules::parse(Path::new("hba"), "# nothing\n", &NoFiles).unwrap_err();
    assert_eq!((empty.line, empty.problem), (None, LineProblem::NoEntries));
}

#[test]
fn an_error_names_the_line_of_the_file_it_is_in() {
    struct One;
    impl IncludedFiles for One {
        fn read(&self, _path: &Path) -> std::io::Result<String> {
            Ok("local all all trust\nlocal all all magic\n".to_owned())
        }
    }
    let error = Rules::parse(Path::new("/etc/hba"), "\ninclude more\n", &One).unwrap_err();
    assert_eq!((error.file.as_path(), error.line), (Path::new("/etc/more"), Some(2)));
}

#[test]
fn rules_of_our_own_have_no_file() {
    let rules = Rules::built_in("local all all trust");
    assert_eq!(rules.iter().next().unwrap().place.to_string(), "default");
    assert!(Rules::built_in("nonsense").iter().next().is_none());
}
