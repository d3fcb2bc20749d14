//! Brings messages to their queues: one task for each queue that has any, in order, again and again until the broker has them or their
//! time is over. What a broker has is written to the journal; until then it counts as not delivered.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use modalkit_queue::{Message, QueueError};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::{Jobs, live_job::LiveJob, open_jobs::Shared};
use crate::{
    backoff::backoff,
    queues::{Queues, Route},
};

/// Bytes of messages that wait in memory; those of further ones are read again when their turn comes.
const BODY_BYTES_MAX: usize = 64 << 20;
/// Bytes of messages in one call of a broker.
const BATCH_BYTES_MAX: usize = 8 << 20;
/// The wait after a failure, and the longest after several; see [`backoff`].
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// The messages that wait.
pub(super) struct Deliveries {
    jobs: Weak<Jobs>,
    pub(super) queues: Arc<Queues>,
    shared: Arc<Shared>,
    /// By queue. A queue that is here has a task.
    waiting: Mutex<HashMap<String, VecDeque<PendingDelivery>>>,
    body_bytes: AtomicUsize,
    runtime: Handle,
}

/// One message.
pub(super) struct PendingDelivery {
    live_job: Arc<LiveJob>,
    queue: String,
    /// When its job ended, in the journal's time.
    since: u64,
    /// As long as it is kept in memory; the journal has it as well.
    body: Option<Bytes>,
}

impl PendingDelivery {
    pub(super) fn new(live_job: Arc<LiveJob>, queue: String, since: u64, body: Option<Bytes>) -> Self {
        Self { live_job, queue, since, body }
    }
}

impl Deliveries {
    pub(super) fn new(jobs: Weak<Jobs>, queues: Arc<Queues>, shared: Arc<Shared>) -> Arc<Self> {
        let (waiting, body_bytes) = (Mutex::default(), AtomicUsize::new(0));
        Arc::new(Self { jobs, queues, shared, waiting, body_bytes, runtime: Handle::current() })
    }

    /// Has a message delivered.
    pub(super) fn add(self: &Arc<Self>, mut pending: PendingDelivery) {
        let bytes = pending.body.as_ref().map_or(0, Bytes::len);
        if self.body_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > BODY_BYTES_MAX {
            self.body_bytes.fetch_sub(bytes, Ordering::Relaxed);
            pending.body = None;
        }
        let queue = pending.queue.clone();
        let mut waiting = self.waiting.lock();
        match waiting.get_mut(&queue) {
            Some(backlog) => backlog.push_back(pending),
            None => {
                waiting.insert(queue.clone(), VecDeque::from([pending]));
                drop(waiting);
                let deliveries = Arc::clone(self);
                self.runtime.spawn(async move { deliveries.deliver(queue).await });
            }
        }
    }

    /// Delivers what waits for a queue, until nothing does.
    async fn deliver(self: Arc<Self>, queue: String) {
        let mut failures = 0;
        loop {
            let route = self.queues.route(&queue);
            let batch_max = route.as_ref().map_or(1, |route| route.adapter.batch_max(&route.queue));
            let Some(batch) = self.take(&queue, batch_max) else { return };
            let Some(jobs) = self.jobs.upgrade() else { return };
            let (messages, batch) = match self.messages(&jobs, &queue, batch).await {
                Ok(read) => read,
                Err(batch) => {
                    self.put_back(&queue, batch);
                    tokio::time::sleep(BACKOFF_MAX).await;
                    continue;
                }
            };
            drop(jobs);
            let results = match &route {
                Ok(route) => self.queues.send(route, &messages).await,
                Err(error) => vec![Err(QueueError::Unavailable(error.to_string())); messages.len()],
            };
            let left = self.settle(route.as_ref().ok(), batch, results);
            failures = if left.is_empty() { 0 } else { failures + 1 };
            self.put_back(&queue, left);
            if failures > 0 {
                tokio::time::sleep(backoff(failures, BACKOFF_FIRST, BACKOFF_MAX)).await;
            }
        }
    }

