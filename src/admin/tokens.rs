//! What clients of the HTTP listener show, and who they are by it.
//!
//! Owns the tokens and their comparison, in a time that does not tell where they differ. A token is never shown. What each may
//! do is for the routes to say.

use aws_lc_rs::constant_time::verify_slices_are_equal;
use axum::http::{HeaderMap, header};
use secrecy::{ExposeSecret, SecretString};

/// The tokens that are known.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    operator: Option<SecretString>,
    reader: Option<SecretString>,
}

/// Who somebody is, by what he shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// Nobody who is known.
    Stranger,
    /// Somebody who may see everything.
    Reader,
    /// Somebody who may change something, too.
    Operator,
}

impl Tokens {
    /// One for those who may do everything, and one for those who may only read.
    pub fn new(operator: Option<SecretString>, reader: Option<SecretString>) -> Self {
        Self { operator, reader }
    }

    /// Whether anybody may change something.
    pub(super) fn has_operators(&self) -> bool {
        self.operator.is_some()
    }

    /// Whether somebody can be told from others at all.
    pub(super) fn are_set(&self) -> bool {
        self.operator.is_some() || self.reader.is_some()
    }

    pub(super) fn may_read(&self, standing: Standing) -> bool {
        !self.are_set() || standing >= Standing::Reader
    }

    /// Who asks, by the head of a request.
    pub(super) fn standing(&self, headers: &HeaderMap) -> Standing {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some(given) = given.and_then(|value| value.strip_prefix("Bearer ")) else {
            return Standing::Stranger;
        };
        let is = |token: &Option<SecretString>| {
            token.as_ref().is_some_and(|token| {
                verify_slices_are_equal(given.as_bytes(), token.expose_secret().as_bytes()).is_ok()
            })
        };
        match (is(&self.operator), is(&self.reader)) {
            (true, _) => Standing::Operator,
            (false, true) => Standing::Reader,
            (false, false) => Standing::Stranger,
        }
    }
}
