//! A slot on the upstream that is ahead of the relay: WAL that was acknowledged and is lost here is told until it is back or known to
//! be gone, and nothing else is told as that.

use std::path::PathBuf;
use std::time::Duration;

use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings, Stop, copy_folder};
use crate::support::proxy::{Proxy, Verdict, wal_in};
use crate::support::raw::{RawClient, identify_system};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::support::{MB, lsn, lsn_text};
use crate::timelines::{Torn, dead_branches, fork_of, promote_behind, torn, wait_timeline};
use crate::upstream_slot::{Chain, SLOTS, cut_off};

#[test]
fn a_slot_that_somebody_made_anew_ahead_of_the_relay_tells_of_no_loss() {
    let Some(installation) = Installation::since(15) else { return };
    let chain = cut_off(&installation, Settings::new(), |relay| relay);
    let Chain { primary, proxy, relay } = chain;
    primary.sql("select pg_drop_replication_slot('relay')");
    let held = relay.flushed();
    write_wal(&primary, 4 * MB);
    primary.checkpoint();
    primary.sql("select pg_create_physical_replication_slot('relay', true)");
    assert!(lsn(&primary.sql("select restart_lsn from pg_replication_slots")) > held + 3 * MB);
    proxy.open();
    relay.wait_flushed(primary.flushed());
    relay.wait_logged("is ahead of this relay, which has lost nothing");
    assert!(!relay.log().contains("has been lost here"), "{}", relay.log());
    assert!(!relay.needs_attention());
}

/// The relay's directory becomes an older copy, before its first session since then. Returns where it had been, too. What is given
/// happens after the copy, and before most of what is lost with that.
fn set_back(chain: Chain, meanwhile: impl FnOnce(&Postgres)) -> (Chain, u64) {
    let Chain { primary, proxy, mut relay } = chain;
    relay.terminate();
    let (data, old) = (relay.data_dir().to_owned(), relay.data_dir().with_extension("old"));
    copy_folder(&data, &old);
    proxy.open();
    relay.start();
    meanwhile(&primary);
    write_wal(&primary, 3 * MB);
    let upto = primary.flushed();
    primary.wait_reported_flush("relay", upto);
    relay.terminate();
    proxy.close();
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::rename(&old, &data).unwrap();
    relay.launch();
    relay.wait_serving();
    (Chain { primary, proxy, relay }, upto)
}

#[test]
fn what_was_lost_stays_told_until_it_is_back_although_the_slot_is_made_anew() {
    let Some(installation) = Installation::since(15) else { return };
    let (Chain { primary, proxy, mut relay }, upto) =
        set_back(cut_off(&installation, Settings::new(), |relay| relay), |_| ());
    let streams = proxy.passed(|passed| passed.starts.len());
    withhold_wal(&proxy);
    proxy.open();
    relay.wait_logged("WAL that was acknowledged has been lost here");
    let to = relay.position("/upstream/lost/to");
    assert!(to > relay.flushed());
    let is_told = |relay: &Relay| {
        assert_eq!(relay.position("/upstream/lost/to"), to);
        assert!(relay.needs_attention() && relay.metric("walrelay_upstream_lost_bytes") > Some(0.0));
    };
    proxy.close();
    primary.wait_for_sql("select active from pg_replication_slots where slot_name = 'relay'", "f");
    primary.sql("select pg_drop_replication_slot('relay')");
    let sessions = relay.status()["upstream"]["sessions"].as_u64();
    proxy.open();
    wait_until("more sessions", || relay.status()["upstream"]["sessions"].as_u64() > sessions);
    primary.wait_for_sql(SLOTS, "1");
    relay.wait_logged("is not back yet, whatever the upstream's slot says now");
    is_told(&relay);
    // Also to the next process, which has no upstream yet.
    proxy.close();
    relay.kill();
    relay.launch();
    relay.wait_serving();
    is_told(&relay);
    proxy.open();
    wait_until("the next session", || relay.status()["upstream"]["sessions"].as_u64() >= Some(1));
    is_told(&relay);
    let vouched = proxy.passed(|passed| passed.flush_max_of[streams..].to_vec());
    assert!(vouched.iter().all(|flush| *flush == 0), "vouched for what is not there: {vouched:X?}");
    proxy.edit_nothing();
    relay.wait_flushed(upto);
    wait_until("nothing to be lost any more", || {
        relay.status()["upstream"]["lost"].is_null() && !relay.needs_attention()
    });
    assert_eq!(relay.metric("walrelay_upstream_lost_bytes"), Some(0.0));
}

/// Streams begin, and end before any WAL comes.
fn withhold_wal(proxy: &Proxy) {
    proxy.edit(|message| if wal_in(message).is_some() { Verdict::Cut } else { Verdict::Forward });
}

