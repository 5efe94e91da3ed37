//! Commands outside a stream.

use walrelay::{protocol::frontend::Message, wal::TimelineId};

use crate::support::{Options, Relay};

const TEXT: u32 = 25;
const INT4: u32 = 23;
const INT8: u32 = 20;
const BYTEA: u32 = 17;

async fn relay_of(version_num: u32) -> Relay {
    Relay::start_with(Options { version: ("x", version_num), ..Options::default() }).await
}

#[tokio::test]
async fn identify_system_has_each_majors_types_and_our_own_position() {
    for (version_num, timeline_type) in [(130_023, INT4), (150_018, INT4), (160_014, INT8)] {
        let mut relay = relay_of(version_num).await;
        let end = relay.grow(10_000);
        let answer = relay.client().await.query("IDENTIFY_SYSTEM").await;
        let columns: Vec<_> = answer.columns.iter().map(|(name, oid)| (name.as_str(), *oid)).collect();
        let expected = [("systemid", TEXT), ("timeline", timeline_type), ("xlogpos", TEXT), ("dbname", TEXT)];
        assert_eq!(columns, expected);
        assert_eq!(answer.value(0), Some(relay.store.identity().unwrap().system_id.to_string().as_str()));
        assert_eq!(answer.value(1), Some("1"));
        assert_eq!(answer.value(2), Some(end.to_string().as_str()));
        assert_eq!(answer.value(3), None);
        assert_eq!(answer.tags, ["IDENTIFY_SYSTEM"]);
    }
}

#[tokio::test]
async fn positions_are_printed_as_the_major_does() {
    let mut relay = relay_of(190_000).await;
    let end = relay.grow(10_000);
    let answer = relay.client().await.query("IDENTIFY_SYSTEM").await;
    assert_eq!(answer.value(2), Some(format!("0/{:08X}", end.get()).as_str()));
}

#[tokio::test]
async fn settings_are_shown_under_their_own_names() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    for (name, shown, value) in [
        ("data_directory_mode", "data_directory_mode", "0700"),
        ("wal_segment_size", "wal_segment_size", "1MB"),
        ("server_version_num", "server_version_num", "150018"),
        ("wal_sender_timeout", "wal_sender_timeout", "1min"),
        ("transaction_read_only", "transaction_read_only", "off"),
        ("in_hot_standby", "in_hot_standby", "off"),
        ("default_transaction_read_only", "default_transaction_read_only", "off"),
        ("integer_datetimes", "integer_datetimes", "on"),
        ("wal_keep_size", "wal_keep_size", "1GB"),
        ("max_wal_senders", "max_wal_senders", "10"),
        ("hot_standby", "hot_standby", "on"),
        ("wal_level", "wal_level", "replica"),
        ("\"DATESTYLE\"", "DateStyle", "ISO, MDY"),
    ] {
        let answer = client.query(&format!("SHOW {name}")).await;
        assert_eq!(answer.columns, [(shown.to_owned(), TEXT)], "{name}");
        assert_eq!((answer.value(0), answer.tags.as_slice()), (Some(value), &["SHOW".to_owned()][..]));
    }
    let answer = client.query("SHOW no_such_setting").await;
    assert_eq!(answer.sqlstate(), "42704");
    assert_eq!(answer.message(), "unrecognized configuration parameter \"no_such_setting\"");
}

#[tokio::test]
async fn a_clients_own_timeout_is_honoured_and_other_options_are_ignored() {
    let relay = Relay::start().await;
    let mut startup = crate::support::startup();
    startup.parameters.push(("options".to_owned(), "-c wal_sender_timeout=0s -c geqo=off".to_owned()));
    let mut client = relay.stranger().await;
    client.log_in(&startup).await;
    assert_eq!(client.query("SHOW wal_sender_timeout").await.value(0), Some("0"));
}

#[tokio::test]
async fn a_history_file_is_sent_as_it_is_and_a_missing_one_is_an_error_behind_its_description() {
    const CONTENT: &str = "1\t0/3000000\tno recovery target specified\n";
    for (version_num, content_type) in [(130_023, BYTEA), (140_023, TEXT), (180_006, TEXT)] {
        let relay = relay_of(version_num).await;
        relay.store.store_history(TimelineId::new(2).unwrap(), CONTENT.as_bytes()).unwrap();
        let mut client = relay.client().await;
        let answer = client.query("TIMELINE_HISTORY 2").await;
        assert_eq!(answer.columns[1], ("content".to_owned(), content_type));
        assert_eq!((answer.value(0), answer.value(1)), (Some("00000002.history"), Some(CONTENT)));
        let answer = client.query("TIMELINE_HISTORY 3").await;
        assert_eq!(answer.columns.len(), 2, "described before the failure is known");
        assert!(answer.rows.is_empty());
        assert_eq!(answer.sqlstate(), "58P01");
        let missing = "could not open file \"pg_wal/00000003.history\": No such file or directory";
        assert_eq!(answer.message(), missing);
    }
}

