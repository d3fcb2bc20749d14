//! Metrics of mirrored buckets, by their volumes' names.

use std::sync::Arc;

use modalkit_bucket::{Counters, Status};
use prometheus::{IntCounter, IntCounterVec};

use super::registrar::{Registrar, families};

families! {
    struct BucketFamilies {
        listings: counters("modalkit_bucket_listings_total", "listings of a bucket with what followed them, by how they ended: ok, or why what is mirrored is behind", ["volume", "outcome"]);
        fetched_objects: counters("modalkit_bucket_fetched_objects_total", "objects fetched from a bucket", ["volume"]);
        fetched_bytes: counters("modalkit_bucket_fetched_bytes_total", "their bytes", ["volume"]);
        written: counters("modalkit_bucket_written_files_total", "files that were written below a mount: gone up (ok), kept here since the bucket has other content (conflict), or failed to go up and tried again", ["volume", "outcome"]);
        unwritten: gauges("modalkit_bucket_unwritten_files", "files that were written below a mount and have not gone up", ["volume"]);
        age: gauges("modalkit_bucket_age_seconds", "since what is shown was last seen to be what the bucket has; since the start, where it never was", ["volume"]);
        objects: gauges("modalkit_bucket_objects", "objects that are shown", ["volume"]);
        bytes: gauges("modalkit_bucket_bytes", "bytes of the objects that are shown", ["volume"]);
        snapshot: gauges("modalkit_bucket_snapshot", "the snapshot that is shown; 0: none yet", ["volume"]);
    }
}

/// Buckets, by their volumes.
pub struct BucketMetrics(BucketFamilies);

impl BucketMetrics {
    pub(super) fn new(registrar: &Registrar) -> Self {
        Self(BucketFamilies::new(registrar))
    }

    /// Counts for one mirror.
    #[must_use]
    pub fn counters(&self, volume: &str) -> Arc<dyn Counters> {
        Arc::new(Counted {
            volume: volume.to_owned(),
            listings: self.0.listings.clone(),
            written: self.0.written.clone(),
            fetched_objects: self.0.fetched_objects.with_label_values(&[volume]),
            fetched_bytes: self.0.fetched_bytes.with_label_values(&[volume]),
        })
    }

    /// Takes over how a mirror is.
    pub fn set(&self, volume: &str, status: &Status, age_seconds: u64) {
        for (gauge, value) in [
            (&self.0.unwritten, status.unwritten),
            (&self.0.age, age_seconds),
            (&self.0.objects, status.objects),
            (&self.0.bytes, status.bytes),
            (&self.0.snapshot, status.snapshot),
        ] {
            gauge.with_label_values(&[volume]).set(i64::try_from(value).unwrap_or(i64::MAX));
        }
    }
}

struct Counted {
    volume: String,
    listings: IntCounterVec,
    written: IntCounterVec,
    fetched_objects: IntCounter,
    fetched_bytes: IntCounter,
}

impl Counters for Counted {
    fn listed(&self, outcome: &'static str) {
        self.listings.with_label_values(&[self.volume.as_str(), outcome]).inc();
    }

    fn fetched(&self, bytes: u64) {
        self.fetched_objects.inc();
        self.fetched_bytes.inc_by(bytes);
    }

    fn written(&self, outcome: &'static str) {
        self.written.with_label_values(&[self.volume.as_str(), outcome]).inc();
    }
}
