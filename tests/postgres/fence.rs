//! Fencing: once it is confirmed nothing more is acknowledged, whatever happens, and everything that was can be fetched.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::faults::Faults;
use crate::support::lab::{Installation, chosen_majors};
use crate::support::load::{Load, assert_has_confirmed, write_wal};
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::proxy::Proxy;
use crate::support::raw::{RawClient, identify_system};
use crate::support::relay::Relay;
use crate::support::wait::{hold, wait_for, wait_until};
use crate::support::{MB, lsn, lsn_text};

/// A primary whose commits wait for the relay, a proxy that sees what the relay says, and the relay.
fn chain_on(installation: &Installation, prepare: impl FnOnce(Relay) -> Relay) -> (Postgres, Proxy, Relay) {
    let primary =
        Settings::new().segment_size_mb(1).line("synchronous_standby_names = 'relay'").start(installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = prepare(Relay::new("relay", proxy.port).with_token());
    relay.start();
    primary
        .wait_for_sql("select sync_state from pg_stat_replication where application_name = 'relay'", "sync");
    (primary, proxy, relay)
}

fn chain(prepare: impl FnOnce(Relay) -> Relay) -> Option<(Postgres, Proxy, Relay)> {
    Some(chain_on(&Installation::any()?, prepare))
}

/// A standby for which commits need not wait while it is made, nor once it is promoted.
fn standby(primary: &Postgres, name: &str, relay: &Relay) -> Postgres {
    primary.standby(name, relay.port, "synchronous_standby_names = ''\nwal_receiver_status_interval = 1s")
}

fn is_fenced(relay: &Relay) -> bool {
    relay.status()["upstream"]["fence"]["fenced"] == true
}

/// Nothing of the upstream is touched any more.
fn assert_apart(relay: &Relay, primary: &Postgres, proxy: &Proxy, stated: u64) {
    let connections = proxy.connections();
    hold("the upstream is left alone", Duration::from_millis(700), || proxy.connections() == connections);
    assert_eq!(primary.sql("select count(*) from pg_stat_replication where application_name = 'relay'"), "0");
    let told = proxy.passed(|passed| passed.flush_max);
    assert!(told <= stated, "{} was acknowledged, {} stated", lsn_text(told), lsn_text(stated));
    assert_eq!(relay.flushed(), stated, "{}", relay.status());
    proxy.assert_honest();
}

#[test]
fn no_commit_is_confirmed_behind_a_fence_and_all_before_are_on_the_standby_that_is_promoted() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let (mut primary, proxy, mut relay) = chain_on(&installation, |relay| relay);
        let heir = standby(&primary, "heir", &relay);
        let loads = [0, 1, 2].map(|_| Load::start(&primary, Duration::ZERO));
        let confirmed = || loads.iter().map(Load::committed).sum::<u64>();
        wait_until("some commits", || confirmed() > 100);
        // What its clients count trails what the primary has confirmed.
        let stated = relay.fence();
        relay.kill();
        std::thread::sleep(Duration::from_millis(100));
        let at_fence = confirmed();
        relay.launch();
        relay.wait_serving();
        assert!(is_fenced(&relay), "{}", relay.status());
        assert!(relay.is_ready());
        assert_eq!(relay.metric("walrelay_fenced"), Some(1.0));
        assert_apart(&relay, &primary, &proxy, stated);
        hold("no commit is confirmed", Duration::from_secs(1), || confirmed() == at_fence);
        // The standby, which starts from the beginning again, gets all of it from the fenced relay.
        let mut heir = heir;
        heir.restart(Stop::Immediate);
        heir.wait_replayed(stated);
        assert_eq!(confirmed(), at_fence);
        primary.stop(Stop::Kill);
        drop(loads);
        heir.promote();
        assert_has_confirmed(&heir, at_fence);
        assert!(is_fenced(&relay));
    }
}

