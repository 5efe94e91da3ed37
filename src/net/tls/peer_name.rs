//! Whether a server's certificate names the host that was asked for, by libpq's rules.
//!
//! Owns the comparison (`pq_verify_peer_name_matches_certificate`), which is older and laxer than RFC 6125 in one point: a
//! certificate without a fitting kind of alternative name is known by its common name. Knows no certificate, only names.

use std::net::IpAddr;

use crate::net::tls::certificate::PeerNames;

/// What a certificate's names say of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NameCheck {
    /// One of them is the host's.
    Named,
    /// None is; the first that was looked at, and how many there were.
    Other { first: String, names: usize },
    /// There is no name to compare.
    NoName,
    /// A name with a zero byte in it: somebody means to deceive (CVE-2009-4034).
    EmbeddedNul,
}

/// Compares the names with `host`, as it stands in the connection string.
pub(super) fn check_name(names: &PeerNames, host: &str) -> NameCheck {
    let address: Option<IpAddr> = host.parse().ok();
    let mut examined: Vec<String> = Vec::new();
    for name in &names.dns {
        match compare(name, host) {
            Compared::Same => return NameCheck::Named,
            Compared::EmbeddedNul => return NameCheck::EmbeddedNul,
            Compared::Other(name) => examined.push(name),
        }
    }
    for bytes in &names.ip {
        let found = address_of(bytes);
        if found.is_some() && found == address {
            return NameCheck::Named;
        }
        examined.push(found.map_or_else(|| "invalid address".to_owned(), |found| found.to_string()));
    }
    // The common name counts unless there is a name of the kind that was asked for.
    let has_kind = if address.is_some() { !names.ip.is_empty() } else { !names.dns.is_empty() };
    if let Some(name) = names.common_name.as_ref().filter(|_| !has_kind) {
        match compare(name, host) {
            Compared::Same => return NameCheck::Named,
            Compared::EmbeddedNul => return NameCheck::EmbeddedNul,
            Compared::Other(name) => examined.push(name),
        }
    }
    let names = examined.len();
    match examined.into_iter().next() {
        Some(first) => NameCheck::Other { first, names },
        None => NameCheck::NoName,
    }
}

enum Compared {
    Same,
    Other(String),
    EmbeddedNul,
}

fn compare(name: &[u8], host: &str) -> Compared {
    if name.contains(&0) {
        return Compared::EmbeddedNul;
    }
    let text = String::from_utf8_lossy(name).into_owned();
    if text.eq_ignore_ascii_case(host) || matches_wildcard(&text, host) {
        return Compared::Same;
    }
    Compared::Other(text)
}

/// `*.example.com` stands for one label in front, and only there.
fn matches_wildcard(pattern: &str, host: &str) -> bool {
    let Some(suffix) = pattern.strip_prefix('*').filter(|suffix| suffix.starts_with('.') && suffix.len() > 1)
    else {
        return false;
    };
    let Some(label) = host.len().checked_sub(suffix.len()).and_then(|end| host.get(..end)) else {
        return false;
    };
    let rest = host.get(label.len()..).unwrap_or_default();
    !label.is_empty() && !label.contains('.') && rest.eq_ignore_ascii_case(suffix)
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(four));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dns: &[&str], ip: &[&[u8]], common_name: Option<&str>) -> PeerNames {
        PeerNames {
            dns: dns.iter().map(|name| name.as_bytes().to_vec()).collect(),
            ip: ip.iter().map(|bytes| bytes.to_vec()).collect(),
            common_name: common_name.map(|name| name.as_bytes().to_vec()),
        }
    }

    #[test]
    fn a_common_name_counts_only_without_a_name_of_the_same_kind() {
        assert_eq!(check_name(&names(&[], &[], Some("db.example")), "DB.example"), NameCheck::Named);
        let other = NameCheck::Other { first: "other".to_owned(), names: 1 };
        assert_eq!(check_name(&names(&["other"], &[], Some("db.example")), "db.example"), other);
        assert_eq!(check_name(&names(&["other"], &[], Some("10.0.0.1")), "10.0.0.1"), NameCheck::Named);
        let refused = check_name(&names(&[], &[&[10, 0, 0, 2]], Some("10.0.0.1")), "10.0.0.1");
        assert_eq!(refused, NameCheck::Other { first: "10.0.0.2".to_owned(), names: 1 });
        assert_eq!(check_name(&names(&[], &[], None), "db"), NameCheck::NoName);
        // Addresses in names of the other kind do not take the common name's place.
        assert_eq!(check_name(&names(&[], &[&[10, 0, 0, 2]], Some("db")), "db"), NameCheck::Named);
    }

    #[test]
    fn addresses_are_compared_as_addresses() {
        let v6 = [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        assert_eq!(check_name(&names(&[], &[&v6], None), "2001:DB8::1"), NameCheck::Named);
        assert_eq!(check_name(&names(&[], &[&[127, 0, 0, 1]], None), "127.0.0.1"), NameCheck::Named);
        assert_eq!(check_name(&names(&["127.0.0.1"], &[], None), "127.0.0.1"), NameCheck::Named);
        let odd = check_name(&names(&[], &[&[1, 2, 3]], None), "1.2.3.0");
        assert_eq!(odd, NameCheck::Other { first: "invalid address".to_owned(), names: 1 });
    }

    #[test]
    fn a_wildcard_stands_for_one_label() {
        let named = |pattern, host| check_name(&names(&[pattern], &[], None), host) == NameCheck::Named;
        assert!(named("*.example.com", "a.EXAMPLE.com"));
        assert!(!named("*.example.com", "a.b.example.com"));
        assert!(!named("*.example.com", ".example.com"));
        assert!(!named("*.example.com", "example.com"));
        assert!(!named("a*.example.com", "ab.example.com"));
        assert!(!named("*", "host") && !named("*.", "host."));
        assert!(!named("*.example.com", "\u{e9}.com"));
    }

    #[test]
    fn a_zero_byte_in_a_name_is_an_attack() {
        let names = names(&["db.example\0.evil.example"], &[], None);
        assert_eq!(check_name(&names, "db.example"), NameCheck::EmbeddedNul);
    }
}
