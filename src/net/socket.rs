//! TCP and Unix sockets behind one type, and TLS over the former.
//!
//! Owns connecting, listening, socket options and halves that read and write independently. Never interprets bytes.

use std::{
    borrow::Cow,
    ffi::OsString,
    io,
    net::SocketAddr,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::FileTypeExt,
    },
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream, tcp, unix},
};
use tokio_rustls::TlsStream;

use crate::config::{self, ListenAddress};
use crate::net::rewound::Rewound;
use crate::net::tls::{ClientTls, ServerTls, ServerTlsFacts, TlsError, TlsStart};
use crate::net::{Peer, TlsFacts};

/// A connected socket.
#[derive(Debug)]
pub enum Socket {
    /// Over TCP, in clear.
    Tcp(TcpStream),
    /// Over TCP, encrypted.
    Tls(Encrypted),
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Lost in a handshake that failed.
    Lost,
}

type Encrypted = Box<TlsStream<Rewound<TcpStream>>>;

/// Options of TCP connections, as libpq and PostgreSQL name them; `None` leaves the system's default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpOptions {
    /// Whether keepalive probes are sent at all.
    pub keepalives: bool,
    /// Silence before the first probe.
    pub keepalives_idle: Option<Duration>,
    /// Time between probes.
    pub keepalives_interval: Option<Duration>,
    /// Unanswered probes before the connection is given up.
    pub keepalives_count: Option<u32>,
    /// Longest time that sent data may stay unacknowledged.
    pub tcp_user_timeout: Option<Duration>,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self {
            keepalives: true,
            keepalives_idle: None,
            keepalives_interval: None,
            keepalives_count: None,
            tcp_user_timeout: None,
        }
    }
}

impl From<&config::ClientTcp> for TcpOptions {
    fn from(tcp: &config::ClientTcp) -> Self {
        Self {
            keepalives: true,
            keepalives_idle: tcp.keepalives_idle,
            keepalives_interval: tcp.keepalives_interval,
            keepalives_count: tcp.keepalives_count,
            tcp_user_timeout: tcp.user_timeout,
        }
    }
}

impl TcpOptions {
    /// Sets the options, and TCP_NODELAY, on a connection.
    pub fn apply(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let socket = SockRef::from(stream);
        socket.set_tcp_user_timeout(self.tcp_user_timeout)?;
        if !self.keepalives {
            return socket.set_keepalive(false);
        }
        let mut keepalive = TcpKeepalive::new();
        if let Some(idle) = self.keepalives_idle {
            keepalive = keepalive.with_time(idle);
        }
        if let Some(interval) = self.keepalives_interval {
            keepalive = keepalive.with_interval(interval);
        }
        if let Some(count) = self.keepalives_count {
            keepalive = keepalive.with_retries(count);
        }
        socket.set_keepalive(true)?;
        socket.set_tcp_keepalive(&keepalive)
    }
}

