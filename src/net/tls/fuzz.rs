//! The body of a fuzz target.

use rustls::pki_types::{CertificateDer, UnixTime};

use crate::net::tls::{
    certificate::{CLIENT_PURPOSE, Parsed, end_point_binding},
    peer_name::check_name,
    provider,
    subject::Subject,
    trust::{Role, Trust},
};

/// Reads what a stranger shows as his certificate, in every way in which one is read. Also run by
/// `tests/certificate_properties.rs`.
pub fn fuzz_certificate(bytes: &[u8]) {
    if let Some(client) = Subject::of(bytes).and_then(|subject| subject.client()) {
        let name = client.distinguished_name;
        assert!(
            name.bytes().all(|byte| matches!(byte, b' '..=b'~')),
            "it is compared with lines of a file: {name:?}"
        );
    }
    let _ = end_point_binding(bytes);
    let Some(parsed) = Parsed::of(bytes) else { return };
    // What a library reads can be walked through by hand.
    assert!(
        parsed.signed_part().is_some_and(|signed| bytes.windows(signed.len()).any(|part| part == signed))
    );
    let _ = (check_name(&parsed.names(), "db.example"), check_name(&parsed.names(), "10.0.0.1"));
    let _ = (parsed.is_valid_at(0), parsed.expires_at(), parsed.is_authority(), parsed.is_old_version());
    let _ =
        (parsed.may_sign_certificates(), parsed.may_be_used_in_handshakes(), parsed.is_for(CLIENT_PURPOSE));
    let _ = (parsed.constrains_names(), parsed.has_unknown_demands());
    // By itself as a root, which takes the longest way.
    let certificate = CertificateDer::from(bytes.to_vec());
    let Ok(trust) = Trust::new(std::slice::from_ref(&certificate), Vec::new(), &provider()) else { return };
    let _ = trust.constrains_names();
    for role in [Role::Client, Role::Server] {
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(1_800_000_000));
        let _ = trust.check(role, &certificate, std::slice::from_ref(&certificate), now);
    }
}
