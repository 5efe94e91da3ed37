//! Who may connect, as configured: the users file, the host rules and the user name maps, read together, because each is
//! checked against the others, and read again when they have changed.
//!
//! Owns the rules that hold where there is no file of rules, and what is refused as unsafe. What a line means is in
//! [`access`](crate::access).

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use crate::access::{
    Access, CertificateDemand, IncludedFiles, LineError, Method, Rule, Rules, Secret, UserMaps, Users,
};
use crate::config::{
    ConfigError, FileKind, ListenAddress, Tls,
    error::{Place, Problem},
    standbys, users,
};
use crate::conninfo::{FoundFile, Surroundings};
use crate::protocol::acknowledge_policy::AcknowledgePolicy;

/// Where it is written who may connect, and what those files are held against.
#[derive(Clone, Debug)]
pub struct AccessFiles {
    /// The main file, to be named in errors.
    pub(crate) configuration: PathBuf,
    pub(crate) users: Option<PathBuf>,
    pub(crate) hba: Option<PathBuf>,
    pub(crate) ident: Option<PathBuf>,
    pub(crate) trust_local: bool,
    pub(crate) allow_remote_trust: bool,
    pub(crate) allow_plaintext: bool,
    pub(crate) listen: Vec<ListenAddress>,
    pub(crate) tls: Option<Tls>,
    pub(crate) acknowledge: AcknowledgePolicy,
    pub(crate) acknowledge_users: BTreeMap<String, String>,
}

/// What the files say.
#[derive(Clone, Debug)]
pub struct LoadedAccess {
    /// Who may connect.
    pub access: Access,
    /// What is allowed but unwise, in one line each.
    pub warnings: Vec<String>,
}

/// The files cannot be used.
#[derive(Debug)]
pub(crate) enum AccessError {
    /// One of them is wrong.
    File(ConfigError),
    /// They do not go together with the main file.
    Setting(Problem),
}

impl From<ConfigError> for AccessError {
    fn from(error: ConfigError) -> Self {
        Self::File(error)
    }
}

impl From<Problem> for AccessError {
    fn from(problem: Problem) -> Self {
        Self::Setting(problem)
    }
}

impl AccessFiles {
    /// Reads and checks the files, each with what it includes.
    pub fn load(&self, surroundings: &dyn Surroundings) -> Result<LoadedAccess, ConfigError> {
        self.read(surroundings).map_err(|error| match error {
            AccessError::File(error) => error,
            AccessError::Setting(problem) => problem.at(FileKind::Configuration, &self.configuration, None),
        })
    }

    /// The same with errors that the caller can place in the main file.
    pub(crate) fn read(&self, surroundings: &dyn Surroundings) -> Result<LoadedAccess, AccessError> {
        let users = self.users.as_ref().map(|path| read_users(path, surroundings)).transpose()?;
        standbys::check(&self.acknowledge, &self.acknowledge_users, users.as_ref())?;
        let mut warnings = Vec::new();
        let rules = match &self.hba {
            Some(path) => {
                let rules = read_rules(path, surroundings)?;
                for rule in rules.iter() {
                    self.check_rule(rule, users.is_some(), &mut warnings)?;
                }
                rules
            }
            None => self.default_rules(users.is_some())?,
        };
        let maps = self.ident.as_ref().map(|path| read_maps(path, surroundings)).transpose()?;
        let access = Access { rules, maps: maps.unwrap_or_default(), users };
        warnings.extend(useless_maps(&access));
        warnings.extend(useless_secrets(&access));
        Ok(LoadedAccess { access, warnings })
    }

    /// What holds where there is no file of rules. With users everybody proves who he is, and whoever is not on this machine
    /// over TLS; without, only this machine may connect, if that is allowed.
    fn default_rules(&self, has_users: bool) -> Result<Rules, Problem> {
        let remote = self.listen.iter().find(|address| !address.is_local());
        if !has_users {
            if !self.trust_local {
                return Err(Problem::UsersRequired);
            }
            if let Some(address) = remote {
                return Err(Problem::Unauthenticated(address.to_string()));
            }
            return Ok(Rules::built_in(&local_rules("trust")));
        }
        let remote_rule = match (&self.tls, self.allow_plaintext, remote) {
            (_, true, _) => "host all,replication all all scram-sha-256\n",
            (None, false, Some(address)) => return Err(Problem::Plaintext(address.to_string())),
            (Some(_), false, _) | (None, false, None) => "hostssl all,replication all all scram-sha-256\n",
        };
        Ok(Rules::built_in(&(local_rules("scram-sha-256") + remote_rule)))
    }

