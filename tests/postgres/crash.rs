//! The relay is killed, at any time and at chosen steps: what it acknowledged is there, and the standby carries on.

use std::path::PathBuf;
use std::time::Duration;

use crate::held::check_held;
use crate::support::MB;
use crate::support::compare::{assert_equal_clusters, assert_same_wal, wal_files};
use crate::support::faults::Faults;
use crate::support::lab::Installation;
use crate::support::load::{Load, assert_has_confirmed, write_wal};
use crate::support::lsn_text;
use crate::support::postgres::{Postgres, Settings};
use crate::support::powercut::{Chance, rounds};
use crate::support::proxy::Proxy;
use crate::support::relay::Relay;
use crate::support::wait::{wait_for, wait_until};

/// More than the overlap can be: the page of the last record, which is shorter than this in these tests.
const OVERLAP_MAX: u64 = 64 * 1024;

#[test]
fn killed_under_load_it_loses_nothing_and_asks_for_nothing_twice() {
    let Some(installation) = Installation::any() else { return };
    let (primary, proxy, mut relay) = small_chain(&installation);
    // Every round looks at everything that is held, so that is not to grow from round to round.
    relay.terminate();
    relay.set("store.wal_keep_size", "\"64MB\"");
    relay.start();
    let standby = primary.standby("standby", relay.port, "");
    // Some megabytes a second: enough to be within a write, a sync or a new segment at every kill.
    let load = Load::start(&primary, Duration::from_millis(5));
    let mut chance = Chance::seeded();
    for round in 1..=rounds("WALRELAY_KILLS", 25) {
        let before = proxy.passed(|passed| passed.flush_max);
        wait_until("something new to be acknowledged", || proxy.passed(|passed| passed.flush_max) > before);
        std::thread::sleep(Duration::from_millis(chance.between(0, 300)));
        relay.kill();
        proxy.close();
        let acknowledged = proxy.passed(|passed| passed.flush_max);
        relay.launch();
        check_held(&mut relay, &primary.wal_dir(), MB, acknowledged)
            .unwrap_or_else(|complaint| panic!("kill {round}: {complaint}"));
        let starts = proxy.passed(|passed| passed.starts.len());
        proxy.open();
        let start = wait_for("the relay to ask for more", || {
            proxy.passed(|passed| passed.starts.get(starts).copied())
        });
        assert!(
            start + OVERLAP_MAX >= acknowledged,
            "kill {round}: asked again from {}, {} was durable",
            lsn_text(start),
            lsn_text(acknowledged)
        );
    }
    drop(load);
    relay.wait_ready();
    assert_equal_clusters(&primary, &standby);
    proxy.assert_honest();
    relay.wait_flushed(primary.flushed());
    assert_same_wal(&relay.wal_dir(), &primary, primary.flushed());
}

#[test]
fn killed_at_a_step_of_a_new_segment_it_recovers() {
    // Before and after a file is made, written, synced, renamed: the states that `store` writes down. Each segment's file is
    // new, for all is kept.
    killed_at(
        "64MB",
        &[
            "create:1:after",
            "create:3:before",
            "create:4:after",
            "create:6:after",
            "write:2:after",
            "write:9:before",
        ],
    );
}

#[test]
fn killed_around_a_sync_it_recovers() {
    killed_at(
        "2MB",
        &[
            "sync:1:before",
            "sync:2:after",
            "sync:5:before",
            "sync:9:after",
            "sync:17:before",
            "sync:33:after",
        ],
    );
}

#[test]
fn killed_around_a_rename_or_a_removal_it_recovers() {
    killed_at(
        "2MB",
        &[
            "rename:1:before",
            "rename:2:after",
            "rename:3:before",
            "rename:5:after",
            "unlink:1:before",
            "unlink:1:after",
            "unlink:2:after",
        ],
    );
}

