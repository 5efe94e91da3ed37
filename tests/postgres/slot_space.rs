//! Consumers that stand still: what they cost the primary, what they cost the relay, and who is given up first.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::compare::{assert_same_wal, completed_end, primary_bytes};
use crate::support::lab::{self, Installation};
use crate::support::load::{emit_wal, write_wal};
use crate::support::postgres::{Postgres, Settings};
use crate::support::raw::RawClient;
use crate::support::receivewal::PgReceivewal;
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::support::{MB, lsn, lsn_text};

/// WAL that is written while a consumer with a slot stands still: where everything is tested as much as a long night brings.
fn megabytes() -> u64 {
    let is_all = std::env::var("CI").is_ok_and(|text| text == "true");
    std::env::var("WALRELAY_SLOT_MB").map_or(if is_all { 2048 } else { 256 }, |text| text.parse().unwrap())
}

/// A file that gets another name while we look is there once.
fn bytes_in(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap();
    let found = entries.filter_map(|entry| entry.ok()?.metadata().ok());
    let files: BTreeMap<_, _> = found.map(|metadata| (metadata.ino(), metadata.len())).collect();
    files.values().sum()
}

/// Bytes of the relay's segment files. What goes and what comes while we look is both counted, so the least of some looks.
fn bytes_held(relay: &Relay) -> u64 {
    (0..5).map(|_| bytes_in(&relay.wal_dir())).min().unwrap()
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
    const SEGMENT: u64 = 16 * MB;
    let Some(installation) = Installation::any() else { return };
    // What the primary has written, by its own hand, for what it does not keep itself.
    let archive = lab::scratch();
    lab::give_to_server(archive.path());
    let primary = Settings::new()
        .line("wal_keep_size = 0")
        .line("max_wal_size = 64MB")
        .line("min_wal_size = 32MB")
        .line("archive_mode = on")
        .line(&format!("archive_command = 'cp %p {}/%f'", archive.path().display()))
        .start(&installation);
    let relay = Relay::streaming_from("relay", primary.port);
    let start = written(&primary, &relay, MB);
    leave(&relay, Some("barman"), "barman", start);
    let mut largest = 0;
    for _ in 0..megabytes() / 32 {
        emit_wal(&primary, 32 * MB);
        let upto = primary.flushed();
        relay.wait_flushed(upto);
        primary.wait_reported_flush("relay", upto);
        wait_until("the archive to have it", || {
            completed_end(archive.path(), SEGMENT) >= upto - upto % SEGMENT
        });
        primary.checkpoint();
        largest = largest.max(bytes_in(&primary.wal_dir()));
    }
    assert!(largest <= 160 * MB, "pg_wal grew to {} MB", largest / MB);
    let upto = primary.switch_wal().next_multiple_of(SEGMENT);
    assert!(upto - start >= megabytes() * MB, "too little was written");
    wait_until("the archive to have it all", || completed_end(archive.path(), SEGMENT) >= upto);
    relay.wait_flushed(upto);
    let mut client = RawClient::replication(relay.port).unwrap();
    let mut position = start - start % SEGMENT;
    client.start_replication(Some("barman"), position, 1).unwrap();
    while position < upto {
        let mut wal = client.read_wal(position, (position + SEGMENT).min(upto));
        let end = (position + wal.len() as u64).min(upto);
        wal.truncate(usize::try_from(end - position).unwrap());
        let expected = primary_bytes(archive.path(), SEGMENT, position, end);
        assert!(wal == expected, "WAL from {} on is not what the primary wrote", lsn_text(position));
        position = end;
    }
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
    // Where each is lost, as it says itself.
    let lost_at = |slot: &str| relay.slot(slot).unwrap()["safe_wal_size"].as_u64().unwrap() + relay.flushed();
    let places = ["far", "near"].map(|slot| (slot, lost_at(slot)));
    let mut seen = Vec::new();
    // No state lasts for less than a segment.
    for _ in 0..90 {
        written(&primary, &relay, MB / 2);
        let held = bytes_held(&relay);
        assert!(held <= BUDGET, "{held} bytes of segment files, the budget is {BUDGET}");
        assert_eq!(relay.condition(), "healthy");
        for (slot, lost_at) in places {
            let (end, is_lost) = (relay.flushed(), status(slot) == "lost");
            assert!(!is_lost || end >= lost_at, "{slot} is lost at {end}, before {lost_at}");
            assert!(is_lost || end < lost_at + MB, "{slot} is not lost at {end}, after {lost_at}");
        }
        let now = (status("far"), status("near"));
        if seen.last() != Some(&now) {
            seen.push(now);
        }
    }
    let states = |place: fn(&(String, String)) -> &String| {
        let mut states: Vec<_> = seen.iter().map(|pair| place(pair).as_str()).collect();
        states.dedup();
        states
    };
    assert_eq!(states(|pair| &pair.0), ["reserved", "unreserved", "lost"]);
    assert_eq!(states(|pair| &pair.1), ["reserved", "unreserved", "lost"]);
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
    let spares = || {
        let names = std::fs::read_dir(relay.wal_dir())
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter(|name| name.starts_with("walrelay.spare.")).count()
    };
    wait_until("segments to be prepared", || spares() > 1);
    let given_up = || relay.metric("walrelay_store_budget_segments_total").unwrap_or_default();
    assert_eq!(given_up(), 0.0);
    for _ in 0..25 {
        written(&primary, &relay, MB);
        // What is only prepared goes before any WAL, but for one.
        assert!(given_up() == 0.0 || spares() <= 1, "{} prepared segments", spares());
    }
    assert!(given_up() > 0.0);
    let position = primary.flushed();
    leave(&relay, Some("kept"), "kept", position);
    written(&primary, &relay, 8 * MB);
    assert!(bytes_held(&relay) <= 16 * MB);
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
fn a_slot_that_is_granted_has_what_the_budget_leaves_though_old_wal_fills_it() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port)
        .with("store.wal_keep_size", "\"1GB\"")
        .with("store.disk_budget", "\"16MB\"");
    relay.start();
    written(&primary, &relay, 25 * MB);
    primary.checkpoint();
    relay.wait_flushed(primary.flushed());
    let mut client = RawClient::replication(relay.port).unwrap();
    client.rows("CREATE_REPLICATION_SLOT fresh PHYSICAL RESERVE_WAL").unwrap();
    for _ in 0..10 {
        written(&primary, &relay, MB);
        assert_eq!(relay.slot("fresh").unwrap()["wal_status"], "reserved");
    }
    assert!(bytes_held(&relay) <= 16 * MB);
}

