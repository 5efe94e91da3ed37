//! Whether what is held, and every file, is what the primary wrote.

use std::path::Path;

use super::disk::SimDisk;
use super::truth::Truth;
use super::world::{Checked, Live};
use crate::store::Read;
use crate::store::error::ReadError;
use crate::wal::segment::SegmentFile;
use crate::wal::{Lsn, LsnRange, SegmentName};

impl Live {
    /// Reads a range and compares it with the truth. Only behind `right`, and where the store says itself that nothing
    /// proves it, there may be other bytes.
    pub(super) fn check_range(&mut self, truth: &Truth, right: Option<Lsn>, start: Lsn, end: Lsn) -> Checked {
        let unproven = self.shared.unproven.ranges();
        let is_excused = |at: Lsn| {
            right < Some(at.advance(1))
                && unproven.iter().any(|range| range.start() <= at && at < range.end())
        };
        let mut at = start;
        while let Some(range) = LsnRange::new(at, at.advance(128 << 10).min(end)) {
            let read = match self.reader.read(range) {
                Ok(Read::Ready(parts)) => parts.concat(),
                Ok(Read::Cold(cold)) => match cold.load() {
                    Ok(()) => continue,
                    Err(ReadError::Io { .. }) => return Ok(()),
                    Err(error) => return Err(format!("cannot read {range:?}: {error}")),
                },
                Err(error) => return Err(format!("cannot read {range:?}: {error}")),
            };
            if let Some(wrong) = first_wrong(truth, range.start(), &read, is_excused) {
                return Err(format!("{range:?} is not what the primary wrote, from {wrong} on"));
            }
            at = range.end();
        }
        Ok(())
    }
}

/// The first byte that differs from what the primary wrote, and must not.
fn first_wrong(truth: &Truth, start: Lsn, held: &[u8], is_excused: impl Fn(Lsn) -> bool) -> Option<Lsn> {
    let written = truth.wal.slice(start, start.advance(held.len() as u64));
    if held == written {
        return None;
    }
    let differing = held.iter().zip(written).enumerate().filter(|(_, (held, written))| held != written);
    let mut differing = differing.map(|(offset, _)| start.advance(offset as u64));
    differing.find(|at| !is_excused(*at)).or_else(|| (held.len() > written.len()).then_some(start))
}

/// Every complete file is the primary's, and nothing lies around.
pub(super) fn check_files(disk: &SimDisk, truth: &Truth) -> Checked {
    let size = truth.wal.context().segment_size;
    for path in disk.paths() {
        if path.parent() != Some(Path::new("/data/wal")) {
            continue;
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        match SegmentName::parse(&name, size) {
            Some((segment, SegmentFile::Complete)) => {
                let start = segment.number.start(size).unwrap();
                let content = disk.content(&path).unwrap();
                if let Some(wrong) = first_wrong(truth, start, &content, |_| false) {
                    return Err(format!("{name} is not what the primary wrote, from {wrong} on"));
                }
            }
            Some((_, SegmentFile::Partial)) => {}
            None if name.starts_with("walrelay.spare.") || name == "walrelay.reserve" => {}
            // From a directory whose names were made durable out of order.
            None if name.contains(".partial.detached") => {}
            None => return Err(format!("{name} lies around")),
        }
    }
    Ok(())
}
