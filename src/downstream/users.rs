//! Who may log in.
//!
//! Owns the verifiers of the users file, and the stand-in for users that are not in it: an unknown name goes through the
//! same exchange as a known one, with a salt that stays the same over restarts, so that nobody learns who exists.

use std::{collections::BTreeMap, fmt};

use aws_lc_rs::digest;

use crate::protocol::scram::{Credentials, ITERATIONS_DEFAULT, Verifier};

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
