//! The batcher's promises over random arrivals, cancellations, deadlines and availability of replicas.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use modalkit_batch::{ArrivalId, Batcher, Closed, Next, Policy};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Event {
    Push { jobs: usize, deadline_ms: Option<u64> },
    Cancel { nth: usize },
    Finish { nth: usize },
    Retire,
    Hire,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Waiting,
    Answered,
    Cancelled,
    Expired,
}

fn events() -> impl Strategy<Value = Vec<(u64, Event)>> {
    let event = prop_oneof![
        6 => (1usize..6, prop::option::weighted(0.3, 0u64..40)).prop_map(|(jobs, deadline_ms)| Event::Push { jobs, deadline_ms }),
        2 => any::<usize>().prop_map(|nth| Event::Cancel { nth }),
        4 => any::<usize>().prop_map(|nth| Event::Finish { nth }),
        1 => Just(Event::Retire),
        1 => Just(Event::Hire),
    ];
    // Half-milliseconds between events, so that several fall into one wait.
    prop::collection::vec((0u64..12, event), 1..200)
}

/// A world of jobs and replicas around one batcher, which checks the promises at every step.
struct World {
    batcher: Batcher<usize>,
    policy: Policy,
    now: Instant,
    fates: Vec<Fate>,
    ids: BTreeMap<usize, (ArrivalId, Instant, Option<Instant>)>,
    /// Since when each free replica has been free.
    free: VecDeque<Instant>,
    running: Vec<Vec<usize>>,
    last_taken: Option<usize>,
}

impl World {
    fn new(policy: Policy, replicas: usize) -> Self {
        let now = Instant::now();
        Self {
            batcher: Batcher::new(policy),
            policy,
            now,
            fates: Vec::new(),
            ids: BTreeMap::new(),
            free: std::iter::repeat_n(now, replicas).collect(),
            running: Vec::new(),
            last_taken: None,
        }
    }

    fn settle(&mut self, job: usize, fate: Fate) {
        assert_eq!(self.fates[job], Fate::Waiting, "job {job} was answered twice");
        self.fates[job] = fate;
    }

