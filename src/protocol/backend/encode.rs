//! Writing a server's messages: one function for each type.
//!
//! They append to a buffer and take borrowed values, so that an answer is written without being built first.

use bytes::{BufMut, BytesMut};

use crate::protocol::backend::{
    Authentication, Column, CopyFormat, NegotiateProtocolVersion, ServerError, TransactionStatus, tag,
};
use crate::protocol::fields::{frame, put_count, put_text, put_value};
use crate::protocol::frontend::CancelKey;

/// Appends an authentication request.
pub fn encode_authentication(request: &Authentication, out: &mut BytesMut) {
    frame(out, tag::AUTHENTICATION, |out| request.write(out));
}

/// Appends ParameterStatus.
pub fn encode_parameter_status(name: &str, value: &str, out: &mut BytesMut) {
    frame(out, tag::PARAMETER_STATUS, |out| {
        put_text(out, name);
        put_text(out, value);
    });
}

/// Appends BackendKeyData. Under protocol 3.0 the key must have 4 bytes.
pub fn encode_backend_key_data(process_id: u32, key: &CancelKey, out: &mut BytesMut) {
    frame(out, tag::BACKEND_KEY_DATA, |out| {
        out.put_u32(process_id);
        out.put_slice(key.as_bytes());
    });
}

/// Appends ReadyForQuery.
pub fn encode_ready_for_query(status: TransactionStatus, out: &mut BytesMut) {
    frame(out, tag::READY_FOR_QUERY, |out| out.put_u8(status.to_wire()));
}

/// Appends RowDescription.
pub fn encode_row_description(columns: &[Column], out: &mut BytesMut) {
    frame(out, tag::ROW_DESCRIPTION, |out| {
        let count = put_count(out, columns.len());
        columns.iter().take(count).for_each(|column| column.write(out));
    });
}

/// Appends DataRow; `None` is NULL.
pub fn encode_data_row<'a>(values: impl ExactSizeIterator<Item = Option<&'a [u8]>>, out: &mut BytesMut) {
    frame(out, tag::DATA_ROW, |out| {
        let count = put_count(out, values.len());
        values.take(count).for_each(|value| put_value(out, value));
    });
}

/// Appends a DataRow of text values; `None` is NULL.
pub fn encode_text_row(values: &[Option<&str>], out: &mut BytesMut) {
    encode_data_row(values.iter().map(|value| value.map(str::as_bytes)), out);
}

/// Appends CommandComplete.
pub fn encode_command_complete(command_tag: &str, out: &mut BytesMut) {
    frame(out, tag::COMMAND_COMPLETE, |out| put_text(out, command_tag));
}

/// Appends EmptyQueryResponse.
pub fn encode_empty_query_response(out: &mut BytesMut) {
    frame(out, tag::EMPTY_QUERY_RESPONSE, |_| ());
}

/// Appends ErrorResponse.
pub fn encode_error_response(error: &ServerError, out: &mut BytesMut) {
    frame(out, tag::ERROR_RESPONSE, |out| error.write(out));
}

/// Appends NoticeResponse.
pub fn encode_notice_response(notice: &ServerError, out: &mut BytesMut) {
    frame(out, tag::NOTICE_RESPONSE, |out| notice.write(out));
}

/// Appends CopyInResponse.
pub fn encode_copy_in_response(format: &CopyFormat, out: &mut BytesMut) {
    frame(out, tag::COPY_IN_RESPONSE, |out| write_copy_format(format, out));
}

/// Appends CopyOutResponse.
pub fn encode_copy_out_response(format: &CopyFormat, out: &mut BytesMut) {
    frame(out, tag::COPY_OUT_RESPONSE, |out| write_copy_format(format, out));
}

/// Appends CopyBothResponse; a replication stream has the default format.
pub fn encode_copy_both_response(format: &CopyFormat, out: &mut BytesMut) {
    frame(out, tag::COPY_BOTH_RESPONSE, |out| write_copy_format(format, out));
}

fn write_copy_format(format: &CopyFormat, out: &mut BytesMut) {
    out.put_u8(format.overall);
    let count = put_count(out, format.columns.len());
    format.columns.iter().take(count).for_each(|&column| out.put_i16(column));
}

/// Appends CopyData. WAL is not sent by this, which copies it: see [`WalDataHeader::encode`].
///
/// [`WalDataHeader::encode`]: crate::protocol::replication::WalDataHeader::encode
pub fn encode_copy_data(data: &[u8], out: &mut BytesMut) {
    frame(out, tag::COPY_DATA, |out| out.put_slice(data));
}

/// Appends CopyDone.
pub fn encode_copy_done(out: &mut BytesMut) {
    frame(out, tag::COPY_DONE, |_| ());
}

/// Appends NegotiateProtocolVersion.
pub fn encode_negotiate_protocol_version(answer: &NegotiateProtocolVersion, out: &mut BytesMut) {
    frame(out, tag::NEGOTIATE_PROTOCOL_VERSION, |out| {
        out.put_u32(answer.version.to_wire());
        out.put_u32(u32::try_from(answer.unrecognized.len()).unwrap_or(u32::MAX));
        answer.unrecognized.iter().for_each(|name| put_text(out, name));
    });
}
