//! The segments that are being written.
//!
//! Owns the open files of `.partial` segments and the checksum of each, computed from the received bytes as they are
//! written. There may be several: a record can be longer than segments are. Does not name or rename files.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use crc32fast::Hasher;
use parking_lot::Mutex;

use crate::store::disk::{DiskFile, read_full_at};
use crate::wal::{SegmentNo, SegmentSize};

/// A segment file that is written to.
pub(super) struct PartialSegment {
    pub file: Arc<dyn DiskFile>,
    checksum: Mutex<Checksum>,
}

impl std::fmt::Debug for PartialSegment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PartialSegment").finish_non_exhaustive()
    }
}

/// CRC-32 of the bytes from the segment's start, unless they were not written in order.
struct Checksum {
    hasher: Hasher,
    through: Option<u64>,
}

impl PartialSegment {
    /// A segment of which nothing is written yet.
    pub(super) fn empty(file: Arc<dyn DiskFile>) -> Self {
        Self { file, checksum: Mutex::new(Checksum { hasher: Hasher::new(), through: Some(0) }) }
    }

    /// A segment that was found with some bytes.
    pub(super) fn found(file: Arc<dyn DiskFile>) -> Self {
        Self { file, checksum: Mutex::new(Checksum { hasher: Hasher::new(), through: None }) }
    }

    /// `bytes` were written at `offset`.
    pub(super) fn note_written(&self, bytes: &[u8], offset: u64) {
        let mut checksum = self.checksum.lock();
        if offset == 0 {
            *checksum = Checksum { hasher: Hasher::new(), through: Some(0) };
        }
        if checksum.through == Some(offset) {
            checksum.hasher.update(bytes);
            checksum.through = Some(offset + bytes.len() as u64);
        } else {
            // Some bytes were replaced: the file is read once it is complete.
            checksum.through = None;
        }
    }

    /// CRC-32 of the whole segment, which must be written to its end.
    pub(super) fn crc(&self, size: SegmentSize) -> io::Result<u32> {
        {
            let checksum = self.checksum.lock();
            if checksum.through == Some(size.bytes()) {
                return Ok(checksum.hasher.clone().finalize());
            }
        }
        crc_of_file(&*self.file, size.bytes())
    }
}

/// CRC-32 of the first `bytes` of a file, which must have them.
pub(super) fn crc_of_file(file: &dyn DiskFile, bytes: u64) -> io::Result<u32> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut at = 0;
    while at < bytes {
        let wanted = usize::try_from(bytes - at).unwrap_or(READ_BYTES).min(READ_BYTES);
        let buffer = buffer.get_mut(..wanted).unwrap_or_default();
        if read_full_at(file, buffer, at)? < wanted {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        hasher.update(buffer);
        at += wanted as u64;
    }
    Ok(hasher.finalize())
}

/// Bytes read from a segment at a time; divides every segment size.
pub(super) const READ_BYTES: usize = 256 << 10;

/// The segments that are being written, by number.
pub(super) type Partials = Mutex<BTreeMap<SegmentNo, Arc<PartialSegment>>>;
