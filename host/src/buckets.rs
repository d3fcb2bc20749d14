//! The mirrors of buckets that the configuration names: started, stopped, and how each is. It never knows which models use one.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use modalkit_bucket::{MirrorError, Mirrors, Status};
use serde::Serialize;
use tokio::sync::watch;

use crate::{
    config::{Bucket, Volume},
    insight::metrics::Metrics,
};

/// Starts a mirror for each volume that a bucket is mirrored into.
///
/// # Errors
/// A mirror's folder or its mount point can't be used.
pub fn start(
    volumes: &[Volume],
    metrics: &Metrics,
    on_thread_start: impl Fn() + Send + Sync + 'static,
) -> Result<(Mirrors, Arc<Buckets>), MirrorError> {
    let buckets = volumes.iter().filter_map(|volume| volume.bucket.as_deref());
    let with_counters = |bucket: &Bucket| {
        (bucket.spec.clone(), bucket.credentials(), metrics.buckets.counters(&bucket.spec.name))
    };
    let mirrors = Mirrors::start(buckets.map(with_counters).collect(), on_thread_start)?;
    let statuses = mirrors.all().iter().map(|mirror| (mirror.name.clone(), mirror.status())).collect();
    Ok((mirrors, Arc::new(Buckets { statuses, begun: Instant::now() })))
}

/// How the mirrors are.
pub struct Buckets {
    statuses: BTreeMap<String, watch::Receiver<Status>>,
    begun: Instant,
}

/// How a mirror is, for people.
#[derive(Serialize)]
pub struct Shown {
    /// The snapshot that is shown; 0: none yet.
    snapshot: u64,
    objects: u64,
    bytes: u64,
    /// Since it was last seen to be what the bucket has; since the start of the host, where it never was.
    age_seconds: u64,
    /// What is being fetched.
    #[serde(skip_serializing_if = "Option::is_none")]
    fetching: Option<Fetching>,
    /// Why it is behind.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    /// The same in words, for those who may know.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    unwritten_files: u64,
    conflicts: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_conflict: Option<String>,
}

#[derive(Serialize)]
struct Fetching {
    bytes: u64,
    of_bytes: u64,
}

impl Buckets {
    /// Of a host without any.
    #[must_use]
    pub fn none() -> Arc<Self> {
        Arc::new(Self { statuses: BTreeMap::new(), begun: Instant::now() })
    }

    /// Whether every mirror shows what its bucket had when it was last listed.
    #[must_use]
    pub fn are_current(&self) -> bool {
        self.statuses.values().all(|status| {
            let status = status.borrow();
            status.error.is_none() && status.snapshot > 0
        })
    }

    /// How each is; with `reasons`, in the store's words.
    #[must_use]
    pub fn shown(&self, reasons: bool) -> BTreeMap<&str, Shown> {
        let shown = |status: &watch::Receiver<Status>| {
            let status = status.borrow();
            Shown {
                snapshot: status.snapshot,
                objects: status.objects,
                bytes: status.bytes,
                age_seconds: self.age(&status).as_secs(),
                fetching: status.fetching.map(|(of_bytes, bytes)| Fetching { bytes, of_bytes }),
                reason: status.error.as_ref().map(|(reason, _)| *reason),
                error: status.error.as_ref().map(|(_, said)| said.clone()).filter(|_| reasons),
                unwritten_files: status.unwritten,
                conflicts: status.conflicts,
                last_conflict: status.last_conflict.clone().filter(|_| reasons),
            }
        };
        self.statuses.iter().map(|(name, status)| (name.as_str(), shown(status))).collect()
    }

    /// Takes over how they are into metrics.
    pub fn measure(&self, metrics: &Metrics) {
        for (name, status) in &self.statuses {
            let status = status.borrow();
            metrics.buckets.set(name, &status, self.age(&status).as_secs());
        }
    }

    fn age(&self, status: &Status) -> Duration {
        status.confirmed.unwrap_or(self.begun).elapsed()
    }
}
