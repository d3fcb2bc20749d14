//! Every metric's name, and where they go. It never knows why something is counted.
//!
//! Their grammar, and what each one says, stand in `docs/metrics.md`, which a test holds against this file. Labels are bounded:
//! values are names in the configuration or the volumes, or words of this host, never what a caller sends.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use modalkit_device::Standing;
use parking_lot::{Mutex, RwLock};
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
    core::{Collector, MetricVec, MetricVecBuilder},
    exponential_buckets,
};

use crate::{log, traces::Traces};

/// Content type of [`Metrics::render`].
pub const METRICS_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics of the host, in a registry of their own.
pub struct Metrics {
    /// Where spans go.
    pub traces: Traces,
    registry: Registry,
    catalogue: Vec<Described>,
    /// All that have the label `model`.
    by_model: Vec<Box<dyn Forget>>,
    known: Known,
    /// Held while a model's series come or go, so that nobody takes those of one that comes for those of its namesake that went.
    changes: Mutex<()>,
    request: HistogramVec,
    requests: IntCounterVec,
    queue_wait: HistogramVec,
    batch_wait: HistogramVec,
    stage: HistogramVec,
    batch_size: HistogramVec,
    batches_closed: IntCounterVec,
    jobs_skipped: IntCounterVec,
    batches_failed: IntCounterVec,
    queued: IntGaugeVec,
    replicas: IntGaugeVec,
    replicas_stuck: IntGaugeVec,
    replicas_given_up: IntCounterVec,
    ready: IntGaugeVec,
    reloads: IntCounterVec,
    hooks: IntCounterVec,
    generation: IntGaugeVec,
    /// Calls by key (its name; empty where none was recognised) and outcome: `ok`, `limited`, `refused`.
    pub calls_by_key: IntCounterVec,
    /// Plugin libraries that this process has opened: none is ever closed.
    pub libraries: IntGauge,
    /// Requests inside the host.
    pub requests_in_flight: IntGauge,
    /// Bytes of bodies and answers inside the host.
    pub bytes_in_flight: IntGauge,
    /// Open connections.
    pub connections: IntGauge,
    /// Connections that were closed at once, because all places were taken (`full`) or all of their address (`address`).
    pub connections_refused: IntCounterVec,
    /// Asynchronous jobs.
    pub jobs: JobMetrics,
    /// GPUs.
    pub devices: DeviceMetrics,
    /// Resident memory of the process.
    pub resident_bytes: Gauge,
    log_lines_dropped: IntCounter,
    /// What of them `log_lines_dropped` has counted.
    log_lines_counted: AtomicU64,
}

/// The models that may have series. A counter is looked up by its model's name also for a request, a job or a message that outlives
/// the model: under this lock, so that nothing brings back a series of a model that has left this list.
type Known = Arc<RwLock<HashSet<String>>>;

/// A vector of series of any kind.
trait Forget: Send + Sync {
    /// Removes the series with this value of `model`. Who holds one may go on counting; nobody sees it.
    fn forget(&self, model: &str);
}

impl<T: MetricVecBuilder> Forget for MetricVec<T> {
    fn forget(&self, model: &str) {
        for family in self.collect() {
            for series in family.get_metric() {
                let labels: HashMap<&str, &str> =
                    series.get_label().iter().map(|label| (label.name(), label.value())).collect();
                if labels.get("model") == Some(&model) {
                    // Only this function removes any.
                    let _ = self.remove(&labels);
                }
            }
        }
    }
}

/// The words that [`ReloadMetrics::outcome`] knows.
pub const RELOAD_OUTCOMES: [&str; 5] = ["swapped", "rolled_back", "refused", "superseded", "stopped"];

/// GPUs, by their number and name.
pub struct DeviceMetrics {
    memory_total: IntGaugeVec,
    memory_free: IntGaugeVec,
    memory_leased: IntGaugeVec,
    utilization: IntGaugeVec,
    leases: IntGaugeVec,
    lost: IntGaugeVec,
}

