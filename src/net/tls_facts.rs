//! What TLS tells of a client.
//!
//! Plain values: they are known once the handshake is over, and nothing here looks at a socket.

use crate::protocol::scram::ChannelBinding;

/// What is known of an encrypted connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFacts {
    /// The client's certificate, if it showed one that is vouched for.
    pub client_certificate: Option<ClientCertificate>,
    /// What SCRAM can be bound to: the certificate that this client saw.
    pub binding: ChannelBinding,
}

/// Whom a client's certificate names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The first common name of its subject.
    pub common_name: Option<String>,
    /// The whole subject, as RFC 2253 writes it.
    pub distinguished_name: String,
}
