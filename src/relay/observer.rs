//! What the store says, for everybody else.
//!
//! Turns its notices into watches, metrics and log lines. Called from the store's threads: must not block, and never
//! writes a line per segment or per sync.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::metrics::{StoreMetrics, position_value};
use crate::store::{
    Condition, DamagedSegment, Observer, Positions, SlotCause, SlotNotice, Store, StoreError,
};
use crate::wal::{Lsn, SegmentName};

/// Watches that the store's threads feed.
#[derive(Clone)]
pub(super) struct Notices {
    pub(super) positions: watch::Receiver<Option<Positions>>,
    pub(super) condition: watch::Receiver<Condition>,
    /// Marked when a damaged segment was found, or is whole again.
    pub(super) damage: watch::Receiver<()>,
}

pub(super) struct StoreObserver {
    positions: watch::Sender<Option<Positions>>,
    condition: watch::Sender<Condition>,
    damage: watch::Sender<()>,
    metrics: StoreMetrics,
    /// The last failure of work that can wait, which is tried again every second, and when it was logged.
    housekeeping: Mutex<Option<(String, Instant)>>,
    /// Damage that was told of: every client that wants the segment meets it again.
    told: Mutex<Told>,
    /// When it was logged that the disk budget is used up.
    budget_told: Mutex<Option<Instant>>,
}

