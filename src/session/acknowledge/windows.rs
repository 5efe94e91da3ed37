//! WAL that was acknowledged although it was durable only here.
//!
//! Owns the list: at most one window is open, the last; when there are too many, two become one, which claims too much rather
//! than too little. What lies beyond where its timeline was left is nobody's to have any more, and stays told.

use crate::session::acknowledge::Durable;
use crate::wal::{Lsn, LsnRange, TimelineId};

/// WAL that was acknowledged although it was durable only here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalWindow {
    /// The timeline that was received.
    pub timeline: TimelineId,
    /// What was acknowledged so.
    pub range: LsnRange,
    /// Whether the standbys have it.
    pub state: WindowState,
}

/// What has become of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowState {
    /// The standbys are still without some of it.
    Open,
    /// They have it.
    Closed,
    /// Its timeline was left before it: they never had all of it, and never will.
    Left,
}

/// All of them, those of before first.
#[derive(Debug, Default)]
pub(super) struct Windows(Vec<LocalWindow>);

impl From<Vec<LocalWindow>> for Windows {
    fn from(windows: Vec<LocalWindow>) -> Self {
        Self(windows)
    }
}

impl Windows {
    pub(super) fn all(&self) -> &[LocalWindow] {
        &self.0
    }

    /// The one that is open.
    pub(super) fn open(&self) -> Option<LocalWindow> {
        self.0.last().copied().filter(|window| window.state == WindowState::Open)
    }

    /// The standbys have all of it.
    pub(super) fn close(&mut self) {
        if let Some(window) = self.0.last_mut().filter(|window| window.state == WindowState::Open) {
            window.state = WindowState::Closed;
        }
    }

    /// The open one, or a new one, goes from `from` to all that is durable.
    pub(super) fn extend(&mut self, from: Lsn, Durable { timeline, flushed }: Durable) {
        let Some(range) = LsnRange::new(from, flushed) else { return };
        if self.open().is_some() {
            self.0.pop();
        }
        self.push(LocalWindow { timeline, range, state: WindowState::Open });
    }

    /// The timeline was left at `fork`.
    pub(super) fn cut(&mut self, fork: Lsn) {
        let Some(open) = self.open().filter(|open| open.range.end() > fork) else { return };
        self.0.pop();
        let (from, to) = (open.range.start(), open.range.end());
        if let Some(range) = LsnRange::new(from.max(fork), to) {
            self.push(LocalWindow { range, state: WindowState::Left, ..open });
        }
        if let Some(range) = LsnRange::new(from, fork) {
            self.push(LocalWindow { range, ..open });
        }
    }

    fn push(&mut self, window: LocalWindow) {
        if self.0.len() == WINDOWS_MAX {
            let second = self.0.remove(1);
            if let Some(first) = self.0.first_mut() {
                let from = first.range.start().min(second.range.start());
                let to = first.range.end().max(second.range.end());
                first.range = LsnRange::new(from, to).unwrap_or(first.range);
                if second.state == WindowState::Left {
                    first.state = WindowState::Left;
                }
            }
        }
        self.0.push(window);
    }
}

/// Most windows remembered; the oldest become one.
pub const WINDOWS_MAX: usize = 64;
