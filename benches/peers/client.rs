//! A PostgreSQL client that does as little as possible: it asks, and it reads WAL and throws it away.
//!
//! Owns its own reading of the protocol on a plain socket, apart from the relay's, so that a fault there is not measured
//! away here. Knows no authentication but trust.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use walrelay::wal::Lsn;

/// The role that is trusted on this machine.
pub(crate) const USER: &str = "bench";
const PROTOCOL_3_0: u32 = 196_608;
const BUFFER_BYTES: usize = 1 << 20;
/// `w`, start, end, time.
const WAL_DATA_HEADER_BYTES: usize = 25;
/// What a link's frame has before its payload.
const FRAME_FIELDS_BYTES: usize = 48;
/// `k`, end, time, whether a reply is wanted.
const KEEPALIVE_BYTES: usize = 18;
/// How long a read may find nothing before the caller is asked whether to go on.
const READ_WAIT: Duration = Duration::from_millis(200);

/// A connection, either for SQL or for replication.
pub(crate) struct Client {
    socket: TcpStream,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

/// What came on a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// WAL that ends there has arrived whole.
    Wal {
        end: u64,
    },
    Keepalive,
    /// Nothing for a while.
    Silence,
}

enum Skip {
    No,
    Bytes(usize),
}

impl Client {
    /// A connection that takes SQL.
    pub(crate) fn sql(address: SocketAddr) -> Result<Self> {
        Self::connect(address, &[("user", USER), ("database", "postgres"), ("application_name", "bench")])
    }

    /// A connection that takes replication commands.
    pub(crate) fn replication(address: SocketAddr) -> Result<Self> {
        Self::connect(address, &[("user", USER), ("replication", "true"), ("application_name", "bench")])
    }

    /// A connection with these startup parameters.
    pub(crate) fn connect(address: SocketAddr, parameters: &[(&str, &str)]) -> Result<Self> {
        let socket =
            TcpStream::connect(address).with_context(|| format!("could not connect to {address}"))?;
        socket.set_nodelay(true)?;
        let mut client = Self { socket, buffer: vec![0; BUFFER_BYTES], start: 0, end: 0 };
        let mut packet = PROTOCOL_3_0.to_be_bytes().to_vec();
        for (name, value) in parameters {
            for text in [name, value] {
                packet.extend_from_slice(text.as_bytes());
                packet.push(0);
            }
        }
        packet.push(0);
        let length = u32::try_from(packet.len() + 4)?;
        client.socket.write_all(&length.to_be_bytes())?;
        client.socket.write_all(&packet)?;
        client.until_ready()?;
        Ok(client)
    }

    /// The first column of the first row of the answer; empty without one.
    pub(crate) fn ask(&mut self, command: &str) -> Result<String> {
        self.query(command)?;
        self.until_ready()
    }

    /// Begins to stream.
    pub(crate) fn start_replication(&mut self, from: Lsn) -> Result<()> {
        self.query(&format!("START_REPLICATION PHYSICAL {from} TIMELINE 1"))?;
        loop {
            match self.message()? {
                (b'W', _) => break,
                (b'E', body) => bail!("{}", error_text(&body)),
                _ => {}
            }
        }
        self.socket.set_read_timeout(Some(READ_WAIT))?;
        Ok(())
    }

    /// The next thing on the stream. WAL is read to its last byte and forgotten. A keepalive that wants an answer gets
    /// one, with `flushed` in it.
    pub(crate) fn event(&mut self, flushed: u64) -> Result<Event> {
        if !self.has(5)? {
            return Ok(Event::Silence);
        }
        let kind = self.byte(0)?;
        let length = usize::try_from(u32::from_be_bytes(self.array(1)?))?.saturating_sub(4);
        if kind != b'd' {
            self.start += 5;
            let body = self.take(length)?;
            bail!(
                "the stream ended: {}",
                if kind == b'E' { error_text(&body) } else { "no error".to_owned() }
            );
        }
        self.wait_for(5 + length.min(FRAME_FIELDS_BYTES))?;
        match self.byte(5)? {
            b'w' => {
                let start = u64::from_be_bytes(self.array(6)?);
                let wal =
                    length.checked_sub(WAL_DATA_HEADER_BYTES).ok_or_else(|| anyhow!("short WAL data"))?;
                self.skip(5 + length)?;
                Ok(Event::Wal { end: start + wal as u64 })
            }
            b'z' if self.byte(6)? == b'f' => {
                let start = u64::from_be_bytes(self.array(21)?);
                let wal = u32::from_be_bytes(self.array(45)?);
                self.skip(5 + length)?;
                Ok(Event::Wal { end: start + u64::from(wal) })
            }
            // Whose WAL it is.
            b'z' => {
                self.skip(5 + length)?;
                Ok(Event::Keepalive)
            }
            b'k' => {
                let wants_reply = self.byte(5 + KEEPALIVE_BYTES - 1)? == 1;
                self.skip(5 + length)?;
                if wants_reply {
                    self.report(flushed)?;
                }
                Ok(Event::Keepalive)
            }
            other => bail!("unexpected message {other} on the stream"),
        }
    }

