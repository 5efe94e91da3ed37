//! Files that are read again while the relay runs, on SIGHUP or by the admin listener.
//!
//! Owns the list of what can be read again, and what became of the last time. Everything is read before anything is replaced,
//! and nothing is when one of them is wrong: they may belong together. Whoever is connected stays, by what held when he came.

use std::{sync::Arc, time::SystemTime};

use parking_lot::Mutex;
use tokio::signal::unix::Signal;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::conninfo::ProcessSurroundings;
use crate::downstream::DownstreamContext;
use crate::metrics::ProcessMetrics;
use crate::status::{ReloadStatus, Timestamp};
use crate::wal::PgTimestamp;

/// Puts what was read in its place.
pub(super) type Replace = Box<dyn FnOnce() + Send>;

/// Something that is read from files. Reading changes nothing; it may block. The error is one line.
pub(super) type Part = Box<dyn Fn() -> Result<Replace, String> + Send + Sync>;

/// What can be read again.
pub(super) struct Reloader {
    parts: Vec<Part>,
    /// Held while files are read, so that one time is over before the next begins.
    status: Mutex<ReloadStatus>,
    metrics: ProcessMetrics,
}

impl Reloader {
    pub(super) fn new(parts: Vec<Part>, metrics: ProcessMetrics) -> Arc<Self> {
        Arc::new(Self { parts, status: Mutex::default(), metrics })
    }

    /// Reads everything again. The error is what was wrong: then all is as it was.
    pub(super) async fn reload(self: &Arc<Self>) -> Result<ReloadStatus, String> {
        let reloader = Arc::clone(self);
        let reading = tokio::task::spawn_blocking(move || reloader.reload_now());
        reading.await.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// What became of the last time.
    pub(super) fn status(&self) -> ReloadStatus {
        self.status.lock().clone()
    }

    fn reload_now(&self) -> Result<ReloadStatus, String> {
        let mut status = self.status.lock();
        let read: Result<Vec<Replace>, String> = self.parts.iter().map(|read| read()).collect();
        let outcome = read.map(|replace| replace.into_iter().for_each(|replace| replace()));
        status.at = Some(Timestamp(PgTimestamp::from_system_time(SystemTime::now())));
        status.error = outcome.as_ref().err().cloned();
        self.metrics.reload_failed.set(if outcome.is_err() { 1.0 } else { 0.0 });
        match outcome {
            Ok(()) => {
                tracing::info!("configuration files were read again");
                Ok(status.clone())
            }
            Err(error) => {
                tracing::error!(error, "configuration files contain errors; what was read before holds");
                Err(error)
            }
        }
    }
}

/// Reads everything again at each signal, until `shutdown`.
pub(super) async fn reload_on(mut hangups: Signal, reloader: Arc<Reloader>, shutdown: CancellationToken) {
    while let Some(Some(())) = shutdown.run_until_cancelled(hangups.recv()).await {
        // What is wrong has been logged, and is in the status.
        let _ = reloader.reload().await;
    }
}

/// Who may connect.
pub(super) fn access_part(context: &Arc<DownstreamContext>, config: &Config) -> Part {
    let (context, files) = (Arc::clone(context), config.downstream.access_files.clone());
    Box::new(move || {
        let loaded = files.load(&ProcessSurroundings).map_err(|error| in_one_line(&error))?;
        let context = Arc::clone(&context);
        Ok(Box::new(move || {
            for warning in &loaded.warnings {
                tracing::warn!("{warning}");
            }
            context.access.store(Arc::new(loaded.access));
        }))
    })
}

fn in_one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::metrics::AllMetrics;

    fn part(replaced: &Arc<AtomicU32>, wrong: Arc<AtomicU32>) -> Part {
        let replaced = Arc::clone(replaced);
        Box::new(move || match wrong.load(Ordering::SeqCst) {
            0 => {
                let replaced = Arc::clone(&replaced);
                Ok(Box::new(move || {
                    replaced.fetch_add(1, Ordering::SeqCst);
                }))
            }
            line => Err(format!("line {line} is wrong")),
        })
    }

    #[tokio::test]
    async fn one_wrong_file_changes_nothing_and_is_told_until_it_is_mended() {
        let (replaced, wrong) = (Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default());
        let parts = vec![part(&replaced, Arc::default()), part(&replaced, Arc::clone(&wrong))];
        let reloader = Reloader::new(parts, AllMetrics::default().process);
        assert!(reloader.status().at.is_none());
        wrong.store(7, Ordering::SeqCst);
        assert_eq!(reloader.reload().await.unwrap_err(), "line 7 is wrong");
        assert_eq!(replaced.load(Ordering::SeqCst), 0, "not even what is right");
        let failed = reloader.status();
        assert_eq!(failed.error.as_deref(), Some("line 7 is wrong"));
        assert!(failed.at.is_some());
        wrong.store(0, Ordering::SeqCst);
        assert_eq!(reloader.reload().await.unwrap().error, None);
        assert_eq!((replaced.load(Ordering::SeqCst), reloader.status().error), (2, None));
    }
}
