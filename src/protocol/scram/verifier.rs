//! What is stored instead of a password: enough to check one, not enough to use it elsewhere.
//!
//! The text is PostgreSQL's, so that it is copied from `pg_authid.rolpassword` unchanged.

use std::{fmt, num::NonZeroU32, str::FromStr};

use zeroize::Zeroize;

use crate::protocol::scram::{
    Key, SALT_BYTES_MAX, decode_base64, encode_base64, hash, hmac, salted_password,
};

/// `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`. Overwritten when it goes.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    pub(super) salt: Vec<u8>,
    pub(super) iterations: NonZeroU32,
    pub(super) stored_key: Key,
    pub(super) server_key: Key,
}

impl Verifier {
    pub(super) fn new(salt: Vec<u8>, iterations: NonZeroU32, stored_key: Key, server_key: Key) -> Self {
        Self { salt, iterations, stored_key, server_key }
    }

    /// How often the password was hashed.
    pub fn iterations(&self) -> NonZeroU32 {
        self.iterations
    }

    /// The verifier of a password. The salt must be random; see [`SALT_BYTES`].
    ///
    /// [`SALT_BYTES`]: crate::protocol::scram::SALT_BYTES
    pub fn from_password(password: &[u8], salt: Vec<u8>, iterations: NonZeroU32) -> Self {
        let salted = salted_password(password, &salt, iterations);
        Self {
            salt,
            iterations,
            stored_key: hash(&hmac(&salted, b"Client Key")),
            server_key: hmac(&salted, b"Server Key"),
        }
    }
}

impl Drop for Verifier {
    fn drop(&mut self) {
        self.stored_key.zeroize();
        self.server_key.zeroize();
    }
}

impl FromStr for Verifier {
    type Err = InvalidVerifier;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (iterations, rest) = text.strip_prefix("SCRAM-SHA-256$")?.split_once(':')?;
            let (salt, keys) = rest.split_once('$')?;
            let (stored_key, server_key) = keys.split_once(':')?;
            Some(Self {
                salt: decode_base64(salt).filter(|salt| salt.len() <= SALT_BYTES_MAX)?,
                iterations: iterations.parse().ok()?,
                stored_key: decode_base64(stored_key)?.try_into().ok()?,
                server_key: decode_base64(server_key)?.try_into().ok()?,
            })
        };
        parse().ok_or(InvalidVerifier)
    }
}

impl fmt::Display for Verifier {
    /// The text that `FromStr` reads. It is worth a password to an attacker with time: print it nowhere but to its owner.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [salt, stored_key, server_key] =
            [self.salt.as_slice(), &self.stored_key, &self.server_key].map(encode_base64);
        write!(f, "SCRAM-SHA-256${}:{salt}${stored_key}:{server_key}", self.iterations)
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SCRAM-SHA-256${}:<hidden>", self.iterations)
    }
}

/// The text is no verifier; it is not repeated, because it may be a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid SCRAM secret: expected SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>")]
pub struct InvalidVerifier;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_form_is_read_back_and_never_shown_by_debug() {
        let verifier = Verifier::from_password(b"pencil", vec![1, 2, 3], NonZeroU32::new(2).unwrap());
        assert_eq!(verifier.to_string().parse(), Ok(verifier.clone()));
        assert_eq!(format!("{verifier:?}"), "SCRAM-SHA-256$2:<hidden>");
        for text in [
            "",
            "pencil",
            "SCRAM-SHA-256$4096:AQID$AQID:AQID",
            "SCRAM-SHA-1$1:AQID$A:B",
            "md5d41d8cd98f00b204e9800998ecf8427e",
        ] {
            assert_eq!(text.parse::<Verifier>(), Err(InvalidVerifier), "{text}");
        }
    }
}
