//! Our sending half of one stream: what to send next, when to ask whether the standby lives, and when to end.
//!
//! Owns the positions of one stream and their order: nothing is sent past the limit it was given, no position that a
//! standby reports counts beyond what was sent, and none moves backwards. Never reads WAL: it names ranges, and its driver
//! says when one of them was sent. The rules are those of walsender.c.
//!
//! ```text
//!             start is reached             limit reached, nothing unsent
//!  Waiting ─────────────────▶ Catchup ──────────────────────▶ Streaming
//!     │                          │                               │
//!     └──────────┬───────────────┴───────────────┬───────────────┘
//!                │ end of timeline, or           │ the relay stops
//!                ▼ the client's CopyDone         ▼
//!             Finishing ──▶ Ended             Stopping ──▶ Ended
//! ```
//! A silent standby is asked for a reply after half of `wal_sender_timeout` and dropped after the whole of it, in any state.

use std::time::{Duration, Instant};

use crate::session::{
    cut::{WAL_DATA_BYTES_MAX, message_end},
    lag::{LagKind, LagTracker},
};
use crate::status::WalSenderState;
use crate::wal::{Lsn, LsnRange, SegmentSize, TimelineId};

/// What a stream is judged by.
#[derive(Clone, Copy, Debug)]
pub struct SenderSettings {
    /// Silence after which a standby is dropped; `None` never drops one.
    pub wal_sender_timeout: Option<Duration>,
    /// A start may be ahead of what can be served by this much: such a client waits instead of failing.
    pub segment_size: SegmentSize,
}

/// Whether the timeline of a stream still grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimelineState {
    /// It is the one being received.
    Current,
    /// It was left.
    Historic {
        /// Where it was left.
        end: Lsn,
        /// The timeline that goes on from there.
        next: TimelineId,
    },
}

/// What a standby says of itself; each position is the end of what it has, or unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandbyReply {
    /// Received and handed to its operating system.
    pub write: Option<Lsn>,
    /// Synced.
    pub flush: Option<Lsn>,
    /// Applied.
    pub apply: Option<Lsn>,
    /// It wants to hear from us now.
    pub reply_requested: bool,
}

/// A range to send as one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextWal {
    /// The bytes.
    pub range: LsnRange,
    /// End of what may be sent now: the message's `walEnd`.
    pub wal_end: Lsn,
}

/// What to send besides WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// A keepalive.
    Keepalive {
        /// The message's `walEnd`.
        wal_end: Option<Lsn>,
        /// Whether the standby must answer.
        reply: ReplyRequested,
    },
    /// No more WAL follows.
    CopyDone,
    /// The stream is over.
    End(StreamEnd),
}

/// Whether a keepalive asks for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyRequested {
    /// The standby must answer at once.
    Yes,
    /// It need not.
    No,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// Both sides said so; the session goes on. For a historic timeline the client is told what comes next.
    Finished(TimelineState),
    /// Nothing was heard for `wal_sender_timeout`: the connection is closed without a word.
    StandbySilent,
    /// The relay stops.
    StopRequested,
    /// The start is further ahead of what can be served than a client may wait for.
    StartAhead {
        /// Where the client wanted to start.
        start: Lsn,
        /// What can be served.
        servable: Lsn,
    },
    /// What comes next was removed upstream before it came here, so that it never will be sent.
    WalRemoved {
        /// The first byte that is missing.
        at: Lsn,
    },
}

/// Where a stream is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// End of what was sent, or the start while nothing was.
    pub sent: Option<Lsn>,
    /// Reported as written, never beyond `sent`.
    pub write: Option<Lsn>,
    /// Reported as synced, never beyond `write`.
    pub flush: Option<Lsn>,
    /// Reported as applied, never beyond `flush` where that is known.
    pub apply: Option<Lsn>,
    /// Time from sendable to written.
    pub write_lag: Option<Duration>,
    /// Time from sendable to synced.
    pub flush_lag: Option<Duration>,
    /// Time from sendable to applied.
    pub replay_lag: Option<Duration>,
}

