//! What callers ask of asynchronous jobs after they were accepted, and of the queues that are kept in memory.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::{StatusCode, http::request::Parts};
use modalkit_journal::{Delivery, Filter, JobId, State};
use modalkit_queue::Memory;
use serde_json::{Value, json};

use super::{
    Context,
    endpoints::{OpenTo, Route, Target},
    exchange::Exchange,
    query::{Query, invalid},
    refusal::refuse,
    request_headers::Headers,
};
use crate::{
    access::{Caller, Origin},
    audit::Effect,
    egress::{self, HttpResponse, object_response},
    jobs::{Cancelled, Redelivery},
    queues::{self, Allowed},
    work::JobError,
};

/// Jobs or messages in one answer, where the caller doesn't say, and at most.
const LIMIT: usize = 100;
const LIMIT_MAX: usize = 1000;
/// Seconds that messages are the taker's until they are acknowledged, where the caller doesn't say, and at most.
const LEASE_SECONDS: usize = 60;
const LEASE_SECONDS_MAX: usize = 43_200;

/// Answers a path of jobs or queues.
pub(super) async fn answer(
    context: &Context,
    from: &Origin,
    exchange: Option<&Exchange>,
    head: &Parts,
    target: Target<'_>,
) -> HttpResponse {
    let name = target.name();
    let action = target.action(&head.method, &name);
    let changes = action.effect == Effect::Change;
    let headers = Headers(&head.headers);
    let admitted = match target.endpoint.open_to {
        OpenTo::Management => context.access.manage(from, &headers),
        OpenTo::Callers | OpenTo::Everybody => context.access.admit(from, &headers),
    };
    let caller = match admitted {
        Ok(caller) => caller,
        Err(denied) => return refuse(context, from, action, &denied),
    };
    let underway = context.audit.begin(action, &caller, from);
    let answered = match (Query::parse(head.uri.query(), target.endpoint.parameters), target.route()) {
        (Err(error), _) => Err(error),
        (Ok(_), Route::Queues) => Ok(queues(context)),
        (Ok(query), Route::Queue) if changes => take(context, &name, query).await,
        (Ok(query), Route::Queue) => {
            query.number("limit", LIMIT, LIMIT_MAX).and_then(|limit| look(context, &name, limit))
        }
        (Ok(query), route) => {
            // Who looks after a host isn't kept out by its load.
            let exchange = exchange.filter(|_| !caller.manages);
            of_jobs(context, &caller, exchange, query, route, &name, changes).await
        }
    };
    let response = answered.unwrap_or_else(|error| egress::error(&error));
    underway.answered(response.status().as_u16());
    response
}

async fn of_jobs(
    context: &Context,
    caller: &Caller,
    exchange: Option<&Exchange>,
    query: Query<'_>,
    route: Route,
    id: &str,
    deletes: bool,
) -> Result<HttpResponse, JobError> {
    let jobs = &context.jobs;
    // Another caller's job is answered as one that doesn't exist.
    let whose = if caller.manages { None } else { Some(caller.key.clone()) };
    let id = match route {
        Route::Job | Route::Redeliver => match id.parse::<JobId>() {
            Ok(id) => id,
            Err(_) => return Ok(unknown(id)),
        },
        _ => {
            let (filter, running) = filter(query, whose)?;
            let listed = tokio::time::timeout(context.server.request_timeout, jobs.list(filter, running))
                .await
                .unwrap_or(Err(JobError::DeadlinePassed))?;
            enter(exchange)?;
            return Ok(object_response(StatusCode::OK, &listed));
        }
    };
    Ok(match route {
        Route::Redeliver => match jobs.redeliver(id, whose, may_name(context)).await? {
            Redelivery::Begun => object_response(
                StatusCode::ACCEPTED,
                &json!({"job_id": id.to_string(), "delivery": "pending"}),
            ),
            Redelivery::UnderWay { queue } => {
                conflict(&format!("its result is on its way to the queue {queue:?}"))
            }
            Redelivery::NotEnded => conflict("the job hasn't ended: it has no result yet"),
            Redelivery::NoQueue => {
                conflict("no queue was named for its result; GET /jobs/{id} has what is kept of it")
            }
            Redelivery::Unknown => unknown(&id.to_string()),
        },
        _ if deletes => cancelled(id, jobs.cancel(id, whose).await?),
        _ => {
            let wait_max = context.server.request_timeout_max.as_millis() as usize;
            let wait = query.number("wait_ms", 0, wait_max)?;
            jobs.wait(id, Duration::from_millis(wait as u64)).await;
            enter(exchange)?;
            if let Some(exchange) = exchange {
                exchange.take_bytes(jobs.result_bytes(id).await?)?;
            }
            match jobs.report(id, whose).await? {
                Some(report) => object_response(StatusCode::OK, &report),
                None => unknown(&id.to_string()),
            }
        }
    })
}

