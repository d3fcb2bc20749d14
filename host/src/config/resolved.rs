//! What the configuration means: every value present, in its unit and within its range. It knows nothing of how it was
//! written. One list of plain data, and long for that.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use modalkit_device::Wanted;
use modalkit_engine::Isolation;

use super::{
    Bucket, Fault, Secrets,
    fault::{listed, nearest},
    keys::ModelEntry,
    node::Node,
    types::HIDDEN,
};

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
    /// What this application is called: in traces, say.
    pub app_name: String,
    /// Who may call.
    pub auth: AuthSpec,
    /// What is put in place at the start.
    pub mounts: Vec<Mount>,
    /// Where results go, and requests come from.
    pub queues: QueueSpec,
    /// What is said of the container, and of the cluster around it.
    pub container: ContainerSpec,
}

/// What an image is made of, and what its containers ask for: nothing of it concerns a host that runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContainerSpec {
    /// The application's prefix.
    pub name: String,
    /// The image that it begins with, with its tag; `None` where none is said.
    pub base: Option<String>,
    /// The working folder.
    pub workdir: PathBuf,
    /// Variables of the environment.
    pub environment: BTreeMap<String, String>,
    /// Commands that are run while it is built.
    pub commands: Vec<String>,
    /// The region to run in.
    pub region: Option<String>,
    /// Megabytes of memory that one replica needs.
    pub memory_mb: Option<f64>,
    /// Cores that one replica needs.
    pub cores: Option<f64>,
    /// Names of secrets.
    pub secrets: Vec<String>,
    /// Whether callers must send Modal-Key and Modal-Secret, which are two further secrets.
    pub secure: bool,
}

/// `queue_config`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueSpec {
    /// The backend of queues that name none.
    pub usual: String,
    /// The backends, by name.
    pub backends: BTreeMap<String, modalkit_queue::Spec>,
    /// The backends of single queues.
    pub names: BTreeMap<String, String>,
    /// The queues that jobs may name; `None` for those in memory and in `names`.
    pub allowed: Option<Vec<String>>,
    /// How long a result is tried to be delivered.
    pub deadline: Duration,
    /// The queue for messages that are no requests.
    pub dead_letter: Option<String>,
    /// Queues that requests are taken from.
    pub consume: Vec<ConsumeSpec>,
}

/// A queue that requests are taken from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumeSpec {
    /// The queue.
    pub queue: String,
    /// The model.
    pub model: String,
    /// Requests that are taken and not done.
    pub in_flight_max: usize,
    /// How long a request that was taken is hidden from other hosts.
    pub visibility: Duration,
}

impl Default for QueueSpec {
    fn default() -> Self {
        Self {
            usual: "memory".to_owned(),
            backends: BTreeMap::new(),
            names: BTreeMap::new(),
            allowed: None,
            deadline: Duration::from_secs(86_400),
            dead_letter: None,
            consume: Vec::new(),
        }
    }
}

impl QueueSpec {
    /// The same for a host of this name: what it took from a stream is its own after a restart as well.
    #[must_use]
    pub fn named(&self, host: &str) -> Self {
        let mut named = self.clone();
        for backend in named.backends.values_mut() {
            if let modalkit_queue::Spec::Redis(redis) = backend {
                host.clone_into(&mut redis.consumer);
            }
        }
        named
    }

    /// The names of the backend and of the queue that a name means; there may be no such backend.
    #[must_use]
    pub fn parts_of<'a>(&'a self, name: &'a str) -> (&'a str, &'a str) {
        match name.split_once("://") {
            // The address of a queue of SQS: which host is asked, the configuration says, and not the caller.
            Some(("https" | "http", _)) => (self.sqs().unwrap_or(&self.usual).as_str(), name),
            Some((backend, queue)) => (backend, queue),
            None => (self.names.get(name).unwrap_or(&self.usual).as_str(), name),
        }
    }

    /// The backend that speaks SQS: the usual one, or the first.
    #[must_use]
    pub fn sqs(&self) -> Option<&String> {
        let is_sqs = |name: &&String| matches!(self.backends.get(*name), Some(modalkit_queue::Spec::Sqs(_)));
        Some(&self.usual).filter(is_sqs).or_else(|| self.backends.keys().find(is_sqs))
    }
}

/// How asynchronous jobs are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobSpec {
    /// Jobs that aren't done with.
    pub jobs_max: usize,
    /// Unfinished ones of one model.
    pub jobs_per_model_max: usize,
    /// How long finished ones are kept.
    pub retention: Duration,
    /// Bytes of the journal.
    pub bytes_max: u64,
    /// Bytes of one result.
    pub result_bytes_max: usize,
    /// Times that the host may die while it runs one and no other.
    pub crashes_max: u32,
    /// How long names are remembered under which a job comes once.
    pub names: Duration,
}

