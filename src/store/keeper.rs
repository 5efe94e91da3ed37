//! What is done behind the stream: seal, save slots, remove old segments, prepare new ones.
//!
//! Owns the order in which a segment becomes complete (index entry synced, final name, directory synced, published) and
//! in which old ones go (oldest first, each durably before the next). One plain step at a time; nothing waits for it.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use crate::store::error::StoreError;
use crate::store::flush::Step;
use crate::store::index::{INDEX_NAME, Index};
use crate::store::pool::Pool;
use crate::store::shared::Shared;
use crate::wal::timeline::Ancestor;
use crate::wal::{Lineage, Lsn, SegmentName, SegmentNo, SegmentSize};

pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    has_reserve: bool,
    /// The stream waits for the first spare, so it comes before the reserve; once, or a fast stream would keep the reserve
    /// from ever being made.
    is_spare_first: bool,
    /// Nothing is prepared any more.
    is_stopping: bool,
    /// The newest segment's place was taken from the oldest: the next one's will be, too, so none is made.
    is_recycling: bool,
    /// The segment that was sealed last, until the slots were looked at.
    pub(super) checkpoint: Option<SegmentNo>,
    /// Whether the slots were looked at since the start.
    pub(super) has_looked: bool,
}

/// Whose needs keep WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// Everybody's.
    OfAll,
    /// Those of slots alone: there is no place for more.
    OfSlots,
}

