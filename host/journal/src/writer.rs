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
    AcceptError,
    change::{Change, Notification, Unfit},
    clock::Clock,
    record::{Accepted, Totals},
    schema::is_damage,
    store::{FORGOTTEN_AT_ONCE, Forget, Refusal, Room, Store, is_of_one_change},
};

/// Changes in one group.
const GROUP_MAX: usize = 4096;
/// Jobs that wait to be written; more are told to come back.
const ACCEPTS_WAITING_MAX: usize = 16_384;
/// Bytes of the jobs that wait to be written.
const ACCEPT_BYTES_MAX: usize = 64 << 20;
/// Bytes of the jobs in one group.
const GROUP_BYTES_MAX: usize = 16 << 20;
/// The share of the journal's bytes that is made room for beyond what must be.
const BYTES_SPARE: u64 = 64;
/// Between two tries of what couldn't be written.
const BETWEEN_TRIES: Duration = Duration::from_millis(250);
/// Between two looks for names that are to be forgotten: those of jobs that aren't done with are looked at each time.
const BETWEEN_NAME_CLEANINGS: Duration = Duration::from_secs(10);
/// The part of the bytes that jobs may take up which names may take up beside them.
const NAMES_PART: u64 = 4;
/// Between two looks for jobs that are to be forgotten.
const BETWEEN_CLEANINGS: Duration = Duration::from_secs(1);

/// How long jobs that are done with, and names, are kept, by the journal's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// For this long after they were done with.
    pub time: Duration,
    /// The oldest go sooner while all take more bytes than this.
    pub bytes_max: u64,
    /// Names under which jobs come once, from their acceptance on; whatever else goes.
    pub names: Duration,
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
    /// Whether it could be written.
    pub writable: bool,
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
    pub(crate) clock: Clock,
}

#[derive(Default)]
struct Intake {
    changes: VecDeque<Change>,
    accepts: usize,
    accept_bytes: usize,
    stop: bool,
    /// Whether the writer waits.
    asleep: bool,
}

impl Shared {
    pub(crate) fn new(retention: Retention, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            intake: Mutex::default(),
            work: Condvar::new(),
            failing: ArcSwapOption::empty(),
            retention: ArcSwap::from_pointee(retention),
            clock,
        })
    }

    /// Hands a change to the writer. One that can't be taken is answered here.
    pub(crate) fn push(&self, change: Change) {
        let mut intake = self.intake.lock();
        if let Some(bytes) = change.accepted_bytes() {
            let refused = if intake.stop {
                Some(AcceptError::Closed)
            } else if intake.accepts >= ACCEPTS_WAITING_MAX
                || intake.accepts > 0 && intake.accept_bytes + bytes > ACCEPT_BYTES_MAX
            {
                Some(AcceptError::Busy)
            } else {
                self.failing.load_full().map(|why| AcceptError::Unwritable(why.to_string()))
            };
            if let Some(error) = refused {
                drop(intake);
                change.refuse(error);
                return;
            }
            intake.accepts += 1;
            intake.accept_bytes += bytes;
        }
        intake.changes.push_back(change);
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
        let (mut taken, mut bytes) = (VecDeque::new(), 0);
        while taken.len() < GROUP_MAX
            && bytes < GROUP_BYTES_MAX
            && let Some(change) = intake.changes.pop_front()
        {
            if let Some(of_job) = change.accepted_bytes() {
                intake.accepts -= 1;
                intake.accept_bytes -= of_job;
                bytes += of_job;
            }
            taken.push_back(change);
        }
        Some(taken)
    }
}

/// A group that was not committed.
struct Unwritten {
    error: rusqlite::Error,
    /// The change that it failed at; `None` where that was none of them.
    culprit: Option<usize>,
    changes: VecDeque<Change>,
}

pub(crate) struct Writer {
    store: Store,
    shared: Arc<Shared>,
    on_commit: OnCommit,
    /// Changes that couldn't be written: they say what has become of accepted jobs, and are tried until they are.
    kept: VecDeque<Change>,
    cleaned: Instant,
    names_cleaned: Instant,
    bytes: u64,
    /// All that is kept is of jobs that aren't done with, and more than there may be.
    full: bool,
}

