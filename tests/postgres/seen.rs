//! How the relay stands: what the primary thinks of it, who else uses its name, whom it would feed itself, what only it has.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::faults::Faults;
use crate::support::lab::{Installation, chosen_majors};
use crate::support::load::{Load, write_wal};
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::proxy::Proxy;
use crate::support::raw::{RawClient, identify_system};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_at_most, wait_until};
use crate::support::{MB, lsn_text};

fn sync_state(relay: &Relay) -> Value {
    relay.status()["upstream"]["sync_state"].clone()
}

fn synchronous(installation: &Installation) -> Postgres {
    Settings::new().segment_size_mb(1).line("synchronous_standby_names = 'relay'").start(installation)
}

#[test]
fn the_primary_is_asked_whether_it_waits_for_the_relay() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = synchronous(&installation);
        let mut relay = Relay::streaming_from("relay", primary.port);
        wait_until("the state to be told", || sync_state(&relay) == "sync");
        relay.terminate();
        primary.add_settings("synchronous_standby_names = 'another'");
        primary.reload();
        relay.start();
        wait_until("the state to be told", || sync_state(&relay) == "async");
        // No session of it stays behind, and nobody is waited for under the name that asks.
        let sessions = "select count(*) from pg_stat_activity where application_name = 'relay_look'";
        primary.wait_for_sql(sessions, "0");
    }
}

#[test]
fn a_user_who_may_not_see_is_told_nothing_and_streams_nevertheless() {
    let Some(installation) = Installation::any() else { return };
    let primary = synchronous(&installation);
    primary.sql("set synchronous_commit = local; create role plain login replication");
    let mut relay = Relay::new("relay", primary.port)
        .with_conninfo(&format!("host=127.0.0.1 port={} user=plain sslmode=disable", primary.port));
    relay.start();
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    relay.wait_logged("cannot check whether the upstream waits for this relay");
    let upstream = |relay: &Relay, key: &str| relay.status()["upstream"][key].clone();
    assert_eq!(
        (upstream(&relay, "sync_state"), upstream(&relay, "namesakes")),
        (Value::Null, Value::Null),
        "made up"
    );
    assert_eq!(
        (upstream(&relay, "not_synchronous"), upstream(&relay, "needs_attention")),
        (false.into(), false.into())
    );
    // Not to be let in at all is the same, and is said too.
    relay.terminate();
    // Of the two the second shows that both hold.
    let rules = "host postgres plain 127.0.0.1/32 reject\nhost replication nobody 127.0.0.1/32 reject";
    primary.demand(rules, "nobody");
    relay.start();
    wait_until("the refusal to be told", || relay.times_logged("cannot check whether the upstream") == 2);
    assert!(relay.log().contains("pg_hba.conf rejects"), "{}", relay.log());
    assert_eq!(
        (upstream(&relay, "sync_state"), upstream(&relay, "namesakes")),
        (Value::Null, Value::Null),
        "made up"
    );
}

#[test]
fn a_relay_that_is_expected_to_be_waited_for_and_is_not_asks_for_a_person() {
    let Some(installation) = Installation::any() else { return };
    let primary =
        Settings::new().segment_size_mb(1).line("synchronous_standby_names = 'another'").start(&installation);
    primary.sql("set synchronous_commit = local; create role plain login replication");
    let mut relay = Relay::new("relay", primary.port).with("upstream.expect_sync", "true");
    relay.start();
    let is_wrong = |relay: &Relay| relay.metric("walrelay_upstream_not_synchronous");
    relay.wait_needs_attention();
    relay.wait_logged("the upstream is expected to wait for this relay, and does not");
    assert_eq!((sync_state(&relay), is_wrong(&relay)), ("async".into(), Some(1.0)));
    assert_eq!(relay.status()["upstream"]["not_synchronous"], true);
    // It streams all the same; and what is put right is seen at the next look.
    primary.add_settings("synchronous_standby_names = 'relay'");
    primary.reload();
    relay.terminate();
    relay.start();
    wait_until("the state to be told", || sync_state(&relay) == "sync");
    assert_eq!(is_wrong(&relay), Some(0.0));
    assert!(!relay.needs_attention());
    // What may not be seen is not known to be so.
    relay.terminate();
    let plain = format!("host=127.0.0.1 port={} user=plain sslmode=disable", primary.port);
    relay = relay.with_conninfo(&plain);
    relay.start();
    relay.wait_needs_attention();
    assert!(sync_state(&relay).is_null());
}

