//! Primary, relay and standby restart in any order and any way; when nothing happens, nothing reconnects.

use std::time::Duration;

use crate::support::MB;
use crate::support::compare::{assert_equal_clusters, assert_same_wal, primary_bytes, wal_files};
use crate::support::lab::{Installation, skip};
use crate::support::load::{emit_wal, write_wal};
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::process::Program;
use crate::support::proxy::{Proxy, Verdict};
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};

struct Chain {
    primary: Postgres,
    proxy: Proxy,
    relay: Relay,
    standby: Postgres,
}

fn chain(settings: Settings, standby_settings: &str, prepare: impl FnOnce(&mut Relay)) -> Option<Chain> {
    let installation = Installation::any()?;
    let primary = settings.segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = Relay::new("relay", proxy.port);
    prepare(&mut relay);
    relay.start();
    let standby = primary.standby("standby", relay.port, standby_settings);
    relay.wait_downstream("standby", "streaming");
    Some(Chain { primary, proxy, relay, standby })
}

fn plain_chain() -> Option<Chain> {
    chain(Settings::new(), "", |_| {})
}

impl Chain {
    fn catches_up(&mut self) {
        write_wal(&self.primary, MB / 2);
        let upto = self.primary.flushed();
        self.standby.wait_replayed(upto);
        self.relay.wait_flushed(upto);
        self.primary.wait_reported_flush("relay", upto);
    }

    fn ends_equal(&self) {
        assert_equal_clusters(&self.primary, &self.standby);
        assert_same_wal(&self.relay.wal_dir(), &self.primary, self.primary.flushed());
        self.proxy.assert_honest();
    }
}

#[test]
fn each_restarts_in_any_order() {
    let Some(mut chain) = plain_chain() else { return };
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    for order in orders {
        for who in order {
            write_wal(&chain.primary, MB / 4);
            match who {
                0 => chain.primary.restart(Stop::Fast),
                1 => {
                    assert!(chain.relay.terminate().success(), "SIGTERM ends with success");
                    chain.relay.start();
                }
                _ => chain.standby.restart(Stop::Fast),
            }
        }
        chain.catches_up();
    }
    chain.ends_equal();
}

#[test]
fn each_crashes_in_any_order() {
    let Some(mut chain) = plain_chain() else { return };
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
        for who in order {
            write_wal(&chain.primary, MB / 4);
            match who {
                0 => chain.primary.restart(Stop::Kill),
                1 => chain.relay.restart_after_kill(),
                _ => chain.standby.restart(Stop::Kill),
            }
        }
        chain.catches_up();
    }
    chain.ends_equal();
}

#[test]
fn all_are_down_at_once_and_start_standby_first() {
    let Some(mut chain) = plain_chain() else { return };
    write_wal(&chain.primary, MB);
    chain.primary.stop(Stop::Fast);
    chain.relay.kill();
    chain.standby.stop(Stop::Fast);
    chain.standby.start();
    chain.relay.launch();
    chain.relay.wait_serving();
    chain.primary.start();
    chain.catches_up();
    chain.ends_equal();
}

#[test]
fn while_the_primary_is_away_the_relay_serves_what_it_holds() {
    let Some(mut chain) = plain_chain() else { return };
    chain.standby.stop(Stop::Fast);
    write_wal(&chain.primary, 3 * MB);
    let upto = chain.primary.flushed();
    chain.relay.wait_flushed(upto);
    chain.primary.stop(Stop::Immediate);
    chain.relay.restart_away_from_upstream();
    // Whoever asks whether to send standbys here is told yes: now more than ever.
    assert!(chain.relay.is_ready(), "not ready, though it serves");
    chain.standby.start();
    chain.standby.wait_replayed(upto);
    chain.primary.start();
    chain.catches_up();
    chain.ends_equal();
}

#[test]
fn idle_it_stays_connected_far_beyond_every_timeout() {
    // Ten times the timeouts of both sides: what minutes are to the defaults.
    let settings = Settings::new().line("wal_sender_timeout = 2s");
    let Some(chain) =
        chain(settings, "wal_receiver_timeout = 2s\nwal_receiver_status_interval = 1s", |relay| {
            relay.set("upstream.wal_receiver_timeout", "\"2s\"");
            relay.set("upstream.wal_receiver_status_interval", "\"1s\"");
            relay.set("downstream.wal_sender_timeout", "\"2s\"");
        })
    else {
        return;
    };
    let session = chain.relay.downstream("standby")[0]["pid"].clone();
    // Looks at the primary beside the stream are connections of their own.
    let sessions = || chain.relay.status()["upstream"]["sessions"].clone();
    let (connected, updates) = (sessions(), chain.proxy.passed(|passed| passed.status_updates));
    hold("connected", Duration::from_secs(20), || {
        sessions() == connected && chain.relay.downstream("standby").iter().any(|now| now["pid"] == session)
    });
    let told = chain.proxy.passed(|passed| passed.status_updates) - updates;
    assert!((10..=60).contains(&told), "{told} status updates in 20 s");
    let cpu = chain.relay.process().cpu_time();
    assert!(cpu < Duration::from_secs(3), "idle, and yet {cpu:?} of CPU");
    drop(chain.primary.sql("select 1"));
}

