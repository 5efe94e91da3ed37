//! Every setting: its default, its check, its type.
//!
//! Owns the configuration file and those it names. `raw.rs` mirrors the file and holds the defaults; `check.rs` turns it
//! into a [`Config`] that cannot be wrong; the rest of the program sees only that. Everything is read and checked when the
//! program starts; who may connect ([`AccessFiles`]) can be read again. A wrong setting is one line that names file, line, key,
//! value and the way out.
//!
//! Settings have PostgreSQL's names and units where PostgreSQL has the setting.

mod access;
#[cfg(test)]
mod access_tests;
mod check;
mod document;
mod error;
mod links;
mod listen;
mod patroni;
mod raw;
mod standbys;
mod tcp;
#[cfg(test)]
mod tests;
mod tls;
mod units;
mod users;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    num::NonZeroU64,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::SecretString;
use zeroize::Zeroizing;

use crate::access::Access;
use crate::conninfo::{Conninfo, FoundFile, ProcessSurroundings, Surroundings};
use crate::protocol::acknowledge_policy::AcknowledgePolicy;
use crate::protocol::link::{Codec, Compression};

pub use access::{AccessFiles, LoadedAccess};
pub use error::{ConfigError, FileKind, Place, Problem};
pub use links::RateLimit;
pub use listen::ListenAddress;
pub use patroni::PatroniUrl;
pub use tcp::ClientTcp;
pub use tls::{Tls, TlsVersion};

use access::AccessError;
use check::Loaded;
use document::Document;
use raw::Raw;

/// All settings, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// `[relay]`
    pub relay: Relay,
    /// `[upstream]`
    pub upstream: Upstream,
    /// `[downstream]`
    pub downstream: Downstream,
    /// `[store]`
    pub store: Store,
    /// `[admin]`
    pub admin: Admin,
    /// `[log]`
    pub log: Log,
    /// What is allowed but unwise, in one line each, to be logged at start.
    pub warnings: Vec<String>,
}

/// Who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relay {
    /// `application_name` on the upstream: printable ASCII, at most 63 bytes.
    pub name: String,
    /// Where the WAL is.
    pub data_dir: PathBuf,
    /// Whether an empty directory is an error, and not the beginning.
    pub data_must_exist: bool,
}

/// Where WAL comes from.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Where to connect, for physical replication.
    pub conninfo: Conninfo,
    /// The same for SQL on those servers.
    pub sql_conninfo: Conninfo,
    /// Members of the Patroni cluster that are asked which of them leads.
    pub patroni: Vec<PatroniUrl>,
    /// The slot to use there, if any.
    pub slot: Option<String>,
    /// Whether it is created when it is absent.
    pub create_slot: bool,
    /// WAL that it may make the upstream keep while none is taken here; `None`: any amount.
    pub slot_wal_keep_max: Option<u64>,
    /// When WAL is acknowledged there.
    pub acknowledge: AcknowledgePolicy,
    /// How long standbys may keep it from being acknowledged; `None`: for ever.
    pub acknowledge_timeout: Option<Duration>,
    /// User that must be behind an `application_name` for what it reports to count.
    pub acknowledge_users: BTreeMap<String, String>,
    /// How long what was acknowledged may be nowhere else before nothing more is; `None`: for ever.
    pub only_copy_time_max: Option<Duration>,
    /// Whether the primary is expected to wait for this relay.
    pub expect_sync: bool,
    /// Whether what standbys hold back by hot standby feedback is told upstream.
    pub hot_standby_feedback: bool,
    /// What to do when what is held goes beyond the fork of a new timeline.
    pub on_divergence: OnDivergence,
    /// Whether a relay is asked to send compressed.
    pub link: LinkMode,
    /// Codecs that it may use, the preferred one first.
    pub link_codecs: Vec<Codec>,
    /// How long WAL is taken plain after something wrong came over a link; `None`: for as long as the connection lasts.
    pub link_retry_interval: Option<Duration>,
    /// Silence after which the connection is given up; `None`: never.
    pub wal_receiver_timeout: Option<Duration>,
    /// Longest time between two status updates; `None`: only when asked.
    pub wal_receiver_status_interval: Option<Duration>,
    /// Longest pause before another attempt to connect; the first ones come sooner, and all are jittered.
    pub wal_retrieve_retry_interval: Duration,
}

