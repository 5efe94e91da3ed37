//! What our slot may cost a server while no WAL is taken from it.
//!
//! As long as the disk here is full or stands still, the relay is fenced, or what the server has must not be followed, the slot
//! keeps all that is written there. Owns the look at it from time to time, and the decision, where one was configured, that
//! the server comes first: beyond the limit the slot is dropped, and made again when WAL is taken. Whether all that is needed
//! is still there then shows then, and is told.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::metrics::bytes_value;
use crate::store::Store;
use crate::upstream::{Upstream, UpstreamError, UpstreamSettings, connect, slot};

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
    /// Watches as long as it is polled, and no WAL is taken from these servers meanwhile. Never comes back.
    pub(super) async fn keep_watching_slot(&self, watch: &mut SlotWatch, servers: &[String]) {
        loop {
            self.watch_slot(watch, servers).await;
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// To be called now and then while no WAL is taken from these servers. Asks them at most every [`LOOK_INTERVAL`], all at once:
    /// one that does not answer must not hold up the look at the others.
    pub(super) async fn watch_slot(&self, watch: &mut SlotWatch, servers: &[String]) {
        let (Some(keep_max), Some(name)) = (self.settings.slot_wal_keep_max, &self.settings.slot) else {
            return;
        };
        if servers.is_empty() || !watch.is_due() {
            return;
        }
        watch.looked_at = Some(Instant::now());
        let mut looks = JoinSet::new();
        for server in servers {
            let (settings, store, server) = (self.settings.clone(), self.store.clone(), server.clone());
            looks.spawn(async move {
                let look = drop_costly_slot(&settings, &store, &server, keep_max);
                let looked = timeout(LOOK_TIME_MAX, look).await;
                (looked.unwrap_or(Err(UpstreamError::OpeningTimeout)), server)
            });
        }
        let mut most = None;
        while let Some(looked) = looks.join_next().await {
            match looked {
                Ok((Ok(Some(Kept::TooMuch(retained_bytes))), host)) => {
                    most = most.max(Some(0));
                    tracing::error!(
                        slot = name,
                        host,
                        retained_bytes,
                        keep_max,
                        "WAL is not taken here, and the slot made the upstream keep too much: it was dropped"
                    );
                }
                Ok((Ok(Some(Kept::Allowed(retained_bytes))), _)) => most = most.max(Some(retained_bytes)),
                Ok((Ok(None), _)) => {}
                Ok((Err(error), host)) if !watch.told => {
                    watch.told = true;
                    tracing::warn!(host, error = %error.chain(), "could not see what the slot makes the upstream keep");
                }
                Ok((Err(_), _)) => {}
                Err(error) => tracing::error!(%error, "the look at the upstream's slot failed"),
            }
        }
        if let Some(most) = most {
            self.metrics.slot_retained.set(bytes_value(most));
        }
    }

    /// On each of them a slot of ours may keep WAL.
    pub(super) fn all_servers(&self) -> Vec<String> {
        self.settings.conninfo.hosts.iter().map(ToString::to_string).collect()
    }
}

/// What a slot made a server keep, in bytes.
enum Kept {
    Allowed(u64),
    /// It was dropped.
    TooMuch(u64),
}

/// What the slot keeps at this server; `None`: nothing, or the server does not tell.
async fn drop_costly_slot(
    settings: &UpstreamSettings,
    store: &Store,
    server: &str,
    keep_max: u64,
) -> Result<Option<Kept>, UpstreamError> {
    let mut connected = connect::connect_to(settings, store, server).await?;
    let kept_from = slot::look_at_slot(&mut connected, settings).await?;
    let kept = match kept_from.map(|kept_from| connected.system.flushed.bytes_since(kept_from)) {
        Some(retained) if retained > keep_max => {
            slot::drop_slot(&mut connected, settings).await?;
            Some(Kept::TooMuch(retained))
        }
        kept => kept.map(Kept::Allowed),
    };
    connected.dialog.terminate().await;
    Ok(kept)
}

/// The slot is looked at so often: the first time at once.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// Longest time for the look at one server. The next attempt to follow one waits for it.
const LOOK_TIME_MAX: Duration = Duration::from_secs(10);
