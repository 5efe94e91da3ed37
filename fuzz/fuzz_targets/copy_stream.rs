//! Fuzzes `walrelay::protocol::copy_stream`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| walrelay::protocol::copy_stream::fuzz_copy_stream(bytes));
