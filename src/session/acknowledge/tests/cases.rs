//! The policy and the memory of what was acknowledged, case by case.

use std::time::Duration;

use crate::protocol::acknowledge_policy::AcknowledgePolicy;
use crate::session::acknowledge::policy::positions;
use crate::session::acknowledge::tests::some_moment;
use crate::session::acknowledge::windows::WINDOWS_MAX;
use crate::session::acknowledge::{
    Acknowledger, Durable, LocalWindow, RemotePositions, Standby, WindowState,
};
use crate::session::only_copy::Recalled;
use crate::wal::{Lsn, LsnRange, TimelineId};

fn lsn(position: u64) -> Lsn {
    Lsn::new(position).unwrap()
}

fn durable(flushed: u64) -> Durable {
    Durable { timeline: TimelineId::FIRST, flushed: lsn(flushed) }
}

fn standby(name: &str, flush: u64) -> Standby<'_> {
    Standby { name, flush: Some(lsn(flush)), apply: Some(lsn(flush - 1)) }
}

fn window(from: u64, to: u64, is_open: bool) -> LocalWindow {
    let state = if is_open { WindowState::Open } else { WindowState::Closed };
    window_in(state, 1, from, to)
}

fn window_in(state: WindowState, timeline: u32, from: u64, to: u64) -> LocalWindow {
    let range = LsnRange::new(lsn(from), lsn(to)).unwrap();
    LocalWindow { timeline: TimelineId::new(timeline).unwrap(), range, state }
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
    let now = some_moment();
    assert_eq!(acknowledger.update(now, durable(100), &[]).flush, None);
    assert_eq!(acknowledger.update(now, durable(100), &[standby("a", 40)]).flush, Some(lsn(40)));
    assert_eq!(acknowledger.update(now, durable(100), &[]).flush, Some(lsn(40)));
    assert_eq!(acknowledger.update(now, durable(100), &[standby("a", 30)]).flush, Some(lsn(40)));
    assert_eq!(
        acknowledger.update(now, durable(100), &[standby("a", 500)]).flush,
        Some(lsn(100)),
        "held here"
    );
    assert_eq!(acknowledger.deadline(), None);
    assert_eq!(acknowledger.update(now, durable(50), &[]).flush, Some(lsn(50)), "begun anew");
}

