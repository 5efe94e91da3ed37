//! pg_receivewal drains from the relay, in each of its ways, and its files are the primary's.

use crate::support::MB;
use crate::support::compare::{assert_same_wal, waldump};
use crate::support::lab::{Installation, chosen_majors};
use crate::support::load::{pgbench, pgbench_tables, write_wal};
use crate::support::postgres::{Postgres, Settings};
use crate::support::receivewal::PgReceivewal;
use crate::support::relay::Relay;
use crate::support::wait::wait_until;

#[test]
fn files_are_the_primarys_on_every_major() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = Settings::new().segment_size_mb(1).start(&installation);
        let relay = Relay::streaming_from("relay", primary.port);
        drain(&primary, &relay, &[]);
    }
}

#[test]
fn with_a_slot_that_it_creates() {
    let Some(installation) = Installation::in_turn(2) else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let relay = Relay::streaming_from("relay", primary.port);
    create_slot(&installation, relay.port, "drain");
    drain(&primary, &relay, &["--slot=drain"]);
    let slots = relay.status()["slots"].clone();
    assert_eq!(slots[0]["slot_name"], "drain");
    drop_slot(&installation, relay.port, "drain");
    wait_until("the slot to be gone", || relay.status()["slots"].as_array().is_some_and(Vec::is_empty));
}

#[test]
fn synchronous_with_and_without_a_slot() {
    // It tells what it flushed at these times, and not at once.
    const TELL: &str = "--status-interval=1";
    let mut ways = vec![vec!["--synchronous", TELL], vec!["--synchronous", TELL, "--slot=sync"]];
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = Settings::new().segment_size_mb(1).start(&installation);
        let relay = Relay::streaming_from("relay", primary.port);
        create_slot(&installation, relay.port, "sync");
        for arguments in &ways {
            let receiver = drain(&primary, &relay, arguments);
            let upto = primary.flushed();
            wait_until("the relay to hear of the flush", || {
                relay.downstream("pg_receivewal").iter().any(|session| {
                    session["flush_lsn"].as_str().is_some_and(|text| crate::support::lsn(text) >= upto)
                })
            });
            drop(receiver);
        }
        // Without a slot every major does the same: once is enough.
        ways.retain(|arguments| arguments.len() > 2);
    }
}

#[test]
fn through_two_relays() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let near = Relay::streaming_from("near", primary.port);
    let far = Relay::streaming_from("far", near.port);
    drain(&primary, &far, &[]);
}

#[test]
fn one_that_comes_late_gets_everything_from_its_slot_on() {
    let Some(installation) = Installation::in_turn(2) else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port)
        .with("store.tail_size", "\"4MB\"")
        .with("store.unwritten_size", "\"4MB\"")
        .with("store.wal_keep_size", "\"2MB\"");
    relay.start();
    let mut client = crate::support::raw::RawClient::replication(relay.port).unwrap();
    client.rows("CREATE_REPLICATION_SLOT late PHYSICAL RESERVE_WAL").unwrap();
    let oldest = relay.oldest();
    write_wal(&primary, 30 * MB);
    relay.wait_flushed(primary.flushed());
    assert_eq!(relay.oldest(), oldest, "WAL that a slot needs was removed");
    let receiver = drain(&primary, &relay, &["--slot=late"]);
    wait_until("WAL that nobody needs to go", || relay.oldest() > oldest);
    drop(receiver);
}

/// Writes WAL of many kinds while pg_receivewal runs, and compares what it has at the end.
fn drain(primary: &Postgres, relay: &Relay, arguments: &[&str]) -> PgReceivewal {
    let receiver = PgReceivewal::start(&primary.installation, relay.port, arguments);
    relay.wait_downstream("pg_receivewal", "streaming");
    pgbench_tables(primary, 1);
    assert!(pgbench(primary, 2, 1).wait_for_end().success());
    primary.switch_wal();
    write_wal(primary, 4 * MB);
    let upto = primary.switch_wal();
    let upto = upto - upto % MB;
    wait_until("pg_receivewal to complete its segments", || receiver.completed(MB) >= upto);
    let first = assert_same_wal(receiver.folder(), primary, upto);
    if primary.installation.has("pg_waldump") {
        waldump(primary, receiver.folder(), first, upto);
    }
    receiver
}

fn create_slot(installation: &Installation, port: u16, name: &str) {
    slot_command(installation, port, name, "--create-slot");
}

fn drop_slot(installation: &Installation, port: u16, name: &str) {
    slot_command(installation, port, name, "--drop-slot");
}

fn slot_command(installation: &Installation, port: u16, name: &str, command: &str) {
    let folder = crate::support::lab::scratch();
    PgReceivewal::program(installation, port, folder.path()).args([&format!("--slot={name}"), command]).run();
}
