//! One compressed link: what it does next, and what it has done.
//!
//! Owns the link's place among the others of its kind, its rung, its rate and its numbers. Reads no WAL and touches no socket:
//! `fill` does what is decided here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use parking_lot::Mutex;

use crate::downstream::ColdReads;
use crate::downstream::link::bulk::{BulkFrame, BulkKey, BulkReader, EncodedWal};
use crate::downstream::link::tail::Following;
use crate::downstream::link::{AcceptedLink, Links};
use crate::metrics::{Carried, LinkTraffic};
use crate::protocol::link::{Encoding, FrameHead, FrameHeader, FrameKind, Hello, Seed};
use crate::session::link::{
    Bucket, LIVE_LAG_MAX, Ladder, LoadMeter, Place, Rung, Shrinkage, Step, Urgency, Waiting, bulk_end, ladder,
};
use crate::session::sender::TimelineState;
use crate::store::{Access, Store};
use crate::wal::{HistoryHash, Lsn, LsnRange, PgTimestamp, SystemId, TimelineId};

/// The sending side of one stream over a link.
pub(in crate::downstream) struct LinkSender {
    pub(super) links: Arc<Links>,
    hello: Hello,
    seed: Seed,
    ladder: Ladder,
    /// Its rung, as the gauges count it.
    counted: Counted,
    own_rate: Bucket,
    shrinkage: Shrinkage,
    following: Option<Following>,
    /// While it catches up.
    reader: Option<BulkReader>,
    /// A frame that stands alone and was made for it.
    made: Option<BulkFrame>,
    /// When the frame that was put last says it was sent.
    last_frame_at: Option<PgTimestamp>,
    meter: LoadMeter,
    traffic: Arc<LinkTraffic>,
}

/// Whose WAL is streamed, and to whom.
#[derive(Clone, Copy, Debug)]
pub(in crate::downstream) struct LinkStream {
    pub(in crate::downstream) accepted: AcceptedLink,
    pub(in crate::downstream) system_id: SystemId,
    pub(in crate::downstream) timeline: TimelineId,
    pub(in crate::downstream) history: Option<HistoryHash>,
}

/// A frame in its place.
pub(super) struct LinkFrame {
    pub(super) kind: FrameKind,
    pub(super) range: LsnRange,
    pub(super) encoded: EncodedWal,
}

/// A message that was given to the connection.
pub(super) struct Sent {
    pub(super) carried: Carried,
    pub(super) encoding: Encoding,
    pub(super) wal_bytes: u64,
    pub(super) wire_bytes: u64,
}

/// What is to be sent next.
pub(super) enum Next {
    /// A frame of the shared stream; where the link is then.
    Frame(LinkFrame, Place),
    /// A frame that stands alone and is there.
    Standalone(LinkFrame),
    /// The next frame of the shared stream is to be made.
    Encode,
    /// A frame that stands alone, which others may have let be made.
    Bulk(BulkKey),
    /// A message that is not compressed.
    Plain,
    /// Nothing now.
    Wait,
}

impl LinkSender {
    pub(in crate::downstream) fn new(links: &Arc<Links>, stream: LinkStream, now: Instant) -> Self {
        let LinkStream { accepted, system_id, timeline, history } = stream;
        let AcceptedLink { compression, fallback } = accepted;
        let rung = Rung::Compressed(compression);
        let ladder =
            if links.adapt { Ladder::adaptive(compression, fallback, now) } else { Ladder::fixed(rung, now) };
        let traffic = Arc::<LinkTraffic>::default();
        traffic.begin(compression, now);
        let encoding = encoding_of(rung);
        Self {
            hello: Hello { system_id, timeline, history, encoding },
            seed: Seed::new(system_id, history),
            ladder,
            counted: Counted::new(links, encoding),
            own_rate: Bucket::new(links.rates().link_rate_max, now),
            shrinkage: Shrinkage::new(LEFT_OUT_MAX),
            following: None,
            reader: None,
            made: None,
            last_frame_at: None,
            meter: LoadMeter::new(now),
            traffic,
            links: Arc::clone(links),
        }
    }

    /// Appends the first message of the stream.
    pub(in crate::downstream) fn encode_hello(&self, out: &mut BytesMut) {
        self.hello.encode(out);
    }

    /// What it carries, for whoever shows it.
    pub(in crate::downstream) fn traffic(&self) -> Arc<LinkTraffic> {
        Arc::clone(&self.traffic)
    }

    /// Whether it may send now; else when to ask again.
    pub(super) fn check_rate(&mut self, wanted: LsnRange, now: Instant) -> Result<(), Instant> {
        let urgency = if wanted.bytes() > LIVE_LAG_MAX { Urgency::CatchUp } else { Urgency::Live };
        self.links.check_rates(&mut self.own_rate, urgency, now)
    }

