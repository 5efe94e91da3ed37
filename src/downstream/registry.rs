//! Who is connected.
//!
//! Owns the list of sessions that got past authentication, and their numbers: unique among the living and never zero,
//! because clients name temporary slots after them. A session is in the list as long as its guard lives; a guard removes
//! only its own entry, however late it goes, because a standby that reconnects may be there again already.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::downstream::link::link_status;
use crate::downstream::walsender::now;
use crate::metrics::LinkTraffic;
use crate::net::Peer;
use crate::protocol::feedback::Feedback;
use crate::protocol::frontend::{CancelKey, CancelRequest};
use crate::session::acknowledge::{Standby, Standbys};
use crate::session::sender::Progress;
use crate::status::{Seconds, Timestamp, WalSenderState, WalSenderStatus};
use crate::wal::{FullXid, Lsn, PgTimestamp, TimelineId};

/// The sessions of all listeners.
#[derive(Debug, Default)]
pub struct Registry {
    sessions: Mutex<Sessions>,
    /// Marked when a session has flushed or applied more, holds back something else, or has gone.
    moved: watch::Sender<()>,
    /// User that must be behind a name for its positions to count; everybody for names that are not here.
    acknowledge_users: BTreeMap<String, String>,
}

#[derive(Debug, Default)]
struct Sessions {
    by_pid: BTreeMap<u32, Arc<Session>>,
    last_pid: u32,
    last_generation: u64,
}

/// A session as others see it.
#[derive(Debug)]
struct Session {
    generation: u64,
    client: Client,
    backend_start: PgTimestamp,
    cancel_key: CancelKey,
    cancel: Notify,
    /// Canceled when the session must end.
    terminate: CancellationToken,
    live: Mutex<Live>,
}

/// Who a session belongs to.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) user: String,
    pub(super) application_name: String,
    pub(super) peer: Peer,
}

/// What changes in the life of a session.
#[derive(Clone, Debug)]
pub(super) struct Live {
    pub(super) state: WalSenderState,
    pub(super) timeline: Option<TimelineId>,
    pub(super) slot_name: Option<String>,
    /// What it carries, where WAL goes compressed.
    pub(super) link: Option<Arc<LinkTraffic>>,
    pub(super) progress: Progress,
    pub(super) reply_time: Option<PgTimestamp>,
    /// What its queries hold back; a slot's is kept by the slot.
    pub(super) feedback: Feedback,
    /// What was said of that last.
    pub(super) said: Feedback,
}

impl Live {
    /// What counts upstream.
    fn told(&self) -> (WalSenderState, Option<TimelineId>, Option<Lsn>, Option<Lsn>, Feedback) {
        (self.state, self.timeline, self.progress.flush, self.progress.apply, self.said)
    }

    fn idle() -> Self {
        Self {
            state: WalSenderState::Startup,
            timeline: None,
            slot_name: None,
            link: None,
            progress: Progress::default(),
            reply_time: None,
            feedback: Feedback::default(),
            said: Feedback::default(),
        }
    }
}

/// How many sessions there may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct SessionLimits {
    /// In all.
    pub(super) in_all: usize,
    /// Of the user who wants one more; `None`: any number.
    pub(super) of_user: Option<usize>,
}

/// As many sessions as are allowed are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TooManySessions {
    /// In all.
    InAll,
    /// Of this user.
    OfUser,
}

