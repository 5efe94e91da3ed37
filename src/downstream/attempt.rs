//! What somebody tried who wanted to come in.
//!
//! Owns what the one line of the log says that each login gets: who, in what kind of session, by which method and rule. Never
//! a secret. Texts of a client are fields, which the log writes escaped.

use std::fmt;

use tracing::{info, warn};

use crate::access::{Applicant, Rule};
use crate::protocol::ServerError;
use crate::protocol::frontend::ReplicationMode;

/// What is known so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attempt {
    /// As whom.
    pub(super) user: Option<String>,
    /// The database, where it means something.
    pub(super) database: Option<String>,
    /// What he had to do.
    pub(super) method: Option<&'static str>,
    /// The rule that says so.
    pub(super) rule: Option<String>,
    /// What he is not told.
    pub(super) detail: Option<String>,
}

impl Attempt {
    /// Somebody has said who he is.
    pub(super) fn began(&mut self, applicant: &Applicant<'_>) {
        self.user = Some(applicant.user.to_owned());
        self.database = (applicant.mode != ReplicationMode::Physical).then(|| applicant.database.to_owned());
    }

    /// This rule holds for him.
    pub(super) fn matched(&mut self, rule: &Rule) {
        self.method = Some(rule.method.as_str());
        self.rule = Some(rule.place.to_string());
    }

    /// He is in.
    pub(super) fn accepted(&self, pid: u32, version: impl fmt::Display) {
        let Self { user, database, method, rule, .. } = self;
        let (user, database, rule) = (user.as_deref(), database.as_deref(), rule.as_deref());
        info!(result = "accepted", user, database, method, rule, pid, %version, "client connected");
    }

    /// He was told why not; `left_out` lines about others like him were not written.
    pub(super) fn refused(&self, told: &ServerError, left_out: u64) {
        let Self { user, database, method, rule, detail } = self;
        let (user, database, rule) = (user.as_deref(), database.as_deref(), rule.as_deref());
        let (detail, error) = (detail.as_deref(), &told.message);
        let sqlstate = told.sqlstate.as_ref().map(|sqlstate| sqlstate.as_str());
        // The texts may repeat what the client sent: shown escaped.
        warn!(
            result = "refused",
            user,
            database,
            method,
            rule,
            sqlstate,
            ?error,
            detail,
            left_out,
            "client refused"
        );
    }

    /// He did not come to an end in time.
    pub(super) fn timed_out(&self, left_out: u64) {
        let Self { user, database, method, rule, .. } = self;
        let (user, database, rule) = (user.as_deref(), database.as_deref(), rule.as_deref());
        info!(
            result = "timed out",
            user, database, method, rule, left_out, "client did not authenticate in time"
        );
    }
}
