//! Who may connect, how he proves who he is, and what he may do then.
//!
//! Owns the formats and the meaning of `pg_hba.conf` and `pg_ident.conf`, which are PostgreSQL's own (`hba.c`, as of 18),
//! and the users with their secrets, which are the `pg_authid` of a relay. Decides, and says no in PostgreSQL's words; who
//! asks, over what, and when, are arguments. Reads no file: texts come in, also those that a text includes.
//!
//! ```text
//!  Applicant ──▶ Rules::find ──▶ Rule { method, ... } ──▶ proof ──▶ Access::grant ──▶ Grant { may, connection_limit }
//!                 (pg_hba.conf)                            │
//!                                      Users (secret), UserMaps (pg_ident.conf)
//! ```

mod applicant;
mod error;
mod hba;
mod ident;
mod name;
mod network;
mod regex;
mod tokens;
mod users;

pub use applicant::{Applicant, Origin, Wire};
pub use error::{LineError, LineProblem};
pub use hba::{CertificateDemand, Method, Place, Rule, Rules};
pub use ident::{NoMatch, UserMaps};
pub use network::Interface;
pub use regex::{PatternError, Regex};
pub use tokens::{INCLUDE_DEPTH_MAX, IncludedFiles, NoFiles};
pub use users::{Challenge, Grant, MockNonce, Permission, Permissions, Secret, User, Users};

use crate::protocol::ServerError;
use crate::wal::PgTimestamp;

/// Everything that decides about a client.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// The rules, in order.
    pub rules: Rules,
    /// Who may act as whom.
    pub maps: UserMaps,
    /// The users; `None` where nobody is told from another.
    pub users: Option<Users>,
}

impl Access {
    /// The rule that holds for somebody, or what he is told when none does, or when it turns him away.
    pub fn rule_for(
        &self,
        applicant: &Applicant<'_>,
        interfaces: &dyn Fn() -> Vec<Interface>,
    ) -> Result<&Rule, ServerError> {
        match self.rules.find(applicant, self.users.as_ref(), interfaces) {
            None => Err(applicant.no_entry()),
            Some(rule) if rule.method == Method::Reject => Err(applicant.rejected()),
            Some(rule) => Ok(rule),
        }
    }

    /// Whether somebody who has proved to be `system_user` may act as `user`, by the map of a rule.
    pub fn check_system_user(&self, rule: &Rule, user: &str, system_user: &str) -> Result<(), NoMatch> {
        self.maps.check(rule.map(), user, system_user, self.users.as_ref())
    }

    /// The same for the names in a certificate that was verified; `common` is absent where it has none.
    pub fn check_certificate(
        &self,
        rule: &Rule,
        user: &str,
        common: Option<&str>,
        distinguished: &str,
    ) -> Result<(), NoMatch> {
        self.check_system_user(rule, user, rule.name_in(common, distinguished)?)
    }

    /// How a user proves that he knows his password. One that does not exist, or whose password has expired by `now`, is
    /// asked all the same, and fails; `nonce` must be the same each time.
    pub fn challenge(&self, user: &str, method: Method, now: PgTimestamp, nonce: &MockNonce) -> Challenge {
        let nobody = Users::default();
        self.users.as_ref().unwrap_or(&nobody).challenge(user, method, now, nonce)
    }

    /// What somebody may do who has proved that he is `user`; an error when there is no such user.
    pub fn grant(&self, user: &str) -> Result<Grant, ServerError> {
        match &self.users {
            Some(users) => users.grant(user),
            None => Ok(Grant::of_everybody()),
        }
    }
}
