//! Finds a model and feeds its batcher. It owns the served models and each one's queue, and never knows how a batch
//! is run or where a job came from.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use modalkit_batch::{Batch, Batcher, Closed, Full, JobId, Next, Policy};
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::{
    config::{BatchPolicy, ModelSpec},
    job::{Deadline, Job, JobError},
    pipeline::Model,
    telemetry::ModelMetrics,
};

/// The served models by name. Readers never wait: a change puts a new map in place.
#[derive(Default)]
pub struct Models {
    by_name: ArcSwap<BTreeMap<String, Arc<Model>>>,
    complete: AtomicBool,
    draining: AtomicBool,
}

impl Models {
    /// The model of this name, or the only one where none is named.
    ///
    /// # Errors
    /// [`JobError::UnknownModel`].
    pub fn find(&self, name: Option<&str>) -> Result<Arc<Model>, JobError> {
        let models = self.by_name.load();
        let found = match name {
            Some(name) => models.get(name),
            None if models.len() == 1 => models.values().next(),
            None => None,
        };
        found.cloned().ok_or_else(|| JobError::UnknownModel {
            name: name.map(ToOwned::to_owned),
            known: models.keys().cloned().collect(),
        })
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Arc<BTreeMap<String, Arc<Model>>> {
        self.by_name.load_full()
    }

    /// Whether every file that lay in the volumes at the start has become a model or been refused.
    #[must_use]
    pub fn are_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Says so.
    pub fn set_complete(&self) {
        self.complete.store(true, Ordering::Release);
    }

    /// Takes a model out: no request finds it any more.
    pub fn remove(&self, name: &str) {
        self.by_name.rcu(|models| {
            let mut models = BTreeMap::clone(models);
            models.remove(name);
            models
        });
    }

    /// Adds a model, unless one of this name is there; returns the one that is there now.
    pub fn add(&self, spec: ModelSpec, make: impl Fn(ModelSpec) -> Arc<Model>) -> Arc<Model> {
        let mut model = None;
        self.by_name.rcu(|models| {
            let mut models = BTreeMap::clone(models);
            let entry = models
                .entry(spec.name.clone())
                .or_insert_with(|| model.get_or_insert_with(|| make(spec.clone())).clone());
            model = Some(Arc::clone(entry));
            models
        });
        let model = model.expect("the closure ran");
        // After it was added: a drain that begins meanwhile sees the model, or this sees the drain.
        if self.draining.load(Ordering::SeqCst) {
            model.queue.drain();
        }
        model
    }

    /// The host is shutting down: from now on no batch of any model waits to be filled, of models that come later neither.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        self.all().values().for_each(|model| model.queue.drain());
    }
}

/// One model's queue, shared by those who push jobs and the lanes that run batches.
pub struct Queue {
    state: Mutex<State>,
    /// A lane waits here for a batch; which one wakes doesn't matter.
    work: Condvar,
    /// A lane waits here while it is not its turn.
    rest: Condvar,
    metrics: Arc<ModelMetrics>,
}

struct State {
    batcher: Batcher<Job>,
    /// Lanes that want a batch, and since when.
    free: Vec<(Lane, Instant)>,
    /// Lanes that sleep, of those.
    asleep: usize,
    /// The lane that will wake when the oldest incomplete batch has waited long enough.
    timer: Option<Lane>,
    next_lane: u64,
    /// Whether jobs are taken: somebody will run them.
    open: bool,
    /// The fewest lanes that were free at once since [`Queue::load`] was last asked.
    fewest_free: usize,
}

/// One thread that runs batches, as the queue knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane(u64);

/// What a lane is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Take the next batch.
    Work,
    /// Take none until this changes: its generation doesn't serve, or its instance is changing.
    Rest,
    /// End.
    Leave,
}

/// Jobs that were queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queued {
    /// The first one's id.
    pub first: JobId,
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

