//! No secret is told by anything that the relay writes or shows.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
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
use crate::support::wait::{wait_for, wait_until};

/// What would be seen from afar wherever it turned up.
const UPSTREAM: &str = "canary-upstream-51f0";
const CLIENT: &str = "canary-client-93ab";
const MD5_CLIENT: &str = "canary-md5-7c21";
const PASSPHRASE: &str = "canary-passphrase-4e02";
const PASSFILE: &str = "canary-passfile-0b77";
const USERS_COMMENT: &str = "canary-users-e81c";

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
        format!("standby = {{ may = [\"stream\", \"{CLIENT}\"] }}\n"),
        format!("standby = {{ may = [{scram:?}] }}\n"),
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

/// Connection strings in which passwords are not written as they should be; each piece of one is a canary.
const WRONG: &[&str] = &[
    "postgresql://u:canary@canary@127.0.0.1:1/d",
    "postgresql://u:canary@canary:canary@127.0.0.1:1/d",
    "postgresql://u:canary@canary/canary@127.0.0.1:1/d",
    "postgresql://u:canary@canary?canary@127.0.0.1:1/d",
    "postgresql://u:canary@127.0.0.1?canary=canary@127.0.0.1:1/d",
    "postgresql://u:canary/canary@127.0.0.1:1/d",
    "postgresql://u:canary@[127.0.0.1",
    "postgresql://127.0.0.1:1/d?password=canary&canary",
    "postgresql://127.0.0.1:1/d?password=canary&canary=canary",
    "postgresql://127.0.0.1:1/d?password=canary=canary",
    "postgresql://127.0.0.1:1/d?password=canary%zz",
    "host=127.0.0.1 password=canary canary",
    "host=127.0.0.1 password=canary canary=canary",
    "host=127.0.0.1 password='canary' sslpassword=canary canary=1",
    "host=127.0.0.1 password='canary",
    "host=127.0.0.1 scram_client_key=canary",
];

#[test]
fn no_piece_of_a_password_is_in_what_is_said_of_a_wrong_connection_string() {
    for conninfo in WRONG {
        let mut relay = Relay::new("relay", 1).with_conninfo(conninfo);
        let path = relay.write_config();
        let (status, out, complaint) =
            Relay::command(&["config", "check", "--config", path.to_str().unwrap()]);
        assert!(!status.success(), "{conninfo}: {out}");
        relay.launch();
        assert!(!relay.wait_for_end().success(), "{conninfo}");
        for text in [out, complaint, relay.log()] {
            assert!(!text.contains("canary"), "{conninfo}: {text}");
        }
    }
}

