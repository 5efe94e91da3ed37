//! PostgreSQL clusters: primaries from a cached template, standbys from a base backup, started and stopped in all ways.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use super::lab::{self, Installation};
use super::lsn;
use super::process::{Process, Program};
use super::raw::{RawClient, ServerError};
use super::wait::{wait_for, wait_until};

/// A cluster and its postmaster, which may be down.
pub(crate) struct Postgres {
    pub(crate) installation: Installation,
    pub(crate) port: u16,
    folder: TempDir,
    postmaster: Option<Process>,
    /// The network namespace it runs in.
    namespace: Option<String>,
}

/// How a server is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    Smart,
    Fast,
    Immediate,
    /// SIGKILL to the postmaster and all its children.
    Kill,
}

/// What a new primary should be like.
pub(crate) struct Settings {
    segment_size_mb: u64,
    lines: Vec<String>,
    fresh_identity: bool,
    namespace: Option<String>,
}

impl Settings {
    pub(crate) fn new() -> Self {
        Self { segment_size_mb: 16, lines: Vec::new(), fresh_identity: false, namespace: None }
    }

    pub(crate) fn segment_size_mb(mut self, size: u64) -> Self {
        self.segment_size_mb = size;
        self
    }

    /// A line of postgresql.conf.
    pub(crate) fn line(mut self, line: &str) -> Self {
        self.lines.push(line.to_owned());
        self
    }

    /// A system identifier of its own; clusters from the template share one.
    pub(crate) fn fresh_identity(mut self) -> Self {
        self.fresh_identity = true;
        self
    }

    /// In a network namespace.
    pub(crate) fn within(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.to_owned());
        self
    }

    pub(crate) fn start(self, installation: &Installation) -> Postgres {
        let folder = lab::scratch();
        let data = folder.path().join("data");
        if self.fresh_identity {
            initdb(installation, self.segment_size_mb, &data);
        } else {
            copy_folder(&template(installation, self.segment_size_mb), &data);
        }
        let mut postgres = Postgres {
            installation: installation.clone(),
            port: lab::free_port(),
            folder,
            postmaster: None,
            namespace: self.namespace.clone(),
        };
        postgres.add_settings(COMMON_SETTINGS);
        postgres.add_settings(&self.lines.join("\n"));
        postgres.place();
        postgres.start();
        postgres
    }
}

/// Quick, quiet and with WAL kept for the oracles. Not durable: a primary here never loses power, only its processes.
const COMMON_SETTINGS: &str = "\
listen_addresses = '127.0.0.1'
fsync = off
wal_level = replica
max_wal_senders = 20
max_replication_slots = 20
max_connections = 40
shared_buffers = 32MB
wal_keep_size = 4GB
max_wal_size = 512MB
autovacuum = off
jit = off
log_replication_commands = on
log_connections = on
log_line_prefix = '%m [%p] %a '
wal_retrieve_retry_interval = 200ms
";

impl Postgres {
    /// A primary with the common settings.
    pub(crate) fn primary(installation: &Installation) -> Self {
        Settings::new().start(installation)
    }

    /// A server that somebody else makes and runs, in this folder and at this port.
    pub(crate) fn run_by_others(installation: &Installation) -> Self {
        let folder = lab::scratch();
        lab::give_to_server(folder.path());
        Self {
            installation: installation.clone(),
            port: lab::free_port(),
            folder,
            postmaster: None,
            namespace: None,
        }
    }

    /// A standby made from this primary by a base backup, streaming from `upstream_port`; `settings` are extra lines.
    pub(crate) fn standby(&self, name: &str, upstream_port: u16, settings: &str) -> Self {
        let conninfo = format!(
            "host=127.0.0.1 port={upstream_port} user=postgres application_name={name} sslmode=disable"
        );
        self.standby_by(&conninfo, settings, None)
    }

