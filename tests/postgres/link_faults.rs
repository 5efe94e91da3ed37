//! Whatever is done to what a compressed link carries, or to what is said of it: no wrong byte becomes WAL, and it goes on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::link::{link_of, linked, total};
use crate::support::MB;
use crate::support::compare::{assert_equal_clusters, assert_same_wal};
use crate::support::lab::Installation;
use crate::support::load::{Load, write_wal};
use crate::support::postgres::{Postgres, Settings};
use crate::support::powercut::Chance;
use crate::support::proxy::{Proxy, Verdict, frame_in};
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::wait::{PATIENCE, hold, wait_for, wait_until};

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

/// What a client asks for that wants a link.
const LINK_PARAMETERS: [(&str, &str); 4] = [
    ("user", "postgres"),
    ("replication", "true"),
    ("application_name", "stranger"),
    ("_pq_.walrelay_link", "1;zstd,lz4"),
];

/// The first frame of a relay's link that begins at this position, whole as it is on the wire.
fn frame_from(port: u16, start: u64) -> Vec<u8> {
    let mut client = RawClient::login(port, &LINK_PARAMETERS).unwrap();
    client.start_replication(None, start, 1).unwrap();
    wait_for("a frame", || {
        let message = client.read_message(PATIENCE).unwrap().expect("the stream goes on");
        let length = u32::try_from(message.body.len() + 4).unwrap().to_be_bytes();
        let whole = [&[message.kind], &length[..], &message.body].concat();
        frame_in(&whole).filter(|frame| frame.start == Some(start)).map(|_| whole)
    })
}

fn a_little_wal(primary: &Postgres) {
    primary.sql("select pg_logical_emit_message(false, 'a little', 'of WAL')");
}

#[test]
fn a_frame_of_another_session_never_becomes_wal() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let near = Relay::streaming_from("near", primary.port);
    let proxy = Proxy::to(near.port);
    let far = linked("far", proxy.port);
    // Frames that go on with a stream, in the order in which they came.
    let recorded = Arc::new(Mutex::new(Vec::new()));
    let recording = Arc::clone(&recorded);
    proxy.edit(move |message| {
        if frame_in(message).is_some_and(|frame| frame.start.is_none()) {
            recording.lock().unwrap().push(message.clone());
        }
        Verdict::Forward
    });
    wait_until("frames that go on with a stream", || {
        a_little_wal(&primary);
        recorded.lock().unwrap().len() > 4
    });
    let old = recorded.lock().unwrap()[2].clone();
    proxy.cut();
    let is_spliced = Arc::new(AtomicBool::new(false));
    let spliced = Arc::clone(&is_spliced);
    proxy.edit(move |message| match frame_in(message) {
        Some(frame) if frame.start.is_none() && !spliced.swap(true, Ordering::SeqCst) => {
            Verdict::Replace(vec![old.clone()])
        }
        _ => Verdict::Forward,
    });
    wait_until("it to be spliced in", || {
        a_little_wal(&primary);
        is_spliced.load(Ordering::SeqCst)
    });
    wait_until("it to be noticed", || total(&far, "walrelay_link_errors_total") == 1.0);
    let upto = primary.flushed();
    far.wait_flushed(upto);
    assert_same_wal(&far.wal_dir(), &primary, upto);
    proxy.assert_honest();
}

#[test]
fn a_frame_of_another_cluster_never_becomes_wal() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let other = Settings::new().segment_size_mb(1).fresh_identity().start(&installation);
    let (near, elsewhere) =
        (Relay::streaming_from("near", primary.port), Relay::streaming_from("elsewhere", other.port));
    write_wal(&other, 8 * MB);
    elsewhere.wait_flushed(other.flushed());
    let proxy = Proxy::to(near.port);
    let far = linked("far", proxy.port);
    let (is_armed, is_spliced) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (armed, spliced, port, mut end) =
        (Arc::clone(&is_armed), Arc::clone(&is_spliced), elsewhere.port, None);
    // In place of a frame: of the same place on the same timeline, well-formed, and of the other cluster.
    proxy.edit(move |message| {
        let Some(frame) = frame_in(message) else { return Verdict::Forward };
        let start = frame.start.or(end);
        end = start.map(|start| start + frame.wal_bytes);
        match start {
            Some(start) if armed.swap(false, Ordering::SeqCst) => {
                spliced.store(true, Ordering::SeqCst);
                Verdict::Replace(vec![frame_from(port, start)])
            }
            _ => Verdict::Forward,
        }
    });
    // The frames of a new session say where they begin.
    proxy.cut();
    wait_until("WAL over the new session", || {
        a_little_wal(&primary);
        far.flushed() == primary.flushed() && !link_of(&far).is_null()
    });
    assert!(other.flushed() > primary.flushed() + MB, "it has no WAL of this place");
    is_armed.store(true, Ordering::SeqCst);
    wait_until("a frame to be spliced in", || {
        a_little_wal(&primary);
        is_spliced.load(Ordering::SeqCst)
    });
    wait_until("it to be noticed", || total(&far, "walrelay_link_errors_total") == 1.0);
    assert!(far.log().contains("has a wrong checksum"), "{}", far.log());
    let upto = primary.flushed();
    far.wait_flushed(upto);
    assert_same_wal(&far.wal_dir(), &primary, upto);
    proxy.assert_honest();
}

