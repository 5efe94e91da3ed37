//! What the standbys have, as far as it counts for what is acknowledged.
//!
//! Owns the policy's memory across sessions, hears when standbys move, and tells people when WAL is acknowledged without
//! them. Knows standbys by what they report and not as connections; decides nothing itself.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use crate::metrics::UpstreamMetrics;
use crate::session::acknowledge::{Acknowledged, Acknowledger, LocalWindow, Standbys};
use crate::status::{LocalWindowStatus, UpstreamStatus};
use crate::store::Positions;
use crate::wal::Lsn;

/// The policy at work.
pub struct Acknowledging {
    acknowledger: Acknowledger,
    standbys: Arc<dyn Standbys>,
    /// Marked whenever a standby has flushed or applied more, or has gone.
    standbys_moved: watch::Receiver<()>,
    status: watch::Sender<UpstreamStatus>,
    metrics: UpstreamMetrics,
    was_degraded: bool,
}

impl Acknowledging {
    /// Nothing is acknowledged yet.
    pub fn new(
        acknowledger: Acknowledger,
        standbys: Arc<dyn Standbys>,
        standbys_moved: watch::Receiver<()>,
        status: watch::Sender<UpstreamStatus>,
        metrics: UpstreamMetrics,
    ) -> Self {
        Self { acknowledger, standbys, standbys_moved, status, metrics, was_degraded: false }
    }

    /// Comes back when standbys have moved. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        if self.standbys_moved.changed().await.is_err() {
            // There are no standbys any more, and none will come.
            std::future::pending().await
        }
    }

    /// What may be reported now.
    pub(super) fn update(&mut self, now: Instant, positions: Positions) -> Acknowledged {
        self.standbys_moved.mark_unchanged();
        let mut acknowledged = Acknowledged::default();
        let acknowledger = &mut self.acknowledger;
        self.standbys.show(positions.timeline, &mut |standbys| {
            acknowledged = acknowledger.update(now, positions.flushed, standbys);
        });
        self.tell(acknowledged);
        acknowledged
    }

    /// The timeline was left at `fork`.
    pub(super) fn cut(&mut self, fork: Lsn) {
        self.acknowledger.cut(fork);
    }

    /// When `update` is to be called although nothing moves.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.acknowledger.deadline()
    }

    fn tell(&mut self, acknowledged: Acknowledged) {
        let is_degraded = self.acknowledger.is_degraded();
        if is_degraded != self.was_degraded {
            self.was_degraded = is_degraded;
            let policy = self.acknowledger.policy();
            if is_degraded {
                tracing::error!(%policy, "standbys are behind: WAL is acknowledged although it is durable here alone");
            } else {
                tracing::info!(%policy, "the standbys have all that was acknowledged");
            }
            self.metrics.acknowledge_degraded.set(f64::from(u8::from(is_degraded)));
        }
        let policy = self.acknowledger.policy();
        let windows = self.acknowledger.local_windows();
        self.status.send_if_modified(|status| {
            let told = &mut status.acknowledge;
            (told.flush, told.apply, told.degraded) = (acknowledged.flush, acknowledged.apply, is_degraded);
            if told.policy.is_none() {
                told.policy = Some(policy.to_string());
            }
            let shown = windows.iter().map(shown);
            if !shown.clone().eq(told.local_windows.iter().copied()) {
                told.local_windows = shown.collect();
            }
            // Whoever looks sees it; nobody waits for it.
            false
        });
    }
}

fn shown(window: &LocalWindow) -> LocalWindowStatus {
    LocalWindowStatus { from: window.range.start(), to: window.range.end(), open: window.is_open }
}
