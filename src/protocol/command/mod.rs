//! Replication commands: what a client asks for between authentication and the stream.
//!
//! `parse` follows PostgreSQL's own scanner and grammar for these commands; what does not begin with one of their keywords
//! is SQL and is kept as it came. `Display` prints a command so that every supported server reads it, and so that parsing
//! gives the same command again. Carries nothing out.

mod lexer;
mod parser;
mod print;
mod slot_name;

use crate::protocol::{ServerError, SqlState};
use crate::wal::{Lsn, TimelineId};

pub use slot_name::{InvalidSlotName, validate_slot_name};

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Who are you, and where?
    IdentifySystem,
    /// A setting's value.
    Show(String),
    /// The history file of a timeline.
    TimelineHistory(TimelineId),
    /// Creates a slot.
    CreateReplicationSlot(CreateReplicationSlot),
    /// Drops a slot.
    DropReplicationSlot {
        /// The slot.
        slot: String,
        /// What to do while it is in use.
        when_active: WhenActive,
    },
    /// A slot's state.
    ReadReplicationSlot(String),
    /// Changes a logical slot.
    AlterReplicationSlot {
        /// The slot.
        slot: String,
        /// What to change.
        options: Vec<CommandOption>,
    },
    /// Starts a stream.
    StartReplication(StartReplication),
    /// A base backup: the whole text of the command without its semicolon, for the server that carries it out.
    BaseBackup(String),
    /// The manifest for an incremental backup follows.
    UploadManifest,
    /// Anything else: SQL, also an empty query.
    Sql(String),
}

/// Creates a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateReplicationSlot {
    /// Its name, not validated.
    pub slot: String,
    /// Whether it lives as long as the session.
    pub persistence: Persistence,
    /// What it is for.
    pub kind: CreateSlotKind,
}

/// How long a slot lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistence {
    /// Until it is dropped.
    Permanent,
    /// Until the session ends.
    Temporary,
}

/// What a slot is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CreateSlotKind {
    /// WAL as it is.
    Physical {
        /// Whether WAL is kept from now on (`true`), or from the first position a standby reports.
        reserve_wal: bool,
    },
    /// Decoded changes.
    Logical {
        /// The output plugin.
        plugin: String,
        /// Its options, not checked.
        options: Vec<CommandOption>,
    },
}

/// What to do with a slot in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenActive {
    /// Refuse.
    Fail,
    /// Wait until it is not.
    Wait,
}

/// Starts a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartReplication {
    /// The slot to use.
    pub slot: Option<String>,
    /// Where to start; `None` for `0/0`.
    pub start: Option<Lsn>,
    /// What to stream.
    pub kind: StreamKind,
}

/// What to stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamKind {
    /// WAL as it is.
    Physical {
        /// Of this timeline; `None` for the server's own.
        timeline: Option<TimelineId>,
    },
    /// Decoded changes, with the plugin's options.
    Logical(Vec<(String, Option<String>)>),
}

/// An option of a command, in the form `name [value]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandOption {
    /// Its name in lower case, unless it was quoted.
    pub name: String,
    /// Its value.
    pub value: Option<OptionValue>,
}

/// An option's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionValue {
    /// A word or a quoted string.
    Text(String),
    /// A number.
    Number(u32),
}

impl CommandOption {
    /// The value as a boolean, true when it is left out (`defGetBoolean`).
    pub fn boolean(&self) -> Result<bool, CommandError> {
        let is = |text: &str, word: &str| text.eq_ignore_ascii_case(word);
        match &self.value {
            None | Some(OptionValue::Number(1)) => Ok(true),
            Some(OptionValue::Number(0)) => Ok(false),
            Some(OptionValue::Text(text)) if is(text, "true") || is(text, "on") => Ok(true),
            Some(OptionValue::Text(text)) if is(text, "false") || is(text, "off") => Ok(false),
            Some(_) => Err(CommandError::NotBoolean(self.name.clone())),
        }
    }
}

/// The text is no command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The grammar has no such command.
    #[error("syntax error")]
    Syntax,
    /// A quote is not closed.
    #[error("unterminated quoted string")]
    UnterminatedQuote,
    /// An LSN has more digits than a position.
    #[error("invalid streaming start location")]
    InvalidStart,
    /// A timeline of zero, or one too large.
    #[error("invalid timeline {0}")]
    InvalidTimeline(u64),
    /// An option was given twice, or does not fit the kind of slot.
    #[error("conflicting or redundant options")]
    RedundantOptions,
    /// An option is not known.
    #[error("unrecognized option: {0}")]
    UnrecognizedOption(String),
    /// An option's value is no boolean.
    #[error("{0} requires a Boolean value")]
    NotBoolean(String),
    /// The query is not UTF-8.
    #[error("invalid byte sequence for encoding \"UTF8\"")]
    NotUtf8,
}

impl CommandError {
    /// The code that PostgreSQL gives it.
    pub fn sqlstate(&self) -> SqlState {
        match self {
            Self::NotUtf8 => SqlState::CHARACTER_NOT_IN_REPERTOIRE,
            Self::UnrecognizedOption(_) => SqlState::INTERNAL_ERROR,
            Self::Syntax
            | Self::UnterminatedQuote
            | Self::InvalidStart
            | Self::InvalidTimeline(_)
            | Self::RedundantOptions
            | Self::NotBoolean(_) => SqlState::SYNTAX_ERROR,
        }
    }
}

impl From<CommandError> for ServerError {
    fn from(error: CommandError) -> Self {
        Self::error(error.sqlstate(), error.to_string())
    }
}

/// Body of the fuzz target: a command that reads must print and read back the same.
pub fn fuzz_command(bytes: &[u8]) {
    if let Ok(command) = Command::parse(bytes) {
        let text = command.to_string();
        assert_eq!(Command::parse(&text).as_ref(), Ok(&command), "{text}");
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = validate_slot_name(text);
    }
}
