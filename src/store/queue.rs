//! From the receiver to the writer thread, and from there to the sync thread.
//!
//! Owns the two hand-overs and the count of bytes that are not yet written. Neither side ever waits for the other: the
//! receiver asks for room before it reads from the socket.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use crate::store::partials::PartialSegment;
use crate::store::pool::Space;
use crate::wal::{Lsn, SegmentNo};

/// Bytes at their position.
#[derive(Debug)]
pub(super) struct Piece {
    pub at: Lsn,
    pub bytes: Bytes,
}

impl Piece {
    /// The memory it stands for: small messages cost more than their bytes.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.bytes.len() as u64 + PIECE_OVERHEAD_BYTES
    }
}

/// What a piece costs beside its bytes: itself, its place in the tail, and the head of its message in the receive block.
const PIECE_OVERHEAD_BYTES: u64 = 160;

/// Whether more comes at once after a batch, for which its sync may wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Follows {
    #[default]
    Nothing,
    More,
}

impl Follows {
    /// Memory for what is on its way and what was, of at most `bytes_max`. While the upstream is far ahead, receiving goes
    /// as fast as writing and no faster: all of it then stays in the processor's cache.
    pub(super) fn memory_max(self, bytes_max: u64) -> u64 {
        match self {
            Self::Nothing => bytes_max,
            Self::More => bytes_max.min(MEMORY_BYTES_BEFORE_MORE),
        }
    }
}

/// Memory for unwritten WAL, and for the tail, while more follows.
const MEMORY_BYTES_BEFORE_MORE: u64 = 8 << 20;

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
    pub follows: Follows,
    /// Once this is durable, that session has proved all that is held.
    pub is_proof: bool,
}

impl Batch {
    pub(super) fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.bytes.len() as u64).sum()
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        self.pieces.iter().map(Piece::memory_bytes).sum()
    }
}

/// Batches to be written.
pub(super) struct WriteQueue {
    batches: Mutex<Waiting>,
    /// Nothing waits, and nothing is in hand.
    is_idle: Condvar,
    room: Mutex<Room>,
    unwritten_bytes_max: u64,
    pub(super) signal: Signal,
}

#[derive(Default)]
struct Waiting {
    batches: VecDeque<Batch>,
    /// The writer thread has one that it has not yet published.
    is_in_hand: bool,
}

#[derive(Default)]
struct Room {
    /// Memory of what waits, in bytes.
    unwritten_bytes: u64,
    /// Said with what was handed over last.
    follows: Follows,
    /// The limit was reached, and not enough was written since.
    is_exhausted: bool,
}

/// Room that was exhausted is back when less than this part of the limit is unwritten. A disk that only writes slowly
/// would else give room back at each write, and throttle the upstream to its pace without anybody noticing.
const ROOM_BACK_DIVISOR: u64 = 2;

impl WriteQueue {
    pub(super) fn new(unwritten_bytes_max: u64) -> Self {
        let (batches, room) = (Mutex::default(), Mutex::default());
        Self { batches, is_idle: Condvar::new(), room, unwritten_bytes_max, signal: Signal::default() }
    }

    pub(super) fn unwritten_bytes(&self) -> u64 {
        self.room.lock().unwritten_bytes
    }

    pub(super) fn has_room(&self) -> bool {
        !self.room.lock().is_exhausted
    }

    pub(super) fn received(&self, bytes: u64) {
        let mut room = self.room.lock();
        room.unwritten_bytes += bytes;
        room.is_exhausted |= room.unwritten_bytes >= room.follows.memory_max(self.unwritten_bytes_max);
    }

    /// How a segment that is needed now should have its space.
    pub(super) fn space(&self) -> Space {
        match self.room.lock().follows {
            Follows::Nothing => Space::Written,
            Follows::More => Space::Allocated,
        }
    }

    /// These bytes wait no longer.
    pub(super) fn written(&self, bytes: u64) {
        let mut room = self.room.lock();
        room.unwritten_bytes -= bytes;
        let limit = room.follows.memory_max(self.unwritten_bytes_max);
        room.is_exhausted &= room.unwritten_bytes > 0 && room.unwritten_bytes >= limit / ROOM_BACK_DIVISOR;
    }

    /// Whether nothing waits to be written, and nothing that was written waits to be published.
    pub(super) fn is_idle(&self) -> bool {
        let waiting = self.batches.lock();
        waiting.batches.is_empty() && !waiting.is_in_hand
    }

