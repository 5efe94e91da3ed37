//! Names of databases and users in a rule.

use crate::access::error::LineProblem;
use crate::access::regex::Regex;
use crate::access::tokens::Token;
use crate::access::users::Users;

/// One of the names in a field.
#[derive(Clone, Debug)]
pub(super) struct Name {
    token: Token,
    /// A name that begins with a slash is one, in quotes, too.
    regex: Option<Regex>,
}

impl Name {
    pub(super) fn of(token: &Token) -> Result<Self, LineProblem> {
        let regex = match token.text.strip_prefix('/') {
            Some(pattern) => Some(compile(pattern)?),
            None => None,
        };
        Ok(Self { token: token.clone(), regex })
    }

    pub(super) fn all_of(field: &[Token]) -> Result<Vec<Self>, LineProblem> {
        field.iter().map(Self::of).collect()
    }

    pub(super) fn token(&self) -> &Token {
        &self.token
    }

    /// The pattern, where it is one.
    pub(super) fn regex(&self) -> Option<&Regex> {
        self.regex.as_ref()
    }

    /// Whether it is `+group`.
    pub(super) fn is_group(&self) -> bool {
        !self.token.quoted && self.token.text.starts_with('+')
    }

    /// Whether a user is meant (`check_role`).
    pub(super) fn is_user(&self, user: &str, users: Option<&Users>) -> bool {
        match self.token.text.strip_prefix('+').filter(|_| self.is_group()) {
            Some(group) => users.is_some_and(|users| users.is_member(user, group)),
            None => self.token.is_keyword("all") || self.is(user),
        }
    }

    /// Whether it is this very name, or a pattern of it.
    pub(super) fn is(&self, name: &str) -> bool {
        match &self.regex {
            Some(regex) => regex.is_match(name),
            None => self.token.text == name,
        }
    }
}

/// Compiles what follows the slash.
pub(super) fn compile(pattern: &str) -> Result<Regex, LineProblem> {
    Regex::compile(pattern).map_err(|problem| LineProblem::Pattern { pattern: pattern.to_owned(), problem })
}