#[test]
fn a_slot_that_was_dropped_upstream_is_made_again_when_nothing_is_lost() {
    let Some(mut chain) = plain_chain() else { return };
    chain.proxy.close();
    chain.primary.wait_for_sql("select active from pg_replication_slots where slot_name = 'relay'", "f");
    chain.primary.sql("select pg_drop_replication_slot('relay')");
    write_wal(&chain.primary, MB);
    chain.proxy.open();
    chain.catches_up();
    assert_eq!(chain.primary.sql("select active from pg_replication_slots where slot_name = 'relay'"), "t");
    chain.ends_equal();
}

#[test]
fn wal_that_the_primary_has_removed_is_told_as_a_gap_and_not_papered_over() {
    let settings =
        Settings::new().line("wal_keep_size = 0").line("max_wal_size = 32MB").line("min_wal_size = 2MB");
    let Some(mut chain) = chain(settings, "", |_| {}) else { return };
    chain.proxy.close();
    chain.primary.wait_for_sql("select active from pg_replication_slots where slot_name = 'relay'", "f");
    chain.primary.sql("select pg_drop_replication_slot('relay')");
    let held = chain.relay.flushed();
    for _ in 0..4 {
        write_wal(&chain.primary, 3 * MB);
        chain.primary.switch_wal();
        chain.primary.checkpoint();
    }
    let starts = chain.proxy.passed(|passed| passed.starts.len());
    chain.proxy.open();
    wait_until("the relay to be refused", || {
        let log = chain.relay.log();
        log.contains("has already been removed")
            || log.contains("gap")
            || chain.proxy.passed(|passed| passed.starts.len()) > starts + 1
    });
    hold("no WAL beyond the gap", Duration::from_secs(2), || chain.relay.flushed() == held);
    let attempts = chain.proxy.connections();
    std::thread::sleep(Duration::from_secs(2));
    assert!(chain.proxy.connections() - attempts <= 12, "it tries without a pause");
    chain.relay.assert_running();
    chain.standby.wait_replayed(held);
    // A slot that keeps nothing the relay can use would only fill the primary's disk.
    chain.relay.wait_logged("it is not created again");
    let slots = "select count(*) from pg_replication_slots where slot_name = 'relay'";
    chain.primary.wait_for_sql(slots, "0");
    assert!(!chain.relay.log().contains("has been lost here"), "a slot made just now tells of no loss");
}

#[test]
fn another_system_is_refused_and_what_is_held_stays() {
    let Some(mut chain) = plain_chain() else { return };
    write_wal(&chain.primary, MB);
    let upto = chain.primary.flushed();
    chain.relay.wait_flushed(upto);
    let stranger = Settings::new().segment_size_mb(1).fresh_identity().start(&chain.primary.installation);
    chain.relay.terminate();
    // The primary may have written a little more before the relay ended.
    let held_at_most = chain.primary.flushed();
    let conninfo = format!("\"host=127.0.0.1 port={} user=postgres sslmode=disable\"", stranger.port);
    chain.relay.set("upstream.conninfo", &conninfo);
    chain.relay.launch();
    chain.relay.wait_serving();
    chain.relay.wait_logged("system identifier");
    write_wal(&stranger, 2 * MB);
    hold("nothing of the stranger", Duration::from_secs(2), || chain.relay.flushed() <= held_at_most);
    assert_same_wal(&chain.relay.wal_dir(), &chain.primary, upto);
    assert_eq!(stranger.sql("select count(*) from pg_stat_replication"), "0");
}

/// With `old` a stopped server, and a relay that holds its WAL.
fn upgraded(old: &Postgres, new: &Installation) -> Postgres {
    let mut upgraded = Settings::new().segment_size_mb(1).fresh_identity().start(new);
    upgraded.stop(Stop::Fast);
    let programs = |installation: &Installation| {
        installation.program("postgres").parent().unwrap().to_str().unwrap().to_owned()
    };
    // It writes where it is started, and its log into the new cluster.
    Program::new("env")
        .arg("--chdir")
        .arg(upgraded.data().to_str().unwrap())
        .arg(new.program("pg_upgrade").to_str().unwrap())
        .args(["--username", "postgres", "--old-bindir", &programs(&old.installation)])
        .args(["--new-bindir", &programs(new), "--old-datadir", old.data().to_str().unwrap()])
        .args(["--new-datadir", upgraded.data().to_str().unwrap()])
        .for_server_user()
        .run();
    upgraded.start();
    upgraded
}

