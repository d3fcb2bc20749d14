//! Asynchronous jobs: on disk before anybody is told of them, run until they have ended, their results delivered.
//!
//! ```text
//! accept --> journal --> runner --> the model's queue --> runner --> journal --> delivery --> journal
//!            (on disk)                                             (ended)      (a queue has it)
//! ```
//!
//! It owns which jobs aren't done with, and never knows HTTP, nor how a batch is run.

mod control;
mod delivery;
mod ending;
mod entry;
mod envelope;
mod report;
mod runner;
mod suspects;

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use modalkit_journal::{
    AcceptError, Accepted, Committed, Delivery as Delivered, Finish, FolderLock, Journal, NewJob, Once,
    OpenError, OpenJob, Retention, State, unix_ms,
};
use modalkit_loader::Item;
use parking_lot::{Mutex, RwLock};
use sha2::{Digest, Sha256};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, oneshot},
    time::timeout,
};

use crate::{
    access::ConcurrencyPermit,
    admission::Gate,
    config::JobSpec,
    dispatch::{Models, Queue},
    egress,
    job::JobError,
    queues::Queues,
    telemetry::Metrics,
    trail::Trail,
};
use delivery::{Deliveries, Pending};
use entry::{Entry, Head, Input, Live, Phase};
use runner::{Event, Inbox, Runner};

pub use control::Cancelled;
pub use envelope::Parts;
pub use modalkit_journal::JobId;
pub use report::{Listed, Report};

/// Bytes of inputs that wait in memory; those of further jobs are read again when their turn comes.
const INPUT_BYTES_MAX: usize = 64 << 20;
/// How long a runner that waits for the disk is waited for.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(2);
const TOO_MANY: &str = "too many asynchronous jobs are not done with (server.jobs_max)";
/// Callers who list jobs or wait for their turn to do so; more are told to come back.
const LISTERS_MAX: usize = 64;

/// The jobs of this host.
pub struct Jobs {
    shared: Arc<Shared>,
    journal: RwLock<Option<Journal>>,
    inbox: Arc<Inbox>,
    runner: Mutex<Option<std::thread::JoinHandle<()>>>,
    deliveries: Arc<Deliveries>,
    blocking: Handle,
    /// Whose turn it is to list jobs.
    lists: Semaphore,
    /// Those who list or wait for their turn.
    listers: Semaphore,
    draining: AtomicBool,
}

/// What the parts of this module share.
struct Shared {
    open: Mutex<Open>,
    spec: JobSpec,
    metrics: Arc<Metrics>,
}

/// The jobs that aren't done with.
#[derive(Default)]
struct Open {
    by_id: HashMap<JobId, Arc<Entry>>,
    /// Those that haven't ended, by model.
    unended: HashMap<Arc<str>, usize>,
    /// Bytes of their inputs in memory.
    input_bytes: usize,
}

/// A job as it comes.
pub struct Incoming {
    /// The model.
    pub model: Arc<str>,
    /// The name of its key.
    pub key: Option<Arc<str>>,
    /// All that came.
    pub envelope: Bytes,
    /// The same, taken apart.
    pub parts: Parts,
    /// The decoded input.
    pub item: Option<Item>,
    /// Milliseconds since 1970 after which nobody wants its answer.
    pub deadline: Option<u64>,
    /// The trace that it belongs to.
    pub trace: Option<String>,
    /// What follows its first attempt.
    pub trail: Option<Arc<Trail>>,
    /// Its place among its key's calls.
    pub place: Option<Arc<ConcurrencyPermit>>,
    /// The name under which it comes once.
    pub once: Option<Once>,
}

impl Incoming {
    /// The same once more, without what only saves work.
    #[must_use]
    pub fn again(&self) -> Self {
        let Self { model, key, envelope, parts, deadline, trace, place, once, .. } = self;
        Self {
            model: Arc::clone(model),
            key: key.clone(),
            envelope: envelope.clone(),
            parts: parts.clone(),
            item: None,
            deadline: *deadline,
            trace: trace.clone(),
            trail: None,
            place: place.clone(),
            once: once.clone(),
        }
    }
}

