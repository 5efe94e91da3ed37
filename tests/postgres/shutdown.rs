//! The primary's fast shutdown is never held up, whatever state the relay is in; the relay's own end is an orderly one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::compare::assert_same_wal;
use crate::support::faults::{Faults, SmallDisk};
use crate::support::lab::{Installation, chosen_majors, may_mount};
use crate::support::load::{Load, write_wal};
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::proxy::{Proxy, Verdict};
use crate::support::raw::{Event, RawClient, tags_of};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_at_most, wait_until};
use crate::support::{MB, lsn_text};

/// A fast stop of the primary takes less than this with the relay attached.
const STOP_MAX: Duration = Duration::from_secs(2);

fn chain(prepare: impl FnOnce(Relay) -> Relay) -> Option<(Postgres, Proxy, Relay)> {
    Some(chain_on(&Installation::any()?, prepare))
}

fn chain_on(installation: &Installation, prepare: impl FnOnce(Relay) -> Relay) -> (Postgres, Proxy, Relay) {
    let primary = Settings::new().segment_size_mb(1).start(installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = prepare(Relay::new("relay", proxy.port));
    relay.start();
    (primary, proxy, relay)
}

/// A walsender's rules for the end of a shutdown differ from major to major.
fn on_every_major(test: impl Fn(Installation)) {
    chosen_majors().into_iter().filter_map(Installation::of).for_each(test);
}

/// Stops the primary and holds it to the limit. How often the relay told its positions meanwhile is bounded too: the
/// primary asks thousands of times a second while it waits.
fn stops_in_time(primary: &mut Postgres, proxy: &Proxy) {
    let before = proxy.passed(|passed| passed.status_updates);
    let took = primary.stop(Stop::Fast);
    let told = proxy.passed(|passed| passed.status_updates) - before;
    assert!(took < STOP_MAX, "the primary's fast stop took {took:?}");
    assert!(told < 200, "{told} status updates in {took:?}");
    proxy.assert_honest();
}

#[test]
fn the_primary_stops_at_once_with_an_idle_relay_that_then_has_everything() {
    on_every_major(|installation| {
        let (mut primary, proxy, relay) = chain_on(&installation, |relay| relay);
        write_wal(&primary, MB);
        stops_in_time(&mut primary, &proxy);
        // The shutdown checkpoint too: a switchover depends on it.
        let delivered = proxy.passed(|passed| passed.delivered);
        relay.wait_flushed(delivered);
        primary.start();
        assert_eq!(assert_same_wal(&relay.wal_dir(), &primary, delivered) % MB, 0);
    });
}

#[test]
fn the_primary_stops_at_once_under_load() {
    let Some((mut primary, proxy, relay)) = chain(|relay| relay) else { return };
    for _ in 0..3 {
        let load = Load::start(&primary, Duration::ZERO);
        wait_until("some load", || load.committed() > 100);
        stops_in_time(&mut primary, &proxy);
        drop(load);
        primary.start();
        relay.wait_flushed(primary.flushed());
    }
}

/// The same while nothing that comes after `durable` can be made durable.
fn stops_truthfully(primary: &mut Postgres, proxy: &Proxy, durable: u64) {
    stops_in_time(primary, proxy);
    let told = proxy.passed(|passed| passed.flush_max);
    assert!(told <= durable, "{} was acknowledged, {} is durable", lsn_text(told), lsn_text(durable));
}

/// From now on the fault is there. Returns the end of what may have become durable before.
fn break_disk(fault: &str, faults: &Faults, primary: &Postgres, relay: &Relay) -> u64 {
    relay.wait_flushed(primary.flushed());
    faults.set(fault, 0);
    primary.flushed()
}

#[test]
fn the_primary_stops_at_once_while_the_relays_sync_hangs() {
    on_every_major(|installation| {
        let faults = Faults::new();
        let (mut primary, proxy, relay) = chain_on(&installation, |relay| relay.with_faults(&faults));
        let durable = break_disk("sync_hangs", &faults, &primary, &relay);
        write_wal(&primary, 2 * MB);
        stops_truthfully(&mut primary, &proxy, durable);
        faults.clear("sync_hangs");
    });
}

#[test]
fn the_primary_stops_at_once_while_the_relay_stops_too_and_its_sync_hangs() {
    on_every_major(|installation| {
        let faults = Faults::new();
        let (mut primary, proxy, relay) = chain_on(&installation, |relay| relay.with_faults(&faults));
        let durable = break_disk("sync_hangs", &faults, &primary, &relay);
        write_wal(&primary, 2 * MB);
        let upto = primary.flushed();
        wait_until("the relay to have received it", || relay.position("/store/verified") >= upto);
        relay.process().signal(Signal::TERM);
        stops_truthfully(&mut primary, &proxy, durable);
        faults.clear("sync_hangs");
    });
}

#[test]
fn the_primary_stops_at_once_while_the_relays_writes_hang() {
    on_every_major(|installation| {
        // What fits into the relay's memory, and what does not.
        for bytes in [MB / 2, 8 * MB] {
            let faults = Faults::new();
            let small = |relay: Relay| {
                relay.with("store.tail_size", "\"1MB\"").with("store.unwritten_size", "\"1MB\"")
            };
            let (mut primary, proxy, relay) =
                chain_on(&installation, |relay| small(relay.with_faults(&faults)));
            let durable = break_disk("write_hangs", &faults, &primary, &relay);
            write_wal(&primary, bytes);
            stops_truthfully(&mut primary, &proxy, durable);
            faults.clear("write_hangs");
        }
    });
}

#[test]
fn what_is_not_written_yet_is_not_reported_as_written() {
    on_every_major(|installation| {
        let faults = Faults::new();
        let primary = Settings::new()
            .segment_size_mb(1)
            .line("synchronous_standby_names = 'relay'")
            .line("synchronous_commit = remote_write")
            .start(&installation);
        let proxy = Proxy::to(primary.port);
        let mut relay = Relay::new("relay", proxy.port).with_faults(&faults);
        relay.start();
        let load = Load::start_waiting(&primary);
        wait_until("some commits", || load.committed() > 10);
        drop(load);
        let written = break_disk("write_hangs", &faults, &primary, &relay);
        let load = Load::start_waiting(&primary);
        wait_until("more to be received", || proxy.passed(|passed| passed.delivered) > written);
        hold("a commit waits for the write", Duration::from_secs(1), || load.committed() == 0);
        let told = proxy.passed(|passed| passed.write_max);
        assert!(told <= written, "{} was told, {} is written", lsn_text(told), lsn_text(written));
        faults.clear("write_hangs");
        wait_until("commits to go on", || load.committed() > 10);
        drop(load);
        proxy.assert_honest();
    });
}

#[test]
fn a_server_that_vanishes_at_the_end_of_its_timeline_holds_up_neither_a_fence_nor_the_end() {
    let Some(installation) = Installation::any() else { return };
    for is_fenced in [true, false] {
        let primary = Settings::new().segment_size_mb(1).start(&installation);
        let upstream = primary.standby("upstream", primary.port, "");
        let proxy = Proxy::to(upstream.port);
        let mut relay = Relay::new("relay", proxy.port).with_standby_at(proxy.port).with_token();
        relay.start();
        let is_silent = Arc::new(AtomicBool::new(false));
        let (mut has_ended, silent) = (false, Arc::clone(&is_silent));
        proxy.edit(move |message| {
            if has_ended {
                silent.store(true, Ordering::SeqCst);
                return Verdict::Drop;
            }
            // CopyDone; the relay answers it, and hears nothing more.
            has_ended = message.first() == Some(&b'c');
            Verdict::Forward
        });
        upstream.promote();
        wait_until("the server to be silent", || is_silent.load(Ordering::SeqCst));
        let started = Instant::now();
        if is_fenced {
            relay.fence();
        } else {
            assert!(relay.terminate().success());
        }
        let took = started.elapsed();
        assert!(took < Duration::from_secs(3), "that took {took:?}");
    }
}

#[test]
fn the_primary_stops_at_once_while_the_relays_disk_is_full() {
    if !may_mount() {
        return;
    }
    let disk = SmallDisk::of_megabytes(48);
    let Some((mut primary, proxy, relay)) =
        chain(|relay| relay.with_data_dir(&disk.path().join("relay")).with("store.wal_keep_size", "\"4MB\""))
    else {
        return;
    };
    disk.fill();
    write_wal(&primary, 12 * MB);
    wait_until("the store to notice", || relay.condition() != "healthy");
    stops_in_time(&mut primary, &proxy);
    // What was acknowledged is in the files.
    let told = proxy.passed(|passed| passed.flush_max);
    primary.start();
    assert_same_wal(&relay.wal_dir(), &primary, told);
}

#[test]
fn the_primary_stops_at_once_with_a_standby_behind_that_never_reads() {
    let Some((mut primary, proxy, relay)) = chain(|relay| relay) else { return };
    let mut idler = RawClient::replication(relay.port).unwrap();
    idler.start_replication(None, relay.oldest(), 1).unwrap();
    write_wal(&primary, 20 * MB);
    stops_in_time(&mut primary, &proxy);
}

#[test]
fn sigterm_ends_streams_as_a_primary_does_with_everything_durable() {
    let Some((primary, proxy, mut relay)) = chain(|relay| relay) else { return };
    let standby = primary.standby("standby", relay.port, "");
    let mut client = RawClient::replication(relay.port).unwrap();
    let from = relay.oldest();
    client.start_replication(None, from, 1).unwrap();
    write_wal(&primary, MB);
    let upto = primary.flushed();
    client.read_wal(from, upto);
    client.send_status(upto, upto, 0).unwrap();
    standby.wait_replayed(upto);
    let started = Instant::now();
    let status = relay.terminate();
    let took = started.elapsed();
    assert!(status.success(), "{status}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    let end = loop {
        match client.next_event(Duration::from_secs(2)) {
            Event::Other(message) => break message,
            Event::Keepalive { .. } | Event::Wal { .. } => {}
            other => panic!("no orderly end: {other:?}"),
        }
    };
    assert_eq!(tags_of(&[end]), ["COPY 0"]);
    assert_eq!(client.next_event(Duration::from_secs(2)), Event::Closed);
    assert!(proxy.passed(|passed| passed.flush_max) >= upto);
    relay.start();
    write_wal(&primary, MB);
    standby.wait_replayed(primary.flushed());
}

#[test]
fn sigterm_while_a_sync_hangs_ends_in_time_and_not_as_a_success() {
    let faults = Faults::new();
    let Some((primary, proxy, mut relay)) = chain(|relay| relay.with_faults(&faults)) else { return };
    relay.wait_flushed(primary.flushed());
    faults.set("sync_slow", 60_000);
    write_wal(&primary, MB);
    let told = proxy.passed(|passed| passed.flush_max);
    relay.process().signal(Signal::TERM);
    let status = relay.process_mut().wait(Duration::from_secs(15)).expect("an end within 15 s");
    assert!(!status.success(), "what hangs is not written, so this is no success");
    assert_eq!(proxy.passed(|passed| passed.flush_max), told, "acknowledged what was not synced");
    drop(relay);
}

#[test]
fn sigterm_with_clients_that_do_not_answer_ends_in_time() {
    let Some((primary, _proxy, mut relay)) = chain(|relay| relay) else { return };
    let mut idlers: Vec<RawClient> = (0..10).map(|_| RawClient::replication(relay.port).unwrap()).collect();
    for idler in &mut idlers {
        idler.start_replication(None, relay.oldest(), 1).unwrap();
    }
    let strangers: Vec<RawClient> = (0..10).filter_map(|_| RawClient::connect(relay.port).ok()).collect();
    write_wal(&primary, 20 * MB);
    relay.process().signal(Signal::TERM);
    let ended = wait_at_most(Duration::from_secs(10), || (!relay.is_running()).then_some(()));
    assert!(ended.is_some(), "clients hold the relay's end up");
    drop((idlers, strangers));
}