#[test]
fn a_relay_whose_primary_is_dead_is_fenced_at_once_and_follows_the_heir_when_that_is_over() {
    let Some((mut primary, proxy, mut relay)) = chain(|relay| relay) else { return };
    let heir = standby(&primary, "heir", &relay);
    let load = Load::start(&primary, Duration::ZERO);
    wait_until("some commits", || load.committed() > 100);
    primary.stop(Stop::Kill);
    proxy.close();
    let confirmed = load.committed();
    drop(load);
    let begun = std::time::Instant::now();
    let stated = relay.fence();
    assert!(begun.elapsed() < Duration::from_secs(3), "it took {:?}", begun.elapsed());
    assert!(stated >= proxy.passed(|passed| passed.flush_max));
    heir.wait_replayed(stated);
    heir.promote();
    assert_has_confirmed(&heir, confirmed);
    assert_eq!(relay.flushed(), stated);
    relay.unfence();
    relay.terminate();
    let conninfo = format!("\"host=127.0.0.1 port={} user=postgres sslmode=disable\"", heir.port);
    relay.set("upstream.conninfo", &conninfo);
    relay.start();
    write_wal(&heir, MB);
    relay.wait_flushed(heir.flushed());
}

#[test]
fn a_fence_stands_across_restarts_and_promotions_until_it_is_taken_away() {
    let Some(installation) = Installation::any() else { return };
    let mut old =
        Settings::new().segment_size_mb(1).line("synchronous_standby_names = 'relay'").start(&installation);
    let mut relay = Relay::new("relay", old.port).with_token();
    relay.start();
    let heir = standby(&old, "heir", &relay);
    let ports = format!("{},{}", old.port, heir.port);
    relay.terminate();
    relay = relay.with_conninfo(&format!(
        "host=127.0.0.1,127.0.0.1 port={ports} user=postgres sslmode=disable target_session_attrs=read-write"
    ));
    relay.start();
    write_wal(&old, 2 * MB);
    let identity = || identify_system(&mut RawClient::replication(relay.port).unwrap());
    let before = identity();
    let stated = relay.fence();
    assert_eq!(relay.fence(), stated, "asked again it is the same fence");
    assert_eq!((identity().0, identity().1), (before.0.clone(), before.1));
    heir.wait_replayed(stated);
    old.stop(Stop::Kill);
    // Before it takes commits, so that the first of them waits.
    heir.add_settings("synchronous_standby_names = 'relay'");
    heir.reload();
    heir.wait_for_sql("show synchronous_standby_names", "relay");
    heir.promote();
    let is_apart = |relay: &Relay| {
        let status = relay.status();
        let is_still =
            status["store"]["timeline"] == 1 && lsn(status["store"]["flushed"].as_str().unwrap()) == stated;
        is_still && status["upstream"]["state"] == "stopped" && status["upstream"]["fence"]["fenced"] == true
    };
    let load = Load::start_waiting(&heir);
    for _ in 0..2 {
        hold("the new timeline is not followed", Duration::from_secs(1), || is_apart(&relay));
        assert_eq!(load.committed(), 0, "{}", relay.status());
        let status = relay.terminate();
        assert!(status.success(), "{status}");
        relay.launch();
        relay.wait_serving();
    }
    // A client that comes now gets what was held.
    let mut client = RawClient::replication(relay.port).unwrap();
    let from = relay.oldest();
    client.start_replication(None, from, 1).unwrap();
    client.read_wal(from, stated);
    relay.unfence();
    relay.unfence();
    wait_until("commits to go on", || load.committed() > 10);
    assert_eq!(relay.status()["store"]["timeline"], 2);
    assert_eq!(relay.metric("walrelay_fenced"), Some(0.0));
    relay.restart_after_kill();
    assert!(!is_fenced(&relay));
}

/// Longest fast stop.
const STOP_MAX: Duration = Duration::from_secs(3);

