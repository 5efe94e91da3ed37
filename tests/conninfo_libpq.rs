//! Connection strings mean what they mean to libpq: asked of libpq itself, through `psql`.
//!
//! Three questions, each of many strings: what does libpq say of a wrong one; which servers does it try, in which order
//! (read from its complaints about closed ports); and what does it send to a server that answers (a server played here, which
//! asks for a password in clear text). Strings that only a newer libpq understands are left out when an older one is asked.
//! Without `psql` nothing is asked; where `CI=true` that is a failure.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a test writes its own files and fails by panicking"
)]

#[path = "conninfo_libpq/cases.rs"]
mod cases;
#[path = "conninfo_libpq/psql.rs"]
mod psql;
#[path = "conninfo_libpq/server.rs"]
mod server;

use psql::Psql;
use secrecy::ExposeSecret as _;
use walrelay::conninfo::{Conninfo, ConninfoError, REDACTED, Settings};

/// What this program makes of `text`, in the surroundings that `psql` has.
fn resolve(psql: &Psql, text: &str) -> Result<Conninfo, ConninfoError> {
    let mut settings = Settings::parse(text)?;
    // psql adds this to every string.
    settings.store("fallback_application_name", "psql")?;
    Conninfo::parse(&settings.to_connection_string(), &psql.surroundings())
}

#[test]
fn wrong_strings_are_refused_in_libpqs_words() {
    Psql::all().into_iter().for_each(ask_wrong_strings);
}

fn ask_wrong_strings(psql: Psql) {
    let mut asked = 0;
    for (since, text) in cases::WRONG {
        if *since > psql.major {
            continue;
        }
        let text = psql.fill_in(text);
        let ours =
            resolve(&psql, &text).map(|conninfo| conninfo.to_string()).map_err(|error| error.to_string());
        let theirs = psql.complaint(&text);
        assert_eq!(ours, Err(theirs), "{text}");
        asked += 1;
    }
    eprintln!("{asked} of {} wrong strings asked of libpq {}", cases::WRONG.len(), psql.major);
    assert!(asked >= 60);
}

#[test]
fn servers_are_tried_in_libpqs_order() {
    Psql::all().into_iter().for_each(ask_places);
}

fn ask_places(psql: Psql) {
    for (since, text) in cases::PLACES.iter().filter(|(since, _)| *since <= psql.major) {
        let text = psql.fill_in(text);
        let conninfo = resolve(&psql, &text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let ours: Vec<String> = conninfo.hosts.iter().map(ToString::to_string).collect();
        assert_eq!(ours, psql.places_tried(&text), "{text} (since {since})");
    }
}

#[test]
fn random_strings_are_understood_or_refused_as_libpq_does() {
    Psql::all().into_iter().for_each(ask_random_strings);
}

fn ask_random_strings(mut psql: Psql) {
    psql.variables.insert("PGPORT".to_owned(), "1".to_owned());
    let mut random = cases::Random::seeded();
    let (mut good, mut wrong) = (0, 0);
    for _ in 0..300 {
        let text = random.connection_string(psql.major);
        if Settings::parse(&text).is_ok_and(|settings| !has_only_local_hosts(&settings)) {
            continue;
        }
        match resolve(&psql, &text) {
            // A real server may be there.
            Ok(conninfo) if conninfo.hosts.iter().any(|host| host.port == 5432) => {}
            Ok(conninfo) => {
                let mut ours: Vec<String> = conninfo.hosts.iter().map(ToString::to_string).collect();
                ours.dedup();
                assert_eq!(ours, psql.places_tried(&text), "{text}");
                good += 1;
            }
            // What may be half a password is refused before libpq would come to it.
            Err(ConninfoError::InvalidInteger { value, .. }) if value == REDACTED => {}
            Err(ConninfoError::UnexpectedAtSign) => {}
            // libpq may have tried another host before it came to the wrong port of this one, and shows passwords.
            Err(error) => {
                let theirs = psql.run(&text);
                let ours = format!("{error}\n");
                let is_same = ours.split(REDACTED).all(|part| theirs.contains(part));
                assert!(is_same, "{text}: not {ours} but {theirs}");
                wrong += 1;
            }
        }
    }
    eprintln!("{good} good and {wrong} wrong strings asked of libpq {}", psql.major);
    assert!(good > 20 && wrong > 20);
}

/// Whether libpq can be asked without looking up a name or leaving this machine.
fn has_only_local_hosts(settings: &Settings) -> bool {
    let is_local = |host: &str| {
        let address = host.parse::<std::net::IpAddr>();
        host.is_empty() || host.starts_with('/') || address.is_ok_and(|address| address.is_loopback())
    };
    let hosts = settings.value("host").unwrap_or_default().split(',');
    let addresses = settings.value("hostaddr").unwrap_or_default().split(',');
    // What is no address is refused without a look-up, but much is an address.
    let is_harmless =
        |address: &str| is_local(address) || address.contains(|c: char| !c.is_ascii_hexdigit() && c != '.');
    hosts.into_iter().all(is_local) && addresses.into_iter().all(is_harmless)
}

#[test]
fn a_server_is_sent_what_libpq_sends() {
    Psql::all().into_iter().for_each(ask_what_is_sent);
}

fn ask_what_is_sent(mut psql: Psql) {
    for case in cases::SENT.iter().filter(|case| case.since <= psql.major) {
        let server = server::Server::start(&psql.directory);
        psql.port = server.port;
        psql.variables =
            case.variables.iter().map(|(name, value)| ((*name).to_owned(), psql.fill_in(value))).collect();
        psql.write_file(".pgpass", case.passwords, 0o600);
        psql.write_file("service.conf", case.services, 0o644);
        let text = psql.fill_in(case.text);

        let conninfo = resolve(&psql, &text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let password =
            conninfo.password_for(&conninfo.hosts[0]).map(|password| password.expose_secret().to_owned());
        let ours = server::Sent {
            parameters: conninfo
                .startup_parameters()
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            password,
        };
        psql.run(&text);
        assert_eq!(Some(ours), server.sent(), "{text} {:?}", case.variables);
    }
}

#[test]
fn a_password_file_that_others_can_read_is_passed_over_with_libpqs_warning() {
    Psql::all().into_iter().for_each(ask_about_open_password_file);
}

fn ask_about_open_password_file(psql: Psql) {
    psql.write_file(".pgpass", "*:*:*:*:hush\n", 0o640);
    let text = "host=127.0.0.1 port=1 user=u dbname=d";
    let conninfo = resolve(&psql, text).unwrap();
    assert!(conninfo.password_for(&conninfo.hosts[0]).is_none());
    let warning = conninfo.password_file_warning.expect("a warning").to_string();
    assert!(psql.run(text).contains(&format!("WARNING: {warning}\n")), "{warning}");
}
