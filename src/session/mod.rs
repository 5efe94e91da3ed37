//! What to do next: the pure halves of replication sessions.
//!
//! Each machine here is told what happened (`handle_...`, with the time as an argument) and asked what to do
//! (`poll_output`) and when to be called again (`poll_timeout`). None has a clock, a socket, a file or a thread, and none
//! holds WAL: they speak of positions, and the drivers fetch the bytes. After every `handle_` call the driver drains
//! `poll_output` until it answers `None`.

pub mod acknowledge;
pub mod cut;
pub mod feedback;
pub mod gather;
pub mod lag;
pub mod link;
pub mod only_copy;
pub mod receiver;
pub mod sender;
pub mod timelines;

pub use receiver::Receiver;
pub use sender::Sender;
