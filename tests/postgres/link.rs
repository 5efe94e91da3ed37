//! Compressed links between relays: the far one holds the primary's bytes, whatever happens to the frames between them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::support::compare::{assert_equal_clusters, assert_same_wal, primary_bytes_of, wal_files};
use crate::support::lab::{Installation, chosen_majors};
use crate::support::load::{pgbench, pgbench_tables, write_wal};
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::powercut::Chance;
use crate::support::proxy::{Proxy, Verdict, frame_in};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};
use crate::support::{MB, lsn, lsn_text};

/// A relay that streams from another one over a link, and from nothing else.
fn linked(name: &str, port: u16) -> Relay {
    let mut relay = Relay::new(name, port).with("upstream.link", "\"require\"");
    relay.start();
    relay
}

fn link_of(relay: &Relay) -> serde_json::Value {
    relay.status()["upstream_link"].clone()
}

fn total(relay: &Relay, name: &str) -> f64 {
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
    assert!(sent > 8.0 * 90.0 && compressed * 2.0 < sent, "{compressed} compressed, {sent} sent");
}

/// Most memory of a relay whose store may hold next to nothing.
const SMALL_RELAY_BYTES_MAX: u64 = 64 * MB;

#[test]
fn wal_that_shrinks_to_nothing_is_taken_as_the_store_has_room() {
    let Some(installation) = Installation::any() else { return };
    let primary = Postgres::primary(&installation);
    let near = Relay::streaming_from("near", primary.port);
    let proxy = Proxy::to(near.port);
    let mut far = Relay::new("far", proxy.port)
        .with("upstream.link", "\"require\"")
        .with("store.tail_size", "\"1MB\"")
        .with("store.unwritten_size", "\"1MB\"");
    far.start();
    far.wait_flushed(primary.flushed());
    // Segments of 16 MB that are all but empty: the far relay gets them in one or two reads.
    proxy.stall(true);
    for _ in 0..32 {
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
    assert_same_wal(&far.wal_dir(), &primary, upto);
}

/// What a proxy does to a message of a link.
type Spoiler = (&'static str, fn(&mut Vec<u8>, &mut Chance) -> Option<Verdict>);

const SPOILERS: [Spoiler; 8] = [
    ("a flipped bit", |message, chance| {
        let bit = usize::try_from(chance.between(8 * 5, 8 * message.len() as u64)).unwrap();
        message[bit / 8] ^= 1 << (bit % 8);
        Some(Verdict::Forward)
    }),
    ("a dropped frame", |_, _| Some(Verdict::Drop)),
    ("a repeated frame", |message, _| Some(Verdict::Replace(vec![message.clone(), message.clone()]))),
    ("a frame cut short", |message, _| {
        message.truncate(message.len() - 1);
        let len = u32::try_from(message.len() - 1).unwrap();
        message[1..5].copy_from_slice(&len.to_be_bytes());
        Some(Verdict::Forward)
    }),
    ("a frame of another place", |message, _| {
        let start = frame_in(message)?.start? + 8;
        message[21..29].copy_from_slice(&start.to_be_bytes());
        Some(Verdict::Forward)
    }),
    ("a bomb", |message, _| {
        let zeros = vec![0; 64 << 20];
        let mut bomb = vec![0; 1 << 20];
        let len = zstd_safe::compress(&mut bomb[..], &zeros, 1).unwrap();
        let frame = frame_in(message)?;
        message.truncate(frame.payload);
        message.extend(&bomb[..len]);
        let length = u32::try_from(message.len() - 1).unwrap();
        message[1..5].copy_from_slice(&length.to_be_bytes());
        // A longer one is refused before it is looked at.
        (frame.wal_bytes > len as u64).then_some(Verdict::Forward)
    }),
    ("garbage in place of a frame", |message, chance| {
        let payload = frame_in(message)?.payload;
        message[payload..].fill_with(|| chance.between(0, 256) as u8);
        Some(Verdict::Forward)
    }),
    ("another message of that kind", |message, _| {
        message[6] = b'?';
        Some(Verdict::Forward)
    }),
];

#[test]
fn a_spoiled_frame_never_becomes_wal_and_the_next_session_is_plain() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let near = Relay::streaming_from("near", primary.port);
    let proxy = Proxy::to(near.port);
    let far = Relay::streaming_from("far", proxy.port);
    let standby = primary.standby("standby", far.port, "");
    let mut chance = Chance::seeded();
    for (round, (what, spoil)) in SPOILERS.into_iter().enumerate() {
        wait_until(&format!("a link before {what}"), || !link_of(&far).is_null());
        let errors = total(&far, "walrelay_link_errors_total");
        let spoiled = Arc::new(AtomicBool::new(false));
        let (done, mut own, mut left) =
            (Arc::clone(&spoiled), Chance::of(chance.between(0, u64::MAX)), chance.between(0, 6));
        proxy.edit(move |message| {
            if frame_in(message).is_none() || done.load(Ordering::SeqCst) {
                return Verdict::Forward;
            }
            if left > 0 {
                left -= 1;
                return Verdict::Forward;
            }
            let mut changed = message.clone();
            match spoil(&mut changed, &mut own) {
                Some(verdict) => {
                    done.store(true, Ordering::SeqCst);
                    *message = changed;
                    verdict
                }
                None => Verdict::Forward,
            }
        });
        while !spoiled.load(Ordering::SeqCst) {
            write_wal(&primary, MB);
            primary.sql("insert into filler values ('a little')");
        }
        primary.sql("insert into filler values ('what comes behind')");
        wait_until(&format!("{what} to be noticed"), || total(&far, "walrelay_link_errors_total") > errors);
        let upto = primary.flushed();
        far.wait_flushed(upto);
        assert!(link_of(&far).is_null(), "round {round}: compressed again after {what}");
        assert_same_wal(&far.wal_dir(), &primary, upto);
        proxy.edit_nothing();
        // The session after that may be a link again.
        proxy.cut();
    }
    assert_equal_clusters(&primary, &standby);
    assert!(far.times_logged("the next session is not compressed") >= SPOILERS.len());
    proxy.assert_honest();
}

#[test]
fn frames_in_another_order_are_noticed_and_a_link_that_is_required_is_compressed_again() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let near = Relay::streaming_from("near", primary.port);
    let proxy = Proxy::to(near.port);
    let far = linked("far", proxy.port);
    let mut held_back = None;
    let swapped = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&swapped);
    proxy.edit(move |message| {
        if frame_in(message).is_none() || done.load(Ordering::SeqCst) {
            return Verdict::Forward;
        }
        match held_back.take() {
            None => {
                held_back = Some(message.clone());
                Verdict::Drop
            }
            Some(first) => {
                done.store(true, Ordering::SeqCst);
                Verdict::Replace(vec![message.clone(), first])
            }
        }
    });
    while !swapped.load(Ordering::SeqCst) {
        write_wal(&primary, MB);
    }
    far.wait_logged("the next session is compressed again, because upstream.link is");
    let upto = primary.flushed();
    far.wait_flushed(upto);
    assert_same_wal(&far.wal_dir(), &primary, upto);
    wait_until("the link", || !link_of(&far).is_null());
    assert_eq!(total(&far, "walrelay_link_errors_total"), 1.0);
    assert_eq!(total(&far, "walrelay_link_received_plain_messages_total"), 0.0);
}

