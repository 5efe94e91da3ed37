//! The history files of the upstream's timelines.
//!
//! Owns fetching them, and the check that those held are those of this upstream. Every file is stored before WAL of a later
//! timeline is, and none stays that came from another server than the one that is streamed from.

use crate::upstream::blocking::block_in_place;
use bytes::Bytes;

use crate::protocol::Command;
use crate::protocol::SqlState;
use crate::store::Store;
use crate::store::StoreError;
use crate::upstream::UpstreamError;
use crate::upstream::connect::Connected;
use crate::upstream::dialog::Dialog;
use crate::wal::timeline::history_of_ancestor;
use crate::wal::{Lsn, TimelineHistory, TimelineId};

/// The history of the timeline that the upstream is on now.
#[derive(Debug)]
pub(crate) struct NewestHistory {
    timeline: TimelineId,
    /// Absent for the first timeline, which has none.
    content: Option<Bytes>,
    pub(crate) history: TimelineHistory,
}

impl NewestHistory {
    /// Where the timeline began; the lowest position for the first.
    pub(crate) fn begin(&self) -> Lsn {
        self.history.ancestors().last().map_or(Lsn::MIN, |parent| parent.switch_lsn)
    }

    /// The history file of an ancestor of which there is more than its number; `None` for other timelines.
    fn history_of(&self, timeline: TimelineId) -> Option<Bytes> {
        let content = self.content.as_ref()?;
        history_of_ancestor(content, timeline).map(|head| content.slice_ref(head))
    }
}

/// Fetches the newest history, and compares it with the one held, if it is: a number can stand for two histories, and what
/// was fetched from one server must never be served beside the WAL of another.
pub(crate) async fn check_newest(
    connected: &mut Connected,
    store: &Store,
) -> Result<NewestHistory, UpstreamError> {
    let timeline = connected.system.timeline;
    if timeline.get() > TIMELINES_MAX {
        return Err(UpstreamError::InvalidAnswer {
            command: "IDENTIFY_SYSTEM",
            field: "timeline",
            value: timeline.to_string(),
        });
    }
    if timeline == TimelineId::FIRST {
        return Ok(NewestHistory { timeline, content: None, history: TimelineHistory::of_first() });
    }
    // Whatever lies in a directory that belongs to no cluster yet is nobody's.
    let held = if store.identity().is_some() { block_in_place(|| store.history(timeline))? } else { None };
    let content = match (fetch(&mut connected.dialog, timeline).await, &held) {
        (Err(UpstreamError::Server(error)), Some(held)) if error.is(SqlState::UNDEFINED_FILE) => {
            tracing::warn!(%timeline, "the upstream has lost its own history file; the one held is used");
            Bytes::from(held.clone())
        }
        (fetched, _) => fetched?,
    };
    let history = TimelineHistory::parse(timeline, &content)?;
    if held.is_some_and(|held| held != content) && !is_ahead(store, timeline) {
        return Err(StoreError::OtherHistory(timeline).into());
    }
    Ok(NewestHistory { timeline, content: Some(content), history })
}

/// Whether no WAL of the timeline was ever received: its history came from a server that was not followed so far.
fn is_ahead(store: &Store, timeline: TimelineId) -> bool {
    store.lineage().is_none_or(|lineage| lineage.timeline() < timeline)
}

/// Stores every history file up to the upstream's timeline that is not held, also of timelines that are no ancestors:
/// standbys ask for each number in turn. A missing one is written from its descendant's if it is an ancestor's, as after a
/// base backup, and else passed over. What is held of timelines that were not followed yet is compared, and in a directory that
/// belongs to no cluster yet everything is fetched anew.
pub(crate) async fn store_missing(
    connected: &mut Connected,
    store: &Store,
    newest: NewestHistory,
) -> Result<(), UpstreamError> {
    block_in_place(|| store.forget_unowned_histories())?;
    for timeline in (2..newest.timeline.get()).filter_map(TimelineId::new) {
        if !is_ahead(store, timeline) && block_in_place(|| store.history(timeline))?.is_some() {
            continue;
        }
        let content = match fetch(&mut connected.dialog, timeline).await {
            Ok(content) => content,
            Err(UpstreamError::Server(error)) if error.is(SqlState::UNDEFINED_FILE) => {
                let Some(content) = newest.history_of(timeline) else { continue };
                tracing::info!(%timeline, "the upstream has no history file of an ancestor; it is written from its descendant's");
                content
            }
            Err(error) => return Err(error),
        };
        keep(store, timeline, &content)?;
    }
    if let Some(content) = newest.content {
        keep(store, newest.timeline, &content)?;
    }
    Ok(())
}

fn keep(store: &Store, timeline: TimelineId, content: &[u8]) -> Result<(), UpstreamError> {
    let kept = block_in_place(|| {
        if is_ahead(store, timeline) {
            store.replace_history(timeline, content)
        } else {
            store.store_history(timeline, content)
        }
    });
    Ok(kept?)
}

async fn fetch(dialog: &mut Dialog, timeline: TimelineId) -> Result<Bytes, UpstreamError> {
    let rows = dialog.query(&Command::TimelineHistory(timeline)).await?;
    Ok(rows.first().and_then(|row| row.value(1)).cloned().unwrap_or_default())
}

/// Timelines that a cluster may have gone through; a server that tells of more cannot mean it, and each costs a question.
const TIMELINES_MAX: u32 = 10_000;
