//! Proof that a client is who it says, by the method of the rule that holds for it.
//!
//! Owns the dialogue about passwords and the checks of certificates and of the operating system's users (`auth.c`). A client
//! that fails is told no more than that it did; why is for the log alone.

use std::time::SystemTime;

use bytes::Bytes;

use crate::access::{Access, CertificateDemand, Challenge, Method, MockNonce, Rule};
use crate::conninfo::ProcessSurroundings;
use crate::downstream::{
    attempt::Attempt,
    blocking::run_blocking,
    connection::{Connection, ConnectionError, Stream, tag_of},
    handshake::{HandshakeError, random},
};
use crate::net::Encryption;
use crate::protocol::{
    DecodeError, PASSWORD_BYTES_MAX, ServerError, SqlState,
    backend::{Authentication as Request, encode_authentication},
    frontend,
    md5::{SALT_BYTES, StoredHash},
    scram::{self, NONCE_BYTES, ServerScramError},
};
use crate::wal::PgTimestamp;

/// One client, and the rule that holds for it.
pub(super) struct Authenticator<'a, S> {
    pub(super) access: &'a Access,
    pub(super) rule: &'a Rule,
    pub(super) user: &'a str,
    pub(super) encryption: &'a Encryption,
    /// The operating system's user at the other end of a Unix socket.
    pub(super) peer_user_id: Option<u32>,
    /// For users that do not exist.
    pub(super) mock_nonce: &'a MockNonce,
    pub(super) connection: &'a mut Connection<S>,
    pub(super) attempt: &'a mut Attempt,
}