#[test]
fn what_cannot_be_seen_any_more_is_not_known_to_be_so() {
    let Some(installation) = Installation::any() else { return };
    let primary = synchronous(&installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = Relay::new("relay", proxy.port).with("upstream.expect_sync", "true");
    relay.start();
    wait_until("the state to be told", || sync_state(&relay) == "sync");
    assert!(!relay.needs_attention());
    // From now on only replication gets through.
    proxy.lead_sql_to(1);
    relay.wait_needs_attention();
    relay.wait_logged("cannot check whether the upstream waits for this relay");
    let upstream = relay.status()["upstream"].clone();
    assert!(upstream["sync_state"].is_null() && upstream["namesakes"].is_null(), "made up: {upstream}");
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    assert_eq!(relay.status()["upstream"]["sessions"], 1, "the stream was disturbed");
    proxy.lead_sql_to(primary.port);
    wait_until("it to be seen again", || sync_state(&relay) == "sync" && !relay.needs_attention());
}

#[test]
fn a_primary_that_ceases_to_wait_while_it_streams_is_told() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let write = |names: &str| {
        primary.sql(&format!("alter system set synchronous_standby_names = '{names}'"));
        primary.reload();
    };
    write("relay");
    let mut relay = Relay::new("relay", primary.port).with("upstream.expect_sync", "true");
    relay.start();
    wait_until("the state to be told", || sync_state(&relay) == "sync");
    assert!(!relay.needs_attention());
    // As Patroni writes it from its members, of which the relay is none.
    write("\"member_2\"");
    relay.wait_needs_attention();
    relay.wait_logged("the upstream does not wait for this relay any more");
    assert_eq!(
        (sync_state(&relay), relay.status()["upstream"]["sessions"].clone()),
        ("async".into(), 1.into())
    );
    write("2 (\"member_2\",relay)");
    wait_until("it to be as expected", || sync_state(&relay) == "sync" && !relay.needs_attention());
}

#[test]
fn what_one_server_thought_of_the_relay_is_not_told_of_the_next() {
    let Some(installation) = Installation::any() else { return };
    let mut primary = synchronous(&installation);
    let heir = primary.standby("heir", primary.port, "");
    let to_heir = Proxy::to(heir.port);
    // There only replication gets through.
    to_heir.lead_sql_to(1);
    let hosts = format!("host=127.0.0.1,127.0.0.1 port={},{}", primary.port, to_heir.port);
    let mut relay = Relay::new("relay", 1)
        .with_conninfo(&format!("{hosts} user=postgres sslmode=disable target_session_attrs=read-write"));
    relay.start();
    wait_until("the state to be told", || sync_state(&relay) == "sync");
    heir.wait_replayed(primary.flushed());
    primary.stop(Stop::Fast);
    heir.promote();
    wait_until("the relay to stream from the heir", || {
        let upstream = relay.status()["upstream"].clone();
        upstream["state"] == "streaming" && upstream["sessions"].as_u64() >= Some(2)
    });
    assert!(sync_state(&relay).is_null(), "made up");
}

#[test]
fn who_reports_under_the_relays_name_is_known_by_what_moves_and_not_by_the_time_that_it_tells() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let login = [("user", "postgres"), ("replication", "true"), ("application_name", "relay")];
    let mut impostor = RawClient::login(primary.port, &login).unwrap();
    let (_, timeline, position) = identify_system(&mut impostor);
    impostor.start_replication(None, position, timeline).unwrap();
    impostor.send_status(position, position, 0).unwrap();
    primary.wait_for_sql("select count(*) from pg_stat_replication where flush_lsn is not null", "1");
    let relay = Relay::streaming_from("relay", primary.port);
    let namesakes = || relay.status()["upstream"]["namesakes"].clone();
    // It may be an earlier session of the relay that the primary has not missed yet.
    wait_until("the first look", || namesakes() == 0);
    write_wal(&primary, MB);
    let flushed = primary.flushed();
    // The time it tells is always the same.
    impostor.send_status(flushed.min(position + 8), position + 8, 0).unwrap();
    wait_until("it to be known", || namesakes() == 1);
    relay.wait_logged("others report to the upstream under this relay's application_name");
}

