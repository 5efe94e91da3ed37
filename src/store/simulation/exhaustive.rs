//! Every place where one small life can end.

use super::disk::{Crash, SimDisk};
use super::world::{Checked, World};
use crate::store::flush::Step;

/// A store's life in a fixed order: initialization, some segments, a slot, a segment that goes, until the disk crashes.
fn script(world: &mut World) {
    if world.start().is_err() {
        return;
    }
    let slots = world.live().shared.slots.clone();
    let _ = slots.create("a", crate::store::SlotKind::Permanent, None);
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
        if let Ok(guard) = slots.acquire("a", 1) {
            guard.advance(positions.flushed);
        }
        if live.shared.health.has_failed() || (positions.flushed == end && kept == Step::Idle) {
            return;
        }
    }
}

/// WAL of the script: some segments.
const WAL_BYTES: u64 = 3_600_000;

fn crashed_after(operations: u64, crash: Crash, seed: u64) -> Checked {
    let mut world = World::calm(seed, WAL_BYTES);
    world.disk.crash_after(operations);
    script(&mut world);
    world.crash(crash)?;
    world.converge()?;
    world.crash(Crash::PowerCut)
}

/// Changes that the whole script makes.
fn operations(seed: u64) -> u64 {
    let mut world = World::calm(seed, WAL_BYTES);
    script(&mut world);
    assert!(world.live().shared.positions().unwrap().sealed.is_some());
    let disk: &SimDisk = &world.disk;
    disk.operations()
}

#[test]
fn a_crash_at_any_change_loses_nothing() {
    // The last has WAL that begins within a record of several segments.
    for seed in [1, 2, 7] {
        let operations = operations(seed);
        for at in 0..operations {
            for crash in [Crash::Kill, Crash::PowerCut] {
                if let Err(broken) = crashed_after(at, crash, seed) {
                    panic!("seed {seed}, {crash:?} at change {at} of {operations}: {broken}");
                }
            }
        }
    }
}
