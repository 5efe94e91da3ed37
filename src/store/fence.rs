//! The fence: while it stands nothing more is received or acknowledged, on any timeline, across restarts.
//!
//! Owns the state file `walrelay.fence`, which is apart from the control file because a directory that holds nothing yet can
//! be fenced too: what a relay has not begun to acknowledge it must not begin then. Durable before anybody hears of it. Does
//! not decide what a fence forbids.

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::store::control::{Control, Layout};
use crate::store::disk::Disk;
use crate::store::error::StoreError;
use crate::store::shared::Shared;
use crate::store::state::StateFile;
use crate::store::{Store, open};
use crate::wal::{PgTimestamp, SystemId, TimelineId};

/// That nothing more is to be received or acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// When it was set, by the clock of this machine.
    pub since: PgTimestamp,
}

/// The fence of an open store; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct FenceFile(Arc<Mutex<Option<Fence>>>);

impl FenceFile {
    pub(super) fn read(disk: &dyn Disk, layout: &Layout) -> Result<Self, StoreError> {
        Ok(Self(Arc::new(Mutex::new(read(disk, layout)?))))
    }
}

impl Store {
    /// The fence, if it stands.
    pub fn fence(&self) -> Option<Fence> {
        *self.fence.0.lock()
    }

    /// Sets the fence or takes it away; durable on return. One that stands already stays as it was. Blocks.
    pub fn set_fence(&self, fence: Option<Fence>) -> Result<(), StoreError> {
        self.shared.health.check()?;
        let Shared { disk, layout, .. } = &*self.shared;
        let _file = self.shared.control_file.lock();
        let standing = self.fence();
        if standing.is_some() == fence.is_some() {
            return Ok(());
        }
        if let Some(control) = self.shared.control.lock().clone() {
            control.check_owner(&**disk, layout)?;
        }
        write(&**disk, layout, fence).map_err(|error| self.shared.health.judge(error))?;
        *self.fence.0.lock() = fence;
        Ok(())
    }
}

/// What a directory without a relay says of itself when its fence is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FencedDirectory {
    /// The fence that stands now.
    pub fence: Option<Fence>,
    /// The cluster and the timeline whose WAL it holds; `None` when it holds nothing.
    pub holds: Option<(SystemId, TimelineId)>,
}

/// What must be in a directory for its fence to be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MustHold {
    /// WAL: anything else is a disk that is not mounted.
    Wal,
    /// WAL, or a fence that was set before there was any.
    WalOrFence,
    /// Nothing.
    Nothing,
}

/// Sets or takes away the fence of a directory that no relay has open; durable on return.
pub fn fence_directory(
    data_dir: &Path,
    disk: &dyn Disk,
    fence: Option<Fence>,
    must_hold: MustHold,
) -> Result<FencedDirectory, StoreError> {
    let layout = Layout::new(data_dir);
    // One that is not there is not made: it is hardly the right one.
    let files = disk.list(data_dir).map_err(StoreError::io("list", data_dir))?;
    let lock_name = layout.lock();
    let was_opened = files.iter().any(|file| lock_name.ends_with(&file.name));
    if !was_opened {
        // Nobody has it open, and one that is refused is left as it was, without a lock.
        found(disk, &layout, must_hold)?;
    }
    // One that is empty is closed to others, as at a first start.
    disk.create_dir(data_dir).map_err(StoreError::io("use directory", data_dir))?;
    let _lock = open::lock(disk, &layout)?;
    let (control, standing) = found(disk, &layout, must_hold)?;
    let changes = standing.is_some() != fence.is_some();
    if changes {
        write(disk, &layout, fence)?;
    }
    let fence = if changes { fence } else { standing };
    Ok(FencedDirectory { fence, holds: control.map(|control| (control.system_id, control.timeline)) })
}

/// Whether a process has the directory open. An error where that cannot be seen.
pub fn is_open(data_dir: &Path, disk: &dyn Disk) -> Result<bool, StoreError> {
    // One that is not there, or closed to us, is not one that nobody has open.
    disk.list(data_dir).map_err(StoreError::io("list", data_dir))?;
    let lock = Layout::new(data_dir).lock();
    disk.is_locked(&lock).map_err(StoreError::io("look at", &lock))
}

/// The fence that is durable in a directory, whoever has it open.
pub fn durable_fence(data_dir: &Path, disk: &dyn Disk) -> Result<Option<Fence>, StoreError> {
    read(disk, &Layout::new(data_dir))
}

