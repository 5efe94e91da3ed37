//! `START_REPLICATION`: checks in PostgreSQL's order, the stream, and how it ends.

use tracing::{info, warn};

use crate::downstream::{
    blocking::run_blocking,
    command::{Session, SessionEnd},
    commands::{Answered, CommandError, slots},
    connection::Stream,
    link::sending::{LinkSender, LinkStream},
    timelines::{TimelineError, timeline_state},
    walsender::{Ended, StreamError, WalSender, now},
};
use crate::protocol::{
    ServerError, SqlState,
    backend::{
        Column, CopyFormat, encode_command_complete, encode_copy_both_response, encode_row_description,
        encode_text_row,
    },
    command::{StartReplication, StreamKind},
};
use crate::session::sender::{STOPPING_TIME_MAX, Sender, SenderSettings, StreamEnd, TimelineState};
use crate::store::{Access, ReadError, SlotGuard};
use crate::wal::{Lsn, SegmentName, SegmentNo, TimelineId};

/// A request that passed the checks made before the stream.
struct Request {
    slot: Option<SlotGuard>,
    timeline: TimelineId,
    state: TimelineState,
    start: Option<Lsn>,
    servable: Lsn,
}

/// Streams until one side ends it.
pub(super) async fn start_replication<S: Stream>(
    session: &mut Session<'_, S>,
    command: StartReplication,
) -> Result<Answered, CommandError> {
    if !session.server.is_at_least(15) && !session.has_identified {
        let text = "IDENTIFY_SYSTEM has not been run before START_REPLICATION";
        return Err(ServerError::error(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, text).into());
    }
    let request = check(session, command).await?;
    if let (TimelineState::Historic { end, .. }, Some(start)) = (request.state, request.start)
        && start >= end
    {
        // Nothing to stream: not even a copy is begun.
        finish(session, request.state);
        return Ok(Answered::Complete);
    }
    session.connection.outgoing.encode(|out| encode_copy_both_response(&CopyFormat::default(), out));
    let Some(start) = request.start else {
        return Err(removed(session, SegmentName { timeline: request.timeline, number: SegmentNo(0) }).into());
    };
    stream(session, request, start).await
}

/// Slot, timeline, starting point: in PostgreSQL's order, so that the same request meets the same refusal.
async fn check<S: Stream>(
    session: &mut Session<'_, S>,
    command: StartReplication,
) -> Result<Request, CommandError> {
    let StartReplication { slot, start, kind } = command;
    let store = &session.context.store;
    // One that is created for this request is created when the request can be met.
    let is_absent =
        |name: &String| session.context.settings.create_slots && store.slots().get(name).is_none();
    let absent = slot.clone().filter(is_absent);
    let slot = match slot.filter(|_| absent.is_none()) {
        Some(name) => Some(slots::acquire(session, name, start).await?),
        None => None,
    };
    let positions = store.positions().ok_or_else(|| {
        ServerError::error(SqlState::CANNOT_CONNECT_NOW, "the database system is starting up")
    })?;
    let asked = match kind {
        StreamKind::Physical { timeline } => timeline,
        StreamKind::Logical(_) => None,
    };
    let timeline = asked.unwrap_or(positions.timeline);
    let state = {
        let store = store.clone();
        run_blocking(move || timeline_state(&store, timeline, positions.timeline)).await??
    };
    let servable = match state {
        TimelineState::Current => session.servable(&positions),
        TimelineState::Historic { end, .. } => end,
    };
    if let (TimelineState::Historic { end, .. }, Some(start)) = (state, start)
        && start > end
    {
        return Err(not_in_history(session, start, timeline, end).into());
    }
    let slot = match absent {
        Some(name) => Some(slots::acquire(session, name, start).await?),
        None => slot,
    };
    Ok(Request { slot, timeline, state, start, servable })
}

async fn stream<S: Stream>(
    session: &mut Session<'_, S>,
    request: Request,
    start: Lsn,
) -> Result<Answered, CommandError> {
    let Request { slot, timeline, state, servable, .. } = request;
    let slot_name = slot.as_ref().map(|slot| slot.name().to_owned());
    info!(%start, %timeline, slot = slot_name.as_deref(), "replication stream started");
    let link = link_sender(session, timeline).await?;
    let traffic = link.as_ref().map(LinkSender::traffic);
    session.registration.update(|live| {
        (live.timeline, live.slot_name, live.link) = (Some(timeline), slot_name, traffic);
    });
    let settings = SenderSettings {
        wal_sender_timeout: session.wal_sender_timeout,
        segment_size: session.server.identity.segment_size,
    };
    // Whoever has a slot needs nothing else.
    let name = &session.registration.client().application_name;
    let consumer = if slot.is_none() { session.context.store.consumer(name) } else { None };
    let streaming = session.context.streaming();
    let is_looked_at = session.connection.is_encrypted() || link.is_some();
    let access = if is_looked_at { Access::Copied } else { Access::Mapped };
    let sender = WalSender {
        context: session.context,
        connection: &mut session.connection,
        registration: &session.registration,
        stop: session.stop,
        slot,
        consumer,
        timeline,
        sender: Sender::new(settings, state, start, servable, now()),
        reader: session.context.store.reader(timeline, access),
        positions: session.context.positions.clone(),
        removed: session.context.upstream_removed.clone(),
        link,
    };
    let ended = sender.run().await;
    drop(streaming);
    match ended {
        Ok(ended) => end_stream(session, timeline, ended).await,
        Err(error) => Err(stream_error(session, error)),
    }
}

