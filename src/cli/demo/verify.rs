//! Whether everybody has what the primary has: tables on the standby, WAL files on the relays.
//!
//! Owns the comparison. Believes nobody's own word: tables are counted and summed on both servers, files are compared
//! byte for byte with the primary's `pg_wal`.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, bail};

use crate::cli::demo::relay::Relay;
use crate::cli::demo::server::{Server, Session};
use crate::wal::{Lsn, SegmentName, SegmentNo, SegmentSize, segment::SegmentFile};

/// How long everybody may take to get everything.
const CATCH_UP_WAIT: Duration = Duration::from_secs(120);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// WAL lies at most this deep below a relay's data directory.
const FOLDER_DEPTH_MAX: u32 = 3;
const CHUNK_BYTES: usize = 1 << 20;
/// What `initdb` makes without being told otherwise.
const SEGMENT_SIZE: SegmentSize = SegmentSize::DEFAULT;

/// What was compared and what differs.
#[derive(Debug, Default)]
pub(super) struct Report {
    equal: Vec<String>,
    differences: Vec<String>,
}

impl Report {
    pub(super) fn is_equal(&self) -> bool {
        self.differences.is_empty() && !self.equal.is_empty()
    }

    pub(super) fn print(&self) {
        for line in &self.equal {
            println!("equal: {line}");
        }
        for line in &self.differences {
            println!("DIFFERENT: {line}");
        }
    }
}

/// Completes the primary's segment, waits until everybody has it, and compares.
pub(super) fn compare(
    primary: &mut Session,
    standby: &mut Session,
    relays: &[&Relay],
    server: &Server,
) -> Result<Report> {
    let end = primary.lsn("SELECT pg_switch_wal()")?.ok_or_else(|| anyhow!("the primary has no WAL"))?;
    let last = SegmentNo::ending_at(end, SEGMENT_SIZE);
    wait_for_standby(standby, end)?;
    let mut report = Report::default();
    report.equal.push(format!("the standby has replayed up to {end}, where the load ended"));
    compare_tables(primary, standby, &mut report)?;
    for relay in relays {
        wait_for_segment(relay, last)?;
        compare_files(relay, last, &server.data_folder().join("pg_wal"), &mut report)?;
    }
    Ok(report)
}

fn wait_for_standby(standby: &mut Session, end: Lsn) -> Result<()> {
    let deadline = Instant::now() + CATCH_UP_WAIT;
    loop {
        let replayed = standby.lsn("SELECT pg_last_wal_replay_lsn()")?;
        if replayed >= Some(end) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let replayed = replayed.map_or_else(|| "nothing".to_owned(), |position| position.to_string());
            bail!("the standby has replayed {replayed}, not {end}, after {} s", CATCH_UP_WAIT.as_secs());
        }
        thread::sleep(POLL_INTERVAL);
    }
}

fn compare_tables(primary: &mut Session, standby: &mut Session, report: &mut Report) -> Result<()> {
    let tables = primary.rows(
        "SELECT quote_ident(relname) FROM pg_class \
         WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY 1",
    )?;
    for table in tables {
        // A sum does not depend on the order of the rows, and numeric does not overflow.
        let sum = format!(
            "SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) FROM {table} t"
        );
        let (here, there) = (primary.row(&sum)?, standby.row(&sum)?);
        let (rows, checksum) = here.split_once('|').unwrap_or((&here, ""));
        if here == there {
            report.equal.push(format!("table {table}: {rows} rows, checksum {checksum}"));
        } else {
            report.differences.push(format!("table {table}: {here} on the primary, {there} on the standby"));
        }
    }
    Ok(())
}

fn wait_for_segment(relay: &Relay, last: SegmentNo) -> Result<()> {
    let deadline = Instant::now() + CATCH_UP_WAIT;
    loop {
        let held = complete_segments(relay.data_folder())?;
        if held.keys().any(|name| name.number >= last) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let held = held
                .keys()
                .next_back()
                .map_or_else(|| "none".to_owned(), |name| name.file_name(SEGMENT_SIZE));
            bail!(
                "the last complete WAL file of {} is {held} after {} s",
                relay.name(),
                CATCH_UP_WAIT.as_secs()
            );
        }
        thread::sleep(POLL_INTERVAL);
    }
}

