//! Our receiving half: what is reported upstream and when, and when the upstream is given up.
//!
//! Owns the status updates of one session. Must never report as flushed what the store has not reported flushed, nor
//! anything before the overlap was compared, and must never make a primary wait for us when it wants to stop.
//!
//! ```text
//!                overlap compared          a stopping primary keeps asking beyond our flush
//!   Comparing ──────────────────▶ Reporting ───────────────────────────────────▶ VouchingForNothing
//!   (flush 0, write = received)      ▲                                     (flush 0, write = received)
//!                                    └──────────── flush reaches what was asked for ──────┘
//! ```

use std::time::{Duration, Instant};

use crate::session::gather::Pace;
use crate::wal::Lsn;

/// Settings of a [`Receiver`].
#[derive(Clone, Copy, Debug)]
pub struct ReceiverSettings {
    /// Silence after which the upstream is given up (`wal_receiver_timeout`); `None` waits for ever.
    pub receiver_timeout: Option<Duration>,
    /// Longest time between two status updates (`wal_receiver_status_interval`, and well below the upstream's
    /// `wal_sender_timeout`).
    pub status_interval: Duration,
}

/// What the store has, as far as it may be told to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// End of the bytes taken from the upstream, verified or not.
    pub received: Lsn,
    /// End of the verified WAL given to the operating system.
    pub written: Lsn,
    /// End of the WAL that counts as flushed by the acknowledge policy; never beyond what is on stable storage here.
    pub flushed: Lsn,
    /// Applied by standbys, as the policy has it; `None` while none has.
    pub applied: Option<Lsn>,
}

/// A status update to send; `None` is "not known", 0 on the wire. Flush 0 beside a write position vouches for nothing:
/// the primary counts such a standby as asynchronous, but a stopping primary accepts it (`WalSndDone`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Last byte written, plus 1.
    pub write: Option<Lsn>,
    /// Last byte flushed, plus 1.
    pub flush: Option<Lsn>,
    /// Last byte applied, plus 1; never beyond `flush`.
    pub apply: Option<Lsn>,
    /// Whether the upstream shall answer at once.
    pub ask_for_reply: bool,
}

/// What the driver shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send a status update.
    Send(Report),
    /// End the session: nothing was heard for `wal_receiver_timeout`.
    GiveUpSilent,
}

/// Whether reading from the upstream goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// The driver reads whatever comes.
    Open,
    /// The driver does not read, so silence says nothing about the upstream.
    Paused,
}

/// Whether the store can make anything durable now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncAbility {
    /// It can, or at least does not know better.
    Able,
    /// It has no space, or failed: what is asked for will not be flushed soon.
    Unable,
}

/// The receiving half of a session.
#[derive(Debug)]
pub struct Receiver {
    settings: ReceiverSettings,
    /// Where this session's stream begins.
    start: Lsn,
    progress: Progress,
    stage: Stage,
    reading: Reading,
    pace: Pace,
    sync_ability: SyncAbility,
    heard_at: Instant,
    ping_sent: bool,
    last_sent: Option<(Instant, Report)>,
    /// An answer is owed: the upstream asked.
    answer_owed: bool,
    /// The end of WAL that it named when it asked last.
    asked: Option<Lsn>,
    /// Positions moved since the last report.
    moved: bool,
    /// Nothing is vouched for until this is flushed: it was acknowledged before, and has been lost since.
    vouch_from: Lsn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Held bytes are being compared with the upstream's.
    Comparing,
    /// Durable positions are reported.
    Reporting { pressed: Option<Pressed> },
    /// The primary is stopping and we are behind: it is let go, with a report that vouches for nothing.
    VouchingForNothing { asked: Lsn },
}

/// The upstream asks again and again beyond what we reported as flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pressed {
    since: Instant,
    last_asked_at: Instant,
}

impl Receiver {
    /// A session that begins now, with nothing received but what `progress` says. Nothing is reported before [`Self::handle_overlap_proven`].
    pub fn new(settings: ReceiverSettings, progress: Progress, now: Instant) -> Self {
        Self {
            settings,
            start: progress.received,
            progress,
            stage: Stage::Comparing,
            reading: Reading::Open,
            pace: Pace::Streaming,
            sync_ability: SyncAbility::Able,
            heard_at: now,
            ping_sent: false,
            last_sent: None,
            answer_owed: false,
            asked: None,
            moved: true,
            vouch_from: Lsn::MIN,
        }
    }

