//! WAL for consumers without a slot, by their `application_name`.
//!
//! Owns the list of names and what each has reported as flushed last. WAL is kept from there on while a session of the name
//! lasts, and for a configured time after it. The list is in `walrelay.consumers`, saved as the slots' positions are; time
//! is counted anew from a restart on. Never keeps more than slots may, and is given up before any slot.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::store::control::Layout;
use crate::store::disk::Disk;
use crate::store::error::StoreError;
use crate::store::health::Health;
use crate::store::state::StateFile;
use crate::wal::{Lsn, SegmentNo, SegmentSize};

/// The consumers without a slot; clones share them.
#[derive(Clone)]
pub(super) struct Consumers(Arc<Inner>);

struct Inner {
    disk: Arc<dyn Disk>,
    layout: Layout,
    health: Arc<Health>,
    /// How long WAL is kept after the last session of a name.
    time: Duration,
    list: Mutex<List>,
}

#[derive(Default)]
struct List {
    by_name: BTreeMap<String, Consumer>,
    next_session: u64,
    /// What the file says.
    saved: BTreeMap<String, Lsn>,
    saved_at: Option<Instant>,
}

/// One name.
struct Consumer {
    /// Reported last, by whichever session.
    flush: Lsn,
    /// What its living sessions have reported.
    sessions: BTreeMap<u64, Lsn>,
    /// When the keeper first saw that there is none.
    ended_at: Option<Instant>,
}

#[derive(Serialize, Deserialize)]
struct SavedConsumer {
    application_name: String,
    flush: Lsn,
}

const CONSUMERS_FILE: StateFile = StateFile { name: "walrelay.consumers", magic: *b"WRCONSU\0", version: 1 };

/// Most names for which WAL is kept. Others get none until a name's time is over.
pub const CONSUMERS_MAX: usize = 64;

/// Longest time for which a position is only in memory.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);

impl Consumers {
    /// `None` if nothing is kept for consumers without a slot. What an earlier process kept is taken over.
    pub(super) fn open(
        disk: Arc<dyn Disk>,
        layout: Layout,
        health: Arc<Health>,
        time: Option<Duration>,
    ) -> Result<Option<Self>, StoreError> {
        let Some(time) = time else { return Ok(None) };
        let read: Vec<SavedConsumer> = CONSUMERS_FILE.read(&*disk, &layout.data_dir)?.unwrap_or_default();
        let mut list = List::default();
        for SavedConsumer { application_name, flush } in read.into_iter().take(CONSUMERS_MAX) {
            list.saved.insert(application_name.clone(), flush);
            let consumer = Consumer { flush, sessions: BTreeMap::new(), ended_at: None };
            list.by_name.insert(application_name, consumer);
        }
        Ok(Some(Self(Arc::new(Inner { disk, layout, health, time, list: Mutex::new(list) }))))
    }

    /// A session begins to count.
    pub(super) fn session(&self, application_name: &str) -> ConsumerGuard {
        let mut list = self.0.list.lock();
        list.next_session += 1;
        ConsumerGuard {
            consumers: self.clone(),
            application_name: application_name.to_owned(),
            session: list.next_session,
        }
    }

    /// Forgets the names whose time is over; whether there was one.
    pub(super) fn expire(&self, now: Instant) -> bool {
        let mut list = self.0.list.lock();
        let before = list.by_name.len();
        list.by_name.retain(|_, consumer| {
            if !consumer.sessions.is_empty() {
                return true;
            }
            let ended_at = *consumer.ended_at.get_or_insert(now);
            now.saturating_duration_since(ended_at) < self.0.time
        });
        list.by_name.len() < before
    }

    /// From where on WAL is kept.
    pub(super) fn oldest_needed(&self) -> Option<Lsn> {
        self.0.list.lock().by_name.values().map(Consumer::needed).min()
    }

    /// What lies behind `fork` is not held any more.
    pub(super) fn cut(&self, fork: Lsn) {
        for consumer in self.0.list.lock().by_name.values_mut() {
            consumer.flush = consumer.flush.min(fork);
            for flush in consumer.sessions.values_mut() {
                *flush = (*flush).min(fork);
            }
        }
    }

