//! Bytes that no checksum covers, torn before their first sync: recovery cannot tell, the upstream can.

use bytes::Bytes;

use super::disk::Crash;
use super::named::{current, flushed, partial};
use super::truth::{Truth, truths, truths_with_a_head};
use super::world::World;
use crate::store::BlockId;
use crate::store::error::AppendError;
use crate::store::flush::Step;
use crate::wal::builder::WalBuilder;
use crate::wal::{Lsn, LsnRange, SegmentNo};

/// A store that has received about so many bytes of a truth; all is durable, nothing sealed.
fn received(truth: &'static Truth, bytes: u64) -> World {
    let mut world = World::calm(1, 0);
    world.truth = truth;
    world.grow(bytes);
    world.start().unwrap();
    while flushed(&mut world) < world.primary_end() {
        world.deliver().unwrap();
        make_durable(&mut world);
    }
    world
}

pub(super) fn make_durable(world: &mut World) {
    let live = world.live();
    live.wal_writer.submit();
    while live.writer.step() == Step::Worked {}
    if let Some(job) = live.syncer.take() {
        live.syncer.run(&job);
    }
}

/// A store whose unsealed segment has the rest of a record that was never completed, and other WAL on both sides.
fn with_an_overwritten_record() -> (World, LsnRange) {
    let within_a_segment = |truth: &&'static Truth| {
        let size = truth.wal.context().segment_size;
        let is_within =
            |gap: &LsnRange| (100_000..800_000).contains(&size.offset_of(gap.start())) && gap.bytes() > 9000;
        truth.gaps().into_iter().find(is_within).map(|gap| (*truth, gap))
    };
    let (truth, gap) = truths().iter().find_map(|truth| within_a_segment(&truth)).unwrap();
    let mut world = World::calm(1, 0);
    world.truth = truth;
    world.grow(gap.end().bytes_since(truth.wal.start()) + 100_000);
    world.start().unwrap();
    world.settle().unwrap();
    let size = truth.wal.context().segment_size;
    assert_eq!(SegmentNo(current(&mut world)), SegmentNo::holding(gap.start(), size));
    (world, gap)
}

/// A crash in which bytes of an unsealed segment were never written.
fn tear(world: &mut World, range: LsnRange) {
    let size = world.truth.wal.context().segment_size;
    let mut at = range.start();
    while at < range.end() {
        let number = SegmentNo::holding(at, size);
        let end = range.end().min(number.end(size));
        let offset =
            |position: Lsn| usize::try_from(position.bytes_since(number.start(size).unwrap())).unwrap();
        // Page headers are checked, whatever they are in.
        let is_header = |within: &usize| within % 8192 < 40;
        let path = partial(world, number.0);
        world.disk.tamper(&path, |content| {
            (offset(at)..offset(end))
                .filter(|within| !is_header(within))
                .for_each(|within| content[within] = 0xEE);
        });
        at = end;
    }
    world.excuse_loss();
    let before = flushed(world);
    world.crash(Crash::PowerCut).unwrap();
    assert_eq!(flushed(world), before, "what may have been acknowledged stays");
}

fn held(world: &mut World, range: LsnRange) -> Vec<u8> {
    let size = world.truth.wal.context().segment_size;
    let number = SegmentNo::holding(range.start(), size);
    let content = world.disk.content(&partial(world, number.0)).unwrap();
    let offset = |position: Lsn| usize::try_from(position.bytes_since(number.start(size).unwrap())).unwrap();
    content[offset(range.start())..offset(range.end())].to_vec()
}

/// The body of a record that was never completed, behind its header and on its first page.
fn body(gap: LsnRange) -> LsnRange {
    let start = gap.start().advance(64);
    LsnRange::new(start, start.advance(400).min(gap.end())).unwrap()
}

/// A session delivers all that is held once more.
fn compare_all(world: &mut World) {
    let end = world.primary_end();
    world.deliver().unwrap();
    assert!(world.live().wal_writer.received() < end);
    while world.live().wal_writer.received() < end {
        world.deliver().unwrap();
    }
}

