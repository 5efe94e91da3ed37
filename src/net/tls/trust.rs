//! Whom a certificate is believed by: roots, and revocations.
//!
//! Owns the check of a chain, for servers and for clients. It is webpki's, and beside it the two shapes that OpenSSL, and so
//! libpq and PostgreSQL, accept and webpki does not: a self-signed certificate that is in the root file itself, and one of the
//! first version (`openssl x509 -req` made such for long), or an authority's own, that a root has signed directly. Never
//! looks at names.

use std::{cmp::Reverse, sync::Arc};

use arc_swap::ArcSwap;
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

/// Roots and revocations, ready to check with. What can be known of the roots is found out once: whoever shows a certificate is
/// a stranger, and must not make this a lot of work.
#[derive(Debug)]
pub(super) struct Trust {
    /// All that the root file holds.
    roots: Vec<Root>,
    /// What it holds between roots and leaves: helps to find the way to a root, and is none.
    between: Vec<CertificateDer<'static>>,
    revocations: Vec<(CertificateList, Vec<u8>)>,
    provider: Arc<CryptoProvider>,
    current: ArcSwap<Verifiers>,
}

/// A certificate of the root file.
#[derive(Debug)]
struct Root {
    certificate: Parsed,
    /// Signed by itself.
    is_root: bool,
}

impl Root {
    /// webpki asks nothing of a root but its name and its key, so only those may be given to it that OpenSSL would end at:
    /// signed by themselves, of an authority, and valid.
    fn may_vouch(&self) -> bool {
        self.is_root && self.certificate.may_sign_certificates()
    }
}

