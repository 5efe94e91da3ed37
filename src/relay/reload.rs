//! Files that are read again while the relay runs, on SIGHUP, by the admin listener, or because they have changed.
//!
//! Owns the list of what can be read again, and what became of the last time. Everything is read before anything is replaced,
//! and nothing is when one of them is wrong: they may belong together. After a reload that was refused because of another file
//! no TLS file that was part of it is taken for having changed: only those that were changed since are, until a reload
//! succeeds. One reads at a time, and has put in its place what it read before the next begins. Whoever is connected stays, by
//! what held when he came.

use std::{sync::Arc, time::SystemTime};

use parking_lot::Mutex;
use tokio::signal::unix::Signal;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::conninfo::ProcessSurroundings;
use crate::downstream::DownstreamContext;
use crate::metrics::ProcessMetrics;
use crate::net::tls::Changes;
use crate::status::{ReloadStatus, Timestamp};
use crate::wal::PgTimestamp;

/// Puts what was read in its place.
pub(super) type Replace = Box<dyn FnOnce() + Send>;

/// Something that is read from files. Reading changes nothing; it may block. The error is one line.
pub(super) type Part = Box<dyn Fn() -> Result<Replace, String> + Send + Sync>;

/// The TLS files, which are read again also when nobody asks for it. Both may block.
pub(super) trait Watched: Send + Sync {
    /// What is in them and does not hold yet.
    fn changes(&self) -> Changes;
    /// Reads them, and changes nothing; `None` when all of it holds. The error is one line.
    fn read(&self) -> Result<Option<(Changes, Replace)>, String>;
}

/// What can be read again.
pub(super) struct Reloader {
    parts: Vec<Part>,
    watched: Option<Box<dyn Watched>>,
    /// Held while files are read and replaced, and by nobody who only wants to know.
    turn: Arc<tokio::sync::Mutex<Turn>>,
    status: Mutex<ReloadStatus>,
    metrics: ProcessMetrics,
}

/// What whoever reads finds of those who did before.
#[derive(Default)]
struct Turn {
    /// What was in the TLS files when a reload was refused because of others.
    held_back: Changes,
    /// What was said last of what was seen in passing.
    told: Option<String>,
}

impl Reloader {
    pub(super) fn new(
        parts: Vec<Part>,
        watched: Option<Box<dyn Watched>>,
        metrics: ProcessMetrics,
    ) -> Arc<Self> {
        Arc::new(Self { parts, watched, turn: Arc::default(), status: Mutex::default(), metrics })
    }

