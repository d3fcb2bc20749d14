//! Jobs that were running when a host died. Each runs again with no other job beside it, so that one that takes hosts down is found,
//! and those that only ran with it are not blamed. It decides whose turn that is, and never runs one; time and chance are arguments.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use modalkit_journal::{JobId, Slot};

use super::entry::Entry;

/// How long the other jobs wait at most for one that runs alone; twice as long with each crash in which it ran, so that one that
/// needs long to take the host down is alone in the end.
const ALONE_TIME: Duration = Duration::from_secs(10);
const DOUBLINGS_MAX: u32 = 12;
/// How long nothing more is handed over until what runs has ended and a suspect can be alone.
const HOLD_TIME_MAX: Duration = Duration::from_secs(10);

/// Suspects that wait, and those that run.
#[derive(Default)]
pub(super) struct Suspects {
    waiting: VecDeque<Arc<Entry>>,
    alone: Option<Alone>,
    /// Ran alone for as long as it may; others run beside it now.
    joined: Vec<JobId>,
    held_since: Option<Instant>,
}

/// The one that runs alone.
struct Alone {
    id: JobId,
    until: Instant,
    slot: Weak<Slot>,
}

/// What may be handed over now.
pub(super) enum Turn {
    /// Any job.
    Any,
    /// None.
    None,
    /// This one; `blamed` where no other job runs, not even a suspect that takes long.
    Suspect { entry: Arc<Entry>, blamed: bool },
    /// Any job and this one, which could not be alone.
    Beside(Arc<Entry>),
}

impl Suspects {
    /// Adds one, at a place that chance chose: of two that never run apart, another one is first after the next crash.
    pub(super) fn add(&mut self, entry: Arc<Entry>, chance: usize) {
        let at = chance % (self.waiting.len() + 1);
        self.waiting.insert(at, entry);
    }

    /// Takes one back that nobody ran.
    pub(super) fn put_back(&mut self, entry: Arc<Entry>) {
        self.ended(entry.id);
        self.waiting.push_front(entry);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.alone.is_none()
    }

    /// Takes one out that waits; says whether it did.
    pub(super) fn remove(&mut self, id: JobId) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|entry| entry.id != id);
        self.waiting.len() < before
    }

    /// One was handed over alone.
    pub(super) fn began(&mut self, entry: &Entry, crashes: u32, slot: &Arc<Slot>, now: Instant) {
        let time = ALONE_TIME * 2u32.pow(crashes.saturating_sub(1).min(DOUBLINGS_MAX));
        self.alone = Some(Alone { id: entry.id, until: now + time, slot: Arc::downgrade(slot) });
    }

    /// A job has ended, or came back.
    pub(super) fn ended(&mut self, id: JobId) {
        if self.alone.as_ref().is_some_and(|alone| alone.id == id) {
            self.alone = None;
        }
        self.joined.retain(|joined| *joined != id);
    }

    /// What may be handed over while this many jobs are in models' queues or running. Suspects of models that don't serve wait.
    pub(super) fn next(&mut self, now: Instant, handed: usize, serves: impl Fn(&str) -> bool) -> Turn {
        if let Some(alone) = &self.alone {
            if now < alone.until {
                return Turn::None;
            }
            if let Some(slot) = alone.slot.upgrade() {
                slot.joined();
            }
            self.joined.push(alone.id);
            self.alone = None;
        }
        let Some(at) = self.waiting.iter().position(|entry| serves(&entry.model)) else {
            self.held_since = None;
            return Turn::Any;
        };
        let others = handed.saturating_sub(self.joined.len());
        let held_since = *self.held_since.get_or_insert(now);
        if others > 0 && now.saturating_duration_since(held_since) < HOLD_TIME_MAX {
            return Turn::None;
        }
        self.held_since = None;
        let entry = self.waiting.remove(at).expect("it was found there");
        if others > 0 {
            return Turn::Beside(entry);
        }
        Turn::Suspect { entry, blamed: self.joined.is_empty() }
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

    fn entries(count: usize) -> Vec<Arc<Entry>> {
        let folder = tempfile::tempdir().unwrap();
        let retention =
            modalkit_journal::Retention { time: Duration::ZERO, bytes_max: u64::MAX, names: Duration::ZERO };
        let (journal, _) =
            modalkit_journal::Journal::open(folder.path(), retention, Box::new(|_| ())).unwrap();
        (0..count).map(|_| Arc::new(Entry::of_tests(journal.next_id(), "m"))).collect()
    }

    fn suspect(turn: Turn) -> (Arc<Entry>, bool) {
        match turn {
            Turn::Suspect { entry, blamed } => (entry, blamed),
            _ => panic!("expected a suspect's turn"),
        }
    }

    #[test]
    fn suspects_run_one_by_one_and_everybody_else_waits_for_them_and_for_a_named_time_only() {
        let (all, mut suspects, begun) = (entries(3), Suspects::default(), Instant::now());
        let now = |seconds| begun + Duration::from_secs(seconds);
        let serves = |_: &str| true;
        for entry in &all {
            suspects.add(Arc::clone(entry), 0);
        }
        // The last one added came first. Of a model that doesn't serve, none keeps anybody waiting.
        assert!(matches!(suspects.next(now(0), 5, |_| false), Turn::Any));
        // What was handed over before ends first.
        assert!(matches!(suspects.next(now(0), 5, serves), Turn::None));
        let (first, blamed) = suspect(suspects.next(now(1), 0, serves));
        assert!(blamed && first.id == all[2].id);
        suspects.alone = Some(Alone { id: first.id, until: now(11), slot: Weak::new() });
        assert!(matches!(suspects.next(now(10), 1, serves), Turn::None));
        suspects.ended(first.id);
        let (second, _) = suspect(suspects.next(now(10), 0, serves));
        assert_eq!(second.id, all[1].id);
        suspects.alone = Some(Alone { id: second.id, until: now(20), slot: Weak::new() });
        // It takes long: the next one runs beside it alone, and neither is blamed.
        let (third, blamed) = suspect(suspects.next(now(20), 1, serves));
        assert!(!blamed && third.id == all[0].id);
        assert!(matches!(suspects.next(now(21), 2, serves), Turn::Any));
        suspects.ended(second.id);
        suspects.put_back(third);
        // Others run, and take long.
        assert!(matches!(suspects.next(now(22), 4, serves), Turn::None));
        assert_eq!(suspects.next_change(), Some(now(32)));
        assert!(matches!(suspects.next(now(32), 4, serves), Turn::Beside(_)));
        assert!(suspects.is_empty());
    }
}
