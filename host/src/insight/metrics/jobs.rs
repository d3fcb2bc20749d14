//! Metrics of asynchronous jobs, their journal and their deliveries.

use std::{ops::Deref, sync::atomic::AtomicI64};

use prometheus::{IntCounter, IntGauge};

use super::{Known, registrar::families};

families! {
    /// Of asynchronous jobs.
    pub struct JobFamilies {
        /// Jobs in the journal, by state.
        states: gauges("modalkit_jobs", "asynchronous jobs in the journal", ["state"]);
        /// Their messages, by where they stand.
        deliveries: gauges("modalkit_job_deliveries", "their results on the way to queues", ["state"]);
        /// Jobs that ended.
        ended: counters("modalkit_jobs_ended_total", "asynchronous jobs that ended", ["model", "state"]);
        /// Tries to deliver.
        delivered: counters("modalkit_deliveries_total", "tries to deliver a result: delivered, held in memory until it is taken, failed and tried again, or dead", ["backend", "outcome"]);
        /// Messages taken.
        consumed: counters("modalkit_consumed_total", "requests taken from queues", ["model", "outcome"]);
        /// From acceptance to the end, seconds.
        seconds: second("modalkit_job_seconds", "from a job's acceptance to its end", []);
        /// From a group's first change to the end of its sync, seconds.
        commit: second("modalkit_journal_commit_seconds", "one group of changes, until it is synced", []);
        /// Changes in a group.
        commit_changes: item("modalkit_journal_commit_items", "changes that share one sync", []);
        /// Bytes that jobs take up in the journal.
        journal_bytes: gauge("modalkit_journal_bytes", "bytes that jobs take up in the journal", []);
        /// 1 while the journal can be written.
        journal_writable: gauge("modalkit_journal_writable", "1 while jobs can be written to the journal", []);
    }
}

/// Asynchronous jobs, their journal and their deliveries.
pub struct JobMetrics {
    known: Known,
    families: JobFamilies,
    /// Jobs that haven't ended.
    pub unended: AtomicI64,
    /// Those of them whose batch runs.
    pub running: IntGauge,
}

impl Deref for JobMetrics {
    type Target = JobFamilies;

    fn deref(&self) -> &JobFamilies {
        &self.families
    }
}

impl JobMetrics {
    pub(super) fn new(families: JobFamilies, known: Known) -> Self {
        let running = families.states.with_label_values(&["running"]);
        Self { known, families, unended: AtomicI64::new(0), running }
    }

    /// The gauge of jobs in this state.
    #[must_use]
    pub fn state(&self, word: &str) -> IntGauge {
        self.families.states.with_label_values(&[word])
    }

    /// The gauge of messages that stand so.
    #[must_use]
    pub fn delivery(&self, word: &str) -> IntGauge {
        self.families.deliveries.with_label_values(&[word])
    }

    /// The counter of a model's jobs that ended so; of a model that isn't served, the one of all such models.
    #[must_use]
    pub fn ended(&self, model: &str, state: &str) -> IntCounter {
        let known = self.known.read();
        self.families.ended.with_label_values(&[if known.contains(model) { model } else { "" }, state])
    }

    /// The counter of tries to deliver through a backend that ended so.
    #[must_use]
    pub fn delivered(&self, backend: &str, outcome: &str) -> IntCounter {
        self.families.delivered.with_label_values(&[backend, outcome])
    }

    /// The counter of messages that were taken for a model and ended so; for one that isn't served, the one of all such models.
    #[must_use]
    pub fn consumed(&self, model: &str, outcome: &str) -> IntCounter {
        let known = self.known.read();
        self.families.consumed.with_label_values(&[if known.contains(model) { model } else { "" }, outcome])
    }
}
