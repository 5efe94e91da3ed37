//! Which slot a session uses on the upstream, and how.
//!
//! Owns what is decided about the slot from session to session: created, taken as found, dropped where it is of no use,
//! streamed by or moved by SQL. Never touches a slot at one server for what was learned of another.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::protocol::instances::PARAMETER;
use crate::upstream::connect::{self, Connected};
use crate::upstream::course::Course;
use crate::upstream::dialog::Introduction;
use crate::upstream::remembering::Remembering;
use crate::upstream::retained::SlotMover;
use crate::upstream::slot::{self, Presence, SlotOrigin, UpstreamSlot, WhenAbsent};
use crate::upstream::slot_advance::{SlotAdvance, show_slot_error};
use crate::upstream::slot_memory::{KeptFrom, MadeBeside, Recognized};
use crate::upstream::{Opened, Upstream, UpstreamError, UpstreamSettings};
use crate::wal::{Lsn, LsnRange};

/// What moves the slot at this server. A relay takes no SQL; WAL that is streamed from it by the slot stays on its disk, and
/// costs the primary nothing.
pub(super) fn mover(settings: &UpstreamSettings, introduction: &Introduction) -> SlotMover {
    let is_relay = introduction.parameters.contains_key(PARAMETER);
    if settings.streams_by_slot || is_relay { SlotMover::Reports } else { SlotMover::Sql }
}

impl Upstream {
    /// The slot to use; one that an earlier session created in vain here is dropped, and not created again.
    pub(super) async fn slot(
        &self,
        connected: &mut Connected,
        course: &mut Course,
    ) -> Result<UpstreamSlot, UpstreamError> {
        let (server, settings) = (connected.host.clone(), &self.settings);
        if let Some(useless) = course.slots.useless(&server) {
            slot::drop_useless_slot(connected, settings, useless).await?;
            course.slots.forget_useless(&server);
        }
        let held_end = self.held_end();
        let is_in_vain = course.slots.is_in_vain(&server, held_end);
        course.host = Some(server.clone());
        let when_absent = if is_in_vain { WhenAbsent::Refuse } else { WhenAbsent::Create };
        let mut slot = self.ensure_slot(connected, course, when_absent).await?;
        if slot.keeps_nothing(connected) && settings.create_slot {
            // It was invalidated, or made by hand and never used: from 16 on the first never keeps anything again.
            slot::drop_slot(connected, settings).await?;
            slot = self.ensure_slot(connected, course, when_absent).await?;
        }
        match slot.origin {
            SlotOrigin::Created => course.slots.note_created(&server, held_end, slot.restart_lsn),
            SlotOrigin::Found => slot.origin = self.recognize(course, &server, slot.restart_lsn),
            SlotOrigin::MadeAnew | SlotOrigin::SetAside => {}
            SlotOrigin::Unknown => course.slots.note_none(&server),
        }
        Ok(slot)
    }

    fn recognize(&self, course: &mut Course, server: &str, restart_lsn: Option<Lsn>) -> SlotOrigin {
        let held_end = self.held_end();
        let recognized = course.slots.note_found(server, held_end, restart_lsn);
        let branches = self.store.dead_branches();
        let branches: Vec<_> =
            branches.iter().filter_map(|dead| LsnRange::new(dead.fork, dead.end)).collect();
        let is_set_aside = course.slots.note_set_aside(server, held_end, restart_lsn, &branches);
        match recognized {
            Recognized::Ours => SlotOrigin::Created,
            Recognized::Used | Recognized::MadeAnew if is_set_aside => SlotOrigin::SetAside,
            Recognized::Used => SlotOrigin::Found,
            Recognized::MadeAnew => {
                let [restart_lsn, held_end] = [restart_lsn, held_end].map(|at| at.map(|at| at.to_string()));
                tracing::warn!(
                    server,
                    restart_lsn,
                    held_end,
                    "the replication slot on the upstream is ahead of this relay, which has lost nothing: somebody else has made \
                     it anew, or moved it"
                );
                SlotOrigin::MadeAnew
            }
        }
    }

    /// Finds the slot, or creates it.
    async fn ensure_slot(
        &self,
        connected: &mut Connected,
        course: &mut Course,
        when_absent: WhenAbsent,
    ) -> Result<UpstreamSlot, UpstreamError> {
        let settings = &self.settings;
        let origin = match (slot::find_slot(connected, settings).await?, when_absent) {
            (Presence::Known(slot), _) => return Ok(slot),
            (Presence::Absent | Presence::NotTold, WhenAbsent::Refuse) => {
                return Err(UpstreamError::SlotGone(settings.slot.clone().unwrap_or_default()));
            }
            (Presence::Absent, WhenAbsent::Create) => self.create_absent_slot(connected, course).await?,
            // What was made there before may be there still, and is found by being in the way.
            (Presence::NotTold, WhenAbsent::Create) => slot::create_slot(connected, settings).await?,
        };
        Ok(UpstreamSlot { origin, restart_lsn: slot::look_at_slot(connected, settings).await? })
    }

