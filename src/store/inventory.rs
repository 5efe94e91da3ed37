//! What lies in the data directory.
//!
//! Owns the list of files by kind, as found on start, and the removal of what was being prepared when the process ended.
//! Takes nothing for WAL by its content, and removes nothing that has a WAL name.

use std::collections::BTreeMap;

use crate::store::control::{Layout, RESERVE_NAME, SPARE_PREFIX};
use crate::store::disk::{Disk, TEMPORARY_SUFFIX};
use crate::store::error::StoreError;
use crate::wal::segment::SegmentFile;
use crate::wal::{Lineage, SegmentName, SegmentNo, SegmentSize};

/// The files in `wal/`, with their lengths.
#[derive(Default)]
pub(super) struct Inventory {
    pub complete: BTreeMap<SegmentName, u64>,
    pub partial: BTreeMap<SegmentName, u64>,
    pub spares: BTreeMap<String, u64>,
    pub reserve: Option<u64>,
}

impl Inventory {
    pub(super) fn take(disk: &dyn Disk, layout: &Layout, size: SegmentSize) -> Result<Self, StoreError> {
        let mut inventory = Self::default();
        for entry in disk.list(&layout.wal_dir).map_err(StoreError::io("list", &layout.wal_dir))? {
            match SegmentName::parse(&entry.name, size) {
                Some((name, SegmentFile::Complete)) => {
                    inventory.complete.insert(name, entry.bytes);
                }
                Some((name, SegmentFile::Partial)) => {
                    inventory.partial.insert(name, entry.bytes);
                }
                None if entry.name == RESERVE_NAME => inventory.reserve = Some(entry.bytes),
                None if entry.name.starts_with(SPARE_PREFIX) => {
                    inventory.spares.insert(entry.name, entry.bytes);
                }
                // Histories, and what was set aside.
                None => {}
            }
        }
        Ok(inventory)
    }

    pub(super) fn complete_on(&self, lineage: &Lineage) -> BTreeMap<SegmentNo, u64> {
        on(&self.complete, lineage)
    }

    pub(super) fn partial_on(&self, lineage: &Lineage) -> BTreeMap<SegmentNo, u64> {
        on(&self.partial, lineage)
    }
}

fn on(all: &BTreeMap<SegmentName, u64>, lineage: &Lineage) -> BTreeMap<SegmentNo, u64> {
    let on_line = all.iter().filter(|(name, _)| lineage.contains(**name));
    on_line.map(|(name, bytes)| (name.number, *bytes)).collect()
}

/// Whether there is anything that looks like WAL, of whatever segment size.
pub(super) fn has_wal(disk: &dyn Disk, layout: &Layout) -> Result<bool, StoreError> {
    let entries = disk.list(&layout.wal_dir).map_err(StoreError::io("list", &layout.wal_dir))?;
    let looks_like_wal = |name: &str| {
        let digits = name.strip_suffix(crate::wal::segment::PARTIAL_SUFFIX).unwrap_or(name);
        digits.len() == 24 && digits.bytes().all(|b| b.is_ascii_hexdigit())
    };
    Ok(entries.iter().any(|entry| looks_like_wal(&entry.name)))
}

/// Whether it is a name that we give to what is being prepared; other people's files are left alone.
fn is_temporary(name: &str) -> bool {
    let Some(target) = name.strip_suffix(TEMPORARY_SUFFIX) else { return false };
    let is_history = target
        .strip_suffix(HISTORY_SUFFIX)
        .is_some_and(|digits| digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_hexdigit()));
    is_history || target.starts_with(OWN_PREFIX)
}

/// Beginning of the names of all files that are ours and hold no WAL.
const OWN_PREFIX: &str = "walrelay.";

/// Suffix of history files.
const HISTORY_SUFFIX: &str = ".history";

/// Removes files that were being prepared.
pub(super) fn remove_temporaries(disk: &dyn Disk, layout: &Layout) -> Result<(), StoreError> {
    for dir in [&layout.data_dir, &layout.wal_dir] {
        for entry in disk.list(dir).map_err(StoreError::io("list", dir))? {
            if is_temporary(&entry.name) {
                let path = dir.join(&entry.name);
                disk.unlink(&path).map_err(StoreError::io("remove", &path))?;
            }
        }
    }
    Ok(())
}
