//! Whether the primary waits for this relay as it is expected to.
//!
//! Owns the verdict: on what the server is seen to think of us, and on having seen nothing of it for too long. Who is not streamed
//! to is waited for in vain, if at all, and what was seen last is not so for ever. Asks nobody.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::metrics::UpstreamMetrics;
use crate::status::{UpstreamStatus, WalReceiverState};
use crate::upstream::Upstream;
use crate::upstream::looking::FIRST_LOOK_DELAY;
use crate::upstream::seen::is_waited_for;

/// What is expected, and who is told whether it is so.
pub(super) struct Expectation {
    /// Whether the primary is expected to wait for this relay.
    expects_sync: bool,
    status: watch::Sender<UpstreamStatus>,
    metrics: UpstreamMetrics,
}

impl Upstream {
    pub(super) fn expectation(&self) -> Expectation {
        let (status, metrics) = (self.status.clone(), self.metrics.clone());
        Expectation { expects_sync: self.settings.expect_sync, status, metrics }
    }
}

impl Expectation {
    /// Whether it is as it should be; what is not known is not.
    pub(super) fn judge(&self, sync_state: Option<&str>) {
        let is_wrong = self.expects_sync && !is_waited_for(sync_state);
        let metrics = &self.metrics;
        metrics.not_synchronous.set(f64::from(u8::from(is_wrong)));
        if self.status.borrow().not_synchronous == is_wrong {
            return;
        }
        if is_wrong {
            let sync_state = sync_state.unwrap_or("not told");
            tracing::warn!(
                sync_state,
                "the upstream is expected to wait for this relay, and does not, or does not say so: is the relay's name in \
                 synchronous_standby_names?"
            );
        } else {
            tracing::info!("the upstream waits for this relay, as expected");
        }
        self.status.send_modify(|status| {
            status.not_synchronous = is_wrong;
            status.needs_attention = status.is_hurt();
            metrics.needs_attention.set(f64::from(u8::from(status.needs_attention)));
        });
    }

    /// Tells when nothing was streamed for too long. Never comes back.
    pub(super) async fn watch(self) {
        let mut status = self.status.subscribe();
        let mut unseen_since = Instant::now();
        loop {
            let is_due = !self.is_told();
            tokio::select! {
                () = until(&mut status, |state| state == WalReceiverState::Streaming) => {}
                () = tokio::time::sleep_until(unseen_since + UNSEEN_TIME_MAX), if is_due => {
                    self.tell_unseen();
                    continue;
                }
            }
            let began = Instant::now();
            until(&mut status, |state| state != WalReceiverState::Streaming).await;
            // During a shorter one nothing can be seen.
            if began.elapsed() > FIRST_LOOK_DELAY {
                unseen_since = Instant::now();
            }
        }
    }

    fn is_told(&self) -> bool {
        let status = self.status.borrow();
        status.sync_state.is_none() && status.not_synchronous == self.expects_sync
    }

    fn tell_unseen(&self) {
        if self.expects_sync {
            tracing::warn!(
                seconds = UNSEEN_TIME_MAX.as_secs(),
                "the upstream is expected to wait for this relay, and nothing has been streamed from it for so long: nobody knows \
                 whether it waits"
            );
            self.metrics.not_synchronous.set(1.0);
            self.metrics.needs_attention.set(1.0);
        }
        self.status.send_modify(|status| {
            status.sync_state = None;
            status.not_synchronous = self.expects_sync;
            status.needs_attention |= self.expects_sync;
        });
    }
}

async fn until(status: &mut watch::Receiver<UpstreamStatus>, is_so: impl Fn(WalReceiverState) -> bool) {
    if status.wait_for(|status| is_so(status.state)).await.is_err() {
        // Nobody changes it any more.
        std::future::pending().await
    }
}

/// Time without a stream after which what was seen last does not count any more: a restart of the primary, or a failover, takes
/// less.
const UNSEEN_TIME_MAX: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::AllMetrics;

    fn expectation(expects_sync: bool) -> (Expectation, watch::Sender<UpstreamStatus>) {
        let status = watch::Sender::<UpstreamStatus>::default();
        let metrics = AllMetrics::default().upstream;
        (Expectation { expects_sync, status: status.clone(), metrics }, status)
    }

    fn set(status: &watch::Sender<UpstreamStatus>, state: WalReceiverState) {
        status.send_modify(|status| status.state = state);
    }

    async fn seconds(seconds: u64) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_no_stream_for_too_long_is_not_known_to_be_waited_for() {
        let (expectation, status) = expectation(true);
        let watch = tokio::spawn(expectation.watch());
        let seen = Expectation { status: status.clone(), ..self::expectation(true).0 };
        let told = || {
            let status = status.borrow();
            assert_eq!(status.not_synchronous, status.needs_attention);
            (status.not_synchronous, status.sync_state.clone())
        };
        let sync = || Some("sync".to_owned());
        seconds(29).await;
        assert_eq!(told(), (false, None), "it has just started");
        seconds(2).await;
        assert_eq!(told(), (true, None));
        // It streams, and is seen.
        set(&status, WalReceiverState::Streaming);
        seconds(3).await;
        status.send_modify(|status| status.sync_state = sync());
        seen.judge(Some("sync"));
        seconds(1000).await;
        assert_eq!(told(), (false, sync()));
        set(&status, WalReceiverState::Waiting);
        seconds(29).await;
        assert_eq!(told(), (false, sync()), "as it was seen last");
        // Nothing can be seen during streams that end at once.
        for _ in 0..3 {
            set(&status, WalReceiverState::Streaming);
            seconds(1).await;
            set(&status, WalReceiverState::Connecting);
            seconds(1).await;
        }
        assert_eq!(told(), (true, None));
        // Nor is a stream that is not looked at proof.
        set(&status, WalReceiverState::Streaming);
        seconds(100).await;
        assert_eq!(told(), (true, None));
        watch.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn where_nothing_is_expected_what_was_seen_is_not_so_for_ever() {
        let (expectation, status) = expectation(false);
        let watch = tokio::spawn(expectation.watch());
        set(&status, WalReceiverState::Streaming);
        seconds(3).await;
        status.send_modify(|status| status.sync_state = Some("sync".to_owned()));
        set(&status, WalReceiverState::Stopped);
        seconds(31).await;
        let told = status.borrow().clone();
        assert_eq!((told.sync_state, told.not_synchronous, told.needs_attention), (None, false, false));
        watch.abort();
    }
}
