//! Streams: content, waiting, ends.

use std::time::Duration;

use walrelay::{
    protocol::{
        backend,
        frontend::{CancelRequest, FirstPacket, Message},
        replication::PrimaryMessage,
    },
    status::RemovedWal,
    store::Positions,
    wal::{Lsn, TimelineId},
};

use crate::support::{Client, Options, Relay, eventually, settings, startup};

#[tokio::test]
async fn a_stream_is_byte_for_byte_and_ends_its_messages_safely() {
    let mut relay = Relay::start().await;
    let start = relay.start_lsn();
    let end = relay.grow(3_000_000);
    let mut client = relay.client().await;
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    let (mut wal, mut ends) = client.receive_wal(start, end).await;
    let mut last = end;
    for _ in 0..50 {
        let next = relay.grow(2_000);
        let (more, more_ends) = client.receive_wal(last, next).await;
        wal.extend(more);
        ends.extend(more_ends);
        last = next;
    }
    assert!(wal == relay.wal.bytes(), "other bytes than were written");
    let safe = relay.wal.record_ends();
    for end in ends {
        assert!(end.page_offset() == 0 || safe.contains(&end), "{end} may wedge a standby");
    }
}

#[tokio::test]
async fn a_stream_may_begin_at_any_byte() {
    let mut relay = Relay::start().await;
    let end = relay.grow(100_000);
    let start = relay.start_lsn().advance(12_345);
    let mut client = relay.client().await;
    client.start_streaming(&format!("START_REPLICATION PHYSICAL {start};")).await;
    let (wal, _) = client.receive_wal(start, end).await;
    assert!(wal == relay.wal.slice(start, end));
}

#[tokio::test]
async fn wal_that_left_memory_is_read_from_the_files() {
    let mut relay = Relay::start_with(Options { tail_bytes_max: 1 << 20, ..Options::default() }).await;
    let start = relay.start_lsn();
    let mut end = start;
    for _ in 0..12 {
        end = relay.grow(1 << 20);
        let store = &relay.store;
        eventually("written", || store.positions().unwrap().flushed == end).await;
    }
    let mut client = relay.client().await;
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    let (wal, _) = client.receive_wal(start, end).await;
    assert!(wal == relay.wal.bytes());
}

async fn assert_two_tags_and_ready(client: &mut Client) {
    assert_eq!(client.answer().await.tags, ["START_STREAMING", "START_REPLICATION"]);
    assert!(client.query("IDENTIFY_SYSTEM").await.error.is_none(), "the session goes on");
}

#[tokio::test]
async fn the_clients_copy_done_is_answered_and_the_session_goes_on() {
    let mut relay = Relay::start().await;
    let (start, end) = (relay.start_lsn(), relay.grow(1_000));
    let mut client = relay.client().await;
    for _ in 0..2 {
        client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
        client.receive_wal(start, end).await;
        client.send(&Message::CopyDone).await;
        assert_eq!(client.receive().await, Some(backend::Message::CopyDone));
        assert_two_tags_and_ready(&mut client).await;
    }
}

#[tokio::test]
async fn a_question_is_answered_at_once() {
    let mut relay = Relay::start().await;
    let (start, end) = (relay.start_lsn(), relay.grow(1_000));
    let mut client = relay.client().await;
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    client.receive_wal(start, end).await;
    client.reply(Some(end), None, true).await;
    let PrimaryMessage::Keepalive(keepalive) = client.streamed().await else { panic!() };
    assert_eq!((keepalive.wal_end, keepalive.reply_requested), (Some(end), false));
}

#[tokio::test]
async fn the_registry_shows_what_a_standby_reports() {
    let mut relay = Relay::start().await;
    let (start, end) = (relay.start_lsn(), relay.grow(1_000));
    let mut client = relay.client().await;
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    client.receive_wal(start, end).await;
    client.reply(Some(end), Some(end), false).await;
    eventually("the flush is shown", || relay.registry.statuses()[0].flush_lsn == Some(end)).await;
    let status = relay.registry.statuses().remove(0);
    assert_eq!((status.usename.as_str(), status.application_name.as_str()), ("replicator", "dc2_a"));
    assert_eq!((status.state.as_str(), status.sent_lsn), ("streaming", Some(end)));
    assert_eq!(status.client_addr.unwrap().to_string(), "127.0.0.1");
    drop(client);
    eventually("the session is gone", || relay.registry.is_empty()).await;
}

