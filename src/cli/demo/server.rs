//! Throwaway PostgreSQL servers, and SQL sessions with them through psql.
//!
//! Owns making, starting and asking them. They listen on 127.0.0.1 only, want a password that is made for them, and are
//! made durable enough to be honest in a measurement (`fsync` stays on).

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader, Write as _},
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};

use crate::cli::demo::FAST_SHUTDOWN;
use crate::cli::demo::installation::{Installation, shown};
use crate::cli::demo::process::{Process, Scratch, free_addresses, random_text};
use crate::wal::{Lsn, lsn::parse_lsn_or_zero};

/// How long a server may take until it answers.
const START_WAIT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Printed by psql after each answer.
const END_OF_ANSWER: &str = "-- end of answer --";
/// The role that streams.
pub const REPLICATION_USER: &str = "replicator";
const SUPERUSER: &str = "postgres";

/// A running server.
#[derive(Debug)]
pub struct Server {
    process: Process,
    installation: Installation,
    address: SocketAddr,
    folder: PathBuf,
    logs: PathBuf,
    password: String,
}

/// What a server is called and how it is set up.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    name: String,
    settings: Vec<(String, String)>,
    /// Lines for pg_hba.conf before the general ones.
    admissions: Vec<String>,
}

impl ServerSettings {
    /// A server that can feed others.
    pub fn new(name: &str) -> Self {
        let none = Self { name: name.to_owned(), settings: Vec::new(), admissions: Vec::new() };
        none.set("listen_addresses", "127.0.0.1")
            .set("unix_socket_directories", "")
            .set("max_wal_senders", "40")
            .set("max_replication_slots", "80")
            .set("shared_buffers", "256MB")
            .set("cluster_name", name)
    }

    /// One more setting.
    #[must_use]
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// One more line of pg_hba.conf, before those that want a password.
    #[must_use]
    pub fn admit(mut self, line: &str) -> Self {
        self.admissions.push(line.to_owned());
        self
    }

    /// A standby of `conninfo`, through that slot.
    #[must_use]
    pub fn following(self, conninfo: &str, slot: &str) -> Self {
        let conninfo = format!("{conninfo} application_name={}", self.name);
        self.set("primary_conninfo", &conninfo).set("primary_slot_name", slot)
    }
}

impl Server {
    /// A new cluster, running, with the role that streams.
    pub fn create(installation: &Installation, scratch: &Scratch, settings: &ServerSettings) -> Result<Self> {
        let password = random_text()?;
        let folder = scratch.path().join(&settings.name);
        installation.make_folder(&folder)?;
        let data = folder.join("data");
        let password_file = folder.join("password");
        fs::write(&password_file, &password)?;
        fs::set_permissions(&password_file, fs::Permissions::from_mode(0o600))?;
        installation.give(&password_file)?;
        let mut initdb = installation.command("initdb");
        initdb.args(["--username", SUPERUSER, "--auth", "scram-sha-256", "--encoding", "UTF8"]);
        initdb
            .args(["--locale", "C", "--no-sync", "--pwfile"])
            .arg(&password_file)
            .arg("--pgdata")
            .arg(&data);
        run_to_end(initdb)?;
        let mut admissions = settings.admissions.join("\n");
        admissions.push_str(
            "\nhost all all 127.0.0.1/32 scram-sha-256\nhost replication all 127.0.0.1/32 scram-sha-256\n",
        );
        fs::write(data.join("pg_hba.conf"), admissions)?;
        let server = Self::start(installation, scratch, settings, password)?;
        let role = format!("CREATE ROLE {REPLICATION_USER} LOGIN REPLICATION PASSWORD '{}'", server.password);
        server.session()?.rows(&role)?;
        Ok(server)
    }

    /// A standby made by a base backup of this server, running. All its WAL comes by streaming.
    pub fn clone_standby(&self, scratch: &Scratch, settings: &ServerSettings) -> Result<Self> {
        self.back_up(scratch, &settings.name)?;
        Self::start(&self.installation, scratch, settings, self.password.clone())
    }

    /// A base backup that will start as a standby with `settings`, in the folder of that server.
    pub fn back_up(&self, scratch: &Scratch, name: &str) -> Result<()> {
        let folder = scratch.path().join(name);
        self.installation.make_folder(&folder)?;
        let mut backup = self.installation.command("pg_basebackup");
        backup.env("PGPASSWORD", &self.password).args(["--checkpoint", "fast", "--wal-method", "none"]);
        backup.args(["--no-sync", "--dbname", &self.conninfo(), "--pgdata"]).arg(folder.join("data"));
        run_to_end(backup)?;
        let signal = folder.join("data").join("standby.signal");
        fs::write(&signal, "")?;
        self.installation.give(&signal)
    }

    /// Starts the server whose cluster is already in its folder, and waits until it answers.
    pub fn start(
        installation: &Installation,
        scratch: &Scratch,
        settings: &ServerSettings,
        password: String,
    ) -> Result<Self> {
        let mut server = Self::spawn(installation, scratch, settings, password)?;
        server.wait_until_ready()?;
        Ok(server)
    }

    /// Starts the server whose cluster is already in its folder, and does not wait.
    pub fn spawn(
        installation: &Installation,
        scratch: &Scratch,
        settings: &ServerSettings,
        password: String,
    ) -> Result<Self> {
        let [address] = free_addresses::<1>()?;
        let folder = scratch.path().join(&settings.name);
        let mut command = installation.command("postgres");
        command.arg("-D").arg(folder.join("data")).arg("-p").arg(address.port().to_string());
        for (name, value) in &settings.settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let log = scratch.path().join(format!("{}.log", settings.name));
        let process = Process::start(&settings.name, command, FAST_SHUTDOWN, &log)?;
        let logs = scratch.path().to_owned();
        Ok(Self { process, installation: installation.clone(), address, folder, logs, password })
    }

