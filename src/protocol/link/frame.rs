//! A frame: a stretch of WAL, encoded, and all that proves what it is.
//!
//! Owns the layout, the limits and the checksum. The checksum covers every field and the WAL itself, not its encoding, and it
//! begins with the cluster and the history: a frame that was made of other WAL, or for another place, is never taken for
//! this one. Of the WAL it covers a checksum, made once, so that frames can be shared by links that differ in what their
//! fields say.
//!
//! ```text
//!  'z' 'f' | flags | encoding | epoch | sequence | timeline | start | WAL end | sent at | length | checksum | payload
//!   1   1      1        1         4         4          4        8        8         8        4         4
//! ```
//!
//! A frame that goes on with a stream leaves out what its receiver knows: epoch, number, timeline and start follow from the
//! frame before. The checksum covers them all the same. With small flushes the fields would be more than the payload.
//!
//! ```text
//!  'z' 's' | encoding | length | WAL beyond its end | microseconds since the frame before | checksum | payload
//!   1   1       1         3              4                             4                        4
//! ```

use bytes::{Buf, BufMut, Bytes};
use crc32fast::Hasher;

use crate::protocol::fields::Fields;
use crate::protocol::link::{Encoding, LINK_MESSAGE, LinkError};
use crate::protocol::{DecodeError, FRAME_HEADER_BYTES, WAL_DATA_BYTES_MAX, backend};
use crate::wal::{HistoryHash, Lsn, LsnRange, PgTimestamp, SystemId, TimelineId};

/// Whether a frame can be read by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// It can.
    Standalone,
    /// It needs all frames of its epoch before it.
    Stream {
        /// Which stream of frames.
        epoch: u32,
        /// Its number there; 0 begins the epoch.
        sequence: u32,
    },
}

/// What a frame says of its WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Whether it can be read by itself.
    pub kind: FrameKind,
    /// How its payload is encoded.
    pub encoding: Encoding,
    /// The timeline.
    pub timeline: TimelineId,
    /// The WAL.
    pub range: LsnRange,
    /// How far the sender could send now.
    pub wal_end: Option<Lsn>,
    /// The sender's clock.
    pub sent_at: PgTimestamp,
}

/// Where every checksum of a stream begins: the cluster and the history.
#[derive(Clone, Debug)]
pub struct Seed(Hasher);

impl Seed {
    /// For WAL of this cluster and history.
    pub fn new(system_id: SystemId, history: Option<HistoryHash>) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(&system_id.0.to_be_bytes());
        hasher.update(&HistoryHash::to_wire(history).to_be_bytes());
        Self(hasher)
    }
}

/// Checksum of a stretch of WAL by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalChecksum(u32);

impl WalChecksum {
    /// Of pieces that follow one another.
    pub fn of<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hasher = Hasher::new();
        for piece in pieces {
            hasher.update(piece);
        }
        Self(hasher.finalize())
    }
}

/// All that precedes a frame's payload on the wire.
#[derive(Clone, Copy, Debug)]
pub struct FrameHead {
    bytes: [u8; FRAME_BYTES],
    len: usize,
}