    /// Tells how far it got.
    pub(crate) fn report(&mut self, flushed: u64) -> Result<()> {
        let mut body = vec![b'r'];
        for position in [flushed, flushed, 0, 0] {
            body.extend_from_slice(&position.to_be_bytes());
        }
        body.push(0);
        self.send(b'd', &body)
    }

    fn query(&mut self, command: &str) -> Result<()> {
        let mut body = command.as_bytes().to_vec();
        body.push(0);
        self.send(b'Q', &body)
    }

    fn send(&mut self, kind: u8, body: &[u8]) -> Result<()> {
        let mut message = vec![kind];
        message.extend_from_slice(&u32::try_from(body.len() + 4)?.to_be_bytes());
        message.extend_from_slice(body);
        Ok(self.socket.write_all(&message)?)
    }

    /// Reads on until the server waits for a command; gives the first value that came.
    fn until_ready(&mut self) -> Result<String> {
        let mut first = None;
        loop {
            match self.message()? {
                (b'Z', _) => return Ok(first.unwrap_or_default()),
                (b'E', body) => bail!("{}", error_text(&body)),
                (b'R', body) if body != [0, 0, 0, 0] => bail!("the server wants more than trust"),
                (b'D', body) if first.is_none() => first = first_column(&body),
                _ => {}
            }
        }
    }

    fn message(&mut self) -> Result<(u8, Vec<u8>)> {
        self.wait_for(5)?;
        let kind = self.byte(0)?;
        let length = usize::try_from(u32::from_be_bytes(self.array(1)?))?.saturating_sub(4);
        self.start += 5;
        Ok((kind, self.take(length)?))
    }

    fn take(&mut self, length: usize) -> Result<Vec<u8>> {
        self.wait_for(length)?;
        let bytes = self.held().get(..length).unwrap_or_default().to_vec();
        self.start += length;
        Ok(bytes)
    }

    fn skip(&mut self, length: usize) -> Result<()> {
        let mut skip = Skip::Bytes(length);
        while let Skip::Bytes(left) = skip {
            let now = left.min(self.end - self.start);
            self.start += now;
            skip = if left == now { Skip::No } else { Skip::Bytes(left - now) };
            if matches!(skip, Skip::Bytes(_)) && !self.fill()? {
                // In the middle of a message the rest is on its way.
                continue;
            }
        }
        Ok(())
    }

    fn wait_for(&mut self, length: usize) -> Result<()> {
        while !self.has(length)? {}
        Ok(())
    }

    /// Whether so many bytes are here, after one attempt to read if they were not.
    fn has(&mut self, length: usize) -> Result<bool> {
        while self.end - self.start < length {
            if !self.fill()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads once; false if nothing came in time.
    fn fill(&mut self) -> Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let free = self.buffer.get_mut(self.end..).unwrap_or_default();
        match self.socket.read(free) {
            Ok(0) => bail!("the server closed the connection"),
            Ok(bytes) => {
                self.end += bytes;
                Ok(true)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(false),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    fn held(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    fn byte(&self, offset: usize) -> Result<u8> {
        self.held().get(offset).copied().ok_or_else(|| anyhow!("a message is cut off"))
    }

    fn array<const LENGTH: usize>(&self, offset: usize) -> Result<[u8; LENGTH]> {
        let bytes =
            self.held().get(offset..offset + LENGTH).ok_or_else(|| anyhow!("a message is cut off"))?;
        Ok(bytes.try_into()?)
    }
}

/// The value of the first column in a DataRow.
fn first_column(row: &[u8]) -> Option<String> {
    let length = u32::from_be_bytes(row.get(2..6)?.try_into().ok()?);
    let value = row.get(6..)?.get(..usize::try_from(length).ok()?)?;
    Some(String::from_utf8_lossy(value).into_owned())
}

/// The fields of an ErrorResponse, without their letters.
fn error_text(body: &[u8]) -> String {
    let fields = body.split(|byte| *byte == 0).filter(|field| matches!(field.first(), Some(b'C' | b'M')));
    let texts: Vec<_> = fields.filter_map(|field| field.get(1..)).map(String::from_utf8_lossy).collect();
    texts.join(" ")
}
