//! What clients send: the first packet of a connection, and the messages after it.
//!
//! Decodes for the listening side and encodes for the connecting one. Bodies of the extended query protocol are skipped:
//! a replication connection refuses them by their type alone.

mod options;
mod startup;

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};

use crate::protocol::fields::{Fields, frame, put_text};
use crate::protocol::{DecodeError, take_frame};

pub use options::parse_options;
pub(in crate::protocol) use startup::truncate_identifier;
pub use startup::{
    CancelKey, CancelRequest, FirstPacket, InvalidReplication, Negotiation, PARAMETERS_MAX, ProtocolVersion,
    ReplicationMode, Startup, UnsupportedProtocol, parse_boolean,
};

/// A message after the first packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A simple query: a replication command or SQL, without its NUL.
    Query(Bytes),
    /// A password or SASL message; which of them only the state of authentication tells.
    Password(Password),
    /// Data of a copy.
    CopyData(Bytes),
    /// The client's copy is complete.
    CopyDone,
    /// The client's copy failed, with its reason.
    CopyFail(Bytes),
    /// Farewell.
    Terminate,
    /// End of an extended query; answered by ReadyForQuery.
    Sync,
    /// Asks for pending output of an extended query.
    Flush,
    /// A fast-path function call.
    FunctionCall,
    /// Parse, Bind, Describe, Execute or Close, by its type byte.
    Extended(u8),
}

impl Message {
    /// Takes one message off the front of `buffer`; `None` when it has not arrived whole. `body_bytes_max` depends on the
    /// phase of the connection: [`PASSWORD_BYTES_MAX`], [`QUERY_BYTES_MAX`] or [`STANDBY_MESSAGE_BYTES_MAX`].
    ///
    /// [`PASSWORD_BYTES_MAX`]: crate::protocol::PASSWORD_BYTES_MAX
    /// [`QUERY_BYTES_MAX`]: crate::protocol::QUERY_BYTES_MAX
    /// [`STANDBY_MESSAGE_BYTES_MAX`]: crate::protocol::STANDBY_MESSAGE_BYTES_MAX
    pub fn decode(buffer: &mut BytesMut, body_bytes_max: usize) -> Result<Option<Self>, DecodeError> {
        // An unknown type is refused before its body is waited for: it may be anything, also another protocol.
        if let Some(&tag) = buffer.first()
            && !is_known(tag)
        {
            return Err(unknown(tag));
        }
        let Some((tag, body)) = take_frame(buffer, "frontend message", |_| body_bytes_max)? else {
            return Ok(None);
        };
        Self::from_body(tag, body).map(Some)
    }

    fn from_body(tag: u8, body: Bytes) -> Result<Self, DecodeError> {
        match tag {
            tag::QUERY => only_text("Query", "query", body).map(Self::Query),
            tag::PASSWORD => Ok(Self::Password(Password(body))),
            tag::COPY_DATA => Ok(Self::CopyData(body)),
            tag::COPY_DONE => empty("CopyDone", body, Self::CopyDone),
            tag::COPY_FAIL => only_text("CopyFail", "reason", body).map(Self::CopyFail),
            tag::TERMINATE => empty("Terminate", body, Self::Terminate),
            tag::SYNC => empty("Sync", body, Self::Sync),
            tag::FLUSH => empty("Flush", body, Self::Flush),
            tag::FUNCTION_CALL => Ok(Self::FunctionCall),
            tag if EXTENDED.contains(&tag) => Ok(Self::Extended(tag)),
            tag => Err(unknown(tag)),
        }
    }

    /// Appends the message. The messages whose bodies are not kept are written with an empty one.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Query(query) => frame(out, tag::QUERY, |out| put_text(out, query)),
            Self::Password(Password(body)) => frame(out, tag::PASSWORD, |out| out.put_slice(body)),
            Self::CopyData(data) => frame(out, tag::COPY_DATA, |out| out.put_slice(data)),
            Self::CopyDone => frame(out, tag::COPY_DONE, |_| ()),
            Self::CopyFail(reason) => frame(out, tag::COPY_FAIL, |out| put_text(out, reason)),
            Self::Terminate => frame(out, tag::TERMINATE, |_| ()),
            Self::Sync => frame(out, tag::SYNC, |_| ()),
            Self::Flush => frame(out, tag::FLUSH, |_| ()),
            Self::FunctionCall => frame(out, tag::FUNCTION_CALL, |_| ()),
            Self::Extended(tag) => frame(out, *tag, |_| ()),
        }
    }
}

/// Appends a simple query.
pub fn encode_query(query: &str, out: &mut BytesMut) {
    frame(out, tag::QUERY, |out| put_text(out, query));
}

fn is_known(tag: u8) -> bool {
    b"QpdcfXSHF".contains(&tag) || EXTENDED.contains(&tag)
}

fn unknown(tag: u8) -> DecodeError {
    DecodeError::UnknownKind { message: "frontend message", kind: u32::from(tag) }
}

fn only_text(message: &'static str, field: &'static str, body: Bytes) -> Result<Bytes, DecodeError> {
    let mut fields = Fields::of(message, body);
    let text = fields.terminated(field)?;
    fields.finish()?;
    Ok(text)
}

fn empty(message: &'static str, body: Bytes, value: Message) -> Result<Message, DecodeError> {
    Fields::of(message, body).finish()?;
    Ok(value)
}

/// The body of a password message: a secret, so it is not printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(Bytes);

impl Password {
    /// A cleartext password, or the answer to an MD5 request.
    pub fn of_text(password: impl AsRef<[u8]>) -> Self {
        let mut body = BytesMut::new();
        put_text(&mut body, password);
        Self(body.freeze())
    }

