//! Bytes on the wire: what clients and servers say to each other, and the limits of what is listened to.
//!
//! Everything here is pure: bytes in, values out. A frame is one tag byte, a length, and a body; the very first packet of
//! a connection has no tag. Decoding is total (no message of a peer can panic), bounded (a length is compared with a named
//! limit before anything is kept for it), and names the message and the field that were wrong. Nothing here reserves memory
//! for bytes that have not arrived, reads a clock, or decides what to answer.

pub mod acknowledge_policy;
pub mod backend;
pub mod command;
pub mod copy_stream;
pub mod feedback;
mod fields;
pub mod frontend;
pub mod instances;
pub mod link;
pub mod md5;
pub mod replication;
pub mod scram;
pub mod sqlstate;

use bytes::{Buf, Bytes, BytesMut};

pub use backend::ServerError;
pub use command::Command;
pub use copy_stream::{CopyStream, StreamItem};
pub use sqlstate::SqlState;

use crate::wal::timeline::HISTORY_BYTES_MAX;

/// Tag byte and length field that precede every message's body.
pub const FRAME_HEADER_BYTES: usize = 5;
/// Longest first packet after its length field (`MAX_STARTUP_PACKET_LENGTH`).
pub const STARTUP_PACKET_BYTES_MAX: usize = 10_000;
/// Longest password or SASL message a client may send.
pub const PASSWORD_BYTES_MAX: usize = 10_000;
/// Longest authentication request a server may send (`PG_MAX_AUTH_TOKEN_LENGTH`).
pub const AUTHENTICATION_BYTES_MAX: usize = 65_535;
/// Longest query a client may send; replication commands have some hundred bytes.
pub const QUERY_BYTES_MAX: usize = 64 << 10;
/// Longest message a standby may send while WAL is streamed to it; the longest that exists has 34 bytes.
pub const STANDBY_MESSAGE_BYTES_MAX: usize = 1024;
/// Most WAL accepted in one message. `walsender.c` sends 128 KiB; others send more.
pub const WAL_DATA_BYTES_MAX: usize = 1 << 20;
/// Most WAL put into one message, as `walsender.c` does (`MAX_SEND_SIZE`).
pub const WAL_DATA_SENT_BYTES_MAX: usize = 128 << 10;
/// Longest CopyData body of a server: a WAL message with its header.
pub const COPY_DATA_BYTES_MAX: usize = WAL_DATA_BYTES_MAX + replication::WAL_DATA_HEADER_BYTES;
/// Longest row a server may send: it can hold a timeline history file.
pub const DATA_ROW_BYTES_MAX: usize = HISTORY_BYTES_MAX + 4096;
/// Longest other message of a server.
pub const BACKEND_MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Longest cancel key (protocol 3.2).
pub const CANCEL_KEY_BYTES_MAX: usize = 256;

const _: () = assert!(WAL_DATA_SENT_BYTES_MAX <= WAL_DATA_BYTES_MAX);
const _: () = assert!(PASSWORD_BYTES_MAX <= QUERY_BYTES_MAX);

/// A peer's bytes are not a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message ends before a field does.
    #[error("{message} ends before its field \"{field}\"")]
    Truncated {
        /// The message's name.
        message: &'static str,
        /// The field that is missing or cut.
        field: &'static str,
    },
    /// The length field is below the least possible.
    #[error("invalid length {len} of {message}")]
    InvalidLength {
        /// The message's name.
        message: &'static str,
        /// The length field's value.
        len: u32,
    },
    /// The message is longer than is accepted.
    #[error("{message} has {len} bytes, more than {limit}")]
    TooLong {
        /// The message's name.
        message: &'static str,
        /// Bytes announced.
        len: usize,
        /// Bytes accepted.
        limit: usize,
    },
    /// Bytes follow the last field.
    #[error("{message} has {bytes} bytes after its last field")]
    TrailingBytes {
        /// The message's name.
        message: &'static str,
        /// How many bytes.
        bytes: usize,
    },
    /// A text is not UTF-8.
    #[error("field \"{field}\" of {message} is not valid UTF-8")]
    NotUtf8 {
        /// The message's name.
        message: &'static str,
        /// The field.
        field: &'static str,
    },
    /// A field has a value that it cannot have.
    #[error("field \"{field}\" of {message} has invalid value {value}")]
    InvalidValue {
        /// The message's name.
        message: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The message's tag or kind is not known.
    #[error("invalid {message} type {kind}")]
    UnknownKind {
        /// What kind of message was looked for.
        message: &'static str,
        /// The tag or kind.
        kind: u32,
    },
}

impl From<&DecodeError> for ServerError {
    /// What a client is told before the connection is closed.
    fn from(error: &DecodeError) -> Self {
        Self::fatal(SqlState::PROTOCOL_VIOLATION, error.to_string())
    }
}

/// Takes one whole message off the front of `buffer`; `None` when it has not arrived whole. A body longer than
/// `body_bytes_max` answers for its tag is refused as soon as its header is there.
fn take_frame(
    buffer: &mut BytesMut,
    message: &'static str,
    body_bytes_max: impl FnOnce(u8) -> usize,
) -> Result<Option<(u8, Bytes)>, DecodeError> {
    let mut header = buffer.as_ref();
    let (Ok(tag), Ok(len)) = (header.try_get_u8(), header.try_get_u32()) else {
        return Ok(None);
    };
    let body_bytes = checked_body_bytes(message, len, body_bytes_max(tag))?;
    if header.len() < body_bytes {
        return Ok(None);
    }
    buffer.advance(FRAME_HEADER_BYTES);
    Ok(Some((tag, buffer.split_to(body_bytes).freeze())))
}

/// Length of a body by its length field, which counts itself.
fn checked_body_bytes(message: &'static str, len: u32, limit: usize) -> Result<usize, DecodeError> {
    let body = len.checked_sub(4).ok_or(DecodeError::InvalidLength { message, len })?;
    let body = usize::try_from(body).unwrap_or(usize::MAX);
    if body > limit {
        return Err(DecodeError::TooLong { message, len: body, limit });
    }
    Ok(body)
}
