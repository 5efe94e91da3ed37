//! Startup and authentication towards the upstream.
//!
//! Owns the order of messages up to the first ReadyForQuery. Never sends a password to a method that `require_auth` or
//! `channel_binding` excludes, and never keeps one.

use aws_lc_rs::rand;
use secrecy::{ExposeSecret, SecretString};

use crate::conninfo::{AuthRequest, RequireAuth, ScramKey, SslCertMode};
use crate::net::tls::ServerTlsFacts;
use crate::protocol::{
    backend::{Authentication, Message, NegotiateProtocolVersion},
    frontend::{self, FirstPacket, Password, ProtocolVersion},
    md5,
    scram::{self, ChannelBinding, ChannelBindingPolicy},
};
use crate::upstream::{UpstreamError, dialog::Dialog};

/// Who we are to the upstream.
pub(crate) struct Credentials<'a> {
    pub(crate) user: &'a str,
    pub(crate) password: Option<&'a SecretString>,
    /// Instead of a password, where SCRAM is asked for.
    pub(crate) scram_client_key: Option<&'a ScramKey>,
    /// What the server's signature must be made with.
    pub(crate) scram_server_key: Option<&'a ScramKey>,
    /// Methods that may be used.
    pub(crate) require_auth: &'a RequireAuth,
    /// Whether SCRAM has to be bound to TLS.
    pub(crate) channel_binding: ChannelBindingPolicy,
    /// What TLS told of the server; `None`: there is no TLS.
    pub(crate) tls: Option<&'a ServerTlsFacts>,
    /// Whether the server must have asked for our certificate.
    pub(crate) cert_mode: SslCertMode,
    /// The protocol that the startup packet asks for.
    pub(crate) requested_version: ProtocolVersion,
    /// The oldest that is accepted.
    pub(crate) min_version: ProtocolVersion,
    /// Protocol extensions that it asks for, by the names of their parameters.
    pub(crate) extensions: &'a [String],
}

/// Waits for the end of what a server says once it knows who we are: the first ReadyForQuery.
pub(crate) async fn wait_ready(dialog: &mut Dialog) -> Result<(), UpstreamError> {
    loop {
        match dialog.receive().await? {
            Message::BackendKeyData { process_id, .. } => dialog.introduction.process_id = Some(process_id),
            Message::ReadyForQuery(_) => return Ok(()),
            Message::ErrorResponse(error) => return Err(UpstreamError::Server(Box::new(error))),
            other => return Err(UpstreamError::Unexpected(format!("{other:?}"))),
        }
    }
}

/// From the startup packet to the server's word that we may come in.
pub(crate) async fn authenticate(
    dialog: &mut Dialog,
    startup: &FirstPacket,
    credentials: &Credentials<'_>,
) -> Result<(), UpstreamError> {
    dialog.send(|output| startup.encode(output)).await?;
    let (mut proved, mut negotiated, mut is_bound) = (false, false, false);
    loop {
        let request = match dialog.receive().await? {
            Message::Authentication(request) => request,
            Message::NegotiateProtocolVersion(answer) if !proved && !negotiated => {
                check_negotiation(&answer, credentials)?;
                dialog.introduction.declined = answer.unrecognized;
                negotiated = true;
                continue;
            }
            Message::ErrorResponse(error) => return Err(UpstreamError::Server(Box::new(error))),
            other => return Err(UpstreamError::Unexpected(format!("{other:?}"))),
        };
        if let Some(asked) = auth_request(&request, proved) {
            credentials.require_auth.check(asked)?;
        }
        if credentials.channel_binding == ChannelBindingPolicy::Require {
            check_channel_binding(&request, credentials.tls.is_some(), is_bound)?;
        }
        match request {
            Authentication::Ok => return check_certificate_was_wanted(credentials),
            Authentication::CleartextPassword => {
                let password = password(credentials)?;
                let answer = Password::of_text(password.expose_secret());
                dialog.send(|output| frontend::Message::Password(answer).encode(output)).await?;
            }
            Authentication::Md5Password(salt) => {
                let password = password(credentials)?.expose_secret().as_bytes();
                let answer = Password::of_text(md5::password_reply(credentials.user, password, salt));
                dialog.send(|output| frontend::Message::Password(answer).encode(output)).await?;
            }
            Authentication::Sasl(mechanisms) => is_bound = sasl(dialog, credentials, &mechanisms).await?,
            other => {
                let text = format!("authentication method {} is not supported", other.method_name());
                return Err(UpstreamError::Unsupported(text));
            }
        }
        proved = true;
    }
}

