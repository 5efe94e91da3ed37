//! The store: WAL on disk.
//!
//! People trust their only copy of the last second of their data to this folder. It writes what the upstream sends, says
//! how far it is durable, and gives it back. It knows records only as something that verifies; it knows no sockets and no
//! protocol. Time comes in as an argument, the disk as [`Disk`], so that a simulation can drive the very code that runs
//! in production through every crash it can think of (`simulation/`).
//!
//! # On disk
//!
//! ```text
//! data_dir/                      0700; files 0600
//!   walrelay.lock                held by the process that has the directory
//!   walrelay.control             whose WAL: system identifier, segment size, timeline and its ancestors, where it begins,
//!                                what the upstream is, dead branches; a state file (see `state`)
//!   walrelay.slots               permanent replication slots; a state file
//!   walrelay.fence               whether the relay is fenced; a state file
//!   walrelay.mock_nonce          what salts of users that do not exist come from; a state file, made once
//!   walrelay.consumers           consumers without a slot for which WAL is kept; a state file
//!   walrelay.checkpoint          the newest checkpoint in the WAL that is held; a state file
//!   walrelay.xids                the next transaction id at some place in it; a state file
//!   walrelay.windows             WAL that was acknowledged while it was durable here alone; a state file
//!   walrelay.only_copy           since when WAL is nowhere but here; a state file
//!   walrelay.upstream            what slots on the upstream do not tell of what was acknowledged; a state file
//!   walrelay.segments            checksum of every complete segment (see `index`)
//!   walrelay.diverged.*.json     what was in WAL that a promotion left behind (see `dead_branch`)
//!   walrelay.lost.*.json         WAL that was acknowledged and will not come back (see `reports`)
//!   wal/
//!     000000010000000000000007            a complete segment, exactly as the primary has it
//!     000000010000000000000008.partial    being written; there can be several
//!     00000002.history                    a history file, exactly as the primary has it
//!     walrelay.spare.0000000000000003     of segment size, holds nothing: becomes a segment
//!     walrelay.reserve                    the same, for recovery alone
//!     *.detached                          set aside by recovery, for a person to look at
//!     *.diverged                          WAL beyond where its timeline was left, that nobody goes on with
//!   *.tmp                        being prepared
//! ```
//!
//! A complete segment never changes. A `.partial` has valid WAL up to some position, and behind it anything. Files are
//! never truncated: they may be mapped. The segment in which a timeline was left goes on under the next one's name, with a
//! copy of its beginning; under the old name it stays `.partial`.
//!
//! # Threads
//!
//! ```text
//!  upstream task          "wal writer"             "wal sync"             "segment keeper"
//!  WalWriter::append  ──▶ flush::Writer        ──▶ flush::Syncer      ──▶ keeper::Keeper
//!  compare, verify,       pwritev straight from     fdatasync, and         index entry, final name, directory sync;
//!  tail                   the received bytes        fsync of wal/          slots, old segments, spares
//!  publishes verified     publishes written         publishes flushed      publishes sealed
//! ```
//!
//! While one batch is synced, the next is written. The keeper is behind everything: nothing waits for it, but for the
//! spare that a new segment is made of.
//!
//! # What is promised
//!
//! *flushed* is the end of WAL that was verified, written, and synced by this process, its file's name included; or that
//! recovery has written anew and synced. After a failed sync or write nobody knows what the disk holds: the condition is
//! `Failed`, nothing moves any more, and the process ends, for a restart into recovery. Space that cannot be had is
//! waited for, with the bytes in hand: nothing is lost by it.
//!
//! # What nothing proves
//!
//! Records are proved by their checksums, but two kinds of bytes belong to no whole record: the rest of one that began
//! before what is held, and one that was never completed (XLOG_OVERWRITE_CONTRECORD follows). A power cut may tear them
//! before their first sync, and recovery walks over them. It therefore keeps a list of those that it has found in what it
//! wrote anew (`unproven`). Until they are proved:
//!
//! - they are held, counted and served as they are: behind them lies WAL that may have been acknowledged. A standby
//!   passes over the record that was never completed, and checks the other if it has the beginning;
//! - no segment with a part of them is sealed, so that no wrong byte gets a checksum and a final name;
//! - the upstream is asked for WAL from the first of them on ([`ResumePlan`]). Bytes of theirs that differ are replaced,
//!   once all that is held was delivered again, verified, and is the same everywhere else. Positions are reported
//!   upstream when the replacements are synced. Then all are proved, at once.
//!
//! If the upstream has not got that WAL any more, the session begins further on, as it would without them; when it has
//! compared what it can, they are left as they are and the segments are sealed. The upstream's task says so.
//!
//! # What a crash leaves
//!
//! K: the process is killed, the page cache stays. P: the power fails, and of what was not synced any part may be there,
//! sectors torn, names old or new. `simulation::exhaustive` ends a life at every single change to the disk, both ways.
//!
//! | When | What is left | What recovery does |
//! | --- | --- | --- |
//! | first start, before the control file has its name | an index, a `.tmp`; no control file | a fresh directory: nothing was claimed |
//! | begun anew elsewhere, with nothing held | the old control file or the new one; no `.partial` under the new | begins where the control file says |
//! | while a state file is replaced | the old one or the new one, perhaps a `.tmp` | takes it; removes the `.tmp` |
//! | while a spare or the reserve is made | a file that is too short, or a `.tmp` | removes it |
//! | spare renamed to `.partial`, `wal/` not synced | P: the spare's old name, or the new one; the content may be there under either | nothing in it was claimed; a spare is a spare |
//! | batch written, not synced | K: in the page cache only. P: any of its sectors | walks the records to the last that verifies, copies that much to a new file, syncs, renames, syncs `wal/`; only then are positions reported |
//! | synced, not yet reported | all of it | as above: reports it now |
//! | the same, after XLOG_SWITCH, in a segment that was used before | some of the zeros, then anything | writes the rest of the zeros: the record says that there is nothing else |
//! | the same, with bytes in it that no checksum covers | P: those may be torn where all around them is whole | keeps them, and the list of them: unproven, as above |
//! | unproven bytes replaced, not synced, or synced and not yet told | a `.partial` with the old bytes, the new ones, or a mixture | finds them to be unproven as before |
//! | sync failed | K: the page cache shows what the disk may not have, and another sync would not say so. P: part of it | as above: only what is written anew counts |
//! | a record goes on over several segments | several `.partial`; P: perhaps not all their names | those with valid WAL are copied; those behind its end become spares |
//! | complete to its end, not sealed | a `.partial` full of valid WAL | copies it like any other; the keeper seals it |
//! | index entry written, not synced or torn | an entry that does not verify, or none | the segment is still `.partial`; the entry is written again |
//! | index entry synced, segment not renamed | an entry for a `.partial` | as complete to its end |
//! | renamed to its final name, `wal/` not synced | P: either name | as above, or complete; `wal/` is synced before positions are reported |
//! | old segment renamed to a spare, `wal/` not synced | P: either name, the content whole | it is the oldest: still held, or a spare. It is not written to before `wal/` is synced |
//! | old segment removed, `wal/` not synced | P: it is there again | still held; removed again |
//! | index rewritten | the old one or the new one | entries without a file mean nothing; a file without an entry is verified and entered |
//! | a damaged segment's content comes again | a `.tmp`; the damaged segment, as before | removes the `.tmp`; the damage is found again |
//! | the `.tmp` renamed to the segment's name, `wal/` not synced | P: the damaged segment, or the whole one | as above, or nothing is left to be done |
//! | a timeline's first segment made, with a copy of what is held before the fork | under the new timeline's name, perhaps; the control file names the old one | goes on with the old timeline, and removes the copy; the next switch makes it anew |
//! | the control file names the new timeline, the old one's files as they were | heads of records that never became whole, or a dead branch, under WAL names; P: either control file | as above; or removes the heads, and sets the dead branch aside as the control file tells it |
//! | a dead branch set aside, `wal/` not synced | P: any of its files under either name | sets aside those that are left |
//! | slot saved | the old file or the new one | a slot never points before WAL that was removed by it: retention goes by the lower of what is saved and what is in memory |
//! | slot invalidated | the old file or the new one | valid, and all its WAL is there; or invalid, and the WAL may go. WAL goes only after the file |
//! | consumers saved | the old file or the new one | what the old one says may have gone: it is a wish, and none that was granted |
//! | newest checkpoint saved | the old file or the new one | a slot begins at an older checkpoint, and keeps more than it must, until the next one comes |
//! | what slots on the upstream do not tell saved | the old file or the new one | nothing: WAL is neither kept nor served by it |
//! | spare given up to the disk budget | the spare, or not | a spare is a spare |
//! | during recovery | as before, the reserve perhaps used up or holding anything | begins again, with a sync of `wal/`; what it reads is never what it writes to |
//! | disk full | any of the above | the reserve is there to copy into, and the copied file's space comes back |
//!
//! What no crash leaves is not repaired in silence: a hole among complete segments, a `.partial` beside its complete
//! segment, a newest segment with another checksum. The pieces that cannot be served are set aside under another name,
//! [`Store::recovery_notes`] says so, and the upstream is asked again for what follows the last position that is proved.
//! An older segment with another checksum is found when it is read: it is not served ([`ReadError::Suspect`]).
//!
//! # Damage
//!
//! A complete segment that is not what was written, has gone, or cannot be read is damaged ([`Store::damaged`]): so are the
//! segments of a hole, if the index has the checksums of all of them. The upstream's task fetches it again
//! ([`Store::begin_repair`]). Only content with the checksum of what was written takes its place, by a rename: sessions
//! that have the old file mapped keep that. A shortage of memory or descriptors is no damage.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

