//! A hand-written client of PostgreSQL's protocol: plain SQL for the tests, replication commands, and hostile bytes.
//!
//! Shares nothing with `src/protocol`, on purpose. Blocking, with a deadline on every read.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::{lsn, lsn_text};

const READ_LIMIT: Duration = Duration::from_secs(30);

/// One message from the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) kind: u8,
    pub(crate) body: Vec<u8>,
}

/// What an ErrorResponse says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ServerError {
    pub(crate) severity: String,
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) detail: String,
}

/// What arrives inside a stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Wal {
        start: u64,
        wal_end: u64,
        bytes: Vec<u8>,
    },
    Keepalive {
        wal_end: u64,
        reply_requested: bool,
    },
    /// Anything that is not CopyData, for instance the end of the stream.
    Other(Message),
    Silence,
    Closed,
}

#[derive(Debug)]
pub(crate) struct RawClient {
    stream: TcpStream,
    received: Vec<u8>,
    /// ParameterStatus messages of the login.
    pub(crate) parameters: BTreeMap<String, String>,
}

impl RawClient {
    /// Connects and sends nothing.
    pub(crate) fn connect(port: u16) -> Result<Self> {
        let stream = super::place::connect(port)?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(READ_LIMIT))?;
        Ok(Self { stream, received: Vec::new(), parameters: BTreeMap::new() })
    }

    /// A physical replication connection that may send commands.
    pub(crate) fn replication(port: u16) -> Result<Self> {
        Self::login(port, &[("user", "postgres"), ("replication", "true"), ("application_name", "raw")])
    }

    /// A connection for SQL.
    pub(crate) fn sql(port: u16) -> Result<Self> {
        Self::login(port, &[("user", "postgres"), ("database", "postgres"), ("application_name", "test_sql")])
    }

    /// Connects, sends these startup parameters, and waits until the server is ready. No password.
    pub(crate) fn login(port: u16, parameters: &[(&str, &str)]) -> Result<Self> {
        let mut client = Self::connect(port)?;
        client.send_startup(parameters)?;
        for message in client.until_ready()? {
            match message.kind {
                b'S' => {
                    let mut texts = message
                        .body
                        .split(|byte| *byte == 0)
                        .map(|text| String::from_utf8_lossy(text).into_owned());
                    client
                        .parameters
                        .insert(texts.next().unwrap_or_default(), texts.next().unwrap_or_default());
                }
                b'E' => return Err(Error::other(format!("{:?}", ServerError::of(&message)))),
                _ => {}
            }
        }
        Ok(client)
    }

    pub(crate) fn send_startup(&mut self, parameters: &[(&str, &str)]) -> Result<()> {
        let mut body = 196_608_u32.to_be_bytes().to_vec();
        for (name, value) in parameters {
            for text in [name, value] {
                body.extend(text.bytes());
                body.push(0);
            }
        }
        body.push(0);
        let mut packet = u32::try_from(body.len() + 4).unwrap().to_be_bytes().to_vec();
        packet.extend(body);
        self.send_bytes(&packet)
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes)
    }

    pub(crate) fn send(&mut self, kind: u8, body: &[u8]) -> Result<()> {
        let mut message = vec![kind];
        message.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        message.extend(body);
        self.send_bytes(&message)
    }

    /// Sends a simple query and returns all that is answered, up to ReadyForQuery.
    pub(crate) fn query(&mut self, text: &str) -> Result<Vec<Message>> {
        self.send_query(text)?;
        self.until_ready()
    }

    pub(crate) fn send_query(&mut self, text: &str) -> Result<()> {
        let mut body = text.as_bytes().to_vec();
        body.push(0);
        self.send(b'Q', &body)
    }

    /// The rows of a query, or its error.
    pub(crate) fn rows(&mut self, text: &str) -> std::result::Result<Vec<Vec<Option<String>>>, ServerError> {
        let answer = self
            .query(text)
            .map_err(|error| ServerError { message: error.to_string(), ..ServerError::default() })?;
        match error_in(&answer) {
            Some(error) => Err(error),
            // A server that died in between has confirmed nothing.
            None if answer.last().is_none_or(|message| message.kind != b'Z') => {
                let message = "the connection ended before the answer did".to_owned();
                Err(ServerError { message, ..ServerError::default() })
            }
            None => Ok(rows_of(&answer)),
        }
    }

    /// Sends START_REPLICATION and returns the answers up to CopyBothResponse, or up to ReadyForQuery when refused.
    pub(crate) fn start_replication(
        &mut self,
        slot: Option<&str>,
        from: u64,
        timeline: u32,
    ) -> Result<Vec<Message>> {
        let version = self.parameters.get("server_version").map_or("", String::as_str);
        if version.starts_with("13.") || version.starts_with("14.") {
            // These refuse to stream otherwise.
            self.query("IDENTIFY_SYSTEM")?;
        }
        let slot = slot.map(|name| format!("SLOT \"{name}\" ")).unwrap_or_default();
        self.send_query(&format!("START_REPLICATION {slot}{} TIMELINE {timeline}", lsn_text(from)))?;
        let mut answers = Vec::new();
        loop {
            let message = self.expect_message()?;
            let kind = message.kind;
            answers.push(message);
            if matches!(kind, b'W' | b'Z') {
                return Ok(answers);
            }
        }
    }

    /// The next thing in a stream, waiting at most `limit`.
    pub(crate) fn next_event(&mut self, limit: Duration) -> Event {
        match self.read_message(limit) {
            Ok(Some(message)) if message.kind == b'd' => copy_event(message),
            Ok(Some(message)) => Event::Other(message),
            Ok(None) => Event::Closed,
            Err(error) if error.kind() == ErrorKind::TimedOut => Event::Silence,
            Err(_) => Event::Closed,
        }
    }

    /// Reads WAL until `upto` and returns it. Panics when it has a gap or ends early; answers keepalives.
    pub(crate) fn read_wal(&mut self, from: u64, upto: u64) -> Vec<u8> {
        let mut wal = Vec::new();
        let mut position = from;
        // Keepalives alone do not prolong it.
        let mut deadline = Instant::now() + READ_LIMIT;
        while position < upto {
            match self.next_event(deadline.saturating_duration_since(Instant::now())) {
                Event::Wal { start, bytes, .. } => {
                    deadline = Instant::now() + READ_LIMIT;
                    assert_eq!(
                        start,
                        position,
                        "a gap: {} instead of {}",
                        lsn_text(start),
                        lsn_text(position)
                    );
                    position += bytes.len() as u64;
                    wal.extend(bytes);
                }
                Event::Keepalive { reply_requested: true, .. } => {
                    self.send_status(position, position, 0).unwrap()
                }
                Event::Keepalive { .. } => {}
                other => panic!(
                    "the stream ended at {} (wanted {}): {other:?}",
                    lsn_text(position),
                    lsn_text(upto)
                ),
            }
        }
        wal
    }

    /// A standby status update without a request for a reply.
    pub(crate) fn send_status(&mut self, write: u64, flush: u64, apply: u64) -> Result<()> {
        let mut body = vec![b'r'];
        for value in [write, flush, apply, 0] {
            body.extend(value.to_be_bytes());
        }
        body.push(0);
        self.send(b'd', &body)
    }

    /// Hot standby feedback: what is held back, as ids and their epochs.
    pub(crate) fn send_feedback(&mut self, xmin: (u32, u32), catalog_xmin: (u32, u32)) -> Result<()> {
        let mut body = vec![b'h'];
        body.extend(0_u64.to_be_bytes());
        for value in [xmin.0, xmin.1, catalog_xmin.0, catalog_xmin.1] {
            body.extend(value.to_be_bytes());
        }
        self.send(b'd', &body)
    }

    /// Everything up to and with ReadyForQuery, or up to the end of the connection.
    pub(crate) fn until_ready(&mut self) -> Result<Vec<Message>> {
        let mut messages = Vec::new();
        while let Some(message) = self.read_message(READ_LIMIT)? {
            let ready = message.kind == b'Z';
            messages.push(message);
            if ready {
                break;
            }
        }
        Ok(messages)
    }

    fn expect_message(&mut self) -> Result<Message> {
        self.read_message(READ_LIMIT)?.ok_or_else(|| ErrorKind::UnexpectedEof.into())
    }

    /// The next message; `None` when the server has closed. Fails with `TimedOut` when nothing comes.
    pub(crate) fn read_message(&mut self, limit: Duration) -> Result<Option<Message>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(length) = self.received.get(1..5) {
                let end = u32::from_be_bytes(length.try_into().unwrap()) as usize + 1;
                if self.received.len() >= end {
                    let rest = self.received.split_off(end);
                    let message = std::mem::replace(&mut self.received, rest);
                    return Ok(Some(Message { kind: message[0], body: message[5..].to_vec() }));
                }
            }
            if !self.receive(deadline)? {
                return Ok(None);
            }
        }
    }

    /// One raw byte, as the answer to an SSLRequest.
    pub(crate) fn read_byte(&mut self) -> Result<Option<u8>> {
        while self.received.is_empty() {
            if !self.receive(Instant::now() + READ_LIMIT)? {
                return Ok(None);
            }
        }
        Ok(Some(self.received.remove(0)))
    }

    /// Whether the server closes within the limit, whatever it says before.
    pub(crate) fn is_closed_within(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            match self.receive(deadline) {
                Ok(true) => {}
                Ok(false) => return true,
                Err(error) => return error.kind() != ErrorKind::TimedOut,
            }
        }
    }

    fn receive(&mut self, deadline: Instant) -> Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut chunk = vec![0; 256 * 1024];
        match self.stream.read(&mut chunk) {
            Ok(0) => Ok(false),
            Ok(length) => {
                self.received.extend_from_slice(&chunk[..length]);
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(ErrorKind::TimedOut.into()),
            Err(error) => Err(error),
        }
    }
}