#[test]
fn the_primary_stops_at_once_before_while_and_after_the_relay_is_fenced() {
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let (mut primary, proxy, relay) = chain_on(&installation, |relay| relay);
        let load = Load::start(&primary, Duration::ZERO);
        wait_until("some commits", || load.committed() > 50);
        // Both at once.
        let stated = std::thread::scope(|scope| {
            let fencing = scope.spawn(|| relay.fence());
            let took = primary.stop(Stop::Fast);
            assert!(took < STOP_MAX, "the primary's fast stop took {took:?}");
            fencing.join().unwrap()
        });
        drop(load);
        primary.start();
        assert_apart(&relay, &primary, &proxy, stated);
        let took = primary.stop(Stop::Fast);
        assert!(took < STOP_MAX, "the primary's fast stop took {took:?}");
        proxy.assert_honest();
    }
}

#[test]
fn a_fence_is_not_confirmed_while_the_disk_hangs_and_the_primary_stops_nevertheless() {
    let faults = Faults::new();
    let Some((mut primary, proxy, relay)) = chain(|relay| relay.with_faults(&faults)) else { return };
    let load = Load::start(&primary, Duration::ZERO);
    wait_until("some commits", || load.committed() > 50);
    faults.set("sync_hangs", 0);
    let told = proxy.passed(|passed| passed.flush_max);
    let stated = std::thread::scope(|scope| {
        let fencing = scope.spawn(|| relay.fence());
        let took = primary.stop(Stop::Fast);
        assert!(took < STOP_MAX, "the primary's fast stop took {took:?}");
        hold("nothing is confirmed", Duration::from_secs(2), || !is_fenced(&relay) && !fencing.is_finished());
        faults.clear("sync_hangs");
        fencing.join().unwrap()
    });
    drop(load);
    assert!(is_fenced(&relay) && stated >= told);
    primary.start();
    assert_apart(&relay, &primary, &proxy, stated);
}

