//! Oracles: WAL files against the primary's own, tables against tables, heaps against their indexes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::lsn_text;
use super::postgres::Postgres;
use super::process::Program;
use super::wait::wait_at_most;

/// The WAL files of a folder, by start of the segment. Complete files win over partial ones of the same segment.
pub(crate) fn wal_files(folder: &Path, segment_bytes: u64, timeline: u32) -> BTreeMap<u64, PathBuf> {
    let mut files = BTreeMap::new();
    // After a power cut the folder itself may be gone.
    let Ok(entries) = std::fs::read_dir(folder) else { return files };
    for entry in entries {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let (digits, is_partial) =
            name.strip_suffix(".partial").map_or((name, false), |digits| (digits, true));
        if digits.len() != 24 || u32::from_str_radix(&digits[..8], 16) != Ok(timeline) {
            continue;
        }
        let (high, low) = (u64::from_str_radix(&digits[8..16], 16), u64::from_str_radix(&digits[16..], 16));
        let (Ok(high), Ok(low)) = (high, low) else { continue };
        let start = (high << 32) + low * segment_bytes;
        if !is_partial || !files.contains_key(&start) {
            files.insert(start, path);
        }
    }
    files
}

/// End of the last complete segment of the first timeline in a folder; 0 when there is none.
pub(crate) fn completed_end(folder: &Path, segment_bytes: u64) -> u64 {
    let files = wal_files(folder, segment_bytes, 1);
    let complete = files.iter().filter(|(_, path)| path.extension().is_none());
    complete.map(|(start, _)| start + segment_bytes).max().unwrap_or(0)
}

/// Checks that `folder` holds every segment from its first to `upto`, byte for byte as the primary has them. Returns the
/// start of the first.
pub(crate) fn same_wal(
    folder: &Path,
    primary_wal: &Path,
    segment_bytes: u64,
    upto: u64,
) -> Result<u64, String> {
    // A relay that runs may seal (rename) a segment, or remove the oldest, while we look at the names, and between that and
    // the read. A hole is there at every look.
    let patience = std::time::Duration::from_secs(10);
    let mut hole = format!("files in {} are named but not there", folder.display());
    wait_at_most(patience, || match compare_as_listed(folder, primary_wal, segment_bytes, upto) {
        Listed::Same { first } => Some(Ok(first)),
        Listed::Different(complaint) => Some(Err(complaint)),
        Listed::Missing { start } => {
            hole = format!("the segment at {} is missing", lsn_text(start));
            None
        }
        Listed::Gone => None,
    })
    .unwrap_or_else(|| Err(hole.clone()))
}

/// What the files that a listing names were found to be.
enum Listed {
    Same {
        first: u64,
    },
    Different(String),
    /// The listing does not have it.
    Missing {
        start: u64,
    },
    /// The listing has something that was not there any more.
    Gone,
}

/// Name of a segment on the first timeline.
fn segment_name(start: u64, segment_bytes: u64) -> String {
    format!("{:08X}{:08X}{:08X}", 1, start >> 32, (start & 0xFFFF_FFFF) / segment_bytes)
}

fn compare_as_listed(folder: &Path, primary_wal: &Path, segment_bytes: u64, upto: u64) -> Listed {
    let held = wal_files(folder, segment_bytes, 1);
    let original = wal_files(primary_wal, segment_bytes, 1);
    let Some(&first) = held.keys().next() else {
        return Listed::Different(format!("{} holds no WAL", folder.display()));
    };
    let mut start = first;
    while start < upto {
        let Some(file) = held.get(&start) else {
            return Listed::Missing { start };
        };
        // A listing may miss a name while the primary, which goes on, recycles others.
        let by_name = primary_wal.join(segment_name(start, segment_bytes));
        let reference = original.get(&start).unwrap_or(&by_name);
        let wanted = usize::try_from(segment_bytes.min(upto - start)).unwrap();
        let ours = match std::fs::read(file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Listed::Gone,
            content => content.unwrap(),
        };
        let theirs = std::fs::read(reference)
            .unwrap_or_else(|error| panic!("the primary no longer has {}: {error}", lsn_text(start)));
        if ours.len() < wanted {
            return Listed::Different(format!(
                "{} ends at {}, acknowledged was {}",
                file.display(),
                lsn_text(start + ours.len() as u64),
                lsn_text(upto)
            ));
        }
        if let Some(at) = ours[..wanted].iter().zip(&theirs[..wanted]).position(|(a, b)| a != b) {
            return Listed::Different(format!(
                "{} differs at {} (wanted up to {})",
                file.display(),
                lsn_text(start + at as u64),
                lsn_text(upto)
            ));
        }
        start += segment_bytes;
    }
    Listed::Same { first }
}