    /// What a rule wants must be there, and it must not let in everybody without a word about that.
    fn check_rule(
        &self,
        rule: &Rule,
        has_users: bool,
        warnings: &mut Vec<String>,
    ) -> Result<(), ConfigError> {
        let place = Place {
            kind: FileKind::Hba,
            file: rule.place.file.clone().unwrap_or_default(),
            line: Some(rule.place.line),
        };
        let wrong = |problem| Err(ConfigError::Wrong { place: place.clone(), problem: Box::new(problem) });
        if rule.method.needs_password() && !has_users {
            return wrong(Problem::PasswordWithoutUsers(rule.method.as_str()));
        }
        let can_be_reached = self.listen.iter().any(|address| !address.is_local());
        if rule.trusts_others() && can_be_reached && !self.allow_remote_trust {
            return wrong(Problem::RemoteTrust);
        }
        match &self.tls {
            None if rule.is_for_tls_alone() => {
                warnings.push(format!("{place}: hostssl record cannot match because SSL is disabled"));
            }
            Some(Tls { client_ca: None, .. }) if rule.certificate != CertificateDemand::None => {
                return wrong(Problem::NoClientAuthority);
            }
            _ => {}
        }
        Ok(())
    }
}

fn local_rules(method: &str) -> String {
    ["local all,replication all", "host all,replication all 127.0.0.0/8", "host all,replication all ::1/128"]
        .map(|about| format!("{about} {method}\n"))
        .concat()
}

/// Maps that are named and have no line: whoever comes by such a rule is turned away.
fn useless_maps(access: &Access) -> Vec<String> {
    let named = access.rules.iter().filter_map(|rule| Some((&rule.place, rule.map()?)));
    let useless = named.filter(|(_, map)| !access.maps.has(map));
    useless
        .map(|(place, map)| format!("{place}: usermap \"{map}\" has no line in \"downstream.ident\""))
        .collect()
}

/// Users with a secret for MD5, where no rule asks for one.
fn useless_secrets(access: &Access) -> Vec<String> {
    if access.rules.iter().any(|rule| rule.method == Method::Md5) {
        return Vec::new();
    }
    let users = access.users.iter().flat_map(Users::iter);
    let with_md5 = users.filter(|(_, user)| matches!(user.secret, Some(Secret::Md5(_))));
    let warning = |(name, _)| {
        format!(
            "user \"{name}\" cannot log in with its password: the secret is for MD5, and no rule of \"downstream.hba\" has the \
             method md5"
        )
    };
    with_md5.map(warning).collect()
}

fn read_users(path: &Path, surroundings: &dyn Surroundings) -> Result<Users, ConfigError> {
    let text = FileKind::Users.read_secret(path, surroundings)?;
    users::parse(&text).map_err(|(problem, line)| problem.at(FileKind::Users, path, line))
}

fn read_rules(path: &Path, surroundings: &dyn Surroundings) -> Result<Rules, ConfigError> {
    let file = FileKind::Hba.read(path, surroundings)?;
    Rules::parse(path, &file.text, &Included(surroundings)).map_err(|error| at_line(FileKind::Hba, error))
}

fn read_maps(path: &Path, surroundings: &dyn Surroundings) -> Result<UserMaps, ConfigError> {
    let file = FileKind::Ident.read(path, surroundings)?;
    UserMaps::parse(path, &file.text, &Included(surroundings))
        .map_err(|error| at_line(FileKind::Ident, error))
}

fn at_line(kind: FileKind, error: LineError) -> ConfigError {
    Problem::Line(error.problem).at(kind, &error.file, error.line)
}

/// Files that another one includes.
struct Included<'a>(&'a dyn Surroundings);

impl IncludedFiles for Included<'_> {
    fn read(&self, path: &Path) -> io::Result<String> {
        match self.0.read(path)? {
            FoundFile::Plain { text, .. } => Ok(text.as_str().to_owned()),
            FoundFile::NotPlain => Err(io::Error::other("not a plain file")),
        }
    }
}