#[tokio::test]
async fn what_is_no_replication_command_is_refused_and_the_session_stays() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let sql = "cannot execute SQL commands in WAL sender for physical replication";
    for query in ["SELECT 1", "", "identify_system", "SET x = 1", "BEGIN"] {
        let answer = client.query(query).await;
        assert_eq!((answer.sqlstate(), answer.message()), ("0A000", sql), "{query:?}");
    }
    for (query, sqlstate) in [
        ("IDENTIFY_SYSTEM; IDENTIFY_SYSTEM", "42601"),
        ("IDENTIFY_SYSTEM x", "42601"),
        ("BASE_BACKUP ( LABEL 'pg_basebackup base backup',  PROGRESS,  WAIT 0,  MANIFEST 'yes')", "0A000"),
        ("CREATE_REPLICATION_SLOT l LOGICAL pgoutput", "55000"),
        ("START_REPLICATION SLOT l LOGICAL 0/0", "55000"),
    ] {
        assert_eq!(client.query(query).await.sqlstate(), sqlstate, "{query}");
    }
    assert!(client.query("IDENTIFY_SYSTEM;").await.error.is_none());
}

#[tokio::test]
async fn with_a_database_the_words_are_not_those_of_physical_replication() {
    let relay = Relay::start().await;
    let mut client = relay.stranger().await;
    let startup = [("user", "replicator"), ("database", "postgres"), ("replication", "database")];
    client.log_in(&walrelay::protocol::frontend::Startup::new(startup)).await;
    for (query, text) in [
        ("SELECT 1", "SQL is not supported by a WAL relay"),
        ("START_REPLICATION SLOT l LOGICAL 0/0", "logical decoding cannot be used while in recovery"),
    ] {
        let answer = client.query(query).await;
        assert_eq!((answer.sqlstate(), answer.message()), ("0A000", text), "{query}");
    }
}

#[tokio::test]
async fn commands_that_a_major_does_not_know_are_sql_to_it() {
    let relay = relay_of(140_023).await;
    let mut client = relay.client().await;
    for query in ["READ_REPLICATION_SLOT s", "UPLOAD_MANIFEST"] {
        let answer = client.query(query).await;
        assert_eq!(answer.sqlstate(), "0A000", "{query}");
        assert!(answer.message().starts_with("cannot execute SQL commands"), "{query}");
    }
}

#[tokio::test]
async fn the_extended_protocol_is_refused_once_and_forgiven_at_sync() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    for tag in *b"PBDE" {
        client.send(&Message::Extended(tag)).await;
    }
    client.send(&Message::Query("IDENTIFY_SYSTEM".into())).await;
    client.send(&Message::Sync).await;
    let answer = client.answer().await;
    assert_eq!(answer.sqlstate(), "08P01");
    assert_eq!(answer.message(), "extended query protocol not supported in a replication connection");
    assert!(answer.rows.is_empty(), "everything before Sync is skipped");
    client.send(&Message::FunctionCall).await;
    let answer = client.answer().await;
    assert_eq!(answer.message(), "fastpath function calls not supported in a replication connection");
    assert!(client.query("IDENTIFY_SYSTEM").await.error.is_none());
}

#[tokio::test]
async fn an_unknown_message_ends_the_session() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    client.send_bytes(b"G\0\0\0\x04").await;
    assert_eq!(client.refusal().await.sqlstate.unwrap().as_str(), "08P01");
}

#[tokio::test]
async fn a_relay_that_stops_says_so_to_idle_sessions() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    relay.shutdown.cancel();
    let error = client.refusal().await;
    assert_eq!(error.sqlstate.unwrap().as_str(), "57P01");
    assert_eq!(error.message, "terminating connection due to administrator command");
    relay.served.await.unwrap();
}

#[tokio::test]
async fn a_session_with_a_database_replicates_and_names_it() {
    let relay = Relay::start().await;
    let mut startup = crate::support::startup();
    startup.parameters.extend([
        ("replication".to_owned(), "database".to_owned()),
        ("database".to_owned(), "postgres".to_owned()),
    ]);
    let mut client = relay.stranger().await;
    client.log_in(&startup).await;
    assert_eq!(client.query("IDENTIFY_SYSTEM").await.value(3), Some("postgres"));
    assert_eq!(client.query("SELECT 1").await.sqlstate(), "0A000");
}
