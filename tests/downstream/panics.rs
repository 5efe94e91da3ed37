//! A bug that panics: in a session it ends that session, in the store it ends the store.
//!
//! The panics come from a disk that stands in for the code that would have the bug.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::AsyncReadExt;
use walrelay::protocol::frontend::Message;
use walrelay::session::cut::WAL_DATA_BYTES_MAX;
use walrelay::store::Condition;

use crate::disk::{HookedDisk, Hooks};
use crate::support::{Options, PATIENCE, Relay, eventually};

/// What panics, once switched on.
#[derive(Default)]
pub(crate) struct Panics {
    /// Cutting a message out of mapped WAL: done by the task of a session.
    slice: AtomicBool,
    /// A write: done by a thread of the store.
    write: AtomicBool,
}

impl Hooks for Panics {
    fn before_write(&self) {
        assert!(!self.write.load(Ordering::SeqCst), "as a bug in the writer would");
    }

    fn before_slice(&self, range: &Range<usize>) {
        // A session cuts messages; whole segments are cut for their checksum, elsewhere.
        let is_session = range.len() <= usize::try_from(WAL_DATA_BYTES_MAX).unwrap();
        assert!(!(is_session && self.slice.load(Ordering::SeqCst)), "as a bug in a session would");
    }
}

async fn relay(panics: &Arc<Panics>) -> Relay {
    let disk = Arc::new(HookedDisk(panics.clone()));
    Relay::start_with(Options { disk, tail_bytes_max: 1 << 20, ..Options::default() }).await
}

#[tokio::test]
async fn a_panic_in_a_session_ends_that_session_and_no_other() {
    let panics = Arc::<Panics>::default();
    let mut relay = relay(&panics).await;
    let start = relay.start_lsn();
    let mut end = start;
    for _ in 0..6 {
        end = relay.grow(1 << 20);
        let store = &relay.store;
        eventually("written", || store.positions().unwrap().flushed == end).await;
    }
    let mut healthy = relay.client().await;
    healthy.start_streaming(&format!("START_REPLICATION {end} TIMELINE 1")).await;
    let mut victim = relay.client().await;
    let registry = relay.registry.clone();
    eventually("two sessions", || registry.statuses().len() == 2).await;
    panics.slice.store(true, Ordering::SeqCst);
    let command = Message::Query(format!("START_REPLICATION {start} TIMELINE 1").into_bytes().into());
    victim.send(&command).await;
    // Whatever was sent before, even part of a message: the connection ends.
    let mut said = Vec::new();
    let ended = victim.socket.read_to_end(&mut said);
    let _ = tokio::time::timeout(PATIENCE, ended).await.expect("still connected");
    eventually("the victim is forgotten", || registry.statuses().len() == 1).await;
    let next = relay.grow(100_000);
    let (wal, _) = healthy.receive_wal(end, next).await;
    assert!(wal == relay.wal.slice(end, next));
    // Nobody is turned away, either.
    panics.slice.store(false, Ordering::SeqCst);
    let mut another = relay.client().await;
    another.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    let (wal, _) = another.receive_wal(start, next).await;
    assert!(wal == relay.wal.bytes());
}

#[tokio::test]
async fn a_panic_in_the_store_is_its_failure() {
    let panics = Arc::<Panics>::default();
    let mut relay = relay(&panics).await;
    relay.grow(10_000);
    panics.write.store(true, Ordering::SeqCst);
    // The thread that prepares segments may have met the panic before.
    let _ = relay.try_grow(10_000);
    let store = relay.store.clone();
    // The process ends on this condition, as it does after a failed sync.
    eventually("the store has failed", || matches!(store.condition(), Condition::Failed { .. })).await;
    panics.write.store(false, Ordering::SeqCst);
    assert!(store.positions().unwrap().flushed < relay.wal.end(), "acknowledged after a failure");
}
