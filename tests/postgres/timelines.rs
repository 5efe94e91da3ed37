//! Promotions: followed wherever they happen, refused where they are foreign.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::support::MB;
use crate::support::compare::{assert_equal_clusters, primary_bytes_of, wal_files};
use crate::support::lab::Installation;
use crate::support::load::{Load, pgbench, pgbench_tables, write_wal};
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::raw::{Event, RawClient, columns_of, identify_system, rows_of, tags_of};
use crate::support::receivewal::PgReceivewal;
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::support::{lsn, lsn_text};

/// A primary with segments of 1 MB.
pub(crate) fn primary(installation: &Installation) -> Postgres {
    Settings::new().segment_size_mb(1).start(installation)
}

/// A connection string with these servers, of which the writable one is wanted.
pub(crate) fn conninfo(servers: &[&Postgres]) -> String {
    let ports: Vec<_> = servers.iter().map(|server| server.port.to_string()).collect();
    let hosts = vec!["127.0.0.1"; servers.len()].join(",");
    let ports = ports.join(",");
    format!("\"host={hosts} port={ports} user=postgres sslmode=disable target_session_attrs=read-write\"")
}

/// A relay that streams from whichever of these is writable.
pub(crate) fn relay_of(servers: &[&Postgres]) -> Relay {
    let mut relay = Relay::new("relay", servers[0].port);
    relay.set("upstream.conninfo", &conninfo(servers));
    relay
}

pub(crate) fn wait_timeline(relay: &Relay, timeline: u32) {
    wait_until("the relay to follow the timeline", || {
        relay.status()["store"]["timeline"].as_u64() == Some(u64::from(timeline))
    });
}

/// The primary dies, and a standby that was stopped before is promoted with what it has.
pub(crate) fn promote_behind(old: &mut Postgres, stopped: &mut Postgres, settings: &str) {
    old.stop(Stop::Kill);
    stopped.make_standby_of(old.port, "next");
    stopped.add_settings(settings);
    stopped.start();
    stopped.promote();
}

/// A server that was promoted is promoted once more; the one it was a standby of is gone.
pub(crate) fn promote_again(server: &mut Postgres, gone: &Postgres) {
    server.stop(Stop::Fast);
    server.make_standby_of(gone.port, "next");
    server.start();
    server.promote();
}

/// Where timeline `timeline` of this server began, by its history file.
pub(crate) fn fork_of(server: &Postgres, timeline: u32) -> u64 {
    let path = server.wal_dir().join(format!("{timeline:08X}.history"));
    let history = std::fs::read_to_string(path).unwrap();
    let line = history.lines().rfind(|line| !line.trim().is_empty()).unwrap();
    lsn(line.split('\t').nth(1).unwrap())
}

/// Everything that the folder holds of a timeline up to `upto` is what the server has.
pub(crate) fn assert_same_timeline(folder: &Path, server: &Postgres, timeline: u32, upto: u64) {
    let held = wal_files(folder, MB, timeline);
    let first = *held.keys().next().unwrap_or_else(|| panic!("nothing is held of timeline {timeline}"));
    let held = primary_bytes_of(folder, MB, timeline, first, upto);
    let original = primary_bytes_of(&server.wal_dir(), MB, timeline, first, upto);
    assert!(
        held == original,
        "timeline {timeline} differs between {} and {}",
        lsn_text(first),
        lsn_text(upto)
    );
}

pub(crate) fn dead_branches(relay: &Relay) -> Vec<Value> {
    relay.status()["store"]["dead_branches"].as_array().cloned().unwrap_or_default()
}

#[test]
fn a_switchover_under_load_is_followed_by_the_relay_and_all_behind_it() {
    for major in crate::support::lab::chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let mut old = primary(&installation);
        pgbench_tables(&old, 1);
        let new = old.standby("next", old.port, "");
        let mut relay = relay_of(&[&old, &new]);
        relay.start();
        let standby = old.standby("standby", relay.port, "");
        let far = Relay::streaming_from("far", relay.port);
        let receiver = PgReceivewal::start(&installation, relay.port, &["--synchronous"]);
        relay.wait_downstream("pg_receivewal", "streaming");
        let load = pgbench(&old, 2, 20);
        wait_until("some WAL", || old.flushed() > relay.oldest() + 4 * MB);
        assert!(old.stop(Stop::Fast) < Duration::from_secs(3));
        drop(load);
        new.promote();
        wait_timeline(&relay, 2);
        write_wal(&new, 3 * MB);
        let upto = new.flushed();
        relay.wait_flushed(upto);
        far.wait_flushed(upto);
        assert_equal_clusters(&new, &standby);
        let fork = fork_of(&new, 2);
        for folder in [relay.wal_dir(), far.wal_dir()] {
            assert_same_timeline(&folder, &new, 2, upto);
            assert_same_timeline(&folder, &old, 1, fork);
        }
        wait_until("pg_receivewal to follow", || {
            wal_files(receiver.folder(), MB, 2).keys().any(|start| start + 2 * MB > upto)
        });
        assert_same_timeline(receiver.folder(), &new, 2, upto / MB * MB);
        assert!(dead_branches(&relay).is_empty() && dead_branches(&far).is_empty());
        assert!(!relay.needs_attention() && !far.needs_attention());
        // The last segment of the old timeline stays as it was left.
        let name = format!("00000001{:08X}{:08X}.partial", fork >> 32, (fork & 0xFFFF_FFFF) / MB);
        assert!(fork.is_multiple_of(MB) || relay.wal_dir().join(&name).exists(), "{name} is missing");
    }
}

