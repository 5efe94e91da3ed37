//! Towards the primary, or the relay before us.
//!
//! Owns the one upstream connection: connects, checks, streams, reports, and connects again. Is the only user of the
//! store's writer. Knows nothing of standbys.

mod acknowledging;
mod authenticate;
mod backoff;
mod blocking;
mod connect;
mod course;
mod dial;
mod dialog;
mod encryption;
mod error;
mod facts;
mod fencing;
mod follow;
mod histories;
mod judge;
mod link;
#[cfg(test)]
mod link_tests;
mod local_windows;
mod looking;
mod losses;
mod patroni;
mod remembering;
mod repair;
mod repair_schedule;
mod reports;
mod retained;
mod seen;
mod slot;
mod slot_advance;
mod slot_cost;
mod slot_memory;
mod slot_use;
mod synchronous;
mod taking;
#[cfg(test)]
mod tests;
mod unfollowed;
mod walreceiver;

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

pub use acknowledging::Acknowledging;
pub use error::{Advice, UpstreamError};
pub use fencing::{FENCE_TIME_MAX, FenceError, FenceSwitch, Fencing, fence_status};
pub use link::{LinkMode, LinkSettings};

use crate::config::PatroniUrl;
use crate::conninfo::Conninfo;
use crate::metrics::{LinkMetrics, LinkTraffic, UpstreamMetrics, bytes_value};
use crate::protocol::instances::Instances;
use crate::session::feedback::Feedbacks;
use crate::session::receiver::ReceiverSettings;
use crate::status::{LostWal, RemovedWal, UpstreamStatus, WalReceiverState};
use crate::store::{BlockId, Condition, Positions, ResumePlan, Store, WalWriter};
use crate::upstream::connect::{Beginning, Connected, Order, StreamPlan};
use crate::upstream::course::Course;
use crate::upstream::dialog::{Dialog, Introduction};
use crate::upstream::histories::NewestHistory;
use crate::upstream::link::LinkTerms;
use crate::upstream::retained::{Retained, SlotMover};
use crate::upstream::slot_use::SlotBeside;
use crate::upstream::walreceiver::{StreamContext, StreamEnd, Streamed, WalReceiver};
use crate::wal::{Lsn, SegmentNo};

/// How the upstream is reached and treated.
#[derive(Clone, Debug)]
pub struct UpstreamSettings {
    /// Where and as whom to connect.
    pub conninfo: Conninfo,
    /// The same for SQL, on the same servers.
    pub sql_conninfo: Conninfo,
    /// Who is asked which server leads.
    pub patroni: Vec<PatroniUrl>,
    /// Slot on the upstream.
    pub slot: Option<String>,
    /// Whether WAL is streamed by the slot, so that what is acknowledged moves it; else it is moved by what is durable here,
    /// but at a relay, which has no SQL for that.
    pub streams_by_slot: bool,
    /// Whether an absent slot is created.
    pub create_slot: bool,
    /// Whether the primary is expected to wait for this relay.
    pub expect_sync: bool,
    /// WAL that the slot may make the upstream keep while none is taken here; `None`: any amount.
    pub slot_wal_keep_max: Option<u64>,
    /// `wal_receiver_timeout`; `None` waits for ever.
    pub receiver_timeout: Option<Duration>,
    /// `wal_receiver_status_interval`; `None`: only when asked, or when a position moves.
    pub status_interval: Option<Duration>,
    /// Whether WAL comes compressed from a relay.
    pub link: LinkSettings,
    /// This relay, as it tells those behind it.
    pub instance: Instances,
    /// What to do when what is held goes beyond the fork of a new timeline.
    pub on_divergence: OnDivergence,
    /// Longest delay between attempts (`wal_retrieve_retry_interval`).
    pub retry_interval: Duration,
}

pub use crate::config::OnDivergence;

