//! The three predict endpoints: from a request to jobs, and from their replies to an answer.

use std::{pin::pin, sync::Arc, time::Instant};

use bytes::Bytes;
use hyper::{Request, StatusCode, body::Incoming};
use modalkit_batch::JobId;
use modalkit_loader::Item;
use serde::Deserialize;
use serde_json::{json, value::RawValue};

use super::{Context, body, connection::Peer, request};
use crate::{
    dispatch::{self, Queued},
    egress::{self, HttpResponse},
    job::{Deadline, Detail, Job, JobError, Location, PendingReply, Reply, RequestId, reply},
    jobs::Finished,
    pipeline::{Generation, Model},
};

/// `POST /predict_sync`: one bare input, one answer.
pub(super) async fn sync(peer: &Peer, http: Request<Incoming>, id: &RequestId) -> HttpResponse {
    let (model, response) = run(peer, http, id, async |call: Call<'_>| {
        let item = decode(&peer.context, &call.generation, call.input.clone()).await?;
        let (handle, mut pending) = reply(&peer.post.mailbox);
        let job = Job { request_id: id.clone(), input: call.input, item: Some(item), reply: handle };
        let ticket = Ticket::queue(peer, call.model, call.model.queue.push([job], Some(call.deadline))?, 1);
        let answer = within(peer, call.deadline, pending.wait()).await?;
        ticket.done();
        answer.map(|body| egress::reply(Ok(body)))
    })
    .await;
    count(&peer.context, model.as_deref(), "/predict_sync", id, &response);
    response
}

/// `POST /predict_batch`: a list of bare inputs, a list of answers.
pub(super) async fn batch(peer: &Peer, http: Request<Incoming>, id: &RequestId) -> HttpResponse {
    let (model, response) = run(peer, http, id, async |call: Call<'_>| {
        let inputs: Vec<&RawValue> = parse(&call.input)?;
        let queue_max = call.model.spec.batch.queue_max;
        if inputs.len() > queue_max {
            return Err(dispatch::too_many(inputs.len(), queue_max));
        }
        let mut jobs = Vec::with_capacity(inputs.len());
        let mut pending = Vec::with_capacity(inputs.len());
        for (index, input) in inputs.into_iter().enumerate() {
            let input = call.input.slice_ref(input.get().as_bytes());
            let item = decode(&peer.context, &call.generation, input.clone())
                .await
                .map_err(|error| behind(error, &[Location::Index(index as u64)]))?;
            let (handle, answer) = reply(&peer.post.mailbox);
            jobs.push(Job { request_id: id.clone(), input, item: Some(item), reply: handle });
            pending.push(answer);
        }
        if jobs.is_empty() {
            return Ok(egress::replies(Vec::new()));
        }
        let count = jobs.len();
        let queued = call.model.queue.push_all(jobs.into_iter(), Some(call.deadline))?;
        let ticket = Ticket::queue(peer, call.model, queued, count);
        let answers = within(peer, call.deadline, all(pending)).await?;
        ticket.done();
        Ok(egress::replies(answers))
    })
    .await;
    count(&peer.context, model.as_deref(), "/predict_batch", id, &response);
    response
}

/// What `/predict_async` takes, and nothing else.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    #[serde(borrow)]
    message: &'a RawValue,
    #[serde(default)]
    success_queue: String,
    #[serde(default)]
    failure_queue: String,
    #[serde(borrow, default)]
    meta: Option<&'a RawValue>,
}

/// `POST /predict_async`: a wrapped input, the id of its job.
pub(super) async fn asynchronous(peer: &Peer, http: Request<Incoming>, id: &RequestId) -> HttpResponse {
    let (model, response) = run(peer, http, id, async |call: Call<'_>| {
        let envelope: Envelope<'_> = parse(&call.input)?;
        check(&envelope)?;
        let input = call.input.slice_ref(envelope.message.get().as_bytes());
        let item = decode(&peer.context, &call.generation, input.clone())
            .await
            .map_err(|error| behind(error, &["message".into()]))?;
        let job_id = peer.context.jobs.accept(&call.model.spec.name)?;
        let (handle, pending) = reply(&peer.post.mailbox);
        let job = Job { request_id: id.clone(), input, item: Some(item), reply: handle };
        let queued =
            call.model.queue.push([job], None).inspect_err(|_| peer.context.jobs.withdraw(job_id))?;
        // Nobody waits on this connection, so there is nobody who could leave.
        Ticket::queue(peer, call.model, queued, 1).done();
        let meta = envelope.meta.map(ToOwned::to_owned);
        let whole: Box<RawValue> = parse(&call.input)?;
        let (jobs, permit) = (Arc::clone(&peer.context.jobs), peer.context.gate.job());
        tokio::spawn(async move {
            let mut pending = pending;
            let finished = match (pending.wait().await, meta) {
                (Ok(answer), Some(meta)) => Finished::Succeeded(egress::with_meta(&answer, &meta)),
                (Ok(answer), None) => Finished::Succeeded(answer),
                (Err(error), _) => Finished::Failed(egress::failed_job(&error, &whole)),
            };
            jobs.finish(job_id, finished);
            drop(permit);
        });
        Ok(egress::object_response(StatusCode::OK, &json!({"job_id": job_id})))
    })
    .await;
    count(&peer.context, model.as_deref(), "/predict_async", id, &response);
    response
}

