//! The rules of slots against a model that asks of every single segment whether somebody keeps it.

use proptest::prelude::*;

use super::*;

const MB: u64 = 1 << 20;

fn limits(wal_keep: u64, slot_keep: Option<u64>, max_wal: u64) -> SlotLimits {
    let idle_timeout = Some(Duration::from_secs(60));
    SlotLimits {
        size: SegmentSize::new(MB).unwrap(),
        wal_keep,
        slot_keep,
        max_wal,
        idle_timeout,
        places: None,
    }
}

fn at(raw: u64) -> Lsn {
    Lsn::new(raw).unwrap()
}

fn slot(restart_lsn: Option<Lsn>) -> SlotPosition {
    SlotPosition { restart_lsn, invalidation: None, is_active: false, idle: Some(Duration::ZERO) }
}

/// Whether somebody keeps a segment: the definition, said plainly.
fn is_kept(limits: &SlotLimits, segment: u64, current: u64, needed: Option<Lsn>) -> bool {
    let is_current = segment >= current;
    let by_size = segment >= 1 && current - segment.min(current) <= limits.wal_keep;
    let is_needed = needed.is_some_and(|needed| needed.get() < (segment + 1) * MB);
    let is_allowed = limits.slot_keep.is_none_or(|kept| current - segment.min(current) <= kept);
    is_current || by_size || (is_needed && is_allowed)
}

#[test]
fn a_slot_left_behind_goes_through_all_states() {
    let limits = limits(0, Some(4), 2);
    let slot = slot(Some(at(10 * MB + 5)));
    let mut seen = Vec::new();
    let mut sealed = 9;
    for write in (10 * MB + 5..16 * MB).step_by(usize::try_from(MB / 2).unwrap()) {
        let current = write / MB;
        let held = WalHeld { write: at(write), oldest: SegmentNo(10), needed: slot.restart_lsn };
        if current > sealed + 1 {
            sealed = current - 1;
            assert_eq!(limits.verdict(&slot, limits.oldest_kept(SegmentNo(sealed), held.needed)), None);
        }
        let status = limits.wal_status(&slot, &held).unwrap();
        let safe = limits.safe_wal_size(&slot, &held).unwrap();
        assert_eq!(safe, 15 * i64::try_from(MB).unwrap() - i64::try_from(write).unwrap());
        assert_eq!(safe <= 0, status == WalStatus::Unreserved, "{write}");
        if seen.last() != Some(&(current, status)) {
            seen.push((current, status));
        }
    }
    let (reserved, extended) = (WalStatus::Reserved, WalStatus::Extended);
    let expected = [(10, reserved), (11, reserved), (12, reserved), (13, reserved), (14, extended)];
    assert_eq!(seen, [&expected[..], &[(15, WalStatus::Unreserved)]].concat());
    let kept = limits.oldest_kept(SegmentNo(15), slot.restart_lsn);
    assert_eq!(limits.verdict(&slot, kept), Some(InvalidationReason::WalRemoved));
}

#[test]
fn an_invalid_slot_is_lost_and_one_in_use_may_still_get_ahead() {
    let limits = limits(0, Some(4), 2);
    let held = WalHeld { write: at(50 * MB), oldest: SegmentNo(46), needed: None };
    let gone = slot(Some(at(10 * MB)));
    assert_eq!(limits.wal_status(&gone, &held), Some(WalStatus::Lost));
    assert_eq!(limits.safe_wal_size(&gone, &held), None);
    let used = SlotPosition { is_active: true, ..gone };
    assert_eq!(limits.wal_status(&used, &held), Some(WalStatus::Unreserved));
    assert_eq!(limits.safe_wal_size(&used, &held), Some(-35 * 1_048_576));
    let invalid = SlotPosition { invalidation: Some(InvalidationReason::WalRemoved), ..slot(None) };
    assert_eq!(limits.wal_status(&invalid, &held), Some(WalStatus::Lost));
    let idle = SlotPosition { invalidation: Some(InvalidationReason::IdleTimeout), ..slot(Some(held.write)) };
    assert_eq!(limits.wal_status(&idle, &held), Some(WalStatus::Lost));
    assert_eq!(limits.wal_status(&slot(None), &held), None);
    assert_eq!(limits.safe_wal_size(&slot(None), &held), None);
}

