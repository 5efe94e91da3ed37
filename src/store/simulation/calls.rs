//! The operations of the failing disk.
//!
//! Owns what each call does to the page cache and to what is durable; the faults and the crashes are decided in `disk`.

use std::any::Any;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::disk::{BLOCK, Inode, NameChange, SimDisk, State, apply};
use crate::store::disk::{DirEntry, Directory, Disk, DiskFile, Mapping, OpenMode, write_all_at};

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

fn enospc() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSPC)
}

impl Disk for SimDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.0.lock().dirs.insert(path.to_path_buf());
        Ok(())
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.0.lock();
        let inode = if mode == OpenMode::CreateNew {
            if state.names.contains_key(path) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            state.change()?;
            state.inodes.push(Inode::default());
            let inode = state.inodes.len() - 1;
            state.names.insert(path.to_path_buf(), inode);
            state.pending.push(NameChange::Set { path: path.to_path_buf(), inode });
            inode
        } else {
            state.look()?;
            if mode == OpenMode::ReadFromDisk {
                state.read_fault()?;
            }
            state.named(path)?
        };
        Ok(Arc::new(SimFile { disk: self.clone(), inode }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let before = self.0.lock().before_rename.take();
        if let Some(act) = before {
            act();
        }
        let mut state = self.0.lock();
        let inode = state.named(from)?;
        state.change()?;
        state.names.remove(from);
        if let Some(replaced) = state.names.insert(to.to_path_buf(), inode) {
            state.unnamed(replaced);
        }
        let (from, to) = (from.to_path_buf(), to.to_path_buf());
        state.pending.push(NameChange::Rename { from, to, inode });
        Ok(())
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        let inode = state.named(path)?;
        state.change()?;
        state.names.remove(path);
        state.unnamed(inode);
        state.pending.push(NameChange::Remove { path: path.to_path_buf() });
        Ok(())
    }

    fn open_dir(&self, path: &Path) -> io::Result<Arc<dyn Directory>> {
        self.0.lock().look()?;
        Ok(Arc::new(SimDirectory { disk: self.clone(), path: path.to_path_buf() }))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let state = self.0.lock();
        state.look()?;
        let entries = state.names.iter().filter(|(name, _)| name.parent() == Some(path));
        let entry = |(name, inode): (&PathBuf, &usize)| DirEntry {
            name: name.file_name().unwrap().to_string_lossy().into_owned(),
            bytes: state.inodes[*inode].len,
        };
        Ok(entries.map(entry).collect())
    }

    fn lock(&self, _: &Path, _: &str) -> io::Result<Box<dyn Any + Send + Sync>> {
        let mut state = self.0.lock();
        if std::mem::replace(&mut state.is_locked, true) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(Box::new(()))
    }

    fn is_locked(&self, _: &Path) -> io::Result<bool> {
        Ok(self.0.lock().is_locked)
    }

    fn map(&self, path: &Path, bytes: u64) -> io::Result<Arc<dyn Mapping>> {
        let mut state = self.0.lock();
        state.read_fault()?;
        let inode = state.named(path)?;
        if state.inodes[inode].len < bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Arc::new(SimFile { disk: self.clone(), inode }))
    }

    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        Ok(self.0.lock().free_blocks * BLOCK as u64)
    }
}

struct SimDirectory {
    disk: SimDisk,
    path: PathBuf,
}

impl Directory for SimDirectory {
    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.change()?;
        let errors = state.faults.sync_errors;
        if state.random.per_mille(errors) {
            return Err(eio());
        }
        let in_dir = |change: &NameChange| match change {
            NameChange::Set { path: of, .. } | NameChange::Remove { path: of } => {
                of.parent() == Some(&*self.path)
            }
            NameChange::Rename { to, .. } => to.parent() == Some(&*self.path),
        };
        let (now, later): (Vec<_>, Vec<_>) = std::mem::take(&mut state.pending).into_iter().partition(in_dir);
        state.pending = later;
        for change in now {
            apply(&mut state.durable_names, change);
        }
        Ok(())
    }
}

