//! A bug that panics: in a session it ends that session, in the store it ends the store.
//!
//! The panics come from a disk that stands in for the code that would have the bug.

use std::{
    any::Any,
    io::{self, IoSlice},
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use tokio::io::AsyncReadExt;
use walrelay::protocol::frontend::Message;
use walrelay::session::cut::WAL_DATA_BYTES_MAX;
use walrelay::store::{
    Condition, Disk, RealDisk,
    disk::{DirEntry, Directory, DiskFile, Mapping, OpenMode},
};

use crate::support::{Options, PATIENCE, Relay, eventually};

/// What panics, once switched on.
#[derive(Default)]
pub(crate) struct Panics {
    /// Cutting a message out of mapped WAL: done by the task of a session.
    slice: AtomicBool,
    /// A write: done by a thread of the store.
    write: AtomicBool,
}

struct PanickingDisk(Arc<Panics>);

struct PanickingFile(Arc<dyn DiskFile>, Arc<Panics>);

struct PanickingMapping(Arc<dyn Mapping>, Arc<Panics>);

impl Disk for PanickingDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir(path)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(PanickingFile(RealDisk.open(path, mode)?, self.0.clone())))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        RealDisk.unlink(path)
    }

    fn open_dir(&self, path: &Path) -> io::Result<Arc<dyn Directory>> {
        RealDisk.open_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        RealDisk.list(path)
    }

    fn lock(&self, path: &Path, content: &str) -> io::Result<Box<dyn Any + Send + Sync>> {
        RealDisk.lock(path, content)
    }

    fn map(&self, path: &Path, bytes: u64) -> io::Result<Arc<dyn Mapping>> {
        Ok(Arc::new(PanickingMapping(RealDisk.map(path, bytes)?, self.0.clone())))
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        RealDisk.free_bytes(path)
    }
}

impl DiskFile for PanickingFile {
    fn write_at(&self, slices: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        assert!(!self.1.write.load(Ordering::SeqCst), "as a bug in the writer would");
        self.0.write_at(slices, offset)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        self.0.allocate(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn bytes(&self) -> io::Result<u64> {
        self.0.bytes()
    }
}

impl Mapping for PanickingMapping {
    fn slice(&self, range: Range<usize>, keep: Arc<dyn Any + Send + Sync>) -> Option<Bytes> {
        // A session cuts messages; whole segments are cut for their checksum, elsewhere.
        let is_session = range.len() <= usize::try_from(WAL_DATA_BYTES_MAX).unwrap();
        assert!(!(is_session && self.1.slice.load(Ordering::SeqCst)), "as a bug in a session would");
        self.0.slice(range, keep)
    }

    fn is_resident(&self, range: Range<usize>) -> bool {
        self.0.is_resident(range)
    }

    fn populate(&self, range: Range<usize>) -> io::Result<()> {
        self.0.populate(range)
    }
}

async fn relay(panics: &Arc<Panics>) -> Relay {
    let disk = Arc::new(PanickingDisk(panics.clone()));
    Relay::start_with(Options { disk, tail_bytes_max: 1 << 20, ..Options::default() }).await
}

#[tokio::test]
async fn a_panic_in_a_session_ends_that_session_and_no_other() {
    let panics = Arc::<Panics>::default();
    let mut relay = relay(&panics).await;
    let start = relay.start_lsn();
    let mut end = start;
    for _ in 0..6 {
        end = relay.grow(1 << 20);
        let store = &relay.store;
        eventually("written", || store.positions().unwrap().flushed == end).await;
    }
    let mut healthy = relay.client().await;
    healthy.start_streaming(&format!("START_REPLICATION {end} TIMELINE 1")).await;
    let mut victim = relay.client().await;
    let registry = relay.registry.clone();
    eventually("two sessions", || registry.statuses().len() == 2).await;
    panics.slice.store(true, Ordering::SeqCst);
    let command = Message::Query(format!("START_REPLICATION {start} TIMELINE 1").into_bytes().into());
    victim.send(&command).await;
    // Whatever was sent before, even part of a message: the connection ends.
    let mut said = Vec::new();
    let ended = victim.socket.read_to_end(&mut said);
    let _ = tokio::time::timeout(PATIENCE, ended).await.expect("still connected");
    eventually("the victim is forgotten", || registry.statuses().len() == 1).await;
    let next = relay.grow(100_000);
    let (wal, _) = healthy.receive_wal(end, next).await;
    assert!(wal == relay.wal.slice(end, next));
    // Nobody is turned away, either.
    panics.slice.store(false, Ordering::SeqCst);
    let mut another = relay.client().await;
    another.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    let (wal, _) = another.receive_wal(start, next).await;
    assert!(wal == relay.wal.bytes());
}

#[tokio::test]
async fn a_panic_in_the_store_is_its_failure() {
    let panics = Arc::<Panics>::default();
    let mut relay = relay(&panics).await;
    relay.grow(10_000);
    panics.write.store(true, Ordering::SeqCst);
    // The thread that prepares segments may have met the panic before.
    let _ = relay.try_grow(10_000);
    let store = relay.store.clone();
    // The process ends on this condition, as it does after a failed sync.
    eventually("the store has failed", || matches!(store.condition(), Condition::Failed { .. })).await;
    panics.write.store(false, Ordering::SeqCst);
    assert!(store.positions().unwrap().flushed < relay.wal.end(), "acknowledged after a failure");
}