/// The sending half of one stream.
#[derive(Debug)]
pub struct Sender {
    settings: SenderSettings,
    timeline: TimelineState,
    phase: Phase,
    sent: Lsn,
    limit: Lsn,
    removed: Option<LsnRange>,
    standby: Progress,
    lag: LagTracker,
    heard_at: Instant,
    probe: Probe,
    owes_reply: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Catchup,
    Streaming,
    Stopping {
        until: Instant,
        final_probe: Probe,
    },
    /// CopyDone goes both ways before the stream is over.
    Finishing {
        ours: OurCopyDone,
        theirs: TheirCopyDone,
    },
    Ending(StreamEnd),
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OurCopyDone {
    Due,
    Sent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TheirCopyDone {
    Awaited,
    Received,
}

/// The question whether the standby lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probe {
    NotNeeded,
    Due,
    Sent,
}

impl Sender {
    /// A stream that begins at `start`; `servable` is the end of what may be sent on its timeline now.
    pub fn new(
        settings: SenderSettings,
        timeline: TimelineState,
        start: Lsn,
        servable: Lsn,
        now: Instant,
    ) -> Self {
        let mut sender = Self {
            settings,
            timeline,
            phase: Phase::Waiting,
            sent: start,
            limit: servable,
            removed: None,
            standby: Progress::default(),
            lag: LagTracker::default(),
            heard_at: now,
            probe: Probe::NotNeeded,
            owes_reply: false,
        };
        if start.bytes_since(servable) > settings.segment_size.bytes() {
            sender.phase = Phase::Ending(StreamEnd::StartAhead { start, servable });
        }
        sender.apply_limit(servable, now);
        sender
    }

    /// WAL up to `servable` may be sent. Never moves the limit back; on a historic timeline its end is the limit.
    pub fn handle_servable(&mut self, servable: Lsn, now: Instant) {
        if self.timeline == TimelineState::Current {
            self.apply_limit(servable, now);
        }
    }

    /// The timeline was left at `end`. What was sent beyond that can only be the head of a record that the next timeline
    /// does not have; the standby cannot apply it either, so the stream just ends.
    pub fn handle_switch(&mut self, end: Lsn, next: TimelineId, now: Instant) {
        if self.timeline == TimelineState::Current {
            self.timeline = TimelineState::Historic { end, next };
            self.limit = end;
            self.apply_limit(end, now);
        }
    }

    /// The WAL of this range was removed upstream before it came here: a stream that gets there ends, for the standby may
    /// find it elsewhere. It counts as long as nothing behind its start may be sent.
    pub fn handle_removed(&mut self, removed: Option<LsnRange>) {
        self.removed = removed;
        self.end_where_removed();
    }

    /// The range from [`Sender::next_wal`] that ends at `end` was handed to the connection.
    pub fn handle_sent(&mut self, end: Lsn) {
        assert!(end > self.sent && end <= self.limit, "sent {end} after {}, limit {}", self.sent, self.limit);
        self.sent = end;
        self.finish_historic();
        self.end_where_removed();
        self.probe_when_stopping();
    }

    /// Everything handed to the connection so far has left it.
    pub fn handle_drained(&mut self) {
        if self.phase == Phase::Catchup && self.is_caught_up() {
            self.phase = Phase::Streaming;
        }
        self.finish_stopping();
    }

    /// The client sent something, whatever it was.
    pub fn handle_heard(&mut self, now: Instant) {
        self.heard_at = now;
        self.probe = Probe::NotNeeded;
    }

    /// The standby reported its positions.
    pub fn handle_reply(&mut self, reply: StandbyReply, now: Instant) {
        self.handle_heard(now);
        self.owes_reply |= reply.reply_requested;
        let before = self.standby;
        self.take_positions(reply);
        self.measure_lag(before, now);
        self.finish_stopping();
    }

    /// The client will send nothing more in this stream and wants none.
    pub fn handle_copy_done(&mut self, now: Instant) {
        self.handle_heard(now);
        self.phase = match self.phase {
            Phase::Waiting | Phase::Catchup | Phase::Streaming => {
                Phase::Finishing { ours: OurCopyDone::Due, theirs: TheirCopyDone::Received }
            }
            Phase::Finishing { ours, .. } => Phase::Finishing { ours, theirs: TheirCopyDone::Received },
            Phase::Stopping { .. } => Phase::Ending(StreamEnd::StopRequested),
            phase @ (Phase::Ending(_) | Phase::Ended) => phase,
        };
    }

    /// The relay stops: the standby gets a short time to take what there is.
    pub fn handle_stop(&mut self, now: Instant) {
        self.phase = match self.phase {
            Phase::Catchup | Phase::Streaming => {
                Phase::Stopping { until: now + STOPPING_TIME_MAX, final_probe: Probe::NotNeeded }
            }
            Phase::Waiting | Phase::Finishing { .. } => Phase::Ending(StreamEnd::StopRequested),
            phase @ (Phase::Stopping { .. } | Phase::Ending(_) | Phase::Ended) => phase,
        };
        self.probe_when_stopping();
        self.finish_stopping();
    }

