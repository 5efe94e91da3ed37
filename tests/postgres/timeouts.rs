//! Silence, slowness and half-open connections on either side: noticed in time, bounded, and nobody else is disturbed.

use std::time::{Duration, Instant};

use crate::support::MB;
use crate::support::compare::assert_same_wal;
use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings};
use crate::support::proxy::Proxy;
use crate::support::raw::{Event, RawClient, error_in};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_until};

fn chain(prepare: impl FnOnce(Relay) -> Relay) -> Option<(Postgres, Proxy, Relay)> {
    let installation = Installation::any()?;
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = prepare(Relay::new("relay", proxy.port));
    relay.start();
    Some((primary, proxy, relay))
}

#[test]
fn a_silent_upstream_is_left_after_wal_receiver_timeout_and_found_again() {
    let Some((primary, proxy, relay)) = chain(|relay| relay.with("upstream.wal_receiver_timeout", "\"2s\""))
    else {
        return;
    };
    let connections = proxy.connections();
    proxy.stall(true);
    let stalled = Instant::now();
    wait_until("the relay to give up", || proxy.connections() > connections);
    let waited = stalled.elapsed();
    assert!(
        (Duration::from_millis(1_500)..Duration::from_secs(6)).contains(&waited),
        "gave up after {waited:?}"
    );
    proxy.stall(false);
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    assert_same_wal(&relay.wal_dir(), &primary, primary.flushed());
    proxy.assert_honest();
}

#[test]
fn an_upstream_that_is_away_is_asked_again_with_pauses() {
    let Some((primary, proxy, relay)) =
        chain(|relay| relay.with("upstream.wal_retrieve_retry_interval", "\"500ms\""))
    else {
        return;
    };
    proxy.close();
    // The pauses grow up to the interval, of which each is spread over the upper half.
    let before = proxy.connections();
    wait_until("the pauses to have grown", || proxy.connections() - before >= 5);
    let (before, begin) = (proxy.connections(), std::time::Instant::now());
    std::thread::sleep(Duration::from_secs(5));
    let attempts = proxy.connections() - before;
    let possible = u64::try_from(begin.elapsed().as_millis() / 250).unwrap() + 1;
    assert!((1..=possible).contains(&attempts), "{attempts} attempts in 5 s");
    assert!(relay.log().lines().count() < 100, "the log is flooded");
    proxy.open();
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
}

#[test]
fn a_refused_login_is_said_once_in_a_while_and_not_hammered() {
    let Some((primary, proxy, relay)) = chain(|relay| relay) else { return };
    let rules = primary.data().join("pg_hba.conf");
    let open = std::fs::read_to_string(&rules).unwrap();
    std::fs::write(&rules, format!("local all all trust\nhost postgres all 127.0.0.1/32 trust\nhost replication all 127.0.0.1/32 reject\n#{open}")).unwrap();
    primary.reload();
    wait_until("the rule to hold", || RawClient::replication(primary.port).is_err());
    proxy.cut();
    let before = proxy.connections();
    std::thread::sleep(Duration::from_secs(4));
    let attempts = proxy.connections() - before;
    assert!(
        (1..=8).contains(&attempts),
        "{attempts} logins in 4 s: at least 1 s must lie between refused ones"
    );
    assert!(relay.log().contains("pg_hba.conf"), "the primary's reason is not in the log");
    std::fs::write(&rules, open).unwrap();
    primary.reload();
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
}

#[test]
fn a_silent_client_is_asked_once_and_dropped_without_an_error() {
    let Some((_primary, _proxy, relay)) =
        chain(|relay| relay.with("downstream.wal_sender_timeout", "\"2s\""))
    else {
        return;
    };
    let mut client = RawClient::replication(relay.port).unwrap();
    client.start_replication(None, relay.oldest(), 1).unwrap();
    let started = Instant::now();
    let mut asked = 0;
    loop {
        match client.next_event(Duration::from_secs(10)) {
            Event::Wal { .. } => {}
            Event::Keepalive { reply_requested, .. } => asked += u32::from(reply_requested),
            Event::Closed => break,
            other => panic!("{other:?}"),
        }
    }
    let lived = started.elapsed();
    assert!((1..=3).contains(&asked), "asked {asked} times");
    assert!(
        (Duration::from_millis(1_500)..Duration::from_secs(5)).contains(&lived),
        "dropped after {lived:?}"
    );
    wait_until("its session to go", || relay.downstream("raw").is_empty());
}

