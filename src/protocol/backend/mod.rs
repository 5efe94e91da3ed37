//! What servers send.
//!
//! Decodes for the side that connects (to a primary or another relay) and encodes for the side that listens. Bodies of
//! CopyData are handed on as they are; `replication` and `copy_stream` know what is in them.

mod authentication;
mod encode;
mod error;
mod rows;

use bytes::{Bytes, BytesMut};

use crate::protocol::fields::Fields;
use crate::protocol::frontend::{CancelKey, ProtocolVersion};
use crate::protocol::{
    AUTHENTICATION_BYTES_MAX, BACKEND_MESSAGE_BYTES_MAX, COPY_DATA_BYTES_MAX, DATA_ROW_BYTES_MAX,
    DecodeError, take_frame,
};

pub use authentication::Authentication;
pub use encode::*;
pub use error::{ServerError, Severity};
pub use rows::{Column, ColumnType, DataRow};

/// A message of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A step of authentication.
    Authentication(Authentication),
    /// A setting's value, at the start and whenever it changes.
    ParameterStatus {
        /// The setting.
        name: String,
        /// Its value.
        value: String,
    },
    /// What a cancel request has to name.
    BackendKeyData {
        /// The server process; unique among the server's connections.
        process_id: u32,
        /// The secret.
        key: CancelKey,
    },
    /// The next query may come.
    ReadyForQuery(TransactionStatus),
    /// Columns of the rows that follow.
    RowDescription(Vec<Column>),
    /// A row.
    DataRow(DataRow),
    /// A command is complete, with its tag.
    CommandComplete(String),
    /// The query was empty.
    EmptyQueryResponse,
    /// A command failed, or the session.
    ErrorResponse(ServerError),
    /// A message that is no error.
    NoticeResponse(ServerError),
    /// The client shall send a copy.
    CopyInResponse(CopyFormat),
    /// The server sends a copy.
    CopyOutResponse(CopyFormat),
    /// Both send: WAL one way, replies the other.
    CopyBothResponse(CopyFormat),
    /// Data of a copy.
    CopyData(Bytes),
    /// The server's copy is complete.
    CopyDone,
    /// The server speaks another protocol version, or knows not every extension.
    NegotiateProtocolVersion(NegotiateProtocolVersion),
}

