//! CRC-32C, the checksum of WAL records.
//!
//! Owns the choice of implementation. Checksums of this program's own files and frames are another polynomial and do
//! not belong here.

/// The checksum of `bytes` continued from `crc`, the checksum of what came before them (0 before the first byte).
pub fn extend(crc: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_the_polynomial() {
        assert_eq!(extend(0, b"123456789"), 0xE306_9283);
        assert_eq!(extend(extend(0, b"1234"), b"56789"), 0xE306_9283);
        assert_eq!(extend(0, b""), 0);
    }
}
