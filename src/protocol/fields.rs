//! Reading the fields of a body, and writing a frame.
//!
//! `Fields` never panics on a peer's bytes and names the field that is missing. `Frame` fills in the length itself, and
//! keeps NUL out of NUL-terminated text, so that no value can shift the fields after it.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::protocol::DecodeError;
use crate::wal::{Lsn, PgTimestamp};

/// The fields of one message, read in order.
pub(super) struct Fields {
    message: &'static str,
    bytes: Bytes,
}

macro_rules! integer {
    ($name:ident, $get:ident) => {
        pub(super) fn $name(&mut self, field: &'static str) -> Result<$name, DecodeError> {
            self.bytes.$get().map_err(|_| DecodeError::Truncated { message: self.message, field })
        }
    };
}

impl Fields {
    pub(super) fn of(message: &'static str, bytes: Bytes) -> Self {
        Self { message, bytes }
    }

    integer!(u8, try_get_u8);
    integer!(i16, try_get_i16);
    integer!(u32, try_get_u32);
    integer!(i32, try_get_i32);
    integer!(u64, try_get_u64);
    integer!(i64, try_get_i64);

    /// A position; zero means not known.
    pub(super) fn lsn(&mut self, field: &'static str) -> Result<Option<Lsn>, DecodeError> {
        Ok(Lsn::from_wire(self.u64(field)?))
    }

    pub(super) fn timestamp(&mut self, field: &'static str) -> Result<PgTimestamp, DecodeError> {
        Ok(PgTimestamp(self.i64(field)?))
    }

    /// The next `len` bytes.
    pub(super) fn bytes(&mut self, len: usize, field: &'static str) -> Result<Bytes, DecodeError> {
        if self.bytes.len() < len {
            return Err(DecodeError::Truncated { message: self.message, field });
        }
        Ok(self.bytes.split_to(len))
    }

    /// Bytes up to a NUL, which is taken too.
    pub(super) fn terminated(&mut self, field: &'static str) -> Result<Bytes, DecodeError> {
        let end = self.bytes.iter().position(|&byte| byte == 0);
        let end = end.ok_or(DecodeError::Truncated { message: self.message, field })?;
        let value = self.bytes.split_to(end);
        self.bytes.advance(1);
        Ok(value)
    }

    /// NUL-terminated text that must be UTF-8.
    pub(super) fn text(&mut self, field: &'static str) -> Result<String, DecodeError> {
        let bytes = self.terminated(field)?;
        String::from_utf8(bytes.into()).map_err(|_| DecodeError::NotUtf8 { message: self.message, field })
    }

    /// NUL-terminated text of a server, whose encoding may be any; what is not UTF-8 is replaced.
    pub(super) fn text_lossy(&mut self, field: &'static str) -> Result<String, DecodeError> {
        Ok(String::from_utf8_lossy(&self.terminated(field)?).into_owned())
    }

    /// A count, which is signed on the wire but never negative.
    pub(super) fn count(&mut self, field: &'static str) -> Result<i16, DecodeError> {
        let count = self.i16(field)?;
        if count < 0 {
            return Err(self.invalid(field, count.cast_unsigned()));
        }
        Ok(count)
    }

    /// Everything that is left.
    pub(super) fn rest(self) -> Bytes {
        self.bytes
    }

    /// No field may follow.
    pub(super) fn finish(self) -> Result<(), DecodeError> {
        match self.bytes.len() {
            0 => Ok(()),
            bytes => Err(DecodeError::TrailingBytes { message: self.message, bytes }),
        }
    }

    pub(super) fn invalid(&self, field: &'static str, value: impl Into<u64>) -> DecodeError {
        DecodeError::InvalidValue { message: self.message, field, value: value.into() }
    }
}

/// Writes one message: `body` writes its fields, the length is filled in afterwards.
pub(super) fn frame(out: &mut BytesMut, tag: u8, body: impl FnOnce(&mut BytesMut)) {
    out.put_u8(tag);
    packet(out, body);
}

/// Like [`frame`] for the packets without a tag byte.
pub(super) fn packet(out: &mut BytesMut, body: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    out.put_u32(0);
    body(out);
    // No caller writes 4 GiB: every body is made from values that are bounded where they are made.
    let len = u32::try_from(out.len() - start).unwrap_or(u32::MAX);
    if let Some(field) = out.get_mut(start..start + 4) {
        field.copy_from_slice(&len.to_be_bytes());
    }
}

/// Writes text and its NUL. A NUL within the text would end it early and shift what follows: it is left out.
pub(super) fn put_text(out: &mut BytesMut, text: impl AsRef<[u8]>) {
    for piece in text.as_ref().split(|&byte| byte == 0) {
        out.put_slice(piece);
    }
    out.put_u8(0);
}

/// Writes a count field; a list too long for it is cut by the caller's `take` of the returned number.
pub(super) fn put_count(out: &mut BytesMut, count: usize) -> usize {
    let count = i16::try_from(count).unwrap_or(i16::MAX);
    out.put_i16(count);
    usize::from(count.unsigned_abs())
}

/// Writes a value's length and the value; -1 stands for NULL.
pub(super) fn put_value(out: &mut BytesMut, value: Option<&[u8]>) {
    match value {
        None => out.put_i32(-1),
        Some(value) => {
            out.put_i32(i32::try_from(value.len()).unwrap_or(i32::MAX));
            out.put_slice(value);
        }
    }
}
