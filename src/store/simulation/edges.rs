//! Where a store begins, what it keeps open, and the disk that is almost full.

use std::sync::Arc;

use bytes::Bytes;

use super::Mutant;
use super::disk::{Crash, SimDisk};
use super::named::{current, flushed, names, partial, settled, settled_within_a_segment};
use super::world::{Seen, World, settings};
use crate::store::control::Identity;
use crate::store::error::StoreError;
use crate::store::flush::{Step, Syncer, Writer};
use crate::store::open::open;
use crate::store::pool::{FREE_RESERVE_BYTES, Space};
use crate::store::shared::Shared;
use crate::store::{Access, BlockId, Read, SlotKind, WalReader, WalWriter};
use crate::wal::builder::WalBuilder;
use crate::wal::{Lsn, LsnRange, SegmentName, SegmentNo, SegmentSize, SystemId, TimelineId, WalFormat};

const IDENTITY: (SystemId, u64) = (SystemId(4711), 1 << 20);

fn identity() -> Identity {
    Identity { system_id: IDENTITY.0, segment_size: SegmentSize::new(IDENTITY.1).unwrap() }
}

fn start_of(number: u64) -> Lsn {
    SegmentNo(number).start(identity().segment_size).unwrap()
}

fn second_timeline() -> TimelineId {
    TimelineId::new(2).unwrap()
}

/// WAL of one long record behind a short one, if any.
fn wal(timeline: TimelineId, start: Lsn, noise: usize) -> WalBuilder {
    let mut wal = WalBuilder::new(WalFormat::V15, IDENTITY.0, identity().segment_size, timeline, start);
    wal.noise(noise);
    wal
}

fn opened(disk: &SimDisk) -> Result<(Arc<Shared>, WalWriter), StoreError> {
    let opened = open(settings(), Arc::new(disk.clone()), Arc::new(Seen::default()), Mutant::None)?;
    Ok((opened.shared.clone(), WalWriter::new(opened.shared, None, opened.scanner)))
}

/// Delivers bytes from the store's end on and makes them durable.
fn deliver(shared: &Arc<Shared>, wal_writer: &mut WalWriter, bytes: &[u8]) {
    let at = wal_writer.plan().unwrap().held_end;
    wal_writer.begin(at).unwrap();
    wal_writer.append(at, Bytes::copy_from_slice(bytes), BlockId(1)).unwrap();
    wal_writer.submit();
    assert!(!wal_writer.holds_nothing(), "something is on its way");
    assert_eq!(Writer::new(shared.clone()).step(), Step::Worked);
    assert!(!wal_writer.holds_nothing(), "something is on its way");
    let syncer = Syncer::new(shared.clone());
    let job = syncer.take().unwrap();
    assert!(!wal_writer.holds_nothing(), "something is on its way");
    syncer.run(&job);
}

/// A store that was begun at segment 7 and has some bytes of a record that is not whole.
fn begun(disk: &SimDisk) -> (Arc<Shared>, WalWriter) {
    let (shared, mut wal_writer) = opened(disk).unwrap();
    assert!(wal_writer.holds_nothing());
    wal_writer.initialize(identity(), TimelineId::FIRST, start_of(7)).unwrap();
    let wal = wal(TimelineId::FIRST, start_of(7), 300_000);
    deliver(&shared, &mut wal_writer, &wal.bytes()[..100_000]);
    assert!(wal_writer.holds_nothing());
    (shared, wal_writer)
}

#[test]
fn small_messages_exhaust_the_room_by_the_memory_that_they_take() {
    let (_, mut wal_writer) = begun(&SimDisk::new(1));
    let wal = wal(TimelineId::FIRST, start_of(7), 300_000);
    let at = wal_writer.plan().unwrap().held_end;
    wal_writer.begin(at).unwrap();
    let mut taken = 0;
    for piece in wal.bytes().chunks(8) {
        if !wal_writer.has_room() {
            break;
        }
        let piece = Bytes::copy_from_slice(piece);
        wal_writer.append(at.advance(taken), piece, BlockId(1)).unwrap();
        taken += 8;
    }
    assert!(!wal_writer.has_room());
    let pieces = taken / 8;
    // A handle of the bytes in the batch, another in the tail, each with its position.
    let handles = 2 * (size_of::<Bytes>() + size_of::<Lsn>()) as u64;
    assert!(pieces * (8 + handles) <= settings().unwritten_bytes_max, "{pieces} pieces");
}

