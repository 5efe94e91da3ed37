//! From the first byte to a session: encryption, startup packet, protocol version, authentication.
//!
//! Owns the order of these steps and their refusals. A straight dialogue: the caller bounds its time. Nothing of the store
//! is told before the client is known, but whether there is a server at all. Errors are PostgreSQL's, and a client that
//! never completes a startup packet gets none, as there.

use std::{sync::Arc, time::Duration};

use crate::downstream::{
    Authentication, DownstreamContext,
    connection::{Connection, ConnectionError, Stream, tag_of},
    link::AcceptedLink,
    parameters::{clean_ascii, parse_timeout},
    registry::{Client, Registration, TooManySessions},
    server::Server,
};
use crate::net::tls::{ServerTls, TlsError, TlsStart};
use crate::net::{Peer, TlsFacts};
use crate::protocol::{
    DecodeError, PASSWORD_BYTES_MAX, ServerError, SqlState,
    backend::{self, Authentication as Request, encode_authentication},
    frontend::{
        self, CancelKey, FirstPacket, ProtocolVersion, ReplicationMode, Startup, UnsupportedProtocol,
    },
    link::offer::OFFER_PARAMETER,
    scram::{self, ChannelBinding, NONCE_BYTES, ServerScramError},
};

/// How the bytes of a connection are protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Encryption {
    /// Not at all.
    None,
    /// By TLS, which tells this of the client.
    Tls(TlsFacts),
}

impl Encryption {
    /// What SCRAM can be bound to.
    fn binding(&self) -> ChannelBinding {
        match self {
            Self::None => ChannelBinding::Unsupported,
            Self::Tls(facts) => facts.binding.clone(),
        }
    }
}

/// A client that is known, and what it asked for.
#[derive(Debug)]
pub(super) struct Established {
    pub(super) registration: Registration,
    pub(super) server: Server,
    pub(super) version: ProtocolVersion,
    /// The database of `replication=database`.
    pub(super) database: Option<String>,
    pub(super) client_encoding: String,
    pub(super) wal_sender_timeout: Option<Duration>,
    /// Whether WAL goes compressed.
    pub(super) link: Option<AcceptedLink>,
}

/// A handshake that led to no session.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    /// The client is told why.
    #[error("{}", .0.message)]
    Refused(ServerError),
    /// A cancel request, which is never answered.
    #[error("cancel request")]
    Cancel,
    /// TLS was begun without asking; there is none here.
    #[error("direct TLS connection refused: TLS is not configured")]
    DirectTls,
    #[error("could not accept SSL connection: {}", chain(.0))]
    Tls(#[from] TlsError),
    #[error("could not generate random bytes")]
    Random,
    #[error(transparent)]
    Connection(#[from] ConnectionError),
}

impl From<ServerError> for HandshakeError {
    fn from(error: ServerError) -> Self {
        Self::Refused(error)
    }
}

/// One client's way in.
pub(super) struct Handshake<'a, S> {
    pub(super) context: &'a DownstreamContext,
    pub(super) connection: &'a mut Connection<S>,
    pub(super) peer: &'a Peer,
}