    /// Waits until `is_idle`; whether it came to that.
    pub(super) fn wait_until_idle(&self, deadline: Instant) -> bool {
        let mut waiting = self.batches.lock();
        while waiting.is_in_hand || !waiting.batches.is_empty() {
            if self.is_idle.wait_until(&mut waiting, deadline).timed_out() {
                return !waiting.is_in_hand && waiting.batches.is_empty();
            }
        }
        true
    }

    /// What was taken is published.
    pub(super) fn published(&self) {
        self.batches.lock().is_in_hand = false;
        self.is_idle.notify_all();
    }

    pub(super) fn push(&self, batch: Batch) {
        self.room.lock().follows = batch.follows;
        self.batches.lock().batches.push_back(batch);
        self.signal.notify();
    }

    /// The next batches as one, of about `bytes_max`; in hand until `published`.
    pub(super) fn take(&self, bytes_max: u64) -> Option<Batch> {
        let mut waiting = self.batches.lock();
        let mut all = waiting.batches.pop_front()?;
        waiting.is_in_hand = true;
        let batches = &mut waiting.batches;
        let mut bytes = all.bytes();
        while let Some(next) = batches.front() {
            bytes += next.bytes();
            if bytes > bytes_max {
                break;
            }
            if let Some(next) = batches.pop_front() {
                all.is_proof = next.is_proof || (all.is_proof && all.epoch == next.epoch);
                all.pieces.extend(next.pieces);
                (all.end, all.verified, all.epoch) = (next.end, next.verified, next.epoch);
                all.follows = next.follows;
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
    pub follows: Follows,
    /// The upstream session that has proved all that is held, once everything is durable.
    pub proof_of: Option<u64>,
}

impl SyncJob {
    /// Whether it is better to gather more before a sync.
    fn may_wait(&self) -> bool {
        self.follows == Follows::More && self.bytes < SYNC_BYTES_WANTED
    }

    fn is_empty(&self) -> bool {
        self.files.is_empty() && !self.has_new_names && self.written.is_none()
    }
}

/// Bytes that one sync is worth while more follow.
pub(super) const SYNC_BYTES_WANTED: u64 = 4 << 20;

/// The next sync job, gathering.
#[derive(Default)]
pub(super) struct Unsynced {
    pub(super) job: Mutex<SyncJob>,
    /// One was taken and is not yet done; changed under the lock of `job`.
    is_in_hand: AtomicBool,
    /// Nothing waits, and nothing is in hand.
    idle: Condvar,
    pub(super) signal: Signal,
}

impl Unsynced {
    pub(super) fn take(&self) -> Option<SyncJob> {
        let mut job = self.job.lock();
        // Files of a batch that is being written are no use yet: its end is published with the last of them.
        if job.written.is_none() || job.may_wait() {
            return None;
        }
        self.is_in_hand.store(true, Ordering::Release);
        Some(std::mem::take(&mut *job))
    }

    /// Wakes the sync thread unless it is better to gather more.
    pub(super) fn notify(&self) {
        if !self.job.lock().may_wait() {
            self.signal.notify();
        }
    }

    /// Nothing more follows for now, whatever was said before.
    pub(super) fn gather_no_more(&self) {
        self.job.lock().follows = Follows::Nothing;
        self.signal.notify();
    }

    /// What was taken is published.
    pub(super) fn published(&self) {
        let _job = self.job.lock();
        self.is_in_hand.store(false, Ordering::Release);
        self.idle.notify_all();
    }

    /// Waits until `is_idle`; whether it came to that.
    pub(super) fn wait_until_idle(&self, deadline: Instant) -> bool {
        let mut job = self.job.lock();
        while !job.is_empty() || self.is_in_hand.load(Ordering::Acquire) {
            if self.idle.wait_until(&mut job, deadline).timed_out() {
                return job.is_empty() && !self.is_in_hand.load(Ordering::Acquire);
            }
        }
        true
    }

    /// Whether nothing waits to be synced or published.
    pub(super) fn is_idle(&self) -> bool {
        let job = self.job.lock();
        job.is_empty() && !self.is_in_hand.load(Ordering::Acquire)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_that_was_exhausted_is_back_when_half_is_written() {
        let queue = WriteQueue::new(100);
        queue.received(99);
        assert!(queue.has_room());
        queue.received(1);
        assert!(!queue.has_room());
        queue.written(50);
        assert!(!queue.has_room(), "half is not less than half");
        queue.written(1);
        assert!(queue.has_room());
        queue.received(50);
        assert!(queue.has_room());
        let smallest = WriteQueue::new(1);
        smallest.received(1);
        assert!(!smallest.has_room());
        smallest.written(1);
        assert!(smallest.has_room());
    }
}
