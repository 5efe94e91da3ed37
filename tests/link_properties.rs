//! A compressed link carries any WAL, cut anywhere it may be, over any course of joining, leaving and slow links, and the bytes
//! that come out are those that went in.
//!
//! The production machines of both sides are driven without a socket: the ring that links share, the encoders, and the
//! receiving side. The model knows only the WAL and where messages may end.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "clippy exempts test functions, not their helpers"
)]

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use proptest::{collection::vec, prelude::*};
use walrelay::{
    protocol::{
        FRAME_HEADER_BYTES,
        link::{
            Arrival, BulkEncoder, Codec, Compression, Encoding, FrameHeader, FrameKind, Hello, Inbound,
            LinkError, Offer, Seed, StreamEncoder, WalChecksum, inbound::Held,
        },
    },
    session::link::{
        LIVE_LAG_MAX, Place, Ring, Step, bulk_end,
        ring::{Follower, JOIN_EPOCH_BYTES_MIN, JOIN_INTERVAL_MIN, RING_WAL_BYTES_MAX},
    },
    wal::{HistoryHash, Lsn, LsnRange, PgTimestamp, SystemId, TimelineHistory, TimelineId},
};

const START: u64 = 0x100_0000;

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

fn at(offset: usize) -> Lsn {
    Lsn::new(START + offset as u64).unwrap()
}

fn held() -> Held {
    let history = Some(HistoryHash::of(&TimelineHistory::of_first()));
    Held { system_id: SystemId(77), timeline: TimelineId::FIRST, history }
}

fn offer() -> Offer {
    Offer::of(&[Codec::Zstd, Codec::Lz4]).unwrap()
}

fn seed() -> Seed {
    Seed::new(held().system_id, held().history)
}

/// A receiving side that was greeted, with its stream at `start`.
fn inbound(start: Lsn) -> Inbound {
    let Held { system_id, timeline, history } = held();
    let mut out = BytesMut::new();
    Hello { system_id, timeline, history, encoding: Encoding::Zstd }.encode(&mut out);
    let mut inbound = Inbound::new(held(), offer(), start);
    inbound.take(out.freeze().slice(FRAME_HEADER_BYTES..)).unwrap();
    inbound
}

#[derive(Clone)]
struct Encoded {
    encoding: Encoding,
    payload: Bytes,
    checksum: WalChecksum,
}

fn message(kind: FrameKind, range: LsnRange, encoded: &Encoded) -> Bytes {
    let (timeline, sent_at) = (TimelineId::FIRST, PgTimestamp(5));
    // As a link does: what goes on with a stream is short.
    let before = (kind != FrameKind::Standalone).then_some(sent_at);
    let wal_end = Some(range.end());
    let header = FrameHeader { kind, encoding: encoded.encoding, timeline, range, wal_end, sent_at };
    let head = header.encode(&seed(), encoded.checksum, encoded.payload.len(), before);
    [&head.as_ref()[FRAME_HEADER_BYTES..], &encoded.payload].concat().into()
}

fn receive(inbound: &mut Inbound, body: Bytes) -> Result<Vec<u8>, LinkError> {
    let Arrival::Frame(frame) = inbound.take(body)? else { panic!("a second hello") };
    let mut wal = vec![0; frame.header().wal_bytes()];
    inbound.expand(&frame, &mut wal)?;
    Ok(wal)
}

/// Bytes as WAL has them: much that is alike, and some that is not.
fn wal(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len + 64);
    while out.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&(state >> 33).to_le_bytes());
        out.extend_from_slice(&b"a row of a table with some filling in it"[..(state >> 59) as usize + 8]);
        if state >> 60 == 0 {
            out.extend(std::iter::repeat_n(0, 200));
        }
    }
    out.truncate(len);
    out
}

fn compression() -> impl Strategy<Value = Compression> {
    prop_oneof![
        4 => Just(Compression::Zstd { level: 1 }),
        1 => (-7_i8..=4).prop_map(|level| Compression::Zstd { level }),
        2 => Just(Compression::Lz4),
    ]
}

/// A sender of one stream, cut as it is told.
struct Outbound {
    bulk: BulkEncoder,
    stream: StreamEncoder,
}

impl Outbound {
    fn new(compression: Compression) -> Self {
        Self {
            bulk: BulkEncoder::new(compression).unwrap(),
            stream: StreamEncoder::new(compression).unwrap(),
        }
    }

