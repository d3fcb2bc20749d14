//! Message queues behind one trait: results go out through it, and requests may come in.
//!
//! Each broker is an adapter of its own, behind a cargo feature. An adapter owns its connections and comes back by itself when its
//! broker does; it never knows jobs, retries or deadlines. All pass the suite in `tests/e2e/queues.rs` against real servers.

#![forbid(unsafe_code)]

mod loopback;
#[cfg(feature = "memory")]
mod memory;
#[cfg(feature = "plugin")]
mod plugin;
#[cfg(feature = "redis")]
mod redis;
#[cfg(feature = "sqs")]
mod sqs;
#[cfg(feature = "sqs")]
mod sqs_protocol;
#[cfg(feature = "taskiq")]
mod taskiq;

use std::{collections::BTreeMap, future::Future, path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;

pub use loopback::is_loopback;
#[cfg(feature = "memory")]
pub use memory::{Held, Lease, Memory};
#[cfg(feature = "plugin")]
pub use plugin::OpenPlugin;

/// What an adapter's calls return.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A message on its way to a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The job that it tells of: where the broker has a place for it, it goes there.
    pub job_id: String,
    /// This delivery's name: the same however often it is tried, and another where somebody has it delivered again.
    pub delivery_id: String,
    /// JSON.
    pub body: Bytes,
    /// The trace that it belongs to, where the broker has headers.
    pub traceparent: Option<String>,
}

/// Why a message isn't in its queue; each asks for something else.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The broker can't be reached, or can't now: try again.
    #[error("{0}")]
    Unavailable(String),
    /// The broker doesn't let us in: somebody has to change the credentials. Try again more rarely.
    #[error("{0}")]
    Denied(String),
    /// This message will never be taken.
    #[error("{0}")]
    Rejected(String),
}

/// A broker that takes messages.
pub trait Backend: Send + Sync {
    /// Whether it can be reached and lets us in.
    fn check(&self) -> Answer<'_, Result<(), QueueError>>;

    /// Messages that are worth sending at once to this queue.
    fn batch_max(&self, queue: &str) -> usize;

    /// Sends messages, in order where the broker keeps one. One result each, in their order: what isn't said to be sent may have
    /// been sent all the same.
    fn send<'a>(&'a self, queue: &'a str, messages: &'a [Message])
    -> Answer<'a, Vec<Result<(), QueueError>>>;

    /// Where messages can be taken from, for brokers that keep them until they are acknowledged.
    fn source(&self) -> Option<&dyn Source> {
        None
    }

    /// The messages themselves, where they are kept here.
    #[cfg(feature = "memory")]
    fn memory(&self) -> Option<&Memory> {
        None
    }
}

/// A message that was taken from a queue, and comes again unless it is acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// The broker's name for it, the same when it comes again.
    pub id: String,
    /// What to acknowledge it with.
    pub receipt: String,
    /// What it holds.
    pub body: Bytes,
    /// The trace that it belongs to.
    pub traceparent: Option<String>,
}

/// A broker that gives messages. What was taken is hidden from others for a while, and comes again after that.
pub trait Source: Send + Sync {
    /// Takes up to `max` messages; waits up to `wait` for the first. They stay hidden for `hidden`.
    fn receive<'a>(
        &'a self,
        queue: &'a str,
        max: usize,
        wait: Duration,
        hidden: Duration,
    ) -> Answer<'a, Result<Vec<Received>, QueueError>>;

    /// Takes messages out of the queue for good.
    fn acknowledge<'a>(
        &'a self,
        queue: &'a str,
        receipts: &'a [String],
    ) -> Answer<'a, Result<(), QueueError>>;

    /// Hides messages for longer.
    fn extend<'a>(
        &'a self,
        queue: &'a str,
        receipts: &'a [String],
        hidden: Duration,
    ) -> Answer<'a, Result<(), QueueError>>;
}

/// How a broker is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// In this process.
    Memory(MemorySpec),
    /// Redis, its lists or streams.
    Redis(RedisSpec),
    /// Amazon SQS, or who speaks like it.
    Sqs(SqsSpec),
    /// Tasks for workers of TaskIQ, over Redis.
    TaskIq(TaskIqSpec),
    /// A plugin.
    Plugin(PluginSpec),
    /// What a model's own code has for it.
    Model(ModelSpec),
}

/// `memory`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemorySpec {
    /// Messages in each queue.
    pub messages_max: usize,
    /// Bytes in all queues.
    pub bytes_max: usize,
}

/// `redis`.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisSpec {
    /// `redis://` or `rediss://`, with everything that such an address may hold.
    pub url: String,
    /// Where the address names nobody.
    pub username: Option<String>,
    /// Where the address has none.
    pub password: Option<String>,
    /// The file with the authority of its certificate, in PEM.
    pub ca: Option<PathBuf>,
    /// What queues are.
    pub shape: RedisShape,
    /// Entries that a stream keeps, about.
    pub stream_length_max: Option<u64>,
    /// Bytes of a message.
    pub message_bytes_max: usize,
    /// What this host is called among those that take from a stream.
    pub consumer: String,
}