#[test]
fn a_store_that_holds_nothing_can_begin_elsewhere_whatever_crashes() {
    for crash in [Crash::Kill, Crash::PowerCut] {
        for operations in 0.. {
            let disk = SimDisk::new(operations);
            let (_, mut wal_writer) = begun(&disk);
            disk.crash_after(operations);
            let result = wal_writer.initialize(identity(), second_timeline(), start_of(9));
            let has_crashed = disk.has_crashed();
            drop(wal_writer);
            disk.restart(crash);
            let (shared, mut wal_writer) = opened(&disk).unwrap();
            let positions = shared.positions().unwrap();
            let found = (positions.timeline, positions.flushed);
            let (old, new) = ((TimelineId::FIRST, start_of(7)), (second_timeline(), start_of(9)));
            assert!(found == new || (result.is_err() && found == old), "{operations}: {found:?}");
            wal_writer.initialize(identity(), new.0, new.1).unwrap();
            let plan = wal_writer.plan().unwrap();
            assert_eq!((plan.timeline, plan.held_end, plan.start), (new.0, new.1, new.1));
            let left: Vec<_> = disk
                .paths()
                .into_iter()
                .filter(|path| path.extension().is_some_and(|extension| extension == "partial"))
                .collect();
            assert!(left.is_empty(), "{left:?}");
            let wal = wal(second_timeline(), start_of(9), 5000);
            deliver(&shared, &mut wal_writer, wal.bytes());
            assert_eq!(shared.positions().unwrap().flushed, wal.end());
            let refused = wal_writer.initialize(identity(), new.0, start_of(11));
            assert!(matches!(refused, Err(StoreError::Initialized(_))), "{refused:?}");
            if !has_crashed {
                assert!(operations > 4, "removed, synced, and the control file replaced");
                break;
            }
        }
    }
}

#[test]
fn a_store_begins_anew_in_the_same_process_and_only_for_the_same_cluster() {
    let disk = SimDisk::new(1);
    let (shared, mut wal_writer) = begun(&disk);
    let other = Identity { system_id: SystemId(1), ..identity() };
    let refused = wal_writer.initialize(other, TimelineId::FIRST, start_of(9));
    assert!(matches!(refused, Err(StoreError::Initialized(_))), "{refused:?}");
    // Bytes that were taken and not handed over are forgotten, too.
    let long = wal(TimelineId::FIRST, start_of(7), 300_000);
    wal_writer.begin(start_of(7)).unwrap();
    wal_writer.append(start_of(7), Bytes::copy_from_slice(&long.bytes()[..5000]), BlockId(2)).unwrap();
    wal_writer.initialize(identity(), second_timeline(), start_of(5)).unwrap();
    assert_eq!(shared.queue.unwritten_bytes(), 0);
    assert_eq!(shared.oldest(), Some(start_of(5)), "also further back");
    let wal = wal(second_timeline(), start_of(5), 5000);
    deliver(&shared, &mut wal_writer, wal.bytes());
    assert_eq!(shared.positions().unwrap().flushed, wal.end());
}

#[test]
fn absurd_starts_are_refused_before_anything_is_written() {
    let disk = SimDisk::new(1);
    let (_, mut wal_writer) = opened(&disk).unwrap();
    let before = disk.operations();
    for start in [u64::MAX - IDENTITY.1 + 1, u64::MAX - 2 * IDENTITY.1 + 1, 1 << 63, (7 << 20) + 8] {
        let refused = wal_writer.initialize(identity(), TimelineId::FIRST, Lsn::new(start).unwrap());
        assert!(matches!(refused, Err(StoreError::BadStart { .. })), "{refused:?}");
    }
    assert_eq!(disk.operations(), before);
    wal_writer.initialize(identity(), TimelineId::FIRST, start_of(7)).unwrap();
}

#[test]
fn what_survives_behind_a_lost_end_is_used_again_without_alarm() {
    let mut world = settled_within_a_segment();
    let (before, number) = (flushed(&mut world), current(&mut world));
    let size = world.truth.wal.context().segment_size;
    let next = SegmentNo(number).next();
    let head = world.truth.wal.slice(next.start(size).unwrap(), next.end(size)).to_vec();
    let path = partial(&world, next.0);
    world.disk.put(&path, &head);
    world.crash(Crash::PowerCut).unwrap();
    assert_eq!(flushed(&mut world), before);
    assert!(world.live().notes.is_empty(), "{:?}", world.live().notes);
    assert!(!names(&world).iter().any(|name| name.contains(".detached")), "{:?}", names(&world));
    world.grow(2_000_000);
    world.settle().unwrap();
}

