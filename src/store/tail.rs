//! The newest WAL, in memory.
//!
//! Owns the very `Bytes` that came off the socket, in order and without a gap, shared by all senders. Bounded: counted
//! in whole receive blocks, because one small slice keeps its block alive, and in pieces. Never drops what is not yet in
//! the files, so that whoever does not find a position here finds it there. Bytes beyond the verified end are
//! provisional; the readers stay below it.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::store::queue::Follows;
use crate::wal::{Lsn, LsnRange, TimelineId};

/// Number of the receive block of which some bytes are a slice. Blocks are filled one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockId(pub u64);

/// Size of a receive block, by which the tail's memory is counted.
pub const RECEIVE_BLOCK_BYTES: u64 = 256 << 10;

/// Most pieces in the tail, however small they are.
const CHUNKS_MAX: usize = 1 << 16;

pub(super) struct Tail {
    /// Whose bytes these are.
    timeline: Option<TimelineId>,
    chunks: VecDeque<Chunk>,
    /// End of the newest chunk; of everything when there is none.
    end: Lsn,
    /// Up to here the bytes are in the files.
    written: Lsn,
    /// Upstream session; what earlier ones still write does not count.
    epoch: u64,
    blocks: u64,
    bytes_max: u64,
}

struct Chunk {
    at: Lsn,
    bytes: Bytes,
    block: BlockId,
}

impl Chunk {
    fn end(&self) -> Lsn {
        self.at.advance(self.bytes.len() as u64)
    }
}

/// Where the bytes of a range are.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Located {
    /// The part, at the beginning, that is to be read from files.
    pub in_files: Option<LsnRange>,
    /// The rest.
    pub in_memory: Vec<Bytes>,
}

