//! What is to be written, and how those who wait for it are told. It never knows how it is written.

use crate::{
    AcceptError, JobId,
    record::{Accepted, Finish, NewJob, OpenJob, Retry},
};

/// Tells how an acceptance ended.
pub(crate) type AcceptDone = Box<dyn FnOnce(Result<Accepted, AcceptError>) + Send>;

/// Tells that a change is on disk.
pub(crate) type Done = Box<dyn FnOnce() + Send>;

/// Tells that a job's end is on disk, or why it can never be written like this.
pub(crate) type FinishDone = Box<dyn FnOnce(Result<(), Unfit>) + Send>;

/// Tells which message is on its way again; `None` where there is no such message, or it is on its way.
pub(crate) type RedeliverDone = Box<dyn FnOnce(Option<OpenJob>) + Send>;

/// One change.
pub(crate) enum Change {
    Accept(NewJob, AcceptDone),
    /// One that is accepted and has failed at once, in the same group.
    Refuse(NewJob, Finish, AcceptDone),
    Cancel(JobId, Done),
    Retry(Retry),
    Finish(Finish, FinishDone),
    Delivered(JobId, u64, Option<String>, Done),
    Redeliver(JobId, RedeliverDone),
}

/// A change that the disk would take and the journal's format doesn't, however often it is tried.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("one row of the journal holds less ({0})")]
pub struct Unfit(pub(crate) String);

impl Change {
    /// The bytes of a job that is to be accepted; `None` for what says what has become of one that was.
    pub(crate) fn accepted_bytes(&self) -> Option<usize> {
        match self {
            Self::Accept(job, _) | Self::Refuse(job, ..) => Some(job.envelope.len()),
            _ => None,
        }
    }

    /// Tells whoever wants a job accepted that it isn't.
    pub(crate) fn refuse(self, error: AcceptError) {
        if let Self::Accept(_, done) | Self::Refuse(_, _, done) = self {
            done(Err(error));
        }
    }

    /// Tells whoever waits for it that it can never be written. What it would have said is told again by the job's end.
    pub(crate) fn reject(self, why: Unfit) {
        match self {
            Self::Accept(_, done) | Self::Refuse(_, _, done) => done(Err(AcceptError::Unfit(why))),
            Self::Finish(_, done) => done(Err(why)),
            Self::Redeliver(_, done) => done(None),
            Self::Cancel(id, done) => {
                tracing::error!(job_id = %id, error = %why, "that the job was taken back can't be written");
                done();
            }
            Self::Retry(Retry { id, .. }) | Self::Delivered(id, ..) => {
                tracing::error!(job_id = %id, error = %why, "what became of the job can't be written");
            }
        }
    }
}

/// What those who wait for a change are told once it is on disk.
pub(crate) enum Notification {
    Accepted(AcceptDone, Result<Accepted, AcceptError>),
    Done(Done),
    Finished(FinishDone),
    Redelivered(RedeliverDone, Option<OpenJob>),
}

impl Notification {
    pub(crate) fn send(self) {
        match self {
            Self::Accepted(done, accepted) => done(accepted),
            Self::Done(done) => done(),
            Self::Finished(done) => done(Ok(())),
            Self::Redelivered(done, job) => done(job),
        }
    }
}