fn assert_heals(mut world: World, torn: LsnRange) {
    let oldest = world.live().shared.oldest().unwrap();
    let plan = world.live().wal_writer.plan().unwrap();
    assert!(plan.start <= torn.start(), "{plan:?}");
    assert!(plan.start >= oldest);
    let now = std::time::Instant::now();
    while world.live().keeper.step(now) == Step::Worked {}
    let number = SegmentNo::holding(torn.start(), world.truth.wal.context().segment_size);
    assert!(world.live().shared.partials.lock().contains_key(&number), "not sealed");
    world.settle().unwrap();
    assert!(world.live().shared.unproven.is_empty());
    world.grow(3_000_000);
    world.settle().unwrap();
    world.crash(Crash::PowerCut).unwrap();
}

#[test]
fn a_torn_record_that_was_never_completed_is_replaced() {
    let (mut world, gap) = with_an_overwritten_record();
    tear(&mut world, body(gap));
    assert_heals(world, body(gap));
}

#[test]
fn a_torn_head_in_the_first_segment_is_replaced() {
    let mut world = received(&truths_with_a_head()[0], 300_000);
    let torn =
        LsnRange::new(world.truth.wal.start().advance(600), world.truth.wal.start().advance(1000)).unwrap();
    tear(&mut world, torn);
    assert_heals(world, torn);
}

#[test]
fn a_torn_head_of_several_segments_is_replaced() {
    let truth = &truths_with_a_head()[1];
    // Just before and behind a segment's end; the whole of it, which is more than one session may replace.
    let (start, end) = (truth.wal.start(), truth.wal.start().advance(2_200_000));
    for (from, to) in
        [(start.advance(1 << 20), end), (start.advance(1_200_000), end), (start.advance(50), end)]
    {
        let mut world = received(truth, 2_500_000);
        let torn = LsnRange::new(from, to).unwrap();
        tear(&mut world, torn);
        assert_heals(world, torn);
    }
}

#[test]
fn torn_zeros_after_a_switch_are_made_whole() {
    let mut wal = WalBuilder::small();
    wal.noise(100_000);
    wal.switch();
    let torn_at = usize::try_from(wal.zero_tails()[0].start().bytes_since(wal.start())).unwrap() + 300_000;
    let truth: &'static Truth = Box::leak(Box::new(Truth::of(wal)));
    let mut world = received(truth, 1 << 20);
    let first = SegmentNo::holding(truth.wal.start(), truth.wal.context().segment_size);
    world.disk.tamper(&partial(&world, first.0), |content| content[torn_at..].fill(0xEE));
    world.crash(Crash::PowerCut).unwrap();
    assert_eq!(flushed(&mut world), truth.wal.end());
    world.settle().unwrap();
}

#[test]
fn nothing_is_reported_before_replaced_bytes_are_durable() {
    let (mut world, gap) = with_an_overwritten_record();
    tear(&mut world, body(gap));
    compare_all(&mut world);
    let live = world.live();
    live.wal_writer.submit();
    assert!(!live.wal_writer.is_overlap_proven());
    assert_eq!(live.writer.step(), Step::Worked);
    assert!(!live.wal_writer.is_overlap_proven(), "written, not synced");
    let job = live.syncer.take().unwrap();
    live.syncer.run(&job);
    assert!(live.wal_writer.is_overlap_proven());
    assert_eq!(held(&mut world, gap), world.truth.wal.slice(gap.start(), gap.end()));
}

#[test]
fn a_session_that_was_followed_by_another_proves_nothing() {
    let (mut world, gap) = with_an_overwritten_record();
    tear(&mut world, body(gap));
    compare_all(&mut world);
    let live = world.live();
    let start = live.wal_writer.plan().unwrap().start;
    live.wal_writer.begin(start).unwrap();
    make_durable(&mut world);
    assert!(!world.live().shared.unproven.is_empty(), "the second may yet replace something");
    world.settle().unwrap();
}

#[test]
fn other_wal_is_not_let_in_by_what_is_unproven() {
    let (mut world, gap) = with_an_overwritten_record();
    tear(&mut world, body(gap));
    let (truth, end) = (world.truth, world.primary_end());
    let before = held(&mut world, gap);
    let deliver = |world: &mut World, wrong: Lsn| {
        let live = world.live();
        let start = live.wal_writer.plan().unwrap().start;
        live.wal_writer.begin(start).unwrap();
        let mut bytes = truth.wal.slice(start, end).to_vec();
        bytes[usize::try_from(wrong.bytes_since(start)).unwrap()] ^= 1;
        let result = live.wal_writer.append(start, Bytes::from(bytes), BlockId(7));
        make_durable(world);
        result
    };
    // In what follows it, and in the length of what is left of it, on its second page.
    let second_page = gap.start().page_start().unwrap().advance(8192);
    assert!(second_page < gap.end());
    for wrong in [gap.end().advance(100), second_page.advance(16)] {
        let result = deliver(&mut world, wrong);
        assert!(matches!(result, Err(AppendError::Corrupt(_))), "{result:?}");
        assert!(!world.live().wal_writer.is_overlap_proven());
        assert_eq!(held(&mut world, gap), before);
    }
    world.settle().unwrap();
}

