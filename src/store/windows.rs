//! WAL that was acknowledged upstream while it was durable here alone.
//!
//! Owns the state file `walrelay.windows`. What it says outlives the process: it is written before the first such
//! acknowledgement of a window, whose end then is not known. A window that is open in the file is taken to reach as far as
//! recovery has found WAL, for no more than that was acknowledged: it claims too much rather than too little.

use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::store::Store;
use crate::store::error::StoreError;
use crate::store::shared::Shared;
use crate::store::state::StateFile;
use crate::wal::{Lsn, TimelineId};

/// A stretch of such WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcknowledgedAlone {
    /// Its start.
    pub from: Lsn,
    /// Its end; of an open one, as far as was known.
    pub to: Lsn,
    /// Whether the standbys were still without it.
    pub open: bool,
    /// The timeline that was received; unknown in files of before it was told.
    #[serde(default)]
    pub timeline: Option<TimelineId>,
    /// Whether that was left before it.
    #[serde(default)]
    pub left: bool,
}

/// The windows of an open store; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct WindowsFile(Arc<Mutex<Vec<AcknowledgedAlone>>>);

impl WindowsFile {
    /// Reads them, after recovery.
    pub(super) fn read(shared: &Shared) -> Result<Self, StoreError> {
        let windows: Option<Vec<AcknowledgedAlone>> =
            WINDOWS_FILE.read(&*shared.disk, &shared.layout.data_dir)?;
        let mut windows = windows.unwrap_or_default();
        for window in windows.iter_mut().filter(|window| window.open) {
            window.to = window.to.max(reached(shared, window.timeline).unwrap_or(window.to));
        }
        Ok(Self(Arc::new(Mutex::new(windows))))
    }
}

/// How far WAL was ever durable on a timeline, the one that is received if it is not known.
fn reached(shared: &Shared, timeline: Option<TimelineId>) -> Option<Lsn> {
    let positions = (*shared.positions.lock())?;
    let timeline = timeline.filter(|timeline| *timeline != positions.timeline);
    let Some(timeline) = timeline else { return Some(positions.verified) };
    let control = shared.control.lock().clone()?;
    let beyond =
        control.dead_branches.iter().filter(|branch| branch.timeline == timeline).map(|branch| branch.end);
    let fork = shared.lineage().ok().and_then(|lineage| lineage.left(timeline)).map(|(fork, _)| fork);
    beyond.chain(fork).max()
}

impl Store {
    /// What was acknowledged while it was durable here alone, oldest first.
    pub fn acknowledged_alone(&self) -> Vec<AcknowledgedAlone> {
        self.windows.0.lock().clone()
    }

    /// Remembers it; durable on return. Blocks.
    pub fn remember_acknowledged_alone(&self, windows: Vec<AcknowledgedAlone>) -> Result<(), StoreError> {
        self.shared.health.check()?;
        let Shared { disk, layout, .. } = &*self.shared;
        let _file = self.shared.control_file.lock();
        if let Some(control) = self.shared.control.lock().clone() {
            control.check_owner(&**disk, layout)?;
        }
        let written = WINDOWS_FILE.write(&**disk, &layout.data_dir, &windows);
        written.map_err(|error| self.shared.health.judge(error))?;
        *self.windows.0.lock() = windows;
        Ok(())
    }
}

const WINDOWS_FILE: StateFile = StateFile { name: "walrelay.windows", magic: *b"WRWINDOW", version: 1 };
