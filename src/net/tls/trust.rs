//! Whom a certificate is believed by: roots, and revocations.
//!
//! Owns the check of a chain, for servers and for clients. It is webpki's, and beside it the two shapes that OpenSSL, and so
//! libpq and PostgreSQL, accept and webpki does not: a self-signed certificate that is in the root file itself, and one of the
//! first version (`openssl x509 -req` made such for long), or an authority's own, that a root has signed directly. Never
//! looks at names.

use std::{cmp::Reverse, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use x509_cert::{crl::CertificateList, der::Decode, spki::SubjectPublicKeyInfoOwned};

use crate::net::tls::certificate::{
    CLIENT_PURPOSE, Parsed, SERVER_PURPOSE, algorithm_content, first_element,
};

/// Roots and revocations, ready to check with.
#[derive(Debug)]
pub(super) struct Trust {
    /// All that the root file holds.
    roots: Vec<Parsed>,
    /// What it holds between roots and leaves: helps to find the way to a root, and is none.
    between: Vec<CertificateDer<'static>>,
    revocations: Vec<(CertificateList, Vec<u8>)>,
    provider: Arc<CryptoProvider>,
    verifiers: Verifiers,
}

/// webpki's, over the roots that may vouch.
#[derive(Clone, Debug)]
struct Verifiers {
    servers: Option<Arc<WebPkiServerVerifier>>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
}

/// What a certificate is shown for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Server,
    Client,
}

/// A revocation list cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnusableTrust(pub(super) String);

impl Verifiers {
    /// webpki asks nothing of a root but its name and its key, so only those may be given to it that OpenSSL would end at:
    /// signed by themselves, of an authority, and valid.
    fn new<'a>(
        roots: impl Iterator<Item = &'a Parsed>,
        revocations: &[(CertificateList, Vec<u8>)],
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, UnusableTrust> {
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(roots.map(|root| CertificateDer::from(root.der.clone())));
        if store.is_empty() {
            return Ok(Self { servers: None, clients: None });
        }
        let store = Arc::new(store);
        let lists: Vec<_> =
            revocations.iter().map(|(_, der)| CertificateRevocationListDer::from(der.clone())).collect();
        let unusable = |error: &dyn std::error::Error| UnusableTrust(error.to_string());
        let builder = WebPkiServerVerifier::builder_with_provider(Arc::clone(&store), Arc::clone(provider))
            .with_crls(lists.clone())
            .enforce_revocation_expiration();
        let servers = builder.build().map_err(|error| unusable(&error))?;
        let builder = WebPkiClientVerifier::builder_with_provider(store, Arc::clone(provider))
            .with_crls(lists)
            .enforce_revocation_expiration()
            .allow_unauthenticated();
        let clients = builder.build().map_err(|error| unusable(&error))?;
        Ok(Self { servers: Some(servers), clients: Some(clients) })
    }
}

