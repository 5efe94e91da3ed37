//! Transaction ids with their epoch, and how far the primary has come with them.
//!
//! Records hold the lower half of an id only; a checkpoint tells the whole of the next one, and from there on they can be
//! counted. Owns that count. Knows nothing of what transactions do.

use crate::wal::insight::{Checkpoint, Event};
use crate::wal::record::{RMGR_INFO_MASK, Record, XLOG_RESOURCE_MANAGER};

/// A transaction id with its epoch in the upper half (`FullTransactionId`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct FullXid(pub u64);

impl FullXid {
    /// The id of an epoch; `None` for those below the first normal one.
    pub fn new(epoch: u32, xid: u32) -> Option<Self> {
        (xid >= FIRST_NORMAL_XID).then(|| Self(u64::from(epoch) << 32 | u64::from(xid)))
    }

    /// The upper half.
    pub fn epoch(self) -> u32 {
        u32::try_from(self.0 >> 32).unwrap_or(u32::MAX)
    }

    /// The lower half.
    pub fn xid(self) -> u32 {
        u32::try_from(self.0 & u64::from(u32::MAX)).unwrap_or(0)
    }
}

/// The first id that a transaction can have (`FirstNormalTransactionId`).
pub const FIRST_NORMAL_XID: u32 = 3;

/// The id that the primary gives out next, as far as its WAL tells.
#[derive(Clone, Copy, Debug, Default)]
pub struct NextXid(Option<FullXid>);

impl NextXid {
    /// The next id; `None` until a checkpoint was seen.
    pub fn get(&self) -> Option<FullXid> {
        self.0
    }

    /// Takes in a verified record.
    #[inline]
    pub fn note(&mut self, record: &Record<'_>) {
        let header = &record.header;
        if header.xid != 0
            && let Some(FullXid(next)) = self.0
        {
            // Ids go round; one that is not far behind is of this round, or of the next.
            let low = u32::try_from(next & u64::from(u32::MAX)).unwrap_or(0);
            let ahead = header.xid.wrapping_sub(low);
            if ahead < HALF_ROUND {
                self.0 = Some(FullXid(next + u64::from(ahead) + 1));
            }
        }
        if header.resource_manager == XLOG_RESOURCE_MANAGER
            && matches!(header.info & RMGR_INFO_MASK, CHECKPOINT_SHUTDOWN | CHECKPOINT_ONLINE)
        {
            self.note_checkpoint(record);
        }
    }

    #[cold]
    fn note_checkpoint(&mut self, record: &Record<'_>) {
        if let Some(Event::Checkpoint(Checkpoint { next_xid: Some(next), .. })) = Event::of(record) {
            self.0 = self.0.max(Some(FullXid(next)));
        }
    }
}

/// Ids that are further ahead than this are behind.
const HALF_ROUND: u32 = 1 << 31;

/// `XLOG_CHECKPOINT_SHUTDOWN`
const CHECKPOINT_SHUTDOWN: u8 = 0x00;

/// `XLOG_CHECKPOINT_ONLINE`
const CHECKPOINT_ONLINE: u8 = 0x10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::Scanner;
    use crate::wal::builder::WalBuilder;
    use crate::wal::record::RecordVisitor;

    struct Seen(NextXid);

    impl RecordVisitor for Seen {
        fn record(&mut self, record: &Record<'_>) {
            self.0.note(record);
        }
    }

    fn next_after(wal: &WalBuilder) -> Option<u64> {
        let mut seen = Seen(NextXid::default());
        Scanner::at_segment_start(wal.context(), wal.start()).feed(wal.bytes(), &mut seen).unwrap();
        seen.0.get().map(|next| next.0)
    }

    fn checkpoint(wal: &mut WalBuilder, next: u64) {
        let mut body = vec![0; 24];
        body[0] = 0x28;
        body[8] = 1;
        body[12] = 1;
        body.extend(next.to_le_bytes());
        body.extend([0; 64]);
        wal.main_data_record(XLOG_RESOURCE_MANAGER, CHECKPOINT_ONLINE, &body);
    }

    #[test]
    fn ids_are_counted_from_a_checkpoint_on_also_over_the_end_of_an_epoch() {
        let mut wal = WalBuilder::small();
        wal.record(10, 0, 700, b"before anything is known");
        assert_eq!(next_after(&wal), None);
        checkpoint(&mut wal, 0x2_FFFF_FFF0);
        assert_eq!(next_after(&wal), Some(0x2_FFFF_FFF0));
        wal.record(10, 0, 0xFFFF_FFF5, b"a later one");
        assert_eq!(next_after(&wal), Some(0x2_FFFF_FFF6));
        wal.record(10, 0, 0xFFFF_FF00, b"an earlier one");
        wal.record(10, 0, 0, b"none");
        assert_eq!(next_after(&wal), Some(0x2_FFFF_FFF6));
        wal.record(10, 0, 7, b"of the next epoch");
        assert_eq!(next_after(&wal), Some(0x3_0000_0008));
        checkpoint(&mut wal, 0x3_0000_0005);
        assert_eq!(next_after(&wal), Some(0x3_0000_0008), "it began before");
    }
}