#[tokio::test]
async fn a_start_a_little_ahead_waits_for_the_wal() {
    let mut relay = Relay::start().await;
    relay.grow(1_000);
    let start = relay.start_lsn().advance(1 << 20);
    let mut client = relay.client().await;
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    client.reply(None, None, true).await;
    let PrimaryMessage::Keepalive(keepalive) = client.streamed().await else { panic!() };
    assert!(keepalive.wal_end < Some(start), "no WAL is promised that is not there");
    let end = relay.grow(1_200_000);
    let (wal, _) = client.receive_wal(start, end).await;
    assert!(wal == relay.wal.slice(start, end));
}

#[tokio::test]
async fn a_start_too_far_ahead_is_an_error_behind_copy_both_response() {
    let mut relay = Relay::start().await;
    let end = relay.grow(1_000);
    let mut client = relay.client().await;
    client.start_streaming("START_REPLICATION 5/0 TIMELINE 1").await;
    let answer = client.answer().await;
    assert_eq!(answer.sqlstate(), "XX000");
    let text =
        format!("requested starting point 5/0 is ahead of the WAL flush position of this server {end}");
    assert_eq!(answer.message(), text);
    // What a client still sends of the copy it believes in is ignored.
    client.reply(None, None, true).await;
    client.send(&Message::CopyDone).await;
    assert!(client.query("IDENTIFY_SYSTEM").await.error.is_none());
}

#[tokio::test]
async fn removed_wal_is_an_error_behind_copy_both_response() {
    let mut relay = Relay::start().await;
    relay.grow(1_000);
    let mut client = relay.client().await;
    for start in ["0/0", "0/28"] {
        client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
        let answer = client.answer().await;
        assert_eq!(answer.sqlstate(), "58P01", "{start}");
        let text = "requested WAL segment 000000010000000000000000 has already been removed";
        assert_eq!(answer.message(), text);
    }
    assert!(client.query("IDENTIFY_SYSTEM").await.error.is_none());
}

#[tokio::test]
async fn wal_that_the_upstream_has_removed_is_told_to_who_waits_for_it_until_more_comes() {
    let mut relay = Relay::start().await;
    let (start, held) = (relay.start_lsn(), relay.grow(1_000));
    let mut waiting = relay.client().await;
    waiting.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    waiting.receive_wal(start, held).await;
    let removed = RemovedWal { timeline: TimelineId::FIRST, from: held, to: held.advance(64 << 20) };
    let another = RemovedWal { timeline: TimelineId::new(2).unwrap(), ..removed };
    relay.removed.send_replace(Some(another));
    waiting.reply(Some(held), None, true).await;
    assert!(matches!(waiting.streamed().await, PrimaryMessage::Keepalive(_)), "another timeline's");
    relay.removed.send_replace(Some(removed));
    let mut asking = relay.client().await;
    asking.start_streaming(&format!("START_REPLICATION {} TIMELINE 1", held.advance(9 << 20))).await;
    for (client, segment) in [(&mut waiting, 1), (&mut asking, 10)] {
        let answer = client.answer().await;
        assert_eq!(answer.sqlstate(), "58P01");
        let text = format!("requested WAL segment 0000000100000000{segment:08X} has already been removed");
        assert_eq!(answer.message(), text);
    }
    let end = relay.grow(1_000);
    eventually("it to be served", || relay.store.positions().unwrap().verified >= end).await;
    waiting.start_streaming(&format!("START_REPLICATION {held} TIMELINE 1")).await;
    waiting.receive_wal(held, end).await;
    waiting.reply(Some(end), None, true).await;
    assert!(matches!(waiting.streamed().await, PrimaryMessage::Keepalive(_)));
}