/// As `same_wal`, and panics.
pub(crate) fn assert_same_wal(folder: &Path, primary: &Postgres, upto: u64) -> u64 {
    same_wal(folder, &primary.wal_dir(), primary.segment_bytes(), upto)
        .unwrap_or_else(|complaint| panic!("{complaint}"))
}

/// The primary's own bytes of a range, from its files.
pub(crate) fn primary_bytes(primary_wal: &Path, segment_bytes: u64, from: u64, upto: u64) -> Vec<u8> {
    primary_bytes_of(primary_wal, segment_bytes, 1, from, upto)
}

/// The bytes of a range in a folder's files of one timeline.
pub(crate) fn primary_bytes_of(
    primary_wal: &Path,
    segment_bytes: u64,
    timeline: u32,
    from: u64,
    upto: u64,
) -> Vec<u8> {
    let files = wal_files(primary_wal, segment_bytes, timeline);
    let mut bytes = Vec::new();
    let mut position = from;
    while position < upto {
        let start = position - position % segment_bytes;
        let file =
            files.get(&start).unwrap_or_else(|| panic!("the primary no longer has {}", lsn_text(start)));
        let end = upto.min(start + segment_bytes);
        let (begin, end_within) =
            (usize::try_from(position - start).unwrap(), usize::try_from(end - start).unwrap());
        // It may get its final name after our look at the names.
        let content = std::fs::read(file).or_else(|_| std::fs::read(file.with_extension(""))).unwrap();
        bytes.extend_from_slice(&content[begin..end_within]);
        position = end;
    }
    bytes
}

/// Name, row count and checksum of every user table.
pub(crate) fn table_checksums(server: &Postgres) -> Vec<(String, String)> {
    let names = server.sql("select coalesce(string_agg(relname, ' ' order by relname), '') from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace");
    let checksum = |name: &str| {
        server.sql(&format!("select count(*) || ' ' || coalesce(sum(('x' || substr(md5(t::text), 1, 15))::bit(60)::bigint), 0) from {name} t"))
    };
    names.split_whitespace().map(|name| (name.to_owned(), checksum(name))).collect()
}

/// Waits for the standby and checks that it has the primary's tables, and indexes that agree with them.
pub(crate) fn assert_equal_clusters(primary: &Postgres, standby: &Postgres) {
    standby.wait_replayed(primary.flushed());
    assert_eq!(table_checksums(primary), table_checksums(standby), "tables differ");
    check_indexes(primary, standby);
}

/// `pg_amcheck --heapallindexed` on a standby, where this major has it (from 14; the extension comes over by replication).
fn check_indexes(primary: &Postgres, standby: &Postgres) {
    let installation = &primary.installation;
    if installation.major < 14 || !installation.has("pg_amcheck") || !installation.has_extension("amcheck") {
        println!("no pg_amcheck for PostgreSQL {}", installation.major);
        return;
    }
    primary.sql("create extension if not exists amcheck");
    standby.wait_replayed(primary.flushed());
    let report = Program::new(installation.program("pg_amcheck"))
        // By its socket, which is there wherever the server's network is.
        .args([
            "--heapallindexed",
            "-h",
            standby.socket_folder().to_str().unwrap(),
            "-U",
            "postgres",
            "-d",
            "postgres",
        ])
        .args(["-p", &standby.port.to_string()])
        .run();
    assert_eq!(report, "", "pg_amcheck complains");
}

/// Runs pg_waldump over a range of a folder; it fails on the first record it cannot read.
pub(crate) fn waldump(server: &Postgres, folder: &Path, from: u64, upto: u64) -> String {
    Program::new(server.installation.program("pg_waldump"))
        .args(["-p", folder.to_str().unwrap(), "-s", &lsn_text(from), "-e", &lsn_text(upto)])
        .run()
}
