//! What callers ask of asynchronous jobs after they were accepted, and of the queues that are kept in memory.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::{Method, StatusCode, http::request::Parts};
use modalkit_journal::{Delivery, Filter, JobId, State};
use modalkit_queue::Memory;
use serde_json::{Value, json};

use super::{
    Context,
    exchange::Exchange,
    request::{Headers, parameter, percent_decoded},
    routes::{refuse, wrong_method},
};
use crate::{
    access::{Caller, Origin},
    audit::{Action, Does},
    egress::{self, HttpResponse, object_response},
    job::{Detail, JobError},
    jobs::Cancelled,
    queues::{Allowed, Route},
};

/// Jobs or messages in one answer, where the caller doesn't say, and at most.
const LIMIT: usize = 100;
const LIMIT_MAX: usize = 1000;
/// Seconds that messages are the taker's until they are acknowledged, where the caller doesn't say, and at most.
const LEASE_SECONDS: usize = 60;
const LEASE_SECONDS_MAX: usize = 43_200;

/// A path of jobs or queues, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked<'p> {
    /// `/jobs`
    Jobs,
    /// `/jobs/{id}`
    Job(&'p str),
    /// `/jobs/{id}/redeliver`
    Redeliver(&'p str),
    /// `/queues`
    Queues,
    /// `/queues/{name}`
    Queue(&'p str),
}

impl<'p> Asked<'p> {
    /// `None` where the path is none of these.
    pub(super) fn parse(path: &'p str) -> Option<Self> {
        let mut steps = path.strip_prefix('/')?.split('/');
        let path = (steps.next()?, steps.next(), steps.next());
        if steps.next().is_some() {
            return None;
        }
        match path {
            ("jobs", None, None) => Some(Self::Jobs),
            ("jobs", Some(id), None) if !id.is_empty() => Some(Self::Job(id)),
            ("jobs", Some(id), Some("redeliver")) => Some(Self::Redeliver(id)),
            ("queues", None, None) => Some(Self::Queues),
            ("queues", Some(name), None) if !name.is_empty() => Some(Self::Queue(name)),
            _ => None,
        }
    }

    /// The path as a label of metrics.
    pub(super) fn endpoint(self) -> &'static str {
        match self {
            Self::Jobs => "/jobs",
            Self::Job(_) => "/jobs/{id}",
            Self::Redeliver(_) => "/jobs/{id}/redeliver",
            Self::Queues => "/queues",
            Self::Queue(_) => "/queues/{name}",
        }
    }

    /// What stands in the path's placeholder.
    pub(super) fn name(self) -> &'p str {
        match self {
            Self::Jobs | Self::Queues => "",
            Self::Job(name) | Self::Redeliver(name) | Self::Queue(name) => name,
        }
    }

    /// The methods that it takes.
    fn methods(self) -> &'static str {
        match self {
            Self::Jobs | Self::Queues => "GET",
            Self::Job(_) | Self::Queue(_) => "GET, DELETE",
            Self::Redeliver(_) => "POST",
        }
    }

    /// What a request with this method does.
    fn does(self, method: &Method) -> Does {
        match self {
            _ if method != Method::GET => Does::Change,
            Self::Queue(_) => Does::Read,
            _ => Does::Look,
        }
    }

    pub(super) async fn answer(
        self,
        context: &Context,
        from: &Origin,
        exchange: Option<&Exchange>,
        head: &Parts,
    ) -> HttpResponse {
        let response = self.respond(context, from, exchange, head).await;
        context.metrics.requests("", self.endpoint(), response.status().as_u16()).inc();
        response
    }

    async fn respond(
        self,
        context: &Context,
        from: &Origin,
        exchange: Option<&Exchange>,
        head: &Parts,
    ) -> HttpResponse {
        let methods = self.methods();
        if !methods.split(", ").any(|method| method == head.method.as_str()) {
            return wrong_method(methods);
        }
        let name = percent_decoded(self.name());
        let action = Action {
            method: head.method.as_str(),
            endpoint: self.endpoint(),
            name: &name,
            does: self.does(&head.method),
        };
        let changes = action.does == Does::Change;
        let headers = Headers(&head.headers);
        let admitted = match self {
            Self::Queues | Self::Queue(_) => context.access.manage(from, &headers),
            Self::Jobs | Self::Job(_) | Self::Redeliver(_) => context.access.admit(from, &headers),
        };
        let caller = match admitted {
            Ok(caller) => caller,
            Err(denied) => return refuse(context, from, action, &denied),
        };
        let underway = context.audit.begin(action, &caller, from);
        let answered = match self {
            Self::Queues => Ok(queues(context)),
            Self::Queue(_) if changes => take(context, &name, head.uri.query()).await,
            Self::Queue(_) => number(head.uri.query(), "limit", LIMIT, LIMIT_MAX)
                .and_then(|limit| look(context, &name, limit)),
            _ => {
                // Who looks after a host isn't kept out by its load.
                let exchange = exchange.filter(|_| !caller.manages);
                self.of_jobs(context, &caller, exchange, head.uri.query(), changes).await
            }
        };
        let response = answered.unwrap_or_else(|error| egress::error(&error));
        underway.answered(response.status().as_u16());
        response
    }

    async fn of_jobs(
        self,
        context: &Context,
        caller: &Caller,
        exchange: Option<&Exchange>,
        query: Option<&str>,
        deletes: bool,
    ) -> Result<HttpResponse, JobError> {
        let jobs = &context.jobs;
        // Another caller's job is nobody's.
        let whose = if caller.manages { None } else { Some(caller.key.clone()) };
        let id = match self {
            Self::Job(id) | Self::Redeliver(id) => match id.parse::<JobId>() {
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
        Ok(match self {
            Self::Redeliver(_) => match jobs.redeliver(id, whose, may_name(context)).await? {
                Some(true) => object_response(
                    StatusCode::ACCEPTED,
                    &json!({"job_id": id.to_string(), "delivery": "pending"}),
                ),
                Some(false) => {
                    let detail = "its result is on its way, or no queue is to get it";
                    object_response(StatusCode::CONFLICT, &json!({"detail": detail}))
                }
                None => unknown(&id.to_string()),
            },
            _ if deletes => cancelled(id, jobs.cancel(id, whose).await?),
            _ => {
                let wait_max = context.server.request_timeout_max.as_millis() as usize;
                let wait = number(query, "wait_ms", 0, wait_max)?;
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
}

/// Takes a place among the requests in flight for what is read and written now; who only waits for a job's end needs none. A host that
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

/// A number of the query.
fn number(query: Option<&str>, name: &str, default: usize, max: usize) -> Result<usize, JobError> {
    let Some(text) = parameter(query, name) else { return Ok(default) };
    match text.parse::<usize>() {
        Ok(number) => Ok(number.min(max)),
        Err(_) => Err(wrong(name, format!("expected a whole number, found {text:?}"))),
    }
}

/// Which jobs are wanted; of those that haven't ended, whether those that run.
fn filter(query: Option<&str>, whose: Option<Option<Arc<str>>>) -> Result<(Filter, Option<bool>), JobError> {
    fn word<T: Copy>(
        query: Option<&str>,
        name: &str,
        all: &[T],
        word: fn(T) -> &'static str,
    ) -> Result<Option<T>, JobError> {
        let Some(text) = parameter(query, name) else { return Ok(None) };
        match all.iter().find(|one| word(**one) == text) {
            Some(one) => Ok(Some(*one)),
            None => {
                let mut known: Vec<&str> = all.iter().map(|one| word(*one)).collect();
                if name == "state" {
                    known.push("running");
                }
                Err(wrong(name, format!("expected one of {}, found {text:?}", known.join(", "))))
            }
        }
    }
    // Whether a job runs isn't written.
    let (state, running) = match parameter(query, "state").as_deref() {
        Some("running") => (Some(State::Queued), Some(true)),
        Some("queued") => (Some(State::Queued), Some(false)),
        _ => (word(query, "state", &State::ALL, State::word)?, None),
    };
    let after = match parameter(query, "after") {
        None => None,
        Some(id) => Some(id.parse().map_err(|error| wrong("after", format!("{error}, found {id:?}")))?),
    };
    let filter = Filter {
        state,
        delivery: word(query, "delivery", &Delivery::ALL, Delivery::word)?,
        model: parameter(query, "model").map(Into::into),
        key: whose.map(|key| key.map(|key| key.to_string())),
        after,
        limit: number(query, "limit", LIMIT, LIMIT_MAX)?.max(1),
    };
    Ok((filter, running))
}

fn wrong(parameter: &str, msg: String) -> JobError {
    JobError::Invalid(vec![Detail { loc: vec!["query".into(), parameter.into()], msg, kind: "value_error" }])
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
async fn take(context: &Context, name: &str, query: Option<&str>) -> Result<HttpResponse, JobError> {
    let route = match route(context, name) {
        Ok(route) => route,
        Err(response) => return Ok(*response),
    };
    let (memory, queue, now) = (route.memory(), &route.0.queue, Instant::now());
    let receipt = parameter(query, "receipt");
    let default = if receipt.is_some() { 0 } else { LIMIT };
    let limit = number(query, "limit", default, LIMIT_MAX)?;
    let lease = number(query, "lease_seconds", LEASE_SECONDS, LEASE_SECONDS_MAX)?.max(1);
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
struct InMemory(Route);

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_jobs_and_queues_are_taken_apart() {
        assert_eq!(Asked::parse("/jobs"), Some(Asked::Jobs));
        assert_eq!(Asked::parse("/jobs/a"), Some(Asked::Job("a")));
        assert_eq!(Asked::parse("/jobs/a/redeliver"), Some(Asked::Redeliver("a")));
        assert_eq!(Asked::parse("/queues/q"), Some(Asked::Queue("q")));
        for path in ["/jobs/", "/jobs/a/b", "/queues/", "/queues/a/b", "/job", "jobs"] {
            assert_eq!(Asked::parse(path), None, "{path}");
        }
    }

    #[test]
    fn messages_of_a_queue_are_read_and_jobs_are_looked_at() {
        for (method, path, does) in [
            (Method::GET, "/queues/q", Does::Read),
            (Method::GET, "/queues", Does::Look),
            (Method::GET, "/jobs", Does::Look),
            (Method::GET, "/jobs/a", Does::Look),
            (Method::DELETE, "/queues/q", Does::Change),
            (Method::DELETE, "/jobs/a", Does::Change),
            (Method::POST, "/jobs/a/redeliver", Does::Change),
        ] {
            assert_eq!(Asked::parse(path).unwrap().does(&method), does, "{method} {path}");
        }
    }
}