/// Lets the relay die at each of these steps, of a start or of streaming, and checks what it holds after each.
fn killed_at(wal_keep_size: &str, plans: &[&str]) {
    let Some(installation) = Installation::any() else { return };
    let (primary, proxy, mut relay) = small_chain(&installation);
    relay.set("store.wal_keep_size", &format!("{wal_keep_size:?}"));
    relay.terminate();
    for plan in plans {
        let faults = Faults::kill_at(plan);
        relay.environment = faults.environment(relay.data_dir());
        relay.launch();
        let died = write_until_dead(&primary, &mut relay);
        proxy.close();
        assert!(died, "{plan}: the relay never came there, so nothing was shown");
        relay.wait_for_end();
        relay.environment.clear();
        let acknowledged = proxy.passed(|passed| passed.flush_max);
        relay.launch();
        check_held(&mut relay, &primary.wal_dir(), MB, acknowledged)
            .unwrap_or_else(|complaint| panic!("{plan}: {complaint}"));
        proxy.open();
        relay.wait_flushed(primary.flushed());
        relay.terminate();
    }
    proxy.assert_honest();
}

fn write_until_dead(primary: &Postgres, relay: &mut Relay) -> bool {
    for _ in 0..12 {
        write_wal(primary, MB);
        let upto = primary.flushed();
        wait_until("the relay to have it or to die", || !relay.is_running() || relay.flushed() >= upto);
        if !relay.is_running() {
            return true;
        }
    }
    false
}

#[test]
fn sectors_torn_behind_the_last_sync_lose_nothing_that_was_acknowledged() {
    let Some(installation) = Installation::any() else { return };
    let faults = Faults::new();
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = Relay::new("relay", proxy.port).with_faults(&faults);
    relay.start();
    let standby = primary.standby("standby", relay.port, "");
    let mut chance = Chance::seeded();
    for round in 1..=8 {
        write_wal(&primary, MB / 2);
        primary.wait_reported_flush("relay", primary.flushed());
        // From here on nothing is durable: written, and the power goes before the disk has it.
        faults.set("sync_hangs", 0);
        let acknowledged = proxy.passed(|passed| passed.flush_max);
        write_wal(&primary, MB / 4);
        let upto = primary.flushed();
        wait_until("it to be written", || relay.position("/store/written") >= upto);
        relay.kill();
        proxy.close();
        let acknowledged = proxy.passed(|passed| passed.flush_max).max(acknowledged);
        assert!(acknowledged < upto, "round {round}: nothing is left to tear");
        let torn = tear_sectors(&relay, acknowledged, &mut chance);
        assert!(torn > 50, "round {round}: {torn} sectors");
        faults.clear("sync_hangs");
        relay.launch();
        check_held(&mut relay, &primary.wal_dir(), MB, acknowledged)
            .unwrap_or_else(|complaint| panic!("round {round}: {complaint}"));
        assert!(relay.flushed() < upto, "round {round}: what is torn is taken for WAL");
        proxy.open();
        relay.wait_flushed(upto);
    }
    assert_same_wal(&relay.wal_dir(), &primary, primary.flushed());
    assert_equal_clusters(&primary, &standby);
    proxy.assert_honest();
}

/// Of the sectors behind `durable` each is as it was written, empty as before, or neither; how many were torn.
fn tear_sectors(relay: &Relay, durable: u64, chance: &mut Chance) -> usize {
    const SECTOR_BYTES: usize = 512;
    let mut torn = 0;
    for (start, path) in wal_files(&relay.wal_dir(), MB, 1) {
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, sector) in (start..).step_by(SECTOR_BYTES).zip(bytes.chunks_mut(SECTOR_BYTES)) {
            let is_empty = sector.iter().all(|byte| *byte == 0);
            if at < durable || is_empty {
                continue;
            }
            match chance.between(0, 4) {
                0 => sector.fill(0),
                1 => sector.fill(0xA5),
                _ => continue,
            }
            torn += 1;
        }
        std::fs::write(&path, bytes).unwrap();
    }
    torn
}

#[test]
fn a_partial_file_beside_its_complete_segment_is_harmless() {
    damaged_while_down(|files| {
        let complete = files.iter().find(|path| path.extension().is_none()).expect("a complete segment");
        let stale = complete.with_extension("partial");
        std::fs::write(&stale, &std::fs::read(complete).unwrap()[..8192 * 5]).unwrap();
        Damage::Nothing
    });
}