impl Writer {
    pub(crate) fn start(
        store: Store,
        shared: Arc<Shared>,
        on_commit: OnCommit,
    ) -> std::io::Result<JoinHandle<()>> {
        let bytes = store.bytes().unwrap_or_default();
        let cleaned = Instant::now();
        let writer = Self {
            store,
            shared,
            on_commit,
            kept: VecDeque::new(),
            cleaned,
            names_cleaned: cleaned,
            bytes,
            full: false,
        };
        writer.tell(0, Duration::ZERO);
        thread::Builder::new().name("journal".to_owned()).spawn(move || writer.run())
    }

    fn run(mut self) {
        loop {
            let failing = !self.kept.is_empty() || self.shared.failing.load().is_some();
            let Some(taken) = self.shared.take(if failing { BETWEEN_TRIES } else { BETWEEN_CLEANINGS })
            else {
                break;
            };
            let count = self.kept.len().min(GROUP_MAX);
            let mut changes: VecDeque<Change> = self.kept.drain(..count).collect();
            if self.kept.is_empty() {
                changes.extend(taken);
            } else {
                // Behind those that were there before: a job's end comes before its delivery.
                keep(&mut self.kept, taken, &AcceptError::Busy);
            }
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
        // Where these fail, the next start goes on from the clock that was written last, and works the log into the file.
        let _ = self.store.write_clock(self.shared.clock.now());
        let _ = self.store.checkpoint();
    }

    /// Commits a group, and tells those who wait for it. A change that can't be written at all is taken out, and the others are written.
    fn write(&mut self, mut changes: VecDeque<Change>) {
        let begun = Instant::now();
        loop {
            let count = changes.len();
            let Unwritten { error, culprit, changes: kept } = match self.commit(changes) {
                Ok(told) => {
                    self.shared.failing.store(None);
                    told.into_iter().for_each(Notification::send);
                    return self.tell(count, begun.elapsed());
                }
                Err(unwritten) => unwritten,
            };
            changes = kept;
            match culprit.filter(|_| is_of_one_change(&error)).and_then(|index| changes.remove(index)) {
                Some(culprit) => culprit.reject(Unfit(error.to_string())),
                None => return self.keep(&error, changes, begun),
            }
        }
    }

    /// Keeps a group that the disk doesn't take now.
    fn keep(&mut self, error: &rusqlite::Error, changes: VecDeque<Change>, begun: Instant) {
        let why = if is_damage(error) {
            format!("{error}: the file is damaged, `modalkit serve --set-journal-aside` begins an empty one")
        } else {
            error.to_string()
        };
        self.shared.failing.store(Some(Arc::new(why.clone())));
        let mut failed = VecDeque::new();
        keep(&mut failed, changes, &AcceptError::Unwritable(why));
        // In front of those that came later.
        failed.append(&mut self.kept);
        self.kept = failed;
        // Whoever was told may have told others, who are woken now.
        self.tell(0, begun.elapsed());
    }

    fn tell(&self, changes: usize, took: Duration) {
        let writable = self.shared.failing.load().is_none();
        (self.on_commit)(&Committed {
            changes,
            took,
            totals: self.store.totals,
            bytes: self.bytes,
            writable,
        });
    }

    fn commit(&mut self, changes: VecDeque<Change>) -> Result<Vec<Notification>, Unwritten> {
        let now = self.shared.clock.now();
        let names_bytes_max = self.shared.retention.load().bytes_max / NAMES_PART;
        let room = Room { is_full: self.full, names_bytes_max };
        let mut at = None;
        let mut answers: Vec<Option<Result<Accepted, AcceptError>>> = Vec::with_capacity(changes.len());
        let mut redelivered = VecDeque::new();
        let written = (|| {
            let mut group = self.store.begin(now)?;
            for (index, change) in changes.iter().enumerate() {
                at = Some(index);
                let mut answer = None;
                match change {
                    Change::Accept(job, _) => answer = Some(said(group.accept(job, room))?),
                    Change::Refuse(job, finish, _) => {
                        let accepted = said(group.accept(job, room))?;
                        if accepted == Ok(Accepted::New) {
                            group.finish(finish)?;
                        }
                        answer = Some(accepted);
                    }
                    Change::Cancel(id, _) => group.cancel(*id)?,
                    Change::Retry(retry) => group.retry(retry)?,
                    Change::Finish(finish, _) => group.finish(finish)?,
                    Change::Delivered(id, at, dead, _) => group.delivered(*id, *at, dead.as_deref())?,
                    Change::Redeliver(id, _) => redelivered.push_back(group.redeliver(*id)?),
                }
                answers.push(answer);
            }
            at = None;
            if changes.is_empty() {
                group.touch()?;
            }
            group.commit()
        })();
        if let Err(error) = written {
            return Err(Unwritten { error, culprit: at, changes });
        }
        let told = changes.into_iter().zip(answers).filter_map(|(change, answer)| match change {
            Change::Accept(_, done) | Change::Refuse(_, _, done) => {
                answer.map(|answer| Notification::Accepted(done, answer))
            }
            Change::Cancel(_, done) | Change::Delivered(_, _, _, done) => Some(Notification::Done(done)),
            Change::Finish(_, done) => Some(Notification::Finished(done)),
            Change::Redeliver(_, done) => {
                Some(Notification::Redelivered(done, redelivered.pop_front().flatten()))
            }
            Change::Retry(_) => None,
        });
        Ok(told.collect())
    }

    /// Forgets what has been kept long enough, a few jobs at a time: what waits to be written comes between.
    fn clean(&mut self) {
        let retention = **self.shared.retention.load();
        self.bytes = self.store.bytes().unwrap_or(self.bytes);
        // Names are bounded by themselves, and take no job's room.
        let excess = self.bytes.saturating_sub(self.store.names_bytes).saturating_sub(retention.bytes_max);
        if excess == 0 {
            self.full = false;
        }
        // Where there was nothing to be forgotten, there is nothing for a while.
        let waits = self.cleaned.elapsed() < BETWEEN_CLEANINGS;
        if waits && (excess == 0 || self.full) {
            return;
        }
        self.tell_of_jump();
        let now = self.shared.clock.now();
        let names_are_due = self.names_cleaned.elapsed() >= BETWEEN_NAME_CLEANINGS.min(retention.names);
        let before = |time: Duration| now.saturating_sub(time.as_millis() as u64);
        let which = if excess > 0 {
            // A little more than must be, so that the next group needs none.
            Forget::Bytes(excess + retention.bytes_max / BYTES_SPARE)
        } else {
            Forget::ClosedBefore(before(retention.time))
        };
        let forgotten = self.store.begin(now).and_then(|mut group| {
            let jobs = group.forget(which)?;
            let names = if names_are_due { group.forget_names(before(retention.names))? } else { 0 };
            if jobs + names > 0 { group.commit().map(|()| (jobs, names)) } else { Ok((0, 0)) }
        });
        // What can't be written is said by the next group.
        let (jobs, names) = forgotten.unwrap_or_default();
        if names_are_due && names < FORGOTTEN_AT_ONCE {
            self.names_cleaned = Instant::now();
            // Also where nothing happens: a host that is idle gets older as well.
            let _ = self.store.write_clock(now);
        }
        self.full = excess > 0 && jobs == 0;
        if excess == 0 && jobs.max(names) < FORGOTTEN_AT_ONCE || self.full {
            self.cleaned = Instant::now();
        }
        if jobs + names > 0 {
            self.bytes = self.store.bytes().unwrap_or(self.bytes);
            self.tell(0, Duration::ZERO);
        }
    }

    /// Ages are told by the journal's time; whoever compares times of day in answers and logs should know.
    fn tell_of_jump(&self) {
        if let Some(jump_ms) = self.shared.clock.jump(unix_ms()) {
            tracing::warn!(
                jump_ms,
                "the system's clock was set; due times and the ages of jobs, results and names don't follow it"
            );
        }
    }
}

/// Keeps changes for a later group; jobs that are to be accepted are refused.
fn keep(kept: &mut VecDeque<Change>, changes: VecDeque<Change>, error: &AcceptError) {
    for change in changes {
        if change.accepted_bytes().is_some() {
            change.refuse(error.clone());
        } else {
            kept.push_back(change);
        }
    }
}

/// What whoever sent a job is told; an error of the disk is the whole group's.
fn said(accepted: Result<Accepted, Refusal>) -> rusqlite::Result<Result<Accepted, AcceptError>> {
    match accepted {
        Ok(accepted) => Ok(Ok(accepted)),
        Err(Refusal::Conflict(id)) => Ok(Err(AcceptError::Conflict(id))),
        Err(Refusal::Full) => Ok(Err(AcceptError::Full)),
        Err(Refusal::FullOfNames) => Ok(Err(AcceptError::FullOfNames)),
        Err(Refusal::Store(error)) => Err(error),
    }
}

/// Milliseconds since 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
