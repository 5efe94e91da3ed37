//! Standbys and pg_receivewal of every major behind a relay with TLS: with each `sslmode`, with passwords and with certificates.

use std::path::{Path, PathBuf};

use crate::support::MB;
use crate::support::certificates::{Authority, Pair};
use crate::support::compare::assert_equal_clusters;
use crate::support::lab::{self, Installation, chosen_majors};
use crate::support::load::write_wal;
use crate::support::postgres::Postgres;
use crate::support::receivewal::PgReceivewal;
use crate::support::tls_site::{Judgement, Site};
use crate::support::wait::{wait_for, wait_until};

/// Nobody comes in without TLS, and one user only by his certificate.
const RULES: &str = "hostssl replication standby 127.0.0.1/32 scram-sha-256\n\
    hostssl replication edge 127.0.0.1/32 cert\n\
    hostnossl replication standby,edge 127.0.0.1/32 reject\n";

/// A way to connect, and whether it leads in.
struct Way {
    what: &'static str,
    conninfo: String,
    leads_in: bool,
}

/// Files that the server's user can read, below his own folder.
fn files_for(standby: &Postgres, files: &[(&Path, &str)]) -> Vec<PathBuf> {
    files
        .iter()
        .map(|(from, name)| {
            let to = standby.data().join(name);
            std::fs::copy(from, &to).unwrap();
            lab::give_all_to_server(&to);
            to
        })
        .collect()
}

fn ways(root: &Path, other: &Path, client: &Pair) -> Vec<Way> {
    let password = "user=standby password=secret";
    let mut ways = Vec::new();
    for mode in ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] {
        let conninfo = format!("{password} sslmode={mode} sslrootcert={}", root.display());
        ways.push(Way { what: mode, conninfo, leads_in: mode != "disable" });
    }
    let conninfo = format!("{password} sslmode=verify-ca sslrootcert={}", other.display());
    ways.push(Way { what: "verify-ca, another root", conninfo, leads_in: false });
    let conninfo = format!(
        "user=edge sslmode=verify-full sslrootcert={} sslcert={} sslkey={}",
        root.display(),
        client.cert.display(),
        client.key.display()
    );
    ways.push(Way { what: "verify-full, certificate", conninfo, leads_in: true });
    let conninfo = format!("user=edge sslmode=verify-full sslrootcert={}", root.display());
    ways.push(Way { what: "verify-full, no certificate", conninfo, leads_in: false });
    ways
}

#[test]
fn consumers_of_every_major_come_in_by_each_way_that_leads_in() {
    let (authority, other) = (Authority::new("root"), Authority::new("other"));
    let server = authority.issue("server", "IP:127.0.0.1");
    let client = authority.issue("edge", "DNS:edge");
    println!("| major | consumer | connection | outcome |");
    for major in chosen_majors() {
        let Some(installation) = Installation::of(major) else { continue };
        let mut site = Site::new(&installation, &server);
        site.primary.sql("create role edge replication login");
        site.judge(&Judgement { ca: &authority.root(), crl: None, rules: RULES, map: "" });
        // It streams from the primary until it is told otherwise.
        let standby = site.primary.standby("standby", site.primary.port, "");
        let (root, foreign) = (authority.root(), other.root());
        let files = [
            (&*root, "root.crt"),
            (&*foreign, "other.crt"),
            (&*client.cert, "own.crt"),
            (&*client.key, "own.key"),
        ];
        let files = files_for(&standby, &files);
        let own = Pair { cert: files[2].clone(), key: files[3].clone() };
        for (at, way) in ways(&files[0], &files[1], &own).into_iter().enumerate() {
            let outcome = standby_by(&site, &standby, &format!("standby_{at}"), &way);
            println!("| {major} | standby | {} | {outcome} |", way.what);
        }
        for (at, way) in ways(&root, &foreign, &client).into_iter().enumerate() {
            let outcome = archive_by(&site, &installation, &format!("archive_{at}"), &way);
            println!("| {major} | pg_receivewal | {} | {outcome} |", way.what);
        }
    }
}

/// The standby by this way. In the end it has what its primary has, where it came in.
fn standby_by(site: &Site, standby: &Postgres, name: &str, way: &Way) -> String {
    let refusals = || standby.log().matches("could not connect to the primary server").count();
    let before = refusals();
    standby.add_settings(&format!(
        "primary_conninfo = 'host=127.0.0.1 port={} application_name={name} {}'",
        site.relay.port, way.conninfo
    ));
    standby.reload();
    let came_in = wait_for(&format!("{name} to come in or to be refused"), || {
        let is_in = site.relay.downstream(name).iter().any(|session| session["state"] == "streaming");
        // The first ones may be of the way before.
        is_in.then_some(true).or_else(|| (refusals() > before + 3).then_some(false))
    });
    assert_eq!(came_in, way.leads_in, "{}:\n{}", way.what, standby.log());
    if came_in {
        write_wal(&site.primary, MB / 4);
        standby.wait_replayed(site.primary.flushed());
        assert_equal_clusters(&site.primary, standby);
        return "streams".to_owned();
    }
    "refused".to_owned()
}

fn archive_by(site: &Site, installation: &Installation, name: &str, way: &Way) -> String {
    let conninfo =
        format!("host=127.0.0.1 port={} application_name={name} {}", site.relay.port, way.conninfo);
    let mut archive = PgReceivewal::start(installation, site.relay.port, &["-d", &conninfo, "--no-loop"]);
    if !way.leads_in {
        assert!(!archive.process.wait_for_end().success(), "{}:\n{}", way.what, archive.log());
        assert!(site.relay.downstream(name).is_empty());
        return "refused".to_owned();
    }
    wait_until(&format!("{name} to stream: {}", archive.log()), || {
        assert!(archive.process.is_running(), "{}:\n{}", way.what, archive.log());
        site.relay.downstream(name).iter().any(|session| session["state"] == "streaming")
    });
    write_wal(&site.primary, MB);
    site.wait_archived(&archive, site.primary.flushed());
    "streams".to_owned()
}
