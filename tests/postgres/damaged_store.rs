//! People and disks damage the store: removed, cut, swapped, rotten or outdated files. Told, never served, mended.

use std::path::PathBuf;

use crate::support::compare::{assert_equal_clusters, assert_same_wal, primary_bytes, wal_files};
use crate::support::faults::Faults;
use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings, copy_folder};
use crate::support::proxy::Proxy;
use crate::support::raw::{Event, RawClient, error_in, identify_system};
use crate::support::relay::Relay;
use crate::support::wait::wait_until;
use crate::support::{MB, lsn};

/// A relay that holds some twenty segments, the older ones not in memory.
pub(crate) fn filled() -> Option<(Postgres, Proxy, Relay)> {
    filled_with(&Faults::new())
}

pub(crate) fn filled_with(faults: &Faults) -> Option<(Postgres, Proxy, Relay)> {
    // Earlier ones do not tell where a slot is, from which the relay sees that it has lost what it once had.
    let installation = Installation::since(15)?;
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = Relay::new("relay", proxy.port)
        .with("store.tail_size", "\"4MB\"")
        .with("store.unwritten_size", "\"4MB\"")
        .with_faults(faults);
    relay.start();
    write_wal(&primary, 20 * MB);
    relay.wait_flushed(primary.flushed());
    Some((primary, proxy, relay))
}

pub(crate) fn complete_segments(relay: &Relay) -> Vec<PathBuf> {
    wal_files(&relay.wal_dir(), MB, 1).into_values().filter(|path| path.extension().is_none()).collect()
}

/// Reads from the first segment until the session ends or all is there. Whatever is served must be the primary's.
pub(crate) fn read_all(relay: &Relay, primary: &Postgres) -> Event {
    let upto = primary.flushed();
    let mut position = relay.oldest();
    let mut client = RawClient::replication(relay.port).unwrap();
    client.start_replication(None, position, 1).unwrap();
    loop {
        match client.next_event(std::time::Duration::from_secs(5)) {
            Event::Wal { start, bytes, .. } => {
                assert_eq!(start, position, "a gap was served");
                position += bytes.len() as u64;
                assert!(
                    bytes == primary_bytes(&primary.wal_dir(), MB, start, position),
                    "wrong bytes were served"
                );
                if position >= upto {
                    return Event::Silence;
                }
            }
            Event::Keepalive { .. } => {}
            end => return end,
        }
    }
}

/// Damages the files of a running relay and checks that nothing wrong is served and that the relay goes on, whether the
/// upstream is there to repair it or not.
fn damaged_while_running(damage: impl FnOnce(&[PathBuf])) {
    let Some((primary, proxy, mut relay)) = filled() else { return };
    proxy.close();
    damage(&complete_segments(&relay));
    println!("a session from the first segment ends with {:?}", read_all(&relay, &primary));
    relay.assert_running();
    relay.wait_logged("WAL segment is damaged and is not served");
    assert!(relay.metric("walrelay_store_suspect_segments_total").is_some_and(|count| count >= 1.0));
    // And a start with such files is no crash loop.
    relay.kill();
    relay.launch();
    relay.wait_serving();
    assert!(!matches!(read_all(&relay, &primary), Event::Silence), "not all can be served");
    relay.assert_running();
    proxy.open();
    write_wal(&primary, MB);
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    let mut client = RawClient::replication(relay.port).unwrap();
    client.start_replication(None, upto - upto % MB, 1).unwrap();
    client.read_wal(upto - upto % MB, upto);
    wait_until("all to be served again", || matches!(read_all(&relay, &primary), Event::Silence));
}

#[test]
fn a_segment_that_an_operator_cut_short_is_not_served() {
    damaged_while_running(|segments| {
        std::fs::OpenOptions::new().write(true).open(&segments[2]).unwrap().set_len(300_000).unwrap();
    });
}

