//! One simulated life of a data directory, over many lives of the process.
//!
//! Owns the primary, the process as a set of steps, the faults, and the checks: nothing acknowledged is lost, nothing
//! unverified is reported, every byte is the primary's, nothing a slot needs is gone, and when the faults end all is well
//! again without help.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;

use super::Mutant;
use super::content::check_files;
use super::disk::{Crash, Faults, SimDisk};
use super::random::Random;
use super::truth::{Truth, truths, truths_with_a_head};
use crate::store::control::Identity;
use crate::store::error::{AppendError, StoreError};
use crate::store::flush::{Step, Syncer, Writer};
use crate::store::health::Observer;
use crate::store::keeper::Keeper;
use crate::store::open::{Opened, open};
use crate::store::queue::SyncJob;
use crate::store::shared::Shared;
use crate::store::{
    Access, BlockId, Condition, Positions, RetentionLimits, SlotKind, StoreSettings, WalReader, WalWriter,
    WhenInvalid,
};
use crate::wal::{Lsn, SegmentName, TimelineId};

pub(super) type Checked = Result<(), String>;

pub(super) struct World {
    pub random: Random,
    pub disk: SimDisk,
    pub truth: &'static Truth,
    mutant: Mutant,
    seen: Arc<Seen>,
    live: Option<Live>,
    /// Index of the primary's end.
    primary: usize,
    blocks: u64,
    now: Instant,
    /// Permanent slots that must exist; `None`: it is not known.
    slots: BTreeMap<String, Option<()>>,
    faults_per_mille: u64,
    last_error: String,
    settings: StoreSettings,
}

/// A process.
pub(super) struct Live {
    pub shared: Arc<Shared>,
    pub wal_writer: WalWriter,
    pub writer: Writer,
    pub syncer: Syncer,
    pub keeper: Keeper,
    pub job: Option<SyncJob>,
    is_connected: bool,
    pub reader: WalReader,
    pub notes: Vec<String>,
}

/// What was claimed, over all lives.
#[derive(Default)]
pub(super) struct Seen {
    pub flushed: Mutex<Option<Lsn>>,
    /// What was flushed while nothing was unproven: to here every byte on the disk is right, for ever.
    right: Mutex<Option<Lsn>>,
    broken: Mutex<Option<String>>,
}

impl Observer for Seen {
    fn positions_changed(&self, positions: Positions) {
        let mut flushed = self.flushed.lock();
        *flushed = (*flushed).max(Some(positions.flushed));
    }

    fn condition_changed(&self, _: Condition) {}

    fn suspect(&self, name: SegmentName, detail: &str) {
        *self.broken.lock() = Some(format!("segment {name:?} is suspect: {detail}"));
    }
}

pub(super) fn settings() -> StoreSettings {
    StoreSettings {
        data_dir: PathBuf::from("/data"),
        wal_keep_size: 1 << 20,
        tail_bytes_max: 1 << 19,
        unwritten_bytes_max: 1 << 20,
        spare_segments: 2,
        reserve_segments: 1,
        max_replication_slots: 3,
        scrub_interval: None,
        limits: RetentionLimits::default(),
    }
}

/// What consumers may keep: nothing is limited, or little is allowed.
fn limits(random: &mut Random) -> RetentionLimits {
    let is_limited = |random: &mut Random| random.is_one_in(3);
    RetentionLimits {
        max_slot_wal_keep_size: is_limited(random).then(|| random.below(3) << 20),
        max_wal_size: 1 << 20,
        idle_replication_slot_timeout: is_limited(random).then(|| Duration::from_secs(5)),
        retain_without_slot: None,
        disk_budget: is_limited(random).then(|| 1 + random.below(12 << 20)),
    }
}

impl World {
    pub(super) fn new(seed: u64, mutant: Mutant) -> Self {
        let mut random = Random::new(seed);
        Self {
            disk: SimDisk::new(random.next()),
            truth: match (&truths()[random.below_len(truths().len())], seed % 8) {
                (_, 6) => &truths_with_a_head()[0],
                (_, 7) => &truths_with_a_head()[1],
                (truth, _) => truth,
            },
            mutant,
            seen: Arc::default(),
            live: None,
            primary: 0,
            blocks: 0,
            now: Instant::now(),
            slots: BTreeMap::new(),
            last_error: String::new(),
            settings: StoreSettings {
                wal_keep_size: [1, 4][random.below_len(2)] << 20,
                limits: limits(&mut Random::new(!seed)),
                ..settings()
            },
            faults_per_mille: [0, 10, 30, 80][random.below_len(4)],
            random,
        }
    }

