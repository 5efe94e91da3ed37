//! History files come from the upstream that is streamed from, and from no other.

use crate::support::MB;
use crate::support::compare::assert_equal_clusters;
use crate::support::faults::Faults;
use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::proxy::{Proxy, Verdict};
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::wait::wait_until;
use crate::timelines::{primary, promote_again, relay_of, wait_timeline};

/// A cluster on timeline 2, which left timeline 1 after so much WAL. All of them share a system identifier.
fn promoted_after(installation: &Installation, bytes: u64, settings: &str) -> Postgres {
    let first = Settings::new().segment_size_mb(1).start(installation);
    write_wal(&first, bytes);
    let promoted = first.standby("promoted", first.port, settings);
    promoted.promote();
    promoted
}

fn history(port: u16) -> Vec<Vec<Option<String>>> {
    RawClient::replication(port).unwrap().rows("TIMELINE_HISTORY 2").unwrap()
}

fn conninfo(server: &Postgres) -> String {
    format!("\"host=127.0.0.1 port={} user=postgres sslmode=disable\"", server.port)
}

#[test]
fn nothing_stays_of_a_server_that_was_never_streamed_from() {
    let Some(installation) = Installation::any() else { return };
    let wrong = promoted_after(&installation, 0, "max_replication_slots = 0");
    let right = promoted_after(&installation, 3 * MB, "");
    assert_ne!(history(wrong.port), history(right.port));

    // The first attempt fails at the slot, or the process dies when the history is there and nothing else.
    // (Before it comes a secret of the data directory.)
    for faults in [None, Some(Faults::kill_at("rename:2:after"))] {
        let mut relay = Relay::new("relay", wrong.port);
        match &faults {
            None => {
                relay.launch();
                relay.wait_logged("max_replication_slots");
                relay.terminate();
            }
            Some(faults) => {
                relay = relay.with_faults(faults);
                relay.unset("upstream.slot");
                relay.launch();
                assert!(!relay.wait_for_end().success());
                assert!(relay.wal_dir().join("00000002.history").exists(), "killed too early");
                relay.environment.clear();
            }
        }
        relay.set("upstream.conninfo", &conninfo(&right));
        relay.start();
        write_wal(&right, MB);
        relay.wait_flushed(right.flushed());
        assert_eq!(history(relay.port), history(right.port), "the history of another server is served");
        relay.terminate();
    }
}

#[test]
fn a_server_whose_timeline_has_another_history_is_refused() {
    let Some(installation) = Installation::any() else { return };
    let (right, wrong) = (promoted_after(&installation, 0, ""), promoted_after(&installation, 3 * MB, ""));
    let mut relay = Relay::streaming_from("relay", right.port);
    write_wal(&right, MB);
    relay.wait_flushed(right.flushed());
    relay.terminate();
    let held = history(right.port);
    relay.set("upstream.conninfo", &conninfo(&wrong));
    relay.launch();
    relay.wait_logged("history file of timeline 2 differs from the one that is stored");
    relay.wait_needs_attention();
    assert_eq!(history(relay.port), held);
    assert_eq!(wrong.sql("select count(*) from pg_replication_slots"), "0", "it left something there");
}

/// What a server says to `TIMELINE_HISTORY 2`: the file, or the code of its error.
fn second_history(port: u16) -> Result<String, String> {
    let answer = RawClient::replication(port).unwrap().rows("TIMELINE_HISTORY 2");
    answer.map(|rows| rows[0][1].clone().unwrap()).map_err(|error| error.code)
}

#[test]
fn an_ancestors_history_that_the_upstream_lacks_is_written_from_its_descendants() {
    let Some(installation) = Installation::since(15) else { return };
    let mut old = primary(&installation);
    let mut new = old.standby("next", old.port, "");
    let mut relay = relay_of(&[&old, &new]);
    relay.start();
    let standby = old.standby("standby", relay.port, "");
    write_wal(&old, MB);
    relay.wait_flushed(old.flushed());
    let mut client = RawClient::replication(relay.port).unwrap();
    client.query("CREATE_REPLICATION_SLOT early PHYSICAL RESERVE_WAL").unwrap();
    relay.terminate();
    old.stop(Stop::Fast);
    new.promote();
    write_wal(&new, MB);
    promote_again(&mut new, &old);
    // As on a server that was cloned when it was on timeline 3 already.
    let removed = new.wal_dir().join("00000002.history");
    let content = std::fs::read_to_string(&removed).unwrap();
    std::fs::remove_file(removed).unwrap();
    assert_eq!(second_history(new.port), Err("58P01".to_owned()));
    relay.start();
    wait_timeline(&relay, 3);
    assert_eq!(second_history(relay.port), Ok(content));
    // A standby on timeline 1 asks for it, and cannot go on without.
    write_wal(&new, MB);
    relay.wait_flushed(new.flushed());
    assert_equal_clusters(&new, &standby);
    // Where a slot is does not hang on a file.
    for name in ["00000002.history", "00000003.history"] {
        std::fs::remove_file(relay.wal_dir().join(name)).unwrap();
    }
    let told = RawClient::replication(relay.port).unwrap().rows("READ_REPLICATION_SLOT early").unwrap();
    assert_eq!(told[0][2].as_deref(), Some("1"), "{told:?}");
}

