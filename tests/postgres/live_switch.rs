//! What goes on while the relay follows a promotion on the live connection: what standbys hold back, readers of cold WAL,
//! archives; and a server that ends its stream without having left its timeline.

use std::path::Path;
use std::time::Duration;

use crate::support::MB;
use crate::support::compare::{primary_bytes_of, wal_files};
use crate::support::faults::Faults;
use crate::support::lab::{Installation, scratch};
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Stop, copy_folder};
use crate::support::proxy::{Proxy, Verdict};
use crate::support::raw::{Event, RawClient, identify_system};
use crate::support::receivewal::PgReceivewal;
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::timelines::{
    Torn, assert_same_timeline, fork_of, primary, promote_again, promote_behind, relay_of, torn,
    wait_timeline,
};

#[test]
fn a_stream_that_ends_where_nothing_was_left_is_not_asked_for_without_end() {
    let Some(installation) = Installation::any() else { return };
    let primary = primary(&installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = Relay::streaming_from("relay", proxy.port);
    // The server's side of every copy is ended at its first message, as if the timeline ended there.
    let mut is_ended = false;
    proxy.edit(move |message| match message[0] {
        b'W' => {
            is_ended = false;
            Verdict::Forward
        }
        b'd' if !is_ended => {
            is_ended = true;
            Verdict::Replace(vec![vec![b'c', 0, 0, 0, 4]])
        }
        b'd' | b'c' => Verdict::Drop,
        _ => Verdict::Forward,
    });
    let starts = || proxy.passed(|passed| passed.starts.len());
    let before = starts();
    write_wal(&primary, MB);
    relay.wait_logged("which the upstream is still on");
    hold("few attempts", Duration::from_secs(3), || starts() - before < 30);
    assert!(relay.times_logged("started streaming WAL") < 40, "{}", relay.log());
    let told = relay.status()["upstream"]["last_error"].as_str().unwrap_or_default().to_owned();
    assert!(told.contains("the end of timeline 1, which the upstream is still on"), "{told}");
    proxy.edit_nothing();
    relay.wait_flushed(primary.flushed());
    relay.assert_running();
}

#[test]
fn what_a_standby_holds_back_the_new_primary_keeps_from_its_first_moment_on() {
    let Some(installation) = Installation::in_turn(2) else { return };
    let old = primary(&installation);
    let middle = old.standby("middle", old.port, "");
    let mut relay = Relay::new("relay", middle.port).with_standby_at(middle.port);
    relay.start();
    old.sql("create table t (id int)");
    // Its own reports are ten seconds apart: none of them makes up for what the relay would take back.
    let standby = old.standby("standby", relay.port, "hot_standby_feedback = on");
    standby.wait_replayed(old.flushed());
    let mut reader = RawClient::sql(standby.port).unwrap();
    reader.rows("begin isolation level repeatable read").unwrap();
    reader.rows("select count(*) from pg_class").unwrap();
    let mut client = RawClient::sql(middle.port).unwrap();
    let mut is_held_back = move || {
        let rows =
            client.rows("select 1 from pg_replication_slots where slot_name = 'relay' and xmin is not null");
        !rows.unwrap().is_empty()
    };
    wait_until("what the standby reads to be held back", &mut is_held_back);
    let promoting = std::thread::spawn(move || {
        middle.promote();
        middle
    });
    wait_until("the relay to follow", || {
        assert!(is_held_back(), "nothing is held back any more");
        relay.status()["store"]["timeline"] == 2
    });
    hold("what the standby reads is held back", Duration::from_secs(3), &mut is_held_back);
    let middle = promoting.join().unwrap();
    middle.sql("insert into t values (1)");
    relay.wait_flushed(middle.flushed());
    assert_eq!(relay.downstream("standby").len(), 1);
}

#[test]
fn readers_of_cold_wal_get_all_up_to_the_fork_and_the_end_of_their_timeline() {
    let Some(installation) = Installation::any() else { return };
    let faults = Faults::new();
    let Torn { mut old, mut new, relay, .. } = torn(&installation, &[]);
    let mut relay = relay.with_faults(&faults);
    // What it has is in files alone from here on.
    relay.terminate();
    relay.start();
    old.stop(Stop::Kill);
    new.make_standby_of(old.port, "next");
    new.start();
    let fork = new.replayed();
    let from = fork - fork % 8192;
    // Where whole segments are read, to compare their checksums.
    faults.set("read_hangs", MB);
    // As many as may wait for the disk at once, and one more, whose read begins when the timeline has been left.
    let cold_bytes = || relay.metric("walrelay_downstream_cold_bytes_total");
    let mut clients = Vec::new();
    for _ in 0..5 {
        let before = cold_bytes();
        let mut client = RawClient::replication(relay.port).unwrap();
        identify_system(&mut client);
        client.start_replication(None, from, 1).unwrap();
        clients.push(client);
        wait_until("a reader to wait for the disk", || cold_bytes() > before);
    }
    new.promote();
    wait_timeline(&relay, 2);
    assert_eq!(fork_of(&new, 2), fork);
    faults.clear("read_hangs");
    let expected = primary_bytes_of(&old.wal_dir(), MB, 1, from, fork);
    for mut client in clients {
        assert!(client.read_wal(from, fork) == expected);
        let end = loop {
            match client.next_event(Duration::from_secs(20)) {
                Event::Keepalive { .. } => {}
                other => break other,
            }
        };
        assert!(matches!(&end, Event::Other(message) if message.kind == b'c'), "{end:?}");
    }
}

#[test]
fn archives_that_come_late_go_through_all_timelines() {
    let Some(installation) = Installation::any() else { return };
    let mut old = primary(&installation);
    let mut new = old.standby("next", old.port, "");
    let mut relay = relay_of(&[&old, &new]);
    relay.start();
    // One stops within a segment, the other where the timeline will be left, which is a segment's end.
    let [mut early, mut exact] = [(); 2].map(|()| PgReceivewal::start(&installation, relay.port, &[]));
    wait_until("the archives to stream", || relay.downstream("pg_receivewal").len() == 2);
    relay.wait_downstream("pg_receivewal", "streaming");
    write_wal(&old, 3 * MB / 2);
    wait_until("some segments", || early.completed(MB) >= relay.oldest() + MB);
    early.process.kill();
    write_wal(&old, MB);
    let fork = end_at_a_segment(&old);
    relay.wait_flushed(fork);
    new.wait_replayed(fork);
    wait_until("the last segment", || exact.completed(MB) == fork);
    exact.process.kill();
    old.stop(Stop::Kill);
    new.promote();
    assert_eq!(fork_of(&new, 2), fork);
    for _ in 0..2 {
        write_wal(&new, 3 * MB / 2);
        promote_again(&mut new, &old);
    }
    write_wal(&new, 2 * MB);
    let upto = new.switch_wal().next_multiple_of(MB);
    wait_timeline(&relay, 4);
    relay.wait_flushed(upto);
    let folder = early.folder();
    let _again = PgReceivewal::start_into(&installation, relay.port, &["--no-loop"], folder);
    wait_until("the archive to have it all", || has_completed(folder, 4, upto));
    assert_same_timeline(folder, &old, 1, fork);
    for timeline in [2, 3] {
        assert_same_timeline(folder, &new, timeline, fork_of(&new, timeline + 1));
    }
    assert_same_timeline(folder, &new, 4, upto);
    for timeline in [2, 3, 4] {
        let name = format!("{timeline:08X}.history");
        let content = |folder: &Path| std::fs::read(folder.join(&name)).unwrap();
        assert_eq!(content(folder), content(&new.wal_dir()));
    }
    // The other one asks for a stream and gets none: to pg_receivewal that is an error, whoever answers.
    let complaints = complaints_of(&installation, [relay.port, new.port], exact.folder());
    assert!(complaints[0][0].contains("START_REPLICATION"), "{complaints:?}");
    assert_eq!(complaints[0], complaints[1]);
}

/// What pg_receivewal says against each of these servers, from what is in the folder.
fn complaints_of(installation: &Installation, ports: [u16; 2], folder: &Path) -> [Vec<String>; 2] {
    ports.map(|port| {
        let copy = folder.with_file_name(format!("copy{port}"));
        copy_folder(folder, &copy);
        let mut receiver = PgReceivewal::start_into(installation, port, &["--no-loop"], &copy);
        assert!(!receiver.process.wait_for_end().success());
        receiver.log().lines().filter(|line| line.contains("error: ")).map(str::to_owned).collect()
    })
}

/// Whether the archive has the segment of this timeline that ends there, whole.
fn has_completed(folder: &Path, timeline: u32, end: u64) -> bool {
    wal_files(folder, MB, timeline).get(&(end - MB)).is_some_and(|path| path.extension().is_none())
}

/// Ends the segment, and sees to it that nothing is written after that; returns the end.
fn end_at_a_segment(server: &Postgres) -> u64 {
    let query = "select string_agg(pid::text, ',') from pg_stat_activity where backend_type in ('background writer', 'checkpointer')";
    for id in server.sql(query).split(',') {
        let id = rustix::process::Pid::from_raw(id.parse().unwrap()).unwrap();
        rustix::process::kill_process(id, rustix::process::Signal::STOP).unwrap();
    }
    server.switch_wal().next_multiple_of(MB)
}

#[test]
fn an_archive_keeps_what_diverged_and_goes_on_with_the_new_timeline() {
    let Some(installation) = Installation::any() else { return };
    let Torn { mut old, mut new, relay, .. } = torn(&installation, &[]);
    // It has been there from the beginning.
    let scratch = scratch();
    let folder = scratch.path().join("received");
    std::fs::create_dir(&folder).unwrap();
    let (_, first) = wal_files(&relay.wal_dir(), MB, 1).pop_first().unwrap();
    std::fs::copy(&first, folder.join(first.file_name().unwrap())).unwrap();
    let mut receiver = PgReceivewal::start_into(&installation, relay.port, &["--no-loop"], &folder);
    let end = old.switch_wal().next_multiple_of(MB);
    write_wal(&old, MB / 2);
    relay.wait_flushed(old.flushed());
    wait_until("the archive to have what will be lost", || has_completed(&folder, 1, end));
    promote_behind(&mut old, &mut new, "");
    let fork = fork_of(&new, 2);
    assert!(fork < end - 2 * MB);
    let upto = new.switch_wal().next_multiple_of(MB);
    wait_until("the archive to follow", || has_completed(&folder, 2, upto));
    assert_same_timeline(&folder, &old, 1, end);
    assert_same_timeline(&folder, &new, 2, upto);
    assert!(receiver.process.is_running(), "{}", receiver.log());
    // Started again it goes by its newest file, which is of the dead branch; nobody leads it on from there.
    receiver.process.kill();
    let complaints = complaints_of(&installation, [relay.port, new.port], &folder);
    assert!(complaints[0][0].contains("is not in this server's history"), "{complaints:?}");
    assert_eq!(complaints[0], complaints[1]);
    // A person puts aside what the branch left.
    for (start, path) in wal_files(&folder, MB, 1) {
        if start + MB > fork {
            std::fs::remove_file(path).unwrap();
        }
    }
    write_wal(&new, MB);
    let upto = new.switch_wal().next_multiple_of(MB);
    let _again = PgReceivewal::start_into(&installation, relay.port, &["--no-loop"], &folder);
    wait_until("the archive to go on", || has_completed(&folder, 2, upto));
    assert_same_timeline(&folder, &new, 2, upto);
}