/// What the jobs need from the host around them.
pub struct Around {
    /// Who runs them.
    pub models: Arc<Models>,
    /// Who waits for them at the end.
    pub gate: Arc<Gate>,
    /// Where their results go.
    pub queues: Arc<Queues>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

impl Jobs {
    /// Opens the journal in this folder, which is this process's, and goes on where it stopped. Deliveries run on the runtime that this is called on.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(folder: FolderLock, spec: JobSpec, around: Around) -> Result<Arc<Self>, OpenError> {
        let Around { models, gate, queues, metrics } = around;
        let retention = Retention { time: spec.retention, bytes_max: spec.bytes_max, names: spec.names };
        let inbox = Arc::new(Inbox::default());
        let of_commits = (Arc::clone(&metrics), Arc::clone(&inbox));
        let on_commit = Box::new(move |committed: &Committed| {
            let (metrics, inbox) = &of_commits;
            note(metrics, committed);
            // What the group told the runner, it is woken for once.
            inbox.ring();
        });
        let path = folder.path().to_owned();
        let (journal, open) = Journal::open(folder, retention, on_commit)?;
        let shared = Arc::new(Shared { open: Mutex::default(), spec, metrics });
        let blocking = Handle::current();
        let jobs = Arc::new_cyclic(|jobs| Self {
            deliveries: Deliveries::new(jobs.clone(), queues, Arc::clone(&shared)),
            shared,
            journal: RwLock::new(Some(journal)),
            inbox: Arc::clone(&inbox),
            runner: Mutex::default(),
            blocking,
            lists: Semaphore::new(1),
            listers: Semaphore::new(LISTERS_MAX),
            draining: AtomicBool::new(false),
        });
        jobs.go_on(open);
        let runner = Runner::new(&jobs, models, gate, inbox);
        *jobs.runner.lock() =
            Some(runner.start().map_err(|source| OpenError::Folder { folder: path, source })?);
        Ok(jobs)
    }

    /// Takes over what the journal holds from before.
    fn go_on(&self, open: Vec<OpenJob>) {
        if !open.is_empty() {
            let running = open.iter().filter(|job| job.suspect).count();
            tracing::info!(jobs = open.len(), running, "jobs from before are resumed");
            if running > 0 {
                tracing::warn!(
                    jobs = running,
                    "the host died while these jobs were running: each runs alone now, and the others wait for it"
                );
            }
        }
        for job in open {
            let entry = self.shared.remember(&job);
            if job.state == State::Queued {
                self.shared.open.lock().count_unended(&entry.model);
                self.inbox.put(Event::Accepted(entry, Head::default()));
            } else if let Some(queue) = job.queue {
                self.deliveries.add(Pending::new(entry, queue, job.pending.unwrap_or_default(), None));
            }
        }
    }

    /// Takes a job in: `done` is called once it is on disk, with its id, or the id of the one that came before under its name.
    /// It may be called on any thread, and must not block.
    pub fn accept(
        self: &Arc<Self>,
        incoming: Incoming,
        done: impl FnOnce(Result<JobId, JobError>) + Send + 'static,
    ) {
        let journal = self.journal.read();
        let Some(journal) = &*journal else { return done(Err(closed())) };
        let Incoming { model, key, envelope, parts, item, deadline, trace, trail, place, once } = incoming;
        let id = journal.next_id();
        let accepted = unix_ms();
        let input = Some(Input { envelope: envelope.clone(), parts });
        let entry = Arc::new(Entry {
            id,
            model: Arc::clone(&model),
            accepted: Some(Instant::now()),
            deadline: deadline.and_then(|deadline| moment_of(deadline, accepted)),
            trace: trace.clone(),
            cancelled: AtomicBool::new(false),
            live: Mutex::new(Live { input, place, ..Live::new(Phase::Accepting) }),
        });
        if let Err(error) = self.shared.admit(&entry, envelope.len()) {
            return done(Err(error));
        }
        // Where there is no room for the bytes, there is none for what they decode to.
        let item = item.filter(|_| entry.live.lock().input.is_some());
        let head = Head { item, trail };
        let job = NewJob { id, model, key, envelope, accepted, deadline, trace, once };
        let (shared, inbox) = (Arc::clone(&self.shared), Arc::clone(&self.inbox));
        journal.accept(job, move |accepted| match accepted {
            Ok(Accepted::New) => {
                // The group's end rings.
                inbox.put_quietly(Event::Accepted(entry, head));
                done(Ok(id));
            }
            Ok(Accepted::Known(known)) => {
                shared.withdraw(&entry);
                done(Ok(known));
            }
            Err(error) => {
                shared.withdraw(&entry);
                done(Err(explain(&error)));
            }
        });
    }

