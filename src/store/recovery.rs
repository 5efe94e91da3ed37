//! From the files as a crash, a person or a failing disk left them to a store that can be trusted.
//!
//! Owns the order of recovery: what is complete, how far it is valid, and then every segment that was being written is
//! copied to a new file, synced and renamed into place, before any position is reported. The page cache may show bytes
//! that the disk does not have, and a second sync would say nothing: only bytes written anew are known to be there.
//! Nothing that may be somebody's only copy is removed: it is set aside under another name, and reported. Any failing
//! operation ends recovery; it can be run again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use crate::store::catalog::{Catalog, CompleteSegment};
use crate::store::control::{Control, Layout, RESERVE_NAME};
use crate::store::dead_branch::DeadBranch;
use crate::store::disk::{Disk, OpenMode};
use crate::store::error::StoreError;
use crate::store::index::Index;
use crate::store::inventory::Inventory;
use crate::store::partials::{PartialSegment, crc_of_file};
use crate::store::pool::Pool;
use crate::store::positions::Positions;
use crate::store::rewrite::DETACHED_SUFFIX;
use crate::store::switch::remove_heads;
use crate::store::walk::{Walk, Walked};
use crate::wal::scanner::Scanner;
use crate::wal::{Lineage, Lsn, LsnRange, SegmentName, SegmentNo, SegmentSize};

/// What recovery works on, and what it has found so far.
pub(super) struct Recovery<'a> {
    pub disk: &'a dyn Disk,
    pub layout: &'a Layout,
    pub control: Control,
    lineage: Lineage,
    pub size: SegmentSize,
    pub pool: &'a Pool,
    pub spares_max: usize,
    pub complete: BTreeMap<SegmentNo, u64>,
    /// Complete segments before a hole, which recovery itself does not look at.
    pub older: BTreeMap<SegmentNo, u64>,
    pub partial: BTreeMap<SegmentNo, u64>,
    /// Where what is held begins, whatever becomes of the first segments.
    pub begin: SegmentNo,
    pub index: BTreeMap<SegmentName, u32>,
    /// Complete segments that are not on the line.
    pub others: BTreeSet<SegmentName>,
    pub has_reserve: bool,
    pub names: BTreeSet<String>,
    pub damaged: Vec<(SegmentName, String)>,
    pub notes: Vec<String>,
    #[cfg(test)]
    pub mutant: crate::store::simulation::Mutant,
}

/// A store that can be trusted.
pub(super) struct Recovered {
    pub control: Control,
    pub positions: Positions,
    pub scanner: Scanner,
    pub catalog: Catalog,
    pub lineage: Lineage,
    pub partials: BTreeMap<SegmentNo, Arc<PartialSegment>>,
    /// What no checksum covers, neither of a record nor of a complete segment.
    pub unproven: Vec<LsnRange>,
    pub index: Index,
    pub has_reserve: bool,
    /// Segments that were not what was written; they were set aside.
    pub damaged: Vec<(SegmentName, String)>,
    /// What was done, for people.
    pub notes: Vec<String>,
}

impl Recovered {
    /// The line of segments, and how far it is held.
    pub(super) fn line(&self) -> (&Lineage, Lsn) {
        (&self.lineage, self.positions.flushed)
    }
}

impl<'a> Recovery<'a> {
    pub(super) fn new(
        disk: &'a dyn Disk,
        layout: &'a Layout,
        control: Control,
        pool: &'a Pool,
        spares_max: usize,
    ) -> Result<Self, StoreError> {
        let size = control.identity(layout)?.segment_size;
        let mut notes = Vec::new();
        let line = control.lineage(size);
        let was_left = |branch: &&DeadBranch| line.left(branch.timeline) == Some((branch.fork, branch.next));
        for branch in control.dead_branches.iter().filter(was_left) {
            let files = branch.set_aside(disk, layout, size)?;
            if files > 0 {
                notes.push(format!(
                    "set aside {files} WAL files of timeline {} beyond {}, where timeline {} left it",
                    branch.timeline, branch.fork, branch.next
                ));
            }
        }
        remove_heads(disk, layout, size, &control.ancestors)?;
        let inventory = Inventory::take(disk, layout, size)?;
        let names = disk.list(&layout.wal_dir).map_err(StoreError::io("list", &layout.wal_dir))?;
        let lineage = control.lineage(size);
        let (complete, partial) = (inventory.complete_on(&lineage), inventory.partial_on(&lineage));
        let others = inventory.complete.keys().filter(|name| !lineage.contains(**name));
        let mut recovery = Self {
            disk,
            layout,
            size,
            pool,
            spares_max,
            complete,
            older: BTreeMap::new(),
            partial,
            index: Index::read(disk, &layout.data_dir, size)?,
            begin: SegmentNo::holding(control.start, size),
            others: others.copied().collect(),
            control,
            lineage,
            has_reserve: inventory.reserve == Some(size.bytes()),
            names: names.into_iter().map(|entry| entry.name).collect(),
            damaged: Vec::new(),
            notes,
            #[cfg(test)]
            mutant: crate::store::simulation::Mutant::None,
        };
        // An earlier process may have left names that are not durable. No file changes its name twice between two syncs, or
        // it could be left with two.
        recovery.sync_dir()?;
        recovery.settle_unfollowed(&inventory)?;
        recovery.take_in_spares(&inventory.spares, inventory.reserve)?;
        Ok(recovery)
    }

