//! Decides when a job runs: one loop over one enum of events, on a thread of its own. It hands accepted jobs to their models' queues,
//! a few at a time so that callers who wait are not kept behind them, and writes what became of each to the journal.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io,
    sync::{Arc, Weak, atomic::Ordering},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use modalkit_journal::{JobId, Journal, Retry, Slot, unix_ms};
use modalkit_loader::FailureKind;
use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use super::{
    Jobs,
    ending::{Ending, end, hopeless, input, shortened},
    entry::{Attempt, Entry, Head, Phase},
    suspects::{Suspects, Turn},
};
use crate::{
    admission::{Gate, JobPermit},
    config::ModelSpec,
    dispatch::Models,
    egress,
    job::{Deadline, Job, JobError, Reply, ReplyHandle, RequestId},
    pipeline::Model,
};

/// The fewest jobs in a model's queue, where there are as many.
const WINDOW_MIN: usize = 64;
/// Full rounds of a model's batches that are in its queue.
const WINDOW_BATCHES: usize = 4;
/// The share of a model's queue that jobs may take: callers who wait on a connection need room too.
const WINDOW_OF_QUEUE: usize = 2;
/// Between two looks at a model that takes no jobs.
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);
/// Between two attempts, at first and at most; the next one waits twice as long, give or take.
const BACKOFF_MIN: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Jobs of a model that wait with their decoded inputs.
const HEADS_MAX: usize = 256;
/// Jobs of a model that are ended unrun in one turn of the loop: each is read and written.
const ENDED_AT_ONCE: usize = 64;
/// The loop looks up this often, whatever happens.
const IDLE: Duration = Duration::from_secs(10);

/// What the runner is told.
pub(super) enum Event {
    /// A job is on disk.
    Accepted(Arc<Entry>, Head),
    /// An attempt is over; if it `began`, it counts.
    Answered { entry: Arc<Entry>, reply: Reply, began: bool, permit: JobPermit },
    /// A job was taken back.
    Cancel(Arc<Entry>),
    /// Hand over nothing more.
    Drain(oneshot::Sender<()>),
    /// End.
    Stop,
}

/// What has been told to the runner and not been looked at.
#[derive(Default)]
pub(super) struct Inbox {
    events: Mutex<(Vec<Event>, bool)>,
    bell: Condvar,
}

impl Inbox {
    /// Tells it, and wakes the runner if it sleeps.
    pub(super) fn put(&self, event: Event) {
        self.put_quietly(event);
        self.ring();
    }

    /// Tells it; whoever does so rings soon.
    pub(super) fn put_quietly(&self, event: Event) {
        self.events.lock().0.push(event);
    }

    /// Wakes the runner if it sleeps and there is something to be told.
    pub(super) fn ring(&self) {
        let mut events = self.events.lock();
        if !events.0.is_empty() && std::mem::take(&mut events.1) {
            drop(events);
            self.bell.notify_one();
        }
    }

    fn take(&self, into: &mut Vec<Event>, until: Instant) {
        let mut events = self.events.lock();
        if events.0.is_empty() {
            events.1 = true;
            self.bell.wait_until(&mut events, until);
            events.1 = false;
        }
        std::mem::swap(&mut events.0, into);
    }
}

pub(super) struct Runner {
    jobs: Weak<Jobs>,
    models: Arc<Models>,
    gate: Arc<Gate>,
    inbox: Arc<Inbox>,
    lines: HashMap<Arc<str>, Line>,
    suspects: Suspects,
    /// A suspect has the host to itself: nothing else is looked at.
    held: bool,
    draining: bool,
    stopped: bool,
    waits_for_disk: bool,
}

/// One model's jobs.
#[derive(Default)]
struct Line {
    waiting: VecDeque<(Arc<Entry>, Head)>,
    /// By when their next attempt may begin, whatever becomes of the system's clock.
    delayed: BTreeMap<(Instant, JobId), Arc<Entry>>,
    /// In the model's queue, or running.
    handed: usize,
    /// The model took none: it is looked at again then.
    blocked_until: Option<Instant>,
    /// It was said that nobody serves the model.
    told: bool,
}

impl Runner {
    pub(super) fn new(jobs: &Arc<Jobs>, models: Arc<Models>, gate: Arc<Gate>, inbox: Arc<Inbox>) -> Self {
        Self {
            jobs: Arc::downgrade(jobs),
            models,
            gate,
            inbox,
            lines: HashMap::new(),
            suspects: Suspects::default(),
            held: false,
            draining: false,
            stopped: false,
            waits_for_disk: false,
        }
    }

