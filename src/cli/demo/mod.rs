//! `walrelay demo`: a throwaway primary, two relays and a standby on this machine, with load and a table of positions.
//!
//! Owns the story: what is started in which order, what is shown while it runs, and what is checked at the end. The
//! relays are this very executable with a configuration file, so what is seen here is what runs elsewhere. Touches only
//! what it made itself, in one temporary folder, and ends every process by its own id. The parts also serve the
//! benchmarks, which is why they are public.
#![allow(clippy::disallowed_methods, reason = "touches only throwaway files of its own, never the store's")]

pub mod installation;
pub mod process;
pub mod relay;
pub mod server;
mod table;
mod verify;

use std::{
    io::IsTerminal,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::process::Signal;

use installation::Installation;
use process::{Process, Scratch};
use relay::{Relay, RelaySettings};
use server::{Server, ServerSettings, Session};
use table::{Node, Table};

/// Seconds of load with `--once`.
const ONCE_SECONDS: u64 = 10;
/// How often the primary's position is noted, which is the resolution of the lag in time.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);
const TABLE_INTERVAL: Duration = Duration::from_secs(1);
/// A tenth of what one core does, so that a laptop stays usable and the lag is the relays' and not the machine's.
const TRANSACTIONS_PER_SECOND: u32 = 400;
const CLIENTS: u32 = 4;
const SCALE: u32 = 5;
/// Thirty years.
const SECONDS_WITHOUT_END: u64 = 1_000_000_000;
/// The slot that the standby uses, on whatever it streams from.
const STANDBY_SLOT: &str = "standby";

/// What `walrelay demo` accepts.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Run the load for some seconds, stop it, compare everything, and exit with 0 only if all is equal
    #[arg(long)]
    pub once: bool,
    /// Seconds of load [default: 10 with --once, else until Ctrl-C]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: Option<u64>,
    /// Relays in the chain; with 0 the standby streams from the primary
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=8))]
    pub relays: u8,
    /// Folder with initdb, postgres, psql, pg_basebackup and pgbench [default: as pg_config says, else the newest]
    #[arg(long, value_name = "DIR")]
    pub pg_bin: Option<PathBuf>,
    /// Keep the files and logs when the demo ends, and say where they are
    #[arg(long)]
    pub keep: bool,
}

/// Runs the demo until it is done or interrupted.
pub fn run(options: Options) -> Result<()> {
    let installation = Installation::find(options.pg_bin.as_deref())?;
    let stop = stop_on_signals()?;
    let scratch = Scratch::create("walrelay-demo")?;
    if options.keep {
        println!("files are kept in {}", scratch.keep().display());
    }
    println!("PostgreSQL {} from {}", installation.version(), installation.folder().display());
    let mut chain = Chain::start(&installation, &scratch, options.relays, &stop)?;
    let seconds = options.seconds.or_else(|| options.once.then_some(ONCE_SECONDS));
    chain.run_load(seconds, &stop)?;
    if !options.once {
        return Ok(());
    }
    if stop.load(Ordering::Relaxed) {
        bail!("interrupted before the comparison");
    }
    println!("load stopped; waiting until everybody has everything");
    let relays: Vec<&Relay> = chain.relays.iter().rev().collect();
    let report =
        verify::compare(&mut chain.watch.primary, &mut chain.watch.standby, &relays, &chain.primary)?;
    report.print();
    if !report.is_equal() {
        bail!("the standby or a relay differs from the primary");
    }
    Ok(())
}

/// Everything that runs. The fields are dropped in this order, so the standby ends first and the primary last.
struct Chain {
    watch: Watch,
    standby: Server,
    /// The one that feeds the standby first.
    relays: Vec<Relay>,
    primary: Server,
    started: Instant,
}

/// The eyes on both ends.
struct Watch {
    primary: Session,
    standby: Session,
}

impl Chain {
    /// The relays start before the backup is taken, so that they hold all WAL from its beginning.
    fn start(installation: &Installation, scratch: &Scratch, relays: u8, stop: &AtomicBool) -> Result<Self> {
        let begun = Instant::now();
        let settings = ServerSettings::new("primary").set("wal_keep_size", "8GB").set("max_wal_size", "4GB");
        let primary = Server::create(installation, scratch, &settings)?;
        let mut primary_session = primary.session()?;
        println!("{:>6}  primary   port {}", seconds_since(begun), primary.port());
        let mut running: Vec<Relay> = Vec::new();
        for number in 1..=relays {
            bail_if_stopped(stop)?;
            let name = format!("relay_{number}");
            let upstream = running.first().map_or_else(|| primary.conninfo(), Relay::conninfo);
            let relay = Relay::start(scratch, &RelaySettings::new(&name, &upstream))?;
            println!(
                "{:>6}  {name}   port {}, http://{}/status",
                seconds_since(begun),
                relay.port(),
                relay.admin()
            );
            running.insert(0, relay);
        }
        bail_if_stopped(stop)?;
        let upstream = running.first().map_or_else(|| primary.conninfo(), Relay::conninfo);
        server::create_slot(installation, &upstream, primary.password(), STANDBY_SLOT)?;
        let settings = ServerSettings::new("standby").following(&upstream, STANDBY_SLOT);
        let standby = primary.clone_standby(scratch, &settings)?;
        let standby_session = standby.session()?;
        println!("{:>6}  standby   port {}", seconds_since(begun), standby.port());
        primary_session.rows("SELECT 1").context("the primary is gone")?;
        let watch = Watch { primary: primary_session, standby: standby_session };
        Ok(Self { watch, standby, relays: running, primary, started: Instant::now() })
    }

