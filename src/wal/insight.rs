//! What can be learnt from records without replaying them.
//!
//! Owns the layout of the few kinds of records that matter to a relay: ends of transactions (their times are the basis
//! of lag in time), checkpoints, restore points, timeline switches, changes of settings; and the statistics that
//! `pg_waldump --stats` prints. Only verified records get here, so a record that cannot be read is one of a kind that
//! a later server added to: it is counted, and otherwise ignored. The running relay does not feed it yet: verifying alone costs less.

use std::borrow::Cow;

use crate::wal::{
    Lsn, PgTimestamp, TimelineId, WalFormat,
    contents::{Contents, Fields},
    format::CUSTOM_RESOURCE_MANAGER_MIN,
    record::{RMGR_INFO_MASK, Record, RecordVisitor, TRANSACTION_RESOURCE_MANAGER, XLOG_RESOURCE_MANAGER},
};

/// Gathers what is learnt from the records of a scan.
#[derive(Clone, Debug)]
pub struct WalInsight {
    managers: Box<[ResourceManagerStatistics; 256]>,
    commits: u64,
    aborts: u64,
    first_commit: Option<TransactionEnd>,
    last_commit: Option<TransactionEnd>,
    last_checkpoint: Option<Checkpoint>,
    last_restore_point: Option<RestorePoint>,
    last_timeline_switch: Option<TimelineSwitch>,
    last_parameters: Option<ParameterChange>,
}

/// What the records of one resource manager take; as `pg_waldump --stats` counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResourceManagerStatistics {
    /// Number of records.
    pub records: u64,
    /// Bytes of records without full-page images.
    pub record_bytes: u64,
    /// Bytes of full-page images.
    pub image_bytes: u64,
}

/// What a record says, if it is of a kind that is looked into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A transaction was committed, also a prepared one.
    Commit(TransactionEnd),
    /// A transaction was rolled back, also a prepared one.
    Abort(TransactionEnd),
    /// A checkpoint was completed; it may also begin a timeline.
    Checkpoint(Checkpoint),
    /// `pg_create_restore_point` was called.
    RestorePoint(RestorePoint),
    /// A server was promoted.
    EndOfRecovery(TimelineSwitch),
    /// Settings that standbys must follow may have changed.
    ParameterChange(ParameterChange),
}

/// The end of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransactionEnd {
    /// End of its record.
    pub end: Lsn,
    /// By the clock of the server it ran on.
    pub at: PgTimestamp,
}

/// A checkpoint (`CheckPoint`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// End of its record.
    pub end: Lsn,
    /// Taken while the server shut down, or ended recovery: nothing else was written meanwhile.
    pub is_shutdown: bool,
    /// Where replay would begin.
    pub redo: Lsn,
    /// The timeline it is on.
    pub timeline: TimelineId,
    /// The timeline before, if the checkpoint begins one; else the same.
    pub previous_timeline: TimelineId,
    /// The next transaction id when it began, with its epoch in the upper half.
    pub next_xid: Option<u64>,
    /// When it began; a server's clock, in whole seconds. Not read without knowing the format.
    pub at: Option<PgTimestamp>,
}

/// A named point (`xl_restore_point`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestorePoint {
    /// End of its record.
    pub end: Lsn,
    /// When it was made.
    pub at: PgTimestamp,
    /// Its name.
    pub name: String,
}

/// The beginning of a timeline (`xl_end_of_recovery`, or a checkpoint with two timelines).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimelineSwitch {
    /// End of its record.
    pub end: Lsn,
    /// When; a checkpoint tells whole seconds.
    pub at: Option<PgTimestamp>,
    /// The timeline that begins.
    pub timeline: TimelineId,
    /// The timeline that was left.
    pub previous_timeline: TimelineId,
}

/// Settings of the primary of which a standby needs at least as much (`xl_parameter_change`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterChange {
    /// End of its record.
    pub end: Lsn,
    /// `max_connections`.
    pub max_connections: u32,
    /// `max_worker_processes`.
    pub max_worker_processes: u32,
    /// `max_wal_senders`.
    pub max_wal_senders: u32,
    /// `max_prepared_transactions`.
    pub max_prepared_transactions: u32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_transaction: u32,
    /// `wal_level`: 0 minimal, 1 replica, 2 logical.
    pub wal_level: u32,
}

