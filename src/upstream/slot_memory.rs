//! What this process did about its slot, server by server.
//!
//! Owns the memory by which a slot that is of no use is told from one that keeps WAL for us, and one that was made anew from one
//! by which more was acknowledged than is held: slots of one name on several servers have nothing to do with one another.
//! Never lets what was learned of one server count for another. Asks no server anything.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::wal::{Lsn, LsnRange};

/// What is remembered of the slots on all servers: as many as the connection string names.
#[derive(Debug, Default)]
pub(super) struct SlotMemory {
    servers: BTreeMap<String, Remembered>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Remembered {
    created: Option<Created>,
    /// That was by an earlier process, in whose time the slot may have been used for anything but to acknowledge that WAL.
    is_made_earlier: bool,
    /// Where the last session found or made it to keep WAL from.
    restart_lsn: Option<Lsn>,
    /// It keeps nothing that we need, as long as it keeps WAL from there.
    useless: Option<Useless>,
    /// None is created while our end is this: the WAL that follows is gone there.
    in_vain_at: Option<Lsn>,
    is_free_of_feedback: bool,
    /// As long as it is there it tells of WAL that was set aside here, and of no other.
    set_aside: Option<Lsn>,
    /// All that was ever acknowledged by a slot there is held: this process has seen one that was not ahead, or made it.
    is_all_held: bool,
}

/// A slot that was made here, and by which nothing was acknowledged of the WAL that it was made to keep.
#[derive(Clone, Copy, Debug)]
struct Created {
    /// Our end then; `None`: nothing was held.
    held_end: Option<Lsn>,
    kept_from: KeptFrom,
}

/// From where on a slot was made to keep WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeptFrom {
    At(Lsn),
    /// The server does not tell it.
    NotTold,
    /// It was asked for, and the answer was not heard.
    NotHeard,
}

/// A slot to drop, known by where it keeps WAL from, so that no other of its name is taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Useless {
    /// `None`: from nowhere, or the server does not tell it.
    pub(super) restart_lsn: Option<Lsn>,
}

/// What a slot is that was found at a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recognized {
    /// An earlier session made it and got no further: nothing was acknowledged by it.
    Ours,
    /// It is ahead of us, although all that was acknowledged by the one before is held: somebody else has made it, or moved it.
    MadeAnew,
    /// It was there, with whatever was acknowledged by it.
    Used,
}

/// A slot that is made beside a stream, which may end at any time; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct MadeBeside(Arc<Mutex<Option<KeptFrom>>>);

impl MadeBeside {
    /// It is being made, or is there; `None`: it could not be made.
    pub(super) fn note(&self, made: Option<KeptFrom>) {
        *self.0.lock() = made;
    }

    /// The upstream has it there. Beyond what is durable here it is as it was made; up to there it is like any other.
    pub(super) fn note_reached(&self, reached: Lsn, durable: Lsn) {
        let mut made = self.0.lock();
        *made = made.take().filter(|_| reached > durable).map(|_| KeptFrom::At(reached));
    }

    /// What was made and has not been moved since.
    pub(super) fn take(&self) -> Option<KeptFrom> {
        self.0.lock().take()
    }
}

impl Created {
    /// Whether a slot that keeps WAL from there is still this one, and nothing was acknowledged by it of what it was made to keep.
    fn is(self, held_end: Option<Lsn>, found: Option<Lsn>) -> bool {
        match (self.kept_from, found) {
            // What is reported moves it, also back to our end.
            (KeptFrom::At(from), Some(found)) => {
                found == from || (found < from && self.is_ahead(held_end) && Some(found) <= held_end)
            }
            (KeptFrom::NotHeard, Some(_)) => true,
            (KeptFrom::NotTold, Some(_)) => false,
            // Where the server does not tell, our own end must do.
            (_, None) => held_end.is_some() && (self.held_end == held_end || self.is_ahead(held_end)),
        }
    }

    /// Whether it never kept what follows our end.
    fn is_ahead(self, held_end: Option<Lsn>) -> bool {
        matches!(self.kept_from, KeptFrom::At(from) if held_end < Some(from))
    }
}

