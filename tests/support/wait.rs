//! Waiting for a condition, with a deadline and without blind sleeps.

use std::time::{Duration, Instant};

/// Long enough for a loaded machine; a test that needs all of it has failed anyway.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Asks `probe` until it answers, and panics with `what` when `PATIENCE` is over.
pub(crate) fn wait_for<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    wait_at_most(PATIENCE, probe).unwrap_or_else(|| panic!("waited {PATIENCE:?} in vain for {what}"))
}

/// As `wait_for`, for a condition.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(what, || condition().then_some(()));
}

/// Asks `probe` until it answers or the time is over.
pub(crate) fn wait_at_most<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(answer) = probe() {
            return Some(answer);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Holds for the whole time that `condition` stays true; panics with `what` when it does not.
pub(crate) fn hold(what: &str, time: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        assert!(condition(), "no longer true: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
