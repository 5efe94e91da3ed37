//! Holes among the complete segments: files that somebody took away while no process had the directory.
//!
//! Owns what becomes of what is before a hole. Where the index knows what was in every missing segment they can be fetched
//! again, so the older ones stay; else the older ones are set aside, for they cannot be served as one piece with the rest.
//! Recovery itself works with the newest run alone, which has no hole.

use std::collections::BTreeMap;

use crate::store::catalog::CompleteSegment;
use crate::store::error::StoreError;
use crate::store::mapping::FILE_IS_MISSING;
use crate::store::recovery::Recovery;
use crate::wal::{SegmentName, SegmentNo};

impl Recovery<'_> {
    /// Goes on with the newest segments without a hole.
    pub(super) fn keep_newest_run(&mut self) -> Result<(), StoreError> {
        let Some(mut first) = self.complete.last_key_value().map(|(number, _)| *number) else {
            return Ok(());
        };
        while let Some(before) = first.previous().filter(|before| self.complete.contains_key(before)) {
            first = before;
        }
        self.begin = first;
        let newest_run = self.complete.split_off(&first);
        self.older = std::mem::replace(&mut self.complete, newest_run);
        self.keep_what_can_be_joined(first)?;
        let newest = self.complete.last_key_value().map(|(number, _)| *number);
        let stale: Vec<_> = self.partial.keys().filter(|number| Some(**number) < newest).copied().collect();
        for number in stale {
            self.set_aside(&self.walk().partial_path(number), "newer segments are complete")?;
            self.partial.remove(&number);
        }
        Ok(())
    }

    /// Of the older segments, those stay between which and the newest run every missing one is known.
    fn keep_what_can_be_joined(&mut self, first: SegmentNo) -> Result<(), StoreError> {
        let Some(oldest) = self.older.first_key_value().map(|(number, _)| *number) else { return Ok(()) };
        let (mut kept_from, mut number) = (first, first);
        while let Some(before) = number.previous().filter(|before| *before >= oldest) {
            number = before;
            if self.older.contains_key(&number) {
                kept_from = number;
            } else if !self.index.contains_key(&self.walk().name(number)) {
                break;
            }
        }
        let kept = self.older.split_off(&kept_from);
        self.detach_older()?;
        self.older = kept;
        let missing = self.missing().len();
        if missing > 0 {
            self.notes.push(format!("{missing} complete segments are missing from \"wal\""));
        }
        Ok(())
    }

    /// Sets the older segments aside. To be done before the newest run goes: what is left must never end in a hole.
    pub(super) fn detach_older(&mut self) -> Result<(), StoreError> {
        for (number, _) in std::mem::take(&mut self.older) {
            let why = "segments between it and the newest are missing";
            self.set_aside(&self.walk().complete_path(number), why)?;
        }
        Ok(())
    }

    /// The segments that are missing between the older ones and the newest run.
    fn missing(&self) -> Vec<SegmentNo> {
        let Some((oldest, _)) = self.older.first_key_value() else { return Vec::new() };
        let between = (oldest.0..self.begin.0).map(SegmentNo);
        between.filter(|number| !self.older.contains_key(number)).collect()
    }

    /// Once all is recovered, the older segments belong to the others again. Returns those that are missing.
    pub(super) fn join_older(&mut self) -> BTreeMap<SegmentName, CompleteSegment> {
        let missing = self.missing();
        let mut older = std::mem::take(&mut self.older);
        self.complete.append(&mut older);
        let mut damaged = BTreeMap::new();
        for number in missing {
            let name = self.walk().name(number);
            self.damaged.push((name, FILE_IS_MISSING.to_owned()));
            let crc = self.index.get(&name).copied();
            damaged.insert(name, CompleteSegment::wrong(crc, FILE_IS_MISSING.to_owned()));
        }
        damaged
    }
}
