//! How a job's answer gets to whoever waits for it: a caller on a connection, whole or in chunks, by the mailbox of its io thread, or a record that
//! outlives connections. It never knows what the answer says.

use std::sync::Arc;

use modalkit_engine::{Interest, Payload};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use super::{
    Budget, ChunkSender, Deadline, JobError, PendingStream,
    stream::{self, ReplyStream, StreamEnd},
};

/// The answer to a job: the pipeline's output; of one that was accepted and runs later, what its caller is told.
pub type Reply = Result<Payload, JobError>;

/// Sends a reply, once. Dropped unused, it says that the job was lost.
pub struct ReplyHandle(To);

enum To {
    /// A caller who waits on a connection.
    Caller { sender: oneshot::Sender<Reply>, mailbox: Arc<Mailbox> },
    /// A caller who waits on a connection and takes chunks before the answer.
    Stream(StreamEnd),
    /// A record that outlives connections.
    Recorder(Box<dyn Recorder>),
}

/// Keeps what becomes of a job for which nobody waits on a connection. Dropped without an answer, it notes that there is none.
pub trait Recorder: Send {
    /// The job's batch begins.
    fn begins(&self);
    /// The job's batch came to nothing, and another one will begin with it.
    fn comes_back(&self);
    /// The job has an answer.
    fn answered(self: Box<Self>, reply: Reply);
    /// Whether nobody wants the answer any more.
    fn is_abandoned(&self) -> bool;
}

/// Answers that are there and not sent yet. They are sent when this is dropped at the latest.
#[derive(Default)]
pub struct Replies(Vec<(ReplyHandle, Reply)>);

impl Replies {
    /// Adds one.
    pub fn push(&mut self, handle: ReplyHandle, reply: Reply) {
        self.0.push((handle, reply));
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sends them.
    pub fn send(&mut self) {
        self.0.drain(..).for_each(|(handle, reply)| handle.send(reply));
    }
}

impl Drop for Replies {
    fn drop(&mut self) {
        self.send();
    }
}

/// Receives a reply.
pub struct PendingReply(oneshot::Receiver<Reply>);

/// Replies on their way from the threads that run batches to the thread that waits for them. Waking a task of another
/// thread costs more than everything else that a reply costs, so only the first reply in an empty mailbox notifies, and the mailbox is
/// emptied by a task of the receiving thread, which wakes tasks of its own thread cheaply.
#[derive(Default)]
pub struct Mailbox {
    mail: Mutex<Vec<Mail>>,
    not_empty: Notify,
}

/// What a mailbox delivers.
enum Mail {
    /// A reply to whoever waits for it.
    Reply(oneshot::Sender<Reply>, Reply),
    /// Word that something of a stream is there.
    Stream(Arc<ReplyStream>),
}

impl Mailbox {
    /// Hands replies out, for ever. One such task runs on the thread whose requests have this mailbox.
    pub async fn deliver(&self) {
        let mut delivered = Vec::new();
        loop {
            self.not_empty.notified().await;
            std::mem::swap(&mut delivered, &mut self.mail.lock());
            for mail in delivered.drain(..) {
                match mail {
                    // A caller that has left doesn't mind.
                    Mail::Reply(sender, reply) => drop(sender.send(reply)),
                    Mail::Stream(stream) => stream.wake(),
                }
            }
        }
    }

    /// Has a stream's receiver woken.
    pub(super) fn put_stream(&self, stream: Arc<ReplyStream>) {
        self.put(Mail::Stream(stream));
    }

    fn put(&self, mail: Mail) {
        let mut waiting = self.mail.lock();
        waiting.push(mail);
        let first = waiting.len() == 1;
        drop(waiting);
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

/// Both ends of a reply in chunks; the bytes of those that wait count in this budget.
#[must_use]
pub fn stream_reply(
    mailbox: &Arc<Mailbox>,
    budget: &Arc<Budget>,
    deadline: Deadline,
) -> (ReplyHandle, PendingStream) {
    let (end, pending) = stream::stream(mailbox, budget, deadline);
    (ReplyHandle(To::Stream(end)), pending)
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

    /// Says that the job's batch came to nothing, and that another one will begin with it.
    pub fn comes_back(&self) {
        if let To::Recorder(recorder) = &self.0 {
            recorder.comes_back();
        }
    }

    /// Answers.
    pub fn send(self, reply: Reply) {
        match self.0 {
            To::Caller { sender, mailbox } => mailbox.put(Mail::Reply(sender, reply)),
            To::Stream(end) => end.send(reply),
            To::Recorder(recorder) => recorder.answered(reply),
        }
    }

    /// What is wanted of the job now.
    #[must_use]
    pub fn interest(&self) -> Interest {
        let is_abandoned = match &self.0 {
            To::Caller { sender, .. } => sender.is_closed(),
            To::Stream(end) => return end.interest(),
            To::Recorder(recorder) => recorder.is_abandoned(),
        };
        if is_abandoned { Interest::Nothing } else { Interest::Outcome }
    }

    /// Whether nobody wants the answer any more.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.interest() == Interest::Nothing
    }

    /// Where chunks go, where they are wanted.
    #[must_use]
    pub fn chunks(&self) -> Option<ChunkSender> {
        match &self.0 {
            To::Stream(end) => Some(end.sender()),
            To::Caller { .. } | To::Recorder(_) => None,
        }
    }
}

impl PendingReply {
    /// Waits for the reply.
    pub async fn wait(&mut self) -> Reply {
        (&mut self.0).await.unwrap_or(Err(JobError::Lost))
    }
}