#[test]
fn a_partial_file_of_odd_size_heals() {
    damaged_while_down(|files| {
        let newest = files.last().unwrap();
        std::fs::OpenOptions::new().write(true).open(newest).unwrap().set_len(335_872 + 77).unwrap();
        Damage::Tail
    });
}

#[test]
fn an_empty_partial_file_heals() {
    damaged_while_down(|files| {
        std::fs::write(files.last().unwrap(), "").unwrap();
        Damage::Tail
    });
}

#[test]
fn garbage_and_old_records_after_the_end_are_cut_off() {
    damaged_while_down(|files| {
        let newest = files.last().unwrap();
        let older = std::fs::read(&files[files.len() - 2]).unwrap();
        let mut bytes = std::fs::read(newest).unwrap();
        bytes.resize(MB as usize, 0);
        // Whatever follows the last record becomes the valid-looking content of another segment.
        let end = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0) + 64;
        let from = end.next_multiple_of(8192).min(bytes.len());
        bytes[from..].copy_from_slice(&older[from..]);
        std::fs::write(newest, bytes).unwrap();
        Damage::Nothing
    });
}

#[test]
fn leftovers_of_a_segment_being_made_are_not_wal() {
    damaged_while_down(|files| {
        let folder = files[0].parent().unwrap();
        std::fs::write(folder.join("000000010000000000000FFF.tmp"), vec![7; 100_000]).unwrap();
        std::fs::write(folder.join("not-wal"), "text").unwrap();
        Damage::Nothing
    });
}

/// Whether a test took acknowledged WAL away itself.
enum Damage {
    Nothing,
    Tail,
}

/// Kills the relay, lets `damage` change its files (by age), and checks that it comes back and heals.
fn damaged_while_down(damage: impl FnOnce(&[PathBuf]) -> Damage) {
    let Some(installation) = Installation::any() else { return };
    let (primary, proxy, mut relay) = small_chain(&installation);
    let standby = primary.standby("standby", relay.port, "");
    write_wal(&primary, 3 * MB + MB / 2);
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    relay.kill();
    proxy.close();
    let files: Vec<PathBuf> = wal_files(&relay.wal_dir(), MB, 1).into_values().collect();
    let damaged = damage(&files);
    relay.launch();
    if matches!(damaged, Damage::Nothing) {
        check_held(&mut relay, &primary.wal_dir(), MB, upto)
            .unwrap_or_else(|complaint| panic!("{complaint}"));
    }
    proxy.open();
    write_wal(&primary, MB);
    relay.wait_ready();
    relay.wait_flushed(primary.flushed());
    assert_same_wal(&relay.wal_dir(), &primary, primary.flushed());
    assert_equal_clusters(&primary, &standby);
}

#[test]
fn what_was_confirmed_to_a_client_survives_the_loss_of_the_primary() {
    let Some(installation) = Installation::any() else { return };
    let mut primary =
        Settings::new().segment_size_mb(1).line("synchronous_standby_names = 'relay'").start(&installation);
    let mut relay = Relay::streaming_from("relay", primary.port);
    primary.wait_for_sql("select sync_state from pg_stat_replication", "sync");
    let mut standby = primary.standby("heir", relay.port, "");
    standby.stop(crate::support::postgres::Stop::Fast);
    let load = Load::start(&primary, Duration::ZERO);
    wait_until("some commits", || load.committed() > 50);
    primary.stop(crate::support::postgres::Stop::Kill);
    let confirmed = load.committed();
    relay.kill();
    relay.launch();
    relay.wait_serving();
    standby.start();
    standby.wait_replayed(relay.flushed());
    drop(load);
    standby.promote();
    assert_has_confirmed(&standby, confirmed);
}

/// A primary with segments of 1 MB, a proxy, and a relay that streams through it.
fn small_chain(installation: &Installation) -> (Postgres, Proxy, Relay) {
    let primary = Settings::new().segment_size_mb(1).start(installation);
    let proxy = Proxy::to(primary.port);
    let relay = Relay::streaming_from("relay", proxy.port);
    (primary, proxy, relay)
}
