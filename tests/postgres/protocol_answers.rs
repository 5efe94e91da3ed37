//! Whatever a client asks, however wrong: PostgreSQL's own answer, and the others are served on.
//!
//! Most answers are compared with what the primary itself says to the same words.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::raw::{
    Event, Message, RawClient, ServerError, columns_of, error_in, identify_system, rows_of, tags_of,
};
use crate::support::relay::Relay;
use crate::support::wait::wait_until;
use crate::support::{MB, lsn, lsn_text};

const MOMENT: Duration = Duration::from_secs(3);

fn pair(installation: &Installation) -> (Postgres, Relay) {
    let primary = Settings::new().segment_size_mb(1).start(installation);
    let relay = Relay::streaming_from("relay", primary.port);
    (primary, relay)
}

/// What of an answer must agree: kinds, columns, tags, and the error.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    kinds: String,
    columns: Vec<(String, u32)>,
    tags: Vec<String>,
    error: Option<ServerError>,
}

impl Shape {
    fn of(messages: &[Message]) -> Self {
        Self {
            kinds: messages.iter().map(|message| message.kind as char).collect(),
            columns: columns_of(messages),
            tags: tags_of(messages),
            error: error_in(messages),
        }
    }
}

#[test]
fn commands_are_answered_as_the_primary_answers_them() {
    for major in crate::support::lab::chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let (primary, relay) = pair(&installation);
        let mut theirs = RawClient::replication(primary.port).unwrap();
        let mut ours = RawClient::replication(relay.port).unwrap();
        for command in SAME_ANSWER {
            if command.contains("READ_REPLICATION_SLOT") && major < 15 {
                continue;
            }
            let (expected, answered) = (theirs.query(command).unwrap(), ours.query(command).unwrap());
            assert_eq!(Shape::of(&answered), Shape::of(&expected), "PostgreSQL {major}: {command}");
            if command.starts_with("SHOW wal_segment_size") || command.starts_with("SHOW data_directory_mode")
            {
                assert_eq!(rows_of(&answered), rows_of(&expected), "PostgreSQL {major}: {command}");
            }
        }
        // Whatever was asked, both sessions live.
        assert_eq!(identify_system(&mut ours).0, identify_system(&mut theirs).0);
    }
}

const SAME_ANSWER: &[&str] = &[
    "IDENTIFY_SYSTEM",
    "IDENTIFY_SYSTEM;",
    "SHOW wal_segment_size",
    "SHOW data_directory_mode",
    "SHOW no_such_thing",
    "TIMELINE_HISTORY 7",
    "identify_system",
    "",
    ";",
    "SELECT 1",
    "IDENTIFY_SYSTEM; IDENTIFY_SYSTEM",
    "START_REPLICATION nonsense",
    "START_REPLICATION SLOT no_such_slot 0/1000000 TIMELINE 1",
    "START_REPLICATION 0/1000000 TIMELINE 9",
    "CREATE_REPLICATION_SLOT slot_a PHYSICAL",
    "CREATE_REPLICATION_SLOT slot_a PHYSICAL",
    "CREATE_REPLICATION_SLOT \"Not Allowed\" PHYSICAL",
    "CREATE_REPLICATION_SLOT slot_b TEMPORARY PHYSICAL RESERVE_WAL",
    "READ_REPLICATION_SLOT slot_a",
    "READ_REPLICATION_SLOT no_such_slot",
    "DROP_REPLICATION_SLOT slot_b",
    "DROP_REPLICATION_SLOT slot_a",
    "DROP_REPLICATION_SLOT slot_a",
];

#[test]
fn files_are_made_as_readable_as_the_primarys() {
    let Some(installation) = Installation::any() else { return };
    let mut primary = Settings::new().segment_size_mb(1).start(&installation);
    primary.stop(Stop::Fast);
    std::fs::set_permissions(primary.data(), std::fs::Permissions::from_mode(0o750)).unwrap();
    primary.start();
    let relay = Relay::streaming_from("relay", primary.port);
    let told = [primary.port, relay.port]
        .map(|port| RawClient::replication(port).unwrap().rows("SHOW data_directory_mode").unwrap());
    assert_eq!(told[0], [[Some("0750".to_owned())]]);
    assert_eq!(told[1], told[0]);
}

