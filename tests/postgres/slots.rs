//! Slots of the relay beside slots of its primary, in the same situations: each says of its own what the other says.
//!
//! Both have the same limits. The primary makes a checkpoint before each switch of WAL files, because the relay looks at its
//! slots when a segment is complete. Positions are compared while nothing is written, so they are the very same.

use std::time::Duration;

use serde_json::Value;

use crate::support::lab::{Installation, chosen_majors};
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings};
use crate::support::raw::{Event, RawClient, ServerError, error_in, identify_system};
use crate::support::relay::Relay;
use crate::support::wait::{wait_for, wait_until};
use crate::support::{MB, lsn};

struct Pair {
    primary: Postgres,
    relay: Relay,
}

/// What is compared of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    restart_lsn: Option<u64>,
    wal_status: Option<String>,
    safe_wal_size: Option<i64>,
    active: bool,
    invalidation_reason: Option<String>,
}

impl Seen {
    fn status(&self) -> &str {
        self.wal_status.as_deref().unwrap_or("none")
    }
}

impl Pair {
    /// Slots may keep 8 segments, 6 of them within `max_wal_size`; `others` are settings that both have, instead or beside.
    fn start(installation: &Installation, others: &[(&str, &str)]) -> Self {
        let mut settings = Settings::new()
            .segment_size_mb(1)
            .line("wal_keep_size = 0")
            .line("max_slot_wal_keep_size = 8MB")
            .line("max_wal_size = 6MB")
            .line("min_wal_size = 2MB")
            .line("checkpoint_timeout = 1h")
            .line("checkpoint_completion_target = 0.5");
        for (name, value) in others {
            settings = settings.line(&format!("{name} = '{value}'"));
        }
        let primary = settings.start(installation);
        let mut relay = Relay::new("relay", primary.port)
            .with("store.wal_keep_size", "\"0\"")
            .with("store.max_slot_wal_keep_size", "\"8MB\"")
            .with("store.max_wal_size", "\"6MB\"")
            // What is in memory yet would be served.
            .with("store.tail_size", "\"2MB\"")
            .with("store.unwritten_size", "\"2MB\"");
        for (name, value) in others {
            relay.set(&format!("store.{name}"), &format!("{value:?}"));
        }
        relay.start();
        let pair = Self { primary, relay };
        // The relay has completed nothing before.
        pair.next_segment();
        pair
    }

    fn ports(&self) -> [u16; 2] {
        [self.primary.port, self.relay.port]
    }

    /// The primary completes a segment, after a checkpoint in it, and the relay has all of it.
    fn next_segment(&self) {
        self.primary.sql("select pg_logical_emit_message(false, 'slots', repeat('x', 1000))");
        self.primary.checkpoint();
        self.primary.switch_wal();
        self.settle();
    }

    /// The relay has written what the primary has, and has completed what is complete.
    fn settle(&self) {
        wait_until("the relay to have it all", || {
            let (written, sealed) =
                (self.relay.position("/store/written"), self.relay.position("/store/sealed"));
            let end = lsn(&self.primary.sql("select pg_current_wal_lsn()"));
            written == end && sealed == end - end % MB
        });
    }

    /// A slot here and there, at the same position, that a consumer has left.
    fn slot_left_behind(&self, name: &str) -> u64 {
        self.settle();
        let position = self.primary.flushed();
        for port in self.ports() {
            let mut client = stream_with_new_slot(port, name, position);
            client.send_status(position, position, 0).unwrap();
            self.wait_for_position(name, port, position);
            drop(client);
        }
        wait_until("the consumers to be gone", || self.of_both(name).iter().all(|seen| !seen.active));
        position
    }

    fn wait_for_position(&self, name: &str, port: u16, position: u64) {
        wait_until("the slot to be where the consumer is", || {
            let seen = if port == self.primary.port { self.of_server(name) } else { self.of_relay(name) };
            seen.restart_lsn == Some(position)
        });
    }

    fn of_both(&self, name: &str) -> [Seen; 2] {
        [self.of_server(name), self.of_relay(name)]
    }

