//! Hot standby feedback: what queries on standbys behind the relay still read, the primary keeps.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::process::Program;
use crate::support::proxy::{Proxy, Verdict, wal_in};
use crate::support::raw::{RawClient, identify_system};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_at_most, wait_for, wait_until};
use crate::support::{MB, lsn};
use crate::upstream_slot::{Chain, SLOTS};

const EAGER: &str = "hot_standby_feedback = on\nwal_receiver_status_interval = 1";

/// What the relay's slot on the primary holds back.
fn held_back(primary: &Postgres) -> String {
    primary.sql("select coalesce(xmin::text, '') from pg_replication_slots where slot_name = 'relay'")
}

fn wait_held_back(primary: &Postgres, expected: &str) {
    let query = "select coalesce(xmin::text, '') from pg_replication_slots where slot_name = 'relay'";
    primary.wait_for_sql(query, expected);
}

/// A transaction on a standby that reads what is there now, and the oldest id that it needs.
fn reader(standby: &Postgres) -> (RawClient, String) {
    let mut client = RawClient::sql(standby.port).unwrap();
    client.rows("begin isolation level repeatable read").unwrap();
    client.rows("select count(*) from pg_class").unwrap();
    let xmin = client.rows("select backend_xmin from pg_stat_activity where pid = pg_backend_pid()").unwrap();
    (client, xmin[0][0].clone().unwrap())
}

fn chain(installation: &Installation) -> (Postgres, Relay) {
    let primary = Settings::new().segment_size_mb(1).start(installation);
    let relay = Relay::streaming_from("relay", primary.port);
    primary.sql("create table t (id int)");
    (primary, relay)
}

fn write_transactions(primary: &Postgres) {
    for id in 0..5 {
        primary.sql(&format!("insert into t values ({id})"));
    }
}

#[test]
fn the_oldest_query_of_all_standbys_counts_and_the_last_to_go_clears_it() {
    for major in crate::support::lab::chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let (primary, relay) = chain(&installation);
        assert_eq!(held_back(&primary), "", "nobody has said anything");
        let far = Relay::streaming_from("far", relay.port);
        let (near, behind) =
            (primary.standby("near", relay.port, EAGER), primary.standby("behind", far.port, EAGER));
        for relay in [&relay, &far] {
            // A slot only advances: what all of them need must be known before one runs ahead.
            wait_until("all standbys to have said what they need", || {
                let status = relay.status();
                let sessions = status["downstream"].as_array().unwrap();
                let slots = status["slots"].as_array().unwrap();
                let has = |one: &serde_json::Value, key: &str| !one[key].is_null();
                sessions.iter().all(|session| has(session, "backend_xmin") || has(session, "slot_name"))
                    && slots.iter().all(|slot| has(slot, "xmin"))
            });
        }
        write_transactions(&primary);
        behind.wait_replayed(primary.flushed());
        let (old, old_xmin) = reader(&behind);
        write_transactions(&primary);
        near.wait_replayed(primary.flushed());
        let (new, new_xmin) = reader(&near);
        assert!(old_xmin.parse::<u32>().unwrap() < new_xmin.parse().unwrap());
        write_transactions(&primary);
        wait_held_back(&primary, &old_xmin);
        wait_until("the near standby's own to be known", || {
            relay.downstream("near")[0]["backend_xmin"].as_u64() == new_xmin.parse().ok()
        });
        // Vacuum keeps for the far reader what it still sees, and removes it when that has gone.
        primary.sql("delete from t");
        primary.sql("vacuum t");
        let bytes = || primary.sql("select pg_relation_size('t')").parse::<u64>().unwrap();
        assert!(bytes() > 0, "vacuum took what a standby reads");
        drop(old);
        wait_held_back(&primary, &new_xmin);
        drop((new, near));
        // Without queries a standby holds back what it has not replayed; with it gone, nothing is left but the other's.
        wait_for("the near standby's id to be gone", || (held_back(&primary) != new_xmin).then_some(()));
        drop(behind);
        wait_held_back(&primary, "");
        primary.sql("vacuum t");
        assert_eq!(bytes(), 0);
    }
}

