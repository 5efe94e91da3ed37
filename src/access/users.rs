//! The users: their secrets, what they may do, and for how long.
//!
//! Owns what `pg_authid` is to a server. A user that does not exist, or whose password has expired, is asked as any other and
//! fails at the end, with a salt that stays the same over restarts, whatever else changes, so that nobody learns who exists.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    num::NonZeroU32,
};

use crate::access::hba::Method;
use crate::protocol::md5::StoredHash;
use crate::protocol::scram::{Credentials, ITERATIONS_DEFAULT, Verifier};
use crate::protocol::{ServerError, SqlState};
use crate::wal::PgTimestamp;

/// What is known of one user.
#[derive(Clone, Debug)]
pub struct User {
    /// Without one he cannot log in by a password.
    pub secret: Option<Secret>,
    /// What he may do.
    pub may: Permissions,
    /// When his password expires.
    pub valid_until: Option<PgTimestamp>,
    /// Most sessions of his at a time; `None`: any number.
    pub connection_limit: Option<usize>,
    /// Groups that he belongs to; one may be another user, with groups of its own.
    pub member_of: BTreeSet<String>,
}

/// What is kept instead of a password.
#[derive(Clone, Debug)]
pub enum Secret {
    /// For SCRAM-SHA-256.
    Scram(Verifier),
    /// For MD5.
    Md5(StoredHash),
}

/// Something that a user may be allowed to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Permission {
    /// Stream WAL, and have slots for it.
    Stream,
    /// Take base backups.
    BaseBackup,
    /// Execute SQL.
    Sql,
    /// Use the admin console.
    Admin,
}

impl Permission {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::Stream, Self::BaseBackup, Self::Sql, Self::Admin];

    /// As it is written in the users file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stream => "stream",
            Self::BaseBackup => "base_backup",
            Self::Sql => "sql",
            Self::Admin => "admin",
        }
    }
}

/// What a user may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permissions(BTreeSet<Permission>);

impl Permissions {
    /// Whether this is among it.
    pub fn has(&self, permission: Permission) -> bool {
        self.0.contains(&permission)
    }

    /// Whether a replication connection is of any use to him.
    pub fn allow_replication(&self) -> bool {
        [Permission::Stream, Permission::BaseBackup, Permission::Sql].iter().any(|wanted| self.has(*wanted))
    }
}

impl FromIterator<Permission> for Permissions {
    fn from_iter<I: IntoIterator<Item = Permission>>(permissions: I) -> Self {
        Self(permissions.into_iter().collect())
    }
}

/// What somebody may do who is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// What he may do.
    pub may: Permissions,
    /// Most sessions of his at a time.
    pub connection_limit: Option<usize>,
}

impl Grant {
    /// Where there are no users nobody is told from another. To administer takes somebody who is known.
    pub(super) fn of_everybody() -> Self {
        let all = [Permission::Stream, Permission::BaseBackup, Permission::Sql];
        Self { may: all.into_iter().collect(), connection_limit: None }
    }
}

/// How a user is to prove that he knows his password.
#[derive(Clone, Debug)]
pub enum Challenge {
    /// By SCRAM-SHA-256.
    Scram(Credentials),
    /// By MD5. `None` of the two lets nobody in: it is a mock when the user is not real.
    Md5 {
        /// What his answer is held against.
        stored: StoredHash,
        /// Whether a right answer lets him in.
        is_real: bool,
    },
}

/// Random bytes of this installation, from which users that do not exist get their salts; as secret as a password.
#[derive(Clone)]
pub struct MockNonce([u8; 32]);

impl From<[u8; 32]> for MockNonce {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for MockNonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MockNonce(hidden)")
    }
}

/// The users by name.
#[derive(Clone)]
pub struct Users {
    by_name: BTreeMap<String, User>,
    mock_kind: MockKind,
}

/// What a user that does not exist looks like: as most of those who do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MockKind {
    Scram(NonZeroU32),
    Md5,
}

impl Default for Users {
    fn default() -> Self {
        Self::new(BTreeMap::new())
    }
}

impl Users {
    /// These users and no others.
    pub fn new(by_name: BTreeMap<String, User>) -> Self {
        let mock_kind = MockKind::like_most_of(by_name.values());
        Self { by_name, mock_kind }
    }

    /// A user.
    pub fn user(&self, name: &str) -> Option<&User> {
        self.by_name.get(name)
    }

