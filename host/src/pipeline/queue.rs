//! One model's queue: jobs go in, and the lanes of its replicas take batches out. It owns the batcher, who waits for a batch and who must be
//! woken; it never knows how a batch is run or where a job came from.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use modalkit_batch::{ArrivalId, Batch, Batcher, Closed, Full, Measure, Next, Policy, Wait, Waiting};
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::{
    config::{BatchPolicy, BatchWait},
    insight::metrics::ModelMetrics,
    work::{Deadline, Job, JobError, Replies},
};

/// One model's queue, shared by those who push jobs and the lanes that run batches.
pub struct Queue {
    state: Mutex<State>,
    /// A lane waits here for a batch; which one wakes doesn't matter.
    work: Condvar,
    /// A lane waits here while it is paused.
    paused: Condvar,
    metrics: Arc<ModelMetrics>,
}

struct State {
    batcher: Batcher<Job>,
    /// Lanes that want a batch, and since when.
    free: Vec<(LaneId, Instant)>,
    /// Of those, the lanes that wait on a condition variable.
    waiting_lanes: usize,
    /// The lane that will wake when the oldest incomplete batch has waited long enough, and when that is.
    timer: Option<(LaneId, Instant)>,
    next_lane: u64,
    /// Whether jobs are taken: somebody will run them.
    open: bool,
    /// The fewest lanes that were free at once since [`Queue::load`] was last asked.
    fewest_free: usize,
}

/// One thread that runs batches, as the queue knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneId(u64);

/// What a lane is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneState {
    /// Take the next batch.
    Active,
    /// Take none until this changes: its generation doesn't serve, or its instance is changing.
    Paused,
    /// End.
    Stopped,
}

/// Jobs that were queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queued {
    /// The first one's id.
    pub first: ArrivalId,
    /// The caller has promised to call [`Queue::wake`].
    pub must_wake: bool,
}

/// A batch, taken.
pub struct Taken {
    /// Its jobs, and why it closed.
    pub batch: Batch<Job>,
    /// When it was taken.
    pub at: Instant,
    /// Since when a lane was free for it.
    pub free_since: Instant,
}

/// How a batch ended whose time says something of the next one's.
#[derive(Clone, Copy, Debug)]
pub struct BatchEnd {
    /// Its jobs.
    pub jobs: usize,
    /// What it took, without waiting for callers who don't read.
    pub took: Duration,
}

/// How busy a model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLoad {
    /// Jobs that wait.
    pub queued: usize,
    /// Lanes that want work now.
    pub free_lanes: usize,
    /// Lanes that nobody needed since this was last asked, at the busiest moment.
    pub spare_lanes: usize,
}

impl Queue {
    /// An empty queue.
    #[must_use]
    pub fn new(policy: BatchPolicy, metrics: Arc<ModelMetrics>) -> Self {
        let state = State {
            batcher: Batcher::new(of_config(policy)),
            free: Vec::new(),
            waiting_lanes: 0,
            timer: None,
            next_lane: 0,
            open: false,
            fewest_free: 0,
        };
        Self { state: Mutex::new(state), work: Condvar::new(), paused: Condvar::new(), metrics }
    }

    /// Queues jobs, all or none. The ids are consecutive; the first is returned. Where it says so, the caller must see to
    /// it that [`Queue::wake`] is called soon: after the other requests that have come at the same time, so that one
    /// wake-up serves them all.
    ///
    /// # Errors
    /// [`JobError::TooLarge`] where the queue could never hold as many, [`JobError::Busy`] where it can't now.
    pub fn push<const N: usize>(
        &self,
        jobs: [Job; N],
        deadline: Option<Deadline>,
    ) -> Result<Queued, JobError> {
        self.push_all(jobs.into_iter(), deadline)
    }

    /// As [`Queue::push`], for a number that isn't known beforehand.
    ///
    /// # Errors
    /// As [`Queue::push`].
    pub fn push_all(
        &self,
        jobs: impl ExactSizeIterator<Item = Job>,
        deadline: Option<Deadline>,
    ) -> Result<Queued, JobError> {
        let count = jobs.len();
        let mut state = self.state.lock();
        let queue_max = state.batcher.policy().queue_max;
        if count > queue_max {
            return Err(too_many(count, queue_max));
        }
        if !state.open {
            return Err(JobError::Unavailable("the model stopped serving".into()));
        }
        let now = Instant::now();
        let measured = jobs.map(|job| {
            let measure = measure_of(&job);
            (job, measure)
        });
        let pushed = state.batcher.push(now, measured, deadline.map(|deadline| deadline.0));
        let first = match pushed {
            Ok(first) => first,
            Err(Full(jobs)) => {
                drop(state);
                drop(jobs);
                return Err(JobError::Busy("the model's queue is full (queue_max)"));
            }
        };
        self.metrics.queued.set(state.batcher.len() as i64);
        Ok(Queued { first, must_wake: state.wants_a_lane(now) })
    }

