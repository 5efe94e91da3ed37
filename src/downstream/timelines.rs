//! Where a timeline was left, by the history of the one that is received now.

use crate::protocol::{ServerError, SqlState};
use crate::session::sender::TimelineState;
use crate::store::{Store, StoreError};
use crate::wal::{Lineage, Lsn, TimelineHistory, TimelineId, timeline::HistoryError};

/// A timeline's place in the history could not be found.
#[derive(Debug, thiserror::Error)]
pub(super) enum TimelineError {
    #[error("requested timeline {0} is not in this server's history")]
    NotInHistory(TimelineId),
    #[error("could not read the history of timeline {0}")]
    Store(TimelineId, #[source] StoreError),
    #[error("history of timeline {0} is not valid")]
    Invalid(TimelineId, #[source] HistoryError),
}

impl From<&TimelineError> for ServerError {
    fn from(error: &TimelineError) -> Self {
        let sqlstate = match error {
            TimelineError::NotInHistory(_) => SqlState::INTERNAL_ERROR,
            TimelineError::Store(..) => SqlState::IO_ERROR,
            TimelineError::Invalid(..) => SqlState::DATA_CORRUPTED,
        };
        Self::error(sqlstate, error.to_string())
    }
}

/// Whether `timeline` is the `current` one, and else where it was left. Reads a file: blocks.
pub(super) fn timeline_state(
    store: &Store,
    timeline: TimelineId,
    current: TimelineId,
) -> Result<TimelineState, TimelineError> {
    if timeline == current {
        return Ok(TimelineState::Current);
    }
    // What was followed is known; a file may tell of more.
    let lineage = store.lineage().filter(|lineage| lineage.timeline() == current);
    if let Some((end, next)) = lineage.and_then(|lineage| lineage.left(timeline)) {
        return Ok(TimelineState::Historic { end, next });
    }
    let history = history_of(store, current)?;
    let switch_lsn = history.switch_lsn(timeline).ok_or(TimelineError::NotInHistory(timeline))?;
    let mut later = history.ancestors().iter().map(|ancestor| ancestor.timeline);
    let next = later.find(|ancestor| *ancestor > timeline).unwrap_or(current);
    Ok(TimelineState::Historic { end: switch_lsn, next })
}

/// The timeline on which `position` was written, in the history of `current` (`tliOfPointInHistory`). Blocks.
pub(super) fn timeline_of(
    store: &Store,
    position: Lsn,
    current: TimelineId,
) -> Result<TimelineId, TimelineError> {
    // What was followed is known; what came before the first timeline that was is in its file, if at all.
    let lineage = store.lineage().filter(|lineage| lineage.timeline() == current);
    let first = |lineage: &Lineage| lineage.ancestors().first().map_or(current, |first| first.timeline);
    if let Some(lineage) = lineage.filter(|lineage| first(lineage) == TimelineId::FIRST) {
        return Ok(lineage.timeline_at(position));
    }
    let history = history_of(store, current)?;
    let holding = history.ancestors().iter().find(|ancestor| position < ancestor.switch_lsn);
    Ok(holding.map_or(current, |ancestor| ancestor.timeline))
}

fn history_of(store: &Store, timeline: TimelineId) -> Result<TimelineHistory, TimelineError> {
    if timeline == TimelineId::FIRST {
        return Ok(TimelineHistory::of_first());
    }
    let content = store.history(timeline).map_err(|error| TimelineError::Store(timeline, error))?;
    // A relay that joined late may lack the file of its first timeline: then nothing is known before it.
    TimelineHistory::parse(timeline, &content.unwrap_or_default())
        .map_err(|error| TimelineError::Invalid(timeline, error))
}
