//! From timeline to timeline.
//!
//! Owns the walk from the timeline that is held to that of a server which may be followed: one promotion after the other,
//! each only after all that came before it is held. What is set aside on the way is told here. Asks the server nothing.

use crate::upstream::blocking::block_in_place;

use crate::session::timelines::{Fork, Route, route};
use crate::status::LostWal;
use crate::store::DeadBranch;
use crate::upstream::connect::Beginning;
use crate::upstream::course::Course;
use crate::upstream::{Upstream, UpstreamError};
use crate::wal::TimelineHistory;

impl Upstream {
    /// Goes over to the server's timeline, or to the first on the way of which something is still missing. The histories must
    /// be stored.
    pub(super) fn follow(
        &mut self,
        history: &TimelineHistory,
        course: &mut Course,
    ) -> Result<(), UpstreamError> {
        // Each step passes an ancestor.
        for _ in 0..=history.ancestors().len() {
            let (Some(lineage), Some(plan)) = (self.store.lineage(), self.writer.plan()) else {
                // Nothing is held.
                break;
            };
            match route(&lineage, plan.held_end, history)? {
                Route::Same if course.ended.take() == Some((plan.timeline, plan.held_end)) => {
                    let text =
                        format!("the end of timeline {}, which the upstream is still on", plan.timeline);
                    return Err(UpstreamError::Unexpected(text));
                }
                Route::Same => return Ok(()),
                Route::Diverged(fork)
                    if self.writer.holds_nothing()
                        && self.store.oldest().is_some_and(|oldest| fork.at < oldest) =>
                {
                    tracing::warn!(timeline = %fork.next, "nothing is held yet: beginning on the upstream's timeline");
                    course.beginning = Beginning::Anew;
                    return Ok(());
                }
                Route::Finish(fork) => {
                    if course.ended.take() == Some((plan.timeline, plan.held_end)) {
                        let (timeline, held_end) = (plan.timeline, plan.held_end);
                        return Err(UpstreamError::EndedEarly { timeline, held_end, fork: fork.at });
                    }
                    tracing::info!(timeline = %plan.timeline, held_end = %plan.held_end, switch_lsn = %fork.at, next = %fork.next, "the upstream has left the timeline: receiving the rest of it");
                    return Ok(());
                }
                Route::Follow(fork) | Route::Diverged(fork) => {
                    if let Some(gone) = course.losses.beyond(fork.at) {
                        // Before anything is on its way that makes it forgotten.
                        block_in_place(|| self.store.report_lost(fork.next, gone))?;
                    }
                    self.go_over(fork)?;
                    if let Some(gone) = course.losses.cut(fork.at) {
                        self.tell_gone(gone, fork);
                    }
                }
            }
        }
        Ok(())
    }

    fn go_over(&mut self, fork: Fork) -> Result<(), UpstreamError> {
        let dead = block_in_place(|| self.writer.switch(fork.next, fork.at))?;
        self.acknowledging.cut(fork.at);
        tracing::info!(timeline = %fork.next, switch_lsn = %fork.at, "following a new timeline");
        if let Some(dead) = dead {
            self.tell_dead(&dead);
        }
        Ok(())
    }

    /// Nobody who may be followed has it, and it is not held here.
    fn tell_gone(&self, gone: LostWal, fork: Fork) {
        tracing::error!(
            timeline = %fork.next, switch_lsn = %fork.at, from = %gone.from, to = %gone.to,
            "the new timeline goes on without WAL that this relay had acknowledged and has lost: it will not come back"
        );
        self.status.send_modify(|status| {
            status.lost_for_good = Some(gone);
            status.needs_attention = true;
            self.metrics.needs_attention.set(1.0);
        });
    }

    fn tell_dead(&self, dead: &DeadBranch) {
        tracing::error!(
            timeline = %dead.timeline,
            fork = %dead.fork,
            end = %dead.end,
            bytes = dead.bytes(),
            records = dead.records,
            commits = dead.commits,
            transactions = ?dead.transactions.iter().take(TRANSACTIONS_LOGGED_MAX).collect::<Vec<_>>(),
            report = dead.report_name(),
            "the new timeline forked off before the end of what is held: what lies beyond has been set aside, and exists only here"
        );
        self.status.send_modify(|status| {
            status.diverged = true;
            status.needs_attention = true;
            self.metrics.needs_attention.set(1.0);
        });
    }
}

/// Transaction ids in a log line; all are in the report.
const TRANSACTIONS_LOGGED_MAX: usize = 100;
