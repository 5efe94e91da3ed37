//! Power cuts under a real file system: what was acknowledged is there, each time, and a lying sync is caught.

use std::path::{Path, PathBuf};

use crate::held::check_held;
use crate::support::MB;
use crate::support::faults::Faults;
use crate::support::lab::{Installation, may_mount};
use crate::support::postgres::Settings;
use crate::support::powercut::{Outcome, PowerCuts, Receiver, rounds};
use crate::support::proxy::Proxy;
use crate::support::relay::Relay;

#[test]
fn powercut_loses_nothing_acknowledged() {
    let cuts = rounds("WALRELAY_POWERCUTS", 25);
    let Some(outcome) = cut_the_power(cuts, None) else { return };
    println!(
        "{} power cuts, {} with progress, {} with loss",
        outcome.cuts,
        outcome.with_progress,
        outcome.lost.len()
    );
    assert!(outcome.lost.is_empty(), "{outcome:#?}");
    assert!(
        outcome.with_progress * 10 >= outcome.cuts * 9,
        "too few cuts had something at stake: {outcome:#?}"
    );
}

#[test]
fn powercut_catches_a_relay_whose_sync_lies() {
    let faults = Faults::new();
    faults.set("sync_lies", 0);
    let Some(outcome) = cut_the_power(15, Some(&faults)) else { return };
    assert!(!outcome.lost.is_empty(), "a sync that does nothing was not noticed in {} cuts", outcome.cuts);
}

fn cut_the_power(cuts: u32, faults: Option<&Faults>) -> Option<Outcome> {
    if !may_mount() {
        return None;
    }
    let installation = Installation::any()?;
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    let mut relay = Relay::new("relay", proxy.port).with("store.wal_keep_size", "\"32MB\"");
    if let Some(faults) = faults {
        relay.environment = faults.environment(Path::new("/tmp/walrelay-"));
    }
    let harness =
        PowerCuts { primary: &primary, proxy: &proxy, application_name: "relay", disk_megabytes: 400 };
    let mut receiver = RelayOnDisk { relay: Some(relay), primary_wal: primary.wal_dir() };
    let outcome = harness.run(&mut receiver, cuts, faults.is_some());
    proxy.assert_honest();
    Some(outcome)
}

/// The relay as the receiver of the power-cut rounds: started on the cut disk, it serves first and streams then.
struct RelayOnDisk {
    relay: Option<Relay>,
    primary_wal: PathBuf,
}

impl RelayOnDisk {
    fn launch(&mut self, folder: &Path) -> &mut Relay {
        let relay = self.relay.take().expect("always put back").with_data_dir(&folder.join("relay"));
        let relay = self.relay.insert(relay);
        relay.launch();
        relay
    }
}

impl Receiver for RelayOnDisk {
    fn start(&mut self, folder: &Path) {
        // After the first round it runs already: the check started it, on the same disk.
        if !self.relay.as_mut().expect("always put back").is_running() {
            self.launch(folder);
        }
    }

    fn check(&mut self, folder: &Path, acknowledged: u64) -> Result<(), String> {
        let primary_wal = self.primary_wal.clone();
        check_held(self.launch(folder), &primary_wal, MB, acknowledged)
    }

    fn kill(&mut self) {
        let relay = self.relay.as_mut().expect("always put back");
        if relay.was_started() {
            relay.kill();
        }
    }
}
