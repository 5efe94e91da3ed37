//! Both handshakes against one another, over memory and with files made for the test.

mod renewal;

use std::path::{Path, PathBuf};

use base64::{Engine, engine::general_purpose::STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType, IsCa,
    Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::config;
use crate::conninfo::{Conninfo, FixedSurroundings};
use crate::net::TlsFacts;
use crate::protocol::scram::ChannelBinding;

/// A file of one PEM section.
fn pem(label: &str, der: &[u8]) -> String {
    let body = STANDARD.encode(der);
    let lines: Vec<_> = body.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line)).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

fn key_pem(key: &KeyPair) -> String {
    pem("PRIVATE KEY", key.serialized_der())
}

fn params(common_name: &str, names: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.subject_alt_names = names
        .iter()
        .map(|name| match name.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName((*name).try_into().unwrap()),
        })
        .collect();
    params.serial_number = Some(SerialNumber::from(7_u64));
    params
}

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Authority {
    let mut params = params(name, &[]);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    use rcgen::KeyUsagePurpose::{CrlSign, DigitalSignature, KeyCertSign};
    params.key_usages = vec![KeyCertSign, CrlSign, DigitalSignature];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate and its key, as files.
fn issued(params: &CertificateParams, by: &Authority) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, issuer(by)).unwrap();
    (pem("CERTIFICATE", certificate.der()), key_pem(&key))
}

fn issuer(of: &Authority) -> &Issuer<'static, KeyPair> {
    of
}

fn self_signed(params: &CertificateParams, key: &KeyPair) -> (String, String) {
    (pem("CERTIFICATE", params.self_signed(key).unwrap().der()), key_pem(key))
}

/// Files below `/t`, and a home directory without any.
#[derive(Clone)]
struct Files(FixedSurroundings);

impl Files {
    fn new() -> Self {
        let mut surroundings = FixedSurroundings::of_user("relay");
        surroundings.user_home = Some(PathBuf::from("/home/relay"));
        Self(surroundings)
    }

    fn with(self, name: &str, text: &str) -> Self {
        Self(self.0.with_file(name, 0o600, text))
    }

    fn with_server(self, (cert, key): (String, String)) -> Self {
        self.with("/t/server.crt", &cert).with("/t/server.key", &key)
    }

    fn server(&self, client_ca: Option<&str>) -> Result<ServerTls, TlsError> {
        let settings = config::Tls {
            cert: PathBuf::from("/t/server.crt"),
            key: PathBuf::from("/t/server.key"),
            client_ca: client_ca.map(PathBuf::from),
            client_crl: self.0.files.contains_key(Path::new("/t/client.crl")).then(|| "/t/client.crl".into()),
            min_version: config::TlsVersion::V1_2,
        };
        ServerTls::read(&settings, &self.0)
    }

    fn client(&self, conninfo: &str) -> Result<ClientTls, TlsError> {
        let conninfo = Conninfo::parse(conninfo, &self.0).unwrap();
        ClientTls::read(&conninfo.ssl, &conninfo.hosts[0].certificate_name, &self.0)
    }
}

struct Outcome {
    client: Result<ServerTlsFacts, String>,
    server: Result<TlsFacts, String>,
}

/// One handshake, and a few bytes each way.
async fn meet(client: &ClientTls, server: &ServerTls, start: TlsStart) -> Outcome {
    let (near, far) = tokio::io::duplex(4096);
    let (client, server) = tokio::join!(
        async {
            let (mut stream, facts) = client.connect(near).await.map_err(|error| text(&error))?;
            stream.write_all(b"ping").await.map_err(|error| error.to_string())?;
            stream.flush().await.map_err(|error| error.to_string())?;
            let mut answer = [0; 4];
            stream.read_exact(&mut answer).await.map_err(|error| error.to_string())?;
            Ok(facts)
        },
        async {
            let (mut stream, facts) = server.accept(far, start).await.map_err(|error| text(&error))?;
            let mut question = [0; 4];
            stream.read_exact(&mut question).await.map_err(|error| error.to_string())?;
            stream.write_all(&question).await.map_err(|error| error.to_string())?;
            stream.flush().await.map_err(|error| error.to_string())?;
            Ok(facts)
        }
    );
    Outcome { client, server }
}

