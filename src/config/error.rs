//! What can be wrong with a configuration: one line that names the file, the line, the key, the value and the way out.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use crate::access::LineProblem;
use crate::conninfo::ConninfoError;

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("could not read {kind} file \"{}\"", file.display())]
    Read {
        /// Which of the files.
        kind: FileKind,
        /// Its path.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is a directory, a device or a pipe.
    #[error("{kind} file \"{}\" is not a plain file", file.display())]
    NotPlain {
        /// Which of the files.
        kind: FileKind,
        /// Its path.
        file: PathBuf,
    },
    /// Everybody on this machine can read a secret.
    #[error("{kind} file \"{}\" has world access; permissions should be u=rw,g=r (0640) or less", file.display())]
    WorldAccess {
        /// Which of the files.
        kind: FileKind,
        /// Its path.
        file: PathBuf,
    },
    /// Something in the file is wrong.
    #[error("{place}: {problem}")]
    Wrong {
        /// Where.
        place: Place,
        /// What.
        problem: Box<Problem>,
    },
}

/// A file that configures the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// The main file.
    Configuration,
    /// `downstream.users`.
    Users,
    /// `downstream.hba`, or a file that it includes.
    Hba,
    /// `downstream.ident`, or a file that it includes.
    Ident,
    /// `admin.token_file` and `admin.read_token_file`.
    Token,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configuration => "configuration",
            Self::Users => "users",
            Self::Hba => "hba",
            Self::Ident => "ident",
            Self::Token => "token",
        })
    }
}

/// Where in which file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which of the files.
    pub kind: FileKind,
    /// Its path.
    pub file: PathBuf,
    /// Its line, from 1; `None` for what is not there.
    pub line: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} file \"{}\"", self.kind, self.file.display())?;
        match self.line {
            Some(line) => write!(f, ", line {line}"),
            None => Ok(()),
        }
    }
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Not TOML.
    #[error("syntax error: {0}")]
    Syntax(String),
    /// A key or section that does not exist.
    #[error("unrecognized configuration parameter \"{key}\"{}", suggestion(close.as_deref()))]
    Unrecognized {
        /// As written.
        key: String,
        /// The one probably meant.
        close: Option<String>,
    },
    /// A key that has no default.
    #[error("parameter \"{key}\" must be set, as in {example}")]
    Missing {
        /// The key.
        key: &'static str,
        /// How it could be set.
        example: &'static str,
    },
    /// A value that is not one of those possible.
    #[error("invalid value for parameter \"{key}\": {value} ({advice})")]
    Invalid {
        /// The key.
        key: String,
        /// As written, with its quotes.
        value: String,
        /// What would be right.
        advice: String,
    },
    /// A number outside its limits.
    #[error("{value} is outside the valid range for parameter \"{key}\" ({min} .. {max})")]
    OutOfRange {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// Smallest.
        min: String,
        /// Largest.
        max: String,
    },
    /// Two settings do not go together.
    #[error("parameter \"{key}\" ({value}) must not be {relation} \"{other}\" ({other_value})")]
    Relation {
        /// The key to change.
        key: &'static str,
        /// Its value.
        value: String,
        /// For example `greater than`.
        relation: &'static str,
        /// The key it disagrees with.
        other: &'static str,
        /// Its value.
        other_value: String,
    },
    /// The connection string is wrong. Not shown: it may hold a password.
    #[error("invalid value for parameter \"upstream.conninfo\": {0}")]
    Conninfo(ConninfoError),
    /// A line of `pg_hba.conf` or `pg_ident.conf`.
    #[error(transparent)]
    Line(LineProblem),
    /// A rule by which whoever comes is who he says.
    #[error(
        "this line lets in whoever connects from elsewhere, as any user (use scram-sha-256 or cert, or set \
         \"downstream.allow_remote_trust\" to true)"
    )]
    RemoteTrust,
    /// A rule that asks for passwords that nobody has.
    #[error("authentication method \"{0}\" needs users: parameter \"downstream.users\" must be set")]
    PasswordWithoutUsers(&'static str),
    /// A rule that asks for certificates that nobody can check.
    #[error(
        "client certificates can only be checked if a root certificate store is available: \"client_ca\" of parameter \
         \"downstream.tls\" must be set"
    )]
    NoClientAuthority,
    /// Open to the network without encryption.
    #[error(
        "parameter \"downstream.listen\" names \"{0}\", which is reachable by others, but there is no \"downstream.tls\" to \
         encrypt with (set it, or \"downstream.allow_plaintext\" to true where the network is private, or write rules into a \
         \"downstream.hba\" file)"
    )]
    Plaintext(String),
    /// Open to the network without authentication.
    #[error(
        "parameter \"downstream.listen\" names \"{0}\", which is reachable by others, but there is no \"downstream.users\" file \
         to authenticate them with (set it, or listen on 127.0.0.1, [::1] or a Unix-domain socket directory)"
    )]
    Unauthenticated(String),
    /// Local connections are not trusted, and nothing else is configured.
    #[error("parameter \"downstream.users\" must be set when \"downstream.trust_local\" is false")]
    UsersRequired,
    /// Pages and tokens in clear on the network.
    #[error(
        "parameter \"admin.listen\" names \"{0}\", which is reachable by others, but pages and tokens are not encrypted there \
         (listen on 127.0.0.1 or [::1], behind a proxy that speaks TLS, or set \"admin.allow_plaintext\" to true where the network \
         is private)"
    )]
    AdminPlaintext(String),
    /// Pages open to the network without authentication.
    #[error(
        "parameter \"admin.token_file\" or \"admin.read_token_file\" must be set when \"admin.listen\" (\"{0}\") is not a \
         loopback address"
    )]
    TokenRequired(String),
    /// One token for both.
    #[error(
        "parameter \"admin.read_token_file\" names a file with the token of \"admin.token_file\", so that whoever may only read \
         could change something (write another token into it)"
    )]
    SameToken,
    /// Two listeners on one address.
    #[error("parameter \"{key}\" names \"{address}\" twice")]
    AddressTwice {
        /// The key.
        key: &'static str,
        /// The address.
        address: String,
    },
    /// A user without a usable verifier. Not shown: it is as good as a password.
    #[error(
        "user \"{0}\" has no SCRAM-SHA-256 verifier \
         (expected SCRAM-SHA-256$ITERATIONS:SALT$STOREDKEY:SERVERKEY, as \"walrelay scram\" prints and pg_authid holds)"
    )]
    InvalidVerifier(String),
    /// Something about a user. The value is not shown: it may be a secret in the wrong place.
    #[error("user \"{user}\": invalid \"{key}\" ({advice})")]
    InvalidUser {
        /// The user.
        user: String,
        /// What about him.
        key: String,
        /// What would be right.
        advice: String,
    },
    /// A users file without users.
    #[error("no user is defined (expected lines as in standby = \"SCRAM-SHA-256$...\")")]
    NoUsers,
    /// The token is unusable.
    #[error("the token must be one line of {min} to {max} printable ASCII characters without spaces")]
    InvalidToken {
        /// Fewest characters.
        min: usize,
        /// Most characters.
        max: usize,
    },
}

