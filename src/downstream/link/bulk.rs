//! Standalone frames, compressed once for all links that want them.
//!
//! Owns a bounded number of frames, each under its place and its compression, and the threads' share that making them may
//! take. A frame that several want at the same time is made once; the others wait for it. What is old is made again, and nothing
//! is kept while anything that is held may yet be replaced by what the upstream has there.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OnceCell, Semaphore};

use crate::downstream::blocking::run_blocking;
use crate::downstream::walsender::{StreamError, now};
use crate::metrics::LinkMetrics;
use crate::protocol::link::{BulkEncoder, CodecError, Compression, Encoding, WalChecksum};
use crate::store::{Read, ReadError, Store, WalReader};
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
#[derive(Clone)]
pub(in crate::downstream) struct BulkReader {
    pub(super) store: Store,
    pub(super) wal: Arc<Mutex<WalReader>>,
    /// The right to read from the disk.
    pub(super) reads: Arc<Semaphore>,
}

/// WAL, encoded, and its checksum.
#[derive(Clone, Debug)]
pub(in crate::downstream) struct EncodedWal {
    pub(super) encoding: Encoding,
    pub(super) checksum: WalChecksum,
    pub(super) payload: Bytes,
}

/// A frame for a link that asked for it.
#[derive(Debug)]
pub(in crate::downstream) struct BulkFrame {
    pub(super) key: BulkKey,
    pub(super) encoded: EncodedWal,
    /// For how long the codec was at it, or was waited for; what the disk took is not in it.
    pub(super) encoding: Duration,
}

/// A frame that was made.
#[derive(Debug)]
struct Made {
    encoded: EncodedWal,
    encoding: Duration,
    /// Nothing that is held might have been replaced when it was read.
    is_settled: bool,
    /// Some link has it.
    is_taken: AtomicBool,
}

#[derive(Default)]
struct Frames {
    by_key: HashMap<BulkKey, Arc<OnceCell<Made>>>,
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
        let cell = frames.by_key.get(key)?;
        Some(self.take(cell.get()?))
    }

    /// The frame, made now unless somebody is at it already.
    pub(super) async fn frame(
        &self,
        key: BulkKey,
        reader: BulkReader,
        now: Instant,
    ) -> Result<BulkFrame, StreamError> {
        let claim = self.claim(key, now);
        let made = self.made(&claim, reader, now).await?;
        Ok(BulkFrame { key, encoded: self.take(made), encoding: made.encoding })
    }

    /// Makes a frame that will be asked for, unless it would not be kept for that.
    pub(super) async fn prepare(
        &self,
        key: BulkKey,
        reader: BulkReader,
        now: Instant,
    ) -> Result<(), StreamError> {
        if reader.store.is_settled() {
            self.made(&self.claim(key, now), reader, now).await?;
        }
        Ok(())
    }

    /// The first link that has it let it be made, or would have.
    fn take(&self, made: &Made) -> EncodedWal {
        if made.is_taken.swap(true, Ordering::Relaxed) {
            self.metrics.shared_frames.increment(1);
        }
        made.encoded.clone()
    }

    fn claim(&self, key: BulkKey, now: Instant) -> Claim<'_> {
        let mut frames = self.frames.lock();
        frames.drop_old(now);
        let cell = Arc::clone(frames.by_key.entry(key).or_default());
        Claim { frames: &self.frames, key, cell }
    }

    async fn made<'a>(
        &self,
        claim: &'a Claim<'_>,
        reader: BulkReader,
        now: Instant,
    ) -> Result<&'a Made, StreamError> {
        let Claim { key, ref cell, .. } = *claim;
        if let Some(made) = cell.get() {
            return Ok(made);
        }
        // Whoever leaves lets the next one make it.
        let made = cell.get_or_try_init(|| self.make(key, reader)).await?;
        self.frames.lock().keep(key, cell, made, now);
        Ok(made)
    }

    async fn make(&self, key: BulkKey, reader: BulkReader) -> Result<Made, StreamError> {
        let (is_settled, pieces) = reader.read(key.range).await?;
        let began = now();
        // Only when the relay ends is there no permit.
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok();
        let encoders = Arc::clone(&self.encoders);
        let made = run_blocking(move || {
            let made = make_frame(&encoders, key.compression, &pieces);
            drop(permit);
            made
        });
        let encoded = made.await??;
        let encoding = now().saturating_duration_since(began);
        self.metrics.compressed_frames.increment(1);
        self.metrics.encoded_wal_bytes.increment(key.range.bytes());
        Ok(Made { encoded, encoding, is_settled, is_taken: AtomicBool::new(false) })
    }
}

