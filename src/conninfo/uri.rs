//! The URI form: `postgresql://user:password@host:port,host:port/dbname?keyword=value`.
//!
//! Owns reading it, character for character as `conninfo_uri_parse_options` does, which is not quite RFC 3986: hosts and
//! ports are lists, an empty part is left out, and a password may hold anything but `@` and `/`. Where it seems to hold one
//! of them nothing of the text is shown, and an `@` behind it is refused: libpq would tell half a password as a host.

use zeroize::Zeroizing;

use crate::conninfo::{ConninfoError, REDACTED, Settings, keyword::Keyword};

/// What follows `postgresql://` or `postgres://`; `None` when this is no URI.
pub(crate) fn after_prefix(text: &str) -> Option<&str> {
    text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://"))
}

/// Parses `rest`, the part of `uri` that follows the prefix.
pub(crate) fn parse(uri: &str, rest: &str) -> Result<Settings, ConninfoError> {
    let mut settings = Settings::default();
    let (credentials, rest) = split_credentials(rest);
    let mut shown_uri = uri.to_owned();
    let mut may_hold_password = false;
    if let Some(credentials) = credentials {
        let (user, password) = cut(credentials, &[':']);
        if !password.is_empty() {
            refuse_at_sign(rest)?;
            may_hold_password = rest.contains('@');
        }
        store_decoded(&mut settings, "user", user)?;
        if let Some(password) = password.strip_prefix(':').filter(|password| !password.is_empty()) {
            shown_uri = redact(uri, rest, user);
            let decoded = decode(password).map_err(without_text)?;
            settings.store("password", &decoded)?;
        }
    } else if is_password_cut_short(rest) {
        refuse_ports(uri, rest)?;
        return parse_places(settings, uri, rest, REDACTED).map_err(without_text);
    }
    let parsed = parse_places(settings, uri, rest, &shown_uri);
    parsed.map_err(|error| if may_hold_password { without_text(error) } else { error })
}

/// Whether this looks like `user:pass/word@host`, where libpq sees a host, a port and a database, and would tell them.
fn is_password_cut_short(rest: &str) -> bool {
    let (authority, path) = cut(rest, &['/']);
    authority.contains(':') && path.contains('@')
}

/// In `user:p@ss@host` libpq would look for a host `ss@host`, and in `user:p@ss?x@host` for a parameter `x@host`.
fn refuse_at_sign(rest: &str) -> Result<(), ConninfoError> {
    let (places, query) = cut(rest, &['?']);
    let first = cut(query, &['&', '=']).0;
    if places.contains('@') || first.contains('@') {
        return Err(ConninfoError::UnexpectedAtSign);
    }
    Ok(())
}

/// A port that is half a password is not shown; a number is taken for what it is, as libpq takes it.
fn refuse_ports(uri: &str, rest: &str) -> Result<(), ConninfoError> {
    let (_, ports, _) = split_hosts(uri, REDACTED, rest)?;
    let ports = decode(&ports).map_err(without_text)?;
    match ports.split(',').find(|port| !port.is_empty() && port.trim().parse::<u16>().is_err()) {
        Some(_) => Err(ConninfoError::InvalidInteger { keyword: "port", value: REDACTED.to_owned() }),
        None => Ok(()),
    }
}

/// Everything after the credentials.
fn parse_places(
    mut settings: Settings,
    uri: &str,
    rest: &str,
    shown_uri: &str,
) -> Result<Settings, ConninfoError> {
    let (hosts, ports, rest) = split_hosts(uri, shown_uri, rest)?;
    store_decoded(&mut settings, "host", &hosts)?;
    store_decoded(&mut settings, "port", &ports)?;
    let (dbname, query) = match rest.strip_prefix('/') {
        Some(path) => cut(path, &['?']),
        None => ("", rest),
    };
    store_decoded(&mut settings, "dbname", dbname)?;
    if let Some(query) = query.strip_prefix('?') {
        parse_query(&mut settings, query)?;
    }
    Ok(settings)
}

/// The part before the first of `ends`, and the rest with it.
fn cut<'a>(text: &'a str, ends: &[char]) -> (&'a str, &'a str) {
    let end = text.find(ends).unwrap_or(text.len());
    text.split_at_checked(end).unwrap_or((text, ""))
}

/// `user:password` if there is an `@` before the first `/`, and what follows it.
fn split_credentials(text: &str) -> (Option<&str>, &str) {
    let (credentials, rest) = cut(text, &['@', '/']);
    match rest.strip_prefix('@') {
        Some(rest) => (Some(credentials), rest),
        None => (None, text),
    }
}