#[test]
fn a_half_open_client_frees_its_slot_for_its_successor() {
    let Some((primary, _proxy, relay)) = chain(|relay| relay.with("downstream.wal_sender_timeout", "\"6s\""))
    else {
        return;
    };
    // What the successor is to get.
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    let between = Proxy::to(relay.port);
    let mut client = RawClient::replication(between.port).unwrap();
    client.rows("CREATE_REPLICATION_SLOT standby PHYSICAL RESERVE_WAL").unwrap();
    let from = relay.oldest();
    client.start_replication(Some("standby"), from, 1).unwrap();
    // From here on nothing gets through, and neither side is told.
    between.stall(true);
    let start = |client: &mut RawClient| {
        let answer = client.start_replication(Some("standby"), from, 1).unwrap();
        error_in(&answer).map(|error| error.code)
    };
    let mut successor = RawClient::replication(relay.port).unwrap();
    assert_eq!(start(&mut successor).as_deref(), Some("55006"), "the slot is in use until then");
    wait_until("the slot to be free", || start(&mut successor).is_none());
    let upto = relay.flushed();
    assert!(upto > from, "nothing to read");
    successor.read_wal(from, upto);
    let slots = relay.status()["slots"].clone();
    assert_eq!(slots[0]["active"], true, "{slots}");
    drop(client);
}

#[test]
fn a_client_that_answers_stays_though_nothing_is_written() {
    let Some((_primary, _proxy, relay)) =
        chain(|relay| relay.with("downstream.wal_sender_timeout", "\"1s\""))
    else {
        return;
    };
    let mut client = RawClient::replication(relay.port).unwrap();
    client.start_replication(None, relay.oldest(), 1).unwrap();
    let mut position = relay.oldest();
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        match client.next_event(Duration::from_millis(500)) {
            Event::Wal { start, bytes, .. } => position = start + bytes.len() as u64,
            Event::Keepalive { reply_requested: true, .. } => {
                client.send_status(position, position, 0).unwrap()
            }
            Event::Keepalive { .. } | Event::Silence => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_clients_request_for_a_reply_is_answered() {
    let Some((_primary, _proxy, relay)) = chain(|relay| relay) else { return };
    let mut client = RawClient::replication(relay.port).unwrap();
    let position = crate::support::raw::identify_system(&mut client).2;
    client.start_replication(None, position, 1).unwrap();
    let mut body = vec![b'r'];
    body.extend([position, position, 0, 0].map(u64::to_be_bytes).concat());
    body.push(1);
    client.send(b'd', &body).unwrap();
    let end = Instant::now() + Duration::from_secs(2);
    while !matches!(client.next_event(Duration::from_millis(500)), Event::Keepalive { .. }) {
        assert!(Instant::now() < end, "no keepalive in 2 s");
    }
}

#[test]
fn clients_that_never_read_cost_disk_and_no_memory_and_disturb_nobody() {
    let Some((primary, _proxy, mut relay)) = chain(|relay| {
        relay
            .with("store.tail_size", "\"16MB\"")
            .with("store.unwritten_size", "\"16MB\"")
            .with("store.wal_keep_size", "\"4GB\"")
    }) else {
        return;
    };
    let standby = primary.standby("standby", relay.port, "");
    let mut idlers: Vec<RawClient> = (0..8).map(|_| RawClient::replication(relay.port).unwrap()).collect();
    for idler in &mut idlers {
        idler.start_replication(None, relay.oldest(), 1).unwrap();
    }
    write_wal(&primary, 20 * MB);
    standby.wait_replayed(primary.flushed());
    let before = relay.process().memory("RssAnon");
    for _ in 0..8 {
        write_wal(&primary, 30 * MB);
    }
    standby.wait_replayed(primary.flushed());
    let after = relay.process().memory("RssAnon");
    println!("anonymous memory: {} MB, then {} MB after 240 MB more", before / MB, after / MB);
    assert!(after < before + 48 * MB, "memory grows with lag: {} MB to {} MB", before / MB, after / MB);
    relay.assert_running();
    relay.wait_flushed(primary.flushed());
    drop(idlers);
}

#[test]
fn a_login_that_never_ends_is_cut_off() {
    let Some((_primary, _proxy, relay)) =
        chain(|relay| relay.with("downstream.authentication_timeout", "\"2s\""))
    else {
        return;
    };
    let mut slow = RawClient::connect(relay.port).unwrap();
    let started = Instant::now();
    // One byte at a time: the limit is for the whole login.
    for byte in [0, 0, 0, 60, 0, 3, 0, 0, b'u', b's', b'e', b'r', 0, b'p'] {
        if slow.send_bytes(&[byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    assert!(slow.is_closed_within(Duration::from_secs(5)));
    assert!(started.elapsed() < Duration::from_secs(8));
}

#[test]
fn delay_on_the_way_changes_nothing_but_time() {
    let Some((primary, proxy, relay)) = chain(|relay| relay) else { return };
    proxy.delay(Duration::from_millis(20));
    write_wal(&primary, 4 * MB);
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    primary.wait_reported_flush("relay", upto);
    proxy.assert_honest();
    let connections = proxy.connections();
    hold("connected", Duration::from_secs(1), || proxy.connections() == connections);
}