pub(super) fn store_observer(metrics: StoreMetrics) -> (StoreObserver, Notices) {
    let (positions, positions_watch) = watch::channel(None);
    let (condition, condition_watch) = watch::channel(Condition::Healthy);
    let (damage, damage_watch) = watch::channel(());
    let notices = Notices { positions: positions_watch, condition: condition_watch, damage: damage_watch };
    let observer = StoreObserver {
        positions,
        condition,
        damage,
        metrics,
        housekeeping: Mutex::default(),
        told: Mutex::default(),
        budget_told: Mutex::default(),
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
        if self.told.lock().is_news(Instant::now(), name, detail) {
            let SegmentName { timeline, number } = name;
            tracing::error!(%timeline, number = number.0, detail, "WAL segment is damaged and is not served");
        }
        self.damage.send_replace(());
    }

    fn repaired(&self, name: SegmentName) {
        self.metrics.repaired_segments.increment(1);
        let SegmentName { timeline, number } = name;
        tracing::info!(%timeline, number = number.0, "WAL segment is as it was written again");
        self.damage.send_replace(());
    }

    fn scrubbed(&self) {
        self.metrics.scrubbed_segments.increment(1);
    }

    fn scrub_round_ended(&self) {
        self.metrics.scrub_rounds.increment(1);
    }

    fn unreadable(&self, name: SegmentName, error: &std::io::Error) {
        self.metrics.read_errors.increment(1);
        if self.told.lock().is_news(Instant::now(), name, &error.to_string()) {
            let SegmentName { timeline, number } = name;
            tracing::error!(%timeline, number = number.0, %error, "could not read WAL segment");
        }
        self.damage.send_replace(());
    }

    fn slot_taken(&self, notice: &SlotNotice) {
        if notice.terminating.is_none() {
            self.metrics.invalidated_slots.increment(1);
        }
        let SlotNotice { name, restart_lsn, terminating, cause } = notice;
        let (detail, hint) = slot_words(*restart_lsn, cause);
        match terminating {
            Some(pid) => {
                tracing::warn!(
                    detail,
                    hint,
                    "terminating process {pid} to release replication slot \"{name}\""
                );
            }
            None => tracing::warn!(detail, hint, "invalidating obsolete replication slot \"{name}\""),
        }
    }

    fn kept_wal_given_up(&self) {
        self.metrics.budget_segments.increment(1);
        let now = Instant::now();
        let mut told = self.budget_told.lock();
        if told.is_none_or(|at| now.duration_since(at) >= DAMAGE_LOG_INTERVAL) {
            tracing::warn!("the disk budget is used up: WAL that no slot needs is removed before its time");
            *told = Some(now);
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

/// Why a slot is taken away and what would prevent it, in PostgreSQL's words.
fn slot_words(restart_lsn: Option<Lsn>, cause: &SlotCause) -> (String, &'static str) {
    let position = restart_lsn.map_or_else(|| "0/0".to_owned(), |restart_lsn| restart_lsn.to_string());
    match cause {
        SlotCause::TooFarBehind { oldest_kept } => {
            let excess = restart_lsn.map_or(0, |restart_lsn| oldest_kept.bytes_since(restart_lsn));
            let detail = format!("The slot's restart_lsn {position} exceeds the limit by {excess} bytes.");
            (detail, "You might need to increase \"max_slot_wal_keep_size\".")
        }
        SlotCause::Idle { time, timeout } => {
            let (time, timeout) = (time.as_secs(), timeout.as_secs());
            let detail = format!(
                "The slot's idle time of {time}s exceeds the configured \"idle_replication_slot_timeout\" duration of {timeout}s."
            );
            (detail, "You might need to increase \"idle_replication_slot_timeout\".")
        }
        SlotCause::DiskBudget { budget } => {
            let detail = format!(
                "The disk budget of {budget} bytes is used up, and of all slots this one is furthest behind, at {position}."
            );
            (detail, "You might need to increase \"disk_budget\".")
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

pub(super) fn error_text(error: &StoreError) -> String {
    let cause = std::error::Error::source(error);
    cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

/// What was said of damaged segments, and when.
#[derive(Default)]
struct Told {
    segments: BTreeMap<SegmentName, (String, Instant)>,
}

impl Told {
    /// Whether a line is to be written: the same of one segment again only after a while, and not of too many at a time.
    fn is_news(&mut self, now: Instant, name: SegmentName, detail: &str) -> bool {
        self.segments.retain(|_, (_, at)| now.duration_since(*at) < SAME_ERROR_LOG_INTERVAL);
        if self.segments.get(&name).is_some_and(|(before, _)| before == detail)
            || self.segments.len() >= SEGMENTS_TOLD_MAX
        {
            return false;
        }
        self.segments.insert(name, (detail.to_owned(), now));
        true
    }
}

/// Says again, now and then, that segments are damaged, as long as some are.
pub(super) async fn remind_of_damage(store: Store, mut damage: watch::Receiver<()>) {
    loop {
        if store.damaged().is_empty() {
            if damage.changed().await.is_err() {
                return;
            }
            continue;
        }
        tokio::time::sleep(DAMAGE_LOG_INTERVAL).await;
        let damaged = store.damaged();
        if let Some(DamagedSegment { name: SegmentName { timeline, number }, detail, repair_error }) =
            damaged.first()
        {
            let repair_error = repair_error.as_deref().unwrap_or("none");
            tracing::error!(
                segments = damaged.len(), %timeline, number = number.0, detail, repair_error,
                "WAL segments are damaged, this one and perhaps newer ones"
            );
        }
    }
}

/// Segments of which something is said within [`SAME_ERROR_LOG_INTERVAL`]; `/status` has all.
const SEGMENTS_TOLD_MAX: usize = 20;

/// Damage that is still there is told of again after this time.
const DAMAGE_LOG_INTERVAL: Duration = Duration::from_secs(600);

/// The same failure is logged again after this time.
const SAME_ERROR_LOG_INTERVAL: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::{SegmentNo, TimelineId};

    #[test]
    fn the_same_damage_is_told_again_after_a_while_and_not_of_everything_at_once() {
        let (mut told, mut now) = (Told::default(), Instant::now());
        let name = |number| SegmentName { timeline: TimelineId::FIRST, number: SegmentNo(number) };
        assert!(told.is_news(now, name(1), "lost"));
        assert!(!told.is_news(now, name(1), "lost"));
        assert!(told.is_news(now, name(1), "rotten"));
        now += SAME_ERROR_LOG_INTERVAL;
        assert!(told.is_news(now, name(1), "rotten"));
        let lines = (0..1000).filter(|number| told.is_news(now, name(*number), "lost")).count();
        assert!(lines <= SEGMENTS_TOLD_MAX, "{lines}");
    }
}
