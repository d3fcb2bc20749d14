//! A lane of a replica: the batch that it runs, those who wait for it, and what it needs for that. It never takes a batch, and never knows what
//! the stages are.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use modalkit_batch::ArrivalId;
use modalkit_device::Lease;
use modalkit_engine::{Instance, Payload};
use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{Generation, Queue, stages::StageTimes};
use crate::{
    insight::{BatchTimings, JobRun, JobTimings, metrics::ModelMetrics},
    work::{Deaths, JobError, ReplyHandle, RequestId},
};

/// A lane, as a batch on it sees it.
pub(super) struct Seat<'r> {
    /// The replica's number.
    pub(super) number: u64,
    pub(super) instance: &'r dyn Instance,
    pub(super) lane: &'r LaneSlot,
    pub(super) context: &'r LaneContext,
    /// The replica has no other.
    pub(super) is_only_lane: bool,
    /// Where several batches run at once in a process of its own.
    pub(super) company: Option<&'r RwLock<()>>,
    /// The replica's devices.
    pub(super) lease: Option<&'r Lease>,
}

/// Who runs beside a batch.
#[expect(dead_code, reason = "what it holds is a lock")]
pub(super) enum Company<'r> {
    /// Others may.
    Any(RwLockReadGuard<'r, ()>),
    /// Nobody does.
    Alone(RwLockWriteGuard<'r, ()>),
    /// There are no others whom it could harm, or it can't be kept from harming them.
    None,
}

/// What one of its threads runs.
#[derive(Default)]
pub(super) struct LaneSlot {
    pub(super) running: Mutex<Option<Running>>,
}

/// The replies of the batch that a lane runs. Whoever takes them answers: the lane when it is done, or the fleet when
/// the batch has overrun its time.
pub(super) struct Running {
    /// Later by what the batch has waited for callers who don't read.
    pub(super) started: Instant,
    /// It waits for one now, since then.
    pub(super) waits_since: Option<Instant>,
    /// The limit that it overran, for which its process was ended.
    pub(super) overran: Option<Duration>,
    /// By the places of items; `None` of those that have their answer.
    pub(super) waiters: Vec<Option<Waiter>>,
}

/// Who waits for an item, and all that is needed to run it again.
pub(super) struct Waiter {
    pub(super) reply: ReplyHandle,
    pub(super) request_id: RequestId,
    pub(super) input: Payload,
    pub(super) id: ArrivalId,
    pub(super) arrived: Instant,
    pub(super) deaths: Deaths,
    /// Chunks of it have gone out: it can't begin again.
    pub(super) has_begun: bool,
}

/// What a model's lanes have in common.
pub(super) struct LaneContext {
    pub(super) generation: Arc<Generation>,
    pub(super) queue: Arc<Queue>,
    pub(super) metrics: Arc<ModelMetrics>,
    /// Milliseconds that a batch waits for a caller who doesn't read; as the model has it now.
    pub(super) stream_wait_ms: AtomicU64,
    /// Batches of which something went well.
    pub(super) good_batches: AtomicU64,
    /// Inputs that were found to end their process; since the fleet looked last.
    pub(super) convictions: AtomicU32,
}

impl Seat<'_> {
    /// Held while a batch runs: beside one without company, no other does, where they share a process of their own.
    pub(super) fn company(&self, is_alone: bool) -> Company<'_> {
        match (self.company, is_alone) {
            (Some(company), true) => Company::Alone(company.write()),
            (Some(company), false) => Company::Any(company.read()),
            (None, _) => Company::None,
        }
    }
}

impl Running {
    pub(super) fn has_run(&self, now: Instant) -> Duration {
        self.waits_since.unwrap_or(now).saturating_duration_since(self.started)
    }
}

