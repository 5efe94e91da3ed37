//! Promotions that left something behind which the relay has: told exactly, both branches kept.

use serde_json::Value;

use crate::support::MB;
use crate::support::compare::assert_equal_clusters;
use crate::support::lab::Installation;
use crate::support::load::{emit_wal, write_wal};
use crate::support::postgres::{Postgres, Stop};
use crate::support::proxy::{Proxy, Verdict, shorten_wal, wal_in};
use crate::support::raw::{RawClient, error_in, identify_system};
use crate::support::relay::Relay;
use crate::support::wait::{wait_for, wait_until};
use crate::support::{PAGE_BYTES, lsn, lsn_text};
use crate::timelines::{
    Torn, assert_same_timeline, conninfo, dead_branches, end_of_timeline, fork_of, primary, promote_behind,
    relay_of, torn, wait_timeline,
};

#[test]
fn what_a_new_primary_lacks_is_set_aside_told_exactly_and_not_followed() {
    for major in crate::support::lab::chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let Torn { mut old, mut new, mut relay, rows, first_lost, last_lost } = torn(&installation, &[]);
        let behind = old.standby("behind", relay.port, "");
        let (end, before) = (old.flushed(), relay.status());
        behind.wait_replayed(end);
        promote_behind(&mut old, &mut new, "");
        write_wal(&new, 2 * MB);
        wait_timeline(&relay, 2);
        relay.wait_flushed(new.flushed());
        let fork = fork_of(&new, 2);
        check_report(&relay, fork, end, rows + 3, &[&first_lost, &last_lost]);
        assert!(relay.needs_attention());
        // Both branches are there, and the dead one is served to the fork and no further.
        assert_same_timeline(&relay.wal_dir(), &new, 2, new.flushed());
        assert_eq!(end_of_timeline(relay.port, 1, fork), end_of_timeline(new.port, 1, fork));
        let refused = |port| {
            let mut client = RawClient::replication(port).unwrap();
            identify_system(&mut client);
            error_in(&client.start_replication(None, end, 1).unwrap()).unwrap()
        };
        let error = refused(relay.port);
        assert_eq!(error, refused(new.port));
        assert!(error.message.contains("on timeline 1 is not in this server's history"), "{error:?}");
        assert!(error.detail.contains(&lsn_text(fork)), "{error:?}");
        // A standby on the dead branch is not led on; PostgreSQL says so itself.
        wait_until("the standby to see that it is on a dead branch", || {
            behind
                .log()
                .contains("forked off current database system timeline 1 before current recovery point")
        });
        // Also after a crash, and nothing of it is forgotten.
        relay.restart_after_kill();
        check_report(&relay, fork, end, rows + 3, &[&first_lost, &last_lost]);
        assert_eq!(before["upstream"]["diverged"], false);
        assert_eq!(relay.status()["upstream"]["diverged"], true);
        relay.wait_needs_attention();
        // Until somebody has seen to it, and says so.
        let report = relay.data_dir().join(dead_branches(&relay)[0]["report"].as_str().unwrap());
        std::fs::rename(&report, report.with_extension("seen")).unwrap();
        let is_settled = |relay: &Relay| {
            !relay.needs_attention() && relay.metric("walrelay_upstream_needs_attention") == Some(0.0)
        };
        wait_until("nobody to be needed", || is_settled(&relay));
        relay.restart_after_kill();
        assert!(is_settled(&relay) && dead_branches(&relay).len() == 1, "{}", relay.status());
        if installation.has("pg_rewind") {
            rewind(&mut old, &mut new, &relay);
        }
    }
}

#[test]
fn commits_that_wait_for_a_far_relay_go_on_after_a_divergence() {
    let Some(installation) = Installation::in_turn(0) else { return };
    let settings = [("upstream.acknowledge", "\"ANY 1 (far)\"")];
    let Torn { mut old, mut new, relay, .. } = torn(&installation, &settings);
    let far = Relay::streaming_from("far", relay.port);
    far.wait_flushed(old.flushed());
    // What asks for a slot of the relay, which is beyond the fork.
    let mut client = RawClient::replication(relay.port).unwrap();
    client.query("CREATE_REPLICATION_SLOT archive PHYSICAL RESERVE_WAL").unwrap();
    let (_, _, end) = identify_system(&mut client);
    client.start_replication(Some("archive"), end, 1).unwrap();
    client.send_status(end, end, 0).unwrap();
    wait_until("the slot to be there", || {
        let status = relay.status();
        let slots = status["slots"].as_array().unwrap().clone();
        slots.iter().any(|slot| slot["slot_name"] == "archive" && slot["restart_lsn"] == lsn_text(end))
    });
    drop(client);
    promote_behind(&mut old, &mut new, "synchronous_standby_names = 'relay'");
    wait_timeline(&relay, 2);
    wait_timeline(&far, 2);
    new.wait_for_sql("select sync_state from pg_stat_replication where application_name = 'relay'", "sync");
    new.sql("insert into kept values (4)");
    assert!(far.status()["upstream"]["lost"].is_null(), "what was set aside is told to be lost");
    let fork = fork_of(&new, 2);
    assert_eq!(relay.slot("archive").unwrap()["restart_lsn"], lsn_text(fork));
    // Also after a crash at any time.
    let mut relay = relay;
    relay.restart_after_kill();
    assert_eq!(relay.slot("archive").unwrap()["restart_lsn"], lsn_text(fork));
}

