//! The slot on the primary: invalidated it is made again where that helps, and what cannot be had any more is told.

use std::time::Duration;

use crate::support::MB;
use crate::support::compare::assert_same_wal;
use crate::support::faults::Faults;
use crate::support::lab::{Installation, chosen_majors};
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings};
use crate::support::proxy::{Proxy, Verdict, wal_in};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};

/// A relay that was cut off, with its slot idle.
fn cut_off(installation: &Installation, settings: Settings, prepare: impl FnOnce(Relay) -> Relay) -> Chain {
    let primary = settings.segment_size_mb(1).start(installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = prepare(Relay::new("relay", proxy.port));
    relay.start();
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    primary.wait_reported_flush("relay", primary.flushed());
    proxy.close();
    primary.wait_for_sql("select active from pg_replication_slots where slot_name = 'relay'", "f");
    Chain { primary, proxy, relay }
}

struct Chain {
    primary: Postgres,
    proxy: Proxy,
    relay: Relay,
}

/// A primary that keeps next to nothing for slots.
fn sparing() -> Settings {
    Settings::new()
        .line("wal_keep_size = 0")
        .line("max_wal_size = 32MB")
        .line("min_wal_size = 2MB")
        .line("max_slot_wal_keep_size = 2MB")
}

fn lose_the_slot(primary: &Postgres) {
    for _ in 0..4 {
        write_wal(primary, 3 * MB);
        primary.switch_wal();
        primary.checkpoint();
    }
    primary.wait_for_sql("select wal_status from pg_replication_slots where slot_name = 'relay'", "lost");
}

#[test]
fn an_invalidated_slot_whose_wal_is_gone_is_told_as_a_gap_and_left_behind_nowhere() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let Chain { primary, proxy, mut relay } = cut_off(&installation, sparing(), |relay| relay);
        let held = relay.flushed();
        lose_the_slot(&primary);
        proxy.open();
        relay.wait_needs_attention();
        assert_eq!(relay.flushed(), held, "WAL from beyond the gap");
        if major >= 15 {
            relay.wait_logged("has removed WAL that this relay needs; it is not created again");
            assert_eq!(primary.sql("select count(*) from pg_replication_slots"), "0");
        } else {
            // Earlier ones do not tell that the slot keeps nothing, so nothing is known against it.
            relay.wait_logged("has already been removed");
        }
        relay.assert_running();
    }
}

#[test]
fn an_invalidated_slot_that_may_not_be_made_again_is_told() {
    let Some(installation) = Installation::since(18) else { return };
    let chain = cut_off(&installation, sparing(), |relay| relay.with("upstream.slot", "\"relay\""));
    let Chain { primary, proxy, mut relay } = chain;
    relay.terminate();
    relay.set("upstream.create_slot", "false");
    lose_the_slot(&primary);
    relay.launch();
    relay.wait_serving();
    let held = relay.flushed();
    proxy.open();
    relay.wait_logged("replication slot \\\"relay\\\" on the upstream has been invalidated");
    relay.wait_needs_attention();
    let tried = proxy.connections();
    hold("no storm of attempts", Duration::from_secs(3), || proxy.connections() <= tried + 1);
    assert_eq!(relay.flushed(), held);
    primary.wait_for_sql("select count(*) from pg_replication_slots where slot_name = 'relay'", "1");
}

#[test]
fn a_slot_that_was_idle_for_too_long_is_made_again_and_nothing_is_lost() {
    let Some(installation) = Installation::since(18) else { return };
    let settings = Settings::new().line("idle_replication_slot_timeout = 1s");
    let Chain { primary, proxy, relay } = cut_off(&installation, settings, |relay| relay);
    wait_until("the slot to be invalidated", || {
        primary.checkpoint();
        primary.sql("select invalidation_reason from pg_replication_slots") == "idle_timeout"
    });
    write_wal(&primary, 2 * MB);
    proxy.open();
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    primary.wait_reported_flush("relay", upto);
    let state = "select active::text || coalesce(invalidation_reason, '') from pg_replication_slots";
    assert_eq!(primary.sql(state), "true");
    assert_same_wal(&relay.wal_dir(), &primary, upto);
    assert!(!relay.needs_attention());
}

#[test]
fn a_slot_that_was_made_again_ahead_of_the_relay_tells_of_no_loss() {
    let Some(installation) = Installation::since(15) else { return };
    let faults = Faults::new();
    let chain = cut_off(&installation, Settings::new(), |relay| relay.with_faults(&faults));
    let Chain { primary, proxy, relay } = chain;
    primary.sql("select pg_drop_replication_slot('relay')");
    let held = relay.flushed();
    write_wal(&primary, 4 * MB);
    // The new slot begins with the last checkpoint, and all before it is still to come.
    primary.checkpoint();
    // The session ends on the way there, with nothing acknowledged.
    faults.set("sync_hangs", 0);
    let mut cut = false;
    proxy.edit(move |message| match wal_in(message) {
        Some((start, wal)) if !cut && start + wal.len() as u64 > held + MB => {
            cut = true;
            Verdict::Cut
        }
        _ => Verdict::Forward,
    });
    proxy.open();
    wait_until("the session after that", || proxy.passed(|passed| passed.starts.len()) >= 3);
    wait_until("it to stream", || relay.status()["upstream"]["sessions"].as_u64() >= Some(3));
    assert!(!relay.log().contains("has been lost here"));
    assert!(!relay.needs_attention());
    faults.clear("sync_hangs");
    relay.wait_flushed(primary.flushed());
}

#[test]
fn a_logical_slot_of_the_same_name_is_left_alone() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = Settings::new().segment_size_mb(1).line("wal_level = logical").start(&installation);
        primary.sql("select pg_create_logical_replication_slot('relay', 'pgoutput')");
        let proxy = Proxy::to(primary.port);
        let mut relay = Relay::new("relay", proxy.port);
        relay.launch();
        relay.wait_logged("logical replication slot");
        wait_until("more attempts", || proxy.connections() >= 3);
        let slots = "select string_agg(slot_name || ' ' || slot_type, ',') from pg_replication_slots";
        assert_eq!(primary.sql(slots), "relay logical", "on {major}");
    }
}

#[test]
fn what_the_primary_keeps_for_the_relay_is_shown() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let faults = Faults::new();
    let mut relay = Relay::new("relay", primary.port).with_faults(&faults);
    relay.start();
    let retained = || relay.metric("walrelay_upstream_slot_retained_bytes").unwrap_or(-1.0);
    let megabytes = |count: u32| f64::from(count) * f64::from(1 << 20);
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    wait_until("next to nothing to be kept", || (0.0..megabytes(1)).contains(&retained()));
    faults.set("sync_hangs", 0);
    write_wal(&primary, 4 * MB);
    wait_until("it to grow", || retained() >= megabytes(3));
    faults.clear("sync_hangs");
    wait_until("next to nothing to be kept again", || (0.0..megabytes(1)).contains(&retained()));
}