    /// What to send of the WAL that may be sent.
    pub(super) fn next(&mut self, wanted: LsnRange, timeline: TimelineState, now: Instant) -> Next {
        let Rung::Compressed(compression) = self.ladder.rung() else { return Next::Plain };
        let (sent, limit) = (wanted.start(), wanted.end());
        if let Some(BulkFrame { key, encoded, .. }) = self.made.take()
            && (key.range.start(), key.compression) == (sent, compression)
            && key.range.end() <= limit
        {
            return Next::Standalone(LinkFrame { kind: FrameKind::Standalone, range: key.range, encoded });
        }
        let reader = self.reader.take();
        let until = match timeline {
            TimelineState::Historic { .. } => {
                self.following = None;
                limit
            }
            TimelineState::Current => {
                let timeline = self.hello.timeline;
                let links = &self.links;
                let following =
                    self.following.get_or_insert_with(|| links.tail(timeline, compression, limit).follow());
                match following.step(sent, limit, now) {
                    Step::Frame { epoch, sequence, range, frame, place } => {
                        let kind = FrameKind::Stream { epoch, sequence };
                        return Next::Frame(LinkFrame { kind, range, encoded: frame }, place);
                    }
                    Step::Encode => return Next::Encode,
                    Step::Wait => return Next::Wait,
                    Step::Bulk { until } => until,
                }
            }
        };
        match self.bulk_key(sent, until) {
            Some(key) if self.shrinkage.is_worth_while() => {
                self.reader = reader;
                Next::Bulk(key)
            }
            Some(_) => Next::Plain,
            None => Next::Wait,
        }
    }

    /// The standalone frame that begins at `start`.
    pub(super) fn bulk_key(&self, start: Lsn, until: Lsn) -> Option<BulkKey> {
        let Rung::Compressed(compression) = self.ladder.rung() else { return None };
        let range = LsnRange::new(start, bulk_end(start, until)?)?;
        Some(BulkKey { timeline: self.hello.timeline, range, compression })
    }

    /// What its standalone frames are read by, until it sends something else.
    pub(super) fn reader(&mut self, store: &Store, reads: &ColdReads) -> BulkReader {
        let timeline = self.hello.timeline;
        let new = || {
            let wal = Arc::new(Mutex::new(store.reader(timeline, Access::Copied)));
            BulkReader { store: store.clone(), wal, reads: reads.semaphore() }
        };
        self.reader.get_or_insert_with(new).clone()
    }

    /// A frame was made for it.
    pub(super) fn keep_frame(&mut self, frame: BulkFrame) {
        self.made = Some(frame);
    }

    /// A frame is made that was waited for, and the codec was at it for so long.
    pub(super) fn note_made(&mut self, encoding: Duration, now: Instant) {
        self.meter.note_frame(encoding, now);
    }

    pub(super) fn following(&mut self) -> Option<&mut Following> {
        self.following.as_mut()
    }

    /// All that precedes a frame's payload.
    pub(super) fn head(&mut self, frame: &LinkFrame, wal_end: Lsn, sent_at: PgTimestamp) -> FrameHead {
        let LinkFrame { kind, range, encoded } = frame;
        let (timeline, wal_end, encoding) = (self.hello.timeline, Some(wal_end), encoded.encoding);
        let header = FrameHeader { kind: *kind, encoding, timeline, range: *range, wal_end, sent_at };
        let before = self.last_frame_at.replace(sent_at).filter(|_| *kind != FrameKind::Standalone);
        if *kind == FrameKind::Standalone {
            self.shrinkage.note(range.bytes(), encoded.payload.len() as u64);
        }
        header.encode(&self.seed, encoded.checksum, encoded.payload.len(), before)
    }

    /// A message was given to the connection.
    pub(super) fn note_sent(&mut self, sent: &Sent, now: Instant) {
        let Sent { carried, encoding, wal_bytes, wire_bytes } = *sent;
        self.links.metrics.sent.note(carried, wal_bytes, wire_bytes);
        self.traffic.note(encoding, wal_bytes, wire_bytes, now);
        self.links.spend(&mut self.own_rate, wire_bytes, now);
        self.meter.note_sent(wal_bytes);
    }

    /// From now on the link waits for this. Says whether it sends in another way than before.
    pub(in crate::downstream) fn wait_for(&mut self, waiting: Waiting, now: Instant) {
        self.meter.set(waiting, now);
        if let Some(load) = self.meter.take(ladder::WINDOW, now)
            && self.ladder.observe(load, now)
        {
            let rung = self.ladder.rung();
            tracing::info!(?rung, "link is compressed otherwise, because of what it waits for");
            (self.following, self.reader) = (None, None);
            self.counted = Counted::new(&self.links, encoding_of(rung));
        }
    }

    /// The link had to wait because of its rate.
    pub(super) fn note_paced(&self, since: Instant, now: Instant) {
        let waited = now.saturating_duration_since(since).as_micros();
        self.links.metrics.paced_microseconds.increment(u64::try_from(waited).unwrap_or(u64::MAX));
    }

    /// Waits for a new frame of the stream that is followed. Cancel-safe.
    pub(in crate::downstream) async fn grown(link: &mut Option<Self>) {
        match link.as_mut().and_then(Self::following) {
            Some(following) => following.changed().await,
            None => std::future::pending().await,
        }
    }
}

/// Messages of WAL that catches up which are left as they are before one is compressed again, where nothing shrinks.
const LEFT_OUT_MAX: u32 = 64;

impl Drop for LinkSender {
    fn drop(&mut self) {
        self.traffic.end();
    }
}

fn encoding_of(rung: Rung) -> Encoding {
    match rung {
        Rung::Plain => Encoding::Plain,
        Rung::Compressed(crate::protocol::link::Compression::Zstd { .. }) => Encoding::Zstd,
        Rung::Compressed(crate::protocol::link::Compression::Lz4) => Encoding::Lz4,
    }
}

/// A link among those that send in one way; ends when dropped.
struct Counted(metrics::Gauge);

impl Counted {
    fn new(links: &Links, encoding: Encoding) -> Self {
        let gauge = links.metrics.sending_by(encoding).clone();
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}
