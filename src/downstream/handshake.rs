//! From the first byte to a session: encryption, startup packet, protocol version, authentication.
//!
//! Owns the order of these steps and their refusals. A straight dialogue: the caller bounds its time. Nothing of the store
//! is told before the client is known, but whether there is a server at all. Errors are PostgreSQL's, and a client that
//! never completes a startup packet gets none, as there.

use std::{sync::Arc, time::Duration};

use crate::access::{Applicant, Grant, Permissions};
use crate::downstream::{
    DownstreamContext,
    attempt::Attempt,
    authenticate::Authenticator,
    commands::no_walsender,
    connection::{Connection, ConnectionError, Stream},
    link::AcceptedLink,
    parameters::{clean_ascii, parse_timeout},
    registry::{Client, Registration, SessionLimits, TooManySessions},
    server::Server,
};
use crate::net::tls::{ServerTls, TlsError, TlsStart};
use crate::net::{Peer, TlsFacts, interfaces};
use crate::protocol::{
    DecodeError, ServerError, SqlState,
    backend::{self, Authentication as Request, encode_authentication},
    frontend::{CancelKey, FirstPacket, ProtocolVersion, ReplicationMode, Startup, UnsupportedProtocol},
    link::offer::OFFER_PARAMETER,
};

pub(super) use crate::net::Encryption;

/// A client that is known, and what it asked for.
#[derive(Debug)]
pub(super) struct Established {
    pub(super) registration: Registration,
    /// What it may do.
    pub(super) may: Permissions,
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
    /// The client has not proved who it is. It is told so, but not at once when that happens often.
    #[error("{}", told.message)]
    Denied {
        /// As whom it wanted to come in.
        user: String,
        /// What it is told.
        told: ServerError,
    },
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
    /// The operating system's user at the other end of a Unix socket.
    pub(super) peer_user_id: Option<u32>,
    /// What the log will say.
    pub(super) attempt: &'a mut Attempt,
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
        let access = self.context.access.load_full();
        let database = startup.database().unwrap_or_default();
        let applicant =
            Applicant { origin: self.peer.origin(), wire: encryption.wire(), mode, database, user };
        self.attempt.began(&applicant);
        let rule = access.rule_for(&applicant, &interfaces);
        if mode == ReplicationMode::Off {
            rule?;
            return Err(applicant.no_entry().with_detail(NO_SQL_DETAIL).into());
        }
        let server = Server::of(self.context).ok_or_else(|| {
            ServerError::fatal(SqlState::CANNOT_CONNECT_NOW, "the database system is starting up")
        })?;
        let rule = rule?;
        self.attempt.matched(rule);
        let authenticator = Authenticator {
            access: &access,
            rule,
            user,
            encryption: &encryption,
            peer_user_id: self.peer_user_id,
            mock_nonce: &self.context.mock_nonce,
            connection: &mut *self.connection,
            attempt: &mut *self.attempt,
        };
        authenticator.run().await?;
        self.connection.outgoing.encode(|out| encode_authentication(&Request::Ok, out));
        let Grant { may, connection_limit } = access.grant(user)?;
        if !may.allow_replication() {
            return Err(no_replication(user, &server).into());
        }
        let client = Client {
            user: user.to_owned(),
            application_name: clean_ascii(&startup.application_name(), &server),
            peer: self.peer.clone(),
        };
        let registration = self.register(client, connection_limit, negotiation.version, &server)?;
        let settings = startup.settings();
        let own_timeout = settings.get("wal_sender_timeout").and_then(|text| parse_timeout(text));
        let client_encoding = settings.get("client_encoding");
        Ok(Established {
            registration,
            may,
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

    fn register(
        &self,
        client: Client,
        connection_limit: Option<usize>,
        version: ProtocolVersion,
        server: &Server,
    ) -> Result<Registration, HandshakeError> {
        let key = random::<CANCEL_KEY_BYTES>()?;
        let key = key.get(..version.cancel_key_bytes()).unwrap_or(&key);
        let key = CancelKey::new(key.to_vec()).ok_or(HandshakeError::Random)?;
        let in_all = self.context.settings.max_wal_senders;
        let limits = SessionLimits { in_all, of_user: connection_limit };
        let user = client.user.clone();
        self.context.registry.register(client, key, limits).map_err(|too_many| {
            let text = match too_many {
                TooManySessions::InAll => {
                    let setting = server.quoted_setting("max_wal_senders");
                    format!("number of requested standby connections exceeds {setting} (currently {in_all})")
                }
                TooManySessions::OfUser => format!("too many connections for role \"{user}\""),
            };
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

/// For whom a session like this is of no use.
fn no_replication(user: &str, server: &Server) -> ServerError {
    let detail = format!(
        "User \"{user}\" has none of the permissions \"stream\", \"base_backup\", and \"sql\" on this relay."
    );
    ServerError::fatal(SqlState::INSUFFICIENT_PRIVILEGE, no_walsender(server)).with_detail(detail)
}

fn unsupported(version: ProtocolVersion) -> HandshakeError {
    ServerError::from(UnsupportedProtocol(version)).into()
}

pub(super) fn random<const BYTES: usize>() -> Result<[u8; BYTES], HandshakeError> {
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
