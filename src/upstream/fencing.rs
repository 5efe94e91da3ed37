//! Being fenced: the upstream is left, and stays left until somebody takes the fence away.
//!
//! Owns the way from a request to its confirmation: leave, with a last report; make durable what was received; make the fence
//! durable; only then confirm it. The task of the upstream does all that, so that nothing can be received meanwhile. Whoever
//! asks holds a [`FenceSwitch`], and is never told of a fence that a crash could take away.
//!
//! ```text
//!          asked               left, received WAL synced, fence on disk
//!   Open ────────▶ Leaving ─────────────────────────────────────────────▶ Fenced ──┐ kill, restart
//!     ▲                                                                   ▲  │  ▲  │
//!     └─────────────────── taken away, and durably so ───────────────────────┘  └──┘
//! ```

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::metrics::UpstreamMetrics;
use crate::status::{FenceStatus, Timestamp, UpstreamStatus, WalReceiverState};
use crate::store::{Condition, Fence, Store, StoreError};
use crate::upstream::Upstream;
use crate::upstream::error::chain;
use crate::upstream::slot_cost::SlotWatch;
use crate::wal::PgTimestamp;

/// What is wanted, by which request.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    fenced: bool,
    request: u64,
}

/// The last request that was carried out, and what is so since; or why the newest one could not be carried out yet.
#[derive(Clone, Debug, Default)]
struct Settled {
    request: u64,
    fence: FenceStatus,
    obstacle: Option<String>,
}

/// Where a fence is asked for; clones are the same.
#[derive(Clone, Debug)]
pub struct FenceSwitch {
    wanted: Arc<watch::Sender<Wanted>>,
    settled: watch::Receiver<Settled>,
}

/// The fence is not as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FenceError {
    /// Not yet.
    #[error("{what} is not durable after {} seconds, and not confirmed: {obstacle}", FENCE_TIME_MAX.as_secs())]
    NotYet {
        /// What was asked for.
        what: &'static str,
        /// What it waits for.
        obstacle: String,
    },
    /// Somebody else has asked for the contrary meanwhile.
    #[error("{0} was overtaken by a request for the contrary")]
    Overtaken(&'static str),
    /// The relay stops.
    #[error("the relay is stopping")]
    Stopping,
}

impl FenceSwitch {
    /// Leaves the upstream, and receives and acknowledges nothing more on any timeline. On return that is durable, nothing is on
    /// its way to the upstream any more, and what was received is durable too.
    pub async fn fence(&self) -> Result<FenceStatus, FenceError> {
        self.ask(true, "the fence").await
    }

    /// Takes the fence away; durable on return.
    pub async fn unfence(&self) -> Result<FenceStatus, FenceError> {
        self.ask(false, "taking the fence away").await
    }

    async fn ask(&self, fenced: bool, what: &'static str) -> Result<FenceStatus, FenceError> {
        let mut settled = self.settled.clone();
        let mut request = 0;
        self.wanted.send_modify(|wanted| {
            request = wanted.request + 1;
            *wanted = Wanted { fenced, request };
        });
        let answer = timeout(FENCE_TIME_MAX, settled.wait_for(|settled| settled.request >= request))
            .await
            .map(|answer| answer.map(|settled| settled.fence.clone()).map_err(|_| FenceError::Stopping));
        match answer {
            Ok(Ok(fence)) if fence.fenced != fenced => Err(FenceError::Overtaken(what)),
            Ok(answer) => answer,
            Err(_) => {
                let obstacle = self.settled.borrow().obstacle.clone();
                let obstacle = obstacle.unwrap_or_else(|| "the upstream has not been left yet".to_owned());
                Err(FenceError::NotYet { what, obstacle })
            }
        }
    }
}

/// The other end, in the upstream's task.
pub struct Fencing {
    wanted: watch::Receiver<Wanted>,
    settled: watch::Sender<Settled>,
}

impl Fencing {
    /// As the store was left.
    pub fn new(store: &Store) -> (FenceSwitch, Self) {
        let (asked, wanted) = watch::channel(Wanted { fenced: store.fence().is_some(), request: 0 });
        let (settled, told) = watch::channel(Settled::default());
        (FenceSwitch { wanted: Arc::new(asked), settled: told }, Self { wanted, settled })
    }

    /// Whether the upstream is to be left alone.
    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.borrow().fenced
    }

    /// Cancels `leave` as soon as a fence is wanted, and answers those who ask for none. Never comes back.
    pub(super) fn watch(&self, leave: CancellationToken) -> impl Future<Output = ()> + use<> {
        let (mut wanted, settled) = (self.wanted.clone(), self.settled.clone());
        async move {
            loop {
                let now = *wanted.borrow_and_update();
                if now.fenced {
                    leave.cancel();
                } else {
                    settle(&settled, now.request, FenceStatus::default());
                }
                if wanted.changed().await.is_err() {
                    std::future::pending().await
                }
            }
        }
    }
}