    /// The same by any connection string, and in a network namespace.
    pub(crate) fn standby_by(&self, primary_conninfo: &str, settings: &str, namespace: Option<&str>) -> Self {
        let folder = lab::scratch();
        lab::give_to_server(folder.path());
        let data = folder.path().join("data");
        Program::new(self.installation.program("pg_basebackup"))
            .args([
                "-D",
                data.to_str().unwrap(),
                "-d",
                &self.conninfo(),
                "-c",
                "fast",
                "-X",
                "fetch",
                "--no-sync",
            ])
            .for_server_user()
            .run();
        let mut standby = Self {
            installation: self.installation.clone(),
            port: lab::free_port(),
            folder,
            postmaster: None,
            namespace: namespace.map(str::to_owned),
        };
        standby
            .add_settings(&format!("primary_conninfo = '{primary_conninfo}'\nhot_standby = on\n{settings}"));
        std::fs::write(data.join("standby.signal"), "").unwrap();
        standby.place();
        standby.start();
        standby
    }

    /// Appends lines to postgresql.conf; they hold from the next start or reload.
    pub(crate) fn add_settings(&self, lines: &str) {
        let path = self.data().join("postgresql.conf");
        let mut text = std::fs::read_to_string(&path).unwrap();
        writeln!(text, "{lines}").unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn place(&self) {
        self.add_settings(&format!(
            "port = {}\nunix_socket_directories = '{}'",
            self.port,
            self.folder.path().display()
        ));
        lab::give_all_to_server(self.folder.path());
    }

    pub(crate) fn start(&mut self) {
        self.launch();
        wait_until("PostgreSQL to accept connections", || {
            assert!(
                self.postmaster.as_mut().is_some_and(Process::is_running),
                "PostgreSQL ended:\n{}",
                self.log()
            );
            RawClient::sql(self.port).is_ok()
        });
    }

    /// Starts the postmaster and waits for nothing.
    pub(crate) fn launch(&mut self) {
        assert!(self.postmaster.is_none(), "already started");
        let mut program = Program::new(self.installation.program("postgres"))
            .args(["-D", self.data().to_str().unwrap()])
            .for_server_user();
        program.signal_at_death = "QUIT"; // an immediate shutdown takes the children along
        if let Some(namespace) = &self.namespace {
            super::place::put(self.port, namespace);
            program.within = super::place::wrapper(namespace);
        }
        self.postmaster = Some(Process::spawn("postgres", &program, &self.log_path()));
    }

    /// Stops the server and returns how long that took.
    pub(crate) fn stop(&mut self, how: Stop) -> Duration {
        let started = std::time::Instant::now();
        let mut postmaster = self.postmaster.take().expect("started");
        match how {
            Stop::Smart => postmaster.signal(Signal::TERM),
            Stop::Fast => postmaster.signal(Signal::INT),
            Stop::Immediate => postmaster.signal(Signal::QUIT),
            Stop::Kill => {
                postmaster.kill();
                // The next postmaster refuses to start while a child still has the shared memory.
                let data = self.data().canonicalize().unwrap();
                wait_until("the children of a killed postmaster to be gone", || {
                    let left = processes_in(&data);
                    left.iter().copied().for_each(kill);
                    left.is_empty()
                });
                std::fs::remove_file(self.data().join("postmaster.pid")).unwrap();
            }
        }
        postmaster.wait_for_end();
        started.elapsed()
    }

    pub(crate) fn restart(&mut self, how: Stop) {
        self.stop(how);
        self.start();
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.postmaster.as_mut().is_some_and(Process::is_running)
    }

    pub(crate) fn postmaster(&self) -> &Process {
        self.postmaster.as_ref().expect("started")
    }

    /// Asks the postmaster to read its settings again.
    pub(crate) fn reload(&self) {
        self.postmaster().signal(Signal::HUP);
    }

    /// Puts lines before those of pg_hba.conf, and waits until they hold; what they ask of `user` cannot be trust.
    pub(crate) fn demand(&self, rules: &str, user: &str) {
        let path = self.data().join("pg_hba.conf");
        let rest = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, format!("{rules}\n{rest}")).unwrap();
        self.reload();
        wait_until("the rules to hold", || {
            let mut client = RawClient::connect(self.port).unwrap();
            client.send_startup(&[("user", user), ("replication", "true")]).unwrap();
            let answer = client.read_message(Duration::from_secs(10)).unwrap();
            answer.is_some_and(|answer| answer.kind == b'E' || answer.body[..] != 0_u32.to_be_bytes())
        });
    }

