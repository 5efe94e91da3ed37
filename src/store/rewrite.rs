//! The part of recovery that changes WAL files.
//!
//! Owns how a segment that was being written is copied to a new file before anything in it counts, what becomes of files
//! beyond the end, and how files are set aside. Decides nothing about where the end is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::store::control::RESERVE_NAME;
use crate::store::disk::{DiskFile, OpenMode, TEMPORARY_SUFFIX, read_full_at, sync_dir, write_all_at};
use crate::store::error::StoreError;
use crate::store::partials::{PartialSegment, READ_BYTES};
use crate::store::recovery::Recovery;
use crate::wal::{Lsn, SegmentNo, SegmentSize};

impl Recovery<'_> {
    /// Copies every segment that was being written, up to the end of its valid WAL.
    pub(super) fn rewrite_partials(
        &mut self,
        end: Lsn,
    ) -> Result<BTreeMap<SegmentNo, Arc<PartialSegment>>, StoreError> {
        let mut rewritten = BTreeMap::new();
        let first = match self.complete.last_key_value() {
            Some((newest, _)) => newest.next(),
            None => self.begin,
        };
        let numbers = (first.0..).map(SegmentNo).take_while(|number| self.partial.contains_key(number));
        for number in numbers.collect::<Vec<_>>() {
            let keep =
                number.start(self.size).map_or(0, |start| end.bytes_since(start)).min(self.size.bytes());
            if keep == 0 {
                break;
            }
            let path = self.walk().partial_path(number);
            #[cfg(test)]
            if self.mutant == crate::store::simulation::Mutant::NoRewrite {
                let file = self.disk.open(&path, OpenMode::Write).map_err(StoreError::io("open", &path))?;
                file.sync().map_err(StoreError::io("sync", &path))?;
                rewritten.insert(number, Arc::new(PartialSegment::found(file)));
                continue;
            }
            let file = self.rewrite(&path, keep, &path)?;
            rewritten.insert(number, Arc::new(PartialSegment::found(file)));
        }
        self.partial.retain(|number, _| !rewritten.contains_key(number));
        Ok(rewritten)
    }

    /// Gives `target` the first `keep` bytes of `source`, and zeros behind them, in a new file that is durable before it
    /// gets the name.
    pub(super) fn rewrite(
        &mut self,
        source: &Path,
        keep: u64,
        target: &Path,
    ) -> Result<Arc<dyn DiskFile>, StoreError> {
        let (path, file) = self.fresh_file()?;
        let from = self.disk.open(source, OpenMode::Read).map_err(StoreError::io("open", source))?;
        copy_head((&*from, source), keep, (&*file, &path), self.size)?;
        self.disk.rename(&path, target).map_err(StoreError::io("rename", &path))?;
        // Also gives back the space of the file that lost its name, which the next one may need.
        self.sync_dir()?;
        Ok(file)
    }

    /// A file to write into: the reserve, so that a full disk does not matter.
    fn fresh_file(&mut self) -> Result<(PathBuf, Arc<dyn DiskFile>), StoreError> {
        let (path, mode) = if std::mem::take(&mut self.has_reserve) {
            (self.layout.wal(RESERVE_NAME), OpenMode::Write)
        } else if let Some(spare) = self.pool.take() {
            return Ok((self.layout.wal(&spare.name), spare.file));
        } else {
            (self.layout.wal(&format!("walrelay.rewrite{TEMPORARY_SUFFIX}")), OpenMode::CreateNew)
        };
        let file = self.disk.open(&path, mode).map_err(StoreError::io("open", &path))?;
        Ok((path, file))
    }

    /// What lies beyond the end was never finished, and is free to be used again.
    pub(super) fn discard_beyond(&mut self, end: Lsn) -> Result<(), StoreError> {
        // Where things were lost by other causes than a crash, nothing is removed.
        let is_crash = self.notes.is_empty();
        // Behind the one that was rewritten: its bytes may survive a crash in which those before them do not.
        let mut follows = SegmentNo::ending_at(end, self.size).next();
        for (number, bytes) in std::mem::take(&mut self.partial) {
            let path = self.walk().partial_path(number);
            if !is_crash {
                self.set_aside(&path, "it is beyond the end of valid WAL")?;
                continue;
            }
            if number == follows {
                follows = number.next();
            } else if self.walk().scan_alone(number, &path)?.has_records {
                // Not left by a crash: the segment before it was there when this one was begun.
                self.set_aside(&path, "segments between it and the end of valid WAL are missing")?;
                continue;
            }
            if bytes == self.size.bytes() && self.pool.count() < self.spares_max {
                let spare = self.pool.new_name();
                self.disk.rename(&path, &self.layout.wal(&spare)).map_err(StoreError::io("rename", &path))?;
                self.pool.found(self.disk, self.layout, &spare)?;
            } else {
                self.unlink(&path)?;
            }
        }
        Ok(())
    }

    pub(super) fn set_aside(&mut self, path: &Path, why: &str) -> Result<(), StoreError> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let candidates = (0..).map(|count: u32| match count {
            0 => format!("{name}{DETACHED_SUFFIX}"),
            _ => format!("{name}{DETACHED_SUFFIX}.{count}"),
        });
        let target = candidates.into_iter().find(|target| !self.names.contains(target)).unwrap_or_default();
        self.disk.rename(path, &self.layout.wal(&target)).map_err(StoreError::io("rename", path))?;
        self.notes.push(format!("set WAL file \"{name}\" aside as \"{target}\": {why}"));
        self.names.insert(target);
        Ok(())
    }

    pub(super) fn unlink(&self, path: &Path) -> Result<(), StoreError> {
        self.disk.unlink(path).map_err(StoreError::io("remove", path))
    }

    pub(super) fn sync_dir(&self) -> Result<(), StoreError> {
        let dir = &self.layout.wal_dir;
        sync_dir(self.disk, dir).map_err(StoreError::io("sync directory", dir))
    }
}

/// Gives a file of segment size the first `keep` bytes of another, and zeros behind them; durable on return.
pub(super) fn copy_head(
    (from, source): (&dyn DiskFile, &Path),
    keep: u64,
    (to, target): (&dyn DiskFile, &Path),
    size: SegmentSize,
) -> Result<(), StoreError> {
    let mut buffer = vec![0; READ_BYTES];
    let mut at = 0;
    while at < size.bytes() {
        let wanted = usize::try_from(keep.saturating_sub(at)).unwrap_or(READ_BYTES).min(READ_BYTES);
        let part = buffer.get_mut(..wanted).unwrap_or_default();
        if read_full_at(from, part, at).map_err(StoreError::io("read", source))? < wanted {
            let detail = "it became shorter".to_owned();
            return Err(StoreError::Damaged { path: source.to_path_buf(), detail });
        }
        // Behind the end there are zeros.
        buffer.get_mut(wanted..).unwrap_or_default().fill(0);
        write_all_at(to, &buffer, at).map_err(StoreError::io("write", target))?;
        at += READ_BYTES as u64;
    }
    to.sync().map_err(StoreError::io("sync", target))
}

/// Suffix of files that recovery sets aside.
pub(super) const DETACHED_SUFFIX: &str = ".detached";
