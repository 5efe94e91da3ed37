//! A relay's sending side over a store with built WAL, and clients that follow a script.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpSocket, TcpStream, UnixStream},
    sync::watch,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use walrelay::{
    access::{Access, NoFiles, Rules, Users},
    config::{self, ListenAddress},
    downstream::{
        ColdReads, DownstreamContext, DownstreamSettings, Links, Registry, SendPolicies, SendPolicy, serve,
    },
    metrics::{AllMetrics, Metrics},
    net::{Listener, TcpOptions, tls::ServerTls},
    protocol::{
        ServerError,
        backend::{self, TransactionStatus},
        frontend::{self, CancelKey, FirstPacket, Startup, encode_query},
        link::Compression,
        replication::{PrimaryMessage, StandbyStatusUpdate},
    },
    status::RemovedWal,
    store::{
        self, AppendError, BlockId, Condition, Disk, Identity, Observer, Positions, RealDisk,
        RetentionLimits, ServerFacts, Store, StoreSettings, WalWriter,
    },
    wal::{Lsn, PgTimestamp, TimelineId, builder::WalBuilder},
};

/// Longest wait for anything in these tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

struct Watcher(watch::Sender<Option<Positions>>);

impl Observer for Watcher {
    fn positions_changed(&self, positions: Positions) {
        self.0.send_replace(Some(positions));
    }

    fn condition_changed(&self, _condition: Condition) {}
}

/// What differs from test to test.
pub(crate) struct Options {
    pub(crate) version: (&'static str, u32),
    pub(crate) settings: DownstreamSettings,
    pub(crate) links: config::Links,
    pub(crate) tls: Option<Arc<ServerTls>>,
    pub(crate) access: Access,
    pub(crate) timeline: TimelineId,
    pub(crate) tail_bytes_max: u64,
    pub(crate) disk: Arc<dyn Disk>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            version: ("15.18 (Debian 15.18-1.pgdg120+1)", 150_018),
            settings: settings(),
            links: config::Links {
                compressions: vec![Compression::Zstd { level: 1 }, Compression::Lz4],
                adapt: false,
                link_rate_max: None,
                links_rate_max: None,
            },
            tls: None,
            access: access("host all,replication all 127.0.0.0/8 trust", None),
            timeline: TimelineId::FIRST,
            tail_bytes_max: 64 << 20,
            disk: Arc::new(RealDisk),
        }
    }
}

/// Rules as in `pg_hba.conf`, and users.
pub(crate) fn access(rules: &str, users: Option<Users>) -> Access {
    let rules = Rules::parse(Path::new("hba"), rules, &NoFiles).unwrap();
    Access { rules, users, ..Access::default() }
}

pub(crate) fn settings() -> DownstreamSettings {
    DownstreamSettings {
        max_wal_senders: 10,
        unauthenticated_max: 10,
        unauthenticated_per_address_max: 10,
        authentication_timeout: PATIENCE,
        wal_sender_timeout: Some(Duration::from_secs(60)),
        send: SendPolicies::for_all(SendPolicy::Received),
        create_slots: false,
        wal_keep_size: 1 << 30,
        max_replication_slots: 4,
        tcp: TcpOptions::default(),
    }
}

/// A running relay's downstream side.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    pub(crate) socket: PathBuf,
    pub(crate) context: Arc<DownstreamContext>,
    pub(crate) store: Store,
    pub(crate) registry: Arc<Registry>,
    pub(crate) links: Arc<Links>,
    metrics: Arc<Metrics>,
    pub(crate) wal: WalBuilder,
    pub(crate) positions: Arc<watch::Sender<Option<Positions>>>,
    pub(crate) writable: Arc<AtomicBool>,
    pub(crate) removed: watch::Sender<Option<RemovedWal>>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) served: JoinHandle<()>,
    writer: WalWriter,
    fed: Lsn,
    _directory: tempfile::TempDir,
}

fn store_settings(directory: &Path, tail_bytes_max: u64) -> StoreSettings {
    StoreSettings {
        data_dir: directory.to_path_buf(),
        wal_keep_size: 1 << 30,
        tail_bytes_max,
        unwritten_bytes_max: 16 << 20,
        spare_segments: 1,
        reserve_segments: 1,
        max_replication_slots: 4,
        scrub_interval: None,
        limits: RetentionLimits::default(),
    }
}

impl Relay {
    pub(crate) async fn start() -> Self {
        Self::start_with(Options::default()).await
    }