    /// Recovers.
    pub(super) fn run(mut self) -> Result<Recovered, StoreError> {
        self.check_not_emptied()?;
        self.settle_pairs()?;
        self.keep_newest_run()?;
        let walked = self.walk_trusted()?;
        let end = self.end_of(&walked);
        if self.has_lost_beginning(end) {
            return self.step_back(end);
        }
        let is_cut = self.reopen_complete(end)?;
        let partials = self.rewrite_partials(end)?;
        self.discard_beyond(end)?;
        self.sync_dir()?;
        let walked = if is_cut || !partials.is_empty() { self.walk_again(end, walked)? } else { walked };
        let end = self.end_of(&walked);
        let rewritten_from = partials.first_key_value().and_then(|(number, _)| number.start(self.size));
        let after = |gap: &LsnRange| LsnRange::new(gap.start().max(rewritten_from?), gap.end());
        let unproven: Vec<_> = walked.gaps.iter().filter_map(after).collect();
        #[cfg(test)]
        let unproven = match self.mutant {
            crate::store::simulation::Mutant::TrustUnproven => Vec::new(),
            _ => unproven,
        };
        let (complete, index) = self.settle_index()?;
        let timeline = self.control.timeline;
        let sealed = self.complete.last_key_value().map(|(number, _)| number.end(self.size));
        Ok(Recovered {
            control: self.control,
            positions: Positions::at(timeline, end, sealed),
            scanner: walked.scanner,
            catalog: Catalog::new(complete, walked.start.start(self.size)),
            lineage: self.lineage,
            partials,
            unproven,
            index,
            has_reserve: self.has_reserve,
            damaged: self.damaged,
            notes: self.notes,
        })
    }

    /// Whether what the timeline began with, which was there when the timeline was gone over to, is there no more.
    fn has_lost_beginning(&self, end: Lsn) -> bool {
        let timeline = self.control.timeline;
        let began = SegmentNo::holding(self.control.start, self.size);
        self.lineage.timeline_at(end) != timeline && Some(began) < self.lineage.first_segment(timeline)
    }

    /// What the timeline began with is gone: the timeline that it left is to be received again, up to there.
    fn step_back(self, end: Lsn) -> Result<Recovered, StoreError> {
        let Self { disk, layout, pool, spares_max, lineage, mut control, mut notes, damaged, .. } = self;
        let timeline = lineage.timeline_at(end);
        notes.push(format!(
            "WAL ends at {end}, before timeline {} began: timeline {timeline} is received again",
            control.timeline
        ));
        control.ancestors = lineage.up_to(timeline).ancestors().to_vec();
        control.timeline = timeline;
        control.write(disk, layout)?;
        // There are fewer timelines each time.
        let mut recovery = Recovery::new(disk, layout, control, pool, spares_max)?;
        recovery.notes.splice(..0, notes);
        recovery.damaged = damaged;
        recovery.run()
    }

    fn take_in_spares(
        &mut self,
        spares: &BTreeMap<String, u64>,
        reserve: Option<u64>,
    ) -> Result<(), StoreError> {
        for (name, bytes) in spares {
            if *bytes == self.size.bytes() && self.pool.count() < self.spares_max {
                self.pool.found(self.disk, self.layout, name)?;
            } else {
                self.unlink(&self.layout.wal(name))?;
            }
        }
        if reserve.is_some() && !self.has_reserve {
            self.unlink(&self.layout.wal(RESERVE_NAME))?;
        }
        Ok(())
    }

