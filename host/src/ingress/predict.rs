//! The three predict endpoints: from a request to jobs, and from their replies to an answer.

use std::{pin::pin, sync::Arc, time::Instant};

use bytes::Bytes;
use hyper::{StatusCode, body::Incoming, http::request::Parts};
use modalkit_batch::JobId;

use super::{
    Context, body,
    connection::Peer,
    envelope::{decode_envelope, decode_list},
    exchange::Exchange,
    follow::Follower,
    request,
    routes::refuse,
};
use crate::{
    access::Caller,
    audit::{Action, Does},
    dispatch::Queued,
    egress::{self, HttpResponse},
    job::{Deadline, Detail, Job, JobError, Location, RequestId, reply},
    jobs::{self, Jobs},
    pipeline::{Generation, Model},
    queues::Allowed,
    trail::Trail,
};

/// `POST /predict_sync`: one bare input, one answer.
pub(super) async fn sync(peer: &Exchange, head: &Parts, body: Incoming, id: &RequestId) -> HttpResponse {
    let (model, response) = run(peer, head, body, id, "/predict_sync", async |call: Call<'_>| {
        let item = examine(peer, &call, |generation, input| generation.decode(input)).await?;
        let (handle, mut pending) = reply(&peer.post.mailbox);
        let trail = call.trail();
        let job = Job { request_id: id.clone(), input: call.input, item: Some(item), reply: handle, trail };
        let ticket = Ticket::queue(peer, call.model, call.model.queue.push([job], Some(call.deadline))?, 1);
        let answer = pending.wait().await;
        ticket.done();
        answer.map(|body| egress::reply(Ok(body)))
    })
    .await;
    count(&peer.context, model.as_deref(), "/predict_sync", id, &response);
    response
}

/// `POST /predict_batch`: a list of bare inputs, a list of answers.
pub(super) async fn batch(peer: &Exchange, head: &Parts, body: Incoming, id: &RequestId) -> HttpResponse {
    let (model, response) = run(peer, head, body, id, "/predict_batch", async |call: Call<'_>| {
        let queue_max = call.model.spec().batch.queue_max;
        let items =
            examine(peer, &call, move |generation, body| decode_list(generation, body, queue_max)).await?;
        if items.is_empty() {
            return Ok(egress::replies(Vec::new()));
        }
        let count = items.len();
        let (mut jobs, mut pending) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for (input, item) in items {
            let (handle, answer) = reply(&peer.post.mailbox);
            let trail = call.trail();
            jobs.push(Job { request_id: id.clone(), input, item: Some(item), reply: handle, trail });
            pending.push(answer);
        }
        let queued = call.model.queue.push_all(jobs.into_iter(), Some(call.deadline))?;
        let ticket = Ticket::queue(peer, call.model, queued, count);
        let mut answers = Vec::with_capacity(count);
        for (index, mut answer) in pending.into_iter().enumerate() {
            // An item that no instance could validate before it was queued may turn out to be invalid here.
            answers
                .push(answer.wait().await.map_err(|error| behind(error, &[Location::Index(index as u64)])));
        }
        ticket.done();
        Ok(egress::replies(answers))
    })
    .await;
    count(&peer.context, model.as_deref(), "/predict_batch", id, &response);
    response
}

