//! Fuzzes `walrelay::net::tls`: certificates of strangers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| walrelay::net::tls::fuzz_certificate(bytes));
