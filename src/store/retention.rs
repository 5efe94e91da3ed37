//! New demands on the WAL that is held.
//!
//! Owns what is asked before a slot begins to keep WAL: that there is space for it, and that the WAL it is promised does
//! not go at that very moment. Demands that exist are not touched: they were granted.

use crate::store::Store;
use crate::store::error::Condition;
use crate::store::pool::FREE_RESERVE_BYTES;
use crate::store::slots::{SlotError, SlotKind};
use crate::wal::{Lsn, SegmentNo};

impl Store {
    /// Creates a slot. With `reserve_wal` everything that is held now is kept for it, unless space is short. A permanent
    /// one is durable on return; blocks.
    pub fn create_slot(&self, name: &str, kind: SlotKind, reserve_wal: bool) -> Result<(), SlotError> {
        if !reserve_wal {
            return self.slots().create(name, kind, None);
        }
        if self.slots().get(name).is_none() {
            self.check_space_to_hold(name)?;
        }
        // The oldest segment stays until the slot is there.
        let _turn = self.shared.retention.lock();
        self.slots().create(name, kind, self.oldest())
    }

    /// Creates a permanent slot that keeps what is held from `start` on, unless space is short. Durable on return; blocks.
    pub fn create_slot_at(&self, name: &str, start: Option<Lsn>) -> Result<(), SlotError> {
        self.check_space_to_hold(name)?;
        let _turn = self.shared.retention.lock();
        let flushed = self.positions().map(|positions| positions.flushed);
        let reserve = start.max(self.oldest()).min(flushed);
        self.slots().create(name, SlotKind::Permanent, reserve)
    }

    /// Whether a slot that keeps nothing yet may begin to keep WAL. Space that is short is left to the WAL that arrives:
    /// who wants more to be kept is refused before that is. Blocks.
    pub fn check_space_to_hold(&self, name: &str) -> Result<(), SlotError> {
        let shared = &self.shared;
        let segments = shared.settings.reserve_segments;
        let segment_bytes = shared.segment_size().map_or(0, |size| size.bytes());
        // More than what ends the preparing of segments.
        let reserve = FREE_RESERVE_BYTES.saturating_add(segment_bytes.saturating_mul(segments.into()));
        let is_short = matches!(self.condition(), Condition::NoSpace { .. })
            || self.free_bytes().is_some_and(|free| free < reserve)
            || self.is_budget_short(u64::from(segments));
        if is_short { Err(SlotError::NoSpace { name: name.to_owned(), segments }) } else { Ok(()) }
    }

    /// Whether fewer than `segments` are left of the disk budget when all goes that no slot needs: another slot would cost
    /// one of the others.
    fn is_budget_short(&self, segments: u64) -> bool {
        let shared = &self.shared;
        let Ok(size) = shared.segment_size() else { return false };
        let (Some(budget), Ok(positions)) = (shared.budget_segments(size), shared.positions()) else {
            return false;
        };
        let needed = shared.slots.oldest_needed().unwrap_or(positions.flushed).min(positions.flushed);
        let [first, last] = [needed, positions.flushed].map(|position| SegmentNo::holding(position, size).0);
        last - first + 1 + segments > budget
    }
}
