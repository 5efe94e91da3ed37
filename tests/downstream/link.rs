//! Compressed links as a relay behind meets them: what is granted, what comes, what several links share, and how fast it comes.
//!
//! What comes is read by the receiving side of the protocol, which the relay uses itself, and compared with the WAL that was
//! built.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use walrelay::{
    config,
    downstream::{DownstreamSettings, LinkRates, SendPolicies, SendPolicy},
    protocol::{
        backend,
        frontend::{FirstPacket, Message, Startup},
        link::{
            Arrival, Codec, Compression, Encoding, FrameKind, Inbound, Offer,
            inbound::Held,
            offer::{ANSWER_PARAMETER, OFFER_PARAMETER},
        },
        replication::PrimaryMessage,
    },
    wal::{HistoryHash, Lsn, TimelineHistory, TimelineId},
};

use crate::disk::HookedDisk;
use crate::policies::Gate;
use crate::support::{Client, Options, Relay, eventually, settings, startup, startup_as};

/// A relay behind, as far as its link goes.
pub(crate) struct Link {
    client: Client,
    inbound: Inbound,
    start: Lsn,
    wal: Vec<u8>,
    /// Where messages of WAL ended.
    ends: Vec<Lsn>,
    pub(crate) frames: Vec<(FrameKind, Encoding)>,
    plain: usize,
    has_greeted: bool,
}

fn offering(startup: Startup, offer: &str) -> Startup {
    let mut startup = startup;
    startup.parameters.push((OFFER_PARAMETER.to_owned(), offer.to_owned()));
    startup
}

fn held(relay: &Relay) -> Held {
    let history = Some(HistoryHash::of(&TimelineHistory::of_first()));
    Held { system_id: relay.store.identity().unwrap().system_id, timeline: TimelineId::FIRST, history }
}

impl Link {
    pub(crate) async fn start(relay: &Relay, start: Lsn) -> Self {
        Self::start_as(relay, "dc2_a", start, "1;zstd,lz4").await
    }

    pub(crate) async fn start_as(relay: &Relay, name: &str, start: Lsn, offer: &str) -> Self {
        let mut client = relay.stranger().await;
        let welcome = client.log_in(&offering(startup_as(name), offer)).await;
        assert!(welcome.parameters.iter().any(|(name, _)| name == ANSWER_PARAMETER), "no link is granted");
        client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
        let inbound = Inbound::new(held(relay), Offer::parse(offer).unwrap(), start);
        let (wal, ends, frames) = (Vec::new(), Vec::new(), Vec::new());
        Self { client, inbound, start, wal, ends, frames, plain: 0, has_greeted: false }
    }

    fn end(&self) -> Lsn {
        self.start.advance(self.wal.len() as u64)
    }

    /// Takes one message.
    async fn take(&mut self) {
        let body = match self.client.receive().await.expect("closed") {
            backend::Message::CopyData(body) => body,
            other => panic!("{other:?}"),
        };
        if body.first() == Some(&b'z') {
            return self.take_link(body);
        }
        if let PrimaryMessage::WalData(header, bytes) = PrimaryMessage::decode(body).unwrap() {
            self.inbound.note_plain(header.start, bytes.len() as u64).unwrap();
            self.wal.extend_from_slice(&bytes);
            self.plain += 1;
            self.ends.push(self.end());
        }
    }

    fn take_link(&mut self, body: Bytes) {
        let frame = match self.inbound.take(body).unwrap() {
            Arrival::Hello(_) => {
                self.has_greeted = true;
                return;
            }
            Arrival::Frame(frame) => frame,
        };
        let header = *frame.header();
        let at = self.wal.len();
        self.wal.resize(at + header.wal_bytes(), 0);
        self.inbound.expand(&frame, &mut self.wal[at..]).unwrap();
        assert!(header.wal_end >= Some(header.range.end()));
        self.frames.push((header.kind, header.encoding));
        self.ends.push(self.end());
    }

    pub(crate) async fn receive_to(&mut self, end: Lsn) {
        while self.end() < end {
            self.take().await;
        }
        assert_eq!(self.end(), end);
    }

