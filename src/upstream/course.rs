//! What is remembered from session to session.
//!
//! Owns what the last sessions teach the next one: where to start, what to do about the slot, and whether the same error
//! keeps coming. Nothing of it outlives the process but what slots do not tell of what was acknowledged.

use std::time::{Duration, Instant};

use crate::store::{BlockId, Store, UpstreamMemory};
use crate::upstream::Advice;
use crate::upstream::UpstreamError;
use crate::upstream::backoff::Backoff;
use crate::upstream::connect::Beginning;
use crate::upstream::losses::Losses;
use crate::upstream::patroni::UnnamedLeader;
use crate::upstream::remembering::Remembering;
use crate::upstream::slot_cost::SlotWatch;
use crate::upstream::slot_memory::SlotMemory;
use crate::upstream::unfollowed::Unfollowed;
use crate::wal::{Lsn, TimelineId};

/// What is remembered from session to session.
pub(super) struct Course {
    pub(super) backoff: Backoff,
    /// The next receive block's number.
    pub(super) block: BlockId,
    pub(super) held_end: Option<Lsn>,
    /// Where the upstream was when the last session began.
    pub(super) upstream_end: Option<Lsn>,
    /// Where the last session started, if the plan names another place for when the WAL from there on is gone.
    pub(super) fallback_after: Option<Lsn>,
    /// The next session starts at a place after the second one, if our end is still the first.
    pub(super) refused: Option<(Lsn, Lsn)>,
    /// Where the next session begins if nothing is held.
    pub(super) beginning: Beginning,
    /// What was done about the slot, on each server.
    pub(super) slots: SlotMemory,
    /// What was lost here, and is not back.
    pub(super) losses: Losses,
    /// What of both outlives the process.
    pub(super) remembering: Remembering,
    /// Who answers and is not followed.
    pub(super) unfollowed: Unfollowed,
    /// When it was looked at what the slot costs.
    pub(super) slot_watch: SlotWatch,
    /// The host of the last session that came as far as the slot.
    pub(super) host: Option<String>,
    /// The store was begun by this process although the slot was there: if it was used, up to here.
    pub(super) replaces: Option<Lsn>,
    /// The timeline that the upstream has ended on this connection, and our end then.
    pub(super) ended: Option<(TimelineId, Lsn)>,
    /// The host to try last the next time.
    pub(super) avoid: Option<String>,
    /// Who leads by Patroni, and is not configured.
    pub(super) unnamed_leader: UnnamedLeader,
    /// The stream that runs, or ran last, is a compressed link.
    pub(super) on_link: bool,
    /// The last link brought something wrong, and nothing has been streamed since.
    pub(super) link_distrusted: bool,
    /// When a stream that is plain for that is to give way to a link; `None` where none does.
    pub(super) link_due: Option<Instant>,
    /// How often in a row the upstream refused us.
    refusals: u32,
    /// Our end when corrupt WAL came, and how often in a row it came since without any progress.
    corrupt: Option<(Lsn, u32)>,
    last_logged: Option<(Advice, String, Instant)>,
}

impl Course {
    /// What an earlier process knew of slots and losses is taken over.
    pub(super) fn new(retry_interval: Duration, store: &Store) -> Self {
        let remembering = Remembering::new(store);
        let memory = remembering.memory();
        let durable = store.positions().map(|positions| positions.flushed);
        Self {
            backoff: Backoff::new(retry_interval),
            block: BlockId(1),
            held_end: None,
            upstream_end: None,
            fallback_after: None,
            refused: None,
            beginning: Beginning::AsPlanned,
            slots: SlotMemory::recall(&memory.made_ahead, &memory.set_aside),
            losses: Losses::recall(memory.lost_to, durable),
            remembering,
            unfollowed: Unfollowed::default(),
            slot_watch: SlotWatch::default(),
            host: None,
            replaces: None,
            ended: None,
            avoid: None,
            unnamed_leader: UnnamedLeader::default(),
            on_link: false,
            link_distrusted: false,
            link_due: None,
            refusals: 0,
            corrupt: None,
            last_logged: None,
        }
    }

    /// Has remembered what a later process must know of slots and losses, when what is held ends there. Returns the number of the
    /// change.
    pub(super) fn remember(&self, held_end: Option<Lsn>) -> u64 {
        let (made_ahead, lost) = (self.slots.made_ahead(held_end), self.losses.lost());
        let (set_aside, lost_to) = (self.slots.set_aside(), lost.map(|lost| lost.to));
        self.remembering.change(|memory| *memory = UpstreamMemory { made_ahead, set_aside, lost_to })
    }

    /// The upstream streams: what it refused before is settled.
    pub(super) fn note_streaming(&mut self, on_link: bool) {
        self.refusals = 0;
        (self.on_link, self.link_distrusted) = (on_link, false);
        self.slot_watch.note_streaming();
        self.unfollowed.note_streaming();
    }

    /// What to do about an error, knowing those before it.
    pub(super) fn advice(&mut self, error: &UpstreamError) -> Advice {
        self.refusals = if error.is_refusal() { self.refusals.saturating_add(1) } else { 0 };
        if self.refusals >= REFUSALS_MAX { Advice::TellAHuman } else { error.advice() }
    }

    pub(super) fn note_corrupt(&mut self) {
        let Some(held_end) = self.held_end else { return };
        self.corrupt = Some((held_end, self.corrupt_times(held_end).saturating_add(1)));
    }

    /// How often in a row corrupt WAL came while our end was this.
    pub(super) fn corrupt_times(&self, held_end: Lsn) -> u32 {
        self.corrupt.filter(|(at, _)| *at == held_end).map_or(0, |(_, times)| times)
    }

    /// A fault of the way would not be there each time.
    pub(super) fn has_only_corrupt(&self) -> bool {
        self.held_end.is_some_and(|held_end| self.corrupt_times(held_end) >= CORRUPT_TIMES_MAX)
    }

    /// Whether an error is to be logged: another one than last time, or a while has passed.
    pub(super) fn is_news(&mut self, advice: Advice, text: &str) -> bool {
        let repeated = self.last_logged.as_ref().is_some_and(|(before, last, at)| {
            *before == advice && last == text && at.elapsed() < SAME_ERROR_LOG_INTERVAL
        });
        if !repeated {
            self.last_logged = Some((advice, text.to_owned(), Instant::now()));
        }
        !repeated
    }
}

/// Corrupt WAL in a row, without any progress, after which somebody is told and nothing is hurried any more.
const CORRUPT_TIMES_MAX: u32 = 5;

/// The same error is logged again after this time.
const SAME_ERROR_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Refusals in a row after which somebody is told: fewer may come while roles and rules are being changed.
const REFUSALS_MAX: u32 = 5;
