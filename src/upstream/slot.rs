//! The slot we use on the upstream.
//!
//! Owns finding, creating and dropping it. Never lets a slot keep WAL on the primary that this relay cannot use.

use std::time::SystemTime;

use bytes::BytesMut;

use crate::protocol::command::{
    CreateReplicationSlot, CreateSlotKind, Persistence, StartReplication, StreamKind, WhenActive,
};
use crate::protocol::feedback::Feedback;
use crate::protocol::{Command, ServerError, SqlState};
use crate::upstream::connect::Connected;
use crate::upstream::dialog::Dialog;
use crate::upstream::slot_memory::Useless;
use crate::upstream::{UpstreamError, UpstreamSettings};
use crate::wal::{Lsn, PgTimestamp};

/// The slot on the upstream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UpstreamSlot {
    pub(crate) origin: SlotOrigin,
    /// Where it keeps WAL from; `None` where the server does not tell it (before 15).
    pub(crate) restart_lsn: Option<Lsn>,
}

impl UpstreamSlot {
    /// Whether the server says that the slot keeps no WAL.
    pub(crate) fn keeps_nothing(&self, connected: &Connected) -> bool {
        let tells = connected.facts.version_num >= READ_REPLICATION_SLOT_SINCE;
        tells && self.origin == SlotOrigin::Found && self.restart_lsn.is_none()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotOrigin {
    /// It was there.
    Found,
    /// It was created just now, or by an earlier session that got no further.
    Created,
    /// It was there, but is not the one by which WAL was acknowledged: it tells of nothing that was.
    MadeAnew,
    /// It was there, and tells of WAL that was set aside here: of nothing that is on the line that is held.
    SetAside,
    /// None is used, or none that is known of.
    Unknown,
}

/// What is done about a slot that is absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhenAbsent {
    /// It is created, where the settings allow that.
    Create,
    /// It is not created again: the last one could not help, for the WAL it should have kept is gone, and all that it would
    /// do is to fill the primary's disk.
    Refuse,
}

/// Whether the slot is there.
pub(crate) enum Presence {
    /// It is, or none is used.
    Known(UpstreamSlot),
    /// It is not, and may be created.
    Absent,
    /// The server does not tell before it is asked to create it.
    NotTold,
}

/// Looks for the slot.
pub(crate) async fn find_slot(
    connected: &mut Connected,
    settings: &UpstreamSettings,
) -> Result<Presence, UpstreamError> {
    let unknown = Presence::Known(UpstreamSlot { origin: SlotOrigin::Unknown, restart_lsn: None });
    let Some(slot) = &settings.slot else { return Ok(unknown) };
    let tells = connected.facts.version_num >= READ_REPLICATION_SLOT_SINCE;
    if tells && let Some(restart_lsn) = read_slot(&mut connected.dialog, slot).await? {
        return Ok(Presence::Known(UpstreamSlot { origin: SlotOrigin::Found, restart_lsn }));
    }
    Ok(match (settings.create_slot, tells) {
        (false, _) => unknown,
        (true, true) => Presence::Absent,
        (true, false) => Presence::NotTold,
    })
}

/// Creates the slot, which then keeps WAL. Where somebody was quicker it is found.
pub(crate) async fn create_slot(
    connected: &mut Connected,
    settings: &UpstreamSettings,
) -> Result<SlotOrigin, UpstreamError> {
    let slot = settings.slot.clone().unwrap_or_default();
    let create = Command::CreateReplicationSlot(CreateReplicationSlot {
        slot: slot.clone(),
        persistence: Persistence::Permanent,
        kind: CreateSlotKind::Physical { reserve_wal: true },
    });
    match connected.dialog.query(&create).await {
        Ok(_) => {
            tracing::info!(slot, "created replication slot on the upstream");
            Ok(SlotOrigin::Created)
        }
        Err(UpstreamError::Server(error)) if error.is(SqlState::DUPLICATE_OBJECT) => Ok(SlotOrigin::Found),
        Err(error) => Err(error),
    }
}

/// Where the slot keeps WAL from; `None` where there is none, it keeps nothing, or the server does not tell.
pub(crate) async fn look_at_slot(
    connected: &mut Connected,
    settings: &UpstreamSettings,
) -> Result<Option<Lsn>, UpstreamError> {
    match &settings.slot {
        Some(slot) if connected.facts.version_num >= READ_REPLICATION_SLOT_SINCE => {
            Ok(read_slot(&mut connected.dialog, slot).await?.flatten())
        }
        _ => Ok(None),
    }
}

/// Outer `None`: no such slot. Inner `None`: it reserves nothing yet.
async fn read_slot(dialog: &mut Dialog, slot: &str) -> Result<Option<Option<Lsn>>, UpstreamError> {
    let rows = dialog.query(&Command::ReadReplicationSlot(slot.to_owned())).await?;
    let exists = rows.first().is_some_and(|row| row.value(0).is_some());
    let restart_lsn = rows.first().and_then(|row| row.text(1)).and_then(|text| text.parse().ok());
    Ok(exists.then_some(restart_lsn))
}

/// Takes back what was said by the slot of the transactions that standbys read. Only who streams by a slot can do that.
pub(crate) async fn take_feedback_back(
    connected: &mut Connected,
    settings: &UpstreamSettings,
) -> Result<(), UpstreamError> {
    let Some(slot) = &settings.slot else { return Ok(()) };
    // As little as possible is sent for it, and nothing of that is used.
    let stream = Command::StartReplication(StartReplication {
        slot: Some(slot.clone()),
        start: Some(connected.system.flushed),
        kind: StreamKind::Physical { timeline: Some(connected.system.timeline) },
    });
    let mut said = BytesMut::new();
    Feedback::default().message(PgTimestamp::from_system_time(SystemTime::now())).encode(&mut said);
    match connected.dialog.say_in_copy(&stream, &said).await {
        // Who may not create it cannot ask servers before 15 whether it is there.
        Err(UpstreamError::Server(error)) if error.is(SqlState::UNDEFINED_OBJECT) => Ok(()),
        Err(UpstreamError::Server(error)) => Err(slot_refused(error, connected.facts.version_num, slot)),
        outcome => outcome,
    }
}

/// What an error means with which a server refuses to stream by a slot.
pub(crate) fn slot_refused(error: Box<ServerError>, version_num: u32, slot: &str) -> UpstreamError {
    if version_num >= INVALIDATION_TOLD_SINCE && error.is(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) {
        return UpstreamError::SlotInvalidated { slot: slot.to_owned(), source: error };
    }
    UpstreamError::Server(error)
}

/// Drops a slot that keeps nothing we need: an earlier session created it in vain, or the upstream has invalidated it. One that
/// keeps WAL from elsewhere by now is another, and stays.
pub(crate) async fn drop_useless_slot(
    connected: &mut Connected,
    settings: &UpstreamSettings,
    useless: Useless,
) -> Result<(), UpstreamError> {
    let Some(slot) = &settings.slot else { return Ok(()) };
    if connected.facts.version_num >= READ_REPLICATION_SLOT_SINCE {
        match read_slot(&mut connected.dialog, slot).await? {
            Some(restart_lsn) if restart_lsn == useless.restart_lsn => {}
            Some(_) => {
                tracing::info!(
                    slot,
                    "the replication slot on the upstream is not the one that was of no use"
                );
                return Ok(());
            }
            None => return Ok(()),
        }
    }
    drop_slot(connected, settings).await
}

/// Drops the slot, whatever it keeps.
pub(crate) async fn drop_slot(
    connected: &mut Connected,
    settings: &UpstreamSettings,
) -> Result<(), UpstreamError> {
    let Some(slot) = settings.slot.clone() else { return Ok(()) };
    let drop = Command::DropReplicationSlot { slot: slot.clone(), when_active: WhenActive::Fail };
    match connected.dialog.query(&drop).await {
        Ok(_) => tracing::warn!(slot, host = connected.host, "dropped the replication slot on the upstream"),
        Err(UpstreamError::Server(error)) if error.is(SqlState::UNDEFINED_OBJECT) => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

/// First version that has READ_REPLICATION_SLOT.
const READ_REPLICATION_SLOT_SINCE: u32 = 150_000;

/// First version that refuses to stream by a slot that was invalidated. Before, the same code means that the slot is a logical
/// one, which since then is refused when the slot is looked at.
const INVALIDATION_TOLD_SINCE: u32 = 180_000;
