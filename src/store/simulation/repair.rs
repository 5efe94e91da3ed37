//! Damaged segments, and how they are made whole again, whatever happens meanwhile.

use std::path::Path;
use std::sync::Arc;

use super::disk::{Crash, Faults};
use super::named::{complete, current, flushed, names, settled};
use super::world::World;
use crate::store::error::{Condition, ReadError, StoreError};
use crate::store::flush::Step;
use crate::store::repair::SegmentRepair;
use crate::store::{Access, Read, WalReader};
use crate::wal::{Lsn, LsnRange, SegmentName, SegmentNo, TimelineId};

fn name(number: u64) -> SegmentName {
    SegmentName { timeline: TimelineId::FIRST, number: SegmentNo(number) }
}

/// The number of the oldest segment, of which nobody has a mapping.
fn oldest(world: &mut World) -> u64 {
    let size = world.truth.wal.context().segment_size;
    SegmentNo::holding(world.live().shared.oldest().unwrap(), size).0
}

fn range_of(world: &World, number: u64) -> LsnRange {
    let size = world.truth.wal.context().segment_size;
    let start = SegmentNo(number).start(size).unwrap();
    LsnRange::new(start, start.advance(1000)).unwrap()
}

/// What the primary has for a segment.
fn original(world: &World, number: u64) -> Vec<u8> {
    let size = world.truth.wal.context().segment_size;
    let number = SegmentNo(number);
    world.truth.wal.slice(number.start(size).unwrap(), number.end(size)).to_vec()
}

/// Reads the beginning of a segment from its file.
fn read(world: &mut World, number: u64) -> Result<(), ReadError> {
    let range = range_of(world, number);
    let mut reader = WalReader::new(world.live().shared.clone(), TimelineId::FIRST, Access::Mapped);
    for _ in 0..100 {
        match reader.read(range)? {
            Read::Cold(cold) => cold.load()?,
            Read::Ready(_) => return Ok(()),
        }
    }
    panic!("never in memory");
}

fn begin(world: &mut World, number: u64) -> Result<SegmentRepair, StoreError> {
    SegmentRepair::begin(world.live().shared.clone(), None, name(number))
}

fn repair(world: &mut World, number: u64, content: &[u8]) -> Result<(), StoreError> {
    let mut repair = begin(world, number)?;
    for piece in content.chunks(100_000) {
        repair.write(piece)?;
    }
    repair.finish()
}

fn damaged(world: &mut World) -> Vec<u64> {
    world.live().shared.damaged().iter().map(|damaged| damaged.name.number.0).collect()
}

/// A byte of the oldest segment is another one, and somebody has noticed. Returns the segment.
fn rotten(world: &mut World) -> u64 {
    let number = oldest(world);
    world.disk.tamper(&complete(world, number), |content| content[700_000] ^= 1);
    assert!(matches!(read(world, number), Err(ReadError::Suspect { .. })));
    world.take_broken().unwrap();
    number
}

fn assert_nothing_lies_around(world: &World) {
    assert!(!names(world).iter().any(|name| name.ends_with(".tmp")), "{:?}", names(world));
}

#[test]
fn a_damaged_segment_is_served_again_once_its_bytes_came() {
    let mut world = settled(1);
    let number = rotten(&mut world);
    assert_eq!(damaged(&mut world), [number]);
    assert!(matches!(read(&mut world, number), Err(ReadError::Suspect { .. })));
    let content = original(&world, number);
    repair(&mut world, number, &content).unwrap();
    read(&mut world, number).unwrap();
    assert!(damaged(&mut world).is_empty());
    assert_eq!(world.disk.content(&complete(&world, number)).unwrap(), content);
    assert_nothing_lies_around(&world);
    assert!(matches!(begin(&mut world, number), Err(StoreError::NothingToRepair(_))));
    let (truth, end) = (world.truth, flushed(&mut world));
    let start = range_of(&world, number).start();
    world.live().check_range(truth, None, start, end).unwrap();
    world.crash(Crash::PowerCut).unwrap();
}

