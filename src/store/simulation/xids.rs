//! The next transaction id, over crashes and from one timeline to the next.

use super::disk::{Crash, SimDisk};
use super::process::Live;
use crate::store::state::StateFile;
use crate::store::xids::XIDS_FILE;
use crate::wal::builder::WalBuilder;
use crate::wal::{FullXid, Lsn, TimelineId};

const NEXT: TimelineId = TimelineId::new(2).unwrap();

const EPOCH: u64 = 3 << 32;

/// A record of a transaction, and filler.
fn transaction(wal: &mut WalBuilder, xid: u32, filler: usize) {
    wal.record(10, 0, xid, b"what it did");
    wal.noise(filler);
}

/// A checkpoint that begins now, when `next` is given out next.
fn checkpoint(wal: &mut WalBuilder, next: u32) {
    let redo = wal.end();
    wal.checkpoint_with(redo, EPOCH + u64::from(next));
}

fn received(wal: &WalBuilder) -> (SimDisk, Live) {
    let disk = SimDisk::new(1);
    let mut live = Live::start(&disk, wal).unwrap();
    live.receive(wal, wal.end(), true).unwrap();
    (disk, live)
}

fn next(live: &Live) -> Option<u64> {
    live.shared.xids.next().map(|FullXid(next)| next - EPOCH)
}

fn restarted(disk: &SimDisk, live: Live, wal: &WalBuilder, crash: Crash) -> Live {
    drop(live);
    disk.restart(crash);
    Live::start(disk, wal).unwrap()
}

#[test]
fn it_is_known_after_a_crash_before_anything_is_received() {
    let mut wal = WalBuilder::small();
    checkpoint(&mut wal, 700);
    for xid in 700..710 {
        transaction(&mut wal, xid, 250_000);
    }
    let (disk, mut live) = received(&wal);
    assert_eq!(next(&live), Some(710));
    // What came after it was saved last is gone through again.
    for (xid, crash) in [(710, Crash::Kill), (711, Crash::PowerCut), (712, Crash::Kill)] {
        transaction(&mut wal, xid, 1_300_000);
        transaction(&mut wal, 650, 100);
        live.receive(&wal, wal.end(), false).unwrap();
        live = restarted(&disk, live, &wal, crash);
        assert_eq!(next(&live), Some(u64::from(xid) + 1));
    }
    // No checkpoint is needed to go on.
    transaction(&mut wal, 720, 100);
    live.receive(&wal, wal.end(), true).unwrap();
    assert_eq!(next(&live), Some(721));
}

#[test]
fn without_what_was_saved_it_is_not_known_until_a_checkpoint_was_seen_from_its_beginning() {
    let mut wal = WalBuilder::small();
    checkpoint(&mut wal, 700);
    let redo = wal.end();
    transaction(&mut wal, 705, 100);
    let (disk, live) = received(&wal);
    let StateFile { name, .. } = XIDS_FILE;
    disk.remove(&std::path::Path::new("/data").join(name));
    let mut live = restarted(&disk, live, &wal, Crash::Kill);
    assert_eq!(next(&live), None);
    wal.checkpoint_with(redo, EPOCH + 705);
    transaction(&mut wal, 600, 100);
    live.receive(&wal, wal.end(), true).unwrap();
    assert_eq!(next(&live), None, "it began when there was more");
    checkpoint(&mut wal, 706);
    transaction(&mut wal, 600, 100);
    live.receive(&wal, wal.end(), true).unwrap();
    assert_eq!(next(&live), Some(706));
}

#[test]
fn ids_beyond_a_fork_are_not_the_new_timelines() {
    for is_saved_beyond in [false, true] {
        let mut old = WalBuilder::small();
        checkpoint(&mut old, 700);
        transaction(&mut old, 700, 200_000);
        let (disk, mut live) = received(&old);
        let fork = old.end();
        let mut new = old.clone();
        new.switch_timeline(NEXT);
        for xid in 701..720 {
            transaction(&mut old, xid, 100_000);
        }
        live.receive(&old, old.end(), is_saved_beyond).unwrap();
        assert_eq!(next(&live), Some(720));
        live.wal_writer.switch(NEXT, fork).unwrap();
        // Where what was saved lies beyond the fork nothing is known any more.
        let expected = (!is_saved_beyond).then_some(701);
        assert_eq!(next(&live), expected);
        live = restarted(&disk, live, &old, Crash::PowerCut);
        assert_eq!(next(&live), expected);
        checkpoint(&mut new, 702);
        transaction(&mut new, 704, 100);
        live.receive(&new, last(&new), true).unwrap();
        assert_eq!(next(&live), Some(705));
        live = restarted(&disk, live, &old, Crash::Kill);
        assert_eq!(next(&live), Some(705));
    }
}

fn last(wal: &WalBuilder) -> Lsn {
    *wal.record_ends().last().unwrap()
}
