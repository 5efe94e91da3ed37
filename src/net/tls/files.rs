//! Certificates, keys and revocation lists in their files.
//!
//! Owns what may stand in such a file and who may read it: PEM as OpenSSL writes it, keys in PKCS #1, SEC 1 and PKCS #8, also
//! encrypted. Opens no file itself, prints no key, and says nothing of a key but its file's name.

use std::path::{Path, PathBuf};

use aws_lc_rs::digest;
use pkcs8::{EncryptedPrivateKeyInfoRef, SecretDocument};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject,
};
use secrecy::{ExposeSecret, SecretString};

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

/// Reads a private key; `passphrase` is for one that is encrypted.
pub(super) fn private_key(
    surroundings: &dyn Surroundings,
    path: &Path,
    passphrase: Option<&SecretString>,
) -> Result<PrivateKeyDer<'static>, TlsFileError> {
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
        return decrypt(encrypted, passphrase).ok_or_else(|| {
            invalid("it could not be decrypted: the passphrase is wrong, or its encryption is not known (PKCS #8 with PBES2 is)")
        });
    }
    if found.text.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(invalid(
            "it is encrypted in OpenSSL's old format; convert it with \"openssl pkcs8 -topk8\"",
        ));
    }
    PrivateKeyDer::from_pem_slice(found.text.as_bytes()).map_err(|_| invalid("no private key in it"))
}

fn decrypt(pem: &str, passphrase: &SecretString) -> Option<PrivateKeyDer<'static>> {
    let (_, encrypted) = SecretDocument::from_pem(pem).ok()?;
    let info = EncryptedPrivateKeyInfoRef::try_from(encrypted.as_bytes()).ok()?;
    let plain = info.decrypt(passphrase.expose_secret()).ok()?;
    Some(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(plain.as_bytes().to_vec())))
}

/// One section of a PEM file, with its marks.
fn section<'a>(text: &'a str, label: &str) -> Option<&'a str> {
    let (begin, end) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
    let start = text.find(&begin)?;
    let rest = text.get(start..)?;
    rest.get(..rest.find(&end)? + end.len())
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
    text: String,
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