    pub(super) fn start(self) -> io::Result<JoinHandle<()>> {
        thread::Builder::new().name("jobs".to_owned()).spawn(move || self.run())
    }

    fn run(mut self) {
        let mut events = Vec::new();
        while !self.stopped {
            self.inbox.take(&mut events, self.next_look());
            let Some(jobs) = self.jobs.upgrade() else { return };
            let journal = jobs.journal.read();
            let Some(journal) = &*journal else { return };
            for event in events.drain(..) {
                self.on(event, &jobs, journal);
            }
            // What ends while nothing can be written is kept in memory: more isn't begun.
            self.waits_for_disk = journal.failing().is_some();
            if !self.draining && !jobs.draining.load(Ordering::SeqCst) && !self.waits_for_disk {
                self.hand_over(&jobs, journal);
            }
        }
    }

    fn next_look(&self) -> Instant {
        let now = Instant::now();
        if self.waits_for_disk {
            return now + BETWEEN_LOOKS;
        }
        if self.draining {
            return now + IDLE;
        }
        let of_line = |line: &Line| {
            let blocked = line.blocked_until.filter(|_| !line.waiting.is_empty());
            let due = line.delayed.first_key_value().map(|((due, _), _)| *due);
            blocked.into_iter().chain(due).min()
        };
        let of_lines = self.lines.values().filter_map(of_line).min().filter(|_| !self.held);
        let of_suspects = self.suspects.any_wait().then_some(now + BETWEEN_LOOKS);
        let soonest = of_lines.into_iter().chain(of_suspects).chain(self.suspects.next_change()).min();
        soonest.unwrap_or(now + IDLE).min(now + IDLE)
    }

    fn on(&mut self, event: Event, jobs: &Arc<Jobs>, journal: &Journal) {
        match event {
            Event::Accepted(entry, head) => self.accepted(entry, head),
            Event::Answered { entry, reply, began, permit } => {
                self.suspects.ended(entry.id, Instant::now());
                self.line(&entry).handed -= 1;
                self.answered(&entry, reply, began, permit, jobs, journal);
            }
            Event::Cancel(entry) => self.cancel(&entry, jobs, journal),
            Event::Drain(reply) => {
                self.draining = true;
                // What is cut off at the end is nobody's crash.
                self.suspects.release(Instant::now());
                // Durable jobs that haven't begun are the next start's: nobody waits for their batches to fill, nor for them.
                for (queue, number) in jobs.shared.handed() {
                    queue.cancel(number, 1);
                }
                // Whoever asked may have been cut off.
                let _ = reply.send(());
            }
            Event::Stop => self.stopped = true,
        }
    }

    fn accepted(&mut self, entry: Arc<Entry>, head: Head) {
        let (next, suspect) = {
            let mut live = entry.live.lock();
            live.phase = Phase::Waiting;
            (live.next, live.suspect)
        };
        if suspect {
            return self.suspects.add(entry, fastrand::usize(..));
        }
        let line = self.line(&entry);
        match next {
            // A clock that was set back keeps nobody waiting for longer than an attempt may.
            Some(next) => {
                let wait = Duration::from_millis(next.saturating_sub(unix_ms())).min(2 * BACKOFF_MAX);
                line.delayed.insert((Instant::now() + wait, entry.id), entry);
            }
            // What waits long is decoded when its turn comes.
            None if line.waiting.len() >= HEADS_MAX => line.waiting.push_back((entry, Head::default())),
            None => line.waiting.push_back((entry, head)),
        }
    }

    fn line(&mut self, entry: &Entry) -> &mut Line {
        self.lines.entry(Arc::clone(&entry.model)).or_default()
    }

