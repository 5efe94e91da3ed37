//! How late a commit arrives at the end of the stream: direct, through a cascading standby, through the relay.
//!
//! One commit at a time. The clock starts when the INSERT is sent, so the time of the commit itself is part of every row;
//! it stands alone in the first row, and what a path adds is the difference to the direct one. It stops when the client
//! has the last byte of the message that holds the commit record. Only the path that is measured runs, and the paths take
//! turns, so that none has the quiet minute for itself.

use std::{
    net::SocketAddr,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use walrelay::cli::demo::relay::{Relay, RelaySettings};
use walrelay::cli::demo::server::{Server, ServerSettings};
use walrelay::wal::{Lsn, SegmentNo, SegmentSize};

use crate::client::{Client, Event};
use crate::lab::{KEEP, Lab};
use crate::table::{Table, Target, percentile};

/// Each path gets as many turns, and in each an equal part of the commits.
const TURNS_PER_ROUND: usize = 2;
const WARM_UP_COMMITS: usize = 20;
/// Between commits everything comes to rest.
const PAUSE: Duration = Duration::from_millis(1);
const ARRIVAL_WAIT: Duration = Duration::from_secs(30);
const ARRIVALS_MAX: usize = 1 << 16;
const PATHS: [&str; 3] = ["direct", "through a cascading standby", "through walrelay"];
const STANDBY: &str = "latency_standby";
const RELAY: &str = "latency_relay";

#[derive(Default)]
struct Samples {
    /// Milliseconds until the application has its answer.
    committed: Vec<f64>,
    /// Milliseconds until the client has the WAL.
    arrived: Vec<f64>,
}

/// Something between the primary and the client; it lives as long as it is measured.
enum Between {
    Nothing,
    Standby(Server),
    Relay(Relay),
}

pub(crate) fn run(lab: &mut Lab, rounds: usize, commits: usize) -> Result<()> {
    let standby = lab.prepare_standby(STANDBY)?;
    let relay = lab.prepare_relay(RELAY)?.store("wal_keep_size", KEEP);
    let turns = rounds * TURNS_PER_ROUND;
    let mut samples: [Samples; 3] = Default::default();
    for _turn in 0..turns {
        for (path, samples) in PATHS.iter().zip(&mut samples) {
            let mut between = start(lab, path, &standby, &relay)?;
            lab.settle();
            measure(lab, between.address(lab), commits.div_ceil(turns), samples)?;
            between.stop()?;
        }
    }
    lab.drop_slot(STANDBY)?;
    lab.drop_slot(RELAY)?;
    print(&samples);
    Ok(())
}

fn print(samples: &[Samples; 3]) {
    let [direct, cascade, relay] = samples;
    let title = format!(
        "Milliseconds from a commit's start to its WAL at the end client, {} commits each",
        relay.arrived.len()
    );
    let mut table = Table::new(&title, &["path", "p50", "p99", "added p50", "added p99"]);
    let committed: Vec<f64> = samples.iter().flat_map(|samples| samples.committed.iter().copied()).collect();
    let numbers = |values: &[f64]| (percentile(values, 500), percentile(values, 990));
    let shown = |value: f64| format!("{value:.3}");
    let none = || "-".to_owned();
    let (p50, p99) = numbers(&committed);
    table.row(["commit acknowledged to its client".to_owned(), shown(p50), shown(p99), none(), none()]);
    let (direct_p50, direct_p99) = numbers(&direct.arrived);
    let mut added = Vec::new();
    for (path, samples) in PATHS.iter().zip([direct, cascade, relay]) {
        let (p50, p99) = numbers(&samples.arrived);
        let more = (p50 - direct_p50, p99 - direct_p99);
        added.push(more);
        table.row([(*path).to_owned(), shown(p50), shown(p99), shown(more.0), shown(more.1)]);
    }
    if let [_, cascade, relay] = added[..] {
        table.target("added p50, against the cascading standby's,", relay.0, Target::AtMost(cascade.0));
        table.target("added p99, against the cascading standby's,", relay.1, Target::AtMost(cascade.1));
    }
    table.print();
}

fn start(lab: &mut Lab, path: &str, standby: &ServerSettings, relay: &RelaySettings) -> Result<Between> {
    let (between, name) = match PATHS.iter().position(|known| *known == path) {
        Some(1) => {
            let mut server = lab.spawn_standby(standby)?;
            server.wait_until_ready()?;
            (Between::Standby(server), STANDBY)
        }
        Some(2) => {
            let mut process = lab.spawn_relay(relay)?;
            process.wait_until_ready()?;
            (Between::Relay(process), RELAY)
        }
        _ => return Ok(Between::Nothing),
    };
    let now = lab.flushed_position()?;
    lab.wait(name, |lab| Ok(lab.flushed_by(name)? >= Some(now)))?;
    if let Between::Standby(server) = &between {
        let mut session = server.session()?;
        lab.wait(name, |_| Ok(session.lsn("SELECT pg_last_wal_replay_lsn()")? >= Some(now)))?;
        // Or the next start would begin by replaying all of it again.
        session.rows("CHECKPOINT")?;
    }
    Ok(between)
}

impl Between {
    fn address(&self, lab: &Lab) -> SocketAddr {
        match self {
            Self::Nothing => lab.primary.address(),
            Self::Standby(server) => server.address(),
            Self::Relay(relay) => relay.address(),
        }
    }

    fn stop(&mut self) -> Result<()> {
        match self {
            Self::Nothing => {}
            Self::Standby(server) => drop(server.stop()?),
            Self::Relay(relay) => drop(relay.stop()?),
        }
        Ok(())
    }
}

fn measure(lab: &mut Lab, end_of_path: SocketAddr, commits: usize, samples: &mut Samples) -> Result<()> {
    let now = lab.flushed_position()?;
    let from = SegmentNo::holding(now, SegmentSize::DEFAULT).start(SegmentSize::DEFAULT);
    let from = from.ok_or_else(|| anyhow!("the primary is in its first segment"))?;
    let mut stream = Client::replication(end_of_path)?;
    stream.start_replication(from)?;
    let mut application = Client::sql(lab.primary.address())?;
    let (sender, arrivals) = sync_channel(ARRIVALS_MAX);
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| -> Result<()> {
            let mut reached = from.get();
            while !is_done.load(Ordering::Relaxed) {
                if let Event::Wal { end } = stream.event(reached)? {
                    reached = end;
                    sender.send((Instant::now(), end))?;
                }
            }
            Ok(())
        });
        let result = commit_often(lab, &mut application, &arrivals, commits, samples);
        is_done.store(true, Ordering::Relaxed);
        let read = reader.join().map_err(|_panic| anyhow!("the client has panicked"))?;
        read.and(result)
    })
}

fn commit_often(
    lab: &Lab,
    application: &mut Client,
    arrivals: &Receiver<(Instant, u64)>,
    commits: usize,
    samples: &mut Samples,
) -> Result<()> {
    for number in 0..WARM_UP_COMMITS + commits {
        lab.check()?;
        let sent = Instant::now();
        application.ask(&format!("INSERT INTO bench_commits VALUES ({number})"))?;
        let committed = sent.elapsed();
        // The flush position and not the insert position: after a record that ends with its page the latter is behind
        // the next page's header, which is not written until something follows.
        let end: Lsn = application.ask("SELECT pg_current_wal_flush_lsn()")?.parse()?;
        let arrived = loop {
            let (at, reached) = arrivals.recv_timeout(ARRIVAL_WAIT).context("a commit did not arrive")?;
            if reached >= end.get() {
                break at;
            }
        };
        if number >= WARM_UP_COMMITS {
            samples.committed.push(committed.as_secs_f64() * 1e3);
            samples.arrived.push(arrived.duration_since(sent).as_secs_f64() * 1e3);
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}
