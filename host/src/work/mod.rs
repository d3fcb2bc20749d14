//! The unit of work that everything else hands on: a job, the reply that it owns, and admission control. It never knows HTTP or disks, and of models
//! their names.

mod admission;
mod error;
mod job;
mod reply;
mod stream;

pub use admission::{Budget, Gate, JobPermit, Permit};
pub use error::{Detail, JobError, Location};
pub use job::{Deadline, Deaths, Job, RequestId};
pub use reply::{Mailbox, PendingReply, Recorder, Replies, Reply, ReplyHandle, reply, stream_reply};
pub use stream::{ChunkSender, PendingStream, Received};
