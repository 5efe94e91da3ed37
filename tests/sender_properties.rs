//! The sending half of a stream keeps its promises, in every order of events.
//!
//! Scenarios on virtual time, each a rule of walsender.c, and random schedules against a checker that knows only the
//! promises: no gap, nothing past the limit, no end inside a page header, nothing confirmed that was not sent.

#![allow(clippy::unwrap_used, reason = "clippy exempts test functions, not their helpers")]

use std::time::{Duration, Instant};

use proptest::prelude::*;
use walrelay::{
    session::sender::{
        NextWal, Output, ReplyRequested, STOPPING_TIME_MAX, Sender, SenderSettings, StandbyReply, StreamEnd,
        TimelineState,
    },
    status::WalSenderState,
    wal::{Lsn, LsnRange, SegmentSize, TimelineId},
};

const TIMEOUT: Duration = Duration::from_secs(60);
const SEGMENT: u64 = 16 << 20;

fn at(raw: u64) -> Lsn {
    Lsn::new(raw).unwrap()
}

fn settings() -> SenderSettings {
    SenderSettings { wal_sender_timeout: Some(TIMEOUT), segment_size: SegmentSize::DEFAULT }
}

fn historic(end: u64) -> TimelineState {
    TimelineState::Historic { end: at(end), next: TimelineId::new(2).unwrap() }
}

fn reply(write: u64, flush: u64, apply: u64) -> StandbyReply {
    StandbyReply {
        write: Lsn::from_wire(write),
        flush: Lsn::from_wire(flush),
        apply: Lsn::from_wire(apply),
        reply_requested: false,
    }
}

fn current(start: u64, servable: u64, now: Instant) -> Sender {
    Sender::new(settings(), TimelineState::Current, at(start), at(servable), now)
}

/// Sends everything there is; returns the ranges.
fn send_all(sender: &mut Sender) -> Vec<NextWal> {
    let mut sent = Vec::new();
    while let Some(next) = sender.next_wal() {
        sender.handle_sent(next.range.end());
        sent.push(next);
    }
    sender.handle_drained();
    sent
}

fn probe(wal_end: u64) -> Option<Output> {
    Some(Output::Keepalive { wal_end: Lsn::new(wal_end), reply: ReplyRequested::Yes })
}

fn answer(wal_end: u64) -> Option<Output> {
    Some(Output::Keepalive { wal_end: Lsn::new(wal_end), reply: ReplyRequested::No })
}

#[test]
fn catches_up_in_messages_of_at_most_sixteen_pages_and_then_streams() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, SEGMENT + 300_000, now);
    assert_eq!(sender.state(), WalSenderState::Catchup);
    let sent = send_all(&mut sender);
    let ends: Vec<u64> = sent.iter().map(|next| next.range.end().get() - SEGMENT).collect();
    assert_eq!(ends, [131_072, 262_144, 300_000]);
    assert!(sent.iter().all(|next| next.wal_end == at(SEGMENT + 300_000)));
    assert_eq!(sender.state(), WalSenderState::Streaming);
    sender.handle_servable(at(SEGMENT + 300_080), now);
    assert_eq!(sender.state(), WalSenderState::Streaming, "once streaming, always streaming");
}

#[test]
fn a_silent_standby_is_probed_once_then_dropped() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, SEGMENT, now);
    assert_eq!(sender.poll_timeout(), Some(now + TIMEOUT / 2));
    sender.handle_timeout(now + TIMEOUT / 2);
    assert_eq!(sender.poll_output(), probe(SEGMENT));
    sender.handle_timeout(now + TIMEOUT / 2 + Duration::from_secs(1));
    assert_eq!(sender.poll_output(), None, "asked once");
    assert_eq!(sender.poll_timeout(), Some(now + TIMEOUT));
    sender.handle_timeout(now + TIMEOUT);
    assert_eq!(sender.poll_output(), Some(Output::End(StreamEnd::StandbySilent)));
    assert_eq!(sender.poll_timeout(), None);
    assert_eq!(sender.poll_output(), None);
}