impl Standbys for Registry {
    fn show(&self, timeline: TimelineId, to: &mut dyn FnMut(&[Standby<'_>])) {
        let mut sessions: Vec<_> = self.sessions.lock().by_pid.values().map(Arc::clone).collect();
        sessions.sort_by_key(|session| session.generation);
        let counts = |session: &&Arc<Session>| {
            let client = &session.client;
            let wanted = self.acknowledge_users.get(&client.application_name.to_ascii_lowercase());
            wanted.is_none_or(|user| *user == client.user)
        };
        let standby = |session| Session::standby(session, timeline);
        to(&sessions.iter().filter(counts).filter_map(standby).collect::<Vec<_>>());
    }
}

impl Registry {
    /// Nobody is connected. `acknowledge_users` says who must be behind a name for what it reports to count.
    pub fn new(acknowledge_users: &BTreeMap<String, String>) -> Self {
        let lower = |(name, user): (&String, &String)| (name.to_ascii_lowercase(), user.clone());
        Self { acknowledge_users: acknowledge_users.iter().map(lower).collect(), ..Self::default() }
    }

    /// Marked when standbys have flushed or applied more, hold back something else, or have gone.
    pub fn moved(&self) -> watch::Receiver<()> {
        self.moved.subscribe()
    }

    /// The smallest of what the sessions' standbys hold back, but for what cannot be true when `next` is given out next.
    pub(super) fn feedback(&self, next: Option<FullXid>) -> Feedback {
        let sessions = self.sessions.lock();
        let all = sessions.by_pid.values().map(|session| session.live.lock().feedback);
        all.filter(|held_back| held_back.is_plausible(next)).fold(Feedback::default(), Feedback::and)
    }

    /// Adds a session. The key must be secret: who knows it may cancel the session's command.
    pub(super) fn register(
        self: &Arc<Self>,
        client: Client,
        cancel_key: CancelKey,
        limits: SessionLimits,
    ) -> Result<Registration, TooManySessions> {
        let mut sessions = self.sessions.lock();
        if sessions.by_pid.len() >= limits.in_all {
            return Err(TooManySessions::InAll);
        }
        let is_his = |session: &&Arc<Session>| session.client.user == client.user;
        if limits.of_user.is_some_and(|limit| sessions.by_pid.values().filter(is_his).count() >= limit) {
            return Err(TooManySessions::OfUser);
        }
        let pid = sessions.free_pid();
        sessions.last_pid = pid;
        sessions.last_generation += 1;
        let session = Arc::new(Session {
            generation: sessions.last_generation,
            client,
            backend_start: PgTimestamp::from_system_time(SystemTime::now()),
            cancel_key,
            cancel: Notify::new(),
            terminate: CancellationToken::new(),
            live: Mutex::new(Live::idle()),
        });
        sessions.by_pid.insert(pid, Arc::clone(&session));
        Ok(Registration { registry: Arc::clone(self), pid, session })
    }

    /// Cancels the command that a request names, if its key is right. Says nothing, to nobody.
    pub(super) fn cancel(&self, request: &CancelRequest) {
        let session = self.sessions.lock().by_pid.get(&request.process_id).cloned();
        if let Some(session) = session
            && session.cancel_key == request.key
        {
            session.cancel.notify_waiters();
        }
    }

    /// Ends a session, whatever it does.
    pub fn terminate(&self, pid: u32) {
        if let Some(session) = self.sessions.lock().by_pid.get(&pid) {
            session.terminate.cancel();
        }
    }

    /// All sessions, as `pg_stat_replication` shows them.
    pub fn statuses(&self) -> Vec<WalSenderStatus> {
        let sessions: Vec<_> =
            self.sessions.lock().by_pid.iter().map(|(pid, session)| (*pid, Arc::clone(session))).collect();
        sessions.into_iter().map(|(pid, session)| session.status(pid)).collect()
    }

    /// How many sessions there are.
    pub fn len(&self) -> usize {
        self.sessions.lock().by_pid.len()
    }

    /// Whether nobody is connected.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Sessions {
    /// The next number that no living session has. There are far more numbers than sessions.
    fn free_pid(&self) -> u32 {
        let mut pid = self.last_pid;
        loop {
            pid = if pid >= PID_MAX { 1 } else { pid + 1 };
            if !self.by_pid.contains_key(&pid) {
                return pid;
            }
        }
    }
}

impl Session {
    /// What it says of itself, if it streams on `timeline`.
    fn standby(self: &Arc<Self>, timeline: TimelineId) -> Option<Standby<'_>> {
        let live = self.live.lock();
        let is_streaming = matches!(live.state, WalSenderState::Streaming | WalSenderState::Stopping);
        (is_streaming && live.timeline == Some(timeline)).then(|| Standby {
            name: &self.client.application_name,
            flush: live.progress.flush,
            apply: live.progress.apply,
        })
    }

    fn status(&self, pid: u32) -> WalSenderStatus {
        let live = self.live.lock().clone();
        let (client_addr, client_port) = match self.client.peer {
            Peer::Tcp(address) => (Some(address.ip()), Some(address.port())),
            Peer::Unix => (None, None),
        };
        let seconds = |lag: Option<Duration>| lag.map(Seconds);
        WalSenderStatus {
            pid,
            usename: self.client.user.clone(),
            application_name: self.client.application_name.clone(),
            client_addr,
            client_port,
            backend_start: Timestamp(self.backend_start),
            state: live.state,
            timeline: live.timeline,
            slot_name: live.slot_name,
            sent_lsn: live.progress.sent,
            write_lsn: live.progress.write,
            flush_lsn: live.progress.flush,
            replay_lsn: live.progress.apply,
            write_lag: seconds(live.progress.write_lag),
            flush_lag: seconds(live.progress.flush_lag),
            replay_lag: seconds(live.progress.replay_lag),
            reply_time: live.reply_time.map(Timestamp),
            link: live.link.and_then(|traffic| link_status(&traffic, now())),
            backend_xmin: live.feedback.smaller().map(FullXid::xid),
        }
    }
}

/// A session's place in the list.
#[derive(Debug)]
pub(super) struct Registration {
    registry: Arc<Registry>,
    pid: u32,
    session: Arc<Session>,
}

impl Registration {
    /// The session's number.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn client(&self) -> &Client {
        &self.session.client
    }

