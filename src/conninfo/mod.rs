//! Connection strings: everything libpq understands, as typed values.
//!
//! A string an administrator has in `primary_conninfo` is pasted unchanged and means here what it means there: both
//! forms, every keyword, `PG*` variables, service files, password files, several hosts. Wrong ones are refused in
//! libpq's words. Nothing is connected to and no name is looked up here, so everything that can be wrong is found when
//! the program starts, where libpq finds some of it (a port that is no number) only when it comes to that host.
//!
//! ```text
//!  text ── settings.rs / uri.rs ──▶ Settings ── defaults.rs ──▶ Settings ── resolve.rs ──▶ Conninfo
//!            keyword = text            service file, environment, defaults     types, combinations, passwords
//! ```
//!
//! Differences from libpq, all deliberate: values must be UTF-8; LDAP lookups in service files are a syntax error, as
//! in a libpq built without LDAP; GSSAPI is not there; an empty host means the socket directory
//! `/var/run/postgresql`, as Debian, Red Hat and the official images build libpq (the source's own default is `/tmp`).
//! Where libpq would print a password in an error, asterisks stand; an `@` in a URI behind `user:password@` is refused.

mod defaults;
mod error;
mod keyword;
mod password_file;
mod require_auth;
mod resolve;
mod settings;
mod surroundings;
#[cfg(test)]
mod tests;
mod uri;
mod values;

use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use secrecy::{SecretBox, SecretString};

pub use error::{ConninfoError, REDACTED};
pub use password_file::PasswordFileWarning;
pub use require_auth::{AuthRequest, RequireAuth};
pub use settings::Settings;
pub(crate) use surroundings::home_directory;
pub use surroundings::{
    FileIdentity, FixedSurroundings, FoundFile, LISTED_FILES_MAX, ProcessSurroundings, Surroundings,
};
pub use values::{
    ChannelBinding, GssEncMode, LoadBalanceHosts, ProtocolVersion, SslCertMode, SslMode, SslNegotiation,
    TargetSessionAttrs, TlsVersion,
};

/// Where to connect, as whom, and how.
///
/// `Debug` and `Display` show the settings that were given, without secrets.
#[derive(Clone)]
pub struct Conninfo {
    /// The hosts to try, in the order given; never empty.
    pub hosts: Vec<Host>,
    /// `user`; by default the operating system user.
    pub user: String,
    /// `dbname`; `replication` for physical replication, by default the user's name.
    pub dbname: String,
    /// `options`: command-line options for the server process.
    pub options: Option<String>,
    /// `application_name`, else `fallback_application_name`.
    pub application_name: Option<String>,
    /// `replication`, as sent.
    pub replication: Option<String>,
    /// `client_encoding`, as sent.
    pub client_encoding: Option<String>,
    /// Which of the hosts will do; `None`: it is not said.
    pub target_session_attrs: Option<TargetSessionAttrs>,
    /// In which order they are tried; see [`Conninfo::attempt_order`].
    pub load_balance_hosts: LoadBalanceHosts,
    /// How long to wait for each address; `None`: as long as it takes.
    pub connect_timeout: Option<Duration>,
    /// TCP keepalives; `None`: off.
    pub keepalives: Option<Keepalives>,
    /// How long sent data may stay unacknowledged by TCP; `None`: the system's choice.
    pub tcp_user_timeout: Option<Duration>,
    /// Everything about TLS.
    pub ssl: SslSettings,
    /// Whether SCRAM is bound to the TLS channel.
    pub channel_binding: ChannelBinding,
    /// Which ways to authenticate are allowed.
    pub require_auth: RequireAuth,
    /// Operating system user the server must run as, where the connection is a Unix socket.
    pub requirepeer: Option<String>,
    /// Oldest protocol to accept.
    pub min_protocol_version: ProtocolVersion,
    /// Newest protocol to ask for.
    pub max_protocol_version: ProtocolVersion,
    /// What SCRAM's proof is made from; a password is then neither needed nor used for it.
    pub scram_client_key: Option<ScramKey>,
    /// What a server's signature is verified with, whatever the password.
    pub scram_server_key: Option<ScramKey>,
    /// Why a password file was not used, to be logged.
    pub password_file_warning: Option<PasswordFileWarning>,
    password: Option<SecretString>,
    password_file: Option<PathBuf>,
    /// `PGDATESTYLE` and the like.
    environment_parameters: Vec<(&'static str, String)>,
    /// What the string itself gave, without secrets.
    given: Settings,
}

/// A key that was made from a password (`SCRAM_MAX_KEY_LEN` bytes).
pub type ScramKey = Arc<SecretBox<[u8; 32]>>;

/// One host to try.
#[derive(Clone, Debug)]
pub struct Host {
    /// As given, else its address: for messages, for the password file.
    pub name: String,
    /// What its certificate must name; empty where only an address is given for the connection, as in libpq.
    pub certificate_name: String,
    /// Where it is.
    pub address: HostAddress,
    /// Its port; part of the path for a socket.
    pub port: u16,
    /// As given, for messages.
    address_text: String,
    /// As given, which is what the password file is compared with.
    port_text: String,
    password: Option<SecretString>,
}

/// Where a host is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HostAddress {
    /// To be looked up; may also be an address in text.
    Name(String),
    /// From `hostaddr`: not to be looked up.
    Ip(IpAddr),
    /// Path of the socket itself; in the abstract namespace if it begins with `@`.
    UnixSocket(PathBuf),
}

