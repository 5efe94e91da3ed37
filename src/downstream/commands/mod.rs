//! What each replication command does and answers.
//!
//! Owns the choice of the command and the refusals of those that a relay cannot carry out. An answer is written to the
//! connection's queue; whoever called sends it, and says ReadyForQuery.

mod identify;
mod permissions;
mod slots;
mod stream;

use crate::downstream::{
    blocking::BlockingError,
    command::{Session, SessionEnd},
    connection::{ConnectionError, Stream},
    timelines::TimelineError,
};
use crate::protocol::{
    Command, ServerError, SqlState,
    backend::{Column, encode_command_complete, encode_row_description, encode_text_row},
    command::StreamKind,
};
use crate::store::StoreError;

pub(super) use permissions::no_walsender;

/// What became of a command that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answered {
    /// The session goes on.
    Complete,
    /// The session is over.
    Ended(SessionEnd),
}

/// A command failed.
#[derive(Debug)]
pub(super) enum CommandError {
    /// The client is told, and the session goes on.
    Refused(ServerError),
    /// The client is told, and the session ends.
    Fatal(ServerError),
    /// There is nobody to tell.
    Connection(ConnectionError),
}

impl From<ServerError> for CommandError {
    fn from(error: ServerError) -> Self {
        Self::Refused(error)
    }
}

impl From<ConnectionError> for CommandError {
    fn from(error: ConnectionError) -> Self {
        Self::Connection(error)
    }
}

impl From<TimelineError> for CommandError {
    fn from(error: TimelineError) -> Self {
        Self::Refused(ServerError::from(&error))
    }
}

impl From<StoreError> for CommandError {
    fn from(error: StoreError) -> Self {
        Self::Refused(ServerError::error(SqlState::IO_ERROR, error.to_string()))
    }
}

impl From<BlockingError> for CommandError {
    fn from(error: BlockingError) -> Self {
        Self::Refused(ServerError::error(SqlState::INTERNAL_ERROR, error.to_string()))
    }
}

/// Carries out one query and writes its answer.
pub(super) async fn answer<S: Stream>(
    session: &mut Session<'_, S>,
    query: &[u8],
) -> Result<Answered, CommandError> {
    let command = Command::parse(query).map_err(ServerError::from)?;
    permissions::check(session, &command)?;
    match command {
        Command::IdentifySystem => identify::identify_system(session)?,
        Command::Show(name) => identify::show(session, &name)?,
        Command::TimelineHistory(timeline) => identify::timeline_history(session, timeline).await?,
        Command::CreateReplicationSlot(create) => slots::create(session, create).await?,
        Command::DropReplicationSlot { slot, when_active } => slots::drop(session, slot, when_active).await?,
        Command::ReadReplicationSlot(slot) if session.server.is_at_least(15) => {
            slots::read(session, &slot).await?;
        }
        Command::AlterReplicationSlot { slot, .. } if session.server.is_at_least(17) => {
            return Err(slots::refuse_alter(session, &slot).into());
        }
        Command::StartReplication(start) if matches!(start.kind, StreamKind::Logical(_)) => {
            return Err(no_logical_decoding(session).into());
        }
        Command::StartReplication(start) => return stream::start_replication(session, start).await,
        Command::BaseBackup(_) => return Err(unsupported("BASE_BACKUP").into()),
        Command::UploadManifest if session.server.is_at_least(17) => {
            return Err(unsupported("UPLOAD_MANIFEST").into());
        }
        // What a version does not know begins with no keyword of its own: it is SQL.
        Command::Sql(_)
        | Command::ReadReplicationSlot(_)
        | Command::AlterReplicationSlot { .. }
        | Command::UploadManifest => {
            return Err(no_sql(session).into());
        }
    }
    Ok(Answered::Complete)
}

/// What only a server with data files can do.
fn unsupported(command: &str) -> ServerError {
    let text = format!("{command} is not supported by a WAL relay");
    ServerError::error(SqlState::FEATURE_NOT_SUPPORTED, text)
        .with_hint("Connect to the primary or to a standby for it.")
}

/// As a standby refuses it; but first, as every server does, for what the upstream and the connection are.
fn no_logical_decoding<S: Stream>(session: &Session<'_, S>) -> ServerError {
    let server = &session.server;
    let wal_level = server.facts.settings.get("wal_level");
    if wal_level.is_some_and(|level| level != "logical") {
        let [setting, value] = ["wal_level", "logical"].map(|word| server.quoted_setting(word));
        let text = format!("logical decoding requires {setting} >= {value}");
        return ServerError::error(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, text);
    }
    if session.database.is_none() {
        let text = "logical decoding requires a database connection";
        return ServerError::error(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, text);
    }
    let text = "logical decoding cannot be used while in recovery";
    ServerError::error(SqlState::FEATURE_NOT_SUPPORTED, text)
        .with_hint("Connect to the primary for logical replication.")
}

/// With a database PostgreSQL would carry it out.
fn no_sql<S: Stream>(session: &Session<'_, S>) -> ServerError {
    if session.database.is_some() {
        return unsupported("SQL");
    }
    let text = "cannot execute SQL commands in WAL sender for physical replication";
    ServerError::error(SqlState::FEATURE_NOT_SUPPORTED, text)
}

impl<S: Stream> Session<'_, S> {
    /// Writes a result set of one row, and the command's tag.
    fn put_row(&mut self, columns: &[Column], row: &[Option<&str>], tag: &'static str) {
        self.connection.outgoing.encode(|out| {
            encode_row_description(columns, out);
            encode_text_row(row, out);
        });
        self.put_complete(tag);
    }

    fn put_complete(&mut self, tag: &'static str) {
        self.connection.outgoing.encode(|out| encode_command_complete(tag, out));
    }
}
