//! Work that may block, off the threads that serve connections.
//!
//! The store's calls touch the disk; a connection's task hands them to here and waits beside its other events.

/// The work panicked, or the runtime is going down.
#[derive(Debug, thiserror::Error)]
#[error("internal error while waiting for the store")]
pub(super) struct BlockingError(#[from] tokio::task::JoinError);

/// Runs `work` on a thread that may block. When the caller goes, the work still runs to its end.
pub(super) async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, BlockingError> {
    Ok(tokio::task::spawn_blocking(work).await?)
}