/// What to do when a server was promoted from less than what is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDivergence {
    /// What is held beyond is set aside and reported; the new timeline is followed.
    Follow,
    /// Nothing is received until a person has decided.
    Stop,
}

/// Whether a relay that is streamed from sends compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkMode {
    /// It is not asked to.
    Off,
    /// It is asked to; any server will do.
    Prefer,
    /// Only a relay that does will do.
    Require,
}

/// Where WAL goes.
#[derive(Clone, Debug)]
pub struct Downstream {
    /// Where to listen; never empty.
    pub listen: Vec<ListenAddress>,
    /// TLS, if any.
    pub tls: Option<Tls>,
    /// Who may connect, as it was when the files were read.
    pub access: Access,
    /// Where that is written.
    pub access_files: AccessFiles,
    /// When WAL may be sent.
    pub send: SendPolicies,
    /// Whether a slot that a client wants to use is created when it is absent.
    pub create_slots: bool,
    /// How WAL is sent to relays that want it compressed.
    pub links: Links,
    /// Silence after which a client is given up; `None`: never.
    pub wal_sender_timeout: Option<Duration>,
    /// Most sessions that are authenticated.
    pub max_wal_senders: usize,
    /// Time a client has to authenticate.
    pub authentication_timeout: Duration,
    /// Most connections that are not authenticated yet.
    pub unauthenticated_connections_max: usize,
    /// The same for one address; of IPv6 for one network.
    pub unauthenticated_connections_per_address_max: usize,
    /// Options of accepted TCP connections.
    pub tcp: ClientTcp,
}

/// How WAL is sent to relays that want it compressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Links {
    /// What is allowed; at most one of each codec. Empty: nothing is compressed.
    pub compressions: Vec<Compression>,
    /// Whether less is compressed while the network is faster than the codec.
    pub adapt: bool,
    /// Bytes in a second that one link may send; `None`: any number.
    pub link_rate_max: Option<NonZeroU64>,
    /// The same for all links together.
    pub links_rate_max: Option<NonZeroU64>,
}

/// When WAL may be sent to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendPolicies {
    /// To those that are not named.
    pub default: SendPolicy,
    /// By `application_name`, in lower case.
    pub by_name: BTreeMap<String, SendPolicy>,
}

impl SendPolicies {
    /// The same for everybody.
    pub fn for_all(policy: SendPolicy) -> Self {
        Self { default: policy, by_name: BTreeMap::new() }
    }

    /// What holds for an `application_name`; as in `synchronous_standby_names`, case does not matter.
    pub fn of(&self, application_name: &str) -> SendPolicy {
        self.by_name.get(&application_name.to_ascii_lowercase()).copied().unwrap_or(self.default)
    }
}

/// When WAL may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SendPolicy {
    /// As soon as it is verified.
    Received,
    /// When it is durable here.
    Flushed,
}

/// How WAL is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Store {
    /// Bytes of WAL to keep for consumers without a slot.
    pub wal_keep_size: u64,
    /// Bytes of WAL that a slot may keep; `None`: any amount.
    pub max_slot_wal_keep_size: Option<u64>,
    /// Bytes of WAL beyond which what a slot keeps is called extended.
    pub max_wal_size: u64,
    /// Time after which a slot that nobody uses is invalidated; `None`: never.
    pub idle_replication_slot_timeout: Option<Duration>,
    /// Time for which WAL is kept for a consumer without a slot after its session; `None`: not at all.
    pub retain_without_slot: Option<Duration>,
    /// Bytes of segment files that there may be; `None`: as many as the disk takes.
    pub disk_budget: Option<u64>,
    /// Time within which every complete segment is read again and compared with its checksum; `None`: never.
    pub scrub_interval: Option<Duration>,
    /// Bytes of the newest WAL to keep in memory.
    pub tail_size: u64,
    /// Most bytes that are received but not yet written; not more than `tail_size`.
    pub unwritten_size: u64,
    /// Segments prepared ahead of time.
    pub spare_segments: u32,
    /// Segments for which there must be space before a slot may begin to keep WAL.
    pub reserve_segments: u32,
    /// Most slots.
    pub max_replication_slots: usize,
}

/// The HTTP pages.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Where to listen, if at all.
    pub listen: Option<SocketAddr>,
    /// What a client must show to change something.
    pub token: Option<SecretString>,
    /// What suffices to see more than whether we live; never the same.
    pub read_token: Option<SecretString>,
}

/// Log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// The least important ones to write.
    pub level: LogLevel,
    /// Their form.
    pub format: LogFormat,
}