#[test]
fn a_clients_name_is_shown_as_the_primary_shows_it() {
    let names =
        ["dc2_a".to_owned(), "d\u{fc}\n\u{7f}c".to_owned(), "a".repeat(100), "a".repeat(62) + "\u{fc}\u{fc}"];
    for major in crate::support::lab::chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let (primary, relay) = pair(&installation);
        for name in &names {
            let parameters = [("user", "postgres"), ("replication", "true"), ("application_name", name)];
            let shown = [relay.port, primary.port].map(|port| {
                RawClient::login(port, &parameters).unwrap().parameters.remove("application_name")
            });
            assert_eq!(shown[0], shown[1], "PostgreSQL {major}: {name:?}");
        }
    }
}

#[test]
fn the_login_tells_the_primarys_parameters() {
    for major in crate::support::lab::chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let (primary, relay) = pair(&installation);
        let theirs = RawClient::replication(primary.port).unwrap().parameters;
        let mut ours = RawClient::replication(relay.port).unwrap().parameters;
        assert!(ours.remove("walrelay.instances").is_some(), "the one that is a relay's own");
        let names = |of: &std::collections::BTreeMap<String, String>| of.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&ours), names(&theirs), "PostgreSQL {major}");
        for name in [
            "server_version",
            "integer_datetimes",
            "server_encoding",
            "DateStyle",
            "in_hot_standby",
            "default_transaction_read_only",
        ] {
            assert_eq!(ours.get(name), theirs.get(name), "PostgreSQL {major}: {name}");
        }
    }
}

#[test]
fn a_slot_in_use_is_refused_with_the_pid_that_has_it() {
    let Some(installation) = Installation::any() else { return };
    let (_primary, relay) = pair(&installation);
    let mut first = RawClient::replication(relay.port).unwrap();
    first.rows("CREATE_REPLICATION_SLOT busy PHYSICAL RESERVE_WAL").unwrap();
    first.start_replication(Some("busy"), relay.oldest(), 1).unwrap();
    let pid = relay.downstream("raw")[0]["pid"].clone();
    let mut second = RawClient::replication(relay.port).unwrap();
    let answer = second.start_replication(Some("busy"), relay.oldest(), 1).unwrap();
    let error = error_in(&answer).unwrap();
    assert_eq!(
        (error.code.as_str(), error.message),
        ("55006", format!("replication slot \"busy\" is active for PID {pid}"))
    );
    let error = second.rows("DROP_REPLICATION_SLOT busy").unwrap_err();
    assert_eq!(error.code, "55006");
    drop(first);
    wait_until("the slot to be free", || second.rows("DROP_REPLICATION_SLOT busy").is_ok());
}

#[test]
fn a_permanent_slot_survives_a_crash_and_a_temporary_one_its_session_not() {
    let Some(installation) = Installation::any() else { return };
    let (primary, mut relay) = pair(&installation);
    let mut client = RawClient::replication(relay.port).unwrap();
    client.rows("CREATE_REPLICATION_SLOT kept PHYSICAL RESERVE_WAL").unwrap();
    client.rows("CREATE_REPLICATION_SLOT passing TEMPORARY PHYSICAL RESERVE_WAL").unwrap();
    write_wal(&primary, MB);
    let upto = primary.flushed();
    client.start_replication(Some("kept"), relay.oldest(), 1).unwrap();
    client.read_wal(relay.oldest(), upto);
    client.send_status(upto, upto, 0).unwrap();
    let restart_lsn = |relay: &Relay| relay.status()["slots"][0]["restart_lsn"].as_str().map_or(0, lsn);
    wait_until("the slot to advance", || restart_lsn(&relay) >= upto);
    drop(client);
    wait_until("the temporary slot to go", || {
        relay.status()["slots"].as_array().is_some_and(|slots| slots.len() == 1)
    });
    relay.restart_after_kill();
    let slots = relay.status()["slots"].clone();
    assert_eq!(slots.as_array().map(Vec::len), Some(1));
    assert_eq!(slots[0]["slot_name"], "kept");
}