    /// Whether all is as it was written, and no message ended where a standby may be wedged.
    pub(crate) fn assert_true_to(&self, relay: &Relay) {
        assert!(self.has_greeted);
        assert!(self.wal == relay.wal.slice(self.start, self.end()), "other bytes than were written");
        let safe = relay.wal.record_ends();
        for end in &self.ends {
            assert!(end.page_offset() == 0 || safe.contains(end), "{end} may wedge a standby");
        }
    }

    pub(crate) fn stream_frames(&self) -> usize {
        self.frames.iter().filter(|(kind, _)| *kind != FrameKind::Standalone).count()
    }

    fn epochs(&self) -> usize {
        let is_first = |kind: &FrameKind| matches!(kind, FrameKind::Stream { sequence: 0, .. });
        self.frames.iter().filter(|(kind, _)| is_first(kind)).count()
    }
}

#[tokio::test]
async fn what_a_link_carries_is_byte_for_byte_and_ends_its_messages_safely() {
    for (offer, codec) in [("1;zstd,lz4", Encoding::Zstd), ("1;lz4", Encoding::Lz4)] {
        let mut relay = Relay::start().await;
        let start = relay.start_lsn();
        let end = relay.grow_alike(3_000_000);
        let mut link = Link::start_as(&relay, "dc2_a", start, offer).await;
        link.receive_to(end).await;
        for _ in 0..50 {
            let next = relay.grow_alike(2_000);
            link.receive_to(next).await;
        }
        link.assert_true_to(&relay);
        let bulk = link.frames.len() - link.stream_frames();
        assert!((12..=14).contains(&bulk) && link.stream_frames() == 50, "{:?}", link.frames);
        assert!(link.frames.iter().all(|(_, encoding)| *encoding == codec), "{:?}", link.frames);
        assert_eq!((link.epochs(), link.plain), (1, 0));
        let (wal, wire) = (
            relay.metric("walrelay_link_sent_wal_bytes_total"),
            relay.metric("walrelay_link_sent_wire_bytes_total"),
        );
        assert!(wal == link.wal.len() as f64 && wire * 3.0 < wal, "{wal} {wire}");
        let status = relay.registry.statuses().remove(0).link.unwrap();
        assert_eq!((status.wal_bytes as f64, status.wire_bytes as f64), (wal, wire));
        assert_eq!(status.encoding, codec.as_str());
    }
}

#[tokio::test]
async fn wal_that_does_not_shrink_is_not_compressed_and_that_which_does_is_again() {
    let mut relay = Relay::start().await;
    let start = relay.start_lsn();
    let noise_end = relay.grow_random(6 << 20);
    let end = relay.grow_alike(20 << 20);
    let mut link = Link::start(&relay, start).await;
    while link.end() < noise_end {
        link.take().await;
    }
    assert!(link.frames.iter().all(|(_, encoding)| *encoding == Encoding::Plain), "{:?}", link.frames);
    assert!(link.plain > 20 && link.frames.len() < 8, "{} {:?}", link.plain, link.frames);
    link.receive_to(end).await;
    link.assert_true_to(&relay);
    assert!(link.frames.iter().filter(|(_, encoding)| *encoding == Encoding::Zstd).count() > 40);
}

#[tokio::test]
async fn an_offer_that_cannot_be_accepted_is_declined_by_the_protocols_rule_and_the_stream_is_plain() {
    let mut relay = Relay::start().await;
    let (start, end) = (relay.start_lsn(), relay.grow(100_000));
    for offer in ["2;zstd", "1;brotli", "1;zstd;dictionary!", "", "nonsense"] {
        let mut client = relay.stranger().await;
        client.send_packet(&FirstPacket::Startup(offering(startup(), offer))).await;
        match client.receive().await {
            Some(backend::Message::NegotiateProtocolVersion(answer)) => {
                assert_eq!(answer.unrecognized, [OFFER_PARAMETER], "{offer}");
            }
            other => panic!("{offer}: {other:?}"),
        }
        let welcome = client.welcome().await;
        assert!(welcome.parameters.iter().all(|(name, _)| name != ANSWER_PARAMETER), "{offer}");
        client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
        let (wal, _) = client.receive_wal(start, end).await;
        assert!(wal == relay.wal.bytes());
    }
}