    /// Fills pgbench's tables, then runs its transactions; shows the table all the while.
    fn run_load(&mut self, seconds: Option<u64>, stop: &AtomicBool) -> Result<()> {
        let mut table = Table::new(std::io::stdout().is_terminal());
        let scale = SCALE.to_string();
        let mut filling =
            self.primary.tool("pgbench", "filling", &["--initialize", "--quiet", "--scale", &scale])?;
        self.show_until_ended(&mut table, &mut filling, "filling the tables", stop)?;
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        filling.expect_success()?;
        // pgbench wants a number where nobody set an end.
        let duration = seconds.unwrap_or(SECONDS_WITHOUT_END).to_string();
        let (clients, rate) = (CLIENTS.to_string(), TRANSACTIONS_PER_SECOND.to_string());
        let arguments = ["--client", &clients, "--rate", &rate, "--time", &duration, "--progress", "1"];
        let mut load = self.primary.tool("pgbench", "load", &arguments)?;
        self.show_until_ended(&mut table, &mut load, "load", stop)?;
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        load.expect_success()
    }

    /// Returns when the load has ended or a stop was asked for.
    fn show_until_ended(
        &mut self,
        table: &mut Table,
        load: &mut Process,
        what: &str,
        stop: &AtomicBool,
    ) -> Result<()> {
        let mut draw_at = Instant::now();
        while load.ended()?.is_none() && !stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            table.note_primary(now, self.watch.primary.lsn("SELECT pg_current_wal_flush_lsn()")?);
            if now >= draw_at {
                draw_at = now + TABLE_INTERVAL;
                let nodes = self.nodes()?;
                let last_line = load.log_last_line();
                // "progress: 3.0 s, 391.7 tps, lat 5.138 ms stddev 4.820, 0 failed, lag 1.463 ms"
                let progress = last_line.strip_prefix("progress: ").and_then(|rest| rest.split_once("s, "));
                let rate = progress.and_then(|(_, rest)| rest.split(',').next());
                let title = rate.map_or_else(|| what.to_owned(), |rate| format!("{what}, {rate}"));
                table.draw(now.duration_since(self.started), &title, &nodes);
            }
            thread::sleep(SAMPLE_INTERVAL);
        }
        Ok(())
    }

    /// Where everybody is now, in the order of the stream.
    fn nodes(&mut self) -> Result<Vec<Node>> {
        let mut nodes = Vec::with_capacity(self.relays.len() + 1);
        for relay in self.relays.iter_mut().rev() {
            relay.expect_running()?;
            let positions = relay.positions().unwrap_or_default();
            nodes.push(Node {
                name: relay.name().to_owned(),
                received: positions.verified,
                written: positions.written,
                flushed: positions.flushed,
                replayed: None,
                reached: positions.flushed,
            });
        }
        let received = self.watch.standby.lsn("SELECT pg_last_wal_receive_lsn()")?;
        let replayed = self.watch.standby.lsn("SELECT pg_last_wal_replay_lsn()")?;
        nodes.push(Node {
            name: self.standby.name().to_owned(),
            received,
            written: None,
            flushed: received,
            replayed,
            reached: replayed,
        });
        Ok(nodes)
    }
}

fn seconds_since(begun: Instant) -> String {
    format!("{:.1} s", begun.elapsed().as_secs_f64())
}

fn bail_if_stopped(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

/// The flag is set by the first SIGINT, SIGTERM or SIGHUP; the processes started here are in groups of their own, so
/// that Ctrl-C reaches this one only and everything is ended in order.
pub fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = Arc::new(AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let flag = Arc::clone(&stop);
    let inside = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    drop(inside);
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        flag.store(true, Ordering::Relaxed);
    })?;
    Ok(stop)
}

/// How a PostgreSQL server is told to end at once without waiting for its clients.
const FAST_SHUTDOWN: Signal = Signal::INT;
