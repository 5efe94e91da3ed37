//! One process on the simulated disk, whose parts take their turns one after another.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::Mutant;
use super::disk::SimDisk;
use super::world::{Seen, settings};
use crate::store::control::Identity;
use crate::store::error::{ReadError, StoreError};
use crate::store::flush::{Step, Syncer, Writer};
use crate::store::keeper::Keeper;
use crate::store::open::open;
use crate::store::shared::Shared;
use crate::store::{Access, BlockId, Positions, Read, SlotKind, WalReader, WalWriter};
use crate::wal::builder::WalBuilder;
use crate::wal::{Lsn, LsnRange, TimelineId};

/// A process.
pub(super) struct Live {
    pub(super) shared: Arc<Shared>,
    pub(super) wal_writer: WalWriter,
    writer: Writer,
    syncer: Syncer,
    keeper: Keeper,
    now: Instant,
}

impl Live {
    /// Opens what is on the disk; where that is nothing a store is begun for the timeline `wal`, all of which is kept.
    pub(super) fn start(disk: &SimDisk, wal: &WalBuilder) -> Result<Self, StoreError> {
        let opened = open(settings(), Arc::new(disk.clone()), Arc::new(Seen::default()), Mutant::None)?;
        let shared = opened.shared;
        let mut wal_writer = WalWriter::new(shared.clone(), None, opened.scanner);
        if shared.identity.get().is_none() {
            let context = wal.context();
            let system_id = context.system_id.unwrap();
            let identity = Identity { system_id, segment_size: context.segment_size };
            wal_writer.initialize(identity, TimelineId::FIRST, wal.start())?;
            shared.slots.create("all", SlotKind::Permanent, Some(wal.start())).unwrap();
        }
        Ok(Self {
            wal_writer,
            writer: Writer::new(shared.clone()),
            syncer: Syncer::new(shared.clone()),
            keeper: Keeper::new(shared.clone(), opened.has_reserve),
            now: Instant::now(),
            shared,
        })
    }

    pub(super) fn positions(&self) -> Positions {
        self.shared.positions().unwrap()
    }

    /// Receives up to `end`, in pieces, and makes all of it durable; keeps seals for later if asked to.
    pub(super) fn receive(&mut self, wal: &WalBuilder, end: Lsn, seals: bool) -> Result<(), String> {
        let told = |error: &dyn std::fmt::Display| error.to_string();
        let plan = self.wal_writer.plan().ok_or("nothing to resume from")?;
        self.wal_writer.begin(plan.start).map_err(|error| told(&error))?;
        let mut at = plan.start;
        for block in 1.. {
            let piece_end = at.advance(150_000).min(end);
            if piece_end <= at {
                break;
            }
            let bytes = Bytes::copy_from_slice(wal.slice(at, piece_end));
            self.wal_writer.append(at, bytes, BlockId(block)).map_err(|error| format!("{error:?}"))?;
            at = piece_end;
            self.wal_writer.submit();
            self.work(seals);
        }
        self.work(seals);
        if self.shared.health.has_failed() { Err("the store has failed".to_owned()) } else { Ok(()) }
    }

    pub(super) fn work(&mut self, seals: bool) {
        while self.writer.step() == Step::Worked {}
        while let Some(job) = self.syncer.take() {
            self.syncer.run(&job);
        }
        while seals && self.keeper.step(self.now) == Step::Worked {
            self.now += Duration::from_secs(11);
        }
    }

    /// Reads a range as a client of the timeline would.
    pub(super) fn read(&self, timeline: TimelineId, range: LsnRange) -> Result<Vec<u8>, ReadError> {
        let mut reader = WalReader::new(self.shared.clone(), timeline, Access::Mapped);
        let mut all = Vec::new();
        let mut at = range.start();
        while let Some(part) = LsnRange::new(at, at.advance(128 << 10).min(range.end())) {
            match reader.read(part)? {
                Read::Ready(bytes) => {
                    all.extend(bytes.concat());
                    at = part.end();
                }
                Read::Cold(cold) => cold.load()?,
            }
        }
        Ok(all)
    }
}
