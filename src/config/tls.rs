//! `downstream.tls`: the files with which clients are served over TLS.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::error::Problem;
use crate::conninfo::TlsVersion;

/// Where the server's certificate is, and by whom clients' are vouched for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The certificate, with those between it and its root.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Roots of clients' certificates; `None`: none is asked for.
    pub client_ca: Option<PathBuf>,
    /// Clients' certificates that were revoked.
    pub client_crl: Option<PathBuf>,
    /// The least version.
    pub min_version: TlsVersion,
}

/// `downstream.tls` as it is written.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawTls {
    pub(crate) cert: String,
    pub(crate) key: String,
    pub(crate) client_ca: Option<String>,
    pub(crate) client_crl: Option<String>,
    pub(crate) min_version: Option<String>,
}

/// Checks all but the files, which are read when they are needed.
pub(crate) fn tls(raw: &RawTls, directory: &Path) -> Result<Tls, Problem> {
    const MIN_VERSION: &str = "downstream.tls.min_version";
    if raw.client_crl.is_some() && raw.client_ca.is_none() {
        return Err(Problem::Missing {
            key: "downstream.tls.client_ca",
            example: "tls = { cert = \"server.crt\", key = \"server.key\", client_ca = \"ca.crt\", client_crl = \"ca.crl\" }",
        });
    }
    let path = |name: &String| directory.join(name);
    let min_version = match raw.min_version.as_deref() {
        None => TlsVersion::V1_2,
        Some(text) => TlsVersion::parse(text)
            .ok()
            .filter(|version| *version >= TlsVersion::V1_2)
            .ok_or_else(|| Problem::invalid(MIN_VERSION, text, "expected \"TLSv1.2\" or \"TLSv1.3\""))?,
    };
    Ok(Tls {
        cert: path(&raw.cert),
        key: path(&raw.key),
        client_ca: raw.client_ca.as_ref().map(path),
        client_crl: raw.client_crl.as_ref().map(path),
        min_version,
    })
}
