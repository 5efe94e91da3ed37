//! From what is written to what can be relied on: every check of every setting, and of those that depend on each other.
//!
//! Reads no file: the tokens have been read before, and who may connect is read after.

use std::{collections::BTreeMap, ops::RangeInclusive, path::Path, time::Duration};

use secrecy::{ExposeSecret, SecretString};

use crate::access::Access;
use crate::config::{
    AccessFiles, Admin, Config, Downstream, ListenAddress, Log, LogFormat, LogLevel, OnDivergence,
    PatroniUrl, Relay, SendPolicies, SendPolicy, Store, Upstream,
    error::Problem,
    links, listen, patroni,
    raw::{Quantity, Raw, RawAdmin, RawDownstream, RawLog, RawRelay, RawStore, RawUpstream},
    tcp,
    units::{Size, Span},
};
use crate::conninfo::{Conninfo, Surroundings};
use crate::protocol::acknowledge_policy::AcknowledgePolicyError;

/// A configuration file and the files it names, read but not checked.
pub(crate) struct Loaded<'a> {
    pub(crate) raw: Raw,
    pub(crate) token: Option<SecretString>,
    pub(crate) read_token: Option<SecretString>,
    /// Relative paths start at the directory of the configuration file.
    pub(crate) path: &'a Path,
    pub(crate) surroundings: &'a dyn Surroundings,
}

impl TryFrom<Loaded<'_>> for Config {
    type Error = Problem;

    fn try_from(loaded: Loaded<'_>) -> Result<Self, Problem> {
        let Loaded { raw, token, read_token, path, surroundings } = loaded;
        let directory = path.parent().unwrap_or(Path::new(""));
        let relay = relay(&raw.relay, directory)?;
        let upstream = upstream(&raw.upstream, &relay.name, surroundings)?;
        let downstream = downstream(&raw.downstream, path, &upstream)?;
        let store = store(&raw.store)?;
        let admin = admin(&raw.admin, token, read_token)?;
        if let Some(address) = admin.listen.map(ListenAddress::Tcp)
            && downstream.listen.contains(&address)
            && !is_chosen_by_the_system(&address)
        {
            return Err(Problem::AddressTwice { key: "admin.listen", address: address.to_string() });
        }
        let log = log(&raw.log)?;
        let warnings = upstream.conninfo.password_file_warning.iter().map(ToString::to_string).collect();
        Ok(Self { relay, upstream, downstream, store, admin, log, warnings })
    }
}

fn relay(raw: &RawRelay, directory: &Path) -> Result<Relay, Problem> {
    let name = required(raw.name.as_deref(), "relay.name", "name = \"dc1_a\"")?;
    let is_good = NAME_BYTES.contains(&name.len()) && name.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if !is_good {
        let advice =
            format!("expected {} to {} printable ASCII characters", NAME_BYTES.start(), NAME_BYTES.end());
        return Err(Problem::invalid("relay.name", name, advice));
    }
    let data_dir = required(raw.data_dir.as_deref(), "relay.data_dir", "data_dir = \"/var/lib/walrelay\"")?;
    let (name, data_dir) = (name.to_owned(), directory.join(data_dir));
    Ok(Relay { name, data_dir, data_must_exist: raw.data_must_exist })
}