impl ServerError {
    pub(crate) fn of(message: &Message) -> Self {
        let mut error = Self::default();
        for field in message.body.split(|byte| *byte == 0).filter(|field| !field.is_empty()) {
            let text = String::from_utf8_lossy(&field[1..]).into_owned();
            match field[0] {
                b'S' => error.severity = text,
                b'C' => error.code = text,
                b'M' => error.message = text,
                b'D' => error.detail = text,
                _ => {}
            }
        }
        error
    }
}

/// The first error in an answer.
pub(crate) fn error_in(messages: &[Message]) -> Option<ServerError> {
    messages.iter().find(|message| message.kind == b'E').map(ServerError::of)
}

pub(crate) fn rows_of(messages: &[Message]) -> Vec<Vec<Option<String>>> {
    messages.iter().filter(|message| message.kind == b'D').map(|message| row(&message.body)).collect()
}

/// Column names and type OIDs of the first RowDescription.
pub(crate) fn columns_of(messages: &[Message]) -> Vec<(String, u32)> {
    let Some(description) = messages.iter().find(|message| message.kind == b'T') else { return Vec::new() };
    let mut rest = &description.body[2..];
    let mut columns = Vec::new();
    while !rest.is_empty() {
        let end = rest.iter().position(|byte| *byte == 0).unwrap();
        let type_oid = u32::from_be_bytes(rest[end + 7..end + 11].try_into().unwrap());
        columns.push((String::from_utf8_lossy(&rest[..end]).into_owned(), type_oid));
        rest = &rest[end + 19..];
    }
    columns
}

