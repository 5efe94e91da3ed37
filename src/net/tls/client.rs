//! TLS as a client, by libpq's rules.
//!
//! Owns what a connection string says of TLS turned into a handshake: roots, revocations, our own certificate, versions, the
//! name that is sent and the one that is compared. Whether TLS is tried at all, and what happens when it fails, is the
//! caller's. Everything is read from its files anew for each connection, as libpq does.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme, SupportedProtocolVersion,
    client::{
        ResolvesClientCert,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::conninfo::{SslCertMode, SslMode, SslSettings, Surroundings, TlsVersion, home_directory};
use crate::net::tls::{
    ALPN, TlsError, UnusableTrust,
    certificate::{Parsed, end_point_binding},
    files::{self, TlsFileError},
    own_key,
    peer_name::{NameCheck, check_name},
    provider,
    trust::{Role, TlsSignature, Trust, verify_handshake},
};
use crate::protocol::scram::ChannelBinding;

/// What one connection needs for TLS.
pub struct ClientTls {
    pub(super) config: Arc<ClientConfig>,
    /// The host as it was given, for its name in the certificate.
    host: String,
    checks_name: bool,
    /// The roots limit whom their certificates may name.
    names_are_constrained: bool,
    own: Arc<OwnCertificate>,
}

/// What was found out about a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTlsFacts {
    /// What SCRAM can be bound to.
    pub binding: ChannelBinding,
    /// Whether the server asked for our certificate.
    pub certificate_requested: bool,
    /// Whether it got one.
    pub certificate_sent: bool,
    /// Whether it chose PostgreSQL's protocol, which a direct connection must.
    pub has_alpn: bool,
}

impl ClientTls {
    /// Reads all that `ssl` names. `host` is the name, or the address in text, that the connection string
    /// gives as `host`; empty: it gives none.
    pub fn read(ssl: &SslSettings, host: &str, surroundings: &dyn Surroundings) -> Result<Self, TlsError> {
        let provider = provider();
        let home = home_directory(surroundings).map(|home| home.join(".postgresql"));
        let trust = trust(ssl, home.as_deref(), surroundings, &provider)?;
        let key = own_certificate(ssl, home.as_deref(), surroundings)?;
        let own = Arc::new(OwnCertificate {
            key,
            was_requested: AtomicBool::new(false),
            was_sent: AtomicBool::new(false),
        });
        let names_are_constrained = trust.as_ref().is_some_and(Trust::constrains_names);
        let verifier = Verifier { trust, provider: Arc::clone(&provider) };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions(ssl)?)
            .map_err(TlsError::Library)?;
        let mut config = builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::clone(&own) as Arc<dyn ResolvesClientCert>);
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A name that no certificate can have, such as one with a dot at its end, is not sent.
        config.enable_sni = ssl.sni && ServerName::try_from(host).is_ok();
        Ok(Self {
            config: Arc::new(config),
            host: host.to_owned(),
            checks_name: ssl.mode == SslMode::VerifyFull,
            names_are_constrained,
            own,
        })
    }

    /// Goes through the handshake; the caller bounds the time.
    pub async fn connect<S>(&self, stream: S) -> Result<(TlsStream<S>, ServerTlsFacts), TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let connector = TlsConnector::from(Arc::clone(&self.config));
        let connected =
            connector.connect(self.server_name()?, stream).await.map_err(TlsError::of_handshake)?;
        let (_, session) = connected.get_ref();
        let chain = session.peer_certificates().unwrap_or_default();
        let (leaf, between) = chain.split_first().ok_or(TlsError::NoServerCertificate)?;
        if self.checks_name {
            self.check_name(leaf, between)?;
        }
        let facts = ServerTlsFacts {
            binding: end_point_binding(leaf),
            certificate_requested: self.own.was_requested.load(Relaxed),
            certificate_sent: self.own.was_sent.load(Relaxed),
            has_alpn: session.alpn_protocol() == Some(ALPN),
        };
        Ok((connected, facts))
    }

    /// What is sent as the server's name, unless it is an address.
    fn server_name(&self) -> Result<ServerName<'static>, TlsError> {
        let name = ServerName::try_from(self.host.clone());
        name.or_else(|_| ServerName::try_from(UNNAMED)).map_err(|_| TlsError::NoServerCertificate)
    }

    fn check_name(&self, leaf: &CertificateDer<'_>, between: &[CertificateDer<'_>]) -> Result<(), TlsError> {
        if self.host.is_empty() {
            return Err(TlsError::NoHostName);
        }
        let mut names = Parsed::of(leaf).map(|parsed| parsed.names()).unwrap_or_default();
        let constrains = |certificate: &CertificateDer<'_>| {
            Parsed::of(certificate).is_none_or(|parsed| parsed.constrains_names())
        };
        if self.names_are_constrained || between.iter().any(constrains) {
            // The library holds only alternative names to these limits.
            names.common_name = None;
        }
        match check_name(&names, &self.host) {
            NameCheck::Named => Ok(()),
            NameCheck::Other { first, names } => {
                Err(TlsError::WrongHost { host: self.host.clone(), first, others: names.saturating_sub(1) })
            }
            NameCheck::NoName => Err(TlsError::NoNameInCertificate),
            NameCheck::EmbeddedNul => Err(TlsError::EmbeddedNul),
        }
    }
}

