//! The durable memory of what was acknowledged without the standbys.
//!
//! Owns the order: that a window has begun is on disk before anything in it is acknowledged, and nothing that is on its way to
//! the disk says otherwise. The disk is waited for on another thread, one write at a time; until it is through, what is
//! acknowledged stays where it was.

use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::session::acknowledge::{LocalWindow, WindowState};
use crate::store::{AcknowledgedAlone, Store, StoreError};
use crate::upstream::error::chain;
use crate::wal::{Lsn, LsnRange, TimelineId};

/// What is remembered durably.
pub(super) struct LocalWindows {
    store: Store,
    memory: watch::Sender<Memory>,
    /// Marked when a write has ended.
    ended: watch::Receiver<Memory>,
}

#[derive(Clone, Debug, Default)]
struct Memory {
    durable: Vec<AcknowledgedAlone>,
    /// What is being written: it is durable at any moment from now on, or never.
    in_flight: Option<Vec<AcknowledgedAlone>>,
    failed_at: Option<Instant>,
}

impl LocalWindows {
    pub(super) fn new(store: Store) -> Self {
        let memory = Memory { durable: store.acknowledged_alone(), ..Memory::default() };
        let (memory, ended) = watch::channel(memory);
        Self { store, memory, ended }
    }

    /// Those that an earlier process has left.
    pub(super) fn left(&self) -> Vec<LocalWindow> {
        let left = self.store.acknowledged_alone();
        let now = self.store.positions().map(|positions| positions.timeline);
        let window = |left: AcknowledgedAlone| {
            let state = match (left.open, left.left) {
                (true, _) => WindowState::Open,
                (false, true) => WindowState::Left,
                (false, false) => WindowState::Closed,
            };
            let timeline = left.timeline.or(now).unwrap_or(TimelineId::FIRST);
            Some(LocalWindow { timeline, range: LsnRange::new(left.from, left.to)?, state })
        };
        left.into_iter().filter_map(window).collect()
    }

    /// Where the timeline of the one that is open was left, if it was: the process may have ended before that was remembered.
    pub(super) fn left_at(&self) -> Option<Lsn> {
        let open = self.store.acknowledged_alone().pop().filter(|window| window.open)?;
        self.store.lineage()?.left(open.timeline?).map(|(fork, _)| fork)
    }

    /// Has `windows` remembered, and says whether the last of them may be acknowledged in, if it is open.
    pub(super) fn keep(&mut self, now: Instant, windows: &[LocalWindow]) -> bool {
        let Memory { durable, in_flight, failed_at } = self.ended.borrow_and_update().clone();
        let wanted: Vec<_> = windows.iter().map(remembered).collect();
        let is_same = says_the_same(&wanted, &durable);
        if is_same && failed_at.is_some() {
            // What could not be written is not so any more.
            self.memory.send_if_modified(|memory| {
                memory.failed_at = None;
                false
            });
        }
        let is_due = failed_at.is_none_or(|at| now.saturating_duration_since(at) >= RETRY_INTERVAL);
        if in_flight.is_none() && is_due && !is_same {
            self.write(wanted.clone());
        }
        let Some(open) = wanted.last().filter(|window| window.open) else { return true };
        // A crash may leave the one or the other.
        covers(&durable, open) && in_flight.is_none_or(|in_flight| covers(&in_flight, open))
    }

    /// When [`Self::keep`] is to be asked again although nothing moves.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.ended.borrow().failed_at.map(|at| at + RETRY_INTERVAL)
    }

    /// Comes back when a write has ended. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        // The sender is ours.
        let _ = self.ended.changed().await;
    }

    fn write(&self, windows: Vec<AcknowledgedAlone>) {
        let (store, memory) = (self.store.clone(), self.memory.clone());
        let had_failed = memory.borrow().failed_at.is_some();
        // Nobody needs to hear of the beginning.
        memory.send_if_modified(|memory| {
            (memory.in_flight, memory.failed_at) = (Some(windows.clone()), None);
            false
        });
        tokio::task::spawn_blocking(move || {
            let outcome = store.remember_acknowledged_alone(windows.clone());
            if let (Err(error), false) = (&outcome, had_failed) {
                tell_failure(error);
            }
            drop(store);
            memory.send_modify(|memory| {
                memory.in_flight = None;
                memory.failed_at = outcome.is_err().then(Instant::now);
                if outcome.is_ok() {
                    memory.durable = windows;
                }
            });
        });
    }
}

fn tell_failure(error: &StoreError) {
    tracing::error!(
        error = %chain(error),
        "could not write down that WAL is durable here alone: it is not acknowledged before that is possible"
    );
}

