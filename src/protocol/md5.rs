//! The answer to an MD5 password request.
//!
//! Only the client's side: this program asks nobody for MD5. It is kept because servers up to 18 can still ask for it.

use std::fmt::Write;

use md5::{Digest, Md5};

/// What a client sends: `md5`, and the hash of the stored hash and the salt, in hexadecimal.
pub fn password_reply(user: &str, password: &[u8], salt: [u8; 4]) -> String {
    let stored = hex_digest(&[password, user.as_bytes()]);
    "md5".to_owned() + &hex_digest(&[stored.as_bytes(), &salt])
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
}
