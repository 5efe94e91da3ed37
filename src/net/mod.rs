//! Connections: sockets of either family, and the blocks into which WAL is received.
//!
//! Owns the choice between TCP and Unix sockets, TLS over the former, socket options, and the receive buffers. Knows no message
//! of the protocol and makes no decision about a peer.

pub mod blocks;
pub mod interfaces;
mod peer;
mod rewound;
pub mod socket;
pub mod tls;
mod tls_facts;

pub use blocks::{BlockReader, DecodingBlocks};
pub use interfaces::interfaces;
pub use peer::{Network, Peer};
pub use socket::{Listener, ReadHalf, Socket, TcpOptions, WriteHalf, reunite, send_all};
pub use tls_facts::{ClientCertificate, Encryption, TlsFacts};
