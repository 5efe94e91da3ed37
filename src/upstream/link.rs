//! The compressed link to a relay before us: what is asked for, and what comes.
//!
//! Owns the wish for a link, the terms of one that was accepted, and its receiving side: frames become WAL in blocks that the
//! store keeps like those off the socket. WAL of a frame goes to the store only once the frame is proved.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::metrics::{Carried, LinkMetrics, LinkTraffic};
use crate::net::DecodingBlocks;
use crate::net::blocks::Decoded;
use crate::protocol::FRAME_HEADER_BYTES;
use crate::protocol::link::inbound::Held;
use crate::protocol::link::offer::{ANSWER_PARAMETER, OFFER_PARAMETER};
use crate::protocol::link::{
    Arrival, Codec, Compression, Encoding, FrameHeader, FrameKind, Inbound, LinkError, Offer,
};
use crate::protocol::replication::{WAL_DATA_FRAME_BYTES, WalDataHeader};
use crate::store::Store;
use crate::upstream::UpstreamError;
use crate::upstream::blocking::block_in_place;
use crate::upstream::course::Course;
use crate::upstream::dialog::Introduction;
use crate::upstream::walreceiver::WalReceiver;
use crate::wal::{Lsn, SystemId, TimelineId};

pub use crate::config::LinkMode;

/// What is wanted of a link.
#[derive(Clone, Debug)]
pub struct LinkSettings {
    /// Whether one is asked for, or demanded.
    pub mode: LinkMode,
    /// Codecs that may be used, the preferred one first.
    pub codecs: Vec<Codec>,
    /// For how long WAL is taken plain after something wrong came over a link, before a stream that is up to date gives way to
    /// another try; `None`: as long as it lasts.
    pub retry_interval: Option<Duration>,
}

/// What is asked of a server at the login.
#[derive(Clone, Debug)]
pub(crate) struct LinkWish {
    pub(crate) offer: Offer,
    is_required: bool,
}

impl LinkSettings {
    /// What is offered where a link is asked for.
    pub(super) fn offer(&self) -> Option<Offer> {
        Offer::of(&self.codecs)
    }

    /// What to ask for in the next session.
    pub(super) fn wish(&self, course: &mut Course) -> Option<LinkWish> {
        let is_required = self.mode == LinkMode::Require;
        if self.mode == LinkMode::Off || (course.link_distrusted && !is_required) {
            return None;
        }
        course.link_due = None;
        Some(LinkWish { offer: self.offer()?, is_required })
    }

    /// After something wrong has come over a link: what the next session is to be, and when there may be a link again.
    pub(super) fn distrust(&self, course: &mut Course, now: Instant) {
        course.link_distrusted = true;
        course.link_due =
            self.retry_interval.filter(|_| self.mode == LinkMode::Prefer).map(|time| now + time);
        if self.mode == LinkMode::Require {
            tracing::warn!("the next session is compressed again, because upstream.link is \"require\"");
        } else {
            tracing::warn!("the next session is not compressed");
        }
    }
}

impl LinkWish {
    /// The startup parameter.
    pub(crate) fn parameter(&self) -> (String, String) {
        (OFFER_PARAMETER.to_owned(), self.offer.to_string())
    }

    /// What the server makes of it, by what it said at the login.
    pub(crate) fn outcome(
        &self,
        introduction: &Introduction,
        host: &str,
    ) -> Result<Option<Compression>, UpstreamError> {
        let is_declined = introduction.declined.iter().any(|name| name == OFFER_PARAMETER);
        match introduction.parameters.get(ANSWER_PARAMETER).filter(|_| !is_declined) {
            Some(answer) => match self.offer.read_answer(answer) {
                Some(compression) => Ok(Some(compression)),
                None => Err(UpstreamError::LinkAnswer(answer.clone())),
            },
            None if self.is_required => Err(UpstreamError::LinkDeclined { host: host.to_owned() }),
            None => Ok(None),
        }
    }
}

/// A link that was accepted, for one stream.
#[derive(Clone, Debug)]
pub(super) struct LinkTerms {
    compression: Compression,
    offer: Offer,
    held: Held,
}

