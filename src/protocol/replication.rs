//! Messages inside CopyData: WAL, keepalives, and the replies of a standby.
//!
//! A position of zero is `None` here and zero only on the wire. WAL itself is never copied: its header is written apart
//! from its bytes, and `copy_stream` reads it in pieces.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::protocol::fields::{Fields, frame};
use crate::protocol::{
    DecodeError, FRAME_HEADER_BYTES, STANDBY_MESSAGE_BYTES_MAX, WAL_DATA_BYTES_MAX, backend,
};
use crate::wal::{Lsn, PgTimestamp};

/// Kind byte and fields that precede the WAL in its CopyData.
pub const WAL_DATA_HEADER_BYTES: usize = 25;
/// All that precedes the WAL on the wire.
pub const WAL_DATA_FRAME_BYTES: usize = FRAME_HEADER_BYTES + WAL_DATA_HEADER_BYTES;

/// What a message of WAL says about its bytes (`'w'`, WALData; XLogData in older manuals).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalDataHeader {
    /// Position of the first byte.
    pub start: Lsn,
    /// How far the sender could send now.
    pub wal_end: Option<Lsn>,
    /// The sender's clock.
    pub sent_at: PgTimestamp,
}

impl WalDataHeader {
    /// The beginning of a CopyData message that is followed by `wal_bytes` bytes of WAL.
    pub fn encode(&self, wal_bytes: u32) -> [u8; WAL_DATA_FRAME_BYTES] {
        let mut out = [0; WAL_DATA_FRAME_BYTES];
        let mut fields = out.as_mut_slice();
        fields.put_u8(backend::tag::COPY_DATA);
        fields.put_u32(wal_bytes.saturating_add(COPY_DATA_LEN_WITHOUT_WAL));
        fields.put_u8(WAL_DATA);
        fields.put_u64(self.start.get());
        fields.put_u64(Lsn::to_wire(self.wal_end));
        fields.put_i64(self.sent_at.0);
        out
    }

    /// Reads the fields after the kind byte; what follows them is WAL.
    fn decode(fields: &mut Fields) -> Result<Self, DecodeError> {
        let start = fields.lsn("start")?.ok_or_else(|| fields.invalid("start", 0_u64))?;
        Ok(Self { start, wal_end: fields.lsn("WAL end")?, sent_at: fields.timestamp("send time")? })
    }

    /// Reads the header from a body's first bytes, of which there are [`WAL_DATA_HEADER_BYTES`].
    pub(super) fn decode_body(body: Bytes, wal_bytes: u64) -> Result<Self, DecodeError> {
        let mut fields = Fields::of(WAL_DATA_NAME, body);
        fields.u8("kind")?;
        let header = Self::decode(&mut fields)?;
        match header.start.get().checked_add(wal_bytes) {
            Some(_) => Ok(header),
            None => Err(fields.invalid("start", header.start.get())),
        }
    }
}

/// Value of the length field of a CopyData message whose WAL is empty.
const COPY_DATA_LEN_WITHOUT_WAL: u32 = 4 + 25;
const _: () = assert!(COPY_DATA_LEN_WITHOUT_WAL as usize == size_of::<u32>() + WAL_DATA_HEADER_BYTES);

/// A sign of life of the sending side (`'k'`, primary keepalive).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// How far the sender has sent.
    pub wal_end: Option<Lsn>,
    /// The sender's clock.
    pub sent_at: PgTimestamp,
    /// Whether a status update is wanted at once.
    pub reply_requested: bool,
}

impl Keepalive {
    /// Appends it in its CopyData message.
    pub fn encode(&self, out: &mut BytesMut) {
        frame(out, backend::tag::COPY_DATA, |out| {
            out.put_u8(KEEPALIVE);
            out.put_u64(Lsn::to_wire(self.wal_end));
            out.put_i64(self.sent_at.0);
            out.put_u8(u8::from(self.reply_requested));
        });
    }

    fn decode(mut fields: Fields) -> Result<Self, DecodeError> {
        let keepalive = Self {
            wal_end: fields.lsn("WAL end")?,
            sent_at: fields.timestamp("send time")?,
            reply_requested: fields.u8("reply requested")? != 0,
        };
        fields.finish()?;
        Ok(keepalive)
    }
}

/// What a standby holds (`'r'`). Each position is one after the last byte, and may be unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandbyStatusUpdate {
    /// Given to the operating system.
    pub write: Option<Lsn>,
    /// On stable storage.
    pub flush: Option<Lsn>,
    /// Replayed.
    pub apply: Option<Lsn>,
    /// The standby's clock.
    pub sent_at: PgTimestamp,
    /// Whether a keepalive is wanted at once.
    pub reply_requested: bool,
}

impl StandbyStatusUpdate {
    /// Appends it in its CopyData message.
    pub fn encode(&self, out: &mut BytesMut) {
        frame(out, backend::tag::COPY_DATA, |out| {
            out.put_u8(STATUS_UPDATE);
            out.put_u64(Lsn::to_wire(self.write));
            out.put_u64(Lsn::to_wire(self.flush));
            out.put_u64(Lsn::to_wire(self.apply));
            out.put_i64(self.sent_at.0);
            out.put_u8(u8::from(self.reply_requested));
        });
    }

