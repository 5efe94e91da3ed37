//! Tests of the slot table, on the real disk.

use std::path::Path;

use super::*;
use crate::protocol::feedback::Feedback;
use crate::store::disk::RealDisk;
use crate::store::small::Deaf;
use crate::wal::FullXid;

fn table(dir: &Path) -> SlotTable {
    let health = Arc::new(Health::new(Arc::new(Deaf)));
    SlotTable::open(Arc::new(RealDisk), Layout::new(dir), health, 3).unwrap()
}

fn at(raw: u64) -> Lsn {
    Lsn::new(raw).unwrap()
}

#[test]
fn permanent_slots_survive_a_restart_and_temporary_ones_end_with_their_session() {
    let dir = tempfile::tempdir().unwrap();
    let slots = table(dir.path());
    slots.create("a", SlotKind::Permanent, Some(at(5))).unwrap();
    slots.create("b", SlotKind::Temporary { owner: 7 }, None).unwrap();
    slots.create("c", SlotKind::Permanent, None).unwrap();
    slots.drop_slot("c", 1).unwrap();
    assert_eq!(slots.list().len(), 2);
    slots.drop_temporary(8);
    assert!(slots.get("b").is_some());
    slots.drop_temporary(7);
    assert!(slots.get("b").is_none());

    let slots = table(dir.path());
    let inactive_since = slots.get("a").unwrap().inactive_since;
    assert!(inactive_since.is_some());
    let a = SlotInfo {
        name: "a".to_owned(),
        kind: SlotKind::Permanent,
        restart_lsn: Some(at(5)),
        active_pid: None,
        invalidation: None,
        feedback: Feedback::default(),
        inactive_since,
    };
    assert_eq!(slots.list(), [a]);
}

#[test]
fn what_is_asked_wrongly_is_refused_in_postgresqls_words() {
    let dir = tempfile::tempdir().unwrap();
    let slots = table(dir.path());
    for name in ["", "A", "a-b", "ä", &"x".repeat(64)] {
        assert!(matches!(slots.create(name, SlotKind::Permanent, None), Err(SlotError::InvalidName(_))));
    }
    slots.create("a", SlotKind::Permanent, None).unwrap();
    let error = slots.create("a", SlotKind::Permanent, None).unwrap_err();
    assert_eq!(error.to_string(), "replication slot \"a\" already exists");
    let error = slots.drop_slot("b", 1).unwrap_err();
    assert_eq!(error.to_string(), "replication slot \"b\" does not exist");
    let _guard = slots.acquire("a", 12, WhenInvalid::Use).unwrap();
    let error = slots.acquire("a", 13, WhenInvalid::Use).err().unwrap();
    assert_eq!(error.to_string(), "replication slot \"a\" is active for PID 12");
    assert!(matches!(slots.drop_slot("a", 13), Err(SlotError::Active { pid: 12, .. })));
    slots.create("t", SlotKind::Temporary { owner: 12 }, None).unwrap();
    assert!(matches!(slots.acquire("t", 13, WhenInvalid::Use), Err(SlotError::Active { pid: 12, .. })));
    slots.create("u", SlotKind::Permanent, None).unwrap();
    assert!(matches!(slots.create("v", SlotKind::Permanent, None), Err(SlotError::Full)));
}

#[test]
fn a_guard_of_an_earlier_slot_does_not_touch_its_namesake() {
    let dir = tempfile::tempdir().unwrap();
    let slots = table(dir.path());
    slots.create("t", SlotKind::Temporary { owner: 1 }, None).unwrap();
    let old = slots.acquire("t", 1, WhenInvalid::Use).unwrap();
    slots.drop_temporary(1);
    slots.create("t", SlotKind::Permanent, None).unwrap();
    let new = slots.acquire("t", 2, WhenInvalid::Use).unwrap();
    old.advance(at(9));
    drop(old);
    assert_eq!(slots.get("t").unwrap().active_pid, Some(2));
    assert_eq!(slots.get("t").unwrap().restart_lsn, None);
    drop(new);
    assert_eq!(slots.get("t").unwrap().active_pid, None);
}

#[test]
fn retention_goes_by_what_a_crash_would_leave() {
    let dir = tempfile::tempdir().unwrap();
    let size = SegmentSize::new(1 << 20).unwrap();
    let slots = table(dir.path());
    slots.create("a", SlotKind::Permanent, None).unwrap();
    assert_eq!(slots.oldest_needed(), None);
    let guard = slots.acquire("a", 1, WhenInvalid::Use).unwrap();
    guard.advance(at(0x10_0008));
    assert_eq!(
        slots.oldest_needed(),
        Some(at(0x10_0008)),
        "a crash would leave nothing, the consumer needs it"
    );
    let start = Instant::now();
    slots.save_if_due(start, size).unwrap();
    guard.advance(at(0x10_0100));
    slots.save_if_due(start + Duration::from_secs(1), size).unwrap();
    assert_eq!(slots.oldest_needed(), Some(at(0x10_0008)), "not saved yet");
    guard.advance(at(0x20_0100));
    slots.save_if_due(start + Duration::from_secs(2), size).unwrap();
    assert_eq!(slots.oldest_needed(), Some(at(0x20_0100)), "saved because a segment was passed");
    guard.advance(at(0x18_0000));
    assert_eq!(slots.oldest_needed(), Some(at(0x18_0000)), "set back");
    slots.save_if_due(start + Duration::from_secs(13), size).unwrap();
    assert_eq!(table(dir.path()).get("a").unwrap().restart_lsn, Some(at(0x18_0000)));
}

