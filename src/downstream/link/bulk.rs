//! Standalone frames, compressed once for all links that want them.
//!
//! Owns a bounded number of frames, each under its place and its compression, and the threads' share that making them may
//! take. A frame that several want at the same time is made once; the others wait for it. What is old is made again: a byte
//! that no checksum covers may have been replaced since.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OnceCell, Semaphore};

use crate::downstream::blocking::run_blocking;
use crate::downstream::walsender::StreamError;
use crate::metrics::LinkMetrics;
use crate::protocol::link::{BulkEncoder, CodecError, Compression, Encoding, WalChecksum};
use crate::store::{Read, ReadError, WalReader};
use crate::wal::{LsnRange, TimelineId};

/// The frames that there are, and the encoders that make them.
pub(super) struct BulkFrames {
    frames: Mutex<Frames>,
    encoders: Arc<Mutex<Vec<(Compression, Workshop)>>>,
    permits: Arc<Semaphore>,
    metrics: LinkMetrics,
}

/// What a frame is made of, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::downstream) struct BulkKey {
    pub(super) timeline: TimelineId,
    pub(super) range: LsnRange,
    pub(super) compression: Compression,
}

/// What one link's frames are made of: as long as it lives, the segments that it is at need not be opened and compared with
/// their checksums again.
pub(in crate::downstream) type BulkReader = Arc<Mutex<WalReader>>;

/// WAL, encoded, and its checksum.
#[derive(Clone, Debug)]
pub(in crate::downstream) struct EncodedWal {
    pub(super) encoding: Encoding,
    pub(super) checksum: WalChecksum,
    pub(super) payload: Bytes,
}

#[derive(Default)]
struct Frames {
    by_key: HashMap<BulkKey, Arc<OnceCell<EncodedWal>>>,
    /// In the order in which they were made, with their bytes and since when.
    made: VecDeque<(BulkKey, usize, Instant)>,
    bytes: usize,
}

/// An encoder and its buffers, used again and again.
struct Workshop {
    encoder: BulkEncoder,
    wal: Vec<u8>,
    out: Vec<u8>,
}

impl BulkFrames {
    pub(super) fn new(metrics: LinkMetrics) -> Self {
        let at_a_time = std::thread::available_parallelism().map_or(1, usize::from).min(ENCODERS_MAX);
        Self {
            frames: Mutex::default(),
            encoders: Arc::default(),
            permits: Arc::new(Semaphore::new(at_a_time)),
            metrics,
        }
    }

    /// The frame, if it is there.
    pub(super) fn ready(&self, key: &BulkKey, now: Instant) -> Option<EncodedWal> {
        let mut frames = self.frames.lock();
        frames.drop_old(now);
        let found = frames.by_key.get(key).and_then(|cell| cell.get().cloned());
        if found.is_some() {
            self.metrics.shared_frames.increment(1);
        }
        found
    }

    /// The frame, made now unless somebody is at it already.
    pub(super) async fn made(
        &self,
        key: BulkKey,
        reader: BulkReader,
        now: Instant,
    ) -> Result<(), StreamError> {
        let claim = {
            let mut frames = self.frames.lock();
            frames.drop_old(now);
            let cell = Arc::clone(frames.by_key.entry(key).or_default());
            Claim { frames: &self.frames, key, cell }
        };
        if claim.cell.initialized() {
            return Ok(());
        }
        // Whoever leaves lets the next one make it.
        let made = claim.cell.get_or_try_init(|| self.make(key, reader)).await;
        let bytes = made?.payload.len();
        self.frames.lock().keep(key, &claim.cell, bytes, now);
        Ok(())
    }

    async fn make(&self, key: BulkKey, reader: BulkReader) -> Result<EncodedWal, StreamError> {
        // Only when the relay ends is there no permit.
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok();
        let encoders = Arc::clone(&self.encoders);
        let made = run_blocking(move || {
            let made = make_frame(&encoders, key, &reader);
            drop(permit);
            made
        });
        let frame = made.await??;
        self.metrics.compressed_frames.increment(1);
        Ok(frame)
    }
}

fn make_frame(
    encoders: &Mutex<Vec<(Compression, Workshop)>>,
    key: BulkKey,
    reader: &Mutex<WalReader>,
) -> Result<EncodedWal, StreamError> {
    let free = {
        let mut encoders = encoders.lock();
        let place = encoders.iter().position(|(compression, _)| *compression == key.compression);
        place.map(|place| encoders.swap_remove(place).1)
    };
    let mut workshop = match free {
        Some(workshop) => workshop,
        None => Workshop { encoder: BulkEncoder::new(key.compression)?, wal: Vec::new(), out: Vec::new() },
    };
    let frame = workshop.make(reader, key.range)?;
    let mut encoders = encoders.lock();
    if encoders.len() < ENCODERS_MAX {
        encoders.push((key.compression, workshop));
    }
    Ok(frame)
}

impl Workshop {
    fn make(&mut self, reader: &Mutex<WalReader>, range: LsnRange) -> Result<EncodedWal, StreamError> {
        let pieces = read_wal(&mut reader.lock(), range)?;
        let checksum = WalChecksum::of(pieces.iter().map(AsRef::as_ref));
        self.wal.clear();
        for piece in &pieces {
            self.wal.extend_from_slice(piece);
        }
        let encoding = self.encoder.encode(&self.wal, &mut self.out)?;
        Ok(EncodedWal { encoding, checksum, payload: Bytes::copy_from_slice(&self.out) })
    }
}

