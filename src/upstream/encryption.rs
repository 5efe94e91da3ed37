//! Whether a connection is encrypted, and how TLS begins: libpq's rules.
//!
//! Owns the order of attempts that `sslmode` asks for, and the question to the server. A server's text before TLS is nobody's:
//! it is never believed where TLS is required (CVE-2024-10977).

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::conninfo::{Conninfo, Host, HostAddress, ProcessSurroundings, SslMode, SslNegotiation};
use crate::net::Socket;
use crate::net::tls::{ClientTls, ServerTlsFacts};
use crate::protocol::frontend::FirstPacket;
use crate::upstream::{UpstreamError, blocking::block_in_place};

/// One way to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    /// In clear text.
    Plain,
    /// By TLS; if the server has none, in clear text over the same connection where that is allowed.
    Tls,
}

/// The ways to connect to a host, in order.
pub(super) fn attempts(mode: SslMode, address: &HostAddress) -> &'static [Attempt] {
    match (mode, address) {
        // As PostgreSQL: never over Unix sockets.
        (_, HostAddress::UnixSocket(_)) | (SslMode::Disable, _) => &[Attempt::Plain],
        (SslMode::Allow, _) => &[Attempt::Plain, Attempt::Tls],
        (SslMode::Prefer, _) => &[Attempt::Tls, Attempt::Plain],
        (SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull, _) => &[Attempt::Tls],
    }
}

/// Whether the other way may be tried after this: the server would not have it so, or TLS did not come about.
pub(super) fn may_try_otherwise(error: &UpstreamError) -> bool {
    matches!(error, UpstreamError::Server(_) | UpstreamError::Tls { .. } | UpstreamError::NoTls)
}

/// Begins TLS on a fresh connection. `None`: the server has none, and clear text will do.
pub(super) async fn encrypt(
    socket: &mut Socket,
    conninfo: &Conninfo,
    host: &Host,
) -> Result<Option<ServerTlsFacts>, UpstreamError> {
    let ssl = &conninfo.ssl;
    let failed = |source| UpstreamError::Tls { host: host.to_string(), source: Box::new(source) };
    // The files may be on a disk that is slow.
    let tls = block_in_place(|| ClientTls::read(ssl, &host.certificate_name, &ProcessSurroundings));
    let tls = tls.map_err(failed)?;
    if ssl.negotiation == SslNegotiation::Postgres && !ask(socket).await? {
        return match ssl.mode {
            SslMode::Prefer => Ok(None),
            _ => Err(UpstreamError::NoTls),
        };
    }
    let facts = socket.connect_tls(&tls).await.map_err(failed)?;
    if ssl.negotiation == SslNegotiation::Direct && !facts.has_alpn {
        return Err(UpstreamError::NoAlpn);
    }
    Ok(Some(facts))
}

/// Asks for TLS. Reads one byte and no more: what follows it is TLS's own, and bytes that somebody put before the handshake
/// are taken for a part of it, which fails (CVE-2021-23222).
async fn ask(socket: &mut Socket) -> Result<bool, UpstreamError> {
    let mut question = BytesMut::new();
    FirstPacket::SslRequest.encode(&mut question);
    socket.write_all(&question).await?;
    match socket.read_u8().await.map_err(closed)? {
        b'S' => Ok(true),
        b'N' => Ok(false),
        // A server so old that it does not know the question, or one that has no room: what it says may be anybody's.
        b'E' => Err(UpstreamError::ErrorBeforeTls),
        other => Err(UpstreamError::InvalidTlsAnswer(char::from(other).escape_default().to_string())),
    }
}

fn closed(error: std::io::Error) -> UpstreamError {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => UpstreamError::Closed,
        _ => UpstreamError::Io(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sslmode_has_libpqs_order_of_attempts() {
        let (tcp, unix) = (HostAddress::Name("db".to_owned()), HostAddress::UnixSocket("/s".into()));
        let expected: [(SslMode, &[Attempt]); 6] = [
            (SslMode::Disable, &[Attempt::Plain]),
            (SslMode::Allow, &[Attempt::Plain, Attempt::Tls]),
            (SslMode::Prefer, &[Attempt::Tls, Attempt::Plain]),
            (SslMode::Require, &[Attempt::Tls]),
            (SslMode::VerifyCa, &[Attempt::Tls]),
            (SslMode::VerifyFull, &[Attempt::Tls]),
        ];
        for (mode, attempts_expected) in expected {
            assert_eq!(attempts(mode, &tcp), attempts_expected, "{mode}");
            assert_eq!(attempts(mode, &unix), [Attempt::Plain], "{mode} over a Unix socket");
        }
    }
}
