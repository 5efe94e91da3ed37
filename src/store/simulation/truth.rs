//! The WAL that a primary wrote, known to the checks and not to the store.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use super::random::Random;
use crate::wal::builder::WalBuilder;
use crate::wal::{Lsn, PAGE_BYTES};

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
    TRUTHS.get_or_init(|| (0..TRUTHS_COUNT).map(Truth::new).collect())
}

const TRUTHS_COUNT: u64 = 4;
const WAL_BYTES: u64 = 12 << 20;

impl Truth {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut wal = WalBuilder::small();
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
        let mut safe_ends: BTreeSet<Lsn> = wal.safe_ends().into_iter().collect();
        safe_ends.insert(wal.start());
        let after_zeros = |end: Lsn| {
            let within = wal.zero_tails().iter().find(|zeros| zeros.start() <= end && end < zeros.end());
            within.map_or(end, |zeros| zeros.end())
        };
        let ends = wal.record_ends().into_iter().map(after_zeros).collect();
        Self { safe_ends, ends, wal }
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