/// What the upstream task works with.
pub struct Upstream {
    /// Settings.
    pub settings: UpstreamSettings,
    /// The store.
    pub store: Store,
    /// The store's writing end.
    pub writer: WalWriter,
    /// Positions of the store.
    pub positions: watch::Receiver<Option<Positions>>,
    /// Condition of the store.
    pub condition: watch::Receiver<Condition>,
    /// Marked when the store has found a damaged segment, or one is whole again.
    pub damage: watch::Receiver<()>,
    /// By whose flush WAL is acknowledged.
    pub acknowledging: Acknowledging,
    /// What standbys hold back; `None`: nothing is told of it.
    pub feedbacks: Option<Arc<dyn Feedbacks>>,
    /// Where the status is published.
    pub status: watch::Sender<UpstreamStatus>,
    /// Metrics.
    pub metrics: UpstreamMetrics,
    /// Those of links.
    pub link_metrics: LinkMetrics,
    /// What the link from the relay before us carries.
    pub link_traffic: Arc<LinkTraffic>,
    /// This relay, and those before it, as far as they are known.
    pub instances: watch::Sender<Instances>,
    /// Whether the upstream is to be left alone.
    pub fencing: Fencing,
    /// Ends the task.
    pub shutdown: CancellationToken,
}

impl Upstream {
    /// Runs until shutdown. Errors end sessions, not this task.
    pub async fn run(mut self) {
        let (watch, reports) = (self.expectation().watch(), self.watch_reports());
        tokio::select! {
            () = self.follow_until_stopped() => {}
            // Only to be heard meanwhile.
            () = watch => {}
            () = reports => {}
        }
        self.status.send_modify(|status| status.state = WalReceiverState::Stopped);
    }

    async fn follow_until_stopped(&mut self) {
        let mut course = Course::new(self.settings.retry_interval, &self.store);
        self.tell_lost(course.losses.lost());
        fencing::show(&self.store, &self.status, &self.metrics);
        while !self.shutdown.is_cancelled() {
            if self.fencing.is_wanted() {
                self.stay_fenced().await;
                course.backoff.reset();
                continue;
            }
            let leave = self.shutdown.child_token();
            let watch = self.fencing.watch(leave.clone());
            tokio::select! {
                () = self.attempt(&mut course, &leave) => {}
                // Only to be heard meanwhile.
                () = watch => {}
            }
        }
    }

    /// One session, and the pause behind it; `leave` ends both.
    async fn attempt(&mut self, course: &mut Course, leave: &CancellationToken) {
        self.wait_for_room(course, leave).await;
        let started = Instant::now();
        let outcome = self.session(course, leave).await;
        self.metrics.streaming.set(0.0);
        if started.elapsed() >= GOOD_SESSION_TIME_MIN {
            course.backoff.reset();
        }
        let delay = self.judge(outcome, course);
        tokio::select! {
            () = leave.cancelled() => {}
            () = self.rest(course, delay) => {}
        }
    }

    /// The pause between attempts: what slots of ours do at servers that are not followed is looked after meanwhile.
    async fn rest(&self, course: &mut Course, delay: Duration) {
        let pause = tokio::time::sleep(delay);
        self.drop_slot_made_in_vain(course).await;
        let servers = course.unfollowed.servers(Instant::now());
        // To its end, however short the pause is, or it might never come to that.
        self.watch_slot(&mut course.slot_watch, &servers).await;
        tokio::select! {
            () = pause => {}
            () = self.keep_watching_slot(&mut course.slot_watch, &servers) => {}
        }
    }

    /// While the store can take nothing, a connection would only make the primary wait.
    async fn wait_for_room(&self, course: &mut Course, leave: &CancellationToken) {
        if self.writer.has_room() {
            return;
        }
        let (mut positions, mut condition) = (self.positions.clone(), self.condition.clone());
        let servers = self.all_servers();
        let room = async {
            while !self.writer.has_room() {
                tokio::select! {
                    _ = positions.changed() => {}
                    _ = condition.changed() => {}
                    () = tokio::time::sleep(ROOM_CHECK_INTERVAL) => {}
                }
            }
        };
        tokio::select! {
            () = leave.cancelled() => {}
            () = room => {}
            () = self.keep_watching_slot(&mut course.slot_watch, &servers) => {}
        }
    }

