//! Patroni says which server leads: its word is an order of configured servers, and its switchovers and failovers are followed.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::compare::{assert_equal_clusters, primary_bytes_of};
use crate::support::lab::Installation;
use crate::support::patroni::Cluster;
use crate::support::postgres::Postgres;
use crate::support::proxy::Proxy;
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::wait::{wait_for, wait_until};
use crate::support::{MB, lsn_text};
use crate::timelines::{dead_branches, fork_of, primary, relay_of, wait_timeline};

/// Commits one id after the other, wherever writes are taken, until dropped.
struct Commits {
    stop: Arc<AtomicBool>,
    confirmed: Arc<Mutex<BTreeSet<u64>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Commits {
    fn start(ports: Vec<u16>) -> Self {
        let (stop, confirmed) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(BTreeSet::new())));
        let (stopped, noted) = (Arc::clone(&stop), Arc::clone(&confirmed));
        let thread = std::thread::spawn(move || {
            let next = AtomicU64::new(1);
            for port in ports.iter().cycle() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(mut client) = RawClient::sql(*port) else {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                };
                while !stopped.load(Ordering::Relaxed) {
                    // What was not confirmed is not tried again: nobody knows what became of it.
                    let id = next.fetch_add(1, Ordering::Relaxed);
                    if client.rows(&format!("insert into kept values ({id})")).is_err() {
                        break;
                    }
                    noted.lock().unwrap().insert(id);
                }
            }
        });
        Self { stop, confirmed, thread: Some(thread) }
    }

    fn confirmed(&self) -> BTreeSet<u64> {
        self.confirmed.lock().unwrap().clone()
    }

    /// Waits for commits that are confirmed from now on.
    fn wait_for_more(&self) {
        let before = self.confirmed().len();
        wait_until("more commits", || self.confirmed().len() > before + 50);
    }
}

