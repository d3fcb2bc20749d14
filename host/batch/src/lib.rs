//! Decides when waiting jobs become a batch. It owns one model's queue and the closing rule, and never knows threads,
//! clocks, plugins or what a job is: time is an argument, and the caller says since when somebody is free to work.
//!
//! # The closing rule
//!
//! A batch is taken only when somebody is free to run it, so that while all are busy the next batch keeps filling. Jobs of one [`Measure::shape`] form a
//! batch: none is padded to the length of another. It closes when it holds [`Policy::max_batch_size`] jobs, when the next one would bring its cost beyond
//! [`Policy::max_batch_cost`], or when [`Policy::wait`] has passed since the later of two moments: its oldest job came, somebody became free. Counting from
//! the arrival alone would lock closed-loop callers into two half-full batches that take turns: each half comes back while the other runs, and has waited
//! long enough by the time that one ends. What an adaptive wait is, [`Wait::Adaptive`] says.
//!
//! Within a shape, jobs are taken in the order they came. A batch that is full may go before older jobs of other shapes, until those have waited their time:
//! from then on no later job is taken before them, and they wait for nobody while somebody is free. Of more than 64 shapes at once, those that come last share
//! batches until these have run.
//!
//! ```
//! use std::time::{Duration, Instant};
//! use modalkit_batch::{Batcher, Closed, Measure, Next, Policy, Wait};
//!
//! let wait = Duration::from_millis(5);
//! let policy = Policy { max_batch_size: 2, max_batch_cost: None, wait: Wait::Fixed(wait), queue_max: 8 };
//! let mut batcher = Batcher::new(policy);
//! let start = Instant::now();
//! batcher.push(start, [("a", Measure::default())], None).unwrap();
//! assert!(matches!(batcher.next(start, start), Next::Wait(until) if until == start + wait));
//! let long = Measure { cost: 500, shape: 512 };
//! batcher.push(start, [("b", long), ("c", Measure::default())], None).unwrap();
//! let Next::Batch(batch) = batcher.next(start, start) else { panic!() };
//! assert_eq!((batch.jobs[0].job, batch.jobs[1].job, batch.closed), ("a", "c", Closed::Full));
//! ```

#![forbid(unsafe_code)]

mod adaptive;
mod queue;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use adaptive::Learned;
pub use queue::ArrivalId;
use queue::Queue;

/// Queues without jobs that are kept: their memory serves the next jobs.
const EMPTY_QUEUES_MAX: usize = 8;
/// Shapes that are told apart at once: all of them are looked at for each batch.
const SHAPES_MAX: usize = 64;

/// The limits of one model's queue and batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The most jobs in a batch, at least 1.
    pub max_batch_size: usize,
    /// The most that the jobs of a batch cost together, at least 1; one that costs more runs by itself. `None` for any.
    pub max_batch_cost: Option<u64>,
    /// How long an incomplete batch waits for more.
    pub wait: Wait,
    /// The most jobs that wait, not counting those that were taken.
    pub queue_max: usize,
}

/// How long an incomplete batch waits for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// So long.
    Fixed(Duration),
    /// As long as that gives more jobs in the time, by what was learned from arrivals and from the time that batches take; no longer than a batch takes.
    Adaptive,
}

/// How much work a job is, and what it can be batched with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// How much work, in a unit that all jobs have in common.
    pub cost: u64,
    /// Jobs with the same one may share a batch.
    pub shape: u64,
}

impl Default for Measure {
    fn default() -> Self {
        Self { cost: 1, shape: 0 }
    }
}

/// Why a batch was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Closed {
    /// It held `max_batch_size` jobs.
    Full,
    /// One more job would have cost more than `max_batch_cost`.
    Costly,
    /// `wait` had passed.
    Waited,
    /// No more jobs will come, so waiting for some would be in vain.
    Drained,
    /// Its one job is to be run without company.
    Alone,
}

/// A job that waits, or has just been taken.
#[derive(Debug)]
pub struct Waiting<J> {
    /// The caller's job.
    pub job: J,
    /// Its id in this batcher.
    pub id: ArrivalId,
    /// When it came.
    pub arrived: Instant,
}

/// Jobs to be run together, the oldest first.
#[derive(Debug)]
pub struct Batch<J> {
    /// At least one, at most `max_batch_size`.
    pub jobs: Vec<Waiting<J>>,
    /// Why it closed.
    pub closed: Closed,
}

/// What somebody who is free should do.
#[derive(Debug)]
pub enum Next<J> {
    /// Run this.
    Batch(Batch<J>),
    /// Ask again then, or when a job comes.
    Wait(Instant),
    /// Ask again when a job comes.
    Idle,
}

/// A push that was turned down: the queue has no room for all of these jobs.
#[derive(Debug)]
pub struct Full<I>(pub I);

