//! From the receiver to the writer thread, and from there to the sync thread.
//!
//! Owns the two hand-overs and the count of bytes that are not yet written. Neither side ever waits for the other: the
//! receiver asks for room before it reads from the socket.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use crate::store::partials::PartialSegment;
use crate::wal::{Lsn, SegmentNo};

/// Bytes at their position.
#[derive(Debug)]
pub(super) struct Piece {
    pub at: Lsn,
    pub bytes: Bytes,
}

/// What was handed over at once.
#[derive(Debug)]
pub(super) struct Batch {
    pub pieces: VecDeque<Piece>,
    /// End of the last piece.
    pub end: Lsn,
    /// How far WAL is verified once this is written.
    pub verified: Lsn,
    /// Upstream session of the last piece.
    pub epoch: u64,
}

impl Batch {
    pub(super) fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.bytes.len() as u64).sum()
    }
}

/// Batches to be written.
pub(super) struct WriteQueue {
    batches: Mutex<VecDeque<Batch>>,
    unwritten_bytes: AtomicU64,
    pub(super) signal: Signal,
}

impl WriteQueue {
    pub(super) fn new() -> Self {
        let (batches, unwritten_bytes) = (Mutex::default(), AtomicU64::new(0));
        Self { batches, unwritten_bytes, signal: Signal::default() }
    }

    pub(super) fn unwritten_bytes(&self) -> u64 {
        self.unwritten_bytes.load(Ordering::Acquire)
    }

    pub(super) fn received(&self, bytes: u64) {
        self.unwritten_bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    pub(super) fn written(&self, bytes: u64) {
        self.unwritten_bytes.fetch_sub(bytes, Ordering::AcqRel);
    }

    pub(super) fn push(&self, batch: Batch) {
        self.batches.lock().push_back(batch);
        self.signal.notify();
    }

    /// The next batches as one, of about `bytes_max`.
    pub(super) fn take(&self, bytes_max: u64) -> Option<Batch> {
        let mut batches = self.batches.lock();
        let mut all = batches.pop_front()?;
        let mut bytes = all.bytes();
        while let Some(next) = batches.front() {
            bytes += next.bytes();
            if bytes > bytes_max {
                break;
            }
            if let Some(next) = batches.pop_front() {
                all.pieces.extend(next.pieces);
                (all.end, all.verified, all.epoch) = (next.end, next.verified, next.epoch);
            }
        }
        Some(all)
    }
}

/// What was written and is to be synced.
#[derive(Default)]
pub(super) struct SyncJob {
    pub files: BTreeMap<SegmentNo, Arc<PartialSegment>>,
    /// A segment file got its name since the directory was synced.
    pub has_new_names: bool,
    /// How far everything is durable once this is.
    pub written: Option<Lsn>,
    pub bytes: u64,
}

/// The next sync job, gathering.
#[derive(Default)]
pub(super) struct Unsynced {
    pub(super) job: Mutex<SyncJob>,
    pub(super) signal: Signal,
}

impl Unsynced {
    pub(super) fn take(&self) -> Option<SyncJob> {
        let mut job = self.job.lock();
        let is_empty = job.files.is_empty() && !job.has_new_names && job.written.is_none();
        (!is_empty).then(|| std::mem::take(&mut *job))
    }
}

/// Wakes one thread; a wake-up that comes early is not lost.
#[derive(Default)]
pub(super) struct Signal {
    is_set: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    pub(super) fn notify(&self) {
        *self.is_set.lock() = true;
        self.changed.notify_one();
    }

    pub(super) fn wait(&self) {
        let mut is_set = self.is_set.lock();
        while !*is_set {
            self.changed.wait(&mut is_set);
        }
        *is_set = false;
    }

    pub(super) fn wait_for(&self, time: Duration) {
        let mut is_set = self.is_set.lock();
        if !*is_set {
            self.changed.wait_for(&mut is_set, time);
        }
        *is_set = false;
    }
}
