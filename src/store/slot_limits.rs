//! What slots may keep, and what becomes of those that would keep more: PostgreSQL's rules, in whole segments.
//!
//! Owns the arithmetic of `KeepLogSeg`, `GetWALAvailability`, `pg_get_replication_slots` and
//! `InvalidateObsoleteReplicationSlots`. Positions and times are arguments: no clock, no file. Where PostgreSQL has a
//! checkpoint this relay seals a segment: it is the checkpoint whose record is that segment's last.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::wal::{Lsn, SegmentNo, SegmentSize};

/// How much WAL may be kept, for whom, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetentionLimits {
    /// WAL that slots may keep, in bytes; `None`: any amount.
    pub max_slot_wal_keep_size: Option<u64>,
    /// WAL beyond which what slots keep is called `extended`, in bytes.
    pub max_wal_size: u64,
    /// Time after which a slot that nobody uses is invalidated; `None`: never.
    pub idle_replication_slot_timeout: Option<Duration>,
    /// Time for which WAL is kept for a consumer without a slot after its session; `None`: not at all.
    pub retain_without_slot: Option<Duration>,
    /// Bytes of segment files that there may be; `None`: as many as the disk takes.
    pub disk_budget: Option<u64>,
}

impl Default for RetentionLimits {
    fn default() -> Self {
        Self {
            max_slot_wal_keep_size: None,
            max_wal_size: 1 << 30,
            idle_replication_slot_timeout: None,
            retain_without_slot: None,
            disk_budget: None,
        }
    }
}

/// Whether the WAL that a slot needs is there, as `pg_replication_slots.wal_status` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WalStatus {
    /// Within `max_wal_size`.
    Reserved,
    /// Beyond it, but kept.
    Extended,
    /// No longer kept, but still there: the next checkpoint may take it.
    Unreserved,
    /// Gone, and the slot is of no use any more.
    Lost,
}

impl WalStatus {
    /// As PostgreSQL prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Extended => "extended",
            Self::Unreserved => "unreserved",
            Self::Lost => "lost",
        }
    }
}

/// Why a slot is of no use any more, as `pg_replication_slots.invalidation_reason` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InvalidationReason {
    /// It would have kept more WAL than it may.
    WalRemoved,
    /// Nobody used it for too long.
    IdleTimeout,
}

impl InvalidationReason {
    /// As PostgreSQL prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::WalRemoved => "wal_removed",
            Self::IdleTimeout => "idle_timeout",
        }
    }
}

/// What decides about a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotPosition {
    pub restart_lsn: Option<Lsn>,
    pub invalidation: Option<InvalidationReason>,
    /// Whether it belongs to a session.
    pub is_active: bool,
    /// Time for which nobody has streamed with it.
    pub idle: Option<Duration>,
}

/// What there is, when somebody looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WalHeld {
    /// End of what is written.
    pub write: Lsn,
    /// The oldest segment that is held.
    pub oldest: SegmentNo,
    /// The oldest position that any valid slot needs.
    pub needed: Option<Lsn>,
}

/// The limits in segments of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotLimits {
    pub size: SegmentSize,
    pub wal_keep: u64,
    pub slot_keep: Option<u64>,
    pub max_wal: u64,
    pub idle_timeout: Option<Duration>,
    /// Places for WAL that the disk budget leaves; `None`: any number.
    pub places: Option<u64>,
}

impl SlotLimits {
    pub(super) fn new(
        limits: &RetentionLimits,
        wal_keep_size: u64,
        size: SegmentSize,
        places: Option<u64>,
    ) -> Self {
        // As PostgreSQL, which counts whole segments only.
        let segments = |bytes: u64| bytes / size.bytes();
        Self {
            size,
            wal_keep: segments(wal_keep_size),
            slot_keep: limits.max_slot_wal_keep_size.map(segments),
            max_wal: segments(limits.max_wal_size),
            idle_timeout: limits.idle_replication_slot_timeout,
            places,
        }
    }

