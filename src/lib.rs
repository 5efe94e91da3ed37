//! walrelay: a WAL streaming proxy and standby receiver for PostgreSQL 13 to 18.
//!
//! One process connects to a primary as a standby would, proves every WAL record as it arrives, makes it durable as
//! ordinary WAL files, and streams it to standbys, `pg_receivewal` and further relays. Data goes down, feedback goes up:
//!
//! ```text
//!             WAL bytes ─────────────▶
//!
//!  primary   ┌ upstream ───────┐   ┌ store ──────────────────┐   ┌ downstream ─────┐   standby,
//!  or relay ─▶ connect         │   │ verify ─▶ writer ─▶ disk│   │ listener        ├─▶ pg_receivewal
//!            │ walreceiver ────┼──▶│   │          │          │   │ handshake       │   or relay
//!            │   session::     │   │   ├─▶ tail (memory) ─┐  │   │ walsender xN    │
//!            │   receiver      │   │   ▼          ▼       ▼  │   │   session::     │
//!            └──────▲──────────┘   │ positions ─watch─▶ reader ─▶│   sender        │
//!                   │              │ slots ─▶ retention      │   └──────┬──────────┘
//!                   │              └────▲────────────────────┘          │
//!                   │                   └── restart_lsn ────────────────┤
//!                   └───────────── write / flush ───────────────────────┘
//!                          ◀───────────── feedback
//! ```
//!
//! # Layers
//!
//! Imports point down; `tests/tidy.rs` holds it. Upstream and downstream never know one another: they meet in the store
//! (the bytes and the positions) and in [`relay`], which wires them.
//!
//! | layer | modules | what it may do |
//! |---|---|---|
//! | 8 | `main.rs`, [`cli`] | arguments, logging, exit status |
//! | 7 | [`relay`] | build the parts, start and stop them |
//! | 6 | [`upstream`], [`downstream`], [`admin`] | async drivers; decide nothing that [`session`] can decide |
//! | 5 | [`net`] | sockets and receive buffers |
//! | 4 | [`session`] (pure), [`store`] (files and threads, no tokio) | decisions; bytes on disk |
//! | 3 | [`config`], [`metrics`], [`status`] | plain data |
//! | 2 | [`access`] (pure) | who may connect, by PostgreSQL's rules |
//! | 1 | [`protocol`] (pure), [`conninfo`] | bytes on the wire; libpq's connection strings |
//! | 0 | [`wal`] (pure) | positions, segments, timelines, verification |
//!
//! The pure modules have no tokio, no socket, no file, no thread and no clock: time and bytes are arguments.
//!
//! # Where to start reading
//!
//! 1. [`wal::scanner`]: what "verified" means, and where a stream may be cut.
//! 2. [`store`]: what is on disk, and the state a crash leaves at every step.
//! 3. [`session::receiver`] and [`session::sender`]: what is said upstream and downstream, and when.
//! 4. [`upstream`] and [`downstream`]: the same, on real sockets.
//! 5. [`relay`]: how it is put together.

pub mod access;
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