#[test]
fn other_bytes_replace_nothing() {
    let mut world = settled(1);
    let number = rotten(&mut world);
    let before = world.disk.content(&complete(&world, number)).unwrap();
    let whole = original(&world, number);
    let mut other = whole.clone();
    other[500_000] ^= 4;
    let refused = repair(&mut world, number, &other);
    assert!(matches!(refused, Err(StoreError::OtherContent { .. })), "{refused:?}");
    let refused = repair(&mut world, number, &whole[..900_000]);
    assert!(matches!(refused, Err(StoreError::RepairLength { got: 900_000, .. })), "{refused:?}");
    let refused = repair(&mut world, number, &[&whole[..], b"more"].concat());
    assert!(matches!(refused, Err(StoreError::RepairLength { .. })), "{refused:?}");
    assert_eq!(world.disk.content(&complete(&world, number)).unwrap(), before);
    assert_nothing_lies_around(&world);
    assert_eq!(damaged(&mut world), [number]);
    // Whatever was refused, the right bytes are taken.
    repair(&mut world, number, &whole).unwrap();
    world.crash(Crash::Kill).unwrap();
}

#[test]
fn what_needs_no_repair_is_left_alone_and_one_is_repaired_at_a_time() {
    let mut world = settled(1);
    let number = rotten(&mut world);
    for sound in [number + 1, 4711] {
        assert!(matches!(begin(&mut world, sound), Err(StoreError::NothingToRepair(_))));
    }
    let first = begin(&mut world, number).unwrap();
    assert!(matches!(begin(&mut world, number), Err(StoreError::RepairRunning)));
    drop(first);
    assert_nothing_lies_around(&world);
    begin(&mut world, number).unwrap();
}

#[test]
fn who_has_the_damaged_file_mapped_keeps_it_and_says_nothing_about_the_new_one() {
    let mut world = settled(1);
    let number = oldest(&mut world);
    world.disk.tamper(&complete(&world, number), |content| content[700_000] ^= 1);
    let shared = world.live().shared.clone();
    let mapped = shared.mappings.open(&shared, name(number)).unwrap();
    assert!(matches!(read(&mut world, number), Err(ReadError::Suspect { .. })));
    world.take_broken().unwrap();
    let content = original(&world, number);
    repair(&mut world, number, &content).unwrap();
    let fresh = shared.mappings.open(&shared, name(number)).unwrap();
    assert!(!Arc::ptr_eq(&mapped, &fresh));
    world.disk.set_faults(Faults { read_errors: 1000, ..Faults::default() });
    assert!(matches!(mapped.load(&shared, 0..1000), Err(ReadError::Io { .. })));
    assert!(damaged(&mut world).is_empty());
    assert!(matches!(fresh.load(&shared, 0..1000), Err(ReadError::Io { .. })));
    assert_eq!(damaged(&mut world), [number]);
}

#[test]
fn a_read_error_marks_the_segment_until_it_can_be_read_again() {
    let mut world = settled(1);
    let number = oldest(&mut world);
    world.disk.set_faults(Faults { read_errors: 1000, ..Faults::default() });
    assert!(matches!(read(&mut world, number), Err(ReadError::Io { .. })));
    assert_eq!(damaged(&mut world), [number]);
    assert!(matches!(read(&mut world, number), Err(ReadError::Io { .. })), "tried again");
    world.disk.set_faults(Faults::default());
    read(&mut world, number).unwrap();
    assert!(damaged(&mut world).is_empty());
}

#[test]
fn a_shortage_of_memory_or_descriptors_marks_nothing() {
    for errno in [libc::EMFILE, libc::ENFILE, libc::ENOMEM] {
        let mut world = settled(1);
        let number = oldest(&mut world);
        let faults = Faults { read_errors: 1000, read_errno: Some(errno), ..Faults::default() };
        world.disk.set_faults(faults);
        assert!(matches!(read(&mut world, number), Err(ReadError::Io { .. })));
        assert!(damaged(&mut world).is_empty(), "{errno}");
        world.disk.set_faults(Faults::default());
        read(&mut world, number).unwrap();
    }
}

