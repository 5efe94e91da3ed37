//! From a connection string to a stream that may be trusted.
//!
//! Owns the order of checks on every connect: session attributes, system identifier, segment size, timeline, histories,
//! slot, starting point. Writes nothing but history files, server facts and, on the first start, the store's identity.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use bytes::Bytes;
use tokio::{task::block_in_place, time::timeout};

use crate::conninfo::{ChannelBinding, Conninfo, Host, HostAddress, ProcessSurroundings, TargetSessionAttrs};
use crate::net::{Socket, TcpOptions};
use crate::protocol::{
    Command, ServerError, SqlState,
    command::{StartReplication, StreamKind},
    frontend::{FirstPacket, Startup},
    scram::ChannelBindingPolicy,
};
use crate::store::{BlockId, Identity, ResumePlan, ServerFacts, Store, WalWriter};
use crate::upstream::slot::{SlotOrigin, UpstreamSlot};
use crate::upstream::{
    UpstreamError, UpstreamSettings,
    authenticate::{Credentials, open_session},
    dialog::{Dialog, StartCopyError},
    error::BehindUpstream,
};
use crate::wal::{Lsn, SegmentNo, SegmentSize, SystemId, TimelineHistory, TimelineId};

/// A server that answers, and what it says of itself.
pub(crate) struct Connected {
    pub(crate) dialog: Dialog,
    pub(crate) host: String,
    pub(crate) system: IdentifySystem,
    pub(crate) segment_size: SegmentSize,
    pub(crate) is_writable: bool,
    /// The server's `wal_sender_timeout`; `None` when it has none.
    pub(crate) sender_timeout: Option<Duration>,
    pub(crate) facts: ServerFacts,
}

/// The answer to IDENTIFY_SYSTEM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IdentifySystem {
    pub(crate) system_id: SystemId,
    pub(crate) timeline: TimelineId,
    pub(crate) flushed: Lsn,
}

/// A copy that has begun.
pub(crate) struct Streaming {
    pub(crate) socket: Socket,
    /// What came behind the server's answer.
    pub(crate) already_read: Bytes,
    /// A number for the block that `already_read` is in.
    pub(crate) block: BlockId,
    pub(crate) start: Lsn,
    /// End of what is held already; up to here the stream is compared.
    pub(crate) held_end: Lsn,
}

/// Tries the hosts in order until one has the session attributes that are asked for. `random` orders them where the
/// connection string asks for that.
pub(crate) async fn connect(settings: &UpstreamSettings, random: u64) -> Result<Connected, UpstreamError> {
    let mut conninfo = settings.conninfo.clone();
    conninfo.reread_passwords(&ProcessSurroundings);
    conninfo.check_without_tls()?;
    let wanted = match conninfo.target_session_attrs {
        TargetSessionAttrs::PreferStandby => vec![TargetSessionAttrs::Standby, TargetSessionAttrs::Any],
        other => vec![other],
    };
    let mut last = UpstreamError::NoHost;
    for wanted in wanted {
        let below = |n: usize| usize::try_from(random % n.max(1) as u64).unwrap_or(0);
        for host in conninfo.attempt_order(below) {
            match connect_to_host(&conninfo, host, wanted).await {
                Ok(connected) => return Ok(connected),
                Err(error) => {
                    tracing::debug!(%host, error = %error.chain(), "host did not serve");
                    last = error;
                }
            }
        }
    }
    Err(last)
}

enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

async fn connect_to_host(
    conninfo: &Conninfo,
    host: &Host,
    wanted: TargetSessionAttrs,
) -> Result<Connected, UpstreamError> {
    let mut last = UpstreamError::NoHost;
    for address in addresses(host).await? {
        let limit = conninfo.connect_timeout.unwrap_or(CONNECT_TIME_MAX);
        match timeout(limit, log_in(conninfo, host, &address)).await {
            // As libpq: a server that answers but will not do ends the attempt at this host.
            Ok(Ok(dialog)) => return interrogate(dialog, wanted, host).await,
            Ok(Err(error)) => last = error,
            Err(_) => last = UpstreamError::ConnectTimeout { host: host.to_string() },
        }
    }
    Err(last)
}

