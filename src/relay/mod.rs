//! Builds the relay, connects its parts, starts and stops them in order.
//!
//! The only place that sees everything. The parts meet here through values: the store's handles, a watch of its positions
//! and of its condition, a watch of the upstream's state, and one token that ends them all. Decides nothing about WAL.

mod descriptors;
mod observer;
mod only_copy;
mod operations;
mod pages;
mod reload;
mod tls;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::access::MockNonce;
use crate::admin::{Admin, Tokens};
use crate::config::{self, Config};
use crate::downstream::{self, ColdReads, DownstreamContext, DownstreamSettings, Links, Registry};
use crate::metrics::{AllMetrics, LinkTraffic, Metrics, UPKEEP_INTERVAL};
use crate::net::{Listener, tls::TlsError};
use crate::protocol::acknowledge_policy::AcknowledgePolicy;
use crate::protocol::instances::Instances;
use crate::relay::descriptors::TooFewDescriptors;
use crate::relay::observer::{Notices, condition_text, remind_of_damage, store_observer};
use crate::relay::only_copy::OnlyCopyAlarm;
use crate::relay::operations::RelayOperations;
pub use crate::relay::pages::LinesDropped;
use crate::relay::pages::RelayPages;
use crate::relay::reload::{Reloader, Watched, access_part, reload_on};
use crate::relay::tls::TlsFiles;
use crate::session::acknowledge::{Acknowledger, Standbys};
use crate::session::feedback::Feedbacks;
use crate::status::{OnlyCopyStatus, RemovedWal, UpstreamStatus};
use crate::store::{
    self, Condition, MOCK_NONCE_BYTES, RealDisk, RetentionLimits, Store, StoreError, StoreSettings, WalWriter,
};
use crate::upstream::{Acknowledging, Fencing, LinkSettings, Upstream, UpstreamSettings, fence_status};