#[test]
fn whatever_the_standby_sends_shows_that_it_lives() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, SEGMENT, now);
    sender.handle_timeout(now + TIMEOUT / 2);
    assert_eq!(sender.poll_output(), probe(SEGMENT));
    sender.handle_heard(now + TIMEOUT - Duration::from_secs(1));
    sender.handle_timeout(now + TIMEOUT);
    assert_eq!(sender.poll_output(), None);
    assert_eq!(sender.poll_timeout(), Some(now + TIMEOUT + TIMEOUT / 2 - Duration::from_secs(1)));
}

#[test]
fn without_a_timeout_silence_is_borne() {
    let now = Instant::now();
    let forever = SenderSettings { wal_sender_timeout: None, ..settings() };
    let mut sender = Sender::new(forever, TimelineState::Current, at(SEGMENT), at(SEGMENT), now);
    assert_eq!(sender.poll_timeout(), None);
    sender.handle_timeout(now + TIMEOUT * 1_000);
    assert_eq!(sender.poll_output(), None);
}

#[test]
fn a_requested_reply_is_sent_even_while_wal_is_waiting_to_be_read() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, 2 * SEGMENT, now);
    assert!(sender.next_wal().is_some());
    sender.handle_reply(StandbyReply { reply_requested: true, ..reply(0, 0, 0) }, now);
    sender.handle_reply(StandbyReply { reply_requested: true, ..reply(0, 0, 0) }, now);
    assert_eq!(sender.poll_output(), answer(SEGMENT));
    assert_eq!(sender.poll_output(), None, "one answer for both: an eager client costs nothing");
}

#[test]
fn a_start_a_little_ahead_waits_and_is_kept_alive() {
    let now = Instant::now();
    let mut sender = current(3 * SEGMENT, 2 * SEGMENT, now);
    assert_eq!(sender.next_wal(), None);
    assert_eq!(sender.poll_output(), None);
    sender.handle_timeout(now + TIMEOUT / 2);
    assert_eq!(sender.poll_output(), probe(2 * SEGMENT), "never names WAL that is not there");
    sender.handle_reply(reply(3 * SEGMENT, 3 * SEGMENT, 0), now + TIMEOUT / 2);
    assert_eq!(sender.progress().flush, Some(at(2 * SEGMENT)), "nor counts it");
    sender.handle_servable(at(3 * SEGMENT), now + TIMEOUT);
    assert_eq!(sender.next_wal(), None, "there, but nothing new");
    sender.handle_servable(at(3 * SEGMENT + 96), now + TIMEOUT);
    assert_eq!(sender.next_wal().map(|next| next.range.start()), Some(at(3 * SEGMENT)));
}

#[test]
fn a_start_more_than_a_segment_ahead_is_refused() {
    let now = Instant::now();
    let mut sender = current(3 * SEGMENT + 1, 2 * SEGMENT, now);
    assert_eq!(sender.next_wal(), None);
    let (start, servable) = (at(3 * SEGMENT + 1), at(2 * SEGMENT));
    assert_eq!(sender.poll_output(), Some(Output::End(StreamEnd::StartAhead { start, servable })));
}

/// Limit, then what was removed behind it.
const REMOVED: (u64, u64) = (2 * SEGMENT + 64, 9 * SEGMENT);

fn removed() -> Option<LsnRange> {
    LsnRange::new(at(REMOVED.0), at(REMOVED.1))
}

fn removed_at(raw: u64) -> Option<Output> {
    Some(Output::End(StreamEnd::WalRemoved { at: at(raw) }))
}

