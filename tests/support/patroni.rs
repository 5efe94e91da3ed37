//! A cluster that Patroni runs: etcd, and members that are killed as whole machines are.
//!
//! Each member has its processes in a namespace of its own: whoever ends Patroni ends its PostgreSQL with it, also when the
//! test dies.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use super::lab::{self, Installation};
use super::postgres::Postgres;
use super::process::{Process, Program};
use super::wait::wait_until;
use super::{http, lsn};

/// The programs, which `tests/install.sh` provides.
#[derive(Clone, Debug)]
struct Tools {
    etcd: PathBuf,
    patroni: PathBuf,
    patronictl: PathBuf,
}

impl Tools {
    /// `None`, said in one line, where something is missing.
    fn find() -> Option<Self> {
        let programs = lab::lab().join("patroni/bin");
        let tools = Self {
            etcd: lab::lab().join("unpacked/etcd/usr/bin/etcd"),
            patroni: programs.join("patroni"),
            patronictl: programs.join("patronictl"),
        };
        let has_all = [&tools.etcd, &tools.patroni, &tools.patronictl].iter().all(|path| path.exists());
        if !has_all {
            lab::skip("no Patroni and etcd; tests/install.sh provides them");
            return None;
        }
        let apart = Program::new("unshare").args(NAMESPACE).arg("true").succeeds();
        if !apart {
            lab::skip("Patroni's members need a namespace of processes of their own (root)");
        }
        apart.then_some(tools)
    }
}

/// A cluster with its members, of which some may be down.
pub(crate) struct Cluster {
    pub(crate) members: Vec<Member>,
    tools: Tools,
    etcd_port: u16,
    _etcd: Process,
    _folder: TempDir,
}

/// A machine with Patroni and PostgreSQL.
pub(crate) struct Member {
    pub(crate) name: &'static str,
    /// Before the server, in whose folder its log is.
    process: Option<Process>,
    pub(crate) server: Postgres,
    rest_port: u16,
}

impl Cluster {
    /// Members of these names, of which the first leads. `slot` is one that every leader is to have.
    pub(crate) fn start(names: &[&'static str], slot: &str) -> Option<Self> {
        let installation = Installation::any()?;
        let tools = Tools::find()?;
        let folder = lab::scratch();
        lab::give_to_server(folder.path());
        let (etcd_port, peer_port) = (lab::free_port(), lab::free_port());
        let etcd = start_etcd(&tools, folder.path(), etcd_port, peer_port);
        let member = |name: &&'static str| Member {
            name,
            server: Postgres::run_by_others(&installation),
            rest_port: lab::free_port(),
            process: None,
        };
        let members = names.iter().map(member).collect();
        let mut cluster = Self { members, tools, etcd_port, _etcd: etcd, _folder: folder };
        for at in 0..cluster.members.len() {
            cluster.write_config(at, slot);
            cluster.launch(at);
            cluster.wait_role(at, if at == 0 { "leader" } else { "replica" });
        }
        Some(cluster)
    }

    /// Starts a member and waits for nothing.
    pub(crate) fn launch(&mut self, at: usize) {
        let (patroni, config) = (self.tools.patroni.clone(), self.config(at));
        let member = &mut self.members[at];
        // Of a machine that died: whose process that number is now nobody knows.
        std::fs::remove_file(member.server.data().join("postmaster.pid")).ok();
        let mut program = Program::new(patroni).arg(config.to_str().unwrap());
        let apart = ["unshare"].iter().chain(&NAMESPACE).chain(&["sh", "-c", WITHOUT_SMALL_DISKS, "sh"]);
        program.wrapper = apart.map(|word| (*word).to_owned()).collect();
        program.wrapper.extend(as_server_user());
        program = program.env("HOME", member.folder().to_str().unwrap());
        let log = member.folder().join("patroni.log");
        member.process = Some(Process::spawn(member.name, &program, &log));
    }

    /// The whole machine, at once.
    pub(crate) fn kill(&mut self, at: usize) {
        self.members[at].process.take().expect("started").kill();
        wait_until("the member to be dead", || self.members[at].server.try_sql("select 1").is_err());
    }

    /// What the members know of the cluster, by the first that answers; null when none does.
    pub(crate) fn state(&self) -> Value {
        let answers = self.members.iter().filter(|member| member.process.is_some()).filter_map(|member| {
            let (status, body) = http::get(member.rest_port, "/cluster")?;
            (status == 200).then(|| serde_json::from_str(&body).ok()).flatten()
        });
        answers.into_iter().next().unwrap_or(Value::Null)
    }

