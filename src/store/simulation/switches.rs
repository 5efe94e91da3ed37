//! From one timeline to the next, through a crash at every change to the disk.
//!
//! Owns two histories that have a beginning in common, and the check that of both everything is there that was durable: the
//! new one under its own names, the old one up to the fork, and beyond it set aside.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Mutant;
use super::disk::{Crash, SimDisk};
use super::process::Live;
use super::random::Random;
use super::world::{Seen, settings};
use crate::store::SlotKind;
use crate::store::error::{ReadError, StoreError};
use crate::store::open::open;
use crate::wal::builder::WalBuilder;
use crate::wal::segment::SegmentFile;
use crate::wal::{Lsn, LsnRange, SegmentName, SegmentNo, SegmentSize, TimelineId};

type Checked = Result<(), String>;

const NEXT: TimelineId = TimelineId::new(2).unwrap();

/// Two histories: the old timeline to its end, and the new one, which left it at the fork.
struct Histories {
    old: WalBuilder,
    new: WalBuilder,
    fork: Lsn,
    /// What is held of the old timeline.
    held: Lsn,
    /// What was delivered of it: perhaps the head of a record more.
    delivered: Lsn,
}

/// Where the fork is, and how far the old timeline was received.
#[derive(Clone, Copy, Debug)]
struct Shape {
    fork: ForkAt,
    beyond: Beyond,
}

#[derive(Clone, Copy, Debug)]
enum ForkAt {
    WithinASegment,
    SegmentStart,
}

#[derive(Clone, Copy, Debug)]
enum Beyond {
    Nothing,
    /// Of a record that never became whole, so many bytes.
    HeadOf(usize),
    /// Records, so many bytes.
    Records(usize),
}

const SHAPES: [Shape; 8] = [
    Shape { fork: ForkAt::WithinASegment, beyond: Beyond::Nothing },
    Shape { fork: ForkAt::WithinASegment, beyond: Beyond::HeadOf(5_000) },
    Shape { fork: ForkAt::WithinASegment, beyond: Beyond::HeadOf(2_500_000) },
    Shape { fork: ForkAt::WithinASegment, beyond: Beyond::Records(3_000) },
    Shape { fork: ForkAt::WithinASegment, beyond: Beyond::Records(2_200_000) },
    Shape { fork: ForkAt::SegmentStart, beyond: Beyond::Nothing },
    Shape { fork: ForkAt::SegmentStart, beyond: Beyond::HeadOf(40_000) },
    Shape { fork: ForkAt::SegmentStart, beyond: Beyond::Records(1_500_000) },
];

/// Records of the old timeline, and of the new one.
const BEFORE_THE_FORK: [usize; 5] = [200_000, 900, 1_100_000, 30_000, 700];
const AFTER_THE_FORK: [usize; 5] = [100, 400_000, 1_300_000, 2_000, 900_000];

/// A new timeline of the same name, from the same fork, of which one record before it is another.
fn stranger(histories: &Histories) -> WalBuilder {
    let mut wal = WalBuilder::small();
    let [before @ .., last] = BEFORE_THE_FORK;
    for bytes in before {
        wal.noise(bytes);
    }
    wal.main_data_record(10, 0, &vec![7; last]);
    assert_eq!(wal.end(), histories.fork);
    wal.switch_timeline(NEXT);
    for bytes in AFTER_THE_FORK {
        wal.noise(bytes);
    }
    wal
}

impl Histories {
    fn new(shape: Shape) -> Self {
        let mut old = WalBuilder::small();
        let size = old.context().segment_size;
        for bytes in BEFORE_THE_FORK {
            old.noise(bytes);
        }
        if let ForkAt::SegmentStart = shape.fork {
            let number = SegmentNo::holding(old.end(), size);
            old.noise_up_to(number.end(size));
        }
        let fork = *old.record_ends().last().unwrap();
        let mut new = old.clone();
        new.switch_timeline(NEXT);
        for bytes in AFTER_THE_FORK {
            new.noise(bytes);
        }
        let (held, delivered) = match shape.beyond {
            Beyond::Nothing => (fork, fork),
            Beyond::HeadOf(bytes) => {
                old.noise(bytes + 10_000);
                (fork, fork.advance(bytes as u64))
            }
            Beyond::Records(bytes) => {
                old.noise(bytes / 3);
                old.noise(bytes - bytes / 3);
                let end = *old.record_ends().last().unwrap();
                (end, end)
            }
        };
        Self { old, new, fork, held, delivered }
    }

