//! The first message of a link's stream: whose WAL follows.
//!
//! Owns its layout and its checksum. It says of what cluster, timeline and history the WAL is; the receiver takes nothing
//! before it has compared that with what it holds.

use bytes::{BufMut, Bytes, BytesMut};
use crc32fast::Hasher;

use crate::protocol::fields::{Fields, frame};
use crate::protocol::link::{Encoding, LINK_MESSAGE, LINK_MESSAGE_NAME, LinkError};
use crate::protocol::{DecodeError, backend};
use crate::wal::{HistoryHash, SystemId, TimelineId};

/// Whose WAL a link carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The cluster.
    pub system_id: SystemId,
    /// The timeline of the stream.
    pub timeline: TimelineId,
    /// Its history; `None` where the sender does not know all of it.
    pub history: Option<HistoryHash>,
    /// How the sender would like to encode WAL; each frame says how it was.
    pub encoding: Encoding,
}

impl Hello {
    /// Appends it in its CopyData message.
    pub fn encode(&self, out: &mut BytesMut) {
        frame(out, backend::tag::COPY_DATA, |out| {
            let start = out.len();
            out.put_u8(LINK_MESSAGE);
            out.put_u8(HELLO);
            out.put_u8(HELLO_VERSION);
            out.put_u8(self.encoding.to_wire());
            out.put_u64(self.system_id.0);
            out.put_u32(self.timeline.get());
            out.put_u64(HistoryHash::to_wire(self.history));
            let checksum = crc32fast::hash(out.get(start..).unwrap_or_default());
            out.put_u32(checksum);
        });
    }

    /// Reads a message's body, from its kind byte on.
    pub(super) fn decode(body: &Bytes) -> Result<Self, LinkError> {
        let mut fields = Fields::of(HELLO_NAME, body.clone());
        fields.u8("kind")?;
        fields.u8("type")?;
        let version = fields.u8("version")?;
        let encoding = fields.u8("encoding")?;
        let system_id = SystemId(fields.u64("system identifier")?);
        let timeline = fields.u32("timeline")?;
        let history = HistoryHash::from_wire(fields.u64("history")?);
        let checksum = fields.u32("checksum")?;
        let invalid = fields.invalid("timeline", timeline);
        let invalid_encoding = fields.invalid("encoding", encoding);
        fields.finish()?;
        let mut hasher = Hasher::new();
        hasher.update(body.get(..body.len() - size_of::<u32>()).unwrap_or_default());
        if hasher.finalize() != checksum {
            return Err(LinkError::HelloChecksum);
        }
        if version != HELLO_VERSION {
            return Err(LinkError::Version(version));
        }
        let timeline = TimelineId::new(timeline).ok_or(invalid)?;
        let encoding = Encoding::from_wire(encoding).ok_or(invalid_encoding)?;
        Ok(Self { system_id, timeline, history, encoding })
    }
}

/// What follows the kind byte in each message of a link.
pub(super) fn message_type(body: &Bytes) -> Result<u8, DecodeError> {
    let mut fields = Fields::of(LINK_MESSAGE_NAME, body.clone());
    let kind = fields.u8("kind")?;
    if kind != LINK_MESSAGE {
        return Err(DecodeError::UnknownKind { message: LINK_MESSAGE_NAME, kind: u32::from(kind) });
    }
    fields.u8("type")
}

pub(super) const HELLO: u8 = b'h';
const HELLO_NAME: &str = "link hello";
const HELLO_VERSION: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::FRAME_HEADER_BYTES;
    use crate::wal::TimelineHistory;

    fn hello() -> Hello {
        Hello {
            system_id: SystemId(7_512_345_678_901_234_567),
            timeline: TimelineId::FIRST,
            history: Some(HistoryHash::of(&TimelineHistory::of_first())),
            encoding: Encoding::Zstd,
        }
    }

    fn body(hello: &Hello) -> Bytes {
        let mut out = BytesMut::new();
        hello.encode(&mut out);
        out.freeze().slice(FRAME_HEADER_BYTES..)
    }

    #[test]
    fn what_is_written_reads_back_and_every_prefix_is_an_error() {
        for hello in [hello(), Hello { history: None, encoding: Encoding::Lz4, ..hello() }] {
            let body = body(&hello);
            assert_eq!(Hello::decode(&body), Ok(hello));
            for len in 0..body.len() {
                let error = Hello::decode(&body.slice(..len)).unwrap_err();
                assert!(matches!(error, LinkError::Message(DecodeError::Truncated { .. })), "{error}");
            }
            let long = [&body[..], &[0]].concat();
            assert!(Hello::decode(&long.into()).is_err());
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let body = body(&hello());
        for bit in 16..body.len() * 8 {
            let mut flipped = body.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Hello::decode(&flipped.into()), Err(LinkError::HelloChecksum), "bit {bit}");
        }
    }

    #[test]
    fn a_later_version_is_named() {
        let mut body = body(&hello()).to_vec();
        body[2] = 9;
        let end = body.len() - 4;
        let checksum = crc32fast::hash(&body[..end]);
        body[end..].copy_from_slice(&checksum.to_be_bytes());
        assert_eq!(Hello::decode(&body.into()), Err(LinkError::Version(9)));
    }
}
