//! The threads of the store: loops over plain steps.
//!
//! Owns when a step runs, nothing of what it does. They stop in order: what was handed over is written, then synced,
//! then the keeper saves what waits. Nobody waits for the scrubber. A step that panics has found a bug: the store has failed.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::store::consumers::Consumers;
use crate::store::error::{NO_SPACE_RETRY_INTERVAL, StoreError};
use crate::store::flush::{Step, Syncer, Writer};
use crate::store::keeper::Keeper;
use crate::store::scrub::Scrubber;
use crate::store::shared::Shared;

/// Longest pause of the keeper.
const KEEPER_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Threads {
    shared: Arc<Shared>,
    stopping: Arc<[AtomicBool; 4]>,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

/// Places in `stopping`.
const WRITER: usize = 0;
const SYNCER: usize = 1;
const KEEPER: usize = 2;
const SCRUBBER: usize = 3;

impl Threads {
    pub(super) fn start(shared: &Arc<Shared>, has_reserve: bool) -> Result<Self, StoreError> {
        let stopping = Arc::<[AtomicBool; 4]>::default();
        let handles = Mutex::default();
        let threads = Self { shared: shared.clone(), stopping, handles };
        let writer = Writer::new(shared.clone());
        threads.spawn("wal writer", WRITER, move |shared, stopping| write_loop(writer, shared, stopping))?;
        let syncer = Syncer::new(shared.clone());
        threads.spawn("wal sync", SYNCER, move |shared, stopping| sync_loop(&syncer, shared, stopping))?;
        let keeper = Keeper::new(shared.clone(), has_reserve);
        threads
            .spawn("segment keeper", KEEPER, move |shared, stopping| keep_loop(keeper, shared, stopping))?;
        if let Some(interval) = shared.settings.scrub_interval {
            let scrubber = Scrubber::new(shared.clone(), interval, Instant::now());
            threads.spawn("scrubber", SCRUBBER, move |shared, stopping| {
                scrub_loop(scrubber, shared, stopping);
            })?;
        }
        Ok(threads)
    }

    fn spawn(
        &self,
        name: &'static str,
        place: usize,
        body: impl FnOnce(&Shared, &AtomicBool) + Send + 'static,
    ) -> Result<(), StoreError> {
        let (shared, stopping) = (self.shared.clone(), self.stopping.clone());
        let guarded = move || {
            let Some(stopping) = stopping.get(place) else { return };
            if catch_unwind(AssertUnwindSafe(|| body(&shared, stopping))).is_err() {
                let reason = io::Error::other(format!("thread \"{name}\" panicked"));
                shared.health.fail("run", &shared.layout.data_dir, &reason);
            }
        };
        let handle = Builder::new()
            .name(name.to_owned())
            .spawn(guarded)
            .map_err(StoreError::io("start a thread for", &self.shared.layout.data_dir))?;
        self.handles.lock().push(handle);
        Ok(())
    }

    /// Finishes what was handed over, and stops.
    pub(super) fn stop(&self) {
        let handles: Vec<_> = self.handles.lock().drain(..).collect();
        let signals = [
            &self.shared.queue.signal,
            &self.shared.unsynced.signal,
            &self.shared.keeper,
            &self.shared.scrubber,
        ];
        for (place, ((handle, stopping), signal)) in
            handles.into_iter().zip(&*self.stopping).zip(signals).enumerate()
        {
            // What was written last may have waited for more, and nothing more is written.
            self.shared.unsynced.gather_no_more();
            stopping.store(true, Ordering::Release);
            signal.notify();
            // It only reads, and ends when the disk has answered, which may be never.
            if place != SCRUBBER {
                // A panic was reported where it happened.
                let _ = handle.join();
            }
        }
    }
}

fn write_loop(mut writer: Writer, shared: &Shared, stopping: &AtomicBool) {
    loop {
        // Read before the step, so that what was handed over before the stop is written.
        let is_stopping = stopping.load(Ordering::Acquire);
        match writer.step() {
            Step::Worked => {}
            Step::Stop => break,
            Step::Idle | Step::Later if is_stopping => break,
            Step::Idle => shared.queue.signal.wait(),
            Step::Later => shared.queue.signal.wait_for(NO_SPACE_RETRY_INTERVAL),
        }
    }
}

fn sync_loop(syncer: &Syncer, shared: &Shared, stopping: &AtomicBool) {
    loop {
        let is_stopping = stopping.load(Ordering::Acquire);
        match syncer.take() {
            Some(job) => {
                let start = Instant::now();
                if syncer.run(&job) == Step::Worked {
                    shared.health.observer.synced(job.bytes, start.elapsed());
                }
            }
            None if is_stopping || shared.health.has_failed() => break,
            None => shared.unsynced.signal.wait(),
        }
    }
}

fn scrub_loop(mut scrubber: Scrubber, shared: &Shared, stopping: &AtomicBool) {
    while !stopping.load(Ordering::Acquire) && !shared.health.has_failed() {
        let pause = scrubber.step(Instant::now());
        if !pause.is_zero() {
            shared.scrubber.wait_for(pause);
        }
    }
}

fn keep_loop(mut keeper: Keeper, shared: &Shared, stopping: &AtomicBool) {
    loop {
        let is_stopping = stopping.load(Ordering::Acquire);
        if is_stopping {
            keeper.stop_preparing();
        }
        match keeper.step(Instant::now()) {
            Step::Worked => {}
            Step::Stop => break,
            Step::Idle | Step::Later if is_stopping => break,
            Step::Idle | Step::Later => shared.keeper.wait_for(KEEPER_INTERVAL),
        }
    }
    if shared.health.has_failed() {
        return;
    }
    let saved = shared.slots.save_now();
    let saved_too = shared.consumers.as_ref().map_or(Ok(()), Consumers::save_now);
    let flushed = shared.positions().map(|positions| positions.flushed);
    let redo_saved = flushed.as_ref().map_or(Ok(()), |flushed| shared.redo.save_now(*flushed));
    let xids_saved = flushed.map_or(Ok(()), |flushed| shared.xids.save_now(flushed));
    for error in [saved, saved_too, redo_saved, xids_saved].into_iter().filter_map(Result::err) {
        shared.health.tell(|observer| observer.housekeeping_failed(&error));
    }
}
