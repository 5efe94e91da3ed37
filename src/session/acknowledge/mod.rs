//! What is acknowledged upstream.
//!
//! Owns the positions that are reported as flushed and applied: never beyond our own sync, never backwards, never before the
//! policy could be computed once. When standbys keep it waiting for longer than it may, it goes on without them, and
//! remembers what WAL that was true of until they have it. When what was acknowledged has been nowhere else for longer than
//! it may, nothing more is acknowledged until some standby has it. Asks nobody and sends nothing.
//!
//! ```text
//!              a standby has been behind for the whole timeout
//!   Agreeing ────────────────────────────────────────────────▶ Degraded
//!      ▲                                                          │
//!      └──────── the standbys have all that was acknowledged ─────┘
//! ```

use std::time::{Duration, Instant};

use crate::protocol::acknowledge_policy::AcknowledgePolicy;
use crate::session::only_copy::{Held, OnlyCopyTracker, Recalled};
use crate::wal::{Lsn, TimelineId};

pub mod policy;
pub mod windows;

pub use policy::{RemotePositions, Standby};
pub use windows::{LocalWindow, WindowState};

use windows::Windows;

/// Who tells what the standbys have.
pub trait Standbys: Send + Sync {
    /// Shows the standbys that stream on `timeline`, those that came last at the end.
    fn show(&self, timeline: TimelineId, to: &mut dyn FnMut(&[Standby<'_>]));
}

/// What may be reported upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Acknowledged {
    /// As flushed; `None` until it can be told.
    pub flush: Option<Lsn>,
    /// As applied; `None` until a standby has applied something.
    pub apply: Option<Lsn>,
}

/// What is durable here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Durable {
    /// The timeline that is received.
    pub timeline: TimelineId,
    /// Up to where.
    pub flushed: Lsn,
}

/// Computes what is acknowledged.
#[derive(Debug)]
pub struct Acknowledger {
    policy: AcknowledgePolicy,
    /// How long standbys may keep WAL from being acknowledged; `None`: for ever.
    timeout: Option<Duration>,
    acknowledged: Acknowledged,
    /// Our own flush that the standbys do not have, and since when.
    awaited: Option<(Lsn, Instant)>,
    /// What the standbys had when it went on without them.
    degraded_from: Option<Lsn>,
    windows: Windows,
    only_copy: Option<OnlyCopyLimit>,
    /// Where timelines were left since the last update; the earliest.
    fork: Option<Lsn>,
}

/// How long what was acknowledged may be nowhere else.
#[derive(Debug)]
struct OnlyCopyLimit {
    time_max: Duration,
    tracker: OnlyCopyTracker,
    is_over: bool,
}

impl Acknowledger {
    /// Nothing is acknowledged.
    pub fn new(policy: AcknowledgePolicy, timeout: Option<Duration>) -> Self {
        Self {
            policy,
            timeout,
            acknowledged: Acknowledged::default(),
            awaited: None,
            degraded_from: None,
            windows: Windows::default(),
            only_copy: None,
            fork: None,
        }
    }

    /// Nothing more is acknowledged while something that was has been at no standby for this long; `None`: for ever.
    #[must_use]
    pub fn with_only_copy_time_max(mut self, time_max: Option<Duration>) -> Self {
        let limit =
            |time_max| OnlyCopyLimit { time_max, tracker: OnlyCopyTracker::default(), is_over: false };
        self.only_copy = time_max.map(limit);
        self
    }

    /// How long something has been nowhere else does not begin anew with the process.
    pub fn recall_only_copy(&mut self, now: Instant, recalled: Recalled) {
        let Some(limit) = &mut self.only_copy else { return };
        // By such a policy nothing was acknowledged alone but in windows.
        let is_alone = self.policy == AcknowledgePolicy::Local || self.windows.open().is_some();
        let end = if is_alone { Some(recalled.end) } else { recalled.elsewhere };
        limit.tracker.recall(now, Recalled { end: end.unwrap_or(Lsn::MIN), ..recalled });
    }

    /// Windows that are known from before, oldest first. If the last one is open it stays so until the standbys have all of
    /// it; whether it goes on without them is decided anew.
    pub fn take_over(&mut self, windows: Vec<LocalWindow>) {
        self.windows = Windows::from(windows);
    }

