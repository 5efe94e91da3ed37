//! Reads what is stored again before anybody needs it.
//!
//! Owns the rounds over the complete segments: each is read from the disk and compared with its checksum within
//! `scrub_interval`, a little at a time, so that damage is found, and repaired, while the upstream still has the WAL. Only
//! reads, by a descriptor of its own and past the system's memory: what others are being sent stays where it is, and nothing
//! that is sent goes for it. What is found is told as if a client had met it. Must never slow the stream down: it reads slowly,
//! and no faster than it must to be in time.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crc32fast::Hasher;

use crate::store::disk::{DIRECT_READ_BYTES, DiskFile, OpenMode, is_read_shortage};
use crate::store::error::ReadError;
use crate::store::mapping::{Fault, MappedSegment};
use crate::store::shared::Shared;
use crate::wal::SegmentName;

/// Compares every complete segment with its checksum, again and again.
pub(super) struct Scrubber {
    shared: Arc<Shared>,
    interval: Duration,
    /// When the round began that is under way.
    round: Option<Instant>,
    /// When the next one begins.
    next_round: Instant,
    /// The segment that was done with last in this round.
    last: Option<SegmentName>,
    reading: Option<Reading>,
    buffer: Buffer,
}

/// A segment that is being read.
struct Reading {
    /// While it is held, the file is not used for other WAL. Nothing is read through it.
    mapped: Arc<MappedSegment>,
    file: Arc<dyn DiskFile>,
    expected: u32,
    hasher: Hasher,
    at: u64,
}

impl Scrubber {
    /// The first round begins at once: damage may have happened while no relay ran.
    pub(super) fn new(shared: Arc<Shared>, interval: Duration, now: Instant) -> Self {
        let buffer = Buffer::new();
        Self { shared, interval, round: None, next_round: now, last: None, reading: None, buffer }
    }

    /// Does a little, and tells how long to wait before the next call.
    pub(super) fn step(&mut self, now: Instant) -> Duration {
        if let Some(reading) = self.reading.take() {
            return self.go_on(reading);
        }
        let round = match self.round {
            Some(round) => round,
            None if now < self.next_round => return (self.next_round - now).min(WAIT_MAX),
            None => *self.round.insert(now),
        };
        let next = self.shared.catalog.lock().after(self.last);
        let Some(name) = next else {
            (self.round, self.last) = (None, None);
            self.next_round = round + self.interval;
            self.shared.health.observer.scrub_round_ended();
            return self.next_round.saturating_duration_since(now).min(WAIT_MAX);
        };
        match Reading::begin(&self.shared, name) {
            Begun::Reading(reading) => self.reading = Some(reading),
            Begun::Nothing => self.last = Some(name),
            Begun::Short => return SHORTAGE_PAUSE,
        }
        Duration::ZERO
    }

    fn go_on(&mut self, mut reading: Reading) -> Duration {
        let name = reading.mapped.name;
        match reading.go_on(&self.shared, self.buffer.bytes()) {
            Progress::More => self.reading = Some(reading),
            Progress::Sound => {
                reading.mapped.note_sound(&self.shared);
                self.shared.health.observer.scrubbed();
                self.last = Some(name);
            }
            // It begins again with this segment.
            Progress::Damaged(Fault::Shortage(_)) => return SHORTAGE_PAUSE,
            Progress::Damaged(fault) => {
                reading.report(&self.shared, fault);
                self.last = Some(name);
            }
        }
        self.pause()
    }

    fn pause(&self) -> Duration {
        let segments = self.shared.catalog.lock().count() as u64;
        let segment_bytes = self.shared.segment_size().map_or(0, |size| size.bytes());
        pause(segments.saturating_mul(segment_bytes), self.interval)
    }
}

/// Time to wait after each window, so that `held_bytes` are read in half the interval, or faster.
fn pause(held_bytes: u64, interval: Duration) -> Duration {
    let windows = held_bytes.div_ceil(WINDOW_BYTES as u64).max(1);
    let in_time = interval / 2 / u32::try_from(windows).unwrap_or(u32::MAX);
    in_time.min(PAUSE_MAX)
}

enum Progress {
    More,
    Sound,
    Damaged(Fault),
}

/// What came of the attempt to read a segment.
enum Begun {
    Reading(Reading),
    /// There is nothing to compare with, it is known to be damaged, or it has gone; or that was found just now, and told.
    Nothing,
    /// Memory or descriptors are short, which says nothing about it.
    Short,
}

