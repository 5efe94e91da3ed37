//! What a link waits for: its network, its codec, or nothing.

use std::time::{Duration, Instant};

/// What keeps a link from sending more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Waiting {
    /// There is nothing to send.
    #[default]
    Nothing,
    /// The network takes nothing more, or must not be given more.
    Network,
    /// What could be sent is still being made into a frame: by the disk or by the codec, which is known when it is made.
    Frame,
}

/// For how long it waited for what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// All the time.
    pub time: Duration,
    /// For the network.
    pub network: Duration,
    /// For the codec.
    pub codec: Duration,
    /// WAL that was sent.
    pub wal_bytes: u64,
}

/// Measures the load of one link.
#[derive(Clone, Copy, Debug)]
pub struct LoadMeter {
    waiting: Waiting,
    since: Instant,
    load: Load,
    /// For how long the frame that is being made was waited for.
    frame: Duration,
}

impl LoadMeter {
    /// Nothing is waited for.
    pub fn new(now: Instant) -> Self {
        Self { waiting: Waiting::Nothing, since: now, load: Load::default(), frame: Duration::ZERO }
    }

    /// From now on this is waited for.
    pub fn set(&mut self, waiting: Waiting, now: Instant) {
        self.count(now);
        self.waiting = waiting;
    }

    /// WAL was sent.
    pub fn note_sent(&mut self, wal_bytes: u64) {
        self.load.wal_bytes = self.load.wal_bytes.saturating_add(wal_bytes);
    }

    /// The frame is there. For so long the codec was at it; what it was waited for beyond that was not the codec's fault.
    pub fn note_frame(&mut self, encoding: Duration, now: Instant) {
        self.count(now);
        self.waiting = Waiting::Nothing;
        self.load.codec += encoding.min(std::mem::take(&mut self.frame));
    }

    /// The load so far, once a window has passed and it is known what was waited for; it begins anew then.
    pub fn take(&mut self, window: Duration, now: Instant) -> Option<Load> {
        self.count(now);
        let is_known = self.waiting != Waiting::Frame;
        (is_known && self.load.time >= window).then(|| std::mem::take(&mut self.load))
    }

    fn count(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        self.since = self.since.max(now);
        self.load.time += passed;
        match self.waiting {
            Waiting::Nothing => {}
            Waiting::Network => self.load.network += passed,
            Waiting::Frame => self.frame += passed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_counts_for_what_was_waited_for() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut meter = LoadMeter::new(start);
        let ms = Duration::from_millis;
        meter.set(Waiting::Frame, at(100));
        meter.note_frame(ms(200), at(250));
        meter.set(Waiting::Network, at(250));
        meter.note_sent(7);
        assert_eq!(meter.take(Duration::from_secs(1), at(600)), None);
        meter.set(Waiting::Nothing, at(700));
        let load = meter.take(Duration::from_secs(1), at(1_000)).unwrap();
        assert_eq!(load, Load { time: ms(1_000), network: ms(450), codec: ms(150), wal_bytes: 7 });
        assert_eq!(meter.take(Duration::from_secs(1), at(1_500)), None);
    }

    #[test]
    fn what_the_disk_takes_is_not_the_codecs() {
        let start = Instant::now();
        let (ms, window) = (Duration::from_millis, Duration::from_millis(500));
        let at = |milliseconds| start + ms(milliseconds);
        let mut meter = LoadMeter::new(start);
        meter.set(Waiting::Frame, at(0));
        // Meanwhile what was made before went out.
        meter.set(Waiting::Network, at(300));
        meter.set(Waiting::Frame, at(400));
        assert_eq!(meter.take(window, at(600)), None, "nobody knows yet what it waits for");
        meter.note_frame(ms(20), at(700));
        let load = meter.take(window, at(700)).unwrap();
        assert_eq!((load.time, load.codec, load.network), (ms(700), ms(20), ms(100)));
    }
}
