//! The upstream's slot while WAL is not streamed by it.
//!
//! What is acknowledged by standbys far away says when commits may return; what the primary must keep for us is another
//! matter, and ends where WAL is durable here. So with such a policy the stream uses no slot, and the slot is moved by SQL.
//! Owns that second connection. Must never move the slot beyond what was compared with the upstream and is durable here.

use std::time::Duration;

use tokio::sync::watch;

use crate::conninfo::{Conninfo, ProcessSurroundings};
use crate::upstream::UpstreamError;
use crate::upstream::dial::log_in;
use crate::upstream::dialog::Dialog;
use crate::wal::Lsn;

/// Moves the slot as long as it is polled.
pub(super) struct SlotAdvance {
    /// For SQL.
    pub(super) conninfo: Conninfo,
    /// The host of the stream.
    pub(super) host: String,
    pub(super) slot: String,
    /// What is durable here; `None` until it was compared with the upstream.
    pub(super) durable: watch::Receiver<Option<Lsn>>,
}

impl SlotAdvance {
    /// Never comes back.
    pub(super) async fn run(mut self) {
        let mut dialog = None;
        let mut advanced_to = None;
        let mut told = None;
        loop {
            let durable = *self.durable.borrow_and_update();
            if let Some(durable) = durable.filter(|durable| advanced_to.is_none_or(|to| *durable > to)) {
                match self.advance(&mut dialog, durable).await {
                    Ok(()) => (advanced_to, told) = (Some(durable), None),
                    Err(error) => {
                        dialog = None;
                        let text = error.chain();
                        if told.as_ref() != Some(&text) {
                            tracing::warn!(slot = self.slot, error = %text, "could not advance the replication slot on the upstream");
                            told = Some(text);
                        }
                    }
                }
                tokio::time::sleep(ADVANCE_INTERVAL).await;
            }
            if self.durable.changed().await.is_err() {
                // The stream has ended, and with it this.
                std::future::pending().await
            }
        }
    }

    async fn advance(&self, dialog: &mut Option<Dialog>, durable: Lsn) -> Result<(), UpstreamError> {
        let dialog = match dialog {
            Some(dialog) => dialog,
            None => dialog.insert(self.connect().await?),
        };
        // The name holds nothing that would have to be quoted.
        let text = format!(
            "SELECT pg_catalog.pg_replication_slot_advance('{}', '{durable}'::pg_catalog.pg_lsn)",
            self.slot
        );
        dialog.query_text(&text).await.map(drop)
    }

    async fn connect(&self) -> Result<Dialog, UpstreamError> {
        let mut conninfo = self.conninfo.clone();
        conninfo.reread_passwords(&ProcessSurroundings);
        let host = conninfo.hosts.iter().find(|host| host.to_string() == self.host);
        log_in(&conninfo, host.ok_or(UpstreamError::NoHost)?).await
    }
}

/// The slot is moved at most so often.
const ADVANCE_INTERVAL: Duration = Duration::from_secs(1);
