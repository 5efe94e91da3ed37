//! Certificates, keys and revocation lists in their files.
//!
//! Owns what may stand in such a file and who may read it: PEM as OpenSSL writes it, keys in PKCS #1, SEC 1 and PKCS #8, also
//! encrypted. Opens no file itself, prints no key, leaves none in memory, and says nothing of a key but its file's name.

use std::path::{Path, PathBuf};

use aws_lc_rs::digest;
use base64::{Engine, engine::general_purpose::STANDARD};
use pkcs8::{EncryptedPrivateKeyInfoRef, SecretDocument};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs1KeyDer, PrivatePkcs8KeyDer,
    PrivateSec1KeyDer, pem::PemObject,
};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use crate::conninfo::{FoundFile, Surroundings};

/// A file that TLS needs cannot be used. The texts are libpq's.
#[derive(Debug, thiserror::Error)]
pub enum TlsFileError {
    /// It cannot be read.
    #[error("could not read {what} \"{}\"", path.display())]
    Read {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is a directory, or something else that is not a file.
    #[error("{what} \"{}\" is not a regular file", path.display())]
    NotPlain {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// It holds something else.
    #[error("could not read {what} \"{}\": {detail}", path.display())]
    Invalid {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// Others may read a key.
    #[error(
        "private key file \"{}\" has group or world access; file must have permissions u=rw (0600) or less if owned by \
         the current user, or permissions u=rw,g=r (0640) or less if owned by root",
        .0.display()
    )]
    KeyAccess(PathBuf),
    /// There are certificates, and no key for them.
    #[error("certificate present, but not private key file \"{}\"", .0.display())]
    NoKey(PathBuf),
    /// The key is another certificate's.
    #[error("certificate does not match private key file \"{}\"", .0.display())]
    OtherKey(PathBuf),
}

/// Reads a file of certificates, one at least.
pub(super) fn certificates(
    surroundings: &dyn Surroundings,
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
    let text = read(surroundings, what, path)?.text;
    let invalid = |detail: String| TlsFileError::Invalid { what, path: path.to_owned(), detail };
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let all = all.map_err(|error| invalid(error.to_string()))?;
    if all.is_empty() {
        return Err(invalid("no certificate in it".to_owned()));
    }
    Ok(all)
}

/// Reads a file of revocation lists, one at least.
pub(super) fn revocations(
    surroundings: &dyn Surroundings,
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsFileError> {
    let text = read(surroundings, CRL, path)?.text;
    let invalid = |detail: String| TlsFileError::Invalid { what: CRL, path: path.to_owned(), detail };
    let all: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(text.as_bytes()).collect();
    let all = all.map_err(|error| invalid(error.to_string()))?;
    if all.is_empty() {
        return Err(invalid("no certificate revocation list in it".to_owned()));
    }
    Ok(all)
}

/// A private key, zeroed when it goes.
pub(super) struct PrivateKey {
    form: KeyForm,
    der: Zeroizing<Vec<u8>>,
}

/// How the key is written.
#[derive(Clone, Copy)]
enum KeyForm {
    Pkcs8,
    Pkcs1,
    Sec1,
}

/// The labels in PEM.
const KEY_FORMS: [(&str, KeyForm); 3] =
    [("PRIVATE KEY", KeyForm::Pkcs8), ("RSA PRIVATE KEY", KeyForm::Pkcs1), ("EC PRIVATE KEY", KeyForm::Sec1)];

impl PrivateKey {
    /// For the library, which makes no copy of it that it does not look after itself.
    pub(super) fn as_der(&self) -> PrivateKeyDer<'_> {
        let der = self.der.as_slice();
        match self.form {
            KeyForm::Pkcs8 => PrivatePkcs8KeyDer::from(der).into(),
            KeyForm::Pkcs1 => PrivatePkcs1KeyDer::from(der).into(),
            KeyForm::Sec1 => PrivateSec1KeyDer::from(der).into(),
        }
    }
}

/// Reads a private key; `passphrase` is for one that is encrypted.
pub(super) fn private_key(
    surroundings: &dyn Surroundings,
    path: &Path,
    passphrase: Option<&SecretString>,
) -> Result<PrivateKey, TlsFileError> {
    let found = read(surroundings, KEY, path)?;
    // The group may read what root keeps for a service.
    let forbidden = if found.owner == 0 { 0o037 } else { 0o077 };
    if found.mode & forbidden != 0 {
        return Err(TlsFileError::KeyAccess(path.to_owned()));
    }
    let invalid =
        |detail: &str| TlsFileError::Invalid { what: KEY, path: path.to_owned(), detail: detail.to_owned() };
    if let Some(encrypted) = section(&found.text, "ENCRYPTED PRIVATE KEY") {
        let passphrase = passphrase.ok_or_else(|| invalid("it is encrypted, and there is no passphrase"))?;
        return decrypt(encrypted.whole, passphrase).ok_or_else(|| {
            invalid("it could not be decrypted: the passphrase is wrong, or its encryption is not known (PKCS #8 with PBES2 is)")
        });
    }
    if found.text.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(invalid(
            "it is encrypted in OpenSSL's old format; convert it with \"openssl pkcs8 -topk8\"",
        ));
    }
    let sections = KEY_FORMS.iter().filter_map(|(label, form)| Some((section(&found.text, label)?, *form)));
    let first = sections.min_by_key(|(section, _)| section.start);
    let key = first.and_then(|(section, form)| Some(PrivateKey { form, der: decode(section.body)? }));
    key.ok_or_else(|| invalid("no private key in it"))
}