    fn waiting(&self) -> Vec<usize> {
        let running: Vec<usize> = self.running.iter().flatten().copied().collect();
        (0..self.fates.len())
            .filter(|job| self.fates[*job] == Fate::Waiting && !running.contains(job))
            .collect()
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Push { jobs, deadline_ms } => {
                let first = self.fates.len();
                let room = self.policy.queue_max - self.batcher.len();
                let deadline = deadline_ms.map(|ms| self.now + Duration::from_millis(ms));
                let pushed = self.batcher.push(self.now, first..first + jobs, deadline);
                assert_eq!(pushed.is_ok(), jobs <= room, "a push is taken whole exactly when it fits");
                if let Ok(id) = pushed {
                    self.fates.extend(std::iter::repeat_n(Fate::Waiting, jobs));
                    self.ids.extend((0..jobs).map(|n| (first + n, (id.plus(n), self.now, deadline))));
                }
            }
            Event::Cancel { nth } if !self.fates.is_empty() => {
                let job = nth % self.fates.len();
                let waits = self.waiting().contains(&job);
                let cancelled = self.batcher.cancel(self.ids[&job].0);
                assert_eq!(cancelled, waits.then_some(job), "exactly the jobs that wait can be cancelled");
                if waits {
                    self.settle(job, Fate::Cancelled);
                }
            }
            Event::Finish { nth } if !self.running.is_empty() => {
                let done = self.running.swap_remove(nth % self.running.len());
                done.into_iter().for_each(|job| self.settle(job, Fate::Answered));
                self.free.push_back(self.now);
            }
            Event::Retire => drop(self.free.pop_front()),
            Event::Hire => self.free.push_back(self.now),
            Event::Cancel { .. } | Event::Finish { .. } => {}
        }
        self.work();
    }

    /// Lets every free replica take what it can, as the host does after each event.
    fn work(&mut self) {
        for job in self.batcher.expire(self.now) {
            assert!(self.ids[&job].2.is_some_and(|deadline| deadline <= self.now), "job {job} expired early");
            self.settle(job, Fate::Expired);
        }
        while let Some(&free_since) = self.free.iter().min() {
            let waiting = self.waiting();
            let Next::Batch(batch) = self.batcher.next(self.now, free_since) else { break };
            self.check(
                &batch.jobs.iter().map(|taken| taken.job).collect::<Vec<_>>(),
                batch.closed,
                &waiting,
                free_since,
            );
            let taker = self.free.iter().position(|since| *since == free_since).expect("it is one of them");
            self.free.remove(taker);
            self.running.push(batch.jobs.into_iter().map(|taken| taken.job).collect());
        }
        let waiting = self.waiting();
        assert_eq!(self.batcher.len(), waiting.len());
        for job in waiting {
            let (_, arrived, deadline) = self.ids[&job];
            assert!(deadline.is_none_or(|deadline| deadline > self.now), "job {job} outlived its deadline");
            if let Some(&free_since) = self.free.iter().min() {
                let since = arrived.max(free_since);
                assert!(
                    self.now < since + self.policy.wait,
                    "job {job} waits past `wait` while a replica is free"
                );
            }
        }
    }

    fn check(&mut self, batch: &[usize], closed: Closed, waiting: &[usize], free_since: Instant) {
        assert!(!batch.is_empty() && batch.len() <= self.policy.max_batch_size);
        assert_eq!(batch, &waiting[..batch.len()], "first in, first out, with no gaps");
        assert!(self.last_taken.is_none_or(|last| last < batch[0]), "first in, first out between batches");
        self.last_taken = batch.last().copied();
        match closed {
            Closed::Full => assert_eq!(batch.len(), self.policy.max_batch_size),
            Closed::Waited => {
                let since = self.ids[&batch[0]].1.max(free_since);
                assert!(batch.len() < self.policy.max_batch_size && self.now >= since + self.policy.wait);
            }
            Closed::Drained => assert!(batch.len() < self.policy.max_batch_size),
            Closed::Alone => assert_eq!(batch.len(), 1),
        }
    }

    /// Passes over every moment at which the batcher asked to be woken, so that no promise hangs on the next event.
    fn advance(&mut self, to: Instant) {
        loop {
            let wake = self.free.iter().min().and_then(|&since| match self.batcher.next(self.now, since) {
                Next::Wait(until) => Some(until),
                Next::Idle => None,
                Next::Batch(_) => panic!("`work` leaves no batch behind"),
            });
            let expiry = self.waiting().iter().filter_map(|job| self.ids[job].2).min();
            match wake.into_iter().chain(expiry).min() {
                Some(moment) if moment <= to => {
                    self.now = moment;
                    self.work();
                }
                _ => break,
            }
        }
        self.now = to;
        self.work();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_job_is_answered_once_in_order_and_in_time(
        events in events(),
        max_batch_size in 1usize..9,
        wait_ms in 0u64..8,
        queue_max in 1usize..40,
        replicas in 0usize..4,
    ) {
        let mut world = World::new(Policy { max_batch_size, wait: Duration::from_millis(wait_ms), queue_max }, replicas);
        for (pause, event) in events {
            world.advance(world.now + Duration::from_micros(pause * 500));
            world.apply(event);
        }
        world.batcher.drain();
        world.free.push_back(world.now);
        world.work();
        while !world.running.is_empty() {
            world.apply(Event::Finish { nth: 0 });
        }
        prop_assert!(world.fates.iter().all(|fate| *fate != Fate::Waiting), "a job was never answered");
        prop_assert!(world.batcher.is_empty());
    }

    #[test]
    fn memory_follows_the_jobs_that_wait(cancelled in prop::collection::vec(any::<bool>(), 1..600)) {
        let policy = Policy { max_batch_size: 4, wait: Duration::from_secs(1), queue_max: usize::MAX };
        let mut batcher = Batcher::new(policy);
        let now = Instant::now();
        let ids: Vec<ArrivalId> = (0..cancelled.len()).map(|job| batcher.push(now, [job], None).unwrap()).collect();
        for (job, gone) in cancelled.iter().enumerate() {
            if *gone {
                prop_assert_eq!(batcher.cancel(ids[job]), Some(job));
                prop_assert_eq!(batcher.cancel(ids[job]), None);
            }
        }
        let left: Vec<usize> = (0..cancelled.len()).filter(|job| !cancelled[*job]).collect();
        prop_assert_eq!(batcher.len(), left.len());
        batcher.drain();
        let mut taken = Vec::new();
        while let Next::Batch(batch) = batcher.next(now, now) {
            taken.extend(batch.jobs.into_iter().map(|waiting| waiting.job));
        }
        prop_assert_eq!(taken, left);
    }
}

