//! What a running mirror is asked, and what comes back.

use tokio::sync::oneshot;

/// What a requested listing led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Synced {
    /// The snapshot that is shown now.
    pub snapshot: u64,
    /// Objects that were fetched for it.
    pub fetched: usize,
    /// Objects that it has no more.
    pub removed: usize,
}

pub(super) type SyncReply = oneshot::Sender<Result<Synced, String>>;

pub(super) enum Request {
    Sync(SyncReply),
    Stop(oneshot::Sender<()>),
}
