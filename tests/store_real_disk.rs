//! The store on the real disk, through its public face: write, seal, read back, restart, refuse.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
#![allow(clippy::disallowed_methods, reason = "looks at the store's files from outside")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use walrelay::store::disk::{DIRECT_READ_BYTES, OpenMode};
use walrelay::store::{
    Access, AppendError, BlockId, Condition, Disk, Identity, Observer, Positions, Read, ReadError, RealDisk,
    RetentionLimits, ServerFacts, SlotKind, Store, StoreError, StoreSettings, WalWriter, WhenInvalid,
};
use walrelay::wal::builder::WalBuilder;
use walrelay::wal::{Lsn, LsnRange, SegmentName, SegmentNo, SegmentSize, SystemId, TimelineId};

use crate::disk::{HookedDisk, Hooks};

#[path = "support/disk.rs"]
mod disk;

#[derive(Default)]
struct Watch {
    positions: Mutex<Option<Positions>>,
    changed: Condvar,
}

impl Observer for Watch {
    fn positions_changed(&self, positions: Positions) {
        *self.positions.lock() = Some(positions);
        self.changed.notify_all();
    }

    fn condition_changed(&self, condition: Condition) {
        panic!("{condition:?}");
    }
}

impl Watch {
    fn wait_until(&self, what: &str, is_so: impl Fn(&Positions) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut positions = self.positions.lock();
        while !positions.as_ref().is_some_and(&is_so) {
            assert!(Instant::now() < deadline, "waited for {what}: {positions:?}");
            self.changed.wait_for(&mut positions, Duration::from_millis(100));
        }
    }
}

struct Opened {
    store: Store,
    writer: WalWriter,
    watch: Arc<Watch>,
}

fn settings(dir: &Path) -> StoreSettings {
    StoreSettings {
        data_dir: dir.join("data"),
        wal_keep_size: 64 << 20,
        tail_bytes_max: 1 << 20,
        unwritten_bytes_max: 8 << 20,
        spare_segments: 2,
        reserve_segments: 1,
        max_replication_slots: 4,
        scrub_interval: None,
        limits: RetentionLimits::default(),
    }
}

fn open_with(settings: StoreSettings) -> Result<Opened, StoreError> {
    open_on(Arc::new(RealDisk), settings)
}

fn open_on(disk: Arc<dyn Disk>, settings: StoreSettings) -> Result<Opened, StoreError> {
    let watch = Arc::new(Watch::default());
    let (store, writer) = walrelay::store::open(settings, disk, watch.clone())?;
    Ok(Opened { store, writer, watch })
}

fn open(dir: &Path) -> Opened {
    open_with(settings(dir)).unwrap()
}

fn identity(wal: &WalBuilder) -> Identity {
    let context = wal.context();
    Identity { system_id: context.system_id.unwrap(), segment_size: context.segment_size }
}

fn fresh(dir: &Path, wal: &WalBuilder) -> Opened {
    let mut opened = open(dir);
    assert_eq!(opened.writer.plan(), None);
    opened.writer.initialize(identity(wal), TimelineId::FIRST, wal.start()).unwrap();
    opened
}

/// Delivers everything from where the store asks to start.
fn deliver(opened: &mut Opened, wal: &WalBuilder) {
    let plan = opened.writer.plan().unwrap();
    opened.writer.begin(plan.start).unwrap();
    let mut block = 0;
    let mut at = plan.start;
    while at < wal.end() {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !opened.writer.has_room() {
            assert!(Instant::now() < deadline, "no room");
            std::thread::sleep(Duration::from_millis(1));
        }
        let end = at.advance(100_000).min(wal.end());
        let bytes = Bytes::copy_from_slice(wal.slice(at, end));
        opened.writer.append(at, bytes, BlockId(block)).unwrap();
        opened.writer.submit();
        block += 1;
        at = end;
    }
    assert!(opened.writer.is_overlap_proven());
}

/// By both ways of reading files, which must agree.
fn read(store: &Store, start: Lsn, end: Lsn) -> Result<Vec<u8>, ReadError> {
    let mapped = read_by(store, Access::Mapped, start, end)?;
    assert!(read_by(store, Access::Copied, start, end)? == mapped, "copied and mapped bytes differ");
    Ok(mapped)
}

