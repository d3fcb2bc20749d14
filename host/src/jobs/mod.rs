//! Asynchronous jobs: on disk before anybody is told of them, run until they have ended, their results delivered.
//!
//! ```text
//! accept --> journal --> runner --> the model's queue --> runner --> journal --> delivery --> journal
//!            (on disk)                                             (ended)      (a queue has it)
//! ```
//!
//! It owns which jobs aren't done with, and never knows HTTP, nor how a batch is run.

mod accepting;
mod attempt;
mod backlog;
mod control;
mod delivery;
mod ending;
mod inbox;
mod live_job;
mod open_jobs;
mod report;
mod runner;
mod suspects;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use modalkit_journal::{
    Committed, Delivery as Delivered, FolderLock, HostDeath, Journal, OpenError, OpenJob, Retention, State,
    Suspicion,
};
use parking_lot::{Mutex, RwLock};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, oneshot},
    time::timeout,
};

use crate::{
    config::JobSpec,
    death_note::DeathNote,
    insight::metrics::Metrics,
    models::Models,
    queues::Queues,
    work::{Gate, JobError},
};
use delivery::{Deliveries, PendingDelivery};
use inbox::{Event, Inbox};
use live_job::{FirstAttempt, LiveJob};
use open_jobs::Shared;
use runner::Runner;

pub use accepting::{Incoming, idempotency_key};
pub use control::{Cancelled, Redelivery};
pub use modalkit_journal::JobId;
pub use report::{Listed, Report};

/// How long a drain waits for a runner that waits for the disk.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(2);
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

/// What the jobs need from the host around them.
pub struct JobsContext {
    /// The served models.
    pub models: Arc<Models>,
    /// Keeps the host up until attempts have ended.
    pub gate: Arc<Gate>,
    /// The queues that results go to.
    pub queues: Arc<Queues>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// How the host before this one died, where it was running jobs.
    pub death: HostDeath,
}

impl Jobs {
    /// Opens the journal in this folder, which is this process's, and goes on where it stopped. Deliveries run on the runtime that this is called on.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(folder: FolderLock, spec: JobSpec, context: JobsContext) -> Result<Arc<Self>, OpenError> {
        let JobsContext { models, gate, queues, metrics, death } = context;
        let retention = Retention { time: spec.retention, bytes_max: spec.bytes_max, names: spec.names };
        let inbox = Arc::new(Inbox::default());
        let of_commits = (Arc::clone(&metrics), Arc::clone(&inbox));
        let on_commit = Box::new(move |committed: &Committed| {
            let (metrics, inbox) = &of_commits;
            record_commit(metrics, committed);
            // What the group told the runner, it is woken for once.
            inbox.wake();
        });
        let path = folder.path().to_owned();
        let (journal, open) = Journal::open(folder, &death, retention, on_commit)?;
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
        jobs.resume(open, &death);
        let runner = Runner::new(&jobs, models, gate, inbox);
        *jobs.runner.lock() =
            Some(runner.start().map_err(|source| OpenError::Folder { folder: path, source })?);
        Ok(jobs)
    }

    /// Takes over what the journal holds from before.
    fn resume(&self, open: Vec<OpenJob>, death: &HostDeath) {
        if !open.is_empty() {
            let suspects = open.iter().filter(|job| job.suspicion == Suspicion::Suspected).count();
            tracing::info!(jobs = open.len(), suspects, "jobs from before are resumed");
            if suspects > 0 {
                tracing::warn!(
                    jobs = suspects,
                    ?death,
                    "the host died while these jobs were running: each runs alone now, and the others wait for it"
                );
            }
        }
        for job in open {
            let live_job = self.shared.remember(&job);
            if job.state == State::Queued {
                self.shared.open.lock().count_unended(&live_job.model);
                self.inbox.put(Event::Accepted(live_job, FirstAttempt::default()));
            } else if let Some(queue) = job.queue {
                self.deliveries.add(PendingDelivery::new(
                    live_job,
                    queue,
                    job.pending.unwrap_or_default(),
                    None,
                ));
            }
        }
    }

    /// A job has ended, on disk; its delivery counts from this moment of the journal's time.
    fn ended(&self, live_job: &Arc<LiveJob>, queue: Option<String>, since: u64, message: Bytes) {
        let waiting = live_job.progress.lock().conclude();
        match queue {
            Some(queue) => {
                self.deliveries.add(PendingDelivery::new(Arc::clone(live_job), queue, since, Some(message)));
            }
            None => self.shared.done_with(live_job),
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
        self.inbox.wake();
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

/// Renames a journal that can't be read, and logs that.
///
/// # Errors
/// It can't be moved, or it can't be used for another reason.
pub fn set_aside_if_damaged(state_folder: &Path) -> Result<(), OpenError> {
    let retention = Retention { time: Duration::MAX, bytes_max: u64::MAX, names: Duration::MAX };
    let lock = FolderLock::take(state_folder)?;
    let death = DeathNote::open(state_folder);
    match Journal::open(lock, death.death(), retention, Box::new(|_| ())) {
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

fn closed() -> JobError {
    JobError::Unavailable("the server is shutting down".into())
}

fn record_commit(metrics: &Metrics, committed: &Committed) {
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