#[test]
fn a_start_that_is_too_old_is_told_which_segment_is_gone() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    // What is still in memory is served even when its file is gone, so little is kept there.
    let mut relay = Relay::new("relay", primary.port)
        .with("store.wal_keep_size", "\"2MB\"")
        .with("store.tail_size", "\"1MB\"")
        .with("store.unwritten_size", "\"1MB\"");
    relay.start();
    let old = relay.oldest();
    write_wal(&primary, 12 * MB);
    wait_until("old WAL to go", || relay.oldest() > old);
    let mut client = RawClient::replication(relay.port).unwrap();
    let mut answer = client.start_replication(None, old, 1).unwrap();
    assert_eq!(
        answer.last().map(|message| message.kind),
        Some(b'W'),
        "the error comes after CopyBothResponse"
    );
    answer.extend(client.until_ready().unwrap());
    let error = error_in(&answer).unwrap();
    assert_eq!(error.code, "58P01");
    let segment = format!("{:08X}{:08X}{:08X}", 1, old >> 32, (old & 0xFFFF_FFFF) / MB);
    assert_eq!(error.message, format!("requested WAL segment {segment} has already been removed"));
    identify_system(&mut client);
}

#[test]
fn a_start_slightly_ahead_waits_and_one_far_ahead_is_refused() {
    let Some(installation) = Installation::any() else { return };
    let (primary, relay) = pair(&installation);
    let mut client = RawClient::replication(relay.port).unwrap();
    let position = identify_system(&mut client).2;
    let ahead = position.next_multiple_of(MB);
    client.start_replication(None, ahead, 1).unwrap();
    write_wal(&primary, 2 * MB);
    client.read_wal(ahead, ahead + MB);

    let mut far = RawClient::replication(relay.port).unwrap();
    let position = identify_system(&mut far).2 + 100 * MB;
    let mut answer = far.start_replication(None, position, 1).unwrap();
    assert_eq!(answer.last().map(|message| message.kind), Some(b'W'));
    answer.extend(far.until_ready().unwrap());
    let error = error_in(&answer).unwrap();
    let expected = format!(
        "requested starting point {} is ahead of the WAL flush position of this server ",
        lsn_text(position)
    );
    assert!(error.message.starts_with(&expected), "{error:?}");
    identify_system(&mut far);
}

#[test]
fn the_end_of_a_copy_is_answered_as_the_primary_answers_it() {
    let Some(installation) = Installation::any() else { return };
    let (primary, relay) = pair(&installation);
    let from = relay.oldest();
    let end = |port| {
        let mut client = RawClient::replication(port).unwrap();
        client.start_replication(None, from, 1).unwrap();
        client.send(b'c', b"").unwrap();
        let answer: Vec<Message> =
            client.until_ready().unwrap().into_iter().filter(|message| message.kind != b'd').collect();
        identify_system(&mut client);
        Shape::of(&answer)
    };
    assert_eq!(end(relay.port), end(primary.port));
}

#[test]
fn the_extended_protocol_is_refused_and_the_session_lives() {
    let Some(installation) = Installation::any() else { return };
    let (primary, relay) = pair(&installation);
    let ask = |port| {
        let mut client = RawClient::replication(port).unwrap();
        client.send(b'P', b"\0IDENTIFY_SYSTEM\0\0\0").unwrap();
        client.send(b'S', b"").unwrap();
        let answer = Shape::of(&client.until_ready().unwrap());
        let after = client.rows("IDENTIFY_SYSTEM").is_ok();
        (answer.error, after)
    };
    assert_eq!(ask(relay.port), ask(primary.port));
}

#[test]
fn base_backup_is_refused_as_not_supported() {
    let Some(installation) = Installation::any() else { return };
    let (_primary, relay) = pair(&installation);
    let mut client = RawClient::replication(relay.port).unwrap();
    let error = client.rows("BASE_BACKUP ( LABEL 'x' )").unwrap_err();
    assert_eq!(error.code, "0A000", "{error:?}");
    identify_system(&mut client);
}

#[test]
fn logical_replication_is_refused_as_the_primary_refuses_it_on_a_physical_connection() {
    for major in crate::support::lab::chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let (primary, relay) = pair(&installation);
        let mut client = RawClient::replication(relay.port).unwrap();
        for command in ["CREATE_REPLICATION_SLOT l LOGICAL pgoutput", "START_REPLICATION SLOT l LOGICAL 0/0"]
        {
            let [told, expected] = [relay.port, primary.port].map(|port| {
                let mut client = RawClient::replication(port).unwrap();
                client.rows(command).unwrap_err()
            });
            assert_eq!(told, expected, "{command}");
        }
        identify_system(&mut client);
    }
}