/// The relay could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The store could not be opened.
    #[error("could not open the data directory \"{directory}\"")]
    OpenStore {
        /// The directory.
        directory: String,
        /// Why.
        source: StoreError,
    },
    /// The system lets the process open too few files.
    #[error(transparent)]
    Descriptors(#[from] TooFewDescriptors),
    /// WAL should be there, and is not.
    #[error(
        "data directory \"{directory}\" holds no WAL, and relay.data_must_exist is set: mount its disk, or unset it to begin anew"
    )]
    NoData {
        /// The directory.
        directory: String,
    },
    /// The system has no random numbers.
    #[error("could not generate secret authorization token")]
    Random,
    /// What TLS needs cannot be used.
    #[error("could not set up TLS: {0}")]
    Tls(TlsError),
    /// An address could not be listened on.
    #[error("could not listen on \"{address}\"")]
    Listen {
        /// The address.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Signals cannot be received.
    #[error("could not install signal handlers")]
    Signals(#[source] std::io::Error),
    /// The store failed; nothing may be acknowledged any more.
    #[error("the store has failed: {0}")]
    StoreFailed(String),
    /// A part ended that must not.
    #[error("the {0} task ended unexpectedly")]
    TaskEnded(&'static str),
    /// Not everything stopped in time.
    #[error("could not stop within {} seconds", STOP_TIME_MAX.as_secs())]
    StopTimedOut,
}

/// A relay whose parts are built and whose listeners are bound.
pub struct Relay {
    config: Config,
    metrics: AllMetrics,
    store: Store,
    writer: WalWriter,
    notices: Notices,
    listeners: Vec<Listener>,
    admin: Option<Admin>,
    downstream: Arc<DownstreamContext>,
    status: watch::Sender<UpstreamStatus>,
    instances: watch::Sender<Instances>,
    link_traffic: Arc<LinkTraffic>,
    fencing: Fencing,
    reloader: Arc<Reloader>,
    /// From the beginning: whoever asks early is heard when everything is there.
    hangups: Signal,
}

impl Relay {
    /// Opens the store, which recovers it, and binds every listener. Nothing is received or served yet. The HTTP listener comes
    /// before the store: while a relay has its data directory nobody else can have its port, and see what is sent there.
    pub async fn build(mut config: Config, log_lines_dropped: LinesDropped) -> Result<Self, RelayError> {
        keep_memory_private();
        let hangups = signal(SignalKind::hangup()).map_err(RelayError::Signals)?;
        let downstream_settings = downstream_settings(&config)?;
        let metrics = AllMetrics::default();
        let admin = bind_admin(&config.admin).await?;
        let (store, writer, notices) = open_store(&config, &metrics).await?;
        let mock_nonce = mock_nonce(&config, &store).await?;
        let listeners = listen(&config.downstream.listen).await?;
        let fence = fence_status(&store);
        let status = watch::Sender::new(UpstreamStatus { fence, ..UpstreamStatus::default() });
        let (fence, fencing) = Fencing::new(&store);
        let instances = watch::Sender::new(Instances::of(store::unique_name()));
        let link_traffic = Arc::<LinkTraffic>::default();
        let upstream_writable = Arc::new(AtomicBool::new(false));
        let (removed, upstream_removed) = watch::channel(None);
        let downstream = Arc::new(DownstreamContext {
            store: store.clone(),
            positions: notices.positions.clone(),
            registry: Arc::new(Registry::new(&config.upstream.acknowledge_users)),
            settings: downstream_settings,
            access: ArcSwap::from_pointee(std::mem::take(&mut config.downstream.access)),
            mock_nonce,
            tls: config.downstream.tls.as_ref().map(|tls| tls::read(tls, &metrics.downstream)).transpose()?,
            upstream_writable: Arc::clone(&upstream_writable),
            upstream_removed,
            instances: instances.subscribe(),
            links: Arc::new(Links::new(&config.downstream.links, metrics.link.clone())),
            metrics: metrics.downstream.clone(),
            cold_reads: ColdReads::default(),
            started: Instant::now(),
        });
        let links = Arc::clone(&downstream.links);
        tokio::spawn(mirror_upstream(status.subscribe(), upstream_writable, removed));
        let only_copy = watch_only_copy(&downstream, status.subscribe(), &metrics);
        let reloader = reloader(&downstream, &config, &metrics);
        let pages = Arc::new(RelayPages {
            only_copy,
            name: config.relay.name.clone(),
            store: store.clone(),
            status: status.subscribe(),
            downstream: Arc::clone(&downstream),
            registry: Arc::clone(&metrics.registry),
            store_metrics: metrics.store.clone(),
            link_traffic: Arc::clone(&link_traffic),
            process: metrics.process.clone(),
            reloader: Arc::clone(&reloader),
            log_lines_dropped,
        });
        let operations = Arc::new(RelayOperations { fence, links, reloader: Arc::clone(&reloader) });
        let tokens = Tokens::new(config.admin.token.clone(), config.admin.read_token.clone());
        let admin = admin.map(|listener| Admin::new(listener, tokens, pages, operations));
        Ok(Self {
            config,
            metrics,
            store,
            writer,
            notices,
            listeners,
            admin,
            downstream,
            status,
            instances,
            link_traffic,
            fencing,
            reloader,
            hangups,
        })
    }

    /// Runs until a signal asks to stop, or the relay must not go on.
    pub async fn run(self) -> Result<(), RelayError> {
        let mut signals = StopSignals::install().map_err(RelayError::Signals)?;
        let shutdown = CancellationToken::new();
        let mut condition = self.notices.condition.clone();
        let acknowledging = acknowledging(&self);
        let instance = self.instances.borrow().clone();
        let feedbacks = self.config.upstream.hot_standby_feedback;
        let feedbacks = feedbacks.then(|| Arc::clone(&self.downstream) as Arc<dyn Feedbacks>);
        let mut upstream = tokio::spawn(
            Upstream {
                settings: upstream_settings(&self.config.upstream, instance),
                store: self.store.clone(),
                writer: self.writer,
                positions: self.notices.positions.clone(),
                condition: self.notices.condition.clone(),
                damage: self.notices.damage.clone(),
                acknowledging,
                feedbacks,
                status: self.status,
                metrics: self.metrics.upstream.clone(),
                link_metrics: self.metrics.link.clone(),
                link_traffic: self.link_traffic,
                instances: self.instances,
                fencing: self.fencing,
                shutdown: shutdown.clone(),
            }
            .run(),
        );
        let mut downstream =
            tokio::spawn(downstream::serve(Arc::clone(&self.downstream), self.listeners, shutdown.clone()));
        let admin_shutdown = CancellationToken::new();
        if let Some(admin) = self.admin {
            tokio::spawn(admin.run(admin_shutdown.clone()));
        }
        tokio::spawn(reload_on(self.hangups, Arc::clone(&self.reloader), shutdown.clone()));
        let reminder = remind_of_damage(self.store.clone(), self.notices.damage.clone());
        let until = shutdown.clone();
        tokio::spawn(async move { until.run_until_cancelled(reminder).await });
        if self.downstream.tls.is_some() {
            let watch = tls::watch(self.reloader);
            let until = shutdown.clone();
            tokio::spawn(async move { until.run_until_cancelled(watch).await });
        }
        spawn_upkeep(Arc::clone(&self.metrics.registry), shutdown.clone());
        tracing::info!(name = %self.config.relay.name, "walrelay is running");

        let outcome = tokio::select! {
            () = signals.received() => Ok(()),
            failed = condition.wait_for(|condition| matches!(condition, Condition::Failed { .. })) => {
                Err(RelayError::StoreFailed(failed.map(|condition| condition_text(&condition)).unwrap_or_default()))
            }
            _ = &mut upstream => Err(RelayError::TaskEnded("upstream")),
            _ = &mut downstream => Err(RelayError::TaskEnded("downstream")),
        };
        shutdown.cancel();
        outcome?;
        tracing::info!("stopping");
        let stopped = tokio::time::timeout(STOP_TIME_MAX, stop(upstream, downstream, self.store)).await;
        admin_shutdown.cancel();
        stopped.map_err(|_| RelayError::StopTimedOut)
    }
}

/// There are passwords and keys in it: who has our account does not look into it, and no core file is made of it.
fn keep_memory_private() {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "the memory of this process can be read by others of its account");
    }
}