    fn encode(&mut self, kind: FrameKind, wal: &[u8]) -> Encoded {
        let mut out = Vec::new();
        let encoding = match kind {
            FrameKind::Standalone => self.bulk.encode(wal, &mut out).unwrap(),
            FrameKind::Stream { sequence, .. } => {
                if sequence == 0 {
                    self.stream.restart().unwrap();
                }
                let (head, tail) = wal.split_at(wal.len() / 3);
                self.stream.encode([head, tail], &mut out).unwrap()
            }
        };
        Encoded { encoding, payload: out.into(), checksum: WalChecksum::of([wal]) }
    }
}

/// One message of a stream that was cut at random: standalone, of the stream that goes on, or of one that begins.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Bulk(usize),
    Stream(usize),
    NewEpoch(usize),
    Plain(usize),
}

fn cut() -> impl Strategy<Value = Cut> {
    let small = prop_oneof![3 => 1_usize..2_000, 1 => 1_usize..150_000];
    prop_oneof![
        1 => (1_usize..300_000).prop_map(Cut::Bulk),
        6 => small.clone().prop_map(Cut::Stream),
        1 => small.clone().prop_map(Cut::NewEpoch),
        1 => small.prop_map(Cut::Plain),
    ]
}

/// The messages of a stream, each with its WAL; `None` for plain ones.
fn stream(compression: Compression, cuts: &[Cut], wal: &[u8]) -> Vec<(usize, usize, Option<Bytes>)> {
    let (mut outbound, mut messages) = (Outbound::new(compression), Vec::new());
    let (mut done, mut epoch, mut sequence, mut goes_on) = (0, 0, 0, false);
    for cut in cuts {
        let (Cut::Bulk(len) | Cut::Stream(len) | Cut::NewEpoch(len) | Cut::Plain(len)) = *cut;
        let end = (done + len).min(wal.len());
        if end == done {
            break;
        }
        let kind = match cut {
            Cut::Plain(_) => {
                messages.push((done, end, None));
                (done, goes_on) = (end, false);
                continue;
            }
            Cut::Bulk(_) => FrameKind::Standalone,
            Cut::Stream(_) if goes_on => FrameKind::Stream { epoch, sequence: sequence + 1 },
            Cut::Stream(_) | Cut::NewEpoch(_) => FrameKind::Stream { epoch: epoch + 1, sequence: 0 },
        };
        goes_on = match kind {
            FrameKind::Standalone => false,
            FrameKind::Stream { epoch: now, sequence: number } => {
                (epoch, sequence) = (now, number);
                true
            }
        };
        let encoded = outbound.encode(kind, &wal[done..end]);
        let range = LsnRange::new(at(done), at(end)).unwrap();
        messages.push((done, end, Some(message(kind, range, &encoded))));
        done = end;
    }
    messages
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn wal_cut_anywhere_comes_out_as_it_went_in(
        compression in compression(),
        cuts in vec(cut(), 1..40),
        seed in any::<u64>(),
    ) {
        let wal = wal(1_500_000, seed);
        let mut inbound = inbound(at(0));
        for (start, end, body) in stream(compression, &cuts, &wal) {
            match body {
                None => inbound.note_plain(at(start), (end - start) as u64).unwrap(),
                Some(body) => prop_assert!(receive(&mut inbound, body).unwrap() == wal[start..end]),
            }
        }
    }

    /// Whatever bit is flipped in whatever message, or whichever is missing or comes twice: no wrong byte comes out.
    #[test]
    fn no_wrong_byte_comes_out_of_what_was_spoiled(
        compression in compression(),
        cuts in vec(cut(), 2..12),
        (which, bit, how) in (any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..4),
        seed in any::<u64>(),
    ) {
        let wal = wal(400_000, seed);
        let mut messages = stream(compression, &cuts, &wal);
        let spoiled = which.index(messages.len());
        match (how, &mut messages[spoiled].2) {
            (0, Some(body)) => {
                let mut bytes = body.to_vec();
                let bit = bit.index(bytes.len() * 8);
                bytes[bit / 8] ^= 1 << (bit % 8);
                *body = bytes.into();
            }
            (1, Some(body)) => body.truncate(bit.index(body.len())),
            (2, _) => drop(messages.remove(spoiled)),
            _ => {
                let again = messages[spoiled].clone();
                messages.insert(bit.index(messages.len()), again);
            }
        }
        let (mut inbound, mut out) = (inbound(at(0)), Vec::new());
        for (start, end, body) in messages {
            let taken = match body {
                None => inbound.note_plain(at(start), (end - start) as u64).map(|()| wal[start..end].to_vec()),
                Some(body) => receive(&mut inbound, body),
            };
            match taken {
                Ok(bytes) => out.extend(bytes),
                Err(_) => break,
            }
        }
        prop_assert!(wal.starts_with(&out), "{} bytes came out, and differ", out.len());
    }

    #[test]
    fn every_prefix_of_a_message_is_an_error(compression in compression(), len in 1_usize..5_000, seed in any::<u64>()) {
        let wal = wal(len, seed);
        for kind in [FrameKind::Standalone, FrameKind::Stream { epoch: 1, sequence: 0 }] {
            let encoded = Outbound::new(compression).encode(kind, &wal);
            let body = message(kind, LsnRange::new(at(0), at(len)).unwrap(), &encoded);
            for cut in 0..body.len() {
                prop_assert!(receive(&mut inbound(at(0)), body.slice(..cut)).is_err(), "{cut}");
            }
        }
    }
}

