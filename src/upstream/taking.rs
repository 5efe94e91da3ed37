//! What becomes of the messages that have arrived.
//!
//! Owns how much of them is taken at a time: WAL goes to the store only while that has room, because a few bytes on the wire may
//! be many behind a link. What is left stays where it is, and nothing more is read before it. Waits for nothing itself.

use std::time::Instant;

use bytes::Bytes;

use crate::metrics::position_value;
use crate::protocol::replication::Keepalive;
use crate::protocol::{StreamItem, backend};
use crate::session::gather::HandOver;
use crate::store::BlockId;
use crate::upstream::UpstreamError;
use crate::upstream::walreceiver::{StreamEnd, WalReceiver};
use crate::wal::Lsn;

impl WalReceiver<'_> {
    /// Works through what has arrived, as far as it may now; then hands it over, or waits for more to hand over at once.
    pub(super) fn handle_items(&mut self) -> Result<Option<StreamEnd>, UpstreamError> {
        let copied_before = self.stream.copied_bytes();
        let outcome = self.take_items();
        self.context.metrics.copied_bytes.increment(self.stream.copied_bytes() - copied_before);
        self.hand_over();
        self.handle_progress();
        outcome
    }

    pub(super) fn hand_over(&mut self) {
        let writer = &mut self.context.writer;
        match self.gathering.decide(Instant::now(), writer.received()) {
            HandOver::Wait if writer.has_room() => {}
            // Nothing more comes before what is there is written.
            HandOver::Wait | HandOver::MoreFollows => writer.submit_before_more(),
            HandOver::Now => writer.submit(),
        }
        self.session.handle_pace(self.gathering.pace());
    }

    /// Plain WAL of one read is no longer than a receive block. What is in frames may be thousands of times longer.
    fn take_items(&mut self) -> Result<Option<StreamEnd>, UpstreamError> {
        let turn_end = self.context.writer.received().advance(TURN_BYTES_MAX);
        self.has_unread = true;
        while let Some(item) = self.stream.poll()? {
            match item {
                StreamItem::WalStart(header, bytes) => {
                    if let Some(link) = &mut self.link {
                        link.note_plain(&header, bytes)?;
                    }
                    if let Some(wal_end) = header.wal_end {
                        self.note_wal_end(wal_end);
                    }
                }
                StreamItem::WalBytes { at, bytes, block } => self.take_wal(at, bytes, BlockId(block))?,
                StreamItem::WalEnd => {}
                StreamItem::Link(body) => {
                    self.take_link(body)?;
                    let writer = &self.context.writer;
                    if !writer.has_room() || writer.received() >= turn_end {
                        return Ok(None);
                    }
                }
                StreamItem::Keepalive(keepalive) => self.handle_keepalive(keepalive),
                StreamItem::CopyDone => return Ok(Some(StreamEnd::TimelineEnded)),
                StreamItem::Other(message) => {
                    if let Some(end) = handle_other(message, self.held_end)? {
                        return Ok(Some(end));
                    }
                }
            }
        }
        self.has_unread = false;
        Ok(None)
    }

    pub(super) fn take_wal(&mut self, at: Lsn, bytes: Bytes, block: BlockId) -> Result<(), UpstreamError> {
        let len = bytes.len() as u64;
        self.context.metrics.received_bytes.increment(len);
        self.gathering.handle_received(len);
        self.context.metrics.overlap_bytes.increment(self.held_end.bytes_since(at).min(len));
        Ok(self.context.writer.append(at, bytes, block)?)
    }

    pub(super) fn note_wal_end(&mut self, wal_end: Lsn) {
        self.gathering.handle_upstream_end(wal_end);
        self.context.metrics.wal_end.set(position_value(wal_end));
        if let Some(retained) = &self.retained {
            retained.note_upstream_end(wal_end);
        }
    }

    fn handle_keepalive(&mut self, keepalive: Keepalive) {
        if let Some(wal_end) = keepalive.wal_end {
            self.note_wal_end(wal_end);
        }
        if keepalive.reply_requested {
            self.gathering.handle_question();
        }
        self.session.handle_keepalive(Instant::now(), keepalive.wal_end, keepalive.reply_requested);
    }
}

/// A message of the server between WAL messages.
fn handle_other(message: backend::Message, held_end: Lsn) -> Result<Option<StreamEnd>, UpstreamError> {
    match message {
        backend::Message::NoticeResponse(_) | backend::Message::ParameterStatus { .. } => Ok(None),
        backend::Message::ErrorResponse(error) => {
            Err(crate::upstream::connect::stream_refused(error, held_end))
        }
        backend::Message::CommandComplete(_) => Ok(Some(StreamEnd::UpstreamStopped)),
        other => Err(UpstreamError::Unexpected(format!("{other:?}"))),
    }
}

/// WAL that is taken out of frames before others have their turn: as much as is handed over at once.
const TURN_BYTES_MAX: u64 = 1 << 20;
