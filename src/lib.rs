//! walrelay: a WAL streaming proxy and standby receiver for PostgreSQL.

pub mod admin;
pub mod cli;
pub mod config;
pub mod conninfo;
pub mod downstream;
pub mod metrics;
pub mod net;
pub mod protocol;
pub mod relay;
pub mod session;
pub mod status;
pub mod store;
pub mod upstream;
pub mod wal;
