//! What is held and proved by nothing.
//!
//! Owns the list of those ranges: no record's checksum covers them, and recovery took them over from files that may have
//! been torn before their first sync. They are where the end of a record lies that began before what is held, and where
//! a record was never completed (XLOG_OVERWRITE_CONTRECORD). The list is made by recovery, never grows, and is emptied as
//! a whole, by the session that has compared everything; until then no segment with a part of it is sealed.

use parking_lot::Mutex;

use crate::wal::record::{Record, RecordVisitor};
use crate::wal::scanner::Scanner;
use crate::wal::scanner::overwritten_record;
use crate::wal::{Lsn, LsnRange};

/// The ranges, and which upstream session may prove them.
#[derive(Default)]
pub(super) struct Unproven(Mutex<State>);

#[derive(Default)]
struct State {
    /// In order.
    ranges: Vec<LsnRange>,
    /// Upstream session; what earlier ones have compared does not count.
    epoch: u64,
}

impl Unproven {
    pub(super) fn new(ranges: Vec<LsnRange>) -> Self {
        Self(Mutex::new(State { ranges, epoch: 0 }))
    }

    /// The first unproven position.
    pub(super) fn first(&self) -> Option<Lsn> {
        self.0.lock().ranges.first().map(|range| range.start())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().ranges.is_empty()
    }

    /// A new upstream session; what it has to compare.
    pub(super) fn begin(&self, epoch: u64) -> Vec<LsnRange> {
        let mut state = self.0.lock();
        state.epoch = epoch;
        state.ranges.clone()
    }

    /// Session `epoch` has proved everything, unless another one has begun: that may still replace bytes. Whether
    /// anything was unproven until now.
    pub(super) fn settle(&self, epoch: u64) -> bool {
        let mut state = self.0.lock();
        let is_settled = state.epoch == epoch && !state.ranges.is_empty();
        if is_settled {
            state.ranges.clear();
        }
        is_settled
    }

    /// What lies behind `end` is not held any more.
    pub(super) fn cut(&self, end: Lsn) {
        let mut state = self.0.lock();
        let within = |range: &LsnRange| LsnRange::new(range.start(), range.end().min(end));
        state.ranges = state.ranges.iter().filter_map(within).collect();
    }

    #[cfg(test)]
    pub(super) fn ranges(&self) -> Vec<LsnRange> {
        self.0.lock().ranges.clone()
    }
}

/// Finds, in a scan, the bytes that no checksum covers.
pub(super) struct Gaps {
    /// Where the scan began.
    start: Lsn,
    /// The first record.
    pub first: Option<Lsn>,
    found: Vec<LsnRange>,
}

impl Gaps {
    pub(super) fn from(start: Lsn) -> Self {
        Self { start, first: None, found: Vec::new() }
    }

    /// All that were found, in order, by the scan of `scanner`.
    pub(super) fn of(self, scanner: &Scanner) -> Vec<LsnRange> {
        let head = scanner.head_end().and_then(|end| LsnRange::new(self.start, end));
        head.into_iter().chain(self.found).filter(|gap| gap.end() <= scanner.verified_end()).collect()
    }
}

impl RecordVisitor for Gaps {
    fn record(&mut self, record: &Record<'_>) {
        self.first.get_or_insert(record.start);
        if let Some(overwritten) = overwritten_record(record) {
            // It is the first on its page; the page before was the last of the other.
            let end = record.start.page_start().unwrap_or(record.start);
            self.found.extend(LsnRange::new(overwritten.max(self.start), end));
        }
    }
}
