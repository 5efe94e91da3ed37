//! Since when WAL is nowhere but here, over restarts.
//!
//! Owns the state file `walrelay.only_copy`: up to where standbys had WAL, and when what is beyond began to be acknowledged. The
//! time that has passed since is told by a clock that goes on while no process runs and that nobody can set, as long as the
//! machine is not started again. After that there is only the wall clock: where it jumps ahead the time is told to be longer than
//! it was, and where it has gone back the time is not known. Both are for the reader to be careful with.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::store::Store;
use crate::store::disk::{Disk, OpenMode, read_full_at};
use crate::store::error::StoreError;
use crate::store::shared::Shared;
use crate::store::state::StateFile;
use crate::wal::{Lsn, PgTimestamp, TimelineId};

/// What was remembered, on the line that is held now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnlyCopySince {
    /// The timeline that is received.
    pub timeline: TimelineId,
    /// What a standby had.
    pub elsewhere: Option<Lsn>,
    /// End of what is held.
    pub end: Lsn,
    /// Time since the first of what is beyond `elsewhere` was acknowledged, or since before that; `None`: it is not known.
    pub age: Option<Duration>,
}

/// Content of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    timeline: TimelineId,
    elsewhere: Option<Lsn>,
    /// No WAL beyond was acknowledged before.
    since: Moment,
}

/// A moment, by two clocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Moment {
    /// Which start of the machine it was after; `None` where that cannot be told.
    boot: Option<String>,
    /// Time from that start, sleep included.
    since_boot: Duration,
    /// By the wall clock.
    wall: PgTimestamp,
}

/// What is remembered in an open store; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct OnlyCopyFile(Arc<Mutex<Option<OnlyCopySince>>>);

impl OnlyCopyFile {
    /// Reads it, after recovery.
    pub(super) fn read(shared: &Shared) -> Result<Self, StoreError> {
        let remembered = match ONLY_COPY_FILE.read(&*shared.disk, &shared.layout.data_dir) {
            // Nothing is known then, which is not that there was nothing.
            Err(StoreError::Damaged { .. }) => Some(None),
            read => read?.map(Some),
        };
        let Some(remembered) = remembered else { return Ok(Self::default()) };
        Ok(Self(Arc::new(Mutex::new(recalled(shared, remembered.as_ref())))))
    }
}

fn recalled(shared: &Shared, remembered: Option<&Remembered>) -> Option<OnlyCopySince> {
    let positions = (*shared.positions.lock())?;
    let (timeline, end) = (positions.timeline, positions.flushed);
    let unknown = OnlyCopySince { timeline, elsewhere: None, end, age: None };
    let Some(remembered) = remembered else { return Some(unknown) };
    let fork = shared.lineage().ok()?.left(remembered.timeline).map(|(fork, _)| fork);
    if fork.is_none() && remembered.timeline != timeline {
        // It was of a line that is not held any more, and says nothing of the one that is.
        return Some(unknown);
    }
    let had = |had: Lsn| fork.map_or(had, |fork| had.min(fork));
    let age = remembered.since.passed(&Moment::now(&*shared.disk));
    Some(OnlyCopySince { timeline, elsewhere: remembered.elsewhere.map(had), end, age })
}

impl Store {
    /// What an earlier process has remembered; `None` where that is nothing.
    pub fn only_copy_before(&self) -> Option<OnlyCopySince> {
        *self.only_copy.0.lock()
    }

    /// Remembers what standbys have of a timeline, and how long ago something beyond that was acknowledged, if it was; durable on
    /// return. Which timeline is received by now does not matter. Blocks.
    pub fn remember_only_copy(
        &self,
        timeline: TimelineId,
        elsewhere: Option<Lsn>,
        age: Option<Duration>,
    ) -> Result<(), StoreError> {
        self.shared.health.check()?;
        let Shared { disk, layout, .. } = &*self.shared;
        let since = Moment::now(&**disk).before(age.unwrap_or_default());
        let _file = self.shared.control_file.lock();
        if let Some(control) = self.shared.control.lock().clone() {
            control.check_owner(&**disk, layout)?;
        }
        let remembered = Remembered { timeline, elsewhere, since };
        let written = ONLY_COPY_FILE.write(&**disk, &layout.data_dir, &remembered);
        written.map_err(|error| self.shared.health.judge(error))
    }
}

impl Moment {
    fn now(disk: &dyn Disk) -> Self {
        let boottime = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Self {
            boot: boot_id(disk),
            since_boot: Duration::try_from(boottime).unwrap_or_default(),
            wall: PgTimestamp::from_system_time(SystemTime::now()),
        }
    }

    fn before(self, age: Duration) -> Self {
        let micros = i64::try_from(age.as_micros()).unwrap_or(i64::MAX);
        // What was before the machine was started is not told by its clock.
        let since_boot = self.since_boot.checked_sub(age);
        Self {
            boot: self.boot.filter(|_| since_boot.is_some()),
            since_boot: since_boot.unwrap_or_default(),
            wall: PgTimestamp(self.wall.0.saturating_sub(micros)),
        }
    }