#[test]
fn a_fork_behind_what_is_unproven_is_told_and_nothing_is_replaced() {
    let mut ours = WalBuilder::small();
    ours.noise(100_000);
    ours.overwritten(1);
    let mut theirs = ours.clone();
    ours.noise(50_000);
    theirs.noise(60_000);
    let truth: &'static Truth = Box::leak(Box::new(Truth::of(ours)));
    let gap = truth.gaps()[0];
    let mut world = received(truth, 1 << 20);
    tear(&mut world, body(gap));
    let before = held(&mut world, gap);
    let live = world.live();
    let start = live.wal_writer.plan().unwrap().start;
    live.wal_writer.begin(start).unwrap();
    let bytes = Bytes::copy_from_slice(theirs.slice(start, theirs.end()));
    let result = live.wal_writer.append(start, bytes, BlockId(7));
    let forked_at = gap.end()..truth.wal.end();
    assert!(matches!(result, Err(AppendError::Diverged { at, .. }) if forked_at.contains(&at)), "{result:?}");
    make_durable(&mut world);
    assert!(!world.live().wal_writer.is_overlap_proven());
    assert_eq!(held(&mut world, gap), before);
    world.settle().unwrap();
}

#[test]
fn a_crash_at_any_change_while_bytes_are_replaced_is_survived() {
    for crash in [Crash::Kill, Crash::PowerCut] {
        for operations in 0.. {
            let (mut world, gap) = with_an_overwritten_record();
            tear(&mut world, body(gap));
            world.grow(1_500_000);
            world.disk.crash_after(operations);
            while !world.disk.has_crashed() && !world.live().shared.unproven.is_empty() {
                world.deliver().unwrap();
                make_durable(&mut world);
                world.live().keeper.step(std::time::Instant::now());
            }
            let has_crashed = world.disk.has_crashed();
            world.crash(crash).unwrap();
            world.settle().unwrap();
            world.crash(Crash::PowerCut).unwrap();
            if !has_crashed {
                assert!(operations > 1, "written and synced");
                break;
            }
        }
    }
}

#[test]
fn what_the_upstream_does_not_have_any_more_stays_and_is_sealed() {
    let (mut world, gap) = with_an_overwritten_record();
    tear(&mut world, body(gap));
    let before = held(&mut world, gap);
    let live = world.live();
    let plan = live.wal_writer.plan().unwrap();
    assert!(plan.start < plan.newest_start && plan.unproven == Some(gap.start()));
    assert_eq!(plan.start_after(None), Some(plan.start));
    assert_eq!(plan.start_after(Some(plan.start)), Some(plan.newest_start));
    assert_eq!(plan.start_after(Some(plan.newest_start)), plan.fallback);
    live.wal_writer.begin(plan.newest_start).unwrap();
    let bytes = Bytes::copy_from_slice(world.truth.wal.slice(plan.newest_start, plan.held_end));
    let live = world.live();
    live.wal_writer.append(plan.newest_start, bytes, BlockId(7)).unwrap();
    make_durable(&mut world);
    assert!(world.live().wal_writer.is_overlap_proven());
    assert_eq!(held(&mut world, gap), before);
    let plan = world.live().wal_writer.plan().unwrap();
    assert_eq!((plan.start, plan.unproven), (plan.newest_start, None));
}

#[test]
fn what_this_process_received_is_not_compared_again_from_far_back() {
    let mut world = received(&truths_with_a_head()[1], 3_000_000);
    let start = world.truth.wal.start();
    let plan = world.live().wal_writer.plan().unwrap();
    assert!(plan.start > start.advance(2 << 20) && plan.unproven.is_none());
    world.crash(Crash::PowerCut).unwrap();
    let plan = world.live().wal_writer.plan().unwrap();
    assert_eq!((plan.start, plan.unproven), (start, Some(start)));
}