mod budget;
mod catalog;
mod checkpoint;
mod consumers;
mod control;
mod dead_branch;
pub mod disk;
mod error;
mod fence;
mod flush;
mod health;
mod held;
mod histories;
mod holes;
mod index;
mod initialize;
mod inventory;
mod keeper;
mod mapping;
mod mock_nonce;
mod only_copy;
mod open;
mod overlap;
mod partials;
mod pool;
mod positions;
mod queue;
mod reader;
mod recovery;
mod redo;
mod repair;
mod reports;
mod retention;
mod rewrite;
mod scrub;
mod shared;
#[cfg(test)]
mod simulation;
mod slot_limits;
mod slots;
#[cfg(test)]
pub(crate) mod small;
mod state;
mod switch;
mod tail;
mod threads;
mod unfollowed;
mod unproven;
mod upstream_memory;
mod walk;
mod windows;
mod writer;
mod xids;

pub use checkpoint::SlotState;
pub use consumers::{CONSUMERS_MAX, ConsumerGuard};
pub use control::{Identity, ServerFacts, unique_name};
pub use dead_branch::DeadBranch;
pub use disk::{Disk, RealDisk};
pub use error::{AppendError, Condition, NO_SPACE_RETRY_INTERVAL, ReadError, StoreError};
pub use fence::{Fence, FencedDirectory, MustHold, durable_fence, fence_directory, is_open};
pub use health::{Observer, SlotCause, SlotNotice};
pub use mock_nonce::MOCK_NONCE_BYTES;
pub use only_copy::OnlyCopySince;
pub use positions::Positions;
pub use reader::{Access, ColdRead, Read, WalReader};
pub use repair::{DamagedSegment, SegmentRepair};
pub use reports::Reports;
pub use slot_limits::{InvalidationReason, RetentionLimits, WalStatus};
pub use slots::{SlotError, SlotGuard, SlotInfo, SlotKind, SlotTable, WhenInvalid};
pub use tail::{BlockId, RECEIVE_BLOCK_BYTES};
pub use upstream_memory::UpstreamMemory;
pub use windows::AcknowledgedAlone;
pub use writer::{ResumePlan, WalWriter};

