//! Requests that come from queues: taken while there is room for them, made into jobs, and acknowledged when their result is on disk.
//! It owns what was taken and not acknowledged, and never knows which broker it is.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use modalkit_journal::{IdempotencyKey, JobId};
use modalkit_queue::{QueueError, Received};
use serde_json::value::RawValue;
use tokio::{
    sync::{oneshot, watch},
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use super::envelope::open_envelope;
use crate::{
    backoff::backoff,
    config::ConsumeSpec,
    insight::metrics::Metrics,
    jobs::{Incoming, Jobs},
    protocol::{self, Envelope},
    queues::{Allowed, Route},
    work::JobError,
};

/// How long a broker waits for a message until it answers that there is none.
const WAIT: Duration = Duration::from_secs(5);
/// Messages that are asked for at once.
const RECEIVE_MAX: usize = 64;
/// Receipts in one acknowledgement.
const ACKNOWLEDGE_MAX: usize = 256;
/// The longest that a broker may take for anything but waiting.
const CALL_TIME_MAX: Duration = Duration::from_secs(15);
/// Between two tries of a broker that fails, and of a job that isn't taken, at first and at most.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How often a message's visibility is extended within one visibility timeout.
const EXTENSIONS: u32 = 3;

/// Takes from one queue until the host shuts down, and acknowledges what ends until `finish`. What wasn't by then comes again.
pub async fn run(
    spec: ConsumeSpec,
    jobs: Arc<Jobs>,
    metrics: Arc<Metrics>,
    shutdown: watch::Receiver<bool>,
    finish: watch::Receiver<bool>,
) {
    let route = match jobs.queues().route(&spec.queue) {
        Ok(route) if route.adapter.source().is_some() => route,
        // The configuration is looked at before it comes here.
        Ok(_) => return tracing::error!(queue = spec.queue, "nothing can be taken from this queue"),
        Err(error) => {
            return tracing::error!(queue = spec.queue, %error, "nothing can be taken from this queue");
        }
    };
    tracing::info!(queue = spec.queue, model = spec.model, "taking requests from a queue");
    Consumer { spec, route, jobs, metrics, in_flight: HashMap::new(), done: Vec::new() }
        .run(shutdown, finish)
        .await;
}

struct Consumer {
    spec: ConsumeSpec,
    route: Route,
    jobs: Arc<Jobs>,
    metrics: Arc<Metrics>,
    /// Receipts of what was taken, by the broker's names.
    in_flight: HashMap<String, String>,
    /// Receipts of what is done and not acknowledged yet.
    done: Vec<String>,
}

/// A message whose job has ended, on disk.
struct Ended {
    id: String,
    outcome: &'static str,
}

impl Consumer {
    async fn run(mut self, mut shutdown: watch::Receiver<bool>, mut finish: watch::Receiver<bool>) {
        let mut working: FuturesUnordered<BoxFuture<'static, Ended>> = FuturesUnordered::new();
        let mut extend = interval(self.spec.visibility / EXTENSIONS);
        extend.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (jobs, route) = (Arc::clone(&self.jobs), self.route.clone());
        let queue = route.queue.as_str();
        let mut receiving: Option<BoxFuture<'_, Result<Vec<Received>, QueueError>>> = None;
        let mut failures = 0;
        loop {
            let room = self.spec.in_flight_max.saturating_sub(self.in_flight.len());
            if receiving.is_none() && room > 0 && self.done.is_empty() && !*shutdown.borrow() {
                let source = route.adapter.source().expect("it was looked at");
                let pause = backoff(failures, BACKOFF_FIRST, BACKOFF_MAX);
                let (max, hidden) = (room.min(RECEIVE_MAX), self.spec.visibility);
                receiving = Some(
                    async move {
                        sleep(pause).await;
                        let received = source.receive(queue, max, WAIT, hidden);
                        timeout(WAIT + CALL_TIME_MAX, received).await.unwrap_or_else(|_| Err(no_answer()))
                    }
                    .boxed(),
                );
            }
            let acknowledges = !self.done.is_empty();
            tokio::select! {
                biased;
                Some(ended) = working.next(), if !working.is_empty() => {
                    self.ended(ended);
                    // Those that have ended at the same time are acknowledged together.
                    while let Some(Some(ended)) = working.next().now_or_never() {
                        self.ended(ended);
                    }
                }
                _ = extend.tick() => self.extend().await,
                Ok(()) = shutdown.changed() => receiving = None,
                Ok(()) = finish.changed() => {
                    // Every job that has ended has reported by now.
                    while let Some(Some(ended)) = working.next().now_or_never() {
                        self.ended(ended);
                    }
                    return self.acknowledge().await;
                }
                () = std::future::ready(()), if acknowledges => self.acknowledge().await,
                received = async { receiving.as_mut().expect("it is there").await }, if receiving.is_some() => {
                    receiving = None;
                    match received {
                        Ok(messages) => {
                            failures = 0;
                            jobs.queues().note(&route.backend, "take", None);
                            for message in messages {
                                working.extend(self.take(message));
                            }
                        }
                        Err(error) => {
                            failures += 1;
                            jobs.queues().note(&route.backend, "take", Some(error));
                        }
                    }
                }
            }
        }
    }

    /// Makes a job of a message. `None` where it is being worked on: then it only has a new receipt.
    fn take(&mut self, message: Received) -> Option<BoxFuture<'static, Ended>> {
        let Received { id, receipt, body, traceparent } = message;
        if self.in_flight.insert(id.clone(), receipt).is_some() {
            return None;
        }
        let idempotency = IdempotencyKey {
            // The broker's id of the message decides, not its content.
            name: format!(
                "queue:{}:{}:{}:{id}",
                self.route.backend,
                self.route.queue.len(),
                self.route.queue
            ),
            digest: [0; 32],
        };
        let incoming = |parts: Envelope| Incoming {
            model: self.spec.model.as_str().into(),
            key: None,
            envelope: body.clone(),
            parts,
            decoded: None,
            deadline: None,
            trace: traceparent.clone(),
            timings: None,
            key_permit: None,
            idempotency: Some(idempotency.clone()),
            from_queue: true,
        };
        let (jobs, make): (_, Make) = match open_envelope(&body) {
            Ok(parts) => {
                let lost = [&parts.success_queue, &parts.failure_queue]
                    .into_iter()
                    .filter(|queue| !queue.is_empty())
                    .find_map(|queue| self.jobs.queues().allowed(queue, Allowed::ToAll).err());
                let incoming = incoming(parts.clone());
                match lost {
                    None => (Arc::clone(&self.jobs), Make::Job(incoming)),
                    // Its other queue may be usable.
                    Some(error) => (
                        Arc::clone(&self.jobs),
                        Make::Refusal(incoming, self.elsewhere(Some(&parts)), error.to_string()),
                    ),
                }
            }
            Err(error) => {
                let parts = Envelope::of_nothing();
                let named =
                    failure_queue(&body).map(|failure_queue| Envelope { failure_queue, ..parts.clone() });
                let why = protocol::job_failure(&error);
                (Arc::clone(&self.jobs), Make::Refusal(incoming(parts), self.elsewhere(named.as_ref()), why))
            }
        };
        Some(work(jobs, id, make).boxed())
    }

    /// Where one goes that is no request, or names a queue that it may not: the failure queue that it names, if it may name that one, or
    /// the configured one.
    fn elsewhere(&self, parts: Option<&Envelope>) -> Option<String> {
        let named = parts.map(|parts| parts.failure_queue.clone()).filter(|queue| !queue.is_empty());
        let named = named.filter(|queue| self.jobs.queues().allowed(queue, Allowed::ToAll).is_ok());
        named.or_else(|| self.jobs.queues().dead_letter().map(ToOwned::to_owned))
    }

    fn ended(&mut self, ended: Ended) {
        self.metrics.jobs.consumed(&self.spec.model, ended.outcome).inc();
        self.done.extend(self.in_flight.remove(&ended.id));
    }

    /// Acknowledges what is done. Where that fails, it comes again, and is known by then.
    async fn acknowledge(&mut self) {
        let source = self.route.adapter.source().expect("it was looked at");
        for receipts in std::mem::take(&mut self.done).chunks(ACKNOWLEDGE_MAX) {
            let acknowledged = timeout(CALL_TIME_MAX, source.acknowledge(&self.route.queue, receipts)).await;
            if let Err(error) = acknowledged.unwrap_or_else(|_| Err(no_answer())) {
                tracing::warn!(queue = self.spec.queue, %error, count = receipts.len(), "requests could not be acknowledged; they come again");
            }
        }
    }

    async fn extend(&mut self) {
        let receipts: Vec<String> =
            self.in_flight.values().cloned().collect::<HashSet<_>>().into_iter().collect();
        if receipts.is_empty() {
            return;
        }
        let source = self.route.adapter.source().expect("it was looked at");
        let extended = source.extend(&self.route.queue, &receipts, self.spec.visibility);
        if let Err(error) = timeout(CALL_TIME_MAX, extended).await.unwrap_or_else(|_| Err(no_answer())) {
            tracing::warn!(queue = self.spec.queue, %error, "requests may come to another host as well");
        }
    }
}