    pub(crate) async fn start_with(options: Options) -> Self {
        Self::build(options, true).await
    }

    /// Over an empty data directory.
    pub(crate) async fn start_fresh() -> Self {
        Self::build(Options::default(), false).await
    }

    async fn build(options: Options, is_initialized: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (sender, receiver) = watch::channel(None);
        let sender = Arc::new(sender);
        let settings = store_settings(directory.path(), options.tail_bytes_max);
        let observer = Arc::new(Watcher(watch::Sender::clone(&sender)));
        let (store, mut writer) = store::open(settings, options.disk, observer).unwrap();
        let small = WalBuilder::small();
        let context = small.context();
        let system_id = context.system_id.unwrap();
        let segment_size = context.segment_size;
        let start = small.start();
        let wal = WalBuilder::new(context.format.unwrap(), system_id, segment_size, options.timeline, start);
        if is_initialized {
            writer.initialize(Identity { system_id, segment_size }, options.timeline, start).unwrap();
            writer.begin(start).unwrap();
            let (version, version_num) = options.version;
            let facts = ServerFacts { version: version.to_owned(), version_num, settings: BTreeMap::new() };
            store.remember_facts(facts).unwrap();
        }

        let listener = Listener::bind(&ListenAddress::Tcp(([127, 0, 0, 1], 0).into())).await.unwrap();
        let address = listener.tcp_address().unwrap();
        let socket = directory.path().join("socket");
        let local = Listener::bind(&ListenAddress::Unix(socket.clone())).await.unwrap();
        let registry = Arc::new(Registry::default());
        let metrics = AllMetrics::default();
        let links = Arc::new(Links::new(&options.links, metrics.link.clone()));
        let writable = Arc::new(AtomicBool::new(true));
        let (removed, upstream_removed) = watch::channel(None);
        let context = DownstreamContext {
            store: store.clone(),
            positions: receiver,
            registry: Arc::clone(&registry),
            settings: options.settings,
            tls: options.tls,
            access: ArcSwap::from_pointee(options.access),
            mock_nonce: [7; 32].into(),
            upstream_writable: Arc::clone(&writable),
            upstream_removed,
            instances: watch::Sender::default().subscribe(),
            links: Arc::clone(&links),
            metrics: metrics.downstream,
            cold_reads: ColdReads::default(),
            started: Instant::now(),
        };
        let shutdown = CancellationToken::new();
        let context = Arc::new(context);
        let served = tokio::spawn(serve(Arc::clone(&context), vec![listener, local], shutdown.clone()));
        Self {
            address,
            socket,
            context,
            store,
            registry,
            links,
            metrics: metrics.registry,
            wal,
            positions: sender,
            writable,
            removed,
            shutdown,
            served,
            writer,
            fed: start,
            _directory: directory,
        }
    }

    /// Adds records of about `bytes` bytes in all, and gives them to the store.
    pub(crate) fn grow(&mut self, bytes: usize) -> Lsn {
        self.try_grow(bytes).unwrap()
    }

    /// Adds records of about `bytes` bytes in all that are much alike, as those of a busy table are.
    pub(crate) fn grow_alike(&mut self, bytes: usize) -> Lsn {
        let until = self.wal.end().advance(bytes as u64);
        while self.wal.end() < until {
            let number = self.wal.end().get();
            let text =
                format!("account {number:012} balance {:09} of branch 1 and teller 7 ", number % 99_991);
            self.wal.main_data_record(10, 0, text.repeat(3).as_bytes());
        }
        self.give().unwrap()
    }

    /// The same with records of which nothing can be left out.
    pub(crate) fn grow_random(&mut self, bytes: usize) -> Lsn {
        let until = self.wal.end().advance(bytes as u64);
        let mut state = self.wal.end().get();
        let mut word = || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (state ^ state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            (mixed ^ mixed >> 31).to_be_bytes()
        };
        while self.wal.end() < until {
            let main_data: Vec<u8> = std::iter::repeat_with(&mut word).take(1_000).flatten().collect();
            self.wal.main_data_record(10, 0, &main_data);
        }
        self.give().unwrap()
    }

