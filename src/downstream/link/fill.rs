//! Moves WAL to a link's connection: what a stream does with plain messages, done with frames.
//!
//! Does one step at a time, and waits for nothing itself: what takes long is left to the stream's background work. Live WAL
//! in small pieces is compressed here; whatever is larger, on a thread that may be busy for long.

use std::time::{Duration, Instant};

use crate::downstream::blocking::run_blocking;
use crate::downstream::connection::Stream;
use crate::downstream::link::bulk::{BulkFrame, BulkKey, EncodedWal};
use crate::downstream::link::sending::{LinkFrame, Next, Sent};
use crate::downstream::walsender::{Done, Moved, Run, StreamError, WalSender, load, now, timestamp};
use crate::metrics::Carried;
use crate::protocol::link::{Encoding, FrameKind};
use crate::protocol::replication::WAL_DATA_FRAME_BYTES;
use crate::session::link::{Waiting, bulk_end};
use crate::session::sender::TimelineState;
use crate::store::{Read, ReadError};
use crate::wal::{Lsn, LsnRange};

impl<S: Stream> WalSender<'_, S> {
    /// The next step of a link; `None` when the stream goes on with plain messages for now.
    pub(in crate::downstream) fn fill_link(&mut self, run: &mut Run) -> Result<Option<Moved>, StreamError> {
        let (Some(link), Some(wanted)) = (&mut self.link, self.sender.sendable()) else { return Ok(None) };
        let now = now();
        if let Err(later) = link.check_rate(wanted, now) {
            run.paced_since.get_or_insert(now);
            run.paced_until = Some(later);
            return Ok(Some(Moved::Nothing));
        }
        if let Some(since) = run.paced_since.take() {
            link.note_paced(since, now);
        }
        match link.next(wanted, self.sender.timeline(), now) {
            Next::Plain => Ok(None),
            Next::Wait => Ok(Some(Moved::Nothing)),
            Next::Frame(frame, place) => {
                if let Some(following) = link.following() {
                    following.advance(place);
                }
                self.put_frame(&frame, now);
                Ok(Some(Moved::Something))
            }
            Next::Standalone(frame) => {
                self.put_frame(&frame, now);
                Ok(Some(Moved::Something))
            }
            Next::Encode => self.encode(run, wanted.end(), now).map(Some),
            Next::Bulk(key) => Ok(Some(self.send_bulk(run, key, wanted.end(), now))),
        }
    }

    /// A plain message was moved to the connection.
    pub(in crate::downstream) fn note_plain(&mut self, wal_bytes: u64) {
        if let Some(link) = &mut self.link {
            let wire_bytes = wal_bytes + WAL_DATA_FRAME_BYTES as u64;
            let (carried, encoding) = (Carried::Plain, Encoding::Plain);
            link.note_sent(&Sent { carried, encoding, wal_bytes, wire_bytes }, now());
        }
    }

    fn put_frame(&mut self, frame: &LinkFrame, now: Instant) {
        let (Some(link), Some(wanted)) = (&mut self.link, self.sender.sendable()) else { return };
        let head = link.head(frame, wanted.end(), timestamp());
        let (wal_bytes, EncodedWal { encoding, payload, .. }) = (frame.range.bytes(), &frame.encoded);
        if payload.len() <= COPIED_BYTES_MAX {
            self.connection.outgoing.encode(|out| {
                out.extend_from_slice(head.as_ref());
                out.extend_from_slice(payload);
            });
        } else {
            self.connection.outgoing.push_wal(head.as_ref(), vec![payload.clone()]);
        }
        let carried = match frame.kind {
            FrameKind::Standalone => Carried::Bulk,
            FrameKind::Stream { .. } => Carried::Stream,
        };
        let wire_bytes = (head.as_ref().len() + payload.len()) as u64;
        link.note_sent(&Sent { carried, encoding: *encoding, wal_bytes, wire_bytes }, now);
        self.context.metrics.sent_bytes.increment(wal_bytes);
        self.sender.handle_sent(frame.range.end());
    }

    /// Makes the next frame of the shared stream, if nobody else does.
    fn encode(&mut self, run: &mut Run, limit: Lsn, asked_at: Instant) -> Result<Moved, StreamError> {
        let Some(following) = self.link.as_mut().and_then(|link| link.following()) else {
            return Ok(Moved::Nothing);
        };
        let Some(making) = following.begin(limit, asked_at)? else { return Ok(Moved::Nothing) };
        let is_quick = following.is_quick(making.range().bytes());
        let read = match self.reader.read(making.range()) {
            // As for a plain message: the positions say so in a moment.
            Err(ReadError::TimelineLeft(_)) if self.sender.timeline() == TimelineState::Current => {
                self.follow_positions(run);
                return Ok(Moved::Nothing);
            }
            read => read?,
        };
        match read {
            Read::Ready(pieces) if is_quick => {
                making.finish(&pieces)?;
                Ok(Moved::Something)
            }
            Read::Ready(pieces) => {
                run.is_making_frame = true;
                run.background = Some(Box::pin(async move {
                    let began = now();
                    run_blocking(move || making.finish(&pieces)).await??;
                    Ok(Done::Encoded(now().saturating_duration_since(began)))
                }));
                Ok(Moved::Nothing)
            }
            Read::Cold(cold) => {
                run.background = Some(Box::pin(load(self.context.cold_reads.semaphore(), cold)));
                Ok(Moved::Nothing)
            }
        }
    }

    /// Sends a standalone frame that is there, else lets it be made; and those that come next, meanwhile.
    fn send_bulk(&mut self, run: &mut Run, key: BulkKey, limit: Lsn, now: Instant) -> Moved {
        let Some(link) = &mut self.link else { return Moved::Nothing };
        let reader = link.reader(&self.context.store, &self.context.cold_reads);
        let links = link.links.clone();
        let ready = links.bulk.ready(&key, now);
        if run.ahead.is_none() {
            let (links, reader, keys) = (links.clone(), reader.clone(), keys_after(key, limit));
            run.ahead = Some(Box::pin(async move {
                for key in keys {
                    links.bulk.prepare(key, reader.clone(), now).await?;
                }
                Ok(Done::Loaded)
            }));
        }
        match ready {
            Some(encoded) => {
                let (kind, range) = (FrameKind::Standalone, key.range);
                self.put_frame(&LinkFrame { kind, range, encoded }, now);
                Moved::Something
            }
            None => {
                run.is_making_frame = true;
                run.background = Some(Box::pin(async move {
                    match links.bulk.frame(key, reader, now).await {
                        Ok(frame) => Ok(Done::Frame(frame)),
                        // Where the timeline was left is known in a moment.
                        Err(StreamError::Read(ReadError::TimelineLeft(_))) => Ok(Done::Loaded),
                        Err(error) => Err(error),
                    }
                }));
                Moved::Nothing
            }
        }
    }

    /// A frame of the shared stream is made; the codec was at it for so long.
    pub(in crate::downstream) fn note_encoded(&mut self, run: &mut Run, took: Duration) {
        run.is_making_frame = false;
        if let Some(link) = &mut self.link {
            link.note_made(took, now());
        }
    }

    /// A frame that stands alone is made, and sent next.
    pub(in crate::downstream) fn note_frame(&mut self, run: &mut Run, frame: BulkFrame) {
        self.note_encoded(run, frame.encoding);
        if let Some(link) = &mut self.link {
            link.keep_frame(frame);
        }
    }

    /// What the link waits for from now on.
    pub(in crate::downstream) fn note_waiting(&mut self, run: &Run) {
        let Some(link) = &mut self.link else { return };
        let waiting = if !self.connection.outgoing.is_empty() || run.paced_until.is_some() {
            Waiting::Network
        } else if run.is_making_frame {
            Waiting::Frame
        } else {
            Waiting::Nothing
        };
        link.wait_for(waiting, now());
    }
}

/// The whole standalone frames that come after this one.
fn keys_after(key: BulkKey, limit: Lsn) -> Vec<BulkKey> {
    let mut keys = Vec::with_capacity(AHEAD_FRAMES);
    let mut start = key.range.end();
    while keys.len() < AHEAD_FRAMES
        && let Some(range) = bulk_end(start, limit).and_then(|end| LsnRange::new(start, end))
        // A shorter one may be another when it is sent.
        && range.end() < limit
    {
        keys.push(BulkKey { range, ..key });
        start = range.end();
    }
    keys
}

/// Shorter payloads are copied behind their header: a piece of its own costs more.
const COPIED_BYTES_MAX: usize = 4 << 10;

/// Frames that are made ahead of the one that is sent.
const AHEAD_FRAMES: usize = 2;
