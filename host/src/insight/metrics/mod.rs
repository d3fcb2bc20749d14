//! Every metric's name, and where they go. It never knows why something is counted.
//!
//! Their grammar, and what each one says, stand in `docs/metrics.md`, which a test holds against this file. Labels are bounded:
//! values are names in the configuration or the volumes, or words of this host, never what a caller sends.

mod buckets;
mod devices;
mod jobs;
mod models;
mod registrar;

use std::{
    collections::HashSet,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, RwLock};
use prometheus::{IntCounter, Registry, TextEncoder};

use self::{
    jobs::JobFamilies,
    models::ModelFamilies,
    registrar::{Forget, Registrar, families},
};
use crate::insight::{log, traces::Traces};

pub use buckets::BucketMetrics;
pub use devices::DeviceMetrics;
pub use jobs::JobMetrics;
pub use models::{ModelMetrics, RELOAD_OUTCOMES, ReloadMetrics};
pub use registrar::Described;

/// Content type of [`Metrics::render`].
pub const METRICS_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Labels of calls over gRPC that run pipelines.
pub const GRPC_INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
/// As [`GRPC_INFER`].
pub const GRPC_STREAM_INFER: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

/// The models that may have series. A counter is looked up by its model's name also for a request, a job or a message that outlives
/// the model: under this lock, so that nothing brings back a series of a model that has left this list.
type Known = Arc<RwLock<HashSet<String>>>;

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
    of_models: ModelFamilies,
    of_host: HostFamilies,
    /// Asynchronous jobs.
    pub jobs: JobMetrics,
    /// GPUs.
    pub devices: DeviceMetrics,
    /// Buckets.
    pub buckets: BucketMetrics,
    /// What of them `log_lines_dropped` has counted.
    log_lines_counted: AtomicU64,
}

families! {
    /// Of the host as a whole.
    pub struct HostFamilies {
        /// Calls by key (its name; empty where none was recognised) and outcome: `ok`, `limited`, `refused`.
        calls_by_key: counters("modalkit_key_calls_total", "calls by key and what became of them", ["key", "outcome"]);
        /// Plugin libraries that this process has opened: none is ever closed.
        libraries: gauge("modalkit_plugin_libraries", "plugin libraries opened, none is ever closed", []);
        /// Requests inside the host.
        requests_in_flight: gauge("modalkit_requests_in_flight", "requests inside the host", []);
        /// Bytes of bodies and answers inside the host.
        bytes_in_flight: gauge("modalkit_bytes_in_flight", "bytes of bodies that have come and of answers that are being written", []);
        /// Open connections.
        connections: gauge("modalkit_connections", "open connections", []);
        /// Connections beyond a limit, by what was done.
        connections_refused: counters("modalkit_connections_refused_total", "connections beyond a limit: closed at once (full, address), or answered with 503 (unavailable)", ["reason"]);
        /// Resident memory of the process.
        resident_bytes: bytes("modalkit_resident_bytes", "resident memory of the process", []);
        /// Log lines that nobody took in time.
        log_lines_dropped: counter("modalkit_log_lines_dropped_total", "log lines that standard error did not take in time", []);
    }
}

impl Deref for Metrics {
    type Target = HostFamilies;

