//! The stream from the upstream into the store.
//!
//! Drives `session::Receiver`: waits in one place for bytes, progress of the store, time and the end of the relay, and lets
//! the session decide what is said upstream. Takes WAL off the socket without copying it. Never reports a position of its
//! own making, and never waits for the disk.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::{Bytes, BytesMut};
use tokio::{sync::watch, time::Sleep};
use tokio_util::sync::CancellationToken;

use crate::metrics::{LinkMetrics, LinkTraffic, UpstreamMetrics, bytes_value};
use crate::net::{BlockReader, ReadHalf, WriteHalf, reunite, send_all};
use crate::protocol::feedback::Feedback;
use crate::protocol::{
    CopyStream, frontend,
    replication::{StandbyStatusUpdate, WAL_DATA_HEADER_BYTES},
};
use crate::session::{
    Receiver,
    feedback::{FeedbackSender, Feedbacks},
    gather::Gathering,
    receiver::{Output, Progress, Reading, Report, SyncAbility},
};
use crate::status::{LostWal, RemovedWal, UpstreamStatus};
use crate::store::{BlockId, Condition, Positions, WalWriter};
use crate::upstream::acknowledging::Acknowledging;
use crate::upstream::dialog::{Dialog, Introduction};
use crate::upstream::link::ReceivedLink;
use crate::upstream::retained::Retained;
use crate::upstream::{Opened, UpstreamError};
use crate::wal::{Lsn, PgTimestamp};

/// Why a stream ended although nothing failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamEnd {
    /// The relay stops, or is fenced.
    StopRequested,
    /// It is plain because a link had brought something wrong, and is to give way to one.
    LinkDue,
    /// Nothing was heard for `wal_receiver_timeout`.
    UpstreamSilent,
    /// The upstream shut down.
    UpstreamStopped,
    /// The upstream's timeline ended.
    TimelineEnded,
    /// The store could not take more for [`NO_ROOM_TIME_MAX`]; a primary that wants to stop must not wait for it.
    StoreStalled,
}

/// What a stream needs from outside.
pub(crate) struct StreamContext<'a> {
    pub(crate) writer: &'a mut WalWriter,
    pub(crate) positions: watch::Receiver<Option<Positions>>,
    pub(crate) condition: watch::Receiver<Condition>,
    pub(crate) acknowledging: &'a mut Acknowledging,
    /// What standbys hold back.
    pub(crate) feedbacks: Option<Arc<dyn Feedbacks>>,
    /// What is durable here, once it was compared with the upstream.
    pub(crate) durable: watch::Sender<Option<Lsn>>,
    pub(crate) status: &'a watch::Sender<UpstreamStatus>,
    pub(crate) metrics: &'a UpstreamMetrics,
    pub(crate) link_metrics: &'a LinkMetrics,
    pub(crate) link_traffic: &'a Arc<LinkTraffic>,
    /// The relay stops.
    pub(crate) shutdown: CancellationToken,
    /// It stops, or is to leave the upstream alone.
    pub(crate) leave: CancellationToken,
}

/// What is left of a stream.
pub(crate) struct Streamed {
    pub(crate) outcome: Result<StreamEnd, UpstreamError>,
    /// The last block used, so that no number is used twice.
    pub(crate) block: BlockId,
    /// The connection, when the server has ended the timeline and can be asked for the next.
    pub(crate) dialog: Option<Dialog>,
}

impl Streamed {
    /// The relay stops, or is fenced.
    pub(crate) fn stop_requested(block: BlockId) -> Self {
        Self { outcome: Ok(StreamEnd::StopRequested), block, dialog: None }
    }
}

