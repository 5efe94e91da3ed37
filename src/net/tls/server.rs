//! TLS as a server, as PostgreSQL offers it.
//!
//! Owns the certificate that clients see and the roots of theirs, both replaced while the relay runs: each connection keeps
//! what it began with. A client's certificate is asked for when there are roots, and must be right if it is shown; whether
//! one is needed is for the rules about clients to say. TLS 1.2 is the least.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, UnixTime},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::config;
use crate::conninfo::{FileIdentity, Surroundings};
use crate::net::TlsFacts;
use crate::net::tls::{
    ALPN, TlsError,
    certificate::{Parsed, end_point_binding},
    files, own_key, provider,
    subject::Subject,
    trust::{Role, TlsSignature, Trust, verify_handshake},
};
use crate::protocol::scram::ChannelBinding;

/// What a listener needs for TLS; shared by all its connections.
#[derive(Debug)]
pub struct ServerTls {
    settings: config::Tls,
    current: ArcSwap<Loaded>,
}

/// The files as they were read at one time.
#[derive(Debug)]
struct Loaded {
    config: Arc<ServerConfig>,
    binding: ChannelBinding,
    /// Last second of the certificate's validity, since 1970.
    expires_at: u64,
    /// All that was read, to see whether it has changed.
    content: Mutex<Content>,
}

/// What was read again.
#[derive(Debug)]
pub struct Renewed {
    loaded: Loaded,
    changes: Changes,
}

/// What stood in the files.
#[derive(Clone, Debug, Default)]
struct Content(Vec<Entry>);

/// What stood in one of them.
#[derive(Clone, Debug)]
struct Entry {
    path: PathBuf,
    /// As long as this holds the file is not read.
    identity: Option<FileIdentity>,
    fingerprint: [u8; 32],
}

/// The files that are not as they were when what holds was read, each with what is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes(Vec<(PathBuf, [u8; 32])>);

/// How a client began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsStart {
    /// By asking in PostgreSQL's protocol.
    Requested,
    /// At once; then the client must name PostgreSQL's protocol.
    Direct,
}

impl ServerTls {
    /// Reads the files.
    pub fn read(settings: &config::Tls, surroundings: &dyn Surroundings) -> Result<Self, TlsError> {
        let current = ArcSwap::from_pointee(Loaded::read(settings, surroundings)?);
        Ok(Self { settings: settings.clone(), current })
    }

    /// Reads the files again, and changes nothing; `None`: they are as before.
    pub fn read_again(&self, surroundings: &dyn Surroundings) -> Result<Option<Renewed>, TlsError> {
        let changes = self.changes(surroundings);
        if changes.is_empty() {
            return Ok(None);
        }
        Ok(Some(Renewed { loaded: Loaded::read(&self.settings, surroundings)?, changes }))
    }

    /// The files that are not as before.
    pub fn changes(&self, surroundings: &dyn Surroundings) -> Changes {
        let current = self.current.load();
        let mut known = current.content.lock();
        let found = Content::of(&self.settings, surroundings, &known);
        let changes = found.without(&known);
        if changes.is_empty() {
            // The same in other files, which are not read again either.
            *known = found;
        }
        changes
    }

    /// New connections begin with what was read.
    pub fn replace(&self, renewed: Renewed) {
        self.current.store(Arc::new(renewed.loaded));
    }

    /// Last second of the certificate's validity, since 1970.
    pub fn expires_at(&self) -> u64 {
        self.current.load().expires_at
    }

    /// Goes through the handshake; the caller bounds the time.
    pub async fn accept<S>(&self, stream: S, start: TlsStart) -> Result<(TlsStream<S>, TlsFacts), TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let loaded = self.current.load_full();
        let acceptor = TlsAcceptor::from(Arc::clone(&loaded.config));
        let accepted = acceptor.accept(stream).await.map_err(TlsError::of_handshake)?;
        let (_, session) = accepted.get_ref();
        if start == TlsStart::Direct && session.alpn_protocol() != Some(ALPN) {
            return Err(TlsError::NoAlpn);
        }
        let shown = session.peer_certificates().and_then(|chain| chain.first());
        let client_certificate = match shown {
            Some(leaf) => {
                let subject = Subject::of(leaf).ok_or(TlsError::UnreadableClientCertificate)?;
                Some(subject.client().ok_or(TlsError::EmbeddedNul)?)
            }
            None => None,
        };
        Ok((accepted, TlsFacts { client_certificate, binding: loaded.binding.clone() }))
    }
}

