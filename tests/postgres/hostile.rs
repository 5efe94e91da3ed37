//! Peers that mean harm before they are known: servers that the relay connects to, and strangers that connect to it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::support::MB;
use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::postgres::Settings;
use crate::support::raw::RawClient;
use crate::support::relay::Relay;
use crate::support::wait::wait_until;

/// What a server answers to a client's message, and the message before it.
type Answer = fn(&[u8]) -> Vec<u8>;

/// A server that says this, one answer after another, to whoever comes, and then nothing more.
fn serve(answers: &'static [Answer]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                for answer in answers {
                    let mut heard = vec![0; 64 << 10];
                    let Ok(length) = stream.read(&mut heard) else { return };
                    if length == 0 || stream.write_all(&answer(&heard[..length])).is_err() {
                        return;
                    }
                }
                drain(&mut stream);
            });
        }
    });
    port
}

/// Until the client has had enough.
fn drain(stream: &mut TcpStream) {
    let mut heard = [0; 4096];
    while stream.read(&mut heard).is_ok_and(|length| length > 0) {}
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[kind][..], &length.to_be_bytes(), body].concat()
}

fn authentication(kind: u32, data: &[u8]) -> Vec<u8> {
    message(b'R', &[&kind.to_be_bytes()[..], data].concat())
}

fn offer(_startup: &[u8]) -> Vec<u8> {
    authentication(10, b"SCRAM-SHA-256\0\0")
}

/// The nonce in a client's first message.
fn nonce(heard: &[u8]) -> String {
    let text = String::from_utf8_lossy(heard).into_owned();
    text.rsplit_once("r=").unwrap().1.to_owned()
}

fn many_iterations(heard: &[u8]) -> Vec<u8> {
    authentication(11, format!("r={}x,s=AAAAAAAAAAAAAAAAAAAAAA==,i=2000000000", nonce(heard)).as_bytes())
}

fn long_nonce(heard: &[u8]) -> Vec<u8> {
    let nonce = nonce(heard) + &"x".repeat(60_000);
    authentication(11, format!("r={nonce},s=AAAAAAAAAAAAAAAAAAAAAA==,i=4096").as_bytes())
}

fn long_salt(heard: &[u8]) -> Vec<u8> {
    authentication(11, format!("r={}x,s={},i=4096", nonce(heard), "A".repeat(60_000)).as_bytes())
}

fn nothing_to_know_it_by(_startup: &[u8]) -> Vec<u8> {
    message(b'E', b"Mno code, no severity\0\0")
}

fn no_field_at_all(_startup: &[u8]) -> Vec<u8> {
    message(b'E', b"\0")
}

fn endless(_startup: &[u8]) -> Vec<u8> {
    [&b"E"[..], &0x7fff_fff0_u32.to_be_bytes(), &[b'x'; 4096]].concat()
}

#[test]
fn a_server_that_lies_before_it_is_known_is_left_and_costs_nothing() {
    for (name, answers, words) in [
        ("iterations", &[offer as Answer, many_iterations as Answer][..], "2000000000"),
        ("nonce", &[offer as Answer, long_nonce as Answer], "nonce"),
        ("salt", &[offer as Answer, long_salt as Answer], "salt"),
        ("no_code", &[nothing_to_know_it_by as Answer], "no code, no severity"),
        ("empty", &[no_field_at_all as Answer], ""),
        ("endless", &[endless as Answer], ""),
    ] {
        let port = serve(answers);
        let conninfo = format!(
            "host=127.0.0.1 port={port} user=relay password=pencil sslmode=disable connect_timeout=5"
        );
        let mut relay = Relay::new(name, 1).with_conninfo(&conninfo);
        let begun = Instant::now();
        relay.launch();
        wait_until("the server to be refused", || {
            relay.assert_running();
            relay.status()["upstream"]["last_error"].is_string()
        });
        let told = relay.status()["upstream"]["last_error"].as_str().unwrap().to_owned();
        assert!(told.contains(words), "{name}: {told}");
        let busy = relay.process().cpu_time();
        assert!(busy < Duration::from_secs(3), "{name}: {busy:?} of work in {:?}", begun.elapsed());
        assert!(relay.process().memory("RssAnon") < 100 * MB, "{name}");
        assert!(relay.terminate().success(), "{name}");
    }
}

#[test]
fn strangers_cost_little_memory_each_however_much_they_send() {
    const STRANGERS: u64 = 200;
    let Some(installation) = Installation::any() else { return };
    let primary = Settings::new().segment_size_mb(1).start(&installation);
    let mut relay = Relay::new("relay", primary.port)
        .with("downstream.unauthenticated_connections_max", "500")
        .with("downstream.unauthenticated_connections_per_address_max", "500");
    let own = Relay::command_with_input(&["scram", "--user", "postgres"], "pencil\n");
    let users = relay.file("users.toml", 0o600, &own);
    relay.set("downstream.users", &format!("{users:?}"));
    relay.launch();
    wait_until("the relay to have streamed", || relay.status()["upstream"]["sessions"].as_u64() > Some(0));
    let before = relay.process().memory("RssAnon");
    let names: Vec<String> = (0..250).map(|at| format!("walrelay.parameter_{at}")).collect();
    let parameters: Vec<(&str, &str)> = [("user", "postgres"), ("replication", "true")]
        .into_iter()
        .chain(names.iter().map(|name| (name.as_str(), "a value")))
        .collect();
    let strangers: Vec<RawClient> = (0..STRANGERS)
        .map(|_| {
            let mut stranger = RawClient::connect(relay.port).unwrap();
            stranger.send_startup(&parameters).unwrap();
            let asked = stranger.read_message(Duration::from_secs(30)).unwrap().unwrap();
            assert_eq!(asked.kind, b'R');
            // Almost all of the longest message, and far more than that behind it.
            stranger.send_bytes(&[&b"p"[..], &10_004_u32.to_be_bytes(), &[b'x'; 9_999]].concat()).unwrap();
            stranger
        })
        .collect();
    write_wal(&primary, MB / 4);
    relay.wait_flushed(primary.flushed());
    let each = relay.process().memory("RssAnon").saturating_sub(before) / STRANGERS;
    assert!(each < 128 << 10, "{each} bytes for each of them");
    drop(strangers);
}
