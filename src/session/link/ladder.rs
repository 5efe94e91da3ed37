//! How a link is compressed: less while the codec is slower than the network, more again when the network is the bottleneck.
//!
//! Owns the rungs, from the configured codec down to none, and when a link changes them. A change that turns out to be wrong
//! is not tried again soon, so that a link between two rungs stays on one of them.

use std::time::{Duration, Instant};

use crate::protocol::link::Compression;
use crate::session::link::Load;

/// How a link sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rung {
    /// Compressed.
    Compressed(Compression),
    /// As it is.
    Plain,
}

/// The rungs of one link, and on which it stands.
#[derive(Clone, Debug)]
pub struct Ladder {
    /// The configured one first.
    rungs: Vec<Rung>,
    at: usize,
    /// When it was changed last.
    changed_at: Instant,
    /// Windows in a row in which the codec was waited for.
    slow_windows: u32,
    /// How long it stays before it goes up.
    patience: Duration,
    /// It went up last, and has to show that this was right.
    is_on_trial: bool,
}

impl Ladder {
    /// A link that stays on its first rung.
    pub fn fixed(rung: Rung, now: Instant) -> Self {
        Self::new(vec![rung], now)
    }

    /// A link that goes from `compression` to `fallback`, if there is one, and to none.
    pub fn adaptive(compression: Compression, fallback: Option<Compression>, now: Instant) -> Self {
        let compressed = [Some(compression), fallback].into_iter().flatten().map(Rung::Compressed);
        Self::new(compressed.chain([Rung::Plain]).collect(), now)
    }

    fn new(rungs: Vec<Rung>, now: Instant) -> Self {
        let patience = PATIENCE_MIN;
        Self { rungs, at: 0, changed_at: now, slow_windows: 0, patience, is_on_trial: false }
    }

    /// How to send now.
    pub fn rung(&self) -> Rung {
        self.rungs.get(self.at).copied().unwrap_or(Rung::Plain)
    }

    /// What a window of at least [`WINDOW`] showed. Returns whether the rung has changed.
    pub fn observe(&mut self, load: Load, now: Instant) -> bool {
        let is_slow = is_most(load.codec, load.time);
        self.slow_windows = if is_slow { self.slow_windows + 1 } else { 0 };
        let stood = now.saturating_duration_since(self.changed_at);
        if self.is_on_trial && stood >= TRIAL_TIME {
            self.is_on_trial = false;
            self.patience = PATIENCE_MIN;
        }
        if self.slow_windows >= SLOW_WINDOWS_MIN {
            return self.go_down(now);
        }
        // What flows in a trickle can be compressed by any codec.
        let is_light = load.wal_bytes < per_second(LIGHT_BYTES_PER_SECOND, load.time);
        let may_go_up = !is_slow && (is_light || is_most(load.network, load.time));
        if may_go_up && self.at > 0 && stood >= self.patience {
            self.at -= 1;
            self.is_on_trial = true;
            self.changed_at = now;
            return true;
        }
        false
    }

    fn go_down(&mut self, now: Instant) -> bool {
        if self.at + 1 >= self.rungs.len() {
            return false;
        }
        if self.is_on_trial {
            self.patience = (self.patience * 2).min(PATIENCE_MAX);
            self.is_on_trial = false;
        }
        self.at += 1;
        self.changed_at = now;
        self.slow_windows = 0;
        true
    }
}