async fn addresses(host: &Host) -> Result<Vec<Address>, UpstreamError> {
    match &host.address {
        HostAddress::UnixSocket(path) => Ok(vec![Address::Unix(path.clone())]),
        HostAddress::Ip(ip) => Ok(vec![Address::Tcp(SocketAddr::new(*ip, host.port))]),
        HostAddress::Name(name) => {
            let resolved = tokio::net::lookup_host((name.as_str(), host.port)).await;
            let resolved =
                resolved.map_err(|source| UpstreamError::Resolve { host: name.clone(), source })?;
            Ok(resolved.take(ADDRESSES_MAX).map(Address::Tcp).collect())
        }
    }
}

async fn log_in(conninfo: &Conninfo, host: &Host, address: &Address) -> Result<Dialog, UpstreamError> {
    let mut dialog = Dialog::new(dial(conninfo, host, address).await?);
    let startup = FirstPacket::Startup(Startup::new(conninfo.startup_parameters()));
    let credentials = Credentials {
        user: &conninfo.user,
        password: conninfo.password_for(host),
        require_auth: &conninfo.require_auth,
        channel_binding: match conninfo.channel_binding {
            ChannelBinding::Disable => ChannelBindingPolicy::Disable,
            ChannelBinding::Prefer => ChannelBindingPolicy::Prefer,
            ChannelBinding::Require => ChannelBindingPolicy::Require,
        },
    };
    open_session(&mut dialog, &startup, &credentials).await?;
    Ok(dialog)
}

async fn dial(conninfo: &Conninfo, host: &Host, address: &Address) -> Result<Socket, UpstreamError> {
    let outcome = match address {
        Address::Tcp(address) => Socket::connect_tcp(*address, &tcp_options(conninfo)).await,
        Address::Unix(path) => Socket::connect_unix(path).await,
    };
    outcome.map_err(|source| UpstreamError::Connect { host: host.to_string(), source })
}

fn tcp_options(conninfo: &Conninfo) -> TcpOptions {
    let keepalives = conninfo.keepalives.unwrap_or_default();
    TcpOptions {
        keepalives: conninfo.keepalives.is_some(),
        keepalives_idle: keepalives.idle,
        keepalives_interval: keepalives.interval,
        keepalives_count: keepalives.count,
        tcp_user_timeout: conninfo.tcp_user_timeout,
    }
}

/// Asks the server what it is, and whether it is of the kind that was asked for.
async fn interrogate(
    mut dialog: Dialog,
    wanted: TargetSessionAttrs,
    host: &Host,
) -> Result<Connected, UpstreamError> {
    let in_recovery = dialog.parameters.get("in_hot_standby").cloned();
    let read_only = dialog.show("transaction_read_only").await? == "on";
    let is_standby = in_recovery.map_or(read_only, |value| value == "on");
    check_session_attributes(wanted, read_only, is_standby)?;
    let system = identify_system(&mut dialog).await?;
    let size_text = dialog.show("wal_segment_size").await?;
    let segment_size = size_text.parse().map_err(|_| UpstreamError::InvalidAnswer {
        command: "SHOW wal_segment_size",
        field: "value",
        value: size_text,
    })?;
    let sender_timeout = parse_milliseconds(&dialog.show("wal_sender_timeout").await?);
    let facts = server_facts(&mut dialog).await?;
    let (host, is_writable) = (host.to_string(), !read_only);
    Ok(Connected { dialog, host, system, segment_size, is_writable, sender_timeout, facts })
}

fn check_session_attributes(
    wanted: TargetSessionAttrs,
    read_only: bool,
    is_standby: bool,
) -> Result<(), UpstreamError> {
    let refusal = match wanted {
        TargetSessionAttrs::Any | TargetSessionAttrs::PreferStandby => None,
        TargetSessionAttrs::ReadWrite => read_only.then_some("session is read-only"),
        TargetSessionAttrs::ReadOnly => (!read_only).then_some("session is not read-only"),
        TargetSessionAttrs::Primary => is_standby.then_some("server is in hot standby mode"),
        TargetSessionAttrs::Standby => (!is_standby).then_some("server is not in hot standby mode"),
    };
    refusal.map_or(Ok(()), |text| Err(UpstreamError::WrongSessionAttributes(text)))
}

async fn identify_system(dialog: &mut Dialog) -> Result<IdentifySystem, UpstreamError> {
    let rows = dialog.query(&Command::IdentifySystem).await?;
    let field = |column: usize, field: &'static str| {
        let value = rows.first().and_then(|row| row.text(column)).unwrap_or_default().to_owned();
        (value.clone(), UpstreamError::InvalidAnswer { command: "IDENTIFY_SYSTEM", field, value })
    };
    let (text, error) = field(0, "systemid");
    let system_id = text.parse().map_err(|_| error)?;
    let (text, error) = field(1, "timeline");
    let timeline = text.parse().ok().and_then(TimelineId::new).ok_or(error)?;
    let (text, error) = field(2, "xlogpos");
    let flushed = text.parse().map_err(|_| error)?;
    Ok(IdentifySystem { system_id, timeline, flushed })
}

