//! What is measured against: a primary with its WAL, a standby that was cloned before it, and the folder they live in.
//!
//! Owns the range of WAL that everybody receives. Everything in it is thrown away at the end.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use walrelay::cli::demo::{
    installation::Installation,
    process::{Process, Scratch},
    relay::{Relay, RelaySettings},
    server::{self, Server, ServerSettings, Session},
    stop_on_signals,
};
use walrelay::wal::{Lsn, LsnRange, SegmentNo, SegmentSize};

use crate::client::USER;
use crate::usage;

/// The slot that holds the whole range; receivers get copies of it.
const BASE_SLOT: &str = "base";
/// The backup that cascading standbys start from.
const PRISTINE: &str = "pristine";
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Nothing that is waited for takes longer, or it hangs.
const WAIT_MAX: Duration = Duration::from_secs(300);
/// Keeps all WAL of a run on every server.
pub(crate) const KEEP: &str = "64GB";
/// Rows per scale are 100,000; 20 make 300 MB of tables.
const SCALE: &str = "20";
const TRANSACTION_SECONDS: &str = "6";

pub(crate) struct Lab {
    pub(crate) session: Session,
    pub(crate) primary: Server,
    pub(crate) installation: Installation,
    pub(crate) relay_executable: PathBuf,
    /// What everybody receives; both ends are segment boundaries.
    pub(crate) range: LsnRange,
    pub(crate) scratch: Scratch,
    stop: Arc<AtomicBool>,
}

impl Lab {
    /// Starts a primary, clones a standby, and produces the WAL.
    pub(crate) fn create(parent: &Path, wal_bytes: u64, relay_executable: &Path) -> Result<Self> {
        let folder = std::env::var_os("WALRELAY_BENCH_PG").map(PathBuf::from);
        let installation = Installation::find(folder.as_deref())?;
        let stop = stop_on_signals()?;
        let scratch = Scratch::create_below(parent, "walrelay-bench")?;
        let settings = ServerSettings::new("primary")
            .set("wal_keep_size", KEEP)
            .set("max_wal_size", KEEP)
            .set("checkpoint_timeout", "1h")
            // Nothing but what is measured writes WAL.
            .set("autovacuum", "off")
            .admit(&format!("host postgres {USER} 127.0.0.1/32 trust"))
            .admit(&format!("host replication {USER} 127.0.0.1/32 trust"));
        let primary = Server::create(&installation, &scratch, &settings)?;
        let mut session = primary.session()?;
        session.rows(&format!("CREATE ROLE {USER} LOGIN REPLICATION"))?;
        session.rows("CREATE TABLE bench_commits (number bigint)")?;
        session.rows(&format!("GRANT INSERT ON bench_commits TO {USER}"))?;
        primary.back_up(&scratch, PRISTINE)?;
        // Its restart_lsn is the redo point of the last checkpoint, which is the backup's: both begin together.
        let made = session
            .row(&format!("SELECT lsn FROM pg_create_physical_replication_slot('{BASE_SLOT}', true)"))?;
        let reserved: Lsn = made.parse().context("the slot reserves no WAL")?;
        let start = SegmentNo::holding(reserved, SegmentSize::DEFAULT).start(SegmentSize::DEFAULT);
        let start = start.ok_or_else(|| anyhow!("the slot reserves the first segment"))?;
        let relay_executable = relay_executable.to_owned();
        let range = LsnRange::new(start, start.advance(1)).ok_or_else(|| anyhow!("no WAL"))?;
        let mut lab = Self { session, primary, installation, relay_executable, range, scratch, stop };
        lab.produce(wal_bytes)?;
        Ok(lab)
    }

