//! Towards standbys: listens, lets clients in, and sends them WAL.
//!
//! Owns the listening sockets' loops, the limits on clients, and one task per connection, whose panic ends that
//! connection and nothing else. Each client goes through `handshake`, then `command` answers it until it streams, and then
//! `walsender` moves WAL from the store to its socket. Knows nothing of the upstream: it is given the store, positions to
//! watch, whether the upstream is writable, and what it has removed too early.

mod attempt;
mod authenticate;
mod blocking;
mod command;
mod commands;
mod connection;
mod failures;
mod handshake;
mod link;
mod parameters;
mod refusals;
mod registry;
mod server;
mod settings;
mod strangers;
mod timelines;
mod walsender;

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use tokio::{
    sync::{Semaphore, watch},
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, error, info, info_span, warn};

use crate::access::{Access, MockNonce};
use crate::downstream::{
    attempt::Attempt,
    command::Session,
    connection::{Connection, ConnectionError, Stream},
    failures::Failures,
    handshake::{Handshake, HandshakeError},
    refusals::Refusals,
    server::Server,
    strangers::{Stranger, Strangers},
    walsender::now,
};
use crate::metrics::DownstreamMetrics;
use crate::net::{Listener, Peer, tls::ServerTls};
use crate::protocol::feedback::Feedback;
use crate::protocol::instances::Instances;
use crate::protocol::{ServerError, SqlState, backend::encode_error_response};
use crate::session::feedback::Feedbacks;
use crate::session::sender::STOPPING_TIME_MAX;
use crate::status::{ConsumerStatus, RemovedWal, ReplicationSlotStatus, Timestamp, WalSenderStatus};
use crate::store::{InvalidationReason, Positions, SlotKind, SlotState, Store, WalStatus};
use crate::wal::FullXid;

pub use link::{LinkRates, Links, link_status};
pub use refusals::REFUSALS_MAX;
pub use registry::Registry;
pub use settings::{DownstreamSettings, SendPolicies, SendPolicy};
pub use strangers::STRANGERS_MIN;

/// What every connection shares.
pub struct DownstreamContext {
    /// The WAL.
    pub store: Store,
    /// The store's positions, as they change.
    pub positions: watch::Receiver<Option<Positions>>,
    /// Who is connected.
    pub registry: Arc<Registry>,
    /// What clients are held to.
    pub settings: DownstreamSettings,
    /// Who may connect. May be replaced while clients are connected: it holds for those that come after.
    pub access: ArcSwap<Access>,
    /// What users that do not exist get their salts from: it outlives the process.
    pub mock_nonce: MockNonce,
    /// What TLS is spoken with; `None`: it is not.
    pub tls: Option<Arc<ServerTls>>,
    /// Whether the upstream that is streamed from now is writable.
    pub upstream_writable: Arc<AtomicBool>,
    /// WAL that follows what is held, and that the upstream has removed.
    pub upstream_removed: watch::Receiver<Option<RemovedWal>>,
    /// This relay, and those before it.
    pub instances: watch::Receiver<Instances>,
    /// What compressed links share.
    pub links: Arc<Links>,
    /// What is counted.
    pub metrics: DownstreamMetrics,
    /// Reads from the disk.
    pub cold_reads: ColdReads,
    /// When the relay began to serve.
    pub started: Instant,
}

/// One stream among those that are counted; ends when dropped.
struct Streaming<'a>(&'a DownstreamContext);

impl Feedbacks for DownstreamContext {
    fn smallest(&self) -> Feedback {
        // What was said before it could be checked is checked again: the primary would take nothing of what goes with it.
        let next = self.store.next_xid();
        self.registry.feedback(next).and(self.store.slots().feedback(next))
    }

    fn complete_from(&self) -> Instant {
        self.started + RETURN_TIME
    }
}

impl DownstreamContext {
    /// The sessions, as `pg_stat_replication` shows them.
    pub fn replication(&self) -> Vec<WalSenderStatus> {
        self.registry.statuses()
    }

    /// The slots, as `pg_replication_slots` shows them.
    pub fn replication_slots(&self) -> Vec<ReplicationSlotStatus> {
        let status = |SlotState { slot, wal_status, safe_wal_size }: SlotState| ReplicationSlotStatus {
            temporary: slot.kind != SlotKind::Permanent,
            active: slot.active_pid.is_some(),
            active_pid: slot.active_pid,
            restart_lsn: slot.restart_lsn,
            wal_status: wal_status.map(WalStatus::as_str),
            safe_wal_size,
            inactive_since: slot.inactive_since.map(Timestamp),
            invalidation_reason: slot.invalidation.map(InvalidationReason::as_str),
            xmin: slot.feedback.xmin.map(FullXid::xid),
            catalog_xmin: slot.feedback.catalog_xmin.map(FullXid::xid),
            ..ReplicationSlotStatus::physical(slot.name)
        };
        self.store.slot_states().into_iter().map(status).collect()
    }