impl Default for WalInsight {
    fn default() -> Self {
        Self {
            managers: Box::new([ResourceManagerStatistics::default(); 256]),
            commits: 0,
            aborts: 0,
            first_commit: None,
            last_commit: None,
            last_checkpoint: None,
            last_restore_point: None,
            last_timeline_switch: None,
            last_parameters: None,
        }
    }
}

impl RecordVisitor for WalInsight {
    fn record(&mut self, record: &Record<'_>) {
        let contents = Contents::of(record);
        let image_bytes = contents.map_or(0, |contents| contents.image_bytes);
        if let Some(manager) = self.managers.get_mut(usize::from(record.header.resource_manager)) {
            manager.records += 1;
            manager.record_bytes += u64::from(record.header.total_bytes).saturating_sub(image_bytes);
            manager.image_bytes += image_bytes;
        }
        if record.header.resource_manager <= TRANSACTION_RESOURCE_MANAGER
            && let Some(contents) = contents
            && let Some(event) = read_event(record, contents.main_data)
        {
            self.remember(event);
        }
    }
}

impl WalInsight {
    /// What the records of each resource manager take; the index is its number.
    pub fn resource_managers(&self) -> &[ResourceManagerStatistics; 256] {
        &self.managers
    }

    /// What all records take.
    pub fn total(&self) -> ResourceManagerStatistics {
        self.managers.iter().fold(ResourceManagerStatistics::default(), |sum, manager| {
            ResourceManagerStatistics {
                records: sum.records + manager.records,
                record_bytes: sum.record_bytes + manager.record_bytes,
                image_bytes: sum.image_bytes + manager.image_bytes,
            }
        })
    }

    /// Number of transactions that were committed.
    pub fn commits(&self) -> u64 {
        self.commits
    }

    /// Number of transactions that were rolled back.
    pub fn aborts(&self) -> u64 {
        self.aborts
    }

    /// The first commit seen.
    pub fn first_commit(&self) -> Option<TransactionEnd> {
        self.first_commit
    }

    /// The last commit seen.
    pub fn last_commit(&self) -> Option<TransactionEnd> {
        self.last_commit
    }

    /// The last checkpoint seen.
    pub fn last_checkpoint(&self) -> Option<Checkpoint> {
        self.last_checkpoint
    }

    /// The last restore point seen.
    pub fn last_restore_point(&self) -> Option<&RestorePoint> {
        self.last_restore_point.as_ref()
    }

    /// The last beginning of a timeline seen.
    pub fn last_timeline_switch(&self) -> Option<TimelineSwitch> {
        self.last_timeline_switch
    }

    /// The last settings seen.
    pub fn last_parameters(&self) -> Option<ParameterChange> {
        self.last_parameters
    }

    fn remember(&mut self, event: Event) {
        match event {
            Event::Commit(commit) => {
                self.commits += 1;
                self.first_commit.get_or_insert(commit);
                self.last_commit = Some(commit);
            }
            Event::Abort(_) => self.aborts += 1,
            Event::Checkpoint(checkpoint) => {
                let Checkpoint { end, at, timeline, previous_timeline, .. } = checkpoint;
                if timeline != previous_timeline {
                    self.last_timeline_switch = Some(TimelineSwitch { end, at, timeline, previous_timeline });
                }
                self.last_checkpoint = Some(checkpoint);
            }
            Event::RestorePoint(point) => self.last_restore_point = Some(point),
            Event::EndOfRecovery(switch) => self.last_timeline_switch = Some(switch),
            Event::ParameterChange(parameters) => self.last_parameters = Some(parameters),
        }
    }
}

impl Event {
    /// What `record` says; `None` if it is not of a kind that is looked into.
    pub fn of(record: &Record<'_>) -> Option<Self> {
        read_event(record, Contents::of(record)?.main_data)
    }
}

/// Whether such a record of a transaction's end is that of a prepared one.
pub(super) fn ends_prepared(info: u8) -> bool {
    matches!(info & TRANSACTION_OPERATION_MASK, TRANSACTION_COMMIT_PREPARED | TRANSACTION_ABORT_PREPARED)
}

