//! The receiving side of a link: what may follow what, and back to WAL.
//!
//! Owns the order of a stream's messages, and proves every frame before its WAL is given out: it is of the held cluster and
//! history, follows what came before without a gap, was not repeated, and is bit for bit what was sent. Plain messages of WAL
//! may come in between; the store looks at their bytes itself.

use bytes::Bytes;

use crate::protocol::DecodeError;
use crate::protocol::link::codec::Decoder;
use crate::protocol::link::frame::{Before, FRAME, RawFrame, SHORT_FRAME};
use crate::protocol::link::hello::{HELLO, message_type};
use crate::protocol::link::{
    Codec, Encoding, FrameHeader, FrameKind, Hello, LINK_MESSAGE_NAME, LinkError, LinkMismatch, Offer, Seed,
};
use crate::wal::{HistoryHash, Lsn, SystemId, TimelineId};

/// What the receiver holds, and asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The cluster.
    pub system_id: SystemId,
    /// The timeline that was asked for.
    pub timeline: TimelineId,
    /// Its history, where it is known whole.
    pub history: Option<HistoryHash>,
}

/// One stream's receiving side.
pub struct Inbound {
    held: Held,
    /// How WAL may come.
    offer: Offer,
    /// There once the hello has come.
    seed: Option<Seed>,
    /// Where what comes next must begin.
    next: Lsn,
    /// The frame of a stream that came just before: the next one of it may follow.
    before: Option<Before>,
    decoder: Decoder,
}

/// What a message of the link is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The beginning; it fits what is held.
    Hello(Hello),
    /// WAL in its place, which [`Inbound::expand`] makes readable.
    Frame(WholeFrame),
}

/// A frame in its place whose content was not looked at yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WholeFrame(RawFrame);

impl WholeFrame {
    /// What it says of itself.
    pub fn header(&self) -> &FrameHeader {
        &self.0.header
    }
}

impl Inbound {
    /// A stream that was asked to begin at `start`, from a sender who has accepted this offer.
    pub fn new(held: Held, offer: Offer, start: Lsn) -> Self {
        Self { held, offer, seed: None, next: start, before: None, decoder: Decoder::new() }
    }

    /// Reads a message of the link. After an error the stream is over.
    pub fn take(&mut self, body: Bytes) -> Result<Arrival, LinkError> {
        match message_type(&body)? {
            HELLO => {
                let hello = Hello::decode(&body)?;
                if self.seed.is_some() {
                    return Err(LinkError::SecondHello);
                }
                self.compare(&hello)?;
                self.check_offered(hello.encoding, self.next)?;
                self.seed = Some(Seed::new(hello.system_id, hello.history));
                Ok(Arrival::Hello(hello))
            }
            FRAME => {
                let frame = RawFrame::decode(body)?;
                self.place(&frame.header)?;
                Ok(Arrival::Frame(WholeFrame(frame)))
            }
            SHORT_FRAME => {
                let before = self.before.as_ref().ok_or(LinkError::NothingToGoOn { at: self.next })?;
                Ok(Arrival::Frame(WholeFrame(RawFrame::decode_short(body, before)?)))
            }
            kind => {
                Err(DecodeError::UnknownKind { message: LINK_MESSAGE_NAME, kind: u32::from(kind) }.into())
            }
        }
    }

    /// Decodes and proves a frame; `wal` has the length that its header says. After an error the stream is over, and what is
    /// in `wal` means nothing.
    pub fn expand(&mut self, frame: &WholeFrame, wal: &mut [u8]) -> Result<(), LinkError> {
        let WholeFrame(frame) = frame;
        let header = &frame.header;
        let at = header.range.start();
        self.place(header)?;
        let Some(seed) = &self.seed else { return Err(LinkError::NoHello { at }) };
        let decoded = match header.kind {
            FrameKind::Standalone => self.decoder.standalone(header.encoding, &frame.payload, wal),
            FrameKind::Stream { sequence, .. } => {
                self.decoder.stream(sequence == 0, header.encoding, &frame.payload, wal)
            }
        };
        decoded.map_err(|error| LinkError::Decompress { at, reason: error.to_string() })?;
        frame.check(seed, wal)?;
        self.next = header.range.end();
        self.before = match header.kind {
            FrameKind::Standalone => None,
            FrameKind::Stream { epoch, sequence } => {
                let (timeline, end, sent_at) = (header.timeline, header.range.end(), header.sent_at);
                Some(Before { epoch, sequence, timeline, end, sent_at })
            }
        };
        Ok(())
    }

    /// A plain message of so much WAL begins.
    pub fn note_plain(&mut self, at: Lsn, bytes: u64) -> Result<(), LinkError> {
        if self.seed.is_none() {
            return Err(LinkError::NoHello { at });
        }
        if at != self.next {
            return Err(LinkError::OutOfPlace { expected: self.next, got: at });
        }
        self.next = at.advance(bytes);
        self.before = None;
        Ok(())
    }

