//! What operators see: plain data, named after PostgreSQL's views and their columns.
//!
//! Owns the shape of `/status`, nothing of its content: each part fills in what it knows. Unknown is absent (`null`), never
//! zero, and no field claims more than was proved.

use std::{net::IpAddr, time::Duration};

use serde::Serialize;

use crate::wal::{Lsn, PgTimestamp, TimelineId};

/// Everything `/status` tells.
#[derive(Clone, Debug, Serialize)]
pub struct Overview {
    /// The relay's own name.
    pub name: String,
    /// Version of the program.
    pub version: &'static str,
    /// `server_version` of the upstream, as last heard.
    pub server_version: Option<String>,
    /// The cluster whose WAL this is.
    pub system_identifier: Option<String>,
    /// The upstream connection.
    pub upstream: UpstreamStatus,
    /// What is held.
    pub store: StoreStatus,
    /// What is held nowhere else, as far as standbys of this relay tell; absent until that has been looked at.
    pub only_copy: Option<OnlyCopyStatus>,
    /// The compressed link from the relay before this one, if there is one.
    pub upstream_link: Option<LinkStatus>,
    /// How fast compressed links to relays behind this one may send.
    pub links: LinksStatus,
    /// What became of the files that were read again last.
    pub reload: ReloadStatus,
    /// Downstream connections (`pg_stat_replication`).
    pub downstream: Vec<WalSenderStatus>,
    /// Downstream slots (`pg_replication_slots`).
    pub slots: Vec<ReplicationSlotStatus>,
    /// Consumers without a slot for which WAL is kept.
    pub consumers: Vec<ConsumerStatus>,
}

/// What is held of the timeline that is being received. Positions are absent before the first connection.
#[derive(Clone, Debug, Serialize)]
pub struct StoreStatus {
    /// `healthy`, or what is wrong.
    pub condition: String,
    /// The timeline.
    pub timeline: Option<TimelineId>,
    /// Start of the oldest segment held.
    pub oldest: Option<Lsn>,
    /// End of the last record that was checked whole.
    pub verified: Option<Lsn>,
    /// Given to the operating system.
    pub written: Option<Lsn>,
    /// On stable storage: what is reported upstream.
    pub flushed: Option<Lsn>,
    /// End of the last complete, renamed segment.
    pub sealed: Option<Lsn>,
    /// Segments that are damaged, and not repaired yet; oldest first.
    pub damaged: Vec<DamagedSegmentStatus>,
    /// What was held beyond where a timeline was left, and is held still, set aside.
    pub dead_branches: Vec<DeadBranchStatus>,
}

/// A segment that is not as it was written, has gone, or cannot be read.
#[derive(Clone, Debug, Serialize)]
pub struct DamagedSegmentStatus {
    /// Name of its file.
    pub segment: String,
    /// What was found.
    pub detail: String,
    /// Why it could not be fetched again yet.
    pub repair_error: Option<String>,
}

/// WAL that exists only here, because the timeline it is on was left before it.
#[derive(Clone, Debug, Serialize)]
pub struct DeadBranchStatus {
    /// The timeline.
    pub timeline: TimelineId,
    /// The one that goes on from the fork.
    pub next: TimelineId,
    /// Where it was left.
    pub fork: Lsn,
    /// End of what was held.
    pub end: Lsn,
    /// From the fork to the end.
    pub bytes: u64,
    /// WAL records there.
    pub records: u64,
    /// Transactions committed there.
    pub commits: u64,
    /// When the first of them was committed, by the server's clock.
    pub first_commit: Option<Timestamp>,
    /// When the last of them was committed.
    pub last_commit: Option<Timestamp>,
    /// Ids of the transactions that wrote there.
    pub transactions: Vec<u32>,
    /// Whether there were more, or one whose id could not be read.
    pub has_more_transactions: bool,
    /// File in the data directory that tells of it.
    pub report: String,
}

/// State of the upstream connection, by the names of `pg_stat_wal_receiver`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WalReceiverState {
    /// Connecting and checking.
    #[default]
    Connecting,
    /// WAL flows.
    Streaming,
    /// Waiting before the next attempt.
    Waiting,
    /// Ended.
    Stopped,
}

