//! Where a setting comes from when the string does not give it: service file, environment, libpq's own default.
//!
//! Owns that order (`conninfo_add_defaults`) and the service file's syntax (`pg_service.conf`).

use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::conninfo::{
    ConninfoError, Settings,
    keyword::{KEYWORDS, Keyword},
    surroundings::{FoundFile, Surroundings, home_directory},
};

/// Directory of the system-wide `pg_service.conf`, as Debian builds libpq (`pg_config --sysconfdir`); `PGSYSCONFDIR`
/// names another.
const SYSTEM_CONFIGURATION_DIRECTORY: &str = "/etc/postgresql-common";

/// The longest line libpq reads from a service file, with its newline.
const SERVICE_LINE_BYTES_MAX: usize = 1022;

/// Completes `settings`: service first, then environment, then built-in defaults. The user is left to `resolve`.
pub(crate) fn add_defaults(
    settings: &mut Settings,
    surroundings: &dyn Surroundings,
) -> Result<(), ConninfoError> {
    add_service(settings, surroundings)?;
    let sslmode_given = settings.value("sslmode").is_some();
    let mut sslmode_from_environment = false;
    for keyword in KEYWORDS {
        if settings.value(keyword.name).is_some() {
            continue;
        }
        if let Some(value) = keyword.variable.and_then(|name| surroundings.variable(name)) {
            sslmode_from_environment |= keyword.name == "sslmode";
            settings.store_default(keyword, &Zeroizing::new(value));
        } else if keyword.name == "sslmode" && is_tls_required_by_old_variable(surroundings) {
            sslmode_from_environment = true;
            settings.store_default(keyword, "require");
        } else if let Some(value) = keyword.default {
            settings.store_default(keyword, value);
        }
    }
    // Public roots vouch for everybody, so the default becomes the only mode that is safe with them.
    if settings.value("sslrootcert") == Some("system") && !sslmode_given && !sslmode_from_environment {
        settings.store("sslmode", "verify-full")?;
    }
    Ok(())
}

/// `PGREQUIRESSL=1`, which `PGSSLMODE` replaced.
fn is_tls_required_by_old_variable(surroundings: &dyn Surroundings) -> bool {
    surroundings.variable("PGREQUIRESSL").is_some_and(|value| value.starts_with('1'))
}

/// Adds what the service defines, if one is named.
fn add_service(settings: &mut Settings, surroundings: &dyn Surroundings) -> Result<(), ConninfoError> {
    let given = settings.value("service").map(str::to_owned);
    let Some(service) = given.or_else(|| surroundings.variable("PGSERVICE")) else { return Ok(()) };

    let named = settings.value("servicefile").map(str::to_owned);
    let named = named.or_else(|| surroundings.variable("PGSERVICEFILE"));
    let own = match named {
        Some(path) => {
            let path = PathBuf::from(path);
            let text = read(surroundings, &path)
                .ok_or_else(|| ConninfoError::ServiceFileNotFound(path.display().to_string()))?;
            Some((path, text))
        }
        None => home_directory(surroundings).and_then(|home| {
            let path = home.join(".pg_service.conf");
            read(surroundings, &path).map(|text| (path, text))
        }),
    };
    if let Some((path, text)) = own
        && add_from_file(settings, &service, &path, &text)? == Found::Yes
    {
        return Ok(());
    }

    let directory = surroundings.variable("PGSYSCONFDIR");
    let directory = directory.as_deref().unwrap_or(SYSTEM_CONFIGURATION_DIRECTORY);
    let path = Path::new(directory).join("pg_service.conf");
    if let Some(text) = read(surroundings, &path)
        && add_from_file(settings, &service, &path, &text)? == Found::Yes
    {
        return Ok(());
    }
    Err(ConninfoError::ServiceNotFound(service))
}

