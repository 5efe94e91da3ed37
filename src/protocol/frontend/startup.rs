//! The first packet of a connection, which has no type byte.
//!
//! Owns the startup packet's parameters and the choice of a protocol version. Whether TLS is offered, and who may come
//! in, is not decided here.

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::protocol::backend::NegotiateProtocolVersion;
use crate::protocol::fields::{Fields, packet, put_text};
use crate::protocol::frontend::parse_options;
use crate::protocol::{
    CANCEL_KEY_BYTES_MAX, DecodeError, STARTUP_PACKET_BYTES_MAX, ServerError, SqlState, checked_body_bytes,
};

/// The first packet; after a refused request for encryption another one follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FirstPacket {
    /// Asks for TLS: answered by one byte.
    SslRequest,
    /// Asks for GSSAPI encryption: answered by one byte.
    GssEncRequest,
    /// Asks to cancel another connection's command: never answered.
    Cancel(CancelRequest),
    /// Starts a session.
    Startup(Startup),
}

impl FirstPacket {
    /// Takes the packet off the front of `buffer`; `None` when it has not arrived whole. A TLS ClientHello sent without
    /// asking (first byte 0x16) must be looked for before: here it is a packet of impossible length.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, DecodeError> {
        const NAME: &str = "startup packet";
        let mut header = buffer.as_ref();
        let Ok(len) = header.try_get_u32() else {
            return Ok(None);
        };
        if len < 8 {
            return Err(DecodeError::InvalidLength { message: NAME, len });
        }
        let body_bytes = checked_body_bytes(NAME, len, STARTUP_PACKET_BYTES_MAX)?;
        if header.len() < body_bytes {
            return Ok(None);
        }
        buffer.advance(size_of::<u32>());
        let mut fields = Fields::of(NAME, buffer.split_to(body_bytes).freeze());
        match fields.u32("protocol version")? {
            CANCEL_REQUEST_CODE => CancelRequest::decode(fields.rest()).map(Self::Cancel),
            SSL_REQUEST_CODE => fields.finish().map(|()| Self::SslRequest),
            GSSENC_REQUEST_CODE => fields.finish().map(|()| Self::GssEncRequest),
            version => Startup::decode(ProtocolVersion::from_wire(version), fields).map(Self::Startup),
        }
        .map(Some)
    }

    /// Appends the packet.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::SslRequest => packet(out, |out| out.put_u32(SSL_REQUEST_CODE)),
            Self::GssEncRequest => packet(out, |out| out.put_u32(GSSENC_REQUEST_CODE)),
            Self::Cancel(request) => request.encode(out),
            Self::Startup(startup) => startup.encode(out),
        }
    }
}

const CANCEL_REQUEST_CODE: u32 = 80_877_102;
const SSL_REQUEST_CODE: u32 = 80_877_103;
const GSSENC_REQUEST_CODE: u32 = 80_877_104;

/// Names the connection whose command is to be canceled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CancelRequest {
    /// The process id from BackendKeyData.
    pub process_id: u32,
    /// The secret from BackendKeyData.
    pub key: CancelKey,
}

impl CancelRequest {
    fn decode(body: Bytes) -> Result<Self, DecodeError> {
        let mut fields = Fields::of("CancelRequest", body);
        let process_id = fields.u32("process id")?;
        Ok(Self { process_id, key: CancelKey::decode("CancelRequest", fields.rest())? })
    }

    fn encode(&self, out: &mut BytesMut) {
        packet(out, |out| {
            out.put_u32(CANCEL_REQUEST_CODE);
            out.put_u32(self.process_id);
            out.put_slice(self.key.as_bytes());
        });
    }
}

/// The secret that allows to cancel a connection's command: 4 bytes up to protocol 3.0, up to 256 from 3.2. It is not
/// printed, and two keys are compared in constant time.
#[derive(Clone)]
pub struct CancelKey(Bytes);

impl CancelKey {
    /// `None` unless there are 4 to 256 bytes.
    pub fn new(key: impl Into<Bytes>) -> Option<Self> {
        let key = key.into();
        (4..=CANCEL_KEY_BYTES_MAX).contains(&key.len()).then_some(Self(key))
    }

    pub(in crate::protocol) fn decode(message: &'static str, bytes: Bytes) -> Result<Self, DecodeError> {
        let len = bytes.len();
        Self::new(bytes).ok_or(match len {
            0..4 => DecodeError::Truncated { message, field: "cancel key" },
            len => DecodeError::TooLong { message, len, limit: CANCEL_KEY_BYTES_MAX },
        })
    }