#[test]
fn after_the_timeout_it_goes_on_alone_and_remembers_what_was_so() {
    let timeout = Duration::from_secs(5);
    let mut acknowledger = Acknowledger::new("ANY 1 (a)".parse().unwrap(), Some(timeout));
    let start = some_moment();
    let mut at = |seconds, flushed, standbys: &[Standby<'_>]| {
        let now = start + Duration::from_secs(seconds);
        let flush = acknowledger.update(now, durable(flushed), standbys).flush.map(Lsn::get);
        let windows: Vec<_> = acknowledger
            .local_windows()
            .iter()
            .map(|window| {
                (window.range.start().get(), window.range.end().get(), window.state == WindowState::Open)
            })
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
    let now = some_moment();
    for round in 1..=2 * WINDOWS_MAX as u64 {
        acknowledger.update(now, durable(round * 10), &[]);
        acknowledger.update(now, durable(round * 10), &[standby("a", round * 10)]);
    }
    let windows = acknowledger.local_windows();
    assert_eq!(windows.len(), WINDOWS_MAX);
    assert!(windows.is_sorted_by(|a, b| a.range.end() <= b.range.start()));
    assert!(windows.iter().all(|window| window.state == WindowState::Closed));
    assert_eq!(windows.last().unwrap().range.end(), lsn(20 * WINDOWS_MAX as u64));
}

#[test]
fn a_window_that_an_earlier_process_left_open_is_closed_by_standbys_that_have_it_and_by_nothing_else() {
    let left = vec![window(10, 20, false), window(50, 90, true)];
    let timeout = Duration::from_secs(5);
    let restarted = || {
        let mut acknowledger = Acknowledger::new("ANY 1 (a)".parse().unwrap(), Some(timeout));
        acknowledger.take_over(left.clone());
        acknowledger
    };
    let start = some_moment();
    let mut acknowledger = restarted();
    assert_eq!(acknowledger.update(start, durable(90), &[]).flush, None, "it waits again");
    assert_eq!(acknowledger.update(start, durable(90), &[standby("a", 89)]).flush, Some(lsn(89)));
    assert_eq!(acknowledger.local_windows(), left);
    acknowledger.update(start, durable(90), &[standby("a", 90)]);
    assert_eq!(acknowledger.local_windows(), [left[0], window(50, 90, false)]);
    // Nobody comes: it is the same window that goes on.
    let mut acknowledger = restarted();
    acknowledger.update(start, durable(90), &[]);
    assert_eq!(acknowledger.update(start + timeout, durable(95), &[]).flush, Some(lsn(95)));
    assert_eq!(acknowledger.local_windows(), [left[0], window(50, 95, true)]);
}

#[test]
fn what_was_acknowledged_alone_beyond_a_fork_is_never_told_to_be_at_the_standbys() {
    let timeout = Duration::from_secs(5);
    let start = some_moment();
    let second = TimelineId::new(2).unwrap();
    let on_second = |flushed| Durable { timeline: second, flushed: lsn(flushed) };
    for (fork, left) in [
        // Within the window, and before all of it.
        (130, vec![window_in(WindowState::Left, 1, 130, 150), window_in(WindowState::Open, 1, 110, 130)]),
        (100, vec![window_in(WindowState::Left, 1, 110, 150)]),
    ] {
        let mut acknowledger = Acknowledger::new("ANY 1 (a)".parse().unwrap(), Some(timeout));
        acknowledger.update(start, durable(110), &[standby("a", 110)]);
        acknowledger.update(start, durable(150), &[standby("a", 110)]);
        acknowledger.update(start + timeout, durable(150), &[standby("a", 110)]);
        assert_eq!(acknowledger.local_windows(), [window(110, 150, true)]);
        acknowledger.cut(lsn(fork));
        assert_eq!(acknowledger.local_windows(), left);
        // The standbys have the fork, and go on.
        let told = acknowledger.update(start + timeout, on_second(fork), &[standby("a", fork)]);
        assert_eq!(told.flush, Some(lsn(fork)));
        assert!(!acknowledger.is_degraded());
        let lost = acknowledger.local_windows()[0];
        assert_eq!((lost, lost.range.end()), (left[0], lsn(150)));
        assert!(acknowledger.local_windows().iter().all(|window| window.state != WindowState::Open));
        // What is alone on the new timeline is a window of its own.
        acknowledger.update(start + timeout, on_second(170), &[standby("a", fork)]);
        acknowledger.update(start + 2 * timeout, on_second(170), &[]);
        assert_eq!(acknowledger.local_windows().last(), Some(&window_in(WindowState::Open, 2, fork, 170)));
        assert_eq!(acknowledger.local_windows()[0], left[0]);
    }
}

#[test]
fn after_too_long_as_the_only_copy_nothing_more_is_acknowledged_until_somebody_has_it() {
    let limit = Duration::from_secs(10);
    let mut acknowledger =
        Acknowledger::new(AcknowledgePolicy::Local, None).with_only_copy_time_max(Some(limit));
    let start = some_moment();
    let mut at = |seconds, flushed, standbys: &[Standby<'_>]| {
        let told = acknowledger.update(start + Duration::from_secs(seconds), durable(flushed), standbys);
        (told.flush.map_or(0, Lsn::get), acknowledger.is_held_back())
    };
    assert_eq!(at(0, 100, &[standby("a", 100)]), (100, false));
    assert_eq!(at(100, 110, &[]), (110, false), "its time begins when it is acknowledged");
    assert_eq!(at(109, 120, &[]), (120, false));
    assert_eq!(at(110, 130, &[]), (120, true));
    assert_eq!(at(111, 140, &[standby("a", 109)]), (120, true), "not all that is so old");
    assert_eq!(at(112, 140, &[standby("a", 110)]), (140, false), "the rest is younger");
    assert_eq!(at(119, 150, &[]), (140, true));
    assert_eq!(at(500, 160, &[standby("b", 160)]), (160, false));
}

#[test]
fn a_restart_gives_the_only_copy_no_time() {
    let start = some_moment();
    let at = |seconds| start + Duration::from_secs(seconds);
    let timeline = TimelineId::FIRST;
    let restarted = |policy: &str, elsewhere: Option<u64>, age| {
        let limit = Some(Duration::from_secs(10));
        let mut acknowledger =
            Acknowledger::new(policy.parse().unwrap(), None).with_only_copy_time_max(limit);
        let (elsewhere, age) = (elsewhere.map(lsn), Duration::from_secs(age));
        acknowledger.recall_only_copy(start, Recalled { timeline, elsewhere, end: lsn(100), age });
        acknowledger
    };
    let mut young = restarted("local", Some(90), 4);
    assert_eq!(young.update(at(5), durable(110), &[]).flush, Some(lsn(110)));
    assert_eq!(young.update(at(6), durable(120), &[]).flush, Some(lsn(110)), "ten seconds with those before");
    assert_eq!(young.update(at(7), durable(120), &[standby("a", 99)]).flush, Some(lsn(110)));
    assert_eq!(young.update(at(8), durable(120), &[standby("a", 100)]).flush, Some(lsn(120)));
    // What was acknowledged is not known; what is at a standby can be.
    let mut old = restarted("local", Some(90), 10);
    assert_eq!(old.update(at(0), durable(100), &[]).flush, Some(lsn(90)));
    assert!(old.is_held_back());
    assert_eq!(old.update(at(9), durable(120), &[standby("a", 95)]).flush, Some(lsn(95)));
    assert_eq!(old.update(at(9), durable(120), &[standby("a", 100)]).flush, Some(lsn(120)));
    for (policy, is_held_back) in [("local", true), ("ANY 1 (a)", false)] {
        let mut alone = restarted(policy, None, 99);
        assert_eq!(alone.update(at(0), durable(100), &[]).flush, None);
        // By the policy nothing was acknowledged that no standby had.
        assert_eq!(alone.is_held_back(), is_held_back);
        assert_eq!(alone.update(at(1), durable(100), &[standby("a", 100)]).flush, Some(lsn(100)));
    }
    // Where a standby has all of it the time begins with what comes.
    let mut idle = restarted("local", Some(100), 99);
    assert_eq!(idle.update(at(0), durable(110), &[]).flush, Some(lsn(110)));
    assert_eq!(idle.update(at(9), durable(120), &[]).flush, Some(lsn(120)));
    assert_eq!(idle.update(at(10), durable(130), &[]).flush, Some(lsn(120)));
}
