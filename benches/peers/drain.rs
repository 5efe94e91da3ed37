//! How fast, and at what cost, one receiver takes the whole range from the primary.
//!
//! Every receiver starts with nothing and takes the same WAL, one after another, in turns. The clock of a program runs
//! from its start: of pg_receivewal until it has ended (it ends at the end of the range), of the relay until the primary
//! has heard from it that all is flushed. A standby has to start a whole server first, so its clock runs from the moment
//! its walreceiver is attached. CPU is of the receiver, all its threads; of a standby the walreceiver alone, and the whole
//! server, which also replays, beside it.
//!
//! The relay is measured twice: with every file new, as pg_receivewal's are, and with files recycled as soon as may be,
//! which is what it does once its directory has reached its size.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use anyhow::Result;
use rustix::process::Signal;
use walrelay::cli::demo::process::Process;

use crate::client::{Client, Event};
use crate::lab::{KEEP, Lab, gigabytes, megabytes};
use crate::profile::{self, Profile};
use crate::table::{Table, Target, median, spread};
use crate::usage;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Receiver {
    Synchronous,
    AtSegmentEnd,
    NoSync,
    Standby,
    Relay,
    RelayRecycling,
    Discard,
    Disk,
}

const RECEIVERS: [(Receiver, &str); 8] = [
    (Receiver::Synchronous, "pg_receivewal --slot --synchronous"),
    (Receiver::AtSegmentEnd, "pg_receivewal --slot (syncs at segment end)"),
    (Receiver::NoSync, "pg_receivewal --slot --no-sync"),
    (Receiver::Standby, "cascading standby (walreceiver; whole server)"),
    (Receiver::Relay, "walrelay, syncing, every file new"),
    (Receiver::RelayRecycling, "walrelay, syncing, files recycled"),
    (Receiver::Discard, "limit: read from the primary and forget"),
    (Receiver::Disk, "limit: write new files, fdatasync each 16 MiB"),
];

/// `wal_keep_size` of four segments.
const KEEP_LITTLE: &str = "64MB";

#[derive(Clone, Copy, Debug)]
struct Measured {
    elapsed: Duration,
    cpu: Option<Duration>,
    whole: Option<Duration>,
}

/// Prints the table, and gives what the relay did relative to pg_receivewal.
pub(crate) fn run(lab: &mut Lab, rounds: usize) -> Result<()> {
    let bytes = lab.range.bytes();
    let mut results: Vec<Vec<Measured>> = vec![Vec::new(); RECEIVERS.len()];
    for round in 1..=rounds {
        for ((receiver, _), results) in RECEIVERS.iter().zip(&mut results) {
            lab.settle();
            let measured = measure(lab, *receiver, round)?;
            results.push(measured);
        }
    }
    let title = format!("Receiving {:.2} GB from the primary, medians of {rounds} rounds", gigabytes(bytes));
    let mut table = Table::new(&title, &["receiver", "MB/s", "range", "CPU s/GB", "whole s/GB"]);
    let mut summary = Vec::new();
    for ((receiver, name), results) in RECEIVERS.iter().zip(&results) {
        let speeds: Vec<f64> =
            results.iter().map(|result| megabytes(bytes) / result.elapsed.as_secs_f64()).collect();
        let costs = |cpu: fn(&Measured) -> Option<Duration>| {
            let costs: Vec<f64> =
                results.iter().filter_map(cpu).map(|cpu| cpu.as_secs_f64() / gigabytes(bytes)).collect();
            if costs.is_empty() { None } else { Some(median(&costs)) }
        };
        let (cpu, whole) = (costs(|result| result.cpu), costs(|result| result.whole));
        let shown = |cost: Option<f64>| cost.map_or_else(|| "-".to_owned(), |cost| format!("{cost:.2}"));
        let speed = median(&speeds);
        table.row([(*name).to_owned(), format!("{speed:.0}"), spread(&speeds), shown(cpu), shown(whole)]);
        summary.push((*receiver, speed, cpu.unwrap_or_default()));
    }
    targets(&mut table, &summary);
    table.print();
    profiles(lab)
}

/// One more round of each way of the relay, for what it does with its time.
fn profiles(lab: &mut Lab) -> Result<()> {
    if let Err(reason) = profile::availability() {
        println!("\nno profile of the relay: {reason}");
        return Ok(());
    }
    for (files, keep) in [("new", KEEP), ("recycled", KEEP_LITTLE)] {
        lab.settle();
        let folder = lab.scratch.path().to_owned();
        let name = format!("drain_profile_{files}");
        let (measured, profile) = drained(lab, &name, keep, |pid| Profile::attach(pid, &folder))?;
        let cost = measured.cpu.unwrap_or_default().as_secs_f64() / gigabytes(lab.range.bytes());
        let cost = format!("one more round, {cost:.2} CPU s/GB while it is sampled");
        profile.print(&format!("Where the relay's CPU time goes, files {files} ({cost})"))?;
    }
    Ok(())
}

fn targets(table: &mut Table, summary: &[(Receiver, f64, f64)]) {
    let of = |wanted: Receiver| summary.iter().find(|(receiver, ..)| *receiver == wanted).copied();
    for (relay, files) in [(Receiver::Relay, "new"), (Receiver::RelayRecycling, "recycled")] {
        for (receiver, name) in [(Receiver::Synchronous, "--synchronous"), (Receiver::AtSegmentEnd, "plain")]
        {
            let (Some((_, relay_speed, relay_cpu)), Some((_, speed, cpu))) = (of(relay), of(receiver)) else {
                continue;
            };
            let against = format!("with files {files} against pg_receivewal {name}");
            table.target(&format!("MB/s {against}"), relay_speed / speed, Target::AtLeast(1.5));
            table.target(&format!("CPU per GB {against}"), relay_cpu / cpu, Target::AtMost(0.6));
        }
    }
}

