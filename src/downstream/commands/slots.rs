//! `CREATE_`, `DROP_`, `READ_` and `ALTER_REPLICATION_SLOT`.
//!
//! The slots themselves are the store's; here are the answers and PostgreSQL's words for what can go wrong.

use std::time::Duration;

use tracing::info;

use crate::downstream::{
    blocking::run_blocking,
    command::{Session, administrator_command},
    commands::{CommandError, no_logical_decoding},
    connection::Stream,
    timelines::timeline_of,
};
use crate::protocol::{
    ServerError, SqlState,
    backend::Column,
    command::{CreateReplicationSlot, CreateSlotKind, Persistence, WhenActive, validate_slot_name},
};
use crate::store::{SlotError, SlotGuard, SlotKind};
use crate::wal::Lsn;

/// Creates a slot. With `RESERVE_WAL` it keeps WAL from the newest checkpoint on, as the primary's would.
pub(super) async fn create<S: Stream>(
    session: &mut Session<'_, S>,
    create: CreateReplicationSlot,
) -> Result<(), CommandError> {
    let CreateReplicationSlot { slot, persistence, kind } = create;
    let CreateSlotKind::Physical { reserve_wal } = kind else {
        return Err(no_logical_decoding(session).into());
    };
    validate_slot_name(&slot).map_err(ServerError::from)?;
    let kind = match persistence {
        Persistence::Permanent => SlotKind::Permanent,
        Persistence::Temporary => SlotKind::Temporary { owner: session.registration.pid() },
    };
    let (store, name) = (session.context.store.clone(), slot.clone());
    let created = run_blocking(move || store.create_slot(&name, kind, reserve_wal));
    created.await?.map_err(|error| slot_error(session, error))?;
    let columns = ["slot_name", "consistent_point", "snapshot_name", "output_plugin"].map(Column::text);
    let nowhere = session.server.lsn_text(None);
    session.put_row(&columns, &[Some(&slot), Some(&nowhere), None, None], "CREATE_REPLICATION_SLOT");
    Ok(())
}

/// Takes the slot that a client wants to stream with; creates it if that is configured, and it is not there.
pub(super) async fn acquire<S: Stream>(
    session: &mut Session<'_, S>,
    name: String,
    start: Option<Lsn>,
) -> Result<SlotGuard, CommandError> {
    let (store, pid) = (session.context.store.clone(), session.registration.pid());
    let when_invalid = session.server.when_invalid();
    match store.slots().acquire(&name, pid, when_invalid) {
        Err(SlotError::NotFound(_)) if session.context.settings.create_slots => {
            create_on_demand(session, &name, start).await?;
            Ok(store.slots().acquire(&name, pid, when_invalid).map_err(|error| slot_error(session, error))?)
        }
        acquired => {
            let guard = acquired.map_err(|error| slot_error(session, error))?;
            if store.slots().get(&name).is_some_and(|slot| slot.restart_lsn.is_none()) {
                // From the first report on it keeps WAL.
                let checked = run_blocking(move || store.check_space_to_hold(&name)).await?;
                checked.map_err(|error| slot_error(session, error))?;
            }
            Ok(guard)
        }
    }
}

/// The slot keeps what is held from where the client begins.
async fn create_on_demand<S: Stream>(
    session: &mut Session<'_, S>,
    name: &str,
    start: Option<Lsn>,
) -> Result<(), CommandError> {
    validate_slot_name(name).map_err(ServerError::from)?;
    let (store, to_create) = (session.context.store.clone(), name.to_owned());
    match run_blocking(move || store.create_slot_at(&to_create, start)).await? {
        Ok(()) => info!(slot = name, "replication slot was absent and has been created"),
        // Somebody else was quicker.
        Err(SlotError::AlreadyExists(_)) => {}
        Err(error) => return Err(slot_error(session, error).into()),
    }
    Ok(())
}

/// Drops a slot; waits for its user to leave if the client wishes so.
pub(super) async fn drop<S: Stream>(
    session: &mut Session<'_, S>,
    slot: String,
    when_active: WhenActive,
) -> Result<(), CommandError> {
    loop {
        let (store, name, pid) = (session.context.store.clone(), slot.clone(), session.registration.pid());
        let dropped = run_blocking(move || store.slots().drop_slot(&name, pid)).await?;
        match dropped {
            Ok(()) => break,
            Err(SlotError::Active { .. }) if when_active == WhenActive::Wait => wait(session).await?,
            Err(error) => return Err(slot_error(session, error).into()),
        }
    }
    session.put_complete("DROP_REPLICATION_SLOT");
    Ok(())
}