/// 32 callers that each send again as soon as they are answered, one replica, batches of 32 that take 8.2 ms.
/// With a rule that counts from the arrival alone, they fall into two groups of 16 that take turns, for good.
#[test]
fn a_closed_loop_of_32_callers_settles_into_full_batches() {
    const CALLERS: usize = 32;
    let wait = Duration::from_millis(5);
    let mut batcher = Batcher::new(Policy { max_batch_size: CALLERS, wait, queue_max: 1024 });
    let start = Instant::now();
    let mut now = start;
    // Half of the callers start first, so that the loop begins in the trap.
    batcher.push(now, 0..CALLERS / 2, None).unwrap();
    let mut arrivals: VecDeque<(Instant, usize)> =
        (CALLERS / 2..CALLERS).map(|caller| (start + Duration::from_millis(6), caller)).collect();
    let mut free_since = start;
    let mut busy: Option<(Instant, Vec<usize>)> = None;
    let mut sizes = Vec::new();
    while sizes.len() < 100 {
        let asked = if busy.is_some() { Next::Idle } else { batcher.next(now, free_since) };
        let wake = match asked {
            Next::Batch(batch) => {
                sizes.push(batch.jobs.len());
                let cost = Duration::from_micros(5_000 + 100 * batch.jobs.len() as u64);
                busy = Some((now + cost, batch.jobs.into_iter().map(|taken| taken.job).collect()));
                continue;
            }
            Next::Wait(until) => Some(until),
            Next::Idle => None,
        };
        let finish = busy.as_ref().map(|(until, _)| *until);
        let arrival = arrivals.front().map(|(at, _)| *at);
        now = wake.into_iter().chain(finish).chain(arrival).min().expect("the loop never runs dry");
        while arrivals.front().is_some_and(|(at, _)| *at <= now) {
            let (_, caller) = arrivals.pop_front().unwrap();
            batcher.push(now, [caller], None).unwrap();
        }
        if finish.is_some_and(|until| until <= now) {
            let (_, answered) = busy.take().unwrap();
            // Answers reach their callers one after the other, 20 µs apart.
            arrivals.extend(
                answered
                    .into_iter()
                    .enumerate()
                    .map(|(n, caller)| (now + Duration::from_micros(100 + 20 * n as u64), caller)),
            );
            free_since = now;
        }
    }
    assert!(sizes[5..].iter().all(|size| *size == CALLERS), "batches stayed incomplete: {sizes:?}");
}

#[test]
fn a_replica_that_becomes_free_gives_late_callers_their_wait() {
    let wait = Duration::from_millis(5);
    let mut batcher = Batcher::new(Policy { max_batch_size: 4, wait, queue_max: 8 });
    let came = Instant::now();
    batcher.push(came, ["early"], None).unwrap();
    let freed = came + Duration::from_millis(50);
    assert!(matches!(batcher.next(freed, freed), Next::Wait(until) if until == freed + wait));
    batcher.push(freed + Duration::from_millis(4), ["late"], None).unwrap();
    let Next::Batch(batch) = batcher.next(freed + wait, freed) else { panic!("the wait is over") };
    assert_eq!((batch.jobs.len(), batch.closed), (2, Closed::Waited));
}

#[test]
fn a_job_that_came_back_is_next_and_a_batch_of_its_own_whatever_waits() {
    let start = Instant::now();
    let mut batcher = Batcher::new(Policy { max_batch_size: 2, wait: Duration::from_secs(9), queue_max: 2 });
    batcher.push(start, ["a", "b"], None).unwrap();
    let Next::Batch(taken) = batcher.next(start, start) else { panic!("two are a batch") };
    batcher.push(start, ["c", "d"], None).unwrap();
    taken.jobs.into_iter().for_each(|job| batcher.take_back(job));
    assert_eq!((batcher.len(), batcher.is_ready()), (4, true));
    assert!(batcher.push(start, ["e"], None).is_err(), "they take nobody's place, and make none");
    for (job, closed) in [("a", Closed::Alone), ("b", Closed::Alone), ("c", Closed::Full)] {
        let Next::Batch(batch) = batcher.next(start, start) else { panic!("{job} is next") };
        assert_eq!((batch.jobs[0].job, batch.closed), (job, closed));
    }
}

#[test]
fn a_job_that_is_pushed_to_run_alone_has_an_id_of_its_own_and_can_be_cancelled() {
    let start = Instant::now();
    let mut batcher = Batcher::new(Policy { max_batch_size: 2, wait: Duration::from_secs(9), queue_max: 2 });
    let first = batcher.push(start, ["a"], None).unwrap();
    let (alone, cancelled) = (batcher.push_alone(start, "b"), batcher.push_alone(start, "c"));
    let last = batcher.push(start, ["d"], None).unwrap();
    assert!(first < alone && alone < cancelled && cancelled < last);
    assert_eq!((batcher.cancel(cancelled), batcher.cancel(cancelled), batcher.len()), (Some("c"), None, 3));
    let Next::Batch(batch) = batcher.next(start, start) else { panic!("it is ready") };
    assert_eq!((batch.jobs[0].id, batch.jobs.len(), batch.closed), (alone, 1, Closed::Alone));
    assert_eq!((batcher.cancel(last), batcher.cancel(first), batcher.len()), (Some("d"), Some("a"), 0));
}
