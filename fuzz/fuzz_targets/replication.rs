//! Fuzzes `walrelay::protocol::replication`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| walrelay::protocol::replication::fuzz_replication(bytes));
