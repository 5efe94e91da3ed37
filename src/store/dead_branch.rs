//! WAL beyond where a timeline was left: a branch that nobody goes on with.
//!
//! Owns what is remembered of one, the report that is left for people, and how its files are set aside: renamed, never
//! changed, never removed by this program. Whoever acknowledged such WAL has lost it as far as the cluster is concerned, so
//! what was in it must be told exactly.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::status::{DeadBranchStatus, Timestamp};
use crate::store::control::Layout;
use crate::store::disk::{Disk, replace_durably};
use crate::store::error::StoreError;
use crate::store::inventory::Inventory;
use crate::wal::insight::WalInsight;
use crate::wal::prepared::PreparedEnd;
use crate::wal::record::{Record, RecordVisitor};
use crate::wal::segment::SegmentFile;
use crate::wal::{Lsn, PgTimestamp, SegmentName, SegmentNo, SegmentSize, TimelineId};

/// What was held of a timeline beyond where it was left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadBranch {
    /// The timeline.
    pub timeline: TimelineId,
    /// The timeline that goes on from the fork.
    pub next: TimelineId,
    /// Where it was left.
    pub fork: Lsn,
    /// End of what was held.
    pub end: Lsn,
    /// Records from the fork to the end.
    pub records: u64,
    /// Transactions that were committed there.
    pub commits: u64,
    /// When the first of them was committed.
    pub first_commit: Option<PgTimestamp>,
    /// When the last of them was committed.
    pub last_commit: Option<PgTimestamp>,
    /// Ids of the transactions that wrote there, in the order of the ids; at most 10,000.
    pub transactions: Vec<u32>,
    /// Whether there were more, or one whose id could not be read.
    pub has_more_transactions: bool,
}

/// Transaction ids that are told of one branch.
pub(super) const TRANSACTIONS_TOLD_MAX: usize = 10_000;

/// Branches that are remembered; the files of others stay.
pub(super) const DEAD_BRANCHES_MAX: usize = 100;

/// What the names of reports begin with.
pub(super) const DIVERGED_REPORT_PREFIX: &str = "walrelay.diverged.";

/// Suffix of WAL files of a dead branch.
const DIVERGED_SUFFIX: &str = ".diverged";

/// Sees the records of a branch.
#[derive(Default)]
pub(super) struct BranchRecords {
    fork: Option<Lsn>,
    insight: WalInsight,
    records: u64,
    transactions: BTreeSet<u32>,
    has_more_transactions: bool,
}

impl RecordVisitor for BranchRecords {
    fn record(&mut self, record: &Record<'_>) {
        if self.fork.is_some_and(|fork| record.start < fork) {
            return;
        }
        self.insight.record(record);
        self.records += 1;
        match PreparedEnd::in_record(record) {
            // It may have written nothing here but its end.
            Some(PreparedEnd::Of(xid)) => self.note(xid),
            Some(PreparedEnd::Unknown) => self.has_more_transactions = true,
            None => self.note(record.header.xid),
        }
    }
}

impl BranchRecords {
    fn note(&mut self, xid: u32) {
        if xid == 0 || self.transactions.contains(&xid) {
            return;
        }
        if self.transactions.len() < TRANSACTIONS_TOLD_MAX {
            self.transactions.insert(xid);
        } else {
            self.has_more_transactions = true;
        }
    }

    /// Nothing seen yet; records that start before `fork` are not the branch's.
    pub(super) fn from(fork: Lsn) -> Self {
        Self { fork: Some(fork), ..Self::default() }
    }

    /// What is to be told of the branch of `timeline` that ends at `end`.
    pub(super) fn tell(self, timeline: TimelineId, next: TimelineId, fork: Lsn, end: Lsn) -> DeadBranch {
        DeadBranch {
            timeline,
            next,
            fork,
            end,
            records: self.records,
            commits: self.insight.commits(),
            first_commit: self.insight.first_commit().map(|commit| commit.at),
            last_commit: self.insight.last_commit().map(|commit| commit.at),
            transactions: self.transactions.into_iter().collect(),
            has_more_transactions: self.has_more_transactions,
        }
    }
}

impl DeadBranch {
    /// Bytes that were held beyond the fork.
    pub fn bytes(&self) -> u64 {
        self.end.bytes_since(self.fork)
    }

    /// The file in the data directory that tells of it.
    pub fn report_name(&self) -> String {
        format!("{DIVERGED_REPORT_PREFIX}{:08X}.{:016X}.json", self.timeline.get(), self.fork.get())
    }

    /// As it is shown to people, and written to the report.
    pub fn status(&self) -> DeadBranchStatus {
        DeadBranchStatus {
            timeline: self.timeline,
            next: self.next,
            fork: self.fork,
            end: self.end,
            bytes: self.bytes(),
            records: self.records,
            commits: self.commits,
            first_commit: self.first_commit.map(Timestamp),
            last_commit: self.last_commit.map(Timestamp),
            transactions: self.transactions.clone(),
            has_more_transactions: self.has_more_transactions,
            report: self.report_name(),
        }
    }

    /// Whether a segment file is the branch's. The one that holds the fork is: what is before the fork goes on under the
    /// next timeline's name.
    fn owns(&self, name: SegmentName, size: SegmentSize) -> bool {
        name.timeline == self.timeline && name.number >= SegmentNo::holding(self.fork, size)
    }

    /// Leaves the report, and renames the files that are still there under WAL names. Can be done again; the names are
    /// durable once `wal/` is synced.
    pub(super) fn set_aside(
        &self,
        disk: &dyn Disk,
        layout: &Layout,
        size: SegmentSize,
    ) -> Result<usize, StoreError> {
        let inventory = Inventory::take(disk, layout, size)?;
        let complete = inventory.complete.keys().map(|name| (*name, SegmentFile::Complete));
        let partial = inventory.partial.keys().map(|name| (*name, SegmentFile::Partial));
        let files: Vec<_> = complete.chain(partial).filter(|(name, _)| self.owns(*name, size)).collect();
        if files.is_empty() {
            return Ok(0);
        }
        let (report, dir) = (self.report_name(), &layout.data_dir);
        let content = serde_json::to_vec_pretty(&self.status()).unwrap_or_default();
        replace_durably(disk, dir, &report, &content).map_err(StoreError::io("write", &dir.join(&report)))?;
        let entries = disk.list(&layout.wal_dir).map_err(StoreError::io("list", &layout.wal_dir))?;
        for (name, file) in &files {
            let old = match file {
                SegmentFile::Complete => name.file_name(size),
                SegmentFile::Partial => name.partial_file_name(size),
            };
            let taken = |name: &String| entries.iter().any(|entry| entry.name == *name);
            let names = (0..).map(|count: u32| match count {
                0 => format!("{old}{DIVERGED_SUFFIX}"),
                _ => format!("{old}{DIVERGED_SUFFIX}.{count}"),
            });
            let aside = names.into_iter().find(|name| !taken(name)).unwrap_or_default();
            let (from, to) = (layout.wal(&old), layout.wal(&aside));
            disk.rename(&from, &to).map_err(StoreError::io("rename", &from))?;
        }
        Ok(files.len())
    }
}
