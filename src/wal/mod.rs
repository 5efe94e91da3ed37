//! The vocabulary of the write-ahead log, and its verification.
//!
//! To this program WAL is a sequence of bytes with positions, divided into pages and segments, on numbered timelines.
//! The bytes are checked (page headers, record chain, CRC-32C) and a few facts are read from them (commit times,
//! checkpoints, timeline switches); they are never replayed. Everything here is pure: no files, sockets, threads or clock.

#[cfg(any(test, feature = "testing"))]
pub mod builder;
pub mod checkpoint;
pub mod contents;
pub mod crc;
pub mod format;
pub mod history_hash;
pub mod insight;
pub mod lineage;
pub mod lsn;
pub mod page;
pub mod prepared;
pub mod record;
pub mod scanner;
pub mod segment;
pub mod time;
pub mod timeline;
pub mod xid;

pub use checkpoint::{CheckpointPlace, NewestCheckpoint};
pub use format::WalFormat;
pub use history_hash::HistoryHash;
pub use lineage::Lineage;
pub use lsn::{Lsn, LsnRange};
pub use record::{Record, RecordHeader, RecordVisitor};
pub use scanner::{ResumePoint, ScanContext, ScanError, Scanner};
pub use segment::{SegmentName, SegmentNo, SegmentSize};
pub use time::PgTimestamp;
pub use timeline::{TimelineHistory, TimelineId};
pub use xid::{FullXid, NextXid};

/// Size of a WAL page in bytes (`XLOG_BLCKSZ`); servers built with another value are refused.
pub const PAGE_BYTES: u64 = 8192;

/// Identifies a database cluster; assigned by `initdb`, kept by all its copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct SystemId(pub u64);

impl std::fmt::Display for SystemId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for SystemId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}
