//! `walrelay run` and `walrelay config check`.
//!
//! Owns the start of the process: configuration, logging, runtime, and what is left when the relay has ended.

use std::{path::Path, time::Duration};

use anyhow::Context;

use crate::cli::logging;
use crate::config::Config;
use crate::relay::Relay;

/// Runs the relay until it is told to stop.
pub fn run(config: &Path) -> anyhow::Result<()> {
    let config = Config::load(config)?;
    let logs = logging::start(config.log.format, config.log.level.as_str())?;
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("walrelay")
        .build()
        .context("could not start the runtime")?;
    let dropped = logs.dropped.clone();
    let lines_dropped = Box::new(move || dropped.dropped_lines());
    let outcome = runtime.block_on(async { Relay::build(config, lines_dropped).await?.run().await });
    // A thread that hangs in a system call does not keep the process from ending.
    runtime.shutdown_timeout(LAST_TASKS_TIME_MAX);
    Ok(outcome?)
}

/// Checks a configuration and says that it is good, or what is wrong.
pub fn check(config: &Path) -> anyhow::Result<()> {
    use std::io::Write;
    for warning in Config::load(config)?.warnings {
        writeln!(std::io::stderr(), "walrelay: warning: {warning}")?;
    }
    writeln!(std::io::stdout(), "configuration file \"{}\" is valid", config.display())?;
    Ok(())
}

/// Time for tasks that are still running when the relay has ended.
const LAST_TASKS_TIME_MAX: Duration = Duration::from_millis(500);
