//! The way in.

use std::{collections::BTreeMap, time::Duration};

use walrelay::protocol::{
    backend,
    frontend::{FirstPacket, Message, ProtocolVersion, Startup},
};

use crate::logins::{log_in, scram_secret, user, users};
use crate::support::{Options, Relay, access, settings, startup};

const REPORTED_13: [&str; 11] = [
    "application_name",
    "client_encoding",
    "DateStyle",
    "integer_datetimes",
    "IntervalStyle",
    "is_superuser",
    "server_encoding",
    "server_version",
    "session_authorization",
    "standard_conforming_strings",
    "TimeZone",
];

#[tokio::test]
async fn each_major_reports_its_own_settings() {
    let since: [(u32, &[&str]); 4] = [
        (130_023, &[]),
        (140_023, &["default_transaction_read_only", "in_hot_standby"]),
        (160_014, &["default_transaction_read_only", "in_hot_standby", "scram_iterations"]),
        (180_006, &["default_transaction_read_only", "in_hot_standby", "scram_iterations", "search_path"]),
    ];
    for (version_num, more) in since {
        let version = ("as the upstream says", version_num);
        let relay = Relay::start_with(Options { version, ..Options::default() }).await;
        let welcome = relay.stranger().await.log_in(&startup()).await;
        let mut expected: Vec<&str> = REPORTED_13.iter().chain(more).copied().collect();
        expected.sort_unstable();
        let mut names: Vec<&str> = welcome.parameters.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, expected, "{version_num}");
        let parameters: BTreeMap<_, _> = welcome.parameters.into_iter().collect();
        assert_eq!(parameters["server_version"], "as the upstream says");
        assert_eq!(parameters["integer_datetimes"], "on");
        assert_eq!(parameters["application_name"], "dc2_a");
        assert_eq!(welcome.key.as_bytes().len(), 4, "a longer key aborts libpq under 3.0");
    }
}

#[tokio::test]
async fn every_connection_has_its_own_number() {
    let relay = Relay::start().await;
    let (mut first, mut second) = (relay.stranger().await, relay.stranger().await);
    let pids = [first.log_in(&startup()).await.pid, second.log_in(&startup()).await.pid];
    assert!(pids[0] != pids[1] && pids.iter().all(|pid| *pid != 0), "{pids:?}");
}

#[tokio::test]
async fn standby_or_primary_is_shown_by_the_upstream_and_a_change_is_told() {
    let relay = Relay::start().await;
    relay.set_writable(false);
    let mut client = relay.stranger().await;
    let welcome = client.log_in(&startup()).await;
    assert!(welcome.parameters.contains(&("in_hot_standby".to_owned(), "on".to_owned())));
    assert_eq!(client.query("SHOW transaction_read_only").await.value(0), Some("on"));
    relay.set_writable(true);
    client.send(&Message::Query("SHOW in_hot_standby".into())).await;
    let mut told = None;
    loop {
        match client.receive().await.unwrap() {
            backend::Message::ParameterStatus { name, value } => told = Some((name, value)),
            backend::Message::ReadyForQuery(_) => break,
            _ => {}
        }
    }
    assert_eq!(told, Some(("in_hot_standby".to_owned(), "off".to_owned())), "before ReadyForQuery");
}

#[tokio::test]
async fn encryption_is_refused_and_the_client_may_go_on_in_clear() {
    let relay = Relay::start().await;
    let mut client = relay.stranger().await;
    client.send_packet(&FirstPacket::GssEncRequest).await;
    assert_eq!(client.byte().await, Some(b'N'));
    client.send_packet(&FirstPacket::SslRequest).await;
    assert_eq!(client.byte().await, Some(b'N'));
    client.log_in(&startup()).await;
    assert!(client.query("IDENTIFY_SYSTEM").await.error.is_none());
}

#[tokio::test]
async fn bytes_stuffed_behind_a_request_for_encryption_end_the_connection() {
    let relay = Relay::start().await;
    let mut client = relay.stranger().await;
    let mut both = bytes::BytesMut::new();
    FirstPacket::SslRequest.encode(&mut both);
    FirstPacket::Startup(startup()).encode(&mut both);
    client.send_bytes(&both).await;
    assert_eq!(client.byte().await, Some(b'N'));
    let error = client.refusal().await;
    assert_eq!(error.message, "received unencrypted data after SSL request");
    assert_eq!(error.sqlstate.unwrap().as_str(), "08P01");
}

#[tokio::test]
async fn direct_tls_is_refused_in_the_clients_own_language() {
    let relay = Relay::start().await;
    let mut client = relay.stranger().await;
    client.send_bytes(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]).await;
    for byte in [0x15, 0x03, 0x01, 0x00, 0x02, 0x02, 0x28] {
        assert_eq!(client.byte().await, Some(byte));
    }
    assert_eq!(client.byte().await, None);
}

#[tokio::test]
async fn a_newer_protocol_and_unknown_extensions_are_negotiated() {
    let relay = Relay::start().await;
    let mut client = relay.stranger().await;
    let mut greasy = startup();
    greasy.version.minor = 9999;
    greasy.parameters.push(("_pq_.test_protocol_negotiation".to_owned(), String::new()));
    client.send_packet(&FirstPacket::Startup(greasy)).await;
    let Some(backend::Message::NegotiateProtocolVersion(answer)) = client.receive().await else { panic!() };
    assert_eq!(answer.version, ProtocolVersion::V3_2);
    assert_eq!(answer.unrecognized, ["_pq_.test_protocol_negotiation"]);
    assert_eq!(client.welcome().await.key.as_bytes().len(), 32);
}