    /// The oldest segment that stays when the position is within `current` and slots need WAL from `needed` on
    /// (`KeepLogSeg`).
    pub(super) fn oldest_kept(&self, current: SegmentNo, needed: Option<Lsn>) -> SegmentNo {
        let needed = needed.map(|needed| SegmentNo::holding(needed, self.size).0);
        let by_slots = needed.filter(|needed| *needed < current.0).map_or(current.0, |needed| {
            let behind = current.0 - needed;
            self.slot_keep.map_or(needed, |kept| current.0 - behind.min(kept))
        });
        let by_size = current.0.saturating_sub(self.wal_keep).max(FIRST_SEGMENT);
        SegmentNo(if self.wal_keep > 0 { by_slots.min(by_size) } else { by_slots })
    }

    /// Whether the slot's WAL is there; `None` if it keeps none (`GetWALAvailability`).
    pub(super) fn wal_status(&self, slot: &SlotPosition, held: &WalHeld) -> Option<WalStatus> {
        let Some(restart_lsn) = slot.restart_lsn else {
            return slot.invalidation.map(|_| WalStatus::Lost);
        };
        let status = match slot.invalidation {
            Some(_) => WalStatus::Lost,
            None => self.availability(restart_lsn, held),
        };
        // As long as somebody uses it, it may still get ahead.
        Some(if status == WalStatus::Lost && slot.is_active { WalStatus::Unreserved } else { status })
    }

    fn availability(&self, restart_lsn: Lsn, held: &WalHeld) -> WalStatus {
        let current = SegmentNo::holding(held.write, self.size);
        let target = SegmentNo::holding(restart_lsn, self.size);
        if target >= self.oldest_kept(current, held.needed) {
            if self.taken_for_place(target).is_some_and(|taken_at| current.next() >= taken_at) {
                return WalStatus::Unreserved;
            }
            let oldest_reserved = current.0.saturating_sub(self.max_wal.saturating_add(1)).max(FIRST_SEGMENT);
            if target.0 >= oldest_reserved { WalStatus::Reserved } else { WalStatus::Extended }
        } else if target >= held.oldest {
            WalStatus::Unreserved
        } else {
            WalStatus::Lost
        }
    }

    /// The segment for whose successor there is no place unless the WAL goes that a slot keeps from `target` on: when it is
    /// begun, the slot is taken. PostgreSQL has no disk budget, and nothing like it.
    fn taken_for_place(&self, target: SegmentNo) -> Option<SegmentNo> {
        let places = self.places?;
        Some(SegmentNo(target.0.saturating_add(places).saturating_sub(1)))
    }

    /// Bytes that can be written before the slot is in danger; less than nothing if it is. Unlike PostgreSQL, which then
    /// computes from position 0, nothing is said of a slot that keeps no WAL.
    pub(super) fn safe_wal_size(&self, slot: &SlotPosition, held: &WalHeld) -> Option<i64> {
        if self.wal_status(slot, held)? == WalStatus::Lost {
            return None;
        }
        let target = SegmentNo::holding(slot.restart_lsn?, self.size);
        let kept = self.slot_keep.map(|kept| kept.max(self.wal_keep));
        let by_size = kept.map(|kept| target.0.saturating_add(kept).saturating_add(1));
        let by_place = self.taken_for_place(target).map(|segment| segment.0);
        let segment = by_size.into_iter().chain(by_place).min()?;
        let fails_at = i128::from(segment) * i128::from(self.size.bytes());
        let safe = fails_at - i128::from(held.write.get());
        Some(i64::try_from(safe).unwrap_or(if safe < 0 { i64::MIN } else { i64::MAX }))
    }

    /// Why a slot is to be invalidated at a checkpoint that keeps WAL from segment `oldest_kept` on
    /// (`InvalidateObsoleteReplicationSlots`).
    pub(super) fn verdict(&self, slot: &SlotPosition, oldest_kept: SegmentNo) -> Option<InvalidationReason> {
        let restart_lsn = slot.restart_lsn?;
        if slot.invalidation.is_some() {
            return None;
        }
        if SegmentNo::holding(restart_lsn, self.size) < oldest_kept {
            return Some(InvalidationReason::WalRemoved);
        }
        let is_idle = slot.idle? >= self.idle_timeout?;
        is_idle.then_some(InvalidationReason::IdleTimeout)
    }
}

/// The first that a server can have: the number 0 stands for no segment there.
const FIRST_SEGMENT: u64 = 1;

#[cfg(test)]
#[path = "slot_limits_tests.rs"]
mod tests;
