//! The server that clients see: the upstream's version, with what depends on it.
//!
//! Owns every place where answers differ between major versions of PostgreSQL.

use crate::downstream::DownstreamContext;
use crate::protocol::backend::Column;
use crate::store::{Identity, ServerFacts, WhenInvalid};
use crate::wal::Lsn;

/// The server's identity and version, as a session saw them at its start.
#[derive(Clone, Debug)]
pub(super) struct Server {
    pub(super) identity: Identity,
    pub(super) facts: ServerFacts,
    major: u32,
}

impl Server {
    /// `None` until an upstream was heard once: there is no server to be.
    pub(super) fn of(context: &DownstreamContext) -> Option<Self> {
        let identity = context.store.identity()?;
        let facts = context.store.facts()?;
        context.store.positions()?;
        let major = facts.version_num / 10_000;
        Some(Self { identity, facts, major })
    }

    /// Whether the server is of this major version, or a later one.
    pub(super) fn is_at_least(&self, major: u32) -> bool {
        self.major >= major
    }

    /// What becomes of a client that wants to stream with an invalid slot.
    pub(super) fn when_invalid(&self) -> WhenInvalid {
        match self.major {
            0..=15 => WhenInvalid::Revive,
            16..=17 => WhenInvalid::Use,
            _ => WhenInvalid::Refuse,
        }
    }

    /// A position as this version prints it.
    pub(super) fn lsn_text(&self, position: Option<Lsn>) -> String {
        let raw = Lsn::to_wire(position);
        let (high, low) = (raw >> 32, raw & 0xFFFF_FFFF);
        if self.is_at_least(19) { format!("{high:X}/{low:08X}") } else { format!("{high:X}/{low:X}") }
    }

    /// The column of a timeline in `IDENTIFY_SYSTEM`.
    pub(super) fn timeline_column(&self) -> Column {
        if self.is_at_least(16) { Column::int8("timeline") } else { Column::int4("timeline") }
    }

    /// The column of a history file's content.
    pub(super) fn history_column(&self) -> Column {
        if self.is_at_least(14) { Column::text("content") } else { Column::bytea("content") }
    }

    /// A setting's name in a message: in quotes since 17.
    pub(super) fn quoted_setting(&self, name: &str) -> String {
        if self.is_at_least(17) { format!("\"{name}\"") } else { name.to_owned() }
    }
}

#[cfg(test)]
impl Server {
    /// For tests of what depends on the version alone.
    pub(super) fn of_version(version_num: u32) -> Self {
        let identity = Identity {
            system_id: crate::wal::SystemId(1),
            segment_size: crate::wal::SegmentSize::new(1 << 20).unwrap(),
        };
        let facts =
            ServerFacts { version: String::new(), version_num, settings: std::collections::BTreeMap::new() };
        Self { identity, facts, major: version_num / 10_000 }
    }
}
