//! The slot on the primary: invalidated it is made again where that helps, and what cannot be had any more is told.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::support::compare::{assert_equal_clusters, assert_same_wal, wal_files};
use crate::support::faults::Faults;
use crate::support::lab::{Installation, chosen_majors, give_to_server};
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::proxy::{Proxy, Verdict, wal_in};
use crate::support::raw::{RawClient, ServerError, error_in, identify_system};
use crate::support::receivewal::PgReceivewal;
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::support::{MB, lsn, lsn_text};
use crate::timelines::assert_same_timeline;

/// A relay that was cut off, with its slot idle.
pub(crate) fn cut_off(
    installation: &Installation,
    settings: Settings,
    prepare: impl FnOnce(Relay) -> Relay,
) -> Chain {
    let primary = settings.segment_size_mb(1).start(installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = prepare(Relay::new("relay", proxy.port));
    relay.start();
    let chain = Chain { primary, proxy, relay };
    chain.cut();
    chain
}

pub(crate) struct Chain {
    pub(crate) primary: Postgres,
    pub(crate) proxy: Proxy,
    pub(crate) relay: Relay,
}

impl Chain {
    /// Everything up to here is at the relay, and nothing that follows.
    pub(crate) fn cut(&self) {
        let Self { primary, proxy, relay } = self;
        write_wal(primary, MB);
        relay.wait_flushed(primary.flushed());
        primary.wait_reported_flush("relay", primary.flushed());
        proxy.close();
        primary.wait_for_sql("select active from pg_replication_slots where slot_name = 'relay'", "f");
    }
}

/// A primary that keeps next to nothing for slots.
pub(crate) fn sparing() -> Settings {
    Settings::new()
        .line("wal_keep_size = 0")
        .line("max_wal_size = 32MB")
        .line("min_wal_size = 2MB")
        .line("max_slot_wal_keep_size = 2MB")
}

/// Returns what the primary removes, as an archive would have it.
fn lose_the_slot(primary: &Postgres) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut archive = BTreeMap::new();
    for _ in 0..4 {
        write_wal(primary, 3 * MB);
        primary.switch_wal();
        let written = primary.flushed();
        // Names of later ones are those of files to be used again.
        for (_, path) in wal_files(&primary.wal_dir(), MB, 1).range(..written / MB * MB) {
            archive.insert(path.clone(), std::fs::read(path).unwrap());
        }
        primary.checkpoint();
    }
    primary.wait_for_sql("select wal_status from pg_replication_slots where slot_name = 'relay'", "lost");
    archive.retain(|path, _| !path.exists());
    archive
}

/// What a server answers to a start at this position.
fn refusal(port: u16, start: u64) -> ServerError {
    let mut client = RawClient::replication(port).unwrap();
    identify_system(&mut client);
    let mut answer = client.start_replication(None, start, 1).unwrap();
    answer.extend(client.until_ready().unwrap());
    identify_system(&mut client);
    error_in(&answer).unwrap_or_else(|| panic!("{} is served", lsn_text(start)))
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
fn who_needs_wal_of_the_gap_is_answered_as_by_the_primary() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let Chain { primary, proxy, relay } = cut_off(&installation, sparing(), |relay| relay);
        let (oldest, held) = (relay.oldest(), relay.flushed());
        let streaming = |start, upto| {
            let mut client = RawClient::replication(relay.port).unwrap();
            identify_system(&mut client);
            client.start_replication(None, start, 1).unwrap();
            client.read_wal(start, upto);
            client
        };
        let mut caught_up = streaming(oldest, held);
        let mut ahead = streaming(held.next_multiple_of(MB), 0);
        lose_the_slot(&primary);
        assert!(relay.status()["upstream"]["removed"].is_null(), "nobody has told yet");
        proxy.open();
        for (client, start) in [(&mut caught_up, held), (&mut ahead, held.next_multiple_of(MB))] {
            let answer = error_in(&client.until_ready().unwrap()).unwrap();
            let theirs = refusal(primary.port, start);
            assert_eq!((&*theirs.code, &*answer.code), ("58P01", "58P01"));
            assert_eq!(answer.message, theirs.message, "on {major}");
            identify_system(client);
        }
        for start in [held, held + 3 * MB, held + 5 * MB] {
            assert_eq!(
                refusal(relay.port, start).message,
                refusal(primary.port, start).message,
                "on {major}"
            );
        }
        let beyond = refusal(relay.port, primary.flushed() + 100 * MB).message;
        assert!(beyond.contains("is ahead of the WAL flush position"), "{beyond}");
        // What is held is served as ever, up to its end.
        let answer = error_in(&streaming(oldest, held).until_ready().unwrap()).unwrap();
        assert_eq!(answer.message, refusal(primary.port, held).message);
        let removed = relay.status()["upstream"]["removed"].clone();
        assert_eq!(removed["from"], *lsn_text(held), "{removed}");
        hold("it asks for a person", Duration::from_secs(2), || relay.needs_attention());
    }
}

