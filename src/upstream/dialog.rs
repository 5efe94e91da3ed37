//! Talking to the upstream before WAL flows: one command, one answer.
//!
//! Owns the socket and what was read from it but not used. Every answer has a deadline and a limit of rows; every message
//! has the limit that `protocol` gives it. Knows nothing of what the answers mean.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::{io::AsyncReadExt, time::timeout};

use crate::net::{Socket, send_all};
use crate::protocol::{
    Command,
    backend::{self, DataRow, Message},
    frontend::{self, encode_query},
    link::Compression,
};
use crate::upstream::UpstreamError;

/// A connection on which commands are answered.
pub(crate) struct Dialog {
    socket: Socket,
    input: BytesMut,
    /// What the server said of itself.
    pub(crate) introduction: Introduction,
}

/// What a server says of itself at the login.
#[derive(Clone, Debug, Default)]
pub(crate) struct Introduction {
    /// Settings that it reported.
    pub(crate) parameters: BTreeMap<String, String>,
    /// Its process for this connection.
    pub(crate) process_id: Option<u32>,
    /// Protocol extensions that it does not know, or does not grant.
    pub(crate) declined: Vec<String>,
    /// The link that it granted.
    pub(crate) link: Option<Compression>,
}

impl Dialog {
    pub(crate) fn new(socket: Socket) -> Self {
        Self { socket, input: BytesMut::new(), introduction: Introduction::default() }
    }

    /// Goes on after a copy that the server has ended: ends it too, and reads what the server says of it.
    pub(crate) async fn after_copy(
        socket: Socket,
        input: BytesMut,
        mut introduction: Introduction,
    ) -> Result<Self, UpstreamError> {
        // The one thing that may have changed unheard while WAL flowed.
        introduction.parameters.remove("in_hot_standby");
        let mut dialog = Self { socket, input, introduction };
        dialog.send(|output| frontend::Message::CopyDone.encode(output)).await?;
        loop {
            match dialog.receive().await? {
                Message::RowDescription(_) | Message::DataRow(_) | Message::CommandComplete(_) => {}
                Message::ErrorResponse(error) => return Err(UpstreamError::Server(Box::new(error))),
                Message::ReadyForQuery(_) => return Ok(dialog),
                other => return Err(UpstreamError::Unexpected(format!("{other:?}"))),
            }
        }
    }

    /// Sends what `encode` appends.
    pub(crate) async fn send(&mut self, encode: impl FnOnce(&mut BytesMut)) -> Result<(), UpstreamError> {
        let mut output = BytesMut::new();
        encode(&mut output);
        within_answer_time(send_all(&mut self.socket, &mut output)).await
    }

    /// The next message; settings and notices are taken care of on the way.
    pub(crate) async fn receive(&mut self) -> Result<Message, UpstreamError> {
        loop {
            match Message::decode(&mut self.input)? {
                Some(Message::ParameterStatus { name, value })
                    if self.introduction.parameters.len() < PARAMETERS_MAX =>
                {
                    self.introduction.parameters.insert(name, value);
                }
                Some(Message::ParameterStatus { .. } | Message::NoticeResponse(_)) => {}
                Some(message) => return Ok(message),
                None => {
                    let read = within_answer_time(self.socket.read_buf(&mut self.input)).await?;
                    if read == 0 {
                        return Err(UpstreamError::Closed);
                    }
                }
            }
        }
    }

    /// Sends a command whose answer is rows (or none), and waits until the next may be sent.
    pub(crate) async fn query(&mut self, command: &Command) -> Result<Vec<DataRow>, UpstreamError> {
        self.query_text(&command.to_string()).await
    }

    /// The same for SQL, where the connection understands it.
    pub(crate) async fn query_text(&mut self, text: &str) -> Result<Vec<DataRow>, UpstreamError> {
        self.send(|output| encode_query(text, output)).await?;
        let mut rows = Vec::new();
        let mut failed = None;
        loop {
            match self.receive().await? {
                Message::RowDescription(_) | Message::CommandComplete(_) | Message::EmptyQueryResponse => {}
                Message::DataRow(row) if rows.len() < ROWS_MAX => rows.push(row),
                Message::ErrorResponse(error) => failed = Some(error),
                Message::ReadyForQuery(_) => break,
                other => return Err(UpstreamError::Unexpected(format!("{other:?}"))),
            }
        }
        match failed {
            Some(error) => Err(UpstreamError::Server(Box::new(error))),
            None => Ok(rows),
        }
    }