impl DeviceMetrics {
    /// Takes over how a device stands.
    pub fn set(&self, standing: &Standing<'_>) {
        let ordinal = standing.device.ordinal.to_string();
        let device = [ordinal.as_str(), standing.device.name.as_str()];
        let set = |gauge: &IntGaugeVec, value: u64| {
            gauge.with_label_values(&device).set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set(&self.memory_total, standing.device.memory_bytes);
        set(&self.memory_leased, standing.leased_mb << 20);
        set(&self.leases, standing.holders.len() as u64);
        set(&self.lost, u64::from(standing.lost.is_some()));
        let usage = standing.usage.as_ref();
        for (gauge, value) in [
            (&self.memory_free, usage.map(|usage| usage.memory_free_bytes)),
            (&self.utilization, usage.and_then(|usage| usage.utilization_percent).map(u64::from)),
        ] {
            match value {
                Some(value) => set(gauge, value),
                // What isn't known any more isn't shown; there may have been none.
                None => drop(gauge.remove_label_values(&device)),
            }
        }
    }
}

/// Asynchronous jobs, their journal and their deliveries.
pub struct JobMetrics {
    known: Known,
    /// Jobs in the journal, by state.
    states: IntGaugeVec,
    /// Those of them that haven't ended.
    pub unended: AtomicI64,
    /// Those of them whose batch runs.
    pub running: IntGauge,
    /// Their messages, by where they stand.
    deliveries: IntGaugeVec,
    ended: IntCounterVec,
    delivered: IntCounterVec,
    consumed: IntCounterVec,
    /// From acceptance to the end, seconds.
    pub seconds: Histogram,
    /// From a group's first change to the end of its sync, seconds.
    pub commit: Histogram,
    /// Changes in a group.
    pub commit_changes: Histogram,
    /// Bytes that jobs take up in the journal.
    pub journal_bytes: IntGauge,
    /// 1 while the journal can be written.
    pub journal_writable: IntGauge,
}

impl JobMetrics {
    /// The gauge of jobs in this state.
    #[must_use]
    pub fn state(&self, word: &str) -> IntGauge {
        self.states.with_label_values(&[word])
    }

    /// The gauge of messages that stand so.
    #[must_use]
    pub fn delivery(&self, word: &str) -> IntGauge {
        self.deliveries.with_label_values(&[word])
    }

    /// The counter of a model's jobs that ended so; of a model that isn't served, the one of all such models.
    #[must_use]
    pub fn ended(&self, model: &str, state: &str) -> IntCounter {
        let known = self.known.read();
        self.ended.with_label_values(&[if known.contains(model) { model } else { "" }, state])
    }

    /// The counter of tries to deliver through a backend that ended so.
    #[must_use]
    pub fn delivered(&self, backend: &str, outcome: &str) -> IntCounter {
        self.delivered.with_label_values(&[backend, outcome])
    }

    /// The counter of messages that were taken for a model and ended so; for one that isn't served, the one of all such models.
    #[must_use]
    pub fn consumed(&self, model: &str, outcome: &str) -> IntCounter {
        let known = self.known.read();
        self.consumed.with_label_values(&[if known.contains(model) { model } else { "" }, outcome])
    }
}

/// What a metric is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// Its name.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// What it says.
    pub help: &'static str,
    /// Its labels.
    pub labels: Vec<&'static str>,
}

/// One model's metrics, looked up once.
pub struct ModelMetrics {
    /// Where spans go.
    pub traces: Traces,
    /// From a request's headers to its answer, seconds.
    pub request: Histogram,
    /// Requests to `/predict_sync` answered with 200.
    pub ok_sync: IntCounter,
    /// Requests to `/predict_batch` answered with 200.
    pub ok_batch: IntCounter,
    /// Requests to `/predict_async` answered with 200.
    pub ok_async: IntCounter,
    /// From a job's arrival to its batch, seconds.
    pub queue_wait: Histogram,
    /// How long a batch waited to be filled while a replica was free, seconds.
    pub batch_wait: Histogram,
    /// Seconds in `preprocess`.
    pub preprocess: Histogram,
    /// Seconds in `predict`.
    pub predict: Histogram,
    /// Seconds in `postprocess`.
    pub postprocess: Histogram,
    /// Items in a batch.
    pub batch_size: Histogram,
    /// Batches closed because they were full.
    pub closed_full: IntCounter,
    /// Batches closed because `wait_ms` had passed.
    pub closed_waited: IntCounter,
    /// Batches closed because no more jobs would come.
    pub closed_drained: IntCounter,
    /// Jobs dropped before they took a slot because the caller had left.
    pub skipped_cancelled: IntCounter,
    /// Jobs dropped before they took a slot because the deadline had passed.
    pub skipped_expired: IntCounter,
    /// Batches that failed whole in a stage.
    pub failed: IntCounter,
    /// Batches that failed because the plugin panicked.
    pub panicked: IntCounter,
    /// Batches that overran `batch_timeout_seconds`.
    pub timed_out: IntCounter,
    /// Jobs that wait.
    pub queued: IntGauge,
    /// Replicas that serve.
    pub replicas: IntGauge,
    /// Replicas that were given up and whose threads haven't come back.
    pub replicas_stuck: IntGauge,
    /// Replicas that were given up, ever.
    pub replicas_given_up: IntCounter,
    /// 1 while the model serves.
    pub ready: IntGauge,
}

