//! SCRAM-SHA-256 (RFC 5802, RFC 7677), both sides.
//!
//! Each side is a row of states that consume themselves, so that no message can be taken twice or out of order:
//!
//! ```text
//!  Client::start ──▶ ExpectServerFirst ──▶ ExpectServerFinal ──▶ (done)
//!  Server::new ────▶ Server ─────────────▶ ExpectClientFinal ──▶ (done)
//! ```
//!
//! Pure: nonces and salts are arguments, because whoever calls has the random numbers. Secrets are compared in constant
//! time and not printed. Deriving a key from a password takes its iterations on the calling thread; only the client and
//! whoever makes a verifier do so, never the server.

mod attributes;
mod client;
mod client_error;
mod server;
mod server_error;
mod verifier;

use std::borrow::Cow;
use std::num::NonZeroU32;

use aws_lc_rs::{digest, hmac, pbkdf2};
use base64::{Engine, engine::general_purpose::STANDARD};

pub use client::{ChannelBindingPolicy, Client, ClientFirst, ExpectServerFinal, ExpectServerFirst};
pub use client_error::ClientError;
pub use server::{Credentials, ExpectClientFinal, Server};
pub use server_error::ServerScramError;
pub use verifier::{InvalidVerifier, Verifier};

/// The mechanism's name.
pub const SCRAM_SHA_256: &str = "SCRAM-SHA-256";
/// The mechanism's name with channel binding.
pub const SCRAM_SHA_256_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// Iterations of a verifier made here, as PostgreSQL's `scram_iterations` has it.
pub const ITERATIONS_DEFAULT: NonZeroU32 = NonZeroU32::new(4096).unwrap();
/// Most iterations a server may ask of us; more would be a way to keep us busy.
pub const ITERATIONS_MAX: u32 = 1_000_000;
/// Random bytes in a nonce (`SCRAM_RAW_NONCE_LEN`).
pub const NONCE_BYTES: usize = 18;
/// Random bytes in a salt (`SCRAM_DEFAULT_SALT_LEN`).
pub const SALT_BYTES: usize = 16;
/// Longest nonce taken from a peer, in its text form.
pub const NONCE_TEXT_BYTES_MAX: usize = 1024;
/// Longest salt taken from a server or a verifier.
pub const SALT_BYTES_MAX: usize = 1024;

/// What ties the exchange to the TLS connection it runs in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChannelBinding {
    /// Nothing: no TLS, or a certificate whose signature has no hash.
    Unsupported,
    /// The hash of the server's certificate (RFC 5929).
    TlsServerEndPoint(Vec<u8>),
}

/// The flag at the beginning of the exchange.
const BINDING_TYPE: &str = "tls-server-end-point";

type Key = [u8; digest::SHA256_OUTPUT_LEN];

/// `Hi(Normalize(password), salt, iterations)`
fn salted_password(password: &[u8], salt: &[u8], iterations: NonZeroU32) -> Key {
    let mut key = [0; digest::SHA256_OUTPUT_LEN];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, salt, &normalized(password), &mut key);
    key
}

/// SASLprep; a password that is not UTF-8, or has characters that may not be in one, is taken as it is (`pg_saslprep`).
fn normalized(password: &[u8]) -> Cow<'_, [u8]> {
    let Ok(text) = std::str::from_utf8(password) else {
        return Cow::Borrowed(password);
    };
    // PostgreSQL looks for what is prohibited before it normalizes, stringprep after: both must agree.
    if text.chars().any(is_prohibited) {
        return Cow::Borrowed(password);
    }
    match stringprep::saslprep(text) {
        Ok(prepared) if !prepared.is_empty() => Cow::Owned(prepared.into_owned().into_bytes()),
        _ => Cow::Borrowed(password),
    }
}

/// RFC 4013, sections 2.3 and 2.5.
fn is_prohibited(character: char) -> bool {
    use stringprep::tables;
    let is_mapped = [tables::non_ascii_space_character, tables::commonly_mapped_to_nothing];
    let is_prohibited = [
        tables::ascii_control_character,
        tables::non_ascii_control_character,
        tables::private_use,
        tables::non_character_code_point,
        tables::inappropriate_for_plain_text,
        tables::inappropriate_for_canonical_representation,
        tables::change_display_properties_or_deprecated,
        tables::tagging_character,
        tables::unassigned_code_point,
    ];
    !is_mapped.iter().any(|is| is(character)) && is_prohibited.iter().any(|is| is(character))
}

fn hmac(key: &[u8], text: &[u8]) -> Key {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text);
    as_key(tag.as_ref())
}

fn hash(bytes: &[u8]) -> Key {
    as_key(digest::digest(&digest::SHA256, bytes).as_ref())
}

/// SHA-256 always gives as many bytes as a key has.
fn as_key(bytes: &[u8]) -> Key {
    let mut key = [0; digest::SHA256_OUTPUT_LEN];
    key.iter_mut().zip(bytes).for_each(|(key, byte)| *key = *byte);
    key
}

fn xor(left: &Key, right: &Key) -> Key {
    let mut result = *left;
    result.iter_mut().zip(right).for_each(|(result, right)| *result ^= right);
    result
}