    /// Lives through so many steps, then through a last power cut.
    pub(super) fn run(&mut self, steps: u32) -> Checked {
        self.start()?;
        for _ in 0..steps {
            if self.random.per_mille(self.faults_per_mille) {
                self.fault()?;
            } else {
                self.step()?;
            }
            self.check_claims()?;
        }
        if self.random.is_one_in(2) {
            self.crash(Crash::PowerCut)?;
        }
        self.converge()?;
        self.crash(Crash::PowerCut)
    }

    /// A world without faults but those that a test makes, with a primary that has written at least so many bytes.
    pub(super) fn calm(seed: u64, bytes: u64) -> Self {
        let mut world = Self::new(seed, Mutant::None);
        world.faults_per_mille = 0;
        world.settings = settings();
        let end = world.truth.wal.start().advance(bytes);
        world.primary = world.truth.ends.partition_point(|known| *known < end);
        world
    }

    /// What consumers may keep, from the next start on.
    pub(super) fn limit(&mut self, limits: RetentionLimits) {
        self.settings.limits = limits;
    }

    /// The primary writes so many bytes more.
    pub(super) fn grow(&mut self, bytes: u64) {
        let end = self.primary_end().advance(bytes);
        self.primary = self.truth.ends.partition_point(|known| *known < end).min(self.truth.ends.len() - 1);
    }

    pub(super) fn live(&mut self) -> &mut Live {
        self.live.as_mut().unwrap()
    }

    /// What was acknowledged is not held against the store from here on: a test takes it away.
    pub(super) fn excuse_loss(&mut self) {
        *self.seen.flushed.lock() = None;
        *self.seen.right.lock() = None;
    }

    pub(super) fn take_broken(&mut self) -> Option<String> {
        self.seen.broken.lock().take()
    }

    /// Something that depends on all that happened.
    pub(super) fn trace(&self) -> (u64, Option<Lsn>, usize) {
        (self.disk.operations(), *self.seen.flushed.lock(), self.primary)
    }

    pub(super) fn primary_end(&self) -> Lsn {
        self.truth.ends[self.primary]
    }

    fn step(&mut self) -> Checked {
        let choice = self.random.below(100);
        let Some(live) = &mut self.live else { return self.start() };
        match choice {
            0..=19 => {
                let more = [1, 3, 30][self.random.below_len(3)];
                self.primary =
                    (self.primary + 1 + self.random.below_len(more)).min(self.truth.ends.len() - 1);
            }
            20..=44 => self.deliver()?,
            45..=50 => live.wal_writer.submit(),
            51..=52 => live.wal_writer.submit_before_more(),
            53..=66 => {
                live.writer.step();
            }
            67..=73 if live.job.is_none() => live.job = live.syncer.take(),
            67..=80 => {
                if let Some(job) = live.job.take() {
                    live.syncer.run(&job);
                }
            }
            81..=88 => {
                self.now += Duration::from_millis(300);
                live.keeper.step(self.now);
            }
            89..=94 => self.read_somewhere()?,
            95..=97 => live.is_connected = false,
            _ => self.use_slots()?,
        }
        if self.is_dead() {
            // The process ends; now and then the machine does, too.
            let crash = if self.random.is_one_in(3) { Crash::PowerCut } else { Crash::Kill };
            return self.crash(crash);
        }
        Ok(())
    }

