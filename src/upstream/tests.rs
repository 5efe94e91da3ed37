//! Servers that stall while a stream is being opened, by tokio's stopped clock, and one that is built otherwise.
//!
//! Over Unix sockets: what is written to them is there at once, so that the clock moves only when both sides wait.

use std::path::Path;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant as VirtualInstant;

use super::*;
use crate::conninfo::FixedSurroundings;
use crate::metrics::AllMetrics;
use crate::protocol::acknowledge_policy::AcknowledgePolicy;
use crate::protocol::backend::{
    Authentication, Column, TransactionStatus, encode_authentication, encode_command_complete,
    encode_notice_response, encode_ready_for_query, encode_row_description, encode_text_row,
};
use crate::protocol::{ServerError, SqlState};
use crate::session::acknowledge::{Acknowledger, Standby, Standbys};
use crate::store::{Observer, small};
use crate::wal::TimelineId;

/// Where a server stops to answer.
#[derive(Clone, Copy)]
enum StallsAt {
    Login,
    Question(&'static str),
    /// In the middle of the answer.
    Answer(&'static str),
}

/// What it does then.
#[derive(Clone, Copy)]
enum Then {
    Silence,
    /// Something that is no answer comes often enough that no single wait is long.
    Chatter,
}

/// A server that answers up to somewhere.
struct Stall {
    at: StallsAt,
    then: Then,
    page_bytes: &'static str,
}

impl Stall {
    /// Listens in this folder, as PostgreSQL does.
    fn listen(self, folder: &Path) {
        let listener = UnixListener::bind(folder.join(".s.PGSQL.5432")).unwrap();
        tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            self.answer(&mut client).await;
            match self.then {
                Then::Silence => std::future::pending().await,
                Then::Chatter => chatter(&mut client).await,
            }
        });
    }

    async fn answer(&self, client: &mut UnixStream) {
        let startup_bytes = client.read_u32().await.unwrap() - 4;
        read_bytes(client, startup_bytes).await;
        if matches!(self.at, StallsAt::Login) {
            return;
        }
        send(client, |out| {
            encode_authentication(&Authentication::Ok, out);
            encode_ready_for_query(TransactionStatus::Idle, out);
        })
        .await;
        loop {
            assert_eq!(client.read_u8().await.unwrap(), b'Q');
            let bytes = client.read_u32().await.unwrap() - 4;
            let question = String::from_utf8(read_bytes(client, bytes).await).unwrap();
            let is_asked = |stalls_at: &str| question.starts_with(stalls_at);
            if matches!(self.at, StallsAt::Question(stalls_at) if is_asked(stalls_at)) {
                return;
            }
            let row = self.row_of(&question);
            let columns: Vec<Column> = row.iter().map(|_| Column::text("column")).collect();
            send(client, |out| encode_row_description(&columns, out)).await;
            if matches!(self.at, StallsAt::Answer(stalls_at) if is_asked(stalls_at)) {
                return;
            }
            send(client, |out| {
                encode_text_row(&row.map(Some), out);
                encode_command_complete("SELECT", out);
                encode_ready_for_query(TransactionStatus::Idle, out);
            })
            .await;
        }
    }

    fn row_of(&self, question: &str) -> [&'static str; 4] {
        match question.trim_end_matches(['\0', ';']) {
            "IDENTIFY_SYSTEM" => ["7000000000000000000", "1", "0/3000000", ""],
            "SHOW transaction_read_only" => ["off"; 4],
            "SHOW wal_segment_size" => ["16MB"; 4],
            "SHOW wal_block_size" => [self.page_bytes; 4],
            "SHOW server_version_num" => ["180004"; 4],
            _ => ["0"; 4],
        }
    }
}

async fn read_bytes(client: &mut UnixStream, bytes: u32) -> Vec<u8> {
    let mut read = vec![0; bytes as usize];
    client.read_exact(&mut read).await.unwrap();
    read
}

