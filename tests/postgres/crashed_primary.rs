//! A primary that crashed, lost WAL, or was promoted before: what it writes then is taken as it is, or refused, and told.

use std::time::Duration;

use crate::support::compare::{
    assert_equal_clusters, assert_same_wal, same_wal, table_checksums, wal_files, waldump,
};
use crate::support::faults::Faults;
use crate::support::lab::{Installation, chosen_majors};
use crate::support::load::{Load, write_wal};
use crate::support::postgres::{Postgres, Settings, Stop, copy_folder};
use crate::support::proxy::{Proxy, Verdict, wal_in};
use crate::support::raw::RawClient;
use crate::support::receivewal::PgReceivewal;
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::support::{MB, lsn, lsn_text};

fn chain() -> Option<(Postgres, Proxy, Relay)> {
    Some(chain_on(&Installation::any()?))
}

fn chain_on(installation: &Installation) -> (Postgres, Proxy, Relay) {
    let primary = Settings::new().segment_size_mb(1).start(installation);
    let proxy = Proxy::to(primary.port);
    let relay = Relay::streaming_from("relay", proxy.port);
    (primary, proxy, relay)
}

/// What a crashed primary does with a record that was cut off differs from major to major.
fn on_every_major(test: impl Fn(Installation)) {
    chosen_majors().into_iter().filter_map(Installation::of).for_each(test);
}

#[test]
fn a_crash_of_the_primary_under_load_changes_no_byte_that_is_held() {
    on_every_major(|installation| {
        let (mut primary, proxy, relay) = chain_on(&installation);
        let standby = primary.standby("standby", relay.port, "");
        for _ in 0..2 {
            let load = Load::start(&primary, Duration::ZERO);
            wait_until("some load", || load.committed() > 50);
            primary.stop(Stop::Kill);
            drop(load);
            primary.start();
        }
        assert_equal_clusters(&primary, &standby);
        relay.wait_flushed(primary.flushed());
        assert_same_wal(&relay.wal_dir(), &primary, primary.flushed());
        proxy.assert_honest();
    });
}

#[test]
fn a_record_that_a_crash_cut_off_is_followed_by_its_overwritten_continuation() {
    on_every_major(|installation| {
        let (mut primary, proxy, mut relay) = chain_on(&installation);
        let standby = primary.standby("standby", relay.port, "");
        write_wal(&primary, MB);
        standby.wait_replayed(primary.flushed());
        proxy.close(); // the relay must not have what the primary is about to lose
        cut_off_a_record(&mut primary);
        proxy.open();
        write_wal(&primary, 2 * MB);
        relay.assert_running();
        relay.wait_flushed(primary.flushed());
        assert_same_wal(&relay.wal_dir(), &primary, primary.flushed());
        assert_equal_clusters(&primary, &standby);
    });
}

/// As PostgreSQL's own test does: a record into the next segment, a crash, and that segment is gone.
fn cut_off_a_record(primary: &mut Postgres) {
    primary.checkpoint();
    let begin = primary.insert_position();
    primary.sql("select pg_logical_emit_message(false, 'cut off', repeat('x', 3 * 1024 * 1024))");
    primary.sql("create table flushes_it (id int)");
    primary.stop(Stop::Kill);
    let next = begin.next_multiple_of(MB);
    for (start, path) in wal_files(&primary.wal_dir(), MB, 1) {
        if start >= next {
            std::fs::remove_file(path).unwrap();
        }
    }
    primary.start();
    if primary.installation.has("pg_waldump") {
        primary.sql("create table after_it (id int)");
        let records = waldump(primary, &primary.wal_dir(), next, primary.flushed());
        assert!(records.contains("OVERWRITE_CONTRECORD"), "the record was not cut off");
    }
}

#[test]
fn the_way_to_cut_off_a_record_works() {
    let Some(installation) = Installation::any() else { return };
    let mut primary = Settings::new().segment_size_mb(1).start(&installation);
    cut_off_a_record(&mut primary);
}

#[test]
fn a_primary_that_lost_segments_the_relay_holds_is_not_followed_and_nothing_is_overwritten() {
    other_history(2 * MB);
}

#[test]
fn a_primary_that_lost_a_little_wal_the_relay_holds_is_known_to_have_other_wal() {
    other_history(100_000);
}

const DIFFERS: &str = "differs from what is held";

