//! Who is connected to the HTTP listener, and who leaves when somebody else needs the place.
//!
//! Owns the places. Whoever comes is a stranger until he has shown a token, and gets in at once: another stranger leaves for
//! him, one from the same network where that has its share, else one of those that most come from. So nobody who is not known
//! keeps anybody out, however many connections he holds. Those elsewhere and those on this machine do not share their places.
//! Whoever has shown a token has a place that no stranger can take, and keeps it while he is answered.

use std::{cmp::Reverse, sync::Arc};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::admin::tokens::Standing;
use crate::net::Network;

/// Everybody who is connected.
#[derive(Debug, Default)]
pub(super) struct Guests {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// In the order in which they came; no more than [`GUESTS_MAX`].
    entries: Vec<Entry>,
    came: u64,
}

#[derive(Clone, Debug)]
struct Entry {
    number: u64,
    network: Network,
    standing: Standing,
    is_answered: bool,
    leave: CancellationToken,
}

impl Guests {
    /// Lets somebody in; who must leave for him is told.
    pub(super) fn admit(self: &Arc<Self>, network: Network) -> Guest {
        let mut table = self.table.lock();
        table.make_room_for_stranger(network);
        table.came += 1;
        let (number, leave) = (table.came, CancellationToken::new());
        table.entries.push(Entry {
            number,
            network,
            standing: Standing::Stranger,
            is_answered: false,
            leave: leave.clone(),
        });
        Guest { guests: Arc::clone(self), number, leave }
    }
}

impl Table {
    fn make_room_for_stranger(&mut self, network: Network) {
        let of_network = self.strangers().filter(|entry| entry.network == network).count();
        let is_local = network.is_loopback();
        let of_side = self.strangers().filter(|entry| entry.network.is_loopback() == is_local).count();
        let leaves = if of_network >= NETWORK_STRANGERS_MAX {
            self.stranger_to_leave(|of| of == network)
        } else if of_side >= STRANGERS_MAX {
            self.stranger_to_leave(|of| of.is_loopback() == is_local)
        } else {
            None
        };
        if let Some(number) = leaves {
            self.remove(number);
        }
    }

    fn strangers(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| entry.standing == Standing::Stranger)
    }

    /// One who is not answered just now, of the network that most come from, the oldest.
    fn stranger_to_leave(&self, is_meant: impl Fn(Network) -> bool) -> Option<u64> {
        let crowd = |network| self.strangers().filter(|entry| entry.network == network).count();
        let meant = self.strangers().filter(|entry| is_meant(entry.network));
        let first =
            meant.min_by_key(|entry| (entry.is_answered, Reverse(crowd(entry.network)), entry.number));
        first.map(|entry| entry.number)
    }

    /// One of those who are known by their token and are not answered just now, the oldest.
    fn known_to_leave(&self, standing: Standing) -> Option<u64> {
        let idle = |entry: &&Entry| entry.standing == standing && !entry.is_answered;
        self.entries.iter().find(idle).map(|entry| entry.number)
    }

    fn entry(&mut self, number: u64) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.number == number)
    }

    fn remove(&mut self, number: u64) {
        if let Some(at) = self.entries.iter().position(|entry| entry.number == number) {
            self.entries.remove(at).leave.cancel();
        }
    }
}

/// One of them; his place is free when this is dropped.
#[derive(Debug)]
pub(super) struct Guest {
    guests: Arc<Guests>,
    number: u64,
    leave: CancellationToken,
}

impl Guest {
    /// Begins an answer to somebody of this standing, which goes on until what is returned is dropped. `None` when there are
    /// too many of his kind, who are all being answered.
    pub(super) fn answer(&self, standing: Standing) -> Option<Answer<'_>> {
        let mut table = self.guests.table.lock();
        let known = table.entry(self.number)?.standing;
        if standing > known {
            let kind = table.entries.iter().filter(|entry| entry.standing == standing);
            if kind.count() >= KNOWN_MAX {
                let leaves = table.known_to_leave(standing)?;
                table.remove(leaves);
            }
        }
        let entry = table.entry(self.number)?;
        (entry.standing, entry.is_answered) = (standing.max(known), true);
        Some(Answer(self))
    }

    /// Comes back when somebody else needs the place.
    pub(super) async fn must_leave(&self) {
        self.leave.cancelled().await;
    }

    /// Whether he has never shown a token.
    pub(super) fn is_stranger(&self) -> bool {
        let mut table = self.guests.table.lock();
        table.entry(self.number).is_none_or(|entry| entry.standing == Standing::Stranger)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.guests.table.lock().remove(self.number);
    }
}

/// An answer under way.
#[derive(Debug)]
pub(super) struct Answer<'a>(&'a Guest);

