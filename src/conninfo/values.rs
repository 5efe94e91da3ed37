//! The values of keywords that have a closed list of them.
//!
//! Owns the types and their texts. Which combinations are refused is decided in `resolve.rs`.

use std::fmt;

use crate::conninfo::ConninfoError;

macro_rules! closed_list {
    (
        $(#[$about:meta])*
        $name:ident, $keyword:literal, $error:ident,
        { $( $(#[$about_value:meta])* $value:ident = $text:literal ),+ $(,)? }
    ) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $( $(#[$about_value])* $value ),+ }

        impl $name {
            /// libpq's keyword.
            pub const KEYWORD: &'static str = $keyword;

            /// Every value.
            pub const ALL: &'static [Self] = &[$( Self::$value ),+];

            /// The value as it stands in a connection string.
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$value => $text ),+ }
            }

            /// Reads a value of the keyword.
            pub fn parse(text: &str) -> Result<Self, ConninfoError> {
                Self::ALL.iter().copied().find(|value| value.is_called(text)).ok_or_else(|| {
                    ConninfoError::$error { keyword: $keyword, value: text.to_owned() }
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

macro_rules! called_exactly {
    ($($name:ident),+) => { $(
        impl $name {
            fn is_called(self, text: &str) -> bool {
                self.as_str() == text
            }
        }
    )+ };
}

closed_list! {
    /// Which servers will do.
    TargetSessionAttrs, "target_session_attrs", InvalidValue,
    {
        /// Any that answers.
        Any = "any",
        /// Sessions must be read-write by default: not in recovery, `default_transaction_read_only` off.
        ReadWrite = "read-write",
        /// Sessions must not be read-write by default.
        ReadOnly = "read-only",
        /// Not in recovery.
        Primary = "primary",
        /// In recovery.
        Standby = "standby",
        /// In recovery; if there is none in the list, any.
        PreferStandby = "prefer-standby",
    }
}

closed_list! {
    /// In which order hosts and their addresses are tried.
    LoadBalanceHosts, "load_balance_hosts", InvalidValue,
    {
        /// As given.
        Disable = "disable",
        /// At random.
        Random = "random",
    }
}

closed_list! {
    /// How much TLS is asked for, from least to most.
    SslMode, "sslmode", InvalidValue,
    {
        /// Never.
        Disable = "disable",
        /// Only if plain text is refused.
        Allow = "allow",
        /// If the server can.
        Prefer = "prefer",
        /// Always, with anybody (or with a certificate that `sslrootcert` vouches for, if that is given).
        Require = "require",
        /// With a certificate that is vouched for.
        VerifyCa = "verify-ca",
        /// And that names the host.
        VerifyFull = "verify-full",
    }
}

closed_list! {
    /// How TLS begins.
    SslNegotiation, "sslnegotiation", InvalidValue,
    {
        /// By asking in PostgreSQL's protocol.
        Postgres = "postgres",
        /// At once (from PostgreSQL 17).
        Direct = "direct",
    }
}

closed_list! {
    /// Whether a client certificate is sent.
    SslCertMode, "sslcertmode", InvalidValue,
    {
        /// Never.
        Disable = "disable",
        /// If there is one and the server asks.
        Allow = "allow",
        /// The server must ask.
        Require = "require",
    }
}

closed_list! {
    /// Whether SCRAM is bound to the TLS channel.
    ChannelBinding, "channel_binding", InvalidValue,
    {
        /// Never.
        Disable = "disable",
        /// If the server can.
        Prefer = "prefer",
        /// Always.
        Require = "require",
    }
}

closed_list! {
    /// Encryption by GSSAPI, which this program has not: all it can do is not to ask.
    GssEncMode, "gssencmode", InvalidValue,
    {
        /// Never.
        Disable = "disable",
        /// If there are credentials; we have none.
        Prefer = "prefer",
        /// Refused.
        Require = "require",
    }
}

closed_list! {
    /// A version of TLS. The older ones can be named, as in libpq, but no version below 1.2 will be spoken.
    TlsVersion, "ssl_min_protocol_version", InvalidTlsVersion,
    {
        /// 1.0.
        V1_0 = "TLSv1",
        /// 1.1.
        V1_1 = "TLSv1.1",
        /// 1.2.
        V1_2 = "TLSv1.2",
        /// 1.3.
        V1_3 = "TLSv1.3",
    }
}

called_exactly!(
    TargetSessionAttrs,
    LoadBalanceHosts,
    SslMode,
    SslNegotiation,
    SslCertMode,
    ChannelBinding,
    GssEncMode
);

impl TlsVersion {
    fn is_called(self, text: &str) -> bool {
        self.as_str().eq_ignore_ascii_case(text)
    }
}

impl SslMode {
    /// Whether plain text is out of the question.
    pub fn is_tls_required(self) -> bool {
        self >= Self::Require
    }
}

/// A version of PostgreSQL's protocol. (3.1 never was.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProtocolVersion {
    /// Since PostgreSQL 7.4.
    V3_0,
    /// Since PostgreSQL 18.
    V3_2,
}

impl ProtocolVersion {
    /// What `latest` stands for.
    pub const LATEST: Self = Self::V3_2;

    /// Reads a value of `min_protocol_version` or `max_protocol_version`.
    pub(crate) fn parse(keyword: &'static str, text: &str) -> Result<Self, ConninfoError> {
        match text {
            "latest" => Ok(Self::LATEST),
            "3.0" => Ok(Self::V3_0),
            "3.2" => Ok(Self::V3_2),
            other => Err(ConninfoError::InvalidValue { keyword, value: other.to_owned() }),
        }
    }
}
