//! From texts to types: the checks of libpq's `pqConnectOptions2`, in its order, so that the first error is the same.

use std::{net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use base64::{
    Engine as _, alphabet,
    engine::{GeneralPurpose, GeneralPurposeConfig},
};
use secrecy::{SecretBox, SecretString};

use crate::conninfo::{
    ChannelBinding, Conninfo, ConninfoError, GssEncMode, Host, HostAddress, Keepalives, LoadBalanceHosts,
    ProtocolVersion, RequireAuth, ScramKey, Settings, SslCertMode, SslMode, SslNegotiation, SslSettings,
    Surroundings, TargetSessionAttrs, TlsVersion, defaults, password_file::PasswordFile,
    surroundings::home_directory,
};

/// Where libpq looks for a server's socket when no host is named.
pub(crate) const DEFAULT_SOCKET_DIRECTORY: &str = "/var/run/postgresql";
const DEFAULT_PORT: u16 = 5432;

/// `sizeof(sun_path) - 1` on Linux.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Completes and checks `settings`; `given` is what is shown of them.
pub(crate) fn resolve(
    mut settings: Settings,
    given: Settings,
    surroundings: &dyn Surroundings,
) -> Result<Conninfo, ConninfoError> {
    defaults::add_defaults(&mut settings, surroundings)?;
    let settings = &settings;
    let hosts = split_hosts(settings)?;
    let user = match settings.filled("user") {
        Some(user) => user.to_owned(),
        None => surroundings.user_name().ok_or_else(|| ConninfoError::NoLocalUser(surroundings.user_id()))?,
    };
    let dbname = settings.filled("dbname").unwrap_or(&user).to_owned();
    let require_auth = RequireAuth::parse(settings.value("require_auth").unwrap_or_default())?;
    let channel_binding = ChannelBinding::parse(settings.value("channel_binding").unwrap_or_default())?;
    let ssl = ssl_settings(settings)?;
    check_gssapi(settings)?;
    let target_session_attrs =
        settings.value("target_session_attrs").map(TargetSessionAttrs::parse).transpose()?;
    let scram_client_key = scram_key(settings, "scram_client_key", "client")?;
    let scram_server_key = scram_key(settings, "scram_server_key", "server")?;
    let load_balance_hosts =
        LoadBalanceHosts::parse(settings.value("load_balance_hosts").unwrap_or_default())?;
    let (min_protocol_version, max_protocol_version) = protocol_versions(settings)?;
    let hosts = hosts.into_iter().map(locate).collect::<Result<Vec<_>, _>>()?;
    let has_tcp = hosts.iter().any(|host| !matches!(host.address, HostAddress::UnixSocket(_)));
    let (keepalives, tcp_user_timeout) = tcp_settings(settings, has_tcp)?;
    // An application name that is given but empty hides the fallback, as in libpq.
    let application_name = settings.value("application_name").or(settings.value("fallback_application_name"));
    let mut conninfo = Conninfo {
        hosts,
        user,
        dbname,
        options: settings.filled("options").map(str::to_owned),
        application_name: application_name.filter(|name| !name.is_empty()).map(str::to_owned),
        replication: settings.filled("replication").map(str::to_owned),
        client_encoding: client_encoding(settings),
        target_session_attrs,
        load_balance_hosts,
        connect_timeout: seconds(settings, "connect_timeout")?,
        keepalives,
        tcp_user_timeout,
        ssl,
        channel_binding,
        require_auth,
        requirepeer: settings.filled("requirepeer").map(str::to_owned),
        min_protocol_version,
        max_protocol_version,
        scram_client_key,
        scram_server_key,
        password_file_warning: None,
        password: settings.filled("password").map(SecretString::from),
        password_file: password_file(settings, surroundings),
        environment_parameters: environment_parameters(surroundings),
        given,
    };
    read_passwords(&mut conninfo, surroundings);
    Ok(conninfo)
}

/// Reads the password file for every host, unless a password is given.
pub(crate) fn read_passwords(conninfo: &mut Conninfo, surroundings: &dyn Surroundings) {
    conninfo.password_file_warning = None;
    let Some(path) = conninfo.password_file.as_deref().filter(|_| conninfo.password.is_none()) else {
        return;
    };
    let file = PasswordFile::read(surroundings, path).unwrap_or_else(|warning| {
        conninfo.password_file_warning = Some(warning);
        None
    });
    for host in &mut conninfo.hosts {
        // A socket in the default place is "localhost", wherever that place is.
        let name = if host.name == DEFAULT_SOCKET_DIRECTORY { "localhost" } else { &host.name };
        let key = [name, host.port_text.as_str(), conninfo.dbname.as_str(), conninfo.user.as_str()];
        host.password = file.as_ref().and_then(|file| file.password(key));
    }
}

fn password_file(settings: &Settings, surroundings: &dyn Surroundings) -> Option<PathBuf> {
    match settings.filled("passfile") {
        Some(path) => Some(PathBuf::from(path)),
        None => home_directory(surroundings).map(|home| home.join(".pgpass")),
    }
}

/// `host`, `hostaddr` and `port` of one host, as texts.
struct HostTexts {
    name: String,
    address: String,
    port: String,
}

/// Takes the three lists apart; `hostaddr`, else `host`, says how many hosts there are.
fn split_hosts(settings: &Settings) -> Result<Vec<HostTexts>, ConninfoError> {
    let names = list(settings, "host");
    let addresses = list(settings, "hostaddr");
    let ports = list(settings, "port");
    let count = if addresses.is_empty() { names.len().max(1) } else { addresses.len() };
    if !names.is_empty() && names.len() != count {
        return Err(ConninfoError::HostCount { hosts: names.len(), addresses: count });
    }
    if ports.len() > 1 && ports.len() != count {
        return Err(ConninfoError::PortCount { ports: ports.len(), hosts: count });
    }
    let text = |list: &[&str], index: usize| list.get(index).copied().unwrap_or_default().to_owned();
    let hosts = (0..count).map(|index| HostTexts {
        name: text(&names, index),
        address: text(&addresses, index),
        port: text(&ports, if ports.len() == 1 { 0 } else { index }),
    });
    Ok(hosts.collect())
}

fn list<'a>(settings: &'a Settings, keyword: &str) -> Vec<&'a str> {
    settings.filled(keyword).map(|value| value.split(',').collect()).unwrap_or_default()
}

