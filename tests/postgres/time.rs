//! Clocks that jump and processes that sleep: nothing but what is shown depends on the wall clock, and nobody who slept vouches
//! for what he missed.

use std::time::Duration;

use rustix::process::Signal;

use crate::support::compare::{assert_equal_clusters, assert_same_wal};
use crate::support::faults::Faults;
use crate::support::lab::Installation;
use crate::support::load::{Load, write_wal};
use crate::support::postgres::{Postgres, Settings};
use crate::support::raw::{RawClient, identify_system};
use crate::support::relay::Relay;
use crate::support::wait::{wait_at_most, wait_until};
use crate::support::{MB, lsn, lsn_text};

const TEN_DAYS: u64 = 10 * 24 * 3600;

/// The day that the relay believes it to be, by when it says that a client came.
fn day_shown(relay: &Relay) -> String {
    let client = RawClient::replication(relay.port).unwrap();
    wait_until("the client to be shown", || !relay.downstream("raw").is_empty());
    let day = relay.downstream("raw")[0]["backend_start"].as_str().unwrap()[..10].to_owned();
    drop(client);
    wait_until("the client to be gone", || relay.downstream("raw").is_empty());
    day
}

/// A consumer without a slot and, further on, a slot, both left by their clients. Returns the timeline and the start of the
/// oldest segment that stays for them.
fn two_that_are_away(primary: &Postgres, relay: &Relay) -> (u32, u64) {
    let parameters = [("user", "postgres"), ("replication", "true"), ("application_name", "nameless")];
    let mut client = RawClient::login(relay.port, &parameters).unwrap();
    let (_, timeline, position) = identify_system(&mut client);
    let needed = position - position % MB;
    client.start_replication(None, needed, timeline).unwrap();
    client.read_wal(needed, position);
    client.send_status(position, position, 0).unwrap();
    let position = lsn_text(position);
    wait_until("the relay to know what the consumer has", || {
        relay.status()["consumers"][0]["restart_lsn"] == position.as_str()
    });
    drop(client);
    write_wal(primary, 2 * MB);
    primary.checkpoint();
    relay.wait_flushed(primary.flushed());
    let mut client = RawClient::replication(relay.port).unwrap();
    client.rows("CREATE_REPLICATION_SLOT away PHYSICAL RESERVE_WAL").unwrap();
    let restart_lsn = relay.slot("away").unwrap()["restart_lsn"].as_str().map(lsn);
    assert!(restart_lsn > Some(needed + MB), "the slot keeps what the other one needs");
    (timeline, needed)
}

#[test]
fn a_wall_clock_that_jumps_by_days_changes_nothing_but_what_is_shown() {
    let Some(installation) = Installation::in_turn(0) else { return };
    let primary = Settings::new()
        .segment_size_mb(1)
        .line("synchronous_standby_names = 'relay'")
        .line("synchronous_commit = local")
        .start(&installation);
    let faults = Faults::new();
    let mut relay = Relay::new("relay", primary.port).with_faults(&faults);
    relay.set("store.wal_keep_size", "\"1MB\"");
    relay.set("store.retain_without_slot", "\"1h\"");
    relay.set("store.idle_replication_slot_timeout", "\"1h\"");
    relay.start();
    let standby = primary.standby("standby", relay.port, "");
    relay.wait_downstream("standby", "streaming");
    let (timeline, needed) = two_that_are_away(&primary, &relay);
    let sessions = relay.status()["upstream"]["sessions"].clone();
    let standby_pid = relay.downstream("standby")[0]["pid"].clone();
    let today = day_shown(&relay);
    let load = Load::start(&primary, Duration::ZERO);
    for (fault, seconds) in [("clock_ahead", TEN_DAYS), ("clock_behind", TEN_DAYS), ("clock_ahead", 0)] {
        faults.clear("clock_ahead");
        faults.clear("clock_behind");
        faults.set(fault, seconds);
        assert_eq!(day_shown(&relay) == today, seconds == 0, "the clock of the relay does not jump");
        let before = load.committed();
        write_wal(&primary, 4 * MB);
        wait_until("commits to go on", || load.committed() > before + 20);
        relay.wait_flushed(primary.flushed());
        let lag = relay.downstream("standby")[0]["flush_lag"].as_f64().unwrap_or(0.0);
        assert!((0.0..60.0).contains(&lag), "{lag} s");
        // Neither has been away for an hour by a clock that nobody can set. Slots are looked at when a segment is complete.
        let upto = primary.flushed();
        wait_until("segments to be complete", || relay.position("/store/sealed") >= upto - upto % MB);
        assert_eq!(relay.slot("away").unwrap()["wal_status"], "reserved");
        assert_eq!(relay.status()["consumers"][0]["application_name"], "nameless");
    }
    drop(load);
    assert_eq!(relay.slot("away").unwrap()["wal_status"], "reserved");
    assert_eq!(relay.status()["upstream"]["sessions"], sessions, "the relay has connected again");
    assert_eq!(relay.downstream("standby")[0]["pid"], standby_pid, "the standby has connected again");
    assert_eq!(relay.oldest(), needed, "WAL that a consumer needs has gone");
    let upto = primary.flushed();
    let mut back = RawClient::replication(relay.port).unwrap();
    back.start_replication(None, needed, timeline).unwrap();
    back.read_wal(needed, upto);
    assert_equal_clusters(&primary, &standby);
    assert_same_wal(&relay.wal_dir(), &primary, upto);
}

#[test]
fn a_relay_that_was_paused_vouches_for_nothing_it_missed_and_goes_on() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let primary = Settings::new()
        .segment_size_mb(1)
        .line("synchronous_standby_names = 'relay'")
        .line("wal_sender_timeout = 1s")
        .start(&installation);
    let mut relay = Relay::new("relay", primary.port);
    relay.set("upstream.wal_receiver_timeout", "\"1s\"");
    relay.set("downstream.wal_sender_timeout", "\"1s\"");
    relay.start();
    primary.wait_for_sql("select sync_state from pg_stat_replication", "sync");
    let standby = primary.standby("standby", relay.port, "wal_receiver_timeout = 1s");
    let load = Load::start(&primary, Duration::ZERO);
    wait_until("some commits", || load.committed() > 20);
    relay.process().signal(Signal::STOP);
    let pid = || primary.sql("select coalesce(min(pid), 0) from pg_stat_replication");
    wait_until("the primary to give the relay up", || pid() == "0");
    let missed = primary.flushed();
    let stopped_at = load.committed();
    let none = wait_at_most(Duration::from_millis(500), || (load.committed() > stopped_at + 1).then_some(()));
    assert!(none.is_none(), "commits were confirmed without the relay");
    relay.process().signal(Signal::CONT);
    wait_until("commits to go on", || load.committed() > stopped_at + 20);
    drop(load);
    assert!(relay.flushed() >= missed);
    relay.assert_running();
    assert_equal_clusters(&primary, &standby);
    assert_same_wal(&relay.wal_dir(), &primary, missed);
}