fn redact(uri: &str, rest: &str, user: &str) -> String {
    let prefix = uri.find("//").and_then(|at| uri.get(..at + 2)).unwrap_or("");
    format!("{prefix}{user}:{REDACTED}@{rest}")
}

/// The comma-separated lists of hosts and ports, and what follows them.
fn split_hosts<'a>(
    uri: &str,
    shown_uri: &str,
    mut rest: &'a str,
) -> Result<(String, String, &'a str), ConninfoError> {
    let (mut hosts, mut ports) = (String::new(), String::new());
    loop {
        let host;
        (host, rest) = match rest.strip_prefix('[') {
            Some(inside) => split_ipv6(uri, shown_uri, inside)?,
            None => cut(rest, &[':', '/', '?', ',']),
        };
        hosts.push_str(host);
        if let Some(port) = rest.strip_prefix(':') {
            let port_text;
            (port_text, rest) = cut(port, &['/', '?', ',']);
            ports.push_str(port_text);
        }
        let Some(next) = rest.strip_prefix(',') else { break };
        rest = next;
        hosts.push(',');
        ports.push(',');
    }
    Ok((hosts, ports, rest))
}

/// The address in brackets; `inside` begins after `[`.
fn split_ipv6<'a>(uri: &str, shown_uri: &str, inside: &'a str) -> Result<(&'a str, &'a str), ConninfoError> {
    let shown = || shown_uri.to_owned();
    let (address, rest) = inside.split_once(']').ok_or_else(|| ConninfoError::UnmatchedBracket(shown()))?;
    if address.is_empty() {
        return Err(ConninfoError::EmptyIpv6(shown()));
    }
    match rest.chars().next() {
        None | Some(':' | '/' | '?' | ',') => Ok((address, rest)),
        Some(character) => {
            let position = uri.len() - rest.len() + 1;
            Err(ConninfoError::UnexpectedCharacter { character, position, uri: shown() })
        }
    }
}

fn parse_query(settings: &mut Settings, query: &str) -> Result<(), ConninfoError> {
    // A trailing "&" ends the list; an empty parameter elsewhere is an error.
    let parameters = query.strip_suffix('&').unwrap_or(query);
    if query.is_empty() {
        return Ok(());
    }
    let mut follows_secret = false;
    for parameter in parameters.split('&') {
        let stored = parse_parameter(settings, parameter);
        // Most likely the second half of a password with a "&" in it: libpq would print it.
        let keyword = stored.map_err(|error| if follows_secret { without_text(error) } else { error })?;
        follows_secret = is_secret(&keyword);
    }
    Ok(())
}

/// Stores `keyword=value` and returns the keyword.
fn parse_parameter(settings: &mut Settings, parameter: &str) -> Result<Zeroizing<String>, ConninfoError> {
    let (keyword, value) =
        parameter.split_once('=').ok_or_else(|| ConninfoError::MissingSeparator(parameter.to_owned()))?;
    if value.contains('=') {
        return Err(ConninfoError::ExtraSeparator(keyword.to_owned()));
    }
    let keyword = decode(keyword)?;
    let value =
        decode(value).map_err(|error| if is_secret(&keyword) { without_text(error) } else { error })?;
    // JDBC's way to say it.
    let (name, value) = match (keyword.as_str(), value.as_str()) {
        ("ssl", "true") => ("sslmode", "require"),
        other => other,
    };
    settings.store(name, value).map_err(|error| match error {
        ConninfoError::InvalidOption(name) => ConninfoError::InvalidQueryParameter(name),
        other => other,
    })?;
    Ok(keyword)
}

fn is_secret(keyword: &str) -> bool {
    Keyword::named(keyword).is_some_and(Keyword::is_secret)
}

/// Sets `keyword` unless the text is empty: an empty part must not hide the environment's value.
fn store_decoded(settings: &mut Settings, keyword: &str, text: &str) -> Result<(), ConninfoError> {
    if text.is_empty() {
        return Ok(());
    }
    settings.store(keyword, &decode(text)?)
}

/// Resolves `%xy`; spaces around are dropped, spaces within refused.
fn decode(text: &str) -> Result<Zeroizing<String>, ConninfoError> {
    let mut decoded = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut bytes = text.trim_start_matches(' ').bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b' ' if bytes.all(|byte| byte == b' ') => break,
            b' ' => return Err(ConninfoError::UnexpectedSpaces(text.to_owned())),
            b'%' => {
                let value = hexadecimal_digit(bytes.next())
                    .zip(hexadecimal_digit(bytes.next()))
                    .map(|(high, low)| high << 4 | low);
                match value {
                    None => return Err(ConninfoError::InvalidPercentEncoding(text.to_owned())),
                    Some(0) => return Err(ConninfoError::ForbiddenZero(text.to_owned())),
                    Some(value) => decoded.push(value),
                }
            }
            other => decoded.push(other),
        }
    }
    let decoded = String::from_utf8(std::mem::take(&mut *decoded)).map(Zeroizing::new);
    decoded.map_err(|_| ConninfoError::NotUtf8(text.to_owned()))
}

