//! TLS for clients: where certificates and keys are, and which versions are spoken.
//!
//! Owns the form of `downstream.tls`. Reads none of the files it names.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::error::Problem;

/// `tls`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Our certificate and those that lead from it to an authority, in PEM.
    pub cert: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
    /// Certificates of the authorities that sign clients' certificates; `None`: clients are not asked for one.
    pub client_ca: Option<PathBuf>,
    /// What these authorities have revoked.
    pub client_crl: Option<PathBuf>,
    /// The oldest version that is spoken.
    pub min_version: TlsVersion,
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// `TLSv1.2`
    V1_2,
    /// `TLSv1.3`
    V1_3,
}

/// As it is written.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RawTls {
    pub(crate) cert: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) client_ca: Option<String>,
    pub(crate) client_crl: Option<String>,
    pub(crate) min_version: String,
}

impl Default for RawTls {
    fn default() -> Self {
        Self { cert: None, key: None, client_ca: None, client_crl: None, min_version: "TLSv1.2".to_owned() }
    }
}

impl RawTls {
    /// Paths are relative to `directory`.
    pub(crate) fn check(&self, directory: &Path) -> Result<Tls, Problem> {
        let file = |name: &Option<String>| name.as_ref().map(|name| directory.join(name));
        let required = |name, key| {
            let example = "tls = { cert = \"server.crt\", key = \"server.key\" }";
            file(name).ok_or(Problem::Missing { key, example })
        };
        if self.client_crl.is_some() && self.client_ca.is_none() {
            let example = "tls = { ..., client_ca = \"ca.crt\", client_crl = \"ca.crl\" }";
            return Err(Problem::Missing { key: "downstream.tls.client_ca", example });
        }
        let min_version = match self.min_version.as_str() {
            "TLSv1.2" => TlsVersion::V1_2,
            "TLSv1.3" => TlsVersion::V1_3,
            other => {
                let advice = "expected \"TLSv1.2\" or \"TLSv1.3\"";
                return Err(Problem::invalid("downstream.tls.min_version", other, advice));
            }
        };
        Ok(Tls {
            cert: required(&self.cert, "downstream.tls.cert")?,
            key: required(&self.key, "downstream.tls.key")?,
            client_ca: file(&self.client_ca),
            client_crl: file(&self.client_crl),
            min_version,
        })
    }
}