#[tokio::test]
async fn links_can_be_turned_off_and_are_for_physical_replication_alone() {
    let off = config::Links { compressions: Vec::new(), ..Options::default().links };
    let relay = Relay::start_with(Options { links: off, ..Options::default() }).await;
    let other = Relay::start().await;
    let mut database = startup();
    database.parameters.retain(|(name, _)| name != "replication");
    database.parameters.push(("replication".to_owned(), "database".to_owned()));
    for (relay, startup) in [(&relay, startup()), (&other, database)] {
        let mut client = relay.stranger().await;
        client.send_packet(&FirstPacket::Startup(offering(startup, "1;zstd"))).await;
        let answer = client.receive().await;
        assert!(matches!(answer, Some(backend::Message::NegotiateProtocolVersion(_))), "{answer:?}");
        let welcome = client.welcome().await;
        assert!(welcome.parameters.iter().all(|(name, _)| name != ANSWER_PARAMETER));
    }
    // Who asks for nothing is told nothing.
    let mut client = other.stranger().await;
    let welcome = client.log_in(&startup()).await;
    assert!(welcome.parameters.iter().all(|(name, _)| name != ANSWER_PARAMETER));
}

#[tokio::test]
async fn links_that_catch_up_together_share_what_was_compressed() {
    let mut relay = Relay::start().await;
    let start = relay.start_lsn();
    let end = relay.grow_alike(8 << 20);
    let mut links = Vec::new();
    for number in 0..8 {
        links.push(Link::start_as(&relay, &format!("dc{number}"), start, "1;zstd").await);
    }
    let mut receiving = tokio::task::JoinSet::new();
    for mut link in links {
        receiving.spawn(async move {
            link.receive_to(end).await;
            link
        });
    }
    while let Some(link) = receiving.join_next().await {
        link.unwrap().assert_true_to(&relay);
    }
    let compressed = relay.metric("walrelay_link_compressed_frames_total");
    let sent = relay.metric("walrelay_link_sent_bulk_frames_total");
    assert!(sent >= 8.0 * 32.0, "{sent}");
    assert!(compressed <= 35.0, "{compressed} frames were compressed where 33 are enough");
}

#[tokio::test]
async fn live_links_share_one_stream_and_one_that_joins_does_not_break_it() {
    let mut relay = Relay::start().await;
    let start = relay.start_lsn();
    let mut end = relay.grow_alike(10_000);
    let mut links = Vec::new();
    for number in 0..5 {
        let mut link = Link::start_as(&relay, &format!("dc{number}"), start, "1;zstd").await;
        link.receive_to(end).await;
        links.push(link);
        for _ in 0..20 {
            end = relay.grow_alike(1_000);
            for link in &mut links {
                link.receive_to(end).await;
            }
        }
    }
    for link in &links {
        link.assert_true_to(&relay);
    }
    // The first one follows from the beginning, and a link that joins is not worth an epoch so soon.
    assert_eq!((links[0].stream_frames(), links[0].epochs()), (100, 1));
    assert_eq!(relay.metric("walrelay_link_epochs_total"), 1.0);
    assert!(relay.metric("walrelay_link_sent_stream_frames_total") >= 100.0);
    // With as much WAL as an epoch has at least, all share the stream.
    for _ in 0..60 {
        end = relay.grow_alike(10_000);
        for link in &mut links {
            link.receive_to(end).await;
        }
    }
    for link in &links {
        link.assert_true_to(&relay);
        assert!(matches!(link.frames.last(), Some((FrameKind::Stream { .. }, Encoding::Zstd))));
    }
    assert_eq!(links[4].epochs(), links[1].epochs());
}

