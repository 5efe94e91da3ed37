//! Proof that a client is who it says, by the method of the rule that holds for it.
//!
//! Owns the dialogue about passwords and the checks of certificates and of the operating system's users (`auth.c`). A client
//! that fails is told no more than that it did; why is for the log alone.

use std::time::SystemTime;

use bytes::Bytes;

use crate::access::{Access, CertificateDemand, Challenge, Method, Rule};
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
        match self.access.challenge(self.user, self.rule.method, now) {
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
