//! Settings as clients see them: ParameterStatus at the start of a session, `SHOW`, and those a client may set itself.
//!
//! Most are the upstream's, as it told them; those that are about this server are its own.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::BytesMut;

use crate::downstream::{DownstreamContext, link::AcceptedLink, registry::Client, server::Server};
use crate::protocol::backend::encode_parameter_status;
use crate::protocol::instances::PARAMETER;
use crate::protocol::link::offer::{ANSWER_PARAMETER, answer};

/// What a session shows of itself.
pub(super) struct Parameters<'a> {
    pub(super) context: &'a DownstreamContext,
    pub(super) server: &'a Server,
    pub(super) client: &'a Client,
    pub(super) client_encoding: &'a str,
    pub(super) wal_sender_timeout: Option<Duration>,
    pub(super) link: Option<AcceptedLink>,
}

/// Whether the server shows itself as one that may be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writable {
    /// As a primary.
    Yes,
    /// As a standby.
    No,
}

impl Writable {
    /// As a primary only while the upstream that is streamed from is one.
    pub(super) fn of(context: &DownstreamContext) -> Self {
        if context.upstream_writable.load(Ordering::Relaxed) { Self::Yes } else { Self::No }
    }

    fn in_hot_standby(self) -> &'static str {
        match self {
            Self::Yes => "off",
            Self::No => "on",
        }
    }
}

impl Parameters<'_> {
    /// Appends ParameterStatus for every setting that this version reports.
    pub(super) fn encode(&self, writable: Writable, out: &mut BytesMut) {
        let (server, settings) = (self.server, &self.server.facts.settings);
        let told =
            |name: &str, default: &str| settings.get(name).cloned().unwrap_or_else(|| default.to_owned());
        let mut put = |name: &str, value: &str| encode_parameter_status(name, value, out);
        put("application_name", &self.client.application_name);
        put("client_encoding", self.client_encoding);
        put("DateStyle", "ISO, MDY");
        if server.is_at_least(14) {
            put("default_transaction_read_only", "off");
            put("in_hot_standby", writable.in_hot_standby());
        }
        // Clients refuse a server without it.
        put("integer_datetimes", "on");
        put("IntervalStyle", "postgres");
        put("is_superuser", "off");
        if server.is_at_least(16) {
            put("scram_iterations", &told("scram_iterations", "4096"));
        }
        if server.is_at_least(18) {
            put("search_path", &told("search_path", "\"$user\", public"));
        }
        put("server_encoding", &told("server_encoding", "UTF8"));
        put("server_version", &server.facts.version);
        put("session_authorization", &self.client.user);
        put("standard_conforming_strings", "on");
        put("TimeZone", &told("TimeZone", "GMT"));
        let instances = self.context.instances.borrow().to_string();
        if !instances.is_empty() {
            put(PARAMETER, &instances);
        }
        if let Some(link) = self.link {
            put(ANSWER_PARAMETER, &answer(link.compression));
        }
    }

    /// Tells the client that the server was promoted, or demoted; it is due before the next ReadyForQuery.
    pub(super) fn encode_change(&self, writable: Writable, out: &mut BytesMut) {
        if self.server.is_at_least(14) {
            encode_parameter_status("in_hot_standby", writable.in_hot_standby(), out);
        }
    }

    /// A setting's value and its name as PostgreSQL writes it. Names are not case-sensitive.
    pub(super) fn show(&self, name: &str) -> Option<(String, String)> {
        let lower = name.to_ascii_lowercase();
        if let Some(value) = self.own(&lower) {
            return Some((canonical(&lower), value));
        }
        let settings = &self.server.facts.settings;
        let found = settings.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(known, value)| (known.clone(), value.clone()))
    }

    /// What is this server's own, or must not be taken from the upstream.
    fn own(&self, name: &str) -> Option<String> {
        let settings = &self.context.settings;
        let (server, writable) = (self.server, Writable::of(self.context));
        let told = |default: &str| {
            let mut known = server.facts.settings.iter();
            let value =
                known.find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.clone());
            Some(value.unwrap_or_else(|| default.to_owned()))
        };
        let value = match name {
            "application_name" => self.client.application_name.clone(),
            "client_encoding" => self.client_encoding.to_owned(),
            "datestyle" => "ISO, MDY".to_owned(),
            "default_transaction_read_only" | "is_superuser" => "off".to_owned(),
            "hot_standby" | "integer_datetimes" | "standard_conforming_strings" => "on".to_owned(),
            "in_hot_standby" if server.is_at_least(14) => writable.in_hot_standby().to_owned(),
            "intervalstyle" => "postgres".to_owned(),
            "max_replication_slots" => settings.max_replication_slots.to_string(),
            "max_wal_senders" => settings.max_wal_senders.to_string(),
            "server_version" => server.facts.version.clone(),
            "server_version_num" => server.facts.version_num.to_string(),
            "session_authorization" => self.client.user.clone(),
            // A server in recovery has only read-only transactions.
            "transaction_read_only" => writable.in_hot_standby().to_owned(),
            "wal_keep_size" => print_bytes(settings.wal_keep_size),
            "wal_segment_size" => server.identity.segment_size.to_string(),
            "wal_sender_timeout" => print_duration(self.wal_sender_timeout),
            // What a client that copies WAL makes its files by.
            "data_directory_mode" => return told("0700"),
            "server_encoding" => return told("UTF8"),
            "timezone" => return told("GMT"),
            "wal_level" => return told("replica"),
            "wal_block_size" | "block_size" => "8192".to_owned(),
            _ => return None,
        };
        Some(value)
    }
}

