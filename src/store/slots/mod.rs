//! Physical replication slots: named consumers, and the oldest WAL each may still need.
//!
//! Owns the slot table and its file `walrelay.slots`. A permanent slot is durable before its creation or removal is
//! answered. `restart_lsn` follows the consumer in memory and is saved later; retention goes by the lower of the two, so
//! that after a crash no slot points at WAL that was removed meanwhile. A slot that never had a `restart_lsn` keeps
//! nothing, as in PostgreSQL. What slots may keep is `slot_limits`' business, when a slot is looked at the keeper's; that
//! one is of no use any more is durable here before the WAL goes that it needed.

mod guard;
mod invalidate;
mod saved;
mod settle;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use crate::protocol::feedback::Feedback;
use crate::store::control::Layout;
use crate::store::disk::Disk;
use crate::store::error::StoreError;
use crate::store::health::Health;
use crate::store::slot_limits::{InvalidationReason, SlotPosition};
use crate::wal::{FullXid, Lsn, PgTimestamp, SegmentNo, SegmentSize};

pub use guard::SlotGuard;
pub(super) use invalidate::{Enforced, Taken};
use saved::{SLOTS_FILE, SavedSlot};

/// The replication slots of this relay; clones share them.
#[derive(Clone)]
pub struct SlotTable(Arc<Inner>);

/// Whether a slot outlives its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// Kept until it is dropped, over restarts.
    Permanent,
    /// Dropped when the session that created it ends: see [`SlotTable::drop_temporary`].
    Temporary {
        /// The session.
        owner: u32,
    },
}

/// A slot as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// The slot's name.
    pub name: String,
    /// Whether it outlives its session.
    pub kind: SlotKind,
    /// Oldest WAL the consumer may need; `None` until it said so or WAL was reserved.
    pub restart_lsn: Option<Lsn>,
    /// The session that uses it; a temporary one's session also while it does not stream.
    pub active_pid: Option<u32>,
    /// Why it is of no use any more, if so.
    pub invalidation: Option<InvalidationReason>,
    /// What its consumer's queries hold back, also while that is away.
    pub feedback: Feedback,
    /// Since when nobody streams with it, by the wall clock: for people. What is decided goes by the time that passes.
    pub inactive_since: Option<PgTimestamp>,
}

impl SlotInfo {
    /// What decides about its state.
    pub(super) fn position(&self) -> SlotPosition {
        let Self { restart_lsn, invalidation, active_pid, .. } = *self;
        SlotPosition { restart_lsn, invalidation, is_active: active_pid.is_some(), idle: None }
    }
}

/// What a session does with a slot that is of no use any more; PostgreSQL's versions differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenInvalid {
    /// It is refused (18 and later).
    Refuse,
    /// It streams what is there, and nothing is kept (16 and 17).
    Use,
    /// With its first report the slot is of use again (up to 15).
    Revive,
}

/// A slot could not be created, used or dropped. The texts are PostgreSQL's.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// There is one of that name.
    #[error("replication slot \"{0}\" already exists")]
    AlreadyExists(String),
    /// There is none of that name.
    #[error("replication slot \"{0}\" does not exist")]
    NotFound(String),
    /// Another session uses it.
    #[error("replication slot \"{name}\" is active for PID {pid}")]
    Active {
        /// The slot.
        name: String,
        /// The session.
        pid: u32,
    },
    /// Not 1 to 63 lower case letters, digits and underscores.
    #[error("replication slot name \"{0}\" is not valid")]
    InvalidName(String),
    /// It keeps nothing any more.
    #[error("can no longer access replication slot \"{name}\"")]
    Invalidated {
        /// The slot.
        name: String,
        /// Why.
        reason: InvalidationReason,
    },
    /// The limit is reached.
    #[error("all replication slots are in use")]
    Full,
    /// Space on the disk is short, and left to the WAL that arrives.
    #[error("could not reserve WAL for replication slot \"{name}\": No space left on device")]
    NoSpace {
        /// The slot.
        name: String,
        /// Segments for which there must be space.
        segments: u32,
    },
    /// The change could not be made durable, and was not made.
    #[error("could not save replication slots")]
    Store(#[from] StoreError),
}