/// One model's reloads.
pub struct ReloadMetrics {
    outcomes: [IntCounter; RELOAD_OUTCOMES.len()],
    /// Calls of `on_volume_reload` that went well on every replica.
    pub hooks_ok: IntCounter,
    /// Calls of `on_volume_reload` that failed on some replica.
    pub hooks_failed: IntCounter,
    /// The number of the generation that serves.
    pub generation: IntGauge,
}

impl ReloadMetrics {
    /// The counter of changes that ended so.
    ///
    /// # Panics
    /// Where the word is none of [`RELOAD_OUTCOMES`].
    #[must_use]
    pub fn outcome(&self, word: &str) -> &IntCounter {
        let known = RELOAD_OUTCOMES.iter().position(|known| *known == word);
        &self.outcomes[known.expect("a word of RELOAD_OUTCOMES")]
    }
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Panics
    /// Where two metrics have the same name, which is a mistake in this file.
    #[must_use]
    pub fn new(traces: Traces) -> Arc<Self> {
        let registry = Registry::new();
        let catalogue = RefCell::new(Vec::new());
        let by_model: RefCell<Vec<Box<dyn Forget>>> = RefCell::default();
        let known = Known::default();
        let describe = |name: &'static str, kind, help: &'static str, labels: &[&'static str]| {
            catalogue.borrow_mut().push(Described { name, kind, help, labels: labels.to_vec() });
        };
        // 10 µs to 80 s.
        let seconds = exponential_buckets(0.000_01, 2.5, 18).expect("constant buckets");
        let sizes = exponential_buckets(1.0, 2.0, 11).expect("constant buckets");
        let counter = |name, help, labels: &[&'static str]| {
            describe(name, "counter", help, labels);
            let vec = IntCounterVec::new(Opts::new(name, help), labels).expect("constant names");
            registry.register(Box::new(vec.clone())).expect("names are unique");
            if labels.contains(&"model") {
                by_model.borrow_mut().push(Box::new(vec.clone()));
            }
            vec
        };
        let histogram = |name, help, labels: &[&'static str], buckets: &[f64]| {
            describe(name, "histogram", help, labels);
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let vec = HistogramVec::new(options, labels).expect("constant names");
            registry.register(Box::new(vec.clone())).expect("names are unique");
            if labels.contains(&"model") {
                by_model.borrow_mut().push(Box::new(vec.clone()));
            }
            vec
        };
        let gauges_by = |name, help, labels: &[&'static str]| {
            describe(name, "gauge", help, labels);
            let vec = IntGaugeVec::new(Opts::new(name, help), labels).expect("constant names");
            registry.register(Box::new(vec.clone())).expect("names are unique");
            if labels.contains(&"model") {
                by_model.borrow_mut().push(Box::new(vec.clone()));
            }
            vec
        };
        let gauges = |name, help| gauges_by(name, help, &["model"]);
        let gauge = |name, help| {
            describe(name, "gauge", help, &[]);
            let gauge = IntGauge::new(name, help).expect("constant names");
            registry.register(Box::new(gauge.clone())).expect("names are unique");
            gauge
        };
        let (name, help) = ("modalkit_resident_bytes", "resident memory of the process");
        describe(name, "gauge", help, &[]);
        let resident_bytes = Gauge::new(name, help).expect("constant names");
        registry.register(Box::new(resident_bytes.clone())).expect("names are unique");
        let job_states = gauges_by("modalkit_jobs", "asynchronous jobs in the journal", &["state"]);
        let metrics = Self {
            traces,
            request: histogram(
                "modalkit_request_seconds",
                "from a request's headers to its answer",
                &["model"],
                &seconds,
            ),
            requests: counter(
                "modalkit_requests_total",
                "requests answered",
                &["model", "endpoint", "status"],
            ),
            queue_wait: histogram(
                "modalkit_queue_wait_seconds",
                "from a job's arrival to its batch",
                &["model"],
                &seconds,
            ),
            batch_wait: histogram(
                "modalkit_batch_wait_seconds",
                "how long a batch waited to be filled while a replica was free",
                &["model"],
                &seconds,
            ),
            stage: histogram(
                "modalkit_stage_seconds",
                "a batch's time in one stage",
                &["model", "stage"],
                &seconds,
            ),
            batch_size: histogram("modalkit_batch_size_items", "items in a batch", &["model"], &sizes),
            batches_closed: counter(
                "modalkit_batches_closed_total",
                "batches by why they closed",
                &["model", "reason"],
            ),
            jobs_skipped: counter(
                "modalkit_jobs_skipped_total",
                "jobs dropped before they took a slot",
                &["model", "reason"],
            ),
            batches_failed: counter(
                "modalkit_batches_failed_total",
                "batches that failed whole",
                &["model", "reason"],
            ),
            queued: gauges("modalkit_queued_jobs", "jobs that wait"),
            replicas: gauges("modalkit_replicas", "replicas that serve"),
            replicas_stuck: gauges(
                "modalkit_replicas_stuck",
                "given-up replicas whose threads have not come back",
            ),
            replicas_given_up: counter(
                "modalkit_replicas_given_up_total",
                "replicas given up after batch_timeout_seconds",
                &["model"],
            ),
            ready: gauges("modalkit_model_ready", "1 while the model serves"),
            reloads: counter(
                "modalkit_reloads_total",
                "changes of a model's plugin by how they ended",
                &["model", "outcome"],
            ),
            hooks: counter(
                "modalkit_volume_hooks_total",
                "calls of on_volume_reload by how they ended",
                &["model", "outcome"],
            ),
            generation: gauges("modalkit_generation", "the generation that serves"),
            calls_by_key: counter(
                "modalkit_key_calls_total",
                "calls by key and what became of them",
                &["key", "outcome"],
            ),
            libraries: gauge("modalkit_plugin_libraries", "plugin libraries opened, none is ever closed"),
            requests_in_flight: gauge("modalkit_requests_in_flight", "requests inside the host"),
            bytes_in_flight: gauge(
                "modalkit_bytes_in_flight",
                "bytes of bodies that have come and of answers that are being written",
            ),
            connections: gauge("modalkit_connections", "open connections"),
            connections_refused: counter(
                "modalkit_connections_refused_total",
                "connections beyond a limit: closed at once (full, address), or answered with 503 (unavailable)",
                &["reason"],
            ),
            jobs: JobMetrics {
                known: Arc::clone(&known),
                running: job_states.with_label_values(&["running"]),
                states: job_states,
                unended: AtomicI64::new(0),
                deliveries: gauges_by(
                    "modalkit_job_deliveries",
                    "their results on the way to queues",
                    &["state"],
                ),
                ended: counter(
                    "modalkit_jobs_ended_total",
                    "asynchronous jobs that ended",
                    &["model", "state"],
                ),
                delivered: counter(
                    "modalkit_deliveries_total",
                    "tries to deliver a result: delivered, held in memory until it is taken, failed and tried again, or dead",
                    &["backend", "outcome"],
                ),
                consumed: counter(
                    "modalkit_consumed_total",
                    "requests taken from queues",
                    &["model", "outcome"],
                ),
                seconds: histogram(
                    "modalkit_job_seconds",
                    "from a job's acceptance to its end",
                    &[],
                    &seconds,
                )
                .with_label_values::<&str>(&[]),
                commit: histogram(
                    "modalkit_journal_commit_seconds",
                    "one group of changes, until it is synced",
                    &[],
                    &seconds,
                )
                .with_label_values::<&str>(&[]),
                commit_changes: histogram(
                    "modalkit_journal_commit_items",
                    "changes that share one sync",
                    &[],
                    &sizes,
                )
                .with_label_values::<&str>(&[]),
                journal_bytes: gauge("modalkit_journal_bytes", "bytes that jobs take up in the journal"),
                journal_writable: gauge(
                    "modalkit_journal_writable",
                    "1 while jobs can be written to the journal",
                ),
            },
            devices: DeviceMetrics {
                memory_total: gauges_by(
                    "modalkit_device_memory_bytes",
                    "all of a device's memory",
                    &["device", "name"],
                ),
                memory_free: gauges_by(
                    "modalkit_device_memory_free_bytes",
                    "what no process uses of it",
                    &["device", "name"],
                ),
                memory_leased: gauges_by(
                    "modalkit_device_memory_leased_bytes",
                    "what replicas of this host may use of it",
                    &["device", "name"],
                ),
                utilization: gauges_by(
                    "modalkit_device_utilization_percent",
                    "the share of the last moments in which it ran something",
                    &["device", "name"],
                ),
                leases: gauges_by(
                    "modalkit_device_holders",
                    "replicas of this host that hold it",
                    &["device", "name"],
                ),
                lost: gauges_by("modalkit_device_lost", "1 once it has failed for good", &["device", "name"]),
            },
            resident_bytes,
            log_lines_dropped: counter(
                "modalkit_log_lines_dropped_total",
                "log lines that standard error did not take in time",
                &[],
            )
            .with_label_values::<&str>(&[]),
            log_lines_counted: AtomicU64::new(0),
            registry,
            catalogue: Vec::new(),
            by_model: Vec::new(),
            known,
            changes: Mutex::default(),
        };
        let (catalogue, by_model) = (catalogue.into_inner(), by_model.into_inner());
        Arc::new(Self { catalogue, by_model, ..metrics })
    }