/// Where the client was granted a compressed link: whose WAL it is about to carry.
async fn link_sender<S: Stream>(
    session: &mut Session<'_, S>,
    timeline: TimelineId,
) -> Result<Option<LinkSender>, CommandError> {
    let Some(accepted) = session.link else { return Ok(None) };
    let store = session.context.store.clone();
    let history = run_blocking(move || store.history_hash(timeline)).await?;
    let history = history.map_err(|error| TimelineError::Store(timeline, error))?;
    let system_id = session.server.identity.system_id;
    let stream = LinkStream { accepted, system_id, timeline, history };
    Ok(Some(LinkSender::new(&session.context.links, stream, now())))
}

async fn end_stream<S: Stream>(
    session: &mut Session<'_, S>,
    timeline: TimelineId,
    ended: Ended,
) -> Result<Answered, CommandError> {
    info!(?ended, "replication stream ended");
    match ended {
        Ended::Stream(StreamEnd::Finished(state)) => {
            finish(session, state);
            Ok(Answered::Complete)
        }
        // As a primary: closed without an error.
        Ended::Stream(StreamEnd::StandbySilent) => Ok(Answered::Ended(SessionEnd::ClientSilent)),
        Ended::Stream(StreamEnd::StopRequested) => {
            session.connection.outgoing.encode(|out| encode_command_complete("COPY 0", out));
            // A client that takes nothing is not waited for.
            let sent = tokio::time::timeout(STOPPING_TIME_MAX, session.connection.flush()).await;
            if let Ok(Err(error)) = sent {
                return Err(CommandError::Connection(error.into()));
            }
            Ok(Answered::Ended(SessionEnd::StopRequested))
        }
        Ended::Stream(StreamEnd::StartAhead { start, servable }) => {
            let (start, servable) =
                (session.server.lsn_text(Some(start)), session.server.lsn_text(Some(servable)));
            let text = format!(
                "requested starting point {start} is ahead of the WAL flush position of this server {servable}"
            );
            Err(ServerError::error(SqlState::INTERNAL_ERROR, text).into())
        }
        // As from a server that had it once: a standby looks into its archive then.
        Ended::Stream(StreamEnd::WalRemoved { at }) => {
            let number = SegmentNo::holding(at, session.server.identity.segment_size);
            Err(stream_error(session, ReadError::Removed(SegmentName { timeline, number }).into()))
        }
        Ended::ClientLeft => Ok(Answered::Ended(SessionEnd::ClientLeft)),
    }
}

/// After the stream: where a historic timeline goes on, and two tags, both of which clients wait for.
fn finish<S: Stream>(session: &mut Session<'_, S>, state: TimelineState) {
    if let TimelineState::Historic { end, next } = state {
        let (next, end) = (next.to_string(), session.server.lsn_text(Some(end)));
        let columns = [Column::int8("next_tli"), Column::text("next_tli_startpos")];
        session.connection.outgoing.encode(|out| {
            encode_row_description(&columns, out);
            encode_text_row(&[Some(&next), Some(&end)], out);
        });
    }
    session.connection.outgoing.encode(|out| encode_command_complete("START_STREAMING", out));
    session.put_complete("START_REPLICATION");
}

fn stream_error<S: Stream>(session: &Session<'_, S>, error: StreamError) -> CommandError {
    match error {
        StreamError::Refused(error) => {
            info!(error = ?error.message, "replication stream ended by an error");
            CommandError::Refused(error)
        }
        StreamError::Fatal(error) => CommandError::Fatal(error),
        StreamError::Read(ReadError::Removed(name)) => {
            let error = removed(session, name);
            warn!(error = %error.message, "client asked for WAL that is not held");
            error.into()
        }
        StreamError::Read(error) => {
            // The store has told of the segment; each client that asks for it gets here again.
            info!(error = &error as &dyn std::error::Error, "could not read WAL for a client");
            let sqlstate = match &error {
                ReadError::Suspect { .. } => SqlState::DATA_CORRUPTED,
                ReadError::Io { .. } | ReadError::Removed(_) | ReadError::TimelineLeft(_) => {
                    SqlState::IO_ERROR
                }
            };
            CommandError::Refused(ServerError::error(sqlstate, error.to_string()))
        }
        StreamError::Timeline(error) => {
            warn!(error = &error as &dyn std::error::Error, "replication stream cannot follow its timeline");
            error.into()
        }
        StreamError::Blocking(error) => error.into(),
        StreamError::Connection(error) => CommandError::Connection(error),
    }
}

fn removed<S: Stream>(session: &Session<'_, S>, name: SegmentName) -> ServerError {
    let file_name = name.file_name(session.server.identity.segment_size);
    let text = format!("requested WAL segment {file_name} has already been removed");
    ServerError::error(SqlState::UNDEFINED_FILE, text)
}

fn not_in_history<S: Stream>(
    session: &Session<'_, S>,
    start: Lsn,
    timeline: TimelineId,
    end: Lsn,
) -> ServerError {
    let (start, end) = (session.server.lsn_text(Some(start)), session.server.lsn_text(Some(end)));
    let text =
        format!("requested starting point {start} on timeline {timeline} is not in this server's history");
    let detail = format!("This server's history forked from timeline {timeline} at {end}.");
    ServerError::error(SqlState::INTERNAL_ERROR, text).with_detail(detail)
}
