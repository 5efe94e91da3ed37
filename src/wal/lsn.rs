//! Positions in the log.
//!
//! Owns `Lsn` and `LsnRange` and their text and wire forms. Zero ("not known" on the wire) never becomes an `Lsn`.

use std::{fmt, str::FromStr};

use crate::wal::PAGE_BYTES;

/// A byte position in the log (`XLogRecPtr`). Never zero: an unknown position is `Option::None`.
///
/// A plain number inside, though `NonZeroU64` says the same in less space: wherever rustc 1.95 optimises, it takes what
/// `Option::map` with `min` gives for known (`sender_properties::an_apply_that_was_told_*` fails then).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(u64);

impl Lsn {
    /// The lowest position.
    pub const MIN: Self = Self(1);

    /// A position from its number; `None` for zero (`InvalidXLogRecPtr`).
    pub const fn new(raw: u64) -> Option<Self> {
        if raw == 0 { None } else { Some(Self(raw)) }
    }

    /// On the wire 0 means "not known".
    pub const fn from_wire(raw: u64) -> Option<Self> {
        Self::new(raw)
    }

    /// The wire form of a position that may be unknown.
    pub fn to_wire(position: Option<Self>) -> u64 {
        position.map_or(0, Self::get)
    }

    /// The position as a number of bytes from the beginning of the log.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The position `bytes` further; saturates at the end of the address space, which no log reaches.
    #[must_use]
    pub const fn advance(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }

    /// Bytes from `earlier` to `self`; 0 when `earlier` is not earlier.
    pub const fn bytes_since(self, earlier: Self) -> u64 {
        self.get().saturating_sub(earlier.get())
    }

    /// Offset within the page that holds the byte at this position.
    pub const fn page_offset(self) -> u64 {
        self.get() % PAGE_BYTES
    }

    /// Start of the page that holds the byte at this position; `None` only within the log's unused first page.
    pub const fn page_start(self) -> Option<Self> {
        Self::new(self.get() - self.page_offset())
    }

    /// Rounded up to the 8 bytes on which records are aligned (`MAXALIGN`).
    #[must_use]
    pub const fn max_align(self) -> Self {
        self.advance((8 - self.get() % 8) % 8)
    }
}

impl fmt::Display for Lsn {
    /// The form of servers up to 18: `16/B374D848`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.get() >> 32, self.get() & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The text is not an LSN other than `0/0`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid input syntax for type pg_lsn: \"{0}\"")]
pub struct ParseLsnError(pub String);

impl FromStr for Lsn {
    type Err = ParseLsnError;

    /// Reads `%X/%X` and `%X/%08X`; each half has 1 to 8 hexadecimal digits. `0/0` is an error here: see
    /// [`parse_lsn_or_zero`].
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_lsn_or_zero(text)?.ok_or_else(|| ParseLsnError(text.to_owned()))
    }
}

/// Reads an LSN where `0/0` stands for "not known".
pub fn parse_lsn_or_zero(text: &str) -> Result<Option<Lsn>, ParseLsnError> {
    let error = || ParseLsnError(text.to_owned());
    let half = |digits: &str| {
        let well_formed = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
        well_formed.then(|| u64::from_str_radix(digits, 16).ok()).flatten().ok_or_else(error)
    };
    let (high, low) = text.split_once('/').ok_or_else(error)?;
    Ok(Lsn::new(half(high)? << 32 | half(low)?))
}

/// The WAL from `start` up to, not including, `end`; never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LsnRange {
    start: Lsn,
    end: Lsn,
}

impl LsnRange {
    /// `None` when the range would be empty.
    pub fn new(start: Lsn, end: Lsn) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }

    /// First position in the range.
    pub fn start(self) -> Lsn {
        self.start
    }

    /// First position after the range.
    pub fn end(self) -> Lsn {
        self.end
    }

    /// Whether the byte at `position` is in the range.
    pub fn contains(self, position: Lsn) -> bool {
        self.start <= position && position < self.end
    }

    /// Length in bytes; at least 1.
    pub fn bytes(self) -> u64 {
        self.end.bytes_since(self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_is_postgresqls_and_both_widths_are_read() {
        let position = Lsn::new(0x16_B374_D848).unwrap();
        assert_eq!(position.to_string(), "16/B374D848");
        assert_eq!("16/B374D848".parse(), Ok(position));
        assert_eq!("0/01000028".parse(), Ok(Lsn::new(0x0100_0028).unwrap()));
    }

    #[test]
    fn what_is_not_an_lsn_is_refused() {
        for text in [
            "",
            "/",
            "0",
            "0/",
            "/0",
            "0/0",
            "1/123456789",
            "123456789/1",
            "g/1",
            "1/-1",
            "+1/1",
            " 1/1",
            "1/1 ",
        ] {
            assert!(text.parse::<Lsn>().is_err(), "{text:?}");
        }
        assert_eq!(parse_lsn_or_zero("0/0"), Ok(None));
    }

    #[test]
    fn alignment_rounds_up_and_page_start_down() {
        let at = |raw| Lsn::new(raw).unwrap();
        assert_eq!(at(8193).max_align(), at(8200));
        assert_eq!(at(8192).max_align(), at(8192));
        assert_eq!(at(8193).page_start(), Some(at(8192)));
        assert_eq!(at(5).page_start(), None);
    }
}
