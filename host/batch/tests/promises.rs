//! The batcher's promises over random arrivals, costs, shapes, cancellations, deadlines and availability of replicas. `MODALKIT_TEST_CASES` says how many
//! schedules are tried.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use modalkit_batch::{ArrivalId, Batch, Batcher, Closed, Measure, Next, Policy, Wait};
use proptest::prelude::*;

const SCHEDULES: u32 = 2_000;
/// Shapes there are.
const SHAPES: u64 = 3;

#[derive(Clone, Debug)]
enum Event {
    Push { jobs: Vec<(u64, u64)>, deadline_ms: Option<u64> },
    Cancel { nth: usize },
    Finish { nth: usize },
    Retire,
    Hire,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Waiting,
    Running,
    Answered,
    Cancelled,
    Expired,
}

fn events() -> impl Strategy<Value = Vec<(u64, Event)>> {
    let jobs = prop::collection::vec((0u64..12, 0..SHAPES), 1..6);
    let event = prop_oneof![
        6 => (jobs, prop::option::weighted(0.3, 0u64..40)).prop_map(|(jobs, deadline_ms)| Event::Push { jobs, deadline_ms }),
        2 => any::<usize>().prop_map(|nth| Event::Cancel { nth }),
        4 => any::<usize>().prop_map(|nth| Event::Finish { nth }),
        1 => Just(Event::Retire),
        1 => Just(Event::Hire),
    ];
    // Half-milliseconds between events, so that several fall into one wait.
    prop::collection::vec((0u64..12, event), 1..100)
}

fn policies() -> impl Strategy<Value = Policy> {
    let cost = prop::option::of(1u64..30);
    let wait = prop_oneof![3 => (0u64..8).prop_map(|ms| Wait::Fixed(Duration::from_millis(ms))), 1 => Just(Wait::Adaptive)];
    (1usize..9, cost, wait, 1usize..40).prop_map(|(max_batch_size, max_batch_cost, wait, queue_max)| Policy {
        max_batch_size,
        max_batch_cost,
        wait,
        queue_max,
    })
}

/// A job, as this test knows it.
struct Known {
    id: ArrivalId,
    measure: Measure,
    arrived: Instant,
    deadline: Option<Instant>,
    fate: Fate,
}

/// A world of jobs and replicas around one batcher, which checks the promises at every step.
struct World {
    batcher: Batcher<usize>,
    policy: Policy,
    now: Instant,
    jobs: Vec<Known>,
    waiting: BTreeSet<usize>,
    /// Since when each free replica has been free.
    free: VecDeque<Instant>,
    /// Since when each batch runs, and its jobs.
    running: Vec<(Instant, Vec<usize>)>,
    last_taken: BTreeMap<u64, usize>,
    /// What the slowest batch took.
    slowest: Duration,
}

impl World {
    fn new(policy: Policy, replicas: usize) -> Self {
        let now = Instant::now();
        Self {
            batcher: Batcher::new(policy),
            policy,
            now,
            jobs: Vec::new(),
            waiting: BTreeSet::new(),
            free: std::iter::repeat_n(now, replicas).collect(),
            running: Vec::new(),
            last_taken: BTreeMap::new(),
            slowest: Duration::ZERO,
        }
    }

    fn settle(&mut self, job: usize, from: Fate, fate: Fate) {
        assert_eq!(self.jobs[job].fate, from, "job {job} was to be {fate:?}");
        self.jobs[job].fate = fate;
        if from == Fate::Waiting {
            assert!(self.waiting.remove(&job));
        }
    }

