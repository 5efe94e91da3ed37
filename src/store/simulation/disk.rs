//! A disk that fails on purpose, as disks do.
//!
//! Owns the difference between what processes see (the page cache, and names as they are) and what is durable: content
//! per sector of 512 bytes once the file is synced, names once their directory is. A power cut keeps, drops or tears what
//! was not durable, at random; a kill keeps the page cache. A failed sync marks pages clean, so that the next one lies.
//! Space runs out on demand. Everything follows from one seed.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::random::Random;

pub(super) const BLOCK: usize = 4096;
const SECTOR: usize = 512;

pub(super) type Block = Arc<[u8; BLOCK]>;

/// A disk that is far from full.
const FREE_BLOCKS: u64 = 1 << 40;

#[derive(Clone, Default)]
pub(super) struct Inode {
    pub len: u64,
    durable_len: u64,
    /// `None`: never allocated.
    pub cache: Vec<Option<Block>>,
    pub durable: Vec<Option<Block>>,
    pub dirty: BTreeSet<usize>,
}

pub(super) enum NameChange {
    Set { path: PathBuf, inode: usize },
    Remove { path: PathBuf },
    Rename { from: PathBuf, to: PathBuf, inode: usize },
}

/// What goes wrong while it is set.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    /// Per thousand file and directory syncs.
    pub sync_errors: u64,
    /// Per thousand writes.
    pub write_errors: u64,
    /// Per thousand writes that take only a part.
    pub short_writes: u64,
    /// Per thousand reads and populations of mappings.
    pub read_errors: u64,
    /// What those say; without it that the disk failed.
    pub read_errno: Option<i32>,
}

pub(super) struct State {
    pub random: Random,
    pub inodes: Vec<Inode>,
    pub dirs: BTreeSet<PathBuf>,
    pub names: BTreeMap<PathBuf, usize>,
    pub durable_names: BTreeMap<PathBuf, usize>,
    pub pending: Vec<NameChange>,
    pub is_locked: bool,
    pub faults: Faults,
    /// Blocks that can still be allocated.
    pub free_blocks: u64,
    operations: u64,
    crash_at: Option<u64>,
    has_crashed: bool,
    pub zero: Block,
    /// What another thread does just before a file gets another name.
    pub before_rename: Option<Box<dyn FnOnce() + Send>>,
}

/// See the module; clones share it.
#[derive(Clone)]
pub(super) struct SimDisk(pub Arc<Mutex<State>>);

/// How the machine or the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Crash {
    /// The process is gone; what it wrote is in the page cache.
    Kill,
    /// Only what is durable is left for sure.
    PowerCut,
}