impl Drop for Answer<'_> {
    fn drop(&mut self) {
        if let Some(entry) = self.0.guests.table.lock().entry(self.0.number) {
            entry.is_answered = false;
        }
    }
}

/// Connections of those who have shown no token, from one network.
const NETWORK_STRANGERS_MAX: usize = 4;

/// The same from all of this machine, and again from everywhere else.
const STRANGERS_MAX: usize = 8;

/// Connections of those who may read, and again of those who may do everything.
const KNOWN_MAX: usize = 4;

/// Most connections at a time.
pub(super) const GUESTS_MAX: usize = 2 * STRANGERS_MAX + 2 * KNOWN_MAX;

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Network {
        Network::of(text.parse().unwrap())
    }

    fn is_gone(guest: &Guest) -> bool {
        guest.leave.is_cancelled()
    }

    /// How many of them are still there.
    fn staying(guests: &[Guest]) -> usize {
        guests.iter().filter(|guest| !is_gone(guest)).count()
    }

    #[test]
    fn the_oldest_stranger_of_a_network_leaves_for_the_next_one_and_no_other_does() {
        let guests = Arc::<Guests>::default();
        let other = guests.admit(network("127.0.0.1"));
        let crowd: Vec<_> = (0..200).map(|_| guests.admit(network("127.0.0.2"))).collect();
        assert_eq!(staying(&crowd), NETWORK_STRANGERS_MAX);
        assert!(crowd[..196].iter().all(is_gone), "not the oldest ones");
        assert!(!is_gone(&other));
        drop(crowd);
        drop(other);
        assert!(guests.table.lock().entries.is_empty(), "nothing is kept of who left");
    }

    #[test]
    fn a_stranger_from_many_networks_takes_no_place_of_this_machine_and_finds_one_himself() {
        let guests = Arc::<Guests>::default();
        let local = guests.admit(network("127.0.0.1"));
        let crowd: Vec<_> = (0..100)
            .flat_map(|at| [at; 3])
            .map(|at| guests.admit(network(&format!("10.0.0.{at}"))))
            .collect();
        assert_eq!(staying(&crowd), STRANGERS_MAX);
        assert!(!is_gone(&local));
        let late = guests.admit(network("10.9.9.9"));
        assert!(!is_gone(&late) && staying(&crowd) == STRANGERS_MAX - 1);
        // Whoever has most leaves first.
        for _ in 0..20 {
            drop(guests.admit(network("10.0.0.99")));
        }
        assert!(!is_gone(&late));
    }

    #[test]
    fn whoever_has_shown_a_token_stays_whatever_strangers_do() {
        let guests = Arc::<Guests>::default();
        let here = network("127.0.0.1");
        let known: Vec<_> = [Standing::Reader, Standing::Operator]
            .into_iter()
            .flat_map(|standing| [standing; KNOWN_MAX])
            .map(|standing| {
                let guest = guests.admit(here);
                drop(guest.answer(standing).unwrap());
                assert!(!guest.is_stranger());
                guest
            })
            .collect();
        let crowd: Vec<_> = (0..200).map(|_| guests.admit(here)).collect();
        assert_eq!((staying(&known), staying(&crowd)), (known.len(), NETWORK_STRANGERS_MAX));
        assert!(guests.table.lock().entries.len() <= GUESTS_MAX);
    }

    #[test]
    fn of_those_who_are_known_nobody_leaves_while_he_is_answered() {
        let guests = Arc::<Guests>::default();
        let known: Vec<_> = (0..KNOWN_MAX).map(|_| guests.admit(network("127.0.0.1"))).collect();
        let mut answers: Vec<_> =
            known.iter().map(|guest| guest.answer(Standing::Operator).unwrap()).collect();
        let next = guests.admit(network("127.0.0.1"));
        assert!(next.answer(Standing::Operator).is_none(), "all are being answered");
        assert!(next.answer(Standing::Reader).is_some(), "those who read have their own places");
        answers.truncate(KNOWN_MAX - 1);
        assert!(next.answer(Standing::Operator).is_some());
        assert!(is_gone(&known[KNOWN_MAX - 1]), "who was answered already");
        assert_eq!(staying(&known), KNOWN_MAX - 1);
    }

    #[test]
    fn a_stranger_who_is_answered_leaves_last() {
        let guests = Arc::<Guests>::default();
        let crowd: Vec<_> = (0..NETWORK_STRANGERS_MAX).map(|_| guests.admit(network("127.0.0.1"))).collect();
        let answer = crowd[0].answer(Standing::Stranger).unwrap();
        let _next = guests.admit(network("127.0.0.1"));
        assert!(!is_gone(&crowd[0]) && is_gone(&crowd[1]));
        drop(answer);
        let _next = guests.admit(network("127.0.0.1"));
        assert!(is_gone(&crowd[0]));
        assert!(crowd[0].answer(Standing::Operator).is_none(), "he has left");
    }
}
