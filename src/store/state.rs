//! State files: small files that are read whole and replaced whole.
//!
//! Owns their frame: magic, version, length, CRC-32, and a JSON payload. A crash leaves the old content or the new one,
//! never a mixture; anything else is damage and refused. Does not know what the payloads mean.
//!
//! ```text
//! 0        8         12       16      20
//! ┌────────┬─────────┬────────┬───────┬─────────┐
//! │ magic  │ version │ length │ CRC   │ JSON ...│   integers little-endian; the CRC covers the JSON
//! └────────┴─────────┴────────┴───────┴─────────┘
//! ```

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::store::disk::{Disk, read_small, replace_durably};
use crate::store::error::StoreError;

/// One kind of state file.
#[derive(Clone, Copy, Debug)]
pub(super) struct StateFile {
    /// File name in the data directory.
    pub name: &'static str,
    /// First 8 bytes.
    pub magic: [u8; 8],
    /// Format that is written, and the newest that is read.
    pub version: u32,
}

impl StateFile {
    /// Reads the file; `None` when there is none.
    pub(super) fn read<T: DeserializeOwned>(
        &self,
        disk: &dyn Disk,
        dir: &Path,
    ) -> Result<Option<T>, StoreError> {
        let path = dir.join(self.name);
        let content = read_small(disk, &path, STATE_FILE_BYTES_MAX).map_err(StoreError::io("read", &path))?;
        let Some(content) = content else { return Ok(None) };
        let damaged = |detail: &str| StoreError::Damaged { path: path.clone(), detail: detail.to_owned() };
        let (magic, rest) = content.split_first_chunk::<8>().ok_or_else(|| damaged("too short"))?;
        if *magic != self.magic {
            return Err(damaged("wrong magic number"));
        }
        let mut rest = rest;
        let mut word = || {
            let (word, after) = rest.split_first_chunk::<4>().ok_or_else(|| damaged("too short"))?;
            rest = after;
            Ok::<_, StoreError>(u32::from_le_bytes(*word))
        };
        let (version, length, crc) = (word()?, word()?, word()?);
        if version > self.version {
            return Err(StoreError::NewerFormat { path, found: version, known: self.version });
        }
        let payload = usize::try_from(length).ok().and_then(|length| rest.get(..length));
        let payload = payload.ok_or_else(|| damaged("too short"))?;
        if crc32fast::hash(payload) != crc {
            return Err(damaged("wrong checksum"));
        }
        serde_json::from_slice(payload).map(Some).map_err(|error| damaged(&error.to_string()))
    }

    /// Replaces the file durably.
    pub(super) fn write<T: Serialize>(
        &self,
        disk: &dyn Disk,
        dir: &Path,
        value: &T,
    ) -> Result<(), StoreError> {
        let path = dir.join(self.name);
        let payload = serde_json::to_vec(value)
            .map_err(|error| StoreError::Damaged { path: path.clone(), detail: error.to_string() })?;
        let length = u32::try_from(payload.len())
            .ok()
            .filter(|_| payload.len() + HEADER_BYTES <= STATE_FILE_BYTES_MAX)
            .ok_or_else(|| StoreError::Damaged { path: path.clone(), detail: "too long".to_owned() })?;
        let mut content = Vec::with_capacity(HEADER_BYTES + payload.len());
        content.extend_from_slice(&self.magic);
        for word in [self.version, length, crc32fast::hash(&payload)] {
            content.extend_from_slice(&word.to_le_bytes());
        }
        content.extend_from_slice(&payload);
        replace_durably(disk, dir, self.name, &content).map_err(StoreError::io("write", &path))
    }
}

const HEADER_BYTES: usize = 20;

/// Longest state file.
const STATE_FILE_BYTES_MAX: usize = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::disk::{OpenMode, RealDisk, write_all_at};

    const FILE: StateFile = StateFile { name: "state", magic: *b"WRTEST\0\0", version: 2 };

    #[test]
    fn what_was_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(FILE.read::<Vec<u32>>(&RealDisk, dir.path()).unwrap(), None);
        FILE.write(&RealDisk, dir.path(), &vec![1_u32, 2]).unwrap();
        assert_eq!(FILE.read::<Vec<u32>>(&RealDisk, dir.path()).unwrap(), Some(vec![1, 2]));
    }

    #[test]
    fn damage_and_newer_formats_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        FILE.write(&RealDisk, dir.path(), &"payload").unwrap();
        let newer = StateFile { version: 1, ..FILE };
        let error = newer.read::<String>(&RealDisk, dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::NewerFormat { found: 2, known: 1, .. }), "{error}");
        let file = RealDisk.open(&dir.path().join("state"), OpenMode::Write).unwrap();
        for at in 0..file.bytes().unwrap() {
            let mut byte = [0];
            file.read_at(&mut byte, at).unwrap();
            write_all_at(&*file, &[byte[0] ^ 0x40], at).unwrap();
            assert!(FILE.read::<String>(&RealDisk, dir.path()).is_err(), "byte {at}");
            write_all_at(&*file, &byte, at).unwrap();
        }
        FILE.read::<String>(&RealDisk, dir.path()).unwrap();
    }
}
