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
    /// What could be sent is still being compressed.
    Codec,
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
}

impl LoadMeter {
    /// Nothing is waited for.
    pub fn new(now: Instant) -> Self {
        Self { waiting: Waiting::Nothing, since: now, load: Load::default() }
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

    /// The load so far, once a window has passed; it begins anew then.
    pub fn take(&mut self, window: Duration, now: Instant) -> Option<Load> {
        self.count(now);
        (self.load.time >= window).then(|| std::mem::take(&mut self.load))
    }

    fn count(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        self.since = self.since.max(now);
        self.load.time += passed;
        match self.waiting {
            Waiting::Nothing => {}
            Waiting::Network => self.load.network += passed,
            Waiting::Codec => self.load.codec += passed,
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
        meter.set(Waiting::Codec, at(100));
        meter.set(Waiting::Network, at(250));
        meter.note_sent(7);
        assert_eq!(meter.take(Duration::from_secs(1), at(600)), None);
        meter.set(Waiting::Nothing, at(700));
        let load = meter.take(Duration::from_secs(1), at(1_000)).unwrap();
        let ms = Duration::from_millis;
        assert_eq!(load, Load { time: ms(1_000), network: ms(450), codec: ms(150), wal_bytes: 7 });
        assert_eq!(meter.take(Duration::from_secs(1), at(1_500)), None);
    }
}