impl<S: Stream> Handshake<'_, S> {
    /// Goes all the way. The last messages of the dialogue are left to be sent by the caller.
    pub(super) async fn run(mut self) -> Result<Established, HandshakeError> {
        let (startup, encryption) = self.startup().await?;
        let mode = startup.replication();
        let link = mode.as_ref().ok().and_then(|mode| self.context.links.accept(&startup, *mode));
        let granted: &[&str] = if link.is_some() { &[OFFER_PARAMETER] } else { &[] };
        let negotiation = startup.negotiate(granted).map_err(ServerError::from)?;
        let mode = mode.map_err(ServerError::from)?;
        if let Some(answer) = negotiation.answer {
            self.connection.outgoing.encode(|out| backend::encode_negotiate_protocol_version(&answer, out));
        }
        let user = startup.user().ok_or_else(|| {
            let text = "no PostgreSQL user name specified in startup packet";
            ServerError::fatal(SqlState::INVALID_AUTHORIZATION_SPECIFICATION, text)
        })?;
        let identity = Identity { user, startup: &startup, mode, peer: self.peer, encryption: &encryption };
        if mode == ReplicationMode::Off {
            return Err(identity.no_entry().with_detail(NO_SQL_DETAIL).into());
        }
        let server = Server::of(self.context).ok_or_else(|| {
            ServerError::fatal(SqlState::CANNOT_CONNECT_NOW, "the database system is starting up")
        })?;
        self.authenticate(&identity).await?;
        let client = Client {
            user: user.to_owned(),
            application_name: clean_ascii(&startup.application_name(), &server),
            peer: self.peer.clone(),
        };
        let registration = self.register(client, negotiation.version, &server)?;
        let settings = startup.settings();
        let own_timeout = settings.get("wal_sender_timeout").and_then(|text| parse_timeout(text));
        let client_encoding = settings.get("client_encoding");
        Ok(Established {
            registration,
            client_encoding: client_encoding.map_or("UTF8".to_owned(), |text| clean_ascii(text, &server)),
            server,
            version: negotiation.version,
            database: (mode == ReplicationMode::Database)
                .then(|| startup.database().unwrap_or_default().to_owned()),
            wal_sender_timeout: own_timeout.unwrap_or(self.context.settings.wal_sender_timeout),
            link,
        })
    }

    /// Reads up to the startup packet. Encryption may be asked for before, once of each kind.
    async fn startup(&mut self) -> Result<(Startup, Encryption), HandshakeError> {
        let mut encryption = self.direct_tls().await?;
        let (mut has_asked_ssl, mut has_asked_gss) = (encryption != Encryption::None, false);
        loop {
            match self.first_packet().await? {
                FirstPacket::Startup(startup) => return Ok((startup, encryption)),
                FirstPacket::Cancel(request) => {
                    self.context.registry.cancel(&request);
                    return Err(HandshakeError::Cancel);
                }
                FirstPacket::SslRequest if !has_asked_ssl => {
                    has_asked_ssl = true;
                    if let Some(facts) = self.requested_tls().await? {
                        encryption = Encryption::Tls(facts);
                        // There is nothing left to protect.
                        has_asked_gss = true;
                    }
                }
                FirstPacket::GssEncRequest if !has_asked_gss => {
                    has_asked_gss = true;
                    self.answer_encryption(b"N", "received unencrypted data after GSSAPI encryption request")
                        .await?;
                }
                // Asked for again, it is taken for a protocol version, as PostgreSQL does.
                FirstPacket::SslRequest => return Err(unsupported(SSL_REQUEST_AS_VERSION)),
                FirstPacket::GssEncRequest => return Err(unsupported(GSSENC_REQUEST_AS_VERSION)),
            }
        }
    }

    /// Looks at the very first byte: TLS may begin without asking (since PostgreSQL 17).
    async fn direct_tls(&mut self) -> Result<Encryption, HandshakeError> {
        while self.connection.incoming().is_empty() {
            self.connection.fill().await?;
        }
        if self.connection.incoming().first() != Some(&TLS_HANDSHAKE_RECORD) {
            return Ok(Encryption::None);
        }
        let Some(tls) = self.tls() else {
            self.connection.outgoing.encode(|out| out.extend_from_slice(&TLS_HANDSHAKE_FAILURE));
            self.connection.flush().await.map_err(ConnectionError::Io)?;
            return Err(HandshakeError::DirectTls);
        };
        Ok(Encryption::Tls(self.connection.accept_tls(&tls, TlsStart::Direct).await?))
    }

    /// TLS was asked for; `None`: there is none here.
    async fn requested_tls(&mut self) -> Result<Option<TlsFacts>, HandshakeError> {
        const STUFFED: &str = "received unencrypted data after SSL request";
        let Some(tls) = self.tls() else {
            self.answer_encryption(b"N", STUFFED).await?;
            return Ok(None);
        };
        self.answer_encryption(b"S", STUFFED).await?;
        Ok(Some(self.connection.accept_tls(&tls, TlsStart::Requested).await?))
    }

    /// What TLS is spoken with, if it is over this connection.
    fn tls(&self) -> Option<Arc<ServerTls>> {
        self.context.tls.clone().filter(|_| self.connection.may_be_encrypted())
    }

    async fn first_packet(&mut self) -> Result<FirstPacket, HandshakeError> {
        loop {
            match FirstPacket::decode(self.connection.incoming()) {
                Ok(Some(packet)) => return Ok(packet),
                Ok(None) => self.connection.fill().await?,
                // Whoever sent that does not speak the protocol and gets no answer.
                Err(error @ (DecodeError::InvalidLength { .. } | DecodeError::TooLong { .. })) => {
                    return Err(ConnectionError::Protocol(error).into());
                }
                Err(_) => {
                    let text = "invalid startup packet layout: expected terminator as last byte";
                    return Err(ServerError::fatal(SqlState::PROTOCOL_VIOLATION, text).into());
                }
            }
        }
    }

    /// Bytes that came with the request cannot belong to what follows the answer: somebody put them there.
    async fn answer_encryption(
        &mut self,
        answer: &[u8; 1],
        stuffed: &'static str,
    ) -> Result<(), HandshakeError> {
        self.connection.outgoing.encode(|out| out.extend_from_slice(answer));
        self.connection.flush().await.map_err(ConnectionError::Io)?;
        if self.connection.incoming().is_empty() {
            return Ok(());
        }
        Err(ServerError::fatal(SqlState::PROTOCOL_VIOLATION, stuffed).with_detail(STUFFED_DETAIL).into())
    }

    /// Without a users file only this machine's own clients are let in.
    async fn authenticate(&mut self, identity: &Identity<'_>) -> Result<(), HandshakeError> {
        match &self.context.authentication {
            Authentication::Scram(users) => {
                let credentials = users.credentials(identity.user);
                self.authenticate_by_scram(credentials, identity).await?;
            }
            Authentication::TrustLocal if self.peer.is_local() => {}
            Authentication::TrustLocal => return Err(identity.no_entry().into()),
        }
        self.connection.outgoing.encode(|out| encode_authentication(&Request::Ok, out));
        Ok(())
    }

    async fn authenticate_by_scram(
        &mut self,
        credentials: scram::Credentials,
        identity: &Identity<'_>,
    ) -> Result<(), HandshakeError> {
        let refuse = |error: ServerScramError| HandshakeError::Refused(error.to_server_error(identity.user));
        let server = scram::Server::new(credentials, identity.encryption.binding());
        let mechanisms = server.mechanisms().iter().map(|&mechanism| mechanism.to_owned()).collect();
        self.ask(&Request::Sasl(mechanisms)).await?;
        let (mechanism, first) = self.password().await?.sasl_initial().map_err(malformed)?;
        let first = match first {
            Some(first) => first,
            None => {
                self.ask(&Request::SaslContinue(bytes::Bytes::new())).await?;
                self.password().await?.sasl().clone()
            }
        };
        let (state, reply) = server.handle(&mechanism, &first, random::<NONCE_BYTES>()?).map_err(refuse)?;
        self.ask(&Request::SaslContinue(reply.into())).await?;
        let reply = state.handle(self.password().await?.sasl()).map_err(refuse)?;
        self.connection.outgoing.encode(|out| encode_authentication(&Request::SaslFinal(reply.into()), out));
        Ok(())
    }

    async fn ask(&mut self, request: &Request) -> Result<(), ConnectionError> {
        self.connection.outgoing.encode(|out| encode_authentication(request, out));
        Ok(self.connection.flush().await?)
    }

    async fn password(&mut self) -> Result<frontend::Password, HandshakeError> {
        match self.connection.read_message(PASSWORD_BYTES_MAX).await? {
            frontend::Message::Password(password) => Ok(password),
            other => {
                let text = format!("expected SASL response, got message type {}", tag_of(&other));
                Err(ServerError::fatal(SqlState::PROTOCOL_VIOLATION, text).into())
            }
        }
    }

    fn register(
        &self,
        client: Client,
        version: ProtocolVersion,
        server: &Server,
    ) -> Result<Registration, HandshakeError> {
        let key = random::<CANCEL_KEY_BYTES>()?;
        let key = key.get(..version.cancel_key_bytes()).unwrap_or(&key);
        let key = CancelKey::new(key.to_vec()).ok_or(HandshakeError::Random)?;
        let sessions_max = self.context.settings.max_wal_senders;
        self.context.registry.register(client, key, sessions_max).map_err(|TooManySessions| {
            let setting = server.quoted_setting("max_wal_senders");
            let text = format!(
                "number of requested standby connections exceeds {setting} (currently {sessions_max})"
            );
            ServerError::fatal(SqlState::TOO_MANY_CONNECTIONS, text).into()
        })
    }
}