    /// Takes in something that is no job, as one that has failed: its message goes to this queue, if there is one.
    pub fn refuse(
        self: &Arc<Self>,
        incoming: Incoming,
        queue: Option<String>,
        error: String,
        done: impl FnOnce(Result<JobId, JobError>) + Send + 'static,
    ) {
        let journal = self.journal.read();
        let Some(journal) = &*journal else { return done(Err(closed())) };
        let Incoming { model, key, envelope, deadline, trace, once, .. } = incoming;
        if self.shared.open.lock().by_id.len() >= self.shared.spec.jobs_max {
            return done(Err(JobError::Busy(TOO_MANY)));
        }
        let id = journal.next_id();
        let (now, since) = (unix_ms(), journal.clock().now());
        let result = egress::failed_job(error.clone(), &envelope);
        let entry = self.shared.remember(&OpenJob {
            id,
            model: Arc::clone(&model),
            key: key.clone(),
            state: State::Failed,
            attempts: 0,
            suspect: false,
            crashes: 0,
            crashes_alone: 0,
            cancelled: false,
            accepted: now,
            next: None,
            deadline,
            pending: Some(since),
            queue: queue.clone(),
            trace: trace.clone(),
        });
        let job = NewJob { id, model, key, envelope, accepted: now, deadline, trace, once };
        let finish = Finish {
            id,
            state: State::Failed,
            attempts: 0,
            started: None,
            finished: now,
            result: Some(result.clone()),
            error: Some(error),
            queue: queue.clone(),
            since,
        };
        let jobs = Arc::clone(self);
        journal.refuse(job, finish, move |accepted| match accepted {
            Ok(Accepted::New) => {
                jobs.ended(&entry, queue, since, result);
                done(Ok(id));
            }
            Ok(Accepted::Known(known)) => {
                jobs.shared.done_with(&entry);
                done(Ok(known));
            }
            Err(error) => {
                jobs.shared.done_with(&entry);
                done(Err(explain(&error)));
            }
        });
    }

    /// A job has ended, on disk; its delivery counts from this moment of the journal's time.
    fn ended(&self, entry: &Arc<Entry>, queue: Option<String>, since: u64, message: Bytes) {
        let waiting = {
            let mut live = entry.live.lock();
            live.phase = Phase::Ended;
            live.place = None;
            std::mem::take(&mut live.waiting)
        };
        match queue {
            Some(queue) => {
                self.deliveries.add(Pending::new(Arc::clone(entry), queue, since, Some(message)));
            }
            None => self.shared.done_with(entry),
        }
        for waits in waiting {
            // Whoever waited may have left.
            let _ = waits.send(());
        }
    }

    /// Why new jobs can't be accepted at the moment.
    #[must_use]
    pub fn failing(&self) -> Option<Arc<String>> {
        self.journal.read().as_ref().and_then(Journal::failing)
    }

    /// Where results go.
    #[must_use]
    pub fn queues(&self) -> &Arc<Queues> {
        &self.deliveries.queues
    }