    fn fault(&mut self) -> Checked {
        let healthy = Faults { short_writes: 300, ..Faults::default() };
        match self.random.below(10) {
            0 => self.crash(Crash::Kill),
            1 => self.crash(Crash::PowerCut),
            2 => {
                let after = self.random.below(12);
                self.disk.crash_after(after);
                Ok(())
            }
            3..=5 => {
                // The disk loses what it was to sync.
                self.disk
                    .set_faults(Faults { sync_errors: [300, 1000][self.random.below_len(2)], ..healthy });
                Ok(())
            }
            6 => {
                let write_errors = [0, 100][self.random.below_len(2)];
                self.disk.set_faults(Faults { write_errors, read_errors: 100, ..healthy });
                Ok(())
            }
            7 => {
                let blocks = [0, 1, 300, 1400][self.random.below_len(4)];
                self.disk.set_free_blocks(Some(blocks));
                Ok(())
            }
            _ => {
                self.heal();
                Ok(())
            }
        }
    }

    pub(super) fn heal(&self) {
        self.disk.set_faults(Faults { short_writes: 100, ..Faults::default() });
        self.disk.set_free_blocks(None);
    }

    /// The process or the machine ends; the next process starts, at times into the next crash.
    pub(super) fn crash(&mut self, crash: Crash) -> Checked {
        self.live = None;
        if !self.random.is_one_in(4) {
            self.disk.set_faults(Faults { sync_errors: 0, ..self.disk.faults() });
        }
        self.disk.restart(crash);
        self.start()
    }

    /// The process ends, and the next one is started once; whether it came up.
    pub(super) fn try_start(&mut self, crash: Crash) -> bool {
        self.live = None;
        let was_crashing = self.disk.has_crashed();
        let observer = self.seen.clone();
        self.disk.unlock();
        let opened = open(self.settings.clone(), Arc::new(self.disk.clone()), observer, self.mutant);
        let has_started = opened.is_ok() && !was_crashing && !self.disk.has_crashed();
        drop(opened);
        self.disk.restart(crash);
        has_started
    }

    pub(super) fn start(&mut self) -> Checked {
        for attempt in 0.. {
            if self.faults_per_mille > 0 && self.random.is_one_in(6) && attempt < 4 {
                let after = self.random.below(25);
                self.disk.crash_after(after);
            }
            let observer = self.seen.clone();
            let failed = match open(self.settings.clone(), Arc::new(self.disk.clone()), observer, self.mutant)
            {
                Ok(opened) => match self.begin_life(opened)? {
                    None => break,
                    Some(error) => error,
                },
                Err(error) => error,
            };
            let is_excused = self.disk.has_crashed()
                || self.disk.is_filled()
                || matches!(&failed, StoreError::Io { .. } | StoreError::Failed(_));
            if !is_excused || attempt > 20 {
                return Err(format!("does not start: {failed:?}"));
            }
            if attempt > 2 {
                self.heal();
            }
            let crash = if self.random.is_one_in(3) { Crash::PowerCut } else { Crash::Kill };
            self.disk.restart(crash);
        }
        self.check_start()
    }

    /// The process has opened the directory; `Some` if it dies over the first initialization.
    fn begin_life(&mut self, opened: Opened) -> Result<Option<StoreError>, String> {
        let Opened { shared, scanner, has_reserve, notes, .. } = opened;
        let mut wal_writer = WalWriter::new(shared.clone(), None, scanner);
        if shared.identity.get().is_none() {
            if let Some(claimed) = *self.seen.flushed.lock() {
                return Err(format!("the store was forgotten, after {claimed} was acknowledged"));
            }
            let context = self.truth.wal.context();
            let identity =
                Identity { system_id: context.system_id.unwrap(), segment_size: context.segment_size };
            if let Err(error) = wal_writer.initialize(identity, TimelineId::FIRST, self.truth.wal.start()) {
                return Ok(Some(error));
            }
        }
        // By what is at hand: one more random choice would change every life that is known by its seed.
        let access = if self.blocks.is_multiple_of(2) { Access::Mapped } else { Access::Copied };
        self.live = Some(Live {
            wal_writer,
            writer: Writer::new(shared.clone()),
            syncer: Syncer::new(shared.clone()),
            keeper: Keeper::new(shared.clone(), has_reserve),
            job: None,
            is_connected: false,
            reader: WalReader::new(shared.clone(), TimelineId::FIRST, access),
            notes,
            shared,
        });
        Ok(None)
    }

