//! Bits flip and messages vanish between primary and relay, or on its disk: nothing corrupt is served or acknowledged.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::support::MB;
use crate::support::compare::{assert_equal_clusters, assert_same_wal, primary_bytes, wal_files};
use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::lsn_text;
use crate::support::postgres::{Postgres, Settings};
use crate::support::powercut::Chance;
use crate::support::proxy::{Proxy, Verdict, in_pieces, wal_in};
use crate::support::raw::{Event, RawClient, error_in};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};

struct Chain {
    primary: Postgres,
    proxy: Proxy,
    relay: Relay,
    standby: Postgres,
}

fn chain() -> Option<Chain> {
    let installation = Installation::any()?;
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    let relay = Relay::streaming_from("relay", proxy.port);
    let standby = primary.standby("standby", relay.port, "");
    relay.wait_downstream("standby", "streaming");
    Some(Chain { primary, proxy, relay, standby })
}

impl Chain {
    /// Everything arrives, unchanged, here and at the standby, whose session was never fed anything else.
    fn heals(&mut self) {
        let upto = self.primary.flushed();
        self.relay.assert_running();
        self.relay.wait_flushed(upto);
        assert_same_wal(&self.relay.wal_dir(), &self.primary, upto);
        assert_equal_clusters(&self.primary, &self.standby);
        self.proxy.assert_honest();
        let complaints = self.standby.log();
        assert!(
            !complaints.contains("incorrect resource manager data checksum"),
            "the standby was fed a corrupt record"
        );
    }
}

#[test]
fn a_flipped_bit_is_never_served_nor_acknowledged_and_heals() {
    let Some(mut chain) = chain() else { return };
    let mut chance = Chance::seeded();
    for round in 0..6 {
        let at = chain.primary.insert_position() + chance.between(100, MB);
        let starts = chain.proxy.passed(|passed| passed.starts.len());
        // The highest flush position told while the spoiled byte was all the relay had of its record.
        chain.proxy.edit(flip_until_asked_again(at));
        write_wal(&chain.primary, 2 * MB);
        wait_until("the relay to ask again", || chain.proxy.passed(|passed| passed.starts.len()) > starts);
        let again = chain.proxy.passed(|passed| passed.starts[starts]);
        assert!(
            again <= at,
            "round {round}: asked again from {}, spoiled was {}",
            lsn_text(again),
            lsn_text(at)
        );
        chain.heals();
    }
    let log = chain.relay.log().to_lowercase();
    assert!(
        log.contains("checksum") || log.contains("invalid") || log.contains("unexpected"),
        "the log does not say what happened"
    );
}

#[test]
fn a_bit_that_stays_flipped_stops_at_the_last_good_record() {
    let Some(mut chain) = chain() else { return };
    write_wal(&chain.primary, MB);
    chain.relay.wait_flushed(chain.primary.flushed());
    let at = chain.primary.insert_position() + 200_000;
    let passes = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&passes);
    chain.proxy.edit(move |message| {
        if flip(message, at) {
            counted.fetch_add(1, Ordering::Relaxed);
        }
        Verdict::Forward
    });
    write_wal(&chain.primary, MB);
    wait_until("the relay to have tried three times", || passes.load(Ordering::Relaxed) >= 3);
    hold("nothing at or after the bad record is told or held", std::time::Duration::from_secs(1), || {
        chain.relay.flushed() <= at
            && chain.proxy.passed(|passed| passed.flush_max) <= at
            && chain.standby.replayed() <= at
    });
    assert!(passes.load(Ordering::Relaxed) < 40, "it asks without a pause");
    chain.proxy.edit_nothing();
    chain.heals();
}

#[test]
fn a_gap_is_never_served_nor_acknowledged_and_heals() {
    let Some(mut chain) = chain() else { return };
    for distance in [1, 8_192, 300_000, 1_500_000] {
        let at = chain.primary.insert_position() + distance;
        let starts = chain.proxy.passed(|passed| passed.starts.len());
        let told = chain.relay.times_logged("WAL arrived at");
        let mut dropped = false;
        chain.proxy.edit(move |message| match wal_in(message) {
            Some((start, wal)) if !dropped && start + wal.len() as u64 > at => {
                dropped = true;
                Verdict::Drop
            }
            _ => Verdict::Forward,
        });
        write_wal(&chain.primary, 2 * MB);
        // A gap at the end of the stream shows only when something follows.
        chain.primary.sql("create table if not exists after_gap (id int); drop table after_gap");
        wait_until("the relay to ask again", || chain.proxy.passed(|passed| passed.starts.len()) > starts);
        wait_until("the relay to tell", || chain.relay.times_logged("WAL arrived at") > told);
        chain.heals();
    }
}