#[tokio::test]
async fn up_to_14_a_client_must_identify_the_system_first() {
    let mut relay = Relay::start_with(Options { version: ("14.23", 140_023), ..Options::default() }).await;
    relay.grow(1_000);
    let start = relay.start_lsn();
    let mut client = relay.client().await;
    let answer = client.query(&format!("START_REPLICATION {start}")).await;
    let text = "IDENTIFY_SYSTEM has not been run before START_REPLICATION";
    assert_eq!((answer.sqlstate(), answer.message()), ("55000", text));
    client.query("IDENTIFY_SYSTEM").await;
    client.start_streaming(&format!("START_REPLICATION {start}")).await;
}

async fn relay_on_timeline_2() -> (Relay, Lsn) {
    let timeline = TimelineId::new(2).unwrap();
    let mut relay = Relay::start_with(Options { timeline, ..Options::default() }).await;
    let switch_lsn = relay.start_lsn().advance(4_096);
    let history = format!("1\t{switch_lsn}\tno recovery target specified\n");
    relay.store.store_history(timeline, history.as_bytes()).unwrap();
    relay.grow(100_000);
    (relay, switch_lsn)
}

#[tokio::test]
async fn timelines_outside_the_history_are_refused() {
    let (relay, switch_lsn) = relay_on_timeline_2().await;
    let start = relay.start_lsn();
    let mut client = relay.client().await;
    let answer = client.query(&format!("START_REPLICATION {start} TIMELINE 7")).await;
    let text = "requested timeline 7 is not in this server's history";
    assert_eq!((answer.sqlstate(), answer.message()), ("XX000", text));
    let beyond = switch_lsn.advance(8);
    let answer = client.query(&format!("START_REPLICATION {beyond} TIMELINE 1")).await;
    let text = format!("requested starting point {beyond} on timeline 1 is not in this server's history");
    assert_eq!((answer.sqlstate(), answer.message()), ("XX000", text.as_str()));
    let detail = format!("This server's history forked from timeline 1 at {switch_lsn}.");
    assert_eq!(answer.error.unwrap().detail, Some(detail));
}

#[tokio::test]
async fn a_request_at_the_end_of_an_old_timeline_needs_no_copy() {
    let (relay, switch_lsn) = relay_on_timeline_2().await;
    let mut client = relay.client().await;
    let answer = client.query(&format!("START_REPLICATION {switch_lsn} TIMELINE 1")).await;
    assert_eq!(answer.columns, [("next_tli".to_owned(), 20), ("next_tli_startpos".to_owned(), 25)]);
    assert_eq!((answer.value(0), answer.value(1)), (Some("2"), Some(switch_lsn.to_string().as_str())));
    assert_eq!(answer.tags, ["START_STREAMING", "START_REPLICATION"]);
}

#[tokio::test]
async fn a_stream_ends_when_its_timeline_is_left() {
    let mut relay = Relay::start().await;
    let (start, end) = (relay.start_lsn(), relay.grow(10_000));
    let mut client = relay.client().await;
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    client.receive_wal(start, end).await;
    let timeline = TimelineId::new(2).unwrap();
    let history = format!("1\t{end}\tno recovery target specified\n");
    relay.store.store_history(timeline, history.as_bytes()).unwrap();
    relay.positions.send_modify(|positions| {
        let before = positions.unwrap();
        *positions = Some(Positions { timeline, ..before });
    });
    assert_eq!(client.receive().await, Some(backend::Message::CopyDone));
    client.reply(Some(end), Some(end), false).await;
    client.send(&Message::CopyDone).await;
    let answer = client.answer().await;
    assert_eq!((answer.value(0), answer.value(1)), (Some("2"), Some(end.to_string().as_str())));
    assert_eq!(answer.tags, ["START_STREAMING", "START_REPLICATION"]);
}