fn text(error: &TlsError) -> String {
    let mut text = error.to_string();
    if let Some(source) = std::error::Error::source(error) {
        text.push_str(": ");
        text.push_str(&source.to_string());
    }
    text
}

async fn client_says(files: &Files, conninfo: &str) -> Result<ServerTlsFacts, String> {
    let client = files.client(conninfo).map_err(|error| text(&error))?;
    meet(&client, &files.server(None).unwrap(), TlsStart::Requested).await.client
}

#[tokio::test]
async fn each_sslmode_checks_what_libpq_checks() {
    let (ca, other) = (authority("root"), authority("other"));
    let files = Files::new()
        .with_server(issued(&params("db", &["db.example", "127.0.0.1"]), &ca))
        .with("/t/root.crt", &pem("CERTIFICATE", ca.der()))
        .with("/t/other.crt", &pem("CERTIFICATE", other.der()));
    for mode in ["require", "prefer", "allow"] {
        assert!(
            client_says(&files, &format!("host=nobody sslmode={mode}")).await.is_ok(),
            "{mode} without roots"
        );
    }
    // With a root file the chain is checked whatever the mode.
    for mode in ["require", "prefer", "allow", "verify-ca", "verify-full"] {
        let refused =
            client_says(&files, &format!("host=db.example sslmode={mode} sslrootcert=/t/other.crt")).await;
        assert_eq!(refused.unwrap_err(), "SSL error: invalid peer certificate: UnknownIssuer", "{mode}");
    }
    let ok = client_says(&files, "host=nobody sslmode=verify-ca sslrootcert=/t/root.crt").await;
    assert!(ok.is_ok(), "verify-ca does not look at the name");
    for host in ["db.example", "DB.Example", "127.0.0.1"] {
        let ok =
            client_says(&files, &format!("host={host} sslmode=verify-full sslrootcert=/t/root.crt")).await;
        let facts = ok.unwrap();
        assert!(facts.has_alpn && matches!(facts.binding, ChannelBinding::TlsServerEndPoint(_)));
    }
    let refused = client_says(&files, "host=db2.example sslmode=verify-full sslrootcert=/t/root.crt").await;
    let text =
        "server certificate for \"db.example\" (and 1 other name) does not match host name \"db2.example\"";
    assert_eq!(refused.unwrap_err(), text);
    let refused = client_says(&files, "host=db.example sslmode=verify-ca").await.unwrap_err();
    assert!(
        refused.starts_with("root certificate file \"/home/relay/.postgresql/root.crt\" does not exist"),
        "{refused}"
    );
    let in_home = files.clone().with("/home/relay/.postgresql/root.crt", &pem("CERTIFICATE", other.der()));
    assert!(
        client_says(&in_home, "host=db.example sslmode=require").await.is_err(),
        "the root in the home counts"
    );
}

#[tokio::test]
async fn what_webpki_refuses_and_libpq_accepts_is_accepted() {
    // `openssl req -x509` makes an authority of it, which is its own root.
    let mut own = params("db.example", &[]);
    own.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let pair = self_signed(&own, &KeyPair::generate().unwrap());
    let other = self_signed(&own, &KeyPair::generate().unwrap());
    let files =
        Files::new().with_server(pair.clone()).with("/t/root.crt", &pair.0).with("/t/other.crt", &other.0);
    let full = "host=db.example sslmode=verify-full sslrootcert=/t/root.crt";
    assert!(client_says(&files, full).await.is_ok(), "known by its common name alone");
    let refused = client_says(&files, "host=db.example sslmode=verify-ca sslrootcert=/t/other.crt").await;
    assert!(refused.is_err(), "of the same name, and with another key");
    let refused = client_says(&files, "host=other sslmode=verify-full sslrootcert=/t/root.crt").await;
    assert_eq!(
        refused.unwrap_err(),
        "server certificate for \"db.example\" does not match host name \"other\""
    );
    // One that is not its own issuer is no root, although it stands in the file.
    let ca = authority("root");
    let leaf = issued(&params("db.example", &[]), &ca);
    let files = Files::new().with_server(leaf.clone()).with("/t/root.crt", &leaf.0);
    assert!(client_says(&files, full).await.is_err());
    // Expired is expired.
    own.not_after = date_time_ymd(2020, 1, 1);
    own.not_before = date_time_ymd(2019, 1, 1);
    let pair = self_signed(&own, &KeyPair::generate().unwrap());
    let files = Files::new().with_server(pair.clone()).with("/t/root.crt", &pair.0);
    let refused = client_says(&files, full).await.unwrap_err();
    assert_eq!(refused, "SSL error: invalid peer certificate: Expired");
}

