//! Physical replication slots: named consumers, and the oldest WAL each may still need.
//!
//! Owns the slot table and its file `walrelay.slots`. A permanent slot is durable before its creation or removal is
//! answered. `restart_lsn` follows the consumer in memory and is saved later; retention goes by the lower of the two, so
//! that after a crash no slot points at WAL that was removed meanwhile. A slot that never had a `restart_lsn` keeps
//! nothing, as in PostgreSQL.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::store::control::Layout;
use crate::store::disk::Disk;
use crate::store::error::StoreError;
use crate::store::health::Health;
use crate::store::state::StateFile;
use crate::wal::{Lsn, SegmentNo, SegmentSize};

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
    /// The session that uses it.
    pub active_pid: Option<u32>,
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
}

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
    /// What the file says.
    saved_restart_lsn: Option<Lsn>,
    active_pid: Option<u32>,
    /// Tells a slot from an earlier one of the same name.
    generation: u64,
}

#[derive(Serialize, Deserialize)]
struct SavedSlot {
    name: String,
    restart_lsn: Option<Lsn>,
}

const SLOTS_FILE: StateFile = StateFile { name: "walrelay.slots", magic: *b"WRSLOTS\0", version: 1 };

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
        for SavedSlot { name, restart_lsn } in saved {
            slots.insert(name, SlotKind::Permanent, restart_lsn);
        }
        let (file, slots) = (Mutex::default(), Mutex::new(slots));
        Ok(Self(Arc::new(Inner { disk, layout, health, slots_max, file, slots })))
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
            self.save(|saved| saved.push(SavedSlot { name: name.to_owned(), restart_lsn: reserve }))?;
        }
        self.0.slots.lock().insert(name.to_owned(), kind, reserve);
        Ok(())
    }

    /// Drops a slot for the session `pid`. The removal of a permanent one is durable on return; blocks.
    pub fn drop_slot(&self, name: &str, pid: u32) -> Result<(), SlotError> {
        let _file = self.0.file.lock();
        // While the file is written nobody else may use it.
        let guard = self.acquire(name, pid)?;
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
    pub fn acquire(&self, name: &str, pid: u32) -> Result<SlotGuard, SlotError> {
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
        slot.active_pid = Some(pid);
        Ok(SlotGuard { table: self.clone(), name: name.to_owned(), generation: slot.generation })
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
            let passed = |slot: &Slot| slot.restart_lsn.map(segment) != slot.saved_restart_lsn.map(segment);
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

    /// Writes the permanent slots as they are, with a change; the caller holds `file`.
    fn save(&self, change: impl FnOnce(&mut Vec<SavedSlot>)) -> Result<(), StoreError> {
        let Inner { disk, layout, health, slots, .. } = &*self.0;
        health.check()?;
        let permanent = |(name, slot): (&String, &Slot)| {
            let SlotKind::Permanent = slot.kind else { return None };
            Some(SavedSlot { name: name.clone(), restart_lsn: slot.restart_lsn })
        };
        let mut saved: Vec<SavedSlot> = slots.lock().by_name.iter().filter_map(permanent).collect();
        change(&mut saved);
        SLOTS_FILE.write(&**disk, &layout.data_dir, &saved).map_err(|error| health.judge(error))?;
        let mut slots = slots.lock();
        for SavedSlot { name, restart_lsn } in saved {
            if let Some(slot) = slots.by_name.get_mut(&name) {
                slot.saved_restart_lsn = restart_lsn;
            }
        }
        Ok(())
    }
}

impl Slots {
    fn insert(&mut self, name: String, kind: SlotKind, restart_lsn: Option<Lsn>) {
        let generation = self.next_generation;
        self.next_generation += 1;
        let slot = Slot { kind, restart_lsn, saved_restart_lsn: restart_lsn, active_pid: None, generation };
        self.by_name.insert(name, slot);
    }
}

impl Slot {
    fn info(&self, name: &str) -> SlotInfo {
        let active_pid = match self.kind {
            SlotKind::Temporary { owner } => Some(owner),
            SlotKind::Permanent => self.active_pid,
        };
        SlotInfo { name: name.to_owned(), kind: self.kind, restart_lsn: self.restart_lsn, active_pid }
    }

    fn is_unsaved(&self) -> bool {
        self.kind == SlotKind::Permanent && self.restart_lsn != self.saved_restart_lsn
    }

    fn oldest_needed(&self) -> Option<Lsn> {
        match (self.kind, self.saved_restart_lsn) {
            (SlotKind::Permanent, Some(saved)) => self.restart_lsn.map(|now| now.min(saved)),
            (SlotKind::Permanent, None) | (SlotKind::Temporary { .. }, _) => self.restart_lsn,
        }
    }
}

fn is_valid_name(name: &str) -> bool {
    let is_allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    (1..=SLOT_NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(is_allowed)
}

/// The use of a slot by one session; ends when dropped.
pub struct SlotGuard {
    table: SlotTable,
    name: String,
    generation: u64,
}

impl SlotGuard {
    /// The slot's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The consumer has everything before `restart_lsn` durably. As in PostgreSQL the slot follows what is reported, also
    /// backwards: a consumer that was set back needs the older WAL.
    pub fn advance(&self, restart_lsn: Lsn) {
        self.with_slot(|slot| slot.restart_lsn = Some(restart_lsn));
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
        self.with_slot(|slot| slot.active_pid = None);
    }
}

#[cfg(test)]
#[path = "slots_tests.rs"]
mod tests;
