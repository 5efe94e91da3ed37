//! Errors and notices as servers send them.
//!
//! Owns the fields that are shown or acted on; the others (source file and line, object names) are skipped. A server may
//! leave out any field, also the SQLSTATE.

use std::fmt::{self, Write};

use bytes::{BufMut, Bytes, BytesMut};

use crate::protocol::fields::{Fields, put_text};
use crate::protocol::{DecodeError, SqlState};

/// An error or a notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerError {
    /// How bad it is.
    pub severity: Severity,
    /// The code; a server should send it but need not.
    pub sqlstate: Option<SqlState>,
    /// One line.
    pub message: String,
    /// More about it.
    pub detail: Option<String>,
    /// The way out.
    pub hint: Option<String>,
}

impl ServerError {
    /// The command failed.
    pub fn error(sqlstate: SqlState, message: impl Into<String>) -> Self {
        Self::new(Severity::Error, sqlstate, message)
    }

    /// The session failed: the connection is closed after it.
    pub fn fatal(sqlstate: SqlState, message: impl Into<String>) -> Self {
        Self::new(Severity::Fatal, sqlstate, message)
    }

    /// Of any severity.
    pub fn new(severity: Severity, sqlstate: SqlState, message: impl Into<String>) -> Self {
        Self { severity, sqlstate: Some(sqlstate), message: message.into(), detail: None, hint: None }
    }

    /// With a detail, which is a sentence.
    #[must_use]
    pub fn with_detail(self, detail: impl Into<String>) -> Self {
        Self { detail: Some(detail.into()), ..self }
    }

    /// With a hint, which is a sentence.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// Whether the code is this one.
    pub fn is(&self, sqlstate: SqlState) -> bool {
        self.sqlstate == Some(sqlstate)
    }

    pub(super) fn decode(message: &'static str, body: Bytes) -> Result<Self, DecodeError> {
        let mut fields = Fields::of(message, body);
        let (mut localized, mut plain) = (None, None);
        let mut error = Self {
            severity: Severity::Error,
            sqlstate: None,
            message: String::new(),
            detail: None,
            hint: None,
        };
        loop {
            let kind = fields.u8("field type")?;
            if kind == 0 {
                break;
            }
            let value = fields.text_lossy("field value")?;
            match kind {
                b'S' => localized = Severity::parse(&value),
                b'V' => plain = Severity::parse(&value),
                b'C' => error.sqlstate = SqlState::new(value.as_bytes()),
                b'M' => error.message = value,
                b'D' => error.detail = Some(value),
                b'H' => error.hint = Some(value),
                _ => {}
            }
        }
        fields.finish()?;
        // 'S' is translated on a server with another language; 'V' (9.6 and later) never is.
        error.severity = plain.or(localized).unwrap_or(error.severity);
        Ok(error)
    }

    pub(super) fn write(&self, out: &mut BytesMut) {
        let severity = self.severity.as_str();
        let sqlstate = self.sqlstate.as_ref().map(SqlState::as_str);
        let fields = [
            (b'S', Some(severity)),
            (b'V', Some(severity)),
            (b'C', sqlstate),
            (b'M', Some(self.message.as_str())),
            (b'D', self.detail.as_deref()),
            (b'H', self.hint.as_deref()),
        ];
        for (kind, value) in fields {
            if let Some(value) = value {
                out.put_u8(kind);
                put_text(out, value);
            }
        }
        out.put_u8(0);
    }
}

impl fmt::Display for ServerError {
    /// One line, for a log: a peer's line ends and control characters are shown as escapes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.severity, OneLine(&self.message))?;
        if let Some(sqlstate) = self.sqlstate {
            write!(f, " (SQLSTATE {sqlstate})")?;
        }
        if let Some(detail) = &self.detail {
            write!(f, "; detail: {}", OneLine(detail))?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "; hint: {}", OneLine(hint))?;
        }
        Ok(())
    }
}

struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|character| match character.is_control() {
            true => write!(f, "{}", character.escape_default()),
            false => f.write_char(character),
        })
    }
}

impl std::error::Error for ServerError {}

/// How bad an error or a notice is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// For developers.
    Debug,
    /// For the server's log.
    Log,
    /// Asked for.
    Info,
    /// May be of interest.
    Notice,
    /// Likely a mistake.
    Warning,
    /// The command failed.
    Error,
    /// The session failed.
    Fatal,
    /// All sessions failed.
    Panic,
}

impl Severity {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "DEBUG" => Self::Debug,
            "LOG" => Self::Log,
            "INFO" => Self::Info,
            "NOTICE" => Self::Notice,
            "WARNING" => Self::Warning,
            "ERROR" => Self::Error,
            "FATAL" => Self::Fatal,
            "PANIC" => Self::Panic,
            _ => return None,
        })
    }

    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Debug => "DEBUG",
            Self::Log => "LOG",
            Self::Info => "INFO",
            Self::Notice => "NOTICE",
            Self::Warning => "WARNING",
            Self::Error => "ERROR",
            Self::Fatal => "FATAL",
            Self::Panic => "PANIC",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_without_sqlstate_or_in_another_language_is_read() {
        let bare = ServerError::decode("ErrorResponse", Bytes::from_static(b"Mgone wrong\0\0")).unwrap();
        assert_eq!((bare.sqlstate, bare.severity), (None, Severity::Error));
        assert_eq!(bare.to_string(), "ERROR: gone wrong");
        let forged = ServerError::error(SqlState::INTERNAL_ERROR, "a\nERROR: b\x1b[0m");
        assert_eq!(forged.to_string(), "ERROR: a\\nERROR: b\\u{1b}[0m (SQLSTATE XX000)");
        let german = b"SFEHLER\0VFATAL\0C57P01\0Mm\xfc\0Fpostgres.c\0\0";
        let german = ServerError::decode("ErrorResponse", Bytes::from_static(german)).unwrap();
        assert!(german.is(SqlState::ADMIN_SHUTDOWN));
        assert_eq!((german.severity, german.message.as_str()), (Severity::Fatal, "m\u{fffd}"));
    }
}
