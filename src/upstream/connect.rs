//! From a connection string to a stream that may be trusted.
//!
//! Owns the order of checks on every connect: session attributes, page size, system identifier, segment size, timeline,
//! histories, slot, starting point. Writes nothing but history files, server facts and, on the first start, the store's identity.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use crate::conninfo::{Conninfo, Host, ProcessSurroundings, TargetSessionAttrs};
use crate::net::Socket;
use crate::protocol::{
    Command, ServerError, SqlState,
    command::{StartReplication, StreamKind},
    instances::PARAMETER,
};
use crate::session::timelines::{Refusal, Route, route};
use crate::store::{BlockId, Identity, ResumePlan, ServerFacts, Store, WalWriter};
use crate::upstream::blocking::block_in_place;
use crate::upstream::patroni::{self, UnnamedLeader};
use crate::upstream::retained::SlotMover;
use crate::upstream::slot::{SlotOrigin, UpstreamSlot, slot_refused};
use crate::upstream::slot_use::mover;
use crate::upstream::{
    Advice, OnDivergence, UpstreamError, UpstreamSettings,
    dial::log_in_for,
    dialog::{Dialog, StartCopyError},
    error::BehindUpstream,
    facts::{check_page_size, parse_milliseconds, server_facts},
    histories::{NewestHistory, check_newest},
    link::LinkWish,
    looking,
};
use crate::wal::{Lsn, SegmentNo, SegmentSize, SystemId, TimelineId};

/// A server that answers, and what it says of itself.
pub(crate) struct Connected {
    pub(crate) dialog: Dialog,
    pub(crate) host: String,
    pub(crate) system: IdentifySystem,
    /// Where its timeline began; the lowest position for the first, and until the history is known.
    pub(crate) switch_lsn: Lsn,
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

/// How hosts are tried, beside what the connection string says.
#[derive(Default)]
pub(crate) struct Order<'a> {
    /// Where the connection string asks for a random one.
    pub(crate) random: u64,
    /// Found wanting after the checks made here: last of all.
    pub(crate) avoid: Option<String>,
    /// Where it is remembered that somebody leads who is not configured.
    pub(crate) unnamed_leader: Option<&'a mut UnnamedLeader>,
    /// Asked of each.
    pub(crate) link: Option<LinkWish>,
    /// Where servers are noted that answer and must not be followed, or not now, with what is to be done about it.
    pub(crate) set_aside: Option<&'a mut Vec<(String, Advice)>>,
}

/// Tries the hosts in order until one has the session attributes that are asked for, and WAL that may be followed.
pub(crate) async fn connect(
    settings: &UpstreamSettings,
    store: &Store,
    writer: &WalWriter,
    mut order: Order<'_>,
) -> Result<(Connected, NewestHistory), UpstreamError> {
    let mut conninfo = settings.conninfo.clone();
    conninfo.reread_passwords(&ProcessSurroundings);
    let wanted = match conninfo.target_session_attrs {
        Some(TargetSessionAttrs::PreferStandby) => {
            vec![Some(TargetSessionAttrs::Standby), Some(TargetSessionAttrs::Any)]
        }
        other => vec![other],
    };
    let leader = patroni::leader(&settings.patroni).await;
    let mut errors: Vec<(String, UpstreamError)> = Vec::new();
    for wanted in wanted {
        let below = |n: usize| usize::try_from(order.random % n.max(1) as u64).unwrap_or(0);
        let mut hosts = conninfo.attempt_order(below);
        if let Some(leader) = &leader {
            let is_named = patroni::put_first(&mut hosts, leader).await;
            if let Some(unnamed) = &mut order.unnamed_leader {
                unnamed.note(leader, is_named);
            }
        }
        hosts.sort_by_key(|host| order.avoid.as_deref() == Some(host.to_string().as_str()));
        for host in hosts {
            let checked = async {
                let connected = connect_to_host(&conninfo, host, wanted, order.link.as_ref()).await?;
                check_in_time(connected, settings, store, writer).await
            };
            match checked.await {
                Ok(found) => return Ok(found),
                Err(error) => {
                    tracing::debug!(%host, error = %error.chain(), "host did not serve");
                    if let Some(set_aside) =
                        order.set_aside.as_mut().filter(|_| error.sets_the_server_aside())
                    {
                        set_aside.push((host.to_string(), error.advice()));
                    }
                    errors.push((host.to_string(), error));
                }
            }
        }
    }
    match errors.len() {
        0 | 1 => Err(errors.pop().map_or(UpstreamError::NoHost, |(_, error)| error)),
        _ => Err(UpstreamError::AllHosts(errors)),
    }
}