fn hexadecimal_digit(digit: Option<u8>) -> Option<u8> {
    let digit = digit?;
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

/// The same error about a secret: its text is not shown.
fn without_text(error: ConninfoError) -> ConninfoError {
    let hidden = REDACTED.to_owned();
    match error {
        ConninfoError::InvalidPercentEncoding(_) => ConninfoError::InvalidPercentEncoding(hidden),
        ConninfoError::ForbiddenZero(_) => ConninfoError::ForbiddenZero(hidden),
        ConninfoError::NotUtf8(_) => ConninfoError::NotUtf8(hidden),
        ConninfoError::UnexpectedSpaces(_) => ConninfoError::UnexpectedSpaces(hidden),
        ConninfoError::MissingSeparator(_) => ConninfoError::MissingSeparator(hidden),
        ConninfoError::ExtraSeparator(_) => ConninfoError::ExtraSeparator(hidden),
        ConninfoError::InvalidQueryParameter(_) => ConninfoError::InvalidQueryParameter(hidden),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(uri: &str) -> String {
        Settings::parse(uri).unwrap().to_connection_string()
    }

    /// Cases of PostgreSQL's own `src/interfaces/libpq/t/001_uri.pl`, and some more.
    #[test]
    fn uris_are_read_as_libpq_reads_them() {
        let cases = [
            (
                "postgresql://uri-user:secret@host:12345/db",
                "user=uri-user password=secret dbname=db host=host port=12345",
            ),
            ("postgresql://uri-user@host:12345/db", "user=uri-user dbname=db host=host port=12345"),
            ("postgresql://host:12345/", "host=host port=12345"),
            ("postgresql://uri-user@host/", "user=uri-user host=host"),
            ("postgresql://", ""),
            ("postgres://", ""),
            ("postgresql:///", ""),
            ("postgresql:///db", "dbname=db"),
            ("postgresql://uri-user@/db", "user=uri-user dbname=db"),
            ("postgresql://?host=/path/to/socket/dir", "host=/path/to/socket/dir"),
            ("postgresql://@host", "host=host"),
            ("postgresql://host?sslmode=disable", "host=host sslmode=disable"),
            ("postgresql://[2001:db8::1]:12345/", "host=2001:db8::1 port=12345"),
            ("postgresql://[2001:db8::1],b:2", "host=2001:db8::1,b port=,2"),
            (
                "postgresql://a:1,b:2,c:3/db?target_session_attrs=read-write",
                "dbname=db host=a,b,c port=1,2,3 target_session_attrs=read-write",
            ),
            ("postgresql://a,b", "host=a,b port=,"),
            ("postgresql://%2Fvar%2Frun/db", "dbname=db host=/var/run"),
            ("postgresql://u%20x:p%40ss@h/d%2Fb", "user='u x' password=p@ss dbname=d/b host=h"),
            ("postgresql://u:p?w@h", "user=u password=p?w host=h"),
            ("postgresql://u:a:b@h", "user=u password=a:b host=h"),
            ("postgresql://h?ssl=true", "host=h sslmode=require"),
            ("postgresql://h?user=a&", "user=a host=h"),
            ("postgresql://h?requiressl=1", "host=h sslmode=require"),
            ("postgresql:// h /db ", "dbname=db host=h"),
        ];
        for (uri, expected) in cases {
            assert_eq!(text(uri), expected, "{uri}");
        }
    }

    #[test]
    fn errors_are_libpqs() {
        let cases = [
            (
                "postgresql://h/db?user=x&password=y z",
                "unexpected spaces found in \"********\", use percent-encoded spaces (%20) instead",
            ),
            (
                "postgresql://h/a b",
                "unexpected spaces found in \"a b\", use percent-encoded spaces (%20) instead",
            ),
            ("postgresql://h?zzz", "missing key/value separator \"=\" in URI query parameter: \"zzz\""),
            (
                "postgresql://h?value1=value2=x",
                "extra key/value separator \"=\" in URI query parameter: \"value1\"",
            ),
            ("postgresql://h?&user=a", "missing key/value separator \"=\" in URI query parameter: \"\""),
            ("postgresql://h?uzer=a", "invalid URI query parameter: \"uzer\""),
            ("postgresql://h?ssl=false", "invalid URI query parameter: \"ssl\""),
            ("postgresql://%", "invalid percent-encoded token: \"%\""),
            ("postgresql://%f", "invalid percent-encoded token: \"%f\""),
            ("postgresql://%zz", "invalid percent-encoded token: \"%zz\""),
            ("postgresql://%00", "forbidden value %00 in percent-encoded value: \"%00\""),
            (
                "postgresql://%ff",
                "invalid byte sequence for encoding \"UTF8\" in percent-encoded value: \"%ff\"",
            ),
            (
                "postgresql://[::1",
                "end of string reached when looking for matching \"]\" in IPv6 host address in URI: \"postgresql://[::1\"",
            ),
            ("postgres://[]", "IPv6 host address may not be empty in URI: \"postgres://[]\""),
            (
                "postgres://[::1]z",
                "unexpected character \"z\" at position 17 in URI (expected \":\" or \"/\"): \"postgres://[::1]z\"",
            ),
        ];
        for (uri, expected) in cases {
            assert_eq!(Settings::parse(uri).unwrap_err().to_string(), expected, "{uri}");
        }
    }

    #[test]
    fn no_error_shows_a_password() {
        for uri in [
            "postgresql://u:hush@[::1",
            "postgresql://u:hush@[]",
            "postgresql://u:hush@[::1]z",
            "postgresql://u:hush%zz@h",
            "postgresql://u:hush%00@h",
            "postgresql://u:hush%ff@h",
            "postgresql://u:hu sh@h",
            "postgresql://h?password=hush%zz",
            "postgresql://u:hush/hush@h/d",
            "postgresql://u:hush?hush/hush@h/d",
            "postgresql://u:1?hush/hush@h/d",
            "postgresql://u:1?hush=%zz/hush@h/d",
            "postgresql://u:p@h?hush=hush@h/d",
            "postgresql://h?password=x&hush",
            "postgresql://h?password=x&hush=w",
            "postgresql://h?password=x&hush=w=v",
            "postgresql://h?password=x&hush%zz=w",
            "postgresql://h?sslpassword=x&user=%zzhush",
        ] {
            let error = Settings::parse(uri).unwrap_err().to_string();
            assert!(!error.contains("hu") && error.contains(REDACTED), "{uri}: {error}");
        }
    }

    #[test]
    fn an_at_sign_in_a_password_ends_it_and_what_follows_is_not_taken_for_a_host() {
        let text = "unexpected \"@\" after user and password in URI, use percent-encoded \"@\" (%40) instead";
        for uri in [
            "postgresql://u:p@ss@h/d",
            "postgresql://u:@ss@h/d",
            "postgresql://:p@ss@h",
            "postgresql://u:p@ss@h1,h2:5433/d",
            "postgresql://u:p@h1,ss@h2/d",
            "postgresql://u:p@ss:1@h/d",
            "postgresql://u:p@ss/word@h/d",
            "postgresql://u:p@ss?word@h/d?sslmode=require",
        ] {
            assert_eq!(Settings::parse(uri).unwrap_err().to_string(), text, "{uri}");
        }
        assert_eq!(self::text("postgresql://u@x@h/d@e"), "user=u dbname=d@e host=x@h", "no password");
        assert_eq!(
            self::text("postgresql://u:p%40ss@%40h?application_name=a@b&options=@"),
            "user=u password=p@ss host=@h options=@ application_name=a@b"
        );
    }

    fn encode(text: &str) -> String {
        text.bytes().map(|byte| format!("%{byte:02x}")).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn what_is_percent_encoded_comes_back(
            user in "\\PC{1,12}",
            password in "\\PC{1,12}",
            hosts in prop::collection::vec("[a-z0-9.]{1,8}", 1..4),
            dbname in "\\PC{1,12}",
            options in "\\PC{0,12}",
        ) {
            let uri = format!(
                "postgresql://{}:{}@{}/{}?options={}",
                encode(&user), encode(&password), hosts.join(","), encode(&dbname), encode(&options)
            );
            let settings = Settings::parse(&uri).unwrap();
            let hosts = hosts.join(",");
            prop_assert_eq!(settings.value("user"), Some(user.as_str()));
            prop_assert_eq!(settings.value("password"), Some(password.as_str()));
            prop_assert_eq!(settings.value("host"), Some(hosts.as_str()));
            prop_assert_eq!(settings.value("dbname"), Some(dbname.as_str()));
            prop_assert_eq!(settings.value("options"), Some(options.as_str()));
        }
    }
}