#[test]
fn the_primary_stops_at_once_fenced_or_not_when_those_whose_flush_counts_are_dead() {
    let prepare = |relay: Relay| relay.with("upstream.acknowledge", "\"ANY 1 (a, b)\"");
    let Some(installation) = Installation::any() else { return };
    let mut primary =
        Settings::new().segment_size_mb(1).line("synchronous_standby_names = 'relay'").start(&installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = prepare(Relay::new("relay", proxy.port).with_token());
    relay.start();
    let load = Load::start_waiting(&primary);
    hold("a commit waits", Duration::from_millis(500), || load.committed() == 0);
    let upto = primary.flushed();
    relay.wait_flushed(upto);
    let took = primary.stop(Stop::Fast);
    assert!(took < STOP_MAX, "the primary's fast stop took {took:?}");
    primary.start();
    wait_until("the relay to stream again", || relay.status()["upstream"]["state"] == "streaming");
    let stated = relay.fence();
    assert!(stated >= upto);
    assert_eq!(proxy.passed(|passed| passed.flush_max), 0, "acknowledged without the standbys");
    let took = primary.stop(Stop::Fast);
    assert!(took < STOP_MAX, "the primary's fast stop took {took:?}");
    assert_eq!(load.committed(), 0);
    proxy.assert_honest();
}

/// Runs `walrelay fence` or `unfence`; returns its exit status, what it prints as JSON, and what it complains.
fn command(name: &str, relay: &Relay) -> (Option<i32>, Value, String) {
    command_with(&[name], relay)
}

/// The same with other arguments beside the configuration.
fn command_with(arguments: &[&str], relay: &Relay) -> (Option<i32>, Value, String) {
    let config = relay.write_config();
    let (status, told, complaint) =
        Relay::command(&[arguments, &["--config", config.to_str().unwrap()]].concat());
    (status.code(), serde_json::from_str(&told).unwrap_or(Value::Null), complaint)
}

#[test]
fn the_commands_ask_a_relay_that_runs_and_change_the_directory_of_one_that_does_not() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port).with_token();
    // It never ran: nothing may be made up.
    let (status, _, complaint) = command("fence", &relay);
    assert_eq!(status, Some(1), "{complaint}");
    assert!(complaint.contains("the relay does not run, and there is no data directory"), "{complaint}");
    // It has a directory and holds nothing: most likely its disk is not mounted, and the fence would be lost when it is.
    std::fs::create_dir(relay.data_dir()).unwrap();
    for name in ["fence", "unfence"] {
        let (status, _, complaint) = command(name, &relay);
        assert_eq!(status, Some(1), "{complaint}");
        assert!(complaint.contains("holds no WAL: mount its disk, or add --empty"), "{complaint}");
        // Where there must be WAL nothing helps.
        relay.set("relay.data_must_exist", "true");
        let (status, _, complaint) = command_with(&[name, "--empty"], &relay);
        assert_eq!(status, Some(1), "{complaint}");
        assert!(complaint.contains("holds no WAL: relay.data_must_exist is set"), "{complaint}");
        relay.unset("relay.data_must_exist");
    }
    assert!(!relay.data_dir().join("walrelay.fence").exists());
    // Also one that has never run must not begin to acknowledge.
    let (status, told, complaint) = command_with(&["fence", "--empty"], &relay);
    assert_eq!(
        (status, &told["fenced"], &told["timeline"]),
        (Some(0), &Value::Bool(true), &Value::Null),
        "{complaint}"
    );
    relay.launch();
    wait_until("the relay to tell that it is fenced", || is_fenced(&relay));
    hold("nothing is received", Duration::from_millis(700), || relay.status()["store"]["flushed"].is_null());
    let (status, told, complaint) = command("unfence", &relay);
    assert_eq!((status, &told["fenced"]), (Some(0), &Value::Bool(false)), "{complaint}");
    relay.wait_ready();
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    let (status, told, complaint) = command("fence", &relay);
    assert_eq!((status, &told["timeline"]), (Some(0), &Value::from(1)), "{complaint}");
    let stated = told["flushed"].clone();
    assert_eq!(stated, lsn_text(relay.flushed()));
    relay.process().signal(Signal::KILL);
    relay.wait_for_end();
    let (status, told, complaint) = command("fence", &relay);
    assert_eq!(
        (status, &told["fenced"], &told["running"]),
        (Some(0), &Value::Bool(true), &Value::Bool(false)),
        "{complaint}"
    );
    assert_eq!((&told["timeline"], &told["flushed"]), (&Value::from(1), &Value::Null));
    let (status, told, _) = command("unfence", &relay);
    assert_eq!((status, &told["fenced"]), (Some(0), &Value::Bool(false)));
    relay.start();
    assert!(!is_fenced(&relay));
    assert_others_are_not_taken_for_it(&primary, &mut relay);
}

/// Somebody else listens where the relay should, or the relay runs and cannot be asked.
fn assert_others_are_not_taken_for_it(primary: &Postgres, relay: &mut Relay) {
    let other = Relay::new("other", primary.port)
        .with_token()
        .with_data_dir(relay.data_dir())
        .with("admin.listen", &format!("\"127.0.0.1:{}\"", relay.admin_port));
    for name in ["fence", "unfence"] {
        let (status, _, complaint) = command(name, &other);
        assert_eq!(status, Some(1), "{complaint}");
        assert!(complaint.contains("another relay than \"other\" listens at"), "{complaint}");
    }
    assert!(!is_fenced(relay));
    // The relay runs, and cannot be asked.
    let without_token = Relay::new("relay", primary.port).with_data_dir(relay.data_dir());
    let (status, _, complaint) = command("fence", &without_token);
    assert_eq!(status, Some(1));
    assert!(complaint.contains("the relay runs, but nobody listens on its admin.listen"), "{complaint}");
    relay.terminate();
    relay.unset("admin.token_file");
    relay.start();
    let (status, _, complaint) = command("fence", relay);
    assert_eq!(status, Some(1));
    assert!(
        complaint.contains("does not let its fence be changed: admin.token_file must be set"),
        "{complaint}"
    );
}

