//! The harness itself, against PostgreSQL alone: what it says about the relay is worth what it can see here.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::MB;
use crate::support::compare::{assert_equal_clusters, assert_same_wal, same_wal};
use crate::support::faults::Faults;
use crate::support::lab::{Installation, may_mount};
use crate::support::load::{pgbench, pgbench_tables, write_wal};
use crate::support::place;
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::powercut::{PowerCuts, Receiver};
use crate::support::process::Process;
use crate::support::proxy::{Proxy, drop_once, flip_once};
use crate::support::raw::{RawClient, identify_system};
use crate::support::receivewal::PgReceivewal;
use crate::support::wait::wait_until;
use crate::support::wan::{self, Wan};

#[test]
fn a_standby_of_every_major_equals_its_primary() {
    for major in crate::support::lab::chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let primary = Postgres::primary(&installation);
        pgbench_tables(&primary, 1);
        let standby = primary.standby("direct", primary.port, "");
        pgbench(&primary, 2, 1).wait_for_end();
        assert_equal_clusters(&primary, &standby);
    }
}

#[test]
fn the_proxy_reports_what_passes_and_spoils_what_it_is_told() {
    let Some(installation) = Installation::any() else { return };
    let primary = Postgres::primary(&installation);
    let proxy = Proxy::to(primary.port);
    let mut client = RawClient::replication(proxy.port).unwrap();
    let (_, timeline, position) = identify_system(&mut client);
    let from = position - position % (16 * MB);
    write_wal(&primary, MB);
    let upto = primary.flushed();
    proxy.edit(flip_once(from + MB / 2));
    client.start_replication(None, from, timeline).unwrap();
    let spoiled = client.read_wal(from, upto);
    let held = crate::support::compare::primary_bytes(&primary.wal_dir(), 16 * MB, from, upto);
    let wrong: Vec<usize> =
        (0..spoiled.len().min(held.len())).filter(|&at| spoiled[at] != held[at]).collect();
    assert_eq!(wrong, [MB as usize / 2]);
    assert_eq!(proxy.passed(|passed| passed.starts.clone()), [from]);
    assert!(proxy.passed(|passed| passed.delivered) >= upto);

    proxy.edit(drop_once(from + MB / 2));
    let mut client = RawClient::replication(proxy.port).unwrap();
    client.start_replication(None, from, timeline).unwrap();
    let gap = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| client.read_wal(from, upto)));
    assert!(gap.is_err(), "the gap went unnoticed");
}

#[test]
fn files_of_pg_receivewal_compare_equal_and_a_flipped_bit_does_not() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    primary.sql("select pg_create_physical_replication_slot('oracle', true)");
    let receiver = PgReceivewal::start(&installation, primary.port, &["--synchronous", "--slot=oracle"]);
    primary.wait_for_sql("select count(*) from pg_stat_replication", "1");
    write_wal(&primary, 3 * MB);
    let upto = primary.flushed();
    primary.wait_reported_flush("pg_receivewal", upto);
    let first = assert_same_wal(receiver.folder(), &primary, upto);
    let (_, path) = crate::support::compare::wal_files(receiver.folder(), MB, 1).into_iter().next().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4000] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(same_wal(receiver.folder(), &primary.wal_dir(), MB, upto).is_err());
    std::fs::remove_file(&path).unwrap();
    assert!(assert_same_wal(receiver.folder(), &primary, upto) > first);
}

#[test]
fn servers_stop_and_start_in_every_way() {
    let Some(installation) = Installation::any() else { return };
    let mut primary = Postgres::primary(&installation);
    primary.sql("create table kept (id int)");
    for how in [Stop::Smart, Stop::Fast, Stop::Immediate, Stop::Kill] {
        primary.sql("insert into kept values (1)");
        primary.restart(how);
    }
    assert_eq!(primary.sql("select count(*) from kept"), "4");
}

#[test]
fn power_cuts_spare_pg_receivewal_and_catch_it_when_its_sync_lies() {
    if !may_mount() {
        return;
    }
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    let rounds = PowerCuts {
        primary: &primary,
        proxy: &proxy,
        application_name: "pg_receivewal",
        disk_megabytes: 300,
    };
    primary.sql("select pg_create_physical_replication_slot('cuts', true)");
    let mut honest = Incumbent {
        installation: installation.clone(),
        port: proxy.port,
        wal: primary.wal_dir(),
        faults: None,
        process: None,
    };
    let outcome = rounds.run(&mut honest, 4, false);
    assert!(outcome.lost.is_empty(), "{outcome:#?}");
    assert!(outcome.with_progress >= 3, "{outcome:#?}");

    let faults = Faults::new();
    faults.set("sync_lies", 0);
    let mut lying = Incumbent { faults: Some(faults), ..honest };
    let outcome = rounds.run(&mut lying, 10, true);
    assert!(!outcome.lost.is_empty(), "a sync that does nothing was not noticed: {outcome:#?}");
}

