//! Decides when a job runs: one loop over one enum of events, on a thread of its own. It hands accepted jobs to their models' queues,
//! a few at a time so that callers who wait are not kept behind them, and writes what became of each to the journal.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Weak, atomic::Ordering},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use modalkit_journal::{Journal, Retry, Suspicion, unix_ms};

use super::{
    Jobs,
    backlog::{Handover, HandoverResult, ModelBacklog, RECHECK_INTERVAL},
    ending::{Ending, end, shortened},
    inbox::{Event, Inbox},
    live_job::{FirstAttempt, JobPhase, LiveJob},
    suspects::{NextSuspect, Suspects},
};
use crate::{
    backoff::backoff,
    models::Models,
    pipeline::Model,
    protocol,
    work::{Gate, JobError, JobPermit, Reply},
};

/// The wait after a failed attempt, and the longest after several; see [`backoff`].
const BACKOFF_FIRST: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Jobs of a model that wait with their decoded inputs.
const FIRST_ATTEMPTS_MAX: usize = 256;
/// The loop runs at least this often.
const IDLE: Duration = Duration::from_secs(10);

pub(super) struct Runner {
    jobs: Weak<Jobs>,
    models: Arc<Models>,
    gate: Arc<Gate>,
    inbox: Arc<Inbox>,
    backlogs: HashMap<Arc<str>, ModelBacklog>,
    suspects: Suspects,
    /// A suspect runs alone: nothing else is handed over.
    held: bool,
    draining: bool,
    stopped: bool,
    waits_for_disk: bool,
}

impl Runner {
    pub(super) fn new(jobs: &Arc<Jobs>, models: Arc<Models>, gate: Arc<Gate>, inbox: Arc<Inbox>) -> Self {
        Self {
            jobs: Arc::downgrade(jobs),
            models,
            gate,
            inbox,
            backlogs: HashMap::new(),
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
            return now + RECHECK_INTERVAL;
        }
        if self.draining {
            return now + IDLE;
        }
        let of_backlog = |backlog: &ModelBacklog| {
            let blocked = backlog.blocked_until.filter(|_| !backlog.waiting.is_empty());
            let due = backlog.delayed.first_key_value().map(|((due, _), _)| *due);
            blocked.into_iter().chain(due).min()
        };
        let of_backlogs = self.backlogs.values().filter_map(of_backlog).min().filter(|_| !self.held);
        let of_suspects = self.suspects.any_wait().then_some(now + RECHECK_INTERVAL);
        let soonest = of_backlogs.into_iter().chain(of_suspects).chain(self.suspects.next_change()).min();
        soonest.unwrap_or(now + IDLE).min(now + IDLE)
    }

    fn on(&mut self, event: Event, jobs: &Arc<Jobs>, journal: &Journal) {
        match event {
            Event::Accepted(live_job, first_attempt) => self.accepted(live_job, first_attempt, jobs, journal),
            Event::Answered { live_job, reply, began, permit } => {
                self.suspects.ended(live_job.id, Instant::now());
                self.backlog(&live_job).handed -= 1;
                self.answered(&live_job, reply, began, permit, jobs, journal);
            }
            Event::Cancel(live_job) => self.cancel(&live_job, jobs, journal),
            Event::Drain(reply) => {
                self.draining = true;
                // Jobs that are cut off by an orderly end are not counted as crashes.
                self.suspects.release(Instant::now());
                // Jobs that haven't begun stay in the journal for the next start; they are taken out so that the drain doesn't wait for
                // their batches.
                for (queue, number) in jobs.shared.handed() {
                    queue.cancel(number, 1);
                }
                // Whoever asked may have been cut off.
                let _ = reply.send(());
            }
            Event::Stop => self.stopped = true,
        }
    }

    fn accepted(
        &mut self,
        live_job: Arc<LiveJob>,
        first_attempt: FirstAttempt,
        jobs: &Arc<Jobs>,
        journal: &Journal,
    ) {
        let (next, suspicion) = {
            let mut progress = live_job.progress.lock();
            progress.wait_for_turn();
            (progress.next, progress.suspicion)
        };
        match suspicion {
            Suspicion::None => {}
            Suspicion::Suspected => return self.suspects.add(live_job, fastrand::usize(..)),
            Suspicion::Convicted => {
                return end(&live_job, Ending::convicted(&live_job, journal), None, jobs, journal);
            }
        }
        let backlog = self.backlog(&live_job);
        match next {
            // A clock that was set back keeps nobody waiting for longer than an attempt may.
            Some(next) => {
                let wait = Duration::from_millis(next.saturating_sub(unix_ms())).min(BACKOFF_MAX);
                backlog.delayed.insert((Instant::now() + wait, live_job.id), live_job);
            }
            // What waits long is decoded when its turn comes.
            None if backlog.waiting.len() >= FIRST_ATTEMPTS_MAX => {
                backlog.waiting.push_back((live_job, FirstAttempt::default()))
            }
            None => backlog.waiting.push_back((live_job, first_attempt)),
        }
    }

