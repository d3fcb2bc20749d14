//! One job from its acceptance until it has ended and its result is delivered, as this process knows it beside the journal. It owns the
//! job's phase: each change of it is a function here.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use modalkit_batch::ArrivalId;
use modalkit_engine::Decoded;
use modalkit_journal::{JobId, Suspicion, unix_ms};
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
    phase: JobPhase,
    /// What is known of it by the deaths of its hosts.
    pub(super) suspicion: Suspicion,
    /// How often a host died that it may have ended, and how often it was alone then and nothing else is known to have been the cause.
    pub(super) crashes: u32,
    pub(super) crashes_alone: u32,
    pub(super) attempts: u32,
    /// When the last attempt began.
    pub(super) started: Option<u64>,
    /// When the next one may begin, in milliseconds since 1970: for people, who look at clocks.
    pub(super) next: Option<u64>,
    /// Why the last one failed, or how it ended its host.
    pub(super) error: Option<String>,
    /// As long as it is kept in memory; the journal has it as well.
    pub(super) input: Option<Input>,
    /// Those who wait for its end.
    pub(super) waiting: Vec<oneshot::Sender<()>>,
    /// It counts among its key's calls until it has ended.
    pub(super) key_permit: Option<Arc<ConcurrencyPermit>>,
    /// Attempts to deliver its message.
    pub(super) delivery_attempts: u32,
    /// Why the last of these failed.
    pub(super) delivery_error: Option<String>,
}

/// Where it stands.
#[derive(Clone)]
pub(super) enum JobPhase {
    /// It is being written to the journal for the first time.
    Accepting,
    /// It waits for room in its model's queue, or for its next attempt.
    Waiting,
    /// It is in this queue, under this number: a model that comes again has another.
    Handed(Arc<Queue>, ArrivalId),
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
        if matches!(progress.phase, JobPhase::Ended) {
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
            JobPhase::Accepting | JobPhase::Waiting | JobPhase::Handed(..) => false,
        }
    }

    pub(super) fn phase(&self) -> &JobPhase {
        &self.phase
    }

    /// Whether its batch runs.
    pub(super) fn is_running(&self) -> bool {
        matches!(self.phase, JobPhase::Running)
    }

    /// It waits for its turn: it is accepted, or came back without having run.
    pub(super) fn wait_for_turn(&mut self) {
        self.phase = JobPhase::Waiting;
    }

    /// Its model's queue has taken it.
    pub(super) fn hand_over(&mut self, queue: Arc<Queue>, number: ArrivalId) {
        self.phase = JobPhase::Handed(queue, number);
    }

    /// Its batch begins.
    pub(super) fn begin(&mut self) {
        self.phase = JobPhase::Running;
        self.started = Some(unix_ms());
    }

    /// Its attempt failed with this, and another may begin at that time, in milliseconds since 1970.
    pub(super) fn retry_at(&mut self, next: u64, error: String) {
        self.phase = JobPhase::Waiting;
        self.next = Some(next);
        self.error = Some(error);
    }

    /// It has ended, and its end is about to be written; `false` where that was so before.
    pub(super) fn end(&mut self) -> bool {
        let ends = !matches!(self.phase, JobPhase::Ending | JobPhase::Ended);
        if ends {
            self.phase = JobPhase::Ending;
        }
        ends
    }

    /// Its end is on disk. Gives those who wait for that.
    pub(super) fn conclude(&mut self) -> Vec<oneshot::Sender<()>> {
        self.phase = JobPhase::Ended;
        self.key_permit = None;
        std::mem::take(&mut self.waiting)
    }

    pub(super) fn new(phase: JobPhase) -> Self {
        Self {
            phase,
            suspicion: Suspicion::None,
            crashes: 0,
            crashes_alone: 0,
            attempts: 0,
            started: None,
            next: None,
            error: None,
            input: None,
            waiting: Vec::new(),
            key_permit: None,
            delivery_attempts: 0,
            delivery_error: None,
        }
    }
}