struct Inner {
    disk: Arc<dyn Disk>,
    layout: Layout,
    health: Arc<Health>,
    slots_max: usize,
    /// Held while the file is written, so that its versions are in order. Taken before `slots`.
    file: Mutex<FileState>,
    slots: Mutex<Slots>,
    /// Ends the session of a number.
    terminate: OnceLock<Terminate>,
    /// A planted bug.
    #[cfg(test)]
    is_forgetful: std::sync::atomic::AtomicBool,
}

/// Ends the session of a number. Must not block.
type Terminate = Box<dyn Fn(u32) + Send + Sync>;

#[derive(Default)]
struct FileState {
    saved_at: Option<Instant>,
}

#[derive(Default)]
struct Slots {
    by_name: BTreeMap<String, Slot>,
    next_generation: u64,
}

#[derive(Clone)]
struct Slot {
    kind: SlotKind,
    restart_lsn: Option<Lsn>,
    invalidation: Option<InvalidationReason>,
    /// What its consumer's queries hold back.
    feedback: Feedback,
    /// What the file says.
    saved: Saved,
    active_pid: Option<u32>,
    /// The session that was told to let go.
    told_pid: Option<u32>,
    /// When it was left, by the wall clock. As in PostgreSQL not before this process started.
    inactive_since: PgTimestamp,
    /// When the keeper first saw that nobody streams with it.
    idle_since: Option<Instant>,
    /// Tells a slot from an earlier one of the same name.
    generation: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Saved {
    restart_lsn: Option<Lsn>,
    invalidation: Option<InvalidationReason>,
    feedback: Feedback,
}

/// Longest time for which an advanced `restart_lsn` is only in memory.
const SLOTS_SAVE_INTERVAL: Duration = Duration::from_secs(10);

/// Longest name of a slot (`NAMEDATALEN` - 1).
const SLOT_NAME_BYTES_MAX: usize = 63;

impl SlotTable {
    pub(super) fn open(
        disk: Arc<dyn Disk>,
        layout: Layout,
        health: Arc<Health>,
        slots_max: usize,
    ) -> Result<Self, StoreError> {
        let saved: Vec<SavedSlot> = SLOTS_FILE.read(&*disk, &layout.data_dir)?.unwrap_or_default();
        let mut slots = Slots::default();
        for SavedSlot { name, restart_lsn, invalidation, feedback } in saved {
            slots.insert(name, SlotKind::Permanent, Saved { restart_lsn, invalidation, feedback });
        }
        let (file, slots, terminate) = (Mutex::default(), Mutex::new(slots), OnceLock::new());
        Ok(Self(Arc::new(Inner {
            disk,
            layout,
            health,
            slots_max,
            file,
            slots,
            terminate,
            #[cfg(test)]
            is_forgetful: std::sync::atomic::AtomicBool::new(false),
        })))
    }

    /// Whom to ask to end a session whose slot is taken from it. The first who says so is asked.
    pub fn terminate_by(&self, terminate: impl Fn(u32) + Send + Sync + 'static) {
        let _ = self.0.terminate.set(Box::new(terminate));
    }

    /// Creates a slot. With `reserve` WAL is kept from there on. A permanent one is durable on return; blocks.
    pub fn create(&self, name: &str, kind: SlotKind, reserve: Option<Lsn>) -> Result<(), SlotError> {
        if !is_valid_name(name) {
            return Err(SlotError::InvalidName(name.to_owned()));
        }
        let _file = self.0.file.lock();
        {
            let slots = self.0.slots.lock();
            if slots.by_name.contains_key(name) {
                return Err(SlotError::AlreadyExists(name.to_owned()));
            }
            if slots.by_name.len() >= self.0.slots_max {
                return Err(SlotError::Full);
            }
        }
        if kind == SlotKind::Permanent {
            let (name, feedback) = (name.to_owned(), Feedback::default());
            let slot = SavedSlot { name, restart_lsn: reserve, invalidation: None, feedback };
            self.save(|saved| saved.push(slot))?;
        }
        let saved = Saved { restart_lsn: reserve, invalidation: None, feedback: Feedback::default() };
        self.0.slots.lock().insert(name.to_owned(), kind, saved);
        Ok(())
    }

