//! How a mirror is, for those who operate it, and what it counts. It decides nothing.

use std::time::{Instant, SystemTime};

/// How a mirror is.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// The snapshot that is shown; 0: none yet.
    pub snapshot: u64,
    /// When it was made, or found at the start.
    pub shown_at: Option<SystemTime>,
    /// Its objects and their bytes.
    pub objects: u64,
    /// As [`Self::objects`].
    pub bytes: u64,
    /// When what is shown was last seen to be what the bucket has.
    pub confirmed: Option<Instant>,
    /// Why it is behind, with a word for the kind; `None` where the last listing was followed.
    pub error: Option<(&'static str, String)>,
    /// Failures in a row.
    pub failures: u32,
    /// Files that were written here and have not gone up.
    pub unwritten: u64,
    /// Files that were written here and changed in the bucket as well, since the start.
    pub conflicts: u64,
    /// The last of them.
    pub last_conflict: Option<String>,
    /// Bytes that are being fetched, and how many of them have come; `None` where nothing is.
    pub fetching: Option<(u64, u64)>,
}

/// Counts what a mirror does.
pub trait Counters: Send + Sync {
    /// A listing, and what followed it, ended: `ok`, or a word for what went wrong.
    fn listed(&self, outcome: &'static str);
    /// An object was fetched.
    fn fetched(&self, bytes: u64);
    /// A file went up (`ok`), conflicted (`conflict`), or failed to (another word).
    fn written(&self, outcome: &'static str);
}