/// An error and its cause in one line.
fn chain(error: &TlsError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Who asks to come in, and how.
struct Identity<'a> {
    user: &'a str,
    startup: &'a Startup,
    mode: ReplicationMode,
    peer: &'a Peer,
    encryption: &'a Encryption,
}

impl Identity<'_> {
    /// What PostgreSQL says when no line of `pg_hba.conf` fits.
    fn no_entry(&self) -> ServerError {
        let host = match self.peer {
            Peer::Tcp(address) => address.ip().to_string(),
            Peer::Unix => "[local]".to_owned(),
        };
        let Self { user, .. } = self;
        let encryption = match self.encryption {
            Encryption::None => "no encryption",
            Encryption::Tls(_) => "SSL encryption",
        };
        let text = match self.mode {
            ReplicationMode::Physical => format!(
                "no pg_hba.conf entry for replication connection from host \"{host}\", user \"{user}\", {encryption}"
            ),
            ReplicationMode::Off | ReplicationMode::Database => {
                let database = self.startup.database().unwrap_or_default();
                format!(
                    "no pg_hba.conf entry for host \"{host}\", user \"{user}\", database \"{database}\", {encryption}"
                )
            }
        };
        ServerError::fatal(SqlState::INVALID_AUTHORIZATION_SPECIFICATION, text)
    }
}

