//! The smallest store, for tests that need one and test something else.
//!
//! Owns its settings, and an observer that does nothing. Never part of the program.

use std::path::Path;
use std::sync::Arc;

use crate::store::{
    Condition, Observer, Positions, RealDisk, RetentionLimits, Store, StoreSettings, WalWriter, open,
};

pub(crate) struct Deaf;

impl Observer for Deaf {
    fn positions_changed(&self, _: Positions) {}
    fn condition_changed(&self, _: Condition) {}
}

/// The store of a folder that need not exist.
pub(crate) fn open_in(data_dir: &Path) -> (Store, WalWriter) {
    open_for(data_dir, Arc::new(Deaf))
}

/// The same, for somebody who wants to hear of it.
pub(crate) fn open_for(data_dir: &Path, observer: Arc<dyn Observer>) -> (Store, WalWriter) {
    let settings = StoreSettings {
        data_dir: data_dir.to_owned(),
        wal_keep_size: 0,
        tail_bytes_max: 1 << 20,
        unwritten_bytes_max: 1 << 20,
        spare_segments: 1,
        reserve_segments: 0,
        max_replication_slots: 1,
        scrub_interval: None,
        limits: RetentionLimits::default(),
    };
    open(settings, Arc::new(RealDisk), observer).unwrap()
}
