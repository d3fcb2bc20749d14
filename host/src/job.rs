//! One unit of work and what can become of it. A job owns the handle its answer goes through, so nothing that handles
//! jobs knows where they came from.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use modalkit_loader::{Failure, Item};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{Notify, oneshot};

use crate::trail::Trail;

/// One input on its way through the host.
pub struct Job {
    /// Names the request in logs.
    pub request_id: RequestId,
    /// The input as it came; a generation that didn't decode `item` decodes these bytes again.
    pub input: Bytes,
    /// The decoded input: a cache that belongs to the generation that made it.
    pub item: Option<Item>,
    /// Where the answer goes.
    pub reply: ReplyHandle,
    /// Where its time goes, where somebody wants to know.
    pub trail: Option<Arc<Trail>>,
}

/// Names a request in logs and answers. One that this host makes is written out only where it is shown.
#[derive(Clone, Debug)]
pub enum RequestId {
    /// The caller's own: visible ASCII.
    Given(Bytes),
    /// Made here: a number of the process, and one that counts.
    Made {
        /// Differs from process to process.
        process: u32,
        /// Differs from request to request.
        number: u64,
    },
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Given(text) => f.write_str(&String::from_utf8_lossy(text)),
            Self::Made { process, number } => write!(f, "{process:08x}-{number:x}"),
        }
    }
}

/// The moment after which nobody wants the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

/// The answer to a job: the JSON object that the caller gets.
pub type Reply = Result<Bytes, JobError>;

/// Sends a reply, once. Dropped unused, it says that the job was lost.
pub struct ReplyHandle(To);

enum To {
    /// A caller who waits on a connection.
    Caller { sender: oneshot::Sender<Reply>, mailbox: Arc<Mailbox> },
    /// A record that outlives connections.
    Recorder(Box<dyn Recorder>),
}

/// Keeps what becomes of a job for which nobody waits on a connection. Dropped without an answer, it notes that there is none.
pub trait Recorder: Send {
    /// The job's batch begins.
    fn begins(&self);
    /// The job has an answer.
    fn answered(self: Box<Self>, reply: Reply);
    /// Whether nobody wants the answer any more.
    fn is_abandoned(&self) -> bool;
}

/// Receives a reply.
pub struct PendingReply(oneshot::Receiver<Reply>);

/// Replies on their way from the threads that run batches to the thread that waits for them. Waking a task of another
/// thread costs more than all else a reply does, so whoever puts the first letter into an empty box rings, and the box is
/// emptied by a task of the receiving thread, which wakes its neighbours cheaply.
#[derive(Default)]
pub struct Mailbox {
    letters: Mutex<Vec<(oneshot::Sender<Reply>, Reply)>>,
    bell: Notify,
}

impl Mailbox {
    /// Hands replies out, for ever. One such task runs on the thread whose requests have this box.
    pub async fn deliver(&self) {
        let mut letters = Vec::new();
        loop {
            self.bell.notified().await;
            std::mem::swap(&mut letters, &mut self.letters.lock());
            for (sender, reply) in letters.drain(..) {
                // A caller that has left doesn't mind.
                let _ = sender.send(reply);
            }
        }
    }

    fn put(&self, sender: oneshot::Sender<Reply>, reply: Reply) {
        let mut letters = self.letters.lock();
        letters.push((sender, reply));
        let first = letters.len() == 1;
        drop(letters);
        if first {
            self.bell.notify_one();
        }
    }
}

/// Both ends of a reply that is delivered through this box.
#[must_use]
pub fn reply(mailbox: &Arc<Mailbox>) -> (ReplyHandle, PendingReply) {
    let (sender, receiver) = oneshot::channel();
    (ReplyHandle(To::Caller { sender, mailbox: Arc::clone(mailbox) }), PendingReply(receiver))
}

impl ReplyHandle {
    /// Of a job whose answer is recorded.
    #[must_use]
    pub fn recorded(by: Box<dyn Recorder>) -> Self {
        Self(To::Recorder(by))
    }

    /// Says that the job's batch begins.
    pub fn begins(&self) {
        if let To::Recorder(recorder) = &self.0 {
            recorder.begins();
        }
    }

    /// Answers.
    pub fn send(self, reply: Reply) {
        match self.0 {
            To::Caller { sender, mailbox } => mailbox.put(sender, reply),
            To::Recorder(recorder) => recorder.answered(reply),
        }
    }

    /// Whether the caller has left.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        match &self.0 {
            To::Caller { sender, .. } => sender.is_closed(),
            To::Recorder(recorder) => recorder.is_abandoned(),
        }
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
    /// Something else was sent under the same name: choose another name.
    Conflict(String),
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
