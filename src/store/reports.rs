//! Reports for people: what was set aside, and what is lost for good.
//!
//! Owns the look at the files in the data directory that tell of it, and those of WAL that is lost; `dead_branch` writes the others.
//! A report that lies there is one that nobody has seen to: whoever has moves it away, or removes it. This program removes none,
//! and reads none: all that must be known later is in the names.

use serde::Serialize;

use crate::status::LostWal;
use crate::store::Store;
use crate::store::dead_branch::DIVERGED_REPORT_PREFIX;
use crate::store::disk::replace_durably;
use crate::store::error::StoreError;
use crate::store::shared::Shared;
use crate::wal::{Lsn, TimelineId};

/// What the reports that lie in the data directory tell of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reports {
    /// Something was set aside.
    pub diverged: bool,
    /// The newest of what is lost.
    pub lost: Option<LostWal>,
}

/// Content of a report of WAL that is lost.
#[derive(Serialize)]
struct LostReport {
    /// The timeline that goes on without it.
    timeline: TimelineId,
    from: Lsn,
    to: Lsn,
    bytes: u64,
}

impl Store {
    /// The reports that nobody has seen to. Blocks.
    pub fn reports(&self) -> Result<Reports, StoreError> {
        let Shared { disk, layout, .. } = &*self.shared;
        let dir = &layout.data_dir;
        let entries = disk.list(dir).map_err(StoreError::io("list", dir))?;
        let mut names: Vec<_> = entries.into_iter().map(|entry| entry.name).collect();
        names.retain(|name| name.ends_with(REPORT_SUFFIX));
        names.sort_unstable();
        let diverged = names.iter().any(|name| name.starts_with(DIVERGED_REPORT_PREFIX));
        let lost = names.iter().rev().find_map(|name| lost_by_name(name));
        Ok(Reports { diverged, lost })
    }

    /// Leaves a report of WAL that was acknowledged and is lost, and without which this timeline goes on; durable on return. Blocks.
    pub fn report_lost(&self, timeline: TimelineId, lost: LostWal) -> Result<(), StoreError> {
        let Shared { disk, layout, health, .. } = &*self.shared;
        health.check()?;
        let LostWal { from, to } = lost;
        let report = LostReport { timeline, from, to, bytes: to.bytes_since(from) };
        let content = serde_json::to_vec_pretty(&report).unwrap_or_default();
        let (dir, name) = (&layout.data_dir, lost_name(timeline, lost));
        let written = replace_durably(&**disk, dir, &name, &content);
        written.map_err(StoreError::io("write", &dir.join(&name))).map_err(|error| health.judge(error))
    }
}

fn lost_name(timeline: TimelineId, LostWal { from, to }: LostWal) -> String {
    let (timeline, from, to) = (timeline.get(), from.get(), to.get());
    format!("{LOST_REPORT_PREFIX}{timeline:08X}.{from:016X}.{to:016X}{REPORT_SUFFIX}")
}

fn lost_by_name(name: &str) -> Option<LostWal> {
    let mut parts = name.strip_prefix(LOST_REPORT_PREFIX)?.strip_suffix(REPORT_SUFFIX)?.split('.').skip(1);
    let mut position = || Lsn::new(u64::from_str_radix(parts.next()?, 16).ok()?);
    Some(LostWal { from: position()?, to: position()? })
}

const LOST_REPORT_PREFIX: &str = "walrelay.lost.";

const REPORT_SUFFIX: &str = ".json";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::disk::{Disk, RealDisk, read_small};
    use crate::store::small;

    #[test]
    fn a_report_counts_until_it_is_moved_away_and_the_newest_loss_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _writer) = small::open_in(dir.path());
        assert_eq!(store.reports().unwrap(), Reports::default());
        let lost = |from, to| LostWal { from: Lsn::new(from).unwrap(), to: Lsn::new(to).unwrap() };
        let timeline = |raw| TimelineId::new(raw).unwrap();
        store.report_lost(timeline(10), lost(500, 0x1_0000_0000_0000)).unwrap();
        store.report_lost(timeline(9), lost(600, 700)).unwrap();
        let newest = Some(lost(500, 0x1_0000_0000_0000));
        assert_eq!(store.reports().unwrap(), Reports { diverged: false, lost: newest });
        let of_ten = dir.path().join(lost_name(timeline(10), lost(500, 0x1_0000_0000_0000)));
        let content = read_small(&RealDisk, &of_ten, 1000).unwrap().unwrap();
        assert!(String::from_utf8(content).unwrap().contains("\"from\": \"0/1F4\""));
        RealDisk.unlink(&of_ten).unwrap();
        assert_eq!(store.reports().unwrap().lost, Some(lost(600, 700)));
        let diverged = "walrelay.diverged.00000001.0000000000000200.json";
        replace_durably(&RealDisk, dir.path(), diverged, b"").unwrap();
        assert!(store.reports().unwrap().diverged);
        let diverged = dir.path().join(diverged);
        RealDisk.rename(&diverged, &diverged.with_extension("seen")).unwrap();
        assert!(!store.reports().unwrap().diverged);
    }
}