/// WAL that was acknowledged, by what the upstream's slot says, and is not held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LostWal {
    /// End of what was durable here when the stream began.
    pub from: Lsn,
    /// What a slot says, or has said, was acknowledged.
    pub to: Lsn,
}

/// WAL that follows what is held, and that the upstream has removed: nobody who waits for it here will get it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RemovedWal {
    /// The timeline.
    pub timeline: TimelineId,
    /// End of what is held.
    pub from: Lsn,
    /// End of what the upstream had when it refused; where its WAL begins again it does not tell.
    pub to: Lsn,
}

/// What is acknowledged upstream, and by which policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AcknowledgeStatus {
    /// The policy.
    pub policy: Option<String>,
    /// Acknowledged as flushed.
    pub flush: Option<Lsn>,
    /// Acknowledged as applied.
    pub apply: Option<Lsn>,
    /// Whether WAL is acknowledged although the standbys that the policy asks for do not have it.
    pub degraded: bool,
    /// Whether nothing more is acknowledged because what was has been at no standby for too long.
    pub held_back: bool,
    /// WAL of which the first was true, oldest first.
    pub local_windows: Vec<LocalWindowStatus>,
}

/// WAL that was acknowledged while it was durable here alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LocalWindowStatus {
    /// The timeline that was received then.
    pub timeline: TimelineId,
    /// Its start.
    pub from: Lsn,
    /// Its end.
    pub to: Lsn,
    /// Whether the standbys are still without it.
    pub open: bool,
    /// Whether its timeline was left before it: then the standbys never had it, and never will.
    pub left: bool,
}

/// Whether anything may be received or acknowledged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FenceStatus {
    /// Whether nothing is, durably.
    pub fenced: bool,
    /// Since when, by the clock of this machine.
    pub since: Option<Timestamp>,
    /// The cluster whose WAL is held.
    pub system_identifier: Option<String>,
    /// The timeline at whose end it stopped.
    pub timeline: Option<TimelineId>,
    /// End of what is held durably: nothing beyond was acknowledged.
    pub flushed: Option<Lsn>,
}

/// What became of the files that were read again last (SIGHUP, `POST /reload`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReloadStatus {
    /// When that was; absent when it never was since the start.
    pub at: Option<Timestamp>,
    /// What was wrong, until they are read without an error: what was read before holds.
    pub error: Option<String>,
}

/// WAL that was acknowledged upstream and that no standby of the relay has flushed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OnlyCopyStatus {
    /// How much.
    pub bytes: u64,
    /// Since when the oldest of it.
    pub since: Option<Timestamp>,
}

/// What operators see of the upstream.
#[derive(Clone, Debug, Default, Serialize)]
pub struct UpstreamStatus {
    /// State of the connection.
    pub state: WalReceiverState,
    /// The server connected to last.
    pub host: Option<String>,
    /// Timeline streamed.
    pub timeline: Option<TimelineId>,
    /// End of the bytes received, verified or not.
    pub received: Option<Lsn>,
    /// Whether the server accepts writes; false while there is no stream.
    pub is_writable: bool,
    /// Sessions that reached streaming.
    pub sessions: u64,
    /// What is acknowledged.
    pub acknowledge: AcknowledgeStatus,
    /// `pg_stat_replication.sync_state` of this relay there, as last seen; absent where the server does not tell, and when it has
    /// not been seen for too long.
    pub sync_state: Option<String>,
    /// Others that report there under this relay's `application_name`; absent where the server does not tell.
    pub namesakes: Option<u32>,
    /// Whether the primary is expected to wait for this relay and does not, or does not say so.
    pub not_synchronous: bool,
    /// Whether it has been left on demand.
    pub fence: FenceStatus,
    /// WAL that was acknowledged and has been lost here, until it is there again; until then nothing is acknowledged.
    pub lost: Option<LostWal>,
    /// The newest of it that will not come back: the timeline that is followed goes on without it. Until its report is moved out
    /// of the data directory.
    pub lost_for_good: Option<LostWal>,
    /// WAL that the upstream has removed before it was received, until more than was held then is here.
    pub removed: Option<RemovedWal>,
    /// The data directory was empty when the process started, though the upstream's slot kept WAL already: it had been in use, or
    /// was made beforehand and never used, which servers do not tell apart. Until the next start.
    pub started_empty: bool,
    /// A server was followed that had less than this relay: see `store.dead_branches`. Until the report is moved out of the data
    /// directory.
    pub diverged: bool,
    /// Why the slot there could not be moved for a while, where SQL moves it: the upstream keeps WAL without limit meanwhile.
    pub slot_error: Option<String>,
    /// What the last attempt or session ended with needs a person.
    #[serde(skip)]
    pub cannot_follow: bool,
    /// Why the last attempt or session ended.
    pub last_error: Option<String>,
    /// Whether a person must look at it: before it can go on, or because something was lost.
    pub needs_attention: bool,
}

