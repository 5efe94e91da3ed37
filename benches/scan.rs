//! Speed of verifying WAL on one core, in bytes of WAL per second.
//!
//! The WAL is a real server's, started for the purpose in a temporary directory (its programs are looked for in
//! `WALRELAY_POSTGRES_BIN`, else in the usual place): that of loading tables, and that of short transactions without
//! full-page images, whose records are the shortest a server writes. Without a server it is built.

#![allow(clippy::disallowed_methods, reason = "a bench reads the server's files")]
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a bench that cannot run may panic")]
#![allow(missing_docs, reason = "the macros of criterion")]

use std::{
    fs,
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use walrelay::wal::{
    Lsn, RecordVisitor, ScanContext, Scanner, SegmentName, SegmentNo, SegmentSize, TimelineId,
    builder::WalBuilder, insight::WalInsight, segment::SegmentFile,
};

criterion_group!(benches, scan);
criterion_main!(benches);

/// Bytes handed to the scanner at a time: about what a socket yields under load.
const PIECE_BYTES: usize = 256 << 10;

struct Sample {
    name: String,
    context: ScanContext,
    start: Lsn,
    bytes: Vec<u8>,
}

fn scan(criterion: &mut Criterion) {
    let samples = Server::start().map_or_else(|| vec![built()], |server| server.samples());
    let mut group = criterion.benchmark_group("scan");
    group.sample_size(30);
    for sample in &samples {
        let insight = scanned(sample, WalInsight::default());
        let records = insight.total().records;
        let average = sample.bytes.len() as u64 / records.max(1);
        println!(
            "{}: {} bytes, {records} records of {average} bytes on average",
            sample.name,
            sample.bytes.len()
        );
        group.throughput(Throughput::Bytes(sample.bytes.len() as u64));
        group.bench_with_input(BenchmarkId::new("verify", &sample.name), sample, |bencher, sample| {
            bencher.iter(|| scanned(sample, ()));
        });
        group.bench_with_input(BenchmarkId::new("insight", &sample.name), sample, |bencher, sample| {
            bencher.iter(|| scanned(sample, WalInsight::default()));
        });
    }
    group.finish();
}

fn scanned<V: RecordVisitor>(sample: &Sample, mut visitor: V) -> V {
    let mut scanner = Scanner::at_segment_start(sample.context, sample.start);
    for piece in sample.bytes.chunks(PIECE_BYTES) {
        scanner.feed(piece, &mut visitor).expect("a server writes valid WAL");
    }
    visitor
}

/// WAL in the proportions of short transactions.
fn built() -> Sample {
    let mut wal = WalBuilder::small();
    while wal.bytes().len() < 64 << 20 {
        for bytes in [40, 180, 60, 40, 8, 90] {
            wal.noise(bytes);
        }
    }
    let (context, start) = (wal.context(), wal.start());
    Sample { name: "built".to_owned(), context, start, bytes: wal.bytes().to_vec() }
}

/// A server with its directory, which both end with it.
struct Server {
    programs: PathBuf,
    directory: tempfile::TempDir,
    user: Option<(u32, u32)>,
}

impl Server {
    fn start() -> Option<Self> {
        let programs = std::env::var_os("WALRELAY_POSTGRES_BIN")
            .map_or_else(|| PathBuf::from("/usr/lib/postgresql/15/bin"), PathBuf::from);
        if !programs.join("initdb").exists() {
            println!("no server in {}: WAL is built", programs.display());
            return None;
        }
        let directory = tempfile::tempdir().ok()?;
        // The server refuses to run as root.
        let is_root = fs::metadata("/proc/self").is_ok_and(|metadata| {
            use std::os::unix::fs::MetadataExt;
            metadata.uid() == 0
        });
        let user = is_root.then(unprivileged_user).flatten();
        if let Some((uid, gid)) = user {
            chown(directory.path(), Some(uid), Some(gid)).ok()?;
        }
        let server = Self { programs, directory, user };
        let data = server.data();
        server.run("initdb", &["-D", data.to_str()?, "-A", "trust", "-U", "bench", "--no-sync"]);
        let settings = format!(
            "listen_addresses = ''\nunix_socket_directories = '{}'\nfsync = off\nsynchronous_commit = off\n\
             full_page_writes = off\nwal_keep_size = '8GB'\nmax_wal_size = '16GB'\nautovacuum = off\n",
            server.directory.path().display()
        );
        fs::write(data.join("postgresql.auto.conf"), settings).ok()?;
        server.run("pg_ctl", &["-D", data.to_str()?, "-l", data.join("log").to_str()?, "-w", "start"]);
        Some(server)
    }

    fn samples(&self) -> Vec<Sample> {
        let host = self.directory.path().to_str().expect("a path in UTF-8");
        let pgbench = |arguments: &[&str]| {
            self.run("pgbench", &[&["-h", host, "-U", "bench"], arguments, &["postgres"]].concat());
        };
        // A switch leaves the server in the segment after the one it completed.
        let switch = || {
            let query = ["-c", "select pg_switch_wal()", "-c", "select pg_current_wal_lsn()", "postgres"];
            let output = self.run("psql", &[&["-h", host, "-U", "bench", "-Atq"][..], &query].concat());
            let position: Lsn = output.lines().last().and_then(|line| line.parse().ok()).expect("a position");
            SegmentNo::holding(position, SegmentSize::DEFAULT)
        };
        let before = switch();
        pgbench(&["-i", "-q", "-s", "10"]);
        let loaded = switch();
        pgbench(&["-n", "-c", "4", "-j", "2", "-t", "40000"]);
        let end = switch();
        vec![self.sample("load", before, loaded), self.sample("transactions", loaded, end)]
    }

    fn sample(&self, name: &str, from: SegmentNo, to: SegmentNo) -> Sample {
        let segments = self.segments();
        let segments = segments.iter().filter(|(name, _)| (from..to).contains(&name.number));
        let (names, bytes): (Vec<_>, Vec<_>) =
            segments.map(|(name, path)| (*name, fs::read(path).expect("a segment"))).unzip();
        let segment_size = SegmentSize::DEFAULT;
        let context =
            ScanContext { segment_size, system_id: None, timeline: TimelineId::FIRST, format: None };
        let start = names.first().and_then(|name| name.number.start(segment_size)).expect("a segment");
        let mut sample = Sample { name: name.to_owned(), context, start, bytes: bytes.concat() };
        // Not the zeros after the switch, which cost next to nothing.
        let used = sample.bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        sample.bytes.truncate(used);
        sample
    }

    /// All segments, in order.
    fn segments(&self) -> Vec<(SegmentName, PathBuf)> {
        let mut segments: Vec<_> = fs::read_dir(self.data().join("pg_wal"))
            .expect("the server's WAL")
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let (name, file) = SegmentName::parse(entry.file_name().to_str()?, SegmentSize::DEFAULT)?;
                (file == SegmentFile::Complete).then(|| (name, entry.path()))
            })
            .collect();
        segments.sort_by_key(|(name, _)| *name);
        segments
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Runs one of the server's programs to its end; returns what it printed.
    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = Command::new(self.programs.join(program));
        command.args(arguments).current_dir(Path::new("/"));
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        let output = command.output().expect("a program of the server");
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let data = self.data();
        let mut command = Command::new(self.programs.join("pg_ctl"));
        command.arg("-D").arg(&data).args(["-m", "immediate", "-w", "stop"]).current_dir("/");
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        let _ = command.output();
    }
}

/// User and group of `postgres`, else of `nobody`.
fn unprivileged_user() -> Option<(u32, u32)> {
    let users = fs::read_to_string("/etc/passwd").ok()?;
    ["postgres", "nobody"].iter().find_map(|wanted| {
        let line = users.lines().find(|line| line.split(':').next() == Some(wanted))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    })
}
