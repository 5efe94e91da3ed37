//! Who may have how many of the process's file descriptors.
//!
//! Owns the limit of open files and how it is divided: the store and the HTTP pages have theirs set aside, and clients
//! get what is left. A client that is too many is refused; it never costs the store a file, which would end acknowledging.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::admin;
use crate::downstream::{DownstreamSettings, REFUSALS_MAX, STRANGERS_MIN};

/// The limit leaves nothing for clients.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "insufficient file descriptors available to start server process: system allows {allowed}, server needs at least {needed}"
)]
pub struct TooFewDescriptors {
    /// What the system allows.
    allowed: usize,
    /// What the relay needs to serve one client.
    needed: usize,
}

/// Raises the limit of open files as far as the system lets it, and returns what it is then.
pub(super) fn raise_limit() -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // Where that is refused, less has to do.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
    let limit = getrlimit(Resource::Nofile).current;
    limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX)
}

/// Descriptors that are not for clients, with this many spare segments and listening sockets.
pub(super) fn set_aside(spare_segments: u32, listeners: usize) -> usize {
    // Of segments that are no longer needed, twice as many are kept.
    let spares = 2 * spare_segments as usize;
    let admin = admin::DESCRIPTORS_MAX;
    PROCESS_DESCRIPTORS + STORE_DESCRIPTORS + spares + admin + REFUSALS_MAX + listeners
}

/// Cuts the limits on clients down to what `allowed` descriptors can hold beside those that are set aside, and says so.
pub(super) fn fit(
    settings: &mut DownstreamSettings,
    allowed: usize,
    set_aside: usize,
) -> Result<(), TooFewDescriptors> {
    let needed = set_aside + SESSION_DESCRIPTORS + STRANGERS_MIN;
    if allowed < needed {
        return Err(TooFewDescriptors { allowed, needed });
    }
    let configured = settings.unauthenticated_max;
    let budget = allowed - set_aside;
    // Strangers must not take the place of standbys, nor keep them out.
    let strangers = settings.unauthenticated_max.min((budget / STRANGERS_SHARE).max(STRANGERS_MIN));
    let sessions = (budget - strangers) / SESSION_DESCRIPTORS;
    settings.unauthenticated_max = strangers;
    settings.unauthenticated_per_address_max = settings.unauthenticated_per_address_max.min(strangers);
    let wanted = settings.max_wal_senders;
    if sessions < wanted {
        // Strangers get what is configured once they are no larger a share than that of everything.
        let for_strangers = configured.saturating_mul(STRANGERS_SHARE);
        let for_both = configured.saturating_add(wanted.saturating_mul(SESSION_DESCRIPTORS));
        let limit = set_aside.saturating_add(for_strangers.max(for_both));
        tracing::warn!(
            max_wal_senders = wanted,
            possible = sessions,
            open_files = allowed,
            "max_wal_senders does not fit the limit of open files; raise that (LimitNOFILE, ulimit -n) to {limit}",
        );
        settings.max_wal_senders = sessions;
    }
    Ok(())
}

/// Standard streams, the runtime, signals, the upstream's connections, look-ups of names.
const PROCESS_DESCRIPTORS: usize = 16;
/// State files, directories, and segments that are being written; one record may extend over many.
const STORE_DESCRIPTORS: usize = 48;
/// A session's socket, the segment that waits to be sent, the one that is read, and the next one, read ahead.
const SESSION_DESCRIPTORS: usize = 4;
/// Clients that are not authenticated get at most this fraction of what clients can have.
const STRANGERS_SHARE: usize = 4;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::downstream::{SendPolicies, SendPolicy};
    use crate::net::TcpOptions;

    fn settings() -> DownstreamSettings {
        DownstreamSettings {
            max_wal_senders: 64,
            unauthenticated_max: 64,
            unauthenticated_per_address_max: 16,
            authentication_timeout: Duration::from_secs(1),
            wal_sender_timeout: None,
            send: SendPolicies::for_all(SendPolicy::Received),
            create_slots: false,
            wal_keep_size: 0,
            max_replication_slots: 0,
            tcp: TcpOptions::default(),
        }
    }

    fn fitted(allowed: usize) -> Result<[usize; 3], TooFewDescriptors> {
        let mut settings = settings();
        fit(&mut settings, allowed, 100)?;
        let DownstreamSettings {
            max_wal_senders,
            unauthenticated_max,
            unauthenticated_per_address_max: of_one,
            ..
        } = settings;
        assert!(100 + unauthenticated_max + max_wal_senders * SESSION_DESCRIPTORS <= allowed);
        Ok([max_wal_senders, unauthenticated_max, of_one])
    }

    #[test]
    fn what_is_wanted_is_given_where_it_fits() {
        assert_eq!(fitted(usize::MAX), Ok([64, 64, 16]));
        assert_eq!(fitted(100 + 64 + 64 * 4), Ok([64, 64, 16]));
    }

    #[test]
    fn clients_share_what_is_left_and_the_rest_is_not_touched() {
        assert_eq!(fitted(148), Ok([9, 12, 12]));
        assert_eq!(fitted(106), Ok([1, 2, 2]));
        assert_eq!(fitted(105), Err(TooFewDescriptors { allowed: 105, needed: 106 }));
    }
}