/// Entries of segments that are gone, beyond which the index is rewritten.
const INDEX_STALE_ENTRIES_MAX: u64 = 256;

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>, has_reserve: bool) -> Self {
        Self {
            shared,
            has_reserve,
            is_spare_first: true,
            is_stopping: false,
            is_recycling: false,
            checkpoint: None,
            has_looked: false,
        }
    }

    /// Only what must be done before the end is done from here on.
    pub(super) fn stop_preparing(&mut self) {
        self.is_stopping = true;
    }

    /// Does one thing that is due.
    pub(super) fn step(&mut self, now: Instant) -> Step {
        if self.shared.health.has_failed() {
            return Step::Stop;
        }
        let Ok(size) = self.shared.segment_size() else { return Step::Idle };
        let shared = self.shared.clone();
        let _turn = shared.keeping.lock();
        match self.work(now, size) {
            Ok(true) => Step::Worked,
            Ok(false) => Step::Idle,
            Err(_) if self.shared.health.has_failed() => Step::Stop,
            Err(error) => {
                self.shared.health.tell(|observer| observer.housekeeping_failed(&error));
                Step::Later
            }
        }
    }

    fn work(&mut self, now: Instant, size: SegmentSize) -> Result<bool, StoreError> {
        // What gives space back comes before what takes some, and its failure does not keep the rest from being done.
        let limited = self.apply_limits(now, size);
        if let Some(consumers) = &self.shared.consumers {
            consumers.expire(now);
        }
        let removed = self.remove_oldest(size, Needs::OfAll);
        if matches!(removed, Ok(true)) || self.seal_next(size)? {
            return Ok(true);
        }
        self.shared.slots.save_if_due(now, size)?;
        if let Some(consumers) = &self.shared.consumers {
            consumers.save_if_due(now, size)?;
        }
        let (limited, removed) = (limited?, removed?);
        if limited || removed || self.keep_to_budget(now, size)? {
            return Ok(true);
        }
        let flushed = self.shared.positions()?.flushed;
        self.shared.redo.save_if_due(now, flushed)?;
        self.shared.xids.save_if_due(now, flushed)?;
        Ok(!self.is_stopping && (self.compact_index(size)? || self.prepare(size)?))
    }

    /// Completes the oldest segment that is durable to its end.
    fn seal_next(&mut self, size: SegmentSize) -> Result<bool, StoreError> {
        let shared = &self.shared;
        let positions = shared.positions()?;
        let durable = positions.flushed;
        #[cfg(test)]
        let durable = match shared.mutant {
            crate::store::simulation::Mutant::SealEarly => positions.written,
            _ => durable,
        };
        let oldest =
            shared.partials.lock().first_key_value().map(|(number, segment)| (*number, segment.clone()));
        let Some((number, segment)) = oldest.filter(|(number, _)| number.end(size) <= durable) else {
            return Ok(false);
        };
        // What it says in there may be replaced yet.
        if shared.unproven.first().is_some_and(|first| first < number.end(size)) {
            return Ok(false);
        }
        let name = shared.name_of(number)?;
        let (partial, complete) = (shared.layout.partial(name, size), shared.layout.complete(name, size));
        let crc = segment.crc(size).map_err(|error| shared.health.fail("read", &partial, &error))?;
        self.write_index_entry(name, crc)?;
        shared
            .disk
            .rename(&partial, &complete)
            .map_err(StoreError::io("rename", &partial))
            .map_err(|error| shared.health.judge(error))?;
        shared.sync_wal_dir()?;
        // Into the catalog first: a reader finds it in one place or the other.
        shared.catalog.lock().sealed(name, crc);
        shared.partials.lock().remove(&number);
        shared.publish(|positions| positions.sealed = Some(number.end(size)));
        shared.health.tell(|observer| observer.sealed(name));
        self.is_recycling = false;
        self.checkpoint = Some(number);
        Ok(true)
    }

    fn write_index_entry(&self, name: SegmentName, crc: u32) -> Result<(), StoreError> {
        let shared = &self.shared;
        let path = shared.layout.data_dir.join(INDEX_NAME);
        let mut index = shared.index.lock();
        let index = index.as_mut().ok_or(StoreError::NotInitialized)?;
        index
            .write(name, crc)
            .map_err(StoreError::io("write", &path))
            .map_err(|error| shared.health.judge(error))?;
        index.sync().map_err(|error| shared.health.fail("sync", &path, &error))
    }

    /// Removes the oldest segment if nobody needs it.
    pub(super) fn remove_oldest(&mut self, size: SegmentSize, needs: Needs) -> Result<bool, StoreError> {
        let shared = &self.shared;
        let positions = shared.positions()?;
        let turn = shared.retention.lock();
        let horizon = horizon(shared, positions.flushed, size, needs);
        let lineage = shared.lineage()?;
        let removable = shared.catalog.lock().removable(&lineage, horizon, size);
        let Some(name) = removable else { return Ok(false) };
        remove_left(shared, &lineage, name, size)?;
        let _place = shared.hold_place();
        let (segment, is_mapped) =
            shared.mappings.while_closed(name, |is_mapped| (shared.catalog.lock().remove(name), is_mapped));
        drop(turn);
        let path = shared.layout.complete(name, size);
        // More than are made: in a burst segments are taken before others come back, and making one costs as much as
        // filling it with WAL.
        let spares = 2 * shared.settings.spare_segments as usize;
        // An old segment that somebody still reads must not be written to.
        let spare = (!is_mapped && shared.pool.count() < spares).then(|| shared.pool.new_name());
        let removed = match &spare {
            Some(spare) => shared.disk.rename(&path, &shared.layout.wal(spare)),
            None => shared.disk.unlink(&path),
        };
        match removed {
            Ok(()) => {}
            // Somebody else removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) => {
                if let Some(segment) = segment {
                    shared.catalog.lock().put_back(name, segment);
                }
                return Err(StoreError::io("remove", &path)(error));
            }
        }
        // Before the next, so that what is left has no hole; before the file is written to, so that nobody finds new
        // bytes under the old name.
        shared.sync_wal_dir()?;
        if let Some(name) = spare {
            shared.pool.found(&*shared.disk, &shared.layout, &name)?;
            self.is_recycling = true;
            // Somebody may wait for it, where none may be made.
            shared.queue.signal.notify();
        }
        Ok(true)
    }

    fn compact_index(&self, size: SegmentSize) -> Result<bool, StoreError> {
        let shared = &self.shared;
        let entries = shared.catalog.lock().index_entries();
        let mut index = shared.index.lock();
        let stale = index.as_ref().map_or(0, Index::entries).saturating_sub(entries.len() as u64);
        if stale <= INDEX_STALE_ENTRIES_MAX {
            return Ok(false);
        }
        let rewritten = Index::rewrite(&*shared.disk, &shared.layout.data_dir, size, &entries);
        *index = Some(rewritten.map_err(|error| shared.health.judge(error))?);
        Ok(true)
    }

    /// Makes the reserve or a spare.
    fn prepare(&mut self, size: SegmentSize) -> Result<bool, StoreError> {
        let shared = &self.shared;
        let (disk, layout) = (&*shared.disk, &shared.layout);
        let judge = |error| shared.health.judge(error);
        let spares = shared.settings.spare_segments as usize;
        let wanted = if self.is_recycling { spares.min(1) } else { spares };
        let is_spare_first =
            std::mem::take(&mut self.is_spare_first) && wanted > 0 && shared.pool.count() == 0;
        if !self.has_reserve && !is_spare_first {
            Pool::make_reserve(disk, layout, size).map_err(judge)?;
            shared.sync_wal_dir()?;
            self.has_reserve = true;
            return Ok(true);
        }
        if shared.pool.count() < wanted
            && let Some(_place) = shared.place_to_make(size)
        {
            let spare = shared.pool.make(disk, layout, size, shared.queue.space()).map_err(judge)?;
            shared.pool.put(spare);
            return Ok(true);
        }
        Ok(false)
    }
}