    /// Hands no more jobs to models; those that wait stay in the journal for the next start.
    pub async fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        let (reply, drained) = oneshot::channel();
        self.inbox.put(Event::Drain(reply));
        // A runner that has ended hands nothing over either, nor does one that waits for the disk.
        let _ = timeout(DRAIN_TIME_MAX, drained).await;
    }

    /// Ends the runner and the journal; what was handed to it is written. Blocking.
    pub fn close(&self) {
        self.inbox.put(Event::Stop);
        self.inbox.ring();
        if let Some(runner) = self.runner.lock().take() {
            // One that panicked has said so.
            let _ = runner.join();
        }
        let journal = self.journal.write().take();
        if let Some(mut journal) = journal {
            // What is cut off now was no crash.
            journal.ledger().clear();
            journal.close();
        }
    }

    /// Reads the journal on a thread that may wait for the disk.
    async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&Journal) -> Result<T, modalkit_journal::ReadError> + Send + 'static,
    ) -> Result<T, JobError> {
        let jobs = Arc::clone(self);
        let work = move || match &*jobs.journal.read() {
            Some(journal) => read(journal).map_err(|error| {
                tracing::error!(error = ?error, "the journal can't be read");
                JobError::Unavailable(error.to_string())
            }),
            None => Err(closed()),
        };
        self.blocking.spawn_blocking(work).await.map_err(|_| JobError::Lost)?
    }
}

impl Shared {
    fn find(&self, id: JobId) -> Option<Arc<Entry>> {
        self.open.lock().by_id.get(&id).cloned()
    }

    /// Counts a new job in, where there is room for it.
    fn admit(&self, entry: &Arc<Entry>, input_bytes: usize) -> Result<(), JobError> {
        let mut open = self.open.lock();
        if open.by_id.len() >= self.spec.jobs_max {
            return Err(JobError::Busy(TOO_MANY));
        }
        if open.unended.get(&entry.model).copied().unwrap_or_default() >= self.spec.jobs_per_model_max {
            return Err(JobError::Busy(
                "too many asynchronous jobs of this model are unfinished (server.jobs_per_model_max)",
            ));
        }
        if open.input_bytes + input_bytes > INPUT_BYTES_MAX {
            // The journal will have it.
            entry.live.lock().input = None;
        } else {
            open.input_bytes += input_bytes;
        }
        open.count_unended(&entry.model);
        open.by_id.insert(entry.id, Arc::clone(entry));
        Ok(())
    }

    /// Takes a job out again that wasn't accepted after all.
    fn withdraw(&self, entry: &Entry) {
        self.unended_less(entry);
        self.done_with(entry);
    }

    /// A job has ended.
    fn unended_less(&self, entry: &Entry) {
        let input = entry.live.lock().input.take();
        let mut open = self.open.lock();
        open.input_bytes -= input.map_or(0, |input| input.envelope.len());
        if let Some(count) = open.unended.get_mut(&entry.model) {
            *count -= 1;
            if *count == 0 {
                open.unended.remove(&entry.model);
            }
        }
    }

    /// Keeps what came in for a job until it has ended.
    fn keep_input(&self, entry: &Entry, input: &Input) {
        let mut live = entry.live.lock();
        if live.input.is_none() {
            live.input = Some(input.clone());
            drop(live);
            self.open.lock().input_bytes += input.envelope.len();
        }
    }

    /// Nothing more will become of a job.
    fn done_with(&self, entry: &Entry) {
        self.open.lock().by_id.remove(&entry.id);
    }

    /// Where the jobs wait that were handed to models and haven't begun.
    fn handed(&self) -> Vec<(Arc<Queue>, modalkit_batch::JobId)> {
        let open = self.open.lock();
        open.by_id.values().filter_map(|entry| entry.live.lock().queued.clone()).collect()
    }

    fn remember(&self, job: &OpenJob) -> Arc<Entry> {
        let phase = if job.state == State::Queued { Phase::Waiting } else { Phase::Ended };
        let entry = Arc::new(Entry {
            id: job.id,
            model: Arc::clone(&job.model),
            accepted: None,
            deadline: job.deadline.and_then(|deadline| moment_of(deadline, unix_ms())),
            trace: job.trace.clone(),
            cancelled: AtomicBool::new(job.cancelled),
            live: Mutex::new(Live {
                attempts: job.attempts,
                next: job.next,
                suspect: job.suspect,
                crashes: job.crashes,
                crashes_alone: job.crashes_alone,
                ..Live::new(phase)
            }),
        });
        self.open.lock().by_id.insert(job.id, Arc::clone(&entry));
        entry
    }
}