    /// The longest that a job may wait while somebody is free.
    fn wait_max(&self) -> Duration {
        match self.policy.wait {
            Wait::Fixed(wait) => wait,
            Wait::Adaptive => self.slowest,
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Push { jobs, deadline_ms } => {
                let first = self.jobs.len();
                let room = self.policy.queue_max - self.waiting.len();
                let deadline = deadline_ms.map(|ms| self.now + Duration::from_millis(ms));
                let measured = jobs.iter().map(|(cost, shape)| Measure { cost: *cost, shape: *shape });
                let pushed = self.batcher.push(
                    self.now,
                    (first..).zip(measured.clone()).collect::<Vec<_>>(),
                    deadline,
                );
                assert_eq!(pushed.is_ok(), jobs.len() <= room, "a push is taken whole exactly when it fits");
                let Ok(id) = pushed else { return };
                for (nth, measure) in measured.enumerate() {
                    let fate = Fate::Waiting;
                    self.jobs.push(Known { id: id.plus(nth), measure, arrived: self.now, deadline, fate });
                    self.waiting.insert(first + nth);
                }
            }
            Event::Cancel { nth } if !self.jobs.is_empty() => {
                let job = nth % self.jobs.len();
                let waits = self.waiting.contains(&job);
                let cancelled = self.batcher.cancel(self.jobs[job].id);
                assert_eq!(cancelled, waits.then_some(job), "exactly the jobs that wait can be cancelled");
                if waits {
                    self.settle(job, Fate::Waiting, Fate::Cancelled);
                }
            }
            Event::Finish { nth } if !self.running.is_empty() => {
                let (since, done) = self.running.swap_remove(nth % self.running.len());
                let took = self.now - since;
                self.slowest = self.slowest.max(took);
                self.batcher.batch_ended(self.now, done.len(), took);
                done.into_iter().for_each(|job| self.settle(job, Fate::Running, Fate::Answered));
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
            assert!(
                self.jobs[job].deadline.is_some_and(|deadline| deadline <= self.now),
                "job {job} expired early"
            );
            self.settle(job, Fate::Waiting, Fate::Expired);
        }
        while let Some(&free_since) = self.free.iter().min() {
            let next_at = self.batcher.next_at(self.now, free_since);
            let batch = match self.batcher.next(self.now, free_since) {
                Next::Batch(batch) => batch,
                Next::Wait(until) => {
                    assert_eq!(next_at, Some(until));
                    break;
                }
                Next::Idle => {
                    assert_eq!(next_at, None);
                    break;
                }
            };
            assert_eq!(next_at, Some(self.now));
            let jobs = self.check(&batch, free_since);
            let taker = self.free.iter().position(|since| *since == free_since).expect("it is one of them");
            self.free.remove(taker);
            self.running.push((self.now, jobs));
        }
        assert_eq!(self.batcher.len(), self.waiting.len());
        for job in &self.waiting {
            let Known { arrived, deadline, .. } = self.jobs[*job];
            assert!(deadline.is_none_or(|deadline| deadline > self.now), "job {job} outlived its deadline");
            if let Some(&free_since) = self.free.iter().min() {
                let since = arrived.max(free_since);
                assert!(
                    self.now < since + self.wait_max(),
                    "job {job} waits past its time while a replica is free"
                );
            }
        }
    }

    fn check(&mut self, batch: &Batch<usize>, free_since: Instant) -> Vec<usize> {
        let jobs: Vec<usize> = batch.jobs.iter().map(|taken| taken.job).collect();
        assert!(!jobs.is_empty() && jobs.len() <= self.policy.max_batch_size);
        let shape = self.jobs[jobs[0]].measure.shape;
        let alike: Vec<usize> =
            self.waiting.iter().copied().filter(|job| self.jobs[*job].measure.shape == shape).collect();
        assert_eq!(jobs, alike[..jobs.len()], "of one shape, first in, first out, with no gaps");
        let last = self.last_taken.insert(shape, jobs[jobs.len() - 1]);
        assert!(last.is_none_or(|last| last < jobs[0]), "first in, first out between batches of a shape");
        for other in self.waiting.range(..jobs[0]) {
            // It is of another shape.
            let waited = self.now - self.jobs[*other].arrived;
            assert!(waited < self.wait_max(), "job {other} waited {waited:?}, and a later one was taken");
        }
        let costs: Vec<u64> = jobs.iter().map(|job| self.jobs[*job].measure.cost).collect();
        let (cost, cost_max) = (costs.iter().sum::<u64>(), self.policy.max_batch_cost.unwrap_or(u64::MAX));
        assert!(cost <= cost_max || jobs.len() == 1, "{costs:?}");
        let next = alike.get(jobs.len()).map(|job| self.jobs[*job].measure.cost);
        let is_full = jobs.len() == self.policy.max_batch_size;
        let is_costly = cost >= cost_max || next.is_some_and(|next| cost + next > cost_max);
        match batch.closed {
            Closed::Full => assert!(is_full),
            Closed::Costly => assert!(is_costly && !is_full),
            Closed::Waited => {
                assert!(!is_full && !is_costly && next.is_none());
                if let Wait::Fixed(wait) = self.policy.wait {
                    let arrived = self.jobs[jobs[0]].arrived;
                    let others_wait = self.waiting.len() > jobs.len();
                    assert!(
                        self.now >= arrived.max(free_since) + wait
                            || others_wait && self.now >= arrived + wait
                    );
                }
            }
            Closed::Drained => assert!(!is_full && !is_costly),
            Closed::Alone => assert_eq!(jobs.len(), 1),
        }
        jobs.iter().for_each(|job| self.settle(*job, Fate::Waiting, Fate::Running));
        jobs
    }

    /// Passes over every moment at which the batcher asked to be woken, so that no promise hangs on the next event.
    fn advance(&mut self, to: Instant) {
        loop {
            let wake = self.free.iter().min().and_then(|&since| match self.batcher.next(self.now, since) {
                Next::Wait(until) => Some(until),
                Next::Idle => None,
                Next::Batch(_) => panic!("`work` leaves no batch behind"),
            });
            assert!(wake.is_none_or(|wake| wake > self.now), "whoever waits waits for something");
            let expiry = self.waiting.iter().filter_map(|job| self.jobs[*job].deadline).min();
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

fn schedules() -> ProptestConfig {
    let cases = std::env::var("MODALKIT_TEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig::with_cases(cases.unwrap_or(SCHEDULES))
}

proptest! {
    #![proptest_config(schedules())]

    #[test]
    fn every_job_is_answered_once_in_order_and_in_time(
        events in events(),
        policy in policies(),
        replicas in 0usize..4,
    ) {
        let mut world = World::new(policy, replicas);
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
        prop_assert!(world.jobs.iter().all(|job| ![Fate::Waiting, Fate::Running].contains(&job.fate)), "a job was never answered");
        prop_assert!(world.batcher.is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn memory_follows_the_jobs_that_wait(cancelled in prop::collection::vec(any::<bool>(), 1..600)) {
        let policy = policy(4, Duration::from_secs(1), usize::MAX);
        let mut batcher = Batcher::new(policy);
        let now = Instant::now();
        let ids: Vec<ArrivalId> = (0..cancelled.len()).map(|job| batcher.push(now, [measured(job)], None).unwrap()).collect();
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

fn policy(max_batch_size: usize, wait: Duration, queue_max: usize) -> Policy {
    Policy { max_batch_size, max_batch_cost: None, wait: Wait::Fixed(wait), queue_max }
}

fn measured<J>(job: J) -> (J, Measure) {
    (job, Measure::default())
}

/// So many callers that each send again as soon as they are answered, one replica, batches of at most 128 that take 5 ms and 0.1 ms an item: the sizes of
/// batches, and the time that the last so many took. Half of the callers start first, so that the loop begins with two groups that take turns.
fn closed_loop(
    wait: Wait,
    callers: usize,
    batches: usize,
    measured_batches: usize,
) -> (Vec<usize>, Duration) {
    let policy = Policy { max_batch_size: 128, max_batch_cost: None, wait, queue_max: 1024 };
    let mut batcher = Batcher::new(policy);
    let start = Instant::now();
    let mut now = start;
    let first = callers.div_ceil(2);
    batcher.push(now, (0..first).map(measured), None).expect("there is room");
    let mut arrivals: VecDeque<(Instant, usize)> =
        (first..callers).map(|caller| (start + Duration::from_millis(6), caller)).collect();
    let mut free_since = start;
    let mut busy: Option<(Instant, Instant, Vec<usize>)> = None;
    let (mut sizes, mut measured_since) = (Vec::new(), start);
    while sizes.len() < batches {
        let asked = if busy.is_some() { Next::Idle } else { batcher.next(now, free_since) };
        let wake = match asked {
            Next::Batch(batch) => {
                if sizes.len() == batches - measured_batches {
                    measured_since = now;
                }
                sizes.push(batch.jobs.len());
                let cost = Duration::from_micros(5_000 + 100 * batch.jobs.len() as u64);
                busy = Some((now, now + cost, batch.jobs.into_iter().map(|taken| taken.job).collect()));
                continue;
            }
            Next::Wait(until) => Some(until),
            Next::Idle => None,
        };
        let finish = busy.as_ref().map(|(_, until, _)| *until);
        let arrival = arrivals.front().map(|(at, _)| *at);
        now = wake.into_iter().chain(finish).chain(arrival).min().expect("the loop never runs dry");
        while arrivals.front().is_some_and(|(at, _)| *at <= now) {
            let (_, caller) = arrivals.pop_front().expect("one is there");
            batcher.push(now, [measured(caller)], None).expect("there is room");
        }
        if finish.is_some_and(|until| until <= now) {
            let (began, _, answered) = busy.take().expect("it is");
            batcher.batch_ended(now, answered.len(), now - began);
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
    (sizes, now - measured_since)
}

/// With a rule that counts from the arrival alone, the two groups take turns for good.
#[test]
fn a_closed_loop_of_callers_settles_into_full_batches() {
    let (sizes, _) = closed_loop(Wait::Fixed(Duration::from_millis(5)), 128, 100, 1);
    assert!(sizes[5..].iter().all(|size| *size == 128), "batches stayed incomplete: {sizes:?}");
}

#[test]
fn an_adaptive_wait_makes_as_much_of_many_callers_as_a_fixed_one_and_lets_one_alone_go() {
    let rate = |wait, callers| {
        let (sizes, took) = closed_loop(wait, callers, 400, 200);
        sizes[200..].iter().sum::<usize>() as f64 / took.as_secs_f64()
    };
    for callers in [2, 7, 32, 100, 128] {
        let (adaptive, fixed) =
            (rate(Wait::Adaptive, callers), rate(Wait::Fixed(Duration::from_millis(3)), callers));
        assert!(adaptive > 0.95 * fixed, "{callers} callers: {adaptive} a second, {fixed} with a fixed wait");
    }
    // 5.1 ms for a batch of one, and 0.1 ms until its caller is back.
    assert!(rate(Wait::Adaptive, 1) > 0.99 / 0.0052);
}

#[test]
fn a_replica_that_becomes_free_gives_late_callers_their_wait() {
    let wait = Duration::from_millis(5);
    let mut batcher = Batcher::new(policy(4, wait, 8));
    let came = Instant::now();
    batcher.push(came, ["early"].map(measured), None).unwrap();
    let freed = came + Duration::from_millis(50);
    assert!(matches!(batcher.next(freed, freed), Next::Wait(until) if until == freed + wait));
    batcher.push(freed + Duration::from_millis(4), ["late"].map(measured), None).unwrap();
    let Next::Batch(batch) = batcher.next(freed + wait, freed) else { panic!("the wait is over") };
    assert_eq!((batch.jobs.len(), batch.closed), (2, Closed::Waited));
}

#[test]
fn a_job_that_came_back_is_next_and_a_batch_of_its_own_whatever_waits() {
    let start = Instant::now();
    let mut batcher = Batcher::new(policy(2, Duration::from_secs(9), 2));
    batcher.push(start, ["a", "b"].map(measured), None).unwrap();
    let Next::Batch(taken) = batcher.next(start, start) else { panic!("two are a batch") };
    batcher.push(start, ["c", "d"].map(measured), None).unwrap();
    taken.jobs.into_iter().for_each(|job| batcher.take_back(job));
    assert_eq!((batcher.len(), batcher.next_at(start, start)), (4, Some(start)));
    assert!(
        batcher.push(start, ["e"].map(measured), None).is_err(),
        "they take nobody's place, and make none"
    );
    for (job, closed) in [("a", Closed::Alone), ("b", Closed::Alone), ("c", Closed::Full)] {
        let Next::Batch(batch) = batcher.next(start, start) else { panic!("{job} is next") };
        assert_eq!((batch.jobs[0].job, batch.closed), (job, closed));
    }
}

#[test]
fn a_job_that_is_pushed_to_run_alone_has_an_id_of_its_own_and_can_be_cancelled() {
    let start = Instant::now();
    let mut batcher = Batcher::new(policy(2, Duration::from_secs(9), 2));
    let first = batcher.push(start, ["a"].map(measured), None).unwrap();
    let (alone, cancelled) = (batcher.push_alone(start, "b"), batcher.push_alone(start, "c"));
    let last = batcher.push(start, ["d"].map(measured), None).unwrap();
    assert!(first < alone && alone < cancelled && cancelled < last);
    assert_eq!((batcher.cancel(cancelled), batcher.cancel(cancelled), batcher.len()), (Some("c"), None, 3));
    let Next::Batch(batch) = batcher.next(start, start) else { panic!("it is ready") };
    assert_eq!((batch.jobs[0].id, batch.jobs.len(), batch.closed), (alone, 1, Closed::Alone));
    assert_eq!((batcher.cancel(last), batcher.cancel(first), batcher.len()), (Some("d"), Some("a"), 0));
}

#[test]
fn an_adaptive_wait_is_no_longer_than_a_batch_takes_whoever_ends_meanwhile() {
    let service = Duration::from_millis(5);
    let policy = Policy { max_batch_size: 8, max_batch_cost: None, wait: Wait::Adaptive, queue_max: 64 };
    let mut batcher = Batcher::new(policy);
    let mut now = Instant::now();
    // Callers that are back 3 ms after their batch.
    for _ in 0..40 {
        batcher.batch_ended(now, 8, service);
        batcher.push(now + Duration::from_millis(3), (0..8).map(measured), None).unwrap();
        assert_eq!(batcher.clear().len(), 8);
        now += service;
    }
    batcher.push(now, [measured(0)], None).unwrap();
    let ended = now + Duration::from_millis(4);
    batcher.batch_ended(ended, 8, service);
    // Somebody has been free since the job came, and another one is free from now on.
    assert!(matches!(batcher.next(ended, now), Next::Wait(until) if until == now + service));
    assert!(matches!(batcher.next(ended, ended), Next::Wait(until) if until > now + service));
}

#[test]
fn more_shapes_than_are_told_apart_all_run_in_order_and_in_time() {
    const EACH: usize = 3;
    let wait = Duration::from_secs(1);
    let mut batcher = Batcher::new(policy(4, wait, usize::MAX));
    let start = Instant::now();
    let shapes = 0..200_u64;
    for round in 0..EACH as u64 {
        let jobs = shapes.clone().map(|shape| ((shape, round), Measure { cost: 1, shape }));
        batcher.push(start, jobs.collect::<Vec<_>>(), None).unwrap();
    }
    let mut rounds = vec![0; shapes.end as usize];
    let mut batches = 0;
    while let Next::Batch(batch) = batcher.next(start + wait, start) {
        batches += 1;
        assert!(batch.jobs.len() <= 4);
        for taken in batch.jobs {
            let (shape, round) = taken.job;
            assert_eq!(std::mem::replace(&mut rounds[shape as usize], round + 1), round, "of {shape}");
        }
    }
    assert!(batcher.is_empty() && rounds.iter().all(|rounds| *rounds == EACH as u64));
    assert!(batches < 200, "those that aren't told apart share batches: {batches}");
}
