//! How jobs come in: into the journal first, and then to the runner. It never runs one.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Instant,
};

use bytes::Bytes;
use modalkit_engine::Decoded;
use modalkit_journal::{
    AcceptError, Accepted, Finish, IdempotencyKey, JobId, NewJob, OpenJob, State, Suspicion, unix_ms,
};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::{
    Jobs, closed,
    inbox::Event,
    live_job::{FirstAttempt, Input, JobPhase, JobProgress, LiveJob},
    open_jobs::{TOO_MANY, moment_of},
};
use crate::{
    access::ConcurrencyPermit,
    insight::JobTimings,
    protocol::{self, Envelope},
    work::JobError,
};

/// A job as it comes.
pub struct Incoming {
    /// The model.
    pub model: Arc<str>,
    /// The name of its key.
    pub key: Option<Arc<str>>,
    /// All that came.
    pub envelope: Bytes,
    /// The same, taken apart.
    pub parts: Envelope,
    /// The decoded input.
    pub decoded: Option<Decoded>,
    /// Milliseconds since 1970 after which nobody wants its answer.
    pub deadline: Option<u64>,
    /// The trace that it belongs to.
    pub trace: Option<String>,
    /// Timings of its first attempt, where somebody wants to know.
    pub timings: Option<Arc<JobTimings>>,
    /// Its permit among its key's calls.
    pub key_permit: Option<Arc<ConcurrencyPermit>>,
    /// The key under which it is accepted only once.
    pub idempotency: Option<IdempotencyKey>,
    /// It was taken from a queue: no caller asks for its result, and what fails goes to the dead-letter queue where it names no other.
    pub from_queue: bool,
}

impl Incoming {
    /// The same once more, without what only saves work.
    #[must_use]
    pub fn again(&self) -> Self {
        let Self {
            model, key, envelope, parts, deadline, trace, key_permit, idempotency, from_queue, ..
        } = self;
        Self {
            model: Arc::clone(model),
            key: key.clone(),
            envelope: envelope.clone(),
            parts: parts.clone(),
            decoded: None,
            deadline: *deadline,
            trace: trace.clone(),
            timings: None,
            key_permit: key_permit.clone(),
            idempotency: idempotency.clone(),
            from_queue: *from_queue,
        }
    }
}

impl Jobs {
    /// Takes a job in: `done` is called once it is on disk, with its id, or the id of the one that came before under its name.
    /// It may be called on any thread, and must not block.
    pub fn accept(
        self: &Arc<Self>,
        incoming: Incoming,
        done: impl FnOnce(Result<JobId, JobError>) + Send + 'static,
    ) {
        let journal = self.journal.read();
        let Some(journal) = &*journal else { return done(Err(closed())) };
        let Incoming {
            model,
            key,
            envelope,
            parts,
            decoded,
            deadline,
            trace,
            timings,
            key_permit,
            idempotency,
            from_queue,
        } = incoming;
        let id = journal.next_id();
        let accepted = unix_ms();
        let mut progress = JobProgress::new(JobPhase::Accepting);
        (progress.input, progress.key_permit) =
            (Some(Input { envelope: envelope.clone(), parts }), key_permit);
        let live_job = Arc::new(LiveJob {
            id,
            model: Arc::clone(&model),
            accepted: Some(Instant::now()),
            deadline: deadline.and_then(|deadline| moment_of(deadline, accepted)),
            trace: trace.clone(),
            from_queue,
            cancelled: AtomicBool::new(false),
            progress: Mutex::new(progress),
        });
        if let Err(error) = self.shared.admit(&live_job, envelope.len()) {
            return done(Err(error));
        }
        // Where there is no room for the bytes, there is none for what they decode to.
        let decoded = decoded.filter(|_| live_job.progress.lock().input.is_some());
        let first_attempt = FirstAttempt { decoded, timings };
        let job = NewJob { id, model, key, envelope, accepted, deadline, trace, idempotency, from_queue };
        let (shared, inbox) = (Arc::clone(&self.shared), Arc::clone(&self.inbox));
        journal.accept(job, move |accepted| match accepted {
            Ok(Accepted::New) => {
                // The end of the commit wakes the runner, once for all jobs in it.
                inbox.put_without_waking(Event::Accepted(live_job, first_attempt));
                done(Ok(id));
            }
            Ok(Accepted::Known(known)) => {
                shared.withdraw(&live_job);
                done(Ok(known));
            }
            Err(error) => {
                shared.withdraw(&live_job);
                done(Err(job_error(&error)));
            }
        });
    }

