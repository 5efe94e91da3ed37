//! Drives the sending half of one stream: from the store to the socket, and replies back.
//!
//! Waits in one place and decides in none: what to send, when to ask and when to end is `session::Sender`'s business.
//! Reading replies and sending WAL are both events, so neither blocks the other; a slow disk or a slow history file is
//! waited for beside them, so that a client's questions are answered in time. WAL is never copied, unless a client has
//! taken nothing for a while: then what waits for it is moved out of the store's memory.

use std::{
    pin::{Pin, pin},
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    sync::{Semaphore, watch},
    time::Sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::downstream::{
    DownstreamContext,
    blocking::{BlockingError, run_blocking},
    command::administrator_command,
    connection::{Connection, ConnectionError, Exchanged, Reading, Stream, tag_of},
    link::{bulk::BulkFrame, sending::LinkSender},
    registry::Registration,
    timelines::{TimelineError, timeline_state},
};
use crate::protocol::feedback::Feedback;
use crate::protocol::{
    DecodeError, STANDBY_MESSAGE_BYTES_MAX, ServerError, SqlState, backend, frontend,
    replication::{HotStandbyFeedback, Keepalive, StandbyMessage, WalDataHeader},
};
use crate::session::sender::{
    NextWal, Output, Progress, ReplyRequested, Sender, StandbyReply, StreamEnd, TimelineState,
};
use crate::status::RemovedWal;
use crate::store::{
    CONSUMERS_MAX, ColdRead, ConsumerGuard, Positions, Read, ReadError, SlotGuard, WalReader,
};
use crate::wal::{Lsn, LsnRange, PgTimestamp, SegmentNo, TimelineId};

/// One stream.
pub(super) struct WalSender<'a, S> {
    pub(super) context: &'a DownstreamContext,
    pub(super) connection: &'a mut Connection<S>,
    pub(super) registration: &'a Registration,
    pub(super) stop: &'a CancellationToken,
    pub(super) slot: Option<SlotGuard>,
    /// For whom WAL is kept without a slot.
    pub(super) consumer: Option<ConsumerGuard>,
    pub(super) timeline: TimelineId,
    pub(super) sender: Sender,
    pub(super) reader: WalReader,
    pub(super) positions: watch::Receiver<Option<Positions>>,
    pub(super) removed: watch::Receiver<Option<RemovedWal>>,
    /// Where WAL goes compressed.
    pub(super) link: Option<LinkSender>,
}

/// How a stream ended, where that is no fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// As the sending half decided.
    Stream(StreamEnd),
    /// The client said farewell.
    ClientLeft,
}

