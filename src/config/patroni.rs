//! Addresses of Patroni's REST API.

use std::{fmt, str::FromStr};

/// `http://host:port` of one member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatroniUrl {
    host: String,
    port: u16,
}

/// What is said of a wrong one.
pub(crate) const ADVICE: &str = "expected \"http://host:port\", as in \"http://10.1.0.10:8008\"";

/// Patroni's own default.
const DEFAULT_PORT: u16 = 8008;

impl PatroniUrl {
    /// Name or address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for PatroniUrl {
    /// As in a `Host` header.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for PatroniUrl {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let authority = text.strip_prefix("http://").ok_or(())?;
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => rest.split_once(']').ok_or(())?,
            None => authority.find(':').map_or((authority, ""), |at| authority.split_at(at)),
        };
        let is_good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        if host.is_empty() || !host.chars().all(is_good) {
            return Err(());
        }
        let port = match port.strip_prefix(':') {
            Some(port) => port.parse().map_err(drop)?,
            None if port.is_empty() => DEFAULT_PORT,
            None => return Err(()),
        };
        Ok(Self { host: host.to_owned(), port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_a_host_and_a_port() {
        let shown = |text: &str| text.parse::<PatroniUrl>().map(|url| url.to_string());
        assert_eq!(shown("http://10.1.0.10:8009"), Ok("10.1.0.10:8009".to_owned()));
        assert_eq!(shown("http://pg-a.example/"), Ok("pg-a.example:8008".to_owned()));
        assert_eq!(shown("http://[::1]:8008"), Ok("[::1]:8008".to_owned()));
        for wrong in
            ["10.1.0.10:8008", "https://a:8008", "http://", "http://a:b", "http://a/cluster", "http://u@a"]
        {
            assert_eq!(shown(wrong), Err(()), "{wrong}");
        }
    }
}