    /// Takes in something that is no job, as one that has failed: its message goes to this queue, if there is one.
    pub fn refuse(
        self: &Arc<Self>,
        incoming: Incoming,
        queue: Option<String>,
        error: String,
        done: impl FnOnce(Result<JobId, JobError>) + Send + 'static,
    ) {
        let journal = self.journal.read();
        let Some(journal) = &*journal else { return done(Err(closed())) };
        let Incoming { model, key, envelope, deadline, trace, idempotency, from_queue, .. } = incoming;
        if self.shared.open.lock().by_id.len() >= self.shared.spec.jobs_max {
            return done(Err(JobError::Busy(TOO_MANY)));
        }
        let id = journal.next_id();
        let (now, since) = (unix_ms(), journal.clock().now());
        let result = protocol::failed_job(error.clone(), &envelope);
        let live_job = self.shared.remember(&OpenJob {
            id,
            model: Arc::clone(&model),
            key: key.clone(),
            state: State::Failed,
            attempts: 0,
            suspicion: Suspicion::None,
            crashes: 0,
            crashes_alone: 0,
            error: None,
            cancelled: false,
            accepted: now,
            next: None,
            deadline,
            pending: Some(since),
            queue: queue.clone(),
            trace: trace.clone(),
            from_queue,
        });
        let job =
            NewJob { id, model, key, envelope, accepted: now, deadline, trace, idempotency, from_queue };
        let finish = Finish {
            id,
            state: State::Failed,
            attempts: 0,
            started: None,
            finished: now,
            result: Some(result.clone()),
            error: Some(error),
            queue: queue.clone(),
            since,
        };
        let jobs = Arc::clone(self);
        journal.refuse(job, finish, move |accepted| match accepted {
            Ok(Accepted::New) => {
                jobs.ended(&live_job, queue, since, result);
                done(Ok(id));
            }
            Ok(Accepted::Known(known)) => {
                jobs.shared.done_with(&live_job);
                done(Ok(known));
            }
            Err(error) => {
                jobs.shared.done_with(&live_job);
                done(Err(job_error(&error)));
            }
        });
    }
}

/// The idempotency key of a caller's request: the caller's own name for it, for one model.
#[must_use]
pub fn idempotency_key(key: Option<&str>, model: &str, name: &str, body: &[u8]) -> IdempotencyKey {
    // Lengths before the parts: no two different ones read the same.
    let key = key.unwrap_or_default();
    IdempotencyKey {
        name: format!("call:{}:{key}:{}:{model}:{name}", key.len(), model.len()),
        digest: Sha256::digest(body).into(),
    }
}

pub(super) fn job_error(error: &AcceptError) -> JobError {
    match error {
        AcceptError::Conflict(_) => JobError::Conflict(error.to_string()),
        AcceptError::FullOfNames => JobError::Busy(
            "too many names in Idempotency-Key are remembered (server.idempotency_window_seconds, server.job_store_bytes_max)",
        ),
        AcceptError::Unfit(_) => JobError::TooLarge(error.to_string()),
        AcceptError::Busy => JobError::Busy("too many jobs wait to be written"),
        AcceptError::Full => {
            JobError::Busy("the journal is full of jobs that are not done with (server.job_store_bytes_max)")
        }
        AcceptError::Unwritable(_) => JobError::Unavailable(error.to_string()),
        AcceptError::Closed => closed(),
    }
}