fn read_event(record: &Record<'_>, main_data: &[u8]) -> Option<Event> {
    let mut fields = Fields(main_data);
    let end = record.end;
    match (record.header.resource_manager, record.header.info & RMGR_INFO_MASK) {
        (TRANSACTION_RESOURCE_MANAGER, info) => {
            let kind = info & TRANSACTION_OPERATION_MASK;
            let mut transaction = || Some(TransactionEnd { end, at: PgTimestamp(fields.i64()?) });
            match kind {
                TRANSACTION_COMMIT | TRANSACTION_COMMIT_PREPARED => transaction().map(Event::Commit),
                TRANSACTION_ABORT | TRANSACTION_ABORT_PREPARED => transaction().map(Event::Abort),
                _ => None,
            }
        }
        (XLOG_RESOURCE_MANAGER, info @ (XLOG_CHECKPOINT_SHUTDOWN | XLOG_CHECKPOINT_ONLINE)) => {
            let is_shutdown = info == XLOG_CHECKPOINT_SHUTDOWN;
            read_checkpoint(record, fields, is_shutdown).map(Event::Checkpoint)
        }
        (XLOG_RESOURCE_MANAGER, XLOG_PARAMETER_CHANGE) => Some(Event::ParameterChange(ParameterChange {
            end,
            max_connections: fields.u32()?,
            max_worker_processes: fields.u32()?,
            max_wal_senders: fields.u32()?,
            max_prepared_transactions: fields.u32()?,
            max_locks_per_transaction: fields.u32()?,
            wal_level: fields.u32()?,
        })),
        (XLOG_RESOURCE_MANAGER, XLOG_RESTORE_POINT) => {
            let at = PgTimestamp(fields.i64()?);
            let name = fields.0.split(|byte| *byte == 0).next().unwrap_or_default();
            let name = String::from_utf8_lossy(name).into_owned();
            Some(Event::RestorePoint(RestorePoint { end, at, name }))
        }
        (XLOG_RESOURCE_MANAGER, XLOG_END_OF_RECOVERY) => {
            let at = Some(PgTimestamp(fields.i64()?));
            let timeline = TimelineId::new(fields.u32()?)?;
            let previous_timeline = TimelineId::new(fields.u32()?)?;
            Some(Event::EndOfRecovery(TimelineSwitch { end, at, timeline, previous_timeline }))
        }
        _ => None,
    }
}

fn read_checkpoint(record: &Record<'_>, mut fields: Fields<'_>, is_shutdown: bool) -> Option<Checkpoint> {
    let redo = Lsn::from_wire(fields.u64()?)?;
    let timeline = TimelineId::new(fields.u32()?)?;
    let previous_timeline = TimelineId::new(fields.u32()?)?;
    // Between them are 48 bytes up to 18, and 56 since: one more flag, and offsets of multixacts have 64 bits. The next
    // transaction id comes after the first 8 of them.
    let next_xid = fields.0.get(8..).and_then(|rest| Fields(rest).u64());
    let between = record.format.map(|format| if format < WalFormat::V19 { 48 } else { 56 });
    let at = between.and_then(|bytes| {
        fields.skip(bytes)?;
        fields.i64().map(PgTimestamp::from_unix_seconds)
    });
    Some(Checkpoint { end: record.end, is_shutdown, redo, timeline, previous_timeline, next_xid, at })
}

/// The name by which `pg_waldump` calls a resource manager; `None` for numbers no server uses.
pub fn resource_manager_name(id: u8) -> Option<Cow<'static, str>> {
    if id >= CUSTOM_RESOURCE_MANAGER_MIN {
        return Some(Cow::Owned(format!("custom{id:03}")));
    }
    RESOURCE_MANAGER_NAMES.get(usize::from(id)).map(|name| Cow::Borrowed(*name))
}

/// By number, from 0 (`rmgrlist.h`); the last only since 19.
const RESOURCE_MANAGER_NAMES: [&str; 23] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
    "XLOG2",
];

/// `XLOG_XACT_OPMASK`.
const TRANSACTION_OPERATION_MASK: u8 = 0x70;
/// `XLOG_XACT_COMMIT`.
const TRANSACTION_COMMIT: u8 = 0x00;
/// `XLOG_XACT_ABORT`.
const TRANSACTION_ABORT: u8 = 0x20;
/// `XLOG_XACT_COMMIT_PREPARED`.
const TRANSACTION_COMMIT_PREPARED: u8 = 0x30;
/// `XLOG_XACT_ABORT_PREPARED`.
const TRANSACTION_ABORT_PREPARED: u8 = 0x40;

