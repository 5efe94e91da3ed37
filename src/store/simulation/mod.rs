//! The store on a disk that fails, checked by somebody who knows the truth.
//!
//! The production code of the writer, the syncer, the keeper, recovery and the readers runs step by step, in an order
//! and with faults that follow from one seed. The checks know only what is promised. To see one run again:
//! `WALRELAY_SEED=<seed> cargo test --lib store::simulation`; for more of them: `WALRELAY_SEEDS=<count>`.

mod budget;
mod calls;
mod content;
mod disk;
mod edges;
mod exhaustive;
mod named;
mod process;
mod random;
mod repair;
mod scrub;
mod switches;
mod torn;
mod truth;
mod unfinished;
mod world;
mod xids;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;
use std::time::{SystemTime, UNIX_EPOCH};

use world::World;

/// Bugs planted on purpose: each must be found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mutant {
    /// The right way.
    #[default]
    None,
    /// Positions count as flushed when they are written.
    AcknowledgeBeforeSync,
    /// Names are never made durable.
    NoDirectorySync,
    /// Recovery takes the length of what it finds for its end.
    TrustLength,
    /// Recovery syncs what it finds in place.
    NoRewrite,
    /// A failed sync is tried again, and believed then.
    RetrySync,
    /// Slots are not asked what may go.
    IgnoreSlots,
    /// A segment gets its final name before it is durable to its end.
    SealEarly,
    /// Recovery believes what no checksum covers.
    TrustUnproven,
    /// That a slot is invalid is not saved before its WAL goes.
    ForgetInvalidations,
}

const SEEDS: u64 = 1500;
const MUTANT_SEEDS: u64 = 400;
const STEPS: u32 = 250;

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

thread_local! {
    /// Panics are findings here, and not to be printed.
    static IS_QUIET: Cell<bool> = const { Cell::new(false) };
}

fn run(seed: u64, mutant: Mutant) -> Result<(), String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = take_hook();
        set_hook(Box::new(move |info| {
            if !IS_QUIET.get() {
                loud(info)
            }
        }));
    });
    IS_QUIET.set(mutant != Mutant::None);
    let run = || World::new(seed, mutant).run(STEPS);
    let result = catch_unwind(AssertUnwindSafe(run));
    IS_QUIET.set(false);
    result.unwrap_or_else(|_| Err("panicked".to_owned()))
}

#[test]
fn any_order_of_steps_and_faults_keeps_the_promises() {
    let (first, count) = match (number_from("WALRELAY_SEED"), number_from("WALRELAY_SEEDS")) {
        (Some(seed), count) => (seed, count.unwrap_or(1)),
        (None, count) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            (u64::try_from(now.as_micros()).unwrap(), count.unwrap_or(SEEDS))
        }
    };
    for seed in (0..count).map(|step| first.wrapping_add(step)) {
        if let Err(broken) = run(seed, Mutant::None) {
            panic!("WALRELAY_SEED={seed}: {broken}");
        }
    }
}

#[test]
fn every_planted_bug_is_found() {
    let mutants = [
        Mutant::AcknowledgeBeforeSync,
        Mutant::NoDirectorySync,
        Mutant::TrustLength,
        Mutant::NoRewrite,
        Mutant::RetrySync,
        Mutant::IgnoreSlots,
        Mutant::SealEarly,
        Mutant::TrustUnproven,
        Mutant::ForgetInvalidations,
    ];
    let survivors: Vec<_> = mutants
        .into_iter()
        .filter(|mutant| {
            let found =
                (0..MUTANT_SEEDS).find_map(|seed| run(seed, *mutant).err().map(|broken| (seed, broken)));
            println!("{mutant:?}: {found:?}");
            found.is_none()
        })
        .collect();
    assert!(survivors.is_empty(), "not found within {MUTANT_SEEDS} seeds: {survivors:?}");
}

#[test]
fn the_same_seed_does_the_same() {
    let trace = |seed| {
        let mut world = World::new(seed, Mutant::None);
        world.run(STEPS).unwrap();
        world.trace()
    };
    for seed in 0..5 {
        assert_eq!(trace(seed), trace(seed));
    }
}
