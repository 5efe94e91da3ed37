//! What links cost: how often WAL is encoded for how many of them, and what a link that waits takes for the reason.

use std::sync::Arc;
use std::time::Duration;

use walrelay::{
    config,
    downstream::{DownstreamSettings, SendPolicies, SendPolicy},
    protocol::link::{Encoding, FrameKind},
};

use crate::disk::{HookedDisk, Hooks};
use crate::link::Link;
use crate::support::{Options, Relay, eventually, settings};

const SHARED_FRAMES: &str = "walrelay_link_shared_frames_total";
const COMPRESSED_FRAMES: &str = "walrelay_link_compressed_frames_total";
const SENT_BULK_FRAMES: &str = "walrelay_link_sent_bulk_frames_total";
const ENCODED_WAL: &str = "walrelay_link_encoded_wal_bytes_total";
const ENCODED_FRAMES: &str = "walrelay_link_encoded_stream_frames_total";
const JOIN_EPOCHS: &str = "walrelay_link_join_epochs_total";

/// Each megabyte that is read takes its time.
struct SlowReads;

impl Hooks for SlowReads {
    fn before_copy(&self) {
        std::thread::sleep(Duration::from_millis(250));
    }
}

#[tokio::test]
async fn a_slow_disk_is_not_taken_for_a_slow_codec() {
    let links = config::Links { adapt: true, ..Options::default().links };
    let disk = Arc::new(HookedDisk(Arc::new(SlowReads)));
    let mut relay =
        Relay::start_with(Options { links, disk, tail_bytes_max: 1 << 20, ..Options::default() }).await;
    let start = relay.start_lsn();
    let mut end = start;
    for _ in 0..12 {
        end = relay.grow_alike(1 << 20);
        let store = relay.store.clone();
        eventually("it to be in files", || store.positions().unwrap().flushed == end).await;
    }
    let mut link = Link::start(&relay, start).await;
    link.receive_to(end).await;
    link.assert_true_to(&relay);
    assert!(link.frames.iter().all(|(_, encoding)| *encoding == Encoding::Zstd), "{:?}", link.frames);
    let sending = ["zstd", "lz4", "uncompressed"].map(|by| relay.metric(&format!("walrelay_link_{by}")));
    assert_eq!(sending, [1.0, 0.0, 0.0]);
}

#[tokio::test]
async fn live_wal_is_encoded_once_by_each_codec_whatever_each_link_may_have_when() {
    let by_name = [("careful", SendPolicy::Flushed), ("cautious", SendPolicy::Flushed)];
    let by_name = by_name.map(|(name, policy)| (name.to_owned(), policy)).into();
    let send = SendPolicies { default: SendPolicy::Received, by_name };
    let settings = DownstreamSettings { send, ..settings() };
    let mut relay = Relay::start_with(Options { settings, ..Options::default() }).await;
    let start = relay.grow_alike(10_000);
    let mut links = Vec::new();
    for (name, offer) in [
        ("hasty", "1;zstd"),
        ("careful", "1;zstd"),
        ("quick", "1;zstd"),
        ("cautious", "1;zstd"),
        ("hasty", "1;lz4"),
        ("careful", "1;lz4"),
    ] {
        links.push(Link::start_as(&relay, name, start, offer).await);
    }
    // As much WAL as lets each of them join the stream of its codec.
    for _ in 0..80 {
        let end = relay.grow_alike(10_000);
        for link in &mut links {
            link.receive_to(end).await;
        }
    }
    let (encoded, frames) = (relay.metric(ENCODED_WAL), relay.metric(ENCODED_FRAMES));
    let before: Vec<usize> = links.iter().map(Link::stream_frames).collect();
    let (from, mut end) = (relay.wal.end(), relay.wal.end());
    for _ in 0..50 {
        end = relay.grow_alike(2_000);
        for link in &mut links {
            link.receive_to(end).await;
        }
    }
    for (link, before) in links.iter().zip(before) {
        link.assert_true_to(&relay);
        assert_eq!(link.stream_frames() - before, 50, "it does not follow the stream");
    }
    // Two codecs, and not two for each policy.
    assert_eq!(relay.metric(ENCODED_FRAMES) - frames, 2.0 * 50.0);
    assert_eq!(relay.metric(ENCODED_WAL) - encoded, 2.0 * end.bytes_since(from) as f64);
}

#[tokio::test]
async fn only_what_was_compressed_for_another_link_counts_as_shared() {
    let mut relay = Relay::start().await;
    let start = relay.start_lsn();
    let end = relay.grow_alike(3_000_000);
    let mut first = Link::start_as(&relay, "first", start, "1;zstd").await;
    first.receive_to(end).await;
    let bulk = first.frames.iter().filter(|(kind, _)| *kind == FrameKind::Standalone).count() as f64;
    let numbers = |relay: &Relay| {
        [SENT_BULK_FRAMES, COMPRESSED_FRAMES, SHARED_FRAMES, JOIN_EPOCHS].map(|name| relay.metric(name))
    };
    assert_eq!(numbers(&relay), [bulk, bulk, 0.0, 0.0], "one link shares with nobody");
    let mut second = Link::start_as(&relay, "second", start, "1;zstd").await;
    second.receive_to(end).await;
    assert_eq!(numbers(&relay), [2.0 * bulk, bulk, bulk, 0.0]);
    // A third joins the stream that the others follow, once that is long enough.
    let mut end = relay.grow_alike(10_000);
    for link in [&mut first, &mut second] {
        link.receive_to(end).await;
    }
    let mut third = Link::start_as(&relay, "third", end, "1;zstd").await;
    for _ in 0..40 {
        end = relay.grow_alike(10_000);
        for link in [&mut first, &mut second, &mut third] {
            link.receive_to(end).await;
        }
    }
    assert!(matches!(third.frames.last(), Some((FrameKind::Stream { .. }, _))), "it has not joined");
    assert_eq!(relay.metric(JOIN_EPOCHS), 1.0);
}
