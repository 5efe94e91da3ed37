//! What is read out of an X.509 certificate.
//!
//! Owns the parsing, the hash that SCRAM is bound to (RFC 5929), and the names by which a server is known; those of a client are
//! in `subject.rs`. Decides nothing about trust.

use aws_lc_rs::digest;
use x509_cert::{
    Certificate,
    der::{
        Decode, Encode, Tag, Tagged,
        asn1::{Any, ObjectIdentifier},
        oid::AssociatedOid,
    },
    ext::pkix::{
        BasicConstraints, ExtendedKeyUsage, KeyUsage, NameConstraints, SubjectAltName, name::GeneralName,
    },
    name::Name,
    spki::AlgorithmIdentifierOwned,
};

use crate::net::tls::der;
use crate::protocol::scram::ChannelBinding;

/// A certificate that was read.
#[derive(Clone, Debug)]
pub(super) struct Parsed {
    pub(super) certificate: Certificate,
    /// As it was sent.
    pub(super) der: Vec<u8>,
}

/// The names of a server's certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PeerNames {
    pub(super) dns: Vec<Vec<u8>>,
    pub(super) ip: Vec<Vec<u8>>,
    pub(super) common_name: Option<Vec<u8>>,
}

impl Parsed {
    /// `None`: it is not a certificate.
    pub(super) fn of(der: &[u8]) -> Option<Self> {
        let certificate = Certificate::from_der(der).ok()?;
        Some(Self { certificate, der: der.to_vec() })
    }

    pub(super) fn subject(&self) -> &Name {
        self.certificate.tbs_certificate().subject()
    }

    pub(super) fn issuer(&self) -> &Name {
        self.certificate.tbs_certificate().issuer()
    }

    /// The part that is signed, byte for byte.
    pub(super) fn signed_part(&self) -> Option<&[u8]> {
        first_element(&self.der)
    }

    /// Whether the time lies in the certificate's validity; seconds since 1970.
    pub(super) fn is_valid_at(&self, seconds: u64) -> bool {
        let validity = self.certificate.tbs_certificate().validity();
        let (from, to) = (validity.not_before, validity.not_after);
        (from.to_unix_duration().as_secs()..=to.to_unix_duration().as_secs()).contains(&seconds)
    }

    /// The last second of its validity, since 1970.
    pub(super) fn expires_at(&self) -> u64 {
        self.certificate.tbs_certificate().validity().not_after.to_unix_duration().as_secs()
    }

    /// Whether it says of itself that it is an authority's.
    pub(super) fn is_authority(&self) -> bool {
        let constraints = self.certificate.tbs_certificate().get_extension::<BasicConstraints>();
        matches!(constraints, Ok(Some((_, constraints))) if constraints.ca)
    }

    /// Whether it may vouch for others: it is of an authority, or so old that it cannot say.
    pub(super) fn may_sign_certificates(&self) -> bool {
        let usage = self.certificate.tbs_certificate().get_extension::<KeyUsage>();
        let may_sign = match usage {
            Ok(Some((_, usage))) => usage.key_cert_sign(),
            Ok(None) => true,
            Err(_) => false,
        };
        self.is_old_version() || (self.is_authority() && may_sign)
    }

    /// Whether its key may be used in a handshake, where it says what for.
    pub(super) fn may_be_used_in_handshakes(&self) -> bool {
        match self.certificate.tbs_certificate().get_extension::<KeyUsage>() {
            Ok(Some((_, usage))) => {
                usage.digital_signature() || usage.key_encipherment() || usage.key_agreement()
            }
            Ok(None) => true,
            Err(_) => false,
        }
    }

    /// Whether it limits the names of those it vouches for.
    pub(super) fn constrains_names(&self) -> bool {
        !matches!(self.certificate.tbs_certificate().get_extension::<NameConstraints>(), Ok(None))
    }

    /// Whether it demands something that is not known here.
    pub(super) fn has_unknown_demands(&self) -> bool {
        let known = [BasicConstraints::OID, KeyUsage::OID, ExtendedKeyUsage::OID, SubjectAltName::OID];
        let extensions = self.certificate.tbs_certificate().extensions();
        extensions.is_some_and(|all| all.iter().any(|one| one.critical && !known.contains(&one.extn_id)))
    }

    /// Before the third version there were no extensions, and so no purposes and no alternative names.
    pub(super) fn is_old_version(&self) -> bool {
        self.certificate.tbs_certificate().version() != x509_cert::certificate::Version::V3
    }

    /// Whether it may be used so, where it says what for.
    pub(super) fn is_for(&self, purpose: ObjectIdentifier) -> bool {
        match self.certificate.tbs_certificate().get_extension::<ExtendedKeyUsage>() {
            Ok(Some((_, usage))) => usage.0.iter().any(|one| *one == purpose || *one == ANY_PURPOSE),
            Ok(None) => true,
            Err(_) => false,
        }
    }

