//! Who is at the other end of a connection, and what of his address counts as one.
//!
//! Owns the one key by which those who are not known yet are counted. Decides nothing about a peer.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use crate::access::Origin;

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A TCP peer.
    Tcp(SocketAddr),
    /// A process on this machine.
    Unix,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix => f.write_str("[local]"),
        }
    }
}

impl Peer {
    /// As a rule about who may connect sees it.
    pub fn origin(&self) -> Origin {
        match self {
            Self::Tcp(address) => Origin::Tcp(address.ip()),
            Self::Unix => Origin::Local,
        }
    }

    /// What it is counted under; those on Unix sockets are this machine's users, and under none.
    pub fn network(&self) -> Option<Network> {
        match self {
            Self::Tcp(address) => Some(Network::of(address.ip())),
            Self::Unix => None,
        }
    }

    /// Whether it is on this machine for certain.
    pub fn is_local(&self) -> bool {
        self.network().is_none_or(Network::is_loopback)
    }
}

/// An address, or the part of one that a single machine can have all of: of IPv6 the first 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network(IpAddr);

impl Network {
    /// Where an address counts. One of IPv4 that is written as one of IPv6 is that of IPv4.
    pub fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            // Alone in its network: that would be the first of all those that are reserved.
            IpAddr::V6(address) if address.is_loopback() => address.into(),
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
            address => address,
        })
    }

    /// Whether only this machine has it.
    pub fn is_loopback(self) -> bool {
        self.0.is_loopback()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Network {
        Network::of(text.parse().unwrap())
    }

    #[test]
    fn a_machine_of_ipv6_has_64_bits_of_addresses_and_one_of_ipv4_one_address() {
        assert_eq!(network("2001:db8::1"), network("2001:db8::ffff:ffff:ffff:ffff"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_ne!(network("10.0.0.1"), network("10.0.0.2"));
        assert_eq!(network("::ffff:10.0.0.1"), network("10.0.0.1"));
        assert_ne!(network("::ffff:10.0.0.1"), network("::ffff:10.0.0.2"));
    }

    #[test]
    fn only_loopback_and_unix_sockets_are_this_machine() {
        let is_local = |text: &str| Peer::Tcp((text.parse::<IpAddr>().unwrap(), 1).into()).is_local();
        assert!(Peer::Unix.is_local());
        assert!(is_local("127.0.0.1") && is_local("127.9.9.9") && is_local("::1"));
        assert!(is_local("::ffff:127.0.0.1"));
        assert!(!is_local("10.0.0.1") && !is_local("::2") && !is_local("2001:db8::1"));
        assert!(!is_local("::ffff:10.0.0.1"));
        assert_ne!(network("::1"), network("::2"));
    }
}