#[test]
fn a_link_of_another_history_is_refused_until_a_person_has_seen_it() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let near = Relay::streaming_from("near", primary.port);
    let proxy = Proxy::to(near.port);
    let mut far = Relay::new("far", proxy.port);
    let hellos = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&hellos);
    proxy.edit(move |message| {
        if message.len() == 33 && message[..1] == *b"d" && message[5..7] == *b"zh" {
            seen.fetch_add(1, Ordering::SeqCst);
            message[21] ^= 1;
            let checksum = crc32fast::hash(&message[5..29]);
            message[29..33].copy_from_slice(&checksum.to_be_bytes());
        }
        Verdict::Forward
    });
    far.launch();
    far.wait_logged("the link's sender has another history of timeline 1 than this relay");
    far.wait_needs_attention();
    let held = far.position("/store/flushed");
    write_wal(&primary, MB);
    hold("nothing is taken", Duration::from_secs(1), || far.position("/store/flushed") == held);
    assert!(hellos.load(Ordering::SeqCst) >= 1);
    proxy.edit_nothing();
    // Looked at again now and then; a person does not wait for that.
    far.terminate();
    far.start();
    far.wait_flushed(primary.flushed());
    wait_until("no more attention", || !far.needs_attention());
    assert_same_wal(&far.wal_dir(), &primary, primary.flushed());
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
        let client = crate::support::raw::RawClient::login(near.port, &parameters).unwrap();
        assert_eq!(client.parameters.contains_key("walrelay.link"), is_granted, "{offer}");
    }
}