/// TCP keepalives; `None` is the system's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keepalives {
    /// Idle time before the first probe.
    pub idle: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
    /// Unanswered probes that end the connection.
    pub count: Option<u32>,
}

/// Everything about TLS.
#[derive(Clone, Debug)]
pub struct SslSettings {
    /// How much is asked for.
    pub mode: SslMode,
    /// How it begins.
    pub negotiation: SslNegotiation,
    /// Whether a client certificate is sent.
    pub cert_mode: SslCertMode,
    /// Client certificate.
    pub cert: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// The key's passphrase.
    pub key_password: Option<SecretString>,
    /// Roots that are trusted; `system` for the system's.
    pub root_cert: Option<String>,
    /// Revoked certificates.
    pub crl: Option<PathBuf>,
    /// Directory of the same.
    pub crl_directory: Option<PathBuf>,
    /// Whether the host's name is sent in clear text.
    pub sni: bool,
    /// Oldest version to accept.
    pub min_version: Option<TlsVersion>,
    /// Newest version to accept.
    pub max_version: Option<TlsVersion>,
}

impl Conninfo {
    /// Parses `text` for a session that speaks SQL, completed from `surroundings`.
    pub fn parse(text: &str, surroundings: &dyn Surroundings) -> Result<Self, ConninfoError> {
        let settings = Settings::parse(text)?;
        let given = settings.redacted();
        resolve::resolve(settings, given, surroundings)
    }

    /// Parses `text` for physical replication, with exactly what a walreceiver adds to its `primary_conninfo`.
    ///
    /// The database is `replication`, which servers ignore and password files may name; `name` is the application name
    /// unless the string or `PGAPPNAME` gives one.
    pub fn parse_for_replication(
        text: &str,
        name: &str,
        surroundings: &dyn Surroundings,
    ) -> Result<Self, ConninfoError> {
        let mut settings = Settings::parse(text)?;
        let given = settings.redacted();
        settings.store("replication", "true")?;
        settings.store("dbname", "replication")?;
        settings.store("fallback_application_name", name)?;
        resolve::resolve(settings, given, surroundings)
    }

    /// As [`Self::parse`], for SQL on the servers that are replicated from: without a `dbname` in the database `postgres`, and
    /// never as a replication connection.
    pub fn parse_beside_replication(
        text: &str,
        name: &str,
        surroundings: &dyn Surroundings,
    ) -> Result<Self, ConninfoError> {
        let mut settings = Settings::parse(text)?;
        let given = settings.redacted();
        settings.store("replication", "false")?;
        if settings.value("dbname").is_none() {
            settings.store("dbname", "postgres")?;
        }
        settings.store("fallback_application_name", name)?;
        resolve::resolve(settings, given, surroundings)
    }

    /// The password for `host`: the one given, else the password file's.
    pub fn password_for<'a>(&'a self, host: &'a Host) -> Option<&'a SecretString> {
        self.password.as_ref().or(host.password.as_ref())
    }

    /// The file that the password for `host` came from; libpq names it when the server refuses the password.
    pub fn password_file_used_for(&self, host: &Host) -> Option<&Path> {
        let is_from_file = self.password.is_none() && host.password.is_some();
        self.password_file.as_deref().filter(|_| is_from_file)
    }

    /// Reads the password file anew, so that a changed password is found at the next attempt, as libpq finds it.
    pub fn reread_passwords(&mut self, surroundings: &dyn Surroundings) {
        resolve::read_passwords(self, surroundings);
    }

    /// The parameters of the startup packet, in libpq's order.
    pub fn startup_parameters(&self) -> Vec<(&'static str, &str)> {
        let optional = [
            ("replication", &self.replication),
            ("options", &self.options),
            ("application_name", &self.application_name),
            ("client_encoding", &self.client_encoding),
        ];
        let mut parameters = vec![("user", self.user.as_str()), ("database", self.dbname.as_str())];
        parameters.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?))));
        parameters.extend(self.environment_parameters.iter().map(|(name, value)| (*name, value.as_str())));
        parameters
    }

    /// The hosts in the order to try them; `below(n)` gives a random number less than `n`.
    pub fn attempt_order(&self, mut below: impl FnMut(usize) -> usize) -> Vec<&Host> {
        let mut order = self.hosts.iter().collect::<Vec<_>>();
        if self.load_balance_hosts == LoadBalanceHosts::Random {
            for last in (1..order.len()).rev() {
                order.swap(last, below(last + 1).min(last));
            }
        }
        order
    }

    /// Whether a password, or a key made from one, stands in the string itself, and so wherever the string is kept.
    pub fn is_password_given_in_string(&self) -> bool {
        let secrets = ["password", "scram_client_key", "scram_server_key"];
        secrets.iter().any(|keyword| self.given.value(keyword).is_some())
    }

    /// What the string gave, without secrets, in the key/value form.
    pub fn display_redacted(&self) -> impl fmt::Display + '_ {
        &self.given
    }
}

impl fmt::Display for Conninfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.display_redacted().fmt(f)
    }
}

impl fmt::Debug for Conninfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Conninfo({})", self.display_redacted())
    }
}

impl fmt::Display for Host {
    /// As in libpq's `connection to server ...`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            HostAddress::UnixSocket(path) => write!(f, "on socket \"{}\"", path.display()),
            HostAddress::Ip(_) | HostAddress::Name(_) => {
                write!(f, "at \"{}\", port {}", self.address_text, self.port_text)
            }
        }
    }
}
