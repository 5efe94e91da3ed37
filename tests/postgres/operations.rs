//! What operators meet: two relays on one folder, full logs, many connections, numbers that are true.

use std::time::Duration;

use crate::support::MB;
use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings};
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::wait::{wait_at_most, wait_until};
use crate::support::{http, lsn};

fn pair(prepare: impl FnOnce(Relay) -> Relay) -> Option<(Postgres, Relay)> {
    let installation = Installation::any()?;
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = prepare(Relay::new("relay", primary.port));
    relay.start();
    Some((primary, relay))
}

#[test]
fn a_second_relay_on_the_same_folder_ends_at_once_and_the_first_goes_on() {
    let Some((primary, mut relay)) = pair(|relay| relay) else { return };
    let mut second = Relay::new("second", primary.port).with_data_dir(relay.data_dir());
    second.launch();
    let ended = wait_at_most(Duration::from_secs(10), || (!second.is_running()).then_some(()));
    assert!(ended.is_some(), "two relays run on one folder");
    assert!(!second.wait_for_end().success());
    relay.assert_running();
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    // The lock dies with its process, however it ends.
    relay.restart_after_kill();
}

#[test]
fn a_log_that_cannot_be_written_stops_nothing() {
    let installation = Installation::any();
    let Some(installation) = installation else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port);
    relay.wrapper = ["sh", "-c", "exec \"$0\" \"$@\" >/dev/full 2>/dev/full"].map(str::to_owned).to_vec();
    relay.start();
    write_wal(&primary, 2 * MB);
    relay.wait_flushed(primary.flushed());
    relay.assert_running();
}

#[test]
fn log_lines_that_nobody_takes_are_counted_and_stop_nothing() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let folder = crate::support::lab::scratch();
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut relay = Relay::new("relay", primary.port);
    // A reader that never reads: both ends are held by the relay itself.
    let open = format!("exec 3<>{pipe} && exec \"$0\" \"$@\" 2>{pipe}", pipe = pipe.display());
    relay.wrapper = ["sh", "-c", &open].map(str::to_owned).to_vec();
    relay.start();
    assert_eq!(relay.metric("walrelay_log_lines_dropped "), Some(0.0));
    wait_until("lines to be dropped", || {
        // Each is told of when it comes and when it goes.
        (0..500).for_each(|_| drop(RawClient::replication(relay.port)));
        relay.metric("walrelay_log_lines_dropped ") > Some(0.0)
    });
    relay.assert_running();
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
}

#[test]
fn off_a_terminal_and_by_choice_every_log_line_is_json() {
    for format in [None, Some("\"json\""), Some("\"text\"")] {
        let Some((_primary, mut relay)) = pair(|mut relay| {
            if let Some(format) = format {
                relay.set("log.format", format);
            }
            relay
        }) else {
            return;
        };
        assert!(relay.terminate().success());
        let log = relay.log();
        let lines: Vec<_> = log.lines().map(serde_json::from_str::<serde_json::Value>).collect();
        if format == Some("\"text\"") {
            assert!(!lines.is_empty() && lines.iter().all(Result::is_err), "{log}");
            continue;
        }
        let said =
            |line: &serde_json::Value, field: &str| line.pointer(field).is_some_and(|said| said.is_string());
        for line in &lines {
            let line = line.as_ref().unwrap_or_else(|error| panic!("{error}: {log}"));
            assert!(
                said(line, "/timestamp") && said(line, "/level") && said(line, "/fields/message"),
                "{line}"
            );
        }
        let is_start = |line: &serde_json::Value| line["fields"]["message"] == "walrelay is running";
        assert!(lines.iter().flatten().any(is_start), "{log}");
    }
}

#[test]
fn a_storm_of_connections_is_bounded_and_passes() {
    allow_many_files();
    let Some((primary, mut relay)) = pair(|relay| {
        relay
            .with("downstream.max_wal_senders", "100")
            .with("downstream.unauthenticated_connections_max", "1000")
            .with("downstream.unauthenticated_connections_per_address_max", "1000")
    }) else {
        return;
    };
    let standby = primary.standby("standby", relay.port, "");
    relay.wait_downstream("standby", "streaming");
    let session = relay.downstream("standby")[0]["pid"].clone();
    let idlers: Vec<RawClient> = (0..64).map(|_| RawClient::replication(relay.port).unwrap()).collect();
    let mut strangers = Vec::new();
    for _ in 0..1_000 {
        strangers.extend(RawClient::connect(relay.port).ok());
    }
    assert_eq!(strangers.len(), 1_000, "could not connect");
    // The last stranger is in when the door is closed to the next client.
    wait_until("all places to be taken", || {
        let refused = RawClient::replication(relay.port).err();
        refused.is_some_and(|error| error.to_string().contains("too many clients already"))
    });
    let memory = relay.process().memory("RssAnon");
    write_wal(&primary, 2 * MB);
    standby.wait_replayed(primary.flushed());
    assert_eq!(relay.downstream("standby")[0]["pid"], session, "the standby was disturbed");
    assert_eq!(relay.downstream("raw").len(), idlers.len());
    assert!(memory < 300 * MB, "{} MB for strangers and idlers", memory / MB);
    drop((idlers, strangers));
    relay.assert_running();
    wait_until("new clients to be served again", || RawClient::replication(relay.port).is_ok());
}

/// The test itself holds one end of every connection.
fn allow_many_files() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
}