#[test]
fn requests_for_encryption_are_declined_and_a_cancel_request_is_silent() {
    let Some(installation) = Installation::any() else { return };
    let (_primary, relay) = pair(&installation);
    let mut client = RawClient::connect(relay.port).unwrap();
    for code in [80_877_104_u32, 80_877_103] {
        client.send_bytes(&[8_u32.to_be_bytes(), code.to_be_bytes()].concat()).unwrap();
        assert_eq!(client.read_byte().unwrap(), Some(b'N'));
    }
    client.send_startup(&[("user", "postgres"), ("replication", "true")]).unwrap();
    assert_eq!(client.until_ready().unwrap().last().map(|message| message.kind), Some(b'Z'));

    let mut cancel = RawClient::connect(relay.port).unwrap();
    cancel.send_bytes(&[16_u32, 80_877_102, 12_345, 67_890].map(u32::to_be_bytes).concat()).unwrap();
    assert!(matches!(cancel.read_message(MOMENT), Ok(None) | Err(_)));
    identify_system(&mut client);
}

#[test]
fn startup_packets_that_are_wrong_get_the_primarys_error() {
    let Some(installation) = Installation::any() else { return };
    let (primary, relay) = pair(&installation);
    let cases: &[&[(&str, &str)]] =
        &[&[("replication", "true")], &[("user", "postgres"), ("replication", "perhaps")], &[]];
    for parameters in cases {
        let ask = |port| {
            let mut client = RawClient::connect(port).unwrap();
            client.send_startup(parameters).unwrap();
            error_in(&client.until_ready().unwrap_or_default())
        };
        assert_eq!(ask(relay.port), ask(primary.port), "{parameters:?}");
    }
}

#[test]
fn garbage_before_and_after_the_login_ends_that_session_only() {
    let Some(installation) = Installation::any() else { return };
    let (primary, mut relay) = pair(&installation);
    let standby = primary.standby("standby", relay.port, "");
    relay.wait_downstream("standby", "streaming");
    let session = relay.downstream("standby")[0]["pid"].clone();
    for garbage in GARBAGE {
        let mut before = RawClient::connect(relay.port).unwrap();
        before.send_bytes(garbage).ok();
        if garbage.len() >= 8 {
            assert!(
                before.is_closed_within(MOMENT),
                "still open after {garbage:?} instead of a startup packet"
            );
        }
        let mut after = RawClient::replication(relay.port).unwrap();
        after.send_bytes(garbage).ok();
        drop(after);
        let mut streaming = RawClient::replication(relay.port).unwrap();
        streaming.start_replication(None, relay.oldest(), 1).unwrap();
        streaming.send_bytes(garbage).ok();
        if garbage.len() >= 8 {
            assert!(streaming.is_closed_within(MOMENT), "still streaming after {garbage:?}");
        }
    }
    relay.assert_running();
    write_wal(&primary, MB);
    standby.wait_replayed(primary.flushed());
    assert_eq!(relay.downstream("standby")[0]["pid"], session, "the standby was disturbed");
    assert!(
        relay.process().memory("RssAnon") < 300 * MB,
        "memory was given for a length that a stranger told"
    );
}

const GARBAGE: &[&[u8]] = &[
    b"",
    b"\0",
    b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    &[0x7F, 0xFF, 0xFF, 0xFF, 0, 3, 0, 0],
    &[0xFF, 0xFF, 0xFF, 0xFF, 0, 3, 0, 0],
    &[0, 0, 0, 0, 0, 0, 0, 0, 0],
    &[0, 0, 0, 3, 0, 3, 0, 0, 0],
    b"Q\x7f\xff\xff\xffIDENTIFY_SYSTEM\0",
    b"d\xff\xff\xff\xffwhatever",
    b"zzzzzzzzzzzzzzzzzzzzzzzzzz",
];