    /// Reads everything again. The error is what was wrong: then all is as it was.
    pub(super) async fn reload(self: &Arc<Self>) -> Result<ReloadStatus, String> {
        let mut turn = Arc::clone(&self.turn).lock_owned().await;
        let reloader = Arc::clone(self);
        let reading = tokio::task::spawn_blocking(move || reloader.reload_now(&mut turn));
        reading.await.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// Takes the TLS files if they have changed and may be taken; what cannot be used is told once, and changes nothing.
    pub(super) async fn look(self: &Arc<Self>) {
        // Whoever is reading them now sees the same.
        let Ok(mut turn) = Arc::clone(&self.turn).try_lock_owned() else { return };
        let reloader = Arc::clone(self);
        // A panic has told of itself.
        let _ = tokio::task::spawn_blocking(move || reloader.look_now(&mut turn)).await;
    }

    /// What became of the last time.
    pub(super) fn status(&self) -> ReloadStatus {
        self.status.lock().clone()
    }

    fn reload_now(&self, turn: &mut Turn) -> Result<ReloadStatus, String> {
        let outcome = self.read(turn).map(|read| read.into_iter().for_each(|replace| replace()));
        let status = ReloadStatus {
            at: Some(Timestamp(PgTimestamp::from_system_time(SystemTime::now()))),
            error: outcome.as_ref().err().cloned(),
        };
        *self.status.lock() = status.clone();
        self.metrics.reload_failed.set(if outcome.is_err() { 1.0 } else { 0.0 });
        match outcome {
            Ok(()) => {
                tracing::info!("configuration files were read again");
                Ok(status)
            }
            Err(error) => {
                tracing::error!(error, "configuration files contain errors; what was read before holds");
                Err(error)
            }
        }
    }

    fn read(&self, turn: &mut Turn) -> Result<Vec<Replace>, String> {
        let others: Result<Vec<Replace>, String> = self.parts.iter().map(|read| read()).collect();
        let changes = || self.watched.as_ref().map(|watched| watched.changes());
        turn.held_back = if others.is_err() { changes().unwrap_or_default() } else { Changes::default() };
        let mut read = others?;
        if let Some(watched) = &self.watched {
            read.extend(watched.read()?.map(|(_, replace)| replace));
        }
        Ok(read)
    }

    fn look_now(&self, turn: &mut Turn) {
        let Some(watched) = &self.watched else { return };
        let obstacle = match watched.read() {
            Ok(None) => None,
            Ok(Some((changes, _))) if changes.has_one_of(&turn.held_back) => {
                Some("they were part of a reload that was refused".to_owned())
            }
            Ok(Some((_, replace))) => {
                replace();
                tracing::info!("TLS files have changed: new connections see the new certificate");
                None
            }
            Err(error) => Some(error),
        };
        if turn.told != obstacle
            && let Some(error) = &obstacle
        {
            tracing::error!(error, "TLS files have changed and cannot be used: what was read before stays");
        }
        turn.told = obstacle;
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
    use std::sync::{
        atomic::{AtomicBool, AtomicU32, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    };
    use std::time::Duration;

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

    /// Two files with a number each, and what holds of them.
    #[derive(Default)]
    struct Pair {
        files: Mutex<[u8; 2]>,
        holds: Arc<Mutex<[u8; 2]>>,
        is_unusable: AtomicBool,
        /// Who reads next tells that he has, and goes on when he is told to.
        stop: Mutex<Option<(SyncSender<()>, Receiver<()>)>>,
    }

    impl Pair {
        fn write(&self, files: [u8; 2]) {
            *self.files.lock() = files;
        }

        fn holds(&self) -> [u8; 2] {
            *self.holds.lock()
        }

        fn changes_of(&self, files: [u8; 2]) -> Changes {
            let both = ["cert", "key"].into_iter().zip(files).zip(self.holds());
            both.filter(|((_, now), before)| now != before)
                .map(|((name, now), _)| (name.into(), [now; 32]))
                .collect()
        }
    }

    impl Watched for Arc<Pair> {
        fn changes(&self) -> Changes {
            self.changes_of(*self.files.lock())
        }

        fn read(&self) -> Result<Option<(Changes, Replace)>, String> {
            let files = *self.files.lock();
            if let Some((has_read, go_on)) = self.stop.lock().take() {
                has_read.send(()).unwrap();
                go_on.recv().unwrap();
            }
            if self.is_unusable.load(Ordering::SeqCst) {
                return Err("they do not fit".to_owned());
            }
            let (changes, holds) = (self.changes_of(files), Arc::clone(&self.holds));
            let replace = move || *holds.lock() = files;
            Ok((!changes.is_empty()).then(|| (changes, Box::new(replace) as Replace)))
        }
    }

    /// A reloader of TLS files and of another one, with the line of the latter that is wrong.
    fn with_pair() -> (Arc<Reloader>, Arc<Pair>, Arc<AtomicU32>) {
        let (pair, wrong) = (Arc::<Pair>::default(), Arc::<AtomicU32>::default());
        let parts = vec![part(&Arc::default(), Arc::clone(&wrong))];
        let watched: Box<dyn Watched> = Box::new(Arc::clone(&pair));
        (Reloader::new(parts, Some(watched), AllMetrics::default().process), pair, wrong)
    }

    #[tokio::test]
    async fn one_wrong_file_changes_nothing_and_is_told_until_it_is_mended() {
        let (replaced, wrong) = (Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default());
        let parts = vec![part(&replaced, Arc::default()), part(&replaced, Arc::clone(&wrong))];
        let reloader = Reloader::new(parts, None, AllMetrics::default().process);
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

    #[tokio::test]
    async fn tls_files_are_taken_when_they_change_and_with_everything_else() {
        let (reloader, pair, wrong) = with_pair();
        pair.write([1, 1]);
        reloader.look().await;
        assert_eq!(pair.holds(), [1, 1]);
        pair.write([2, 2]);
        reloader.reload().await.unwrap();
        assert_eq!(pair.holds(), [2, 2]);
        // What is wrong elsewhere is nothing to them, while nobody has asked for both.
        wrong.store(7, Ordering::SeqCst);
        pair.write([3, 3]);
        reloader.look().await;
        assert_eq!(pair.holds(), [3, 3]);
    }

    #[tokio::test]
    async fn unusable_tls_files_keep_everything_as_it_was_until_they_are_mended() {
        let replaced = Arc::<AtomicU32>::default();
        let pair = Arc::<Pair>::default();
        let parts = vec![part(&replaced, Arc::default())];
        let watched: Box<dyn Watched> = Box::new(Arc::clone(&pair));
        let reloader = Reloader::new(parts, Some(watched), AllMetrics::default().process);
        pair.write([1, 0]);
        pair.is_unusable.store(true, Ordering::SeqCst);
        assert_eq!(reloader.reload().await.unwrap_err(), "they do not fit");
        assert_eq!(replaced.load(Ordering::SeqCst), 0);
        reloader.look().await;
        assert_eq!(pair.holds(), [0, 0]);
        // The other half has come: nothing else was wrong.
        pair.write([1, 1]);
        pair.is_unusable.store(false, Ordering::SeqCst);
        reloader.look().await;
        assert_eq!(pair.holds(), [1, 1]);
    }

    #[tokio::test]
    async fn tls_files_that_were_part_of_a_refused_reload_wait_for_one_that_succeeds() {
        let (reloader, pair, wrong) = with_pair();
        wrong.store(7, Ordering::SeqCst);
        pair.write([1, 0]);
        reloader.reload().await.unwrap_err();
        reloader.look().await;
        assert_eq!(pair.holds(), [0, 0], "all is as it was");
        // One that has changed since brings the other one with it.
        pair.write([1, 1]);
        reloader.look().await;
        assert_eq!(pair.holds(), [0, 0]);
        // Both have.
        pair.write([2, 1]);
        reloader.look().await;
        assert_eq!(pair.holds(), [2, 1]);
        pair.write([3, 3]);
        reloader.reload().await.unwrap_err();
        reloader.look().await;
        assert_eq!(pair.holds(), [2, 1]);
        wrong.store(0, Ordering::SeqCst);
        reloader.reload().await.unwrap();
        assert_eq!(pair.holds(), [3, 3]);
        pair.write([4, 3]);
        reloader.look().await;
        assert_eq!(pair.holds(), [4, 3], "that is over");
    }

    /// Lets the next one who reads stop, and returns how to wait for that and how to let him go on.
    fn stop_next(pair: &Pair) -> (Receiver<()>, SyncSender<()>) {
        let ((has_read, wait), (go_on, told)) = (sync_channel(1), sync_channel(1));
        *pair.stop.lock() = Some((has_read, told));
        (wait, go_on)
    }

    #[tokio::test]
    async fn what_was_read_earlier_never_comes_after_what_was_read_later() {
        let (reloader, pair, _) = with_pair();
        let (has_read, go_on) = stop_next(&pair);
        pair.write([1, 1]);
        let looker = Arc::clone(&reloader);
        let looking = tokio::spawn(async move { looker.look().await });
        tokio::task::spawn_blocking(move || has_read.recv().unwrap()).await.unwrap();
        pair.write([2, 2]);
        let asked = Arc::clone(&reloader);
        let mut reloading = tokio::spawn(async move { asked.reload().await });
        let early = tokio::time::timeout(Duration::from_millis(200), &mut reloading).await;
        assert!(early.is_err(), "two read at once");
        go_on.send(()).unwrap();
        looking.await.unwrap();
        reloading.await.unwrap().unwrap();
        assert_eq!(pair.holds(), [2, 2]);
    }

    #[tokio::test]
    async fn a_disk_that_hangs_keeps_nobody_from_seeing_the_status() {
        let (reloader, pair, _) = with_pair();
        let (has_read, go_on) = stop_next(&pair);
        let asked = Arc::clone(&reloader);
        let reloading = tokio::spawn(async move { asked.reload().await });
        tokio::task::spawn_blocking(move || has_read.recv().unwrap()).await.unwrap();
        let asks = Arc::clone(&reloader);
        let told = tokio::task::spawn_blocking(move || asks.status());
        let told = tokio::time::timeout(Duration::from_secs(5), told).await;
        go_on.send(()).unwrap();
        assert!(told.expect("the status hangs").unwrap().at.is_none());
        reloading.await.unwrap().unwrap();
        assert!(reloader.status().at.is_some());
    }
}
