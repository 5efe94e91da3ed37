//! Damaged segments are fetched again from the upstream, while everything else goes on.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::damaged_store::{complete_segments, filled, filled_with, read_all};
use crate::support::MB;
use crate::support::compare::{assert_same_wal, wal_files};
use crate::support::faults::Faults;
use crate::support::lab::inode;
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Stop};
use crate::support::proxy::{Verdict, wal_in};
use crate::support::raw::{Event, RawClient, error_in, identify_system};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};

/// What `/status` says of damaged segments.
fn damaged(relay: &Relay) -> Vec<serde_json::Value> {
    relay.status()["store"]["damaged"].as_array().unwrap().clone()
}

fn repaired(relay: &Relay) -> f64 {
    relay.metric("walrelay_store_repaired_segments_total").unwrap_or(0.0)
}

fn file_name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

/// The primary's file of the same segment.
fn original(primary: &Postgres, path: &Path) -> PathBuf {
    primary.wal_dir().join(file_name(path))
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn start_of(path: &Path) -> u64 {
    let digits = file_name(path);
    let half = |range: std::ops::Range<usize>| u64::from_str_radix(&digits[range], 16).unwrap();
    (half(8..16) << 32) + half(16..24) * MB
}

/// Asks for a segment; the code of the error that is the only answer.
fn refusal(relay: &Relay, path: &Path) -> String {
    let mut client = RawClient::replication(relay.port).unwrap();
    client.start_replication(None, start_of(path), 1).unwrap();
    let answer = client.until_ready().unwrap();
    let refused = error_in(&answer).unwrap_or_else(|| panic!("no error: {answer:?}"));
    assert!(answer.iter().all(|message| !(message.kind == b'd' && message.body.first() == Some(&b'w'))));
    identify_system(&mut client);
    refused.code
}

fn wait_repaired(relay: &Relay, primary: &Postgres, path: &Path) {
    wait_until("the segment to be whole again", || damaged(relay).is_empty() && path.exists());
    assert!(std::fs::read(path).unwrap() == std::fs::read(original(primary, path)).unwrap());
    assert_eq!(relay.metric("walrelay_store_damaged_segments"), Some(0.0));
    let left = std::fs::read_dir(relay.wal_dir()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(!left.into_iter().any(|name| name.to_string_lossy().ends_with(".tmp")));
}

/// Somebody damages a segment of a running relay. Whoever asks for it gets an error, others are not disturbed, and it heals
/// while the process runs.
fn heals(damage: impl FnOnce(&Path)) {
    let Some((primary, proxy, mut relay)) = filled() else { return };
    let live_from = relay.flushed();
    let mut live = RawClient::replication(relay.port).unwrap();
    live.start_replication(None, live_from, 1).unwrap();
    let sessions = relay.metric("walrelay_upstream_sessions_total");
    let path = complete_segments(&relay)[2].clone();
    damage(&path);
    assert_eq!(refusal(&relay, &path), "XX001");
    wait_repaired(&relay, &primary, &path);
    assert_eq!(repaired(&relay), 1.0);
    relay.wait_logged("WAL segment is damaged and is not served");
    relay.wait_logged("WAL segment is as it was written again");
    assert_eq!(read_all(&relay, &primary), Event::Silence, "all is served");
    write_wal(&primary, MB);
    let upto = primary.flushed();
    live.read_wal(live_from, upto);
    relay.wait_flushed(upto);
    assert_same_wal(&relay.wal_dir(), &primary, upto);
    assert_eq!(relay.metric("walrelay_upstream_sessions_total"), sessions, "the stream was disturbed");
    proxy.assert_honest();
    relay.kill();
    relay.start();
    assert_eq!(read_all(&relay, &primary), Event::Silence, "also after a restart");
}

#[test]
fn a_rotten_byte_is_fetched_again() {
    heals(|path| flip(path, 777_777));
}

#[test]
fn a_segment_that_an_operator_removed_is_fetched_again() {
    heals(|path| std::fs::remove_file(path).unwrap());
}

#[test]
fn a_segment_that_an_operator_cut_short_is_fetched_again() {
    heals(|path| std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(300_000).unwrap());
}

#[test]
fn what_nobody_asks_for_is_found_and_fetched_again() {
    let faults = Faults::new();
    let Some((primary, _proxy, mut relay)) = filled_with(&faults) else { return };
    relay.terminate();
    relay.set("store.scrub_interval", "\"1s\"");
    relay.start();
    let metric = |name: &str| relay.metric(name).unwrap_or(0.0);
    let segments = complete_segments(&relay);
    let held = f64::from(u32::try_from(segments.len()).unwrap());
    wait_until("a round", || metric("walrelay_store_scrub_rounds_total") >= 1.0);
    assert!(metric("walrelay_store_scrubbed_segments_total") >= held, "each of the {held} was read");
    assert_eq!(metric("walrelay_store_suspect_segments_total"), 0.0);
    let damages: [fn(&Path); 3] = [
        |path| flip(path, 777_777),
        |path| std::fs::remove_file(path).unwrap(),
        |path| std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(300_000).unwrap(),
    ];
    for (number, damage) in damages.into_iter().enumerate() {
        let path = &segments[2 * number + 1];
        damage(path);
        let mended = number + 1;
        wait_until("it to be found and mended", || repaired(&relay) as usize == mended);
        wait_repaired(&relay, &primary, path);
    }
    faults.set("read_fails", 0);
    wait_until("an error of the disk to be found", || metric("walrelay_store_read_errors_total") >= 1.0);
    faults.clear("read_fails");
    wait_until("all to be whole again", || damaged(&relay).is_empty());
    let rounds = metric("walrelay_store_scrub_rounds_total");
    wait_until("another round", || metric("walrelay_store_scrub_rounds_total") >= rounds + 2.0);
    relay.terminate();
}

#[test]
fn segments_that_an_operator_removed_while_the_relay_was_down_are_fetched_again() {
    let Some((primary, proxy, mut relay)) = filled() else { return };
    let (oldest, upto) = (relay.oldest(), relay.flushed());
    relay.kill();
    proxy.close();
    let segments = complete_segments(&relay);
    for path in &segments[3..6] {
        std::fs::remove_file(path).unwrap();
    }
    relay.launch();
    relay.wait_serving();
    assert_eq!((relay.oldest(), relay.flushed()), (oldest, upto), "what is before the hole is held");
    let missing: Vec<_> = segments[3..6].iter().map(|path| file_name(path).to_owned()).collect();
    let told: Vec<_> =
        damaged(&relay).iter().map(|entry| entry["segment"].as_str().unwrap().to_owned()).collect();
    assert_eq!(told, missing);
    assert!(damaged(&relay).iter().all(|entry| entry["detail"] == "its file is missing"));
    assert_eq!(relay.metric("walrelay_store_damaged_segments"), Some(3.0));
    assert_eq!(refusal(&relay, &segments[4]), "XX001");
    proxy.open();
    for path in &segments[3..6] {
        wait_repaired(&relay, &primary, path);
    }
    assert_eq!(repaired(&relay), 3.0);
    assert_eq!(read_all(&relay, &primary), Event::Silence);
    assert_eq!(assert_same_wal(&relay.wal_dir(), &primary, upto), oldest);
}

#[test]
fn a_segment_that_the_disk_does_not_give_back_is_fetched_again_and_not_for_ever() {
    let faults = Faults::new();
    let Some((primary, _proxy, mut relay)) = filled_with(&faults) else { return };
    let path = complete_segments(&relay)[2].clone();
    let before = inode(&path);
    faults.set("read_fails", 0);
    assert_eq!(refusal(&relay, &path), "58030");
    wait_until("the segment to be replaced", || repaired(&relay) >= 1.0);
    assert_ne!(inode(&path), before, "new blocks");
    // The whole disk is broken, not that file: it is damaged again as soon as somebody asks for it.
    hold("repairs to be rare", Duration::from_secs(5), || {
        assert_eq!(refusal(&relay, &path), "58030");
        repaired(&relay) <= 5.0
    });
    faults.clear("read_fails");
    relay.assert_running();
    assert_eq!(read_all(&relay, &primary), Event::Silence);
    wait_repaired(&relay, &primary, &path);
}

#[test]
fn segments_of_an_earlier_timeline_and_the_first_of_the_next_are_fetched_again() {
    let Some((primary, _proxy, mut relay)) = filled() else { return };
    let next = primary.standby("next", primary.port, "");
    relay.terminate();
    let conninfo = format!(
        "\"host=127.0.0.1 port={} user=postgres sslmode=disable target_session_attrs=any\"",
        next.port
    );
    relay.set("upstream.conninfo", &conninfo);
    relay.start();
    write_wal(&primary, MB / 2);
    relay.wait_flushed(primary.flushed());
    next.wait_replayed(primary.flushed());
    next.promote();
    write_wal(&next, 10 * MB);
    relay.wait_flushed(next.flushed());
    let first_of_next = wal_files(&relay.wal_dir(), MB, 2).into_values().next().unwrap();
    let sessions = relay.metric("walrelay_upstream_sessions_total");
    for (path, timeline) in [(complete_segments(&relay).pop().unwrap(), 1), (first_of_next, 2)] {
        flip(&path, 77_777);
        let mut client = RawClient::replication(relay.port).unwrap();
        client.start_replication(None, start_of(&path), timeline).unwrap();
        let refused = error_in(&client.until_ready().unwrap()).expect("an error");
        assert_eq!(refused.code, "XX001", "{refused:?}");
        wait_repaired(&relay, &next, &path);
        client.start_replication(None, start_of(&path), timeline).unwrap();
        client.read_wal(start_of(&path), start_of(&path) + MB);
    }
    assert_eq!(repaired(&relay), 2.0);
    assert_eq!(relay.metric("walrelay_upstream_sessions_total"), sessions, "the stream was disturbed");
}

#[test]
fn what_the_primary_has_removed_is_told_once_and_hardly_asked_for() {
    let Some((primary, proxy, mut relay)) = filled() else { return };
    let segments = complete_segments(&relay);
    for setting in ["wal_keep_size = 0", "min_wal_size = '2MB'"] {
        primary.sql(&format!("alter system set {setting}"));
    }
    primary.reload();
    primary.wait_reported_flush("relay", primary.flushed());
    for _ in 0..3 {
        primary.switch_wal();
        primary.checkpoint();
    }
    wait_until("the primary to remove them", || {
        !segments[..6].iter().any(|path| original(&primary, path).exists())
    });
    relay.wait_flushed(primary.flushed());
    let tried = proxy.connections();
    for path in &segments[2..6] {
        std::fs::remove_file(path).unwrap();
    }
    for path in segments[2..6].iter().rev() {
        assert_eq!(refusal(&relay, path), "XX001");
    }
    let told = "the upstream has not got a damaged WAL segment any more";
    relay.wait_logged(told);
    hold("the primary to be left alone", Duration::from_secs(5), || {
        refusal(&relay, &segments[3]) == "XX001" && proxy.connections() <= tried + 4
    });
    assert!(relay.times_logged(told) <= 4, "{}", relay.log());
    let entry = damaged(&relay).into_iter().next().unwrap();
    assert_eq!(entry["segment"], file_name(&segments[2]));
    assert!(entry["repair_error"].as_str().unwrap().contains("has already been removed"), "{entry}");
    // A new session asks again, once for all.
    let (tried, sessions) = (proxy.connections(), relay.metric("walrelay_upstream_sessions_total"));
    proxy.cut();
    wait_until("the next session", || relay.metric("walrelay_upstream_sessions_total") > sessions);
    hold("the primary to be left alone", Duration::from_secs(3), || proxy.connections() <= tried + 4);
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    relay.assert_running();
    assert_eq!(repaired(&relay), 0.0);
}

#[test]
fn other_bytes_than_were_written_do_not_replace_a_segment() {
    let Some((primary, proxy, relay)) = filled() else { return };
    let path = complete_segments(&relay)[2].clone();
    let position = start_of(&path) + 500_000;
    proxy.edit(move |message| {
        if let Some((start, wal)) = wal_in(message)
            && (start..start + wal.len() as u64).contains(&position)
        {
            let at = message.len() - wal.len() + usize::try_from(position - start).unwrap();
            message[at] ^= 0x10;
        }
        Verdict::Forward
    });
    flip(&path, 777_777);
    let rotten = std::fs::read(&path).unwrap();
    assert_eq!(refusal(&relay, &path), "XX001");
    relay.wait_logged("could not fetch a damaged WAL segment again");
    let told = damaged(&relay)[0]["repair_error"].as_str().unwrap().to_owned();
    assert!(told.contains("differs from what was stored"), "{told}");
    hold("the segment to stay as it is", Duration::from_secs(4), || {
        std::fs::read(&path).unwrap() == rotten && damaged(&relay).len() == 1
    });
    assert_eq!(relay.times_logged("could not fetch a damaged WAL segment again"), 1);
    assert_eq!(refusal(&relay, &path), "XX001");
    proxy.edit_nothing();
    wait_repaired(&relay, &primary, &path);
    assert_eq!(read_all(&relay, &primary), Event::Silence);
}

#[test]
fn a_repair_that_hangs_keeps_no_commit_waiting_and_no_primary_from_stopping() {
    let Some((mut primary, proxy, relay)) = filled() else { return };
    // Whoever does not answer is dropped soon.
    primary.sql("alter system set wal_sender_timeout = '1s'");
    primary.reload();
    primary.wait_for_sql("show wal_sender_timeout", "1s");
    let path = complete_segments(&relay)[2].clone();
    let (position, upto) = (start_of(&path) + 500_000, relay.flushed());
    // The upstream stops sending in the middle of the segment; the stream is beyond it.
    let held = move |message: &mut Vec<u8>| match wal_in(message) {
        Some((start, wal)) if start < upto && start + wal.len() as u64 > position => Verdict::Drop,
        _ => Verdict::Forward,
    };
    proxy.edit(held);
    flip(&path, 777_777);
    assert_eq!(refusal(&relay, &path), "XX001");
    let of_repair = |primary: &Postgres, what: &str| {
        primary
            .sql(&format!("select {what} from pg_stat_replication where application_name = 'relay_repair'"))
    };
    wait_until("the repair to hang", || of_repair(&primary, "count(*)") == "1");
    primary.sql("alter system set synchronous_standby_names = '*'");
    primary.reload();
    primary
        .wait_for_sql("select sync_state from pg_stat_replication where application_name = 'relay'", "sync");
    let pid = of_repair(&primary, "pid");
    hold("the repair to answer, and to vouch for nothing", Duration::from_secs(3), || {
        of_repair(&primary, "pid || ' ' || (flush_lsn is null and sync_state = 'async')")
            == format!("{pid} true")
    });
    assert_eq!(of_repair(&primary, "reply_time is not null"), "t", "it was never asked");
    assert_eq!(damaged(&relay).len(), 1);
    primary.sql("alter system reset wal_sender_timeout");
    primary.reload();
    primary.wait_for_sql("show wal_sender_timeout", "1min");
    write_wal(&primary, MB);
    let took = primary.stop(Stop::Fast);
    assert!(took < Duration::from_secs(10), "the primary took {took:?} to stop");
    proxy.edit_nothing();
    primary.start();
    wait_repaired(&relay, &primary, &path);
    proxy.assert_honest();
}