    fn backlog(&mut self, live_job: &LiveJob) -> &mut ModelBacklog {
        self.backlogs.entry(Arc::clone(&live_job.model)).or_default()
    }

    fn answered(
        &mut self,
        live_job: &Arc<LiveJob>,
        reply: Reply,
        began: bool,
        permit: JobPermit,
        jobs: &Arc<Jobs>,
        journal: &Journal,
    ) {
        if began {
            let mut progress = live_job.progress.lock();
            progress.attempts += 1;
            progress.suspicion = Suspicion::None;
        }
        if live_job.is_cancelled() {
            return end(live_job, Ending::cancelled(), Some(permit), jobs, journal);
        }
        let error = match reply {
            Ok(output) => {
                let ending = Ending::answered(live_job, journal, output, jobs.shared.spec.result_bytes_max);
                return end(live_job, ending, Some(permit), jobs, journal);
            }
            Err(error) => error,
        };
        if !began && came_back(&error) {
            // Nobody ran it: it waits for its turn again, in front of those that came later.
            let suspicion = {
                let mut progress = live_job.progress.lock();
                progress.wait_for_turn();
                progress.suspicion
            };
            if suspicion == Suspicion::Suspected {
                return self.suspects.put_back(Arc::clone(live_job), Instant::now());
            }
            let backlog = self.backlog(live_job);
            backlog.waiting.push_front((Arc::clone(live_job), FirstAttempt::default()));
            backlog.blocked_until = Some(Instant::now() + RECHECK_INTERVAL);
            return;
        }
        let attempts = live_job.progress.lock().attempts;
        // A model that isn't known has no limit of retries here; it is checked at the next handover.
        let retries = self.models.find(Some(&live_job.model)).map_or(u32::MAX, |model| model.spec().retries);
        if error.is_retryable() && attempts <= retries {
            let wait = backoff(attempts, BACKOFF_FIRST, BACKOFF_MAX);
            let next = unix_ms() + wait.as_millis() as u64;
            let text = shortened(protocol::job_failure(&error));
            tracing::info!(model = &*live_job.model, job_id = %live_job.id, attempts, next_in = ?wait, error = text, "an attempt failed and is repeated");
            let started = {
                let mut progress = live_job.progress.lock();
                progress.retry_at(next, text.clone());
                progress.started
            };
            journal.retry(Retry { id: live_job.id, attempts, started, next, error: text });
            self.backlog(live_job).delayed.insert((Instant::now() + wait, live_job.id), Arc::clone(live_job));
            return;
        }
        let ending = Ending::failed(live_job, journal, protocol::job_failure(&error));
        end(live_job, ending, Some(permit), jobs, journal);
    }

    /// One that waits ends now; one in the model's queue is taken out, which tells its end; one that runs ends with its batch.
    fn cancel(&mut self, live_job: &Arc<LiveJob>, jobs: &Arc<Jobs>, journal: &Journal) {
        // Without the lock: what the queue gives back takes it.
        let phase = live_job.progress.lock().phase().clone();
        if let JobPhase::Handed(queue, number) = phase {
            queue.cancel(number, 1);
        } else if matches!(phase, JobPhase::Waiting) {
            if self.suspects.remove(live_job.id) {
                return end(live_job, Ending::cancelled(), None, jobs, journal);
            }
            let backlog = self.backlog(live_job);
            let before = backlog.waiting.len() + backlog.delayed.len();
            backlog.waiting.retain(|(waiting, _)| waiting.id != live_job.id);
            backlog.delayed.retain(|(_, id), _| *id != live_job.id);
            // One that is nowhere was handed over and not taken: its end is on its way here.
            if backlog.waiting.len() + backlog.delayed.len() < before {
                end(live_job, Ending::cancelled(), None, jobs, journal);
            }
        }
    }

