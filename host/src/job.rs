//! One unit of work and what can become of it. A job owns the handle its answer goes through, so nothing that handles
//! jobs knows where they came from.

use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::header::HeaderValue;
use modalkit_loader::{Failure, Item};
use serde::Serialize;
use tokio::sync::oneshot;

/// One input on its way through the host.
pub struct Job {
    /// Names the request in logs.
    pub request_id: HeaderValue,
    /// The input as it came; a generation that didn't decode `item` decodes these bytes again.
    pub input: Bytes,
    /// The decoded input: a cache that belongs to the generation that made it.
    pub item: Option<Item>,
    /// Where the answer goes.
    pub reply: ReplyHandle,
}

/// The moment after which nobody wants the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

/// The answer to a job: the JSON object that the caller gets.
pub type Reply = Result<Bytes, JobError>;

/// Sends a reply, once. Dropped unused, it tells the caller that the job was lost.
pub struct ReplyHandle(oneshot::Sender<Reply>);

/// Receives a reply.
pub struct PendingReply(oneshot::Receiver<Reply>);

/// Both ends of a reply.
#[must_use]
pub fn reply() -> (ReplyHandle, PendingReply) {
    let (sender, receiver) = oneshot::channel();
    (ReplyHandle(sender), PendingReply(receiver))
}

impl ReplyHandle {
    /// Answers. A caller that has left doesn't mind.
    pub fn send(self, reply: Reply) {
        let _ = self.0.send(reply);
    }

    /// Whether the caller has left.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.0.is_closed()
    }
}

impl PendingReply {
    /// Waits for the reply.
    pub async fn wait(&mut self) -> Reply {
        (&mut self.0).await.unwrap_or(Err(JobError::Lost))
    }
}

/// Why a job has no answer; each variant asks something else of the caller.
#[derive(Clone, Debug)]
pub enum JobError {
    /// The input isn't what the pipeline takes: correct it.
    Invalid(Vec<Detail>),
    /// No such model: choose one of these.
    UnknownModel {
        /// What was asked for; `None` where the request had to say and did not.
        name: Option<String>,
        /// The models there are.
        known: Vec<String>,
    },
    /// More than the host ever takes: send less.
    TooLarge(String),
    /// The queue has no room, or too many requests are in flight: come back.
    Busy(&'static str),
    /// The model or the host isn't ready: come back.
    Unavailable(String),
    /// The deadline passed.
    DeadlinePassed,
    /// The batch overran `batch_timeout_seconds`.
    BatchTimedOut(Duration),
    /// The pipeline failed.
    Failed(Failure),
    /// A part of the host broke its contract.
    Lost,
}

/// One thing that is wrong with an input, in the form pydantic made common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Detail {
    /// Where: `"body"`, then members and indices.
    pub loc: Vec<Location>,
    /// What was expected and found.
    pub msg: String,
    /// A short name for the kind of error.
    #[serde(rename = "type")]
    pub kind: &'static str,
}

/// One step of a [`Detail::loc`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Location {
    /// A member's name.
    Key(String),
    /// An element's index.
    Index(u64),
}

impl From<&str> for Location {
    fn from(key: &str) -> Self {
        Self::Key(key.to_owned())
    }
}
