//! Jobs that were running when a host died, and may have done it. Each runs again with no other job beside it, so that one that takes hosts down is found,
//! and those that only ran with it are not blamed. It decides whose turn that is, and never runs one; time and chance are arguments.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use modalkit_journal::{JobId, Slot};

use super::live_job::LiveJob;

/// How long the other jobs wait at most for one that runs alone; twice as long with each crash in which it ran, so that one that
/// needs long to take the host down is alone in the end.
const ALONE_TIME: Duration = Duration::from_secs(10);
const DOUBLINGS_MAX: u32 = 6;
/// How long nothing more is handed over until what runs has ended and a suspect can be alone.
const HOLD_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the other jobs wait for suspects in all, after one start.
const ALL_HOLDS_TIME_MAX: Duration = Duration::from_secs(900);
/// After a suspect was not taken by its model's queue, the wait until the next try.
const BETWEEN_TRIES: Duration = Duration::from_millis(50);

/// Suspects that wait, and those that run.
#[derive(Default)]
pub(super) struct Suspects {
    waiting: Vec<Arc<LiveJob>>,
    alone: Option<Alone>,
    /// Ran alone for as long as they may; other jobs run beside them now.
    joined: Vec<JobId>,
    held_since: Option<Instant>,
    /// How long others have waited for those that were alone.
    held: Duration,
    /// A model's queue took none: others go on until then.
    blocked_until: Option<Instant>,
}

/// The one that runs alone.
struct Alone {
    id: JobId,
    since: Instant,
    until: Instant,
    slot: Weak<Slot>,
}

/// What may be handed over now.
pub(super) enum NextSuspect {
    /// Any job.
    Any,
    /// None.
    None,
    /// This one, and no other beside it.
    Alone(Arc<LiveJob>),
    /// Any job and this one, which could not be alone.
    Beside(Arc<LiveJob>),
}

impl Suspects {
    /// Adds one, at a place that chance chose: of two that never run apart, another one is first after the next crash.
    pub(super) fn add(&mut self, live_job: Arc<LiveJob>, chance: usize) {
        let at = chance % (self.waiting.len() + 1);
        self.waiting.insert(at, live_job);
    }

    /// Takes one back that nobody ran.
    pub(super) fn put_back(&mut self, live_job: Arc<LiveJob>, now: Instant) {
        self.ended(live_job.id, now);
        self.waiting.push(live_job);
        self.blocked_until = Some(now + BETWEEN_TRIES);
    }

    /// Those that wait and whose time has passed.
    pub(super) fn take_overdue(&mut self, now: Instant) -> Vec<Arc<LiveJob>> {
        let overdue = |live_job: &mut Arc<LiveJob>| live_job.deadline.is_some_and(|deadline| deadline <= now);
        self.waiting.extract_if(.., overdue).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.alone.is_none()
    }

