//! The server's side of SCRAM.
//!
//! Knows verifiers, never passwords. An unknown user goes through the same exchange and fails at its end, so that nobody
//! learns which users exist.

use std::num::NonZeroU32;

use crate::protocol::scram::attributes::{is_printable, sanitized, take, take_any};
use crate::protocol::scram::server_error::Malformed;
use crate::protocol::scram::{
    BINDING_TYPE, ChannelBinding, NONCE_BYTES, NONCE_TEXT_BYTES_MAX, SALT_BYTES, SCRAM_SHA_256,
    SCRAM_SHA_256_PLUS, ServerScramError, Verifier, binding_attribute, decode_base64, encode_base64, hash,
    hmac, is_same, xor,
};

/// Against what a client is checked.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// The user's verifier.
    Known(Verifier),
    /// A verifier that nothing matches, for a user that does not exist: see [`Credentials::mock`].
    Mock(Verifier),
}

impl Credentials {
    /// For a user without a verifier. The salt depends on the user's name and a secret of this installation, so that it is
    /// the same each time, as a real user's is, and cannot be computed elsewhere. `iterations` should be what real
    /// verifiers have.
    pub fn mock(secret: &[u8], user: &str, iterations: NonZeroU32) -> Self {
        let salt = hmac(secret, user.as_bytes()).into_iter().take(SALT_BYTES).collect();
        Self::Mock(Verifier::new(salt, iterations, [0; 32], [0; 32]))
    }

    fn verifier(&self) -> &Verifier {
        match self {
            Self::Known(verifier) | Self::Mock(verifier) => verifier,
        }
    }
}

/// Waits for the client's first message.
#[derive(Debug)]
pub struct Server {
    credentials: Credentials,
    binding: ChannelBinding,
}

impl Server {
    /// An exchange with one client. `binding` is what this connection can be bound to.
    pub fn new(credentials: Credentials, binding: ChannelBinding) -> Self {
        Self { credentials, binding }
    }

    /// What to offer, best first.
    pub fn mechanisms(&self) -> &'static [&'static str] {
        match self.binding {
            ChannelBinding::Unsupported => &[SCRAM_SHA_256],
            ChannelBinding::TlsServerEndPoint(_) => &[SCRAM_SHA_256_PLUS, SCRAM_SHA_256],
        }
    }

    /// Takes the client's first message and gives the reply. A client that chose a mechanism without a message is to be sent
    /// an empty one, and its next message is this one. `nonce` must be random and never used before.
    pub fn handle(
        self,
        mechanism: &str,
        message: &[u8],
        nonce: [u8; NONCE_BYTES],
    ) -> Result<(ExpectClientFinal, String), ServerScramError> {
        if !self.mechanisms().contains(&mechanism) {
            return Err(ServerScramError::InvalidMechanism);
        }
        let is_bound = mechanism == SCRAM_SHA_256_PLUS;
        let message = as_text(message)?;
        let (gs2_header, bare) = self.split_gs2_header(message, is_bound)?;
        let client_nonce = client_nonce(bare)?;
        let nonce = format!("{client_nonce}{}", encode_base64(&nonce));
        let verifier = self.credentials.verifier();
        let server_first = format!("r={nonce},s={},i={}", encode_base64(&verifier.salt), verifier.iterations);
        let binding = match &self.binding {
            ChannelBinding::TlsServerEndPoint(hash) if is_bound => Some(hash.as_slice()),
            _ => None,
        };
        let state = ExpectClientFinal {
            binding_attribute: binding_attribute(gs2_header, binding),
            is_bound,
            messages: format!("{bare},{server_first}"),
            nonce,
            credentials: self.credentials,
        };
        Ok((state, server_first))
    }

    /// Divides the first message into the header about channel binding and identity, and what is signed.
    fn split_gs2_header<'a>(
        &self,
        message: &'a str,
        is_bound: bool,
    ) -> Result<(&'a str, &'a str), ServerScramError> {
        let mut rest = message;
        match message.chars().next() {
            Some('n' | 'y') if is_bound => return Err(Malformed::BindingMissing.into()),
            Some('y') if matches!(self.binding, ChannelBinding::TlsServerEndPoint(_)) => {
                return Err(ServerScramError::BindingNegotiation);
            }
            Some('n' | 'y') => rest = comma(message.get(1..).unwrap_or(""))?,
            Some('p') if !is_bound => return Err(Malformed::BindingUnexpected.into()),
            Some('p') => {
                let binding_type = take(&mut rest, 'p')?;
                if binding_type != BINDING_TYPE {
                    let shown = binding_type.chars().take(30).map(|c| sanitized_in_text(Some(c))).collect();
                    return Err(ServerScramError::UnsupportedBindingType(shown));
                }
            }
            found => return Err(Malformed::UnexpectedFlag { found }.into()),
        }
        match rest.chars().next() {
            Some('a') => return Err(ServerScramError::AuthorizationIdentity),
            Some(',') => {}
            found => return Err(Malformed::UnexpectedAttribute { found }.into()),
        }
        let bare = comma(rest)?;
        // The header is all that precedes; its last character is the comma just taken.
        Ok(message.split_at_checked(message.len() - bare.len()).unwrap_or((message, "")))
    }
}