#[tokio::test]
async fn a_signature_without_a_hash_leaves_nothing_to_bind_to() {
    let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let files = Files::new().with_server(self_signed(&params("db", &["db"]), &key));
    let facts = client_says(&files, "host=db sslmode=require").await.unwrap();
    assert_eq!(facts.binding, ChannelBinding::Unsupported);
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let files = Files::new().with_server(self_signed(&params("db", &["db"]), &key));
    let client = files.client("host=db sslmode=require").unwrap();
    let met = meet(&client, &files.server(None).unwrap(), TlsStart::Requested).await;
    let (client, server) = (met.client.unwrap().binding, met.server.unwrap().binding);
    assert_eq!(client, server, "both ends are bound to the same");
    assert!(
        matches!(client, ChannelBinding::TlsServerEndPoint(hash) if hash.len() == 48),
        "by the signature's hash"
    );
}

#[tokio::test]
async fn a_clients_certificate_is_asked_for_and_must_be_right_if_it_is_shown() {
    let (ca, other) = (authority("root"), authority("other"));
    let mine = issued(&params("standby", &[]), &ca);
    let foreign = issued(&params("standby", &[]), &other);
    let files = Files::new()
        .with_server(issued(&params("db", &["db"]), &ca))
        .with("/t/root.crt", &pem("CERTIFICATE", ca.der()))
        .with("/t/client.crt", &mine.0)
        .with("/t/client.key", &mine.1)
        .with("/t/foreign.crt", &foreign.0)
        .with("/t/foreign.key", &foreign.1);
    let asking = files.server(Some("/t/root.crt")).unwrap();
    let with = |conninfo: &str| files.client(conninfo).unwrap();
    let base = "host=db sslmode=verify-full sslrootcert=/t/root.crt";
    let met = meet(
        &with(&format!("{base} sslcert=/t/client.crt sslkey=/t/client.key")),
        &asking,
        TlsStart::Requested,
    )
    .await;
    let facts = met.client.unwrap();
    assert!(facts.certificate_requested && facts.certificate_sent);
    let shown = met.server.unwrap().client_certificate.unwrap();
    assert_eq!(
        (shown.common_name.as_deref(), shown.distinguished_name.as_str()),
        (Some("standby"), "CN=standby")
    );
    let met = meet(&with(base), &asking, TlsStart::Requested).await;
    let facts = met.client.unwrap();
    assert!(facts.certificate_requested && !facts.certificate_sent);
    assert_eq!(met.server.unwrap().client_certificate, None, "whether one is needed is not decided here");
    let met = meet(
        &with(&format!("{base} sslcert=/t/foreign.crt sslkey=/t/foreign.key")),
        &asking,
        TlsStart::Requested,
    )
    .await;
    assert_eq!(met.server.unwrap_err(), "SSL error: invalid peer certificate: UnknownIssuer");
    assert!(met.client.is_err());
    let disabled = with(&format!("{base} sslcertmode=disable sslcert=/t/client.crt sslkey=/t/client.key"));
    assert!(!meet(&disabled, &asking, TlsStart::Requested).await.client.unwrap().certificate_sent);
    let met = meet(&with(base), &files.server(None).unwrap(), TlsStart::Requested).await;
    assert!(!met.client.unwrap().certificate_requested);
}

