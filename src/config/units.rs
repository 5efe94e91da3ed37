//! Sizes and durations as `postgresql.conf` writes them: a number and a unit.
//!
//! Owns the units, their texts and their rounding. Unlike there, a number without a unit is refused (but 0): which unit
//! would be meant differs from setting to setting.

use std::{fmt, time::Duration};

/// Units of memory, largest first.
const SIZE_UNITS: &[(&str, u64)] =
    &[("TB", 1 << 40), ("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10), ("B", 1)];

/// Units of time in microseconds, largest first.
const DURATION_UNITS: &[(&str, u64)] = &[
    ("d", 86_400_000_000),
    ("h", 3_600_000_000),
    ("min", 60_000_000),
    ("s", 1_000_000),
    ("ms", 1_000),
    ("us", 1),
];

/// PostgreSQL's own hints.
const SIZE_ADVICE: &str = "valid units are \"B\", \"kB\", \"MB\", \"GB\", and \"TB\"";
const DURATION_ADVICE: &str = "valid units are \"us\", \"ms\", \"s\", \"min\", \"h\", and \"d\"";

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Size(pub(crate) u64);

/// A time span, to the microsecond.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span(pub(crate) Duration);

impl Size {
    /// Reads `64MB`; the error says what would be right.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        quantity(text, SIZE_UNITS).map(Self).ok_or(SIZE_ADVICE)
    }
}

impl Span {
    /// Reads `10s`; the error says what would be right.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        let microseconds = quantity(text, DURATION_UNITS).ok_or(DURATION_ADVICE)?;
        Ok(Self(Duration::from_micros(microseconds)))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print(f, self.0, SIZE_UNITS)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print(f, u64::try_from(self.0.as_micros()).unwrap_or(u64::MAX), DURATION_UNITS)
    }
}

/// The number in the largest unit that leaves no fraction.
fn print(f: &mut fmt::Formatter<'_>, number: u64, units: &[(&str, u64)]) -> fmt::Result {
    match units.iter().find(|(_, factor)| number > 0 && number.is_multiple_of(*factor)) {
        Some((unit, factor)) => write!(f, "{}{unit}", number / factor),
        None => f.write_str("0"),
    }
}

/// A decimal number, perhaps with a fraction, blanks, and a unit; the result is in the smallest unit, rounded.
fn quantity(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end)?;
    let unit = unit.trim_start();
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    if unit.is_empty() {
        // Nothing is nothing in any unit.
        return number.chars().all(|c| matches!(c, '0' | '.')).then_some(0);
    }
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    // More digits than these cannot matter, and fewer cannot overflow.
    let fraction = fraction.get(..FRACTION_DIGITS_MAX).unwrap_or(fraction);
    let mut part: u128 = 0;
    let mut scale: u128 = 1;
    for digit in fraction.chars().filter_map(|c| c.to_digit(10)) {
        part = part * 10 + u128::from(digit);
        scale *= 10;
    }
    let part = (part * u128::from(*factor) + scale / 2) / scale;
    whole.checked_mul(*factor)?.checked_add(u64::try_from(part).ok()?)
}

const FRACTION_DIGITS_MAX: usize = 18;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn values_of_postgresql_conf_are_read() {
        let size = |text: &str| Size::parse(text).map(|size| size.0).ok();
        assert_eq!(size("1GB"), Some(1 << 30));
        assert_eq!(size(" 64 MB "), Some(64 << 20));
        assert_eq!(size("1.5kB"), Some(1536));
        assert_eq!(size(".5TB"), Some(1 << 39));
        assert_eq!(size("0"), Some(0));
        assert_eq!(size("512B"), Some(512));
        for wrong in [
            "",
            "1",
            "1gb",
            "1KB",
            "GB",
            "-1GB",
            "1 G B",
            "1.2.3GB",
            ".GB",
            "99999999999TB",
            "1e3GB",
            "0x1GB",
        ] {
            assert_eq!(size(wrong), None, "{wrong}");
        }
        let span = |text: &str| Span::parse(text).map(|span| span.0).ok();
        assert_eq!(span("60s"), Some(Duration::from_secs(60)));
        assert_eq!(span("1.5min"), Some(Duration::from_secs(90)));
        assert_eq!(span("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(span("1d"), Some(Duration::from_secs(86_400)));
        assert_eq!(span("10us"), Some(Duration::from_micros(10)));
        assert_eq!(span("0"), Some(Duration::ZERO));
        for wrong in ["60", "1m", "1S", "1sec", "s", "-1s"] {
            assert_eq!(span(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[0-9]{0,25}\\.?[0-9]{0,30} ?(B|kB|MB|GB|TB|s|\\PC{0,3})") {
            let _ = (Size::parse(&text), Span::parse(&text));
        }

        #[test]
        fn printed_values_are_read_back(bytes in any::<u64>(), microseconds in any::<u64>()) {
            prop_assert_eq!(Size::parse(&Size(bytes).to_string()), Ok(Size(bytes)));
            let span = Span(Duration::from_micros(microseconds));
            prop_assert_eq!(Span::parse(&span.to_string()), Ok(span));
        }
    }
}