    /// Every user, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &User)> {
        self.by_name.iter().map(|(name, user)| (name.as_str(), user))
    }

    /// Whether a user belongs to a group, itself included, directly or through other users (`is_member_of_role_nosuper`).
    pub(super) fn is_member(&self, user: &str, group: &str) -> bool {
        let mut seen = BTreeSet::new();
        let mut next: Vec<&str> =
            self.by_name.get_key_value(user).map(|(name, _)| name.as_str()).into_iter().collect();
        while let Some(name) = next.pop() {
            if name == group {
                return true;
            }
            if seen.insert(name)
                && let Some(user) = self.by_name.get(name)
            {
                next.extend(user.member_of.iter().map(String::as_str));
            }
        }
        false
    }

    pub(super) fn challenge(
        &self,
        user: &str,
        method: Method,
        now: PgTimestamp,
        nonce: &MockNonce,
    ) -> Challenge {
        let known = self.by_name.get(user);
        let is_valid = |user: &&User| user.valid_until.is_none_or(|until| until >= now);
        match known.filter(is_valid).and_then(|user| user.secret.as_ref()) {
            Some(Secret::Scram(verifier)) => Challenge::Scram(Credentials::Known(verifier.clone())),
            Some(Secret::Md5(stored)) if method == Method::Md5 => {
                Challenge::Md5 { stored: stored.clone(), is_real: true }
            }
            // A secret for MD5 is of no use elsewhere.
            Some(Secret::Md5(_)) => self.mock_scram(user, nonce),
            None => self.mock(user, method, known.and_then(|user| user.secret.as_ref()), nonce),
        }
    }

    /// What somebody is asked who cannot be right. Somebody whose password has expired is asked as before.
    fn mock(&self, user: &str, method: Method, expired: Option<&Secret>, nonce: &MockNonce) -> Challenge {
        match (expired, self.mock_kind) {
            (Some(Secret::Scram(verifier)), _) => Challenge::Scram(Credentials::Mock(verifier.clone())),
            (Some(Secret::Md5(_)), _) | (None, MockKind::Md5) if method == Method::Md5 => {
                Challenge::Md5 { stored: StoredHash::mock(&nonce.0, user), is_real: false }
            }
            _ => self.mock_scram(user, nonce),
        }
    }

    fn mock_scram(&self, user: &str, nonce: &MockNonce) -> Challenge {
        let iterations = match self.mock_kind {
            MockKind::Scram(iterations) => iterations,
            MockKind::Md5 => ITERATIONS_DEFAULT,
        };
        Challenge::Scram(Credentials::mock(&nonce.0, user, iterations))
    }

    pub(super) fn grant(&self, name: &str) -> Result<Grant, ServerError> {
        let user = self.by_name.get(name).ok_or_else(|| {
            let text = format!("role \"{name}\" does not exist");
            ServerError::fatal(SqlState::INVALID_AUTHORIZATION_SPECIFICATION, text)
        })?;
        Ok(Grant { may: user.may.clone(), connection_limit: user.connection_limit })
    }
}