fn measure(lab: &mut Lab, receiver: Receiver, round: usize) -> Result<Measured> {
    let name = format!("drain_{}_{round}", format!("{receiver:?}").to_lowercase());
    match receiver {
        Receiver::Synchronous => pg_receivewal(lab, &name, &["--synchronous"]),
        Receiver::AtSegmentEnd => pg_receivewal(lab, &name, &[]),
        Receiver::NoSync => pg_receivewal(lab, &name, &["--no-sync"]),
        Receiver::Standby => standby(lab, &name),
        Receiver::Relay => relay(lab, &name, KEEP),
        Receiver::RelayRecycling => relay(lab, &name, KEEP_LITTLE),
        Receiver::Discard => discard(lab),
        Receiver::Disk => disk(lab, &name),
    }
}

fn pg_receivewal(lab: &mut Lab, name: &str, arguments: &[&str]) -> Result<Measured> {
    lab.slot(name)?;
    let folder = lab.scratch.path().join(name);
    lab.installation.make_folder(&folder)?;
    let mut command = lab.installation.command("pg_receivewal");
    // It ends once it has passed the end position, and its files end with the segment.
    let last = walrelay::wal::Lsn::new(lab.range.end().get() - 8).unwrap_or(lab.range.start());
    command.arg("--directory").arg(&folder).args(["--host", "127.0.0.1", "--username", crate::client::USER]);
    command.arg("--port").arg(lab.primary.port().to_string()).arg("--endpos").arg(last.to_string());
    command.args(["--no-password", "--no-loop", "--slot", name]).args(arguments);
    let log = lab.scratch.path().join(format!("{name}.log"));
    let begun = Instant::now();
    let mut process = Process::start(name, command, Signal::INT, &log)?;
    let cpu = lab.wait_for_end(&mut process)?;
    let elapsed = begun.elapsed();
    lab.drop_slot(name)?;
    fs::remove_dir_all(folder)?;
    Ok(Measured { elapsed, cpu: Some(cpu), whole: Some(cpu) })
}

fn relay(lab: &mut Lab, name: &str, keep: &str) -> Result<Measured> {
    Ok(drained(lab, name, keep, |_| Ok(()))?.0)
}

/// Also gives what `watch` made of the process when it was started.
fn drained<W>(
    lab: &mut Lab,
    name: &str,
    keep: &str,
    watch: impl FnOnce(u32) -> Result<W>,
) -> Result<(Measured, W)> {
    let settings = lab.prepare_relay(name)?.store("wal_keep_size", keep);
    let end = lab.range.end();
    let begun = Instant::now();
    let mut relay = lab.spawn_relay(&settings)?;
    let watched = watch(relay.id())?;
    lab.wait("the relay", |lab| {
        relay.expect_running()?;
        Ok(lab.flushed_by(name)? >= Some(end))
    })?;
    let elapsed = begun.elapsed();
    let cpu = usage::cpu_of(relay.id())?;
    relay.stop()?;
    lab.drop_slot(name)?;
    fs::remove_dir_all(lab.scratch.path().join(name))?;
    Ok((Measured { elapsed, cpu: Some(cpu), whole: Some(cpu) }, watched))
}

fn standby(lab: &mut Lab, name: &str) -> Result<Measured> {
    let settings = lab.prepare_standby(name)?;
    lab.settle();
    let mut server = lab.spawn_standby(&settings)?;
    lab.wait("the walreceiver", |lab| lab.is_attached(name))?;
    let begun = Instant::now();
    let cpu_before = usage::cpu_of_family(server.id())?;
    let end = lab.range.end();
    lab.wait("the standby", |lab| Ok(lab.flushed_by(name)? >= Some(end)))?;
    let elapsed = begun.elapsed();
    let walreceiver = usage::child_titled(server.id(), "walreceiver")?;
    let cpu = walreceiver.map(usage::cpu_of).transpose()?;
    let whole = usage::cpu_of_family(server.id())?.saturating_sub(cpu_before);
    server.stop()?;
    drop(server);
    lab.drop_slot(name)?;
    fs::remove_dir_all(lab.scratch.path().join(name))?;
    Ok(Measured { elapsed, cpu, whole: Some(whole) })
}

/// What the primary can send at most to somebody who does nothing with it.
fn discard(lab: &mut Lab) -> Result<Measured> {
    let begun = Instant::now();
    let mut client = Client::replication(lab.primary.address())?;
    client.start_replication(lab.range.start())?;
    let (end, mut reached) = (lab.range.end().get(), 0);
    while reached < end {
        lab.check()?;
        if let Event::Wal { end } = client.event(reached)? {
            reached = end;
        }
    }
    Ok(Measured { elapsed: begun.elapsed(), cpu: None, whole: None })
}

/// What the disk can take at most from one thread that does nothing else.
fn disk(lab: &mut Lab, name: &str) -> Result<Measured> {
    let folder = lab.scratch.path().join(name);
    fs::create_dir(&folder)?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
    let block = vec![0xA5_u8; 128 << 10];
    let begun = Instant::now();
    for number in 0..lab.range.bytes() >> 24 {
        let mut file = fs::File::create(folder.join(number.to_string()))?;
        for _block in 0..(16 << 20) / block.len() {
            file.write_all(&block)?;
        }
        file.sync_data()?;
    }
    let elapsed = begun.elapsed();
    fs::remove_dir_all(folder)?;
    Ok(Measured { elapsed, cpu: None, whole: None })
}
