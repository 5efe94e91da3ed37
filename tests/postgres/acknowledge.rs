//! Commits that wait for standbys behind the relay: acknowledged when the policy says so, and not before.

use std::time::Duration;

use crate::support::lab::Installation;
use crate::support::load::{Load, write_wal};
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::proxy::Proxy;
use crate::support::raw::{RawClient, identify_system};
use crate::support::receivewal::PgReceivewal;
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::support::{MB, lsn, lsn_text};
use crate::timelines::{Torn, promote_behind, torn, wait_timeline};

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
    let mut client = RawClient::sql(primary.port).unwrap();
    for _ in 0..20 {
        client.rows("begin").unwrap();
        client.rows("insert into confirmed values (1)").unwrap();
        // The record of the commit begins here, or later.
        let commit = lsn(client.rows("select pg_current_wal_insert_lsn()").unwrap()[0][0].as_ref().unwrap());
        client.rows("commit").unwrap();
        let on_far = lsn(&far.sql("select pg_last_wal_receive_lsn()"));
        assert!(on_far > commit, "confirmed before it was there");
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

/// Commits once, with remote_apply; another thread waits for it.
fn applying_commit(primary: &Postgres) -> std::thread::JoinHandle<()> {
    let port = primary.port;
    std::thread::spawn(move || {
        let mut client = RawClient::sql(port).unwrap();
        client.rows("set synchronous_commit = remote_apply").unwrap();
        client.rows("insert into seen values (1)").unwrap();
    })
}

#[test]
fn with_remote_apply_the_slowest_of_all_standbys_is_waited_for_or_those_that_the_policy_wants() {
    let Some((primary, proxy, mut relay)) = chain(|relay| relay) else { return };
    let [quick, slow] = ["quick", "slow"].map(|name| standby(&primary, name, &relay));
    // It applies nothing, and is not waited for where others do.
    let _receiver = PgReceivewal::start(&primary.installation, relay.port, &["--synchronous"]);
    relay.wait_downstream("pg_receivewal", "streaming");
    primary.sql("create table seen (id int)");
    for (policy, waits) in [("local", true), ("ANY 2 (quick, slow)", true), ("ANY 1 (quick, slow)", false)] {
        relay.terminate();
        relay.set("upstream.acknowledge", &format!("\"{policy}\""));
        relay.start();
        for name in ["quick", "slow", "pg_receivewal"] {
            relay.wait_downstream(name, "streaming");
        }
        // Both have reported, and nothing is on its way.
        applying_commit(&primary).join().unwrap();
        slow.wait_replayed(primary.flushed());
        slow.sql("select pg_wal_replay_pause()");
        let commit = applying_commit(&primary);
        if waits {
            hold("the commit waits for the slow one", Duration::from_secs(1), || !commit.is_finished());
            quick.wait_replayed(primary.flushed());
        } else {
            wait_until("the commit not to wait for the slow one", || commit.is_finished());
        }
        slow.sql("select pg_wal_replay_resume()");
        commit.join().unwrap();
    }
    proxy.assert_honest();
}

#[test]
fn with_remote_apply_and_nobody_who_applies_a_commit_waits() {
    let Some((primary, proxy, relay)) = chain(|relay| relay) else { return };
    primary.sql("create table seen (id int)");
    let _receiver = PgReceivewal::start(&primary.installation, relay.port, &["--synchronous"]);
    relay.wait_downstream("pg_receivewal", "streaming");
    let commit = applying_commit(&primary);
    relay.wait_flushed(primary.flushed());
    hold("the commit waits", Duration::from_secs(1), || !commit.is_finished());
    assert!(acknowledge_of(&relay)["apply"].is_null());
    let _heir = standby(&primary, "heir", &relay);
    wait_until("the commit to be applied", || commit.is_finished());
    commit.join().unwrap();
    proxy.assert_honest();
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
fn a_relay_that_is_started_again_vouches_for_nothing_before_its_standbys_are_back() {
    let Some((primary, proxy, mut relay)) =
        chain(|relay| relay.with("upstream.acknowledge", "\"ANY 1 (far)\""))
    else {
        return;
    };
    let way = Proxy::to(relay.port);
    let settings = "synchronous_standby_names = ''\nwal_receiver_status_interval = 1s";
    let far = primary.standby("far", way.port, settings);
    let load = Load::start_waiting(&primary);
    for is_killed in [true, false] {
        let before = load.committed();
        wait_until("commits to be confirmed", || load.committed() > before + 10);
        way.close();
        if is_killed {
            relay.kill();
        } else {
            relay.terminate();
        }
        let (streams, updates) = proxy.passed(|passed| (passed.starts.len(), passed.status_updates));
        // One may have been confirmed just before.
        let confirmed = load.committed() + 1;
        relay.start();
        let upto = primary.flushed();
        relay.wait_flushed(upto);
        wait_until("reports", || proxy.passed(|passed| passed.status_updates) > updates + 2);
        let vouched = || proxy.passed(|passed| passed.flush_max_of[streams..].iter().max().copied());
        hold("nothing is vouched for", Duration::from_secs(1), || vouched() == Some(0));
        assert!(load.committed() <= confirmed, "confirmed without the standby");
        primary.wait_for_sql(
            "select coalesce(max(flush_lsn)::text, 'nothing') from pg_stat_replication where application_name = 'relay'",
            "nothing",
        );
        way.open();
        wait_until("it to be vouched for", || vouched() >= Some(upto));
    }
    drop(load);
    far.wait_replayed(primary.flushed());
    proxy.assert_honest();
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
    let Some((primary, proxy, mut relay)) = chain(|relay| {
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
    // The right one counts.
    relay.terminate();
    relay.set("upstream.acknowledge_users", "{ FAR = \"postgres\" }");
    relay.start();
    let upto = primary.flushed();
    wait_until("it to be acknowledged", || proxy.passed(|passed| passed.flush_max) >= upto);
    // A name that nobody waits for binds nobody: that is said, and nothing is run.
    relay.terminate();
    relay.set("upstream.acknowledge_users", "{ fra = \"postgres\" }");
    let config = relay.write_config();
    let check = ["config", "check", "--config", config.to_str().unwrap()];
    for arguments in [&check[..], &["run", "--config", config.to_str().unwrap()]] {
        let (status, _, complaint) = Relay::command(arguments);
        assert_eq!(status.code(), Some(1), "{complaint}");
        assert!(complaint.contains("\"fra\" (there is no such name in upstream.acknowledge"), "{complaint}");
    }
}

#[test]
fn what_is_flushed_on_a_dead_branch_confirms_no_commit_of_the_new_primary() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let Torn { mut old, mut new, relay, .. } =
        torn(&installation, &[("upstream.acknowledge", "\"ANY 1 (far)\"")]);
    // It is on the old timeline, has all of it, and stays when it is told that it ends.
    let mut stranded = RawClient::login(
        relay.port,
        &[("user", "postgres"), ("replication", "true"), ("application_name", "far")],
    )
    .unwrap();
    let (_, _, end) = identify_system(&mut stranded);
    stranded.start_replication(None, end, 1).unwrap();
    stranded.send_status(end, end, 0).unwrap();
    let is_known = |relay: &Relay| {
        relay
            .downstream("far")
            .iter()
            .any(|far| far["flush_lsn"] == lsn_text(end) && far["state"] == "streaming")
    };
    wait_until("what it has to be known", || is_known(&relay));
    promote_behind(&mut old, &mut new, "synchronous_standby_names = 'relay'");
    wait_timeline(&relay, 2);
    let load = Load::start_waiting(&new);
    new.wait_for_sql("select count(*) from pg_stat_activity where wait_event = 'SyncRep'", "1");
    relay.wait_flushed(new.flushed());
    hold("no commit is confirmed", Duration::from_secs(2), || load.committed() == 0);
    assert!(new.flushed() < end && is_known(&relay), "{}", relay.status());
    let _far = Relay::streaming_from("far", relay.port);
    wait_until("commits to go on", || load.committed() > 10);
}
