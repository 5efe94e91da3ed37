//! Who is let in, by which rule and which proof.

use md5::{Digest, Md5};
use walrelay::{
    access::{NoFiles, Secret, User, UserMaps},
    conninfo::{ProcessSurroundings, Surroundings},
    protocol::{
        backend::{self, Authentication},
        frontend::{Message, Password},
        md5::password_reply,
    },
    wal::PgTimestamp,
};

use crate::logins::{Asked, begin, log_in, log_in_with, said, scram_secret, startup_of, user, users};
use crate::support::{Options, Relay, access, eventually};

/// `md5` and the hash of password and name, as `pg_authid` holds it.
fn md5_secret(user: &str) -> Secret {
    let digest = Md5::digest(format!("pencil{user}"));
    let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Secret::Md5(format!("md5{digits}").parse().unwrap())
}

async fn relay_with(rules: &str, all: walrelay::access::Users) -> Relay {
    Relay::start_with(Options { access: access(rules, Some(all)), ..Options::default() }).await
}

#[tokio::test]
async fn the_first_rule_that_fits_decides() {
    let rules = "host replication rejected all reject\n\
                 host replication all 127.0.0.2/32 scram-sha-256\n\
                 host shop,replication all 127.0.0.1/32 trust\n";
    let relay = relay_with(rules, users([("standby", user(Some(scram_secret("pencil"))))])).await;
    let mut client = relay.stranger().await;
    assert_eq!(begin(&mut client, startup_of("standby", "true")).await, Ok(Asked::Nothing));
    let mut client = relay.stranger_from([127, 0, 0, 2]).await;
    let asked = log_in(&mut client, "standby", "pencil").await.unwrap();
    assert_eq!(asked, Asked::Scram(vec!["SCRAM-SHA-256".to_owned()]));
    for (address, name, replication, expected) in [
        (
            [127, 0, 0, 1],
            "rejected",
            "true",
            "pg_hba.conf rejects replication connection for host \"127.0.0.1\", user \"rejected\", no encryption",
        ),
        (
            [127, 0, 0, 3],
            "standby",
            "true",
            "no pg_hba.conf entry for replication connection from host \"127.0.0.3\", user \"standby\", no encryption",
        ),
        (
            [127, 0, 0, 2],
            "standby",
            "database",
            "no pg_hba.conf entry for host \"127.0.0.2\", user \"standby\", database \"shop\", no encryption",
        ),
        // A session for SQL is let in by nobody here, whatever the rules say.
        (
            [127, 0, 0, 1],
            "standby",
            "off",
            "no pg_hba.conf entry for host \"127.0.0.1\", user \"standby\", database \"shop\", no encryption",
        ),
    ] {
        let mut client = relay.stranger_from(address).await;
        let error = begin(&mut client, startup_of(name, replication)).await.unwrap_err();
        assert_eq!(said(&error), ("28000", expected));
    }
    let mut client = relay.local_stranger().await;
    let error = begin(&mut client, startup_of("standby", "true")).await.unwrap_err();
    assert_eq!(
        error.message,
        "no pg_hba.conf entry for replication connection from host \"[local]\", user \"standby\", no encryption"
    );
}

#[tokio::test]
async fn md5_is_asked_for_where_rule_and_secret_both_are_for_it() {
    let all = || {
        let expired = User { valid_until: Some(PgTimestamp(0)), ..user(Some(md5_secret("expired"))) };
        let (old, new) = (user(Some(md5_secret("old"))), user(Some(scram_secret("pencil"))));
        users([("old", old), ("new", new), ("expired", expired)])
    };
    let relay = relay_with("host replication all all md5", all()).await;
    for (name, password, is_md5, is_right) in [
        ("old", "pencil", true, true),
        ("old", "pen", true, false),
        ("new", "pencil", false, true),
        ("new", "pen", false, false),
        ("expired", "pencil", true, false),
    ] {
        let outcome = log_in(&mut relay.stranger().await, name, password).await;
        match outcome {
            Ok(asked) => assert!(is_right && matches!(asked, Asked::Md5(_)) == is_md5, "{name} {password}"),
            Err(error) => {
                assert!(!is_right, "{name} {password}");
                let text = format!("password authentication failed for user \"{name}\"");
                assert_eq!(said(&error), ("28P01", text.as_str()));
            }
        }
    }
    // Each is asked with a salt of its own, and an answer to another one proves nothing.
    let mut client = relay.stranger().await;
    let Ok(Asked::Md5(first)) = begin(&mut client, startup_of("old", "true")).await else { panic!() };
    let mut other = relay.stranger().await;
    let Ok(Asked::Md5(second)) = begin(&mut other, startup_of("old", "true")).await else { panic!() };
    assert_ne!(first, second);
    let reply = password_reply("old", b"pencil", first);
    other.send(&Message::Password(Password::of_text(reply))).await;
    assert_eq!(said(&other.refusal().await).0, "28P01");
    // By SCRAM such a secret proves nothing.
    relay.set_access(access("host replication all all scram-sha-256", Some(all())));
    let error = log_in(&mut relay.stranger().await, "old", "pencil").await.unwrap_err();
    assert_eq!(said(&error), ("28P01", "password authentication failed for user \"old\""));
}

#[tokio::test]
async fn strange_answers_to_a_request_for_md5_get_postgresqls_words() {
    let relay =
        relay_with("host replication all all md5", users([("old", user(Some(md5_secret("old"))))])).await;
    for (reply, expected) in [
        (Message::Password(Password::of_text("")), ("28P01", "empty password returned by client")),
        (Message::Password(Password::of_sasl(&b"no end"[..])), ("08P01", "invalid password packet size")),
        (Message::Password(Password::of_sasl(&b"a\0b\0"[..])), ("08P01", "invalid password packet size")),
        (
            Message::Query("IDENTIFY_SYSTEM".into()),
            ("08P01", "expected password response, got message type 81"),
        ),
    ] {
        let mut client = relay.stranger().await;
        let asked = begin(&mut client, startup_of("old", "true")).await;
        assert!(matches!(asked, Ok(Asked::Md5(_))), "{asked:?}");
        client.send(&reply).await;
        assert_eq!(said(&client.refusal().await), expected);
    }
}

