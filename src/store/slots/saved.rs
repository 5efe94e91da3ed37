//! The file of the permanent slots.
//!
//! Owns its format and how it is replaced. What it says is in memory beside what is now; nothing is read from it again.

use serde::{Deserialize, Serialize};

use crate::protocol::feedback::Feedback;
use crate::store::error::StoreError;
use crate::store::slot_limits::InvalidationReason;
use crate::store::slots::{Inner, Saved, SlotKind, SlotTable};
use crate::store::state::StateFile;
use crate::wal::Lsn;

/// Version 2: slots may be invalid.
pub(super) const SLOTS_FILE: StateFile =
    StateFile { name: "walrelay.slots", magic: *b"WRSLOTS\0", version: 2 };

/// A permanent slot in the file.
#[derive(Serialize, Deserialize)]
pub(super) struct SavedSlot {
    pub(super) name: String,
    pub(super) restart_lsn: Option<Lsn>,
    #[serde(default)]
    pub(super) invalidation: Option<InvalidationReason>,
    #[serde(default)]
    pub(super) feedback: Feedback,
}

impl SlotTable {
    /// Writes the permanent slots as they are, with a change; the caller holds `file`.
    pub(super) fn save(&self, change: impl FnOnce(&mut Vec<SavedSlot>)) -> Result<(), StoreError> {
        let Inner { disk, layout, health, slots, .. } = &*self.0;
        health.check()?;
        let mut saved: Vec<SavedSlot> = {
            let slots = slots.lock();
            let permanent = slots.by_name.iter().filter(|(_, slot)| slot.kind == SlotKind::Permanent);
            let saved = permanent.map(|(name, slot)| SavedSlot {
                name: name.clone(),
                restart_lsn: slot.restart_lsn,
                invalidation: slot.invalidation,
                feedback: slot.feedback,
            });
            saved.collect()
        };
        change(&mut saved);
        SLOTS_FILE.write(&**disk, &layout.data_dir, &saved).map_err(|error| health.judge(error))?;
        let mut slots = slots.lock();
        for SavedSlot { name, restart_lsn, invalidation, feedback } in saved {
            if let Some(slot) = slots.by_name.get_mut(&name) {
                slot.saved = Saved { restart_lsn, invalidation, feedback };
            }
        }
        Ok(())
    }
}
