//! The few file operations the store needs, and the real ones.
//!
//! `trait Disk` is what the rest of the store sees; `RealDisk` is the only code of this program that touches the file
//! system (the tests put a fault-injecting disk in its place). Calls go through `std` and libc, so that fault injection
//! by LD_PRELOAD reaches them. Decides nothing: what an error means is the caller's business.
#![allow(clippy::disallowed_methods, reason = "this is the one file that owns file access")]

use std::any::Any;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, IoSlice, Seek, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use memmap2::{Advice, Mmap};

/// The operations on directories and names.
pub trait Disk: Send + Sync {
    /// Creates a directory with mode 0700. One that exists may be readable for the owner's group, but not for others; if
    /// it is empty it is closed to all but the owner, else that is an error.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Opens a file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>>;
    /// Renames within one directory; an existing target is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a name.
    fn unlink(&self, path: &Path) -> io::Result<()>;
    /// Opens a directory, to sync it; needs no descriptor later.
    fn open_dir(&self, path: &Path) -> io::Result<Arc<dyn Directory>>;
    /// The ordinary files in a directory; in no order.
    fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>>;
    /// Takes the lock file at `path` for this process and writes `content` into it. [`io::ErrorKind::WouldBlock`] when
    /// another holder exists. The lock ends when the value is dropped, or the process.
    fn lock(&self, path: &Path, content: &str) -> io::Result<Box<dyn Any + Send + Sync>>;
    /// Whether somebody holds the lock file at `path`; makes none.
    fn is_locked(&self, path: &Path) -> io::Result<bool>;
    /// Maps the first `bytes` of a file for reading; the file must have them and must never get shorter.
    fn map(&self, path: &Path, bytes: u64) -> io::Result<Arc<dyn Mapping>>;
    /// Bytes that can still be allocated in the file system of `path`.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
}

/// An open file.
pub trait DiskFile: Send + Sync {
    /// Writes some of the slices at `offset`, as `pwritev`; returns how many bytes.
    fn write_at(&self, slices: &[IoSlice<'_>], offset: u64) -> io::Result<usize>;
    /// Reads some bytes at `offset`, as `pread`; 0 at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Gives the file its length, the space allocated but not written, as `fallocate`. [`io::ErrorKind::Unsupported`] where
    /// the file system cannot.
    fn allocate(&self, bytes: u64) -> io::Result<()>;
    /// Makes the content durable, as `fdatasync`.
    fn sync(&self) -> io::Result<()>;
    /// The length of the file.
    fn bytes(&self) -> io::Result<u64>;
}

/// An open directory.
pub trait Directory: Send + Sync {
    /// Makes the names in it durable, as `fsync`.
    fn sync(&self) -> io::Result<()>;
}

/// A file mapped for reading. Bytes that are still to be written must not be asked for.
pub trait Mapping: Send + Sync {
    /// The bytes of the range, without a copy; `keep` lives as long as they do. `None` when the range is outside.
    fn slice(&self, range: Range<usize>, keep: Arc<dyn Any + Send + Sync>) -> Option<Bytes>;
    /// Whether all of the range is in memory, so that touching it waits for no disk.
    fn is_resident(&self, range: Range<usize>) -> bool;
    /// Brings the range into memory; blocks. A disk error is an error here, not a signal later.
    fn populate(&self, range: Range<usize>) -> io::Result<()>;
    /// Copies the range out of the file, without touching the mapping; blocks. A disk error is an error.
    fn copy(&self, range: Range<usize>) -> io::Result<Bytes>;
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, to read.
    Read,
    /// An existing file, to read what the disk has. The system's copy in memory, which others may just be reading, is neither
    /// read nor changed, if buffers and offsets are multiples of [`DIRECT_READ_BYTES`] and the file system can do so.
    ReadFromDisk,
    /// An existing file, to read and write.
    Write,
    /// A new file (mode 0600), to read and write; an existing one is an error.
    CreateNew,
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DirEntry {
    /// The file's name.
    pub name: String,
    /// The file's length.
    pub bytes: u64,
}

/// The machine's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {
                close_to_others(path)
            }
            other => other,
        }
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true);
        match mode {
            OpenMode::Read => {}
            OpenMode::ReadFromDisk => {
                options.custom_flags(libc::O_DIRECT);
            }
            OpenMode::Write => {
                options.write(true);
            }
            OpenMode::CreateNew => {
                options.write(true).create_new(true).mode(0o600);
            }
        }
        let file = match options.open(path) {
            // The file system has no such way.
            Err(error) if mode == OpenMode::ReadFromDisk && is_invalid(&error) => {
                options.custom_flags(0).open(path)?
            }
            opened => opened?,
        };
        Ok(Arc::new(RealFile(file)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn open_dir(&self, path: &Path) -> io::Result<Arc<dyn Directory>> {
        Ok(Arc::new(RealDirectory(File::open(path)?)))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            // A name that is not UTF-8 is none of ours.
            if let (true, Ok(name)) = (metadata.is_file(), entry.file_name().into_string()) {
                entries.push(DirEntry { name, bytes: metadata.len() });
            }
        }
        Ok(entries)
    }

    fn lock(&self, path: &Path, content: &str) -> io::Result<Box<dyn Any + Send + Sync>> {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::WouldBlock.into()),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // Only for people who look at it; a full disk must not keep the relay from serving what it has.
        let _ =
            file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(content.as_bytes()));
        Ok(Box::new(file))
    }

    fn is_locked(&self, path: &Path) -> io::Result<bool> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            opened => opened?,
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn map(&self, path: &Path, bytes: u64) -> io::Result<Arc<dyn Mapping>> {
        let file = File::open(path)?;
        if file.metadata()?.len() < bytes {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, FILE_IS_SHORT));
        }
        let len = usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: The undefined behaviour to avoid is memory that changes under a `&[u8]`, and a fault on access.
        // Files of the store are never truncated, so every page of the mapping exists as long as the mapping does. Bytes
        // are handed out (`slice`) only for ranges that were written before, and such ranges are not written again: a
        // segment is recycled only when no `Mapping` of it is left. `Bytes` of ranges that are being written do not exist.
        // The exception is what is unproven after a crash, which may be replaced once: whoever has it hands it to the
        // kernel, which copies bytes whatever they are, and nobody computes with them.
        #[allow(unsafe_code, reason = "memmap2 serves reads; see the argument above")]
        let map = unsafe { memmap2::MmapOptions::new().len(len).map(&file)? };
        Ok(Arc::new(RealMapping { map: Arc::new(map), file }))
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let figures = rustix::fs::statvfs(path)?;
        Ok(figures.f_bavail.saturating_mul(figures.f_frsize))
    }
}