fn upstream(raw: &RawUpstream, name: &str, surroundings: &dyn Surroundings) -> Result<Upstream, Problem> {
    let text = required(
        raw.conninfo.as_ref().map(|text| text.0.as_str()),
        "upstream.conninfo",
        "conninfo = \"host=10.1.0.10,10.1.0.11 user=replicator target_session_attrs=read-write\"",
    )?;
    let conninfo = Conninfo::parse_for_replication(text, name, surroundings).map_err(Problem::Conninfo)?;
    let sql_conninfo =
        Conninfo::parse_beside_replication(text, name, surroundings).map_err(Problem::Conninfo)?;
    if let Some(slot) = &raw.slot {
        check_slot_name(slot)?;
    }
    let slot_wal_keep_max = size("upstream.slot_wal_keep_max", &raw.slot_wal_keep_max, 0..=1 << 60)?;
    if slot_wal_keep_max > 0 && !raw.create_slot {
        let advice = "a slot that is dropped must be made again: upstream.create_slot must be true";
        return Err(Problem::invalid("upstream.slot_wal_keep_max", &raw.slot_wal_keep_max.0, advice));
    }
    Ok(Upstream {
        conninfo,
        sql_conninfo,
        patroni: patroni_urls(&raw.patroni)?,
        slot: raw.slot.clone(),
        create_slot: raw.create_slot,
        slot_wal_keep_max: Some(slot_wal_keep_max).filter(|bytes| *bytes > 0),
        acknowledge: raw.acknowledge.parse().map_err(|error: AcknowledgePolicyError| {
            Problem::invalid("upstream.acknowledge", &raw.acknowledge, error.to_string())
        })?,
        acknowledge_timeout: timeout("upstream.acknowledge_timeout", &raw.acknowledge_timeout)?,
        acknowledge_users: raw.acknowledge_users.clone(),
        only_copy_time_max: timeout("upstream.only_copy_time_max", &raw.only_copy_time_max)?,
        expect_sync: raw.expect_sync,
        hot_standby_feedback: raw.hot_standby_feedback,
        on_divergence: match raw.on_divergence.as_str() {
            "follow" => OnDivergence::Follow,
            "stop" => OnDivergence::Stop,
            other => {
                let advice = "expected \"follow\" or \"stop\"";
                return Err(Problem::invalid("upstream.on_divergence", other, advice));
            }
        },
        link: links::mode(&raw.link)?,
        link_codecs: links::codecs(&raw.link_codecs)?,
        link_retry_interval: timeout("upstream.link_retry_interval", &raw.link_retry_interval)?,
        wal_receiver_timeout: timeout("upstream.wal_receiver_timeout", &raw.wal_receiver_timeout)?,
        wal_receiver_status_interval: timeout(
            "upstream.wal_receiver_status_interval",
            &raw.wal_receiver_status_interval,
        )?,
        wal_retrieve_retry_interval: span(
            "upstream.wal_retrieve_retry_interval",
            &raw.wal_retrieve_retry_interval,
            Duration::from_millis(1)..=Duration::from_secs(3600),
        )?,
    })
}

fn patroni_urls(texts: &[String]) -> Result<Vec<PatroniUrl>, Problem> {
    let parse = |text: &String| {
        text.parse().map_err(|()| Problem::invalid("upstream.patroni", text, patroni::ADVICE))
    };
    texts.iter().map(parse).collect()
}

/// PostgreSQL's rule for names of slots (`ReplicationSlotValidateName`).
fn check_slot_name(name: &str) -> Result<(), Problem> {
    let is_good = NAME_BYTES.contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    if is_good {
        return Ok(());
    }
    let advice = "replication slot names may only contain up to 63 lower case letters, numbers, and underscore characters";
    Err(Problem::invalid("upstream.slot", name, advice))
}

fn downstream(raw: &RawDownstream, path: &Path, upstream: &Upstream) -> Result<Downstream, Problem> {
    const LISTEN: &str = "downstream.listen";
    let listen = listen::parse_list(&raw.listen.0)
        .map_err(|wrong| Problem::invalid(LISTEN, &wrong, listen::ADVICE))?;
    if listen.is_empty() {
        return Err(Problem::Missing { key: LISTEN, example: "listen = \"127.0.0.1:5433\"" });
    }
    let twice = listen.iter().enumerate().find(|(index, address)| {
        !is_chosen_by_the_system(address) && listen.iter().take(*index).any(|earlier| earlier == *address)
    });
    if let Some((_, address)) = twice {
        return Err(Problem::AddressTwice { key: LISTEN, address: address.to_string() });
    }
    let directory = path.parent().unwrap_or(Path::new(""));
    let tls = raw.tls.as_ref().map(|tls| tls.check(directory)).transpose()?;
    let file = |name: &Option<String>| name.as_ref().map(|name| directory.join(name));
    let access_files = AccessFiles {
        configuration: path.to_owned(),
        users: file(&raw.users),
        hba: file(&raw.hba),
        ident: file(&raw.ident),
        trust_local: raw.trust_local,
        allow_remote_trust: raw.allow_remote_trust,
        allow_plaintext: raw.allow_plaintext,
        listen: listen.clone(),
        tls: tls.clone(),
        acknowledge: upstream.acknowledge.clone(),
        acknowledge_users: upstream.acknowledge_users.clone(),
    };
    const ALL: &str = "downstream.unauthenticated_connections_max";
    const PER_ADDRESS: &str = "downstream.unauthenticated_connections_per_address_max";
    // One place for this machine, and one for all others.
    let unauthenticated_connections_max = number(ALL, raw.unauthenticated_connections_max, 2..=100_000)?;
    let unauthenticated_connections_per_address_max: usize =
        number(PER_ADDRESS, raw.unauthenticated_connections_per_address_max, 1..=100_000)?;
    if unauthenticated_connections_per_address_max > unauthenticated_connections_max {
        return Err(Problem::Relation {
            key: PER_ADDRESS,
            value: unauthenticated_connections_per_address_max.to_string(),
            relation: "greater than",
            other: ALL,
            other_value: unauthenticated_connections_max.to_string(),
        });
    }
    Ok(Downstream {
        listen,
        tls,
        // Nobody, until the files have been read.
        access: Access::default(),
        access_files,
        send: send_policies(raw)?,
        create_slots: raw.create_slots,
        links: links::sent(raw)?,
        wal_sender_timeout: timeout("downstream.wal_sender_timeout", &raw.wal_sender_timeout)?,
        max_wal_senders: number("downstream.max_wal_senders", raw.max_wal_senders, 1..=262_143)?,
        authentication_timeout: span(
            "downstream.authentication_timeout",
            &raw.authentication_timeout,
            Duration::from_secs(1)..=Duration::from_secs(600),
        )?,
        unauthenticated_connections_max,
        unauthenticated_connections_per_address_max,
        tcp: tcp::of_clients(raw)?,
    })
}

