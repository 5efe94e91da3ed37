//! What can be wrong with a connection string, in libpq's words.
//!
//! The texts are those of libpq 18 (`fe-connect.c`), so that a search for one finds libpq's answers. A password never
//! appears in one: where libpq would print it, [`REDACTED`] stands.

/// Stands where a secret would be, as in `pg_stat_wal_receiver.conninfo`.
pub const REDACTED: &str = "********";

/// The connection string, the service file, the environment or the password file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConninfoError {
    /// A word that is not followed by `=`.
    #[error("missing \"=\" after \"{0}\" in connection info string")]
    MissingEquals(String),
    /// A `'` without its partner.
    #[error("unterminated quoted string in connection info string")]
    UnterminatedQuote,
    /// A keyword libpq does not have.
    #[error("invalid connection option \"{0}\"")]
    InvalidOption(String),
    /// A keyword libpq does not have, in a URI.
    #[error("invalid URI query parameter: \"{0}\"")]
    InvalidQueryParameter(String),
    /// Two `=` in one query parameter.
    #[error("extra key/value separator \"=\" in URI query parameter: \"{0}\"")]
    ExtraSeparator(String),
    /// No `=` in a query parameter.
    #[error("missing key/value separator \"=\" in URI query parameter: \"{0}\"")]
    MissingSeparator(String),
    /// `%` without two hexadecimal digits.
    #[error("invalid percent-encoded token: \"{0}\"")]
    InvalidPercentEncoding(String),
    /// `%00`.
    #[error("forbidden value %00 in percent-encoded value: \"{0}\"")]
    ForbiddenZero(String),
    /// Percent-encoded bytes that are not UTF-8 (libpq passes them on; no setting of ours can hold them).
    #[error("invalid byte sequence for encoding \"UTF8\" in percent-encoded value: \"{0}\"")]
    NotUtf8(String),
    /// A space inside a URI value.
    #[error("unexpected spaces found in \"{0}\", use percent-encoded spaces (%20) instead")]
    UnexpectedSpaces(String),
    /// `[` without `]`.
    #[error("end of string reached when looking for matching \"]\" in IPv6 host address in URI: \"{0}\"")]
    UnmatchedBracket(String),
    /// `[]`.
    #[error("IPv6 host address may not be empty in URI: \"{0}\"")]
    EmptyIpv6(String),
    /// Something other than a port, a path, a query or another host after `]`.
    #[error(
        "unexpected character \"{character}\" at position {position} in URI (expected \":\" or \"/\"): \"{uri}\""
    )]
    UnexpectedCharacter {
        /// What stands there.
        character: char,
        /// Its position in bytes, from 1.
        position: usize,
        /// The whole URI.
        uri: String,
    },
    /// A password with an `@` in it, most likely; libpq takes what follows for a part of the host, and shows it.
    #[error("unexpected \"@\" after user and password in URI, use percent-encoded \"@\" (%40) instead")]
    UnexpectedAtSign,
    /// A zero byte, which no libpq string can hold.
    #[error("null byte in connection info string")]
    NullByte,

    /// A keyword with a closed list of values has another one.
    #[error("invalid {keyword} value: \"{value}\"")]
    InvalidValue {
        /// libpq's keyword.
        keyword: &'static str,
        /// The value given.
        value: String,
    },
    /// As [`Self::InvalidValue`], for the two keywords that libpq quotes.
    #[error("invalid \"{keyword}\" value: \"{value}\"")]
    InvalidTlsVersion {
        /// libpq's keyword.
        keyword: &'static str,
        /// The value given.
        value: String,
    },
    /// Not a whole number.
    #[error("invalid integer value \"{value}\" for connection option \"{keyword}\"")]
    InvalidInteger {
        /// libpq's keyword.
        keyword: &'static str,
        /// The value given.
        value: String,
    },
    /// Not between 1 and 65535.
    #[error("invalid port number: \"{0}\"")]
    InvalidPort(String),
    /// The lists differ in length.
    #[error("could not match {hosts} host names to {addresses} hostaddr values")]
    HostCount {
        /// Elements of `host`.
        hosts: usize,
        /// Elements of `hostaddr`.
        addresses: usize,
    },
    /// The lists differ in length.
    #[error("could not match {ports} port numbers to {hosts} hosts")]
    PortCount {
        /// Elements of `port`.
        ports: usize,
        /// Hosts.
        hosts: usize,
    },
    /// `hostaddr` is not an address.
    #[error("could not parse network address \"{0}\": Name or service not known")]
    InvalidAddress(String),
    /// The socket's path does not fit into `sockaddr_un`.
    #[error("Unix-domain socket path \"{path}\" is too long (maximum {limit} bytes)")]
    SocketPathTooLong {
        /// The path.
        path: String,
        /// The system's limit.
        limit: usize,
    },
    /// Smallest above largest.
    #[error("invalid SSL protocol version range")]
    TlsVersionRange,
    /// Smallest above largest.
    #[error("\"min_protocol_version\" is greater than \"max_protocol_version\"")]
    ProtocolVersionRange,
    /// `sslnegotiation=direct` could fall back to plain text.
    #[error(
        "weak sslmode \"{0}\" may not be used with sslnegotiation=direct \
         (use \"require\", \"verify-ca\", or \"verify-full\")"
    )]
    WeakForDirect(&'static str),
    /// The system's roots vouch for anyone: the name must be checked too.
    #[error("weak sslmode \"{0}\" may not be used with sslrootcert=system (use \"verify-full\")")]
    WeakForSystemRoots(&'static str),
    /// Asks for GSSAPI, which this program has not.
    #[error("gssencmode value \"{0}\" invalid when GSSAPI support is not compiled in")]
    NoGssapi(String),
    /// `!` after methods without it.
    #[error("negative require_auth method \"{0}\" cannot be mixed with non-negative methods")]
    NegativeAuthMixed(String),
    /// A method without `!` after those with it.
    #[error("require_auth method \"{0}\" cannot be mixed with negative methods")]
    PositiveAuthMixed(String),
    /// A method named twice.
    #[error("require_auth method \"{0}\" is specified more than once")]
    DuplicateAuth(String),
    /// Not base64.
    #[error("invalid SCRAM {0} key")]
    InvalidScramKey(&'static str),
    /// Not 32 bytes.
    #[error("invalid SCRAM {which} key length: {bytes}")]
    ScramKeyLength {
        /// `client` or `server`.
        which: &'static str,
        /// Bytes after decoding.
        bytes: usize,
    },

    /// No file defines the service.
    #[error("definition of service \"{0}\" not found")]
    ServiceNotFound(String),
    /// `PGSERVICEFILE` or `servicefile` names no file.
    #[error("service file \"{0}\" not found")]
    ServiceFileNotFound(String),
    /// A line is longer than libpq reads.
    #[error("line {line} too long in service file \"{file}\"")]
    ServiceLineTooLong {
        /// The service file.
        file: String,
        /// Its line, from 1.
        line: usize,
    },
    /// Neither a setting nor a heading.
    #[error("syntax error in service file \"{file}\", line {line}")]
    ServiceSyntax {
        /// The service file.
        file: String,
        /// Its line, from 1.
        line: usize,
    },
    /// A service that names a service.
    #[error("nested {keyword} specifications not supported in service file \"{file}\", line {line}")]
    NestedService {
        /// `service`, or `"servicefile"` with its quotes, as libpq has them.
        keyword: &'static str,
        /// The service file.
        file: String,
        /// Its line, from 1.
        line: usize,
    },

    /// No `user` is given and the operating system knows none for us.
    #[error("local user with ID {0} does not exist")]
    NoLocalUser(u32),
    /// The server asked for a method that `require_auth` does not allow.
    #[error("authentication method requirement \"{requirement}\" failed: {reason}")]
    AuthRequirement {
        /// The text of `require_auth`.
        requirement: String,
        /// What the server did.
        reason: &'static str,
    },
}