struct SimFile {
    disk: SimDisk,
    inode: usize,
}

impl SimFile {
    /// Writes up to the end of a block.
    fn write_part(&self, state: &mut State, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let zero = state.zero.clone();
        let inode = &mut state.inodes[self.inode];
        if !inode.is_allocated(offset) {
            state.free_blocks = state.free_blocks.checked_sub(1).ok_or_else(enospc)?;
        }
        let part = (BLOCK - usize::try_from(offset).unwrap() % BLOCK).min(bytes.len());
        inode.write(&bytes[..part], offset, &zero);
        Ok(part)
    }
}

impl DiskFile for SimFile {
    fn write_at(&self, slices: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        let mut state = self.disk.0.lock();
        let survives = state.change()?;
        let faults = state.faults;
        if state.random.per_mille(faults.write_errors) {
            return Err(eio());
        }
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let is_short = !survives || state.random.per_mille(faults.short_writes);
        let wanted = if is_short { 1 + state.random.below_len(total.max(1)) } else { total };
        let mut written = 0;
        for slice in slices {
            let mut rest = &slice[..slice.len().min(wanted - written)];
            while !rest.is_empty() {
                match self.write_part(&mut state, rest, offset + written as u64) {
                    Ok(part) => {
                        written += part;
                        rest = &rest[part..];
                    }
                    Err(error) if written == 0 => return Err(error),
                    Err(_) => return Ok(written),
                }
            }
        }
        if survives { Ok(written) } else { Err(super::disk::crashed()) }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.disk.0.lock();
        state.read_fault()?;
        let inode = &state.inodes[self.inode];
        let part = usize::try_from(inode.len.saturating_sub(offset)).unwrap().min(buffer.len());
        inode.read(&mut buffer[..part], offset);
        Ok(part)
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        // Space without content reads as zeros, which is all that can be told of it; some file systems cannot.
        if self.disk.0.lock().random.is_one_in(4) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        write_all_at(self, &vec![0; usize::try_from(bytes).unwrap()], 0)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let survives = state.change()?;
        let errors = state.faults.sync_errors;
        let is_failing = state.random.per_mille(errors);
        let State { random, inodes, .. } = &mut *state;
        let inode = &mut inodes[self.inode];
        if is_failing {
            // Some of it arrived; all of it counts as clean.
            inode.durable.resize(inode.cache.len(), None);
            for block in std::mem::take(&mut inode.dirty) {
                if random.is_one_in(3) {
                    inode.durable[block] = inode.cache[block].clone();
                }
            }
            return Err(eio());
        }
        inode.sync();
        if survives { Ok(()) } else { Err(super::disk::crashed()) }
    }

    fn bytes(&self) -> io::Result<u64> {
        let state = self.disk.0.lock();
        state.look()?;
        Ok(state.inodes[self.inode].len)
    }
}

/// Bytes cut from a mapping are a copy here; they keep what they were cut from, as the real ones do.
struct Cut(Vec<u8>, #[allow(dead_code, reason = "only lives")] Arc<dyn Any + Send + Sync>);

impl AsRef<[u8]> for Cut {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Mapping for SimFile {
    fn slice(&self, range: Range<usize>, keep: Arc<dyn Any + Send + Sync>) -> Option<Bytes> {
        let state = self.disk.0.lock();
        let inode = &state.inodes[self.inode];
        if range.end as u64 > inode.len {
            return None;
        }
        let mut content = vec![0; range.len()];
        inode.read(&mut content, range.start as u64);
        Some(Bytes::from_owner(Cut(content, keep)))
    }

    fn is_resident(&self, _: Range<usize>) -> bool {
        !self.disk.0.lock().random.is_one_in(3)
    }

    fn populate(&self, _: Range<usize>) -> io::Result<()> {
        self.disk.0.lock().read_fault()
    }

    fn copy(&self, range: Range<usize>) -> io::Result<Bytes> {
        self.disk.0.lock().read_fault()?;
        self.slice(range, Arc::new(())).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}