    fn decode(mut fields: Fields) -> Result<Self, DecodeError> {
        let update = Self {
            write: fields.lsn("write")?,
            flush: fields.lsn("flush")?,
            apply: fields.lsn("apply")?,
            sent_at: fields.timestamp("send time")?,
            reply_requested: fields.u8("reply requested")? != 0,
        };
        fields.finish()?;
        Ok(update)
    }
}

/// The oldest transactions a standby's queries still see (`'h'`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotStandbyFeedback {
    /// The standby's clock.
    pub sent_at: PgTimestamp,
    /// Oldest transaction; below 3 means none.
    pub xmin: u32,
    /// Its epoch.
    pub xmin_epoch: u32,
    /// Oldest transaction that catalogs are read for; below 3 means none.
    pub catalog_xmin: u32,
    /// Its epoch.
    pub catalog_epoch: u32,
}

impl HotStandbyFeedback {
    /// Says that feedback is off, which clears what an earlier message held back.
    pub fn off(sent_at: PgTimestamp) -> Self {
        Self { sent_at, xmin: 0, xmin_epoch: 0, catalog_xmin: 0, catalog_epoch: 0 }
    }

    /// Whether nothing is to be held back.
    pub fn is_off(&self) -> bool {
        self.xmin < FIRST_NORMAL_XID && self.catalog_xmin < FIRST_NORMAL_XID
    }

    /// Appends it in its CopyData message.
    pub fn encode(&self, out: &mut BytesMut) {
        frame(out, backend::tag::COPY_DATA, |out| {
            out.put_u8(HOT_STANDBY_FEEDBACK);
            out.put_i64(self.sent_at.0);
            out.put_u32(self.xmin);
            out.put_u32(self.xmin_epoch);
            out.put_u32(self.catalog_xmin);
            out.put_u32(self.catalog_epoch);
        });
    }

    fn decode(mut fields: Fields) -> Result<Self, DecodeError> {
        let feedback = Self {
            sent_at: fields.timestamp("send time")?,
            xmin: fields.u32("xmin")?,
            xmin_epoch: fields.u32("xmin epoch")?,
            catalog_xmin: fields.u32("catalog xmin")?,
            catalog_epoch: fields.u32("catalog xmin epoch")?,
        };
        fields.finish()?;
        Ok(feedback)
    }
}

/// Transaction ids below this one are not of transactions (`FirstNormalTransactionId`).
pub const FIRST_NORMAL_XID: u32 = 3;

/// What a standby sends in CopyData.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandbyMessage {
    /// `'r'`
    StatusUpdate(StandbyStatusUpdate),
    /// `'h'`
    HotStandbyFeedback(HotStandbyFeedback),
}

impl StandbyMessage {
    /// Reads the body of a CopyData message.
    pub fn decode(body: Bytes) -> Result<Self, DecodeError> {
        const NAME: &str = "standby message";
        if body.len() > STANDBY_MESSAGE_BYTES_MAX {
            return Err(DecodeError::TooLong {
                message: NAME,
                len: body.len(),
                limit: STANDBY_MESSAGE_BYTES_MAX,
            });
        }
        let kind = Fields::of(NAME, body.clone()).u8("kind")?;
        let fields = |name| Fields::of(name, body.slice(1..));
        match kind {
            STATUS_UPDATE => {
                StandbyStatusUpdate::decode(fields("standby status update")).map(Self::StatusUpdate)
            }
            HOT_STANDBY_FEEDBACK => {
                HotStandbyFeedback::decode(fields("hot standby feedback")).map(Self::HotStandbyFeedback)
            }
            // 'p', a request for the primary's status (19), comes only from logical apply workers.
            kind => Err(DecodeError::UnknownKind { message: NAME, kind: u32::from(kind) }),
        }
    }
}

/// What the sending side puts into CopyData, whole. For WAL at speed see [`crate::protocol::CopyStream`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrimaryMessage {
    /// `'w'` and its WAL.
    WalData(WalDataHeader, Bytes),
    /// `'k'`
    Keepalive(Keepalive),
}

impl PrimaryMessage {
    /// Reads the body of a CopyData message.
    pub fn decode(mut body: Bytes) -> Result<Self, DecodeError> {
        match Fields::of(PRIMARY_MESSAGE_NAME, body.clone()).u8("kind")? {
            WAL_DATA => {
                let header = body.split_to(WAL_DATA_HEADER_BYTES.min(body.len()));
                if body.len() > WAL_DATA_BYTES_MAX {
                    let (message, len) = (WAL_DATA_NAME, body.len());
                    return Err(DecodeError::TooLong { message, len, limit: WAL_DATA_BYTES_MAX });
                }
                let wal_bytes = u64::try_from(body.len()).unwrap_or(u64::MAX);
                Ok(Self::WalData(WalDataHeader::decode_body(header, wal_bytes)?, body))
            }
            kind => {
                body.advance(1);
                decode_other(kind, body)
            }
        }
    }
}

