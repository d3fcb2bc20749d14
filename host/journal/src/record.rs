//! What the journal knows of a job.

use std::sync::Arc;

use bytes::Bytes;

use crate::{JobId, Suspicion};

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It waits for its turn, or for its next attempt. Whether it runs at the moment only the host knows: that is not written.
    Queued,
    /// It has an answer.
    Succeeded,
    /// It has none, and there will be none.
    Failed,
    /// Somebody took it back.
    Cancelled,
}

/// Where its message stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// There is none, or not yet.
    None,
    /// A queue is to get it.
    Pending,
    /// A queue has it.
    Delivered,
    /// It was given up.
    Dead,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Queued, Self::Succeeded, Self::Failed, Self::Cancelled];

    pub(crate) fn code(self) -> i64 {
        self as i64
    }

    pub(crate) fn of(code: i64) -> Self {
        Self::ALL.get(code as usize).copied().unwrap_or(Self::Failed)
    }

    /// In a word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl Delivery {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::None, Self::Pending, Self::Delivered, Self::Dead];

    pub(crate) fn code(self) -> i64 {
        self as i64
    }

    pub(crate) fn of(code: i64) -> Self {
        Self::ALL.get(code as usize).copied().unwrap_or(Self::None)
    }

    /// In a word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Pending => "pending",
            Self::Delivered => "delivered",
            Self::Dead => "dead",
        }
    }
}

/// A job to be accepted. Times are milliseconds since 1970.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Its name, from [`crate::Journal::next_id`].
    pub id: JobId,
    /// The model that is to run it.
    pub model: Arc<str>,
    /// The name of the key that it came with.
    pub key: Option<Arc<str>>,
    /// What came in, whole.
    pub envelope: Bytes,
    /// When.
    pub accepted: u64,
    /// After this nobody wants its answer.
    pub deadline: Option<u64>,
    /// The trace that it belongs to, as a `traceparent`.
    pub trace: Option<String>,
    /// What makes it the same as one that came before.
    pub idempotency: Option<IdempotencyKey>,
    /// It was taken from a queue: nobody asks what became of it.
    pub from_queue: bool,
}

/// The name under which a job is accepted once, however often it is sent, and the SHA-256 of its body. The table is called `once`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// The name.
    pub name: String,
    /// A digest of what was sent: under one name only one thing may be.
    pub digest: [u8; 32],
}

/// What became of a job that was to be accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// It is on disk.
    New,
    /// It had been accepted before, under this id.
    Known(JobId),
}

/// How a job ended.
#[derive(Clone, Debug)]
pub struct Finish {
    /// The job.
    pub id: JobId,
    /// [`State::Succeeded`], [`State::Failed`] or [`State::Cancelled`].
    pub state: State,
    /// Attempts so far.
    pub attempts: u32,
    /// When the last attempt began.
    pub started: Option<u64>,
    /// When it ended.
    pub finished: u64,
    /// The message that a queue gets, and `GET /jobs/{id}` shows.
    pub result: Option<Bytes>,
    /// Why it failed.
    pub error: Option<String>,
    /// The queue that is to get it.
    pub queue: Option<String>,
    /// The journal's time ([`crate::Clock`]) from which its delivery, or the time that it is kept, counts.
    pub since: u64,
}

/// An attempt that failed and is to be followed by another.
#[derive(Clone, Debug)]
pub struct Retry {
    /// The job.
    pub id: JobId,
    /// Attempts so far.
    pub attempts: u32,
    /// When the last one began.
    pub started: Option<u64>,
    /// When the next one may begin.
    pub next: u64,
    /// Why it failed.
    pub error: String,
}

/// A job that isn't done with, as a host finds it at its start.
#[derive(Clone, Debug)]
pub struct OpenJob {
    /// Its name.
    pub id: JobId,
    /// Its model.
    pub model: Arc<str>,
    /// The name of the key that it came with.
    pub key: Option<Arc<str>>,
    /// [`State::Queued`], or where only its delivery is left, how it ended.
    pub state: State,
    /// Attempts that have ended so far.
    pub attempts: u32,
    /// What is known of it by the deaths of its hosts.
    pub suspicion: Suspicion,
    /// How often a host died while it was running, where that may have been its doing.
    pub crashes: u32,
    /// How often it was the only job that was running then, and nothing else is known to have been the cause.
    pub crashes_alone: u32,
    /// Why its last attempt failed, or how it ended its host.
    pub error: Option<String>,
    /// Somebody took it back while it ran.
    pub cancelled: bool,
    /// When it came.
    pub accepted: u64,
    /// When its next attempt may begin.
    pub next: Option<u64>,
    /// After this nobody wants its answer.
    pub deadline: Option<u64>,
    /// Since when its message is to be delivered, in the journal's time.
    pub pending: Option<u64>,
    /// The queue that is to get its message.
    pub queue: Option<String>,
    /// The trace that it belongs to.
    pub trace: Option<String>,
    /// It was taken from a queue.
    pub from_queue: bool,
}

/// A job as it stands in the journal.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its name.
    pub id: JobId,
    /// Its model.
    pub model: String,
    /// The name of the key that it came with.
    pub key: Option<String>,
    /// Where it stands.
    pub state: State,
    /// Attempts that have ended so far.
    pub attempts: u32,
    /// How often a host died while it was running, where that may have been its doing.
    pub crashes: u32,
    /// When it came.
    pub accepted: u64,
    /// When its last attempt began.
    pub started: Option<u64>,
    /// When it ended.
    pub finished: Option<u64>,
    /// When its next attempt may begin.
    pub next: Option<u64>,
    /// The message; not in lists.
    pub result: Option<Bytes>,
    /// Why it failed, or the last attempt did.
    pub error: Option<String>,
    /// The queue that gets its message.
    pub queue: Option<String>,
    /// Where the message stands.
    pub delivery: Delivery,
    /// When it was delivered or given up.
    pub delivered: Option<u64>,
    /// Why it was given up.
    pub delivery_error: Option<String>,
}

/// Which jobs are wanted.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// In this state.
    pub state: Option<State>,
    /// Of this model.
    pub model: Option<String>,
    /// That came with this key, or with none.
    pub key: Option<Option<String>>,
    /// Whose messages stand so.
    pub delivery: Option<Delivery>,
    /// Older than this one.
    pub after: Option<JobId>,
    /// At most so many.
    pub limit: usize,
}

/// Jobs, the youngest first, and where to go on.
#[derive(Clone, Debug)]
pub struct Page {
    /// The jobs.
    pub jobs: Vec<Stored>,
    /// Where there may be more: the last one that was looked at.
    pub next: Option<JobId>,
}

/// Jobs by where they and their messages stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// By [`State`].
    pub states: [i64; 4],
    /// By [`Delivery`].
    pub deliveries: [i64; 4],
}

impl Totals {
    pub(crate) fn add(&mut self, state: State, delivery: Delivery, count: i64) {
        self.states[state.code() as usize] += count;
        self.deliveries[delivery.code() as usize] += count;
    }

    /// Jobs in this state.
    #[must_use]
    pub fn of(&self, state: State) -> i64 {
        self.states[state.code() as usize]
    }

    /// Messages that stand so.
    #[must_use]
    pub fn delivery(&self, delivery: Delivery) -> i64 {
        self.deliveries[delivery.code() as usize]
    }
}
