//! Fuzzes `walrelay::protocol::link::offer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| walrelay::protocol::link::offer::fuzz_offer(bytes));
