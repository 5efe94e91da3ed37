//! The upstream's slot while WAL is not streamed by it.
//!
//! What is acknowledged by standbys far away says when commits may return; what the primary must keep for us is another
//! matter, and ends where WAL is durable here. So with such a policy the stream uses no slot, and the slot is moved by SQL.
//! Owns that second connection, which ends each time: a primary's smart shutdown waits for sessions. Must never touch a slot at
//! another server than that of the stream, move it beyond what was compared with the upstream and is durable here, nor claim
//! that it moved when the upstream did not say so.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::{sync::watch, time::timeout};

use crate::conninfo::{Conninfo, ProcessSurroundings};
use crate::metrics::UpstreamMetrics;
use crate::protocol::SqlState;
use crate::status::UpstreamStatus;
use crate::upstream::UpstreamError;
use crate::upstream::dial::log_in;
use crate::upstream::dialog::Dialog;
use crate::upstream::remembering::Remembering;
use crate::upstream::retained::Retained;
use crate::upstream::slot_memory::{KeptFrom, MadeBeside};
use crate::wal::Lsn;

/// Moves the slot as long as it is polled.
pub(super) struct SlotAdvance {
    /// For SQL.
    pub(super) conninfo: Conninfo,
    /// The host of the stream.
    pub(super) host: String,
    /// The server's process for the stream.
    pub(super) process_id: Option<u32>,
    pub(super) slot: String,
    /// Whether it is made again when it is gone.
    pub(super) create_slot: bool,
    /// Hears when it is made again.
    pub(super) made: MadeBeside,
    /// The same, for a later process.
    pub(super) remembering: Remembering,
    /// What is durable here; `None` until it was compared with the upstream.
    pub(super) durable: watch::Receiver<Option<Lsn>>,
    /// Hears where the slot is.
    pub(super) retained: Arc<Retained>,
    pub(super) status: watch::Sender<UpstreamStatus>,
    pub(super) metrics: UpstreamMetrics,
}

