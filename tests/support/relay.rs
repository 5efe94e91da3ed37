//! The relay as a process: its settings, its start, its status, its ends.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::faults::Faults;
use super::process::{Process, Program};
use super::raw::RawClient;
use super::wait::{wait_for, wait_until};
use super::{http, lab, lsn, lsn_text};

/// A relay with its folder, which stays across restarts. It may be down.
pub(crate) struct Relay {
    pub(crate) port: u16,
    pub(crate) admin_port: u16,
    name: String,
    data_dir: PathBuf,
    settings: BTreeMap<String, String>,
    process: Option<Process>,
    pub(crate) environment: Vec<(String, String)>,
    /// Programs that replace themselves by the relay, such as `prlimit --nofile=64`.
    pub(crate) wrapper: Vec<String>,
    /// The network namespace it runs in.
    namespace: Option<String>,
    /// What the admin listener wants to see.
    token: Option<&'static str>,
    folder: Arc<TempDir>,
}

impl Relay {
    /// A relay that would stream from this port under this name, not started yet.
    pub(crate) fn new(name: &str, upstream_port: u16) -> Self {
        let folder = Arc::new(lab::scratch());
        let mut relay = Self {
            port: lab::free_port(),
            admin_port: lab::free_port(),
            name: name.to_owned(),
            data_dir: folder.path().join("relay"),
            settings: BTreeMap::new(),
            process: None,
            environment: Vec::new(),
            wrapper: Vec::new(),
            namespace: None,
            token: None,
            folder,
        };
        relay.set("relay.name", &format!("{name:?}"));
        relay.set(
            "upstream.conninfo",
            &format!("\"host=127.0.0.1 port={upstream_port} user=postgres sslmode=disable\""),
        );
        relay.set("upstream.slot", &format!("{name:?}"));
        relay.set("downstream.listen", &format!("\"127.0.0.1:{}\"", relay.port));
        relay.set("upstream.wal_retrieve_retry_interval", "\"200ms\"");
        relay.set("admin.listen", &format!("\"127.0.0.1:{}\"", relay.admin_port));
        let data_dir = relay.data_dir.clone();
        relay.with_data_dir(&data_dir)
    }

    /// Starts a relay and waits until it streams.
    pub(crate) fn streaming_from(name: &str, upstream_port: u16) -> Self {
        let mut relay = Self::new(name, upstream_port);
        relay.start();
        relay
    }

    /// In a network namespace.
    pub(crate) fn within(mut self, namespace: &str) -> Self {
        super::place::put(self.port, namespace);
        super::place::put(self.admin_port, namespace);
        self.namespace = Some(namespace.to_owned());
        self
    }

    /// A setting as `section.key` with its value in TOML.
    pub(crate) fn set(&mut self, key: &str, value: &str) {
        self.settings.insert(key.to_owned(), value.to_owned());
    }

    /// The connection string, as in a primary_conninfo.
    pub(crate) fn with_conninfo(mut self, conninfo: &str) -> Self {
        self.set("upstream.conninfo", &format!("{conninfo:?}"));
        self
    }

    /// From the server at this port, which may be a standby.
    pub(crate) fn with_standby_at(self, port: u16) -> Self {
        let server = format!("host=127.0.0.1 port={port} user=postgres sslmode=disable");
        self.with_conninfo(&format!("{server} target_session_attrs=any"))
    }

    pub(crate) fn unset(&mut self, key: &str) {
        self.settings.remove(key);
    }

    pub(crate) fn with(mut self, key: &str, value: &str) -> Self {
        self.set(key, value);
        self
    }

    pub(crate) fn with_data_dir(mut self, data_dir: &Path) -> Self {
        self.data_dir = data_dir.to_owned();
        self.set("relay.data_dir", &format!("{:?}", data_dir.to_str().unwrap()));
        self
    }

    /// A token that the admin listener wants, and that this harness shows it.
    pub(crate) fn with_token(mut self) -> Self {
        let path = self.file("token", 0o600, TOKEN);
        self.set("admin.token_file", &format!("{path:?}"));
        self.token = Some(TOKEN);
        self
    }

    /// A file for this relay alone, in its folder. Returns its path.
    pub(crate) fn write_file(&self, name: &str, text: &str) -> PathBuf {
        self.file(name, 0o600, text)
    }

