//! What a process has cost: CPU time and memory, as the kernel counts them.
//!
//! Reads `/proc` only.

use std::{fs, time::Duration};

use anyhow::{Context, Result, anyhow};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// `USER_HZ`, the unit of the times in `/proc`, which is 100 on every Linux that PostgreSQL runs on.
const TICKS_PER_SECOND: u32 = 100;

/// CPU time of a process, all its threads (also ended ones), user and system. A process that has ended but was not yet
/// waited for still has it.
pub(crate) fn cpu_of(process: u32) -> Result<Duration> {
    let fields = Fields::read(process)?;
    Ok(ticks(fields.at(UTIME)? + fields.at(STIME)?))
}

/// CPU time of a process and all its children, also those that have ended.
pub(crate) fn cpu_of_family(process: u32) -> Result<Duration> {
    let fields = Fields::read(process)?;
    let own =
        [UTIME, STIME, CUTIME, CSTIME].into_iter().map(|field| fields.at(field)).sum::<Result<u64>>()?;
    let mut total = ticks(own);
    for child in children(process)? {
        // It may end between the list and the look; then its parent has its time, and the next look finds it.
        total += cpu_of(child).unwrap_or_default();
    }
    Ok(total)
}

/// The child of that process whose title contains `title`.
pub(crate) fn child_titled(process: u32, title: &str) -> Result<Option<u32>> {
    let is_titled = |child: &u32| {
        let line = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(title)
    };
    Ok(children(process)?.into_iter().find(is_titled))
}

/// Whether a child of ours has ended; it stays to be waited for.
pub(crate) fn has_ended(child: u32) -> Result<bool> {
    let id = i32::try_from(child).ok().and_then(Pid::from_raw).ok_or_else(|| anyhow!("no process id"))?;
    let how = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    Ok(waitid(WaitId::Pid(id), how)?.is_some())
}

/// Memory of a process in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    /// Resident, all of it.
    pub(crate) resident: u64,
    /// Resident and its own; the rest are mapped files, which the kernel takes back when it wants.
    pub(crate) anonymous: u64,
}

pub(crate) fn memory_of(process: u32) -> Result<Memory> {
    let text = fs::read_to_string(format!("/proc/{process}/status"))?;
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
    };
    let memory = || Some(Memory { resident: field("VmRSS:")?, anonymous: field("RssAnon:")? });
    memory().ok_or_else(|| anyhow!("process {process} has no memory"))
}

/// Numbers of fields in `/proc/PID/stat` as proc(5) counts them.
const PPID: usize = 4;
const UTIME: usize = 14;
const STIME: usize = 15;
const CUTIME: usize = 16;
const CSTIME: usize = 17;

struct Fields(String);

impl Fields {
    fn read(process: u32) -> Result<Self> {
        let text = fs::read_to_string(format!("/proc/{process}/stat"));
        let text = text.with_context(|| format!("process {process} is gone"))?;
        // The name, the second field, may hold anything, also spaces and brackets.
        let rest = text.rsplit_once(')').map(|(_, rest)| rest.to_owned());
        rest.map(Self).ok_or_else(|| anyhow!("/proc/{process}/stat cannot be read"))
    }

    fn at(&self, field: usize) -> Result<u64> {
        let text = self.0.split_whitespace().nth(field - 3).unwrap_or_default();
        text.parse().with_context(|| format!("field {field} of /proc/PID/stat is \"{text}\""))
    }
}

fn children(process: u32) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if Fields::read(id)
            .and_then(|fields| fields.at(PPID))
            .is_ok_and(|parent| parent == u64::from(process))
        {
            found.push(id);
        }
    }
    Ok(found)
}

fn ticks(count: u64) -> Duration {
    Duration::from_millis(count * 1000 / u64::from(TICKS_PER_SECOND))
}
