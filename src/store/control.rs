//! Whose WAL this directory holds, and where its files are.
//!
//! Owns the control file `walrelay.control` and the names of all other files. The control file is written when the store
//! is initialized and when one of its facts changes, and before each such change it is checked that no other process
//! has taken the directory (a lock does not hold on every network file system).

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::store::dead_branch::DeadBranch;
use crate::store::disk::Disk;
use crate::store::error::StoreError;
use crate::store::state::StateFile;
use crate::wal::timeline::Ancestor;
use crate::wal::{Lineage, Lsn, SegmentName, SegmentSize, SystemId, TimelineId};

/// Whose WAL a store holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub system_id: SystemId,
    /// Its `wal_segment_size`.
    pub segment_size: SegmentSize,
}

/// What the upstream said about itself, for answers while it is away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerFacts {
    /// `server_version`, as the server prints it.
    pub version: String,
    /// `server_version_num`.
    pub version_num: u32,
    /// Other settings by name.
    pub settings: BTreeMap<String, String>,
}

/// Content of the control file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Control {
    pub system_id: SystemId,
    pub segment_bytes: u64,
    /// The timeline that is received.
    pub timeline: TimelineId,
    /// Its ancestors, oldest first.
    #[serde(default)]
    pub ancestors: Vec<Ancestor>,
    /// Where this store began: the start of a segment.
    pub start: Lsn,
    /// Names this directory among all; given once.
    pub instance: String,
    /// Names the process that has the directory open; given at each start.
    pub owner: String,
    pub facts: Option<ServerFacts>,
    /// What was held beyond where a timeline was left, oldest first.
    #[serde(default)]
    pub dead_branches: Vec<DeadBranch>,
}

impl Control {
    /// Reads the control file; `None` in a fresh directory.
    pub(super) fn read(disk: &dyn Disk, layout: &Layout) -> Result<Option<Self>, StoreError> {
        let control: Option<Self> = CONTROL_FILE.read(disk, &layout.data_dir)?;
        if let Some(control) = &control {
            control.identity(layout)?;
        }
        Ok(control)
    }

    /// Makes this the content of the control file.
    pub(super) fn write(&self, disk: &dyn Disk, layout: &Layout) -> Result<(), StoreError> {
        CONTROL_FILE.write(disk, &layout.data_dir, self)
    }

    /// Fails if another process has taken the directory since this one opened it.
    pub(super) fn check_owner(&self, disk: &dyn Disk, layout: &Layout) -> Result<(), StoreError> {
        match Self::read(disk, layout)? {
            Some(on_disk) if on_disk.owner == self.owner => Ok(()),
            _ => Err(StoreError::Locked { path: layout.data_dir.clone() }),
        }
    }

    /// The line of segments that leads to the timeline.
    pub(super) fn lineage(&self, size: SegmentSize) -> Lineage {
        Lineage::new(self.timeline, self.ancestors.clone(), size)
    }

    pub(super) fn identity(&self, layout: &Layout) -> Result<Identity, StoreError> {
        let segment_size = SegmentSize::new(self.segment_bytes).map_err(|error| StoreError::Damaged {
            path: layout.data_dir.join(CONTROL_FILE.name),
            detail: error.to_string(),
        })?;
        Ok(Identity { system_id: self.system_id, segment_size })
    }
}

const CONTROL_FILE: StateFile = StateFile { name: "walrelay.control", magic: *b"WRCTRL\0\0", version: 2 };

/// A name that nobody else has; not secret.
pub fn unique_name() -> String {
    let half = || RandomState::new().hash_one(std::process::id());
    format!("{:016x}{:016x}", half(), half())
}

/// Where the files are.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub data_dir: PathBuf,
    pub wal_dir: PathBuf,
}

impl Layout {
    pub(super) fn new(data_dir: &Path) -> Self {
        Self { data_dir: data_dir.to_path_buf(), wal_dir: data_dir.join("wal") }
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.data_dir.join("walrelay.lock")
    }

    pub(super) fn wal(&self, name: &str) -> PathBuf {
        self.wal_dir.join(name)
    }

    pub(super) fn complete(&self, name: SegmentName, size: SegmentSize) -> PathBuf {
        self.wal_dir.join(name.file_name(size))
    }

    pub(super) fn partial(&self, name: SegmentName, size: SegmentSize) -> PathBuf {
        self.wal_dir.join(name.partial_file_name(size))
    }
}

/// Beginning of the names of files of segment size that hold nothing.
pub(super) const SPARE_PREFIX: &str = "walrelay.spare.";

/// The file of segment size that recovery may always use, so that a full disk cannot stop it.
pub(super) const RESERVE_NAME: &str = "walrelay.reserve";