#[test]
fn clients_that_wait_at_a_gap_hear_of_it_and_go_on_when_it_is_filled() {
    let Some(installation) = Installation::since(15) else { return };
    let chain = cut_off(&installation, sparing(), |relay| relay);
    chain.proxy.open();
    let standby = chain.primary.standby("standby", chain.relay.port, "wal_retrieve_retry_interval = 1s");
    let receiver = PgReceivewal::start(&installation, chain.relay.port, &[]);
    chain.cut();
    let Chain { mut primary, proxy, relay } = chain;
    let held = relay.flushed();
    standby.wait_replayed(held);
    let archive = lose_the_slot(&primary);
    let upto = primary.flushed();
    proxy.open();
    let told = refusal(primary.port, held).message;
    wait_until("the standby to be told", || standby.log().contains(&told));
    wait_until("pg_receivewal to be told", || receiver.log().contains(&told));

    primary.wait_for_sql("select count(*) from pg_replication_slots", "0");

    // The primary forgets what it has removed only with its process.
    primary.stop(Stop::Fast);
    for (path, content) in &archive {
        std::fs::write(path, content).unwrap();
        give_to_server(path);
    }
    primary.start();
    primary.sql("select pg_create_physical_replication_slot('relay', true)");
    relay.wait_flushed(upto);
    wait_until("nobody to be needed", || !relay.needs_attention());
    assert!(relay.status()["upstream"]["removed"].is_null());
    standby.wait_replayed(upto);
    assert_equal_clusters(&primary, &standby);
    wait_until("pg_receivewal to go on", || receiver.completed(MB) >= upto / MB * MB);
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

#[test]
fn a_slot_made_in_vain_is_dropped_where_it_was_made_and_no_other_is_touched() {
    let Some(installation) = Installation::since(15) else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Arc::new(Proxy::to(primary.port));
    let mut relay = Relay::new("relay", proxy.port);
    relay.start();
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    relay.terminate();
    proxy.close();
    let kept = "select restart_lsn from pg_replication_slots where slot_name = 'relay'";
    let kept_from = lsn(&primary.sql(kept));
    // A standby that was made later has nothing of what follows at the relay.
    for _ in 0..2 {
        write_wal(&primary, 3 * MB);
        primary.switch_wal();
        primary.checkpoint();
    }
    let late = primary.standby("late", primary.port, "");
    late.wait_replayed(primary.flushed());
    let to_late = Proxy::to(late.port);
    let again = Arc::clone(&proxy);
    // The primary is back just when the other one has refused.
    to_late.edit(move |message| {
        if message.first() == Some(&b'E') && message.windows(5).any(|code| code == b"58P01") {
            again.open();
        }
        Verdict::Forward
    });
    let ports = format!("{},{}", proxy.port, to_late.port);
    relay = relay.with_conninfo(&format!(
        "host=127.0.0.1,127.0.0.1 port={ports} user=postgres sslmode=disable target_session_attrs=any"
    ));
    relay.launch();
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    assert_same_wal(&relay.wal_dir(), &primary, upto);
    assert!(!to_late.passed(|passed| passed.starts.is_empty()), "the other one was never asked");
    assert!(lsn(&primary.sql(kept)) >= kept_from);
    assert!(!primary.log().contains("DROP_REPLICATION_SLOT"), "the slot that kept the WAL was dropped");
    let made = late.log().matches("CREATE_REPLICATION_SLOT \"relay\"").count();
    assert!(made >= 1, "no slot was made there:\n{}", late.log());
    late.wait_for_sql("select count(*) from pg_replication_slots", "0");
    assert!(!relay.needs_attention());
}

pub(crate) const SLOTS: &str = "select count(*) from pg_replication_slots where slot_name = 'relay'";

#[test]
fn a_slot_that_costs_too_much_is_dropped_while_the_relay_is_fenced() {
    // Servers before 15 do not tell where a slot is.
    let Some(installation) = Installation::since(15) else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port).with_token();
    relay.set("upstream.slot_wal_keep_max", "\"6MB\"");
    relay.start();
    relay.fence();
    write_wal(&primary, 2 * MB);
    hold("it may keep so much", Duration::from_secs(1), || primary.sql(SLOTS) == "1");
    let retained = || relay.metric("walrelay_upstream_slot_retained_bytes").unwrap_or(-1.0);
    wait_until("that to be shown", || retained() >= f64::from(2 << 20));
    write_wal(&primary, 8 * MB);
    primary.wait_for_sql(SLOTS, "0");
    relay.wait_logged("the slot made the upstream keep too much: it was dropped");
    wait_until("nothing to be kept", || retained() == 0.0);
    relay.unfence();
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    primary.wait_for_sql(SLOTS, "1");
    assert_same_wal(&relay.wal_dir(), &primary, upto);
}