fn send_policies(raw: &RawDownstream) -> Result<SendPolicies, Problem> {
    let policy = |key, text: &str| match text {
        "received" => Ok(SendPolicy::Received),
        "flushed" => Ok(SendPolicy::Flushed),
        other => Err(Problem::invalid(key, other, "expected \"received\" or \"flushed\"")),
    };
    const NAMED: &str = "downstream.send_to";
    let mut by_name = BTreeMap::new();
    for (name, text) in &raw.send_to {
        // As application names are compared.
        if by_name.insert(name.to_ascii_lowercase(), policy(NAMED, text)?).is_some() {
            return Err(Problem::invalid(NAMED, name, "the name is there twice; case does not matter"));
        }
    }
    Ok(SendPolicies { default: policy("downstream.send", &raw.send)?, by_name })
}

fn store(raw: &RawStore) -> Result<Store, Problem> {
    const TAIL: &str = "store.tail_size";
    const UNWRITTEN: &str = "store.unwritten_size";
    let tail_size = size(TAIL, &raw.tail_size, MEMORY_BYTES)?;
    let unwritten_size = size(UNWRITTEN, &raw.unwritten_size, MEMORY_BYTES)?;
    if unwritten_size > tail_size {
        // What is not written yet can be served from memory only.
        return Err(Problem::Relation {
            key: UNWRITTEN,
            value: Size(unwritten_size).to_string(),
            relation: "greater than",
            other: TAIL,
            other_value: Size(tail_size).to_string(),
        });
    }
    Ok(Store {
        wal_keep_size: size("store.wal_keep_size", &raw.wal_keep_size, DISK_BYTES)?,
        max_slot_wal_keep_size: slot_limit("store.max_slot_wal_keep_size", &raw.max_slot_wal_keep_size)?,
        max_wal_size: size("store.max_wal_size", &raw.max_wal_size, DISK_BYTES)?,
        idle_replication_slot_timeout: timeout(
            "store.idle_replication_slot_timeout",
            &raw.idle_replication_slot_timeout,
        )?,
        retain_without_slot: timeout("store.retain_without_slot", &raw.retain_without_slot)?,
        disk_budget: Some(size("store.disk_budget", &raw.disk_budget, DISK_BYTES)?)
            .filter(|bytes| *bytes > 0),
        scrub_interval: timeout("store.scrub_interval", &raw.scrub_interval)?,
        tail_size,
        unwritten_size,
        spare_segments: number("store.spare_segments", raw.spare_segments, 1..=64)?,
        reserve_segments: number("store.reserve_segments", raw.reserve_segments, 0..=65_536)?,
        max_replication_slots: number("store.max_replication_slots", raw.max_replication_slots, 0..=262_143)?,
    })
}