    /// Retention always leaves something: a directory without any of its WAL was emptied by somebody.
    fn check_not_emptied(&self) -> Result<(), StoreError> {
        let entries = || self.index.keys().filter(|name| self.lineage.contains(**name));
        let is_here = |name: &SegmentName| self.partial.contains_key(&name.number);
        // Or it was an earlier recovery that did not come to its end.
        let is_set_aside = self.names.iter().any(|name| name.contains(DETACHED_SUFFIX));
        let is_emptied = !entries().any(is_here) && !is_set_aside;
        if self.complete.is_empty() && entries().next().is_some() && is_emptied {
            let segments = entries().count();
            return Err(StoreError::WalMissing { path: self.layout.data_dir.clone(), segments });
        }
        Ok(())
    }

    /// Of a segment that is there both complete and as `.partial`, the complete one wins if it is sound.
    fn settle_pairs(&mut self) -> Result<(), StoreError> {
        let pairs: Vec<_> =
            self.partial.keys().filter(|number| self.complete.contains_key(number)).copied().collect();
        for number in pairs {
            let walk = self.walk();
            let (complete, partial) = (walk.complete_path(number), walk.partial_path(number));
            match self.fault_of(number)? {
                None => {
                    self.set_aside(&partial, "the complete segment is there, too")?;
                    self.partial.remove(&number);
                }
                Some(fault) => {
                    self.set_aside(&complete, &fault)?;
                    self.damaged.push((self.walk().name(number), fault));
                    self.complete.remove(&number);
                }
            }
        }
        Ok(())
    }

    /// Why a complete segment, taken alone, is not what was written.
    fn fault_of(&self, number: SegmentNo) -> Result<Option<String>, StoreError> {
        let bytes = self.complete.get(&number).copied().unwrap_or(0);
        if bytes != self.size.bytes() {
            return Ok(Some(format!("it has {bytes} bytes, expected {}", self.size.bytes())));
        }
        let walk = self.walk();
        let path = walk.complete_path(number);
        let Some(expected) = self.index.get(&walk.name(number)) else {
            let error = walk.scan_alone(number, &path)?.error;
            return Ok(error.map(|error| error.to_string()));
        };
        let found = self.crc_of(&path)?;
        Ok((found != *expected).then(|| format!("its checksum is {found:08x}, expected {expected:08x}")))
    }

    fn crc_of(&self, path: &Path) -> Result<u32, StoreError> {
        let file = self.disk.open(path, OpenMode::Read).map_err(StoreError::io("open", path))?;
        crc_of_file(&*file, self.size.bytes()).map_err(StoreError::io("read", path))
    }

    /// Walks to the end, from complete segments that are what was written.
    fn walk_trusted(&mut self) -> Result<Walked, StoreError> {
        loop {
            let newest = self.complete.last_key_value().map(|(number, _)| *number);
            if let Some(newest) = newest
                && let Some(fault) = self.fault_of(newest)?
            {
                self.set_aside_from(newest, &fault)?;
                continue;
            }
            let walked = self.walk().run()?;
            match &walked.damaged {
                None => return Ok(walked),
                Some((number, error)) => self.set_aside_from(*number, &error.to_string())?,
            }
        }
    }

    /// A complete segment at the end is damaged. What follows it cannot be claimed either, because a claim covers all
    /// that is before it; the upstream is asked again for what it still has.
    fn set_aside_from(&mut self, first: SegmentNo, fault: &str) -> Result<(), StoreError> {
        if self.complete.range(..first).next().is_none() {
            self.detach_older()?;
        }
        self.pin_begin()?;
        let after = "a segment before it is damaged";
        for number in self.partial.range(first..).map(|(number, _)| *number).rev().collect::<Vec<_>>() {
            self.set_aside(&self.walk().partial_path(number), after)?;
            self.partial.remove(&number);
        }
        for number in self.complete.range(first..).map(|(number, _)| *number).rev().collect::<Vec<_>>() {
            let why = if number == first { fault } else { after };
            self.set_aside(&self.walk().complete_path(number), why)?;
            self.complete.remove(&number);
        }
        self.damaged.push((self.walk().name(first), fault.to_owned()));
        Ok(())
    }

    /// Without complete segments only the control file tells where the store begins.
    fn pin_begin(&mut self) -> Result<(), StoreError> {
        let start = self.begin.start(self.size).unwrap_or(self.control.start);
        if start > self.control.start {
            self.control.start = start;
            self.control.write(self.disk, self.layout)?;
        }
        Ok(())
    }