    /// Waits until a member has this role, runs, and is on the leader's timeline.
    pub(crate) fn wait_role(&self, at: usize, role: &str) {
        let name = self.members[at].name;
        let mut last = Value::Null;
        let deadline = std::time::Instant::now() + ROLE_TIME_MAX;
        while std::time::Instant::now() < deadline {
            last = self.state();
            let members = last["members"].as_array().cloned().unwrap_or_default();
            let leader = members.iter().find(|member| member["role"] == "leader");
            let is_in_role = members.iter().any(|member| {
                let runs = member["state"] == "running" || member["state"] == "streaming";
                let is_along = leader.is_some_and(|leader| leader["timeline"] == member["timeline"]);
                member["name"] == name && member["role"] == role && runs && is_along
            });
            if is_in_role {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("{name} does not become {role}: {last}");
    }

    /// Runs `patronictl` to its end.
    pub(crate) fn control(&self, arguments: &[&str]) -> String {
        let config = self.config(0);
        Program::new(self.tools.patronictl.clone())
            .args(["-c", config.to_str().unwrap()])
            .args(arguments.iter().copied())
            .env("HOME", self.members[0].folder().to_str().unwrap())
            .run()
    }

    /// Where the members' REST API is, as walrelay is told.
    pub(crate) fn urls(&self) -> Vec<String> {
        self.members.iter().map(|member| format!("http://127.0.0.1:{}", member.rest_port)).collect()
    }

    fn config(&self, at: usize) -> PathBuf {
        self.members[at].folder().join("patroni.yml")
    }

    fn write_config(&self, at: usize, slot: &str) {
        let Member { name, server, rest_port, .. } = &self.members[at];
        let (port, etcd_port) = (server.port, self.etcd_port);
        let (data, folder) = (server.data(), server.socket_folder().to_owned());
        let (data, folder) = (data.display(), folder.display());
        let programs = server.installation.program("postgres");
        let programs = programs.parent().unwrap().display();
        let text = format!(
            r#"
scope: fleet
name: {name}
restapi: {{listen: "127.0.0.1:{rest_port}", connect_address: "127.0.0.1:{rest_port}"}}
etcd3: {{hosts: "127.0.0.1:{etcd_port}"}}
bootstrap:
  dcs:
    ttl: 20
    loop_wait: 1
    retry_timeout: 3
    slots:
      {slot}: {{type: physical}}
    postgresql:
      use_pg_rewind: true
      parameters: {{wal_keep_size: 1GB, autovacuum: "off", jit: "off", fsync: "off", shared_buffers: 16MB, wal_log_hints: "on"}}
  initdb: [{{encoding: UTF8}}, {{locale: C}}, {{wal-segsize: "1"}}, no-sync]
postgresql:
  listen: "127.0.0.1:{port}"
  connect_address: "127.0.0.1:{port}"
  data_dir: {data}
  bin_dir: {programs}
  pgpass: {folder}/pgpass
  authentication:
    superuser: {{username: postgres}}
    replication: {{username: postgres}}
  parameters: {{unix_socket_directories: {folder}, wal_retrieve_retry_interval: 200ms}}
  pg_hba: [local all all trust, host all all 127.0.0.1/32 trust, host replication all 127.0.0.1/32 trust]
"#
        );
        std::fs::write(self.config(at), text).unwrap();
    }
}

impl Member {
    /// What it is killed and started with.
    fn folder(&self) -> &Path {
        self.server.socket_folder()
    }

    /// End of the WAL that this leader has flushed.
    pub(crate) fn flushed(&self) -> u64 {
        lsn(&self.server.sql("select pg_current_wal_flush_lsn()"))
    }
}

fn start_etcd(tools: &Tools, folder: &Path, port: u16, peer_port: u16) -> Process {
    let (clients, peers) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
    let data = folder.join("etcd");
    let program = Program::new(tools.etcd.clone())
        .args(["--data-dir", data.to_str().unwrap()])
        .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
        .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
        .args(["--initial-cluster", &format!("default={peers}")])
        .for_server_user();
    let process = Process::spawn("etcd", &program, &folder.join("etcd.log"));
    wait_until("etcd to be healthy", || http::get(port, "/health").is_some_and(|(status, _)| status == 200));
    process
}

/// What comes before a program that is to run as the servers do. Who changes users is no longer ended with his parent, unless
/// he asks for it again.
fn as_server_user() -> Vec<String> {
    let words = |(user, group): (u32, u32)| {
        vec![
            "setpriv".to_owned(),
            "--pdeathsig=KILL".to_owned(),
            format!("--reuid={user}"),
            format!("--regid={group}"),
            "--clear-groups".to_owned(),
            "--".to_owned(),
        ]
    };
    lab::server_user().map(words).unwrap_or_default()
}

/// Processes that see only one another, and end with the first.
const NAMESPACE: [&str; 4] = ["--pid", "--fork", "--kill-child", "--mount-proc"];

/// A namespace begins with a copy of all that is mounted, which would keep the disks of other tests from going when they are
/// unmounted there.
const WITHOUT_SMALL_DISKS: &str = r#"awk '$2 ~ "/walrelay-[^/]*/mnt$" { print $2 }' /proc/self/mounts | xargs -r -n 1 umount
exec "$@""#;

/// Longest wait for a role: the lease of a dead leader, an election, and a rewind.
const ROLE_TIME_MAX: Duration = Duration::from_secs(60);