#[test]
fn a_slot_that_costs_too_much_is_dropped_at_a_server_that_must_not_be_followed() {
    let Some(installation) = Installation::since(15) else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let heir = primary.standby("heir", primary.port, "");
    let mut relay = Relay::streaming_from("relay", primary.port);
    heir.promote();
    let conninfo = |port| format!("host=127.0.0.1 port={port} user=postgres sslmode=disable");
    relay.terminate();
    relay = relay.with_conninfo(&conninfo(heir.port));
    relay.start();
    wait_until("the relay to follow", || relay.status()["store"]["timeline"] == 2);
    relay.terminate();
    // The old primary has no say any more, and keeps WAL for a relay that must not take it.
    relay = relay.with_conninfo(&conninfo(primary.port));
    relay.set("upstream.slot_wal_keep_max", "\"6MB\"");
    write_wal(&primary, 2 * MB);
    relay.launch();
    relay.wait_needs_attention();
    assert_eq!(primary.sql(SLOTS), "1");
    write_wal(&primary, 8 * MB);
    primary.wait_for_sql(SLOTS, "0");
    relay.wait_logged("the slot made the upstream keep too much: it was dropped");
}

#[test]
fn a_slot_that_costs_too_much_is_dropped_also_while_another_server_does_not_answer() {
    let Some(installation) = Installation::since(15) else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut heir = primary.standby("heir", primary.port, "");
    let mut relay = Relay::streaming_from("relay", primary.port);
    heir.promote();
    let conninfo = |ports: &str| format!("host=127.0.0.1 port={ports} user=postgres sslmode=disable");
    relay.terminate();
    relay = relay.with_conninfo(&conninfo(&heir.port.to_string()));
    relay.start();
    wait_until("the relay to follow", || relay.status()["store"]["timeline"] == 2);
    relay.terminate();
    heir.stop(Stop::Immediate);
    let both = format!("{},{}", primary.port, heir.port);
    relay =
        relay.with_conninfo(&format!("host=127.0.0.1,127.0.0.1 port={both} user=postgres sslmode=disable"));
    relay.set("upstream.slot_wal_keep_max", "\"6MB\"");
    write_wal(&primary, 2 * MB);
    relay.launch();
    relay.wait_needs_attention();
    assert_eq!(primary.sql(SLOTS), "1");
    write_wal(&primary, 8 * MB);
    primary.wait_for_sql(SLOTS, "0");
    relay.wait_logged("the slot made the upstream keep too much: it was dropped");
    heir.start();
    write_wal(&heir, MB);
    relay.wait_flushed(heir.flushed());
}

#[test]
fn a_slot_is_kept_whatever_it_costs_at_a_server_that_was_only_away() {
    let Some(installation) = Installation::since(15) else { return };
    let chain =
        cut_off(&installation, Settings::new(), |relay| relay.with("upstream.slot_wal_keep_max", "\"3MB\""));
    let Chain { primary, proxy, relay } = chain;
    write_wal(&primary, 8 * MB);
    hold("it is away", Duration::from_secs(1), || primary.sql(SLOTS) == "1");
    proxy.open();
    relay.wait_flushed(primary.flushed());
    assert!(!primary.log().contains("DROP_REPLICATION_SLOT"), "the slot was dropped");
}

/// The first server is promoted, and has a newer checkpoint, just before it hears of a slot that is to be made.
fn promoted_before_the_slot(server: &Arc<Postgres>, proxy: &Proxy) {
    let (server, mut promoted) = (Arc::clone(server), false);
    proxy.before_command(move |command| {
        if command.starts_with("CREATE_REPLICATION_SLOT") && !std::mem::replace(&mut promoted, true) {
            server.promote();
            write_wal(&server, 2 * MB);
            server.checkpoint();
        }
    });
}

#[test]
fn a_slot_that_is_made_while_its_server_is_promoted_is_of_use_all_the_same() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = Settings::new().segment_size_mb(1).start(&installation);
        // One relay that begins there, and one that comes from the primary.
        for has_wal in [false, true] {
            let heir = Arc::new(primary.standby("heir", primary.port, ""));
            let proxy = Proxy::to(heir.port);
            let mut relay = Relay::new("relay", primary.port);
            if has_wal {
                relay.start();
                write_wal(&primary, MB);
                relay.wait_flushed(primary.flushed());
                relay.terminate();
            }
            heir.wait_replayed(primary.flushed());
            promoted_before_the_slot(&heir, &proxy);
            relay = relay.with_standby_at(proxy.port);
            relay.start();
            wait_until("the relay to follow", || relay.status()["store"]["timeline"] == 2);
            write_wal(&heir, MB);
            let upto = heir.flushed();
            relay.wait_flushed(upto);
            heir.wait_reported_flush("relay", upto);
            let kept_from =
                "select restart_lsn from pg_replication_slots where slot_name = 'relay' and active";
            wait_until("the slot to follow", || lsn(&heir.sql(kept_from)) >= upto);
            assert_same_timeline(&relay.wal_dir(), &heir, 2, upto);
            assert!(!relay.needs_attention(), "{}", relay.status()["upstream"]);
            assert!(!relay.log().contains("has been lost here"), "{}", relay.log());
        }
    }
}
