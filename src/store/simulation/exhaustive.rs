//! Every place where one small life can end.

use super::disk::{Crash, SimDisk};
use super::world::{Checked, World};
use crate::store::flush::Step;
use crate::store::{InvalidationReason, RetentionLimits, SlotKind, WhenInvalid};

/// A store's life in a fixed order: initialization, some segments, a slot, a segment that goes, until the disk crashes.
/// With limits the slot stays behind, and is invalidated.
fn script(world: &mut World, is_limited: bool) {
    if world.start().is_err() {
        return;
    }
    let slots = world.live().shared.slots.clone();
    let _ = slots.create("a", SlotKind::Permanent, Some(world.truth.wal.start()).filter(|_| is_limited));
    for turn in 0.. {
        let Ok(()) = world.deliver() else { return };
        let end = world.primary_end();
        let live = world.live();
        live.wal_writer.submit();
        live.writer.step();
        if let Some(job) = live.syncer.take() {
            live.syncer.run(&job);
        }
        let kept = if turn % 3 == 2 { live.keeper.step(std::time::Instant::now()) } else { Step::Worked };
        let Ok(positions) = live.shared.positions() else { return };
        if !is_limited && let Ok(guard) = slots.acquire("a", 1, WhenInvalid::Refuse) {
            guard.advance(positions.flushed);
        }
        let is_over = live.shared.health.has_failed() || (positions.flushed == end && kept == Step::Idle);
        if is_over || world.disk.has_crashed() {
            return;
        }
    }
}

/// WAL of the script: some segments.
const WAL_BYTES: u64 = 3_600_000;

/// A world for the script.
fn world(seed: u64, is_limited: bool) -> World {
    let mut world = World::calm(seed, WAL_BYTES);
    if is_limited {
        world.limit(RetentionLimits { max_slot_wal_keep_size: Some(0), ..RetentionLimits::default() });
    }
    world
}

fn crashed_after(operations: u64, crash: Crash, (seed, is_limited): (u64, bool)) -> Checked {
    let mut world = world(seed, is_limited);
    world.disk.crash_after(operations);
    script(&mut world, is_limited);
    world.crash(crash)?;
    world.converge()?;
    world.crash(Crash::PowerCut)
}

/// Changes that the whole script makes.
fn operations(seed: u64, is_limited: bool) -> u64 {
    let mut world = world(seed, is_limited);
    script(&mut world, is_limited);
    assert!(world.live().shared.positions().unwrap().sealed.is_some());
    let slot = world.live().shared.slots.get("a").unwrap();
    assert_eq!(slot.invalidation, is_limited.then_some(InvalidationReason::WalRemoved));
    let disk: &SimDisk = &world.disk;
    disk.operations()
}

#[test]
fn a_crash_at_any_change_loses_nothing() {
    // The last has WAL that begins within a record of several segments.
    for (seed, is_limited) in [(1, false), (1, true), (2, false), (7, false), (7, true)] {
        let operations = operations(seed, is_limited);
        for at in 0..operations {
            for crash in [Crash::Kill, Crash::PowerCut] {
                if let Err(broken) = crashed_after(at, crash, (seed, is_limited)) {
                    panic!("seed {seed}, {is_limited}, {crash:?} at change {at} of {operations}: {broken}");
                }
            }
        }
    }
}
