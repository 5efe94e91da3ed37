//! Whether the store works, and who is told.
//!
//! Owns the condition and the calls to the observer. A failure is final: once `fail` was called, `check` refuses
//! everything, and nothing is published any more.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::store::disk::is_shortage;
use crate::store::error::{Condition, StoreError};
use crate::store::positions::Positions;
use crate::wal::{Lsn, SegmentName};

/// Is told what happens in the store. Called from any thread; must not block.
pub trait Observer: Send + Sync {
    /// Some position has moved, or there is room again for WAL. Calls come one at a time, in order.
    fn positions_changed(&self, positions: Positions);
    /// The store became able or unable to make WAL durable.
    fn condition_changed(&self, condition: Condition);
    /// A sync has made so many bytes durable.
    fn synced(&self, _bytes: u64, _took: Duration) {}
    /// A segment is complete and has its final name.
    fn sealed(&self, _name: SegmentName) {}
    /// A complete segment is not what was written. It is not served.
    fn suspect(&self, _name: SegmentName, _detail: &str) {}
    /// A complete segment was damaged, and has been replaced by what was written.
    fn repaired(&self, _name: SegmentName) {}
    /// The disk could not give back a piece of a segment. It may the next time: the segment is still served.
    fn unreadable(&self, _name: SegmentName, _error: &io::Error) {}
    /// A segment was read from the disk, and is what was written.
    fn scrubbed(&self) {}
    /// Every complete segment has been read since the last call, or the start.
    fn scrub_round_ended(&self) {}
    /// Work that can wait failed and will be tried again: removing old segments, preparing new ones, saving slots.
    fn housekeeping_failed(&self, _error: &StoreError) {}
    /// A slot keeps no WAL any more, or its session was told to let go of it.
    fn slot_taken(&self, _notice: &SlotNotice) {}
    /// A segment was removed that no slot needs, before its time: the disk budget is used up.
    fn kept_wal_given_up(&self) {}
}

/// A slot that is taken from its consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotNotice {
    /// The slot.
    pub name: String,
    /// What it kept.
    pub restart_lsn: Option<Lsn>,
    /// The session that must end first; without one the slot is invalid.
    pub terminating: Option<u32>,
    /// Why.
    pub cause: SlotCause,
}

/// Why a slot is taken from its consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotCause {
    /// It would keep more than `max_slot_wal_keep_size`.
    TooFarBehind {
        /// Where the oldest segment begins that a slot may keep.
        oldest_kept: Lsn,
    },
    /// Nobody used it for longer than `idle_replication_slot_timeout`.
    Idle {
        /// For how long nobody used it.
        time: Duration,
        /// How long that may be.
        timeout: Duration,
    },
    /// Of all slots it is furthest behind, and the disk budget is used up.
    DiskBudget {
        /// The budget in bytes.
        budget: u64,
    },
}

pub(super) struct Health {
    pub(super) observer: Arc<dyn Observer>,
    has_failed: AtomicBool,
    condition: Mutex<Condition>,
    /// Held while the observer is told, so that it hears in order. Never taken while a lock of the store is held.
    telling: Mutex<()>,
}

impl Health {
    pub(super) fn new(observer: Arc<dyn Observer>) -> Self {
        Self {
            observer,
            has_failed: AtomicBool::new(false),
            condition: Mutex::new(Condition::Healthy),
            telling: Mutex::new(()),
        }
    }

    pub(super) fn condition(&self) -> Condition {
        self.condition.lock().clone()
    }

    pub(super) fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Acquire)
    }

    pub(super) fn check(&self) -> Result<(), StoreError> {
        if !self.has_failed() {
            return Ok(());
        }
        match self.condition() {
            Condition::Failed { operation, file, reason } => {
                Err(StoreError::Failed(format!("could not {operation} \"{file}\": {reason}")))
            }
            Condition::Healthy | Condition::NoSpace { .. } => Err(StoreError::Failed(String::new())),
        }
    }

    /// The end of this store, as far as writing goes. The first failure is the one that is reported.
    pub(super) fn fail(&self, operation: &'static str, path: &Path, reason: &io::Error) -> StoreError {
        let (file, reason) = (path.display().to_string(), reason.to_string());
        let error = StoreError::Failed(format!("could not {operation} \"{file}\": {reason}"));
        let condition = Condition::Failed { operation, file, reason };
        {
            let mut current = self.condition.lock();
            if self.has_failed.swap(true, Ordering::AcqRel) {
                return error;
            }
            *current = condition.clone();
        }
        self.tell(|observer| observer.condition_changed(condition));
        error
    }

    /// An error while something durable was changed: lack of space leaves the old state and can be tried again, all else
    /// leaves nobody knows what.
    pub(super) fn judge(&self, error: StoreError) -> StoreError {
        match error {
            StoreError::Io { operation, path, source } if !is_shortage(&source) => {
                self.fail(operation, &path, &source)
            }
            other => other,
        }
    }

    pub(super) fn no_space(&self, path: &Path, reason: &io::Error) {
        self.change(Condition::NoSpace { file: path.display().to_string(), reason: reason.to_string() });
    }

    pub(super) fn healed(&self) {
        self.change(Condition::Healthy);
    }

    fn change(&self, to: Condition) {
        {
            let mut current = self.condition.lock();
            if self.has_failed() || *current == to {
                return;
            }
            *current = to.clone();
        }
        self.tell(|observer| observer.condition_changed(to));
    }

    pub(super) fn tell(&self, what: impl FnOnce(&dyn Observer)) {
        let _turn = self.telling.lock();
        what(&*self.observer);
    }

    /// Lets `change` do something, then tells the observer what it says, with nobody else's news in between.
    pub(super) fn tell_change<T>(
        &self,
        change: impl FnOnce() -> Option<T>,
        what: impl FnOnce(&dyn Observer, T),
    ) {
        let _turn = self.telling.lock();
        if let Some(changed) = change() {
            what(&*self.observer, changed);
        }
    }
}
