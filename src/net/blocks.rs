//! Receive buffers whose contents can be kept without copying.
//!
//! Owns the current block: bytes are read from the socket straight into it and handed out as slices that keep the block
//! alive. Never copies what it received, never grows a block.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::store::{self, BlockId};

/// Reads a stream into blocks of [`store::RECEIVE_BLOCK_BYTES`].
#[derive(Debug)]
pub struct BlockReader {
    block: BytesMut,
    number: u64,
}

impl BlockReader {
    /// `first_block` must not have been used before in this process: memory is accounted by block number.
    pub fn new(first_block: BlockId) -> Self {
        Self { block: BytesMut::new(), number: first_block.0 }
    }

    /// Waits for bytes; `None` at the end of the stream. Cancel-safe: nothing is lost when the future is dropped.
    pub async fn read(
        &mut self,
        source: &mut (impl AsyncRead + Unpin),
    ) -> io::Result<Option<(Bytes, BlockId)>> {
        if self.block.capacity() - self.block.len() < READ_BYTES_MIN {
            self.block = BytesMut::with_capacity(RECEIVE_BLOCK_BYTES);
            self.number += 1;
        }
        let read = source.read_buf(&mut self.block).await?;
        Ok((read > 0).then(|| (self.block.split_to(read).freeze(), BlockId(self.number))))
    }

    /// The block that was last read into.
    pub fn current(&self) -> BlockId {
        BlockId(self.number)
    }
}

#[allow(clippy::cast_possible_truncation)] // a quarter of a megabyte
const RECEIVE_BLOCK_BYTES: usize = store::RECEIVE_BLOCK_BYTES as usize;

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
        let mut reader = BlockReader::new(BlockId(7));
        let (mut received, mut blocks) = (Vec::new(), Vec::new());
        while let Some((bytes, block)) = reader.read(&mut source).await.unwrap() {
            received.extend_from_slice(&bytes);
            blocks.push(block.0);
        }
        assert_eq!(received, sent);
        blocks.dedup();
        assert_eq!(blocks, [8, 9, 10]);
    }
}
