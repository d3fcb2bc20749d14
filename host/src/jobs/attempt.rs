//! One attempt of a job, from the model's queue to its end. It tells the runner how it ended, and never decides what follows.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use modalkit_journal::Slot;

use super::{
    inbox::{Event, Inbox},
    live_job::LiveJob,
};
use crate::{
    insight::metrics::Metrics,
    work::{JobError, JobPermit, Recorder, Reply},
};

/// One attempt on its way through the model's queue: its end is told to the runner, whatever happens to it.
pub(super) struct Attempt {
    pub(super) live_job: Arc<LiveJob>,
    pub(super) slot: Arc<Slot>,
    pub(super) inbox: Arc<Inbox>,
    /// Keeps the host from exiting until this is told; `None` once it is.
    pub(super) permit: Option<JobPermit>,
    pub(super) began: AtomicBool,
    pub(super) metrics: Arc<Metrics>,
}

impl Recorder for Attempt {
    fn begins(&self) {
        // First: if the plugin ends the host, the next start must find this job here.
        self.slot.begins();
        self.began.store(true, Ordering::SeqCst);
        self.metrics.jobs.running.inc();
        self.live_job.progress.lock().begin();
    }

    fn comes_back(&self) {
        self.began.store(false, Ordering::SeqCst);
        self.metrics.jobs.running.dec();
        // Nowhere that it could be taken from: its end is on its way.
        self.live_job.progress.lock().wait_for_turn();
        self.slot.waits();
    }

    fn answered(mut self: Box<Self>, reply: Reply) {
        self.tell(reply);
    }

    fn is_abandoned(&self) -> bool {
        self.live_job.is_cancelled()
    }
}

impl Attempt {
    fn tell(&mut self, reply: Reply) {
        let Some(permit) = self.permit.take() else { return };
        let began = self.began.load(Ordering::SeqCst);
        if began {
            self.metrics.jobs.running.dec();
        }
        self.inbox.put(Event::Answered { live_job: Arc::clone(&self.live_job), reply, began, permit });
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.tell(Err(JobError::Lost));
    }
}
