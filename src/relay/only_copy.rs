//! The alarm for WAL that was acknowledged and is nowhere but here.
//!
//! Looks every second at what was acknowledged and what standbys have, whether or not there is an upstream. Sets gauges and the
//! status, and says so once when it has lasted. After a restart nobody knows what was acknowledged before: until something is,
//! all that is durable here counts.

use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use crate::downstream::Registry;
use crate::metrics::{StoreMetrics, bytes_value};
use crate::session::acknowledge::Standbys;
use crate::session::only_copy::{Held, OnlyCopy, OnlyCopyTracker};
use crate::status::{OnlyCopyStatus, Timestamp, UpstreamStatus};
use crate::store::Store;
use crate::wal::PgTimestamp;

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
        let mut interval = tokio::time::interval(LOOK_INTERVAL);
        loop {
            interval.tick().await;
            let Some(held) = self.held() else { continue };
            let now = tracker.update(Instant::now(), held);
            self.publish(now);
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

    fn held(&self) -> Option<Held> {
        let (positions, oldest) = (self.store.positions()?, self.store.oldest()?);
        let begun = self.store.lineage()?.ancestors().last().map(|ancestor| ancestor.switch_lsn);
        let mut flushed = None;
        self.registry.show(positions.timeline, &mut |standbys| {
            flushed = standbys.iter().filter_map(|standby| standby.flush).max();
        });
        let acknowledged = self.upstream.borrow().acknowledge.flush.unwrap_or(positions.flushed);
        let acknowledged = acknowledged.min(positions.flushed);
        Some(Held { timeline: positions.timeline, begun, acknowledged, oldest, flushed })
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

/// How often it is looked.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What a standby that keeps up never leaves behind for so long.
const WARN_AFTER: Duration = Duration::from_secs(60);