#[test]
fn a_segment_that_retention_has_removed_is_not_put_back() {
    let mut world = settled(1);
    let number = rotten(&mut world);
    let content = original(&world, number);
    let mut repair = begin(&mut world, number).unwrap();
    repair.write(&content).unwrap();
    world.live().shared.slots.drop_slot("all", 1).unwrap();
    while world.live().keeper.step(std::time::Instant::now()) == Step::Worked {}
    assert!(oldest(&mut world) > number);
    let refused = repair.finish();
    assert!(matches!(refused, Err(StoreError::NothingToRepair(_))), "{refused:?}");
    assert!(world.disk.content(&complete(&world, number)).is_none());
    assert_nothing_lies_around(&world);
    assert!(damaged(&mut world).is_empty());
    world.crash(Crash::PowerCut).unwrap();
}

#[test]
fn what_the_disk_refuses_a_repair_is_no_failure_of_the_store() {
    let mut world = settled(1);
    let number = rotten(&mut world);
    let content = original(&world, number);
    world.disk.set_free_blocks(Some(300));
    let refused = repair(&mut world, number, &content).unwrap_err();
    assert!(refused.is_no_space(), "{refused:?}");
    world.disk.set_free_blocks(None);
    for faults in [
        Faults { write_errors: 1000, ..Faults::default() },
        // Writing is tried once for each piece, and the file is synced once.
        Faults { sync_errors: 1000, ..Faults::default() },
    ] {
        world.disk.set_faults(faults);
        let refused = repair(&mut world, number, &content).unwrap_err();
        assert!(matches!(refused, StoreError::Io { .. }), "{refused:?}");
        world.disk.set_faults(Faults::default());
        assert_eq!(world.live().shared.health.condition(), Condition::Healthy);
        assert_eq!(damaged(&mut world), [number]);
        assert_nothing_lies_around(&world);
    }
    repair(&mut world, number, &content).unwrap();
}

#[test]
fn a_repair_is_there_or_not_wherever_it_ends() {
    for crash in [Crash::Kill, Crash::PowerCut] {
        for operations in 0.. {
            let mut world = settled(operations);
            let number = rotten(&mut world);
            let path = complete(&world, number);
            let (content, before) = (original(&world, number), world.disk.content(&path).unwrap());
            world.disk.crash_after(operations);
            let done = repair(&mut world, number, &content);
            let has_crashed = world.disk.has_crashed();
            world.disk.restart(crash);
            assert!(done.is_ok() || has_crashed, "{done:?}");
            let found = world.disk.content(&path).unwrap();
            assert!(found == content || (found == before && done.is_err()), "{crash:?} {operations}");
            restart(&mut world);
            assert_nothing_lies_around(&world);
            if found == before {
                assert!(matches!(read(&mut world, number), Err(ReadError::Suspect { .. })));
                repair(&mut world, number, &content).unwrap();
            }
            read(&mut world, number).unwrap();
            world.crash(Crash::PowerCut).unwrap();
            if !has_crashed {
                assert!(operations > 5, "made, written, synced, renamed, the directory synced");
                break;
            }
        }
    }
}

/// Starts again; damage that is found on the way is none of the check's business.
fn restart(world: &mut World) {
    if let Err(broken) = world.crash(Crash::Kill) {
        assert!(broken.contains("is suspect") || broken.contains("is damaged"), "{broken}");
    }
    world.take_broken();
}

/// The same world, whose segment `number` somebody took away while there was no process.
fn without(world: &mut World, number: u64) {
    world.disk.remove(&complete(world, number));
    restart(world);
}