struct RealDirectory(File);

impl Directory for RealDirectory {
    fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }
}

/// WAL holds everybody's data. The permissions of a directory with content are somebody's decision, and not changed.
fn close_to_others(path: &Path) -> io::Result<()> {
    if fs::metadata(path)?.permissions().mode() & MODE_FORBIDDEN == 0 {
        return Ok(());
    }
    if fs::read_dir(path)?.next().is_none() {
        return fs::set_permissions(path, Permissions::from_mode(0o700));
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!(
            "data directory \"{}\" has invalid permissions; permissions should be u=rwx (0700) or u=rwx,g=rx (0750)",
            path.display()
        ),
    ))
}

/// As PostgreSQL: the group may read, nobody else may do anything.
const MODE_FORBIDDEN: u32 = 0o027;

struct RealFile(File);

impl DiskFile for RealFile {
    fn write_at(&self, slices: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let count = libc::c_int::try_from(slices.len().min(SLICES_MAX)).unwrap_or(libc::c_int::MAX);
        loop {
            // SAFETY: `IoSlice` is guaranteed to have the layout of `iovec`; the pointer and the count describe the slice
            // that is borrowed for the call; the descriptor is open as long as `self`.
            #[allow(unsafe_code, reason = "std has no stable pwritev")]
            let written = unsafe { libc::pwritev(self.0.as_raw_fd(), slices.as_ptr().cast(), count, offset) };
            match usize::try_from(written) {
                Ok(written) => return Ok(written),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match FileExt::read_at(&self.0, buffer, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What the disk cannot give as it is asked for is read by way of the memory.
                Err(error) if is_invalid(&error) && self.is_direct()? => {
                    let flags = rustix::fs::fcntl_getfl(&self.0)?;
                    rustix::fs::fcntl_setfl(&self.0, flags - rustix::fs::OFlags::DIRECT)?;
                }
                other => return other,
            }
        }
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        let allocate = || rustix::fs::fallocate(&self.0, rustix::fs::FallocateFlags::empty(), 0, bytes);
        Ok(rustix::io::retry_on_intr(allocate)?)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}

impl RealFile {
    fn is_direct(&self) -> io::Result<bool> {
        Ok(rustix::fs::fcntl_getfl(&self.0)?.contains(rustix::fs::OFlags::DIRECT))
    }
}

fn is_invalid(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// No disk wants reads to be multiples of more.
pub const DIRECT_READ_BYTES: usize = 4096;

/// What is told of a segment that somebody cut.
pub(super) const FILE_IS_SHORT: &str = "file is shorter than a segment";

/// Page sizes of the machines PostgreSQL runs on.
const PAGE_SIZE_MIN: usize = 4 << 10;
const PAGE_SIZE_MAX: usize = 64 << 10;

/// Slices that one `pwritev` takes (`IOV_MAX`).
pub(super) const SLICES_MAX: usize = 1024;

struct RealMapping {
    map: Arc<Mmap>,
    file: File,
}

/// What `Bytes` of a mapping own.
struct MappedBytes {
    map: Arc<Mmap>,
    range: Range<usize>,
    _keep: Arc<dyn Any + Send + Sync>,
}

impl AsRef<[u8]> for MappedBytes {
    fn as_ref(&self) -> &[u8] {
        self.map.get(self.range.clone()).unwrap_or_default()
    }
}

impl Mapping for RealMapping {
    fn slice(&self, range: Range<usize>, keep: Arc<dyn Any + Send + Sync>) -> Option<Bytes> {
        self.map.get(range.clone())?;
        Some(Bytes::from_owner(MappedBytes { map: self.map.clone(), range, _keep: keep }))
    }

    fn is_resident(&self, range: Range<usize>) -> bool {
        // A multiple of every page size, so that no question about it is needed; the figures for pages that do not exist
        // on machines with larger ones stay "resident".
        let start = range.start / PAGE_SIZE_MAX * PAGE_SIZE_MAX;
        let Some(bytes) = self.map.get(start..range.end) else { return false };
        let mut pages = vec![1_u8; bytes.len().div_ceil(PAGE_SIZE_MIN)];
        // SAFETY: `bytes` lies in the mapping and begins at a page; `pages` has a byte for each of its pages.
        #[allow(unsafe_code, reason = "no crate in use offers mincore")]
        let result =
            unsafe { libc::mincore(bytes.as_ptr().cast_mut().cast(), bytes.len(), pages.as_mut_ptr()) };
        result == 0 && pages.iter().all(|page| page & 1 == 1)
    }

    fn populate(&self, range: Range<usize>) -> io::Result<()> {
        match self.map.advise_range(Advice::PopulateRead, range.start, range.len()) {
            // Kernels before 5.14 do not know it: reading the file brings the same pages in. "Bad address" means that
            // touching the memory would be a signal: reading the file tells why.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EFAULT)) => {
                self.read_through(range)
            }
            other => other,
        }
    }

    fn copy(&self, range: Range<usize>) -> io::Result<Bytes> {
        let mut copied = vec![0; range.len()];
        FileExt::read_exact_at(&self.file, &mut copied, range.start as u64)?;
        Ok(copied.into())
    }
}

impl RealMapping {
    fn read_through(&self, range: Range<usize>) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 16];
        let mut at = range.start as u64;
        while at < range.end as u64 {
            match FileExt::read_at(&self.file, &mut buffer, at)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => at += read as u64,
            }
        }
        Ok(())
    }
}

