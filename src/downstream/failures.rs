//! How long somebody waits for a no who has been told it before.
//!
//! Owns the count of failed logins by network and by user, in two tables of limited size that forget the oldest first. Only the
//! answer to a failure is held back: whoever is right is let in at once, wherever others try to guess. A connection that
//! waits keeps its place among those that are not authenticated, whether its client is still there or not, so that an address
//! can guess no faster than its places and these times allow.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::net::{Network, Peer};

/// The failed logins of late.
#[derive(Debug, Default)]
pub(super) struct Failures {
    by_network: Mutex<Table<Network>>,
    /// Names that nobody has are counted as those of users.
    by_user: Mutex<Table<String>>,
}

impl Failures {
    /// Takes note of a wrong proof. Returns how long its answer is to be held back.
    pub(super) fn denied(&self, peer: &Peer, user: &str, now: Instant) -> Duration {
        let of_user = self.by_user.lock().count(user.to_owned(), now);
        let of_network = peer.network().map_or(0, |network| self.by_network.lock().count(network, now));
        delay_after(of_user.max(of_network))
    }

    /// Takes note of somebody who did not come to an end in time.
    pub(super) fn timed_out(&self, peer: &Peer, now: Instant) {
        if let Some(network) = peer.network() {
            self.by_network.lock().count(network, now);
        }
    }
}

fn delay_after(failures: u32) -> Duration {
    match failures.checked_sub(FREE_FAILURES).filter(|beyond| *beyond > 0) {
        None => Duration::ZERO,
        Some(beyond) => {
            let factor = 1_u32.checked_shl(beyond - 1).unwrap_or(u32::MAX);
            DELAY_MIN.saturating_mul(factor).min(DELAY_MAX)
        }
    }
}

#[derive(Debug)]
struct Table<K> {
    entries: HashMap<K, Entry>,
}

impl<K> Default for Table<K> {
    fn default() -> Self {
        Self { entries: HashMap::new() }
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    failures: u32,
    last: Instant,
}

impl<K: Eq + Hash + Clone> Table<K> {
    /// Counts one more, and returns how many there are; one is forgotten in every [`FORGET_INTERVAL`].
    fn count(&mut self, key: K, now: Instant) -> u32 {
        if self.entries.len() >= ENTRIES_MAX && !self.entries.contains_key(&key) {
            self.forget_oldest();
        }
        let entry = self.entries.entry(key).or_insert(Entry { failures: 0, last: now });
        let quiet = now.saturating_duration_since(entry.last);
        let forgotten = u32::try_from(quiet.as_secs() / FORGET_INTERVAL.as_secs()).unwrap_or(u32::MAX);
        entry.failures = entry.failures.saturating_sub(forgotten).saturating_add(1).min(FAILURES_MAX);
        entry.last = now;
        entry.failures
    }

    fn forget_oldest(&mut self) {
        let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.last).map(|(key, _)| key.clone());
        if let Some(oldest) = oldest {
            self.entries.remove(&oldest);
        }
    }
}

/// Failures whose answer is not held back: anybody can mistype.
const FREE_FAILURES: u32 = 3;
/// The first time that an answer is held back; it doubles with each failure.
const DELAY_MIN: Duration = Duration::from_millis(100);
/// The longest that an answer is held back.
const DELAY_MAX: Duration = Duration::from_secs(5);
/// Time without a failure in which one is forgotten.
const FORGET_INTERVAL: Duration = Duration::from_secs(10);
/// Most failures that are remembered of one: more would not make the wait longer, only last longer.
const FAILURES_MAX: u32 = 30;
/// Networks, and users, of which failures are remembered.
const ENTRIES_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn from(address: &str) -> Peer {
        Peer::Tcp((address.parse::<IpAddr>().unwrap(), 5432).into())
    }

    fn times(failures: &Failures, peer: &Peer, user: &str, now: Instant, count: usize) -> Vec<Duration> {
        (0..count).map(|_| failures.denied(peer, user, now)).collect()
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_wait_grows_up_to_a_limit_and_shrinks_when_nothing_happens() {
        let (failures, now) = (Failures::default(), Instant::now());
        let waits = times(&failures, &from("10.0.0.1"), "u", now, 12);
        let expected = [0, 0, 0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000].map(|ms| ms * MS);
        assert_eq!(waits, expected);
        let later = now + 10 * FORGET_INTERVAL;
        assert_eq!(failures.denied(&from("10.0.0.1"), "u", later), Duration::ZERO);
    }

    #[test]
    fn an_address_waits_whomever_it_tries_and_a_user_is_guarded_against_all() {
        let (failures, now) = (Failures::default(), Instant::now());
        for user in ["a", "b", "c", "d", "e"] {
            failures.denied(&from("10.0.0.1"), user, now);
        }
        assert!(failures.denied(&from("10.0.0.1"), "f", now) > Duration::ZERO);
        assert_eq!(failures.denied(&from("10.0.0.2"), "g", now), Duration::ZERO, "others do not");
        for last in 3..9 {
            failures.denied(&from(&format!("10.0.0.{last}")), "victim", now);
        }
        assert!(failures.denied(&from("10.0.0.99"), "victim", now) > Duration::ZERO);
    }

    #[test]
    fn names_that_nobody_has_are_counted_as_others() {
        let now = Instant::now();
        let waits = |user: &str| times(&Failures::default(), &Peer::Unix, user, now, 6);
        assert_eq!(waits("known"), waits("unknown"));
        assert!(waits("known")[5] > Duration::ZERO, "on a Unix socket too");
    }

    #[test]
    fn a_network_of_ipv6_is_one_and_slow_clients_count() {
        let (failures, now) = (Failures::default(), Instant::now());
        for last in 0..4 {
            failures.timed_out(&from(&format!("2001:db8::{last}")), now);
        }
        assert!(failures.denied(&from("2001:db8::ffff"), "a", now) > Duration::ZERO);
        assert_eq!(failures.denied(&from("2001:db8:0:1::1"), "b", now), Duration::ZERO);
    }

    #[test]
    fn many_cost_bounded_memory_and_the_oldest_is_forgotten() {
        let (failures, begin) = (Failures::default(), Instant::now());
        times(&failures, &from("10.9.9.9"), "first", begin, 6);
        for number in 0..5_000_u32 {
            let now = begin + number * MS;
            let address = IpAddr::from((number + 1).to_be_bytes());
            failures.denied(&Peer::Tcp((address, 1).into()), &format!("user {number}"), now);
        }
        assert_eq!(failures.by_network.lock().entries.len(), ENTRIES_MAX);
        assert_eq!(failures.by_user.lock().entries.len(), ENTRIES_MAX);
        assert_eq!(failures.denied(&from("10.9.9.9"), "first", begin), Duration::ZERO);
        assert!(failures.by_user.lock().entries.contains_key("user 4999"));
    }
}
