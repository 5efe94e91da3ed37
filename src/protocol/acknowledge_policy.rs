//! Names of synchronous standbys, in the grammar of `synchronous_standby_names`.
//!
//! Owns the text: syncrep_scanner.l and syncrep_gram.y, and the word `local`. Who stands behind a name, and what follows
//! from it, is not known here.

use std::fmt;
use std::str::FromStr;

/// When WAL is acknowledged upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AcknowledgePolicy {
    /// When it is durable here.
    Local,
    /// When it is durable here and at standbys.
    Remote(Remote),
}

/// Which standbys must have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// How they are chosen.
    pub method: Method,
    /// How many; at least 1.
    pub count: usize,
    /// The names.
    pub members: Vec<Member>,
}

/// How standbys are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Any so many of the members.
    Any,
    /// So many of those that are there, the first in the list before the others.
    First,
}

/// One name of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Member {
    /// `*`.
    Everybody,
    /// An `application_name`; case does not matter.
    Named(String),
}

/// A policy that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AcknowledgePolicyError {
    /// Not in the grammar.
    #[error("syntax error at or near \"{0}\"")]
    Syntax(String),
    /// Not in the grammar.
    #[error("syntax error at end of input")]
    End,
    /// `ANY 0 (...)`.
    #[error("number of synchronous standbys ({0}) must be greater than zero")]
    Count(String),
    /// More than the list can ever give.
    #[error("number of synchronous standbys ({count}) is greater than the number of names ({names})")]
    TooMany {
        /// Asked for.
        count: usize,
        /// In the list.
        names: usize,
    },
}

impl Remote {
    /// The place in the list of the first name that fits; case does not matter.
    pub fn priority(&self, name: &str) -> Option<usize> {
        self.members.iter().position(|member| match member {
            Member::Everybody => true,
            Member::Named(wanted) => wanted.eq_ignore_ascii_case(name),
        })
    }
}

impl FromStr for AcknowledgePolicy {
    type Err = AcknowledgePolicyError;

    fn from_str(text: &str) -> Result<Self, AcknowledgePolicyError> {
        let tokens = tokens(text)?;
        if let [Token::Name(word)] = &*tokens
            && word.eq_ignore_ascii_case("local")
        {
            return Ok(Self::Local);
        }
        Parser { tokens: &tokens }.policy().map(Self::Remote)
    }
}

impl fmt::Display for AcknowledgePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Remote(Remote { method, count, members }) = self else { return f.write_str("local") };
        let method = match method {
            Method::Any => "ANY",
            Method::First => "FIRST",
        };
        write!(f, "{method} {count} (")?;
        for (at, member) in members.iter().enumerate() {
            f.write_str(if at == 0 { "" } else { ", " })?;
            match member {
                Member::Everybody => f.write_str("*")?,
                Member::Named(name) => write!(f, "\"{}\"", name.replace('"', "\"\""))?,
            }
        }
        f.write_str(")")
    }
}

/// As syncrep_scanner.l cuts the text.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Name(String),
    Quoted(String),
    Number(String),
    Star,
    Comma,
    Open,
    Close,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(text) | Self::Quoted(text) | Self::Number(text) => f.write_str(text),
            Self::Star => f.write_str("*"),
            Self::Comma => f.write_str(","),
            Self::Open => f.write_str("("),
            Self::Close => f.write_str(")"),
        }
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, AcknowledgePolicyError> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while let Some(first) = rest.chars().next() {
        let taken = |is_part: fn(char) -> bool| rest.find(|c| !is_part(c)).unwrap_or(rest.len());
        let (token, length) = match first {
            '*' => (Token::Star, 1),
            ',' => (Token::Comma, 1),
            '(' => (Token::Open, 1),
            ')' => (Token::Close, 1),
            '"' => {
                let (name, length) = quoted(rest)?;
                (Token::Quoted(name), length)
            }
            '0'..='9' => {
                let length = taken(|c| c.is_ascii_digit());
                (Token::Number(rest.get(..length).unwrap_or_default().to_owned()), length)
            }
            first if is_name(first) && first != '$' => {
                let length = taken(is_name);
                (Token::Name(rest.get(..length).unwrap_or_default().to_owned()), length)
            }
            other => return Err(AcknowledgePolicyError::Syntax(other.to_string())),
        };
        tokens.push(token);
        rest = rest.get(length..).unwrap_or_default().trim_start_matches(is_space);
    }
    Ok(tokens)
}

/// A name in quotes at the beginning of `text`, and how long it is there; a quote within is doubled.
fn quoted(text: &str) -> Result<(String, usize), AcknowledgePolicyError> {
    let mut name = String::new();
    let mut characters = text.char_indices().skip(1).peekable();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' if characters.next_if(|(_, next)| *next == '"').is_some() => name.push('"'),
            '"' => return Ok((name, at + 1)),
            other => name.push(other),
        }
    }
    Err(AcknowledgePolicyError::Syntax(text.to_owned()))
}

fn is_space(character: char) -> bool {
    matches!(character, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c')
}

fn is_name(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '_' | '$') || !character.is_ascii()
}

/// As syncrep_gram.y reads it.
struct Parser<'a> {
    tokens: &'a [Token],
}

