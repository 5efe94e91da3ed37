//! A slot that SQL moves, because commits wait for standbys behind the relay: it moves, or that it does not is told.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::feedback::OnTheWay;
use crate::support::compare::wal_files;
use crate::support::lab::{Installation, chosen_majors};
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings, Stop, copy_folder};
use crate::support::proxy::{Proxy, Verdict};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::support::{MB, lsn, lsn_text};

/// A primary, and a relay whose policy nobody fulfils: so the slot is not where WAL was acknowledged.
fn chain_on(installation: &Installation, prepare: impl FnOnce(Relay) -> Relay) -> (Postgres, Relay) {
    let primary = Settings::new().segment_size_mb(1).start(installation);
    let mut relay = prepare(waiting(Relay::new("relay", primary.port)));
    relay.start();
    (primary, relay)
}

fn waiting(relay: Relay) -> Relay {
    relay.with("upstream.acknowledge", "\"ANY 1 (far)\"").with("upstream.slot", "\"relay\"")
}

fn slot_position(primary: &Postgres) -> u64 {
    lsn(&primary
        .sql("select coalesce(max(restart_lsn), '0/0') from pg_replication_slots where slot_name = 'relay'"))
}

fn retained(relay: &Relay) -> u64 {
    relay.metric("walrelay_upstream_slot_retained_bytes").unwrap_or(-1.0) as u64
}

fn wait_moved(primary: &Postgres, upto: u64) {
    wait_until("the slot to follow what is durable at the relay", || slot_position(primary) >= upto);
}

#[test]
fn a_slot_that_cannot_be_moved_is_told_and_its_cost_is_shown() {
    let Some(installation) = Installation::since(15) else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    primary.sql("create role replicator replication login");
    primary.sql("create role turned_away login");
    // The usual rules: for replication, and for nothing else.
    let rules = "host replication replicator 127.0.0.1/32 trust\n\
        host all replicator 127.0.0.1/32 reject\nhost replication turned_away 127.0.0.1/32 reject";
    primary.demand(rules, "turned_away");
    let mut relay = waiting(Relay::new("relay", 1))
        .with_conninfo(&format!("host=127.0.0.1 port={} user=replicator sslmode=disable", primary.port));
    relay.start();
    write_wal(&primary, 4 * MB);
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    relay.wait_logged("could not advance the replication slot on the upstream");
    let stays_at = slot_position(&primary);
    assert!(stays_at + 4 * MB <= upto);
    wait_until("the metric to show what is kept", || retained(&relay) >= 4 * MB);
    relay.wait_needs_attention();
    let told = relay.status()["upstream"]["slot_error"].as_str().unwrap_or_default().to_owned();
    assert!(told.contains("pg_hba.conf rejects connection"), "{told}");
    assert!(relay.times_logged("could not advance the replication slot") <= 2, "{}", relay.log());
    let refused = primary.log().matches("pg_hba.conf rejects connection").count();
    assert!(refused < 12, "{refused} attempts in a quarter of a minute");
    assert!(retained(&relay) >= 4 * MB && slot_position(&primary) == stays_at);
    // It is tried again by itself, with nothing written meanwhile.
    primary.demand("host all replicator 127.0.0.1/32 trust", "turned_away");
    wait_moved(&primary, upto);
    wait_until("nobody to be needed", || {
        !relay.needs_attention() && relay.status()["upstream"]["slot_error"].is_null()
    });
    wait_until("next to nothing to be kept", || retained(&relay) < MB);
}

#[test]
fn a_slot_that_is_dropped_while_wal_is_streamed_is_made_again() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let (primary, relay) = chain_on(&installation, |relay| relay);
        write_wal(&primary, MB);
        wait_moved(&primary, primary.flushed());
        let sessions = relay.status()["upstream"]["sessions"].clone();
        primary.sql("select pg_drop_replication_slot('relay')");
        write_wal(&primary, 2 * MB);
        wait_moved(&primary, primary.flushed());
        relay.wait_logged("was gone while WAL was streamed: it was made again");
        assert_eq!(relay.status()["upstream"]["sessions"], sessions, "the stream was disturbed");
        assert!(!relay.needs_attention());
    }
}

#[test]
fn a_slot_that_is_dropped_and_may_not_be_made_again_is_told() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    primary.sql("select pg_create_physical_replication_slot('relay', true)");
    let mut relay = waiting(Relay::new("relay", primary.port)).with("upstream.create_slot", "false");
    relay.start();
    write_wal(&primary, MB);
    wait_moved(&primary, primary.flushed());
    primary.sql("select pg_drop_replication_slot('relay')");
    write_wal(&primary, MB);
    relay.wait_logged("replication slot \\\"relay\\\" does not exist on the upstream");
    relay.wait_needs_attention();
    assert_eq!(primary.sql("select count(*) from pg_replication_slots"), "0");
}