    fn of_server(&self, name: &str) -> Seen {
        let reason = match self.primary.installation.major {
            17.. => "invalidation_reason",
            _ => "case wal_status when 'lost' then 'wal_removed' end",
        };
        let query = format!(
            "select restart_lsn, wal_status, safe_wal_size, active, {reason} from pg_replication_slots where slot_name = '{name}'"
        );
        let mut rows = RawClient::sql(self.primary.port).unwrap().rows(&query).unwrap();
        let mut row = rows.pop().unwrap_or_else(|| panic!("no slot {name}")).into_iter();
        let mut next = || row.next().unwrap();
        Seen {
            restart_lsn: next().map(|text| lsn(&text)),
            wal_status: next(),
            safe_wal_size: next().map(|text| text.parse().unwrap()),
            active: next().unwrap() == "t",
            invalidation_reason: next(),
        }
    }

    fn of_relay(&self, name: &str) -> Seen {
        let slot = self.relay.slot(name).unwrap_or_else(|| panic!("the relay has no slot {name}"));
        let text = |column: &str| slot[column].as_str().map(str::to_owned);
        Seen {
            restart_lsn: text("restart_lsn").map(|text| lsn(&text)),
            wal_status: text("wal_status"),
            safe_wal_size: slot["safe_wal_size"].as_i64(),
            active: slot["active"] == Value::Bool(true),
            // Before 17 no server tells why a slot is lost.
            invalidation_reason: match self.primary.installation.major {
                17.. => text("invalidation_reason"),
                _ => text("invalidation_reason").filter(|_| text("wal_status").as_deref() == Some("lost")),
            },
        }
    }

    /// Both say the same, and it is returned. Waits: the relay looks at its slots behind the stream.
    fn agree(&self, name: &str) -> Seen {
        let mut last = None;
        let agreed = crate::support::wait::wait_at_most(Duration::from_secs(10), || {
            self.settle();
            let [server, relay] = self.of_both(name);
            let same = (server == relay).then(|| relay.clone());
            last = Some([server, relay]);
            same
        });
        agreed.unwrap_or_else(|| panic!("server and relay differ: {last:#?}\n{}", self.relay.log()))
    }

    /// The error that both answer a request with.
    fn refusal(&self, request: impl Fn(&mut RawClient) -> ServerError) -> ServerError {
        let [server, relay] = self.ports().map(|port| request(&mut RawClient::replication(port).unwrap()));
        assert_eq!(server, relay, "server and relay differ");
        relay
    }
}

fn stream_with_new_slot(port: u16, name: &str, position: u64) -> RawClient {
    let mut client = RawClient::replication(port).unwrap();
    client.rows(&format!("CREATE_REPLICATION_SLOT {name} PHYSICAL")).unwrap();
    let timeline = identify_system(&mut client).1;
    client.start_replication(Some(name), position - position % MB, timeline).unwrap();
    client.read_wal(position - position % MB, position);
    client
}

/// What a stream that is asked for with this slot ends with.
fn end_of_stream(client: &mut RawClient, slot: &str, from: u64) -> ServerError {
    let answers = client.start_replication(Some(slot), from, 1).unwrap();
    error_in(&answers).unwrap_or_else(|| next_error(client))
}

/// The error that a stream ends with.
fn next_error(client: &mut RawClient) -> ServerError {
    loop {
        match client.next_event(Duration::from_secs(20)) {
            Event::Wal { .. } | Event::Keepalive { .. } => {}
            Event::Other(message) => return error_in(&[message]).expect("an error"),
            other => panic!("no error: {other:?}"),
        }
    }
}

