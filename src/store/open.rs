//! Opening a data directory.
//!
//! Owns the order: lock, identity, recovery, and only then the parts that work with it. Refuses what is not ours, and
//! what cannot be understood; never guesses.

use std::any::Any;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::store::StoreSettings;
use crate::store::catalog::Catalog;
use crate::store::consumers::Consumers;
use crate::store::control::{Control, Layout, unique_name};
use crate::store::disk::{Disk, sync_dir};
use crate::store::error::StoreError;
use crate::store::health::{Health, Observer};
use crate::store::inventory::{has_wal, remove_temporaries};
use crate::store::mapping::Mappings;
use crate::store::pool::Pool;
use crate::store::positions::Positions;
use crate::store::queue::{Signal, Unsynced, WriteQueue};
use crate::store::recovery::{Recovered, Recovery};
use crate::store::redo::Redo;
use crate::store::shared::Shared;
use crate::store::slots::SlotTable;
use crate::store::tail::Tail;
use crate::store::unproven::Unproven;
use crate::store::xids::Xids;
use crate::wal::scanner::Scanner;

/// An open store, before its threads run.
pub(super) struct Opened {
    pub shared: Arc<Shared>,
    /// At the verified end; `None` in a fresh directory.
    pub scanner: Option<Scanner>,
    pub has_reserve: bool,
    /// Dropped last.
    pub lock: Box<dyn Any + Send + Sync>,
    pub notes: Vec<String>,
}

/// For tests: a planted bug.
#[cfg(test)]
pub(super) type Variant = crate::store::simulation::Mutant;
/// There is only the right way.
#[cfg(not(test))]
#[derive(Clone, Copy, Default)]
pub(super) enum Variant {
    #[default]
    Right,
}

pub(super) fn open(
    settings: StoreSettings,
    disk: Arc<dyn Disk>,
    observer: Arc<dyn Observer>,
    variant: Variant,
) -> Result<Opened, StoreError> {
    let layout = directories(&*disk, &settings)?;
    let lock = lock(&*disk, &layout)?;
    let control = take_over(&*disk, &layout)?;
    remove_temporaries(&*disk, &layout)?;
    let pool = Pool::default();
    let recovered =
        control.map(|control| recover(&*disk, &layout, (control, &pool), &settings, variant)).transpose()?;
    // Names that came into being before an earlier process ended are durable from here on.
    sync_dir(&*disk, &layout.data_dir).map_err(StoreError::io("sync directory", &layout.data_dir))?;
    let health = Arc::new(Health::new(observer));
    let slots =
        SlotTable::open(disk.clone(), layout.clone(), health.clone(), settings.max_replication_slots)?;
    #[cfg(test)]
    if variant == crate::store::simulation::Mutant::ForgetInvalidations {
        slots.forget_invalidations();
    }
    let line = recovered.as_ref().map(Recovered::line);
    let xids = Xids::open(disk.clone(), layout.clone(), health.clone())?;
    let redo = Redo::open(disk.clone(), layout.clone(), health.clone(), line)?;
    let retain = settings.limits.retain_without_slot;
    let consumers = Consumers::open(disk.clone(), layout.clone(), health.clone(), retain)?;
    let wal_dir = disk.open_dir(&layout.wal_dir).map_err(StoreError::io("open", &layout.wal_dir))?;
    let identity = OnceLock::new();
    if let Some(Recovered { control, .. }) = &recovered {
        let _ = identity.set(control.identity(&layout)?);
    }
    let shared = Shared {
        tail: Mutex::new(Tail::new(settings.tail_bytes_max)),
        queue: WriteQueue::new(settings.unwritten_bytes_max),
        disk,
        layout,
        settings,
        health,
        identity,
        lineage: Mutex::new(None),
        control: Mutex::new(None),
        control_file: Mutex::new(()),
        wal_dir,
        positions: Mutex::new(None),
        xids,
        redo,
        unsynced: Unsynced::default(),
        partials: Mutex::default(),
        unproven: Unproven::default(),
        catalog: Mutex::new(Catalog::default()),
        mappings: Mappings::default(),
        pool,
        index: Mutex::new(None),
        slots,
        consumers,
        budget_exhausted: AtomicBool::new(false),
        places_held: Mutex::default(),
        retention: Mutex::default(),
        keeping: Mutex::default(),
        keeper: Signal::default(),
        scrubber: Signal::default(),
        is_repairing: AtomicBool::new(false),
        #[cfg(test)]
        mutant: variant,
    };
    #[cfg(not(test))]
    let Variant::Right = variant;
    Ok(assemble(shared, recovered, lock))
}

