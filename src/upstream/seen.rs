//! What a primary's view of its walsenders says of us, and of others under our name.
//!
//! Owns what is concluded from several looks: who under our name is alive, and whether we are waited for as we should be. Goes by
//! the server's clock and by what moves from look to look: times that a client tells are its own affair. Asks nobody.

use std::collections::BTreeMap;

use crate::protocol::backend::DataRow;

/// One look at `pg_stat_replication`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    /// `None`: it does not say that to our user, nor anything of what others report.
    pub(super) sync_state: Option<String>,
    /// Whether we are still sent what we missed: nobody is waited for before that is over.
    pub(super) is_catching_up: bool,
    /// The others under our name.
    pub(super) others: Vec<Other>,
}

/// Somebody else under our name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Other {
    /// Who it is, among all there ever are.
    session: String,
    /// All that it has reported, as one text.
    reported: String,
    /// Whether it came after us: then it is no session of ours that the server has not missed yet.
    is_later: bool,
}

impl View {
    /// What is asked of the server, of the stream that its process `pid` serves.
    pub(super) fn query(pid: u32) -> String {
        format!(
            "SELECT own.sync_state, own.state, other.pid || ' ' || other.backend_start, \
             pg_catalog.concat_ws(' ', other.reply_time, other.write_lsn, other.flush_lsn, other.replay_lsn), \
             other.backend_start > own.backend_start \
             FROM pg_catalog.pg_stat_replication own LEFT JOIN pg_catalog.pg_stat_replication other \
             ON other.pid <> own.pid AND pg_catalog.lower(other.application_name) = pg_catalog.lower(own.application_name) \
             WHERE own.pid = {pid}"
        )
    }

    /// What it answers; `None` when the stream is not there any more.
    pub(super) fn of(rows: &[DataRow]) -> Option<Self> {
        let first = rows.first()?;
        let other = |row: &DataRow| {
            let session = row.text(2)?.to_owned();
            let reported = row.text(3).unwrap_or_default().to_owned();
            Some(Other { session, reported, is_later: row.text(4) == Some("t") })
        };
        Some(Self {
            sync_state: first.text(0).map(str::to_owned),
            is_catching_up: first.text(1) == Some("catchup"),
            others: rows.iter().filter_map(other).collect(),
        })
    }
}

/// Whether the primary waits for a standby in this state.
pub(super) fn is_waited_for(sync_state: Option<&str>) -> bool {
    matches!(sync_state, Some("sync" | "quorum"))
}

/// The others under our name, over one stream.
#[derive(Debug, Default)]
pub(super) struct Namesakes {
    /// Those that are there, with what they had reported when they were seen first, and whether they are known to be alive.
    seen: BTreeMap<String, (String, bool)>,
}

/// What one more look tells of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Alive.
    pub(super) alive: u32,
    /// Nothing was heard of them: they may be sessions of ours that the server has not missed yet.
    pub(super) silent: u32,
    /// Whether some were seen for the first time, so that another look soon tells more.
    pub(super) is_new: bool,
}

impl Found {
    /// How many there are, when so many were known before: who has only fallen silent is still one.
    pub(super) fn count(self, before: u32) -> u32 {
        self.alive.max(before.min(self.alive + self.silent))
    }
}

impl Namesakes {
    /// Takes in who is there now.
    pub(super) fn update(&mut self, others: &[Other]) -> Found {
        self.seen.retain(|session, _| others.iter().any(|other| other.session == *session));
        let mut found = Found { alive: 0, silent: 0, is_new: false };
        for Other { session, reported, is_later } in others {
            let known = self.seen.get(session);
            found.is_new |= known.is_none() && !is_later;
            let (first, was_alive) = known.cloned().unwrap_or_else(|| (reported.clone(), false));
            let is_alive = was_alive || *is_later || first != *reported;
            *if is_alive { &mut found.alive } else { &mut found.silent } += 1;
            self.seen.insert(session.clone(), (first, is_alive));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn other(session: &str, reported: &str, is_later: bool) -> Other {
        Other { session: session.to_owned(), reported: reported.to_owned(), is_later }
    }

    fn found(alive: u32, silent: u32, is_new: bool) -> Found {
        Found { alive, silent, is_new }
    }

    #[test]
    fn who_came_later_or_reports_is_alive_and_who_is_silent_may_be_a_dead_session_of_ours() {
        let mut namesakes = Namesakes::default();
        assert_eq!(namesakes.update(&[]), found(0, 0, false));
        let dead = || other("7 yesterday", "tomorrow 0/5 0/5", false);
        assert_eq!(namesakes.update(&[dead()]), found(0, 1, true));
        assert_eq!(namesakes.update(&[dead()]), found(0, 1, false));
        let later = || other("9 today", "1 0/1", true);
        assert_eq!(namesakes.update(&[dead(), later()]), found(1, 1, false));
        // What it calls the time does not matter: it has said something.
        let moved = other("7 yesterday", "tomorrow 0/6 0/6", false);
        assert_eq!(namesakes.update(&[moved, later()]), found(2, 0, false));
        assert_eq!(namesakes.update(&[dead()]), found(1, 0, false), "it was heard once");
        assert_eq!(namesakes.update(&[]), found(0, 0, false));
        assert_eq!(namesakes.update(&[dead()]), found(0, 1, true), "its number was given out again");
    }

    #[test]
    fn who_was_known_and_is_silent_is_still_counted() {
        assert_eq!(found(0, 1, true).count(0), 0);
        assert_eq!(found(0, 1, true).count(1), 1);
        assert_eq!(found(1, 1, true).count(5), 2);
        assert_eq!(found(0, 0, false).count(3), 0);
    }
}
