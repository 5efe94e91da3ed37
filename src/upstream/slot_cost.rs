//! What our slot may cost the primary while we can take nothing.
//!
//! As long as the disk here is full, or stands still, the slot keeps all that is written there. Owns the look at it from time
//! to time, and the decision, where one was configured, that the primary comes first: beyond the limit the slot is dropped, and
//! made again when WAL can be taken. Whether all that is needed is still there then shows then, and is told.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::upstream::{Upstream, UpstreamError, connect, random, slot};
use crate::wal::Lsn;

/// When the slot was looked at.
#[derive(Debug, Default)]
pub(super) struct SlotWatch {
    looked_at: Option<Instant>,
    told: bool,
}

impl SlotWatch {
    fn is_due(&self) -> bool {
        self.looked_at.is_none_or(|at| at.elapsed() >= LOOK_INTERVAL)
    }
}

impl Upstream {
    /// To be called now and then while nothing can be taken. Asks the upstream at most every [`LOOK_INTERVAL`].
    pub(super) async fn watch_slot(&self, watch: &mut SlotWatch) {
        let (Some(keep_max), Some(name)) = (self.settings.slot_wal_keep_max, &self.settings.slot) else {
            return;
        };
        if !watch.is_due() {
            return;
        }
        watch.looked_at = Some(Instant::now());
        let looked = timeout(connect::OPENING_TIME_MAX, self.drop_costly_slot(keep_max)).await;
        match looked.unwrap_or(Err(UpstreamError::OpeningTimeout)) {
            Ok(Some(retained_bytes)) => {
                tracing::error!(
                    slot = name,
                    retained_bytes,
                    keep_max,
                    "WAL cannot be taken here, and the slot made the upstream keep too much: it was dropped"
                );
            }
            Ok(None) => {}
            Err(error) if !watch.told => {
                watch.told = true;
                tracing::warn!(error = %error.chain(), "could not see what the slot makes the upstream keep");
            }
            Err(_) => {}
        }
    }

    /// How much it kept, if it was dropped.
    async fn drop_costly_slot(&self, keep_max: u64) -> Result<Option<u64>, UpstreamError> {
        let order = connect::Order { random: random(), ..connect::Order::default() };
        let (mut connected, _) = connect::connect(&self.settings, &self.store, &self.writer, order).await?;
        let kept_from: Option<Lsn> = slot::look_at_slot(&mut connected, &self.settings).await?;
        let retained = kept_from.map(|kept_from| connected.system.flushed.bytes_since(kept_from));
        let Some(retained) = retained.filter(|retained| *retained > keep_max) else {
            connected.dialog.terminate().await;
            return Ok(None);
        };
        slot::drop_slot(&mut connected, &self.settings).await?;
        connected.dialog.terminate().await;
        Ok(Some(retained))
    }
}

/// The slot is looked at so often: the first time at once.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