    pub(super) fn deliver(&mut self) -> Checked {
        let primary_end = self.primary_end();
        let Some(live) = &mut self.live else { return Ok(()) };
        if !live.is_connected {
            let plan = live.wal_writer.plan().ok_or("nothing to resume from")?;
            let start = match plan.fallback {
                // Where there is something to be proved, the upstream has the WAL for it.
                Some(fallback) if self.random.is_one_in(3) && plan.unproven.is_none() => fallback,
                _ => plan.start,
            };
            match live.wal_writer.begin(start) {
                Ok(()) => live.is_connected = true,
                Err(StoreError::Failed(_)) => {}
                Err(error) => return Err(format!("cannot begin at {start}: {error}")),
            }
            return Ok(());
        }
        let at = live.wal_writer.received();
        if at >= primary_end || !live.wal_writer.has_room() {
            return Ok(());
        }
        let most = [100, 9000, 300_000][self.random.below_len(3)];
        let end = at.advance(1 + self.random.below(most)).min(primary_end);
        let mut bytes = self.truth.wal.slice(at, end).to_vec();
        let flip = self.random.below_len(bytes.len());
        let is_flipped = self.random.per_mille(20) && self.truth.is_covered(at.advance(flip as u64));
        if is_flipped {
            bytes[flip] ^= 1 << self.random.below(8);
        }
        self.blocks += 1;
        let before = live.shared.positions().map_err(|error| error.to_string())?.verified;
        match live.wal_writer.append(at, Bytes::from(bytes), BlockId(self.blocks / 3)) {
            Ok(()) => {}
            Err(
                error @ (AppendError::Corrupt(_)
                | AppendError::TooMuchToReplace { .. }
                | AppendError::Store(StoreError::Failed(_) | StoreError::Io { .. })),
            ) => {
                live.is_connected = false;
                self.last_error = format!("{error:?}");
            }
            Err(error) => return Err(format!("not taken at {at}, verified {before}: {error:?}")),
        }
        if is_flipped {
            // The connection that flips bits is given up at last.
            live.is_connected = false;
        }
        Ok(())
    }

    fn read_somewhere(&mut self) -> Checked {
        let Some(live) = &mut self.live else { return Ok(()) };
        let (Some(oldest), Ok(positions)) = (live.shared.oldest(), live.shared.positions()) else {
            return Ok(());
        };
        let held = positions.verified.bytes_since(oldest);
        if held == 0 {
            return Ok(());
        }
        let start = oldest.advance(self.random.below(held));
        let end = start.advance(1 + self.random.below(200_000)).min(positions.verified);
        let right = *self.seen.right.lock();
        live.check_range(self.truth, right, start, end)
    }

    fn use_slots(&mut self) -> Checked {
        let name = ["a", "b"][self.random.below_len(2)];
        let Some(live) = &self.live else { return Ok(()) };
        let (Some(oldest), Ok(positions)) = (live.shared.oldest(), live.shared.positions()) else {
            return Ok(());
        };
        let table = &live.shared.slots;
        if table.get(name).is_none() {
            let created = table.create(name, SlotKind::Permanent, Some(oldest));
            self.slots.insert(name.to_owned(), created.is_ok().then_some(()));
        } else if self.random.is_one_in(4) {
            let known = if table.drop_slot(name, 1).is_ok() { self.slots.remove(name) } else { None };
            if known.is_none() {
                self.slots.insert(name.to_owned(), None);
            }
        } else if let Ok(guard) = table.acquire(name, 1, WhenInvalid::Refuse) {
            let now = table.get(name).and_then(|slot| slot.restart_lsn).unwrap_or(oldest).max(oldest);
            let ahead = positions.flushed.bytes_since(now);
            guard.advance(now.advance(self.random.below(ahead + 1)));
        }
        Ok(())
    }

    /// All is well again: everything arrives, is durable, and can be read.
    pub(super) fn converge(&mut self) -> Checked {
        self.heal();
        self.crash(Crash::Kill)?;
        self.settle()
    }

