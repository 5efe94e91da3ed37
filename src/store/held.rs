//! Held WAL, read back to be looked at.
//!
//! Owns the open segment file of somebody who goes through what is held, in the order of the log: from memory where it is,
//! else with `pread`. Blocks. Changes nothing.

use std::sync::Arc;

use crate::store::disk::{DiskFile, OpenMode, read_full_at};
use crate::store::error::StoreError;
use crate::store::shared::Shared;
use crate::store::walk::FirstRecord;
use crate::wal::scanner::{ScanContext, Scanner};
use crate::wal::{Lsn, LsnRange, RecordVisitor, SegmentNo, TimelineId};

/// Reads what is held of the timeline that is received.
pub(super) struct HeldWal {
    shared: Arc<Shared>,
    context: ScanContext,
    file: Option<(SegmentNo, Arc<dyn DiskFile>)>,
}

/// Bytes read at a time.
const READ_BYTES: usize = 1 << 20;

impl HeldWal {
    pub(super) fn new(shared: Arc<Shared>, context: ScanContext) -> Self {
        Self { shared, context, file: None }
    }

    pub(super) fn timeline(&self) -> TimelineId {
        self.context.timeline
    }

    /// Lets go of the file.
    pub(super) fn close(&mut self) {
        self.file = None;
    }

    /// Feeds what is held up to `end`, from where the scanner is.
    pub(super) fn feed<V: RecordVisitor>(
        &mut self,
        scanner: &mut Scanner,
        end: Lsn,
        visitor: &mut V,
    ) -> Result<(), StoreError> {
        while scanner.position() < end {
            let at = scanner.position();
            let wanted = usize::try_from(end.bytes_since(at)).unwrap_or(usize::MAX).min(READ_BYTES);
            let held = self.read(at, wanted)?;
            scanner.feed(&held, visitor).map_err(|error| StoreError::Damaged {
                path: self.shared.layout.wal_dir.clone(),
                detail: error.to_string(),
            })?;
        }
        Ok(())
    }

    /// A scanner that has seen what is held up to `fed`: from the segment of `from` on, or from one further back in which a
    /// record starts before `at`.
    pub(super) fn scanner_before(&mut self, from: Lsn, fed: Lsn, at: Lsn) -> Result<Scanner, StoreError> {
        let size = self.context.segment_size;
        let oldest = self.shared.oldest().ok_or(StoreError::NotInitialized)?;
        let mut number = SegmentNo::holding(from, size);
        loop {
            let start = number.start(size).unwrap_or(oldest).max(oldest);
            let mut scanner = Scanner::at_segment_start(self.context, start);
            let mut first = FirstRecord::default();
            self.feed(&mut scanner, fed, &mut first)?;
            match number.previous() {
                Some(before) if first.0.is_none_or(|first| first > at) && start > oldest => number = before,
                _ => return Ok(scanner),
            }
        }
    }

    /// The bytes that are held from `at` on.
    pub(super) fn read(&mut self, at: Lsn, bytes: usize) -> Result<Vec<u8>, StoreError> {
        let Some(range) = LsnRange::new(at, at.advance(bytes as u64)) else { return Ok(Vec::new()) };
        let located = self.shared.tail.lock().locate(self.context.timeline, range);
        let mut held = Vec::with_capacity(bytes);
        if let Some(range) = located.in_files {
            self.read_files(range, &mut held)?;
        }
        for part in located.in_memory {
            held.extend_from_slice(&part);
        }
        Ok(held)
    }

    fn read_files(&mut self, range: LsnRange, held: &mut Vec<u8>) -> Result<(), StoreError> {
        let size = self.context.segment_size;
        let mut at = range.start();
        while at < range.end() {
            let number = SegmentNo::holding(at, size);
            let end = range.end().min(number.end(size));
            let file = self.file_of(number)?;
            let filled = held.len();
            held.resize(filled + usize::try_from(end.bytes_since(at)).unwrap_or(0), 0);
            let part = held.get_mut(filled..).unwrap_or_default();
            let path = self.shared.layout.wal_dir.clone();
            let read =
                read_full_at(&*file, part, size.offset_of(at)).map_err(StoreError::io("read", &path))?;
            if read < part.len() {
                return Err(StoreError::Damaged { path, detail: "a segment is too short".to_owned() });
            }
            at = end;
        }
        Ok(())
    }

    fn file_of(&mut self, number: SegmentNo) -> Result<Arc<dyn DiskFile>, StoreError> {
        if let Some((_, file)) = self.file.as_ref().filter(|(open, _)| *open == number) {
            return Ok(file.clone());
        }
        let name = self.shared.name_of(number)?;
        let partial = self.shared.partials.lock().get(&number).map(|segment| segment.file.clone());
        let file = match partial {
            Some(file) => file,
            None => {
                let path = self.shared.layout.complete(name, self.context.segment_size);
                self.shared.disk.open(&path, OpenMode::Read).map_err(StoreError::io("open", &path))?
            }
        };
        self.file = Some((number, file.clone()));
        Ok(file)
    }
}