#[test]
fn a_stream_that_needs_removed_wal_ends_behind_what_is_held() {
    let now = Instant::now();
    let mut behind = current(2 * SEGMENT, REMOVED.0, now);
    behind.handle_removed(removed());
    assert_eq!(behind.poll_output(), None, "some is held still");
    assert_eq!(send_all(&mut behind).last().map(|last| last.range.end()), Some(at(REMOVED.0)));
    assert_eq!(behind.poll_output(), removed_at(REMOVED.0));

    let mut caught_up = current(2 * SEGMENT, 2 * SEGMENT, now);
    caught_up.handle_removed(removed());
    caught_up.handle_servable(at(REMOVED.0), now);
    send_all(&mut caught_up);
    assert_eq!(caught_up.poll_output(), removed_at(REMOVED.0));

    for ahead in [REMOVED.0 + 8, 8 * SEGMENT] {
        let mut sender = current(ahead, REMOVED.0, now);
        sender.handle_removed(removed());
        assert_eq!(sender.poll_output(), removed_at(ahead));
    }
}

#[test]
fn removed_wal_ends_no_stream_that_does_not_need_it() {
    let now = Instant::now();
    let mut got_more = current(REMOVED.0, REMOVED.0 + 8, now);
    got_more.handle_removed(removed());
    send_all(&mut got_more);
    assert_eq!(got_more.poll_output(), None, "it was filled");

    let mut told_no_more = current(REMOVED.0 - 8, REMOVED.0, now);
    told_no_more.handle_removed(removed());
    told_no_more.handle_removed(None);
    send_all(&mut told_no_more);
    assert_eq!(told_no_more.poll_output(), None);

    let mut old = Sender::new(settings(), historic(REMOVED.0), at(REMOVED.0 - 8), at(REMOVED.0), now);
    old.handle_removed(removed());
    send_all(&mut old);
    assert_eq!(old.poll_output(), Some(Output::CopyDone));

    let (start, servable) = (at(REMOVED.1), at(REMOVED.0));
    let mut beyond = current(REMOVED.1, REMOVED.0, now);
    beyond.handle_removed(removed());
    assert_eq!(beyond.poll_output(), Some(Output::End(StreamEnd::StartAhead { start, servable })));
}

#[test]
fn the_clients_copy_done_is_answered_and_ends_the_stream() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, 2 * SEGMENT, now);
    sender.handle_copy_done(now);
    assert_eq!(sender.next_wal(), None);
    assert_eq!(sender.poll_output(), Some(Output::CopyDone));
    assert_eq!(sender.poll_output(), Some(Output::End(StreamEnd::Finished(TimelineState::Current))));
}

#[test]
fn the_end_of_a_historic_timeline_is_said_and_waits_for_the_client() {
    let now = Instant::now();
    let timeline = historic(SEGMENT + 1_000);
    let mut sender = Sender::new(settings(), timeline, at(SEGMENT), at(SEGMENT + 1_000), now);
    sender.handle_servable(at(9 * SEGMENT), now);
    assert_eq!(send_all(&mut sender).last().unwrap().range.end(), at(SEGMENT + 1_000));
    assert_eq!(sender.poll_output(), Some(Output::CopyDone));
    assert_eq!(sender.poll_output(), None);
    sender.handle_reply(StandbyReply { reply_requested: true, ..reply(SEGMENT, 0, 0) }, now);
    assert_eq!(sender.poll_output(), None, "nothing follows our CopyDone");
    sender.handle_copy_done(now);
    assert_eq!(sender.poll_output(), Some(Output::End(StreamEnd::Finished(timeline))));
}

#[test]
fn a_timeline_left_below_what_was_sent_just_ends() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, SEGMENT + 8_192, now);
    send_all(&mut sender);
    sender.handle_switch(at(SEGMENT + 8_000), TimelineId::new(2).unwrap(), now);
    assert_eq!(sender.next_wal(), None);
    assert_eq!(sender.poll_output(), Some(Output::CopyDone));
    sender.handle_copy_done(now);
    let end = StreamEnd::Finished(historic(SEGMENT + 8_000));
    assert_eq!(sender.poll_output(), Some(Output::End(end)));
}

