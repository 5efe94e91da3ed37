//! Certificates of strangers are read without a panic, whatever they are.
//!
//! The body of the fuzz target runs over `tests/corpus/net/certificate`, which has certificates of each kind and some that
//! are none, over each with a few bytes changed, and over random bytes.
#![allow(clippy::unwrap_used, reason = "clippy exempts test functions, not their helpers")]

use proptest::{collection::vec, prelude::*, sample::Index};
use walrelay::net::tls::fuzz_certificate;

#[allow(clippy::disallowed_methods, reason = "a test reads its own corpus")]
fn corpus() -> Vec<Vec<u8>> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/net/certificate");
    std::fs::read_dir(folder).unwrap().map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect()
}

#[test]
fn the_corpus_is_replayed_whole_and_cut() {
    let corpus = corpus();
    assert!(corpus.len() >= 12, "{} certificates", corpus.len());
    for certificate in corpus {
        fuzz_certificate(&certificate);
        for length in (0..certificate.len()).step_by(7) {
            fuzz_certificate(certificate.get(..length).unwrap_or_default());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_certificate_with_some_bytes_changed_is_read_or_refused(
        which in any::<Index>(),
        changes in vec((any::<Index>(), any::<u8>()), 1..4),
    ) {
        let corpus = corpus();
        let mut certificate = which.get(&corpus).clone();
        for (at, byte) in changes {
            if !certificate.is_empty() {
                *at.get_mut(&mut certificate) = byte;
            }
        }
        fuzz_certificate(&certificate);
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..200)) {
        fuzz_certificate(&bytes);
    }
}