#[test]
fn repeated_and_backward_messages_end_the_session_and_store_nothing() {
    let Some(mut chain) = chain() else { return };
    // After every message that is not empty comes the same again, or something from before its end.
    for before_its_end in [None, Some(1), Some(8_192), Some(500_000)] {
        let starts = chain.proxy.passed(|passed| passed.starts.len());
        let told = chain.relay.times_logged("WAL arrived at");
        let mut done = false;
        chain.proxy.edit(move |message| {
            let Some((start, wal)) = wal_in(message).filter(|(_, wal)| !done && !wal.is_empty()) else {
                return Verdict::Forward;
            };
            done = true;
            let again = before_its_end.map_or(start, |distance| start + wal.len() as u64 - distance);
            Verdict::Replace(vec![message.clone(), with_position(message, START, again)])
        });
        write_wal(&chain.primary, MB);
        wait_until("the relay to ask again", || chain.proxy.passed(|passed| passed.starts.len()) > starts);
        wait_until("the relay to tell", || chain.relay.times_logged("WAL arrived at") > told);
        chain.heals();
    }
}

#[test]
fn empty_messages_and_an_end_before_the_start_change_nothing() {
    let Some(mut chain) = chain() else { return };
    chain.proxy.edit(|message| {
        let Some((start, wal)) = wal_in(message) else { return Verdict::Forward };
        let mut empty = message[..message.len() - wal.len()].to_vec();
        let length = u32::try_from(empty.len() - 1).unwrap();
        empty[1..5].copy_from_slice(&length.to_be_bytes());
        // A walreceiver believes neither: where WAL ends upstream is told for information.
        Verdict::Replace(vec![empty, with_position(message, END, start - 1)])
    });
    write_wal(&chain.primary, 2 * MB);
    chain.heals();
    assert_eq!(chain.proxy.passed(|passed| passed.starts.len()), 1, "no reason to start again");
}

/// Where the positions stand in a message with WAL.
const START: usize = 6;
const END: usize = 14;

fn with_position(message: &[u8], field: usize, position: u64) -> Vec<u8> {
    let mut message = message.to_vec();
    message[field..field + 8].copy_from_slice(&position.to_be_bytes());
    message
}

#[test]
fn wal_in_pieces_of_any_length_is_taken() {
    let Some(mut chain) = chain() else { return };
    chain.proxy.edit(in_pieces(|| 1));
    chain.primary.sql("create table small (id int); insert into small select generate_series(1, 500)");
    chain.heals();
    let mut chance = Chance::seeded();
    chain.proxy.edit(in_pieces(move || usize::try_from(chance.between(1, 30_000)).unwrap()));
    write_wal(&chain.primary, 3 * MB);
    chain.heals();
    assert_eq!(chain.proxy.passed(|passed| passed.starts.len()), 1, "pieces are no reason to start again");
}

#[test]
fn a_spoiled_zero_tail_after_a_switch_is_noticed() {
    let Some(mut chain) = chain() else { return };
    chain.primary.sql("create table t (id int)");
    let segment_end = chain.primary.insert_position().next_multiple_of(MB);
    let starts = chain.proxy.passed(|passed| passed.starts.len());
    chain.proxy.edit(flip_until_asked_again(segment_end - 20_000));
    chain.primary.switch_wal();
    write_wal(&chain.primary, MB);
    wait_until("the relay to ask again", || chain.proxy.passed(|passed| passed.starts.len()) > starts);
    chain.heals();
}

#[test]
fn a_bit_that_rots_on_disk_is_not_served() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port)
        .with("store.tail_size", "\"4MB\"")
        .with("store.unwritten_size", "\"4MB\"");
    relay.start();
    write_wal(&primary, 20 * MB);
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    let first = relay.oldest();
    let files = wal_files(&relay.wal_dir(), MB, 1);
    let (&rotten, path) = files.iter().nth(2).unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    bytes[500_000] ^= 4;
    std::fs::write(path, bytes).unwrap();

    let mut other = RawClient::replication(relay.port).unwrap();
    let newest = upto - upto % MB;
    other.start_replication(None, newest, 1).unwrap();
    let mut client = RawClient::replication(relay.port).unwrap();
    client.start_replication(None, first, 1).unwrap();
    let mut served = first;
    let last = loop {
        match client.next_event(std::time::Duration::from_secs(10)) {
            Event::Wal { start, bytes, .. } => {
                let end = start + bytes.len() as u64;
                assert!(
                    bytes == primary_bytes(&primary.wal_dir(), MB, start, end),
                    "wrong bytes were served"
                );
                served = end;
            }
            Event::Keepalive { .. } => {}
            last => break last,
        }
    };
    assert!(served <= rotten + 500_000, "the rotten byte was served");
    if let Event::Other(message) = &last {
        let error = error_in(std::slice::from_ref(message)).expect("an error");
        assert!(["XX001", "58030", "58P01"].contains(&error.code.as_str()), "{error:?}");
    } else {
        panic!("the session should end with an error, not {last:?}");
    }
    relay.assert_running();
    write_wal(&primary, MB);
    other.read_wal(newest, primary.flushed());
}

fn flip(message: &mut [u8], at: u64) -> bool {
    let Some((start, wal)) = wal_in(message) else { return false };
    if !(start..start + wal.len() as u64).contains(&at) {
        return false;
    }
    let offset = message.len() - wal.len() + usize::try_from(at - start).unwrap();
    message[offset] ^= 0x20;
    true
}

/// Flips the byte the first time it passes, and leaves the repetition alone.
fn flip_until_asked_again(at: u64) -> impl FnMut(&mut Vec<u8>) -> Verdict + Send {
    let mut done = false;
    move |message| {
        if !done {
            done = flip(message, at);
        }
        Verdict::Forward
    }
}
