//! Where a store begins.
//!
//! Owns what is made durable when a directory becomes the store of a cluster, and the second thoughts: as long as nothing
//! is held, the store can be begun elsewhere, because the upstream may not have the WAL any more with which it was to
//! begin. Never gives up a byte that was verified.

use std::collections::BTreeMap;
use std::io;

use crate::store::control::{Control, Identity, unique_name};
use crate::store::error::StoreError;
use crate::store::index::Index;
use crate::store::open::settle_consumers;
use crate::store::positions::Positions;
use crate::store::rewrite::DETACHED_SUFFIX;
use crate::store::writer::{Crossings, WalWriter};
use crate::wal::scanner::{ScanContext, Scanner};
use crate::wal::{Lineage, Lsn, NextXid, SegmentSize, TimelineId};

/// Positions from here on are nonsense: a log does not grow to 8 EiB. Far enough from the end of the address space for
/// all arithmetic.
const START_LIMIT: u64 = 1 << 63;

impl WalWriter {
    /// Makes a fresh directory the store of a cluster, to begin at `start`, the start of a segment; durable on return.
    /// As long as the store [holds nothing](Self::holds_nothing) it can be begun anew for the same cluster, elsewhere or
    /// on another timeline; positions may go back then. Blocks.
    pub fn initialize(
        &mut self,
        identity: Identity,
        timeline: TimelineId,
        start: Lsn,
    ) -> Result<(), StoreError> {
        self.shared.health.check()?;
        if let Some(known) = self.shared.identity.get()
            && (*known != identity || !self.holds_nothing() || self.has_detached()?)
        {
            return Err(StoreError::Initialized(known.system_id));
        }
        check_start(start, identity.segment_size)?;
        // First what is in the way, then the control file: a crash between the two leaves the store as it was begun.
        self.forget_provisional()?;
        let ancestors = self.shared.ancestors_of(timeline)?;
        let lineage = Lineage::new(timeline, ancestors, identity.segment_size);
        self.write_control(identity, &lineage, start)?;
        *self.shared.lineage.lock() = Some(lineage);
        self.shared.tail.lock().begin_timeline(timeline, start);
        *self.shared.positions.lock() = Some(Positions::at(timeline, start, None));
        let _ = self.shared.identity.set(identity);
        let context = ScanContext {
            segment_size: identity.segment_size,
            system_id: Some(identity.system_id),
            timeline,
            format: None,
        };
        let scanner = Scanner::at_segment_start(context, start);
        self.crossings = Crossings::from(Some(&scanner), Some(identity.segment_size));
        self.scanner = Some(scanner);
        self.next_xid = NextXid::counting_from(start);
        self.shared.xids.note(None, timeline, start);
        // They may be of an earlier life of this directory; each slot shows what has become of it.
        settle_consumers(&self.shared);
        self.shared.publish(|_| ());
        self.shared.keeper.notify();
        Ok(())
    }

    /// Whether there is no verified WAL, and none on its way to the disk: nothing is lost if the store begins elsewhere.
    pub fn holds_nothing(&self) -> bool {
        let Some(scanner) = &self.scanner else { return true };
        let shared = &self.shared;
        shared.oldest() == Some(scanner.verified_end())
            && shared.catalog.lock().is_empty()
            // In this order, which is the way of the batches.
            && shared.queue.is_idle()
            && shared.unsynced.is_idle()
    }

    /// Whether recovery has set WAL aside: then something was held, and a person has to look at it.
    fn has_detached(&self) -> Result<bool, StoreError> {
        let dir = &self.shared.layout.wal_dir;
        let entries = self.shared.disk.list(dir).map_err(StoreError::io("list", dir))?;
        Ok(entries.iter().any(|entry| entry.name.contains(DETACHED_SUFFIX)))
    }

    /// Removes what was written of a first record that never became whole.
    fn forget_provisional(&mut self) -> Result<(), StoreError> {
        if let Some(session) = self.session.take() {
            self.shared.queue.written(session.unsubmitted_memory_bytes());
        }
        let shared = &self.shared;
        let (Ok(size), Ok(positions)) = (shared.segment_size(), shared.positions()) else { return Ok(()) };
        shared.tail.lock().begin(positions.verified);
        let partials = std::mem::take(&mut *shared.partials.lock());
        for number in partials.keys() {
            let name = shared.name_of(*number)?;
            let path = shared.layout.partial(name, size);
            match shared.disk.unlink(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(shared.health.judge(StoreError::io("remove", &path)(error)));
                }
                _ => {}
            }
        }
        if partials.is_empty() { Ok(()) } else { shared.sync_wal_dir() }
    }

    fn write_control(&self, identity: Identity, lineage: &Lineage, start: Lsn) -> Result<(), StoreError> {
        let (timeline, ancestors) = (lineage.timeline(), lineage.ancestors().to_vec());
        let shared = &self.shared;
        let (disk, layout) = (&*shared.disk, &shared.layout);
        let _file = shared.control_file.lock();
        let known = shared.control.lock().clone();
        let control = match known {
            Some(known) => {
                known.check_owner(disk, layout)?;
                Control { timeline, ancestors, start, ..known }
            }
            None => {
                // The index first: with a control file there must be one.
                let index = Index::rewrite(disk, &layout.data_dir, identity.segment_size, &BTreeMap::new())
                    .map_err(|error| shared.health.judge(error))?;
                *shared.index.lock() = Some(index);
                Control {
                    system_id: identity.system_id,
                    segment_bytes: identity.segment_size.bytes(),
                    timeline,
                    ancestors,
                    start,
                    instance: unique_name(),
                    owner: unique_name(),
                    facts: None,
                    dead_branches: Vec::new(),
                }
            }
        };
        control.write(disk, layout).map_err(|error| shared.health.judge(error))?;
        *shared.control.lock() = Some(control);
        Ok(())
    }
}

fn check_start(start: Lsn, size: SegmentSize) -> Result<(), StoreError> {
    let reason = if size.offset_of(start) != 0 {
        "it is not the start of a segment"
    } else if start.get() >= START_LIMIT {
        "no log is that long"
    } else {
        return Ok(());
    };
    Err(StoreError::BadStart { start, reason })
}