/// A process that listens where a relay should, says that all is done, and keeps what it hears.
struct Impostor(Arc<Mutex<VecDeque<String>>>);

impl Impostor {
    fn at(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let heard = Arc::<Mutex<VecDeque<String>>>::default();
        let keeps = Arc::clone(&heard);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let mut head = [0; 4096];
                let length = stream.read(&mut head).unwrap_or(0);
                let head = String::from_utf8_lossy(&head[..length]).into_owned();
                let body = format!("{{\"fenced\":{},\"flushed\":\"F/F\"}}", !head.contains("/unfence"));
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                // Whoever has asked nothing is gone.
                let _ = stream.write_all(answer.as_bytes());
                keeps.lock().unwrap().push_back(head);
            }
        });
        Self(heard)
    }

    /// What the next one said who came.
    fn heard(&self) -> String {
        wait_for("somebody to have come", || self.0.lock().unwrap().pop_front())
    }
}

#[test]
fn whoever_listens_in_the_place_of_a_relay_is_neither_believed_nor_shown_the_token() {
    let relay = Relay::new("relay", 1).with_token();
    let impostor = Impostor::at(relay.admin_port);
    let refused = |arguments: &[&str], words: &str| {
        let (status, told, complaint) = command_with(arguments, &relay);
        assert_eq!((status, &told), (Some(1), &Value::Null), "{arguments:?} {complaint}");
        assert!(complaint.contains(words), "{arguments:?} {complaint}");
    };
    // There is no data directory here: it may be on another machine.
    for name in ["fence", "unfence"] {
        refused(&[name], "did not see the token: could not list");
        assert_eq!(impostor.heard(), "");
    }
    // Whoever says so is let alone with it, and told what is not known.
    let (status, told, complaint) = command_with(&["fence", "--unchecked"], &relay);
    assert_eq!((status, &told["fenced"]), (Some(0), &Value::Bool(true)), "{complaint}");
    assert!(complaint.contains("warning: not checked: whether the relay is what listens at"), "{complaint}");
    assert!(impostor.heard().contains(relay.token().unwrap()));
    std::fs::create_dir(relay.data_dir()).unwrap();
    std::fs::set_permissions(relay.data_dir(), PermissionsExt::from_mode(0o700)).unwrap();
    let lock = std::fs::File::create(relay.data_dir().join("walrelay.lock")).unwrap();
    for arguments in [&["fence"][..], &["unfence"], &["fence", "--empty"], &["fence", "--unchecked"]] {
        refused(arguments, "somebody listens at 127.0.0.1");
        assert_eq!(impostor.heard(), "", "{arguments:?}");
    }
    // A process has the directory open, but what was answered is not so.
    lock.lock().unwrap();
    refused(&["fence"], "the relay says that it is done, but its data directory");
    assert!(impostor.heard().contains(relay.token().unwrap()), "a relay would have been asked");
    lock.unlock().unwrap();
    let elsewhere = Relay::new("relay", 1).with_token().with_data_dir(relay.data_dir());
    let (status, _, complaint) = command_with(&["fence", "--empty"], &elsewhere);
    assert_eq!(status, Some(0), "{complaint}");
    lock.lock().unwrap();
    refused(&["unfence"], "is still fenced");
}

#[test]
fn a_relay_that_does_not_get_its_port_has_not_opened_its_directory() {
    let mut relay = Relay::new("relay", 1).with_token();
    let _impostor = Impostor::at(relay.admin_port);
    relay.launch();
    assert!(!relay.wait_for_end().success());
    assert!(relay.log().contains("could not listen on"), "{}", relay.log());
    assert!(!relay.data_dir().exists(), "the token would be shown while it recovers");
}
