//! Where log lines go.
//!
//! Owns the one subscriber of the process. Lines pass through a bounded queue to a thread that writes them, so that a full
//! disk or a stopped reader behind standard error never delays WAL: what does not fit is dropped and counted.

use std::io::IsTerminal;

use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Keeps the log thread alive; what is queued is written when it goes.
pub struct LogGuard {
    _worker: WorkerGuard,
    /// Counts the lines that were dropped.
    pub dropped: ErrorCounter,
}

/// Starts logging to standard error. `filter` is a level or `target=level` directives; `RUST_LOG` wins over it.
pub fn start(format: LogFormat, filter: &str) -> anyhow::Result<LogGuard> {
    let (writer, worker) =
        NonBlockingBuilder::default().lossy(true).buffered_lines_limit(LINES_MAX).finish(std::io::stderr());
    let dropped = writer.error_counter();
    let filter = match EnvFilter::try_from_default_env() {
        Ok(from_environment) => from_environment,
        Err(_) => EnvFilter::try_new(filter)?,
    };
    let is_terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    let outcome = match format {
        LogFormat::Text => builder.with_ansi(is_terminal).with_target(false).try_init(),
        LogFormat::Auto if is_terminal => builder.with_ansi(true).with_target(false).try_init(),
        LogFormat::Auto | LogFormat::Json => builder.json().try_init(),
    };
    outcome.map_err(|error| anyhow::anyhow!("could not start logging: {error}"))?;
    Ok(LogGuard { _worker: worker, dropped })
}

/// Log lines that may wait to be written.
const LINES_MAX: usize = 8192;