    /// The single value of a `SHOW`.
    pub(crate) async fn show(&mut self, name: &str) -> Result<String, UpstreamError> {
        let rows = self.query(&Command::Show(name.to_owned())).await?;
        let value = rows.first().and_then(|row| row.text(0)).map(str::to_owned);
        value.ok_or_else(|| UpstreamError::InvalidAnswer {
            command: "SHOW",
            field: "value",
            value: name.to_owned(),
        })
    }

    /// Sends START_REPLICATION; on success the copy has begun and the dialog is over.
    pub(crate) async fn start_copy(mut self, command: &Command) -> Result<(Socket, Bytes), StartCopyError> {
        self.send(|output| encode_query(&command.to_string(), output)).await?;
        match self.receive().await? {
            Message::CopyBothResponse(_) => Ok((self.socket, self.input.split().freeze())),
            Message::ErrorResponse(error) => {
                // The server is ready again after this; the dialog can go on.
                while !matches!(self.receive().await?, Message::ReadyForQuery(_)) {}
                Err(StartCopyError::Refused(Box::new(self), Box::new(error)))
            }
            Message::RowDescription(_) => Err(StartCopyError::TimelineEndsHere),
            other => Err(UpstreamError::Unexpected(format!("{other:?}")).into()),
        }
    }

    /// Starts a copy only to send these messages, and ends it. What the server sends meanwhile is not looked at.
    pub(crate) async fn say_in_copy(&mut self, command: &Command, said: &[u8]) -> Result<(), UpstreamError> {
        self.send(|output| encode_query(&command.to_string(), output)).await?;
        let mut failed = None;
        loop {
            match self.receive().await? {
                Message::CopyBothResponse(_) => {
                    let say = |output: &mut BytesMut| {
                        output.extend_from_slice(said);
                        frontend::Message::CopyDone.encode(output);
                    };
                    self.send(say).await?;
                }
                Message::CopyData(_) | Message::CopyDone | Message::CommandComplete(_) => {}
                Message::RowDescription(_) | Message::DataRow(_) => {}
                Message::ErrorResponse(error) => failed = Some(error),
                Message::ReadyForQuery(_) => break,
                other => return Err(UpstreamError::Unexpected(format!("{other:?}"))),
            }
        }
        failed.map_or(Ok(()), |error| Err(UpstreamError::Server(Box::new(error))))
    }

    /// Ends the session politely.
    pub(crate) async fn terminate(mut self) {
        // The server may be gone already.
        let _ = self.send(|output| frontend::Message::Terminate.encode(output)).await;
    }
}

/// START_REPLICATION did not start a copy.
pub(crate) enum StartCopyError {
    /// The server said no; the dialog can go on.
    Refused(Box<Dialog>, Box<backend::ServerError>),
    /// The timeline ends where the stream was to begin.
    TimelineEndsHere,
    /// The connection is of no more use.
    Failed(UpstreamError),
}

impl From<UpstreamError> for StartCopyError {
    fn from(error: UpstreamError) -> Self {
        Self::Failed(error)
    }
}

async fn within_answer_time<T>(
    operation: impl Future<Output = std::io::Result<T>>,
) -> Result<T, UpstreamError> {
    match timeout(ANSWER_TIME_MAX, operation).await {
        Ok(outcome) => outcome.map_err(UpstreamError::of_io),
        Err(_) => Err(UpstreamError::Io(std::io::ErrorKind::TimedOut.into())),
    }
}

/// Longest wait for the next bytes of an answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// Rows read of one answer; replication commands answer with one.
const ROWS_MAX: usize = 16;

/// Reported settings kept; PostgreSQL 18 reports 15.
const PARAMETERS_MAX: usize = 64;
