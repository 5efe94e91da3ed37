//! No message, and no position that is told, ends where a standby could be wedged, whatever the pattern of arrival.
//!
//! A standby takes every byte it got for readable. If what it has ends right behind a page header, its page validation
//! fails and it stays wedged until it is restarted. Allowed are page boundaries and record ends, rounded up to 8; a record
//! that ends at a page boundary ends at it. The oracle is pg_waldump over the primary's files.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::support::compare::{assert_equal_clusters, waldump};
use crate::support::lab::Installation;
use crate::support::load::{Load, write_wal};
use crate::support::postgres::{Postgres, Settings};
use crate::support::powercut::Chance;
use crate::support::proxy::{Proxy, in_pieces};
use crate::support::raw::{Event, RawClient, identify_system};
use crate::support::relay::Relay;
use crate::support::{MB, lsn, lsn_text};

const PAGE: u64 = 8192;

#[test]
fn every_message_and_every_position_told_ends_at_a_record_or_a_page() {
    let Some(installation) = Installation::any() else { return };
    if !installation.has("pg_waldump") {
        return;
    }
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    let relay = Relay::streaming_from("relay", proxy.port);
    let mut chance = Chance::seeded();
    // Pieces of every kind: bytes, odd sizes, whole pages and their neighbours.
    proxy.edit(in_pieces(move || match chance.between(0, 6) {
        0 => 1,
        1 => 7,
        2 => 24,
        3 => 40,
        4 => 8192 - chance.between(0, 50) as usize,
        _ => chance.between(1, 20_000) as usize,
    }));
    let from = relay.oldest();
    let told = listen(&primary, relay.port, from, Duration::from_secs(6));
    told.assert_harmless(&primary, from);
}

#[test]
fn the_primary_itself_keeps_the_rule() {
    let Some(installation) = Installation::any() else { return };
    if !installation.has("pg_waldump") {
        return;
    }
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let from = primary.insert_position() / MB * MB;
    listen(&primary, primary.port, from, Duration::from_secs(2)).assert_harmless(&primary, from);
}

/// Streams from `port` while the primary is under load, and notes every position that is told.
fn listen(primary: &Postgres, port: u16, from: u64, time: Duration) -> Told {
    let mut told = Told::default();
    let mut client = RawClient::replication(port).unwrap();
    client.start_replication(None, from, 1).unwrap();
    let load = Load::start(primary, Duration::ZERO);
    let mut position = from;
    let end = std::time::Instant::now() + time;
    while std::time::Instant::now() < end {
        match client.next_event(Duration::from_millis(200)) {
            Event::Wal { start, wal_end, bytes } => {
                assert_eq!(start, position);
                position += bytes.len() as u64;
                told.ends.extend([position, wal_end]);
                told.messages += 1;
                if told.messages.is_multiple_of(20) {
                    let mut other = RawClient::replication(port).unwrap();
                    told.ends.insert(identify_system(&mut other).2);
                    client.send_status(position, position, 0).unwrap();
                }
            }
            Event::Keepalive { wal_end, .. } => {
                told.ends.insert(wal_end);
            }
            Event::Silence => {}
            other => panic!("the stream ended: {other:?}"),
        }
    }
    drop(load);
    primary.checkpoint();
    told
}

#[derive(Default)]
struct Told {
    ends: BTreeSet<u64>,
    messages: u64,
}

impl Told {
    fn assert_harmless(&self, primary: &Postgres, from: u64) {
        let records = record_starts(primary, from);
        let wedging: Vec<String> =
            self.ends.iter().filter(|&&end| !is_harmless(end, &records)).map(|&end| lsn_text(end)).collect();
        println!("{} positions from {} messages", self.ends.len(), self.messages);
        assert!(self.ends.len() > 500, "too few positions to say anything: {}", self.ends.len());
        assert!(
            wedging.is_empty(),
            "{} positions could wedge a standby: {:?}",
            wedging.len(),
            &wedging[..wedging.len().min(10)]
        );
    }
}

/// The start of a record is the end of the one before it, unless a page header lies between them.
fn is_harmless(end: u64, record_starts: &BTreeSet<u64>) -> bool {
    let header = if (end - end % PAGE).is_multiple_of(MB) { 40 } else { 24 };
    end.is_multiple_of(PAGE) || (record_starts.contains(&end) && end % PAGE != header)
}

fn record_starts(primary: &Postgres, from: u64) -> BTreeSet<u64> {
    let report = waldump(primary, &primary.wal_dir(), from, primary.flushed());
    let starts = report.lines().filter_map(|line| line.split_once(", lsn: ")?.1.split(',').next().map(lsn));
    starts.collect()
}

#[test]
fn the_oracle_knows_a_harmful_position() {
    let records = BTreeSet::from([0x10_0028, 0x10_2018, 0x10_3000]);
    assert!(is_harmless(0x10_2000, &records), "a page boundary");
    assert!(is_harmless(0x10_3000, &records), "a record's end");
    assert!(!is_harmless(0x10_2018, &records), "right behind a page header");
    assert!(!is_harmless(0x10_0028, &records), "right behind a segment's long header");
    assert!(!is_harmless(0x10_3008, &records), "inside a record");
}

#[test]
fn a_standby_whose_stream_stalls_and_breaks_anywhere_is_never_wedged() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    let relay = Relay::streaming_from("relay", proxy.port);
    let downstream = Proxy::to(relay.port);
    let mut standby = primary.standby("standby", downstream.port, "");
    let started = standby.postmaster().id();
    let mut chance = Chance::seeded();
    let mut pieces = Chance::seeded();
    proxy.edit(in_pieces(move || pieces.between(1, 5_000) as usize));
    let load = Load::start(&primary, Duration::ZERO);
    for _ in 0..25 {
        std::thread::sleep(Duration::from_millis(chance.between(20, 250)));
        match chance.between(0, 3) {
            0 => downstream.cut(),
            1 => proxy.cut(),
            _ => {
                // What it has now is all it has for a while: replay runs to the very end of it.
                proxy.stall(true);
                std::thread::sleep(Duration::from_millis(chance.between(50, 300)));
                proxy.stall(false);
            }
        }
    }
    drop(load);
    proxy.edit_nothing();
    write_wal(&primary, MB / 4);
    assert_equal_clusters(&primary, &standby);
    assert!(standby.is_running() && standby.postmaster().id() == started, "the standby had to be restarted");
}
