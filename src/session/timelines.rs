//! Whom to follow: what is held, against the history of a server's timeline.
//!
//! Owns the decision, made on every connect. Never lets a server that is behind, or of another family, be followed, and
//! never calls it harmless when what is held goes beyond the place where a timeline was left. Does nothing itself.

use crate::wal::{Lineage, Lsn, TimelineHistory, TimelineId};

/// What to do with a server that may be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// It is on the timeline that is held.
    Same,
    /// It has left that timeline further on: what is missing up to there comes first.
    Finish(Fork),
    /// All up to the fork is held, and nothing beyond: the next timeline follows.
    Follow(Fork),
    /// What is held goes beyond the fork: that part is on a branch which this server's history does not have.
    Diverged(Fork),
}

/// Where the timeline that is held was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fork {
    /// The timeline that goes on; the server may be on a later one.
    pub next: TimelineId,
    /// Where.
    pub at: Lsn,
}

/// Why a server must not be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It has not seen a promotion that this relay has followed.
    #[error("highest timeline {upstream} of the upstream is behind timeline {held} of this relay")]
    Behind {
        /// The timeline that is held.
        held: TimelineId,
        /// The server's.
        upstream: TimelineId,
    },
    /// Its history does not go through the timeline that is held.
    #[error("timeline {upstream} of the upstream is not a child of timeline {held} of this relay")]
    NotAChild {
        /// The timeline that is held.
        held: TimelineId,
        /// The server's.
        upstream: TimelineId,
    },
    /// A number stands for two timelines: two servers were promoted without knowing of each other.
    #[error("timeline {0} of the upstream has another history than timeline {0} of this relay")]
    OtherHistory(TimelineId),
}

