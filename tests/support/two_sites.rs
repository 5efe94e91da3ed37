//! Two datacentres with a cable between them: primary and relay at the near end, relay (and its standbys) at the far end.
//!
//! The relays speak TLS with one another, each knows the other by name and password, as an operator would set it up.

use std::path::PathBuf;
use std::time::Duration;

use super::certificates::Authority;
use super::lab::{self, Installation};
use super::postgres::{Postgres, Settings, Stop};
use super::relay::Relay;
use super::wan::{FAR, NEAR, Wan};

pub(crate) struct TwoSites {
    // In the order in which they must go.
    pub(crate) far: Relay,
    pub(crate) near: Relay,
    pub(crate) primary: Postgres,
    pub(crate) authority: Authority,
    pub(crate) wan: Wan,
}

impl TwoSites {
    /// `None`, said in one line, where there can be no cable. The far relay is not started.
    pub(crate) fn new(installation: &Installation, round_trip: Duration) -> Option<Self> {
        let wan = Wan::new(round_trip)?;
        let authority = Authority::new("root");
        let certificate = authority.issue("near", &format!("IP:{NEAR},IP:127.0.0.1"));
        let mut primary = Settings::new()
            .within(&wan.near)
            .line(&format!("listen_addresses = '127.0.0.1,{NEAR}'\npassword_encryption = 'scram-sha-256'"))
            .start(installation);
        let data = primary.data();
        for (from, to) in [(&certificate.cert, "server.crt"), (&certificate.key, "server.key")] {
            std::fs::copy(from, data.join(to)).unwrap();
            lab::give_all_to_server(&data.join(to));
        }
        primary.add_settings("ssl = on\nssl_cert_file = 'server.crt'\nssl_key_file = 'server.key'");
        primary.sql("create role far replication login password 'secret'");
        let rules = std::fs::read_to_string(data.join("pg_hba.conf")).unwrap();
        std::fs::write(
            data.join("pg_hba.conf"),
            format!("hostssl replication far {FAR}/32 scram-sha-256\n{rules}"),
        )
        .unwrap();
        primary.restart(Stop::Fast);

        let mut near = Relay::new("near", primary.port).within(&wan.near).with_token();
        let verifier = primary.sql("select rolpassword from pg_authid where rolname = 'far'");
        let users = near.write_file("users.toml", &format!("far = \"{verifier}\"\n"));
        near.set("downstream.users", &format!("{users:?}"));
        near.set(
            "downstream.tls",
            &format!("{{ cert = {:?}, key = {:?} }}", certificate.cert, certificate.key),
        );
        near.set("downstream.listen", &format!("[\"127.0.0.1:{0}\", \"{NEAR}:{0}\"]", near.port));
        near.start();
        let conninfo = Self::conninfo_of(near.port, "far", &authority.root());
        let far = Relay::new("far", 1).within(&wan.far).with_conninfo(&conninfo);
        Some(Self { far, near, primary, authority, wan })
    }

    /// How the far end reaches a port of the near end, by TLS.
    pub(crate) fn conninfo(&self, port: u16, application_name: &str) -> String {
        Self::conninfo_of(port, application_name, &self.authority.root())
    }

    fn conninfo_of(port: u16, application_name: &str, root: &std::path::Path) -> String {
        format!(
            "host={NEAR} port={port} user=far password=secret application_name={application_name} sslmode=verify-full \
             channel_binding=require sslrootcert={}",
            root.display()
        )
    }

    /// A standby at the far end that streams from the primary itself, over the same cable and by TLS.
    pub(crate) fn direct_standby(&self, name: &str) -> Postgres {
        let root = self.root_for_servers();
        let conninfo = Self::conninfo_of(self.primary.port, name, &root);
        self.primary.standby_by(&conninfo, "", Some(&self.wan.far))
    }

    /// A standby at the far end that streams from the relay there.
    pub(crate) fn relayed_standby(&self, name: &str) -> Postgres {
        let conninfo = format!(
            "host=127.0.0.1 port={} user=postgres application_name={name} sslmode=disable",
            self.far.port
        );
        self.primary.standby_by(&conninfo, "", Some(&self.wan.far))
    }

    /// The root where the servers' user can read it.
    fn root_for_servers(&self) -> PathBuf {
        let root = self.primary.data().with_file_name("root.crt");
        std::fs::copy(self.authority.root(), &root).unwrap();
        lab::give_all_to_server(&root);
        root
    }
}