impl AsRef<[u8]> for FrameHead {
    fn as_ref(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl FrameHeader {
    /// All that precedes the payload on the wire, the CopyData header included. `before` is when the frame before was sent, if
    /// this one goes on with its stream.
    pub fn encode(
        &self,
        seed: &Seed,
        wal: WalChecksum,
        payload_bytes: usize,
        before: Option<PgTimestamp>,
    ) -> FrameHead {
        let covered = self.covered();
        let checksum = checksum(seed, &covered, wal);
        let mut head = FrameHead { bytes: [0; FRAME_BYTES], len: 0 };
        let mut fields = head.bytes.as_mut_slice();
        fields.put_u8(backend::tag::COPY_DATA);
        let short = before.and_then(|before| self.short_fields(before));
        let own_bytes = if short.is_some() { SHORT_FIELDS_BYTES } else { FRAME_FIELDS_BYTES };
        // Bounded far below what the field holds.
        fields.put_u32(u32::try_from(size_of::<u32>() + own_bytes + payload_bytes).unwrap_or(u32::MAX));
        match short {
            Some(short) => fields.put_slice(&short),
            None => fields.put_slice(&covered),
        }
        fields.put_u32(checksum);
        head.len = FRAME_HEADER_BYTES + own_bytes;
        head
    }

    /// All fields, as the checksum covers them.
    fn covered(&self) -> [u8; COVERED_BYTES] {
        let mut covered = [0; COVERED_BYTES];
        let mut out = covered.as_mut_slice();
        let (flags, epoch, sequence) = match self.kind {
            FrameKind::Standalone => (0, 0, 0),
            FrameKind::Stream { epoch, sequence } => (STREAM_FLAG, epoch, sequence),
        };
        out.put_u8(LINK_MESSAGE);
        out.put_u8(FRAME);
        out.put_u8(flags);
        out.put_u8(self.encoding.to_wire());
        out.put_u32(epoch);
        out.put_u32(sequence);
        out.put_u32(self.timeline.get());
        out.put_u64(self.range.start().get());
        out.put_u64(Lsn::to_wire(self.wal_end));
        out.put_i64(self.sent_at.0);
        out.put_u32(u32::try_from(self.range.bytes()).unwrap_or(u32::MAX));
        covered
    }

    /// The fields of a frame that goes on with a stream; `None` where they do not say it all.
    fn short_fields(&self, before: PgTimestamp) -> Option<[u8; SHORT_FIELDS_BYTES - size_of::<u32>()]> {
        let FrameKind::Stream { sequence: 1.., .. } = self.kind else { return None };
        let end = self.range.end();
        let beyond = self.wal_end.filter(|wal_end| *wal_end >= end)?.bytes_since(end);
        let since = self.sent_at.0.checked_sub(before.0)?;
        let [0, length @ ..] = u32::try_from(self.range.bytes()).ok()?.to_be_bytes() else { return None };
        let mut fields = [0; SHORT_FIELDS_BYTES - size_of::<u32>()];
        let mut out = fields.as_mut_slice();
        out.put_u8(LINK_MESSAGE);
        out.put_u8(SHORT_FRAME);
        out.put_u8(self.encoding.to_wire());
        out.put_slice(&length);
        out.put_u32(u32::try_from(beyond).ok()?);
        out.put_u32(u32::try_from(since).ok()?);
        Some(fields)
    }

    /// Bytes of WAL.
    pub fn wal_bytes(&self) -> usize {
        usize::try_from(self.range.bytes()).unwrap_or(usize::MAX)
    }
}

fn checksum(seed: &Seed, covered: &[u8], wal: WalChecksum) -> u32 {
    let mut hasher = seed.0.clone();
    hasher.update(covered);
    hasher.update(&wal.0.to_be_bytes());
    hasher.finalize()
}

/// The frame that came before, as far as the next may go on from it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Before {
    pub(super) epoch: u32,
    pub(super) sequence: u32,
    pub(super) timeline: TimelineId,
    /// Where it ended.
    pub(super) end: Lsn,
    pub(super) sent_at: PgTimestamp,
}

/// A frame as it came: its fields are within their limits, its content is not looked at yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RawFrame {
    pub(super) header: FrameHeader,
    checksum: u32,
    pub(super) payload: Bytes,
}