    /// The next messages; `None` where there are none, and the task ends.
    fn take(&self, queue: &str, max: usize) -> Option<Vec<PendingDelivery>> {
        let mut waiting = self.waiting.lock();
        let backlog = waiting.get_mut(queue)?;
        if backlog.is_empty() {
            waiting.remove(queue);
            return None;
        }
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < max.max(1)
            && let Some(next) = backlog.front()
        {
            bytes += next.body.as_ref().map_or(0, Bytes::len);
            if bytes > BATCH_BYTES_MAX && !batch.is_empty() {
                break;
            }
            batch.extend(backlog.pop_front());
        }
        Some(batch)
    }

    fn put_back(&self, queue: &str, batch: Vec<PendingDelivery>) {
        if let Some(backlog) = self.waiting.lock().get_mut(queue) {
            batch.into_iter().rev().for_each(|pending| backlog.push_front(pending));
        }
    }

    /// The messages of a batch, read from the journal where they aren't in memory, up to the bytes of one call: the rest is put back.
    /// All come back where the journal can't be read.
    async fn messages(
        &self,
        jobs: &Arc<Jobs>,
        queue: &str,
        mut batch: Vec<PendingDelivery>,
    ) -> Result<(Vec<Message>, Vec<PendingDelivery>), Vec<PendingDelivery>> {
        let (mut messages, mut bytes): (Vec<Message>, usize) = (Vec::with_capacity(batch.len()), 0);
        for pending in &batch {
            let id = pending.live_job.id;
            let body = match &pending.body {
                Some(body) => body.clone(),
                None => match jobs.read(move |journal| journal.result(id)).await {
                    // One that has been forgotten meanwhile has nothing to say.
                    Ok(body) => body.unwrap_or_default(),
                    Err(_) => return Err(batch),
                },
            };
            bytes += body.len();
            if bytes > BATCH_BYTES_MAX && !messages.is_empty() {
                break;
            }
            let job_id = id.to_string();
            // One that is delivered again is another to a broker that tells the same by its name.
            let delivery_id = format!("{job_id}-{}", pending.since);
            let traceparent = pending.live_job.trace.clone();
            messages.push(Message { job_id, delivery_id, body, traceparent });
        }
        let rest = batch.split_off(messages.len());
        self.put_back(queue, rest);
        Ok((messages, batch))
    }

    /// Writes what became of each message; returns those that are to be tried again.
    fn settle(
        &self,
        route: Option<&Route>,
        batch: Vec<PendingDelivery>,
        results: Vec<Result<(), QueueError>>,
    ) -> Vec<PendingDelivery> {
        let backend = route.map_or("", |route| &*route.backend);
        let count = |outcome| self.shared.metrics.jobs.delivered(backend, outcome).inc();
        let deadline = self.queues.deadline().as_millis() as u64;
        let mut left = Vec::new();
        let Some(jobs) = self.jobs.upgrade() else { return left };
        let journal = jobs.journal.read();
        // Once it is closed, the next start delivers what isn't known to have been.
        let Some(journal) = &*journal else { return left };
        let now = journal.clock().now();
        let in_memory = route.is_some_and(|route| route.adapter.memory().is_some());
        for (pending, result) in batch.into_iter().zip(results) {
            let id = pending.live_job.id;
            let dead = match result {
                // Whoever takes it from there has it; until then only the journal outlives this process.
                Ok(()) if in_memory => {
                    count("held");
                    self.body_bytes.fetch_sub(pending.body.as_ref().map_or(0, Bytes::len), Ordering::Relaxed);
                    continue;
                }
                Ok(()) => {
                    count("delivered");
                    journal.delivered(id, || ());
                    None
                }
                Err(QueueError::Rejected(why)) => Some(why),
                // One that was in memory before a restart waits for room there, however long.
                Err(error) if pending.since + deadline <= now && !in_memory => {
                    Some(format!("not delivered within delivery_deadline_seconds: {error}"))
                }
                Err(error) => {
                    count("failed");
                    {
                        let mut progress = pending.live_job.progress.lock();
                        progress.delivery_attempts += 1;
                        progress.delivery_error = Some(error.to_string());
                    }
                    left.push(pending);
                    continue;
                }
            };
            if let Some(why) = dead {
                count("dead");
                tracing::error!(job_id = %id, queue = pending.queue, why, "a result was given up; POST /jobs/{{id}}/redeliver tries again");
                journal.dead(id, why);
            }
            self.body_bytes.fetch_sub(pending.body.as_ref().map_or(0, Bytes::len), Ordering::Relaxed);
            self.shared.done_with(&pending.live_job);
        }
        left
    }
}