/// Who may call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuthSpec {
    /// The header that holds a caller's key, in lower case.
    pub header: String,
    /// The keys.
    pub keys: Vec<KeySpec>,
    /// What `Modal-Key` and `Modal-Secret` must say, where they must be sent.
    pub modal: Option<[KeySpec; 2]>,
    /// Where parameters are asked for.
    pub ssm: SsmSpec,
    /// Between two looks at keys that lie elsewhere.
    pub refresh: Duration,
    /// The folder with the files of secrets.
    pub secrets_folder: PathBuf,
}

impl AuthSpec {
    /// Whether anybody is asked who they are.
    #[must_use]
    pub fn asks(&self) -> bool {
        self.modal.is_some() || !self.keys.is_empty()
    }
}

/// One key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySpec {
    /// Its name, which is no secret.
    pub name: String,
    /// Where its value is.
    pub source: KeySource,
    /// Whether it may manage the host.
    pub manages: bool,
    /// Whether its answers may say where their time went.
    pub explains: bool,
    /// The queues that its jobs may name, in place of those that all may.
    pub allowed_queues: Option<Vec<String>>,
    /// How much it may call.
    pub limits: KeyLimits,
}

/// Where a key's value is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KeySource {
    /// Here.
    Value(SecretText),
    /// In the file of this secret.
    Secret(String),
    /// In this parameter of SSM.
    Ssm(String),
}

impl KeySource {
    /// The value, where it is here.
    #[must_use]
    pub fn value(&self) -> Option<&str> {
        match self {
            Self::Value(text) => Some(text),
            Self::Secret(_) | Self::Ssm(_) => None,
        }
    }
}

/// A secret text, which is never printed.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SecretText(String);

impl SecretText {
    /// Hides a text.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }
}

impl std::ops::Deref for SecretText {
    type Target = String;

    fn deref(&self) -> &String {
        &self.0
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

/// How much a key may call.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KeyLimits {
    /// Requests a second.
    pub requests_per_second: Option<f64>,
    /// Requests at once after a pause.
    pub burst: Option<u32>,
    /// Requests in flight.
    pub concurrency_max: Option<usize>,
}

// The configuration holds no NaN: ranges keep it out.
impl Eq for KeyLimits {}

/// Where parameters are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SsmSpec {
    /// Another address than the region's own.
    pub endpoint: Option<String>,
    /// The region.
    pub region: String,
}

/// The files of HTTPS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and those between it and its authority, in PEM.
    pub certificate: PathBuf,
    /// Its private key, in PEM.
    pub private_key: PathBuf,
}

/// A file or folder that is put in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// What is copied.
    pub from: PathBuf,
    /// Where it is put.
    pub to: PathBuf,
    /// Whether it is a folder.
    pub folder: bool,
}

/// `server`.
#[derive(Clone, Debug)]
pub struct Server {
    /// Where HTTP is served.
    pub listen: SocketAddr,
    /// Whether everybody who reaches it is let in unasked.
    pub insecure: bool,
    /// Threads that serve connections.
    pub io_threads: usize,
    /// Open connections; of further ones a few are answered, the rest are closed.
    pub connections_max: usize,
    /// Open connections of one address; of further ones a few are answered, the rest are closed.
    pub connections_per_address_max: usize,
    /// From the first byte a connection could send to the end of its request's headers.
    pub header_timeout: Duration,
    /// How long a connection may idle between requests.
    pub keep_alive_timeout: Duration,
    /// Bytes of a request's headers, and of what a connection reads ahead.
    pub header_bytes_max: usize,
    /// From the end of the headers to the end of the body.
    pub body_timeout: Duration,
    /// Bytes of a request's body.
    pub body_bytes_max: usize,
    /// Bytes of bodies that have come and of answers that are being written, of all requests together.
    pub bytes_in_flight_max: usize,
    /// How long an answer may wait for its caller to take any of it.
    pub write_timeout: Duration,
    /// Bodies up to this are parsed on the runtime's threads, larger ones on a bounded pool.
    pub decode_inline_bytes_max: usize,
    /// Answers from this on are compressed where their callers take that; 0 for none.
    pub compress_bytes_min: usize,
    /// A request's deadline where it sets none.
    pub request_timeout: Duration,
    /// After how long a stream that has nothing to say sends a comment.
    pub stream_heartbeat: Duration,
    /// The latest deadline a request may set.
    pub request_timeout_max: Duration,
    /// How long the host goes on, and says that it isn't ready, between a signal to end and the drain.
    pub drain_delay: Duration,
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
    /// How long after its plugin's file has gone a model without an entry is unloaded; `None`: not at all.
    pub removed_plugin: Option<Duration>,
    /// Plugin libraries that this process opens in its life: none can be closed.
    pub generations_max: usize,
    /// Whether plugins of any owner are taken.
    pub plugins_of_any_owner: bool,
    /// Whether plugins are taken that the group or everybody may write.
    pub plugins_of_any_mode: bool,
    /// The folder of the journal of asynchronous jobs.
    pub state_folder: PathBuf,
    /// The Unix socket for management; `None` for none.
    pub management_socket: Option<PathBuf>,
    /// Names that requests may be for, beside those of loopback, where nobody is asked for a key.
    pub allowed_hosts: Vec<String>,
    /// Origins whose pages may call from a browser; `*` for all.
    pub cors_origins: Vec<String>,
    /// How they are kept.
    pub jobs: JobSpec,
    /// Log levels: `info`, or `info,modalkit=debug`.
    pub log: String,
    /// How long models wait at the start for the buckets that they use.
    pub bucket_wait: Duration,
    /// The folder with one file for each secret.
    pub secrets_folder: PathBuf,
    /// The files of HTTPS; `None` for HTTP.
    pub tls: Option<TlsFiles>,
    /// Where traces go; `None` for nowhere.
    pub traces: Option<TraceSpec>,
}

