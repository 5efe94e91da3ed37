//! Clients that try passwords.

use std::time::{Duration, Instant};

use walrelay::{
    access::{Challenge, Method},
    downstream::DownstreamSettings,
    protocol::scram::{ChannelBinding, SCRAM_SHA_256, Server},
    wal::PgTimestamp,
};

use crate::logins::{log_in, said, scram_secret, user, users};
use crate::support::{Options, Relay, access, settings};

/// Shorter than the shortest wait that is asserted, and long enough for a login on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(1_500);

async fn relay(per_address: usize) -> Relay {
    let all = users([
        ("standby", user(Some(scram_secret("pencil")))),
        ("other", user(Some(scram_secret("pencil")))),
    ]);
    let settings = DownstreamSettings {
        unauthenticated_max: 40,
        unauthenticated_per_address_max: per_address,
        ..settings()
    };
    let access = access("host replication all all scram-sha-256", Some(all));
    Relay::start_with(Options { access, settings, ..Options::default() }).await
}

#[tokio::test]
async fn who_guesses_waits_longer_each_time_and_whoever_is_right_does_not() {
    let relay = relay(20).await;
    let attacker = [127, 0, 0, 66];
    let mut waits = Vec::new();
    for _ in 0..8 {
        let mut client = relay.stranger_from(attacker).await;
        let begun = Instant::now();
        let error = log_in(&mut client, "standby", "guess").await.unwrap_err();
        assert_eq!(said(&error), ("28P01", "password authentication failed for user \"standby\""));
        waits.push(begun.elapsed());
    }
    // 100, 200, 400, 800, 1600 ms from the fourth on.
    for (at, least) in [(3, 100), (4, 200), (5, 400), (6, 800), (7, 1_600)] {
        assert!(waits[at] >= Duration::from_millis(least), "{waits:?}");
    }
    // The user that is guessed at, from elsewhere, and another one from where the guesses come from.
    for (address, name) in [([127, 0, 0, 1], "standby"), (attacker, "other"), (attacker, "standby")] {
        let mut client = relay.stranger_from(address).await;
        let begun = Instant::now();
        log_in(&mut client, name, "pencil").await.unwrap();
        assert!(begun.elapsed() < AT_ONCE, "{name} from {address:?}: {:?}", begun.elapsed());
    }
    let mut client = relay.stranger_from([127, 0, 0, 1]).await;
    let begun = Instant::now();
    log_in(&mut client, "other", "typo").await.unwrap_err();
    assert!(begun.elapsed() < AT_ONCE, "another user from elsewhere: {:?}", begun.elapsed());
}

#[tokio::test]
async fn names_that_nobody_has_are_waited_for_as_those_of_users() {
    let relay = relay(20).await;
    let mut waits = Vec::new();
    for (name, last) in [("standby", 71), ("nobody", 72)] {
        let mut of_name = Vec::new();
        for _ in 0..6 {
            let mut client = relay.stranger_from([127, 0, 0, last]).await;
            let begun = Instant::now();
            log_in(&mut client, name, "guess").await.unwrap_err();
            of_name.push(begun.elapsed());
        }
        waits.push(of_name);
    }
    assert!(waits.iter().all(|waits| waits[5] >= Duration::from_millis(400)), "{waits:?}");
}

#[tokio::test]
async fn a_guess_keeps_its_place_while_it_waits_whether_its_client_does_or_not() {
    let relay = relay(2).await;
    let attacker = [127, 0, 0, 67];
    for _ in 0..7 {
        log_in(&mut relay.stranger_from(attacker).await, "standby", "guess").await.unwrap_err();
    }
    // Two more, whose clients leave as soon as they see that they were wrong.
    for _ in 0..2 {
        let mut client = relay.stranger_from(attacker).await;
        let wrong = tokio::time::timeout(Duration::from_millis(700), log_in(&mut client, "standby", "guess"));
        assert!(wrong.await.is_err(), "answered at once");
    }
    let error = relay.stranger_from(attacker).await.refusal().await;
    assert_eq!(said(&error), ("53300", "sorry, too many clients already"));
    log_in(&mut relay.stranger_from([127, 0, 0, 1]).await, "standby", "pencil").await.unwrap();
}

#[test]
fn a_proof_of_nobody_takes_as_long_to_be_refused() {
    let all = users([("standby", user(Some(scram_secret("pencil"))))]);
    let access = access("host replication all all scram-sha-256", Some(all));
    let refuse = |name: &str| {
        let nonce = [7; 32].into();
        let Challenge::Scram(credentials) =
            access.challenge(name, Method::ScramSha256, PgTimestamp(0), &nonce)
        else {
            panic!("not SCRAM")
        };
        let server = Server::new(credentials, ChannelBinding::Unsupported);
        let (state, reply) = server.handle(SCRAM_SHA_256, b"n,,n=,r=x", [5; 18]).unwrap();
        let nonce = reply.split(',').next().unwrap();
        let proof = format!("c=biws,{nonce},p={}", "A".repeat(43) + "=");
        state.handle(proof.as_bytes()).unwrap_err()
    };
    // The quickest of many says what the work is, whatever else the machine does.
    let quickest = |name: &str| {
        let one = |_| {
            let begun = Instant::now();
            (0..20).for_each(|_| drop(refuse(name)));
            begun.elapsed()
        };
        (0..300).map(one).min().unwrap()
    };
    let (known, unknown) = (quickest("standby"), quickest("nobody"));
    let ratio = known.as_secs_f64() / unknown.as_secs_f64();
    assert!((0.5..2.0).contains(&ratio), "{known:?} against {unknown:?}");
}
