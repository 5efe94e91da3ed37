//! Which relays WAL has come through: how a relay tells it to those behind it.
//!
//! Owns a setting that PostgreSQL does not have, reported at the start of a session like its own; clients pass over settings
//! that they do not know. Its value names the relay itself first, then its upstream, and so on. Each process has another name:
//! a copy of a data directory is no loop.

use std::fmt;

/// Name of the setting.
pub const PARAMETER: &str = "walrelay.instances";

/// A relay, the one before it, and so on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instances(Vec<String>);

impl Instances {
    /// A relay without an upstream that is a relay.
    pub fn of(own: String) -> Self {
        Self(vec![own])
    }

    /// What a server says of itself; names that no relay would give itself are passed over.
    pub fn parse(text: &str) -> Self {
        let is_name = |name: &&str| (1..=NAME_BYTES_MAX).contains(&name.len());
        Self(text.split(',').filter(is_name).take(INSTANCES_MAX).map(str::to_owned).collect())
    }

    /// The same relay with another upstream.
    pub fn behind(&self, upstream: &Self) -> Self {
        let own = self.0.iter().take(1);
        Self(own.chain(&upstream.0).take(INSTANCES_MAX).cloned().collect())
    }

    /// How far up the relay of `self` is among these: 0 is the first of them.
    pub fn place_in(&self, others: &Self) -> Option<usize> {
        let own = self.0.first()?;
        others.0.iter().position(|name| name == own)
    }
}

impl fmt::Display for Instances {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

/// Relays in a row that are told of.
const INSTANCES_MAX: usize = 16;

/// Longest name.
const NAME_BYTES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_finds_itself_among_those_before_it() {
        let [a, b, c] = ["a", "b", "c"].map(|name| Instances::of(name.to_owned()));
        let b = b.behind(&a);
        let c = c.behind(&Instances::parse(&b.to_string()));
        assert_eq!(c.to_string(), "c,b,a");
        assert_eq!(a.place_in(&c), Some(2));
        assert_eq!(c.place_in(&c), Some(0));
        assert_eq!(c.place_in(&b), None);
        assert_eq!(c.behind(&Instances::default()).to_string(), "c");
        let many = Instances::parse(&"x,".repeat(1000));
        assert_eq!(many.to_string().len(), 2 * INSTANCES_MAX - 1);
        assert_eq!(a.place_in(&Instances::parse("")), None);
    }
}