    /// Queues a job that is run next, without company. The caller wakes a lane as for [`Queue::push`].
    ///
    /// # Errors
    /// [`JobError::Unavailable`].
    pub fn push_alone(&self, job: Job) -> Result<Queued, JobError> {
        let mut state = self.state.lock();
        if !state.open {
            return Err(JobError::Unavailable("the model stopped serving".into()));
        }
        let now = Instant::now();
        let first = state.batcher.push_alone(now, job);
        self.metrics.queued.set(state.batcher.len() as i64);
        Ok(Queued { first, must_wake: state.wants_a_lane(now) })
    }

    /// Takes jobs back that were in a batch which came to nothing: each is run next, without company, or, where nobody runs it any more,
    /// handed back.
    pub fn take_back(&self, jobs: Vec<Waiting<Job>>) -> Vec<Job> {
        let mut state = self.state.lock();
        if !state.open {
            drop(state);
            return jobs.into_iter().map(|waiting| waiting.job).collect();
        }
        jobs.into_iter().for_each(|job| state.batcher.take_back(job));
        self.metrics.queued.set(state.batcher.len() as i64);
        drop(state);
        self.work.notify_all();
        Vec::new()
    }

    /// Wakes a lane for what was pushed.
    pub fn wake(&self) {
        let wake = self.state.lock().wants_a_lane(Instant::now());
        // After the lock is released, or the lane would wake only to wait for it.
        if wake {
            self.work.notify_one();
        }
    }

    /// Takes jobs out whose caller has left; those that were taken before are passed over.
    pub fn cancel(&self, first: ArrivalId, count: usize) {
        let mut state = self.state.lock();
        let cancelled: Vec<Job> =
            (0..count).filter_map(|offset| state.batcher.cancel(first.plus(offset))).collect();
        self.metrics.queued.set(state.batcher.len() as i64);
        drop(state);
        self.metrics.skipped_cancelled.inc_by(cancelled.len() as u64);
    }

    /// Makes batches like this from now on.
    pub fn set_policy(&self, policy: BatchPolicy) {
        self.state.lock().batcher.set_policy(of_config(policy));
        // Lanes that wait for a batch to fill look at the new limits.
        self.work.notify_all();
    }

    /// Takes jobs from now on.
    pub fn open(&self) {
        self.state.lock().open = true;
    }

    /// Takes no more jobs, and hands out those that wait. Under one lock: no job can slip in between.
    #[must_use]
    pub fn close(&self) -> Vec<Job> {
        let mut state = self.state.lock();
        state.open = false;
        self.metrics.queued.set(0);
        state.batcher.clear()
    }

    /// From now on no batch waits to be filled.
    pub fn drain(&self) {
        self.state.lock().batcher.drain();
        self.work.notify_all();
    }

    /// How busy the model is, and was since this was last asked; for the fleet alone.
    #[must_use]
    pub fn load(&self) -> QueueLoad {
        let mut state = self.state.lock();
        let free_lanes = state.free.len();
        let spare_lanes = std::mem::replace(&mut state.fewest_free, free_lanes);
        QueueLoad { queued: state.batcher.len(), free_lanes, spare_lanes }
    }

    /// A new lane.
    #[must_use]
    pub fn lane(&self) -> LaneId {
        let mut state = self.state.lock();
        state.next_lane += 1;
        LaneId(state.next_lane)
    }

    /// Changes what the states of lanes depend on. No lane takes a batch meanwhile, so that all see the change at once, and every lane
    /// checks its state afterwards.
    pub fn update_lane_states(&self, change: impl FnOnce()) {
        let _state = self.state.lock();
        change();
        self.work.notify_all();
        self.paused.notify_all();
    }

    /// Waits for the next batch for a lane, whose last one has `ended` so, while `state_of_lane` is active. `None` when it is stopped. Where none is ready,
    /// replies that are still to be sent are sent first.
    pub fn next_batch(
        &self,
        lane: LaneId,
        state_of_lane: impl Fn() -> LaneState,
        replies: &mut Replies,
        ended: Option<BatchEnd>,
    ) -> Option<Taken> {
        let mut state = self.state.lock();
        let free_since = Instant::now();
        // The clock is read again after each wait, and not before.
        let mut now = free_since;
        if let Some(BatchEnd { jobs, took }) = ended {
            state.batcher.batch_ended(now, jobs, took);
        }
        state.free.push((lane, free_since));
        loop {
            match state_of_lane() {
                LaneState::Active => {}
                LaneState::Paused | LaneState::Stopped if !replies.is_empty() => {
                    MutexGuard::unlocked(&mut state, || replies.send());
                    continue;
                }
                LaneState::Paused => {
                    state.remove_free(lane);
                    // Another lane takes over the timer or the work that this one was woken for.
                    self.notify_next(&state, now);
                    self.paused.wait(&mut state);
                    now = Instant::now();
                    state.free.push((lane, now));
                    continue;
                }
                LaneState::Stopped => {
                    state.remove_free(lane);
                    self.notify_next(&state, now);
                    return None;
                }
            }
            let expired = state.batcher.expire(now);
            if !expired.is_empty() {
                MutexGuard::unlocked(&mut state, || self.answer_expired(expired));
                now = Instant::now();
                continue;
            }
            let since = state.free_since().unwrap_or(free_since);
            match state.batcher.next(now, since) {
                Next::Batch(batch) => {
                    state.remove_free(lane);
                    self.metrics.queued.set(state.batcher.len() as i64);
                    self.notify_next(&state, now);
                    drop(state);
                    self.observe(&batch, now, since);
                    return Some(Taken { batch, at: now, free_since: since });
                }
                Next::Wait(_) | Next::Idle if !replies.is_empty() => {
                    MutexGuard::unlocked(&mut state, || replies.send());
                }
                Next::Wait(until) if state.timer.is_none_or(|(holder, at)| holder == lane || until < at) => {
                    state.timer = Some((lane, until));
                    state.waiting_lanes += 1;
                    self.work.wait_until(&mut state, until);
                    state.waiting_lanes -= 1;
                    state.drop_timer(lane);
                }
                Next::Wait(_) | Next::Idle => self.sleep(&mut state),
            }
            now = Instant::now();
        }
    }