/// The server has ended a stream at the end of its timeline: asks again what it is, and whether it may be followed.
pub(crate) async fn ask_again(
    dialog: Dialog,
    host: &str,
    settings: &UpstreamSettings,
    store: &Store,
    writer: &WalWriter,
) -> Result<(Connected, NewestHistory), UpstreamError> {
    let wanted = match settings.conninfo.target_session_attrs {
        // It was good enough before.
        Some(TargetSessionAttrs::PreferStandby) => Some(TargetSessionAttrs::Any),
        other => other,
    };
    let interrogation = timeout(OPENING_TIME_MAX, interrogate(dialog, wanted, host)).await;
    let connected = interrogation.map_err(|_| UpstreamError::OpeningTimeout)??;
    check_in_time(connected, settings, store, writer).await
}

async fn check_in_time(
    mut connected: Connected,
    settings: &UpstreamSettings,
    store: &Store,
    writer: &WalWriter,
) -> Result<(Connected, NewestHistory), UpstreamError> {
    let checked = timeout(OPENING_TIME_MAX, check_server(&mut connected, settings, store, writer)).await;
    let newest = checked.map_err(|_| UpstreamError::OpeningTimeout)??;
    connected.switch_lsn = newest.begin();
    Ok((connected, newest))
}

/// One server of our cluster, for what is to be done there beside a stream; whether its WAL may be followed is not asked.
pub(crate) async fn connect_to(
    settings: &UpstreamSettings,
    store: &Store,
    server: &str,
) -> Result<Connected, UpstreamError> {
    let mut conninfo = settings.conninfo.clone();
    conninfo.reread_passwords(&ProcessSurroundings);
    let host = conninfo.hosts.iter().find(|host| host.to_string() == server);
    let host = host.ok_or(UpstreamError::NoHost)?;
    let connected = connect_to_host(&conninfo, host, Some(TargetSessionAttrs::Any), None).await?;
    check_identity(&connected, store)?;
    Ok(connected)
}

async fn connect_to_host(
    conninfo: &Conninfo,
    host: &Host,
    wanted: Option<TargetSessionAttrs>,
    link: Option<&LinkWish>,
) -> Result<Connected, UpstreamError> {
    // As libpq: a server that answers but will not do ends the attempt at this host.
    let dialog = log_in_for(conninfo, host, link).await?;
    let interrogation = timeout(OPENING_TIME_MAX, interrogate(dialog, wanted, &host.to_string())).await;
    interrogation.map_err(|_| UpstreamError::OpeningTimeout)?
}