    /// What is held begins at `oldest` and ends at `end`: from before it nothing can be kept, and who is ahead of it may need what
    /// comes next.
    pub(super) fn settle(&self, oldest: Lsn, end: Lsn) {
        for consumer in self.0.list.lock().by_name.values_mut() {
            consumer.flush = consumer.flush.max(oldest).min(end);
        }
    }

    /// Names, and from where on WAL is kept for each.
    pub(super) fn list(&self) -> Vec<(String, Lsn, bool)> {
        let list = self.0.list.lock();
        let row = |(name, consumer): (&String, &Consumer)| {
            (name.clone(), consumer.needed(), !consumer.sessions.is_empty())
        };
        list.by_name.iter().map(row).collect()
    }

    /// Saves the list if it is time: a name has come or gone, or has passed a segment, or some time has passed. Blocks.
    pub(super) fn save_if_due(&self, now: Instant, size: SegmentSize) -> Result<(), StoreError> {
        let segments = |positions: &BTreeMap<String, Lsn>| -> Vec<(String, SegmentNo)> {
            positions.iter().map(|(name, at)| (name.clone(), SegmentNo::holding(*at, size))).collect()
        };
        let current = {
            let list = self.0.list.lock();
            let current = list.positions();
            let is_due =
                list.saved_at.is_none_or(|saved| now.saturating_duration_since(saved) >= SAVE_INTERVAL);
            if current == list.saved || !(is_due || segments(&current) != segments(&list.saved)) {
                return Ok(());
            }
            current
        };
        self.save(current)?;
        self.0.list.lock().saved_at = Some(now);
        Ok(())
    }

    /// Saves the list. Blocks.
    pub(super) fn save_now(&self) -> Result<(), StoreError> {
        let current = {
            let list = self.0.list.lock();
            let current = list.positions();
            if current == list.saved {
                return Ok(());
            }
            current
        };
        self.save(current)
    }

    fn save(&self, positions: BTreeMap<String, Lsn>) -> Result<(), StoreError> {
        let Inner { disk, layout, health, .. } = &*self.0;
        health.check()?;
        let row =
            |(name, flush): (&String, &Lsn)| SavedConsumer { application_name: name.clone(), flush: *flush };
        let rows: Vec<_> = positions.iter().map(row).collect();
        CONSUMERS_FILE.write(&**disk, &layout.data_dir, &rows).map_err(|error| health.judge(error))?;
        self.0.list.lock().saved = positions;
        Ok(())
    }
}

impl List {
    fn positions(&self) -> BTreeMap<String, Lsn> {
        self.by_name.iter().map(|(name, consumer)| (name.clone(), consumer.needed())).collect()
    }
}

impl Consumer {
    /// A name stands for one consumer: while it has sessions, what they report counts, and no longer what one before did.
    fn needed(&self) -> Lsn {
        self.sessions.values().min().copied().unwrap_or(self.flush)
    }
}

/// A session of a consumer without a slot; its end is the beginning of the time for which WAL is kept.
pub struct ConsumerGuard {
    consumers: Consumers,
    application_name: String,
    session: u64,
}

impl ConsumerGuard {
    /// The consumer has everything before `flush` durably. False if nothing is kept for it, because there are too many
    /// names already.
    pub fn advance(&self, flush: Lsn) -> bool {
        let mut list = self.consumers.0.list.lock();
        if !list.by_name.contains_key(&self.application_name) && list.by_name.len() >= CONSUMERS_MAX {
            return false;
        }
        let consumer = list.by_name.entry(self.application_name.clone()).or_insert_with(|| Consumer {
            flush,
            sessions: BTreeMap::new(),
            ended_at: None,
        });
        (consumer.flush, consumer.ended_at) = (flush, None);
        consumer.sessions.insert(self.session, flush);
        true
    }

    /// The consumer's timeline was left at `fork`: what it reported of beyond, after the store had gone over, does not count.
    pub fn put_back(&self, fork: Lsn) {
        let mut list = self.consumers.0.list.lock();
        let Some(consumer) = list.by_name.get_mut(&self.application_name) else { return };
        if let Some(flush) = consumer.sessions.get_mut(&self.session) {
            *flush = (*flush).min(fork);
            consumer.flush = consumer.flush.min(fork);
        }
    }
}

