//! The real disk with hooks in it: a test says what happens before the calls it is about, and all calls pass.
//!
//! Unlike the rest of this folder it is made for the library's own traits, so `mod.rs` does not name it; tests that call
//! the store in their own process include it by its path.

use std::any::Any;
use std::io;
use std::io::IoSlice;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use walrelay::store::disk::{DirEntry, Directory, DiskFile, Mapping, OpenMode};
use walrelay::store::{Disk, RealDisk};

/// What happens before a call; nothing, where a test does not say.
pub(crate) trait Hooks: Send + Sync + 'static {
    fn before_write(&self) {}
    /// Of a file, not of a directory.
    fn before_sync(&self) {}
    fn before_rename(&self, _to: &Path) {}
    /// Of a file that is read from the disk alone.
    fn before_direct_read(&self) {}
    fn before_slice(&self, _range: &Range<usize>) {}
    /// Of a range that is copied out of a mapped file.
    fn before_copy(&self) {}
}

pub(crate) struct HookedDisk<H>(pub(crate) Arc<H>);

struct HookedFile<H>(Arc<dyn DiskFile>, OpenMode, Arc<H>);

struct HookedMapping<H>(Arc<dyn Mapping>, Arc<H>);

impl<H: Hooks> Disk for HookedDisk<H> {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir(path)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(HookedFile(RealDisk.open(path, mode)?, mode, self.0.clone())))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.before_rename(to);
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

    fn is_locked(&self, path: &Path) -> io::Result<bool> {
        RealDisk.is_locked(path)
    }

    fn map(&self, path: &Path, bytes: u64) -> io::Result<Arc<dyn Mapping>> {
        Ok(Arc::new(HookedMapping(RealDisk.map(path, bytes)?, self.0.clone())))
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        RealDisk.free_bytes(path)
    }
}

impl<H: Hooks> DiskFile for HookedFile<H> {
    fn write_at(&self, slices: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        self.2.before_write();
        self.0.write_at(slices, offset)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        if self.1 == OpenMode::ReadFromDisk {
            self.2.before_direct_read();
        }
        self.0.read_at(buffer, offset)
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        self.0.allocate(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.2.before_sync();
        self.0.sync()
    }

    fn bytes(&self) -> io::Result<u64> {
        self.0.bytes()
    }
}

impl<H: Hooks> Mapping for HookedMapping<H> {
    fn slice(&self, range: Range<usize>, keep: Arc<dyn Any + Send + Sync>) -> Option<Bytes> {
        self.1.before_slice(&range);
        self.0.slice(range, keep)
    }

    fn is_resident(&self, range: Range<usize>) -> bool {
        self.0.is_resident(range)
    }

    fn populate(&self, range: Range<usize>) -> io::Result<()> {
        self.0.populate(range)
    }

    fn copy(&self, range: Range<usize>) -> io::Result<Bytes> {
        self.1.before_copy();
        self.0.copy(range)
    }
}