/// What libpq accepts of a server that does not speak the protocol it was asked for, in libpq's words. Only what was asked for
/// beside a version can be declined.
fn check_negotiation(
    answer: &NegotiateProtocolVersion,
    credentials: &Credentials<'_>,
) -> Result<(), UpstreamError> {
    const NEVER_EXISTED: ProtocolVersion = ProtocolVersion { major: 3, minor: 1 };
    let (got, min) = (answer.version, credentials.min_version);
    let reason = if got > credentials.requested_version {
        "server requested downgrade to a higher-numbered version".to_owned()
    } else if got < ProtocolVersion::V3_0 {
        "server requested downgrade to pre-3.0 protocol version".to_owned()
    } else if got == NEVER_EXISTED {
        "server requested downgrade to non-existent 3.1 protocol version".to_owned()
    } else if got == credentials.requested_version && answer.unrecognized.is_empty() {
        "server negotiated but asks for no changes".to_owned()
    } else if got < min {
        return Err(UpstreamError::OldProtocol { got, min });
    } else if let Some(name) = answer.unrecognized.iter().find(|name| !credentials.extensions.contains(name))
    {
        format!("server reported an unsupported parameter that was not requested (\"{name}\")")
    } else {
        return Ok(());
    };
    Err(UpstreamError::Negotiation(reason))
}

/// `channel_binding=require`: whatever cannot be bound is refused, before anything secret is sent.
fn check_channel_binding(
    request: &Authentication,
    has_tls: bool,
    is_bound: bool,
) -> Result<(), UpstreamError> {
    Err(UpstreamError::NoChannelBinding(match request {
        Authentication::Sasl(_) | Authentication::SaslContinue(_) | Authentication::SaslFinal(_)
            if has_tls =>
        {
            return Ok(());
        }
        Authentication::Sasl(_) | Authentication::SaslContinue(_) | Authentication::SaslFinal(_) => {
            "channel binding required, but SSL not in use"
        }
        Authentication::Ok if is_bound => return Ok(()),
        Authentication::Ok => {
            "channel binding required, but server authenticated client without channel binding"
        }
        _ => "channel binding required but not supported by server's authentication request",
    }))
}

/// `sslcertmode=require`: the server must have known us by our certificate.
fn check_certificate_was_wanted(credentials: &Credentials<'_>) -> Result<(), UpstreamError> {
    if credentials.cert_mode != SslCertMode::Require {
        return Ok(());
    }
    match credentials.tls {
        Some(tls) if tls.certificate_requested && tls.certificate_sent => Ok(()),
        Some(tls) if tls.certificate_requested => {
            Err(UpstreamError::NoCertificate("server accepted connection without a valid SSL certificate"))
        }
        _ => Err(UpstreamError::NoCertificate("server did not request an SSL certificate")),
    }
}

/// What `require_auth` has to say about; `None` for what is refused anyway.
fn auth_request(request: &Authentication, proved: bool) -> Option<AuthRequest> {
    match request {
        Authentication::Ok => Some(AuthRequest::Ok { proved }),
        Authentication::CleartextPassword => Some(AuthRequest::CleartextPassword),
        Authentication::Md5Password(_) => Some(AuthRequest::Md5Password),
        Authentication::Sasl(_) => Some(AuthRequest::ScramSha256),
        Authentication::SaslContinue(_) | Authentication::SaslFinal(_) | Authentication::Other(_) => None,
    }
}

fn password<'a>(credentials: &Credentials<'a>) -> Result<&'a SecretString, UpstreamError> {
    credentials.password.ok_or(UpstreamError::NoPassword)
}

