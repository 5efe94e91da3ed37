//! What one link carries: how much, by which codec, and how fast now.
//!
//! Shared between the task that carries it and whoever shows it. Time is an argument, so that a rate is right also when
//! nothing has been carried for a while.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::protocol::link::{Compression, Encoding};

/// The traffic of one link in one direction.
#[derive(Debug, Default)]
pub struct LinkTraffic(Mutex<Option<Carrying>>);

#[derive(Clone, Debug)]
struct Carrying {
    compression: Compression,
    encoding: Encoding,
    wal_bytes: u64,
    wire_bytes: u64,
    meter: RateMeter,
}

/// What a link has carried in its session.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrafficSample {
    /// What both sides agreed upon.
    pub compression: Compression,
    /// How the last message was encoded.
    pub encoding: Encoding,
    /// WAL.
    pub wal_bytes: u64,
    /// What it took to carry it.
    pub wire_bytes: u64,
    /// Bytes on the wire in a second, over the last seconds.
    pub wire_rate: f64,
}

impl LinkTraffic {
    /// A session begins on which this was agreed.
    pub fn begin(&self, compression: Compression, now: Instant) {
        let (encoding, meter) = (Encoding::Plain, RateMeter::new(now));
        *self.0.lock() = Some(Carrying { compression, encoding, wal_bytes: 0, wire_bytes: 0, meter });
    }

    /// There is no link any more.
    pub fn end(&self) {
        *self.0.lock() = None;
    }

    /// A message was carried.
    pub fn note(&self, encoding: Encoding, wal_bytes: u64, wire_bytes: u64, now: Instant) {
        if let Some(carrying) = &mut *self.0.lock() {
            carrying.encoding = encoding;
            carrying.wal_bytes += wal_bytes;
            carrying.wire_bytes += wire_bytes;
            carrying.meter.note(wire_bytes, now);
        }
    }

    /// How it stands; `None` while there is no link.
    pub fn sample(&self, now: Instant) -> Option<TrafficSample> {
        let Carrying { compression, encoding, wal_bytes, wire_bytes, meter } = self.0.lock().clone()?;
        let wire_rate = meter.rate(now);
        Some(TrafficSample { compression, encoding, wal_bytes, wire_bytes, wire_rate })
    }
}

/// Counts what happened in each of the last seconds.
#[derive(Clone, Debug)]
pub struct RateMeter {
    begun: Instant,
    /// What was counted in the seconds up to `newest`, by their number.
    seconds: [u64; SECONDS],
    newest: u64,
}

impl RateMeter {
    /// Nothing has happened.
    pub fn new(now: Instant) -> Self {
        Self { begun: now, seconds: [0; SECONDS], newest: 0 }
    }

    /// So much happened now.
    pub fn note(&mut self, count: u64, now: Instant) {
        self.advance(now);
        let newest = self.newest;
        if let Some(second) = self.second(newest) {
            *second = second.saturating_add(count);
        }
    }

    /// How much in a second, over the last ones.
    #[allow(clippy::cast_precision_loss)] // a rate is shown, not computed with
    pub fn rate(&self, now: Instant) -> f64 {
        let mut at = self.clone();
        at.advance(now);
        let since = now.saturating_duration_since(at.begun);
        let begun_before = Duration::from_secs(at.newest.saturating_sub(SECONDS as u64 - 1));
        let window = since.saturating_sub(begun_before).max(Duration::from_secs(1));
        at.seconds.iter().sum::<u64>() as f64 / window.as_secs_f64()
    }

    fn advance(&mut self, now: Instant) {
        let current = now.saturating_duration_since(self.begun).as_secs();
        let passed = current.saturating_sub(self.newest).min(SECONDS as u64);
        for second in 1..=passed {
            let cleared = current - passed + second;
            if let Some(second) = self.second(cleared) {
                *second = 0;
            }
        }
        self.newest = self.newest.max(current);
    }

    fn second(&mut self, number: u64) -> Option<&mut u64> {
        let index = usize::try_from(number % SECONDS as u64).unwrap_or(0);
        self.seconds.get_mut(index)
    }
}

/// Seconds that a rate is taken over.
const SECONDS: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_last_seconds_and_falls_to_nothing() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut meter = RateMeter::new(start);
        for ms in (0..10_000).step_by(100) {
            meter.note(1_000, at(ms));
        }
        assert!((meter.rate(at(9_999)) - 10_000.0).abs() < 10.0, "{}", meter.rate(at(9_999)));
        assert!((meter.rate(at(12_000)) - 5_000.0).abs() < 10.0, "{}", meter.rate(at(12_000)));
        assert!(meter.rate(at(60_000)).abs() < f64::EPSILON);
        let mut young = RateMeter::new(start);
        young.note(700, at(100));
        assert!((young.rate(at(200)) - 700.0).abs() < 1.0, "not extrapolated");
    }

    #[test]
    fn a_link_that_has_gone_carries_nothing() {
        let (traffic, now) = (LinkTraffic::default(), Instant::now());
        traffic.note(Encoding::Zstd, 1, 1, now);
        assert_eq!(traffic.sample(now), None);
        traffic.begin(Compression::Lz4, now);
        traffic.note(Encoding::Lz4, 100, 40, now);
        let sample = traffic.sample(now).unwrap();
        assert_eq!((sample.wal_bytes, sample.wire_bytes, sample.encoding), (100, 40, Encoding::Lz4));
        traffic.end();
        assert_eq!(traffic.sample(now), None);
    }
}