fn read_by(store: &Store, access: Access, start: Lsn, end: Lsn) -> Result<Vec<u8>, ReadError> {
    let mut reader = store.reader(TimelineId::FIRST, access);
    let mut all = Vec::new();
    let mut at = start;
    while at < end {
        let to = at.advance(128 << 10).min(end);
        match reader.read(LsnRange::new(at, to).unwrap())? {
            Read::Ready(parts) => {
                all.extend(parts.concat());
                at = to;
            }
            Read::Cold(cold) => cold.load()?,
        }
    }
    Ok(all)
}

fn some_wal(bytes: u64) -> WalBuilder {
    let mut wal = WalBuilder::small();
    while wal.end().bytes_since(wal.start()) < bytes {
        wal.noise(3000);
        wal.noise(17);
        wal.noise(90_000);
    }
    wal
}

fn file_name(wal: &WalBuilder, number: u64) -> String {
    let name = SegmentName { timeline: TimelineId::FIRST, number: SegmentNo(number) };
    name.file_name(wal.context().segment_size)
}

#[test]
fn wal_is_written_sealed_and_read_back_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let wal = some_wal(5 << 20);
    let mut opened = fresh(dir.path(), &wal);
    deliver(&mut opened, &wal);
    let sealed = Lsn::new(wal.end().get() >> 20 << 20);
    opened.watch.wait_until("all", |now| now.flushed == wal.end() && now.sealed == sealed);
    assert_eq!(read(&opened.store, wal.start(), wal.end()).unwrap(), wal.bytes());
    assert!(opened.store.tail_bytes() <= 1 << 20, "{}", opened.store.tail_bytes());
    drop(opened);

    for (number, content) in wal.segments() {
        let path = dir.path().join("data/wal").join(file_name(&wal, number.0));
        if let Ok(file) = std::fs::read(&path) {
            assert_eq!(file, content, "{}", path.display());
        } else {
            assert_eq!(number, SegmentNo::ending_at(wal.end(), wal.context().segment_size));
        }
    }

    let mut again = open(dir.path());
    assert_eq!(again.store.identity(), Some(identity(&wal)));
    assert_eq!(again.store.positions().unwrap().flushed, wal.end());
    assert_eq!(*again.watch.positions.lock(), again.store.positions(), "the observer is told at the start");
    assert_eq!(again.store.recovery_notes(), [""; 0]);
    assert_eq!(read(&again.store, wal.start(), wal.end()).unwrap(), wal.bytes());
    let mut longer = wal.clone();
    longer.noise(2_000_000);
    longer.switch();
    longer.noise(100);
    deliver(&mut again, &longer);
    again.watch.wait_until("the rest", |now| now.flushed == longer.end());
    assert_eq!(read(&again.store, wal.start(), longer.end()).unwrap(), longer.bytes());
}

