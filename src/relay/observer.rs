//! What the store says, for everybody else.
//!
//! Turns its notices into watches, metrics and log lines. Called from the store's threads: must not block, and never
//! writes a line per segment or per sync.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::metrics::{StoreMetrics, position_value};
use crate::store::{Condition, Observer, Positions, StoreError};
use crate::wal::SegmentName;

/// Watches that the store's threads feed.
#[derive(Clone)]
pub(super) struct Notices {
    pub(super) positions: watch::Receiver<Option<Positions>>,
    pub(super) condition: watch::Receiver<Condition>,
}

pub(super) struct StoreObserver {
    positions: watch::Sender<Option<Positions>>,
    condition: watch::Sender<Condition>,
    metrics: StoreMetrics,
    /// The last failure of work that can wait, which is tried again every second, and when it was logged.
    housekeeping: Mutex<Option<(String, Instant)>>,
    /// Segments that the disk could not give back, each told of once: every client that wants them meets the error again.
    unreadable: Mutex<BTreeSet<SegmentName>>,
}

pub(super) fn store_observer(metrics: StoreMetrics) -> (StoreObserver, Notices) {
    let (positions, positions_watch) = watch::channel(None);
    let (condition, condition_watch) = watch::channel(Condition::Healthy);
    let notices = Notices { positions: positions_watch, condition: condition_watch };
    let observer = StoreObserver {
        positions,
        condition,
        metrics,
        housekeeping: Mutex::default(),
        unreadable: Mutex::default(),
    };
    (observer, notices)
}

impl Observer for StoreObserver {
    fn positions_changed(&self, positions: Positions) {
        self.metrics.verified.set(position_value(positions.verified));
        self.metrics.written.set(position_value(positions.written));
        self.metrics.flushed.set(position_value(positions.flushed));
        if let Some(sealed) = positions.sealed {
            self.metrics.sealed.set(position_value(sealed));
        }
        self.positions.send_replace(Some(positions));
    }

    fn condition_changed(&self, condition: Condition) {
        let as_gauge = |is: bool| if is { 1.0 } else { 0.0 };
        self.metrics.no_space.set(as_gauge(matches!(condition, Condition::NoSpace { .. })));
        self.metrics.failed.set(as_gauge(matches!(condition, Condition::Failed { .. })));
        match &condition {
            Condition::Healthy => tracing::info!("the store is healthy again"),
            Condition::NoSpace { .. } => {
                tracing::error!(condition = %condition_text(&condition), "WAL is not acknowledged until space returns");
            }
            Condition::Failed { .. } => {
                tracing::error!(condition = %condition_text(&condition), "the store has failed");
            }
        }
        self.condition.send_replace(condition);
    }

    fn synced(&self, bytes: u64, took: Duration) {
        self.metrics.synced_bytes.increment(bytes);
        self.metrics.sync_seconds.record(took);
    }

    fn sealed(&self, _name: SegmentName) {
        self.metrics.sealed_segments.increment(1);
    }

    fn suspect(&self, name: SegmentName, detail: &str) {
        self.metrics.suspect_segments.increment(1);
        let SegmentName { timeline, number } = name;
        tracing::error!(%timeline, number = number.0, detail, "WAL segment is damaged and is not served");
    }

    fn unreadable(&self, name: SegmentName, error: &std::io::Error) {
        self.metrics.read_errors.increment(1);
        let mut told = self.unreadable.lock();
        if told.len() >= SEGMENTS_REMEMBERED_MAX {
            told.clear();
        }
        if told.insert(name) {
            let SegmentName { timeline, number } = name;
            tracing::error!(%timeline, number = number.0, %error, "could not read WAL segment");
        }
    }

    fn housekeeping_failed(&self, error: &StoreError) {
        let text = error_text(error);
        let mut last = self.housekeeping.lock();
        let is_repeated = last
            .as_ref()
            .is_some_and(|(before, at)| *before == text && at.elapsed() < SAME_ERROR_LOG_INTERVAL);
        if !is_repeated {
            tracing::warn!(error = %text, "upkeep of the store failed and is tried again");
            *last = Some((text, Instant::now()));
        }
    }
}

pub(super) fn condition_text(condition: &Condition) -> String {
    match condition {
        Condition::Healthy => "healthy".to_owned(),
        Condition::NoSpace { file, reason } => format!("no space for \"{file}\": {reason}"),
        Condition::Failed { operation, file, reason } => {
            format!("could not {operation} \"{file}\": {reason}")
        }
    }
}

fn error_text(error: &StoreError) -> String {
    let cause = std::error::Error::source(error);
    cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

/// Segments that are remembered as told of.
const SEGMENTS_REMEMBERED_MAX: usize = 4096;

/// The same failure is logged again after this time.
const SAME_ERROR_LOG_INTERVAL: Duration = Duration::from_secs(60);