#[tokio::test]
async fn a_link_that_takes_nothing_for_long_catches_up_by_frames_that_stand_alone() {
    let mut relay = Relay::start_with(Options { tail_bytes_max: 1 << 20, ..Options::default() }).await;
    let start = relay.start_lsn();
    let mut end = relay.grow_alike(10_000);
    let (mut fast, mut slow) = (Link::start(&relay, start).await, Link::start(&relay, start).await);
    for link in [&mut fast, &mut slow] {
        link.receive_to(end).await;
    }
    // Far more than any buffer on the way and the shared stream hold, even compressed.
    for _ in 0..400 {
        end = relay.grow_alike(100_000);
        fast.receive_to(end).await;
    }
    slow.receive_to(end).await;
    end = relay.grow_alike(5_000);
    for link in [&mut fast, &mut slow] {
        link.receive_to(end).await;
        link.assert_true_to(&relay);
    }
    assert!(fast.stream_frames() >= 400);
}

#[tokio::test]
async fn a_link_ends_a_timeline_that_was_left_and_goes_on_with_commands() {
    let mut relay = Relay::start().await;
    let start = relay.start_lsn();
    let fork = relay.grow_alike(400_000);
    let mut link = Link::start(&relay, start).await;
    link.receive_to(fork).await;
    let next = TimelineId::new(2).unwrap();
    let history = format!("1\t{fork}\tno recovery target specified\n");
    relay.store.store_history(next, history.as_bytes()).unwrap();
    relay.switch(next, fork);
    loop {
        match link.client.receive().await.unwrap() {
            backend::Message::CopyDone => break,
            backend::Message::CopyData(body) => assert_ne!(body.first(), Some(&b'z')),
            other => panic!("{other:?}"),
        }
    }
    link.client.send(&Message::CopyDone).await;
    let answer = link.client.answer().await;
    assert_eq!(answer.rows, [[Some("2".to_owned()), Some(fork.to_string())]]);
    link.assert_true_to(&relay);
    // The same connection, on the historic timeline, from its middle.
    let middle = start.advance(8192);
    link.client.start_streaming(&format!("START_REPLICATION {middle} TIMELINE 1")).await;
    let mut again = Link {
        inbound: Inbound::new(held(&relay), Offer::parse("1;zstd,lz4").unwrap(), middle),
        start: middle,
        wal: Vec::new(),
        ends: Vec::new(),
        frames: Vec::new(),
        has_greeted: false,
        ..link
    };
    again.receive_to(fork).await;
    again.assert_true_to(&relay);
    assert_eq!(again.stream_frames(), 0);
}

#[tokio::test]
async fn a_link_that_may_have_durable_wal_only_gets_no_more() {
    let gate = Arc::new(Gate::default());
    let by_name = [("hasty".to_owned(), SendPolicy::Received)].into();
    let send = SendPolicies { default: SendPolicy::Flushed, by_name };
    let settings = DownstreamSettings { send, ..settings() };
    let disk = Arc::new(HookedDisk(gate.clone()));
    let mut relay = Relay::start_with(Options { settings, disk, ..Options::default() }).await;
    let (start, durable) = (relay.start_lsn(), relay.grow_alike(50_000));
    let store = relay.store.clone();
    eventually("the first to be durable", || store.positions().unwrap().flushed == durable).await;
    let mut careful = Link::start(&relay, start).await;
    let mut hasty = Link::start_as(&relay, "hasty", start, "1;zstd").await;
    for link in [&mut careful, &mut hasty] {
        link.receive_to(durable).await;
    }
    let closed = gate.close();
    let verified = relay.grow_alike(50_000);
    hasty.receive_to(verified).await;
    for _ in 0..3 {
        // Whatever there was to send comes before the answer.
        careful.client.reply(Some(durable), Some(durable), true).await;
        careful.take().await;
        assert_eq!(careful.end(), durable, "more than is durable");
    }
    drop(closed);
    careful.receive_to(verified).await;
    for link in [&careful, &hasty] {
        link.assert_true_to(&relay);
    }
}