#[test]
fn wrong_messages_inside_a_stream_are_answered_as_by_the_primary() {
    let Some(installation) = Installation::any() else { return };
    let (primary, relay) = pair(&installation);
    let from = relay.oldest();
    let cases: &[(u8, &[u8])] =
        &[(b'd', b"r\0\0\0"), (b'f', b"no\0"), (b'Q', b"IDENTIFY_SYSTEM\0"), (b'd', b"?unknown")];
    for (kind, body) in cases {
        let ask = |port| {
            let mut client = RawClient::replication(port).unwrap();
            client.start_replication(None, from, 1).unwrap();
            client.send(*kind, body).unwrap();
            let mut last = None;
            loop {
                match client.next_event(MOMENT) {
                    Event::Other(message) if message.kind == b'E' => last = Some(ServerError::of(&message)),
                    Event::Other(message) if message.kind == b'Z' => return ("ready", last),
                    Event::Closed => return ("closed", last),
                    Event::Silence => return ("silence", last),
                    _ => {}
                }
            }
        };
        let answered = ask(relay.port);
        // A primary that ends its process at once can take its last word with it.
        let what = format!("the primary to answer {body:?} in {:?} alike: {answered:?}", *kind as char);
        wait_until(&what, || ask(primary.port) == answered);
    }
}

#[test]
fn a_status_beyond_what_was_sent_moves_nothing_there() {
    let Some(installation) = Installation::any() else { return };
    let (primary, relay) = pair(&installation);
    // However little there is at first.
    write_wal(&primary, MB / 8);
    relay.wait_flushed(primary.flushed());
    let mut client = RawClient::replication(relay.port).unwrap();
    client.rows("CREATE_REPLICATION_SLOT liar PHYSICAL RESERVE_WAL").unwrap();
    client.start_replication(Some("liar"), relay.oldest(), 1).unwrap();
    client.read_wal(relay.oldest(), relay.oldest() + 8192);
    let far = primary.flushed() + 1000 * MB;
    for positions in [(far, far, far), (0, far, 0), (8, far, far), (u64::MAX, u64::MAX, u64::MAX)] {
        client.send_status(positions.0, positions.1, positions.2).ok();
    }
    write_wal(&primary, MB);
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    primary.wait_reported_flush("relay", upto);
    assert!(
        primary.reported_flush("relay") <= primary.insert_position(),
        "a stranger's position went upstream"
    );
    let restart_lsn = relay.status()["slots"][0]["restart_lsn"].as_str().map_or(0, lsn);
    assert!(restart_lsn <= primary.flushed(), "a slot moved to where nothing was sent");
}

#[test]
fn a_wrong_password_gets_postgresqls_words_and_a_right_one_wal() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port);
    let users = tempfile::NamedTempFile::new().unwrap();
    primary.sql("set password_encryption = 'scram-sha-256'; create role replicator replication login password 'right'");
    let verifier = primary.sql("select rolpassword from pg_authid where rolname = 'replicator'");
    // One verifier as PostgreSQL made it, one as the relay's own command does.
    let own = Relay::command_with_input(&["scram", "--user", "other"], "right\n");
    std::fs::write(users.path(), format!("replicator = {verifier:?}\n{own}")).unwrap();
    relay.set("downstream.users", &format!("{:?}", users.path().to_str().unwrap()));
    relay.start();
    // However little there is at first.
    write_wal(&primary, MB / 8);
    relay.wait_flushed(primary.flushed());
    for (user, password, accepted) in [
        ("replicator", "right", true),
        ("replicator", "wrong", false),
        ("other", "right", true),
        ("other", "wrong", false),
        ("nobody", "right", false),
    ] {
        let folder = crate::support::lab::scratch();
        let output = std::process::Command::new(installation.program("pg_receivewal"))
            .args([
                "-D",
                folder.path().to_str().unwrap(),
                "--no-loop",
                "--endpos",
                &lsn_text(relay.oldest() + 8192),
            ])
            .args(["-d", &format!("host=127.0.0.1 port={} user={user} sslmode=disable", relay.port)])
            .env("PGPASSWORD", password)
            .output()
            .unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), accepted, "{user} {password}: {complaint}");
        if !accepted {
            assert!(
                complaint.contains(&format!("password authentication failed for user \"{user}\"")),
                "{complaint}"
            );
        }
    }
    let log = relay.log();
    assert!(!log.contains("right") && !log.contains("SCRAM-SHA-256$"), "a secret is in the log");
}
