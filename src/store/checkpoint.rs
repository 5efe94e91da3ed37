//! The limits of slots, applied when a segment is sealed: what PostgreSQL does in a checkpoint.
//!
//! Owns when slots are looked at. A slot that goes beyond its limits is invalidated, durably, before the WAL goes that it
//! needed; one in use when its session has ended, which is told to.

use std::time::Instant;

use crate::store::Store;
use crate::store::error::StoreError;
use crate::store::health::{SlotCause, SlotNotice};
use crate::store::keeper::Keeper;
use crate::store::shared::Shared;
use crate::store::slot_limits::{InvalidationReason, SlotLimits, WalHeld, WalStatus};
use crate::store::slots::{Enforced, SlotInfo};
use crate::wal::{Lsn, SegmentNo, SegmentSize};

/// A slot and what has become of its WAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// The slot.
    pub slot: SlotInfo,
    /// Whether its WAL is there; `None` if it keeps none.
    pub wal_status: Option<WalStatus>,
    /// Bytes that can be written before it is in danger, if its WAL is limited.
    pub safe_wal_size: Option<i64>,
}

impl Shared {
    pub(super) fn slot_limits(&self, size: SegmentSize) -> SlotLimits {
        let places = self.wal_places(size);
        SlotLimits::new(&self.settings.limits, self.settings.wal_keep_size, size, places)
    }
}

impl Keeper {
    /// Looks at the slots if a segment was sealed since the last time, or one is still in use that is to be invalidated;
    /// whether one was.
    pub(super) fn apply_limits(&mut self, now: Instant, size: SegmentSize) -> Result<bool, StoreError> {
        let shared = self.shared.clone();
        shared.slots.note_idle(now);
        if !self.has_looked {
            // As the checkpoint at the end of recovery.
            self.has_looked = true;
            let sealed = shared.positions()?.sealed;
            self.checkpoint = sealed.map(|sealed| SegmentNo::ending_at(sealed, size));
        }
        let Some(checkpoint) = self.checkpoint else { return Ok(false) };
        let limits = shared.slot_limits(size);
        let slots = shared.slots.positions(now);
        let valid = slots.iter().filter(|(_, slot)| slot.invalidation.is_none());
        let needed = valid.filter_map(|(_, slot)| slot.restart_lsn).min();
        let oldest_kept = limits.oldest_kept(checkpoint, needed);
        let enforced = shared.slots.enforce(now, |_, slot| limits.verdict(slot, oldest_kept))?;
        if !enforced.is_pending {
            self.checkpoint = None;
        }
        let idle = |name: &str| {
            let slot = slots.iter().find(|(other, _)| other == name);
            slot.and_then(|(_, slot)| slot.idle).unwrap_or_default()
        };
        self.tell_of_slots(&enforced, |slot| match slot.reason {
            InvalidationReason::WalRemoved => {
                SlotCause::TooFarBehind { oldest_kept: oldest_kept.start(size).unwrap_or(Lsn::MIN) }
            }
            InvalidationReason::IdleTimeout => {
                SlotCause::Idle { time: idle(&slot.name), timeout: limits.idle_timeout.unwrap_or_default() }
            }
        });
        Ok(!enforced.invalidated.is_empty())
    }

    pub(super) fn tell_of_slots(
        &self,
        enforced: &Enforced,
        cause: impl Fn(&crate::store::slots::Taken) -> SlotCause,
    ) {
        let invalidated = enforced.invalidated.iter().map(|slot| (slot, None));
        let terminating = enforced.terminating.iter().map(|(slot, pid)| (slot, Some(*pid)));
        for (slot, terminating) in terminating.chain(invalidated) {
            let notice = SlotNotice {
                name: slot.name.clone(),
                restart_lsn: slot.restart_lsn,
                terminating,
                cause: cause(slot),
            };
            self.shared.health.tell(|observer| observer.slot_taken(&notice));
        }
    }
}

impl Store {
    /// The slots, with what has become of their WAL.
    pub fn slot_states(&self) -> Vec<SlotState> {
        let shared = &self.shared;
        let slots = shared.slots.list();
        let (Ok(size), Some(positions), Some(oldest)) =
            (shared.segment_size(), self.positions(), shared.oldest())
        else {
            let bare = |slot| SlotState { slot, wal_status: None, safe_wal_size: None };
            return slots.into_iter().map(bare).collect();
        };
        let limits = shared.slot_limits(size);
        let valid = slots.iter().filter(|slot| slot.invalidation.is_none());
        let needed = valid.filter_map(|slot| slot.restart_lsn).min();
        let held = WalHeld { write: positions.written, oldest: SegmentNo::holding(oldest, size), needed };
        let state = |slot: SlotInfo| {
            let position = slot.position();
            let (wal_status, safe_wal_size) =
                (limits.wal_status(&position, &held), limits.safe_wal_size(&position, &held));
            SlotState { slot, wal_status, safe_wal_size }
        };
        slots.into_iter().map(state).collect()
    }
}
