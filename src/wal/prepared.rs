//! Ends of prepared transactions.
//!
//! Owns one question: whose end a record is. COMMIT PREPARED is run by a session that has no transaction id of its own, so the
//! record's header names none; its main data does, behind parts of any length (`ParseCommitRecord`, `ParseAbortRecord`).

use crate::wal::contents::{Contents, Fields};
use crate::wal::record::{Record, TRANSACTION_RESOURCE_MANAGER};
use crate::wal::{WalFormat, insight};

/// The end of a prepared transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreparedEnd {
    /// The transaction.
    Of(u32),
    /// Its id lies behind what is seen of a long record.
    Unknown,
}

impl PreparedEnd {
    /// `None` if the record is no such end.
    pub fn in_record(record: &Record<'_>) -> Option<Self> {
        let is_end = record.header.resource_manager == TRANSACTION_RESOURCE_MANAGER
            && insight::ends_prepared(record.header.info);
        if !is_end {
            return None;
        }
        let xid = Contents::of(record).and_then(|contents| transaction(contents.main_data, record.format?));
        Some(xid.map_or(Self::Unknown, Self::Of))
    }
}

fn transaction(main_data: &[u8], format: WalFormat) -> Option<u32> {
    let mut fields = Fields(main_data);
    fields.skip(TIME_BYTES)?;
    let parts = fields.u32()?;
    if parts & DATABASE != 0 {
        fields.skip(DATABASE_BYTES)?;
    }
    let statistics_bytes = if format < WalFormat::V18 { 12 } else { 16 };
    let lists = [(SUBTRANSACTIONS, 4), (RELATIONS, 12), (STATISTICS, statistics_bytes), (INVALIDATIONS, 16)];
    for (_, item_bytes) in lists.into_iter().filter(|(part, _)| parts & part != 0) {
        let items = usize::try_from(fields.u32()?).ok()?;
        fields.skip(items.checked_mul(item_bytes)?)?;
    }
    if parts & TWO_PHASE == 0 {
        return None;
    }
    fields.u32()
}

/// The time of the end; which parts follow comes after it (`XLOG_XACT_HAS_INFO`, always set where there is one).
const TIME_BYTES: usize = 8;
/// Database and tablespace.
const DATABASE_BYTES: usize = 8;
/// `XACT_XINFO_HAS_DBINFO`.
const DATABASE: u32 = 1;
/// `XACT_XINFO_HAS_SUBXACTS`.
const SUBTRANSACTIONS: u32 = 1 << 1;
/// `XACT_XINFO_HAS_RELFILELOCATORS`.
const RELATIONS: u32 = 1 << 2;
/// `XACT_XINFO_HAS_INVALS`.
const INVALIDATIONS: u32 = 1 << 3;
/// `XACT_XINFO_HAS_TWOPHASE`.
const TWO_PHASE: u32 = 1 << 4;
/// `XACT_XINFO_HAS_DROPPED_STATS`, since 15.
const STATISTICS: u32 = 1 << 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::Scanner;
    use crate::wal::builder::WalBuilder;
    use crate::wal::record::RecordVisitor;

    #[derive(Default)]
    struct Ends(Vec<Option<PreparedEnd>>);

    impl RecordVisitor for Ends {
        fn record(&mut self, record: &Record<'_>) {
            self.0.push(PreparedEnd::in_record(record));
        }
    }

    /// Main data with these parts, each list with so many items; the id is 770.
    fn main_data(parts: u32, items: u32) -> Vec<u8> {
        let mut data = vec![9; TIME_BYTES];
        data.extend((parts | TWO_PHASE).to_le_bytes());
        if parts & DATABASE != 0 {
            data.extend([9; DATABASE_BYTES]);
        }
        for (part, bytes) in [(SUBTRANSACTIONS, 4), (RELATIONS, 12), (STATISTICS, 12), (INVALIDATIONS, 16)] {
            if parts & part != 0 {
                data.extend(items.to_le_bytes());
                data.extend(vec![9; items as usize * bytes]);
            }
        }
        data.extend(770_u32.to_le_bytes());
        data
    }

    #[test]
    fn the_id_is_found_behind_every_combination_of_parts() {
        let every = [DATABASE, SUBTRANSACTIONS, RELATIONS, INVALIDATIONS, STATISTICS];
        let mut wal = WalBuilder::small();
        let mut expected = Vec::new();
        for (info, subset) in
            [0xB0, 0xC0].into_iter().flat_map(|info| (0..32_u32).map(move |set| (info, set)))
        {
            let bits = every.iter().enumerate().filter(|(bit, _)| subset & (1 << bit) != 0);
            let parts = bits.fold(0, |parts, (_, part)| parts | part);
            let data = main_data(parts, subset % 4);
            wal.main_data_record(TRANSACTION_RESOURCE_MANAGER, info, &data);
            expected.push(Some(PreparedEnd::Of(770)));
            // Of one that is cut short nothing is said, and nothing breaks.
            wal.main_data_record(TRANSACTION_RESOURCE_MANAGER, info, &data[..data.len() - 1]);
            expected.push(Some(PreparedEnd::Unknown));
        }
        wal.main_data_record(TRANSACTION_RESOURCE_MANAGER, 0xB0, &main_data(INVALIDATIONS, 100));
        expected.push(Some(PreparedEnd::Unknown));
        wal.main_data_record(TRANSACTION_RESOURCE_MANAGER, 0x80, &main_data(0, 0));
        wal.main_data_record(10, 0xB0, &main_data(0, 0));
        expected.extend([None, None]);
        let mut ends = Ends::default();
        Scanner::at_segment_start(wal.context(), wal.start()).feed(wal.bytes(), &mut ends).unwrap();
        assert_eq!(ends.0, expected);
    }
}