#[test]
fn wal_is_kept_for_a_pg_receivewal_that_never_says_what_it_has_flushed() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port)
        .with("store.wal_keep_size", "\"0\"")
        .with("store.tail_size", "\"2MB\"")
        .with("store.unwritten_size", "\"2MB\"")
        .with("store.retain_without_slot", "\"1h\"");
    relay.start();
    let arguments = ["--status-interval=1"];
    let mut receiver = PgReceivewal::start(&installation, relay.port, &arguments);
    relay.wait_downstream("pg_receivewal", "streaming");
    let position = written(&primary, &relay, 3 * MB + MB / 2);
    let segment = position - position % MB;
    wait_until("the relay to know what it has written", || {
        let sessions = relay.downstream("pg_receivewal");
        let lsn_of = |column: &str| sessions.first()?[column].as_str().map(lsn);
        assert_eq!(lsn_of("flush_lsn"), None, "it says what it has flushed");
        lsn_of("write_lsn") >= Some(position)
    });
    assert_eq!(relay.status()["consumers"][0]["restart_lsn"], lsn_text(segment).as_str());
    receiver.process.signal(Signal::INT);
    assert!(receiver.process.wait_for_end().success(), "{}", receiver.log());
    written(&primary, &relay, 20 * MB);
    wait_until("what nobody needs to go", || relay.oldest() >= segment);
    assert_eq!(relay.oldest(), segment);
    // It comes back, and its files are the primary's.
    let receiver = PgReceivewal::start_into(&installation, relay.port, &arguments, receiver.folder());
    let upto = primary.switch_wal();
    let upto = upto - upto % MB;
    wait_until("pg_receivewal to complete its segments", || receiver.completed(MB) >= upto);
    assert_same_wal(receiver.folder(), &primary, upto);
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
