//! One question to a relay's HTTP listener, one answer.
//!
//! Owns the little HTTP that commands need to ask a relay on this machine or another. Follows no redirect, keeps no
//! connection, and reads no more than a limit.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Result, anyhow};
use secrecy::{ExposeSecret, SecretString};

use crate::admin::RELAY_HEADER;

/// A request without a body.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    /// Its method.
    pub(super) method: &'static str,
    /// Its path.
    pub(super) path: &'a str,
    /// What is shown to be let in.
    pub(super) token: Option<&'a SecretString>,
    /// Name of the relay that is meant; another one does nothing.
    pub(super) relay: Option<&'a str>,
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The status code.
    pub(super) status: u16,
    /// The body.
    pub(super) body: String,
}

impl Request<'_> {
    /// Asks the relay at `address`. No read or write takes longer than `wait`.
    pub(super) fn send(&self, address: SocketAddr, wait: Duration) -> Result<Answer> {
        self.send_over(connect(address, wait)?)
    }

    /// Asks whoever is at the other end.
    pub(super) fn send_over(&self, mut stream: TcpStream) -> Result<Answer> {
        let address = stream.peer_addr()?;
        let authorization = self
            .token
            .map_or_else(String::new, |token| format!("Authorization: Bearer {}\r\n", token.expose_secret()));
        let meant = self.relay.map_or_else(String::new, |name| format!("{RELAY_HEADER}: {name}\r\n"));
        let Self { method, path, .. } = self;
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\n{authorization}{meant}");
        stream.write_all(format!("{head}Content-Length: 0\r\nConnection: close\r\n\r\n").as_bytes())?;
        let mut answer = Vec::new();
        let read = stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer);
        // A connection that is reset behind a whole answer is as good as closed.
        match (read, parse(&String::from_utf8_lossy(&answer))) {
            (_, Some(answer)) => Ok(answer),
            (Err(error), None) => Err(error.into()),
            (Ok(_), None) => Err(anyhow!("the answer to {method} {path} is cut off")),
        }
    }
}

/// A connection that has said nothing. No read or write over it takes longer than `wait`.
pub(super) fn connect(address: SocketAddr, wait: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, wait)?;
    stream.set_read_timeout(Some(wait))?;
    stream.set_write_timeout(Some(wait))?;
    Ok(stream)
}

/// An answer that ends with the connection; `None` if it is cut off.
fn parse(answer: &str) -> Option<Answer> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length") { value.trim().parse::<usize>().ok() } else { None }
    });
    let is_whole = length.is_none_or(|length| body.len() >= length);
    is_whole.then(|| Answer { status, body: body.to_owned() })
}

/// No page of a relay is larger.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_answer_is_one() {
        let answer = |status, body: &str| Some(Answer { status, body: body.to_owned() });
        assert_eq!(parse("HTTP/1.1 200 OK\r\nA: b\r\n\r\nyes"), answer(200, "yes"));
        assert_eq!(parse("HTTP/1.1 503 Service Unavailable\r\n\r\nno\n"), answer(503, "no\n"));
        assert_eq!(parse("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nyes"), None);
        assert_eq!(parse("HTTP/1.1 200 OK\r\n"), None);
        assert_eq!(parse(""), None);
    }
}
