//! Jobs of one shape in the order they came, each removable by id. It owns arrival, deadline, cost and order, and never knows batches.

use std::{collections::VecDeque, time::Instant};

use crate::{Measure, Waiting};

/// Names a job in the batcher it was pushed to. Ids grow by one with each job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ArrivalId(pub(crate) u64);

impl ArrivalId {
    /// The id of the job that was pushed `offset` places after this one in the same push.
    #[must_use]
    pub fn plus(self, offset: usize) -> Self {
        Self(self.0 + offset as u64)
    }
}

/// A removed job leaves a gap, so that ids grow from slot to slot. Gaps vanish when they reach the front, and [`Queue::close_gaps`] bounds them, so memory
/// follows the jobs that wait.
#[derive(Debug)]
pub(crate) struct Queue<J> {
    /// `None` of several.
    shape: Option<u64>,
    slots: VecDeque<Slot<J>>,
    live: usize,
    /// Of all that wait.
    cost: u128,
    /// No job's deadline is earlier; a lower bound, exact after each expiry.
    earliest_deadline: Option<Instant>,
}

#[derive(Debug)]
struct Slot<J> {
    id: ArrivalId,
    arrived: Instant,
    deadline: Option<Instant>,
    measure: Measure,
    job: Option<J>,
}

/// Below this many slots gaps are not worth moving jobs for.
const GAPS_TOLERATED: usize = 64;

impl<J> Queue<J> {
    pub(crate) fn new() -> Self {
        Self { shape: None, slots: VecDeque::new(), live: 0, cost: 0, earliest_deadline: None }
    }

    /// Makes an empty one that of another shape.
    pub(crate) fn set_shape(&mut self, shape: Option<u64>) {
        self.shape = shape;
    }

    pub(crate) fn shape(&self) -> Option<u64> {
        self.shape
    }

    pub(crate) fn len(&self) -> usize {
        self.live
    }

    /// The costs of all that wait.
    pub(crate) fn cost(&self) -> u128 {
        self.cost
    }

    pub(crate) fn push(
        &mut self,
        id: ArrivalId,
        (job, measure): (J, Measure),
        arrived: Instant,
        deadline: Option<Instant>,
    ) {
        self.slots.push_back(Slot { id, arrived, deadline, measure, job: Some(job) });
        self.live += 1;
        self.cost += u128::from(measure.cost);
        if let Some(deadline) = deadline {
            self.earliest_deadline =
                Some(self.earliest_deadline.map_or(deadline, |known| known.min(deadline)));
        }
    }

    /// The oldest job's id, and when it came.
    pub(crate) fn oldest(&self) -> Option<(ArrivalId, Instant)> {
        // The front is never a gap.
        self.slots.front().map(|slot| (slot.id, slot.arrived))
    }

    pub(crate) fn remove(&mut self, id: ArrivalId) -> Option<J> {
        let position = self.slots.binary_search_by_key(&id, |slot| slot.id).ok()?;
        let slot = &mut self.slots[position];
        let job = slot.job.take()?;
        self.live -= 1;
        self.cost -= u128::from(slot.measure.cost);
        self.close_gaps();
        Some(job)
    }

    pub(crate) fn expire(&mut self, now: Instant, expired: &mut Vec<J>) {
        if self.earliest_deadline.is_none_or(|earliest| now < earliest) {
            return;
        }
        let before = expired.len();
        let mut earliest: Option<Instant> = None;
        for slot in &mut self.slots {
            let Some(deadline) = slot.deadline else { continue };
            if deadline > now {
                if slot.job.is_some() {
                    earliest = Some(earliest.map_or(deadline, |known| known.min(deadline)));
                }
            } else if let Some(job) = slot.job.take() {
                self.cost -= u128::from(slot.measure.cost);
                expired.push(job);
            }
        }
        self.earliest_deadline = earliest;
        self.live -= expired.len() - before;
        self.close_gaps();
    }

    /// The oldest jobs: at most so many, which cost no more together, but where the first alone does.
    pub(crate) fn take(&mut self, most: usize, cost_max: u128) -> Vec<Waiting<J>> {
        let mut taken = Vec::with_capacity(most.min(self.live));
        let mut cost = 0;
        while taken.len() < most {
            let Some(slot) = self.slots.front() else { break };
            if slot.job.is_some() {
                cost += u128::from(slot.measure.cost);
                if cost > cost_max && !taken.is_empty() {
                    break;
                }
            }
            let Some(Slot { id, arrived, measure, job, .. }) = self.slots.pop_front() else { break };
            if let Some(job) = job {
                self.cost -= u128::from(measure.cost);
                taken.push(Waiting { job, id, arrived });
            }
        }
        self.live -= taken.len();
        self.close_gaps();
        taken
    }

    pub(crate) fn clear(&mut self) -> impl Iterator<Item = J> + '_ {
        (self.live, self.cost) = (0, 0);
        self.earliest_deadline = None;
        self.slots.drain(..).filter_map(|slot| slot.job)
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
