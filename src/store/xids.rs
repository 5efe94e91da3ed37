//! How far the primary has come with its transaction ids.
//!
//! Owns what the WAL that is held tells of that, and the state file `walrelay.xids`, which is behind by some seconds at most: the
//! next process goes on from there through the WAL that is held, and knows as much as this one before it has received anything.
//! Where that cannot be done nothing is known, until a checkpoint is received from its beginning on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::store::control::Layout;
use crate::store::disk::Disk;
use crate::store::error::StoreError;
use crate::store::health::Health;
use crate::store::held::HeldWal;
use crate::store::shared::Shared;
use crate::store::state::StateFile;
use crate::wal::{FullXid, Lineage, Lsn, NextXid, Record, RecordVisitor, Scanner, TimelineId};

/// How far it has come; shared by who counts and who asks.
pub(super) struct Xids {
    disk: Arc<dyn Disk>,
    layout: Layout,
    health: Arc<Health>,
    /// What is given out next; 0 while it is not known.
    next: AtomicU64,
    places: Mutex<Places>,
}

/// The next id at a place where a record ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct XidPlace {
    timeline: TimelineId,
    at: Lsn,
    next: FullXid,
}

#[derive(Default)]
struct Places {
    newest: Option<XidPlace>,
    /// The first one after what the file says: it is durable sooner than the newest.
    first: Option<XidPlace>,
    /// What the file says.
    saved: Option<XidPlace>,
    saved_at: Option<Instant>,
}

impl Places {
    fn are_due(&self, now: Instant) -> bool {
        let is_late = |at: Instant| now.saturating_duration_since(at) >= SAVE_INTERVAL;
        let is_far = |(newest, saved): (XidPlace, XidPlace)| newest.at.bytes_since(saved.at) >= SAVE_BYTES;
        self.saved_at.is_none_or(is_late) || self.newest.zip(self.saved).is_some_and(is_far)
    }
}

impl Xids {
    pub(super) fn open(disk: Arc<dyn Disk>, layout: Layout, health: Arc<Health>) -> Result<Self, StoreError> {
        let saved = match XIDS_FILE.read(&*disk, &layout.data_dir) {
            // A checkpoint tells it again: what is held is to be served all the same.
            Err(StoreError::Damaged { .. }) => None,
            read => read?,
        };
        let places = Mutex::new(Places { saved, ..Places::default() });
        Ok(Self { disk, layout, health, next: AtomicU64::new(0), places })
    }

    /// The next id; `None` while it is not known.
    pub(super) fn next(&self) -> Option<FullXid> {
        let next = self.next.load(Ordering::Relaxed);
        (next > 0).then_some(FullXid(next))
    }

    /// It is so at the end of what is verified.
    pub(super) fn note(&self, next: Option<FullXid>, timeline: TimelineId, verified: Lsn) {
        self.next.store(next.map_or(0, |next| next.0), Ordering::Relaxed);
        let Some(next) = next else { return };
        let place = XidPlace { timeline, at: verified, next };
        let mut places = self.places.lock();
        places.newest = Some(place);
        places.first.get_or_insert(place);
    }

    /// What lies behind `fork` is not on the line any more.
    pub(super) fn cut(&self, fork: Lsn) {
        let mut places = self.places.lock();
        let is_left = |place: &XidPlace| place.at <= fork;
        (places.newest, places.first) = (places.newest.filter(is_left), places.first.filter(is_left));
    }

    /// Saves what is known, if that is news and durable, and the last time is some seconds ago, or much WAL. Blocks.
    pub(super) fn save_if_due(&self, now: Instant, flushed: Lsn) -> Result<(), StoreError> {
        if !self.places.lock().are_due(now) {
            return Ok(());
        }
        if self.save(flushed)? {
            self.places.lock().saved_at = Some(now);
        }
        Ok(())
    }

    /// Saves what is known, if that is news and durable. Blocks.
    pub(super) fn save_now(&self, flushed: Lsn) -> Result<(), StoreError> {
        self.save(flushed).map(|_| ())
    }

    fn save(&self, flushed: Lsn) -> Result<bool, StoreError> {
        let durable = {
            let places = self.places.lock();
            let mut known = places.newest.into_iter().chain(places.first);
            known.find(|place| place.at <= flushed && places.saved != Some(*place))
        };
        let Some(durable) = durable else { return Ok(false) };
        self.health.check()?;
        let written = XIDS_FILE.write(&*self.disk, &self.layout.data_dir, &durable);
        written.map_err(|error| self.health.judge(error))?;
        let mut places = self.places.lock();
        places.saved = Some(durable);
        places.first = places.newest.filter(|newest| newest.at > durable.at);
        Ok(true)
    }

    /// What the file says, if that is on the line and not too far from its end to go on from there.
    fn saved_on(&self, line: &Lineage, end: Lsn) -> Option<XidPlace> {
        let saved = self.places.lock().saved?;
        let is_near =
            line.leads_by(saved.timeline, saved.at, end) && end.bytes_since(saved.at) <= RECOUNT_BYTES_MAX;
        is_near.then_some(saved)
    }
}

/// The count at the end of what is held, where the scanner is. Blocks.
pub(super) fn recount(shared: &Arc<Shared>, scanner: Option<&Scanner>) -> NextXid {
    let Some(scanner) = scanner else { return NextXid::counting_from(Lsn::MIN) };
    let end = scanner.verified_end();
    let unknown = NextXid::counting_from(end);
    let saved = shared.lineage().ok().and_then(|line| shared.xids.saved_on(&line, end));
    let Some(saved) = saved else { return unknown };
    let mut counted = Counted { from: saved.at, count: NextXid::known(saved.next) };
    let mut held = HeldWal::new(shared.clone(), scanner.context());
    let went_on = held
        .scanner_before(saved.at, saved.at, saved.at)
        .and_then(|mut scanner| held.feed(&mut scanner, end, &mut counted));
    // Whoever reads what is damaged there is told of that.
    if went_on.is_ok() { counted.count } else { unknown }
}

struct Counted {
    from: Lsn,
    count: NextXid,
}

impl RecordVisitor for Counted {
    fn record(&mut self, record: &Record<'_>) {
        if record.start >= self.from {
            self.count.note(record);
        }
    }
}

pub(super) const XIDS_FILE: StateFile =
    StateFile { name: "walrelay.xids", magic: *b"WRXIDS\0\0", version: 1 };

/// Longest time for which what is known is only in memory, while WAL flows.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);

/// The same, where WAL flows faster.
const SAVE_BYTES: u64 = 256 << 20;

/// WAL that is gone through to find the next id, about a second's work. What is saved is as old as the time before, at most.
const RECOUNT_BYTES_MAX: u64 = 1 << 30;

const _: () = assert!(3 * SAVE_BYTES < RECOUNT_BYTES_MAX);