/// A primary comes back as it was before it sent so much WAL, and writes other WAL on the same timeline.
fn other_history(lost_bytes: u64) {
    let Some((mut primary, proxy, mut relay)) = chain() else { return };
    write_wal(&primary, MB);
    primary.sql("select pg_switch_wal()");
    primary.checkpoint();
    // The cluster as it is now comes back later, on the same timeline.
    primary.stop(Stop::Fast);
    let old = primary.data().with_extension("old");
    copy_folder(&primary.data(), &old);
    primary.start();
    write_wal(&primary, lost_bytes);
    relay.wait_flushed(primary.flushed());
    primary.stop(Stop::Fast);
    wait_until("the relay to have the shutdown too", || proxy.connections() > 1);
    let held = relay.flushed();
    let lost = primary.data().with_extension("lost");
    std::fs::rename(primary.data(), &lost).unwrap();
    std::fs::rename(&old, primary.data()).unwrap();
    let streams = proxy.passed(|passed| passed.starts.len());
    primary.start();
    hold("not rewound", Duration::from_secs(2), || relay.flushed() == held);
    primary.sql("create table other_history (id int)");
    write_wal(&primary, 4 * MB);
    assert!(primary.flushed() > held);
    relay.wait_logged(&format!("{DIFFERS} (up to {})", lsn_text(held)));
    wait_until("the relay to ask for a person", || relay.status()["upstream"]["needs_attention"] == true);
    hold("not mixed with other bytes", Duration::from_secs(3), || relay.flushed() == held);
    let vouched_for = proxy.passed(|passed| passed.flush_max_of[streams..].to_vec());
    assert!(!vouched_for.is_empty(), "it was never streamed from");
    assert!(vouched_for.iter().all(|flush| *flush == 0), "acknowledged another history: {vouched_for:X?}");
    same_wal(&relay.wal_dir(), &lost.join("pg_wal"), MB, held)
        .unwrap_or_else(|complaint| panic!("{complaint}"));
    relay.assert_running();
}

#[test]
fn what_a_primary_lost_in_a_power_cut_is_told_from_its_first_byte_to_its_last() {
    let Some(installation) = Installation::in_turn(2) else { return };
    // Within a segment, and over several.
    for lost_bytes in [100_000, 5 * MB] {
        let (mut primary, proxy, relay) = chain_on(&installation);
        write_wal(&primary, MB);
        primary.checkpoint();
        let kept = primary.flushed();
        write_wal(&primary, lost_bytes);
        let end = primary.flushed();
        relay.wait_flushed(end);
        primary.stop(Stop::Kill);
        lose_wal(&primary, kept);
        let streams = proxy.passed(|passed| passed.starts.len());
        primary.start();
        relay.wait_needs_attention();
        let told = || relay.status()["upstream"]["last_error"].as_str().unwrap_or_default().to_owned();
        assert!(told().contains("is behind") && told().contains(&lsn_text(relay.flushed())), "{}", told());
        write_wal(&primary, lost_bytes + 2 * MB);
        wait_until("the relay to tell", || told().contains(DIFFERS));
        let words = told();
        let from = words.split_once("WAL at ").unwrap().1.split_once(' ').unwrap().0;
        assert!((kept..kept + 24).contains(&lsn(from)), "{words}: lost from {}", lsn_text(kept));
        assert!(words.contains(&format!("(up to {})", lsn_text(relay.flushed()))), "{words}");
        assert!(relay.flushed() >= end && relay.needs_attention());
        let vouched_for = proxy.passed(|passed| passed.flush_max_of[streams..].to_vec());
        assert!(vouched_for.iter().all(|flush| *flush == 0), "acknowledged other WAL: {vouched_for:X?}");
    }
}

/// What a power cut may leave of a primary that is down and does not sync: nothing of its WAL from there on.
fn lose_wal(primary: &Postgres, from: u64) {
    use std::os::unix::fs::FileExt;
    for (start, path) in wal_files(&primary.wal_dir(), MB, 1) {
        let keep = from.saturating_sub(start).min(MB);
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.write_all_at(&vec![0; usize::try_from(MB - keep).unwrap()], keep).unwrap();
    }
}

#[test]
fn a_primary_that_lost_wal_and_is_idle_is_refused_with_both_positions_and_the_next_host_is_used() {
    on_every_major(|installation| {
        let mut primary = Settings::new().segment_size_mb(1).start(&installation);
        let (proxy, feed) = (Proxy::to(primary.port), Proxy::to(primary.port));
        let mut good = primary.standby("good", feed.port, "");
        let ports = format!("{},{}", proxy.port, good.port);
        let servers = format!("host=127.0.0.1,127.0.0.1 port={ports} target_session_attrs=any");
        let mut relay =
            Relay::new("relay", 1).with_conninfo(&format!("{servers} user=postgres sslmode=disable"));
        relay.start();
        primary.sql("checkpoint");
        primary.stop(Stop::Fast);
        let old = primary.data().with_extension("old");
        copy_folder(&primary.data(), &old);
        primary.start();
        // Less than a page.
        primary.sql("select pg_logical_emit_message(true, 'lost', repeat('x', 200))");
        let lost = primary.flushed();
        relay.wait_flushed(lost);
        good.wait_replayed(lost);
        primary.stop(Stop::Kill);
        feed.close();
        std::fs::rename(primary.data(), primary.data().with_extension("lost")).unwrap();
        std::fs::rename(&old, primary.data()).unwrap();
        let streams = proxy.passed(|passed| passed.starts.len());
        primary.start();
        relay.restart_after_kill();
        let host = || relay.status()["upstream"]["host"].as_str().unwrap_or_default().to_owned();
        wait_until("the good one to be used", || host().contains(&good.port.to_string()));
        let held = relay.flushed();
        assert!(held >= lost && primary.flushed() < held);
        good.stop(Stop::Fast);
        wait_until("the reason to be told", || {
            let words = format!(
                "the WAL flush position of the upstream {} is behind {}, the end of what this relay holds on timeline 1",
                lsn_text(primary.flushed()),
                lsn_text(held)
            );
            let told = relay.status()["upstream"]["last_error"].as_str().unwrap_or_default().to_owned();
            told.contains(&words) && relay.needs_attention()
        });
        assert_eq!(proxy.passed(|passed| passed.starts.len()), streams, "it was streamed from");
        assert_eq!(relay.flushed(), held);
    });
}

