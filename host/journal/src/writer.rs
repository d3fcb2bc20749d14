//! The thread that writes: it takes all changes that wait and commits them as one group, so that many share one sync. What can't be
//! written now is refused where somebody asked for it anew, and kept where it says what has become of an accepted job.

use std::{
    collections::VecDeque,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use parking_lot::{Condvar, Mutex};

use crate::{
    AcceptError, JobId,
    record::{Accepted, Finish, NewJob, OpenJob, Retry, Totals},
    store::{FORGOTTEN_AT_ONCE, Refusal, Store},
};

/// Changes in one group.
const GROUP_MAX: usize = 4096;
/// Jobs that wait to be written; more are told to come back.
const ACCEPTS_WAITING_MAX: usize = 16_384;
/// Between two tries of what couldn't be written.
const BETWEEN_TRIES: Duration = Duration::from_millis(250);
/// Between two looks for jobs that are to be forgotten.
const BETWEEN_CLEANINGS: Duration = Duration::from_secs(1);

/// Tells how an acceptance ended.
pub(crate) type AcceptDone = Box<dyn FnOnce(Result<Accepted, AcceptError>) + Send>;
/// Tells that a change is on disk.
pub(crate) type Done = Box<dyn FnOnce() + Send>;
/// Tells which message is on its way again; `None` where there is no such message, or it is on its way.
pub(crate) type RedeliverDone = Box<dyn FnOnce(Option<OpenJob>) + Send>;

/// One change.
pub(crate) enum Change {
    Accept(NewJob, AcceptDone),
    Attempts(JobId, u32),
    Retry(Retry),
    Finish(Finish, Done),
    Delivered(JobId, u64, Option<String>, Option<Done>),
    Redeliver(JobId, RedeliverDone),
}

/// How long finished jobs are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// For this long after their end.
    pub time: Duration,
    /// The oldest go sooner while all take more bytes than this.
    pub bytes_max: u64,
}

/// A group that was committed.
#[derive(Clone, Copy, Debug)]
pub struct Committed {
    /// Its changes.
    pub changes: usize,
    /// From its first change to the end of the sync.
    pub took: Duration,
    /// Jobs afterwards.
    pub totals: Totals,
    /// Bytes of the journal.
    pub bytes: u64,
}

/// Hears of every group, after those who waited for it.
pub type OnCommit = Box<dyn Fn(&Committed) + Send>;

/// What the writer shares with those who ask it.
pub(crate) struct Shared {
    intake: Mutex<Intake>,
    work: Condvar,
    /// Why nothing can be written at the moment.
    pub(crate) failing: ArcSwapOption<String>,
    pub(crate) retention: ArcSwap<Retention>,
}

#[derive(Default)]
struct Intake {
    changes: VecDeque<Change>,
    accepts: usize,
    stop: bool,
    /// Whether the writer sleeps.
    asleep: bool,
}

impl Shared {
    pub(crate) fn new(retention: Retention) -> Arc<Self> {
        Arc::new(Self {
            intake: Mutex::default(),
            work: Condvar::new(),
            failing: ArcSwapOption::empty(),
            retention: ArcSwap::from_pointee(retention),
        })
    }

    /// Hands a change to the writer. One that can't be taken is answered here.
    pub(crate) fn push(&self, change: Change) {
        let mut intake = self.intake.lock();
        if let Change::Accept(job, done) = change {
            let refused = if intake.stop {
                Some(AcceptError::Closed)
            } else if intake.accepts >= ACCEPTS_WAITING_MAX {
                Some(AcceptError::Busy)
            } else {
                self.failing.load_full().map(|why| AcceptError::Unwritable(why.to_string()))
            };
            if let Some(error) = refused {
                drop(intake);
                done(Err(error));
                return;
            }
            intake.accepts += 1;
            intake.changes.push_back(Change::Accept(job, done));
        } else {
            intake.changes.push_back(change);
        }
        let wake = std::mem::take(&mut intake.asleep);
        drop(intake);
        if wake {
            self.work.notify_one();
        }
    }

    pub(crate) fn stop(&self) {
        self.intake.lock().stop = true;
        self.work.notify_one();
    }

    /// Takes what waits, after a while also where that is nothing. `None` when it is time to end.
    fn take(&self, pause: Duration) -> Option<VecDeque<Change>> {
        let mut intake = self.intake.lock();
        if intake.changes.is_empty() && !intake.stop {
            intake.asleep = true;
            self.work.wait_for(&mut intake, pause);
            intake.asleep = false;
        }
        if intake.changes.is_empty() && intake.stop {
            return None;
        }
        let count = intake.changes.len().min(GROUP_MAX);
        let taken: VecDeque<Change> = intake.changes.drain(..count).collect();
        let accepts = taken.iter().filter(|change| matches!(change, Change::Accept(..))).count();
        intake.accepts -= accepts;
        Some(taken)
    }
}

/// What those who wait for a change are told once it is on disk.
enum Told {
    Accepted(AcceptDone, Result<Accepted, AcceptError>),
    Done(Done),
    Redelivered(RedeliverDone, Option<OpenJob>),
}

pub(crate) struct Writer {
    store: Store,
    shared: Arc<Shared>,
    on_commit: OnCommit,
    /// Changes that couldn't be written: they say what has become of accepted jobs, and are tried until they are.
    kept: VecDeque<Change>,
    cleaned: Instant,
    bytes: u64,
}

