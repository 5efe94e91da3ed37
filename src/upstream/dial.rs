//! From a host of the connection string to a session that is logged in.
//!
//! Owns addresses, sockets and what the connection string demands of the other end before anything is asked of it
//! (`requirepeer`, protocol versions, authentication). Every wait here is inside `connect_timeout`. Knows nothing of WAL.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use tokio::time::timeout;

use crate::conninfo;
use crate::conninfo::{Conninfo, Host, HostAddress, ProcessSurroundings};
use crate::net::{Socket, TcpOptions};
use crate::protocol::{
    frontend::{FirstPacket, ProtocolVersion, Startup},
    scram::ChannelBindingPolicy,
};
use crate::upstream::UpstreamError;
use crate::upstream::authenticate::{Credentials, authenticate, wait_ready};
use crate::upstream::dialog::Dialog;
use crate::upstream::encryption::{self, Attempt};
use crate::upstream::link::LinkWish;

enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// Logs in at the first address of the host that lets us in; `connect_timeout` holds for each.
pub(crate) async fn log_in(conninfo: &Conninfo, host: &Host) -> Result<Dialog, UpstreamError> {
    log_in_for(conninfo, host, None).await
}

/// The same for a stream, which may be a link.
pub(crate) async fn log_in_for(
    conninfo: &Conninfo,
    host: &Host,
    link: Option<&LinkWish>,
) -> Result<Dialog, UpstreamError> {
    let limit = conninfo.connect_timeout.unwrap_or(CONNECT_TIME_MAX);
    let timed_out = || UpstreamError::ConnectTimeout { host: host.to_string() };
    let mut last = UpstreamError::NoHost;
    for address in timeout(limit, addresses(host)).await.map_err(|_| timed_out())?? {
        match timeout(limit, log_in_at(conninfo, host, &address, link)).await {
            Ok(Ok(dialog)) => return Ok(dialog),
            Ok(Err(error)) => last = error,
            Err(_) => last = timed_out(),
        }
    }
    Err(last)
}

async fn addresses(host: &Host) -> Result<Vec<Address>, UpstreamError> {
    match &host.address {
        HostAddress::UnixSocket(path) => Ok(vec![Address::Unix(path.clone())]),
        HostAddress::Ip(ip) => Ok(vec![Address::Tcp(SocketAddr::new(*ip, host.port))]),
        HostAddress::Name(name) => {
            let resolved = tokio::net::lookup_host((name.as_str(), host.port)).await;
            let resolved =
                resolved.map_err(|source| UpstreamError::Resolve { host: name.clone(), source })?;
            Ok(resolved.take(ADDRESSES_MAX).map(Address::Tcp).collect())
        }
    }
}

/// Encrypted or not, in the order that `sslmode` asks for.
async fn log_in_at(
    conninfo: &Conninfo,
    host: &Host,
    address: &Address,
    link: Option<&LinkWish>,
) -> Result<Dialog, UpstreamError> {
    let mut errors: Vec<(String, UpstreamError)> = Vec::new();
    for attempt in encryption::attempts(conninfo.ssl.mode, &host.address) {
        match log_in_by(*attempt, conninfo, host, address, link).await {
            Ok(dialog) => return Ok(dialog),
            Err(Refusal { error, is_final }) => {
                let goes_on = !is_final && encryption::may_try_otherwise(&error);
                let way = match attempt {
                    Attempt::Plain => "without SSL",
                    Attempt::Tls => "with SSL",
                };
                errors.push((format!("{host}, {way}"), error));
                if !goes_on {
                    break;
                }
            }
        }
    }
    match errors.len() {
        0 | 1 => Err(errors.pop().map_or(UpstreamError::NoHost, |(_, error)| error)),
        _ => Err(UpstreamError::AllHosts(errors)),
    }
}

/// An attempt that failed.
struct Refusal {
    error: UpstreamError,
    /// The server knew who we are, or had declined encryption: nothing would be otherwise with the other one, as for libpq.
    is_final: bool,
}

impl From<UpstreamError> for Refusal {
    fn from(error: UpstreamError) -> Self {
        Self { error, is_final: false }
    }
}

async fn log_in_by(
    attempt: Attempt,
    conninfo: &Conninfo,
    host: &Host,
    address: &Address,
    link: Option<&LinkWish>,
) -> Result<Dialog, Refusal> {
    let mut socket = dial(conninfo, host, address).await?;
    let tls = match attempt {
        Attempt::Plain => None,
        Attempt::Tls => encryption::encrypt(&mut socket, conninfo, host).await?,
    };
    let mut dialog = Dialog::new(socket);
    let mut startup = Startup::new(conninfo.startup_parameters());
    startup.version = protocol_version(conninfo.max_protocol_version);
    let extension = link.map(LinkWish::parameter);
    let extensions: Vec<String> = extension.iter().map(|(name, _)| name.clone()).collect();
    startup.parameters.extend(extension);
    let credentials = Credentials {
        user: &conninfo.user,
        password: conninfo.password_for(host),
        scram_client_key: conninfo.scram_client_key.as_ref(),
        scram_server_key: conninfo.scram_server_key.as_ref(),
        require_auth: &conninfo.require_auth,
        channel_binding: match conninfo.channel_binding {
            conninfo::ChannelBinding::Disable => ChannelBindingPolicy::Disable,
            conninfo::ChannelBinding::Prefer => ChannelBindingPolicy::Prefer,
            conninfo::ChannelBinding::Require => ChannelBindingPolicy::Require,
        },
        tls: tls.as_ref(),
        cert_mode: conninfo.ssl.cert_mode,
        requested_version: startup.version,
        min_version: protocol_version(conninfo.min_protocol_version),
        extensions: &extensions,
    };
    // In clear text already, because the server has no TLS.
    let is_final = attempt == Attempt::Tls && tls.is_none();
    let authenticated = authenticate(&mut dialog, &FirstPacket::Startup(startup), &credentials).await;
    authenticated.map_err(|error| Refusal { error, is_final })?;
    let after_login = |error| Refusal { error, is_final: true };
    wait_ready(&mut dialog).await.map_err(after_login)?;
    if let Some(link) = link {
        let outcome = link.outcome(&dialog.introduction, &host.to_string());
        dialog.introduction.link = outcome.map_err(after_login)?;
    }
    Ok(dialog)
}