fn suggestion(close: Option<&str>) -> String {
    close.map(|close| format!(" (perhaps you meant \"{close}\")")).unwrap_or_default()
}

impl Problem {
    /// The keys whose line to name, the best first, as `section.key`.
    pub(crate) fn keys(&self) -> Vec<&str> {
        match self {
            Self::Unrecognized { key, .. } | Self::Invalid { key, .. } => vec![key],
            Self::OutOfRange { key, .. } | Self::AddressTwice { key, .. } => vec![key],
            Self::Relation { key, other, .. } => vec![key, other],
            Self::Conninfo(_) => vec!["upstream.conninfo"],
            Self::Unauthenticated(_) | Self::Plaintext(_) => vec!["downstream.listen"],
            Self::UsersRequired => vec!["downstream.trust_local"],
            Self::TokenRequired(_) | Self::AdminPlaintext(_) => vec!["admin.listen"],
            Self::SameToken => vec!["admin.read_token_file"],
            Self::InvalidVerifier(user) | Self::InvalidUser { user, .. } => vec![user],
            Self::Syntax(_) | Self::Missing { .. } | Self::NoUsers | Self::InvalidToken { .. } => Vec::new(),
            // These come with their lines.
            Self::Line(_) | Self::RemoteTrust | Self::PasswordWithoutUsers(_) | Self::NoClientAuthority => {
                Vec::new()
            }
        }
    }

    /// A wrong text.
    pub(crate) fn invalid(key: &str, value: &str, advice: impl Into<String>) -> Self {
        Self::Invalid { key: key.to_owned(), value: format!("\"{value}\""), advice: advice.into() }
    }

    /// The error at its place.
    pub(crate) fn at(self, kind: FileKind, file: &Path, line: Option<usize>) -> ConfigError {
        ConfigError::Wrong { place: Place { kind, file: file.to_owned(), line }, problem: Box::new(self) }
    }
}