fn read(surroundings: &dyn Surroundings, path: &Path) -> Option<Zeroizing<String>> {
    match surroundings.read(path) {
        Ok(FoundFile::Plain { text, .. }) => Some(text),
        Ok(FoundFile::NotPlain) | Err(_) => None,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Yes,
    No,
}

/// Adds the settings under the heading `[service]`; what is already set stays.
fn add_from_file(
    settings: &mut Settings,
    service: &str,
    path: &Path,
    text: &str,
) -> Result<Found, ConninfoError> {
    let mut found = Found::No;
    let file = || path.display().to_string();
    for (index, raw) in text.split_inclusive('\n').enumerate() {
        let line = index + 1;
        if raw.len() > SERVICE_LINE_BYTES_MAX {
            return Err(ConninfoError::ServiceLineTooLong { file: file(), line });
        }
        let content =
            raw.trim_matches(|character: char| character.is_ascii_whitespace() || character == '\x0b');
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        if let Some(heading) = content.strip_prefix('[') {
            if found == Found::Yes {
                break;
            }
            // As in libpq, what follows the bracket is not looked at.
            if heading.strip_prefix(service).is_some_and(|rest| rest.starts_with(']')) {
                found = Found::Yes;
            }
            continue;
        }
        if found == Found::Yes {
            add_line(settings, content, || (file(), line))?;
        }
    }
    Ok(found)
}

/// One `keyword=value` line; blanks round the `=` belong to keyword and value, as in libpq.
fn add_line(
    settings: &mut Settings,
    content: &str,
    place: impl Fn() -> (String, usize),
) -> Result<(), ConninfoError> {
    let syntax = || {
        let (file, line) = place();
        ConninfoError::ServiceSyntax { file, line }
    };
    let nested = |keyword| {
        let (file, line) = place();
        Err(ConninfoError::NestedService { keyword, file, line })
    };
    let (name, value) = content.split_once('=').ok_or_else(syntax)?;
    match name {
        "service" => return nested("service"),
        "servicefile" => return nested("\"servicefile\""),
        _ => {}
    }
    let keyword = Keyword::named(name).ok_or_else(syntax)?;
    if value.contains('\0') {
        return Err(syntax());
    }
    settings.store_default(keyword, value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conninfo::FixedSurroundings;

    fn complete(text: &str, surroundings: &FixedSurroundings) -> Result<Settings, String> {
        let mut settings = Settings::parse(text).unwrap();
        add_defaults(&mut settings, surroundings).map_err(|error| error.to_string())?;
        Ok(settings)
    }

    fn nobody() -> FixedSurroundings {
        FixedSurroundings::of_user("nobody")
    }

    #[test]
    fn string_then_service_then_environment_then_default() {
        let surroundings = nobody()
            .with_variable("PGSERVICEFILE", "/s")
            .with_variable("PGUSER", "from_environment")
            .with_variable("PGDATABASE", "from_environment")
            .with_variable("PGHOST", "from_environment")
            .with_file("/s", 0o644, "[dc1]\nuser=from_service\nhost=from_service\n");
        let settings = complete("service=dc1 host=from_string", &surroundings).unwrap();
        assert_eq!(settings.value("host"), Some("from_string"));
        assert_eq!(settings.value("user"), Some("from_service"));
        assert_eq!(settings.value("dbname"), Some("from_environment"));
        assert_eq!(settings.value("port"), Some("5432"));
    }

    #[test]
    fn every_variable_of_the_table_is_read() {
        for keyword in KEYWORDS.iter().filter(|keyword| keyword.name != "service") {
            let Some(variable) = keyword.variable else { continue };
            let settings = complete("", &nobody().with_variable(variable, "x y")).unwrap();
            assert_eq!(settings.value(keyword.name), Some("x y"), "{variable}");
        }
    }

    #[test]
    fn service_files_are_found_in_libpqs_order() {
        let surroundings = nobody()
            .with_variable("HOME", "/home/x")
            .with_variable("PGSERVICE", "dc1")
            .with_variable("PGSYSCONFDIR", "/etc/pg")
            .with_file("/etc/pg/pg_service.conf", 0o644, "[dc1]\nhost=system\n");
        assert_eq!(complete("", &surroundings).unwrap().value("host"), Some("system"));
        let surroundings = surroundings.with_file(
            "/home/x/.pg_service.conf",
            0o644,
            "[other]\nhost=x\n[dc1]\nhost=home\n[dc2]\nhost=y\n",
        );
        assert_eq!(complete("", &surroundings).unwrap().value("host"), Some("home"));
        assert_eq!(complete("service=other", &surroundings).unwrap().value("host"), Some("x"));
        let surroundings =
            surroundings.with_variable("PGSERVICEFILE", "/s").with_file("/s", 0o644, "[dc3]\nhost=s\n");
        assert_eq!(complete("service=dc3", &surroundings).unwrap().value("host"), Some("s"));
        // Not in the named file: the system's is asked next.
        assert_eq!(complete("service=dc1", &surroundings).unwrap().value("host"), Some("system"));
        let surroundings = surroundings.with_file("/t", 0o644, "[dc1]\nhost=t\n");
        assert_eq!(complete("service=dc1 servicefile=/t", &surroundings).unwrap().value("host"), Some("t"));
    }

    #[test]
    fn service_errors_are_libpqs() {
        let with = |text: &str| nobody().with_variable("PGSERVICEFILE", "/s").with_file("/s", 0o644, text);
        let error = |text: &str| complete("service=a", &with(text)).unwrap_err();
        assert_eq!(error(""), r#"definition of service "a" not found"#);
        assert_eq!(error("[ab]\n[ a]\n"), r#"definition of service "a" not found"#);
        assert_eq!(error("\n[a]\nhost\n"), r#"syntax error in service file "/s", line 3"#);
        assert_eq!(error("[a]\n# comment\n  host = b\n"), r#"syntax error in service file "/s", line 3"#);
        assert_eq!(error("[a]\nhots=b\n"), r#"syntax error in service file "/s", line 2"#);
        assert_eq!(
            error("[a]\nservice=b\n"),
            r#"nested service specifications not supported in service file "/s", line 2"#
        );
        assert_eq!(
            error(&format!("[a]\nhost={}\n", "x".repeat(2000))),
            r#"line 2 too long in service file "/s""#
        );
        let missing = nobody().with_variable("PGSERVICEFILE", "/none");
        assert_eq!(complete("service=a", &missing).unwrap_err(), r#"service file "/none" not found"#);
        // Trailing text after the heading, and a value with blanks and "=".
        let good = complete("service=a", &with("[a] x\r\noptions= -c a=b \r\n")).unwrap();
        assert_eq!(good.value("options"), Some(" -c a=b"));
    }

    #[test]
    fn system_roots_strengthen_only_the_default_sslmode() {
        let sslmode = |text: &str, surroundings: &FixedSurroundings| {
            complete(text, surroundings).unwrap().value("sslmode").map(str::to_owned)
        };
        assert_eq!(sslmode("", &nobody()).as_deref(), Some("prefer"));
        assert_eq!(sslmode("sslrootcert=system", &nobody()).as_deref(), Some("verify-full"));
        assert_eq!(sslmode("sslrootcert=system sslmode=require", &nobody()).as_deref(), Some("require"));
        let old = nobody().with_variable("PGREQUIRESSL", "1");
        assert_eq!(sslmode("sslrootcert=system", &old).as_deref(), Some("require"));
        assert_eq!(sslmode("", &old.with_variable("PGSSLMODE", "disable")).as_deref(), Some("disable"));
    }
}
