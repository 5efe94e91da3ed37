//! No secret is told by anything that the relay writes or shows.

use std::time::Duration;

use rustix::process::Signal;

use crate::support::MB;
use crate::support::certificates::Authority;
use crate::support::http;
use crate::support::lab::{self, Installation};
use crate::support::load::write_wal;
use crate::support::postgres::Settings;
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::tls_site::{Site, read};
use crate::support::wait::wait_until;

/// What would be seen from afar wherever it turned up.
const UPSTREAM: &str = "canary-upstream-51f0";
const CLIENT: &str = "canary-client-93ab";
const MD5_CLIENT: &str = "canary-md5-7c21";

#[test]
fn no_secret_is_in_logs_pages_arguments_or_errors() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    primary.sql(&format!("create role relay replication login password '{UPSTREAM}'"));
    primary.sql(&format!("create role standby replication login password '{CLIENT}'"));
    primary.sql(&format!(
        "set password_encryption = 'md5'; create role old replication login password '{MD5_CLIENT}'"
    ));
    primary.demand("host replication relay 127.0.0.1/32 scram-sha-256", "relay");
    let stored =
        |role: &str| primary.sql(&format!("select rolpassword from pg_authid where rolname = '{role}'"));
    let (scram, md5) = (stored("standby"), stored("old"));
    let conninfo =
        format!("host=127.0.0.1 port={} user=relay password={UPSTREAM} sslmode=disable", primary.port);
    let mut relay = Relay::new("relay", primary.port).with_conninfo(&conninfo).with_token();
    relay.set("log.level", "\"trace\"");
    let users = relay.file("users.toml", 0o600, &format!("standby = {scram:?}\nold = {md5:?}\n"));
    let hba = relay.file("hba", 0o600, "host replication old,standby,nobody all md5\n");
    relay.set("downstream.users", &format!("{users:?}"));
    relay.set("downstream.hba", &format!("{hba:?}"));
    relay.launch();
    wait_until("the relay to have streamed", || relay.status()["upstream"]["sessions"].as_u64() > Some(0));
    write_wal(&primary, MB / 4);
    relay.wait_flushed(primary.flushed());

    let mut told = tried_logins(&installation, &relay);
    told.extend(mistakes_in_the_users_file(&relay, &scram));
    relay.wait_logged("configuration files contain errors");
    let id = relay.process().id();
    for name in ["cmdline", "environ", "comm", "status"] {
        let read = match std::fs::read(format!("/proc/{id}/{name}")) {
            // Its environment is for nobody but root.
            Err(_) if name == "environ" && !lab::is_root() => continue,
            read => read.unwrap(),
        };
        told.push(String::from_utf8_lossy(&read).into_owned());
    }
    for path in ["/status", "/metrics", "/readyz", "/livez"] {
        let request = format!("GET {path}");
        told.push(http::ask(relay.admin_port, &request, relay.token(), Duration::from_secs(5)).unwrap().1);
    }
    relay.terminate();
    let log = relay.log();
    assert!(log.contains("client refused") && log.contains("client connected"), "{log}");
    told.push(log);
    // The secrets as they are stored are as good as passwords, in parts, too.
    let (stored_key, server_key) = scram.rsplit('$').next().unwrap().split_once(':').unwrap();
    let token = relay.token().unwrap();
    for secret in [UPSTREAM, CLIENT, MD5_CLIENT, stored_key, server_key, &md5[3..], token] {
        for text in &told {
            assert!(!text.contains(secret), "{secret} is told:\n{text}");
        }
    }
}

/// Right and wrong passwords, and one where none belongs; what the clients are told.
fn tried_logins(installation: &Installation, relay: &Relay) -> Vec<String> {
    let mut told = Vec::new();
    for (user, password, is_right) in [
        ("standby", CLIENT, true),
        ("old", MD5_CLIENT, true),
        ("standby", MD5_CLIENT, false),
        ("old", CLIENT, false),
        ("nobody", CLIENT, false),
    ] {
        let conninfo =
            format!("host=127.0.0.1 port={} user={user} replication=true sslmode=disable", relay.port);
        let output = std::process::Command::new(installation.program("psql"))
            .args(["-X", "-d", &conninfo, "-c", "IDENTIFY_SYSTEM"])
            .env("PGPASSWORD", password)
            .output()
            .unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.success(), is_right, "{user}: {complaint}");
        told.push(complaint);
    }
    let mut raw = RawClient::connect(relay.port).unwrap();
    raw.send_startup(&[("user", "standby"), ("replication", "true"), ("password", CLIENT)]).unwrap();
    let answer = raw.read_message(Duration::from_secs(10)).unwrap().unwrap();
    told.push(String::from_utf8_lossy(&answer.body).into_owned());
    told
}

