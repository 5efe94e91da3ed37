//! A session after its handshake: takes one message after another, and answers.
//!
//! Owns the session's life: its temporary slots, its place in the registry, and the rules of the simple query protocol
//! around the commands. One query is answered and sent before the next is looked at, so that a client that asks without
//! reading costs no memory. What a command does is in `commands`.

use std::{future::pending, time::Duration};

use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::access::Permissions;
use crate::downstream::{
    DownstreamContext,
    commands::{self, Answered, CommandError},
    connection::{Connection, ConnectionError, Stream},
    handshake::Established,
    link::AcceptedLink,
    parameters::{Parameters, Writable},
    registry::Registration,
    server::Server,
};
use crate::protocol::{
    QUERY_BYTES_MAX, ServerError, SqlState,
    backend::{TransactionStatus, encode_backend_key_data, encode_error_response, encode_ready_for_query},
    frontend::Message,
};
use crate::session::sender::STOPPING_TIME_MAX;
use crate::store::Positions;
use crate::wal::Lsn;

/// A session.
pub(super) struct Session<'a, S> {
    pub(super) context: &'a DownstreamContext,
    pub(super) connection: Connection<S>,
    pub(super) registration: Registration,
    /// What the user may do.
    pub(super) may: Permissions,
    pub(super) server: Server,
    pub(super) stop: &'a CancellationToken,
    pub(super) database: Option<String>,
    pub(super) client_encoding: String,
    pub(super) wal_sender_timeout: Option<Duration>,
    pub(super) link: Option<AcceptedLink>,
    /// Servers up to 14 do not stream before this.
    pub(super) has_identified: bool,
    shown_writable: Writable,
    /// After an error in the extended protocol everything is skipped up to Sync.
    is_skipping: bool,
}

/// How a session ended, where that is no fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SessionEnd {
    /// The client said farewell, or just left.
    ClientLeft,
    /// The client was silent for too long, or took nothing.
    ClientSilent,
    /// The client was told to leave.
    Terminated,
    /// The relay stops.
    StopRequested,
}

impl<'a, S: Stream> Session<'a, S> {
    pub(super) fn new(
        context: &'a DownstreamContext,
        connection: Connection<S>,
        established: Established,
        stop: &'a CancellationToken,
    ) -> Self {
        let Established {
            registration,
            may,
            server,
            version: _,
            database,
            client_encoding,
            wal_sender_timeout,
            link,
        } = established;
        let shown_writable = Writable::of(context);
        let (has_identified, is_skipping) = (false, false);
        Self {
            context,
            connection,
            registration,
            may,
            server,
            stop,
            database,
            client_encoding,
            wal_sender_timeout,
            link,
            has_identified,
            shown_writable,
            is_skipping,
        }
    }

    /// End of what this client may be sent now.
    pub(super) fn servable(&self, positions: &Positions) -> Lsn {
        self.context.settings.servable(&self.registration.client().application_name, positions)
    }

    /// Serves the client until one of the two has enough.
    pub(super) async fn run(mut self) -> Result<SessionEnd, ConnectionError> {
        self.greet();
        loop {
            if !self.send().await? {
                return Ok(SessionEnd::ClientSilent);
            }
            let message = tokio::select! {
                message = self.connection.read_message(QUERY_BYTES_MAX) => message,
                () = self.stop.cancelled() => return self.terminate(&administrator_command()).await,
                () = self.registration.terminated() => {
                    return self.terminate(&administrator_command()).await;
                }
            };
            let ended = match message {
                Ok(message) => self.take(message).await?,
                Err(ConnectionError::Closed) => Some(SessionEnd::ClientLeft),
                Err(ConnectionError::Protocol(error)) => {
                    info!(%error, "client broke the protocol");
                    return self.terminate(&ServerError::from(&error)).await;
                }
                Err(error @ ConnectionError::Io(_)) => return Err(error),
            };
            if let Some(end) = ended {
                return Ok(end);
            }
        }
    }

    /// The last messages of the start: settings, the session's number and key, and that it is ready.
    fn greet(&mut self) {
        let mut out = bytes::BytesMut::new();
        self.parameters().encode(self.shown_writable, &mut out);
        encode_backend_key_data(self.registration.pid(), self.registration.cancel_key(), &mut out);
        encode_ready_for_query(TransactionStatus::Idle, &mut out);
        self.connection.outgoing.encode(|outgoing| outgoing.unsplit(out));
    }