/// Asks the server what it is, and whether it is of the kind that was asked for.
async fn interrogate(
    mut dialog: Dialog,
    wanted: Option<TargetSessionAttrs>,
    host: &str,
) -> Result<Connected, UpstreamError> {
    let in_recovery = dialog.introduction.parameters.get("in_hot_standby").cloned();
    let read_only = dialog.show("transaction_read_only").await? == "on";
    let is_standby = in_recovery.map_or(read_only, |value| value == "on");
    match wanted {
        Some(wanted) => check_session_attributes(wanted, read_only, is_standby)?,
        // A relay is in recovery as long as its own upstream is away, and has what it had.
        None if is_standby && !dialog.introduction.parameters.contains_key(PARAMETER) => {
            return Err(UpstreamError::StandbyUnasked);
        }
        None => {}
    }
    let system = identify_system(&mut dialog).await?;
    let size_text = dialog.show("wal_segment_size").await?;
    let segment_size = size_text.parse().map_err(|_| UpstreamError::InvalidAnswer {
        command: "SHOW wal_segment_size",
        field: "value",
        value: size_text,
    })?;
    let sender_timeout = parse_milliseconds(&dialog.show("wal_sender_timeout").await?);
    let facts = server_facts(&mut dialog).await?;
    let (host, is_writable) = (host.to_owned(), !read_only);
    let switch_lsn = Lsn::MIN;
    Ok(Connected { dialog, host, system, switch_lsn, segment_size, is_writable, sender_timeout, facts })
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

pub(super) async fn identify_system(dialog: &mut Dialog) -> Result<IdentifySystem, UpstreamError> {
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

/// Checks that the server is the one whose WAL is held. Changes nothing on the server, and nothing in the store.
async fn check_server(
    connected: &mut Connected,
    settings: &UpstreamSettings,
    store: &Store,
    writer: &WalWriter,
) -> Result<NewestHistory, UpstreamError> {
    check_page_size(&connected.facts)?;
    looking::check_loop(&connected.dialog.introduction, &settings.instance, &connected.host)?;
    check_identity(connected, store)?;
    // Before its history is asked for, which may be of another timeline of that number than ours.
    if let Some(lineage) = store.lineage().filter(|lineage| lineage.timeline() > connected.system.timeline) {
        let (held, upstream) = (lineage.timeline(), connected.system.timeline);
        return Err(Refusal::Behind { held, upstream }.into());
    }
    let newest = check_newest(connected, store).await?;
    if let (Some(lineage), Some(plan)) = (store.lineage(), writer.plan()) {
        let route = route(&lineage, plan.held_end, &newest.history)?;
        if route == Route::Same && !writer.holds_nothing() {
            check_not_behind(connected, &plan)?;
        }
        if let (Route::Diverged(fork), Some(oldest)) = (route, store.oldest())
            && fork.at < oldest
            && !writer.holds_nothing()
        {
            let (timeline, next) = (plan.timeline, fork.next);
            return Err(UpstreamError::ForkedBefore { timeline, next, fork: fork.at, oldest });
        }
        if let (Route::Diverged(fork), OnDivergence::Stop) = (route, settings.on_divergence) {
            let (timeline, held_end) = (plan.timeline, plan.held_end);
            return Err(UpstreamError::Forked { timeline, next: fork.next, fork: fork.at, held_end });
        }
    }
    Ok(newest)
}

/// That the server is of the cluster whose WAL is held.
fn check_identity(connected: &Connected, store: &Store) -> Result<(), UpstreamError> {
    let found = identity(connected);
    let Some(held) = store.identity() else { return Ok(()) };
    if held.system_id != found.system_id {
        return Err(UpstreamError::WrongSystem { expected: held.system_id, got: found.system_id });
    }
    if held.segment_size != found.segment_size {
        let (expected, got) = (held.segment_size, found.segment_size);
        return Err(UpstreamError::WrongSegmentSize { expected, got });
    }
    Ok(())
}

/// A primary sends only what it has flushed: one that is behind us has lost WAL, and whatever it writes there now is other
/// WAL. A standby may only be late, and so may a relay, which sends what it has not flushed yet.
fn check_not_behind(connected: &Connected, plan: &ResumePlan) -> Result<(), UpstreamError> {
    let is_relay = connected.dialog.introduction.parameters.contains_key(PARAMETER);
    let (upstream, least) = if connected.is_writable && !is_relay {
        (BehindUpstream::Primary, plan.held_end)
    } else {
        (BehindUpstream::Standby, plan.newest_start)
    };
    let flushed = connected.system.flushed;
    if flushed >= least {
        return Ok(());
    }
    let (held_end, timeline) = (plan.held_end, plan.timeline);
    Err(UpstreamError::BehindUs { flushed, held_end, timeline, upstream })
}

/// Where an empty store begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beginning {
    /// With what the slot keeps, or where it was begun already.
    AsPlanned,
    /// Where the upstream is now: the WAL that it was to begin with is gone, and nothing of it was received.
    Anew,
}

/// Where a stream goes on, and what is wrong beside that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamPlan {
    pub(crate) resume: ResumePlan,
    /// What the upstream's slot says was acknowledged, up to there, and is not held.
    pub(crate) lost: Option<Lsn>,
    /// The store was begun just now although the upstream's slot was there: if it was used, up to here.
    pub(crate) replaces: Option<Lsn>,
}

