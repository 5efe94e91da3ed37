//! Timelines and their history files.
//!
//! Owns `TimelineId`, the text form of `.history` files, and the question where a timeline left its parent. Decides
//! nothing about whom to follow.

use std::{fmt, num::NonZeroU32};

use crate::wal::Lsn;

/// Number of a timeline (`TimeLineID`), from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct TimelineId(NonZeroU32);

impl TimelineId {
    /// The timeline that `initdb` creates; it has no history file.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// `None` for 0, which is no timeline.
    pub const fn new(raw: u32) -> Option<Self> {
        match NonZeroU32::new(raw) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// Name of the timeline's history file: `00000002.history`.
    pub fn history_file_name(self) -> String {
        format!("{:08X}.history", self.get())
    }

    /// The timeline whose history file has this name.
    pub fn parse_history_file_name(name: &str) -> Option<Self> {
        let digits = name.strip_suffix(".history")?;
        let is_upper_hex = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
        let well_formed = digits.len() == 8 && digits.bytes().all(is_upper_hex);
        well_formed.then(|| u32::from_str_radix(digits, 16).ok()).flatten().and_then(Self::new)
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

impl fmt::Debug for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// One ancestor in a history: the timeline, and where the next one left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Ancestor {
    /// The ancestor.
    pub timeline: TimelineId,
    /// End of the ancestor's part, and start of its child's.
    pub switch_lsn: Lsn,
}

/// The ancestry of one timeline, oldest first (`readTimeLineHistory`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineHistory {
    timeline: TimelineId,
    ancestors: Vec<Ancestor>,
}

/// The text is not a history file for the timeline.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// A line does not have the form `timeline <TAB> switch point <TAB> reason`.
    #[error("syntax error in history file: {0}")]
    Syntax(String),
    /// Timelines must increase from line to line.
    #[error("invalid data in history file: timeline IDs must be in increasing sequence (line: {0})")]
    NotIncreasing(String),
    /// Every ancestor's number must be below the timeline's own.
    #[error("invalid data in history file: timeline IDs must be less than child timeline's ID {0}")]
    NotBelowChild(TimelineId),
    /// Longer than [`HISTORY_BYTES_MAX`].
    #[error("history file has {0} bytes, more than {HISTORY_BYTES_MAX}")]
    TooLong(usize),
}

impl TimelineHistory {
    /// The history of a timeline without ancestors.
    pub fn of_first() -> Self {
        Self { timeline: TimelineId::FIRST, ancestors: Vec::new() }
    }

    /// Reads the content of `timeline`'s history file. Blank lines and lines that begin with `#` mean nothing.
    pub fn parse(timeline: TimelineId, content: &[u8]) -> Result<Self, HistoryError> {
        if content.len() > HISTORY_BYTES_MAX {
            return Err(HistoryError::TooLong(content.len()));
        }
        let text = String::from_utf8_lossy(content);
        let mut ancestors: Vec<Ancestor> = Vec::new();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let ancestor = parse_line(line).ok_or_else(|| HistoryError::Syntax(line.to_owned()))?;
            if ancestors.last().is_some_and(|last| last.timeline >= ancestor.timeline) {
                return Err(HistoryError::NotIncreasing(line.to_owned()));
            }
            ancestors.push(ancestor);
        }
        if ancestors.last().is_some_and(|last| last.timeline >= timeline) {
            return Err(HistoryError::NotBelowChild(timeline));
        }
        Ok(Self { timeline, ancestors })
    }

    /// The timeline whose history this is.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// All ancestors, oldest first.
    pub fn ancestors(&self) -> &[Ancestor] {
        &self.ancestors
    }

    /// Where `timeline` was left on the way to this one; `None` when it is this one or no ancestor.
    pub fn switch_lsn(&self, timeline: TimelineId) -> Option<Lsn> {
        self.ancestors
            .iter()
            .find(|ancestor| ancestor.timeline == timeline)
            .map(|ancestor| ancestor.switch_lsn)
    }
}

