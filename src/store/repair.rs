//! Segments that are damaged, and how they become whole again.
//!
//! Owns what is done with the bytes that somebody brings for a damaged segment: they go to a temporary file, and only if
//! they are exactly what was written (the checksum says so) that file takes the place of the damaged one. A position that
//! was reported stays reported: this brings back what is behind it. Must never put back what retention has removed, never
//! change a file that is mapped, and never take the space that arriving WAL needs. What fails here fails for this segment
//! only, but for the sync of the directory, whose failure says nothing is known of any name in it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crc32fast::Hasher;

use crate::store::disk::{DiskFile, OpenMode, TEMPORARY_SUFFIX, write_all_at};
use crate::store::error::StoreError;
use crate::store::pool::FREE_RESERVE_BYTES;
use crate::store::shared::Shared;
use crate::store::{Store, StoreHandle};
use crate::wal::{SegmentName, SegmentSize};

/// A complete segment whose file is not what was written, or cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedSegment {
    /// The segment.
    pub name: SegmentName,
    /// What was found.
    pub detail: String,
    /// Why it could not be repaired yet, if that was tried.
    pub repair_error: Option<String>,
}

impl Store {
    /// The segments that are known to be damaged, oldest first.
    pub fn damaged(&self) -> Vec<DamagedSegment> {
        self.shared.damaged()
    }

    /// Begins to replace the file of a damaged segment. Blocks.
    pub fn begin_repair(&self, name: SegmentName) -> Result<SegmentRepair, StoreError> {
        SegmentRepair::begin(self.shared.clone(), Some(self.handle.clone()), name)
    }

    /// Remembers why a segment could not be repaired, for the status; whether that is news.
    pub fn note_repair_error(&self, name: SegmentName, error: &str) -> bool {
        self.shared.catalog.lock().note_repair_error(name, error)
    }
}

impl Shared {
    pub(super) fn damaged(&self) -> Vec<DamagedSegment> {
        let catalog = self.catalog.lock();
        let shown = catalog.damaged().map(|(name, damage)| DamagedSegment {
            name,
            detail: damage.detail.clone(),
            repair_error: damage.repair_error.clone(),
        });
        shown.collect()
    }
}

/// The content of a damaged segment on its way back; dropped before it is finished, it leaves nothing. All calls block.
pub struct SegmentRepair {
    shared: Arc<Shared>,
    /// Of the directory's lock.
    _handle: Option<Arc<StoreHandle>>,
    name: SegmentName,
    size: SegmentSize,
    /// CRC-32 of what was written.
    expected: u32,
    /// `None` when the file has its name, or could not be made.
    temporary: Option<PathBuf>,
    file: Option<Arc<dyn DiskFile>>,
    hasher: Hasher,
    written: u64,
}

impl std::fmt::Debug for SegmentRepair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SegmentRepair")
            .field("name", &self.name)
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}

impl SegmentRepair {
    pub(super) fn begin(
        shared: Arc<Shared>,
        handle: Option<Arc<StoreHandle>>,
        name: SegmentName,
    ) -> Result<Self, StoreError> {
        shared.health.check()?;
        let size = shared.segment_size()?;
        let expected = shared.damaged_checksum(name)?;
        if shared.is_repairing.swap(true, Ordering::AcqRel) {
            return Err(StoreError::RepairRunning);
        }
        let mut repair = Self {
            shared,
            _handle: handle,
            name,
            size,
            expected,
            temporary: None,
            file: None,
            hasher: Hasher::new(),
            written: 0,
        };
        repair.make_file()?;
        Ok(repair)
    }

    fn make_file(&mut self) -> Result<(), StoreError> {
        let Shared { disk, layout, .. } = &*self.shared;
        let path = layout.wal(&format!("{REPAIR_PREFIX}{TEMPORARY_SUFFIX}"));
        // As a spare: what is left is for WAL that arrives, and for state files.
        let needed = self.size.bytes().saturating_add(FREE_RESERVE_BYTES);
        if disk.free_bytes(&layout.wal_dir).is_ok_and(|free| free < needed) {
            return Err(StoreError::io("allocate", &path)(io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        match disk.unlink(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::io("remove", &path)(error));
            }
            _ => {}
        }
        let file = disk.open(&path, OpenMode::CreateNew).map_err(StoreError::io("create", &path))?;
        self.temporary = Some(path.clone());
        match file.allocate(self.size.bytes()) {
            Err(error) if error.kind() != io::ErrorKind::Unsupported => {
                return Err(StoreError::io("allocate", &path)(error));
            }
            _ => {}
        }
        self.file = Some(file);
        Ok(())
    }

    /// The segment.
    pub fn name(&self) -> SegmentName {
        self.name
    }

    /// Takes the next bytes; the first are the segment's first.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.shared.health.check()?;
        let end = self.written.saturating_add(bytes.len() as u64);
        if end > self.size.bytes() {
            return Err(self.wrong_length(end));
        }
        let (Some(file), Some(path)) = (&self.file, &self.temporary) else {
            return Err(StoreError::NothingToRepair(self.name));
        };
        write_all_at(&**file, bytes, self.written).map_err(StoreError::io("write", path))?;
        self.hasher.update(bytes);
        self.written = end;
        Ok(())
    }

    /// Gives the segment the bytes that were written, if they are what it held; durable on return.
    pub fn finish(mut self) -> Result<(), StoreError> {
        let found = self.hasher.clone().finalize();
        if self.written != self.size.bytes() {
            return Err(self.wrong_length(self.written));
        }
        if found != self.expected {
            return Err(StoreError::OtherContent { name: self.name, expected: self.expected, found });
        }
        let (Some(file), Some(path)) = (self.file.take(), self.temporary.clone()) else {
            return Err(StoreError::NothingToRepair(self.name));
        };
        file.sync().map_err(StoreError::io("sync", &path))?;
        let (shared, name) = (self.shared.clone(), self.name);
        let target = shared.layout.complete(name, self.size);
        {
            // The segment does not go meanwhile, and its file gets no third name before the second is durable.
            let _turn = shared.retention.lock();
            shared.health.check()?;
            shared.mappings.while_replaced(name, || {
                if shared.damaged_checksum(name)? != self.expected {
                    return Err(StoreError::NothingToRepair(name));
                }
                shared.disk.rename(&path, &target).map_err(StoreError::io("rename", &path))?;
                self.temporary = None;
                shared.catalog.lock().mark_sound(name);
                Ok(())
            })?;
            shared.sync_wal_dir()?;
        }
        shared.health.tell(|observer| observer.repaired(name));
        Ok(())
    }

    fn wrong_length(&self, got: u64) -> StoreError {
        StoreError::RepairLength { name: self.name, expected: self.size.bytes(), got }
    }
}

impl Drop for SegmentRepair {
    fn drop(&mut self) {
        if let Some(path) = self.temporary.take() {
            // If that fails, the next repair or the next start removes it.
            let _ = self.shared.disk.unlink(&path);
        }
        self.shared.is_repairing.store(false, Ordering::Release);
    }
}

impl Shared {
    /// The checksum of a segment that is held and damaged.
    fn damaged_checksum(&self, name: SegmentName) -> Result<u32, StoreError> {
        let segment = self.catalog.lock().get(name).cloned().filter(|segment| segment.damage.is_some());
        let segment = segment.ok_or(StoreError::NothingToRepair(name))?;
        segment.crc.ok_or(StoreError::ChecksumUnknown(name))
    }
}

/// Name of the file that is being filled; there is never more than one.
const REPAIR_PREFIX: &str = "walrelay.repair";
