//! `send = "flushed"`: what is verified and not yet durable here is nobody else's business.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use walrelay::downstream::{DownstreamSettings, SendPolicies, SendPolicy};
use walrelay::protocol::replication::PrimaryMessage;

use crate::disk::{HookedDisk, Hooks};
use crate::support::{Options, Relay, eventually, settings};

/// Lets syncs through, or holds them.
#[derive(Default)]
pub(crate) struct Gate {
    is_closed: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    /// Holds syncs until what is returned is dropped.
    pub(crate) fn close(self: &Arc<Self>) -> Closed {
        self.set_closed(true);
        Closed(Arc::clone(self))
    }

    fn set_closed(&self, is_closed: bool) {
        *self.is_closed.lock() = is_closed;
        self.changed.notify_all();
    }
}

impl Hooks for Gate {
    fn before_sync(&self) {
        let mut is_closed = self.is_closed.lock();
        while *is_closed {
            self.changed.wait(&mut is_closed);
        }
    }
}

/// Opens the gate however a test ends, so that the store's threads can end.
pub(crate) struct Closed(Arc<Gate>);

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.set_closed(false);
    }
}

#[tokio::test]
async fn what_is_not_durable_is_neither_sent_nor_told_of() {
    let gate = Arc::new(Gate::default());
    let by_name = [("hasty".to_owned(), SendPolicy::Received)].into();
    let send = SendPolicies { default: SendPolicy::Flushed, by_name };
    let settings = DownstreamSettings { send, ..settings() };
    let disk = Arc::new(HookedDisk(gate.clone()));
    let mut relay = Relay::start_with(Options { settings, disk, ..Options::default() }).await;
    let (start, durable) = (relay.start_lsn(), relay.grow(50_000));
    let store = relay.store.clone();
    let flushed = || store.positions().unwrap().flushed;
    eventually("the first to be durable", || flushed() == durable).await;

    let closed = gate.close();
    let verified = relay.grow(50_000);
    eventually("the second to be written", || store.positions().unwrap().written == verified).await;
    let mut client = relay.client().await;
    let answer = client.query("IDENTIFY_SYSTEM").await;
    assert_eq!(answer.value(2), Some(durable.to_string().as_str()));
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    let (mut wal, _) = client.receive_wal(start, durable).await;
    assert!(wal == relay.wal.slice(start, durable), "more than is durable, or something else");
    for _ in 0..3 {
        // Whatever there was to send comes before the answer.
        client.reply(Some(durable), Some(durable), true).await;
        match client.streamed().await {
            PrimaryMessage::Keepalive(keepalive) => assert_eq!(keepalive.wal_end, Some(durable)),
            PrimaryMessage::WalData(header, _) => panic!("WAL that is not durable: {header:?}"),
        }
    }
    let mut hasty = relay.client_named("hasty").await;
    let answer = hasty.query("IDENTIFY_SYSTEM").await;
    assert_eq!(answer.value(2), Some(verified.to_string().as_str()));
    hasty.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    let (wal_of_hasty, _) = hasty.receive_wal(start, verified).await;
    assert!(wal_of_hasty == relay.wal.slice(start, verified));
    assert_eq!(flushed(), durable, "the gate does not hold");

    drop(closed);
    let (rest, _) = client.receive_wal(durable, verified).await;
    wal.extend(rest);
    assert!(wal == relay.wal.slice(start, verified));
    assert!(flushed() >= verified);
}