/// Counts the request among those in flight for what is read and written now; one that only waits for a job's end doesn't count. A host that
/// shuts down says what became of jobs to the end.
fn enter(exchange: Option<&Exchange>) -> Result<(), JobError> {
    match exchange.map_or(Ok(()), Exchange::enter) {
        Err(JobError::Unavailable(_)) => Ok(()),
        entered => entered,
    }
}

/// Whether jobs of a key may name a queue, as the configuration says now. What the host itself chose, it may.
fn may_name(context: &Context) -> impl FnOnce(Option<&str>, &str) -> Result<(), JobError> {
    |key, queue| {
        let queues = context.jobs.queues();
        if queues.dead_letter() == Some(queue) {
            return Ok(());
        }
        let own = key.and_then(|key| context.access.allowed_queues(key));
        match queues.allowed(queue, Allowed::to(key, own.as_deref())) {
            Ok(_) => Ok(()),
            Err(error) => Err(JobError::Conflict(error.to_string())),
        }
    }
}

fn unknown(id: &str) -> HttpResponse {
    let detail = format!(
        "no job {id:?}: it was never accepted, or was forgotten after its end (server.job_retention_seconds, server.job_store_bytes_max)"
    );
    object_response(StatusCode::NOT_FOUND, &json!({"detail": detail}))
}

fn conflict(detail: &str) -> HttpResponse {
    object_response(StatusCode::CONFLICT, &json!({"detail": detail}))
}

fn cancelled(id: JobId, cancelled: Cancelled) -> HttpResponse {
    let id = id.to_string();
    match cancelled {
        Cancelled::Done => object_response(StatusCode::OK, &json!({"job_id": id, "state": "cancelled"})),
        Cancelled::Soon => {
            let detail = "its batch runs and can't be stopped: the job ends with it, without a result and without another attempt";
            object_response(
                StatusCode::ACCEPTED,
                &json!({"job_id": id, "state": "running", "detail": detail}),
            )
        }
        Cancelled::Unwritten => {
            let detail = "it is being taken back; the journal of jobs can't be written at the moment";
            object_response(StatusCode::ACCEPTED, &json!({"job_id": id, "detail": detail}))
        }
        Cancelled::Ended(state) => {
            let detail = format!("the job has ended: {}", state.word());
            object_response(
                StatusCode::CONFLICT,
                &json!({"job_id": id, "state": state.word(), "detail": detail}),
            )
        }
        Cancelled::Unknown => unknown(&id),
    }
}