/// Where traces go.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceSpec {
    /// The collector.
    pub endpoint: String,
    /// The share of requests that are sampled.
    pub sample_ratio: f64,
    /// Headers of exports.
    pub headers: BTreeMap<String, SecretText>,
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
    /// The plugin that the folder is itself, a pipeline in Python; `None` where it holds plugins.
    pub pipeline: Option<String>,
    /// The bucket that it is mirrored from.
    pub bucket: Option<Box<Bucket>>,
}

impl Volume {
    /// Whether a file lies in it, however it is called: also through a link, and in the folder that a bucket is mirrored into.
    #[must_use]
    pub fn holds(&self, file: &Path) -> bool {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| absolute(path));
        let (named, found) = (absolute(file), real(file));
        named.starts_with(absolute(&self.mount_point))
            || found.starts_with(real(&self.mount_point))
            || self.bucket.as_ref().is_some_and(|bucket| found.starts_with(real(&bucket.spec.folder)))
    }

    /// Whether plugins are taken from it whose content nobody names: not from a bucket that doesn't say so.
    #[must_use]
    pub fn takes_any_plugin(&self) -> bool {
        self.bucket.as_ref().is_none_or(|bucket| bucket.takes_plugins)
    }
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
    /// Whether the configuration has an entry for it; else its plugin was dropped into a volume, and it has the defaults.
    pub configured: bool,
    /// Whether the host is ready only while it is.
    pub required: bool,
    /// Whether inputs must fit the input's JSON Schema in every part.
    pub enforce_schema: bool,
    /// What it does, for clients of OpenAI's API.
    pub task: Option<Task>,
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
    /// The application's name and settings as JSON, for pipelines that ask.
    pub application: String,
    /// The pipeline's own keys.
    pub settings: Settings,
    /// Its secrets.
    pub secrets: Secrets,
    /// The only content of its plugin that is taken: a SHA-256, in hexadecimal.
    pub plugin_sha256: Option<String>,
    /// The volumes whose changes it hears of, where they don't follow from its paths.
    pub volumes: Option<Vec<String>>,
    /// Requests that a new generation must answer rightly before it serves.
    pub golden: Option<GoldenSpec>,
    /// How a new generation is brought in.
    pub reload: ReloadPolicy,
    /// Further attempts for an asynchronous job that failed.
    pub retries: u32,
    /// The devices of each replica; `None` for none.
    pub gpu: Option<Wanted>,
    /// Where its pipeline's code runs, and what that may use.
    pub isolation: Isolation,
    /// When a replica's process is replaced by a fresh one.
    pub recycle: Recycle,
}

/// What a model does, for clients of OpenAI's API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// A text, or tokens, in; a vector out.
    Embedding,
    /// A prompt in, what comes after it out.
    Completion,
    /// A conversation in, what is said next out.
    Chat,
}

impl Task {
    /// As the configuration says it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Completion => "completion",
            Self::Chat => "chat",
        }
    }
}

