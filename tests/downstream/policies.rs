//! `send = "flushed"`: what is verified and not yet durable here is nobody else's business.

use std::any::Any;
use std::io;
use std::io::IoSlice;
use std::path::Path;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use walrelay::downstream::{DownstreamSettings, SendPolicy};
use walrelay::protocol::replication::PrimaryMessage;
use walrelay::store::disk::{DirEntry, Directory, DiskFile, Mapping, OpenMode};
use walrelay::store::{Disk, RealDisk};

use crate::support::{Options, Relay, eventually, settings};

/// Lets syncs through, or holds them.
#[derive(Default)]
struct Gate {
    is_closed: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn set_closed(&self, is_closed: bool) {
        *self.is_closed.lock() = is_closed;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut is_closed = self.is_closed.lock();
        while *is_closed {
            self.changed.wait(&mut is_closed);
        }
    }
}

/// Opens the gate however a test ends, so that the store's threads can end.
struct Closed(Arc<Gate>);

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.set_closed(false);
    }
}

struct GatedDisk(Arc<Gate>);

struct GatedFile(Arc<dyn DiskFile>, Arc<Gate>);

impl Disk for GatedDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir(path)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(GatedFile(RealDisk.open(path, mode)?, self.0.clone())))
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
        RealDisk.map(path, bytes)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        RealDisk.free_bytes(path)
    }
}

impl DiskFile for GatedFile {
    fn write_at(&self, slices: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        self.0.write_at(slices, offset)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        self.0.allocate(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.1.pass();
        self.0.sync()
    }

    fn bytes(&self) -> io::Result<u64> {
        self.0.bytes()
    }
}

#[tokio::test]
async fn what_is_not_durable_is_neither_sent_nor_told_of() {
    let gate = Arc::new(Gate::default());
    let settings = DownstreamSettings { send: SendPolicy::Flushed, ..settings() };
    let disk = Arc::new(GatedDisk(gate.clone()));
    let mut relay = Relay::start_with(Options { settings, disk, ..Options::default() }).await;
    let (start, durable) = (relay.start_lsn(), relay.grow(50_000));
    let store = relay.store.clone();
    let flushed = || store.positions().unwrap().flushed;
    eventually("the first to be durable", || flushed() == durable).await;

    let closed = Closed(gate.clone());
    gate.set_closed(true);
    let verified = relay.grow(50_000);
    eventually("the second to be written", || store.positions().unwrap().written == verified).await;
    let mut client = relay.client().await;
    let answer = client.query("IDENTIFY_SYSTEM").await;
    assert_eq!(answer.value(2), Some(durable.to_string().as_str()));
    client.start_streaming(&format!("START_REPLICATION {start} TIMELINE 1")).await;
    let (mut wal, _) = client.receive_wal(start, durable).await;
    assert!(wal == relay.wal.slice(start, durable), "more than is durable, or something else");
    for _ in 0..3 {
        // Whatever there was to send comes before the answer.
        client.reply(Some(durable), Some(durable), true).await;
        match client.streamed().await {
            PrimaryMessage::Keepalive(keepalive) => assert_eq!(keepalive.wal_end, Some(durable)),
            PrimaryMessage::WalData(header, _) => panic!("WAL that is not durable: {header:?}"),
        }
    }
    assert_eq!(flushed(), durable, "the gate does not hold");

    drop(closed);
    let (rest, _) = client.receive_wal(durable, verified).await;
    wal.extend(rest);
    assert!(wal == relay.wal.slice(start, verified));
    assert!(flushed() >= verified);
}
