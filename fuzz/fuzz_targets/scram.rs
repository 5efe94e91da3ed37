//! Fuzzes `walrelay::protocol::scram`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| walrelay::protocol::scram::fuzz_scram(bytes));