    /// Folder of the Unix socket.
    pub(crate) fn socket_folder(&self) -> &Path {
        self.folder.path()
    }

    /// Makes this server, which is down, a standby of the server at this port; it is not started.
    pub(crate) fn make_standby_of(&self, upstream_port: u16, name: &str) {
        self.add_settings(&format!(
            "primary_conninfo = 'host=127.0.0.1 port={upstream_port} user=postgres application_name={name} sslmode=disable'\nhot_standby = on\nrecovery_target_timeline = 'latest'"
        ));
        std::fs::write(self.data().join("standby.signal"), "").unwrap();
        lab::give_all_to_server(&self.data().join("standby.signal"));
        lab::give_all_to_server(&self.data().join("postgresql.conf"));
    }

    /// Stops this server, takes what it has alone back to where the source forked off, and leaves it down.
    pub(crate) fn rewind_to(&mut self, source: &Self) {
        self.stop(Stop::Fast);
        // pg_rewind goes by the source's last checkpoint.
        source.checkpoint();
        Program::new(self.installation.program("pg_rewind"))
            .args(["-D", self.data().to_str().unwrap(), "--source-server", &source.conninfo()])
            .for_server_user()
            .run();
        // What it wrote over came from the source.
        self.add_settings(&format!(
            "port = {}\nunix_socket_directories = '{}'",
            self.port,
            self.socket_folder().display()
        ));
    }

    /// The timeline that this primary writes.
    pub(crate) fn timeline(&self) -> u32 {
        let name = self.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
        u32::from_str_radix(&name[..8], 16).unwrap()
    }

    pub(crate) fn promote(&self) {
        self.sql("select pg_promote(true, 60)");
    }

    /// The first value of the first row, empty if there is none or it is NULL. Panics on an error.
    pub(crate) fn sql(&self, query: &str) -> String {
        self.try_sql(query).unwrap_or_else(|error| panic!("{query}: {error:?}"))
    }

    pub(crate) fn try_sql(&self, query: &str) -> Result<String, ServerError> {
        let down =
            |error: std::io::Error| ServerError { message: error.to_string(), ..ServerError::default() };
        let rows = RawClient::sql(self.port).map_err(down)?.rows(query)?;
        Ok(rows.into_iter().next().and_then(|row| row.into_iter().next().flatten()).unwrap_or_default())
    }

    /// Waits until the query answers `expected`. An error counts as another answer.
    pub(crate) fn wait_for_sql(&self, query: &str, expected: &str) {
        let mut last = String::new();
        let answered = super::wait::wait_at_most(super::wait::PATIENCE, || {
            last = self.try_sql(query).unwrap_or_else(|error| format!("{error:?}"));
            (last == expected).then_some(())
        });
        assert!(answered.is_some(), "waited in vain for {query} to answer {expected}; it answers {last}");
    }

    /// End of what this server has flushed.
    pub(crate) fn flushed(&self) -> u64 {
        lsn(&self.sql("select pg_current_wal_flush_lsn()"))
    }

    /// Where the next record goes.
    pub(crate) fn insert_position(&self) -> u64 {
        lsn(&self.sql("select pg_current_wal_insert_lsn()"))
    }

    /// What this standby has replayed.
    pub(crate) fn replayed(&self) -> u64 {
        self.try_sql("select pg_last_wal_replay_lsn()")
            .ok()
            .filter(|text| !text.is_empty())
            .map_or(0, |text| lsn(&text))
    }

    /// Waits until this standby has replayed `position`.
    pub(crate) fn wait_replayed(&self, position: u64) {
        let what = format!("replay of {}", super::lsn_text(position));
        wait_for(&what, || (self.replayed() >= position).then_some(()));
    }

    /// The highest flush position that a standby of this name (or any, if empty) reports to this server.
    pub(crate) fn reported_flush(&self, application_name: &str) -> u64 {
        let query = format!(
            "select coalesce(max(flush_lsn), '0/0') from pg_stat_replication where application_name = '{application_name}' or '{application_name}' = ''"
        );
        self.try_sql(&query).map_or(0, |text| lsn(&text))
    }