impl Writer {
    pub(crate) fn start(
        store: Store,
        shared: Arc<Shared>,
        on_commit: OnCommit,
    ) -> std::io::Result<JoinHandle<()>> {
        let bytes = store.bytes().unwrap_or_default();
        let cleaned = Instant::now();
        let writer = Self { store, shared, on_commit, kept: VecDeque::new(), cleaned, bytes };
        thread::Builder::new().name("journal".to_owned()).spawn(move || writer.run())
    }

    fn run(mut self) {
        loop {
            let failing = !self.kept.is_empty() || self.shared.failing.load().is_some();
            let Some(taken) = self.shared.take(if failing { BETWEEN_TRIES } else { BETWEEN_CLEANINGS })
            else {
                break;
            };
            let mut changes = std::mem::take(&mut self.kept);
            changes.extend(taken);
            // An empty group says whether the disk can be written again.
            if !changes.is_empty() || failing {
                self.write(changes);
            }
            self.clean();
            if self.shared.failing.load().is_some() {
                // New changes would wake it at once.
                thread::sleep(BETWEEN_TRIES / 4);
            }
        }
        if let Err(error) = self.store.checkpoint() {
            // It is done at the next start.
            let _ = error;
        }
    }

    /// Commits a group, and tells those who wait for it.
    fn write(&mut self, changes: VecDeque<Change>) {
        let begun = Instant::now();
        let count = changes.len();
        match self.commit(changes) {
            Ok(told) => {
                self.shared.failing.store(None);
                for told in told {
                    match told {
                        Told::Accepted(done, accepted) => done(accepted),
                        Told::Done(done) => done(),
                        Told::Redelivered(done, job) => done(job),
                    }
                }
                let committed = Committed {
                    changes: count,
                    took: begun.elapsed(),
                    totals: self.store.totals,
                    bytes: self.bytes,
                };
                (self.on_commit)(&committed);
            }
            Err((error, changes)) => {
                let why = Arc::new(error.to_string());
                self.shared.failing.store(Some(Arc::clone(&why)));
                for change in changes {
                    match change {
                        Change::Accept(_, done) => done(Err(AcceptError::Unwritable(why.to_string()))),
                        other => self.kept.push_back(other),
                    }
                }
                // Whoever was told pushes work that others are woken for.
                let committed = Committed {
                    changes: 0,
                    took: begun.elapsed(),
                    totals: self.store.totals,
                    bytes: self.bytes,
                };
                (self.on_commit)(&committed);
            }
        }
    }

    fn commit(
        &mut self,
        changes: VecDeque<Change>,
    ) -> Result<Vec<Told>, (rusqlite::Error, VecDeque<Change>)> {
        let full = self.bytes > self.shared.retention.load().bytes_max;
        let mut answers: Vec<Option<Result<Accepted, AcceptError>>> = Vec::with_capacity(changes.len());
        let mut redelivered = VecDeque::new();
        let written = (|| {
            let mut group = self.store.begin()?;
            for change in &changes {
                let mut answer = None;
                match change {
                    Change::Accept(..) if full => answer = Some(Err(AcceptError::Full)),
                    Change::Accept(job, _) => match group.accept(job) {
                        Ok(accepted) => answer = Some(Ok(accepted)),
                        Err(Refusal::Conflict(id)) => answer = Some(Err(AcceptError::Conflict(id))),
                        Err(Refusal::Store(error)) => return Err(error),
                    },
                    Change::Attempts(id, attempts) => group.attempts(*id, *attempts)?,
                    Change::Retry(retry) => group.retry(retry)?,
                    Change::Finish(finish, _) => group.finish(finish)?,
                    Change::Delivered(id, at, dead, _) => group.delivered(*id, *at, dead.as_deref())?,
                    Change::Redeliver(id, _) => redelivered.push_back(group.redeliver(*id, unix_ms())?),
                }
                answers.push(answer);
            }
            group.commit()
        })();
        if let Err(error) = written {
            return Err((error, changes));
        }
        let told = changes.into_iter().zip(answers).filter_map(|(change, answer)| match change {
            Change::Accept(_, done) => answer.map(|answer| Told::Accepted(done, answer)),
            Change::Finish(_, done) | Change::Delivered(_, _, _, Some(done)) => Some(Told::Done(done)),
            Change::Redeliver(_, done) => Some(Told::Redelivered(done, redelivered.pop_front().flatten())),
            Change::Attempts(..) | Change::Retry(_) | Change::Delivered(_, _, _, None) => None,
        });
        Ok(told.collect())
    }

    /// Forgets what has been kept long enough, a few jobs at a time: what waits to be written comes between.
    fn clean(&mut self) {
        let retention = **self.shared.retention.load();
        self.bytes = self.store.bytes().unwrap_or(self.bytes);
        let too_large = self.bytes > retention.bytes_max;
        if !too_large && self.cleaned.elapsed() < BETWEEN_CLEANINGS {
            return;
        }
        let before =
            if too_large { None } else { Some(unix_ms().saturating_sub(retention.time.as_millis() as u64)) };
        let forgotten = self.store.begin().and_then(|mut group| {
            let forgotten = group.forget(before)?;
            if forgotten > 0 { group.commit().map(|()| forgotten) } else { Ok(0) }
        });
        match forgotten {
            Ok(FORGOTTEN_AT_ONCE) => {}
            // There is no more; or it can't be written, which the next group will say.
            Ok(_) | Err(_) => self.cleaned = Instant::now(),
        }
    }
}

/// Milliseconds since 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