    /// Consumers without a slot for which WAL is kept.
    pub fn consumers(&self) -> Vec<ConsumerStatus> {
        let status = |(application_name, restart_lsn, active)| ConsumerStatus {
            application_name,
            active,
            restart_lsn,
        };
        self.store.consumers().into_iter().map(status).collect()
    }

    /// Whether clients are let in: an upstream was heard once, and there is WAL to serve, wherever the upstream is now.
    pub fn can_serve(&self) -> bool {
        let is_held = |oldest| self.store.positions().is_some_and(|positions| oldest < positions.verified);
        Server::of(self).is_some() && self.store.oldest().is_some_and(is_held)
    }

    fn streaming(&self) -> Streaming<'_> {
        self.metrics.streaming.increment(1.0);
        Streaming(self)
    }
}

impl Drop for Streaming<'_> {
    fn drop(&mut self) {
        self.0.metrics.streaming.decrement(1.0);
    }
}

/// The right to read from the disk, of which there is a limited number: streams that are far behind compete for one disk.
#[derive(Clone, Debug)]
pub struct ColdReads(Arc<Semaphore>);

impl Default for ColdReads {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(COLD_READS_MAX)))
    }
}

impl ColdReads {
    fn semaphore(&self) -> Arc<Semaphore> {
        Arc::clone(&self.0)
    }
}

/// Serves clients until `shutdown`, and then until every connection has ended or its time is over.
pub async fn serve(context: Arc<DownstreamContext>, listeners: Vec<Listener>, shutdown: CancellationToken) {
    let DownstreamSettings { unauthenticated_max, unauthenticated_per_address_max, .. } = context.settings;
    let strangers = Arc::new(Strangers::new(unauthenticated_max, unauthenticated_per_address_max));
    let (refusals, failures) = (Arc::new(Refusals::default()), Arc::new(Failures::default()));
    let registry = Arc::clone(&context.registry);
    context.store.slots().terminate_by(move |pid| registry.terminate(pid));
    let mut loops = JoinSet::new();
    for listener in listeners {
        let acceptor = Acceptor {
            context: Arc::clone(&context),
            strangers: Arc::clone(&strangers),
            refusals: Arc::clone(&refusals),
            failures: Arc::clone(&failures),
            shutdown: shutdown.clone(),
        };
        loops.spawn(acceptor.run(listener));
    }
    while let Some(ended) = loops.join_next().await {
        note_panic(ended);
    }
}

/// One listening socket's loop.
struct Acceptor {
    context: Arc<DownstreamContext>,
    strangers: Arc<Strangers>,
    refusals: Arc<Refusals>,
    failures: Arc<Failures>,
    shutdown: CancellationToken,
}

impl Acceptor {
    async fn run(self, listener: Listener) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept(&self.context.settings.tcp) => match accepted {
                    Ok((socket, peer)) => {
                        // Who is at the other end of a Unix socket; where that is not known, nobody is.
                        let user_id = socket.peer_user_id().ok().flatten();
                        self.admit(&mut connections, socket, (peer, user_id));
                    }
                    Err(error) => {
                        // Out of descriptors, most likely: some time may free one.
                        warn!(%error, "could not accept a connection");
                        tokio::time::sleep(ACCEPT_RETRY_INTERVAL).await;
                    }
                },
                Some(ended) = connections.join_next() => note_panic(ended),
                () = self.shutdown.cancelled() => break,
            }
        }
        drop(listener);
        let all_end = async {
            while let Some(ended) = connections.join_next().await {
                note_panic(ended);
            }
        };
        if tokio::time::timeout(CONNECTIONS_END_TIME_MAX, all_end).await.is_err() {
            warn!(connections = connections.len(), "connections did not end in time");
        }
    }

    fn admit<S: Stream>(
        &self,
        connections: &mut JoinSet<()>,
        socket: S,
        (peer, peer_user_id): (Peer, Option<u32>),
    ) {
        self.context.metrics.connections.increment(1);
        let Some(stranger) = self.strangers.admit(&peer) else {
            self.context.metrics.refused.increment(1);
            debug!(%peer, "too many connections that are not authenticated");
            if let Some(place) = self.refusals.place() {
                connections.spawn(async move {
                    refuse(socket).await;
                    drop(place);
                });
            }
            return;
        };
        let span =
            info_span!("client", %peer, user = tracing::field::Empty, application = tracing::field::Empty);
        let guest = Guest {
            peer,
            peer_user_id,
            _stranger: stranger,
            refusals: Arc::clone(&self.refusals),
            failures: Arc::clone(&self.failures),
        };
        let client = serve_client(Arc::clone(&self.context), socket, guest, self.shutdown.clone());
        connections.spawn(client.instrument(span));
    }
}

/// Somebody who was let in as far as the door.
struct Guest {
    peer: Peer,
    /// The operating system's user at the other end of a Unix socket.
    peer_user_id: Option<u32>,
    /// Counted until it goes.
    _stranger: Stranger,
    refusals: Arc<Refusals>,
    failures: Arc<Failures>,
}

impl Guest {
    /// Whether a line about it may be written, and how many like it were left out before.
    fn may_log(&self) -> Option<u64> {
        self.refusals.may_log(&self.peer, now())
    }
}