/// When a replica's process is replaced by a fresh one; `None` for never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recycle {
    /// After so many batches.
    pub after_batches: Option<u64>,
    /// When it holds more bytes of memory than this.
    pub after_bytes: Option<u64>,
}

/// A pipeline's own keys, and where each was written.
#[derive(Clone, Debug)]
pub struct Settings {
    node: Node,
    key: String,
}

impl Settings {
    pub(super) fn new(node: Node, key: &str) -> Self {
        Self { node, key: key.to_owned() }
    }

    /// As a JSON object.
    #[must_use]
    pub fn json(&self) -> String {
        self.node.json().to_string()
    }

    /// What is wrong with the value at the end of this path, as its pipeline says it; `known` are the pipeline's keys.
    #[must_use]
    pub fn fault(&self, path: &[&str], said: &str, unknown: bool, known: &[&str]) -> Fault {
        let key = path.iter().fold(self.key.clone(), |key, step| super::layer::child(&key, step));
        let mut at = self.node.place_of(path.iter().copied());
        if let (true, Some(first)) = (path.is_empty(), self.node.entries().first()) {
            at = first.at.clone();
        }
        if let (true, [name]) = (unknown, path)
            && let Some(entry) = self.node.entries().iter().find(|entry| entry.name == *name)
        {
            at = entry.at.clone();
        }
        if unknown && let [name] = path {
            let found = format!("the unknown key {name}");
            // It may have been meant for the host.
            return match nearest(name, known.iter().chain(ModelEntry::KEYS).copied()) {
                Some(near) => Fault::new(&at, &key, "a key of the pipeline's settings or of an entry", found)
                    .hint(format!("did you mean {near}?")),
                None if known.is_empty() => {
                    Fault::new(&at, &key, "keys of an entry alone: the pipeline has no settings", found)
                }
                None => {
                    let known = listed(known.iter().copied());
                    Fault::new(&at, &key, format!("a key of the pipeline's settings: {known}"), found)
                }
            };
        }
        match said.strip_prefix("expected ").and_then(|said| said.split_once(", found ")) {
            Some((expected, found)) => Fault::new(&at, &key, expected, found),
            None => Fault::new(&at, &key, "what the pipeline's settings say of it", said),
        }
    }
}

/// What a pipeline gets is what counts: a line that was added above changes nothing.
impl PartialEq for Settings {
    fn eq(&self, other: &Self) -> bool {
        self.node.json() == other.node.json()
    }
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
    /// What it does where no device is free.
    pub devices: ReloadDevices,
}

/// What a new generation does where no device is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadDevices {
    /// It shares those of the old one, whose memory must hold both.
    Share,
    /// It waits until one is.
    Wait,
    /// It takes them after the old one has stopped; requests wait meanwhile.
    StopFirst,
}

/// What is expected of a new generation beside the one before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Probation {
    /// How long the old generation is kept on standby; zero: not at all.
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
    /// What they cost together at most; `None` for any.
    pub max_batch_cost: Option<u64>,
    /// How long an incomplete batch waits.
    pub wait: BatchWait,
    /// Items that wait.
    pub queue_max: usize,
}

impl BatchPolicy {
    /// Whether inputs are measured before they are queued, also where a process has to be asked.
    #[must_use]
    pub fn is_measured(&self) -> bool {
        self.max_batch_cost.is_some()
    }
}

/// How long an incomplete batch waits for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchWait {
    /// So long.
    Fixed(Duration),
    /// As long as is worth it.
    Adaptive,
}

/// The replica part of `deployment_config`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Replicas {
    /// Kept also without work.
    pub min: usize,
    /// The most there are.
    pub max: usize,
    /// Loaded beside these, to take over.
    pub spare: usize,
    /// Batches that one replica runs at once, each on a thread of its own.
    pub batches_in_flight: usize,
    /// Seconds without work until one above the minimum is retired.
    pub idle_timeout: Duration,
    /// How long a batch may run until its replica is given up.
    pub batch_timeout: Duration,
    /// How long a batch waits for a caller who reads none of its chunks.
    pub stream_wait: Duration,
    /// Given-up replicas whose threads have not come back.
    pub stuck_max: usize,
    /// How long `load` and `warmup` together, and each `on_volume_reload`, may take.
    pub load_timeout: Duration,
}

impl ModelSpec {
    /// The same settings for a model and plugin of this name.
    #[must_use]
    pub fn named(&self, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            configured: false,
            required: false,
            plugin: name.to_owned(),
            // Where its keys would stand.
            settings: Settings::new(
                self.settings.node.clone(),
                &super::layer::child("model_settings.model_entries", name),
            ),
            ..self.clone()
        }
    }
}