#[test]
fn a_slot_times_out_only_when_nobody_streams_with_it_and_it_keeps_wal() {
    let limits = limits(0, None, 2);
    let verdict = |slot: SlotPosition| limits.verdict(&slot, SegmentNo(10));
    let idle_for =
        |seconds| SlotPosition { idle: Some(Duration::from_secs(seconds)), ..slot(Some(at(10 * MB))) };
    assert_eq!(verdict(idle_for(59)), None);
    assert_eq!(verdict(idle_for(60)), Some(InvalidationReason::IdleTimeout));
    let temporary = SlotPosition { is_active: true, ..idle_for(600) };
    assert_eq!(verdict(temporary), Some(InvalidationReason::IdleTimeout), "its session does nothing");
    assert_eq!(verdict(SlotPosition { restart_lsn: None, ..idle_for(600) }), None);
    assert_eq!(verdict(SlotPosition { idle: None, ..idle_for(600) }), None);
    let late = SlotPosition { restart_lsn: Some(at(10 * MB - 1)), ..idle_for(600) };
    assert_eq!(verdict(late), Some(InvalidationReason::WalRemoved), "as PostgreSQL looks at it first");
}

#[derive(Clone, Debug)]
struct Case {
    limits: SlotLimits,
    write: u64,
    restarts: Vec<Option<u64>>,
    oldest: u64,
    active: usize,
}

/// WAL begins at segment 1: the number 0 means none there.
fn cases() -> impl Strategy<Value = Case> {
    let keep = 0..6_u64;
    let places = proptest::option::of(7..12_u64);
    let limits = (keep.clone(), proptest::option::of(keep.clone()), keep, places)
        .prop_map(|(a, b, c, places)| SlotLimits { places, ..limits(a, b, c) });
    let restarts = proptest::collection::vec(proptest::option::of(MB..12 * MB), 1..4);
    (limits, MB..12 * MB, restarts, 0..12_u64, 0..5_usize).prop_map(
        |(limits, write, restarts, oldest, active)| Case { limits, write, restarts, oldest, active },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn states_and_verdicts_are_those_of_the_model(case in cases()) {
        let Case { limits, write, restarts, oldest, active } = case;
        let needed = restarts.iter().flatten().min().map(|raw| at(*raw));
        let current = write / MB;
        let held = WalHeld { write: at(write), oldest: SegmentNo(oldest), needed };
        let kept = limits.oldest_kept(SegmentNo(current), needed);
        // What is kept is without a hole, and begins where the model says.
        let first = (1..=current).find(|segment| is_kept(&limits, *segment, current, needed));
        prop_assert_eq!(Some(kept.0), first);
        prop_assert!((kept.0..=current).all(|segment| is_kept(&limits, segment, current, needed)));
        for (index, restart) in restarts.iter().enumerate() {
            let slot = SlotPosition { is_active: index == active, ..slot(restart.map(at)) };
            let status = limits.wal_status(&slot, &held);
            let Some(restart) = *restart else {
                prop_assert_eq!(status, None);
                continue;
            };
            let segment = restart / MB;
            // What the slot keeps, the segment that is written and the next one: all places.
            let has_place = |current: u64| limits.places.is_none_or(|places| current - segment.min(current) + 1 < places);
            let expected = if is_kept(&limits, segment, current, needed) && !has_place(current + 1) {
                WalStatus::Unreserved
            } else if is_kept(&limits, segment, current, needed) {
                let is_reserved = segment + limits.max_wal + 1 >= current;
                if is_reserved { WalStatus::Reserved } else { WalStatus::Extended }
            } else if segment >= oldest || slot.is_active {
                WalStatus::Unreserved
            } else {
                WalStatus::Lost
            };
            prop_assert_eq!(status, Some(expected));
            let verdict = limits.verdict(&slot, kept);
            let is_obsolete = !is_kept(&limits, segment, current, needed);
            prop_assert_eq!(verdict.is_some(), is_obsolete);
            // As many bytes as are called safe can be written before the slot is in danger, and not one more.
            if let Some(safe) = limits.safe_wal_size(&slot, &held) {
                let end = i64::try_from(write).unwrap() + safe;
                let at_end = u64::try_from(end).unwrap();
                let is_safe = |at_end: u64| {
                    is_kept(&limits, segment, at_end / MB, Some(at(restart))) && has_place(at_end / MB)
                };
                prop_assert!(is_safe(at_end - 1));
                prop_assert!(!is_safe(at_end));
            } else {
                let is_unlimited = limits.slot_keep.is_none() && limits.places.is_none();
                prop_assert!(is_unlimited || status == Some(WalStatus::Lost));
            }
        }
    }
}
