//! Transaction ids with their epoch, and how far the primary has come with them.
//!
//! Records hold the lower half of an id only; a checkpoint tells the whole of the next one, as it was when the checkpoint began,
//! and from there on they can be counted. Owns that count. Knows nothing of what transactions do.

use crate::wal::Lsn;
use crate::wal::contents::{Contents, Fields};
use crate::wal::insight::{Checkpoint, Event};
use crate::wal::record::{RMGR_INFO_MASK, Record, TRANSACTION_RESOURCE_MANAGER, XLOG_RESOURCE_MANAGER};

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
#[derive(Clone, Copy, Debug)]
pub struct NextXid(Count);

#[derive(Clone, Copy, Debug)]
enum Count {
    /// Not known: a checkpoint that began after `since` tells it. The newest id since then goes beyond what that says.
    Unknown {
        since: Lsn,
        newest: Option<u32>,
    },
    Known(FullXid),
}

impl NextXid {
    /// Nothing is known of ids before `since`, and all records from there on will be seen.
    pub fn counting_from(since: Lsn) -> Self {
        Self(Count::Unknown { since, newest: None })
    }

    /// It is `next` where the records begin that will be seen.
    pub fn known(next: FullXid) -> Self {
        Self(Count::Known(next))
    }

    /// The next id; `None` until a checkpoint was seen from its beginning on.
    pub fn get(&self) -> Option<FullXid> {
        match self.0 {
            Count::Unknown { .. } => None,
            Count::Known(next) => Some(next),
        }
    }

    /// Takes in a verified record.
    #[inline]
    pub fn note(&mut self, record: &Record<'_>) {
        let header = &record.header;
        if header.xid != 0 {
            self.count(header.xid);
        }
        match (header.resource_manager, header.info & RMGR_INFO_MASK) {
            (XLOG_RESOURCE_MANAGER, CHECKPOINT_SHUTDOWN | CHECKPOINT_ONLINE) => self.note_checkpoint(record),
            (STANDBY_RESOURCE_MANAGER, RUNNING_TRANSACTIONS) => self.note_others(record, newest_running),
            (TRANSACTION_RESOURCE_MANAGER, info) if info & TRANSACTION_HAS_INFO != 0 => {
                self.note_others(record, newest_child);
            }
            _ => {}
        }
    }

    /// An id was given out.
    #[inline]
    fn count(&mut self, xid: u32) {
        match &mut self.0 {
            Count::Unknown { newest, .. } => {
                if newest.is_none_or(|newest| xid.wrapping_sub(newest) < HALF_ROUND) {
                    *newest = Some(xid);
                }
            }
            Count::Known(next) => *next = next.beyond(xid),
        }
    }

    #[cold]
    fn note_checkpoint(&mut self, record: &Record<'_>) {
        let Some(Event::Checkpoint(Checkpoint { next_xid: Some(told), redo, .. })) = Event::of(record) else {
            return;
        };
        let told = FullXid(told);
        match &mut self.0 {
            Count::Known(next) => *next = told.max(*next),
            // It says what was so when it began, which may be long ago.
            Count::Unknown { since, newest } if redo >= *since => {
                self.0 = Count::Known(newest.map_or(told, |newest| told.beyond(newest)));
            }
            Count::Unknown { .. } => {}
        }
    }

    /// Ids of which no other record may tell.
    fn note_others(&mut self, record: &Record<'_>, newest: fn(&[u8]) -> Option<u32>) {
        if let Some(xid) = Contents::of(record).and_then(|contents| newest(contents.main_data)) {
            self.count(xid);
        }
    }
}

impl FullXid {
    /// The next id when `xid` was given out too, if that is not behind.
    fn beyond(self, xid: u32) -> Self {
        let Self(next) = self;
        // Ids go round; one that is not far behind is of this round, or of the next.
        let ahead = xid.wrapping_sub(self.xid());
        if ahead >= HALF_ROUND {
            return self;
        }
        let after = Self(next + u64::from(ahead) + 1);
        // The first ones of a round are not given out.
        Self(after.0 + u64::from(FIRST_NORMAL_XID.saturating_sub(after.xid())))
    }
}

/// The newest id that was given out when the running transactions were listed (`xl_running_xacts`).
fn newest_running(main_data: &[u8]) -> Option<u32> {
    let mut fields = Fields(main_data);
    // Two counts, and a flag.
    fields.skip(12)?;
    let next = fields.u32()?;
    Some(if next <= FIRST_NORMAL_XID { u32::MAX } else { next - 1 })
}

/// The newest subtransaction of one that ends, which may have written nothing itself (`xl_xact_subxacts`); as far as can be
/// seen, if they are very many.
fn newest_child(main_data: &[u8]) -> Option<u32> {
    let mut fields = Fields(main_data);
    // When.
    fields.skip(8)?;
    let parts = fields.u32()?;
    if parts & HAS_DATABASE != 0 {
        fields.skip(8)?;
    }
    if parts & HAS_SUBTRANSACTIONS == 0 {
        return None;
    }
    let count = fields.u32()?;
    // In the order of their ids.
    (0..count).map_while(|_| fields.u32()).last()
}

/// Ids that are further ahead than this are behind.
const HALF_ROUND: u32 = 1 << 31;

