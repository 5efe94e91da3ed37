//! Consumers that stand still: what they cost the primary, what they cost the relay, and who is given up first.

use std::path::Path;
use std::time::Duration;

use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings};
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::support::{MB, lsn_text};

/// WAL that is written while a consumer with a slot stands still; `WALRELAY_SLOT_MB=2048` for as much as a long night brings.
fn megabytes() -> u64 {
    std::env::var("WALRELAY_SLOT_MB").map_or(256, |text| text.parse().unwrap())
}

fn bytes_in(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.filter_map(|entry| entry.ok()?.metadata().ok()).map(|metadata| metadata.len()).sum()
}

/// Creates a slot that keeps all from here on, or streams with none under a name of its own, and leaves.
fn leave(relay: &Relay, slot: Option<&str>, name: &str, position: u64) {
    let parameters = [("user", "postgres"), ("replication", "true"), ("application_name", name)];
    let mut client = RawClient::login(relay.port, &parameters).unwrap();
    if let Some(slot) = slot {
        client.rows(&format!("CREATE_REPLICATION_SLOT {slot} PHYSICAL")).unwrap();
    }
    let from = position - position % MB;
    client.start_replication(slot, from, 1).unwrap();
    client.read_wal(from, position);
    client.send_status(position, position, 0).unwrap();
    let position = lsn_text(position);
    wait_until("the relay to know what the consumer has", || {
        let status = relay.status();
        let has = |list: &str| {
            let list = status[list].as_array().cloned().unwrap_or_default();
            list.iter().any(|row| row["restart_lsn"] == position.as_str())
        };
        has("slots") || has("consumers")
    });
}

fn written(primary: &Postgres, relay: &Relay, bytes: u64) -> u64 {
    write_wal(primary, bytes);
    let position = primary.flushed();
    relay.wait_flushed(position);
    position
}

#[test]
fn a_consumer_that_stands_still_costs_the_primary_nothing_and_gets_it_all_later() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new()
        .line("wal_keep_size = 0")
        .line("max_wal_size = 64MB")
        .line("min_wal_size = 32MB")
        .start(&installation);
    let relay = Relay::streaming_from("relay", primary.port);
    let start = written(&primary, &relay, MB);
    leave(&relay, Some("barman"), "barman", start);
    let mut largest = 0;
    for _ in 0..megabytes() / 32 {
        written(&primary, &relay, 32 * MB);
        primary.wait_reported_flush("relay", primary.flushed());
        primary.checkpoint();
        largest = largest.max(bytes_in(&primary.wal_dir()));
    }
    assert!(largest <= 160 * MB, "pg_wal grew to {} MB", largest / MB);
    let upto = primary.flushed();
    assert!(upto - start >= megabytes() * MB, "too little was written");
    let mut client = RawClient::replication(relay.port).unwrap();
    let from = start - start % MB;
    client.start_replication(Some("barman"), from, 1).unwrap();
    let mut position = from;
    while position < upto {
        let next = (position + 32 * MB).min(upto);
        position += client.read_wal(position, next).len() as u64;
    }
    assert!(position >= upto);
}

#[test]
fn the_disk_budget_holds_and_what_is_furthest_behind_goes_first() {
    const BUDGET: u64 = 24 * MB;
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port)
        .with("store.wal_keep_size", "\"10MB\"")
        .with("store.disk_budget", "\"24MB\"");
    relay.start();
    let far = written(&primary, &relay, MB);
    leave(&relay, Some("far"), "far", far);
    let near = written(&primary, &relay, 6 * MB);
    leave(&relay, Some("near"), "near", near);
    let status = |slot: &str| relay.slot(slot).unwrap()["wal_status"].as_str().unwrap_or_default().to_owned();
    let mut seen = Vec::new();
    for _ in 0..50 {
        written(&primary, &relay, MB);
        let held = bytes_in(&relay.wal_dir());
        assert!(held <= BUDGET, "{held} bytes of segment files, the budget is {BUDGET}");
        assert_eq!(relay.condition(), "healthy");
        let now = (status("far"), status("near"));
        if seen.last() != Some(&now) {
            seen.push(now);
        }
    }
    let (reserved, lost) = ("reserved".to_owned(), "lost".to_owned());
    let expected =
        [(reserved.clone(), reserved.clone()), (lost.clone(), reserved), (lost.clone(), lost.clone())];
    assert_eq!(seen, expected);
    for slot in ["far", "near"] {
        let slot = relay.slot(slot).unwrap();
        assert_eq!(slot["invalidation_reason"], "wal_removed");
        assert_eq!(slot["restart_lsn"], serde_json::Value::Null);
    }
    // Visibly: the log says which, and why, before it says the next.
    let log = relay.log();
    let places = ["slot \\\"far\\\"", "slot \\\"near\\\""].map(|text| log.find(text).unwrap());
    assert!(places[0] < places[1] && log.contains("The disk budget of"), "{log}");
    // With the slots gone, what wal_keep_size asks for fits again.
    assert!(relay.oldest() + 10 * MB <= primary.flushed());
}

#[test]
fn wal_that_no_slot_needs_goes_before_a_slot() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port)
        .with("store.wal_keep_size", "\"1GB\"")
        .with("store.retain_without_slot", "\"1h\"")
        .with("store.disk_budget", "\"16MB\"");
    relay.start();
    let unnamed = written(&primary, &relay, MB);
    leave(&relay, None, "pg_receivewal", unnamed);
    written(&primary, &relay, 25 * MB);
    let position = primary.flushed();
    leave(&relay, Some("kept"), "kept", position);
    written(&primary, &relay, 8 * MB);
    assert!(bytes_in(&relay.wal_dir()) <= 16 * MB);
    assert!(relay.oldest() > unnamed);
    assert_eq!(relay.slot("kept").unwrap()["wal_status"], "reserved");
    assert!(relay.metric("walrelay_store_budget_segments_total") > Some(0.0));
    relay.wait_logged("WAL that no slot needs is removed before its time");
    // A slot that fits only at the cost of another is refused.
    let mut client = RawClient::replication(relay.port).unwrap();
    written(&primary, &relay, 3 * MB);
    let error = client.rows("CREATE_REPLICATION_SLOT late PHYSICAL RESERVE_WAL").unwrap_err();
    assert_eq!(error.code, "53100", "{error:?}");
}

#[test]
fn wal_is_kept_by_name_for_a_time_and_over_a_restart() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port)
        .with("store.wal_keep_size", "\"0\"")
        .with("store.retain_without_slot", "\"8s\"");
    relay.start();
    let position = written(&primary, &relay, MB);
    leave(&relay, None, "pg_receivewal", position);
    written(&primary, &relay, 4 * MB);
    relay.restart_after_kill();
    written(&primary, &relay, 4 * MB);
    hold("the WAL to be kept", Duration::from_secs(3), || relay.oldest() <= position);
    wait_until("the time to be over", || {
        write_wal(&primary, MB);
        relay.oldest() > position
    });
    assert!(relay.status()["consumers"].as_array().unwrap().is_empty());
}