#[test]
fn a_fork_before_all_that_is_held_is_told_and_leaves_no_slot_behind() {
    let Some(installation) = Installation::in_turn(2) else { return };
    let old = primary(&installation);
    let mut new = old.standby("next", old.port, "");
    new.stop(Stop::Fast);
    write_wal(&old, 4 * MB);
    // The slot keeps WAL from here on.
    old.checkpoint();
    let mut relay = relay_of(&[&old]);
    relay.start();
    write_wal(&old, 2 * MB);
    relay.wait_flushed(old.flushed());
    relay.terminate();
    let mut old = old;
    promote_behind(&mut old, &mut new, "");
    relay.set("upstream.conninfo", &conninfo(&[&new]));
    relay.launch();
    relay.wait_needs_attention();
    relay.wait_logged("the beginning of what this relay holds");
    assert_eq!(new.sql("select count(*) from pg_replication_slots"), "0");
}

#[test]
fn a_store_that_was_begun_and_holds_nothing_begins_anew_on_a_timeline_that_forked_before() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let mut old = primary(&installation);
    let mut new = old.standby("next", old.port, "");
    new.stop(Stop::Fast);
    write_wal(&old, 4 * MB);
    old.checkpoint();
    // It has made its slot and knows where it begins, and no WAL gets through.
    let proxy = Proxy::to(old.port);
    proxy.edit(|message| if wal_in(message).is_some() { Verdict::Drop } else { Verdict::Forward });
    let mut relay = Relay::new("relay", proxy.port);
    relay.launch();
    wait_until("the stream to begin", || relay.status()["upstream"]["sessions"].as_u64() > Some(0));
    relay.terminate();
    promote_behind(&mut old, &mut new, "");
    relay.set("upstream.conninfo", &conninfo(&[&new]));
    relay.start();
    relay.wait_logged("nothing is held yet: beginning on the upstream's timeline");
    write_wal(&new, 2 * MB);
    wait_timeline(&relay, 2);
    relay.wait_flushed(new.flushed());
    assert_same_timeline(&relay.wal_dir(), &new, 2, new.flushed());
    assert!(dead_branches(&relay).is_empty());
}

/// The report names what exists only on the dead branch.
fn check_report(relay: &Relay, fork: u64, end: u64, commits: u64, transactions: &[&String]) {
    let branches = dead_branches(relay);
    assert_eq!(branches.len(), 1, "{branches:?}");
    let branch = &branches[0];
    assert_eq!((branch["timeline"].as_u64(), branch["next"].as_u64()), (Some(1), Some(2)));
    assert_eq!(branch["fork"], lsn_text(fork));
    let told_end = lsn(branch["end"].as_str().unwrap());
    assert!(told_end >= end, "{branch}");
    assert_eq!(branch["bytes"].as_u64(), Some(told_end - fork));
    assert_eq!(branch["commits"].as_u64(), Some(commits), "{branch}");
    let told: Vec<_> = branch["transactions"].as_array().unwrap().iter().map(Value::to_string).collect();
    assert!(transactions.iter().all(|xid| told.contains(xid)), "{branch}");
    assert_eq!(told.len() as u64, commits);
    assert!(branch["first_commit"].as_str() < branch["last_commit"].as_str(), "{branch}");
    assert!(relay.data_dir().join(branch["report"].as_str().unwrap()).exists());
    assert!(relay.log().contains("what lies beyond has been set aside"));
    let aside = std::fs::read_dir(relay.wal_dir()).unwrap().map(|entry| entry.unwrap().file_name());
    let bytes = aside.filter(|name| name.to_str().unwrap().ends_with(".diverged")).count() as u64 * MB;
    assert!(bytes >= told_end - fork, "{bytes} bytes set aside of {}", told_end - fork);
}

/// The old primary is rewound and streams from the relay.
fn rewind(old: &mut Postgres, new: &mut Postgres, relay: &Relay) {
    // It was not shut down.
    old.start();
    old.rewind_to(new);
    old.make_standby_of(relay.port, "rewound");
    old.start();
    write_wal(new, MB);
    assert_equal_clusters(new, old);
    assert_eq!(old.sql("select count(*) from kept"), "1");
}

#[test]
fn a_relay_that_is_to_stop_at_a_divergence_stops_and_keeps_what_it_has() {
    let Some(installation) = Installation::any() else { return };
    let settings = [("upstream.on_divergence", "\"stop\"")];
    let Torn { mut old, mut new, mut relay, .. } = torn(&installation, &settings);
    let end = old.flushed();
    promote_behind(&mut old, &mut new, "");
    relay.wait_needs_attention();
    relay.wait_logged(&format!(
        "new timeline 2 forked off timeline 1 at {}, before",
        lsn_text(fork_of(&new, 2))
    ));
    assert!(dead_branches(&relay).is_empty());
    assert!(relay.flushed() >= end);
    assert!(
        !relay.wal_dir().join("00000002.history").exists(),
        "a history that is not followed is not served"
    );
    // A person has decided.
    relay.terminate();
    relay.set("upstream.on_divergence", "\"follow\"");
    relay.start();
    wait_timeline(&relay, 2);
    assert_eq!(dead_branches(&relay).len(), 1);
}

