//! What the store keeps beside WAL: its control file, its slots, its directories. An error there is as final as one of WAL.

use std::path::PathBuf;
use std::time::Duration;

use crate::support::MB;
use crate::support::compare::assert_same_wal;
use crate::support::faults::Faults;
use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings};
use crate::support::proxy::Proxy;
use crate::support::raw::{RawClient, error_in, identify_system};
use crate::support::relay::Relay;
use crate::support::wait::wait_at_most;

/// A relay whose faults are in the files whose path begins with that of this file alone.
fn with_faults_in(file: &str, faults: &Faults) -> Option<(Postgres, Proxy, Relay)> {
    let installation = Installation::any()?;
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = Relay::new("relay", proxy.port)
        .with("store.tail_size", "\"4MB\"")
        .with("store.unwritten_size", "\"4MB\"");
    relay.environment.extend(faults.environment(&relay.data_dir().join(file)));
    relay.start();
    write_wal(&primary, 10 * MB);
    relay.wait_flushed(primary.flushed());
    Some((primary, proxy, relay))
}

fn control(relay: &Relay) -> PathBuf {
    relay.data_dir().join("walrelay.control")
}

/// The relay remembers what the server says of itself: with other words it writes its control file.
fn makes_it_write_its_control_file(primary: &Postgres, proxy: &Proxy) {
    primary.sql("alter system set timezone = 'Antarctica/Troll'");
    primary.reload();
    primary.wait_for_sql("show timezone", "Antarctica/Troll");
    proxy.cut();
}

/// It ends by itself, says which file it was, and goes on from there when the disk is well again.
fn ends_and_recovers(primary: &Postgres, relay: &mut Relay, faults: &Faults, fault: &str, file: &str) {
    let ended = wait_at_most(Duration::from_secs(30), || (!relay.is_running()).then_some(()));
    assert!(ended.is_some(), "still running after a sync of {file} failed");
    assert!(!relay.wait_for_end().success());
    assert!(relay.log().contains(file), "the log does not name {file}:\n{}", relay.log());
    faults.clear(fault);
    relay.start();
    write_wal(primary, MB);
    relay.wait_flushed(primary.flushed());
    assert_same_wal(&relay.wal_dir(), primary, primary.flushed());
}

#[test]
fn a_control_file_that_cannot_be_synced_ends_the_process() {
    let faults = Faults::new();
    let Some((primary, proxy, mut relay)) = with_faults_in("walrelay.control", &faults) else { return };
    let before = std::fs::read(control(&relay)).unwrap();
    faults.set("sync_fails", 0);
    makes_it_write_its_control_file(&primary, &proxy);
    let ended = wait_at_most(Duration::from_secs(30), || (!relay.is_running()).then_some(()));
    assert!(ended.is_some(), "still running");
    assert_eq!(
        std::fs::read(control(&relay)).unwrap(),
        before,
        "what is not durable took the old file's place"
    );
    ends_and_recovers(&primary, &mut relay, &faults, "sync_fails", "walrelay.control");
}

#[test]
fn slots_that_cannot_be_synced_end_the_process_and_none_was_promised() {
    let faults = Faults::new();
    let Some((primary, _proxy, mut relay)) = with_faults_in("walrelay.slots", &faults) else { return };
    faults.set("sync_fails", 0);
    let mut client = RawClient::replication(relay.port).unwrap();
    let promised = client.rows("CREATE_REPLICATION_SLOT promised PHYSICAL RESERVE_WAL");
    assert!(promised.is_err(), "a slot that is not durable: {promised:?}");
    ends_and_recovers(&primary, &mut relay, &faults, "sync_fails", "walrelay.slots");
    assert_eq!(relay.status()["slots"].as_array().map(Vec::len), Some(0));
}

#[test]
fn a_directory_that_cannot_be_synced_ends_the_process() {
    let faults = Faults::new();
    let Some((primary, proxy, mut relay)) = with_faults_in("wal", &faults) else { return };
    faults.set("sync_dir_fails", 0);
    write_wal(&primary, 4 * MB);
    let upto = primary.flushed();
    ends_and_recovers(&primary, &mut relay, &faults, "sync_dir_fails", "wal");
    assert!(proxy.passed(|passed| passed.flush_max) >= upto);
    proxy.assert_honest();
}

#[test]
fn a_folder_that_another_process_has_taken_over_is_left_to_it() {
    let Some((primary, proxy, mut relay)) = with_faults_in("none", &Faults::new()) else { return };
    relay.terminate();
    let of_another = std::fs::read(control(&relay)).unwrap();
    relay.start();
    assert_ne!(std::fs::read(control(&relay)).unwrap(), of_another, "each process makes it its own");
    // As through another mount of the same disk, where the lock is not seen.
    std::fs::write(control(&relay), &of_another).unwrap();
    makes_it_write_its_control_file(&primary, &proxy);
    relay.wait_logged("is in use by another process");
    relay.wait_needs_attention();
    assert_eq!(std::fs::read(control(&relay)).unwrap(), of_another);
}

#[test]
fn segments_that_may_not_be_opened_end_the_stream_that_needs_them_and_no_other() {
    let faults = Faults::new();
    let Some((primary, _proxy, mut relay)) = with_faults_in("wal", &faults) else { return };
    let standby = primary.standby("standby", relay.port, "");
    relay.wait_downstream("standby", "streaming");
    faults.set("open_denied", 0);
    let mut client = RawClient::replication(relay.port).unwrap();
    client.start_replication(None, relay.oldest(), 1).unwrap();
    let answer = client.until_ready().unwrap();
    let refused = error_in(&answer).unwrap_or_else(|| panic!("no error: {answer:?}"));
    assert!(["58030", "42501"].contains(&refused.code.as_str()), "{refused:?}");
    identify_system(&mut client);
    write_wal(&primary, MB);
    standby.wait_replayed(primary.flushed());
    relay.wait_flushed(primary.flushed());
    faults.clear("open_denied");
    let from = relay.oldest();
    client.start_replication(None, from, 1).unwrap();
    client.read_wal(from, primary.flushed());
    // What was found damaged meanwhile was fetched by a connection of its own.
    assert_eq!(relay.status()["upstream"]["sessions"], 1, "the upstream connection was disturbed");
    relay.assert_running();
}
