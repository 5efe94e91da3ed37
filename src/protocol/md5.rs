//! MD5 password authentication, both sides.
//!
//! Kept because servers up to 18 can still ask for it, and `pg_authid` can still hold such secrets. Who knows the stored hash
//! can log in with it: it is a secret as good as the password, is not printed, and is overwritten when it goes.

use std::{
    fmt::{self, Write},
    str::FromStr,
};

use md5::{Digest, Md5};
use zeroize::Zeroize;

/// What a client sends: `md5`, and the hash of the stored hash and the salt, in hexadecimal.
pub fn password_reply(user: &str, password: &[u8], salt: [u8; SALT_BYTES]) -> String {
    StoredHash(hex_digest(&[password, user.as_bytes()])).reply(salt)
}

/// What is stored instead of a password: `md5` and 32 hexadecimal digits, which depend on the user's name, too.
#[derive(Clone, PartialEq, Eq)]
pub struct StoredHash(String);

impl StoredHash {
    /// One that no password leads to, for a user that does not exist.
    pub fn mock(secret: &[u8], user: &str) -> Self {
        Self(hex_digest(&[secret, user.as_bytes()]))
    }

    /// Whether a client that was sent `salt` knows the password. Takes as long, however much of the reply is right.
    pub fn is_proved_by(&self, salt: [u8; SALT_BYTES], reply: &[u8]) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(self.reply(salt).as_bytes(), reply).is_ok()
    }

    /// The digits, as they are stored behind `md5`.
    pub fn digits(&self) -> &str {
        &self.0
    }

    fn reply(&self, salt: [u8; SALT_BYTES]) -> String {
        PREFIX.to_owned() + &hex_digest(&[self.0.as_bytes(), &salt])
    }
}

impl FromStr for StoredHash {
    type Err = InvalidHash;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_prefix(PREFIX).ok_or(InvalidHash)?;
        let is_hex = digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if is_hex && digits.len() == HEX_DIGITS { Ok(Self(digits.to_owned())) } else { Err(InvalidHash) }
    }
}

impl Drop for StoredHash {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for StoredHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("md5<hidden>")
    }
}

/// The text is no MD5 secret; it is not repeated, because it may be a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid MD5 secret: expected md5 and 32 hexadecimal digits")]
pub struct InvalidHash;

/// Random bytes that a server sends.
pub const SALT_BYTES: usize = 4;

const PREFIX: &str = "md5";
const HEX_DIGITS: usize = 32;

/// Body of the fuzz target: the bytes as the answer of a client.
pub fn fuzz_password(bytes: &[u8]) {
    let stored = StoredHash::mock(b"secret", "user");
    assert!(!stored.is_proved_by([1, 2, 3, 4], bytes), "without the password");
    if let Ok(stored) = String::from_utf8_lossy(bytes).parse::<StoredHash>() {
        assert!(stored.is_proved_by([1, 2, 3, 4], stored.reply([1, 2, 3, 4]).as_bytes()));
    }
    let password = crate::protocol::frontend::Password::of_sasl(bytes.to_vec());
    if let Ok(text) = password.text() {
        assert!(!stored.is_proved_by([1, 2, 3, 4], &text), "without the password");
    }
}

fn hex_digest(pieces: &[&[u8]]) -> String {
    let mut hasher = Md5::new();
    pieces.iter().for_each(|piece| hasher.update(piece));
    hasher.finalize().iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reply_is_what_libpq_computes() {
        // Computed with another implementation (Python: hashlib).
        assert_eq!(
            password_reply("md5_user", b"password", [0x2a, 0x3d, 0x8f, 0xe0]),
            "md562af4dd09bbb41884907a838a3233294"
        );
    }

    #[test]
    fn a_reply_is_right_only_for_its_password_its_user_and_its_salt() {
        let (salt, reply) = ([0x2a, 0x3d, 0x8f, 0xe0], "md562af4dd09bbb41884907a838a3233294");
        // Python: hashlib.md5(b"passwordmd5_user")
        let stored: StoredHash = "md57cd2b9a92689eab2e58caf2da80afa15".parse().unwrap();
        assert!(stored.is_proved_by(salt, reply.as_bytes()));
        assert!(!stored.is_proved_by([0, 0, 0, 0], reply.as_bytes()));
        for wrong in ["", "md5", "md562af4dd09bbb41884907a838a3233295", "62af4dd09bbb41884907a838a3233294"] {
            assert!(!stored.is_proved_by(salt, wrong.as_bytes()), "{wrong}");
        }
        assert!(!StoredHash::mock(b"s", "md5_user").is_proved_by(salt, reply.as_bytes()));
    }

    #[test]
    fn a_stored_hash_is_read_as_it_is_and_never_shown() {
        let stored: StoredHash = "md50123456789abcdef0123456789abcdef".parse().unwrap();
        assert_eq!(format!("{stored:?}"), "md5<hidden>");
        for wrong in [
            "",
            "md5",
            "0123456789abcdef0123456789abcdef",
            "md50123456789ABCDEF0123456789abcdef",
            "md50123456789abcdef0123456789abcde",
            "md50123456789abcdef0123456789abcdef0",
        ] {
            assert_eq!(wrong.parse::<StoredHash>(), Err(InvalidHash), "{wrong}");
        }
    }
}