/// Opens the store, and tells what its recovery found.
async fn open_store(
    config: &Config,
    metrics: &AllMetrics,
) -> Result<(Store, WalWriter, Notices), RelayError> {
    let (observer, notices) = store_observer(metrics.store.clone());
    let settings = store_settings(config);
    let directory = settings.data_dir.display().to_string();
    let opening =
        tokio::task::spawn_blocking(move || store::open(settings, Arc::new(RealDisk), Arc::new(observer)));
    let opened = opening.await.map_err(|_| RelayError::TaskEnded("recovery"))?;
    let (store, writer) =
        opened.map_err(|source| RelayError::OpenStore { directory: directory.clone(), source })?;
    if config.relay.data_must_exist && store.identity().is_none() {
        return Err(RelayError::NoData { directory });
    }
    for note in store.recovery_notes() {
        tracing::warn!(note, "recovery of the store");
    }
    Ok((store, writer, notices))
}

/// What users that do not exist get their salts from: as old as the data directory.
async fn mock_nonce(config: &Config, store: &Store) -> Result<MockNonce, RelayError> {
    let mut fresh = [0; MOCK_NONCE_BYTES];
    aws_lc_rs::rand::fill(&mut fresh).map_err(|_| RelayError::Random)?;
    let store = store.clone();
    let keeping = tokio::task::spawn_blocking(move || store.mock_nonce(fresh));
    match keeping.await.map_err(|_| RelayError::TaskEnded("recovery"))? {
        Ok(kept) => Ok(kept.into()),
        // What is held is to be served also from a full disk.
        Err(error) if error.is_no_space() => {
            tracing::warn!(%error, "what clients see of users that do not exist will change with the next start");
            Ok(fresh.into())
        }
        Err(source) => {
            let directory = config.relay.data_dir.display().to_string();
            Err(RelayError::OpenStore { directory, source })
        }
    }
}

async fn listen(addresses: &[config::ListenAddress]) -> Result<Vec<Listener>, RelayError> {
    let mut listeners = Vec::new();
    for address in addresses {
        let bound = Listener::bind(address).await;
        listeners.push(bound.map_err(|source| RelayError::Listen { address: address.to_string(), source })?);
    }
    Ok(listeners)
}

async fn bind_admin(admin: &config::Admin) -> Result<Option<TcpListener>, RelayError> {
    let Some(address) = admin.listen else { return Ok(None) };
    let bound = TcpListener::bind(address).await;
    bound.map(Some).map_err(|source| RelayError::Listen { address: address.to_string(), source })
}

/// Everything that can be read again.
fn reloader(downstream: &Arc<DownstreamContext>, config: &Config, metrics: &AllMetrics) -> Arc<Reloader> {
    let tls = downstream.tls.as_ref().map(|tls| TlsFiles::new(tls, &metrics.downstream));
    let tls = tls.map(|files| Box::new(files) as Box<dyn Watched>);
    Reloader::new(vec![access_part(downstream, config)], tls, metrics.process.clone())
}

/// Starts to look for WAL that is nowhere else, and returns what is found.
fn watch_only_copy(
    downstream: &DownstreamContext,
    upstream: watch::Receiver<UpstreamStatus>,
    metrics: &AllMetrics,
) -> watch::Receiver<Option<OnlyCopyStatus>> {
    let (told, only_copy) = watch::channel(None);
    let (store, registry) = (downstream.store.clone(), Arc::clone(&downstream.registry));
    let metrics = metrics.store.clone();
    tokio::spawn(OnlyCopyAlarm { store, registry, upstream, metrics, told }.run());
    only_copy
}