impl SlotMemory {
    /// What an earlier process made, with nothing acknowledged by it, and what it found to tell of WAL that was set aside.
    pub(super) fn recall(
        made_ahead: &BTreeMap<String, Option<Lsn>>,
        set_aside: &BTreeMap<String, Lsn>,
    ) -> Self {
        let remembered = |kept_from: Option<Lsn>| Remembered {
            created: Some(Created {
                held_end: None,
                kept_from: kept_from.map_or(KeptFrom::NotHeard, KeptFrom::At),
            }),
            restart_lsn: kept_from,
            is_made_earlier: true,
            ..Remembered::default()
        };
        let servers = made_ahead.iter().map(|(server, kept_from)| (server.clone(), remembered(*kept_from)));
        let mut memory = Self { servers: servers.collect() };
        for (server, at) in set_aside {
            memory.of(server).set_aside = Some(*at);
        }
        memory
    }

    /// Where slots are that tell of WAL that was set aside: a later process must know it, too.
    pub(super) fn set_aside(&self) -> BTreeMap<String, Lsn> {
        let servers = self.servers.iter();
        servers.filter_map(|(server, remembered)| Some((server.clone(), remembered.set_aside?))).collect()
    }

    /// What a later process must know: else it would take a slot that is ahead of us for one by which WAL was acknowledged.
    pub(super) fn made_ahead(&self, held_end: Option<Lsn>) -> BTreeMap<String, Option<Lsn>> {
        let made = self.servers.iter().filter_map(|(server, remembered)| {
            let kept_from = match remembered.created?.kept_from {
                KeptFrom::At(from) => Some(from).filter(|from| held_end < Some(*from)).map(Some),
                KeptFrom::NotHeard => Some(None),
                KeptFrom::NotTold => None,
            };
            Some((server.clone(), kept_from?))
        });
        made.collect()
    }

    /// The slot was created at this server.
    pub(super) fn note_created(&mut self, server: &str, held_end: Option<Lsn>, restart_lsn: Option<Lsn>) {
        self.note_made(server, held_end, restart_lsn.map_or(KeptFrom::NotTold, KeptFrom::At));
    }

    /// The same of one that was made beside the stream that has ended there.
    pub(super) fn note_made(&mut self, server: &str, held_end: Option<Lsn>, kept_from: KeptFrom) {
        let created = Some(Created { held_end, kept_from });
        let restart_lsn = match kept_from {
            KeptFrom::At(from) => Some(from),
            KeptFrom::NotTold | KeptFrom::NotHeard => None,
        };
        let (is_made_earlier, useless, is_all_held) = (false, None, true);
        let remembered = self.of(server);
        *remembered =
            Remembered { created, is_made_earlier, restart_lsn, useless, is_all_held, ..*remembered };
    }

    /// The slot was there.
    pub(super) fn note_found(
        &mut self,
        server: &str,
        held_end: Option<Lsn>,
        restart_lsn: Option<Lsn>,
    ) -> Recognized {
        let remembered = self.of(server);
        let ours = remembered.created.filter(|created| created.is(held_end, restart_lsn));
        let created = ours.map(|created| match (created.kept_from, restart_lsn) {
            (KeptFrom::NotHeard, Some(from)) => Created { held_end, kept_from: KeptFrom::At(from) },
            (kept_from, _) => Created { held_end, kept_from },
        });
        let is_ahead = restart_lsn > held_end;
        let recognized = match created {
            Some(_) => Recognized::Ours,
            None if is_ahead && remembered.is_all_held => Recognized::MadeAnew,
            None => Recognized::Used,
        };
        let is_all_held = remembered.is_all_held || (restart_lsn.is_some() && !is_ahead);
        *remembered = Remembered { created, restart_lsn, is_all_held, ..*remembered };
        recognized
    }

