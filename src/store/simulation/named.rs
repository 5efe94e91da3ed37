//! Faults by name, each with what must happen.

use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::disk::{Crash, Faults};
use super::world::{World, settings};
use crate::store::error::{Condition, ReadError, StoreError};
use crate::store::flush::Step;
use crate::store::open::open;
use crate::store::slot_limits::InvalidationReason;
use crate::store::{Access, BlockId, Read, SlotKind, WalReader};
use crate::wal::builder::WalBuilder;
use crate::wal::{Lsn, LsnRange, SegmentName, SegmentNo, SystemId, TimelineId, WalFormat};

/// A store with three to four segments, all durable, and all kept for a slot.
pub(super) fn settled(seed: u64) -> World {
    let mut world = World::calm(seed, 3_600_000);
    world.start().unwrap();
    let start = world.truth.wal.start();
    world.live().shared.slots.create("all", SlotKind::Permanent, Some(start)).unwrap();
    world.settle().unwrap();
    world
}

pub(super) fn complete(world: &World, number: u64) -> PathBuf {
    let name = SegmentName { timeline: TimelineId::FIRST, number: SegmentNo(number) };
    Path::new("/data/wal").join(name.file_name(world.truth.wal.context().segment_size))
}

pub(super) fn partial(world: &World, number: u64) -> PathBuf {
    complete(world, number).with_added_extension("partial")
}

pub(super) fn flushed(world: &mut World) -> Lsn {
    world.live().shared.positions().unwrap().flushed
}

/// The segment that is being written.
pub(super) fn current(world: &mut World) -> u64 {
    SegmentNo::holding(flushed(world), world.truth.wal.context().segment_size).0
}

pub(super) fn names(world: &World) -> Vec<String> {
    let paths = world.disk.paths();
    paths.iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect()
}

/// A world whose last segment has some bytes, and not all.
pub(super) fn settled_within_a_segment() -> World {
    let is_within = |world: &mut World| {
        let size = world.truth.wal.context().segment_size;
        (100_000..900_000).contains(&size.offset_of(flushed(world)))
    };
    (0..).map(settled).find_map(|mut world| is_within(&mut world).then_some(world)).unwrap()
}

#[test]
fn files_that_were_being_prepared_are_removed() {
    let mut world = settled(1);
    for name in ["/data/wal/walrelay.rewrite.tmp", "/data/walrelay.slots.tmp", "/data/wal/walrelay.spare.77"]
    {
        world.disk.put(Path::new(name), b"half");
    }
    let others = ["/data/postgresql.auto.conf.tmp", "/data/other.history.tmp"];
    for name in others {
        world.disk.put(Path::new(name), b"somebody else's");
    }
    world.crash(Crash::Kill).unwrap();
    for name in others {
        assert_eq!(world.disk.content(Path::new(name)).unwrap(), b"somebody else's");
        world.disk.remove(Path::new(name));
    }
    assert!(
        !names(&world).iter().any(|name| name.ends_with(".tmp") || name.ends_with(".77")),
        "{:?}",
        names(&world)
    );
}

#[test]
fn a_stale_partial_beside_its_complete_segment_is_set_aside() {
    let mut world = settled(1);
    let before = flushed(&mut world);
    let stale = partial(&world, 2);
    world.disk.put(&stale, b"stale");
    world.crash(Crash::Kill).unwrap();
    assert_eq!(flushed(&mut world), before);
    assert_eq!(world.live().notes.len(), 1, "{:?}", world.live().notes);
    assert_eq!(world.disk.content(&stale.with_added_extension("detached")).unwrap(), b"stale");
}

#[test]
fn a_partial_of_odd_length_heals() {
    for length in [0, 1, 8192, 300_001, (1 << 20) + 5000] {
        let mut world = settled_within_a_segment();
        let path = {
            let number = current(&mut world);
            partial(&world, number)
        };
        world.disk.tamper(&path, |content| content.resize(length, 7));
        world.excuse_loss();
        world.crash(Crash::Kill).unwrap();
        world.grow(2_000_000);
        world.settle().unwrap();
        world.crash(Crash::PowerCut).unwrap();
    }
}