#[test]
fn a_cluster_that_was_upgraded_is_another_system_and_what_is_held_of_the_old_one_stays_readable() {
    let (Some(old), Some(new)) = (Installation::of(15), Installation::of(17)) else { return };
    if !new.has("pg_upgrade") {
        skip("PostgreSQL 17 comes without pg_upgrade here");
        return;
    }
    let mut primary = Settings::new().segment_size_mb(1).start(&old);
    let mut relay = Relay::new("relay", primary.port);
    relay.start();
    // Not a table: builds of 15 are about whose dump of one 17 does not read.
    primary.sql("create role kept");
    emit_wal(&primary, MB);
    let before = primary.flushed();
    relay.wait_flushed(before);
    primary.stop(Stop::Fast);
    // The checkpoint of the shutdown is the last that there is of this system; the primary has waited for us to have it.
    let upto = relay.flushed();
    assert!(upto > before);
    let upgraded = upgraded(&primary, &new);
    assert_eq!(
        upgraded.sql("select count(*) from pg_roles where rolname = 'kept'"),
        "1",
        "it is the same cluster"
    );
    let conninfo = format!("\"host=127.0.0.1 port={} user=postgres sslmode=disable\"", upgraded.port);
    relay.terminate();
    relay.set("upstream.conninfo", &conninfo);
    relay.launch();
    relay.wait_serving();
    relay.wait_logged("system identifier");
    write_wal(&upgraded, MB);
    hold("nothing of the new system", Duration::from_secs(2), || relay.flushed() == upto);
    let mut reader = RawClient::replication(relay.port).unwrap();
    let from = relay.oldest();
    reader.start_replication(None, from, 1).unwrap();
    let read = reader.read_wal(from, upto);
    assert!(read == primary_bytes(&primary.wal_dir(), MB, from, upto));
}

#[test]
fn another_segment_size_is_refused() {
    let Some(mut chain) = plain_chain() else { return };
    write_wal(&chain.primary, MB);
    let upto = chain.primary.flushed();
    chain.relay.wait_flushed(upto);
    // The same cluster by its identifier: nothing else tells that this is another one.
    let mut stranger =
        Settings::new().segment_size_mb(1).line("min_wal_size = 64MB").start(&chain.primary.installation);
    stranger.stop(Stop::Fast);
    let data = stranger.data();
    Program::new(stranger.installation.program("pg_resetwal"))
        .args(["--wal-segsize=16", "-D", data.to_str().unwrap()])
        .for_server_user()
        .run();
    stranger.start();
    chain.relay.terminate();
    // The primary may have written a little more before the relay ended.
    let held_at_most = chain.primary.flushed();
    let conninfo = format!("\"host=127.0.0.1 port={} user=postgres sslmode=disable\"", stranger.port);
    chain.relay.set("upstream.conninfo", &conninfo);
    chain.relay.launch();
    chain.relay.wait_serving();
    let told = "upstream has a WAL segment size of 16MB, this relay holds segments of 1MB";
    chain.relay.wait_logged(told);
    chain.relay.wait_needs_attention();
    write_wal(&stranger, MB);
    hold("nothing of the stranger", Duration::from_secs(2), || chain.relay.flushed() <= held_at_most);
    assert_same_wal(&chain.relay.wal_dir(), &chain.primary, upto);
    assert_eq!(stranger.sql("select count(*) from pg_stat_replication"), "0");
    assert_eq!(stranger.sql("select count(*) from pg_replication_slots"), "0");
}

#[test]
fn another_page_size_is_refused() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    // No server here is built so, but one says so: the answer to SHOW wal_block_size, and to nothing else.
    let built_with_16_kb = |message: &mut Vec<u8>| {
        let is_answer = message.first() == Some(&b'D') && message.ends_with(b"\0\x01\0\0\0\x048192");
        if !is_answer {
            return Verdict::Forward;
        }
        Verdict::Replace(vec![b"D\0\0\0\x0f\0\x01\0\0\0\x0516384".to_vec()])
    };
    let told = "upstream has a WAL page size (wal_block_size) of 16384, only 8192 is supported";
    proxy.edit(built_with_16_kb);
    let mut relay = Relay::new("relay", proxy.port);
    relay.launch();
    relay.wait_logged(told);
    relay.wait_needs_attention();
    assert!(wal_files(&relay.wal_dir(), MB, 1).is_empty(), "something is stored");
    assert_eq!(primary.sql("select count(*) from pg_replication_slots"), "0");
    // And where WAL is held already.
    proxy.edit_nothing();
    relay.terminate();
    relay.start();
    relay.wait_flushed(primary.flushed());
    relay.terminate();
    let held_at_most = primary.flushed();
    proxy.edit(built_with_16_kb);
    relay.launch();
    relay.wait_serving();
    relay.wait_needs_attention();
    write_wal(&primary, MB);
    hold("nothing of other pages", Duration::from_secs(2), || relay.flushed() <= held_at_most);
    // Once by each of the two processes that came to see it.
    assert_eq!(relay.times_logged(told), 2);
}
