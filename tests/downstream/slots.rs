//! Slots as clients make and use them.

use walrelay::protocol::backend::Message;
use walrelay::wal::TimelineId;

use crate::support::{Relay, eventually};

#[tokio::test]
async fn a_permanent_slot_is_made_read_and_dropped() {
    let mut relay = Relay::start().await;
    relay.grow(10_000);
    let mut client = relay.client().await;
    let answer = client.query("CREATE_REPLICATION_SLOT barman PHYSICAL").await;
    let names: Vec<_> = answer.columns.iter().map(|(name, oid)| (name.as_str(), *oid)).collect();
    let expected =
        [("slot_name", 25), ("consistent_point", 25), ("snapshot_name", 25), ("output_plugin", 25)];
    assert_eq!(names, expected);
    let row: Vec<_> = (0..4).map(|column| answer.value(column)).collect();
    assert_eq!(row, [Some("barman"), Some("0/0"), None, None]);
    assert_eq!(answer.tags, ["CREATE_REPLICATION_SLOT"]);

    let answer = client.query("READ_REPLICATION_SLOT barman").await;
    let row: Vec<_> = (0..3).map(|column| answer.value(column)).collect();
    assert_eq!(row, [Some("physical"), None, None], "nothing is reserved yet");
    let answer = client.query("READ_REPLICATION_SLOT nobody").await;
    assert_eq!(answer.rows, [vec![None, None, None]], "a slot that is not there is a row of nulls");

    let answer = client.query("CREATE_REPLICATION_SLOT barman PHYSICAL").await;
    assert_eq!(
        (answer.sqlstate(), answer.message()),
        ("42710", "replication slot \"barman\" already exists")
    );
    let answer = client.query("CREATE_REPLICATION_SLOT \"Bad\" PHYSICAL").await;
    assert_eq!(answer.sqlstate(), "42602");

    let answer = client.query("DROP_REPLICATION_SLOT barman").await;
    assert_eq!(
        (answer.tags.as_slice(), answer.columns.len()),
        (&["DROP_REPLICATION_SLOT".to_owned()][..], 0)
    );
    let answer = client.query("DROP_REPLICATION_SLOT barman").await;
    assert_eq!(
        (answer.sqlstate(), answer.message()),
        ("42704", "replication slot \"barman\" does not exist")
    );
}

#[tokio::test]
async fn reserved_wal_is_told_with_its_timeline() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let answer = client.query("CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL)").await;
    assert_eq!(answer.value(1), Some("0/0"), "also with RESERVE_WAL");
    let answer = client.query("READ_REPLICATION_SLOT s").await;
    assert_eq!(answer.value(1), Some(relay.start_lsn().to_string().as_str()));
    assert_eq!(answer.value(2), Some("1"));
}

#[tokio::test]
async fn all_slots_in_use_is_told_with_the_way_out() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    for name in ["a", "b", "c", "d"] {
        assert!(client.query(&format!("CREATE_REPLICATION_SLOT {name} PHYSICAL")).await.error.is_none());
    }
    let answer = client.query("CREATE_REPLICATION_SLOT e PHYSICAL").await;
    assert_eq!((answer.sqlstate(), answer.message()), ("53400", "all replication slots are in use"));
    assert_eq!(answer.error.unwrap().hint.unwrap(), "Free one or increase max_replication_slots.");
}

#[tokio::test]
async fn a_temporary_slot_goes_with_its_session() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    client.query("CREATE_REPLICATION_SLOT \"pg_basebackup_7\" TEMPORARY PHYSICAL ( RESERVE_WAL)").await;
    assert!(relay.store.slots().get("pg_basebackup_7").is_some());
    let answer = relay.client().await.query("DROP_REPLICATION_SLOT pg_basebackup_7").await;
    assert_eq!(answer.sqlstate(), "55006");
    drop(client);
    eventually("the slot is gone", || relay.store.slots().list().is_empty()).await;
}

#[tokio::test]
async fn a_temporary_slot_goes_with_an_error() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    client.query("CREATE_REPLICATION_SLOT t TEMPORARY PHYSICAL").await;
    client.query("CREATE_REPLICATION_SLOT p PHYSICAL").await;
    client.query("SELECT 1").await;
    let names: Vec<_> = relay.store.slots().list().into_iter().map(|slot| slot.name).collect();
    assert_eq!(names, ["p"]);
}