#[tokio::test]
async fn bad_startup_packets_get_postgresqls_words() {
    let relay = Relay::start().await;
    let physical = ("replication", "true");
    let cases: [(Startup, &str, &str); 5] = [
        (Startup::new([physical]), "28000", "no PostgreSQL user name specified in startup packet"),
        (
            Startup::new([("user", "u"), ("replication", "Database")]),
            "22023",
            "invalid value for parameter \"replication\": \"Database\"",
        ),
        (
            Startup { version: ProtocolVersion { major: 2, minor: 0 }, parameters: Vec::new() },
            "0A000",
            "unsupported frontend protocol 2.0: server supports 3.0 to 3.2",
        ),
        (
            Startup::new([("user", "app"), ("database", "shop")]),
            "28000",
            "no pg_hba.conf entry for host \"127.0.0.1\", user \"app\", database \"shop\", no encryption",
        ),
        (
            Startup::new([("user", "app"), ("replication", "off")]),
            "28000",
            "no pg_hba.conf entry for host \"127.0.0.1\", user \"app\", database \"app\", no encryption",
        ),
    ];
    for (startup, sqlstate, message) in cases {
        let mut client = relay.stranger().await;
        client.send_packet(&FirstPacket::Startup(startup)).await;
        let error = client.refusal().await;
        assert_eq!((error.sqlstate.unwrap().as_str(), error.message.as_str()), (sqlstate, message));
    }
}

#[tokio::test]
async fn garbage_is_dropped_and_others_are_served() {
    let relay = Relay::start().await;
    let mut witness = relay.client().await;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0, 0, 0, 0, 0, 0, 0, 0],
        &[0xff; 64],
        &[0, 0, 0, 7, 0, 3, 0, 0],
        &[0x7f, 0xff, 0xff, 0xff, 0, 3, 0, 0],
    ] {
        let mut client = relay.stranger().await;
        client.send_bytes(garbage).await;
        assert!(client.receive().await.is_none(), "no answer to {garbage:?}");
    }
    let mut client = relay.stranger().await;
    client.send_bytes(&[0, 0, 0, 12, 0, 3, 0, 0, b'u', 0, b'x', b'y']).await;
    assert_eq!(client.refusal().await.sqlstate.unwrap().as_str(), "08P01");
    assert!(witness.query("IDENTIFY_SYSTEM").await.error.is_none());
}

fn scram_options() -> Options {
    let users = users([("replicator", user(Some(scram_secret("pencil"))))]);
    Options {
        access: access("host all,replication all all scram-sha-256", Some(users)),
        ..Options::default()
    }
}

#[tokio::test]
async fn a_password_is_proved_and_a_wrong_one_looks_like_an_unknown_user() {
    let relay = Relay::start_with(scram_options()).await;
    let mut client = relay.stranger().await;
    log_in(&mut client, "replicator", "pencil").await.unwrap();
    assert!(client.query("IDENTIFY_SYSTEM").await.error.is_none());
    for (user, password) in [("replicator", "pen"), ("nobody", "pencil")] {
        let error = log_in(&mut relay.stranger().await, user, password).await.unwrap_err();
        assert_eq!(error.sqlstate.unwrap().as_str(), "28P01");
        assert_eq!(error.message, format!("password authentication failed for user \"{user}\""));
    }
}

#[tokio::test]
async fn nothing_but_a_password_is_taken_from_a_stranger() {
    let relay = Relay::start_with(scram_options()).await;
    let mut client = relay.stranger().await;
    client.send_packet(&FirstPacket::Startup(startup())).await;
    assert!(matches!(client.receive().await, Some(backend::Message::Authentication(_))));
    client.send(&Message::Query("IDENTIFY_SYSTEM".into())).await;
    let error = client.refusal().await;
    assert_eq!(error.message, "expected SASL response, got message type 81");
}

#[tokio::test]
async fn a_slow_handshake_is_ended_as_a_whole() {
    let settings = walrelay::downstream::DownstreamSettings {
        authentication_timeout: Duration::from_millis(300),
        ..settings()
    };
    let relay = Relay::start_with(Options { settings, ..Options::default() }).await;
    let mut client = relay.stranger().await;
    let begun = std::time::Instant::now();
    let mut packet = bytes::BytesMut::new();
    FirstPacket::Startup(startup()).encode(&mut packet);
    for byte in packet {
        if tokio::io::AsyncWriteExt::write_all(&mut client.socket, &[byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    assert!(client.receive().await.is_none());
    assert!(begun.elapsed() < Duration::from_secs(8));
}

#[tokio::test]
async fn a_server_that_never_heard_of_an_upstream_is_starting_up() {
    let relay = Relay::start_fresh().await;
    let mut client = relay.stranger().await;
    client.send_packet(&FirstPacket::Startup(startup())).await;
    let error = client.refusal().await;
    assert_eq!(error.sqlstate.unwrap().as_str(), "57P03");
    assert_eq!(error.message, "the database system is starting up");
}
