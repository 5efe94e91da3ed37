//! The use of a slot by one session.
//!
//! Owns nothing: changes the slot that it was made for, and no later one of the same name.

use std::time::SystemTime;

use crate::protocol::feedback::Feedback;
use crate::store::slots::{Slot, SlotTable, WhenInvalid};
use crate::wal::{FullXid, Lsn, PgTimestamp};

/// The use of a slot by one session; ends when dropped.
pub struct SlotGuard {
    table: SlotTable,
    name: String,
    generation: u64,
    when_invalid: WhenInvalid,
}

impl SlotGuard {
    pub(super) fn new(table: SlotTable, name: &str, generation: u64, when_invalid: WhenInvalid) -> Self {
        Self { table, name: name.to_owned(), generation, when_invalid }
    }

    /// The slot's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The consumer has everything before `restart_lsn` durably. As in PostgreSQL the slot follows what is reported, also
    /// backwards: a consumer that was set back needs the older WAL.
    pub fn advance(&self, restart_lsn: Lsn) {
        self.with_slot(|slot| {
            slot.restart_lsn = Some(restart_lsn);
            if self.when_invalid == WhenInvalid::Revive {
                slot.invalidation = None;
            }
        });
    }

    /// The consumer's timeline was left at `fork`: what it reported of beyond, after the store had gone over, does not count.
    pub fn put_back(&self, fork: Lsn) {
        self.with_slot(|slot| slot.restart_lsn = slot.restart_lsn.map(|restart_lsn| restart_lsn.min(fork)));
    }

    /// What the consumer's queries hold back; a slot that is of no use any more holds back nothing. What was kept and cannot be
    /// true when `next` is given out next is forgotten: nothing that is would be further ahead.
    pub fn note_feedback(&self, said: Feedback, next: Option<FullXid>) {
        self.with_slot(|slot| {
            if slot.invalidation.is_none() {
                let kept = Some(slot.feedback).filter(|kept| kept.is_plausible(next));
                slot.feedback = kept.unwrap_or_default().advanced_to(said);
            }
        });
    }

    fn with_slot(&self, change: impl FnOnce(&mut Slot)) {
        let mut slots = self.table.0.slots.lock();
        let slot = slots.by_name.get_mut(&self.name);
        // The slot may have been dropped and created again meanwhile.
        if let Some(slot) = slot.filter(|slot| slot.generation == self.generation) {
            change(slot);
        }
    }
}

impl Drop for SlotGuard {
    fn drop(&mut self) {
        let now = PgTimestamp::from_system_time(SystemTime::now());
        self.with_slot(|slot| (slot.active_pid, slot.inactive_since) = (None, now));
    }
}
