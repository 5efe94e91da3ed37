//! What several standbys have by a policy.
//!
//! Owns the choice among their positions, as syncrep.c makes it. Has no memory and no clock.

use crate::protocol::acknowledge_policy::{AcknowledgePolicy, Method, Remote};
use crate::wal::Lsn;

/// A standby that counts: it streams, on our timeline, and is who it says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standby<'a> {
    /// Its `application_name`. Of several standbys with one name the last in the list counts: it came last.
    pub name: &'a str,
    /// What it has synced.
    pub flush: Option<Lsn>,
    /// What it has applied.
    pub apply: Option<Lsn>,
}

/// Positions of the standbys that the policy asks for; `None` when there are too few of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemotePositions {
    /// Synced by as many as are asked for.
    pub flush: Option<Lsn>,
    /// Applied by as many as are asked for.
    pub apply: Option<Lsn>,
}

/// What the standbys have by `policy`. `Local` asks for nobody's flush. What is applied is then what all have applied that
/// apply at all: whoever waits for it may read on any of them, and nobody can vouch for the others.
pub fn positions(policy: &AcknowledgePolicy, standbys: &[Standby<'_>]) -> RemotePositions {
    let newest = |at: usize| {
        let name = standbys.get(at).map_or("", |standby| standby.name);
        !standbys.iter().skip(at + 1).any(|later| later.name.eq_ignore_ascii_case(name))
    };
    let standbys: Vec<_> =
        standbys.iter().enumerate().filter(|(at, _)| newest(*at)).map(|(_, standby)| *standby).collect();
    match policy {
        AcknowledgePolicy::Local => {
            RemotePositions { flush: None, apply: standbys.iter().filter_map(|standby| standby.apply).min() }
        }
        AcknowledgePolicy::Remote(remote) => chosen(remote, &standbys),
    }
}

fn chosen(remote: &Remote, standbys: &[Standby<'_>]) -> RemotePositions {
    // As in syncrep.c a standby that has flushed nothing is no candidate.
    let mut candidates: Vec<_> = standbys
        .iter()
        .filter(|standby| standby.flush.is_some())
        .filter_map(|standby| Some((remote.priority(standby.name)?, *standby)))
        .collect();
    candidates.sort_by_key(|(priority, _)| *priority);
    if candidates.len() < remote.count {
        return RemotePositions::default();
    }
    if remote.method == Method::First {
        candidates.truncate(remote.count);
    }
    let nth_highest = |position: fn(&Standby<'_>) -> Option<Lsn>| {
        let mut positions: Vec<_> = candidates.iter().map(|(_, standby)| position(standby)).collect();
        positions.sort_unstable_by(|a, b| b.cmp(a));
        remote.count.checked_sub(1).and_then(|at| positions.get(at)).copied().flatten()
    };
    RemotePositions {
        flush: nth_highest(|standby| standby.flush),
        apply: nth_highest(|standby| standby.apply),
    }
}