#[test]
fn a_slot_that_is_invalidated_while_wal_is_streamed_is_made_again() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = Settings::new()
            .segment_size_mb(1)
            .line("wal_keep_size = 0")
            .line("max_wal_size = 32MB")
            .line("min_wal_size = 2MB")
            .line("max_slot_wal_keep_size = 2MB")
            .start(&installation);
        primary.sql("create role replicator replication login");
        primary.sql("create role turned_away login");
        let mut relay = waiting(Relay::new("relay", 1))
            .with_conninfo(&format!("host=127.0.0.1 port={} user=replicator sslmode=disable", primary.port));
        relay.start();
        write_wal(&primary, MB);
        wait_moved(&primary, primary.flushed());
        // Meanwhile it cannot be moved.
        let rules = "host replication replicator 127.0.0.1/32 trust\n\
            host all replicator 127.0.0.1/32 reject\nhost replication turned_away 127.0.0.1/32 reject";
        primary.demand(rules, "turned_away");
        let state = "select wal_status from pg_replication_slots where slot_name = 'relay'";
        wait_until("the slot to be lost", || {
            write_wal(&primary, 3 * MB);
            primary.switch_wal();
            // Nothing keeps WAL for the stream.
            relay.wait_flushed(primary.flushed());
            primary.checkpoint();
            primary.sql(state) == "lost"
        });
        let sessions = relay.status()["upstream"]["sessions"].clone();
        primary.demand("host all replicator 127.0.0.1/32 trust", "turned_away");
        wait_until("another slot to keep WAL", || primary.sql(state) != "lost");
        wait_moved(&primary, primary.flushed());
        assert_eq!(relay.status()["upstream"]["sessions"], sessions, "the stream was disturbed");
        wait_until("nobody to be needed", || !relay.needs_attention());
    }
}

/// A relay whose stream stands still while the primary goes on, and whose slot was dropped meanwhile and made again far ahead of
/// it. With it the end of what it holds, and the process of the stream.
fn made_again_far_ahead(installation: &Installation, settings: Settings) -> (Postgres, Relay, u64, Pid) {
    let primary = settings.segment_size_mb(1).start(installation);
    primary.sql("create role replicator replication login");
    primary.sql("create role turned_away login");
    let mut relay = waiting(Relay::new("relay", 1))
        .with_conninfo(&format!("host=127.0.0.1 port={} user=replicator sslmode=disable", primary.port));
    relay.start();
    write_wal(&primary, MB);
    wait_moved(&primary, primary.flushed());
    // The slot cannot be moved, so that it is missed only when the primary is far ahead.
    let rules = "host replication replicator 127.0.0.1/32 trust\n\
        host all replicator 127.0.0.1/32 reject\nhost replication turned_away 127.0.0.1/32 reject";
    primary.demand(rules, "turned_away");
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    primary.sql("select pg_drop_replication_slot('relay')");
    let sender = primary.sql("select pid from pg_stat_replication where application_name = 'relay'");
    let sender = Pid::from_raw(sender.parse().unwrap()).unwrap();
    kill_process(sender, Signal::STOP).unwrap();
    let held = relay.flushed();
    for _ in 0..4 {
        write_wal(&primary, 3 * MB);
        primary.switch_wal();
        primary.checkpoint();
    }
    primary.demand("host all replicator 127.0.0.1/32 trust", "turned_away");
    relay.wait_logged("was gone while WAL was streamed: it was made again");
    let made_at = slot_position(&primary);
    assert!(made_at > held + 3 * MB, "{made_at:X} after {held:X}");
    (primary, relay, held, sender)
}

/// A primary that keeps next to nothing.
fn sparing() -> Settings {
    Settings::new().line("wal_keep_size = 0").line("max_wal_size = 32MB").line("min_wal_size = 2MB")
}

#[test]
fn a_slot_that_was_made_again_behind_a_gap_is_dropped_and_tells_of_no_loss() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        for restarts in [false, true] {
            let (primary, mut relay, held, sender) = made_again_far_ahead(&installation, sparing());
            assert!(!wal_files(&primary.wal_dir(), MB, 1).contains_key(&(held / MB * MB)), "it is there");
            if restarts {
                relay.kill();
            }
            kill_process(sender, Signal::CONT).unwrap();
            if restarts {
                relay.launch();
            }
            primary.wait_for_sql("select count(*) from pg_replication_slots", "0");
            relay.wait_logged("it is not created again");
            relay.wait_needs_attention();
            let told = relay.status()["upstream"].clone();
            assert_eq!(told["removed"]["from"], *lsn_text(held), "{told}");
            assert!(told["lost"].is_null(), "{told}");
            assert!(!relay.log().contains("has been lost here"), "{}", relay.log());
            hold("no slot is left behind", Duration::from_secs(1), || {
                primary.sql("select count(*) from pg_replication_slots") == "0"
            });
        }
    }
}

