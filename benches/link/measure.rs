//! Compresses WAL as links do, and reads it back, on one thread.
//!
//! Owns the clock: time on the wall and on the CPU. What comes back must be what went in.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::time::{ClockId, clock_gettime};
use walrelay::{
    protocol::link::{
        BulkEncoder, Compression, Decoder, Encoding, FrameHeader, FrameKind, Seed, StreamEncoder, WalChecksum,
    },
    session::link::{Place, Ring, Step, ring::Follower},
    wal::{Lsn, LsnRange, PgTimestamp, SystemId, TimelineId},
};

/// How frames depend on one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Not at all.
    Alone,
    /// One stream for as long as the connection lasts.
    Own,
    /// The stream that links share: it begins anew with each epoch.
    Shared,
}

/// What it took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    wal: usize,
    /// For one link.
    wire: usize,
    out: Spent,
    into: Spent,
}

#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    time: Duration,
    cpu: Duration,
}

impl Cost {
    pub(crate) fn ratio(&self) -> f64 {
        self.wal as f64 / self.wire as f64
    }

    /// MB of WAL in a second.
    pub(crate) fn speed_out(&self) -> f64 {
        self.wal as f64 / 1e6 / self.out.time.as_secs_f64()
    }

    pub(crate) fn speed_in(&self) -> f64 {
        self.wal as f64 / 1e6 / self.into.time.as_secs_f64()
    }

    /// Seconds for a GB of WAL.
    pub(crate) fn cpu_out(&self) -> f64 {
        self.out.cpu.as_secs_f64() / (self.wal as f64 / 1e9)
    }

    pub(crate) fn cpu_in(&self) -> f64 {
        self.into.cpu.as_secs_f64() / (self.wal as f64 / 1e9)
    }
}

/// A frame as it is sent, without its WAL.
#[derive(Clone)]
struct Frame {
    kind: FrameKind,
    range: LsnRange,
    encoding: Encoding,
    /// Bytes before its payload on the wire.
    head: usize,
    payload: Vec<u8>,
}

/// Sends WAL in pieces of `flush` bytes to so many links, and reads what the first of them got.
pub(crate) fn run(wal: &[u8], codec: Compression, way: Way, flush: usize, links: usize) -> Result<Cost> {
    let (mut cost, mut frames) = (Cost { wal: wal.len(), ..Cost::default() }, Vec::new());
    let began = Clock::now();
    match way {
        Way::Alone => alone(wal, codec, flush, &mut frames)?,
        Way::Own => own(wal, codec, flush, &mut frames)?,
        Way::Shared => shared(wal, codec, flush, links, &mut frames)?,
    }
    cost.out = began.spent();
    cost.wire = frames.iter().map(|frame| frame.head + frame.payload.len()).sum();
    let mut decoder = Decoder::new();
    let mut space = vec![0; 1 << 20];
    let began = Clock::now();
    let (mut at, mut same) = (0, true);
    for frame in &frames {
        let len = usize::try_from(frame.range.bytes())?;
        let space = space.get_mut(..len).context("a frame is too long")?;
        match frame.kind {
            FrameKind::Standalone => decoder.standalone(frame.encoding, &frame.payload, space)?,
            FrameKind::Stream { sequence, .. } => {
                decoder.stream(sequence == 0, frame.encoding, &frame.payload, space)?;
            }
        }
        std::hint::black_box(WalChecksum::of([&*space]));
        same &= wal.get(at..at + len) == Some(space);
        at += len;
    }
    cost.into = began.spent();
    ensure!(same && at == wal.len(), "other WAL comes out than went in");
    Ok(cost)
}

fn alone(wal: &[u8], codec: Compression, flush: usize, frames: &mut Vec<Frame>) -> Result<()> {
    let (mut encoder, mut out, seed) = (BulkEncoder::new(codec)?, Vec::new(), seed());
    for (number, piece) in wal.chunks(flush).enumerate() {
        let encoding = encoder.encode(piece, &mut out)?;
        let range = place(number * flush, piece.len())?;
        let kind = FrameKind::Standalone;
        let head = put_together(kind, range, (encoding, WalChecksum::of([piece])), out.len(), &seed);
        frames.push(Frame { kind, range, encoding, head, payload: out.clone() });
    }
    Ok(())
}

