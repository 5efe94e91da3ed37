//! From the queue to stable storage: write, then flush.
//!
//! Owns the two steps as plain functions, without threads, so that a test can drive them one at a time. The writer puts
//! batches into the segment files and publishes `written`; meanwhile the sync step makes the batch before durable and
//! publishes `flushed`. A failed sync is final. Space that cannot be allocated is waited for, with the bytes in hand.

use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::Arc;

use bytes::Buf;

use crate::store::disk::{SLICES_MAX, is_shortage};
use crate::store::error::StoreError;
use crate::store::partials::PartialSegment;
use crate::store::queue::{Batch, SyncJob};
use crate::store::shared::Shared;
use crate::wal::{SegmentNo, SegmentSize};

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There was nothing to do.
    Idle,
    /// Something was done; there may be more.
    Worked,
    /// Something is to be done later, after a pause.
    Later,
    /// The store has failed; there will be nothing to do any more.
    Stop,
}

/// Bytes written before the sync step hears of them.
const WRITE_BATCH_BYTES_MAX: u64 = 4 << 20;

/// Writes batches into segment files.
pub(super) struct Writer {
    shared: Arc<Shared>,
    batch: Option<Batch>,
    /// Bytes of the batch when it was taken, and the memory it stood for.
    batch_bytes: u64,
    batch_memory_bytes: u64,
}

/// Why a batch could not be written.
enum Obstacle {
    NoSpace,
    Failed,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, batch: None, batch_bytes: 0, batch_memory_bytes: 0 }
    }

    /// Writes one batch.
    pub(super) fn step(&mut self) -> Step {
        if self.shared.health.has_failed() {
            return Step::Stop;
        }
        let Ok(size) = self.shared.segment_size() else { return Step::Idle };
        if self.batch.is_none() {
            self.batch = self.shared.queue.take(WRITE_BATCH_BYTES_MAX);
            self.batch_bytes = self.batch.as_ref().map_or(0, Batch::bytes);
            self.batch_memory_bytes = self.batch.as_ref().map_or(0, Batch::memory_bytes);
        }
        let Some(batch) = &mut self.batch else { return Step::Idle };
        match write_batch(&self.shared, batch, size) {
            Ok(()) => {}
            Err(Obstacle::NoSpace) => {
                self.shared.unsynced.gather_no_more();
                return Step::Later;
            }
            Err(Obstacle::Failed) => return Step::Stop,
        }
        if let Some(batch) = self.batch.take() {
            self.publish(&batch);
        }
        Step::Worked
    }

    fn publish(&self, batch: &Batch) {
        let shared = &self.shared;
        shared.health.healed();
        shared.tail.lock().note_written(batch.end, batch.epoch, batch.follows);
        shared.queue.written(self.batch_memory_bytes);
        // Before the sync step hears of it, so that `flushed` cannot pass `written`.
        shared.publish(|positions| positions.written = batch.verified);
        {
            let mut job = shared.unsynced.job.lock();
            job.written = Some(batch.verified);
            job.bytes += self.batch_bytes;
            job.follows = batch.follows;
            job.proof_of = if batch.is_proof { Some(batch.epoch) } else { job.proof_of };
        }
        shared.queue.published();
        shared.unsynced.notify();
        #[cfg(test)]
        if shared.mutant == crate::store::simulation::Mutant::AcknowledgeBeforeSync {
            shared.publish(|positions| positions.flushed = batch.verified);
        }
    }
}

/// Writes what is left of a batch.
fn write_batch(shared: &Shared, batch: &mut Batch, size: SegmentSize) -> Result<(), Obstacle> {
    while let Some(first) = batch.pieces.front() {
        if first.bytes.is_empty() {
            batch.pieces.pop_front();
            continue;
        }
        let (number, offset) = (SegmentNo::holding(first.at, size), size.offset_of(first.at));
        let segment = open_segment(shared, number, size)?;
        let slices = contiguous_slices(batch, size.bytes() - offset);
        let path = || partial_path(shared, number, size);
        let written = match segment.file.write_at(&slices, offset) {
            Ok(0) => {
                shared.health.fail("write", &path(), &io::ErrorKind::WriteZero.into());
                return Err(Obstacle::Failed);
            }
            Ok(written) => written,
            // A file system that does not write in place, as most do.
            Err(error) if is_shortage(&error) => {
                shared.health.no_space(&path(), &error);
                return Err(Obstacle::NoSpace);
            }
            Err(error) => {
                shared.health.fail("write", &path(), &error);
                return Err(Obstacle::Failed);
            }
        };
        shared.unsynced.job.lock().files.entry(number).or_insert_with(|| segment.clone());
        advance(batch, written, &segment, offset);
    }
    Ok(())
}