    /// The key's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl PartialEq for CancelKey {
    fn eq(&self, other: &Self) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl Eq for CancelKey {}

impl fmt::Debug for CancelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CancelKey({} bytes)", self.0.len())
    }
}

/// A version of the frontend/backend protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProtocolVersion {
    /// Changed by what old peers cannot understand.
    pub major: u16,
    /// Changed by what is negotiated.
    pub minor: u16,
}

impl ProtocolVersion {
    /// Spoken by every server and client since 7.4.
    pub const V3_0: Self = Self { major: 3, minor: 0 };
    /// Since 18: longer cancel keys. 3.1 was never used.
    pub const V3_2: Self = Self { major: 3, minor: 2 };

    pub(in crate::protocol) fn from_wire(raw: u32) -> Self {
        let [a, b, c, d] = raw.to_be_bytes();
        Self { major: u16::from_be_bytes([a, b]), minor: u16::from_be_bytes([c, d]) }
    }

    pub(in crate::protocol) fn to_wire(self) -> u32 {
        u32::from(self.major) << 16 | u32::from(self.minor)
    }

    /// Bytes of the cancel key that a server of this version gives out.
    pub fn cancel_key_bytes(self) -> usize {
        if self >= Self::V3_2 { 32 } else { 4 }
    }
}

impl fmt::Display for ProtocolVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Starts a session: the protocol version and the parameters, in the order they were sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Startup {
    /// The version asked for.
    pub version: ProtocolVersion,
    /// Names and values; of a repeated name the last value counts.
    pub parameters: Vec<(String, String)>,
}

impl Startup {
    /// A startup packet of protocol 3.0, which every server takes without negotiation.
    pub fn new<N: Into<String>, V: Into<String>>(parameters: impl IntoIterator<Item = (N, V)>) -> Self {
        let parameters = parameters.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        Self { version: ProtocolVersion::V3_0, parameters }
    }

    fn decode(version: ProtocolVersion, mut fields: Fields) -> Result<Self, DecodeError> {
        let mut parameters = Vec::new();
        // The layout of another major version is not known; the version is refused by `negotiate`.
        if version.major == ProtocolVersion::V3_0.major {
            loop {
                let name = fields.text("parameter name")?;
                if name.is_empty() {
                    break;
                }
                if parameters.len() == PARAMETERS_MAX {
                    let (message, limit) = ("list of startup parameters", PARAMETERS_MAX);
                    return Err(DecodeError::TooLong { message, len: limit + 1, limit });
                }
                parameters.push((name, fields.text("parameter value")?));
            }
            fields.finish()?;
        }
        Ok(Self { version, parameters })
    }

    fn encode(&self, out: &mut BytesMut) {
        packet(out, |out| {
            out.put_u32(self.version.to_wire());
            // An empty name would end the list.
            for (name, value) in self.parameters.iter().filter(|(name, _)| !name.is_empty()) {
                put_text(out, name);
                put_text(out, value);
            }
            if self.version.major == ProtocolVersion::V3_0.major {
                out.put_u8(0);
            }
        });
    }

    /// The value of a parameter.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The user's name, cut to the length of a name; `None` when it is missing or empty.
    pub fn user(&self) -> Option<&str> {
        self.parameter("user").filter(|user| !user.is_empty()).map(truncate_identifier)
    }

    /// The database's name; without one it is the user's.
    pub fn database(&self) -> Option<&str> {
        let named = self.parameter("database").filter(|database| !database.is_empty());
        named.map(truncate_identifier).or_else(|| self.user())
    }

    /// The name a standby is known by; empty when it sent none, also in `options`.
    pub fn application_name(&self) -> String {
        self.settings().remove("application_name").unwrap_or_default()
    }

    /// The settings asked for, by name in lower case: those in `options`, and the parameters that are not about the session itself.
    /// A parameter of its own wins over `options`, as in PostgreSQL, which applies it later.
    pub fn settings(&self) -> std::collections::BTreeMap<String, String> {
        let in_options = self.parameter("options").map(parse_options).unwrap_or_default();
        let own = self.parameters.iter().filter(|(name, _)| {
            !matches!(name.as_str(), "user" | "database" | "options" | "replication") && !is_extension(name)
        });
        // Names of settings are the same in any case.
        in_options
            .into_iter()
            .chain(own.cloned())
            .map(|(name, value)| (name.to_ascii_lowercase(), value))
            .collect()
    }

