//! The client's side of SCRAM.
//!
//! Trusts nothing a server says before its signature is verified: lengths and iterations are limited, and an exchange that
//! ends without the signature has not succeeded.

use std::fmt;
use std::num::NonZeroU32;

use secrecy::{ExposeSecret, SecretBox, SecretSlice};

use crate::protocol::scram::attributes::{is_printable, take};
use crate::protocol::scram::{
    BINDING_TYPE, ChannelBinding, ClientError, ITERATIONS_MAX, Key, NONCE_BYTES, NONCE_TEXT_BYTES_MAX,
    SALT_BYTES_MAX, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, binding_attribute, decode_base64, encode_base64, hash,
    hmac, is_same, salted_password, xor,
};

/// Whether channel binding is wanted (libpq's `channel_binding`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBindingPolicy {
    /// Not at all.
    Disable,
    /// Where it can be had.
    Prefer,
    /// Without it no connection.
    Require,
}

/// What a client proves who it is with.
#[derive(Debug)]
enum Secret {
    Password(SecretSlice<u8>),
    /// What of a password the proof is made from.
    ClientKey(SecretBox<Key>),
}

/// A client that has not begun.
#[derive(Debug)]
pub struct Client {
    secret: Secret,
    server_key: Option<SecretBox<Key>>,
    binding: ChannelBinding,
    policy: ChannelBindingPolicy,
}

/// The client's first message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFirst {
    /// The mechanism chosen.
    pub mechanism: &'static str,
    /// Its first data.
    pub message: String,
}

impl Client {
    /// `binding` is what this connection can be bound to.
    pub fn new(password: &[u8], binding: ChannelBinding, policy: ChannelBindingPolicy) -> Self {
        Self { secret: Secret::Password(password.to_vec().into()), server_key: None, binding, policy }
    }

    /// As [`Self::new`], with the ClientKey of RFC 5802 for a password. The ServerKey does not follow from it: without
    /// [`Self::expecting`] the exchange fails, at the server's signature, as libpq's does.
    pub fn of_client_key(key: &Key, binding: ChannelBinding, policy: ChannelBindingPolicy) -> Self {
        let secret = Secret::ClientKey(Box::new(*key).into());
        Self { secret, server_key: None, binding, policy }
    }

    /// With the ServerKey that the server must have, whatever the password says.
    pub fn expecting(self, server_key: &Key) -> Self {
        Self { server_key: Some(Box::new(*server_key).into()), ..self }
    }

    /// Chooses among the mechanisms that the server offers. `nonce` must be random and never used before.
    pub fn start(
        self,
        offered: &[String],
        nonce: [u8; NONCE_BYTES],
    ) -> Result<(ClientFirst, ExpectServerFirst), ClientError> {
        let is_offered = |mechanism: &str| offered.iter().any(|offered| offered == mechanism);
        let binding = match self.binding {
            ChannelBinding::TlsServerEndPoint(hash) if self.policy != ChannelBindingPolicy::Disable => {
                Some(hash)
            }
            _ => None,
        };
        let (mechanism, gs2_header, binding) = match binding {
            Some(hash) if is_offered(SCRAM_SHA_256_PLUS) => {
                (SCRAM_SHA_256_PLUS, format!("p={BINDING_TYPE},,"), Some(hash))
            }
            _ if self.policy == ChannelBindingPolicy::Require => return Err(ClientError::BindingRequired),
            // "y" says that we could but the server did not offer it: if it did, somebody changed the offer.
            binding if is_offered(SCRAM_SHA_256) => {
                (SCRAM_SHA_256, if binding.is_some() { "y,," } else { "n,," }.to_owned(), None)
            }
            _ => return Err(ClientError::NoMechanism),
        };
        let nonce = encode_base64(&nonce);
        // The user's name is that of the startup packet; libpq leaves it empty here too.
        let bare = format!("n=,r={nonce}");
        let first = ClientFirst { mechanism, message: format!("{gs2_header}{bare}") };
        let binding_attribute = binding_attribute(&gs2_header, binding.as_deref());
        let Self { secret, server_key, .. } = self;
        Ok((first, ExpectServerFirst { secret, server_key, nonce, bare, binding_attribute }))
    }
}

