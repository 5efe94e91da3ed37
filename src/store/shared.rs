//! What the threads, the receiver and the readers of one store have in common.
//!
//! Owns nothing but the parts. Order of locks, where two are held at once: retention, then `Health::tell*`, before any;
//! mappings before catalog; places_held before catalog, partials and the pool; all others are held alone. `keeping` comes before all.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::store::StoreSettings;
use crate::store::catalog::Catalog;
use crate::store::consumers::Consumers;
use crate::store::control::{Control, Identity, Layout};
use crate::store::disk::{Directory, Disk};
use crate::store::error::StoreError;
use crate::store::health::Health;
use crate::store::index::Index;
use crate::store::mapping::Mappings;
use crate::store::partials::Partials;
use crate::store::pool::Pool;
use crate::store::positions::Positions;
use crate::store::queue::{Signal, Unsynced, WriteQueue};
use crate::store::redo::Redo;
use crate::store::slots::SlotTable;
use crate::store::tail::Tail;
use crate::store::unproven::Unproven;
use crate::store::xids::Xids;
use crate::wal::{Lineage, SegmentName, SegmentNo, SegmentSize};

pub(super) struct Shared {
    pub disk: Arc<dyn Disk>,
    /// Open from the start, because syncing it must not fail for want of a descriptor.
    pub wal_dir: Arc<dyn Directory>,
    pub layout: Layout,
    pub settings: StoreSettings,
    pub health: Arc<Health>,
    pub identity: OnceLock<Identity>,
    /// The line of segments that leads to the timeline that is received.
    pub lineage: Mutex<Option<Lineage>>,
    pub control: Mutex<Option<Control>>,
    /// Held while the control file is written.
    pub control_file: Mutex<()>,
    pub positions: Mutex<Option<Positions>>,
    pub tail: Mutex<Tail>,
    pub queue: WriteQueue,
    /// How far the primary has come with its transaction ids.
    pub xids: Xids,
    /// Where a base backup that is taken now would begin.
    pub redo: Redo,
    pub unsynced: Unsynced,
    pub partials: Partials,
    pub unproven: Unproven,
    pub catalog: Mutex<Catalog>,
    pub mappings: Mappings,
    pub pool: Pool,
    pub index: Mutex<Option<Index>>,
    pub slots: SlotTable,
    /// Consumers without a slot, if WAL is kept for them.
    pub consumers: Option<Consumers>,
    /// All that may be given up has been, and there is no place for the next segment.
    pub budget_exhausted: AtomicBool,
    /// Segment files that are on their way from one place to another, or about to be made.
    pub places_held: Mutex<u64>,
    /// Held while somebody decides, by what is needed, which WAL goes, or begins to need what is there.
    pub retention: Mutex<()>,
    /// Held while the keeper works, or somebody changes what it works with.
    pub keeping: Mutex<()>,
    pub keeper: Signal,
    pub scrubber: Signal,
    /// Whether a segment is being repaired; one at a time.
    pub is_repairing: AtomicBool,
    #[cfg(test)]
    pub mutant: crate::store::simulation::Mutant,
}

impl Shared {
    /// Moves the positions and tells the observer.
    pub(super) fn publish(&self, update: impl FnOnce(&mut Positions)) {
        let change = || {
            if self.health.has_failed() {
                // Whatever was done meanwhile, nothing more is claimed.
                return None;
            }
            let mut current = self.positions.lock();
            let positions = current.as_mut()?;
            let before = *positions;
            update(positions);
            #[cfg(test)]
            let is_honest = self.mutant == crate::store::simulation::Mutant::None;
            #[cfg(not(test))]
            let is_honest = true;
            if is_honest {
                positions.assert_order(before);
            }
            Some(*positions)
        };
        self.health.tell_change(change, |observer, positions| observer.positions_changed(positions));
    }

    /// Puts the positions where another timeline begins, which may be further back, and tells the observer.
    pub(super) fn replace_positions(&self, positions: Positions) {
        let change = || {
            *self.positions.lock() = Some(positions);
            (!self.health.has_failed()).then_some(positions)
        };
        self.health.tell_change(change, |observer, positions| observer.positions_changed(positions));
    }

    /// What upstream session `epoch` has compared, and what it has replaced and synced, is all that was unproven.
    pub(super) fn prove(&self, epoch: u64) {
        if self.unproven.settle(epoch) {
            self.keeper.notify();
            self.publish(|_| ());
        }
    }

    pub(super) fn segment_size(&self) -> Result<SegmentSize, StoreError> {
        self.identity.get().map(|identity| identity.segment_size).ok_or(StoreError::NotInitialized)
    }

    /// The line of segments that leads to the timeline that is received.
    pub(super) fn lineage(&self) -> Result<Lineage, StoreError> {
        self.lineage.lock().clone().ok_or(StoreError::NotInitialized)
    }

    /// The file that holds a segment.
    pub(super) fn name_of(&self, number: SegmentNo) -> Result<SegmentName, StoreError> {
        let lineage = self.lineage.lock();
        lineage.as_ref().map(|lineage| lineage.name(number)).ok_or(StoreError::NotInitialized)
    }

    pub(super) fn positions(&self) -> Result<Positions, StoreError> {
        (*self.positions.lock()).ok_or(StoreError::NotInitialized)
    }

    /// Makes the names of WAL files durable. A failure is final: what the disk holds then is not known.
    pub(super) fn sync_wal_dir(&self) -> Result<(), StoreError> {
        #[cfg(test)]
        if self.mutant == crate::store::simulation::Mutant::NoDirectorySync {
            return Ok(());
        }
        self.wal_dir.sync().map_err(|error| self.health.fail("sync directory", &self.layout.wal_dir, &error))
    }
}
