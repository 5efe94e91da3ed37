//! `downstream.tls`: the files with which clients are served over TLS.

use std::path::PathBuf;

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
