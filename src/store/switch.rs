//! Going over to another timeline.
//!
//! Owns the one moment in which the timeline changes that is received: the new one's first segment is made from what is held
//! of the old one, durably, before the control file says that it is followed; then memory follows. What was held beyond the
//! place where the old timeline was left is told and set aside, never overwritten. Does not decide whom to follow.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::store::Store;
use crate::store::control::{Control, Layout};
use crate::store::dead_branch::{BranchRecords, DEAD_BRANCHES_MAX, DeadBranch};
use crate::store::disk::{Disk, OpenMode};
use crate::store::error::StoreError;
use crate::store::held::HeldWal;
use crate::store::inventory::Inventory;
use crate::store::partials::PartialSegment;
use crate::store::pool::Space;
use crate::store::positions::Positions;
use crate::store::rewrite::copy_head;
use crate::store::shared::Shared;
use crate::store::writer::{Crossings, WalWriter};
use crate::store::xids::recount;
use crate::wal::scanner::{ScanContext, Scanner};
use crate::wal::timeline::Ancestor;
use crate::wal::{Lineage, Lsn, SegmentName, SegmentNo, SegmentSize, TimelineId};

/// Where a timeline is left.
#[derive(Clone, Copy)]
struct Fork {
    next: TimelineId,
    at: Lsn,
    /// The segment that holds it: the first of the next timeline.
    number: SegmentNo,
    size: SegmentSize,
}

impl WalWriter {
    /// Goes over to timeline `next`, whose history says that it left the one that is received at `switch_lsn`, which must be
    /// held. What is held beyond is set aside, and told. Durable on return; blocks. Positions go back to `switch_lsn` if they
    /// were beyond it.
    pub fn switch(&mut self, next: TimelineId, switch_lsn: Lsn) -> Result<Option<DeadBranch>, StoreError> {
        let shared = self.shared.clone();
        shared.health.check()?;
        self.submit();
        self.session = None;
        let deadline = Instant::now() + SETTLE_TIME_MAX;
        let is_settled = shared.queue.wait_until_idle(deadline) && {
            shared.unsynced.gather_no_more();
            shared.unsynced.wait_until_idle(deadline)
        };
        if !is_settled {
            return Err(StoreError::Busy);
        }
        let _turn = shared.keeping.lock();
        let size = shared.segment_size()?;
        let fork = Fork { next, at: switch_lsn, number: SegmentNo::holding(switch_lsn, size), size };
        let (scanner, dead) = self.scanner_at(fork)?;
        let (old, positions) = (shared.lineage()?, shared.positions()?);
        let new = old.followed_by(next, switch_lsn);
        let first = first_segment(&shared, &old, &new, fork)?;
        // Durable before the timeline is: WAL is kept from there, and a switch that fails now costs nothing by it.
        put_consumers_back(&shared, fork.at)?;
        write_control(&shared, &new, dead.as_ref())?;
        // From here on this is the timeline; what follows is repeated on the next start if it fails.
        follow(&shared, new, first, fork);
        if dead.is_some() {
            // Where the proof of what is left begins is not known: nothing goes before the next segment is complete.
            let oldest = shared.oldest();
            shared.catalog.lock().cut(fork.number, oldest);
        }
        shared.tail.lock().begin_timeline(next, switch_lsn);
        shared.unproven.cut(switch_lsn);
        shared.redo.cut(switch_lsn);
        shared.xids.cut(switch_lsn);
        if dead.is_some() {
            // Ids that were given out beyond the fork are not this timeline's.
            self.next_xid = recount(&shared, Some(&scanner));
            shared.xids.note(self.next_xid.get(), next, switch_lsn);
        }
        self.crossings = Crossings::from(Some(&scanner), Some(size));
        self.scanner = Some(scanner);
        let sealed = positions.sealed.map(|sealed| sealed.min(fork.number.start(size).unwrap_or(sealed)));
        shared.replace_positions(Positions::at(next, switch_lsn, sealed));
        shared.keeper.notify();
        // Once more: sessions that did not know of the fork may have reported meanwhile.
        let put_back = put_consumers_back(&shared, switch_lsn);
        // What fails is done on the next start, or when the keeper saves.
        for error in
            [put_back, tidy_up(&shared, &old, fork, dead.as_ref())].into_iter().filter_map(Result::err)
        {
            shared.health.tell(|observer| observer.housekeeping_failed(&error));
        }
        Ok(dead)
    }

    /// A scanner of the next timeline at the fork, and what is held beyond.
    fn scanner_at(&self, fork: Fork) -> Result<(Scanner, Option<DeadBranch>), StoreError> {
        let shared = &self.shared;
        let scanner = self.scanner.as_ref().ok_or(StoreError::NotInitialized)?;
        let (held_end, context) = (scanner.verified_end(), scanner.context());
        let timeline = context.timeline;
        let refuse = |reason| {
            let Fork { next, at: switch_lsn, .. } = fork;
            Err(StoreError::BadSwitch { timeline, next, switch_lsn, reason })
        };
        let lineage = shared.lineage()?;
        let begin = shared.oldest().max(lineage.begin(timeline).flatten());
        if fork.next <= timeline {
            return refuse("its number is not higher");
        }
        if fork.at > held_end {
            return refuse("it is beyond what is held");
        }
        if begin.is_none_or(|begin| fork.at < begin) {
            return refuse("it is before what is held of that timeline");
        }
        let next = ScanContext { timeline: fork.next, ..context };
        if fork.at == held_end {
            return Ok((Scanner::resume(next, scanner.resume_point()), None));
        }
        let mut held = HeldWal::new(shared.clone(), context);
        let mut at_fork = held.scanner_before(fork.at, fork.at, fork.at)?;
        let point = at_fork.resume_point();
        if point.position != fork.at {
            return refuse("no record ends there");
        }
        let mut records = BranchRecords::from(fork.at);
        held.feed(&mut at_fork, held_end, &mut records)?;
        let dead = records.tell(timeline, fork.next, fork.at, held_end);
        Ok((Scanner::resume(next, point), Some(dead)))
    }
}

