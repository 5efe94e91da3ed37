//! The disk fills up, fails, stalls or turns read-only: acknowledgements stop, sessions stay, and it heals by itself.

use std::time::Duration;

use crate::support::compare::{assert_equal_clusters, assert_same_wal};
use crate::support::faults::{Faults, SmallDisk};
use crate::support::lab::{Installation, may_mount};
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings};
use crate::support::proxy::Proxy;
use crate::support::raw::{RawClient, error_in};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_at_most, wait_for, wait_until};
use crate::support::{MB, lsn, lsn_text};

const SHORT_TIMEOUTS: &str = "wal_receiver_timeout = 3s\nwal_receiver_status_interval = 1s";

struct Chain {
    primary: Postgres,
    proxy: Proxy,
    relay: Relay,
    standby: Postgres,
}

fn chain(prepare: impl FnOnce(Relay) -> Relay) -> Option<Chain> {
    let installation = Installation::any()?;
    let primary = Settings::new().segment_size_mb(1).line("wal_sender_timeout = 3s").start(&installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = prepare(Relay::new("relay", proxy.port));
    relay.set("upstream.wal_receiver_timeout", "\"3s\"");
    relay.set("downstream.wal_sender_timeout", "\"3s\"");
    relay.start();
    let standby = primary.standby("standby", relay.port, SHORT_TIMEOUTS);
    relay.wait_downstream("standby", "streaming");
    Some(Chain { primary, proxy, relay, standby })
}

/// The same with the relay's data on a disk of its own.
fn chain_on(
    disk: impl FnOnce() -> SmallDisk,
    prepare: impl FnOnce(Relay) -> Relay,
) -> Option<(SmallDisk, Chain)> {
    if !may_mount() {
        return None;
    }
    let disk = disk();
    let chain = chain(|relay| prepare(relay.with_data_dir(&disk.path().join("relay"))))?;
    Some((disk, chain))
}

impl Chain {
    fn session(&self) -> serde_json::Value {
        self.relay.downstream("standby").first().map(|session| session["pid"].clone()).unwrap_or_default()
    }

    fn heals(&mut self) {
        let upto = self.primary.flushed();
        self.relay.assert_running();
        let healed = wait_at_most(Duration::from_secs(30), || (self.relay.flushed() >= upto).then_some(()));
        assert!(healed.is_some(), "not healed after 30 s; {}", self.relay.condition());
        self.primary.wait_reported_flush("relay", upto);
        assert_same_wal(&self.relay.wal_dir(), &self.primary, upto);
        assert_equal_clusters(&self.primary, &self.standby);
        self.proxy.assert_honest();
    }
}

#[test]
fn a_full_disk_stops_acknowledging_keeps_the_standby_and_heals() {
    let keep = |relay: Relay| relay.with("store.wal_keep_size", "\"4MB\"");
    let Some((disk, mut chain)) = chain_on(|| SmallDisk::of_megabytes(48), keep) else { return };
    write_wal(&chain.primary, MB);
    chain.standby.wait_replayed(chain.primary.flushed());
    let session = chain.session();
    let filler = disk.fill();
    // What was set aside beforehand is used up first.
    write_wal(&chain.primary, 12 * MB);
    let upto = chain.primary.flushed();
    wait_until("the store to notice", || chain.relay.condition() != "healthy");
    let connections = chain.proxy.connections();
    hold(
        "alive, silent about what it could not write, and the standby attached",
        Duration::from_secs(6),
        || {
            chain.relay.is_running()
                && chain.proxy.passed(|passed| passed.flush_max) < upto
                && chain.session() == session
        },
    );
    assert!(chain.proxy.connections() - connections <= 2, "it reconnects for nothing");
    std::fs::remove_file(filler).unwrap();
    chain.heals();
    assert_eq!(chain.session(), session, "the standby had to connect again");
}

#[test]
fn writes_that_fail_for_want_of_space_are_tried_again() {
    let faults = Faults::new();
    let Some(mut chain) = chain(|relay| relay.with_faults(&faults)) else { return };
    write_wal(&chain.primary, MB);
    let session = chain.session();
    faults.set("write_full", 0);
    write_wal(&chain.primary, 2 * MB);
    wait_until("the store to notice", || chain.relay.condition() != "healthy");
    let upto = chain.primary.flushed();
    hold("alive and silent", Duration::from_secs(4), || {
        chain.relay.is_running()
            && chain.proxy.passed(|passed| passed.flush_max) < upto
            && chain.session() == session
    });
    faults.clear("write_full");
    chain.heals();
}

#[test]
fn started_on_a_full_disk_it_serves_and_heals() {
    let keep = |relay: Relay| relay.with("store.wal_keep_size", "\"16MB\"");
    let Some((disk, mut chain)) = chain_on(|| SmallDisk::of_megabytes(48), keep) else { return };
    write_wal(&chain.primary, 2 * MB);
    let upto = chain.primary.flushed();
    chain.relay.wait_flushed(upto);
    chain.relay.kill();
    let filler = disk.fill();
    chain.relay.launch();
    chain.relay.wait_serving();
    chain.standby.wait_replayed(upto);
    write_wal(&chain.primary, 8 * MB);
    std::fs::remove_file(filler).unwrap();
    chain.heals();
}

#[test]
fn the_reserve_lets_it_start_on_a_full_disk_again_and_again() {
    let keep = |relay: Relay| relay.with("store.wal_keep_size", "\"16MB\"");
    let Some((disk, mut chain)) = chain_on(|| SmallDisk::of_megabytes(48), keep) else { return };
    let reserve = chain.relay.wal_dir().join("walrelay.reserve");
    write_wal(&chain.primary, MB / 2);
    let upto = chain.primary.flushed();
    chain.relay.wait_flushed(upto);
    wait_until("the reserve", || reserve.exists());
    let filler = disk.fill();
    for _ in 0..3 {
        chain.relay.kill();
        chain.relay.launch();
        chain.relay.wait_serving();
        assert!(chain.relay.flushed() >= upto, "what was acknowledged is not held");
        // Out of the space of the file that was written anew.
        wait_until("the reserve to be made again", || reserve.exists());
    }
    // What the relay was just making when the disk became full is removed again: until nothing more comes free, a slot
    // that keeps nothing finds its place.
    let mut client = RawClient::replication(chain.relay.port).unwrap();
    let mut attempts = 0..;
    let refused = wait_for("the refusal", || {
        disk.fill();
        let slot = format!("keeper{}", attempts.next()?);
        client.rows(&format!("CREATE_REPLICATION_SLOT {slot} PHYSICAL")).err()
    });
    assert_eq!(
        (refused.code.as_str(), refused.message.as_str()),
        ("53100", "could not save replication slots")
    );
    chain.relay.assert_running();
    std::fs::remove_file(filler).unwrap();
    client.rows("CREATE_REPLICATION_SLOT keeper PHYSICAL RESERVE_WAL").unwrap();
    write_wal(&chain.primary, 2 * MB);
    chain.heals();
}

#[test]
fn whoever_wants_more_wal_to_be_kept_is_refused_before_wal_is() {
    let keep =
        |relay: Relay| relay.with("store.wal_keep_size", "\"16MB\"").with("store.reserve_segments", "6");
    let Some((disk, mut chain)) = chain_on(|| SmallDisk::of_megabytes(64), keep) else { return };
    let reserve = chain.relay.wal_dir().join("walrelay.reserve");
    wait_until("the reserve", || reserve.exists());
    let (session, mut client) = (chain.session(), RawClient::replication(chain.relay.port).unwrap());
    let refusal = |client: &mut RawClient| {
        let refused = client.rows("CREATE_REPLICATION_SLOT keeper PHYSICAL RESERVE_WAL").unwrap_err();
        (refused.code, refused.message)
    };
    let words = "could not reserve WAL for replication slot \"keeper\": No space left on device";
    let no_space = ("53100".to_owned(), words.to_owned());
    // Six segments and what the state files need is more than that; one segment and that is less.
    let filler = disk.fill_but(8 * MB);
    assert_eq!(refusal(&mut client), no_space);
    write_wal(&chain.primary, MB);
    chain.relay.wait_flushed(chain.primary.flushed());
    assert_eq!(chain.relay.condition(), "healthy", "WAL was refused before slots were");
    disk.fill_but(4 * MB + MB / 2);
    write_wal(&chain.primary, 12 * MB);
    wait_until("the store to notice", || chain.relay.condition() != "healthy");
    assert_eq!(refusal(&mut client), no_space);
    // There is space for the slot itself, as long as it keeps nothing.
    client.rows("CREATE_REPLICATION_SLOT idle PHYSICAL").unwrap();
    let answer = client.start_replication(Some("idle"), chain.relay.oldest(), 1).unwrap();
    assert_eq!(error_in(&answer).map(|error| error.code).as_deref(), Some("53100"), "{answer:?}");
    assert_eq!(chain.session(), session, "the standby was disturbed");
    std::fs::remove_file(filler).unwrap();
    wait_until("space to be noticed", || chain.relay.condition() == "healthy");
    client.rows("CREATE_REPLICATION_SLOT keeper PHYSICAL RESERVE_WAL").unwrap();
    client.rows("DROP_REPLICATION_SLOT keeper").unwrap();
    chain.heals();
    assert_eq!(chain.session(), session, "the standby had to connect again");
}

#[test]
fn without_a_free_inode_it_waits_and_heals() {
    let Some((disk, mut chain)) = chain_on(|| SmallDisk::of_files(64), |relay| relay) else { return };
    write_wal(&chain.primary, MB);
    chain.standby.wait_replayed(chain.primary.flushed());
    let session = chain.session();
    let fillers = disk.fill_inodes();
    write_wal(&chain.primary, 6 * MB);
    let upto = chain.primary.flushed();
    wait_until("the store to notice", || chain.relay.condition() != "healthy");
    hold("alive, silent, and the standby attached", Duration::from_secs(3), || {
        chain.relay.is_running()
            && chain.proxy.passed(|passed| passed.flush_max) < upto
            && chain.session() == session
    });
    std::fs::remove_dir_all(fillers).unwrap();
    chain.heals();
    assert_eq!(chain.session(), session, "the standby had to connect again");
}

#[test]
fn a_sync_that_fails_is_final_for_the_process_and_nothing_more_is_acknowledged() {
    for (fault, after) in [("sync_fails", 0), ("sync_fails", 3), ("sync_full", 0)] {
        let faults = Faults::new();
        let Some(mut chain) = chain(|relay| relay.with_faults(&faults)) else { return };
        write_wal(&chain.primary, MB);
        chain.relay.wait_flushed(chain.primary.flushed());
        faults.set(fault, after);
        write_wal(&chain.primary, 4 * MB);
        let upto = chain.primary.flushed();
        let status = wait_at_most(Duration::from_secs(15), || (!chain.relay.is_running()).then_some(()));
        assert!(status.is_some(), "still running after a failed sync");
        assert!(!chain.relay.wait_for_end().success(), "a failed sync is not a success");
        assert!(
            chain.proxy.passed(|passed| passed.flush_max) < upto,
            "acknowledged what could not be synced"
        );
        faults.clear(fault);
        chain.relay.start();
        chain.heals();
    }
}

#[test]
fn a_disk_that_turns_read_only_ends_the_process_with_a_clear_word() {
    let faults = Faults::new();
    let Some(mut chain) = chain(|relay| relay.with_faults(&faults)) else { return };
    write_wal(&chain.primary, MB);
    let upto = chain.primary.flushed();
    chain.relay.wait_flushed(upto);
    faults.set("read_only", 0);
    write_wal(&chain.primary, 2 * MB);
    let ended = wait_at_most(Duration::from_secs(15), || (!chain.relay.is_running()).then_some(()));
    assert!(ended.is_some(), "still running on a disk that is read-only");
    assert!(!chain.relay.wait_for_end().success());
    assert!(chain.relay.log().contains("Read-only file system"), "{}", chain.relay.log());
    assert!(chain.proxy.passed(|passed| passed.flush_max) < chain.primary.flushed());
    faults.clear("read_only");
    chain.relay.start();
    chain.heals();
}

#[test]
fn what_is_not_durable_here_reaches_no_standby_where_that_is_wished() {
    let faults = Faults::new();
    let Some(mut chain) = chain(|relay| relay.with_faults(&faults).with("downstream.send", "\"flushed\""))
    else {
        return;
    };
    write_wal(&chain.primary, MB);
    chain.standby.wait_replayed(chain.primary.flushed());
    faults.set("sync_slow", 4_000);
    write_wal(&chain.primary, MB);
    let upto = chain.primary.flushed();
    let mut was_ahead = false;
    wait_until("the standby to have it all", || {
        // In this order: what is durable only grows.
        let received = lsn(&chain.standby.sql("select pg_last_wal_receive_lsn()"));
        let (verified, flushed) = (chain.relay.position("/store/verified"), chain.relay.flushed());
        assert!(received <= flushed, "{} sent, {} durable", lsn_text(received), lsn_text(flushed));
        was_ahead |= verified > flushed;
        received >= upto
    });
    assert!(was_ahead, "nothing was ever waiting for a sync");
    faults.clear("sync_slow");
    chain.heals();
}

#[test]
fn a_disk_that_dies_ends_the_process() {
    let Some((disk, mut chain)) = chain_on(|| SmallDisk::of_megabytes(48), |relay| relay) else { return };
    write_wal(&chain.primary, MB);
    let upto = chain.primary.flushed();
    chain.relay.wait_flushed(upto);
    disk.cut_power(); // every write fails with EIO from now on
    write_wal(&chain.primary, 2 * MB);
    let ended = wait_at_most(Duration::from_secs(15), || (!chain.relay.is_running()).then_some(()));
    assert!(ended.is_some(), "still running on a dead disk");
    assert!(!chain.relay.wait_for_end().success());
    assert!(chain.proxy.passed(|passed| passed.flush_max) < chain.primary.flushed());
}

#[test]
fn a_slow_sync_holds_up_neither_keepalives_nor_standbys() {
    let faults = Faults::new();
    let Some(mut chain) = chain(|relay| relay.with_faults(&faults)) else { return };
    write_wal(&chain.primary, MB);
    chain.standby.wait_replayed(chain.primary.flushed());
    let (session, connections) = (chain.session(), chain.proxy.connections());
    faults.set("sync_slow", 8_000);
    write_wal(&chain.primary, MB);
    let upto = chain.primary.flushed();
    chain.standby.wait_replayed(upto); // send = "received": verified is enough
    hold("connected on both sides", Duration::from_secs(9), || {
        chain.proxy.connections() == connections && chain.session() == session && chain.relay.is_running()
    });
    faults.clear("sync_slow");
    chain.heals();
}

#[test]
fn a_slot_that_costs_the_primary_too_much_is_dropped_until_there_is_space() {
    // Servers before 15 do not tell where a slot is.
    let Some(installation) = Installation::since(15) else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let faults = Faults::new();
    let mut relay = Relay::new("relay", primary.port).with_faults(&faults);
    for (key, value) in [("tail_size", "1MB"), ("unwritten_size", "1MB")] {
        relay.set(&format!("store.{key}"), &format!("{value:?}"));
    }
    relay.set("upstream.slot_wal_keep_max", "\"6MB\"");
    relay.start();
    write_wal(&primary, 2 * MB);
    relay.wait_flushed(primary.flushed());
    let slots = "select count(*) from pg_replication_slots where slot_name = 'relay'";
    faults.set("write_full", 0);
    // What was made ready before is used up first; the slot may keep this.
    write_wal(&primary, 5 * MB);
    wait_until("the store to notice", || relay.condition() != "healthy");
    wait_until("the relay to have left", || primary.sql("select count(*) from pg_stat_replication") == "0");
    assert_eq!(primary.sql(slots), "1");
    write_wal(&primary, 8 * MB);
    primary.wait_for_sql(slots, "0");
    relay.wait_logged("the slot made the upstream keep too much: it was dropped");
    relay.assert_running();
    faults.clear("write_full");
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    primary.wait_for_sql(slots, "1");
    assert_same_wal(&relay.wal_dir(), &primary, upto);
}