/// Compares `held`, whose WAL ends at `end`, with a server's history.
pub fn route(held: &Lineage, end: Lsn, upstream: &TimelineHistory) -> Result<Route, Refusal> {
    let (ours, theirs) = (held.timeline(), upstream.timeline());
    if theirs < ours {
        return Err(Refusal::Behind { held: ours, upstream: theirs });
    }
    // Of what was before the oldest timeline that is known here there is no history: it cannot be compared.
    let oldest = held.ancestors().first().map_or(ours, |ancestor| ancestor.timeline);
    let shared = upstream.ancestors().iter().filter(|ancestor| (oldest..ours).contains(&ancestor.timeline));
    let is_other = !shared.eq(held.ancestors());
    if theirs == ours {
        return if is_other { Err(Refusal::OtherHistory(ours)) } else { Ok(Route::Same) };
    }
    let Some(at) = upstream.switch_lsn(ours) else {
        return Err(Refusal::NotAChild { held: ours, upstream: theirs });
    };
    let began = held.begin(ours).flatten();
    if is_other || began.is_some_and(|began| at < began) {
        return Err(Refusal::OtherHistory(ours));
    }
    let later = upstream.ancestors().iter().map(|ancestor| ancestor.timeline).find(|later| *later > ours);
    let fork = Fork { next: later.unwrap_or(theirs), at };
    Ok(match end.cmp(&at) {
        std::cmp::Ordering::Less => Route::Finish(fork),
        std::cmp::Ordering::Equal => Route::Follow(fork),
        std::cmp::Ordering::Greater => Route::Diverged(fork),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wal::SegmentSize;
    use crate::wal::timeline::Ancestor;

    fn timeline(raw: u32) -> TimelineId {
        TimelineId::new(raw).unwrap()
    }

    fn at(raw: u64) -> Lsn {
        Lsn::new(raw).unwrap()
    }

    fn history(last: u32, switches: &[(u32, u64)]) -> TimelineHistory {
        let lines =
            switches.iter().map(|(from, lsn)| format!("{from}\t0/{lsn:X}\tno recovery target specified\n"));
        TimelineHistory::parse(timeline(last), lines.collect::<String>().as_bytes()).unwrap()
    }

    fn lineage(last: u32, switches: &[(u32, u64)]) -> Lineage {
        Lineage::of(&history(last, switches), SegmentSize::DEFAULT)
    }

    #[test]
    fn a_promotion_is_followed_after_what_was_before_it() {
        let fork = Fork { next: timeline(2), at: at(500) };
        let held = lineage(1, &[]);
        let upstream = history(2, &[(1, 500)]);
        assert_eq!(route(&held, at(499), &upstream), Ok(Route::Finish(fork)));
        assert_eq!(route(&held, at(500), &upstream), Ok(Route::Follow(fork)));
        assert_eq!(route(&held, at(501), &upstream), Ok(Route::Diverged(fork)));
        assert_eq!(route(&held, at(501), &history(1, &[])), Ok(Route::Same));
    }

    #[test]
    fn of_several_promotions_the_first_that_was_missed_comes_first() {
        let fork = Fork { next: timeline(4), at: at(700) };
        let upstream = history(9, &[(1, 500), (3, 700), (4, 700), (8, 900)]);
        assert_eq!(route(&lineage(3, &[(1, 500)]), at(700), &upstream), Ok(Route::Follow(fork)));
    }

    #[test]
    fn a_server_of_another_family_is_refused() {
        let held = lineage(3, &[(1, 500), (2, 600)]);
        let behind = Refusal::Behind { held: timeline(3), upstream: timeline(2) };
        assert_eq!(route(&held, at(700), &history(2, &[(1, 500)])), Err(behind));
        let not_a_child = Refusal::NotAChild { held: timeline(3), upstream: timeline(4) };
        assert_eq!(route(&held, at(700), &history(4, &[(1, 500), (2, 650)])), Err(not_a_child));
        let other = Refusal::OtherHistory(timeline(3));
        // The same number, but left elsewhere, or by way of others.
        assert_eq!(route(&held, at(700), &history(3, &[(1, 500), (2, 650)])), Err(other));
        assert_eq!(route(&held, at(700), &history(3, &[(1, 500)])), Err(other));
        assert_eq!(route(&held, at(700), &history(4, &[(1, 400), (2, 600), (3, 800)])), Err(other));
        // It cannot have been left before it began.
        assert_eq!(route(&held, at(700), &history(4, &[(1, 500), (2, 600), (3, 550)])), Err(other));
    }

    #[test]
    fn of_ancestors_that_are_not_known_only_the_known_ones_are_compared() {
        let held = lineage(2, &[]);
        let upstream = history(4, &[(1, 500), (2, 600), (3, 700)]);
        let fork = |next, lsn| Fork { next: timeline(next), at: at(lsn) };
        assert_eq!(route(&held, at(600), &upstream), Ok(Route::Follow(fork(3, 600))));
        let held = held.followed_by(timeline(3), at(600));
        assert_eq!(route(&held, at(650), &history(3, &[(1, 500), (2, 600)])), Ok(Route::Same));
        assert_eq!(route(&held, at(650), &upstream), Ok(Route::Finish(fork(4, 700))));
        // The one that is known was left elsewhere.
        let other = Err(Refusal::OtherHistory(timeline(3)));
        assert_eq!(route(&held, at(650), &history(3, &[(1, 500), (2, 601)])), other);
        assert_eq!(route(&held, at(650), &history(4, &[(1, 500), (3, 700)])), other);
    }

    /// Timelines as they come about: each leaves an earlier one somewhere.
    #[derive(Clone, Debug)]
    struct Tree(Vec<(Option<u32>, u64)>);

    impl Tree {
        /// One of its timelines.
        fn pick(&self, index: prop::sample::Index) -> u32 {
            u32::try_from(index.index(self.0.len())).unwrap() + 1
        }

        fn path(&self, last: u32) -> Vec<(u32, u64)> {
            let mut path = Vec::new();
            let mut child = last;
            while let (Some(parent), switch) = self.0[child as usize - 1] {
                path.push((parent, switch));
                child = parent;
            }
            path.reverse();
            path
        }
    }

    fn trees() -> impl Strategy<Value = Tree> {
        prop::collection::vec((any::<prop::sample::Index>(), 1_u64..1000), 0..7).prop_map(|switches| {
            let mut tree = Tree(vec![(None, 0)]);
            for (parent, ahead) in switches {
                let parent = parent.index(tree.0.len());
                let began = tree.0[parent].1;
                tree.0.push((Some(u32::try_from(parent).unwrap() + 1), began + ahead));
            }
            tree
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]

        /// Step by step it arrives at the server's timeline, and everything that is kept on the way was written by an ancestor
        /// of it; or it is refused, and then the server's path does not go through what is held, as far as that is known. The
        /// server may be of another family, whose timelines have the same numbers; and of what is held the oldest ancestors may
        /// not be known.
        #[test]
        fn whoever_is_followed_is_followed_to_the_end(
            (tree, other) in (trees(), prop::option::of(trees())),
            (ours, theirs) in any::<(prop::sample::Index, prop::sample::Index)>(),
            unknown in any::<prop::sample::Index>(),
            ahead in 0_u64..1500,
        ) {
            let their_tree = other.as_ref().unwrap_or(&tree);
            let (ours, theirs) = (tree.pick(ours), their_tree.pick(theirs));
            let (our_path, their_path) = (tree.path(ours), their_tree.path(theirs));
            let began = our_path.last().map_or(1, |(_, began)| *began);
            let known = &our_path[unknown.index(our_path.len() + 1)..];
            let upstream = history(theirs, &their_path);
            let mut held = lineage(1, &[]);
            if ours > 1 {
                let ancestor = |(number, lsn): &(u32, u64)| Ancestor { timeline: timeline(*number), switch_lsn: at(*lsn) };
                held = Lineage::new(timeline(ours), known.iter().map(ancestor).collect(), SegmentSize::DEFAULT);
            }
            let mut end = at(began.max(1) + ahead);
            let is_on_their_path = is_followable(ours, known, theirs, &their_path);
            for step in 0..20 {
                match route(&held, end, &upstream) {
                    Ok(Route::Same) => {
                        prop_assert_eq!(held.timeline(), timeline(theirs));
                        prop_assert!(upstream.ancestors().ends_with(held.ancestors()));
                        prop_assert!(known.len() < our_path.len() || held.ancestors() == upstream.ancestors());
                        prop_assert!(is_on_their_path);
                        break;
                    }
                    Ok(Route::Finish(fork)) => {
                        prop_assert!(end < fork.at);
                        end = fork.at;
                    }
                    Ok(Route::Follow(fork) | Route::Diverged(fork)) => {
                        let ancestor = Ancestor { timeline: held.timeline(), switch_lsn: fork.at };
                        prop_assert!(upstream.ancestors().contains(&ancestor));
                        prop_assert!(end >= fork.at);
                        end = fork.at;
                        held = held.followed_by(fork.next, fork.at);
                    }
                    Err(refusal) => {
                        prop_assert!(!is_on_their_path, "{refusal}");
                        prop_assert_eq!(step, 0);
                        break;
                    }
                }
                prop_assert!(step < 19);
            }
        }
    }

    /// Whether a server's path goes through a timeline, and came there as it is known here.
    fn is_followable(ours: u32, known: &[(u32, u64)], theirs: u32, their_path: &[(u32, u64)]) -> bool {
        let left = their_path.iter().find(|(number, _)| *number == ours);
        let came = their_path.iter().filter(|(number, _)| *number < ours);
        let oldest = known.first().map_or(ours, |(number, _)| *number);
        let came_as_known = came.filter(|(number, _)| *number >= oldest).eq(known);
        let began = known.last().map_or(0, |(_, began)| *began);
        let is_passed = ours == theirs || left.is_some_and(|(_, left)| *left >= began);
        is_passed && came_as_known
    }
}
