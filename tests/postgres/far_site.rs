//! Two sites with a long cable between them: what the compressed link gains over PostgreSQL's own stream on the same cable in
//! the same run, and that nothing a cable does leads to a wrong byte or to a stream that stands still.

use std::time::{Duration, Instant};

use crate::support::MB;
use crate::support::compare::{assert_equal_clusters, assert_same_wal};
use crate::support::lab::Installation;
use crate::support::load::{Load, pgbench, pgbench_tables, write_wal};
use crate::support::postgres::{Postgres, Stop};
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::two_sites::TwoSites;
use crate::support::wait::{hold, wait_for, wait_until};
use crate::support::wan::Way;
use crate::support::{lsn, lsn_text};

const ROUND_TRIP: Duration = Duration::from_millis(50);
const RATE_BITS: u64 = 100_000_000;
const LOST_PPM: u64 = 1_000;

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / MB as f64
}

/// What it took to get `bytes` of WAL over the cable.
#[derive(Clone, Copy, Debug, Default)]
struct Crossing {
    seconds: f64,
    bytes: u64,
    on_the_wire: u64,
}

impl std::ops::AddAssign for Crossing {
    fn add_assign(&mut self, other: Self) {
        self.seconds += other.seconds;
        self.bytes += other.bytes;
        self.on_the_wire += other.on_the_wire;
    }
}

/// What is written.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Pgbench,
    Incompressible,
}

impl Kind {
    /// Returns its end.
    fn write(self, primary: &Postgres, bytes: u64) -> u64 {
        match self {
            Self::Pgbench => write_pgbench_wal(primary, bytes),
            Self::Incompressible => write_incompressible_wal(primary, bytes),
        }
    }
}

/// From the first bytes over the cable to the moment when `reached` says so.
fn cross(sites: &TwoSites, bytes: u64, start: impl FnOnce(), reached: impl Fn() -> bool) -> Crossing {
    let before = sites.wan.bytes_to_far();
    start();
    // The handshake and what is asked before a stream are not what is measured.
    let begun = wait_for("the stream to begin", || {
        (sites.wan.bytes_to_far() > before + 64 * 1024).then(Instant::now)
    });
    wait_until("all WAL to be at the far end", reached);
    Crossing { seconds: begun.elapsed().as_secs_f64(), bytes, on_the_wire: sites.wan.bytes_to_far() - before }
}

/// WAL as pgbench makes it after a checkpoint, with its page images; returns its end.
fn write_pgbench_wal(primary: &Postgres, bytes: u64) -> u64 {
    primary.checkpoint();
    let from = primary.insert_position();
    while primary.insert_position() - from < bytes {
        pgbench(primary, 4, 2).wait_for_end();
    }
    primary.flushed()
}

/// WAL that nothing makes smaller.
pub(crate) fn write_incompressible_wal(primary: &Postgres, bytes: u64) -> u64 {
    primary.sql("create table if not exists noise (filling bytea)");
    primary.sql("alter table noise alter column filling set storage external");
    for _ in 0..bytes / MB {
        primary.sql(
            "insert into noise select string_agg(decode(md5(random()::text || n), 'hex'), '') from generate_series(1, 65536) n",
        );
    }
    primary.flushed()
}