    /// Waits until it takes connections.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_WAIT;
        while self.session().is_err() {
            self.process.expect_running()?;
            if Instant::now() > deadline {
                bail!("{} does not answer\n{}", self.name(), self.process.log_tail());
            }
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// What it is called here.
    pub fn name(&self) -> &str {
        self.process.name()
    }

    /// Where it listens on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its programs.
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// The password of both roles.
    pub fn password(&self) -> &str {
        &self.password
    }

    /// The process id of its postmaster.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Its data directory.
    pub fn data_folder(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// How a standby or a relay reaches it, with the password.
    pub fn conninfo(&self) -> String {
        let Self { address, password, .. } = self;
        format!("host={} port={} user={REPLICATION_USER} password={password}", address.ip(), address.port())
    }

    /// A SQL session as superuser.
    pub fn session(&self) -> Result<Session> {
        let mut psql = self.installation.command("psql");
        self.connect(&mut psql);
        let log = self.logs.join(format!("{}-sessions.log", self.name()));
        Session::start(psql, &log)
    }

    /// A client program working on this server as superuser, with its output in `log`.
    pub fn tool(&self, program: &str, log: &str, arguments: &[&str]) -> Result<Process> {
        let mut command = self.installation.command(program);
        self.connect(&mut command);
        command.args(arguments);
        Process::start(program, command, rustix::process::Signal::TERM, &self.logs.join(format!("{log}.log")))
    }

    /// Ends it by a fast shutdown. Says how long that took.
    pub fn stop(&mut self) -> Result<Duration> {
        self.process.stop()
    }

    fn connect(&self, command: &mut Command) {
        command
            .env("PGHOST", self.address.ip().to_string())
            .env("PGPORT", self.address.port().to_string())
            .env("PGUSER", SUPERUSER)
            .env("PGDATABASE", "postgres")
            .env("PGPASSWORD", &self.password);
    }
}

/// A psql that stays: one question, one answer.
#[derive(Debug)]
pub struct Session {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    log: PathBuf,
}

impl Session {
    fn start(mut psql: Command, log: &Path) -> Result<Self> {
        let errors = fs::OpenOptions::new().create(true).append(true).open(log)?;
        psql.args(["--no-psqlrc", "--no-align", "--tuples-only", "--quiet", "--no-password"]);
        psql.args(["--field-separator", "|", "--set", "ON_ERROR_STOP=1"]);
        psql.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let mut child = psql.spawn().context("could not run psql")?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("psql has no pipes");
        };
        let mut session = Self { child, input, output: BufReader::new(output), log: log.to_owned() };
        session.rows("SELECT 1")?;
        Ok(session)
    }

    /// The rows of the answer, their columns separated by `|`.
    pub fn rows(&mut self, sql: &str) -> Result<Vec<String>> {
        let ended = |log: &Path| {
            let text = fs::read_to_string(log).unwrap_or_default();
            anyhow!("psql ended: {}", text.lines().next_back().unwrap_or("it said nothing"))
        };
        let asked =
            writeln!(self.input, "{sql};\n\\echo '{END_OF_ANSWER}'").and_then(|()| self.input.flush());
        asked.map_err(|_broken_pipe| ended(&self.log))?;
        let mut rows = Vec::new();
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line)? == 0 {
                return Err(ended(&self.log)).with_context(|| format!("could not run \"{sql}\""));
            }
            let row = line.trim_end_matches('\n');
            if row == END_OF_ANSWER {
                return Ok(rows);
            }
            rows.push(row.to_owned());
        }
    }

    /// The only row of the answer.
    pub fn row(&mut self, sql: &str) -> Result<String> {
        let mut rows = self.rows(sql)?;
        match (rows.pop(), rows.is_empty()) {
            (Some(row), true) => Ok(row),
            _ => Err(anyhow!("\"{sql}\" did not answer with one row")),
        }
    }

    /// The LSN that is the answer; `None` for NULL.
    pub fn lsn(&mut self, sql: &str) -> Result<Option<Lsn>> {
        match self.row(sql)?.as_str() {
            "" => Ok(None),
            text => Ok(parse_lsn_or_zero(text)?),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It has nothing to lose, and nobody else has its id before it is waited for.
        let _already_ended = self.child.kill();
        let _status = self.child.wait();
    }
}

/// A slot that keeps WAL from now on, made by the replication command, on a server or a relay.
pub fn create_slot(installation: &Installation, conninfo: &str, password: &str, slot: &str) -> Result<()> {
    let mut psql = installation.command("psql");
    psql.env("PGPASSWORD", password).args(["--no-psqlrc", "--no-password", "--dbname"]);
    psql.arg(format!("{conninfo} dbname=postgres replication=true"));
    psql.arg("--command").arg(format!("CREATE_REPLICATION_SLOT {slot} PHYSICAL RESERVE_WAL"));
    run_to_end(psql)
}

/// Runs a program; anything but success is an error with what it said.
pub fn run_to_end(mut command: Command) -> Result<()> {
    let name = shown(&command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("could not run {name}"))?;
    if output.status.success() {
        return Ok(());
    }
    let mut said = String::from_utf8_lossy(&output.stderr).into_owned();
    if said.is_empty() {
        write!(said, "{}", String::from_utf8_lossy(&output.stdout))?;
    }
    bail!("{name} ended ({}): {}", output.status, said.trim_end())
}