impl SlotAdvance {
    /// Never comes back.
    pub(super) async fn run(mut self) {
        let mut reached = None;
        let mut failures = Failures::default();
        loop {
            let durable = *self.durable.borrow_and_update();
            let Some(durable) = durable.filter(|durable| reached.is_none_or(|reached| *durable > reached))
            else {
                if self.durable.changed().await.is_err() {
                    // The stream has ended, and with it this.
                    std::future::pending().await
                }
                continue;
            };
            let moved = timeout(ADVANCE_TIME_MAX, self.advance(durable)).await;
            let pause = match moved.unwrap_or(Err(UpstreamError::OpeningTimeout)) {
                Ok(position) => {
                    reached = Some(position);
                    self.retained.note_moved(position);
                    failures = Failures::default();
                    show_slot_error(None, &self.status, &self.metrics);
                    ADVANCE_INTERVAL
                }
                Err(error) => self.note_failure(&error, &mut failures),
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Returns how long to wait before the next attempt.
    fn note_failure(&self, error: &UpstreamError, failures: &mut Failures) -> Duration {
        let now = Instant::now();
        let pause = failures.note(error.is_refusal());
        let text = error.chain();
        if failures.is_to_be_told(now) {
            tracing::warn!(slot = self.slot, error = %text, "could not advance the replication slot on the upstream, which keeps WAL for it");
        }
        if failures.in_a_row >= FAILURES_MAX {
            show_slot_error(Some(text), &self.status, &self.metrics);
        }
        pause
    }

    /// Moves the slot. Returns where the upstream says that it is.
    async fn advance(&self, durable: Lsn) -> Result<Lsn, UpstreamError> {
        let mut conninfo = self.conninfo.clone();
        conninfo.reread_passwords(&ProcessSurroundings);
        let host = conninfo.hosts.iter().find(|host| host.to_string() == self.host);
        let mut dialog = log_in(&conninfo, host.ok_or(UpstreamError::NoHost)?).await?;
        let moved = match self.check_server(&mut dialog).await {
            Ok(()) => self.advance_or_make(&mut dialog, durable).await,
            Err(error) => Err(error),
        };
        dialog.terminate().await;
        if let Ok(reached) = moved {
            self.made.note_reached(reached, durable);
            let change = self.remembering.change(|memory| memory.note_reached(&self.host, reached, durable));
            self.remembering.settled(change).await;
        }
        moved
    }

    /// That it is the server of the stream: behind one name there may be several. Everybody may see which processes send WAL, and
    /// of his own sessions also the name; a number alone may be given to some process on each of them.
    async fn check_server(&self, dialog: &mut Dialog) -> Result<(), UpstreamError> {
        let process_id = self.process_id.unwrap_or_default();
        let text = format!(
            "SELECT 1 FROM pg_catalog.pg_stat_activity own JOIN pg_catalog.pg_stat_activity stream \
             USING (usesysid, application_name) JOIN pg_catalog.pg_stat_get_wal_senders() sender \
             ON sender.pid = stream.pid WHERE own.pid = pg_catalog.pg_backend_pid() AND stream.pid = {process_id}"
        );
        if dialog.query_text(&text).await?.is_empty() {
            return Err(UpstreamError::OtherServer { host: self.host.clone(), process_id });
        }
        Ok(())
    }

    async fn advance_or_make(&self, dialog: &mut Dialog, durable: Lsn) -> Result<Lsn, UpstreamError> {
        let absent = || UpstreamError::SlotAbsent(self.slot.clone());
        match self.ask_to_advance(dialog, durable).await {
            Ok(Some(reached)) => return Ok(reached),
            Ok(None) if self.create_slot => {}
            Ok(None) => return Err(absent()),
            // It was invalidated, or never used: it keeps nothing, and may never do so again.
            Err(UpstreamError::Server(error))
                if self.create_slot && error.is(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) =>
            {
                tracing::warn!(slot = self.slot, error = %error, "the replication slot on the upstream is of no use any more");
                dialog
                    .query_text(&format!("SELECT pg_catalog.pg_drop_replication_slot('{}')", self.slot))
                    .await?;
            }
            Err(error) => return Err(error),
        }
        let kept_from = self.make(dialog).await?;
        tracing::warn!(
            slot = self.slot,
            %kept_from,
            %durable,
            "the replication slot on the upstream was gone while WAL was streamed: it was made again"
        );
        self.ask_to_advance(dialog, durable).await?.ok_or_else(absent)
    }

    /// Makes the slot. Returns where it keeps WAL from: the upstream's newest checkpoint, however far that is ahead of us. Whoever
    /// comes after hears of it also when the answer is not waited for, or the process ends.
    async fn make(&self, dialog: &mut Dialog) -> Result<Lsn, UpstreamError> {
        let text =
            format!("SELECT lsn FROM pg_catalog.pg_create_physical_replication_slot('{}', true)", self.slot);
        self.note_made(Some(KeptFrom::NotHeard)).await;
        let rows = match dialog.query_text(&text).await {
            Err(error @ UpstreamError::Server(_)) => {
                self.note_made(None).await;
                return Err(error);
            }
            answer => answer?,
        };
        let lsn = rows.first().and_then(|row| row.text(0)).unwrap_or_default();
        let kept_from = lsn.parse().map_err(|_| UpstreamError::InvalidAnswer {
            command: "pg_create_physical_replication_slot",
            field: "lsn",
            value: lsn.to_owned(),
        })?;
        self.note_made(Some(KeptFrom::At(kept_from))).await;
        Ok(kept_from)
    }

    async fn note_made(&self, made: Option<KeptFrom>) {
        self.made.note(made);
        let server = self.host.clone();
        let change = self.remembering.change(|memory| {
            match made {
                Some(KeptFrom::At(from)) => memory.made_ahead.insert(server, Some(from)),
                Some(KeptFrom::NotHeard) => memory.made_ahead.insert(server, None),
                Some(KeptFrom::NotTold) | None => memory.made_ahead.remove(&server),
            };
        });
        self.remembering.settled(change).await;
    }

    /// Where the slot is then; `None`: there is none.
    async fn ask_to_advance(&self, dialog: &mut Dialog, durable: Lsn) -> Result<Option<Lsn>, UpstreamError> {
        // The name holds nothing that would have to be quoted. One that is ahead, as a new one may be, stays there.
        let text = format!(
            "SELECT slot_type, CASE WHEN slot_type <> 'physical' THEN NULL WHEN restart_lsn >= '{durable}' THEN restart_lsn \
             ELSE (pg_catalog.pg_replication_slot_advance(slot_name, '{durable}')).end_lsn END \
             FROM pg_catalog.pg_replication_slots WHERE slot_name = '{}'",
            self.slot
        );
        let rows = dialog.query_text(&text).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let column = |at: usize| row.text(at).unwrap_or_default().to_owned();
        match (column(0).as_str(), column(1).parse()) {
            ("physical", Ok(reached)) => Ok(Some(reached)),
            ("physical", Err(_)) => Err(invalid_answer("end_lsn", column(1))),
            (other, _) => Err(invalid_answer("slot_type", other.to_owned())),
        }
    }
}

fn invalid_answer(field: &'static str, value: String) -> UpstreamError {
    UpstreamError::InvalidAnswer { command: "pg_replication_slot_advance", field, value }
}

/// Shows why the slot cannot be moved, which asks for a person; `None`: it can.
pub(super) fn show_slot_error(
    error: Option<String>,
    status: &watch::Sender<UpstreamStatus>,
    metrics: &UpstreamMetrics,
) {
    status.send_if_modified(|status| {
        if status.slot_error == error {
            return false;
        }
        status.slot_error = error;
        status.needs_attention = status.is_hurt();
        metrics.needs_attention.set(f64::from(u8::from(status.needs_attention)));
        true
    });
}

/// Attempts that failed, one after the other.
#[derive(Debug, Default)]
struct Failures {
    in_a_row: u32,
    told_at: Option<Instant>,
}

impl Failures {
    /// One more. Returns how long to wait: each attempt that is refused is a line in the server's log.
    fn note(&mut self, is_refusal: bool) -> Duration {
        let grown = FAILED_DELAY_MIN.saturating_mul(1 << self.in_a_row.min(DOUBLINGS_MAX));
        self.in_a_row = self.in_a_row.saturating_add(1);
        grown.min(if is_refusal { REFUSED_DELAY_MAX } else { FAILED_DELAY_MAX })
    }

    /// Whether the failure is to be logged; counts as told then.
    fn is_to_be_told(&mut self, now: Instant) -> bool {
        let is_due = self.told_at.is_none_or(|at| now.saturating_duration_since(at) >= TELL_INTERVAL);
        if is_due {
            self.told_at = Some(now);
        }
        is_due
    }
}

/// The slot is moved at most so often, for each time is a login.
const ADVANCE_INTERVAL: Duration = Duration::from_secs(5);

/// Longest time for one attempt.
const ADVANCE_TIME_MAX: Duration = Duration::from_secs(60);

/// Delay after a first failure; it doubles up to the bounds below.
const FAILED_DELAY_MIN: Duration = Duration::from_secs(1);
const DOUBLINGS_MAX: u32 = 10;

/// Longest delay between attempts.
const FAILED_DELAY_MAX: Duration = Duration::from_secs(60);

/// The same where the server does not let us in.
const REFUSED_DELAY_MAX: Duration = Duration::from_secs(600);

/// Failures in a row, over a quarter of a minute, after which a person is asked for.
const FAILURES_MAX: u32 = 5;

/// That it still fails is logged this often.
const TELL_INTERVAL: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_that_fail_become_rare_and_are_told_now_and_then() {
        let mut failures = Failures::default();
        let delays: Vec<u64> = (0..12).map(|_| failures.note(true).as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]);
        let mut failures = Failures::default();
        let delays: Vec<u64> = (0..8).map(|_| failures.note(false).as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 60, 60]);
        let start = Instant::now();
        let told =
            |failures: &mut Failures, seconds| failures.is_to_be_told(start + Duration::from_secs(seconds));
        assert!(told(&mut failures, 0) && !told(&mut failures, 59) && told(&mut failures, 60));
        assert!(!told(&mut failures, 61));
    }
}