#[test]
fn a_silent_standby_is_dropped_also_after_the_end_of_the_timeline() {
    let now = Instant::now();
    let mut sender = Sender::new(settings(), historic(SEGMENT + 8), at(SEGMENT), at(SEGMENT + 8), now);
    send_all(&mut sender);
    assert_eq!(sender.poll_output(), Some(Output::CopyDone));
    sender.handle_timeout(now + TIMEOUT / 2);
    assert_eq!(sender.poll_output(), None);
    sender.handle_timeout(now + TIMEOUT);
    assert_eq!(sender.poll_output(), Some(Output::End(StreamEnd::StandbySilent)));
}

#[test]
fn at_a_stop_a_standby_that_has_everything_is_let_go_at_once() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, SEGMENT + 1_000, now);
    send_all(&mut sender);
    sender.handle_reply(reply(SEGMENT + 1_000, SEGMENT + 1_000, 0), now);
    sender.handle_stop(now);
    assert_eq!(sender.poll_output(), Some(Output::End(StreamEnd::StopRequested)));
}

#[test]
fn at_a_stop_the_rest_is_sent_and_asked_for_within_a_limit() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, SEGMENT + 1_000, now);
    sender.handle_stop(now);
    assert_eq!(sender.state(), WalSenderState::Stopping);
    assert_eq!(sender.poll_output(), None, "first the rest");
    send_all(&mut sender);
    assert_eq!(sender.poll_output(), probe(SEGMENT + 1_000));
    sender.handle_reply(reply(SEGMENT + 500, 0, 0), now);
    assert_eq!(sender.poll_output(), None, "no storm of questions");
    assert_eq!(sender.poll_timeout(), Some(now + STOPPING_TIME_MAX));
    sender.handle_timeout(now + STOPPING_TIME_MAX);
    assert_eq!(sender.poll_output(), Some(Output::End(StreamEnd::StopRequested)));
}

#[test]
fn a_tool_that_reports_no_flush_is_let_go_by_its_write() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, SEGMENT + 1_000, now);
    send_all(&mut sender);
    sender.handle_stop(now);
    assert_eq!(sender.poll_output(), probe(SEGMENT + 1_000));
    sender.handle_reply(reply(SEGMENT + 1_000, 0, 0), now);
    assert_eq!(sender.poll_output(), Some(Output::End(StreamEnd::StopRequested)));
}

#[test]
fn bogus_reports_move_nothing_past_what_was_sent() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, SEGMENT + 1_000, now);
    send_all(&mut sender);
    sender.handle_reply(reply(u64::MAX, u64::MAX, u64::MAX), now);
    let progress = sender.progress();
    assert_eq!(progress.sent, Some(at(SEGMENT + 1_000)));
    assert_eq!([progress.write, progress.flush, progress.apply], [progress.sent; 3]);
    sender.handle_reply(reply(1, 1, 1), now);
    sender.handle_reply(reply(0, 0, 0), now);
    assert_eq!(sender.progress().flush, progress.flush, "nor back");
}

#[test]
fn an_apply_beyond_flush_counts_up_to_flush() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, SEGMENT + 1_000, now);
    send_all(&mut sender);
    sender.handle_reply(reply(SEGMENT + 900, SEGMENT + 500, SEGMENT + 800), now);
    assert_eq!(sender.progress().apply, Some(at(SEGMENT + 500)));
}

#[test]
fn an_apply_that_was_told_without_a_flush_does_not_stay_beyond_the_first() {
    let mut sender = current(1 << 20, (1 << 20) + 8192, Instant::now());
    send_all(&mut sender);
    let (now, end) = (Instant::now(), (1 << 20) + 8192);
    sender.handle_reply(reply(end, 0, end), now);
    assert_eq!(sender.progress().apply, Some(at(end)));
    sender.handle_reply(reply(end, end - 8, 0), now);
    assert_eq!((sender.progress().flush, sender.progress().apply), (Some(at(end - 8)), Some(at(end - 8))));
}

