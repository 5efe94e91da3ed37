//! Text of commands, in the forms that all supported servers read.
//!
//! Names are quoted, so that no name can become something else.

use std::fmt;

use crate::protocol::command::{
    Command, CommandOption, CreateReplicationSlot, CreateSlotKind, OptionValue, Persistence,
    StartReplication, StreamKind, WhenActive,
};

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IdentifySystem => f.write_str("IDENTIFY_SYSTEM"),
            Self::Show(name) => write!(f, "SHOW {}", Dotted(name)),
            Self::TimelineHistory(timeline) => write!(f, "TIMELINE_HISTORY {timeline}"),
            Self::CreateReplicationSlot(create) => create.fmt(f),
            Self::DropReplicationSlot { slot, when_active } => {
                let wait = match when_active {
                    WhenActive::Wait => " WAIT",
                    WhenActive::Fail => "",
                };
                write!(f, "DROP_REPLICATION_SLOT {}{wait}", Name(slot))
            }
            Self::ReadReplicationSlot(slot) => write!(f, "READ_REPLICATION_SLOT {}", Dotted(slot)),
            Self::AlterReplicationSlot { slot, options } => {
                write!(f, "ALTER_REPLICATION_SLOT {} {}", Name(slot), Options(options))
            }
            Self::StartReplication(start) => start.fmt(f),
            Self::BaseBackup(text) | Self::Sql(text) => f.write_str(text),
            Self::UploadManifest => f.write_str("UPLOAD_MANIFEST"),
        }
    }
}

impl fmt::Display for CreateReplicationSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CREATE_REPLICATION_SLOT {}", Name(&self.slot))?;
        if self.persistence == Persistence::Temporary {
            f.write_str(" TEMPORARY")?;
        }
        match &self.kind {
            // The form in parentheses is not read before 15, this one by all.
            CreateSlotKind::Physical { reserve_wal: true } => f.write_str(" PHYSICAL RESERVE_WAL"),
            CreateSlotKind::Physical { reserve_wal: false } => f.write_str(" PHYSICAL"),
            CreateSlotKind::Logical { plugin, options } => {
                write!(f, " LOGICAL {}", Name(plugin))?;
                if options.is_empty() { Ok(()) } else { write!(f, " {}", Options(options)) }
            }
        }
    }
}

impl fmt::Display for StartReplication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("START_REPLICATION")?;
        if let Some(slot) = &self.slot {
            write!(f, " SLOT {}", Name(slot))?;
        }
        f.write_str(match self.kind {
            StreamKind::Physical { .. } => " PHYSICAL ",
            StreamKind::Logical(_) => " LOGICAL ",
        })?;
        match self.start {
            Some(start) => start.fmt(f)?,
            None => f.write_str("0/0")?,
        }
        match &self.kind {
            StreamKind::Physical { timeline: None } => Ok(()),
            StreamKind::Physical { timeline: Some(timeline) } => write!(f, " TIMELINE {timeline}"),
            StreamKind::Logical(options) if options.is_empty() => Ok(()),
            StreamKind::Logical(options) => {
                f.write_str(" ")?;
                list(f, options, |f, (name, value)| match value {
                    Some(value) => write!(f, "{} {}", Name(name), Text(value)),
                    None => Name(name).fmt(f),
                })
            }
        }
    }
}

/// A name in quotes.
struct Name<'a>(&'a str);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.replace('"', "\"\""))
    }
}

/// A name that can have dots, part by part; in quotes only where it needs them.
struct Dotted<'a>(&'a str);

impl fmt::Display for Dotted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, part) in self.0.split('.').enumerate() {
            if index > 0 {
                f.write_str(".")?;
            }
            let is_plain = part.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
                && part.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_'));
            if is_plain { f.write_str(part)? } else { Name(part).fmt(f)? }
        }
        Ok(())
    }
}

/// A string in quotes.
struct Text<'a>(&'a str);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'", self.0.replace('\'', "''"))
    }
}

struct Options<'a>(&'a [CommandOption]);

impl fmt::Display for Options<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        list(f, self.0, |f, option| match &option.value {
            None => Name(&option.name).fmt(f),
            Some(OptionValue::Text(value)) => write!(f, "{} {}", Name(&option.name), Text(value)),
            Some(OptionValue::Number(value)) => write!(f, "{} {value}", Name(&option.name)),
        })
    }
}

