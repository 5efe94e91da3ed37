//! TLS on both sides, with rustls.
//!
//! Owns certificates, keys, the roots that vouch for others', and the two handshakes. As a client it has libpq's meaning of
//! each setting, as a server PostgreSQL's. Knows no message of PostgreSQL's protocol: when TLS begins, and whether, is
//! decided above.
//!
//! ```text
//!  files ──▶ trust ──▶ client   (peer_name: whether it is who was meant)
//!    └────────┴──────▶ server   (subject: whom a client's certificate names; certificate: what SCRAM is bound to)
//! ```

mod certificate;
mod client;
mod der;
mod files;
mod fuzz;
mod peer_name;
mod server;
mod short_names;
mod subject;
#[cfg(test)]
mod tests;
mod trust;

use std::{io, path::PathBuf, sync::Arc};

use rustls::{
    AlertDescription, Error,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::CertificateDer,
    sign::CertifiedKey,
};
use x509_cert::der::Encode;

pub use client::{ClientTls, ServerTlsFacts};
pub use files::TlsFileError;
pub use fuzz::fuzz_certificate;
pub use server::{Changes, Renewed, ServerTls, TlsStart};
pub use trust::UnusableTrust;

use crate::net::tls::certificate::Parsed;

/// TLS could not be set up, or a handshake failed. The texts are libpq's where it has one.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be used.
    #[error(transparent)]
    File(#[from] TlsFileError),
    /// Roots or revocations cannot be used.
    #[error(transparent)]
    Trust(#[from] UnusableTrust),
    /// Certificates are to be checked, and there is nothing to check them with.
    #[error(
        "root certificate file \"{}\" does not exist; either provide the file, use the system's trusted roots with \
         sslrootcert=system, or change sslmode to disable server certificate verification",
        .0.display()
    )]
    NoRoots(PathBuf),
    /// The same, and it is not known where it would be.
    #[error(
        "could not get home directory to locate root certificate file; either provide the file, use the system's trusted \
         roots with sslrootcert=system, or change sslmode to disable server certificate verification"
    )]
    NoHome,
    /// The system has no roots.
    #[error("could not load system root certificate paths")]
    NoSystemRoots,
    /// Only versions that are not spoken here are allowed.
    #[error("SSL protocol versions up to \"{0}\" are not supported: TLSv1.2 is the least")]
    OldVersion(&'static str),
    /// The other end, or its certificate, is not to be trusted, or it broke the protocol.
    #[error("SSL error: {0}")]
    Handshake(Error),
    /// The connection ended within the handshake.
    #[error("SSL SYSCALL error")]
    Io(#[source] io::Error),
    /// The library refused its settings.
    #[error("could not create SSL context")]
    Library(#[source] Error),
    /// A server without a certificate.
    #[error("SSL error: the server has shown no certificate")]
    NoServerCertificate,
    /// Another server than the one that was asked for.
    #[error("server certificate for \"{first}\"{} does not match host name \"{host}\"", others_text(*.others))]
    WrongHost {
        /// The one that was asked for.
        host: String,
        /// The first name in the certificate.
        first: String,
        /// How many more names it has.
        others: usize,
    },
    /// The certificate names nobody.
    #[error("could not get server's host name from server certificate")]
    NoNameInCertificate,
    /// A name with a zero byte in it.
    #[error("SSL certificate's name contains embedded null")]
    EmbeddedNul,
    /// There is no name to compare with.
    #[error("host name must be specified for a verified SSL connection")]
    NoHostName,
    /// A direct connection for another protocol, or for none.
    #[error("received direct SSL connection request without ALPN protocol negotiation extension")]
    NoAlpn,
    /// A client's certificate was accepted, and cannot be read.
    #[error("SSL error: the client's certificate cannot be read")]
    UnreadableClientCertificate,
}

impl TlsError {
    /// What a failed handshake, or a failed read or write after it, came from.
    pub fn of_handshake(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(tls) => Self::Handshake(tls.clone()),
            None => Self::Io(error),
        }
    }
}

impl TlsError {
    /// Whether the next attempt will most likely fail in the same way: something is not as the settings have it. What only
    /// broke off, or arrived spoiled, passes.
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::Io(_) => false,
            Self::Handshake(error) => matches!(
                error,
                Error::InvalidCertificate(_)
                    | Error::InvalidCertRevocationList(_)
                    | Error::PeerIncompatible(_)
                    | Error::NoCertificatesPresented
                    | Error::NoApplicationProtocol
                    | Error::AlertReceived(
                        AlertDescription::HandshakeFailure
                            | AlertDescription::BadCertificate
                            | AlertDescription::UnsupportedCertificate
                            | AlertDescription::CertificateRevoked
                            | AlertDescription::CertificateExpired
                            | AlertDescription::CertificateUnknown
                            | AlertDescription::CertificateRequired
                            | AlertDescription::UnknownCA
                            | AlertDescription::AccessDenied
                            | AlertDescription::ProtocolVersion
                            | AlertDescription::InsufficientSecurity
                            | AlertDescription::NoApplicationProtocol
                    )
            ),
            _ => true,
        }
    }
}

fn others_text(others: usize) -> String {
    match others {
        0 => String::new(),
        1 => " (and 1 other name)".to_owned(),
        _ => format!(" (and {others} other names)"),
    }
}

/// The one set of algorithms of this program.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// A certificate with its key, which must belong together.
fn own_key(
    chain: Vec<CertificateDer<'static>>,
    key: &files::PrivateKey,
    key_path: &std::path::Path,
) -> Result<CertifiedKey, TlsError> {
    let invalid = |error: Error| TlsFileError::Invalid {
        what: "private key file",
        path: key_path.to_owned(),
        detail: error.to_string(),
    };
    let key = aws_lc_rs::sign::any_supported_type(&key.as_der()).map_err(invalid)?;
    // Compared here, because the library does not read certificates of the first version.
    let leaf = chain.first().and_then(|leaf| Parsed::of(leaf));
    let in_certificate =
        leaf.and_then(|leaf| leaf.certificate.tbs_certificate().subject_public_key_info().to_der().ok());
    let of_key = key.public_key().map(|key| key.to_vec());
    if of_key.is_some() && of_key != in_certificate {
        return Err(TlsFileError::OtherKey(key_path.to_owned()).into());
    }
    Ok(CertifiedKey::new(chain, key))
}

/// PostgreSQL's name in the handshake (since 17).
const ALPN: &[u8] = b"postgresql";