fn decrypt(pem: &str, passphrase: &SecretString) -> Option<PrivateKey> {
    let (_, encrypted) = SecretDocument::from_pem(pem).ok()?;
    let info = EncryptedPrivateKeyInfoRef::try_from(encrypted.as_bytes()).ok()?;
    let plain = info.decrypt(passphrase.expose_secret()).ok()?;
    Some(PrivateKey { form: KeyForm::Pkcs8, der: Zeroizing::new(plain.as_bytes().to_vec()) })
}

/// Base64 in lines of any length.
fn decode(body: &str) -> Option<Zeroizing<Vec<u8>>> {
    // So much room that nothing is left behind where it grew.
    let mut digits = Zeroizing::new(String::with_capacity(body.len()));
    digits.extend(body.chars().filter(|character| !character.is_ascii_whitespace()));
    let mut der = Zeroizing::new(vec![0; base64::decoded_len_estimate(digits.len())]);
    let length = STANDARD.decode_slice(digits.as_bytes(), &mut der).ok()?;
    der.truncate(length);
    Some(der)
}

/// A part of a PEM file.
struct Section<'a> {
    start: usize,
    /// With its marks.
    whole: &'a str,
    /// Between them.
    body: &'a str,
}

/// The first section of this kind.
fn section<'a>(text: &'a str, label: &str) -> Option<Section<'a>> {
    let (begin, end) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
    let start = text.find(&begin)?;
    let rest = text.get(start..)?;
    let at = rest.find(&end)?;
    Some(Section { start, whole: rest.get(..at + end.len())?, body: rest.get(begin.len()..at)? })
}

/// A value that changes when the file does.
pub(super) fn fingerprint(surroundings: &dyn Surroundings, path: &Path) -> [u8; 32] {
    let mut fingerprint = [0; 32];
    // One that cannot be read is another one, too.
    if let Ok(found) = read(surroundings, KEY, path) {
        let digest = digest::digest(&digest::SHA256, found.text.as_bytes());
        fingerprint.iter_mut().zip(digest.as_ref()).for_each(|(to, from)| *to = *from);
    }
    fingerprint
}

struct Found {
    text: Zeroizing<String>,
    mode: u32,
    owner: u32,
}

fn read(surroundings: &dyn Surroundings, what: &'static str, path: &Path) -> Result<Found, TlsFileError> {
    match surroundings.read(path) {
        Ok(FoundFile::Plain { mode, owner, text }) => Ok(Found { text, mode, owner }),
        Ok(FoundFile::NotPlain) => Err(TlsFileError::NotPlain { what, path: path.to_owned() }),
        Err(source) => Err(TlsFileError::Read { what, path: path.to_owned(), source }),
    }
}

const KEY: &str = "private key file";
const CRL: &str = "SSL certificate revocation list file";