/// One stream.
pub(crate) struct WalReceiver<'a> {
    pub(super) context: StreamContext<'a>,
    pub(super) session: Receiver,
    /// What the slot says was acknowledged, and is not held yet.
    lost: Option<LostWal>,
    /// What the upstream keeps for our slot; `None` without a slot.
    pub(super) retained: Option<Arc<Retained>>,
    /// What the server said at the login.
    introduction: Introduction,
    pub(super) gathering: Gathering,
    /// What the standbys hold back, and what was told of it.
    held_back: Feedback,
    feedback: FeedbackSender,
    read: ReadHalf,
    write: WriteHalf,
    blocks: BlockReader,
    pub(super) stream: CopyStream,
    /// Something that was read was not looked at yet: it waits for room in the store, or for its turn.
    pub(super) has_unread: bool,
    /// Where WAL may come compressed.
    pub(super) link: Option<ReceivedLink>,
    /// When the stream is to give way to a link.
    pub(super) link_due: Option<Instant>,
    /// Status updates that the socket has not taken yet.
    unsent: BytesMut,
    /// There are some, here or in the socket's own buffer.
    has_unsent: bool,
    pub(super) held_end: Lsn,
    no_room_since: Option<Instant>,
    leaving: Option<Leaving>,
}

/// The relay stops, or is to leave the upstream alone.
#[derive(Clone, Copy)]
struct Leaving {
    /// This is to be durable before the last report, if it gets so in time.
    wanted: Option<Lsn>,
    deadline: Instant,
}

enum Event {
    Received(Bytes, BlockId),
    /// What was read before can be looked at.
    Resumed,
    Closed,
    Sent,
    Progressed,
    StandbysMoved,
    TimePassed,
    StopRequested,
}

impl<'a> WalReceiver<'a> {
    /// A stream that was just started at `streaming.start`.
    pub(crate) fn new(mut context: StreamContext<'a>, opened: Opened) -> Self {
        let Opened { streaming, introduction, settings, lost, retained, link, .. } = opened;
        let (link_due, is_slot_holding_back) = (opened.link_due, opened.is_slot_holding_back);
        let progress = progress(&mut context).unwrap_or(Progress {
            received: streaming.start,
            written: streaming.start,
            flushed: streaming.start,
            applied: None,
        });
        let (read, write) = streaming.socket.into_split();
        let mut stream = if link.is_some() { CopyStream::of_link() } else { CopyStream::new() };
        stream.push(streaming.already_read, streaming.block.0);
        let feedbacks = context.feedbacks.as_ref().filter(|_| is_slot_holding_back);
        let silent_until = feedbacks.map(|feedbacks| feedbacks.complete_from());
        let mut session = Receiver::new(settings, progress, Instant::now());
        if let Some(lost) = lost {
            session.vouch_only_from(lost.to);
        }
        let memory_bytes_max = context.writer.memory_bytes_max();
        let blocks = BlockReader::new(streaming.block, memory_bytes_max);
        let link = link.map(|terms| {
            let decoding = blocks.for_decoding(memory_bytes_max);
            ReceivedLink::new(terms, streaming.start, decoding, context.link_traffic, context.link_metrics)
        });
        Self {
            session,
            lost,
            retained,
            introduction,
            gathering: Gathering::new(),
            held_back: Feedback::default(),
            feedback: FeedbackSender::silent_until(silent_until),
            blocks,
            context,
            read,
            write,
            stream,
            has_unread: false,
            link,
            link_due,
            unsent: BytesMut::new(),
            has_unsent: false,
            held_end: streaming.held_end,
            no_room_since: None,
            leaving: None,
        }
    }

    /// Streams until an end or an error.
    pub(crate) async fn run(mut self) -> Streamed {
        let mut outcome = self.stream().await;
        self.context.writer.submit();
        let block = self.blocks.current();
        let mut dialog = None;
        match outcome {
            Ok(StreamEnd::StopRequested | StreamEnd::LinkDue) => self.say_goodbye().await,
            Ok(StreamEnd::TimelineEnded) => {
                let leave = self.context.leave.clone();
                tokio::select! {
                    // The server may be gone; whoever stops or fences the relay does not wait for it.
                    () = leave.cancelled() => outcome = Ok(StreamEnd::StopRequested),
                    ended = tokio::time::timeout(END_COPY_TIME_MAX, self.end_copy()) => match ended {
                        Ok(Ok(ready)) => dialog = Some(ready),
                        Ok(Err(error)) => outcome = Err(error),
                        Err(_) => outcome = Err(UpstreamError::Io(std::io::ErrorKind::TimedOut.into())),
                    },
                }
            }
            _ => {}
        }
        Streamed { outcome, block, dialog }
    }

