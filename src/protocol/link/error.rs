//! What can be wrong with what came over a link.
//!
//! Nothing of a message that is wrong is given on. After any of these the connection is of no more use: where the next frame
//! can be read from is not known.

use crate::protocol::DecodeError;
use crate::protocol::link::Encoding;
use crate::wal::{HistoryHash, Lsn, SystemId, TimelineId};

/// A link's message cannot be, or is not what was sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// It is no message of a link.
    #[error(transparent)]
    Message(#[from] DecodeError),
    /// WAL came before it was said whose it is.
    #[error("WAL at {at} came before the link's hello")]
    NoHello {
        /// Its first byte.
        at: Lsn,
    },
    /// It was said twice.
    #[error("the link's hello came twice")]
    SecondHello,
    /// Bits of the hello are not what was sent.
    #[error("the link's hello has a wrong checksum")]
    HelloChecksum,
    /// The sender speaks a version that was not agreed upon.
    #[error("the link's hello is of version {0}")]
    Version(u8),
    /// The WAL is of another cluster or history than what is held.
    #[error(transparent)]
    Mismatch(#[from] LinkMismatch),
    /// A frame's content, or what it says of it, is not what was sent.
    #[error("frame of WAL at {at} has a wrong checksum")]
    Checksum {
        /// Where it says it begins.
        at: Lsn,
    },
    /// A frame does not follow what came before.
    #[error("frame of WAL begins at {got}, expected {expected}")]
    OutOfPlace {
        /// Where what came before ends.
        expected: Lsn,
        /// Where it begins.
        got: Lsn,
    },
    /// A frame is of another timeline than the stream.
    #[error("frame of WAL at {at} is of timeline {got}, the stream of {expected}")]
    WrongTimeline {
        /// Where it begins.
        at: Lsn,
        /// The stream's.
        expected: TimelineId,
        /// The frame's.
        got: TimelineId,
    },
    /// A frame needs others that did not come just before it.
    #[error("frame of WAL at {at} is number {sequence} of epoch {epoch}, which does not follow")]
    OutOfSequence {
        /// Where it begins.
        at: Lsn,
        /// Its epoch.
        epoch: u32,
        /// Its number there.
        sequence: u32,
    },
    /// A frame goes on with a stream, and none came just before.
    #[error("a frame of WAL at {at} goes on with a stream that did not come before")]
    NothingToGoOn {
        /// Where the next frame must begin.
        at: Lsn,
    },
    /// A frame, or what the hello announces, is encoded in a way that this side has not offered.
    #[error("WAL at {at} comes as \"{}\", which was not offered", .encoding.as_str())]
    NotOffered {
        /// Where it begins.
        at: Lsn,
        /// How it is encoded.
        encoding: Encoding,
    },
    /// A frame cannot be read.
    #[error("could not decompress the frame of WAL at {at}: {reason}")]
    Decompress {
        /// Where it begins.
        at: Lsn,
        /// Why.
        reason: String,
    },
}

impl LinkError {
    /// Whether it will be the same each time, until a person has done something.
    pub fn needs_a_person(&self) -> bool {
        matches!(self, Self::Mismatch(_))
    }
}

/// Two relays hold WAL that is not of one kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkMismatch {
    /// Another cluster.
    #[error("the link's sender has WAL of system identifier {got}, this relay holds WAL of {expected}")]
    System {
        /// What is held.
        expected: SystemId,
        /// What is sent.
        got: SystemId,
    },
    /// Another timeline than was asked for.
    #[error("the link's sender streams timeline {got}, asked for was {expected}")]
    Timeline {
        /// What was asked for.
        expected: TimelineId,
        /// What is sent.
        got: TimelineId,
    },
    /// The same number for another history.
    #[error(
        "the link's sender has another history of timeline {timeline} than this relay (hash {got}, here {expected}): \
         one of the two follows another cluster's history"
    )]
    History {
        /// The timeline.
        timeline: TimelineId,
        /// Of what is held.
        expected: HistoryHash,
        /// Of what is sent.
        got: HistoryHash,
    },
}