/// The few names that PostgreSQL writes with capitals.
fn canonical(lower: &str) -> String {
    match lower {
        "datestyle" => "DateStyle",
        "intervalstyle" => "IntervalStyle",
        "timezone" => "TimeZone",
        other => other,
    }
    .to_owned()
}

/// A size in bytes in the largest unit that fits it whole, as `SHOW` prints a setting in megabytes.
fn print_bytes(bytes: u64) -> String {
    let mebibytes = bytes >> 20;
    match mebibytes {
        0 => "0".to_owned(),
        whole if whole.is_multiple_of(1 << 20) => format!("{}TB", whole >> 20),
        whole if whole.is_multiple_of(1 << 10) => format!("{}GB", whole >> 10),
        whole => format!("{whole}MB"),
    }
}

/// A duration in the largest unit that fits it whole, as `SHOW` prints one in milliseconds; zero is off.
fn print_duration(duration: Option<Duration>) -> String {
    let ms = duration.unwrap_or_default().as_millis();
    let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s"), (1, "ms")];
    match units.iter().find(|(unit, _)| ms > 0 && ms.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{}{name}", ms / unit),
        None => "0".to_owned(),
    }
}

/// Reads `wal_sender_timeout` as a client sets it: milliseconds unless there is a unit; zero is off. The outer `None` is
/// a text that means nothing.
pub(super) fn parse_timeout(text: &str) -> Option<Option<Duration>> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits)?;
    let unit_ms = match unit.trim() {
        "" | "ms" => 1,
        "s" => 1_000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    let ms = number.parse::<u64>().ok()?.checked_mul(unit_ms).filter(|ms| *ms <= TIMEOUT_MS_MAX)?;
    Some((ms > 0).then(|| Duration::from_millis(ms)))
}

/// A client's text as PostgreSQL keeps names: at most 63 bytes, of which those that are not printable ASCII are replaced
/// (`pg_clean_ascii`), since 16 in a way that shows what they were.
pub(super) fn clean_ascii(text: &str, server: &Server) -> String {
    let mut clean = String::new();
    // Before a database is chosen a character is a byte.
    for byte in text.bytes().take(NAME_BYTES_MAX) {
        match byte {
            b' '..=b'~' => clean.push(char::from(byte)),
            _ if server.is_at_least(16) => clean.push_str(&format!("\\x{byte:02x}")),
            _ => clean.push('?'),
        }
    }
    clean
}

/// `INT_MAX`, PostgreSQL's limit of `wal_sender_timeout`.
const TIMEOUT_MS_MAX: u64 = 2_147_483_647;
/// `NAMEDATALEN` without its terminator.
const NAME_BYTES_MAX: usize = 63;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_print_as_the_server_shows_them() {
        let shown = |ms| print_duration(Some(Duration::from_millis(ms)));
        assert_eq!([shown(60_000), shown(1_500), shown(30_000)], ["1min", "1500ms", "30s"]);
        assert_eq!(print_duration(None), "0");
        assert_eq!([print_bytes(1 << 30), print_bytes(96 << 20), print_bytes(0)], ["1GB", "96MB", "0"]);
    }

    #[test]
    fn a_clients_timeout_is_read_with_and_without_a_unit() {
        assert_eq!(parse_timeout("0s"), Some(None));
        assert_eq!(parse_timeout("0"), Some(None));
        assert_eq!(parse_timeout("2000"), Some(Some(Duration::from_secs(2))));
        assert_eq!(parse_timeout(" 5 min "), Some(Some(Duration::from_secs(300))));
        for text in ["", "s", "-1", "1y", "99999999999999999999", "1000d"] {
            assert_eq!(parse_timeout(text), None, "{text}");
        }
    }

    #[test]
    fn names_are_made_printable_as_the_version_does_it() {
        let (old, new) = (Server::of_version(150_018), Server::of_version(160_014));
        assert_eq!(clean_ascii("dc2\n\u{1b}[1m", &old), "dc2??[1m");
        assert_eq!(clean_ascii("dc2\nü", &new), "dc2\\x0a\\xc3\\xbc");
        assert_eq!(clean_ascii(&"a".repeat(100), &old).len(), 63);
        // What is cut is the name as it came.
        let text = "a".repeat(62) + "ü";
        assert_eq!(clean_ascii(&text, &old), "a".repeat(62) + "?");
        assert_eq!(clean_ascii(&text, &new), "a".repeat(62) + "\\xc3");
    }
}