#[test]
fn a_segment_that_an_operator_removed_is_not_served_over() {
    damaged_while_running(|segments| std::fs::remove_file(&segments[2]).unwrap());
}

#[test]
fn a_segment_with_another_ones_content_is_not_served() {
    damaged_while_running(|segments| {
        let other = std::fs::read(&segments[4]).unwrap();
        std::fs::write(&segments[2], other).unwrap();
    });
}

#[test]
fn a_rotten_byte_in_a_segment_is_not_served() {
    damaged_while_running(|segments| {
        let mut bytes = std::fs::read(&segments[2]).unwrap();
        bytes[777_777] ^= 1;
        std::fs::write(&segments[2], bytes).unwrap();
    });
}

#[test]
fn an_error_of_the_disk_ends_the_stream_that_met_it_and_no_other() {
    let faults = Faults::new();
    let Some((primary, _proxy, mut relay)) = filled_with(&faults) else { return };
    let standby = primary.standby("standby", relay.port, "");
    relay.wait_downstream("standby", "streaming");
    let session = relay.downstream("standby")[0]["pid"].clone();
    let oldest = relay.oldest();
    faults.set("read_fails", 0);
    let mut client = RawClient::replication(relay.port).unwrap();
    for _ in 0..2 {
        client.start_replication(None, oldest, 1).unwrap();
        // No byte of WAL, an error, and the session goes on.
        let answer = client.until_ready().unwrap();
        let refused = error_in(&answer).unwrap_or_else(|| panic!("no error: {answer:?}"));
        assert_eq!(refused.code, "58030", "{refused:?}");
        assert!(answer.iter().all(|message| !(message.kind == b'd' && message.body.first() == Some(&b'w'))));
        identify_system(&mut client);
    }
    write_wal(&primary, MB);
    standby.wait_replayed(primary.flushed());
    relay.wait_flushed(primary.flushed());
    assert_eq!(relay.downstream("standby")[0]["pid"], session, "the standby was disturbed");
    assert!(relay.metric("walrelay_store_read_errors_total") >= Some(2.0));
    let words = "\"message\":\"could not read WAL segment\"";
    let told = relay.log().lines().filter(|line| line.contains(words)).count();
    assert_eq!(told, 1, "told once, not to each who asks:\n{}", relay.log());
    faults.clear("read_fails");
    assert_eq!(read_all(&relay, &primary), Event::Silence, "the disk works again");
    relay.assert_running();
}

#[test]
fn a_page_that_cannot_be_read_a_second_time_ends_the_connection_that_wanted_it_and_no_other() {
    let faults = Faults::new();
    let Some((primary, _proxy, mut relay)) = filled_with(&faults) else { return };
    let standby = primary.standby("standby", relay.port, "");
    relay.wait_downstream("standby", "streaming");
    let session = relay.downstream("standby")[0]["pid"].clone();
    // It was brought in, evicted before it was sent, and is gone: the kernel says so when it is sent.
    faults.set("send_faults", 32 << 10);
    let mut client = RawClient::replication(relay.port).unwrap();
    // The answer may be in the same call as the first WAL.
    if client.start_replication(None, relay.oldest(), 1).is_ok() {
        while !matches!(client.next_event(std::time::Duration::from_secs(30)), Event::Closed) {}
    }
    wait_until("the session to go", || relay.downstream("raw").is_empty());
    faults.clear("send_faults");
    relay.assert_running();
    assert_eq!(read_all(&relay, &primary), Event::Silence, "the disk works again");
    write_wal(&primary, MB);
    standby.wait_replayed(primary.flushed());
    assert_eq!(relay.downstream("standby")[0]["pid"], session, "the standby was disturbed");
}

