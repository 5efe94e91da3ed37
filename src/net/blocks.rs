//! Receive buffers whose contents can be kept without copying.
//!
//! Owns the current block: bytes are read from the socket straight into it and handed out as slices that keep the block
//! alive. A block whose slices are all gone is filled again under a new number: fresh memory costs a page fault every
//! 4 KiB, which is more than receiving into it. Never copies what it received, never grows a block.

use std::collections::VecDeque;
use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::store::{self, BlockId};

/// Reads a stream into blocks of [`store::RECEIVE_BLOCK_BYTES`].
#[derive(Debug)]
pub struct BlockReader {
    block: BytesMut,
    number: u64,
    /// Blocks that were filled, oldest first; most are still in use.
    filled: VecDeque<BytesMut>,
    filled_max: usize,
}

impl BlockReader {
    /// `first_block` must not have been used before in this process: memory is accounted by block number. Blocks of
    /// `kept_bytes` in all, as many as the store keeps in use, are remembered to be filled again.
    pub fn new(first_block: BlockId, kept_bytes: u64) -> Self {
        let filled_max =
            usize::try_from(kept_bytes / store::RECEIVE_BLOCK_BYTES).unwrap_or(usize::MAX).max(1);
        Self { block: BytesMut::new(), number: first_block.0, filled: VecDeque::new(), filled_max }
    }

    /// Waits for bytes; `None` at the end of the stream. Cancel-safe: nothing is lost when the future is dropped.
    pub async fn read(
        &mut self,
        source: &mut (impl AsyncRead + Unpin),
    ) -> io::Result<Option<(Bytes, BlockId)>> {
        if self.block.capacity() - self.block.len() < READ_BYTES_MIN {
            self.next_block();
        }
        let read = source.read_buf(&mut self.block).await?;
        Ok((read > 0).then(|| (self.block.split_to(read).freeze(), BlockId(self.number))))
    }

    fn next_block(&mut self) {
        self.number += 1;
        let next = self.reclaimed().unwrap_or_else(|| BytesMut::with_capacity(RECEIVE_BLOCK_BYTES));
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
            if oldest.try_reclaim(RECEIVE_BLOCK_BYTES) {
                return Some(oldest);
            }
            self.filled.push_back(oldest);
        }
        None
    }

    /// The block that was last read into.
    pub fn current(&self) -> BlockId {
        BlockId(self.number)
    }
}

#[allow(clippy::cast_possible_truncation)] // a quarter of a megabyte
const RECEIVE_BLOCK_BYTES: usize = store::RECEIVE_BLOCK_BYTES as usize;

/// Blocks looked at for one that can be filled again.
const RECLAIM_TRIES: usize = 4;

/// A block with less room than this is left for a new one, so that no read is tiny.
const READ_BYTES_MIN: usize = 4096;

const _: () = assert!(READ_BYTES_MIN * 16 <= RECEIVE_BLOCK_BYTES);

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
}