impl Socket {
    /// Connects by TCP and sets `options`. The caller bounds the time.
    pub async fn connect_tcp(address: SocketAddr, options: &TcpOptions) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        options.apply(&stream)?;
        Ok(Self::Tcp(stream))
    }

    /// Connects to a Unix socket; one whose path begins with `@` is in the abstract namespace.
    pub async fn connect_unix(path: &Path) -> io::Result<Self> {
        UnixStream::connect(system_path(path)).await.map(Self::Unix)
    }

    /// The operating system user at the other end; `None` where that cannot be known.
    pub fn peer_user_id(&self) -> io::Result<Option<u32>> {
        match self {
            Self::Tcp(_) | Self::Tls(_) | Self::Lost => Ok(None),
            Self::Unix(stream) => stream.peer_cred().map(|credentials| Some(credentials.uid())),
        }
    }

    /// Whether TLS may be spoken over it: PostgreSQL has it over TCP only, and once.
    pub fn may_be_encrypted(&self) -> bool {
        matches!(self, Self::Tcp(_))
    }

    /// Goes through a TLS handshake as the server. `early` was read from the socket already. On failure the socket is lost.
    pub async fn accept_tls(
        &mut self,
        early: Bytes,
        tls: &ServerTls,
        start: TlsStart,
    ) -> Result<TlsFacts, TlsError> {
        let stream = self.take_tcp()?;
        let (stream, facts) = tls.accept(Rewound::new(early, stream), start).await?;
        *self = Self::Tls(Box::new(stream.into()));
        Ok(facts)
    }

    /// Goes through a TLS handshake as the client. On failure the socket is lost.
    pub async fn connect_tls(&mut self, tls: &ClientTls) -> Result<ServerTlsFacts, TlsError> {
        let stream = self.take_tcp()?;
        let (stream, facts) = tls.connect(Rewound::new(Bytes::new(), stream)).await?;
        *self = Self::Tls(Box::new(stream.into()));
        Ok(facts)
    }

    fn take_tcp(&mut self) -> Result<TcpStream, TlsError> {
        match std::mem::replace(self, Self::Lost) {
            Self::Tcp(stream) => Ok(stream),
            other => {
                *self = other;
                Err(TlsError::Io(io::ErrorKind::Unsupported.into()))
            }
        }
    }

    /// Two halves that read and write independently; those of a TLS connection take turns at its state.
    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        match self {
            Self::Tls(stream) => {
                let (read, write) = tokio::io::split(stream);
                (ReadHalf::Tls(read), WriteHalf::Tls(write))
            }
            Self::Lost => (ReadHalf::Lost, WriteHalf::Lost),
            Self::Tcp(stream) => {
                let (read, write) = stream.into_split();
                (ReadHalf::Tcp(read), WriteHalf::Tcp(write))
            }
            Self::Unix(stream) => {
                let (read, write) = stream.into_split();
                (ReadHalf::Unix(read), WriteHalf::Unix(write))
            }
        }
    }
}

/// As the system takes it: a name in the abstract namespace, which belongs to no file, begins with a zero byte there and with `@`
/// in libpq and PostgreSQL.
fn system_path(path: &Path) -> Cow<'_, Path> {
    match path.as_os_str().as_bytes() {
        [ABSTRACT, name @ ..] => {
            let name = [b"\0", name].concat();
            Cow::Owned(PathBuf::from(OsString::from_vec(name)))
        }
        _ => Cow::Borrowed(path),
    }
}

/// Sends everything, also what the stream holds back in a buffer of its own. Cancel-safe: what has been taken is gone from
/// `bytes`, and with nothing left in it another call goes on where this one was.
pub async fn send_all(stream: &mut (impl AsyncWrite + Unpin), bytes: &mut BytesMut) -> io::Result<()> {
    stream.write_all_buf(bytes).await?;
    stream.flush().await
}

/// The halves of one socket, which were split before.
pub fn reunite(read: ReadHalf, write: WriteHalf) -> Option<Socket> {
    match (read, write) {
        (ReadHalf::Tcp(read), WriteHalf::Tcp(write)) => read.reunite(write).ok().map(Socket::Tcp),
        (ReadHalf::Unix(read), WriteHalf::Unix(write)) => read.reunite(write).ok().map(Socket::Unix),
        (ReadHalf::Tls(read), WriteHalf::Tls(write)) if read.is_pair_of(&write) => {
            Some(Socket::Tls(read.unsplit(write)))
        }
        _ => None,
    }
}

/// The receiving half of a [`Socket`].
#[derive(Debug)]
pub enum ReadHalf {
    /// Of a TCP connection.
    Tcp(tcp::OwnedReadHalf),
    /// Of a Unix connection.
    Unix(unix::OwnedReadHalf),
    /// Of a TLS connection.
    Tls(tokio::io::ReadHalf<Encrypted>),
    /// Of none.
    Lost,
}

/// The sending half of a [`Socket`].
#[derive(Debug)]
pub enum WriteHalf {
    /// Of a TCP connection.
    Tcp(tcp::OwnedWriteHalf),
    /// Of a Unix connection.
    Unix(unix::OwnedWriteHalf),
    /// Of a TLS connection.
    Tls(tokio::io::WriteHalf<Encrypted>),
    /// Of none.
    Lost,
}

macro_rules! delegate_read {
    ($type:ident) => {
        impl AsyncRead for $type {
            fn poll_read(
                self: Pin<&mut Self>,
                context: &mut Context<'_>,
                buffer: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
                    Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
                    Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
                    Self::Lost => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
                }
            }
        }
    };
}

