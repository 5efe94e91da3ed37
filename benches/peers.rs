//! `cargo bench --bench peers [-- --quick] [-- drain fanout latency sync memory]`: the relay beside PostgreSQL's own tools.
//!
//! Starts a real primary, produces WAL, and prints one table for each question: how fast and at what cost one receiver
//! takes it (and, by perf, where the relay's time goes then), how fast it fans out, how late a commit arrives at the end, how long one that waits for a standby takes, and how much memory a stuck client costs. Every
//! peer is measured in the same run, in turns, on the same WAL.
//!
//! | variable | meaning | default |
//! | --- | --- | --- |
//! | `WALRELAY_BENCH_PG` | folder with PostgreSQL's programs | as `walrelay demo` finds them |
//! | `WALRELAY_BENCH_DIR` | where the data goes; never memory | the temporary folder, else `/var/tmp` |
//! | `WALRELAY_BENCH_GB` | WAL to produce | 1 |
//! | `WALRELAY_BENCH_RELAY` | another build of the relay | the one just built |
//! | `WALRELAY_BENCH_ROUNDS` | rounds, of which medians are taken | 3 |
#![allow(clippy::disallowed_methods, reason = "touches only throwaway files of its own, never the store's")]

#[path = "peers/client.rs"]
mod client;
#[path = "peers/drain.rs"]
mod drain;
#[path = "peers/fanout.rs"]
mod fanout;
#[path = "peers/lab.rs"]
mod lab;
#[path = "peers/latency.rs"]
mod latency;
#[path = "peers/memory.rs"]
mod memory;
#[path = "peers/profile.rs"]
mod profile;
#[path = "peers/sync.rs"]
mod sync;
#[path = "peers/table.rs"]
mod table;
#[path = "peers/usage.rs"]
mod usage;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use lab::Lab;

const SECTIONS: [&str; 5] = ["drain", "fanout", "latency", "sync", "memory"];
/// Of the file systems that live in memory, as statfs(2) tells them.
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58F6;

/// How much is measured.
struct Knobs {
    sections: Vec<String>,
    folder: PathBuf,
    relay: PathBuf,
    wal_bytes: u64,
    rounds: usize,
    commits: usize,
    stall_bytes: u64,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    // A test runner that only wants to know what is in here must not start servers.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return Ok(());
    }
    let knobs = Knobs::read(&arguments)?;
    let mut lab = Lab::create(&knobs.folder, knobs.wal_bytes, &knobs.relay)?;
    println!(
        "{} and PostgreSQL {}, {} cores, data on {} ({}); MB and GB are powers of ten",
        knobs.relay.display(),
        lab.installation.version(),
        std::thread::available_parallelism()?,
        file_system(&knobs.folder),
        knobs.folder.display(),
    );
    for section in &knobs.sections {
        match section.as_str() {
            "drain" => drain::run(&mut lab, knobs.rounds)?,
            "fanout" => fanout::run(&mut lab, knobs.rounds)?,
            "latency" => latency::run(&mut lab, knobs.rounds, knobs.commits)?,
            "sync" => sync::run(&mut lab, knobs.rounds, knobs.commits)?,
            _ => memory::run(&mut lab, knobs.stall_bytes)?,
        }
    }
    Ok(())
}

impl Knobs {
    fn read(arguments: &[String]) -> Result<Self> {
        let is_quick = arguments.iter().any(|argument| argument == "--quick");
        let mut sections: Vec<String> =
            arguments.iter().filter(|argument| !argument.starts_with('-')).cloned().collect();
        if let Some(unknown) = sections.iter().find(|section| !SECTIONS.contains(&section.as_str())) {
            bail!("no section \"{unknown}\"; there are {}", SECTIONS.join(", "));
        }
        if sections.is_empty() {
            sections = SECTIONS.map(str::to_owned).into();
        }
        let gigabytes: f64 = number("WALRELAY_BENCH_GB", if is_quick { 0.25 } else { 1.0 })?;
        if !(0.05..=100.0).contains(&gigabytes) {
            bail!("WALRELAY_BENCH_GB is {gigabytes}, not between 0.05 and 100");
        }
        let mut wal_bytes = 0;
        while lab::gigabytes(wal_bytes) < gigabytes {
            wal_bytes += 10_000_000;
        }
        let rounds = number("WALRELAY_BENCH_ROUNDS", if is_quick { 1 } else { 3 })?;
        Ok(Self {
            sections,
            folder: folder()?,
            relay: env::var_os("WALRELAY_BENCH_RELAY")
                .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_walrelay")), PathBuf::from),
            wal_bytes,
            rounds,
            commits: if is_quick { 200 } else { 1200 },
            stall_bytes: if is_quick { 400_000_000 } else { 2_000_000_000 },
        })
    }
}

fn number<T: std::str::FromStr>(name: &str, default: T) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    match env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is \"{text}\"")),
        Err(_) => Ok(default),
    }
}

/// A folder on a disk: what syncing costs in memory says nothing.
fn folder() -> Result<PathBuf> {
    let chosen = env::var_os("WALRELAY_BENCH_DIR").map(PathBuf::from);
    let candidates =
        chosen.map_or_else(|| vec![env::temp_dir(), PathBuf::from("/var/tmp")], |chosen| vec![chosen]);
    for candidate in &candidates {
        let kind = rustix::fs::statfs(candidate)
            .with_context(|| format!("no folder {}", candidate.display()))?
            .f_type;
        if kind != TMPFS_MAGIC && kind != RAMFS_MAGIC {
            return Ok(candidate.clone());
        }
    }
    bail!("{candidates:?} lie in memory; name a folder on a disk with WALRELAY_BENCH_DIR")
}

/// The device and type of the file system that holds `folder`.
fn file_system(folder: &Path) -> String {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mut best = (0, "an unknown file system".to_owned());
    for line in mounts.lines() {
        let mut fields = line.split(' ');
        let (Some(device), Some(point), Some(kind)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if folder.starts_with(point) && point.len() > best.0 {
            best = (point.len(), format!("{kind}, {device}"));
        }
    }
    best.1
}
