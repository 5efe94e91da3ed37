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

mod access;
mod commands;
#[path = "../support/disk.rs"]
mod disk;
mod guessing;
mod handshake;
mod hostile;
mod limits;
mod link;
mod link_costs;
mod logins;
mod panics;
mod permissions;
mod policies;
mod slots;
mod slow;
mod streaming;
mod support;