    /// One connection, from dialling to its end; over as many timelines as the server goes through.
    async fn session(
        &mut self,
        course: &mut Course,
        leave: &CancellationToken,
    ) -> Result<StreamEnd, UpstreamError> {
        self.status.send_modify(|status| status.state = WalReceiverState::Connecting);
        let mut resumed = None;
        loop {
            let streamed = self.stream(course, resumed.take(), leave).await?;
            course.block = BlockId(streamed.block.0 + 1);
            match streamed.dialog {
                Some(dialog) => {
                    course.ended = self.writer.plan().map(|plan| (plan.timeline, plan.held_end));
                    resumed = Some(dialog);
                }
                None => return streamed.outcome,
            }
        }
    }

    /// One stream, by a new connection or one that has served before.
    async fn stream(
        &mut self,
        course: &mut Course,
        resumed: Option<Dialog>,
        leave: &CancellationToken,
    ) -> Result<Streamed, UpstreamError> {
        course.on_link = false;
        let opening = self.open(course, resumed);
        let opened = tokio::select! {
            () = leave.cancelled() => return Ok(Streamed::stop_requested(course.block)),
            opened = opening => opened?,
        };
        self.metrics.streaming.set(1.0);
        self.metrics.sessions.increment(1);
        course.note_streaming(opened.link.is_some());
        let SlotBeside { durable, made, run: advance } =
            self.slot_beside(&opened, course.remembering.clone());
        let server = opened.host.clone();
        let _repairs = self.repair_beside(&opened);
        let looking = self.look_beside(&opened);
        let context = StreamContext {
            writer: &mut self.writer,
            positions: self.positions.clone(),
            condition: self.condition.clone(),
            acknowledging: &mut self.acknowledging,
            feedbacks: self.feedbacks.clone(),
            durable,
            status: &self.status,
            metrics: &self.metrics,
            link_metrics: &self.link_metrics,
            link_traffic: &self.link_traffic,
            shutdown: self.shutdown.clone(),
            leave: leave.clone(),
        };
        let stream = WalReceiver::new(context, opened).run();
        let streamed = tokio::select! {
            streamed = stream => Ok(streamed),
            // Only to be dropped with the stream.
            () = advance => Ok(Streamed::stop_requested(course.block)),
            error = looking => Err(error),
        };
        if let Some(kept_from) = made.take() {
            course.slots.note_made(&server, self.held_end(), kept_from);
        }
        streamed
    }

    /// End of what is held; `None` before a first start.
    fn held_end(&self) -> Option<Lsn> {
        self.writer.plan().map(|plan| plan.held_end)
    }

    async fn open(&mut self, course: &mut Course, resumed: Option<Dialog>) -> Result<Opened, UpstreamError> {
        let (settings, store, writer) = (&self.settings, &self.store, &self.writer);
        let mut set_aside = Vec::new();
        let (outcome, asked) = match (resumed, course.host.clone()) {
            (Some(dialog), Some(host)) => {
                (connect::ask_again(dialog, &host, settings, store, writer).await, Some(host))
            }
            _ => {
                let link = settings.link.wish(course);
                let order = Order {
                    random: random(),
                    avoid: course.avoid.take(),
                    link,
                    unnamed_leader: Some(&mut course.unnamed_leader),
                    set_aside: Some(&mut set_aside),
                };
                (connect::connect(settings, store, writer, order).await, None)
            }
        };
        let reached = outcome.as_ref().ok().map(|(connected, _)| connected.host.clone());
        course.unfollowed.note_asked(Instant::now(), &set_aside, reached.or(asked));
        let (connected, newest) = outcome?;
        let opening = timeout(connect::OPENING_TIME_MAX, self.open_stream(connected, newest, course)).await;
        opening.map_err(|_| UpstreamError::OpeningTimeout)?
    }