#[test]
fn the_head_of_a_record_that_the_new_primary_never_got_is_no_divergence() {
    for major in crate::support::lab::chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let mut old = primary(&installation);
        let mut new = old.standby("next", old.port, "");
        let proxy = Proxy::to(old.port);
        let relay = Relay::streaming_from("relay", proxy.port);
        write_wal(&old, MB);
        // Both have all that there is, and nothing more comes of itself.
        let fork = wait_for("the primary to write nothing", || {
            let fork = old.flushed();
            relay.wait_flushed(fork);
            new.wait_replayed(fork);
            new.stop(Stop::Fast);
            let is_end = old.insert_position() == fork;
            if !is_end {
                new.start();
            }
            is_end.then_some(fork)
        });
        // Some pages of the record get to the relay, and the primary dies.
        let limit = fork.next_multiple_of(PAGE_BYTES) + 3 * PAGE_BYTES;
        proxy.edit(move |message| match wal_in(message).map(|(start, wal)| (start, wal.len() as u64)) {
            Some((start, _)) if start >= limit => Verdict::Drop,
            Some((start, length)) if start + length > limit => {
                shorten_wal(message, limit - start);
                Verdict::Forward
            }
            _ => Verdict::Forward,
        });
        emit_wal(&old, 1);
        wait_until("the head to arrive", || relay.position("/upstream/received") >= limit);
        old.stop(Stop::Kill);
        new.make_standby_of(old.port, "next");
        new.start();
        new.promote();
        assert_eq!(fork_of(&new, 2), fork);
        proxy.edit_nothing();
        proxy.lead_to(new.port);
        wait_timeline(&relay, 2);
        write_wal(&new, 2 * MB);
        relay.wait_flushed(new.flushed());
        assert!(dead_branches(&relay).is_empty() && !relay.needs_attention(), "{}", relay.status());
        assert_same_timeline(&relay.wal_dir(), &new, 2, new.flushed());
        assert_eq!(end_of_timeline(relay.port, 1, fork), end_of_timeline(new.port, 1, fork));
    }
}

#[test]
fn a_new_timeline_that_does_not_begin_with_what_is_held_is_refused() {
    let Some(installation) = Installation::any() else { return };
    // A byte that a checksum covers, and one of a page's header that none does.
    for is_covered in [true, false] {
        let mut old = primary(&installation);
        let new = old.standby("next", old.port, "");
        let proxy = Proxy::to(old.port);
        let relay = Relay::streaming_from("relay", proxy.port);
        write_wal(&old, MB);
        // The timeline is left neither at a segment's beginning nor at a page's.
        while !(MB / 4..MB / 2).contains(&(old.flushed() % MB)) || old.flushed() % PAGE_BYTES < 2000 {
            write_wal(&old, MB / 10);
        }
        relay.wait_flushed(old.flushed());
        old.stop(Stop::Fast);
        let end = relay.flushed();
        new.wait_replayed(end);
        new.promote();
        let fork = fork_of(&new, 2);
        assert!(fork == end && fork % PAGE_BYTES > 1500, "{fork:X}");
        let spoiled = if is_covered { fork - 1000 } else { fork - fork % PAGE_BYTES + 20 };
        let streams = proxy.passed(|passed| passed.starts.len());
        proxy.edit(flip_always(spoiled));
        proxy.lead_to(new.port);
        write_wal(&new, 2 * MB);
        relay.wait_needs_attention();
        let told = relay.status()["upstream"]["last_error"].as_str().unwrap_or_default().to_owned();
        let words = if is_covered {
            "incorrect resource manager data checksum in record at".to_owned()
        } else {
            format!("unexpected data in the padding at {}", lsn_text(spoiled))
        };
        assert!(told.contains(&words), "{told}");
        assert_eq!(relay.flushed(), fork);
        let vouched = proxy.passed(|passed| passed.flush_max_of[streams..].to_vec());
        assert!(!vouched.is_empty() && vouched.iter().all(|flush| *flush == 0), "{vouched:X?}");
        // It was spoiled on the way.
        proxy.edit_nothing();
        relay.wait_flushed(new.flushed());
        assert_same_timeline(&relay.wal_dir(), &new, 2, new.flushed());
        wait_until("nobody to be needed", || !relay.needs_attention());
    }
}

/// Flips one bit of the WAL byte at `position`, each time it passes.
fn flip_always(position: u64) -> impl FnMut(&mut Vec<u8>) -> Verdict + Send {
    move |message| {
        if let Some((start, wal)) = wal_in(message)
            && (start..start + wal.len() as u64).contains(&position)
        {
            let at = message.len() - wal.len() + usize::try_from(position - start).unwrap();
            message[at] ^= 0x10;
        }
        Verdict::Forward
    }
}