/// Whether the exchange was bound to the connection.
async fn sasl(
    dialog: &mut Dialog,
    credentials: &Credentials<'_>,
    mechanisms: &[String],
) -> Result<bool, UpstreamError> {
    let offers_binding = mechanisms.iter().any(|mechanism| mechanism == scram::SCRAM_SHA_256_PLUS);
    if offers_binding && credentials.tls.is_none() {
        let text = "server offered SCRAM-SHA-256-PLUS authentication over a non-SSL connection";
        return Err(UpstreamError::NoChannelBinding(text));
    }
    let (first, exchange) = scram_client(credentials)?.start(mechanisms, client_nonce()?)?;
    let is_bound = first.mechanism == scram::SCRAM_SHA_256_PLUS;
    let answer = Password::of_sasl_initial(first.mechanism, first.message.as_bytes());
    dialog.send(|output| frontend::Message::Password(answer).encode(output)).await?;
    let challenge = match dialog.receive().await? {
        Message::Authentication(Authentication::SaslContinue(data)) => data,
        other => return Err(unexpected_or_server(other)),
    };
    // Deriving the key takes up to half a second with the most iterations that are accepted.
    let proving = tokio::task::spawn_blocking(move || exchange.handle(&challenge));
    let (exchange, last) = proving.await.map_err(|_| UpstreamError::Closed)??;
    let answer = Password::of_sasl(last.into_bytes());
    dialog.send(|output| frontend::Message::Password(answer).encode(output)).await?;
    match dialog.receive().await? {
        Message::Authentication(Authentication::SaslFinal(data)) => {
            exchange.handle(&data)?;
            Ok(is_bound)
        }
        other => Err(unexpected_or_server(other)),
    }
}

/// As libpq: with a ClientKey the password is not looked at, with a ServerKey the server's is not derived from it.
fn scram_client(credentials: &Credentials<'_>) -> Result<scram::Client, UpstreamError> {
    let binding = credentials.tls.map_or(ChannelBinding::Unsupported, |tls| tls.binding.clone());
    let policy = credentials.channel_binding;
    let client = match credentials.scram_client_key {
        Some(key) => scram::Client::of_client_key(key.expose_secret(), binding, policy),
        None => scram::Client::new(password(credentials)?.expose_secret().as_bytes(), binding, policy),
    };
    Ok(match credentials.scram_server_key {
        Some(key) => client.expecting(key.expose_secret()),
        None => client,
    })
}

fn unexpected_or_server(message: Message) -> UpstreamError {
    match message {
        Message::ErrorResponse(error) => UpstreamError::Server(Box::new(error)),
        other => UpstreamError::Unexpected(format!("{other:?}")),
    }
}

fn client_nonce() -> Result<[u8; scram::NONCE_BYTES], UpstreamError> {
    let mut nonce = [0; scram::NONCE_BYTES];
    rand::fill(&mut nonce).map_err(|_| UpstreamError::NoRandomness)?;
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(version: ProtocolVersion, unrecognized: &[&str], asked: &[&str]) -> Result<(), String> {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let extensions = names(asked);
        let credentials = Credentials {
            user: "u",
            password: None,
            scram_client_key: None,
            scram_server_key: None,
            require_auth: &RequireAuth::default(),
            channel_binding: ChannelBindingPolicy::Disable,
            tls: None,
            cert_mode: SslCertMode::Allow,
            requested_version: ProtocolVersion::V3_0,
            min_version: ProtocolVersion::V3_0,
            extensions: &extensions,
        };
        let answer = NegotiateProtocolVersion { version, unrecognized: names(unrecognized) };
        check_negotiation(&answer, &credentials).map_err(|error| error.to_string())
    }

    #[test]
    fn what_was_asked_for_may_be_declined_and_nothing_else() {
        let version = ProtocolVersion::V3_0;
        assert_eq!(checked(version, &["_pq_.a"], &["_pq_.a"]), Ok(()));
        let never = checked(version, &["_pq_.b"], &["_pq_.a"]).unwrap_err();
        assert!(never.ends_with("unsupported parameter that was not requested (\"_pq_.b\")"), "{never}");
        assert!(checked(version, &["_pq_.a", "_pq_.b"], &["_pq_.a"]).is_err());
        assert!(checked(version, &["_pq_.a"], &[]).is_err());
        assert!(checked(version, &[], &["_pq_.a"]).unwrap_err().ends_with("asks for no changes"));
        assert!(checked(ProtocolVersion::V3_2, &["_pq_.a"], &["_pq_.a"]).is_err());
    }
}