impl BulkReader {
    /// The WAL that is to be compressed, and whether all that is held was settled before it was read.
    async fn read(self, range: LsnRange) -> Result<(bool, Vec<Bytes>), StreamError> {
        let Self { store, wal, reads } = self;
        // Whoever reads by it just now may be waiting for the disk.
        if let Some(mut reader) = wal.try_lock() {
            let is_settled = store.is_settled();
            if let Read::Ready(pieces) = reader.read(range)? {
                return Ok((is_settled, pieces));
            }
        }
        let permit = reads.acquire_owned().await.ok();
        let read = run_blocking(move || {
            let mut reader = wal.lock();
            let is_settled = store.is_settled();
            let pieces = read_wal(&mut reader, range);
            drop(permit);
            pieces.map(|pieces| (is_settled, pieces))
        });
        Ok(read.await??)
    }
}

fn make_frame(
    encoders: &Mutex<Vec<(Compression, Workshop)>>,
    compression: Compression,
    pieces: &[Bytes],
) -> Result<EncodedWal, StreamError> {
    let free = {
        let mut encoders = encoders.lock();
        let place = encoders.iter().position(|(other, _)| *other == compression);
        place.map(|place| encoders.swap_remove(place).1)
    };
    let mut workshop = match free {
        Some(workshop) => workshop,
        None => Workshop { encoder: BulkEncoder::new(compression)?, wal: Vec::new(), out: Vec::new() },
    };
    let frame = workshop.make(pieces)?;
    let mut encoders = encoders.lock();
    if encoders.len() < ENCODERS_MAX {
        encoders.push((compression, workshop));
    }
    Ok(frame)
}

impl Workshop {
    fn make(&mut self, pieces: &[Bytes]) -> Result<EncodedWal, StreamError> {
        let checksum = WalChecksum::of(pieces.iter().map(AsRef::as_ref));
        self.wal.clear();
        for piece in pieces {
            self.wal.extend_from_slice(piece);
        }
        let encoding = self.encoder.encode(&self.wal, &mut self.out)?;
        Ok(EncodedWal { encoding, checksum, payload: Bytes::copy_from_slice(&self.out) })
    }
}

