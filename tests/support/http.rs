//! HTTP/1.1 on one short connection.

use std::io::{Read, Write};
use std::time::Duration;

/// Status and body, or `None` when nobody answers.
pub(crate) fn get(port: u16, path: &str) -> Option<(u16, String)> {
    ask(port, &format!("GET {path}"), None, Duration::from_secs(5))
}

/// The same for a request such as `POST /fence`, with a token.
pub(crate) fn ask(
    port: u16,
    request: &str,
    token: Option<&str>,
    patience: Duration,
) -> Option<(u16, String)> {
    ask_with(port, request, token, "", patience)
}

/// The same with a body.
pub(crate) fn ask_with(
    port: u16,
    request: &str,
    token: Option<&str>,
    body: &str,
    patience: Duration,
) -> Option<(u16, String)> {
    let mut stream = super::place::connect(port).ok()?;
    stream.set_read_timeout(Some(patience)).ok()?;
    let token = token.map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"));
    let length = body.len();
    let head = format!("{request} HTTP/1.1\r\nHost: localhost\r\n{token}Content-Length: {length}\r\n");
    write!(stream, "{head}Connection: close\r\n\r\n{body}").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    Some((
        status,
        if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
            unchunk(body)?
        } else {
            body.to_owned()
        },
    ))
}

fn unchunk(mut body: &str) -> Option<String> {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n")?;
        let size = usize::from_str_radix(size.trim(), 16).ok()?;
        if size == 0 {
            return Some(whole);
        }
        whole.push_str(rest.get(..size)?);
        body = rest.get(size + 2..)?;
    }
}
