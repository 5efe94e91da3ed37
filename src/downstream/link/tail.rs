//! The shared stream of live WAL: made by whoever finds new WAL first, sent by all.
//!
//! Owns the encoder, which is at work for one link at a time, and the newest frames. Making a frame is begun and ended under a
//! lock that is never held meanwhile; who finds the encoder at work waits to be told that there is a frame.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::downstream::link::Links;
use crate::downstream::link::bulk::EncodedWal;
use crate::downstream::walsender::StreamError;
use crate::protocol::link::{CodecError, Compression, Encoding, StreamEncoder, WalChecksum};
use crate::session::link::ring::{Follower, STREAM_FRAME_BYTES_MAX};
use crate::session::link::{Begun, Place, Ring, Shrinkage, Step};
use crate::wal::{Lsn, LsnRange};

/// One shared stream.
pub(super) struct Tail {
    links: Arc<Links>,
    compression: Compression,
    state: Mutex<State>,
    /// Marked when there is a new frame, or nobody is at work any more.
    grown: watch::Sender<()>,
    followers: AtomicUsize,
}

struct State {
    ring: Ring<EncodedWal>,
    encoder: Encoder,
}

enum Encoder {
    /// It is made when the first frame is.
    Absent,
    Free(Box<TailEncoder>),
    AtWork,
}

/// The encoder of one stream, and what it writes into.
struct TailEncoder {
    encoder: StreamEncoder,
    out: Vec<u8>,
    /// Payloads are cut from here.
    space: BytesMut,
    shrinkage: Shrinkage,
    /// Of the stretch that goes on. What is not compressed is not in the codec's window, on either side.
    is_compressed: bool,
    wal_bytes: u64,
    wire_bytes: u64,
}

/// A frame in the making.
pub(super) struct Making {
    tail: Arc<Tail>,
    begun: Begun,
    /// `None` while it is at work, and after.
    encoder: Option<Box<TailEncoder>>,
    /// The stream knows what became of it.
    is_settled: bool,
}

/// A link's place in a stream.
pub(super) struct Following {
    tail: Arc<Tail>,
    grown: watch::Receiver<()>,
    place: Option<Place>,
}

impl Tail {
    pub(super) fn new(links: Arc<Links>, compression: Compression, end: Lsn) -> Self {
        let state = State { ring: Ring::new(end), encoder: Encoder::Absent };
        let (state, grown) = (Mutex::new(state), watch::Sender::new(()));
        Self { links, compression, state, grown, followers: AtomicUsize::new(0) }
    }

    pub(super) fn follow(self: &Arc<Self>) -> Following {
        Following { tail: Arc::clone(self), grown: self.grown.subscribe(), place: None }
    }

    /// Begins the next frame; `None` if somebody else has.
    fn begin(self: &Arc<Self>, limit: Lsn, now: Instant) -> Result<Option<Making>, CodecError> {
        let mut state = self.state.lock();
        let encoder = match std::mem::replace(&mut state.encoder, Encoder::AtWork) {
            Encoder::AtWork => return Ok(None),
            Encoder::Free(encoder) => encoder,
            Encoder::Absent => match TailEncoder::new(self.compression) {
                Ok(encoder) => Box::new(encoder),
                Err(error) => {
                    state.encoder = Encoder::Absent;
                    return Err(error);
                }
            },
        };
        let Some(begun) = state.ring.begin(limit, now, |cause| self.links.new_epoch(cause)) else {
            state.encoder = Encoder::Free(encoder);
            return Ok(None);
        };
        Ok(Some(Making { tail: Arc::clone(self), begun, encoder: Some(encoder), is_settled: false }))
    }
}

impl Following {
    /// What a link that has sent so much does next.
    pub(super) fn step(&mut self, sent: Lsn, limit: Lsn, now: Instant) -> Step<EncodedWal> {
        // Before the stream is looked at: what comes later wakes.
        self.grown.borrow_and_update();
        let others = self.tail.followers.load(Ordering::Relaxed) > usize::from(self.place.is_some());
        let link = Follower { place: self.place, sent, limit };
        let step = self.tail.state.lock().ring.step(link, others, now);
        if let Step::Bulk { .. } = step {
            self.leave();
        }
        step
    }