/// The tags of all CommandComplete messages.
pub(crate) fn tags_of(messages: &[Message]) -> Vec<String> {
    let complete = messages.iter().filter(|message| message.kind == b'C');
    complete
        .map(|message| {
            String::from_utf8_lossy(message.body.strip_suffix(&[0]).unwrap_or(&message.body)).into_owned()
        })
        .collect()
}

fn row(body: &[u8]) -> Vec<Option<String>> {
    let mut rest = &body[2..];
    let mut values = Vec::new();
    while !rest.is_empty() {
        let length = i32::from_be_bytes(rest[..4].try_into().unwrap());
        rest = &rest[4..];
        values.push(usize::try_from(length).ok().map(|length| {
            let (value, after) = rest.split_at(length);
            rest = after;
            String::from_utf8_lossy(value).into_owned()
        }));
    }
    values
}

fn copy_event(message: Message) -> Event {
    let number = |at: usize| u64::from_be_bytes(message.body[at..at + 8].try_into().unwrap());
    match message.body.first() {
        Some(b'w') if message.body.len() >= 25 => {
            Event::Wal { start: number(1), wal_end: number(9), bytes: message.body[25..].to_vec() }
        }
        Some(b'k') if message.body.len() == 18 => {
            Event::Keepalive { wal_end: number(1), reply_requested: message.body[17] != 0 }
        }
        _ => Event::Other(message),
    }
}

/// What IDENTIFY_SYSTEM says: system identifier, timeline, position.
pub(crate) fn identify_system(client: &mut RawClient) -> (String, u32, u64) {
    let rows = client.rows("IDENTIFY_SYSTEM").unwrap_or_else(|error| panic!("IDENTIFY_SYSTEM: {error:?}"));
    let text = |column: usize| rows[0][column].clone().unwrap();
    (text(0), text(1).parse().unwrap(), lsn(&text(2)))
}