#[test]
fn what_was_lost_and_a_new_timeline_goes_on_without_is_told_to_be_gone() {
    let Some(installation) = Installation::since(15) else { return };
    let primary = Settings::new().segment_size_mb(1).line("wal_keep_size = 64MB").start(&installation);
    let mut heir = primary.standby("heir", primary.port, "");
    let proxy = Proxy::to(primary.port);
    let chain = Chain { relay: Relay::streaming_from("relay", proxy.port), primary, proxy };
    chain.cut();
    let (Chain { mut primary, proxy, mut relay }, upto) = set_back(chain, |primary| {
        write_wal(primary, MB);
        heir.wait_replayed(primary.flushed());
        heir.stop(Stop::Fast);
    });
    let held = relay.flushed();
    // It hears of the loss, and gets nothing of it.
    withhold_wal(&proxy);
    proxy.open();
    relay.wait_logged("WAL that was acknowledged has been lost here");
    primary.stop(Stop::Immediate);
    heir.start();
    heir.promote();
    let fork = fork_of(&heir, 2);
    assert!(held < fork && fork < upto, "{held:X} {fork:X} {upto:X}");
    proxy.edit_nothing();
    proxy.lead_to(heir.port);
    write_wal(&heir, MB);
    relay.wait_flushed(heir.flushed());
    relay.wait_logged("it will not come back");
    let told = relay.status()["upstream"].clone();
    assert!(told["lost"].is_null(), "{told}");
    assert_eq!(told["lost_for_good"]["from"], *lsn_text(fork), "{told}");
    assert!(lsn(told["lost_for_good"]["to"].as_str().unwrap()) > fork, "{told}");
    hold("it asks for a person", Duration::from_secs(1), || relay.needs_attention());
    heir.wait_reported_flush("relay", heir.flushed());
    // Also after a crash, until somebody has seen to it.
    relay.restart_after_kill();
    assert_eq!(relay.status()["upstream"]["lost_for_good"], told["lost_for_good"]);
    relay.wait_needs_attention();
    let files = std::fs::read_dir(relay.data_dir()).unwrap().map(|entry| entry.unwrap().path());
    let is_report = |path: &PathBuf| path.to_str().unwrap().contains("walrelay.lost.");
    let reports: Vec<_> = files.filter(is_report).collect();
    assert_eq!(reports.len(), 1, "{reports:?}");
    let text = std::fs::read_to_string(&reports[0]).unwrap();
    assert!(text.contains(&format!("\"from\": \"{}\"", lsn_text(fork))), "{text}");
    std::fs::remove_file(&reports[0]).unwrap();
    wait_until("nobody to be needed", || {
        !relay.needs_attention() && relay.status()["upstream"]["lost_for_good"].is_null()
    });
}

#[test]
fn what_was_lost_of_a_timeline_is_told_although_a_branch_that_was_set_aside_went_further() {
    let Some(installation) = Installation::since(15) else { return };
    let Torn { mut old, mut new, mut relay, .. } = torn(&installation, &[]);
    promote_behind(&mut old, &mut new, "");
    wait_timeline(&relay, 2);
    new.sql("insert into kept values (4)");
    new.wait_reported_flush("relay", new.flushed());
    let end = lsn(dead_branches(&relay)[0]["end"].as_str().unwrap());
    relay.terminate();
    let (data, old_copy) = (relay.data_dir().to_owned(), relay.data_dir().with_extension("old"));
    copy_folder(&data, &old_copy);
    relay.start();
    write_wal(&new, MB);
    let upto = new.flushed();
    assert!(upto < end, "{upto:X} {end:X}");
    new.wait_reported_flush("relay", upto);
    relay.terminate();
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::rename(&old_copy, &data).unwrap();
    relay.start();
    relay.wait_logged("WAL that was acknowledged has been lost here");
    relay.wait_logged("the WAL that had been lost is here again");
}

#[test]
fn what_a_slot_tells_of_a_branch_that_was_set_aside_is_no_loss() {
    let Some(installation) = Installation::since(15) else { return };
    let Torn { mut old, mut new, mut relay, .. } = torn(&installation, &[]);
    let end = old.flushed();
    relay.kill();
    promote_behind(&mut old, &mut new, "");
    // As it may be found at a server that knew of the branch.
    let mut client = RawClient::replication(new.port).unwrap();
    client.query("CREATE_REPLICATION_SLOT relay PHYSICAL RESERVE_WAL").unwrap();
    let (_, timeline, position) = identify_system(&mut client);
    client.start_replication(Some("relay"), position, timeline).unwrap();
    client.send_status(end, end, 0).unwrap();
    let at = format!("select restart_lsn = '{}' from pg_replication_slots", lsn_text(end));
    new.wait_for_sql(&at, "t");
    drop(client);
    new.wait_for_sql("select active from pg_replication_slots", "f");
    relay.start();
    wait_timeline(&relay, 2);
    new.sql("insert into kept values (4)");
    new.wait_reported_flush("relay", new.flushed());
    assert!(!relay.log().contains("has been lost here"), "{}", relay.log());
    assert!(relay.status()["upstream"]["lost"].is_null());
}
