//! What the HTTP pages show, from the parts that know it.
//!
//! Owns the gathering, nothing of the content: never says more than a part says of itself.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use crate::admin::Pages;
use crate::downstream::{DownstreamContext, link_status};
use crate::metrics::{LinkTraffic, Metrics, ProcessMetrics, SlotSample, StoreMetrics, slot_lines};
use crate::relay::observer::condition_text;
use crate::relay::reload::Reloader;
use crate::status::{
    DamagedSegmentStatus, OnlyCopyStatus, Overview, ReplicationSlotStatus, StoreStatus, UpstreamStatus,
};
use crate::store::{Condition, DeadBranch, Store, WalStatus};

/// What the HTTP pages show.
pub(super) struct RelayPages {
    pub(super) name: String,
    pub(super) store: Store,
    pub(super) status: watch::Receiver<UpstreamStatus>,
    pub(super) only_copy: watch::Receiver<Option<OnlyCopyStatus>>,
    pub(super) downstream: Arc<DownstreamContext>,
    pub(super) registry: Arc<Metrics>,
    pub(super) store_metrics: StoreMetrics,
    pub(super) link_traffic: Arc<LinkTraffic>,
    pub(super) process: ProcessMetrics,
    pub(super) reloader: Arc<Reloader>,
    pub(super) log_lines_dropped: LinesDropped,
}

/// Tells how many log lines were dropped so far.
pub type LinesDropped = Box<dyn Fn() -> usize + Send + Sync>;

impl Pages for RelayPages {
    fn readiness(&self) -> Result<(), String> {
        if let Condition::Failed { .. } = self.store.condition() {
            return Err(condition_text(&self.store.condition()));
        }
        if self.downstream.can_serve() {
            return Ok(());
        }
        Err("nothing is held yet: no upstream has been streamed from".to_owned())
    }

    fn metrics(&self) -> String {
        let dropped = u32::try_from((self.log_lines_dropped)()).unwrap_or(u32::MAX);
        self.process.log_lines_dropped.set(dropped);
        let damaged = u32::try_from(self.store.damaged().len()).unwrap_or(u32::MAX);
        self.store_metrics.damaged_segments.set(damaged);
        let mut page = self.registry.render();
        page.push_str(&slot_lines(&self.slot_samples()));
        page
    }

    fn status(&self) -> serde_json::Value {
        let positions = self.store.positions();
        let overview = Overview {
            name: self.name.clone(),
            version: env!("CARGO_PKG_VERSION"),
            server_version: self.store.facts().map(|facts| facts.version),
            system_identifier: self.store.identity().map(|identity| identity.system_id.to_string()),
            upstream: self.status.borrow().clone(),
            store: StoreStatus {
                condition: condition_text(&self.store.condition()),
                timeline: positions.map(|positions| positions.timeline),
                oldest: self.store.oldest(),
                verified: positions.map(|positions| positions.verified),
                written: positions.map(|positions| positions.written),
                flushed: positions.map(|positions| positions.flushed),
                sealed: positions.and_then(|positions| positions.sealed),
                damaged: self.damaged(),
                dead_branches: self.store.dead_branches().iter().map(DeadBranch::status).collect(),
            },
            only_copy: *self.only_copy.borrow(),
            upstream_link: link_status(&self.link_traffic, Instant::now()),
            links: self.downstream.links.status(),
            reload: self.reloader.status(),
            downstream: self.downstream.registry.statuses(),
            slots: self.downstream.replication_slots(),
            consumers: self.downstream.consumers(),
        };
        serde_json::to_value(overview).unwrap_or_default()
    }
}

impl RelayPages {
    fn slot_samples(&self) -> Vec<SlotSample> {
        let Some(positions) = self.store.positions() else { return Vec::new() };
        let sample = |slot: ReplicationSlotStatus| SlotSample {
            is_active: slot.active,
            is_lost: slot.wal_status == Some(WalStatus::Lost.as_str()),
            // One that is invalid may still have a position, and even stream: nothing is retained for it.
            retained_bytes: slot
                .restart_lsn
                .filter(|_| slot.invalidation_reason.is_none())
                .map(|restart_lsn| positions.written.bytes_since(restart_lsn)),
            safe_wal_bytes: slot.safe_wal_size,
            slot_name: slot.slot_name,
        };
        self.downstream.replication_slots().into_iter().map(sample).collect()
    }

    fn damaged(&self) -> Vec<DamagedSegmentStatus> {
        let Some(size) = self.store.identity().map(|identity| identity.segment_size) else {
            return Vec::new();
        };
        let shown = self.store.damaged().into_iter().map(|damaged| DamagedSegmentStatus {
            segment: damaged.name.file_name(size),
            detail: damaged.detail,
            repair_error: damaged.repair_error,
        });
        shown.collect()
    }
}