#[test]
fn no_file_is_left_with_two_names() {
    for seed in 0..1000 {
        let disk = SimDisk::new(seed);
        let (shared, mut wal_writer) = opened(&disk).unwrap();
        wal_writer.initialize(identity(), TimelineId::FIRST, start_of(7)).unwrap();
        // The spare with the lower number is taken first, so that it gets another name when it becomes one again.
        let size = identity().segment_size;
        let spares = [(); 2].map(|()| shared.pool.make(&disk, &shared.layout, size, Space::Written).unwrap());
        spares.into_iter().rev().for_each(|spare| shared.pool.put(spare));
        shared.sync_wal_dir().unwrap();
        let wal = wal(TimelineId::FIRST, start_of(7), 300_000);
        wal_writer.begin(start_of(7)).unwrap();
        let part = Bytes::copy_from_slice(&wal.bytes()[..5000]);
        wal_writer.append(start_of(7), part, BlockId(1)).unwrap();
        wal_writer.submit();
        assert_eq!(Writer::new(shared.clone()).step(), Step::Worked, "a spare became a segment, not synced");
        drop((shared, wal_writer));
        disk.restart(Crash::Kill);
        // Recovery makes it a spare again.
        disk.crash_after(seed % 12);
        drop(opened(&disk));
        disk.restart(Crash::PowerCut);
        assert!(!disk.has_file_with_two_names(), "{seed}: {:?}", disk.paths());
    }
}

#[test]
fn who_has_caught_up_keeps_no_file_open() {
    let mut world = settled(1);
    let truth = world.truth;
    let end = flushed(&mut world);
    let size = truth.wal.context().segment_size;
    let live = world.live();
    let oldest = live.shared.oldest().unwrap();
    let name = SegmentName { timeline: TimelineId::FIRST, number: SegmentNo::holding(oldest, size) };
    let is_mapped = |shared: &Shared| shared.mappings.while_closed(name, |is_mapped| is_mapped);
    let mut reader = WalReader::new(live.shared.clone(), TimelineId::FIRST, Access::Mapped);
    let range = LsnRange::new(oldest, oldest.advance(1000)).unwrap();
    match reader.read(range).unwrap() {
        Read::Cold(cold) => cold.load().unwrap(),
        Read::Ready(_) => panic!("nothing was loaded"),
    }
    assert!(is_mapped(&live.shared));
    let newest = LsnRange::new(Lsn::new(end.get() - 100).unwrap(), end).unwrap();
    assert!(matches!(reader.read(newest).unwrap(), Read::Ready(_)));
    assert!(!is_mapped(&live.shared));
    // The same for the file that the overlap was compared with.
    let mut world = settled_within_a_segment();
    let number = SegmentNo(current(&mut world));
    world.crash(Crash::Kill).unwrap();
    let users = |world: &mut World| {
        Arc::strong_count(&world.live().shared.partials.lock().get(&number).unwrap().file)
    };
    let before = users(&mut world);
    while !world.live().wal_writer.is_overlap_proven() {
        world.deliver().unwrap();
    }
    assert_eq!(users(&mut world), before);
}

#[test]
fn an_almost_full_disk_is_left_some_space_for_state_files() {
    let mut world = settled(1);
    let size = world.truth.wal.context().segment_size;
    let blocks = (size.bytes() + FREE_RESERVE_BYTES) / 4096;
    world.disk.set_free_blocks(Some(blocks - 1));
    let (disk, operations) = (world.disk.clone(), world.disk.operations());
    let shared = world.live().shared.clone();
    let make = || shared.pool.make(&*shared.disk, &shared.layout, size, Space::Written);
    assert!(make().is_err_and(|error| error.is_no_space()));
    assert_eq!(disk.operations(), operations, "nothing was tried");
    shared.slots.create("late", SlotKind::Permanent, None).unwrap();
    disk.set_free_blocks(Some(blocks));
    shared.pool.put(make().unwrap());
    assert!(make().is_err_and(|error| error.is_no_space()));
}

#[test]
fn the_stream_gets_its_first_spare_before_recovery_its_reserve() {
    let mut world = World::calm(1, 100_000);
    world.start().unwrap();
    let now = std::time::Instant::now();
    let has = |world: &World, what: &str| names(world).iter().any(|name| name.starts_with(what));
    assert_eq!(world.live().keeper.step(now), Step::Worked);
    assert!(has(&world, "walrelay.spare.") && !has(&world, "walrelay.reserve"));
    // Also when it is taken at once.
    world.live().shared.pool.take();
    assert_eq!(world.live().keeper.step(now), Step::Worked);
    assert!(has(&world, "walrelay.reserve"));
}