#[test]
fn old_segments_make_place_for_new_ones_but_not_those_a_slot_needs() {
    let dir = tempfile::tempdir().unwrap();
    let wal = some_wal(12 << 20);
    let mut opened = open_with(StoreSettings { wal_keep_size: 2 << 20, ..settings(dir.path()) }).unwrap();
    opened.writer.initialize(identity(&wal), TimelineId::FIRST, wal.start()).unwrap();
    let needed = wal.start().advance((4 << 20) + 77);
    opened.store.slots().create("standby", SlotKind::Permanent, Some(needed)).unwrap();
    deliver(&mut opened, &wal);
    opened.watch.wait_until("all", |now| now.flushed == wal.end());
    let kept = wal.start().advance(4 << 20);
    let deadline = Instant::now() + Duration::from_secs(20);
    while opened.store.oldest() != Some(kept) {
        assert!(Instant::now() < deadline, "{:?}", opened.store.oldest());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(matches!(read(&opened.store, wal.start(), wal.end()), Err(ReadError::Removed(_))));
    assert_eq!(read(&opened.store, kept, wal.end()).unwrap(), wal.slice(kept, wal.end()));
    drop(opened);
    let names = std::fs::read_dir(dir.path().join("data/wal")).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let spares = names.iter().filter(|name| name.starts_with("walrelay.spare.")).count();
    assert!(spares <= 4, "{names:?}");
    assert!(names.contains(&"walrelay.reserve".to_owned()), "{names:?}");
    let again = open_with(StoreSettings { wal_keep_size: 2 << 20, ..settings(dir.path()) }).unwrap();
    assert_eq!(again.store.oldest(), Some(kept));
    assert_eq!(again.store.slots().get("standby").unwrap().restart_lsn, Some(needed));
}

#[test]
fn a_second_process_and_another_systems_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let wal = some_wal(1 << 20);
    let mut opened = fresh(dir.path(), &wal);
    let error = open_with(settings(dir.path())).err().unwrap();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    deliver(&mut opened, &wal);
    let other = Identity { system_id: SystemId(1), segment_size: SegmentSize::DEFAULT };
    let error = opened.writer.initialize(other, TimelineId::FIRST, wal.start()).unwrap_err();
    assert!(matches!(error, StoreError::Initialized(_)), "{error}");
    drop(opened);

    let data = dir.path().join("data");
    let control = std::fs::read(data.join("walrelay.control")).unwrap();
    std::fs::remove_file(data.join("walrelay.control")).unwrap();
    let error = open_with(settings(dir.path())).err().unwrap();
    assert!(matches!(error, StoreError::ControlMissing { .. }), "{error}");
    let mut damaged = control.clone();
    damaged[30] ^= 1;
    std::fs::write(data.join("walrelay.control"), &damaged).unwrap();
    let error = open_with(settings(dir.path())).err().unwrap();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    let mut newer = control.clone();
    newer[8] = 99;
    std::fs::write(data.join("walrelay.control"), &newer).unwrap();
    let error = open_with(settings(dir.path())).err().unwrap();
    assert!(matches!(error, StoreError::NewerFormat { found: 99, .. }), "{error}");
    std::fs::write(data.join("walrelay.control"), &control).unwrap();
    assert_eq!(open(dir.path()).store.positions().unwrap().flushed, wal.end());
}

#[test]
fn what_is_delivered_again_is_compared_with_what_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let mut wal = some_wal(3 << 20);
    let before = wal.clone();
    let mut opened = fresh(dir.path(), &wal);
    deliver(&mut opened, &wal);
    opened.watch.wait_until("all", |now| now.flushed == wal.end());

    // The same positions, other records.
    let mut fork = WalBuilder::small();
    for length in [40, 500] {
        fork.noise(length);
    }
    while fork.end() < wal.end() {
        fork.noise(7000);
    }
    let start = opened.writer.plan().unwrap().start;
    opened.writer.begin(fork.start()).unwrap();
    assert!(!opened.writer.is_overlap_proven());
    let bytes = Bytes::copy_from_slice(fork.slice(fork.start(), fork.end()));
    let error = opened.writer.append(fork.start(), bytes, BlockId(1)).unwrap_err();
    assert!(matches!(error, AppendError::Diverged { .. }), "{error}");
    assert!(!opened.writer.is_overlap_proven());

    // A bit flipped on the way is corrupt, not divergent.
    opened.writer.begin(start).unwrap();
    let mut flipped = wal.slice(start, wal.end()).to_vec();
    let last = flipped.len() - 20;
    flipped[last] ^= 4;
    let error = opened.writer.append(start, Bytes::from(flipped), BlockId(1)).unwrap_err();
    assert!(matches!(error, AppendError::Corrupt(_)), "{error}");

    // New WAL with a flipped bit: what is before it is kept, what is after it fetched again.
    let good_end = wal.noise(1000).end();
    wal.noise(1000);
    wal.noise(1000);
    opened.writer.begin(start).unwrap();
    let mut flipped = wal.slice(start, wal.end()).to_vec();
    flipped[usize::try_from(good_end.bytes_since(start)).unwrap() + 500] ^= 1;
    let error = opened.writer.append(start, Bytes::from(flipped), BlockId(1)).unwrap_err();
    assert!(matches!(error, AppendError::Corrupt(_)), "{error}");
    assert_eq!(opened.writer.plan().unwrap().held_end, good_end);
    deliver(&mut opened, &wal);
    opened.watch.wait_until("the rest", |now| now.flushed == wal.end());
    assert_eq!(read(&opened.store, before.start(), wal.end()).unwrap(), wal.bytes());
}

