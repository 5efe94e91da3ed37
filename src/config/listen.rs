//! Addresses to listen on.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ListenAddress {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A socket file, named as PostgreSQL names its own (`.s.PGSQL.5433`), so that libpq finds it by directory and port. Where its
    /// path begins with `@` there is no file: it is in the abstract namespace.
    Unix(PathBuf),
}

impl ListenAddress {
    /// Whether only this machine can reach it.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// The port when none is given: next to PostgreSQL's own.
const DEFAULT_PORT: u16 = 5433;

/// `sizeof(sun_path) - 1` on Linux.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What is said of a wrong one.
pub(crate) const TCP_ADVICE: &str =
    "expected an IP address and a port, as in \"127.0.0.1:9588\" or \"[::1]:9588\"";
pub(crate) const ADVICE: &str = "expected an IP address and a port, as in \"127.0.0.1:5433\" or \"[::]:5433\", or the \
                                 directory for a Unix-domain socket, as in \"/var/run/walrelay\"";

/// Reads a list; sockets get the port of the first TCP address. The error is the text that is wrong.
pub(crate) fn parse_list(texts: &[String]) -> Result<Vec<ListenAddress>, String> {
    let is_directory = |text: &String| text.starts_with(['/', '@']);
    let tcp = |text: &String| (!is_directory(text)).then(|| parse_tcp(text)).flatten();
    let port = texts.iter().find_map(tcp).map_or(DEFAULT_PORT, |address| address.port());
    let parse = |text: &String| {
        let address = if is_directory(text) {
            parse_directory(text, port)
        } else {
            parse_tcp(text).map(ListenAddress::Tcp)
        };
        address.ok_or_else(|| text.clone())
    };
    texts.iter().map(parse).collect()
}

/// Reads `address:port`; a name is not looked up, but `localhost` is known.
pub(crate) fn parse_tcp(text: &str) -> Option<SocketAddr> {
    match text.strip_prefix("localhost:") {
        Some(port) => Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port.parse().ok()?)),
        None => text.parse().ok(),
    }
}

fn parse_directory(directory: &str, port: u16) -> Option<ListenAddress> {
    let path = format!("{}/.s.PGSQL.{port}", directory.trim_end_matches('/'));
    (path.len() <= SOCKET_PATH_BYTES_MAX && !path.contains('\0'))
        .then(|| ListenAddress::Unix(PathBuf::from(path)))
}