    fn compare(&self, hello: &Hello) -> Result<(), LinkMismatch> {
        let Held { system_id, timeline, history } = self.held;
        if hello.system_id != system_id {
            return Err(LinkMismatch::System { expected: system_id, got: hello.system_id });
        }
        if hello.timeline != timeline {
            return Err(LinkMismatch::Timeline { expected: timeline, got: hello.timeline });
        }
        // What one of the two does not know cannot be compared; the bytes are, all the same.
        if let (Some(expected), Some(got)) = (history, hello.history)
            && expected != got
        {
            return Err(LinkMismatch::History { timeline, expected, got });
        }
        Ok(())
    }

    fn check_offered(&self, encoding: Encoding, at: Lsn) -> Result<(), LinkError> {
        if self.offer.allows(encoding) { Ok(()) } else { Err(LinkError::NotOffered { at, encoding }) }
    }

    fn place(&self, header: &FrameHeader) -> Result<(), LinkError> {
        let at = header.range.start();
        if self.seed.is_none() {
            return Err(LinkError::NoHello { at });
        }
        if header.timeline != self.held.timeline {
            let (expected, got) = (self.held.timeline, header.timeline);
            return Err(LinkError::WrongTimeline { at, expected, got });
        }
        if at != self.next {
            return Err(LinkError::OutOfPlace { expected: self.next, got: at });
        }
        self.check_offered(header.encoding, at)?;
        if let FrameKind::Stream { epoch, sequence } = header.kind
            && sequence > 0
            && self.before.map(|before| (before.epoch, before.sequence)) != Some((epoch, sequence - 1))
        {
            return Err(LinkError::OutOfSequence { at, epoch, sequence });
        }
        Ok(())
    }
}

