//! Decides when a job runs: one loop over one enum of events, on a thread of its own. It hands accepted jobs to their models' queues,
//! a few at a time so that callers who wait are not kept behind them, and writes what became of each to the journal.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io,
    sync::{Arc, Weak, atomic::Ordering},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use bytes::Bytes;
use modalkit_journal::{Finish, JobId, Journal, Retry, State, unix_ms};
use modalkit_loader::FailureKind;
use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use super::{
    Jobs,
    entry::{Attempt, Entry, Head, Input, Phase},
    envelope::Parts,
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
    draining: bool,
    stopped: bool,
    waits_for_disk: bool,
}

/// One model's jobs.
#[derive(Default)]
struct Line {
    waiting: VecDeque<(Arc<Entry>, Head)>,
    /// By when their next attempt may begin.
    delayed: BTreeMap<(u64, JobId), Arc<Entry>>,
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
        let now_ms = unix_ms();
        let of_line = |line: &Line| {
            let blocked = line.blocked_until.filter(|_| !line.waiting.is_empty());
            let due = line
                .delayed
                .first_key_value()
                .map(|((due, _), _)| now + Duration::from_millis(due.saturating_sub(now_ms)));
            blocked.into_iter().chain(due).min()
        };
        let soonest = if self.draining { None } else { self.lines.values().filter_map(of_line).min() };
        soonest.unwrap_or(now + IDLE).min(now + IDLE)
    }

    fn on(&mut self, event: Event, jobs: &Arc<Jobs>, journal: &Journal) {
        match event {
            Event::Accepted(entry, head) => {
                let next = {
                    let mut live = entry.live.lock();
                    live.phase = Phase::Waiting;
                    live.next
                };
                let line = self.line(&entry);
                match next {
                    // A clock that was set back keeps nobody waiting for longer than an attempt may.
                    Some(next) => {
                        let next = next.min(unix_ms() + 2 * BACKOFF_MAX.as_millis() as u64);
                        line.delayed.insert((next, entry.id), entry);
                    }
                    // What waits long is decoded when its turn comes.
                    None if line.waiting.len() >= HEADS_MAX => {
                        line.waiting.push_back((entry, Head::default()))
                    }
                    None => line.waiting.push_back((entry, head)),
                }
            }
            Event::Answered { entry, reply, began, permit } => {
                self.line(&entry).handed -= 1;
                self.answered(&entry, reply, began, permit, jobs, journal);
            }
            Event::Cancel(entry) => self.cancel(&entry, jobs, journal),
            Event::Drain(reply) => {
                self.draining = true;
                // Whoever asked may have been cut off.
                let _ = reply.send(());
            }
            Event::Stop => self.stopped = true,
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
            entry.live.lock().attempts += 1;
        }
        if entry.is_cancelled() {
            return end(entry, Ending::cancelled(), Some(permit), jobs, journal);
        }
        let error = match reply {
            Ok(answer) => {
                return end(entry, Ending::succeeded(entry, journal, answer), Some(permit), jobs, journal);
            }
            Err(error) => error,
        };
        if !began && came_back(&error) {
            // Nobody ran it: it waits for its turn again, in front of those that came later.
            {
                let mut live = entry.live.lock();
                live.phase = Phase::Waiting;
                live.queued = None;
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
            let text = egress::job_failure(&error);
            tracing::info!(model = &*entry.model, job_id = %entry.id, attempts, next_in = ?wait, error = text, "an attempt failed and is repeated");
            let started = {
                let mut live = entry.live.lock();
                live.phase = Phase::Waiting;
                live.next = Some(next);
                live.error = Some(text.clone());
                live.started
            };
            journal.retry(Retry { id: entry.id, attempts, started, next, error: text });
            self.line(entry).delayed.insert((next, entry.id), Arc::clone(entry));
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

    /// Fills the models' queues up to their windows.
    fn hand_over(&mut self, jobs: &Arc<Jobs>, journal: &Journal) {
        let (now, now_ms) = (Instant::now(), unix_ms());
        for (name, line) in &mut self.lines {
            while let Some(due) = line.delayed.first_entry().filter(|due| due.key().0 <= now_ms) {
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
                line.end_overdue(now_ms, jobs, journal);
                continue;
            };
            line.fill(&model, &self.gate, &self.inbox, jobs, journal);
        }
        self.lines.retain(|_, line| line.handed > 0 || !line.waiting.is_empty() || !line.delayed.is_empty());
    }
}

impl Line {
    fn fill(
        &mut self,
        model: &Model,
        gate: &Arc<Gate>,
        inbox: &Arc<Inbox>,
        jobs: &Arc<Jobs>,
        journal: &Journal,
    ) {
        let window = window(&model.spec());
        let (mut must_wake, mut unrun) = (false, 0);
        while self.handed < window {
            if unrun >= ENDED_AT_ONCE {
                self.blocked_until = Some(Instant::now());
                break;
            }
            let Some((entry, head)) = self.waiting.pop_front() else { break };
            if let Some(ending) = hopeless(&entry, &model.spec(), journal) {
                end(&entry, ending, None, jobs, journal);
                unrun += 1;
                continue;
            }
            let input = match input(&entry, journal) {
                Ok(Some(input)) => input,
                Ok(None) => {
                    let lost = "what came in for it is not in the journal".to_owned();
                    end(&entry, Ending::failed(&entry, journal, lost), None, jobs, journal);
                    continue;
                }
                Err(error) => {
                    tracing::error!(job_id = %entry.id, error = ?error, "the journal can't be read; the job waits");
                    self.waiting.push_front((entry, head));
                    self.blocked_until = Some(Instant::now() + BETWEEN_LOOKS);
                    break;
                }
            };
            // Its end needs it as well, and comes soon.
            jobs.shared.keep_input(&entry, &input);
            let attempts = entry.live.lock().attempts;
            let attempt = Attempt {
                entry: Arc::clone(&entry),
                slot: journal.ledger().slot(entry.id, attempts + 1),
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
            let deadline = entry.deadline.map(|deadline| {
                Deadline(Instant::now() + Duration::from_millis(deadline.saturating_sub(unix_ms())))
            });
            // Before the queue has it: a lane may begin it at once.
            let mut live = entry.live.lock();
            match model.queue.push([job], deadline) {
                Ok(queued) => {
                    live.phase = Phase::Handed;
                    live.queued = Some((Arc::clone(&model.queue), queued.first));
                    must_wake |= queued.must_wake;
                }
                Err(_) => {
                    self.blocked_until = Some(Instant::now() + BETWEEN_LOOKS);
                    break;
                }
            }
        }
        if must_wake {
            model.queue.wake();
        }
    }

    /// Ends those whose time has passed while their model was away.
    fn end_overdue(&mut self, now_ms: u64, jobs: &Arc<Jobs>, journal: &Journal) {
        let overdue =
            |(entry, _): &(Arc<Entry>, Head)| entry.deadline.is_some_and(|deadline| deadline <= now_ms);
        for _ in 0..ENDED_AT_ONCE {
            let Some(place) = self.waiting.iter().position(overdue) else { return };
            let Some((entry, _)) = self.waiting.remove(place) else { return };
            let ending = Ending::failed(&entry, journal, egress::job_failure(&JobError::DeadlinePassed));
            end(&entry, ending, None, jobs, journal);
        }
    }
}

/// How a job ends.
struct Ending {
    state: State,
    message: Option<Bytes>,
    error: Option<String>,
    queue: Option<String>,
}

impl Ending {
    fn cancelled() -> Self {
        Self { state: State::Cancelled, message: None, error: None, queue: None }
    }

    fn succeeded(entry: &Entry, journal: &Journal, answer: Bytes) -> Self {
        let Some(input) = input_or_say(entry, journal) else {
            return Self { state: State::Succeeded, message: Some(answer), error: None, queue: None };
        };
        let message = match input.parts.meta {
            Some(meta) => egress::with_meta(&answer, &meta),
            None => answer,
        };
        let queue = Some(input.parts.success_queue).filter(|queue| !queue.is_empty());
        Self { state: State::Succeeded, message: Some(message), error: None, queue }
    }

    fn failed(entry: &Entry, journal: &Journal, error: String) -> Self {
        let input = input_or_say(entry, journal);
        let envelope = input.as_ref().map_or_else(Bytes::new, |input| input.envelope.clone());
        let queue = input.map(|input| input.parts.failure_queue).filter(|queue| !queue.is_empty());
        let message = Some(egress::failed_job(error.clone(), &envelope));
        Self { state: State::Failed, message, error: Some(error), queue }
    }
}

/// Writes how a job ended; then it is told to whoever waits for it, and its message is delivered.
fn end(entry: &Arc<Entry>, ending: Ending, permit: Option<JobPermit>, jobs: &Arc<Jobs>, journal: &Journal) {
    let Ending { state, message, error, queue } = ending;
    let finished = unix_ms();
    let (attempts, started) = {
        let mut live = entry.live.lock();
        if matches!(live.phase, Phase::Ending | Phase::Ended) {
            return;
        }
        live.phase = Phase::Ending;
        live.queued = None;
        (live.attempts, live.started)
    };
    jobs.shared.metrics.jobs.ended(&entry.model, state.word()).inc();
    jobs.shared.metrics.jobs.seconds.observe(finished.saturating_sub(entry.accepted) as f64 / 1e3);
    jobs.shared.unended_less(entry);
    let finish = Finish {
        id: entry.id,
        state,
        attempts,
        started,
        finished,
        result: message.clone(),
        error,
        queue: queue.clone(),
    };
    let (entry, jobs) = (Arc::clone(entry), Arc::clone(jobs));
    journal.finish(finish, move || {
        jobs.ended(&entry, queue, finished, message.unwrap_or_default());
        drop(permit);
    });
}

/// Why a job is not run at all.
fn hopeless(entry: &Entry, spec: &ModelSpec, journal: &Journal) -> Option<Ending> {
    if entry.is_cancelled() {
        return Some(Ending::cancelled());
    }
    if entry.deadline.is_some_and(|deadline| deadline <= unix_ms()) {
        let error = egress::job_failure(&JobError::DeadlinePassed);
        return Some(Ending::failed(entry, journal, error));
    }
    let (attempts, died) = {
        let live = entry.live.lock();
        (live.attempts, live.died)
    };
    // A host that lives has ended these itself.
    (attempts > spec.retries).then(|| {
        let why = if died { "it was running when the host died" } else { "the last one failed" };
        let error = format!(
            "{why}; {attempts} attempts were made and {} retries are allowed (deployment_config.retries)",
            spec.retries
        );
        Ending::failed(entry, journal, error)
    })
}

fn input(entry: &Entry, journal: &Journal) -> Result<Option<Input>, modalkit_journal::ReadError> {
    if let Some(input) = &entry.live.lock().input {
        return Ok(Some(input.clone()));
    }
    let Some(envelope) = journal.envelope(entry.id)? else { return Ok(None) };
    Ok(Parts::of(&envelope).ok().map(|parts| Input { envelope, parts }))
}

fn input_or_say(entry: &Entry, journal: &Journal) -> Option<Input> {
    input(entry, journal).unwrap_or_else(|error| {
        tracing::error!(job_id = %entry.id, error = ?error, "the journal can't be read; the job's message goes nowhere");
        None
    })
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