    /// Every metric there is, whether or not it has a value yet.
    #[must_use]
    pub fn catalogue(&self) -> &[Described] {
        &self.catalogue
    }

    /// The metrics of one model, which has series from now on.
    #[must_use]
    pub fn model(&self, name: &str) -> ModelMetrics {
        let _nobody_forgets = self.changes.lock();
        self.known.write().insert(name.to_owned());
        let model = &[name];
        ModelMetrics {
            traces: self.traces.clone(),
            request: self.request.with_label_values(model),
            ok_sync: self.requests(name, "/predict_sync", 200),
            ok_batch: self.requests(name, "/predict_batch", 200),
            ok_async: self.requests(name, "/predict_async", 200),
            queue_wait: self.queue_wait.with_label_values(model),
            batch_wait: self.batch_wait.with_label_values(model),
            preprocess: self.stage.with_label_values(&[name, "preprocess"]),
            predict: self.stage.with_label_values(&[name, "predict"]),
            postprocess: self.stage.with_label_values(&[name, "postprocess"]),
            batch_size: self.batch_size.with_label_values(model),
            closed_full: self.batches_closed.with_label_values(&[name, "full"]),
            closed_waited: self.batches_closed.with_label_values(&[name, "waited"]),
            closed_drained: self.batches_closed.with_label_values(&[name, "drained"]),
            skipped_cancelled: self.jobs_skipped.with_label_values(&[name, "cancelled"]),
            skipped_expired: self.jobs_skipped.with_label_values(&[name, "expired"]),
            failed: self.batches_failed.with_label_values(&[name, "error"]),
            panicked: self.batches_failed.with_label_values(&[name, "panic"]),
            timed_out: self.batches_failed.with_label_values(&[name, "timeout"]),
            queued: self.queued.with_label_values(model),
            replicas: self.replicas.with_label_values(model),
            replicas_stuck: self.replicas_stuck.with_label_values(model),
            replicas_given_up: self.replicas_given_up.with_label_values(model),
            ready: self.ready.with_label_values(model),
        }
    }

