//! Where a base backup that is taken now would begin: the redo pointer of the primary's newest checkpoint.
//!
//! Owns what is known of it, and the state file `walrelay.checkpoint`, which is behind by some seconds at most: an older
//! checkpoint makes a new slot keep more than it must, never less. Of a checkpoint that is not on the line, or not held to its
//! end, nothing is known.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::store::control::Layout;
use crate::store::disk::Disk;
use crate::store::error::StoreError;
use crate::store::health::Health;
use crate::store::state::StateFile;
use crate::wal::{CheckpointPlace, Lineage, Lsn};

pub(super) struct Redo {
    disk: Arc<dyn Disk>,
    layout: Layout,
    health: Arc<Health>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    newest: Option<CheckpointPlace>,
    /// What the file says.
    saved: Option<CheckpointPlace>,
    saved_at: Option<Instant>,
}

impl Redo {
    /// What an earlier process saved counts if it is on the line that is held to the given end.
    pub(super) fn open(
        disk: Arc<dyn Disk>,
        layout: Layout,
        health: Arc<Health>,
        line: Option<(&Lineage, Lsn)>,
    ) -> Result<Self, StoreError> {
        let saved: Option<CheckpointPlace> = match CHECKPOINT_FILE.read(&*disk, &layout.data_dir) {
            // The next checkpoint tells it again: what is held is to be served all the same.
            Err(StoreError::Damaged { .. }) => None,
            read => read?,
        };
        let newest = saved.filter(|saved| line.is_some_and(|(line, end)| saved.is_on(line, end)));
        let known = Mutex::new(Known { newest, saved, saved_at: None });
        Ok(Self { disk, layout, health, known })
    }

    /// The redo pointer; `None` if no checkpoint is known.
    pub(super) fn get(&self) -> Option<Lsn> {
        self.known.lock().newest.map(|newest| newest.redo)
    }

    /// A newer checkpoint was verified.
    pub(super) fn note(&self, newer: Option<CheckpointPlace>) {
        if newer.is_some() {
            self.known.lock().newest = newer;
        }
    }

    /// What lies behind `fork` is not on the line any more.
    pub(super) fn cut(&self, fork: Lsn) {
        let newest = &mut self.known.lock().newest;
        *newest = newest.filter(|newest| newest.end <= fork);
    }

    /// Saves what is known, if that is news and durable, and the last time is some seconds ago. Blocks.
    pub(super) fn save_if_due(&self, now: Instant, flushed: Lsn) -> Result<(), StoreError> {
        let saved_at = self.known.lock().saved_at;
        if saved_at.is_some_and(|saved| now.saturating_duration_since(saved) < SAVE_INTERVAL) {
            return Ok(());
        }
        if self.save(flushed)? {
            self.known.lock().saved_at = Some(now);
        }
        Ok(())
    }

    /// Saves what is known, if that is news and durable. Blocks.
    pub(super) fn save_now(&self, flushed: Lsn) -> Result<(), StoreError> {
        self.save(flushed).map(|_| ())
    }

    fn save(&self, flushed: Lsn) -> Result<bool, StoreError> {
        let newest = {
            let known = self.known.lock();
            let durable = known.newest.filter(|newest| newest.end <= flushed);
            let Some(newest) = durable.filter(|newest| known.saved != Some(*newest)) else {
                return Ok(false);
            };
            newest
        };
        self.health.check()?;
        let written = CHECKPOINT_FILE.write(&*self.disk, &self.layout.data_dir, &newest);
        written.map_err(|error| self.health.judge(error))?;
        self.known.lock().saved = Some(newest);
        Ok(true)
    }
}

const CHECKPOINT_FILE: StateFile =
    StateFile { name: "walrelay.checkpoint", magic: *b"WRCHKPT\0", version: 1 };

/// Longest time for which a newer checkpoint is only in memory.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::store::disk::{RealDisk, replace_durably};
    use crate::store::small::Deaf;
    use crate::wal::{SegmentSize, TimelineId};

    fn at(raw: u64) -> Lsn {
        Lsn::new(raw).unwrap()
    }

    fn open(dir: &Path, end: u64) -> Redo {
        let health = Arc::new(Health::new(Arc::new(Deaf)));
        let line = Lineage::new(TimelineId::FIRST, Vec::new(), SegmentSize::DEFAULT);
        Redo::open(Arc::new(RealDisk), Layout::new(dir), health, Some((&line, at(end)))).unwrap()
    }

    fn place(redo: u64, end: u64) -> Option<CheckpointPlace> {
        Some(CheckpointPlace { timeline: TimelineId::FIRST, redo: at(redo), end: at(end) })
    }

    #[test]
    fn it_outlives_the_process_as_far_as_its_wal_does() {
        let dir = tempfile::tempdir().unwrap();
        let now = Instant::now();
        let first = open(dir.path(), 1000);
        assert_eq!(first.get(), None);
        first.note(place(900, 1100));
        assert_eq!(first.get(), Some(at(900)));
        first.save_if_due(now, at(1000)).unwrap();
        assert_eq!(open(dir.path(), 2000).get(), None, "its record is not durable");
        first.save_if_due(now, at(1100)).unwrap();
        assert_eq!(open(dir.path(), 1100).get(), Some(at(900)));
        assert_eq!(open(dir.path(), 1099).get(), None, "its record is gone");
        first.note(place(1200, 1300));
        first.note(None);
        first.save_if_due(now + Duration::from_secs(9), at(1300)).unwrap();
        assert_eq!(open(dir.path(), 1300).get(), Some(at(900)), "it may be behind");
        first.save_now(at(1300)).unwrap();
        assert_eq!(open(dir.path(), 1300).get(), Some(at(1200)));
    }

    #[test]
    fn a_damaged_file_says_nothing_and_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        replace_durably(&RealDisk, dir.path(), CHECKPOINT_FILE.name, b"WRCHKPT\0 torn").unwrap();
        let redo = open(dir.path(), 1000);
        assert_eq!(redo.get(), None);
        redo.note(place(900, 1000));
        redo.save_now(at(1000)).unwrap();
        assert_eq!(open(dir.path(), 1000).get(), Some(at(900)));
    }

    #[test]
    fn of_one_beyond_a_fork_nothing_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let redo = open(dir.path(), 1000);
        redo.note(place(900, 1000));
        redo.cut(at(1000));
        assert_eq!(redo.get(), Some(at(900)));
        redo.cut(at(999));
        assert_eq!(redo.get(), None);
    }
}