const XLOG_CHECKPOINT_SHUTDOWN: u8 = 0x00;
const XLOG_CHECKPOINT_ONLINE: u8 = 0x10;
const XLOG_PARAMETER_CHANGE: u8 = 0x60;
const XLOG_RESTORE_POINT: u8 = 0x70;
const XLOG_END_OF_RECOVERY: u8 = 0x90;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::{Scanner, builder::WalBuilder};

    fn insight(wal: &WalBuilder) -> WalInsight {
        let mut insight = WalInsight::default();
        let mut scanner = Scanner::at_segment_start(wal.context(), wal.start());
        scanner.feed(wal.bytes(), &mut insight).unwrap();
        insight
    }

    #[test]
    fn ends_of_transactions_are_counted_and_the_last_commit_is_known() {
        let mut wal = WalBuilder::small();
        let first = wal.commit(PgTimestamp(10));
        wal.main_data_record(TRANSACTION_RESOURCE_MANAGER, TRANSACTION_ABORT | 0x80, &[0; 20]);
        wal.main_data_record(TRANSACTION_RESOURCE_MANAGER, 0x50, &[0; 20]);
        let prepared = wal.main_data_record(
            TRANSACTION_RESOURCE_MANAGER,
            TRANSACTION_COMMIT_PREPARED,
            &20_i64.to_le_bytes(),
        );
        let insight = insight(&wal);
        assert_eq!((insight.commits(), insight.aborts()), (2, 1));
        assert_eq!(insight.first_commit(), Some(TransactionEnd { end: first.end(), at: PgTimestamp(10) }));
        assert_eq!(insight.last_commit(), Some(TransactionEnd { end: prepared.end(), at: PgTimestamp(20) }));
        assert_eq!(insight.resource_managers()[1].records, 4);
    }

    #[test]
    fn images_are_told_from_the_rest_of_a_record() {
        let mut wal = WalBuilder::small();
        wal.full_page_image(&[7; 500]);
        wal.full_page_image(&[7; 8000]);
        wal.noise(100);
        let insight = insight(&wal);
        let statistics = insight.resource_managers()[0];
        assert_eq!((statistics.records, statistics.image_bytes), (2, 8500));
        assert_eq!(statistics.record_bytes, 2 * (24 + 4 + 5 + 12 + 4));
        assert_eq!(insight.total().records, 3);
    }

    #[test]
    fn what_the_log_itself_records_is_read() {
        let mut wal = WalBuilder::small();
        let mut checkpoint = Vec::new();
        checkpoint.extend(0x200_0028_u64.to_le_bytes());
        checkpoint.extend([2, 0, 0, 0, 1, 0, 0, 0]);
        checkpoint.extend([0; 8]);
        checkpoint.extend(0x3_0000_02D5_u64.to_le_bytes());
        checkpoint.extend([0; 32]);
        checkpoint.extend(946_684_805_i64.to_le_bytes());
        checkpoint.extend([0; 16]);
        let end = wal.main_data_record(0, XLOG_CHECKPOINT_SHUTDOWN, &checkpoint).end();
        let mut restore_point = 77_i64.to_le_bytes().to_vec();
        restore_point.extend(b"before_migration");
        restore_point.resize(72, 0);
        let named = wal.main_data_record(0, XLOG_RESTORE_POINT, &restore_point).end();
        let settings: Vec<u8> =
            [100_u32, 8, 10, 0, 64, 1].iter().flat_map(|value| value.to_le_bytes()).collect();
        wal.main_data_record(0, XLOG_PARAMETER_CHANGE, &settings);
        let insight = insight(&wal);
        let timeline = TimelineId::new(2).unwrap();
        let previous_timeline = TimelineId::FIRST;
        let at = Some(PgTimestamp(5_000_000));
        let redo = Lsn::new(0x200_0028).unwrap();
        let next_xid = Some(0x3_0000_02D5);
        assert_eq!(
            insight.last_checkpoint(),
            Some(Checkpoint { end, is_shutdown: true, redo, timeline, previous_timeline, next_xid, at })
        );
        assert_eq!(
            insight.last_timeline_switch(),
            Some(TimelineSwitch { end, at, timeline, previous_timeline })
        );
        let point = RestorePoint { end: named, at: PgTimestamp(77), name: "before_migration".to_owned() };
        assert_eq!(insight.last_restore_point(), Some(&point));
        assert_eq!(insight.last_parameters().unwrap().max_wal_senders, 10);
    }

    #[test]
    fn resource_managers_have_the_names_that_pg_waldump_prints() {
        assert_eq!(resource_manager_name(0).unwrap(), "XLOG");
        assert_eq!(resource_manager_name(21).unwrap(), "LogicalMessage");
        assert_eq!(resource_manager_name(60), None);
        assert_eq!(resource_manager_name(128).unwrap(), "custom128");
    }
}