impl Drop for Commits {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn ids(server: &Postgres) -> BTreeSet<u64> {
    let rows = RawClient::sql(server.port).unwrap().rows("select id from kept").unwrap();
    rows.iter().map(|row| row[0].as_ref().unwrap().parse().unwrap()).collect()
}

fn wait_host(relay: &Relay, port: u16) {
    wait_until("the relay to stream from the leader", || {
        let host = relay.status()["upstream"]["host"].as_str().unwrap_or_default().to_owned();
        host.ends_with(&format!("port {port}"))
    });
}

/// A standby that replayed what only the dead leader and the relay had (it was confirmed to nobody) says that it cannot
/// follow, and is rewound; any other follows by itself.
fn rejoin(behind: &mut Postgres, leader: &Postgres, relay: &Relay) {
    let end = leader.flushed();
    let follows = wait_for("the standby to follow or to say that it cannot", || {
        let refuses = behind
            .log()
            .contains("forked off current database system timeline 2 before current recovery point");
        if refuses { Some(false) } else { (behind.replayed() >= end).then_some(true) }
    });
    println!("the standby behind the relay follows by itself: {follows}");
    if !follows {
        let fork = fork_of(leader, 3);
        let told = dead_branches(relay);
        assert!(told.iter().any(|branch| branch["fork"] == lsn_text(fork)), "{told:?}");
        behind.rewind_to(leader);
        behind.make_standby_of(relay.port, "behind");
        behind.start();
    }
}

#[test]
fn a_switchover_and_a_failover_by_patroni_lose_no_commit_and_no_member() {
    let Some(mut cluster) = Cluster::start(&["a", "b"], "relay") else { return };
    let [a, b] = [0, 1].map(|at| cluster.members[at].server.port);
    // The order of the hosts is against Patroni's: only its word leads to the leader.
    let mut relay = Relay::new("relay", a);
    let hosts = format!("host=127.0.0.1,127.0.0.1 port={b},{a} user=postgres sslmode=disable");
    relay.set("upstream.conninfo", &format!("{hosts:?}"));
    relay.set("upstream.patroni", &format!("{:?}", cluster.urls()));
    relay.start();
    wait_host(&relay, a);
    let mut behind = cluster.members[0].server.standby("behind", relay.port, "");
    cluster.members[0].server.sql("create table kept (id bigint)");
    // Whoever leads waits for the other member and for the relay.
    cluster.control(&[
        "edit-config",
        "fleet",
        "--force",
        "--pg",
        "synchronous_standby_names=ANY 2 (a, b, relay)",
    ]);
    let query = "select string_agg(sync_state, ',') from pg_stat_replication where application_name in ('b', 'relay')";
    cluster.members[0].server.wait_for_sql(query, "quorum,quorum");
    let commits = Commits::start(vec![a, b]);
    commits.wait_for_more();

    cluster.control(&["switchover", "fleet", "--leader", "a", "--candidate", "b", "--force"]);
    cluster.wait_role(1, "leader");
    cluster.wait_role(0, "replica");
    wait_host(&relay, b);
    wait_timeline(&relay, 2);
    commits.wait_for_more();

    cluster.kill(1);
    cluster.wait_role(0, "leader");
    wait_host(&relay, a);
    wait_timeline(&relay, 3);
    // Commits wait for two: they go on when the dead leader is back as a replica.
    cluster.launch(1);
    cluster.wait_role(1, "replica");
    commits.wait_for_more();
    let confirmed = commits.confirmed();
    drop(commits);

    let leader = &cluster.members[0];
    assert!(confirmed.is_subset(&ids(&leader.server)), "the leader lacks confirmed commits");
    rejoin(&mut behind, &leader.server, &relay);
    assert_equal_clusters(&leader.server, &behind);
    assert!(confirmed.is_subset(&ids(&behind)), "the standby behind the relay lacks confirmed commits");
    let upto = leader.flushed();
    relay.wait_flushed(upto);
    let begin = fork_of(&leader.server, 3) / MB * MB;
    let held = primary_bytes_of(&relay.wal_dir(), MB, 3, begin, upto);
    assert!(
        held == primary_bytes_of(&leader.server.wal_dir(), MB, 3, begin, upto),
        "other WAL than the leader's"
    );
    assert!(relay.status()["upstream"]["lost"].is_null());
    assert_eq!(relay.times_logged("does not name the server that leads"), 0);
}

/// Patroni's answer that the server at this port leads, to whoever asks. Returns the URL.
fn patroni_naming(leader: u16) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let body = format!(
        r#"{{"members": [{{"name": "a", "role": "leader", "host": "127.0.0.1", "port": {leader}}}]}}"#
    );
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut request = [0; 1024];
            if client.read(&mut request).is_ok() {
                // As Patroni's: the answer ends where the connection does.
                let head = "HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n";
                client.write_all((head.to_owned() + &body).as_bytes()).unwrap();
            }
        }
    });
    url
}

#[test]
fn of_two_that_both_take_writes_the_one_that_leads_by_patroni_is_followed() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let old = primary(&installation);
    let new = old.standby("next", old.port, "");
    new.promote();
    for (leader, other) in [(&new, &old), (&old, &new)] {
        let mut relay = relay_of(&[other, leader]);
        let urls = ["http://127.0.0.1:1".to_owned(), patroni_naming(leader.port)];
        relay.set("upstream.patroni", &format!("{urls:?}"));
        relay.start();
        wait_host(&relay, leader.port);
    }
}

#[test]
fn a_leader_that_nobody_configured_is_told_once_and_not_connected_to() {
    let Some(installation) = Installation::any() else { return };
    let server = primary(&installation);
    let (stranger, configured) = (Proxy::to(server.port), Proxy::to(server.port));
    configured.close();
    let mut relay = Relay::new("relay", configured.port);
    relay.set("upstream.patroni", &format!("[{:?}]", patroni_naming(stranger.port)));
    relay.launch();
    wait_until("some attempts", || configured.connections() >= 4);
    assert_eq!(relay.times_logged("does not name the server that leads by Patroni"), 1, "{}", relay.log());
    configured.open();
    relay.wait_ready();
    assert_eq!(stranger.connections(), 0);
    assert_eq!(relay.times_logged("does not name the server that leads by Patroni"), 1);
}