    /// What kind of session it is.
    pub fn replication(&self) -> Result<ReplicationMode, InvalidReplication> {
        match self.parameter("replication") {
            None => Ok(ReplicationMode::Off),
            Some("database") => Ok(ReplicationMode::Database),
            Some(value) => match parse_boolean(value) {
                Some(true) => Ok(ReplicationMode::Physical),
                Some(false) => Ok(ReplicationMode::Off),
                None => Err(InvalidReplication(value.to_owned())),
            },
        }
    }

    /// Chooses the protocol version. Of the extensions asked for (`_pq_.` and more), those in `known` are granted; all
    /// others have to be named to the client.
    pub fn negotiate(&self, known: &[&str]) -> Result<Negotiation, UnsupportedProtocol> {
        if self.version.major != ProtocolVersion::V3_2.major {
            return Err(UnsupportedProtocol(self.version));
        }
        // 3.1 was never given a meaning: it is answered as any version that is not spoken here.
        let version = match self.version.minor {
            0 | 1 => ProtocolVersion::V3_0,
            _ => ProtocolVersion::V3_2,
        };
        let mut unrecognized: Vec<String> = Vec::new();
        for (name, _) in self.parameters.iter().filter(|(name, _)| is_extension(name)) {
            if !known.contains(&name.as_str()) && !unrecognized.contains(name) {
                unrecognized.push(name.clone());
            }
        }
        let is_as_asked = version == self.version && unrecognized.is_empty();
        let answer = (!is_as_asked).then_some(NegotiateProtocolVersion { version, unrecognized });
        Ok(Negotiation { version, answer })
    }
}

/// Most parameters of a startup packet. Each costs far more memory than bytes, and a client that is not known may send it.
pub const PARAMETERS_MAX: usize = 256;

fn is_extension(name: &str) -> bool {
    name.starts_with("_pq_.")
}

/// Cuts a name to PostgreSQL's 63 bytes, between characters (`truncate_identifier`).
pub(in crate::protocol) fn truncate_identifier(name: &str) -> &str {
    name.get(..name.floor_char_boundary(IDENTIFIER_BYTES_MAX)).unwrap_or(name)
}

/// `NAMEDATALEN - 1`.
const IDENTIFIER_BYTES_MAX: usize = 63;

/// What the parameter `replication` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicationMode {
    /// An ordinary session.
    Off,
    /// Physical replication: the database's name means nothing.
    Physical,
    /// Replication commands and SQL in one database.
    Database,
}

/// The parameter `replication` is neither a boolean nor `database`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid value for parameter \"replication\": \"{0}\"")]
pub struct InvalidReplication(pub String);

impl From<InvalidReplication> for ServerError {
    fn from(error: InvalidReplication) -> Self {
        Self::fatal(SqlState::INVALID_PARAMETER_VALUE, error.to_string())
            .with_hint("Valid values are: \"false\", 0, \"true\", 1, \"database\".")
    }
}

/// Result of [`Startup::negotiate`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiation {
    /// The version to be spoken.
    pub version: ProtocolVersion,
    /// To be sent before the authentication request. Old clients take it for an error, so only where it is due.
    pub answer: Option<NegotiateProtocolVersion>,
}

/// The client asks for another major version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unsupported frontend protocol {0}: server supports 3.0 to 3.2")]
pub struct UnsupportedProtocol(pub ProtocolVersion);

impl From<UnsupportedProtocol> for ServerError {
    fn from(error: UnsupportedProtocol) -> Self {
        Self::fatal(SqlState::FEATURE_NOT_SUPPORTED, error.to_string())
    }
}

