//! What is acknowledged, whatever standbys say in whatever order, against a model that knows only the policy's meaning.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use crate::session::acknowledge::tests::some_moment;
use crate::session::acknowledge::{Acknowledger, Durable, LocalWindow, Standby, WindowState};
use crate::session::only_copy::Recalled;
use crate::wal::{Lsn, TimelineId};

/// What happens.
#[derive(Clone, Debug)]
enum Step {
    /// Time passes, more is durable here, and standbys tell what they have.
    Told { millis: u64, more: u64, standbys: Vec<(usize, Option<u64>, Option<u64>)> },
    /// The timeline is left so far before the end.
    Fork { back: u64 },
    /// Another process takes over what was remembered.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let position = || proptest::option::weighted(0.8, 1_u64..300);
    let standbys = proptest::collection::vec((0..NAMES.len(), position(), position()), 0..5);
    prop_oneof![
        20 => (0_u64..3000, 0_u64..30, standbys)
            .prop_map(|(millis, more, standbys)| Step::Told { millis, more, standbys }),
        1 => (0_u64..40).prop_map(|back| Step::Fork { back }),
        1 => Just(Step::Restart),
    ]
}

const NAMES: [&str; 5] = ["a", "b", "B", "c", "stranger"];

/// The policy's members, in its order.
const MEMBERS: [&str; 3] = ["a", "b", "c"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    Local,
    Any(usize),
    First(usize),
}

impl Meaning {
    fn text(self) -> String {
        match self {
            Self::Local => "local".to_owned(),
            Self::Any(count) => format!("ANY {count} (a, b, c)"),
            Self::First(count) => format!("FIRST {count} (a, b, c)"),
        }
    }

    /// Whether standbys have `wanted`, by what `position` tells of each.
    fn is_at(self, standbys: &[Standby<'_>], wanted: u64, position: fn(&Standby<'_>) -> Option<Lsn>) -> bool {
        let has = |standby: &&Standby<'_>| position(standby).is_some_and(|at| at.get() >= wanted);
        // Who has flushed nothing is no candidate.
        let newest = |name: &&str| standbys.iter().rfind(|standby| standby.name.eq_ignore_ascii_case(name));
        let candidates = MEMBERS.iter().filter_map(&newest).filter(|standby| standby.flush.is_some());
        match self {
            Self::Any(count) => candidates.filter(has).count() >= count,
            Self::First(count) => candidates.take(count).filter(has).count() == count,
            Self::Local => {
                let distinct = NAMES.iter().filter(|name| **name != "B").filter_map(newest);
                let mut telling = distinct.filter(|standby| position(standby).is_some()).peekable();
                telling.peek().is_some() && telling.all(|standby| has(&standby))
            }
        }
    }

    /// The highest position up to `flushed` that they have.
    fn most(self, standbys: &[Standby<'_>], flushed: u64, position: fn(&Standby<'_>) -> Option<Lsn>) -> u64 {
        let told = standbys.iter().filter_map(position).map(|told| told.get().min(flushed));
        told.filter(|wanted| self.is_at(standbys, *wanted, position)).max().unwrap_or(0)
    }
}

fn meaning() -> impl Strategy<Value = Meaning> {
    prop_oneof![
        1 => Just(Meaning::Local),
        3 => (1_usize..4).prop_map(Meaning::Any),
        3 => (1_usize..4).prop_map(Meaning::First),
    ]
}

/// What is known without asking the acknowledger.
struct Model {
    meaning: Meaning,
    timeout: Option<Duration>,
    timeline: u32,
    flushed: u64,
    /// What was acknowledged last.
    before: (u64, u64),
    /// Positions that were acknowledged while standbys did not have them: timeline, position, whether they had it later,
    /// whether the timeline was left before it.
    alone: Vec<(u32, u64, bool, bool)>,
}

impl Model {
    fn durable(&self) -> Durable {
        let timeline = TimelineId::new(self.timeline).unwrap();
        Durable { timeline, flushed: Lsn::new(self.flushed).unwrap() }
    }