#[test]
fn garbage_behind_the_end_is_not_taken_for_wal() {
    let mut world = settled_within_a_segment();
    let before = flushed(&mut world);
    let path = {
        let number = current(&mut world);
        partial(&world, number)
    };
    let end = usize::try_from(world.truth.wal.context().segment_size.offset_of(before)).unwrap();
    world.disk.tamper(&path, |content| content[end..].fill(0xA5));
    world.crash(Crash::Kill).unwrap();
    assert_eq!(flushed(&mut world), before);
    let content = world.disk.content(&path).unwrap();
    assert!(content[end..].iter().all(|byte| *byte == 0), "recovery leaves zeros behind the end");
}

#[test]
fn the_beginning_of_a_record_is_stored_and_counts_for_nothing() {
    for crash in [Crash::Kill, Crash::PowerCut] {
        let mut world = settled_within_a_segment();
        let before = flushed(&mut world);
        world.grow(300_000);
        let wal = &world.truth.wal;
        // Whatever is said of a position is said of a record's end: here is none.
        let within = before.advance(32);
        let next_end = *world.truth.ends.iter().find(|end| **end > before).unwrap();
        assert!(within < next_end, "the record is longer");
        let beginning = Bytes::from(wal.slice(before, within).to_vec());
        let live = world.live();
        live.wal_writer.begin(before).unwrap();
        live.wal_writer.append(before, beginning.clone(), BlockId(1 << 40)).unwrap();
        live.wal_writer.submit();
        live.writer.step();
        let job = live.syncer.take().unwrap();
        live.syncer.run(&job);
        let positions = live.shared.positions().unwrap();
        assert_eq!((positions.verified, positions.written, positions.flushed), (before, before, before));
        assert_eq!(live.wal_writer.received(), within);
        let (number, size) = (current(&mut world), world.truth.wal.context().segment_size);
        let (path, at) = (partial(&world, number), usize::try_from(size.offset_of(before)).unwrap());
        assert_eq!(world.disk.content(&path).unwrap()[at..at + 32], beginning[..], "it is in the file");
        world.crash(crash).unwrap();
        assert_eq!(flushed(&mut world), before);
        let content = world.disk.content(&path).unwrap();
        assert!(content[at..].iter().all(|byte| *byte == 0), "it is not taken for WAL");
        world.settle().unwrap();
        assert!(flushed(&mut world) > within);
    }
}

#[test]
fn acknowledged_bytes_torn_by_the_disk_are_noticed_and_fetched_again() {
    let mut world = settled_within_a_segment();
    let before = flushed(&mut world);
    let path = {
        let number = current(&mut world);
        partial(&world, number)
    };
    world.disk.tamper(&path, |content| content[50_000..50_512].fill(0x5A));
    world.excuse_loss();
    world.crash(Crash::PowerCut).unwrap();
    assert!(flushed(&mut world) < before, "only what is proved is claimed");
    world.settle().unwrap();
    assert_eq!(flushed(&mut world), before);
}

#[test]
fn a_damaged_newest_segment_is_set_aside_with_all_that_follows_and_fetched_again() {
    let mut world = settled_within_a_segment();
    let (before, number) = (flushed(&mut world), current(&mut world));
    let path = complete(&world, number - 1);
    world.disk.tamper(&path, |content| content[700_000] ^= 1);
    world.excuse_loss();
    let broken = world.crash(Crash::Kill);
    assert!(broken.unwrap_err().contains("is suspect"), "the observer is told");
    world.take_broken();
    assert!(world.live().notes.len() >= 2, "{:?}", world.live().notes);
    let size = world.truth.wal.context().segment_size;
    assert!(flushed(&mut world) <= SegmentNo(number - 1).start(size).unwrap());
    world.settle().unwrap();
    assert_eq!(flushed(&mut world), before);
    assert!(world.disk.content(&path.with_added_extension("detached")).is_some(), "nothing is removed");
}