#[test]
fn slots_are_settled_within_what_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let slots = table(dir.path());
    let held_back = Feedback { xmin: Some(FullXid(700)), catalog_xmin: None };
    for (name, restart_lsn) in [("behind", 99), ("at", 100), ("ahead", 501)] {
        slots.create(name, SlotKind::Permanent, Some(at(restart_lsn))).unwrap();
        slots.acquire(name, 1, WhenInvalid::Use).unwrap().note_feedback(held_back, None);
    }
    slots.save_now().unwrap();

    let slots = table(dir.path());
    let notes = slots.settle(at(100), at(500));
    let told = "replication slot \"behind\" needs WAL from 0/63 on, and what is held begins at 0/64: the slot is lost";
    assert_eq!(notes, [told]);
    let seen = |name| slots.get(name).map(|slot| (slot.restart_lsn, slot.invalidation)).unwrap();
    assert_eq!(seen("behind"), (None, Some(InvalidationReason::WalRemoved)));
    assert_eq!(seen("at"), (Some(at(100)), None));
    assert_eq!(seen("ahead"), (Some(at(500)), None), "it may need what comes next");
    assert_eq!(slots.get("behind").unwrap().feedback, Feedback::default());
    assert_eq!(slots.oldest_needed(), Some(at(99)), "the file says that it needs WAL");
    slots.save_now().unwrap();
    assert_eq!(slots.oldest_needed(), Some(at(100)));
    assert!(table(dir.path()).settle(at(100), at(500)).is_empty(), "it was told");
}

fn given(
    name: &'static str,
    reason: InvalidationReason,
) -> impl Fn(&str, &SlotPosition) -> Option<InvalidationReason> {
    move |slot, position| (slot == name && position.invalidation.is_none()).then_some(reason)
}

#[test]
fn an_invalid_slot_is_invalid_on_the_disk_before_it_keeps_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (slots, now) = (table(dir.path()), Instant::now());
    slots.create("a", SlotKind::Permanent, Some(at(5))).unwrap();
    slots.create("b", SlotKind::Permanent, Some(at(7))).unwrap();
    let enforced = slots.enforce(now, given("a", InvalidationReason::WalRemoved)).unwrap();
    assert_eq!((enforced.invalidated.len(), enforced.is_pending), (1, false));
    assert_eq!(slots.oldest_needed(), Some(at(7)));
    slots.enforce(now, given("b", InvalidationReason::IdleTimeout)).unwrap();
    assert_eq!(slots.oldest_needed(), None);
    assert!(slots.enforce(now, given("a", InvalidationReason::WalRemoved)).unwrap().invalidated.is_empty());

    let slots = table(dir.path());
    let seen = |name| slots.get(name).map(|slot| (slot.restart_lsn, slot.invalidation)).unwrap();
    assert_eq!(seen("a"), (None, Some(InvalidationReason::WalRemoved)));
    assert_eq!(seen("b"), (Some(at(7)), Some(InvalidationReason::IdleTimeout)));
    assert_eq!(slots.oldest_needed(), None);
    slots.drop_slot("a", 1).unwrap();
}

#[test]
fn a_slot_in_use_is_taken_when_its_session_was_told_once_and_has_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (slots, now) = (table(dir.path()), Instant::now());
    let told = Arc::new(Mutex::new(Vec::new()));
    let list = told.clone();
    slots.terminate_by(move |pid| list.lock().push(pid));
    slots.create("a", SlotKind::Permanent, Some(at(5))).unwrap();
    let guard = slots.acquire("a", 12, WhenInvalid::Refuse).unwrap();
    let enforce = || slots.enforce(now, given("a", InvalidationReason::WalRemoved)).unwrap();
    for _ in 0..3 {
        let enforced = enforce();
        assert!(enforced.invalidated.is_empty() && enforced.is_pending);
        assert_eq!(slots.oldest_needed(), Some(at(5)), "its WAL stays");
    }
    assert_eq!(*told.lock(), [12]);
    drop(guard);
    assert_eq!(enforce().invalidated.len(), 1);
}

