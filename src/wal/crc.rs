//! CRC-32C, the checksum of WAL records.
//!
//! Owns the choice of implementation. Checksums of this program's own files and frames are another polynomial and do
//! not belong here.
//!
//! Most records are short: some 70 bytes in WAL of small transactions. The crate, which is quickest for long inputs,
//! spends 15 ns on the two parts of such a record, which alone would keep a scan with [`WalInsight`] below 3 GB/s on one
//! core; the processor's instruction, inlined, needs 4 ns (`benches/scan.rs`). So short inputs take that way where
//! there is one.
//!
//! [`WalInsight`]: crate::wal::insight::WalInsight

use crate::wal::record::RECORD_HEADER_CHECKED_BYTES;

/// The checksum of `bytes` continued from `crc`, the checksum of what came before them (0 before the first byte).
pub fn extend(crc: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc, bytes)
}

/// The checksum of a record: of what follows its header, then of its header up to the checksum itself.
#[inline]
pub fn of_record(header: &[u8; RECORD_HEADER_CHECKED_BYTES], body: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if body.len() <= SHORT_BYTES_MAX && is_x86_feature_detected!("sse4.2") {
        #[allow(
            unsafe_code,
            reason = "the only condition of the call, that the processor has SSE 4.2, was just checked"
        )]
        // SAFETY: `short_record` is a safe function but for `target_feature(enable = "sse4.2")`.
        return unsafe { short_record(header, body) };
    }
    extend(extend(0, body), header)
}

/// Up to this length one instruction after another is quicker than the crate, which computes three streams at a time.
#[cfg(target_arch = "x86_64")]
const SHORT_BYTES_MAX: usize = 1024;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
fn short_record(header: &[u8; RECORD_HEADER_CHECKED_BYTES], body: &[u8]) -> u32 {
    !short(short(!0, body), header)
}

/// Continues the state of a checksum, which is its complement.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
fn short(state: u32, bytes: &[u8]) -> u32 {
    use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u32, _mm_crc32_u64};
    let (words, mut rest) = bytes.as_chunks::<8>();
    let state =
        words.iter().fold(u64::from(state), |state, word| _mm_crc32_u64(state, u64::from_le_bytes(*word)));
    // The instruction leaves the upper half zero.
    let mut state = (state & 0xFFFF_FFFF) as u32;
    if let Some((half, after)) = rest.split_first_chunk() {
        state = _mm_crc32_u32(state, u32::from_le_bytes(*half));
        rest = after;
    }
    rest.iter().fold(state, |state, byte| _mm_crc32_u8(state, *byte))
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

    #[test]
    fn records_of_all_lengths_have_the_checksum_that_the_crate_computes() {
        let bytes: Vec<u8> =
            (0..2000_u32).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[2]).collect();
        for length in 0..1100 {
            for start in [0, 1, 3, 7] {
                let header = bytes[start..].first_chunk().unwrap();
                let body = &bytes[start + 20..][..length];
                let of_parts = crc32c::crc32c_append(crc32c::crc32c(body), header);
                assert_eq!(of_record(header, body), of_parts, "{length} bytes from {start}");
                let whole = [body, &header[..]].concat();
                assert_eq!(of_record(header, body), crc32c::crc32c(&whole), "{length} bytes from {start}");
            }
        }
    }
}