impl RawFrame {
    /// Reads a message's body, from its kind byte on.
    pub(super) fn decode(mut body: Bytes) -> Result<Self, DecodeError> {
        let mut fields = Fields::of(FRAME_NAME, body.slice(..FRAME_FIELDS_BYTES.min(body.len())));
        fields.u8("kind")?;
        fields.u8("type")?;
        let flags = fields.u8("flags")?;
        let encoding = fields.u8("encoding")?;
        let (epoch, sequence) = (fields.u32("epoch")?, fields.u32("sequence")?);
        let timeline = fields.u32("timeline")?;
        let start = fields.lsn("start")?.ok_or_else(|| fields.invalid("start", 0_u64))?;
        let wal_end = fields.lsn("WAL end")?;
        let sent_at = fields.timestamp("send time")?;
        let length = fields.u32("length")?;
        let checksum = fields.u32("checksum")?;
        let invalid = |field, value: u32| fields.invalid(field, value);
        let kind = match flags {
            0 if epoch == 0 && sequence == 0 => FrameKind::Standalone,
            STREAM_FLAG => FrameKind::Stream { epoch, sequence },
            other => return Err(invalid("flags", u32::from(other))),
        };
        let encoding =
            Encoding::from_wire(encoding).ok_or_else(|| invalid("encoding", u32::from(encoding)))?;
        let timeline = TimelineId::new(timeline).ok_or_else(|| invalid("timeline", timeline))?;
        let range = checked_range(start, length).ok_or_else(|| invalid("length", length))?;
        body.advance(FRAME_FIELDS_BYTES);
        let header = FrameHeader { kind, encoding, timeline, range, wal_end, sent_at };
        Self { header, checksum, payload: body }.within_limits()
    }

    /// The same for a frame that goes on with a stream.
    pub(super) fn decode_short(mut body: Bytes, before: &Before) -> Result<Self, DecodeError> {
        let mut fields = Fields::of(FRAME_NAME, body.slice(..SHORT_FIELDS_BYTES.min(body.len())));
        fields.u8("kind")?;
        fields.u8("type")?;
        let encoding = fields.u8("encoding")?;
        let [high, middle, low] = [fields.u8("length")?, fields.u8("length")?, fields.u8("length")?];
        let length = u32::from_be_bytes([0, high, middle, low]);
        let beyond = fields.u32("WAL end")?;
        let since = fields.u32("send time")?;
        let checksum = fields.u32("checksum")?;
        let invalid = |field, value: u32| fields.invalid(field, value);
        let encoding =
            Encoding::from_wire(encoding).ok_or_else(|| invalid("encoding", u32::from(encoding)))?;
        let range = checked_range(before.end, length).ok_or_else(|| invalid("length", length))?;
        let wal_end = range.end().get().checked_add(u64::from(beyond)).and_then(Lsn::new);
        let wal_end = Some(wal_end.ok_or_else(|| invalid("WAL end", beyond))?);
        body.advance(SHORT_FIELDS_BYTES);
        // An epoch ends long before its numbers do.
        let (epoch, sequence) = (before.epoch, before.sequence.saturating_add(1));
        let kind = FrameKind::Stream { epoch, sequence };
        let sent_at = PgTimestamp(before.sent_at.0.saturating_add(i64::from(since)));
        let header = FrameHeader { kind, encoding, timeline: before.timeline, range, wal_end, sent_at };
        Self { header, checksum, payload: body }.within_limits()
    }

    fn within_limits(self) -> Result<Self, DecodeError> {
        let (len, limit) = (self.payload.len(), payload_bytes_max(self.header.wal_bytes()));
        if len > limit {
            return Err(DecodeError::TooLong { message: FRAME_NAME, len, limit });
        }
        Ok(self)
    }

    /// Whether this is the WAL that was sent, where and of what it was sent.
    pub(super) fn check(&self, seed: &Seed, wal: &[u8]) -> Result<(), LinkError> {
        if checksum(seed, &self.header.covered(), WalChecksum::of([wal])) != self.checksum {
            return Err(LinkError::Checksum { at: self.header.range.start() });
        }
        Ok(())
    }
}

/// `None`: empty, too long, or beyond the last position.
fn checked_range(start: Lsn, length: u32) -> Option<LsnRange> {
    if usize::try_from(length).unwrap_or(usize::MAX) > WAL_DATA_BYTES_MAX {
        return None;
    }
    let end = start.get().checked_add(u64::from(length)).and_then(Lsn::new)?;
    LsnRange::new(start, end)
}

/// Longest payload of a frame of so much WAL: data that does not shrink grows by what its encoding adds.
pub const fn payload_bytes_max(wal_bytes: usize) -> usize {
    wal_bytes + wal_bytes / 64 + 256
}

