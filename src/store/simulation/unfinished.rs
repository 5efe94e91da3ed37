//! Records of which a part has come when it crashes: never acknowledged, and nothing before them is lost.

use bytes::Bytes;

use super::disk::Crash;
use super::named::flushed;
use super::torn::make_durable;
use super::truth::{Truth, truths};
use super::world::World;
use crate::store::BlockId;
use crate::wal::{Lsn, LsnRange, PAGE_BYTES};

/// A record that lies in more than two segments, and what was written before it in some megabytes.
fn long_record() -> (&'static Truth, LsnRange) {
    let is_long = |record: &&LsnRange| record.end().bytes_since(record.start()) > 2 << 20;
    let found = truths().iter().find_map(|truth| Some((truth, *truth.wal.records().iter().find(is_long)?)));
    found.unwrap()
}

/// Its first bytes, within its header, at the end of a page and of a segment and around them, and just before its end.
/// (Of the very last bytes zeros may be what they are, and they are in the file before they come.)
fn cuts(truth: &Truth, record: LsnRange) -> Vec<Lsn> {
    let segment_bytes = truth.wal.context().segment_size.bytes();
    let (start, end) = (record.start().get(), record.end().get());
    let page = (start + 30_000).next_multiple_of(PAGE_BYTES);
    let segment = (start + 1).next_multiple_of(segment_bytes);
    let around = |boundary: u64| [boundary - 1, boundary, boundary + 1, boundary + 24, boundary + 40];
    let cuts = [start + 1, start + 8, start + 20, start + 24, (start + end) / 2, end - 16];
    let cuts = cuts.into_iter().chain(around(page)).chain(around(segment)).chain([segment + segment_bytes]);
    cuts.map(|cut| Lsn::new(cut).unwrap()).collect()
}

/// A store to which all up to `end` has come, wherever that is, and is durable.
fn received(truth: &'static Truth, end: Lsn) -> World {
    let mut world = World::calm(1, 0);
    world.truth = truth;
    world.start().unwrap();
    world.live().wal_writer.begin(truth.wal.start()).unwrap();
    let mut at = truth.wal.start();
    while at < end {
        let next = at.advance(100_000).min(end);
        let bytes = Bytes::copy_from_slice(truth.wal.slice(at, next));
        world.live().wal_writer.append(at, bytes, BlockId(at.get())).unwrap();
        make_durable(&mut world);
        at = next;
    }
    world
}

#[test]
fn a_crash_in_mid_record_loses_no_more_than_that_record_and_it_was_never_acknowledged() {
    let (truth, record) = long_record();
    for cut in cuts(truth, record) {
        for crash in [Crash::Kill, Crash::PowerCut] {
            let mut world = received(truth, cut);
            let whole = usize::try_from(cut.bytes_since(truth.wal.start())).unwrap();
            let before = truth.wal.safe_end_within(whole);
            assert!(before <= record.start());
            assert_eq!(world.live().wal_writer.received(), cut);
            assert_eq!(flushed(&mut world), before, "acknowledged within the record, cut at {cut}");
            world.crash(crash).unwrap();
            assert_eq!(flushed(&mut world), before, "{crash:?} with the record cut at {cut}");
            let plan = world.live().wal_writer.plan().unwrap();
            assert!(plan.held_end == before && plan.start <= before, "{plan:?}");
            // The rest comes, and what follows.
            world.grow(record.end().bytes_since(world.primary_end()) + 500_000);
            world.settle().unwrap();
            assert!(flushed(&mut world) > record.end());
            world.crash(Crash::PowerCut).unwrap();
        }
    }
}