    /// The server has ended the copy, and goes on with other commands when we do so too.
    async fn end_copy(mut self) -> Result<Dialog, UpstreamError> {
        // A message that is half sent comes first.
        let sent =
            tokio::time::timeout(LAST_SEND_TIME_MAX, send_all(&mut self.write, &mut self.unsent)).await;
        sent.map_err(|_| UpstreamError::Closed)??;
        let socket = reunite(self.read, self.write).ok_or(UpstreamError::Closed)?;
        Dialog::after_copy(socket, self.stream.into_rest(), self.introduction).await
    }

    async fn stream(&mut self) -> Result<StreamEnd, UpstreamError> {
        if let Some(end) = self.handle_items()? {
            return Ok(end);
        }
        let mut timer = Box::pin(tokio::time::sleep(Duration::ZERO));
        self.look_at_feedback();
        while !self.has_left() {
            self.tell_feedback();
            while let Some(output) = self.session.poll_output(Instant::now()) {
                match output {
                    Output::Send(report) => self.queue_report(report),
                    Output::GiveUpSilent => return Ok(StreamEnd::UpstreamSilent),
                }
            }
            self.set_timer(timer.as_mut());
            match self.next_event(timer.as_mut()).await? {
                Event::Received(bytes, block) => {
                    self.session.handle_heard(Instant::now());
                    self.stream.push(bytes, block.0);
                    if let Some(end) = self.handle_items()? {
                        return Ok(end);
                    }
                }
                Event::Resumed => {
                    if let Some(end) = self.handle_items()? {
                        return Ok(end);
                    }
                }
                Event::Closed => return Err(UpstreamError::Closed),
                Event::Sent => {}
                Event::Progressed => self.handle_progress(),
                Event::StandbysMoved => {
                    self.look_at_feedback();
                    self.handle_progress();
                }
                Event::TimePassed if self.has_stalled() => return Ok(StreamEnd::StoreStalled),
                Event::TimePassed => {
                    // A slot that goes does not say so.
                    self.look_at_feedback();
                    self.hand_over();
                    self.handle_progress();
                }
                Event::StopRequested => self.begin_to_leave(),
            }
            self.watch_room();
            if self.leaving.is_none() && self.is_link_due() {
                return Ok(StreamEnd::LinkDue);
            }
        }
        Ok(StreamEnd::StopRequested)
    }

    /// The last report is to tell of what was received until now. Until it does, or for a bounded time, the session goes on as
    /// ever: a primary that wants to stop meanwhile must not wait for our disk.
    fn begin_to_leave(&mut self) {
        self.context.writer.submit();
        let is_stopping = self.context.shutdown.is_cancelled();
        let sync_time_max = if is_stopping { LAST_SYNC_TIME_MAX } else { LEAVING_SYNC_TIME_MAX };
        let wanted = self.context.positions.borrow().map(|positions| positions.verified);
        self.leaving = Some(Leaving { wanted, deadline: Instant::now() + sync_time_max });
    }

    fn has_left(&self) -> bool {
        let flushed = self.context.positions.borrow().map(|positions| positions.flushed);
        self.leaving.is_some_and(|leaving| flushed >= leaving.wanted || Instant::now() >= leaving.deadline)
    }

    /// The only wait. Every branch is cancel-safe: reads and writes keep what they have done in `self`.
    async fn next_event(&mut self, timer: std::pin::Pin<&mut Sleep>) -> Result<Event, UpstreamError> {
        let has_room = self.no_room_since.is_none();
        tokio::select! {
            biased;
            () = self.context.leave.cancelled(), if self.leaving.is_none() => Ok(Event::StopRequested),
            _ = self.context.positions.changed() => Ok(Event::Progressed),
            _ = self.context.condition.changed() => Ok(Event::Progressed),
            () = self.context.acknowledging.changed() => Ok(Event::StandbysMoved),
            sent = send_all(&mut self.write, &mut self.unsent), if self.has_unsent => {
                sent?;
                self.has_unsent = false;
                Ok(Event::Sent)
            }
            // Before more is read.
            () = std::future::ready(()), if has_room && self.has_unread => Ok(Event::Resumed),
            received = self.blocks.read(&mut self.read), if has_room => {
                Ok(received?.map_or(Event::Closed, |(bytes, block)| Event::Received(bytes, block)))
            }
            () = timer => Ok(Event::TimePassed),
        }
    }

