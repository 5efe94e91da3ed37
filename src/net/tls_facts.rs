//! What is known of a client by the encryption of its connection.
//!
//! Plain values, so that who comes in is decided without a TLS library in sight.

use crate::access::Wire;
use crate::protocol::scram::ChannelBinding;

/// How the bytes of a connection are protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Not at all.
    None,
    /// By TLS.
    Tls(TlsFacts),
}

impl Encryption {
    /// How the bytes travel.
    pub fn wire(&self) -> Wire {
        match self {
            Self::None => Wire::Clear,
            Self::Tls(_) => Wire::Tls,
        }
    }

    /// What a SCRAM exchange can be bound to.
    pub fn binding(&self) -> ChannelBinding {
        match self {
            Self::None => ChannelBinding::Unsupported,
            Self::Tls(facts) => facts.binding.clone(),
        }
    }

    /// The certificate that the client has shown.
    pub fn client_certificate(&self) -> Option<&ClientCertificate> {
        match self {
            Self::None => None,
            Self::Tls(facts) => facts.client_certificate.as_ref(),
        }
    }
}

/// What a TLS handshake has told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFacts {
    /// The client's certificate; one that is here was verified.
    pub client_certificate: Option<ClientCertificate>,
    /// What a SCRAM exchange can be bound to.
    pub binding: ChannelBinding,
}

/// The names in a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The subject's common name (the first one, if there are several); absent where it has none.
    pub common_name: Option<String>,
    /// The subject's distinguished name as OpenSSL prints it by RFC 2253, which is what PostgreSQL compares for `clientname=DN`.
    pub distinguished_name: String,
}
