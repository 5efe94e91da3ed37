//! What those who are turned away may cost.
//!
//! Owns two limits: how many clients are being told at a time, because each holds a descriptor meanwhile, and how many log
//! lines a network can cause. Decides about nobody: whoever comes here was refused already.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::net::{Network, Peer};

/// The refusals under way, and what was said of earlier ones.
#[derive(Debug)]
pub(super) struct Refusals {
    places: Arc<Semaphore>,
    /// Those on Unix sockets, and whoever is too many to be remembered, share one entry.
    told: Mutex<HashMap<Option<Network>, Told>>,
}

/// The lines about one network in the current interval.
#[derive(Debug)]
struct Told {
    since: Instant,
    lines: u32,
    left_out: u64,
}

impl Default for Refusals {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(REFUSALS_MAX)), told: Mutex::default() }
    }
}

impl Refusals {
    /// A place for telling one client why; `None` when there are too many, and this one just finds the door closed.
    pub(super) fn place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// Whether a line about this client may be written now, and if so, how many about its network were left out before.
    pub(super) fn may_log(&self, peer: &Peer, now: Instant) -> Option<u64> {
        let network = peer.network();
        let mut told = self.told.lock();
        if told.len() >= NETWORKS_MAX && !told.contains_key(&network) {
            told.retain(|_, told| now.duration_since(told.since) < INTERVAL);
        }
        let key = if told.len() < NETWORKS_MAX || told.contains_key(&network) { network } else { None };
        let entry = told.entry(key).or_insert(Told { since: now, lines: 0, left_out: 0 });
        if now.duration_since(entry.since) >= INTERVAL {
            (entry.since, entry.lines) = (now, 0);
        }
        if entry.lines >= LINES_PER_INTERVAL {
            entry.left_out += 1;
            return None;
        }
        entry.lines += 1;
        Some(std::mem::take(&mut entry.left_out))
    }
}

/// Clients that are told at a time that they are too many.
pub const REFUSALS_MAX: usize = 16;
/// Lines about one network in an interval.
const LINES_PER_INTERVAL: u32 = 10;
/// The interval.
const INTERVAL: Duration = Duration::from_secs(60);
/// Networks that are remembered.
const NETWORKS_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn from(number: u32) -> Peer {
        Peer::Tcp((number.to_be_bytes(), 5432).into())
    }

    #[test]
    fn an_address_causes_few_lines_and_the_rest_is_counted() {
        let (refusals, begin) = (Refusals::default(), Instant::now());
        let lines = (0..100).filter(|_| refusals.may_log(&from(1), begin).is_some()).count();
        assert_eq!(lines, 10);
        assert_eq!(refusals.may_log(&from(2), begin), Some(0), "others are heard");
        assert_eq!(refusals.may_log(&from(1), begin + INTERVAL), Some(90));
    }

    #[test]
    fn a_machine_with_a_network_of_ipv6_causes_no_more_lines_than_one_with_one_address() {
        let (refusals, begin) = (Refusals::default(), Instant::now());
        let at = |bits: u128| Peer::Tcp((std::net::Ipv6Addr::from_bits(bits), 5432).into());
        let network = 0x2001_0db8_u128 << 96;
        let lines = (0..100).filter(|last| refusals.may_log(&at(network | last), begin).is_some()).count();
        assert_eq!(lines, 10);
        assert_eq!(refusals.may_log(&at(network | 1 << 64), begin), Some(0), "another network");
    }

    #[test]
    fn many_addresses_cost_bounded_memory_and_few_lines() {
        let (refusals, begin) = (Refusals::default(), Instant::now());
        let lines = (0..100_000).filter(|number| refusals.may_log(&from(*number), begin).is_some()).count();
        assert!(lines <= NETWORKS_MAX + LINES_PER_INTERVAL as usize, "{lines}");
        assert!(refusals.told.lock().len() <= NETWORKS_MAX + 1);
        assert_eq!(refusals.may_log(&from(200_000), begin + INTERVAL), Some(0));
    }

    #[test]
    fn few_are_told_at_a_time() {
        let refusals = Refusals::default();
        let places: Vec<_> = std::iter::from_fn(|| refusals.place()).collect();
        assert_eq!(places.len(), REFUSALS_MAX);
        drop(places);
        assert!(refusals.place().is_some());
    }
}
