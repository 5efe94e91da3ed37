//! Bytes that no client sends, before and after it is known.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncWriteExt;
use walrelay::{
    downstream::DownstreamSettings,
    protocol::{
        PASSWORD_BYTES_MAX, QUERY_BYTES_MAX,
        frontend::{FirstPacket, Message, PARAMETERS_MAX, Password},
    },
};

use crate::logins::{Asked, begin, said, scram_secret, startup_of, user, users};
use crate::support::{Client, Options, Relay, access, settings};

async fn guarded(settings: DownstreamSettings) -> Relay {
    let all = users([("standby", user(Some(scram_secret("pencil"))))]);
    let access = access("host replication all all scram-sha-256", Some(all));
    Relay::start_with(Options { access, settings, ..Options::default() }).await
}

/// A client that has been asked for its password.
async fn asked(relay: &Relay) -> Client {
    let mut client = relay.stranger().await;
    let asked = begin(&mut client, startup_of("standby", "true")).await;
    assert!(matches!(asked, Ok(Asked::Scram(_))), "{asked:?}");
    client
}

fn framed(tag: u8, len: u32) -> Vec<u8> {
    [&[tag][..], &len.to_be_bytes()].concat()
}

#[tokio::test]
async fn impossible_lengths_and_types_end_a_login_at_once() {
    let relay = guarded(settings()).await;
    let mut witness = asked(&relay).await;
    let mut packet = BytesMut::new();
    FirstPacket::Startup(startup_of("standby", "true")).encode(&mut packet);
    let too_long = u32::try_from(PASSWORD_BYTES_MAX).unwrap() + 5;
    for bytes in [
        framed(b'p', 0),
        framed(b'p', 3),
        framed(b'p', 0x7fff_ffff),
        framed(b'p', 0xffff_ffff),
        framed(b'p', 0x8000_0000),
        framed(b'p', too_long),
        framed(b'\0', 8),
        framed(0xff, 8),
        // A second startup packet.
        packet.to_vec(),
    ] {
        let mut client = asked(&relay).await;
        client.send_bytes(&bytes).await;
        // What began as a protocol ends without a word, or with this one.
        if let Some(message) = client.receive().await {
            let walrelay::protocol::backend::Message::ErrorResponse(error) = message else {
                panic!("{message:?}")
            };
            assert_eq!(said(&error).0, "08P01", "{bytes:?}");
            assert!(client.receive().await.is_none(), "{bytes:?}: stays open");
        }
    }
    witness.send(&Message::Password(Password::of_sasl_initial("SCRAM-SHA-256", b"n,,n=,r=x"))).await;
    assert!(witness.receive().await.is_some(), "others go on");
}

#[tokio::test]
async fn impossible_lengths_and_types_end_a_session_with_a_word() {
    let relay = Relay::start().await;
    let mut witness = relay.client().await;
    let too_long = u32::try_from(QUERY_BYTES_MAX).unwrap() + 5;
    for bytes in [
        framed(b'Q', 0),
        framed(b'Q', 3),
        framed(b'Q', 0x7fff_ffff),
        framed(b'Q', 0xffff_fff0),
        framed(b'Q', too_long),
        framed(b'd', 2),
        framed(b'?', 8),
        framed(b'p', 5),
    ] {
        let mut client = relay.client().await;
        client.send_bytes(&bytes).await;
        if bytes[0] == b'p' {
            client.send_bytes(b"\0").await;
        }
        assert_eq!(said(&client.refusal().await).0, "08P01", "{bytes:?}");
    }
    assert!(witness.query("IDENTIFY_SYSTEM").await.error.is_none());
}

#[tokio::test]
async fn a_login_in_drops_is_ended_as_a_whole() {
    let settings = DownstreamSettings { authentication_timeout: Duration::from_millis(400), ..settings() };
    let relay = guarded(settings).await;
    let mut client = asked(&relay).await;
    let begun = std::time::Instant::now();
    let mut message = BytesMut::new();
    Message::Password(Password::of_sasl_initial("SCRAM-SHA-256", b"n,,n=,r=0123456789")).encode(&mut message);
    // Each byte comes in time; the whole does not.
    for byte in message {
        if client.socket.write_all(&[byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    assert!(client.receive().await.is_none());
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn names_with_anything_in_them_are_taken_as_they_are_or_refused() {
    let relay = guarded(settings()).await;
    for name in ["new\nline", "\u{1b}[31mred", "quo\"te", "tab\tbed", "\u{202e}rtl", &"long".repeat(100)] {
        let mut client = relay.stranger().await;
        let asked = begin(&mut client, startup_of(name, "true")).await;
        assert!(matches!(asked, Ok(Asked::Scram(_))), "{name:?}: {asked:?}");
    }
    let mut client = relay.stranger().await;
    let mut body = 196_608_u32.to_be_bytes().to_vec();
    body.extend(b"user\0\xff\xfe\0replication\0true\0\0");
    let mut packet = u32::try_from(body.len() + 4).unwrap().to_be_bytes().to_vec();
    packet.extend(body);
    client.send_bytes(&packet).await;
    assert_eq!(said(&client.refusal().await).0, "08P01", "no text");
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    for name in ["\"a\nb\"", "\"a\u{1b}\"", "\"../x\"", "\"A\"", "\"\u{e9}\"", "\"\""] {
        let answer = client.query(&format!("CREATE_REPLICATION_SLOT {name} PHYSICAL")).await;
        assert!(["42602", "42622"].contains(&answer.sqlstate()), "{name:?}: {}", answer.sqlstate());
    }
    assert!(relay.store.slot_states().is_empty());
}

#[tokio::test]
async fn more_parameters_than_any_client_has_are_not_even_kept() {
    let relay = Relay::start().await;
    let with = |count: usize| {
        let mut startup = startup_of("standby", "true");
        let more = count - startup.parameters.len();
        startup.parameters.extend((0..more).map(|at| (format!("walrelay.x{at}"), "y".to_owned())));
        startup
    };
    let mut client = relay.stranger().await;
    assert_eq!(begin(&mut client, with(PARAMETERS_MAX)).await, Ok(Asked::Nothing));
    let mut client = relay.stranger().await;
    client.send_packet(&FirstPacket::Startup(with(PARAMETERS_MAX + 1))).await;
    assert!(client.receive().await.is_none(), "closed without a word");
}