/// Reads a boolean as PostgreSQL's settings take it (`parse_bool`): unique prefixes of true, false, yes, no, on, off in
/// any case, and 1 and 0.
pub fn parse_boolean(text: &str) -> Option<bool> {
    let lower = text.to_ascii_lowercase();
    let is = |word: &str, least: usize| lower.len() >= least && word.starts_with(&lower);
    match lower.as_str() {
        "1" => Some(true),
        "0" => Some(false),
        _ if is("true", 1) || is("yes", 1) || is("on", 2) => Some(true),
        _ if is("false", 1) || is("no", 1) || is("off", 2) => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(packet: &FirstPacket) -> BytesMut {
        let mut out = BytesMut::new();
        packet.encode(&mut out);
        out
    }

    #[test]
    fn every_prefix_is_incomplete_and_the_whole_reads_back() {
        let startup =
            Startup::new([("user", "replicator"), ("replication", "true"), ("application_name", "")]);
        let key = CancelKey::new(vec![7; 32]).unwrap();
        for packet in [
            FirstPacket::SslRequest,
            FirstPacket::GssEncRequest,
            FirstPacket::Cancel(CancelRequest { process_id: 42, key }),
            FirstPacket::Startup(startup),
        ] {
            let mut whole = encoded(&packet);
            for len in 0..whole.len() {
                assert_eq!(FirstPacket::decode(&mut BytesMut::from(&whole[..len])), Ok(None));
            }
            assert_eq!(FirstPacket::decode(&mut whole), Ok(Some(packet)));
        }
    }

    #[test]
    fn lengths_out_of_range_are_refused_by_the_length_alone() {
        for len in [0_u32, 3, 7, 10_005, 0x1603_0100, u32::MAX] {
            assert!(FirstPacket::decode(&mut BytesMut::from(&len.to_be_bytes()[..])).is_err(), "{len}");
        }
        assert_eq!(FirstPacket::decode(&mut BytesMut::from(&10_004_u32.to_be_bytes()[..])), Ok(None));
    }

    #[test]
    fn the_terminator_must_be_the_last_byte() {
        let good = encoded(&FirstPacket::Startup(Startup::new([("user", "u")])));
        for (change, body) in
            [("missing", &good[4..good.len() - 1]), ("doubled", &[&good[4..], &[0]].concat())]
        {
            let mut bytes = BytesMut::new();
            packet(&mut bytes, |out| out.put_slice(body));
            assert!(FirstPacket::decode(&mut bytes).is_err(), "{change}");
        }
    }

    #[test]
    fn replication_is_a_boolean_or_exactly_database() {
        let mode = |value: &str| Startup::new([("replication", value)]).replication();
        for value in ["true", "1", "on", "yes", "t", "TRUE", "Y"] {
            assert_eq!(mode(value), Ok(ReplicationMode::Physical), "{value}");
        }
        for value in ["off", "0", "no", "f"] {
            assert_eq!(mode(value), Ok(ReplicationMode::Off), "{value}");
        }
        assert_eq!(mode("database"), Ok(ReplicationMode::Database));
        for value in ["Database", "o", "", "2", "trues", "databas"] {
            let error = mode(value).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("invalid value for parameter \"replication\": \"{value}\"")
            );
        }
    }

    #[test]
    fn unknown_extensions_and_newer_versions_are_answered_but_known_ones_are_not() {
        let mut startup =
            Startup::new([("user", "u"), ("_pq_.test_protocol_negotiation", ""), ("_pq_.ours", "1")]);
        startup.version.minor = 9999;
        let negotiation = startup.negotiate(&["_pq_.ours"]).unwrap();
        assert_eq!(negotiation.version, ProtocolVersion::V3_2);
        assert_eq!(negotiation.answer.unwrap().unrecognized, ["_pq_.test_protocol_negotiation"]);

        for (minor, version, is_answered) in [
            (0, ProtocolVersion::V3_0, false),
            (1, ProtocolVersion::V3_0, true),
            (2, ProtocolVersion::V3_2, false),
        ] {
            let mut startup = Startup::new([("user", "u")]);
            startup.version.minor = minor;
            let negotiation = startup.negotiate(&[]).unwrap();
            assert_eq!((negotiation.version, negotiation.answer.is_some()), (version, is_answered));
        }

        let old = Startup { version: ProtocolVersion { major: 2, minor: 0 }, parameters: Vec::new() };
        let error = old.negotiate(&[]).unwrap_err().to_string();
        assert_eq!(error, "unsupported frontend protocol 2.0: server supports 3.0 to 3.2");
    }

    #[test]
    fn the_last_value_counts_and_options_yield_to_parameters() {
        let startup = Startup::new([
            ("user", "a"),
            ("user", "b"),
            ("options", "-c application_name=x -c wal_sender_timeout=5s"),
            ("application_name", "dc2_a"),
        ]);
        assert_eq!((startup.user(), startup.database()), (Some("b"), Some("b")));
        assert_eq!(startup.application_name(), "dc2_a");
        assert_eq!(startup.settings().get("wal_sender_timeout").map(String::as_str), Some("5s"));
        assert_eq!(Startup::new([("user", "é".repeat(40))]).user().map(str::len), Some(62));
    }
}