impl Drop for ConsumerGuard {
    fn drop(&mut self) {
        let mut list = self.consumers.0.list.lock();
        if let Some(consumer) = list.by_name.get_mut(&self.application_name) {
            consumer.sessions.remove(&self.session);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::store::disk::RealDisk;
    use crate::store::small::Deaf;

    const MINUTE: Duration = Duration::from_secs(60);

    fn consumers(dir: &Path) -> Consumers {
        let health = Arc::new(Health::new(Arc::new(Deaf)));
        Consumers::open(Arc::new(RealDisk), Layout::new(dir), health, Some(MINUTE)).unwrap().unwrap()
    }

    fn at(raw: u64) -> Lsn {
        Lsn::new(raw).unwrap()
    }

    #[test]
    fn wal_is_kept_while_a_session_lasts_and_for_a_time_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let (consumers, now) = (consumers(dir.path()), Instant::now());
        let session = consumers.session("barman");
        assert_eq!(consumers.oldest_needed(), None, "nothing is kept before the first report");
        assert!(session.advance(at(100)));
        consumers.expire(now + 100 * MINUTE);
        assert_eq!(consumers.oldest_needed(), Some(at(100)));
        drop(session);
        consumers.expire(now + 100 * MINUTE);
        consumers.expire(now + 101 * MINUTE - Duration::from_millis(1));
        assert_eq!(consumers.oldest_needed(), Some(at(100)));
        let again = consumers.session("barman");
        consumers.expire(now + 100 * MINUTE);
        again.advance(at(200));
        assert_eq!(consumers.oldest_needed(), Some(at(200)));
        drop(again);
        consumers.expire(now + 200 * MINUTE);
        assert!(consumers.expire(now + 201 * MINUTE));
        assert_eq!(consumers.oldest_needed(), None);
    }

    #[test]
    fn of_two_sessions_of_a_name_the_one_behind_counts() {
        let dir = tempfile::tempdir().unwrap();
        let consumers = consumers(dir.path());
        let (behind, ahead) = (consumers.session("walreceiver"), consumers.session("walreceiver"));
        behind.advance(at(100));
        ahead.advance(at(200));
        assert_eq!(consumers.oldest_needed(), Some(at(100)));
        drop(behind);
        assert_eq!(consumers.oldest_needed(), Some(at(200)));
    }

    #[test]
    fn what_is_kept_is_within_what_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let first = consumers(dir.path());
        for (name, flush) in [("behind", 99), ("ahead", 501)] {
            first.session(name).advance(at(flush));
        }
        first.save_now().unwrap();
        let second = consumers(dir.path());
        second.settle(at(100), at(500));
        let kept = second.list().into_iter().map(|(name, restart_lsn, _)| (name, restart_lsn));
        let within = [("ahead".to_owned(), at(500)), ("behind".to_owned(), at(100))];
        assert_eq!(kept.collect::<Vec<_>>(), within);
    }

    #[test]
    fn what_is_reported_of_a_dead_branch_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let consumers = consumers(dir.path());
        let session = consumers.session("barman");
        session.put_back(at(50));
        assert_eq!(consumers.oldest_needed(), None);
        session.advance(at(100));
        consumers.cut(at(80));
        session.advance(at(90));
        session.put_back(at(80));
        assert_eq!(consumers.oldest_needed(), Some(at(80)));
        drop(session);
        assert_eq!(consumers.oldest_needed(), Some(at(80)));
    }

    #[test]
    fn names_are_bounded_and_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let size = SegmentSize::new(1 << 20).unwrap();
        let (first, now) = (consumers(dir.path()), Instant::now());
        let sessions: Vec<_> = (0..CONSUMERS_MAX).map(|n| first.session(&n.to_string())).collect();
        for (session, raw) in sessions.iter().zip(1..) {
            assert!(session.advance(at(raw)));
        }
        assert!(!first.session("one too many").advance(at(1)));
        first.save_if_due(now, size).unwrap();
        assert_eq!(first.list().len(), CONSUMERS_MAX);

        let second = consumers(dir.path());
        assert_eq!(second.list().len(), CONSUMERS_MAX);
        assert_eq!(second.oldest_needed(), Some(at(1)));
        assert!(!second.expire(now + 1000 * MINUTE), "the time begins anew");
        assert!(second.expire(now + 1001 * MINUTE));
        second.save_now().unwrap();
        assert!(consumers(dir.path()).list().is_empty());
    }
}
