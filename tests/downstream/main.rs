//! The sending side as clients meet it, over real sockets: handshake, commands, streams and limits.
//!
//! Every expectation is PostgreSQL's own behaviour, as seen on the wire or read in its source.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "clippy exempts test functions, not their helpers"
)]

mod commands;
#[path = "../support/disk.rs"]
mod disk;
mod handshake;
mod limits;
mod link;
mod panics;
mod policies;
mod slots;
mod streaming;
mod support;