#[test]
fn segments_that_somebody_took_away_are_missed_and_come_again() {
    let mut world = (1..).map(settled).find_map(with_five_segments).unwrap();
    let (before, first) = (flushed(&mut world), oldest(&mut world));
    let start = world.live().shared.oldest();
    let contents: Vec<_> = [first + 1, first + 2].map(|number| original(&world, number)).into();
    world.disk.remove(&complete(&world, first + 2));
    without(&mut world, first + 1);
    assert_eq!((flushed(&mut world), world.live().shared.oldest()), (before, start), "all is still held");
    assert_eq!(damaged(&mut world), [first + 1, first + 2]);
    assert_eq!(world.live().notes.len(), 1, "{:?}", world.live().notes);
    read(&mut world, first).unwrap();
    assert!(matches!(read(&mut world, first + 1), Err(ReadError::Suspect { .. })));
    repair(&mut world, first + 2, &contents[1]).unwrap();
    restart(&mut world);
    assert_eq!(damaged(&mut world), [first + 1]);
    repair(&mut world, first + 1, &contents[0]).unwrap();
    let truth = world.truth;
    world.live().check_range(truth, None, start.unwrap(), before).unwrap();
    world.crash(Crash::PowerCut).unwrap();
    assert!(world.live().notes.is_empty() && damaged(&mut world).is_empty());
    world.grow(2_000_000);
    world.settle().unwrap();
}

/// A world with at least five complete segments, the newest with a record of its own.
fn with_five_segments(mut world: World) -> Option<World> {
    world.grow(3_000_000);
    world.settle().unwrap();
    let size = world.truth.wal.context().segment_size;
    let (newest, first) = (SegmentNo(current(&mut world) - 1), oldest(&mut world));
    let is_within = |record: &LsnRange| {
        SegmentNo::holding(record.start(), size) == newest && record.end() < newest.end(size)
    };
    let is_anchored = world.truth.wal.records().iter().any(is_within);
    (is_anchored && newest.0 >= first + 4).then_some(world)
}

#[test]
fn segments_before_a_hole_that_nobody_knows_are_set_aside() {
    let mut world = (1..).map(settled).find_map(with_five_segments).unwrap();
    let (before, first) = (flushed(&mut world), oldest(&mut world));
    world.live().shared.slots.drop_slot("all", 1).unwrap();
    world.disk.remove(Path::new("/data/walrelay.segments"));
    without(&mut world, first + 1);
    assert_eq!(flushed(&mut world), before);
    assert!(damaged(&mut world).is_empty());
    assert_eq!(oldest(&mut world), first + 2);
    assert!(names(&world).iter().any(|name| name.ends_with(".detached")));
}

#[test]
fn when_the_newest_run_goes_what_is_before_the_hole_goes_first() {
    for operations in 0.. {
        let mut world = (1..).map(settled).find_map(with_five_segments).unwrap();
        let (first, newest) = (oldest(&mut world), current(&mut world) - 1);
        let size = world.truth.wal.context().segment_size;
        world.live().shared.slots.drop_slot("all", 1).unwrap();
        world.excuse_loss();
        for number in first + 1..newest {
            world.disk.remove(&complete(&world, number));
        }
        world.disk.tamper(&complete(&world, newest), |content| content[700_000] ^= 1);
        world.disk.crash_after(operations);
        let has_started = world.try_start(Crash::Kill);
        restart(&mut world);
        // Nothing is claimed beyond a hole, and all that is claimed is in one piece.
        let end = flushed(&mut world);
        assert!(end <= SegmentNo(newest).start(size).unwrap(), "{end}");
        world.settle().unwrap();
        assert!(damaged(&mut world).is_empty(), "{:?}", damaged(&mut world));
        let (truth, oldest, end) = (world.truth, world.live().shared.oldest().unwrap(), flushed(&mut world));
        world.live().check_range(truth, None, oldest, end).unwrap();
        if has_started {
            assert!(operations > 2);
            break;
        }
    }
}

#[test]
fn retention_passes_over_segments_that_are_missing() {
    let mut world = (1..).map(settled).find_map(with_five_segments).unwrap();
    let first = oldest(&mut world);
    without(&mut world, first + 1);
    assert_eq!(damaged(&mut world), [first + 1]);
    world.live().shared.slots.drop_slot("all", 1).unwrap();
    world.settle().unwrap();
    assert!(oldest(&mut world) > first + 1);
    assert!(damaged(&mut world).is_empty());
    let _: Lsn = flushed(&mut world);
    world.crash(Crash::PowerCut).unwrap();
}