#[test]
fn a_slot_that_was_made_again_far_ahead_tells_of_no_loss_to_the_next_process() {
    let Some(installation) = Installation::since(15) else { return };
    let keeping = Settings::new().line("wal_keep_size = 64MB");
    let (primary, mut relay, held, sender) = made_again_far_ahead(&installation, keeping);
    relay.kill();
    kill_process(sender, Signal::CONT).unwrap();
    relay.launch();
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    assert!(upto > held + 3 * MB);
    wait_moved(&primary, upto);
    assert!(!relay.log().contains("has been lost here"), "{}", relay.log());
    assert!(!relay.needs_attention(), "{}", relay.status()["upstream"]);
}

#[test]
fn a_slot_at_another_server_behind_the_same_name_is_never_touched() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = Settings::new().segment_size_mb(1).start(&installation);
        let other = primary.standby("other", primary.port, "");
        primary.sql("create role replicator replication login");
        let proxy = Proxy::to(primary.port);
        let mut relay = waiting(Relay::new("relay", 1))
            .with_conninfo(&format!("host=127.0.0.1 port={} user=replicator sslmode=disable", proxy.port));
        relay.start();
        write_wal(&primary, MB);
        wait_moved(&primary, primary.flushed());
        other.wait_replayed(primary.flushed());
        other.sql("select pg_create_physical_replication_slot('relay', true)");
        let [stays_at, stays_there] = [&primary, &other].map(slot_position);
        proxy.lead_sql_to(other.port);
        write_wal(&primary, MB);
        let upto = primary.flushed();
        other.wait_replayed(upto);
        relay.wait_logged("does not reach the server that streams");
        relay.wait_needs_attention();
        let told = relay.status()["upstream"]["slot_error"].as_str().unwrap_or_default().to_owned();
        assert!(told.contains("does not reach the server that streams"), "{told}");
        assert_eq!([&primary, &other].map(slot_position), [stays_at, stays_there]);
        other.sql("select pg_drop_replication_slot('relay')");
        proxy.lead_sql_to(primary.port);
        wait_moved(&primary, upto);
        wait_until("nobody to be needed", || !relay.needs_attention());
        assert_eq!(other.sql("select count(*) from pg_replication_slots"), "0");
    }
}

#[test]
fn a_logical_slot_that_takes_the_name_is_never_moved() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).line("wal_level = logical").start(&installation);
    let mut relay = waiting(Relay::new("relay", primary.port));
    relay.start();
    write_wal(&primary, MB);
    wait_moved(&primary, primary.flushed());
    primary.sql("select pg_drop_replication_slot('relay')");
    primary.sql("select pg_create_logical_replication_slot('relay', 'pgoutput')");
    let confirmed = "select slot_type || confirmed_flush_lsn from pg_replication_slots";
    let before = primary.sql(confirmed);
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    relay.wait_logged("invalid slot_type");
    relay.wait_needs_attention();
    assert_eq!(primary.sql(confirmed), before);
}

#[test]
fn what_was_lost_and_is_here_again_is_told_no_more_although_no_standby_has_it() {
    let Some(installation) = Installation::since(15) else { return };
    let (primary, mut relay) = chain_on(&installation, |relay| relay);
    write_wal(&primary, MB);
    wait_moved(&primary, primary.flushed());
    relay.terminate();
    let (data, old) = (relay.data_dir().to_owned(), relay.data_dir().with_extension("old"));
    copy_folder(&data, &old);
    relay.start();
    write_wal(&primary, 2 * MB);
    let upto = primary.flushed();
    wait_moved(&primary, upto);
    relay.terminate();
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::rename(&old, &data).unwrap();
    relay.start();
    relay.wait_logged("WAL that was acknowledged has been lost here");
    relay.wait_flushed(upto);
    relay.wait_logged("the WAL that had been lost is here again");
    wait_until("nobody to be needed", || {
        !relay.needs_attention() && relay.status()["upstream"]["lost"].is_null()
    });
    assert_eq!(relay.metric("walrelay_upstream_lost_bytes"), Some(0.0));
}