    fn answered(
        &mut self,
        entry: &Arc<Entry>,
        reply: Reply,
        began: bool,
        permit: JobPermit,
        jobs: &Arc<Jobs>,
        journal: &Journal,
    ) {
        if began {
            let mut live = entry.live.lock();
            live.attempts += 1;
            live.suspect = false;
        }
        if entry.is_cancelled() {
            return end(entry, Ending::cancelled(), Some(permit), jobs, journal);
        }
        let error = match reply {
            Ok(answer) => {
                let ending = Ending::answered(entry, journal, answer, jobs.shared.spec.result_bytes_max);
                return end(entry, ending, Some(permit), jobs, journal);
            }
            Err(error) => error,
        };
        if !began && came_back(&error) {
            // Nobody ran it: it waits for its turn again, in front of those that came later.
            let suspect = {
                let mut live = entry.live.lock();
                live.phase = Phase::Waiting;
                live.queued = None;
                live.suspect
            };
            if suspect {
                return self.suspects.put_back(Arc::clone(entry), Instant::now());
            }
            let line = self.line(entry);
            line.waiting.push_front((Arc::clone(entry), Head::default()));
            line.blocked_until = Some(Instant::now() + BETWEEN_LOOKS);
            return;
        }
        let attempts = entry.live.lock().attempts;
        // Of a model that has gone meanwhile, whoever comes after it decides.
        let retries = self.models.find(Some(&entry.model)).map_or(u32::MAX, |model| model.spec().retries);
        if helps(&error) && attempts <= retries {
            let wait = backoff(attempts);
            let next = unix_ms() + wait.as_millis() as u64;
            let text = shortened(egress::job_failure(&error));
            tracing::info!(model = &*entry.model, job_id = %entry.id, attempts, next_in = ?wait, error = text, "an attempt failed and is repeated");
            let started = {
                let mut live = entry.live.lock();
                live.phase = Phase::Waiting;
                live.next = Some(next);
                live.error = Some(text.clone());
                live.started
            };
            journal.retry(Retry { id: entry.id, attempts, started, next, error: text });
            self.line(entry).delayed.insert((Instant::now() + wait, entry.id), Arc::clone(entry));
            return;
        }
        let ending = Ending::failed(entry, journal, egress::job_failure(&error));
        end(entry, ending, Some(permit), jobs, journal);
    }

    /// One that waits ends now; one in the model's queue is taken out, which tells its end; one that runs ends with its batch.
    fn cancel(&mut self, entry: &Arc<Entry>, jobs: &Arc<Jobs>, journal: &Journal) {
        let (phase, queued) = {
            let live = entry.live.lock();
            (live.phase, live.queued.clone())
        };
        if let (Phase::Handed, Some((queue, number))) = (phase, queued) {
            queue.cancel(number, 1);
        } else if phase == Phase::Waiting {
            if self.suspects.remove(entry.id) {
                return end(entry, Ending::cancelled(), None, jobs, journal);
            }
            let line = self.line(entry);
            let before = line.waiting.len() + line.delayed.len();
            line.waiting.retain(|(waiting, _)| waiting.id != entry.id);
            line.delayed.retain(|(_, id), _| *id != entry.id);
            // One that is nowhere was handed over and not taken: its end is on its way here.
            if line.waiting.len() + line.delayed.len() < before {
                end(entry, Ending::cancelled(), None, jobs, journal);
            }
        }
    }

    /// Fills the models' queues up to their windows, where no suspect has the host to itself.
    fn hand_over(&mut self, jobs: &Arc<Jobs>, journal: &Journal) {
        for entry in self.suspects.take_overdue(Instant::now()) {
            let ending = Ending::failed(&entry, journal, egress::job_failure(&JobError::DeadlinePassed));
            end(&entry, ending, None, jobs, journal);
        }
        self.held = !self.hand_over_suspects(jobs, journal);
        if !self.held {
            self.hand_over_lines(jobs, journal);
        }
    }

    /// Hands the next suspect over, where it may be alone. `false` where nothing else may be handed over.
    fn hand_over_suspects(&mut self, jobs: &Arc<Jobs>, journal: &Journal) -> bool {
        while !self.suspects.is_empty() {
            let handed = self.lines.values().map(|line| line.handed).sum();
            let serving =
                |name: &str| self.models.find(Some(name)).ok().filter(|model| model.serving().is_ok());
            match self.suspects.next(Instant::now(), handed, |name| serving(name).is_some()) {
                Turn::None => return false,
                Turn::Any => return true,
                Turn::Beside(entry) => {
                    self.line(&entry).waiting.push_front((entry, Head::default()));
                    return true;
                }
                Turn::Alone(entry) => match serving(&entry.model) {
                    Some(model) => self.hand_over_suspect(entry, &model, jobs, journal),
                    None => self.suspects.put_back(entry, Instant::now()),
                },
            }
        }
        true
    }

