//! Who may log in.
//!
//! Owns the verifiers of the users file, and the stand-in for users that are not in it: an unknown name goes through the
//! same exchange as a known one, with a salt that stays the same over restarts, so that nobody learns who exists.

use std::{collections::BTreeMap, fmt};

use aws_lc_rs::digest;

use secrecy::ExposeSecret;

use crate::config;
use crate::protocol::scram::{Credentials, ITERATIONS_DEFAULT, Verifier};

/// How clients prove who they are.
#[derive(Clone, Debug)]
pub enum Authentication {
    /// Not at all, but only clients on this machine are let in.
    TrustLocal,
    /// By SCRAM-SHA-256, wherever they are.
    Scram(Users),
}

/// A user's verifier cannot be read; it is not repeated, because it may be a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid SCRAM secret of user \"{0}\": expected SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>"
)]
pub struct InvalidUser(pub String);

impl TryFrom<&config::Authentication> for Authentication {
    type Error = InvalidUser;

    fn try_from(configured: &config::Authentication) -> Result<Self, Self::Error> {
        let config::Authentication::Scram(users) = configured else { return Ok(Self::TrustLocal) };
        let read = |(name, verifier): (&str, &secrecy::SecretString)| {
            let verifier = verifier.expose_secret().parse().map_err(|_| InvalidUser(name.to_owned()))?;
            Ok((name.to_owned(), verifier))
        };
        Ok(Self::Scram(Users::new(users.iter().map(read).collect::<Result<_, _>>()?)))
    }
}

/// The users by name.
#[derive(Clone)]
pub struct Users {
    by_name: BTreeMap<String, Verifier>,
    mock_secret: digest::Digest,
}

impl Users {
    /// These users and no others.
    pub fn new(by_name: BTreeMap<String, Verifier>) -> Self {
        // What only the owner of the users file knows, and what changes only with it.
        let mut context = digest::Context::new(&digest::SHA256);
        for (name, verifier) in &by_name {
            context.update(format!("{name}\0{verifier}\0").as_bytes());
        }
        Self { by_name, mock_secret: context.finish() }
    }

    pub(super) fn credentials(&self, user: &str) -> Credentials {
        match self.by_name.get(user) {
            Some(verifier) => Credentials::Known(verifier.clone()),
            None => Credentials::mock(self.mock_secret.as_ref(), user, ITERATIONS_DEFAULT),
        }
    }
}

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Users").field(&self.by_name.keys()).finish()
    }
}