    /// Takes one out that waits; says whether it did.
    pub(super) fn remove(&mut self, id: JobId) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|live_job| live_job.id != id);
        if self.waiting.is_empty() {
            self.held_since = None;
        }
        self.waiting.len() < before
    }

    /// One was handed over alone.
    pub(super) fn handed(&mut self, live_job: &LiveJob, crashes: u32, slot: &Arc<Slot>, now: Instant) {
        let time = ALONE_TIME * 2u32.pow(crashes.saturating_sub(1).min(DOUBLINGS_MAX));
        self.alone =
            Some(Alone { id: live_job.id, since: now, until: now + time, slot: Arc::downgrade(slot) });
    }

    /// A job has ended, or came back.
    pub(super) fn ended(&mut self, id: JobId, now: Instant) {
        if let Some(alone) = self.alone.take_if(|alone| alone.id == id) {
            self.held += now.saturating_duration_since(alone.since);
        }
        self.joined.retain(|joined| *joined != id);
    }

    /// Others may run beside the one that is alone, and the host may end while it runs: it is not to blame for what happens.
    pub(super) fn release(&mut self, now: Instant) {
        if let Some(alone) = self.alone.take() {
            if let Some(slot) = alone.slot.upgrade() {
                slot.joined();
            }
            self.held += now.saturating_duration_since(alone.since);
            self.joined.push(alone.id);
        }
    }

    /// What may be handed over while this many jobs are in models' queues or running. Suspects of models that don't serve wait.
    pub(super) fn next(&mut self, now: Instant, handed: usize, serves: impl Fn(&str) -> bool) -> NextSuspect {
        if self.alone.as_ref().is_some_and(|alone| now < alone.until) {
            return NextSuspect::None;
        }
        self.release(now);
        let is_blocked = self.blocked_until.is_some_and(|until| now < until);
        let Some(at) = self.waiting.iter().position(|live_job| !is_blocked && serves(&live_job.model)) else {
            self.held_since = None;
            return NextSuspect::Any;
        };
        // Beside one that takes long nobody is alone, and others have waited long enough.
        if !self.joined.is_empty() || self.held >= ALL_HOLDS_TIME_MAX {
            return NextSuspect::Beside(self.waiting.remove(at));
        }
        let held_since = *self.held_since.get_or_insert(now);
        if handed > 0 && now.saturating_duration_since(held_since) < HOLD_TIME_MAX {
            return NextSuspect::None;
        }
        self.held_since = None;
        let live_job = self.waiting.remove(at);
        if handed > 0 { NextSuspect::Beside(live_job) } else { NextSuspect::Alone(live_job) }
    }

    /// When that changes by itself; `None` where it doesn't.
    pub(super) fn next_change(&self) -> Option<Instant> {
        let held = self.held_since.map(|since| since + HOLD_TIME_MAX);
        self.alone.as_ref().map(|alone| alone.until).into_iter().chain(held).min()
    }

    /// Whether one waits, whose model may begin to serve at any moment.
    pub(super) fn any_wait(&self) -> bool {
        !self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> (tempfile::TempDir, modalkit_journal::Journal) {
        let folder = tempfile::tempdir().unwrap();
        let retention =
            modalkit_journal::Retention { time: Duration::ZERO, bytes_max: u64::MAX, names: Duration::ZERO };
        let (journal, _) = modalkit_journal::Journal::open(
            modalkit_journal::FolderLock::take(folder.path()).unwrap(),
            &modalkit_journal::HostDeath::MachineStopped,
            retention,
            Box::new(|_| ()),
        )
        .unwrap();
        (folder, journal)
    }

    fn entries(count: usize) -> Vec<Arc<LiveJob>> {
        let (_folder, journal) = journal();
        (0..count).map(|_| Arc::new(LiveJob::of_tests(journal.next_id(), "m"))).collect()
    }

    fn slot() -> Arc<Slot> {
        let (_folder, journal) = journal();
        Arc::new(journal.ledger().slot(journal.next_id(), 1, true))
    }

    fn alone(turn: NextSuspect) -> Arc<LiveJob> {
        match turn {
            NextSuspect::Alone(live_job) => live_job,
            _ => panic!("expected a suspect's turn"),
        }
    }

    #[test]
    fn suspects_run_one_by_one_and_everybody_else_waits_for_them_and_for_a_named_time_only() {
        let (all, mut suspects, begun) = (entries(4), Suspects::default(), Instant::now());
        let now = |seconds| begun + Duration::from_secs(seconds);
        let serves = |_: &str| true;
        for live_job in &all {
            suspects.add(Arc::clone(live_job), 0);
        }
        // The last one added came first. Of a model that doesn't serve, none keeps anybody waiting.
        assert!(matches!(suspects.next(now(0), 5, |_| false), NextSuspect::Any));
        // What was handed over before ends first.
        assert!(matches!(suspects.next(now(0), 5, serves), NextSuspect::None));
        let first = alone(suspects.next(now(1), 0, serves));
        assert_eq!(first.id, all[3].id);
        let hand = |suspects: &mut Suspects, live_job: &LiveJob, at: Instant| {
            suspects.handed(live_job, 1, &slot(), at);
        };
        hand(&mut suspects, &first, now(1));
        assert!(matches!(suspects.next(now(10), 1, serves), NextSuspect::None));
        suspects.ended(first.id, now(10));
        let second = alone(suspects.next(now(10), 0, serves));
        hand(&mut suspects, &second, now(10));
        // It takes long: nobody is alone beside it, and others go on.
        assert!(matches!(suspects.next(now(20), 1, serves), NextSuspect::Beside(_)));
        suspects.ended(second.id, now(21));
        // Others run, and take long.
        assert!(matches!(suspects.next(now(22), 4, serves), NextSuspect::None));
        assert_eq!(suspects.next_change(), Some(now(32)));
        assert!(matches!(suspects.next(now(32), 4, serves), NextSuspect::Beside(_)));
        assert!(suspects.is_empty() && suspects.next_change().is_none());
    }

    #[test]
    fn one_that_is_not_taken_keeps_nobody_waiting_and_one_that_is_taken_back_leaves_no_hold() {
        let (all, mut suspects, begun) = (entries(1), Suspects::default(), Instant::now());
        let now = |millis| begun + Duration::from_millis(millis);
        suspects.add(Arc::clone(&all[0]), 0);
        let live_job = alone(suspects.next(now(0), 0, |_| true));
        suspects.put_back(live_job, now(0));
        assert!(
            matches!(suspects.next(now(1), 0, |_| true), NextSuspect::Any),
            "its queue is full: others go on"
        );
        assert!(matches!(suspects.next(now(60), 1, |_| true), NextSuspect::None));
        assert!(suspects.remove(all[0].id));
        assert_eq!(suspects.next_change(), None, "nobody is held for one that is gone");
    }

    #[test]
    fn all_holds_together_have_an_end() {
        let (all, mut suspects, begun) = (entries(200), Suspects::default(), Instant::now());
        for live_job in &all {
            suspects.add(Arc::clone(live_job), 0);
        }
        let (mut now, mut turns) = (begun, 0);
        while let NextSuspect::Alone(live_job) = suspects.next(now, 0, |_| true) {
            suspects.handed(&live_job, 1, &slot(), now);
            now += Duration::from_secs(9);
            suspects.ended(live_job.id, now);
            turns += 1;
        }
        assert_eq!(turns, 100, "15 minutes of 9 seconds");
        assert!(matches!(suspects.next(now, 5, |_| true), NextSuspect::Beside(_)));
    }
}