fn protocol_version(version: conninfo::ProtocolVersion) -> ProtocolVersion {
    match version {
        conninfo::ProtocolVersion::V3_0 => ProtocolVersion::V3_0,
        conninfo::ProtocolVersion::V3_2 => ProtocolVersion::V3_2,
    }
}

async fn dial(conninfo: &Conninfo, host: &Host, address: &Address) -> Result<Socket, UpstreamError> {
    let outcome = match address {
        Address::Tcp(address) => Socket::connect_tcp(*address, &tcp_options(conninfo)).await,
        Address::Unix(path) => Socket::connect_unix(path).await,
    };
    let socket = outcome.map_err(|source| UpstreamError::Connect { host: host.to_string(), source })?;
    if let Some(wanted) = &conninfo.requirepeer {
        check_peer(&socket, wanted)?;
    }
    Ok(socket)
}

/// As libpq: only the owner of a Unix socket's other end can be known, and nothing is sent before it is.
fn check_peer(socket: &Socket, wanted: &str) -> Result<(), UpstreamError> {
    let Some(user_id) = socket.peer_user_id().map_err(UpstreamError::PeerCredentials)? else { return Ok(()) };
    let actual = ProcessSurroundings.name_of_user(user_id).ok_or(UpstreamError::UnknownPeer(user_id))?;
    if actual != wanted {
        return Err(UpstreamError::WrongPeer { wanted: wanted.to_owned(), actual });
    }
    Ok(())
}

fn tcp_options(conninfo: &Conninfo) -> TcpOptions {
    let keepalives = conninfo.keepalives.unwrap_or_default();
    TcpOptions {
        keepalives: conninfo.keepalives.is_some(),
        keepalives_idle: keepalives.idle,
        keepalives_interval: keepalives.interval,
        keepalives_count: keepalives.count,
        tcp_user_timeout: conninfo.tcp_user_timeout,
    }
}

/// Addresses tried of one host name.
const ADDRESSES_MAX: usize = 16;

/// Time to connect and authenticate where the connection string sets none; libpq would wait for ever.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::conninfo::FixedSurroundings;

    /// AuthenticationOk.
    const LET_IN: &[u8] = b"R\0\0\0\x08\0\0\0\0";
    const REFUSED: &[u8] = b"E\0\0\0\x29SFATAL\0C53300\0Mtoo many connections\0\0";

    /// A server without TLS that answers a startup packet so. Returns its port, and the codes of the first packets it gets.
    async fn server(answer: Vec<u8>) -> (u16, Arc<Mutex<Vec<u32>>>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let codes = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&codes);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut is_first = true;
                while let Ok(length) = stream.read_u32().await {
                    let mut packet = vec![0; usize::try_from(length).unwrap() - 4];
                    stream.read_exact(&mut packet).await.unwrap();
                    let code = u32::from_be_bytes(packet[..4].try_into().unwrap());
                    if std::mem::take(&mut is_first) {
                        seen.lock().unwrap().push(code);
                    }
                    if code == SSL_REQUEST {
                        stream.write_all(b"N").await.unwrap();
                    } else {
                        stream.write_all(&answer).await.unwrap();
                        break;
                    }
                }
            }
        });
        (port, codes)
    }

    async fn first_packets(mode: &str, answer: &[&[u8]]) -> (String, Vec<u32>) {
        let (port, codes) = server(answer.concat()).await;
        let text = format!("host=127.0.0.1 port={port} user=u dbname=d sslmode={mode}");
        let conninfo = Conninfo::parse(&text, &FixedSurroundings::of_user("u")).unwrap();
        let error = log_in(&conninfo, &conninfo.hosts[0]).await.err().unwrap().to_string();
        let codes = codes.lock().unwrap().clone();
        (error, codes)
    }

    #[tokio::test]
    async fn who_was_let_in_and_is_refused_then_does_not_try_the_other_encryption() {
        for mode in ["allow", "prefer"] {
            let (error, codes) = first_packets(mode, &[LET_IN, REFUSED]).await;
            assert_eq!(codes.len(), 1, "{mode}: {error}");
            assert!(error.contains("too many connections"), "{error}");
        }
        let (_, codes) = first_packets("allow", &[REFUSED]).await;
        assert_eq!(codes, [STARTUP, SSL_REQUEST], "that may be for the want of encryption");
        let (_, codes) = first_packets("prefer", &[REFUSED]).await;
        assert_eq!(codes, [SSL_REQUEST], "it was in clear text already");
    }

    const STARTUP: u32 = 196_608;
    const SSL_REQUEST: u32 = 80_877_103;
}
