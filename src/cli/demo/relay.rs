//! Relays as processes: this executable, started with a configuration file, asked over HTTP.
//!
//! Owns their configuration, start and end. Knows of a relay only what an operator can see.

use std::{
    env, fs,
    io::Write,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;

use crate::cli::demo::installation::isolate;
use crate::cli::demo::process::{Process, Scratch, free_addresses};
use crate::cli::demo::server::REPLICATION_USER;
use crate::cli::http;
use crate::wal::Lsn;

/// How long a relay may take until it can serve.
const READY_WAIT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
const HTTP_WAIT: Duration = Duration::from_secs(5);

/// What a relay is called and how it is set up.
#[derive(Clone, Debug)]
pub struct RelaySettings {
    name: String,
    slot: String,
    upstream: String,
    executable: Option<PathBuf>,
    downstream: toml::Table,
    store: toml::Table,
}

impl RelaySettings {
    /// A relay of that upstream, with a slot of its own name.
    pub fn new(name: &str, upstream: &str) -> Self {
        Self {
            name: name.to_owned(),
            slot: name.to_owned(),
            upstream: upstream.to_owned(),
            executable: None,
            downstream: toml::Table::new(),
            store: toml::Table::new(),
        }
    }

    /// Another slot than its name.
    #[must_use]
    pub fn slot(mut self, slot: &str) -> Self {
        slot.clone_into(&mut self.slot);
        self
    }

    /// Another executable than the running one.
    #[must_use]
    pub fn executable(mut self, executable: &Path) -> Self {
        self.executable = Some(executable.to_owned());
        self
    }

    /// One more setting of the section `[store]`.
    #[must_use]
    pub fn store(mut self, name: &str, value: &str) -> Self {
        self.store.insert(name.to_owned(), value.into());
        self
    }

    /// One more setting of the section `[downstream]`.
    #[must_use]
    pub fn downstream(mut self, name: &str, value: impl Into<toml::Value>) -> Self {
        self.downstream.insert(name.to_owned(), value.into());
        self
    }

    fn to_toml(&self, data_folder: &Path, listen: SocketAddr, admin: SocketAddr) -> String {
        let section = |pairs: &[(&str, String)]| {
            let pairs = pairs.iter().map(|(name, value)| ((*name).to_owned(), value.clone().into()));
            toml::Value::Table(pairs.collect())
        };
        let data_folder = data_folder.to_string_lossy().into_owned();
        let mut file = toml::Table::new();
        file.insert("relay".into(), section(&[("name", self.name.clone()), ("data_dir", data_folder)]));
        let upstream = [("conninfo", self.upstream.clone()), ("slot", self.slot.clone())];
        file.insert("upstream".into(), section(&upstream));
        let mut downstream = self.downstream.clone();
        downstream.insert("listen".into(), listen.to_string().into());
        file.insert("downstream".into(), toml::Value::Table(downstream));
        file.insert("admin".into(), section(&[("listen", admin.to_string())]));
        if !self.store.is_empty() {
            file.insert("store".into(), toml::Value::Table(self.store.clone()));
        }
        file.to_string()
    }
}

/// A running relay.
#[derive(Debug)]
pub struct Relay {
    process: Process,
    listen: SocketAddr,
    admin: SocketAddr,
    data_folder: PathBuf,
}

/// What a relay says it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelayPositions {
    /// End of the WAL that was checked and may be served.
    pub verified: Option<Lsn>,
    /// End of the WAL given to the operating system.
    pub written: Option<Lsn>,
    /// End of the WAL on stable storage.
    pub flushed: Option<Lsn>,
}

impl Relay {
    /// Starts it in a folder of its name, and waits until it can serve.
    pub fn start(scratch: &Scratch, settings: &RelaySettings) -> Result<Self> {
        let mut relay = Self::spawn(scratch, settings)?;
        relay.wait_until_ready()?;
        Ok(relay)
    }