/// Waits for the client's proof.
#[derive(Debug)]
pub struct ExpectClientFinal {
    credentials: Credentials,
    /// The whole nonce: the client's and ours.
    nonce: String,
    /// What the client must repeat of its header, with the binding data.
    binding_attribute: String,
    is_bound: bool,
    /// The first messages of both, as they are signed.
    messages: String,
}

impl ExpectClientFinal {
    /// Takes the client's final message. The client is who it says only if this succeeds; the reply proves to it that we
    /// know its verifier.
    pub fn handle(self, message: &[u8]) -> Result<String, ServerScramError> {
        let message = as_text(message)?;
        let mut rest = message;
        // The attribute is compared without a hint where it differs, though it is no secret.
        if !is_same(take(&mut rest, 'c')?.as_bytes(), self.binding_attribute.as_bytes()) {
            return Err(match self.is_bound {
                true => ServerScramError::BindingCheckFailed,
                false => ServerScramError::UnexpectedBindingAttribute,
            });
        }
        let nonce = take(&mut rest, 'r')?;
        let (without_proof, proof) = take_proof(message, rest)?;
        if nonce != self.nonce {
            return Err(ServerScramError::NonceMismatch);
        }
        let verifier = self.credentials.verifier();
        let signed = format!("{},{without_proof}", self.messages);
        let client_signature = hmac(&verifier.stored_key, signed.as_bytes());
        let is_right = is_same(&hash(&xor(&proof, &client_signature)), &verifier.stored_key);
        // A mock's proof is computed and compared all the same, so that it takes as long.
        match (&self.credentials, is_right) {
            (Credentials::Known(verifier), true) => {
                Ok(format!("v={}", encode_base64(&hmac(&verifier.server_key, signed.as_bytes()))))
            }
            (Credentials::Known(_), false) | (Credentials::Mock(_), _) => {
                Err(ServerScramError::WrongPassword)
            }
        }
    }
}

/// Skips extensions up to the proof, which is last; gives what precedes it too.
fn take_proof<'a>(message: &'a str, mut rest: &str) -> Result<(&'a str, [u8; 32]), ServerScramError> {
    loop {
        let left = rest.len();
        let (attribute, value) = take_any(&mut rest)?;
        if attribute != 'p' {
            continue;
        }
        let proof = decode_base64(value).and_then(|proof| proof.try_into().ok()).ok_or(Malformed::Proof)?;
        if !rest.is_empty() {
            return Err(Malformed::Garbage.into());
        }
        let without_proof = message.get(..(message.len() - left).saturating_sub(1)).unwrap_or("");
        return Ok((without_proof, proof));
    }
}

/// The nonce in what follows the header of the first message. The user's name there means nothing: that of the startup
/// packet counts.
fn client_nonce(bare: &str) -> Result<&str, ServerScramError> {
    if bare.starts_with('m') {
        return Err(ServerScramError::UnsupportedExtension);
    }
    let mut rest = bare;
    take(&mut rest, 'n')?;
    let nonce = take(&mut rest, 'r')?;
    if !is_printable(nonce) {
        return Err(ServerScramError::NonPrintableNonce);
    }
    if nonce.len() > NONCE_TEXT_BYTES_MAX {
        return Err(Malformed::NonceTooLong.into());
    }
    while !rest.is_empty() {
        take_any(&mut rest)?;
    }
    Ok(nonce)
}

fn as_text(message: &[u8]) -> Result<&str, ServerScramError> {
    if message.is_empty() {
        return Err(Malformed::Empty.into());
    }
    if message.contains(&0) {
        return Err(Malformed::Nul.into());
    }
    std::str::from_utf8(message).map_err(|_| Malformed::NotUtf8.into())
}

fn comma(rest: &str) -> Result<&str, ServerScramError> {
    rest.strip_prefix(',').ok_or_else(|| Malformed::CommaExpected { found: rest.chars().next() }.into())
}