/// What our own clients will ask of us while this server may be away.
async fn server_facts(dialog: &mut Dialog) -> Result<ServerFacts, UpstreamError> {
    let version_num = dialog.show("server_version_num").await?;
    let version_num = version_num.parse().map_err(|_| UpstreamError::InvalidAnswer {
        command: "SHOW server_version_num",
        field: "value",
        value: version_num,
    })?;
    let mut settings: BTreeMap<String, String> = dialog.parameters.clone();
    for name in MIRRORED_SETTINGS {
        settings.insert((*name).to_owned(), dialog.show(name).await?);
    }
    let version = settings.get("server_version").cloned().unwrap_or_default();
    Ok(ServerFacts { version, version_num, settings })
}

/// `SHOW wal_sender_timeout` prints a number with a unit, or 0.
fn parse_milliseconds(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (count, unit) = text.split_at_checked(split)?;
    let count: u64 = count.parse().ok()?;
    let milliseconds = match unit {
        "" | "ms" => 1,
        "s" => 1000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    (count > 0).then(|| Duration::from_millis(count.saturating_mul(milliseconds)))
}

/// Checks that the server is the one whose WAL is held, and fetches what histories are missing. Changes nothing on the
/// server, and nothing in an empty store.
pub(crate) async fn check_server(
    connected: &mut Connected,
    store: &Store,
    writer: &WalWriter,
) -> Result<(), UpstreamError> {
    let found = identity(connected);
    if let Some(held) = store.identity() {
        if held.system_id != found.system_id {
            return Err(UpstreamError::WrongSystem { expected: held.system_id, got: found.system_id });
        }
        if held.segment_size != found.segment_size {
            let (expected, got) = (held.segment_size, found.segment_size);
            return Err(UpstreamError::WrongSegmentSize { expected, got });
        }
    }
    let got = connected.system.timeline;
    if let Some(plan) = writer.plan() {
        if got < plan.timeline {
            return Err(UpstreamError::TimelineBehind { expected: plan.timeline, got });
        }
        if got > plan.timeline {
            return Err(UpstreamError::TimelineAhead { expected: plan.timeline, got });
        }
    }
    fetch_histories(connected, store).await
}

/// Where an empty store begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beginning {
    /// With what the slot keeps, or where it was begun already.
    AsPlanned,
    /// Where the upstream is now: the WAL that it was to begin with is gone, and nothing of it was received.
    Anew,
}

/// Gives an empty store its identity and start, and finds out where to go on.
pub(crate) fn plan_stream(
    connected: &Connected,
    store: &Store,
    writer: &mut WalWriter,
    slot: UpstreamSlot,
    beginning: Beginning,
) -> Result<ResumePlan, UpstreamError> {
    let found = identity(connected);
    let got = connected.system.timeline;
    let reserved = slot.restart_lsn;
    let held_before = writer.plan().is_some();
    let begins_anew = beginning == Beginning::Anew && writer.holds_nothing();
    if !held_before || begins_anew {
        if let Some(slot_restart_lsn) = reserved.filter(|_| slot.origin == SlotOrigin::Found) {
            tracing::warn!(
                %slot_restart_lsn,
                "the data directory is empty, but the upstream's slot has been in use: if this relay has run before, \
                 its directory was lost or is not mounted"
            );
        }
        // A timeline's files begin with the segment of its switch point, whatever the slot keeps of its parent.
        let reserved = reserved.filter(|_| !begins_anew);
        let first = reserved.unwrap_or(connected.system.flushed).max(switch_lsn(store, got)?);
        let start = SegmentNo::holding(first, found.segment_size).start(found.segment_size);
        block_in_place(|| writer.initialize(found, got, start.unwrap_or(Lsn::MIN)))?;
    }
    block_in_place(|| store.remember_facts(connected.facts.clone()))?;
    let plan = writer.plan().ok_or_else(|| UpstreamError::Unexpected("store without identity".to_owned()))?;
    if let Some(reserved) = reserved
        .filter(|&reserved| held_before && slot.origin == SlotOrigin::Found && reserved > plan.held_end)
    {
        tracing::error!(
            slot_restart_lsn = %reserved, held_end = %plan.held_end,
            "the upstream's slot is ahead of this relay: WAL that was acknowledged has been lost here"
        );
    }
    if connected.system.flushed < plan.newest_start {
        let upstream = if connected.is_writable { BehindUpstream::Primary } else { BehindUpstream::Standby };
        let flushed = connected.system.flushed;
        return Err(UpstreamError::BehindUs {
            flushed,
            held_end: plan.held_end,
            timeline: plan.timeline,
            upstream,
        });
    }
    Ok(plan)
}