#[test]
fn after_a_reconnection_write_is_not_below_flush() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, SEGMENT + 2_000, now);
    send_all(&mut sender);
    sender.handle_reply(reply(SEGMENT + 500, SEGMENT + 1_500, SEGMENT + 1_500), now);
    assert_eq!(sender.progress().write, Some(at(SEGMENT + 1_500)));
}

#[test]
fn lags_are_cleared_by_a_second_unchanged_report_of_everything() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, SEGMENT + 1_000, now);
    send_all(&mut sender);
    let later = now + Duration::from_millis(20);
    let all = reply(SEGMENT + 1_000, SEGMENT + 1_000, SEGMENT + 1_000);
    sender.handle_reply(all, later);
    assert_eq!(sender.progress().replay_lag, Some(Duration::from_millis(20)));
    sender.handle_reply(all, later + Duration::from_secs(10));
    let progress = sender.progress();
    assert_eq!([progress.write_lag, progress.flush_lag, progress.replay_lag], [None; 3]);
}

#[test]
fn lags_stay_while_something_is_missing() {
    let now = Instant::now();
    let mut sender = current(SEGMENT, SEGMENT + 1_000, now);
    send_all(&mut sender);
    let partial = reply(SEGMENT + 1_000, SEGMENT + 1_000, SEGMENT + 500);
    for seconds in [1, 2] {
        sender.handle_reply(partial, now + Duration::from_secs(seconds));
    }
    assert_eq!(sender.progress().write_lag, Some(Duration::from_secs(1)));
    assert_eq!(sender.progress().replay_lag, Some(Duration::from_secs(2)), "a stuck replay grows");
}

/// One event of a random schedule.
#[derive(Clone, Debug)]
enum Event {
    Servable(u64),
    Send,
    Drained,
    Reply { write: u64, flush: u64, apply: u64, reply_requested: bool },
    Heard,
    Wait(u64),
    Switch(u64),
    CopyDone,
    Stop,
}

fn event() -> impl Strategy<Value = Event> {
    let position = || prop_oneof![4 => 0_u64..6_000_000, 1 => Just(0), 1 => Just(u64::MAX - SEGMENT)];
    let reply = (position(), position(), position(), any::<bool>());
    prop_oneof![
        6 => (0_u64..60_000).prop_map(|units| Event::Servable(units * 8)),
        12 => Just(Event::Send),
        4 => Just(Event::Drained),
        6 => reply.prop_map(|(write, flush, apply, reply_requested)| {
            Event::Reply { write, flush, apply, reply_requested }
        }),
        1 => Just(Event::Heard),
        4 => (0_u64..40_000).prop_map(Event::Wait),
        1 => (0_u64..700_000).prop_map(|units| Event::Switch(units * 8)),
        1 => Just(Event::CopyDone),
        1 => Just(Event::Stop),
    ]
}

/// A stream on virtual time, and what may be promised of any schedule; knows nothing of how the sender works.
struct World {
    sender: Sender,
    now: Instant,
    sent: Lsn,
    limit: Lsn,
    is_current: bool,
    flush: Option<Lsn>,
    heard_at: Instant,
    said_copy_done: bool,
    is_over: bool,
}

impl World {
    fn new(start: Lsn) -> Self {
        let now = Instant::now();
        Self {
            sender: current(start.get(), start.get(), now),
            now,
            sent: start,
            limit: start,
            is_current: true,
            flush: None,
            heard_at: now,
            said_copy_done: false,
            is_over: false,
        }
    }

