//! `cargo bench --bench link [-- --quick] [-- bulk live links relay]`: what compressed links cost, and what they save.
//!
//! On real WAL: a server is started for it, or segments are given. `bulk`: frames that stand alone, by codec. `live`: WAL that
//! comes in small pieces, by the size of a flush: the stream that all links share, which begins anew with each epoch, beside a
//! stream that one connection would have for itself, and beside frames that stand alone. `links`: the same stream for one
//! link and for eight. `relay`: a relay that serves one link, and eight that catch up at once. Ends with an error when a target is
//! not reached.
//!
//! | variable | meaning | default |
//! | --- | --- | --- |
//! | `WALRELAY_BENCH_WAL` | segments to compress, with `:` between them; then no server is started, and `relay` is left out | |
//! | `WALRELAY_BENCH_PG`, `_DIR`, `_RELAY` | as for the bench `peers` | |
#![allow(clippy::disallowed_methods, reason = "touches only throwaway files of its own, never the store's")]
#![allow(dead_code, reason = "uses a part of what it shares with the bench of peers")]

#[path = "peers/client.rs"]
mod client;
#[path = "peers/lab.rs"]
mod lab;
#[path = "link/measure.rs"]
mod measure;
#[path = "link/relay.rs"]
mod relay;
#[path = "peers/table.rs"]
mod table;
#[path = "peers/usage.rs"]
mod usage;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use walrelay::protocol::link::Compression;
use walrelay::wal::{Lsn, SegmentNo, SegmentSize};

use lab::Lab;
use measure::{Cost, Way};
use table::{Table, Target};

const SECTIONS: [&str; 4] = ["bulk", "live", "links", "relay"];
/// What synchronous commits send, up to what a busy server does.
const FLUSHES: [usize; 5] = [512, 2 << 10, 8 << 10, 32 << 10, 128 << 10];
/// Flushes of which the shared stream must do as well as one connection's own.
const SMALL_FLUSH_MAX: usize = 8 << 10;
/// WAL to produce.
const WAL_BYTES: u64 = 400_000_000;
/// WAL of each kind that is compressed.
const SAMPLE_BYTES: usize = 32 << 20;

/// WAL of one kind.
struct Sample {
    name: String,
    wal: Vec<u8>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    // A test runner that only wants to know what is in here must not start servers.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return Ok(());
    }
    let is_quick = arguments.iter().any(|argument| argument == "--quick");
    let mut sections: Vec<&str> =
        arguments.iter().map(String::as_str).filter(|argument| !argument.starts_with('-')).collect();
    if let Some(unknown) = sections.iter().find(|section| !SECTIONS.contains(section)) {
        bail!("no section \"{unknown}\"; there are {}", SECTIONS.join(", "));
    }
    if sections.is_empty() {
        sections = SECTIONS.into();
    }
    let (samples, mut lab) = match env::var("WALRELAY_BENCH_WAL") {
        Ok(paths) => (given(&paths)?, None),
        Err(_) => produced(is_quick)?,
    };
    let samples = if is_quick { samples.into_iter().map(Sample::shortened).collect() } else { samples };
    let mut missed = Vec::new();
    for section in sections {
        let is_reached = match section {
            "bulk" => bulk(&samples)?,
            "live" => live(&samples)?,
            "links" => links(&samples)?,
            _ => match &mut lab {
                Some(lab) => relay::run(lab)?,
                None => {
                    println!("\nno server: what a relay costs is not measured");
                    true
                }
            },
        };
        if !is_reached {
            missed.push(section);
        }
    }
    if missed.is_empty() { Ok(()) } else { bail!("targets were not reached: {}", missed.join(", ")) }
}

impl Sample {
    fn shortened(mut self) -> Self {
        self.wal.truncate(SAMPLE_BYTES / 8);
        self
    }
}

fn given(paths: &str) -> Result<Vec<Sample>> {
    let read = |path: &str| {
        let wal = fs::read(path).with_context(|| format!("could not read {path}"))?;
        let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Sample { name, wal })
    };
    paths.split(':').map(read).collect()
}

/// WAL of a server: that of loading tables, and that of transactions and index builds.
fn produced(is_quick: bool) -> Result<(Vec<Sample>, Option<Lab>)> {
    let folder = env::var_os("WALRELAY_BENCH_DIR").map_or_else(env::temp_dir, PathBuf::from);
    let relay = env::var_os("WALRELAY_BENCH_RELAY")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_walrelay")), PathBuf::from);
    let mut lab = Lab::create(&folder, if is_quick { WAL_BYTES / 2 } else { WAL_BYTES }, &relay)?;
    let begin = lab.range.start();
    lab.session.rows("CHECKPOINT")?;
    let seconds = if is_quick { "4" } else { "20" };
    let tpcb = ["--client", "4", "--time", seconds, "--no-vacuum"];
    let after_checkpoint = lab.position()?;
    lab.run_pgbench(&tpcb)?;
    let later = lab.position()?;
    lab.run_pgbench(&tpcb)?;
    lab.session.rows("SELECT pg_switch_wal()")?;
    let end = lab.flushed_position()?;
    let samples = vec![
        read(&lab, "tables", begin, after_checkpoint)?,
        read(&lab, "tpcb, full pages", after_checkpoint, later)?,
        read(&lab, "tpcb, later", later, end)?,
    ];
    Ok((samples, Some(lab)))
}

