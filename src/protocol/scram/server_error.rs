//! What can be wrong with a client's SCRAM messages, in PostgreSQL's words.

use crate::protocol::scram::attributes::{AttributeError, sanitized};
use crate::protocol::{ServerError, SqlState};

/// The exchange failed on the server's side.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServerScramError {
    /// The client took a mechanism that was not offered.
    #[error("client selected an invalid SASL authentication mechanism")]
    InvalidMechanism,
    /// The message does not follow the grammar; the detail says where.
    #[error("malformed SCRAM message")]
    Malformed(Malformed),
    /// A downgrade, or a client that does not see the offer.
    #[error("SCRAM channel binding negotiation error")]
    BindingNegotiation,
    /// The client knows another binding.
    #[error("unsupported SCRAM channel-binding type \"{0}\"")]
    UnsupportedBindingType(String),
    /// The client is bound to another connection: there is somebody in between.
    #[error("SCRAM channel binding check failed")]
    BindingCheckFailed,
    /// The flag changed on the way.
    #[error("unexpected SCRAM channel-binding attribute in client-final-message")]
    UnexpectedBindingAttribute,
    /// The client wants to act as somebody else.
    #[error("client uses authorization identity, but it is not supported")]
    AuthorizationIdentity,
    /// The client wants an extension.
    #[error("client requires an unsupported SCRAM extension")]
    UnsupportedExtension,
    /// The nonce has characters it may not have.
    #[error("non-printable characters in SCRAM nonce")]
    NonPrintableNonce,
    /// The nonce is not the one that was sent.
    #[error("invalid SCRAM response")]
    NonceMismatch,
    /// The password is wrong, or there is no such user. To the client both are the same: 28P01.
    #[error("password authentication failed")]
    WrongPassword,
}

/// Where a message leaves the grammar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// There is nothing.
    Empty,
    /// It has a NUL in it.
    Nul,
    /// It is not UTF-8.
    NotUtf8,
    /// The nonce is longer than is accepted.
    NonceTooLong,
    /// An attribute is missing; `found` is in its place.
    AttributeExpected {
        /// The attribute.
        attribute: char,
        /// What is there.
        found: Option<char>,
    },
    /// No `=` after an attribute.
    EqualsExpected {
        /// The attribute.
        attribute: char,
    },
    /// It ends where an attribute must be.
    End,
    /// No attribute has this name.
    InvalidAttribute {
        /// The name.
        found: char,
    },
    /// Channel binding was chosen but is not there.
    BindingMissing,
    /// Channel binding was not chosen but is there.
    BindingUnexpected,
    /// A comma is missing.
    CommaExpected {
        /// What is there.
        found: Option<char>,
    },
    /// The flag at the beginning is none of `n`, `y`, `p`.
    UnexpectedFlag {
        /// What is there.
        found: Option<char>,
    },
    /// Neither an authorization identity nor its absence.
    UnexpectedAttribute {
        /// What is there.
        found: Option<char>,
    },
    /// The proof is not as long as a key.
    Proof,
    /// Something follows the proof.
    Garbage,
}

impl Malformed {
    /// PostgreSQL's detail.
    pub fn detail(self) -> String {
        match self {
            Self::Empty => "The message is empty.".to_owned(),
            Self::Nul => "Message length does not match input length.".to_owned(),
            Self::NotUtf8 => "The message is not valid UTF-8.".to_owned(),
            Self::NonceTooLong => "The nonce is too long.".to_owned(),
            Self::AttributeExpected { attribute, found } => {
                format!("Expected attribute \"{attribute}\" but found \"{}\".", sanitized(found))
            }
            Self::EqualsExpected { attribute } => {
                format!("Expected character \"=\" for attribute \"{attribute}\".")
            }
            Self::End => "Attribute expected, but found end of string.".to_owned(),
            Self::InvalidAttribute { found } => {
                format!("Attribute expected, but found invalid character \"{}\".", sanitized(Some(found)))
            }
            Self::BindingMissing => {
                "The client selected SCRAM-SHA-256-PLUS, but the SCRAM message does not include \
                 channel binding data."
                    .to_owned()
            }
            Self::BindingUnexpected => {
                "The client selected SCRAM-SHA-256 without channel binding, but the SCRAM message \
                 includes channel binding data."
                    .to_owned()
            }
            Self::CommaExpected { found } => {
                format!("Comma expected, but found character \"{}\".", sanitized(found))
            }
            Self::UnexpectedFlag { found } => {
                format!("Unexpected channel-binding flag \"{}\".", sanitized(found))
            }
            Self::UnexpectedAttribute { found } => {
                format!("Unexpected attribute \"{}\" in client-first-message.", sanitized(found))
            }
            Self::Proof => "Malformed proof in client-final-message.".to_owned(),
            Self::Garbage => "Garbage found at the end of client-final-message.".to_owned(),
        }
    }
}

impl From<Malformed> for ServerScramError {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

impl From<AttributeError> for ServerScramError {
    fn from(error: AttributeError) -> Self {
        Self::Malformed(match error {
            AttributeError::Expected { attribute, found } => {
                Malformed::AttributeExpected { attribute, found }
            }
            AttributeError::NoEquals { attribute } => Malformed::EqualsExpected { attribute },
            AttributeError::End => Malformed::End,
            AttributeError::Invalid { found } => Malformed::InvalidAttribute { found },
        })
    }
}

impl ServerScramError {
    /// What the client is told; `user` is the name in its startup packet.
    pub fn to_server_error(&self, user: &str) -> ServerError {
        let sqlstate = match self {
            Self::BindingNegotiation | Self::BindingCheckFailed => {
                SqlState::INVALID_AUTHORIZATION_SPECIFICATION
            }
            Self::AuthorizationIdentity | Self::UnsupportedExtension => SqlState::FEATURE_NOT_SUPPORTED,
            Self::WrongPassword => SqlState::INVALID_PASSWORD,
            Self::InvalidMechanism
            | Self::Malformed(_)
            | Self::UnsupportedBindingType(_)
            | Self::UnexpectedBindingAttribute
            | Self::NonPrintableNonce
            | Self::NonceMismatch => SqlState::PROTOCOL_VIOLATION,
        };
        let error = ServerError::fatal(sqlstate, self.to_string());
        match self {
            Self::WrongPassword => {
                ServerError::fatal(sqlstate, format!("password authentication failed for user \"{user}\""))
            }
            Self::Malformed(malformed) => error.with_detail(malformed.detail()),
            Self::NonceMismatch => error.with_detail("Nonce does not match."),
            Self::BindingNegotiation => error.with_detail(
                "The client supports SCRAM channel binding but thinks the server does not.  However, this server does \
                 support channel binding.",
            ),
            _ => error,
        }
    }
}
