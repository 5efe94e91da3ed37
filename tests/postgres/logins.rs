//! Logging in at the upstream: every kind of password, sockets, several hosts, and what the connection string demands of
//! the server, refused in libpq's words.

use std::num::NonZeroU32;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use aws_lc_rs::{digest, hmac, pbkdf2};
use base64::{Engine as _, prelude::BASE64_STANDARD};

use crate::support::MB;
use crate::support::faults::Faults;
use crate::support::lab::{Installation, chosen_majors};
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::proxy::Proxy;
use crate::support::psql::run_psql;
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::wait::wait_until;

/// A primary that asks each of these roles for its password in its own way.
fn guarded(installation: &Installation) -> Postgres {
    let primary = Settings::new().segment_size_mb(1).start(installation);
    primary.sql("set password_encryption = 'md5'; create role by_md5 replication login password 'secret'");
    // Before 14 that was the default.
    primary.sql(
        "set password_encryption = 'scram-sha-256'; create role by_scram replication login password 'secret'",
    );
    primary.sql("create role in_clear replication login password 'secret'");
    let rules = "host replication by_md5 127.0.0.1/32 md5\n\
        host replication by_scram 127.0.0.1/32 scram-sha-256\n\
        local replication by_scram scram-sha-256\n\
        host replication in_clear 127.0.0.1/32 password";
    primary.demand(rules, "by_scram");
    primary
}

fn at(port: u16, rest: &str) -> String {
    format!("host=127.0.0.1 port={port} sslmode=disable {rest}")
}

fn launched(name: &str, conninfo: &str) -> Relay {
    let mut relay = Relay::new(name, 1).with_conninfo(conninfo);
    relay.launch();
    relay
}

fn wait_streaming(primary: &Postgres, role: &str) {
    primary.wait_for_sql(
        &format!(
            "select state from pg_stat_replication where usename = '{role}' and application_name = '{role}'"
        ),
        "streaming",
    );
}

#[test]
fn with_every_kind_of_password() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = guarded(&installation);
        for role in ["by_md5", "by_scram", "in_clear"] {
            let relay = launched(role, &at(primary.port, &format!("user={role} password=secret")));
            wait_streaming(&primary, role);
            write_wal(&primary, MB / 4);
            relay.wait_flushed(primary.flushed());
        }
    }
}

/// ClientKey and ServerKey in base64, by RFC 5802 from what the server stores of the password.
fn scram_keys(primary: &Postgres, role: &str, password: &str) -> (String, String) {
    let stored = primary.sql(&format!("select rolpassword from pg_authid where rolname = '{role}'"));
    let parts: Vec<&str> = stored.split(['$', ':']).collect();
    let [_, iterations, salt, stored_key, server_key] = parts[..] else { panic!("{stored}") };
    let (iterations, salt) =
        (iterations.parse::<NonZeroU32>().unwrap(), BASE64_STANDARD.decode(salt).unwrap());
    let mut salted = [0; 32];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, &salt, password.as_bytes(), &mut salted);
    let client_key = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &salted), b"Client Key");
    let hashed = digest::digest(&digest::SHA256, client_key.as_ref());
    assert_eq!(BASE64_STANDARD.encode(hashed), stored_key, "of another password");
    (BASE64_STANDARD.encode(client_key), server_key.to_owned())
}

