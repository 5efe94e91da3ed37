//! What can be wrong with a server's SCRAM messages, in libpq's words.

use crate::protocol::scram::attributes::AttributeError;
use crate::protocol::scram::{ITERATIONS_MAX, NONCE_TEXT_BYTES_MAX, SALT_BYTES_MAX};

/// The exchange failed on the client's side.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The server offers nothing that is known here.
    #[error("none of the server's SASL authentication mechanisms are supported")]
    NoMechanism,
    /// Channel binding is required and cannot be had.
    #[error(
        "channel binding is required, but server did not offer an authentication method that supports channel binding"
    )]
    BindingRequired,
    /// There is nothing in the message.
    #[error("malformed SCRAM message (empty message)")]
    Empty,
    /// The message is not UTF-8.
    #[error("malformed SCRAM message (not valid UTF-8)")]
    NotUtf8,
    /// An attribute is missing.
    #[error("malformed SCRAM message (attribute \"{0}\" expected)")]
    AttributeExpected(char),
    /// No `=` after an attribute.
    #[error("malformed SCRAM message (expected character \"=\" for attribute \"{0}\")")]
    EqualsExpected(char),
    /// The nonce does not begin with ours, or adds nothing to it.
    #[error("invalid SCRAM response (nonce mismatch)")]
    NonceMismatch,
    /// The nonce is longer than is accepted.
    #[error("malformed SCRAM message (nonce has {0} bytes, more than {NONCE_TEXT_BYTES_MAX})")]
    NonceTooLong(usize),
    /// The salt is not base64, is empty, or is longer than is accepted.
    #[error("malformed SCRAM message (invalid salt: at most {SALT_BYTES_MAX} bytes are accepted)")]
    InvalidSalt,
    /// The number of iterations is none.
    #[error("malformed SCRAM message (invalid iteration count)")]
    InvalidIterations,
    /// So many iterations would keep us busy.
    #[error("server asks for {0} SCRAM iterations, more than {ITERATIONS_MAX}")]
    TooManyIterations(u64),
    /// Something follows the last attribute.
    #[error("malformed SCRAM message (garbage at end of server message)")]
    Garbage,
    /// The server says why it refuses.
    #[error("error received from server in SCRAM exchange: {0}")]
    Refused(String),
    /// The signature is not as long as a key.
    #[error("malformed SCRAM message (invalid server signature)")]
    InvalidSignature,
    /// The server does not know our verifier: it is not the one it should be.
    #[error("incorrect server signature")]
    WrongSignature,
}

impl From<AttributeError> for ClientError {
    fn from(error: AttributeError) -> Self {
        match error {
            AttributeError::Expected { attribute, .. } => Self::AttributeExpected(attribute),
            AttributeError::NoEquals { attribute } => Self::EqualsExpected(attribute),
            AttributeError::End | AttributeError::Invalid { .. } => Self::Garbage,
        }
    }
}