    /// One value of /metrics.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.metrics.render();
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap()
    }

    /// The same with a store that may have failed.
    pub(crate) fn try_grow(&mut self, bytes: usize) -> Result<Lsn, AppendError> {
        let until = self.wal.end().advance(bytes as u64);
        while self.wal.end() < until {
            self.wal.noise(700);
        }
        self.give()
    }

    /// Gives to the store what was added.
    fn give(&mut self) -> Result<Lsn, AppendError> {
        let new = Bytes::copy_from_slice(self.wal.slice(self.fed, self.wal.end()));
        self.writer.append(self.fed, new, BlockId(self.fed.get()))?;
        self.writer.submit();
        self.fed = self.wal.end();
        Ok(self.fed)
    }

    /// Goes over to another timeline, which left this one at `fork`, without letting anybody else do something meanwhile.
    pub(crate) fn switch(&mut self, next: TimelineId, fork: Lsn) {
        self.writer.switch(next, fork).unwrap();
    }

    pub(crate) fn start_lsn(&self) -> Lsn {
        self.wal.start()
    }

    /// A client that has not said anything.
    pub(crate) async fn stranger(&self) -> Client {
        Client::over(TcpStream::connect(self.address).await.unwrap())
    }

    /// The same from another of this machine's own addresses.
    pub(crate) async fn stranger_from(&self, address: [u8; 4]) -> Client {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((address, 0).into()).unwrap();
        Client::over(socket.connect(self.address).await.unwrap())
    }

    /// The same through the Unix socket.
    pub(crate) async fn local_stranger(&self) -> Client {
        Client::over(UnixStream::connect(&self.socket).await.unwrap())
    }

    /// From now on others may connect; who is connected stays.
    pub(crate) fn set_access(&self, access: Access) {
        self.context.access.store(Arc::new(access));
    }

    /// The same, which takes in little at a time.
    pub(crate) async fn narrow_stranger(&self) -> Client {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        Client::over(socket.connect(self.address).await.unwrap())
    }

    /// A client for physical replication that is ready for commands.
    pub(crate) async fn client(&self) -> Client {
        self.client_named("dc2_a").await
    }

    pub(crate) async fn client_named(&self, application_name: &str) -> Client {
        let mut client = self.stranger().await;
        client.log_in(&startup_as(application_name)).await;
        client
    }

    pub(crate) fn set_writable(&self, writable: bool) {
        self.writable.store(writable, Ordering::Relaxed);
    }
}

pub(crate) fn startup() -> Startup {
    startup_as("dc2_a")
}

pub(crate) fn startup_as(application_name: &str) -> Startup {
    Startup::new([
        ("user", "replicator"),
        ("database", "replication"),
        ("replication", "true"),
        ("application_name", application_name),
    ])
}

/// What a client got before it was ready.
pub(crate) struct Welcome {
    pub(crate) parameters: Vec<(String, String)>,
    pub(crate) pid: u32,
    pub(crate) key: CancelKey,
}

/// The answer to one query.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) columns: Vec<(String, u32)>,
    pub(crate) rows: Vec<Vec<Option<String>>>,
    pub(crate) tags: Vec<String>,
    pub(crate) error: Option<ServerError>,
}

impl Answer {
    pub(crate) fn sqlstate(&self) -> &str {
        self.error.as_ref().and_then(|error| error.sqlstate.as_ref()).map_or("", |state| state.as_str())
    }

    pub(crate) fn message(&self) -> &str {
        self.error.as_ref().map_or("", |error| error.message.as_str())
    }

    pub(crate) fn value(&self, column: usize) -> Option<&str> {
        self.rows[0][column].as_deref()
    }
}

/// What a client runs over.
pub(crate) trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Socket for T {}

/// A client that follows a script.
pub(crate) struct Client {
    pub(crate) socket: Box<dyn Socket>,
    incoming: BytesMut,
}

