//! One job from its acceptance until it has ended and its result is delivered, as this process knows it beside the journal.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use modalkit_engine::Decoded;
use modalkit_journal::JobId;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::{access::ConcurrencyPermit, insight::JobTimings, pipeline::Queue, protocol::Envelope};

/// One job.
pub(super) struct LiveJob {
    pub(super) id: JobId,
    pub(super) model: Arc<str>,
    /// When it was accepted, where this process did it.
    pub(super) accepted: Option<Instant>,
    /// After this nobody wants its answer.
    pub(super) deadline: Option<Instant>,
    pub(super) trace: Option<String>,
    /// It was taken from a queue.
    pub(super) from_queue: bool,
    /// Somebody took it back.
    pub(super) cancelled: AtomicBool,
    pub(super) progress: Mutex<JobProgress>,
}

/// What changes about it.
pub(super) struct JobProgress {
    pub(super) phase: JobPhase,
    /// The queue that it is in, and its number there: a model that comes again has another.
    pub(super) queued: Option<(Arc<Queue>, modalkit_batch::ArrivalId)>,
    /// It was running when the host died last, and has not run to an end since.
    pub(super) suspect: bool,
    /// How often a host died while it was running, and how often it was the only job that was.
    pub(super) crashes: u32,
    pub(super) crashes_alone: u32,
    pub(super) attempts: u32,
    /// When the last attempt began.
    pub(super) started: Option<u64>,
    /// When the next one may begin, in milliseconds since 1970: for people, who look at clocks.
    pub(super) next: Option<u64>,
    /// Why the last one failed.
    pub(super) error: Option<String>,
    /// As long as it is kept in memory; the journal has it as well.
    pub(super) input: Option<Input>,
    /// Those who wait for its end.
    pub(super) waiting: Vec<oneshot::Sender<()>>,
    /// It counts among its key's calls until it has ended.
    pub(super) place: Option<Arc<ConcurrencyPermit>>,
    /// Attempts to deliver its message.
    pub(super) delivery_attempts: u32,
    /// Why the last of these failed.
    pub(super) delivery_error: Option<String>,
}

/// Where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobPhase {
    /// It is being written to the journal for the first time.
    Accepting,
    /// It waits for room in its model's queue, or for its next attempt.
    Waiting,
    /// It is in its model's queue.
    Handed,
    /// Its batch runs.
    Running,
    /// It has ended, and its end is being written.
    Ending,
    /// It has ended, on disk.
    Ended,
}

/// What came in.
#[derive(Clone)]
pub(super) struct Input {
    pub(super) envelope: Bytes,
    pub(super) parts: Envelope,
}

/// What saves work on a job's first attempt.
#[derive(Default)]
pub(super) struct FirstAttempt {
    pub(super) decoded: Option<Decoded>,
    pub(super) timings: Option<Arc<JobTimings>>,
}

impl LiveJob {
    /// One that nobody has run.
    #[cfg(test)]
    pub(super) fn of_tests(id: JobId, model: &str) -> Self {
        Self {
            id,
            model: model.into(),
            accepted: None,
            deadline: None,
            trace: None,
            from_queue: false,
            cancelled: AtomicBool::new(false),
            progress: Mutex::new(JobProgress::new(JobPhase::Waiting)),
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// `None` where its end is on disk; else a receiver that is told when it is.
    pub(super) fn wait(&self) -> Option<oneshot::Receiver<()>> {
        let mut progress = self.progress.lock();
        if progress.phase == JobPhase::Ended {
            return None;
        }
        // Callers that came and went would add up while it waits.
        progress.waiting.retain(|waiting| !waiting.is_closed());
        let (tell, told) = oneshot::channel();
        progress.waiting.push(tell);
        Some(told)
    }
}

impl JobProgress {
    /// Whether it runs, or ran and its end is not written: the journal says that it waits.
    pub(super) fn runs(&self) -> bool {
        match self.phase {
            JobPhase::Running => true,
            JobPhase::Ending | JobPhase::Ended => self.started.is_some(),
            JobPhase::Accepting | JobPhase::Waiting | JobPhase::Handed => false,
        }
    }

    pub(super) fn new(phase: JobPhase) -> Self {
        Self {
            phase,
            queued: None,
            suspect: false,
            crashes: 0,
            crashes_alone: 0,
            attempts: 0,
            started: None,
            next: None,
            error: None,
            input: None,
            waiting: Vec::new(),
            place: None,
            delivery_attempts: 0,
            delivery_error: None,
        }
    }
}
