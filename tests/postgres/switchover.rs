//! Planned switchovers through the relay: the old primary stops at once, the heir behind the relay gets all that it wrote, and
//! nobody needs pg_rewind.

use std::time::{Duration, Instant};

use crate::support::MB;
use crate::support::compare::assert_equal_clusters;
use crate::support::faults::{Faults, SmallDisk};
use crate::support::lab::{Installation, chosen_majors, may_mount};
use crate::support::load::{Load, assert_has_confirmed, emit_wal, write_wal};
use crate::support::lsn;
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::process::Program;
use crate::support::proxy::Proxy;
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::timelines::{assert_same_timeline, conninfo, dead_branches, fork_of, primary, wait_timeline};

/// A planned switchover stops the old primary in less than this.
const STOP_MAX: Duration = Duration::from_secs(3);

/// The relay follows the heir, once that is promoted and nothing keeps it from that, in less than this.
const FOLLOW_MAX: Duration = Duration::from_secs(3);

#[test]
fn a_drill_from_the_primary_to_a_standby_behind_the_relay_and_back_into_the_fleet() {
    on_every_major(|installation| drill(&installation, None));
}

#[test]
fn the_same_drill_where_commits_wait_for_a_far_relay() {
    on_every_major(|installation| drill(&installation, Some("ANY 1 (far)")));
}

/// What a shutdown writes and waits for differs from major to major. One that cannot say where its checkpoint is stays out.
fn on_every_major(test: impl Fn(Installation)) {
    let installed = chosen_majors().into_iter().filter_map(Installation::of);
    installed.filter(|installation| installation.has("pg_controldata")).for_each(test);
}

/// The heir is behind the relay, or behind the far one where commits wait for that.
fn drill(installation: &Installation, acknowledge: Option<&str>) {
    let mut old =
        Settings::new().segment_size_mb(1).line("synchronous_standby_names = 'relay'").start(installation);
    let mut relay = Relay::new("relay", old.port);
    let mut far = acknowledge.map(|_| Relay::new("far", relay.port));
    let heir = old.standby("heir", far.as_ref().map_or(relay.port, |far| far.port), "");
    relay.set("upstream.conninfo", &conninfo(&[&old, &heir]));
    if let Some(policy) = acknowledge {
        relay.set("upstream.acknowledge", &format!("{policy:?}"));
    }
    relay.start();
    far.iter_mut().for_each(Relay::start);
    wait_sync(&old);
    let load = Load::start(&old, Duration::ZERO);
    wait_until("some commits", || load.committed() > 100);
    let took = old.stop(Stop::Fast);
    let confirmed = load.committed();
    drop(load);
    assert!(took < STOP_MAX, "the old primary's fast stop took {took:?}");
    // The end of its WAL is at the relay, and gets to the heir although its primary is gone.
    let checkpoint = shutdown_checkpoint(&old);
    wait_until("the relay to have the shutdown checkpoint", || relay.flushed() > checkpoint);
    let end = relay.flushed();
    heir.wait_replayed(end);
    heir.promote();
    assert_eq!(fork_of(&heir, 2), end);
    follows_in_time(&relay);
    wait_sync(&heir);
    heir.sql("insert into load_rows (filling) values ('after')");
    assert_has_confirmed(&heir, confirmed);
    old.make_standby_of(relay.port, "old");
    old.start();
    write_wal(&heir, MB);
    assert_equal_clusters(&heir, &old);
    relay.wait_downstream("old", "streaming");
    assert!(!old.log().contains("forked off"), "the old primary has WAL that the new one lacks");
    for relay in std::iter::once(&relay).chain(&far) {
        relay.wait_flushed(heir.flushed());
        assert!(dead_branches(relay).is_empty() && !relay.needs_attention(), "{}", relay.status());
    }
}

/// Waits until commits wait for the relay.
fn wait_sync(server: &Postgres) {
    server
        .wait_for_sql("select sync_state from pg_stat_replication where application_name = 'relay'", "sync");
}

/// Where the last record of a server that was shut down begins.
fn shutdown_checkpoint(server: &Postgres) -> u64 {
    let program = Program::new(server.installation.program("pg_controldata"));
    let told = program.arg(server.data().to_str().unwrap()).for_server_user().run();
    let value = |key: &str| told.lines().find_map(|line| Some(line.strip_prefix(key)?.trim().to_owned()));
    assert_eq!(value("Database cluster state:").as_deref(), Some("shut down"));
    lsn(&value("Latest checkpoint location:").unwrap())
}

