//! Replication commands from words, by the rules of `repl_gram.y`.
//!
//! One function for each command. Reads what every supported version takes, the older option forms too.

use crate::protocol::command::lexer::{Lexer, Token};
use crate::protocol::command::{
    Command, CommandError, CommandOption, CreateReplicationSlot, CreateSlotKind, OptionValue, Persistence,
    StartReplication, StreamKind, WhenActive,
};
use crate::wal::TimelineId;

impl Command {
    /// Reads the text of a simple query.
    pub fn parse(query: impl AsRef<[u8]>) -> Result<Self, CommandError> {
        let text = std::str::from_utf8(query.as_ref()).map_err(|_| CommandError::NotUtf8)?;
        let mut parser = Parser { lexer: Lexer::new(text), current: Token::End };
        parser.advance()?;
        let Token::Keyword(keyword) = parser.current else {
            return Ok(Self::Sql(text.to_owned()));
        };
        if keyword == "BASE_BACKUP" {
            return parser.base_backup(text);
        }
        let Some(command) = parser.command(keyword)? else {
            return Ok(Self::Sql(text.to_owned()));
        };
        parser.end()?;
        Ok(command)
    }
}

struct Parser<'a> {
    lexer: Lexer<'a>,
    current: Token,
}

impl Parser<'_> {
    /// The command that begins with `keyword`; `None` for keywords that begin none.
    fn command(&mut self, keyword: &str) -> Result<Option<Command>, CommandError> {
        let command: fn(&mut Self) -> Result<Command, CommandError> = match keyword {
            "IDENTIFY_SYSTEM" => |_| Ok(Command::IdentifySystem),
            "UPLOAD_MANIFEST" => |_| Ok(Command::UploadManifest),
            "SHOW" => |parser| parser.dotted_name().map(Command::Show),
            "READ_REPLICATION_SLOT" => |parser| parser.dotted_name().map(Command::ReadReplicationSlot),
            "TIMELINE_HISTORY" => |parser| parser.timeline().map(Command::TimelineHistory),
            "CREATE_REPLICATION_SLOT" => Self::create_replication_slot,
            "DROP_REPLICATION_SLOT" => Self::drop_replication_slot,
            "ALTER_REPLICATION_SLOT" => Self::alter_replication_slot,
            "START_REPLICATION" => Self::start_replication,
            _ => return Ok(None),
        };
        self.advance()?;
        command(self).map(Some)
    }

    fn create_replication_slot(&mut self) -> Result<Command, CommandError> {
        let slot = self.identifier()?;
        let persistence =
            if self.keyword("TEMPORARY")? { Persistence::Temporary } else { Persistence::Permanent };
        let kind = if self.keyword("PHYSICAL")? {
            let options = self.create_slot_options()?;
            CreateSlotKind::Physical { reserve_wal: reserve_wal(&options)? }
        } else if self.keyword("LOGICAL")? {
            CreateSlotKind::Logical { plugin: self.identifier()?, options: self.create_slot_options()? }
        } else {
            return Err(CommandError::Syntax);
        };
        Ok(Command::CreateReplicationSlot(CreateReplicationSlot { slot, persistence, kind }))
    }

    fn drop_replication_slot(&mut self) -> Result<Command, CommandError> {
        let slot = self.identifier()?;
        let when_active = if self.keyword("WAIT")? { WhenActive::Wait } else { WhenActive::Fail };
        Ok(Command::DropReplicationSlot { slot, when_active })
    }

    fn alter_replication_slot(&mut self) -> Result<Command, CommandError> {
        Ok(Command::AlterReplicationSlot { slot: self.identifier()?, options: self.option_list()? })
    }

    fn start_replication(&mut self) -> Result<Command, CommandError> {
        let slot = if self.keyword("SLOT")? { Some(self.identifier()?) } else { None };
        // Only a logical stream needs its slot.
        let is_logical = slot.is_some() && self.keyword("LOGICAL")?;
        if !is_logical {
            self.keyword("PHYSICAL")?;
        }
        let Token::Position(start) = self.current else {
            return Err(CommandError::Syntax);
        };
        self.advance()?;
        let kind = if is_logical {
            StreamKind::Logical(self.plugin_options()?)
        } else {
            let timeline = if self.keyword("TIMELINE")? { Some(self.timeline()?) } else { None };
            StreamKind::Physical { timeline }
        };
        Ok(Command::StartReplication(StartReplication { slot, start, kind }))
    }

    /// The command's text is kept as it is: its options differ from version to version, and the server that carries it
    /// out checks them. Only its end is looked for.
    fn base_backup(&mut self, text: &str) -> Result<Command, CommandError> {
        let start = self.lexer.offset() - "BASE_BACKUP".len();
        let mut end = self.lexer.offset();
        loop {
            self.advance()?;
            match self.current {
                Token::End | Token::Other(';') => break,
                _ => end = self.lexer.offset(),
            }
        }
        self.end()?;
        Ok(Command::BaseBackup(text.get(start..end).unwrap_or(text).to_owned()))
    }

    /// Options in parentheses (15 and later) or as bare keywords.
    fn create_slot_options(&mut self) -> Result<Vec<CommandOption>, CommandError> {
        if self.current == Token::Other('(') {
            return self.option_list();
        }
        let mut options = Vec::new();
        while let Token::Keyword(keyword) = self.current {
            let Some((_, name, value)) = LEGACY_OPTIONS.iter().find(|(legacy, ..)| *legacy == keyword) else {
                break;
            };
            let value = value.map(|value| OptionValue::Text(value.to_owned()));
            options.push(CommandOption { name: (*name).to_owned(), value });
            self.advance()?;
        }
        Ok(options)
    }

    /// `( name [value], ... )`
    fn option_list(&mut self) -> Result<Vec<CommandOption>, CommandError> {
        self.expect('(')?;
        let mut options = Vec::new();
        loop {
            options.push(self.option()?);
            if !self.accept(',')? {
                self.expect(')')?;
                return Ok(options);
            }
        }
    }

    fn option(&mut self) -> Result<CommandOption, CommandError> {
        let name = match &self.current {
            Token::Identifier(name) => name.clone(),
            // The one keyword that the grammar forgot.
            Token::Keyword("READ_REPLICATION_SLOT") => return Err(CommandError::Syntax),
            Token::Keyword(keyword) => keyword.to_ascii_lowercase(),
            _ => return Err(CommandError::Syntax),
        };
        self.advance()?;
        let value = match &self.current {
            Token::Identifier(value) | Token::Text(value) => OptionValue::Text(value.clone()),
            Token::Number(value) => {
                OptionValue::Number(u32::try_from(*value).map_err(|_| CommandError::Syntax)?)
            }
            _ => return Ok(CommandOption { name, value: None }),
        };
        self.advance()?;
        Ok(CommandOption { name, value: Some(value) })
    }

    fn plugin_options(&mut self) -> Result<Vec<(String, Option<String>)>, CommandError> {
        let mut options = Vec::new();
        if !self.accept('(')? {
            return Ok(options);
        }
        loop {
            let name = self.identifier()?;
            let value = match &self.current {
                Token::Text(value) => Some(value.clone()),
                _ => None,
            };
            if value.is_some() {
                self.advance()?;
            }
            options.push((name, value));
            if !self.accept(',')? {
                self.expect(')')?;
                return Ok(options);
            }
        }
    }

    fn dotted_name(&mut self) -> Result<String, CommandError> {
        let mut name = self.identifier()?;
        while self.accept('.')? {
            name = name + "." + &self.identifier()?;
        }
        Ok(name)
    }

    fn identifier(&mut self) -> Result<String, CommandError> {
        let Token::Identifier(name) = &self.current else {
            return Err(CommandError::Syntax);
        };
        let name = name.clone();
        self.advance()?;
        Ok(name)
    }

    fn timeline(&mut self) -> Result<TimelineId, CommandError> {
        let Token::Number(number) = self.current else {
            return Err(CommandError::Syntax);
        };
        let timeline = u32::try_from(number).ok().and_then(TimelineId::new);
        let timeline = timeline.ok_or(CommandError::InvalidTimeline(number))?;
        self.advance()?;
        Ok(timeline)
    }

    /// Takes `keyword` if it is next.
    fn keyword(&mut self, keyword: &str) -> Result<bool, CommandError> {
        let is_next = matches!(self.current, Token::Keyword(next) if next == keyword);
        if is_next {
            self.advance()?;
        }
        Ok(is_next)
    }

    /// Takes `character` if it is next.
    fn accept(&mut self, character: char) -> Result<bool, CommandError> {
        let is_next = self.current == Token::Other(character);
        if is_next {
            self.advance()?;
        }
        Ok(is_next)
    }

    fn expect(&mut self, character: char) -> Result<(), CommandError> {
        if self.accept(character)? { Ok(()) } else { Err(CommandError::Syntax) }
    }

    /// One semicolon may end the text.
    fn end(&mut self) -> Result<(), CommandError> {
        self.accept(';')?;
        if self.current == Token::End { Ok(()) } else { Err(CommandError::Syntax) }
    }

    fn advance(&mut self) -> Result<(), CommandError> {
        self.current = self.lexer.next()?;
        Ok(())
    }
}

/// The options of a physical slot. Each option of a logical slot is refused with the words PostgreSQL has for it.
fn reserve_wal(options: &[CommandOption]) -> Result<bool, CommandError> {
    let mut reserve_wal = None;
    for option in options {
        match option.name.as_str() {
            "reserve_wal" if reserve_wal.is_none() => reserve_wal = Some(option.boolean()?),
            "reserve_wal" | "snapshot" | "two_phase" | "failover" => {
                return Err(CommandError::RedundantOptions);
            }
            other => return Err(CommandError::UnrecognizedOption(other.to_owned())),
        }
    }
    Ok(reserve_wal.unwrap_or(false))
}

/// Keywords after CREATE_REPLICATION_SLOT, with the options they stand for.
const LEGACY_OPTIONS: [(&str, &str, Option<&str>); 5] = [
    ("EXPORT_SNAPSHOT", "snapshot", Some("export")),
    ("NOEXPORT_SNAPSHOT", "snapshot", Some("nothing")),
    ("USE_SNAPSHOT", "snapshot", Some("use")),
    ("RESERVE_WAL", "reserve_wal", None),
    ("TWO_PHASE", "two_phase", None),
];