fn remembered(window: &LocalWindow) -> AcknowledgedAlone {
    let LocalWindow { timeline, range, state } = *window;
    AcknowledgedAlone {
        from: range.start(),
        to: range.end(),
        open: state == WindowState::Open,
        timeline: Some(timeline),
        left: state == WindowState::Left,
    }
}

/// Whether who reads this after a crash takes all of an open window to be acknowledged alone.
fn covers(told: &[AcknowledgedAlone], open: &AcknowledgedAlone) -> bool {
    told.last().is_some_and(|last| last.open && last.timeline == open.timeline && last.from <= open.from)
}

/// The end of an open window is found anew when the store is opened.
fn says_the_same(wanted: &[AcknowledgedAlone], durable: &[AcknowledgedAlone]) -> bool {
    let said = |window: &AcknowledgedAlone| {
        (window.timeline, window.from, (!window.open).then_some(window.to), window.left)
    };
    wanted.iter().map(said).eq(durable.iter().map(said))
}

/// A write that failed is tried again after this time.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::store::small;

    fn open_in(data_dir: &Path) -> Store {
        small::open_in(data_dir).0
    }

    fn window(from: u64, to: u64, is_open: bool) -> LocalWindow {
        let lsn = |position| Lsn::new(position).unwrap();
        let state = if is_open { WindowState::Open } else { WindowState::Closed };
        let range = LsnRange::new(lsn(from), lsn(to)).unwrap();
        LocalWindow { timeline: TimelineId::FIRST, range, state }
    }

    #[tokio::test]
    async fn nothing_is_acknowledged_in_a_window_before_its_beginning_is_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("data");
        let now = Instant::now();
        let mut windows = LocalWindows::new(open_in(&dir));
        assert!(windows.keep(now, &[]));
        let open = window(10, 20, true);
        assert!(!windows.keep(now, &[open]));
        windows.changed().await;
        assert!(windows.keep(now, &[open]));
        assert!(windows.keep(now, &[window(10, 30, true)]), "its end is found by recovery");
        assert!(!windows.keep(now, &[window(9, 30, true)]), "it begins before what is known");
        windows.changed().await;
        // One that has ended may be written down later; the next one must be.
        let closed = window(9, 30, false);
        assert!(windows.keep(now, &[closed]));
        windows.changed().await;
        assert!(!windows.keep(now, &[closed, window(40, 50, true)]));
        windows.changed().await;
        drop(windows);
        let left = LocalWindows::new(open_in(&dir)).left();
        assert_eq!(left, [closed, window(40, 50, true)]);
    }

    #[tokio::test]
    async fn a_window_is_not_acknowledged_in_while_its_predecessors_end_is_on_its_way_to_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let now = Instant::now();
        let mut windows = LocalWindows::new(open_in(&folder.path().join("data")));
        windows.keep(now, &[window(10, 20, true)]);
        windows.changed().await;
        // The end of the first is being written, however long that takes; what is on disk has the second in it.
        let closed = window(10, 20, false);
        assert!(windows.keep(now, &[closed]));
        let second = [closed, window(30, 40, true)];
        windows.ended.mark_unchanged();
        let is_in_flight = windows.memory.borrow().in_flight.is_some();
        assert!(!windows.keep(now, &second) || !is_in_flight, "a crash now leaves the first alone");
        while !says_the_same(
            &[remembered(&second[0]), remembered(&second[1])],
            &windows.memory.borrow().durable,
        ) {
            windows.keep(now, &second);
            windows.changed().await;
        }
        assert!(windows.keep(now, &second));
        // On another timeline it is not known how far it went.
        let next = LocalWindow { timeline: TimelineId::new(2).unwrap(), ..second[1] };
        assert!(!windows.keep(now, &[closed, next]));
        windows.changed().await;
        assert!(windows.keep(now, &[closed, next]));
    }

    #[tokio::test]
    async fn what_cannot_be_written_down_is_tried_again_and_not_acknowledged() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("data");
        let mut now = Instant::now();
        let store = open_in(&dir);
        // In the way of the file that is to be renamed.
        let obstacle = dir.join("walrelay.windows");
        std::fs::create_dir(&obstacle).unwrap();
        let mut windows = LocalWindows::new(store);
        let open = window(10, 20, true);
        assert!(!windows.keep(now, &[open]));
        windows.changed().await;
        now = Instant::now();
        assert!(!windows.keep(now, &[open]));
        assert!(windows.deadline().is_some());
    }
}
