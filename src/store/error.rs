//! What can go wrong in the store, and what that means for it.
//!
//! Owns `StoreError`, `AppendError`, `ReadError` and `Condition`. Words are PostgreSQL's where it has some for the case.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::store::disk::is_shortage;
use crate::wal::scanner::ScanError;
use crate::wal::{Lsn, SegmentName, SystemId, TimelineId};

/// An operation of the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the directory.
    #[error("data directory \"{}\" is in use by another process (lock file \"walrelay.lock\")", path.display())]
    Locked {
        /// The data directory.
        path: PathBuf,
    },
    /// A file operation failed.
    #[error("could not {operation} \"{}\"", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A file of ours does not hold what it must.
    #[error("file \"{}\" is damaged: {detail}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// The directory was written by a later version of this program.
    #[error("file \"{}\" has format {found}, this version of walrelay reads formats up to {known}", path.display())]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest known.
        known: u32,
    },
    /// There is WAL, but not the file that says whose it is.
    #[error("data directory \"{}\" holds WAL but no file \"walrelay.control\"", path.display())]
    ControlMissing {
        /// The data directory.
        path: PathBuf,
    },
    /// There is none where there should be.
    #[error("data directory \"{}\" holds no WAL", path.display())]
    NoWal {
        /// The data directory.
        path: PathBuf,
    },
    /// The index names segments, but no segment is there.
    #[error("data directory \"{}\" has lost its WAL: {segments} segments are missing from \"wal\"", path.display())]
    WalMissing {
        /// The data directory.
        path: PathBuf,
        /// Segments in the index.
        segments: usize,
    },
    /// WAL of another cluster lies in the directory.
    #[error("WAL file \"{}\" is from different database system: it has system identifier {found}, expected {expected}", path.display())]
    OtherSystem {
        /// The WAL file.
        path: PathBuf,
        /// The cluster whose directory this is.
        expected: SystemId,
        /// The cluster whose WAL it is.
        found: SystemId,
    },
    /// The store belongs to a cluster already.
    #[error("the store is initialized already, for system identifier {0}")]
    Initialized(SystemId),
    /// The store belongs to no cluster yet.
    #[error("the store is not initialized")]
    NotInitialized,
    /// Neither the start of a segment nor a place in what is held, as the case may be.
    #[error("WAL cannot be received from {start}: {reason}")]
    BadStart {
        /// The position asked for.
        start: Lsn,
        /// Why not.
        reason: &'static str,
    },
    /// What was received before could not be made durable in time.
    #[error("WAL that was received is not yet durable")]
    Busy,
    /// The history of a timeline does not fit what is held.
    #[error("timeline {next} cannot have left timeline {timeline} at {switch_lsn}: {reason}")]
    BadSwitch {
        /// The timeline that is held.
        timeline: TimelineId,
        /// The timeline that is to follow.
        next: TimelineId,
        /// Where it is said to have left it.
        switch_lsn: Lsn,
        /// Why not.
        reason: &'static str,
    },
    /// Another history file of that timeline is stored.
    #[error("history file of timeline {0} differs from the one that is stored")]
    OtherHistory(TimelineId),
    /// The segment is as it was written, or is not held any more.
    #[error("WAL segment needs no repair (timeline {}, segment number {})", .0.timeline, .0.number.0)]
    NothingToRepair(SegmentName),
    /// Another segment is being repaired.
    #[error("another WAL segment is being repaired")]
    RepairRunning,
    /// Nobody knows what was in the segment.
    #[error("the checksum of the WAL segment is not known (timeline {}, segment number {})", .0.timeline, .0.number.0)]
    ChecksumUnknown(SegmentName),
    /// What came for a segment is not as long as a segment.
    #[error("{got} bytes came for the WAL segment, expected {expected} (timeline {}, segment number {})", name.timeline, name.number.0)]
    RepairLength {
        /// The segment.
        name: SegmentName,
        /// Bytes of a segment.
        expected: u64,
        /// Bytes that came, as far as they were counted.
        got: u64,
    },
    /// What came for a segment is not what was written.
    #[error(
        "what came for the WAL segment differs from what was stored: its checksum is {found:08x}, expected {expected:08x} (timeline {}, segment number {})",
        name.timeline,
        name.number.0
    )]
    OtherContent {
        /// The segment.
        name: SegmentName,
        /// CRC-32 of what was stored.
        expected: u32,
        /// CRC-32 of what came.
        found: u32,
    },
    /// What happened before forbids any further change.
    #[error("the store has failed: {0}")]
    Failed(String),
}

impl StoreError {
    /// Whether the cause is that space (or a descriptor) could not be had, which may pass; nothing was changed.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_shortage(source))
    }

    pub(super) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { operation, path, source }
    }
}

/// WAL that arrived was not taken.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// It does not begin where the WAL before it ended.
    #[error("WAL arrived at {got}, expected {expected}")]
    Gap {
        /// End of what was taken.
        expected: Lsn,
        /// Start of what arrived.
        got: Lsn,
    },
    /// It is not valid; what was verified before stays, the rest must be fetched again.
    #[error("invalid WAL arrived")]
    Corrupt(#[source] ScanError),
    /// It is valid, but other WAL is held for the same positions on the same timeline.
    #[error("WAL at {at} on timeline {timeline} differs from what is held (up to {held_end})")]
    Diverged {
        /// First byte that differs.
        at: Lsn,
        /// End of what is held.
        held_end: Lsn,
        /// The timeline.
        timeline: TimelineId,
    },
    /// Much of what is held, and proved by nothing, differs. What came first of it is replaced; the rest will be when it is
    /// delivered again.
    #[error("too much of the WAL that is held unproved differs from what arrived, from {at} on")]
    TooMuchToReplace {
        /// What is not replaced begins here.
        at: Lsn,
    },
    /// The store cannot take anything.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// WAL could not be read back.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The segment is not held, or no longer.
    #[error("requested WAL segment is not held (timeline {}, segment number {})", .0.timeline, .0.number.0)]
    Removed(SegmentName),
    /// The timeline was left before the end of what was asked for.
    #[error("timeline {0} was left before the requested WAL")]
    TimelineLeft(TimelineId),
    /// The segment's content is not what was written; it is not served.
    #[error("WAL segment is damaged (timeline {}, segment number {}): {detail}", name.timeline, name.number.0)]
    Suspect {
        /// The segment.
        name: SegmentName,
        /// What was found.
        detail: String,
    },
    /// The disk failed.
    #[error("could not read WAL segment (timeline {}, segment number {})", name.timeline, name.number.0)]
    Io {
        /// The segment.
        name: SegmentName,
        /// Why.
        source: io::Error,
    },
}

/// Whether the store can make WAL durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It can.
    Healthy,
    /// Space, or a descriptor, could not be had. Nothing more is written until it can; heals by itself.
    NoSpace {
        /// The file that needs it.
        file: String,
        /// The system's words.
        reason: String,
    },
    /// A write, a sync or a rename failed, so that what the disk holds is not known. Final: nothing more is
    /// acknowledged; the process must end, and recovery on the next start finds out.
    Failed {
        /// What failed.
        operation: &'static str,
        /// On which file.
        file: String,
        /// The system's words.
        reason: String,
    },
}

/// Time between two attempts to allocate space that was not there.
pub const NO_SPACE_RETRY_INTERVAL: Duration = Duration::from_secs(1);