#[tokio::test]
async fn a_slot_in_use_is_busy_for_others_until_its_stream_ends() {
    let mut relay = Relay::start().await;
    relay.grow(1_000);
    let start = relay.start_lsn();
    let mut owner = relay.stranger().await;
    let pid = owner.log_in(&crate::support::startup()).await.pid;
    owner.query("CREATE_REPLICATION_SLOT s PHYSICAL").await;
    owner.start_streaming(&format!("START_REPLICATION SLOT \"s\" {start} TIMELINE 1")).await;

    let mut other = relay.client().await;
    let busy = format!("replication slot \"s\" is active for PID {pid}");
    for query in [format!("START_REPLICATION SLOT s {start}"), "DROP_REPLICATION_SLOT s".to_owned()] {
        let answer = other.query(&query).await;
        assert_eq!((answer.sqlstate(), answer.message()), ("55006", busy.as_str()), "{query}");
    }
    let answer = other.query(&format!("START_REPLICATION SLOT nobody {start}")).await;
    assert_eq!(answer.sqlstate(), "42704");

    let waiting = tokio::spawn(async move { other.query("DROP_REPLICATION_SLOT s WAIT").await });
    tokio::time::sleep(std::time::Duration::from_millis(250)).await;
    assert!(!waiting.is_finished());
    drop(owner);
    assert_eq!(waiting.await.unwrap().tags, ["DROP_REPLICATION_SLOT"]);
}

#[tokio::test]
async fn a_slot_follows_what_is_flushed_and_never_past_what_was_sent() {
    let mut relay = Relay::start().await;
    let end = relay.grow(300_000);
    let start = relay.start_lsn();
    let mut client = relay.client().await;
    client.query("CREATE_REPLICATION_SLOT s PHYSICAL").await;
    client.start_streaming(&format!("START_REPLICATION SLOT s {start} TIMELINE 1")).await;
    client.receive_wal(start, end).await;
    let restart_lsn = || relay.store.slots().get("s").unwrap().restart_lsn;
    assert_eq!(restart_lsn(), None, "nothing is kept before the first flush");
    client.reply(Some(end), Some(start.advance(8192)), false).await;
    eventually("the slot follows", || restart_lsn() == Some(start.advance(8192))).await;
    client.reply(Some(end.advance(1 << 40)), Some(end.advance(1 << 40)), false).await;
    eventually("the slot stops at what was sent", || restart_lsn() == Some(end)).await;
    client.reply(Some(start), Some(start), true).await;
    client.streamed().await;
    assert_eq!(restart_lsn(), Some(end), "nor does it go back within a stream");
}

#[tokio::test]
async fn what_is_reported_of_a_dead_branch_while_the_relay_leaves_it_moves_no_slot_there() {
    // Whether the session hears first of the report or of the switch is chance.
    for _ in 0..12 {
        let mut relay = Relay::start().await;
        let fork = relay.grow(100_000);
        let end = relay.grow(100_000);
        let start = relay.start_lsn();
        let mut client = relay.client().await;
        client.query("CREATE_REPLICATION_SLOT s PHYSICAL").await;
        client.start_streaming(&format!("START_REPLICATION SLOT s {start} TIMELINE 1")).await;
        client.receive_wal(start, end).await;
        client.reply(Some(start), Some(start), false).await;
        let restart_lsn = || relay.store.slots().get("s").unwrap().restart_lsn;
        eventually("the slot is used", || restart_lsn() == Some(start)).await;
        client.reply(Some(end), Some(end), false).await;
        relay.switch(TimelineId::new(2).unwrap(), fork);
        while !matches!(client.receive().await, Some(Message::CopyDone)) {}
        let restart_lsn = relay.store.slots().get("s").unwrap().restart_lsn;
        assert!(restart_lsn <= Some(fork), "the slot is at {restart_lsn:?}, the fork at {fork}");
    }
}

#[tokio::test]
async fn what_is_reported_of_a_dead_branch_moves_no_slot_there_although_the_session_ends_before_it_hears() {
    // Whether the session hears of the switch before it ends is chance.
    for _ in 0..12 {
        let mut relay = Relay::start().await;
        let fork = relay.grow(100_000);
        let end = relay.grow(100_000);
        let start = relay.start_lsn();
        let mut client = relay.client().await;
        client.query("CREATE_REPLICATION_SLOT s PHYSICAL").await;
        client.start_streaming(&format!("START_REPLICATION SLOT s {start} TIMELINE 1")).await;
        client.receive_wal(start, end).await;
        client.reply(Some(start), Some(start), false).await;
        let slot = || relay.store.slots().get("s").unwrap();
        eventually("the slot is used", || slot().restart_lsn == Some(start)).await;
        client.reply(Some(end), Some(end), false).await;
        relay.switch(TimelineId::new(2).unwrap(), fork);
        drop(client);
        let slot = || relay.store.slots().get("s").unwrap();
        eventually("the session to be over", || slot().active_pid.is_none()).await;
        let restart_lsn = slot().restart_lsn;
        assert!(restart_lsn <= Some(fork), "the slot is at {restart_lsn:?}, the fork at {fork}");
    }
}
