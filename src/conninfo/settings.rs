//! A connection string taken apart: keyword and text, nothing interpreted yet.
//!
//! Owns the key/value form, reading and printing. What the texts mean is decided in `resolve.rs`; what is not in the
//! string comes from `defaults.rs`.

use std::{collections::BTreeMap, fmt};

use zeroize::Zeroizing;

use crate::conninfo::{
    ConninfoError, REDACTED,
    keyword::{KEYWORDS, Keyword},
    uri,
};

/// What a connection string says, by keyword (`PQconninfoParse`).
///
/// `Debug` and `Display` hide secrets; [`Settings::to_connection_string`] does not.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Settings {
    values: BTreeMap<&'static str, Zeroizing<String>>,
}

impl Settings {
    /// Parses either form: key/value, or a `postgresql://` URI.
    pub fn parse(text: &str) -> Result<Self, ConninfoError> {
        if text.contains('\0') {
            return Err(ConninfoError::NullByte);
        }
        match uri::after_prefix(text) {
            Some(rest) => uri::parse(text, rest),
            None => parse_key_values(text),
        }
    }

    /// The text given for `keyword`; an empty one is not the same as none.
    pub fn value(&self, keyword: &str) -> Option<&str> {
        self.values.get(keyword).map(|value| value.as_str())
    }

    /// As [`Self::value`], where an empty text means none.
    pub(crate) fn filled(&self, keyword: &str) -> Option<&str> {
        self.value(keyword).filter(|value| !value.is_empty())
    }

    /// Sets `keyword`; an earlier value is replaced. Fails for a keyword that libpq does not have.
    pub fn store(&mut self, keyword: &str, value: &str) -> Result<(), ConninfoError> {
        // Older than sslmode, and still understood by libpq.
        let (keyword, value) = match keyword {
            "requiressl" if value.starts_with('1') => ("sslmode", "require"),
            "requiressl" => ("sslmode", "prefer"),
            _ => (keyword, value),
        };
        let known =
            Keyword::named(keyword).ok_or_else(|| ConninfoError::InvalidOption(keyword.to_owned()))?;
        self.values.insert(known.name, Zeroizing::new(value.to_owned()));
        Ok(())
    }

    /// Sets `keyword` unless it is set.
    pub(crate) fn store_default(&mut self, keyword: &'static Keyword, value: &str) {
        self.values.entry(keyword.name).or_insert_with(|| Zeroizing::new(value.to_owned()));
    }

    /// The same settings without their secrets.
    pub(crate) fn redacted(&self) -> Self {
        let mut shown = self.clone();
        for keyword in KEYWORDS.iter().filter(|keyword| keyword.is_secret()) {
            if let Some(value) = shown.values.get_mut(keyword.name) {
                *value = Zeroizing::new(REDACTED.to_owned());
            }
        }
        shown
    }

    /// Prints the key/value form **with secrets**; `parse` reads it back to the same settings.
    pub fn to_connection_string(&self) -> String {
        let mut text = String::new();
        for keyword in KEYWORDS {
            if let Some(value) = self.value(keyword.name) {
                if !text.is_empty() {
                    text.push(' ');
                }
                text.push_str(keyword.name);
                text.push('=');
                push_quoted(&mut text, value);
            }
        }
        text
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted().to_connection_string())
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Settings({self})")
    }
}

/// `isspace` of the C locale, which is more than Rust's ASCII white space by the vertical tab.
fn is_space(character: char) -> bool {
    matches!(character, ' ' | '\t' | '\n' | '\x0b' | '\x0c' | '\r')
}

fn parse_key_values(text: &str) -> Result<Settings, ConninfoError> {
    let mut settings = Settings::default();
    let mut follows_secret = false;
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let end = rest.find(|character| character == '=' || is_space(character)).unwrap_or(rest.len());
        let (name, after) = rest.split_at_checked(end).unwrap_or((rest, ""));
        // Most likely the second half of a password with a space in it: libpq would print it.
        let shown = if follows_secret { REDACTED } else { name };
        let Some(value) = after.trim_start_matches(is_space).strip_prefix('=') else {
            return Err(ConninfoError::MissingEquals(shown.to_owned()));
        };
        let (value, after) = take_value(value.trim_start_matches(is_space))?;
        settings.store(name, &value).map_err(|_| ConninfoError::InvalidOption(shown.to_owned()))?;
        follows_secret = Keyword::named(name).is_some_and(Keyword::is_secret);
        rest = after.trim_start_matches(is_space);
    }
    Ok(settings)
}

/// The value at the start of `text`, its quotes and backslashes resolved, and what follows.
fn take_value(text: &str) -> Result<(Zeroizing<String>, &str), ConninfoError> {
    // So much room that nothing is left behind where it grew.
    let mut value = Zeroizing::new(String::with_capacity(text.len()));
    let quoted = text.strip_prefix('\'');
    let mut characters = quoted.unwrap_or(text).chars();
    while let Some(character) = characters.next() {
        match character {
            // A backslash at the very end stands for nothing.
            '\\' => value.extend(characters.next()),
            '\'' if quoted.is_some() => return Ok((value, characters.as_str())),
            space if quoted.is_none() && is_space(space) => break,
            other => value.push(other),
        }
    }
    if quoted.is_some() {
        return Err(ConninfoError::UnterminatedQuote);
    }
    Ok((value, characters.as_str()))
}