    /// Up to here WAL was acknowledged before and has been lost since: until it is flushed again, nothing is vouched for.
    pub fn vouch_only_from(&mut self, acknowledged: Lsn) {
        self.vouch_from = acknowledged;
    }

    /// Anything at all came from the upstream.
    pub fn handle_heard(&mut self, now: Instant) {
        self.heard_at = now;
        self.ping_sent = false;
    }

    /// A keepalive came: `wal_end` is the end of what the upstream has sent.
    pub fn handle_keepalive(&mut self, now: Instant, wal_end: Option<Lsn>, reply_requested: bool) {
        self.handle_heard(now);
        if !reply_requested {
            return;
        }
        self.answer_owed = true;
        self.asked = wal_end;
        let behind = wal_end.filter(|&asked| asked > self.progress.flushed);
        self.stage = match (self.stage, behind) {
            (Stage::Comparing, _) => Stage::Comparing,
            (Stage::Reporting { .. }, None) => Stage::Reporting { pressed: None },
            (Stage::Reporting { pressed }, Some(asked)) => self.pressed_further(now, pressed, asked),
            (Stage::VouchingForNothing { asked }, _) => Stage::VouchingForNothing { asked },
        };
    }

    fn pressed_further(&self, now: Instant, pressed: Option<Pressed>, asked: Lsn) -> Stage {
        let since = match pressed {
            Some(pressed) if now.duration_since(pressed.last_asked_at) <= PRESSING_GAP_MAX => pressed.since,
            _ => now,
        };
        let is_stopping = now.duration_since(since) >= PRESSED_FOR_MAX;
        if is_stopping || self.sync_ability == SyncAbility::Unable {
            return Stage::VouchingForNothing { asked };
        }
        Stage::Reporting { pressed: Some(Pressed { since, last_asked_at: now }) }
    }

    /// Everything held was compared with what the upstream sent.
    pub fn handle_overlap_proven(&mut self) {
        if self.stage == Stage::Comparing {
            self.stage = Stage::Reporting { pressed: None };
            self.moved = true;
        }
    }

    /// The store moved on. Positions that went back are a bug of ours.
    pub fn handle_progress(&mut self, progress: Progress) {
        assert!(progress.flushed >= self.progress.flushed, "flushed went back to {}", progress.flushed);
        assert!(progress.written >= self.progress.written, "written went back to {}", progress.written);
        assert!(progress.flushed <= progress.written, "flushed {} passed written", progress.flushed);
        let reportable = |of: Progress| (of.written, of.flushed, of.applied);
        let reportable = reportable(progress) != reportable(self.progress);
        self.progress = progress;
        self.moved |= reportable;
        if let Stage::VouchingForNothing { asked } = self.stage
            && progress.flushed >= asked
        {
            self.stage = Stage::Reporting { pressed: None };
            self.moved = true;
        }
    }

    /// Whether the store can sync changed.
    pub fn handle_sync_ability(&mut self, ability: SyncAbility) {
        self.sync_ability = ability;
    }

    /// The upstream is far ahead, or is not any more.
    pub fn handle_pace(&mut self, pace: Pace) {
        self.pace = pace;
    }

    /// Reading was paused or goes on.
    pub fn handle_reading(&mut self, now: Instant, reading: Reading) {
        if self.reading != reading {
            self.reading = reading;
            self.handle_heard(now);
        }
    }

    /// What to do now; `None` when there is nothing.
    pub fn poll_output(&mut self, now: Instant) -> Option<Output> {
        let report = self.report(self.ping_due(now));
        let due = report.ask_for_reply
            || self.moved && self.moved_due_at(report).is_some_and(|due| now >= due)
            || self.answer_owed && self.answer_due_at(report).is_none_or(|due| now >= due)
            || self.regular_due_at().is_none_or(|due| now >= due);
        if self.is_silent(now) {
            return Some(Output::GiveUpSilent);
        }
        if !due {
            return None;
        }
        self.ping_sent |= report.ask_for_reply;
        self.answer_owed = false;
        self.moved = false;
        self.last_sent = Some((now, report));
        Some(Output::Send(report))
    }