/// Waits for salt and iterations.
#[derive(Debug)]
pub struct ExpectServerFirst {
    secret: Secret,
    server_key: Option<SecretBox<Key>>,
    nonce: String,
    bare: String,
    binding_attribute: String,
}

impl ExpectServerFirst {
    /// Takes the server's first message and gives the proof. Takes as long as the iterations take, with
    /// [`ITERATIONS_MAX`] of them a good part of a second: not for a thread that others wait for.
    pub fn handle(self, message: &[u8]) -> Result<(ExpectServerFinal, String), ClientError> {
        let message = as_text(message)?;
        let mut rest = message;
        let nonce = take(&mut rest, 'r')?;
        if nonce.len() > NONCE_TEXT_BYTES_MAX {
            return Err(ClientError::NonceTooLong(nonce.len()));
        }
        let is_continued = nonce.strip_prefix(&self.nonce).is_some_and(|added| !added.is_empty());
        if !is_continued || !is_printable(nonce) {
            return Err(ClientError::NonceMismatch);
        }
        let salt =
            decode_base64(take(&mut rest, 's')?).filter(|salt| (1..=SALT_BYTES_MAX).contains(&salt.len()));
        let salt = salt.ok_or(ClientError::InvalidSalt)?;
        let iterations = parse_iterations(take(&mut rest, 'i')?)?;
        if !rest.is_empty() {
            return Err(ClientError::Garbage);
        }
        let without_proof = format!("c={},r={nonce}", self.binding_attribute);
        let signed = format!("{},{message},{without_proof}", self.bare);
        let (client_key, derived) = match &self.secret {
            Secret::ClientKey(key) => (*key.expose_secret(), None),
            Secret::Password(password) => {
                let salted = salted_password(password.expose_secret(), &salt, iterations);
                (hmac(&salted, b"Client Key"), Some(hmac(&salted, b"Server Key")))
            }
        };
        let proof = xor(&client_key, &hmac(&hash(&client_key), signed.as_bytes()));
        let server_key = self.server_key.map(|key| *key.expose_secret()).or(derived);
        let signature = server_key.map(|key| hmac(&key, signed.as_bytes()));
        Ok((ExpectServerFinal { signature }, format!("{without_proof},p={}", encode_base64(&proof))))
    }
}

/// Waits for the server's signature.
pub struct ExpectServerFinal {
    /// `None` where there is nothing to know the server by: then none will do. (libpq verifies with a key made of zeros,
    /// which anybody can sign with.)
    signature: Option<Key>,
}

impl fmt::Debug for ExpectServerFinal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExpectServerFinal")
    }
}

impl ExpectServerFinal {
    /// Takes the server's final message. The server is who it says only if this succeeds.
    pub fn handle(self, message: &[u8]) -> Result<(), ClientError> {
        let message = as_text(message)?;
        let mut rest = message;
        if message.starts_with('e') {
            return Err(ClientError::Refused(
                take(&mut rest, 'e')?.escape_default().take(ERROR_SHOWN_MAX).collect(),
            ));
        }
        let signature = decode_base64(take(&mut rest, 'v')?).ok_or(ClientError::InvalidSignature)?;
        if !rest.is_empty() {
            return Err(ClientError::Garbage);
        }
        if signature.len() != size_of::<Key>() {
            return Err(ClientError::InvalidSignature);
        }
        let is_expected = self.signature.is_some_and(|expected| is_same(&signature, &expected));
        if is_expected { Ok(()) } else { Err(ClientError::WrongSignature) }
    }
}

/// Characters shown of a server's reason.
const ERROR_SHOWN_MAX: usize = 200;

fn parse_iterations(text: &str) -> Result<NonZeroU32, ClientError> {
    let iterations: u64 = text.parse().map_err(|_| ClientError::InvalidIterations)?;
    match u32::try_from(iterations) {
        Ok(iterations) if iterations <= ITERATIONS_MAX => {
            NonZeroU32::new(iterations).ok_or(ClientError::InvalidIterations)
        }
        _ => Err(ClientError::TooManyIterations(iterations)),
    }
}