    fn end_of(&self, walked: &Walked) -> Lsn {
        #[cfg(test)]
        if self.mutant == crate::store::simulation::Mutant::TrustLength {
            return walked.scanner.position();
        }
        walked.scanner.verified_end()
    }

    /// A record that begins in complete segments and is not there whole: those segments are not complete. Whether there
    /// are any.
    fn reopen_complete(&mut self, end: Lsn) -> Result<bool, StoreError> {
        let beyond: Vec<_> =
            self.complete.keys().filter(|number| number.end(self.size) > end).copied().collect();
        if !beyond.is_empty() {
            if beyond.len() == self.complete.len() {
                self.detach_older()?;
            }
            self.pin_begin()?;
        }
        for number in beyond.iter().rev() {
            let walk = self.walk();
            let (complete, partial) = (walk.complete_path(*number), walk.partial_path(*number));
            let keep = number.start(self.size).map_or(0, |start| end.bytes_since(start));
            if keep > 0 {
                self.rewrite(&complete, keep, &partial)?;
                self.partial.insert(*number, self.size.bytes());
            }
            self.set_aside(&complete, "its last record is not complete")?;
            self.complete.remove(number);
        }
        Ok(!beyond.is_empty())
    }

    /// What was written anew must say the same as what it was copied from.
    fn walk_again(&mut self, end: Lsn, first: Walked) -> Result<Walked, StoreError> {
        #[cfg(test)]
        if self.mutant != crate::store::simulation::Mutant::None {
            return Ok(first);
        }
        let inventory = Inventory::take(self.disk, self.layout, self.size)?;
        let partials = inventory.partial_on(&self.lineage);
        let again = Walk { partials: &partials, ..self.walk() }.run()?;
        // Zeros were written behind the end: after XLOG_SWITCH they are what was missing of its segment.
        let is_in_zero_tail = first.scanner.resume_point().is_in_zero_tail;
        let expected = if is_in_zero_tail { SegmentNo::holding(end, self.size).end(self.size) } else { end };
        let found = again.scanner.verified_end();
        if again.damaged.is_some() || found != expected {
            let detail = format!("WAL ends at {found} after recovery, and at {end} before");
            return Err(StoreError::Damaged { path: self.layout.wal_dir.clone(), detail });
        }
        Ok(again)
    }

    /// The complete segments with their checksums, and the index that says the same.
    fn settle_index(&mut self) -> Result<(BTreeMap<SegmentName, CompleteSegment>, Index), StoreError> {
        let mut complete = self.join_older();
        let numbers: Vec<_> = self.complete.keys().copied().collect();
        for number in numbers {
            let (name, path) = (self.walk().name(number), self.walk().complete_path(number));
            let segment = match self.index.get(&name) {
                Some(crc) => CompleteSegment::sound(*crc),
                None => match self.fault_of(number)? {
                    None => CompleteSegment::sound(self.crc_of(&path)?),
                    Some(fault) => {
                        self.damaged.push((name, fault.clone()));
                        CompleteSegment::wrong(None, fault)
                    }
                },
            };
            complete.insert(name, segment);
        }
        for name in &self.others {
            if let Some(crc) = self.index.get(name) {
                complete.insert(*name, CompleteSegment::sound(*crc));
            }
        }
        let known = complete.iter().filter_map(|(name, segment)| Some((*name, segment.crc?)));
        let entries: BTreeMap<_, _> = known.collect();
        let dir = &self.layout.data_dir;
        let existing = Index::open(self.disk, dir, self.size).ok();
        let index = match existing {
            Some(index) if entries == self.index && index.entries() == entries.len() as u64 => index,
            existing => match (Index::rewrite(self.disk, dir, self.size, &entries), existing) {
                // The old one serves until there is space.
                (Err(error), Some(existing)) if error.is_no_space() => existing,
                (rewritten, _) => rewritten?,
            },
        };
        Ok((complete, index))
    }

    pub(super) fn walk(&self) -> Walk<'_> {
        let complete = self.complete.first_key_value().zip(self.complete.last_key_value());
        Walk {
            disk: self.disk,
            layout: self.layout,
            control: &self.control,
            lineage: &self.lineage,
            begin: self.begin,
            size: self.size,
            complete: complete.map(|((first, _), (last, _))| (*first, *last)),
            partials: &self.partial,
        }
    }
}
