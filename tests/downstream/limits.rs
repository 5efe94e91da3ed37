//! Clients that want too much, or take nothing.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use walrelay::{
    downstream::DownstreamSettings,
    protocol::frontend::{FirstPacket, encode_query},
};

use crate::support::{Options, Relay, eventually, settings, startup};

#[tokio::test]
async fn more_sessions_than_max_wal_senders_are_refused() {
    for (version_num, setting) in [(150_018, "max_wal_senders"), (170_011, "\"max_wal_senders\"")] {
        let settings = DownstreamSettings { max_wal_senders: 1, ..settings() };
        let options = Options { version: ("x", version_num), settings, ..Options::default() };
        let relay = Relay::start_with(options).await;
        let first = relay.client().await;
        let mut second = relay.stranger().await;
        second.send_packet(&FirstPacket::Startup(startup())).await;
        assert!(matches!(
            second.receive().await,
            Some(walrelay::protocol::backend::Message::Authentication(_))
        ));
        let error = second.refusal().await;
        assert_eq!(error.sqlstate.unwrap().as_str(), "53300");
        let text = format!("number of requested standby connections exceeds {setting} (currently 1)");
        assert_eq!(error.message, text);
        drop(first);
        eventually("the first is gone", || relay.registry.is_empty()).await;
        relay.client().await;
    }
}

#[tokio::test]
async fn strangers_have_a_limit_of_their_own() {
    let settings = DownstreamSettings { unauthenticated_max: 3, ..settings() };
    let relay = Relay::start_with(Options { settings, ..Options::default() }).await;
    let mut standby = relay.client().await;
    let mut strangers = Vec::new();
    for _ in 0..3 {
        strangers.push(relay.stranger().await);
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let error = relay.stranger().await.refusal().await;
    assert_eq!(error.sqlstate.unwrap().as_str(), "53300");
    assert!(standby.query("IDENTIFY_SYSTEM").await.error.is_none(), "who is in is not concerned");
    drop(strangers);
    tokio::time::sleep(Duration::from_millis(100)).await;
    relay.client().await;
}

#[tokio::test]
async fn queries_are_not_taken_faster_than_their_answers() {
    let settings = DownstreamSettings { wal_sender_timeout: Some(Duration::from_secs(1)), ..settings() };
    let relay = Relay::start_with(Options { settings, ..Options::default() }).await;
    let mut client = relay.client().await;
    let mut queries = bytes::BytesMut::new();
    for _ in 0..1_000 {
        encode_query("IDENTIFY_SYSTEM", &mut queries);
    }
    // Nothing is read: the relay stops taking queries once the answers do not go out, and gives up in the end.
    let sending = async {
        let mut sent = 0_u64;
        while client.socket.write_all(&queries).await.is_ok() {
            sent += queries.len() as u64;
        }
        sent
    };
    let sent = tokio::time::timeout(Duration::from_secs(30), sending).await.expect("never dropped");
    assert!(sent < 64 << 20, "{sent} bytes were taken");
    eventually("the session is gone", || relay.registry.is_empty()).await;
}

#[tokio::test]
async fn a_client_that_never_reads_is_dropped_and_others_stream_on() {
    let settings = DownstreamSettings { wal_sender_timeout: Some(Duration::from_secs(3)), ..settings() };
    let mut relay = Relay::start_with(Options { settings, ..Options::default() }).await;
    let start = relay.start_lsn();
    let mut end = relay.grow(24 << 20);
    let mut stuck = relay.client().await;
    let mut query = bytes::BytesMut::new();
    encode_query(&format!("START_REPLICATION {start} TIMELINE 1"), &mut query);
    stuck.send_bytes(&query).await;
    let mut reader = relay.client().await;
    reader.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    reader.receive_wal(start, end).await;
    for _ in 0..8 {
        reader.reply(Some(end), Some(end), false).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let next = relay.grow(100_000);
        reader.receive_wal(end, next).await;
        end = next;
    }
    eventually("the stuck client is gone", || relay.registry.len() == 1).await;
    let sent = relay.registry.statuses()[0].sent_lsn;
    assert_eq!(sent, Some(end));
}

#[tokio::test]
async fn an_eager_client_gets_one_answer_for_many_questions_it_does_not_wait_for() {
    let mut relay = Relay::start().await;
    let (start, end) = (relay.start_lsn(), relay.grow(1_000));
    let mut client = relay.client().await;
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    client.receive_wal(start, end).await;
    for _ in 0..1_000 {
        client.reply(Some(end), Some(end), true).await;
    }
    client.streamed().await;
    relay.grow(1_000);
    let next = relay.wal.end();
    client.receive_wal(end, next).await;
}
