//! What a person has still to see to, over restarts.
//!
//! Owns the looks at the reports in the data directory: as long as one lies there the status says what it tells of, and asks for
//! a person. Whoever has seen to it moves the report away, which is noticed soon. Asks no server anything.

use std::time::Duration;

use tokio::sync::watch;

use crate::metrics::UpstreamMetrics;
use crate::status::UpstreamStatus;
use crate::store::{Reports, Store};
use crate::upstream::Upstream;
use crate::upstream::blocking::block_in_place;
use crate::upstream::error::chain;

/// The reports, looked at as long as this is polled.
struct ReportWatch {
    store: Store,
    status: watch::Sender<UpstreamStatus>,
    metrics: UpstreamMetrics,
    /// What was there the last time.
    known: Reports,
}

impl Upstream {
    /// What is there now is told on return. The rest never comes back.
    pub(super) fn watch_reports(&self) -> impl Future<Output = ()> + use<> {
        let (store, status, metrics) = (self.store.clone(), self.status.clone(), self.metrics.clone());
        let mut watch = ReportWatch { store, status, metrics, known: Reports::default() };
        match block_in_place(|| watch.store.reports()) {
            Ok(now) => watch.take_in(now),
            Err(error) => tracing::warn!(error = %chain(&error), "could not look for reports"),
        }
        watch.run()
    }
}

impl ReportWatch {
    async fn run(mut self) {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let store = self.store.clone();
            // One that cannot be seen is there still, for all that is known.
            if let Ok(Ok(now)) = tokio::task::spawn_blocking(move || store.reports()).await {
                self.take_in(now);
            }
        }
    }

    fn take_in(&mut self, now: Reports) {
        let before = std::mem::replace(&mut self.known, now);
        self.status.send_if_modified(|status| {
            // What was told and could not be reported stands until the next start.
            let diverged = now.diverged || (status.diverged && !before.diverged);
            let lost = now.lost.or(status.lost_for_good.filter(|_| before.lost.is_none()));
            if (status.diverged, status.lost_for_good) == (diverged, lost) {
                return false;
            }
            (status.diverged, status.lost_for_good) = (diverged, lost);
            status.needs_attention = status.is_hurt();
            self.metrics.needs_attention.set(f64::from(u8::from(status.needs_attention)));
            true
        });
    }
}

/// How often it is looked.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
