//! `pg_hba.conf`: the rules, in order, of which the first that fits holds.
//!
//! Owns what a rule means (`check_hba` of hba.c) and which clients one is about. How it is written is in `parse.rs`.

mod parse;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use crate::access::applicant::{Applicant, Origin, Wire};
use crate::access::error::{LineError, LineProblem};
use crate::access::ident::NoMatch;
use crate::access::name::Name;
use crate::access::network::{Addresses, Interface};
use crate::access::tokens::{IncludedFiles, NoFiles, tokenize};
use crate::access::users::Users;
use crate::protocol::frontend::ReplicationMode;

/// The rules, in order.
#[derive(Clone, Debug, Default)]
pub struct Rules(Vec<Rule>);

/// One line.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Where it stands.
    pub place: Place,
    connection: ConnectionType,
    databases: Vec<Name>,
    users: Vec<Name>,
    addresses: Addresses,
    /// What a client has to do.
    pub method: Method,
    /// Whether that takes a certificate, too.
    pub certificate: CertificateDemand,
    certificate_name: CertificateName,
    /// Its user name map.
    map: Option<String>,
}

/// Where a rule stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file; `None` for a rule that holds where there is none.
    pub file: Option<PathBuf>,
    /// The line, from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}:{}", file.display(), self.line),
            None => f.write_str("default"),
        }
    }
}

/// The first word of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ConnectionType {
    Local,
    Host,
    HostSsl,
    HostNoSsl,
    /// Nobody: there is no GSSAPI here.
    HostGssEnc,
    /// Everybody, for the same reason.
    HostNoGssEnc,
}

/// What a client has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Nothing.
    Trust,
    /// To go away.
    Reject,
    /// Prove by SCRAM-SHA-256 that he knows the password.
    ScramSha256,
    /// The same, or by MD5 if that is how the secret is kept.
    Md5,
    /// Show a certificate with the user's name.
    Cert,
    /// Be the operating system's user of that name.
    Peer,
}

impl Method {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Trust => "trust",
            Self::Reject => "reject",
            Self::ScramSha256 => "scram-sha-256",
            Self::Md5 => "md5",
            Self::Cert => "cert",
            Self::Peer => "peer",
        }
    }

    /// Whether a password is asked for.
    pub const fn needs_password(self) -> bool {
        matches!(self, Self::ScramSha256 | Self::Md5)
    }
}

/// `clientcert`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateDemand {
    /// A certificate is not asked for.
    None,
    /// Any that the authority has signed.
    VerifyCa,
    /// One with the user's name.
    VerifyFull,
}

/// `clientname`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CertificateName {
    Common,
    Distinguished,
}

impl Rules {
    /// Reads a file's text.
    pub fn parse(file: &Path, text: &str, files: &dyn IncludedFiles) -> Result<Self, LineError> {
        let lines = tokenize(file, text, files)?;
        let rules = lines.iter().map(|line| parse::rule(line).map_err(|problem| line.error(problem)));
        let rules = rules.collect::<Result<Vec<_>, _>>()?;
        if rules.is_empty() {
            return Err(LineError { file: file.to_owned(), line: None, problem: LineProblem::NoEntries });
        }
        Ok(Self(rules))
    }

    /// Rules of this program's own, which hold where there is no file. Wrong ones let nobody in.
    pub fn built_in(text: &str) -> Self {
        let Ok(Self(mut rules)) = Self::parse(Path::new(""), text, &NoFiles) else {
            return Self::default();
        };
        rules.iter_mut().for_each(|rule| rule.place.file = None);
        Self(rules)
    }

    /// The first rule that is about this client.
    pub fn find(
        &self,
        applicant: &Applicant<'_>,
        users: Option<&Users>,
        interfaces: &dyn Fn() -> Vec<Interface>,
    ) -> Option<&Rule> {
        let fits = |rule: &&Rule| {
            rule.is_about_connection(applicant, interfaces)
                && rule.is_about_database(applicant, users)
                && rule.users.iter().any(|name| name.is_user(applicant.user, users))
        };
        self.0.iter().find(fits)
    }

    /// Every rule, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Rule> {
        self.0.iter()
    }
}

impl Rule {
    /// Whether somebody who is not on this machine may come in by it without proving who he is.
    pub fn trusts_others(&self) -> bool {
        // `trust` with a certificate in the user's name is no trust.
        self.method == Method::Trust
            && self.certificate != CertificateDemand::VerifyFull
            && !matches!(self.connection, ConnectionType::Local | ConnectionType::HostGssEnc)
            && !self.addresses.is_this_machine()
    }

    /// Whether it is about connections that are encrypted, and no others.
    pub fn is_for_tls_alone(&self) -> bool {
        self.connection == ConnectionType::HostSsl
    }

    /// The user name map that it names.
    pub fn map(&self) -> Option<&str> {
        self.map.as_deref()
    }

    /// The name in a certificate that counts. `common` is absent where the certificate has none.
    pub(super) fn name_in<'a>(
        &self,
        common: Option<&'a str>,
        distinguished: &'a str,
    ) -> Result<&'a str, NoMatch> {
        let name = match self.certificate_name {
            CertificateName::Common => common.unwrap_or_default(),
            CertificateName::Distinguished => distinguished,
        };
        if name.is_empty() { Err(NoMatch::NoNameInCertificate) } else { Ok(name) }
    }

    fn is_about_connection(
        &self,
        applicant: &Applicant<'_>,
        interfaces: &dyn Fn() -> Vec<Interface>,
    ) -> bool {
        let Origin::Tcp(address) = applicant.origin else { return self.connection == ConnectionType::Local };
        let is_right_kind = match self.connection {
            ConnectionType::Local | ConnectionType::HostGssEnc => false,
            ConnectionType::Host | ConnectionType::HostNoGssEnc => true,
            ConnectionType::HostSsl => applicant.wire == Wire::Tls,
            ConnectionType::HostNoSsl => applicant.wire == Wire::Clear,
        };
        is_right_kind && self.addresses.contains(address.to_canonical(), interfaces)
    }

    /// A physical replication connection is in no database: only the keyword is about it (`check_db`).
    fn is_about_database(&self, applicant: &Applicant<'_>, users: Option<&Users>) -> bool {
        let Applicant { mode, database, user, .. } = *applicant;
        self.databases.iter().any(|name| {
            let token = name.token();
            if mode == ReplicationMode::Physical {
                return token.is_keyword("replication");
            }
            if token.is_keyword("all") {
                return true;
            }
            if token.is_keyword("sameuser") {
                return database == user;
            }
            if token.is_keyword("samegroup") || token.is_keyword("samerole") {
                return users.is_some_and(|users| users.is_member(user, database));
            }
            !token.is_keyword("replication") && name.is(database)
        })
    }
}