fn list<T>(
    f: &mut fmt::Formatter<'_>,
    items: &[T],
    mut write_item: impl FnMut(&mut fmt::Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    let mut separator = "(";
    for item in items {
        f.write_str(separator)?;
        write_item(f, item)?;
        separator = ", ";
    }
    f.write_str(")")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::command::CommandError;
    use crate::wal::{Lsn, TimelineId};

    fn parsed(text: &str) -> String {
        match Command::parse(text) {
            Ok(Command::Sql(sql)) => format!("sql: {sql}"),
            Ok(command) => {
                let printed = command.to_string();
                assert_eq!(Command::parse(&printed), Ok(command), "{printed}");
                printed
            }
            Err(error) => format!("error: {error}"),
        }
    }

    #[test]
    fn what_clients_send_is_read() {
        for (text, printed) in [
            ("IDENTIFY_SYSTEM", "IDENTIFY_SYSTEM"),
            ("IDENTIFY_SYSTEM;", "IDENTIFY_SYSTEM"),
            (" \n\tSHOW  Wal_Segment_Size ; ", "SHOW wal_segment_size"),
            ("SHOW a.\"B c\"", "SHOW a.\"B c\""),
            ("TIMELINE_HISTORY 3", "TIMELINE_HISTORY 3"),
            ("READ_REPLICATION_SLOT My_Slot", "READ_REPLICATION_SLOT my_slot"),
            ("CREATE_REPLICATION_SLOT s PHYSICAL", "CREATE_REPLICATION_SLOT \"s\" PHYSICAL"),
            (
                "CREATE_REPLICATION_SLOT \"pg_basebackup_7\" TEMPORARY PHYSICAL ( RESERVE_WAL)",
                "CREATE_REPLICATION_SLOT \"pg_basebackup_7\" TEMPORARY PHYSICAL RESERVE_WAL",
            ),
            (
                "CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL off)",
                "CREATE_REPLICATION_SLOT \"s\" PHYSICAL",
            ),
            (
                "CREATE_REPLICATION_SLOT s LOGICAL p NOEXPORT_SNAPSHOT TWO_PHASE",
                "CREATE_REPLICATION_SLOT \"s\" LOGICAL \"p\" (\"snapshot\" 'nothing', \"two_phase\")",
            ),
            ("DROP_REPLICATION_SLOT s WAIT", "DROP_REPLICATION_SLOT \"s\" WAIT"),
            (
                "ALTER_REPLICATION_SLOT s (FAILOVER 1, TWO_PHASE 'no')",
                "ALTER_REPLICATION_SLOT \"s\" (\"failover\" 1, \"two_phase\" 'no')",
            ),
            (
                "START_REPLICATION SLOT \"dc2_a\" 0/3000000 TIMELINE 1",
                "START_REPLICATION SLOT \"dc2_a\" PHYSICAL 0/3000000 TIMELINE 1",
            ),
            ("START_REPLICATION PHYSICAL DEAD/01000000", "START_REPLICATION PHYSICAL DEAD/1000000"),
            ("START_REPLICATION 0/0", "START_REPLICATION PHYSICAL 0/0"),
            (
                "START_REPLICATION SLOT s LOGICAL 0/0 (proto_version '1', x)",
                "START_REPLICATION SLOT \"s\" LOGICAL 0/0 (\"proto_version\" '1', \"x\")",
            ),
            (
                "BASE_BACKUP ( LABEL 'pg_basebackup; base ''backup',  PROGRESS,  WAIT 0 ) ; ",
                "BASE_BACKUP ( LABEL 'pg_basebackup; base ''backup',  PROGRESS,  WAIT 0 )",
            ),
            (
                "BASE_BACKUP LABEL 'x' FAST NOWAIT MANIFEST 'yes'",
                "BASE_BACKUP LABEL 'x' FAST NOWAIT MANIFEST 'yes'",
            ),
            ("UPLOAD_MANIFEST", "UPLOAD_MANIFEST"),
        ] {
            assert_eq!(parsed(text), printed);
        }
    }

    #[test]
    fn what_does_not_begin_with_a_command_is_sql() {
        for text in [
            "",
            ";",
            "identify_system",
            "SELECT 1; 'x",
            "TIMELINE 1",
            "\"SHOW\" x",
            "IDENTIFY_SYSTEMS",
            "1 SHOW",
        ] {
            assert_eq!(parsed(text), format!("sql: {text}"));
        }
    }

    #[test]
    fn what_is_no_command_is_refused_in_postgresqls_words() {
        for text in [
            "IDENTIFY_SYSTEM IDENTIFY_SYSTEM",
            "IDENTIFY_SYSTEM; IDENTIFY_SYSTEM",
            "IDENTIFY_SYSTEM;;",
            "SHOW",
            "SHOW a.",
            "SHOW WAIT",
            "START_REPLICATION",
            "START_REPLICATION LOGICAL 0/1",
            "START_REPLICATION 0/1 TIMELINE x",
            "CREATE_REPLICATION_SLOT s",
            "CREATE_REPLICATION_SLOT s PHYSICAL ()",
            "ALTER_REPLICATION_SLOT s",
            "BASE_BACKUP; SHOW x",
        ] {
            assert_eq!(parsed(text), "error: syntax error", "{text}");
        }
        assert_eq!(parsed("SHOW \"x"), "error: unterminated quoted string");
        assert_eq!(parsed("'x"), "error: unterminated quoted string");
        assert_eq!(parsed("TIMELINE_HISTORY 0"), "error: invalid timeline 0");
        assert_eq!(parsed("START_REPLICATION 0/123456789"), "error: invalid streaming start location");
        let create = |options: &str| parsed(&format!("CREATE_REPLICATION_SLOT s PHYSICAL {options}"));
        assert_eq!(create("RESERVE_WAL RESERVE_WAL"), "error: conflicting or redundant options");
        assert_eq!(create("(TWO_PHASE)"), "error: conflicting or redundant options");
        assert_eq!(create("(RESERVE_WAL 2)"), "error: reserve_wal requires a Boolean value");
        assert_eq!(create("(nonsense)"), "error: unrecognized option: nonsense");
        assert_eq!(Command::parse(b"SHOW \xff"), Err(CommandError::NotUtf8));
    }

    #[test]
    fn names_are_cut_to_63_bytes_and_cannot_break_out_of_their_quotes() {
        let Ok(Command::Show(name)) = Command::parse(format!("SHOW {}", "x".repeat(70))) else { panic!() };
        assert_eq!(name.len(), 63);
        let start = StartReplication {
            slot: Some("a\" PHYSICAL 0/0; --".to_owned()),
            start: Lsn::new(1),
            kind: StreamKind::Physical { timeline: TimelineId::new(7) },
        };
        let command = Command::StartReplication(start);
        assert_eq!(Command::parse(command.to_string()), Ok(command));
    }
}