    /// Hands a job over that runs with no other beside it.
    fn hand_over_suspect(
        &mut self,
        entry: Arc<Entry>,
        model: &Arc<Model>,
        jobs: &Arc<Jobs>,
        journal: &Journal,
    ) {
        let crashes = entry.live.lock().crashes;
        let line = self.lines.entry(Arc::clone(&entry.model)).or_default();
        let hand = Hand { model, gate: &self.gate, inbox: &self.inbox, jobs, journal, alone: true };
        match line.hand(Arc::clone(&entry), Head::default(), &hand) {
            Handed::Queued { must_wake, slot } => {
                tracing::info!(model = &*entry.model, job_id = %entry.id, crashes, "a job that was running when the host died runs alone");
                self.suspects.handed(&entry, crashes, model.spec().batch.wait, &slot, Instant::now());
                if must_wake {
                    model.queue.wake();
                }
            }
            // One that the queue didn't take comes back with the end of its attempt.
            Handed::Ended | Handed::Refused => {}
            Handed::Unreadable(..) => self.suspects.put_back(entry, Instant::now()),
        }
    }

    fn hand_over_lines(&mut self, jobs: &Arc<Jobs>, journal: &Journal) {
        let now = Instant::now();
        for (name, line) in &mut self.lines {
            while let Some(due) = line.delayed.first_entry().filter(|due| due.key().0 <= now) {
                let entry = due.remove();
                entry.live.lock().next = None;
                line.waiting.push_back((entry, Head::default()));
            }
            if line.waiting.is_empty() || line.blocked_until.is_some_and(|until| until > now) {
                continue;
            }
            line.blocked_until = None;
            let found = self.models.find(Some(name));
            if found.is_err() && self.models.are_complete() && !std::mem::replace(&mut line.told, true) {
                tracing::warn!(
                    model = &**name,
                    jobs = line.waiting.len(),
                    "jobs wait for a model that nobody serves"
                );
            }
            let Some(model) = found.ok().filter(|model| model.serving().is_ok()) else {
                // It may be loading, or have gone; what waits for it waits.
                line.blocked_until = Some(now + BETWEEN_LOOKS);
                line.end_overdue(now, jobs, journal);
                continue;
            };
            let (gate, inbox) = (&self.gate, &self.inbox);
            line.fill(&Hand { model: &model, gate, inbox, jobs, journal, alone: false });
        }
        self.lines.retain(|_, line| line.handed > 0 || !line.waiting.is_empty() || !line.delayed.is_empty());
    }
}

/// What is needed to hand a job over to its model.
struct Hand<'a> {
    model: &'a Model,
    gate: &'a Arc<Gate>,
    inbox: &'a Arc<Inbox>,
    jobs: &'a Arc<Jobs>,
    journal: &'a Journal,
    /// No other job runs beside it.
    alone: bool,
}

/// What became of a job that was to be handed over.
enum Handed {
    /// The model's queue has it.
    Queued { must_wake: bool, slot: Arc<Slot> },
    /// It has ended unrun.
    Ended,
    /// The queue didn't take it: that comes back as the end of its attempt.
    Refused,
    /// The journal can't be read.
    Unreadable(Arc<Entry>, Head),
}

impl Line {
    fn fill(&mut self, hand: &Hand<'_>) {
        let window = window(&hand.model.spec());
        let (mut wakes, mut unrun) = (false, 0);
        while self.handed < window {
            if unrun >= ENDED_AT_ONCE {
                self.blocked_until = Some(Instant::now());
                break;
            }
            let Some((entry, head)) = self.waiting.pop_front() else { break };
            match self.hand(entry, head, hand) {
                Handed::Queued { must_wake, .. } => wakes |= must_wake,
                Handed::Ended => unrun += 1,
                Handed::Refused => {
                    self.blocked_until = Some(Instant::now() + BETWEEN_LOOKS);
                    break;
                }
                Handed::Unreadable(entry, head) => {
                    self.waiting.push_front((entry, head));
                    self.blocked_until = Some(Instant::now() + BETWEEN_LOOKS);
                    break;
                }
            }
        }
        if wakes {
            hand.model.queue.wake();
        }
    }