impl Message {
    /// Takes one message off the front of `buffer`; `None` when it has not arrived whole. Each type has its own limit.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, DecodeError> {
        if let Some(&tag) = buffer.first()
            && !is_known(tag)
        {
            return Err(unknown(tag));
        }
        let Some((tag, body)) = take_frame(buffer, "backend message", body_bytes_max)? else {
            return Ok(None);
        };
        Self::from_body(tag, body).map(Some)
    }

    /// Reads the body of a message whose type byte is `tag`.
    pub(in crate::protocol) fn from_body(tag: u8, body: Bytes) -> Result<Self, DecodeError> {
        match tag {
            tag::AUTHENTICATION => Authentication::decode(body).map(Self::Authentication),
            tag::PARAMETER_STATUS => decode_parameter_status(body),
            tag::BACKEND_KEY_DATA => decode_backend_key_data(body),
            tag::READY_FOR_QUERY => TransactionStatus::decode(body).map(Self::ReadyForQuery),
            tag::ROW_DESCRIPTION => rows::decode_columns(body).map(Self::RowDescription),
            tag::DATA_ROW => DataRow::decode(body).map(Self::DataRow),
            tag::COMMAND_COMPLETE => decode_command_complete(body),
            tag::EMPTY_QUERY_RESPONSE => empty("EmptyQueryResponse", body, Self::EmptyQueryResponse),
            tag::ERROR_RESPONSE => ServerError::decode("ErrorResponse", body).map(Self::ErrorResponse),
            tag::NOTICE_RESPONSE => ServerError::decode("NoticeResponse", body).map(Self::NoticeResponse),
            tag::COPY_IN_RESPONSE => CopyFormat::decode("CopyInResponse", body).map(Self::CopyInResponse),
            tag::COPY_OUT_RESPONSE => CopyFormat::decode("CopyOutResponse", body).map(Self::CopyOutResponse),
            tag::COPY_BOTH_RESPONSE => {
                CopyFormat::decode("CopyBothResponse", body).map(Self::CopyBothResponse)
            }
            tag::COPY_DATA => Ok(Self::CopyData(body)),
            tag::COPY_DONE => empty("CopyDone", body, Self::CopyDone),
            tag::NEGOTIATE_PROTOCOL_VERSION => {
                NegotiateProtocolVersion::decode(body).map(Self::NegotiateProtocolVersion)
            }
            tag => Err(unknown(tag)),
        }
    }

    /// Appends the message.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Authentication(request) => encode_authentication(request, out),
            Self::ParameterStatus { name, value } => encode_parameter_status(name, value, out),
            Self::BackendKeyData { process_id, key } => encode_backend_key_data(*process_id, key, out),
            Self::ReadyForQuery(status) => encode_ready_for_query(*status, out),
            Self::RowDescription(columns) => encode_row_description(columns, out),
            Self::DataRow(row) => encode_data_row(row.values(), out),
            Self::CommandComplete(tag) => encode_command_complete(tag, out),
            Self::EmptyQueryResponse => encode_empty_query_response(out),
            Self::ErrorResponse(error) => encode_error_response(error, out),
            Self::NoticeResponse(notice) => encode_notice_response(notice, out),
            Self::CopyInResponse(format) => encode_copy_in_response(format, out),
            Self::CopyOutResponse(format) => encode_copy_out_response(format, out),
            Self::CopyBothResponse(format) => encode_copy_both_response(format, out),
            Self::CopyData(data) => encode_copy_data(data, out),
            Self::CopyDone => encode_copy_done(out),
            Self::NegotiateProtocolVersion(answer) => encode_negotiate_protocol_version(answer, out),
        }
    }
}

/// Type bytes.
pub(in crate::protocol) mod tag {
    pub(in crate::protocol) const AUTHENTICATION: u8 = b'R';
    pub(in crate::protocol) const PARAMETER_STATUS: u8 = b'S';
    pub(in crate::protocol) const BACKEND_KEY_DATA: u8 = b'K';
    pub(in crate::protocol) const READY_FOR_QUERY: u8 = b'Z';
    pub(in crate::protocol) const ROW_DESCRIPTION: u8 = b'T';
    pub(in crate::protocol) const DATA_ROW: u8 = b'D';
    pub(in crate::protocol) const COMMAND_COMPLETE: u8 = b'C';
    pub(in crate::protocol) const EMPTY_QUERY_RESPONSE: u8 = b'I';
    pub(in crate::protocol) const ERROR_RESPONSE: u8 = b'E';
    pub(in crate::protocol) const NOTICE_RESPONSE: u8 = b'N';
    pub(in crate::protocol) const COPY_IN_RESPONSE: u8 = b'G';
    pub(in crate::protocol) const COPY_OUT_RESPONSE: u8 = b'H';
    pub(in crate::protocol) const COPY_BOTH_RESPONSE: u8 = b'W';
    pub(in crate::protocol) const COPY_DATA: u8 = b'd';
    pub(in crate::protocol) const COPY_DONE: u8 = b'c';
    pub(in crate::protocol) const NEGOTIATE_PROTOCOL_VERSION: u8 = b'v';
}

pub(in crate::protocol) fn is_known(tag: u8) -> bool {
    b"RSKZTDCIENGHWdcv".contains(&tag)
}

pub(in crate::protocol) fn unknown(tag: u8) -> DecodeError {
    DecodeError::UnknownKind { message: "backend message", kind: u32::from(tag) }
}

