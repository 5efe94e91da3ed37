//! The users file: who may connect, and what proves it.
//!
//! Owns its reading: `name = "SCRAM-SHA-256$..."` lines, the verifiers being those of `pg_authid.rolpassword`. Holds no
//! password; a verifier is a secret all the same.

use std::{collections::BTreeMap, fmt};

use secrecy::SecretString;

use crate::config::{document::Document, error::Problem};
use crate::protocol::scram::Verifier;

/// User names and their SCRAM-SHA-256 verifiers; never empty.
#[derive(Clone)]
pub struct Users(BTreeMap<String, SecretString>);

impl Users {
    /// The verifier of `name`, as PostgreSQL stores it.
    pub fn verifier(&self, name: &str) -> Option<&SecretString> {
        self.0.get(name)
    }

    /// Every user with its verifier.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &SecretString)> {
        self.0.iter().map(|(name, verifier)| (name.as_str(), verifier))
    }

    /// Reads the file's text; the error comes with its line.
    pub(crate) fn parse(text: &str) -> Result<Self, (Problem, Option<usize>)> {
        let document = Document::parse(text)?;
        let with_line = |problem: Problem| {
            let line = document.line_of(&problem.keys());
            (problem, line)
        };
        let verifiers: BTreeMap<String, String> =
            document.read_any().map_err(without_value).map_err(with_line)?;
        if verifiers.is_empty() {
            return Err((Problem::NoUsers, None));
        }
        if let Some((name, _)) = verifiers.iter().find(|(_, verifier)| verifier.parse::<Verifier>().is_err())
        {
            return Err(with_line(Problem::InvalidVerifier(name.clone())));
        }
        Ok(Self(verifiers.into_iter().map(|(name, verifier)| (name, SecretString::from(verifier))).collect()))
    }
}

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Whatever was written in the wrong place may be a secret.
fn without_value(problem: Problem) -> Problem {
    match problem {
        Problem::Invalid { key, .. } => Problem::InvalidVerifier(key),
        other => other,
    }
}