/// How busy a model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
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
            asleep: 0,
            timer: None,
            next_lane: 0,
            open: false,
            fewest_free: 0,
        };
        Self { state: Mutex::new(state), work: Condvar::new(), rest: Condvar::new(), metrics }
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
        let pushed = state.batcher.push(Instant::now(), jobs, deadline.map(|deadline| deadline.0));
        let first = match pushed {
            Ok(first) => first,
            Err(Full(jobs)) => {
                drop(state);
                drop(jobs);
                return Err(JobError::Busy("the model's queue is full (queue_max)"));
            }
        };
        self.metrics.queued.set(state.batcher.len() as i64);
        Ok(Queued { first, must_wake: state.wants_a_lane() })
    }

    /// Wakes a lane for what was pushed.
    pub fn wake(&self) {
        let wake = self.state.lock().wants_a_lane();
        // After the lock is released, or the lane would wake only to wait for it.
        if wake {
            self.work.notify_one();
        }
    }

    /// Takes jobs out whose caller has left; those that were taken before are passed over.
    pub fn cancel(&self, first: JobId, count: usize) {
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
    pub fn load(&self) -> Load {
        let mut state = self.state.lock();
        let free_lanes = state.free.len();
        let spare_lanes = std::mem::replace(&mut state.fewest_free, free_lanes);
        Load { queued: state.batcher.len(), free_lanes, spare_lanes }
    }

    /// A new lane.
    #[must_use]
    pub fn lane(&self) -> Lane {
        let mut state = self.state.lock();
        state.next_lane += 1;
        Lane(state.next_lane)
    }

    /// Changes whose turn it is. No lane takes a batch meanwhile, so that all see the change at once, and every lane looks at
    /// its turn afterwards.
    pub fn change_turns(&self, change: impl FnOnce()) {
        let _state = self.state.lock();
        change();
        self.work.notify_all();
        self.rest.notify_all();
    }

    /// Waits for the next batch for a lane, while `turn` says that it should. `None` when it should leave.
    pub fn next_batch(&self, lane: Lane, turn: impl Fn() -> Turn) -> Option<Taken> {
        let mut state = self.state.lock();
        let free_since = Instant::now();
        state.free.push((lane, free_since));
        loop {
            match turn() {
                Turn::Work => {}
                Turn::Rest => {
                    state.forget(lane);
                    // Another lane takes over the timer or the work that this one was woken for.
                    self.pass_on(&state);
                    self.rest.wait(&mut state);
                    state.free.push((lane, Instant::now()));
                    continue;
                }
                Turn::Leave => {
                    state.forget(lane);
                    self.pass_on(&state);
                    return None;
                }
            }
            let now = Instant::now();
            let expired = state.batcher.expire(now);
            if !expired.is_empty() {
                MutexGuard::unlocked(&mut state, || self.answer_expired(expired));
                continue;
            }
            let since = state.free.iter().map(|(_, since)| *since).min().unwrap_or(free_since);
            match state.batcher.next(now, since) {
                Next::Batch(batch) => {
                    state.forget(lane);
                    self.metrics.queued.set(state.batcher.len() as i64);
                    self.pass_on(&state);
                    drop(state);
                    self.observe(&batch, now, since);
                    return Some(Taken { batch, at: now, free_since: since });
                }
                Next::Wait(until) if state.timer.is_none_or(|holder| holder == lane) => {
                    state.timer = Some(lane);
                    state.asleep += 1;
                    self.work.wait_until(&mut state, until);
                    state.asleep -= 1;
                    state.timer = None;
                }
                Next::Wait(_) | Next::Idle => self.sleep(&mut state),
            }
        }
    }

    fn sleep(&self, state: &mut MutexGuard<'_, State>) {
        state.asleep += 1;
        self.work.wait(state);
        state.asleep -= 1;
    }

    /// What is left in the queue needs a lane that runs it or minds its timer.
    fn pass_on(&self, state: &State) {
        if state.wants_a_lane() {
            self.work.notify_one();
        }
    }

    fn observe(&self, batch: &Batch<Job>, now: Instant, free_since: Instant) {
        match batch.closed {
            Closed::Full => self.metrics.closed_full.inc(),
            Closed::Waited => self.metrics.closed_waited.inc(),
            Closed::Drained => self.metrics.closed_drained.inc(),
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
    /// Whether a lane that sleeps should wake: to run a batch, or to mind the time of one that isn't full.
    fn wants_a_lane(&self) -> bool {
        let waiting = !self.batcher.is_empty() && self.timer.is_none();
        self.asleep > 0 && (self.batcher.is_ready() || waiting)
    }

    fn forget(&mut self, lane: Lane) {
        self.free.retain(|(free, _)| *free != lane);
        self.fewest_free = self.fewest_free.min(self.free.len());
        if self.timer == Some(lane) {
            self.timer = None;
        }
    }
}

fn of_config(policy: BatchPolicy) -> Policy {
    Policy { max_batch_size: policy.max_batch_size, wait: policy.wait, queue_max: policy.queue_max }
}

/// The error for more items than a queue can ever hold.
#[must_use]
pub fn too_many(count: usize, queue_max: usize) -> JobError {
    JobError::TooLarge(format!(
        "expected at most {queue_max} items (queue_max), found {count}: split them over several requests"
    ))
}

/// How long a caller that finds a queue full should wait before it comes back.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use modalkit_device::Devices;

    use super::*;
    use crate::{
        config,
        job::{Mailbox, RequestId, reply},
        telemetry::Metrics,
        traces::Traces,
    };

    #[test]
    fn a_host_that_shuts_down_waits_for_no_batch_of_a_model_that_comes_meanwhile() {
        let mut spec = config::load(&[], &config::Environment::default()).unwrap().config.defaults;
        spec.batch.max_batch_size = 8;
        spec.batch.wait = Duration::from_secs(60);
        let metrics = Metrics::new(Traces::default());
        let make = |spec| Model::new(spec, &metrics, Devices::none());
        let mailbox = Arc::new(Mailbox::default());
        let models = Models::default();
        let before = models.add(spec.named("before"), make);
        models.drain();
        let after = models.add(spec.named("after"), make);
        for model in [before, after] {
            let queue = &model.queue;
            queue.open();
            let (reply, _pending) = reply(&mailbox);
            let request_id = RequestId::Given("a".into());
            let job = Job { request_id, input: "{}".into(), item: None, reply, trail: None };
            queue.push([job], None).unwrap();
            let taken = queue.next_batch(queue.lane(), || Turn::Work).expect("it is told to work");
            assert_eq!((taken.batch.jobs.len(), taken.batch.closed), (1, Closed::Drained), "{}", model.name);
        }
    }
}