    pub(super) fn cancel_key(&self) -> &CancelKey {
        &self.session.cancel_key
    }

    /// Changes what others see.
    pub(super) fn update(&self, change: impl FnOnce(&mut Live)) {
        let has_moved = {
            let mut live = self.session.live.lock();
            let before = live.told();
            change(&mut live);
            live.told() != before
        };
        if has_moved {
            self.registry.moved.send_replace(());
        }
    }

    /// The stream is over: the session is as it was before.
    pub(super) fn reset(&self) {
        // As a walsender, whose horizon stays until it disconnects.
        self.update(|live| *live = Live { feedback: live.feedback, said: live.said, ..Live::idle() });
    }

    /// Comes back when the session's command is canceled after this was first polled. Cancel-safe.
    pub(super) fn canceled(&self) -> impl Future<Output = ()> + '_ {
        self.session.cancel.notified()
    }
}

impl Registration {
    /// Comes back when the session must end. Cancel-safe.
    pub(super) fn terminated(&self) -> impl Future<Output = ()> + '_ {
        self.session.terminate.cancelled()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut sessions = self.registry.sessions.lock();
        let is_mine = sessions
            .by_pid
            .get(&self.pid)
            .is_some_and(|session| session.generation == self.session.generation);
        if is_mine {
            sessions.by_pid.remove(&self.pid);
        }
        drop(sessions);
        self.registry.moved.send_replace(());
    }
}

/// Process ids are positive 32-bit integers to clients.
const PID_MAX: u32 = i32::MAX.unsigned_abs();

#[cfg(test)]
mod tests {
    use super::*;

    fn client(name: &str) -> Client {
        Client { user: "u".to_owned(), application_name: name.to_owned(), peer: Peer::Unix }
    }

    fn limits(in_all: usize) -> SessionLimits {
        SessionLimits { in_all, of_user: None }
    }

    fn key(byte: u8) -> CancelKey {
        CancelKey::new(vec![byte; 4]).unwrap()
    }

    #[test]
    fn numbers_are_unique_among_the_living_and_never_zero() {
        let registry = Arc::new(Registry::default());
        registry.sessions.lock().last_pid = PID_MAX - 1;
        let first = registry.register(client("a"), key(1), limits(9)).unwrap();
        let second = registry.register(client("a"), key(1), limits(9)).unwrap();
        registry.sessions.lock().last_pid = PID_MAX;
        let third = registry.register(client("a"), key(1), limits(9)).unwrap();
        assert_eq!([first.pid(), second.pid(), third.pid()], [PID_MAX, 1, 2]);
    }

    #[test]
    fn a_users_own_limit_is_about_his_sessions_alone() {
        let registry = Arc::new(Registry::default());
        let limits = SessionLimits { in_all: 9, of_user: Some(1) };
        let first = registry.register(client("a"), key(1), limits).unwrap();
        assert_eq!(registry.register(client("b"), key(1), limits).unwrap_err(), TooManySessions::OfUser);
        let other = Client { user: "other".to_owned(), ..client("b") };
        assert!(registry.register(other, key(1), limits).is_ok());
        drop(first);
        assert!(registry.register(client("b"), key(1), limits).is_ok());
        let none = SessionLimits { in_all: 9, of_user: Some(0) };
        assert_eq!(registry.register(client("b"), key(1), none).unwrap_err(), TooManySessions::OfUser);
    }

