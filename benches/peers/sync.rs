//! What a commit that waits for a synchronous standby costs: a real standby against the relay, by `synchronous_commit`.
//!
//! One commit at a time, measured by the client that commits. Only the path that is measured runs, and the paths take turns.
//! With `remote_apply` the relay needs a standby behind it, for it applies nothing itself: that is a hop more, and the row says
//! so.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use walrelay::cli::demo::relay::{Relay, RelaySettings};
use walrelay::cli::demo::server::{Server, ServerSettings};

use crate::client::Client;
use crate::lab::{KEEP, Lab};
use crate::table::{Table, percentile};

const MODES: [&str; 3] = ["remote_write", "on", "remote_apply"];
/// Each path gets as many turns, and in each an equal part of the commits.
const TURNS_PER_ROUND: usize = 2;
const WARM_UP_COMMITS: usize = 20;
/// Between commits everything comes to rest.
const PAUSE: Duration = Duration::from_millis(1);
const STANDBY: &str = "sync_standby";
const RELAY: &str = "sync_relay";
const BEHIND: &str = "sync_behind";

/// Milliseconds of each mode.
type Samples = [Vec<f64>; MODES.len()];

pub(crate) fn run(lab: &mut Lab, rounds: usize, commits: usize) -> Result<()> {
    let standby = lab.prepare_standby(STANDBY)?;
    let relay = lab.prepare_relay(RELAY)?.store("wal_keep_size", KEEP);
    let behind = lab.prepare_standby(BEHIND)?;
    lab.drop_slot(BEHIND)?;
    let (mut alone, mut by_standby, mut by_relay) = (Vec::new(), Samples::default(), Samples::default());
    let turns = rounds * TURNS_PER_ROUND;
    let commits = commits.div_ceil(turns);
    for _turn in 0..turns {
        commit_often(lab, "local", commits, &mut alone)?;
        through_standby(lab, &standby, commits, &mut by_standby)?;
        through_relay(lab, (&relay, &behind), commits, &mut by_relay)?;
    }
    lab.drop_slot(STANDBY)?;
    lab.drop_slot(RELAY)?;
    print(&alone, &by_standby, &by_relay);
    Ok(())
}

fn print(alone: &[f64], by_standby: &Samples, by_relay: &Samples) {
    let title = format!(
        "Milliseconds of a commit that waits for a synchronous standby, {} commits each",
        alone.len()
    );
    let columns = [
        "synchronous_commit",
        "standby p50",
        "walrelay p50",
        "ratio",
        "standby p99",
        "walrelay p99",
        "ratio",
    ];
    let mut table = Table::new(&title, &columns);
    let shown = |value: f64| format!("{value:.3}");
    for (mode, (standby, relay)) in MODES.iter().zip(by_standby.iter().zip(by_relay)) {
        let [p50, p99] = [500, 990].map(|rank| (percentile(standby, rank), percentile(relay, rank)));
        let ratio = |(standby, relay): (f64, f64)| format!("{:.2}", relay / standby);
        table.row([
            (*mode).to_owned(),
            shown(p50.0),
            shown(p50.1),
            ratio(p50),
            shown(p99.0),
            shown(p99.1),
            ratio(p99),
        ]);
    }
    table.note(format!("local, nobody is waited for: p50 {}", shown(percentile(alone, 500))));
    table.note("remote_apply: through walrelay to a standby behind it, which is a hop more".to_owned());
    table.print();
}

fn through_standby(
    lab: &mut Lab,
    settings: &ServerSettings,
    commits: usize,
    samples: &mut Samples,
) -> Result<()> {
    let mut standby = lab.spawn_standby(settings)?;
    standby.wait_until_ready()?;
    wait_replayed(lab, &standby)?;
    wait_for(lab, STANDBY)?;
    for (mode, samples) in MODES.iter().zip(samples) {
        commit_often(lab, mode, commits, samples)?;
    }
    wait_for_nobody(lab)?;
    standby.stop()?;
    Ok(())
}

fn through_relay(
    lab: &mut Lab,
    (relay, behind): (&RelaySettings, &ServerSettings),
    commits: usize,
    samples: &mut Samples,
) -> Result<()> {
    let mut relay: Relay = lab.spawn_relay(relay)?;
    relay.wait_until_ready()?;
    let now = lab.flushed_position()?;
    lab.wait(RELAY, |lab| Ok(lab.flushed_by(RELAY)? >= Some(now)))?;
    wait_for(lab, RELAY)?;
    let mut standby = None;
    for (mode, samples) in MODES.iter().zip(samples) {
        if *mode == "remote_apply" {
            let started = lab.spawn_standby(&behind.clone().following(&relay.conninfo(), ""))?;
            wait_replayed(lab, standby.insert(started))?;
        }
        commit_often(lab, mode, commits, samples)?;
    }
    wait_for_nobody(lab)?;
    standby.map(|mut standby| standby.stop()).transpose()?;
    relay.stop()?;
    Ok(())
}

/// Until it has all that there is; the next start then does not begin by replaying that.
fn wait_replayed(lab: &mut Lab, standby: &Server) -> Result<()> {
    let now = lab.flushed_position()?;
    let mut session = None;
    lab.wait("a standby to replay", |_| {
        if session.is_none() {
            session = standby.session().ok();
        }
        let Some(session) = &mut session else { return Ok(false) };
        Ok(session.lsn("SELECT pg_last_wal_replay_lsn()")? >= Some(now))
    })?;
    session.ok_or_else(|| anyhow!("no session"))?.rows("CHECKPOINT")?;
    Ok(())
}

/// From now on commits wait for this standby.
fn wait_for(lab: &mut Lab, name: &str) -> Result<()> {
    lab.session.rows(&format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'"))?;
    lab.session.rows("SELECT pg_reload_conf()")?;
    let query = format!(
        "SELECT count(*) FROM pg_stat_replication WHERE application_name = '{name}' AND sync_state = 'sync'"
    );
    lab.wait("the primary to wait for it", |lab| Ok(lab.session.row(&query)? == "1"))?;
    lab.settle();
    Ok(())
}

fn wait_for_nobody(lab: &mut Lab) -> Result<()> {
    lab.session.rows("ALTER SYSTEM RESET synchronous_standby_names")?;
    lab.session.rows("SELECT pg_reload_conf()")?;
    Ok(())
}

fn commit_often(lab: &Lab, mode: &str, commits: usize, samples: &mut Vec<f64>) -> Result<()> {
    let mut application = Client::sql(lab.primary.address())?;
    application.ask(&format!("SET synchronous_commit = {mode}"))?;
    for number in 0..WARM_UP_COMMITS + commits {
        lab.check()?;
        let sent = Instant::now();
        application.ask(&format!("INSERT INTO bench_commits VALUES ({number})"))?;
        if number >= WARM_UP_COMMITS {
            samples.push(sent.elapsed().as_secs_f64() * 1e3);
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}