#[test]
fn with_the_keys_of_a_password_instead_of_it() {
    let Some(installation) = Installation::any() else { return };
    let primary = guarded(&installation);
    let (client_key, server_key) = scram_keys(&primary, "by_scram", "secret");
    let other_key = BASE64_STANDARD.encode([7; 32]);
    let conninfo = |rest: &str| at(primary.port, &format!("user=by_scram {rest}"));
    let client = format!("scram_client_key={client_key}");
    let let_in = [
        ("both_keys", format!("{client} scram_server_key={server_key}")),
        // As libpq: the password is not looked at, and a server that is known by its key may know another one.
        ("keys_first", format!("{client} scram_server_key={server_key} password=wrong")),
        ("server_key", format!("password=secret scram_server_key={server_key}")),
    ];
    for (name, rest) in &let_in {
        let mut relay = Relay::new(name, 1).with_conninfo(&conninfo(rest)).with("log.level", "\"trace\"");
        relay.start();
        write_wal(&primary, MB / 4);
        relay.wait_flushed(primary.flushed());
        for text in [relay.log(), relay.status().to_string()] {
            assert!(!text.contains(&client_key) && !text.contains(&server_key), "a key is told:\n{text}");
        }
    }
    let before = primary.sql("select count(*) from pg_replication_slots");
    let refused = [
        ("wrong_server", format!("{client} scram_server_key={other_key}"), "incorrect server signature"),
        (
            "wrong_server_2",
            format!("password=secret scram_server_key={other_key}"),
            "incorrect server signature",
        ),
        // A ServerKey does not follow from a ClientKey.
        ("no_server", format!("{client} password=secret"), "incorrect server signature"),
        (
            "wrong_client",
            format!("scram_client_key={other_key} scram_server_key={server_key} password=secret"),
            "password authentication failed for user",
        ),
        ("no_client", format!("scram_server_key={server_key}"), "fe_sendauth: no password supplied"),
    ];
    for (name, rest, words) in &refused {
        let mut relay = Relay::new(name, 1).with_conninfo(&conninfo(rest)).with("log.level", "\"trace\"");
        relay.launch();
        relay.wait_logged(words);
        for key in [&client_key, &server_key, &other_key] {
            assert!(!relay.log().contains(key.as_str()), "a key is told:\n{}", relay.log());
        }
    }
    assert_eq!(primary.sql("select count(*) from pg_replication_slots"), before, "let in");
    // Keys are no password where something else is asked for.
    let keys = &let_in[0].1;
    launched("in_clear", &at(primary.port, &format!("user=in_clear {keys}")))
        .wait_logged("fe_sendauth: no password supplied");
}

#[test]
fn with_a_password_file_and_through_a_unix_socket() {
    let Some(installation) = Installation::any() else { return };
    let primary = guarded(&installation);
    let folder = crate::support::lab::scratch();
    let file = folder.path().join("passwords");
    let socket = primary.socket_folder().display().to_string();
    let lines =
        format!("127.0.0.1:{0}:replication:by_scram:secret\n{socket}:{0}:*:by_scram:secret\n", primary.port);
    std::fs::write(&file, lines).unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    let rest = format!("user=by_scram passfile={}", file.display());
    for (name, place) in [("by_tcp", "127.0.0.1"), ("by_socket", socket.as_str())] {
        let conninfo = format!("host={place} port={} sslmode=disable {rest}", primary.port);
        let _relay = launched(name, &conninfo);
        let address = "select count(client_addr) from pg_stat_replication where state = 'streaming'";
        let query = format!("{address} and application_name = '{name}' having count(*) = 1");
        primary.wait_for_sql(&query, if name == "by_tcp" { "1" } else { "0" });
    }
    // A file that others may read is not used, as libpq does it.
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
    launched("open_file", &at(primary.port, &rest)).wait_logged("fe_sendauth: no password supplied");
}

#[test]
fn the_host_with_the_wanted_session_attributes_is_found() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let standby = primary.standby("standby", primary.port, "");
    standby.wait_replayed(primary.flushed());
    let ports = format!("port=1,{},{}", standby.port, primary.port);
    for (attributes, server) in [("read-write", &primary), ("primary", &primary), ("standby", &standby)] {
        let conninfo = format!(
            "host=127.0.0.1,127.0.0.1,127.0.0.1 {ports} user=postgres sslmode=disable load_balance_hosts=random target_session_attrs={attributes}"
        );
        let relay = launched("relay", &conninfo);
        server.wait_for_sql(
            "select state from pg_stat_replication where application_name = 'relay'",
            "streaming",
        );
        assert_eq!(relay.status()["upstream"]["is_writable"], attributes != "standby");
    }
}