#[test]
fn a_slot_left_behind_goes_through_the_states_of_the_primarys() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let pair = Pair::start(&installation, &[]);
        for port in pair.ports() {
            let mut client = RawClient::replication(port).unwrap();
            client.rows("CREATE_REPLICATION_SLOT fresh PHYSICAL").unwrap();
        }
        let position = pair.slot_left_behind("consumer");
        let mut states: Vec<String> = Vec::new();
        for step in 0..12 {
            let seen = pair.agree("consumer");
            if states.last().map(String::as_str) != Some(seen.status()) {
                states.push(seen.status().to_owned());
            }
            match seen.status() {
                "lost" => {
                    assert_eq!((seen.restart_lsn, seen.safe_wal_size), (None, None));
                    assert_eq!(seen.invalidation_reason.as_deref(), Some("wal_removed"));
                }
                _ => assert_eq!(seen.restart_lsn, Some(position), "step {step}"),
            }
            pair.next_segment();
        }
        assert_eq!(states, ["reserved", "extended", "unreserved", "lost"], "PostgreSQL {major}");
        let [server, relay] = pair.of_both("fresh");
        // Of a slot that keeps nothing the server computes something; the relay says nothing.
        assert_eq!(Seen { safe_wal_size: None, ..server }, relay);
        pair.relay.wait_logged("invalidating obsolete replication slot \\\"consumer\\\"");
        assert!(pair.relay.oldest() > position);
        assert_eq!(pair.relay.metric("walrelay_slot_lost{slot_name=\"consumer\"}"), Some(1.0));
        what_is_lost_is_answered_alike(&pair, major, position);
    }
}

/// After the loss of slot `consumer` at `position`.
fn what_is_lost_is_answered_alike(pair: &Pair, major: u32, position: u64) {
    if major >= 15 {
        let rows = pair.ports().map(|port| {
            let mut client = RawClient::replication(port).unwrap();
            client.rows("READ_REPLICATION_SLOT consumer").unwrap()
        });
        assert_eq!(rows[0], rows[1]);
    }
    let error = pair.refusal(|client| end_of_stream(client, "consumer", position - position % MB));
    assert_eq!(error.code, if major >= 18 { "55000" } else { "58P01" }, "{error:?}");
    // As a standby that finds nothing in its archive either: without a slot it is told the same.
    let without = pair.refusal(|client| {
        client.start_replication(None, position - position % MB, 1).unwrap();
        next_error(client)
    });
    assert_eq!(without.code, "58P01", "{without:?}");
    assert!(without.message.ends_with("has already been removed"), "{without:?}");
    if major < 18 {
        // They let it stream what is there, and differ in what becomes of the slot then.
        let now = pair.primary.flushed();
        let clients = pair.ports().map(|port| {
            let mut client = RawClient::replication(port).unwrap();
            client.start_replication(Some("consumer"), now - now % MB, 1).unwrap();
            client.read_wal(now - now % MB, now);
            client.send_status(now, now, 0).unwrap();
            pair.wait_for_position("consumer", port, now);
            client
        });
        let used = pair.agree("consumer");
        assert_eq!(used.status(), if major >= 16 { "unreserved" } else { "reserved" }, "{used:?}");
        let retained = pair.relay.metric("walrelay_slot_retained_bytes{slot_name=\"consumer\"}");
        assert_eq!(retained.is_some(), major < 16, "{retained:?}");
        drop(clients);
        wait_until("the consumers to be gone", || pair.of_both("consumer").iter().all(|seen| !seen.active));
        assert_eq!(pair.agree("consumer").status(), if major >= 16 { "lost" } else { "reserved" });
    }
    for port in pair.ports() {
        RawClient::replication(port).unwrap().rows("DROP_REPLICATION_SLOT consumer").unwrap();
    }
    let error = pair.refusal(|client| end_of_stream(client, "consumer", position));
    assert_eq!(error.code, "42704", "{error:?}");
}

#[test]
fn a_consumer_that_streams_too_slowly_is_ended_before_its_slot_is_taken() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let mut pair = Pair::start(&installation, &[]);
        pair.settle();
        let position = pair.primary.flushed();
        // They read what is sent: a server waits for that before it ends a session. They report nothing.
        let clients = pair.ports().map(|port| {
            let mut client = stream_with_new_slot(port, "slow", position);
            client.send_status(position, position, 0).unwrap();
            pair.wait_for_position("slow", port, position);
            std::thread::spawn(move || next_error(&mut client))
        });
        for _ in 0..11 {
            pair.next_segment();
        }
        let errors = clients.map(|client| client.join().unwrap());
        assert_eq!(errors[0], errors[1], "PostgreSQL {major}");
        assert_eq!(errors[1].code, "57P01", "{errors:?}");
        let seen = pair.agree("slow");
        assert_eq!((seen.status(), seen.restart_lsn, seen.active), ("lost", None, false));
        pair.relay.wait_logged("to release replication slot \\\"slow\\\"");
        // It is lost for good.
        pair.relay.restart_after_kill();
        assert_eq!(pair.agree("slow"), seen);
    }
}

