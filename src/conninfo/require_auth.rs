//! `require_auth`: which ways to prove who we are the server may ask for.
//!
//! Owns the list's grammar and the check of what the server asked, in libpq's words (`check_expected_areq`).

use crate::conninfo::ConninfoError;

/// What a server can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthRequest {
    /// A password in clear text.
    CleartextPassword,
    /// A password hashed with MD5.
    Md5Password,
    /// GSSAPI.
    Gss,
    /// SSPI.
    Sspi,
    /// SASL with SCRAM-SHA-256 or its `-PLUS`.
    ScramSha256,
    /// SASL with OAUTHBEARER.
    Oauth,
    /// Nothing (any more): the session may begin. `proved` tells whether an exchange was completed before.
    Ok {
        /// Whether we proved who we are.
        proved: bool,
    },
}

/// The allowed methods. The default allows everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequireAuth {
    /// As given, for the error.
    text: String,
    methods: Vec<Method>,
    /// The methods are those *not* allowed.
    negative: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Password,
    Md5,
    Gss,
    Sspi,
    ScramSha256,
    Oauth,
    None,
}

impl Default for RequireAuth {
    fn default() -> Self {
        Self { text: String::new(), methods: Vec::new(), negative: true }
    }
}

impl RequireAuth {
    /// Reads the list; an empty one allows everything.
    pub fn parse(text: &str) -> Result<Self, ConninfoError> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let mut methods = Vec::new();
        let mut negative = false;
        for (index, part) in text.split(',').enumerate() {
            let name = match part.strip_prefix('!') {
                Some(_) if index > 0 && !negative => {
                    return Err(ConninfoError::NegativeAuthMixed(part.to_owned()));
                }
                Some(name) => {
                    negative = true;
                    name
                }
                None if negative => return Err(ConninfoError::PositiveAuthMixed(part.to_owned())),
                None => part,
            };
            let method = Method::named(name).ok_or_else(|| ConninfoError::InvalidValue {
                keyword: "require_auth",
                value: name.to_owned(),
            })?;
            if methods.contains(&method) {
                return Err(ConninfoError::DuplicateAuth(part.to_owned()));
            }
            methods.push(method);
        }
        Ok(Self { text: text.to_owned(), methods, negative })
    }

    /// Whether the server may ask for this.
    pub fn allows(&self, request: AuthRequest) -> bool {
        let method = match request {
            AuthRequest::CleartextPassword => Method::Password,
            AuthRequest::Md5Password => Method::Md5,
            AuthRequest::Gss => Method::Gss,
            AuthRequest::Sspi => Method::Sspi,
            AuthRequest::ScramSha256 => Method::ScramSha256,
            AuthRequest::Oauth => Method::Oauth,
            AuthRequest::Ok { proved: true } => return true,
            AuthRequest::Ok { proved: false } => Method::None,
        };
        self.methods.contains(&method) != self.negative
    }

    /// The error to end the connection with, if the server may not ask for this.
    pub fn check(&self, request: AuthRequest) -> Result<(), ConninfoError> {
        if self.allows(request) {
            return Ok(());
        }
        let reason = match request {
            AuthRequest::CleartextPassword => "server requested a cleartext password",
            AuthRequest::Md5Password => "server requested a hashed password",
            AuthRequest::Gss => "server requested GSSAPI authentication",
            AuthRequest::Sspi => "server requested SSPI authentication",
            AuthRequest::ScramSha256 | AuthRequest::Oauth => "server requested SASL authentication",
            AuthRequest::Ok { .. } => "server did not complete authentication",
        };
        Err(ConninfoError::AuthRequirement { requirement: self.text.clone(), reason })
    }
}

impl Method {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "password" => Self::Password,
            "md5" => Self::Md5,
            "gss" => Self::Gss,
            "sspi" => Self::Sspi,
            "scram-sha-256" => Self::ScramSha256,
            "oauth" => Self::Oauth,
            "none" => Self::None,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: AuthRequest = AuthRequest::Ok { proved: false };

    #[test]
    fn an_empty_list_allows_everything() {
        let all = RequireAuth::parse("").unwrap();
        assert!(all.allows(NOTHING) && all.allows(AuthRequest::CleartextPassword));
    }

    #[test]
    fn only_named_methods_are_allowed() {
        let scram = RequireAuth::parse("scram-sha-256").unwrap();
        assert!(scram.allows(AuthRequest::ScramSha256));
        assert!(scram.allows(AuthRequest::Ok { proved: true }));
        let error = |request| scram.check(request).unwrap_err().to_string();
        let prefix = "authentication method requirement \"scram-sha-256\" failed: ";
        assert_eq!(error(NOTHING), format!("{prefix}server did not complete authentication"));
        assert_eq!(
            error(AuthRequest::CleartextPassword),
            format!("{prefix}server requested a cleartext password")
        );
        assert_eq!(error(AuthRequest::Md5Password), format!("{prefix}server requested a hashed password"));
        let trusting = RequireAuth::parse("scram-sha-256,none").unwrap();
        assert!(trusting.allows(NOTHING) && !trusting.allows(AuthRequest::Md5Password));
    }

    #[test]
    fn negated_methods_are_taken_away() {
        let no_password = RequireAuth::parse("!password,!md5").unwrap();
        assert!(!no_password.allows(AuthRequest::CleartextPassword));
        assert!(no_password.allows(AuthRequest::ScramSha256) && no_password.allows(NOTHING));
        assert!(!RequireAuth::parse("!none").unwrap().allows(NOTHING));
    }

    #[test]
    fn errors_are_libpqs() {
        let error = |text: &str| RequireAuth::parse(text).unwrap_err().to_string();
        assert_eq!(error("scram"), r#"invalid require_auth value: "scram""#);
        assert_eq!(error("!scram"), r#"invalid require_auth value: "scram""#);
        assert_eq!(error("md5,"), r#"invalid require_auth value: """#);
        assert_eq!(error("md5,md5"), r#"require_auth method "md5" is specified more than once"#);
        assert_eq!(error("!none,!none"), r#"require_auth method "!none" is specified more than once"#);
        assert_eq!(
            error("md5,!password"),
            r#"negative require_auth method "!password" cannot be mixed with non-negative methods"#
        );
        assert_eq!(
            error("!md5,password"),
            r#"require_auth method "password" cannot be mixed with negative methods"#
        );
    }
}