impl Tail {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self {
            timeline: None,
            chunks: VecDeque::new(),
            end: Lsn::MIN,
            written: Lsn::MIN,
            epoch: 0,
            blocks: 0,
            bytes_max,
        }
    }

    /// WAL of `timeline` follows, from `end` on, where it left the one before.
    pub(super) fn begin_timeline(&mut self, timeline: TimelineId, end: Lsn) {
        self.begin(end);
        self.timeline = Some(timeline);
    }

    /// A new upstream session: what lies beyond `end` is forgotten. Returns the number of the session.
    pub(super) fn begin(&mut self, end: Lsn) -> u64 {
        while let Some(mut last) = self.chunks.pop_back() {
            if last.at < end {
                let keep = usize::try_from(end.bytes_since(last.at)).unwrap_or(usize::MAX);
                last.bytes.truncate(keep);
                self.chunks.push_back(last);
                break;
            }
            if self.chunks.back().is_none_or(|before| before.block != last.block) {
                self.blocks -= 1;
            }
        }
        self.end = end;
        self.written = self.written.min(end);
        if self.chunks.is_empty() {
            // Nothing in memory, so all of it was written: only that leaves from the front.
            self.written = end;
        }
        self.epoch += 1;
        self.epoch
    }

    /// Adds bytes at the end.
    pub(super) fn push(&mut self, bytes: Bytes, block: BlockId) {
        if self.chunks.back().is_none_or(|last| last.block != block) {
            self.blocks += 1;
        }
        let at = self.end;
        self.end = at.advance(bytes.len() as u64);
        self.chunks.push_back(Chunk { at, bytes, block });
    }

    /// The files have everything of session `epoch` up to `end`.
    /// The memory depends on what follows.
    pub(super) fn note_written(&mut self, end: Lsn, epoch: u64, follows: Follows) {
        if epoch == self.epoch {
            self.written = self.written.max(end);
        }
        let blocks_max = follows.memory_max(self.bytes_max) / RECEIVE_BLOCK_BYTES;
        while self.blocks > blocks_max.max(1) || self.chunks.len() > CHUNKS_MAX {
            match self.chunks.pop_front() {
                Some(first) if first.end() <= self.written => {
                    if self.chunks.front().is_none_or(|next| next.block != first.block) {
                        self.blocks -= 1;
                    }
                }
                Some(first) => {
                    self.chunks.push_front(first);
                    break;
                }
                None => break,
            }
        }
    }

    /// Looks for a range of `timeline` that ends within what was pushed, if that is the one which is received.
    pub(super) fn locate(&self, timeline: TimelineId, range: LsnRange) -> Located {
        if self.timeline != Some(timeline) {
            return Located { in_files: Some(range), in_memory: Vec::new() };
        }
        let tail_start = self.chunks.front().map_or(self.end, |first| first.at);
        let start = range.start().max(tail_start);
        let in_files = LsnRange::new(range.start(), range.end().min(tail_start));
        let mut in_memory = Vec::new();
        let first = self.chunks.partition_point(|chunk| chunk.end() <= start);
        for chunk in self.chunks.range(first..).take_while(|chunk| chunk.at < range.end()) {
            let within =
                |position: Lsn| usize::try_from(position.bytes_since(chunk.at)).unwrap_or(usize::MAX);
            in_memory.push(chunk.bytes.slice(within(start)..within(range.end()).min(chunk.bytes.len())));
        }
        Located { in_files, in_memory }
    }

    /// Bytes of memory that the tail keeps alive.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.blocks * RECEIVE_BLOCK_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(raw: u64) -> Lsn {
        Lsn::new(raw).unwrap()
    }

    fn begun(tail: &mut Tail) -> u64 {
        tail.begin_timeline(TimelineId::FIRST, at(100));
        tail.epoch
    }

    fn range(start: u64, end: u64) -> LsnRange {
        LsnRange::new(at(start), at(end)).unwrap()
    }

    fn filled(tail: &Tail, start: u64, end: u64) -> (Option<LsnRange>, Vec<u8>) {
        let located = tail.locate(TimelineId::FIRST, range(start, end));
        (located.in_files, located.in_memory.concat())
    }

    #[test]
    fn a_range_is_cut_from_several_chunks_and_the_rest_is_left_to_the_files() {
        let mut tail = Tail::new(1 << 20);
        begun(&mut tail);
        tail.push(Bytes::from_static(b"abcd"), BlockId(1));
        tail.push(Bytes::from_static(b"efgh"), BlockId(1));
        assert_eq!(filled(&tail, 101, 106), (None, b"bcdef".to_vec()));
        assert_eq!(filled(&tail, 90, 102), (Some(range(90, 100)), b"ab".to_vec()));
        assert_eq!(filled(&tail, 90, 95), (Some(range(90, 95)), Vec::new()));
        assert_eq!(filled(&tail, 107, 108), (None, b"h".to_vec()));
    }

    #[test]
    fn memory_is_counted_in_blocks_and_only_what_was_written_leaves() {
        let mut tail = Tail::new(2 * RECEIVE_BLOCK_BYTES);
        let epoch = begun(&mut tail);
        for number in 0..8 {
            tail.push(Bytes::from_static(b"xx"), BlockId(number / 2));
        }
        tail.note_written(at(102), epoch, Follows::Nothing);
        assert_eq!(tail.memory_bytes(), 4 * RECEIVE_BLOCK_BYTES, "half of the first block is unwritten");
        tail.note_written(at(116), epoch, Follows::Nothing);
        assert_eq!(tail.memory_bytes(), 2 * RECEIVE_BLOCK_BYTES);
        assert_eq!(filled(&tail, 100, 116), (Some(range(100, 108)), b"xxxxxxxx".to_vec()));
    }

    #[test]
    fn a_new_session_forgets_provisional_bytes_and_old_writes() {
        let mut tail = Tail::new(RECEIVE_BLOCK_BYTES);
        let old = begun(&mut tail);
        tail.push(Bytes::from_static(b"abcd"), BlockId(1));
        tail.push(Bytes::from_static(b"bad"), BlockId(2));
        let new = tail.begin(at(102));
        tail.push(Bytes::from_static(b"CD"), BlockId(3));
        tail.push(Bytes::from_static(b"EF"), BlockId(4));
        tail.note_written(at(107), old, Follows::Nothing);
        assert_eq!(filled(&tail, 100, 106), (None, b"abCDEF".to_vec()));
        tail.note_written(at(104), new, Follows::Nothing);
        assert_eq!(filled(&tail, 100, 106), (Some(range(100, 104)), b"EF".to_vec()));
        assert_eq!(tail.memory_bytes(), RECEIVE_BLOCK_BYTES);
    }

    #[test]
    fn what_left_the_tail_as_provisional_can_be_taken_back() {
        let mut tail = Tail::new(RECEIVE_BLOCK_BYTES);
        let epoch = begun(&mut tail);
        tail.push(Bytes::from_static(b"abcd"), BlockId(1));
        tail.push(Bytes::from_static(b"efgh"), BlockId(2));
        tail.note_written(at(108), epoch, Follows::Nothing);
        tail.begin(at(102));
        assert_eq!(filled(&tail, 98, 102), (Some(range(98, 102)), Vec::new()));
        tail.push(Bytes::from_static(b"X"), BlockId(3));
        assert_eq!(filled(&tail, 98, 103), (Some(range(98, 102)), b"X".to_vec()));
    }
}