#[test]
fn within_a_memory_limit_it_is_never_killed() {
    const LIMIT: u64 = 160 * MB;
    // Where the kernel can enforce no limit, what the process itself takes is looked at all the same.
    let group = MemoryGroup::of(LIMIT);
    let Some((primary, mut relay)) = pair(|mut relay| {
        if let Some(group) = &group {
            let join = format!("echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"", group.0.display());
            relay.wrapper = vec!["sh".to_owned(), "-c".to_owned(), join];
        }
        relay
            .with("store.tail_size", "\"32MB\"")
            .with("store.unwritten_size", "\"32MB\"")
            .with("store.wal_keep_size", "\"1GB\"")
    }) else {
        return;
    };
    let mut idlers: Vec<RawClient> = (0..16).map(|_| RawClient::replication(relay.port).unwrap()).collect();
    for idler in &mut idlers {
        idler.start_replication(None, relay.oldest(), 1).unwrap();
    }
    for _ in 0..6 {
        write_wal(&primary, 40 * MB);
        let memory = relay.process().memory("RssAnon");
        assert!(memory < LIMIT, "{} MB", memory / MB);
    }
    relay.wait_flushed(primary.flushed());
    relay.assert_running();
    drop(idlers);
}

/// A memory limit of this kernel, of either kind of control groups.
struct MemoryGroup(std::path::PathBuf);

impl MemoryGroup {
    fn of(bytes: u64) -> Option<Self> {
        let name = format!("walrelay-{}", std::process::id());
        // The second kind hands controllers down on request; where that is refused, so is the limit.
        drop(std::fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory"));
        for (parent, file) in
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
        {
            let group = std::path::Path::new(parent).join(&name);
            if std::fs::create_dir(&group).is_ok() {
                let group = Self(group);
                if std::fs::write(group.0.join(file), bytes.to_string()).is_ok() {
                    return Some(group);
                }
            }
        }
        println!("no memory control group can be made here: only what the process takes itself is looked at");
        None
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        wait_at_most(Duration::from_secs(5), || std::fs::remove_dir(&self.0).is_ok().then_some(()));
    }
}

#[test]
fn too_many_walsenders_get_postgresqls_words() {
    let Some((_primary, relay)) = pair(|relay| relay.with("downstream.max_wal_senders", "3")) else { return };
    let kept: Vec<RawClient> = (0..3).map(|_| RawClient::replication(relay.port).unwrap()).collect();
    let refused = RawClient::replication(relay.port).unwrap_err().to_string();
    assert!(refused.contains("53300"), "{refused}");
    drop(kept);
    wait_until("new clients to be served again", || RawClient::replication(relay.port).is_ok());
}

#[test]
fn status_and_metrics_tell_the_same_truth() {
    let Some((primary, relay)) = pair(|relay| relay) else { return };
    let standby = primary.standby("standby", relay.port, "");
    write_wal(&primary, 2 * MB);
    let upto = primary.flushed();
    standby.wait_replayed(upto);
    relay.wait_flushed(upto);
    wait_until("the standby's positions to arrive", || {
        relay
            .downstream("standby")
            .iter()
            .any(|session| session["replay_lsn"].as_str().map_or(0, lsn) >= upto)
    });
    let status = relay.status();
    assert_eq!(status["name"], "relay");
    let position = |name: &str| lsn(status["store"][name].as_str().unwrap());
    assert!(position("flushed") <= position("written") && position("written") <= position("verified"));
    assert_eq!(
        status["system_identifier"].as_str().map(str::to_owned),
        Some(primary.sql("select system_identifier from pg_control_system()"))
    );
    let (code, metrics) = http::get(relay.admin_port, "/metrics").unwrap();
    assert_eq!(code, 200);
    assert!(metrics.lines().filter(|line| line.starts_with("walrelay_")).count() > 10, "{metrics}");
    assert_eq!(http::get(relay.admin_port, "/livez").unwrap().0, 200);
    assert_eq!(http::get(relay.admin_port, "/no-such-page").unwrap().0, 404);
}

#[test]
fn a_wrong_setting_gets_one_clear_line_and_an_exit_status() {
    let relay = Relay::new("relay", 1).with("store.wal_keep_sizes", "\"1GB\"");
    let path = relay.write_config();
    let (status, _, complaint) = Relay::command(&["config", "check", "--config", path.to_str().unwrap()]);
    assert!(!status.success());
    assert!(complaint.contains("wal_keep_sizes"), "{complaint}");
    let (status, _, complaint) = Relay::command(&["run", "--config", "/no/such/file.toml"]);
    assert!(!status.success());
    assert!(complaint.contains("/no/such/file.toml"), "{complaint}");
}

#[test]
fn a_data_folder_that_cannot_be_used_is_named() {
    let mut relay = Relay::new("relay", 1).with("relay.data_dir", "\"/proc/no-such-folder\"");
    relay.launch();
    let status = relay.process_mut().wait_for_end();
    assert!(!status.success());
    assert!(relay.log().contains("/proc/no-such-folder"), "{}", relay.log());
}

#[test]
fn the_demo_compares_everything_and_leaves_nothing_behind() {
    let Some(installation) = Installation::any() else { return };
    let pgbench = installation.program("pgbench");
    let folder = pgbench.parent().unwrap().to_str().unwrap().to_owned();
    let (status, told, complaint) =
        Relay::command(&["demo", "--once", "--seconds", "2", "--pg-bin", &folder]);
    assert!(status.success(), "{told}\n{complaint}");
    for what in ["pgbench_accounts", "relay_1", "relay_2"] {
        let line = |line: &str| line.starts_with("equal: ") && line.contains(what);
        assert!(told.lines().any(line), "nothing is said of {what}:\n{told}");
    }
}