/// `POST /predict_async`: a wrapped input, the id of its job, which is on disk then. A deadline that the caller sets counts for the
/// job as well; without one the request's usual deadline is for the acceptance, and the job has none.
pub(super) async fn asynchronous(
    peer: &Exchange,
    head: &Parts,
    body: Incoming,
    id: &RequestId,
) -> HttpResponse {
    let (model, response) = run(peer, head, body, id, "/predict_async", async |call: Call<'_>| {
        let jobs = &peer.context.jobs;
        let (key, name) = (call.caller.key.clone(), call.model.name.clone());
        let once = request::idempotency_key(&head.headers)?.map(ToOwned::to_owned);
        // A large body is digested where it is parsed.
        let (parts, item, once) = examine(peer, &call, move |generation, body| {
            let (parts, item) = decode_envelope(generation, body)?;
            Ok((parts, item, once.map(|once| jobs::once(key.as_deref(), &name, &once, body))))
        })
        .await?;
        check_queues(jobs, &parts, call.caller)?;
        let incoming = jobs::Incoming {
            model: call.model.name.as_str().into(),
            key: call.caller.key.clone(),
            parts,
            item: Some(item),
            deadline: request::own_deadline(&head.headers, call.deadline),
            trace: call
                .follower
                .and_then(Follower::traceparent)
                .or_else(|| request::traceparent(&head.headers)),
            trail: call.trail(),
            place: call.caller.permit.clone(),
            once,
            envelope: call.input,
        };
        let (handle, mut pending) = reply(&peer.post.mailbox);
        jobs.accept(incoming, move |accepted| {
            handle.send(accepted.map(|id| format!("{{\"job_id\":\"{id}\"}}").into()));
        });
        pending.wait().await.map(|body| egress::reply(Ok(body)))
    })
    .await;
    count(&peer.context, model.as_deref(), "/predict_async", id, &response);
    response
}

/// A name that leads nowhere, or that this caller may not say, is told before the job is taken, and not when its result has nowhere to go.
fn check_queues(jobs: &Jobs, parts: &jobs::Parts, caller: &Caller) -> Result<(), JobError> {
    let allowed = Allowed::to(caller.key.as_deref(), caller.allowed_queues.as_deref());
    let mut details = Vec::new();
    for (member, queue) in [("success_queue", &parts.success_queue), ("failure_queue", &parts.failure_queue)]
    {
        if !queue.is_empty()
            && let Err(error) = jobs.queues().allowed(queue, allowed)
        {
            details.push(Detail {
                loc: vec!["body".into(), member.into()],
                msg: error.to_string(),
                kind: "value_error",
            });
        }
    }
    if details.is_empty() { Ok(()) } else { Err(JobError::Invalid(details)) }
}

/// An admitted request whose body has been read.
struct Call<'a> {
    model: &'a Model,
    generation: Arc<Generation>,
    input: Bytes,
    deadline: Deadline,
    caller: &'a Caller,
    follower: Option<&'a Follower>,
}

impl Call<'_> {
    /// A trail for one more job, where somebody follows this request.
    fn trail(&self) -> Option<Arc<Trail>> {
        self.follower.map(Follower::trail)
    }
}

/// What the three endpoints share: admission, the model, the deadline, the body. Returns the model for the counters.
async fn run(
    peer: &Exchange,
    head: &Parts,
    body: Incoming,
    id: &RequestId,
    endpoint: &'static str,
    answer: impl AsyncFnOnce(Call<'_>) -> Result<HttpResponse, JobError>,
) -> (Option<Arc<Model>>, HttpResponse) {
    let context = &*peer.context;
    let begun = Instant::now();
    let caller = match context.access.admit(&peer.from, &request::Headers(&head.headers)) {
        Ok(caller) => caller,
        Err(denied) => {
            let action = Action { method: head.method.as_str(), endpoint, name: "", does: Does::Look };
            return (None, refuse(context, &peer.from, action, &denied));
        }
    };
    let follower = Follower::of(peer, head, &caller, endpoint);
    let (model, response) = 'answered: {
        if let Err(error) = peer.enter() {
            break 'answered (None, egress::error(&error));
        }
        peer.keep(caller.permit.as_ref());
        let name = request::model_name(head.uri.query());
        let model = match context.models.find(name.as_deref()) {
            Ok(model) => model,
            Err(error) => break 'answered (None, egress::error(&error)),
        };
        drop(name);
        let deadline = match request::deadline(&head.headers, &context.server, begun) {
            Ok(deadline) => deadline,
            Err(error) => break 'answered (Some(model), egress::error(&error)),
        };
        let answered = {
            // Pinned where they stand: passed on to a function, such a future is there twice, and each request moves it.
            let mut limit = pin!(peer.timer.limit(deadline.0));
            let mut work = pin!(async {
                let input = match body::read(body, peer).await {
                    Ok(input) => input,
                    Err(error) => return Ok(error.into_response()),
                };
                let generation = model.serving()?;
                let follower = follower.as_deref();
                answer(Call { model: &model, generation, input, deadline, caller: &caller, follower }).await
            });
            tokio::select! {
                biased;
                done = &mut work => done,
                () = &mut limit => Err(JobError::DeadlinePassed),
            }
        };
        let response = answered.unwrap_or_else(|error| {
            if matches!(error, JobError::Lost) {
                tracing::error!(model = model.name, request_id = %id, "a job was lost inside the host");
            }
            egress::error(&error)
        });
        model.metrics.request.observe(begun.elapsed().as_secs_f64());
        (Some(model), response)
    };
    let response = match follower {
        Some(follower) => {
            let name = model.as_ref().map_or("", |model| model.name.as_str());
            follower.conclude(context, begun, name, id, response)
        }
        None => response,
    };
    (model, response)
}