/// Which jobs are wanted; of those that haven't ended, whether those that run.
fn filter(query: Query<'_>, whose: Option<Option<Arc<str>>>) -> Result<(Filter, Option<bool>), JobError> {
    fn word<T: Copy>(
        query: Query<'_>,
        name: &str,
        all: &[T],
        word: fn(T) -> &'static str,
    ) -> Result<Option<T>, JobError> {
        let Some(text) = query.get(name) else { return Ok(None) };
        match all.iter().find(|one| word(**one) == text) {
            Some(one) => Ok(Some(*one)),
            None => {
                let mut known: Vec<&str> = all.iter().map(|one| word(*one)).collect();
                if name == "state" {
                    known.push("running");
                }
                Err(invalid(name, format!("expected one of {}, found {text:?}", known.join(", "))))
            }
        }
    }
    // Whether a job runs isn't written.
    let (state, running) = match query.get("state").as_deref() {
        Some("running") => (Some(State::Queued), Some(true)),
        Some("queued") => (Some(State::Queued), Some(false)),
        _ => (word(query, "state", &State::ALL, State::word)?, None),
    };
    let after = match query.get("after") {
        None => None,
        Some(id) => Some(id.parse().map_err(|error| invalid("after", format!("{error}, found {id:?}")))?),
    };
    let filter = Filter {
        state,
        delivery: word(query, "delivery", &Delivery::ALL, Delivery::word)?,
        model: query.get("model").map(Into::into),
        key: whose.map(|key| key.map(|key| key.to_string())),
        after,
        limit: query.number("limit", LIMIT, LIMIT_MAX)?.max(1),
    };
    Ok((filter, running))
}

/// What the queues in memory hold.
fn queues(context: &Context) -> HttpResponse {
    let now = Instant::now();
    let of_backend = |(name, memory): (&str, &Memory)| (name.to_owned(), json!(memory.lengths(now)));
    let backends: serde_json::Map<String, Value> = context.jobs.queues().memories().map(of_backend).collect();
    let faults = context.jobs.queues().faults();
    object_response(StatusCode::OK, &json!({"memory": backends, "not_usable": faults}))
}

/// The oldest messages of a queue in memory.
fn look(context: &Context, name: &str, limit: usize) -> Result<HttpResponse, JobError> {
    let route = match route(context, name) {
        Ok(route) => route,
        Err(response) => return Ok(*response),
    };
    let held = route.memory().look(&route.0.queue, limit, Instant::now());
    Ok(egress::messages(&held, None, None))
}

/// Acknowledges what was taken before, where a receipt is said, and takes the oldest messages of a queue in memory; only the one
/// where a receipt is said and no limit.
async fn take(context: &Context, name: &str, query: Query<'_>) -> Result<HttpResponse, JobError> {
    let route = match route(context, name) {
        Ok(route) => route,
        Err(response) => return Ok(*response),
    };
    let (memory, queue, now) = (route.memory(), &route.0.queue, Instant::now());
    let receipt = query.get("receipt");
    let default = if receipt.is_some() { 0 } else { LIMIT };
    let limit = query.number("limit", default, LIMIT_MAX)?;
    let lease = query.number("lease_seconds", LEASE_SECONDS, LEASE_SECONDS_MAX)?.max(1);
    let mut acknowledged = None;
    if let Some(receipt) = receipt {
        let Some(messages) = memory.acknowledge(queue, &receipt, now) else {
            let detail = format!(
                "no messages of the queue {name:?} are taken under the receipt {receipt:?}: they were acknowledged before, or were not in time and are in their queue again"
            );
            return Ok(object_response(StatusCode::NOT_FOUND, &json!({"detail": detail})));
        };
        context.jobs.taken(&route.0.backend, &messages).await?;
        acknowledged = Some(messages.len());
    }
    let (held, lease) = memory.take(queue, limit, Duration::from_secs(lease as u64), now);
    Ok(egress::messages(&held, lease.as_ref(), acknowledged))
}

/// A queue that is kept in memory.
struct InMemory(queues::Route);

impl InMemory {
    fn memory(&self) -> &Memory {
        self.0.adapter.memory().expect("it was looked at")
    }
}

fn route(context: &Context, name: &str) -> Result<InMemory, Box<HttpResponse>> {
    let not_found =
        |detail: String| Box::new(object_response(StatusCode::NOT_FOUND, &json!({"detail": detail})));
    let route = context.jobs.queues().route(name).map_err(|error| not_found(error.to_string()))?;
    if route.adapter.memory().is_none() {
        return Err(not_found(format!(
            "the queue {name:?} is with its broker: only queues in memory can be read here"
        )));
    }
    Ok(InMemory(route))
}