/// What the seeds of the fuzzer are for.
#[test]
#[allow(clippy::disallowed_methods, reason = "a test reads its own corpus")]
fn the_corpus_means_what_its_names_say() {
    let outcome = |name: &str| {
        let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/protocol/link");
        let bytes = std::fs::read(corpus.join(name)).unwrap();
        let held = Held { system_id: SystemId(1), timeline: TimelineId::FIRST, history: None };
        let mut inbound = Inbound::new(held, offer(), Lsn::MIN);
        if bytes[0] == 0 {
            let mut out = BytesMut::new();
            let (system_id, timeline) = (held.system_id, held.timeline);
            Hello { system_id, timeline, history: None, encoding: Encoding::Zstd }.encode(&mut out);
            inbound.take(out.freeze().slice(FRAME_HEADER_BYTES..)).unwrap();
        }
        let (mut rest, mut frames) = (&bytes[1..], 0);
        while let Some((len, after)) = rest.split_first_chunk::<2>() {
            let (body, after) = after.split_at(usize::from(u16::from_be_bytes(*len)));
            rest = after;
            match inbound.take(Bytes::copy_from_slice(body)) {
                Ok(Arrival::Hello(_)) => {}
                Ok(Arrival::Frame(frame)) => {
                    let mut wal = vec![0; frame.header().wal_bytes()];
                    if let Err(error) = inbound.expand(&frame, &mut wal) {
                        return Err(error.to_string());
                    }
                    frames += 1;
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(frames)
    };
    for (name, frames) in [
        ("standalone_frames", 3),
        ("a_stream_of_frames", 4),
        ("a_stream_of_short_frames", 3),
        ("greeted_by_itself", 1),
    ] {
        assert_eq!(outcome(name), Ok(frames), "{name}");
    }
    for (name, said) in [
        ("short_frame_at_first", "goes on with a stream that did not come before"),
        ("short_frame_behind_one_that_stands_alone", "goes on with a stream that did not come before"),
        ("short_frame_of_another_place", "frame of WAL at 0/9 has a wrong checksum"),
        ("short_frame_repeated", "frame of WAL at 0/11 has a wrong checksum"),
        ("short_frame_cut", "ends before its field"),
        ("no_hello", "before the link's hello"),
        ("second_hello", "came twice"),
        ("hello_of_another_cluster", "system identifier 2"),
        ("hello_of_another_timeline", "streams timeline 2"),
        ("hello_cut", "ends before its field"),
        ("wrong_checksum", "wrong checksum"),
        ("out_of_place", "begins at 0/A, expected 0/9"),
        ("repeated", "begins at 0/1, expected 0/9"),
        ("out_of_sequence", "number 2 of epoch 7"),
        ("bomb", "could not decompress"),
        ("bomb_in_a_stream", "more than the 8 bytes that it declares"),
        ("wide_window", "too much memory"),
        ("too_long", "invalid value 1048577"),
        ("empty", "\"length\" of link frame has invalid value 0"),
        ("unknown_encoding", "\"encoding\" of link frame has invalid value 9"),
        ("unknown_type", "invalid link message type 113"),
        ("end_of_positions", "expected 0/1"),
    ] {
        let outcome = outcome(name).unwrap_err();
        assert!(outcome.contains(said), "{name}: {outcome}");
    }
}

/// What happens in the life of links that share a stream.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// New WAL may be sent.
    Grow(usize),
    /// A link hears how much that is.
    Hear(usize),
    /// A link does what it can, up to so many messages.
    Send(usize, usize),
    /// A link receives what was sent, up to so many messages.
    Deliver(usize, usize),
    /// A link begins, with so much to catch up with.
    Join(usize),
    /// A link ends.
    Leave(usize),
    Pass(Duration),
    /// A frame cannot be made.
    Fail,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (1_usize..400).prop_map(|records| Event::Grow(records * 8)),
        1 => (1_usize..60_000).prop_map(|records| Event::Grow(records * 8)),
        8 => any::<usize>().prop_map(Event::Hear),
        12 => (any::<usize>(), 1_usize..6).prop_map(|(link, most)| Event::Send(link, most)),
        8 => (any::<usize>(), 1_usize..9).prop_map(|(link, most)| Event::Deliver(link, most)),
        1 => prop_oneof![0_usize..3_000, 0_usize..900_000].prop_map(Event::Join),
        1 => any::<usize>().prop_map(Event::Leave),
        1 => (1_u64..4_000).prop_map(|ms| Event::Pass(Duration::from_millis(ms))),
        1 => Just(Event::Fail),
    ]
}

struct SimulatedLink {
    start: usize,
    sent: usize,
    limit: usize,
    place: Option<Place>,
    under_way: VecDeque<Bytes>,
    inbound: Inbound,
    received: Vec<u8>,
}

struct World {
    wal: Vec<u8>,
    limit: usize,
    /// Where messages may end, beside page boundaries.
    safe_ends: BTreeSet<Lsn>,
    ring: Ring<Encoded>,
    outbound: Outbound,
    links: Vec<SimulatedLink>,
    begun: Instant,
    now: Instant,
    epochs: u32,
    encoded: u64,
    joined: u32,
    failures: u32,
}

impl World {
    fn new(compression: Compression, seed: u64) -> Self {
        let (limit, now) = (80_000, Instant::now());
        Self {
            wal: wal(6 << 20, seed),
            limit,
            safe_ends: [at(limit)].into(),
            ring: Ring::new(at(limit)),
            outbound: Outbound::new(compression),
            links: Vec::new(),
            begun: now,
            now,
            epochs: 0,
            encoded: 0,
            joined: 0,
            failures: 0,
        }
    }

    fn apply(&mut self, event: Event) {
        let count = self.links.len();
        match event {
            Event::Grow(bytes) => {
                self.limit = (self.limit + bytes).min(self.wal.len());
                self.safe_ends.insert(at(self.limit));
            }
            Event::Pass(time) => self.now += time,
            Event::Join(behind) if count < 5 => {
                let start = self.limit.saturating_sub(behind) / 8 * 8;
                self.joined += 1;
                self.links.push(SimulatedLink {
                    start,
                    sent: start,
                    limit: self.limit,
                    place: None,
                    under_way: VecDeque::new(),
                    inbound: inbound(at(start)),
                    received: Vec::new(),
                });
            }
            Event::Fail => {
                self.ring.fail();
                self.failures += 1;
            }
            Event::Hear(_) | Event::Send(..) | Event::Deliver(..) | Event::Leave(_) if count == 0 => {}
            Event::Hear(link) => self.links[link % count].limit = self.limit,
            Event::Send(link, most) => {
                for _ in 0..most {
                    if !self.send(link % count) {
                        break;
                    }
                }
            }
            Event::Deliver(link, most) => self.deliver(link % count, most),
            Event::Leave(link) => drop(self.links.swap_remove(link % count)),
            Event::Join(_) => {}
        }
    }

    /// Does the link's next step; false when there is nothing to do.
    fn send(&mut self, number: usize) -> bool {
        let others = self.links.iter().enumerate();
        let others = others.filter(|(other, link)| *other != number && link.place.is_some()).count() > 0;
        let link = &self.links[number];
        let (sent, limit) = (at(link.sent), at(link.limit));
        if sent >= limit {
            return false;
        }
        match self.ring.step(Follower { place: link.place, sent, limit }, others, self.now) {
            Step::Wait => false,
            Step::Frame { epoch, sequence, range, frame, place } => {
                assert!(range.start() == sent && range.end() <= limit);
                self.put(number, FrameKind::Stream { epoch, sequence }, range, &frame);
                self.links[number].place = Some(place);
                true
            }
            Step::Bulk { until } => {
                self.links[number].place = None;
                let Some(end) = bulk_end(sent, until) else { return false };
                let range = LsnRange::new(sent, end).unwrap();
                let encoded =
                    self.outbound.encode(FrameKind::Standalone, self.bytes(range).to_vec().as_slice());
                self.put(number, FrameKind::Standalone, range, &encoded);
                true
            }
            Step::Encode => {
                let epochs = &mut self.epochs;
                let new_epoch = |_| {
                    *epochs += 1;
                    *epochs
                };
                let begun = self.ring.begin(limit, self.now, new_epoch).expect("there is something");
                let kind = FrameKind::Stream { epoch: begun.epoch, sequence: begun.sequence };
                let encoded = self.outbound.encode(kind, self.bytes(begun.range).to_vec().as_slice());
                self.ring.push(begun, encoded);
                self.encoded += begun.range.bytes();
                assert!(self.ring.wal_bytes() <= RING_WAL_BYTES_MAX);
                true
            }
        }
    }

    fn bytes(&self, range: LsnRange) -> &[u8] {
        let offset = |at: Lsn| (at.get() - START) as usize;
        &self.wal[offset(range.start())..offset(range.end())]
    }

    fn put(&mut self, number: usize, kind: FrameKind, range: LsnRange, encoded: &Encoded) {
        let is_safe = range.end().page_offset() == 0 || self.safe_ends.contains(&range.end());
        assert!(is_safe, "{} may wedge a standby", range.end());
        let link = &mut self.links[number];
        assert!(range.end() <= at(link.limit), "more than may be sent");
        link.under_way.push_back(message(kind, range, encoded));
        link.sent += range.bytes() as usize;
    }

    fn deliver(&mut self, number: usize, most: usize) {
        let link = &mut self.links[number];
        for body in link.under_way.drain(..most.min(link.under_way.len())) {
            link.received.extend(receive(&mut link.inbound, body).expect("each frame can be read"));
        }
        let end = link.start + link.received.len();
        assert!(link.received == self.wal[link.start..end], "other bytes than were written");
    }

    /// Every link gets everything.
    fn settle(&mut self) {
        for number in 0..self.links.len() {
            self.links[number].limit = self.limit;
        }
        for _ in 0..2 {
            for number in 0..self.links.len() {
                while self.send(number) {}
                self.deliver(number, usize::MAX);
            }
        }
        for link in &self.links {
            assert_eq!(link.start + link.received.len(), self.limit, "a link is left behind");
        }
    }
}

proptest! {
    #![proptest_config(config(150))]

    /// Any course of joining, leaving, failing and slow links.
    #[test]
    fn links_that_share_a_stream_all_get_every_byte(
        compression in compression(),
        events in vec(event(), 1..250),
        seed in any::<u64>(),
    ) {
        let mut world = World::new(compression, seed);
        world.apply(Event::Join(50_000));
        for event in events {
            world.apply(event);
        }
        world.settle();
        // Nobody who comes and goes makes epochs without end: each has its WAL, or its reason.
        let by_length = world.encoded / JOIN_EPOCH_BYTES_MIN;
        let by_age = world.now.duration_since(world.begun).as_secs() / JOIN_INTERVAL_MIN.as_secs();
        let anew = world.limit as u64 / LIVE_LAG_MAX;
        let reasons = u64::from(world.joined + world.failures);
        prop_assert!(u64::from(world.epochs) <= by_length + by_age + anew + reasons + 1);
    }
}

/// A link that comes and goes all the time costs the one that stays few epochs.
#[test]
fn a_flapping_link_cannot_ruin_the_ratio_of_the_others() {
    let ratio = |is_flapping: bool| {
        let mut world = World::new(Compression::Zstd { level: 1 }, 9);
        world.apply(Event::Join(50_000));
        world.settle();
        let (mut wire, mut sent) = (0, 0);
        while world.limit + 512 < 3 << 20 {
            world.apply(Event::Grow(512));
            if is_flapping {
                world.apply(Event::Join(512));
            }
            for number in 0..world.links.len() {
                world.links[number].limit = world.limit;
                while world.send(number) {}
            }
            wire += world.links[0].under_way.iter().map(Bytes::len).sum::<usize>();
            sent += 512;
            for number in 0..world.links.len() {
                world.deliver(number, usize::MAX);
            }
            world.links.truncate(1);
            world.now += Duration::from_millis(10);
        }
        sent as f64 / wire as f64
    };
    let (alone, beside) = (ratio(false), ratio(true));
    assert!(beside >= 0.9 * alone, "{beside} instead of {alone}");
}