impl Open {
    fn count_unended(&mut self, model: &Arc<str>) {
        *self.unended.entry(Arc::clone(model)).or_default() += 1;
    }
}

/// The moment of a time of day in milliseconds since 1970, by what the system's clock says now; later changes of it don't move it.
/// `None` where it is farther away than this process can tell.
fn moment_of(unix_ms: u64, now_unix_ms: u64) -> Option<Instant> {
    Instant::now().checked_add(Duration::from_millis(unix_ms.saturating_sub(now_unix_ms)))
}

/// Moves a journal that can't be read out of the way, and says so.
///
/// # Errors
/// It can't be moved, or it can't be used for another reason.
pub fn set_aside_if_damaged(state_folder: &Path) -> Result<(), OpenError> {
    let retention = Retention { time: Duration::MAX, bytes_max: u64::MAX, names: Duration::MAX };
    match Journal::open(FolderLock::take(state_folder)?, retention, Box::new(|_| ())) {
        Err(OpenError::Damaged { why, .. }) => {
            let aside = modalkit_journal::set_aside(state_folder)?;
            tracing::error!(journal = %aside.display(), why, "the journal was set aside; jobs that it holds are not run");
            Ok(())
        }
        Ok((journal, _)) => match journal.damage() {
            Ok(None) => Ok(()),
            found => {
                let why = found.map_or_else(|error| format!("{error:?}"), Option::unwrap_or_default);
                drop(journal);
                let aside = modalkit_journal::set_aside(state_folder)?;
                tracing::error!(journal = %aside.display(), why, "the journal was set aside; jobs that it holds are not run");
                Ok(())
            }
        },
        Err(error) => Err(error),
    }
}

/// The name under which a caller's request counts once: a caller's own, for one model.
#[must_use]
pub fn once(key: Option<&str>, model: &str, name: &str, body: &[u8]) -> Once {
    // Lengths before the parts: no two different ones read the same.
    let key = key.unwrap_or_default();
    Once {
        name: format!("call:{}:{key}:{}:{model}:{name}", key.len(), model.len()),
        digest: Sha256::digest(body).into(),
    }
}

fn explain(error: &AcceptError) -> JobError {
    match error {
        AcceptError::Conflict(_) => JobError::Conflict(error.to_string()),
        AcceptError::FullOfNames => JobError::Busy(
            "too many names in Idempotency-Key are remembered (server.idempotency_window_seconds, server.job_store_bytes_max)",
        ),
        AcceptError::Unfit(_) => JobError::TooLarge(error.to_string()),
        AcceptError::Busy => JobError::Busy("too many jobs wait to be written"),
        AcceptError::Full => {
            JobError::Busy("the journal is full of jobs that are not done with (server.job_store_bytes_max)")
        }
        AcceptError::Unwritable(_) => JobError::Unavailable(error.to_string()),
        AcceptError::Closed => closed(),
    }
}

fn closed() -> JobError {
    JobError::Unavailable("the server is shutting down".into())
}

fn note(metrics: &Metrics, committed: &Committed) {
    let jobs = &metrics.jobs;
    jobs.unended.store(committed.totals.of(State::Queued), Ordering::Relaxed);
    for state in [State::Succeeded, State::Failed, State::Cancelled] {
        jobs.state(state.word()).set(committed.totals.of(state));
    }
    for delivery in [Delivered::Pending, Delivered::Delivered, Delivered::Dead] {
        jobs.delivery(delivery.word()).set(committed.totals.delivery(delivery));
    }
    jobs.journal_bytes.set(committed.bytes as i64);
    let was_writable = jobs.journal_writable.get() == 1;
    jobs.journal_writable.set(i64::from(committed.writable));
    if !committed.writable && was_writable {
        tracing::error!(
            "the journal of jobs can't be written: new jobs are refused until it can be; GET /readyz says why"
        );
    } else if committed.writable && !was_writable {
        tracing::info!(bytes = committed.bytes, "the journal of jobs can be written");
    }
    if committed.changes > 0 {
        jobs.commit.observe(committed.took.as_secs_f64());
        jobs.commit_changes.observe(committed.changes as f64);
    }
}
