//! Page headers.
//!
//! Owns their layout. Says what a header holds, not whether it is right where it stands: that is the scanner's part.

/// Length of the header of every page but a segment's first.
pub const SHORT_HEADER_BYTES: usize = 24;

/// Length of the header of a segment's first page.
pub const LONG_HEADER_BYTES: usize = 40;

/// What begins every page (`XLogPageHeaderData`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// `xlp_magic`: tells the format.
    pub magic: u16,
    /// `xlp_info`: flags.
    pub info: u16,
    /// `xlp_tli`: the timeline of the page's first record; 0 is never right.
    pub timeline: u32,
    /// `xlp_pageaddr`: the position of the page itself.
    pub page_address: u64,
    /// `xlp_rem_len`: bytes of a record of the pages before that remain, counted from this page.
    pub remaining: u32,
}

impl PageHeader {
    /// Reads a header; any bytes are one.
    pub fn decode(bytes: &[u8; SHORT_HEADER_BYTES]) -> Self {
        let [m0, m1, i0, i1, timeline @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] = *bytes;
        let [.., a0, a1, a2, a3, a4, a5, a6, a7, r0, r1, r2, r3, _, _, _, _] = *bytes;
        Self {
            magic: u16::from_le_bytes([m0, m1]),
            info: u16::from_le_bytes([i0, i1]),
            timeline: u32::from_le_bytes(timeline),
            page_address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            remaining: u32::from_le_bytes([r0, r1, r2, r3]),
        }
    }

    /// The bytes of the header; its padding is zero.
    pub fn encode(self) -> [u8; SHORT_HEADER_BYTES] {
        let mut bytes = [0; SHORT_HEADER_BYTES];
        let fields = self
            .magic
            .to_le_bytes()
            .into_iter()
            .chain(self.info.to_le_bytes())
            .chain(self.timeline.to_le_bytes())
            .chain(self.page_address.to_le_bytes())
            .chain(self.remaining.to_le_bytes());
        bytes.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        bytes
    }
}

/// What follows the page header on a segment's first page (`XLogLongPageHeaderData`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongPageHeader {
    /// `xlp_sysid`: the cluster.
    pub system_id: u64,
    /// `xlp_seg_size`: `wal_segment_size` in bytes.
    pub segment_bytes: u32,
    /// `xlp_xlog_blcksz`: the size of a page.
    pub page_bytes: u32,
}

impl LongPageHeader {
    /// Reads the 16 bytes after the page header.
    pub fn decode(bytes: &[u8; LONG_HEADER_BYTES - SHORT_HEADER_BYTES]) -> Self {
        let [s0, s1, s2, s3, s4, s5, s6, s7, g0, g1, g2, g3, b0, b1, b2, b3] = *bytes;
        Self {
            system_id: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            segment_bytes: u32::from_le_bytes([g0, g1, g2, g3]),
            page_bytes: u32::from_le_bytes([b0, b1, b2, b3]),
        }
    }

    /// The 16 bytes after the page header.
    pub fn encode(self) -> [u8; LONG_HEADER_BYTES - SHORT_HEADER_BYTES] {
        let mut bytes = [0; LONG_HEADER_BYTES - SHORT_HEADER_BYTES];
        let fields = self
            .system_id
            .to_le_bytes()
            .into_iter()
            .chain(self.segment_bytes.to_le_bytes())
            .chain(self.page_bytes.to_le_bytes());
        bytes.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_real_first_page_of_a_segment_is_read() {
        let bytes: [u8; 40] = [
            0x10, 0xD1, 0x07, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x00,
            0x5A, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 1, 2, 3, 4, 5, 6, 7, 8, 0x00, 0x00, 0x00, 0x01,
            0x00, 0x20, 0x00, 0x00,
        ];
        let (short, long) = bytes.split_at(24);
        let short: &[u8; 24] = short.try_into().unwrap();
        let long: &[u8; 16] = long.try_into().unwrap();
        let header = PageHeader::decode(short);
        let expected =
            PageHeader { magic: 0xD110, info: 7, timeline: 1, page_address: 0x200_0000, remaining: 90 };
        assert_eq!(header, expected);
        assert_eq!(&header.encode(), short);
        let header = LongPageHeader::decode(long);
        let expected =
            LongPageHeader { system_id: 0x0807_0605_0403_0201, segment_bytes: 16 << 20, page_bytes: 8192 };
        assert_eq!(header, expected);
        assert_eq!(&header.encode(), long);
    }
}