/// A world with a record that begins and ends in the newest complete segment: a proof can begin there.
fn anchored() -> World {
    let is_anchored = |world: &mut World| {
        let size = world.truth.wal.context().segment_size;
        let newest = SegmentNo(current(world) - 1);
        let is_within = |record: &LsnRange| {
            SegmentNo::holding(record.start(), size) == newest && record.end() < newest.end(size)
        };
        newest.0 >= 3 && world.truth.wal.records().iter().any(is_within)
    };
    (0..).map(settled).find_map(|mut world| is_anchored(&mut world).then_some(world)).unwrap()
}

#[test]
fn a_segment_that_somebody_took_away_leaves_one_piece_without_a_hole() {
    let mut world = anchored();
    let (before, number) = (flushed(&mut world), current(&mut world));
    let size = world.truth.wal.context().segment_size;
    world.disk.remove(&complete(&world, number - 2));
    // Nobody knows any more what was in it.
    world.disk.remove(Path::new("/data/walrelay.segments"));
    world.live().shared.slots.drop_slot("all", 1).unwrap();
    world.crash(Crash::Kill).unwrap();
    assert_eq!(flushed(&mut world), before);
    assert_eq!(world.live().shared.oldest(), SegmentNo(number - 1).start(size));
    assert!(!world.live().notes.is_empty());
    world.grow(1_000_000);
    world.settle().unwrap();
}

#[test]
fn a_slot_whose_wal_somebody_took_away_is_lost() {
    let mut world = anchored();
    let number = current(&mut world);
    world.disk.remove(&complete(&world, number - 2));
    world.disk.remove(Path::new("/data/walrelay.segments"));
    let told = world.crash(Crash::Kill).unwrap_err();
    assert!(told.contains("replication slot \"all\" needs WAL from"), "{told}");
    let shared = world.live().shared.clone();
    let slot = shared.slots.get("all").unwrap();
    assert_eq!((slot.restart_lsn, slot.invalidation), (None, Some(InvalidationReason::WalRemoved)));
    world.grow(1_000_000);
    world.settle().unwrap();
    assert_eq!(shared.slots.oldest_needed(), None);
    world.crash(Crash::PowerCut).unwrap();
    assert_eq!(world.live().shared.slots.get("all").unwrap().invalidation, slot.invalidation);
}

#[test]
fn a_slot_ahead_of_what_is_left_keeps_what_comes_next() {
    let mut world = settled_within_a_segment();
    let before = flushed(&mut world);
    let path = {
        let number = current(&mut world);
        partial(&world, number)
    };
    world.live().shared.slots.create("ahead", SlotKind::Permanent, Some(before)).unwrap();
    world.disk.tamper(&path, |content| content[50_000..50_512].fill(0x5A));
    world.excuse_loss();
    world.crash(Crash::PowerCut).unwrap();
    let left = flushed(&mut world);
    let place = |world: &mut World| world.live().shared.slots.get("ahead").unwrap().restart_lsn;
    assert!(left < before);
    assert_eq!(place(&mut world), Some(left));
    world.settle().unwrap();
    assert_eq!((flushed(&mut world), place(&mut world)), (before, Some(left)));
    world.crash(Crash::PowerCut).unwrap();
    assert_eq!(place(&mut world), Some(left), "it is saved");
}

#[test]
fn an_emptied_directory_and_another_systems_wal_are_refused() {
    let mut world = settled(1);
    let number = current(&mut world);
    let disk = world.disk.clone();
    let start = |world: &World| {
        disk.restart(Crash::Kill);
        let disk = std::sync::Arc::new(world.disk.clone());
        let observer = std::sync::Arc::new(super::world::Seen::default());
        open(settings(), disk, observer, super::Mutant::None).err()
    };
    let mut foreign = WalBuilder::new(
        WalFormat::V15,
        SystemId(4711),
        world.truth.wal.context().segment_size,
        TimelineId::FIRST,
        SegmentNo(number).start(world.truth.wal.context().segment_size).unwrap(),
    );
    foreign.noise(5000);
    let mut content = foreign.bytes().to_vec();
    content.resize(1 << 20, 0);
    world.disk.put(&partial(&world, number), &content);
    let refused = start(&world);
    assert!(matches!(refused, Some(StoreError::OtherSystem { found: SystemId(4711), .. })), "{refused:?}");
    for path in world.disk.paths() {
        if path.parent() == Some(Path::new("/data/wal")) {
            world.disk.remove(&path);
        }
    }
    let refused = start(&world);
    assert!(matches!(refused, Some(StoreError::WalMissing { .. })), "{refused:?}");
}