#[tokio::test]
async fn a_relay_that_stops_ends_streams_as_a_primary_does() {
    let mut relay = Relay::start().await;
    let (start, end) = (relay.start_lsn(), relay.grow(1_000));
    let (mut standby, mut mute) = (relay.client().await, relay.client().await);
    for client in [&mut standby, &mut mute] {
        client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
        client.receive_wal(start, end).await;
    }
    let begun = std::time::Instant::now();
    relay.shutdown.cancel();
    for client in [&mut standby, &mut mute] {
        let PrimaryMessage::Keepalive(keepalive) = client.streamed().await else { panic!() };
        assert!(keepalive.reply_requested);
    }
    standby.reply(Some(end), Some(end), false).await;
    assert_eq!(standby.receive().await, Some(backend::Message::CommandComplete("COPY 0".to_owned())));
    assert_eq!(standby.receive().await, None, "closed, without CopyDone");
    assert!(begun.elapsed() < Duration::from_millis(900), "a standby that has everything does not wait");
    assert_eq!(mute.receive().await, Some(backend::Message::CommandComplete("COPY 0".to_owned())));
    assert_eq!(mute.receive().await, None);
    relay.served.await.unwrap();
}

#[tokio::test]
async fn a_silent_standby_is_asked_once_and_dropped_without_a_word() {
    let timeout = Duration::from_millis(600);
    let settings =
        walrelay::downstream::DownstreamSettings { wal_sender_timeout: Some(timeout), ..settings() };
    let mut relay = Relay::start_with(Options { settings, ..Options::default() }).await;
    let (start, end) = (relay.start_lsn(), relay.grow(1_000));
    let mut client = relay.client().await;
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    client.receive_wal(start, end).await;
    let begun = std::time::Instant::now();
    let PrimaryMessage::Keepalive(keepalive) = client.streamed().await else { panic!() };
    assert!(keepalive.reply_requested);
    assert!(begun.elapsed() >= timeout / 4, "too early");
    assert_eq!(client.receive().await, None, "closed without an error");
    assert!(begun.elapsed() >= timeout * 3 / 4, "too early");
    eventually("the session is gone", || relay.registry.is_empty()).await;
}

#[tokio::test]
async fn what_does_not_belong_into_a_stream_ends_it() {
    let mut relay = Relay::start().await;
    relay.grow(1_000);
    let start = relay.start_lsn();
    let streaming = async || {
        let mut client = relay.client().await;
        client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
        client.streamed().await;
        client
    };
    let mut client = streaming().await;
    client.send(&Message::Query("IDENTIFY_SYSTEM".into())).await;
    let error = client.refusal().await;
    assert_eq!(error.message, "invalid standby message type \"Q\"");
    assert_eq!(error.sqlstate.unwrap().as_str(), "08P01");

    let mut client = streaming().await;
    client.send(&Message::CopyData(b"z".as_slice().into())).await;
    assert_eq!(client.receive().await, None, "an unknown payload: closed without a word");

    let mut client = streaming().await;
    client.send(&Message::CopyData(b"r\0\0".as_slice().into())).await;
    assert_eq!(client.answer().await.sqlstate(), "08P01", "a truncated reply: the session goes on");

    let mut client = streaming().await;
    client.send(&Message::Terminate).await;
    assert_eq!(client.receive().await, None);
    eventually("all are gone but one", || relay.registry.len() <= 1).await;
}

#[tokio::test]
async fn only_the_right_key_cancels_a_stream() {
    let mut relay = Relay::start().await;
    relay.grow(1_000);
    let start = relay.start_lsn();
    let mut client = relay.stranger().await;
    let welcome = client.log_in(&startup()).await;
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    client.streamed().await;
    let wrong = walrelay::protocol::frontend::CancelKey::new(vec![0; 4]).unwrap();
    for key in [wrong, welcome.key] {
        let mut canceler = relay.stranger().await;
        canceler.send_packet(&FirstPacket::Cancel(CancelRequest { process_id: welcome.pid, key })).await;
        assert_eq!(canceler.receive().await, None, "never answered");
    }
    let answer = client.answer().await;
    assert_eq!((answer.sqlstate(), answer.message()), ("57014", "canceling statement due to user request"));
    assert!(client.query("IDENTIFY_SYSTEM").await.error.is_none());
}