/// The WAL that is to be compressed. Blocks.
fn read_wal(reader: &mut WalReader, range: LsnRange) -> Result<Vec<Bytes>, ReadError> {
    loop {
        match reader.read(range)? {
            Read::Ready(pieces) => return Ok(pieces),
            Read::Cold(cold) => cold.load()?,
        }
    }
}

/// A frame that somebody waits for. What could not be made, or is not waited for any more, is forgotten.
struct Claim<'a> {
    frames: &'a Mutex<Frames>,
    key: BulkKey,
    cell: Arc<OnceCell<EncodedWal>>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut frames = self.frames.lock();
        let is_current = frames.by_key.get(&self.key).is_some_and(|known| Arc::ptr_eq(known, &self.cell));
        // The list's own, and this one.
        let is_last = Arc::strong_count(&self.cell) <= 2;
        if is_current && is_last && !self.cell.initialized() {
            frames.by_key.remove(&self.key);
        }
    }
}

impl Frames {
    fn keep(&mut self, key: BulkKey, cell: &Arc<OnceCell<EncodedWal>>, bytes: usize, now: Instant) {
        let is_current = self.by_key.get(&key).is_some_and(|known| Arc::ptr_eq(known, cell));
        // Of several that waited for it, the first one enters it.
        if !is_current || self.made.iter().any(|(made, ..)| *made == key) {
            return;
        }
        self.made.push_back((key, bytes, now));
        self.bytes += bytes;
        while self.bytes > BULK_FRAMES_BYTES_MAX || self.made.len() > BULK_FRAMES_MAX {
            self.drop_oldest();
        }
    }

    fn drop_old(&mut self, now: Instant) {
        while self
            .made
            .front()
            .is_some_and(|(.., at)| now.saturating_duration_since(*at) > BULK_FRAME_AGE_MAX)
        {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some((key, bytes, _)) = self.made.pop_front() {
            self.by_key.remove(&key);
            self.bytes -= bytes;
        }
    }
}

impl From<CodecError> for StreamError {
    fn from(error: CodecError) -> Self {
        let text = format!("could not compress WAL: {error}");
        Self::Refused(crate::protocol::ServerError::error(crate::protocol::SqlState::INTERNAL_ERROR, text))
    }
}

/// Compressed bytes that are kept for links that come a little later.
const BULK_FRAMES_BYTES_MAX: usize = 16 << 20;

/// The same in frames, however small.
const BULK_FRAMES_MAX: usize = 2048;

/// Time for which a frame is kept.
const BULK_FRAME_AGE_MAX: Duration = Duration::from_secs(60);

/// Frames made at a time, over all links, and encoders kept for the next ones.
const ENCODERS_MAX: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::Lsn;

    fn key(number: u64) -> BulkKey {
        let start = Lsn::new((number + 1) << 18).unwrap();
        let range = LsnRange::new(start, start.advance(1 << 18)).unwrap();
        BulkKey { timeline: TimelineId::FIRST, range, compression: Compression::Lz4 }
    }

    fn frame(bytes: usize) -> EncodedWal {
        let checksum = WalChecksum::of([]);
        EncodedWal { encoding: Encoding::Lz4, checksum, payload: vec![0; bytes].into() }
    }

    fn made(frames: &Mutex<Frames>, number: u64, bytes: usize, now: Instant) {
        let mut frames = frames.lock();
        let cell = Arc::clone(frames.by_key.entry(key(number)).or_default());
        assert!(cell.set(frame(bytes)).is_ok());
        frames.keep(key(number), &cell, bytes, now);
    }

    /// Frames and entries.
    fn held(frames: &Mutex<Frames>) -> (usize, usize) {
        let frames = frames.lock();
        (frames.made.len(), frames.by_key.len())
    }

    #[test]
    fn what_is_kept_is_bounded_by_bytes_by_number_and_by_age() {
        let (frames, start) = (Mutex::new(Frames::default()), Instant::now());
        (0..100).for_each(|number| made(&frames, number, 1 << 20, start));
        assert!(frames.lock().bytes <= BULK_FRAMES_BYTES_MAX);
        let has = |number| frames.lock().by_key.contains_key(&key(number));
        assert!(!has(0) && has(99));
        (100..100 + 2 * BULK_FRAMES_MAX as u64).for_each(|number| made(&frames, number, 1, start));
        assert_eq!(held(&frames), (BULK_FRAMES_MAX, BULK_FRAMES_MAX));
        frames.lock().drop_old(start + BULK_FRAME_AGE_MAX);
        assert_eq!(frames.lock().made.len(), BULK_FRAMES_MAX);
        frames.lock().drop_old(start + BULK_FRAME_AGE_MAX + Duration::from_millis(1));
        assert_eq!((held(&frames), frames.lock().bytes), ((0, 0), 0));
    }

    #[test]
    fn what_nobody_waits_for_is_forgotten_and_what_is_made_is_not() {
        let frames = Mutex::new(Frames::default());
        let claim = || {
            let cell = Arc::clone(frames.lock().by_key.entry(key(1)).or_default());
            Claim { frames: &frames, key: key(1), cell }
        };
        let (first, second) = (claim(), claim());
        drop(first);
        assert_eq!(frames.lock().by_key.len(), 1, "the other still waits");
        drop(second);
        assert_eq!(frames.lock().by_key.len(), 0);
        let made = claim();
        assert!(made.cell.set(frame(1)).is_ok());
        drop(made);
        assert_eq!(frames.lock().by_key.len(), 1);
    }
}