    /// When [`Self::poll_output`] may have something new although nothing happens.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let silence =
            self.settings.receiver_timeout.filter(|_| self.reading == Reading::Open).map(|timeout| {
                let wait = if self.ping_sent { timeout } else { timeout / 2 };
                self.heard_at + wait
            });
        let answer = if self.answer_owed { self.answer_due_at(self.report(false)) } else { None };
        let moved = if self.moved { self.moved_due_at(self.report(false)) } else { None };
        [silence, answer, moved, self.regular_due_at()].into_iter().flatten().min()
    }

    /// Whether held bytes have been compared, so that positions are reported.
    pub fn is_reporting(&self) -> bool {
        self.stage != Stage::Comparing
    }

    fn report(&self, ask_for_reply: bool) -> Report {
        let (write, flush) = match self.stage {
            // Nothing came yet. Only an upstream that stops just there wants to hear that nothing is missing.
            Stage::Comparing | Stage::Reporting { .. } if self.progress.received == self.start => {
                (self.asked.filter(|asked| *asked == self.start), None)
            }
            Stage::Comparing | Stage::VouchingForNothing { .. } => (Some(self.progress.received), None),
            Stage::Reporting { .. } if self.progress.flushed < self.vouch_from => {
                (self.delivered(self.progress.written), None)
            }
            Stage::Reporting { .. } => {
                (self.delivered(self.progress.written), self.delivered(self.progress.flushed))
            }
        };
        let apply = self.progress.applied.and_then(|applied| self.delivered(applied).min(flush));
        Report { write, flush, apply, ask_for_reply }
    }

    /// A position that this session has delivered something of; at its very start there is nothing to vouch for.
    fn delivered(&self, position: Lsn) -> Option<Lsn> {
        (position > self.start).then_some(position)
    }

    fn changes(&self, report: Report) -> bool {
        let positions = |of: Report| (of.write, of.flush, of.apply);
        self.last_sent.is_none_or(|(_, last)| positions(last) != positions(report))
    }

    /// When moved positions go out; `None` when they are those that were sent. At once, for a commit may wait for any of
    /// them; but nobody waits for what is only written while the upstream is far ahead, and the next flush tells that too.
    fn moved_due_at(&self, report: Report) -> Option<Instant> {
        let Some((sent_at, last)) = self.last_sent else { return Some(self.heard_at) };
        if (last.flush, last.apply) != (report.flush, report.apply) {
            return Some(sent_at);
        }
        let due = match self.pace {
            Pace::Streaming => sent_at,
            Pace::CatchingUp => sent_at + WRITE_REPORT_INTERVAL,
        };
        (last.write != report.write).then_some(due)
    }

    /// When an owed answer goes out; `None` at once. An unchanged answer waits, so that two eager ends do not spin.
    fn answer_due_at(&self, report: Report) -> Option<Instant> {
        let (sent_at, _) = self.last_sent?;
        (!self.changes(report)).then(|| sent_at + UNCHANGED_REPLY_INTERVAL)
    }

    /// When the next regular status update is due; `None` at once.
    fn regular_due_at(&self) -> Option<Instant> {
        self.last_sent.map(|(sent_at, _)| sent_at + self.settings.status_interval)
    }

    fn ping_due(&self, now: Instant) -> bool {
        let silence = now.saturating_duration_since(self.heard_at);
        self.reading == Reading::Open
            && !self.ping_sent
            && self.settings.receiver_timeout.is_some_and(|timeout| silence >= timeout / 2)
    }

    fn is_silent(&self, now: Instant) -> bool {
        let silence = now.saturating_duration_since(self.heard_at);
        self.reading == Reading::Open
            && self.settings.receiver_timeout.is_some_and(|timeout| silence >= timeout)
    }
}

/// Unchanged answers to an upstream that asks again and again are at least this far apart.
pub const UNCHANGED_REPLY_INTERVAL: Duration = Duration::from_millis(100);

/// While the upstream is far ahead, reports that tell of a new write position and nothing else are at least this far apart.
pub const WRITE_REPORT_INTERVAL: Duration = Duration::from_millis(2);

/// An upstream that has asked beyond our flush for this long is stopping.
pub const PRESSED_FOR_MAX: Duration = Duration::from_secs(1);

/// Requests further apart than this are ordinary pings, not those of a stopping primary.
const PRESSING_GAP_MAX: Duration = Duration::from_millis(500);