#[tokio::test]
async fn a_user_that_does_not_exist_is_asked_the_same_each_time_and_refused_as_any_other() {
    let all = users([("standby", user(Some(scram_secret("pencil"))))]);
    let relay = relay_with("host replication all all scram-sha-256", all).await;
    let mut seen = Vec::new();
    for (name, password) in [("standby", "pen"), ("nobody", "pencil"), ("nobody", "pencil")] {
        let mut client = relay.stranger().await;
        let Ok(Asked::Scram(_)) = begin(&mut client, startup_of(name, "true")).await else { panic!() };
        let first = Password::of_sasl_initial("SCRAM-SHA-256", b"n,,n=,r=x");
        client.send(&Message::Password(first)).await;
        let Some(backend::Message::Authentication(Authentication::SaslContinue(data))) =
            client.receive().await
        else {
            panic!()
        };
        let text = String::from_utf8(data.to_vec()).unwrap();
        let [nonce, salt, iterations] = text.split(',').collect::<Vec<_>>()[..] else { panic!("{text}") };
        let proof = format!("c=biws,{nonce},p={}", "A".repeat(43) + "=");
        client.send(&Message::Password(Password::of_sasl(proof.into_bytes()))).await;
        let error = client.refusal().await;
        let expected = format!("password authentication failed for user \"{name}\"");
        assert_eq!(said(&error), ("28P01", expected.as_str()), "{password}");
        assert_eq!((error.detail, error.hint), (None, None));
        seen.push((nonce.len(), salt.to_owned(), iterations.to_owned()));
    }
    assert_eq!(seen[1], seen[2], "the same salt");
    assert_eq!((seen[0].0, seen[0].1.len(), &seen[0].2), (seen[1].0, seen[1].1.len(), &seen[1].2));
}

#[tokio::test]
async fn a_process_of_this_machine_is_known_by_its_user() {
    let own = ProcessSurroundings.user_name().unwrap();
    let maps = format!("relays {own} standby\nrelays {own} dc2_a\n");
    let relay = Relay::start().await;
    let mut rules = access("local replication all peer map=relays", None);
    rules.maps = UserMaps::parse(std::path::Path::new("ident"), &maps, &NoFiles).unwrap();
    relay.set_access(rules);
    for (name, is_allowed) in [("standby", true), ("dc2_a", true), ("other", false)] {
        let outcome = log_in(&mut relay.local_stranger().await, name, "").await;
        match outcome {
            Ok(asked) => assert!(is_allowed && asked == Asked::Nothing, "{name}"),
            Err(error) => {
                assert!(!is_allowed, "{name}");
                assert_eq!(said(&error), ("28000", "Peer authentication failed for user \"other\""));
            }
        }
    }
    relay.set_access(access("local replication all peer", None));
    assert_eq!(log_in(&mut relay.local_stranger().await, &own, "").await, Ok(Asked::Nothing));
    assert!(log_in(&mut relay.local_stranger().await, "standby", "").await.is_err());
}

#[tokio::test]
async fn what_is_read_again_holds_for_those_who_come_and_not_for_those_who_are_there() {
    let secret = || user(Some(scram_secret("pencil")));
    let relay = relay_with("host replication all all scram-sha-256", users([("standby", secret())])).await;
    let mut there = relay.stranger().await;
    log_in(&mut there, "standby", "pencil").await.unwrap();
    relay.set_access(access("host replication all all scram-sha-256", Some(users([("other", secret())]))));
    assert!(log_in(&mut relay.stranger().await, "standby", "pencil").await.is_err());
    log_in(&mut relay.stranger().await, "other", "pencil").await.unwrap();
    relay.set_access(access("host replication other all reject", None));
    assert!(log_in(&mut relay.stranger().await, "other", "pencil").await.is_err());
    assert!(there.query("IDENTIFY_SYSTEM").await.error.is_none());
}

#[tokio::test]
async fn a_user_has_as_many_sessions_as_he_may_have() {
    let limited = User { connection_limit: Some(1), ..user(Some(scram_secret("pencil"))) };
    let all = users([("one", limited), ("other", user(Some(scram_secret("pencil"))))]);
    let relay = relay_with("host all,replication all all scram-sha-256", all).await;
    let mut first = relay.stranger().await;
    log_in(&mut first, "one", "pencil").await.unwrap();
    let error = log_in(&mut relay.stranger().await, "one", "pencil").await.unwrap_err();
    assert_eq!(said(&error), ("53300", "too many connections for role \"one\""));
    let in_database = log_in_with(&mut relay.stranger().await, startup_of("one", "database"), "pencil").await;
    assert_eq!(said(&in_database.unwrap_err()).0, "53300");
    log_in(&mut relay.stranger().await, "other", "pencil").await.unwrap();
    drop(first);
    eventually("both are gone", || relay.registry.is_empty()).await;
    log_in(&mut relay.stranger().await, "one", "pencil").await.unwrap();
}

#[tokio::test]
async fn where_there_are_users_nobody_else_exists() {
    let relay = relay_with("host replication all all trust", users([("standby", user(None))])).await;
    log_in(&mut relay.stranger().await, "standby", "").await.unwrap();
    let error = log_in(&mut relay.stranger().await, "other", "").await.unwrap_err();
    assert_eq!(said(&error), ("28000", "role \"other\" does not exist"));
}
