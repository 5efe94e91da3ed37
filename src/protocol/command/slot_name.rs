//! Which names a replication slot can have.

use crate::protocol::{ServerError, SqlState};

/// Checks a slot's name as `ReplicationSlotValidateName` does: 1 to 63 lower-case letters, digits and underscores.
pub fn validate_slot_name(name: &str) -> Result<(), InvalidSlotName> {
    let name_owned = || name.to_owned();
    if name.is_empty() {
        return Err(InvalidSlotName::TooShort(name_owned()));
    }
    if name.len() > SLOT_NAME_BYTES_MAX {
        return Err(InvalidSlotName::TooLong(name_owned()));
    }
    let is_valid = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
    if !name.bytes().all(is_valid) {
        return Err(InvalidSlotName::InvalidCharacter(name_owned()));
    }
    Ok(())
}

/// `NAMEDATALEN - 1`.
const SLOT_NAME_BYTES_MAX: usize = 63;

/// A slot cannot have this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSlotName {
    /// It is empty.
    #[error("replication slot name \"{0}\" is too short")]
    TooShort(String),
    /// It has more than 63 bytes.
    #[error("replication slot name \"{0}\" is too long")]
    TooLong(String),
    /// It has a character other than lower-case letters, digits and underscores.
    #[error("replication slot name \"{0}\" contains invalid character")]
    InvalidCharacter(String),
}

impl From<InvalidSlotName> for ServerError {
    fn from(error: InvalidSlotName) -> Self {
        let message = error.to_string();
        match error {
            InvalidSlotName::TooShort(_) => Self::error(SqlState::INVALID_NAME, message),
            InvalidSlotName::TooLong(_) => Self::error(SqlState::NAME_TOO_LONG, message),
            InvalidSlotName::InvalidCharacter(_) => Self::error(SqlState::INVALID_NAME, message).with_hint(
                "Replication slot names may only contain lower case letters, numbers, and the underscore character.",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_refused_with_postgresqls_codes() {
        assert_eq!(validate_slot_name("dc2_a"), Ok(()));
        assert_eq!(validate_slot_name(&"a".repeat(63)), Ok(()));
        for (name, code) in
            [("", "42602"), ("Dc2", "42602"), ("a-b", "42602"), ("é", "42602"), (&"a".repeat(64), "42622")]
        {
            let error = ServerError::from(validate_slot_name(name).unwrap_err());
            assert_eq!(error.sqlstate.unwrap().as_str(), code, "{name}");
        }
    }
}