#[test]
fn after_a_failed_sync_nothing_more_is_acknowledged() {
    for faults in [
        Faults { sync_errors: 1000, ..Faults::default() },
        Faults { write_errors: 1000, ..Faults::default() },
    ] {
        let mut world = settled(1);
        let before = flushed(&mut world);
        world.grow(100_000);
        world.disk.set_faults(faults);
        while !world.live().shared.health.has_failed() {
            world.deliver().unwrap();
            let live = world.live();
            live.wal_writer.submit();
            live.writer.step();
            if let Some(job) = live.syncer.take() {
                live.syncer.run(&job);
            }
        }
        world.disk.set_faults(Faults::default());
        let live = world.live();
        assert!(matches!(live.shared.health.condition(), Condition::Failed { .. }));
        assert_eq!(live.writer.step(), Step::Stop);
        assert!(live.syncer.take().is_none());
        assert_eq!(live.keeper.step(std::time::Instant::now()), Step::Stop);
        assert!(matches!(live.wal_writer.begin(before), Err(StoreError::Failed(_))));
        assert_eq!(flushed(&mut world), before);
        world.crash(Crash::PowerCut).unwrap();
        world.settle().unwrap();
    }
}

#[test]
fn a_full_disk_stops_acknowledgements_and_nothing_else_and_heals() {
    let mut world = settled(1);
    world.disk.set_free_blocks(Some(10));
    world.grow(7_000_000);
    for _ in 0..3000 {
        world.deliver().unwrap();
        let live = world.live();
        live.wal_writer.submit();
        live.writer.step();
        if let Some(job) = live.syncer.take() {
            live.syncer.run(&job);
        }
        live.keeper.step(std::time::Instant::now());
    }
    let end = world.primary_end();
    let truth = world.truth;
    let live = world.live();
    let positions = live.shared.positions().unwrap();
    assert!(matches!(live.shared.health.condition(), Condition::NoSpace { .. }));
    assert!(positions.flushed < end);
    assert!(!live.wal_writer.has_room(), "reading stops");
    assert!(live.shared.tail.lock().memory_bytes() < 16 << 20, "memory is bounded");
    let oldest = live.shared.oldest().unwrap();
    live.check_range(truth, None, oldest, positions.verified).unwrap();
    // A restart while it is full: what is held is served.
    world.crash(Crash::PowerCut).unwrap();
    assert!(flushed(&mut world) >= positions.flushed);
    world.heal();
    world.settle().unwrap();
    assert_eq!(flushed(&mut world), end);
}

#[test]
fn a_read_error_ends_one_read_only() {
    let mut world = settled(1);
    let truth = world.truth;
    let live = world.live();
    let oldest = live.shared.oldest().unwrap();
    let range = LsnRange::new(oldest, oldest.advance(1000)).unwrap();
    let cold = |live: &super::world::Live| {
        let mut reader = WalReader::new(live.shared.clone(), TimelineId::FIRST, Access::Mapped);
        match reader.read(range).unwrap() {
            Read::Cold(cold) => cold.load(),
            Read::Ready(_) => panic!("nothing was loaded"),
        }
    };
    let disk = world.disk.clone();
    disk.set_faults(Faults { read_errors: 1000, ..Faults::default() });
    let error = cold(world.live()).unwrap_err();
    assert!(matches!(error, ReadError::Io { .. }), "{error}");
    disk.set_faults(Faults::default());
    cold(world.live()).unwrap();
    world.live().check_range(truth, None, oldest, oldest.advance(1_000_000)).unwrap();
}