    /// The first message of a SASL exchange.
    pub fn of_sasl_initial(mechanism: &str, data: &[u8]) -> Self {
        let mut body = BytesMut::new();
        put_text(&mut body, mechanism);
        body.put_i32(i32::try_from(data.len()).unwrap_or(i32::MAX));
        body.put_slice(data);
        Self(body.freeze())
    }

    /// A later message of a SASL exchange.
    pub fn of_sasl(data: impl Into<Bytes>) -> Self {
        Self(data.into())
    }

    /// Reads a cleartext password, or the answer to an MD5 request.
    pub fn text(&self) -> Result<Bytes, DecodeError> {
        only_text("PasswordMessage", "password", self.0.clone())
    }

    /// Reads the first message of a SASL exchange: the mechanism, and the client's first data unless it is left out.
    pub fn sasl_initial(&self) -> Result<(String, Option<Bytes>), DecodeError> {
        let mut fields = Fields::of("SASLInitialResponse", self.0.clone());
        let mechanism = fields.text("mechanism")?;
        let data = match fields.i32("data length")? {
            -1 => None,
            len => {
                let len =
                    usize::try_from(len).map_err(|_| fields.invalid("data length", len.unsigned_abs()))?;
                Some(fields.bytes(len, "data")?)
            }
        };
        fields.finish()?;
        Ok((mechanism, data))
    }

    /// A later message of a SASL exchange, whole.
    pub fn sasl(&self) -> &Bytes {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Password({} bytes)", self.0.len())
    }
}

/// Type bytes.
mod tag {
    pub(super) const QUERY: u8 = b'Q';
    pub(super) const PASSWORD: u8 = b'p';
    pub(super) const COPY_DATA: u8 = b'd';
    pub(super) const COPY_DONE: u8 = b'c';
    pub(super) const COPY_FAIL: u8 = b'f';
    pub(super) const TERMINATE: u8 = b'X';
    pub(super) const SYNC: u8 = b'S';
    pub(super) const FLUSH: u8 = b'H';
    pub(super) const FUNCTION_CALL: u8 = b'F';
}

/// Parse, Bind, Describe, Execute, Close.
const EXTENDED: [u8; 5] = *b"PBDEC";

/// Body of the fuzz target: decodes everything a client could send, as each phase would.
pub fn fuzz_frontend(bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    while let Ok(Some(packet)) = FirstPacket::decode(&mut buffer) {
        if let FirstPacket::Startup(startup) = &packet {
            let _ = (startup.user(), startup.replication(), startup.negotiate(&[]));
            let _ = startup.settings();
        }
        let mut again = BytesMut::new();
        packet.encode(&mut again);
        assert_eq!(FirstPacket::decode(&mut again), Ok(Some(packet)));
    }
    let mut buffer = BytesMut::from(bytes);
    while let Ok(Some(message)) = Message::decode(&mut buffer, crate::protocol::QUERY_BYTES_MAX) {
        if let Message::Password(password) = &message {
            let _ = (password.text(), password.sasl_initial());
        }
        let mut again = BytesMut::new();
        message.encode(&mut again);
        assert_eq!(Message::decode(&mut again, crate::protocol::QUERY_BYTES_MAX), Ok(Some(message)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{QUERY_BYTES_MAX, STANDBY_MESSAGE_BYTES_MAX};

    #[test]
    fn a_message_is_taken_only_whole_and_a_long_one_is_refused_by_its_header() {
        let mut whole = BytesMut::new();
        encode_query("IDENTIFY_SYSTEM", &mut whole);
        for len in 0..whole.len() {
            let mut part = BytesMut::from(&whole[..len]);
            assert_eq!(Message::decode(&mut part, QUERY_BYTES_MAX), Ok(None));
            assert_eq!(part.len(), len, "an incomplete message stays in the buffer");
        }
        let query = Message::Query(Bytes::from_static(b"IDENTIFY_SYSTEM"));
        assert_eq!(Message::decode(&mut whole, QUERY_BYTES_MAX), Ok(Some(query)));
        let mut header = BytesMut::from(&b"d\x7f\xff\xff\xff"[..]);
        let refused = Message::decode(&mut header, STANDBY_MESSAGE_BYTES_MAX);
        assert!(matches!(refused, Err(DecodeError::TooLong { limit: STANDBY_MESSAGE_BYTES_MAX, .. })));
    }

    #[test]
    fn impossible_lengths_and_unknown_types_are_refused_at_once() {
        for len in 0..4_u8 {
            let mut bytes = BytesMut::from(&[b'Q', 0, 0, 0, len][..]);
            assert!(matches!(Message::decode(&mut bytes, 100), Err(DecodeError::InvalidLength { .. })));
        }
        let mut bytes = BytesMut::from(&b"G"[..]);
        let error = Message::decode(&mut bytes, 100).unwrap_err();
        assert_eq!(error, DecodeError::UnknownKind { message: "frontend message", kind: u32::from(b'G') });
    }

    #[test]
    fn a_sasl_first_message_is_read_and_a_password_is_never_printed() {
        let password = Password::of_sasl_initial("SCRAM-SHA-256", b"n,,n=,r=x");
        let expected = ("SCRAM-SHA-256".to_owned(), Some(Bytes::from_static(b"n,,n=,r=x")));
        assert_eq!(password.sasl_initial(), Ok(expected));
        assert_eq!(Password::of_text("hunter2").text(), Ok(Bytes::from_static(b"hunter2")));
        assert_eq!(format!("{:?}", Password::of_text("hunter2")), "Password(8 bytes)");
    }
}