#[test]
fn a_temporary_slot_is_idle_while_its_session_streams_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (slots, now) = (table(dir.path()), Instant::now());
    let told = Arc::new(Mutex::new(Vec::new()));
    let list = told.clone();
    slots.terminate_by(move |pid| list.lock().push(pid));
    slots.create("t", SlotKind::Temporary { owner: 7 }, Some(at(5))).unwrap();
    let idle = |later: u64| {
        slots.note_idle(now + Duration::from_secs(later));
        slots.positions(now + Duration::from_secs(later))[0].1.idle
    };
    assert_eq!(idle(0), Some(Duration::ZERO));
    let seen = slots.get("t").unwrap();
    assert!(seen.active_pid == Some(7) && seen.inactive_since.is_some(), "{seen:?}");
    let guard = slots.acquire("t", 7, WhenInvalid::Refuse).unwrap();
    assert_eq!(idle(30), None);
    assert_eq!(slots.get("t").unwrap().inactive_since, None);
    drop(guard);
    assert_eq!((idle(40), idle(100)), (Some(Duration::ZERO), Some(Duration::from_secs(60))));
    // It goes with its session, which is told to end.
    let enforced = slots.enforce(now, given("t", InvalidationReason::IdleTimeout)).unwrap();
    assert!(enforced.is_pending && enforced.invalidated.is_empty());
    assert_eq!(*told.lock(), [7]);
    slots.drop_temporary(7);
    assert!(!slots.enforce(now, given("t", InvalidationReason::IdleTimeout)).unwrap().is_pending);
}

#[test]
fn what_may_be_done_with_an_invalid_slot_is_as_the_version_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let (slots, now) = (table(dir.path()), Instant::now());
    slots.create("a", SlotKind::Permanent, Some(at(5))).unwrap();
    slots.enforce(now, given("a", InvalidationReason::WalRemoved)).unwrap();
    let error = slots.acquire("a", 1, WhenInvalid::Refuse).err().unwrap();
    assert_eq!(error.to_string(), "can no longer access replication slot \"a\"");
    assert!(slots.get("a").unwrap().active_pid.is_none());
    slots.acquire("a", 1, WhenInvalid::Use).unwrap().advance(at(8));
    let slot = slots.get("a").unwrap();
    assert_eq!((slot.restart_lsn, slots.oldest_needed()), (Some(at(8)), None));
    slots.acquire("a", 1, WhenInvalid::Revive).unwrap().advance(at(9));
    assert_eq!((slots.get("a").unwrap().invalidation, slots.oldest_needed()), (None, Some(at(9))));
    slots.save_now().unwrap();
    assert_eq!(table(dir.path()).oldest_needed(), Some(at(9)));
}

#[test]
fn a_file_of_the_first_version_is_read() {
    #[derive(serde::Serialize)]
    struct FirstVersion {
        name: &'static str,
        restart_lsn: Option<Lsn>,
    }
    let dir = tempfile::tempdir().unwrap();
    let file = crate::store::state::StateFile { version: 1, ..SLOTS_FILE };
    file.write(&RealDisk, dir.path(), &[FirstVersion { name: "old", restart_lsn: Some(at(5)) }]).unwrap();
    let slot = table(dir.path()).get("old").unwrap();
    assert_eq!((slot.restart_lsn, slot.invalidation), (Some(at(5)), None));
}

#[test]
fn what_a_consumer_holds_back_outlives_its_session_and_the_process_but_not_the_slot() {
    let dir = tempfile::tempdir().unwrap();
    let held = |xmin: u64| Feedback { xmin: Some(FullXid(xmin)), catalog_xmin: None };
    {
        let slots = table(dir.path());
        for (name, xmin) in [("a", 700), ("b", 800)] {
            slots.create(name, SlotKind::Permanent, Some(at(5))).unwrap();
            let guard = slots.acquire(name, 1, WhenInvalid::Refuse).unwrap();
            guard.note_feedback(held(xmin), None);
            guard.note_feedback(held(xmin - 1), None);
        }
        assert_eq!(slots.feedback(None), held(700), "it goes forward only");
        slots.save_now().unwrap();
    }
    let slots = table(dir.path());
    assert_eq!(slots.feedback(None), held(700));
    let lost = |name: &str, _: &SlotPosition| (name == "a").then_some(InvalidationReason::WalRemoved);
    slots.enforce(Instant::now(), lost).unwrap();
    assert_eq!(slots.feedback(None), held(800));
    slots.drop_slot("b", 1).unwrap();
    assert_eq!(slots.feedback(None), Feedback::default());
    drop(slots);
    assert_eq!(table(dir.path()).feedback(None), Feedback::default());
}

#[test]
fn what_cannot_be_true_is_neither_told_nor_in_the_way_once_that_shows() {
    let dir = tempfile::tempdir().unwrap();
    let held = |xmin: u64| Feedback { xmin: Some(FullXid(xmin)), catalog_xmin: None };
    let slots = table(dir.path());
    let guards = ["a", "b"].map(|name| {
        slots.create(name, SlotKind::Permanent, Some(at(5))).unwrap();
        slots.acquire(name, 1, WhenInvalid::Refuse).unwrap()
    });
    // Nobody knew better.
    guards[0].note_feedback(held(1_000_000), None);
    guards[1].note_feedback(held(700), None);
    let next = Some(FullXid(900));
    assert_eq!(slots.feedback(next), held(700));
    guards[1].note_feedback(Feedback::default(), next);
    assert_eq!(slots.feedback(next), Feedback::default());
    guards[0].note_feedback(held(800), next);
    assert_eq!(slots.feedback(next), held(800), "a slot only goes forward, but not from what never was");
}
