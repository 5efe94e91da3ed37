//! What a client that stops reading costs the relay: its memory while WAL goes on to another client, and after.
//!
//! Resident memory is what the kernel says of the process. Its own (anonymous) part is what it has to keep; the rest are
//! mappings of WAL files, which the kernel takes back when it needs the space.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use walrelay::cli::demo::relay::Relay;
use walrelay::wal::Lsn;

use crate::client::{Client, Event};
use crate::lab::{KEEP, Lab, gigabytes, megabytes};
use crate::table::{Table, Target};
use crate::usage::{Memory, memory_of};

const RELAY: &str = "memory_relay";
const CATCH_UP_WAIT: Duration = Duration::from_secs(120);
const SAMPLES: u64 = 8;
/// WAL per question, 8 kB a record.
const ROWS_PER_STEP: u64 = 2000;
/// The relay's memory may grow by its limits (`tail_size` and `unwritten_size`, 64 MiB each), and not with the lag.
const GROWTH_MAX_MEGABYTES: f64 = 160.0;
const COPIED_METRICS: [&str; 2] =
    ["walrelay_upstream_copied_bytes_total", "walrelay_downstream_copied_bytes_total"];
const RECEIVED_METRIC: &str = "walrelay_upstream_received_bytes_total";
const COPIED_PER_BYTE_MAX: f64 = 0.05;

pub(crate) fn run(lab: &mut Lab, stall_bytes: u64) -> Result<()> {
    let settings = lab.prepare_relay(RELAY)?.store("wal_keep_size", KEEP);
    let mut relay = lab.spawn_relay(&settings)?;
    relay.wait_until_ready()?;
    let begin = lab.flushed_position()?;
    lab.wait("the relay", |lab| Ok(lab.flushed_by(RELAY)? >= Some(begin)))?;
    let title = format!(
        "Memory of the relay while one client stops reading for {:.1} GB of WAL",
        gigabytes(stall_bytes)
    );
    let mut table =
        Table::new(&title, &["when", "behind MB", "resident MB", "own MB", "reading client behind MB"]);
    let mut stuck = Client::replication(relay.address())?;
    stuck.start_replication(begin)?;
    let (is_done, reached) = (AtomicBool::new(false), AtomicU64::new(begin.get()));
    let memory = thread::scope(|scope| -> Result<_> {
        let reader = scope.spawn(|| follow(relay.address(), begin, &reached, &is_done));
        let memory = stall(lab, &relay, &mut table, &Stall { begin, stall_bytes, reached: &reached });
        is_done.store(true, Ordering::Relaxed);
        reader.join().map_err(|_panic| anyhow!("the reading client has panicked"))??;
        memory
    })?;
    let end = lab.flushed_position()?;
    let peak = resume(&mut stuck, &relay, begin, end);
    match peak {
        Ok(peak) => {
            memory_row(&mut table, "it reads again: highest until it has all", 0, peak, "-".to_owned())
        }
        Err(error) => table.note(format!("the stuck client did not get the rest: {error:#}")),
    }
    let growth = megabytes(memory.last.anonymous.saturating_sub(memory.first.anonymous));
    table.target("own memory grown, in MB,", growth, Target::AtMost(GROWTH_MAX_MEGABYTES));
    copies(&relay, &mut table);
    table.print();
    relay.stop()?;
    lab.drop_slot(RELAY)
}

struct Stall<'a> {
    begin: Lsn,
    stall_bytes: u64,
    reached: &'a AtomicU64,
}

struct FirstAndLast {
    first: Memory,
    last: Memory,
}

/// Produces WAL, and writes down what the relay needs meanwhile.
fn stall(lab: &mut Lab, relay: &Relay, table: &mut Table, stall: &Stall<'_>) -> Result<FirstAndLast> {
    let Stall { begin, stall_bytes, reached } = stall;
    let first = memory_of(relay.id())?;
    memory_row(table, "before", 0, first, "0".to_owned());
    let step = format!(
        "SELECT count(pg_logical_emit_message(false, 'bench', repeat(md5(n::text), 256))) \
         FROM generate_series(1, {ROWS_PER_STEP}) n"
    );
    let (mut produced, mut last) = (0, first);
    for sample in 1..=SAMPLES {
        while produced < stall_bytes * sample / SAMPLES {
            lab.check()?;
            lab.session.rows(&step)?;
            produced = lab.position()?.bytes_since(*begin);
        }
        let now = lab.flushed_position()?;
        lab.wait("the relay", |lab| Ok(lab.flushed_by(RELAY)? >= Some(now)))?;
        last = memory_of(relay.id())?;
        let behind = now.get().saturating_sub(reached.load(Ordering::Relaxed));
        memory_row(table, "stuck", produced, last, format!("{:.1}", megabytes(behind)));
    }
    Ok(FirstAndLast { first, last })
}

/// The client that reads.
fn follow(address: SocketAddr, from: Lsn, reached: &AtomicU64, is_done: &AtomicBool) -> Result<()> {
    let mut client = Client::replication(address)?;
    client.start_replication(from)?;
    while !is_done.load(Ordering::Relaxed) {
        if let Event::Wal { end } = client.event(reached.load(Ordering::Relaxed))? {
            reached.store(end, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Lets the stuck client read until `end`; gives the highest memory of the relay meanwhile.
fn resume(stuck: &mut Client, relay: &Relay, begin: Lsn, end: Lsn) -> Result<Memory> {
    let (mut reached, mut peak, mut look_at) = (begin.get(), Memory::default(), Instant::now());
    let deadline = Instant::now() + CATCH_UP_WAIT;
    while reached < end.get() {
        if let Event::Wal { end } = stuck.event(reached)? {
            reached = end;
        }
        let now = Instant::now();
        if now >= look_at {
            look_at = now + Duration::from_millis(20);
            let memory = memory_of(relay.id())?;
            peak.resident = peak.resident.max(memory.resident);
            peak.anonymous = peak.anonymous.max(memory.anonymous);
        }
        if now > deadline {
            return Err(anyhow!(
                "only {:.0} MB after {} s",
                megabytes(reached - begin.get()),
                CATCH_UP_WAIT.as_secs()
            ));
        }
    }
    Ok(peak)
}

/// How many bytes of WAL were copied in user space, as the relay itself counts them.
fn copies(relay: &Relay, table: &mut Table) {
    let text = relay.page("/metrics").unwrap_or_default();
    let counter = |name: &str| {
        let line = text
            .lines()
            .find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])))?;
        line.rsplit(' ').next()?.parse::<f64>().ok()
    };
    let copied: Option<f64> = COPIED_METRICS.iter().map(|name| counter(name)).sum();
    match (copied, counter(RECEIVED_METRIC)) {
        (Some(copied), Some(received)) if received > 0.0 => {
            let what = "user-space copies per byte of WAL received";
            table.target(what, copied / received, Target::AtMost(COPIED_PER_BYTE_MAX));
        }
        _ => table
            .note(format!("user-space copies per byte of WAL: not exposed ({})", COPIED_METRICS.join(", "))),
    }
}

fn memory_row(table: &mut Table, when: &str, behind: u64, memory: Memory, reader: String) {
    let (resident, own) = (megabytes(memory.resident), megabytes(memory.anonymous));
    let behind = if behind == 0 { "-".to_owned() } else { format!("{:.0}", megabytes(behind)) };
    table.row([when.to_owned(), behind, format!("{resident:.1}"), format!("{own:.1}"), reader]);
}
