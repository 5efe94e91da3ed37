//! Compressed links between relays: the far one holds the primary's bytes, whatever happens to the frames between them.

use std::time::Duration;

use crate::support::compare::{assert_equal_clusters, assert_same_wal, primary_bytes_of, wal_files};
use crate::support::lab::{Installation, chosen_majors};
use crate::support::load::{pgbench, pgbench_tables, write_wal};
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::proxy::Proxy;
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::support::{MB, lsn, lsn_text};

/// A relay that streams from another one over a link, and from nothing else.
pub(crate) fn linked(name: &str, port: u16) -> Relay {
    let mut relay = Relay::new(name, port).with("upstream.link", "\"require\"");
    relay.start();
    relay
}

pub(crate) fn link_of(relay: &Relay) -> serde_json::Value {
    relay.status()["upstream_link"].clone()
}

pub(crate) fn total(relay: &Relay, name: &str) -> f64 {
    relay.metric(name).unwrap()
}

#[test]
fn a_chain_over_a_link_feeds_a_standby_on_every_major() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = Settings::new().segment_size_mb(1).start(&installation);
        // Nothing is taken from it compressed, and that is no error.
        let near = Relay::streaming_from("near", primary.port);
        assert!(link_of(&near).is_null(), "a real server has granted a link");
        let far = linked("far", near.port);
        let standby = primary.standby("standby", far.port, "");
        pgbench_tables(&primary, 1);
        assert!(pgbench(&primary, 2, 2).wait_for_end().success());
        write_wal(&primary, 4 * MB);
        assert_equal_clusters(&primary, &standby);
        let upto = primary.flushed();
        far.wait_flushed(upto);
        assert_same_wal(&far.wal_dir(), &primary, upto);

        let link = link_of(&far);
        assert_eq!(link["codec"], "zstd:1");
        assert!(link["ratio"].as_f64().unwrap() > 1.5, "{link}");
        for kind in ["bulk", "stream"] {
            let received = total(&far, &format!("walrelay_link_received_{kind}_frames_total"));
            let sent = total(&near, &format!("walrelay_link_sent_{kind}_frames_total"));
            assert!(received > 0.0 && received <= sent, "{kind}: {received} of {sent}");
        }
        assert_eq!(total(&far, "walrelay_link_errors_total"), 0.0);
        let sent = near.downstream("far").remove(0)["link"].clone();
        assert_eq!(sent["codec"], "zstd:1");
        assert!(sent["wal_bytes"].as_u64() >= link["wal_bytes"].as_u64());
    }
}

#[test]
fn a_relay_without_links_and_a_real_server_decline_and_whoever_needs_one_says_so() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut near = Relay::new("near", primary.port).with("downstream.link_codecs", "[]");
    near.start();
    let far = Relay::streaming_from("far", near.port);
    let mut off = Relay::new("off", near.port).with("upstream.link", "\"off\"");
    off.start();
    write_wal(&primary, 2 * MB);
    for relay in [&far, &off] {
        relay.wait_flushed(primary.flushed());
        assert_same_wal(&relay.wal_dir(), &primary, primary.flushed());
        assert!(link_of(relay).is_null());
    }
    for port in [near.port, primary.port] {
        let mut demanding = Relay::new("demanding", port).with("upstream.link", "\"require\"");
        demanding.launch();
        demanding.wait_logged("does not offer a compressed link, but");
        assert_eq!(demanding.status()["upstream"]["sessions"], 0);
        assert!(demanding.is_running());
    }
}

#[test]
fn links_that_catch_up_at_once_hold_the_same_bytes() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let near = Relay::streaming_from("near", primary.port);
    let names: Vec<String> = (0..8).map(|number| format!("far{number}")).collect();
    let mut links: Vec<Relay> =
        names.iter().map(|name| Relay::new(name, near.port).with("upstream.link", "\"require\"")).collect();
    // Each begins where the relay is now, with a slot there.
    for link in &mut links {
        link.start();
        link.terminate();
    }
    write_wal(&primary, 24 * MB);
    near.wait_flushed(primary.flushed());
    for link in &mut links {
        link.launch();
    }
    let upto = primary.flushed();
    for link in &links {
        link.wait_flushed(upto);
        assert_same_wal(&link.wal_dir(), &primary, upto);
    }
    let compressed = total(&near, "walrelay_link_compressed_frames_total");
    let sent = total(&near, "walrelay_link_sent_bulk_frames_total");
    // Frames end at the same places on all links; each may begin, and end, with one of its own.
    let most = (24 * MB / BULK_FRAME_BYTES + 2 * 8) as f64;
    assert!(sent > 8.0 * 90.0 && compressed <= most, "{compressed} compressed, at most {most}, {sent} sent");
    assert_eq!(total(&near, "walrelay_link_shared_frames_total"), sent - compressed);
}

