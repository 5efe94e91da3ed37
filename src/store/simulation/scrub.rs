//! Rounds over what is stored, while descriptors are short and disks fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Mutant;
use super::disk::{Crash, Faults};
use super::named::settled;
use super::world::settings;
use crate::store::open::{Opened, open};
use crate::store::scrub::Scrubber;
use crate::store::{Condition, Observer, Positions};

#[derive(Default)]
struct Heard {
    sound: AtomicU64,
    rounds: AtomicU64,
    unreadable: AtomicU64,
}

impl Observer for Heard {
    fn positions_changed(&self, _: Positions) {}

    fn condition_changed(&self, _: Condition) {}

    fn unreadable(&self, _: crate::wal::SegmentName, _: &std::io::Error) {
        self.unreadable.fetch_add(1, Ordering::Relaxed);
    }

    fn scrubbed(&self) {
        self.sound.fetch_add(1, Ordering::Relaxed);
    }

    fn scrub_round_ended(&self) {
        self.rounds.fetch_add(1, Ordering::Relaxed);
    }
}

impl Heard {
    fn told(&self) -> (u64, u64, u64) {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (of(&self.sound), of(&self.rounds), of(&self.unreadable))
    }
}

const DAY: Duration = Duration::from_secs(86_400);

#[test]
fn a_round_that_lacks_descriptors_goes_on_where_it_was_and_leaves_nothing_out() {
    for (errno, at_step) in [(libc::EMFILE, 0), (libc::EMFILE, 1), (libc::ENOMEM, 2), (libc::ENFILE, 5)] {
        let disk = settled(3).disk.clone();
        disk.restart(Crash::Kill);
        let heard = Arc::new(Heard::default());
        let Opened { shared, .. } =
            open(settings(), Arc::new(disk.clone()), heard.clone(), Mutant::None).unwrap();
        let segments = shared.catalog.lock().count() as u64;
        assert!(segments >= 3, "{segments}");
        let now = Instant::now();
        let mut scrubber = Scrubber::new(shared.clone(), DAY, now);
        for _ in 0..at_step {
            scrubber.step(now);
        }
        disk.set_faults(Faults { read_errors: 1000, read_errno: Some(errno), ..Faults::default() });
        for _ in 0..50 {
            assert!(!scrubber.step(now).is_zero(), "it spins");
        }
        let (sound, rounds, _) = heard.told();
        assert!(sound < segments && rounds == 0, "the round has ended without reading");
        disk.set_faults(Faults::default());
        for _ in 0..10 * segments {
            if heard.told().1 == 0 {
                scrubber.step(now);
            }
        }
        assert_eq!(heard.told(), (segments, 1, 0), "{errno} at step {at_step}");
        assert!(shared.damaged().is_empty());
    }
}

#[test]
fn a_disk_that_fails_is_told_of_each_segment_once_a_round() {
    let disk = settled(4).disk.clone();
    disk.restart(Crash::Kill);
    let heard = Arc::new(Heard::default());
    let Opened { shared, .. } =
        open(settings(), Arc::new(disk.clone()), heard.clone(), Mutant::None).unwrap();
    let segments = shared.catalog.lock().count() as u64;
    disk.set_faults(Faults { read_errors: 1000, ..Faults::default() });
    let now = Instant::now();
    let mut scrubber = Scrubber::new(shared.clone(), DAY, now);
    for _ in 0..2 * segments {
        if heard.told().1 == 0 {
            scrubber.step(now);
        }
    }
    assert_eq!(heard.told(), (0, 1, segments));
}
