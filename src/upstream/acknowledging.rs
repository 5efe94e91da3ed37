//! What the standbys have, as far as it counts for what is acknowledged.
//!
//! Owns the policy's memory across sessions, hears when standbys move, and tells people when WAL is acknowledged without
//! them, which is never done before it is written down. Knows standbys by what they report and not as connections; decides nothing itself.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::metrics::UpstreamMetrics;
use crate::session::acknowledge::{Acknowledged, Acknowledger, Durable, LocalWindow, Standbys, WindowState};
use crate::session::only_copy::Recalled;
use crate::status::{LocalWindowStatus, UpstreamStatus};
use crate::store::{OnlyCopySince, Positions, Store};
use crate::upstream::local_windows::LocalWindows;
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
    was_held_back: bool,
    windows: LocalWindows,
    /// What was said last as flushed.
    said: Option<Lsn>,
}

impl Acknowledging {
    /// Nothing is acknowledged yet. The standbys come with what is marked when they move; what an earlier process has
    /// acknowledged without them is known to the store.
    pub fn new(
        mut acknowledger: Acknowledger,
        (standbys, standbys_moved): (Arc<dyn Standbys>, watch::Receiver<()>),
        store: Store,
        status: watch::Sender<UpstreamStatus>,
        metrics: UpstreamMetrics,
    ) -> Self {
        let before = store.only_copy_before();
        let windows = LocalWindows::new(store);
        acknowledger.take_over(windows.left());
        if let Some(fork) = windows.left_at() {
            acknowledger.cut(fork);
        }
        if let Some(before) = before {
            let OnlyCopySince { timeline, elsewhere, end, age } = before;
            // Rather too early than too late: what is not known is taken for too long.
            let age = age.unwrap_or(Duration::MAX);
            acknowledger.recall_only_copy(Instant::now(), Recalled { timeline, elsewhere, end, age });
        }
        let (was_degraded, was_held_back, said) = (false, false, None);
        let new = Self {
            acknowledger,
            standbys,
            standbys_moved,
            status,
            metrics,
            was_degraded,
            was_held_back,
            windows,
            said,
        };
        new.tell(Acknowledged::default());
        new
    }

    /// Comes back when standbys have moved, or something was written down. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        tokio::select! {
            changed = self.standbys_moved.changed() => if changed.is_err() {
                // There are no standbys any more, and none will come.
                self.windows.changed().await;
            },
            () = self.windows.changed() => {}
        }
    }

    /// What may be reported now.
    pub(super) fn update(&mut self, now: Instant, positions: Positions) -> Acknowledged {
        self.standbys_moved.mark_unchanged();
        let mut acknowledged = Acknowledged::default();
        let acknowledger = &mut self.acknowledger;
        let Positions { timeline, flushed, .. } = positions;
        self.standbys.show(timeline, &mut |standbys| {
            acknowledged = acknowledger.update(now, Durable { timeline, flushed }, standbys);
        });
        let is_written_down = self.windows.keep(now, self.acknowledger.local_windows());
        if self.acknowledger.is_degraded() && !is_written_down {
            acknowledged.flush = self.said.map(|said| said.min(positions.flushed));
        }
        self.said = acknowledged.flush;
        self.note_degraded();
        self.note_held_back(acknowledged);
        self.tell(acknowledged);
        acknowledged
    }

    /// The timeline was left at `fork`.
    pub(super) fn cut(&mut self, fork: Lsn) {
        self.acknowledger.cut(fork);
        self.said = self.said.map(|said| said.min(fork));
    }

    /// When `update` is to be called although nothing moves.
    pub(super) fn deadline(&self) -> Option<Instant> {
        [self.acknowledger.deadline(), self.windows.deadline()].into_iter().flatten().min()
    }

    fn note_degraded(&mut self) {
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
    }

    fn note_held_back(&mut self, acknowledged: Acknowledged) {
        let is_held_back = self.acknowledger.is_held_back();
        if is_held_back == self.was_held_back {
            return;
        }
        self.was_held_back = is_held_back;
        if is_held_back {
            let flush = acknowledged.flush.map(|flush| flush.to_string());
            tracing::error!(
                flush,
                "WAL that was acknowledged has been at no standby for only_copy_time_max: nothing more is acknowledged until it is"
            );
        } else {
            tracing::info!("WAL that was acknowledged is at a standby: acknowledging goes on");
        }
        self.metrics.acknowledge_held_back.set(f64::from(u8::from(is_held_back)));
    }

    fn tell(&self, acknowledged: Acknowledged) {
        let is_degraded = self.acknowledger.is_degraded();
        let is_held_back = self.acknowledger.is_held_back();
        let policy = self.acknowledger.policy();
        let windows = self.acknowledger.local_windows();
        self.status.send_if_modified(|status| {
            let told = &mut status.acknowledge;
            (told.flush, told.apply, told.degraded) = (acknowledged.flush, acknowledged.apply, is_degraded);
            told.held_back = is_held_back;
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
    LocalWindowStatus {
        timeline: window.timeline,
        from: window.range.start(),
        to: window.range.end(),
        open: window.state == WindowState::Open,
        left: window.state == WindowState::Left,
    }
}
