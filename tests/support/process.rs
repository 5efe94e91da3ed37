//! Child processes that never outlive the test, not even one that is killed.
//!
//! Every child is started by one thread that lives as long as this process, and asks the kernel for a signal at that
//! thread's death. Nothing is ever ended by name, only by the id of a child that is still ours.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use rustix::process::{Pid, Signal};

use super::wait::{wait_at_most, wait_for};

/// A running child with its output in a file.
pub(crate) struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts the program. Its output is appended to `log`.
    pub(crate) fn spawn(name: &str, program: &Program, log: &Path) -> Self {
        let output = File::options().create(true).append(true).open(log).unwrap();
        let mut command = program.command();
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
        let child = spawn_from_lasting_thread(command)
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        Self { child, name: name.to_owned(), log: log.to_owned() }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // The child is not reaped before `wait`, so its id cannot be another's.
        rustix::process::kill_process(self.pid(), signal).ok();
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// SIGKILL, and waits for the end.
    pub(crate) fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }

    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The exit status, if the process ends in time.
    pub(crate) fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        wait_at_most(limit, || self.child.try_wait().unwrap())
    }

    /// The exit status; panics with the log when the process does not end.
    pub(crate) fn wait_for_end(&mut self) -> ExitStatus {
        wait_for(&format!("the end of {}", self.name), || self.child.try_wait().unwrap())
    }

    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The end of the log, for the message of a failed test.
    pub(crate) fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(40);
        format!("--- end of the log of {}\n{}\n---", self.name, lines[from..].join("\n"))
    }

    /// Resident memory in bytes: a field of /proc/PID/status such as `RssAnon` or `VmRSS`.
    pub(crate) fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kilobytes = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        kilobytes.map_or(0, |kilobytes| kilobytes * 1024)
    }

    /// User and system time of all threads so far.
    pub(crate) fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let ticks: u64 = after_name
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok())
            .sum();
        Duration::from_millis(ticks * 10)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
    }
}

/// What to run, as whom, and which signal it gets when the test dies.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) user: Option<(u32, u32)>,
    pub(crate) signal_at_death: &'static str,
    /// Programs that replace themselves by the next: `prlimit --nofile=64`, `env LD_PRELOAD=...`.
    pub(crate) wrapper: Vec<String>,
    /// The same, but before it becomes another user: `ip netns exec near`.
    pub(crate) within: Vec<String>,
}

impl Program {
    pub(crate) fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            user: None,
            signal_at_death: "KILL",
            wrapper: Vec::new(),
            within: Vec::new(),
        }
    }

    pub(crate) fn arg(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    pub(crate) fn args<T: Into<String>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn for_server_user(mut self) -> Self {
        self.user = super::lab::server_user();
        self
    }

    /// Runs to the end and returns the output; panics when it fails.
    pub(crate) fn run(&self) -> String {
        let output = self
            .command()
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|error| panic!("{:?}: {error}", self.path));
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{:?} {:?}: {}\n{complaint}{}",
            self.path,
            self.arguments,
            output.status,
            String::from_utf8_lossy(&output.stdout)
        );
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    /// Whether it runs here and ends well; what it prints is lost.
    pub(crate) fn succeeds(&self) -> bool {
        self.command().stdin(Stdio::null()).output().is_ok_and(|output| output.status.success())
    }

    pub(crate) fn command(&self) -> Command {
        let mut outermost = self.within.iter().map(String::as_str).chain(["setpriv"]);
        let mut command = Command::new(outermost.next().unwrap_or("setpriv"));
        command.args(outermost);
        command.arg(format!("--pdeathsig={}", self.signal_at_death));
        if let Some((user, group)) = self.user {
            command.args([
                format!("--reuid={user}"),
                format!("--regid={group}"),
                "--clear-groups".to_owned(),
            ]);
        }
        command.arg("--").args(&self.wrapper).arg(&self.path).args(&self.arguments);
        if self.user.is_some() {
            // Not that of the person who runs the tests, which another user may not even look into.
            command.env("HOME", "/nonexistent");
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        // A libpq setting of the person who runs the tests must not reach the programs under test.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PG")) {
            if !self.environment.iter().any(|(own, _)| *own == name) {
                command.env_remove(name);
            }
        }
        command.env("LC_ALL", "C.UTF-8").current_dir("/");
        command
    }
}

type Job = (Command, SyncSender<std::io::Result<Child>>);

/// The signal at a parent's death is sent when the *thread* that started the child ends, and tests run in threads.
fn spawn_from_lasting_thread(command: Command) -> std::io::Result<Child> {
    static SPAWNER: LazyLock<SyncSender<Job>> = LazyLock::new(|| {
        let (jobs, received) = sync_channel::<Job>(16);
        std::thread::spawn(move || {
            for (mut command, reply) in received {
                drop(reply.send(command.spawn()));
            }
        });
        jobs
    });
    let (reply, answer) = sync_channel(1);
    SPAWNER.send((command, reply)).unwrap();
    answer.recv().unwrap()
}
