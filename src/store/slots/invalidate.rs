//! Slots that are of no use any more.
//!
//! Owns the order in which a slot is taken away: its session is told to end, and when nobody uses it the file says so,
//! and only then does it keep nothing any more. Why it is taken away is the caller's decision.

use std::time::Instant;

use crate::protocol::feedback::Feedback;
use crate::store::error::StoreError;
use crate::store::slot_limits::{InvalidationReason, SlotPosition};
use crate::store::slots::{Slot, SlotTable};
use crate::wal::Lsn;

/// What became of slots that are to be invalidated.
#[derive(Debug, Default)]
pub(crate) struct Enforced {
    /// They are invalid, durably.
    pub(crate) invalidated: Vec<Taken>,
    /// Sessions that were told to let go of one, just now.
    pub(crate) terminating: Vec<(Taken, u32)>,
    /// Whether one is still in use.
    pub(crate) is_pending: bool,
}

/// A slot that is taken away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) name: String,
    pub(crate) reason: InvalidationReason,
    pub(crate) restart_lsn: Option<Lsn>,
    generation: u64,
}

/// Who uses a slot while it is being made invalid.
const KEEPER_PID: u32 = 0;

impl SlotTable {
    /// Notes since when slots are not used: as in PostgreSQL also a temporary one by whose session nothing is streamed.
    pub(in crate::store) fn note_idle(&self, now: Instant) {
        let mut slots = self.0.slots.lock();
        for slot in slots.by_name.values_mut().filter(|slot| slot.active_pid.is_none()) {
            slot.idle_since.get_or_insert(now);
        }
    }

    /// What decides about each slot.
    pub(in crate::store) fn positions(&self, now: Instant) -> Vec<(String, SlotPosition)> {
        let slots = self.0.slots.lock();
        slots.by_name.iter().map(|(name, slot)| (name.clone(), slot.position(now))).collect()
    }

    /// The valid slot that is furthest behind, and from where on it keeps WAL.
    pub(in crate::store) fn furthest_behind(&self) -> Option<(String, Lsn)> {
        let slots = self.0.slots.lock();
        let kept = slots.by_name.iter().filter_map(|(name, slot)| Some((slot.oldest_needed()?, name)));
        kept.min().map(|(needed, name)| (name.clone(), needed))
    }

    /// Invalidates the slots of which `verdict` says why, durably; blocks. A slot in use stays as it is: its session is
    /// told to end, once, and whoever calls comes again.
    pub(in crate::store) fn enforce(
        &self,
        now: Instant,
        verdict: impl Fn(&str, &SlotPosition) -> Option<InvalidationReason>,
    ) -> Result<Enforced, StoreError> {
        let _file = self.0.file.lock();
        let mut enforced = Enforced::default();
        let mut taken = Vec::new();
        for (name, slot) in &mut self.0.slots.lock().by_name {
            let Some(reason) = verdict(name, &slot.position(now)) else { continue };
            let Slot { restart_lsn, generation, .. } = *slot;
            let this = Taken { name: name.clone(), reason, restart_lsn, generation };
            match slot.owner() {
                None => {
                    slot.active_pid = Some(KEEPER_PID);
                    taken.push(this);
                }
                Some(pid) => {
                    enforced.is_pending = true;
                    if slot.told_pid.replace(pid) != Some(pid) {
                        enforced.terminating.push((this, pid));
                    }
                }
            }
        }
        if let Some(terminate) = self.0.terminate.get() {
            enforced.terminating.iter().for_each(|(_, pid)| terminate(*pid));
        }
        if taken.is_empty() {
            return Ok(enforced);
        }
        #[cfg(test)]
        if self.is_forgetful() {
            taken.iter().for_each(|taken| self.forget(taken));
            enforced.invalidated = taken;
            return Ok(enforced);
        }
        let saved = self.save(|saved| {
            for slot in saved {
                if let Some(taken) = taken.iter().find(|taken| taken.name == slot.name) {
                    slot.restart_lsn = taken.left(slot.restart_lsn);
                    slot.invalidation = Some(taken.reason);
                    slot.feedback = Feedback::default();
                }
            }
        });
        let mut slots = self.0.slots.lock();
        for this in &taken {
            let slot = slots.by_name.get_mut(&this.name);
            let Some(slot) = slot.filter(|slot| slot.generation == this.generation) else { continue };
            slot.active_pid = None;
            if saved.is_ok() {
                slot.restart_lsn = this.left(slot.restart_lsn);
                slot.invalidation = Some(this.reason);
                slot.feedback = Feedback::default();
            }
        }
        drop(slots);
        saved?;
        enforced.invalidated = taken;
        Ok(enforced)
    }
}

#[cfg(test)]
impl SlotTable {
    pub(in crate::store) fn forget_invalidations(&self) {
        self.0.is_forgetful.store(true, std::sync::atomic::Ordering::Release);
    }

    fn is_forgetful(&self) -> bool {
        self.0.is_forgetful.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Invalidates a slot in memory alone.
    fn forget(&self, taken: &Taken) {
        if let Some(slot) = self.0.slots.lock().by_name.get_mut(&taken.name) {
            let (restart_lsn, invalidation) = (taken.left(slot.restart_lsn), Some(taken.reason));
            (slot.active_pid, slot.restart_lsn, slot.invalidation) = (None, restart_lsn, invalidation);
            slot.saved = super::Saved { restart_lsn, invalidation, feedback: slot.feedback };
        }
    }
}

impl Taken {
    /// What is left of its position.
    fn left(&self, restart_lsn: Option<Lsn>) -> Option<Lsn> {
        restart_lsn.filter(|_| self.reason != InvalidationReason::WalRemoved)
    }
}