#[test]
fn a_gap_is_refused_and_a_start_outside_what_is_held_too() {
    let dir = tempfile::tempdir().unwrap();
    let wal = some_wal(1 << 20);
    let mut opened = fresh(dir.path(), &wal);
    let page = Bytes::copy_from_slice(wal.slice(wal.start(), wal.start().advance(8192)));
    opened.writer.begin(wal.start()).unwrap();
    let error = opened.writer.append(wal.start().advance(8), page, BlockId(1)).unwrap_err();
    assert!(matches!(error, AppendError::Gap { expected, .. } if expected == wal.start()), "{error}");
    for start in [wal.start().advance(8), Lsn::MIN] {
        assert!(matches!(opened.writer.begin(start), Err(StoreError::BadStart { .. })));
    }
}

#[test]
fn a_flipped_byte_in_a_complete_segment_is_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let wal = some_wal(4 << 20);
    let mut opened = fresh(dir.path(), &wal);
    deliver(&mut opened, &wal);
    opened.watch.wait_until("all", |now| now.flushed == wal.end() && now.sealed.is_some());
    drop(opened);
    let path = dir.path().join("data/wal").join(file_name(&wal, 2));
    let mut content = std::fs::read(&path).unwrap();
    content[500_000] ^= 1;
    std::fs::write(&path, &content).unwrap();
    let again = open(dir.path());
    let second = wal.start().advance(1 << 20);
    let error = read(&again.store, wal.start(), wal.end()).unwrap_err();
    assert!(matches!(error, ReadError::Suspect { name, .. } if name.number == SegmentNo(2)), "{error}");
    let third = second.advance(1 << 20);
    assert_eq!(read(&again.store, third, wal.end()).unwrap(), wal.slice(third, wal.end()));
    assert_eq!(read(&again.store, wal.start(), second).unwrap(), wal.slice(wal.start(), second));
}

#[test]
fn histories_and_facts_are_durable_and_a_history_never_changes() {
    let dir = tempfile::tempdir().unwrap();
    let wal = some_wal(1 << 20);
    let opened = fresh(dir.path(), &wal);
    let two = TimelineId::new(2).unwrap();
    let facts =
        ServerFacts { version: "15.18".to_owned(), version_num: 150_018, settings: BTreeMap::default() };
    assert_eq!(opened.store.history(two).unwrap(), None);
    opened.store.store_history(two, b"1\t0/100\treason\n").unwrap();
    opened.store.store_history(two, b"1\t0/100\treason\n").unwrap();
    let error = opened.store.store_history(two, b"1\t0/200\treason\n").unwrap_err();
    assert!(matches!(error, StoreError::OtherHistory(_)), "{error}");
    opened.store.remember_facts(facts.clone()).unwrap();
    drop(opened);
    let again = open(dir.path());
    assert_eq!(again.store.history(two).unwrap().unwrap(), b"1\t0/100\treason\n");
    assert_eq!(again.store.facts(), Some(facts));
}

#[test]
fn bytes_in_the_hands_of_a_reader_do_not_change_when_their_segment_goes() {
    let dir = tempfile::tempdir().unwrap();
    let wal = some_wal(14 << 20);
    let mut opened = open_with(StoreSettings { wal_keep_size: 1 << 20, ..settings(dir.path()) }).unwrap();
    opened.writer.initialize(identity(&wal), TimelineId::FIRST, wal.start()).unwrap();
    opened.store.slots().create("reader", SlotKind::Permanent, Some(wal.start())).unwrap();
    deliver(&mut opened, &wal);
    opened.watch.wait_until("all", |now| now.flushed == wal.end());
    let mut reader = opened.store.reader(TimelineId::FIRST, Access::Mapped);
    let mut held = Vec::new();
    for segment in 0..3 {
        let start = wal.start().advance(segment << 20);
        let range = LsnRange::new(start, start.advance(100_000)).unwrap();
        held.push(loop {
            match reader.read(range).unwrap() {
                Read::Ready(parts) => break (range, parts),
                Read::Cold(cold) => cold.load().unwrap(),
            }
        });
    }
    drop(reader);
    opened.store.slots().drop_slot("reader", 1).unwrap();
    let mut longer = wal.clone();
    while longer.end().bytes_since(wal.end()) < 6 << 20 {
        longer.noise(90_000);
    }
    deliver(&mut opened, &longer);
    opened.watch.wait_until("the rest", |now| now.flushed == longer.end());
    let deadline = Instant::now() + Duration::from_secs(20);
    while opened.store.oldest() < Some(wal.start().advance(10 << 20)) {
        assert!(Instant::now() < deadline, "the segments do not go: {:?}", opened.store.oldest());
        std::thread::sleep(Duration::from_millis(5));
    }
    for (range, parts) in held {
        assert_eq!(parts.concat(), wal.slice(range.start(), range.end()), "{range:?}");
    }
}