/// One model's queue. See the crate's text for the rule it keeps.
#[derive(Debug)]
pub struct Batcher<J> {
    policy: Policy,
    /// One for each shape that waits, perhaps one of several, and a few that are empty.
    queues: Vec<Queue<J>>,
    /// Jobs in them.
    queued: usize,
    next_id: u64,
    /// Each is a batch.
    alone: VecDeque<Waiting<J>>,
    draining: bool,
    learned: Learned,
}

/// The oldest job of a shape.
#[derive(Clone, Copy)]
struct Oldest {
    id: ArrivalId,
    arrived: Instant,
    /// Its queue's.
    place: usize,
}

impl<J> Batcher<J> {
    /// An empty queue.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self {
            policy: sensible(policy),
            queues: Vec::new(),
            queued: 0,
            next_id: 0,
            alone: VecDeque::new(),
            draining: false,
            learned: Learned::new(),
        }
    }

    /// Replaces the limits; what waits already stays, however much it is.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = sensible(policy);
    }

    /// The limits.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Jobs that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queued + self.alone.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes a job back that was in a batch, to be run next and as a batch of its own. It keeps its id, is counted in no limit, and has no
    /// deadline any more; whoever runs it finds out whether anybody still wants it.
    pub fn take_back(&mut self, job: Waiting<J>) {
        self.alone.push_back(job);
    }

    /// Takes a job that is to be run next and as a batch of its own. It is counted in no limit, and has no deadline.
    pub fn push_alone(&mut self, now: Instant, job: J) -> ArrivalId {
        let id = self.use_id();
        self.alone.push_back(Waiting { job, id, arrived: now });
        id
    }

    /// Appends jobs, all or none, and returns the id of the first; the others' follow it one by one.
    ///
    /// # Errors
    /// [`Full`], with the jobs, where fewer than all fit.
    pub fn push<I: IntoIterator<Item = (J, Measure)>>(
        &mut self,
        now: Instant,
        jobs: I,
        deadline: Option<Instant>,
    ) -> Result<ArrivalId, Full<I::IntoIter>>
    where
        I::IntoIter: ExactSizeIterator,
    {
        let jobs = jobs.into_iter();
        let count = jobs.len();
        if count > self.policy.queue_max.saturating_sub(self.queued) {
            return Err(Full(jobs));
        }
        let first = ArrivalId(self.next_id);
        for job in jobs {
            let id = self.use_id();
            self.queue_of(job.1.shape).push(id, job, now, deadline);
            self.queued += 1;
        }
        if self.policy.wait == Wait::Adaptive {
            self.learned.came(now, count);
        }
        Ok(first)
    }

    /// Takes a job out whose caller has left. `None` where it was taken before.
    pub fn cancel(&mut self, id: ArrivalId) -> Option<J> {
        if let Some(place) = self.alone.iter().position(|waiting| waiting.id == id) {
            return self.alone.remove(place).map(|waiting| waiting.job);
        }
        let job = self.queues.iter_mut().find_map(|queue| queue.remove(id))?;
        self.queued -= 1;
        self.drop_empty();
        Some(job)
    }

    /// Takes out the jobs whose deadline has passed; they take no slot in any batch.
    pub fn expire(&mut self, now: Instant) -> Vec<J> {
        let mut expired = Vec::new();
        self.queues.iter_mut().for_each(|queue| queue.expire(now, &mut expired));
        if !expired.is_empty() {
            self.queued -= expired.len();
            self.drop_empty();
        }
        expired
    }

    /// Learns that a batch of so many jobs has ended, and took so long.
    pub fn batch_ended(&mut self, now: Instant, jobs: usize, took: Duration) {
        if self.policy.wait == Wait::Adaptive {
            self.learned.batch_ended(now, jobs, took);
        }
    }

    /// No more jobs will be pushed: from now on no batch waits to be filled.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Takes out every job that waits.
    pub fn clear(&mut self) -> Vec<J> {
        let mut all: Vec<J> = self.alone.drain(..).map(|waiting| waiting.job).collect();
        self.queues.iter_mut().for_each(|queue| all.extend(queue.clear()));
        self.queued = 0;
        self.drop_empty();
        all
    }

    /// What to do for somebody who has been free since `free_since`. Call [`Batcher::expire`] before.
    pub fn next(&mut self, now: Instant, free_since: Instant) -> Next<J> {
        if let Some(job) = self.alone.pop_front() {
            return Next::Batch(Batch { jobs: vec![job], closed: Closed::Alone });
        }
        let Some(oldest) = self.oldest() else { return Next::Idle };
        let Some(until) = self.waits_until(oldest, now, free_since) else {
            return Next::Batch(self.take(oldest.place));
        };
        match self.oldest_full() {
            None => Next::Wait(until),
            Some(full) => Next::Batch(self.take(full.place)),
        }
    }

    /// From when on [`Batcher::next`] gives a batch to somebody who has been free since `free_since`, if nothing else happens; `None` where no job waits.
    #[must_use]
    pub fn next_at(&self, now: Instant, free_since: Instant) -> Option<Instant> {
        if !self.alone.is_empty() {
            return Some(now);
        }
        match self.waits_until(self.oldest()?, now, free_since) {
            Some(until) if self.oldest_full().is_none() => Some(until),
            _ => Some(now),
        }
    }

    fn use_id(&mut self) -> ArrivalId {
        self.next_id += 1;
        ArrivalId(self.next_id - 1)
    }

    /// That of a shape; a new one where there is none, or the one of those that are too many.
    fn queue_of(&mut self, shape: u64) -> &mut Queue<J> {
        let waits = |wanted| self.queues.iter().position(|queue| queue.shape() == wanted && queue.len() > 0);
        // While some of a shape may wait among those that are too many, others of it follow them there.
        if let Some(place) = waits(Some(shape)).or_else(|| waits(None)) {
            return &mut self.queues[place];
        }
        let waiting = self.queues.iter().filter(|queue| queue.len() > 0).count();
        let place = self.queues.iter().position(|queue| queue.len() == 0).unwrap_or(self.queues.len());
        if place == self.queues.len() {
            self.queues.push(Queue::new());
        }
        self.queues[place].set_shape(Some(shape).filter(|_| waiting < SHAPES_MAX));
        &mut self.queues[place]
    }

    /// Lets go of queues that are empty, but for a few.
    fn drop_empty(&mut self) {
        if self.queues.len() > EMPTY_QUEUES_MAX {
            let mut kept = 0;
            self.queues.retain(|queue| {
                kept += usize::from(queue.len() == 0);
                queue.len() > 0 || kept <= EMPTY_QUEUES_MAX
            });
        }
    }

    fn oldest_of_each(&self) -> impl Iterator<Item = Oldest> {
        let oldest = |(place, queue): (usize, &Queue<J>)| {
            queue.oldest().map(|(id, arrived)| Oldest { id, arrived, place })
        };
        self.queues.iter().enumerate().filter_map(oldest)
    }

    fn oldest(&self) -> Option<Oldest> {
        self.oldest_of_each().min_by_key(|oldest| oldest.id)
    }

    /// The oldest job whose batch is full.
    fn oldest_full(&self) -> Option<Oldest> {
        self.oldest_of_each()
            .filter(|oldest| self.is_full(&self.queues[oldest.place]))
            .min_by_key(|oldest| oldest.id)
    }

    fn is_full(&self, queue: &Queue<J>) -> bool {
        queue.len() >= self.policy.max_batch_size || queue.cost() >= self.cost_max()
    }

    fn cost_max(&self) -> u128 {
        self.policy.max_batch_cost.map_or(u128::MAX, u128::from)
    }

    /// Until when the batch of a shape's oldest job waits for somebody who has been free so long; `None` where it doesn't.
    fn waits_until(&self, oldest: Oldest, now: Instant, free_since: Instant) -> Option<Instant> {
        let queue = &self.queues[oldest.place];
        if self.draining || self.is_full(queue) {
            return None;
        }
        // Others wait for it: it had its time, also while nobody was free.
        let is_alone = self.queued == queue.len();
        let since = if is_alone { oldest.arrived.max(free_since) } else { oldest.arrived };
        let longest = since + self.longest_wait();
        let until = match self.policy.wait {
            Wait::Fixed(_) => longest,
            Wait::Adaptive => {
                let part = queue.len() as f64 / self.queued as f64;
                self.learned.waits_until(now, queue.len(), self.room(queue), part)?.min(longest)
            }
        };
        Some(until).filter(|until| now < *until)
    }

    /// How many more of its kind fit into a queue's batch.
    fn room(&self, queue: &Queue<J>) -> usize {
        let by_size = self.policy.max_batch_size - queue.len();
        let mean_cost = queue.cost() / queue.len().max(1) as u128;
        let by_cost = (self.cost_max() - queue.cost()) / mean_cost.max(1);
        by_size.min(usize::try_from(by_cost).unwrap_or(usize::MAX))
    }

    fn longest_wait(&self) -> Duration {
        match self.policy.wait {
            Wait::Fixed(wait) => wait,
            Wait::Adaptive => self.learned.service(),
        }
    }

    fn take(&mut self, place: usize) -> Batch<J> {
        let (most, cost_max) = (self.policy.max_batch_size, self.cost_max());
        let is_costly = self.queues[place].cost() >= cost_max;
        let jobs = self.queues[place].take(most, cost_max);
        self.queued -= jobs.len();
        let closed = if jobs.len() == most {
            Closed::Full
        } else if is_costly {
            Closed::Costly
        } else if self.draining {
            Closed::Drained
        } else {
            Closed::Waited
        };
        self.drop_empty();
        Batch { jobs, closed }
    }
}

/// A batch of none would never end the queue.
fn sensible(policy: Policy) -> Policy {
    Policy {
        max_batch_size: policy.max_batch_size.max(1),
        max_batch_cost: policy.max_batch_cost.map(|cost| cost.max(1)),
        ..policy
    }
}