    fn sleep(&self, state: &mut MutexGuard<'_, State>) {
        state.waiting_lanes += 1;
        self.work.wait(state);
        state.waiting_lanes -= 1;
    }

    /// What is left in the queue needs a lane that runs it or waits for its time.
    fn notify_next(&self, state: &State, now: Instant) {
        if state.wants_a_lane(now) {
            self.work.notify_one();
        }
    }

    fn observe(&self, batch: &Batch<Job>, now: Instant, free_since: Instant) {
        match batch.closed {
            Closed::Full => self.metrics.closed_full.inc(),
            Closed::Costly => self.metrics.closed_costly.inc(),
            Closed::Waited => self.metrics.closed_waited.inc(),
            Closed::Drained => self.metrics.closed_drained.inc(),
            Closed::Alone => self.metrics.closed_alone.inc(),
        }
        self.metrics.batch_size.observe(batch.jobs.len() as f64);
        if let Some(oldest) = batch.jobs.first() {
            let wait = now.saturating_duration_since(oldest.arrived.max(free_since));
            self.metrics.batch_wait.observe(wait.as_secs_f64());
        }
        for job in &batch.jobs {
            self.metrics.queue_wait.observe(now.saturating_duration_since(job.arrived).as_secs_f64());
        }
    }

    fn answer_expired(&self, expired: Vec<Job>) {
        self.metrics.skipped_expired.inc_by(expired.len() as u64);
        for job in expired {
            job.reply.send(Err(JobError::DeadlinePassed));
        }
    }
}

impl State {
    /// Whether a lane that waits should wake: to run a batch, or to wait for the time of one that isn't full, where none does or until too late.
    fn wants_a_lane(&self, now: Instant) -> bool {
        if self.waiting_lanes == 0 {
            return false;
        }
        let Some(at) = self.batcher.next_at(now, self.free_since().unwrap_or(now)) else { return false };
        at <= now
            || self.timer.is_none_or(|(_, timer)| {
                // It came to be earlier; for less than a quarter of what is left to wait, nobody is woken.
                timer.saturating_duration_since(at) * 4 > timer.saturating_duration_since(now)
            })
    }

    /// Since when a lane has been free, where one is.
    fn free_since(&self) -> Option<Instant> {
        self.free.iter().map(|(_, since)| *since).min()
    }

    /// Another lane may have taken it over meanwhile.
    fn drop_timer(&mut self, lane: LaneId) {
        self.timer.take_if(|(holder, _)| *holder == lane);
    }

    fn remove_free(&mut self, lane: LaneId) {
        self.free.retain(|(free, _)| *free != lane);
        self.fewest_free = self.fewest_free.min(self.free.len());
        self.drop_timer(lane);
    }
}

fn of_config(policy: BatchPolicy) -> Policy {
    let BatchPolicy { max_batch_size, max_batch_cost, wait, queue_max } = policy;
    let wait = match wait {
        BatchWait::Fixed(wait) => Wait::Fixed(wait),
        BatchWait::Adaptive => Wait::Adaptive,
    };
    Policy { max_batch_size, max_batch_cost, wait, queue_max }
}

/// That of a job which nobody has looked at is as if its pipeline said nothing.
fn measure_of(job: &Job) -> Measure {
    let measure = job.decoded.as_ref().map(|decoded| decoded.measure);
    measure.map_or_else(Measure::default, |measure| Measure { cost: measure.cost, shape: measure.shape })
}

/// The error for more items than a queue can ever hold.
#[must_use]
pub fn too_many(count: usize, queue_max: usize) -> JobError {
    JobError::TooLarge(format!(
        "expected at most {queue_max} items (queue_max), found {count}: split them over several requests"
    ))
}
