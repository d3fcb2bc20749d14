//! Decides when waiting jobs become a batch. It owns one model's queue and the closing rule, and never knows threads,
//! clocks, plugins or what a job is: time is an argument, and the caller says since when somebody is free to work.
//!
//! # The closing rule
//!
//! A batch is taken only when somebody is free to run it, so that while all are busy the next batch keeps filling. It
//! closes when it holds [`Policy::max_batch_size`] jobs, or when [`Policy::wait`] has passed since the later of two
//! moments: the oldest job came, somebody became free. Counting from the arrival alone would lock closed-loop callers
//! into two half-full batches that take turns: each half comes back while the other runs, and has waited long enough
//! by the time that one ends.
//!
//! ```
//! use std::time::{Duration, Instant};
//! use modalkit_batch::{Batcher, Closed, Next, Policy};
//!
//! let wait = Duration::from_millis(5);
//! let mut batcher = Batcher::new(Policy { max_batch_size: 2, wait, queue_max: 8 });
//! let start = Instant::now();
//! batcher.push(start, ["a"], None).unwrap();
//! assert!(matches!(batcher.next(start, start), Next::Wait(until) if until == start + wait));
//! batcher.push(start, ["b", "c"], None).unwrap();
//! let Next::Batch(batch) = batcher.next(start, start) else { panic!() };
//! assert_eq!((batch.jobs[0].job, batch.jobs[1].job, batch.closed), ("a", "b", Closed::Full));
//! ```

#![forbid(unsafe_code)]

mod queue;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

pub use queue::ArrivalId;
use queue::Queue;

/// The limits of one model's queue and batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The most jobs in a batch, at least 1.
    pub max_batch_size: usize,
    /// How long an incomplete batch waits for more.
    pub wait: Duration,
    /// The most jobs that wait, not counting those that were taken.
    pub queue_max: usize,
}

/// Why a batch was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Closed {
    /// It held `max_batch_size` jobs.
    Full,
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
    queue: Queue<J>,
    /// Each is a batch.
    alone: VecDeque<Waiting<J>>,
    draining: bool,
}

impl<J> Batcher<J> {
    /// An empty queue.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self { policy: sensible(policy), queue: Queue::new(), alone: VecDeque::new(), draining: false }
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
        self.queue.len() + self.alone.len()
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
        let id = self.queue.use_id();
        self.alone.push_back(Waiting { job, id, arrived: now });
        id
    }

    /// Appends jobs, all or none, and returns the id of the first; the others' follow it one by one.
    ///
    /// # Errors
    /// [`Full`], with the jobs, where fewer than all fit.
    pub fn push<I: IntoIterator<Item = J>>(
        &mut self,
        now: Instant,
        jobs: I,
        deadline: Option<Instant>,
    ) -> Result<ArrivalId, Full<I::IntoIter>>
    where
        I::IntoIter: ExactSizeIterator,
    {
        let jobs = jobs.into_iter();
        if jobs.len() > self.policy.queue_max.saturating_sub(self.queue.len()) {
            return Err(Full(jobs));
        }
        let first = self.queue.next_id();
        for job in jobs {
            self.queue.push(job, now, deadline);
        }
        Ok(first)
    }

    /// Takes a job out whose caller has left. `None` where it was taken before.
    pub fn cancel(&mut self, id: ArrivalId) -> Option<J> {
        if let Some(place) = self.alone.iter().position(|waiting| waiting.id == id) {
            return self.alone.remove(place).map(|waiting| waiting.job);
        }
        self.queue.remove(id)
    }

    /// Takes out the jobs whose deadline has passed; they take no slot in any batch.
    pub fn expire(&mut self, now: Instant) -> Vec<J> {
        self.queue.expire(now)
    }

    /// No more jobs will be pushed: from now on no batch waits to be filled.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Takes out every job that waits.
    pub fn clear(&mut self) -> Vec<J> {
        let mut all: Vec<J> = self.alone.drain(..).map(|waiting| waiting.job).collect();
        all.extend(self.queue.clear());
        all
    }

    /// What to do for somebody who has been free since `free_since`. Call [`Batcher::expire`] before.
    pub fn next(&mut self, now: Instant, free_since: Instant) -> Next<J> {
        if let Some(job) = self.alone.pop_front() {
            return Next::Batch(Batch { jobs: vec![job], closed: Closed::Alone });
        }
        let Some(oldest) = self.queue.oldest_arrival() else { return Next::Idle };
        let closed = if self.queue.len() >= self.policy.max_batch_size {
            Closed::Full
        } else if self.draining {
            Closed::Drained
        } else {
            let close_at = oldest.max(free_since) + self.policy.wait;
            if now < close_at {
                return Next::Wait(close_at);
            }
            Closed::Waited
        };
        Next::Batch(Batch { jobs: self.queue.take(self.policy.max_batch_size), closed })
    }

    /// Whether [`Batcher::next`] would give a batch at once to somebody free, however recently.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !self.alone.is_empty()
            || !self.is_empty()
                && (self.queue.len() >= self.policy.max_batch_size
                    || self.draining
                    || self.policy.wait.is_zero())
    }
}

/// A batch of none would never end the queue.
fn sensible(policy: Policy) -> Policy {
    Policy { max_batch_size: policy.max_batch_size.max(1), ..policy }
}