fn settle(settled: &watch::Sender<Settled>, request: u64, fence: FenceStatus) {
    settled.send_modify(|settled| {
        let request = request.max(settled.request);
        *settled = Settled { request, fence, obstacle: None };
    });
}

/// The fence of a store as it is shown.
pub fn fence_status(store: &Store) -> FenceStatus {
    let Some(fence) = store.fence() else { return FenceStatus::default() };
    let positions = store.positions();
    FenceStatus {
        fenced: true,
        since: Some(Timestamp(fence.since)),
        system_identifier: store.identity().map(|identity| identity.system_id.to_string()),
        timeline: positions.map(|positions| positions.timeline),
        flushed: positions.map(|positions| positions.flushed),
    }
}

/// Publishes the fence as it is now.
pub(super) fn show(store: &Store, status: &watch::Sender<UpstreamStatus>, metrics: &UpstreamMetrics) {
    let fence = fence_status(store);
    metrics.fenced.set(f64::from(u8::from(fence.fenced)));
    status.send_modify(|status| status.fence = fence);
}

impl Upstream {
    /// The upstream has been left. Comes back when the fence has been taken away, or the relay stops.
    pub(super) async fn stay_fenced(&mut self) {
        self.status.send_modify(|status| {
            status.state = WalReceiverState::Stopped;
            status.is_writable = false;
        });
        let was_fenced = self.store.fence().is_some();
        if was_fenced {
            tracing::warn!(
                "this relay is fenced: it serves what it holds, and receives and acknowledges nothing"
            );
        }
        let (mut slot_watch, servers) = (SlotWatch::default(), self.all_servers());
        loop {
            let wanted = *self.fencing.wanted.borrow_and_update();
            let shutdown = self.shutdown.clone();
            let outcome = tokio::select! {
                () = shutdown.cancelled() => return,
                outcome = self.bring_about(wanted) => outcome,
            };
            match outcome {
                Ok(()) => {
                    show(&self.store, &self.status, &self.metrics);
                    settle(&self.fencing.settled, wanted.request, fence_status(&self.store));
                    if !wanted.fenced {
                        return;
                    }
                }
                Err(ref obstacle) => self.tell_obstacle(obstacle),
            }
            let mut asked = self.fencing.wanted.clone();
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                // Whoever could ask is gone; so is the fence's end.
                changed = asked.changed() => if changed.is_err() { self.shutdown.cancelled().await },
                () = tokio::time::sleep(RETRY_INTERVAL), if outcome.is_err() => {}
                () = self.keep_watching_slot(&mut slot_watch, &servers), if outcome.is_ok() => {}
            }
        }
    }

    /// Makes the fence as it is wanted, or says what is in the way.
    async fn bring_about(&mut self, wanted: Wanted) -> Result<(), String> {
        let standing = self.store.fence().is_some();
        if standing == wanted.fenced {
            return Ok(());
        }
        if wanted.fenced {
            self.wait_until_durable().await?;
        }
        let fence = wanted.fenced.then(|| Fence { since: PgTimestamp::from_system_time(SystemTime::now()) });
        let store = self.store.clone();
        // On a thread of its own: a disk may take as long as it likes.
        let written = tokio::task::spawn_blocking(move || store.set_fence(fence)).await;
        let written = written.map_err(|_| "the fence's file could not be written".to_owned())?;
        written.map_err(|error: StoreError| chain(&error))?;
        match fence_status(&self.store) {
            FenceStatus { fenced: true, timeline, flushed, .. } => {
                let [timeline, flushed] =
                    [timeline.map(|timeline| timeline.to_string()), flushed.map(|lsn| lsn.to_string())]
                        .map(|told| told.unwrap_or_else(|| "none".to_owned()));
                tracing::warn!(
                    timeline,
                    flushed,
                    "fenced: the upstream has been left, nothing more is received or acknowledged until the fence is taken away"
                );
            }
            FenceStatus { .. } => {
                tracing::warn!("the fence has been taken away: following the upstream again")
            }
        }
        Ok(())
    }

    /// What was received is synced, unless the disk has no room: then it was not acknowledged, and will not be.
    async fn wait_until_durable(&mut self) -> Result<(), String> {
        let is_idle = || self.store.positions().is_none_or(|at| at.flushed >= at.verified);
        if is_idle() || !matches!(self.store.condition(), Condition::Healthy) {
            return Ok(());
        }
        let _ = timeout(RETRY_INTERVAL, self.positions.changed()).await;
        if is_idle() { Ok(()) } else { Err("WAL that was received is being synced".to_owned()) }
    }

    fn tell_obstacle(&self, obstacle: &str) {
        let is_news = self.fencing.settled.borrow().obstacle.as_deref() != Some(obstacle);
        if is_news {
            tracing::warn!(obstacle, "the fence is not yet as it was asked for");
            self.fencing.settled.send_modify(|settled| settled.obstacle = Some(obstacle.to_owned()));
        }
    }
}

/// Longest wait for a confirmation; what was asked for is still being tried then.
pub const FENCE_TIME_MAX: Duration = Duration::from_secs(20);

/// What could not be made durable is tried again after this time.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);