    /// Works until there is nothing more to do.
    pub(super) fn settle(&mut self) -> Checked {
        for _ in 0..100_000 {
            if self.is_dead() {
                self.crash(Crash::Kill)?;
            }
            let primary_end = self.primary_end();
            self.deliver()?;
            let Some(live) = &mut self.live else { return Err("no process".to_owned()) };
            live.wal_writer.submit();
            let is_written = live.writer.step() == Step::Idle;
            let job = live.job.take().or_else(|| live.syncer.take());
            let is_synced = job.map(|job| live.syncer.run(&job)).is_none();
            self.now += Duration::from_secs(11);
            let is_kept = live.keeper.step(self.now) == Step::Idle;
            let positions = live.shared.positions().map_err(|error| error.to_string())?;
            let is_healthy = !live.shared.health.has_failed();
            let is_proved = live.shared.unproven.is_empty();
            let is_idle = is_written && is_synced && is_kept && is_proved;
            if is_healthy && is_idle && positions.flushed == primary_end {
                if live.shared.health.condition() != Condition::Healthy {
                    return Err(format!("not healthy: {:?}", live.shared.health.condition()));
                }
                self.check_claims()?;
                return self.check_content();
            }
        }
        let live = self.live.as_ref().map(|live| {
            (
                live.shared.positions(),
                live.wal_writer.received(),
                live.wal_writer.has_room(),
                live.is_connected,
            )
        });
        Err(format!("does not converge to {}: {live:?}, {}", self.primary_end(), self.last_error))
    }

    fn is_dead(&self) -> bool {
        self.disk.has_crashed() || self.live.as_ref().is_none_or(|live| live.shared.health.has_failed())
    }

    fn check_claims(&self) -> Checked {
        if let Some(broken) = self.seen.broken.lock().clone() {
            return Err(broken);
        }
        let Some(live) = &self.live else { return Ok(()) };
        let Ok(positions) = live.shared.positions() else { return Ok(()) };
        let Positions { verified, written, flushed, .. } = positions;
        if flushed > written || written > verified {
            return Err(format!("out of order: {positions:?}"));
        }
        for claimed in [verified, written, flushed] {
            if !self.truth.safe_ends.contains(&claimed) {
                return Err(format!("claims {claimed}, where no stream may be cut: {positions:?}"));
            }
        }
        if live.shared.unproven.is_empty() {
            let mut right = self.seen.right.lock();
            *right = (*right).max(Some(flushed));
        }
        let (needed, oldest) = (live.shared.slots.oldest_needed(), live.shared.oldest());
        if needed.is_some() && needed < oldest {
            return Err(format!("a slot needs {needed:?}, the oldest held is {oldest:?}"));
        }
        Ok(())
    }

    fn is_untouched(&self) -> bool {
        !self.disk.paths().iter().any(|path| path.to_string_lossy().contains(".detached"))
    }

    fn check_start(&mut self) -> Checked {
        let claimed = *self.seen.flushed.lock();
        let Some(live) = &mut self.live else { return Err("no process".to_owned()) };
        let positions = live.shared.positions().map_err(|error| error.to_string())?;
        if claimed.is_some_and(|claimed| positions.flushed < claimed) {
            return Err(format!("{claimed:?} was acknowledged, {positions:?} is left"));
        }
        if let Some(note) = live.notes.iter().find(|note| note.contains("the slot is lost")) {
            return Err(note.clone());
        }
        // What is reported from now on counts.
        self.seen.positions_changed(positions);
        for (name, known) in &mut self.slots {
            match (&known, live.shared.slots.get(name)) {
                (Some(()), None) => return Err(format!("slot {name} is lost")),
                (None, Some(_)) => *known = Some(()),
                _ => {}
            }
        }
        self.slots.retain(|_, known| known.is_some());
        self.check_content()?;
        self.check_claims()
    }

    /// Everything that is held is what the primary wrote.
    fn check_content(&mut self) -> Checked {
        let Some(live) = &mut self.live else { return Err("no process".to_owned()) };
        let positions = live.shared.positions().map_err(|error| error.to_string())?;
        let right = *self.seen.right.lock();
        let faults = self.disk.faults();
        self.disk.set_faults(Faults::default());
        let oldest = live.shared.oldest().ok_or("no oldest segment")?;
        live.check_range(self.truth, right, oldest, positions.flushed)?;
        // Where a test has tampered, there is something to set aside.
        if self.faults_per_mille > 0 || self.is_untouched() {
            check_files(&self.disk, self.truth)?;
        }
        self.disk.set_faults(faults);
        Ok(())
    }
}
