//! The segments index `walrelay.segments`: the checksum of every complete segment.
//!
//! Owns the file. An entry is appended and synced before its segment gets its final name; a file without an entry is not
//! trusted before it is read. Entries of segments that are gone stay until the file is rewritten. A torn entry at the
//! end is an append that did not finish.
//!
//! ```text
//! entry, 32 bytes, little-endian:
//! ┌──────────┬──────────┬────────────┬──────────────┬─────────────┬────────┬──────────────┐
//! │ "WSEG" 4 │ version 4│ timeline 4 │ CRC-32 seg 4 │ number    8 │ size 4 │ CRC-32 of 28 │
//! └──────────┴──────────┴────────────┴──────────────┴─────────────┴────────┴──────────────┘
//! ```

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::store::disk::{Disk, DiskFile, OpenMode, read_small, replace_durably, write_all_at};
use crate::store::error::StoreError;
use crate::wal::{SegmentName, SegmentNo, SegmentSize, TimelineId};

pub(super) struct Index {
    size: SegmentSize,
    file: Arc<dyn DiskFile>,
    /// Where the next entry goes.
    end: u64,
}

impl Index {
    /// Reads the index, which need not exist, and rewrites it with what is in it.
    pub(super) fn read(
        disk: &dyn Disk,
        dir: &Path,
        size: SegmentSize,
    ) -> Result<BTreeMap<SegmentName, u32>, StoreError> {
        let path = dir.join(INDEX_NAME);
        let content = read_small(disk, &path, INDEX_BYTES_MAX).map_err(StoreError::io("read", &path))?;
        let content = content.unwrap_or_default();
        let mut entries = BTreeMap::new();
        // A damaged entry costs a look at its segment, nothing more.
        for entry in content.as_chunks::<ENTRY_BYTES>().0.iter().filter_map(|entry| decode(entry, size)) {
            entries.insert(entry.0, entry.1);
        }
        Ok(entries)
    }

    /// Replaces the index by one with these entries, and opens it.
    pub(super) fn rewrite(
        disk: &dyn Disk,
        dir: &Path,
        size: SegmentSize,
        entries: &BTreeMap<SegmentName, u32>,
    ) -> Result<Self, StoreError> {
        let path = dir.join(INDEX_NAME);
        let content: Vec<u8> = entries.iter().flat_map(|(name, crc)| encode(*name, *crc, size)).collect();
        replace_durably(disk, dir, INDEX_NAME, &content).map_err(StoreError::io("write", &path))?;
        Self::open(disk, dir, size)
    }

    /// Opens the index as it is.
    pub(super) fn open(disk: &dyn Disk, dir: &Path, size: SegmentSize) -> Result<Self, StoreError> {
        let path = dir.join(INDEX_NAME);
        let file = disk.open(&path, OpenMode::Write).map_err(StoreError::io("open", &path))?;
        let bytes = file.bytes().map_err(StoreError::io("read", &path))?;
        Ok(Self { size, file, end: bytes - bytes % ENTRY_BYTES as u64 })
    }

    /// Entries in the file.
    pub(super) fn entries(&self) -> u64 {
        self.end / ENTRY_BYTES as u64
    }

    /// Writes an entry behind the last; not durable before `sync`. After an error the place is the same.
    pub(super) fn write(&mut self, name: SegmentName, crc: u32) -> io::Result<()> {
        write_all_at(&*self.file, &encode(name, crc, self.size), self.end)?;
        self.end += ENTRY_BYTES as u64;
        Ok(())
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

fn encode(name: SegmentName, crc: u32, size: SegmentSize) -> [u8; ENTRY_BYTES] {
    let size = u32::try_from(size.bytes()).unwrap_or(0);
    let mut entry = Vec::with_capacity(ENTRY_BYTES);
    entry.extend_from_slice(MAGIC);
    for word in [VERSION, name.timeline.get(), crc] {
        entry.extend_from_slice(&word.to_le_bytes());
    }
    entry.extend_from_slice(&name.number.0.to_le_bytes());
    entry.extend_from_slice(&size.to_le_bytes());
    entry.extend_from_slice(&crc32fast::hash(&entry).to_le_bytes());
    entry.try_into().unwrap_or([0; ENTRY_BYTES])
}

fn decode(entry: &[u8; ENTRY_BYTES], size: SegmentSize) -> Option<(SegmentName, u32)> {
    let (checked, crc) = entry.split_last_chunk::<4>()?;
    if crc32fast::hash(checked) != u32::from_le_bytes(*crc) || !checked.starts_with(MAGIC) {
        return None;
    }
    let word = |at: usize| checked.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let number = checked.get(16..24)?.try_into().ok().map(u64::from_le_bytes)?;
    if word(4)? != VERSION || u64::from(word(24)?) != size.bytes() {
        return None;
    }
    Some((SegmentName { timeline: TimelineId::new(word(8)?)?, number: SegmentNo(number) }, word(12)?))
}

pub(super) const INDEX_NAME: &str = "walrelay.segments";
const MAGIC: &[u8; 4] = b"WSEG";
const VERSION: u32 = 1;
const ENTRY_BYTES: usize = 32;

/// Longest index that is read: two million segments.
const INDEX_BYTES_MAX: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::disk::RealDisk;

    fn name(number: u64) -> SegmentName {
        SegmentName { timeline: TimelineId::FIRST, number: SegmentNo(number) }
    }

    #[test]
    fn entries_survive_and_a_torn_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let size = SegmentSize::DEFAULT;
        let start = BTreeMap::from([(name(1), 11)]);
        let mut index = Index::rewrite(&RealDisk, dir.path(), size, &start).unwrap();
        index.write(name(2), 22).unwrap();
        index.write(name(3), 33).unwrap();
        index.sync().unwrap();
        let file = RealDisk.open(&dir.path().join(INDEX_NAME), OpenMode::Write).unwrap();
        write_all_at(&*file, b"WSEG torn", 96).unwrap();
        write_all_at(&*file, b"x", 40).unwrap();
        let found = Index::read(&RealDisk, dir.path(), size).unwrap();
        assert_eq!(found, BTreeMap::from([(name(1), 11), (name(3), 33)]));
        let index = Index::open(&RealDisk, dir.path(), size).unwrap();
        assert_eq!(index.entries(), 3);
    }

    #[test]
    fn entries_for_another_segment_size_mean_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let start = BTreeMap::from([(name(1), 11)]);
        Index::rewrite(&RealDisk, dir.path(), SegmentSize::DEFAULT, &start).unwrap();
        let other = SegmentSize::new(1 << 20).unwrap();
        assert!(Index::read(&RealDisk, dir.path(), other).unwrap().is_empty());
    }
}