#[test]
fn feedback_that_is_turned_off_is_taken_back_and_kept_off_by_the_setting() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let (primary, mut relay) = chain(&installation);
    let standby = primary.standby("standby", relay.port, EAGER);
    let (_reader, xmin) = reader(&standby);
    wait_held_back(&primary, &xmin);
    standby.add_settings("hot_standby_feedback = off");
    standby.reload();
    wait_held_back(&primary, "");
    standby.add_settings("hot_standby_feedback = on");
    standby.reload();
    wait_held_back(&primary, &xmin);
    // A relay that was killed has told nothing; its slot keeps what it was told, until it is back.
    relay.kill();
    assert_eq!(held_back(&primary), xmin);
    relay.set("upstream.hot_standby_feedback", "false");
    relay.start();
    wait_held_back(&primary, "");
    standby.wait_replayed(primary.flushed());
    relay.wait_downstream("standby", "streaming");
    assert_eq!(held_back(&primary), "");
}

#[test]
fn a_client_that_lies_about_transactions_changes_nothing() {
    let Some(installation) = Installation::in_turn(2) else { return };
    let (primary, relay) = chain(&installation);
    let standby = primary.standby("standby", relay.port, EAGER);
    write_transactions(&primary);
    // From here on the relay knows which transactions there are.
    primary.checkpoint();
    relay.wait_flushed(primary.flushed());
    standby.wait_replayed(primary.flushed());
    let (reader, xmin) = reader(&standby);
    write_transactions(&primary);
    wait_held_back(&primary, &xmin);
    let honest: u32 = xmin.parse().unwrap();
    let mut liar = RawClient::replication(relay.port).unwrap();
    let (_, timeline, position) = identify_system(&mut liar);
    liar.start_replication(None, position, timeline).unwrap();
    for (id, epoch) in [(honest, 1), (honest + 1_000_000, 0), (u32::MAX, 0), (5, u32::MAX)] {
        liar.send_feedback((id, epoch), (0, 0)).unwrap();
        liar.send_feedback((0, 0), (id, epoch)).unwrap();
    }
    // What is said next is heard: the lies before it were.
    liar.send_feedback((0, 0), (honest, 0)).unwrap();
    let catalog = "select coalesce(catalog_xmin::text, '') from pg_replication_slots";
    primary.wait_for_sql(catalog, &xmin);
    assert_eq!(held_back(&primary), xmin);
    // A lie that stands does not keep the primary from hearing the others: it would take neither.
    liar.send_feedback((0, 0), (honest + 1_000_000, 0)).unwrap();
    drop(reader);
    // Before the liar, who says nothing more, is given up.
    let heard = wait_at_most(Duration::from_secs(30), || (held_back(&primary) != xmin).then_some(()));
    assert!(heard.is_some(), "what the standby needs now is not known");
    // It goes without a farewell.
    drop(liar);
    primary.wait_for_sql(catalog, "");
    wait_until("the liar to be gone", || relay.downstream("raw").is_empty());
}

#[test]
fn transactions_of_a_later_epoch_are_held_back_and_none_of_another_is() {
    for major in crate::support::lab::chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        if !installation.has("pg_resetwal") {
            continue;
        }
        let mut primary = Settings::new().segment_size_mb(1).start(&installation);
        primary.stop(Stop::Fast);
        let reset = Program::new(installation.program("pg_resetwal"));
        reset.args(["-e", "3", "-D", primary.data().to_str().unwrap()]).for_server_user().run();
        primary.start();
        assert_eq!(primary.sql("select txid_current() >> 32"), "3");
        let relay = Relay::streaming_from("relay", primary.port);
        primary.sql("create table t (id int)");
        let standby = primary.standby("standby", relay.port, EAGER);
        write_transactions(&primary);
        primary.checkpoint();
        write_transactions(&primary);
        relay.wait_flushed(primary.flushed());
        standby.wait_replayed(primary.flushed());
        let (_reader, xmin) = reader(&standby);
        write_transactions(&primary);
        wait_held_back(&primary, &xmin);
        let honest: u32 = xmin.parse().unwrap();
        let mut other = RawClient::replication(relay.port).unwrap();
        let (_, timeline, position) = identify_system(&mut other);
        other.start_replication(None, position, timeline).unwrap();
        for epoch in [0, 2, 4] {
            other.send_feedback((honest - 1, epoch), (0, 0)).unwrap();
        }
        other.send_feedback((0, 0), (honest, 3)).unwrap();
        let catalog = "select coalesce(catalog_xmin::text, '') from pg_replication_slots";
        primary.wait_for_sql(catalog, &xmin);
        assert_eq!(held_back(&primary), xmin, "of another epoch");
    }
}