fn locate(texts: HostTexts) -> Result<Host, ConninfoError> {
    let HostTexts { name, address, port: mut port_text } = texts;
    let port = port(&port_text)?;
    if port_text.is_empty() {
        port_text = DEFAULT_PORT.to_string();
    }
    let mut address_text = address.clone();
    let certificate_name = name.clone();
    let (name, address) = if address.is_empty() {
        let name = if name.is_empty() { DEFAULT_SOCKET_DIRECTORY.to_owned() } else { name };
        let address = if is_socket_directory(&name) {
            HostAddress::UnixSocket(socket_path(&name, port)?)
        } else {
            HostAddress::Name(name.clone())
        };
        address_text.clone_from(&name);
        (name, address)
    } else {
        let parsed = numeric_address(&address)?;
        (if name.is_empty() { address } else { name }, parsed)
    };
    Ok(Host { name, certificate_name, address, port, address_text, port_text, password: None })
}

fn port(text: &str) -> Result<u16, ConninfoError> {
    if text.is_empty() {
        return Ok(DEFAULT_PORT);
    }
    let number = integer("port", text)?;
    let port = u16::try_from(number).ok().filter(|port| *port != 0);
    port.ok_or_else(|| ConninfoError::InvalidPort(text.to_owned()))
}

/// An absolute path, or a name in Linux's abstract namespace (`is_unixsock_path`).
fn is_socket_directory(name: &str) -> bool {
    name.starts_with(['/', '@'])
}

fn socket_path(directory: &str, port: u16) -> Result<PathBuf, ConninfoError> {
    let path = format!("{directory}/.s.PGSQL.{port}");
    if path.len() > SOCKET_PATH_BYTES_MAX {
        return Err(ConninfoError::SocketPathTooLong { path, limit: SOCKET_PATH_BYTES_MAX });
    }
    Ok(PathBuf::from(path))
}