#[test]
fn a_server_that_was_demoted_is_refused_with_the_reason() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let standby = primary.standby("standby", primary.port, "");
    let proxy = Proxy::to(standby.port);
    let relay = launched("relay", &at(proxy.port, "user=postgres target_session_attrs=read-write"));
    wait_until("the reason to be told", || {
        relay.status()["upstream"]["last_error"] == "session is read-only"
    });
    relay.wait_logged("session is read-only");
    // It may become the primary in a moment.
    standby.promote();
    wait_until("it to be streamed from", || relay.status()["upstream"]["state"] == "streaming");
}

#[test]
fn a_resolver_that_hangs_holds_up_one_host_and_not_the_others() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let faults = Faults::new();
    faults.set("resolver_hangs", 0);
    let conninfo = format!("host=localhost,127.0.0.1 port={} user=postgres connect_timeout=2", primary.port);
    let mut relay = Relay::new("relay", 1).with_conninfo(&conninfo).with_faults(&faults);
    relay.start();
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    assert!(relay.terminate().success(), "the lookup that hangs holds up the end");
}

#[test]
fn a_wrong_password_is_told_in_the_servers_words_and_asks_for_a_person() {
    let Some(installation) = Installation::any() else { return };
    let primary = guarded(&installation);
    primary.sql("create role without_right login");
    primary.demand(
        "host replication without_right 127.0.0.1/32 trust\nhost replication turned_away 127.0.0.1/32 reject",
        "turned_away",
    );
    // Each of these is for a person, but not the first time: they may be in the middle of a change.
    let refused = [
        ("by_scram", "password authentication failed for user"),
        ("without_right", "walsender"),
        ("turned_away", "pg_hba.conf rejects replication connection"),
    ];
    let relays = refused.map(|(role, words)| {
        let proxy = Proxy::to(primary.port);
        let conninfo = at(proxy.port, &format!("user={role} password=wrong"));
        (launched(role, &conninfo), proxy, words)
    });
    for (relay, proxy, words) in &relays {
        relay.wait_logged(words);
        relay.wait_needs_attention();
        assert!(proxy.connections() >= 5, "after {} attempts", proxy.connections());
        assert!(relay.log().matches(words).count() <= 3, "the log is flooded:\n{}", relay.log());
    }
}

#[test]
fn a_server_that_is_full_is_waited_for_and_nobody_is_called() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).line("max_wal_senders = 1").start(&installation);
    let occupied = RawClient::replication(primary.port).unwrap();
    let proxy = Proxy::to(primary.port);
    let mut relay = launched("relay", &at(proxy.port, "user=postgres"));
    relay.wait_logged("max_wal_senders");
    wait_until("many attempts", || proxy.connections() >= 7);
    assert!(!relay.needs_attention());
    drop(occupied);
    relay.wait_ready();
}

#[test]
fn sockets_without_a_file_are_found_by_both_sides() {
    let Some(installation) = Installation::since(14) else { return };
    let mut primary = Settings::new().segment_size_mb(1).start(&installation);
    let (theirs, ours) = (format!("@walrelay_{}", primary.port), format!("@relay_{}", primary.port));
    primary.add_settings(&format!("unix_socket_directories = '{theirs}'"));
    primary.restart(Stop::Fast);
    let conninfo = format!("host={theirs} port={} user=postgres", primary.port);
    let mut relay = Relay::new("abstract", 1).with_conninfo(&conninfo);
    relay.set("downstream.listen", &format!("[\"127.0.0.1:{}\", {ours:?}]", relay.port));
    relay.start();
    let addresses =
        "select string_agg(distinct coalesce(client_addr::text, 'socket'), ' ') from pg_stat_replication";
    assert_eq!(primary.sql(addresses), "socket");
    let at = |host: &str, port: u16| {
        let conninfo = format!("host={host} port={port} user=postgres replication=true");
        run_psql(&installation, &conninfo, "IDENTIFY_SYSTEM").unwrap().split('|').next().unwrap().to_owned()
    };
    assert_eq!(at(&ours, relay.port), at(&theirs, primary.port));
    // Nobody takes the name while it is used, and it is free when its owner has gone.
    let mut second = Relay::new("second", 1).with_conninfo(&conninfo);
    second.set("downstream.listen", &format!("[{ours:?}, \"127.0.0.1:{}\"]", relay.port));
    second.launch();
    assert!(!second.wait_for_end().success());
    let log = second.log();
    assert!(log.contains("could not listen on") && log.contains(&ours), "{log}");
    relay.terminate();
    relay.start();
    assert_eq!(at(&ours, relay.port), at(&theirs, primary.port));
}

