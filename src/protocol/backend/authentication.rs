//! Authentication requests.
//!
//! Reads every request that a server can make, also those that are not answered here, so that a refusal can name them.

use bytes::{BufMut, Bytes, BytesMut};

use crate::protocol::DecodeError;
use crate::protocol::fields::{Fields, put_text};

/// A step of authentication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authentication {
    /// Done: the client is who it says.
    Ok,
    /// The password, as it is.
    CleartextPassword,
    /// The password hashed with the user's name and this salt.
    Md5Password([u8; 4]),
    /// One of these SASL mechanisms, best first.
    Sasl(Vec<String>),
    /// Data of the mechanism.
    SaslContinue(Bytes),
    /// Last data of the mechanism.
    SaslFinal(Bytes),
    /// A method that is not supported here, by its code: see [`Authentication::method_name`].
    Other(u32),
}

impl Authentication {
    pub(super) fn decode(body: Bytes) -> Result<Self, DecodeError> {
        let mut fields = Fields::of("Authentication", body);
        let request = match fields.u32("method")? {
            OK => Self::Ok,
            CLEARTEXT_PASSWORD => Self::CleartextPassword,
            MD5_PASSWORD => Self::Md5Password(fields.u32("salt")?.to_be_bytes()),
            SASL => Self::Sasl(decode_mechanisms(&mut fields)?),
            SASL_CONTINUE => return Ok(Self::SaslContinue(fields.rest())),
            SASL_FINAL => return Ok(Self::SaslFinal(fields.rest())),
            other => return Ok(Self::Other(other)),
        };
        fields.finish()?;
        Ok(request)
    }

    pub(super) fn write(&self, out: &mut BytesMut) {
        match self {
            Self::Ok => out.put_u32(OK),
            Self::CleartextPassword => out.put_u32(CLEARTEXT_PASSWORD),
            Self::Md5Password(salt) => {
                out.put_u32(MD5_PASSWORD);
                out.put_slice(salt);
            }
            Self::Sasl(mechanisms) => {
                out.put_u32(SASL);
                mechanisms.iter().for_each(|mechanism| put_text(out, mechanism));
                out.put_u8(0);
            }
            Self::SaslContinue(data) => {
                out.put_u32(SASL_CONTINUE);
                out.put_slice(data);
            }
            Self::SaslFinal(data) => {
                out.put_u32(SASL_FINAL);
                out.put_slice(data);
            }
            Self::Other(method) => out.put_u32(*method),
        }
    }

    /// The method's name, as `pg_hba.conf` has it.
    pub fn method_name(&self) -> &'static str {
        match self {
            Self::Ok => "trust",
            Self::CleartextPassword => "password",
            Self::Md5Password(_) => "md5",
            Self::Sasl(_) | Self::SaslContinue(_) | Self::SaslFinal(_) => "SASL",
            Self::Other(2) => "Kerberos V5",
            Self::Other(4) => "crypt",
            Self::Other(6) => "SCM credentials",
            Self::Other(7 | 8) => "gss",
            Self::Other(9) => "sspi",
            Self::Other(_) => "unknown",
        }
    }
}

fn decode_mechanisms(fields: &mut Fields) -> Result<Vec<String>, DecodeError> {
    let mut mechanisms = Vec::new();
    loop {
        match fields.text("mechanism")? {
            end if end.is_empty() => return Ok(mechanisms),
            mechanism => mechanisms.push(mechanism),
        }
    }
}

const OK: u32 = 0;
const CLEARTEXT_PASSWORD: u32 = 3;
const MD5_PASSWORD: u32 = 5;
const SASL: u32 = 10;
const SASL_CONTINUE: u32 = 11;
const SASL_FINAL: u32 = 12;
