//! `pg_ident.conf`: which of the names that somebody has proved to be his may act as which user.
//!
//! Owns the maps and their meaning (`check_usermap` of hba.c): the first line that fits lets him in.

use std::path::Path;

use crate::access::error::{LineError, LineProblem};
use crate::access::name::{Name, compile};
use crate::access::regex::Regex;
use crate::access::tokens::{IncludedFiles, Line, Token, tokenize};
use crate::access::users::Users;

/// The lines of all maps.
#[derive(Clone, Debug, Default)]
pub struct UserMaps(Vec<MapLine>);

#[derive(Clone, Debug)]
struct MapLine {
    map: String,
    system_user: SystemUser,
    user: Name,
}

#[derive(Clone, Debug)]
enum SystemUser {
    Exact(String),
    Pattern(Regex),
}

/// Somebody's own name does not let him act as that user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoMatch {
    /// Without a map both must be the same.
    #[error("provided user name ({user}) and authenticated user name ({system_user}) do not match")]
    Different {
        /// As whom he wants to act.
        user: String,
        /// Who he is.
        system_user: String,
    },
    /// No line of the map says so.
    #[error("no match in usermap \"{map}\" for user \"{user}\" authenticated as \"{system_user}\"")]
    NotInMap {
        /// The map.
        map: String,
        /// As whom he wants to act.
        user: String,
        /// Who he is.
        system_user: String,
    },
    /// A certificate that names nobody.
    #[error("client certificate contains no user name")]
    NoNameInCertificate,
}

impl UserMaps {
    /// Reads a file's text.
    pub fn parse(file: &Path, text: &str, files: &dyn IncludedFiles) -> Result<Self, LineError> {
        let lines = tokenize(file, text, files)?;
        let parse = |line: &Line| MapLine::parse(line).map_err(|problem| line.error(problem));
        Ok(Self(lines.iter().map(parse).collect::<Result<_, _>>()?))
    }

    /// Whether a map has a line at all.
    pub fn has(&self, map: &str) -> bool {
        self.0.iter().any(|line| line.map == map)
    }

    /// Whether somebody who has proved to be `system_user` may act as `user`.
    pub(super) fn check(
        &self,
        map: Option<&str>,
        user: &str,
        system_user: &str,
        users: Option<&Users>,
    ) -> Result<(), NoMatch> {
        let names = || (user.to_owned(), system_user.to_owned());
        let Some(map) = map else {
            let (user_, system_user_) = names();
            let no_match = NoMatch::Different { user: user_, system_user: system_user_ };
            return if user == system_user { Ok(()) } else { Err(no_match) };
        };
        let lines = self.0.iter().filter(|line| line.map == map);
        let mut verdicts = lines.map(|line| line.verdict(user, system_user, users));
        match verdicts.find(|verdict| *verdict != Verdict::NotThis) {
            Some(Verdict::Yes) => Ok(()),
            Some(Verdict::No | Verdict::NotThis) | None => {
                let (user, system_user) = names();
                Err(NoMatch::NotInMap { map: map.to_owned(), user, system_user })
            }
        }
    }
}

impl MapLine {
    fn parse(line: &Line) -> Result<Self, LineProblem> {
        let mut fields = line.fields.iter();
        let mut one = || match fields.next().map(Vec::as_slice) {
            None => Err(LineProblem::MissingEntry),
            Some([token]) => Ok(token),
            Some(_) => Err(LineProblem::MultipleIdentValues),
        };
        let (map, system_user, user): (&Token, &Token, &Token) = (one()?, one()?, one()?);
        let system_user = match system_user.text.strip_prefix('/') {
            Some(pattern) => SystemUser::Pattern(compile(pattern)?),
            None => SystemUser::Exact(system_user.text.clone()),
        };
        let user = Name::of(user)?;
        if let SystemUser::Pattern(regex) = &system_user
            && wants_first_group(&user)
        {
            if !regex.has_group() {
                let (pattern, user) = (regex.pattern().to_owned(), user.token().text.clone());
                return Err(LineProblem::NoSubexpression { pattern, user });
            }
            if !regex.is_certain_of_groups() {
                return Err(LineProblem::AmbiguousSubexpression(regex.pattern().to_owned()));
            }
        }
        Ok(Self { map: map.text.clone(), system_user, user })
    }