impl Trust {
    /// These roots, and these revocations: with any, each certificate's issuer must have published a list, as with OpenSSL.
    pub(super) fn new(
        roots: &[CertificateDer<'static>],
        revocations: Vec<CertificateRevocationListDer<'static>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, UnusableTrust> {
        let roots: Vec<_> = roots.iter().filter_map(|root| Parsed::of(root)).collect();
        let mut lists = Vec::new();
        for der in &revocations {
            let list = CertificateList::from_der(der).map_err(|error| {
                UnusableTrust(format!("could not read a certificate revocation list: {error}"))
            })?;
            lists.push((list, der.to_vec()));
        }
        // Of several lists of one issuer the newest counts, and the first is looked at.
        lists.sort_by_key(|(list, _)| Reverse(list.tbs_cert_list.this_update.to_unix_duration()));
        let mut trust = Self {
            between: Vec::new(),
            revocations: lists,
            provider: Arc::clone(provider),
            verifiers: Verifiers { servers: None, clients: None },
            roots,
        };
        let is_between = |root: &&Parsed| root.is_authority() && !trust.is_root(root);
        trust.between = trust
            .roots
            .iter()
            .filter(is_between)
            .map(|root| CertificateDer::from(root.der.clone()))
            .collect();
        trust.verifiers = Verifiers::new(trust.usable_roots(), &trust.revocations, provider)?;
        Ok(trust)
    }

    /// Whether names are limited by any of what is trusted.
    pub(super) fn constrains_names(&self) -> bool {
        self.roots.iter().any(Parsed::constrains_names)
    }

    /// Signed by itself.
    fn is_root(&self, certificate: &Parsed) -> bool {
        certificate.subject() == certificate.issuer() && self.has_signed(certificate, certificate).is_some()
    }

    fn usable_roots(&self) -> impl Iterator<Item = &Parsed> {
        self.roots.iter().filter(|root| root.may_sign_certificates() && self.is_root(root))
    }

    /// Whether a root vouches for the certificate.
    pub(super) fn check(
        &self,
        role: Role,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        match self.check_by_webpki(role, certificate, intermediates, now) {
            Ok(()) => Ok(()),
            Err(error) => match Parsed::of(certificate) {
                Some(parsed)
                    if parsed.is_old_version()
                        || parsed.is_authority()
                        || self.roots.iter().any(|root| root.der == parsed.der) =>
                {
                    self.check_directly(role, &parsed, now.as_secs())
                }
                _ => Err(error),
            },
        }
    }

    fn check_by_webpki(
        &self,
        role: Role,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let unknown = || Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let is_valid = |root: &&Parsed| root.is_valid_at(now.as_secs());
        // Roots run out while a server runs.
        let verifiers = if self.usable_roots().all(|root| is_valid(&root)) {
            self.verifiers.clone()
        } else {
            let valid = self.usable_roots().filter(is_valid);
            Verifiers::new(valid, &self.revocations, &self.provider).map_err(|_| unknown())?
        };
        let intermediates: Vec<_> = intermediates.iter().chain(&self.between).cloned().collect();
        match role {
            Role::Server => {
                let verifier = verifiers.servers.ok_or_else(unknown)?;
                let nobody = ServerName::try_from("name.invalid").map_err(|_| unknown())?;
                match verifier.verify_server_cert(certificate, &intermediates, &nobody, &[], now) {
                    // The name is looked at last, and not here.
                    Err(Error::InvalidCertificate(
                        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                    ))
                    | Ok(_) => Ok(()),
                    Err(error) => Err(error),
                }
            }
            Role::Client => {
                let verifier = verifiers.clients.ok_or_else(unknown)?;
                verifier.verify_client_cert(certificate, &intermediates, now).map(drop)
            }
        }
    }

    /// A certificate that is a root itself, or that a root has signed without anything in between.
    fn check_directly(&self, role: Role, certificate: &Parsed, now: u64) -> Result<(), Error> {
        let refused = |reason| Err(Error::InvalidCertificate(reason));
        let purpose = match role {
            Role::Server => SERVER_PURPOSE,
            Role::Client => CLIENT_PURPOSE,
        };
        if !certificate.is_for(purpose) || !certificate.may_be_used_in_handshakes() {
            return refused(CertificateError::InvalidPurpose);
        }
        if certificate.has_unknown_demands() {
            return refused(CertificateError::UnhandledCriticalExtension);
        }
        let vouches = |root: &&Parsed| {
            let is_itself = root.der == certificate.der;
            root.subject() == certificate.issuer()
                && self.is_root(root)
                && (is_itself || (root.may_sign_certificates() && !root.constrains_names()))
                && self.has_signed(root, certificate).is_some()
        };
        let mut vouching = self.roots.iter().filter(vouches).peekable();
        if vouching.peek().is_none() {
            return refused(CertificateError::UnknownIssuer);
        }
        // Of a root that was renewed with its key there are two.
        let valid = vouching.find(|root| root.is_valid_at(now) && certificate.is_valid_at(now));
        let Some(root) = valid else { return refused(CertificateError::Expired) };
        self.check_revocation(root, certificate, now)
    }

    fn check_revocation(&self, root: &Parsed, certificate: &Parsed, now: u64) -> Result<(), Error> {
        if self.revocations.is_empty() {
            return Ok(());
        }
        let key = root.certificate.tbs_certificate().subject_public_key_info();
        let is_by_root = |list: &&(CertificateList, Vec<u8>)| {
            let (list, der) = *list;
            list.tbs_cert_list.issuer == *certificate.issuer()
                && first_element(der).is_some_and(|signed| {
                    let signature = list.signature.raw_bytes();
                    self.verify(key, &list.signature_algorithm, signed, signature).is_some()
                })
        };
        let refused = |reason| Err(Error::InvalidCertificate(reason));
        let Some((list, _)) = self.revocations.iter().find(is_by_root) else {
            return refused(CertificateError::UnknownRevocationStatus);
        };
        let next = list.tbs_cert_list.next_update.map(|next| next.to_unix_duration().as_secs());
        if next.is_some_and(|next| next < now) {
            return refused(CertificateError::UnknownRevocationStatus);
        }
        let serial = certificate.certificate.tbs_certificate().serial_number();
        let revoked = list.tbs_cert_list.revoked_certificates.as_deref().unwrap_or_default();
        if revoked.iter().any(|one| one.serial_number == *serial) {
            return refused(CertificateError::Revoked);
        }
        Ok(())
    }

    fn has_signed(&self, issuer: &Parsed, certificate: &Parsed) -> Option<()> {
        let key = issuer.certificate.tbs_certificate().subject_public_key_info();
        let signature = certificate.certificate.signature().raw_bytes();
        let algorithm = certificate.certificate.signature_algorithm();
        self.verify(key, algorithm, certificate.signed_part()?, signature)
    }

    fn verify(
        &self,
        key: &SubjectPublicKeyInfoOwned,
        algorithm: &x509_cert::spki::AlgorithmIdentifierOwned,
        signed: &[u8],
        signature: &[u8],
    ) -> Option<()> {
        let (key_algorithm, algorithm) = (algorithm_content(&key.algorithm)?, algorithm_content(algorithm)?);
        let fits = self.provider.signature_verification_algorithms.all.iter().filter(|known| {
            known.public_key_alg_id().as_ref() == key_algorithm
                && known.signature_alg_id().as_ref() == algorithm
        });
        let key = key.subject_public_key.raw_bytes();
        fits.into_iter().any(|known| known.verify_signature(key, signed, signature).is_ok()).then_some(())
    }
}

/// Which version of TLS a signature is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TlsSignature {
    V1_2,
    V1_3,
}

