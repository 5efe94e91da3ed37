//! Connection strings as a whole: from text to [`Conninfo`].

use std::time::Duration;

use proptest::prelude::*;
use secrecy::ExposeSecret as _;

use crate::conninfo::{
    Conninfo, FixedSurroundings, Host, HostAddress, Keepalives, ProtocolVersion, Settings, SslMode,
    TargetSessionAttrs, keyword::KEYWORDS,
};

fn nobody() -> FixedSurroundings {
    FixedSurroundings::of_user("nobody").with_variable("HOME", "/home/nobody")
}

fn parse(text: &str) -> Conninfo {
    Conninfo::parse(text, &nobody()).unwrap()
}

fn error(text: &str) -> String {
    Conninfo::parse(text, &nobody()).unwrap_err().to_string()
}

fn places(conninfo: &Conninfo) -> Vec<String> {
    conninfo.hosts.iter().map(Host::to_string).collect()
}

#[test]
fn nothing_given_means_the_local_socket_and_the_operating_system_user() {
    let conninfo = parse("");
    assert_eq!(places(&conninfo), [r#"on socket "/var/run/postgresql/.s.PGSQL.5432""#]);
    assert_eq!(conninfo.user, "nobody");
    assert_eq!(conninfo.dbname, "nobody");
    assert_eq!(conninfo.ssl.mode, SslMode::Prefer);
    assert_eq!(conninfo.connect_timeout, None);
    assert_eq!(conninfo.max_protocol_version, ProtocolVersion::V3_0);
    assert_eq!(conninfo.startup_parameters(), [("user", "nobody"), ("database", "nobody")]);
    let nameless = FixedSurroundings::default();
    let error = Conninfo::parse("", &nameless).unwrap_err().to_string();
    assert_eq!(error, "local user with ID 1000 does not exist");
}

#[test]
fn a_primary_conninfo_means_what_it_means_to_a_walreceiver() {
    let text = "user=replicator passfile='/p' channel_binding=prefer host=10.1.0.10,10.1.0.11 port=5432,5433 \
                sslmode=prefer sslcompression=0 sslcertmode=allow sslsni=1 ssl_min_protocol_version=TLSv1.2 \
                gssencmode=prefer krbsrvname=postgres gssdelegation=0 target_session_attrs=read-write \
                load_balance_hosts=disable dbname=postgres connect_timeout=10 keepalives_idle=5";
    let surroundings =
        nobody().with_file("/p", 0o600, "10.1.0.11:5433:replication:replicator:hush\n*:*:postgres:*:wrong\n");
    let conninfo = Conninfo::parse_for_replication(text, "dc1_a", &surroundings).unwrap();
    assert_eq!(places(&conninfo), [r#"at "10.1.0.10", port 5432"#, r#"at "10.1.0.11", port 5433"#]);
    let parameters = [
        ("user", "replicator"),
        ("database", "replication"),
        ("replication", "true"),
        ("application_name", "dc1_a"),
    ];
    assert_eq!(conninfo.startup_parameters(), parameters);
    assert_eq!(conninfo.target_session_attrs, Some(TargetSessionAttrs::ReadWrite));
    assert_eq!(conninfo.connect_timeout, Some(Duration::from_secs(10)));
    let idle = Some(Duration::from_secs(5));
    assert_eq!(conninfo.keepalives, Some(Keepalives { idle, interval: None, count: None }));
    assert!(conninfo.password_for(&conninfo.hosts[0]).is_none());
    let password = conninfo.password_for(&conninfo.hosts[1]).unwrap();
    assert_eq!(password.expose_secret(), "hush");
    assert_eq!(conninfo.password_file_used_for(&conninfo.hosts[1]).unwrap().to_str(), Some("/p"));
    assert_eq!(conninfo.password_file_used_for(&conninfo.hosts[0]), None);
    let shown = format!("{conninfo} {conninfo:?} {:?}", conninfo.hosts);
    assert!(!shown.contains("hush"), "{shown}");
}

#[test]
fn passwords_are_looked_up_by_libpqs_rules_and_again_when_asked() {
    let file = |text: &str| nobody().with_file("/home/nobody/.pgpass", 0o600, text);
    let password = |text: &str, surroundings: &FixedSurroundings| {
        let conninfo = Conninfo::parse(text, surroundings).unwrap();
        let host = &conninfo.hosts[0];
        conninfo.password_for(host).map(|password| password.expose_secret().to_owned())
    };
    let local =
        file("localhost:5432:d:u:hush\n/tmp:5432:d:u:tmp\n1.2.3.4:5432:d:u:address\nh:05432:d:u:odd\n");
    assert_eq!(password("user=u dbname=d", &local).as_deref(), Some("hush"));
    assert_eq!(password("user=u dbname=d host=/var/run/postgresql", &local).as_deref(), Some("hush"));
    assert_eq!(password("user=u dbname=d host=/tmp", &local).as_deref(), Some("tmp"));
    assert_eq!(password("user=u dbname=d hostaddr=1.2.3.4", &local).as_deref(), Some("address"));
    assert_eq!(password("user=u dbname=d hostaddr=1.2.3.4 host=h", &local), None);
    assert_eq!(password("user=u dbname=d host=h port=05432", &local).as_deref(), Some("odd"));
    assert_eq!(password("user=u dbname=d password=own", &local).as_deref(), Some("own"));
    assert_eq!(password("user=u dbname=d password=''", &local).as_deref(), Some("hush"));

    let mut conninfo = Conninfo::parse("user=u dbname=d", &local).unwrap();
    conninfo.reread_passwords(&file("*:*:*:*:changed\n"));
    let changed = conninfo.password_for(&conninfo.hosts[0]).unwrap();
    assert_eq!(changed.expose_secret(), "changed");
    conninfo.reread_passwords(&nobody().with_file("/home/nobody/.pgpass", 0o644, "*:*:*:*:open\n"));
    assert!(conninfo.password_for(&conninfo.hosts[0]).is_none());
    assert!(conninfo.password_file_warning.is_some());
}

#[test]
fn hosts_addresses_and_ports_are_matched() {
    let hosts = |text: &str| places(&parse(text));
    assert_eq!(hosts("host=a,b port=1"), [r#"at "a", port 1"#, r#"at "b", port 1"#]);
    assert_eq!(hosts("host=a,b port=1,"), [r#"at "a", port 1"#, r#"at "b", port 5432"#]);
    assert_eq!(hosts("host=a, hostaddr=,::1"), [r#"at "a", port 5432"#, r#"at "::1", port 5432"#]);
    assert_eq!(hosts("host=@x port=7"), [r#"on socket "@x/.s.PGSQL.7""#]);
    assert_eq!(
        hosts("postgresql://%2Ftmp:6,[::1]:7/"),
        [r#"on socket "/tmp/.s.PGSQL.6""#, r#"at "::1", port 7"#]
    );
    assert_eq!(parse("hostaddr=fe80::1%eth0").hosts[0].address, HostAddress::Name("fe80::1%eth0".to_owned()));
    assert_eq!(parse("host=n hostaddr=1.2.3.4").hosts[0].name, "n");
    assert_eq!(parse("host=n hostaddr=1.2.3.4").hosts[0].certificate_name, "n");
    assert_eq!(parse("hostaddr=1.2.3.4").hosts[0].certificate_name, "");
    assert_eq!(parse("host=1.2.3.4").hosts[0].certificate_name, "1.2.3.4");
    for (text, address) in
        [("7", "0.0.0.7"), ("127.1", "127.0.0.1"), ("0x7f.0.0.010", "127.0.0.8"), ("1.2.772", "1.2.3.4")]
    {
        let expected = HostAddress::Ip(address.parse().unwrap());
        assert_eq!(parse(&format!("hostaddr={text}")).hosts[0].address, expected, "{text}");
    }
    for text in ["256.1", "1.2.3.256", "1.2.3.4.5", "4294967296", "0x", "08", "1.", ".1", "+1", "1..2"] {
        assert!(error(&format!("hostaddr={text}")).starts_with("could not parse network address"), "{text}");
    }
    assert_eq!(parse("port=' 12 '").hosts[0].port, 12);
}

#[test]
fn errors_are_libpqs() {
    let long = "x".repeat(100);
    let cases = [
        ("host=a,b hostaddr=1.1.1.1", "could not match 2 host names to 1 hostaddr values".to_owned()),
        ("host=a,b,c port=1,2", "could not match 2 port numbers to 3 hosts".to_owned()),
        ("port=1,2", "could not match 2 port numbers to 1 hosts".to_owned()),
        ("port=x", r#"invalid integer value "x" for connection option "port""#.to_owned()),
        ("port=0", r#"invalid port number: "0""#.to_owned()),
        ("port=65536", r#"invalid port number: "65536""#.to_owned()),
        ("hostaddr=x", r#"could not parse network address "x": Name or service not known"#.to_owned()),
        ("sslmode=x", r#"invalid sslmode value: "x""#.to_owned()),
        ("sslmode=''", r#"invalid sslmode value: """#.to_owned()),
        ("target_session_attrs=x", r#"invalid target_session_attrs value: "x""#.to_owned()),
        ("load_balance_hosts=x", r#"invalid load_balance_hosts value: "x""#.to_owned()),
        ("channel_binding=x", r#"invalid channel_binding value: "x""#.to_owned()),
        ("gssencmode=x", r#"invalid gssencmode value: "x""#.to_owned()),
        (
            "gssencmode=require",
            r#"gssencmode value "require" invalid when GSSAPI support is not compiled in"#.to_owned(),
        ),
        ("sslcertmode=x", r#"invalid sslcertmode value: "x""#.to_owned()),
        ("sslnegotiation=x", r#"invalid sslnegotiation value: "x""#.to_owned()),
        (
            "sslnegotiation=direct",
            r#"weak sslmode "prefer" may not be used with sslnegotiation=direct (use "require", "verify-ca", or "verify-full")"#
                .to_owned(),
        ),
        (
            "sslrootcert=system sslmode=require",
            r#"weak sslmode "require" may not be used with sslrootcert=system (use "verify-full")"#.to_owned(),
        ),
        ("ssl_min_protocol_version=x", r#"invalid "ssl_min_protocol_version" value: "x""#.to_owned()),
        ("ssl_max_protocol_version=x", r#"invalid "ssl_max_protocol_version" value: "x""#.to_owned()),
        ("ssl_max_protocol_version=tlsv1.1", "invalid SSL protocol version range".to_owned()),
        ("require_auth=x", r#"invalid require_auth value: "x""#.to_owned()),
        ("min_protocol_version=3.1", r#"invalid min_protocol_version value: "3.1""#.to_owned()),
        (
            "min_protocol_version=3.2 max_protocol_version=3.0",
            r#""min_protocol_version" is greater than "max_protocol_version""#.to_owned(),
        ),
        ("scram_client_key=%", "invalid SCRAM client key".to_owned()),
        ("scram_client_key='QUJD '", "invalid SCRAM client key".to_owned()),
        ("scram_client_key=QUI", "invalid SCRAM client key".to_owned()),
        ("scram_client_key=''", "invalid SCRAM client key length: 0".to_owned()),
        ("scram_client_key=QUJ=", "invalid SCRAM client key length: 2".to_owned()),
        ("scram_server_key=QUJD", "invalid SCRAM server key length: 3".to_owned()),
        (
            "host=h connect_timeout=9999999999",
            r#"invalid integer value "9999999999" for connection option "connect_timeout""#.to_owned(),
        ),
        ("host=h keepalives=x", r#"invalid integer value "x" for connection option "keepalives""#.to_owned()),
        (
            "host=h tcp_user_timeout=''",
            r#"invalid integer value "" for connection option "tcp_user_timeout""#.to_owned(),
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(error(text), expected, "{text}");
    }
    let path = format!("/{long}/.s.PGSQL.5432");
    assert_eq!(
        error(&format!("host=/{long}")),
        format!("Unix-domain socket path \"{path}\" is too long (maximum 107 bytes)")
    );
    // Not looked at, as in libpq.
    assert_eq!(parse("host=/tmp keepalives=x tcp_user_timeout=x").keepalives, None);
    assert_eq!(parse("host=h keepalives=0 keepalives_idle=x").keepalives, None);
}

#[test]
fn application_names_and_environment_reach_the_startup_packet() {
    let surroundings = nobody()
        .with_variable("PGAPPNAME", "app")
        .with_variable("PGTZ", "UTC")
        .with_variable("PGDATESTYLE", "Default")
        .with_variable("PGOPTIONS", "-c a=b");
    let conninfo =
        Conninfo::parse_for_replication("user=u client_encoding=auto", "relay", &surroundings).unwrap();
    let parameters = [
        ("user", "u"),
        ("database", "replication"),
        ("replication", "true"),
        ("options", "-c a=b"),
        ("application_name", "app"),
        ("client_encoding", "UTF8"),
        ("timezone", "UTC"),
    ];
    assert_eq!(conninfo.startup_parameters(), parameters);
    let own = Conninfo::parse_for_replication("application_name=own", "relay", &surroundings).unwrap();
    assert_eq!(own.application_name.as_deref(), Some("own"));
    let empty = Conninfo::parse_for_replication("application_name=''", "relay", &surroundings).unwrap();
    assert_eq!(empty.application_name, None);
}

#[test]
fn random_order_is_a_permutation_and_the_default_is_the_order_given() {
    let order = |text: &str, mut random: usize| {
        let conninfo = parse(text);
        let order = conninfo.attempt_order(|below| {
            random = random.wrapping_mul(31).wrapping_add(7);
            random % below
        });
        order.into_iter().map(|host| host.name.clone()).collect::<String>()
    };
    assert_eq!(order("host=a,b,c", 1), "abc");
    let mut seen = std::collections::BTreeSet::new();
    for random in 0..200 {
        let names = order("host=a,b,c load_balance_hosts=random", random);
        let mut sorted = names.chars().collect::<Vec<_>>();
        sorted.sort_unstable();
        assert_eq!(sorted, ['a', 'b', 'c']);
        seen.insert(names);
    }
    assert_eq!(seen.len(), 6);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn any_settings_are_resolved_or_refused(
        pairs in prop::collection::vec(
            (0..KEYWORDS.len(), "[a-z0-9,.:/@! '\\\\=%-]{0,10}"), 0..6,
        ),
    ) {
        let mut settings = Settings::default();
        for (index, value) in &pairs {
            settings.store(KEYWORDS[*index].name, value).unwrap();
        }
        let text = settings.to_connection_string();
        if let Ok(conninfo) = Conninfo::parse(&text, &nobody()) {
            prop_assert!(!conninfo.hosts.is_empty());
            prop_assert!(conninfo.hosts.iter().all(|host| host.port > 0));
        }
    }

    #[test]
    fn what_is_shown_never_holds_the_password(password in "[a-z]{6}[ '\\\\]{0,2}[a-z]{6}", is_uri in any::<bool>()) {
        let text = if is_uri {
            let encoded = password.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
            format!("postgresql://u:{encoded}@h/d")
        } else {
            let mut settings = Settings::default();
            settings.store("password", &password).unwrap();
            settings.to_connection_string()
        };
        let conninfo = Conninfo::parse(&text, &nobody()).unwrap();
        let given = conninfo.password_for(&conninfo.hosts[0]).unwrap();
        prop_assert_eq!(given.expose_secret(), password.as_str());
        let shown = format!("{conninfo} {conninfo:?}");
        let (head, tail) = password.split_at(6);
        prop_assert!(!shown.contains(head) && !shown.contains(&tail[tail.len() - 6..]));
    }
}