#[test]
fn keys_passphrases_and_password_files_are_told_nowhere() {
    let Some(installation) = Installation::any() else { return };
    let authority = Authority::new("root");
    let server = authority.issue("server", "IP:127.0.0.1");
    let mut site = Site::new(&installation, &server);
    site.primary.sql(&format!("create role relay replication login password '{UPSTREAM}'"));
    site.primary.demand("host all,replication relay 127.0.0.1/32 scram-sha-256", "relay");
    let (client, port) = (authority.issue("relay", "DNS:relay"), site.primary.port);
    let encrypted = authority.encrypted(&client, PASSPHRASE);
    let passwords = format!("other:*:*:*:{PASSFILE}\n127.0.0.1:{port}:*:relay:{UPSTREAM}\n");
    let passfile = site.relay.file("passfile", 0o600, &passwords);
    let conninfo = format!(
        "host=127.0.0.1 port={port} user=relay passfile={} sslmode=require sslcert={} sslkey={}",
        passfile.display(),
        encrypted.cert.display(),
        encrypted.key.display()
    );
    site.relay.set("log.level", "\"trace\"");
    site.relay.terminate();
    let mut told = Vec::new();
    // A wrong passphrase, the right one, and a password file that is not used because others may read it.
    for (passphrase, mode, expected) in [
        (format!("{PASSPHRASE}-wrong"), 0o600, Err("could not be decrypted")),
        (PASSPHRASE.to_owned(), 0o600, Ok(())),
        (PASSPHRASE.to_owned(), 0o644, Err("no password supplied")),
    ] {
        site.relay.file("passfile", mode, &passwords);
        site.relay.set("upstream.conninfo", &format!("\"{conninfo} sslpassword={passphrase}\""));
        site.relay.launch();
        let outcome = wait_for("the relay to stream or to say why not", || {
            let status = site.relay.status();
            let error = status["upstream"]["last_error"].as_str().map(|error| Err(error.to_owned()));
            error.or_else(|| (status["upstream"]["sessions"].as_u64() > Some(0)).then_some(Ok(())))
        });
        match (&outcome, expected) {
            (Ok(()), Ok(())) => {}
            (Err(error), Err(words)) => assert!(error.contains(words), "{error}"),
            other => panic!("{other:?}"),
        }
        for path in ["/status", "/metrics"] {
            told.push(http::get(site.relay.admin_port, path).unwrap().1);
        }
        let command_line = std::fs::read(format!("/proc/{}/cmdline", site.relay.process().id())).unwrap();
        told.push(String::from_utf8_lossy(&command_line).into_owned());
        site.relay.terminate();
    }
    // A key that is not the certificate's, and one that is broken.
    for key in [read(&client.key), read(&server.key).replacen('A', "", 1), format!("{PASSPHRASE}\n")] {
        site.relay.write_file("server.key", &key);
        site.relay.launch();
        assert!(!site.relay.wait_for_end().success());
    }
    let log = site.relay.log();
    assert!(log.contains("does not match private key file") && log.contains("no private key in it"), "{log}");
    told.push(log);
    let mut secrets = vec![PASSPHRASE.to_owned(), PASSFILE.to_owned(), UPSTREAM.to_owned()];
    secrets.extend([&server.key, &client.key, &encrypted.key].map(|key| line_of_key(&read(key))));
    for secret in secrets {
        for text in &told {
            assert!(!text.contains(&secret), "{secret} is told:\n{text}");
        }
    }
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
    let encrypted = authority.encrypted(&client, PASSPHRASE);
    let port = site.primary.port;
    let passwords = format!(
        "other:5432:*:relay:{PASSFILE}\n# {PASSFILE}\n127.0.0.1:{port}:*:relay:{UPSTREAM}\nlast:*:*:*:{PASSFILE}\n"
    );
    let passfile = site.relay.file("passfile", 0o600, &passwords);
    let conninfo = format!(
        "host=127.0.0.1 port={port} user=relay passfile={} sslmode=require sslcert={} sslkey={} sslpassword={PASSPHRASE}",
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

#[test]
fn who_has_the_same_account_does_not_see_into_the_process() {
    let Some((user, group)) = lab::server_user() else {
        lab::skip("running the relay as somebody else needs root");
        return;
    };
    let mut relay = Relay::new("relay", 1);
    std::fs::create_dir(relay.data_dir()).unwrap();
    std::fs::set_permissions(relay.data_dir(), PermissionsExt::from_mode(0o700)).unwrap();
    lab::give_to_server(relay.data_dir());
    let (user_argument, group_argument) = (format!("--reuid={user}"), format!("--regid={group}"));
    relay.wrapper =
        ["setpriv", &user_argument, &group_argument, "--clear-groups", "--"].map(str::to_owned).to_vec();
    relay.launch();
    wait_until("the relay to answer", || relay.status().is_object());
    let about = format!("/proc/{}", relay.process().id());
    let uid = std::fs::read_to_string(format!("{about}/status")).unwrap();
    assert!(uid.contains(&format!("Uid:\t{user}\t")), "{uid}");
    // Where its account may look, these are its account's own.
    for name in ["mem", "environ", "maps"] {
        assert_eq!(std::fs::metadata(format!("{about}/{name}")).unwrap().uid(), 0, "{name}");
    }
}