impl LinkTerms {
    /// `compression` was chosen out of `offer`; the sender may use all of it.
    pub(super) fn new(
        (compression, offer): (Compression, Offer),
        system_id: SystemId,
        timeline: TimelineId,
        store: &Store,
    ) -> Result<Self, UpstreamError> {
        let history = block_in_place(|| store.history_hash(timeline))?;
        Ok(Self { compression, offer, held: Held { system_id, timeline, history } })
    }
}

/// The receiving side of one stream.
pub(super) struct ReceivedLink {
    inbound: Inbound,
    blocks: DecodingBlocks,
    traffic: Arc<LinkTraffic>,
    metrics: LinkMetrics,
}

impl ReceivedLink {
    pub(super) fn new(
        terms: LinkTerms,
        start: Lsn,
        blocks: DecodingBlocks,
        traffic: &Arc<LinkTraffic>,
        metrics: &LinkMetrics,
    ) -> Self {
        traffic.begin(terms.compression, Instant::now());
        let (traffic, metrics) = (Arc::clone(traffic), metrics.clone());
        let inbound = Inbound::new(terms.held, terms.offer, start);
        Self { inbound, blocks, traffic, metrics }
    }

    /// Reads a message; what it says of its WAL, and the WAL.
    pub(super) fn take(&mut self, body: Bytes) -> Result<Option<(FrameHeader, Decoded)>, LinkError> {
        let wire_bytes = (FRAME_HEADER_BYTES + body.len()) as u64;
        let Self { inbound, blocks, .. } = self;
        let frame = match inbound.take(body)? {
            Arrival::Hello(hello) => {
                tracing::debug!(?hello, "link begins");
                return Ok(None);
            }
            Arrival::Frame(frame) => frame,
        };
        let header = *frame.header();
        let decoded = blocks.decode(header.wal_bytes(), |wal| inbound.expand(&frame, wal))?;
        let carried = match header.kind {
            FrameKind::Standalone => Carried::Bulk,
            FrameKind::Stream { .. } => Carried::Stream,
        };
        self.note(carried, header.encoding, header.range.bytes(), wire_bytes);
        Ok(Some((header, decoded)))
    }

    /// A plain message of WAL begins.
    pub(super) fn note_plain(&mut self, header: &WalDataHeader, bytes: u32) -> Result<(), LinkError> {
        let bytes = u64::from(bytes);
        self.inbound.note_plain(header.start, bytes)?;
        self.note(Carried::Plain, Encoding::Plain, bytes, bytes + WAL_DATA_FRAME_BYTES as u64);
        Ok(())
    }

    fn note(&self, carried: Carried, encoding: Encoding, wal_bytes: u64, wire_bytes: u64) {
        self.metrics.received.note(carried, wal_bytes, wire_bytes);
        self.traffic.note(encoding, wal_bytes, wire_bytes, Instant::now());
    }
}

/// Whether a plain stream is to give way to a link now: its time has come, and nothing is on its way that would have to come
/// again.
fn is_link_due(due: Option<Instant>, now: Instant, received: Lsn, upstream_end: Lsn) -> bool {
    due.is_some_and(|due| now >= due) && received >= upstream_end
}

impl WalReceiver<'_> {
    /// Whether the stream, which is plain because a link was distrusted, is to give way to one.
    pub(super) fn is_link_due(&self) -> bool {
        let received = self.context.writer.received();
        is_link_due(self.link_due, Instant::now(), received, self.gathering.upstream_end())
    }

    /// Reads a message of the link; its WAL goes the way of all WAL.
    pub(super) fn take_link(&mut self, body: Bytes) -> Result<(), UpstreamError> {
        let Some(link) = &mut self.link else {
            return Err(UpstreamError::Unexpected("link message".to_owned()));
        };
        let Some((header, wal)) = link.take(body)? else { return Ok(()) };
        if let Some(wal_end) = header.wal_end {
            self.note_wal_end(wal_end);
        }
        let mut at = header.range.start();
        for (bytes, block) in wal {
            let next = at.advance(bytes.len() as u64);
            self.take_wal(at, bytes, block)?;
            at = next;
        }
        Ok(())
    }
}

