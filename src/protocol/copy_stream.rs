//! The receiving side of a stream: messages out of whatever blocks come off the socket, without copying WAL.
//!
//! Blocks are pushed as they were read, split anywhere; WAL comes out as slices of those very blocks, a message's WAL in as
//! many pieces as it spans blocks. Only headers and small messages are copied, into one buffer whose size is limited. It
//! holds the blocks that were pushed and not yet read, so it is bounded if the caller polls until `None` before it pushes
//! again, however long he pauses meanwhile.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

use crate::protocol::link::{LINK_MESSAGE, LINK_MESSAGE_BYTES_MAX};
use crate::protocol::replication::{
    Keepalive, PRIMARY_MESSAGE_BYTES_MAX, PRIMARY_MESSAGE_NAME, PrimaryMessage, WAL_DATA,
    WAL_DATA_HEADER_BYTES, WAL_DATA_NAME, WalDataHeader,
};
use crate::protocol::{DecodeError, FRAME_HEADER_BYTES, WAL_DATA_BYTES_MAX, backend, checked_body_bytes};
use crate::wal::Lsn;

/// What came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamItem {
    /// A message of WAL begins, with this many bytes.
    WalStart(WalDataHeader, u32),
    /// WAL at a position: a slice of a block that was pushed.
    WalBytes {
        /// Position of the first byte.
        at: Lsn,
        /// The WAL; never empty.
        bytes: Bytes,
        /// The number that was pushed with the block.
        block: u64,
    },
    /// The message of WAL is complete.
    WalEnd,
    /// A message of a link, from its kind byte on: a slice of a block if it lies in one, else a copy.
    Link(Bytes),
    /// A sign of life.
    Keepalive(Keepalive),
    /// The sender ends the copy. What follows comes as `Other`.
    CopyDone,
    /// Any other message of a server.
    Other(backend::Message),
}

/// An incremental decoder of a server's side of a replication stream.
///
/// ```text
///            header read                     kind 'w', its header read
///  Header ────────────────▶ Kind (CopyData) ──────────────────────────▶ Wal ──┐
///    ▲ │ ▲                    │ other kinds                                   │ last byte given out
///    │ └─┼──────────▶ Body ◀──┘                                               │
///    │   └─────────────┘ whole                                                │
///    └────────────────────────────────────────────────────────────────────────┘
/// ```
#[derive(Debug, Default)]
pub struct CopyStream {
    blocks: VecDeque<(Bytes, u64)>,
    /// Bytes in `blocks`.
    unread: usize,
    state: State,
    /// Whether messages of a link may come.
    is_link: bool,
    /// Bytes copied out of blocks since the beginning: headers and small messages, never WAL.
    copied: u64,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Header,
    Kind {
        body_bytes: usize,
    },
    Body {
        tag: u8,
        body_bytes: usize,
    },
    Wal {
        at: Lsn,
        left: usize,
    },
    /// After an error nothing more can be read: where the next message begins is not known.
    Failed(DecodeError),
}

impl CopyStream {
    /// A stream at the beginning of a message.
    pub fn new() -> Self {
        Self::default()
    }

    /// A stream at the beginning of a message, in which messages of a link may come.
    pub fn of_link() -> Self {
        Self { is_link: true, ..Self::default() }
    }

    /// Gives the next block, under a number by which the caller knows it again.
    pub fn push(&mut self, bytes: Bytes, block: u64) {
        if !bytes.is_empty() {
            self.unread += bytes.len();
            self.blocks.push_back((bytes, block));
        }
    }

    /// What comes next; `None` when more bytes are needed. An error is final.
    pub fn poll(&mut self) -> Result<Option<StreamItem>, DecodeError> {
        match self.advance() {
            Ok(item) => Ok(item),
            Err(error) => {
                self.state = State::Failed(error.clone());
                Err(error)
            }
        }
    }

    /// What was pushed and not read: what follows the copy, once that has ended.
    pub fn into_rest(self) -> BytesMut {
        let mut rest = BytesMut::with_capacity(self.unread);
        for (block, _) in self.blocks {
            rest.extend_from_slice(&block);
        }
        rest
    }

    /// Bytes copied out of blocks so far: headers and small messages. WAL is never among them.
    pub fn copied_bytes(&self) -> u64 {
        self.copied
    }

