//! What the configuration means: every value present, in its unit and within its range. It knows nothing of how it was
//! written.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

/// The whole configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// What only the host cares about.
    pub server: Server,
    /// Watched folders.
    pub volumes: Vec<Volume>,
    /// The models with an entry of their own, by name.
    pub models: BTreeMap<String, ModelSpec>,
    /// What a plugin without an entry is served with; [`ModelSpec::named`] gives it its name.
    pub defaults: ModelSpec,
    /// Requests in flight per listener.
    pub requests_max: usize,
    /// Known keys that were written and have no effect in this version.
    pub without_effect: Vec<String>,
}

/// `server`.
#[derive(Clone, Debug)]
pub struct Server {
    /// Where HTTP is served.
    pub listen: SocketAddr,
    /// Threads that serve connections.
    pub io_threads: usize,
    /// Open connections; further ones wait in the kernel's backlog.
    pub connections_max: usize,
    /// From the first byte a connection could send to the end of its request's headers.
    pub header_timeout: Duration,
    /// From the end of the headers to the end of the body.
    pub body_timeout: Duration,
    /// Bytes of a request's body.
    pub body_bytes_max: usize,
    /// Bodies up to this are parsed on the runtime's threads, larger ones on a bounded pool.
    pub decode_inline_bytes_max: usize,
    /// A request's deadline where it sets none.
    pub request_timeout: Duration,
    /// The latest deadline a request may set.
    pub request_timeout_max: Duration,
    /// How long a shutdown waits for what was admitted.
    pub drain_timeout: Duration,
    /// How long a plugin may take to open in the preflight process.
    pub preflight_timeout: Duration,
    /// How long a file must hold still before it counts as written, unless its writer has closed or renamed it.
    pub settle: Duration,
    /// How long a library that ends before its own section table may hold still until it is refused as truncated.
    pub settle_timeout: Duration,
    /// How often a volume that is polled is looked through.
    pub poll_interval: Duration,
    /// Plugin libraries that this process opens in its life: none can be closed.
    pub generations_max: usize,
    /// Whether plugins of any owner are taken.
    pub plugins_of_any_owner: bool,
    /// Whether plugins are taken that the group or everybody may write.
    pub plugins_of_any_mode: bool,
    /// Asynchronous jobs that are remembered, finished ones included.
    pub jobs_max: usize,
    /// Log levels: `info`, or `info,modalkit=debug`.
    pub log: String,
}

/// A watched folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its name in logs and metrics.
    pub name: String,
    /// Where it lies.
    pub mount_point: PathBuf,
    /// How changes in it are noticed.
    pub watch: Watching,
}

/// How changes in a volume are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watching {
    /// By what suits its file system: events on local ones, both on others.
    Fitting,
    /// By the kernel's events.
    Native,
    /// By looking every `poll_interval`.
    Poll,
    /// By both.
    Both,
}

/// How one model is served.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The model's name.
    pub name: String,
    /// The plugin's: `NAME.so` or `libNAME.so` in a volume.
    pub plugin: String,
    /// How its requests become batches.
    pub batch: BatchPolicy,
    /// How many replicas it has, and what each may do at once.
    pub replicas: Replicas,
    /// The folder that holds every model's data.
    pub all_model_data_folder: PathBuf,
    /// `model_settings.common` as JSON.
    pub common_settings: String,
    /// The pipeline's own keys as JSON.
    pub settings: String,
    /// The only content of its plugin that is taken: a SHA-256, in hexadecimal.
    pub plugin_sha256: Option<String>,
    /// The volumes whose changes it hears of, where they don't follow from its paths.
    pub volumes: Option<Vec<String>>,
    /// Requests that a new generation must answer rightly before it serves.
    pub golden: Option<GoldenSpec>,
    /// How a new generation is brought in.
    pub reload: ReloadPolicy,
}

/// `golden` of a model's entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoldenSpec {
    /// The file.
    pub file: PathBuf,
    /// The most that one answer may take.
    pub latency_max: Option<Duration>,
}

/// The reload part of `deployment_config`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReloadPolicy {
    /// How often `on_volume_reload` is called also without a change.
    pub hook_interval: Option<Duration>,
    /// What is expected of a new generation beside the old one.
    pub probation: Probation,
}

/// What is expected of a new generation beside the one before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Probation {
    /// How long the old generation stands by; zero: not at all.
    pub time: Duration,
    /// Batches that must have ended before there is a verdict, but for the one at the end.
    pub batches_min: u64,
    /// How much larger the share of failed batches may be, from 0 to 1.
    pub failed_share_max: f64,
    /// How many times as long 99 of 100 batches may take.
    pub p99_ratio_max: f64,
}

/// `batch_config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchPolicy {
    /// Items in a batch.
    pub max_batch_size: usize,
    /// How long an incomplete batch waits.
    pub wait: Duration,
    /// Items that wait.
    pub queue_max: usize,
}

/// The replica part of `deployment_config`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Replicas {
    /// Kept also without work.
    pub min: usize,
    /// The most there are.
    pub max: usize,
    /// Batches that one replica runs at once, each on a thread of its own.
    pub batches_in_flight: usize,
    /// Seconds without work until one above the minimum is retired.
    pub idle_timeout: Duration,
    /// How long a batch may run until its replica is given up.
    pub batch_timeout: Duration,
    /// Given-up replicas whose threads have not come back.
    pub stuck_max: usize,
    /// How long `load` and `warmup` together, and each `on_volume_reload`, may take.
    pub load_timeout: Duration,
}

impl ModelSpec {
    /// The same settings for a model and plugin of this name.
    #[must_use]
    pub fn named(&self, name: &str) -> Self {
        Self { name: name.to_owned(), plugin: name.to_owned(), ..self.clone() }
    }
}
