//! One line of `pg_hba.conf`, field by field (`parse_hba_line` of hba.c).
//!
//! Owns the grammar of a line. The order of its checks, and so which mistake of several is named, is PostgreSQL's.

use crate::access::error::LineProblem;
use crate::access::hba::{CertificateDemand, CertificateName, ConnectionType, Method, Place, Rule};
use crate::access::name::Name;
use crate::access::network::{Addresses, parse_address, parse_mask, parse_prefix_length};
use crate::access::tokens::{Field, Line, Token};

/// Reads a line.
pub(super) fn rule(line: &Line) -> Result<Rule, LineProblem> {
    let mut fields = Fields(line.fields.iter());
    let connection = connection_type(fields.one("connection type", "connection type")?)?;
    let databases = Name::all_of(fields.next("database specification")?)?;
    let users = Name::all_of(fields.next("role specification")?)?;
    let addresses = match connection {
        ConnectionType::Local => Addresses::All,
        _ => addresses(&mut fields)?,
    };
    let method = method(&fields.one("authentication method", "authentication type")?.text, connection)?;
    let place = Place { file: Some(line.file.clone()), line: line.number };
    let (certificate, certificate_name) = (CertificateDemand::None, CertificateName::Common);
    let mut rule = Rule {
        place,
        connection,
        databases,
        users,
        addresses,
        method,
        certificate,
        certificate_name,
        map: None,
    };
    for token in fields.0.flatten() {
        set_option(&mut rule, &token.text)?;
    }
    if method == Method::Cert {
        rule.certificate = CertificateDemand::VerifyFull;
    }
    Ok(rule)
}

/// The fields that are left.
struct Fields<'a>(std::slice::Iter<'a, Field>);

impl<'a> Fields<'a> {
    /// The next field, whose absence is called `absent`.
    fn next(&mut self, absent: &'static str) -> Result<&'a Field, LineProblem> {
        self.0.next().ok_or(LineProblem::EndOfLine(absent))
    }

    /// The only value of the next field.
    fn one(&mut self, absent: &'static str, several: &'static str) -> Result<&'a Token, LineProblem> {
        match self.next(absent)?.as_slice() {
            [token] => Ok(token),
            _ => Err(LineProblem::MultipleValues(several)),
        }
    }
}

fn connection_type(token: &Token) -> Result<ConnectionType, LineProblem> {
    match token.text.as_str() {
        "local" => Ok(ConnectionType::Local),
        "host" => Ok(ConnectionType::Host),
        "hostssl" => Ok(ConnectionType::HostSsl),
        "hostnossl" => Ok(ConnectionType::HostNoSsl),
        "hostgssenc" => Ok(ConnectionType::HostGssEnc),
        "hostnogssenc" => Ok(ConnectionType::HostNoGssEnc),
        other => Err(LineProblem::ConnectionType(other.to_owned())),
    }
}

/// One field, or two where the mask stands apart.
fn addresses(fields: &mut Fields<'_>) -> Result<Addresses, LineProblem> {
    let token = fields.one("IP address specification", "host address")?;
    for (keyword, addresses) in
        [("all", Addresses::All), ("samehost", Addresses::SameHost), ("samenet", Addresses::SameNet)]
    {
        if token.is_keyword(keyword) {
            return Ok(addresses);
        }
    }
    let text = token.text.as_str();
    let (host, bits) = text.split_once('/').map_or((text, None), |(host, bits)| (host, Some(bits)));
    let Some(address) = parse_address(host) else {
        return Err(match bits {
            Some(_) => LineProblem::HostNameWithMask(text.to_owned()),
            None => LineProblem::HostName(text.to_owned()),
        });
    };
    let mask = match bits {
        Some(bits) => {
            parse_prefix_length(bits, address).ok_or_else(|| LineProblem::CidrMask(text.to_owned()))?
        }
        None => parse_mask(&fields.one("netmask specification", "netmask")?.text, address)?,
    };
    Ok(Addresses::Range { address, mask })
}

fn method(text: &str, connection: ConnectionType) -> Result<Method, LineProblem> {
    let is_local = connection == ConnectionType::Local;
    let method = match text {
        "trust" => Method::Trust,
        "reject" => Method::Reject,
        "scram-sha-256" => Method::ScramSha256,
        "md5" => Method::Md5,
        "cert" => Method::Cert,
        "peer" => Method::Peer,
        // On a Unix socket it has always meant the same.
        "ident" if is_local => Method::Peer,
        "password" => return Err(LineProblem::PasswordInClear),
        "ident" | "gss" | "sspi" | "pam" | "bsd" | "ldap" | "radius" | "oauth" => {
            return Err(LineProblem::MethodNotSupported(text.to_owned()));
        }
        _ => return Err(LineProblem::Method(text.to_owned())),
    };
    match method {
        Method::Peer if !is_local => Err(LineProblem::PeerNotLocal),
        Method::Cert if connection != ConnectionType::HostSsl => Err(LineProblem::CertNotHostssl),
        method => Ok(method),
    }
}

fn set_option(rule: &mut Rule, text: &str) -> Result<(), LineProblem> {
    let (name, value) = text.split_once('=').ok_or_else(|| LineProblem::NotNameValue(text.to_owned()))?;
    let is_hostssl = rule.connection == ConnectionType::HostSsl;
    let wrong = |option| Err(LineProblem::OptionValue { option, value: value.to_owned() });
    match name {
        "map" if !matches!(rule.method, Method::Peer | Method::Cert) => {
            return Err(LineProblem::MapMisplaced);
        }
        "map" => rule.map = Some(value.to_owned()).filter(|map| !map.is_empty()),
        "clientcert" if !is_hostssl => return Err(LineProblem::OnlyHostssl("clientcert")),
        "clientcert" => match value {
            "verify-full" => rule.certificate = CertificateDemand::VerifyFull,
            "verify-ca" if rule.method == Method::Cert => return Err(LineProblem::CertVerifiesFully),
            "verify-ca" => rule.certificate = CertificateDemand::VerifyCa,
            _ => return wrong("clientcert"),
        },
        "clientname" if !is_hostssl => return Err(LineProblem::OnlyHostssl("clientname")),
        "clientname" => match value {
            "CN" => rule.certificate_name = CertificateName::Common,
            "DN" => rule.certificate_name = CertificateName::Distinguished,
            _ => return wrong("clientname"),
        },
        _ => return Err(LineProblem::UnknownOption(name.to_owned())),
    }
    Ok(())
}