    /// Whether everything pushed was read, up to the end of a message.
    pub fn is_at_message_start(&self) -> bool {
        matches!(self.state, State::Header) && self.unread == 0
    }

    fn advance(&mut self) -> Result<Option<StreamItem>, DecodeError> {
        loop {
            match &self.state {
                State::Header => {
                    let mut header = [0; FRAME_HEADER_BYTES];
                    if !self.copy(&mut header) {
                        return Ok(None);
                    }
                    let [tag, len @ ..] = header;
                    self.state = state_after_header(tag, u32::from_be_bytes(len), self.is_link)?;
                }
                State::Kind { body_bytes } => {
                    let body_bytes = *body_bytes;
                    match self.peek() {
                        None => return Ok(None),
                        Some(WAL_DATA) => return self.take_wal_header(body_bytes),
                        Some(LINK_MESSAGE) if self.is_link => {
                            let Some(body) = self.take(body_bytes) else { return Ok(None) };
                            self.state = State::Header;
                            return Ok(Some(StreamItem::Link(body)));
                        }
                        Some(_) => self.state = state_of_other_copy_data(body_bytes)?,
                    }
                }
                State::Body { tag, body_bytes } => {
                    let tag = *tag;
                    let Some(body) = self.take(*body_bytes) else {
                        return Ok(None);
                    };
                    self.state = State::Header;
                    return decode_body(tag, body).map(Some);
                }
                State::Wal { left: 0, .. } => {
                    self.state = State::Header;
                    return Ok(Some(StreamItem::WalEnd));
                }
                State::Wal { at, left } => return Ok(self.take_wal(*at, *left)),
                State::Failed(error) => return Err(error.clone()),
            }
        }
    }

    fn take_wal_header(&mut self, body_bytes: usize) -> Result<Option<StreamItem>, DecodeError> {
        let too_short = DecodeError::Truncated { message: WAL_DATA_NAME, field: "send time" };
        let left = body_bytes.checked_sub(WAL_DATA_HEADER_BYTES).ok_or(too_short)?;
        if left > WAL_DATA_BYTES_MAX {
            let (message, limit) = (WAL_DATA_NAME, WAL_DATA_BYTES_MAX);
            return Err(DecodeError::TooLong { message, len: left, limit });
        }
        let Some(header) = self.take(WAL_DATA_HEADER_BYTES) else {
            return Ok(None);
        };
        // Fits: a CopyData body is limited far below 4 GiB.
        let wal_bytes = u32::try_from(left).unwrap_or(u32::MAX);
        let header = WalDataHeader::decode_body(header, u64::from(wal_bytes))?;
        self.state = State::Wal { at: header.start, left };
        Ok(Some(StreamItem::WalStart(header, wal_bytes)))
    }

