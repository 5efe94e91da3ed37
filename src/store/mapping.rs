//! Segment files mapped for reading: one mapping per segment, shared by all readers.
//!
//! Owns the list of live mappings, and the question whether a segment's file may be used again: not while a mapping or
//! any bytes cut from it are left. A complete segment is compared with its checksum once per mapping, before the first
//! byte leaves it. Nothing here touches mapped memory: checksums are computed of what is read, where a disk error is an error
//! and not a signal.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use crc32fast::Hasher;
use parking_lot::Mutex;

use crate::store::catalog::DamageKind;
use crate::store::disk::{FILE_IS_SHORT, Mapping, is_read_shortage};
use crate::store::error::ReadError;
use crate::store::shared::Shared;
use crate::wal::{SegmentName, SegmentSize};

#[derive(Default)]
pub(super) struct Mappings(Mutex<HashMap<SegmentName, Weak<MappedSegment>>>);

/// A mapped segment file.
pub(super) struct MappedSegment {
    pub name: SegmentName,
    mapping: Arc<dyn Mapping>,
    bytes: usize,
    is_verified: AtomicBool,
    /// Held while the checksum is computed, so that only one reader does.
    verification: Mutex<()>,
}

/// Bytes that are looked for at once. What was found may have left when it is sent: only so much of it.
const RESIDENT_WINDOW_BYTES: usize = 1 << 20;

/// Bytes brought in ahead of a reader.
pub(super) const COLD_WINDOW_BYTES: usize = 4 << 20;

/// Bytes read at a time while a checksum is computed.
const CHECKED_WINDOW_BYTES: usize = 1 << 20;

impl Mappings {
    /// The mapping of a segment that is held; blocks.
    pub(super) fn open(&self, shared: &Shared, name: SegmentName) -> Result<Arc<MappedSegment>, ReadError> {
        let Ok(size) = shared.segment_size() else { return Err(ReadError::Removed(name)) };
        let mut mappings = self.0.lock();
        // Under the lock, so that the segment's file cannot be used again meanwhile. This order, because a segment enters
        // the catalog before it leaves the list of those being written.
        let is_being_written = shared.is_being_written(name);
        let complete = shared.catalog.lock().get(name).cloned();
        if let Some(detail) = complete.as_ref().and_then(|complete| complete.refusal()) {
            return Err(ReadError::Suspect { name, detail: detail.to_owned() });
        }
        if let Some(mapped) = mappings.get(&name).and_then(Weak::upgrade) {
            return Ok(mapped);
        }
        mappings.retain(|_, mapped| mapped.strong_count() > 0);
        let (complete_path, partial_path) =
            (shared.layout.complete(name, size), shared.layout.partial(name, size));
        let paths: &[PathBuf] = if is_being_written {
            // It may get its final name just now, never the other way round.
            &[partial_path, complete_path]
        } else if complete.is_some() {
            &[complete_path]
        } else {
            return Err(ReadError::Removed(name));
        };
        let mut result = Err(io::ErrorKind::NotFound.into());
        for path in paths {
            result = shared.disk.map(path, size.bytes());
            if !matches!(&result, Err(error) if error.kind() == io::ErrorKind::NotFound) {
                break;
            }
        }
        let mapping = result.map_err(|error| {
            let fault = Fault::of(error);
            fault.mark(shared, name);
            fault.error(name)
        })?;
        let mapped = Arc::new(MappedSegment {
            name,
            mapping,
            bytes: usize::try_from(size.bytes()).unwrap_or(usize::MAX),
            // What is being written was verified when it came and is read back from the page cache.
            is_verified: AtomicBool::new(is_being_written),
            verification: Mutex::new(()),
        });
        mappings.insert(name, Arc::downgrade(&mapped));
        Ok(mapped)
    }

    /// Lets `remove` take a segment out of the catalog; it hears whether the file is referred to. Nobody can open the
    /// segment meanwhile.
    pub(super) fn while_closed<T>(&self, name: SegmentName, remove: impl FnOnce(bool) -> T) -> T {
        let mut mappings = self.0.lock();
        let is_mapped = mappings.get(&name).is_some_and(|mapped| mapped.strong_count() > 0);
        if !is_mapped {
            mappings.remove(&name);
        }
        remove(is_mapped)
    }

    /// Lets `replace` give a segment another file. Who has the old one mapped keeps it; nobody can open the segment
    /// meanwhile, and from then on everybody opens the new one.
    pub(super) fn while_replaced<T, E>(
        &self,
        name: SegmentName,
        replace: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let mut mappings = self.0.lock();
        let replaced = replace()?;
        mappings.remove(&name);
        Ok(replaced)
    }

    /// Does `mark` unless the segment has got another file since it was mapped: what is wrong with the old one says
    /// nothing about that.
    fn if_current<T>(&self, mapped: &MappedSegment, mark: impl FnOnce() -> T) -> Option<T> {
        let mappings = self.0.lock();
        let is_current = mappings.get(&mapped.name).is_some_and(|known| std::ptr::eq(known.as_ptr(), mapped));
        is_current.then(mark)
    }
}

impl MappedSegment {
    /// Up to where the segment is in memory without a gap, from the beginning of `range` on: so far that it need not be
    /// asked for each message, or to the range's end. `None` when the disk must be waited for.
    pub(super) fn resident_to(&self, range: Range<usize>) -> Option<usize> {
        let far = range.end.max(range.start.saturating_add(RESIDENT_WINDOW_BYTES)).min(self.bytes);
        [far, range.end].into_iter().find(|end| self.mapping.is_resident(range.start..*end))
    }