impl<S: Stream> Authenticator<'_, S> {
    /// Comes back when the client has proved who it is.
    pub(super) async fn run(mut self) -> Result<(), HandshakeError> {
        let certificate = self.rule.certificate;
        if certificate != CertificateDemand::None && self.encryption.client_certificate().is_none() {
            let text = "connection requires a valid client certificate";
            return Err(ServerError::fatal(SqlState::INVALID_AUTHORIZATION_SPECIFICATION, text).into());
        }
        match self.rule.method {
            // What this says nobody comes here for, but a wrong way in must be closed.
            Method::Reject => return Err(self.denied("the rule rejects")),
            Method::Trust | Method::Cert => {}
            Method::ScramSha256 | Method::Md5 => self.password().await?,
            Method::Peer => self.peer().await?,
        }
        if certificate == CertificateDemand::VerifyFull { self.certificate() } else { Ok(()) }
    }

    async fn password(&mut self) -> Result<(), HandshakeError> {
        let now = PgTimestamp::from_system_time(SystemTime::now());
        match self.access.challenge(self.user, self.rule.method, now, self.mock_nonce) {
            Challenge::Scram(credentials) => self.scram(credentials).await,
            Challenge::Md5 { stored, is_real } => self.md5(&stored, is_real).await,
        }
    }

    async fn scram(&mut self, credentials: scram::Credentials) -> Result<(), HandshakeError> {
        let server = scram::Server::new(credentials, self.encryption.binding());
        let mechanisms = server.mechanisms().iter().map(|&mechanism| mechanism.to_owned()).collect();
        self.ask(&Request::Sasl(mechanisms)).await?;
        let (mechanism, first) = self.reply("SASL").await?.sasl_initial().map_err(malformed)?;
        let first = match first {
            Some(first) => first,
            None => {
                self.ask(&Request::SaslContinue(Bytes::new())).await?;
                self.reply("SASL").await?.sasl().clone()
            }
        };
        let (state, reply) = server
            .handle(&mechanism, &first, random::<NONCE_BYTES>()?)
            .map_err(|error| self.scram_failed(&error))?;
        self.ask(&Request::SaslContinue(reply.into())).await?;
        let last = self.reply("SASL").await?;
        let reply = state.handle(last.sasl()).map_err(|error| self.scram_failed(&error))?;
        self.connection.outgoing.encode(|out| encode_authentication(&Request::SaslFinal(reply.into()), out));
        Ok(())
    }

    fn scram_failed(&mut self, error: &ServerScramError) -> HandshakeError {
        match error {
            ServerScramError::WrongPassword => {
                self.denied("the password is wrong, has expired, or is nobody's")
            }
            error => HandshakeError::Refused(error.to_server_error(self.user)),
        }
    }

    async fn md5(&mut self, stored: &StoredHash, is_real: bool) -> Result<(), HandshakeError> {
        let salt = random::<SALT_BYTES>()?;
        self.ask(&Request::Md5Password(salt)).await?;
        let reply =
            self.reply("password").await?.text().map_err(|_| {
                ServerError::fatal(SqlState::PROTOCOL_VIOLATION, "invalid password packet size")
            })?;
        if reply.is_empty() {
            let text = "empty password returned by client";
            return Err(ServerError::fatal(SqlState::INVALID_PASSWORD, text).into());
        }
        // Both are looked at for a user that does not exist, too.
        let is_right = stored.is_proved_by(salt, &reply);
        if is_right & is_real {
            return Ok(());
        }
        Err(self.denied("the password is wrong, has expired, or is nobody's"))
    }

    async fn peer(&mut self) -> Result<(), HandshakeError> {
        let Some(user_id) = self.peer_user_id else {
            return Err(self.denied("could not get peer credentials"));
        };
        let found = run_blocking(move || ProcessSurroundings.name_of_user(user_id)).await;
        let Some(system_user) = found.ok().flatten() else {
            return Err(
                self.denied(&format!("could not look up local user ID {user_id}: user does not exist"))
            );
        };
        let checked = self.access.check_system_user(self.rule, self.user, &system_user);
        checked.map_err(|no_match| self.denied(&no_match.to_string()))
    }

    fn certificate(&mut self) -> Result<(), HandshakeError> {
        let Some(shown) = self.encryption.client_certificate() else {
            return Err(self.denied("there is no client certificate"));
        };
        let (common, distinguished) = (shown.common_name.as_deref(), shown.distinguished_name.as_str());
        let checked = self.access.check_certificate(self.rule, self.user, common, distinguished);
        checked.map_err(|no_match| self.denied(&no_match.to_string()))
    }

    /// What a client is told by the method alone, whatever was wrong (`auth_failed`); the reason is kept for the log.
    fn denied(&mut self, why: &str) -> HandshakeError {
        self.attempt.detail = Some(why.to_owned());
        let user = self.user;
        let (sqlstate, text) = match self.rule.method {
            Method::ScramSha256 | Method::Md5 => {
                (SqlState::INVALID_PASSWORD, format!("password authentication failed for user \"{user}\""))
            }
            other => {
                let text = match other {
                    Method::Trust => format!("\"trust\" authentication failed for user \"{user}\""),
                    Method::Cert => format!("certificate authentication failed for user \"{user}\""),
                    Method::Peer => format!("Peer authentication failed for user \"{user}\""),
                    _ => format!("authentication failed for user \"{user}\": host rejected"),
                };
                (SqlState::INVALID_AUTHORIZATION_SPECIFICATION, text)
            }
        };
        HandshakeError::Denied { user: user.to_owned(), told: ServerError::fatal(sqlstate, text) }
    }

    async fn ask(&mut self, request: &Request) -> Result<(), ConnectionError> {
        self.connection.outgoing.encode(|out| encode_authentication(request, out));
        Ok(self.connection.flush().await?)
    }

    async fn reply(&mut self, what: &str) -> Result<frontend::Password, HandshakeError> {
        match self.connection.read_message(PASSWORD_BYTES_MAX).await? {
            frontend::Message::Password(password) => Ok(password),
            other => {
                let text = format!("expected {what} response, got message type {}", tag_of(&other));
                Err(ServerError::fatal(SqlState::PROTOCOL_VIOLATION, text).into())
            }
        }
    }
}