fn admin(
    raw: &RawAdmin,
    token: Option<SecretString>,
    read_token: Option<SecretString>,
) -> Result<Admin, Problem> {
    if let (Some(token), Some(read_token)) = (&token, &read_token)
        && token.expose_secret() == read_token.expose_secret()
    {
        return Err(Problem::SameToken);
    }
    if raw.listen.is_empty() {
        return Ok(Admin { listen: None, token, read_token });
    }
    let address = listen::parse_tcp(&raw.listen)
        .ok_or_else(|| Problem::invalid("admin.listen", &raw.listen, listen::TCP_ADVICE))?;
    if !ListenAddress::Tcp(address).is_local() {
        if !raw.allow_plaintext {
            return Err(Problem::AdminPlaintext(raw.listen.clone()));
        }
        if token.is_none() && read_token.is_none() {
            return Err(Problem::TokenRequired(raw.listen.clone()));
        }
    }
    Ok(Admin { listen: Some(address), token, read_token })
}

fn log(raw: &RawLog) -> Result<Log, Problem> {
    let levels = [LogLevel::Error, LogLevel::Warn, LogLevel::Info, LogLevel::Debug, LogLevel::Trace];
    let level = levels.into_iter().find(|level| level.as_str() == raw.level).ok_or_else(|| {
        let advice = "expected \"error\", \"warn\", \"info\", \"debug\", or \"trace\"";
        Problem::invalid("log.level", &raw.level, advice)
    })?;
    let format = match raw.format.as_str() {
        "auto" => LogFormat::Auto,
        "text" => LogFormat::Text,
        "json" => LogFormat::Json,
        other => {
            return Err(Problem::invalid("log.format", other, "expected \"auto\", \"text\", or \"json\""));
        }
    };
    Ok(Log { level, format })
}

/// Port 0: two of them are two addresses.
fn is_chosen_by_the_system(address: &ListenAddress) -> bool {
    matches!(address, ListenAddress::Tcp(address) if address.port() == 0)
}

fn required<'a>(
    value: Option<&'a str>,
    key: &'static str,
    example: &'static str,
) -> Result<&'a str, Problem> {
    let value = value.filter(|value| !value.is_empty());
    value.ok_or(Problem::Missing { key, example })
}

/// A time after which something is given up; 0 turns it off, as in PostgreSQL.
pub(super) fn timeout(key: &'static str, raw: &Quantity) -> Result<Option<Duration>, Problem> {
    let value = span(key, raw, Duration::ZERO..=TIMEOUT_MAX)?;
    Ok(Some(value).filter(|value| !value.is_zero()))
}

pub(super) fn span(
    key: &'static str,
    raw: &Quantity,
    range: RangeInclusive<Duration>,
) -> Result<Duration, Problem> {
    let value = Span::parse(&raw.0).map_err(|advice| Problem::invalid(key, &raw.0, advice))?;
    if range.contains(&value.0) {
        return Ok(value.0);
    }
    let (min, max) = (Span(*range.start()).to_string(), Span(*range.end()).to_string());
    Err(Problem::OutOfRange { key, value: value.to_string(), min, max })
}

pub(super) fn size(key: &'static str, raw: &Quantity, range: RangeInclusive<u64>) -> Result<u64, Problem> {
    let value = Size::parse(&raw.0).map_err(|advice| Problem::invalid(key, &raw.0, advice))?;
    if range.contains(&value.0) {
        return Ok(value.0);
    }
    let (min, max) = (Size(*range.start()).to_string(), Size(*range.end()).to_string());
    Err(Problem::OutOfRange { key, value: value.to_string(), min, max })
}

/// -1 is no limit, as in PostgreSQL.
fn slot_limit(key: &'static str, raw: &Quantity) -> Result<Option<u64>, Problem> {
    if raw.0.trim() == "-1" { Ok(None) } else { size(key, raw, DISK_BYTES).map(Some) }
}

pub(super) fn number<T: TryFrom<i64>>(
    key: &'static str,
    raw: i64,
    range: RangeInclusive<i64>,
) -> Result<T, Problem> {
    let in_range = Some(raw).filter(|raw| range.contains(raw));
    in_range.and_then(|raw| T::try_from(raw).ok()).ok_or_else(|| Problem::OutOfRange {
        key,
        value: raw.to_string(),
        min: range.start().to_string(),
        max: range.end().to_string(),
    })
}

/// `NAMEDATALEN - 1`.
const NAME_BYTES: RangeInclusive<usize> = 1..=63;

/// As long as PostgreSQL's timeouts can be, in whole days.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 24 * 3600);

/// More than any disk has.
const DISK_BYTES: RangeInclusive<u64> = 0..=1 << 50;

/// At least what the largest accepted message holds, at most what a large machine has.
const MEMORY_BYTES: RangeInclusive<u64> = 1 << 20..=1 << 40;
