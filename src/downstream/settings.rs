//! What clients are held to: limits, times and the send policy, as plain values.

use std::time::Duration;

use crate::config::Config;
use crate::net::TcpOptions;
use crate::store::Positions;
use crate::wal::Lsn;

pub use crate::config::{SendPolicies, SendPolicy};

/// What clients are held to.
#[derive(Clone, Debug)]
pub struct DownstreamSettings {
    /// Most sessions at a time.
    pub max_wal_senders: usize,
    /// Most connections at a time that have not authenticated yet; they do not count as sessions.
    pub unauthenticated_max: usize,
    /// The same for one address.
    pub unauthenticated_per_address_max: usize,
    /// Time a client has from the connection to the end of its authentication.
    pub authentication_timeout: Duration,
    /// Silence after which a client is dropped, unless it sets its own; `None` never drops one.
    pub wal_sender_timeout: Option<Duration>,
    /// When WAL may be sent.
    pub send: SendPolicies,
    /// Whether a slot that a client wants to use is created when it is absent.
    pub create_slots: bool,
    /// WAL kept for consumers without a slot, in bytes; for `SHOW`.
    pub wal_keep_size: u64,
    /// Most slots; for `SHOW`.
    pub max_replication_slots: usize,
    /// Options of accepted TCP connections.
    pub tcp: TcpOptions,
}

impl DownstreamSettings {
    /// As the configuration has it.
    pub fn of(config: &Config) -> Self {
        let Config { downstream, store, .. } = config;
        Self {
            max_wal_senders: downstream.max_wal_senders,
            unauthenticated_max: downstream.unauthenticated_connections_max,
            unauthenticated_per_address_max: downstream.unauthenticated_connections_per_address_max,
            authentication_timeout: downstream.authentication_timeout,
            wal_sender_timeout: downstream.wal_sender_timeout,
            send: downstream.send.clone(),
            create_slots: downstream.create_slots,
            wal_keep_size: store.wal_keep_size,
            max_replication_slots: store.max_replication_slots,
            tcp: TcpOptions::from(&downstream.tcp),
        }
    }

    /// End of what may be sent now to a client of this name.
    pub(super) fn servable(&self, application_name: &str, positions: &Positions) -> Lsn {
        match self.send.of(application_name) {
            SendPolicy::Received => positions.verified,
            SendPolicy::Flushed => positions.flushed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::TimelineId;

    #[test]
    fn the_policy_decides_between_verified_and_durable() {
        let at = |raw| Lsn::new(raw).unwrap();
        let positions = Positions {
            timeline: TimelineId::FIRST,
            verified: at(300),
            written: at(200),
            flushed: at(100),
            sealed: None,
        };
        let servable = |send, application_name| {
            let tcp = TcpOptions::default();
            let settings = DownstreamSettings {
                max_wal_senders: 1,
                unauthenticated_max: 1,
                unauthenticated_per_address_max: 1,
                authentication_timeout: Duration::ZERO,
                wal_sender_timeout: None,
                send,
                create_slots: false,
                wal_keep_size: 0,
                max_replication_slots: 0,
                tcp,
            };
            settings.servable(application_name, &positions)
        };
        assert_eq!(servable(SendPolicies::for_all(SendPolicy::Received), "a"), at(300));
        assert_eq!(servable(SendPolicies::for_all(SendPolicy::Flushed), "a"), at(100));
        let by_name = [("archiver".to_owned(), SendPolicy::Flushed)].into();
        let send = SendPolicies { default: SendPolicy::Received, by_name };
        assert_eq!(servable(send.clone(), "Archiver"), at(100));
        assert_eq!(servable(send, "standby"), at(300));
    }
}
