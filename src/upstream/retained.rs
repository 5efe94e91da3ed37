//! What our slot makes the upstream keep.
//!
//! Owns the one figure by which an operator sees that the relay fills the primary's disk. As far as the upstream has told:
//! while there is no stream it grows unseen.

use crate::metrics::{UpstreamMetrics, bytes_value};
use crate::wal::Lsn;

/// WAL that the upstream keeps for our slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retained {
    /// Where the slot is; `None` until it is known (servers before 15 do not tell it).
    slot: Option<Lsn>,
    upstream_end: Lsn,
    mover: SlotMover,
}

/// What moves the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotMover {
    /// The flush positions that are reported on the stream.
    Reports,
    /// SQL, to what is durable here.
    Sql,
}

impl Retained {
    pub(super) fn new(slot: Option<Lsn>, upstream_end: Lsn, mover: SlotMover) -> Self {
        Self { slot, upstream_end, mover }
    }

    /// The upstream told how far it is.
    pub(super) fn note_upstream_end(&mut self, end: Lsn) {
        self.upstream_end = self.upstream_end.max(end);
    }

    /// A flush position goes to the upstream, which moves the slot of the stream there, forward or back.
    pub(super) fn note_reported(&mut self, flush: Lsn) {
        if self.mover == SlotMover::Reports {
            self.slot = Some(flush);
        }
    }

    /// This is durable here: where the slot is moved by SQL, it will be there in a moment.
    pub(super) fn note_durable(&mut self, flushed: Lsn) {
        if self.mover == SlotMover::Sql {
            self.slot = self.slot.max(Some(flushed));
        }
    }

    pub(super) fn publish(&self, metrics: &UpstreamMetrics) {
        if let Some(slot) = self.slot {
            metrics.slot_retained.set(bytes_value(self.upstream_end.bytes_since(slot)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::AllMetrics;

    #[test]
    fn it_is_what_lies_between_the_slot_and_the_upstreams_end() {
        let lsn = |raw| Lsn::new(raw).unwrap();
        let all = AllMetrics::default();
        let shown = |retained: &Retained| {
            retained.publish(&all.upstream);
            let text = all.registry.render();
            let value =
                |line: &str| line.strip_prefix("walrelay_upstream_slot_retained_bytes ")?.parse().ok();
            text.lines().find_map(value).unwrap_or(-1.0)
        };
        let mut retained = Retained::new(None, lsn(5000), SlotMover::Reports);
        assert_eq!(shown(&retained), 0.0);
        retained.note_reported(lsn(1000));
        assert_eq!(shown(&retained), 4000.0);
        retained.note_upstream_end(lsn(9000));
        retained.note_upstream_end(lsn(8000));
        assert_eq!(shown(&retained), 8000.0);
        retained.note_reported(lsn(500));
        assert_eq!(shown(&retained), 8500.0);
        // One ahead of what was heard leaves nothing.
        retained.note_reported(lsn(9500));
        assert_eq!(shown(&retained), 0.0);
        let mut retained = Retained::new(Some(lsn(1000)), lsn(5000), SlotMover::Sql);
        retained.note_reported(lsn(4000));
        retained.note_durable(lsn(2000));
        assert_eq!(shown(&retained), 3000.0);
    }
}