    fn hand(&mut self, entry: Arc<Entry>, head: Head, hand: &Hand<'_>) -> Handed {
        let Hand { model, gate, inbox, jobs, journal, alone } = *hand;
        if let Some(ending) = hopeless(&entry, &model.spec(), jobs.shared.spec.crashes_max, journal) {
            end(&entry, ending, None, jobs, journal);
            return Handed::Ended;
        }
        let input = match input(&entry, journal) {
            Ok(Some(input)) => input,
            Ok(None) => {
                let lost = "what came in for it is not in the journal".to_owned();
                end(&entry, Ending::failed(&entry, journal, lost), None, jobs, journal);
                return Handed::Ended;
            }
            Err(error) => {
                tracing::error!(job_id = %entry.id, error = ?error, "the journal can't be read; the job waits");
                return Handed::Unreadable(entry, head);
            }
        };
        // Its end needs it as well, and comes soon.
        jobs.shared.keep_input(&entry, &input);
        let attempts = entry.live.lock().attempts;
        let slot = Arc::new(journal.ledger().slot(entry.id, attempts + 1, alone));
        let attempt = Attempt {
            entry: Arc::clone(&entry),
            slot: Arc::clone(&slot),
            inbox: Arc::clone(inbox),
            permit: Some(gate.job()),
            began: false.into(),
            metrics: Arc::clone(&jobs.shared.metrics),
        };
        let job = Job {
            request_id: RequestId::Given(entry.id.to_string().into()),
            input: input.parts.message,
            item: head.item,
            reply: ReplyHandle::recorded(Box::new(attempt)),
            trail: head.trail,
        };
        // Counted whatever happens: one that isn't taken tells its end as well.
        self.handed += 1;
        // Before the queue has it: a lane may begin it at once.
        let mut live = entry.live.lock();
        match model.queue.push([job], entry.deadline.map(Deadline)) {
            Ok(queued) => {
                live.phase = Phase::Handed;
                live.queued = Some((Arc::clone(&model.queue), queued.first));
                Handed::Queued { must_wake: queued.must_wake, slot }
            }
            Err(_) => Handed::Refused,
        }
    }

    /// Ends those whose time has passed while their model was away.
    fn end_overdue(&mut self, now: Instant, jobs: &Arc<Jobs>, journal: &Journal) {
        let overdue =
            |(entry, _): &(Arc<Entry>, Head)| entry.deadline.is_some_and(|deadline| deadline <= now);
        for _ in 0..ENDED_AT_ONCE {
            let Some(place) = self.waiting.iter().position(overdue) else { return };
            let Some((entry, _)) = self.waiting.remove(place) else { return };
            let ending = Ending::failed(&entry, journal, egress::job_failure(&JobError::DeadlinePassed));
            end(&entry, ending, None, jobs, journal);
        }
    }
}

/// Jobs that one model has in its queue or running.
fn window(spec: &ModelSpec) -> usize {
    let round = spec.batch.max_batch_size * spec.replicas.max * spec.replicas.batches_in_flight;
    (WINDOW_BATCHES * round).max(WINDOW_MIN).min((spec.batch.queue_max / WINDOW_OF_QUEUE).max(1))
}

/// Whether an attempt that didn't begin may be made later.
fn came_back(error: &JobError) -> bool {
    matches!(error, JobError::Unavailable(_) | JobError::Busy(_) | JobError::Lost)
}

/// Whether another attempt may help: never where the input is to blame.
fn helps(error: &JobError) -> bool {
    match error {
        JobError::Failed(failure) => match failure.kind {
            FailureKind::Transient
            | FailureKind::DeviceLost
            | FailureKind::DeviceSuspected
            | FailureKind::Panicked => true,
            FailureKind::InvalidInput | FailureKind::Permanent => false,
        },
        JobError::BatchTimedOut(_) | JobError::Lost | JobError::Unavailable(_) | JobError::Busy(_) => true,
        JobError::Invalid(_)
        | JobError::UnknownModel { .. }
        | JobError::TooLarge(_)
        | JobError::Conflict(_)
        | JobError::DeadlinePassed => false,
    }
}

/// Twice as long after each attempt, and each a little different, so that those that failed together don't come together again.
fn backoff(attempts: u32) -> Duration {
    let doubled = BACKOFF_MIN.saturating_mul(1 << attempts.saturating_sub(1).min(16)).min(BACKOFF_MAX);
    doubled.mul_f64(0.5 + fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_up_to_a_limit() {
        for _ in 0..100 {
            let (first, later) = (backoff(1), backoff(40));
            assert!(first >= BACKOFF_MIN / 2 && first < BACKOFF_MIN * 3 / 2, "{first:?}");
            assert!(later >= BACKOFF_MAX / 2 && later < BACKOFF_MAX * 3 / 2, "{later:?}");
        }
    }
}