#[test]
fn an_offer_or_an_answer_that_is_taken_away_makes_no_plain_stream_of_a_link_that_is_required() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let near = Relay::streaming_from("near", primary.port);
    let proxy = Proxy::to(near.port);
    let mut far = Relay::new("far", proxy.port).with("upstream.link", "\"require\"");
    for taken_away in ["the offer", "the answer"] {
        if taken_away == "the offer" {
            proxy.edit_startup(|parameters| parameters.retain(|(name, _)| name != "_pq_.walrelay_link"));
        } else {
            proxy.edit_startup(|_| {});
            proxy.edit(|message| {
                let is_answer = message[0] == b'S' && message[5..].starts_with(b"walrelay.link\0");
                if is_answer { Verdict::Drop } else { Verdict::Forward }
            });
        }
        far.launch();
        far.wait_logged(
            "does not offer a compressed link, but \\\"upstream.link\\\" is set to \\\"require\\\"",
        );
        write_wal(&primary, MB);
        hold("nothing is taken", Duration::from_secs(1), || far.status()["upstream"]["sessions"] == 0);
        assert_eq!(far.position("/store/flushed"), 0, "without {taken_away}");
        far.terminate();
    }
    assert_eq!(proxy.passed(|passed| passed.wal_bytes), 0);
    // Where a link is only preferred, the stream is plain without the offer, and says so.
    proxy.edit_nothing();
    proxy.edit_startup(|parameters| parameters.retain(|(name, _)| name != "_pq_.walrelay_link"));
    let plain = Relay::streaming_from("plain", proxy.port);
    plain.wait_flushed(primary.flushed());
    assert!(link_of(&plain).is_null());
    // With all of it there is a link.
    proxy.edit_startup(|_| {});
    far.start();
    wait_until("the link", || !link_of(&far).is_null());
    far.wait_flushed(primary.flushed());
    assert_same_wal(&far.wal_dir(), &primary, primary.flushed());
}

#[test]
fn a_stream_that_is_plain_after_an_error_becomes_a_link_again_by_itself() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let near = Relay::streaming_from("near", primary.port);
    let proxy = Proxy::to(near.port);
    let mut far = Relay::new("far", proxy.port).with("upstream.link_retry_interval", "\"3s\"");
    far.start();
    let is_spoiled = Arc::new(AtomicBool::new(false));
    let spoiled = Arc::clone(&is_spoiled);
    proxy.edit(move |message| {
        if frame_in(message).is_some() && !spoiled.swap(true, Ordering::SeqCst) {
            *message.last_mut().unwrap() ^= 1;
        }
        Verdict::Forward
    });
    // Commits go on all the time.
    let load = Load::start(&primary, Duration::from_millis(20));
    far.wait_logged("the next session is not compressed");
    wait_until("a plain stream", || far.status()["upstream"]["state"] == "streaming");
    assert!(link_of(&far).is_null());
    let plain = Instant::now();
    wait_until("the link", || !link_of(&far).is_null());
    assert!(plain.elapsed() > Duration::from_secs(1), "at once: {:?}", plain.elapsed());
    assert_eq!(far.times_logged("a compressed link is asked for again"), 1);
    assert_eq!(total(&far, "walrelay_link_errors_total"), 1.0);
    hold("and stays so", Duration::from_secs(4), || !link_of(&far).is_null());
    drop(load);
    let upto = primary.flushed();
    far.wait_flushed(upto);
    assert_same_wal(&far.wal_dir(), &primary, upto);
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