    /// The front block's part of the WAL.
    fn take_wal(&mut self, at: Lsn, left: usize) -> Option<StreamItem> {
        let (front, block) = self.blocks.front_mut()?;
        let bytes = front.split_to(left.min(front.len()));
        let block = *block;
        if front.is_empty() {
            self.blocks.pop_front();
        }
        self.unread -= bytes.len();
        let next = at.advance(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        self.state = State::Wal { at: next, left: left - bytes.len() };
        Some(StreamItem::WalBytes { at, bytes, block })
    }

    fn peek(&self) -> Option<u8> {
        self.blocks.front()?.0.first().copied()
    }

    /// The next `len` bytes once all are there: without a copy if they lie in one block and are many.
    fn take(&mut self, len: usize) -> Option<Bytes> {
        if self.unread < len {
            return None;
        }
        if let Some((front, _)) = self.blocks.front_mut()
            && front.len() >= len
            && len >= SHARED_BYTES_MIN
        {
            let taken = front.split_to(len);
            if front.is_empty() {
                self.blocks.pop_front();
            }
            self.unread -= len;
            return Some(taken);
        }
        let mut taken = vec![0; len];
        self.copy(&mut taken).then(|| taken.into())
    }

    /// Fills `target` with the next bytes if there are enough.
    fn copy(&mut self, mut target: &mut [u8]) -> bool {
        let len = target.len();
        if self.unread < len {
            return false;
        }
        while let Some((front, _)) = self.blocks.front_mut()
            && !target.is_empty()
        {
            let (now, later) = target.split_at_mut(front.len().min(target.len()));
            front.copy_to_slice(now);
            target = later;
            if front.is_empty() {
                self.blocks.pop_front();
            }
        }
        self.unread -= len;
        self.copied += u64::try_from(len).unwrap_or(u64::MAX);
        true
    }
}

fn state_after_header(tag: u8, len: u32, is_link: bool) -> Result<State, DecodeError> {
    if !backend::is_known(tag) {
        return Err(backend::unknown(tag));
    }
    let limit = match tag {
        backend::tag::COPY_DATA if is_link => LINK_MESSAGE_BYTES_MAX,
        tag => backend::body_bytes_max(tag),
    };
    let body_bytes = checked_body_bytes("backend message", len, limit)?;
    Ok(match (tag, body_bytes) {
        // An empty CopyData says nothing; walreceiver and pg_receivewal take it too.
        (backend::tag::COPY_DATA, 0) => State::Header,
        (backend::tag::COPY_DATA, body_bytes) => State::Kind { body_bytes },
        (tag, body_bytes) => State::Body { tag, body_bytes },
    })
}

fn state_of_other_copy_data(body_bytes: usize) -> Result<State, DecodeError> {
    if body_bytes > PRIMARY_MESSAGE_BYTES_MAX {
        let (message, limit) = (PRIMARY_MESSAGE_NAME, PRIMARY_MESSAGE_BYTES_MAX);
        return Err(DecodeError::TooLong { message, len: body_bytes, limit });
    }
    Ok(State::Body { tag: backend::tag::COPY_DATA, body_bytes })
}

fn decode_body(tag: u8, body: Bytes) -> Result<StreamItem, DecodeError> {
    if tag == backend::tag::COPY_DATA {
        return match PrimaryMessage::decode(body)? {
            PrimaryMessage::Keepalive(keepalive) => Ok(StreamItem::Keepalive(keepalive)),
            // Its kind was looked at before, so this is unreachable; an error all the same, never a panic.
            PrimaryMessage::WalData(..) => Err(backend::unknown(tag)),
        };
    }
    Ok(match backend::Message::from_body(tag, body)? {
        backend::Message::CopyDone => StreamItem::CopyDone,
        other => StreamItem::Other(other),
    })
}

/// A message that is shorter is copied: it would keep its block alive.
const SHARED_BYTES_MIN: usize = 4096;

/// Body of the fuzz target: cuts the bytes at two places; the same items must come as from the whole.
pub fn fuzz_copy_stream(bytes: &[u8]) {
    let Some((&first, rest)) = bytes.split_first() else { return };
    let cut = rest.len() * usize::from(first) / 255;
    let (head, tail) = rest.split_at(cut);
    for new in [CopyStream::new, CopyStream::of_link] {
        let whole = all_items(new(), &[rest]);
        assert_eq!(all_items(new(), &[head, tail]), whole);
    }
}

/// The items of blocks, with the WAL of a message joined; and the error that ended them.
fn all_items(mut stream: CopyStream, blocks: &[&[u8]]) -> (Vec<StreamItem>, Option<DecodeError>) {
    let mut items: Vec<StreamItem> = Vec::new();
    for block in blocks {
        stream.push(Bytes::copy_from_slice(block), 0);
        loop {
            match stream.poll() {
                Ok(None) => break,
                Ok(Some(item)) => join(&mut items, item),
                Err(error) => return (items, Some(error)),
            }
        }
    }
    (items, None)
}

fn join(items: &mut Vec<StreamItem>, item: StreamItem) {
    match (items.last_mut(), item) {
        (Some(StreamItem::WalBytes { bytes: joined, .. }), StreamItem::WalBytes { bytes, .. }) => {
            *joined = [joined.as_ref(), bytes.as_ref()].concat().into();
        }
        (_, item) => items.push(item),
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;
    use crate::protocol::{ServerError, SqlState, WAL_DATA_BYTES_MAX};
    use crate::wal::PgTimestamp;

    fn header(start: u64) -> WalDataHeader {
        WalDataHeader { start: Lsn::new(start).unwrap(), wal_end: Lsn::new(1 << 40), sent_at: PgTimestamp(1) }
    }

    #[test]
    fn wal_is_given_out_as_slices_of_the_pushed_blocks() {
        let mut wire = header(100).encode(10).to_vec();
        wire.extend_from_slice(b"0123456789");
        let (head, tail) = wire.split_at(33);
        let blocks = [Bytes::copy_from_slice(head), Bytes::copy_from_slice(tail)];
        let mut stream = CopyStream::new();
        let mut pieces = Vec::new();
        for (block, number) in blocks.iter().zip([7, 8]) {
            stream.push(block.clone(), number);
            while let Some(item) = stream.poll().unwrap() {
                if let StreamItem::WalBytes { at, bytes, block: from } = item {
                    assert_eq!(from, number);
                    assert!(block.as_ptr_range().contains(&bytes.as_ptr()));
                    pieces.push((at.get(), bytes));
                }
            }
        }
        assert_eq!(pieces, [(100, Bytes::from_static(b"012")), (103, Bytes::from_static(b"3456789"))]);
        assert_eq!(stream.copied_bytes(), 30, "only the headers");
        assert!(stream.is_at_message_start());
    }

    #[test]
    fn messages_longer_than_accepted_are_refused_by_their_header() {
        let refused = |bytes: &[u8]| {
            let (items, error) = all_items(CopyStream::new(), &[bytes]);
            assert_eq!(items, []);
            error.unwrap()
        };
        let too_long = u32::try_from(WAL_DATA_BYTES_MAX + 1).unwrap();
        assert!(matches!(refused(&header(1).encode(too_long)), DecodeError::TooLong { .. }));
        assert!(matches!(refused(b"d\0\0\x10\0k"), DecodeError::TooLong { .. }));
        assert!(matches!(refused(b"E\0\xff\xff\xff"), DecodeError::TooLong { .. }));
        assert!(matches!(refused(b"d\0\0\0\x10w"), DecodeError::Truncated { .. }));
        assert!(matches!(refused(b"d\0\0\0\x05s"), DecodeError::UnknownKind { .. }));
    }

    #[test]
    fn a_links_messages_come_whole_where_there_is_one_and_are_refused_elsewhere() {
        let message = [&b"d\0\0\x20\x05z"[..], &[7; 0x2000]].concat();
        let (items, error) = all_items(CopyStream::new(), &[&message]);
        assert_eq!(
            (items.len(), error.unwrap().to_string()),
            (0, "streaming message has 8193 bytes, more than 1024".to_owned())
        );
        for cut in [1, 5, 6, 4_000, message.len()] {
            let (head, tail) = message.split_at(cut);
            let (items, error) = all_items(CopyStream::of_link(), &[head, tail, b"d\0\0\0\x05z"]);
            assert_eq!(error, None);
            let [StreamItem::Link(long), StreamItem::Link(short)] = &items[..] else { panic!("{items:?}") };
            assert_eq!((&long[..], &short[..]), (&message[5..], &b"z"[..]));
        }
        let too_long = u32::try_from(LINK_MESSAGE_BYTES_MAX + 5).unwrap().to_be_bytes();
        let (_, error) = all_items(CopyStream::of_link(), &[b"d", &too_long]);
        assert!(matches!(error, Some(DecodeError::TooLong { .. })));
        let too_much = header(1).encode(u32::try_from(WAL_DATA_BYTES_MAX + 1).unwrap());
        let (_, error) = all_items(CopyStream::of_link(), &[&too_much]);
        assert!(matches!(error, Some(DecodeError::TooLong { .. })));
    }

    #[test]
    fn the_end_of_a_stream_comes_as_other_messages() {
        let mut wire = BytesMut::new();
        backend::encode_copy_done(&mut wire);
        backend::encode_command_complete("COPY 0", &mut wire);
        let error = ServerError::fatal(
            SqlState::ADMIN_SHUTDOWN,
            "terminating connection due to administrator command",
        );
        backend::encode_error_response(&error, &mut wire);
        let (items, failure) = all_items(CopyStream::new(), &[b"d\0\0\0\x04", &wire]);
        assert_eq!(failure, None);
        let complete = backend::Message::CommandComplete("COPY 0".to_owned());
        let error = backend::Message::ErrorResponse(error);
        assert_eq!(items, [StreamItem::CopyDone, StreamItem::Other(complete), StreamItem::Other(error)]);
    }
}
