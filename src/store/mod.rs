//! The store: WAL on disk.
//!
//! (long documentation follows with the simulation)

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

mod catalog;
mod control;
pub mod disk;
mod error;
mod flush;
mod health;
mod index;
mod inventory;
mod keeper;
mod mapping;
mod open;
mod overlap;
mod partials;
mod pool;
mod positions;
mod queue;
mod reader;
mod recovery;
mod shared;
#[cfg(test)]
mod simulation;
mod slots;
mod state;
mod tail;
mod threads;
mod walk;
mod writer;

pub use control::{Identity, ServerFacts};
pub use disk::{Disk, RealDisk};
pub use error::{AppendError, Condition, NO_SPACE_RETRY_INTERVAL, ReadError, StoreError};
pub use health::Observer;
pub use positions::Positions;
pub use reader::{ColdRead, Read, WalReader};
pub use slots::{SlotError, SlotGuard, SlotInfo, SlotKind, SlotTable};
pub use tail::{BlockId, RECEIVE_BLOCK_BYTES};
pub use writer::{ResumePlan, WalWriter};

use disk::{read_small, replace_durably};
use shared::Shared;
use threads::Threads;

use crate::wal::timeline::HISTORY_BYTES_MAX;
use crate::wal::{Lsn, TimelineId};

/// How a store is to work.
#[derive(Clone, Debug)]
pub struct StoreSettings {
    /// The directory; made if its parent exists.
    pub data_dir: PathBuf,
    /// WAL kept for consumers without a slot, in bytes.
    pub wal_keep_size: u64,
    /// Memory for the newest WAL.
    pub tail_bytes_max: u64,
    /// Received bytes that may wait to be written.
    pub unwritten_bytes_max: u64,
    /// Segment files kept ready.
    pub spare_segments: u32,
    /// Most slots, permanent and temporary.
    pub max_replication_slots: usize,
}

/// Opens the store of a data directory: recovers what is there, and starts the threads.
pub fn open(
    settings: StoreSettings,
    disk: Arc<dyn Disk>,
    observer: Arc<dyn Observer>,
) -> Result<(Store, WalWriter), StoreError> {
    let opened = open::open(settings, disk, observer, open::Variant::default())?;
    let threads = Threads::start(&opened.shared, opened.has_reserve)?;
    let handle = Arc::new(StoreHandle { threads, _lock: opened.lock });
    let writer = WalWriter::new(opened.shared.clone(), Some(handle.clone()), opened.scanner);
    Ok((Store { shared: opened.shared, handle, notes: opened.notes.into() }, writer))
}

/// The threads and the lock; both end with the last of the store and its writer.
struct StoreHandle {
    threads: Threads,
    _lock: Box<dyn Any + Send + Sync>,
}

impl Drop for StoreHandle {
    fn drop(&mut self) {
        self.threads.stop();
    }
}

/// The WAL that is held; clones are the same store.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    handle: Arc<StoreHandle>,
    notes: Arc<[String]>,
}

impl Store {
    /// Whose WAL this is; `None` in a fresh directory.
    pub fn identity(&self) -> Option<Identity> {
        self.shared.identity.get().copied()
    }

    /// How far the store is; `None` in a fresh directory.
    pub fn positions(&self) -> Option<Positions> {
        *self.shared.positions.lock()
    }

    /// Whether WAL can be made durable.
    pub fn condition(&self) -> Condition {
        self.shared.health.condition()
    }

    /// What recovery did that somebody should know, one line each.
    pub fn recovery_notes(&self) -> &[String] {
        &self.notes
    }

    /// What was remembered of the upstream.
    pub fn facts(&self) -> Option<ServerFacts> {
        self.shared.control.lock().as_ref().and_then(|control| control.facts.clone())
    }

    /// Remembers what the upstream said about itself; durable on return. Blocks.
    pub fn remember_facts(&self, facts: ServerFacts) -> Result<(), StoreError> {
        self.shared.health.check()?;
        let Shared { disk, layout, .. } = &*self.shared;
        let mut current = self.shared.control.lock();
        let control = current.as_mut().ok_or(StoreError::NotInitialized)?;
        if control.facts.as_ref() == Some(&facts) {
            return Ok(());
        }
        control.check_owner(&**disk, layout)?;
        let mut changed = control.clone();
        changed.facts = Some(facts);
        changed.write(&**disk, layout).map_err(|error| self.shared.health.judge(error))?;
        *control = changed;
        Ok(())
    }

    /// Start of the oldest segment that is held on the current timeline.
    pub fn oldest(&self) -> Option<Lsn> {
        self.shared.oldest()
    }

    /// The history file of a timeline, as the upstream sent it; `None` if it is not held. Blocks.
    pub fn history(&self, timeline: TimelineId) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.shared.layout.wal(&timeline.history_file_name());
        read_small(&*self.shared.disk, &path, HISTORY_BYTES_MAX).map_err(StoreError::io("read", &path))
    }

    /// Stores the history file of a timeline; durable on return. Blocks. A stored one is never changed.
    pub fn store_history(&self, timeline: TimelineId, content: &[u8]) -> Result<(), StoreError> {
        self.shared.health.check()?;
        let (name, dir) = (timeline.history_file_name(), &self.shared.layout.wal_dir);
        match self.history(timeline)? {
            Some(held) if held == content => return Ok(()),
            Some(_) => return Err(StoreError::OtherHistory(timeline)),
            None => {}
        }
        replace_durably(&*self.shared.disk, dir, &name, content)
            .map_err(StoreError::io("write", &dir.join(&name)))
            .map_err(|error| self.shared.health.judge(error))
    }

    /// A reader of one timeline's WAL, for one consumer.
    pub fn reader(&self, timeline: TimelineId) -> WalReader {
        WalReader::new(self.shared.clone(), timeline)
    }

    /// The replication slots.
    pub fn slots(&self) -> &SlotTable {
        &self.shared.slots
    }

    /// Memory that the tail keeps alive, in bytes.
    pub fn tail_bytes(&self) -> u64 {
        self.shared.tail.lock().memory_bytes()
    }

    /// Bytes received and not yet written.
    pub fn unwritten_bytes(&self) -> u64 {
        self.shared.queue.unwritten_bytes()
    }

    /// Finishes writes and syncs, and stops the threads. Blocks. What is held can still be read.
    pub fn shutdown(&self) {
        self.handle.threads.stop();
    }
}