/// How often both catch up, one after the other.
fn rounds() -> u32 {
    std::env::var("WALRELAY_FAR_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

#[test]
fn catching_up_is_faster_by_what_the_wal_shrinks_and_never_slower() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let Some(mut sites) = TwoSites::new(&installation, ROUND_TRIP) else { return };
    pgbench_tables(&sites.primary, 4);
    sites.near.wait_flushed(sites.primary.flushed());
    sites.far.start();
    sites.far.wait_flushed(sites.primary.flushed());
    let mut direct = sites.direct_standby("direct");
    direct.wait_replayed(sites.primary.flushed());
    println!("| WAL | MB | direct s | link s | faster | on the wire: direct MB | link MB | ratio |");
    let cases = [
        // Several times: when a packet is lost is chance, and decides how fast PostgreSQL's stream gets.
        (Kind::Pgbench, rounds(), LOST_PPM),
        // Without loss, so that nothing is chance.
        (Kind::Incompressible, 1, 0),
    ];
    for (kind, rounds, lost_ppm) in cases {
        let (mut by_postgres, mut by_link) = (Crossing::default(), Crossing::default());
        for _ in 0..rounds {
            direct.stop(Stop::Fast);
            sites.far.terminate();
            let from = sites.primary.flushed();
            let to = kind.write(&sites.primary, 10 * MB);
            sites.near.wait_flushed(to);
            sites.wan.cable.set_rate(RATE_BITS);
            sites.wan.cable.set_lost_ppm(lost_ppm);
            let primary = &sites.primary;
            by_postgres +=
                cross(&sites, to - from, || direct.launch(), || primary.reported_flush("direct") >= to);
            let mut far = std::mem::replace(&mut sites.far, Relay::new("nobody", 1));
            let has_flushed = |session: &serde_json::Value| {
                session["flush_lsn"].as_str().is_some_and(|text| lsn(text) >= to)
            };
            by_link += cross(
                &sites,
                to - from,
                || far.launch(),
                || sites.near.downstream("far").iter().any(has_flushed),
            );
            sites.far = far;
            sites.wan.cable.set_rate(0);
            sites.wan.cable.set_lost_ppm(0);
            wait_until("the standby to serve", || RawClient::sql(direct.port).is_ok());
        }
        let upto = sites.primary.flushed();
        sites.far.wait_flushed(upto);
        assert_same_wal(&sites.far.wal_dir(), &sites.primary, upto);
        let faster = by_postgres.seconds / by_link.seconds;
        let ratio = by_postgres.on_the_wire as f64 / by_link.on_the_wire as f64;
        println!(
            "| {kind:?} | {:.0} | {:.2} | {:.2} | {faster:.2} | {:.1} | {:.1} | {ratio:.2} |",
            megabytes(by_postgres.bytes),
            by_postgres.seconds,
            by_link.seconds,
            megabytes(by_postgres.on_the_wire),
            megabytes(by_link.on_the_wire),
        );
        match kind {
            Kind::Pgbench => {
                assert!(ratio > 3.0, "WAL of pgbench shrinks more than {ratio:.2}");
                assert!(faster >= 0.9 * ratio, "{faster:.2} times faster, and {ratio:.2} times smaller");
            }
            // As much again as a busy machine may take away.
            Kind::Incompressible => assert!(faster >= 0.9, "slower: {faster:.2}"),
        }
    }
}

/// What two more processes may add where all of them share two cores.
const HOPS_MS: f64 = 3.0;

/// The moments at which a standby is seen to have replayed each of these positions.
fn watch_replay(port: u16, positions: std::sync::mpsc::Receiver<(u64, Instant)>) -> Vec<Duration> {
    let mut client = RawClient::sql(port).unwrap();
    let mut replayed = 0;
    let mut took = Vec::new();
    for (position, committed) in positions {
        while replayed < position {
            let rows = client.rows("select pg_last_wal_replay_lsn()").unwrap();
            replayed = rows[0][0].as_deref().map_or(0, lsn);
        }
        took.push(committed.elapsed());
    }
    took
}

#[test]
fn commits_are_seen_at_the_far_end_no_later_than_by_a_standby_of_the_primary() {
    let Some(installation) = Installation::any() else { return };
    let Some(mut sites) = TwoSites::new(&installation, ROUND_TRIP) else { return };
    pgbench_tables(&sites.primary, 2);
    sites.near.wait_flushed(sites.primary.flushed());
    sites.far.start();
    let (direct, relayed) = (sites.direct_standby("direct"), sites.relayed_standby("relayed"));
    for standby in [&direct, &relayed] {
        standby.wait_replayed(sites.primary.flushed());
    }
    sites.wan.cable.set_rate(RATE_BITS);
    sites.wan.cable.set_lost_ppm(LOST_PPM);
    let mut client = RawClient::sql(sites.primary.port).unwrap();
    let (mut seen, mut watching) = (Vec::new(), Vec::new());
    for standby in [&direct, &relayed] {
        let (tell, positions) = std::sync::mpsc::channel();
        let port = standby.port;
        watching.push((tell, std::thread::spawn(move || watch_replay(port, positions))));
    }
    client.rows("create table seen (id serial primary key, filling text)").unwrap();
    for number in 0..300 {
        client.rows("insert into seen (filling) select repeat(md5(random()::text), 10)").unwrap();
        let position =
            lsn(client.rows("select pg_current_wal_flush_lsn()").unwrap()[0][0].as_deref().unwrap());
        let committed = Instant::now();
        for (tell, _) in &watching {
            tell.send((position, committed)).unwrap();
        }
        // Not in step with anything.
        std::thread::sleep(Duration::from_millis(13 + number % 7));
    }
    for (tell, thread) in watching {
        drop(tell);
        let mut took = thread.join().unwrap();
        took.sort();
        seen.push(took);
    }
    let at = |took: &[Duration], percent: usize| took[took.len() * percent / 100].as_secs_f64() * 1000.0;
    println!("| commit to replay, ms | p50 | p90 | p99 |");
    for (name, took) in [("standby of the primary", &seen[0]), ("standby behind two relays", &seen[1])] {
        println!("| {name} | {:.2} | {:.2} | {:.2} |", at(took, 50), at(took, 90), at(took, 99));
    }
    // A cable that loses a packet makes its own times; the medians do not see that.
    let (direct, relayed) = (at(&seen[0], 50), at(&seen[1], 50));
    // Two hops more cost this machine, which runs both sites and both standbys, what it costs other machines together.
    assert!(
        relayed <= direct * 1.05 + HOPS_MS,
        "median {relayed:.2} ms behind the relays, {direct:.2} ms without"
    );
}

/// Seconds for which the cable is cut at once.
fn cut_seconds() -> u64 {
    std::env::var("WALRELAY_CUT_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8)
}

#[test]
fn whatever_the_cable_does_the_far_end_catches_up_with_the_primarys_bytes() {
    let Some(installation) = Installation::any() else { return };
    let Some(mut sites) = TwoSites::new(&installation, Duration::from_millis(20)) else { return };
    pgbench_tables(&sites.primary, 1);
    sites.near.wait_flushed(sites.primary.flushed());
    sites.far.set("upstream.wal_receiver_timeout", "\"3s\"");
    sites.near.set("downstream.wal_sender_timeout", "\"3s\"");
    sites.near.terminate();
    sites.near.start();
    sites.far.start();
    let standby = sites.relayed_standby("far_standby");
    let catches_up = |sites: &TwoSites, what: &str| {
        let upto = sites.primary.flushed();
        let begun = Instant::now();
        sites.far.wait_flushed(upto);
        println!("{what}: caught up with {} in {:.1} s", lsn_text(upto), begun.elapsed().as_secs_f64());
        assert_same_wal(&sites.far.wal_dir(), &sites.primary, upto);
    };
    let load = |sites: &TwoSites| pgbench(&sites.primary, 2, 600);

    // Nobody is told, and nothing passes: each end gives up by its own clock.
    let writing = load(&sites);
    sites.wan.cable.cut();
    let cut_at = Instant::now();
    wait_until("the far relay to give the connection up", || {
        sites.far.metric("walrelay_upstream_streaming") == Some(0.0)
    });
    wait_until("the near relay to give the connection up", || sites.near.downstream("far").is_empty());
    assert!(cut_at.elapsed() < Duration::from_secs(20), "given up after {:?}", cut_at.elapsed());
    std::thread::sleep(Duration::from_secs(cut_seconds()).saturating_sub(cut_at.elapsed()));
    sites.wan.cable.mend();
    catches_up(&sites, "cut");

    for _ in 0..4 {
        sites.wan.cable.cut();
        std::thread::sleep(Duration::from_millis(1500));
        sites.wan.cable.mend();
        std::thread::sleep(Duration::from_millis(1500));
    }
    catches_up(&sites, "flapping");

    sites.wan.cable.set_reordered_ppm(30_000);
    sites.wan.cable.set_lost_ppm(20_000);
    write_wal(&sites.primary, 4 * MB);
    catches_up(&sites, "2 % lost, 3 % out of order");
    sites.wan.cable.set_reordered_ppm(0);
    sites.wan.cable.set_lost_ppm(0);

    // TLS notices each of them, and the connection is a new one.
    for _ in 0..3 {
        let sessions = sites.far.status()["upstream"]["sessions"].as_u64();
        let mut flipped_at = Instant::now();
        sites.wan.cable.flip(1);
        wait_until("a new session", || {
            // It may have hit another connection than the stream's.
            if flipped_at.elapsed() > Duration::from_secs(10)
                && sites.far.metric("walrelay_upstream_streaming") == Some(1.0)
            {
                flipped_at = Instant::now();
                sites.wan.cable.flip(1);
            }
            sites.far.status()["upstream"]["sessions"].as_u64() > sessions
        });
    }
    catches_up(&sites, "bits flipped under TLS");
    drop(writing);
    let upto = sites.primary.flushed();
    sites.far.wait_flushed(upto);
    standby.wait_replayed(upto);
    assert_equal_clusters(&sites.primary, &standby);
    assert_eq!(sites.far.status()["upstream"]["needs_attention"], false);
}

/// Seconds for which nothing passes at all in the test of a cable that is as bad as can be.
fn black_hole_seconds() -> u64 {
    std::env::var("WALRELAY_BLACK_HOLE_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8)
}

/// Two sites whose relays notice silence within `timeout`, and hold next to no WAL in memory.
fn small_sites(installation: &Installation, round_trip: Duration, timeout: &str) -> Option<TwoSites> {
    let mut sites = TwoSites::new(installation, round_trip)?;
    sites.far.set("upstream.wal_receiver_timeout", timeout);
    sites.near.set("downstream.wal_sender_timeout", timeout);
    for relay in [&mut sites.near, &mut sites.far] {
        relay.set("store.tail_size", "\"2MB\"");
        relay.set("store.unwritten_size", "\"2MB\"");
    }
    sites.near.terminate();
    sites.near.start();
    sites.far.start();
    sites.far.wait_flushed(sites.primary.flushed());
    Some(sites)
}

#[test]
fn a_cable_that_carries_one_way_only_is_noticed_at_both_ends_and_caught_up_after() {
    let Some(installation) = Installation::any() else { return };
    let Some(sites) = small_sites(&installation, Duration::from_millis(20), "\"3s\"") else { return };
    let load = Load::start(&sites.primary, Duration::from_millis(5));
    let is_streaming = || sites.far.metric("walrelay_upstream_streaming") == Some(1.0);
    for way in [Way::ToFar, Way::ToNear] {
        wait_until("the link", || is_streaming() && !sites.near.downstream("far").is_empty());
        let committed = load.committed();
        sites.wan.cable.cut_one_way(way);
        let cut_at = Instant::now();
        wait_until("the far relay to give the connection up", || !is_streaming());
        wait_until("the near relay to give the connection up", || sites.near.downstream("far").is_empty());
        println!("{way:?}: both ends had noticed after {:.1} s", cut_at.elapsed().as_secs_f64());
        // Each by its own clock, or because the other one said so.
        assert!(cut_at.elapsed() < Duration::from_secs(15), "{way:?}: {:?}", cut_at.elapsed());
        // Connections that are only half there do not pile up, and the slot is kept for the real one.
        hold("nobody takes the far relay's place", Duration::from_secs(2), || {
            sites.near.downstream("far").is_empty()
        });
        sites.wan.cable.mend();
        let upto = sites.primary.flushed();
        sites.far.wait_flushed(upto);
        assert_same_wal(&sites.far.wal_dir(), &sites.primary, upto);
        assert!(load.committed() > committed, "commits were held up");
    }
    drop(load);
    assert_eq!(sites.far.metric("walrelay_link_errors_total"), Some(0.0));
    assert_eq!(sites.far.status()["upstream"]["needs_attention"], false);
}

/// Most memory of a relay that holds next to no WAL in it, whatever is behind it.
const SMALL_RELAY_BYTES_MAX: u64 = 64 * MB;

#[test]
fn the_worst_cable_carries_something_and_costs_no_memory_and_is_caught_up_after() {
    let Some(installation) = Installation::any() else { return };
    let Some(sites) = small_sites(&installation, Duration::from_millis(20), "\"8s\"") else { return };
    let mut most = 0;
    let mut look = |sites: &TwoSites| {
        let memory = [&sites.near, &sites.far].map(|relay| relay.process().memory("RssAnon"));
        most = memory.into_iter().fold(most, u64::max);
    };
    let load = Load::start(&sites.primary, Duration::from_millis(20));
    // A fifth of all packets, 300 ms, 64 kbit/s.
    sites.wan.cable.set_round_trip(Duration::from_millis(300));
    sites.wan.cable.set_rate(64_000);
    sites.wan.cable.set_lost_ppm(200_000);
    let (from, began) = (sites.far.flushed(), Instant::now());
    wait_until("something to get through", || {
        look(&sites);
        sites.far.flushed() >= from + 128 * 1024
    });
    println!("128 kB of WAL took {:.1} s", began.elapsed().as_secs_f64());
    // And then nothing at all, while far more is written than either end has memory for.
    sites.wan.cable.cut();
    let cut_at = Instant::now();
    drop(load);
    write_incompressible_wal(&sites.primary, 24 * MB);
    sites.near.wait_flushed(sites.primary.flushed());
    while cut_at.elapsed() < Duration::from_secs(black_hole_seconds()) {
        look(&sites);
        std::thread::sleep(Duration::from_millis(100));
    }
    let held = sites.far.flushed();
    sites.wan.cable.mend();
    sites.wan.cable.set_round_trip(Duration::from_millis(20));
    sites.wan.cable.set_rate(0);
    sites.wan.cable.set_lost_ppm(0);
    let (upto, mended_at) = (sites.primary.flushed(), Instant::now());
    assert!(held < upto, "it had all of it");
    wait_until("the far relay to catch up", || {
        look(&sites);
        sites.far.flushed() >= upto
    });
    println!(
        "{:.0} MB were caught up in {:.1} s, in {} MB of memory",
        megabytes(upto - held),
        mended_at.elapsed().as_secs_f64(),
        most / MB
    );
    assert_same_wal(&sites.far.wal_dir(), &sites.primary, upto);
    assert!(most < SMALL_RELAY_BYTES_MAX, "{} MB of memory", most / MB);
    assert_eq!(sites.far.status()["upstream"]["needs_attention"], false);
}