    /// Starts it in a folder of its name, which may exist already, and does not wait.
    pub fn spawn(scratch: &Scratch, settings: &RelaySettings) -> Result<Self> {
        let [listen, admin] = free_addresses::<2>()?;
        let folder = scratch.path().join(&settings.name);
        fs::DirBuilder::new().mode(0o700).recursive(true).create(&folder)?;
        let data_folder = folder.join("data");
        // It may hold the upstream's password.
        let file = folder.join("walrelay.toml");
        fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&file)?
            .write_all(settings.to_toml(&data_folder, listen, admin).as_bytes())?;
        let executable = match &settings.executable {
            Some(executable) => executable.clone(),
            None => env::current_exe().context("could not find the running executable")?,
        };
        let mut command = Command::new(executable);
        isolate(&mut command);
        command.arg("run").arg("--config").arg(&file);
        let log = scratch.path().join(format!("{}.log", settings.name));
        let process = Process::start(&settings.name, command, Signal::TERM, &log)?;
        Ok(Self { process, listen, admin, data_folder })
    }

    /// Waits until `/readyz` says yes.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + READY_WAIT;
        loop {
            let why = match self.page("/readyz") {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            self.process.expect_running()?;
            if Instant::now() > deadline {
                return Err(why)
                    .with_context(|| format!("{} is not ready\n{}", self.name(), self.process.log_tail()));
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// What it is called here.
    pub fn name(&self) -> &str {
        self.process.name()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Where it serves WAL on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.listen.port()
    }

    /// Where it serves WAL.
    pub fn address(&self) -> SocketAddr {
        self.listen
    }

    /// Where it serves HTTP.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Its data directory.
    pub fn data_folder(&self) -> &Path {
        &self.data_folder
    }

    /// How a standby or another relay reaches it. Without a users file it trusts this machine.
    pub fn conninfo(&self) -> String {
        format!("host={} port={} user={REPLICATION_USER}", self.listen.ip(), self.listen.port())
    }

    /// An error with the end of its log, unless it runs.
    pub fn expect_running(&mut self) -> Result<()> {
        self.process.expect_running()
    }

    /// Ends it. Says how long that took.
    pub fn stop(&mut self) -> Result<Duration> {
        self.process.stop()
    }

    /// Its positions by `/status`.
    pub fn positions(&self) -> Result<RelayPositions> {
        let status: serde_json::Value = serde_json::from_str(&self.page("/status")?)?;
        let store = status.get("store").ok_or_else(|| anyhow!("no \"store\" in /status"))?;
        let position = |name: &str| store.get(name).and_then(|value| value.as_str()?.parse().ok());
        Ok(RelayPositions {
            verified: position("verified"),
            written: position("written"),
            flushed: position("flushed"),
        })
    }

    /// The body of a page; an answer other than 200 is an error.
    pub fn page(&self, path: &str) -> Result<String> {
        let request = http::Request { method: "GET", path, token: None, relay: None };
        let answer = request.send(self.admin, HTTP_WAIT)?;
        if answer.status != 200 {
            bail!("GET {path}: status {}: {}", answer.status, answer.body.trim_end());
        }
        Ok(answer.body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_quotes_whatever_a_conninfo_holds() {
        let settings =
            RelaySettings::new("relay_1", "host=h password='a\"\\b'").store("wal_keep_size", "1GB");
        let text =
            settings.to_toml(Path::new("/d"), "127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap());
        let file: toml::Table = text.parse().unwrap();
        assert_eq!(file["upstream"]["conninfo"].as_str(), Some("host=h password='a\"\\b'"));
        assert_eq!(file["relay"]["data_dir"].as_str(), Some("/d"));
        assert_eq!(file["downstream"]["listen"].as_str(), Some("127.0.0.1:1"));
        assert_eq!(file["store"]["wal_keep_size"].as_str(), Some("1GB"));
    }

    #[test]
    fn the_configuration_is_one_that_a_relay_takes() {
        let scratch = Scratch::create("walrelay-test").unwrap();
        let upstream = "host=127.0.0.1 port=5432 user=replicator password=secret";
        let settings = RelaySettings::new("relay_1", upstream).store("wal_keep_size", "64GB");
        let [listen, admin] = free_addresses::<2>().unwrap();
        let file = scratch.path().join("walrelay.toml");
        fs::write(&file, settings.to_toml(&scratch.path().join("data"), listen, admin)).unwrap();
        let config = crate::config::Config::load(&file).unwrap();
        assert_eq!(config.relay.name, "relay_1");
        assert_eq!(config.upstream.slot.as_deref(), Some("relay_1"));
        assert_eq!(config.store.wal_keep_size, 64 << 30);
    }
}