use fence::FenceFile;
use only_copy::OnlyCopyFile;
use shared::Shared;
use threads::Threads;
use upstream_memory::UpstreamMemoryFile;
use windows::WindowsFile;

use crate::wal::{FullXid, Lineage, Lsn, TimelineId};

/// How a store is to work.
#[derive(Clone, Debug)]
pub struct StoreSettings {
    /// The directory; made if its parent exists.
    pub data_dir: PathBuf,
    /// WAL kept for consumers without a slot, in bytes.
    pub wal_keep_size: u64,
    /// Memory for the newest WAL.
    pub tail_bytes_max: u64,
    /// Received bytes that may wait to be written.
    pub unwritten_bytes_max: u64,
    /// Segment files kept ready; of segments that are no longer needed, twice as many.
    pub spare_segments: u32,
    /// Segments for which space stays free before anybody may demand that more WAL be kept.
    pub reserve_segments: u32,
    /// Most slots, permanent and temporary.
    pub max_replication_slots: usize,
    /// Time within which every complete segment is read again and compared; `None`: only when somebody wants it.
    pub scrub_interval: Option<Duration>,
    /// What may be kept for consumers, and for how long.
    pub limits: RetentionLimits,
}

/// Opens the store of a data directory: recovers what is there, and starts the threads.
pub fn open(
    settings: StoreSettings,
    disk: Arc<dyn Disk>,
    observer: Arc<dyn Observer>,
) -> Result<(Store, WalWriter), StoreError> {
    let opened = open::open(settings, disk, observer, open::Variant::default())?;
    let fence = FenceFile::read(&*opened.shared.disk, &opened.shared.layout)?;
    let windows = WindowsFile::read(&opened.shared)?;
    let only_copy = OnlyCopyFile::read(&opened.shared)?;
    let upstream_memory = UpstreamMemoryFile::read(&opened.shared)?;
    let threads = Threads::start(&opened.shared, opened.has_reserve)?;
    let handle = Arc::new(StoreHandle { threads, _lock: opened.lock });
    let writer = WalWriter::new(opened.shared.clone(), Some(handle.clone()), opened.scanner);
    // What recovery found counts as news.
    opened.shared.publish(|_| ());
    let notes = opened.notes.into();
    Ok((Store { shared: opened.shared, handle, notes, fence, windows, only_copy, upstream_memory }, writer))
}