/// WAL in a frame that stands alone.
const BULK_FRAME_BYTES: u64 = 256 << 10;

#[test]
fn live_wal_is_encoded_once_however_many_links_there_are() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let send_to = "{ far1 = \"flushed\", far3 = \"flushed\" }";
    let mut near = Relay::new("near", primary.port)
        .with("downstream.send_to", send_to)
        .with("downstream.link_adapt", "false");
    near.start();
    let links: Vec<Relay> = (0..4).map(|number| linked(&format!("far{number}"), near.port)).collect();
    pgbench_tables(&primary, 1);
    let frames = |link: &Relay| {
        let count = |kind| total(link, &format!("walrelay_link_received_{kind}_frames_total"));
        (count("bulk"), count("stream"))
    };
    let everywhere = |primary: &Postgres| {
        let upto = primary.flushed();
        links.iter().for_each(|link| link.wait_flushed(upto));
        upto
    };
    // A link follows the stream where an epoch begins, and one begins for it once the last is long enough.
    wait_until("all links to follow the stream", || {
        let before: Vec<_> = links.iter().map(frames).collect();
        for _ in 0..20 {
            write_wal(&primary, 100_000);
            everywhere(&primary);
        }
        let follows = |(link, (bulk, stream))| {
            let (bulk_now, stream_now) = frames(link);
            bulk_now == bulk && stream_now > stream
        };
        links.iter().zip(before).all(follows)
    });
    let (from, before) = (everywhere(&primary), total(&near, "walrelay_link_encoded_wal_bytes_total"));
    assert!(pgbench(&primary, 2, 4).wait_for_end().success());
    let wal = everywhere(&primary) - from;
    let encoded = total(&near, "walrelay_link_encoded_wal_bytes_total") - before;
    let times = encoded / wal as f64;
    println!("{} kB of WAL, encoded {times:.2} times", wal / 1024);
    assert!(wal > MB / 4 && (0.9..1.25).contains(&times), "{wal} bytes of WAL, encoded {times:.2} times");
    for link in &links {
        assert_same_wal(&link.wal_dir(), &primary, primary.flushed());
    }
}

/// Most memory of a relay whose store may hold next to nothing.
const SMALL_RELAY_BYTES_MAX: u64 = 32 * MB;

#[test]
fn wal_that_shrinks_to_nothing_is_taken_as_the_store_has_room() {
    let Some(installation) = Installation::any() else { return };
    let primary = Postgres::primary(&installation);
    let mut near = Relay::new("near", primary.port).with("downstream.link_adapt", "false");
    near.start();
    let proxy = Proxy::to(near.port);
    let mut far = Relay::new("far", proxy.port)
        .with("upstream.link", "\"require\"")
        .with("store.tail_size", "\"1MB\"")
        .with("store.unwritten_size", "\"1MB\"");
    far.start();
    far.wait_flushed(primary.flushed());
    // Segments of 16 MB that are all but empty: the far relay gets them in one or two reads.
    proxy.stall(true);
    for _ in 0..20 {
        primary.sql("select pg_logical_emit_message(false, 'a little', 'of WAL')");
        primary.sql("select pg_switch_wal()");
    }
    let upto = primary.flushed();
    near.wait_flushed(upto);
    wait_until("all of it to be under way", || {
        near.downstream("far").iter().any(|session| session["sent_lsn"].as_str().map(lsn) >= Some(upto))
    });
    proxy.stall(false);
    let mut most = 0;
    wait_until("the far relay to have all WAL", || {
        most = far.process().memory("RssAnon").max(most);
        far.flushed() >= upto
    });
    println!("{} MB of memory", most / MB);
    assert!(most < SMALL_RELAY_BYTES_MAX, "{} MB of memory", most / MB);
    assert_eq!(far.status()["upstream"]["sessions"], 1, "{}", far.log());
    // So many segments at once get their names one after the other.
    wait_until("all segments to be sealed", || far.position("/store/sealed") + 16 * MB > upto);
    assert_same_wal(&far.wal_dir(), &primary, upto);
}