#[test]
fn a_promotion_is_followed_on_the_live_connection() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let old = primary(&installation);
    let middle = old.standby("middle", old.port, "");
    let mut relay = Relay::new("relay", middle.port).with_standby_at(middle.port);
    relay.start();
    let standby = old.standby("standby", relay.port, "");
    write_wal(&old, 2 * MB);
    relay.wait_flushed(old.flushed());
    let walsender = || middle.sql("select pid from pg_stat_replication where application_name = 'relay'");
    let before = walsender();
    let receiver = standby.sql("select pid from pg_stat_wal_receiver");
    middle.promote();
    wait_timeline(&relay, 2);
    write_wal(&middle, 2 * MB);
    relay.wait_flushed(middle.flushed());
    assert_eq!(walsender(), before, "the relay has connected again");
    assert_equal_clusters(&middle, &standby);
    // What clients are told of the server is what it said when we came.
    let version = |port| RawClient::replication(port).unwrap().parameters["server_version"].clone();
    assert_eq!(version(relay.port), version(middle.port));
    assert_eq!(
        standby.sql("select pid from pg_stat_wal_receiver"),
        receiver,
        "the standby has connected again"
    );
    assert_same_timeline(&relay.wal_dir(), &middle, 2, middle.flushed());
    relay.assert_running();
}

#[test]
fn promotions_that_were_missed_are_followed_one_after_the_other() {
    let Some(installation) = Installation::in_turn(2) else { return };
    let mut old = primary(&installation);
    let mut new = old.standby("next", old.port, "");
    let mut relay = relay_of(&[&old, &new]);
    relay.start();
    let standby = old.standby("standby", relay.port, "");
    write_wal(&old, 2 * MB);
    relay.wait_flushed(old.flushed());
    relay.terminate();
    // What the relay misses: the end of timeline 1, all of 2, the beginning of 3 and 4, both in one segment.
    write_wal(&old, 3 * MB / 2);
    old.stop(Stop::Fast);
    new.promote();
    write_wal(&new, 5 * MB / 2);
    for _ in 0..2 {
        promote_again(&mut new, &old);
    }
    assert_eq!(new.timeline(), 4);
    write_wal(&new, 3 * MB);
    relay.launch();
    wait_timeline(&relay, 4);
    let upto = new.flushed();
    relay.wait_flushed(upto);
    assert_equal_clusters(&new, &standby);
    // Of each later timeline the beginning is received and compared that is a copy of what was held before.
    let (mut begins, mut starts) = (
        [2, 3, 4].map(|timeline| fork_of(&new, timeline) / MB * MB).to_vec(),
        new.replication_starts("relay"),
    );
    begins.dedup();
    // The log repeats a command beside each of its other lines.
    starts.dedup();
    assert_eq!(starts[1..], begins);
    assert_same_timeline(&relay.wal_dir(), &new, 4, upto);
    assert_same_timeline(&relay.wal_dir(), &new, 2, fork_of(&new, 3));
    assert_same_timeline(&relay.wal_dir(), &old, 1, fork_of(&new, 2));
    assert!(dead_branches(&relay).is_empty());
    // All of it is there after a crash, and a client that comes from the first timeline gets it.
    relay.restart_after_kill();
    assert!(relay.flushed() >= upto);
    for timeline in [1, 2, 3] {
        let fork = fork_of(&new, timeline + 1);
        assert_eq!(end_of_timeline(relay.port, timeline, fork), end_of_timeline(new.port, timeline, fork));
    }
}

/// What a server says at the end of a stream of a timeline that was left at `fork`: rows, columns and tags.
pub(crate) fn end_of_timeline(port: u16, timeline: u32, fork: u64) -> EndOfTimeline {
    let mut client = RawClient::replication(port).unwrap();
    identify_system(&mut client);
    client.start_replication(None, fork / MB * MB, timeline).unwrap();
    client.read_wal(fork / MB * MB, fork);
    loop {
        match client.next_event(Duration::from_secs(20)) {
            Event::Keepalive { .. } => {}
            Event::Other(message) if message.kind == b'c' => break,
            other => panic!("{other:?}"),
        }
    }
    client.send(b'c', b"").unwrap();
    let said = client.until_ready().unwrap();
    (rows_of(&said), columns_of(&said), tags_of(&said))
}