    /// Takes in what is durable here and at the standbys.
    pub fn update(&mut self, now: Instant, durable: Durable, standbys: &[Standby<'_>]) -> Acknowledged {
        let Durable { timeline, flushed } = durable;
        let elsewhere = standbys.iter().filter_map(|standby| standby.flush).max();
        self.note_only_copy(now, timeline, elsewhere);
        let is_held_back = self.is_held_back();
        let limit = if is_held_back { self.acknowledged_before() } else { Some(flushed) };
        let limit = limit.map(|limit| limit.min(flushed));
        let remote = policy::positions(&self.policy, standbys);
        let apply = remote.apply.map(|apply| apply.min(flushed));
        self.acknowledged.apply = self.acknowledged.apply.max(apply);
        let flush = match (&self.policy, limit) {
            (AcknowledgePolicy::Local, limit) => limit,
            (AcknowledgePolicy::Remote(_), Some(flushed)) => {
                self.remote_flush(now, Durable { timeline, flushed }, remote.flush)
            }
            (AcknowledgePolicy::Remote(_), None) => None,
        };
        // A store that held nothing may have begun anew elsewhere: nothing of what was said of it is true any more.
        let held = |position: Lsn| position.min(flushed);
        self.acknowledged.flush = self.acknowledged.flush.max(flush).map(held);
        self.acknowledged.apply = self.acknowledged.apply.map(held);
        if !is_held_back {
            // Its time begins now.
            self.note_only_copy(now, timeline, elsewhere);
        }
        self.acknowledged
    }

    fn note_only_copy(&mut self, now: Instant, timeline: TimelineId, elsewhere: Option<Lsn>) {
        let left = self.fork.take();
        let acknowledged = self.acknowledged.flush.unwrap_or(Lsn::MIN);
        let Some(limit) = &mut self.only_copy else { return };
        let held = Held { timeline, left, acknowledged, oldest: Lsn::MIN, flushed: elsewhere };
        limit.tracker.update(now, held);
        limit.is_over = limit.tracker.known(now).age >= Some(limit.time_max);
    }

    /// No more than this while nothing more is acknowledged: what was, as far as this process knows, or what a standby has.
    fn acknowledged_before(&self) -> Option<Lsn> {
        let elsewhere = self.only_copy.as_ref().and_then(|limit| limit.tracker.elsewhere());
        self.acknowledged.flush.max(elsewhere)
    }

    /// The timeline was left at `fork`: nothing beyond is held any more.
    pub fn cut(&mut self, fork: Lsn) {
        let held = |position: Lsn| position.min(fork);
        self.acknowledged.flush = self.acknowledged.flush.map(held);
        self.acknowledged.apply = self.acknowledged.apply.map(held);
        self.awaited = self.awaited.map(|(wanted, since)| (held(wanted), since));
        self.degraded_from = self.degraded_from.map(held);
        self.windows.cut(fork);
        self.fork = Some(self.fork.map_or(fork, held));
    }

    fn remote_flush(&mut self, now: Instant, durable: Durable, remote: Option<Lsn>) -> Option<Lsn> {
        let flushed = durable.flushed;
        let remote = remote.map(|remote| remote.min(flushed));
        let is_behind = |wanted: Lsn| remote.is_none_or(|remote| remote < wanted);
        if let Some(from) = self.degraded_from {
            let acknowledged = self.acknowledged.flush.unwrap_or(from);
            if is_behind(acknowledged) {
                self.windows.extend(from, durable);
                return Some(flushed);
            }
            self.degraded_from = None;
            self.windows.close();
        }
        if self.windows.open().is_some_and(|window| !is_behind(window.range.end())) {
            self.windows.close();
        }
        if self.awaited.is_none_or(|(wanted, _)| !is_behind(wanted)) {
            self.awaited = is_behind(flushed).then_some((flushed, now));
        }
        let is_over = |since: Instant| {
            self.timeout.is_some_and(|timeout| now.saturating_duration_since(since) >= timeout)
        };
        if self.awaited.is_some_and(|(_, since)| is_over(since)) {
            let left_open = self.windows.open().map(|window| window.range.start());
            let known = remote.max(self.acknowledged.flush);
            let from = [left_open, known].into_iter().flatten().min().unwrap_or(Lsn::MIN);
            self.awaited = None;
            self.degraded_from = Some(from);
            self.windows.extend(from, durable);
            return Some(flushed);
        }
        remote
    }

    /// When [`Self::update`] is to be called although nothing moves.
    pub fn deadline(&self) -> Option<Instant> {
        self.awaited.zip(self.timeout).map(|((_, since), timeout)| since + timeout)
    }

    /// Whether it goes on without the standbys.
    pub fn is_degraded(&self) -> bool {
        self.degraded_from.is_some()
    }

    /// Whether nothing more is acknowledged because what was has been nowhere else for too long.
    pub fn is_held_back(&self) -> bool {
        self.only_copy.as_ref().is_some_and(|limit| limit.is_over)
    }

    /// WAL that was acknowledged while it was durable only here, oldest first.
    pub fn local_windows(&self) -> &[LocalWindow] {
        self.windows.all()
    }

    /// The policy.
    pub fn policy(&self) -> &AcknowledgePolicy {
        &self.policy
    }
}

#[cfg(test)]
mod tests {
    mod cases;
    mod properties;

    /// Some moment; which one does not matter.
    fn some_moment() -> std::time::Instant {
        std::time::Instant::now()
    }
}