    fn check(
        &mut self,
        now: Instant,
        acknowledger: &mut Acknowledger,
        standbys: &[Standby<'_>],
    ) -> Result<(), TestCaseError> {
        let told = acknowledger.update(now, self.durable(), standbys);
        let (flush, apply) = (told.flush.map_or(0, Lsn::get), told.apply.map_or(0, Lsn::get));
        let flush_of: fn(&Standby<'_>) -> Option<Lsn> = |standby| standby.flush;
        let most = match self.meaning {
            Meaning::Local => self.flushed,
            meaning => meaning.most(standbys, self.flushed, flush_of),
        };
        let applied = self.meaning.most(standbys, self.flushed, |standby| standby.apply);
        prop_assert!(flush <= self.flushed && flush >= self.before.0, "{flush} after {:?}", self.before);
        prop_assert_eq!(apply, self.before.1.max(applied));
        let agreed = self.before.0.max(most);
        if flush > agreed {
            prop_assert!(self.timeout.is_some(), "{flush} is at no quorum, {agreed} is");
            prop_assert_eq!(flush, self.flushed);
            self.alone.push((self.timeline, flush, false, false));
        }
        // What can be acknowledged is, and what cannot be will be in time.
        prop_assert!(flush >= agreed, "{flush} is acknowledged, {agreed} could be");
        if self.timeout.is_some() && self.meaning != Meaning::Local {
            let goes_on = acknowledger.deadline().is_some_and(|deadline| deadline > now);
            prop_assert!(flush == self.flushed || goes_on, "{flush} of {}, and no deadline", self.flushed);
        }
        for (_, position, had, left) in &mut self.alone {
            *had |= !*left && self.meaning.is_at(standbys, *position, flush_of);
        }
        self.before = (flush, apply);
        Ok(())
    }

    fn check_windows(&self, windows: &[LocalWindow]) -> Result<(), TestCaseError> {
        let open = windows.iter().filter(|window| window.state == WindowState::Open).count();
        prop_assert!(open == 0 || open == 1 && windows.last().unwrap().state == WindowState::Open);
        for (timeline, position, had, left) in &self.alone {
            let holds = |window: &&LocalWindow| {
                window.range.start().get() < *position && *position <= window.range.end().get()
            };
            let states: Vec<_> = windows.iter().filter(holds).map(|window| window.state).collect();
            let is_told = match (*left, *had) {
                (true, _) => states.contains(&WindowState::Left) || *had,
                (false, true) => !states.is_empty(),
                (false, false) => states.contains(&WindowState::Open),
            };
            prop_assert!(is_told, "{position} on {timeline}: {windows:?}");
        }
        Ok(())
    }

    fn fork(&mut self, back: u64) -> Lsn {
        self.flushed = self.flushed.saturating_sub(back).max(2);
        self.timeline += 1;
        let fork = self.flushed;
        self.before = (self.before.0.min(fork), self.before.1.min(fork));
        for (_, position, _, left) in &mut self.alone {
            *left |= *position > fork;
        }
        Lsn::new(fork).unwrap()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Every flush acknowledged was durable here, and by the policy elsewhere, at that moment or before, or it lies in a window
    /// that says otherwise until the standbys have it; what the policy allows is acknowledged at once; what was applied is what
    /// the policy's members have applied. Over forks and restarts.
    #[test]
    fn what_is_acknowledged_is_what_the_policy_means(
        steps in proptest::collection::vec(step(), 1..50),
        meaning in meaning(),
        timeout in proptest::option::of(0_u64..4000),
    ) {
        let timeout = timeout.map(Duration::from_millis);
        let fresh = || Acknowledger::new(meaning.text().parse().unwrap(), timeout);
        let mut acknowledger = fresh();
        // The lowest position is the end of nothing.
        let mut model = Model { meaning, timeout, timeline: 1, flushed: 2, before: (0, 0), alone: Vec::new() };
        let mut now = some_moment();
        for step in steps {
            match step {
                Step::Told { millis, more, standbys } => {
                    now += Duration::from_millis(millis);
                    model.flushed += more;
                    let position = |position: Option<u64>| position.and_then(Lsn::new);
                    let standbys: Vec<_> = standbys
                        .iter()
                        .map(|(name, flush, apply)| Standby {
                            name: NAMES[*name],
                            flush: position(*flush),
                            apply: position(*apply),
                        })
                        .collect();
                    model.check(now, &mut acknowledger, &standbys)?;
                }
                Step::Fork { back } => acknowledger.cut(model.fork(back)),
                Step::Restart => {
                    let windows = acknowledger.local_windows().to_vec();
                    acknowledger = fresh();
                    acknowledger.take_over(windows);
                    model.before = (0, 0);
                }
            }
            model.check_windows(acknowledger.local_windows())?;
        }
    }

    /// Nothing more is acknowledged as long as something that was acknowledged too long ago is at no standby, and as soon as
    /// all of it is somewhere it goes on. Also when the process is another one.
    #[test]
    fn no_more_is_acknowledged_than_the_only_copy_may_hold(
        steps in proptest::collection::vec(
            (0_u64..4000, 0_u64..30, proptest::option::of(1_u64..300), proptest::bool::weighted(0.1)),
            1..60,
        ),
        limit in 1_u64..20_000,
    ) {
        let limit = Duration::from_millis(limit);
        let fresh = || Acknowledger::new("local".parse().unwrap(), None).with_only_copy_time_max(Some(limit));
        let mut acknowledger = fresh();
        let timeline = TimelineId::FIRST;
        let (mut now, mut flushed, mut elsewhere, mut before) = (some_moment(), 2, 0, 0);
        // What was acknowledged, and when.
        let mut told: Vec<(u64, Instant)> = Vec::new();
        for (millis, more, standby, restarts) in steps {
            now += Duration::from_millis(millis);
            if restarts {
                // All that is held counts, from when the first of it was acknowledged.
                let since = told.first().map_or(now, |(_, at)| *at);
                told = if elsewhere < flushed { vec![(flushed, since)] } else { Vec::new() };
                acknowledger = fresh();
                let (end, had) = (Lsn::new(flushed).unwrap(), Lsn::new(elsewhere));
                let recalled = Recalled { timeline, elsewhere: had, end, age: now - since };
                acknowledger.recall_only_copy(now, recalled);
                before = 0;
            }
            flushed += more;
            let standbys = standby.map(|flush| Standby { name: "a", flush: Lsn::new(flush), apply: None });
            elsewhere = standby.unwrap_or(0).max(elsewhere);
            let durable = Durable { timeline, flushed: Lsn::new(flushed).unwrap() };
            let standbys: Vec<_> = standbys.into_iter().collect();
            let flush = acknowledger.update(now, durable, &standbys).flush.map_or(0, Lsn::get);
            told.retain(|(position, _)| *position > elsewhere);
            let is_over = told.first().is_some_and(|(_, at)| now - *at >= limit);
            if is_over {
                prop_assert_eq!(flush, before.max(elsewhere).min(flushed));
            }
            if told.is_empty() {
                prop_assert_eq!(flush, flushed);
            }
            if flush > before {
                told.push((flush, now));
            }
            before = flush;
        }
    }
}
