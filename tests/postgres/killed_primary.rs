//! The primary is lost while clients commit: every single id that a client was told of is on the server that is promoted.

use std::time::Duration;

use crate::support::confirmed::Confirming;
use crate::support::lab::Installation;
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::powercut::{Chance, rounds};
use crate::support::proxy::Proxy;
use crate::support::relay::Relay;

/// A primary whose commits wait for these names.
fn primary_waiting_for(installation: &Installation, names: &str) -> Postgres {
    Settings::new()
        .segment_size_mb(1)
        .line(&format!("synchronous_standby_names = '{names}'"))
        .start(installation)
}

/// A standby that streams from this port; once promoted its commits wait for nobody.
fn heir_behind(primary: &Postgres, port: u16) -> Postgres {
    primary.standby("heir", port, "synchronous_standby_names = ''\nwal_receiver_status_interval = 1s")
}

/// Some time in which anything may happen.
fn let_it_run(chance: &mut Chance, milliseconds_max: u64) {
    std::thread::sleep(Duration::from_millis(chance.between(0, milliseconds_max)));
}

#[test]
fn every_id_that_was_confirmed_is_on_the_standby_that_is_promoted_after_the_primary_was_killed() {
    each_time(rounds(KILLS, 20), drained_from_the_relay);
}

#[test]
fn every_id_that_waited_for_the_standby_is_on_it_after_the_primary_and_the_relay_were_killed() {
    each_time(rounds(KILLS, 20).div_ceil(2), relay_lost_too);
}

/// How many primaries are killed.
const KILLS: &str = "WALRELAY_PRIMARY_KILLS";

fn each_time(rounds: u32, round: impl Fn(&Installation, &mut Chance)) {
    let Some(installation) = Installation::any() else { return };
    let mut chance = Chance::seeded();
    for _ in 0..rounds {
        round(&installation, &mut chance);
    }
}

/// What the relay has acknowledged alone the standby, which lags, fetches from it.
fn drained_from_the_relay(installation: &Installation, chance: &mut Chance) {
    let mut primary = primary_waiting_for(installation, "relay");
    let proxy = Proxy::to(primary.port);
    let relay = Relay::streaming_from("relay", proxy.port);
    let lag = Proxy::to(relay.port);
    let heir = heir_behind(&primary, lag.port);
    let load = Confirming::start(&primary);
    load.wait_for_more(&primary, 20);
    let_it_run(chance, 300);
    lag.stall(true);
    load.wait_for_more(&primary, 20);
    let_it_run(chance, 300);
    primary.stop(Stop::Kill);
    let confirmed = load.end();
    assert!(confirmed.missing_on(&heir) > 0, "the standby did not lag");
    lag.stall(false);
    heir.wait_replayed(relay.flushed());
    heir.promote();
    confirmed.assert_on(&heir);
    proxy.assert_honest();
}

/// What waits for the standby behind the relay is there without the relay.
fn relay_lost_too(installation: &Installation, chance: &mut Chance) {
    let mut primary = primary_waiting_for(installation, "relay");
    let proxy = Proxy::to(primary.port);
    let mut relay = Relay::new("relay", proxy.port).with("upstream.acknowledge", "\"ANY 1 (heir)\"");
    relay.start();
    let lag = Proxy::to(relay.port);
    let heir = heir_behind(&primary, lag.port);
    let load = Confirming::start(&primary);
    load.wait_for_more(&primary, 20);
    lag.delay(LAG);
    load.wait_for_more(&primary, 8);
    let_it_run(chance, 300);
    // The way to the standby first: what is on it only thereafter was never there.
    lag.close();
    relay.kill();
    primary.stop(Stop::Kill);
    let confirmed = load.end();
    heir.promote();
    confirmed.assert_on(&heir);
    proxy.assert_honest();
}

#[test]
fn with_a_quorum_of_two_far_relays_one_of_them_and_the_near_one_can_be_lost_with_the_primary() {
    let Some(installation) = Installation::any() else { return };
    let mut chance = Chance::seeded();
    for _ in 0..rounds(KILLS, 20).div_ceil(2) {
        let mut primary = primary_waiting_for(&installation, "relay");
        let proxy = Proxy::to(primary.port);
        let mut near = Relay::new("relay", proxy.port).with("upstream.acknowledge", "\"ANY 1 (a, b)\"");
        near.start();
        let lag = Proxy::to(near.port);
        let (lost, kept) = if chance.between(0, 2) == 0 { ("a", "b") } else { ("b", "a") };
        let (mut lost, kept) = (Relay::streaming_from(lost, lag.port), Relay::streaming_from(kept, lag.port));
        let heir = heir_behind(&primary, kept.port);
        let load = Confirming::start(&primary);
        load.wait_for_more(&primary, 20);
        lag.delay(LAG);
        let_it_run(&mut chance, 200);
        lost.kill();
        load.wait_for_more(&primary, 8);
        let_it_run(&mut chance, 300);
        // All at once, but for the order that hides least: nothing more may reach the one that is left.
        lag.close();
        near.kill();
        primary.stop(Stop::Kill);
        std::fs::remove_dir_all(near.data_dir()).unwrap();
        let confirmed = load.end();
        heir.wait_replayed(kept.flushed());
        heir.promote();
        confirmed.assert_on(&heir);
        proxy.assert_honest();
    }
}

#[test]
fn of_two_relays_that_both_are_waited_for_one_disk_can_be_lost_with_the_primary() {
    let Some(installation) = Installation::any() else { return };
    let mut primary = primary_waiting_for(&installation, "ANY 2 (relay_a, relay_b)");
    // The one that is left is the slower one: what waits for one copy only is on the other.
    let lag = Proxy::to(primary.port);
    let (mut lost, kept) =
        (Relay::streaming_from("relay_a", primary.port), Relay::streaming_from("relay_b", lag.port));
    let heir = heir_behind(&primary, kept.port);
    let load = Confirming::start(&primary);
    load.wait_for_more(&primary, 20);
    lag.delay(LAG);
    load.wait_for_more(&primary, 8);
    lag.close();
    lost.kill();
    std::fs::remove_dir_all(lost.data_dir()).unwrap();
    primary.stop(Stop::Kill);
    let confirmed = load.end();
    heir.wait_replayed(kept.flushed());
    heir.promote();
    confirmed.assert_on(&heir);
    lag.assert_honest();
}

/// How much later everything arrives on a slow way, in each direction.
const LAG: Duration = Duration::from_millis(50);
