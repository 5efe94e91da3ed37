//! The report of a divergence, against `pg_waldump` of the old primary's own WAL: what is lost to the cluster is told exactly.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Settings, Stop};
use crate::support::process::Program;
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::wait::wait_until;
use crate::support::{MB, lsn, lsn_text};
use crate::timelines::{dead_branches, fork_of, promote_behind, relay_of, wait_timeline};

/// What lies between two positions.
#[derive(Debug, PartialEq, Eq)]
struct Branch {
    records: u64,
    commits: u64,
    first_commit: String,
    last_commit: String,
    transactions: BTreeSet<u32>,
}

#[test]
fn what_is_told_of_a_dead_branch_is_what_pg_waldump_finds_there() {
    for major in crate::support::lab::chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        if !installation.has("pg_waldump") {
            continue;
        }
        let settings = Settings::new().segment_size_mb(1).line("max_prepared_transactions = 5");
        let mut old = settings.start(&installation);
        let mut new = old.standby("next", old.port, "");
        let mut relay = relay_of(&[&old, &new]);
        relay.start();
        let prepared = before_the_fork(&old);
        new.wait_replayed(old.flushed());
        relay.wait_flushed(old.flushed());
        new.stop(Stop::Fast);
        beyond_the_fork(&old);
        relay.wait_flushed(old.flushed());
        promote_behind(&mut old, &mut new, "");
        wait_timeline(&relay, 2);

        let status = dead_branches(&relay).remove(0);
        let (fork, end) = (fork_of(&new, 2), lsn(status["end"].as_str().unwrap()));
        assert_eq!(status["fork"], lsn_text(fork));
        let found = dumped(&old, fork, end);
        assert_eq!(told(&status), found);
        assert_eq!(status["bytes"].as_u64(), Some(end - fork));
        assert!(prepared.is_subset(&found.transactions), "{prepared:?} ended there: {found:?}");
        assert_eq!(status["has_more_transactions"], false);
        // It is written when the new timeline is followed already.
        let report = relay.data_dir().join(status["report"].as_str().unwrap());
        wait_until("the report", || report.exists());
        let file = std::fs::read(report).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&file).unwrap(), status);
        check_log(&relay, &status);
    }
}

/// Transactions that are prepared, with parts of every kind; returns their ids.
fn before_the_fork(old: &Postgres) -> BTreeSet<u32> {
    old.sql("create table kept (id int)");
    for table in ["doomed", "spared"] {
        old.sql(&format!("create table {table} as select 1 id"));
    }
    let prepare = |name: &str, statements: &[&str]| {
        let mut client = RawClient::sql(old.port).unwrap();
        client.rows("begin").unwrap();
        for statement in statements {
            client.rows(statement).unwrap();
        }
        let id = client.rows("select txid_current()").unwrap();
        client.rows(&format!("prepare transaction '{name}'")).unwrap();
        id[0][0].as_ref().unwrap().parse().unwrap()
    };
    let insert = "insert into kept values (1)";
    let all = ["savepoint s", insert, "release s", "drop table doomed"];
    let to_abort = ["create table made (id int)", "savepoint s", insert, "release s", "drop table spared"];
    [prepare("plain", &[insert]), prepare("all", &all), prepare("aborted", &to_abort)].into()
}

/// Ends of every kind, the first and the last of them at known places.
fn beyond_the_fork(old: &Postgres) {
    old.sql("commit prepared 'plain'");
    old.sql("insert into kept values (2)");
    let mut client = RawClient::sql(old.port).unwrap();
    for statement in ["begin", "insert into kept values (3)", "rollback"] {
        client.rows(statement).unwrap();
    }
    old.sql("rollback prepared 'aborted'");
    write_wal(old, 2 * MB);
    let subtransaction = ["begin", "savepoint s", "insert into kept values (4)", "release s", "commit"];
    for statement in subtransaction {
        client.rows(statement).unwrap();
    }
    // Begun, and never ended.
    for statement in ["begin", "insert into kept values (5)"] {
        client.rows(statement).unwrap();
    }
    old.sql("commit prepared 'all'");
}

/// By PostgreSQL's own tool.
fn dumped(server: &Postgres, fork: u64, end: u64) -> Branch {
    let text = Program::new(server.installation.program("pg_waldump"))
        .args(["-p", server.wal_dir().to_str().unwrap(), "-t", "1"])
        .args(["-s", &lsn_text(fork), "-e", &lsn_text(end)])
        .env("TZ", "UTC")
        .run();
    let (mut records, mut commits, mut transactions) = (0, Vec::new(), BTreeSet::new());
    for line in text.lines().filter(|line| line.starts_with("rmgr: ")) {
        records += 1;
        let after = |key: &str| line.split_once(key).map(|(_, rest)| rest.trim());
        transactions.insert(after(" tx: ").unwrap().split(',').next().unwrap().parse().unwrap());
        let what = after(" desc: ").unwrap();
        let (kind, rest) = what.split_once(' ').unwrap_or((what, ""));
        let prepared = rest.split_once(": ").filter(|_| kind.ends_with("_PREPARED"));
        if let Some((id, _)) = prepared {
            transactions.insert(id.parse().unwrap());
        }
        let is_commit = line.starts_with("rmgr: Transaction") && kind.starts_with("COMMIT");
        if is_commit {
            // 2026-11-20 18:00:00.123456 UTC
            let (date, rest) = prepared.map_or(rest, |(_, rest)| rest).split_once(' ').unwrap();
            let time = rest.split(' ').next().unwrap();
            commits.push(format!("{date}T{time}Z"));
        }
    }
    transactions.remove(&0);
    Branch {
        records,
        commits: commits.len() as u64,
        first_commit: commits.first().unwrap().clone(),
        last_commit: commits.last().unwrap().clone(),
        transactions,
    }
}

/// By the relay.
fn told(status: &Value) -> Branch {
    let text = |key: &str| status[key].as_str().unwrap().to_owned();
    let ids = status["transactions"].as_array().unwrap().iter();
    Branch {
        records: status["records"].as_u64().unwrap(),
        commits: status["commits"].as_u64().unwrap(),
        first_commit: text("first_commit"),
        last_commit: text("last_commit"),
        transactions: ids.map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect(),
    }
}

/// The one line of the log says the same.
fn check_log(relay: &Relay, status: &Value) {
    let what = "what lies beyond has been set aside";
    wait_until("the divergence to be logged", || relay.log().contains(what));
    let log = relay.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains(what)).collect();
    assert_eq!(lines.len(), 1);
    let line: Value = serde_json::from_str(lines[0]).unwrap();
    assert_eq!(line["level"], "ERROR");
    for key in ["fork", "end", "report", "bytes", "records", "commits"] {
        assert_eq!(line["fields"][key], status[key], "{key}");
    }
    let ids: Value = serde_json::from_str(line["fields"]["transactions"].as_str().unwrap()).unwrap();
    assert_eq!(ids, status["transactions"]);
}