/// Whether two secrets are the same, in a time that does not tell where they differ.
fn is_same(left: &[u8], right: &[u8]) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(left, right).is_ok()
}

fn encode_base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

fn decode_base64(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

/// The `c=` attribute: the flag as it was sent, and the binding data where there is any.
fn binding_attribute(gs2_header: &str, binding: Option<&[u8]>) -> String {
    encode_base64(&[gs2_header.as_bytes(), binding.unwrap_or_default()].concat())
}

/// Body of the fuzz target: each side gets the bytes as every message it can get.
pub fn fuzz_scram(bytes: &[u8]) {
    let verifier = || Verifier::new(b"salt".to_vec(), ITERATIONS_DEFAULT, [1; 32], [2; 32]);
    for binding in [ChannelBinding::Unsupported, ChannelBinding::TlsServerEndPoint(vec![7; 32])] {
        for mechanism in [SCRAM_SHA_256, SCRAM_SHA_256_PLUS] {
            let server = || Server::new(Credentials::Known(verifier()), binding.clone());
            let _ = server().handle(mechanism, bytes, [0; NONCE_BYTES]);
            if let Ok((state, _)) = server().handle(SCRAM_SHA_256, b"n,,n=,r=x", [0; NONCE_BYTES]) {
                let _ = state.handle(bytes);
            }
        }
    }
    let offered = [SCRAM_SHA_256.to_owned()];
    let client = || Client::new(b"x", ChannelBinding::Unsupported, ChannelBindingPolicy::Prefer);
    if let Ok((_, state)) = client().start(&offered, [0; NONCE_BYTES]) {
        // Many iterations would only make it slow: they are not what is looked for.
        if !bytes.windows(5).any(|window| window.starts_with(b"i=") && window.iter().all(|b| *b != b',')) {
            let _ = state.handle(bytes);
        }
    }
    let _ = std::str::from_utf8(bytes).ok().map(str::parse::<Verifier>);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(
        client_binding: ChannelBinding,
        server_binding: ChannelBinding,
        password: &str,
    ) -> Result<(), String> {
        let verifier = Verifier::from_password(b"pencil", vec![9; SALT_BYTES], ITERATIONS_DEFAULT);
        let server = Server::new(Credentials::Known(verifier), server_binding);
        let offered: Vec<String> = server.mechanisms().iter().map(|&name| name.to_owned()).collect();
        let client = Client::new(password.as_bytes(), client_binding, ChannelBindingPolicy::Prefer);
        let (first, client) = client.start(&offered, [1; NONCE_BYTES]).map_err(|error| error.to_string())?;
        let (server, reply) = server
            .handle(first.mechanism, first.message.as_bytes(), [2; NONCE_BYTES])
            .map_err(|error| error.to_string())?;
        let (client, reply) = client.handle(reply.as_bytes()).map_err(|error| error.to_string())?;
        let reply = server.handle(reply.as_bytes()).map_err(|error| error.to_string())?;
        client.handle(reply.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn both_sides_agree_with_and_without_channel_binding() {
        let binding = || ChannelBinding::TlsServerEndPoint(vec![5; 32]);
        assert_eq!(exchange(ChannelBinding::Unsupported, ChannelBinding::Unsupported, "pencil"), Ok(()));
        assert_eq!(exchange(binding(), binding(), "pencil"), Ok(()));
        assert_eq!(exchange(ChannelBinding::Unsupported, binding(), "pencil"), Ok(()));
        assert_eq!(exchange(binding(), ChannelBinding::Unsupported, "pencil"), Ok(()));
        let other = ChannelBinding::TlsServerEndPoint(vec![6; 32]);
        assert_eq!(
            exchange(other, binding(), "pencil"),
            Err("SCRAM channel binding check failed".to_owned())
        );
        let wrong = exchange(ChannelBinding::Unsupported, ChannelBinding::Unsupported, "pen");
        assert_eq!(wrong, Err("password authentication failed".to_owned()));
    }

    #[test]
    fn passwords_are_normalized_as_postgresql_does() {
        // RFC 4013: soft hyphen to nothing, compatibility forms to plain ones; a prohibited character keeps all as it is.
        assert_eq!(normalized("I\u{ad}X".as_bytes()).as_ref(), b"IX");
        assert_eq!(normalized("\u{2168}".as_bytes()).as_ref(), b"IX");
        assert_eq!(normalized("\u{ad}\u{7}".as_bytes()).as_ref(), "\u{ad}\u{7}".as_bytes());
        assert_eq!(normalized("a\u{340}".as_bytes()).as_ref(), "a\u{340}".as_bytes());
        assert_eq!(normalized("\u{ad}".as_bytes()).as_ref(), "\u{ad}".as_bytes());
        assert_eq!(normalized("a\u{a0}b".as_bytes()).as_ref(), b"a b");
        assert_eq!(normalized("a\u{221}".as_bytes()).as_ref(), "a\u{221}".as_bytes());
        assert_eq!(normalized(b"\xff\xfe").as_ref(), b"\xff\xfe");
    }
}