/// The threads and the lock; both end with the last of the store and its writer.
struct StoreHandle {
    threads: Threads,
    _lock: Box<dyn Any + Send + Sync>,
}

impl Drop for StoreHandle {
    fn drop(&mut self) {
        self.threads.stop();
    }
}

/// The WAL that is held; clones are the same store.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    handle: Arc<StoreHandle>,
    notes: Arc<[String]>,
    fence: FenceFile,
    windows: WindowsFile,
    only_copy: OnlyCopyFile,
    upstream_memory: UpstreamMemoryFile,
}

impl Store {
    /// Whose WAL this is; `None` in a fresh directory.
    pub fn identity(&self) -> Option<Identity> {
        self.shared.identity.get().copied()
    }

    /// How far the store is; `None` in a fresh directory.
    pub fn positions(&self) -> Option<Positions> {
        *self.shared.positions.lock()
    }

    /// Whether nothing that is held may still be replaced by what the upstream has there.
    pub fn is_settled(&self) -> bool {
        self.shared.unproven.is_empty()
    }

    /// Whether WAL can be made durable.
    pub fn condition(&self) -> Condition {
        self.shared.health.condition()
    }

    /// What recovery did that somebody should know, one line each.
    pub fn recovery_notes(&self) -> &[String] {
        &self.notes
    }

    /// What was remembered of the upstream.
    pub fn facts(&self) -> Option<ServerFacts> {
        self.shared.control.lock().as_ref().and_then(|control| control.facts.clone())
    }

    /// Remembers what the upstream said about itself; durable on return. Blocks.
    pub fn remember_facts(&self, facts: ServerFacts) -> Result<(), StoreError> {
        self.shared.health.check()?;
        let Shared { disk, layout, .. } = &*self.shared;
        if self.facts().as_ref() == Some(&facts) {
            // Whatever else is on its way to the disk is not waited for.
            return Ok(());
        }
        // Others may look at what is remembered while it is written.
        let _file = self.shared.control_file.lock();
        let mut control = self.shared.control.lock().clone().ok_or(StoreError::NotInitialized)?;
        control.check_owner(&**disk, layout)?;
        control.facts = Some(facts);
        control.write(&**disk, layout).map_err(|error| self.shared.health.judge(error))?;
        *self.shared.control.lock() = Some(control);
        Ok(())
    }

    /// Start of the oldest segment that is held, of the current timeline or an ancestor.
    pub fn oldest(&self) -> Option<Lsn> {
        self.shared.oldest()
    }

    /// Start of the oldest segment of which the upstream can be asked on the current timeline: older ones are its ancestors'.
    pub fn begin(&self) -> Option<Lsn> {
        self.shared.begin()
    }

    /// The line of segments that leads to the current timeline; `None` in a fresh directory.
    pub fn lineage(&self) -> Option<Lineage> {
        self.shared.lineage().ok()
    }

    /// A reader of one timeline's WAL, for one consumer.
    pub fn reader(&self, timeline: TimelineId, access: Access) -> WalReader {
        WalReader::new(self.shared.clone(), timeline, access)
    }

    /// The transaction id that the primary gives out next, as far as the WAL that is held tells; `None` where that does not.
    pub fn next_xid(&self) -> Option<FullXid> {
        self.shared.xids.next()
    }

    /// The replication slots.
    pub fn slots(&self) -> &SlotTable {
        &self.shared.slots
    }

    /// A session of a consumer without a slot, for which WAL is kept from what it reports on; `None` if none is for such.
    pub fn consumer(&self, application_name: &str) -> Option<ConsumerGuard> {
        self.shared.consumers.as_ref().map(|consumers| consumers.session(application_name))
    }

    /// The consumers without a slot for which WAL is kept: name, from where on, and whether it is connected.
    pub fn consumers(&self) -> Vec<(String, Lsn, bool)> {
        self.shared.consumers.as_ref().map(|consumers| consumers.list()).unwrap_or_default()
    }

    /// Memory that the tail keeps alive, in bytes.
    pub fn tail_bytes(&self) -> u64 {
        self.shared.tail.lock().memory_bytes()
    }

    /// Memory held by what was received and is not yet written, in bytes.
    pub fn unwritten_bytes(&self) -> u64 {
        self.shared.queue.unwritten_bytes()
    }

    /// Bytes that can still be allocated on the disk. Blocks.
    pub fn free_bytes(&self) -> Option<u64> {
        self.shared.disk.free_bytes(&self.shared.layout.wal_dir).ok()
    }

    /// Finishes writes and syncs, and stops the threads. Blocks. What is held can still be read.
    pub fn shutdown(&self) {
        self.handle.threads.stop();
    }
}