fn decode_other(kind: u8, fields: Bytes) -> Result<PrimaryMessage, DecodeError> {
    match kind {
        KEEPALIVE => Keepalive::decode(Fields::of("keepalive", fields)).map(PrimaryMessage::Keepalive),
        // 's', the primary's status (19), is sent only to logical apply workers that asked for it.
        kind => Err(DecodeError::UnknownKind { message: PRIMARY_MESSAGE_NAME, kind: u32::from(kind) }),
    }
}

/// Longest CopyData body of the sending side that is not WAL.
pub(super) const PRIMARY_MESSAGE_BYTES_MAX: usize = 1024;
pub(super) const PRIMARY_MESSAGE_NAME: &str = "streaming message";
pub(super) const WAL_DATA_NAME: &str = "WAL data message";

pub(super) const WAL_DATA: u8 = b'w';
const KEEPALIVE: u8 = b'k';
const STATUS_UPDATE: u8 = b'r';
const HOT_STANDBY_FEEDBACK: u8 = b'h';

/// Body of the fuzz target: what reads must write and read back the same.
pub fn fuzz_replication(bytes: &[u8]) {
    let body = |mut out: BytesMut| {
        out.advance(FRAME_HEADER_BYTES);
        out.freeze()
    };
    let mut out = BytesMut::new();
    if let Ok(message) = StandbyMessage::decode(Bytes::copy_from_slice(bytes)) {
        match message {
            StandbyMessage::StatusUpdate(update) => update.encode(&mut out),
            StandbyMessage::HotStandbyFeedback(feedback) => feedback.encode(&mut out),
        }
        assert_eq!(StandbyMessage::decode(body(out.split())), Ok(message));
    }
    if let Ok(message) = PrimaryMessage::decode(Bytes::copy_from_slice(bytes)) {
        match &message {
            PrimaryMessage::WalData(header, wal) => {
                out.put_slice(&header.encode(u32::try_from(wal.len()).unwrap_or(u32::MAX)));
                out.put_slice(wal);
            }
            PrimaryMessage::Keepalive(keepalive) => keepalive.encode(&mut out),
        }
        assert_eq!(PrimaryMessage::decode(body(out.split())), Ok(message));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_reply_names_its_missing_field() {
        let update = StandbyStatusUpdate {
            write: Lsn::new(9),
            flush: None,
            apply: Lsn::new(7),
            sent_at: PgTimestamp(-1),
            reply_requested: true,
        };
        let mut out = BytesMut::new();
        update.encode(&mut out);
        assert_eq!(out.len(), 39);
        let body = out.freeze().slice(FRAME_HEADER_BYTES..);
        for len in 0..body.len() {
            let error = StandbyMessage::decode(body.slice(..len)).unwrap_err();
            assert!(matches!(error, DecodeError::Truncated { .. }), "{error}");
        }
        let error = StandbyMessage::decode(body.slice(..20)).unwrap_err().to_string();
        assert_eq!(error, "standby status update ends before its field \"apply\"");
        assert_eq!(StandbyMessage::decode(body), Ok(StandbyMessage::StatusUpdate(update)));
    }

    #[test]
    fn unknown_kinds_are_named() {
        for kind in *b"psaw" {
            let error = StandbyMessage::decode(Bytes::copy_from_slice(&[kind, 0, 0])).unwrap_err();
            assert_eq!(error, DecodeError::UnknownKind { message: "standby message", kind: u32::from(kind) });
        }
        let error = PrimaryMessage::decode(Bytes::from_static(b"s")).unwrap_err();
        assert_eq!(error.to_string(), "invalid streaming message type 115");
    }

    #[test]
    fn a_header_and_its_wal_make_one_message() {
        let header = WalDataHeader { start: Lsn::MIN, wal_end: Lsn::new(99), sent_at: PgTimestamp(5) };
        let mut wire = BytesMut::from(&header.encode(3)[..]);
        wire.put_slice(b"abc");
        let message = backend::Message::decode(&mut wire).unwrap().unwrap();
        assert!(wire.is_empty());
        let backend::Message::CopyData(body) = message else { panic!("{message:?}") };
        let expected = PrimaryMessage::WalData(header, Bytes::from_static(b"abc"));
        assert_eq!(PrimaryMessage::decode(body), Ok(expected));
    }

    #[test]
    fn wal_cannot_reach_beyond_the_last_position() {
        let header =
            WalDataHeader { start: Lsn::new(u64::MAX).unwrap(), wal_end: None, sent_at: PgTimestamp(0) };
        let body = [&header.encode(2)[FRAME_HEADER_BYTES..], b"ab"].concat();
        assert!(matches!(PrimaryMessage::decode(body.into()), Err(DecodeError::InvalidValue { .. })));
    }
}
