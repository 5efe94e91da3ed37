//! The alarm for WAL that was acknowledged and is nowhere but here.
//!
//! Looks every second at what was acknowledged and what standbys have, whether or not there is an upstream. Sets gauges and the
//! status, says so once when it has lasted, and has the store remember it for the next process. After a restart nobody knows
//! what was acknowledged before: until something is, all that is durable here counts.

use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::downstream::Registry;
use crate::metrics::{StoreMetrics, bytes_value};
use crate::relay::observer::error_text;
use crate::session::acknowledge::Standbys;
use crate::session::only_copy::{Held, Known, OnlyCopy, OnlyCopyTracker, Recalled};
use crate::status::{OnlyCopyStatus, Timestamp, UpstreamStatus};
use crate::store::{OnlyCopySince, Store, StoreError};
use crate::wal::{Lsn, PgTimestamp, TimelineId};

/// Where the state of it is taken from, and where it goes.
pub(super) struct OnlyCopyAlarm {
    pub(super) store: Store,
    pub(super) registry: std::sync::Arc<Registry>,
    pub(super) upstream: watch::Receiver<UpstreamStatus>,
    pub(super) metrics: StoreMetrics,
    pub(super) told: watch::Sender<Option<OnlyCopyStatus>>,
}

impl OnlyCopyAlarm {
    /// Never comes back.
    pub(super) async fn run(self) {
        let (mut tracker, mut has_warned) = (OnlyCopyTracker::default(), false);
        let mut memory = Memory { store: self.store.clone(), said: None, saving: None, saved_at: None };
        if let Some(OnlyCopySince { timeline, elsewhere, end, age }) = self.store.only_copy_before() {
            // No more is told than is known.
            let age = age.unwrap_or_default();
            tracker.recall(Instant::now(), Recalled { timeline, elsewhere, end, age });
        }
        let mut interval = tokio::time::interval(LOOK_INTERVAL);
        let mut looked_at = Instant::now();
        loop {
            interval.tick().await;
            let Some(held) = self.held(tracker.timeline()) else { continue };
            let moment = Instant::now();
            let gap = moment.saturating_duration_since(std::mem::replace(&mut looked_at, moment));
            let now = tracker.update(moment, held);
            self.publish(now);
            if self.upstream.borrow().acknowledge.flush.is_some() {
                memory.keep(moment, gap, held.timeline, tracker.known(moment)).await;
            }
            let lasts = now.age >= WARN_AFTER;
            if lasts && !has_warned {
                tracing::warn!(
                    bytes = now.bytes,
                    seconds = now.age.as_secs(),
                    "WAL was acknowledged that no standby of this relay has: this is the only copy"
                );
            }
            has_warned = lasts;
        }
    }

    fn held(&self, before: Option<TimelineId>) -> Option<Held> {
        let (positions, oldest) = (self.store.positions()?, self.store.oldest()?);
        let left = before.and_then(|before| self.store.lineage()?.left(before)).map(|(fork, _)| fork);
        let mut flushed = None;
        self.registry.show(positions.timeline, &mut |standbys| {
            flushed = standbys.iter().filter_map(|standby| standby.flush).max();
        });
        let acknowledged = self.upstream.borrow().acknowledge.flush.unwrap_or(positions.flushed);
        let acknowledged = acknowledged.min(positions.flushed);
        Some(Held { timeline: positions.timeline, left, acknowledged, oldest, flushed })
    }

    fn publish(&self, now: OnlyCopy) {
        let OnlyCopy { bytes, age } = now;
        self.metrics.only_copy_bytes.set(bytes_value(bytes));
        self.metrics.only_copy_seconds.set(age.as_secs_f64());
        let since = SystemTime::now().checked_sub(age).filter(|_| bytes > 0);
        let since = since.map(|since| Timestamp(PgTimestamp::from_system_time(since)));
        self.told.send_replace(Some(OnlyCopyStatus { bytes, since }));
    }
}

/// What the next process will know.
struct Memory {
    store: Store,
    /// What is written down, or being written: the timeline, what standbys have, and whether more was acknowledged.
    said: Option<(TimelineId, Option<Lsn>, bool)>,
    saving: Option<JoinHandle<Result<(), StoreError>>>,
    saved_at: Option<Instant>,
}

impl Memory {
    /// Has it written down (`gap` after the look before), one write at a time, and not too often; what was written before is
    /// on the safe side meanwhile: no less was only here.
    async fn keep(&mut self, now: Instant, gap: Duration, timeline: TimelineId, known: Known) {
        if self.saving.as_ref().is_some_and(|saving| !saving.is_finished()) {
            return;
        }
        if let Some(saving) = self.saving.take()
            && let Ok(Err(error)) = saving.await
        {
            tracing::warn!(
                error = %error_text(&error),
                "could not write down since when WAL is nowhere but here"
            );
            self.said = None;
        }
        let wanted = Some((timeline, known.elsewhere, known.age.is_some()));
        let is_due = self.saved_at.is_none_or(|at| now.saturating_duration_since(at) >= SAVE_INTERVAL);
        if !is_due || self.said == wanted {
            return;
        }
        (self.said, self.saved_at) = (wanted, Some(now));
        let (store, Known { elsewhere, age }) = (self.store.clone(), known);
        // What began between two looks is taken to have begun at the first, and the write itself may come late.
        let age = age.map_or(Duration::ZERO, |age| age.saturating_add(gap));
        let remember =
            move || store.remember_only_copy(timeline, elsewhere, Some(age.saturating_add(now.elapsed())));
        self.saving = Some(tokio::task::spawn_blocking(remember));
    }
}

/// Changes are written down at most so often.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);

/// How often it is looked.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What a standby that keeps up never leaves behind for so long.
const WARN_AFTER: Duration = Duration::from_secs(60);