/// The roots; `None`: whoever answers is believed, as libpq does without a root file.
fn trust(
    ssl: &SslSettings,
    home: Option<&Path>,
    surroundings: &dyn Surroundings,
    provider: &Arc<CryptoProvider>,
) -> Result<Option<Trust>, TlsError> {
    let roots = if ssl.root_cert.as_deref() == Some("system") {
        system_roots()?
    } else {
        let path =
            ssl.root_cert.as_ref().map(PathBuf::from).or_else(|| home.map(|home| home.join("root.crt")));
        match path.map(|path| (root_certificates(surroundings, &path), path)) {
            Some((Ok(roots), _)) => roots,
            Some((Err(TlsFileError::Read { source, .. }), path)) if is_absent(&source) => {
                if ssl.mode >= SslMode::VerifyCa {
                    return Err(TlsError::NoRoots(path));
                }
                return Ok(None);
            }
            Some((Err(error), _)) => return Err(error.into()),
            None if ssl.mode >= SslMode::VerifyCa => return Err(TlsError::NoHome),
            None => return Ok(None),
        }
    };
    let mut revocations = Vec::new();
    let is_default = ssl.crl.is_none() && ssl.crl_directory.is_none();
    let default = home.filter(|_| is_default).map(|home| home.join("root.crl"));
    if let Some(path) = ssl.crl.clone().or(default) {
        match files::revocations(surroundings, &path) {
            Ok(lists) => revocations = lists,
            // As libpq: one that is not there revokes nothing.
            Err(TlsFileError::Read { source, .. }) if is_absent(&source) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if let Some(directory) = &ssl.crl_directory {
        let before = revocations.len();
        for path in surroundings.list(directory) {
            // Other files may lie there, too.
            revocations.extend(files::revocations(surroundings, &path).unwrap_or_default());
        }
        if revocations.len() == before {
            let text = format!("no certificate revocation list in directory \"{}\"", directory.display());
            return Err(UnusableTrust(text).into());
        }
    }
    Ok(Some(Trust::new(&roots, revocations, provider)?))
}

fn root_certificates(
    surroundings: &dyn Surroundings,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
    files::certificates(surroundings, "root certificate file", path)
}

fn system_roots() -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        return Err(TlsError::NoSystemRoots);
    }
    Ok(found.certs)
}

/// Our certificate; one that is not there is not sent.
fn own_certificate(
    ssl: &SslSettings,
    home: Option<&Path>,
    surroundings: &dyn Surroundings,
) -> Result<Option<Arc<CertifiedKey>>, TlsError> {
    let in_home = |name: &str| home.map(|home| home.join(name));
    let path = ssl.cert.clone().or_else(|| in_home("postgresql.crt"));
    let Some(path) = path.filter(|_| ssl.cert_mode != SslCertMode::Disable) else { return Ok(None) };
    let chain = match files::certificates(surroundings, "certificate file", &path) {
        Ok(chain) => chain,
        Err(TlsFileError::Read { source, .. }) if is_absent(&source) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let path = ssl.key.clone().or_else(|| in_home("postgresql.key")).ok_or(TlsError::NoHome)?;
    let key = match files::private_key(surroundings, &path, ssl.key_password.as_ref()) {
        Ok(key) => key,
        Err(TlsFileError::Read { source, .. }) if is_absent(&source) => {
            return Err(TlsFileError::NoKey(path).into());
        }
        Err(error) => return Err(error.into()),
    };
    Ok(Some(Arc::new(own_key(chain, &key, &path)?)))
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

/// The versions that may be spoken; below 1.2 there are none.
fn versions(ssl: &SslSettings) -> Result<Vec<&'static SupportedProtocolVersion>, TlsError> {
    let (min, max) =
        (ssl.min_version.unwrap_or(TlsVersion::V1_2), ssl.max_version.unwrap_or(TlsVersion::V1_3));
    let known = [(TlsVersion::V1_2, &TLS12), (TlsVersion::V1_3, &TLS13)];
    let versions: Vec<_> = known.into_iter().filter(|(version, _)| (min..=max).contains(version)).collect();
    if versions.is_empty() {
        return Err(TlsError::OldVersion(max.as_str()));
    }
    Ok(versions.into_iter().map(|(_, version)| version).collect())
}

/// Checks the server's certificate as far as there are roots; names are compared after the handshake, as libpq does.
#[derive(Debug)]
struct Verifier {
    trust: Option<Trust>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(trust) = &self.trust {
            trust.check(Role::Server, end_entity, intermediates, now)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_handshake(TlsSignature::V1_2, message, certificate, signed, &self.provider)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_handshake(TlsSignature::V1_3, message, certificate, signed, &self.provider)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Our certificate, and whether the server wanted it.
#[derive(Debug)]
struct OwnCertificate {
    key: Option<Arc<CertifiedKey>>,
    was_requested: AtomicBool,
    was_sent: AtomicBool,
}

impl ResolvesClientCert for OwnCertificate {
    fn resolve(&self, _root_hints: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.was_requested.store(true, Relaxed);
        let key = self.key.clone().filter(|key| key.key.choose_scheme(schemes).is_some());
        self.was_sent.store(key.is_some(), Relaxed);
        key
    }

    fn has_certs(&self) -> bool {
        // Also without one it is to be known that the server asked.
        true
    }
}

/// Sent nowhere: it stands where the library wants a name.
const UNNAMED: &str = "name.invalid";
