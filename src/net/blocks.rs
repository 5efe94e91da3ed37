//! Receive buffers whose contents can be kept without copying.
//!
//! Owns the current block: bytes are read from the socket straight into it and handed out as slices that keep the block
//! alive. A block whose slices are all gone is filled again under a new number: fresh memory costs a page fault every
//! 4 KiB, which is more than receiving into it. Never copies what it received, never grows a block. What was compressed is
//! decoded into blocks of the same kind.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::store::{self, BlockId};

/// Reads a stream into blocks of [`store::RECEIVE_BLOCK_BYTES`].
#[derive(Debug)]
pub struct BlockReader {
    pool: Pool,
    number: u64,
    numbers: Numbers,
}

impl BlockReader {
    /// `first_block` must not have been used before in this process: memory is accounted by block number. Blocks of
    /// `kept_bytes` in all, as many as the store keeps in use, are remembered to be filled again.
    pub fn new(first_block: BlockId, kept_bytes: u64) -> Self {
        let numbers = Numbers(Arc::new(AtomicU64::new(first_block.0)));
        Self { pool: Pool::new(RECEIVE_BLOCK_BYTES, kept_bytes), number: first_block.0, numbers }
    }

    /// Blocks to decode into, with numbers of the same sequence.
    pub fn for_decoding(&self, kept_bytes: u64) -> DecodingBlocks {
        let pool = Pool::new(DECODING_BLOCK_BYTES, kept_bytes);
        DecodingBlocks { pool, first: 0, used: 0, numbers: self.numbers.clone() }
    }

    /// Waits for bytes; `None` at the end of the stream. Cancel-safe: nothing is lost when the future is dropped.
    pub async fn read(
        &mut self,
        source: &mut (impl AsyncRead + Unpin),
    ) -> io::Result<Option<(Bytes, BlockId)>> {
        if self.pool.room() < READ_BYTES_MIN {
            self.pool.next();
            self.number = self.numbers.take(1);
        }
        let read = source.read_buf(&mut self.pool.block).await?;
        Ok((read > 0).then(|| (self.pool.block.split_to(read).freeze(), BlockId(self.number))))
    }

    /// The block that was last begun.
    pub fn current(&self) -> BlockId {
        BlockId(self.numbers.0.load(Ordering::Relaxed))
    }
}

/// Blocks for WAL that came compressed. One is several receive blocks long, so that what belongs together lies together, and
/// has as many numbers.
#[derive(Debug)]
pub struct DecodingBlocks {
    pool: Pool,
    /// Number of the block's first part.
    first: u64,
    /// Bytes of the block that were given out.
    used: usize,
    numbers: Numbers,
}

impl DecodingBlocks {
    /// Lets `decode` fill `len` bytes, at most [`DECODED_BYTES_MAX`], and gives them out: in order, each piece with the number of
    /// the part it is in. Nothing is given out of what could not be decoded.
    pub fn decode<E>(
        &mut self,
        len: usize,
        decode: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Decoded, E> {
        if self.pool.room() < len {
            self.pool.next();
            self.used = 0;
            self.first = self.numbers.take(PARTS) - (PARTS - 1);
        }
        let block = &mut self.pool.block;
        block.resize(len, 0);
        if let Err(error) = decode(block) {
            block.clear();
            return Err(error);
        }
        let (rest, at, first) = (block.split().freeze(), self.used, self.first);
        self.used += len;
        Ok(Decoded { rest, at, first })
    }
}

/// Pieces of what was decoded, each with the number of the part it is in.
#[derive(Debug)]
pub struct Decoded {
    rest: Bytes,
    /// Place of `rest` in its block.
    at: usize,
    first: u64,
}

impl Iterator for Decoded {
    type Item = (Bytes, BlockId);

    fn next(&mut self) -> Option<Self::Item> {
        let left_in_part = RECEIVE_BLOCK_BYTES - self.at % RECEIVE_BLOCK_BYTES;
        let piece = self.rest.split_to(left_in_part.min(self.rest.len()));
        let number = self.first + (self.at / RECEIVE_BLOCK_BYTES) as u64;
        self.at += piece.len();
        (!piece.is_empty()).then_some((piece, BlockId(number)))
    }
}

/// The last number that was given to a block.
#[derive(Clone, Debug)]
struct Numbers(Arc<AtomicU64>);

impl Numbers {
    /// The last of so many new ones.
    fn take(&self, count: u64) -> u64 {
        self.0.fetch_add(count, Ordering::Relaxed) + count
    }
}

/// One block that is being filled, and those that were.
#[derive(Debug)]
struct Pool {
    block: BytesMut,
    block_bytes: usize,
    /// Blocks that were filled, oldest first; most are still in use.
    filled: VecDeque<BytesMut>,
    filled_max: usize,
}

impl Pool {
    fn new(block_bytes: usize, kept_bytes: u64) -> Self {
        let filled_max = usize::try_from(kept_bytes).unwrap_or(usize::MAX) / block_bytes;
        Self { block: BytesMut::new(), block_bytes, filled: VecDeque::new(), filled_max: filled_max.max(1) }
    }

    fn room(&self) -> usize {
        self.block.capacity() - self.block.len()
    }

    fn next(&mut self) {
        let next = self.reclaimed().unwrap_or_else(|| BytesMut::with_capacity(self.block_bytes));
        let filled = std::mem::replace(&mut self.block, next);
        if self.filled.len() == self.filled_max {
            self.filled.pop_front();
        }
        self.filled.push_back(filled);
    }

