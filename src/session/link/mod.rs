//! The sending side of compressed links: what is shared, how much is compressed, and how fast it may go.
//!
//! Owns the decisions; nothing here compresses, reads WAL or knows a socket. [`ring`] says what a link sends next beside the
//! others of its kind, [`ladder`] how it is compressed, [`pace`] when.

pub mod ladder;
pub mod load;
pub mod pace;
pub mod ring;
pub mod shrinkage;

pub use ladder::{Ladder, Rung};
pub use load::{Load, LoadMeter, Waiting};
pub use pace::{Bucket, Urgency};
pub use ring::{Begun, EpochCause, Place, Ring, Step};
pub use shrinkage::Shrinkage;

use crate::wal::Lsn;

/// End of the standalone frame that begins at `start`, when WAL up to `limit` is wanted; `None` when there is none.
///
/// `limit` must be a place where a message may end. Frames end at the same places on every link, so that those that catch
/// up at about the same time can share them.
pub fn bulk_end(start: Lsn, limit: Lsn) -> Option<Lsn> {
    let aligned = (start.get() / BULK_FRAME_BYTES + 1).checked_mul(BULK_FRAME_BYTES).and_then(Lsn::new);
    let end = aligned.map_or(limit, |aligned| aligned.min(limit));
    (end > start).then_some(end)
}

/// WAL in a standalone frame, where so much is there. As much as a receive block, so that it fills one.
pub const BULK_FRAME_BYTES: u64 = 256 << 10;

/// A link that is not further behind is live: the others catch up.
pub const LIVE_LAG_MAX: u64 = 1 << 20;

const _: () = assert!(BULK_FRAME_BYTES.is_multiple_of(crate::wal::PAGE_BYTES));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standalone_frames_end_at_the_same_places_wherever_they_begin() {
        let at = |raw| Lsn::new(raw).unwrap();
        let far = at(1 << 30);
        assert_eq!(bulk_end(at(0x100_0000), far), Some(at(0x104_0000)));
        assert_eq!(bulk_end(at(0x100_0001), far), Some(at(0x104_0000)));
        assert_eq!(bulk_end(at(0x103_FFFF), far), Some(at(0x104_0000)));
        assert_eq!(bulk_end(at(0x103_0000), at(0x103_0008)), Some(at(0x103_0008)));
        assert_eq!(bulk_end(at(0x103_0000), at(0x103_0000)), None);
        assert_eq!(bulk_end(at(u64::MAX - 5), at(u64::MAX)), Some(at(u64::MAX)));
    }
}
