//! A primary with TLS and a relay behind it that has the same certificate, the same users and the same rules: what a client
//! may do at one it may do at the other.

use std::path::{Path, PathBuf};

use super::MB;
use super::certificates::{Authority, Pair};
use super::compare::assert_same_wal;
use super::lab::{self, Installation};
use super::postgres::{Postgres, Settings, Stop};
use super::psql::run_psql;
use super::receivewal::PgReceivewal;
use super::relay::Relay;
use super::wait::wait_until;

/// Both, with a user `standby` whose password is `secret`.
pub(crate) struct Site {
    pub(crate) primary: Postgres,
    pub(crate) relay: Relay,
    cert: PathBuf,
    key: PathBuf,
}

/// How clients' certificates are judged.
pub(crate) struct Judgement<'a> {
    /// Who may have signed them.
    pub(crate) ca: &'a Path,
    /// What was revoked.
    pub(crate) crl: Option<&'a Path>,
    /// Lines of pg_hba.conf.
    pub(crate) rules: &'a str,
    /// Lines of pg_ident.conf.
    pub(crate) map: &'a str,
}

/// What a client gets, or what it says.
pub(crate) type Verdict = Result<String, String>;

impl Site {
    pub(crate) fn new(installation: &Installation, server: &Pair) -> Self {
        Self::with_lines(installation, server, "")
    }

    /// With more lines of postgresql.conf.
    pub(crate) fn with_lines(installation: &Installation, server: &Pair, lines: &str) -> Self {
        let mut primary = Settings::new().segment_size_mb(1).start(installation);
        let data = primary.data();
        for (from, to) in [(&server.cert, "server.crt"), (&server.key, "server.key")] {
            std::fs::copy(from, data.join(to)).unwrap();
            lab::give_all_to_server(&data.join(to));
        }
        primary.add_settings(&format!(
            "ssl = on\nssl_cert_file = 'server.crt'\nssl_key_file = 'server.key'\npassword_encryption = 'scram-sha-256'\n{lines}"
        ));
        primary.restart(Stop::Fast);
        primary.sql("create role standby replication login password 'secret'");
        primary.demand("host replication standby 127.0.0.1/32 scram-sha-256", "standby");
        let mut relay = Relay::new("tls_site", primary.port).with_token();
        let users = relay.write_file("users.toml", &users_of(&primary));
        relay.set("downstream.users", &format!("{users:?}"));
        let (cert, key) = (
            relay.write_file("server.crt", &read(&server.cert)),
            relay.write_file("server.key", &read(&server.key)),
        );
        let mut site = Self { primary, relay, cert, key };
        site.set_tls("");
        site.relay.start();
        site
    }

    /// The relay's `downstream.tls` from its next start: certificate, key, and what is given.
    pub(crate) fn set_tls(&mut self, rest: &str) {
        let (cert, key) = (&self.cert, &self.key);
        self.relay.set("downstream.tls", &format!("{{ cert = {cert:?}, key = {key:?}{rest} }}"));
    }

    /// Both judge clients so from now on. Roles that the primary has by now are users of the relay.
    pub(crate) fn judge(&mut self, judgement: &Judgement<'_>) {
        let data = self.primary.data();
        std::fs::copy(judgement.ca, data.join("ca.crt")).unwrap();
        let mut settings = "ssl_ca_file = 'ca.crt'\n".to_owned();
        let mut tls = format!(", client_ca = {:?}", judgement.ca);
        if let Some(crl) = judgement.crl {
            std::fs::copy(crl, data.join("ca.crl")).unwrap();
            settings.push_str("ssl_crl_file = 'ca.crl'\n");
            tls.push_str(&format!(", client_crl = {crl:?}"));
        }
        lab::give_all_to_server(&data);
        self.primary.add_settings(&settings);
        std::fs::write(data.join("pg_ident.conf"), judgement.map).unwrap();
        let rest = std::fs::read_to_string(data.join("pg_hba.conf")).unwrap();
        std::fs::write(data.join("pg_hba.conf"), format!("{}{rest}", judgement.rules)).unwrap();
        self.primary.restart(Stop::Fast);
        self.relay.write_file("users.toml", &users_of(&self.primary));
        let hba = self.relay.write_file("pg_hba.conf", judgement.rules);
        let ident = self.relay.write_file("pg_ident.conf", judgement.map);
        self.relay.set("downstream.hba", &format!("{hba:?}"));
        self.relay.set("downstream.ident", &format!("{ident:?}"));
        self.set_tls(&tls);
        self.relay.terminate();
        self.relay.start();
    }

    /// Both asked the same by the same client: what the primary says, and what the relay says. No position is in it.
    pub(crate) fn ask_both(&self, client: &Installation, rest: &str) -> (Verdict, Verdict) {
        let ask = |port: u16| {
            let conninfo = format!("port={port} user=standby password=secret replication=true {rest}");
            run_psql(client, &conninfo, "IDENTIFY_SYSTEM").map(|row| row.split('|').take(2).collect())
        };
        (ask(self.primary.port), ask(self.relay.port))
    }

    /// Whether a client that trusts only this authority is let in.
    pub(crate) fn is_believed(&self, client: &Installation, authority: &Authority) -> bool {
        self.lets_in(client, ("standby", "secret"), authority)
    }

    /// The same for another user.
    pub(crate) fn lets_in(
        &self,
        client: &Installation,
        (user, password): (&str, &str),
        authority: &Authority,
    ) -> bool {
        let conninfo = format!(
            "host=127.0.0.1 port={} user={user} password={password} replication=true sslmode=verify-full {}",
            self.relay.port,
            showing_root(authority)
        );
        run_psql(client, &conninfo, "IDENTIFY_SYSTEM").is_ok()
    }

    /// The relay's next clients are to see this certificate.
    pub(crate) fn write_pair(&self, renewed: &Pair) {
        self.relay.write_file("server.crt", &read(&renewed.cert));
        self.relay.write_file("server.key", &read(&renewed.key));
    }

    /// pg_receivewal over TLS.
    pub(crate) fn archive(&self, installation: &Installation, arguments: &[&str]) -> PgReceivewal {
        let conninfo =
            format!("host=127.0.0.1 port={} user=standby password=secret sslmode=require", self.relay.port);
        PgReceivewal::start(installation, self.relay.port, &[&["-d", &conninfo], arguments].concat())
    }

    /// Waits until all complete segments up to `upto` are there, and compares them.
    pub(crate) fn wait_archived(&self, archive: &PgReceivewal, upto: u64) {
        let end = upto - upto % MB;
        wait_until("pg_receivewal to have all complete segments", || archive.completed(MB) >= end);
        assert_same_wal(archive.folder(), &self.primary, end);
    }
}

/// The replication users of a server, with the secrets that they have there.
pub(crate) fn users_of(primary: &Postgres) -> String {
    primary.sql(
        "select string_agg(format('%s = %s', rolname, coalesce('\"' || rolpassword || '\"', '{}')), chr(10)) \
         from pg_authid where rolreplication and not rolsuper",
    )
}

pub(crate) fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

/// A cell of a table.
pub(crate) fn shown(verdict: &Verdict) -> String {
    match verdict {
        Ok(_) => "in".to_owned(),
        Err(text) => format!("refused: {}", text.replace('\n', " ")),
    }
}

/// What a connection string says of whom to believe.
pub(crate) fn showing_root(authority: &Authority) -> String {
    format!("sslrootcert={}", authority.root().display())
}

/// What a connection string says of a client's certificate.
pub(crate) fn showing(pair: &Pair) -> String {
    format!("sslcert={} sslkey={}", pair.cert.display(), pair.key.display())
}