    /// None, if they cannot be read.
    pub(super) fn names(&self) -> PeerNames {
        let mut names = PeerNames { common_name: common_name(self.subject()), ..PeerNames::default() };
        let all = match self.certificate.tbs_certificate().get_extension() {
            Ok(Some((_, SubjectAltName(all)))) => all,
            Ok(None) => return names,
            Err(_) => return PeerNames::default(),
        };
        for name in all {
            match name {
                GeneralName::DnsName(name) => names.dns.push(name.as_bytes().to_vec()),
                GeneralName::IpAddress(address) => names.ip.push(address.as_bytes().to_vec()),
                _ => {}
            }
        }
        names
    }
}

/// What SCRAM is bound to when a server shows this certificate: its hash, by the algorithm of its signature. Ed25519 has none.
pub(super) fn end_point_binding(der: &[u8]) -> ChannelBinding {
    let parsed = Parsed::of(der);
    let algorithm = parsed.and_then(|parsed| hash_of_signature(parsed.certificate.signature_algorithm()));
    match algorithm {
        Some(algorithm) => {
            ChannelBinding::TlsServerEndPoint(digest::digest(algorithm, der).as_ref().to_vec())
        }
        None => ChannelBinding::Unsupported,
    }
}

/// MD5 and SHA-1 are replaced by SHA-256, as the RFC says.
fn hash_of_signature(algorithm: &AlgorithmIdentifierOwned) -> Option<&'static digest::Algorithm> {
    let oid = algorithm.oid.to_string();
    if oid == RSASSA_PSS {
        return hash_of_pss(algorithm.parameters.as_ref());
    }
    SIGNATURES.iter().find(|(known, _)| *known == oid).map(|(_, hash)| *hash)
}

/// `RSASSA-PSS-params`: the hash is the first field, SHA-1 where it is absent.
fn hash_of_pss(parameters: Option<&Any>) -> Option<&'static digest::Algorithm> {
    let parameters = parameters?.to_der().ok()?;
    let has = |oid: &str| {
        let oid = ObjectIdentifier::new(oid).ok().and_then(|oid| oid.to_der().ok());
        // Inside [0] { SEQUENCE { oid ... } }, before the mask generation function repeats it.
        oid.is_some_and(|oid| {
            parameters
                .get(..PSS_HASH_END.min(parameters.len()))
                .is_some_and(|head| head.windows(oid.len()).any(|window| window == oid))
        })
    };
    let known = [(SHA384, &digest::SHA384), (SHA512, &digest::SHA512), (SHA224, &digest::SHA224)];
    Some(known.into_iter().find(|(oid, _)| has(oid)).map_or(&digest::SHA256, |(_, hash)| hash))
}

fn common_name(name: &Name) -> Option<Vec<u8>> {
    let attribute = name.iter().find(|attribute| attribute.oid == COMMON_NAME)?;
    let value = &attribute.value;
    if value.tag() == Tag::BmpString {
        let units = value.value().chunks_exact(2);
        let units = units.map(|unit| {
            u16::from_be_bytes([unit.first().copied().unwrap_or(0), unit.last().copied().unwrap_or(0)])
        });
        return Some(
            char::decode_utf16(units)
                .map(|one| one.unwrap_or(char::REPLACEMENT_CHARACTER))
                .collect::<String>()
                .into_bytes(),
        );
    }
    Some(value.value().to_vec())
}

/// The first element of a DER sequence, with its own header: what is signed in a certificate and in a revocation list.
pub(super) fn first_element(der: &[u8]) -> Option<&[u8]> {
    let mut rest = der;
    let mut content = der::take(&mut rest)?.content;
    Some(der::take(&mut content)?.whole)
}

/// The content of an algorithm identifier: what libraries compare.
pub(super) fn algorithm_content(algorithm: &AlgorithmIdentifierOwned) -> Option<Vec<u8>> {
    let der = algorithm.to_der().ok()?;
    der::take(&mut der.as_slice()).map(|element| element.content.to_vec())
}

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
const ANY_PURPOSE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.37.0");
/// A certificate for a TLS server.
pub(super) const SERVER_PURPOSE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.1");
/// A certificate for a TLS client.
pub(super) const CLIENT_PURPOSE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.2");

const RSASSA_PSS: &str = "1.2.840.113549.1.1.10";
const SHA224: &str = "2.16.840.1.101.3.4.2.4";
const SHA384: &str = "2.16.840.1.101.3.4.2.2";
const SHA512: &str = "2.16.840.1.101.3.4.2.3";
/// The hash of PSS parameters stands in these first bytes: two headers, and an algorithm identifier of 15 bytes.
const PSS_HASH_END: usize = 20;

/// Signature algorithms and their hashes.
static SIGNATURES: &[(&str, &digest::Algorithm)] = &[
    ("1.2.840.113549.1.1.4", &digest::SHA256),
    ("1.2.840.113549.1.1.5", &digest::SHA256),
    ("1.2.840.113549.1.1.11", &digest::SHA256),
    ("1.2.840.113549.1.1.12", &digest::SHA384),
    ("1.2.840.113549.1.1.13", &digest::SHA512),
    ("1.2.840.113549.1.1.14", &digest::SHA224),
    ("1.2.840.10045.4.1", &digest::SHA256),
    ("1.2.840.10045.4.3.1", &digest::SHA224),
    ("1.2.840.10045.4.3.2", &digest::SHA256),
    ("1.2.840.10045.4.3.3", &digest::SHA384),
    ("1.2.840.10045.4.3.4", &digest::SHA512),
];