/// With a segment go the beginnings of it that were left under the names of older timelines.
fn remove_left(
    shared: &Shared,
    lineage: &Lineage,
    name: SegmentName,
    size: SegmentSize,
) -> Result<(), StoreError> {
    let is_left_in = |ancestor: &&Ancestor| SegmentNo::holding(ancestor.switch_lsn, size) == name.number;
    for Ancestor { timeline, .. } in lineage.ancestors().iter().filter(is_left_in) {
        let left = SegmentName { timeline: *timeline, number: name.number };
        let path = shared.layout.partial(left, size);
        match shared.disk.unlink(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::io("remove", &path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// From where on WAL is needed by somebody.
fn horizon(shared: &Shared, flushed: Lsn, size: SegmentSize, needs: Needs) -> Lsn {
    let kept = match needs {
        Needs::OfAll => {
            Lsn::new(flushed.get().saturating_sub(shared.settings.wal_keep_size)).unwrap_or(Lsn::MIN)
        }
        Needs::OfSlots => flushed,
    };
    let consumers = shared.consumers.as_ref().filter(|_| needs == Needs::OfAll);
    let kept = consumers.and_then(|consumers| consumers.oldest_needed()).map_or(kept, |needed| {
        // No more than a slot would keep.
        let current = SegmentNo::holding(flushed, size);
        let allowed = shared.slot_limits(size).oldest_kept(current, Some(needed)).start(size);
        kept.min(needed.max(allowed.unwrap_or(Lsn::MIN)))
    });
    #[cfg(test)]
    if shared.mutant == crate::store::simulation::Mutant::IgnoreSlots {
        return kept;
    }
    shared.slots.oldest_needed().map_or(kept, |needed| needed.min(kept))
}

impl Shared {
    /// Whether the segment is one of those that are being written.
    pub(super) fn is_being_written(&self, name: SegmentName) -> bool {
        let is_on_line = self.name_of(name.number).is_ok_and(|on_line| on_line == name);
        is_on_line && self.partials.lock().contains_key(&name.number)
    }

    /// Start of the oldest segment of which the upstream can be asked on the timeline that is received: older ones are its
    /// ancestors'.
    pub(super) fn begin(&self) -> Option<Lsn> {
        let size = self.segment_size().ok()?;
        let lineage = self.lineage().ok()?;
        let first = lineage.first_segment(lineage.timeline()).and_then(|first| first.start(size));
        self.oldest().max(first)
    }

    /// Where the timeline that is received began, if that is within the segment.
    pub(super) fn begins_in(&self, number: SegmentNo) -> Option<Lsn> {
        let size = self.segment_size().ok()?;
        let lineage = self.lineage().ok()?;
        let begin = lineage.begin(lineage.timeline()).flatten()?;
        (SegmentNo::holding(begin, size) == number).then_some(begin)
    }

    /// Start of the oldest segment that is held, or will be.
    pub(super) fn oldest(&self) -> Option<Lsn> {
        let size = self.segment_size().ok()?;
        let lineage = self.lineage().ok()?;
        let complete = self.catalog.lock().oldest(&lineage).map(|name| name.number);
        let partial = || self.partials.lock().first_key_value().map(|(number, _)| *number);
        let start = || self.control.lock().as_ref().map(|control| control.start);
        match complete.or_else(partial) {
            Some(number) => number.start(size),
            None => {
                start().map(|start| SegmentNo::holding(start, size)).and_then(|number| number.start(size))
            }
        }
    }
}
