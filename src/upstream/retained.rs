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
}

impl Retained {
    pub(super) fn new(slot: Option<Lsn>, upstream_end: Lsn) -> Self {
        Self { slot, upstream_end }
    }

    /// The upstream told how far it is.
    pub(super) fn note_upstream_end(&mut self, end: Lsn) {
        self.upstream_end = self.upstream_end.max(end);
    }

    /// A flush position goes to the upstream, which moves the slot there, forward or back.
    pub(super) fn note_reported(&mut self, flush: Lsn) {
        self.slot = Some(flush);
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
        let mut retained = Retained::new(None, lsn(5000));
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
    }
}