    /// The frame was sent.
    pub(super) fn advance(&mut self, place: Place) {
        if self.place.replace(place).is_none() {
            self.tail.followers.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Begins the next frame; `None` if somebody else has.
    pub(super) fn begin(&self, limit: Lsn, now: Instant) -> Result<Option<Making>, CodecError> {
        self.tail.begin(limit, now)
    }

    /// Whether frames of so much WAL are made in no time.
    pub(super) fn is_quick(&self, bytes: u64) -> bool {
        let is_fast = match self.tail.compression {
            Compression::Zstd { level } => level <= QUICK_LEVEL_MAX,
            Compression::Lz4 => true,
        };
        is_fast && bytes <= QUICK_BYTES_MAX
    }

    /// Waits for a new frame. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        // The sender lives as long as this.
        let _ = self.grown.changed().await;
    }

    fn leave(&mut self) {
        if self.place.take().is_some() {
            self.tail.followers.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Making {
    /// The WAL that the frame is made of.
    pub(super) fn range(&self) -> LsnRange {
        self.begun.range
    }

    /// Makes the frame of its WAL, and gives it to all.
    pub(super) fn finish(mut self, pieces: &[Bytes]) -> Result<(), StreamError> {
        let Some(mut encoder) = self.encoder.take() else { return Ok(()) };
        let made = encoder.encode(&self.begun, pieces);
        {
            let mut state = self.tail.state.lock();
            match &made {
                Ok(frame) => {
                    let metrics = &self.tail.links.metrics;
                    metrics.encoded_stream_frames.increment(1);
                    metrics.encoded_wal_bytes.increment(self.begun.range.bytes());
                    state.ring.push(self.begun, frame.clone());
                    state.encoder = Encoder::Free(encoder);
                }
                Err(_) => {
                    state.ring.fail();
                    state.encoder = Encoder::Absent;
                }
            }
            self.is_settled = true;
        }
        self.tail.grown.send_replace(());
        made.map(|_| ()).map_err(StreamError::from)
    }
}

impl Drop for Making {
    /// It was not made: its WAL could not be read, its link has gone, or there was a panic.
    fn drop(&mut self) {
        if self.is_settled {
            return;
        }
        {
            let mut state = self.tail.state.lock();
            state.encoder = match self.encoder.take() {
                Some(untouched) => Encoder::Free(untouched),
                None => {
                    state.ring.fail();
                    Encoder::Absent
                }
            };
        }
        self.tail.grown.send_replace(());
    }
}

impl TailEncoder {
    fn new(compression: Compression) -> Result<Self, CodecError> {
        Ok(Self {
            encoder: StreamEncoder::new(compression)?,
            out: Vec::new(),
            space: BytesMut::new(),
            shrinkage: Shrinkage::new(LEFT_OUT_STRETCHES_MAX),
            is_compressed: true,
            wal_bytes: 0,
            wire_bytes: 0,
        })
    }

    fn encode(&mut self, begun: &Begun, pieces: &[Bytes]) -> Result<EncodedWal, CodecError> {
        if begun.sequence == 0 {
            self.encoder.restart()?;
        }
        if self.wal_bytes >= STRETCH_BYTES {
            self.begin_stretch();
        }
        let checksum = WalChecksum::of(pieces.iter().map(AsRef::as_ref));
        let encoding = if self.is_compressed {
            self.encoder.encode(pieces.iter().map(AsRef::as_ref), &mut self.out)?
        } else {
            self.out.clear();
            pieces.iter().for_each(|piece| self.out.extend_from_slice(piece));
            Encoding::Plain
        };
        self.wal_bytes += begun.range.bytes();
        self.wire_bytes += self.out.len() as u64;
        if self.space.capacity() < self.out.len() {
            self.space = BytesMut::with_capacity(SPACE_BYTES.max(self.out.len()));
        }
        self.space.extend_from_slice(&self.out);
        Ok(EncodedWal { encoding, checksum, payload: self.space.split().freeze() })
    }

    /// A stretch is compressed, or not, as a whole.
    fn begin_stretch(&mut self) {
        if self.is_compressed {
            self.shrinkage.note(self.wal_bytes, self.wire_bytes);
        }
        self.is_compressed = self.shrinkage.is_worth_while();
        (self.wal_bytes, self.wire_bytes) = (0, 0);
    }
}

/// Payloads are cut from pieces of memory of this size.
const SPACE_BYTES: usize = 64 << 10;

/// WAL that a frame may have to be made beside other clients' work; more is made on a thread that may be busy for long.
const QUICK_BYTES_MAX: u64 = 32 << 10;

/// The same for zstd's levels.
const QUICK_LEVEL_MAX: i8 = 3;

/// A shorter stretch says nothing of how well WAL shrinks.
const STRETCH_BYTES: u64 = 64 << 10;

/// Stretches that are left as they are before one is tried again, where nothing shrinks.
const LEFT_OUT_STRETCHES_MAX: u32 = 32;

/// WAL that shrinks is left as it is for so long at most, after WAL that does not.
const LEFT_OUT_BYTES_MAX: u64 = 8 << 20;

// A stretch ends with the frame that makes it long enough.
const _: () =
    assert!(LEFT_OUT_STRETCHES_MAX as u64 * (STRETCH_BYTES + STREAM_FRAME_BYTES_MAX) <= LEFT_OUT_BYTES_MAX);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::metrics::AllMetrics;
    use crate::protocol::link::Decoder;
    use crate::wal::TimelineId;

    const ZSTD: Compression = Compression::Zstd { level: 1 };

    /// A link that makes each frame of its stream itself, and what comes of it.
    struct Live {
        following: Following,
        decoder: Decoder,
        at: Lsn,
    }

    impl Live {
        fn new() -> Self {
            let settings = config::Links {
                compressions: vec![ZSTD],
                adapt: false,
                link_rate_max: None,
                links_rate_max: None,
            };
            let links = Arc::new(Links::new(&settings, AllMetrics::default().link));
            let at = Lsn::new(1 << 30).unwrap();
            let following = links.tail(TimelineId::FIRST, ZSTD, at).follow();
            Self { following, decoder: Decoder::new(), at }
        }

        /// Sends WAL as one frame; how that is encoded.
        fn send(&mut self, wal: &Bytes) -> Encoding {
            let (now, limit) = (Instant::now(), self.at.advance(wal.len() as u64));
            assert!(matches!(self.following.step(self.at, limit, now), Step::Encode));
            let making = self.following.begin(limit, now).unwrap().unwrap();
            making.finish(std::slice::from_ref(wal)).unwrap();
            let Step::Frame { sequence, range, frame, place, .. } = self.following.step(self.at, limit, now)
            else {
                panic!("no frame")
            };
            assert_eq!(range.end(), limit);
            let mut back = vec![0; wal.len()];
            self.decoder.stream(sequence == 0, frame.encoding, &frame.payload, &mut back).unwrap();
            assert!(back == *wal, "another frame comes out at {}", self.at);
            self.following.advance(place);
            self.at = limit;
            frame.encoding
        }
    }

    /// So much that no piece of it is in the window when it comes again.
    fn noise(bytes: usize) -> Bytes {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let word = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_be_bytes()
        };
        (0..bytes / 8).flat_map(word).collect()
    }

    #[test]
    fn after_any_amount_of_noise_what_shrinks_is_compressed_again_soon() {
        let mut live = Live::new();
        let noise = noise(8 << 20);
        let frame_bytes = usize::try_from(STREAM_FRAME_BYTES_MAX).unwrap();
        let frames: Vec<Bytes> =
            (0..noise.len()).step_by(frame_bytes).map(|at| noise.slice(at..at + frame_bytes)).collect();
        let total = (300 << 20) / frame_bytes;
        let mut tried = 0;
        for number in 0..total {
            tried += usize::from(live.send(&frames[number % frames.len()]) == Encoding::Zstd);
        }
        assert!(tried * 20 < total, "{tried} of {total} frames of noise were compressed");
        // In small pieces, as they come.
        let text: Bytes = b"a record much like the one before it ".repeat(100).into();
        let mut plain = 0;
        while live.send(&text) == Encoding::Plain {
            plain += text.len() as u64;
        }
        assert!(plain <= LEFT_OUT_BYTES_MAX, "{plain} bytes of text were left as they are");
        // And stays so.
        assert!((0..100).all(|_| live.send(&text) == Encoding::Zstd));
    }
}