/// What is in a directory, if that is what must be there.
fn found(
    disk: &dyn Disk,
    layout: &Layout,
    must_hold: MustHold,
) -> Result<(Option<Control>, Option<Fence>), StoreError> {
    let (control, standing) = (Control::read(disk, layout)?, read(disk, layout)?);
    let is_right = match must_hold {
        MustHold::Wal => control.is_some(),
        MustHold::WalOrFence => control.is_some() || standing.is_some(),
        MustHold::Nothing => true,
    };
    if is_right { Ok((control, standing)) } else { Err(StoreError::NoWal { path: layout.data_dir.clone() }) }
}

fn read(disk: &dyn Disk, layout: &Layout) -> Result<Option<Fence>, StoreError> {
    Ok(FENCE_FILE.read::<Content>(disk, &layout.data_dir)?.and_then(|content| content.fence))
}

fn write(disk: &dyn Disk, layout: &Layout, fence: Option<Fence>) -> Result<(), StoreError> {
    FENCE_FILE.write(disk, &layout.data_dir, &Content { fence })
}

#[derive(Debug, Serialize, Deserialize)]
struct Content {
    fence: Option<Fence>,
}

const FENCE_FILE: StateFile = StateFile { name: "walrelay.fence", magic: *b"WRFENCE\0", version: 1 };

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::store::{RealDisk, small};

    fn open_in(data_dir: &Path) -> Store {
        small::open_in(data_dir).0
    }

    const FENCE: Fence = Fence { since: PgTimestamp(1) };

    #[test]
    fn a_fence_outlives_the_process_also_where_nothing_is_held_yet() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("data");
        let store = open_in(&dir);
        assert_eq!(store.fence(), None);
        store.set_fence(Some(FENCE)).unwrap();
        store.set_fence(Some(Fence { since: PgTimestamp(9) })).unwrap();
        drop(store);
        let store = open_in(&dir);
        assert_eq!(store.fence(), Some(FENCE), "the first one stands");
        store.set_fence(None).unwrap();
        drop(store);
        assert_eq!(open_in(&dir).fence(), None);
    }

    fn fence_in(dir: &Path, fence: Option<Fence>) -> Result<FencedDirectory, StoreError> {
        fence_directory(dir, &RealDisk, fence, MustHold::Nothing)
    }

    #[test]
    fn a_directory_is_fenced_without_a_relay_and_not_behind_the_back_of_one() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("data");
        assert!(fence_in(&dir, Some(FENCE)).is_err(), "it was never made");
        assert!(is_open(&dir, &RealDisk).is_err(), "nor can anybody say who has it open");
        let store = open_in(&dir);
        let error = fence_in(&dir, Some(FENCE)).unwrap_err();
        assert!(matches!(error, StoreError::Locked { .. }), "{error}");
        assert!(is_open(&dir, &RealDisk).unwrap());
        drop(store);
        assert!(!is_open(&dir, &RealDisk).unwrap());
        let told = fence_in(&dir, Some(FENCE)).unwrap();
        assert_eq!(told, FencedDirectory { fence: Some(FENCE), holds: None });
        assert_eq!(durable_fence(&dir, &RealDisk).unwrap(), Some(FENCE));
        let again = fence_in(&dir, Some(Fence { since: PgTimestamp(5) })).unwrap();
        assert_eq!(again, told);
        assert_eq!(open_in(&dir).fence(), Some(FENCE));
        assert_eq!(fence_in(&dir, None).unwrap().fence, None);
        assert_eq!(open_in(&dir).fence(), None);
    }

    #[test]
    fn a_directory_without_wal_may_be_one_whose_disk_is_not_mounted() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        // Whose disk is not mounted, is not ours to change.
        std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).unwrap();
        for must_hold in [MustHold::Wal, MustHold::WalOrFence] {
            for fence in [Some(FENCE), None] {
                let error = fence_directory(dir, &RealDisk, fence, must_hold).unwrap_err();
                assert!(matches!(error, StoreError::NoWal { .. }), "{error}");
            }
        }
        let left: Vec<_> = RealDisk.list(dir).unwrap();
        assert!(left.is_empty(), "a refusal has left {left:?}");
        assert_eq!(std::fs::metadata(dir).unwrap().permissions().mode() & 0o777, 0o755);
        fence_in(dir, Some(FENCE)).unwrap();
        // What was set can be set again and taken away, but not where there must be WAL.
        let error = fence_directory(dir, &RealDisk, None, MustHold::Wal).unwrap_err();
        assert!(matches!(error, StoreError::NoWal { .. }), "{error}");
        for fence in [Some(FENCE), None] {
            let told = fence_directory(dir, &RealDisk, fence, MustHold::WalOrFence).unwrap();
            assert_eq!(told.fence, fence);
        }
    }
}
