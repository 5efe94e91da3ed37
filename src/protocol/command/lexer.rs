//! Words of a replication command, by the rules of `repl_scanner.l`.
//!
//! The longest match wins, keywords only in capitals; everything else about the words is the parser's matter.

use crate::protocol::command::CommandError;
use crate::protocol::frontend::truncate_identifier;
use crate::wal::Lsn;

/// A word, and where it ends in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Keyword(&'static str),
    /// In lower case unless quoted, cut to 63 bytes.
    Identifier(String),
    Text(String),
    Number(u64),
    Position(Option<Lsn>),
    Other(char),
    End,
}

pub(super) struct Lexer<'a> {
    text: &'a str,
    rest: &'a str,
}

impl<'a> Lexer<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, rest: text }
    }

    /// Bytes read so far.
    pub(super) fn offset(&self) -> usize {
        self.text.len() - self.rest.len()
    }

    pub(super) fn next(&mut self) -> Result<Token, CommandError> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
        let Some(first) = self.rest.chars().next() else {
            return Ok(Token::End);
        };
        if let Some(position) = self.position() {
            return position.map(Token::Position);
        }
        match first {
            '\'' => self.quoted('\'').map(Token::Text),
            '"' => self.quoted('"').map(|name| Token::Identifier(truncate_identifier(&name).to_owned())),
            '0'..='9' => Ok(Token::Number(self.number())),
            first if is_identifier_start(first) => Ok(self.word()),
            other => {
                self.skip(other.len_utf8());
                Ok(Token::Other(other))
            }
        }
    }

    /// `{hexdigit}+\/{hexdigit}+`, which is longer than a word or a number that begins in the same place.
    fn position(&mut self) -> Option<Result<Option<Lsn>, CommandError>> {
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_hexdigit).count();
        let high = digits(self.rest);
        let after = self.rest.get(high..)?.strip_prefix('/')?;
        let low = digits(after);
        if high == 0 || low == 0 {
            return None;
        }
        let position = self.skip(high + 1 + low);
        Some(crate::wal::lsn::parse_lsn_or_zero(position).map_err(|_| CommandError::InvalidStart))
    }

    fn quoted(&mut self, quote: char) -> Result<String, CommandError> {
        let mut value = String::new();
        loop {
            // Skips the opening quote, or the second one of a pair.
            self.skip(1);
            let end = self.rest.find(quote).ok_or(CommandError::UnterminatedQuote)?;
            value.push_str(self.skip(end));
            self.skip(1);
            if !self.rest.starts_with(quote) {
                return Ok(value);
            }
            value.push(quote);
        }
    }

    fn number(&mut self) -> u64 {
        let digits = self.rest.bytes().take_while(u8::is_ascii_digit).count();
        // Too many digits: as large as can be, which no field of a command can hold.
        self.skip(digits).parse().unwrap_or(u64::MAX)
    }

    fn word(&mut self) -> Token {
        let len = self.rest.find(|c| !is_identifier_start(c) && !matches!(c, '0'..='9' | '$'));
        let word = self.skip(len.unwrap_or(self.rest.len()));
        match KEYWORDS.iter().find(|&&keyword| keyword == word) {
            Some(keyword) => Token::Keyword(keyword),
            None => Token::Identifier(truncate_identifier(&word.to_ascii_lowercase()).to_owned()),
        }
    }

    /// Goes `bytes` further, which must be a boundary of characters within the rest.
    fn skip(&mut self, bytes: usize) -> &'a str {
        let (skipped, rest) = self.rest.split_at_checked(bytes).unwrap_or((self.rest, ""));
        self.rest = rest;
        skipped
    }
}

fn is_identifier_start(character: char) -> bool {
    character.is_ascii_alphabetic() || character == '_' || !character.is_ascii()
}

const KEYWORDS: [&str; 21] = [
    "BASE_BACKUP",
    "IDENTIFY_SYSTEM",
    "READ_REPLICATION_SLOT",
    "SHOW",
    "TIMELINE",
    "START_REPLICATION",
    "CREATE_REPLICATION_SLOT",
    "DROP_REPLICATION_SLOT",
    "ALTER_REPLICATION_SLOT",
    "TIMELINE_HISTORY",
    "PHYSICAL",
    "RESERVE_WAL",
    "LOGICAL",
    "SLOT",
    "TEMPORARY",
    "TWO_PHASE",
    "EXPORT_SNAPSHOT",
    "NOEXPORT_SNAPSHOT",
    "USE_SNAPSHOT",
    "WAIT",
    "UPLOAD_MANIFEST",
];