fn own(wal: &[u8], codec: Compression, flush: usize, frames: &mut Vec<Frame>) -> Result<()> {
    let (mut encoder, mut out, mut sequence) = (StreamEncoder::new(codec)?, Vec::new(), 0);
    let seed = seed();
    for (number, piece) in wal.chunks(flush).enumerate() {
        let encoding = encoder.encode([piece], &mut out)?;
        let (kind, range) = (FrameKind::Stream { epoch: 1, sequence }, place(number * flush, piece.len())?);
        sequence += 1;
        let head = put_together(kind, range, (encoding, WalChecksum::of([piece])), out.len(), &seed);
        frames.push(Frame { kind, range, encoding, head, payload: out.clone() });
    }
    Ok(())
}

/// As a relay does it: whoever comes first makes the frame, and each link puts its own fields before it.
fn shared(wal: &[u8], codec: Compression, flush: usize, links: usize, frames: &mut Vec<Frame>) -> Result<()> {
    type Made = (Encoding, WalChecksum, std::sync::Arc<[u8]>);
    let start = place(0, 1)?.start();
    let (mut ring, mut encoder) = (Ring::<Made>::new(start), StreamEncoder::new(codec)?);
    let mut at: Vec<(Option<Place>, Lsn)> = vec![(None, start); links];
    let (mut out, mut epochs, now, seed) = (Vec::new(), 0, Instant::now(), seed());
    for (number, piece) in wal.chunks(flush).enumerate() {
        let limit = place(number * flush, piece.len())?.end();
        for (link, (follows, sent)) in at.iter_mut().enumerate() {
            while *sent < limit {
                match ring.step(Follower { place: *follows, sent: *sent, limit }, links > 1, now) {
                    Step::Encode => {
                        let new_epoch = |_| {
                            epochs += 1;
                            epochs
                        };
                        let begun =
                            ring.begin(limit, now, new_epoch).ok_or_else(|| anyhow!("nothing new"))?;
                        if begun.sequence == 0 {
                            encoder.restart()?;
                        }
                        let offset = usize::try_from(begun.range.start().bytes_since(start))?;
                        let len = usize::try_from(begun.range.bytes())?;
                        let piece = wal.get(offset..offset + len).context("beyond the WAL")?;
                        let encoding = encoder.encode([piece], &mut out)?;
                        ring.push(begun, (encoding, WalChecksum::of([piece]), out.as_slice().into()));
                    }
                    Step::Frame { epoch, sequence, range, frame: (encoding, checksum, payload), place } => {
                        let kind = FrameKind::Stream { epoch, sequence };
                        let head = put_together(kind, range, (encoding, checksum), payload.len(), &seed);
                        if link == 0 {
                            frames.push(Frame { kind, range, encoding, head, payload: payload.to_vec() });
                        }
                        (*follows, *sent) = (Some(place), range.end());
                    }
                    Step::Bulk { .. } | Step::Wait => return Err(anyhow!("a link is left behind")),
                }
            }
        }
    }
    Ok(())
}

fn seed() -> Seed {
    Seed::new(SystemId(1), None)
}

/// What each link does for each frame; how many bytes go before the payload.
fn put_together(
    kind: FrameKind,
    range: LsnRange,
    frame: (Encoding, WalChecksum),
    payload: usize,
    seed: &Seed,
) -> usize {
    let (encoding, checksum) = frame;
    let (timeline, wal_end, sent_at) = (TimelineId::FIRST, Some(range.end()), PgTimestamp(0));
    let header = FrameHeader { kind, encoding, timeline, range, wal_end, sent_at };
    let before = (kind != FrameKind::Standalone).then_some(sent_at);
    std::hint::black_box(header.encode(seed, checksum, payload, before)).as_ref().len()
}

/// WAL at an offset from some segment's start.
fn place(offset: usize, len: usize) -> Result<LsnRange> {
    let start = Lsn::new(1 << 30).map(|begin| begin.advance(offset as u64));
    let range = start.and_then(|start| LsnRange::new(start, start.advance(len as u64)));
    range.ok_or_else(|| anyhow!("no WAL"))
}

/// Time on the wall, and of this thread on the CPU.
struct Clock {
    began: Instant,
    cpu: Duration,
}

impl Clock {
    fn now() -> Self {
        Self { cpu: Self::cpu(), began: Instant::now() }
    }

    fn spent(&self) -> Spent {
        Spent { time: self.began.elapsed(), cpu: Self::cpu().saturating_sub(self.cpu) }
    }

    fn cpu() -> Duration {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec).unwrap_or(0))
    }
}