    #[test]
    fn the_limit_holds_and_a_session_that_ends_makes_room() {
        let registry = Arc::new(Registry::default());
        let first = registry.register(client("a"), key(1), limits(1)).unwrap();
        assert_eq!(registry.register(client("b"), key(1), limits(1)).unwrap_err(), TooManySessions::InAll);
        drop(first);
        assert!(registry.is_empty());
        assert!(registry.register(client("b"), key(1), limits(1)).is_ok());
    }

    #[test]
    fn a_late_end_does_not_remove_the_successor() {
        let registry = Arc::new(Registry::default());
        let old = registry.register(client("a"), key(1), limits(9)).unwrap();
        registry.sessions.lock().by_pid.clear();
        registry.sessions.lock().last_pid = 0;
        let new = registry.register(client("a"), key(2), limits(9)).unwrap();
        assert_eq!(old.pid(), new.pid());
        drop(old);
        assert_eq!(registry.len(), 1);
    }

    #[tokio::test]
    async fn only_the_right_key_cancels() {
        let registry = Arc::new(Registry::default());
        let session = registry.register(client("a"), key(1), limits(9)).unwrap();
        let mut canceled = Box::pin(session.canceled());
        assert!(futures_poll(&mut canceled).is_pending());
        registry.cancel(&CancelRequest { process_id: session.pid(), key: key(2) });
        registry.cancel(&CancelRequest { process_id: 999, key: key(1) });
        assert!(futures_poll(&mut canceled).is_pending());
        registry.cancel(&CancelRequest { process_id: session.pid(), key: key(1) });
        canceled.await;
    }

    fn futures_poll(future: &mut std::pin::Pin<Box<impl Future<Output = ()>>>) -> std::task::Poll<()> {
        future.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
    }

    /// What is shown of those who stream on `timeline`: name and flush.
    fn shown(registry: &Registry, timeline: u32) -> Vec<(String, u64)> {
        let mut shown = Vec::new();
        registry.show(TimelineId::new(timeline).unwrap(), &mut |standbys| {
            shown = standbys
                .iter()
                .map(|standby| (standby.name.to_owned(), standby.flush.map_or(0, Lsn::get)))
                .collect();
        });
        shown
    }

    #[test]
    fn only_those_count_that_stream_on_the_timeline_as_the_user_that_is_bound_to_the_name() {
        let users = BTreeMap::from([("Bound".to_owned(), "u".to_owned())]);
        let registry = Arc::new(Registry::new(&users));
        let join = |name: &str, user: &str, state, timeline: u32, flush| {
            let client = Client { user: user.to_owned(), ..client(name) };
            let session = registry.register(client, key(1), limits(9)).unwrap();
            session.update(|live| {
                (live.state, live.timeline) = (state, TimelineId::new(timeline));
                live.progress.flush = Lsn::new(flush);
            });
            session
        };
        let streaming = WalSenderState::Streaming;
        let sessions = [
            join("old", "u", streaming, 1, 900),
            join("new", "u", streaming, 2, 10),
            join("stopping", "u", WalSenderState::Stopping, 2, 20),
            join("catchup", "u", WalSenderState::Catchup, 2, 30),
            join("startup", "u", WalSenderState::Startup, 2, 40),
            join("BOUND", "u", streaming, 2, 50),
            join("bound", "impostor", streaming, 2, 60),
        ];
        let told = |name: &str, flush| (name.to_owned(), flush);
        assert_eq!(shown(&registry, 1), [told("old", 900)]);
        assert_eq!(shown(&registry, 2), [told("new", 10), told("stopping", 20), told("BOUND", 50)]);
        assert_eq!(shown(&registry, 3), []);
        // It has come over.
        sessions[0].update(|live| live.timeline = TimelineId::new(2));
        assert_eq!(shown(&registry, 2)[0], told("old", 900));
        drop(sessions);
        assert_eq!(shown(&registry, 2), []);
    }
}
