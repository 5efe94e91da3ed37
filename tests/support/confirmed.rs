//! Commits of several clients at once, of which is known which ones were confirmed.
//!
//! pgbench commits and writes down what it was told; the ids that it then stands for are asked for one by one where they
//! must be. Knows nothing of who confirmed them, and why.

use std::collections::BTreeMap;

use tempfile::TempDir;

use super::lab;
use super::postgres::Postgres;
use super::process::{Process, Program};
use super::wait::wait_until;

/// pgbench at work: every client commits its own ids, 1, 2, 3 and so on, one in each transaction.
pub(crate) struct Confirming {
    process: Process,
    folder: TempDir,
}

/// How many ids of each client were confirmed; each is the last of those before it.
pub(crate) struct Confirmed(BTreeMap<u32, u32>);

impl Confirming {
    /// The ids go to the table `confirmed`.
    pub(crate) fn start(primary: &Postgres) -> Self {
        primary
            .sql("set synchronous_commit = local; create table confirmed (client int, id int, filling text)");
        let folder = lab::scratch();
        let script = folder.path().join("script");
        std::fs::write(
            &script,
            "\\set id :id + 1\ninsert into confirmed values (:client_id, :id, repeat('x', 100 + :id % 400));\n",
        )
        .unwrap();
        let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
        let program = Program::new(primary.installation.program("pgbench"))
            .args(["-n", "-c", CLIENTS, "-j", "1", "-T", SECONDS_MAX, "-D", "id=0", "-l"])
            .args(["-f".to_owned(), text(&script)])
            .arg(format!("--log-prefix={}", text(&folder.path().join("confirmed"))))
            .args(["-h", "127.0.0.1", "-p", &primary.port.to_string(), "-U", "postgres", "postgres"]);
        let process = Process::spawn("pgbench", &program, &folder.path().join("output"));
        Self { process, folder }
    }

    /// Waits until so many more commits can be seen on the primary: those have been waited for.
    pub(crate) fn wait_for_more(&self, primary: &Postgres, commits: u64) {
        let seen = || primary.sql("select count(*) from confirmed").parse::<u64>().unwrap();
        let wanted = seen() + commits;
        wait_until("commits to be confirmed", || seen() >= wanted);
    }

    /// What was confirmed, once pgbench has ended because its server has.
    pub(crate) fn end(mut self) -> Confirmed {
        self.process.wait_for_end();
        let mut confirmed = BTreeMap::new();
        for entry in std::fs::read_dir(self.folder.path()).unwrap() {
            let path = entry.unwrap().path();
            if !path.file_name().unwrap().to_str().unwrap().starts_with("confirmed.") {
                continue;
            }
            // A line for each transaction that ended well; it begins with the client's number.
            for line in std::fs::read_to_string(path).unwrap().lines() {
                let client = line.split(' ').next().unwrap().parse().unwrap();
                *confirmed.entry(client).or_default() += 1;
            }
        }
        Confirmed(confirmed)
    }
}

impl Confirmed {
    /// How many, of all clients.
    pub(crate) fn count(&self) -> u64 {
        self.0.values().map(|count| u64::from(*count)).sum()
    }

    /// How many of them are not on this server.
    pub(crate) fn missing_on(&self, server: &Postgres) -> u64 {
        let missing = |(client, count): (&u32, &u32)| {
            let query = format!(
                "select count(*) from (select generate_series(1, {count}) except \
                 select id from confirmed where client = {client}) missing"
            );
            server.sql(&query).parse::<u64>().unwrap()
        };
        self.0.iter().map(missing).sum()
    }

    /// Every single one is on this server.
    pub(crate) fn assert_on(&self, server: &Postgres) {
        assert!(self.count() > 0, "nothing was confirmed");
        let missing = self.missing_on(server);
        assert_eq!(missing, 0, "of {} confirmed commits", self.count());
    }
}

/// Connections that commit at the same time.
const CLIENTS: &str = "4";

/// No server lives as long in a test.
const SECONDS_MAX: &str = "600";
