//! What is said in TLS handshakes and around them: bytes that somebody puts before one, names and versions, other protocols,
//! and clients that never come to an end of it. What a peer may do is compared with what libpq and PostgreSQL let it do.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use crate::support::MB;
use crate::support::certificates::Authority;
use crate::support::lab::Installation;
use crate::support::load::write_wal;
use crate::support::psql::run_psql_in;
use crate::support::raw::{RawClient, ServerError};
use crate::support::relay::Relay;
use crate::support::tls_site::{Site, showing_root};
use crate::support::wait::{wait_for, wait_until};

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// A server that says this to whoever asks for TLS. What it hears after that, and how many have come.
fn server(answer: &'static [u8]) -> (u16, Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (told, heard) = sync_channel(64);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = [0; 8];
            if stream.read_exact(&mut request).is_err() || stream.write_all(answer).is_err() {
                continue;
            }
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut all = if request == SSL_REQUEST { Vec::new() } else { request.to_vec() };
            let mut piece = [0; 16 << 10];
            // A hello comes in one piece, or its sender is waiting for more of us.
            let length = stream.read(&mut piece).unwrap_or(0);
            all.extend(&piece[..length]);
            if told.send(all).is_err() {
                return;
            }
        }
    });
    (port, heard)
}

/// The relay at this connection string, until it has said why it does not stream.
fn complaint(name: &str, conninfo: &str, environment: &[(&str, &str)]) -> String {
    let mut relay = Relay::new(name, 1).with_conninfo(conninfo);
    relay.unset("upstream.slot");
    let environment = environment.iter().chain(&[("HOME", "/nonexistent")]);
    relay.environment.extend(environment.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    relay.launch();
    wait_for("the relay to say why not", || {
        relay.status()["upstream"]["last_error"].as_str().map(str::to_owned)
    })
}

#[test]
fn what_a_server_says_before_tls_is_not_believed() {
    let Some(installation) = Installation::any() else { return };
    // What follows is a login without a password, in clear.
    let let_in = b"SR\0\0\0\x08\0\0\0\0Z\0\0\0\x05I";
    let error = b"E\0\0\0\x2bSFATAL\0C28000\0Mcome in by another way\0\0";
    println!("| answer | sslmode | psql | relay |");
    for (what, answer, words) in [
        ("stuffed", &let_in[..], ("SSL", "SSL")),
        (
            "error",
            &error[..],
            (
                "server sent an error response during SSL exchange",
                "server sent an error response during SSL exchange",
            ),
        ),
        (
            "odd",
            b"X",
            (
                "received invalid response to SSL negotiation: X",
                "received invalid response to SSL negotiation: X",
            ),
        ),
        (
            "zero",
            b"\0",
            (
                "received invalid response to SSL negotiation:",
                "received invalid response to SSL negotiation: \\u{0}",
            ),
        ),
    ] {
        for mode in ["prefer", "require"] {
            let (port, heard) = server(answer);
            let conninfo = format!("host=127.0.0.1 port={port} user=relay dbname=postgres sslmode={mode}");
            let theirs = run_psql_in(&[], &installation, &conninfo, "select 1").unwrap_err();
            while heard.try_recv().is_ok() {}
            let ours = complaint(&format!("{what}_{mode}"), &conninfo, &[]);
            println!("| {what} | {mode} | {} | {ours} |", theirs.replace('\n', " "));
            assert!(theirs.contains(words.0), "{what}, {mode}: {theirs}");
            assert!(ours.contains(words.1), "{what}, {mode}: {ours}");
            assert!(!ours.contains("another way"), "anybody may have said that: {ours}");
            // Nobody has sent a startup packet over this, nor anything else in clear, where TLS is demanded.
            if mode == "require" {
                let hellos: Vec<_> = heard.try_iter().collect();
                let is_clear = |heard: &Vec<u8>| heard.windows(5).any(|bytes| bytes == b"relay");
                assert!(!hellos.iter().any(is_clear), "{what}: {hellos:?}");
            }
        }
    }
}

#[test]
fn what_a_client_says_before_tls_is_refused() {
    let Some(installation) = Installation::any() else { return };
    let site = Site::new(&installation, &Authority::new("root").issue("server", "IP:127.0.0.1"));
    let parameters = b"\0\x03\0\0user\0standby\0replication\0true\0\0";
    let startup = [&u32::try_from(parameters.len() + 4).unwrap().to_be_bytes()[..], parameters].concat();
    let both = [&SSL_REQUEST[..], &startup].concat();
    let mut stuffed = RawClient::connect(site.relay.port).unwrap();
    stuffed.send_bytes(&both).unwrap();
    assert_eq!(stuffed.read_byte().unwrap(), Some(b'S'));
    let answer = stuffed.read_message(Duration::from_secs(10)).unwrap().unwrap();
    let error = ServerError::of(&answer);
    assert_eq!(
        (error.code.as_str(), error.message.as_str()),
        ("08P01", "received unencrypted data after SSL request")
    );
    assert!(stuffed.is_closed_within(Duration::from_secs(10)));
    // A server of PostgreSQL's own waits for a handshake, and says no more in clear.
    let mut stuffed = RawClient::connect(site.primary.port).unwrap();
    stuffed.send_bytes(&both).unwrap();
    assert_eq!(stuffed.read_byte().unwrap(), Some(b'S'));
    let more = stuffed.read_message(Duration::from_secs(1));
    assert!(more.as_ref().is_err() || more.as_ref().is_ok_and(Option::is_none), "{more:?}");
    // The same a moment later is the beginning of a handshake, and a bad one.
    let mut late = RawClient::connect(site.relay.port).unwrap();
    late.send_bytes(&SSL_REQUEST).unwrap();
    assert_eq!(late.read_byte().unwrap(), Some(b'S'));
    late.send_bytes(&startup).unwrap();
    assert!(late.is_closed_within(Duration::from_secs(10)));
    site.relay.wait_logged("received unencrypted data after SSL request");
}

#[test]
fn a_server_hears_its_name_unless_it_is_an_address_or_must_not() {
    let Some(installation) = Installation::since(14) else { return };
    for (rest, is_named) in [
        ("host=localhost", true),
        ("host=localhost sslsni=1", true),
        ("host=localhost sslsni=0", false),
        ("host=127.0.0.1", false),
        ("host=localhost hostaddr=127.0.0.1", true),
    ] {
        let (port, heard) = server(b"S");
        let conninfo = format!("{rest} port={port} user=relay dbname=postgres sslmode=require");
        let hello = || heard.recv_timeout(Duration::from_secs(20)).unwrap();
        let names =
            |hello: &[u8]| hello.windows(9).any(|bytes| bytes == b"localhost" || bytes == b"127.0.0.1");
        run_psql_in(&[], &installation, &conninfo, "select 1").unwrap_err();
        let theirs = hello();
        complaint("named", &conninfo, &[]);
        let ours = hello();
        assert_eq!((theirs[0], ours[0]), (0x16, 0x16), "both are handshakes");
        assert_eq!((names(&theirs), names(&ours)), (is_named, is_named), "{rest}");
    }
}

#[test]
fn the_systems_roots_are_found_where_openssl_finds_them() {
    let Some(installation) = Installation::since(16) else { return };
    let (authority, other) = (Authority::new("root"), Authority::new("other"));
    let site = Site::new(&installation, &authority.issue("server", "IP:127.0.0.1,DNS:localhost"));
    let conninfo = format!(
        "host=localhost port={} user=standby password=secret dbname=postgres sslrootcert=system",
        site.primary.port
    );
    for (roots, is_believed) in [(authority.root(), true), (other.root(), false)] {
        let environment = [("SSL_CERT_FILE", roots.to_str().unwrap())];
        let theirs = run_psql_in(&environment, &installation, &conninfo, "select 1");
        let name = format!("system_{is_believed}");
        let mut relay = Relay::new(&name, 1).with_conninfo(&conninfo);
        relay.unset("upstream.slot");
        relay.environment.push(("SSL_CERT_FILE".to_owned(), roots.to_str().unwrap().to_owned()));
        relay.environment.push(("HOME".to_owned(), "/nonexistent".to_owned()));
        relay.launch();
        let ours = wait_for("the relay to stream or to say why not", || {
            let status = relay.status();
            let error = status["upstream"]["last_error"].as_str().map(|error| Err(error.to_owned()));
            error.or_else(|| (status["upstream"]["sessions"].as_u64() > Some(0)).then_some(Ok(())))
        });
        assert_eq!((theirs.is_ok(), ours.is_ok()), (is_believed, is_believed), "{theirs:?} {ours:?}");
    }
}

#[test]
fn versions_of_tls_are_those_that_both_sides_allow() {
    let Some(installation) = Installation::in_turn(1) else { return };
    let authority = Authority::new("root");
    let server = authority.issue("server", "IP:127.0.0.1");
    println!("| server | client | psql | relay |");
    for (lines, tls, cases) in [
        (
            "",
            "",
            [
                ("", Some("TLSv1.3")),
                ("ssl_min_protocol_version=TLSv1.3", Some("TLSv1.3")),
                ("ssl_max_protocol_version=TLSv1.2", Some("TLSv1.2")),
            ],
        ),
        (
            "ssl_max_protocol_version = 'TLSv1.2'",
            "",
            [
                ("", Some("TLSv1.2")),
                ("ssl_min_protocol_version=TLSv1.3", None),
                ("ssl_max_protocol_version=TLSv1.2", Some("TLSv1.2")),
            ],
        ),
        (
            "ssl_min_protocol_version = 'TLSv1.3'",
            ", min_version = \"TLSv1.3\"",
            [
                ("", Some("TLSv1.3")),
                ("ssl_min_protocol_version=TLSv1.3", Some("TLSv1.3")),
                ("ssl_max_protocol_version=TLSv1.2", None),
            ],
        ),
    ] {
        let mut site = Site::with_lines(&installation, &server, lines);
        site.set_tls(tls);
        site.relay.terminate();
        site.relay.start();
        for (at, (rest, expected)) in cases.into_iter().enumerate() {
            let rest = format!(
                "host=127.0.0.1 user=standby password=secret sslmode=verify-full {} {rest}",
                showing_root(&authority)
            );
            let conninfo = format!("port={} dbname=postgres {rest}", site.primary.port);
            let query = "select version from pg_stat_ssl where pid = pg_backend_pid()";
            let theirs = run_psql_in(&[], &installation, &conninfo, query).ok();
            let name = format!("version_{at}");
            let mut relay = Relay::new(&name, 1).with_conninfo(&conninfo);
            relay.unset("upstream.slot");
            relay.launch();
            let query = format!(
                "select version from pg_stat_replication join pg_stat_ssl using (pid) where application_name = '{name}'"
            );
            let ours = wait_for("the relay to stream or to say why not", || {
                let error = relay.status()["upstream"]["last_error"].is_string().then_some(None);
                error.or_else(|| {
                    Some(site.primary.sql(&query)).filter(|version| !version.is_empty()).map(Some)
                })
            });
            println!("| {lines} | {rest} | {theirs:?} | {ours:?} |");
            assert_eq!((theirs.as_deref(), ours.as_deref()), (expected, expected), "{lines}, {rest}");
            // And as a server.
            if !tls.is_empty() {
                let (primary, relay) = site.ask_both(&installation, &rest);
                assert_eq!(
                    (primary.is_ok(), relay.is_ok()),
                    (expected.is_some(), expected.is_some()),
                    "{relay:?}"
                );
            }
        }
    }
}

/// What openssl tells of a handshake with these arguments.
fn s_client(port: u16, arguments: &[&str]) -> String {
    let mut program = Command::new("openssl");
    program.args(["s_client", "-connect", &format!("127.0.0.1:{port}")]).args(arguments);
    let output = program.stdin(Stdio::null()).output().unwrap();
    [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat()
}

#[test]
fn who_speaks_another_protocol_is_told_so() {
    const NONE: &str = "alert no application protocol";
    let Some(installation) = Installation::since(17) else { return };
    let site = Site::new(&installation, &Authority::new("root").issue("server", "IP:127.0.0.1"));
    for (arguments, expected) in [
        (&["-starttls", "postgres", "-alpn", "h2"][..], NONE),
        (&["-starttls", "postgres", "-alpn", "h2,http/1.1"], NONE),
        (&["-starttls", "postgres", "-alpn", "h2,postgresql"], "ALPN protocol: postgresql"),
        (&["-starttls", "postgres"], "No ALPN negotiated"),
        (&["-alpn", "h2"], NONE),
        (&["-alpn", "postgresql"], "ALPN protocol: postgresql"),
    ] {
        for (what, port) in [("primary", site.primary.port), ("relay", site.relay.port)] {
            let told = s_client(port, arguments);
            assert!(told.contains(expected), "{what}, {arguments:?}: {told}");
        }
    }
    // At once and without a word of which protocol: nothing is said after the handshake.
    assert!(s_client(site.relay.port, &[]).contains("No ALPN negotiated"));
    site.relay.wait_logged("without ALPN protocol negotiation extension");
}

/// The beginning of a ClientHello: as long as one can be, and almost all of it.
fn endless_hello() -> Vec<u8> {
    const HELLO_BYTES: usize = 0xff00;
    let mut hello = vec![1, 0, 0xff, 0];
    hello.resize(HELLO_BYTES - 512, 0);
    let record = |piece: &[u8]| {
        [&[0x16, 3, 1][..], &u16::try_from(piece.len()).unwrap().to_be_bytes(), piece].concat()
    };
    hello.chunks(16 << 10).flat_map(record).collect()
}

fn begin_handshake(port: u16) -> RawClient {
    let mut stranger = RawClient::connect(port).unwrap();
    stranger.send_bytes(&SSL_REQUEST).unwrap();
    assert_eq!(stranger.read_byte().unwrap(), Some(b'S'));
    stranger
}

#[test]
fn strangers_within_handshakes_cost_little_memory_each() {
    const STRANGERS: u64 = 200;
    let Some(installation) = Installation::any() else { return };
    let mut site = Site::new(&installation, &Authority::new("root").issue("server", "IP:127.0.0.1"));
    for key in ["unauthenticated_connections_max", "unauthenticated_connections_per_address_max"] {
        site.relay.set(&format!("downstream.{key}"), "500");
    }
    site.relay.terminate();
    site.relay.start();
    let before = site.relay.process().memory("RssAnon");
    let hello = endless_hello();
    let strangers: Vec<RawClient> = (0..STRANGERS)
        .map(|_| {
            let mut stranger = begin_handshake(site.relay.port);
            stranger.send_bytes(&hello).unwrap();
            stranger
        })
        .collect();
    // By then all has been read.
    write_wal(&site.primary, MB / 4);
    site.relay.wait_flushed(site.primary.flushed());
    let each = site.relay.process().memory("RssAnon").saturating_sub(before) / STRANGERS;
    println!("{each} bytes for each of {STRANGERS} strangers");
    assert!(each < 160 << 10, "{each} bytes for each of them");
    // They are still there, and somebody who ends his handshake comes in.
    let (primary, relay) = site.ask_both(&installation, "host=127.0.0.1 sslmode=require");
    assert_eq!(relay, primary);
    drop(strangers);
}

#[test]
fn a_client_that_never_ends_its_handshake_is_dropped_in_time() {
    let Some(installation) = Installation::any() else { return };
    let mut site = Site::new(&installation, &Authority::new("root").issue("server", "IP:127.0.0.1"));
    site.relay.set("downstream.authentication_timeout", "\"3s\"");
    site.relay.terminate();
    site.relay.start();
    let hello = endless_hello();
    for asks in [true, false] {
        let begun = Instant::now();
        let mut slow = if asks {
            begin_handshake(site.relay.port)
        } else {
            RawClient::connect(site.relay.port).unwrap()
        };
        let mut bytes = hello.iter();
        // One byte a second; the wait for the end is the pause.
        while !slow.is_closed_within(Duration::from_secs(1)) {
            assert!(begun.elapsed() < Duration::from_secs(20), "it is never dropped");
            drop(slow.send_bytes(&[*bytes.next().unwrap()]));
        }
        let elapsed = begun.elapsed();
        assert!(elapsed > Duration::from_millis(2500) && elapsed < Duration::from_secs(10), "{elapsed:?}");
    }
    wait_until("the strangers to be told of", || {
        site.relay.log().matches("client did not authenticate in time").count() == 2
    });
}