/// Longest body accepted of a message.
pub(in crate::protocol) fn body_bytes_max(tag: u8) -> usize {
    match tag {
        tag::COPY_DATA => COPY_DATA_BYTES_MAX,
        tag::DATA_ROW => DATA_ROW_BYTES_MAX,
        tag::AUTHENTICATION => AUTHENTICATION_BYTES_MAX,
        _ => BACKEND_MESSAGE_BYTES_MAX,
    }
}

/// Whether a transaction block is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionStatus {
    /// None.
    Idle,
    /// In a block.
    InTransaction,
    /// In a failed block.
    Failed,
}

impl TransactionStatus {
    fn decode(body: Bytes) -> Result<Self, DecodeError> {
        let mut fields = Fields::of("ReadyForQuery", body);
        let status = match fields.u8("transaction status")? {
            b'I' => Self::Idle,
            b'T' => Self::InTransaction,
            b'E' => Self::Failed,
            other => return Err(fields.invalid("transaction status", other)),
        };
        fields.finish()?;
        Ok(status)
    }

    fn to_wire(self) -> u8 {
        match self {
            Self::Idle => b'I',
            Self::InTransaction => b'T',
            Self::Failed => b'E',
        }
    }
}

/// How a copy is formatted. A replication stream is text without columns, whatever its bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyFormat {
    /// 0 text, 1 binary.
    pub overall: u8,
    /// The format of each column.
    pub columns: Vec<i16>,
}

impl CopyFormat {
    fn decode(message: &'static str, body: Bytes) -> Result<Self, DecodeError> {
        let mut fields = Fields::of(message, body);
        let overall = fields.u8("format")?;
        let columns = (0..fields.count("column count")?)
            .map(|_| fields.i16("column format"))
            .collect::<Result<_, _>>()?;
        fields.finish()?;
        Ok(Self { overall, columns })
    }
}

/// The answer to a version or an extension that is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NegotiateProtocolVersion {
    /// The version the server will speak.
    pub version: ProtocolVersion,
    /// Every extension that was asked for and is not known.
    pub unrecognized: Vec<String>,
}

impl NegotiateProtocolVersion {
    fn decode(body: Bytes) -> Result<Self, DecodeError> {
        let mut fields = Fields::of("NegotiateProtocolVersion", body);
        let version = ProtocolVersion::from_wire(fields.u32("protocol version")?);
        let count = fields.u32("option count")?;
        let mut unrecognized = Vec::new();
        for _ in 0..count {
            unrecognized.push(fields.text("option name")?);
        }
        fields.finish()?;
        Ok(Self { version, unrecognized })
    }
}

fn decode_parameter_status(body: Bytes) -> Result<Message, DecodeError> {
    let mut fields = Fields::of("ParameterStatus", body);
    let (name, value) = (fields.text_lossy("name")?, fields.text_lossy("value")?);
    fields.finish()?;
    Ok(Message::ParameterStatus { name, value })
}

fn decode_backend_key_data(body: Bytes) -> Result<Message, DecodeError> {
    let mut fields = Fields::of("BackendKeyData", body);
    let process_id = fields.u32("process id")?;
    Ok(Message::BackendKeyData { process_id, key: CancelKey::decode("BackendKeyData", fields.rest())? })
}

fn decode_command_complete(body: Bytes) -> Result<Message, DecodeError> {
    let mut fields = Fields::of("CommandComplete", body);
    let tag = fields.text_lossy("tag")?;
    fields.finish()?;
    Ok(Message::CommandComplete(tag))
}

fn empty(message: &'static str, body: Bytes, value: Message) -> Result<Message, DecodeError> {
    Fields::of(message, body).finish()?;
    Ok(value)
}

/// Body of the fuzz target: decodes everything a server could send; what was read must write and read back the same.
pub fn fuzz_backend(bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    while let Ok(Some(message)) = Message::decode(&mut buffer) {
        let mut again = BytesMut::new();
        message.encode(&mut again);
        assert_eq!(Message::decode(&mut again), Ok(Some(message)));
    }
}
