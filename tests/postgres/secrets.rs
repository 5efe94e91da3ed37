//! No secret is told by anything that the relay writes or shows.

use std::time::Duration;

use crate::support::MB;
use crate::support::http;
use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::Settings;
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
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
        let read = std::fs::read(format!("/proc/{id}/{name}")).unwrap();
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