async fn send(client: &mut UnixStream, encode: impl FnOnce(&mut BytesMut)) {
    let mut out = BytesMut::new();
    encode(&mut out);
    client.write_all(&out).await.unwrap();
}

/// Until the other side has had enough, or ought to have had.
async fn chatter(client: &mut UnixStream) {
    let notice = ServerError::error(SqlState::INTERNAL_ERROR, "in a moment");
    let mut out = BytesMut::new();
    encode_notice_response(&notice, &mut out);
    for _ in 0..100 {
        if client.write_all(&out).await.is_err() {
            break;
        }
        tokio::time::sleep(CHATTER_INTERVAL).await;
    }
}

const CHATTER_INTERVAL: Duration = Duration::from_millis(9_700);

fn settings(folder: &Path, more: &str) -> UpstreamSettings {
    let text = format!("host={} user=relay sslmode=disable {more}", folder.display());
    let surroundings = FixedSurroundings::of_user("relay");
    let conninfo = Conninfo::parse_for_replication(&text, "relay", &surroundings).unwrap();
    UpstreamSettings {
        sql_conninfo: conninfo.clone(),
        conninfo,
        patroni: Vec::new(),
        slot: Some("relay".to_owned()),
        streams_by_slot: true,
        expect_sync: false,
        create_slot: true,
        slot_wal_keep_max: None,
        receiver_timeout: None,
        link: LinkSettings { mode: LinkMode::Off, codecs: Vec::new(), retry_interval: None },
        instance: Instances::of("relay".to_owned()),
        status_interval: None,
        on_divergence: OnDivergence::Follow,
        retry_interval: Duration::from_secs(5),
    }
}