    /// Fills the models' queues up to their windows, where no suspect has the host to itself.
    fn hand_over(&mut self, jobs: &Arc<Jobs>, journal: &Journal) {
        for live_job in self.suspects.take_overdue(Instant::now()) {
            let ending = Ending::failed(&live_job, journal, protocol::job_failure(&JobError::DeadlinePassed));
            end(&live_job, ending, None, jobs, journal);
        }
        self.held = !self.hand_over_suspects(jobs, journal);
        if !self.held {
            self.hand_over_backlogs(jobs, journal);
        }
    }

    /// Hands the next suspect over, where it may be alone. `false` where nothing else may be handed over.
    fn hand_over_suspects(&mut self, jobs: &Arc<Jobs>, journal: &Journal) -> bool {
        while !self.suspects.is_empty() {
            let handed = self.backlogs.values().map(|backlog| backlog.handed).sum();
            let serving =
                |name: &str| self.models.find(Some(name)).ok().filter(|model| model.serving().is_ok());
            match self.suspects.next(Instant::now(), handed, |name| serving(name).is_some()) {
                NextSuspect::None => return false,
                NextSuspect::Any => return true,
                NextSuspect::Beside(live_job) => {
                    self.backlog(&live_job).waiting.push_front((live_job, FirstAttempt::default()));
                    return true;
                }
                NextSuspect::Alone(live_job) => match serving(&live_job.model) {
                    Some(model) => self.hand_over_suspect(live_job, &model, jobs, journal),
                    None => self.suspects.put_back(live_job, Instant::now()),
                },
            }
        }
        true
    }

    /// Hands a job over that runs with no other beside it.
    fn hand_over_suspect(
        &mut self,
        live_job: Arc<LiveJob>,
        model: &Arc<Model>,
        jobs: &Arc<Jobs>,
        journal: &Journal,
    ) {
        let crashes = live_job.progress.lock().crashes;
        let backlog = self.backlogs.entry(Arc::clone(&live_job.model)).or_default();
        let handover = Handover { model, gate: &self.gate, inbox: &self.inbox, jobs, journal, alone: true };
        match backlog.hand_over(Arc::clone(&live_job), FirstAttempt::default(), &handover) {
            HandoverResult::Queued { must_wake, slot } => {
                tracing::info!(model = &*live_job.model, job_id = %live_job.id, crashes, "a job that was running when the host died runs alone");
                self.suspects.handed(&live_job, crashes, &slot, Instant::now());
                if must_wake {
                    model.queue.wake();
                }
            }
            // One that the queue didn't take comes back with the end of its attempt.
            HandoverResult::Ended | HandoverResult::Refused => {}
            HandoverResult::Unreadable(..) => self.suspects.put_back(live_job, Instant::now()),
        }
    }

    fn hand_over_backlogs(&mut self, jobs: &Arc<Jobs>, journal: &Journal) {
        let now = Instant::now();
        for (name, backlog) in &mut self.backlogs {
            while let Some(due) = backlog.delayed.first_entry().filter(|due| due.key().0 <= now) {
                let live_job = due.remove();
                live_job.progress.lock().next = None;
                backlog.waiting.push_back((live_job, FirstAttempt::default()));
            }
            if backlog.waiting.is_empty() || backlog.blocked_until.is_some_and(|until| until > now) {
                continue;
            }
            backlog.blocked_until = None;
            let found = self.models.find(Some(name));
            if found.is_err() && self.models.are_complete() && !std::mem::replace(&mut backlog.told, true) {
                tracing::warn!(
                    model = &**name,
                    jobs = backlog.waiting.len(),
                    "jobs wait for a model that nobody serves"
                );
            }
            let Some(model) = found.ok().filter(|model| model.serving().is_ok()) else {
                // It may be loading, or have gone; what waits for it waits.
                backlog.blocked_until = Some(now + RECHECK_INTERVAL);
                backlog.end_overdue(now, jobs, journal);
                continue;
            };
            let (gate, inbox) = (&self.gate, &self.inbox);
            backlog.fill(&Handover { model: &model, gate, inbox, jobs, journal, alone: false });
        }
        self.backlogs.retain(|_, backlog| {
            backlog.handed > 0 || !backlog.waiting.is_empty() || !backlog.delayed.is_empty()
        });
    }
}

/// Whether an attempt that didn't begin may be made later.
fn came_back(error: &JobError) -> bool {
    matches!(error, JobError::Unavailable(_) | JobError::Busy(_) | JobError::Lost)
}