fn as_text(message: &[u8]) -> Result<&str, ClientError> {
    if message.is_empty() {
        return Err(ClientError::Empty);
    }
    std::str::from_utf8(message).map_err(|_| ClientError::NotUtf8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7677 has a user's name in the first message and a nonce that is not ours to choose.
    fn rfc_7677() -> ExpectServerFirst {
        after_first(Client::new(b"pencil", ChannelBinding::Unsupported, ChannelBindingPolicy::Prefer))
    }

    fn after_first(client: Client) -> ExpectServerFirst {
        ExpectServerFirst {
            secret: client.secret,
            server_key: client.server_key,
            nonce: "rOprNGfwEbeRWgbNEkqO".to_owned(),
            bare: "n=user,r=rOprNGfwEbeRWgbNEkqO".to_owned(),
            binding_attribute: "biws".to_owned(),
        }
    }

    const RFC_7677_SERVER_FIRST: &str =
        "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";

    #[test]
    fn the_example_of_rfc_7677_is_computed() {
        let (state, proof) = rfc_7677().handle(RFC_7677_SERVER_FIRST.as_bytes()).unwrap();
        assert_eq!(
            proof,
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
             p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        );
        assert_eq!(state.handle(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="), Ok(()));
        let again = || rfc_7677().handle(RFC_7677_SERVER_FIRST.as_bytes()).unwrap().0;
        let wrong = format!("v={}", encode_base64(&[0; 32]));
        assert_eq!(again().handle(wrong.as_bytes()), Err(ClientError::WrongSignature));
        assert_eq!(again().handle(b"e=other-error"), Err(ClientError::Refused("other-error".to_owned())));
        assert_eq!(again().handle(b"v=AAAA"), Err(ClientError::InvalidSignature));
        assert_eq!(again().handle(b""), Err(ClientError::Empty));
    }

    /// The keys of RFC 7677's password, salt and iterations, as Python's `hashlib` and `hmac` compute them.
    const RFC_7677_CLIENT_KEY: &str = "pg/JI9Z+hkSpLRa5btpe9GVrDHJcSEN0viVTVXaZbos=";
    const RFC_7677_SERVER_KEY: &str = "wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";
    const RFC_7677_SIGNATURE: &[u8] = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";

    fn key(text: &str) -> Key {
        decode_base64(text).unwrap().try_into().unwrap()
    }

    fn of_client_key(text: &str) -> Client {
        Client::of_client_key(&key(text), ChannelBinding::Unsupported, ChannelBindingPolicy::Prefer)
    }

    #[test]
    fn keys_do_what_the_password_does_that_they_were_made_from() {
        let (server_key, other_key) = (key(RFC_7677_SERVER_KEY), key(RFC_7677_CLIENT_KEY));
        let exchange = |client: Client| {
            let (state, proof) = after_first(client).handle(RFC_7677_SERVER_FIRST.as_bytes()).unwrap();
            let is_right = proof.ends_with(",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=");
            (is_right, state.handle(RFC_7677_SIGNATURE))
        };
        let of_password =
            |text: &[u8]| Client::new(text, ChannelBinding::Unsupported, ChannelBindingPolicy::Prefer);
        let client = || of_client_key(RFC_7677_CLIENT_KEY);
        assert_eq!(exchange(client().expecting(&server_key)), (true, Ok(())));
        assert_eq!(exchange(client().expecting(&other_key)), (true, Err(ClientError::WrongSignature)));
        // The ServerKey is no part of the proof, and goes before the one that the password would give.
        assert_eq!(exchange(of_password(b"pencil").expecting(&server_key)), (true, Ok(())));
        let wrong = exchange(of_password(b"pencil").expecting(&other_key));
        assert_eq!(wrong, (true, Err(ClientError::WrongSignature)));
        assert_eq!(exchange(of_password(b"pen").expecting(&server_key)), (false, Ok(())));
        let wrong = exchange(of_client_key(RFC_7677_SERVER_KEY).expecting(&server_key));
        assert_eq!(wrong, (false, Ok(())));
    }

    #[test]
    fn without_a_server_key_no_signature_will_do() {
        let client = of_client_key(RFC_7677_CLIENT_KEY);
        let (state, _) = after_first(client).handle(RFC_7677_SERVER_FIRST.as_bytes()).unwrap();
        assert_eq!(state.handle(RFC_7677_SIGNATURE), Err(ClientError::WrongSignature));
        // Signed with the key that follows from no password at all.
        let client = of_client_key(RFC_7677_CLIENT_KEY);
        let (state, proof) = after_first(client).handle(RFC_7677_SERVER_FIRST.as_bytes()).unwrap();
        let without_proof = proof.split(",p=").next().unwrap();
        let signed = format!("n=user,r=rOprNGfwEbeRWgbNEkqO,{RFC_7677_SERVER_FIRST},{without_proof}");
        let forged = hmac(&hmac(&[0; 32], b"Server Key"), signed.as_bytes());
        let forged = format!("v={}", encode_base64(&forged));
        assert_eq!(state.handle(forged.as_bytes()), Err(ClientError::WrongSignature));
    }

    #[test]
    fn keys_are_not_printed() {
        let client = of_client_key(RFC_7677_CLIENT_KEY).expecting(&key(RFC_7677_SERVER_KEY));
        let shown = format!("{client:?}");
        assert!(shown.contains("REDACTED") && !shown.contains(&format!("{:?}", key(RFC_7677_CLIENT_KEY))));
    }

    #[test]
    fn a_malicious_server_is_limited() {
        let refused = |message: &str| rfc_7677().handle(message.as_bytes()).unwrap_err();
        let nonce = "rOprNGfwEbeRWgbNEkqOx";
        assert_eq!(
            refused(&format!("r={nonce},s=AAAA,i=1000001")),
            ClientError::TooManyIterations(1_000_001)
        );
        assert_eq!(refused(&format!("r={nonce},s=AAAA,i=0")), ClientError::InvalidIterations);
        assert_eq!(refused(&format!("r={nonce},s=AAAA,i=-1")), ClientError::InvalidIterations);
        assert_eq!(
            refused(&format!("r={nonce}{},s=AAAA,i=1", "x".repeat(1024))),
            ClientError::NonceTooLong(1045)
        );
        assert_eq!(refused("r=rOprNGfwEbeRWgbNEkqO,s=AAAA,i=1"), ClientError::NonceMismatch);
        assert_eq!(refused("r=other,s=AAAA,i=1"), ClientError::NonceMismatch);
        assert_eq!(refused(&format!("r={nonce},s={},i=1", "AAAA".repeat(400))), ClientError::InvalidSalt);
        assert_eq!(refused(&format!("r={nonce},s=AAAA,i=1,x=y")), ClientError::Garbage);
        assert_eq!(refused(&format!("s=AAAA,r={nonce}")), ClientError::AttributeExpected('r'));
    }

    #[test]
    fn the_flag_tells_the_truth_about_channel_binding() {
        let both = [SCRAM_SHA_256_PLUS.to_owned(), SCRAM_SHA_256.to_owned()];
        let plain = [SCRAM_SHA_256.to_owned()];
        let hash = || ChannelBinding::TlsServerEndPoint(vec![1]);
        let header = |binding, policy, offered: &[String]| {
            let (first, _) = Client::new(b"x", binding, policy).start(offered, [0; NONCE_BYTES])?;
            Ok(first.message.split(",n=").next().unwrap().to_owned())
        };
        use ChannelBindingPolicy::{Disable, Prefer, Require};
        assert_eq!(header(hash(), Prefer, &both), Ok("p=tls-server-end-point,".to_owned()));
        assert_eq!(header(hash(), Prefer, &plain), Ok("y,".to_owned()));
        assert_eq!(header(hash(), Disable, &both), Ok("n,".to_owned()));
        assert_eq!(header(ChannelBinding::Unsupported, Prefer, &both), Ok("n,".to_owned()));
        assert_eq!(header(hash(), Require, &plain), Err(ClientError::BindingRequired));
        assert_eq!(header(ChannelBinding::Unsupported, Require, &both), Err(ClientError::BindingRequired));
        assert_eq!(header(hash(), Prefer, &["OAUTHBEARER".to_owned()]), Err(ClientError::NoMechanism));
    }
}
