//! The jobs that aren't done with: by id, how many of each model haven't ended, and the bytes of their inputs in memory. It owns the limits on
//! these, and never knows what becomes of a job.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use modalkit_batch::ArrivalId;
use modalkit_journal::{JobId, OpenJob, State, unix_ms};
use parking_lot::Mutex;

use super::live_job::{Input, JobPhase, JobProgress, LiveJob};
use crate::{config::JobSpec, insight::metrics::Metrics, pipeline::Queue, work::JobError};

/// Bytes of inputs that wait in memory; those of further jobs are read again when their turn comes.
pub(super) const INPUT_BYTES_MAX: usize = 64 << 20;

pub(super) const TOO_MANY: &str = "too many asynchronous jobs are not done with (server.jobs_max)";

/// What the parts of this module share.
pub(super) struct Shared {
    pub(super) open: Mutex<Open>,
    pub(super) spec: JobSpec,
    pub(super) metrics: Arc<Metrics>,
}

/// The jobs that aren't done with.
#[derive(Default)]
pub(super) struct Open {
    pub(super) by_id: HashMap<JobId, Arc<LiveJob>>,
    /// Those that haven't ended, by model.
    unended: HashMap<Arc<str>, usize>,
    /// Bytes of their inputs in memory.
    input_bytes: usize,
}

impl Shared {
    pub(super) fn find(&self, id: JobId) -> Option<Arc<LiveJob>> {
        self.open.lock().by_id.get(&id).cloned()
    }

    /// Counts a new job in, where there is room for it.
    pub(super) fn admit(&self, live_job: &Arc<LiveJob>, input_bytes: usize) -> Result<(), JobError> {
        let mut open = self.open.lock();
        if open.by_id.len() >= self.spec.jobs_max {
            return Err(JobError::Busy(TOO_MANY));
        }
        if open.unended.get(&live_job.model).copied().unwrap_or_default() >= self.spec.jobs_per_model_max {
            return Err(JobError::Busy(
                "too many asynchronous jobs of this model are unfinished (server.jobs_per_model_max)",
            ));
        }
        if open.input_bytes + input_bytes > INPUT_BYTES_MAX {
            // The journal will have it.
            live_job.progress.lock().input = None;
        } else {
            open.input_bytes += input_bytes;
        }
        open.count_unended(&live_job.model);
        open.by_id.insert(live_job.id, Arc::clone(live_job));
        Ok(())
    }

    /// Takes a job out again that wasn't accepted after all.
    pub(super) fn withdraw(&self, live_job: &LiveJob) {
        self.unended_less(live_job);
        self.done_with(live_job);
    }

    /// Counts a job as ended.
    pub(super) fn unended_less(&self, live_job: &LiveJob) {
        let input = live_job.progress.lock().input.take();
        let mut open = self.open.lock();
        open.input_bytes -= input.map_or(0, |input| input.envelope.len());
        if let Some(count) = open.unended.get_mut(&live_job.model) {
            *count -= 1;
            if *count == 0 {
                open.unended.remove(&live_job.model);
            }
        }
    }

    /// Keeps what came in for a job until it has ended.
    pub(super) fn keep_input(&self, live_job: &LiveJob, input: &Input) {
        let mut progress = live_job.progress.lock();
        if progress.input.is_none() {
            progress.input = Some(input.clone());
            drop(progress);
            self.open.lock().input_bytes += input.envelope.len();
        }
    }

    /// Nothing more will become of a job.
    pub(super) fn done_with(&self, live_job: &LiveJob) {
        self.open.lock().by_id.remove(&live_job.id);
    }

    /// Where the jobs wait that were handed to models and haven't begun.
    pub(super) fn handed(&self) -> Vec<(Arc<Queue>, ArrivalId)> {
        let open = self.open.lock();
        let queued = |live_job: &Arc<LiveJob>| match live_job.progress.lock().phase() {
            JobPhase::Handed(queue, number) => Some((Arc::clone(queue), *number)),
            _ => None,
        };
        open.by_id.values().filter_map(queued).collect()
    }

    pub(super) fn remember(&self, job: &OpenJob) -> Arc<LiveJob> {
        let phase = if job.state == State::Queued { JobPhase::Waiting } else { JobPhase::Ended };
        let mut progress = JobProgress::new(phase);
        (progress.attempts, progress.next) = (job.attempts, job.next);
        (progress.suspicion, progress.crashes, progress.crashes_alone) =
            (job.suspicion, job.crashes, job.crashes_alone);
        progress.error.clone_from(&job.error);
        let live_job = Arc::new(LiveJob {
            id: job.id,
            model: Arc::clone(&job.model),
            accepted: None,
            deadline: job.deadline.and_then(|deadline| moment_of(deadline, unix_ms())),
            trace: job.trace.clone(),
            from_queue: job.from_queue,
            cancelled: AtomicBool::new(job.cancelled),
            progress: Mutex::new(progress),
        });
        self.open.lock().by_id.insert(job.id, Arc::clone(&live_job));
        live_job
    }
}

impl Open {
    pub(super) fn count_unended(&mut self, model: &Arc<str>) {
        *self.unended.entry(Arc::clone(model)).or_default() += 1;
    }
}

/// The moment of a time of day in milliseconds since 1970, by what the system's clock says now; later changes of it don't move it.
/// `None` where it is farther away than this process can tell.
pub(super) fn moment_of(unix_ms: u64, now_unix_ms: u64) -> Option<Instant> {
    Instant::now().checked_add(Duration::from_millis(unix_ms.saturating_sub(now_unix_ms)))
}
