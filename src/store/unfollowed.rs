//! Files of timelines that are not followed.
//!
//! Owns what becomes of WAL files of a timeline that the control file does not know: one above it, or beside it, that was never
//! gone over to. A switch that did not come to its end leaves a copy of what is held, which says nothing new and is removed.
//! Anything else is left by no crash and may be somebody's only copy: it is set aside, and reported.

use std::path::{Path, PathBuf};

use crate::store::disk::{OpenMode, read_full_at};
use crate::store::error::StoreError;
use crate::store::inventory::Inventory;
use crate::store::partials::READ_BYTES;
use crate::store::recovery::Recovery;
use crate::wal::{SegmentName, SegmentNo};

impl Recovery<'_> {
    /// Removes or sets aside what is not followed. The caller makes it durable.
    pub(super) fn settle_unfollowed(&mut self, inventory: &Inventory) -> Result<(), StoreError> {
        let (layout, size) = (self.layout, self.size);
        let why = "its timeline is not followed";
        let unfollowed: Vec<_> =
            inventory.partial.keys().filter(|name| self.is_unfollowed(**name)).copied().collect();
        for name in unfollowed {
            let path = layout.partial(name, size);
            match self.held_path(name.number) {
                Some(held) if self.is_copy(&path, &held)? => self.unlink(&path)?,
                _ => self.set_aside(&path, why)?,
            }
        }
        // Complete ones of older timelines that are not on the line were there before a store began anew.
        let is_above = |name: &&SegmentName| name.timeline > self.control.timeline;
        let above: Vec<_> = inventory.complete.keys().filter(is_above).copied().collect();
        for name in above {
            self.set_aside(&layout.complete(name, size), why)?;
            self.others.remove(&name);
        }
        Ok(())
    }

    fn is_unfollowed(&self, name: SegmentName) -> bool {
        let is_ancestor = self.control.ancestors.iter().any(|ancestor| ancestor.timeline == name.timeline);
        name.timeline != self.control.timeline && !is_ancestor
    }

    /// The file that holds the segment on the line.
    fn held_path(&self, number: SegmentNo) -> Option<PathBuf> {
        if self.partial.contains_key(&number) {
            return Some(self.walk().partial_path(number));
        }
        self.complete.contains_key(&number).then(|| self.walk().complete_path(number))
    }

    /// Whether a file has nothing but the first bytes of another one, and zeros behind them.
    fn is_copy(&self, path: &Path, held: &Path) -> Result<bool, StoreError> {
        let open = |path: &Path| self.disk.open(path, OpenMode::Read).map_err(StoreError::io("open", path));
        let (file, other) = (open(path)?, open(held)?);
        let (mut bytes, mut expected) = (vec![0; READ_BYTES], vec![0; READ_BYTES]);
        let mut is_same = true;
        for at in (0..self.size.bytes()).step_by(READ_BYTES) {
            let read = read_full_at(&*file, &mut bytes, at).map_err(StoreError::io("read", path))?;
            let held_bytes =
                read_full_at(&*other, &mut expected, at).map_err(StoreError::io("read", held))?;
            let bytes = bytes.get(..read).unwrap_or_default();
            let expected = expected.get(..held_bytes).unwrap_or_default();
            let same =
                if is_same { bytes.iter().zip(expected).take_while(|(a, b)| a == b).count() } else { 0 };
            is_same = same == READ_BYTES;
            if bytes.iter().skip(same).any(|byte| *byte != 0) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