/// Gives an empty store its identity and start, and finds out where to go on.
pub(crate) fn plan_stream(
    connected: &Connected,
    store: &Store,
    writer: &mut WalWriter,
    slot: UpstreamSlot,
    beginning: Beginning,
) -> Result<StreamPlan, UpstreamError> {
    let had_wal = !writer.holds_nothing();
    let used_until = slot.restart_lsn.filter(|_| slot.origin == SlotOrigin::Found);
    let begins_anew = beginning == Beginning::Anew && !had_wal;
    let begins = begins_anew || writer.plan().is_none();
    if begins {
        begin_store(connected, writer, slot.restart_lsn.filter(|_| !begins_anew))?;
    }
    block_in_place(|| store.remember_facts(connected.facts.clone()))?;
    let plan = writer.plan().ok_or_else(|| UpstreamError::Unexpected("store without identity".to_owned()))?;
    let lost = used_until.filter(|&to| had_wal && to > plan.held_end);
    Ok(StreamPlan { resume: plan, lost, replaces: used_until.filter(|_| begins) })
}

/// Begins the store with the segment of what the slot keeps, else of where the upstream is now.
fn begin_store(
    connected: &Connected,
    writer: &mut WalWriter,
    reserved: Option<Lsn>,
) -> Result<(), UpstreamError> {
    let found = identity(connected);
    // A timeline's files begin with the segment of its switch point, whatever the slot keeps of its parent.
    let first = reserved.unwrap_or(connected.system.flushed).max(connected.switch_lsn);
    let start = SegmentNo::holding(first, found.segment_size).start(found.segment_size);
    let start = start.unwrap_or(Lsn::MIN);
    Ok(block_in_place(|| writer.initialize(found, connected.system.timeline, start))?)
}

fn identity(connected: &Connected) -> Identity {
    Identity { system_id: connected.system.system_id, segment_size: connected.segment_size }
}

/// Starts the stream at one of the places that the plan names.
pub(crate) async fn start_streaming(
    connected: Connected,
    plan: &ResumePlan,
    start: Lsn,
    settings: &UpstreamSettings,
    block: BlockId,
) -> Result<Streaming, UpstreamError> {
    let streams_by_slot = mover(settings, &connected.dialog.introduction) == SlotMover::Reports;
    let slot = settings.slot.clone().filter(|_| streams_by_slot);
    let command = Command::StartReplication(StartReplication {
        slot: slot.clone(),
        start: Some(start),
        kind: StreamKind::Physical { timeline: Some(plan.timeline) },
    });
    let version_num = connected.facts.version_num;
    match connected.dialog.start_copy(&command).await {
        Ok((socket, already_read)) => {
            let held_end = plan.held_end;
            Ok(Streaming { socket, already_read, block, start, held_end })
        }
        Err(StartCopyError::Refused(dialog, error)) => {
            dialog.terminate().await;
            let refused = slot.as_ref().map(|slot| slot_refused(error.clone(), version_num, slot));
            match refused {
                Some(refused @ UpstreamError::SlotInvalidated { .. }) => Err(refused),
                _ => Err(stream_refused(*error, plan.held_end)),
            }
        }
        Err(StartCopyError::TimelineEndsHere) => {
            let (timeline, held_end) = (plan.timeline, plan.held_end);
            Err(UpstreamError::EndedEarly { timeline, held_end, fork: start })
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

/// Longest time for the questions that are asked of a server that has let us in, before WAL flows; each answer has its own,
/// but a server could take that for every one of them.
pub(crate) const OPENING_TIME_MAX: Duration = Duration::from_secs(60);