/// `XLOG_CHECKPOINT_SHUTDOWN`
const CHECKPOINT_SHUTDOWN: u8 = 0x00;

/// `XLOG_CHECKPOINT_ONLINE`
const CHECKPOINT_ONLINE: u8 = 0x10;

/// `RM_STANDBY_ID`
const STANDBY_RESOURCE_MANAGER: u8 = 8;

/// `XLOG_RUNNING_XACTS`
const RUNNING_TRANSACTIONS: u8 = 0x10;

/// `XLOG_XACT_HAS_INFO`: which parts follow the time of the end.
const TRANSACTION_HAS_INFO: u8 = 0x80;

/// `XACT_XINFO_HAS_DBINFO`
const HAS_DATABASE: u32 = 1;

/// `XACT_XINFO_HAS_SUBXACTS`
const HAS_SUBTRANSACTIONS: u32 = 1 << 1;

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

    fn counted(wal: &WalBuilder, count: NextXid) -> Option<u64> {
        let mut seen = Seen(count);
        Scanner::at_segment_start(wal.context(), wal.start()).feed(wal.bytes(), &mut seen).unwrap();
        seen.0.get().map(|next| next.0)
    }

    fn next_after(wal: &WalBuilder) -> Option<u64> {
        counted(wal, NextXid::counting_from(wal.start()))
    }

    #[test]
    fn ids_are_counted_from_a_checkpoint_on_also_over_the_end_of_an_epoch() {
        let mut wal = WalBuilder::small();
        wal.record(10, 0, 0xFFFF_FEFF, b"before anything is known");
        assert_eq!(next_after(&wal), None);
        let redo = wal.end();
        wal.checkpoint_with(redo, 0x2_FFFF_FFF0);
        assert_eq!(next_after(&wal), Some(0x2_FFFF_FFF0));
        wal.record(10, 0, 0xFFFF_FFF5, b"a later one");
        assert_eq!(next_after(&wal), Some(0x2_FFFF_FFF6));
        wal.record(10, 0, 0xFFFF_FF00, b"an earlier one");
        wal.record(10, 0, 0, b"none");
        assert_eq!(next_after(&wal), Some(0x2_FFFF_FFF6));
        wal.record(10, 0, u32::MAX, b"the last of its epoch");
        assert_eq!(next_after(&wal), Some(0x3_0000_0003), "the first three are nobody's");
        wal.record(10, 0, 7, b"of the next epoch");
        assert_eq!(next_after(&wal), Some(0x3_0000_0008));
        let redo = wal.end();
        wal.checkpoint_with(redo, 0x3_0000_0005);
        assert_eq!(next_after(&wal), Some(0x3_0000_0008), "it is counted already");
    }

    #[test]
    fn a_checkpoint_that_began_before_what_was_seen_tells_too_little() {
        let mut wal = WalBuilder::small();
        let redo = wal.end();
        wal.record(10, 0, 900, b"while the checkpoint is taken");
        let late = wal.end();
        wal.checkpoint_with(redo, 0x1_0000_0300);
        assert_eq!(next_after(&wal), Some(0x1_0000_0385), "what came meanwhile was counted");
        assert_eq!(counted(&wal, NextXid::counting_from(late)), None, "what came meanwhile is not known");
        let redo = wal.end();
        wal.record(10, 0, 950, b"while the next is taken");
        wal.checkpoint_with(redo, 0x1_0000_0390);
        assert_eq!(counted(&wal, NextXid::counting_from(late)), Some(0x1_0000_03B7));
        assert_eq!(counted(&wal, NextXid::known(FullXid(0x1_0000_0400))), Some(0x1_0000_0400));
    }

    #[test]
    fn ids_of_those_who_wrote_nothing_are_counted_too() {
        let known = NextXid::known(FullXid(700));
        let running = |next: u32| {
            let mut body = vec![0; 12];
            body.extend(next.to_le_bytes());
            body.extend([9; 8]);
            body
        };
        let mut wal = WalBuilder::small();
        wal.main_data_record(STANDBY_RESOURCE_MANAGER, RUNNING_TRANSACTIONS, &running(710));
        assert_eq!(counted(&wal, known), Some(710));
        let mut ended = vec![9; 8];
        ended.extend((HAS_DATABASE | HAS_SUBTRANSACTIONS).to_le_bytes());
        ended.extend([9; 8]);
        ended.extend(3_u32.to_le_bytes());
        ended.extend([711_u32, 712, 715].map(u32::to_le_bytes).concat());
        wal.main_data_record(TRANSACTION_RESOURCE_MANAGER, TRANSACTION_HAS_INFO, &ended);
        assert_eq!(counted(&wal, known), Some(716));
        // Without such parts, cut short, or just after the end of a round.
        let alone = [&[9; 8][..], &HAS_DATABASE.to_le_bytes(), &[255; 16]].concat();
        wal.main_data_record(TRANSACTION_RESOURCE_MANAGER, TRANSACTION_HAS_INFO, &alone);
        wal.main_data_record(TRANSACTION_RESOURCE_MANAGER, TRANSACTION_HAS_INFO, &ended[..20]);
        wal.main_data_record(STANDBY_RESOURCE_MANAGER, RUNNING_TRANSACTIONS, &running(3));
        assert_eq!(counted(&wal, known), Some(716));
    }
}