pub(crate) type EndOfTimeline = (Vec<Vec<Option<String>>>, Vec<(String, u32)>, Vec<String>);

/// Waits until the relay is ahead of a standby that stands still, and the primary is dead.
pub(crate) struct Torn {
    pub(crate) old: Postgres,
    pub(crate) new: Postgres,
    pub(crate) relay: Relay,
    /// Committed where only the relay got it.
    pub(crate) rows: u64,
    pub(crate) first_lost: String,
    pub(crate) last_lost: String,
}

pub(crate) fn torn(installation: &Installation, settings: &[(&str, &str)]) -> Torn {
    let old = Settings::new().segment_size_mb(1).line("wal_log_hints = on").start(installation);
    let mut new = old.standby("next", old.port, "");
    let mut relay = relay_of(&[&old, &new]);
    for (key, value) in settings {
        relay.set(key, value);
    }
    relay.start();
    old.sql("create table kept (id int); insert into kept values (1)");
    new.wait_replayed(old.flushed());
    relay.wait_flushed(old.flushed());
    new.stop(Stop::Fast);
    let commit = |id: u64| {
        let mut client = RawClient::sql(old.port).unwrap();
        client.rows("begin").unwrap();
        let xid = client.rows(&format!("insert into kept values ({id}) returning txid_current()")).unwrap();
        client.rows("commit").unwrap();
        xid[0][0].clone().unwrap()
    };
    let first_lost = commit(2);
    write_wal(&old, 3 * MB);
    let last_lost = commit(3);
    relay.wait_flushed(old.flushed());
    Torn { old, new, relay, rows: 2, first_lost, last_lost }
}

#[test]
fn a_standby_is_streamed_from_only_where_that_is_said() {
    for major in crate::support::lab::chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = primary(&installation);
        let standby = primary.standby("standby", primary.port, "");
        standby.wait_replayed(primary.flushed());
        let server = format!("host=127.0.0.1 port={} user=postgres sslmode=disable", standby.port);
        let mut relay = Relay::new("relay", 1).with_conninfo(&server);
        relay.launch();
        relay.wait_logged("server is in hot standby mode: set target_session_attrs=any");
        hold("nothing is taken from it", Duration::from_secs(1), || {
            relay.status()["upstream"]["sessions"] == 0 && relay.position("/store/verified") == 0
        });
        assert_eq!(standby.sql("select count(*) from pg_replication_slots"), "0");
        // The next host is tried.
        relay.terminate();
        let servers = format!("host=127.0.0.1,127.0.0.1 port={},{}", standby.port, primary.port);
        let mut relay = relay.with_conninfo(&format!("{servers} user=postgres sslmode=disable"));
        relay.start();
        write_wal(&primary, MB);
        primary.wait_reported_flush("relay", primary.flushed());
        // What is said holds, and where the stream comes from is shown.
        relay.terminate();
        let mut relay = relay.with_standby_at(standby.port);
        relay.start();
        write_wal(&primary, MB);
        relay.wait_flushed(primary.flushed());
        assert_eq!(relay.status()["upstream"]["is_writable"], false);
    }
}

#[test]
fn a_server_that_is_found_wanting_later_is_tried_after_the_others() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let mut old = primary(&installation);
    let behind = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = relay_of(&[&old]);
    relay.start();
    write_wal(&old, 6 * MB);
    relay.wait_flushed(old.flushed());
    relay.terminate();
    // The first host is of the same template: the same system identifier and timeline, and less WAL.
    relay.set("upstream.conninfo", &conninfo(&[&behind, &old]));
    relay.launch();
    write_wal(&old, MB);
    relay.wait_flushed(old.flushed());
    // Now it has other WAL, and as much: that shows only when it streams.
    relay.terminate();
    write_wal(&behind, 9 * MB);
    assert!(behind.flushed() > old.flushed());
    relay.launch();
    write_wal(&old, MB);
    relay.wait_flushed(old.flushed());
    relay.assert_running();
    old.stop(Stop::Fast);
}

