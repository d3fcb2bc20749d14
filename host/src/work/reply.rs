//! How a job's answer gets to whoever waits for it: a caller on a connection, by the mailbox of its io thread, or a record that
//! outlives connections. It never knows what the answer says.

use std::sync::Arc;

use modalkit_engine::Payload;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use super::JobError;

/// The answer to a job: the pipeline's output; of one that was accepted and runs later, what its caller is told.
pub type Reply = Result<Payload, JobError>;

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
/// thread costs more than everything else that a reply costs, so only the first reply in an empty mailbox notifies, and the mailbox is
/// emptied by a task of the receiving thread, which wakes tasks of its own thread cheaply.
#[derive(Default)]
pub struct Mailbox {
    replies: Mutex<Vec<(oneshot::Sender<Reply>, Reply)>>,
    not_empty: Notify,
}

impl Mailbox {
    /// Hands replies out, for ever. One such task runs on the thread whose requests have this mailbox.
    pub async fn deliver(&self) {
        let mut replies = Vec::new();
        loop {
            self.not_empty.notified().await;
            std::mem::swap(&mut replies, &mut self.replies.lock());
            for (sender, reply) in replies.drain(..) {
                // A caller that has left doesn't mind.
                let _ = sender.send(reply);
            }
        }
    }

    fn put(&self, sender: oneshot::Sender<Reply>, reply: Reply) {
        let mut replies = self.replies.lock();
        replies.push((sender, reply));
        let first = replies.len() == 1;
        drop(replies);
        if first {
            self.not_empty.notify_one();
        }
    }
}

/// Both ends of a reply that is delivered through this mailbox.
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
