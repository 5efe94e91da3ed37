//! Fuzzes `walrelay::protocol::link::inbound`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| walrelay::protocol::link::inbound::fuzz_inbound(bytes));
