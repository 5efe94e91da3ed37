//! Fuzzes `walrelay::protocol::frontend`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| walrelay::protocol::frontend::fuzz_frontend(bytes));
