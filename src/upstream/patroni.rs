//! Which member leads, by Patroni's REST API.
//!
//! Owns the question and what is taken of the answer: an order in which the hosts of the connection string are tried, nothing
//! more. Whoever answers there is not authenticated, so it can never make us connect to a host that nobody has configured,
//! and every server is checked as without it.

use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::config::PatroniUrl;
use crate::conninfo::{Host, HostAddress};

/// Where the member that leads is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Leader {
    host: String,
    port: u16,
}

#[derive(Deserialize)]
struct Cluster {
    members: Vec<Member>,
}

#[derive(Deserialize)]
struct Member {
    role: String,
    host: Option<String>,
    port: Option<u16>,
}

/// The API did not say who leads.
#[derive(Debug, thiserror::Error)]
enum PatroniError {
    #[error("could not connect")]
    Connect(#[from] std::io::Error),
    #[error("could not ask")]
    Http(#[from] hyper::Error),
    #[error("could not ask")]
    Request(#[from] hyper::http::Error),
    #[error("could not read the answer: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("the answer is not a cluster's state")]
    Json(#[from] serde_json::Error),
    #[error("it answered with status {0}")]
    Status(u16),
    #[error("no member leads")]
    NoLeader,
}

/// Asks all members at once and believes the first that knows a leader; `None` when none does in time.
pub(super) async fn leader(urls: &[PatroniUrl]) -> Option<Leader> {
    let mut asked = JoinSet::new();
    for url in urls {
        let url = url.clone();
        asked.spawn(async move { (ask(&url).await, url) });
    }
    let first = async {
        while let Some(answered) = asked.join_next().await {
            match answered {
                Ok((Ok(leader), _)) => return Some(leader),
                Ok((Err(error), url)) => {
                    tracing::debug!(%url, error = %crate::upstream::error::chain(&error), "Patroni did not tell who leads");
                }
                Err(error) => tracing::debug!(%error, "Patroni did not tell who leads"),
            }
        }
        None
    };
    // One place that is cut off must not hold up the way to the others. Who has not answered is dropped with the set.
    timeout(ANSWER_TIME_MAX, first).await.unwrap_or_default()
}

async fn ask(url: &PatroniUrl) -> Result<Leader, PatroniError> {
    let stream = TcpStream::connect((url.host(), url.port())).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with this question, however that ends.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let request = Request::get("/cluster").header(HOST, url.to_string()).header(CONNECTION, "close");
    let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
    if !response.status().is_success() {
        return Err(PatroniError::Status(response.status().as_u16()));
    }
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    leader_in(&body.map_err(PatroniError::Body)?.to_bytes())
}

fn leader_in(answer: &[u8]) -> Result<Leader, PatroniError> {
    let cluster: Cluster = serde_json::from_slice(answer)?;
    let leads = |member: &Member| LEADING_ROLES.contains(&member.role.as_str());
    let leader = cluster.members.into_iter().find(leads).ok_or(PatroniError::NoLeader)?;
    let (host, port) = leader.host.zip(leader.port).ok_or(PatroniError::NoLeader)?;
    Ok(Leader { host, port })
}

/// The leader that the connection string does not name, if so; that is told when it is found, and not at each attempt.
#[derive(Debug, Default)]
pub(super) struct UnnamedLeader(Option<Leader>);

impl UnnamedLeader {
    /// Takes note of who leads now, and whether one of the hosts is the leader's.
    pub(super) fn note(&mut self, leader: &Leader, is_named: bool) {
        let unnamed = Some(leader).filter(|_| !is_named);
        if unnamed.is_some() && self.0.as_ref() != unnamed {
            tracing::warn!(?leader, "the connection string does not name the server that leads by Patroni");
        }
        self.0 = unnamed.cloned();
    }
}

/// Puts the hosts that are the leader's first. Whether there is one.
pub(super) async fn put_first(hosts: &mut Vec<&Host>, leader: &Leader) -> bool {
    let deadline = Instant::now() + ANSWER_TIME_MAX;
    let mut is_leader = Vec::with_capacity(hosts.len());
    let addresses = resolve(&leader.host, leader.port, deadline).await;
    for host in hosts.iter() {
        is_leader.push(is_at(host, leader, &addresses, deadline).await);
    }
    let mut marks = is_leader.iter();
    let (first, rest): (Vec<_>, Vec<_>) =
        hosts.iter().partition(|_| marks.next().copied().unwrap_or_default());
    let is_named = !first.is_empty();
    *hosts = first.into_iter().chain(rest).collect();
    is_named
}

async fn is_at(host: &Host, leader: &Leader, addresses: &[IpAddr], deadline: Instant) -> bool {
    if host.port != leader.port {
        return false;
    }
    match &host.address {
        HostAddress::UnixSocket(_) => false,
        HostAddress::Ip(ip) => addresses.contains(&ip.to_canonical()),
        HostAddress::Name(name) => {
            name.eq_ignore_ascii_case(&leader.host)
                || resolve(name, host.port, deadline).await.iter().any(|address| addresses.contains(address))
        }
    }
}

/// The addresses of a name, or the address that it is; none if that is not known by then.
async fn resolve(name: &str, port: u16, deadline: Instant) -> Vec<IpAddr> {
    match timeout_at(deadline, tokio::net::lookup_host((name, port))).await {
        Ok(Ok(found)) => found.map(|address| address.ip().to_canonical()).collect(),
        _ => Vec::new(),
    }
}

/// `leader`, as it is called now and was up to Patroni 3, one whose promotion is under way, and the leader of a standby cluster.
const LEADING_ROLES: [&str; 5] = ["leader", "master", "primary", "promoted", "standby_leader"];

/// Longest wait for the members' answers, and for the addresses of all names.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(3);

/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::conninfo::{Conninfo, FixedSurroundings};

    /// As Patroni 4.1 answers.
    const CLUSTER: &str = r#"{"members": [
        {"name": "a", "role": "replica", "state": "streaming", "api_url": "http://127.0.0.1:8008/patroni",
         "host": "127.0.0.1", "port": 5433, "timeline": 3, "lag": 0},
        {"name": "b", "role": "leader", "state": "running", "api_url": "http://127.0.0.1:8009/patroni",
         "host": "127.0.0.1", "port": 5434, "timeline": 3}], "scope": "alpha"}"#;

    /// A member that gives one answer.
    async fn member(status: &'static str, body: String) -> PatroniUrl {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let read = client.read(&mut request).await.unwrap();
            assert!(request[..read].starts_with(b"GET /cluster HTTP/1.1\r\n"));
            // As Python's server: the answer ends where the connection does.
            let head = format!(
                "HTTP/1.0 {status}\r\nServer: BaseHTTP/0.6 Python/3.11.2\r\nContent-Type: application/json\r\n\r\n"
            );
            client.write_all(head.as_bytes()).await.unwrap();
            // Who asks may have had enough.
            let _ = client.write_all(body.as_bytes()).await;
        });
        format!("http://127.0.0.1:{port}").parse().unwrap()
    }

    /// As servers do that keep connections open.
    async fn modern_member(body: String) -> PatroniUrl {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            client.write_all(answer.as_bytes()).await.unwrap();
            assert!(client.read(&mut [0; 1024]).await.unwrap() > 0);
            std::future::pending::<()>().await;
        });
        format!("http://127.0.0.1:{port}").parse().unwrap()
    }

    /// Takes connections, and says nothing.
    async fn silent_member() -> (PatroniUrl, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        (format!("http://127.0.0.1:{port}").parse().unwrap(), listener)
    }

    fn leader_at(port: u16) -> Option<Leader> {
        Some(Leader { host: "127.0.0.1".to_owned(), port })
    }

    #[tokio::test]
    async fn whoever_knows_is_believed_however_the_answer_ends() {
        let expected = leader_at(5434);
        assert_eq!(leader(&[member("200 OK", CLUSTER.to_owned()).await]).await, expected);
        assert_eq!(leader(&[modern_member(CLUSTER.to_owned()).await]).await, expected);
        let headless = CLUSTER.replace("\"leader\"", "\"replica\"");
        let urls = [
            "http://127.0.0.1:1".parse().unwrap(),
            member("503 Service Unavailable", CLUSTER.replace("5434", "1")).await,
            member("200 OK", "{}".to_owned()).await,
            member("200 OK", CLUSTER[..CLUSTER.len() - 1].to_owned()).await,
            member("200 OK", " ".repeat(ANSWER_BYTES_MAX + 1)).await,
            member("200 OK", headless).await,
            member("200 OK", CLUSTER.to_owned()).await,
        ];
        assert_eq!(leader(&urls).await, expected);
        assert_eq!(leader(&urls[..1]).await, None);
        assert_eq!(leader(&[]).await, None);
    }

    #[tokio::test]
    async fn a_leader_has_many_names() {
        for role in ["leader", "master", "primary", "promoted", "standby_leader"] {
            let cluster = CLUSTER.replace("\"leader\"", &format!("{role:?}"));
            assert_eq!(leader_in(cluster.as_bytes()).ok(), leader_at(5434), "{role}");
        }
        for role in ["replica", "sync_standby", "quorum_standby", "demoted", "Leader"] {
            let cluster = CLUSTER.replace("\"leader\"", &format!("{role:?}"));
            assert!(matches!(leader_in(cluster.as_bytes()), Err(PatroniError::NoLeader)), "{role}");
        }
    }

    #[tokio::test]
    async fn members_that_say_nothing_hold_up_nobody_and_all_of_them_no_longer_than_one() {
        let silent = [silent_member().await, silent_member().await, silent_member().await];
        let mut urls: Vec<_> = silent.iter().map(|(url, _)| url.clone()).collect();
        let started = Instant::now();
        assert_eq!(leader(&urls).await, None);
        let took = started.elapsed();
        assert!((ANSWER_TIME_MAX..2 * ANSWER_TIME_MAX).contains(&took), "{took:?}");
        urls.push(member("200 OK", CLUSTER.to_owned()).await);
        let started = Instant::now();
        assert_eq!(leader(&urls).await, leader_at(5434));
        assert!(started.elapsed() < ANSWER_TIME_MAX, "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn a_leader_comes_first_and_one_that_nobody_configured_does_not_come_at_all() {
        let surroundings = FixedSurroundings::of_user("relay");
        let text = "host=localhost,127.0.0.1,127.0.0.9 port=5433,5434,5434 user=u";
        let conninfo = Conninfo::parse_for_replication(text, "relay", &surroundings).unwrap();
        let order = async |host: &str, port| {
            let mut hosts = conninfo.hosts.iter().collect::<Vec<_>>();
            let leader = Leader { host: host.to_owned(), port };
            let is_named = put_first(&mut hosts, &leader).await;
            (is_named, hosts.iter().map(|host| (host.name.as_str(), host.port)).collect::<Vec<_>>())
        };
        let (first, second, third) = (("localhost", 5433), ("127.0.0.1", 5434), ("127.0.0.9", 5434));
        assert_eq!(order("127.0.0.1", 5434).await, (true, vec![second, first, third]));
        assert_eq!(order("127.0.0.1", 5433).await, (true, vec![first, second, third]));
        assert_eq!(order("127.0.0.9", 5434).await, (true, vec![third, first, second]));
        assert_eq!(order("192.0.2.1", 5434).await, (false, vec![first, second, third]));
        assert!(!order("127.0.0.1", 6000).await.0);
    }
}
