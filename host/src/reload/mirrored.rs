//! Volumes that are mirrored from buckets, as the watches meet them: a scan sees one snapshot whole, the first scan waits for the first mirror,
//! and each further snapshot is scanned at once. It never knows what a bucket is.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use modalkit_bucket::{Mirror, Mirrors, Status, SyncHandle};
use tokio::sync::watch;

use super::watch::{Snapshots, WatchHandle};
use crate::config::Volume;

/// A mirrored volume's mirror, as the reload loop meets it.
pub(super) struct Mirrored {
    pub(super) snapshots: Snapshots,
    /// Asks for a listing.
    pub(super) sync: SyncHandle,
    status: watch::Receiver<Status>,
}

impl Mirrored {
    /// The mirror of a volume, where it has one.
    pub(super) fn of(volume: &Volume, mirrors: &Mirrors) -> Option<Self> {
        let named = |mirror: &&Mirror| mirror.name == volume.name;
        let mirror = volume.bucket.as_ref().and_then(|_| mirrors.all().iter().find(named))?;
        Some(Self {
            snapshots: Snapshots::new(mirror.shown()),
            sync: mirror.handle(),
            status: mirror.status(),
        })
    }

    /// Opens the first scan when there is something to scan, or `wait` is over, and has each further snapshot scanned.
    pub(super) async fn follow(
        mut self,
        volume: String,
        wait: Duration,
        watch: Arc<[WatchHandle]>,
        index: usize,
    ) {
        let watch = &watch[index];
        match tokio::time::timeout(wait, self.status.wait_for(is_usable)).await {
            Ok(_) => {}
            Err(_) => tracing::warn!(
                volume,
                "the bucket was not mirrored within server.bucket_wait_seconds; models that use it are loaded with what is there"
            ),
        }
        self.snapshots.ready.store(true, Ordering::Release);
        let mut shown = self.status.borrow_and_update().snapshot;
        // What is mirrored is whole: it needn't hold still.
        watch.request_scan();
        while self.status.changed().await.is_ok() {
            let now = self.status.borrow_and_update().snapshot;
            if std::mem::replace(&mut shown, now) != now {
                watch.request_scan();
            }
        }
    }
}

/// Whether there is something to serve from: what the bucket has, or else what an earlier process mirrored.
fn is_usable(status: &Status) -> bool {
    status.confirmed.is_some() || status.snapshot > 0 && status.error.is_some()
}