/// Looks at a body: a small one here and now, a large one on the blocking pool, as many of a model at once as there are cores. There
/// goes any body of a model that has held such a thread as this for too long. The turn belongs to the work and not to the caller, who
/// may leave before it is done.
async fn examine<T: Send + 'static>(
    peer: &Peer,
    call: &Call<'_>,
    work: impl FnOnce(&Generation, &Bytes) -> Result<T, JobError> + Send + 'static,
) -> Result<T, JobError> {
    let context = &*peer.context;
    let generation = &call.generation;
    if call.input.len() <= context.server.decode_inline_bytes_max && !generation.decodes_elsewhere() {
        let _decodes = peer.post.decodes(generation);
        return work(generation, &call.input);
    }
    Box::pin(async {
        let turn = generation.decoding_turn().await?;
        let thread = Arc::clone(&context.decoding).acquire_owned().await.map_err(|_| JobError::Lost)?;
        let (generation, body) = (Arc::clone(generation), call.input.clone());
        let work = move || {
            let _turn = (turn, thread);
            work(&generation, &body)
        };
        context.blocking.spawn_blocking(work).await.map_err(|_| JobError::Lost)?
    })
    .await
}

/// Jobs in a queue on behalf of a caller. A caller that leaves, by hanging up or by its deadline, takes them along.
struct Ticket<'a> {
    model: &'a Model,
    first: JobId,
    count: usize,
}

impl<'a> Ticket<'a> {
    fn queue(peer: &Peer, model: &'a Model, queued: Queued, count: usize) -> Self {
        if queued.must_wake {
            peer.post.wake_soon(&model.queue);
        }
        Self { model, first: queued.first, count }
    }

    /// Every job was answered.
    fn done(self) {
        std::mem::forget(self);
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.model.queue.cancel(self.first, self.count);
    }
}

/// The same error, its places behind these steps.
pub(super) fn behind(error: JobError, steps: &[Location]) -> JobError {
    match error {
        JobError::Invalid(details) => {
            JobError::Invalid(details.into_iter().map(|detail| detail.inside(steps)).collect())
        }
        other => other,
    }
}

fn count(
    context: &Context,
    model: Option<&Model>,
    endpoint: &'static str,
    id: &RequestId,
    response: &HttpResponse,
) {
    let status = response.status();
    match (model, status, endpoint) {
        (Some(model), StatusCode::OK, "/predict_sync") => model.metrics.ok_sync.inc(),
        (Some(model), StatusCode::OK, "/predict_batch") => model.metrics.ok_batch.inc(),
        (Some(model), StatusCode::OK, _) => model.metrics.ok_async.inc(),
        (model, ..) => {
            let name = model.map_or("", |model| &model.name);
            context.metrics.requests(name, endpoint, status.as_u16()).inc();
        }
    }
    let model = model.map_or("", |model| model.name.as_str());
    if status.is_server_error() {
        tracing::warn!(request_id = %id, endpoint, model, status = status.as_u16(), "request failed");
    } else {
        tracing::debug!(request_id = %id, endpoint, model, status = status.as_u16(), "request answered");
    }
}