#[test]
fn an_acknowledged_byte_that_tore_is_told_and_fetched_again_before_anything_is_acknowledged() {
    let faults = Faults::new();
    let Some((primary, proxy, mut relay)) = filled_with(&faults) else { return };
    let standby = primary.standby("standby", relay.port, "");
    write_wal(&primary, MB / 2);
    let upto = primary.flushed();
    primary.wait_reported_flush("relay", upto);
    relay.kill();
    proxy.close();
    let newest = wal_files(&relay.wal_dir(), MB, 1).into_values().next_back().unwrap();
    let mut bytes = std::fs::read(&newest).unwrap();
    let torn = usize::try_from(upto % MB / 2).unwrap();
    for byte in &mut bytes[torn..torn + 512] {
        *byte = !*byte;
    }
    std::fs::write(&newest, bytes).unwrap();
    relay.launch();
    relay.wait_serving();
    let held = relay.flushed();
    assert!(held < upto, "what is torn is not held");
    // What comes again cannot be made durable yet.
    faults.set("sync_hangs", 0);
    let streams = proxy.passed(|passed| passed.starts.len());
    proxy.open();
    relay.wait_logged("lost");
    relay.wait_needs_attention();
    let lost = relay.status()["upstream"]["lost"].clone();
    assert_eq!(lsn(lost["from"].as_str().unwrap()), held, "{lost}");
    wait_until("the relay to have it again and to tell so", || {
        proxy.passed(|passed| {
            passed.starts.len() > streams && passed.reported.is_some_and(|reported| reported.write >= upto)
        })
    });
    // Asked, it answers, and with nothing that would let it count as synchronous.
    let told = proxy.passed(|passed| passed.status_updates);
    wait_until("another report", || proxy.passed(|passed| passed.status_updates) > told);
    let vouched = proxy.passed(|passed| passed.flush_max_of[streams..].to_vec());
    assert!(vouched.iter().all(|flush| *flush == 0), "vouched for what is not there: {vouched:X?}");
    assert_eq!(relay.flushed(), held);
    faults.clear("sync_hangs");
    relay.wait_flushed(upto);
    primary.wait_reported_flush("relay", upto);
    wait_until("the relay to vouch for it", || {
        proxy.passed(|passed| passed.flush_max_of[streams..].iter().any(|flush| *flush >= upto))
    });
    wait_until("nothing to be lost any more", || {
        relay.status()["upstream"]["lost"].is_null() && !relay.needs_attention()
    });
    proxy.assert_honest();
    assert_same_wal(&relay.wal_dir(), &primary, upto);
    assert_equal_clusters(&primary, &standby);
}

#[test]
fn an_older_copy_of_the_folder_is_told_and_filled_up_before_anything_is_acknowledged() {
    let faults = Faults::new();
    let Some((primary, _proxy, mut relay)) = filled_with(&faults) else { return };
    relay.terminate();
    let copy = relay.data_dir().with_extension("copy");
    copy_folder(relay.data_dir(), &copy);
    relay.start();
    let held = primary.flushed();
    write_wal(&primary, 3 * MB);
    let upto = primary.flushed();
    primary.wait_reported_flush("relay", upto);
    relay.terminate();
    // Another one, which has seen nothing yet.
    let proxy = Proxy::to(primary.port);
    proxy.close();
    relay = relay.with_conninfo(&format!("host=127.0.0.1 port={} user=postgres sslmode=disable", proxy.port));
    std::fs::remove_dir_all(relay.data_dir()).unwrap();
    std::fs::rename(&copy, relay.data_dir()).unwrap();
    relay.launch();
    relay.wait_serving();
    // What comes again cannot be made durable yet.
    faults.set("sync_hangs", 0);
    proxy.open();
    relay.wait_logged("lost");
    relay.wait_needs_attention();
    let lost = relay.status()["upstream"]["lost"].clone();
    let end = |name: &str| lsn(lost[name].as_str().unwrap());
    assert!(end("from") <= held && held < end("to") && end("to") <= upto, "{lost}");
    assert!(relay.metric("walrelay_upstream_lost_bytes").unwrap() > 0.0);
    wait_until("the relay to tell where it is", || {
        proxy.passed(|passed| passed.reported.is_some_and(|reported| reported.write >= end("from")))
    });
    assert_eq!(proxy.passed(|passed| passed.flush_max), 0, "vouched for more than is there");
    faults.clear("sync_hangs");
    relay.wait_flushed(upto);
    primary.wait_reported_flush("relay", upto);
    wait_until("nothing to be lost any more", || {
        relay.status()["upstream"]["lost"].is_null() && !relay.needs_attention()
    });
    assert_eq!(relay.metric("walrelay_upstream_lost_bytes"), Some(0.0));
    assert_same_wal(&relay.wal_dir(), &primary, upto);
    proxy.assert_honest();
}