fn directories(disk: &dyn Disk, settings: &StoreSettings) -> Result<Layout, StoreError> {
    let layout = Layout::new(&settings.data_dir);
    for dir in [&layout.data_dir, &layout.wal_dir] {
        disk.create_dir(dir).map_err(StoreError::io("use directory", dir))?;
    }
    Ok(layout)
}

fn recover(
    disk: &dyn Disk,
    layout: &Layout,
    (control, pool): (Control, &Pool),
    settings: &StoreSettings,
    #[cfg_attr(not(test), allow(unused_variables, reason = "a planted bug"))] variant: Variant,
) -> Result<Recovered, StoreError> {
    let spares = 2 * settings.spare_segments as usize;
    #[allow(unused_mut, reason = "changed in tests")]
    let mut recovery = Recovery::new(disk, layout, control, pool, spares)?;
    #[cfg(test)]
    {
        recovery.mutant = variant;
    }
    recovery.run()
}

fn assemble(mut shared: Shared, recovered: Option<Recovered>, lock: Box<dyn Any + Send + Sync>) -> Opened {
    let Some(recovered) = recovered else {
        return Opened {
            shared: Arc::new(shared),
            scanner: None,
            has_reserve: false,
            lock,
            notes: Vec::new(),
        };
    };
    shared.unproven = Unproven::new(recovered.unproven);
    let Positions { timeline, verified, .. } = recovered.positions;
    shared.tail.lock().begin_timeline(timeline, verified);
    *shared.positions.lock() = Some(recovered.positions);
    *shared.lineage.lock() = Some(recovered.lineage);
    *shared.control.lock() = Some(recovered.control);
    *shared.partials.lock() = recovered.partials;
    *shared.catalog.lock() = recovered.catalog;
    *shared.index.lock() = Some(recovered.index);
    let mut notes = recovered.notes;
    for (name, detail) in &recovered.damaged {
        shared.health.observer.suspect(*name, detail);
    }
    notes.extend(settle_consumers(&shared));
    shared.keeper.notify();
    Opened {
        shared: Arc::new(shared),
        scanner: Some(recovered.scanner),
        has_reserve: recovered.has_reserve,
        lock,
        notes,
    }
}

/// Consumers are where the files of this directory say, and where there is WAL: the two may be of different times, and a tail may
/// have been lost. Returns what a person should know.
pub(super) fn settle_consumers(shared: &Shared) -> Vec<String> {
    let (Some(oldest), Ok(positions)) = (shared.oldest(), shared.positions()) else { return Vec::new() };
    if let Some(consumers) = &shared.consumers {
        consumers.settle(oldest, positions.verified);
    }
    shared.slots.settle(oldest, positions.verified)
}

pub(super) fn lock(disk: &dyn Disk, layout: &Layout) -> Result<Box<dyn Any + Send + Sync>, StoreError> {
    let path = layout.lock();
    disk.lock(&path, &format!("{}\n", std::process::id())).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => StoreError::Locked { path: layout.data_dir.clone() },
        _ => StoreError::io("lock", &path)(error),
    })
}

/// Reads whose directory this is, and makes it this process's.
fn take_over(disk: &dyn Disk, layout: &Layout) -> Result<Option<Control>, StoreError> {
    let Some(mut control) = Control::read(disk, layout)? else {
        if has_wal(disk, layout)? {
            return Err(StoreError::ControlMissing { path: layout.data_dir.clone() });
        }
        return Ok(None);
    };
    let before = control.clone();
    control.owner = unique_name();
    match control.write(disk, layout) {
        Ok(()) => Ok(Some(control)),
        // The lock alone must do then: what is held is to be served also from a full disk.
        Err(error) if error.is_no_space() => Ok(Some(before)),
        Err(error) => Err(error),
    }
}