    async fn take(&mut self, message: Message) -> Result<Option<SessionEnd>, ConnectionError> {
        match message {
            Message::Terminate => return Ok(Some(SessionEnd::ClientLeft)),
            Message::Sync => {
                self.is_skipping = false;
                self.ready();
            }
            _ if self.is_skipping => {}
            Message::Query(query) => return self.query(&query).await,
            // The rest of a copy whose failure the client has not heard of yet.
            Message::CopyData(_) | Message::CopyDone | Message::CopyFail(_) | Message::Flush => {}
            Message::Extended(_) => {
                self.is_skipping = true;
                let text = "extended query protocol not supported in a replication connection";
                self.fail(&ServerError::error(SqlState::PROTOCOL_VIOLATION, text));
            }
            Message::FunctionCall => {
                let text = "fastpath function calls not supported in a replication connection";
                self.fail(&ServerError::error(SqlState::PROTOCOL_VIOLATION, text));
                self.ready();
            }
            Message::Password(_) => {
                let text = "invalid frontend message type 112";
                return self
                    .terminate(&ServerError::fatal(SqlState::PROTOCOL_VIOLATION, text))
                    .await
                    .map(Some);
            }
        }
        Ok(None)
    }

    async fn query(&mut self, query: &[u8]) -> Result<Option<SessionEnd>, ConnectionError> {
        match commands::answer(self, query).await {
            Ok(Answered::Complete) => {}
            Ok(Answered::Ended(end)) => return Ok(Some(end)),
            Err(CommandError::Refused(error)) => {
                debug!(error = ?error.message, "command refused");
                self.fail(&error);
            }
            Err(CommandError::Fatal(error)) => {
                info!(error = ?error.message, "session ended by an error");
                return self.terminate(&error).await.map(Some);
            }
            Err(CommandError::Connection(ConnectionError::Closed)) => {
                return Ok(Some(SessionEnd::ClientLeft));
            }
            Err(CommandError::Connection(error)) => return Err(error),
        }
        self.registration.reset();
        self.ready();
        Ok(None)
    }

    /// Says what went wrong. As in PostgreSQL an error takes the session's temporary slots with it.
    fn fail(&mut self, error: &ServerError) {
        self.context.store.slots().drop_temporary(self.registration.pid());
        self.connection.outgoing.encode(|out| encode_error_response(error, out));
    }

    fn ready(&mut self) {
        let writable = Writable::of(self.context);
        if writable != self.shown_writable {
            self.shown_writable = writable;
            let mut out = bytes::BytesMut::new();
            self.parameters().encode_change(writable, &mut out);
            self.connection.outgoing.encode(|outgoing| outgoing.unsplit(out));
        }
        self.connection.outgoing.encode(|out| encode_ready_for_query(TransactionStatus::Idle, out));
    }

    /// Says why the connection is closed, and closes it.
    async fn terminate(&mut self, error: &ServerError) -> Result<SessionEnd, ConnectionError> {
        self.connection.outgoing.encode(|out| encode_error_response(error, out));
        // A client that takes nothing is not waited for: others may wait for what it holds.
        if let Ok(sent) = tokio::time::timeout(STOPPING_TIME_MAX, self.send()).await {
            sent?;
        }
        Ok(SessionEnd::Terminated)
    }

    /// Sends what waits. False when the client takes nothing for as long as a standby may be silent.
    async fn send(&mut self) -> Result<bool, ConnectionError> {
        let silence = async {
            match self.wal_sender_timeout {
                Some(timeout) => tokio::time::sleep(timeout).await,
                None => pending().await,
            }
        };
        tokio::select! {
            sent = self.connection.flush() => Ok(sent.map(|()| true)?),
            () = silence => Ok(false),
        }
    }

    pub(super) fn parameters(&self) -> Parameters<'_> {
        Parameters {
            context: self.context,
            server: &self.server,
            client: self.registration.client(),
            client_encoding: &self.client_encoding,
            wal_sender_timeout: self.wal_sender_timeout,
            link: self.link,
        }
    }
}

/// The session is ended by the relay.
pub(super) fn administrator_command() -> ServerError {
    ServerError::fatal(SqlState::ADMIN_SHUTDOWN, "terminating connection due to administrator command")
}

impl<S> Drop for Session<'_, S> {
    fn drop(&mut self) {
        self.context.store.slots().drop_temporary(self.registration.pid());
    }
}