    /// Whether the slot that was found there tells of WAL that was set aside: so it does if it is on one of these branches while
    /// nothing is held yet of what came in its place, and as long as it has not moved since. Later it may be there because of
    /// what was acknowledged of that.
    pub(super) fn note_set_aside(
        &mut self,
        server: &str,
        held_end: Option<Lsn>,
        found: Option<Lsn>,
        branches: &[LsnRange],
    ) -> bool {
        let is_beyond = |branch: &LsnRange, at: Lsn| branch.start() < at && at <= branch.end();
        let mut left_now = branches.iter().filter(|branch| held_end == Some(branch.start()));
        let remembered = self.of(server);
        let known = remembered.set_aside;
        let is_aside = |at: &Lsn| known == Some(*at) || left_now.any(|branch| is_beyond(branch, *at));
        remembered.set_aside = found.filter(is_aside);
        remembered.set_aside.is_some()
    }

    /// No slot is used there, or none that is known of.
    pub(super) fn note_none(&mut self, server: &str) {
        let remembered = self.of(server);
        (remembered.created, remembered.restart_lsn) = (None, None);
    }

    /// Whether the slot there was made here when our end was this, or keeps WAL only from beyond it, so that it is of no use if
    /// what follows our end is gone.
    pub(super) fn was_created_at(&self, server: &str, held_end: Option<Lsn>) -> bool {
        let created = self.servers.get(server).and_then(|remembered| remembered.created);
        created.is_some_and(|created| created.held_end == held_end || created.is_ahead(held_end))
    }

    /// What follows our end is gone there: the slot is to be dropped, and none is created as long as our end is this.
    pub(super) fn note_in_vain(&mut self, server: &str, held_end: Option<Lsn>) {
        self.note_useless(server);
        self.of(server).in_vain_at = held_end;
    }

    /// The slot that the last session used there keeps nothing that we need.
    pub(super) fn note_useless(&mut self, server: &str) {
        let remembered = self.of(server);
        remembered.useless = Some(Useless { restart_lsn: remembered.restart_lsn });
    }

    /// The slot to drop there.
    pub(super) fn useless(&self, server: &str) -> Option<Useless> {
        self.servers.get(server).and_then(|remembered| remembered.useless)
    }

    /// The same, if it was created in vain: it keeps WAL for nobody, which an invalid one does not.
    pub(super) fn made_in_vain(&self, server: &str) -> Option<Useless> {
        let remembered = self.servers.get(server)?;
        remembered.useless.filter(|_| remembered.in_vain_at.is_some())
    }

    /// Whether an earlier process made the slot there: what standbys read then may be held back by it still.
    pub(super) fn was_made_earlier(&self, server: &str) -> bool {
        self.servers.get(server).is_some_and(|remembered| remembered.is_made_earlier)
    }

    /// Whether it is known that no standby's transactions are held back there by what an earlier process said.
    pub(super) fn is_free_of_feedback(&self, server: &str) -> bool {
        self.servers.get(server).is_some_and(|remembered| remembered.is_free_of_feedback)
    }

    /// That was taken back, and nothing of the kind is said by the slot any more.
    pub(super) fn note_free_of_feedback(&mut self, server: &str) {
        self.of(server).is_free_of_feedback = true;
    }

    /// It was dropped, or is another one by now.
    pub(super) fn forget_useless(&mut self, server: &str) {
        self.of(server).useless = None;
    }

    /// Whether a slot there would be created in vain again.
    pub(super) fn is_in_vain(&self, server: &str, held_end: Option<Lsn>) -> bool {
        let in_vain_at = self.servers.get(server).and_then(|remembered| remembered.in_vain_at);
        in_vain_at.is_some() && in_vain_at == held_end
    }