fn is_most(part: Duration, whole: Duration) -> bool {
    part * 2 > whole
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let bytes = u128::from(bytes) * time.as_millis() / 1_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Time over which a link's load is measured.
pub const WINDOW: Duration = Duration::from_millis(500);

/// Windows in a row in which the codec must have been waited for before less is compressed.
const SLOW_WINDOWS_MIN: u32 = 2;

/// How long a link stays on a rung before it goes up, at least; twice as long each time that this was wrong.
const PATIENCE_MIN: Duration = Duration::from_secs(5);

/// The same at most.
const PATIENCE_MAX: Duration = Duration::from_secs(600);

/// How long it must stand on a higher rung for that to have been right.
const TRIAL_TIME: Duration = Duration::from_secs(30);

/// WAL in a second below which any codec is fast enough.
const LIGHT_BYTES_PER_SECOND: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ZSTD: Compression = Compression::Zstd { level: 1 };

    /// A link with a network and codecs of given speeds, in MB/s, and a backlog without end.
    struct Simulated {
        ladder: Ladder,
        now: Instant,
        network: u64,
        /// Speed and ratio of each codec.
        zstd: (u64, u64),
        lz4: (u64, u64),
        /// WAL that there is in a second; `None`: any amount.
        demand: Option<u64>,
    }

    impl Simulated {
        fn new(network: u64) -> Self {
            let now = Instant::now();
            let ladder = Ladder::adaptive(ZSTD, Some(Compression::Lz4), now);
            Self { ladder, now, network, zstd: (300, 5), lz4: (900, 3), demand: None }
        }

        /// Lets a window pass; whether the rung has changed.
        fn window(&mut self) -> bool {
            let (speed, ratio) = match self.ladder.rung() {
                Rung::Compressed(Compression::Lz4) => self.lz4,
                Rung::Compressed(_) => self.zstd,
                Rung::Plain => (u64::MAX, 1),
            };
            let network = self.network * ratio;
            let rate = speed.min(network).min(self.demand.unwrap_or(u64::MAX));
            let busy = |capacity: u64| {
                if rate < capacity { Duration::ZERO } else { WINDOW.mul_f64(0.9) }
            };
            self.now += WINDOW;
            let load = Load {
                time: WINDOW,
                network: if network <= speed { busy(network) } else { Duration::ZERO },
                codec: if speed < network { busy(speed) } else { Duration::ZERO },
                wal_bytes: per_second(rate << 20, WINDOW),
            };
            self.ladder.observe(load, self.now)
        }

        fn pass(&mut self, time: Duration) -> u32 {
            let end = self.now + time;
            let mut changes = 0;
            while self.now < end {
                changes += u32::from(self.window());
            }
            changes
        }
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_slow_network_is_never_given_less_than_the_configured_codec() {
        for network in [1, 10, 50] {
            let mut link = Simulated::new(network);
            assert_eq!(link.pass(HOUR), 0, "{network}");
            assert_eq!(link.ladder.rung(), Rung::Compressed(ZSTD));
        }
    }

    #[test]
    fn a_fast_network_gets_what_is_fast_enough_and_a_slow_one_the_codec_again() {
        let mut link = Simulated::new(10_000);
        link.pass(Duration::from_secs(5));
        assert_eq!(link.ladder.rung(), Rung::Plain);
        link.network = 20;
        link.pass(Duration::from_secs(20));
        assert_eq!(link.ladder.rung(), Rung::Compressed(ZSTD));
        // Fast enough for LZ4 only.
        link.network = 250;
        link.pass(Duration::from_secs(3));
        assert_eq!(link.ladder.rung(), Rung::Compressed(Compression::Lz4));
    }

    #[test]
    fn a_trickle_is_compressed_however_fast_the_network_is() {
        let mut link = Simulated::new(10_000);
        link.pass(Duration::from_secs(5));
        link.demand = Some(1);
        link.pass(Duration::from_secs(20));
        assert_eq!(link.ladder.rung(), Rung::Compressed(ZSTD));
        assert_eq!(link.pass(HOUR), 0, "and stays so");
    }

    #[test]
    fn a_fixed_link_stays_where_it_is() {
        let now = Instant::now();
        let mut ladder = Ladder::fixed(Rung::Compressed(ZSTD), now);
        let slow = Load { time: WINDOW, codec: WINDOW, ..Load::default() };
        assert!((0..100).all(|window| !ladder.observe(slow, now + WINDOW * window)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// Whatever the speeds, as long as they stay: a link settles. It may look again whether more would do, less and less often.
        #[test]
        fn a_link_settles_whatever_the_speeds(
            network in 1_u64..3_000,
            zstd in (1_u64..600, 1_u64..10),
            lz4 in (100_u64..2_000, 1_u64..6),
            demand in prop::option::of(1_u64..3_000),
        ) {
            let mut link = Simulated { zstd, lz4, demand, ..Simulated::new(network) };
            link.pass(HOUR);
            let changes = link.pass(HOUR);
            prop_assert!(changes <= 16, "{changes} changes in an hour");
        }

        /// Whatever happens, it goes one rung at a time and not more often than it may.
        #[test]
        fn a_link_does_not_flap(
            loads in prop::collection::vec((0_u64..=10, 0_u64..=10, any::<bool>()), 1..400),
        ) {
            let start = Instant::now();
            let mut ladder = Ladder::adaptive(ZSTD, Some(Compression::Lz4), start);
            let (mut now, mut changes) = (start, Vec::new());
            for (codec, network, is_light) in loads {
                now += WINDOW;
                let part = |tenths: u64| WINDOW * u32::try_from(tenths).unwrap() / 10;
                let wal_bytes = if is_light { 0 } else { 1 << 30 };
                let codec = part(codec);
                let load = Load { time: WINDOW, codec, network: part(network).min(WINDOW - codec), wal_bytes };
                let before = ladder.at;
                if ladder.observe(load, now) {
                    prop_assert_eq!(ladder.at.abs_diff(before), 1);
                    changes.push((now, ladder.at > before));
                }
                prop_assert!(ladder.at < 3);
            }
            for pair in changes.windows(2) {
                let [(before, _), (after, is_down)] = pair else { unreachable!() };
                let least = if *is_down { WINDOW * SLOW_WINDOWS_MIN } else { PATIENCE_MIN };
                prop_assert!(after.duration_since(*before) >= least);
            }
        }
    }
}