macro_rules! delegate_write {
    ($type:ident) => {
        impl AsyncWrite for $type {
            fn poll_write(
                self: Pin<&mut Self>,
                context: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    Self::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
                    Self::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
                    Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
                    Self::Lost => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
                }
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                context: &mut Context<'_>,
                slices: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() {
                    Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(context, slices),
                    Self::Unix(stream) => Pin::new(stream).poll_write_vectored(context, slices),
                    Self::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
                    Self::Lost => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
                }
            }

            fn is_write_vectored(&self) -> bool {
                true
            }

            fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    Self::Tcp(stream) => Pin::new(stream).poll_flush(context),
                    Self::Unix(stream) => Pin::new(stream).poll_flush(context),
                    Self::Tls(stream) => Pin::new(stream).poll_flush(context),
                    Self::Lost => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
                }
            }

            fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() {
                    Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
                    Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
                    Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
                    Self::Lost => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
                }
            }
        }
    };
}

delegate_read!(Socket);
delegate_write!(Socket);
delegate_read!(ReadHalf);
delegate_write!(WriteHalf);

/// A listening socket of either family.
#[derive(Debug)]
pub enum Listener {
    /// For TCP.
    Tcp(TcpListener),
    /// For Unix sockets; the file, if there is one, is removed when the listener goes.
    Unix(UnixListener, Option<UnixSocketFile>),
}

/// Removes a socket file when the listener goes.
#[derive(Debug)]
pub struct UnixSocketFile(PathBuf);

impl Drop for UnixSocketFile {
    fn drop(&mut self) {
        // The file may have been removed by an operator; there is nothing to do then.
        let _ = rustix::fs::unlink(&self.0);
    }
}

impl Listener {
    /// Binds. A socket file left by a dead process is replaced, one that answers is not.
    pub async fn bind(address: &ListenAddress) -> io::Result<Self> {
        match address {
            ListenAddress::Tcp(address) => TcpListener::bind(address).await.map(Self::Tcp),
            ListenAddress::Unix(path) if path.as_os_str().as_bytes().first() == Some(&ABSTRACT) => {
                Ok(Self::Unix(UnixListener::bind(system_path(path))?, None))
            }
            ListenAddress::Unix(path) => {
                let is_socket =
                    path.symlink_metadata().is_ok_and(|metadata| metadata.file_type().is_socket());
                if is_socket && UnixStream::connect(path).await.is_err() {
                    rustix::fs::unlink(path)?;
                }
                let listener = UnixListener::bind(path)?;
                rustix::fs::chmod(path, rustix::fs::Mode::from_raw_mode(SOCKET_FILE_MODE))?;
                Ok(Self::Unix(listener, Some(UnixSocketFile(path.clone()))))
            }
        }
    }

    /// Waits for a connection. Cancel-safe.
    pub async fn accept(&self, options: &TcpOptions) -> io::Result<(Socket, Peer)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                options.apply(&stream)?;
                Ok((Socket::Tcp(stream), Peer::Tcp(address)))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                Ok((Socket::Unix(stream), Peer::Unix))
            }
        }
    }

    /// The TCP address that was bound, with the port that the system chose.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Unix(..) => None,
        }
    }
}

/// Begins a name in the abstract namespace.
const ABSTRACT: u8 = b'@';

/// PostgreSQL's default `unix_socket_permissions`.
const SOCKET_FILE_MODE: u32 = 0o777;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_whose_machine_vanished_is_asked_for_by_the_kernel() {
        let address = ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
        let listener = Listener::bind(&address).await.unwrap();
        let client = TcpStream::connect(listener.tcp_address().unwrap()).await.unwrap();
        let configured = config::ClientTcp {
            keepalives_idle: Some(Duration::from_secs(60)),
            keepalives_interval: Some(Duration::from_secs(10)),
            keepalives_count: Some(6),
            user_timeout: Some(Duration::from_secs(30)),
        };
        let (socket, _) = listener.accept(&TcpOptions::from(&configured)).await.unwrap();
        let Socket::Tcp(stream) = &socket else { panic!("{socket:?}") };
        let asked = SockRef::from(stream);
        assert!(asked.keepalive().unwrap());
        assert_eq!(asked.tcp_keepalive_time().unwrap(), Duration::from_secs(60));
        assert_eq!(asked.tcp_keepalive_interval().unwrap(), Duration::from_secs(10));
        assert_eq!(asked.tcp_keepalive_retries().unwrap(), 6);
        assert_eq!(asked.tcp_user_timeout().unwrap(), Some(Duration::from_secs(30)));
        drop(client);
    }
}