#[test]
fn somebody_else_under_the_relays_name_is_told_of_once() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let impostor = primary.standby("RELAY", primary.port, "wal_receiver_status_interval = 1s");
    impostor.wait_replayed(primary.flushed());
    let mut relay = Relay::streaming_from("relay", primary.port);
    relay.wait_logged("others report to the upstream under this relay's application_name");
    assert_eq!(relay.status()["upstream"]["namesakes"], 1);
    primary.sql("select pg_terminate_backend(pid) from pg_stat_replication where application_name = 'relay'");
    wait_until("another session", || relay.status()["upstream"]["sessions"].as_u64() > Some(1));
    hold("it was said", Duration::from_secs(4), || {
        relay.times_logged("under this relay's application_name") == 1
    });
    // One that died, of which the primary does not know yet, is none.
    drop(impostor);
    relay.terminate();
    relay.start();
    wait_until("the first look", || relay.status()["upstream"]["namesakes"] == 0);
    hold("nobody else is there", Duration::from_secs(2), || relay.status()["upstream"]["namesakes"] == 0);
}

#[test]
fn a_relay_that_would_feed_itself_is_refused_with_the_reason() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut near = Relay::streaming_from("near", primary.port);
    let far = Relay::streaming_from("far", near.port);
    write_wal(&primary, MB);
    far.wait_flushed(primary.flushed());
    // Through another one.
    near.terminate();
    let through_far = format!("host=127.0.0.1 port={} user=postgres sslmode=disable", far.port);
    near = near.with_conninfo(&through_far);
    near.launch();
    far.wait_logged("started streaming WAL from upstream");
    wait_until("one of them to see the loop", || {
        near.log().contains("gets its WAL from this relay")
            || far.log().contains("gets its WAL from this relay")
    });
    wait_until("a person to be asked for", || near.needs_attention() || far.needs_attention());
    let attempts =
        || near.times_logged("cannot follow the upstream") + far.times_logged("cannot follow the upstream");
    let before = attempts();
    hold("nothing spins", Duration::from_secs(2), || attempts() <= before + 2);
    // By itself.
    near.terminate();
    let at_itself = format!("host=127.0.0.1 port={} user=postgres sslmode=disable", near.port);
    near = near.with_conninfo(&at_itself);
    near.launch();
    near.wait_logged("is this relay itself");
    near.wait_needs_attention();
    // What is right is followed again.
    near.terminate();
    let right = format!("host=127.0.0.1 port={} user=postgres sslmode=disable", primary.port);
    near = near.with_conninfo(&right);
    near.start();
    write_wal(&primary, MB);
    far.wait_flushed(primary.flushed());
    near.assert_running();
}

#[test]
fn wal_that_is_acknowledged_and_nowhere_else_is_told() {
    let Some(installation) = Installation::any() else { return };
    let primary = synchronous(&installation);
    let relay = Relay::streaming_from("relay", primary.port);
    let settings = "synchronous_standby_names = ''\nwal_receiver_status_interval = 1s";
    let mut standby = primary.standby("standby", relay.port, settings);
    let told = || relay.status()["only_copy"].clone();
    let bytes = || told()["bytes"].as_u64().unwrap_or(u64::MAX);
    wait_until("the standby to have everything", || bytes() == 0 && relay.downstream("standby").len() == 1);
    standby.stop(Stop::Fast);
    write_wal(&primary, MB);
    let flushed = primary.flushed();
    wait_until("it to be told", || bytes() >= MB);
    assert!(bytes() <= flushed - relay.oldest() && told()["since"].is_string(), "{}", told());
    let age = || relay.metric("walrelay_only_copy_seconds").unwrap();
    wait_until("it to grow older", || age() > 2.0);
    assert!(relay.metric("walrelay_only_copy_bytes").unwrap() >= 1e6);
    standby.start();
    wait_until("the standby to have everything", || bytes() == 0);
    assert!(told()["since"].is_null() && age() < 2.0, "{}", told());
}

#[test]
fn wal_that_is_nowhere_else_for_a_minute_is_said_also_where_the_standby_is_only_not_heard_of() {
    let Some(installation) = Installation::any() else { return };
    let primary = synchronous(&installation);
    let relay = Relay::streaming_from("relay", primary.port);
    let way = Proxy::to(relay.port);
    let settings = "synchronous_standby_names = ''\nwal_receiver_status_interval = 1s";
    let standby = primary.standby("standby", way.port, settings);
    let bytes = || relay.status()["only_copy"]["bytes"].as_u64().unwrap_or(u64::MAX);
    wait_until("the standby to have everything", || bytes() == 0 && relay.downstream("standby").len() == 1);
    // Its connection is there, and nothing goes through: nobody is told that it is cut off.
    way.stall(true);
    write_wal(&primary, MB);
    let cut_off = Instant::now();
    wait_until("it to be shown", || bytes() >= MB);
    let line = "that no standby of this relay has: this is the only copy";
    let told = wait_at_most(Duration::from_secs(90), || relay.log().contains(line).then_some(()));
    assert!(told.is_some() && cut_off.elapsed() > Duration::from_secs(55), "{:?}", cut_off.elapsed());
    assert!(relay.metric("walrelay_only_copy_seconds") > Some(55.0));
    way.stall(false);
    standby.wait_replayed(primary.flushed());
    wait_until("the standby to have everything again", || bytes() == 0);
    assert_eq!(relay.times_logged(line), 1);
}