#[test]
fn a_slot_of_a_policy_that_was_local_holds_back_no_transaction_any_more() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        // Who may not make the slot cannot ask servers before 15 whether there is one.
        for create_slot in ["true", "false"] {
            let primary = Settings::new().segment_size_mb(1).start(&installation);
            let mut relay = Relay::new("relay", primary.port);
            relay.start();
            let feedback = "hot_standby_feedback = on\nwal_receiver_status_interval = 1s";
            let _standby = primary.standby("standby", relay.port, feedback);
            let xmin =
                "select coalesce(xmin::text, 'none') from pg_replication_slots where slot_name = 'relay'";
            wait_until("the slot to hold back what the standby reads", || primary.sql(xmin) != "none");
            let held = primary.sql(xmin);
            relay.terminate();
            assert_eq!(primary.sql(xmin), held, "a slot keeps it");
            let mut relay = waiting(relay).with("upstream.create_slot", create_slot);
            relay.start();
            primary.wait_for_sql(xmin, "none");
            // What standbys read now is held back by the stream.
            primary.wait_for_sql(
                "select count(backend_xmin) from pg_stat_replication where application_name = 'relay'",
                "1",
            );
            write_wal(&primary, MB);
            wait_moved(&primary, primary.flushed());
        }
    }
}

#[test]
fn a_slot_of_a_policy_that_was_local_holds_back_nothing_although_it_was_made_ahead_of_the_relay() {
    let Some(installation) = Installation::since(15) else { return };
    let mut way = OnTheWay::begin(&installation);
    way.kill();
    let OnTheWay { primary, relay, xmin, .. } = &mut way;
    for (key, value) in [("upstream.acknowledge", "\"ANY 1 (far)\""), ("upstream.slot", "\"relay\"")] {
        relay.set(key, value);
    }
    let held = "select coalesce(xmin::text, 'none') from pg_replication_slots where slot_name = 'relay'";
    assert_eq!(primary.sql(held), *xmin, "a slot keeps it");
    relay.start();
    primary.wait_for_sql(held, "none");
}

#[test]
fn a_loss_is_told_also_where_the_answer_to_the_making_of_the_slot_had_not_come() {
    let Some(installation) = Installation::since(15) else { return };
    let primary = Settings::new().segment_size_mb(1).line("wal_keep_size = 64MB").start(&installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = waiting(Relay::new("relay", proxy.port));
    relay.start();
    write_wal(&primary, MB);
    wait_moved(&primary, primary.flushed());
    let mut is_cut = false;
    // The first column of what is answered is the new slot's position.
    proxy.edit(move |message| match (message.first(), message.get(7..11)) {
        (Some(b'T'), Some(b"lsn\0")) if !std::mem::replace(&mut is_cut, true) => Verdict::Cut,
        _ => Verdict::Forward,
    });
    primary.sql("select pg_drop_replication_slot('relay')");
    write_wal(&primary, 2 * MB);
    wait_moved(&primary, primary.flushed());
    assert!(!relay.log().contains("it was made again"), "the answer came");
    assert_eq!(relay.status()["upstream"]["sessions"], 1, "the stream was disturbed");
    relay.terminate();
    let (data, old) = (relay.data_dir().to_owned(), relay.data_dir().with_extension("old"));
    copy_folder(&data, &old);
    relay.start();
    write_wal(&primary, 2 * MB);
    wait_moved(&primary, primary.flushed());
    relay.terminate();
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::rename(&old, &data).unwrap();
    relay.start();
    relay.wait_logged("WAL that was acknowledged has been lost here");
}

#[test]
fn a_smart_shutdown_of_the_primary_is_not_held_up() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let (mut primary, relay) = chain_on(&installation, |relay| relay);
        write_wal(&primary, MB);
        wait_moved(&primary, primary.flushed());
        let took = primary.stop(Stop::Smart);
        assert!(took < Duration::from_secs(5), "the primary's smart stop took {took:?}");
        drop(relay);
    }
}

#[test]
fn a_relay_that_is_streamed_from_takes_no_sql_and_its_slot_follows_what_is_acknowledged() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let near = Relay::streaming_from("near", primary.port);
    let mut far = Relay::new("far", near.port)
        .with("upstream.acknowledge", "\"ANY 1 (heir)\"")
        .with("upstream.slot", "\"far\"");
    far.start();
    write_wal(&primary, 2 * MB);
    far.wait_flushed(primary.flushed());
    let position = || near.slot("far").and_then(|slot| slot["restart_lsn"].as_str().map(lsn)).unwrap_or(0);
    let before = position();
    hold("what no standby has is kept", Duration::from_secs(1), || position() == before);
    let heir = primary.standby("heir", far.port, "wal_receiver_status_interval = 1s");
    let upto = primary.flushed();
    heir.wait_replayed(upto);
    wait_until("the slot to follow", || position() >= upto);
    assert!(!far.log().contains("could not advance"), "{}", far.log());
    assert!(!far.needs_attention());
}