/// An address that needs no look-up.
fn numeric_address(text: &str) -> Result<HostAddress, ConninfoError> {
    if let Some(address) = text.parse::<IpAddr>().ok().or_else(|| old_address(text)) {
        return Ok(HostAddress::Ip(address));
    }
    // With a zone: only the operating system can turn its name into a number, and it does so without a look-up.
    let zoned = text
        .split_once('%')
        .is_some_and(|(address, zone)| !zone.is_empty() && address.parse::<std::net::Ipv6Addr>().is_ok());
    if zoned {
        return Ok(HostAddress::Name(text.to_owned()));
    }
    Err(ConninfoError::InvalidAddress(text.to_owned()))
}

/// IPv4 as `inet_aton` reads it: one to four numbers, decimal, octal or hexadecimal, the last for all bytes that are left.
fn old_address(text: &str) -> Option<IpAddr> {
    let number = |text: &str| match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None if text.len() > 1 && text.starts_with('0') => u32::from_str_radix(text, 8).ok(),
        None => text.parse().ok(),
    };
    let is_digits = text.chars().all(|c| c.is_ascii_hexdigit() || matches!(c, 'x' | 'X' | '.'));
    let parts = text.split('.').map(number).collect::<Option<Vec<u32>>>().filter(|_| is_digits)?;
    let (last, first) = parts.split_last()?;
    let bits_left = 32_u32.checked_sub(8 * u32::try_from(first.len()).ok()?).filter(|bits| *bits > 0)?;
    if u64::from(*last) >= 1 << bits_left {
        return None;
    }
    let mut address = *last;
    for (index, byte) in (1_u32..).zip(first) {
        address |= u32::from(u8::try_from(*byte).ok()?) << (32 - 8 * index);
    }
    Some(IpAddr::V4(address.into()))
}

fn ssl_settings(settings: &Settings) -> Result<SslSettings, ConninfoError> {
    let mode = SslMode::parse(settings.value("sslmode").unwrap_or_default())?;
    let negotiation = SslNegotiation::parse(settings.value("sslnegotiation").unwrap_or_default())?;
    if negotiation == SslNegotiation::Direct && !mode.is_tls_required() {
        return Err(ConninfoError::WeakForDirect(mode.as_str()));
    }
    let root_cert = settings.filled("sslrootcert").map(str::to_owned);
    if root_cert.as_deref() == Some("system") && mode != SslMode::VerifyFull {
        return Err(ConninfoError::WeakForSystemRoots(mode.as_str()));
    }
    let min_version = tls_version(settings, "ssl_min_protocol_version")?;
    let max_version = tls_version(settings, "ssl_max_protocol_version")?;
    if min_version.zip(max_version).is_some_and(|(min, max)| min > max) {
        return Err(ConninfoError::TlsVersionRange);
    }
    let cert_mode = settings.value("sslcertmode").map(SslCertMode::parse).transpose()?;
    let path = |keyword| settings.filled(keyword).map(PathBuf::from);
    Ok(SslSettings {
        mode,
        negotiation,
        cert_mode: cert_mode.unwrap_or(SslCertMode::Allow),
        cert: path("sslcert"),
        key: path("sslkey"),
        key_password: settings.filled("sslpassword").map(SecretString::from),
        root_cert,
        crl: path("sslcrl"),
        crl_directory: path("sslcrldir"),
        sni: settings.value("sslsni").is_some_and(|value| value.starts_with('1')),
        min_version,
        max_version,
    })
}

fn tls_version(settings: &Settings, keyword: &'static str) -> Result<Option<TlsVersion>, ConninfoError> {
    let Some(text) = settings.filled(keyword) else { return Ok(None) };
    let invalid = |_| ConninfoError::InvalidTlsVersion { keyword, value: text.to_owned() };
    TlsVersion::parse(text).map(Some).map_err(invalid)
}

fn check_gssapi(settings: &Settings) -> Result<(), ConninfoError> {
    match GssEncMode::parse(settings.value(GssEncMode::KEYWORD).unwrap_or_default())? {
        GssEncMode::Disable | GssEncMode::Prefer => Ok(()),
        GssEncMode::Require => Err(ConninfoError::NoGssapi(GssEncMode::Require.to_string())),
    }
}