    /// The time that [`Sender::poll_timeout`] named may have come.
    pub fn handle_timeout(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Ending(_) | Phase::Ended) {
            return;
        }
        if let Phase::Stopping { until, .. } = self.phase
            && now >= until
        {
            self.phase = Phase::Ending(StreamEnd::StopRequested);
            return;
        }
        let Some(timeout) = self.settings.wal_sender_timeout else { return };
        if now >= self.heard_at + timeout {
            self.phase = Phase::Ending(StreamEnd::StandbySilent);
        } else if self.probe == Probe::NotNeeded && now >= self.heard_at + timeout / 2 {
            self.probe = Probe::Due;
        }
    }

    /// When [`Sender::handle_timeout`] must be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let silence = self.settings.wal_sender_timeout.map(|timeout| match self.probe {
            Probe::NotNeeded => self.heard_at + timeout / 2,
            Probe::Due | Probe::Sent => self.heard_at + timeout,
        });
        let stopping = match self.phase {
            Phase::Stopping { until, .. } => Some(until),
            Phase::Waiting | Phase::Catchup | Phase::Streaming => None,
            Phase::Finishing { .. } | Phase::Ending(_) => None,
            Phase::Ended => return None,
        };
        silence.into_iter().chain(stopping).min()
    }

    /// What to send besides WAL, in order; `None` when there is nothing now.
    pub fn poll_output(&mut self) -> Option<Output> {
        match self.phase {
            Phase::Ended => None,
            Phase::Ending(end) => {
                self.phase = Phase::Ended;
                Some(Output::End(end))
            }
            Phase::Finishing { ours: OurCopyDone::Due, theirs } => {
                self.phase = Phase::Finishing { ours: OurCopyDone::Sent, theirs };
                Some(Output::CopyDone)
            }
            Phase::Finishing { ours: OurCopyDone::Sent, theirs: TheirCopyDone::Received } => {
                self.phase = Phase::Ended;
                Some(Output::End(StreamEnd::Finished(self.timeline)))
            }
            // After CopyDone nothing more may be sent in this stream.
            Phase::Finishing { ours: OurCopyDone::Sent, theirs: TheirCopyDone::Awaited } => None,
            Phase::Waiting | Phase::Catchup | Phase::Streaming | Phase::Stopping { .. } => {
                self.poll_keepalive()
            }
        }
    }

    /// The end alone, when the stream ends without another message; for a driver that has no room for messages now.
    pub fn poll_end(&mut self) -> Option<StreamEnd> {
        let Phase::Ending(end) = self.phase else { return None };
        self.phase = Phase::Ended;
        Some(end)
    }

    /// The next WAL to send, the same until [`Sender::handle_sent`] is called; `None` when there is none now.
    pub fn next_wal(&self) -> Option<NextWal> {
        match self.phase {
            Phase::Catchup | Phase::Streaming | Phase::Stopping { .. } => {
                let end = message_end(self.sent, self.limit, WAL_DATA_BYTES_MAX)?;
                LsnRange::new(self.sent, end).map(|range| NextWal { range, wal_end: self.limit })
            }
            Phase::Waiting | Phase::Finishing { .. } | Phase::Ending(_) | Phase::Ended => None,
        }
    }

    /// All WAL that may be sent now, for a driver that cuts it otherwise: at [`Sender::next_wal`]'s end, at any place where a
    /// message may end before, or at the end.
    pub fn sendable(&self) -> Option<LsnRange> {
        match self.phase {
            Phase::Catchup | Phase::Streaming | Phase::Stopping { .. } => {
                LsnRange::new(self.sent, self.limit)
            }
            Phase::Waiting | Phase::Finishing { .. } | Phase::Ending(_) | Phase::Ended => None,
        }
    }

    /// State as `pg_stat_replication` shows it.
    pub fn state(&self) -> WalSenderState {
        match self.phase {
            Phase::Waiting | Phase::Catchup => WalSenderState::Catchup,
            Phase::Streaming | Phase::Finishing { .. } => WalSenderState::Streaming,
            Phase::Stopping { .. } => WalSenderState::Stopping,
            Phase::Ending(_) | Phase::Ended => WalSenderState::Startup,
        }
    }

    /// Whether the stream's timeline still grows.
    pub fn timeline(&self) -> TimelineState {
        self.timeline
    }

    /// Where the stream is.
    pub fn progress(&self) -> Progress {
        Progress { sent: Some(self.sent), ..self.standby }
    }

    fn poll_keepalive(&mut self) -> Option<Output> {
        let mut is_due = self.probe == Probe::Due;
        if let Phase::Stopping { final_probe: final_probe @ Probe::Due, .. } = &mut self.phase {
            *final_probe = Probe::Sent;
            is_due = true;
        }
        let reply = match (is_due, self.owes_reply) {
            (true, _) => ReplyRequested::Yes,
            (false, true) => ReplyRequested::No,
            (false, false) => return None,
        };
        if is_due {
            self.probe = Probe::Sent;
        }
        self.owes_reply = false;
        // A client that waits for its start must not hear of WAL that does not exist yet.
        Some(Output::Keepalive { wal_end: Some(self.sent.min(self.limit)), reply })
    }

    fn apply_limit(&mut self, limit: Lsn, now: Instant) {
        self.limit = self.limit.max(limit);
        self.lag.note_sendable(self.limit, now);
        if self.phase == Phase::Waiting && self.sent <= self.limit {
            self.phase = Phase::Catchup;
        }
        self.finish_historic();
        self.end_where_removed();
    }

    fn end_where_removed(&mut self) {
        let Some(removed) = self.removed.filter(|_| self.timeline == TimelineState::Current) else { return };
        let is_waiting = matches!(
            self.phase,
            Phase::Waiting | Phase::Catchup | Phase::Streaming | Phase::Ending(StreamEnd::StartAhead { .. })
        );
        if is_waiting && removed.contains(self.sent) && self.limit <= removed.start() {
            self.phase = Phase::Ending(StreamEnd::WalRemoved { at: self.sent });
        }
    }

    /// At the end of a timeline that was left, says CopyDone.
    fn finish_historic(&mut self) {
        let TimelineState::Historic { end, .. } = self.timeline else { return };
        if self.sent >= end && matches!(self.phase, Phase::Waiting | Phase::Catchup | Phase::Streaming) {
            self.phase = Phase::Finishing { ours: OurCopyDone::Due, theirs: TheirCopyDone::Awaited };
        }
    }

    /// When the relay stops, a standby that was sent everything is asked at once how much it has: some tools report only
    /// every ten seconds.
    fn probe_when_stopping(&mut self) {
        let is_caught_up = self.is_caught_up();
        if let Phase::Stopping { final_probe, .. } = &mut self.phase
            && is_caught_up
        {
            *final_probe = Probe::Due;
        }
    }

    /// When the relay stops, a standby that has everything is let go at once.
    fn finish_stopping(&mut self) {
        let replicated = self.standby.flush.or(self.standby.write);
        let has_all = self.is_caught_up() && replicated == Some(self.sent);
        if has_all && matches!(self.phase, Phase::Stopping { .. }) {
            self.phase = Phase::Ending(StreamEnd::StopRequested);
        }
    }

    fn is_caught_up(&self) -> bool {
        self.sent >= self.limit
    }

    /// A reported position counts up to what was sent, and never goes back. After a reconnection `write` starts below
    /// `flush`, because the standby asks again for the whole segment; the greater of both is what it has.
    fn take_positions(&mut self, reply: StandbyReply) {
        let sent = self.sent.min(self.limit);
        let clamp = |reported: Option<Lsn>, before: Option<Lsn>| reported.map(|at| at.min(sent)).max(before);
        let flush = clamp(reply.flush, self.standby.flush);
        let write = clamp(reply.write, self.standby.write).max(flush);
        self.standby.write = write;
        self.standby.flush = flush;
        // Bounded at the end: who told of no flush before may have told of an apply that is beyond the first.
        let most = flush.or(write).unwrap_or(sent);
        self.standby.apply = clamp(reply.apply, self.standby.apply).map(|at| at.min(most));
    }

    fn measure_lag(&mut self, before: Progress, now: Instant) {
        let standby = &mut self.standby;
        let mut measure = |kind, position: Option<Lsn>| position.and_then(|at| self.lag.read(kind, at, now));
        let write_lag = measure(LagKind::Write, standby.write);
        let flush_lag = measure(LagKind::Flush, standby.flush);
        let replay_lag = measure(LagKind::Replay, standby.apply);

        // A second report with everything done and nothing new: the lags are of an earlier time.
        let positions = [standby.write, standby.flush, standby.apply];
        let is_unchanged = positions == [before.write, before.flush, before.apply];
        let has_all = positions.iter().flatten().all(|position| *position == self.sent);
        if is_unchanged && has_all && standby.write.is_some() {
            (standby.write_lag, standby.flush_lag, standby.replay_lag) = (write_lag, flush_lag, replay_lag);
            return;
        }
        standby.write_lag = write_lag.or(standby.write_lag);
        standby.flush_lag = flush_lag.or(standby.flush_lag);
        standby.replay_lag = replay_lag.or(standby.replay_lag);
    }
}

/// Longest time a standby has, when the relay stops, to take and confirm what there is.
pub const STOPPING_TIME_MAX: Duration = Duration::from_secs(1);