impl SimDisk {
    pub(super) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            random: Random::new(seed),
            inodes: Vec::new(),
            dirs: BTreeSet::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            pending: Vec::new(),
            is_locked: false,
            faults: Faults::default(),
            free_blocks: FREE_BLOCKS,
            operations: 0,
            crash_at: None,
            has_crashed: false,
            zero: Arc::new([0; BLOCK]),
            before_rename: None,
        })))
    }

    pub(super) fn set_faults(&self, faults: Faults) {
        self.0.lock().faults = faults;
    }

    pub(super) fn faults(&self) -> Faults {
        self.0.lock().faults
    }

    /// Others fill the disk, but for so many blocks; or leave it.
    pub(super) fn set_free_blocks(&self, blocks: Option<u64>) {
        self.0.lock().free_blocks = blocks.unwrap_or(FREE_BLOCKS);
    }

    pub(super) fn is_filled(&self) -> bool {
        self.0.lock().free_blocks < FREE_BLOCKS / 2
    }

    /// Changes made so far.
    pub(super) fn operations(&self) -> u64 {
        self.0.lock().operations
    }

    /// Everything fails from the change after so many more on; that one may or may not be made.
    pub(super) fn crash_after(&self, operations: u64) {
        let mut state = self.0.lock();
        state.crash_at = Some(state.operations + operations);
    }

    /// Another thread does this just before the next file gets another name.
    pub(super) fn before_rename(&self, act: impl FnOnce() + Send + 'static) {
        self.0.lock().before_rename = Some(Box::new(act));
    }

    /// The process that had the directory is gone.
    pub(super) fn unlock(&self) {
        self.0.lock().is_locked = false;
    }

    pub(super) fn has_crashed(&self) -> bool {
        self.0.lock().has_crashed
    }

    /// The process has ended, or the machine: what the next one finds.
    pub(super) fn restart(&self, crash: Crash) {
        let mut state = self.0.lock();
        (state.crash_at, state.has_crashed, state.is_locked) = (None, false, false);
        match crash {
            Crash::Kill => state.evict(),
            Crash::PowerCut => state.cut_power(),
        }
    }

    /// The content of a file as processes see it.
    pub(super) fn content(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.0.lock();
        let inode = state.inodes.get(*state.names.get(path)?)?;
        let mut content = vec![0; usize::try_from(inode.len).unwrap()];
        inode.read(&mut content, 0);
        Some(content)
    }

    /// Somebody edits a file, and it stays so.
    pub(super) fn tamper(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut content = self.content(path).unwrap();
        change(&mut content);
        self.put(path, &content);
    }

    /// Somebody puts a file there, and it stays.
    pub(super) fn put(&self, path: &Path, content: &[u8]) {
        let mut state = self.0.lock();
        let zero = state.zero.clone();
        let number = state.inodes.len();
        state.inodes.push(Inode::default());
        state.names.insert(path.to_path_buf(), number);
        state.durable_names.insert(path.to_path_buf(), number);
        let inode = &mut state.inodes[number];
        for (index, block) in content.chunks(BLOCK).enumerate() {
            inode.write(block, (index * BLOCK) as u64, &zero);
        }
        inode.sync();
    }

    /// Somebody removes a file, and it stays so.
    pub(super) fn remove(&self, path: &Path) {
        let mut state = self.0.lock();
        state.names.remove(path).unwrap();
        state.durable_names.remove(path);
    }

    pub(super) fn has_file_with_two_names(&self) -> bool {
        let state = self.0.lock();
        let inodes: BTreeSet<_> = state.names.values().collect();
        inodes.len() < state.names.len()
    }

    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.0.lock().names.keys().cloned().collect()
    }
}

impl Inode {
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) {
        let mut done = 0;
        while done < buffer.len() {
            let at = usize::try_from(offset).unwrap() + done;
            let (block, within) = (at / BLOCK, at % BLOCK);
            let part = (BLOCK - within).min(buffer.len() - done);
            match self.cache.get(block).and_then(Option::as_ref) {
                Some(content) => {
                    buffer[done..done + part].copy_from_slice(&content[within..within + part]);
                }
                None => buffer[done..done + part].fill(0),
            }
            done += part;
        }
    }

    /// Writes within one block.
    pub(super) fn write(&mut self, bytes: &[u8], offset: u64, zero: &Block) {
        let at = usize::try_from(offset).unwrap();
        let (block, within) = (at / BLOCK, at % BLOCK);
        if self.cache.len() <= block {
            self.cache.resize(block + 1, None);
        }
        let slot = self.cache[block].get_or_insert_with(|| zero.clone());
        if bytes.len() == BLOCK && bytes == &zero[..] {
            *slot = zero.clone();
        } else {
            Arc::make_mut(slot)[within..within + bytes.len()].copy_from_slice(bytes);
        }
        self.dirty.insert(block);
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    pub(super) fn is_allocated(&self, offset: u64) -> bool {
        self.cache.get(usize::try_from(offset).unwrap() / BLOCK).is_some_and(Option::is_some)
    }

    pub(super) fn sync(&mut self) {
        self.durable.resize(self.cache.len(), None);
        for block in std::mem::take(&mut self.dirty) {
            self.durable[block] = self.cache[block].clone();
        }
        self.durable_len = self.len;
    }

    fn durable_block(&self, block: usize) -> Option<&Block> {
        self.durable.get(block).and_then(Option::as_ref)
    }
}

