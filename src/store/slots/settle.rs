//! Slots, as the file tells them, beside the WAL that recovery has found.
//!
//! Owns what becomes of positions that are not within it. No crash of this process leaves a slot before the oldest WAL: files were
//! removed, or are another directory's. Changes memory alone: the file is replaced when slots are saved, and until then
//! nothing goes that it says is needed.

use crate::protocol::feedback::Feedback;
use crate::store::slot_limits::InvalidationReason;
use crate::store::slots::SlotTable;
use crate::wal::Lsn;

impl SlotTable {
    /// What is held begins at `oldest`, the start of a segment, and ends at `end`. Who is ahead of that may need what comes next. What
    /// somebody needs from before it is gone, and his slot is of no use any more. Returns what a person should know.
    pub(in crate::store) fn settle(&self, oldest: Lsn, end: Lsn) -> Vec<String> {
        let mut notes = Vec::new();
        for (name, slot) in &mut self.0.slots.lock().by_name {
            let Some(restart_lsn) = slot.restart_lsn else { continue };
            slot.restart_lsn = Some(restart_lsn.min(end));
            if restart_lsn < oldest && slot.invalidation.is_none() {
                slot.restart_lsn = None;
                slot.invalidation = Some(InvalidationReason::WalRemoved);
                slot.feedback = Feedback::default();
                notes.push(format!(
                    "replication slot \"{name}\" needs WAL from {restart_lsn} on, and what is held begins at {oldest}: the slot is lost"
                ));
            }
        }
        notes
    }
}
