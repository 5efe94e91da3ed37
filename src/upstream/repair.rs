//! Damaged segments are fetched again, beside the stream.
//!
//! Owns the second replication connection to the server of the stream: without a slot, for one segment, told apart by its
//! name. Is woken when the store finds damage. Whether what came is what was written decides the store. Must never disturb
//! the stream: it is a task of its own, its end is not the session's end, files are touched on a thread of their own, and it
//! vouches for nothing (no flush position is ever reported).

use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::AsyncReadExt,
    sync::{mpsc, watch},
    task::{AbortHandle, JoinHandle},
    time::{Instant, timeout, timeout_at},
};

use crate::conninfo::{Conninfo, ProcessSurroundings};
use crate::net::{Socket, send_all};
use crate::protocol::{
    Command, CopyStream, ServerError, SqlState, StreamItem, backend,
    command::{StartReplication, StreamKind},
    frontend,
    replication::StandbyStatusUpdate,
};
use crate::store::{AppendError, Store, StoreError};
use crate::upstream::connect::{OPENING_TIME_MAX, identify_system};
use crate::upstream::dial::log_in;
use crate::upstream::dialog::{Dialog, StartCopyError};
use crate::upstream::error::chain;
use crate::upstream::repair_schedule::{Next, Outcome, Schedule};
use crate::upstream::{Opened, Upstream, UpstreamError, random};
use crate::wal::{Lsn, PgTimestamp, SegmentName};