/// A stream failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamError {
    /// The client is told, and the session goes on.
    #[error("stream ended: {}", .0.message)]
    Refused(ServerError),
    /// The client is told, and the connection is closed.
    #[error("stream ended: {}", .0.message)]
    Fatal(ServerError),
    /// WAL could not be read; the client is told, and the session goes on.
    #[error("could not read WAL")]
    Read(#[from] ReadError),
    #[error("could not follow a timeline switch")]
    Timeline(#[from] TimelineError),
    #[error(transparent)]
    Blocking(#[from] BlockingError),
    #[error(transparent)]
    Connection(#[from] ConnectionError),
}

/// What happened.
enum Event {
    Exchanged(Exchanged),
    Positions,
    Removed,
    Background(Done),
    BroughtIn,
    Grown,
    Deadline,
    Stop,
}

/// What was waited for beside the stream.
pub(super) enum Done {
    Loaded,
    /// A frame of the shared stream is made; for how long the codec was at it.
    Encoded(Duration),
    /// A frame that stands alone, for this link.
    Frame(BulkFrame),
    Switched(TimelineState),
}

/// Whether a step of filling did something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    Something,
    Nothing,
}

type Background = Pin<Box<dyn Future<Output = Result<Done, StreamError>> + Send>>;

/// Everything of a running stream that is not its parts.
pub(super) struct Run {
    pub(super) background: Option<Background>,
    /// Brings in what will be sent next.
    pub(super) ahead: Option<Background>,
    /// The background work makes a frame of what could be sent now.
    pub(super) is_making_frame: bool,
    /// Since when a link may not send because of its rate.
    pub(super) paced_since: Option<Instant>,
    /// Until when, if nothing else kept it from sending when that was asked last.
    pub(super) paced_until: Option<Instant>,
    /// The store follows another timeline than this stream's: where was this one left?
    switch_due: Option<TimelineId>,
    client_is_done: bool,
    is_stopping: bool,
    /// Since when something waits to be sent.
    unsent_since: Option<Instant>,
    /// What waits is no longer in the store's memory.
    is_detached: bool,
}

impl<S: Stream> WalSender<'_, S> {
    /// Runs the stream to its end.
    pub(super) async fn run(mut self) -> Result<Ended, StreamError> {
        let mut run = Run {
            background: None,
            ahead: None,
            is_making_frame: false,
            paced_since: None,
            paced_until: None,
            switch_due: None,
            client_is_done: false,
            is_stopping: false,
            unsent_since: None,
            is_detached: false,
        };
        let registration = self.registration;
        let mut canceled = pin!(registration.canceled());
        let mut terminated = pin!(registration.terminated());
        let mut sleep = pin!(tokio::time::sleep(Duration::ZERO));
        self.follow_positions(&mut run);
        self.follow_removed();
        if let Some(link) = &self.link {
            self.connection.outgoing.encode(|out| link.encode_hello(out));
        }
        loop {
            if let Some(end) = self.fill_outgoing(&mut run)? {
                return Ok(Ended::Stream(end));
            }
            self.start_background(&mut run);
            if run.unsent_since.is_none() && !self.connection.outgoing.is_empty() {
                run.unsent_since = Some(now());
            }
            self.note_waiting(&run);
            self.set_deadline(&run, sleep.as_mut());
            let event = tokio::select! {
                event = self.next_event(&mut run, sleep.as_mut()) => event?,
                () = canceled.as_mut() => return Err(StreamError::Refused(canceled_error())),
                () = terminated.as_mut() => return Err(StreamError::Fatal(administrator_command())),
            };
            if let Some(ended) = self.handle(event, &mut run)? {
                return Ok(ended);
            }
        }
    }

    /// Moves to the connection what may be sent, as far as it has room.
    fn fill_outgoing(&mut self, run: &mut Run) -> Result<Option<StreamEnd>, StreamError> {
        let mut has_moved = false;
        run.paced_until = None;
        loop {
            if let Some(end) = self.sender.poll_end() {
                return Ok(Some(end));
            }
            if self.connection.outgoing.has_room_for_control()
                && let Some(output) = self.sender.poll_output()
            {
                match self.put(output) {
                    Some(end) => return Ok(Some(end)),
                    None => continue,
                }
            }
            // After it was detached, no WAL is added before the client has taken everything.
            if !self.connection.outgoing.has_room() || run.is_detached {
                break;
            }
            if run.switch_due.is_some() || run.background.is_some() {
                break;
            }
            match self.fill_link(run)? {
                Some(Moved::Something) => {
                    has_moved = true;
                    continue;
                }
                Some(Moved::Nothing) => break,
                None => {}
            }
            let Some(next) = self.sender.next_wal() else { break };
            let read = match self.reader.read(next.range) {
                // The positions say so in a moment.
                Err(ReadError::TimelineLeft(_)) if self.sender.timeline() == TimelineState::Current => {
                    self.follow_positions(run);
                    break;
                }
                read => read?,
            };
            match read {
                Read::Ready(wal) => {
                    self.put_wal(next, wal);
                    self.start_ahead(run, next);
                }
                // It may be on its way.
                Read::Cold(_) if run.ahead.is_some() => break,
                Read::Cold(cold) => {
                    self.context.metrics.cold_bytes.increment(next.range.bytes());
                    run.background = Some(Box::pin(load(self.context.cold_reads.semaphore(), cold)));
                    break;
                }
            }
            has_moved = true;
        }
        if has_moved {
            self.publish();
        }
        Ok(None)
    }

    fn start_ahead(&self, run: &mut Run, sent: NextWal) {
        if run.ahead.is_none()
            && let Some(cold) = self.reader.ahead(sent.range.end(), sent.wal_end)
        {
            run.ahead = Some(Box::pin(load(self.context.cold_reads.semaphore(), cold)));
        }
    }

    fn put(&mut self, output: Output) -> Option<StreamEnd> {
        match output {
            Output::Keepalive { wal_end, reply } => {
                let reply_requested = reply == ReplyRequested::Yes;
                let keepalive = Keepalive { wal_end, sent_at: timestamp(), reply_requested };
                self.connection.outgoing.encode(|out| keepalive.encode(out));
                None
            }
            Output::CopyDone => {
                self.connection.outgoing.encode(backend::encode_copy_done);
                None
            }
            Output::End(end) => Some(end),
        }
    }

    fn put_wal(&mut self, next: NextWal, wal: Vec<bytes::Bytes>) {
        let header =
            WalDataHeader { start: next.range.start(), wal_end: Some(next.wal_end), sent_at: timestamp() };
        // A range is cut to 128 KiB, far below what the length field holds.
        let bytes = u32::try_from(next.range.bytes()).unwrap_or(u32::MAX);
        self.connection.outgoing.push_wal(&header.encode(bytes), wal);
        self.context.metrics.sent_bytes.increment(next.range.bytes());
        self.sender.handle_sent(next.range.end());
        self.note_plain(next.range.bytes());
    }

    /// The only wait. Every branch is cancel-safe: an exchange keeps its bytes, a background task its future.
    async fn next_event(&mut self, run: &mut Run, sleep: Pin<&mut Sleep>) -> Result<Event, StreamError> {
        let reading = if run.client_is_done { Reading::Off } else { Reading::On };
        tokio::select! {
            exchanged = self.connection.exchange(reading) => {
                Ok(Event::Exchanged(exchanged.map_err(ConnectionError::Io)?))
            }
            // The sender of positions lives as long as the relay; without it only what is there can be sent.
            Ok(()) = self.positions.changed() => Ok(Event::Positions),
            Ok(()) = self.removed.changed() => Ok(Event::Removed),
            done = poll_background(&mut run.background) => done.map(Event::Background),
            // A failure is the failure of the read that comes there.
            _ = poll_background(&mut run.ahead) => Ok(Event::BroughtIn),
            () = LinkSender::grown(&mut self.link) => Ok(Event::Grown),
            () = self.stop.cancelled(), if !run.is_stopping => Ok(Event::Stop),
            () = sleep => Ok(Event::Deadline),
        }
    }

    fn handle(&mut self, event: Event, run: &mut Run) -> Result<Option<Ended>, StreamError> {
        let now = now();
        match event {
            Event::Exchanged(Exchanged::Received) => return self.take_messages(run, now),
            Event::Exchanged(Exchanged::Sent) => {
                if run.unsent_since.is_some_and(|since| now.duration_since(since) > RESIDENCY_TRUST_MAX) {
                    self.reader.forget_residency();
                }
                (run.unsent_since, run.is_detached) = (None, false);
                self.sender.handle_drained();
                self.publish();
            }
            Event::Exchanged(Exchanged::Closed) => return Err(ConnectionError::Closed.into()),
            Event::Positions => self.follow_positions(run),
            Event::Removed => self.follow_removed(),
            Event::Background(Done::Loaded) => run.is_making_frame = false,
            Event::Background(Done::Encoded(took)) => self.note_encoded(run, took),
            Event::Background(Done::Frame(frame)) => self.note_frame(run, frame),
            Event::BroughtIn | Event::Grown => {}
            Event::Background(Done::Switched(TimelineState::Historic { end, next })) => {
                run.switch_due = None;
                self.sender.handle_switch(end, next, now);
                self.put_back(end);
            }
            Event::Background(Done::Switched(TimelineState::Current)) => {
                run.switch_due = None;
                self.follow_positions(run);
            }
            Event::Deadline => {
                self.sender.handle_timeout(now);
                self.detach_if_stalled(run, now)?;
            }
            Event::Stop => {
                run.is_stopping = true;
                self.sender.handle_stop(now);
            }
        }
        Ok(None)
    }

    fn take_messages(&mut self, run: &mut Run, now: Instant) -> Result<Option<Ended>, StreamError> {
        while !run.client_is_done {
            let message = match self.connection.decode_message(STANDBY_MESSAGE_BYTES_MAX) {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(error) => return Err(StreamError::Fatal(ServerError::from(&error))),
            };
            match message {
                frontend::Message::CopyData(body) => self.take_standby_message(body, now)?,
                frontend::Message::CopyDone => {
                    // What follows is the next command's.
                    run.client_is_done = true;
                    self.sender.handle_copy_done(now);
                }
                frontend::Message::Terminate => return Ok(Some(Ended::ClientLeft)),
                other => return Err(StreamError::Fatal(invalid_message(&other))),
            }
        }
        self.publish();
        Ok(None)
    }

    fn take_standby_message(&mut self, body: bytes::Bytes, now: Instant) -> Result<(), StreamError> {
        match StandbyMessage::decode(body) {
            Ok(StandbyMessage::StatusUpdate(update)) => {
                let before = self.sender.progress();
                let (write, flush, apply) = (update.write, update.flush, update.apply);
                let reply = StandbyReply { write, flush, apply, reply_requested: update.reply_requested };
                self.sender.handle_reply(reply, now);
                self.keep_for(&before);
                self.registration.update(|live| live.reply_time = Some(update.sent_at));
                Ok(())
            }
            Ok(StandbyMessage::HotStandbyFeedback(message)) => {
                self.sender.handle_heard(now);
                self.take_feedback(&message);
                Ok(())
            }
            // As walsender.c: the connection is closed without a word.
            Err(error @ DecodeError::UnknownKind { .. }) => Err(ConnectionError::Protocol(error).into()),
            Err(_) => {
                let text = "insufficient data left in message";
                Err(StreamError::Refused(ServerError::error(SqlState::PROTOCOL_VIOLATION, text)))
            }
        }
    }

    fn take_feedback(&mut self, message: &HotStandbyFeedback) {
        let said = Feedback::of(message);
        let next = self.context.store.next_xid();
        if !said.is_plausible(next) {
            // As the primary: without a word, because a standby of a wrong clock or epoch says it again and again.
            debug!(?said, ?next, "feedback ignored: no such transactions");
            return;
        }
        if let Some(slot) = &self.slot {
            slot.note_feedback(said, next);
        }
        let has_slot = self.slot.is_some();
        self.registration.update(|live| {
            live.reply_time = Some(message.sent_at);
            // A slot's is kept by the slot, also when the standby has gone; here it is news.
            (live.feedback, live.said) = (if has_slot { Feedback::default() } else { said }, said);
        });
    }

    /// Keeps WAL from where the client may need it again, if that has changed since `before`.
    fn keep_for(&mut self, before: &Progress) {
        let now = self.sender.progress();
        if let (Some(slot), Some(flush)) = (&self.slot, now.flush)
            && before.flush != now.flush
        {
            slot.advance(flush);
        }
        let Some(consumer) = &self.consumer else { return };
        let needed = self.needed_from(&now).filter(|needed| self.needed_from(before) != Some(*needed));
        if needed.is_some_and(|needed| !consumer.advance(needed)) {
            warn!(names = CONSUMERS_MAX, "WAL is kept for as many names as can be, and not for this client");
            self.consumer = None;
        }
    }

    /// From where on a client without a slot asks for WAL when it comes back. One that never says what it has flushed syncs
    /// each segment when that is complete, and begins again with the one that was not (pg_receivewal).
    fn needed_from(&self, progress: &Progress) -> Option<Lsn> {
        let written = || {
            let size = self.context.store.identity()?.segment_size;
            SegmentNo::holding(progress.write?, size).start(size)
        };
        progress.flush.or_else(written)
    }

    pub(super) fn follow_positions(&mut self, run: &mut Run) {
        let Some(positions) = *self.positions.borrow_and_update() else { return };
        if positions.timeline == self.timeline {
            let name = &self.registration.client().application_name;
            self.sender.handle_servable(self.context.settings.servable(name, &positions), now());
        } else if self.sender.timeline() == TimelineState::Current {
            run.switch_due = Some(positions.timeline);
        }
    }

    fn follow_removed(&mut self) {
        let removed = self.removed.borrow_and_update().filter(|removed| removed.timeline == self.timeline);
        self.sender.handle_removed(removed.and_then(|removed| LsnRange::new(removed.from, removed.to)));
    }

    fn start_background(&mut self, run: &mut Run) {
        if run.background.is_some() {
            return;
        }
        if let Some(current) = run.switch_due {
            let (store, timeline) = (self.context.store.clone(), self.timeline);
            run.background = Some(Box::pin(async move {
                let state = run_blocking(move || timeline_state(&store, timeline, current)).await??;
                Ok(Done::Switched(state))
            }));
        }
    }

    /// The sleep is moved only when it would come too late: a deadline that moves with every reply costs nothing.
    fn set_deadline(&mut self, run: &Run, mut sleep: Pin<&mut Sleep>) {
        let detach = self.detach_due(run);
        let deadline = self.sender.poll_timeout().into_iter().chain(detach).chain(run.paced_until).min();
        let deadline = deadline.unwrap_or_else(|| now() + IDLE_WAKE_INTERVAL).into();
        if sleep.is_elapsed() || deadline < sleep.deadline() {
            sleep.as_mut().reset(deadline);
        }
    }

    /// When the client has taken nothing for too long, if he goes on so.
    fn detach_due(&self, run: &Run) -> Option<Instant> {
        let since = run.unsent_since.filter(|_| !run.is_detached)?;
        let took_nothing_since = self.connection.took_at().map_or(since, |at| at.max(since));
        Some(took_nothing_since + DETACH_AFTER)
    }

    fn detach_if_stalled(&mut self, run: &mut Run, now: Instant) -> Result<(), ConnectionError> {
        if self.detach_due(run).is_some_and(|due| now >= due) {
            self.context.metrics.copied_bytes.increment(self.connection.outgoing.detach()?);
            run.is_detached = true;
        }
        Ok(())
    }

    fn publish(&self) {
        let (state, progress) = (self.sender.state(), self.sender.progress());
        self.registration.update(|live| (live.state, live.progress) = (state, progress));
    }
}

impl<S> WalSender<'_, S> {
    /// WAL is kept from no place that is not on the line any more.
    fn put_back(&self, fork: Lsn) {
        if let Some(slot) = &self.slot {
            slot.put_back(fork);
        }
        if let Some(consumer) = &self.consumer {
            consumer.put_back(fork);
        }
    }
}

