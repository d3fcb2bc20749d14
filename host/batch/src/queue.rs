//! Jobs in the order they came, each removable by id. It owns arrival, deadline and order, and never knows batches.

use std::{collections::VecDeque, time::Instant};

use crate::Waiting;

/// Names a job in the batcher it was pushed to. Ids grow by one with each job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ArrivalId(u64);

impl ArrivalId {
    /// The id of the job that was pushed `offset` places after this one in the same push.
    #[must_use]
    pub fn plus(self, offset: usize) -> Self {
        Self(self.0 + offset as u64)
    }
}

/// A removed job leaves a gap, so that ids stay positions: the job with id `first + i` is in slot `i`. Gaps vanish when
/// they reach the front, and [`Queue::close_gaps`] bounds them, so memory follows the jobs that wait.
#[derive(Debug)]
pub(crate) struct Queue<J> {
    slots: VecDeque<Slot<J>>,
    next: u64,
    live: usize,
    /// No job's deadline is earlier; a lower bound, exact after each expiry.
    earliest_deadline: Option<Instant>,
}

#[derive(Debug)]
struct Slot<J> {
    id: ArrivalId,
    arrived: Instant,
    deadline: Option<Instant>,
    job: Option<J>,
}

/// Below this many slots gaps are not worth moving jobs for.
const GAPS_TOLERATED: usize = 64;

impl<J> Queue<J> {
    pub(crate) fn new() -> Self {
        Self { slots: VecDeque::new(), next: 0, live: 0, earliest_deadline: None }
    }

    pub(crate) fn len(&self) -> usize {
        self.live
    }

    pub(crate) fn next_id(&self) -> ArrivalId {
        ArrivalId(self.next)
    }

    /// The next id, for a job that isn't kept here.
    pub(crate) fn use_id(&mut self) -> ArrivalId {
        let id = self.next_id();
        self.next += 1;
        id
    }

    pub(crate) fn push(&mut self, job: J, arrived: Instant, deadline: Option<Instant>) {
        self.slots.push_back(Slot { id: ArrivalId(self.next), arrived, deadline, job: Some(job) });
        self.next += 1;
        self.live += 1;
        if let Some(deadline) = deadline {
            self.earliest_deadline =
                Some(self.earliest_deadline.map_or(deadline, |known| known.min(deadline)));
        }
    }

    pub(crate) fn oldest_arrival(&self) -> Option<Instant> {
        // The front is never a gap.
        self.slots.front().map(|slot| slot.arrived)
    }

    pub(crate) fn remove(&mut self, id: ArrivalId) -> Option<J> {
        let position = self.slots.binary_search_by_key(&id, |slot| slot.id).ok()?;
        let job = self.slots[position].job.take()?;
        self.live -= 1;
        self.close_gaps();
        Some(job)
    }

    pub(crate) fn expire(&mut self, now: Instant) -> Vec<J> {
        if self.earliest_deadline.is_none_or(|earliest| now < earliest) {
            return Vec::new();
        }
        let mut expired = Vec::new();
        let mut earliest: Option<Instant> = None;
        for slot in &mut self.slots {
            let Some(deadline) = slot.deadline else { continue };
            if deadline <= now {
                expired.extend(slot.job.take());
            } else if slot.job.is_some() {
                earliest = Some(earliest.map_or(deadline, |known| known.min(deadline)));
            }
        }
        self.earliest_deadline = earliest;
        self.live -= expired.len();
        self.close_gaps();
        expired
    }

    /// The oldest jobs, at most `most`.
    pub(crate) fn take(&mut self, most: usize) -> Vec<Waiting<J>> {
        let mut taken = Vec::with_capacity(most.min(self.live));
        while taken.len() < most {
            let Some(slot) = self.slots.pop_front() else { break };
            taken.extend(slot.job.map(|job| Waiting { job, id: slot.id, arrived: slot.arrived }));
        }
        self.live -= taken.len();
        self.close_gaps();
        taken
    }

    pub(crate) fn clear(&mut self) -> Vec<J> {
        self.live = 0;
        self.earliest_deadline = None;
        self.slots.drain(..).filter_map(|slot| slot.job).collect()
    }

    fn close_gaps(&mut self) {
        while self.slots.front().is_some_and(|slot| slot.job.is_none()) {
            self.slots.pop_front();
        }
        if self.slots.len() > GAPS_TOLERATED && self.slots.len() > 2 * self.live {
            self.slots.retain(|slot| slot.job.is_some());
        }
        if self.slots.capacity() > GAPS_TOLERATED && self.slots.len() < self.slots.capacity() / 8 {
            self.slots.shrink_to(self.slots.capacity() / 2);
        }
    }
}