impl UpstreamStatus {
    /// Whether there is something that a person must know of: it does not go on without one, or, however well WAL flows now,
    /// something was lost or set aside, nobody waits for it, or the upstream's disk fills up.
    pub fn is_hurt(&self) -> bool {
        let is_lost = self.lost.is_some() || self.lost_for_good.is_some() || self.removed.is_some();
        let is_wrong = self.diverged || self.not_synchronous || self.slot_error.is_some();
        is_lost || is_wrong || self.started_empty || self.cannot_follow
    }
}

/// State of a sending side (`WalSndState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WalSenderState {
    /// Connected, not streaming.
    Startup,
    /// Sending what the standby missed.
    Catchup,
    /// Everything that may be sent was sent at least once.
    Streaming,
    /// Sending the rest before the relay ends.
    Stopping,
}

impl WalSenderState {
    /// As `pg_stat_replication.state` shows it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Startup => "startup",
            Self::Catchup => "catchup",
            Self::Streaming => "streaming",
            Self::Stopping => "stopping",
        }
    }
}

/// A downstream connection, as `pg_stat_replication` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct WalSenderStatus {
    /// The connection's number, unique among the living.
    pub pid: u32,
    /// Who logged in.
    pub usename: String,
    /// Name the client gave itself.
    pub application_name: String,
    /// Where it came from; absent for a Unix socket.
    pub client_addr: Option<IpAddr>,
    /// Its port; absent for a Unix socket.
    pub client_port: Option<u16>,
    /// When it connected.
    pub backend_start: Timestamp,
    /// What it does now.
    pub state: WalSenderState,
    /// Timeline of the stream.
    pub timeline: Option<TimelineId>,
    /// Slot in use.
    pub slot_name: Option<String>,
    /// End of what was sent.
    pub sent_lsn: Option<Lsn>,
    /// What the standby reports as written.
    pub write_lsn: Option<Lsn>,
    /// What it reports as synced.
    pub flush_lsn: Option<Lsn>,
    /// What it reports as applied.
    pub replay_lsn: Option<Lsn>,
    /// Time from sendable here to written there.
    pub write_lag: Option<Seconds>,
    /// Time from sendable here to synced there.
    pub flush_lag: Option<Seconds>,
    /// Time from sendable here to applied there.
    pub replay_lag: Option<Seconds>,
    /// When its last report was sent, by its clock.
    pub reply_time: Option<Timestamp>,
    /// What the link carries, where WAL goes compressed to a relay.
    pub link: Option<LinkStatus>,
    /// Oldest transaction that its queries hold back; a slot's is shown with the slot.
    pub backend_xmin: Option<u32>,
}

/// What a compressed link has carried in its session.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinkStatus {
    /// The codec that both sides agreed upon, with its level.
    pub codec: String,
    /// How the last message was encoded: `zstd`, `lz4`, `none`.
    pub encoding: &'static str,
    /// WAL.
    pub wal_bytes: u64,
    /// What it took to carry it.
    pub wire_bytes: u64,
    /// The one by the other; absent before anything was carried.
    pub ratio: Option<f64>,
    /// Bytes on the wire in a second, over the last five.
    pub wire_rate: f64,
}

