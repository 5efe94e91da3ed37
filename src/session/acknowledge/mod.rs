//! What is acknowledged upstream.
//!
//! Owns the positions that are reported as flushed and applied: never beyond our own sync, never backwards, never before the
//! policy could be computed once. When standbys keep it waiting for longer than it may, it goes on without them, and
//! remembers what WAL that was true of until they have it. Asks nobody and sends nothing.
//!
//! ```text
//!              a standby has been behind for the whole timeout
//!   Agreeing ────────────────────────────────────────────────▶ Degraded
//!      ▲                                                          │
//!      └──────── the standbys have all that was acknowledged ─────┘
//! ```

use std::time::{Duration, Instant};

use crate::protocol::acknowledge_policy::AcknowledgePolicy;
use crate::wal::{Lsn, LsnRange, TimelineId};

pub mod policy;

pub use policy::{RemotePositions, Standby};

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

/// WAL that was acknowledged although it was durable only here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalWindow {
    /// What was acknowledged so.
    pub range: LsnRange,
    /// Whether the standbys are still without it.
    pub is_open: bool,
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
    windows: Vec<LocalWindow>,
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
            windows: Vec::new(),
        }
    }

    /// Windows that are known from before, oldest first. If the last one is open it stays so until the standbys have all of
    /// it; whether it goes on without them is decided anew.
    pub fn take_over(&mut self, windows: Vec<LocalWindow>) {
        self.windows = windows;
    }

    /// Takes in what is durable here (`flushed`) and at the standbys.
    pub fn update(&mut self, now: Instant, flushed: Lsn, standbys: &[Standby<'_>]) -> Acknowledged {
        let remote = policy::positions(&self.policy, standbys);
        let apply = remote.apply.map(|apply| apply.min(flushed));
        self.acknowledged.apply = self.acknowledged.apply.max(apply);
        let flush = match self.policy {
            AcknowledgePolicy::Local => Some(flushed),
            AcknowledgePolicy::Remote(_) => self.remote_flush(now, flushed, remote.flush),
        };
        // A store that held nothing may have begun anew elsewhere: nothing of what was said of it is true any more.
        let held = |position: Lsn| position.min(flushed);
        self.acknowledged.flush = self.acknowledged.flush.max(flush).map(held);
        self.acknowledged.apply = self.acknowledged.apply.map(held);
        self.acknowledged
    }

    /// The timeline was left at `fork`: nothing beyond is held any more.
    pub fn cut(&mut self, fork: Lsn) {
        let held = |position: Lsn| position.min(fork);
        self.acknowledged.flush = self.acknowledged.flush.map(held);
        self.acknowledged.apply = self.acknowledged.apply.map(held);
        self.awaited = self.awaited.map(|(wanted, since)| (held(wanted), since));
        self.degraded_from = self.degraded_from.map(held);
    }

    fn remote_flush(&mut self, now: Instant, flushed: Lsn, remote: Option<Lsn>) -> Option<Lsn> {
        let remote = remote.map(|remote| remote.min(flushed));
        let is_behind = |wanted: Lsn| remote.is_none_or(|remote| remote < wanted);
        if let Some(from) = self.degraded_from {
            let acknowledged = self.acknowledged.flush.unwrap_or(from);
            if is_behind(acknowledged) {
                self.extend_window(from, flushed);
                return Some(flushed);
            }
            self.degraded_from = None;
            if let Some(window) = self.windows.last_mut() {
                window.is_open = false;
            }
        }
        if let Some(window) = self.windows.last_mut().filter(|window| window.is_open) {
            window.is_open = is_behind(window.range.end());
        }
        if self.awaited.is_none_or(|(wanted, _)| !is_behind(wanted)) {
            self.awaited = is_behind(flushed).then_some((flushed, now));
        }
        let is_over = |since: Instant| {
            self.timeout.is_some_and(|timeout| now.saturating_duration_since(since) >= timeout)
        };
        if self.awaited.is_some_and(|(_, since)| is_over(since)) {
            let left_open = self.windows.last().filter(|window| window.is_open);
            let left_open = left_open.map(|window| window.range.start());
            let known = remote.max(self.acknowledged.flush);
            let from = [left_open, known].into_iter().flatten().min().unwrap_or(Lsn::MIN);
            self.awaited = None;
            self.degraded_from = Some(from);
            self.extend_window(from, flushed);
            return Some(flushed);
        }
        remote
    }

    fn extend_window(&mut self, from: Lsn, to: Lsn) {
        let Some(range) = LsnRange::new(from, to) else { return };
        match self.windows.last_mut() {
            Some(window) if window.is_open => window.range = range,
            _ => {
                if self.windows.len() == WINDOWS_MAX {
                    // Two become one, which claims too much rather than too little.
                    let second = self.windows.remove(1);
                    if let Some(first) = self.windows.first_mut() {
                        first.range =
                            LsnRange::new(first.range.start(), second.range.end()).unwrap_or(first.range);
                    }
                }
                self.windows.push(LocalWindow { range, is_open: true });
            }
        }
    }

    /// When [`Self::update`] is to be called although nothing moves.
    pub fn deadline(&self) -> Option<Instant> {
        self.awaited.zip(self.timeout).map(|((_, since), timeout)| since + timeout)
    }

    /// Whether it goes on without the standbys.
    pub fn is_degraded(&self) -> bool {
        self.degraded_from.is_some()
    }

    /// WAL that was acknowledged while it was durable only here, oldest first.
    pub fn local_windows(&self) -> &[LocalWindow] {
        &self.windows
    }

    /// The policy.
    pub fn policy(&self) -> &AcknowledgePolicy {
        &self.policy
    }
}