/// A password in the wrong place is not repeated, wherever the mistake is told.
fn mistakes_in_the_users_file(relay: &Relay, scram: &str) -> Vec<String> {
    let mut told = Vec::new();
    for wrong in [
        format!("standby = \"{CLIENT}\"\n"),
        format!("standby = {{ secret = \"{CLIENT}\" }}\n"),
        format!("standby = {{ secrets = \"{CLIENT}\" }}\n"),
        format!("standby = {{ secret = [\"{CLIENT}\"] }}\n"),
        format!("standby = {scram:?}\n{CLIENT} = \n"),
    ] {
        relay.file("users.toml", 0o600, &wrong);
        let (status, answer) = relay.post("/reload").unwrap();
        assert_eq!(status, 422, "{wrong}");
        let path = relay.write_config();
        let (_, out, complaint) = Relay::command(&["config", "check", "--config", path.to_str().unwrap()]);
        told.extend([answer.to_string(), relay.status().to_string(), out, complaint]);
    }
    told
}

/// All memory of a process that it can write, and so may have written a secret to; `None`: we may not look.
fn memory_of(id: u32) -> Option<Vec<Vec<u8>>> {
    let maps = std::fs::read_to_string(format!("/proc/{id}/maps")).ok()?;
    let memory = std::fs::File::open(format!("/proc/{id}/mem")).ok()?;
    let mut parts = Vec::new();
    for line in maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|may| may.starts_with("rw"))) {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
        let mut part = vec![0; usize::try_from(end - start).unwrap()];
        // What went away meanwhile, or cannot be read, holds nothing.
        let length = std::os::unix::fs::FileExt::read_at(&memory, &mut part, start).unwrap_or(0);
        part.truncate(length);
        parts.push(part);
    }
    Some(parts)
}

fn is_in(memory: &[Vec<u8>], secret: &str) -> bool {
    let first = secret.as_bytes()[0];
    memory.iter().any(|part| {
        let starts = part.iter().enumerate().filter(|(_, byte)| **byte == first).map(|(at, _)| at);
        let mut starts = starts.filter(|at| part[*at..].starts_with(secret.as_bytes()));
        starts.next().is_some()
    })
}

/// The second line of a PEM file's base64.
fn line_of_key(text: &str) -> String {
    text.lines().nth(2).unwrap().to_owned()
}

#[test]
fn what_was_read_of_secrets_and_is_not_needed_is_nowhere_in_memory() {
    let Some(installation) = Installation::any() else { return };
    let authority = Authority::new("root");
    let server = authority.issue("server", "IP:127.0.0.1");
    let mut site = Site::new(&installation, &server);
    site.primary.sql(&format!("create role relay replication login password '{UPSTREAM}'"));
    site.primary.demand("host all,replication relay 127.0.0.1/32 scram-sha-256", "relay");
    let client = authority.issue("relay", "DNS:relay");
    let encrypted = authority.encrypted(&client, "canary-passphrase-4e");
    let port = site.primary.port;
    let passwords = format!(
        "other:5432:*:relay:{PASSFILE}\n# {PASSFILE}\n127.0.0.1:{port}:*:relay:{UPSTREAM}\nlast:*:*:*:{PASSFILE}\n"
    );
    let passfile = site.relay.file("passfile", 0o600, &passwords);
    let conninfo = format!(
        "host=127.0.0.1 port={port} user=relay passfile={} sslmode=require sslcert={} sslkey={} sslpassword=canary-passphrase-4e",
        passfile.display(),
        encrypted.cert.display(),
        encrypted.key.display()
    );
    site.relay.set("upstream.conninfo", &format!("{conninfo:?}"));
    // The primary's own users stand in its WAL, which is in memory, too.
    let own = Relay::command_with_input(&["scram", "--user", "elsewhere"], "pencil\n");
    let users = format!("# {USERS_COMMENT}\n{own}{}", read(&site.relay.file_path("users.toml")));
    site.relay.write_file("users.toml", &users);
    site.relay.terminate();
    site.relay.start();
    // Logins, right and wrong; all files are read again.
    for password in ["secret", "wrong"] {
        let rest = format!("host=127.0.0.1 sslmode=require password={password}");
        assert_eq!(site.ask_both(&installation, &rest).1.is_ok(), password == "secret");
    }
    site.relay.process_mut().signal(Signal::HUP);
    site.relay.wait_logged("configuration files were read again");
    let Some(memory) = memory_of(site.relay.process().id()) else {
        lab::skip("reading another process's memory needs root");
        return;
    };
    // What is in use is there, or nothing would be found that should not be.
    assert!(is_in(&memory, UPSTREAM), "the password for the next connection");
    let verifier = own.split('"').nth(1).unwrap().to_owned();
    assert!(verifier.starts_with("SCRAM-SHA-256$"), "{own}");
    for (what, secret) in [
        ("other lines of the password file", PASSFILE.to_owned()),
        ("the password file around the password", format!("{UPSTREAM}\nlast")),
        ("the server's key", line_of_key(&read(&server.key))),
        ("the client's key, encrypted", line_of_key(&read(&encrypted.key))),
        ("the client's key", line_of_key(&read(&client.key))),
        ("the users file", USERS_COMMENT.to_owned()),
        ("a user's verifier", verifier),
        ("the configuration file", format!("user=relay passfile={}", passfile.display())),
    ] {
        assert!(!is_in(&memory, &secret), "{what} is in memory");
    }
}

const PASSFILE: &str = "canary-passfile-0b77";
const USERS_COMMENT: &str = "canary-users-e81c";
