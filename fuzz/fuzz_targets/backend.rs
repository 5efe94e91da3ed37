//! Fuzzes `walrelay::protocol::backend`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| walrelay::protocol::backend::fuzz_backend(bytes));