/// The content of `ancestor`'s history file, by a descendant's: a server copies the file of its parent, and adds a blank line
/// and its own (`writeTimeLineHistory`). `None` where the descendant's does not name it, or nothing before it.
pub fn history_of_ancestor(descendant: &[u8], ancestor: TimelineId) -> Option<&[u8]> {
    let (mut before, mut has_ancestors) = (0, false);
    for line in descendant.split_inclusive(|byte| *byte == b'\n') {
        let text = String::from_utf8_lossy(line);
        let named = Some(text.trim()).filter(|text| !text.starts_with('#')).and_then(parse_line);
        if named.is_some_and(|named| named.timeline == ancestor) {
            let head = descendant.get(..before).filter(|_| has_ancestors)?;
            let without_blank = head.strip_suffix(b"\n").filter(|rest| rest.ends_with(b"\n"));
            return Some(without_blank.unwrap_or(head));
        }
        has_ancestors |= named.is_some();
        before += line.len();
    }
    None
}

fn parse_line(line: &str) -> Option<Ancestor> {
    let mut fields = line.split_whitespace();
    let timeline = fields.next()?.parse().ok().and_then(TimelineId::new)?;
    let switch_lsn = fields.next()?.parse().ok()?;
    Some(Ancestor { timeline, switch_lsn })
}

/// Longest history file that is read; a line has some 60 bytes, so this is tens of thousands of promotions.
pub const HISTORY_BYTES_MAX: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(raw: u32) -> TimelineId {
        TimelineId::new(raw).unwrap()
    }

    #[test]
    fn a_history_with_comments_and_blank_lines_is_read() {
        let content = b"1\t0/5000158\tno recovery target specified\n\n# comment\n2\t0/60000A0\tno recovery target specified\n";
        let history = TimelineHistory::parse(timeline(3), content).unwrap();
        assert_eq!(history.switch_lsn(timeline(1)), Lsn::new(0x500_0158));
        assert_eq!(history.switch_lsn(timeline(2)), Lsn::new(0x600_00A0));
        assert_eq!(history.switch_lsn(timeline(3)), None);
    }

    #[test]
    fn a_malformed_history_is_refused() {
        let parse = |content: &[u8]| TimelineHistory::parse(timeline(3), content);
        assert!(matches!(parse(b"x\t0/1\t\n"), Err(HistoryError::Syntax(_))));
        assert!(matches!(parse(b"1\n"), Err(HistoryError::Syntax(_))));
        assert!(matches!(parse(b"2\t0/1\t\n1\t0/2\t\n"), Err(HistoryError::NotIncreasing(_))));
        assert!(matches!(parse(b"3\t0/1\t\n"), Err(HistoryError::NotBelowChild(_))));
    }

    /// As PostgreSQL 15 wrote them, one promotion after the other.
    const WRITTEN: [&[u8]; 3] = [
        b"1\t0/5000158\tno recovery target specified\n",
        b"1\t0/5000158\tno recovery target specified\n\n2\t0/60000A0\tno recovery target specified\n",
        b"1\t0/5000158\tno recovery target specified\n\n2\t0/60000A0\tno recovery target specified\n\n4\t0/7000000\tbefore 2026-11-20 10:00:00+00\n",
    ];

    #[test]
    fn an_ancestors_history_is_the_head_of_its_descendants() {
        let [second, fourth, newest] = WRITTEN;
        assert_eq!(history_of_ancestor(newest, timeline(4)), Some(fourth));
        assert_eq!(history_of_ancestor(newest, timeline(2)), Some(second));
        assert_eq!(history_of_ancestor(fourth, timeline(2)), Some(second));
        // No ancestor, and one of whose ancestors nothing is known.
        for (descendant, none) in [(newest, 3), (newest, 1), (second, 2), (b"", 2)] {
            assert_eq!(history_of_ancestor(descendant, timeline(none)), None, "{none}");
        }
        let by_hand = b"# restored\r\n1\t0/5000158\t\n# 2\t0/1\n2\t0/60000A0\t";
        assert_eq!(history_of_ancestor(by_hand, timeline(2)), Some(&by_hand[..33]));
    }

    #[test]
    fn history_file_names_convert_both_ways() {
        assert_eq!(timeline(0x1A).history_file_name(), "0000001A.history");
        assert_eq!(TimelineId::parse_history_file_name("0000001A.history"), Some(timeline(0x1A)));
        for name in ["00000000.history", "1A.history", "0000001a.history", "0000001A.histor"] {
            assert_eq!(TimelineId::parse_history_file_name(name), None, "{name}");
        }
    }
}