/// The next timeline's first segment, with what is held before the fork; `None` where that is a segment's start.
fn first_segment(
    shared: &Shared,
    old: &Lineage,
    new: &Lineage,
    fork: Fork,
) -> Result<Option<Arc<PartialSegment>>, StoreError> {
    let (disk, layout, size) = (&*shared.disk, &shared.layout, fork.size);
    let keep = size.offset_of(fork.at);
    if keep == 0 {
        return Ok(None);
    }
    let old_name = old.name(fork.number);
    let is_partial = shared.partials.lock().contains_key(&fork.number);
    let source = if is_partial { layout.partial(old_name, size) } else { layout.complete(old_name, size) };
    let from = disk.open(&source, OpenMode::Read).map_err(StoreError::io("open", &source))?;
    let spare = match shared.pool.take() {
        Some(spare) => spare,
        None => shared.pool.make(disk, layout, size, Space::Written)?,
    };
    let (path, target) = (layout.wal(&spare.name), layout.partial(new.name(fork.number), size));
    // Without it the switch can be tried again; a sync that failed cannot.
    let made = copy_head((&*from, &source), keep, (&*spare.file, &path), size)
        .and_then(|()| disk.rename(&path, &target).map_err(StoreError::io("rename", &path)));
    if let Err(error) = made {
        shared.pool.put(spare);
        return Err(shared.health.judge(error));
    }
    shared.sync_wal_dir()?;
    Ok(Some(Arc::new(PartialSegment::found(spare.file))))
}

/// What lies behind the fork will not be held any more: nobody's position is there, durably.
fn put_consumers_back(shared: &Shared, fork: Lsn) -> Result<(), StoreError> {
    shared.slots.cut(fork);
    shared.slots.save_now()?;
    let Some(consumers) = &shared.consumers else { return Ok(()) };
    consumers.cut(fork);
    consumers.save_now()
}

fn write_control(shared: &Shared, new: &Lineage, dead: Option<&DeadBranch>) -> Result<(), StoreError> {
    let (disk, layout) = (&*shared.disk, &shared.layout);
    let _file = shared.control_file.lock();
    let known = shared.control.lock().clone().ok_or(StoreError::NotInitialized)?;
    known.check_owner(disk, layout)?;
    let mut dead_branches = known.dead_branches.clone();
    dead_branches.extend(dead.cloned());
    let surplus = dead_branches.len().saturating_sub(DEAD_BRANCHES_MAX);
    dead_branches.drain(..surplus);
    let (timeline, ancestors) = (new.timeline(), new.ancestors().to_vec());
    let control = Control { timeline, ancestors, dead_branches, ..known };
    control.write(disk, layout).map_err(|error| shared.health.judge(error))?;
    *shared.control.lock() = Some(control);
    Ok(())
}

/// Readers find the new timeline's segments, and of the old one nothing beyond the fork.
fn follow(shared: &Shared, new: Lineage, first: Option<Arc<PartialSegment>>, fork: Fork) {
    {
        let mut partials = shared.partials.lock();
        partials.retain(|number, _| *number < fork.number);
        partials.extend(first.map(|first| (fork.number, first)));
    }
    *shared.lineage.lock() = Some(new);
}

/// The old timeline's files from the fork on: a dead branch is set aside; else there is nothing but the head of a record that
/// never became whole.
fn tidy_up(shared: &Shared, old: &Lineage, fork: Fork, dead: Option<&DeadBranch>) -> Result<(), StoreError> {
    let (disk, layout, size) = (&*shared.disk, &shared.layout, fork.size);
    match dead {
        Some(dead) => {
            dead.set_aside(disk, layout, size)?;
        }
        None => {
            let left = Ancestor { timeline: old.timeline(), switch_lsn: fork.at };
            remove_heads(disk, layout, size, &[left])?;
        }
    }
    shared.sync_wal_dir()
}

/// Removes what lies behind the segment in which a timeline was left, once dead branches are set aside: heads of records that
/// never became whole. The caller makes it durable.
pub(super) fn remove_heads(
    disk: &dyn Disk,
    layout: &Layout,
    size: SegmentSize,
    left: &[Ancestor],
) -> Result<(), StoreError> {
    let is_beyond = |name: &SegmentName| {
        let is_left = |left: &Ancestor| {
            left.timeline == name.timeline
                && name.number.start(size).is_none_or(|start| start >= left.switch_lsn)
        };
        left.iter().any(is_left)
    };
    for name in Inventory::take(disk, layout, size)?.partial.into_keys().filter(is_beyond) {
        let path = layout.partial(name, size);
        disk.unlink(&path).map_err(StoreError::io("remove", &path))?;
    }
    Ok(())
}

impl Store {
    /// What was held beyond where a timeline was left, oldest first.
    pub fn dead_branches(&self) -> Vec<DeadBranch> {
        self.shared.control.lock().as_ref().map(|control| control.dead_branches.clone()).unwrap_or_default()
    }
}

/// Longest wait until what was received is durable.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(10);