    fn step(&mut self, event: Event) {
        let now = self.now;
        match event {
            Event::Servable(offset) => self.servable(at(SEGMENT + offset)),
            Event::Send => self.send(),
            Event::Drained => self.sender.handle_drained(),
            Event::Reply { write, flush, apply, reply_requested } => {
                let shift = |offset: u64| if offset == 0 { 0 } else { SEGMENT + offset };
                let reply = reply(shift(write), shift(flush), shift(apply));
                self.sender.handle_reply(StandbyReply { reply_requested, ..reply }, now);
                self.heard_at = now;
            }
            Event::Heard => {
                self.sender.handle_heard(now);
                self.heard_at = now;
            }
            Event::Wait(ms) => {
                self.now += Duration::from_millis(ms);
                self.sender.handle_timeout(self.now);
            }
            Event::Switch(offset) => {
                let end = at(SEGMENT + offset);
                self.sender.handle_switch(end, TimelineId::new(2).unwrap(), now);
                if std::mem::take(&mut self.is_current) {
                    self.limit = end;
                }
            }
            Event::CopyDone => {
                self.sender.handle_copy_done(now);
                self.heard_at = now;
            }
            Event::Stop => self.sender.handle_stop(now),
        }
        self.drain_outputs();
        self.check_progress();
        assert!(self.is_over || self.sender.poll_timeout().is_some(), "a live stream has a deadline");
    }

    fn servable(&mut self, servable: Lsn) {
        self.sender.handle_servable(servable, self.now);
        if self.is_current {
            self.limit = self.limit.max(servable);
        }
    }

    fn send(&mut self) {
        let Some(next) = self.sender.next_wal() else { return };
        assert_eq!(self.sender.next_wal(), Some(next), "asking changes nothing");
        assert!(!self.said_copy_done && !self.is_over, "WAL after the end");
        assert_eq!(next.range.start(), self.sent, "a gap or an overlap");
        assert!(next.range.end() <= self.limit, "past the limit");
        assert!(next.range.bytes() <= 131_072);
        let end = next.range.end();
        assert!(end == self.limit || end.page_offset() == 0, "{end} may wedge a standby");
        self.sent = end;
        self.sender.handle_sent(end);
    }

    fn drain_outputs(&mut self) {
        while let Some(output) = self.sender.poll_output() {
            assert!(!self.is_over, "{output:?} after the end");
            match output {
                Output::Keepalive { wal_end, .. } => {
                    assert!(!self.said_copy_done, "a keepalive after CopyDone");
                    assert!(wal_end.is_none_or(|end| end <= self.sent));
                }
                Output::CopyDone => {
                    assert!(!self.said_copy_done, "CopyDone twice");
                    self.said_copy_done = true;
                }
                Output::End(end) => self.check_end(end),
            }
        }
    }

    fn check_end(&mut self, end: StreamEnd) {
        self.is_over = true;
        match end {
            StreamEnd::Finished(_) => assert!(self.said_copy_done),
            StreamEnd::StandbySilent => assert!(self.now >= self.heard_at + TIMEOUT, "dropped too early"),
            StreamEnd::StopRequested => {}
            StreamEnd::StartAhead { .. } => panic!("the start was not ahead"),
            StreamEnd::WalRemoved { .. } => panic!("nothing was removed"),
        }
    }

    fn check_progress(&mut self) {
        let progress = self.sender.progress();
        assert_eq!(progress.sent, Some(self.sent));
        assert!(progress.flush <= progress.write && progress.write <= progress.sent, "{progress:?}");
        assert!(progress.flush >= self.flush, "flush went back");
        assert!(progress.flush.is_none() || progress.apply <= progress.flush);
        self.flush = progress.flush;
    }

    /// Left alone, every stream ends, and at the time it named.
    fn leave_alone(&mut self) {
        for _ in 0..4 {
            let Some(deadline) = self.sender.poll_timeout() else { break };
            self.now = self.now.max(deadline);
            self.sender.handle_timeout(self.now);
            self.drain_outputs();
        }
        assert!(self.is_over);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3_000))]

    #[test]
    fn any_schedule_keeps_the_promises(
        start_units in 0_u64..40_000,
        events in prop::collection::vec(event(), 1..150),
    ) {
        let mut world = World::new(at(SEGMENT + start_units * 8));
        for event in events {
            world.step(event);
        }
        world.leave_alone();
    }
}