/// The relay is on the heir's timeline soon.
fn follows_in_time(relay: &Relay) {
    let started = Instant::now();
    wait_timeline(relay, 2);
    let took = started.elapsed();
    assert!(took < FOLLOW_MAX, "the relay followed after {took:?}");
}

/// What is wrong with a relay during a switchover. Heals when it is told to.
enum Trouble {
    /// Its disk takes no sync, or no write.
    Hanging(&'static str, Faults),
    Full(SmallDisk),
    Fenced,
    /// Commits wait for members that are dead.
    Deserted,
}

impl Trouble {
    fn prepare(&self, relay: Relay) -> Relay {
        match self {
            Self::Hanging(_, faults) => relay.with_faults(faults),
            Self::Full(disk) => relay
                .with_data_dir(&disk.path().join("relay"))
                .with("store.wal_keep_size", "\"4MB\"")
                .with("store.tail_size", "\"1MB\"")
                .with("store.unwritten_size", "\"1MB\""),
            Self::Fenced => relay.with_token(),
            Self::Deserted => relay.with("upstream.acknowledge", "\"ANY 1 (a, b)\""),
        }
    }

    /// From now on it is there, while the primary writes.
    fn begin(&self, old: &Postgres, relay: &Relay) {
        match self {
            Self::Hanging(fault, faults) => faults.set(fault, 0),
            Self::Full(disk) => drop(disk.fill()),
            Self::Fenced => drop(relay.fence()),
            Self::Deserted => {}
        }
        emit_wal(old, 12 * MB);
        match self {
            Self::Full(_) => wait_until("the store to notice", || relay.condition() != "healthy"),
            Self::Deserted => relay.wait_flushed(old.flushed()),
            Self::Hanging(..) | Self::Fenced => assert!(relay.flushed() < old.flushed()),
        }
    }