#[tokio::test]
async fn revoked_certificates_are_refused_on_both_sides() {
    let ca = authority("root");
    let mine = issued(&params("standby", &[]), &ca);
    let list = |serials: &[u64]| {
        let revoked = serials.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(2124, 1, 1),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        pem("X509 CRL", list.signed_by(issuer(&ca)).unwrap().der())
    };
    let base = Files::new()
        .with_server(issued(&params("db", &["db"]), &ca))
        .with("/t/root.crt", &pem("CERTIFICATE", ca.der()))
        .with("/t/client.crt", &mine.0)
        .with("/t/client.key", &mine.1);
    let conninfo =
        "host=db sslmode=verify-ca sslrootcert=/t/root.crt sslcert=/t/client.crt sslkey=/t/client.key";
    for (serials, is_refused) in [(&[8][..], false), (&[7], true)] {
        let files = base.clone().with("/t/client.crl", &list(serials));
        let met = meet(
            &files.client(conninfo).unwrap(),
            &files.server(Some("/t/root.crt")).unwrap(),
            TlsStart::Requested,
        )
        .await;
        assert_eq!(met.server.is_err(), is_refused, "{serials:?}");
        for crl in ["sslcrl=/t/crls/a.r0", "sslcrldir=/t/crls"] {
            let files = base.clone().with("/t/crls/a.r0", &list(serials));
            let refused = client_says(&files, &format!("{conninfo} {crl}")).await;
            assert_eq!(refused.is_err(), is_refused, "{serials:?} {crl}");
        }
    }
}