    /// Creates a slot that is not there, with the upstream's newest checkpoint for its beginning, however far that is ahead of us.
    /// Whoever comes after hears of it also when the answer does not come, or the process ends.
    async fn create_absent_slot(
        &self,
        connected: &mut Connected,
        course: &mut Course,
    ) -> Result<SlotOrigin, UpstreamError> {
        let (server, held_end) = (connected.host.clone(), self.held_end());
        course.slots.note_made(&server, held_end, KeptFrom::NotHeard);
        let change = course.remember(held_end);
        course.remembering.settled(change).await;
        let created = slot::create_slot(connected, &self.settings).await;
        // Where the server says nothing it may have made it.
        if matches!(created, Ok(SlotOrigin::Found) | Err(UpstreamError::Server(_))) {
            course.slots.note_none(&server);
            course.remember(held_end);
        }
        created
    }

    /// Takes back what an earlier process said by the slot of the transactions that standbys read, where WAL is not streamed by
    /// it any more: nothing else would ever do so.
    pub(super) async fn free_slot_of_feedback(
        &self,
        connected: &mut Connected,
        slot: UpstreamSlot,
        course: &mut Course,
    ) -> Result<(), UpstreamError> {
        let mover = mover(&self.settings, &connected.dialog.introduction);
        let server = connected.host.clone();
        let may_be_held = mover == SlotMover::Sql && may_hold_back(course, &server, slot.origin);
        if may_be_held && !course.slots.is_free_of_feedback(&server) {
            slot::take_feedback_back(connected, &self.settings).await?;
            course.slots.note_free_of_feedback(&server);
        }
        Ok(())
    }

    /// Where the last session has made a slot in vain it is dropped at once: the next session may be at another server, and
    /// would leave it there to keep WAL for nobody. If that fails it is done when that server is used again.
    pub(super) async fn drop_slot_made_in_vain(&self, course: &mut Course) {
        let Some(server) = course.host.clone() else { return };
        let Some(useless) = course.slots.made_in_vain(&server) else { return };
        let drop = async {
            let mut connected = connect::connect_to(&self.settings, &self.store, &server).await?;
            let dropped = slot::drop_useless_slot(&mut connected, &self.settings, useless).await;
            connected.dialog.terminate().await;
            dropped
        };
        match timeout(DROP_TIME_MAX, drop).await.unwrap_or(Err(UpstreamError::OpeningTimeout)) {
            Ok(()) => course.slots.forget_useless(&server),
            Err(error) => {
                tracing::warn!(server, error = %error.chain(), "could not drop the replication slot that was created in vain");
            }
        }
    }

    /// What moves the slot while the stream does not.
    pub(super) fn slot_beside(
        &self,
        opened: &Opened,
        remembering: Remembering,
    ) -> SlotBeside<impl Future<Output = ()> + use<>> {
        let (sender, durable) = watch::channel(None);
        let made = MadeBeside::default();
        let retained = opened.retained.clone().filter(|retained| retained.mover() == SlotMover::Sql);
        let advance = self.settings.slot.clone().zip(retained).map(|(slot, retained)| SlotAdvance {
            conninfo: self.settings.sql_conninfo.clone(),
            host: opened.host.clone(),
            process_id: opened.introduction.process_id,
            slot,
            create_slot: self.settings.create_slot,
            made: made.clone(),
            remembering,
            durable,
            retained,
            status: self.status.clone(),
            metrics: self.metrics.clone(),
        });
        if advance.is_none() {
            // Of a server that was left.
            show_slot_error(None, &self.status, &self.metrics);
        }
        let run = async move {
            match advance {
                Some(advance) => advance.run().await,
                None => std::future::pending().await,
            }
        };
        SlotBeside { durable: sender, made, run }
    }
}

/// Whether the slot there may hold back what standbys read in the time of an earlier process: one that this process made holds
/// back only what it was told by this process.
pub(super) fn may_hold_back(course: &Course, server: &str, origin: SlotOrigin) -> bool {
    origin != SlotOrigin::Created || course.slots.was_made_earlier(server)
}

/// What moves the slot beside a stream.
pub(super) struct SlotBeside<F> {
    /// Where it hears what is durable here.
    pub(super) durable: watch::Sender<Option<Lsn>>,
    /// What it made, for when the stream has ended.
    pub(super) made: MadeBeside,
    /// Moves it as long as it is polled.
    pub(super) run: F,
}

/// Longest time for dropping a slot before another server is tried.
const DROP_TIME_MAX: Duration = Duration::from_secs(5);
