//! Few file descriptors and many clients: clients are refused, and the store has what it needs.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::support::compare::completed_end;
use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::Settings;
use crate::support::raw::{Event, RawClient};
use crate::support::relay::Relay;
use crate::support::wait::{wait_at_most, wait_until};
use crate::support::{MB, http};

/// Segments that a client goes through: what waits to be sent, what is read and what is read ahead are of three.
const SEGMENTS_EACH: u64 = 4;

/// Clients with segments of their own.
const PLACES: u64 = 64;

/// Clients that stay connected and read what nobody else reads, slowly enough to keep files open. One that is refused
/// begins again at once: whatever descriptor comes free, somebody wants it.
struct Storm {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<std::io::Result<usize>>>,
}

impl Storm {
    fn of(sessions: Vec<RawClient>, oldest: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let starts = (0..PLACES).cycle().map(|place| oldest + place * SEGMENTS_EACH * MB);
        let threads = sessions.into_iter().zip(starts).map(|(session, start)| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || read_slowly(session, start, &stop))
        });
        Self { threads: threads.collect(), stop }
    }

    /// Ends it; returns how often clients were refused WAL. Panics if the connection of one did not stay.
    fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).sum()
    }
}

/// Returns how often it was refused.
fn read_slowly(mut session: RawClient, start: u64, stop: &AtomicBool) -> std::io::Result<usize> {
    let mut refused = 0;
    while !stop.load(Ordering::Relaxed) {
        session.start_replication(None, start, 1)?;
        let mut position = start;
        while position < start + (SEGMENTS_EACH - 1) * MB && !stop.load(Ordering::Relaxed) {
            match session.next_event(Duration::from_secs(10)) {
                Event::Wal { start, bytes, .. } => position = start + bytes.len() as u64,
                Event::Keepalive { .. } => {}
                Event::Other(_) => {
                    refused += 1;
                    break;
                }
                Event::Silence => return Err(ErrorKind::TimedOut.into()),
                Event::Closed => return Err(ErrorKind::UnexpectedEof.into()),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // Behind an error this is ignored.
        session.send(b'c', b"")?;
        session.until_ready()?;
    }
    Ok(refused)
}

#[test]
fn the_store_goes_on_whatever_clients_take() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port)
        .with("downstream.max_wal_senders", "1000")
        .with("store.tail_size", "\"1MB\"")
        .with("store.unwritten_size", "\"1MB\"");
    relay.wrapper = ["prlimit", "--nofile=64:160"].map(str::to_owned).to_vec();
    relay.start();
    let oldest = relay.oldest();
    write_wal(&primary, PLACES * SEGMENTS_EACH * MB);
    primary.wait_reported_flush("relay", primary.flushed());
    let mut sessions = Vec::new();
    let refused = loop {
        match RawClient::replication(relay.port) {
            Ok(session) => sessions.push(session),
            Err(error) => break error.to_string(),
        }
    };
    let count = sessions.len();
    let storm = Storm::of(sessions, oldest);
    let strangers: Vec<RawClient> = (0..60).filter_map(|_| RawClient::connect(relay.port).ok()).collect();
    for round in 1..=20 {
        write_wal(&primary, 3 * MB);
        let upto = primary.flushed();
        let in_time = Duration::from_secs(10);
        let moved = || (primary.reported_flush("relay") >= upto).then_some(());
        assert!(wait_at_most(in_time, moved).is_some(), "round {round}: nothing is acknowledged");
        // By the files: the pages of the relay need descriptors too.
        let sealed = || (completed_end(&relay.wal_dir(), MB) + MB >= upto).then_some(());
        assert!(wait_at_most(in_time, sealed).is_some(), "round {round}: no segment is completed");
    }
    // However short: what is not acknowledged holds up commits.
    assert!(!relay.log().contains("WAL is not acknowledged"), "the store had no descriptor");
    assert!(!relay.log().contains("upkeep of the store failed"), "the store had no descriptor");
    for page in ["/metrics", "/livez"] {
        assert_eq!(http::get(relay.admin_port, page).unwrap().0, 200);
    }
    assert_eq!(storm.end(), 0, "clients that were let in were refused WAL");
    relay.assert_running();
    assert!(refused.contains("53300"), "{refused}");
    assert!(count > 8, "only {count} sessions");
    relay.wait_logged("max_wal_senders does not fit");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", relay.process().id())).unwrap();
    let open_files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(open_files.split_whitespace().nth(3), Some("160"), "{open_files}");
    drop(strangers);
    wait_until("new clients to be served again", || RawClient::replication(relay.port).is_ok());
}

#[test]
fn where_nothing_is_left_for_clients_it_does_not_start() {
    let mut relay = Relay::new("relay", 1);
    relay.wrapper = ["prlimit", "--nofile=80:80"].map(str::to_owned).to_vec();
    relay.launch();
    assert!(!relay.process_mut().wait_for_end().success());
    let complaint = "insufficient file descriptors available to start server process: system allows 80";
    assert!(relay.log().contains(complaint), "{}", relay.log());
}
