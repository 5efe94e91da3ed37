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
        let cell = {
            let mut frames = self.frames.lock();
            frames.drop_old(now);
            Arc::clone(frames.by_key.entry(key).or_default())
        };
        if cell.initialized() {
            return Ok(());
        }
        // Whoever leaves lets the next one make it.
        let made = cell.get_or_try_init(|| self.make(key, reader)).await.map(|frame| frame.payload.len());
        let mut frames = self.frames.lock();
        match made {
            Ok(bytes) => frames.keep(key, &cell, bytes, now),
            Err(_) => frames.forget(&key, &cell),
        }
        made.map(|_| ())
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

impl Frames {
    fn keep(&mut self, key: BulkKey, cell: &Arc<OnceCell<EncodedWal>>, bytes: usize, now: Instant) {
        let is_current = self.by_key.get(&key).is_some_and(|known| Arc::ptr_eq(known, cell));
        // Of several that waited for it, the first one enters it.
        if !is_current || self.made.iter().any(|(made, ..)| *made == key) {
            return;
        }
        self.made.push_back((key, bytes, now));
        self.bytes += bytes;
        while self.bytes > BULK_FRAMES_BYTES_MAX {
            self.drop_oldest();
        }
    }

    /// What could not be made is not waited for.
    fn forget(&mut self, key: &BulkKey, cell: &Arc<OnceCell<EncodedWal>>) {
        let is_current = self.by_key.get(key).is_some_and(|known| Arc::ptr_eq(known, cell));
        if is_current && !cell.initialized() {
            self.by_key.remove(key);
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

/// Time for which a frame is kept.
const BULK_FRAME_AGE_MAX: Duration = Duration::from_secs(60);

/// Frames made at a time, over all links, and encoders kept for the next ones.
const ENCODERS_MAX: usize = 4;
