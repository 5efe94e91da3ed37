//! The WAL that a primary wrote, known to the checks and not to the store.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use super::random::Random;
use crate::store::unproven::Gaps;
use crate::wal::builder::WalBuilder;
use crate::wal::scanner::Scanner;
use crate::wal::{Lsn, LsnRange, PAGE_BYTES};

pub(super) struct Truth {
    pub wal: WalBuilder,
    /// Where a stream may be cut.
    pub safe_ends: BTreeSet<Lsn>,
    /// Where the primary may have flushed to.
    pub ends: Vec<Lsn>,
}

/// Different WAL for tests to choose from.
pub(super) fn truths() -> &'static [Truth] {
    static TRUTHS: OnceLock<Vec<Truth>> = OnceLock::new();
    TRUTHS.get_or_init(|| (0..TRUTHS_COUNT).map(|seed| Truth::new(seed, WalBuilder::small())).collect())
}

/// WAL that begins within a record, of a page or of several segments.
pub(super) fn truths_with_a_head() -> &'static [Truth] {
    static TRUTHS: OnceLock<Vec<Truth>> = OnceLock::new();
    let with_head = |(seed, bytes): (u64, usize)| {
        let mut random = Random::new(seed);
        let head: Vec<u8> = (0..bytes).map(|_| random.next().to_le_bytes()[0]).collect();
        Truth::new(seed, WalBuilder::small().continuing(&head))
    };
    TRUTHS.get_or_init(|| [(5, 5000), (6, 2_300_001)].into_iter().map(with_head).collect())
}

const TRUTHS_COUNT: u64 = 4;
const WAL_BYTES: u64 = 12 << 20;

impl Truth {
    fn new(seed: u64, mut wal: WalBuilder) -> Self {
        let mut random = Random::new(seed);
        let size = wal.context().segment_size;
        while wal.end().bytes_since(wal.start()) < WAL_BYTES {
            match random.below(60) {
                0 => {
                    wal.switch();
                }
                1 => {
                    // Longer than two segments.
                    wal.noise(2_300_000);
                }
                2 => {
                    // To a page boundary, often one of a segment.
                    let pages = 1 + random.below(3);
                    let left = size.bytes() - size.offset_of(wal.end());
                    let ahead =
                        if random.is_one_in(2) && left > 2 * PAGE_BYTES { left } else { pages * PAGE_BYTES };
                    let end = Lsn::new((wal.end().get() + ahead) / PAGE_BYTES * PAGE_BYTES).unwrap();
                    if end.bytes_since(wal.end()) > 200 {
                        wal.noise_up_to(end);
                    }
                }
                3 => {
                    wal.overwritten(1);
                }
                4..=12 => {
                    wal.noise(random.below_len(250_000));
                }
                13..=30 => {
                    wal.noise(random.below_len(20_000));
                }
                _ => {
                    wal.noise(random.below_len(300));
                }
            }
        }
        Self::of(wal)
    }

    pub(super) fn of(wal: WalBuilder) -> Self {
        let mut safe_ends: BTreeSet<Lsn> = wal.safe_ends().into_iter().collect();
        safe_ends.insert(wal.start());
        let after_zeros = |end: Lsn| {
            let within = wal.zero_tails().iter().find(|zeros| zeros.start() <= end && end < zeros.end());
            within.map_or(end, |zeros| zeros.end())
        };
        let ends = wal.record_ends().into_iter().map(after_zeros).collect();
        Self { safe_ends, ends, wal }
    }

    /// What no checksum covers.
    pub(super) fn gaps(&self) -> Vec<LsnRange> {
        let mut scanner = Scanner::at_segment_start(self.wal.context(), self.wal.start());
        let mut gaps = Gaps::from(self.wal.start());
        scanner.feed(self.wal.bytes(), &mut gaps).unwrap();
        gaps.of(&scanner)
    }

    /// Whether a flipped bit at this position is sure to be noticed: the checksum of its record covers it.
    pub(super) fn is_covered(&self, position: Lsn) -> bool {
        let records = self.wal.records();
        let after = records.partition_point(|record| record.end() <= position);
        position.page_offset() >= 40
            && records.get(after).is_some_and(|record| {
                record.start().advance(24) <= position && position.advance(8) < record.end()
            })
    }
}