    fn set_timer(&self, timer: std::pin::Pin<&mut Sleep>) {
        let stall = self.no_room_since.map(|since| since + NO_ROOM_TIME_MAX);
        let stall = stall.into_iter().chain(self.leaving.map(|leaving| leaving.deadline)).min();
        let acknowledging = self.context.acknowledging.deadline();
        let feedback = self.feedback.due(self.held_back).filter(|_| self.has_room_for_feedback());
        // Once it has passed, whatever comes lets it be looked at again.
        let link_due = self.link_due.filter(|due| *due > Instant::now());
        let deadlines = [
            self.session.poll_timeout(),
            self.gathering.deadline(),
            acknowledging,
            feedback,
            stall,
            link_due,
        ];
        let next = deadlines.into_iter().flatten().min();
        let deadline = tokio::time::Instant::from_std(next.unwrap_or_else(|| Instant::now() + IDLE_WAIT_MAX));
        if timer.deadline() != deadline {
            timer.reset(deadline);
        }
    }

    pub(super) fn handle_progress(&mut self) {
        if !self.session.is_reporting() && self.context.writer.is_overlap_proven() {
            self.session.handle_overlap_proven();
        }
        let ability = match *self.context.condition.borrow_and_update() {
            Condition::Healthy => SyncAbility::Able,
            Condition::NoSpace { .. } | Condition::Failed { .. } => SyncAbility::Unable,
        };
        self.session.handle_sync_ability(ability);
        if let Some(progress) = progress(&mut self.context) {
            self.session.handle_progress(progress);
            self.tell_durable();
            self.note_regained();
            let held = *self.context.positions.borrow();
            let is_filled = |removed: RemovedWal| {
                held.is_some_and(|held| held.timeline != removed.timeline || held.verified > removed.from)
            };
            self.context.status.send_if_modified(|status| {
                // Whoever looks sees it; nobody waits for it.
                status.received = Some(progress.received);
                let is_filled = status.removed.is_some_and(is_filled);
                if is_filled {
                    status.removed = None;
                    status.needs_attention = status.is_hurt();
                    self.context.metrics.needs_attention.set(f64::from(u8::from(status.needs_attention)));
                }
                is_filled
            });
        }
        self.context.positions.mark_unchanged();
    }

    fn tell_durable(&mut self) {
        let flushed = self.context.positions.borrow().map(|positions| positions.flushed);
        if self.session.is_reporting() && *self.context.durable.borrow() != flushed {
            self.context.durable.send_replace(flushed);
        }
    }

    /// What was lost comes back from the upstream, if it still has it; whether standbys have it too is another matter.
    fn note_regained(&mut self) {
        let Some(lost) = self.lost else { return };
        let Some(flushed) = self.context.positions.borrow().map(|positions| positions.flushed) else {
            return;
        };
        let metrics = self.context.metrics;
        metrics.lost.set(bytes_value(lost.to.bytes_since(flushed)));
        if flushed < lost.to {
            return;
        }
        self.lost = None;
        tracing::info!(lost_from = %lost.from, lost_to = %lost.to, "the WAL that had been lost is here again");
        self.context.status.send_modify(|status| {
            status.lost = None;
            status.needs_attention = status.is_hurt();
            metrics.needs_attention.set(f64::from(u8::from(status.needs_attention)));
        });
    }

    fn look_at_feedback(&mut self) {
        let smallest = self.context.feedbacks.as_ref().map(|feedbacks| feedbacks.smallest());
        self.held_back = smallest.unwrap_or_default();
    }

    /// If not, again when the socket has taken something.
    fn has_room_for_feedback(&self) -> bool {
        self.unsent.len() + FEEDBACK_FRAME_BYTES <= UNSENT_BYTES_MAX
    }

    fn tell_feedback(&mut self) {
        if !self.has_room_for_feedback() {
            return;
        }
        if let Some(feedback) = self.feedback.poll(Instant::now(), self.held_back) {
            feedback.message(PgTimestamp::from_system_time(SystemTime::now())).encode(&mut self.unsent);
            self.has_unsent = true;
        }
    }