fn malformed(error: DecodeError) -> HandshakeError {
    ServerError::from(&error).into()
}

fn unsupported(version: ProtocolVersion) -> HandshakeError {
    ServerError::from(UnsupportedProtocol(version)).into()
}

fn random<const BYTES: usize>() -> Result<[u8; BYTES], HandshakeError> {
    let mut bytes = [0; BYTES];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| HandshakeError::Random)?;
    Ok(bytes)
}

const NO_SQL_DETAIL: &str =
    "This server relays WAL: it accepts replication connections only. Connect to the primary for SQL.";
const STUFFED_DETAIL: &str =
    "This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.";

/// First byte of a TLS handshake record: sent without asking by `sslnegotiation=direct`.
const TLS_HANDSHAKE_RECORD: u8 = 0x16;
/// A fatal TLS alert, `handshake_failure`: what a TLS client understands.
const TLS_HANDSHAKE_FAILURE: [u8; 7] = [0x15, 0x03, 0x01, 0x00, 0x02, 0x02, 0x28];

/// The request codes, read as versions.
const SSL_REQUEST_AS_VERSION: ProtocolVersion = ProtocolVersion { major: 1234, minor: 5679 };
const GSSENC_REQUEST_AS_VERSION: ProtocolVersion = ProtocolVersion { major: 1234, minor: 5680 };

/// Bytes of the longest cancel key that is given out (3.2).
const CANCEL_KEY_BYTES: usize = 32;