#[test]
fn an_empty_folder_where_wal_was_is_told_and_filled_from_where_the_slot_is() {
    let Some((primary, _proxy, mut relay)) = filled() else { return };
    assert!(!relay.needs_attention());
    let upto = primary.flushed();
    primary.wait_reported_flush("relay", upto);
    relay.terminate();
    std::fs::remove_dir_all(relay.data_dir()).unwrap();
    relay.start();
    relay
        .wait_logged("its directory was lost or is not mounted; if the slot was only made for it beforehand");
    relay.wait_needs_attention();
    assert_eq!(relay.status()["upstream"]["started_empty"], true);
    // All that the primary still keeps for it, and nothing that it does not have is claimed.
    let restart = lsn(&primary.sql("select restart_lsn from pg_replication_slots where slot_name = 'relay'"));
    assert!(relay.oldest() <= restart && restart - relay.oldest() < 2 * MB);
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    assert_same_wal(&relay.wal_dir(), &primary, primary.flushed());
    relay.terminate();
    relay.start();
    wait_until("the relay to stream", || relay.status()["upstream"]["state"] == "streaming");
    assert!(!relay.needs_attention(), "the folder is not empty any more");
}

#[test]
fn an_empty_folder_is_refused_where_wal_must_be() {
    let Some((_primary, proxy, mut relay)) = filled() else { return };
    relay.terminate();
    relay.set("relay.data_must_exist", "true");
    relay.start();
    relay.terminate();
    let away = relay.data_dir().with_extension("away");
    std::fs::rename(relay.data_dir(), &away).unwrap();
    let tried = proxy.connections();
    for _ in 0..2 {
        relay.launch();
        assert!(!relay.wait_for_end().success());
        assert!(relay.log().contains("relay.data_must_exist"), "{}", relay.log());
    }
    assert_eq!(proxy.connections(), tried, "it asked the primary for something");
    std::fs::remove_dir_all(relay.data_dir()).unwrap();
    std::fs::rename(&away, relay.data_dir()).unwrap();
    relay.start();
}

#[test]
fn a_folder_whose_wal_folder_is_empty_is_refused() {
    let Some((_primary, _proxy, mut relay)) = filled() else { return };
    relay.terminate();
    std::fs::remove_dir_all(relay.wal_dir()).unwrap();
    relay.launch();
    assert!(!relay.wait_for_end().success());
    assert!(relay.log().contains("has lost its WAL"), "{}", relay.log());
}

#[test]
fn a_folder_that_others_may_read_is_refused_or_closed_to_them() {
    use std::os::unix::fs::PermissionsExt;
    let Some((_primary, _proxy, mut relay)) = filled() else { return };
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(relay.data_dir()), 0o700);
    for path in complete_segments(&relay) {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    relay.terminate();
    let change = |relay: &Relay, mode: u32| {
        std::fs::set_permissions(relay.data_dir(), PermissionsExt::from_mode(mode)).unwrap();
    };
    change(&relay, 0o755);
    relay.launch();
    assert!(!relay.wait_for_end().success());
    assert!(relay.log().contains("has invalid permissions"), "{}", relay.log());
    assert!(relay.log().contains("u=rwx (0700) or u=rwx,g=rx (0750)"), "{}", relay.log());
    change(&relay, 0o750);
    relay.start();
}
