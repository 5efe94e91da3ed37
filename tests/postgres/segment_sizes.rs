//! Every size of segment, records longer than several of them, and storms of pg_switch_wal.

use std::time::Duration;

use crate::support::MB;
use crate::support::compare::{assert_equal_clusters, assert_same_wal};
use crate::support::lab::Installation;
use crate::support::load::{Load, write_wal};
use crate::support::postgres::{Postgres, Settings};
use crate::support::receivewal::PgReceivewal;
use crate::support::relay::Relay;
use crate::support::wait::wait_until;

/// `turn` chooses the major.
fn arrives_everywhere(turn: usize, segment_size_mb: u64, write: impl FnOnce(&Postgres)) {
    let Some(installation) = Installation::in_turn(turn) else { return };
    let primary =
        Settings::new().segment_size_mb(segment_size_mb).line("max_wal_size = 2GB").start(&installation);
    let segment_bytes = segment_size_mb * MB;
    let mut relay = Relay::new("relay", primary.port).with("store.wal_keep_size", "\"4GB\"");
    relay.start();
    let standby = primary.standby("standby", relay.port, "");
    let receiver = PgReceivewal::start(&installation, relay.port, &[]);
    relay.wait_downstream("pg_receivewal", "streaming");
    write(&primary);
    primary.sql("create table last_word (id int)");
    let upto = primary.switch_wal();
    primary.checkpoint();
    assert_equal_clusters(&primary, &standby);
    relay.wait_flushed(primary.flushed());
    assert_same_wal(&relay.wal_dir(), &primary, primary.flushed());
    let complete = upto - upto % segment_bytes;
    wait_until("pg_receivewal to complete its segments", || receiver.completed(segment_bytes) >= complete);
    assert_same_wal(receiver.folder(), &primary, complete);
}

#[test]
fn segments_of_1_mb() {
    arrives_everywhere(1, 1, |primary| write_wal(primary, 10 * MB));
}

#[test]
fn segments_of_16_mb() {
    arrives_everywhere(2, 16, |primary| write_wal(primary, 40 * MB));
}

#[test]
fn segments_of_64_mb() {
    arrives_everywhere(0, 64, |primary| write_wal(primary, 80 * MB));
}

#[test]
fn a_record_longer_than_several_segments() {
    arrives_everywhere(2, 1, |primary| {
        for megabytes in [1, 3, 9] {
            primary.sql(&format!(
                "select pg_logical_emit_message(false, 'long', repeat('x', {megabytes} * 1024 * 1024 + 13))"
            ));
        }
    });
}

#[test]
fn records_that_end_exactly_where_pages_and_segments_end() {
    arrives_everywhere(1, 1, |primary| {
        // Messages of every length modulo 8 KiB in steps that meet each alignment, over several segments.
        primary.sql("select pg_logical_emit_message(false, 'step', repeat('y', 8 * (i % 1031))) from generate_series(1, 2500) i");
        for _ in 0..3 {
            fill_segment_exactly(primary);
        }
    });
}

/// Emits a message so long that the position after it is the first of the next segment, or close to it.
fn fill_segment_exactly(primary: &Postgres) {
    let overhead = 24 + 2 + 8 * 4 + 5;
    let position = primary.insert_position();
    let left = position.next_multiple_of(MB) - position;
    let pages = left / 8192;
    let length = left.saturating_sub(pages * 24 + overhead);
    primary.sql(&format!("select pg_logical_emit_message(false, 'exact', repeat('z', {length}))"));
}

#[test]
fn a_storm_of_pg_switch_wal() {
    arrives_everywhere(0, 1, |primary| {
        let load = Load::start(primary, Duration::from_millis(1));
        for _ in 0..60 {
            primary.switch_wal();
        }
        drop(load);
        for _ in 0..10 {
            primary.sql("select pg_logical_emit_message(false, 'one', 'x')");
            primary.switch_wal();
        }
    });
}

#[test]
fn a_storm_of_pg_switch_wal_with_large_segments() {
    arrives_everywhere(2, 16, |primary| {
        for _ in 0..8 {
            primary.sql("select pg_logical_emit_message(true, 'one', 'x')");
            primary.switch_wal();
        }
    });
}
