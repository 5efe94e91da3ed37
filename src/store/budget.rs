//! The disk budget: how many segment files there may be, and what is given up when there would be more.
//!
//! Owns the order of sacrifice: spares, then WAL that no slot needs, then the slot that is furthest behind. What this
//! relay itself needs to recover is never given up: then there is no space for WAL, as on a full disk. The reserve of
//! recovery counts; what was set aside does not.

use std::sync::atomic::Ordering;
use std::time::Instant;

use parking_lot::Mutex;

use crate::store::error::StoreError;
use crate::store::health::SlotCause;
use crate::store::keeper::{Keeper, Needs};
use crate::store::shared::Shared;
use crate::store::slot_limits::InvalidationReason;
use crate::wal::SegmentSize;

/// Fewer segment files than these do not do: the newest, those that are written, a spare, and the reserve.
const BUDGET_SEGMENTS_MIN: u64 = 8;

impl Shared {
    /// Segment files that there may be; `None`: as many as the disk takes.
    pub(super) fn budget_segments(&self, size: SegmentSize) -> Option<u64> {
        self.settings.limits.disk_budget.map(|budget| (budget / size.bytes()).max(BUDGET_SEGMENTS_MIN))
    }

    /// Segment files with WAL that there may be; `None`: as many as the disk takes.
    pub(super) fn wal_places(&self, size: SegmentSize) -> Option<u64> {
        const RESERVE: u64 = 1;
        self.budget_segments(size).map(|budget| budget.saturating_sub(RESERVE))
    }

    /// Places for spares within the budget, those that are there included; `None`: any number.
    pub(super) fn spare_places(&self, size: SegmentSize) -> Option<u64> {
        let places = self.wal_places(size)?;
        let held = self.catalog.lock().count() + self.partials.lock().len();
        Some(places.saturating_sub(held as u64))
    }

    /// Holds a place for a file that is on its way, and for that time neither among the spares nor among what is held.
    pub(super) fn hold_place(&self) -> Place<'_> {
        *self.places_held.lock() += 1;
        Place(&self.places_held)
    }

    /// A place for another segment file; `None` if there is none within the budget.
    pub(super) fn place_to_make(&self, size: SegmentSize) -> Option<Place<'_>> {
        let mut held = self.places_held.lock();
        let has_place =
            self.spare_places(size).is_none_or(|places| places > self.pool.count() as u64 + *held);
        if !has_place {
            return None;
        }
        *held += 1;
        Some(Place(&self.places_held))
    }

    /// Whether everything that may go has gone, and there is still no place for the next segment.
    pub(super) fn is_budget_exhausted(&self) -> bool {
        self.budget_exhausted.load(Ordering::Acquire)
    }

    fn set_budget_exhausted(&self, is_exhausted: bool) {
        if self.budget_exhausted.swap(is_exhausted, Ordering::AcqRel) != is_exhausted {
            // Whoever waits for a segment looks again.
            self.queue.signal.notify();
        }
    }
}

/// A place within the budget, until it is dropped.
pub(super) struct Place<'a>(&'a Mutex<u64>);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut held = self.0.lock();
        *held = held.saturating_sub(1);
    }
}

impl Keeper {
    /// Gives one thing up if there is no place for the next segment; whether that was done.
    pub(super) fn keep_to_budget(&mut self, now: Instant, size: SegmentSize) -> Result<bool, StoreError> {
        let shared = self.shared.clone();
        let Some(places) = shared.spare_places(size) else { return Ok(false) };
        let spares = shared.pool.count() as u64;
        if places > 0 {
            shared.set_budget_exhausted(false);
            return if spares > places { self.drop_spare() } else { Ok(false) };
        }
        let flushed = shared.positions()?.flushed;
        if self.remove_oldest(size, Needs::OfSlots)? {
            shared.health.tell(|observer| observer.kept_wal_given_up());
            return Ok(true);
        }
        let lineage = shared.lineage()?;
        let is_kept_by_slots = shared.catalog.lock().removable(&lineage, flushed, size).is_some();
        let behind = shared.slots.furthest_behind().filter(|_| is_kept_by_slots);
        let Some((behind, _)) = behind else {
            shared.set_budget_exhausted(true);
            return if spares > 0 { self.drop_spare() } else { Ok(false) };
        };
        let enforced = shared
            .slots
            .enforce(now, |name, _| (name == behind).then_some(InvalidationReason::WalRemoved))?;
        let budget = shared.settings.limits.disk_budget.unwrap_or_default();
        self.tell_of_slots(&enforced, |_| SlotCause::DiskBudget { budget });
        Ok(!enforced.invalidated.is_empty())
    }

    /// Removes one spare.
    fn drop_spare(&self) -> Result<bool, StoreError> {
        let shared = &self.shared;
        let _place = shared.hold_place();
        let Some(spare) = shared.pool.take() else { return Ok(false) };
        let path = shared.layout.wal(&spare.name);
        match shared.disk.unlink(&path) {
            Ok(()) => Ok(true),
            Err(error) => {
                shared.pool.put(spare);
                Err(StoreError::io("remove", &path)(error))
            }
        }
    }
}