#[test]
fn a_slot_that_nobody_uses_times_out_as_the_primarys() {
    for major in chosen_majors().into_iter().filter(|major| *major >= 18) {
        let Some(installation) = Installation::of(major) else { continue };
        let pair = Pair::start(&installation, &[("idle_replication_slot_timeout", "2s")]);
        let position = pair.slot_left_behind("idle");
        let since: String = wait_for("inactive_since", || {
            pair.relay.slot("idle")?["inactive_since"].as_str().map(str::to_owned)
        });
        let seconds = pair.primary.sql(&format!(
            "select abs(extract(epoch from inactive_since - '{since}'::timestamptz)) < 2 from pg_replication_slots where slot_name = 'idle'"
        ));
        assert_eq!(seconds, "t", "inactive since {since}");
        pair.next_segment();
        assert_eq!(pair.agree("idle").status(), "reserved", "before its time");
        assert!(pair.relay.metric("walrelay_slot_retained_bytes{slot_name=\"idle\"}") > Some(0.0));
        std::thread::sleep(Duration::from_secs(4));
        pair.next_segment();
        let seen = pair.agree("idle");
        assert_eq!((seen.status(), seen.restart_lsn), ("lost", Some(position)));
        assert_eq!(seen.invalidation_reason.as_deref(), Some("idle_timeout"));
        // It has its position still, and nothing is kept from there on.
        assert_eq!(pair.relay.metric("walrelay_slot_retained_bytes{slot_name=\"idle\"}"), None);
        let error = pair.refusal(|client| end_of_stream(client, "idle", position));
        assert!(error.code == "55000" && error.detail.contains("idle_timeout"), "{error:?}");
    }
}

#[test]
fn a_temporary_slot_times_out_while_its_session_does_nothing() {
    for major in chosen_majors().into_iter().filter(|major| *major >= 18) {
        let Some(installation) = Installation::of(major) else { continue };
        let pair = Pair::start(&installation, &[("idle_replication_slot_timeout", "2s")]);
        let mut clients = pair.ports().map(|port| RawClient::replication(port).unwrap());
        for client in &mut clients {
            client.rows("CREATE_REPLICATION_SLOT passing TEMPORARY PHYSICAL RESERVE_WAL").unwrap();
        }
        let seen = pair.agree("passing");
        assert_eq!((seen.status(), seen.active), ("reserved", true));
        assert!(seen.restart_lsn.is_some());
        std::thread::sleep(Duration::from_secs(4));
        pair.next_segment();
        let errors = clients.map(|mut client| next_error(&mut client));
        assert_eq!(errors[0], errors[1], "PostgreSQL {major}");
        assert_eq!(errors[1].code, "57P01", "{errors:?}");
        wait_until("the slots to be gone with their sessions", || {
            let rows = pair.primary.sql("select count(*) from pg_replication_slots where temporary");
            rows == "0" && pair.relay.slot("passing").is_none()
        });
    }
}

#[test]
fn since_when_nobody_streams_with_a_slot_is_told_as_by_the_primary() {
    for major in chosen_majors().into_iter().filter(|major| *major >= 17) {
        let Some(installation) = Installation::of(major) else { continue };
        let pair = Pair::start(&installation, &[]);
        pair.slot_left_behind("left");
        let position = pair.primary.flushed();
        let _streaming = pair.ports().map(|port| {
            let mut client = stream_with_new_slot(port, "used", position);
            client.send_status(position, position, 0).unwrap();
            pair.wait_for_position("used", port, position);
            client
        });
        let _idle = pair.ports().map(|port| {
            let mut client = RawClient::replication(port).unwrap();
            client.rows("CREATE_REPLICATION_SLOT passing TEMPORARY PHYSICAL RESERVE_WAL").unwrap();
            client
        });
        for (name, is_inactive) in [("left", true), ("used", false), ("passing", true)] {
            let since = pair.relay.slot(name).unwrap()["inactive_since"].as_str().map(str::to_owned);
            assert_eq!(since.is_some(), is_inactive, "PostgreSQL {major}: {name}: {since:?}");
            let since = since.map_or("null".to_owned(), |since| format!("'{since}'::timestamptz"));
            let same = format!(
                "select coalesce(abs(extract(epoch from inactive_since - {since})) < 2, inactive_since is null) from pg_replication_slots where slot_name = '{name}'"
            );
            assert_eq!(pair.primary.sql(&same), "t", "PostgreSQL {major}: {name}: {since}");
        }
    }
}