/// A panic ended one task; the others go on.
fn note_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        error!(%error, "connection ended by a panic");
    }
}

/// There are as many strangers as are allowed: one word, and the door is closed.
async fn refuse<S: Stream>(socket: S) {
    let mut connection = Connection::new(socket);
    let error = ServerError::fatal(SqlState::TOO_MANY_CONNECTIONS, "sorry, too many clients already");
    connection.outgoing.encode(|out| encode_error_response(&error, out));
    // The client may be gone, and is not waited for.
    let _ = tokio::time::timeout(REFUSAL_TIME_MAX, connection.flush()).await;
}

/// One client, from its first byte to its last.
async fn serve_client<S: Stream>(
    context: Arc<DownstreamContext>,
    socket: S,
    guest: Guest,
    stop: CancellationToken,
) {
    let mut connection = Connection::new(socket);
    let mut attempt = Attempt::default();
    let handshake = Handshake {
        context: &context,
        connection: &mut connection,
        peer: &guest.peer,
        peer_user_id: guest.peer_user_id,
        attempt: &mut attempt,
    };
    let outcome = tokio::select! {
        outcome = tokio::time::timeout(context.settings.authentication_timeout, handshake.run()) => outcome,
        () = stop.cancelled() => return,
    };
    let established = match outcome {
        Ok(Ok(established)) => established,
        // A stranger to the end, which may take a while.
        Ok(Err(error)) => {
            let ending = Ending { context: &context, connection, guest: &guest, attempt: &attempt };
            return ending.run(error, &stop).await;
        }
        Err(_elapsed) => {
            context.metrics.refused.increment(1);
            guest.failures.timed_out(&guest.peer, now());
            if let Some(left_out) = guest.may_log() {
                attempt.timed_out(left_out);
            }
            return;
        }
    };
    drop(guest);
    let span = tracing::Span::current();
    let client = established.registration.client();
    span.record("user", tracing::field::debug(&client.user));
    span.record("application", tracing::field::display(&client.application_name));
    attempt.accepted(established.registration.pid(), established.version);
    match Session::new(&context, connection, established, &stop).run().await {
        Ok(end) => info!(?end, "client disconnected"),
        Err(error) => info!(error = &error as &dyn std::error::Error, "connection to client failed"),
    }
}
/// A handshake that led to no session, and what is left to be said.
struct Ending<'a, S> {
    context: &'a DownstreamContext,
    connection: Connection<S>,
    guest: &'a Guest,
    attempt: &'a Attempt,
}

impl<S: Stream> Ending<'_, S> {
    async fn run(mut self, error: HandshakeError, stop: &CancellationToken) {
        match &error {
            HandshakeError::Cancel | HandshakeError::Connection(ConnectionError::Closed) => {
                debug!(%error, "connection ended before a session");
                return;
            }
            HandshakeError::Refused(told) => self.tell(told).await,
            HandshakeError::Denied { user, told } => {
                self.context.metrics.failed_logins.increment(1);
                let delay = self.guest.failures.denied(&self.guest.peer, user, now());
                tokio::select! {
                    () = tokio::time::sleep(delay) => {}
                    () = stop.cancelled() => return,
                }
                self.tell(told).await;
            }
            HandshakeError::DirectTls
            | HandshakeError::Tls(_)
            | HandshakeError::Random
            | HandshakeError::Connection(_) => {
                self.context.metrics.refused.increment(1);
                if let Some(left_out) = self.guest.may_log() {
                    info!(error = &error as &dyn std::error::Error, left_out, "handshake failed");
                }
            }
        }
        let _ = tokio::time::timeout(REFUSAL_TIME_MAX, self.connection.shutdown()).await;
    }

    /// Says why, to the client and in the log.
    async fn tell(&mut self, told: &ServerError) {
        self.context.metrics.refused.increment(1);
        if let Some(left_out) = self.guest.may_log() {
            self.attempt.refused(told, left_out);
        }
        self.connection.outgoing.encode(|out| encode_error_response(told, out));
        // The client may be gone, and is not waited for.
        let _ = tokio::time::timeout(REFUSAL_TIME_MAX, self.connection.flush()).await;
    }
}

/// Time in which standbys are back after a restart and have told what they hold back, with `wal_retrieve_retry_interval` and
/// `wal_receiver_status_interval` at their defaults.
const RETURN_TIME: Duration = Duration::from_secs(15);
/// Reads from the disk at a time, over all streams.
pub const COLD_READS_MAX: usize = 4;
/// Pause after a failed accept.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Time a client has to take a refusal.
const REFUSAL_TIME_MAX: Duration = Duration::from_secs(1);
/// Time all connections have to end when the relay stops: each has [`STOPPING_TIME_MAX`] to take what there is, and again
/// to take the last words.
const CONNECTIONS_END_TIME_MAX: Duration = Duration::from_secs(3);

const _: () = assert!(CONNECTIONS_END_TIME_MAX.as_secs() > 2 * STOPPING_TIME_MAX.as_secs());