impl State {
    /// Counts a change. `Err`: the process is gone; `Ok(false)`: it is, right after this change.
    pub(super) fn change(&mut self) -> io::Result<bool> {
        if self.has_crashed {
            return Err(crashed());
        }
        self.operations += 1;
        if self.crash_at.is_some_and(|at| self.operations > at) {
            self.has_crashed = true;
            return if self.random.is_one_in(2) { Err(crashed()) } else { Ok(false) };
        }
        Ok(true)
    }

    pub(super) fn look(&self) -> io::Result<()> {
        if self.has_crashed { Err(crashed()) } else { Ok(()) }
    }

    pub(super) fn read_fault(&mut self) -> io::Result<()> {
        self.look()?;
        if !self.random.per_mille(self.faults.read_errors) {
            return Ok(());
        }
        Err(self.faults.read_errno.map_or_else(eio, io::Error::from_raw_os_error))
    }

    /// The file lost a name; without any its space is free.
    pub(super) fn unnamed(&mut self, inode: usize) {
        if !self.names.values().any(|named| *named == inode) {
            self.free_blocks += self.inodes[inode].cache.iter().flatten().count() as u64;
        }
    }

    pub(super) fn named(&self, path: &Path) -> io::Result<usize> {
        self.names.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Clean pages that a failed sync left different from the disk may be dropped at any time.
    fn evict(&mut self) {
        let is_evicting = self.random.is_one_in(3);
        for inode in self.inodes.iter_mut().filter(|_| is_evicting) {
            for block in 0..inode.cache.len() {
                let is_same = match (&inode.cache[block], inode.durable_block(block)) {
                    (Some(cache), Some(durable)) => Arc::ptr_eq(cache, durable),
                    (cache, durable) => cache.is_none() && durable.is_none(),
                };
                if !is_same && !inode.dirty.contains(&block) {
                    inode.cache[block] = inode.durable_block(block).cloned();
                }
            }
        }
    }

    fn cut_power(&mut self) {
        let Self { random, inodes, zero, .. } = self;
        for inode in inodes.iter_mut() {
            inode.durable.resize(inode.cache.len(), None);
            if inode.durable_len < inode.len {
                let grown = random.below(inode.len - inode.durable_len + 1);
                inode.durable_len =
                    [inode.durable_len, inode.durable_len + grown, inode.len][random.below_len(3)];
            }
            let fate = random.below(4);
            for block in std::mem::take(&mut inode.dirty) {
                let Some(new) = inode.cache[block].clone() else { continue };
                match fate {
                    0 => {}
                    1 => inode.durable[block] = Some(new),
                    _ => {
                        let slot = inode.durable[block].get_or_insert_with(|| zero.clone());
                        tear(Arc::make_mut(slot), &new, random);
                    }
                }
            }
            inode.cache = inode.durable.clone();
            inode.len = inode.durable_len;
        }
        self.lose_names();
    }

    fn lose_names(&mut self) {
        let fate = self.random.below(4);
        let pending = std::mem::take(&mut self.pending);
        let prefix = self.random.below_len(pending.len() + 1);
        for (index, change) in pending.into_iter().enumerate() {
            let is_kept = match fate {
                0 => false,
                1 => true,
                2 => index < prefix,
                _ => self.random.is_one_in(2),
            };
            if is_kept {
                apply(&mut self.durable_names, change);
            }
        }
        self.names = self.durable_names.clone();
    }
}

/// Each sector is old or new; one may be half of each.
fn tear(old: &mut [u8; BLOCK], new: &[u8; BLOCK], random: &mut Random) {
    for sector in (0..BLOCK).step_by(SECTOR) {
        let end = match random.below(8) {
            0..=2 => 0,
            3 => random.below_len(SECTOR),
            _ => SECTOR,
        };
        old[sector..sector + end].copy_from_slice(&new[sector..sector + end]);
    }
}

pub(super) fn apply(names: &mut BTreeMap<PathBuf, usize>, change: NameChange) {
    match change {
        NameChange::Set { path, inode } => {
            names.insert(path, inode);
        }
        NameChange::Remove { path } => {
            names.remove(&path);
        }
        NameChange::Rename { from, to, inode } => {
            names.remove(&from);
            names.insert(to, inode);
        }
    }
}

pub(super) fn crashed() -> io::Error {
    io::Error::other("the process is gone")
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}
