//! Clients that take little, or nothing for a while: what that costs, and that they are answered all the same.

use std::time::{Duration, SystemTime};

use tokio::io::AsyncReadExt;
use walrelay::protocol::replication::PrimaryMessage;
use walrelay::wal::PgTimestamp;

use crate::support::{Options, Relay, access, eventually, startup};

const COPIED: &str = "walrelay_downstream_copied_bytes_total";

#[tokio::test]
async fn what_waits_for_a_client_that_reads_slowly_is_not_copied() {
    let access = access("local all,replication all trust", None);
    let mut relay = Relay::start_with(Options { access, ..Options::default() }).await;
    let start = relay.start_lsn();
    relay.grow(8 << 20);
    // The buffer of its socket is small and stays so.
    let mut client = relay.local_stranger().await;
    client.log_in(&startup()).await;
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    let (mut piece, began) = (vec![0; 8 << 10], tokio::time::Instant::now());
    // So slowly that something always waits for longer than a client may take nothing.
    while began.elapsed() < Duration::from_secs(4) {
        client.socket.read_exact(&mut piece).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(relay.metric(COPIED), 0.0);
}

#[tokio::test]
async fn a_client_that_took_nothing_for_a_while_is_answered_before_it_has_taken_all_that_waits() {
    let mut relay = Relay::start().await;
    let start = relay.start_lsn();
    relay.grow(24 << 20);
    let mut client = relay.narrow_stranger().await;
    client.log_in(&startup()).await;
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    eventually("what waits to be copied", || relay.metric(COPIED) > 0.0).await;
    client.reply(Some(start), Some(start), true).await;
    eventually("the question to be heard", || relay.registry.statuses()[0].write_lsn == Some(start)).await;
    let resumed = PgTimestamp::from_system_time(SystemTime::now());
    let answer = loop {
        if let PrimaryMessage::Keepalive(keepalive) = client.streamed().await {
            break keepalive;
        }
    };
    assert!(answer.sent_at < resumed, "answered only when everything was taken");
    // And not more often than somebody who never reads has memory for.
    assert!(relay.metric(COPIED) < 2e6);
}
