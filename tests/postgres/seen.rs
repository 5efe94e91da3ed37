//! How the relay stands: what the primary thinks of it, who else uses its name, whom it would feed itself, what only it has.

use std::time::Duration;

use serde_json::Value;

use crate::support::MB;
use crate::support::lab::{Installation, chosen_majors};
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};

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
    hold("nothing is made up", Duration::from_secs(3), || sync_state(&relay).is_null());
    assert_eq!(relay.times_logged("application_name"), 0);
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
    hold("nobody else is there", Duration::from_secs(4), || relay.status()["upstream"]["namesakes"] == 0);
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