/// A character of a longer text: what cannot be shown becomes a question mark (`sanitize_str`).
fn sanitized_in_text(character: Option<char>) -> String {
    match character {
        Some(character) if !character.is_ascii_graphic() => "?".to_owned(),
        character => sanitized(character),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::scram::ITERATIONS_DEFAULT;

    fn first(binding: ChannelBinding, mechanism: &str, message: &str) -> Result<String, ServerScramError> {
        let verifier = Verifier::from_password(b"pencil", vec![1; 16], NonZeroU32::new(1).unwrap());
        let server = Server::new(Credentials::Known(verifier), binding);
        server.handle(mechanism, message.as_bytes(), [0; NONCE_BYTES]).map(|(_, reply)| reply)
    }

    #[test]
    fn the_first_message_is_held_to_the_grammar() {
        let detail = |message: &str| match first(ChannelBinding::Unsupported, SCRAM_SHA_256, message) {
            Err(ServerScramError::Malformed(malformed)) => malformed.detail(),
            other => format!("{other:?}"),
        };
        assert_eq!(detail(""), "The message is empty.");
        assert_eq!(detail("n,,\0"), "Message length does not match input length.");
        assert_eq!(detail("x,,"), "Unexpected channel-binding flag \"x\".");
        assert_eq!(detail("n"), "Comma expected, but found character \"0x00\".");
        assert_eq!(detail("n,x"), "Unexpected attribute \"x\" in client-first-message.");
        assert_eq!(detail("n,,r=x"), "Expected attribute \"n\" but found \"r\".");
        assert_eq!(detail("n,,n"), "Expected character \"=\" for attribute \"n\".");
        assert_eq!(detail("n,,n=,r=x,9"), "Attribute expected, but found invalid character \"9\".");
        let refused = |message| first(ChannelBinding::Unsupported, SCRAM_SHA_256, message).unwrap_err();
        assert_eq!(refused("n,a=root,n=,r=x"), ServerScramError::AuthorizationIdentity);
        assert_eq!(refused("n,,m=x,n=,r=x"), ServerScramError::UnsupportedExtension);
        assert_eq!(refused("n,,n=,r=\u{e9}"), ServerScramError::NonPrintableNonce);
        assert_eq!(refused(&format!("n,,n=,r={}", "x".repeat(1025))), Malformed::NonceTooLong.into());
        let plus = first(ChannelBinding::Unsupported, SCRAM_SHA_256_PLUS, "p=tls-server-end-point,,n=,r=x");
        assert_eq!(plus, Err(ServerScramError::InvalidMechanism));
    }

    #[test]
    fn a_downgrade_of_channel_binding_is_noticed() {
        let binding = || ChannelBinding::TlsServerEndPoint(vec![1; 32]);
        let refused = |mechanism, message| first(binding(), mechanism, message).unwrap_err();
        assert_eq!(refused(SCRAM_SHA_256, "y,,n=,r=x"), ServerScramError::BindingNegotiation);
        assert_eq!(refused(SCRAM_SHA_256_PLUS, "n,,n=,r=x"), Malformed::BindingMissing.into());
        assert_eq!(
            refused(SCRAM_SHA_256, "p=tls-server-end-point,,n=,r=x"),
            Malformed::BindingUnexpected.into()
        );
        let unknown = refused(SCRAM_SHA_256_PLUS, "p=tls-unique,,n=,r=x");
        assert_eq!(unknown.to_string(), "unsupported SCRAM channel-binding type \"tls-unique\"");
        assert!(first(binding(), SCRAM_SHA_256, "n,,n=,r=x").is_ok());
        assert!(first(ChannelBinding::Unsupported, SCRAM_SHA_256, "y,,n=,r=x").is_ok());
    }

    #[test]
    fn a_mock_looks_the_same_each_time_and_nothing_matches_it() {
        let start = |user: &str| {
            let server = Server::new(
                Credentials::mock(b"secret", user, ITERATIONS_DEFAULT),
                ChannelBinding::Unsupported,
            );
            server.handle(SCRAM_SHA_256, b"n,,n=,r=x", [0; NONCE_BYTES]).unwrap()
        };
        assert_eq!(start("nobody").1, start("nobody").1);
        assert_ne!(start("nobody").1, start("somebody").1);
        let (state, reply) = start("nobody");
        let nonce = reply.split(',').next().unwrap().to_owned();
        let proof = encode_base64(&[0; 32]);
        let error = state.handle(format!("c=biws,{nonce},p={proof}").as_bytes()).unwrap_err();
        let told = error.to_server_error("nobody");
        assert_eq!(
            told.to_string(),
            "FATAL: password authentication failed for user \"nobody\" (SQLSTATE 28P01)"
        );
    }

    #[test]
    fn the_final_message_must_repeat_flag_and_nonce() {
        let verifier = Verifier::from_password(b"pencil", vec![1; 16], NonZeroU32::new(1).unwrap());
        let finish = |message: &str| {
            let server = Server::new(Credentials::Known(verifier.clone()), ChannelBinding::Unsupported);
            let (state, _) = server.handle(SCRAM_SHA_256, b"n,,n=,r=x", [0; NONCE_BYTES]).unwrap();
            state.handle(message.as_bytes()).unwrap_err()
        };
        let proof = encode_base64(&[0; 32]);
        let nonce = format!("x{}", encode_base64(&[0; NONCE_BYTES]));
        assert_eq!(
            finish(&format!("c=eSws,r={nonce},p={proof}")),
            ServerScramError::UnexpectedBindingAttribute
        );
        assert_eq!(finish(&format!("c=biws,r=x,p={proof}")), ServerScramError::NonceMismatch);
        assert_eq!(finish(&format!("c=biws,r={nonce},p={proof},x=")), Malformed::Garbage.into());
        assert_eq!(finish(&format!("c=biws,r={nonce},p=AAAA")), Malformed::Proof.into());
        assert_eq!(finish(&format!("c=biws,r={nonce}")), Malformed::End.into());
        assert_eq!(finish(&format!("c=biws,r={nonce},p={proof}")), ServerScramError::WrongPassword);
    }
}
