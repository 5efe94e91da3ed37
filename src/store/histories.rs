//! History files: kept exactly as the upstream sent them.
//!
//! Owns reading and storing them, and that none of another cluster stays. Decides nothing by what is in them.

use crate::store::disk::{read_small, replace_durably, sync_dir};
use crate::store::shared::Shared;
use crate::store::{Store, StoreError};
use crate::wal::timeline::{Ancestor, HISTORY_BYTES_MAX};
use crate::wal::{HistoryHash, TimelineHistory, TimelineId};

impl Shared {
    fn history(&self, timeline: TimelineId) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.layout.wal(&timeline.history_file_name());
        read_small(&*self.disk, &path, HISTORY_BYTES_MAX).map_err(StoreError::io("read", &path))
    }

    /// The ancestors that a timeline's history file names, oldest first; none without one.
    pub(super) fn ancestors_of(&self, timeline: TimelineId) -> Result<Vec<Ancestor>, StoreError> {
        let Some(content) = self.history(timeline)? else { return Ok(Vec::new()) };
        let path = self.layout.wal(&timeline.history_file_name());
        let history = TimelineHistory::parse(timeline, &content)
            .map_err(|error| StoreError::Damaged { path, detail: error.to_string() })?;
        Ok(history.ancestors().to_vec())
    }
}

impl Store {
    /// The history file of a timeline, as the upstream sent it; `None` if it is not held. Blocks.
    pub fn history(&self, timeline: TimelineId) -> Result<Option<Vec<u8>>, StoreError> {
        self.shared.history(timeline)
    }

    /// What stands for the history of a timeline; `None` where that is not held, or cannot be read. Blocks.
    pub fn history_hash(&self, timeline: TimelineId) -> Result<Option<HistoryHash>, StoreError> {
        if timeline == TimelineId::FIRST {
            return Ok(Some(HistoryHash::of(&TimelineHistory::of_first())));
        }
        let history = self.history(timeline)?.map(|content| TimelineHistory::parse(timeline, &content));
        Ok(history.and_then(Result::ok).map(|history| HistoryHash::of(&history)))
    }

    /// Stores the history file of a timeline; durable on return. Blocks. A stored one is not changed.
    pub fn store_history(&self, timeline: TimelineId, content: &[u8]) -> Result<(), StoreError> {
        match self.history(timeline)? {
            Some(held) if held != content => Err(StoreError::OtherHistory(timeline)),
            _ => self.replace_history(timeline, content),
        }
    }

    /// Stores the history file of a timeline of which there is no WAL here: another one under its name came from a server that
    /// was never followed. Durable on return; blocks.
    pub fn replace_history(&self, timeline: TimelineId, content: &[u8]) -> Result<(), StoreError> {
        self.shared.health.check()?;
        let (name, dir) = (timeline.history_file_name(), &self.shared.layout.wal_dir);
        if self.history(timeline)?.is_some_and(|held| held == content) {
            return Ok(());
        }
        replace_durably(&*self.shared.disk, dir, &name, content)
            .map_err(StoreError::io("write", &dir.join(&name)))
            .map_err(|error| self.shared.health.judge(error))
    }

    /// In a directory that is no cluster's yet, removes the history files of whatever upstream an earlier attempt may have
    /// talked to; durable on return. Blocks. Does nothing once the directory is a cluster's.
    pub fn forget_unowned_histories(&self) -> Result<(), StoreError> {
        self.shared.health.check()?;
        if self.identity().is_some() {
            return Ok(());
        }
        let (disk, dir) = (&*self.shared.disk, &self.shared.layout.wal_dir);
        let entries = disk.list(dir).map_err(StoreError::io("list", dir))?;
        let unowned =
            entries.iter().filter(|entry| TimelineId::parse_history_file_name(&entry.name).is_some());
        let mut removed = false;
        for entry in unowned {
            let path = dir.join(&entry.name);
            disk.unlink(&path).map_err(StoreError::io("remove", &path))?;
            removed = true;
        }
        if removed { sync_dir(disk, dir).map_err(StoreError::io("sync directory", dir)) } else { Ok(()) }
    }
}
