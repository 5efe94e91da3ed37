//! Something that writes while a test runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::postgres::Postgres;
use super::process::{Process, Program};
use super::raw::RawClient;

/// Makes pgbench's tables.
pub(crate) fn pgbench_tables(primary: &Postgres, scale: u32) {
    Program::new(primary.installation.program("pgbench"))
        .args(["-i", "-q", "-I", "dtgp", "-s", &scale.to_string()])
        .args(pgbench_target(primary))
        .run();
}

/// pgbench's own transactions until dropped or for `seconds`.
pub(crate) fn pgbench(primary: &Postgres, clients: u32, seconds: u32) -> Process {
    let log = primary.data().with_file_name("pgbench.log");
    let program = Program::new(primary.installation.program("pgbench"))
        .args(["-n", "-c", &clients.to_string(), "-j", "1", "-T", &seconds.to_string()])
        .args(pgbench_target(primary));
    Process::spawn("pgbench", &program, &log)
}

fn pgbench_target(primary: &Postgres) -> Vec<String> {
    // By its socket, which is there wherever the server's network is.
    let folder = primary.socket_folder().display().to_string();
    ["-h", &folder, "-p", &primary.port.to_string(), "-U", "postgres", "postgres"].map(str::to_owned).to_vec()
}

/// Commits rows of many sizes, one connection, as fast as it goes, until dropped. Survives restarts of the server.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// Rows go to the table `load_rows`, which is made when absent. `pause` follows each transaction.
    pub(crate) fn start(primary: &Postgres, pause: Duration) -> Self {
        primary.sql("create table if not exists load_rows (id bigserial primary key, filling text)");
        Self::writing(primary, INSERT, pause)
    }

    /// Commits that wait for a synchronous standby: nothing here waits for the first of them.
    pub(crate) fn start_waiting(primary: &Postgres) -> Self {
        let statement =
            "do $$ begin perform txid_current(); end $$; select pg_logical_emit_message(true, 'load', 'x')";
        Self::writing(primary, statement, Duration::ZERO)
    }

    fn writing(primary: &Postgres, statement: &'static str, pause: Duration) -> Self {
        let (stop, committed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count, port) = (Arc::clone(&stop), Arc::clone(&committed), primary.port);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let Ok(mut client) = RawClient::sql(port) else {
                    std::thread::sleep(Duration::from_millis(50));
                    continue;
                };
                while !stopped.load(Ordering::Relaxed) && client.rows(statement).is_ok() {
                    count.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(pause);
                }
            }
        });
        Self { stop, committed, thread: Some(thread) }
    }

    /// Transactions that the primary has confirmed.
    pub(crate) fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }
}

/// At least so many transactions of a [`Load::start`] are on this server, which has been promoted.
pub(crate) fn assert_has_confirmed(heir: &Postgres, confirmed: u64) {
    let transactions = heir.sql("select count(distinct xmin::text) from load_rows");
    let has_all = transactions.parse::<u64>().unwrap() >= confirmed;
    assert!(has_all, "{transactions} of {confirmed} confirmed transactions");
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A commit that waits for a standby that is gone does not come back: its connection ends with the server.
        if let Some(thread) = self.thread.take() {
            let finished =
                super::wait::wait_at_most(Duration::from_secs(2), || thread.is_finished().then_some(()));
            if finished.is_some() {
                drop(thread.join());
            }
        }
    }
}

const INSERT: &str = "insert into load_rows (filling) select repeat(md5(random()::text), 1 + (random() * 60)::int) from generate_series(1, 1 + (random() * 20)::int)";

/// Writes about this much WAL at once.
pub(crate) fn write_wal(primary: &Postgres, bytes: u64) {
    primary.sql("create table if not exists filler (filling text)");
    primary.sql("alter table filler alter column filling set storage external");
    let rows = bytes / 8_100 + 1;
    primary.sql(&format!(
        "insert into filler select repeat(md5(i::text), 250) from generate_series(1, {rows}) i"
    ));
}

/// As `write_wal`, in long records and without a table that grows.
pub(crate) fn emit_wal(primary: &Postgres, bytes: u64) {
    let record_bytes = 300_000;
    let records = bytes / record_bytes + 1;
    primary.sql(&format!(
        "select count(pg_logical_emit_message(false, 'load', repeat('x', {record_bytes}))) from generate_series(1, {records})"
    ));
}