    async fn open_stream(
        &mut self,
        mut connected: Connected,
        newest: NewestHistory,
        course: &mut Course,
    ) -> Result<Opened, UpstreamError> {
        let upstream_end = connected.system.flushed;
        course.upstream_end = Some(upstream_end);
        let history = newest.history.clone();
        histories::store_missing(&mut connected, &self.store, newest).await?;
        self.follow(&history, course)?;
        let slot = self.slot(&mut connected, course).await?;
        self.free_slot_of_feedback(&mut connected, slot, course).await?;
        let (store, writer) = (&self.store, &mut self.writer);
        let planned = connect::plan_stream(&connected, store, writer, slot, course.beginning)?;
        course.replaces = course.replaces.or(planned.replaces);
        course.beginning = Beginning::AsPlanned;
        let plan = planned.resume;
        let durable = self.store.positions().map_or(plan.held_end, |positions| positions.flushed);
        // What was acknowledged before an empty store was begun is told as that.
        let told = planned.lost.filter(|to| Some(*to) > course.replaces);
        let lost = course.losses.begin(durable, told);
        course.remember(Some(plan.held_end));
        let refused = course.refused.take().filter(|(held_end, _)| *held_end == plan.held_end);
        let start = match refused {
            Some((_, start)) => plan.start_after(Some(start)).unwrap_or(plan.start),
            None => self.wider_start(&plan, course.corrupt_times(plan.held_end)),
        };
        if let Some(unproven) = plan.unproven.filter(|unproven| *unproven < start) {
            tracing::warn!(%unproven, %start, "the upstream has no WAL any more to compare with some that a crash may have torn");
        }
        course.fallback_after = plan.start_after(Some(start)).map(|_| start);
        course.held_end = Some(plan.held_end);
        looking::hear_instances(&connected.dialog.introduction, &self.instances, &connected.host)?;
        let (host, is_writable) = (connected.host.clone(), connected.is_writable);
        let introduction = connected.dialog.introduction.clone();
        let terms = |link| LinkTerms::new(link, connected.system.system_id, plan.timeline, &self.store);
        let accepted = introduction.link.zip(self.settings.link.offer());
        let link = accepted.map(terms).transpose()?;
        let mover = slot_use::mover(&self.settings, &introduction);
        let retained = self.settings.slot.as_ref().map(|_| {
            let retained = Retained::new(slot.restart_lsn, upstream_end, mover, self.metrics.clone());
            Arc::new(retained)
        });
        let may_hold_back = slot_use::may_hold_back(course, &host, slot.origin);
        let is_slot_holding_back = retained.is_some() && mover == SlotMover::Reports && may_hold_back;
        let status_interval = status_interval(&self.settings, connected.sender_timeout);
        let streaming =
            connect::start_streaming(connected, &plan, start, &self.settings, course.block).await?;
        course.block = BlockId(course.block.0 + 1);
        self.writer.begin(streaming.start)?;
        tracing::info!(%host, start = %streaming.start, timeline = %plan.timeline, held_end = %plan.held_end, "started streaming WAL from upstream");
        self.tell_streaming(&planned, lost, course, is_writable);
        let receiver_timeout = self.settings.receiver_timeout;
        let settings = ReceiverSettings { receiver_timeout, status_interval };
        Ok(Opened {
            streaming,
            host,
            introduction,
            settings,
            lost,
            retained,
            link,
            link_due: course.link_due,
            is_slot_holding_back,
        })
    }

    /// Logs what is wrong although WAL flows, and publishes the state.
    fn tell_streaming(
        &self,
        planned: &StreamPlan,
        lost: Option<LostWal>,
        course: &Course,
        is_writable: bool,
    ) {
        match lost {
            Some(LostWal { from, to }) if planned.lost == Some(to) => tracing::error!(
                slot_restart_lsn = %to, held_end = %from,
                "the upstream's slot is ahead of this relay: WAL that was acknowledged has been lost here"
            ),
            Some(LostWal { from, to }) => tracing::error!(
                acknowledged = %to, held_end = %from,
                "WAL that was acknowledged and has been lost here is not back yet, whatever the upstream's slot says now"
            ),
            None => {}
        }
        if let Some(slot_restart_lsn) = planned.replaces {
            tracing::warn!(
                %slot_restart_lsn,
                "the data directory is empty, but the slot on the upstream keeps WAL already: if this relay has run before, its \
                 directory was lost or is not mounted; if the slot was only made for it beforehand, nothing is wrong, and this \
                 is told no more once the relay is started again"
            );
        }
        self.tell_lost(lost);
        self.status.send_modify(|status| {
            status.state = WalReceiverState::Streaming;
            if status.host != course.host {
                // What another server thought of us.
                (status.sync_state, status.namesakes) = (None, None);
            }
            status.host.clone_from(&course.host);
            status.timeline = Some(planned.resume.timeline);
            status.is_writable = is_writable;
            status.sessions += 1;
            status.started_empty = course.replaces.is_some();
            status.cannot_follow = false;
            // Also what was removed: a server lets a stream begin before it looks for the WAL.
            status.needs_attention = status.is_hurt();
            self.metrics.needs_attention.set(f64::from(u8::from(status.needs_attention)));
        });
    }