    /// The metrics of one model's reloads.
    #[must_use]
    pub fn reloads(&self, name: &str) -> ReloadMetrics {
        ReloadMetrics {
            outcomes: RELOAD_OUTCOMES.map(|word| self.reloads.with_label_values(&[name, word])),
            hooks_ok: self.hooks.with_label_values(&[name, "ok"]),
            hooks_failed: self.hooks.with_label_values(&[name, "error"]),
            generation: self.generation.with_label_values(&[name]),
        }
    }

    /// Removes every series of a model that is gone. Until there is a model of this name again, what is counted by name counts as if
    /// none had been named; who looked its metrics up before counts for nobody.
    pub fn forget(&self, model: &str) {
        let _no_namesake = self.changes.lock();
        // Only this under its lock, on which callers wait. Nobody brings a series of this name back from here on, so that the walk
        // over all series finds every one that there is.
        self.known.write().remove(model);
        self.by_model.iter().for_each(|series| series.forget(model));
    }

    /// The counter of one kind of answer. `model` is empty where a request named none that is served.
    #[must_use]
    pub fn requests(&self, model: &str, endpoint: &str, status: u16) -> IntCounter {
        let known = self.known.read();
        let model = if known.contains(model) { model } else { "" };
        self.requests.with_label_values(&[model, endpoint, status.to_string().as_str()])
    }