#[test]
fn lies_that_were_believed_are_forgotten_when_a_checkpoint_tells_better() {
    let Some(installation) = Installation::in_turn(0) else { return };
    let (primary, mut relay) = chain(&installation);
    let standby = primary.standby("standby", relay.port, EAGER);
    // A relay that has lost what it knew, and gets no checkpoint again, knows of no transaction.
    write_wal(&primary, MB);
    standby.wait_replayed(primary.flushed());
    relay.kill();
    std::fs::remove_file(relay.data_dir().join("walrelay.xids")).unwrap();
    relay.start();
    let mut liars = Vec::new();
    // Of an epoch that has not begun: the primary would take nothing of a message that has it.
    for (slot, xmin, catalog_xmin) in [(None, (5, 0), (1_000_000, 7)), (Some("liar"), (1_000_000, 7), (0, 0))]
    {
        let mut liar = RawClient::replication(relay.port).unwrap();
        if let Some(name) = slot {
            liar.query(&format!("CREATE_REPLICATION_SLOT {name} PHYSICAL RESERVE_WAL")).unwrap();
        }
        let (_, timeline, position) = identify_system(&mut liar);
        liar.start_replication(slot, position, timeline).unwrap();
        liar.send_feedback(xmin, catalog_xmin).unwrap();
        liars.push(liar);
    }
    wait_until("the lies to be believed", || {
        let status = relay.status();
        let slots = status["slots"].as_array().unwrap().clone();
        slots.iter().any(|slot| slot["xmin"] == 1_000_000)
            && relay.downstream("raw").iter().any(|raw| raw["backend_xmin"] == 5)
    });
    write_transactions(&primary);
    standby.wait_replayed(primary.flushed());
    let (_reader, xmin) = reader(&standby);
    assert_ne!(held_back(&primary), xmin, "nothing is in the way");
    write_transactions(&primary);
    primary.checkpoint();
    // It is in WAL that is verified when a record follows it.
    write_transactions(&primary);
    relay.wait_flushed(primary.flushed());
    // Before the liars, who say nothing more, are given up.
    let heard = wait_at_most(Duration::from_secs(30), || (held_back(&primary) == xmin).then_some(()));
    assert!(heard.is_some(), "what the standby needs is not known");
    // Who stops lying is heard, also where a slot has kept the lie.
    let honest: u32 = xmin.parse::<u32>().unwrap() - 1;
    liars[1].send_feedback((honest, 0), (0, 0)).unwrap();
    wait_until("what the slot keeps to be true", || {
        relay.slot("liar").is_some_and(|slot| slot["xmin"] == honest && slot["catalog_xmin"].is_null())
    });
}

#[test]
fn a_restart_takes_nothing_back_and_believes_nothing_that_cannot_be() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let (primary, mut relay) = chain(&installation);
    let standby = primary.standby("standby", relay.port, EAGER);
    write_transactions(&primary);
    primary.checkpoint();
    write_transactions(&primary);
    standby.wait_replayed(primary.flushed());
    let (_reader, xmin) = reader(&standby);
    write_transactions(&primary);
    wait_held_back(&primary, &xmin);
    // Without another checkpoint.
    write_transactions(&primary);
    relay.restart_after_kill();
    let mut liar = RawClient::replication(relay.port).unwrap();
    let (_, timeline, position) = identify_system(&mut liar);
    liar.start_replication(None, position, timeline).unwrap();
    liar.send_feedback((1_000_000, 7), (0, 0)).unwrap();
    write_transactions(&primary);
    // As long as it takes to tell what there is after the restart, and longer.
    hold("nothing is taken back", Duration::from_secs(20), || held_back(&primary) == xmin);
    assert_eq!(relay.downstream("standby")[0]["backend_xmin"].to_string(), xmin);
    assert!(relay.downstream("raw")[0]["backend_xmin"].is_null(), "a lie is believed");
}

/// A relay on its way to where its slot was made anew, by which it has told already what a standby behind it reads.
pub(crate) struct OnTheWay {
    pub(crate) primary: Postgres,
    pub(crate) relay: Relay,
    /// What the standby's reader needs.
    pub(crate) xmin: String,
    /// How far WAL gets to the relay.
    limit: Arc<AtomicU64>,
    /// The standby's way to the relay.
    to_relay: Proxy,
    _proxy: Proxy,
    _standby: Postgres,
    _reader: RawClient,
}