impl LaneSlot {
    /// Notes since when the batch waits for a caller who doesn't read, or that it no longer does: its own time stands still meanwhile.
    pub(super) fn note_wait(&self, since: Option<Instant>) {
        let mut running = self.running.lock();
        let Some(batch) = running.as_mut() else { return };
        if let Some(since) = std::mem::replace(&mut batch.waits_since, since) {
            batch.started += since.elapsed();
        }
    }

    /// The batch, or what is left of it, begins again; `false` when it was given up.
    pub(super) fn starts_again(&self) -> bool {
        let mut running = self.running.lock();
        let Some(batch) = running.as_mut() else { return false };
        batch.started = Instant::now();
        true
    }

    pub(super) fn with_waiter<T>(&self, place: usize, look: impl FnOnce(&mut Waiter) -> T) -> Option<T> {
        let mut running = self.running.lock();
        Some(look(running.as_mut()?.waiters.get_mut(place)?.as_mut()?))
    }

    pub(super) fn has_begun(&self, place: usize) -> bool {
        self.with_waiter(place, |waiter| waiter.has_begun).unwrap_or(true)
    }

    pub(super) fn note_begun(&self, place: usize) {
        self.with_waiter(place, |waiter| waiter.has_begun = true);
    }

    pub(super) fn request_id(&self, place: usize) -> Option<String> {
        self.with_waiter(place, |waiter| waiter.request_id.to_string())
    }

    /// Answers one whose input turned out to be unfit; says when it had come.
    pub(super) fn refuse(&self, place: usize, error: JobError) -> Option<Instant> {
        let mut running = self.running.lock();
        // It may have been given up.
        let waiter = running.as_mut().and_then(|batch| batch.waiters.get_mut(place)?.take());
        drop(running);
        let waiter = waiter?;
        waiter.reply.send(Err(error));
        Some(waiter.arrived)
    }
}

impl LaneContext {
    pub(super) fn stream_wait(&self) -> Duration {
        Duration::from_millis(self.stream_wait_ms.load(Ordering::Relaxed))
    }

    /// Lets batches wait so long for a caller who doesn't read.
    pub(super) fn set_stream_wait(&self, wait: Duration) {
        self.stream_wait_ms.store(wait.as_millis() as u64, Ordering::Relaxed);
    }

    pub(super) fn good_batches(&self) -> u64 {
        self.good_batches.load(Ordering::Relaxed)
    }

    /// Counts a batch. The one that fails its generation's probation is its last: the generation stops serving with it, and the
    /// reload decides what serves then.
    pub(super) fn count(&self, took: Duration, succeeded: bool) {
        if succeeded {
            self.good_batches.fetch_add(1, Ordering::Relaxed);
        }
        self.generation.batch_stats.count(took, succeeded, || self.generation.set_serves(false));
    }

    /// Counts what each stage took, and says it; `None` where it didn't come to all of them.
    pub(super) fn observe(
        &self,
        begun: Instant,
        times: &StageTimes,
        ended: Instant,
    ) -> Option<[Duration; 3]> {
        let (preprocessed, predicted) = (times.preprocessed?, times.predicted?);
        let stages = [
            preprocessed.saturating_duration_since(begun),
            predicted.saturating_duration_since(preprocessed),
            ended.saturating_duration_since(predicted),
        ];
        let histograms = [&self.metrics.preprocess, &self.metrics.predict, &self.metrics.postprocess];
        for (histogram, time) in histograms.into_iter().zip(stages) {
            histogram.observe(time.as_secs_f64());
        }
        Some(stages)
    }

    /// Records a batch's timings for those of its jobs that carry some.
    pub(super) fn record_timings(&self, mut batch: BatchTimings, timed: Vec<(Arc<JobTimings>, Instant)>) {
        let traced = timed.iter().filter_map(|(timings, _)| timings.span.clone()).collect();
        batch.span = self.metrics.traces.batch(&self.generation.spec.name, &batch, traced);
        let batch = Arc::new(batch);
        for (timings, arrived) in timed {
            timings.note(JobRun { arrived, batch: Arc::clone(&batch) });
        }
    }
}