    /// An error once a signal came; what runs is ended on the way out.
    pub(crate) fn check(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Waits until `is_done`, with an error when it takes far too long.
    pub(crate) fn wait(
        &mut self,
        what: &str,
        mut is_done: impl FnMut(&mut Self) -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + WAIT_MAX;
        while !is_done(self)? {
            self.check()?;
            if Instant::now() > deadline {
                bail!("{what}: nothing after {} s", WAIT_MAX.as_secs());
            }
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Waits for a process that ends by itself; gives its CPU time.
    pub(crate) fn wait_for_end(&mut self, process: &mut Process) -> Result<Duration> {
        while !usage::has_ended(process.id())? {
            self.check()?;
            thread::sleep(Duration::from_millis(1));
        }
        let cpu = usage::cpu_of(process.id())?;
        process.expect_success()?;
        Ok(cpu)
    }

    /// A slot that begins where the range begins.
    pub(crate) fn slot(&mut self, name: &str) -> Result<()> {
        self.session.rows(&format!("SELECT pg_copy_physical_replication_slot('{BASE_SLOT}', '{name}')"))?;
        Ok(())
    }

    /// Drops it, once nobody uses it any more.
    pub(crate) fn drop_slot(&mut self, name: &str) -> Result<()> {
        let is_active = format!("SELECT active FROM pg_replication_slots WHERE slot_name = '{name}'");
        self.wait("a slot to be released", |lab| Ok(lab.session.row(&is_active)? == "f"))?;
        self.session.rows(&format!("SELECT pg_drop_replication_slot('{name}')"))?;
        Ok(())
    }

    /// What the receiver of that name has acknowledged as flushed to the primary.
    pub(crate) fn flushed_by(&mut self, receiver: &str) -> Result<Option<Lsn>> {
        let query =
            format!("SELECT max(flush_lsn) FROM pg_stat_replication WHERE application_name = '{receiver}'");
        self.session.lsn(&query)
    }

    /// Whether a receiver of that name streams.
    pub(crate) fn is_attached(&mut self, receiver: &str) -> Result<bool> {
        let query = format!("SELECT count(*) FROM pg_stat_replication WHERE application_name = '{receiver}'");
        Ok(self.session.row(&query)? != "0")
    }

    /// Everything written so far is on the disk, so that nobody pays for it later.
    pub(crate) fn settle(&self) {
        rustix::fs::sync();
    }

    /// A standby at the beginning of the range, cloned but not started.
    pub(crate) fn prepare_standby(&mut self, name: &str) -> Result<ServerSettings> {
        let (pristine, copy) = (self.scratch.path().join(PRISTINE), self.scratch.path().join(name));
        let mut command = Command::new("cp");
        command.arg("--archive").arg(&pristine).arg(&copy);
        server::run_to_end(command)?;
        self.slot(name)?;
        let conninfo = self.trusted_conninfo();
        Ok(ServerSettings::new(name)
            .set("wal_keep_size", KEEP)
            .set("max_wal_size", KEEP)
            .set("checkpoint_timeout", "1h")
            .following(&conninfo, name))
    }

    pub(crate) fn spawn_standby(&self, settings: &ServerSettings) -> Result<Server> {
        Server::spawn(&self.installation, &self.scratch, settings, self.primary.password().to_owned())
    }

    /// A relay at the beginning of the range, not started.
    pub(crate) fn prepare_relay(&mut self, name: &str) -> Result<RelaySettings> {
        self.slot(name)?;
        let settings = RelaySettings::new(name, &self.trusted_conninfo());
        Ok(settings.executable(&self.relay_executable))
    }

    pub(crate) fn spawn_relay(&self, settings: &RelaySettings) -> Result<Relay> {
        Relay::spawn(&self.scratch, settings)
    }

    fn trusted_conninfo(&self) -> String {
        format!("host=127.0.0.1 port={} user={USER}", self.primary.port())
    }

    pub(crate) fn position(&mut self) -> Result<Lsn> {
        self.session
            .lsn("SELECT pg_current_wal_insert_lsn()")?
            .ok_or_else(|| anyhow!("the primary has no WAL"))
    }

    /// Up to where the primary sends.
    pub(crate) fn flushed_position(&mut self) -> Result<Lsn> {
        self.session
            .lsn("SELECT pg_current_wal_flush_lsn()")?
            .ok_or_else(|| anyhow!("the primary has no WAL"))
    }

    /// pgbench's tables, its TPC-B transactions after checkpoints (so with full-page images), and index builds.
    fn produce(&mut self, wal_bytes: u64) -> Result<()> {
        println!(
            "producing {:.1} GB of WAL: pgbench's tables, TPC-B after checkpoints, index builds",
            gigabytes(wal_bytes)
        );
        let start = self.range.start();
        self.run_pgbench(&["--initialize", "--quiet", "--scale", SCALE])?;
        while self.position()?.bytes_since(start) < wal_bytes {
            self.session.rows("CHECKPOINT")?;
            self.run_pgbench(&["--client", "8", "--time", TRANSACTION_SECONDS, "--no-vacuum"])?;
            self.session.rows("CREATE INDEX bench_balance ON pgbench_accounts (abalance, aid)")?;
            self.session.rows("CREATE INDEX bench_history ON pgbench_history (mtime, aid)")?;
            self.session.rows("DROP INDEX bench_balance, bench_history")?;
        }
        self.session.rows("CHECKPOINT")?;
        let switched = self.session.lsn("SELECT pg_switch_wal()")?.ok_or_else(|| anyhow!("no WAL"))?;
        let end = SegmentNo::ending_at(switched, SegmentSize::DEFAULT).end(SegmentSize::DEFAULT);
        self.range = LsnRange::new(start, end).ok_or_else(|| anyhow!("no WAL was produced"))?;
        // Something after the range, so that its end is not the end of all WAL.
        self.session.rows("INSERT INTO bench_commits VALUES (0)")?;
        Ok(())
    }

    pub(crate) fn run_pgbench(&mut self, arguments: &[&str]) -> Result<()> {
        // How fast it commits is not what is measured.
        self.session.rows("ALTER SYSTEM SET synchronous_commit = off")?;
        self.session.rows("SELECT pg_reload_conf()")?;
        let mut pgbench = self.primary.tool("pgbench", "pgbench", arguments)?;
        self.wait_for_end(&mut pgbench)?;
        self.session.rows("ALTER SYSTEM RESET synchronous_commit")?;
        self.session.rows("SELECT pg_reload_conf()")?;
        Ok(())
    }
}

pub(crate) fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

pub(crate) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