    fn verdict(&self, user: &str, system_user: &str, users: Option<&Users>) -> Verdict {
        let is_meant = match &self.system_user {
            SystemUser::Exact(name) => name == system_user,
            SystemUser::Pattern(regex) => regex.is_match(system_user),
        };
        if !is_meant {
            return Verdict::NotThis;
        }
        let is_allowed = match &self.system_user {
            SystemUser::Pattern(regex) if wants_first_group(&self.user) => {
                let Some(group) = regex.first_group(system_user) else { return Verdict::No };
                // A name that is made up like this is never a keyword.
                self.user.token().text.replacen("\\1", group, 1) == user
            }
            _ => self.user.is_user(user, users),
        };
        if is_allowed { Verdict::Yes } else { Verdict::NotThis }
    }
}

/// What a line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Yes,
    /// Neither this line nor one behind it: what it wants to take out of the name is not there.
    No,
    /// Perhaps another line.
    NotThis,
}

fn wants_first_group(user: &Name) -> bool {
    !user.is_group() && user.regex().is_none() && user.token().text.contains("\\1")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::tokens::NoFiles;

    fn maps(text: &str) -> UserMaps {
        UserMaps::parse(Path::new("ident"), text, &NoFiles).unwrap()
    }

    fn complaint(text: &str) -> String {
        let error = UserMaps::parse(Path::new("ident"), text, &NoFiles).unwrap_err();
        format!("{}: {}", error.line.unwrap(), error.problem)
    }

    #[test]
    fn without_a_map_the_names_must_be_the_same() {
        let maps = maps("m a b");
        assert_eq!(maps.check(None, "a", "a", None), Ok(()));
        assert_eq!(
            maps.check(None, "b", "a", None).unwrap_err().to_string(),
            "provided user name (b) and authenticated user name (a) do not match"
        );
    }

    #[test]
    fn the_first_line_that_fits_lets_in() {
        let maps = maps(
            "# map system database\n\
             m root standby\nm root \"all\"\nm pg all\n\
             n /^(.*)@example\\.com$ relay_\\1\nn /^x postgres\nn /^y /^(a|b)$\n",
        );
        for (map, system_user, user, is_allowed) in [
            ("m", "root", "standby", true),
            ("m", "root", "all", true),
            ("m", "root", "other", false),
            ("m", "pg", "other", true),
            ("n", "root", "standby", false),
            ("n", "dc2@example.com", "relay_dc2", true),
            ("n", "dc2@example.com", "relay_dc1", false),
            ("n", "dc2@example.org", "relay_dc2", false),
            ("n", "xyz", "postgres", true),
            ("n", "yes", "b", true),
            ("n", "yes", "c", false),
            ("none", "root", "root", false),
        ] {
            let outcome = maps.check(Some(map), user, system_user, None);
            assert_eq!(outcome.is_ok(), is_allowed, "{map} {system_user} {user}: {outcome:?}");
        }
        assert_eq!(
            maps.check(Some("m"), "other", "root", None).unwrap_err().to_string(),
            "no match in usermap \"m\" for user \"other\" authenticated as \"root\""
        );
        assert!(maps.has("n") && !maps.has("none"));
    }

    #[test]
    fn what_is_taken_out_of_a_name_is_no_keyword_and_must_be_there() {
        let maps = maps("m /^(.*)$ \\1\nn /^(a)?b$ \\1c\nn b c\n");
        assert!(maps.check(Some("m"), "anybody", "all", None).is_err());
        assert!(maps.check(Some("m"), "all", "all", None).is_ok());
        assert!(maps.check(Some("n"), "ac", "ab", None).is_ok());
        assert!(maps.check(Some("n"), "c", "b", None).is_err(), "the line that fails is the last one");
    }

    #[test]
    fn wrong_lines_are_named() {
        assert_eq!(complaint("\nm"), "2: missing entry at end of line");
        assert_eq!(complaint("m a"), "1: missing entry at end of line");
        assert_eq!(complaint("m a,b c"), "1: multiple values in ident field");
        assert_eq!(
            complaint("m /^a$ x\\1"),
            "1: regular expression \"^a$\" has no subexpressions as requested by backreference in \"x\\1\""
        );
        assert_eq!(
            complaint("m /(a|ab)b \\1"),
            "1: regular expression \"(a|ab)b\" cannot be used with \\1: it must begin with ^ and end with $, and have \
             neither alternatives nor non-greedy quantifiers"
        );
        assert_eq!(complaint("m /( b"), "1: invalid regular expression \"(\": parentheses () not balanced");
    }
}