    fn size(&self) -> SegmentSize {
        self.old.context().segment_size
    }

    fn new_end(&self) -> Lsn {
        *self.new.record_ends().last().unwrap()
    }
}

fn expect(is_so: bool, what: impl FnOnce() -> String) -> Checked {
    if is_so { Ok(()) } else { Err(what()) }
}

/// What is held before the switch, or after one that a crash has cut short; then all the rest of the way.
fn go_on(disk: &SimDisk, histories: &Histories) -> Checked {
    let mut live = Live::start(disk, &histories.old).map_err(|error| format!("does not start: {error:?}"))?;
    let positions = live.positions();
    let ahead = live.shared.slots.get("ahead").ok_or("a slot is gone")?.restart_lsn;
    if positions.timeline == TimelineId::FIRST {
        expect(!has_files_of(disk, histories, NEXT), || {
            "there are files of a timeline not followed".to_owned()
        })?;
        expect(ahead <= Some(histories.held), || format!("the slot is at {ahead:?}"))?;
        expect(positions.flushed >= histories.held, || format!("{positions:?} is left"))?;
        live.wal_writer.switch(NEXT, histories.fork).map_err(|error| error.to_string())?;
    } else {
        expect(positions.flushed >= histories.fork, || format!("{positions:?} is left"))?;
        expect(ahead <= Some(histories.fork), || format!("the slot is at {ahead:?}, on a dead branch"))?;
    }
    live.receive(&histories.new, histories.new_end(), true)?;
    check(&live, disk, histories)?;
    drop(live);
    disk.restart(Crash::PowerCut);
    let live = Live::start(disk, &histories.old).map_err(|error| format!("does not start: {error:?}"))?;
    expect(live.positions().flushed >= histories.new_end(), || format!("{:?} is left", live.positions()))?;
    check(&live, disk, histories)
}

/// Both timelines are there as far as they must be, in memory and in the files.
fn check(live: &Live, disk: &SimDisk, histories: &Histories) -> Checked {
    let Histories { old, new, fork, held, .. } = histories;
    let size = histories.size();
    let positions = live.positions();
    expect(positions.timeline == NEXT, || format!("{positions:?}"))?;
    expect(live.shared.oldest() == Some(old.start()), || "the oldest segments are gone".to_owned())?;
    let range = |start, end| LsnRange::new(start, end).unwrap();
    let before =
        live.read(TimelineId::FIRST, range(old.start(), *fork)).map_err(|error| error.to_string())?;
    expect(before == old.slice(old.start(), *fork), || "the old timeline has changed".to_owned())?;
    let beyond = live.read(TimelineId::FIRST, range(*fork, fork.advance(8)));
    expect(matches!(beyond, Err(ReadError::TimelineLeft(_) | ReadError::Removed(_))), || {
        format!("the old timeline is served beyond the fork: {beyond:?}")
    })?;
    let first = SegmentNo::holding(*fork, size).start(size).unwrap();
    let after = live.read(NEXT, range(first, positions.flushed)).map_err(|error| error.to_string())?;
    expect(after == new.slice(first, positions.flushed), || "the new timeline is not its own".to_owned())?;
    let early = live.read(NEXT, range(old.start(), old.start().advance(8)));
    expect(matches!(early, Err(ReadError::Removed(_))), || format!("of before it began: {early:?}"))?;
    let dead = live.shared.control.lock().as_ref().map(|control| control.dead_branches.clone()).unwrap();
    expect(dead.len() == usize::from(held > fork), || format!("{dead:?}"))?;
    if let Some(dead) = dead.first() {
        expect((dead.fork, dead.end) == (*fork, *held), || format!("{dead:?}"))?;
        check_dead(disk, histories)?;
    }
    check_names(disk, histories)
}