/// Where what the standbys say meets what is said upstream.
fn acknowledging(relay: &Relay) -> Acknowledging {
    let upstream = &relay.config.upstream;
    let registry = &relay.downstream.registry;
    Acknowledging::new(
        Acknowledger::new(upstream.acknowledge.clone(), upstream.acknowledge_timeout)
            .with_only_copy_time_max(upstream.only_copy_time_max),
        (Arc::clone(registry) as Arc<dyn Standbys>, registry.moved()),
        relay.store.clone(),
        relay.status.clone(),
        relay.metrics.upstream.clone(),
    )
}

fn store_settings(config: &Config) -> StoreSettings {
    let store = &config.store;
    StoreSettings {
        data_dir: config.relay.data_dir.clone(),
        wal_keep_size: store.wal_keep_size,
        tail_bytes_max: store.tail_size,
        unwritten_bytes_max: store.unwritten_size,
        spare_segments: store.spare_segments,
        reserve_segments: store.reserve_segments,
        max_replication_slots: store.max_replication_slots,
        scrub_interval: store.scrub_interval,
        limits: RetentionLimits {
            max_slot_wal_keep_size: store.max_slot_wal_keep_size,
            max_wal_size: store.max_wal_size,
            idle_replication_slot_timeout: store.idle_replication_slot_timeout,
            retain_without_slot: store.retain_without_slot,
            disk_budget: store.disk_budget,
        },
    }
}

/// As configured, as far as the limit of open files allows.
fn downstream_settings(config: &Config) -> Result<DownstreamSettings, TooFewDescriptors> {
    let allowed = descriptors::raise_limit();
    let set_aside = descriptors::set_aside(config.store.spare_segments, config.downstream.listen.len());
    let mut settings = DownstreamSettings::of(config);
    descriptors::fit(&mut settings, allowed, set_aside)?;
    Ok(settings)
}

fn upstream_settings(upstream: &config::Upstream, instance: Instances) -> UpstreamSettings {
    UpstreamSettings {
        instance,
        conninfo: upstream.conninfo.clone(),
        sql_conninfo: upstream.sql_conninfo.clone(),
        patroni: upstream.patroni.clone(),
        slot: upstream.slot.clone(),
        // What is acknowledged may stand still while nothing more is needed from the upstream.
        streams_by_slot: upstream.acknowledge == AcknowledgePolicy::Local
            && upstream.only_copy_time_max.is_none(),
        expect_sync: upstream.expect_sync,
        create_slot: upstream.create_slot,
        slot_wal_keep_max: upstream.slot_wal_keep_max,
        receiver_timeout: upstream.wal_receiver_timeout,
        status_interval: upstream.wal_receiver_status_interval,
        on_divergence: upstream.on_divergence,
        link: LinkSettings {
            mode: upstream.link,
            codecs: upstream.link_codecs.clone(),
            retry_interval: upstream.link_retry_interval,
        },
        retry_interval: upstream.wal_retrieve_retry_interval,
    }
}

/// Waits for both directions to end, then for the last sync.
async fn stop(upstream: JoinHandle<()>, downstream: JoinHandle<()>, store: Store) {
    // A task that panicked has been told of by the panic itself.
    let _ = tokio::join!(upstream, downstream);
    let _ = tokio::task::spawn_blocking(move || store.shutdown()).await;
}

/// Tells the sending side what it must know of the upstream: the flag that clients' `in_hot_standby` comes from, and what
/// no client need wait for.
async fn mirror_upstream(
    mut status: watch::Receiver<UpstreamStatus>,
    flag: Arc<AtomicBool>,
    removed: watch::Sender<Option<RemovedWal>>,
) {
    while status.changed().await.is_ok() {
        let (is_writable, now_removed) = {
            let status = status.borrow_and_update();
            (status.is_writable, status.removed)
        };
        flag.store(is_writable, Ordering::Release);
        removed.send_if_modified(|removed| std::mem::replace(removed, now_removed) != now_removed);
    }
}

fn spawn_upkeep(registry: Arc<Metrics>, shutdown: CancellationToken) {
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = interval.tick() => registry.run_upkeep(),
            }
        }
    });
}

struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn install() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Time in which everything stops after a signal.
const STOP_TIME_MAX: Duration = Duration::from_secs(8);
