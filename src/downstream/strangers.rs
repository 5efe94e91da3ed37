//! How many clients may be on their way in.
//!
//! Owns the count of connections that have not authenticated yet, in all and from each address, so that one address
//! cannot keep all others out. They are counted apart from sessions: strangers cannot take a standby's place.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use parking_lot::Mutex;

use crate::net::Peer;

/// The connections that are not authenticated.
#[derive(Debug)]
pub(super) struct Strangers {
    in_all_max: usize,
    per_address_max: usize,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    in_all: usize,
    by_address: HashMap<IpAddr, usize>,
}

impl Strangers {
    pub(super) fn new(in_all_max: usize, per_address_max: usize) -> Self {
        Self { in_all_max, per_address_max, counts: Mutex::default() }
    }

    /// Lets one more in, if there is room. Clients on this machine's Unix sockets have only the limit for all.
    pub(super) fn admit(self: &Arc<Self>, peer: &Peer) -> Option<Stranger> {
        let address = match peer {
            Peer::Tcp(address) => Some(address.ip().to_canonical()),
            Peer::Unix => None,
        };
        let mut counts = self.counts.lock();
        let from_address = address.and_then(|address| counts.by_address.get(&address)).copied();
        if counts.in_all >= self.in_all_max || from_address.unwrap_or(0) >= self.per_address_max {
            return None;
        }
        counts.in_all += 1;
        if let Some(address) = address {
            *counts.by_address.entry(address).or_default() += 1;
        }
        Some(Stranger { strangers: Arc::clone(self), address })
    }
}

/// One connection in the count; leaves it when dropped.
#[derive(Debug)]
pub(super) struct Stranger {
    strangers: Arc<Strangers>,
    address: Option<IpAddr>,
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let mut counts = self.strangers.counts.lock();
        counts.in_all -= 1;
        if let Some(address) = self.address
            && let Some(count) = counts.by_address.get_mut(&address)
        {
            *count -= 1;
            if *count == 0 {
                counts.by_address.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(last: u8) -> Peer {
        Peer::Tcp(([10, 0, 0, last], 5432).into())
    }

    #[test]
    fn one_address_cannot_keep_the_others_out() {
        let strangers = Arc::new(Strangers::new(4, 2));
        let first = [from(1), from(1)].map(|peer| strangers.admit(&peer).unwrap());
        assert!(strangers.admit(&from(1)).is_none());
        let others = [from(2), Peer::Unix].map(|peer| strangers.admit(&peer).unwrap());
        assert!(strangers.admit(&from(3)).is_none(), "the limit for all");
        drop(first);
        assert!(strangers.admit(&from(1)).is_some());
        drop(others);
        assert!(strangers.counts.lock().by_address.is_empty(), "nothing is kept of who left");
    }
}
