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
    /// Creates a slot. With `reserve_wal` it keeps WAL from the newest checkpoint on, unless space is short. A permanent one is
    /// durable on return; blocks.
    pub fn create_slot(&self, name: &str, kind: SlotKind, reserve_wal: bool) -> Result<(), SlotError> {
        if !reserve_wal {
            return self.slots().create(name, kind, None);
        }
        if self.slots().get(name).is_none() {
            self.check_space_from(name, self.reserved_from())?;
        }
        // The oldest segment stays until the slot is there.
        let _turn = self.shared.retention.lock();
        self.slots().create(name, kind, self.reserved_from())
    }

    /// Where a slot begins to keep WAL that nobody has streamed with: as a server's (`ReplicationSlotReserveWal`) at the redo
    /// pointer of the newest checkpoint, where a base backup begins that is taken now. What lies before is held for others or
    /// by chance: a slot that began there would be at the end of its limits from the start. Where no checkpoint is known, or
    /// what follows it has gone, at the oldest WAL that is held.
    fn reserved_from(&self) -> Option<Lsn> {
        self.oldest().max(self.shared.redo.get())
    }

    /// Creates a permanent slot that keeps what is held from `start` on, unless space is short. Durable on return; blocks.
    pub fn create_slot_at(&self, name: &str, start: Option<Lsn>) -> Result<(), SlotError> {
        let flushed = self.positions().map(|positions| positions.flushed);
        let reserve = || start.max(self.oldest()).min(flushed);
        self.check_space_from(name, reserve())?;
        let _turn = self.shared.retention.lock();
        self.slots().create(name, SlotKind::Permanent, reserve())
    }

    /// Whether a slot that keeps nothing yet may begin to keep WAL. Space that is short is left to the WAL that arrives:
    /// who wants more to be kept is refused before that is. Blocks.
    pub fn check_space_to_hold(&self, name: &str) -> Result<(), SlotError> {
        self.check_space_from(name, None)
    }

    /// The same of one that keeps WAL from `start` on.
    fn check_space_from(&self, name: &str, start: Option<Lsn>) -> Result<(), SlotError> {
        let shared = &self.shared;
        let segments = shared.settings.reserve_segments;
        let segment_bytes = shared.segment_size().map_or(0, |size| size.bytes());
        // More than what ends the preparing of segments.
        let reserve = FREE_RESERVE_BYTES.saturating_add(segment_bytes.saturating_mul(segments.into()));
        let is_short = matches!(self.condition(), Condition::NoSpace { .. })
            || self.free_bytes().is_some_and(|free| free < reserve)
            || self.is_budget_short(u64::from(segments), start);
        if is_short { Err(SlotError::NoSpace { name: name.to_owned(), segments }) } else { Ok(()) }
    }

    /// Whether fewer than `segments` are left of the disk budget when all goes that neither a slot needs nor one that keeps WAL
    /// from `start` on: it would cost one of them.
    fn is_budget_short(&self, segments: u64, start: Option<Lsn>) -> bool {
        let shared = &self.shared;
        let Ok(size) = shared.segment_size() else { return false };
        let (Some(budget), Ok(positions)) = (shared.budget_segments(size), shared.positions()) else {
            return false;
        };
        let flushed = positions.flushed;
        let needed = shared.slots.oldest_needed().into_iter().chain(start).fold(flushed, Lsn::min);
        let [first, last] = [needed, flushed].map(|position| SegmentNo::holding(position, size).0);
        last - first + 1 + segments > budget
    }
}
