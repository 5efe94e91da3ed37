//! Addresses in a rule.
//!
//! Owns their forms and what they contain. The machine's own interfaces are an argument, asked for only where a rule wants
//! to know them.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::access::error::LineProblem;

/// An address of this machine, and which addresses are on the same network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its own.
    pub address: IpAddr,
    /// The bits that are the network's.
    pub mask: IpAddr,
}

/// Whom a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Addresses {
    /// `all`
    All,
    /// `samehost`: any address of this machine.
    SameHost,
    /// `samenet`: any address of a network that this machine is on.
    SameNet,
    /// An address and the bits of it that count, which need not be the first ones.
    Range { address: IpAddr, mask: IpAddr },
}

impl Addresses {
    /// Whether a client is meant.
    pub(super) fn contains(self, client: IpAddr, interfaces: &dyn Fn() -> Vec<Interface>) -> bool {
        match self {
            Self::All => true,
            Self::Range { address, mask } => is_in_range(client, address, mask),
            Self::SameHost => interfaces().iter().any(|interface| interface.address == client),
            Self::SameNet => {
                interfaces().iter().any(|interface| is_in_range(client, interface.address, interface.mask))
            }
        }
    }

    /// Whether nobody but this machine is meant.
    pub(super) fn is_this_machine(self) -> bool {
        match self {
            Self::All | Self::SameNet => false,
            Self::SameHost => true,
            Self::Range { address: IpAddr::V4(address), mask: IpAddr::V4(mask) } => {
                address.is_loopback() && mask.octets().first() == Some(&0xFF)
            }
            Self::Range { address: IpAddr::V6(address), mask: IpAddr::V6(mask) } => {
                address.is_loopback() && mask.to_bits() == u128::MAX
            }
            Self::Range { .. } => false,
        }
    }
}

/// A host name is told from an address by its form, as `getaddrinfo` does it. The short and the octal forms of IPv4, which
/// that takes too, are refused: people read them differently.
pub(super) fn parse_address(text: &str) -> Option<IpAddr> {
    text.parse().ok()
}

/// The mask of so many leading bits.
pub(super) fn parse_prefix_length(text: &str, address: IpAddr) -> Option<IpAddr> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let bits: u32 = text.parse().ok().filter(|_| is_number)?;
    match address {
        IpAddr::V4(_) if bits <= u32::BITS => {
            let mask = u32::MAX.checked_shl(u32::BITS - bits).unwrap_or(0);
            Some(Ipv4Addr::from_bits(mask).into())
        }
        IpAddr::V6(_) if bits <= u128::BITS => {
            let mask = u128::MAX.checked_shl(u128::BITS - bits).unwrap_or(0);
            Some(Ipv6Addr::from_bits(mask).into())
        }
        _ => None,
    }
}

/// A mask that stands in a field of its own.
pub(super) fn parse_mask(text: &str, address: IpAddr) -> Result<IpAddr, LineProblem> {
    let mask = parse_address(text).ok_or_else(|| LineProblem::IpMask(text.to_owned()))?;
    if mask.is_ipv4() == address.is_ipv4() { Ok(mask) } else { Err(LineProblem::Families) }
}

fn is_in_range(client: IpAddr, address: IpAddr, mask: IpAddr) -> bool {
    match (client, address, mask) {
        (IpAddr::V4(client), IpAddr::V4(address), IpAddr::V4(mask)) => {
            (client.to_bits() ^ address.to_bits()) & mask.to_bits() == 0
        }
        (IpAddr::V6(client), IpAddr::V6(address), IpAddr::V6(mask)) => {
            (client.to_bits() ^ address.to_bits()) & mask.to_bits() == 0
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_prefix_length_is_a_mask() {
        let of = |text: &str, family: &str| {
            parse_prefix_length(text, address(family)).map(|mask| mask.to_string())
        };
        assert_eq!(of("0", "1.1.1.1").as_deref(), Some("0.0.0.0"));
        assert_eq!(of("12", "1.1.1.1").as_deref(), Some("255.240.0.0"));
        assert_eq!(of("32", "1.1.1.1").as_deref(), Some("255.255.255.255"));
        assert_eq!(of("0", "::1").as_deref(), Some("::"));
        assert_eq!(of("128", "::1").as_deref(), Some("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"));
        for wrong in ["", "33", "-1", "+8", " 8", "8 ", "x", "99999999999"] {
            assert_eq!(of(wrong, "1.1.1.1"), None, "{wrong}");
        }
        assert_eq!(of("129", "::1"), None);
    }

    #[test]
    fn masks_need_not_be_prefixes_and_families_are_never_mixed() {
        let odd = Addresses::Range { address: address("10.0.0.5"), mask: address("255.0.0.255") };
        let nobody = || -> Vec<Interface> { panic!("nobody wants to know") };
        assert!(odd.contains(address("10.9.9.5"), &nobody));
        assert!(!odd.contains(address("10.9.9.6"), &nobody));
        let all_v6 = Addresses::Range { address: address("::"), mask: address("::") };
        assert!(all_v6.contains(address("2001:db8::1"), &nobody));
        assert!(!all_v6.contains(address("10.0.0.5"), &nobody));
        assert_eq!(parse_mask("255.0.0.0", address("::1")), Err(LineProblem::Families));
    }

    #[test]
    fn this_machine_is_its_addresses_and_its_networks_are_theirs() {
        let interfaces = || {
            vec![
                Interface { address: address("127.0.0.1"), mask: address("255.0.0.0") },
                Interface { address: address("10.1.0.7"), mask: address("255.255.255.0") },
            ]
        };
        assert!(Addresses::SameHost.contains(address("10.1.0.7"), &interfaces));
        assert!(!Addresses::SameHost.contains(address("10.1.0.8"), &interfaces));
        assert!(Addresses::SameNet.contains(address("10.1.0.8"), &interfaces));
        assert!(!Addresses::SameNet.contains(address("10.1.1.8"), &interfaces));
        assert!(!Addresses::SameNet.contains(address("::1"), &interfaces));
    }

    #[test]
    fn only_loopback_is_nobody_else() {
        let range = |network: &str| {
            let (text, bits) = network.split_once('/').unwrap();
            let address = address(text);
            Addresses::Range { address, mask: parse_prefix_length(bits, address).unwrap() }.is_this_machine()
        };
        assert!(range("127.0.0.1/32") && range("127.0.0.0/8") && range("::1/128"));
        assert!(!range("127.0.0.0/7") && !range("0.0.0.0/0") && !range("10.0.0.1/32") && !range("::1/127"));
        assert!(Addresses::SameHost.is_this_machine());
        assert!(!Addresses::All.is_this_machine() && !Addresses::SameNet.is_this_machine());
    }
}