/// The bytes from the first piece on, as far as they follow one another, at most `bytes_max`.
fn contiguous_slices(batch: &Batch, bytes_max: u64) -> Vec<IoSlice<'_>> {
    let mut slices = Vec::with_capacity(batch.pieces.len().min(SLICES_MAX));
    let mut expected = batch.pieces.front().map(|first| first.at);
    let mut room = bytes_max;
    for piece in batch.pieces.iter().take(SLICES_MAX) {
        if expected != Some(piece.at) || room == 0 {
            break;
        }
        let take = usize::try_from(room).unwrap_or(usize::MAX).min(piece.bytes.len());
        slices.push(IoSlice::new(piece.bytes.get(..take).unwrap_or_default()));
        room -= take as u64;
        expected = Some(piece.at.advance(piece.bytes.len() as u64));
    }
    slices
}

/// Takes `written` bytes off the batch and into the segment's checksum.
fn advance(batch: &mut Batch, mut written: usize, segment: &PartialSegment, mut offset: u64) {
    while let Some(first) = batch.pieces.front_mut().filter(|_| written > 0) {
        let taken = first.bytes.len().min(written);
        segment.note_written(first.bytes.get(..taken).unwrap_or_default(), offset);
        offset += taken as u64;
        written -= taken;
        if taken == first.bytes.len() {
            batch.pieces.pop_front();
        } else {
            first.bytes.advance(taken);
            first.at = first.at.advance(taken as u64);
        }
    }
}

/// There is no place within the disk budget. The keeper makes room, if it can.
fn no_place(shared: &Shared, target: &Path) -> Obstacle {
    shared.keeper.notify();
    if shared.is_budget_exhausted() {
        shared.health.no_space(target, &io::Error::other("the disk budget is used up"));
    }
    Obstacle::NoSpace
}

/// The file of a segment; a spare becomes it when there is none.
fn open_segment(
    shared: &Shared,
    number: SegmentNo,
    size: SegmentSize,
) -> Result<Arc<PartialSegment>, Obstacle> {
    if let Some(segment) = shared.partials.lock().get(&number) {
        return Ok(segment.clone());
    }
    let (disk, layout) = (&*shared.disk, &shared.layout);
    let target = partial_path(shared, number, size);
    // Until it is among those that are written.
    let mut place = shared.hold_place();
    let spare = match shared.pool.take() {
        Some(spare) => spare,
        None => {
            drop(place);
            place = shared.place_to_make(size).ok_or_else(|| no_place(shared, &target))?;
            let made = shared.pool.make(disk, layout, size, shared.queue.space());
            made.map_err(|error| obstacle(shared, error))?
        }
    };
    let path = layout.wal(&spare.name);
    if let Err(source) = disk.rename(&path, &target) {
        if is_shortage(&source) {
            shared.pool.put(spare);
        }
        return Err(obstacle(shared, StoreError::Io { operation: "rename", path, source }));
    }
    // Before anything in it is published.
    shared.unsynced.job.lock().has_new_names = true;
    let segment = Arc::new(PartialSegment::empty(spare.file));
    shared.partials.lock().insert(number, segment.clone());
    drop(place);
    shared.keeper.notify();
    Ok(segment)
}

fn obstacle(shared: &Shared, error: StoreError) -> Obstacle {
    match error {
        StoreError::Io { path, source, .. } if is_shortage(&source) => {
            shared.health.no_space(&path, &source);
            Obstacle::NoSpace
        }
        other => {
            shared.health.judge(other);
            Obstacle::Failed
        }
    }
}

fn partial_path(shared: &Shared, number: SegmentNo, size: SegmentSize) -> std::path::PathBuf {
    let name = shared.name_of(number);
    name.map_or_else(|_| shared.layout.wal_dir.clone(), |name| shared.layout.partial(name, size))
}

/// Makes what was written durable.
pub(super) struct Syncer {
    shared: Arc<Shared>,
}

impl Syncer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// What was written since the last call; `None` if nothing was.
    pub(super) fn take(&self) -> Option<SyncJob> {
        if self.shared.health.has_failed() { None } else { self.shared.unsynced.take() }
    }

    /// Syncs it, then says so.
    pub(super) fn run(&self, job: &SyncJob) -> Step {
        let shared = &self.shared;
        let Ok(size) = shared.segment_size() else { return Step::Idle };
        for (number, segment) in &job.files {
            let result = segment.file.sync();
            #[cfg(test)]
            let result = match shared.mutant {
                crate::store::simulation::Mutant::RetrySync => result.or_else(|_| segment.file.sync()),
                _ => result,
            };
            if let Err(error) = result {
                shared.health.fail("sync", &partial_path(shared, *number, size), &error);
                return Step::Stop;
            }
        }
        if job.has_new_names && shared.sync_wal_dir().is_err() {
            return Step::Stop;
        }
        if let Some(written) = job.written {
            let before = shared.positions.lock().map(|positions| positions.flushed);
            shared.publish(|positions| positions.flushed = positions.flushed.max(written));
            let segment = |position| SegmentNo::holding(position, size);
            if before.map(segment) != Some(segment(written)) {
                shared.keeper.notify();
            }
        }
        if let Some(epoch) = job.proof_of {
            shared.prove(epoch);
        }
        shared.unsynced.published();
        Step::Worked
    }
}
