//! libpq's keywords: name, environment variable, built-in default, and what must not be shown.
//!
//! The table is `PQconninfoOptions[]` of libpq 18 (`fe-connect.c`), in its order, and the two keywords that 19 adds, so
//! that a string written for any version is understood.

/// One keyword of a connection string.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keyword {
    pub(crate) name: &'static str,
    /// Environment variable that gives the value when neither string nor service file does.
    pub(crate) variable: Option<&'static str>,
    /// Value when nobody gives one.
    pub(crate) default: Option<&'static str>,
    pub(crate) visibility: Visibility,
}

/// Whether the value of a keyword may be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Visibility {
    Shown,
    Secret,
}

impl Keyword {
    const fn new(name: &'static str, variable: Option<&'static str>, default: Option<&'static str>) -> Self {
        Self { name, variable, default, visibility: Visibility::Shown }
    }

    const fn secret(name: &'static str, variable: Option<&'static str>) -> Self {
        Self { name, variable, default: None, visibility: Visibility::Secret }
    }

    /// The keyword of this name, if libpq has it.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        KEYWORDS.iter().find(|keyword| keyword.name == name)
    }

    /// Whether its value must never be shown.
    pub(crate) fn is_secret(&self) -> bool {
        self.visibility == Visibility::Secret
    }
}

/// Every keyword, in libpq's order.
pub(crate) const KEYWORDS: &[Keyword] = &[
    Keyword::new("service", Some("PGSERVICE"), None),
    Keyword::new("servicefile", Some("PGSERVICEFILE"), None),
    Keyword::new("user", Some("PGUSER"), None),
    Keyword::secret("password", Some("PGPASSWORD")),
    Keyword::new("passfile", Some("PGPASSFILE"), None),
    Keyword::new("channel_binding", Some("PGCHANNELBINDING"), Some("prefer")),
    Keyword::new("connect_timeout", Some("PGCONNECT_TIMEOUT"), None),
    Keyword::new("dbname", Some("PGDATABASE"), None),
    Keyword::new("host", Some("PGHOST"), None),
    Keyword::new("hostaddr", Some("PGHOSTADDR"), None),
    Keyword::new("port", Some("PGPORT"), Some("5432")),
    Keyword::new("client_encoding", Some("PGCLIENTENCODING"), None),
    Keyword::new("options", Some("PGOPTIONS"), Some("")),
    Keyword::new("application_name", Some("PGAPPNAME"), None),
    Keyword::new("fallback_application_name", None, None),
    Keyword::new("keepalives", None, None),
    Keyword::new("keepalives_idle", None, None),
    Keyword::new("keepalives_interval", None, None),
    Keyword::new("keepalives_count", None, None),
    Keyword::new("tcp_user_timeout", None, None),
    Keyword::new("sslmode", Some("PGSSLMODE"), Some("prefer")),
    Keyword::new("sslnegotiation", Some("PGSSLNEGOTIATION"), Some("postgres")),
    Keyword::new("sslcompression", Some("PGSSLCOMPRESSION"), Some("0")),
    Keyword::new("sslcert", Some("PGSSLCERT"), None),
    Keyword::new("sslkey", Some("PGSSLKEY"), None),
    Keyword::new("sslcertmode", Some("PGSSLCERTMODE"), None),
    Keyword::secret("sslpassword", None),
    Keyword::new("sslrootcert", Some("PGSSLROOTCERT"), None),
    Keyword::new("sslcrl", Some("PGSSLCRL"), None),
    Keyword::new("sslcrldir", Some("PGSSLCRLDIR"), None),
    Keyword::new("sslsni", Some("PGSSLSNI"), Some("1")),
    Keyword::new("requirepeer", Some("PGREQUIREPEER"), None),
    Keyword::new("require_auth", Some("PGREQUIREAUTH"), None),
    Keyword::new("min_protocol_version", Some("PGMINPROTOCOLVERSION"), None),
    Keyword::new("max_protocol_version", Some("PGMAXPROTOCOLVERSION"), None),
    Keyword::new("ssl_min_protocol_version", Some("PGSSLMINPROTOCOLVERSION"), Some("TLSv1.2")),
    Keyword::new("ssl_max_protocol_version", Some("PGSSLMAXPROTOCOLVERSION"), None),
    // libpq's own default depends on how it was built; without GSSAPI it is this one.
    Keyword::new("gssencmode", Some("PGGSSENCMODE"), Some("disable")),
    Keyword::new("krbsrvname", Some("PGKRBSRVNAME"), Some("postgres")),
    Keyword::new("gsslib", Some("PGGSSLIB"), None),
    Keyword::new("gssdelegation", Some("PGGSSDELEGATION"), Some("0")),
    Keyword::new("replication", None, None),
    // libpq's own default is any; whether somebody has said so makes a difference here.
    Keyword::new("target_session_attrs", Some("PGTARGETSESSIONATTRS"), None),
    Keyword::new("load_balance_hosts", Some("PGLOADBALANCEHOSTS"), Some("disable")),
    Keyword::secret("scram_client_key", None),
    Keyword::secret("scram_server_key", None),
    Keyword::new("oauth_issuer", None, None),
    Keyword::new("oauth_client_id", None, None),
    Keyword::secret("oauth_client_secret", None),
    Keyword::new("oauth_scope", None, None),
    Keyword::new("oauth_ca_file", Some("PGOAUTHCAFILE"), None),
    Keyword::new("sslkeylogfile", None, None),
];
