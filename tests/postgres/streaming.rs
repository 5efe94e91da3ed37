//! A primary streams into the relay, and standbys out of it, until they are equal to the primary.

use std::time::Duration;

use crate::support::compare::{assert_equal_clusters, assert_same_wal};
use crate::support::lab::{Installation, chosen_majors, give_to_server, scratch};
use crate::support::load::{Load, pgbench, pgbench_tables, write_wal};
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::proxy::Proxy;
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::support::{MB, lsn, lsn_text};

/// One test for each major; those that were not chosen say so and end.
macro_rules! for_each_major {
    ($property:ident: $($name:ident $major:literal),+) => {
        $(#[test]
        fn $name() {
            if let Some(installation) = Installation::of($major) {
                $property(&installation);
            }
        })+
    };
}

for_each_major!(two_standbys_equal_the_primary:
    two_standbys_equal_the_primary_on_13 13,
    two_standbys_equal_the_primary_on_14 14,
    two_standbys_equal_the_primary_on_15 15,
    two_standbys_equal_the_primary_on_16 16,
    two_standbys_equal_the_primary_on_17 17,
    two_standbys_equal_the_primary_on_18 18);

fn two_standbys_equal_the_primary(installation: &Installation) {
    let primary = Postgres::primary(installation);
    pgbench_tables(&primary, 2);
    let proxy = Proxy::to(primary.port);
    let relay = Relay::streaming_from("relay", proxy.port);
    let standbys = ["first", "second"].map(|name| primary.standby(name, relay.port, ""));
    assert!(pgbench(&primary, 4, 5).wait_for_end().success());
    for standby in &standbys {
        assert_equal_clusters(&primary, standby);
    }
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    primary.wait_reported_flush("relay", upto);
    one_honest_walsender(&primary);
    for name in ["first", "second"] {
        relay.wait_downstream(name, "streaming");
        assert_eq!(relay.downstream(name).len(), 1);
    }
    assert_same_wal(&relay.wal_dir(), &primary, upto);
    proxy.assert_honest();
}

/// The primary sees one standby whose positions are in order.
fn one_honest_walsender(primary: &Postgres) {
    assert_eq!(
        primary.sql("select string_agg(application_name || ' ' || state, ',') from pg_stat_replication"),
        "relay streaming"
    );
    let order = "select sent_lsn >= write_lsn and write_lsn >= flush_lsn and pg_current_wal_lsn() >= sent_lsn from pg_stat_replication";
    assert_eq!(primary.sql(order), "t");
    assert_eq!(
        primary.sql(
            "select active and restart_lsn is not null from pg_replication_slots where slot_name = 'relay'"
        ),
        "t"
    );
}

#[test]
fn a_chain_of_two_relays_feeds_a_standby() {
    let Some(installation) = Installation::any() else { return };
    let primary = Postgres::primary(&installation);
    let near = Relay::streaming_from("near", primary.port);
    let far = Relay::streaming_from("far", near.port);
    let standby = primary.standby("end_of_chain", far.port, "");
    pgbench_tables(&primary, 1);
    assert!(pgbench(&primary, 2, 2).wait_for_end().success());
    assert_equal_clusters(&primary, &standby);
    let upto = primary.flushed();
    far.wait_flushed(upto);
    assert_same_wal(&far.wal_dir(), &primary, upto);
    near.wait_downstream("far", "streaming");
}

#[test]
fn a_synchronous_commit_returns_when_the_relay_has_it_and_not_before() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().line("synchronous_standby_names = 'relay'").start(&installation);
    let mut relay = Relay::streaming_from("relay", primary.port);
    primary.wait_for_sql("select sync_state from pg_stat_replication", "sync");
    primary.sql("create table confirmed (id int)");
    for _ in 0..20 {
        primary.sql("insert into confirmed values (1)");
        let committed = lsn(&primary.sql("select pg_current_wal_lsn()"));
        assert!(relay.flushed() >= committed - 8192, "confirmed before it was durable");
    }
    relay.kill();
    wait_until("the primary to notice", || primary.sql("select count(*) from pg_stat_replication") == "0");
    let load = Load::start_waiting(&primary);
    hold("a commit waits for the relay", Duration::from_secs(1), || load.committed() == 0);
    relay.start();
    wait_until("commits to go on", || load.committed() > 0);
}

#[test]
fn a_late_standby_is_served_from_the_files_and_a_live_one_from_memory() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let relay = Relay::new("relay", primary.port)
        .with("store.tail_size", "\"4MB\"")
        .with("store.unwritten_size", "\"4MB\"");
    let mut relay = relay;
    relay.start();
    let late = {
        let mut standby = primary.standby("late", relay.port, "");
        standby.stop(crate::support::postgres::Stop::Fast);
        standby
    };
    let live = primary.standby("live", relay.port, "");
    crate::support::load::write_wal(&primary, 40 * crate::support::MB);
    live.wait_replayed(primary.flushed());
    let mut late = late;
    late.start();
    assert_equal_clusters(&primary, &late);
    assert_equal_clusters(&primary, &live);
}

#[test]
fn a_standby_whose_wal_is_gone_here_takes_it_from_its_archive_and_streams_on() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let archive = scratch();
        give_to_server(archive.path());
        let place = archive.path().display();
        let primary = Settings::new()
            .segment_size_mb(1)
            .line("archive_mode = on")
            .line(&format!("archive_command = 'cp \"%p\" \"{place}/%f\"'"))
            .start(&installation);
        let mut relay = Relay::new("relay", primary.port).with("store.wal_keep_size", "\"1MB\"");
        relay.start();
        let settings = format!("archive_mode = off\nrestore_command = 'cp \"{place}/%f\" \"%p\"'");
        let mut standby = primary.standby("standby", relay.port, &settings);
        standby.wait_replayed(primary.flushed());
        standby.stop(Stop::Fast);
        let needed = primary.flushed();
        write_wal(&primary, 8 * MB);
        primary.switch_wal();
        wait_until("the relay to have removed it", || relay.oldest() > needed + MB);
        let upto = primary.flushed();
        let last = lsn_text(upto - 1);
        primary.wait_for_sql(
            &format!(
                "select coalesce(last_archived_wal, '') >= pg_walfile_name('{last}') from pg_stat_archiver"
            ),
            "t",
        );
        standby.start();
        standby.wait_replayed(upto);
        assert!(standby.log().contains("restored log file"), "{}", standby.log());
        relay.wait_downstream("standby", "streaming");
        write_wal(&primary, 2 * MB);
        assert_equal_clusters(&primary, &standby);
    }
}
