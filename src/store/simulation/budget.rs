//! A disk budget that is used up by what must not go.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::disk::Crash;
use super::world::World;
use crate::store::flush::Step;
use crate::store::keeper::Keeper;
use crate::store::{Condition, RetentionLimits};

/// Files that count, as the directory shows them.
fn segment_files(world: &World) -> usize {
    let paths = world.disk.paths();
    let is_counted = |name: &str| !name.ends_with(".history") && !name.ends_with(".tmp");
    let names = paths.iter().filter(|path| path.starts_with("/data/wal"));
    names.filter_map(|path| path.file_name()?.to_str()).filter(|name| is_counted(name)).count()
}

/// A primary that has written twice the budget, which is the least there is.
fn world() -> World {
    let mut world = World::calm(1, 1 << 20);
    world.grow(1 << 30);
    world.limit(RetentionLimits { disk_budget: Some(1), ..RetentionLimits::default() });
    world.start().unwrap();
    world
}

/// Receives and writes, and lets the keeper work, until nothing moves any more. Nothing is synced.
fn fill(world: &mut World, is_kept: bool) {
    for _ in 0..2000 {
        world.deliver().unwrap();
        let live = world.live();
        live.wal_writer.submit();
        live.writer.step();
        if is_kept {
            live.keeper.step(Instant::now());
        }
    }
    assert_eq!(world.live().writer.step(), Step::Later);
}

#[test]
fn the_budget_is_never_passed_and_what_is_not_durable_stays() {
    let mut world = world();
    fill(&mut world, true);
    assert!(segment_files(&world) <= 8, "{}", segment_files(&world));
    let condition = world.live().shared.health.condition();
    let Condition::NoSpace { reason, .. } = condition else { panic!("{condition:?}") };
    assert_eq!(reason, "the disk budget is used up");
    // As soon as it is durable, segments can be completed, and go.
    world.settle().unwrap();
    assert!(segment_files(&world) <= 8, "{}", segment_files(&world));
    world.crash(Crash::PowerCut).unwrap();
}

#[test]
fn a_keeper_that_lags_behind_is_waited_for_without_alarm() {
    let mut world = world();
    fill(&mut world, false);
    assert!(segment_files(&world) <= 8);
    assert_eq!(world.live().shared.health.condition(), Condition::Healthy);
    world.settle().unwrap();
}

#[test]
fn what_others_make_while_a_segment_is_begun_does_not_pass_the_budget() {
    let mut world = world();
    let keeper = Arc::new(Mutex::new(Keeper::new(world.live().shared.clone(), false)));
    for _ in 0..2000 {
        world.deliver().unwrap();
        let other = keeper.clone();
        let work = move || while other.lock().step(Instant::now()) == Step::Worked {};
        work.clone()();
        world.disk.before_rename(work);
        let live = world.live();
        live.wal_writer.submit();
        live.writer.step();
        assert!(segment_files(&world) <= 8, "{}", segment_files(&world));
    }
    assert_eq!(world.live().writer.step(), Step::Later);
}
