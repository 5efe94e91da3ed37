//! Tests of the slot table, on the real disk.

use std::path::Path;

use super::*;
use crate::store::disk::RealDisk;
use crate::store::health::Observer;
use crate::store::{Condition, Positions};

struct Deaf;

impl Observer for Deaf {
    fn positions_changed(&self, _: Positions) {}
    fn condition_changed(&self, _: Condition) {}
}

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
