//! What a session's end means for the next.
//!
//! Owns the judgement: what is remembered, what is told, and how long to wait. Asks no server anything.

use std::time::{Duration, Instant};

use crate::status::WalReceiverState;
use crate::store::AppendError;
use crate::upstream::connect::Beginning;
use crate::upstream::course::Course;
use crate::upstream::walreceiver::StreamEnd;
use crate::upstream::{Advice, Upstream, UpstreamError, random};

impl Upstream {
    /// Logs how a session ended, and says how long to wait before the next.
    pub(super) fn judge(&self, outcome: Result<StreamEnd, UpstreamError>, course: &mut Course) -> Duration {
        let error = match outcome {
            Ok(StreamEnd::StopRequested) => return Duration::ZERO,
            Ok(StreamEnd::LinkDue) => {
                tracing::info!("WAL was plain for long enough: a compressed link is asked for again");
                return Duration::ZERO;
            }
            Ok(end) => {
                tracing::info!(?end, "stream from upstream ended");
                self.status.send_modify(|status| {
                    status.state = WalReceiverState::Waiting;
                    status.is_writable = false;
                    status.last_error = Some(format!("stream ended: {end:?}"));
                });
                return course.backoff.next_delay(Advice::Retry, random());
            }
            Err(error) => error,
        };
        self.metrics.errors.increment(1);
        if error.speaks_against_the_server() {
            course.avoid.clone_from(&course.host);
        }
        let is_corrupt = matches!(error, UpstreamError::Append(AppendError::Corrupt(_)));
        if is_corrupt {
            self.metrics.corrupt.increment(1);
            course.note_corrupt();
        }
        if error.is_of_the_link(course.on_link) {
            self.link_metrics.errors.increment(1);
            self.settings.link.distrust(course, Instant::now());
        }
        let is_removed = matches!(error, UpstreamError::WalRemoved { .. });
        if let Some(start) = course.fallback_after.take().filter(|_| is_removed) {
            course.refused = course.held_end.map(|held_end| (held_end, start));
            return Duration::ZERO;
        }
        if is_removed && self.writer.holds_nothing() {
            tracing::warn!(error = %error.chain(), "nothing is held yet: beginning where the upstream is now");
            course.beginning = Beginning::Anew;
            return course.backoff.next_delay(Advice::RetryLater, random());
        }
        if is_removed || matches!(error, UpstreamError::SlotGone(_)) {
            self.tell_removed(course);
        }
        if let Some(delay) = self.judge_slot(&error, course) {
            return delay;
        }
        let (mut advice, mut text) = (course.advice(&error), error.chain());
        if is_corrupt && course.has_only_corrupt() {
            advice = Advice::TellAHuman;
            text.push_str("; it is the same each time it is sent");
        }
        course.unfollowed.note_ended(Instant::now(), advice);
        let needs_a_person = advice == Advice::TellAHuman || error.needs_a_person();
        if course.is_news(advice, &text) {
            if needs_a_person {
                tracing::error!(error = %text, "cannot follow the upstream");
            } else {
                tracing::warn!(error = %text, "upstream session failed");
            }
        }
        self.status.send_modify(|status| {
            status.state = WalReceiverState::Waiting;
            status.is_writable = false;
            status.cannot_follow = needs_a_person;
            status.needs_attention = status.is_hurt();
            self.metrics.needs_attention.set(f64::from(u8::from(status.needs_attention)));
            status.last_error = Some(text);
        });
        course.backoff.next_delay(advice, random())
    }

    /// How long to wait, if all that is wrong is the slot at that server, which is to be dropped there.
    fn judge_slot(&self, error: &UpstreamError, course: &mut Course) -> Option<Duration> {
        let (server, held_end) = (course.host.as_deref()?, self.held_end());
        let is_new = course.slots.was_created_at(server, held_end);
        match error {
            UpstreamError::WalRemoved { .. } if is_new => {
                course.slots.note_in_vain(server, held_end);
                Some(Duration::ZERO)
            }
            UpstreamError::SlotInvalidated { .. } if self.settings.create_slot && !is_new => {
                // What it kept may be there still. If not, that shows when the next one is used.
                tracing::warn!(error = %error.chain(), "the replication slot is made again");
                course.slots.note_useless(server);
                Some(course.backoff.next_delay(Advice::RetryLater, random()))
            }
            _ => None,
        }
    }
}
