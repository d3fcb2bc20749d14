//! One job that isn't done with, as this process knows it beside the journal.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use modalkit_journal::{JobId, Slot};
use modalkit_loader::Item;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{
    envelope::Parts,
    runner::{Event, Inbox},
};
use crate::{
    access::ConcurrencyPermit,
    admission::JobPermit,
    dispatch::Queue,
    job::{JobError, Recorder, Reply},
    telemetry::Metrics,
    trail::Trail,
};

/// One job.
pub(super) struct Entry {
    pub(super) id: JobId,
    pub(super) model: Arc<str>,
    /// When it was accepted, where this process did it.
    pub(super) accepted: Option<Instant>,
    /// After this nobody wants its answer.
    pub(super) deadline: Option<Instant>,
    pub(super) trace: Option<String>,
    /// Somebody took it back.
    pub(super) cancelled: AtomicBool,
    pub(super) live: Mutex<Live>,
}

/// What changes about it.
pub(super) struct Live {
    pub(super) phase: Phase,
    /// The queue that it is in, and its number there: a model that comes again has another.
    pub(super) queued: Option<(Arc<Queue>, modalkit_batch::JobId)>,
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
pub(super) enum Phase {
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
    pub(super) parts: Parts,
}

/// What saves work on a job's first attempt.
#[derive(Default)]
pub(super) struct Head {
    pub(super) item: Option<Item>,
    pub(super) trail: Option<Arc<Trail>>,
}

impl Entry {
    /// One that nobody has run.
    #[cfg(test)]
    pub(super) fn of_tests(id: JobId, model: &str) -> Self {
        Self {
            id,
            model: model.into(),
            accepted: None,
            deadline: None,
            trace: None,
            cancelled: AtomicBool::new(false),
            live: Mutex::new(Live::new(Phase::Waiting)),
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// Whether it has ended, on disk; else somebody is told when it has.
    pub(super) fn wait(&self) -> Option<oneshot::Receiver<()>> {
        let mut live = self.live.lock();
        if live.phase == Phase::Ended {
            return None;
        }
        // Callers that came and went would add up while it waits.
        live.waiting.retain(|waiting| !waiting.is_closed());
        let (tell, told) = oneshot::channel();
        live.waiting.push(tell);
        Some(told)
    }
}

impl Live {
    pub(super) fn new(phase: Phase) -> Self {
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

/// One attempt on its way through the model's queue: its end is told to the runner, whatever happens to it.
pub(super) struct Attempt {
    pub(super) entry: Arc<Entry>,
    pub(super) slot: Arc<Slot>,
    pub(super) inbox: Arc<Inbox>,
    /// Keeps the host from exiting until this is told; `None` once it is.
    pub(super) permit: Option<JobPermit>,
    pub(super) began: AtomicBool,
    pub(super) metrics: Arc<Metrics>,
}

impl Recorder for Attempt {
    fn begins(&self) {
        // First: a plugin that takes the host down must be found here afterwards.
        self.slot.begins();
        self.began.store(true, Ordering::SeqCst);
        self.metrics.jobs.running.inc();
        let mut live = self.entry.live.lock();
        live.phase = Phase::Running;
        live.queued = None;
        live.started = Some(modalkit_journal::unix_ms());
    }

    fn answered(mut self: Box<Self>, reply: Reply) {
        self.tell(reply);
    }

    fn is_abandoned(&self) -> bool {
        self.entry.is_cancelled()
    }
}

impl Attempt {
    fn tell(&mut self, reply: Reply) {
        let Some(permit) = self.permit.take() else { return };
        let began = self.began.load(Ordering::SeqCst);
        if began {
            self.metrics.jobs.running.dec();
        }
        self.inbox.put(Event::Answered { entry: Arc::clone(&self.entry), reply, began, permit });
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.tell(Err(JobError::Lost));
    }
}