impl Client {
    fn over(socket: impl Socket + 'static) -> Self {
        Self { socket: Box::new(socket), incoming: BytesMut::new() }
    }

    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).await.unwrap();
    }

    pub(crate) async fn send_packet(&mut self, packet: &FirstPacket) {
        let mut out = BytesMut::new();
        packet.encode(&mut out);
        self.send_bytes(&out).await;
    }

    pub(crate) async fn send(&mut self, message: &frontend::Message) {
        let mut out = BytesMut::new();
        message.encode(&mut out);
        self.send_bytes(&out).await;
    }

    /// The next byte as it is, for answers that are no messages.
    pub(crate) async fn byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        let read = tokio::time::timeout(PATIENCE, self.socket.read(&mut byte)).await.unwrap().unwrap();
        (read == 1).then_some(byte[0])
    }

    /// The next message; `None` when the connection was closed.
    pub(crate) async fn receive(&mut self) -> Option<backend::Message> {
        loop {
            if let Some(message) = backend::Message::decode(&mut self.incoming).unwrap() {
                return Some(message);
            }
            let read = self.socket.read_buf(&mut self.incoming);
            match tokio::time::timeout(PATIENCE, read).await.expect("the relay says nothing") {
                Ok(0) | Err(_) => {
                    assert!(self.incoming.is_empty(), "closed within a message: {:?}", self.incoming);
                    return None;
                }
                Ok(_) => {}
            }
        }
    }

    /// The error that ends the connection.
    pub(crate) async fn refusal(&mut self) -> ServerError {
        loop {
            match self.receive().await {
                Some(backend::Message::ErrorResponse(error)) => {
                    assert!(self.receive().await.is_none(), "the connection stays open");
                    return error;
                }
                Some(backend::Message::NegotiateProtocolVersion(_)) => {}
                other => panic!("expected an error, got {other:?}"),
            }
        }
    }

    pub(crate) async fn log_in(&mut self, startup: &Startup) -> Welcome {
        self.send_packet(&FirstPacket::Startup(startup.clone())).await;
        self.welcome().await
    }

    pub(crate) async fn welcome(&mut self) -> Welcome {
        let (mut parameters, mut known) = (Vec::new(), None);
        loop {
            match self.receive().await.expect("closed") {
                backend::Message::Authentication(backend::Authentication::Ok) => {}
                backend::Message::ParameterStatus { name, value } => parameters.push((name, value)),
                backend::Message::BackendKeyData { process_id, key } => known = Some((process_id, key)),
                backend::Message::ReadyForQuery(TransactionStatus::Idle) => {
                    let (pid, key) = known.expect("no BackendKeyData");
                    return Welcome { parameters, pid, key };
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Sends a query and collects everything up to ReadyForQuery.
    pub(crate) async fn query(&mut self, text: &str) -> Answer {
        let mut out = BytesMut::new();
        encode_query(text, &mut out);
        self.send_bytes(&out).await;
        self.answer().await
    }

    /// Everything up to ReadyForQuery.
    pub(crate) async fn answer(&mut self) -> Answer {
        let mut answer = Answer::default();
        loop {
            match self.receive().await.expect("closed") {
                backend::Message::RowDescription(columns) => {
                    let columns = columns.into_iter();
                    answer.columns = columns.map(|column| (column.name, column.column_type.oid)).collect();
                }
                backend::Message::DataRow(row) => answer.rows.push(
                    row.values()
                        .map(|value| value.map(|value| String::from_utf8(value.to_vec()).unwrap()))
                        .collect(),
                ),
                backend::Message::CommandComplete(tag) => answer.tags.push(tag),
                backend::Message::ErrorResponse(error) => answer.error = Some(error),
                backend::Message::ReadyForQuery(_) => return answer,
                backend::Message::ParameterStatus { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Starts a stream, which must begin.
    pub(crate) async fn start_streaming(&mut self, command: &str) {
        let mut out = BytesMut::new();
        encode_query(command, &mut out);
        self.send_bytes(&out).await;
        match self.receive().await {
            Some(backend::Message::CopyBothResponse(_)) => {}
            other => panic!("{command}: {other:?}"),
        }
    }

    /// The next message of the stream.
    pub(crate) async fn streamed(&mut self) -> PrimaryMessage {
        match self.receive().await.expect("closed") {
            backend::Message::CopyData(body) => PrimaryMessage::decode(body).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Receives WAL from `start` up to `end`, checks that it is contiguous, and returns it with where each message ended.
    pub(crate) async fn receive_wal(&mut self, start: Lsn, end: Lsn) -> (Vec<u8>, Vec<Lsn>) {
        let (mut wal, mut ends) = (Vec::new(), Vec::new());
        while start.advance(wal.len() as u64) < end {
            if let PrimaryMessage::WalData(header, bytes) = self.streamed().await {
                assert_eq!(header.start, start.advance(wal.len() as u64), "a gap or an overlap");
                assert!(bytes.len() <= 131_072);
                wal.extend_from_slice(&bytes);
                ends.push(start.advance(wal.len() as u64));
                assert!(header.wal_end >= ends.last().copied());
            }
        }
        (wal, ends)
    }

    pub(crate) async fn reply(&mut self, write: Option<Lsn>, flush: Option<Lsn>, reply_requested: bool) {
        let update =
            StandbyStatusUpdate { write, flush, apply: None, sent_at: PgTimestamp(0), reply_requested };
        let mut out = BytesMut::new();
        update.encode(&mut out);
        self.send_bytes(&out).await;
    }
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