/// What was held beyond the fork is there, byte for byte, under other names.
fn check_dead(disk: &SimDisk, histories: &Histories) -> Checked {
    let Histories { old, fork, held, .. } = histories;
    let size = histories.size();
    let last = SegmentNo::ending_at(*held, size);
    for number in (SegmentNo::holding(*fork, size).0..=last.0).map(SegmentNo) {
        let name = SegmentName { timeline: TimelineId::FIRST, number };
        let complete = wal(&name.file_name(size)).with_added_extension("diverged");
        let partial = wal(&name.partial_file_name(size)).with_added_extension("diverged");
        let content = disk.content(&complete).or_else(|| disk.content(&partial));
        let content = content.ok_or_else(|| format!("segment {number:?} of the dead branch is gone"))?;
        let start = number.start(size).unwrap();
        let kept = old.slice(start, number.end(size).min(*held));
        expect(content.starts_with(kept), || format!("segment {number:?} of the dead branch has changed"))?;
    }
    Ok(())
}

/// Whether there are files with WAL names of this timeline.
fn has_files_of(disk: &SimDisk, histories: &Histories, timeline: TimelineId) -> bool {
    let names = disk.paths().into_iter().filter_map(|path| {
        let name = path.file_name()?.to_string_lossy().into_owned();
        SegmentName::parse(&name, histories.size())
    });
    names.into_iter().any(|(name, _)| name.timeline == timeline)
}

/// No file has a name that says what it is not.
fn check_names(disk: &SimDisk, histories: &Histories) -> Checked {
    let Histories { old, new, fork, .. } = histories;
    let size = histories.size();
    for path in disk.paths().into_iter().filter(|path| path.parent() == Some(Path::new("/data/wal"))) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let Some((segment, file)) = SegmentName::parse(&name, size) else { continue };
        if file == SegmentFile::Partial {
            let is_left = segment.timeline != NEXT && segment.number.start(size).unwrap() >= *fork;
            expect(!is_left, || format!("{name} is left of the old timeline"))?;
            continue;
        }
        let wal = if segment.timeline == NEXT { new } else { old };
        let start = segment.number.start(size).unwrap();
        let is_right = disk.content(&path).unwrap() == wal.slice(start, segment.number.end(size));
        let is_its_own = segment.timeline == NEXT || segment.number.end(size) <= *fork;
        expect(is_right && is_its_own, || format!("{name} is not what its name says"))?;
    }
    Ok(())
}

fn wal(name: &str) -> PathBuf {
    Path::new("/data/wal").join(name)
}

/// A disk with the old timeline on it, as far as it was received; the process goes on.
fn received(shape: Shape, seed: u64, seals: bool) -> (SimDisk, Histories, Live) {
    let histories = Histories::new(shape);
    let disk = SimDisk::new(seed);
    let mut live = Live::start(&disk, &histories.old).unwrap();
    live.receive(&histories.old, histories.delivered, seals).unwrap();
    assert_eq!(live.positions().flushed, histories.held, "{shape:?}");
    live.shared.slots.create("ahead", SlotKind::Permanent, Some(histories.held)).unwrap();
    (disk, histories, live)
}

#[test]
fn a_crash_at_any_change_of_a_switch_loses_neither_timeline() {
    for (shape, seals) in SHAPES.into_iter().flat_map(|shape| [(shape, true), (shape, false)]) {
        let (disk, histories, mut live) = received(shape, 1, seals);
        let before = disk.operations();
        live.wal_writer.switch(NEXT, histories.fork).unwrap();
        let changes = disk.operations() - before;
        assert!(changes >= 5, "{changes} changes");
        drop(live);
        for at in 0..=changes {
            for crash in [Crash::Kill, Crash::PowerCut] {
                let (disk, histories, mut live) = received(shape, Random::new(at).next(), seals);
                disk.crash_after(at);
                // Whether it says so or not, it may have been done.
                let _ = live.wal_writer.switch(NEXT, histories.fork);
                drop(live);
                disk.restart(crash);
                if let Err(broken) = go_on(&disk, &histories) {
                    panic!("{shape:?}, sealed {seals}, {crash:?} at change {at} of {changes}: {broken}");
                }
            }
        }
    }
}