impl Parser<'_> {
    fn policy(mut self) -> Result<Remote, AcknowledgePolicyError> {
        let method = match self.tokens.first() {
            Some(Token::Name(word)) if word.eq_ignore_ascii_case("any") => Some(Method::Any),
            Some(Token::Name(word)) if word.eq_ignore_ascii_case("first") => Some(Method::First),
            _ => None,
        };
        if method.is_some() {
            self.next()?;
        }
        let remote = match self.tokens {
            [Token::Number(number), Token::Open, ..] => {
                let (method, number) = (method.unwrap_or(Method::First), number.clone());
                self.next()?;
                self.next()?;
                let members = self.list()?;
                self.expect(&Token::Close)?;
                Remote { method, count: count_of(&number, &members)?, members }
            }
            [Token::Number(_), rest @ ..] if method.is_some() => {
                return Err(rest.first().map_or(AcknowledgePolicyError::End, |token| {
                    AcknowledgePolicyError::Syntax(token.to_string())
                }));
            }
            [] => return Err(AcknowledgePolicyError::End),
            [first, ..] if method.is_some() => return Err(AcknowledgePolicyError::Syntax(first.to_string())),
            _ => Remote { method: Method::First, count: 1, members: self.list()? },
        };
        match self.tokens.first() {
            None => Ok(remote),
            Some(token) => Err(AcknowledgePolicyError::Syntax(token.to_string())),
        }
    }

    fn list(&mut self) -> Result<Vec<Member>, AcknowledgePolicyError> {
        let mut members = Vec::new();
        loop {
            members.push(match self.next()? {
                Token::Star => Member::Everybody,
                Token::Name(name) | Token::Quoted(name) | Token::Number(name) => Member::Named(name),
                other => return Err(AcknowledgePolicyError::Syntax(other.to_string())),
            });
            if self.tokens.first() != Some(&Token::Comma) {
                return Ok(members);
            }
            self.next()?;
        }
    }

    fn next(&mut self) -> Result<Token, AcknowledgePolicyError> {
        let (first, rest) = self.tokens.split_first().ok_or(AcknowledgePolicyError::End)?;
        self.tokens = rest;
        Ok(first.clone())
    }

    fn expect(&mut self, wanted: &Token) -> Result<(), AcknowledgePolicyError> {
        match self.next()? {
            token if token == *wanted => Ok(()),
            other => Err(AcknowledgePolicyError::Syntax(other.to_string())),
        }
    }
}

/// How many are wanted of these.
fn count_of(number: &str, members: &[Member]) -> Result<usize, AcknowledgePolicyError> {
    let count = number.parse().ok().filter(|count| *count > 0);
    let count = count.ok_or_else(|| AcknowledgePolicyError::Count(number.to_owned()))?;
    // PostgreSQL would wait for ever.
    if count > members.len() && !members.contains(&Member::Everybody) {
        return Err(AcknowledgePolicyError::TooMany { count, names: members.len() });
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_is_that_of_synchronous_standby_names() {
        for (given, read) in [
            ("local", "local"),
            (" LOCAL ", "local"),
            ("ANY 1 (a, b)", "ANY 1 (\"a\", \"b\")"),
            ("any 2(a,b , c)", "ANY 2 (\"a\", \"b\", \"c\")"),
            ("first 1 (*)", "FIRST 1 (*)"),
            ("3 (a, *)", "FIRST 3 (\"a\", *)"),
            ("a, b", "FIRST 1 (\"a\", \"b\")"),
            ("\"local\"", "FIRST 1 (\"local\")"),
            ("\"any\", 7", "FIRST 1 (\"any\", \"7\")"),
            ("ANY 1 (\"dc2 \"\"west\"\"\")", "ANY 1 (\"dc2 \"\"west\"\"\")"),
            ("ANY 1 (dc2_ü$1)", "ANY 1 (\"dc2_ü$1\")"),
        ] {
            let policy: AcknowledgePolicy = given.parse().unwrap();
            assert_eq!(policy.to_string(), read);
            assert_eq!(policy.to_string().parse(), Ok(policy), "{read}");
        }
        let syntax = |token: &str| AcknowledgePolicyError::Syntax(token.to_owned());
        for (given, error) in [
            ("", AcknowledgePolicyError::End),
            ("ANY", AcknowledgePolicyError::End),
            ("ANY 1", AcknowledgePolicyError::End),
            ("ANY 1 (a", AcknowledgePolicyError::End),
            ("ANY 1 (a))", syntax(")")),
            ("ANY 1 a", syntax("a")),
            ("ANY (a)", syntax("(")),
            ("a b", syntax("b")),
            ("a,,b", syntax(",")),
            ("ANY 1 (a; b)", syntax(";")),
            ("dc2-a", syntax("-")),
            ("ANY 1 (\"a)", syntax("\"a)")),
            ("ANY 0 (a)", AcknowledgePolicyError::Count("0".to_owned())),
            (
                "ANY 99999999999999999999 (a)",
                AcknowledgePolicyError::Count("99999999999999999999".to_owned()),
            ),
            ("ANY 3 (a, b)", AcknowledgePolicyError::TooMany { count: 3, names: 2 }),
        ] {
            assert_eq!(given.parse::<AcknowledgePolicy>(), Err(error), "{given}");
        }
    }
}
