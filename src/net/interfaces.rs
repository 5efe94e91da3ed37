//! The addresses of this machine, for rules that are about itself and its networks.

use std::net::IpAddr;

use if_addrs::{IfAddr, get_if_addrs};

use crate::access::Interface;

/// Every address of this machine with its network, as they are now. None when the system does not tell.
pub fn interfaces() -> Vec<Interface> {
    match get_if_addrs() {
        Ok(found) => found.into_iter().map(|interface| of(&interface.addr)).collect(),
        Err(error) => {
            tracing::warn!(%error, "error enumerating network interfaces");
            Vec::new()
        }
    }
}

/// An interface without a mask is on no network but itself.
fn of(address: &IfAddr) -> Interface {
    match address {
        IfAddr::V4(found) => {
            let mask = if found.netmask.is_unspecified() { u32::MAX.into() } else { found.netmask };
            Interface { address: found.ip.into(), mask: IpAddr::V4(mask) }
        }
        IfAddr::V6(found) => {
            let mask = if found.netmask.is_unspecified() { u128::MAX.into() } else { found.netmask };
            Interface { address: found.ip.into(), mask: IpAddr::V6(mask) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_among_them_with_its_network() {
        let loopback =
            Interface { address: IpAddr::from([127, 0, 0, 1]), mask: IpAddr::from([255, 0, 0, 0]) };
        assert!(interfaces().contains(&loopback), "{:?}", interfaces());
    }

    #[test]
    fn without_a_mask_it_is_alone() {
        let found = if_addrs::Ifv4Addr {
            ip: [10, 0, 0, 1].into(),
            netmask: [0, 0, 0, 0].into(),
            prefixlen: 0,
            broadcast: None,
        };
        assert_eq!(of(&IfAddr::V4(found)).mask, IpAddr::from([255; 4]));
    }
}