/// Whether the error says that space, or a descriptor, could not be had: nothing was changed, and it may pass.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EMFILE | libc::ENFILE))
}

/// Whether a read failed for want of memory or of a descriptor, which says nothing about what was to be read.
pub(super) fn is_read_shortage(error: &io::Error) -> bool {
    is_shortage(error) || matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EAGAIN | libc::EINTR))
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    disk.open_dir(path)?.sync()
}

/// Writes all of `bytes` at `offset`.
pub(super) fn write_all_at(file: &dyn DiskFile, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write_at(&[IoSlice::new(bytes)], offset)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => {
                bytes = bytes.get(written..).unwrap_or_default();
                offset += written as u64;
            }
        }
    }
    Ok(())
}

/// Fills `buffer` from `offset` as far as the file goes; returns how many bytes.
pub(super) fn read_full_at(file: &dyn DiskFile, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

/// Reads a whole small file, at most `bytes_max`; `None` when there is no such file.
pub(super) fn read_small(disk: &dyn Disk, path: &Path, bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
    let file = match disk.open(path, OpenMode::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let bytes = usize::try_from(file.bytes()?).unwrap_or(usize::MAX);
    if bytes > bytes_max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "file is too long"));
    }
    let mut content = vec![0; bytes];
    let read = read_full_at(&*file, &mut content, 0)?;
    content.truncate(read);
    Ok(Some(content))
}