/// Waits a moment, unless the client leaves, cancels, or the relay stops. Cancel-safe branches only.
async fn wait<S: Stream>(session: &mut Session<'_, S>) -> Result<(), CommandError> {
    let retry = tokio::time::sleep(DROP_RETRY_INTERVAL);
    tokio::pin!(retry);
    loop {
        tokio::select! {
            () = &mut retry => return Ok(()),
            filled = session.connection.fill_bounded() => filled?,
            () = session.registration.canceled() => {
                let text = "canceling statement due to user request";
                return Err(ServerError::error(SqlState::QUERY_CANCELED, text).into());
            }
            () = session.stop.cancelled() => return Err(CommandError::Fatal(administrator_command())),
            () = session.registration.terminated() => {
                return Err(CommandError::Fatal(administrator_command()));
            }
        }
    }
}

/// Tells a slot's position; a slot that does not exist is a row of nulls.
pub(super) async fn read<S: Stream>(session: &mut Session<'_, S>, slot: &str) -> Result<(), CommandError> {
    let info = session.context.store.slots().get(slot);
    let restart_lsn = info.as_ref().and_then(|info| info.restart_lsn);
    let timeline = match (restart_lsn, session.context.store.positions()) {
        (Some(position), Some(positions)) => {
            let store = session.context.store.clone();
            let timeline = run_blocking(move || timeline_of(&store, position, positions.timeline)).await??;
            Some(timeline.to_string())
        }
        _ => None,
    };
    let kind = info.is_some().then_some("physical");
    let position = restart_lsn.map(|position| session.server.lsn_text(Some(position)));
    let columns = [Column::text("slot_type"), Column::text("restart_lsn"), Column::int8("restart_tli")];
    let row = [kind, position.as_deref(), timeline.as_deref()];
    session.put_row(&columns, &row, "READ_REPLICATION_SLOT");
    Ok(())
}

/// Only logical slots can be altered, and there are none here.
pub(super) fn refuse_alter<S: Stream>(session: &Session<'_, S>, slot: &str) -> ServerError {
    match session.context.store.slots().get(slot) {
        None => slot_error(session, SlotError::NotFound(slot.to_owned())),
        Some(_) => ServerError::error(
            SqlState::FEATURE_NOT_SUPPORTED,
            "cannot use ALTER_REPLICATION_SLOT with a physical replication slot",
        ),
    }
}

/// A slot's error as PostgreSQL tells it.
pub(super) fn slot_error<S: Stream>(session: &Session<'_, S>, error: SlotError) -> ServerError {
    let text = error.to_string();
    match error {
        SlotError::AlreadyExists(_) => ServerError::error(SqlState::DUPLICATE_OBJECT, text),
        SlotError::NotFound(_) => ServerError::error(SqlState::UNDEFINED_OBJECT, text),
        SlotError::Active { .. } => ServerError::error(SqlState::OBJECT_IN_USE, text),
        SlotError::InvalidName(_) => ServerError::error(SqlState::INVALID_NAME, text),
        SlotError::Invalidated { reason, .. } => {
            let reason = reason.as_str();
            ServerError::error(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, text)
                .with_detail(format!("This replication slot has been invalidated due to \"{reason}\"."))
        }
        SlotError::Full => ServerError::error(SqlState::CONFIGURATION_LIMIT_EXCEEDED, text).with_hint(
            format!("Free one or increase {}.", session.server.quoted_setting("max_replication_slots")),
        ),
        SlotError::NoSpace { segments, .. } => ServerError::error(SqlState::DISK_FULL, text)
            .with_detail(format!(
                "Less space is free than is left to arriving WAL (store.reserve_segments = {segments})."
            ))
            .with_hint("Free disk space on the relay, or drop replication slots that are no longer needed."),
        SlotError::Store(source) => {
            let is_full = source.is_no_space();
            let sqlstate = if is_full { SqlState::DISK_FULL } else { SqlState::IO_ERROR };
            ServerError::error(sqlstate, text).with_detail(format!("{source}."))
        }
    }
}

/// Time between two looks at a slot that is waited for.
const DROP_RETRY_INTERVAL: Duration = Duration::from_millis(100);
