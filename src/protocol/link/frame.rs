//! A frame: a stretch of WAL, encoded, and all that proves what it is.
//!
//! Owns the layout, the limits and the checksum. The checksum covers every field and the WAL itself, not its encoding, and it
//! begins with the cluster and the history: a frame that was made of other WAL, or for another place, is never taken for
//! this one. It is put together from a checksum of the WAL alone, so that frames can be shared by links that differ in what
//! their fields say.
//!
//! ```text
//!  'z' 'f' | flags | encoding | epoch | sequence | timeline | start | WAL end | sent at | length | checksum | payload
//!   1   1      1        1         4         4          4        8        8         8        4         4
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
#[derive(Clone, Debug, Default)]
pub struct WalChecksum(Hasher);

impl WalChecksum {
    /// Of pieces that follow one another.
    pub fn of<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hasher = Hasher::new();
        for piece in pieces {
            hasher.update(piece);
        }
        Self(hasher)
    }
}

impl FrameHeader {
    /// All that precedes the payload on the wire, the CopyData header included.
    pub fn encode(&self, seed: &Seed, wal: &WalChecksum, payload_bytes: usize) -> [u8; FRAME_BYTES] {
        let mut out = [0; FRAME_BYTES];
        let mut fields = out.as_mut_slice();
        fields.put_u8(backend::tag::COPY_DATA);
        let body = FRAME_FIELDS_BYTES + payload_bytes;
        // Bounded far below what the field holds.
        fields.put_u32(u32::try_from(size_of::<u32>() + body).unwrap_or(u32::MAX));
        self.put(&mut fields);
        let (covered, checksum) = out.split_at_mut(FRAME_BYTES - size_of::<u32>());
        let mut hasher = seed.0.clone();
        hasher.update(covered.get(FRAME_HEADER_BYTES..).unwrap_or_default());
        hasher.combine(&wal.0);
        checksum.copy_from_slice(&hasher.finalize().to_be_bytes());
        out
    }

    /// The fields that the checksum covers.
    fn put(&self, out: &mut &mut [u8]) {
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
    }

    /// Bytes of WAL.
    pub fn wal_bytes(&self) -> usize {
        usize::try_from(self.range.bytes()).unwrap_or(usize::MAX)
    }
}

/// A frame as it came: its fields are within their limits, its content is not looked at yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RawFrame {
    pub(super) header: FrameHeader,
    /// What the checksum covers besides the WAL.
    covered: Bytes,
    checksum: u32,
    pub(super) payload: Bytes,
}

impl RawFrame {
    /// Reads a message's body, from its kind byte on.
    pub(super) fn decode(mut body: Bytes) -> Result<Self, DecodeError> {
        let covered = body.slice(..COVERED_BYTES.min(body.len()));
        let mut fields = Fields::of(FRAME_NAME, covered.clone());
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
        let invalid = |field, value: u32| fields.invalid(field, value);
        let kind = match flags {
            0 if epoch == 0 && sequence == 0 => FrameKind::Standalone,
            STREAM_FLAG => FrameKind::Stream { epoch, sequence },
            other => return Err(invalid("flags", u32::from(other))),
        };
        let encoding =
            Encoding::from_wire(encoding).ok_or_else(|| invalid("encoding", u32::from(encoding)))?;
        let timeline = TimelineId::new(timeline).ok_or_else(|| invalid("timeline", timeline))?;
        if usize::try_from(length).unwrap_or(usize::MAX) > WAL_DATA_BYTES_MAX {
            return Err(invalid("length", length));
        }
        let end = start.get().checked_add(u64::from(length)).and_then(Lsn::new);
        let range = end.and_then(|end| LsnRange::new(start, end)).ok_or_else(|| invalid("length", length))?;
        body.advance(covered.len());
        let too_short = DecodeError::Truncated { message: FRAME_NAME, field: "checksum" };
        let checksum = body.try_get_u32().map_err(|_| too_short)?;
        let header = FrameHeader { kind, encoding, timeline, range, wal_end, sent_at };
        let limit = payload_bytes_max(header.wal_bytes());
        if body.len() > limit {
            return Err(DecodeError::TooLong { message: FRAME_NAME, len: body.len(), limit });
        }
        Ok(Self { header, covered, checksum, payload: body })
    }

    /// Whether this is the WAL that was sent, where and of what it was sent.
    pub(super) fn check(&self, seed: &Seed, wal: &[u8]) -> Result<(), LinkError> {
        let mut hasher = seed.0.clone();
        hasher.update(&self.covered);
        hasher.update(wal);
        if hasher.finalize() != self.checksum {
            return Err(LinkError::Checksum { at: self.header.range.start() });
        }
        Ok(())
    }
}

/// Longest payload of a frame of so much WAL: data that does not shrink grows by what its encoding adds.
pub const fn payload_bytes_max(wal_bytes: usize) -> usize {
    wal_bytes + wal_bytes / 64 + 256
}

pub(super) const FRAME: u8 = b'f';
const FRAME_NAME: &str = "link frame";
const STREAM_FLAG: u8 = 1;

/// Bytes of the fields that the checksum covers.
const COVERED_BYTES: usize = 4 + 3 * size_of::<u32>() + 3 * size_of::<u64>() + size_of::<u32>();
/// All that precedes the payload in the message's body.
pub const FRAME_FIELDS_BYTES: usize = COVERED_BYTES + size_of::<u32>();
/// All that precedes the payload on the wire.
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
        let head = header.encode(&seed(), &WalChecksum::of([wal]), wal.len());
        let body = [&head[FRAME_HEADER_BYTES..], wal].concat();
        assert_eq!(u32::from_be_bytes(head[1..5].try_into().unwrap()) as usize, 4 + body.len());
        body.into()
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
        for bit in 0..COVERED_BYTES * 8 {
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
    fn a_checksum_is_put_together_from_any_pieces() {
        let wal: Vec<u8> = (0..10_000_u32).map(|n| (n % 251) as u8).collect();
        let start = Lsn::new(0x100_0000).unwrap();
        let range = LsnRange::new(start, start.advance(wal.len() as u64)).unwrap();
        let header = FrameHeader { range, ..header() };
        for cut in [0, 1, 4_999, 10_000] {
            let (head, tail) = wal.split_at(cut);
            let fields = header.encode(&seed(), &WalChecksum::of([head, tail]), wal.len());
            let body = [&fields[FRAME_HEADER_BYTES..], &wal].concat();
            RawFrame::decode(body.into()).unwrap().check(&seed(), &wal).unwrap();
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
