//! What tests against real servers share: clusters, the relay as a process, clients, faults, and comparisons.
//!
//! Included by `tests/postgres` (and the benches) with `#[path]`. Uses nothing of the library it tests: positions are
//! plain numbers here and the wire is written by hand, so that an error in the library cannot hide itself.
#![allow(dead_code, reason = "each binary that includes this uses its own part")]

pub(crate) mod certificates;
pub(crate) mod compare;
pub(crate) mod confirmed;
pub(crate) mod faults;
pub(crate) mod http;
pub(crate) mod lab;
pub(crate) mod load;
pub(crate) mod patroni;
pub(crate) mod place;
pub(crate) mod postgres;
pub(crate) mod powercut;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod psql;
pub(crate) mod raw;
pub(crate) mod receivewal;
pub(crate) mod relay;
pub(crate) mod tls_site;
pub(crate) mod two_sites;
pub(crate) mod wait;
pub(crate) mod wan;

/// Reads `16/B374D848`.
pub(crate) fn lsn(text: &str) -> u64 {
    let (high, low) = text.trim().split_once('/').unwrap_or_else(|| panic!("not an LSN: {text:?}"));
    let half = |digits| u64::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("not an LSN: {text:?}"));
    half(high) << 32 | half(low)
}

/// Prints an LSN as PostgreSQL does up to version 18.
pub(crate) fn lsn_text(lsn: u64) -> String {
    format!("{:X}/{:X}", lsn >> 32, lsn & 0xFFFF_FFFF)
}

pub(crate) const MB: u64 = 1 << 20;

/// `XLOG_BLCKSZ`.
pub(crate) const PAGE_BYTES: u64 = 8192;
