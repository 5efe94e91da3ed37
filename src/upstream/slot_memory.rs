//! What this process did about its slot, server by server.
//!
//! Owns the memory by which a slot that is of no use is told from one that keeps WAL for us: slots of one name on several
//! servers have nothing to do with one another. Never lets what was learned of one server count for another. Asks no
//! server anything.

use std::collections::BTreeMap;

use crate::wal::Lsn;

/// What is remembered of the slots on all servers: as many as the connection string names.
#[derive(Debug, Default)]
pub(super) struct SlotMemory {
    servers: BTreeMap<String, Remembered>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Remembered {
    created: Option<Created>,
    /// Where the last session found or made it to keep WAL from.
    restart_lsn: Option<Lsn>,
    /// It keeps nothing that we need, as long as it keeps WAL from there.
    useless: Option<Useless>,
    /// None is created while our end is this: the WAL that follows is gone there.
    in_vain_at: Option<Lsn>,
    is_free_of_feedback: bool,
}

/// A slot that was made here, and by which nothing was acknowledged.
#[derive(Clone, Copy, Debug)]
struct Created {
    /// Our end then; `None`: nothing was held.
    held_end: Option<Lsn>,
    /// Where it kept WAL from; `None` where the server does not tell it.
    restart_lsn: Option<Lsn>,
}

/// A slot to drop, known by where it keeps WAL from, so that no other of its name is taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Useless {
    /// `None`: from nowhere, or the server does not tell it.
    pub(super) restart_lsn: Option<Lsn>,
}

impl SlotMemory {
    /// The slot was created at this server.
    pub(super) fn note_created(&mut self, server: &str, held_end: Option<Lsn>, restart_lsn: Option<Lsn>) {
        let created = Some(Created { held_end, restart_lsn });
        let remembered = self.of(server);
        *remembered = Remembered { created, restart_lsn, useless: None, ..*remembered };
    }

    /// The slot was there. Whether it is the one that was created here and by which nothing was acknowledged: an earlier
    /// session made it and got no further.
    pub(super) fn note_found(
        &mut self,
        server: &str,
        held_end: Option<Lsn>,
        restart_lsn: Option<Lsn>,
    ) -> bool {
        let remembered = self.of(server);
        let is_ours = remembered.created.is_some_and(|created| match (created.restart_lsn, restart_lsn) {
            (None, None) => held_end.is_some() && created.held_end == held_end,
            (created, found) => created == found,
        });
        let created = is_ours.then_some(Created { held_end, restart_lsn });
        *remembered = Remembered { created, restart_lsn, ..*remembered };
        is_ours
    }

    /// No slot is used there, or none that is known of.
    pub(super) fn note_none(&mut self, server: &str) {
        let remembered = self.of(server);
        (remembered.created, remembered.restart_lsn) = (None, None);
    }

    /// Whether the slot there was created when our end was this, and nothing was acknowledged by it.
    pub(super) fn was_created_at(&self, server: &str, held_end: Option<Lsn>) -> bool {
        let created = self.servers.get(server).and_then(|remembered| remembered.created);
        created.is_some_and(|created| created.held_end == held_end)
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

    #[test]
    fn what_was_made_in_vain_on_one_server_says_nothing_of_another() {
        let mut memory = SlotMemory::default();
        assert!(!memory.note_found("a", at(500), at(400)), "it was there before this process");
        memory.note_created("b", at(500), at(900));
        assert!(memory.was_created_at("b", at(500)) && !memory.was_created_at("a", at(500)));
        memory.note_in_vain("b", at(500));
        assert_eq!(
            (memory.useless("a"), memory.useless("b")),
            (None, Some(Useless { restart_lsn: at(900) }))
        );
        assert!(
            !memory.note_found("a", at(500), at(700)),
            "ours is on the other one: this one is ahead of us"
        );
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
        assert!(memory.note_found("a", at(600), at(400)), "nothing was acknowledged by it");
        assert!(memory.was_created_at("a", at(600)));
        assert!(!memory.note_found("a", at(600), at(450)));
        assert!(!memory.note_found("a", at(600), at(400)), "it was another one in between");
        // Where the server does not tell, our own end must do.
        memory.note_created("old", at(500), None);
        assert!(memory.note_found("old", at(500), None));
        assert!(!memory.note_found("old", at(501), None));
        memory.note_created("old", None, None);
        assert!(!memory.note_found("old", None, None));
        memory.note_created("a", at(600), at(400));
        memory.note_none("a");
        assert!(!memory.was_created_at("a", at(600)));
    }
}