impl Reading {
    fn begin(shared: &Arc<Shared>, name: SegmentName) -> Begun {
        let expected = shared.catalog.lock().get(name).and_then(|segment| segment.crc);
        let Some(expected) = expected else { return Begun::Nothing };
        let Ok(size) = shared.segment_size() else { return Begun::Nothing };
        let mapped = match shared.mappings.open(shared, name) {
            Ok(mapped) => mapped,
            Err(ReadError::Io { source, .. }) if is_read_shortage(&source) => return Begun::Short,
            // An error was told there.
            Err(_) => return Begun::Nothing,
        };
        match shared.disk.open(&shared.layout.complete(name, size), OpenMode::ReadFromDisk) {
            Ok(file) => Begun::Reading(Self { mapped, file, expected, hasher: Hasher::new(), at: 0 }),
            Err(error) if is_read_shortage(&error) => Begun::Short,
            Err(error) => {
                Self::report_for(&mapped, shared, Fault::of(error));
                Begun::Nothing
            }
        }
    }

    fn go_on(&mut self, shared: &Shared, buffer: &mut [u8]) -> Progress {
        let size = shared.segment_size().map_or(0, |size| size.bytes());
        let wanted = usize::try_from(size - self.at).unwrap_or(usize::MAX).min(buffer.len());
        let window = buffer.get_mut(..wanted).unwrap_or_default();
        match self.file.read_at(window, self.at) {
            Ok(0) => Progress::Damaged(Fault::too_short()),
            Ok(read) => {
                self.hasher.update(window.get(..read).unwrap_or_default());
                self.at += read as u64;
                if self.at < size { Progress::More } else { self.judge() }
            }
            Err(error) => Progress::Damaged(Fault::of(error)),
        }
    }

    fn judge(&self) -> Progress {
        let found = self.hasher.clone().finalize();
        if found == self.expected {
            Progress::Sound
        } else {
            Progress::Damaged(Fault::checksum(found, self.expected))
        }
    }

    fn report(&self, shared: &Shared, fault: Fault) {
        Self::report_for(&self.mapped, shared, fault);
    }

    fn report_for(mapped: &MappedSegment, shared: &Shared, fault: Fault) {
        // What retention has removed meanwhile is not missed.
        if shared.catalog.lock().get(mapped.name).is_some() {
            mapped.tell(shared, fault);
        }
    }
}

/// Where windows are read to: as the disk wants it, at a multiple of [`DIRECT_READ_BYTES`].
struct Buffer(Vec<u8>, Range<usize>);

impl Buffer {
    fn new() -> Self {
        let buffer = vec![0; WINDOW_BYTES + DIRECT_READ_BYTES];
        let start = buffer.as_ptr().align_offset(DIRECT_READ_BYTES);
        Self(buffer, start..start + WINDOW_BYTES)
    }

    fn bytes(&mut self) -> &mut [u8] {
        self.0.get_mut(self.1.clone()).unwrap_or_default()
    }
}

/// Read at once.
const WINDOW_BYTES: usize = 1 << 20;

/// Longest wait between two windows: 16 MiB a second, so that a round over a few gigabytes takes minutes.
const PAUSE_MAX: Duration = Duration::from_micros(62_500);

/// Pause while descriptors or memory are short.
const SHORTAGE_PAUSE: Duration = Duration::from_secs(1);

const _: () = assert!(WINDOW_BYTES.is_multiple_of(DIRECT_READ_BYTES));

/// Longest wait for the next round to begin, after which the clock is looked at again.
const WAIT_MAX: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_ends_within_the_interval_and_is_gentle_when_there_is_time() {
        let day = Duration::from_secs(86_400);
        for held in [0_u64, 1, 16 << 20, 1 << 30, 1 << 40, 1 << 44] {
            let windows = u32::try_from(held.div_ceil(WINDOW_BYTES as u64)).unwrap();
            assert!(pause(held, day) * windows <= day / 2, "{held}");
        }
        assert_eq!(pause(1 << 30, day), PAUSE_MAX);
        assert!(pause(1 << 44, day) < PAUSE_MAX);
        assert!(pause(64 << 20, Duration::from_secs(1)) * 64 <= Duration::from_millis(500));
    }
}