fn push_quoted(text: &mut String, value: &str) {
    let plain = !value.is_empty() && !value.contains(|c| is_space(c) || c == '\'' || c == '\\');
    if plain {
        text.push_str(value);
        return;
    }
    text.push('\'');
    for character in value.chars() {
        if matches!(character, '\'' | '\\') {
            text.push('\\');
        }
        text.push(character);
    }
    text.push('\'');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value(text: &str, keyword: &str) -> Option<String> {
        Settings::parse(text).unwrap().value(keyword).map(str::to_owned)
    }

    #[test]
    fn key_values_are_read_as_libpq_reads_them() {
        assert_eq!(value("host=a port = 1", "port").as_deref(), Some("1"));
        assert_eq!(value("host\n=\t'a b'user=c", "user").as_deref(), Some("c"));
        assert_eq!(value(r"password='it\'s \\ \x'", "password").as_deref(), Some(r"it's \ x"));
        assert_eq!(value(r"password=a\ b", "password").as_deref(), Some("a b"));
        assert_eq!(value("password=a\\", "password").as_deref(), Some("a"));
        assert_eq!(value("host=a host=b", "host").as_deref(), Some("b"));
        assert_eq!(value("host=''", "host").as_deref(), Some(""));
        // Blanks after "=" are skipped, so the next word is the value.
        assert_eq!(value("host= port=1", "host").as_deref(), Some("port=1"));
        assert_eq!(value("host=", "host").as_deref(), Some(""));
        assert_eq!(value("requiressl=1", "sslmode").as_deref(), Some("require"));
        assert_eq!(value("requiressl=0", "sslmode").as_deref(), Some("prefer"));
        assert_eq!(value("", "host"), None);
        assert_eq!(value(" \x0b\n", "host"), None);
    }

    #[test]
    fn errors_are_libpqs() {
        let error = |text: &str| Settings::parse(text).unwrap_err().to_string();
        assert_eq!(error("foo=1"), r#"invalid connection option "foo""#);
        assert_eq!(error("foo"), r#"missing "=" after "foo" in connection info string"#);
        assert_eq!(error("foo bar=1"), r#"missing "=" after "foo" in connection info string"#);
        assert_eq!(error("user='a"), "unterminated quoted string in connection info string");
        assert_eq!(error(r"user='a\"), "unterminated quoted string in connection info string");
        assert_eq!(error("=1"), r#"invalid connection option """#);
        assert_eq!(error("user=a\0b"), "null byte in connection info string");
    }

    #[test]
    fn a_password_with_a_space_is_not_shown_in_the_error() {
        let error = Settings::parse("host=a password=my secret").unwrap_err();
        assert_eq!(error.to_string(), r#"missing "=" after "********" in connection info string"#);
        for text in ["password=my sec=ret", "host=a sslpassword='my'sec=ret"] {
            let error = Settings::parse(text).unwrap_err();
            assert_eq!(error.to_string(), r#"invalid connection option "********""#, "{text}");
        }
    }

    #[test]
    fn secrets_are_hidden_in_debug_and_display() {
        let settings =
            Settings::parse("host=a password=hush sslpassword=hush oauth_client_secret=hush").unwrap();
        let shown = "password=******** host=a sslpassword=******** oauth_client_secret=********";
        assert_eq!(settings.to_string(), shown);
        assert_eq!(format!("{settings:?}"), format!("Settings({shown})"));
        assert!(settings.to_connection_string().contains("hush"));
    }

    fn any_settings() -> impl Strategy<Value = Settings> {
        let names = KEYWORDS.iter().map(|keyword| keyword.name).collect::<Vec<_>>();
        let value = prop_oneof!["[ -~]{0,12}", "[\\PC\\s]{0,8}", "['\\\\ =\t]{0,6}"];
        let value = value.prop_map(|text: String| text.replace('\0', ""));
        prop::collection::vec((prop::sample::select(names), value), 0..8).prop_map(|pairs| {
            let mut settings = Settings::default();
            for (name, value) in pairs {
                settings.store(name, &value).unwrap();
            }
            settings
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn any_text_is_parsed_or_refused(text in "(postgres(ql)?://)?[ -~\\PC\\s]{0,40}") {
            let _ = Settings::parse(&text);
        }

        #[test]
        fn any_mixture_of_special_characters_is_parsed_or_refused(
            text in "(postgres(ql)?://)?([a-c=&?:/@,%\\[\\]' \\\\0-9é]|host|port|user|password|%[0-9a-f]{2}){0,24}",
        ) {
            let _ = Settings::parse(&text);
        }

        #[test]
        fn printed_settings_parse_back(settings in any_settings()) {
            prop_assert_eq!(Settings::parse(&settings.to_connection_string()), Ok(settings));
        }
    }
}
