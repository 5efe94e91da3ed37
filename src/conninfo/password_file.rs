//! Password files: `~/.pgpass` or what `passfile` names.
//!
//! Owns the file's syntax (`passwordFromFile`): `host:port:database:user:password`, `*` for any, backslash before `:`
//! and `\`, `#` comments, first match wins. A file others can read is not used.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use secrecy::SecretString;
use zeroize::Zeroizing;

use crate::conninfo::surroundings::{FoundFile, Surroundings};

/// Why a password file was passed over. To be logged; libpq prints the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PasswordFileWarning {
    /// A directory, a device or a pipe.
    NotPlain(PathBuf),
    /// Group or others may do something with it.
    Accessible(PathBuf),
}

impl fmt::Display for PasswordFileWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPlain(path) => write!(f, "password file \"{}\" is not a plain file", path.display()),
            Self::Accessible(path) => write!(
                f,
                "password file \"{}\" has group or world access; permissions should be u=rw (0600) or less",
                path.display()
            ),
        }
    }
}

/// A password file that has been read.
pub(crate) struct PasswordFile(Zeroizing<String>);

impl PasswordFile {
    /// Reads the file; one that is not there is as good as empty.
    pub(crate) fn read(
        surroundings: &dyn Surroundings,
        path: &Path,
    ) -> Result<Option<Self>, PasswordFileWarning> {
        match surroundings.read(path) {
            Err(_) => Ok(None),
            Ok(FoundFile::NotPlain) => Err(PasswordFileWarning::NotPlain(path.to_owned())),
            Ok(FoundFile::Plain { mode, .. }) if mode & 0o077 != 0 => {
                Err(PasswordFileWarning::Accessible(path.to_owned()))
            }
            Ok(FoundFile::Plain { text, .. }) => Ok(Some(Self(text))),
        }
    }

    /// The password of the first line that matches all of `key`: host, port, database, user.
    pub(crate) fn password(&self, key: [&str; 4]) -> Option<SecretString> {
        let password = self.0.split('\n').find_map(|line| {
            let line = line.trim_end_matches('\r');
            if line.starts_with('#') {
                return None;
            }
            let rest = key.into_iter().try_fold(line, matching)?;
            Some(unescape(rest))
        });
        // An empty one ends the search, but is as good as none.
        password.filter(|password| !password.is_empty()).map(|password| SecretString::from(password.as_str()))
    }
}

/// What follows the first field of `line` and its colon, if the field matches `word`.
fn matching<'a>(line: &'a str, word: &str) -> Option<&'a str> {
    if let Some(rest) = line.strip_prefix("*:") {
        return Some(rest);
    }
    let mut field = line.chars();
    let mut word = word.chars().peekable();
    loop {
        let mut character = field.next()?;
        // A colon ends the field only where the word ends too: "::1" need not be escaped.
        if character == ':' && word.peek().is_none() {
            return Some(field.as_str());
        }
        if character == '\\' {
            character = field.next()?;
        }
        if word.next() != Some(character) {
            return None;
        }
    }
}

/// The last field: up to a colon, which the format leaves room for.
fn unescape(field: &str) -> Zeroizing<String> {
    // So much room that nothing is left behind where it grew.
    let mut password = Zeroizing::new(String::with_capacity(field.len()));
    let mut characters = field.chars();
    while let Some(character) = characters.next() {
        match character {
            ':' => break,
            // A backslash at the very end stands for itself.
            '\\' => password.push(characters.next().unwrap_or('\\')),
            other => password.push(other),
        }
    }
    password
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secrecy::ExposeSecret as _;

    use super::*;
    use crate::conninfo::FixedSurroundings;

    fn lookup(file: &str, key: [&str; 4]) -> Option<String> {
        PasswordFile(file.to_owned().into()).password(key).map(|password| password.expose_secret().to_owned())
    }

    const KEY: [&str; 4] = ["db1", "5432", "replication", "replicator"];

    #[test]
    fn the_first_matching_line_wins() {
        let file = "#db1:5432:replication:replicator:comment\n\
                    db1:5433:*:*:other port\n\
                    db1:*:replication:replicator:right\r\n\
                    *:*:*:*:late\n";
        assert_eq!(lookup(file, KEY).as_deref(), Some("right"));
        assert_eq!(lookup(file, ["x", "1", "y", "z"]).as_deref(), Some("late"));
        assert_eq!(lookup("", KEY), None);
        assert_eq!(lookup("db1:5432:replication:replicator", KEY), None);
        assert_eq!(lookup("db1:5432:replication:replicato:x", KEY), None);
        assert_eq!(lookup("db1x:5432:replication:replicator:x", KEY), None);
        assert_eq!(lookup("*:*:*:*:\n*:*:*:*:late", KEY), None);
    }

    #[test]
    fn colons_and_backslashes_are_escaped() {
        assert_eq!(lookup(r"\:\:1:5432:*:*:a\:b\\c", ["::1", "5432", "d", "u"]).as_deref(), Some(r"a:b\c"));
        assert_eq!(lookup("::1:5432:*:*:x", ["::1", "5432", "d", "u"]).as_deref(), Some("x"));
        assert_eq!(lookup(r"a\\b:*:*:*:x", [r"a\b", "1", "d", "u"]).as_deref(), Some("x"));
        assert_eq!(lookup(r"*:*:*:*:tail\", KEY).as_deref(), Some(r"tail\"));
        assert_eq!(lookup("*:*:*:*:first:rest", KEY).as_deref(), Some("first"));
        assert_eq!(lookup(r"\*:*:*:*:star", ["*", "1", "d", "u"]).as_deref(), Some("star"));
        assert_eq!(lookup(r"\*:*:*:*:star", KEY), None);
    }

    #[test]
    fn a_file_that_others_can_read_is_refused_in_libpqs_words() {
        let warning = |mode| {
            let surroundings = FixedSurroundings::of_user("x").with_file("/p", mode, "*:*:*:*:p\n");
            PasswordFile::read(&surroundings, Path::new("/p")).err().map(|warning| warning.to_string())
        };
        let text =
            "password file \"/p\" has group or world access; permissions should be u=rw (0600) or less";
        assert_eq!(warning(0o640).as_deref(), Some(text));
        assert_eq!(warning(0o604).as_deref(), Some(text));
        assert_eq!(warning(0o600), None);
        assert_eq!(warning(0o400), None);
        let mut surroundings = FixedSurroundings::of_user("x");
        surroundings.files.insert(PathBuf::from("/p"), FoundFile::NotPlain);
        let warning = PasswordFile::read(&surroundings, Path::new("/p")).err().unwrap();
        assert_eq!(warning.to_string(), "password file \"/p\" is not a plain file");
    }

    fn escape(text: &str) -> String {
        text.replace('\\', r"\\").replace(':', r"\:")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn what_is_escaped_matches_and_comes_back(
            key in prop::array::uniform4("[a-z:\\\\ é*]{1,6}"),
            password in "[a-z:\\\\ é*#]{1,8}",
        ) {
            let line = key.iter().chain([&password]).map(|field| escape(field)).collect::<Vec<_>>().join(":");
            let line = if line.starts_with('#') { format!("\\{line}") } else { line };
            let [host, port, database, user] = &key;
            prop_assert_eq!(lookup(&line, [host, port, database, user]), Some(password));
        }

        #[test]
        fn any_file_is_searched_without_a_panic(file in "[\\PC\\n:\\\\*#]{0,60}", host in "\\PC{0,4}") {
            let _ = lookup(&file, [&host, "5432", "d", "u"]);
        }
    }
}
