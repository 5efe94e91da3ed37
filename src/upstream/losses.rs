//! WAL that was acknowledged and has been lost here, from session to session.
//!
//! Owns the memory of it. What a slot has told once stays told, also when the slot is made anew or another server is followed:
//! until that WAL is durable here again, or a timeline goes on without it, which is told instead. Asks no server anything.

use crate::status::LostWal;
use crate::wal::Lsn;

#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Until it is durable here again.
    lost: Option<LostWal>,
    /// What no server has any more that may be followed.
    gone: Option<LostWal>,
}

impl Losses {
    /// An earlier process was told that WAL up to there was acknowledged, and is not held.
    pub(super) fn recall(lost_to: Option<Lsn>, durable: Option<Lsn>) -> Self {
        let lost = durable.zip(lost_to).filter(|(durable, to)| to > durable);
        Self { lost: lost.map(|(from, to)| LostWal { from, to }), gone: None }
    }

    /// What is lost and may come back.
    pub(super) fn lost(&self) -> Option<LostWal> {
        self.lost
    }

    /// A stream begins when WAL is durable here up to `durable`, and the slot tells this. Returns what is lost.
    pub(super) fn begin(&mut self, durable: Lsn, told: Option<Lsn>) -> Option<LostWal> {
        let is_gone = |to: Lsn| self.gone.is_some_and(|gone| gone.from < to && to <= gone.to);
        let known = self.lost.map(|lost| lost.to);
        let to = told.filter(|to| !is_gone(*to)).max(known).filter(|to| *to > durable);
        self.lost = to.map(|to| LostWal { from: durable, to });
        self.lost
    }

    /// What is gone if a timeline is followed that left ours at `fork`.
    pub(super) fn beyond(&self, fork: Lsn) -> Option<LostWal> {
        let lost = self.lost.filter(|lost| lost.to > fork)?;
        Some(LostWal { from: lost.from.max(fork), to: lost.to })
    }

    /// It is followed. Returns what is gone with that.
    pub(super) fn cut(&mut self, fork: Lsn) -> Option<LostWal> {
        let gone = self.beyond(fork)?;
        let rest = self.lost.filter(|lost| lost.from < fork);
        self.lost = rest.map(|lost| LostWal { from: lost.from, to: fork });
        self.gone = Some(gone);
        self.gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lsn(raw: u64) -> Lsn {
        Lsn::new(raw).unwrap()
    }

    fn range(from: u64, to: u64) -> Option<LostWal> {
        Some(LostWal { from: lsn(from), to: lsn(to) })
    }

    #[test]
    fn what_was_lost_stays_told_until_it_is_durable_again_whatever_slots_say_meanwhile() {
        let mut losses = Losses::default();
        assert_eq!(losses.begin(lsn(500), None), None);
        assert_eq!(losses.begin(lsn(500), Some(lsn(900))), range(500, 900));
        assert_eq!(losses.begin(lsn(500), None), range(500, 900), "the slot was made anew");
        assert_eq!(losses.begin(lsn(600), Some(lsn(700))), range(600, 900), "another server");
        assert_eq!(losses.begin(lsn(600), Some(lsn(950))), range(600, 950));
        assert_eq!(losses.begin(lsn(950), None), None);
        assert_eq!(losses.begin(lsn(940), None), None, "it was back");
    }

    #[test]
    fn a_later_process_tells_it_until_it_is_durable() {
        assert_eq!(Losses::recall(Some(lsn(900)), Some(lsn(500))).lost(), range(500, 900));
        for (lost_to, durable) in
            [(None, Some(lsn(500))), (Some(lsn(900)), None), (Some(lsn(900)), Some(lsn(900)))]
        {
            assert_eq!(Losses::recall(lost_to, durable).lost(), None);
        }
    }

    #[test]
    fn what_a_timeline_goes_on_without_is_gone() {
        let mut losses = Losses::default();
        assert_eq!(losses.cut(lsn(400)), None);
        losses.begin(lsn(500), Some(lsn(900)));
        assert_eq!(losses.cut(lsn(900)), None, "all of it is on the new one, too");
        assert_eq!(losses.cut(lsn(800)), range(800, 900));
        assert_eq!(losses.begin(lsn(600), None), range(600, 800));
        assert_eq!(losses.begin(lsn(800), Some(lsn(900))), None, "a slot that knows of nothing newer");
        assert_eq!(losses.begin(lsn(800), Some(lsn(901))), range(800, 901));
        assert_eq!(losses.cut(lsn(700)), range(800, 901));
        assert_eq!(losses.begin(lsn(700), None), None);
    }
}