#[test]
fn a_link_that_may_have_durable_wal_only_is_never_ahead_of_it() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut near = Relay::new("near", primary.port).with("downstream.send_to", "{ careful = \"flushed\" }");
    near.start();
    let (careful, hasty) = (linked("careful", near.port), linked("hasty", near.port));
    pgbench_tables(&primary, 1);
    let mut load = pgbench(&primary, 2, 3);
    let mut looks = 0;
    while load.is_running() {
        let received = careful.position("/upstream/received");
        let flushed = near.flushed();
        assert!(received <= flushed, "{} beyond {}", lsn_text(received), lsn_text(flushed));
        looks += 1;
    }
    assert!(looks > 10);
    let upto = primary.flushed();
    for relay in [&careful, &hasty] {
        relay.wait_flushed(upto);
        assert_same_wal(&relay.wal_dir(), &primary, upto);
        assert!(!link_of(relay).is_null());
    }
}

#[test]
fn a_promotion_is_followed_over_a_link() {
    let Some(installation) = Installation::any() else { return };
    let mut old = Settings::new().segment_size_mb(1).line("wal_keep_size = '64MB'").start(&installation);
    let new = old.standby("new", old.port, "wal_keep_size = '64MB'");
    let conninfo = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=postgres sslmode=disable target_session_attrs=read-write",
        old.port, new.port
    );
    let mut near = Relay::new("near", old.port).with_conninfo(&conninfo);
    near.start();
    let far = linked("far", near.port);
    let standby = old.standby("behind", far.port, "");
    write_wal(&old, 3 * MB);
    new.wait_replayed(old.flushed());
    far.wait_flushed(old.flushed());
    old.stop(Stop::Kill);
    new.promote();
    write_wal(&new, 3 * MB);
    let upto = new.flushed();
    far.wait_flushed(upto);
    assert_equal_clusters(&new, &standby);
    assert_eq!(far.status()["store"]["timeline"], 2);
    assert!(!link_of(&far).is_null());
    let first = *wal_files(&far.wal_dir(), MB, 2).keys().next().unwrap();
    let ours = primary_bytes_of(&far.wal_dir(), MB, 2, first, upto);
    assert!(ours == primary_bytes_of(&new.wal_dir(), MB, 2, first, upto), "other bytes than were written");
    assert_eq!(total(&far, "walrelay_link_errors_total"), 0.0);
}

#[test]
fn rates_are_changed_while_the_relay_runs_by_those_who_may() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut near =
        Relay::new("near", primary.port).with("downstream.link_rate_max", "\"100kB\"").with_token();
    near.start();
    let far = linked("far", near.port);
    assert_eq!(near.status()["links"], serde_json::json!({"link_rate_max": 102_400, "links_rate_max": null}));
    // Noise, so that it stays as large as it is.
    primary.sql("create table noise as select gen_random_uuid() from generate_series(1, 60000)");
    let upto = primary.flushed();
    hold("the rate is kept", Duration::from_secs(2), || far.flushed() < upto);
    let rate = far.status()["upstream_link"]["wire_rate"].as_f64().unwrap();
    assert!(rate < 400_000.0, "{rate}");
    let (status, told) =
        near.post_json("/links", r#"{"link_rate_max": 0, "links_rate_max": "1GB"}"#).unwrap();
    let wanted = serde_json::json!({"link_rate_max": null, "links_rate_max": 1_u64 << 30});
    assert_eq!((status, &told), (200, &wanted));
    assert_eq!(near.status()["links"], wanted);
    far.wait_flushed(upto);
    assert_same_wal(&far.wal_dir(), &primary, upto);
    let (status, _) = near.post_json("/links", r#"{"link_rate_max": "often"}"#).unwrap();
    assert_eq!(status, 400);
    let (status, _) = far.post_json("/links", r#"{"link_rate_max": 0}"#).unwrap();
    assert_eq!(status, 403, "without a token set, also on loopback");
    assert!(total(&near, "walrelay_link_paced_microseconds_total") > 1_000_000.0);
}

/// Two relays that are older or newer than one another still stream, as plain as they must.
#[test]
fn what_is_offered_beyond_what_is_known_is_declined() {
    let Some(installation) = Installation::any() else { return };
    let primary = Postgres::primary(&installation);
    let near = Relay::streaming_from("near", primary.port);
    for (offer, is_granted) in [
        ("1;zstd", true),
        ("2,1;zstd,lz4", true),
        ("1;zstd;later", true),
        ("2;zstd", false),
        ("1;zstd;later!", false),
    ] {
        let parameters = [("user", "postgres"), ("replication", "true"), ("_pq_.walrelay_link", offer)];
        let client = RawClient::login(near.port, &parameters).unwrap();
        assert_eq!(client.parameters.contains_key("walrelay.link"), is_granted, "{offer}");
    }
}