#[test]
fn a_relay_that_may_not_be_the_only_copy_for_long_acknowledges_nothing_more_until_a_standby_is_there() {
    let Some(installation) = Installation::any() else { return };
    let mut primary = synchronous(&installation);
    let mut relay = Relay::new("relay", primary.port).with("upstream.only_copy_time_max", "\"3s\"");
    relay.start();
    let settings = "synchronous_standby_names = ''\nwal_receiver_status_interval = 1s";
    let mut standby = primary.standby("standby", relay.port, settings);
    let load = Load::start_waiting(&primary);
    let held_back = || relay.status()["upstream"]["acknowledge"]["held_back"] == true;
    let go_on = || {
        let before = load.committed();
        wait_until("commits to go on", || load.committed() > before + 10 && !held_back());
    };
    go_on();
    let left = Instant::now();
    standby.stop(Stop::Fast);
    wait_until("nothing more to be acknowledged", held_back);
    assert!(left.elapsed() >= Duration::from_secs(2), "too early");
    assert_eq!(relay.metric("walrelay_upstream_acknowledge_held_back"), Some(1.0));
    relay.wait_logged("nothing more is acknowledged until it is");
    let before = load.committed();
    // One may have been acknowledged just before.
    hold("no commit is confirmed", Duration::from_secs(2), || load.committed() <= before + 1);
    // What waits costs the primary no WAL.
    write_wal_without_waiting(&primary, 4 * MB);
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    primary
        .wait_for_sql(&format!("select restart_lsn >= '{}' from pg_replication_slots", lsn_text(upto)), "t");
    standby.start();
    go_on();
    standby.stop(Stop::Fast);
    wait_until("nothing more to be acknowledged", held_back);
    let took = primary.stop(Stop::Fast);
    assert!(took < Duration::from_secs(3), "the primary's fast stop took {took:?}");
}

#[test]
fn a_restart_gives_the_only_copy_no_time_whatever_the_wall_clock_says() {
    let Some(installation) = Installation::any() else { return };
    let primary = synchronous(&installation);
    let faults = Faults::new();
    let mut relay =
        Relay::new("relay", primary.port).with_faults(&faults).with("upstream.only_copy_time_max", "\"5s\"");
    relay.start();
    let settings = "synchronous_standby_names = ''\nwal_receiver_status_interval = 1s";
    let mut standby = primary.standby("standby", relay.port, settings);
    let load = Load::start_waiting(&primary);
    let held_back = |relay: &Relay| relay.status()["upstream"]["acknowledge"]["held_back"] == true;
    wait_until("commits", || load.committed() > 10);
    standby.stop(Stop::Fast);
    wait_until("nothing more to be acknowledged", || held_back(&relay));
    const TEN_DAYS: u64 = 10 * 24 * 3600;
    for fault in ["clock_behind", "clock_ahead"] {
        relay.kill();
        faults.set(fault, TEN_DAYS);
        let before = load.committed();
        relay.start();
        wait_until("it to be known again", || held_back(&relay));
        // One may have been acknowledged just before.
        hold("no commit is confirmed", Duration::from_secs(2), || load.committed() <= before + 1);
        faults.clear(fault);
    }
    // Nor does a clock that jumps stop what a standby has.
    standby.start();
    let go_on = |relay: &Relay| {
        let before = load.committed();
        wait_until("commits to go on", || load.committed() > before + 10 && !held_back(relay));
    };
    go_on(&relay);
    relay.kill();
    faults.set("clock_ahead", TEN_DAYS);
    relay.start();
    go_on(&relay);
}

fn write_wal_without_waiting(primary: &Postgres, bytes: u64) {
    primary.sql(&format!(
        "set synchronous_commit = local; select count(pg_logical_emit_message(false, 'filler', repeat('x', 300000))) \
         from generate_series(1, {})",
        bytes / 300_000 + 1
    ));
    primary.sql("set synchronous_commit = local; select pg_switch_wal()");
}