#[tokio::test]
async fn a_rate_is_kept_and_can_be_changed_while_it_runs() {
    const RATE: u64 = 1 << 20;
    let rate = NonZeroU64::new(RATE);
    let limited = config::Links { link_rate_max: rate, ..Options::default().links };
    let mut relay = Relay::start_with(Options { links: limited, ..Options::default() }).await;
    let start = relay.start_lsn();
    let end = relay.grow_random(6 << 20);
    let mut link = Link::start(&relay, start).await;
    let began = Instant::now();
    let middle = start.advance(2 << 20);
    while link.end() < middle {
        link.take().await;
    }
    let took = began.elapsed();
    // What may be sent at once, and the message that ends the wait.
    let least = ((2 << 20) as f64 - (RATE as f64 * 0.1) - (264 << 10) as f64) / RATE as f64;
    assert!(took.as_secs_f64() >= least && took < Duration::from_secs(8), "{took:?}, at least {least}");
    relay.links.change_rates(|rates| *rates = LinkRates { link_rate_max: None, links_rate_max: None });
    let changed = Instant::now();
    link.receive_to(end).await;
    assert!(changed.elapsed() < Duration::from_secs(3), "{:?}", changed.elapsed());
    link.assert_true_to(&relay);
    assert!(relay.metric("walrelay_link_paced_microseconds_total") > 500_000.0);
}

/// CPU time of this thread, on which everything of such a test runs.
#[allow(clippy::disallowed_methods, reason = "no file of the store's")]
fn cpu_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
}

#[tokio::test]
async fn a_link_that_has_to_wait_and_takes_nothing_costs_no_time() {
    let limited = config::Links { link_rate_max: NonZeroU64::new(450 << 10), ..Options::default().links };
    let mut relay = Relay::start_with(Options { links: limited, ..Options::default() }).await;
    let start = relay.start_lsn();
    relay.grow_random(12 << 20);
    let mut client = relay.narrow_stranger().await;
    client.log_in(&offering(startup(), "1;zstd")).await;
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    // Longer than buffers, what is copied out of the store's memory, and every wait for the rate last.
    for second in 0..10 {
        let before = cpu_time();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let cost = cpu_time() - before;
        assert!(cost < Duration::from_millis(400), "{cost:?} in second {second}");
    }
}

#[tokio::test]
async fn live_wal_of_one_link_does_not_wait_for_the_backlog_of_another() {
    let rates = config::Links { links_rate_max: NonZeroU64::new(450 << 10), ..Options::default().links };
    let mut relay = Relay::start_with(Options { links: rates, ..Options::default() }).await;
    let start = relay.start_lsn();
    let mut end = relay.grow_random(3 << 20);
    let mut live = Link::start(&relay, end).await;
    let mut behind = Link::start_as(&relay, "behind", start, "1;zstd").await;
    while behind.wal.len() < 300_000 {
        behind.take().await;
    }
    let began = Instant::now();
    for _ in 0..20 {
        end = relay.grow(700);
        live.receive_to(end).await;
    }
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    relay.links.change_rates(|rates| *rates = LinkRates { link_rate_max: None, links_rate_max: None });
    behind.receive_to(end).await;
    behind.assert_true_to(&relay);
    live.assert_true_to(&relay);
}

#[tokio::test]
async fn a_link_whose_network_is_faster_than_its_codec_compresses_less() {
    let links = config::Links {
        compressions: vec![Compression::Zstd { level: 19 }, Compression::Lz4],
        adapt: true,
        ..Options::default().links
    };
    let mut relay = Relay::start_with(Options { links, ..Options::default() }).await;
    let start = relay.start_lsn();
    let end = relay.grow_alike(24 << 20);
    let mut link = Link::start(&relay, start).await;
    link.receive_to(end).await;
    link.assert_true_to(&relay);
    let first = link.frames.first().unwrap().1;
    let last = link.frames.last().unwrap().1;
    assert_eq!(first, Encoding::Zstd);
    assert!(last == Encoding::Lz4 || link.plain > 0, "{:?}", link.frames);
    let offer = Offer::of(&[Codec::Zstd, Codec::Lz4]).unwrap().to_string();
    assert_eq!(offer, "1;zstd,lz4");
}
