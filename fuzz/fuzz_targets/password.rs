//! Fuzzes `walrelay::protocol::md5`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| walrelay::protocol::md5::fuzz_password(bytes));