/// Most windows remembered; the oldest become one.
pub const WINDOWS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::policy::positions;
    use super::{Acknowledger, LocalWindow, RemotePositions, Standby, WINDOWS_MAX};
    use crate::protocol::acknowledge_policy::AcknowledgePolicy;
    use crate::wal::{Lsn, LsnRange};

    fn lsn(position: u64) -> Lsn {
        Lsn::new(position).unwrap()
    }

    fn standby(name: &str, flush: u64) -> Standby<'_> {
        Standby { name, flush: Some(lsn(flush)), apply: Some(lsn(flush - 1)) }
    }

    fn flush_of(policy: &str, standbys: &[Standby<'_>]) -> Option<u64> {
        positions(&policy.parse().unwrap(), standbys).flush.map(Lsn::get)
    }

    #[test]
    fn a_quorum_takes_the_so_manieth_best_and_a_list_its_first() {
        let all = [standby("a", 10), standby("B", 20), standby("c", 30)];
        assert_eq!(flush_of("ANY 1 (a, b, c)", &all), Some(30));
        assert_eq!(flush_of("ANY 2 (a, b, c)", &all), Some(20));
        assert_eq!(flush_of("ANY 2 (a, b)", &all), Some(10));
        assert_eq!(flush_of("FIRST 1 (b, a)", &all), Some(20));
        assert_eq!(flush_of("FIRST 2 (c, a, b)", &all), Some(10));
        assert_eq!(flush_of("FIRST 1 (d, c)", &all), Some(30), "who is not there is passed over");
        assert_eq!(flush_of("ANY 2 (a, d)", &all), None);
        assert_eq!(flush_of("ANY 3 (*)", &all), Some(10));
        assert_eq!(flush_of("local", &all), None);
    }

    #[test]
    fn one_name_is_one_standby_and_the_last_of_it() {
        let twice = [standby("a", 50), standby("A", 10)];
        assert_eq!(flush_of("ANY 1 (a)", &twice), Some(10), "it was built anew");
        assert_eq!(flush_of("ANY 2 (*)", &twice), None);
    }

    #[test]
    fn a_standby_that_never_flushes_is_no_candidate_and_applying_is_asked_of_the_same_ones() {
        let receiver = Standby { name: "a", flush: None, apply: None };
        let mute = Standby { name: "b", flush: Some(lsn(9)), apply: None };
        assert_eq!(flush_of("ANY 1 (a)", &[receiver]), None);
        let policy: AcknowledgePolicy = "ANY 1 (*)".parse().unwrap();
        let found = positions(&policy, &[receiver, mute, standby("c", 5)]);
        assert_eq!(found, RemotePositions { flush: Some(lsn(9)), apply: Some(lsn(4)) });
        let found = positions(&AcknowledgePolicy::Local, &[mute, standby("d", 7), standby("c", 5)]);
        assert_eq!(
            found,
            RemotePositions { flush: None, apply: Some(lsn(4)) },
            "the slowest of those that apply"
        );
    }

    #[test]
    fn nothing_is_said_before_the_policy_can_be_computed_and_nothing_is_taken_back() {
        let mut acknowledger = Acknowledger::new("ANY 1 (a)".parse().unwrap(), None);
        let now = Instant::now();
        assert_eq!(acknowledger.update(now, lsn(100), &[]).flush, None);
        assert_eq!(acknowledger.update(now, lsn(100), &[standby("a", 40)]).flush, Some(lsn(40)));
        assert_eq!(acknowledger.update(now, lsn(100), &[]).flush, Some(lsn(40)));
        assert_eq!(acknowledger.update(now, lsn(100), &[standby("a", 30)]).flush, Some(lsn(40)));
        assert_eq!(
            acknowledger.update(now, lsn(100), &[standby("a", 500)]).flush,
            Some(lsn(100)),
            "held here"
        );
        assert_eq!(acknowledger.deadline(), None);
        assert_eq!(acknowledger.update(now, lsn(50), &[]).flush, Some(lsn(50)), "begun anew");
    }

    #[test]
    fn after_the_timeout_it_goes_on_alone_and_remembers_what_was_so() {
        let timeout = Duration::from_secs(5);
        let mut acknowledger = Acknowledger::new("ANY 1 (a)".parse().unwrap(), Some(timeout));
        let start = Instant::now();
        let mut at = |seconds, flushed, standbys: &[Standby<'_>]| {
            let now = start + Duration::from_secs(seconds);
            let flush = acknowledger.update(now, lsn(flushed), standbys).flush.map(Lsn::get);
            let windows: Vec<_> = acknowledger
                .local_windows()
                .iter()
                .map(|window| (window.range.start().get(), window.range.end().get(), window.is_open))
                .collect();
            (flush, acknowledger.is_degraded(), windows)
        };
        assert_eq!(at(0, 100, &[standby("a", 100)]), (Some(100), false, vec![]));
        assert_eq!(at(1, 110, &[standby("a", 100)]), (Some(100), false, vec![]));
        assert_eq!(
            at(4, 120, &[standby("a", 110)]),
            (Some(110), false, vec![]),
            "it moves: the wait begins anew"
        );
        assert_eq!(at(8, 130, &[standby("a", 110)]), (Some(110), false, vec![]));
        assert_eq!(at(9, 140, &[]), (Some(140), true, vec![(110, 140, true)]));
        assert_eq!(at(9, 150, &[standby("a", 120)]), (Some(150), true, vec![(110, 150, true)]));
        assert_eq!(at(10, 150, &[standby("a", 150)]), (Some(150), false, vec![(110, 150, false)]));
        assert_eq!(at(11, 160, &[standby("a", 150)]), (Some(150), false, vec![(110, 150, false)]));
        assert_eq!(at(16, 170, &[]), (Some(170), true, vec![(110, 150, false), (150, 170, true)]));
    }

    #[test]
    fn the_windows_are_bounded_and_none_is_forgotten() {
        let mut acknowledger = Acknowledger::new("ANY 1 (a)".parse().unwrap(), Some(Duration::ZERO));
        let now = Instant::now();
        for round in 1..=2 * WINDOWS_MAX as u64 {
            acknowledger.update(now, lsn(round * 10), &[]);
            acknowledger.update(now, lsn(round * 10), &[standby("a", round * 10)]);
        }
        let windows = acknowledger.local_windows();
        assert_eq!(windows.len(), WINDOWS_MAX);
        assert!(windows.is_sorted_by(|a, b| a.range.end() <= b.range.start()));
        assert!(windows.iter().all(|window| !window.is_open));
        assert_eq!(windows.last().unwrap().range.end(), lsn(20 * WINDOWS_MAX as u64));
    }

    #[test]
    fn a_window_that_an_earlier_process_left_open_is_closed_by_standbys_that_have_it_and_by_nothing_else() {
        let window =
            |from, to, is_open| LocalWindow { range: LsnRange::new(lsn(from), lsn(to)).unwrap(), is_open };
        let left = vec![window(10, 20, false), window(50, 90, true)];
        let timeout = Duration::from_secs(5);
        let restarted = || {
            let mut acknowledger = Acknowledger::new("ANY 1 (a)".parse().unwrap(), Some(timeout));
            acknowledger.take_over(left.clone());
            acknowledger
        };
        let start = Instant::now();
        let mut acknowledger = restarted();
        assert_eq!(acknowledger.update(start, lsn(90), &[]).flush, None, "it waits again");
        assert_eq!(acknowledger.update(start, lsn(90), &[standby("a", 89)]).flush, Some(lsn(89)));
        assert_eq!(acknowledger.local_windows(), left);
        acknowledger.update(start, lsn(90), &[standby("a", 90)]);
        assert_eq!(acknowledger.local_windows(), [left[0], window(50, 90, false)]);
        // Nobody comes: it is the same window that goes on.
        let mut acknowledger = restarted();
        acknowledger.update(start, lsn(90), &[]);
        assert_eq!(acknowledger.update(start + timeout, lsn(95), &[]).flush, Some(lsn(95)));
        assert_eq!(acknowledger.local_windows(), [left[0], window(50, 95, true)]);
    }

    #[derive(Clone, Debug)]
    struct Told {
        millis: u64,
        flushed: u64,
        standbys: Vec<(usize, Option<u64>, Option<u64>)>,
    }

    fn told() -> impl Strategy<Value = Told> {
        let position = || proptest::option::of(1_u64..400);
        let standbys = proptest::collection::vec((0_usize..4, position(), position()), 0..5);
        (0_u64..3000, 0_u64..40, standbys).prop_map(|(millis, flushed, standbys)| Told {
            millis,
            flushed,
            standbys,
        })
    }

    const NAMES: [&str; 4] = ["a", "b", "B", "c"];

    /// How many distinct names have flushed up to `wanted`, by the standby of each name that came last.
    fn count_with(standbys: &[Standby<'_>], names: &[&str], wanted: Lsn) -> usize {
        names
            .iter()
            .filter(|name| {
                let last = standbys.iter().rev().find(|standby| standby.name.eq_ignore_ascii_case(name));
                last.is_some_and(|standby| standby.flush.is_some_and(|flush| flush >= wanted))
            })
            .count()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        /// Whatever standbys say in whatever order: every flush acknowledged was durable here, and at so many standbys at that
        /// moment, or before, or it lies in a window that says otherwise.
        #[test]
        fn what_is_acknowledged_is_where_the_policy_wants_it(
            told in proptest::collection::vec(told(), 1..40),
            count in 1_usize..3,
            timeout in proptest::option::of(0_u64..4000),
        ) {
            let policy = format!("ANY {count} (a, b, c)").parse().unwrap();
            let mut acknowledger = Acknowledger::new(policy, timeout.map(Duration::from_millis));
            // The lowest position is the end of nothing.
            let (mut now, mut flushed, mut before) = (Instant::now(), 2, None);
            for Told { millis, flushed: more, standbys } in told {
                now += Duration::from_millis(millis);
                flushed += more;
                let standbys: Vec<_> = standbys
                    .iter()
                    .map(|(name, flush, apply)| Standby {
                        name: NAMES[*name],
                        flush: flush.map(lsn),
                        apply: apply.map(lsn),
                    })
                    .collect();
                let acknowledged = acknowledger.update(now, lsn(flushed), &standbys);
                prop_assert!(acknowledged.flush >= before, "backwards");
                prop_assert!(acknowledged.flush.is_none_or(|flush| flush <= lsn(flushed)), "not durable here");
                prop_assert!(acknowledged.apply.is_none_or(|apply| apply <= lsn(flushed)));
                if let Some(flush) = acknowledged.flush.filter(|_| acknowledged.flush > before) {
                    let is_remote = count_with(&standbys, &["a", "b", "c"], flush) >= count;
                    let is_told = acknowledger
                        .local_windows()
                        .last()
                        .is_some_and(|window| window.is_open && window.range.end() == flush);
                    prop_assert!(is_remote || is_told, "{flush} is nowhere else and nobody is told");
                    prop_assert!(timeout.is_some() || is_remote);
                }
                prop_assert_eq!(timeout.is_none() && acknowledger.is_degraded(), false);
                before = acknowledged.flush;
            }
        }
    }
}
