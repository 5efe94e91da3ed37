//! Record headers, and what a scan tells about a record.
//!
//! Owns the layout of a record's header and the trait through which verified records are seen.

use crate::wal::{Lsn, format::WalFormat};

/// Length of a record's header (`SizeOfXLogRecord`).
pub const RECORD_HEADER_BYTES: usize = 24;

/// Bytes of a record's header that its checksum covers; the checksum itself follows them.
pub const RECORD_HEADER_CHECKED_BYTES: usize = 20;

/// Longest [`Record::prefix`]: the headers of 33 blocks with images (27 bytes each), replication origin, top
/// transaction and main data (13), and the 107 first bytes of the main data of a record without blocks.
pub const RECORD_PREFIX_BYTES_MAX: usize = 1024;

/// What begins every record (`XLogRecord`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// `xl_tot_len`: length of the record, header included, page headers between its parts not.
    pub total_bytes: u32,
    /// `xl_xid`: the transaction, 0 for none.
    pub xid: u32,
    /// `xl_prev`: where the record before this one starts; `None` for a cluster's first.
    pub previous: Option<Lsn>,
    /// `xl_info`: what kind of record this is to its resource manager.
    pub info: u8,
    /// `xl_rmid`: who writes and replays such records.
    pub resource_manager: u8,
    /// `xl_crc`: CRC-32C of what follows the header, then of the header up to here.
    pub crc: u32,
}

impl RecordHeader {
    /// Reads a header; any bytes are one.
    #[inline]
    pub fn decode(bytes: &[u8; RECORD_HEADER_BYTES]) -> Self {
        let [t0, t1, t2, t3, x0, x1, x2, x3, rest @ ..] = *bytes;
        let [p0, p1, p2, p3, p4, p5, p6, p7, info, resource_manager, _, _, crc @ ..] = rest;
        Self {
            total_bytes: u32::from_le_bytes([t0, t1, t2, t3]),
            xid: u32::from_le_bytes([x0, x1, x2, x3]),
            previous: Lsn::from_wire(u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, p7])),
            info,
            resource_manager,
            crc: u32::from_le_bytes(crc),
        }
    }

    /// The bytes of the header; its padding is zero.
    pub fn encode(self) -> [u8; RECORD_HEADER_BYTES] {
        let mut bytes = [0; RECORD_HEADER_BYTES];
        let fields = self
            .total_bytes
            .to_le_bytes()
            .into_iter()
            .chain(self.xid.to_le_bytes())
            .chain(Lsn::to_wire(self.previous).to_le_bytes())
            .chain([self.info, self.resource_manager, 0, 0])
            .chain(self.crc.to_le_bytes());
        bytes.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        bytes
    }

    /// Whether this is an XLOG_SWITCH record: the rest of the segment is zero.
    #[inline]
    pub const fn is_switch(&self) -> bool {
        self.resource_manager == XLOG_RESOURCE_MANAGER && self.info & RMGR_INFO_MASK == XLOG_SWITCH
    }

    /// Whether this is an XLOG_OVERWRITE_CONTRECORD record: it stands where the rest of a record was lost.
    #[inline]
    pub const fn is_overwrite_contrecord(&self) -> bool {
        self.resource_manager == XLOG_RESOURCE_MANAGER
            && self.info & RMGR_INFO_MASK == XLOG_OVERWRITE_CONTRECORD
    }
}

/// A verified record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Position of its first byte.
    pub start: Lsn,
    /// First position after it, rounded up to 8; the page boundary if it fills its last page.
    pub end: Lsn,
    /// The format of the page it is on; `None` only if it was not given and no page header was seen since.
    pub format: Option<WalFormat>,
    /// Its header.
    pub header: RecordHeader,
    /// What follows the header: all of it, or the first [`RECORD_PREFIX_BYTES_MAX`] bytes.
    pub prefix: &'a [u8],
}

/// Sees each record of a scan once, in order, after it was verified.
pub trait RecordVisitor {
    /// `record` was verified whole.
    fn record(&mut self, record: &Record<'_>);
}

/// Looks at nothing.
impl RecordVisitor for () {
    #[inline]
    fn record(&mut self, _: &Record<'_>) {}
}

/// Bits of `xl_info` that belong to the resource manager (`XLR_RMGR_INFO_MASK`).
pub const RMGR_INFO_MASK: u8 = 0xF0;

/// The resource manager of the log itself (`RM_XLOG_ID`).
pub const XLOG_RESOURCE_MANAGER: u8 = 0;

/// The resource manager of transactions (`RM_XACT_ID`).
pub const TRANSACTION_RESOURCE_MANAGER: u8 = 1;

/// The rest of the segment is not used.
pub const XLOG_SWITCH: u8 = 0x40;

/// The record before this place was never completed.
pub const XLOG_OVERWRITE_CONTRECORD: u8 = 0xD0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_and_written() {
        let header = RecordHeader {
            total_bytes: 0x72,
            xid: 0x2DF,
            previous: Lsn::new(0x1_0200_0028),
            info: 0x10,
            resource_manager: 11,
            crc: 0xDEAD_BEEF,
        };
        let bytes = header.encode();
        assert_eq!(RecordHeader::decode(&bytes), header);
        assert_eq!(bytes[..4], [0x72, 0, 0, 0]);
        assert_eq!(bytes[16..20], [0x10, 11, 0, 0]);
        assert_eq!(bytes[20..], [0xEF, 0xBE, 0xAD, 0xDE]);
    }
}
