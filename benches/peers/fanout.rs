//! How fast several receivers at once take the whole range, from the primary, from a cascading standby, from the relay.
//!
//! The receivers are this program's own clients, one thread each, which read from the socket and forget: so the source
//! is what is measured, as far as the cores reach. CPU is the source's: of the relay all its threads, of a server all its
//! processes.

use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use walrelay::wal::LsnRange;

use crate::client::{Client, Event};
use crate::lab::{KEEP, Lab, gigabytes, megabytes};
use crate::table::{Table, Target, median, spread};
use crate::usage;

const RECEIVERS: [u32; 2] = [1, 4];
const SOURCES: [&str; 3] = ["primary", "cascading standby", "walrelay"];
/// Nobody is that slow.
const SILENCE_MAX: Duration = Duration::from_secs(60);

struct Source {
    address: SocketAddr,
    process: u32,
}

struct Measured {
    speed: f64,
    cpu: f64,
}

pub(crate) fn run(lab: &mut Lab, rounds: usize) -> Result<()> {
    let (standby_name, relay_name) = ("fanout_standby", "fanout_relay");
    let settings = lab.prepare_standby(standby_name)?;
    let mut standby = lab.spawn_standby(&settings)?;
    standby.wait_until_ready()?;
    let settings = lab.prepare_relay(relay_name)?.store("wal_keep_size", KEEP);
    let mut relay = lab.spawn_relay(&settings)?;
    relay.wait_until_ready()?;
    let end = lab.range.end();
    for name in [standby_name, relay_name] {
        lab.wait(name, |lab| Ok(lab.flushed_by(name)? >= Some(end)))?;
    }
    // A standby sends on what it has; that it replays at the same time would be another measurement.
    let mut session = standby.session()?;
    lab.wait("the standby to replay", |_| Ok(session.lsn("SELECT pg_last_wal_replay_lsn()")? >= Some(end)))?;
    drop(session);
    let sources = [
        Source { address: lab.primary.address(), process: lab.primary.id() },
        Source { address: standby.address(), process: standby.id() },
        Source { address: relay.address(), process: relay.id() },
    ];
    let mut results: Vec<Vec<Measured>> = Vec::new();
    results.resize_with(sources.len() * RECEIVERS.len(), Vec::new);
    for _round in 0..rounds {
        let turns = RECEIVERS.iter().flat_map(|count| sources.iter().map(move |source| (source, *count)));
        for ((source, count), results) in turns.zip(&mut results) {
            lab.settle();
            lab.check()?;
            results.push(measure(source, count, lab.range)?);
        }
    }
    print(&results, lab.range.bytes(), rounds);
    relay.stop()?;
    standby.stop()?;
    lab.drop_slot(standby_name)?;
    lab.drop_slot(relay_name)
}

fn print(results: &[Vec<Measured>], bytes: u64, rounds: usize) {
    let title = format!(
        "Fan-out of {:.2} GB to clients that read and forget, sum over the clients, medians of {rounds} rounds",
        gigabytes(bytes)
    );
    let mut table = Table::new(&title, &["source", "clients", "MB/s", "range", "source CPU s/GB sent"]);
    let turns = RECEIVERS.iter().flat_map(|count| SOURCES.iter().map(move |source| (*source, *count)));
    let mut speeds_of = Vec::new();
    for ((source, count), results) in turns.zip(results) {
        let speeds: Vec<f64> = results.iter().map(|result| result.speed).collect();
        let cpu: Vec<f64> = results.iter().map(|result| result.cpu).collect();
        speeds_of.push((source, count, median(&speeds)));
        table.row([
            source.to_owned(),
            count.to_string(),
            format!("{:.0}", median(&speeds)),
            spread(&speeds),
            format!("{:.2}", median(&cpu)),
        ]);
    }
    for count in RECEIVERS {
        let of =
            |wanted: &str| speeds_of.iter().find(|(name, clients, _)| *name == wanted && *clients == count);
        if let (Some((_, _, relay)), Some((_, _, standby))) = (of("walrelay"), of("cascading standby")) {
            let what = format!("MB/s against the cascading standby, clients: {count}");
            table.target(&what, relay / standby, Target::AtLeast(1.0));
        }
    }
    table.print();
}

fn measure(source: &Source, count: u32, range: LsnRange) -> Result<Measured> {
    let before = usage::cpu_of_family(source.process)?;
    let begun = Instant::now();
    thread::scope(|scope| -> Result<()> {
        let readers: Vec<_> = (0..count).map(|_| scope.spawn(|| drain(source.address, range))).collect();
        for reader in readers {
            reader.join().map_err(|_panic| anyhow!("a client has panicked"))??;
        }
        Ok(())
    })?;
    let elapsed = begun.elapsed();
    // The time of a walsender that ends counts for its parent a moment later.
    thread::sleep(Duration::from_millis(50));
    let cpu = usage::cpu_of_family(source.process)?.saturating_sub(before);
    let sent = range.bytes() * u64::from(count);
    Ok(Measured { speed: megabytes(sent) / elapsed.as_secs_f64(), cpu: cpu.as_secs_f64() / gigabytes(sent) })
}

/// Reads the range to its end and forgets it.
pub(crate) fn drain(address: SocketAddr, range: LsnRange) -> Result<()> {
    let mut client = Client::replication(address)?;
    client.start_replication(range.start())?;
    let (mut reached, mut heard) = (range.start().get(), Instant::now());
    while reached < range.end().get() {
        match client.event(reached)? {
            Event::Wal { end } => (reached, heard) = (end, Instant::now()),
            Event::Keepalive | Event::Silence if heard.elapsed() > SILENCE_MAX => {
                return Err(anyhow!("no WAL for {} s", SILENCE_MAX.as_secs()));
            }
            Event::Keepalive | Event::Silence => {}
        }
    }
    Ok(())
}