/// webpki's, over some of the roots.
#[derive(Debug)]
struct Verifiers {
    /// Which of the roots, by their places in the file.
    of: Vec<usize>,
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

impl Trust {
    /// These roots, and these revocations: with any, each certificate's issuer must have published a list, as with OpenSSL.
    pub(super) fn new(
        roots: &[CertificateDer<'static>],
        revocations: Vec<CertificateRevocationListDer<'static>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, UnusableTrust> {
        let mut lists = Vec::new();
        for der in &revocations {
            let list = CertificateList::from_der(der).map_err(|error| {
                UnusableTrust(format!("could not read a certificate revocation list: {error}"))
            })?;
            lists.push((list, der.to_vec()));
        }
        // Of several lists of one issuer the newest counts, and the first is looked at.
        lists.sort_by_key(|(list, _)| Reverse(list.tbs_cert_list.this_update.to_unix_duration()));
        let certificates = roots.iter().filter_map(|root| Parsed::of(root));
        let with_kind = |certificate: Parsed| {
            let is_root = certificate.subject() == certificate.issuer()
                && has_signed(provider, &certificate, &certificate).is_some();
            Root { certificate, is_root }
        };
        let roots: Vec<_> = certificates.map(with_kind).collect();
        let is_between = |root: &&Root| root.certificate.is_authority() && !root.is_root;
        let between =
            roots.iter().filter(is_between).map(|root| root.certificate.der.clone().into()).collect();
        let trust = Self {
            roots,
            between,
            revocations: lists,
            provider: Arc::clone(provider),
            current: ArcSwap::from_pointee(Verifiers { of: Vec::new(), servers: None, clients: None }),
        };
        // Of all roots, whenever they are valid: a list that cannot be used is found now.
        let of =
            (0..trust.roots.len()).filter(|at| trust.roots.get(*at).is_some_and(Root::may_vouch)).collect();
        trust.current.store(Arc::new(trust.verifiers(of)?));
        Ok(trust)
    }

    /// Whether names are limited by any of what is trusted.
    pub(super) fn constrains_names(&self) -> bool {
        self.roots.iter().any(|root| root.certificate.constrains_names())
    }

    /// webpki's, over these of the roots.
    fn verifiers(&self, of: Vec<usize>) -> Result<Verifiers, UnusableTrust> {
        let mut store = RootCertStore::empty();
        let roots = of.iter().filter_map(|at| self.roots.get(*at));
        store.add_parsable_certificates(roots.map(|root| CertificateDer::from(root.certificate.der.clone())));
        if store.is_empty() {
            return Ok(Verifiers { of, servers: None, clients: None });
        }
        let store = Arc::new(store);
        let lists: Vec<_> =
            self.revocations.iter().map(|(_, der)| CertificateRevocationListDer::from(der.clone())).collect();
        let unusable = |error: &dyn std::error::Error| UnusableTrust(error.to_string());
        let provider = Arc::clone(&self.provider);
        let builder = WebPkiServerVerifier::builder_with_provider(Arc::clone(&store), Arc::clone(&provider))
            .with_crls(lists.clone())
            .enforce_revocation_expiration();
        let servers = builder.build().map_err(|error| unusable(&error))?;
        let builder = WebPkiClientVerifier::builder_with_provider(store, provider)
            .with_crls(lists)
            .enforce_revocation_expiration()
            .allow_unauthenticated();
        let clients = builder.build().map_err(|error| unusable(&error))?;
        Ok(Verifiers { of, servers: Some(servers), clients: Some(clients) })
    }

    /// Those over the roots that are valid now. They are made anew only when other roots are valid than before, as happens when
    /// one runs out while a server runs.
    fn verifiers_at(&self, now: UnixTime) -> Result<Arc<Verifiers>, UnusableTrust> {
        let is_valid = |root: &Root| root.may_vouch() && root.certificate.is_valid_at(now.as_secs());
        let valid = self.roots.iter().enumerate().filter(|(_, root)| is_valid(root)).map(|(at, _)| at);
        let current = self.current.load_full();
        if valid.clone().eq(current.of.iter().copied()) {
            return Ok(current);
        }
        let renewed = Arc::new(self.verifiers(valid.collect())?);
        self.current.store(Arc::clone(&renewed));
        Ok(renewed)
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
                        || self.roots.iter().any(|root| root.certificate.der == parsed.der) =>
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
        let verifiers = self.verifiers_at(now).map_err(|_| unknown())?;
        let intermediates: Vec<_> = intermediates.iter().chain(&self.between).cloned().collect();
        match role {
            Role::Server => {
                let verifier = verifiers.servers.as_ref().ok_or_else(unknown)?;
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
                let verifier = verifiers.clients.as_ref().ok_or_else(unknown)?;
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
        let vouches = |root: &&Root| {
            let is_itself = root.certificate.der == certificate.der;
            root.is_root
                && root.certificate.subject() == certificate.issuer()
                && (is_itself || (root.may_vouch() && !root.certificate.constrains_names()))
                && has_signed(&self.provider, &root.certificate, certificate).is_some()
        };
        let mut vouching = self.roots.iter().filter(vouches).peekable();
        if vouching.peek().is_none() {
            return refused(CertificateError::UnknownIssuer);
        }
        // Of a root that was renewed with its key there are two.
        let valid = vouching.find(|root| root.certificate.is_valid_at(now) && certificate.is_valid_at(now));
        let Some(root) = valid else { return refused(CertificateError::Expired) };
        self.check_revocation(&root.certificate, certificate, now)
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
                    verify(&self.provider, key, &list.signature_algorithm, (signed, signature)).is_some()
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
}

fn has_signed(provider: &CryptoProvider, issuer: &Parsed, certificate: &Parsed) -> Option<()> {
    let key = issuer.certificate.tbs_certificate().subject_public_key_info();
    let signature = certificate.certificate.signature().raw_bytes();
    let algorithm = certificate.certificate.signature_algorithm();
    verify(provider, key, algorithm, (certificate.signed_part()?, signature))
}

/// Whether the second of the two is the key's signature of the first.
fn verify(
    provider: &CryptoProvider,
    key: &SubjectPublicKeyInfoOwned,
    algorithm: &x509_cert::spki::AlgorithmIdentifierOwned,
    (signed, signature): (&[u8], &[u8]),
) -> Option<()> {
    let (key_algorithm, algorithm) = (algorithm_content(&key.algorithm)?, algorithm_content(algorithm)?);
    let fits = provider.signature_verification_algorithms.all.iter().filter(|known| {
        known.public_key_alg_id().as_ref() == key_algorithm && known.signature_alg_id().as_ref() == algorithm
    });
    let key = key.subject_public_key.raw_bytes();
    fits.into_iter().any(|known| known.verify_signature(key, signed, signature).is_ok()).then_some(())
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
    use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs};
    use rustls::pki_types::{AlgorithmIdentifier, InvalidSignature, SignatureVerificationAlgorithm};

    use super::*;

    static VERIFIED: AtomicUsize = AtomicUsize::new(0);

    /// Counts signatures that are checked.
    #[derive(Debug)]
    struct Counting(&'static dyn SignatureVerificationAlgorithm);

    impl SignatureVerificationAlgorithm for Counting {
        fn verify_signature(
            &self,
            key: &[u8],
            message: &[u8],
            signature: &[u8],
        ) -> Result<(), InvalidSignature> {
            VERIFIED.fetch_add(1, Relaxed);
            self.0.verify_signature(key, message, signature)
        }

        fn public_key_alg_id(&self) -> AlgorithmIdentifier {
            self.0.public_key_alg_id()
        }

        fn signature_alg_id(&self) -> AlgorithmIdentifier {
            self.0.signature_alg_id()
        }
    }

    fn counting_provider() -> Arc<CryptoProvider> {
        let mut provider = aws_lc_rs::default_provider();
        let known = provider.signature_verification_algorithms;
        let counting = known.all.iter().map(|one| &*Box::leak(Box::new(Counting(*one))) as _);
        let all: &'static [&'static dyn SignatureVerificationAlgorithm] = counting.collect::<Vec<_>>().leak();
        provider.signature_verification_algorithms =
            WebPkiSupportedAlgorithms { all, mapping: known.mapping };
        Arc::new(provider)
    }

    /// A root that is valid up to the beginning of a year.
    fn root(name: &str, until: i32) -> CertifiedIssuer<'static, KeyPair> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_after = date_time_ymd(until, 1, 1);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    fn in_year(year: u64) -> UnixTime {
        UnixTime::since_unix_epoch(std::time::Duration::from_secs((year - 1970) * 365 * 24 * 60 * 60))
    }

    #[test]
    fn a_stranger_costs_one_signature_however_many_roots_there_are_and_whatever_is_wrong_with_them() {
        let roots = [root("a", 2090), root("b", 2020), root("c", 2050)];
        let ders: Vec<_> = roots.iter().map(|root| root.der().clone()).collect();
        let trust = Trust::new(&ders, Vec::new(), &counting_provider()).unwrap();
        assert_eq!(VERIFIED.load(Relaxed), 3, "each of them has signed itself");
        let params = CertificateParams::new(vec!["client".to_owned()]).unwrap();
        let client = params.signed_by(&KeyPair::generate().unwrap(), &roots[0]).unwrap();
        for _ in 0..10 {
            let before = VERIFIED.load(Relaxed);
            trust.check(Role::Client, client.der(), &[], in_year(2030)).unwrap();
            assert_eq!(VERIFIED.load(Relaxed) - before, 1);
        }
        let first = trust.verifiers_at(in_year(2030)).unwrap();
        assert_eq!(first.of, [0, 2], "one had run out before");
        assert!(Arc::ptr_eq(&first, &trust.verifiers_at(in_year(2031)).unwrap()), "they are made once");
        let later = trust.verifiers_at(in_year(2060)).unwrap();
        assert_eq!(later.of, [0]);
        assert!(Arc::ptr_eq(&later, &trust.verifiers_at(in_year(2060)).unwrap()));
        assert!(trust.check(Role::Client, client.der(), &[], in_year(2095)).is_err(), "all of them have");
    }
}