fn malformed(error: DecodeError) -> HandshakeError {
    ServerError::from(&error).into()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bytes::BytesMut;
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::access::{Applicant, NoFiles, Origin, Rules, UserMaps, Wire};
    use crate::net::{ClientCertificate, TlsFacts};
    use crate::protocol::backend;
    use crate::protocol::frontend::ReplicationMode;

    /// What becomes of a client without a password, by one rule and over a connection with this certificate. Returns also the
    /// first thing that it is asked.
    async fn outcome(
        rule: &str,
        user: &str,
        encryption: &Encryption,
    ) -> (Result<(), HandshakeError>, Option<backend::Message>, Attempt) {
        let rules = Rules::parse(Path::new("hba"), rule, &NoFiles).unwrap();
        let maps = "m \"/^CN=(.*),O=Example$\" \\1\nm alice relay\n";
        let maps = UserMaps::parse(Path::new("ident"), maps, &NoFiles).unwrap();
        let access = Access { rules, maps, users: None };
        let applicant = Applicant {
            origin: Origin::Tcp([10, 0, 0, 1].into()),
            wire: encryption.wire(),
            mode: ReplicationMode::Physical,
            database: "",
            user,
        };
        let (mut client, server) = tokio::io::duplex(4096);
        let (mut connection, mut attempt) = (Connection::new(server), Attempt::default());
        let reading = tokio::spawn(async move {
            let mut said = BytesMut::new();
            let _ = client.read_buf(&mut said).await;
            backend::Message::decode(&mut said).unwrap()
        });
        let mock_nonce = [7; 32].into();
        let authenticator = Authenticator {
            access: &access,
            rule: access.rule_for(&applicant, &Vec::new).unwrap(),
            user,
            encryption,
            peer_user_id: None,
            mock_nonce: &mock_nonce,
            connection: &mut connection,
            attempt: &mut attempt,
        };
        let outcome = authenticator.run().await;
        drop(connection);
        (outcome, reading.await.unwrap(), attempt)
    }

    fn tls(certificate: Option<(Option<&str>, &str)>) -> Encryption {
        let certificate = certificate.map(|(common_name, distinguished_name)| ClientCertificate {
            common_name: common_name.map(str::to_owned),
            distinguished_name: distinguished_name.to_owned(),
        });
        let binding = scram::ChannelBinding::TlsServerEndPoint(vec![7; 32]);
        Encryption::Tls(TlsFacts { client_certificate: certificate, binding })
    }

    #[tokio::test]
    async fn a_certificate_must_be_there_and_name_the_user() {
        let alice = tls(Some((Some("alice"), "CN=alice,O=Example")));
        let nameless = tls(Some((None, "O=Example")));
        let cert = "certificate authentication failed for user \"USER\"";
        let trust = "\"trust\" authentication failed for user \"USER\"";
        let missing = "connection requires a valid client certificate";
        for (rule, user, encryption, expected) in [
            ("cert", "alice", &alice, ""),
            ("cert", "bob", &alice, cert),
            ("cert", "alice", &tls(None), missing),
            ("cert", "", &nameless, cert),
            ("cert map=m", "relay", &alice, ""),
            ("cert map=m", "alice", &alice, cert),
            ("cert clientname=DN", "alice", &alice, cert),
            ("cert clientname=DN", "CN=alice,O=Example", &alice, ""),
            ("cert map=m clientname=DN", "alice", &alice, ""),
            ("cert map=m clientname=DN", "bob", &alice, cert),
            ("trust clientcert=verify-ca", "bob", &alice, ""),
            ("trust clientcert=verify-ca", "bob", &tls(None), missing),
            ("trust clientcert=verify-full", "alice", &alice, ""),
            ("trust clientcert=verify-full", "bob", &alice, trust),
            ("trust", "bob", &tls(None), ""),
        ] {
            let (outcome, asked, _) =
                outcome(&format!("hostssl all,replication all all {rule}"), user, encryption).await;
            let told = match &outcome {
                Ok(()) => String::new(),
                Err(HandshakeError::Denied { told, .. } | HandshakeError::Refused(told)) => {
                    assert!(told.is(SqlState::INVALID_AUTHORIZATION_SPECIFICATION));
                    told.message.clone()
                }
                Err(other) => panic!("{other:?}"),
            };
            assert_eq!(told, expected.replace("USER", user), "{rule} {user}");
            assert_eq!(asked, None, "{rule}: nothing is asked");
        }
    }

    #[tokio::test]
    async fn why_a_certificate_was_not_enough_is_for_the_log_alone() {
        let alice = tls(Some((Some("alice"), "CN=alice")));
        let (_, _, attempt) = outcome("hostssl all,replication all all cert map=m", "bob", &alice).await;
        let expected = "no match in usermap \"m\" for user \"bob\" authenticated as \"alice\"";
        assert_eq!(attempt.detail.as_deref(), Some(expected));
    }

    #[tokio::test]
    async fn a_password_is_asked_for_beside_a_certificate_and_bound_to_the_connection() {
        let rule = "hostssl all,replication all all scram-sha-256 clientcert=verify-full";
        let (refused, asked, _) = outcome(rule, "alice", &tls(None)).await;
        assert!(matches!(refused, Err(HandshakeError::Refused(_))) && asked.is_none(), "{asked:?}");
        let (_, asked, _) = outcome(rule, "alice", &tls(Some((Some("alice"), "CN=alice")))).await;
        let offered = ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"].map(str::to_owned).to_vec();
        assert_eq!(asked, Some(backend::Message::Authentication(Request::Sasl(offered))));
        let clear = "host all,replication all all scram-sha-256";
        let (_, asked, _) = outcome(clear, "alice", &Encryption::None).await;
        let offered = vec!["SCRAM-SHA-256".to_owned()];
        assert_eq!(asked, Some(backend::Message::Authentication(Request::Sasl(offered))));
        assert_eq!(Encryption::None.wire(), Wire::Clear);
    }
}
