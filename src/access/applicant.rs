//! Somebody who asks to come in, and how he is turned away.
//!
//! Owns PostgreSQL's words for clients that no rule lets in (`ClientAuthentication`, auth.c).

// Addresses alone: sockets are elsewhere.
use core::net::IpAddr;

use crate::protocol::frontend::ReplicationMode;
use crate::protocol::{ServerError, SqlState};

/// Where a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A Unix socket of this machine.
    Local,
    /// An IP address. One of IPv4 within IPv6 is taken for what it is.
    Tcp(IpAddr),
}

/// How the bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// As they are.
    Clear,
    /// Encrypted by TLS.
    Tls,
}

/// Somebody who asks to come in.
#[derive(Clone, Copy, Debug)]
pub struct Applicant<'a> {
    /// From where.
    pub origin: Origin,
    /// Over what.
    pub wire: Wire,
    /// For what kind of session.
    pub mode: ReplicationMode,
    /// In which database; means nothing for physical replication.
    pub database: &'a str,
    /// As whom.
    pub user: &'a str,
}

impl Applicant<'_> {
    /// No rule fits.
    pub fn no_entry(&self) -> ServerError {
        self.turned_away("no pg_hba.conf entry", "from")
    }

    /// The rule that fits says `reject`.
    pub(super) fn rejected(&self) -> ServerError {
        self.turned_away("pg_hba.conf rejects", "for")
    }

    fn turned_away(&self, what: &str, preposition: &str) -> ServerError {
        let Self { user, database, .. } = self;
        let host = match self.origin {
            Origin::Local => "[local]".to_owned(),
            Origin::Tcp(address) => address.to_canonical().to_string(),
        };
        let encryption = match self.wire {
            Wire::Clear => "no encryption",
            Wire::Tls => "SSL encryption",
        };
        let is_entry = preposition == "from";
        let text = match self.mode {
            ReplicationMode::Physical => {
                let connection =
                    if is_entry { "for replication connection" } else { "replication connection" };
                format!("{what} {connection} {preposition} host \"{host}\", user \"{user}\", {encryption}")
            }
            ReplicationMode::Off | ReplicationMode::Database => {
                let connection = if is_entry { "for" } else { "connection for" };
                format!(
                    "{what} {connection} host \"{host}\", user \"{user}\", database \"{database}\", {encryption}"
                )
            }
        };
        ServerError::fatal(SqlState::INVALID_AUTHORIZATION_SPECIFICATION, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn somebody_is_turned_away_in_postgresqls_words() {
        let mut applicant = Applicant {
            origin: Origin::Local,
            wire: Wire::Clear,
            mode: ReplicationMode::Physical,
            database: "shop",
            user: "u",
        };
        assert_eq!(
            applicant.no_entry().message,
            "no pg_hba.conf entry for replication connection from host \"[local]\", user \"u\", no encryption"
        );
        assert_eq!(
            applicant.rejected().message,
            "pg_hba.conf rejects replication connection for host \"[local]\", user \"u\", no encryption"
        );
        applicant.origin = Origin::Tcp("::ffff:10.1.2.3".parse().unwrap());
        applicant.wire = Wire::Tls;
        applicant.mode = ReplicationMode::Database;
        assert_eq!(
            applicant.no_entry().message,
            "no pg_hba.conf entry for host \"10.1.2.3\", user \"u\", database \"shop\", SSL encryption"
        );
        assert_eq!(
            applicant.rejected().message,
            "pg_hba.conf rejects connection for host \"10.1.2.3\", user \"u\", database \"shop\", SSL encryption"
        );
    }
}
