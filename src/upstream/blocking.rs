//! Work that blocks, done where it is needed.
//!
//! Owns the one call that lets other tasks go on meanwhile; a runtime with a single thread, as tests have, has none to spare.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task;

pub(super) fn block_in_place<T>(work: impl FnOnce() -> T) -> T {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::CurrentThread => work(),
        _ => task::block_in_place(work),
    }
}