/// Blocks.
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
    cell: Arc<OnceCell<Made>>,
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
    fn keep(&mut self, key: BulkKey, cell: &Arc<OnceCell<Made>>, made: &Made, now: Instant) {
        let is_current = self.by_key.get(&key).is_some_and(|known| Arc::ptr_eq(known, cell));
        if is_current && !made.is_settled {
            // Those who wait for it have it. What is asked for later may have been replaced by then.
            self.by_key.remove(&key);
            return;
        }
        // Of several that waited for it, the first one enters it.
        if !is_current || self.made.iter().any(|(made, ..)| *made == key) {
            return;
        }
        let bytes = made.encoded.payload.len();
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
    use tokio::sync::watch;

    use super::*;
    use crate::metrics::AllMetrics;
    use crate::store::{Access, BlockId, Condition, Identity, Observer, Positions, WalWriter, small};
    use crate::wal::Lsn;
    use crate::wal::builder::WalBuilder;

    fn key(number: u64) -> BulkKey {
        let start = Lsn::new((number + 1) << 18).unwrap();
        let range = LsnRange::new(start, start.advance(1 << 18)).unwrap();
        BulkKey { timeline: TimelineId::FIRST, range, compression: Compression::Lz4 }
    }

    fn frame(bytes: usize) -> Made {
        let (encoding, checksum) = (Encoding::Lz4, WalChecksum::of([]));
        let encoded = EncodedWal { encoding, checksum, payload: vec![0; bytes].into() };
        let is_taken = AtomicBool::new(false);
        Made { encoded, encoding: Duration::ZERO, is_settled: true, is_taken }
    }

    fn made(frames: &Mutex<Frames>, number: u64, bytes: usize, now: Instant) {
        let mut frames = frames.lock();
        let cell = Arc::clone(frames.by_key.entry(key(number)).or_default());
        assert!(cell.set(frame(bytes)).is_ok());
        frames.keep(key(number), &cell, cell.get().unwrap(), now);
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

    /// Hears that a store has moved.
    struct Moved(watch::Sender<()>);

    impl Observer for Moved {
        fn positions_changed(&self, _: Positions) {
            self.0.send_replace(());
        }

        fn condition_changed(&self, _: Condition) {}
    }

    /// Takes this WAL, and waits until it is durable.
    async fn take(store: &Store, writer: &mut WalWriter, wal: &WalBuilder, from: Lsn, moved: &Moved) {
        let mut moves = moved.0.subscribe();
        writer.begin(from).unwrap();
        let bytes = Bytes::copy_from_slice(wal.slice(from, wal.end()));
        writer.append(from, bytes, BlockId(1)).unwrap();
        writer.submit();
        let is_done = || store.positions().unwrap().flushed == wal.end() && writer.is_overlap_proven();
        while !is_done() {
            moves.changed().await.unwrap();
        }
    }

    #[tokio::test]
    async fn nothing_is_kept_while_what_is_held_may_be_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let moved = Arc::new(Moved(watch::Sender::default()));
        let mut wal = WalBuilder::small();
        wal.noise(20_000);
        // No checksum covers what there is of a record that was never completed.
        wal.overwritten(1);
        wal.noise(20_000);
        let (context, start) = (wal.context(), wal.start());
        let (system_id, segment_size) = (context.system_id.unwrap(), context.segment_size);
        {
            let (store, mut writer) = small::open_for(folder.path(), moved.clone());
            writer.initialize(Identity { system_id, segment_size }, TimelineId::FIRST, start).unwrap();
            take(&store, &mut writer, &wal, start, &moved).await;
            store.shutdown();
        }
        let (store, mut writer) = small::open_for(folder.path(), moved.clone());
        let wal_reader = Mutex::new(store.reader(TimelineId::FIRST, Access::Copied));
        let reads = Arc::new(Semaphore::new(1));
        let reader = BulkReader { store: store.clone(), wal: Arc::new(wal_reader), reads };
        let bulk = BulkFrames::new(AllMetrics::default().link);
        let range = LsnRange::new(start, wal.end()).unwrap();
        let key = BulkKey { range, ..key(0) };
        let frames = || bulk.frames.lock().by_key.len();
        for _ in 0..2 {
            bulk.prepare(key, reader.clone(), now()).await.unwrap();
            assert!(bulk.ready(&key, now()).is_none(), "it may be replaced");
            let frame = bulk.frame(key, reader.clone(), now()).await.unwrap();
            assert!(frame.encoded.checksum == WalChecksum::of([wal.bytes()]));
            assert_eq!(frames(), 0);
        }
        let from = writer.plan().unwrap().start;
        take(&store, &mut writer, &wal, from, &moved).await;
        bulk.prepare(key, reader.clone(), now()).await.unwrap();
        assert!(bulk.ready(&key, now()).is_some());
        assert_eq!(frames(), 1);
        store.shutdown();
    }
}