#[test]
fn a_slot_that_reserves_wal_begins_where_the_primarys_does_and_has_all_that_it_may_keep() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        // What is held when the slot is made is already all that a slot may keep.
        let mut pair = Pair::start(&installation, &[("wal_keep_size", "8MB")]);
        for _ in 0..10 {
            pair.next_segment();
        }
        let reserve = |pair: &Pair, name: &str| {
            for port in pair.ports() {
                let mut client = RawClient::replication(port).unwrap();
                client.rows(&format!("CREATE_REPLICATION_SLOT {name} PHYSICAL RESERVE_WAL")).unwrap();
            }
            pair.agree(name)
        };
        let seen = reserve(&pair, "backup");
        assert_eq!(seen.status(), "reserved");
        assert!(seen.restart_lsn.unwrap() >= pair.relay.oldest() + 6 * MB, "{seen:?}");
        // Also by a relay that has received no checkpoint since its start.
        pair.relay.terminate();
        pair.relay.start();
        assert_eq!(reserve(&pair, "after_a_restart").restart_lsn, seen.restart_lsn);
        let mut kept = 0;
        loop {
            pair.next_segment();
            let now = pair.agree("backup");
            if now.status() == "lost" {
                break;
            }
            assert_eq!(now.restart_lsn, seen.restart_lsn);
            kept += 1;
        }
        assert!(kept >= 8, "lost after {kept} segments");
    }
}

#[test]
fn wal_keep_size_beyond_what_slots_may_keep_is_kept_for_them_too() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let pair =
            Pair::start(&installation, &[("wal_keep_size", "12MB"), ("max_slot_wal_keep_size", "3MB")]);
        let position = pair.slot_left_behind("consumer");
        let mut states: Vec<String> = Vec::new();
        for _ in 0..17 {
            let seen = pair.agree("consumer");
            if states.last().map(String::as_str) != Some(seen.status()) {
                states.push(seen.status().to_owned());
            }
            assert!(seen.status() == "lost" || seen.restart_lsn == Some(position));
            pair.next_segment();
        }
        assert_eq!(states, ["reserved", "extended", "unreserved", "lost"], "PostgreSQL {major}");
    }
}

#[test]
fn a_slot_is_made_for_who_asks_where_that_is_configured() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port)
        .with("store.wal_keep_size", "\"0\"")
        .with("store.max_replication_slots", "1")
        .with("downstream.create_slots", "true");
    relay.start();
    write_wal(&primary, MB);
    let position = primary.flushed();
    relay.wait_flushed(position);
    let from = position - position % MB;
    let mut client = RawClient::replication(relay.port).unwrap();
    let error = end_of_stream(&mut client, "absent", position + (1 << 40));
    assert_eq!(error.message.split(' ').next(), Some("requested"), "{error:?}");
    RawClient::replication(relay.port).unwrap().rows("DROP_REPLICATION_SLOT absent").unwrap();
    let error = end_of_stream(&mut RawClient::replication(relay.port).unwrap(), "Bad-name", from);
    assert_eq!(error.code, "42602", "{error:?}");
    client.start_replication(Some("fresh"), from, 1).unwrap();
    drop(client);
    write_wal(&primary, 5 * MB);
    relay.wait_flushed(primary.flushed());
    assert_eq!(relay.slot("fresh").unwrap()["restart_lsn"], crate::support::lsn_text(from).as_str());
    assert!(relay.oldest() <= from);
    let error = end_of_stream(&mut RawClient::replication(relay.port).unwrap(), "another", from);
    assert_eq!((error.code.as_str(), error.message.as_str()), ("53400", "all replication slots are in use"));
}
