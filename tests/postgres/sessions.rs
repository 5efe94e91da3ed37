//! Sessions of the same client follow one another: the old one's end must not harm the new one.

use std::time::Duration;

use crate::support::MB;
use crate::support::lab::Installation;
use crate::support::load::{Load, write_wal};
use crate::support::postgres::Settings;
use crate::support::proxy::Proxy;
use crate::support::raw::{RawClient, error_in};
use crate::support::relay::Relay;
use crate::support::wait::{wait_for, wait_until};

#[test]
fn a_slot_passes_from_session_to_session_a_hundred_times() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let relay = Relay::streaming_from("relay", primary.port);
    // However little there is at first.
    write_wal(&primary, MB / 8);
    relay.wait_flushed(primary.flushed());
    let mut client = RawClient::replication(relay.port).unwrap();
    client.rows("CREATE_REPLICATION_SLOT relayed PHYSICAL RESERVE_WAL").unwrap();
    let from = relay.oldest();
    for _ in 0..100 {
        drop(client);
        client = wait_for("the slot", || {
            let mut client = RawClient::replication(relay.port).ok()?;
            let answer = client.start_replication(Some("relayed"), from, 1).ok()?;
            match error_in(&answer) {
                None => Some(client),
                Some(error) => {
                    assert_eq!(error.code, "55006", "{error:?}");
                    None
                }
            }
        });
        client.read_wal(from, from + 8192);
    }
    let slots = relay.status()["slots"].clone();
    assert_eq!(slots[0]["active"], true, "the last session has it: {slots}");
    drop(client);
    wait_until("the slot to be free", || relay.status()["slots"][0]["active"] == false);
}

#[test]
fn a_standby_that_is_cut_off_again_and_again_has_one_session() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let relay = Relay::streaming_from("relay", primary.port);
    let mut client = RawClient::replication(relay.port).unwrap();
    client.rows("CREATE_REPLICATION_SLOT standby PHYSICAL RESERVE_WAL").unwrap();
    let between = Proxy::to(relay.port);
    let standby = primary.standby("standby", between.port, "primary_slot_name = 'standby'");
    let load = Load::start(&primary, Duration::from_millis(2));
    for _ in 0..15 {
        relay.wait_downstream("standby", "streaming");
        between.cut();
        wait_until("the old session to go", || relay.downstream("standby").len() <= 1);
    }
    drop(load);
    write_wal(&primary, MB);
    standby.wait_replayed(primary.flushed());
    wait_until("one session", || relay.downstream("standby").len() == 1);
}