/// pg_receivewal as the receiver of the power-cut rounds. It needs help after a cut: files of odd size are emptied.
struct Incumbent {
    installation: Installation,
    port: u16,
    wal: PathBuf,
    faults: Option<Faults>,
    process: Option<Process>,
}

impl Receiver for Incumbent {
    fn start(&mut self, folder: &Path) {
        drop(std::fs::create_dir(folder.join("received")));
        let mut program = PgReceivewal::program(&self.installation, self.port, &folder.join("received"))
            .args(["--synchronous", "--slot=cuts"]);
        program.environment = self.faults.iter().flat_map(|faults| faults.environment(folder)).collect();
        self.process = Some(Process::spawn("pg_receivewal", &program, &folder.with_extension("log")));
    }

    fn check(&mut self, folder: &Path, acknowledged: u64) -> Result<(), String> {
        let received = folder.join("received");
        same_wal(&received, &self.wal, MB, acknowledged)?;
        for (_, path) in crate::support::compare::wal_files(&received, MB, 1) {
            let file = std::fs::File::options().write(true).open(path).unwrap();
            if !file.metadata().unwrap().len().is_multiple_of(MB) {
                file.set_len(0).unwrap();
            }
        }
        Ok(())
    }

    fn kill(&mut self) {
        drop(self.process.take());
    }
}

#[test]
fn a_fault_is_injected_where_it_is_asked_for_and_nowhere_else() {
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let folder = crate::support::lab::scratch();
    let faults = Faults::new();
    let received = folder.path().join("received");
    std::fs::create_dir(&received).unwrap();
    let mut program =
        PgReceivewal::program(&installation, primary.port, &received).args(["--synchronous", "--no-loop"]);
    program.environment = faults.environment(&received);
    let mut process = Process::spawn("pg_receivewal", &program, &folder.path().join("log"));
    write_wal(&primary, MB);
    primary.wait_reported_flush("pg_receivewal", primary.flushed());
    faults.set("sync_fails", 0);
    write_wal(&primary, MB);
    let status = process.wait(Duration::from_secs(20)).expect("pg_receivewal ends when its sync fails");
    assert!(!status.success());
    wait_until("the walsender to be gone", || primary.sql("select count(*) from pg_stat_replication") == "0");
}

#[test]
fn a_cable_is_as_long_and_as_bad_as_it_is_made() {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    let Some(wan) = Wan::new(Duration::from_millis(40)) else { return };
    let listener = place::within(&wan.far, || TcpListener::bind((wan::FAR, 0))).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut near = place::within(&wan.near, move || TcpStream::connect((wan::FAR, port))).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    near.set_nodelay(true).unwrap();
    let mut there_and_back = |size: usize| {
        let (sent, started) = (vec![7; size], std::time::Instant::now());
        let writing = std::thread::scope(|scope| {
            scope.spawn(|| near.write_all(&sent).unwrap());
            let mut received = vec![0; size];
            far.read_exact(&mut received).unwrap();
            received
        });
        far.write_all(b"!").unwrap();
        near.read_exact(&mut [0]).unwrap();
        (writing, started.elapsed())
    };
    let (_, took) = there_and_back(1);
    assert!((Duration::from_millis(40)..Duration::from_millis(200)).contains(&took), "{took:?}");
    wan.cable.set_rate(20_000_000);
    let before = wan.bytes_to_far();
    let (_, took) = there_and_back(1_000_000);
    assert!(took > Duration::from_millis(400), "one megabyte over 20 Mbit/s in {took:?}");
    assert!(wan.bytes_to_far() - before > 1_000_000);
    wan.cable.set_rate(0);
    wan.cable.set_lost_ppm(5_000);
    wan.cable.set_reordered_ppm(20_000);
    let (received, _) = there_and_back(300_000);
    assert!(received.iter().all(|byte| *byte == 7), "TCP makes good for loss and order");
    wan.cable.flip(1);
    let (received, _) = there_and_back(10_000);
    assert_eq!(received.iter().filter(|byte| **byte != 7).count(), 1, "one bit that TCP does not notice");
    wan.cable.cut();
    near.write_all(b"x").unwrap();
    far.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(far.read_exact(&mut [0]).is_err());
    wan.cable.mend();
    far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    far.read_exact(&mut [0]).unwrap();
}