    /// Drops a slot for the session `pid`. The removal of a permanent one is durable on return; blocks.
    pub fn drop_slot(&self, name: &str, pid: u32) -> Result<(), SlotError> {
        let _file = self.0.file.lock();
        // While the file is written nobody else may use it.
        let guard = self.acquire(name, pid, WhenInvalid::Use)?;
        let Some(SlotInfo { kind, .. }) = self.get(name) else {
            return Err(SlotError::NotFound(name.to_owned()));
        };
        if kind == SlotKind::Permanent {
            self.save(|saved| saved.retain(|slot| slot.name != name))?;
        }
        self.0.slots.lock().by_name.remove(name);
        drop(guard);
        Ok(())
    }

    /// Drops the temporary slots of a session that ends.
    pub fn drop_temporary(&self, owner: u32) {
        let mut slots = self.0.slots.lock();
        slots.by_name.retain(|_, slot| slot.kind != SlotKind::Temporary { owner });
    }

    /// One slot.
    pub fn get(&self, name: &str) -> Option<SlotInfo> {
        self.0.slots.lock().by_name.get(name).map(|slot| slot.info(name))
    }

    /// All slots, by name.
    pub fn list(&self) -> Vec<SlotInfo> {
        self.0.slots.lock().by_name.iter().map(|(name, slot)| slot.info(name)).collect()
    }

    /// Takes a slot for the session `pid`, until the guard is dropped.
    pub fn acquire(&self, name: &str, pid: u32, when_invalid: WhenInvalid) -> Result<SlotGuard, SlotError> {
        let mut slots = self.0.slots.lock();
        let slot = slots.by_name.get_mut(name).ok_or_else(|| SlotError::NotFound(name.to_owned()))?;
        // A temporary slot belongs to its session also while that does not stream.
        let owner = match slot.kind {
            SlotKind::Temporary { owner } if owner != pid => Some(owner),
            SlotKind::Temporary { .. } | SlotKind::Permanent => slot.active_pid,
        };
        if let Some(pid) = owner {
            return Err(SlotError::Active { name: name.to_owned(), pid });
        }
        if let (Some(reason), WhenInvalid::Refuse) = (slot.invalidation, when_invalid) {
            return Err(SlotError::Invalidated { name: name.to_owned(), reason });
        }
        (slot.active_pid, slot.told_pid, slot.idle_since) = (Some(pid), None, None);
        Ok(SlotGuard::new(self.clone(), name, slot.generation, when_invalid))
    }

    /// What lies behind `fork` is not held any more: whoever had it needs what is there instead, from the fork on.
    pub(super) fn cut(&self, fork: Lsn) {
        for slot in self.0.slots.lock().by_name.values_mut() {
            slot.restart_lsn = slot.restart_lsn.map(|restart_lsn| restart_lsn.min(fork));
        }
    }

    /// The smallest of what the consumers of valid slots hold back, but for what cannot be true when `next` is given out next.
    pub fn feedback(&self, next: Option<FullXid>) -> Feedback {
        let slots = self.0.slots.lock();
        let valid = slots.by_name.values().filter(|slot| slot.invalidation.is_none());
        let held_back = valid.map(|slot| slot.feedback).filter(|held_back| held_back.is_plausible(next));
        held_back.fold(Feedback::default(), Feedback::and)
    }

    /// The oldest position that a slot keeps.
    pub(super) fn oldest_needed(&self) -> Option<Lsn> {
        self.0.slots.lock().by_name.values().filter_map(Slot::oldest_needed).min()
    }

