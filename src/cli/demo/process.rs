//! Processes that end with their owner, the folder they live in, and the ports they listen on.
//!
//! Owns ending: a process is told to stop, then told to stop at once, then killed, always by the id of the child that
//! was started here. Never looks for processes by name.

use std::{
    env, fs,
    io::{self, Read, Seek, SeekFrom},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::cli::demo::installation::shown;

/// How long a process may take to end after each way of asking.
const STOP_WAIT: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// How much of a log is read to find its last lines.
const LOG_TAIL_BYTES: u64 = 4096;
const LOG_TAIL_LINES: usize = 12;

/// A child with its log; ended when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stop: Signal,
    log: PathBuf,
}

impl Process {
    /// Starts it with both outputs in the file `log`. `stop` is the signal that asks it to end.
    pub fn start(name: &str, mut command: Command, stop: Signal, log: &Path) -> Result<Self> {
        let file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("could not open {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("could not run {}", shown(&command)))?;
        Ok(Self { name: name.to_owned(), child, stop, log: log.to_owned() })
    }

    /// What it is called here.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, once it has ended.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// An error with the end of its log, unless it runs.
    pub fn expect_running(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => Err(anyhow!("{} ended ({status})\n{}", self.name, self.log_tail())),
        }
    }

    /// Waits for its end; anything but success is an error with the end of its log.
    pub fn expect_success(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        if !status.success() {
            bail!("{} ended ({status})\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    /// Asks it to end, and makes it. Says how long that took.
    pub fn stop(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        // The second signal is PostgreSQL's "immediate" and ends others too.
        for signal in [self.stop, Signal::QUIT, Signal::KILL] {
            self.signal(signal)?;
            let deadline = Instant::now() + STOP_WAIT;
            while Instant::now() < deadline {
                if self.ended()?.is_some() {
                    return Ok(begun.elapsed());
                }
                thread::sleep(POLL_INTERVAL);
            }
        }
        bail!("{} (process {}) cannot be ended", self.name, self.id())
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.ended()?.is_some() {
            return Ok(());
        }
        let id = i32::try_from(self.id()).ok().and_then(Pid::from_raw);
        let id = id.ok_or_else(|| anyhow!("{} has no process id", self.name))?;
        kill_process(id, signal).with_context(|| format!("could not signal {}", self.name))
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        let text = self.log_end();
        let lines: Vec<&str> = text.lines().collect();
        let shown = lines.get(lines.len().saturating_sub(LOG_TAIL_LINES)..).unwrap_or_default();
        shown.join("\n")
    }

    /// The last line of its log; empty without one.
    pub fn log_last_line(&self) -> String {
        self.log_end().lines().next_back().unwrap_or_default().to_owned()
    }

    fn log_end(&self) -> String {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = fs::File::open(&self.log)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
            let mut bytes = Vec::new();
            file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("{error:#}");
        }
    }
}

/// A temporary folder, removed with everything in it when dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    is_kept: AtomicBool,
}

impl Scratch {
    /// A new folder for temporary files.
    pub fn create(purpose: &str) -> Result<Self> {
        Self::create_below(&env::temp_dir(), purpose)
    }

    /// A new folder below `parent`. Others may pass through it, for the servers may run under another account, but
    /// not list it; each part within closes its own.
    pub fn create_below(parent: &Path, purpose: &str) -> Result<Self> {
        let path = parent.join(format!("{purpose}-{}-{}", std::process::id(), random_text()?));
        fs::DirBuilder::new()
            .mode(0o711)
            .create(&path)
            .with_context(|| format!("could not create {}", path.display()))?;
        // A strict umask would have taken the way through.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o711))?;
        Ok(Self { path, is_kept: AtomicBool::new(false) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// It will stay; says where.
    pub fn keep(&self) -> &Path {
        self.is_kept.store(true, Ordering::Relaxed);
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.is_kept.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("could not remove {}: {error}", self.path.display());
        }
    }
}

/// Loopback addresses that nobody listens on, all different.
pub fn free_addresses<const COUNT: usize>() -> Result<[SocketAddr; COUNT]> {
    // All are held until all are known, or the same one could come twice.
    let mut listeners = Vec::with_capacity(COUNT);
    let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); COUNT];
    for address in &mut addresses {
        let listener = TcpListener::bind(*address).context("could not find a free port on 127.0.0.1")?;
        *address = listener.local_addr()?;
        listeners.push(listener);
    }
    Ok(addresses)
}

/// 128 random bits as text: a name nobody can guess, or a password.
pub fn random_text() -> Result<String> {
    let mut bytes = [0_u8; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_unspecified| anyhow!("could not get random bytes"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_folder_goes_with_its_owner_unless_kept() {
        let scratch = Scratch::create("walrelay-test").unwrap();
        let path = scratch.path().to_owned();
        assert!(path.is_dir());
        drop(scratch);
        assert!(!path.exists());

        let kept = Scratch::create("walrelay-test").unwrap();
        let path = kept.keep().to_owned();
        drop(kept);
        assert!(path.is_dir());
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn a_process_that_ignores_the_first_signal_is_ended_by_the_next() {
        let scratch = Scratch::create("walrelay-test").unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo up; exec sleep 600"]);
        let mut process =
            Process::start("sleeper", command, Signal::TERM, &scratch.path().join("log")).unwrap();
        while process.log_last_line() != "up" {
            thread::sleep(POLL_INTERVAL);
        }
        process.expect_running().unwrap();
        process.stop().unwrap();
        assert!(process.expect_running().unwrap_err().to_string().starts_with("sleeper ended"));
    }

    #[test]
    fn free_addresses_differ() {
        let [first, second, third] = free_addresses::<3>().unwrap();
        assert!(first != second && second != third && first != third);
    }
}
