//! Metrics of single slots, a bounded number of them.
//!
//! Owns their names and their text. Written for each page from what is there then: a slot that was dropped leaves no series
//! behind, and slots beyond the limit are summed up under one name that no slot can have.

use std::fmt::Write as _;

/// What is told of one slot.
#[derive(Clone, Debug)]
pub struct SlotSample {
    /// The slot's name: lower case letters, digits and underscores.
    pub slot_name: String,
    /// Whether a session uses it.
    pub is_active: bool,
    /// Whether its WAL is lost to it.
    pub is_lost: bool,
    /// WAL from its position to the end of what is written.
    pub retained_bytes: Option<u64>,
    /// Bytes that can be written before it is in danger.
    pub safe_wal_bytes: Option<i64>,
}

/// Slots that have series of their own.
pub const SLOT_SERIES_MAX: usize = 64;

/// Name of the sum over all others.
const OTHER: &str = "(other)";

/// The lines of these slots, in Prometheus' exposition format.
pub fn slot_lines(slots: &[SlotSample]) -> String {
    let mut text = String::new();
    let flag = |is: bool| if is { 1 } else { 0 };
    let active = |slot: &SlotSample| Some(flag(slot.is_active));
    let lost = |slot: &SlotSample| Some(flag(slot.is_lost));
    let retained = |slot: &SlotSample| slot.retained_bytes.map(i128::from);
    let safe = |slot: &SlotSample| slot.safe_wal_bytes.map(i128::from);
    let (add, least) = (|a, b| a + b, |a: i128, b: i128| a.min(b));
    family(&mut text, "walrelay_slot_active", "1 while a session uses the slot", slots, (&active, &add));
    family(&mut text, "walrelay_slot_lost", "1 once the slot's WAL is lost to it", slots, (&lost, &add));
    let description = "WAL from the slot's restart_lsn on";
    family(&mut text, "walrelay_slot_retained_bytes", description, slots, (&retained, &add));
    let description = "WAL that can be written before the slot is invalidated";
    family(&mut text, "walrelay_slot_safe_wal_bytes", description, slots, (&safe, &least));
    text
}

type Value<'a> = &'a dyn Fn(&SlotSample) -> Option<i128>;
type Fold<'a> = &'a dyn Fn(i128, i128) -> i128;

fn family(
    text: &mut String,
    name: &str,
    description: &str,
    slots: &[SlotSample],
    (value, fold): (Value<'_>, Fold<'_>),
) {
    let (single, others) = slots.split_at(slots.len().min(SLOT_SERIES_MAX));
    let own = single.iter().filter_map(|slot| Some((slot.slot_name.as_str(), value(slot)?)));
    let other = others.iter().filter_map(value).reduce(fold).map(|value| (OTHER, value));
    let mut lines = own.chain(other).peekable();
    if lines.peek().is_some() {
        // Writing into a string cannot fail.
        let _ = writeln!(text, "# HELP {name} {description}\n# TYPE {name} gauge");
    }
    for (slot_name, value) in lines {
        let _ = writeln!(text, "{name}{{slot_name=\"{slot_name}\"}} {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(number: u64) -> SlotSample {
        SlotSample {
            slot_name: format!("s{number:05}"),
            is_active: true,
            is_lost: number == 3,
            retained_bytes: Some(number),
            safe_wal_bytes: (number > 0).then_some(-5),
        }
    }

    #[test]
    fn each_slot_has_its_series_and_ten_thousand_have_few() {
        let few = slot_lines(&[sample(0), sample(3)]);
        assert!(few.contains("walrelay_slot_active{slot_name=\"s00000\"} 1\n"), "{few}");
        assert!(few.contains("walrelay_slot_lost{slot_name=\"s00003\"} 1\n"), "{few}");
        assert!(!few.contains("safe_wal_bytes{slot_name=\"s00000\"}"), "unknown is absent: {few}");
        let many = slot_lines(&(0..10_000).map(sample).collect::<Vec<_>>());
        assert!(many.lines().count() <= 4 * (SLOT_SERIES_MAX + 3), "{}", many.lines().count());
        assert!(many.contains("walrelay_slot_active{slot_name=\"(other)\"} 9936\n"));
        assert!(many.contains("walrelay_slot_safe_wal_bytes{slot_name=\"(other)\"} -5\n"));
        assert_eq!(slot_lines(&[]), "");
    }
}
