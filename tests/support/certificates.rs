//! Certificates as operators make them: with openssl, by the commands of PostgreSQL's manual.
//!
//! One authority and what it signs, in a folder of their own. Keys are for the current user alone; a server that runs as
//! another user gets copies.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::lab;

/// An authority with its folder.
pub(crate) struct Authority {
    folder: TempDir,
}

/// A certificate and its key.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let authority = Self { folder: lab::scratch() };
        authority.openssl(&format!(
            "req -new -x509 -days 30 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN={name} \
             -keyout ca.key -out ca.crt"
        ));
        authority
    }

    /// An authority that this one vouches for.
    pub(crate) fn below(&self, name: &str) -> Self {
        let below = Self { folder: lab::scratch() };
        below.openssl(&format!(
            "req -new -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN={name} -keyout ca.key -out ca.csr"
        ));
        std::fs::write(
            below.path("ca.ext"),
            "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n",
        )
        .unwrap();
        self.openssl(&format!(
            "x509 -req -in {0}/ca.csr -days 30 -CA ca.crt -CAkey ca.key -CAcreateserial -extfile {0}/ca.ext -out {0}/ca.crt",
            below.folder.path().display()
        ));
        below
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The root, as a file.
    pub(crate) fn root(&self) -> PathBuf {
        self.path("ca.crt")
    }

    /// A certificate with these alternative names, as `DNS:localhost,IP:127.0.0.1`.
    pub(crate) fn issue(&self, common_name: &str, alternative_names: &str) -> Pair {
        self.request(common_name);
        let extensions = self.path(&format!("{common_name}.ext"));
        std::fs::write(&extensions, format!("subjectAltName={alternative_names}\n")).unwrap();
        self.openssl(&format!(
            "x509 -req -in {common_name}.csr -days 30 -CA ca.crt -CAkey ca.key -CAcreateserial -extfile {} \
             -out {common_name}.crt",
            extensions.display()
        ));
        self.pair(common_name)
    }

    /// A certificate with any subject, as `/O=acme/CN=edge`, in strings of the kind that `mask` says (`string_mask`).
    pub(crate) fn issue_to(&self, name: &str, subject: &str, mask: &str) -> Pair {
        let config = format!("[req]\ndistinguished_name=none\nstring_mask={mask}\n[none]\n");
        std::fs::write(self.path(&format!("{name}.conf")), config).unwrap();
        let mut arguments: Vec<String> = format!(
            "req -new -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -utf8 -config {name}.conf -keyout {name}.key \
             -out {name}.csr -subj"
        )
        .split_whitespace()
        .map(str::to_owned)
        .collect();
        arguments.push(subject.to_owned());
        self.openssl_with(&arguments);
        std::fs::write(self.path(&format!("{name}.ext")), format!("subjectAltName=DNS:{name}\n")).unwrap();
        self.openssl(&format!(
            "x509 -req -in {name}.csr -days 30 -CA ca.crt -CAkey ca.key -CAcreateserial -extfile {name}.ext -out {name}.crt"
        ));
        self.pair(name)
    }

    /// As PostgreSQL's manual makes it: without extensions, which in many versions of openssl is an X.509 v1.
    pub(crate) fn issue_by_the_manual(&self, common_name: &str) -> Pair {
        self.request(common_name);
        self.openssl(&format!(
            "x509 -req -in {common_name}.csr -days 30 -CA ca.crt -CAkey ca.key -CAcreateserial -out {common_name}.crt"
        ));
        self.pair(common_name)
    }

    /// Its own root, and an authority by openssl's default; `algorithm` as in `ec -pkeyopt ...`, `rsa:2048`, `ed25519`.
    pub(crate) fn self_signed(&self, common_name: &str, algorithm: &str) -> Pair {
        self.openssl(&format!(
            "req -new -x509 -days 30 -nodes -newkey {algorithm} -subj /CN={common_name} -keyout {common_name}.key \
             -out {common_name}.crt"
        ));
        self.pair(common_name)
    }

    /// The same pair with its key encrypted.
    pub(crate) fn encrypted(&self, pair: &Pair, passphrase: &str) -> Pair {
        let key = pair.key.with_extension("encrypted.key");
        self.openssl(&format!(
            "pkcs8 -topk8 -in {} -passout pass:{passphrase} -out {}",
            pair.key.display(),
            key.display()
        ));
        only_for_owner(&key);
        Pair { cert: pair.cert.clone(), key }
    }

    /// A revocation list with these certificates in it.
    pub(crate) fn revoke(&self, pairs: &[&Pair]) -> PathBuf {
        let config = "[ca]\ndefault_ca=one\n[one]\ndatabase=index.txt\ncrlnumber=number\ndefault_md=sha256\ndefault_crl_days=30\n";
        std::fs::write(self.path("revoke.conf"), config).unwrap();
        std::fs::write(self.path("index.txt"), "").unwrap();
        std::fs::write(self.path("number"), "01\n").unwrap();
        let base = "ca -config revoke.conf -cert ca.crt -keyfile ca.key";
        for pair in pairs {
            self.openssl(&format!("{base} -revoke {}", pair.cert.display()));
        }
        self.openssl(&format!("{base} -gencrl -out ca.crl"));
        self.path("ca.crl")
    }

    fn request(&self, common_name: &str) {
        self.openssl(&format!(
            "req -new -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN={common_name} \
             -keyout {common_name}.key -out {common_name}.csr"
        ));
    }

    fn pair(&self, name: &str) -> Pair {
        let pair = Pair { cert: self.path(&format!("{name}.crt")), key: self.path(&format!("{name}.key")) };
        only_for_owner(&pair.key);
        pair
    }

    fn openssl(&self, arguments: &str) {
        self.openssl_with(&arguments.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    }

    fn openssl_with(&self, arguments: &[String]) {
        let mut program = Command::new("openssl");
        let output = program.args(arguments).current_dir(self.folder.path()).output().unwrap();
        assert!(
            output.status.success(),
            "openssl {arguments:?}:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

fn only_for_owner(path: &Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}
