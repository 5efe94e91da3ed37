//! The newest checkpoint that a log tells of.
//!
//! Owns what is remembered of it: where a server that is restored from a base backup begins to replay. Knows nothing of
//! what else a checkpoint says.

use crate::wal::insight::{Checkpoint, Event};
use crate::wal::record::{RMGR_INFO_MASK, Record, XLOG_RESOURCE_MANAGER};
use crate::wal::{Lineage, Lsn, TimelineId};

/// A checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CheckpointPlace {
    /// The timeline it is on.
    pub timeline: TimelineId,
    /// Where replay would begin.
    pub redo: Lsn,
    /// End of its record.
    pub end: Lsn,
}

impl CheckpointPlace {
    /// Whether its record is on the line, before `end`.
    pub fn is_on(&self, line: &Lineage, end: Lsn) -> bool {
        line.leads_by(self.timeline, self.end, end)
    }
}

/// Finds the newest checkpoint among records.
#[derive(Clone, Copy, Debug, Default)]
pub struct NewestCheckpoint(Option<CheckpointPlace>);

impl NewestCheckpoint {
    /// The newest that was seen since the last time.
    pub fn take(&mut self) -> Option<CheckpointPlace> {
        self.0.take()
    }

    /// Takes in a verified record.
    #[inline]
    pub fn note(&mut self, record: &Record<'_>) {
        let header = &record.header;
        if header.resource_manager == XLOG_RESOURCE_MANAGER
            && matches!(header.info & RMGR_INFO_MASK, CHECKPOINT_SHUTDOWN | CHECKPOINT_ONLINE)
        {
            self.note_checkpoint(record);
        }
    }

    #[cold]
    fn note_checkpoint(&mut self, record: &Record<'_>) {
        if let Some(Event::Checkpoint(Checkpoint { timeline, redo, end, .. })) = Event::of(record) {
            self.0 = Some(CheckpointPlace { timeline, redo, end });
        }
    }
}

/// `XLOG_CHECKPOINT_SHUTDOWN`
const CHECKPOINT_SHUTDOWN: u8 = 0x00;

/// `XLOG_CHECKPOINT_ONLINE`
const CHECKPOINT_ONLINE: u8 = 0x10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::builder::WalBuilder;
    use crate::wal::timeline::Ancestor;
    use crate::wal::{RecordVisitor, Scanner, SegmentSize};

    struct Seen(NewestCheckpoint);

    impl RecordVisitor for Seen {
        fn record(&mut self, record: &Record<'_>) {
            self.0.note(record);
        }
    }

    fn at(raw: u64) -> Lsn {
        Lsn::new(raw).unwrap()
    }

    #[test]
    fn the_newest_is_known_once() {
        let mut wal = WalBuilder::small();
        wal.checkpoint(at(0x28), false);
        wal.noise(100);
        let redo = wal.end();
        wal.noise(700);
        let record = wal.checkpoint(redo, true);
        wal.noise(300);
        let mut seen = Seen(NewestCheckpoint::default());
        Scanner::at_segment_start(wal.context(), wal.start()).feed(wal.bytes(), &mut seen).unwrap();
        let expected = CheckpointPlace { timeline: TimelineId::FIRST, redo, end: record.end() };
        assert_eq!((seen.0.take(), seen.0.take()), (Some(expected), None));
    }

    #[test]
    fn it_counts_only_where_it_is_on_the_line() {
        let (first, second) = (TimelineId::FIRST, TimelineId::new(2).unwrap());
        let size = SegmentSize::DEFAULT;
        let place = |timeline, end| CheckpointPlace { timeline, redo: at(50), end: at(end) };
        let old = Lineage::new(first, Vec::new(), size);
        assert!(place(first, 100).is_on(&old, at(100)));
        assert!(!place(first, 101).is_on(&old, at(100)), "its record is not there");
        assert!(!place(second, 90).is_on(&old, at(100)));
        let new = Lineage::new(second, vec![Ancestor { timeline: first, switch_lsn: at(100) }], size);
        assert!(place(first, 100).is_on(&new, at(500)));
        assert!(!place(first, 101).is_on(&new, at(500)), "it is beyond the fork");
        assert!(place(second, 500).is_on(&new, at(500)));
    }
}