    /// A block that nobody holds a slice of any more. Slices go in the order in which they came, so it is near the front;
    /// one that is held longer goes to the back.
    fn reclaimed(&mut self) -> Option<BytesMut> {
        for _ in 0..RECLAIM_TRIES.min(self.filled.len()) {
            let mut oldest = self.filled.pop_front()?;
            if oldest.try_reclaim(self.block_bytes) {
                return Some(oldest);
            }
            self.filled.push_back(oldest);
        }
        None
    }
}

#[allow(clippy::cast_possible_truncation)] // a quarter of a megabyte
const RECEIVE_BLOCK_BYTES: usize = store::RECEIVE_BLOCK_BYTES as usize;

/// Receive blocks in a block to decode into.
const PARTS: u64 = 4;

const DECODING_BLOCK_BYTES: usize = 4 * RECEIVE_BLOCK_BYTES;

/// Most bytes that are decoded at once.
pub const DECODED_BYTES_MAX: usize = DECODING_BLOCK_BYTES;

/// Blocks looked at for one that can be filled again.
const RECLAIM_TRIES: usize = 4;

/// A block with less room than this is left for a new one, so that no read is tiny.
const READ_BYTES_MIN: usize = 4096;

const _: () = assert!(READ_BYTES_MIN * 16 <= RECEIVE_BLOCK_BYTES);
const _: () = assert!(DECODED_BYTES_MAX >= crate::protocol::WAL_DATA_BYTES_MAX);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn everything_sent_arrives_in_order_and_blocks_are_numbered() {
        let sent: Vec<u8> = (0..3 * RECEIVE_BLOCK_BYTES).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let mut source = &sent[..];
        let mut reader = BlockReader::new(BlockId(7), 1 << 20);
        let (mut received, mut blocks) = (Vec::new(), Vec::new());
        while let Some((bytes, block)) = reader.read(&mut source).await.unwrap() {
            received.extend_from_slice(&bytes);
            blocks.push(block.0);
        }
        assert_eq!(received, sent);
        blocks.dedup();
        assert_eq!(blocks, [8, 9, 10]);
    }

    #[tokio::test]
    async fn a_block_is_filled_again_only_when_nobody_holds_a_slice_of_it() {
        let mut source = tokio::io::repeat(7);
        let mut reader = BlockReader::new(BlockId(0), 4 << 20);
        let (kept, _) = reader.read(&mut source).await.unwrap().unwrap();
        let mut addresses = Vec::new();
        for _ in 0..50 {
            let (bytes, block) = reader.read(&mut source).await.unwrap().unwrap();
            addresses.push((bytes.as_ptr() as usize, block.0));
        }
        assert!(addresses.iter().all(|(address, _)| *address != kept.as_ptr() as usize));
        addresses.dedup_by_key(|(_, block)| *block);
        let numbers: Vec<u64> = addresses.iter().map(|(_, block)| *block).collect();
        assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
        addresses.sort_unstable();
        addresses.dedup_by_key(|(address, _)| *address);
        assert!(addresses.len() <= 4, "{} blocks where few are enough", addresses.len());
    }

    #[test]
    fn what_is_decoded_comes_in_parts_that_are_numbered_like_received_blocks() {
        let reader = BlockReader::new(BlockId(7), 1 << 20);
        let mut decoding = reader.for_decoding(4 << 20);
        let mut decode = |len: usize, byte: u8| -> Vec<(usize, u64)> {
            let pieces = decoding.decode(len, |space| {
                assert!(space.len() == len && space.iter().all(|byte| *byte == 0));
                space.fill(byte);
                Ok::<(), ()>(())
            });
            let check = |(piece, block): (Bytes, BlockId)| {
                assert!(piece.iter().all(|other| *other == byte));
                (piece.len(), block.0)
            };
            pieces.unwrap().map(check).collect()
        };
        let part = RECEIVE_BLOCK_BYTES;
        assert_eq!(decode(100, 1), [(100, 8)]);
        assert_eq!(decode(part, 2), [(part - 100, 8), (100, 9)]);
        assert_eq!(decode(2 * part, 3), [(part - 100, 9), (part, 10), (100, 11)]);
        assert_eq!(decode(4 * part, 4), [(part, 12), (part, 13), (part, 14), (part, 15)], "a new block");
        assert_eq!(reader.current(), BlockId(15));
    }

    #[test]
    fn what_could_not_be_decoded_is_not_given_out_and_its_space_is_used_again() {
        let reader = BlockReader::new(BlockId(0), 1 << 20);
        let mut decoding = reader.for_decoding(1 << 20);
        let failed = decoding.decode(50, |space| {
            space.fill(9);
            Err("damaged")
        });
        assert_eq!(failed.err(), Some("damaged"));
        let pieces = decoding.decode(60, |space| if space == [0; 60] { Ok(()) } else { Err("not empty") });
        assert_eq!(
            pieces.unwrap().map(|(piece, block)| (piece.len(), block.0)).collect::<Vec<_>>(),
            [(60, 1)]
        );
    }

    #[test]
    fn a_block_of_decoded_bytes_is_used_again_when_nobody_holds_any() {
        let reader = BlockReader::new(BlockId(0), 1 << 20);
        let mut decoding = reader.for_decoding(8 << 20);
        let mut addresses = std::collections::BTreeSet::new();
        for _ in 0..40 {
            let pieces = decoding.decode(DECODED_BYTES_MAX, |space| {
                addresses.insert(space.as_ptr() as usize);
                Ok::<(), ()>(())
            });
            assert_eq!(pieces.unwrap().count(), 4);
        }
        assert!(addresses.len() <= 2, "{} blocks where two are enough", addresses.len());
    }
}