/// How important a log line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// A human must act.
    Error,
    /// Unexpected, nothing lost.
    Warn,
    /// What happens.
    Info,
    /// Why it happens.
    Debug,
    /// Every message.
    Trace,
}

impl LogLevel {
    /// As `tracing` names it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl Config {
    /// Reads and checks the file at `path`, and the files it names.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::load_in(path, &ProcessSurroundings)
    }

    /// The same with the environment and the files of `surroundings`.
    pub fn load_in(path: &Path, surroundings: &dyn Surroundings) -> Result<Self, ConfigError> {
        let file = FileKind::Configuration.read(path, surroundings)?;
        let located = |problem: Problem, line| problem.at(FileKind::Configuration, path, line);
        let document = Document::parse(&file.text).map_err(|(problem, line)| located(problem, line))?;
        let with_line = |problem: Problem| {
            let line = document.line_of(&problem.keys());
            located(problem, line)
        };
        let raw: Raw = document.read(&Raw::default()).map_err(hide_secrets).map_err(with_line)?;
        let directory = path.parent().unwrap_or(Path::new(""));
        let token = |name: &Option<String>| {
            name.as_ref().map(|name| read_token(&directory.join(name), surroundings)).transpose()
        };
        let (token, read_token) = (token(&raw.admin.token_file)?, token(&raw.admin.read_token_file)?);
        let loaded = Loaded { raw, token, read_token, path, surroundings };
        let mut config = Self::try_from(loaded).map_err(with_line)?;
        let read = config.downstream.access_files.read(surroundings);
        let LoadedAccess { access, warnings } = read.map_err(|error| match error {
            AccessError::File(error) => error,
            AccessError::Setting(problem) => with_line(problem),
        })?;
        config.downstream.access = access;
        config.warnings.extend(warnings);
        let is_world_readable = file.mode & WORLD_BITS != 0;
        if is_world_readable && config.upstream.conninfo.is_password_given_in_string() {
            config.warnings.push(format!(
                "configuration file \"{}\" holds a password and has world access; permissions should be u=rw,g=r (0640) or less",
                path.display()
            ));
        }
        Ok(config)
    }
}

fn read_token(path: &Path, surroundings: &dyn Surroundings) -> Result<SecretString, ConfigError> {
    let text = FileKind::Token.read_secret(path, surroundings)?;
    let token = text.trim_end_matches(['\r', '\n']);
    let is_good = TOKEN_BYTES.contains(&token.len()) && token.bytes().all(|byte| byte.is_ascii_graphic());
    if !is_good {
        let problem = Problem::InvalidToken { min: *TOKEN_BYTES.start(), max: *TOKEN_BYTES.end() };
        return Err(problem.at(FileKind::Token, path, None));
    }
    Ok(SecretString::from(token))
}

/// Shorter tokens can be guessed; longer ones do not fit into a header.
const TOKEN_BYTES: RangeInclusive<usize> = 16..=1024;

/// A connection string is never shown as it was written.
fn hide_secrets(problem: Problem) -> Problem {
    match problem {
        Problem::Invalid { key, advice, .. } if key == "upstream.conninfo" => {
            Problem::Invalid { key, value: crate::conninfo::REDACTED.to_owned(), advice }
        }
        other => other,
    }
}

/// A file that was read.
struct ReadFile {
    text: Zeroizing<String>,
    mode: u32,
}

const WORLD_BITS: u32 = 0o007;

impl FileKind {
    fn read(self, path: &Path, surroundings: &dyn Surroundings) -> Result<ReadFile, ConfigError> {
        match surroundings.read(path) {
            Ok(FoundFile::Plain { mode, text, .. }) => Ok(ReadFile { text, mode }),
            Ok(FoundFile::NotPlain) => Err(ConfigError::NotPlain { kind: self, file: path.to_owned() }),
            Err(source) => Err(ConfigError::Read { kind: self, file: path.to_owned(), source }),
        }
    }

    /// Reads a file that holds secrets.
    fn read_secret(
        self,
        path: &Path,
        surroundings: &dyn Surroundings,
    ) -> Result<Zeroizing<String>, ConfigError> {
        let file = self.read(path, surroundings)?;
        if file.mode & WORLD_BITS != 0 {
            return Err(ConfigError::WorldAccess { kind: self, file: path.to_owned() });
        }
        Ok(file.text)
    }
}
