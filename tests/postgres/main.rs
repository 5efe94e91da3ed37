//! Tests against real PostgreSQL servers: one binary, one file per property. `tests/README.md` says how to run them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and prepares its own files"
)]

#[path = "../support/mod.rs"]
mod support;

mod access;
mod acknowledge;
mod corruption;
mod crash;
mod crashed_primary;
mod cut_positions;
mod damaged_store;
mod descriptors;
mod disk_full;
mod divergence;
mod divergence_report;
mod far_site;
mod feedback;
mod fence;
mod harness;
mod held;
mod histories;
mod hostile;
mod killed_primary;
mod killed_switch;
mod link;
mod link_faults;
mod live_switch;
mod logins;
mod long_pipe;
mod lost_wal;
mod operations;
mod patroni;
mod powercut;
mod protocol_answers;
mod receivewal;
mod repaired_store;
mod restarts;
mod secrets;
mod seen;
mod segment_sizes;
mod sessions;
mod shutdown;
mod slot_by_sql;
mod slot_space;
mod slots;
mod state_files;
mod streaming;
mod switchover;
mod time;
mod timelines;
mod timeouts;
mod tls_clients;
mod tls_consumers;
mod tls_downstream;
mod tls_handshakes;
mod tls_upstream;
mod unheard_slot;
mod upstream_slot;