    /// The bytes of a range that is in memory.
    pub(super) fn slice(self: &Arc<Self>, range: Range<usize>) -> Option<Bytes> {
        self.is_verified.load(Ordering::Acquire).then(|| self.mapping.slice(range, self.clone())).flatten()
    }

    /// Brings in a range and some more behind it, after the checksum of the segment was compared; blocks. Returns how far.
    pub(super) fn load(&self, shared: &Shared, range: Range<usize>) -> Result<usize, ReadError> {
        self.verify(shared)?;
        let end = range.end.max(range.start.saturating_add(COLD_WINDOW_BYTES)).min(self.bytes);
        // What the checksum was just computed of is there; asking is cheaper than bringing it in again.
        if !self.mapping.is_resident(range.start..end) {
            self.mapping.populate(range.start..end).map_err(|error| self.tell(shared, Fault::of(error)))?;
        }
        Ok(end)
    }

    /// A copy of the range, after the checksum of the segment was compared; blocks.
    pub(super) fn copy(&self, shared: &Shared, range: Range<usize>) -> Result<Bytes, ReadError> {
        self.verify(shared)?;
        self.mapping.copy(range).map_err(|error| self.tell(shared, Fault::of(error)))
    }

    fn verify(&self, shared: &Shared) -> Result<(), ReadError> {
        if self.is_verified.load(Ordering::Acquire) {
            return Ok(());
        }
        let _turn = self.verification.lock();
        if self.is_verified.load(Ordering::Acquire) {
            return Ok(());
        }
        let name = self.name;
        let segment = shared.catalog.lock().get(name).cloned().ok_or(ReadError::Removed(name))?;
        if let Some(detail) = segment.refusal() {
            return Err(ReadError::Suspect { name, detail: detail.to_owned() });
        }
        let mut hasher = Hasher::new();
        // Read, and not touched: what was brought in may have left again, and the disk may have failed meanwhile.
        for start in (0..self.bytes).step_by(CHECKED_WINDOW_BYTES) {
            let window = start..(start + CHECKED_WINDOW_BYTES).min(self.bytes);
            let read = self.mapping.copy(window).map_err(|error| self.tell(shared, Fault::of(error)))?;
            hasher.update(&read);
        }
        let found = hasher.finalize();
        if let Some(expected) = segment.crc.filter(|expected| *expected != found) {
            return Err(self.tell(shared, Fault::checksum(found, expected)));
        }
        self.is_verified.store(true, Ordering::Release);
        if segment.damage.is_some() {
            self.note_sound(shared);
        }
        Ok(())
    }

    /// The file was read, and is what was written.
    pub(super) fn note_sound(&self, shared: &Shared) {
        shared.mappings.if_current(self, || shared.catalog.lock().mark_sound(self.name));
    }

    pub(super) fn tell(&self, shared: &Shared, fault: Fault) -> ReadError {
        shared.mappings.if_current(self, || fault.mark(shared, self.name));
        fault.error(self.name)
    }
}

/// What keeps a segment from being read.
pub(super) enum Fault {
    /// Memory or descriptors are short: that says nothing about the segment.
    Shortage(io::Error),
    /// The disk does not give it back.
    Unreadable(io::Error),
    /// It is not what was written.
    Wrong(String),
}

impl Fault {
    pub(super) fn of(error: io::Error) -> Self {
        match error.kind() {
            // Held according to the catalog: somebody took it away, or cut it off.
            io::ErrorKind::NotFound => Self::Wrong(FILE_IS_MISSING.to_owned()),
            io::ErrorKind::UnexpectedEof => Self::Wrong(error.to_string()),
            _ if is_read_shortage(&error) => Self::Shortage(error),
            _ => Self::Unreadable(error),
        }
    }

    pub(super) fn checksum(found: u32, expected: u32) -> Self {
        Self::Wrong(format!("its checksum is {found:08x}, expected {expected:08x}"))
    }

    pub(super) fn too_short() -> Self {
        Self::of(io::Error::new(io::ErrorKind::UnexpectedEof, FILE_IS_SHORT))
    }

    /// Marks the segment and tells the observer.
    fn mark(&self, shared: &Shared, name: SegmentName) {
        let observer = &shared.health.observer;
        match self {
            Self::Shortage(_) => {}
            Self::Unreadable(error) => {
                shared.catalog.lock().mark_damaged(name, DamageKind::Unreadable, &error.to_string());
                observer.unreadable(name, error);
            }
            Self::Wrong(detail) => {
                shared.catalog.lock().mark_damaged(name, DamageKind::Wrong, detail);
                observer.suspect(name, detail);
            }
        }
    }

    fn error(self, name: SegmentName) -> ReadError {
        match self {
            Self::Shortage(source) | Self::Unreadable(source) => ReadError::Io { name, source },
            Self::Wrong(detail) => ReadError::Suspect { name, detail },
        }
    }
}

/// What is told of a segment whose file is not there.
pub(super) const FILE_IS_MISSING: &str = "its file is missing";

/// Offsets in a segment as the machine counts them.
pub(super) fn offset(position: crate::wal::Lsn, size: SegmentSize) -> usize {
    usize::try_from(size.offset_of(position)).unwrap_or(usize::MAX)
}