pub(super) const FRAME: u8 = b'f';
pub(super) const SHORT_FRAME: u8 = b's';
const FRAME_NAME: &str = "link frame";
const STREAM_FLAG: u8 = 1;

/// Bytes of the fields that the checksum covers.
const COVERED_BYTES: usize = 4 + 3 * size_of::<u32>() + 3 * size_of::<u64>() + size_of::<u32>();
/// All that precedes the payload in the message's body.
pub const FRAME_FIELDS_BYTES: usize = COVERED_BYTES + size_of::<u32>();
/// The same for one that goes on with a stream.
const SHORT_FIELDS_BYTES: usize = 3 + 3 + 3 * size_of::<u32>();
/// All that precedes the payload on the wire, at most.
pub const FRAME_BYTES: usize = FRAME_HEADER_BYTES + FRAME_FIELDS_BYTES;

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> FrameHeader {
        let start = Lsn::new(0x100_0028).unwrap();
        FrameHeader {
            kind: FrameKind::Stream { epoch: 3, sequence: 9 },
            encoding: Encoding::Plain,
            timeline: TimelineId::FIRST,
            range: LsnRange::new(start, start.advance(8)).unwrap(),
            wal_end: Lsn::new(0x200_0000),
            sent_at: PgTimestamp(-5),
        }
    }

    fn seed() -> Seed {
        Seed::new(SystemId(42), HistoryHash::from_wire(7))
    }

    fn body(header: &FrameHeader, wal: &[u8]) -> Bytes {
        body_after(header, wal, None)
    }

    fn body_after(header: &FrameHeader, wal: &[u8], before: Option<PgTimestamp>) -> Bytes {
        let head = header.encode(&seed(), WalChecksum::of([wal]), wal.len(), before);
        let body = [&head.as_ref()[FRAME_HEADER_BYTES..], wal].concat();
        assert_eq!(u32::from_be_bytes(head.as_ref()[1..5].try_into().unwrap()) as usize, 4 + body.len());
        body.into()
    }

    fn before() -> Before {
        let timeline = TimelineId::FIRST;
        Before { epoch: 3, sequence: 8, timeline, end: header().range.start(), sent_at: PgTimestamp(-105) }
    }

    #[test]
    fn a_frame_that_goes_on_with_a_stream_leaves_out_what_is_known_and_is_the_same() {
        let body = body_after(&header(), b"12345678", Some(before().sent_at));
        assert_eq!(body.len(), SHORT_FIELDS_BYTES + 8);
        let frame = RawFrame::decode_short(body.clone(), &before()).unwrap();
        assert_eq!((frame.header, &frame.payload[..]), (header(), &b"12345678"[..]));
        frame.check(&seed(), b"12345678").unwrap();
        for len in 0..SHORT_FIELDS_BYTES {
            let error = RawFrame::decode_short(body.slice(..len), &before()).unwrap_err();
            assert!(matches!(error, DecodeError::Truncated { .. }), "{len}: {error}");
        }
        // As one of another place, another epoch, another number, or another time it is none.
        let end = before().end.advance(8);
        let later = PgTimestamp(-104);
        let timeline = TimelineId::new(2).unwrap();
        for other in [
            Before { end, ..before() },
            Before { epoch: 4, ..before() },
            Before { sequence: 9, ..before() },
            Before { timeline, ..before() },
            Before { sent_at: later, ..before() },
        ] {
            let frame = RawFrame::decode_short(body.clone(), &other).unwrap();
            assert!(frame.check(&seed(), b"12345678").is_err(), "{other:?}");
        }
        for bit in 16..(SHORT_FIELDS_BYTES * 8) {
            let mut flipped = body.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(frame) = RawFrame::decode_short(flipped.into(), &before()) {
                assert!(frame.check(&seed(), b"12345678").is_err(), "bit {bit}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_into_the_short_form_is_said_in_full() {
        let is_short = |header: &FrameHeader, before| {
            header.encode(&seed(), WalChecksum::of([]), 0, before).as_ref().len() < FRAME_BYTES
        };
        let sent_at = Some(before().sent_at);
        assert!(is_short(&header(), sent_at));
        assert!(!is_short(&header(), None), "nothing came before");
        assert!(!is_short(&header(), Some(PgTimestamp(0))), "the clock went back");
        assert!(!is_short(&header(), Some(PgTimestamp(-1 << 40))), "long ago");
        for header in [
            FrameHeader { wal_end: None, ..header() },
            FrameHeader { wal_end: Some(Lsn::MIN), ..header() },
            FrameHeader { wal_end: Lsn::new(1 << 40), ..header() },
            FrameHeader { kind: FrameKind::Standalone, ..header() },
            FrameHeader { kind: FrameKind::Stream { epoch: 3, sequence: 0 }, ..header() },
        ] {
            assert!(!is_short(&header, sent_at), "{header:?}");
        }
    }

    #[test]
    fn what_is_written_reads_back_and_every_prefix_of_the_fields_is_an_error() {
        for header in [header(), FrameHeader { kind: FrameKind::Standalone, wal_end: None, ..header() }] {
            let body = body(&header, b"12345678");
            let frame = RawFrame::decode(body.clone()).unwrap();
            assert_eq!((frame.header, &frame.payload[..]), (header, &b"12345678"[..]));
            frame.check(&seed(), b"12345678").unwrap();
            for len in 0..FRAME_FIELDS_BYTES {
                let error = RawFrame::decode(body.slice(..len)).unwrap_err();
                assert!(matches!(error, DecodeError::Truncated { .. }), "{len}: {error}");
            }
        }
    }

    #[test]
    fn the_checksum_covers_the_fields_the_wal_and_whose_it_is() {
        let body = body(&header(), b"12345678");
        // Kind and type say that it is a frame at all.
        for bit in 16..COVERED_BYTES * 8 {
            let mut flipped = body.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(frame) = RawFrame::decode(flipped.into()) {
                assert!(frame.check(&seed(), b"12345678").is_err(), "bit {bit}");
            }
        }
        let frame = RawFrame::decode(body).unwrap();
        assert!(frame.check(&seed(), b"12345679").is_err());
        assert!(frame.check(&Seed::new(SystemId(43), HistoryHash::from_wire(7)), b"12345678").is_err());
        assert!(frame.check(&Seed::new(SystemId(42), HistoryHash::from_wire(8)), b"12345678").is_err());
        assert!(frame.check(&Seed::new(SystemId(42), None), b"12345678").is_err());
    }

    #[test]
    fn a_checksum_does_not_depend_on_how_wal_lies_in_memory() {
        let wal: Vec<u8> = (0..10_000_u32).map(|n| (n % 251) as u8).collect();
        for cut in [0, 1, 4_999, 10_000] {
            let (head, tail) = wal.split_at(cut);
            assert_eq!(WalChecksum::of([head, tail]), WalChecksum::of([&wal[..]]));
        }
    }

    #[test]
    fn what_is_beyond_a_limit_is_refused_by_its_fields() {
        let good = body(&header(), b"12345678");
        let with = |at: usize, value: &[u8]| {
            let mut body = good.to_vec();
            body[at..at + value.len()].copy_from_slice(value);
            RawFrame::decode(body.into()).unwrap_err()
        };
        let length_at = COVERED_BYTES - 4;
        let invalid = |error: DecodeError| matches!(error, DecodeError::InvalidValue { .. });
        assert!(invalid(with(length_at, &[0; 4])));
        assert!(invalid(with(length_at, &(1_u32 << 20 | 1).to_be_bytes())));
        assert!(invalid(with(16, &[0xFF; 8])), "beyond the last position");
        assert!(invalid(with(16, &[0; 8])), "no position");
        assert!(invalid(with(2, &[2])), "an unknown flag");
        assert!(invalid(with(2, &[0])), "a standalone frame of an epoch");
        assert!(invalid(with(3, &[3])), "an unknown encoding");
        assert!(invalid(with(12, &[0; 4])), "no timeline");
        let long = [&good[..], &[0; 600]].concat();
        assert!(matches!(RawFrame::decode(long.into()), Err(DecodeError::TooLong { .. })));
    }
}