#[test]
fn a_new_timeline_that_differs_before_the_fork_is_compared_and_not_vouched_for() {
    let shape = Shape { fork: ForkAt::WithinASegment, beyond: Beyond::Nothing };
    let (disk, histories, mut live) = received(shape, 1, true);
    live.wal_writer.switch(NEXT, histories.fork).unwrap();
    let size = histories.size();
    let first = SegmentNo::holding(histories.fork, size).start(size);
    assert_eq!(
        live.wal_writer.plan().map(|plan| plan.start),
        first,
        "it is compared from its segment's start"
    );
    let stranger = stranger(&histories);
    let refused = live.receive(&stranger, *stranger.record_ends().last().unwrap(), true).unwrap_err();
    assert!(refused.contains("Diverged"), "{refused}");
    let positions = live.positions();
    assert_eq!((positions.flushed, positions.verified), (histories.fork, histories.fork));
    drop(live);
    disk.restart(Crash::PowerCut);
    go_on(&disk, &histories).unwrap();
}

#[test]
fn a_timeline_is_not_served_from_before_its_first_segment_though_it_is_in_memory() {
    let shape = Shape { fork: ForkAt::SegmentStart, beyond: Beyond::Nothing };
    let (_disk, histories, mut live) = received(shape, 1, true);
    live.wal_writer.switch(NEXT, histories.fork).unwrap();
    live.receive(&histories.new, histories.fork.advance(100_000), true).unwrap();
    let before = LsnRange::new(Lsn::new(histories.fork.get() - 64).unwrap(), histories.fork).unwrap();
    let located = live.shared.tail.lock().locate(NEXT, before);
    assert!(located.in_files.is_none(), "it is in memory");
    let read = live.read(NEXT, before);
    assert!(matches!(read, Err(ReadError::Removed(_))), "{read:?}");
    assert_eq!(
        live.read(TimelineId::FIRST, before).unwrap(),
        histories.old.slice(before.start(), before.end())
    );
}

#[test]
fn slots_go_back_with_the_positions() {
    let shape = Shape { fork: ForkAt::WithinASegment, beyond: Beyond::Records(2_200_000) };
    let (disk, histories, mut live) = received(shape, 1, true);
    let restart = |live: &Live, name: &str| live.shared.slots.get(name).unwrap().restart_lsn;
    live.wal_writer.switch(NEXT, histories.fork).unwrap();
    assert_eq!(restart(&live, "ahead"), Some(histories.fork));
    assert_eq!(restart(&live, "all"), Some(histories.old.start()));
    drop(live);
    disk.restart(Crash::PowerCut);
    let live = Live::start(&disk, &histories.old).unwrap();
    assert_eq!(restart(&live, "ahead"), Some(histories.fork));
}

#[test]
fn a_switch_that_finds_no_space_can_be_tried_again() {
    for shape in SHAPES {
        let (disk, histories, mut live) = received(shape, 1, true);
        while live.shared.pool.take().is_some() {}
        disk.set_free_blocks(Some(0));
        let before = live.positions();
        if let Err(error) = live.wal_writer.switch(NEXT, histories.fork) {
            assert!(error.is_no_space(), "{error}");
            assert_eq!(live.positions(), before);
            disk.set_free_blocks(None);
            live.wal_writer.switch(NEXT, histories.fork).unwrap();
        }
        disk.set_free_blocks(None);
        drop(live);
        disk.restart(Crash::PowerCut);
        go_on(&disk, &histories).unwrap_or_else(|broken| panic!("{shape:?}: {broken}"));
    }
}

#[test]
fn what_cannot_be_a_fork_is_refused_and_changes_nothing() {
    let shape = Shape { fork: ForkAt::WithinASegment, beyond: Beyond::Records(3_000) };
    let (_disk, histories, mut live) = received(shape, 1, true);
    let before = live.positions();
    let inside = histories.fork.advance(8);
    let start = histories.old.start();
    for (next, at) in [
        (TimelineId::FIRST, histories.fork),
        (NEXT, histories.held.advance(8)),
        (NEXT, inside),
        (NEXT, Lsn::new(start.get() - 8).unwrap()),
    ] {
        let refused = live.wal_writer.switch(next, at);
        assert!(matches!(refused, Err(StoreError::BadSwitch { .. })), "{refused:?}");
        assert_eq!(live.positions(), before);
    }
    live.wal_writer.switch(NEXT, histories.fork).unwrap();
    live.receive(&histories.new, histories.new_end(), true).unwrap();
}