#[test]
fn at_a_segment_boundary_the_first_record_proves_that_it_continues_ours() {
    let dir = tempfile::tempdir().unwrap();
    let mut wal = some_wal(1 << 19);
    wal.noise_up_to(wal.start().advance(1 << 20));
    let mut opened = fresh(dir.path(), &wal);
    deliver(&mut opened, &wal);
    opened.watch.wait_until("all", |now| now.flushed == wal.end());
    let plan = opened.writer.plan().unwrap();
    assert_eq!((plan.held_end, plan.fallback), (wal.end(), Some(wal.end())));
    assert!(plan.start < wal.end() && plan.start >= wal.start());

    let mut other = WalBuilder::new(
        wal.context().format.unwrap_or(walrelay::wal::WalFormat::V15),
        wal.context().system_id.unwrap(),
        wal.context().segment_size,
        TimelineId::FIRST,
        wal.end(),
    )
    .after(Lsn::new(wal.end().get() - 4096).unwrap());
    other.noise(500);
    opened.writer.begin(wal.end()).unwrap();
    assert!(!opened.writer.is_overlap_proven());
    let bytes = Bytes::copy_from_slice(other.bytes());
    let error = opened.writer.append(wal.end(), bytes, BlockId(1)).unwrap_err();
    assert!(matches!(error, AppendError::Corrupt(_)), "{error}");
    assert!(!opened.writer.is_overlap_proven());

    let boundary = wal.end();
    wal.noise(500);
    opened.writer.begin(boundary).unwrap();
    let bytes = Bytes::copy_from_slice(wal.slice(boundary, wal.end()));
    opened.writer.append(boundary, bytes, BlockId(2)).unwrap();
    assert!(opened.writer.is_overlap_proven());
}

/// Whoever replaces the file of the slots is held up by this, once.
#[derive(Default)]
struct HoldUp(Mutex<Option<Box<dyn Fn() + Send>>>);

impl Hooks for HoldUp {
    fn before_rename(&self, to: &Path) {
        if to.ends_with("walrelay.slots")
            && let Some(hold_up) = self.0.lock().take()
        {
            hold_up();
        }
    }
}

#[test]
fn what_a_new_slot_is_promised_does_not_go_while_the_slot_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let wal = some_wal(8 << 20);
    let slots = Arc::new(HoldUp::default());
    let settings = StoreSettings { wal_keep_size: 1 << 20, ..settings(dir.path()) };
    let mut opened = open_on(Arc::new(HookedDisk(slots.clone())), settings).unwrap();
    opened.writer.initialize(identity(&wal), TimelineId::FIRST, wal.start()).unwrap();
    opened.store.create_slot("early", SlotKind::Temporary { owner: 1 }, true).unwrap();
    deliver(&mut opened, &wal);
    opened.watch.wait_until("all", |now| {
        now.flushed == wal.end() && now.sealed >= Some(wal.start().advance(6 << 20))
    });
    // Nobody else needs the oldest segments any more, just when the new slot is written down.
    let store = opened.store.clone();
    let (oldest, early) = (store.oldest(), store.slots().acquire("early", 1, WhenInvalid::Use).unwrap());
    *slots.0.lock() = Some(Box::new(move || {
        early.advance(wal.end());
        let deadline = Instant::now() + Duration::from_secs(3);
        while store.oldest() == oldest && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }));
    opened.store.create_slot("late", SlotKind::Permanent, true).unwrap();
    let promised = opened.store.slots().get("late").unwrap().restart_lsn;
    assert_eq!((promised, opened.store.oldest()), (oldest, oldest), "the slot points at WAL that is gone");
}

/// Counts what is touched of mapped memory.
#[derive(Default)]
struct Touched(AtomicUsize);

impl Hooks for Touched {
    fn before_slice(&self, _range: &std::ops::Range<usize>) {
        self.0.fetch_add(1, Relaxed);
    }
}

