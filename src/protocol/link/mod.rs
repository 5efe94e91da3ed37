//! The compressed link between two relays: an extension of the replication protocol that both must speak.
//!
//! The receiving side offers it in its startup packet ([`offer`]); a server that does not know it says so by the protocol's
//! own rule, and the stream is plain. Where it was accepted, each stream begins with a [`hello`], and then WAL may come in
//! [`frame`]s beside the plain messages, which stay allowed:
//!
//! ```text
//!  receiver                                            sender
//!  startup: _pq_.walrelay_link = "1;zstd,lz4"  ──────▶
//!                                              ◀──────  ParameterStatus walrelay.link = "1;zstd:1"
//!  START_REPLICATION ...                       ──────▶
//!                                              ◀──────  CopyBothResponse
//!                                              ◀──────  'z' hello: whose WAL this is
//!                                              ◀──────  'z' frame, standalone: can be read by itself
//!                                              ◀──────  'z' frame, epoch 7, sequence 0: begins a stream of frames
//!                                              ◀──────  'z' short frame, goes on: epoch 7, sequence 1
//!                                              ◀──────  'k' keepalive, 'w' plain WAL, ...
//! ```
//!
//! A frame belongs to one place: timeline, first byte, and length; its checksum covers these and the WAL itself, and begins
//! with the cluster and the history that the WAL is of. [`inbound`] holds all rules of what may follow what. Everything a
//! frame makes the receiver reserve is limited before it is reserved.

pub mod codec;
pub mod error;
pub mod frame;
pub mod hello;
pub mod inbound;
pub mod offer;

pub use codec::{BulkEncoder, CodecError, Decoder, StreamEncoder};
pub use error::{LinkError, LinkMismatch};
pub use frame::{FrameHead, FrameHeader, FrameKind, Seed, WalChecksum};
pub use hello::Hello;
pub use inbound::{Arrival, Inbound, WholeFrame};
pub use offer::{Codec, Compression, Offer};

use crate::protocol::WAL_DATA_BYTES_MAX;

/// Kind byte, inside CopyData, of every message of a link.
pub const LINK_MESSAGE: u8 = b'z';

/// Longest message of a link, its kind byte included.
pub const LINK_MESSAGE_BYTES_MAX: usize =
    frame::FRAME_FIELDS_BYTES + frame::payload_bytes_max(WAL_DATA_BYTES_MAX);

/// How the bytes of a frame are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// As they are.
    Plain,
    /// By zstd.
    Zstd,
    /// As one block of LZ4.
    Lz4,
}

impl Encoding {
    pub(crate) fn from_wire(raw: u8) -> Option<Self> {
        match raw {
            0 => Some(Self::Plain),
            1 => Some(Self::Zstd),
            2 => Some(Self::Lz4),
            _ => None,
        }
    }

    pub(crate) fn to_wire(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Zstd => 1,
            Self::Lz4 => 2,
        }
    }

    /// As settings and logs name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "none",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        }
    }
}

/// Name of these messages in errors.
const LINK_MESSAGE_NAME: &str = "link message";