/// What becomes of a message.
enum Make {
    Job(Incoming),
    Refusal(Incoming, Option<String>, String),
}

impl Make {
    fn again(&self) -> Self {
        match self {
            Self::Job(incoming) => Self::Job(incoming.again()),
            Self::Refusal(incoming, queue, error) => {
                Self::Refusal(incoming.again(), queue.clone(), error.clone())
            }
        }
    }
}

/// Has a message accepted, however long that takes, and waits for its end.
async fn work(jobs: Arc<Jobs>, id: String, make: Make) -> Ended {
    let begun = Instant::now();
    let mut failures = 0;
    let (job, outcome) = loop {
        let (tell, told) = oneshot::channel();
        let done = move |accepted: Result<JobId, JobError>| drop(tell.send(accepted));
        let outcome = match make.again() {
            Make::Job(incoming) => {
                jobs.accept(incoming, done);
                "run"
            }
            Make::Refusal(incoming, queue, error) => {
                if failures == 0 {
                    tracing::warn!(message = id, error, to = queue, "a message is no request");
                }
                jobs.refuse(incoming, queue, error, done);
                "refused"
            }
        };
        match told.await {
            Ok(Ok(job)) => break (job, outcome),
            Ok(Err(_)) | Err(_) => {
                // There is no room, or the disk is full: it is tried again, stays taken, and no other is received.
                failures += 1;
                sleep(backoff(failures, BACKOFF_FIRST, BACKOFF_MAX)).await;
            }
        }
    };
    if let Some(ended) = jobs.watch(job) {
        // A sender that was dropped also means that the job is done.
        let _ = ended.await;
    }
    tracing::debug!(message = id, job_id = %job, took = ?begun.elapsed(), "a request from a queue has ended");
    Ended { id, outcome }
}

/// The failure queue that a message names, if it is an object that does.
fn failure_queue(body: &[u8]) -> Option<String> {
    // A struct of serde's would take a list for one too.
    let members: HashMap<String, &RawValue> = serde_json::from_slice(body).ok()?;
    serde_json::from_str(members.get("failure_queue")?.get()).ok()
}

fn no_answer() -> QueueError {
    QueueError::Unavailable(format!("no answer within {CALL_TIME_MAX:?}"))
}
