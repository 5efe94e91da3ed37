//! Servers that answer and are not followed.
//!
//! Owns which of them a slot of ours may burden for nothing. A server that could not be asked is none of them: it may be the one
//! that is followed next, and what the slot keeps there is what we need. Asks nobody.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::upstream::Advice;

#[derive(Debug, Default)]
pub(super) struct Unfollowed {
    /// Since when each is taken to be one.
    servers: BTreeMap<String, Instant>,
    /// The one that passed all checks in this attempt.
    reached: Option<String>,
}

impl Unfollowed {
    /// An attempt has asked all servers that it wanted to ask: these are not followed, and what is to be done about that; the last
    /// may be.
    pub(super) fn note_asked(
        &mut self,
        now: Instant,
        set_aside: &[(String, Advice)],
        reached: Option<String>,
    ) {
        let before = std::mem::take(&mut self.servers);
        for (server, advice) in set_aside.iter().filter(|(server, _)| reached.as_ref() != Some(server)) {
            let from = now + grace(*advice);
            let from = before.get(server).map_or(from, |known| from.min(*known));
            self.servers.entry(server.clone()).and_modify(|known| *known = from.min(*known)).or_insert(from);
        }
        self.reached = reached;
    }

    /// What the attempt came to at the server that it reached.
    pub(super) fn note_ended(&mut self, now: Instant, advice: Advice) {
        if let Some(server) = self.reached.take().filter(|_| advice == Advice::TellAHuman) {
            self.servers.insert(server, now);
        }
    }

    /// WAL is taken.
    pub(super) fn note_streaming(&mut self) {
        self.servers.clear();
    }

    /// Those of which it is certain enough.
    pub(super) fn servers(&self, now: Instant) -> Vec<String> {
        self.servers.iter().filter(|(_, from)| **from <= now).map(|(server, _)| server.clone()).collect()
    }
}

/// How long it may be in passing: a server may be late, or in the middle of a switchover.
fn grace(advice: Advice) -> Duration {
    match advice {
        Advice::TellAHuman => Duration::ZERO,
        Advice::Retry | Advice::RetryLater => PASSING_TIME_MAX,
    }
}

/// Time for which a server may not be good enough before that is taken to last.
const PASSING_TIME_MAX: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_unfollowed_when_it_was_asked_and_that_is_not_in_passing() {
        let mut unfollowed = Unfollowed::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let stale = || ("stale".to_owned(), Advice::TellAHuman);
        let demoted = || ("demoted".to_owned(), Advice::RetryLater);
        unfollowed.note_asked(start, &[stale(), demoted()], None);
        unfollowed.note_ended(start, Advice::RetryLater);
        assert_eq!(unfollowed.servers(start), ["stale"]);
        unfollowed.note_asked(after(20), &[stale(), demoted()], None);
        assert_eq!(unfollowed.servers(after(29)), ["stale"]);
        assert_eq!(unfollowed.servers(after(30)), ["demoted", "stale"]);
        // One that could not be asked this time may be followed the next.
        unfollowed.note_asked(after(40), &[demoted()], None);
        assert_eq!(unfollowed.servers(after(40)), ["demoted"]);
        unfollowed.note_asked(after(50), &[], None);
        unfollowed.note_asked(after(60), &[demoted()], None);
        assert!(unfollowed.servers(after(89)).is_empty());
        unfollowed.note_streaming();
        assert!(unfollowed.servers(after(200)).is_empty());
    }

    #[test]
    fn a_server_that_passes_all_checks_and_then_will_not_do_is_unfollowed_once_a_person_is_needed() {
        let mut unfollowed = Unfollowed::default();
        let now = Instant::now();
        // Asked twice: not as a standby, and then as whatever it is.
        let set_aside = [("a".to_owned(), Advice::RetryLater), ("b".to_owned(), Advice::TellAHuman)];
        unfollowed.note_asked(now, &set_aside, Some("a".to_owned()));
        unfollowed.note_ended(now, Advice::Retry);
        assert_eq!(unfollowed.servers(now + PASSING_TIME_MAX), ["b"]);
        unfollowed.note_asked(now, &set_aside, Some("a".to_owned()));
        unfollowed.note_ended(now, Advice::TellAHuman);
        assert_eq!(unfollowed.servers(now), ["a", "b"]);
        unfollowed.note_asked(now, &[], None);
        unfollowed.note_ended(now, Advice::TellAHuman);
        assert!(unfollowed.servers(now).is_empty(), "no server was asked");
    }
}