    /// Time from this moment to a later one; `None` where that cannot be told.
    fn passed(&self, now: &Self) -> Option<Duration> {
        if self.boot.is_some() && self.boot == now.boot {
            return now.since_boot.checked_sub(self.since_boot);
        }
        u64::try_from(now.wall.0.checked_sub(self.wall.0)?).ok().map(Duration::from_micros)
    }
}

fn boot_id(disk: &dyn Disk) -> Option<String> {
    let file = disk.open(Path::new(BOOT_ID_PATH), OpenMode::Read).ok()?;
    let mut text = [0; BOOT_ID_BYTES_MAX];
    let read = read_full_at(&*file, &mut text, 0).ok()?;
    let text = std::str::from_utf8(text.get(..read)?).ok()?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Where Linux names each start of the machine.
const BOOT_ID_PATH: &str = "/proc/sys/kernel/random/boot_id";

const BOOT_ID_BYTES_MAX: usize = 64;

const ONLY_COPY_FILE: StateFile = StateFile { name: "walrelay.only_copy", magic: *b"WRONLYC\0", version: 1 };

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::disk::replace_durably;
    use crate::store::{Identity, RealDisk, small};
    use crate::wal::{SegmentSize, SystemId};

    fn at(boot: &str, since_boot: u64, wall: i64) -> Moment {
        let boot = Some(boot.to_owned()).filter(|boot| !boot.is_empty());
        let since_boot = Duration::from_secs(since_boot);
        Moment { boot, since_boot, wall: PgTimestamp(wall * 1_000_000) }
    }

    #[test]
    fn the_wall_clock_counts_only_where_the_machine_was_started_again() {
        let seconds = |from: Moment, to: Moment| from.passed(&to).map(|passed| passed.as_secs());
        for jump in [-1_000_000, 0, 1_000_000] {
            assert_eq!(seconds(at("a", 100, 0), at("a", 130, jump)), Some(30));
        }
        assert_eq!(seconds(at("a", 100, 1_000), at("b", 5, 1_060)), Some(60));
        assert_eq!(seconds(at("a", 100, 1_000), at("b", 5, 999)), None, "the clock has gone back");
        assert_eq!(seconds(at("", 100, 1_000), at("", 130, 1_060)), Some(60), "nobody knows the start");
        assert_eq!(seconds(at("a", 100, 0), at("a", 99, 30)), None);
        let before = at("a", 100, 1_000).before(Duration::from_secs(60));
        assert_eq!(before, at("a", 40, 940));
        let before = at("a", 100, 1_000).before(Duration::from_secs(101));
        assert_eq!(seconds(before, at("a", 130, 1_000)), Some(101), "it was before this start");
    }

    #[test]
    fn what_is_remembered_is_told_by_the_next_process() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("data");
        let (store, mut writer) = small::open_in(&dir);
        assert_eq!(store.only_copy_before(), None);
        let identity = Identity { system_id: SystemId(7), segment_size: SegmentSize::DEFAULT };
        let start = Lsn::new(SegmentSize::DEFAULT.bytes()).unwrap();
        writer.initialize(identity, TimelineId::FIRST, start).unwrap();
        let had = Lsn::new(start.get() - 100);
        store.remember_only_copy(TimelineId::FIRST, had, Some(Duration::from_secs(1_000))).unwrap();
        assert_eq!(store.only_copy_before(), None, "it is for the next process");
        drop((store, writer));
        let (store, writer) = small::open_in(&dir);
        let told = store.only_copy_before().unwrap();
        assert_eq!((told.timeline, told.elsewhere, told.end), (TimelineId::FIRST, had, start));
        let age = told.age.unwrap();
        assert!((1_000..1_060).contains(&age.as_secs()), "{age:?}");
        drop((store, writer));
        replace_durably(&RealDisk, &dir, ONLY_COPY_FILE.name, b"WRONLYC\0 torn").unwrap();
        let told = small::open_in(&dir).0.only_copy_before().unwrap();
        assert_eq!((told.elsewhere, told.end, told.age), (None, start, None));
    }

    #[test]
    fn what_is_known_of_a_timeline_is_not_told_of_another() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("data");
        let (store, mut writer) = small::open_in(&dir);
        let identity = Identity { system_id: SystemId(7), segment_size: SegmentSize::DEFAULT };
        let start = Lsn::new(SegmentSize::DEFAULT.bytes()).unwrap();
        writer.initialize(identity, TimelineId::FIRST, start).unwrap();
        // It is left, with what standbys have, before that is written down.
        let next = TimelineId::new(2).unwrap();
        writer.switch(next, start).unwrap();
        let age = Some(Duration::from_secs(1_000));
        store.remember_only_copy(TimelineId::FIRST, Some(start.advance(100)), age).unwrap();
        drop((store, writer));
        let (store, writer) = small::open_in(&dir);
        let told = store.only_copy_before().unwrap();
        assert_eq!((told.timeline, told.elsewhere, told.end), (next, Some(start), start));
        // One that is not on the line any more.
        store.remember_only_copy(TimelineId::new(3).unwrap(), Some(start), None).unwrap();
        drop((store, writer));
        let told = small::open_in(&dir).0.only_copy_before().unwrap();
        assert_eq!((told.timeline, told.elsewhere, told.end, told.age), (next, None, start, None));
    }
}