/// A damaged segment could not be fetched.
#[derive(Debug, thiserror::Error)]
enum RepairError {
    #[error("the upstream has removed the WAL segment")]
    Removed(#[source] Box<ServerError>),
    #[error("the upstream ended the stream before the end of the WAL segment")]
    EndedEarly,
    #[error("the upstream sent nothing of the WAL segment for {} seconds", PROGRESS_TIME_MAX.as_secs())]
    NoProgress,
    #[error("the disk took nothing of the WAL segment for {} seconds", DISK_TIME_MAX.as_secs())]
    DiskStalled,
    #[error("what writes the WAL segment ended unexpectedly")]
    WriterEnded,
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The task that repairs; ends when this is dropped.
pub(super) struct Repairs(AbortHandle);

impl Drop for Repairs {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Upstream {
    /// Repairs what is damaged as long as the value lives, from the server of the stream.
    pub(super) fn repair_beside(&self, opened: &Opened) -> Repairs {
        let mut conninfo = self.settings.conninfo.clone();
        // Not a standby that anybody waits for.
        let name = conninfo.application_name.as_deref().unwrap_or("walrelay");
        conninfo.application_name = Some(format!("{name}{NAME_SUFFIX}"));
        let host = opened.host.clone();
        let (store, damage) = (self.store.clone(), self.damage.clone());
        Repairs(tokio::spawn(Repairer { conninfo, host, store, damage }.run()).abort_handle())
    }
}

struct Repairer {
    conninfo: Conninfo,
    /// The host of the stream.
    host: String,
    store: Store,
    /// Marked when damage was found, or is gone.
    damage: watch::Receiver<()>,
}

impl Repairer {
    async fn run(mut self) {
        let mut schedule = Schedule::default();
        loop {
            self.damage.mark_unchanged();
            let damaged: Vec<_> = self.store.damaged().iter().map(|damaged| damaged.name).collect();
            let changed = match schedule.next(Instant::now().into_std(), &damaged) {
                Next::Now(name) => {
                    let fetched = timeout(SEGMENT_TIME_MAX, self.fetch(name)).await;
                    let result = fetched.unwrap_or(Err(RepairError::NoProgress));
                    let now = Instant::now().into_std();
                    match outcome(&result) {
                        Outcome::Removed => schedule.note_removed(now, name, &damaged),
                        outcome => schedule.note(now, name, outcome, random()),
                    }
                    self.tell(name, &result, &damaged);
                    Ok(())
                }
                Next::At(then) => {
                    // The time that has come is looked at like news.
                    timeout_at(then.into(), self.damage.changed()).await.unwrap_or(Ok(()))
                }
                Next::Nothing => self.damage.changed().await,
            };
            if changed.is_err() {
                // Nobody finds damage any more.
                return;
            }
        }
    }

    fn tell(&self, name: SegmentName, result: &Result<(), RepairError>, damaged: &[SegmentName]) {
        let Err(error) = result else { return };
        if matches!(error, RepairError::Store(StoreError::NothingToRepair(_) | StoreError::RepairRunning)) {
            return;
        }
        let (text, SegmentName { timeline, number }) = (chain(error), name);
        let is_news = self.store.note_repair_error(name, &text);
        if matches!(error, RepairError::Removed(_)) {
            // What is older was removed before.
            for older in damaged.iter().filter(|older| older.timeline == timeline && older.number < number) {
                self.store.note_repair_error(*older, &text);
            }
            if is_news {
                tracing::error!(%timeline, number = number.0, error = %text, "the upstream has not got a damaged WAL segment any more");
            }
        } else if is_news {
            tracing::warn!(%timeline, number = number.0, error = %text, "could not fetch a damaged WAL segment again");
        }
    }

    /// Fetches one segment and gives it to the store.
    async fn fetch(&self, name: SegmentName) -> Result<(), RepairError> {
        let size = self.store.identity().ok_or(StoreError::NotInitialized)?.segment_size;
        let start = name.number.start(size).ok_or(StoreError::NothingToRepair(name))?;
        let opening = timeout(OPENING_TIME_MAX, self.open(name, start)).await;
        let (socket, already_read) = opening.map_err(|_| UpstreamError::OpeningTimeout)??;
        let mut stream = CopyStream::new();
        stream.push(already_read, 0);
        let writer = Writer { store: self.store.clone(), name, running: None };
        let end = name.number.end(size);
        let progress_at = Instant::now();
        let unsent = BytesMut::new();
        let mut segment = SegmentStream { socket, stream, unsent, at: start, end, progress_at, writer };
        segment.receive().await?;
        let writer = segment.end().await;
        writer.finish().await
    }

    async fn open(&self, name: SegmentName, start: Lsn) -> Result<(Socket, Bytes), RepairError> {
        let mut dialog = self.connect().await?;
        let system = identify_system(&mut dialog).await?;
        let expected = self.store.identity().ok_or(StoreError::NotInitialized)?.system_id;
        if system.system_id != expected {
            return Err(UpstreamError::WrongSystem { expected, got: system.system_id }.into());
        }
        let kind = StreamKind::Physical { timeline: Some(name.timeline) };
        let command = Command::StartReplication(StartReplication { slot: None, start: Some(start), kind });
        match dialog.start_copy(&command).await {
            Ok(begun) => Ok(begun),
            Err(StartCopyError::Refused(dialog, error)) => {
                dialog.terminate().await;
                Err(refused(*error))
            }
            Err(StartCopyError::TimelineEndsHere) => Err(RepairError::EndedEarly),
            Err(StartCopyError::Failed(error)) => Err(error.into()),
        }
    }

    async fn connect(&self) -> Result<Dialog, UpstreamError> {
        let mut conninfo = self.conninfo.clone();
        conninfo.reread_passwords(&ProcessSurroundings);
        let host = conninfo.hosts.iter().find(|host| host.to_string() == self.host);
        log_in(&conninfo, host.ok_or(UpstreamError::NoHost)?).await
    }
}

fn outcome(result: &Result<(), RepairError>) -> Outcome {
    match result {
        Ok(()) => Outcome::Repaired,
        Err(RepairError::Removed(_)) => Outcome::Removed,
        Err(
            RepairError::EndedEarly
            | RepairError::Store(
                StoreError::OtherContent { .. }
                | StoreError::RepairLength { .. }
                | StoreError::ChecksumUnknown(_)
                | StoreError::NothingToRepair(_),
            ),
        ) => Outcome::SegmentFailed,
        Err(_) => Outcome::Failed,
    }
}

fn refused(error: ServerError) -> RepairError {
    if error.is(SqlState::UNDEFINED_FILE) {
        return RepairError::Removed(Box::new(error));
    }
    UpstreamError::Server(Box::new(error)).into()
}

/// The stream of one segment.
struct SegmentStream {
    socket: Socket,
    stream: CopyStream,
    /// Answers that the socket has not taken yet.
    unsent: BytesMut,
    /// The next byte wanted, and the first that is not.
    at: Lsn,
    end: Lsn,
    progress_at: Instant,
    writer: Writer,
}

impl SegmentStream {
    /// Until the whole segment is with the writer.
    async fn receive(&mut self) -> Result<(), RepairError> {
        let mut input = BytesMut::new();
        loop {
            while let Some(item) = self.stream.poll().map_err(UpstreamError::from)? {
                self.handle(item).await?;
                if self.at >= self.end {
                    return Ok(());
                }
            }
            input.reserve(READ_BYTES);
            let exchange = async {
                send_all(&mut self.socket, &mut self.unsent).await?;
                self.socket.read_buf(&mut input).await
            };
            let read = timeout_at(self.progress_at + PROGRESS_TIME_MAX, exchange).await;
            if read.map_err(|_| RepairError::NoProgress)?.map_err(UpstreamError::from)? == 0 {
                return Err(UpstreamError::Closed.into());
            }
            self.stream.push(input.split().freeze(), 0);
        }
    }

    async fn handle(&mut self, item: StreamItem) -> Result<(), RepairError> {
        match item {
            StreamItem::WalBytes { at, bytes, .. } => self.take(at, bytes).await,
            StreamItem::Keepalive(keepalive) => {
                if keepalive.reply_requested && self.unsent.is_empty() {
                    // It is alive, and vouches for nothing.
                    let update = StandbyStatusUpdate {
                        write: Some(self.at),
                        flush: None,
                        apply: None,
                        sent_at: PgTimestamp::from_system_time(SystemTime::now()),
                        reply_requested: false,
                    };
                    update.encode(&mut self.unsent);
                }
                Ok(())
            }
            StreamItem::WalStart(..) | StreamItem::WalEnd => Ok(()),
            StreamItem::CopyDone | StreamItem::Other(backend::Message::CommandComplete(_)) => {
                Err(RepairError::EndedEarly)
            }
            StreamItem::Other(
                backend::Message::NoticeResponse(_) | backend::Message::ParameterStatus { .. },
            ) => Ok(()),
            StreamItem::Other(backend::Message::ErrorResponse(error)) => Err(refused(error)),
            StreamItem::Other(other) => Err(UpstreamError::Unexpected(format!("{other:?}")).into()),
            // None was offered, so the stream has refused it before.
            StreamItem::Link(_) => Err(UpstreamError::Unexpected("link message".to_owned()).into()),
        }
    }

    async fn take(&mut self, at: Lsn, mut bytes: Bytes) -> Result<(), RepairError> {
        if at != self.at {
            return Err(UpstreamError::Append(AppendError::Gap { expected: self.at, got: at }).into());
        }
        let wanted = usize::try_from(self.end.bytes_since(at)).unwrap_or(usize::MAX);
        bytes.truncate(wanted);
        self.at = at.advance(bytes.len() as u64);
        self.progress_at = Instant::now();
        self.writer.write(bytes).await
    }

    /// Ends the stream as a receiver does, and waits a moment for the server to see it: else it would log a lost connection.
    async fn end(mut self) -> Writer {
        frontend::Message::CopyDone.encode(&mut self.unsent);
        frontend::Message::Terminate.encode(&mut self.unsent);
        let farewell = async {
            send_all(&mut self.socket, &mut self.unsent).await?;
            let mut rest = BytesMut::with_capacity(READ_BYTES);
            while self.socket.read_buf(&mut rest).await? > 0 {
                rest.clear();
            }
            std::io::Result::Ok(())
        };
        // All that was wanted is here, whether the server is or not.
        let _ = timeout(FAREWELL_TIME_MAX, farewell).await;
        self.writer
    }
}

/// Brings the bytes to the store, on a thread where blocking is allowed. Dropped before `finish`, nothing is left of them.
struct Writer {
    store: Store,
    name: SegmentName,
    /// Since the first bytes.
    running: Option<(mpsc::Sender<Piece>, Running)>,
}

type Running = JoinHandle<Result<(), StoreError>>;

enum Piece {
    Bytes(Bytes),
    /// That was all.
    End,
}

impl Writer {
    async fn write(&mut self, bytes: Bytes) -> Result<(), RepairError> {
        self.send(Piece::Bytes(bytes)).await
    }

    async fn finish(mut self) -> Result<(), RepairError> {
        self.send(Piece::End).await?;
        self.outcome().await
    }

    async fn send(&mut self, piece: Piece) -> Result<(), RepairError> {
        let (store, name) = (&self.store, self.name);
        let (pieces, _) = self.running.get_or_insert_with(|| {
            let (sender, receiver) = mpsc::channel(PIECES_MAX);
            let store = store.clone();
            (sender, tokio::task::spawn_blocking(move || write_segment(&store, name, receiver)))
        });
        match timeout(DISK_TIME_MAX, pieces.send(piece)).await {
            Ok(Ok(())) => Ok(()),
            // It has ended already, and says why.
            Ok(Err(_)) => self.outcome().await.and(Err(RepairError::WriterEnded)),
            Err(_) => Err(RepairError::DiskStalled),
        }
    }

    async fn outcome(&mut self) -> Result<(), RepairError> {
        let Some((_, running)) = self.running.take() else { return Err(RepairError::WriterEnded) };
        let ended = timeout(DISK_TIME_MAX, running).await.map_err(|_| RepairError::DiskStalled)?;
        Ok(ended.map_err(|_| RepairError::WriterEnded)??)
    }
}

fn write_segment(
    store: &Store,
    name: SegmentName,
    mut pieces: mpsc::Receiver<Piece>,
) -> Result<(), StoreError> {
    let mut repair = store.begin_repair(name)?;
    while let Some(piece) = pieces.blocking_recv() {
        match piece {
            Piece::Bytes(bytes) => repair.write(&bytes)?,
            Piece::End => return repair.finish(),
        }
    }
    // Nobody brings the rest.
    Ok(())
}

/// Appended to the application name.
const NAME_SUFFIX: &str = "_repair";

/// Bytes read from the socket at a time, and pieces of them that may wait for the disk.
const READ_BYTES: usize = 256 << 10;
const PIECES_MAX: usize = 4;

/// Longest time without any of the segment's WAL.
const PROGRESS_TIME_MAX: Duration = Duration::from_secs(30);

/// Longest time for a whole segment, however it trickles.
const SEGMENT_TIME_MAX: Duration = Duration::from_secs(3600);

/// Longest time that is waited for the disk.
const DISK_TIME_MAX: Duration = Duration::from_secs(30);

/// Time for the server to see that the stream ends.
const FAREWELL_TIME_MAX: Duration = Duration::from_secs(2);