impl Drop for ReceivedLink {
    fn drop(&mut self) {
        self.traffic.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that has just begun, over a store in a folder that lives as long.
    fn course() -> (Course, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let (store, _) = crate::store::small::open_in(folder.path());
        (Course::new(Duration::from_secs(1), &store), folder)
    }

    fn settings(mode: LinkMode) -> LinkSettings {
        LinkSettings { mode, codecs: vec![Codec::Zstd], retry_interval: Some(Duration::from_secs(60)) }
    }

    #[test]
    fn after_an_error_the_next_session_asks_for_no_link_unless_there_must_be_one() {
        let (mut course, _folder) = course();
        let asks = |mode, course: &mut Course| settings(mode).wish(course).is_some();
        let modes = [LinkMode::Off, LinkMode::Prefer, LinkMode::Require];
        assert_eq!(modes.map(|mode| asks(mode, &mut course)), [false, true, true]);
        course.link_distrusted = true;
        assert_eq!(modes.map(|mode| asks(mode, &mut course)), [false, false, true]);
        // Attempts that come to nothing change nothing; a stream does.
        assert_eq!(modes.map(|mode| asks(mode, &mut course)), [false, false, true]);
        course.note_streaming(false);
        assert_eq!(modes.map(|mode| asks(mode, &mut course)), [false, true, true]);
    }

    #[test]
    fn a_stream_that_is_plain_for_distrust_gives_way_once_its_time_has_come_and_it_is_up_to_date() {
        let (mut course, _folder) = course();
        let now = Instant::now();
        settings(LinkMode::Prefer).distrust(&mut course, now);
        let due = course.link_due;
        assert_eq!(due, Some(now + Duration::from_secs(60)));
        let at = |position| Lsn::new(position).unwrap();
        let later = now + Duration::from_secs(60);
        let early = later - Duration::from_millis(1);
        assert!(!is_link_due(due, early, at(100), at(100)));
        assert!(!is_link_due(due, later, at(99), at(100)), "more is on its way");
        assert!(is_link_due(due, later, at(100), at(100)));
        assert!(is_link_due(due, later, at(100), at(90)), "the upstream has not told of it yet");
        assert!(!is_link_due(None, later, at(100), at(100)));
        // Whatever comes in between, and until a link is asked for.
        assert!(settings(LinkMode::Prefer).wish(&mut course).is_none());
        assert_eq!(course.link_due, due);
        course.note_streaming(false);
        assert_eq!(course.link_due, due);
        assert!(settings(LinkMode::Prefer).wish(&mut course).is_some());
        assert_eq!(course.link_due, None);
        settings(LinkMode::Require).distrust(&mut course, now);
        assert_eq!(course.link_due, None, "it is never plain");
        let patient = LinkSettings { retry_interval: None, ..settings(LinkMode::Prefer) };
        patient.distrust(&mut course, now);
        assert_eq!(course.link_due, None);
    }

    #[test]
    fn a_servers_answer_counts_as_far_as_it_fits_the_offer() {
        let (mut course, _folder) = course();
        let mut outcome = |mode, answer: Option<&str>, declined: bool| {
            let wish = settings(mode).wish(&mut course).unwrap();
            let mut introduction = Introduction::default();
            if let Some(answer) = answer {
                introduction.parameters.insert(ANSWER_PARAMETER.to_owned(), answer.to_owned());
            }
            introduction.declined.extend(declined.then(|| OFFER_PARAMETER.to_owned()));
            wish.outcome(&introduction, "h:1")
        };
        let (prefer, require) = (LinkMode::Prefer, LinkMode::Require);
        let zstd = Some(Compression::Zstd { level: 3 });
        assert_eq!(outcome(prefer, Some("1;zstd:3"), false).unwrap(), zstd);
        assert_eq!(outcome(require, Some("1;zstd:3"), false).unwrap(), zstd);
        // A server that says nothing, and one that says no; what is told beside that is somebody else's.
        for (answer, declined) in [(None, false), (None, true), (Some("1;zstd:3"), true)] {
            assert_eq!(outcome(prefer, answer, declined).unwrap(), None);
            let error = outcome(require, answer, declined).unwrap_err();
            assert!(matches!(&error, UpstreamError::LinkDeclined { host } if host == "h:1"), "{error}");
            assert!(!error.is_of_the_link(false));
        }
        for answer in ["1;lz4", "2;zstd:3", "nonsense"] {
            let error = outcome(prefer, Some(answer), false).unwrap_err();
            assert!(error.is_of_the_link(false), "{error}: the next session does without");
        }
    }
}