#[test]
fn a_stale_or_foreign_server_is_refused_with_the_reason_and_the_next_host_is_tried() {
    let Some(installation) = Installation::any() else { return };
    let old = primary(&installation);
    let foreign = Settings::new().segment_size_mb(1).fresh_identity().start(&installation);
    let new = old.standby("next", old.port, "");
    write_wal(&old, MB);
    new.wait_replayed(old.flushed());
    // Both go on: one of two primaries is one too many.
    new.promote();
    let mut relay = relay_of(&[&new]);
    relay.start();
    write_wal(&new, MB);
    relay.wait_flushed(new.flushed());
    relay.terminate();
    relay.set("upstream.conninfo", &conninfo(&[&old, &foreign]));
    relay.launch();
    relay.wait_needs_attention();
    relay.wait_logged("highest timeline 1 of the upstream is behind timeline 2 of this relay");
    relay.wait_logged("upstream has system identifier");
    let held = relay.flushed();
    assert!(relay.wal_dir().exists() && held > 0);
    relay.terminate();
    relay.set("upstream.conninfo", &conninfo(&[&foreign, &old, &new]));
    relay.start();
    write_wal(&new, MB);
    relay.wait_flushed(new.flushed());
    assert_same_timeline(&relay.wal_dir(), &new, 2, new.flushed());
    assert_eq!(relay.status()["upstream"]["needs_attention"], false);
}

#[test]
fn two_promotions_that_did_not_know_of_each_other_are_told_apart() {
    let Some(installation) = Installation::any() else { return };
    let old = primary(&installation);
    let (left, right) = (old.standby("left", old.port, ""), old.standby("right", old.port, ""));
    write_wal(&old, MB);
    left.wait_replayed(old.flushed());
    left.promote();
    write_wal(&old, MB);
    right.wait_replayed(old.flushed());
    right.promote();
    assert_eq!((left.timeline(), right.timeline()), (2, 2));
    let mut relay = relay_of(&[&left]);
    relay.start();
    write_wal(&left, MB);
    relay.wait_flushed(left.flushed());
    relay.terminate();
    let held = std::fs::read(relay.wal_dir().join("00000002.history")).unwrap();
    relay.set("upstream.conninfo", &conninfo(&[&right]));
    relay.launch();
    relay.wait_needs_attention();
    relay.wait_logged("history file of timeline 2 differs");
    assert_eq!(std::fs::read(relay.wal_dir().join("00000002.history")).unwrap(), held);
    // Nor is a child of the other one followed.
    relay.terminate();
    let mut right = right;
    promote_again(&mut right, &old);
    assert_eq!(right.timeline(), 3);
    relay.launch();
    relay.wait_logged("timeline 2 of the upstream has another history than timeline 2 of this relay");
    assert_same_timeline(&relay.wal_dir(), &left, 2, left.flushed());
}

#[test]
fn a_history_of_which_no_wal_came_gives_way_to_the_one_that_is_followed() {
    let Some(installation) = Installation::in_turn(2) else { return };
    let mut old = primary(&installation);
    let mut new = old.standby("next", old.port, "");
    let mut relay = relay_of(&[&old, &new]);
    relay.start();
    write_wal(&old, MB);
    relay.wait_flushed(old.flushed());
    relay.terminate();
    // As from servers that were promoted, told their history, and died.
    for timeline in [2, 3] {
        let path = relay.wal_dir().join(format!("{timeline:08X}.history"));
        std::fs::write(path, "1\t0/1000000\tno recovery target specified\n").unwrap();
    }
    old.stop(Stop::Fast);
    new.promote();
    write_wal(&new, MB);
    promote_again(&mut new, &old);
    write_wal(&new, MB);
    relay.start();
    wait_timeline(&relay, 3);
    relay.wait_flushed(new.flushed());
    for timeline in [2, 3] {
        let name = format!("{timeline:08X}.history");
        let content = |folder: &Path| std::fs::read_to_string(folder.join(&name)).unwrap();
        assert_eq!(content(&relay.wal_dir()), content(&new.wal_dir()));
    }
    assert_same_timeline(&relay.wal_dir(), &new, 3, new.flushed());
}

#[test]
fn commits_that_wait_for_the_relay_go_on_after_a_promotion() {
    let Some(installation) = Installation::any() else { return };
    let mut old =
        Settings::new().segment_size_mb(1).line("synchronous_standby_names = 'relay'").start(&installation);
    let mut relay = relay_of(&[&old]);
    relay.start();
    old.wait_for_sql("select sync_state from pg_stat_replication where application_name = 'relay'", "sync");
    let heir = old.standby("heir", relay.port, "");
    let load = Load::start(&old, Duration::ZERO);
    wait_until("some commits", || load.committed() > 50);
    old.stop(Stop::Kill);
    let confirmed = load.committed();
    drop(load);
    heir.wait_replayed(relay.flushed());
    heir.promote();
    crate::support::load::assert_has_confirmed(&heir, confirmed);
    // The relay, which fed it, now follows it.
    relay.terminate();
    relay.set("upstream.conninfo", &conninfo(&[&heir]));
    relay.start();
    wait_timeline(&relay, 2);
    heir.wait_for_sql("select sync_state from pg_stat_replication where application_name = 'relay'", "sync");
    heir.sql("insert into load_rows (filling) values ('after')");
    assert!(dead_branches(&relay).is_empty(), "{:?}", dead_branches(&relay));
}
