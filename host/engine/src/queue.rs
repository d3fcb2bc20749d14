//! Plugins of queues: where results of jobs go that somebody's own code delivers.

use std::collections::BTreeMap;

use crate::Failure;

/// A message on its way into a queue.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// The job that it tells of.
    pub job_id: &'a str,
    /// JSON.
    pub body: &'a [u8],
    /// The trace that it belongs to.
    pub traceparent: Option<&'a str>,
}

/// An opened queue plugin.
pub trait QueuePlugin: Send + Sync {
    /// The plugin's version.
    fn version(&self) -> &str;

    /// SHA-256 of the file, in hexadecimal.
    fn sha256(&self) -> &str;

    /// Opens a backend with its own keys, a JSON object, and secrets by name; takes as long as the author's `open`.
    ///
    /// # Errors
    /// What the backend's `open` said.
    fn open(
        &self,
        backend_name: &str,
        settings: &str,
        secrets: &BTreeMap<String, String>,
    ) -> Result<Box<dyn QueueBackend>, Failure>;
}

/// An opened queue backend; ended when dropped.
pub trait QueueBackend: Send + Sync {
    /// Whether messages could be sent.
    ///
    /// # Errors
    /// What the backend's `check` said.
    fn check(&self) -> Result<(), Failure>;

    /// Sends messages to a queue, in order; one result each. Takes as long as the author's `send`.
    fn send(&self, queue: &str, messages: &[Outgoing<'_>]) -> Vec<Result<(), Failure>>;
}