    fn deref(&self) -> &HostFamilies {
        &self.of_host
    }
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Panics
    /// Where two metrics have the same name, which is a mistake in the tables.
    #[must_use]
    pub fn new(traces: Traces) -> Arc<Self> {
        let registrar = Registrar::default();
        let known = Known::default();
        let (of_models, of_host) = (ModelFamilies::new(&registrar), HostFamilies::new(&registrar));
        let jobs = JobMetrics::new(JobFamilies::new(&registrar), Arc::clone(&known));
        let devices = DeviceMetrics::new(&registrar);
        let buckets = BucketMetrics::new(&registrar);
        let Registrar { registry, catalogue, by_model } = registrar;
        Arc::new(Self {
            traces,
            registry,
            catalogue: catalogue.into_inner(),
            by_model: by_model.into_inner(),
            known,
            changes: Mutex::default(),
            of_models,
            of_host,
            jobs,
            devices,
            buckets,
            log_lines_counted: AtomicU64::new(0),
        })
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
            request: self.of_models.request.with_label_values(model),
            ok_sync: self.requests(name, "/predict_sync", 200),
            ok_batch: self.requests(name, "/predict_batch", 200),
            ok_async: self.requests(name, "/predict_async", 200),
            ok_infer: self.requests(name, "/v2/models/{name}/infer", 200),
            ok_grpc_infer: self.requests(name, GRPC_INFER, 200),
            ok_grpc_stream: self.requests(name, GRPC_STREAM_INFER, 200),
            ok_embedding: self.requests(name, "/v1/embeddings", 200),
            ok_completion: self.requests(name, "/v1/completions", 200),
            ok_chat: self.requests(name, "/v1/chat/completions", 200),
            ok_stream: self.requests(name, "/predict_stream", 200),
            first_event: self.of_models.first_event.with_label_values(model),
            stream: self.of_models.stream.with_label_values(model),
            streams: self.of_models.streams.with_label_values(model),
            stream_chunks: self.of_models.stream_chunks.with_label_values(model),
            streams_complete: self.of_models.streams_ended.with_label_values(&[name, "complete"]),
            streams_failed: self.of_models.streams_ended.with_label_values(&[name, "failed"]),
            streams_left: self.of_models.streams_ended.with_label_values(&[name, "left"]),
            streams_slow: self.of_models.streams_ended.with_label_values(&[name, "slow"]),
            queue_wait: self.of_models.queue_wait.with_label_values(model),
            batch_wait: self.of_models.batch_wait.with_label_values(model),
            preprocess: self.of_models.stage.with_label_values(&[name, "preprocess"]),
            predict: self.of_models.stage.with_label_values(&[name, "predict"]),
            postprocess: self.of_models.stage.with_label_values(&[name, "postprocess"]),
            batch_size: self.of_models.batch_size.with_label_values(model),
            cost: self.of_models.cost.with_label_values(model),
            padding: self.of_models.padding.with_label_values(model),
            closed_full: self.of_models.batches_closed.with_label_values(&[name, "full"]),
            closed_costly: self.of_models.batches_closed.with_label_values(&[name, "costly"]),
            closed_waited: self.of_models.batches_closed.with_label_values(&[name, "waited"]),
            closed_drained: self.of_models.batches_closed.with_label_values(&[name, "drained"]),
            closed_alone: self.of_models.batches_closed.with_label_values(&[name, "alone"]),
            reruns_alone: self.of_models.item_reruns.with_label_values(&[name, "alone"]),
            reruns_halved: self.of_models.item_reruns.with_label_values(&[name, "halved"]),
            worker_deaths: self.of_models.worker_deaths.with_label_values(model),
            workers_recycled: self.of_models.workers_recycled.with_label_values(model),
            skipped_cancelled: self.of_models.jobs_skipped.with_label_values(&[name, "cancelled"]),
            skipped_expired: self.of_models.jobs_skipped.with_label_values(&[name, "expired"]),
            failed: self.of_models.batches_failed.with_label_values(&[name, "error"]),
            panicked: self.of_models.batches_failed.with_label_values(&[name, "panic"]),
            timed_out: self.of_models.batches_failed.with_label_values(&[name, "timeout"]),
            died: self.of_models.batches_failed.with_label_values(&[name, "death"]),
            queued: self.of_models.queued.with_label_values(model),
            replicas: self.of_models.replicas.with_label_values(model),
            replicas_stuck: self.of_models.replicas_stuck.with_label_values(model),
            replicas_given_up: self.of_models.replicas_given_up.with_label_values(model),
            ready: self.of_models.ready.with_label_values(model),
        }
    }

    /// The metrics of one model's reloads.
    #[must_use]
    pub fn reloads(&self, name: &str) -> ReloadMetrics {
        ReloadMetrics {
            outcomes: RELOAD_OUTCOMES.map(|word| self.of_models.reloads.with_label_values(&[name, word])),
            hooks_ok: self.of_models.hooks.with_label_values(&[name, "ok"]),
            hooks_failed: self.of_models.hooks.with_label_values(&[name, "error"]),
            generation: self.of_models.generation.with_label_values(&[name]),
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
        self.of_models.requests.with_label_values(&[model, endpoint, status.to_string().as_str()])
    }

    /// Everything in Prometheus' text format.
    #[must_use]
    pub fn render(&self) -> String {
        self.of_host.resident_bytes.set(resident_bytes().unwrap_or_default());
        let queued = self.jobs.unended.load(Ordering::Relaxed) - self.jobs.running.get();
        self.jobs.state("queued").set(queued.max(0));
        let dropped = log::lines_dropped();
        let counted = self.log_lines_counted.fetch_max(dropped, Ordering::Relaxed);
        self.of_host.log_lines_dropped.inc_by(dropped.saturating_sub(counted));
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
    use prometheus::IntCounterVec;

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
        let late = Late { known: Arc::clone(&metrics.known), requests: metrics.of_models.requests.clone() };
        Arc::get_mut(&mut metrics).unwrap().by_model.push(Box::new(late));
        let _gone = metrics.model("gone");
        metrics.forget("gone");
        assert_eq!(lines_of(&metrics, "gone"), 0);
        assert_eq!(metrics.requests("", "/predict_sync", 503).get(), 1);
    }
}
