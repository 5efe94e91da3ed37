//! SQLSTATE codes, by PostgreSQL's names (`errcodes.txt`).
//!
//! Owns the code type and the constants this program sends or looks for. Codes are compared, never texts.

use std::fmt;

/// A five-character error code.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SqlState([u8; 5]);

macro_rules! codes {
    ($($name:ident = $code:literal;)*) => {
        impl SqlState {
            $(#[doc = concat!("`", $code, "`")]
            pub const $name: Self = Self::constant($code);)*
        }
    };
}

codes! {
    SUCCESSFUL_COMPLETION = "00000";
    WARNING = "01000";
    CONNECTION_EXCEPTION = "08000";
    CONNECTION_FAILURE = "08006";
    PROTOCOL_VIOLATION = "08P01";
    FEATURE_NOT_SUPPORTED = "0A000";
    INVALID_PARAMETER_VALUE = "22023";
    CHARACTER_NOT_IN_REPERTOIRE = "22021";
    ACTIVE_SQL_TRANSACTION = "25001";
    IN_FAILED_SQL_TRANSACTION = "25P02";
    INVALID_AUTHORIZATION_SPECIFICATION = "28000";
    INVALID_PASSWORD = "28P01";
    INVALID_CATALOG_NAME = "3D000";
    INSUFFICIENT_PRIVILEGE = "42501";
    SYNTAX_ERROR = "42601";
    INVALID_NAME = "42602";
    NAME_TOO_LONG = "42622";
    UNDEFINED_OBJECT = "42704";
    DUPLICATE_OBJECT = "42710";
    RESERVED_NAME = "42939";
    INSUFFICIENT_RESOURCES = "53000";
    DISK_FULL = "53100";
    OUT_OF_MEMORY = "53200";
    TOO_MANY_CONNECTIONS = "53300";
    CONFIGURATION_LIMIT_EXCEEDED = "53400";
    OBJECT_NOT_IN_PREREQUISITE_STATE = "55000";
    OBJECT_IN_USE = "55006";
    OPERATOR_INTERVENTION = "57000";
    QUERY_CANCELED = "57014";
    ADMIN_SHUTDOWN = "57P01";
    CRASH_SHUTDOWN = "57P02";
    CANNOT_CONNECT_NOW = "57P03";
    SYSTEM_ERROR = "58000";
    IO_ERROR = "58030";
    UNDEFINED_FILE = "58P01";
    DUPLICATE_FILE = "58P02";
    CONFIG_FILE_ERROR = "F0000";
    INTERNAL_ERROR = "XX000";
    DATA_CORRUPTED = "XX001";
}

impl SqlState {
    /// `None` unless the code is five digits or upper-case letters.
    pub fn new(code: &[u8]) -> Option<Self> {
        let code: [u8; 5] = code.try_into().ok()?;
        code.iter().all(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase()).then_some(Self(code))
    }

    const fn constant(code: &'static str) -> Self {
        match code.as_bytes() {
            [a, b, c, d, e] => Self([*a, *b, *c, *d, *e]),
            _ => panic!("a SQLSTATE has five characters"),
        }
    }

    /// The code as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("XX000")
    }
}

impl fmt::Display for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_five_digits_or_capitals_are_a_code() {
        assert_eq!(SqlState::new(b"08P01"), Some(SqlState::PROTOCOL_VIOLATION));
        for code in [&b""[..], b"08P0", b"08P011", b"08p01", b"08 01", b"\xff\xff\xff\xff\xff"] {
            assert_eq!(SqlState::new(code), None);
        }
        assert_eq!(SqlState::UNDEFINED_FILE.to_string(), "58P01");
    }
}