impl Loaded {
    fn read(settings: &config::Tls, surroundings: &dyn Surroundings) -> Result<Self, TlsError> {
        let provider = provider();
        let content = Mutex::new(Content::of(settings, surroundings, &Content::default()));
        let chain = files::certificates(surroundings, "server certificate file", &settings.cert)?;
        let key = files::private_key(surroundings, &settings.key, None)?;
        let leaf = chain.first().cloned().ok_or(TlsError::NoServerCertificate)?;
        let own = own_key(chain, &key, &settings.key)?;
        let versions: &[_] = match settings.min_version {
            config::TlsVersion::V1_3 => &[&TLS13],
            config::TlsVersion::V1_2 => &[&TLS12, &TLS13],
        };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
        let builder = builder.with_protocol_versions(versions).map_err(TlsError::Library)?;
        let builder = match &settings.client_ca {
            Some(path) => {
                let verifier =
                    ClientVerifier::read(path, settings.client_crl.as_deref(), surroundings, provider)?;
                builder.with_client_cert_verifier(Arc::new(verifier))
            }
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(Arc::new(Fixed(Arc::new(own))));
        config.alpn_protocols = vec![ALPN.to_vec()];
        // As PostgreSQL: sessions last so long that taking one up again is worth nothing.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let expires_at = Parsed::of(&leaf).map_or(0, |parsed| parsed.expires_at());
        Ok(Self { config: Arc::new(config), binding: end_point_binding(&leaf), expires_at, content })
    }
}

impl Content {
    /// Reads the files, but for those that are as they are known.
    fn of(settings: &config::Tls, surroundings: &dyn Surroundings, known: &Self) -> Self {
        let optional = settings.client_ca.iter().chain(&settings.client_crl);
        let paths = [&settings.cert, &settings.key].into_iter().chain(optional);
        let look = |path: &PathBuf| {
            // Before the file is read: what is changed meanwhile is seen the next time.
            let identity = surroundings.identity(path);
            let same = known.0.iter().find(|entry| entry.path == *path && entry.identity == identity);
            let fingerprint = match same.filter(|_| identity.is_some()) {
                Some(entry) => entry.fingerprint,
                None => files::fingerprint(surroundings, path),
            };
            Entry { path: path.clone(), identity, fingerprint }
        };
        Self(paths.map(look).collect())
    }

    /// What is not as it was before.
    fn without(&self, before: &Self) -> Changes {
        let is_new = |entry: &&Entry| {
            !before.0.iter().any(|known| known.path == entry.path && known.fingerprint == entry.fingerprint)
        };
        let changed = self.0.iter().filter(is_new);
        changed.map(|entry| (entry.path.clone(), entry.fingerprint)).collect()
    }
}

impl Changes {
    /// Whether all is as before.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of the files is among others, with the same in it.
    pub fn has_one_of(&self, others: &Self) -> bool {
        self.0.iter().any(|file| others.0.contains(file))
    }
}

impl FromIterator<(PathBuf, [u8; 32])> for Changes {
    fn from_iter<I: IntoIterator<Item = (PathBuf, [u8; 32])>>(files: I) -> Self {
        Self(files.into_iter().collect())
    }
}

impl Renewed {
    /// What is new in it.
    pub fn changes(&self) -> &Changes {
        &self.changes
    }
}

/// One certificate for whoever asks.
#[derive(Debug)]
struct Fixed(Arc<CertifiedKey>);

impl ResolvesServerCert for Fixed {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

/// Checks certificates of clients that show one.
#[derive(Debug)]
struct ClientVerifier {
    trust: Trust,
    /// The roots' names, which the client is told.
    hints: Vec<DistinguishedName>,
    provider: Arc<CryptoProvider>,
}

impl ClientVerifier {
    fn read(
        roots: &Path,
        revocations: Option<&Path>,
        surroundings: &dyn Surroundings,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, TlsError> {
        let roots = files::certificates(surroundings, "root certificate file", roots)?;
        let revocations = match revocations {
            Some(path) => files::revocations(surroundings, path)?,
            None => Vec::new(),
        };
        let mut store = rustls::RootCertStore::empty();
        store.add_parsable_certificates(roots.iter().cloned());
        Ok(Self { trust: Trust::new(&roots, revocations, &provider)?, hints: store.subjects(), provider })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.trust.check(Role::Client, end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
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
