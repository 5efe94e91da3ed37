//! Commits that wait for standbys behind the relay: acknowledged when the policy says so, and not before.

use std::time::Duration;

use crate::support::lab::Installation;
use crate::support::load::{Load, assert_has_confirmed, write_wal};
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::proxy::Proxy;
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::support::{MB, lsn};

/// A primary that waits for the relay, a proxy that sees what the relay says, and the relay with a policy.
fn chain(prepare: impl FnOnce(Relay) -> Relay) -> Option<(Postgres, Proxy, Relay)> {
    let installation = Installation::any()?;
    let primary =
        Settings::new().segment_size_mb(1).line("synchronous_standby_names = 'relay'").start(&installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = prepare(Relay::new("relay", proxy.port));
    relay.start();
    Some((primary, proxy, relay))
}

/// A standby for which commits need not wait while it is made.
fn standby(primary: &Postgres, name: &str, relay: &Relay) -> Postgres {
    primary.standby(name, relay.port, "synchronous_standby_names = ''\nwal_receiver_status_interval = 1s")
}

fn acknowledge_of(relay: &Relay) -> serde_json::Value {
    relay.status()["upstream"]["acknowledge"].clone()
}

#[test]
fn a_commit_waits_for_a_quorum_of_standbys_and_for_no_other() {
    let Some((primary, proxy, relay)) =
        chain(|relay| relay.with("upstream.acknowledge", "\"ANY 1 (near, far)\""))
    else {
        return;
    };
    let mut other = standby(&primary, "other", &relay);
    let mut far = standby(&primary, "far", &relay);
    primary
        .wait_for_sql("select sync_state from pg_stat_replication where application_name = 'relay'", "sync");
    primary.sql("create table confirmed (id int)");
    for _ in 0..20 {
        primary.sql("insert into confirmed values (1)");
        let committed = lsn(&primary.sql("select pg_current_wal_flush_lsn()"));
        let on_far = lsn(&far.sql("select pg_last_wal_receive_lsn()"));
        assert!(on_far + 8192 >= committed, "confirmed before it was there");
    }
    far.stop(Stop::Fast);
    let load = Load::start_waiting(&primary);
    hold("a commit waits for near or far", Duration::from_secs(1), || load.committed() == 0);
    other.wait_replayed(primary.flushed());
    assert_eq!(load.committed(), 0, "it is on a standby that does not count");
    far.start();
    wait_until("commits to go on", || load.committed() > 10);
    drop(load);
    other.stop(Stop::Fast);
    proxy.assert_honest();
}

#[test]
fn with_remote_apply_a_commit_is_seen_on_the_standby_behind_the_relay() {
    let Some((primary, _proxy, relay)) = chain(|relay| relay) else { return };
    let heir = standby(&primary, "heir", &relay);
    primary.sql("create table seen (id int)");
    wait_until("the table to be there", || heir.try_sql("select count(*) from seen").is_ok());
    let mut client = RawClient::sql(primary.port).unwrap();
    client.rows("set synchronous_commit = remote_apply").unwrap();
    for id in 1..=50 {
        client.rows(&format!("insert into seen values ({id})")).unwrap();
        assert_eq!(heir.sql("select max(id) from seen"), id.to_string(), "confirmed before it was applied");
    }
    let applied = acknowledge_of(&relay)["apply"].as_str().map(lsn);
    assert!(applied.is_some(), "{}", acknowledge_of(&relay));
}

#[test]
fn a_standby_that_is_away_for_too_long_is_gone_on_without_and_that_is_remembered() {
    let Some((primary, _proxy, mut relay)) = chain(|relay| {
        relay.with("upstream.acknowledge", "\"FIRST 1 (far)\"").with("upstream.acknowledge_timeout", "\"2s\"")
    }) else {
        return;
    };
    let mut far = standby(&primary, "far", &relay);
    primary.sql("create table confirmed (id int)");
    // It may have gone on alone while the standby was made.
    wait_until("the standby to have everything", || {
        let told = acknowledge_of(&relay);
        told["degraded"] == false && told["flush"].as_str().is_some_and(|flush| lsn(flush) > 0)
    });
    far.stop(Stop::Fast);
    let before = primary.flushed();
    primary.sql("insert into confirmed values (1)");
    let after = primary.flushed();
    let (from, _, is_open, is_degraded) = last_window(&relay);
    assert!(from <= before && is_open && is_degraded, "{}", acknowledge_of(&relay));
    wait_until("the window to reach what was confirmed", || last_window(&relay).1 >= after);
    relay.wait_logged("durable here alone");
    assert_eq!(relay.metric("walrelay_upstream_acknowledge_degraded"), Some(1.0));
    // It is remembered by the directory, also before the upstream is there again.
    relay.kill();
    relay.launch();
    relay.wait_serving();
    let (restored_from, to, is_open, _) = last_window(&relay);
    assert!(restored_from == from && to >= after && is_open, "{}", acknowledge_of(&relay));
    far.start();
    wait_until("the standby to have it", || {
        let (_, _, is_open, is_degraded) = last_window(&relay);
        !is_open && !is_degraded
    });
    relay.wait_ready();
    relay.terminate();
    relay.launch();
    relay.wait_serving();
    let (told, to, is_open, _) = last_window(&relay);
    assert!(told == from && to >= after && !is_open, "{}", acknowledge_of(&relay));
}

/// Start and end of the last window, whether it is open, and whether the relay goes on without the standbys now.
fn last_window(relay: &Relay) -> (u64, u64, bool, bool) {
    let told = acknowledge_of(relay);
    let window = told["local_windows"].as_array().unwrap().last().unwrap().clone();
    let position = |key: &str| lsn(window[key].as_str().unwrap());
    (position("from"), position("to"), window["open"] == true, told["degraded"] == true)
}

#[test]
fn a_standby_that_is_dead_costs_the_primary_neither_wal_nor_its_shutdown() {
    let Some((mut primary, proxy, _relay)) = chain(|relay| {
        relay.with("upstream.acknowledge", "\"ANY 1 (far)\"").with("upstream.slot", "\"relay\"")
    }) else {
        return;
    };
    // Nobody waits for commits here: what is watched is the slot.
    primary.add_settings("synchronous_standby_names = ''");
    primary.reload();
    write_wal(&primary, 8 * MB);
    let upto = primary.flushed();
    wait_until("the slot to follow what is durable at the relay", || {
        let slot = primary
            .sql("select coalesce(restart_lsn, '0/0') from pg_replication_slots where slot_name = 'relay'");
        lsn(&slot) >= upto
    });
    assert_eq!(proxy.passed(|passed| passed.flush_max), 0, "acknowledged without the standby");
    let took = primary.stop(Stop::Fast);
    assert!(took < Duration::from_secs(3), "the primary's fast stop took {took:?}");
    proxy.assert_honest();
}

#[test]
fn what_reports_for_a_name_must_be_the_user_that_is_bound_to_it() {
    let Some((primary, proxy, relay)) = chain(|relay| {
        relay
            .with("upstream.acknowledge", "\"ANY 1 (far)\"")
            .with("upstream.acknowledge_users", "{ FAR = \"somebody_else\" }")
    }) else {
        return;
    };
    let far = standby(&primary, "far", &relay);
    primary.add_settings("synchronous_standby_names = ''");
    primary.reload();
    write_wal(&primary, MB);
    far.wait_replayed(primary.flushed());
    hold("nothing is acknowledged", Duration::from_secs(1), || proxy.passed(|passed| passed.flush_max) == 0);
}

#[test]
fn every_confirmed_commit_is_on_the_standby_that_is_promoted_after_the_primary_is_lost() {
    let kills = std::env::var("WALRELAY_KILLS").map_or(5, |text| text.parse().unwrap());
    for round in 0..kills {
        let Some((mut primary, proxy, relay)) =
            chain(|relay| relay.with("upstream.acknowledge", "\"ANY 1 (heir)\""))
        else {
            return;
        };
        let heir = standby(&primary, "heir", &relay);
        let load = Load::start(&primary, Duration::ZERO);
        wait_until("some commits", || load.committed() > 50 + 37 * (round % 5));
        primary.stop(Stop::Kill);
        let confirmed = load.committed();
        heir.wait_replayed(relay.flushed());
        drop(load);
        heir.promote();
        assert_has_confirmed(&heir, confirmed);
        proxy.assert_honest();
    }
}

#[test]
fn with_a_quorum_of_two_far_relays_one_of_them_and_the_near_one_can_be_lost_with_the_primary() {
    let Some((mut primary, proxy, mut near)) =
        chain(|relay| relay.with("upstream.acknowledge", "\"ANY 1 (a, b)\""))
    else {
        return;
    };
    let mut a = Relay::streaming_from("a", near.port);
    let b = Relay::streaming_from("b", near.port);
    let heir = standby(&primary, "heir", &b);
    let load = Load::start(&primary, Duration::ZERO);
    wait_until("some commits", || load.committed() > 50);
    a.kill();
    let before = load.committed();
    wait_until("commits to go on by the other one", || load.committed() > before + 50);
    primary.stop(Stop::Kill);
    let confirmed = load.committed();
    near.kill();
    std::fs::remove_dir_all(near.data_dir()).unwrap();
    heir.wait_replayed(b.flushed());
    drop(load);
    heir.promote();
    assert_has_confirmed(&heir, confirmed);
    proxy.assert_honest();
}