fn compare_files(relay: &Relay, last: SegmentNo, primary: &Path, report: &mut Report) -> Result<()> {
    let held = complete_segments(relay.data_folder())?;
    let (mut next, mut files) = (None, 0_u32);
    for (name, path) in &held {
        let file_name = name.file_name(SEGMENT_SIZE);
        if next.is_some_and(|next| next != name.number) {
            report.differences.push(format!("{}: a WAL file is missing before {file_name}", relay.name()));
        }
        next = Some(name.number.next());
        match first_difference(&primary.join(&file_name), path)? {
            None => files += 1,
            Some(difference) => {
                report.differences.push(format!("{}: {file_name}: {difference}", relay.name()))
            }
        }
    }
    if !held.keys().any(|name| name.number == last) {
        report.differences.push(format!("{}: the last WAL file of the load is missing", relay.name()));
    }
    if let (Some((first, _)), Some((end, _))) = (held.first_key_value(), held.last_key_value()) {
        let (first, end) = (first.file_name(SEGMENT_SIZE), end.file_name(SEGMENT_SIZE));
        let files = format!("{files} of {} complete WAL files, {first} to {end}", held.len());
        report.equal.push(format!("{}: {files}, byte for byte", relay.name()));
    }
    Ok(())
}

/// The complete WAL files below a relay's data directory.
fn complete_segments(data_folder: &Path) -> Result<BTreeMap<SegmentName, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![(data_folder.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                if depth < FOLDER_DEPTH_MAX {
                    folders.push((entry.path(), depth + 1));
                }
                continue;
            }
            let parsed = entry.file_name().to_str().and_then(|name| SegmentName::parse(name, SEGMENT_SIZE));
            if let Some((name, SegmentFile::Complete)) = parsed {
                found.insert(name, entry.path());
            }
        }
    }
    Ok(found)
}

/// Where two files begin to differ; `None` if nowhere.
fn first_difference(expected: &Path, got: &Path) -> Result<Option<String>> {
    if !expected.exists() {
        return Ok(Some("the primary has no such file".to_owned()));
    }
    let (left, right) = (fs::metadata(expected)?.len(), fs::metadata(got)?.len());
    if left != right {
        return Ok(Some(format!("{right} bytes instead of {left}")));
    }
    let (mut left, mut right) = (fs::File::open(expected)?, fs::File::open(got)?);
    let (mut here, mut there) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut offset = 0;
    loop {
        let (read, same) = (fill(&mut left, &mut here)?, fill(&mut right, &mut there)?);
        let (here, there) = (here.get(..read).unwrap_or_default(), there.get(..same).unwrap_or_default());
        if here != there {
            let at = offset + here.iter().zip(there).take_while(|(left, right)| left == right).count();
            return Ok(Some(format!("differs from the primary's at byte {at}")));
        }
        if read == 0 {
            return Ok(None);
        }
        offset += read;
    }
}

/// Reads until the buffer is full or the file has ended.
fn fill(file: &mut fs::File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while let Some(free) = buffer.get_mut(filled..).filter(|free| !free.is_empty()) {
        match file.read(free)? {
            0 => break,
            bytes => filled += bytes,
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::demo::process::Scratch;

    #[test]
    fn the_first_differing_byte_is_named() {
        let scratch = Scratch::create("walrelay-test").unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = scratch.path().join(name);
            fs::write(&path, content).unwrap();
            path
        };
        let (one, same, other) = (file("one", b"abcd"), file("same", b"abcd"), file("other", b"abXd"));
        assert_eq!(first_difference(&one, &same).unwrap(), None);
        assert_eq!(first_difference(&one, &other).unwrap().unwrap(), "differs from the primary's at byte 2");
        assert_eq!(first_difference(&one, &file("short", b"a")).unwrap().unwrap(), "1 bytes instead of 4");
        let absent = first_difference(&scratch.path().join("absent"), &one).unwrap().unwrap();
        assert_eq!(absent, "the primary has no such file");
    }

    #[test]
    fn a_report_without_any_comparison_is_not_equality() {
        assert!(!Report::default().is_equal());
    }
}