#[tokio::test]
async fn an_authority_as_its_own_server_is_refused_when_it_has_revoked_itself() {
    let authority = authority("db");
    let revoked = RevokedCertParams {
        serial_number: SerialNumber::from(7_u64),
        revocation_time: date_time_ymd(2024, 1, 1),
        reason_code: None,
        invalidity_date: None,
    };
    let list = |revoked_certs| CertificateRevocationListParams {
        this_update: date_time_ymd(2024, 1, 1),
        next_update: date_time_ymd(2124, 1, 1),
        crl_number: SerialNumber::from(1_u64),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let root = pem("CERTIFICATE", authority.der());
    let files = Files::new().with_server((root.clone(), key_pem(authority.key()))).with("/t/root.crt", &root);
    let conninfo = "host=db sslmode=verify-full sslrootcert=/t/root.crt sslcrl=/t/list.crl";
    for (revoked, expected) in
        [(vec![], None), (vec![revoked], Some("SSL error: invalid peer certificate: Revoked"))]
    {
        let list = list(revoked).signed_by(issuer(&authority)).unwrap();
        let files = files.clone().with("/t/list.crl", &pem("X509 CRL", list.der()));
        assert_eq!(client_says(&files, conninfo).await.err().as_deref(), expected);
    }
}

#[tokio::test]
async fn a_direct_connection_must_name_the_protocol() {
    let ca = authority("root");
    let files = Files::new().with_server(issued(&params("db", &["db"]), &ca));
    let server = files.server(None).unwrap();
    let client = files.client("host=db sslmode=require").unwrap();
    let met = meet(&client, &server, TlsStart::Direct).await;
    assert!(met.client.unwrap().has_alpn && met.server.is_ok());
    let mut silent = files.client("host=db sslmode=require").unwrap();
    silent.config = {
        let mut config = (*silent.config).clone();
        config.alpn_protocols = Vec::new();
        Arc::new(config)
    };
    assert!(meet(&silent, &server, TlsStart::Requested).await.server.is_ok(), "older clients say nothing");
    let refused = meet(&silent, &server, TlsStart::Direct).await.server.unwrap_err();
    assert_eq!(refused, "received direct SSL connection request without ALPN protocol negotiation extension");
}

#[test]
fn keys_must_be_private_readable_and_the_certificates_own() {
    let ca = authority("root");
    let (mine, other) = (issued(&params("db", &[]), &ca), issued(&params("db", &[]), &ca));
    let error = |files: &Files| text(&files.server(None).unwrap_err());
    let files = Files::new().with_server((mine.0.clone(), other.1));
    assert_eq!(error(&files), "certificate does not match private key file \"/t/server.key\"");
    let files = Files(Files::new().with_server(mine.clone()).0.with_file("/t/server.key", 0o640, &mine.1));
    assert!(error(&files).starts_with("private key file \"/t/server.key\" has group or world access"));
    let files = Files::new().with_server((mine.0.clone(), "nonsense".to_owned()));
    assert_eq!(error(&files), "could not read private key file \"/t/server.key\": no private key in it");
    let files = Files::new().with_server((String::new(), mine.1));
    assert_eq!(
        error(&files),
        "could not read server certificate file \"/t/server.crt\": no certificate in it"
    );
    let error = Files::new()
        .with("/t/c.crt", &mine.0)
        .client("host=db sslmode=require sslcert=/t/c.crt")
        .err()
        .unwrap();
    let told = "certificate present, but not private key file \"/home/relay/.postgresql/postgresql.key\"";
    assert_eq!(text(&error), told);
}

#[tokio::test]
async fn new_files_are_seen_by_new_connections_and_bad_ones_change_nothing() {
    let ca = authority("root");
    let (first, second) = (issued(&params("db", &["db"]), &ca), issued(&params("db", &["db"]), &ca));
    let files = Files::new().with_server(first.clone());
    let server = files.server(None).unwrap();
    let client = files.client("host=db sslmode=require").unwrap();
    let binding = async || meet(&client, &server, TlsStart::Requested).await.server.unwrap().binding;
    let before = binding().await;
    assert!(server.read_again(&files.0).unwrap().is_none());
    let half = files.clone().with_server((second.0.clone(), first.1));
    assert!(server.read_again(&half.0).is_err());
    let of_half = server.changes(&half.0);
    assert_eq!(binding().await, before);
    let whole = files.clone().with_server(second);
    let renewed = server.read_again(&whole.0).unwrap().unwrap();
    assert_eq!(binding().await, before, "reading changes nothing");
    assert!(renewed.changes().has_one_of(&of_half), "the certificate is the same");
    let third = files.clone().with_server(issued(&params("db", &["db"]), &ca));
    assert!(!server.changes(&third.0).has_one_of(&of_half));
    server.replace(renewed);
    assert_ne!(binding().await, before);
    assert!(server.changes(&whole.0).is_empty());
}

#[test]
fn versions_below_the_least_are_refused() {
    let files = Files::new();
    let error = files
        .client("host=db sslmode=require ssl_min_protocol_version=TLSv1 ssl_max_protocol_version=TLSv1.1");
    let told = "SSL protocol versions up to \"TLSv1.1\" are not supported: TLSv1.2 is the least";
    assert_eq!(text(&error.err().unwrap()), told);
    assert!(files.client("host=db sslmode=require ssl_max_protocol_version=TLSv1.2").is_ok());
}

#[tokio::test]
async fn a_certificate_in_the_root_file_that_is_no_authoritys_vouches_for_itself_alone() {
    let key = KeyPair::generate().unwrap();
    let pinned_params = params("db", &["db"]);
    let pinned = self_signed(&pinned_params, &key);
    // It signs another one, as an authority would.
    let issuer = Issuer::from_params(&pinned_params, &key);
    let forged = {
        let key = KeyPair::generate().unwrap();
        let certificate = params("anybody", &["other"]).signed_by(&key, &issuer).unwrap();
        (pem("CERTIFICATE", certificate.der()), key_pem(&key))
    };
    let base = Files::new().with("/t/root.crt", &pinned.0);
    let full = |host: &str| format!("host={host} sslmode=verify-full sslrootcert=/t/root.crt");
    assert!(client_says(&base.clone().with_server(pinned.clone()), &full("db")).await.is_ok());
    let refused = client_says(&base.clone().with_server(forged.clone()), &full("other")).await;
    assert_eq!(refused.unwrap_err(), "SSL error: invalid peer certificate: UnknownIssuer");
    let files = base.with_server(pinned).with("/t/c.crt", &forged.0).with("/t/c.key", &forged.1);
    let client = files.client("host=db sslmode=require sslcert=/t/c.crt sslkey=/t/c.key").unwrap();
    let met = meet(&client, &files.server(Some("/t/root.crt")).unwrap(), TlsStart::Requested).await;
    assert_eq!(met.server.unwrap_err(), "SSL error: invalid peer certificate: UnknownIssuer");
}

#[tokio::test]
async fn a_root_that_has_run_out_vouches_for_nobody_and_its_successor_does() {
    let key = || KeyPair::generate().unwrap();
    let root = |from, to, key: &KeyPair| {
        let mut params = params("root", &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(to, 1, 1));
        (pem("CERTIFICATE", params.self_signed(key).unwrap().der()), params)
    };
    let signing = key();
    let (old, old_params) = root(2010, 2020, &signing);
    let (new, _) = root(2019, 2120, &signing);
    let leaf_key = key();
    let leaf =
        params("db", &["db"]).signed_by(&leaf_key, &Issuer::from_params(&old_params, &signing)).unwrap();
    let files = Files::new()
        .with_server((pem("CERTIFICATE", leaf.der()), key_pem(&leaf_key)))
        .with("/t/old.crt", &old)
        .with("/t/both.crt", &format!("{old}{new}"));
    let refused = client_says(&files, "host=db sslmode=verify-full sslrootcert=/t/old.crt").await;
    assert_eq!(refused.unwrap_err(), "SSL error: invalid peer certificate: UnknownIssuer");
    assert!(client_says(&files, "host=db sslmode=verify-full sslrootcert=/t/both.crt").await.is_ok());
}

#[tokio::test]
async fn of_two_revocation_lists_the_newer_one_counts() {
    let ca = authority("root");
    let list = |year, serial| {
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2023, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(year, 1, 1),
            next_update: date_time_ymd(2124, 1, 1),
            crl_number: SerialNumber::from(u64::try_from(year).unwrap()),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        pem("X509 CRL", list.signed_by(issuer(&ca)).unwrap().der())
    };
    let base = Files::new()
        .with_server(issued(&params("db", &["db"]), &ca))
        .with("/t/root.crt", &pem("CERTIFICATE", ca.der()));
    let conninfo = "host=db sslmode=verify-full sslrootcert=/t/root.crt";
    let both = base.clone().with("/t/crl", &format!("{}{}", list(2023, 8_u64), list(2024, 7_u64)));
    let refused = client_says(&both, &format!("{conninfo} sslcrl=/t/crl")).await;
    assert_eq!(refused.unwrap_err(), "SSL error: invalid peer certificate: Revoked");
    let empty = base.with("/t/crls/README", "nothing here");
    let refused = client_says(&empty, &format!("{conninfo} sslcrldir=/t/crls")).await.unwrap_err();
    assert_eq!(refused, "no certificate revocation list in directory \"/t/crls\"");
}

#[tokio::test]
async fn an_authority_that_may_name_only_some_names_nobody_by_the_common_name() {
    let mut limited = params("root", &[]);
    limited.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    limited.name_constraints = Some(rcgen::NameConstraints {
        permitted_subtrees: vec![rcgen::GeneralSubtree::DnsName("a.example".to_owned())],
        excluded_subtrees: Vec::new(),
    });
    let ca = CertifiedIssuer::self_signed(limited, KeyPair::generate().unwrap()).unwrap();
    let root = pem("CERTIFICATE", ca.der());
    let says = async |params: &CertificateParams, host: &str| {
        let files = Files::new().with_server(issued(params, &ca)).with("/t/root.crt", &root);
        client_says(&files, &format!("host={host} sslmode=verify-full sslrootcert=/t/root.crt")).await
    };
    assert!(says(&params("x", &["db.a.example"]), "db.a.example").await.is_ok());
    assert!(says(&params("x", &["db.b.example"]), "db.b.example").await.is_err());
    let refused = says(&params("db.b.example", &[]), "db.b.example").await;
    assert_eq!(refused.unwrap_err(), "could not get server's host name from server certificate");
}