/// Body of the fuzz target: messages of any bytes, each behind its length, as a link brings them. What is taken lies in its
/// place and has the length it says.
pub fn fuzz_inbound(bytes: &[u8]) {
    let held = Held { system_id: SystemId(1), timeline: TimelineId::FIRST, history: None };
    let Some(offer) = Offer::of(&[Codec::Zstd, Codec::Lz4]) else { return };
    let mut inbound = Inbound::new(held, offer, Lsn::MIN);
    let mut greeting = bytes::BytesMut::new();
    let encoding = Encoding::Zstd;
    let hello = Hello { system_id: held.system_id, timeline: held.timeline, history: None, encoding };
    hello.encode(&mut greeting);
    let is_greeted = bytes.first().is_some_and(|first| first % 2 == 0);
    if is_greeted {
        let body = greeting.freeze().slice(crate::protocol::FRAME_HEADER_BYTES..);
        assert!(matches!(inbound.take(body), Ok(Arrival::Hello(_))));
    }
    let mut rest = bytes.get(1..).unwrap_or_default();
    let mut next = Lsn::MIN;
    while let Some((len, after)) = rest.split_first_chunk::<2>() {
        let (body, after) = after.split_at(usize::from(u16::from_be_bytes(*len)).min(after.len()));
        rest = after;
        match inbound.take(Bytes::copy_from_slice(body)) {
            Ok(Arrival::Frame(frame)) => {
                assert_eq!(frame.header().range.start(), next);
                let mut wal = vec![0; frame.header().wal_bytes()];
                if inbound.expand(&frame, &mut wal).is_err() {
                    return;
                }
                next = frame.header().range.end();
            }
            Ok(Arrival::Hello(_)) => assert!(!is_greeted),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;
    use crate::protocol::FRAME_HEADER_BYTES;
    use crate::protocol::link::{BulkEncoder, Compression, Encoding, StreamEncoder, WalChecksum};
    use crate::wal::{LsnRange, PgTimestamp, TimelineHistory};

    const ZSTD: Compression = Compression::Zstd { level: 1 };

    fn held() -> Held {
        let history = Some(HistoryHash::of(&TimelineHistory::of_first()));
        Held { system_id: SystemId(9), timeline: TimelineId::FIRST, history }
    }

    fn hello(held: Held) -> Bytes {
        let Held { system_id, timeline, history } = held;
        let mut out = BytesMut::new();
        Hello { system_id, timeline, history, encoding: Encoding::Zstd }.encode(&mut out);
        out.freeze().slice(FRAME_HEADER_BYTES..)
    }

    fn offer() -> Offer {
        Offer::of(&[Codec::Zstd, Codec::Lz4]).unwrap()
    }

    fn start() -> Lsn {
        Lsn::new(0x100_0000).unwrap()
    }

    fn greeted() -> Inbound {
        let mut inbound = Inbound::new(held(), offer(), start());
        assert!(matches!(inbound.take(hello(held())), Ok(Arrival::Hello(_))));
        inbound
    }

    /// A sender of frames that follow one another.
    struct Outbound {
        at: Lsn,
        stream: StreamEncoder,
        /// Whether frames that go on are short.
        is_terse: bool,
    }

    impl Outbound {
        fn new() -> Self {
            Self { at: start(), stream: StreamEncoder::new(ZSTD).unwrap(), is_terse: false }
        }

        fn frame(&mut self, kind: FrameKind, wal: &[u8]) -> Bytes {
            let mut payload = Vec::new();
            let encoding = match kind {
                FrameKind::Standalone => BulkEncoder::new(ZSTD).unwrap().encode(wal, &mut payload).unwrap(),
                FrameKind::Stream { sequence, .. } => {
                    if sequence == 0 {
                        self.stream.restart().unwrap();
                    }
                    self.stream.encode([wal], &mut payload).unwrap()
                }
            };
            let range = LsnRange::new(self.at, self.at.advance(wal.len() as u64)).unwrap();
            self.at = range.end();
            let (timeline, wal_end, sent_at) = (TimelineId::FIRST, Some(range.end()), PgTimestamp(0));
            let header = FrameHeader { kind, encoding, timeline, range, wal_end, sent_at };
            let seed = Seed::new(held().system_id, held().history);
            let before = self.is_terse.then_some(sent_at);
            let head = header.encode(&seed, WalChecksum::of([wal]), payload.len(), before);
            [&head.as_ref()[FRAME_HEADER_BYTES..], &payload].concat().into()
        }
    }

    fn receive(inbound: &mut Inbound, body: Bytes) -> Result<Vec<u8>, LinkError> {
        let Arrival::Frame(frame) = inbound.take(body)? else { panic!("no frame") };
        let mut wal = vec![0; frame.header().wal_bytes()];
        inbound.expand(&frame, &mut wal)?;
        Ok(wal)
    }

    fn wal(number: usize) -> Vec<u8> {
        format!("record {number} of many that are much alike ").repeat(20 + number).into_bytes()
    }

    fn stream(epoch: u32, sequence: u32) -> FrameKind {
        FrameKind::Stream { epoch, sequence }
    }

    #[test]
    fn frames_of_both_kinds_and_plain_wal_follow_one_another() {
        for is_terse in [false, true] {
            both_kinds_and_plain_wal(is_terse);
        }
    }

    fn both_kinds_and_plain_wal(is_terse: bool) {
        let (mut inbound, mut outbound) = (greeted(), Outbound { is_terse, ..Outbound::new() });
        let kinds = [FrameKind::Standalone, stream(4, 0), stream(4, 1), stream(4, 2), FrameKind::Standalone];
        for (number, kind) in kinds.into_iter().chain([stream(5, 0), stream(5, 1)]).enumerate() {
            let body = outbound.frame(kind, &wal(number));
            assert_eq!(receive(&mut inbound, body).unwrap(), wal(number));
        }
        inbound.note_plain(outbound.at, 100).unwrap();
        outbound.at = outbound.at.advance(100);
        let body = outbound.frame(stream(6, 0), &wal(1));
        assert_eq!(receive(&mut inbound, body).unwrap(), wal(1));
    }

    #[test]
    fn nothing_is_taken_before_the_hello_and_no_second_one() {
        let mut inbound = Inbound::new(held(), offer(), start());
        let no_hello = LinkError::NoHello { at: start() };
        assert_eq!(inbound.take(Outbound::new().frame(FrameKind::Standalone, b"x")).unwrap_err(), no_hello);
        assert_eq!(inbound.note_plain(start(), 1).unwrap_err(), no_hello);
        assert_eq!(greeted().take(hello(held())).unwrap_err(), LinkError::SecondHello);
        let unknown = greeted().take(Bytes::from_static(b"zx")).unwrap_err();
        assert_eq!(unknown.to_string(), "invalid link message type 120");
    }

    #[test]
    fn wal_of_something_else_needs_a_person() {
        let other = HistoryHash::from_wire(7);
        for wrong in [
            Held { system_id: SystemId(8), ..held() },
            Held { timeline: TimelineId::new(2).unwrap(), ..held() },
            Held { history: other, ..held() },
        ] {
            let error = Inbound::new(held(), offer(), start()).take(hello(wrong)).unwrap_err();
            assert!(error.needs_a_person(), "{error}");
        }
        // What either does not know is no difference.
        let unknown = Held { history: None, ..held() };
        assert!(Inbound::new(held(), offer(), start()).take(hello(unknown)).is_ok());
        assert!(Inbound::new(unknown, offer(), start()).take(hello(held())).is_ok());
    }

    #[test]
    fn a_frame_that_is_missing_repeated_or_out_of_order_is_noticed() {
        for is_terse in [false, true] {
            let mut outbound = Outbound { is_terse, ..Outbound::new() };
            let bulk = FrameKind::Standalone;
            let kinds = [stream(1, 0), stream(1, 1), stream(1, 2), bulk, bulk];
            let frames: Vec<Bytes> =
                (0..).zip(kinds).map(|(number, kind)| outbound.frame(kind, &wal(number))).collect();
            for good in 0..frames.len() {
                for next in (0..frames.len()).filter(|next| *next != good) {
                    let mut inbound = greeted();
                    for frame in frames.iter().take(good) {
                        receive(&mut inbound, frame.clone()).unwrap();
                    }
                    let error = receive(&mut inbound, frames[next].clone()).unwrap_err();
                    let is_short = is_terse && (1..=2).contains(&next);
                    assert!(
                        is_short || matches!(error, LinkError::OutOfPlace { .. }),
                        "{good} {next}: {error}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_frame_in_its_place_that_lacks_its_epoch_is_noticed() {
        for (before, kind) in [
            (Vec::new(), stream(1, 1)),
            (vec![stream(1, 0)], stream(1, 2)),
            (vec![stream(1, 0)], stream(2, 1)),
            (vec![stream(1, 0), FrameKind::Standalone], stream(1, 1)),
        ] {
            let (mut inbound, mut outbound) = (greeted(), Outbound::new());
            for kind in before {
                receive(&mut inbound, outbound.frame(kind, &wal(3))).unwrap();
            }
            let error = receive(&mut inbound, outbound.frame(kind, &wal(3))).unwrap_err();
            assert!(matches!(error, LinkError::OutOfSequence { .. }), "{error}");
        }
        let (mut inbound, mut outbound) = (greeted(), Outbound::new());
        receive(&mut inbound, outbound.frame(stream(1, 0), &wal(3))).unwrap();
        inbound.note_plain(outbound.at, 8).unwrap();
        outbound.at = outbound.at.advance(8);
        assert!(receive(&mut inbound, outbound.frame(stream(1, 1), &wal(3))).is_err());
    }

    #[test]
    fn what_was_not_offered_is_refused_before_it_is_decoded() {
        for (codec, offered) in [(Codec::Zstd, true), (Codec::Lz4, false)] {
            let offer = Offer::of(&[codec]).unwrap();
            let outcome = |kind, wal: &[u8]| {
                let mut inbound = Inbound::new(held(), offer.clone(), start());
                // Whatever it announces.
                let announced = Hello::decode(&hello(held())).unwrap();
                let mut out = BytesMut::new();
                Hello { encoding: Encoding::Plain, ..announced }.encode(&mut out);
                inbound.take(out.freeze().slice(FRAME_HEADER_BYTES..)).unwrap();
                receive(&mut inbound, Outbound::new().frame(kind, wal))
            };
            let refused = LinkError::NotOffered { at: start(), encoding: Encoding::Zstd };
            for kind in [FrameKind::Standalone, stream(1, 0)] {
                let expected = if offered { Ok(wal(1)) } else { Err(refused.clone()) };
                assert_eq!(outcome(kind, &wal(1)), expected);
            }
            // What does not shrink comes as it is.
            assert_eq!(outcome(FrameKind::Standalone, b"x"), Ok(b"x".to_vec()));
            let greeting = Inbound::new(held(), offer, start()).take(hello(held()));
            assert_eq!(greeting.is_ok(), offered, "{greeting:?}");
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed_or_makes_no_difference() {
        for kind in [FrameKind::Standalone, stream(1, 0), stream(1, 1)] {
            let mut outbound = Outbound { is_terse: true, ..Outbound::new() };
            let first = (kind == stream(1, 1)).then(|| outbound.frame(stream(1, 0), &wal(5)));
            let begin = outbound.at;
            let good = outbound.frame(kind, &wal(0));
            for bit in 0..good.len() * 8 {
                let mut flipped = good.to_vec();
                flipped[bit / 8] ^= 1 << (bit % 8);
                let mut inbound = greeted();
                first.iter().for_each(|first| drop(receive(&mut inbound, first.clone()).unwrap()));
                let taken = match inbound.take(flipped.into()) {
                    Ok(Arrival::Frame(frame)) => {
                        let mut wal = vec![0; frame.header().wal_bytes()];
                        inbound.expand(&frame, &mut wal).map(|()| (frame.header().range, wal))
                    }
                    Ok(Arrival::Hello(_)) => panic!("bit {bit} makes a hello"),
                    Err(error) => Err(error),
                };
                if let Ok((range, taken)) = taken {
                    assert_eq!((range.start(), taken), (begin, wal(0)), "bit {bit}");
                }
            }
        }
    }
}