/// How an attempt to connect ended, and after how many seconds by the stopped clock.
async fn attempt(at: StallsAt, then: Then, more: &str) -> (String, u64) {
    let folder = tempfile::tempdir().unwrap();
    Stall { at, then, page_bytes: "8192" }.listen(folder.path());
    let (really, began) = (Instant::now(), VirtualInstant::now());
    let Upstream { store, writer, .. } = upstream(folder.path());
    let outcome = connect::connect(&settings(folder.path(), more), &store, &writer, Order::default()).await;
    assert!(really.elapsed() < Duration::from_secs(5), "the clock is not stopped");
    let Err(error) = outcome else { panic!("it stalls") };
    assert_eq!(error.advice(), Advice::Retry);
    (error.chain(), began.elapsed().as_secs())
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_let_us_in_is_left_in_time() {
    let (text, seconds) = attempt(StallsAt::Login, Then::Chatter, "").await;
    assert!(text.ends_with("failed: timeout expired"), "{text}");
    assert_eq!(seconds, 30);
    for then in [Then::Silence, Then::Chatter] {
        let (text, seconds) = attempt(StallsAt::Login, then, "connect_timeout=7").await;
        assert!(text.ends_with("failed: timeout expired"), "{text}");
        assert_eq!(seconds, 7);
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_lets_us_in_and_then_stalls_is_left_in_time() {
    let question = "SHOW transaction_read_only";
    for at in [
        StallsAt::Question(question),
        StallsAt::Question("IDENTIFY_SYSTEM"),
        StallsAt::Answer("IDENTIFY_SYSTEM"),
        StallsAt::Answer("SHOW wal_sender_timeout"),
    ] {
        let (text, seconds) = attempt(at, Then::Silence, "").await;
        assert_eq!((text.as_str(), seconds), ("could not communicate with the upstream: timed out", 30));
        let (text, seconds) = attempt(at, Then::Chatter, "").await;
        assert_eq!((text, seconds), (UpstreamError::OpeningTimeout.to_string(), 60));
    }
}

struct Nobody;

impl Standbys for Nobody {
    fn show(&self, _: TimelineId, _: &mut dyn FnMut(&[Standby<'_>])) {}
}

/// Hears how far a store is.
struct Watcher(watch::Sender<Option<Positions>>);

impl Observer for Watcher {
    fn positions_changed(&self, positions: Positions) {
        self.0.send_replace(Some(positions));
    }

    fn condition_changed(&self, _: Condition) {}
}

/// A relay that holds nothing yet.
pub(super) fn upstream(folder: &Path) -> Upstream {
    let watcher = watch::Sender::default();
    let positions = watcher.subscribe();
    let (store, writer) = small::open_for(&folder.join("data"), Arc::new(Watcher(watcher)));
    let (status, metrics) = (watch::Sender::default(), AllMetrics::default().upstream);
    let acknowledger = Acknowledger::new(AcknowledgePolicy::Local, None);
    let standbys_moved = watch::Sender::new(()).subscribe();
    let acknowledging = Acknowledging::new(
        acknowledger,
        (Arc::new(Nobody), standbys_moved),
        store.clone(),
        status.clone(),
        metrics.clone(),
    );
    let (_, fencing) = Fencing::new(&store);
    Upstream {
        settings: settings(folder, ""),
        store,
        fencing,
        instances: watch::Sender::new(Instances::of("relay".to_owned())),
        writer,
        positions,
        condition: watch::Sender::new(Condition::Healthy).subscribe(),
        damage: watch::Sender::new(()).subscribe(),
        acknowledging,
        feedbacks: None,
        status,
        metrics,
        link_metrics: AllMetrics::default().link,
        link_traffic: Arc::default(),
        shutdown: CancellationToken::new(),
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stalls_before_the_stream_is_left_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let mut upstream = upstream(folder.path());
    let at = StallsAt::Question("READ_REPLICATION_SLOT");
    Stall { at, then: Then::Chatter, page_bytes: "8192" }.listen(folder.path());
    let began = VirtualInstant::now();
    let mut course = Course::new(Duration::from_secs(5), &upstream.store);
    let outcome = upstream.open(&mut course, None).await;
    assert!(matches!(outcome, Err(UpstreamError::OpeningTimeout)));
    assert_eq!(began.elapsed().as_secs(), 60);
    upstream.store.shutdown();
}

#[tokio::test(start_paused = true)]
async fn a_server_with_another_page_size_is_refused_before_anything_is_stored() {
    let at = StallsAt::Question("READ_REPLICATION_SLOT");
    for (page_bytes, is_refused) in [("8192", false), ("4096", true), ("16384", true), ("", true)] {
        let folder = tempfile::tempdir().unwrap();
        Stall { at, then: Then::Silence, page_bytes }.listen(folder.path());
        let Upstream { store, writer, .. } = upstream(folder.path());
        let outcome = connect::connect(&settings(folder.path(), ""), &store, &writer, Order::default()).await;
        let Err(error) = outcome else {
            assert!(!is_refused, "{page_bytes} is taken");
            continue;
        };
        let told =
            format!("upstream has a WAL page size (wal_block_size) of {page_bytes}, only 8192 is supported");
        assert_eq!(error.chain(), told);
        assert_eq!(error.advice(), Advice::TellAHuman);
        assert!(is_refused && store.identity().is_none() && writer.holds_nothing());
    }
}

#[tokio::test(start_paused = true)]
async fn who_never_finds_an_upstream_does_not_say_that_it_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let mut upstream = upstream(folder.path());
    upstream.settings.expect_sync = true;
    let (mut status, store) = (upstream.status.subscribe(), upstream.store.clone());
    let shutdown = upstream.shutdown.clone();
    let began = VirtualInstant::now();
    let running = tokio::spawn(upstream.run());
    let is_told = status.wait_for(|status| status.not_synchronous && status.needs_attention);
    tokio::time::timeout(Duration::from_secs(60), is_told).await.unwrap().unwrap();
    assert!(began.elapsed() >= Duration::from_secs(30), "it may still be coming");
    shutdown.cancel();
    running.await.unwrap();
    assert_eq!(status.borrow().state, WalReceiverState::Stopped);
    store.shutdown();
}