/// WAL of the primary from `start` on, as much as a sample has.
fn read(lab: &Lab, name: &str, start: Lsn, end: Lsn) -> Result<Sample> {
    let size = SegmentSize::DEFAULT;
    let wanted = usize::try_from(end.bytes_since(start))?.min(SAMPLE_BYTES);
    let (mut wal, mut number) = (Vec::new(), SegmentNo::holding(start, size));
    let mut skipped = usize::try_from(size.offset_of(start))?;
    while wal.len() < wanted {
        let file = format!("00000001{:08X}{:08X}", number.0 >> 8, number.0 & 0xFF);
        let segment = fs::read(lab.primary.data_folder().join("pg_wal").join(&file)).context(file)?;
        wal.extend_from_slice(segment.get(skipped..).unwrap_or_default());
        (number, skipped) = (number.next(), 0);
    }
    wal.truncate(wanted);
    Ok(Sample { name: name.to_owned(), wal })
}

fn codecs() -> Vec<Compression> {
    let levels = [-5, -1, 1, 3].map(|level| Compression::Zstd { level });
    [Compression::Lz4].into_iter().chain(levels).collect()
}

/// As the others, returns whether its targets are reached.
fn bulk(samples: &[Sample]) -> Result<bool> {
    let mut table = Table::new(
        "frames that stand alone, of 256 KiB (MB/s of WAL; CPU seconds for a GB of WAL)",
        &["WAL", "codec", "ratio", "compress", "decompress", "CPU out", "CPU in"],
    );
    for sample in samples {
        for codec in codecs() {
            let cost = measure::run(&sample.wal, codec, Way::Alone, 256 << 10, 1)?;
            let [ratio, out, into, cpu_out, cpu_in] = cells(&cost);
            table.row([sample.name.clone(), codec.to_string(), ratio, out, into, cpu_out, cpu_in]);
        }
    }
    table.print();
    Ok(true)
}

fn live(samples: &[Sample]) -> Result<bool> {
    let mut table = Table::new(
        "live WAL by the size of a flush: the shared stream, beside one connection's own and frames that stand alone",
        &["WAL", "codec", "flush", "ratio", "own", "alone", "compress", "decompress", "CPU out", "CPU in"],
    );
    let mut worst: f64 = f64::INFINITY;
    for sample in samples {
        for codec in [Compression::Lz4, Compression::Zstd { level: -1 }, Compression::Zstd { level: 1 }] {
            for flush in FLUSHES {
                let measure = |way| measure::run(&sample.wal, codec, way, flush, 1);
                let (shared, own, alone) = (measure(Way::Shared)?, measure(Way::Own)?, measure(Way::Alone)?);
                if flush <= SMALL_FLUSH_MAX && codec == (Compression::Zstd { level: 1 }) {
                    worst = worst.min(shared.ratio() / own.ratio());
                }
                let [ratio, out, into, cpu_out, cpu_in] = cells(&shared);
                let ratio_of = |cost: &Cost| format!("{:.2}", cost.ratio());
                let (name, codec, flush) = (sample.name.clone(), codec.to_string(), flush.to_string());
                let (own, alone) = (ratio_of(&own), ratio_of(&alone));
                table.row([name, codec, flush, ratio, own, alone, out, into, cpu_out, cpu_in]);
            }
        }
    }
    let what = "ratio of the shared stream to that of one connection's own (zstd:1, 512 B to 8 KiB)";
    let is_reached = table.target(what, worst, Target::AtLeast(0.85));
    table.print();
    Ok(is_reached)
}

fn links(samples: &[Sample]) -> Result<bool> {
    let mut table = Table::new(
        "the shared stream for one link and for eight (zstd:1; CPU seconds for a GB of WAL, frames put together included)",
        &["WAL", "flush", "one", "eight", "times"],
    );
    let mut worst: f64 = 0.0;
    for sample in samples {
        for flush in FLUSHES {
            let measure =
                |links| measure::run(&sample.wal, Compression::Zstd { level: 1 }, Way::Shared, flush, links);
            let (one, eight) = (measure(1)?.cpu_out(), measure(8)?.cpu_out());
            worst = worst.max(eight / one);
            let cells = [format!("{one:.2}"), format!("{eight:.2}"), format!("{:.2}", eight / one)];
            let [one, eight, times] = cells;
            table.row([sample.name.clone(), flush.to_string(), one, eight, times]);
        }
    }
    let is_reached = table.target("CPU for eight links by that for one", worst, Target::AtMost(1.5));
    table.print();
    Ok(is_reached)
}

/// Ratio, speeds, and CPU time.
fn cells(cost: &Cost) -> [String; 5] {
    [
        format!("{:.2}", cost.ratio()),
        format!("{:.0}", cost.speed_out()),
        format!("{:.0}", cost.speed_in()),
        format!("{:.2}", cost.cpu_out()),
        format!("{:.2}", cost.cpu_in()),
    ]
}
