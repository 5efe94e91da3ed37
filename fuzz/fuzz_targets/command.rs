//! Fuzzes `walrelay::protocol::command`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| walrelay::protocol::command::fuzz_command(bytes));
