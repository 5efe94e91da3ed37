//! The power-cut harness: a receiver on a real ext4 whose power is cut, again and again, with its files kept.
//!
//! Each round: the receiver starts on the disk as the last cut left it, *cut off from its primary*, and must show every
//! byte that it had acknowledged; then it streams under load while its acknowledgements are read from the primary's
//! `pg_stat_replication`; then the power goes. A receiver whose sync does nothing must be caught by the same rounds.

use std::path::Path;
use std::time::{Duration, Instant};

use super::faults::SmallDisk;
use super::load::{Load, emit_wal};
use super::postgres::Postgres;
use super::proxy::Proxy;
use super::raw::RawClient;
use super::{MB, lsn_text};

/// Between two transactions: some megabytes a second, so that the receiver keeps up, and the power goes while it waits for
/// the newest byte.
const LOAD_PAUSE: Duration = Duration::from_millis(5);

/// One round in so many finds the receiver far behind, and the power goes while it catches up.
const BURSTS_EVERY: u64 = 3;
const BURST_BYTES: u64 = 48 * MB;

/// What is put to the test.
pub(crate) trait Receiver {
    /// Starts, storing below `folder`; its primary is out of reach for now.
    fn start(&mut self, folder: &Path);
    /// Checks, with the primary out of reach, that everything up to `acknowledged` is there.
    fn check(&mut self, folder: &Path, acknowledged: u64) -> Result<(), String>;
    /// Ends at once. The disk may already be gone.
    fn kill(&mut self);
}

/// What the rounds showed.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) cuts: u32,
    pub(crate) lost: Vec<String>,
    pub(crate) acknowledged: u64,
    /// Cuts before which something new had been acknowledged; the others prove little.
    pub(crate) with_progress: u32,
}

pub(crate) struct PowerCuts<'a> {
    pub(crate) primary: &'a Postgres,
    /// Between the receiver and the primary.
    pub(crate) proxy: &'a Proxy,
    pub(crate) application_name: &'a str,
    pub(crate) disk_megabytes: u64,
}

impl PowerCuts<'_> {
    /// Cuts the power `cuts` times; ends early at the first loss when `stop_at_loss`.
    pub(crate) fn run(&self, receiver: &mut dyn Receiver, cuts: u32, stop_at_loss: bool) -> Outcome {
        let mut disk = SmallDisk::of_megabytes(self.disk_megabytes);
        let load = Load::start(self.primary, LOAD_PAUSE);
        let mut outcome = Outcome::default();
        let mut chance = Chance::seeded();
        for cut in 1..=cuts {
            if chance.between(0, BURSTS_EVERY) == 0 {
                emit_wal(self.primary, BURST_BYTES);
            }
            self.proxy.open();
            receiver.start(disk.path());
            let before = outcome.acknowledged;
            outcome.acknowledged =
                before.max(self.stream(Duration::from_millis(chance.between(50, 700)), before));
            disk.cut_power();
            receiver.kill();
            self.proxy.close();
            outcome.cuts = cut;
            if cut % 50 == 0 {
                eprintln!("{cut} power cuts, {} with loss", outcome.lost.len());
            }
            outcome.with_progress += u32::from(outcome.acknowledged > before);
            disk.unmount();
            disk.mount();
            if let Err(complaint) = receiver.check(disk.path(), outcome.acknowledged) {
                let acknowledged = lsn_text(outcome.acknowledged);
                let loss = format!("cut {cut}, acknowledged {acknowledged}: {complaint}");
                eprintln!("{loss}");
                outcome.lost.push(loss);
                receiver.kill();
                if stop_at_loss {
                    break;
                }
                // The rest of the rounds would report the same loss again.
                drop(std::mem::replace(&mut disk, SmallDisk::of_megabytes(self.disk_megabytes)));
                outcome.acknowledged = 0;
            }
        }
        receiver.kill();
        assert!(load.committed() > 0);
        outcome
    }

    /// Lets it stream for this long, counted from the first acknowledgement; returns the highest one.
    fn stream(&self, time: Duration, before: u64) -> u64 {
        let mut client = RawClient::sql(self.primary.port).unwrap();
        let query = format!(
            "select max(flush_lsn) from pg_stat_replication where application_name = '{}'",
            self.application_name
        );
        let patience = Instant::now() + Duration::from_secs(20);
        let mut end = None;
        let mut acknowledged = 0;
        loop {
            let rows = client.rows(&query).unwrap();
            let told = rows.first().and_then(|row| row.first()?.as_deref().map(super::lsn)).unwrap_or(0);
            acknowledged = acknowledged.max(told);
            if told > before && end.is_none() {
                end = Some(Instant::now() + time);
            }
            if end.is_some_and(|end| Instant::now() >= end) || Instant::now() > patience {
                return acknowledged;
            }
        }
    }
}

/// Random numbers from a seed that is printed: `WALRELAY_SEED` repeats a run.
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn seeded() -> Self {
        let given = std::env::var("WALRELAY_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
        let seed = given.unwrap_or_else(|| u64::try_from(clock() & u128::from(u64::MAX >> 1)).unwrap());
        eprintln!("WALRELAY_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn of(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From `low` to below `high`.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low)
    }
}

/// A number of rounds from the environment.
pub(crate) fn rounds(variable: &str, default: u32) -> u32 {
    std::env::var(variable)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}