const _: () = assert!(UNCHANGED_REPLY_INTERVAL.as_millis() * 2 < PRESSING_GAP_MAX.as_millis());

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: ReceiverSettings = ReceiverSettings {
        receiver_timeout: Some(Duration::from_secs(60)),
        status_interval: Duration::from_secs(10),
    };

    fn lsn(raw: u64) -> Lsn {
        Lsn::new(raw).unwrap()
    }

    fn progress(received: u64, written: u64, flushed: u64) -> Progress {
        Progress { received: lsn(received), written: lsn(written), flushed: lsn(flushed), applied: None }
    }

    /// A session that began at 50, and has compared what is held up to 100.
    fn reporting(now: Instant) -> Receiver {
        let mut receiver = Receiver::new(SETTINGS, progress(50, 100, 100), now);
        receiver.handle_progress(progress(100, 100, 100));
        receiver.handle_overlap_proven();
        while receiver.poll_output(now).is_some() {}
        receiver
    }

    fn sent(write: u64, flush: u64) -> Option<Output> {
        Some(Output::Send(Report {
            write: Lsn::new(write),
            flush: Lsn::new(flush),
            apply: None,
            ask_for_reply: false,
        }))
    }

    #[test]
    fn nothing_is_vouched_for_before_the_overlap_was_compared() {
        let now = Instant::now();
        let mut receiver = Receiver::new(SETTINGS, progress(50, 100, 100), now);
        assert_eq!(receiver.poll_output(now), sent(0, 0));
        receiver.handle_progress(progress(110, 100, 100));
        receiver.handle_keepalive(now, Some(lsn(500)), true);
        let later = now + UNCHANGED_REPLY_INTERVAL;
        assert_eq!(receiver.poll_output(later), sent(110, 0));
        receiver.handle_overlap_proven();
        assert_eq!(receiver.poll_output(later), sent(100, 100));
        assert_eq!(receiver.poll_output(later), None);
    }

    #[test]
    fn a_store_that_holds_nothing_yet_vouches_for_nothing() {
        let now = Instant::now();
        let mut receiver = Receiver::new(SETTINGS, progress(100, 100, 100), now);
        receiver.handle_overlap_proven();
        assert_eq!(receiver.poll_output(now), sent(0, 0));
        receiver.handle_progress(progress(130, 120, 100));
        assert_eq!(receiver.poll_output(now), sent(120, 0));
        receiver.handle_progress(progress(130, 120, 120));
        assert_eq!(receiver.poll_output(now), sent(120, 120));
    }

    #[test]
    fn an_upstream_that_stops_where_the_session_began_is_let_go() {
        let now = Instant::now();
        let mut receiver = Receiver::new(SETTINGS, progress(100, 100, 100), now);
        receiver.handle_overlap_proven();
        assert_eq!(receiver.poll_output(now), sent(0, 0));
        receiver.handle_keepalive(now, Some(lsn(100)), true);
        assert_eq!(receiver.poll_output(now + UNCHANGED_REPLY_INTERVAL), sent(100, 0));
    }

    #[test]
    fn write_and_flush_are_reported_as_they_move() {
        let now = Instant::now();
        let mut receiver = reporting(now);
        receiver.handle_progress(progress(300, 150, 100));
        assert_eq!(receiver.poll_output(now), sent(150, 100), "a commit may wait for it");
        receiver.handle_pace(Pace::CatchingUp);
        receiver.handle_progress(progress(300, 200, 100));
        assert_eq!(receiver.poll_output(now), None, "a report was sent just now");
        assert_eq!(receiver.poll_timeout(), Some(now + WRITE_REPORT_INTERVAL));
        let now = now + WRITE_REPORT_INTERVAL;
        assert_eq!(receiver.poll_output(now), sent(200, 100));
        receiver.handle_progress(progress(300, 250, 100));
        receiver.handle_progress(progress(300, 250, 200));
        assert_eq!(receiver.poll_output(now), sent(250, 200), "flushed is told at once");
        receiver.handle_progress(progress(400, 250, 200));
        assert_eq!(receiver.poll_output(now), None, "received alone is nobody's business");
    }

    #[test]
    fn a_request_is_answered_at_once_and_an_unchanged_answer_only_every_100_ms() {
        let start = Instant::now();
        let mut receiver = reporting(start);
        let now = start + Duration::from_secs(1);
        receiver.handle_keepalive(now, Some(lsn(100)), true);
        assert_eq!(receiver.poll_output(now), sent(100, 100));
        receiver.handle_keepalive(now, Some(lsn(100)), true);
        assert_eq!(receiver.poll_output(now), None);
        assert_eq!(receiver.poll_timeout(), Some(now + UNCHANGED_REPLY_INTERVAL));
        assert_eq!(receiver.poll_output(now + UNCHANGED_REPLY_INTERVAL), sent(100, 100));
        assert_eq!(receiver.poll_output(now + UNCHANGED_REPLY_INTERVAL), None);
    }

    #[test]
    fn a_stopping_primary_is_let_go_after_a_second_and_believed_in_again_when_flushed() {
        let start = Instant::now();
        let mut receiver = reporting(start);
        receiver.handle_progress(progress(300, 200, 100));
        let mut let_go_after = None;
        for tick in 0..30 {
            let now = start + UNCHANGED_REPLY_INTERVAL * tick;
            receiver.handle_keepalive(now, Some(lsn(300)), true);
            if receiver.poll_output(now) == sent(300, 0) {
                let_go_after = let_go_after.or(Some(now.duration_since(start)));
            }
        }
        assert_eq!(let_go_after, Some(PRESSED_FOR_MAX));
        let now = start + Duration::from_secs(4);
        receiver.handle_progress(progress(300, 300, 299));
        assert_eq!(receiver.poll_output(now), None, "still short of what was asked");
        receiver.handle_progress(progress(300, 300, 300));
        assert_eq!(receiver.poll_output(now), sent(300, 300));
    }

    #[test]
    fn ordinary_pings_do_not_count_as_pressing() {
        let start = Instant::now();
        let mut receiver = reporting(start);
        for ping in 1..20 {
            let now = start + Duration::from_secs(ping);
            receiver.handle_keepalive(now, Some(lsn(300)), true);
            assert_eq!(receiver.poll_output(now), sent(100, 100));
        }
    }

    #[test]
    fn a_store_that_cannot_sync_lets_a_waiting_primary_go_at_once() {
        let start = Instant::now();
        let mut receiver = reporting(start);
        receiver.handle_sync_ability(SyncAbility::Unable);
        receiver.handle_progress(progress(300, 100, 100));
        receiver.handle_keepalive(start, Some(lsn(300)), true);
        assert_eq!(receiver.poll_output(start), sent(300, 0));
    }

    #[test]
    fn a_silent_upstream_is_asked_at_half_time_then_given_up() {
        let start = Instant::now();
        let mut receiver = reporting(start);
        let (mut asked_at, mut now) = (None, start);
        let given_up_at = loop {
            now = receiver.poll_timeout().unwrap().max(now);
            match receiver.poll_output(now) {
                Some(Output::Send(report)) if report.ask_for_reply => {
                    assert_eq!(asked_at.replace(now.duration_since(start)), None, "asked once");
                }
                Some(Output::GiveUpSilent) => break now.duration_since(start),
                _ => {}
            }
        };
        assert_eq!(asked_at, Some(Duration::from_secs(30)));
        assert_eq!(given_up_at, Duration::from_secs(60));
    }

    #[test]
    fn silence_means_nothing_while_reading_is_paused() {
        let start = Instant::now();
        let mut receiver = reporting(start);
        receiver.handle_reading(start, Reading::Paused);
        let later = start + Duration::from_secs(600);
        assert_eq!(receiver.poll_output(later), sent(100, 100), "the upstream still hears from us");
        assert_eq!(receiver.poll_output(later), None);
        receiver.handle_reading(later, Reading::Open);
        assert_eq!(receiver.poll_timeout(), Some(later + SETTINGS.status_interval));
    }

    #[test]
    fn regular_updates_keep_the_status_interval() {
        let start = Instant::now();
        let mut receiver = reporting(start);
        receiver.handle_heard(start + Duration::from_secs(9));
        assert_eq!(receiver.poll_output(start + Duration::from_secs(9)), None);
        assert_eq!(receiver.poll_output(start + Duration::from_secs(10)), sent(100, 100));
    }

    #[test]
    fn what_was_lost_is_vouched_for_only_when_it_is_there_again() {
        let mut now = Instant::now();
        let mut receiver = Receiver::new(SETTINGS, progress(100, 100, 100), now);
        receiver.vouch_only_from(lsn(300));
        receiver.handle_overlap_proven();
        for (flushed, told) in [(200, None), (296, None), (304, Some(lsn(304))), (400, Some(lsn(400)))] {
            receiver.handle_progress(progress(500, 400, flushed));
            now += SETTINGS.status_interval;
            receiver.handle_heard(now);
            let Some(Output::Send(report)) = receiver.poll_output(now) else { panic!("nothing is told") };
            assert_eq!((report.write, report.flush), (Some(lsn(400)), told));
        }
    }
}