#[test]
fn a_new_timeline_whose_beginning_was_taken_away_is_gone_over_to_again() {
    let shape = Shape { fork: ForkAt::WithinASegment, beyond: Beyond::Nothing };
    let (disk, histories, live) = without_the_beginning(shape);
    assert_eq!(live.positions().flushed, histories.fork);
    drop(live);
    disk.restart(Crash::Kill);
    go_on(&disk, &histories).unwrap();
}

/// The new timeline was gone over to, and the file that it begins with was taken away: the old one is received again.
fn without_the_beginning(shape: Shape) -> (SimDisk, Histories, Live) {
    let (disk, histories, mut live) = received(shape, 1, true);
    live.wal_writer.switch(NEXT, histories.fork).unwrap();
    let number = SegmentNo::holding(histories.fork, histories.size());
    drop(live);
    disk.remove(&wal(&SegmentName { timeline: NEXT, number }.partial_file_name(histories.size())));
    disk.restart(Crash::Kill);
    let live = Live::start(&disk, &histories.old).unwrap();
    assert_eq!(live.positions().timeline, TimelineId::FIRST);
    (disk, histories, live)
}

#[test]
fn files_of_a_timeline_not_followed_are_set_aside_unless_they_are_copies_of_what_is_held() {
    let shape = Shape { fork: ForkAt::WithinASegment, beyond: Beyond::Nothing };
    let (disk, histories, live) = received(shape, 1, true);
    drop(live);
    let size = histories.size();
    let number = SegmentNo::holding(histories.fork, size);
    let start = number.start(size).unwrap();
    let mut copy = histories.old.slice(start, histories.fork).to_vec();
    copy.resize(usize::try_from(size.bytes()).unwrap(), 0);
    let mut other = copy.clone();
    other[100_000] ^= 1;
    let mut longer = copy.clone();
    longer[usize::try_from(size.offset_of(histories.fork)).unwrap() + 300_000] = 1;
    let name = |timeline, number| SegmentName { timeline: TimelineId::new(timeline).unwrap(), number };
    let partial = |timeline, number| name(timeline, number).partial_file_name(size);
    let kept = [
        (partial(3, number), &other),
        (partial(4, number), &longer),
        (partial(2, number.next()), &copy),
        (name(5, number).file_name(size), &copy),
    ];
    disk.put(&wal(&partial(2, number)), &copy);
    for (name, content) in &kept {
        disk.put(&wal(name), content);
    }
    disk.restart(Crash::Kill);
    let opened = open(settings(), Arc::new(disk.clone()), Arc::new(Seen::default()), Mutant::None).unwrap();
    assert_eq!(opened.shared.positions().unwrap().flushed, histories.fork);
    assert_eq!(opened.notes.len(), kept.len(), "{:?}", opened.notes);
    drop(opened);
    disk.restart(Crash::PowerCut);
    let names: Vec<_> = disk.paths().iter().map(|path| path.to_string_lossy().into_owned()).collect();
    assert_eq!(disk.content(&wal(&partial(2, number))), None);
    for (name, content) in &kept {
        assert_eq!(disk.content(&wal(name)), None, "{names:?}");
        let aside = disk.content(&wal(&format!("{name}.detached"))).unwrap_or_else(|| panic!("{names:?}"));
        assert!(aside == **content, "{name} has changed");
    }
}

#[test]
fn what_is_received_again_after_a_step_back_is_not_set_aside_as_what_diverged_before() {
    let shape = Shape { fork: ForkAt::WithinASegment, beyond: Beyond::Records(3_000) };
    // The branch was set aside with all of its segment: that begins anew, on the timeline that had been left.
    let (disk, histories, mut live) = without_the_beginning(shape);
    live.receive(&histories.old, histories.fork, true).unwrap();
    for _ in 0..2 {
        assert_eq!(
            (live.positions().timeline, live.positions().flushed),
            (TimelineId::FIRST, histories.fork)
        );
        drop(live);
        disk.restart(Crash::PowerCut);
        live = Live::start(&disk, &histories.old).unwrap();
    }
    live.wal_writer.switch(NEXT, histories.fork).unwrap();
    live.receive(&histories.new, histories.new_end(), true).unwrap();
    check(&live, &disk, &histories).unwrap();
}