    fn of(&mut self, server: &str) -> &mut Remembered {
        self.servers.entry(server.to_owned()).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(raw: u64) -> Option<Lsn> {
        Lsn::new(raw)
    }

    fn lsn(raw: u64) -> Lsn {
        Lsn::new(raw).unwrap()
    }

    #[test]
    fn what_was_made_in_vain_on_one_server_says_nothing_of_another() {
        let mut memory = SlotMemory::default();
        assert_eq!(memory.note_found("a", at(500), at(400)), Recognized::Used, "before this process");
        memory.note_created("b", at(500), at(900));
        assert!(memory.was_created_at("b", at(500)) && !memory.was_created_at("a", at(500)));
        memory.note_in_vain("b", at(500));
        assert_eq!(
            (memory.useless("a"), memory.useless("b")),
            (None, Some(Useless { restart_lsn: at(900) }))
        );
        assert_eq!(memory.note_found("c", at(500), at(900)), Recognized::Used, "ours is on the other one");
        assert_eq!((memory.made_in_vain("a"), memory.made_in_vain("b")), (None, memory.useless("b")));
        assert!(memory.is_in_vain("b", at(500)) && !memory.is_in_vain("a", at(500)));
        assert!(!memory.is_in_vain("b", at(501)), "there is more to ask for");
        memory.forget_useless("b");
        assert_eq!(memory.useless("b"), None);
        assert!(memory.is_in_vain("b", at(500)));
    }

    #[test]
    fn what_was_created_here_stays_ours_until_it_has_moved() {
        let mut memory = SlotMemory::default();
        memory.note_created("a", at(500), at(400));
        assert_eq!(memory.note_found("a", at(600), at(400)), Recognized::Ours);
        assert!(memory.was_created_at("a", at(600)));
        assert_eq!(memory.note_found("a", at(600), at(450)), Recognized::Used);
        let again = memory.note_found("a", at(600), at(400));
        assert_eq!(again, Recognized::Used, "it was another one in between");
        // Where the server does not tell, our own end must do.
        memory.note_created("old", at(500), None);
        assert_eq!(memory.note_found("old", at(500), None), Recognized::Ours);
        assert_eq!(memory.note_found("old", at(501), None), Recognized::Used);
        memory.note_created("old", None, None);
        assert_eq!(memory.note_found("old", None, None), Recognized::Used);
        memory.note_created("a", at(600), at(400));
        memory.note_none("a");
        assert!(!memory.was_created_at("a", at(600)));
    }

    #[test]
    fn a_slot_that_was_made_ahead_of_us_is_ours_until_we_have_come_so_far() {
        let mut memory = SlotMemory::default();
        memory.note_created("a", at(500), at(900));
        assert!(memory.was_created_at("a", at(700)), "what follows our end was never kept");
        assert_eq!(memory.note_found("a", at(700), at(700)), Recognized::Ours, "reports move it back");
        assert!(memory.was_created_at("a", at(700)));
        memory.note_in_vain("a", at(700));
        assert_eq!(memory.useless("a"), Some(Useless { restart_lsn: at(700) }));
        assert_eq!(memory.note_found("a", at(900), at(899)), Recognized::Used, "it has done what it could");
        assert!(!memory.was_created_at("a", at(901)));
    }

    #[test]
    fn what_was_made_beside_a_stream_is_ours_as_far_as_it_was_heard_of() {
        let mut memory = SlotMemory::default();
        memory.note_made("a", at(500), KeptFrom::At(lsn(900)));
        assert!(memory.was_created_at("a", at(500)) && memory.was_created_at("a", at(600)));
        assert_eq!(memory.note_found("a", at(600), at(900)), Recognized::Ours);
        memory.note_in_vain("a", at(600));
        assert_eq!(memory.made_in_vain("a"), Some(Useless { restart_lsn: at(900) }));
        // The stream had ended before the server said where it is.
        memory.note_made("b", at(500), KeptFrom::NotHeard);
        assert_eq!(memory.note_found("b", at(500), at(900)), Recognized::Ours);
        assert!(memory.was_created_at("b", at(600)), "it keeps WAL from where it was found");
        // Servers that tell nothing on the connection that streams.
        memory.note_made("old", at(500), KeptFrom::At(lsn(900)));
        assert_eq!(memory.note_found("old", at(600), None), Recognized::Ours);
        assert_eq!(memory.note_found("old", at(900), None), Recognized::Used);
    }

    #[test]
    fn a_later_process_knows_what_was_made_ahead_and_nothing_else() {
        let mut memory = SlotMemory::default();
        memory.note_created("ahead", at(500), at(900));
        memory.note_created("not ahead", at(500), at(400));
        memory.note_created("not told", at(500), None);
        memory.note_made("not heard", at(500), KeptFrom::NotHeard);
        let known = [("ahead".to_owned(), at(900)), ("not heard".to_owned(), None)].into();
        assert_eq!(memory.made_ahead(at(500)), known);
        let mut later = SlotMemory::recall(&known, &BTreeMap::new());
        assert_eq!(later.made_ahead(at(500)), known, "no server was asked yet");
        assert_eq!(later.note_found("ahead", at(500), at(900)), Recognized::Ours);
        assert!(later.was_created_at("ahead", at(500)));
        assert!(later.was_made_earlier("ahead") && !later.was_made_earlier("not ahead"));
        later.note_created("ahead", at(500), at(900));
        assert!(!later.was_made_earlier("ahead"), "by this one");
        assert_eq!(later.note_found("not heard", at(500), at(900)), Recognized::Ours);
        assert_eq!(later.note_found("not ahead", at(500), at(900)), Recognized::Used);
        assert!(later.made_ahead(at(900)).is_empty(), "we have come so far");
        // What was reported by it since, and is not held, has been lost.
        let mut later = SlotMemory::recall(&known, &BTreeMap::new());
        assert_eq!(later.note_found("ahead", at(500), at(600)), Recognized::Used);
        assert_eq!(later.note_found("ahead", at(500), at(901)), Recognized::Used);
    }

    #[test]
    fn a_slot_tells_of_what_was_set_aside_as_long_as_it_has_not_moved_since_the_fork() {
        let branches = [LsnRange::new(lsn(500), lsn(900)).unwrap()];
        let mut memory = SlotMemory::default();
        let mut tell = |held_end, found| memory.note_set_aside("a", at(held_end), at(found), &branches);
        assert!(!tell(400, 800) && !tell(500, 500) && !tell(500, 901));
        assert!(!tell(600, 800), "WAL of the new timeline may have been acknowledged");
        assert!(tell(500, 800) && tell(600, 800), "it has not moved");
        assert!(!tell(600, 700) && !tell(600, 800), "it has");
        assert!(tell(500, 900));
        let known = memory.set_aside();
        assert_eq!(known, [("a".to_owned(), lsn(900))].into());
        let mut later = SlotMemory::recall(&BTreeMap::new(), &known);
        assert!(later.note_set_aside("a", at(600), at(900), &branches));
        assert!(!later.note_set_aside("b", at(600), at(900), &branches), "of another server");
        assert!(!later.note_set_aside("a", at(600), None, &branches) && later.set_aside().is_empty());
    }

    #[test]
    fn a_slot_ahead_of_us_tells_of_a_loss_only_as_long_as_none_was_seen_that_was_not() {
        let mut memory = SlotMemory::default();
        assert_eq!(memory.note_found("a", at(500), at(900)), Recognized::Used);
        assert_eq!(memory.note_found("a", at(500), at(900)), Recognized::Used);
        assert_eq!(memory.note_found("a", at(900), at(900)), Recognized::Used, "what was lost is back");
        assert_eq!(memory.note_found("a", at(900), at(950)), Recognized::MadeAnew);
        assert_eq!(memory.note_found("b", at(900), at(950)), Recognized::Used, "of another server");
        memory.note_created("c", at(900), at(800));
        memory.note_none("c");
        assert_eq!(memory.note_found("c", at(900), at(950)), Recognized::MadeAnew);
    }

    #[test]
    fn what_was_made_beside_a_stream_is_like_any_other_once_it_is_where_wal_is_durable() {
        let made = MadeBeside::default();
        made.note_reached(lsn(900), lsn(500));
        assert_eq!(made.take(), None, "it was not made here");
        made.note(Some(KeptFrom::NotHeard));
        made.note_reached(lsn(900), lsn(500));
        assert_eq!(made.clone().take(), Some(KeptFrom::At(lsn(900))));
        made.note(Some(KeptFrom::At(lsn(900))));
        made.note_reached(lsn(900), lsn(900));
        assert_eq!(made.take(), None);
        made.note(Some(KeptFrom::NotHeard));
        made.note(None);
        assert_eq!(made.take(), None);
    }
}
