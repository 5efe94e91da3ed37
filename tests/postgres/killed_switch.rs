//! The relay is killed while it follows a promotion: both timelines are there afterwards, and it goes on by itself.

use crate::support::MB;
use crate::support::compare::wal_files;
use crate::support::faults::Faults;
use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::{Postgres, Stop, copy_folder};
use crate::support::relay::Relay;
use crate::support::wait::wait_until;
use crate::timelines::{
    Torn, assert_same_timeline, dead_branches, fork_of, primary, promote_behind, relay_of, torn,
    wait_timeline,
};

/// Files that change on the way, and what is done to them: the control file, the history, the first segment's spare and what
/// becomes of it, the old timeline's files.
const STEPS: &[(&str, &str)] = &[
    ("walrelay.control", "sync"),
    ("walrelay.control", "rename"),
    ("wal/00000002", "create"),
    ("wal/00000002", "sync"),
    ("wal/00000002", "rename"),
    ("wal/walrelay.spare", "rename"),
    ("wal/00000001", "rename"),
];

#[test]
fn killed_at_each_step_of_following_a_promotion_it_has_both_timelines() {
    let Some(installation) = Installation::any() else { return };
    let mut old = primary(&installation);
    let new = old.standby("next", old.port, "");
    let mut relay = relay_of(&[&old, &new]);
    relay.start();
    write_wal(&old, 2 * MB);
    relay.wait_flushed(old.flushed());
    // It has all of the old timeline: the first that comes is of the new one.
    old.stop(Stop::Fast);
    relay.terminate();
    new.promote();
    killed_at_each_step(&mut relay, &old, &new, 0);
}

#[test]
fn killed_at_each_step_of_a_divergence_it_has_both_branches() {
    let Some(installation) = Installation::any() else { return };
    let Torn { mut old, mut new, mut relay, .. } = torn(&installation, &[]);
    relay.terminate();
    promote_behind(&mut old, &mut new, "");
    killed_at_each_step(&mut relay, &old, &new, 1);
}

/// Lets the relay, which is down and has not seen the promotion, die at each step on the way to the new timeline.
fn killed_at_each_step(relay: &mut Relay, old: &Postgres, new: &Postgres, dead: usize) {
    write_wal(new, 2 * MB);
    let (upto, fork) = (new.flushed(), fork_of(new, 2));
    // A dead branch takes the segment of the fork with it; its beginning goes on under the new timeline's name.
    let upto_old = if dead == 0 { fork } else { fork / MB * MB };
    let before = relay.data_dir().with_extension("before");
    copy_folder(relay.data_dir(), &before);
    let mut kills = 0;
    for (files, call) in STEPS {
        for step in 1.. {
            std::fs::remove_dir_all(relay.data_dir()).unwrap();
            copy_folder(&before, relay.data_dir());
            let faults = Faults::kill_at(&format!("{call}:{step}:before"));
            relay.environment = faults.environment(&relay.data_dir().join(files));
            relay.launch();
            wait_until("the relay to die or to have it all", || {
                !relay.is_running() || (relay.is_ready() && has_followed(relay, upto))
            });
            let died = !relay.is_running();
            relay.kill();
            let has_history = relay.wal_dir().join("00000002.history").exists();
            assert!(
                has_history || wal_files(&relay.wal_dir(), MB, 2).is_empty(),
                "{files} {call} {step}: WAL of a timeline without its history"
            );
            relay.environment.clear();
            relay.start();
            wait_timeline(relay, 2);
            relay.wait_flushed(upto);
            assert_same_timeline(&relay.wal_dir(), new, 2, upto);
            assert_same_timeline(&relay.wal_dir(), old, 1, upto_old);
            assert_eq!(dead_branches(relay).len(), dead, "{files} {call} {step}");
            let names = std::fs::read_dir(relay.wal_dir()).unwrap().map(|entry| entry.unwrap().file_name());
            let aside = names.filter(|name| name.to_str().unwrap().ends_with(".diverged")).count();
            assert_eq!(aside > 0, dead > 0, "{files} {call} {step}: {aside} files set aside");
            relay.terminate();
            if !died {
                break;
            }
            kills += 1;
        }
    }
    println!("{kills} kills");
    assert!(kills >= 10, "only {kills} kills: most steps were never reached");
}

fn has_followed(relay: &Relay, upto: u64) -> bool {
    relay.status()["store"]["timeline"].as_u64() == Some(2) && relay.flushed() >= upto
}