#[test]
fn a_server_that_runs_as_somebody_else_is_refused_through_a_socket() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let owner = std::fs::metadata(primary.data()).unwrap().uid().to_string();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|line| line.split(':').nth(2) == Some(&owner)).unwrap();
    let owner = line.split(':').next().unwrap();
    let socket = format!("host={} port={} user=postgres", primary.socket_folder().display(), primary.port);
    let refused = launched("refused", &format!("{socket} requirepeer=daemon"));
    refused.wait_logged(&format!(
        "requirepeer specifies \\\"daemon\\\", but actual peer user name is \\\"{owner}\\\""
    ));
    let mut taken = launched("taken", &format!("{socket} requirepeer={owner}"));
    taken.wait_ready();
    assert_eq!(
        primary.sql("select count(*) from pg_stat_replication where application_name = 'refused'"),
        "0"
    );
    // By TCP nobody knows who is there, and libpq does not ask.
    launched("by_tcp", &at(primary.port, "user=postgres requirepeer=daemon")).wait_ready();
}

#[test]
fn an_older_protocol_than_is_wanted_is_refused() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = Settings::new().segment_size_mb(1).start(&installation);
        let mut relay = launched("relay", &at(primary.port, "user=postgres min_protocol_version=3.2"));
        if major < 18 {
            relay.wait_logged(
                "server only supports protocol version 3.0, but \\\"min_protocol_version\\\" was set to 3.2",
            );
            assert_eq!(primary.sql("select count(*) from pg_stat_replication"), "0");
        } else {
            relay.wait_ready();
        }
        // Negotiated down where that is allowed.
        launched("newest", &at(primary.port, "user=postgres max_protocol_version=latest")).wait_ready();
    }
}

#[test]
fn a_login_without_channel_binding_is_refused_where_it_is_required() {
    let Some(installation) = Installation::any() else { return };
    let primary = guarded(&installation);
    let without = "channel binding required, but server authenticated client without channel binding";
    let not_asked = "channel binding required but not supported by server's authentication request";
    for (role, words) in [
        ("postgres", without),
        ("by_md5", not_asked),
        ("in_clear", not_asked),
        ("by_scram", "channel binding required, but SSL not in use"),
    ] {
        let conninfo = at(primary.port, &format!("user={role} password=secret channel_binding=require"));
        launched(role, &conninfo).wait_logged(words);
    }
    assert_eq!(primary.sql("select count(*) from pg_stat_replication"), "0");
    // Neither password was sent: the server saw no login that it could have let in.
    let let_in = |role: &str| {
        primary.log().contains(&format!("connection authorized: user={role}"))
            || primary.log().contains(&format!("replication connection authorized: user={role}"))
    };
    assert!(!let_in("by_md5") && !let_in("in_clear") && !let_in("by_scram"));
}

#[test]
fn the_password_appears_nowhere() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    primary.sql("set password_encryption = 'scram-sha-256'; create role canary replication login password 'canary-4711'");
    primary.demand("host replication canary 127.0.0.1/32 scram-sha-256", "canary");
    let conninfo = at(primary.port, "user=canary password=canary-4711");
    let mut relay = Relay::new("canary", 1).with_conninfo(&conninfo).with("log.level", "\"trace\"");
    relay.start();
    wait_streaming(&primary, "canary");
    let command_line = std::fs::read(format!("/proc/{}/cmdline", relay.process().id())).unwrap();
    for (place, text) in [
        ("the log", relay.log()),
        ("/status", relay.status().to_string()),
        ("/metrics", crate::support::http::get(relay.admin_port, "/metrics").unwrap().1),
        ("the command line", String::from_utf8_lossy(&command_line).into_owned()),
    ] {
        assert!(!text.contains("canary-4711"), "the password is in {place}");
    }
}