    fn queue_report(&mut self, report: Report) {
        if let (Some(retained), Some(flush)) = (&self.retained, report.flush) {
            retained.note_reported(flush);
        }
        let update = StandbyStatusUpdate {
            write: report.write,
            flush: report.flush,
            apply: report.apply,
            sent_at: PgTimestamp::from_system_time(SystemTime::now()),
            reply_requested: report.ask_for_reply,
        };
        if self.unsent.len() + update_frame_bytes() <= UNSENT_BYTES_MAX {
            update.encode(&mut self.unsent);
            self.has_unsent = true;
            self.context.metrics.status_updates.increment(1);
        }
    }

    /// Pauses reading while the store has no room, and remembers since when.
    fn watch_room(&mut self) {
        let now = Instant::now();
        if self.context.writer.has_room() {
            self.no_room_since = None;
            self.session.handle_reading(now, Reading::Open);
        } else if self.no_room_since.is_none() {
            self.no_room_since = Some(now);
            self.session.handle_reading(now, Reading::Paused);
        }
    }

    fn has_stalled(&self) -> bool {
        self.no_room_since.is_some_and(|since| since.elapsed() >= NO_ROOM_TIME_MAX)
    }

    /// Tells the upstream what is durable now, and ends the copy. When the relay goes on, what was said last has been heard on
    /// return, if the upstream is there at all.
    async fn say_goodbye(mut self) {
        let is_stopping = self.context.shutdown.is_cancelled();
        self.handle_progress();
        while let Some(Output::Send(report)) = self.session.poll_output(Instant::now()) {
            self.queue_report(report);
        }
        frontend::Message::CopyDone.encode(&mut self.unsent);
        frontend::Message::Terminate.encode(&mut self.unsent);
        // The upstream may be gone already.
        let sent =
            tokio::time::timeout(LAST_SEND_TIME_MAX, send_all(&mut self.write, &mut self.unsent)).await;
        if !is_stopping && matches!(sent, Ok(Ok(()))) {
            // What it still sends is not looked at. It closes when it has read all that was said.
            let closed = async { while let Ok(Some(_)) = self.blocks.read(&mut self.read).await {} };
            let _ = tokio::time::timeout(LAST_SEND_TIME_MAX, closed).await;
        }
    }
}

fn progress(context: &mut StreamContext<'_>) -> Option<Progress> {
    let positions = (*context.positions.borrow())?;
    let acknowledged = context.acknowledging.update(Instant::now(), positions);
    Some(Progress {
        received: context.writer.received(),
        written: positions.written,
        // Nothing is vouched for until the policy can be computed.
        flushed: acknowledged.flush.unwrap_or(Lsn::MIN),
        applied: acknowledged.apply,
    })
}

const fn update_frame_bytes() -> usize {
    // tag, length, kind, three positions, time, reply byte
    5 + 1 + 3 * 8 + 8 + 1
}

/// Tag, length, kind, time, two ids with their epochs.
const FEEDBACK_FRAME_BYTES: usize = 5 + 1 + 8 + 4 * 4;

/// Status updates that may wait for the socket; further ones are dropped, for the next one says more.
const UNSENT_BYTES_MAX: usize = 4096;

/// Longest time that reading is paused because the store takes nothing. Then the connection is closed: a primary that
/// shuts down waits for receivers that are alive, and must not wait for our disk.
pub(crate) const NO_ROOM_TIME_MAX: Duration = Duration::from_secs(1);

/// The loop looks around at least so often.
const IDLE_WAIT_MAX: Duration = Duration::from_secs(60);

/// Time for the last sync when the relay stops.
const LAST_SYNC_TIME_MAX: Duration = Duration::from_secs(5);

/// The same when the upstream is left although the relay goes on: a primary that stops meanwhile waits for it.
const LEAVING_SYNC_TIME_MAX: Duration = Duration::from_secs(1);

/// Time for the answer with which a server ends the copy at the end of a timeline.
const END_COPY_TIME_MAX: Duration = Duration::from_secs(5);

/// Time for the last message, and for the upstream to close.
const LAST_SEND_TIME_MAX: Duration = Duration::from_secs(1);

const _: () = assert!(update_frame_bytes() * 8 < UNSENT_BYTES_MAX && WAL_DATA_HEADER_BYTES > 0);