    fn end(&self, relay: &Relay) {
        match self {
            Self::Hanging(fault, faults) => faults.clear(fault),
            Self::Full(disk) => std::fs::remove_file(disk.path().join("filler")).unwrap(),
            Self::Fenced => relay.unfence(),
            Self::Deserted => {}
        }
    }
}

#[test]
fn a_relay_whose_disk_hangs_holds_no_switchover_up_and_follows_when_that_is_over() {
    on_every_major(|installation| {
        for fault in ["sync_hangs", "write_hangs"] {
            troubled(&installation, &Trouble::Hanging(fault, Faults::new()));
        }
    });
}

#[test]
fn a_relay_whose_disk_is_full_holds_no_switchover_up_and_follows_when_there_is_room() {
    if !may_mount() {
        return;
    }
    on_every_major(|installation| troubled(&installation, &Trouble::Full(SmallDisk::of_megabytes(48))));
}

#[test]
fn a_relay_that_is_fenced_holds_no_switchover_up_and_follows_when_it_is_not() {
    on_every_major(|installation| troubled(&installation, &Trouble::Fenced));
}

#[test]
fn dead_members_for_whom_commits_wait_hold_no_switchover_up() {
    on_every_major(|installation| troubled(&installation, &Trouble::Deserted));
}

/// A switchover to a standby beside the relay, which cannot take part; commits wait for it.
fn troubled(installation: &Installation, trouble: &Trouble) {
    let mut old =
        Settings::new().segment_size_mb(1).line("synchronous_standby_names = 'relay'").start(installation);
    let heir = old.standby("heir", old.port, "synchronous_standby_names = ''");
    let mut relay = trouble.prepare(Relay::new("relay", old.port));
    relay.set("upstream.conninfo", &conninfo(&[&old, &heir]));
    relay.start();
    relay.wait_flushed(old.flushed());
    trouble.begin(&old, &relay);
    let load = Load::start_waiting(&old);
    hold("no commit is confirmed", Duration::from_millis(500), || load.committed() == 0);
    let took = old.stop(Stop::Fast);
    drop(load);
    assert!(took < STOP_MAX, "the old primary's fast stop took {took:?}");
    let checkpoint = shutdown_checkpoint(&old);
    wait_until("the heir to have the shutdown checkpoint", || heir.replayed() > checkpoint);
    let end = heir.replayed();
    heir.promote();
    assert_eq!(fork_of(&heir, 2), end);
    trouble.end(&relay);
    follows_in_time(&relay);
    heir.sql("create table after_it (id int)");
    old.make_standby_of(relay.port, "old");
    old.start();
    write_wal(&heir, MB);
    assert_equal_clusters(&heir, &old);
    relay.wait_downstream("old", "streaming");
    assert!(!old.log().contains("forked off"), "the old primary has WAL that the new one lacks");
    assert!(dead_branches(&relay).is_empty() && !relay.needs_attention(), "{}", relay.status());
    assert_same_timeline(&relay.wal_dir(), &heir, 2, heir.flushed());
}

#[test]
fn an_address_that_moves_to_another_server_is_followed_where_that_may_be_followed() {
    let Some(installation) = Installation::in_turn(2) else { return };
    let mut old = primary(&installation);
    let new = old.standby("next", old.port, "");
    let stale = old.standby("stale", old.port, "");
    let address = Proxy::to(old.port);
    let mut relay = Relay::new("relay", address.port).with_standby_at(address.port);
    relay.start();
    write_wal(&old, MB);
    let upto = old.flushed();
    relay.wait_flushed(upto);
    new.wait_replayed(upto);
    stale.wait_replayed(upto);
    // A failover: the address goes from one server to the next, and cuts what went through it.
    old.stop(Stop::Kill);
    new.promote();
    address.lead_to(new.port);
    wait_timeline(&relay, 2);
    write_wal(&new, 2 * MB);
    relay.wait_flushed(new.flushed());
    assert_same_timeline(&relay.wal_dir(), &new, 2, new.flushed());
    assert_eq!(
        new.sql("select count(*) from pg_replication_slots where slot_name = 'relay' and active"),
        "1"
    );
    // To one that has not seen the promotion: nothing of it is taken.
    let held = relay.flushed();
    address.lead_to(stale.port);
    relay.wait_logged("highest timeline 1 of the upstream is behind timeline 2 of this relay");
    relay.wait_needs_attention();
    assert_eq!(relay.flushed(), held);
    // And back.
    write_wal(&new, MB);
    address.lead_to(new.port);
    relay.wait_flushed(new.flushed());
    assert_same_timeline(&relay.wal_dir(), &new, 2, new.flushed());
    wait_until("nobody to be needed any more", || !relay.needs_attention());
    assert!(dead_branches(&relay).is_empty());
}

#[test]
fn a_primary_that_lives_is_not_left_for_one_that_was_promoted_beside_it() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let mut old = primary(&installation);
    let new = old.standby("next", old.port, "");
    let mut relay = Relay::new("relay", old.port);
    relay.set("upstream.conninfo", &conninfo(&[&new, &old]));
    relay.start();
    write_wal(&old, MB);
    relay.wait_flushed(old.flushed());
    new.wait_replayed(old.flushed());
    // Both take writes from here on; the relay is told by nobody that the one it streams from is not to.
    new.promote();
    for _ in 0..3 {
        write_wal(&new, MB);
        write_wal(&old, MB);
        relay.wait_flushed(old.flushed());
    }
    let status = relay.status();
    assert_eq!((&status["store"]["timeline"], &status["upstream"]["sessions"]), (&1.into(), &1.into()));
    assert_same_timeline(&relay.wal_dir(), &old, 1, old.flushed());
    // With it gone the other is followed, and what only the relay has is told.
    let (end, fork) = (old.flushed(), fork_of(&new, 2));
    old.stop(Stop::Kill);
    wait_timeline(&relay, 2);
    write_wal(&new, MB);
    relay.wait_flushed(new.flushed());
    assert_same_timeline(&relay.wal_dir(), &new, 2, new.flushed());
    let branches = dead_branches(&relay);
    assert_eq!(branches.len(), 1, "{branches:?}");
    assert_eq!(lsn(branches[0]["fork"].as_str().unwrap()), fork);
    assert!(lsn(branches[0]["end"].as_str().unwrap()) >= end, "{branches:?}");
    assert!(relay.needs_attention());
}
