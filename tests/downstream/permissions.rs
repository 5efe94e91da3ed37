//! What a user may do: every command with every permission, and nothing else.

use walrelay::access::{Permission, User};

use crate::logins::{log_in_with, said, startup_of, user, users};
use crate::support::{Answer, Options, Relay, access};

use Permission::{Admin, BaseBackup, Sql, Stream};

/// A command, the versions that know it, in which kind of session, and what it takes.
struct Verb {
    command: &'static str,
    since: u32,
    database: bool,
    needs: Option<Permission>,
    refusal: &'static str,
    refusal_before_16: &'static str,
}

const SLOTS: &str = "permission denied to use replication slots";
const SLOTS_BEFORE_16: &str = "must be superuser or replication role to use replication slots";
const WALSENDER: &str = "permission denied to start WAL sender";
const WALSENDER_BEFORE_16: &str = "must be superuser or replication role to start walsender";
const BACKUP: &str = "permission denied to take a base backup";
const SQL: &str = "permission denied to execute SQL";

const fn verb(command: &'static str, needs: Option<Permission>) -> Verb {
    let (refusal, refusal_before_16) = match needs {
        Some(BaseBackup) => (BACKUP, BACKUP),
        Some(Sql) => (SQL, SQL),
        _ => (WALSENDER, WALSENDER_BEFORE_16),
    };
    Verb { command, since: 13, database: false, needs, refusal, refusal_before_16 }
}

const fn slot_verb(command: &'static str) -> Verb {
    let common = verb(command, Some(Stream));
    Verb { refusal: SLOTS, refusal_before_16: SLOTS_BEFORE_16, ..common }
}

const VERBS: [Verb; 14] = [
    verb("IDENTIFY_SYSTEM", None),
    verb("SHOW wal_segment_size", None),
    verb("TIMELINE_HISTORY 7", Some(Stream)),
    verb("START_REPLICATION 0/1000000 TIMELINE 9", Some(Stream)),
    verb("START_REPLICATION SLOT \"none\" 0/1000000 TIMELINE 1", Some(Stream)),
    verb("START_REPLICATION SLOT l LOGICAL 0/0", Some(Stream)),
    slot_verb("CREATE_REPLICATION_SLOT s TEMPORARY PHYSICAL"),
    slot_verb("CREATE_REPLICATION_SLOT l LOGICAL pgoutput"),
    slot_verb("DROP_REPLICATION_SLOT none"),
    Verb { since: 15, ..slot_verb("READ_REPLICATION_SLOT none") },
    Verb { since: 17, ..slot_verb("ALTER_REPLICATION_SLOT none (FAILOVER true)") },
    verb("BASE_BACKUP ( LABEL 'x' )", Some(BaseBackup)),
    Verb { since: 17, ..verb("UPLOAD_MANIFEST", Some(BaseBackup)) },
    Verb { database: true, ..verb("SELECT 1", Some(Sql)) },
];

const MIXES: [&[Permission]; 9] = [
    &[],
    &[Stream],
    &[BaseBackup],
    &[Sql],
    &[Admin],
    &[Stream, BaseBackup],
    &[Stream, Admin],
    &[BaseBackup, Sql],
    &[Stream, BaseBackup, Sql, Admin],
];

async fn ask(relay: &Relay, name: &str, verb: &Verb) -> Result<Answer, walrelay::protocol::ServerError> {
    let mut client = relay.stranger().await;
    let mode = if verb.database { "database" } else { "true" };
    log_in_with(&mut client, startup_of(name, mode), "").await?;
    Ok(client.query(verb.command).await)
}

#[tokio::test]
async fn every_command_wants_the_permission_it_should() {
    for (major, version_num) in [(14, 140_023), (15, 150_018), (16, 160_014), (17, 170_011), (18, 180_006)] {
        let names: Vec<String> = (0..MIXES.len()).map(|at| format!("user_{at}")).collect();
        let all = names
            .iter()
            .zip(MIXES)
            .map(|(name, mix)| (name.clone(), User { may: mix.iter().copied().collect(), ..user(None) }));
        let all = walrelay::access::Users::new(all.collect());
        let options = Options {
            version: ("x", version_num),
            access: access("host all,replication all all trust", Some(all)),
            ..Options::default()
        };
        let relay = Relay::start_with(options).await;
        for (name, mix) in names.iter().zip(MIXES) {
            for verb in VERBS.iter().filter(|verb| verb.since <= major) {
                let about = format!("{major}: {} with {mix:?}", verb.command);
                let answer = match ask(&relay, name, verb).await {
                    Ok(answer) => answer,
                    Err(error) => {
                        let text = if major < 16 { WALSENDER_BEFORE_16 } else { WALSENDER };
                        assert_eq!(said(&error), ("42501", text), "{about}");
                        assert!(mix.is_empty() || *mix == [Admin], "{about}");
                        continue;
                    }
                };
                assert!(!mix.is_empty() && *mix != [Admin], "{about}: let in");
                let may = verb.needs.is_none_or(|needed| mix.contains(&needed));
                if may {
                    assert_ne!(answer.sqlstate(), "42501", "{about}: {}", answer.message());
                } else {
                    let refusal = if major < 16 { verb.refusal_before_16 } else { verb.refusal };
                    assert_eq!((answer.sqlstate(), answer.message()), ("42501", refusal), "{about}");
                }
            }
        }
    }
}

#[tokio::test]
async fn without_permission_nothing_has_happened_and_the_session_stays() {
    let reader = User { may: [BaseBackup].into_iter().collect(), ..user(None) };
    let access = access("host replication all all trust", Some(users([("reader", reader)])));
    let mut relay = Relay::start_with(Options { access, ..Options::default() }).await;
    let (start, _) = (relay.start_lsn(), relay.grow(10_000));
    let mut client = relay.stranger().await;
    log_in_with(&mut client, startup_of("reader", "true"), "").await.unwrap();
    for command in
        ["CREATE_REPLICATION_SLOT s PHYSICAL RESERVE_WAL", &format!("START_REPLICATION {start} TIMELINE 1")]
    {
        assert_eq!(client.query(command).await.sqlstate(), "42501", "{command}");
    }
    assert!(relay.store.slot_states().is_empty(), "a slot was made");
    let answer = client.query("BASE_BACKUP").await;
    assert_eq!(
        (answer.sqlstate(), answer.message()),
        ("0A000", "BASE_BACKUP is not supported by a WAL relay")
    );
    let detail = client.query("DROP_REPLICATION_SLOT s").await.error.unwrap().detail;
    assert_eq!(
        detail.as_deref(),
        Some("User \"reader\" does not have the permission \"stream\" on this relay.")
    );
    assert!(client.query("IDENTIFY_SYSTEM").await.error.is_none());
}

#[tokio::test]
async fn without_users_everybody_may_do_what_there_is_but_administer() {
    let relay = Relay::start().await;
    for verb in &VERBS {
        let answer = ask(&relay, "anybody", verb).await.unwrap();
        assert_ne!(answer.sqlstate(), "42501", "{}: {}", verb.command, answer.message());
    }
}