/// What a queue is in Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisShape {
    /// A list: pushed on the left, to be popped from the right.
    List,
    /// A stream.
    Stream,
}

impl std::fmt::Debug for RedisSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisSpec").field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// `taskiq`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskIqSpec {
    /// The Redis between here and the workers.
    pub redis: RedisSpec,
    /// The task that is executed.
    pub task: String,
    /// The same by queue.
    pub tasks: BTreeMap<String, String>,
}

/// `sqs`.
#[derive(Clone, PartialEq, Eq)]
pub struct SqsSpec {
    /// Where it answers, where that isn't the region's own address.
    pub endpoint: Option<String>,
    /// The region.
    pub region: String,
    /// Where these are missing, credentials come from the environment, as for AWS's own programs.
    pub credentials: Option<AwsCredentials>,
    /// The file with the authority of its certificate, in PEM.
    pub ca: Option<PathBuf>,
    /// Bytes of a message, and of a batch of them.
    pub message_bytes_max: usize,
    /// Whether a queue that isn't there is made.
    pub create_missing: bool,
}

impl std::fmt::Debug for SqsSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqsSpec")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .finish_non_exhaustive()
    }
}

/// Credentials that don't change.
#[derive(Clone, PartialEq, Eq)]
pub struct AwsCredentials {
    /// Who.
    pub key_id: String,
    /// The secret.
    pub secret: String,
    /// Of temporary ones.
    pub token: Option<String>,
}

/// `plugin`.
#[derive(Clone, PartialEq, Eq)]
pub struct PluginSpec {
    /// The backend's name, which its log lines carry.
    pub name: String,
    /// Its file: `NAME.so` or `libNAME.so` in one of the folders.
    pub plugin: String,
    /// The only content of its file that is taken: a SHA-256, in hexadecimal.
    pub sha256: Option<String>,
    /// The volumes.
    pub folders: Vec<PathBuf>,
    /// Its settings, a JSON object.
    pub settings: String,
    /// Its secrets by name.
    pub secrets: BTreeMap<String, String>,
    /// Messages in one call.
    pub batch_max: usize,
}

impl std::fmt::Debug for PluginSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PluginSpec")
            .field("name", &self.name)
            .field("plugin", &self.plugin)
            .finish_non_exhaustive()
    }
}

/// `model`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSpec {
    /// The model's name.
    pub model: String,
}

/// Makes the adapter of a model's own code, which only its host can reach.
pub type OpenModel = Arc<dyn Fn(&ModelSpec) -> Arc<dyn Backend> + Send + Sync>;

/// A broker can't be used as it is configured.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SpecError(pub String);

/// What adapters need from their host.
pub struct BackendContext {
    /// Opens a plugin's file; blocking.
    #[cfg(feature = "plugin")]
    pub open_plugin: OpenPlugin,
    /// Reaches a model's own code.
    pub open_model: OpenModel,
}

/// Makes the adapter. It connects when it is first used.
///
/// # Errors
/// [`SpecError`], where no connection could ever be made like that.
pub fn open(spec: &Spec, context: &BackendContext) -> Result<Arc<dyn Backend>, SpecError> {
    #[cfg(not(feature = "plugin"))]
    let _ = around;
    match spec {
        #[cfg(feature = "memory")]
        Spec::Memory(spec) => Ok(Arc::new(Memory::new(spec))),
        #[cfg(feature = "redis")]
        Spec::Redis(spec) => Ok(Arc::new(redis::Redis::open(spec)?)),
        #[cfg(feature = "sqs")]
        Spec::Sqs(spec) => Ok(Arc::new(sqs::Sqs::open(spec)?)),
        #[cfg(feature = "taskiq")]
        Spec::TaskIq(spec) => Ok(Arc::new(taskiq::TaskIq::open(spec)?)),
        #[cfg(feature = "plugin")]
        Spec::Plugin(spec) => Ok(Arc::new(plugin::PluginQueue::open(spec, &context.open_plugin))),
        Spec::Model(spec) => Ok((context.open_model)(spec)),
        #[allow(unreachable_patterns, reason = "where a feature is off")]
        _ => {
            Err(SpecError("this build has no adapter for it (a cargo feature of modalkit-queue)".to_owned()))
        }
    }
}

/// Refuses what is larger than a broker takes, in words that say what to do.
#[cfg(any(feature = "redis", feature = "sqs", feature = "memory"))]
fn fits(message: &Message, bytes_max: usize) -> Result<(), QueueError> {
    if message.body.len() <= bytes_max {
        return Ok(());
    }
    Err(QueueError::Rejected(format!(
        "the message has {} bytes, the broker takes {bytes_max} (message_bytes_max); its result is in GET /jobs/{}",
        message.body.len(),
        message.job_id
    )))
}
