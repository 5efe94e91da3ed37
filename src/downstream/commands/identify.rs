//! `IDENTIFY_SYSTEM`, `SHOW`, `TIMELINE_HISTORY`: what a client asks before it streams.

use crate::downstream::{
    blocking::run_blocking, command::Session, commands::CommandError, connection::Stream,
};
use crate::protocol::{
    ServerError, SqlState,
    backend::{Column, encode_data_row, encode_row_description},
};
use crate::wal::TimelineId;

/// Names the system, the timeline that is received, and how far it can be served from here.
pub(super) fn identify_system<S: Stream>(session: &mut Session<'_, S>) -> Result<(), CommandError> {
    // There were positions when the session began, and a store does not lose them.
    let positions = session.context.store.positions().ok_or_else(|| {
        ServerError::error(SqlState::CANNOT_CONNECT_NOW, "the database system is starting up")
    })?;
    let servable = session.servable(&positions);
    let system_id = session.server.identity.system_id.to_string();
    let timeline = positions.timeline.to_string();
    let position = session.server.lsn_text(Some(servable));
    let columns = [
        Column::text("systemid"),
        session.server.timeline_column(),
        Column::text("xlogpos"),
        Column::text("dbname"),
    ];
    let database = session.database.clone();
    let row = [Some(system_id.as_str()), Some(&timeline), Some(&position), database.as_deref()];
    session.put_row(&columns, &row, "IDENTIFY_SYSTEM");
    session.has_identified = true;
    Ok(())
}

/// Shows one setting.
pub(super) fn show<S: Stream>(session: &mut Session<'_, S>, name: &str) -> Result<(), CommandError> {
    let (name, value) = session.parameters().show(name).ok_or_else(|| {
        let text = format!("unrecognized configuration parameter \"{name}\"");
        ServerError::error(SqlState::UNDEFINED_OBJECT, text)
    })?;
    session.put_row(&[Column::text(name)], &[Some(&value)], "SHOW");
    Ok(())
}

/// Sends a timeline's history file. The description of the row precedes also the error, as in PostgreSQL.
pub(super) async fn timeline_history<S: Stream>(
    session: &mut Session<'_, S>,
    timeline: TimelineId,
) -> Result<(), CommandError> {
    let store = session.context.store.clone();
    let content = run_blocking(move || store.history(timeline)).await?;
    let columns = [Column::text("filename"), session.server.history_column()];
    session.connection.outgoing.encode(|out| encode_row_description(&columns, out));
    let file_name = timeline.history_file_name();
    let content = content?.ok_or_else(|| {
        let text = format!("could not open file \"pg_wal/{file_name}\": No such file or directory");
        ServerError::error(SqlState::UNDEFINED_FILE, text)
    })?;
    let row = [Some(file_name.as_bytes()), Some(content.as_slice())];
    session.connection.outgoing.encode(|out| encode_data_row(row.into_iter(), out));
    session.put_complete("TIMELINE_HISTORY");
    Ok(())
}