/// How fast compressed links may send, in bytes a second; absent: as fast as they can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LinksStatus {
    /// Each of them.
    pub link_rate_max: Option<u64>,
    /// All together.
    pub links_rate_max: Option<u64>,
}

/// A slot, as `pg_replication_slots` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReplicationSlotStatus {
    /// The slot's name.
    pub slot_name: String,
    /// Always `physical`.
    pub slot_type: &'static str,
    /// Whether it goes with the connection that made it.
    pub temporary: bool,
    /// Whether a connection uses it.
    pub active: bool,
    /// That connection's pid.
    pub active_pid: Option<u32>,
    /// Oldest transaction whose rows the consumer's queries need.
    pub xmin: Option<u32>,
    /// The same for the catalog's rows.
    pub catalog_xmin: Option<u32>,
    /// Oldest WAL the consumer may still need.
    pub restart_lsn: Option<Lsn>,
    /// Whether that WAL is there: `reserved`, `extended`, `unreserved`, `lost`.
    pub wal_status: Option<&'static str>,
    /// Bytes that can be written before the slot is in danger, if what slots may keep is limited, by `max_slot_wal_keep_size`
    /// or by the disk budget.
    pub safe_wal_size: Option<i64>,
    /// Logical slots alone have it.
    pub two_phase: bool,
    /// Since when nobody uses it, by the wall clock; not before this process started.
    pub inactive_since: Option<Timestamp>,
    /// Logical slots alone have it.
    pub conflicting: Option<bool>,
    /// Why it keeps nothing any more: `wal_removed`, `idle_timeout`.
    pub invalidation_reason: Option<&'static str>,
    /// Logical slots alone have it.
    pub failover: bool,
    /// Logical slots alone have it.
    pub synced: bool,
}

impl ReplicationSlotStatus {
    /// A physical slot that was just made, with nothing reserved.
    pub fn physical(slot_name: String) -> Self {
        Self {
            slot_name,
            slot_type: "physical",
            temporary: false,
            active: false,
            active_pid: None,
            xmin: None,
            catalog_xmin: None,
            restart_lsn: None,
            wal_status: None,
            safe_wal_size: None,
            two_phase: false,
            inactive_since: None,
            conflicting: None,
            invalidation_reason: None,
            failover: false,
            synced: false,
        }
    }
}

/// A consumer without a slot for which WAL is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConsumerStatus {
    /// Name the client gave itself.
    pub application_name: String,
    /// Whether a session of that name streams.
    pub active: bool,
    /// Oldest WAL that is kept for it.
    pub restart_lsn: Lsn,
}

/// A duration that is shown in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seconds(pub Duration);

impl Serialize for Seconds {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0.as_secs_f64())
    }
}

/// A time that is shown as RFC 3339 in UTC, with microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub PgTimestamp);

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match jiff::Timestamp::from_microsecond(self.0.unix_micros()) {
            Ok(time) => serializer.collect_str(&format_args!("{time:.6}")),
            Err(_) => serializer.serialize_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_is_null_and_states_have_postgresqls_names() {
        let status = WalSenderStatus {
            pid: 7,
            usename: "replicator".to_owned(),
            application_name: "dc2_a".to_owned(),
            client_addr: None,
            client_port: None,
            backend_start: Timestamp(PgTimestamp(1)),
            state: WalSenderState::Catchup,
            timeline: Some(TimelineId::FIRST),
            slot_name: None,
            sent_lsn: Lsn::new(0x16_B374_D848),
            write_lsn: None,
            flush_lsn: None,
            replay_lsn: None,
            write_lag: Some(Seconds(Duration::from_millis(1_500))),
            flush_lag: None,
            replay_lag: None,
            reply_time: None,
            link: None,
            backend_xmin: None,
        };
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["state"], "catchup");
        assert_eq!(json["sent_lsn"], "16/B374D848");
        assert_eq!(json["flush_lsn"], serde_json::Value::Null);
        assert_eq!(json["write_lag"], 1.5);
        assert_eq!(json["backend_start"], "2000-01-01T00:00:00.000001Z");
    }
}