    /// Publishes what is lost.
    fn tell_lost(&self, lost: Option<LostWal>) {
        self.metrics.lost.set(lost.map_or(0.0, |lost| bytes_value(lost.to.bytes_since(lost.from))));
        self.status.send_modify(|status| {
            status.lost = lost;
            status.needs_attention = status.is_hurt();
            self.metrics.needs_attention.set(f64::from(u8::from(status.needs_attention)));
        });
    }

    /// Where to start when what the upstream sent did not continue what is held, so often in a row: whether it has other WAL
    /// than we do, and from where on, shows only from before the first record that differs. So everything in the newest segment
    /// is compared, and then in more and more before it.
    fn wider_start(&self, plan: &ResumePlan, corrupt_times: u32) -> Lsn {
        let (Some(identity), Some(doublings)) = (self.store.identity(), corrupt_times.checked_sub(1)) else {
            return plan.start;
        };
        let size = identity.segment_size;
        let further = WIDENED_SEGMENTS_MAX.min(1_u64.checked_shl(doublings).unwrap_or(u64::MAX)) - 1;
        let newest = SegmentNo::ending_at(plan.held_end, size).start(size).unwrap_or(plan.start);
        let widened = newest.get().saturating_sub(further.saturating_mul(size.bytes()));
        let start = Lsn::new(widened).unwrap_or(Lsn::MIN).min(plan.start);
        self.store.begin().map_or(start, |begin| start.max(begin))
    }

    /// The upstream has removed what comes next: whoever waits for it here waits in vain.
    fn tell_removed(&self, course: &Course) {
        let Some(Positions { timeline, verified: from, .. }) = *self.positions.borrow() else { return };
        let Some(to) = course.upstream_end.filter(|to| *to > from) else { return };
        let removed = Some(RemovedWal { timeline, from, to });
        self.status.send_if_modified(|status| {
            // At once: there may be more to do at the upstream before this session is judged, and that may take time.
            status.needs_attention = true;
            self.metrics.needs_attention.set(1.0);
            std::mem::replace(&mut status.removed, removed) != removed
        });
    }
}

/// A stream that has been opened, and what is known of it.
struct Opened {
    streaming: connect::Streaming,
    /// The server.
    host: String,
    /// What it said of itself at the login.
    introduction: Introduction,
    settings: ReceiverSettings,
    /// What the slot says was acknowledged, and is not held.
    lost: Option<LostWal>,
    /// What the upstream keeps for our slot; `None` without a slot.
    retained: Option<Arc<Retained>>,
    /// `None`: the stream is plain.
    link: Option<LinkTerms>,
    /// When a stream that is plain for distrust is to give way to a link.
    link_due: Option<Instant>,
    /// Whether the slot by which WAL is streamed may hold back what an earlier process told.
    is_slot_holding_back: bool,
}

/// Often enough that the upstream never thinks us dead, whatever its `wal_sender_timeout`.
fn status_interval(settings: &UpstreamSettings, sender_timeout: Option<Duration>) -> Duration {
    let configured = settings.status_interval.unwrap_or(STATUS_INTERVAL_MAX);
    sender_timeout.map_or(configured, |timeout| configured.min(timeout / 4))
}

/// Spreads attempts of several relays; not used where unpredictability matters.
fn random() -> u64 {
    RandomState::new().hash_one(0)
}

/// A session that lasted this long was a success: the next failure is treated as the first.
const GOOD_SESSION_TIME_MIN: Duration = Duration::from_secs(10);

/// Status updates where none are asked for; rare enough to count as none.
const STATUS_INTERVAL_MAX: Duration = Duration::from_secs(24 * 3600);

/// Most segments that are compared where it does not show from where on the upstream has other WAL.
const WIDENED_SEGMENTS_MAX: u64 = 64;

/// How often the store is asked whether it has room again, beside its own notices.
const ROOM_CHECK_INTERVAL: Duration = Duration::from_millis(500);
