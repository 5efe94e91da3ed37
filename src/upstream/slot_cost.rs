//! What our slot may cost a server while no WAL is taken from it.
//!
//! As long as the disk here is full or stands still, the relay is fenced, or what the server has must not be followed, the slot
//! keeps all that is written there. Owns the look at it from time to time, and the decision, where one was configured, that
//! the server comes first: beyond the limit the slot is dropped, and made again when WAL is taken. Whether all that is needed
//! is still there then shows then, and is told.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::upstream::{Upstream, UpstreamError, connect, slot};

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

    /// A stream begins: what went wrong before is told when it goes wrong again.
    pub(super) fn note_streaming(&mut self) {
        self.told = false;
    }
}

impl Upstream {
    /// Watches as long as it is polled, and no WAL is taken meanwhile. Never comes back.
    pub(super) async fn keep_watching_slot(&self, watch: &mut SlotWatch) {
        loop {
            self.watch_slot(watch).await;
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// To be called now and then while no WAL is taken. Asks each server at most every [`LOOK_INTERVAL`].
    pub(super) async fn watch_slot(&self, watch: &mut SlotWatch) {
        let (Some(keep_max), Some(name)) = (self.settings.slot_wal_keep_max, &self.settings.slot) else {
            return;
        };
        if !watch.is_due() {
            return;
        }
        watch.looked_at = Some(Instant::now());
        // On each of them a slot of ours may keep WAL.
        for host in &self.settings.conninfo.hosts {
            let host = host.to_string();
            let looked = timeout(connect::OPENING_TIME_MAX, self.drop_costly_slot(&host, keep_max)).await;
            match looked.unwrap_or(Err(UpstreamError::OpeningTimeout)) {
                Ok(Some(retained_bytes)) => {
                    tracing::error!(
                        slot = name,
                        host,
                        retained_bytes,
                        keep_max,
                        "WAL is not taken here, and the slot made the upstream keep too much: it was dropped"
                    );
                }
                Ok(None) => {}
                Err(error) if !watch.told => {
                    watch.told = true;
                    tracing::warn!(host, error = %error.chain(), "could not see what the slot makes the upstream keep");
                }
                Err(_) => {}
            }
        }
    }

    /// How much it kept, if it was dropped.
    async fn drop_costly_slot(&self, host: &str, keep_max: u64) -> Result<Option<u64>, UpstreamError> {
        let mut connected = connect::connect_to(&self.settings, &self.store, host).await?;
        let kept_from = slot::look_at_slot(&mut connected, &self.settings).await?;
        let retained = kept_from.map(|kept_from| connected.system.flushed.bytes_since(kept_from));
        let costly = retained.filter(|retained| *retained > keep_max);
        if costly.is_some() {
            slot::drop_slot(&mut connected, &self.settings).await?;
        }
        connected.dialog.terminate().await;
        Ok(costly)
    }
}

/// The slot is looked at so often: the first time at once.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