/// Replaces the file `name` in `dir` durably: new content under another name, synced, renamed, directory synced.
pub(super) fn replace_durably(disk: &dyn Disk, dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!("{name}{TEMPORARY_SUFFIX}"));
    match disk.unlink(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = disk.open(&temporary, OpenMode::CreateNew)?;
    if let Err(error) = write_all_at(&*file, content, 0).and_then(|()| file.sync()) {
        // What was allocated for it helps nobody; the next attempt begins anew.
        let _ = disk.unlink(&temporary);
        return Err(error);
    }
    disk.rename(&temporary, &dir.join(name))?;
    // From here on both contents are possible: an error is not a shortage, which would mean the old one.
    sync_dir(disk, dir).map_err(|error| if is_shortage(&error) { io::Error::other(error) } else { error })
}

/// Suffix of files that are being prepared; found at start they are removed.
pub(super) const TEMPORARY_SUFFIX: &str = ".tmp";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_closed_to_others_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        RealDisk.create_dir(&path).unwrap();
        assert_eq!(mode(), 0o700);
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        RealDisk.create_dir(&path).unwrap();
        assert_eq!(mode(), 0o700, "empty: closed");
        fs::write(path.join("file"), "").unwrap();
        for (given, is_right) in
            [(0o750, true), (0o700, true), (0o755, false), (0o770, false), (0o701, false)]
        {
            fs::set_permissions(&path, Permissions::from_mode(given)).unwrap();
            assert_eq!(RealDisk.create_dir(&path).is_ok(), is_right, "{given:o}");
            assert_eq!(mode(), given, "not changed");
        }
    }

    #[test]
    fn vectored_writes_reach_the_file_and_a_mapping_sees_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = RealDisk.open(&path, OpenMode::CreateNew).unwrap();
        write_all_at(&*file, &vec![0; 1 << 20], 0).unwrap();
        let mapping = RealDisk.map(&path, 1 << 20).unwrap();
        let written = file.write_at(&[IoSlice::new(b"ab"), IoSlice::new(b"cd")], 8190).unwrap();
        assert_eq!(written, 4);
        file.sync().unwrap();
        mapping.populate(0..1 << 20).unwrap();
        assert!(mapping.is_resident(0..1 << 20));
        let keep = Arc::new(());
        let bytes = mapping.slice(8190..8194, keep.clone()).unwrap();
        assert_eq!(&bytes[..], b"abcd");
        drop(mapping);
        assert_eq!((&bytes[1..3], Arc::strong_count(&keep)), (&b"bc"[..], 2));
        drop(bytes);
        assert_eq!(Arc::strong_count(&keep), 1);
        assert!(RealDisk.map(&path, 1 << 21).is_err());
    }

    #[test]
    fn a_second_lock_is_refused_until_the_first_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert!(!RealDisk.is_locked(&path).unwrap() && !path.exists(), "looking makes no file");
        let held = RealDisk.lock(&path, "1\n").unwrap();
        assert_eq!(RealDisk.lock(&path, "2\n").err().unwrap().kind(), io::ErrorKind::WouldBlock);
        assert!(RealDisk.is_locked(&path).unwrap());
        drop(held);
        assert!(!RealDisk.is_locked(&path).unwrap());
        RealDisk.lock(&path, "3\n").unwrap();
    }

    #[test]
    fn a_replaced_file_is_old_or_new_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        replace_durably(&RealDisk, dir.path(), "state", b"one").unwrap();
        replace_durably(&RealDisk, dir.path(), "state", b"two").unwrap();
        assert_eq!(read_small(&RealDisk, &dir.path().join("state"), 10).unwrap().unwrap(), b"two");
        assert_eq!(RealDisk.list(dir.path()).unwrap().len(), 1);
        assert!(read_small(&RealDisk, &dir.path().join("state"), 2).is_err());
    }
}