fn identity(connected: &Connected) -> Identity {
    Identity { system_id: connected.system.system_id, segment_size: connected.segment_size }
}

/// Where a timeline began; the lowest position for the first.
fn switch_lsn(store: &Store, timeline: TimelineId) -> Result<Lsn, UpstreamError> {
    let Some(content) = block_in_place(|| store.history(timeline))? else { return Ok(Lsn::MIN) };
    let history = TimelineHistory::parse(timeline, &content)?;
    Ok(history.ancestors().last().map_or(Lsn::MIN, |parent| parent.switch_lsn))
}

/// Stores every history file up to the upstream's timeline that is not held, also of timelines that are no ancestors:
/// standbys ask for each number in turn. A missing one that is not an ancestor's is passed over.
async fn fetch_histories(connected: &mut Connected, store: &Store) -> Result<(), UpstreamError> {
    let newest = connected.system.timeline.get();
    for timeline in (2..=newest).filter_map(TimelineId::new) {
        if block_in_place(|| store.history(timeline))?.is_some() {
            continue;
        }
        let rows = match connected.dialog.query(&Command::TimelineHistory(timeline)).await {
            Ok(rows) => rows,
            Err(UpstreamError::Server(error))
                if error.is(SqlState::UNDEFINED_FILE) && timeline.get() < newest =>
            {
                continue;
            }
            Err(error) => return Err(error),
        };
        let content = rows.first().and_then(|row| row.value(1)).cloned().unwrap_or_default();
        block_in_place(|| store.store_history(timeline, &content))?;
    }
    Ok(())
}

/// Starts the stream at one of the places that the plan names.
pub(crate) async fn start_streaming(
    connected: Connected,
    plan: &ResumePlan,
    start: Lsn,
    settings: &UpstreamSettings,
    block: BlockId,
) -> Result<Streaming, UpstreamError> {
    let command = Command::StartReplication(StartReplication {
        slot: settings.slot.clone(),
        start: Some(start),
        kind: StreamKind::Physical { timeline: Some(plan.timeline) },
    });
    match connected.dialog.start_copy(&command).await {
        Ok((socket, already_read)) => {
            let held_end = plan.held_end;
            Ok(Streaming { socket, already_read, block, start, held_end })
        }
        Err(StartCopyError::Refused(dialog, error)) => {
            dialog.terminate().await;
            Err(stream_refused(*error, plan.held_end))
        }
        Err(StartCopyError::TimelineEndsHere) => {
            let (expected, got) = (plan.timeline, connected.system.timeline);
            Err(UpstreamError::TimelineAhead { expected, got })
        }
        Err(StartCopyError::Failed(error)) => Err(error),
    }
}

/// What an error means that a server sends when a stream starts or runs.
pub(crate) fn stream_refused(error: ServerError, held_end: Lsn) -> UpstreamError {
    if error.is(SqlState::UNDEFINED_FILE) {
        return UpstreamError::WalRemoved { held_end, source: Box::new(error) };
    }
    UpstreamError::Server(Box::new(error))
}

/// Addresses tried of one host name.
const ADDRESSES_MAX: usize = 16;

/// Time to connect and authenticate where the connection string sets none; libpq would wait for ever.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(30);

/// Settings of the upstream that clients ask of the relay.
const MIRRORED_SETTINGS: &[&str] =
    &["data_directory_mode", "wal_segment_size", "wal_block_size", "wal_level"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_the_server_shows_them() {
        assert_eq!(parse_milliseconds("1min"), Some(Duration::from_secs(60)));
        assert_eq!(parse_milliseconds("2500ms"), Some(Duration::from_millis(2500)));
        assert_eq!(parse_milliseconds("3s"), Some(Duration::from_secs(3)));
        for text in ["0", "", "5 parsecs", "-1"] {
            assert_eq!(parse_milliseconds(text), None, "{text}");
        }
    }
}
