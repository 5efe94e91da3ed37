//! What a later process must know of slots and losses, on its way to the disk.
//!
//! Owns the order of the writes: one at a time, the newest content last. The disk may take as long as it likes: nobody's stream
//! waits for it, and whoever wants to know that something is written waits for a bounded time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::store::{Store, UpstreamMemory};
use crate::upstream::error::chain;

/// Clones are the same.
#[derive(Clone)]
pub(super) struct Remembering {
    store: Store,
    state: Arc<watch::Sender<State>>,
}

#[derive(Default)]
struct State {
    wanted: UpstreamMemory,
    /// Changes so far, and up to which of them writes have ended, well or not.
    changes: u64,
    ended: u64,
    is_writing: bool,
}

impl Remembering {
    pub(super) fn new(store: &Store) -> Self {
        let state = State { wanted: store.upstream_memory(), ..State::default() };
        Self { store: store.clone(), state: Arc::new(watch::Sender::new(state)) }
    }

    /// What is to be remembered now.
    pub(super) fn memory(&self) -> UpstreamMemory {
        self.state.borrow().wanted.clone()
    }

    /// Changes it, and sees that it gets to the disk. Returns the number of the change.
    pub(super) fn change(&self, change: impl FnOnce(&mut UpstreamMemory)) -> u64 {
        let (mut is_idle, mut number) = (false, 0);
        self.state.send_if_modified(|state| {
            let before = state.wanted.clone();
            change(&mut state.wanted);
            let is_changed = state.wanted != before;
            state.changes += u64::from(is_changed);
            is_idle = is_changed && !state.is_writing;
            state.is_writing |= is_changed;
            number = state.changes;
            false
        });
        if is_idle {
            let this = self.clone();
            tokio::task::spawn_blocking(move || this.write());
        }
        number
    }

    /// Waits until a change is on the disk, or can not be written, or for [`WRITE_TIME_MAX`].
    pub(super) async fn settled(&self, number: u64) {
        let mut state = self.state.subscribe();
        // Whatever comes of it: what is remembered is of use, and nothing depends on it.
        let _ = timeout(WRITE_TIME_MAX, state.wait_for(|state| state.ended >= number)).await;
    }

    fn write(&self) {
        loop {
            let (wanted, number) = {
                let state = self.state.borrow();
                (state.wanted.clone(), state.changes)
            };
            if let Err(error) = self.store.change_upstream_memory(|memory| *memory = wanted) {
                tracing::warn!(error = %chain(&error), "could not save what is known of the slots on the upstream");
            }
            let mut is_newest = false;
            self.state.send_modify(|state| {
                state.ended = number;
                is_newest = state.changes == number;
                state.is_writing = !is_newest;
            });
            if is_newest {
                return;
            }
        }
    }
}

/// Longest wait for the disk, before something is done that a later process should know of.
const WRITE_TIME_MAX: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::small;
    use crate::wal::Lsn;

    #[tokio::test]
    async fn the_newest_of_many_changes_is_on_the_disk_in_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _writer) = small::open_in(folder.path());
        let remembering = Remembering::new(&store);
        let mut last = 0;
        for raw in 1..=50 {
            last = remembering.change(|memory| memory.lost_to = Lsn::new(raw));
        }
        assert_eq!(last, 50);
        assert_eq!(remembering.change(|_| ()), last, "nothing was changed");
        remembering.settled(last).await;
        assert_eq!(store.upstream_memory().lost_to, Lsn::new(50));
        assert_eq!(remembering.memory(), store.upstream_memory());
        let next = remembering.change(|memory| memory.lost_to = None);
        remembering.settled(next).await;
        assert_eq!(store.upstream_memory().lost_to, None);
    }
}
