//! What can be wrong with a line of `pg_hba.conf` or `pg_ident.conf`, in PostgreSQL's words where it knows the mistake.

use std::path::PathBuf;

use crate::access::regex::PatternError;

/// A line that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineError {
    /// The file, which may be one that another includes.
    pub file: PathBuf,
    /// The line, from 1; `None` when it is about the file as a whole.
    pub line: Option<usize>,
    /// What is wrong.
    pub problem: LineProblem,
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineProblem {
    /// A list where one value must be.
    #[error("multiple values specified for {0}")]
    MultipleValues(&'static str),
    /// The line is too short.
    #[error("end-of-line before {0}")]
    EndOfLine(&'static str),
    /// The first field.
    #[error("invalid connection type \"{0}\"")]
    ConnectionType(String),
    /// A name where an address must be.
    #[error(
        "host name \"{0}\" is not supported: whoever answers for the client's address in DNS would decide who it is \
         (give addresses, as in 10.1.0.0/16)"
    )]
    HostName(String),
    /// A name with a prefix length.
    #[error("specifying both host name and CIDR mask is invalid: \"{0}\"")]
    HostNameWithMask(String),
    /// The part behind the slash.
    #[error("invalid CIDR mask in address \"{0}\"")]
    CidrMask(String),
    /// The field behind an address without a slash.
    #[error("invalid IP mask \"{0}\"")]
    IpMask(String),
    /// One is of IPv4, the other of IPv6.
    #[error("IP address and mask do not match")]
    Families,
    /// A method that does not exist.
    #[error("invalid authentication method \"{0}\"")]
    Method(String),
    /// A method that PostgreSQL has.
    #[error("invalid authentication method \"{0}\": not supported by this build")]
    MethodNotSupported(String),
    /// A method by which the password itself is sent.
    #[error(
        "authentication method \"password\" is refused: passwords are never asked for in clear (use scram-sha-256)"
    )]
    PasswordInClear,
    /// `peer` beside `host`.
    #[error("peer authentication is only supported on local sockets")]
    PeerNotLocal,
    /// `cert` beside anything but `hostssl`.
    #[error("cert authentication is only supported on hostssl connections")]
    CertNotHostssl,
    /// Something behind the method.
    #[error("authentication option not in name=value format: {0}")]
    NotNameValue(String),
    /// An option that does not exist, or belongs to a method that is not supported.
    #[error("unrecognized authentication option name: \"{0}\"")]
    UnknownOption(String),
    /// `map` beside a method that knows no other name of the client.
    #[error("authentication option \"map\" is only valid for authentication methods peer and cert")]
    MapMisplaced,
    /// An option about certificates beside anything but `hostssl`.
    #[error("{0} can only be configured for \"hostssl\" rows")]
    OnlyHostssl(&'static str),
    /// A value that the option cannot have.
    #[error("invalid value for {option}: \"{value}\"")]
    OptionValue {
        /// The option.
        option: &'static str,
        /// As written.
        value: String,
    },
    /// `cert` always compares the name.
    #[error("clientcert only accepts \"verify-full\" when using \"cert\" authentication")]
    CertVerifiesFully,
    /// A name that begins with a slash and is no regular expression, or none that is known here.
    #[error("invalid regular expression \"{pattern}\": {problem}")]
    Pattern {
        /// As written, without the slash.
        pattern: String,
        /// What is wrong with it.
        problem: PatternError,
    },
    /// A line of `pg_ident.conf` is too short.
    #[error("missing entry at end of line")]
    MissingEntry,
    /// A list in `pg_ident.conf`.
    #[error("multiple values in ident field")]
    MultipleIdentValues,
    /// `\1` with nothing to put there.
    #[error(
        "regular expression \"{pattern}\" has no subexpressions as requested by backreference in \"{user}\""
    )]
    NoSubexpression {
        /// As written, without the slash.
        pattern: String,
        /// The user's name with `\1`.
        user: String,
    },
    /// `\1` where it is not certain what PostgreSQL would put there.
    #[error(
        "regular expression \"{0}\" cannot be used with \\1: it must begin with ^ and end with $, and have neither \
         alternatives nor non-greedy quantifiers"
    )]
    AmbiguousSubexpression(String),
    /// An included file.
    #[error("could not open file \"{}\": {reason}", file.display())]
    Include {
        /// The file.
        file: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A directory to be included.
    #[error("include_dir is not supported: name the files of \"{0}\" with include")]
    IncludeDirectory(String),
    /// Nobody could connect.
    #[error("the file contains no entries")]
    NoEntries,
}
