//! Where the relay's CPU time goes while it takes the range: by `perf`, where that is installed.
//!
//! In rounds of their own after those that are measured, so that sampling disturbs no number of the table. perf is
//! attached to the relay once it runs, so its first instants are missing.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use walrelay::cli::demo::process::Process;

use crate::table::Table;

/// perf, attached to a process.
pub(crate) struct Profile {
    perf: Process,
    samples: PathBuf,
}

/// What a symbol, or a whole object, had of all samples.
struct Share {
    percent: f64,
    object: String,
    symbol: String,
}

/// Whether there is a perf that runs; if not, why.
pub(crate) fn availability() -> std::result::Result<(), String> {
    let mut command = Command::new("perf");
    command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("perf does not run here ({status})")),
        Err(error) if error.kind() == ErrorKind::NotFound => Err("perf is not installed".to_owned()),
        Err(error) => Err(format!("perf does not run here: {error}")),
    }
}

impl Profile {
    /// Samples the process with all its threads until it ends.
    pub(crate) fn attach(pid: u32, folder: &Path) -> Result<Self> {
        let (samples, log) =
            (folder.join(format!("perf_{pid}.data")), folder.join(format!("perf_{pid}.log")));
        let mut command = Command::new("perf");
        command.args(["record", "--quiet", "--freq", FREQUENCY, "--pid", &pid.to_string(), "--output"]);
        command.arg(&samples);
        Ok(Self { perf: Process::start("perf", command, Signal::INT, &log)?, samples })
    }

    /// Prints where the samples were, the process being gone.
    pub(crate) fn print(mut self, title: &str) -> Result<()> {
        self.perf.stop()?;
        let shares = match self.shares() {
            Ok(shares) => shares,
            Err(error) => {
                println!("\n{title}: none, {error:#}; {}", self.perf.log_last_line());
                return Ok(());
            }
        };
        let mut table = Table::new(title, &["symbol", "object", "%"]);
        for share in shares.iter().take(LINES_MAX) {
            let symbol = share.symbol.chars().take(SYMBOL_CHARACTERS_MAX).collect();
            table.row([symbol, share.object.clone(), format!("{:.1}", share.percent)]);
        }
        let mut objects = BTreeMap::new();
        for share in &shares {
            *objects.entry(share.object.as_str()).or_insert(0.0) += share.percent;
        }
        let mut objects: Vec<_> = objects.into_iter().collect();
        objects.sort_by(|a, b| b.1.total_cmp(&a.1));
        let objects: Vec<_> =
            objects.iter().map(|(object, percent)| format!("{object} {percent:.0} %")).collect();
        table.note(format!("all of it by object: {}", objects.join(", ")));
        table.print();
        Ok(())
    }

    /// Greatest first.
    fn shares(&self) -> Result<Vec<Share>> {
        let mut command = Command::new("perf");
        command.args(["report", "--stdio", "--no-inline", "--fields", "overhead,dso,symbol", "--input"]);
        command.arg(&self.samples).args(["--field-separator", SEPARATOR]);
        let output = command.output().context("could not run perf report")?;
        if !output.status.success() {
            bail!("perf report ended ({})", output.status);
        }
        let shares: Vec<_> = String::from_utf8_lossy(&output.stdout).lines().filter_map(share).collect();
        if shares.is_empty() {
            bail!("perf took no samples");
        }
        Ok(shares)
    }
}

fn share(line: &str) -> Option<Share> {
    let mut fields = line.split(SEPARATOR).map(str::trim);
    let percent = fields.next()?.strip_suffix('%')?.parse().ok()?;
    let (object, symbol) = (fields.next()?, fields.next()?);
    // `[k]` or `[.]` stands before the name: the object says it too.
    let symbol = symbol.split_once("] ").map_or(symbol, |(_, name)| name);
    Some(Share { percent, object: object.to_owned(), symbol: symbol.to_owned() })
}

/// Samples a second; not a multiple of what anything else does so often.
const FREQUENCY: &str = "499";
const SEPARATOR: &str = "\t";
const LINES_MAX: usize = 12;
const SYMBOL_CHARACTERS_MAX: usize = 90;