#[test]
fn a_server_without_the_history_of_its_own_timeline_is_followed_by_the_one_held() {
    let Some(installation) = Installation::in_turn(2) else { return };
    let new = promoted_after(&installation, 0, "");
    let mut relay = Relay::streaming_from("relay", new.port);
    write_wal(&new, MB);
    relay.wait_flushed(new.flushed());
    relay.terminate();
    let path = new.wal_dir().join("00000002.history");
    let content = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    relay.start();
    write_wal(&new, MB);
    relay.wait_flushed(new.flushed());
    assert_eq!(relay.times_logged("the upstream has lost its own history file"), 1);
    assert_eq!(second_history(relay.port), Ok(content));
    assert!(!relay.needs_attention());
}

#[test]
fn the_history_of_a_timeline_that_is_no_ancestor_is_held_where_the_upstream_has_it() {
    let Some(installation) = Installation::any() else { return };
    // Before what the standby has: it would go over to it otherwise.
    let foreign = "1\t0/500000\tno recovery target specified\n";
    for is_there in [true, false] {
        let mut old = primary(&installation);
        let new = old.standby("next", old.port, "");
        let mut relay = relay_of(&[&old, &new]);
        relay.start();
        write_wal(&old, MB);
        relay.wait_flushed(old.flushed());
        relay.terminate();
        old.stop(Stop::Fast);
        // Another server was promoted to timeline 2, and died.
        let path = new.wal_dir().join("00000002.history");
        std::fs::write(&path, foreign).unwrap();
        new.promote();
        assert_eq!(new.timeline(), 3);
        if !is_there {
            std::fs::remove_file(&path).unwrap();
        }
        relay.start();
        wait_timeline(&relay, 3);
        write_wal(&new, MB);
        relay.wait_flushed(new.flushed());
        let expected = if is_there { Ok(foreign.to_owned()) } else { Err("58P01".to_owned()) };
        assert_eq!(second_history(new.port), expected);
        assert_eq!(second_history(relay.port), expected);
        relay.assert_running();
    }
}

#[test]
fn a_timeline_beyond_all_reason_is_no_reason_to_ask_for_its_histories() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    let identifier = primary.sql("select system_identifier from pg_control_system()");
    proxy.edit(move |message| {
        let text = String::from_utf8_lossy(message).into_owned();
        if message[0] == b'D' && text.contains(&identifier) {
            *message = with_field(message, 1, b"4294967295");
        }
        Verdict::Forward
    });
    let mut relay = Relay::new("relay", proxy.port);
    relay.launch();
    relay.wait_logged("invalid timeline in the upstream's answer to IDENTIFY_SYSTEM: \\\"4294967295\\\"");
    let tried = proxy.connections();
    wait_until("the next attempt", || proxy.connections() > tried);
    proxy.edit_nothing();
    relay.wait_ready();
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
}

/// A DataRow with another text in one column.
fn with_field(row: &[u8], column: usize, value: &[u8]) -> Vec<u8> {
    let mut body = row[5..7].to_vec();
    let mut rest = &row[7..];
    for index in 0..u16::from_be_bytes([row[5], row[6]]) as usize {
        let length = i32::from_be_bytes(rest[..4].try_into().unwrap());
        let end = 4 + usize::try_from(length).unwrap_or(0);
        if index == column {
            body.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
            body.extend(value);
        } else {
            body.extend(&rest[..end]);
        }
        rest = &rest[end..];
    }
    let mut message = vec![b'D'];
    message.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
    message.extend(body);
    message
}