    /// Everything in Prometheus' text format.
    #[must_use]
    pub fn render(&self) -> String {
        self.resident_bytes.set(resident_bytes().unwrap_or_default());
        let queued = self.jobs.unended.load(Ordering::Relaxed) - self.jobs.running.get();
        self.jobs.state("queued").set(queued.max(0));
        let dropped = log::lines_dropped();
        let counted = self.log_lines_counted.fetch_max(dropped, Ordering::Relaxed);
        self.log_lines_dropped.inc_by(dropped.saturating_sub(counted));
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

fn resident_bytes() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines_of(metrics: &Metrics, model: &str) -> usize {
        let label = format!("model=\"{model}\"");
        metrics.render().lines().filter(|line| line.contains(&label)).count()
    }

    #[test]
    fn a_model_that_is_gone_leaves_no_series_and_nothing_brings_one_back() {
        let metrics = Metrics::new(Traces::default());
        let (gone, kept) = (metrics.model("gone"), metrics.model("kept"));
        let reloads = metrics.reloads("gone");
        metrics.requests("gone", "/predict_sync", 503).inc();
        metrics.jobs.ended("gone", "failed").inc();
        metrics.jobs.consumed("gone", "accepted").inc();
        let others = lines_of(&metrics, "kept");
        assert!(lines_of(&metrics, "gone") > others && others > 100);
        metrics.forget("gone");
        assert_eq!((lines_of(&metrics, "gone"), lines_of(&metrics, "kept")), (0, others));
        // Who is late.
        gone.ready.set(1);
        gone.ok_sync.inc();
        reloads.outcome("stopped").inc();
        reloads.generation.set(3);
        metrics.requests("gone", "/predict_sync", 503).inc();
        metrics.jobs.ended("gone", "failed").inc();
        metrics.jobs.consumed("gone", "accepted").inc();
        assert_eq!(lines_of(&metrics, "gone"), 0);
        assert_eq!(metrics.jobs.consumed("", "accepted").get(), 1);
        assert_eq!(metrics.requests("", "/predict_sync", 503).get(), 1);
        // One of that name again counts from the start, whatever the one before still counts.
        let again = metrics.model("gone");
        again.ready.set(1);
        gone.ready.set(0);
        gone.ok_sync.inc();
        assert_eq!((again.ready.get(), again.ok_sync.get()), (1, 0));
        metrics.requests("gone", "/predict_sync", 503).inc();
        assert_eq!(metrics.requests("gone", "/predict_sync", 503).get(), 1);
        kept.ok_sync.inc();
        assert_eq!(metrics.model("kept").ok_sync.get(), 1);
    }
    /// Stands among the vectors of series, and counts for the model while it is forgotten.
    struct Late {
        known: Known,
        requests: IntCounterVec,
    }

    impl Forget for Late {
        fn forget(&self, model: &str) {
            let known = self.known.try_read().expect("no lock that callers wait on is held");
            let model = if known.contains(model) { model } else { "" };
            self.requests.with_label_values(&[model, "/predict_sync", "503"]).inc();
        }
    }

    #[test]
    fn callers_do_not_wait_while_a_model_is_forgotten_and_bring_nothing_back() {
        let mut metrics = Metrics::new(Traces::default());
        let late = Late { known: Arc::clone(&metrics.known), requests: metrics.requests.clone() };
        Arc::get_mut(&mut metrics).unwrap().by_model.push(Box::new(late));
        let _gone = metrics.model("gone");
        metrics.forget("gone");
        assert_eq!(lines_of(&metrics, "gone"), 0);
        assert_eq!(metrics.requests("", "/predict_sync", 503).get(), 1);
    }
}