#[test]
fn a_checksum_is_computed_without_touching_mapped_memory() {
    let dir = tempfile::tempdir().unwrap();
    let wal = some_wal(3 << 20);
    let mut opened = fresh(dir.path(), &wal);
    deliver(&mut opened, &wal);
    opened.watch.wait_until("all", |now| now.flushed == wal.end() && now.sealed.is_some());
    drop(opened);
    // Where a disk fails then, that would be a signal: the end of the process.
    let touched = Arc::new(Touched::default());
    let opened = open_on(Arc::new(HookedDisk(touched.clone())), settings(dir.path())).unwrap();
    let mut reader = opened.store.reader(TimelineId::FIRST, Access::Mapped);
    let range = LsnRange::new(wal.start(), wal.start().advance(8192)).unwrap();
    let Read::Cold(cold) = reader.read(range).unwrap() else { panic!("nothing was compared yet") };
    cold.load().unwrap();
    assert_eq!(touched.0.load(Relaxed), 0);
    assert!(matches!(reader.read(range).unwrap(), Read::Ready(_)));
    assert_ne!(touched.0.load(Relaxed), 0);
}

/// The disk does not answer who reads from it alone.
#[derive(Default)]
struct Stalled {
    state: Mutex<Stall>,
    changed: Condvar,
}

#[derive(Default)]
struct Stall {
    is_met: bool,
    is_over: bool,
}

impl Hooks for Stalled {
    fn before_direct_read(&self) {
        let mut state = self.state.lock();
        state.is_met = true;
        self.changed.notify_all();
        self.changed.wait_while(&mut state, |state| !state.is_over);
    }
}

#[test]
fn a_stop_does_not_wait_for_a_disk_that_does_not_answer_the_scrubber() {
    let dir = tempfile::tempdir().unwrap();
    let wal = some_wal(3 << 20);
    let mut opened = fresh(dir.path(), &wal);
    deliver(&mut opened, &wal);
    opened.watch.wait_until("all", |now| now.flushed == wal.end() && now.sealed.is_some());
    drop(opened);
    let stalled = Arc::new(Stalled::default());
    let settings = StoreSettings { scrub_interval: Some(Duration::from_secs(1)), ..settings(dir.path()) };
    let opened = open_on(Arc::new(HookedDisk(stalled.clone())), settings).unwrap();
    stalled.changed.wait_while(&mut stalled.state.lock(), |state| !state.is_met);
    let (stopped, has_stopped) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        opened.store.shutdown();
        drop(opened);
        stopped.send(()).unwrap();
    });
    let in_time = has_stopped.recv_timeout(Duration::from_secs(10));
    stalled.state.lock().is_over = true;
    stalled.changed.notify_all();
    in_time.expect("the stop waits for the scrubber");
}

#[test]
fn what_is_read_from_the_disk_is_not_what_the_system_remembers_and_does_not_change_that() {
    const BYTES: usize = 1 << 20;
    // Where files are memory there is nothing else to read.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("file");
    let file = RealDisk.open(&path, OpenMode::CreateNew).unwrap();
    let content: Vec<u8> = (0..=u8::MAX).cycle().take(BYTES).collect();
    file.write_at(&[std::io::IoSlice::new(&content)], 0).unwrap();
    file.sync().unwrap();
    let mapping = RealDisk.map(&path, BYTES as u64).unwrap();
    let is_resident = || mapping.is_resident(0..BYTES);
    assert!(is_resident(), "it was just written");
    let mut buffer = vec![0; BYTES + DIRECT_READ_BYTES];
    let start = buffer.as_ptr().align_offset(DIRECT_READ_BYTES);
    let mut read_whole = || {
        let buffer = &mut buffer[start..start + BYTES];
        buffer.fill(0);
        let again = RealDisk.open(&path, OpenMode::ReadFromDisk).unwrap();
        assert_eq!(again.read_at(buffer, 0).unwrap(), BYTES);
        buffer == content
    };
    assert!(read_whole());
    assert!(is_resident(), "somebody may just be sending it");
    let forget = std::fs::File::open(&path).unwrap();
    rustix::fs::fadvise(&forget, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    assert!(!is_resident());
    assert!(read_whole());
    assert!(!is_resident(), "it was read by way of the memory");
    // What no disk can give like this is given nevertheless.
    let again = RealDisk.open(&path, OpenMode::ReadFromDisk).unwrap();
    let mut odd = vec![0; 1001];
    assert_eq!(again.read_at(&mut odd, 513).unwrap(), odd.len());
    assert_eq!(odd, content[513..513 + 1001]);
}