fn scram_key(
    settings: &Settings,
    keyword: &str,
    which: &'static str,
) -> Result<Option<ScramKey>, ConninfoError> {
    let Some(text) = settings.value(keyword) else { return Ok(None) };
    let bytes = SCRAM_KEY_BASE64.decode(text).map_err(|_| ConninfoError::InvalidScramKey(which))?;
    let key: Box<[u8]> = bytes.into();
    let key =
        key.try_into().map_err(|key: Box<[u8]>| ConninfoError::ScramKeyLength { which, bytes: key.len() });
    Ok(Some(Arc::new(SecretBox::new(key?))))
}

/// As `pg_b64_decode`: padded, without blanks; bits that are left over are not looked at.
const SCRAM_KEY_BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true),
);

fn protocol_versions(settings: &Settings) -> Result<(ProtocolVersion, ProtocolVersion), ConninfoError> {
    let version =
        |keyword| settings.value(keyword).map(|text| ProtocolVersion::parse(keyword, text)).transpose();
    let min = version("min_protocol_version")?.unwrap_or(ProtocolVersion::V3_0);
    // Many servers and poolers cannot negotiate, so nothing newer is asked for unless it is needed anyhow.
    let default = if min > ProtocolVersion::V3_0 { ProtocolVersion::LATEST } else { ProtocolVersion::V3_0 };
    let max = version("max_protocol_version")?.unwrap_or(default);
    if min > max {
        return Err(ConninfoError::ProtocolVersionRange);
    }
    Ok((min, max))
}

/// `keepalives*` and `tcp_user_timeout`, which libpq does not look at for a socket.
fn tcp_settings(
    settings: &Settings,
    has_tcp: bool,
) -> Result<(Option<Keepalives>, Option<Duration>), ConninfoError> {
    if !has_tcp {
        return Ok((None, None));
    }
    let enabled = optional_integer(settings, "keepalives")? != Some(0);
    let keepalives = if enabled {
        let idle = seconds(settings, "keepalives_idle")?;
        let interval = seconds(settings, "keepalives_interval")?;
        let count = optional_integer(settings, "keepalives_count")?;
        let count = count.and_then(|count| u32::try_from(count).ok()).filter(|count| *count > 0);
        Some(Keepalives { idle, interval, count })
    } else {
        None
    };
    let user_timeout = optional_integer(settings, "tcp_user_timeout")?;
    Ok((keepalives, positive(user_timeout).map(Duration::from_millis)))
}

/// A number of seconds; zero and less mean none.
fn seconds(settings: &Settings, keyword: &'static str) -> Result<Option<Duration>, ConninfoError> {
    Ok(positive(optional_integer(settings, keyword)?).map(Duration::from_secs))
}

fn positive(number: Option<i32>) -> Option<u64> {
    number.and_then(|number| u64::try_from(number).ok()).filter(|number| *number > 0)
}

fn optional_integer(settings: &Settings, keyword: &'static str) -> Result<Option<i32>, ConninfoError> {
    settings.value(keyword).map(|text| integer(keyword, text)).transpose()
}

/// A number as `strtol` reads it, with blanks on both sides (`pqParseIntParam`).
fn integer(keyword: &'static str, text: &str) -> Result<i32, ConninfoError> {
    let digits = text.trim_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    digits.parse().map_err(|_| ConninfoError::InvalidInteger { keyword, value: text.to_owned() })
}

fn client_encoding(settings: &Settings) -> Option<String> {
    // libpq asks the locale; this program's own encoding is always the same.
    settings.filled("client_encoding").map(|name| if name == "auto" { "UTF8" } else { name }.to_owned())
}

/// Settings of the session that libpq takes from the environment only.
fn environment_parameters(surroundings: &dyn Surroundings) -> Vec<(&'static str, String)> {
    [("PGDATESTYLE", "datestyle"), ("PGTZ", "timezone"), ("PGGEQO", "geqo")]
        .into_iter()
        .filter_map(|(variable, parameter)| Some((parameter, surroundings.variable(variable)?)))
        .filter(|(_, value)| !value.eq_ignore_ascii_case("default"))
        .collect()
}