    /// Where such a file is.
    pub(crate) fn file_path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What the admin listener wants to see, if anything.
    pub(crate) fn token(&self) -> Option<&'static str> {
        self.token
    }

    /// Writes a file beside the configuration, with these permissions. Returns its path.
    pub(crate) fn file(&self, name: &str, mode: u32, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    /// Status and JSON of an answer to `POST`; `None` when nobody answers.
    pub(crate) fn post(&self, path: &str) -> Option<(u16, Value)> {
        let request = format!("POST {path}");
        let (status, body) = http::ask(self.admin_port, &request, self.token, Duration::from_secs(40))?;
        Some((status, serde_json::from_str(&body).unwrap_or(Value::Null)))
    }

    /// The same with a body.
    pub(crate) fn post_json(&self, path: &str, body: &str) -> Option<(u16, Value)> {
        let (request, patience) = (format!("POST {path}"), Duration::from_secs(5));
        let (status, body) = http::ask_with(self.admin_port, &request, self.token, body, patience)?;
        Some((status, serde_json::from_str(&body).unwrap_or(Value::Null)))
    }

    /// Fences it, and returns the end of WAL that it states.
    pub(crate) fn fence(&self) -> u64 {
        let (status, told) = self.post("/fence").expect("an answer");
        assert!(status == 200 && told["fenced"] == true, "{status} {told}");
        lsn(told["flushed"].as_str().unwrap())
    }

    /// Takes the fence away.
    pub(crate) fn unfence(&self) {
        let (status, told) = self.post("/unfence").expect("an answer");
        assert!(status == 200 && told["fenced"] == false, "{status} {told}");
    }

    /// Faults on demand for the files of this relay.
    pub(crate) fn with_faults(mut self, faults: &Faults) -> Self {
        self.environment.extend(faults.environment(&self.data_dir));
        self
    }

    /// Starts the process and waits until it is ready.
    pub(crate) fn start(&mut self) {
        self.launch();
        self.wait_ready();
    }

    /// Starts the process and waits for nothing.
    pub(crate) fn launch(&mut self) {
        assert!(self.process.is_none(), "already started");
        let config = self.write_config();
        let mut program = Program::new(binary()).args(["run", "--config", config.to_str().unwrap()]);
        program.environment.clone_from(&self.environment);
        program.wrapper.clone_from(&self.wrapper);
        program.within = self.namespace.as_deref().map(super::place::wrapper).unwrap_or_default();
        self.process = Some(Process::spawn(&self.name, &program, &self.log_path()));
    }

    /// The settings as a file. Returns its path.
    pub(crate) fn write_config(&self) -> PathBuf {
        let mut text = String::new();
        let mut section = "";
        for (key, value) in &self.settings {
            let (of, key) = key.rsplit_once('.').unwrap();
            if of != section {
                writeln!(text, "[{of}]").unwrap();
                section = of;
            }
            writeln!(text, "{key} = {value}").unwrap();
        }
        let path = self.folder.path().join("walrelay.toml");
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Waits until it serves, and its upstream streams or has streamed.
    pub(crate) fn wait_ready(&mut self) {
        wait_until("the relay to be ready and to have streamed", || {
            self.assert_running();
            self.is_ready() && self.status()["upstream"]["sessions"].as_u64() > Some(0)
        });
    }

    /// Waits until the relay serves, whether or not it has an upstream.
    pub(crate) fn wait_serving(&mut self) {
        wait_until("the relay to serve", || {
            self.assert_running();
            RawClient::replication(self.port).is_ok()
        });
    }

    pub(crate) fn assert_running(&mut self) {
        let running = self.process.as_mut().is_some_and(Process::is_running);
        assert!(running, "the relay ended by itself:\n{}", self.log());
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::is_running)
    }

    /// Whether /readyz says that WAL can be served.
    pub(crate) fn is_ready(&self) -> bool {
        http::get(self.admin_port, "/readyz").is_some_and(|(status, _)| status == 200)
    }

    pub(crate) fn process(&self) -> &Process {
        self.process.as_ref().expect("started")
    }

    pub(crate) fn process_mut(&mut self) -> &mut Process {
        self.process.as_mut().expect("started")
    }

    pub(crate) fn kill(&mut self) {
        self.process.take().expect("started").kill();
    }

    /// Whether a process was started and not yet ended by this harness; it may have died.
    pub(crate) fn was_started(&self) -> bool {
        self.process.is_some()
    }

    /// SIGTERM; returns the exit status.
    pub(crate) fn terminate(&mut self) -> std::process::ExitStatus {
        let mut process = self.process.take().expect("started");
        process.signal(Signal::TERM);
        process.wait_for_end()
    }

    /// Waits for an end that the relay brings about itself.
    pub(crate) fn wait_for_end(&mut self) -> std::process::ExitStatus {
        self.process.take().expect("started").wait_for_end()
    }

    pub(crate) fn restart_after_kill(&mut self) {
        self.kill();
        self.start();
    }

    /// SIGTERM and a start that waits for no upstream.
    pub(crate) fn restart_away_from_upstream(&mut self) {
        self.terminate();
        self.launch();
        self.wait_serving();
    }

    /// /status, or null when it does not answer.
    pub(crate) fn status(&self) -> Value {
        let answer = http::ask(self.admin_port, "GET /status", self.token, Duration::from_secs(5));
        answer.and_then(|(_, body)| serde_json::from_str(&body).ok()).unwrap_or(Value::Null)
    }

    /// A position of /status, as `/store/flushed`; 0 when it is not told.
    pub(crate) fn position(&self, pointer: &str) -> u64 {
        self.status().pointer(pointer).and_then(Value::as_str).map_or(0, lsn)
    }

    pub(crate) fn flushed(&self) -> u64 {
        self.position("/store/flushed")
    }

    /// `healthy`, or what is wrong with the store.
    pub(crate) fn condition(&self) -> String {
        self.status()["store"]["condition"].as_str().unwrap_or_default().to_owned()
    }

    /// Whether somebody must look at the upstream connection, by /status, which /metrics never contradicts for long.
    pub(crate) fn needs_attention(&self) -> bool {
        self.status()["upstream"]["needs_attention"] == true
    }

    pub(crate) fn wait_needs_attention(&self) {
        wait_until("the relay to ask for a person", || {
            self.needs_attention() && self.metric("walrelay_upstream_needs_attention") == Some(1.0)
        });
    }

    /// Start of the first segment held.
    pub(crate) fn oldest(&self) -> u64 {
        self.position("/store/oldest")
    }

    pub(crate) fn wait_flushed(&self, position: u64) {
        let what = format!("{} to have flushed {}", self.name, lsn_text(position));
        wait_for(&what, || (self.flushed() >= position).then_some(()));
    }

    /// The sessions that /status shows for this application_name.
    pub(crate) fn downstream(&self, application_name: &str) -> Vec<Value> {
        let status = self.status();
        let sessions = status["downstream"].as_array().cloned().unwrap_or_default();
        sessions.into_iter().filter(|session| session["application_name"] == application_name).collect()
    }

    pub(crate) fn wait_downstream(&self, application_name: &str, state: &str) {
        let what = format!("{application_name} to be {state} at {}", self.name);
        wait_until(&what, || {
            self.downstream(application_name).iter().any(|session| session["state"] == state)
        });
    }

    pub(crate) fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Where the WAL files are.
    pub(crate) fn wal_dir(&self) -> PathBuf {
        let below = self.data_dir.join("wal");
        if below.is_dir() { below } else { self.data_dir.clone() }
    }

    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// What /status shows of a slot.
    pub(crate) fn slot(&self, name: &str) -> Option<Value> {
        let status = self.status();
        status["slots"].as_array()?.iter().find(|slot| slot["slot_name"] == name).cloned()
    }

    /// Waits until the log has a line with this text.
    pub(crate) fn wait_logged(&self, text: &str) {
        wait_until(&format!("{} to log {text:?}", self.name), || self.log().contains(text));
    }

    /// How often the text stands in the log.
    pub(crate) fn times_logged(&self, text: &str) -> usize {
        self.log().matches(text).count()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// One value of /metrics.
    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let (_, text) = http::ask(self.admin_port, "GET /metrics", self.token, Duration::from_secs(5))?;
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    /// Runs the program once with other arguments; returns exit status, stdout and stderr.
    pub(crate) fn command(arguments: &[&str]) -> (std::process::ExitStatus, String, String) {
        let output = std::process::Command::new(binary()).args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status, text(&output.stdout), text(&output.stderr))
    }
}

impl Relay {
    /// Runs the program once with this on its standard input; returns what it prints.
    pub(crate) fn command_with_input(arguments: &[&str], input: &str) -> String {
        use std::io::Write;
        use std::process::Stdio;
        let mut program = std::process::Command::new(binary());
        let mut child = program.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("settings: {:?}\nstatus: {}", self.settings, self.status());
            if self.process.is_none() {
                eprintln!("--- log of {}\n{}\n---", self.name, self.log());
            }
        }
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::TERM);
            process.wait(Duration::from_secs(5));
        }
    }
}

/// Long enough for the relay to take it.
const TOKEN: &str = "a-token-for-tests-0123456789";

/// The program under test: that of this build, or one given for a comparison.
pub(crate) fn binary() -> PathBuf {
    std::env::var_os("WALRELAY_BINARY").map_or_else(|| env!("CARGO_BIN_EXE_walrelay").into(), PathBuf::from)
}
