//! How many clients may be on their way in.
//!
//! Owns the count of connections that have not authenticated yet: in all, from each network (what one machine can have of
//! addresses), and from everywhere but this machine, so that no machine keeps all others out, and those elsewhere never
//! this machine's own clients. They are counted apart from sessions: strangers cannot take a standby's place.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use crate::net::{Network, Peer};

/// The connections that are not authenticated.
#[derive(Debug)]
pub(super) struct Strangers {
    in_all_max: usize,
    per_network_max: usize,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    in_all: usize,
    from_elsewhere: usize,
    by_network: HashMap<Network, usize>,
}

impl Strangers {
    pub(super) fn new(in_all_max: usize, per_network_max: usize) -> Self {
        Self { in_all_max, per_network_max, counts: Mutex::default() }
    }

    /// Lets one more in, if there is room. Clients on this machine's Unix sockets have only the limit for all.
    pub(super) fn admit(self: &Arc<Self>, peer: &Peer) -> Option<Stranger> {
        let (network, is_local) = (peer.network(), peer.is_local());
        let mut counts = self.counts.lock();
        let from_network = network.and_then(|network| counts.by_network.get(&network)).copied();
        let is_full = counts.in_all >= self.in_all_max
            || from_network.unwrap_or(0) >= self.per_network_max
            || !is_local && counts.from_elsewhere >= self.elsewhere_max();
        if is_full {
            return None;
        }
        counts.in_all += 1;
        counts.from_elsewhere += usize::from(!is_local);
        if let Some(network) = network {
            *counts.by_network.entry(network).or_default() += 1;
        }
        Some(Stranger { strangers: Arc::clone(self), network, is_local })
    }

    fn elsewhere_max(&self) -> usize {
        self.in_all_max.saturating_sub((self.in_all_max / LOCAL_SHARE).max(1))
    }
}

/// One connection in the count; leaves it when dropped.
#[derive(Debug)]
pub(super) struct Stranger {
    strangers: Arc<Strangers>,
    network: Option<Network>,
    is_local: bool,
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let mut counts = self.strangers.counts.lock();
        counts.in_all -= 1;
        counts.from_elsewhere -= usize::from(!self.is_local);
        if let Some(network) = self.network
            && let Some(count) = counts.by_network.get_mut(&network)
        {
            *count -= 1;
            if *count == 0 {
                counts.by_network.remove(&network);
            }
        }
    }
}

/// Of so many places one, and one at least, is for clients on Unix sockets and loopback alone.
const LOCAL_SHARE: usize = 8;

/// Fewest places that somebody on this machine and somebody elsewhere can share.
pub const STRANGERS_MIN: usize = 2;

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn from(last: u8) -> Peer {
        Peer::Tcp(([10, 0, 0, last], 5432).into())
    }

    fn at(address: &str) -> Peer {
        Peer::Tcp((address.parse::<IpAddr>().unwrap(), 5432).into())
    }

    #[test]
    fn one_address_cannot_keep_the_others_out() {
        let strangers = Arc::new(Strangers::new(4, 2));
        let first = [from(1), from(1)].map(|peer| strangers.admit(&peer).unwrap());
        assert!(strangers.admit(&from(1)).is_none());
        let others = [from(2), Peer::Unix].map(|peer| strangers.admit(&peer).unwrap());
        assert!(strangers.admit(&Peer::Unix).is_none(), "the limit for all");
        drop(first);
        assert!(strangers.admit(&from(1)).is_some());
        drop(others);
        assert!(strangers.counts.lock().by_network.is_empty(), "nothing is kept of who left");
    }

    #[test]
    fn a_machine_with_a_network_of_ipv6_is_one_however_many_addresses_it_uses() {
        let strangers = Arc::new(Strangers::new(64, 2));
        let admit = |text: &str| strangers.admit(&at(text));
        let _kept = [admit("2001:db8::1").unwrap(), admit("2001:db8::2").unwrap()];
        assert!(admit("2001:db8::3").is_none(), "a third one of the same /64");
        assert!(admit("2001:db8:0:1::1").is_some(), "another network");
        let _mapped = [admit("::ffff:10.0.0.1").unwrap(), admit("10.0.0.1").unwrap()];
        assert!(admit("::ffff:10.0.0.1").is_none(), "an address is the same in both its forms");
        assert!(admit("::ffff:10.0.0.2").is_some());
    }

    #[test]
    fn whoever_is_elsewhere_leaves_places_to_this_machine() {
        for (in_all_max, for_others) in [(64, 56), (8, 7), (3, 2), (STRANGERS_MIN, 1)] {
            let strangers = Arc::new(Strangers::new(in_all_max, in_all_max));
            let crowd: Vec<_> = (0..u8::MAX).filter_map(|last| strangers.admit(&from(last))).collect();
            assert_eq!(crowd.len(), for_others, "of {in_all_max}");
            for local in [Peer::Unix, at("127.0.0.1"), at("::1"), at("::ffff:127.0.0.1")] {
                assert!(strangers.admit(&local).is_some(), "{local} is kept out");
            }
            drop(crowd);
            // Those on this machine may have all of them.
            let own: Vec<_> = std::iter::from_fn(|| strangers.admit(&Peer::Unix)).collect();
            assert_eq!(own.len(), in_all_max);
            assert!(strangers.admit(&from(1)).is_none());
            drop(own);
            assert_eq!(strangers.counts.lock().from_elsewhere, 0);
        }
    }
}