    /// Saves what advanced, if it is time: some interval has passed, or a slot has passed a segment so that WAL can go.
    pub(super) fn save_if_due(&self, now: Instant, size: SegmentSize) -> Result<(), StoreError> {
        let mut file = self.0.file.lock();
        let segment = |position: Lsn| SegmentNo::holding(position, size);
        let (has_changed, has_passed) = {
            let slots = self.0.slots.lock();
            let mut changed = slots.by_name.values().filter(|slot| slot.is_unsaved()).peekable();
            let has_changed = changed.peek().is_some();
            let passed = |slot: &Slot| slot.restart_lsn.map(segment) != slot.saved.restart_lsn.map(segment);
            (has_changed, changed.any(passed))
        };
        let is_due = file.saved_at.is_none_or(|saved| now.duration_since(saved) >= SLOTS_SAVE_INTERVAL);
        if has_passed || (has_changed && is_due) {
            self.save(|_| ())?;
            file.saved_at = Some(now);
        }
        Ok(())
    }

    /// Saves what advanced.
    pub(super) fn save_now(&self) -> Result<(), StoreError> {
        let _file = self.0.file.lock();
        let has_changed = self.0.slots.lock().by_name.values().any(Slot::is_unsaved);
        if has_changed { self.save(|_| ()) } else { Ok(()) }
    }
}

impl Slots {
    fn insert(&mut self, name: String, kind: SlotKind, saved: Saved) {
        let generation = self.next_generation;
        self.next_generation += 1;
        let Saved { restart_lsn, invalidation, feedback } = saved;
        let slot = Slot {
            kind,
            restart_lsn,
            invalidation,
            feedback,
            saved,
            active_pid: None,
            told_pid: None,
            inactive_since: PgTimestamp::from_system_time(SystemTime::now()),
            idle_since: None,
            generation,
        };
        self.by_name.insert(name, slot);
    }
}

impl Slot {
    /// The session that it belongs to now.
    fn owner(&self) -> Option<u32> {
        match self.kind {
            SlotKind::Temporary { owner } => Some(owner),
            SlotKind::Permanent => self.active_pid,
        }
    }

    fn info(&self, name: &str) -> SlotInfo {
        let active_pid = self.owner();
        SlotInfo {
            name: name.to_owned(),
            kind: self.kind,
            restart_lsn: self.restart_lsn,
            active_pid,
            invalidation: self.invalidation,
            feedback: self.feedback,
            inactive_since: self.active_pid.is_none().then_some(self.inactive_since),
        }
    }

    /// What decides about it.
    fn position(&self, now: Instant) -> SlotPosition {
        SlotPosition {
            restart_lsn: self.restart_lsn,
            invalidation: self.invalidation,
            is_active: self.owner().is_some(),
            idle: self.idle_since.map(|since| now.saturating_duration_since(since)),
        }
    }

    fn is_unsaved(&self) -> bool {
        let Self { restart_lsn, invalidation, feedback, .. } = *self;
        self.kind == SlotKind::Permanent && Saved { restart_lsn, invalidation, feedback } != self.saved
    }

    /// From where on it keeps WAL. One that is of no use any more keeps what the file says, until that says so too.
    fn oldest_needed(&self) -> Option<Lsn> {
        let keeps = |invalidation: Option<InvalidationReason>, restart_lsn: Option<Lsn>| {
            restart_lsn.filter(|_| invalidation.is_none())
        };
        let now = keeps(self.invalidation, self.restart_lsn);
        let saved = match self.kind {
            SlotKind::Permanent => keeps(self.saved.invalidation, self.saved.restart_lsn),
            SlotKind::Temporary { .. } => None,
        };
        now.into_iter().chain(saved).min()
    }
}

fn is_valid_name(name: &str) -> bool {
    let is_allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    (1..=SLOT_NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(is_allowed)
}

#[cfg(test)]
mod tests;