/// An admitted request whose body has been read.
struct Call<'a> {
    model: &'a Model,
    generation: Arc<Generation>,
    input: Bytes,
    deadline: Deadline,
}

/// What the three endpoints share: admission, the model, the deadline, the body. Returns the model for the counters.
async fn run(
    peer: &Peer,
    http: Request<Incoming>,
    id: &RequestId,
    answer: impl AsyncFnOnce(Call<'_>) -> Result<HttpResponse, JobError>,
) -> (Option<Arc<Model>>, HttpResponse) {
    let context = &*peer.context;
    let _permit = match context.gate.enter() {
        Ok(permit) => permit,
        Err(error) => return (None, egress::error(&error)),
    };
    let name = request::model_name(http.uri().query());
    let model = match context.models.find(name.as_deref()) {
        Ok(model) => model,
        Err(error) => return (None, egress::error(&error)),
    };
    drop(name);
    let deadline = match request::deadline(http.headers(), &context.server, Instant::now()) {
        Ok(deadline) => deadline,
        Err(error) => return (Some(model), egress::error(&error)),
    };
    let input = match body::read(http.into_body(), &context.server).await {
        Ok(input) => input,
        Err(error) => return (Some(model), error.into_response()),
    };
    let answered = match model.serving() {
        Ok(generation) => answer(Call { model: &model, generation, input, deadline }).await,
        Err(error) => Err(error),
    };
    let response = answered.unwrap_or_else(|error| {
        if matches!(error, JobError::Lost) {
            tracing::error!(model = model.spec.name, request_id = %id, "a job was lost inside the host");
        }
        egress::error(&error)
    });
    (Some(model), response)
}

/// Small inputs are parsed here and now; large ones on the blocking pool, as many at once as there are cores.
async fn decode(context: &Context, generation: &Arc<Generation>, input: Bytes) -> Result<Item, JobError> {
    if input.len() <= context.server.decode_inline_bytes_max {
        return generation.decode(&input);
    }
    let _turn = context.decoding.acquire().await.map_err(|_| JobError::Lost)?;
    let generation = Arc::clone(generation);
    context.blocking.spawn_blocking(move || generation.decode(&input)).await.map_err(|_| JobError::Lost)?
}

async fn within<T>(peer: &Peer, deadline: Deadline, work: impl Future<Output = T>) -> Result<T, JobError> {
    let (mut work, mut limit) = (pin!(work), pin!(peer.timer.limit(deadline.0)));
    tokio::select! {
        biased;
        done = &mut work => Ok(done),
        () = &mut limit => Err(JobError::DeadlinePassed),
    }
}

async fn all(pending: Vec<PendingReply>) -> Vec<Reply> {
    let mut replies = Vec::with_capacity(pending.len());
    for mut reply in pending {
        replies.push(reply.wait().await);
    }
    replies
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

fn parse<'de, T: Deserialize<'de>>(input: &'de [u8]) -> Result<T, JobError> {
    serde_json::from_slice(input).map_err(|error| {
        let detail = match error.classify() {
            serde_json::error::Category::Data => {
                Detail { loc: vec!["body".into()], msg: error.to_string(), kind: "value_error" }
            }
            _ => Detail::not_json(&error),
        };
        JobError::Invalid(vec![detail])
    })
}

fn check(envelope: &Envelope<'_>) -> Result<(), JobError> {
    let mut details = Vec::new();
    for (name, queue) in
        [("success_queue", &envelope.success_queue), ("failure_queue", &envelope.failure_queue)]
    {
        if !queue.is_empty() {
            details.push(Detail {
                loc: vec!["body".into(), name.into()],
                msg: format!("expected an empty string, found {queue:?}: this host delivers to no queue; leave it out and ask GET /jobs/{{job_id}}"),
                kind: "value_error",
            });
        }
    }
    if envelope.meta.is_some_and(|meta| !meta.get().starts_with('{')) {
        details.push(Detail {
            loc: vec!["body".into(), "meta".into()],
            msg: "expected an object".into(),
            kind: "dict_type",
        });
    }
    if details.is_empty() { Ok(()) } else { Err(JobError::Invalid(details)) }
}

/// The same error, its places behind these steps.
fn behind(error: JobError, steps: &[Location]) -> JobError {
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
            let name = model.map_or("", |model| &model.spec.name);
            context.metrics.requests(name, endpoint, status.as_u16()).inc();
        }
    }
    let model = model.map_or("", |model| model.spec.name.as_str());
    if status.is_server_error() {
        tracing::warn!(request_id = %id, endpoint, model, status = status.as_u16(), "request failed");
    } else {
        tracing::debug!(request_id = %id, endpoint, model, status = status.as_u16(), "request answered");
    }
}