impl MockKind {
    fn like_most_of<'a>(users: impl Iterator<Item = &'a User>) -> Self {
        let mut counts: Vec<(Self, usize)> = Vec::new();
        for secret in users.filter_map(|user| user.secret.as_ref()) {
            let kind = match secret {
                Secret::Scram(verifier) => Self::Scram(verifier.iterations()),
                Secret::Md5(_) => Self::Md5,
            };
            match counts.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, count)) => *count += 1,
                None => counts.push((kind, 1)),
            }
        }
        let most = counts.into_iter().max_by_key(|(_, count)| *count);
        most.map_or(Self::Scram(ITERATIONS_DEFAULT), |(kind, _)| kind)
    }
}

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Users").field(&self.by_name.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: PgTimestamp = PgTimestamp(1_000_000);
    const NONCE: MockNonce = MockNonce([7; 32]);

    fn scram(iterations: u32) -> Secret {
        let iterations = NonZeroU32::new(iterations).unwrap();
        Secret::Scram(Verifier::from_password(b"pencil", vec![3; 16], iterations))
    }

    fn md5() -> Secret {
        Secret::Md5("md50123456789abcdef0123456789abcdef".parse().unwrap())
    }

    fn user(secret: Option<Secret>) -> User {
        User {
            secret,
            may: [Permission::Stream].into_iter().collect(),
            valid_until: None,
            connection_limit: None,
            member_of: BTreeSet::new(),
        }
    }

    fn users<const N: usize>(all: [(&str, User); N]) -> Users {
        Users::new(all.into_iter().map(|(name, user)| (name.to_owned(), user)).collect())
    }

    /// What a client is asked, and whether a right answer would let it in.
    fn asked(users: &Users, name: &str, method: Method) -> (&'static str, bool) {
        match users.challenge(name, method, NOW, &NONCE) {
            Challenge::Scram(Credentials::Known(_)) => ("scram", true),
            Challenge::Scram(Credentials::Mock(_)) => ("scram", false),
            Challenge::Md5 { is_real, .. } => ("md5", is_real),
        }
    }

    #[test]
    fn the_secret_decides_how_a_password_is_asked_for_as_far_as_the_rule_allows() {
        let users = users([
            ("s", user(Some(scram(2)))),
            ("t", user(Some(scram(2)))),
            ("m", user(Some(md5()))),
            ("none", user(None)),
        ]);
        for (name, method, expected) in [
            ("s", Method::ScramSha256, ("scram", true)),
            ("s", Method::Md5, ("scram", true)),
            ("m", Method::ScramSha256, ("scram", false)),
            ("m", Method::Md5, ("md5", true)),
            ("none", Method::ScramSha256, ("scram", false)),
            ("none", Method::Md5, ("scram", false)),
            ("unknown", Method::Md5, ("scram", false)),
        ] {
            assert_eq!(asked(&users, name, method), expected, "{name} {method:?}");
        }
    }

    #[test]
    fn who_does_not_exist_looks_like_most_of_those_who_do() {
        let mostly_md5 =
            users([("a", user(Some(md5()))), ("b", user(Some(md5()))), ("c", user(Some(scram(2))))]);
        assert_eq!(asked(&mostly_md5, "unknown", Method::Md5), ("md5", false));
        assert_eq!(asked(&mostly_md5, "unknown", Method::ScramSha256), ("scram", false));
        let slow =
            users([("a", user(Some(scram(77)))), ("b", user(Some(scram(77)))), ("c", user(Some(scram(2))))]);
        let Challenge::Scram(Credentials::Mock(mock)) =
            slow.challenge("unknown", Method::ScramSha256, NOW, &NONCE)
        else {
            panic!("not a mock")
        };
        assert_eq!(mock.iterations().get(), 77);
    }

    #[test]
    fn an_expired_password_is_asked_for_as_before_and_never_right() {
        let expired = |secret| User { valid_until: Some(PgTimestamp(NOW.0 - 1)), ..user(Some(secret)) };
        let valid = User { valid_until: Some(NOW), ..user(Some(scram(5))) };
        let users = users([("s", expired(scram(5))), ("m", expired(md5())), ("v", valid)]);
        assert_eq!(asked(&users, "s", Method::ScramSha256), ("scram", false));
        assert_eq!(asked(&users, "m", Method::Md5), ("md5", false));
        assert_eq!(asked(&users, "v", Method::ScramSha256), ("scram", true));
        let Challenge::Scram(Credentials::Mock(same)) =
            users.challenge("s", Method::ScramSha256, NOW, &NONCE)
        else {
            panic!("not a mock")
        };
        assert_eq!(same.iterations().get(), 5);
    }

    #[test]
    fn groups_are_looked_for_through_users_and_in_circles_too() {
        let within = |groups: &[&str]| User {
            member_of: groups.iter().map(|group| (*group).to_owned()).collect(),
            ..user(None)
        };
        let users = users([("a", within(&["b"])), ("b", within(&["standbys", "a"])), ("c", within(&[]))]);
        assert!(users.is_member("a", "standbys") && users.is_member("b", "standbys"));
        assert!(users.is_member("c", "c"), "of itself");
        assert!(!users.is_member("c", "standbys"));
        assert!(!users.is_member("unknown", "unknown") && !users.is_member("standbys", "standbys"));
    }

    #[test]
    fn what_the_unknown_are_asked_depends_on_their_name_and_on_a_secret_and_on_nothing_else() {
        let salt = |users: &Users, name: &str, nonce: &MockNonce| match users.challenge(
            name,
            Method::ScramSha256,
            NOW,
            nonce,
        ) {
            Challenge::Scram(Credentials::Mock(mock)) => mock.to_string(),
            other => panic!("{other:?}"),
        };
        let before = users([("a", user(Some(scram(2))))]);
        let after = users([("b", user(Some(scram(2)))), ("c", user(Some(scram(2))))]);
        let asked = salt(&before, "unknown", &NONCE);
        assert_eq!(asked, salt(&after, "unknown", &NONCE), "whoever else is there");
        assert_ne!(asked, salt(&before, "another", &NONCE));
        assert_ne!(asked, salt(&before, "unknown", &MockNonce([8; 32])));
        assert!(!format!("{NONCE:?}").contains('7'));
    }

    #[test]
    fn secrets_are_not_shown() {
        let users = users([("a", user(Some(md5()))), ("b", user(Some(scram(2))))]);
        let shown = format!("{users:?} {:?} {:?}", users.user("a"), users.user("b"));
        assert!(!shown.contains("0123456789abcdef") && shown.contains("hidden"), "{shown}");
    }

    #[test]
    fn who_is_not_a_user_gets_nothing() {
        let error = users([]).grant("u").unwrap_err();
        assert_eq!(error.message, "role \"u\" does not exist");
        assert!(!Grant::of_everybody().may.has(Permission::Admin));
        assert!(Grant::of_everybody().may.allow_replication());
        assert!(!Permissions::from_iter([Permission::Admin]).allow_replication());
    }
}