#[test]
fn a_relay_that_lost_what_it_had_not_written_is_waited_for_by_the_one_behind_it() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let (proxy, faults) = (Proxy::to(primary.port), Faults::new());
    let mut near = Relay::new("near", proxy.port).with_faults(&faults);
    near.start();
    let far = Relay::streaming_from("far", near.port);
    near.wait_flushed(primary.flushed());
    faults.set("write_hangs", 0);
    write_wal(&primary, MB / 2);
    let upto = primary.flushed();
    far.wait_flushed(upto);
    near.kill();
    faults.clear("write_hangs");
    // It streams again from a primary that takes writes, and gets nothing yet.
    proxy.edit(|message| if wal_in(message).is_some() { Verdict::Drop } else { Verdict::Forward });
    near.launch();
    wait_until("it to stream", || near.status()["upstream"]["is_writable"] == true);
    assert!(near.flushed() < upto);
    let told = || far.status()["upstream"]["last_error"].as_str().unwrap_or_default().to_owned();
    wait_until("the one behind to see that it is late", || told().contains("is behind"));
    hold("nobody is needed", Duration::from_secs(2), || !far.needs_attention());
    proxy.edit_nothing();
    proxy.cut();
    write_wal(&primary, MB);
    far.wait_flushed(primary.flushed());
    assert_same_wal(&far.wal_dir(), &primary, primary.flushed());
}

#[test]
fn killed_while_a_history_is_stored_it_takes_wal_only_once_it_has_it() {
    let Some(installation) = Installation::any() else { return };
    let first = Settings::new().segment_size_mb(1).start(&installation);
    let promoted = first.standby("promoted", first.port, "");
    promoted.promote();
    write_wal(&promoted, MB);
    for plan in [
        "create:2:after",
        "write:2:after",
        "sync:2:before",
        "rename:1:before",
        "rename:1:after",
        "sync:4:after",
    ] {
        let faults = Faults::kill_at(plan);
        let mut relay = Relay::new("relay", promoted.port).with_faults(&faults);
        let history = |relay: &Relay| relay.wal_dir().join("00000002.history");
        relay.launch();
        assert!(!relay.wait_for_end().success(), "{plan}: it never came there");
        let wal = wal_files(&relay.wal_dir(), MB, 2);
        assert!(wal.is_empty() || history(&relay).exists(), "{plan}: WAL of a timeline without its history");
        relay.environment.clear();
        relay.start();
        let told = |port| RawClient::replication(port).unwrap().rows("TIMELINE_HISTORY 2").unwrap();
        assert_eq!(told(relay.port), told(promoted.port), "{plan}");
        relay.wait_flushed(promoted.flushed());
        relay.terminate();
    }
}

#[test]
fn a_primary_on_a_later_timeline_is_relayed_with_its_history() {
    let Some(installation) = Installation::any() else { return };
    let first = Settings::new().segment_size_mb(1).start(&installation);
    let promoted = first.standby("promoted", first.port, "");
    write_wal(&first, MB);
    promoted.wait_replayed(first.flushed());
    promoted.promote();
    write_wal(&promoted, MB);
    let relay = Relay::streaming_from("relay", promoted.port);
    let standby = promoted.standby("standby", relay.port, "");
    let receiver = PgReceivewal::start(&installation, relay.port, &[]);
    write_wal(&promoted, 3 * MB);
    standby.wait_replayed(promoted.flushed());
    assert_eq!(table_checksums(&promoted), table_checksums(&standby));
    let history = |port| RawClient::replication(port).unwrap().rows("TIMELINE_HISTORY 2").unwrap();
    assert_eq!(history(relay.port), history(promoted.port));
    wait_until("pg_receivewal to have the history", || receiver.folder().join("00000002.history").exists());
    let mut restarted = relay;
    restarted.restart_after_kill();
    assert_eq!(history(restarted.port), history(promoted.port));
    write_wal(&promoted, MB);
    standby.wait_replayed(promoted.flushed());
}