    pub(crate) fn wait_reported_flush(&self, application_name: &str, position: u64) {
        let what = format!("{application_name} to report flush {}", super::lsn_text(position));
        wait_for(&what, || (self.reported_flush(application_name) >= position).then_some(()));
    }

    pub(crate) fn conninfo(&self) -> String {
        if self.namespace.is_some() {
            let folder = self.folder.path().display();
            return format!("host={folder} port={} user=postgres dbname=postgres", self.port);
        }
        format!("host=127.0.0.1 port={} user=postgres dbname=postgres sslmode=disable", self.port)
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub(crate) fn wal_dir(&self) -> PathBuf {
        self.data().join("pg_wal")
    }

    pub(crate) fn segment_bytes(&self) -> u64 {
        self.sql("select setting from pg_settings where name = 'wal_segment_size'").parse().unwrap()
    }

    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// Positions at which a client of this name asked to start, in order, from this server's log.
    pub(crate) fn replication_starts(&self, application_name: &str) -> Vec<u64> {
        let log = self.log();
        let lines = log.lines().filter(|line| line.contains(&format!("] {application_name} ")));
        let commands =
            lines.filter_map(|line| line.split_once("START_REPLICATION ").map(|(_, command)| command));
        commands
            .filter_map(|command| command.split_whitespace().find(|word| word.contains('/')).map(lsn))
            .collect()
    }

    /// Drops the settings of the template that slow a checkpoint or a backup down.
    pub(crate) fn checkpoint(&self) {
        self.sql("checkpoint");
    }

    /// Ends the current segment with XLOG_SWITCH.
    pub(crate) fn switch_wal(&self) -> u64 {
        lsn(&self.sql("select pg_switch_wal()"))
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(postmaster) = &mut self.postmaster {
            postmaster.signal(Signal::QUIT);
            postmaster.wait(Duration::from_secs(10));
        }
        if std::env::var_os("WALRELAY_KEEP").is_some() {
            self.folder.disable_cleanup(true);
            eprintln!("kept {}", self.folder.path().display());
        }
    }
}

/// The data directory of a new cluster of this major and segment size, made once for all tests.
fn template(installation: &Installation, segment_size_mb: u64) -> PathBuf {
    let folder = lab::lab().join("templates");
    std::fs::create_dir_all(&folder).unwrap();
    let version = Program::new(installation.program("postgres")).arg("--version").run();
    let version: String = version.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '.').collect();
    let template = folder.join(format!("{version}-{segment_size_mb}MB"));
    let lock = std::fs::File::create(folder.join("lock")).unwrap();
    lock.lock().unwrap(); // other test processes want it at the same moment
    if !template.exists() {
        let fresh = lab::scratch();
        let data = fresh.path().join("data");
        initdb(installation, segment_size_mb, &data);
        let half_copied = folder.join("incomplete");
        drop(std::fs::remove_dir_all(&half_copied));
        copy_folder(&data, &half_copied);
        std::fs::rename(half_copied, &template).unwrap();
    }
    template
}

fn initdb(installation: &Installation, segment_size_mb: u64, data: &Path) {
    lab::give_to_server(data.parent().unwrap());
    Program::new(installation.program("initdb"))
        .args([
            "-D",
            data.to_str().unwrap(),
            "-A",
            "trust",
            "-U",
            "postgres",
            "-N",
            "-E",
            "UTF8",
            "--locale=C",
        ])
        .arg(format!("--wal-segsize={segment_size_mb}"))
        .for_server_user()
        .run();
}

pub(crate) fn copy_folder(from: &Path, to: &Path) {
    let status =
        Command::new("cp").args(["-a", "--reflink=auto", "--sparse=auto"]).args([from, to]).status().unwrap();
    assert!(status.success(), "cp {} {}", from.display(), to.display());
}

fn kill(id: i32) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(id).unwrap(), Signal::KILL).ok();
}

/// Processes whose working directory is the folder: of a cluster's data these are its own.
fn processes_in(folder: &Path) -> Vec<i32> {
    let ids = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.filter(|id: &i32| std::fs::read_link(format!("/proc/{id}/cwd")).is_ok_and(|place| place == folder))
        .collect()
}