impl OnTheWay {
    pub(crate) fn begin(installation: &Installation) -> Self {
        let primary = Settings::new().segment_size_mb(1).start(installation);
        let proxy = Proxy::to(primary.port);
        let chain = Chain { relay: Relay::streaming_from("relay", proxy.port), primary, proxy };
        chain.primary.sql("create table t (id int)");
        let to_relay = Proxy::to(chain.relay.port);
        let standby = chain.primary.standby("standby", to_relay.port, EAGER);
        write_transactions(&chain.primary);
        standby.wait_replayed(chain.primary.flushed());
        chain.cut();
        let Chain { primary, proxy, relay } = chain;
        primary.sql("select pg_drop_replication_slot('relay')");
        let held = relay.flushed();
        write_wal(&primary, 8 * MB);
        primary.checkpoint();
        let made_at = lsn(&primary.sql("select redo_lsn from pg_control_checkpoint()"));
        assert!(made_at > held + 4 * MB);
        let limit = Arc::new(AtomicU64::new(held + MB));
        let upto = Arc::clone(&limit);
        proxy.edit(move |message| match wal_in(message) {
            Some((start, wal)) if start + wal.len() as u64 > upto.load(Ordering::SeqCst) => Verdict::Drop,
            _ => Verdict::Forward,
        });
        proxy.open();
        primary.wait_for_sql(SLOTS, "1");
        let (reader, xmin) = reader(&standby);
        wait_held_back(&primary, &xmin);
        // Reports have taken it back to where the relay is.
        let behind =
            format!("select restart_lsn < '{}' from pg_replication_slots", crate::support::lsn_text(made_at));
        primary.wait_for_sql(&behind, "t");
        Self { primary, relay, xmin, limit, to_relay, _proxy: proxy, _standby: standby, _reader: reader }
    }

    /// The relay is killed, and what is to begin the next stream gets there; the standby does not.
    pub(crate) fn kill(&mut self) {
        self.to_relay.close();
        self.relay.kill();
        self.limit.fetch_add(MB, Ordering::SeqCst);
    }
}

#[test]
fn a_restart_takes_nothing_back_although_the_slot_was_made_ahead_of_the_relay() {
    let Some(installation) = Installation::since(15) else { return };
    let mut way = OnTheWay::begin(&installation);
    way.kill();
    way.relay.start();
    let stays = || held_back(&way.primary) == way.xmin;
    hold("nothing is taken back while the standby is away", Duration::from_secs(5), stays);
    way.to_relay.open();
    wait_until("the standby to have said again what it needs", || {
        way.relay
            .downstream("standby")
            .first()
            .is_some_and(|one| one["backend_xmin"].as_u64() == way.xmin.parse().ok())
    });
    // Longer than standbys have time to come back.
    hold("nothing is taken back", Duration::from_secs(15), stays);
    assert!(!way.relay.log().contains("has been lost here"), "{}", way.relay.log());
}

#[test]
fn what_a_standby_with_a_slot_needs_is_kept_for_it_while_it_is_away() {
    let Some(installation) = Installation::in_turn(0) else { return };
    let (primary, mut relay) = chain(&installation);
    let mut client = RawClient::replication(relay.port).unwrap();
    client.query("CREATE_REPLICATION_SLOT standby PHYSICAL RESERVE_WAL").unwrap();
    let mut standby =
        primary.standby("standby", relay.port, &format!("{EAGER}\nprimary_slot_name = 'standby'"));
    write_transactions(&primary);
    standby.wait_replayed(primary.flushed());
    let (reader, xmin) = reader(&standby);
    write_transactions(&primary);
    wait_held_back(&primary, &xmin);
    assert!(relay.downstream("standby")[0]["backend_xmin"].is_null(), "it is the slot's");
    assert_eq!(relay.status()["slots"][0]["xmin"].to_string(), xmin);
    standby.stop(Stop::Immediate);
    drop(reader);
    wait_until("the standby to be gone", || relay.downstream("standby").is_empty());
    // Also after a restart; the primary's own slot would hide that it was forgotten.
    relay.terminate();
    primary.sql("select pg_drop_replication_slot('relay')");
    relay.start();
    write_transactions(&primary);
    wait_held_back(&primary, &xmin);
    client = RawClient::replication(relay.port).unwrap();
    client.query("DROP_REPLICATION_SLOT standby").unwrap();
    wait_held_back(&primary, "");
}
