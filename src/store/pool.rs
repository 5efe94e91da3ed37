//! Files of segment size that hold nothing: ready to become segments.
//!
//! Owns the spare files and the reserve. Writing into space that is allocated already, and was written before, needs no
//! journal and cannot run out of space; a segment is made ahead of time, or is an old one under a new name. A spare never
//! has a WAL name: what an old segment still holds must not be taken for WAL.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::store::control::{Layout, RESERVE_NAME, SPARE_PREFIX};
use crate::store::disk::{Disk, DiskFile, OpenMode, TEMPORARY_SUFFIX, write_all_at};
use crate::store::error::StoreError;
use crate::wal::SegmentSize;

#[derive(Default)]
pub(super) struct Pool {
    ready: Mutex<Vec<Spare>>,
    next: AtomicU64,
}

/// A spare file; open, so that using it needs no descriptor.
pub(super) struct Spare {
    pub name: String,
    pub file: Arc<dyn DiskFile>,
}

impl Pool {
    /// A name for a new spare.
    pub(super) fn new_name(&self) -> String {
        format!("{SPARE_PREFIX}{:016x}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Takes in a file that has a spare's name.
    pub(super) fn found(&self, disk: &dyn Disk, layout: &Layout, name: &str) -> Result<(), StoreError> {
        let number = name.strip_prefix(SPARE_PREFIX).and_then(|digits| u64::from_str_radix(digits, 16).ok());
        if let Some(number) = number {
            self.next.fetch_max(number.saturating_add(1), Ordering::Relaxed);
        }
        let path = layout.wal(name);
        match disk.open(&path, OpenMode::Write) {
            Ok(file) => {
                self.put(Spare { name: name.to_owned(), file });
                Ok(())
            }
            Err(error) => {
                // It would lie there unused.
                let _ = disk.unlink(&path);
                Err(StoreError::io("open", &path)(error))
            }
        }
    }

    pub(super) fn put(&self, spare: Spare) {
        self.ready.lock().push(spare);
    }

    pub(super) fn take(&self) -> Option<Spare> {
        self.ready.lock().pop()
    }

    pub(super) fn count(&self) -> usize {
        self.ready.lock().len()
    }

    /// Makes a spare; it is not ready until it is `put`.
    pub(super) fn make(
        &self,
        disk: &dyn Disk,
        layout: &Layout,
        size: SegmentSize,
        space: Space,
    ) -> Result<Spare, StoreError> {
        let name = self.new_name();
        let file = make_file(disk, &layout.wal(&name), size, space, FREE_RESERVE_BYTES)?;
        Ok(Spare { name, file })
    }

    /// Makes the reserve; of the last space there is, if need be, for without it nothing can be recovered on a full disk.
    pub(super) fn make_reserve(
        disk: &dyn Disk,
        layout: &Layout,
        size: SegmentSize,
    ) -> Result<(), StoreError> {
        let temporary = layout.wal(&format!("{RESERVE_NAME}{TEMPORARY_SUFFIX}"));
        make_file(disk, &temporary, size, Space::Written, 0)?;
        disk.rename(&temporary, &layout.wal(RESERVE_NAME)).map_err(StoreError::io("rename", &temporary))
    }
}

/// How the space of a new file is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    /// Filled with zeros: each later sync is of content alone, and short.
    Written,
    /// Allocated, which is quick; the syncs of what is written into it also record that it was. For a segment that is
    /// filled at once, by few syncs.
    Allocated,
}

impl Space {
    /// Fills a new file.
    fn fill(self, file: &dyn DiskFile, bytes: u64) -> io::Result<()> {
        if self == Self::Allocated {
            match file.allocate(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                done => return done,
            }
        }
        let zeros = vec![0; ZERO_BYTES];
        (0..bytes).step_by(ZERO_BYTES).try_for_each(|at| write_all_at(file, &zeros, at))
    }
}

/// Makes a file of which all is allocated, and syncs it, so that later syncs need not. `leave_bytes` stay free.
fn make_file(
    disk: &dyn Disk,
    path: &Path,
    size: SegmentSize,
    space: Space,
    leave_bytes: u64,
) -> Result<Arc<dyn DiskFile>, StoreError> {
    let fill = || {
        // Others, and our own state files, need what is left; and a disk that is full is not to be filled each second.
        let needed = size.bytes().saturating_add(leave_bytes);
        if path.parent().is_some_and(|dir| disk.free_bytes(dir).is_ok_and(|free| free < needed)) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let file = disk.open(path, OpenMode::CreateNew)?;
        space.fill(&*file, size.bytes())?;
        file.sync()?;
        Ok(file)
    };
    fill().map_err(|error: io::Error| {
        // Half a spare is of no use, and others may need the space.
        let _ = disk.unlink(path);
        StoreError::Io { operation: "allocate", path: path.to_path_buf(), source: error }
    })
}

/// Space that is left alone: the state files are replaced in it while there is none for segments.
pub(super) const FREE_RESERVE_BYTES: u64 = 4 << 20;

/// Zeros written at a time; divides every segment size.
const ZERO_BYTES: usize = 1 << 20;
