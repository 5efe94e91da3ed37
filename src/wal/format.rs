//! WAL formats: one for each major version of the server.
//!
//! Owns what differs between them: the magic number of a page, the flag bits of a page header, the flag bits of a
//! full-page image, the resource managers, the longest record. Parses nothing.

/// The WAL format of a major version of the server. All but the differences named here is the same in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalFormat {
    /// PostgreSQL 13.
    V13,
    /// PostgreSQL 14.
    V14,
    /// PostgreSQL 15: other bits for full-page images, custom resource managers.
    V15,
    /// PostgreSQL 16: a lower limit of a record's length.
    V16,
    /// PostgreSQL 17.
    V17,
    /// PostgreSQL 18.
    V18,
    /// PostgreSQL 19: one page flag was dropped and another took its bit.
    V19,
}

impl WalFormat {
    /// Every format, oldest first.
    pub const ALL: [Self; 7] = [Self::V13, Self::V14, Self::V15, Self::V16, Self::V17, Self::V18, Self::V19];

    /// The magic number at the start of each page (`XLOG_PAGE_MAGIC`).
    pub const fn magic(self) -> u16 {
        match self {
            Self::V13 => 0xD106,
            Self::V14 => 0xD10D,
            Self::V15 => 0xD110,
            Self::V16 => 0xD113,
            Self::V17 => 0xD116,
            Self::V18 => 0xD118,
            Self::V19 => 0xD121,
        }
    }

    /// The format whose pages begin with `magic`.
    pub fn from_magic(magic: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.magic() == magic)
    }

    /// The server's major version.
    pub const fn major(self) -> u32 {
        match self {
            Self::V13 => 13,
            Self::V14 => 14,
            Self::V15 => 15,
            Self::V16 => 16,
            Self::V17 => 17,
            Self::V18 => 18,
            Self::V19 => 19,
        }
    }

    /// The format of a server of this major version.
    pub fn from_major(major: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.major() == major)
    }

    /// Bits that may be set in a page's `xlp_info` (`XLP_ALL_FLAGS`).
    pub const fn page_flags(self) -> u16 {
        match self {
            Self::V13 | Self::V14 | Self::V15 | Self::V16 | Self::V17 | Self::V18 => 0x000F,
            Self::V19 => 0x0007,
        }
    }

    /// The bit of a page whose first record replaces a continuation that was lost
    /// (`XLP_FIRST_IS_OVERWRITE_CONTRECORD`).
    pub const fn overwrite_contrecord_flag(self) -> u16 {
        match self {
            Self::V13 | Self::V14 | Self::V15 | Self::V16 | Self::V17 | Self::V18 => 0x0008,
            Self::V19 => 0x0004,
        }
    }

    /// Bits of a full-page image's `bimg_info` that say it is compressed.
    pub const fn image_compressed_flags(self) -> u8 {
        match self {
            Self::V13 | Self::V14 => 0x02,
            Self::V15 | Self::V16 | Self::V17 | Self::V18 | Self::V19 => 0x1C,
        }
    }

    /// Whether records may have this resource manager (`RmgrIdIsValid`).
    pub const fn is_resource_manager(self, id: u8) -> bool {
        match self {
            Self::V13 | Self::V14 => id <= 21,
            Self::V15 | Self::V16 | Self::V17 | Self::V18 => id <= 21 || id >= CUSTOM_RESOURCE_MANAGER_MIN,
            Self::V19 => id <= 22 || id >= CUSTOM_RESOURCE_MANAGER_MIN,
        }
    }

    /// Longest record, header included: `XLogRecordMaxSize`; before 16, what the server can allocate (`MaxAllocSize`).
    pub const fn record_bytes_max(self) -> u32 {
        match self {
            Self::V13 | Self::V14 | Self::V15 => 0x3FFF_FFFF,
            Self::V16 | Self::V17 | Self::V18 | Self::V19 => 1020 << 20,
        }
    }
}

/// First resource manager number given to extensions (`RM_MIN_CUSTOM_ID`).
pub const CUSTOM_RESOURCE_MANAGER_MIN: u8 = 128;

/// A page's first data continues a record of the page before (`XLP_FIRST_IS_CONTRECORD`).
pub const PAGE_FIRST_IS_CONTRECORD: u16 = 0x0001;

/// A page has the long header (`XLP_LONG_HEADER`).
pub const PAGE_LONG_HEADER: u16 = 0x0002;

/// Block images on a page may be left out of copies (`XLP_BKP_REMOVABLE`; up to 18, set on nearly every page).
pub const PAGE_BLOCKS_REMOVABLE: u16 = 0x0004;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magic_and_major_identify_the_format() {
        for format in WalFormat::ALL {
            assert_eq!(WalFormat::from_magic(format.magic()), Some(format));
            assert_eq!(WalFormat::from_major(format.major()), Some(format));
            assert_eq!(
                format.page_flags() & format.overwrite_contrecord_flag(),
                format.overwrite_contrecord_flag()
            );
        }
        assert_eq!(WalFormat::from_magic(0), None);
        assert_eq!(WalFormat::from_major(12), None);
    }
}