/// Whether the peer has the certificate's key. As rustls does it, and for certificates that webpki does not read by hand.
pub(super) fn verify_handshake(
    version: TlsSignature,
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
    provider: &CryptoProvider,
) -> Result<HandshakeSignatureValid, Error> {
    let algorithms = &provider.signature_verification_algorithms;
    let by_webpki = match version {
        TlsSignature::V1_2 => verify_tls12_signature(message, certificate, signed, algorithms),
        TlsSignature::V1_3 => verify_tls13_signature(message, certificate, signed, algorithms),
    };
    let Err(error) = by_webpki else { return by_webpki };
    let Some(parsed) = Parsed::of(certificate).filter(Parsed::is_old_version) else { return Err(error) };
    if version == TlsSignature::V1_3 && !is_for_tls13(signed.scheme) {
        return Err(error);
    }
    let key = parsed.certificate.tbs_certificate().subject_public_key_info();
    let key_algorithm = algorithm_content(&key.algorithm).unwrap_or_default();
    let known = algorithms.mapping.iter().find(|(scheme, _)| *scheme == signed.scheme);
    let known = known.map(|(_, known)| *known).unwrap_or_default();
    let key = key.subject_public_key.raw_bytes();
    let is_valid = known.iter().any(|known| {
        known.public_key_alg_id().as_ref() == key_algorithm
            && known.verify_signature(key, message, signed.signature()).is_ok()
    });
    if is_valid {
        return Ok(HandshakeSignatureValid::assertion());
    }
    Err(Error::InvalidCertificate(CertificateError::BadSignature))
}

/// TLS 1.3 has given up PKCS #1 signatures and SHA-1.
fn is_for_tls13(scheme: SignatureScheme) -> bool {
    matches!(
        scheme,
        SignatureScheme::ECDSA_NISTP256_SHA256
            | SignatureScheme::ECDSA_NISTP384_SHA384
            | SignatureScheme::ECDSA_NISTP521_SHA512
            | SignatureScheme::RSA_PSS_SHA256
            | SignatureScheme::RSA_PSS_SHA384
            | SignatureScheme::RSA_PSS_SHA512
            | SignatureScheme::ED25519
    )
}
