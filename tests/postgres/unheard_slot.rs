//! Slots on the primary whose making the relay did not hear of: they tell of no loss, and none is left behind that is of no use.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::MB;
use crate::support::compare::assert_same_wal;
use crate::support::lab::{Installation, chosen_majors};
use crate::support::load::write_wal;
use crate::support::postgres::Settings;
use crate::support::proxy::{Proxy, Verdict};
use crate::support::relay::Relay;
use crate::support::wait::hold;
use crate::upstream_slot::{Chain, SLOTS, cut_off, sparing};

/// Why the relay does not hear that its slot was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unheard {
    /// The connection ends before the answer.
    Cut,
    /// The relay ends after the question.
    Killed,
}

impl Unheard {
    /// Begins a session of the relay, which does not hear that its slot was made.
    fn happen(self, proxy: &Proxy, relay: &mut Relay) {
        let mut happened = false;
        if self == Self::Cut {
            proxy.edit(move |message| {
                let is_answer = message.first() == Some(&b'T')
                    && message.windows(16).any(|part| part == b"consistent_point");
                let is_first = is_answer && !std::mem::replace(&mut happened, true);
                if is_first { Verdict::Cut } else { Verdict::Forward }
            });
            return proxy.open();
        }
        let process = Pid::from_raw(relay.process().id().try_into().unwrap()).unwrap();
        proxy.before_command(move |command| {
            if command.starts_with("CREATE_REPLICATION_SLOT") && !std::mem::replace(&mut happened, true) {
                kill_process(process, Signal::KILL).unwrap();
            }
        });
        proxy.open();
        relay.wait_for_end();
        relay.launch();
    }
}

/// A relay that was cut off, and started again; its slot was dropped, and the primary has gone on far beyond.
fn without_a_slot(installation: &Installation, settings: Settings) -> Chain {
    let Chain { primary, proxy, mut relay } = cut_off(installation, settings, |relay| relay);
    primary.sql("select pg_drop_replication_slot('relay')");
    for _ in 0..4 {
        write_wal(&primary, 3 * MB);
        primary.switch_wal();
        primary.checkpoint();
    }
    // This process has seen no slot yet.
    relay.kill();
    relay.launch();
    relay.wait_serving();
    Chain { primary, proxy, relay }
}

#[test]
fn a_slot_whose_making_was_not_heard_of_tells_of_no_loss() {
    for major in chosen_majors().into_iter().filter(|major| *major >= 15) {
        let Some(installation) = Installation::of(major) else { continue };
        for unheard in [Unheard::Cut, Unheard::Killed] {
            let Chain { primary, proxy, mut relay } = without_a_slot(&installation, Settings::new());
            unheard.happen(&proxy, &mut relay);
            let upto = primary.flushed();
            relay.wait_flushed(upto);
            primary.wait_reported_flush("relay", upto);
            // The first one was heard of.
            assert_eq!(relay.times_logged("created replication slot on the upstream"), 1);
            assert!(!relay.log().contains("has been lost here"), "{unheard:?}: {}", relay.log());
            assert!(!relay.needs_attention(), "{unheard:?}: {}", relay.status()["upstream"]);
            assert_same_wal(&relay.wal_dir(), &primary, upto);
        }
    }
}

#[test]
fn a_slot_whose_making_was_not_heard_of_is_not_left_behind_where_it_is_of_no_use() {
    let Some(installation) = Installation::since(15) else { return };
    for unheard in [Unheard::Cut, Unheard::Killed] {
        let Chain { primary, proxy, mut relay } = without_a_slot(&installation, sparing());
        unheard.happen(&proxy, &mut relay);
        relay.wait_logged("it is not created again");
        relay.wait_needs_attention();
        primary.wait_for_sql(SLOTS, "0");
        hold("no slot is left behind", Duration::from_secs(1), || primary.sql(SLOTS) == "0");
        assert!(!relay.log().contains("has been lost here"), "{unheard:?}: {}", relay.log());
    }
}

#[test]
fn a_relay_that_was_killed_when_its_first_slot_was_made_has_lost_nothing() {
    let Some(installation) = Installation::since(15) else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let proxy = Proxy::to(primary.port);
    proxy.close();
    let mut relay = Relay::new("relay", proxy.port);
    relay.launch();
    Unheard::Killed.happen(&proxy, &mut relay);
    relay.wait_ready();
    write_wal(&primary, MB);
    relay.wait_flushed(primary.flushed());
    let told = relay.status()["upstream"].clone();
    assert!(told["started_empty"] == false && told["needs_attention"] == false, "{told}");
}
