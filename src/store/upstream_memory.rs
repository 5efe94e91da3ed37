//! What a process learned of the upstream's slots that the next one could not find out.
//!
//! Owns the state file `walrelay.upstream`. What slots say is taken for what was acknowledged: here is what must not be, and what
//! must still be when no slot says it any more. It never says where WAL is, and nothing is served or removed by it; so a damaged
//! file says nothing, and is replaced.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::store::Store;
use crate::store::error::StoreError;
use crate::store::shared::Shared;
use crate::store::state::StateFile;
use crate::wal::Lsn;

/// What is remembered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpstreamMemory {
    /// Servers where a slot was made that keeps WAL only from beyond what was held, and from where on; `None`: not heard yet.
    #[serde(default)]
    pub made_ahead: BTreeMap<String, Option<Lsn>>,
    /// Servers where the slot tells of WAL that was set aside here, as long as it is there.
    #[serde(default)]
    pub set_aside: BTreeMap<String, Lsn>,
    /// Up to here WAL was acknowledged and has been lost here, unless it is durable again.
    #[serde(default)]
    pub lost_to: Option<Lsn>,
}

/// The memory of an open store; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct UpstreamMemoryFile(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Held while the file is written: its own, for what others write must not wait for this.
    file: Mutex<()>,
    memory: Mutex<UpstreamMemory>,
}

impl UpstreamMemory {
    /// The slot that was made at this server is there, if the answer was not heard: what is acknowledged from now on moves it, and
    /// it is as it was made only as long as it is ahead of what is durable here.
    pub fn note_reached(&mut self, server: &str, reached: Lsn, durable: Lsn) {
        if self.made_ahead.get(server) != Some(&None) {
            return;
        }
        if reached > durable {
            self.made_ahead.insert(server.to_owned(), Some(reached));
        } else {
            self.made_ahead.remove(server);
        }
    }
}

impl UpstreamMemoryFile {
    pub(super) fn read(shared: &Shared) -> Result<Self, StoreError> {
        let read = match UPSTREAM_FILE.read(&*shared.disk, &shared.layout.data_dir) {
            Err(StoreError::Damaged { .. }) => None,
            read => read?,
        };
        let memory = Mutex::new(read.unwrap_or_default());
        Ok(Self(Arc::new(Inner { file: Mutex::default(), memory })))
    }
}

impl Store {
    /// What is remembered.
    pub fn upstream_memory(&self) -> UpstreamMemory {
        self.upstream_memory.0.memory.lock().clone()
    }

    /// Changes what is remembered; durable on return. Blocks.
    pub fn change_upstream_memory(&self, change: impl FnOnce(&mut UpstreamMemory)) -> Result<(), StoreError> {
        let Shared { disk, layout, health, .. } = &*self.shared;
        health.check()?;
        let _file = self.upstream_memory.0.file.lock();
        let before = self.upstream_memory();
        let mut after = before.clone();
        change(&mut after);
        if after == before {
            return Ok(());
        }
        if let Some(control) = self.shared.control.lock().clone() {
            control.check_owner(&**disk, layout)?;
        }
        UPSTREAM_FILE.write(&**disk, &layout.data_dir, &after).map_err(|error| health.judge(error))?;
        *self.upstream_memory.0.memory.lock() = after;
        Ok(())
    }
}

const UPSTREAM_FILE: StateFile = StateFile { name: "walrelay.upstream", magic: *b"WRUPSTRM", version: 1 };

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::disk::{RealDisk, replace_durably};
    use crate::store::small::open_in;

    #[test]
    fn a_slot_that_is_there_was_heard_of() {
        let [here, ahead] = [500, 900].map(|raw| Lsn::new(raw).unwrap());
        let servers = [("a", None), ("b", None), ("c", Some(ahead))].map(|(name, at)| (name.to_owned(), at));
        let mut memory = UpstreamMemory { made_ahead: servers.into(), ..UpstreamMemory::default() };
        memory.note_reached("a", ahead, here);
        memory.note_reached("b", here, here);
        // What was heard of stands until a stream begins; others are not made up.
        memory.note_reached("c", here, here);
        memory.note_reached("d", ahead, here);
        let known = [("a".to_owned(), Some(ahead)), ("c".to_owned(), Some(ahead))].into();
        assert_eq!(memory.made_ahead, known);
    }

    #[test]
    fn it_outlives_the_process_and_a_damaged_file_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let at = Lsn::new(900);
        {
            let (store, _writer) = open_in(dir.path());
            assert_eq!(store.upstream_memory(), UpstreamMemory::default());
            store.change_upstream_memory(|_| ()).unwrap();
            assert!(!dir.path().join(UPSTREAM_FILE.name).exists(), "nothing is known");
            store.change_upstream_memory(|memory| memory.lost_to = at).unwrap();
            store
                .change_upstream_memory(|memory| memory.made_ahead = [("a".to_owned(), None)].into())
                .unwrap();
        }
        let made_ahead = [("a".to_owned(), None)].into();
        let remembered = UpstreamMemory { made_ahead, lost_to: at, ..UpstreamMemory::default() };
        {
            let (store, _writer) = open_in(dir.path());
            assert_eq!(store.upstream_memory(), remembered);
        }
        replace_durably(&RealDisk, dir.path(), UPSTREAM_FILE.name, b"WRUPSTRM torn").unwrap();
        let (store, _writer) = open_in(dir.path());
        assert_eq!(store.upstream_memory(), UpstreamMemory::default());
        store.change_upstream_memory(|memory| memory.lost_to = at).unwrap();
    }
}