impl<S> Drop for WalSender<'_, S> {
    /// A session may end after the store has gone over to another timeline and before it has heard of that: what was reported
    /// meanwhile does not count either.
    fn drop(&mut self) {
        if self.sender.timeline() == TimelineState::Current
            && let Some(lineage) = self.context.store.lineage()
            && let Some((fork, _)) = lineage.left(self.timeline)
        {
            self.put_back(fork);
        }
    }
}

/// Brings a cold range in, on a thread that may block; few do so at a time, because they compete for one disk.
pub(super) async fn load(permits: std::sync::Arc<Semaphore>, cold: ColdRead) -> Result<Done, StreamError> {
    let permit = permits.acquire_owned().await.ok();
    // The permit goes with the read, not with this session: a session that ends does not end the read.
    let loaded = run_blocking(move || {
        let loaded = cold.load();
        drop(permit);
        loaded
    });
    match loaded.await? {
        // The read that comes there finds the same, and ends the stream as it must.
        Ok(()) | Err(ReadError::TimelineLeft(_)) => Ok(Done::Loaded),
        Err(error) => Err(error.into()),
    }
}

/// Waits for the background task, forever when there is none. Cancel-safe: the future stays where it is.
async fn poll_background(background: &mut Option<Background>) -> Result<Done, StreamError> {
    match background {
        None => std::future::pending().await,
        Some(future) => {
            let done = future.await;
            *background = None;
            done
        }
    }
}

fn invalid_message(message: &frontend::Message) -> ServerError {
    let text = format!("invalid standby message type \"{}\"", char::from(tag_of(message)));
    ServerError::fatal(SqlState::PROTOCOL_VIOLATION, text)
}

fn canceled_error() -> ServerError {
    debug!("stream canceled by request");
    ServerError::error(SqlState::QUERY_CANCELED, "canceling statement due to user request")
}

/// The time by tokio's clock, which tests can stop.
pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

pub(super) fn timestamp() -> PgTimestamp {
    PgTimestamp::from_system_time(SystemTime::now())
}

/// WAL that was found in memory is believed to be there still for so long.
const RESIDENCY_TRUST_MAX: Duration = Duration::from_millis(100);

/// Time for which a client may take nothing before what waits for it is copied out of the store's memory.
const DETACH_AFTER: Duration = Duration::from_secs(1);

/// A stream without any deadline looks at itself this often.
const IDLE_WAKE_INTERVAL: Duration = Duration::from_secs(3600);
