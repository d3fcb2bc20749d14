//! The endpoints that run pipelines: from a request to jobs, and from their replies to an answer.

pub(super) mod infer;
pub(super) mod stream;
mod task;

use std::{ops::Deref, pin::pin, sync::Arc, time::Instant};

use bytes::Bytes;
use hyper::StatusCode;
use modalkit_batch::ArrivalId;
use modalkit_engine::{Decoded, Payload};

use super::{
    Context,
    body::{self, RequestBody},
    endpoints::{Endpoint, Prediction, Target},
    envelope::{ListItem, decode_envelope, decode_list},
    exchange::Exchange,
    peer::Peer,
    query::Query,
    refusal::refuse,
    request_headers::{self, Head},
    request_timings::RequestTimings,
};
use crate::{
    access::Caller,
    audit::{Action, Effect},
    config::Task,
    egress::{self, HttpResponse},
    insight::{JobTimings, metrics::ModelMetrics},
    jobs::{self, Jobs},
    pipeline::{Generation, Model, Queued},
    protocol::{self, Envelope},
    queues::Allowed,
    work::{Deadline, Deaths, Detail, Job, JobError, Location, PendingReply, Reply, RequestId, reply},
};

/// An admitted request for predictions: what is known of it before its body is read.
pub(super) struct Call {
    pub(super) caller: Caller,
    pub(super) model: Arc<Model>,
    pub(super) deadline: Deadline,
    /// An item that isn't an input is reported in its position, and doesn't fail the list.
    pub(super) partial: bool,
    /// Where its caller, or a trace, wants to know where the time went.
    pub(super) timings: Option<Box<RequestTimings>>,
    pub(super) id: RequestId,
    pub(super) begun: Instant,
}

/// What a request is counted as.
#[derive(Clone, Copy)]
pub(super) struct Counted {
    /// Its endpoint, as metrics and the log name it.
    pub(super) endpoint: &'static str,
    /// Counts one that succeeded.
    pub(super) ok: fn(&ModelMetrics),
}

impl Counted {
    fn of(endpoint: &Endpoint, prediction: Prediction) -> Self {
        let ok: fn(&ModelMetrics) = match prediction {
            Prediction::Sync => |metrics| metrics.ok_sync.inc(),
            Prediction::Batch => |metrics| metrics.ok_batch.inc(),
            Prediction::Async => |metrics| metrics.ok_async.inc(),
            Prediction::Infer => |metrics| metrics.ok_infer.inc(),
            Prediction::Stream => |metrics| metrics.ok_stream.inc(),
            Prediction::Task(Task::Embedding) => |metrics| metrics.ok_embedding.inc(),
            Prediction::Task(Task::Completion) => |metrics| metrics.ok_completion.inc(),
            Prediction::Task(Task::Chat) => |metrics| metrics.ok_chat.inc(),
        };
        Self { endpoint: endpoint.pattern, ok }
    }
}

/// Answers one of these paths.
pub(super) async fn answer(
    exchange: &Exchange,
    head: &Head<'_>,
    body: &mut RequestBody,
    id: &RequestId,
    target: Target<'_>,
    prediction: Prediction,
) -> HttpResponse {
    let context = &*exchange.context;
    let counted = Counted::of(target.endpoint, prediction);
    if let Prediction::Task(task) = prediction {
        return Box::pin(task::answer(exchange, head, body, id, target, task, counted)).await;
    }
    let call = match admit(exchange, head, id, target) {
        Ok(call) => call,
        Err(refused) => return refused.count(context, counted, id),
    };
    let answered = {
        // Pinned here: passed to a function, such a future would be copied for each request.
        let mut limit = pin!(exchange.timer.limit(call.deadline.0));
        let mut work = pin!(async {
            let json_bytes = infer::json_bytes(prediction, head)?;
            let input = match body::read_decoded(body, &head.headers, json_bytes, exchange).await {
                Ok(input) => input,
                Err(error) => return Ok(Answered::Whole(problem(target, error.into_response()))),
            };
            let generation = call.model.serving()?;
            generation.check_version(target.version().as_deref())?;
            // The rarer ones are boxed: every request's future is as large as the largest of them.
            let whole = match prediction {
                Prediction::Stream => {
                    let begun = Box::pin(stream::begin(exchange, &call, &generation, input)).await?;
                    return Ok(Answered::Stream(Box::new(begun), Box::new(stream::Events)));
                }
                Prediction::Sync => sync(exchange, &call, &generation, input).await,
                Prediction::Batch => Box::pin(batch(exchange, &call, &generation, input)).await,
                Prediction::Async => Box::pin(asynchronous(exchange, &call, &generation, input, head)).await,
                Prediction::Infer => {
                    Box::pin(infer::answer(exchange, &call, &generation, input, json_bytes)).await
                }
                Prediction::Task(_) => unreachable!("it has a way of its own, above"),
            };
            whole.map(Answered::Whole)
        });
        tokio::select! {
            biased;
            done = &mut work => done,
            () = &mut limit => Err(JobError::DeadlinePassed),
        }
    };
    conclude(exchange, call, target, counted, answered)
}

/// Counts what an admitted request came to, and says where the time went. A stream is counted when it ends.
fn conclude(
    exchange: &Exchange,
    call: Call,
    target: Target<'_>,
    counted: Counted,
    answered: Result<Answered, JobError>,
) -> HttpResponse {
    let context = &*exchange.context;
    let answered = match answered {
        Ok(Answered::Whole(response)) => Ok(response),
        Ok(Answered::Stream(begun, writer)) => {
            return stream::respond(exchange, call, *begun, counted, writer);
        }
        Err(error) => Err(error),
    };
    let Call { model, timings, begun, id, .. } = call;
    let response = answered.unwrap_or_else(|error| {
        say_if_lost(&error, &model, &id);
        problem(target, egress::error(&error))
    });
    model.metrics.request.observe(begun.elapsed().as_secs_f64());
    let response = match timings {
        Some(timings) => timings.conclude(context, begun, &model.name, &id, response),
        None => response,
    };
    count(context, Some(&model), counted, &id, Ended::of(&response));
    response
}

pub(super) fn say_if_lost(error: &JobError, model: &Model, id: &RequestId) {
    if matches!(error, JobError::Lost) {
        tracing::error!(model = model.name, request_id = %id, "a job was lost inside the host");
    }
}

/// What an admitted request came to.
enum Answered {
    Whole(HttpResponse),
    /// A stream whose first event is there, and who writes its events.
    Stream(Box<stream::StartedStream>, Box<dyn stream::EventWriter>),
}

/// A request that was not admitted, and the model that it asked for, where that is known.
struct Refused {
    response: HttpResponse,
    model: Option<Arc<Model>>,
}

impl Refused {
    fn count(self, context: &Context, counted: Counted, id: &RequestId) -> HttpResponse {
        let Self { response, model } = self;
        count(context, model.as_deref(), counted, id, Ended::of(&response));
        response
    }
}

/// A request whose caller was let in, and that has its place among those in flight.
struct Entered<'t> {
    caller: Caller,
    timings: Option<Box<RequestTimings>>,
    begun: Instant,
    target: Target<'t>,
}

impl<'t> Entered<'t> {
    /// Lets a request in.
    fn admit(
        exchange: &Exchange,
        head: &Head<'_>,
        id: &RequestId,
        target: Target<'t>,
    ) -> Result<Self, Box<Refused>> {
        let (context, endpoint) = (&*exchange.context, target.endpoint);
        let begun = Instant::now();
        let caller = context.access.admit(&exchange.from, &request_headers::Headers(&head.headers)).map_err(
            |denied| {
                let (method, endpoint) = (head.method.as_str(), endpoint.pattern);
                let action = Action { method, endpoint, name: "", effect: Effect::Look };
                let response = problem(target, refuse(context, &exchange.from, action, &denied));
                Box::new(Refused { response, model: None })
            },
        )?;
        let timings = RequestTimings::of(exchange, head, &caller, endpoint.pattern);
        let entered = Self { caller, timings, begun, target };
        match exchange.enter() {
            Ok(()) => {
                exchange.keep(entered.caller.permit.as_ref());
                Ok(entered)
            }
            Err(busy) => Err(entered.refuse(context, id, None, egress::error(&busy))),
        }
    }

    /// Turns it away after all.
    fn refuse(
        self,
        context: &Context,
        id: &RequestId,
        model: Option<Arc<Model>>,
        response: HttpResponse,
    ) -> Box<Refused> {
        let name = model.as_ref().map_or("", |model| model.name.as_str());
        let mut response = problem(self.target, response);
        if let Some(timings) = self.timings {
            response = timings.conclude(context, self.begun, name, id, response);
        }
        Box::new(Refused { response, model })
    }

    /// As a call of a model, until then.
    fn call(self, model: Arc<Model>, deadline: Deadline, partial: bool, id: &RequestId) -> Call {
        let Self { caller, timings, begun, .. } = self;
        Call { caller, model, deadline, partial, timings, id: id.clone(), begun }
    }
}

/// Admits a request: its caller, a permit among the requests in flight, the model and the deadline.
fn admit(
    exchange: &Exchange,
    head: &Head<'_>,
    id: &RequestId,
    target: Target<'_>,
) -> Result<Call, Box<Refused>> {
    let context = &*exchange.context;
    let entered = Entered::admit(exchange, head, id, target)?;
    let found = Query::parse(head.uri.query(), target.endpoint.parameters).and_then(|query| {
        // Where the path has no name, it may stand in the query.
        let in_path = Some(target.name()).filter(|name| !name.is_empty());
        let model = context.models.find(in_path.or_else(|| query.get("model_name")).as_deref())?;
        Ok((query, model))
    });
    let (query, model) = match found {
        Ok(found) => found,
        Err(error) => return Err(entered.refuse(context, id, None, egress::error(&error))),
    };
    let limits = request_headers::deadline(&head.known, &context.server, entered.begun)
        .and_then(|deadline| Ok((deadline, query.switch("partial")?)));
    match limits {
        Ok((deadline, partial)) => Ok(entered.call(model, deadline, partial, id)),
        Err(error) => Err(entered.refuse(context, id, Some(model), egress::error(&error))),
    }
}

impl Call {
    /// Whether a process is asked what its inputs cost before they are queued.
    fn is_measured(&self, generation: &Generation) -> bool {
        generation.is_asked_to_measure() && self.model.spec().batch.is_measured()
    }

    /// Timings of one more job, where somebody wants to know.
    fn timings(&self) -> Option<Arc<JobTimings>> {
        self.timings.as_deref().map(RequestTimings::of_job)
    }
}

/// `POST /predict_sync`: one bare input, one answer.
async fn sync(
    peer: &Peer,
    call: &Call,
    generation: &Arc<Generation>,
    input: Bytes,
) -> Result<HttpResponse, JobError> {
    let measured = call.is_measured(generation);
    let (bytes, input) = (generation.bytes_to_parse(input.len(), measured), Payload::Json(input));
    let decode = move |generation: &Generation, input: &Payload| generation.decode_to_queue(input, measured);
    let decoded = decode_body(peer, generation, &input, bytes, decode).await?;
    let answer = run_one(peer, call, (input, decoded)).await?;
    answer.map(|body| egress::reply(Ok(body)))
}

/// A job of this call, and where its reply comes.
fn job(peer: &Peer, call: &Call, (input, decoded): (Payload, Decoded)) -> (Job, PendingReply) {
    let (reply, pending) = reply(&peer.io.mailbox);
    let (request_id, timings) = (call.id.clone(), call.timings());
    (Job { request_id, input, decoded: Some(decoded), reply, timings, deaths: Deaths::default() }, pending)
}

/// Runs one input.
///
/// # Errors
/// It was not queued.
async fn run_one(peer: &Peer, call: &Call, input: (Payload, Decoded)) -> Result<Reply, JobError> {
    let (job, mut pending) = job(peer, call, input);
    let queued = call.model.queue.push([job], Some(call.deadline))?;
    let cancel_on_drop = CancelOnDrop::queue(peer, &*call.model, queued, 1);
    let answer = pending.wait().await;
    cancel_on_drop.done();
    Ok(answer)
}

/// `POST /predict_batch`: a list of bare inputs, a list of answers.
async fn batch(
    peer: &Peer,
    call: &Call,
    generation: &Arc<Generation>,
    input: Bytes,
) -> Result<HttpResponse, JobError> {
    let (queue_max, partial) = (call.model.spec().batch.queue_max, call.partial);
    let list = move |generation: &Generation, body: &Bytes| decode_list(generation, body, queue_max, partial);
    let bytes = generation.bytes_to_decode(input.len());
    let items = decode_body(peer, generation, &input, bytes, list).await?;
    Ok(egress::replies(run_all(peer, call, items).await?, partial))
}

/// Runs the items of one request, and gives their answers in order; those that are wrong have theirs.
async fn run_all(peer: &Peer, call: &Call, mut items: Vec<ListItem>) -> Result<Vec<Reply>, JobError> {
    if let [Ok(_)] = &items[..] {
        let only = items.pop().expect("there is one")?;
        let inside = |error: JobError| error.inside(&[Location::Index(0)]);
        return Ok(vec![run_one(peer, call, only).await?.map_err(inside)]);
    }
    let (mut jobs, mut pending) = (Vec::with_capacity(items.len()), Vec::with_capacity(items.len()));
    for item in items {
        pending.push(match item {
            Ok(input) => {
                let (job, answer) = job(peer, call, input);
                jobs.push(job);
                Ok(answer)
            }
            Err(error) => Err(error),
        });
    }
    let count = jobs.len();
    let cancel_on_drop = match count {
        0 => None,
        _ => {
            let queued = call.model.queue.push_all(jobs.into_iter(), Some(call.deadline))?;
            Some(CancelOnDrop::queue(peer, &*call.model, queued, count))
        }
    };
    let mut answers = Vec::with_capacity(pending.len());
    for (index, answer) in pending.into_iter().enumerate() {
        let answer = match answer {
            // An item that no instance could validate before it was queued may turn out to be invalid here.
            Ok(mut answer) => {
                answer.wait().await.map_err(|error| error.inside(&[Location::Index(index as u64)]))
            }
            Err(error) => Err(error),
        };
        answers.push(answer);
    }
    if let Some(cancel_on_drop) = cancel_on_drop {
        cancel_on_drop.done();
    }
    Ok(answers)
}

/// `POST /predict_async`: a wrapped input, the id of its job, which is on disk then. A deadline that the caller sets counts for the
/// job as well; without one the request's usual deadline is for the acceptance, and the job has none.
async fn asynchronous(
    peer: &Peer,
    call: &Call,
    generation: &Arc<Generation>,
    input: Bytes,
    head: &Head<'_>,
) -> Result<HttpResponse, JobError> {
    let jobs = &peer.context.jobs;
    let (key, model) = (call.caller.key.clone(), call.model.name.clone());
    let name = request_headers::idempotency_key(&head.headers)?.map(ToOwned::to_owned);
    // A large body is digested where it is parsed.
    let envelope = move |generation: &Generation, body: &Bytes| {
        let (parts, decoded) = decode_envelope(generation, body)?;
        let idempotency = name.map(|name| jobs::idempotency_key(key.as_deref(), &model, &name, body));
        Ok((parts, decoded, idempotency))
    };
    let bytes = generation.bytes_to_decode(input.len());
    let (parts, decoded, idempotency) = decode_body(peer, generation, &input, bytes, envelope).await?;
    check_queues(jobs, &parts, &call.caller)?;
    let traced = call.timings.as_deref().and_then(RequestTimings::traceparent);
    let incoming = jobs::Incoming {
        model: call.model.name.as_str().into(),
        key: call.caller.key.clone(),
        parts,
        decoded: Some(decoded),
        deadline: request_headers::own_deadline(&head.known, call.deadline),
        trace: traced.or_else(|| request_headers::traceparent(&head.headers)),
        timings: call.timings(),
        key_permit: call.caller.permit.clone(),
        idempotency,
        from_queue: false,
        envelope: input,
    };
    let (handle, mut pending) = reply(&peer.io.mailbox);
    jobs.accept(incoming, move |accepted| {
        handle.send(accepted.map(|id| Payload::Json(protocol::accepted(id))));
    });
    pending.wait().await?.into_json().map(egress::accepted).map_err(JobError::Failed)
}

/// A name that leads nowhere, or that this caller may not say, is told before the job is taken, and not when its result has nowhere to go.
fn check_queues(jobs: &Jobs, parts: &Envelope, caller: &Caller) -> Result<(), JobError> {
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
                kind: "value_error".into(),
            });
        }
    }
    if details.is_empty() { Ok(()) } else { Err(JobError::Invalid(details)) }
}

/// Decodes a body of which so many bytes are to be parsed: few on this thread; many, and any of a generation that has held an io thread for too
/// long, on the blocking pool, as many of a generation at once as there are cores. The permit belongs to the work and not to the caller, who may leave before it
/// is done.
async fn decode_body<B: Clone + Send + 'static, T: Send + 'static>(
    peer: &Peer,
    generation: &Arc<Generation>,
    body: &B,
    bytes: usize,
    work: impl FnOnce(&Generation, &B) -> Result<T, JobError> + Send + 'static,
) -> Result<T, JobError> {
    let context = &*peer.context;
    if bytes <= context.server.decode_inline_bytes_max && !generation.decodes_elsewhere() {
        let _decodes = peer.io.decodes(generation);
        return work(generation, body);
    }
    Box::pin(async {
        let turn = generation.decoding_turn().await?;
        let thread = Arc::clone(&context.decoding).acquire_owned().await.map_err(|_| JobError::Lost)?;
        let (generation, body) = (Arc::clone(generation), body.clone());
        let work = move || {
            let _turn = (turn, thread);
            work(&generation, &body)
        };
        context.blocking.spawn_blocking(work).await.map_err(|_| JobError::Lost)?
    })
    .await
}

/// Jobs in a queue on behalf of a caller. A caller that leaves, by hanging up or by its deadline, takes them along.
struct CancelOnDrop<M: Deref<Target = Model>> {
    model: M,
    first: ArrivalId,
    count: usize,
    is_answered: bool,
}

impl<M: Deref<Target = Model>> CancelOnDrop<M> {
    fn queue(peer: &Peer, model: M, queued: Queued, count: usize) -> Self {
        if queued.must_wake {
            peer.io.wake_soon(&model.queue);
        }
        Self { model, first: queued.first, count, is_answered: false }
    }

    /// Every job was answered.
    fn done(mut self) {
        self.is_answered = true;
    }
}

impl<M: Deref<Target = Model>> Drop for CancelOnDrop<M> {
    fn drop(&mut self) {
        if !self.is_answered {
            self.model.queue.cancel(self.first, self.count);
        }
    }
}

/// An error's answer in the form of its endpoint.
fn problem(target: Target<'_>, response: HttpResponse) -> HttpResponse {
    match target.route().prediction() {
        Some(Prediction::Infer) => egress::in_v2(response),
        Some(Prediction::Task(_)) => egress::in_openai(response),
        _ => response,
    }
}

/// How a request ended: its status, and of the server's errors the text.
pub(super) struct Ended<'a> {
    pub(super) status: StatusCode,
    pub(super) error: Option<&'a str>,
}

impl<'a> Ended<'a> {
    fn of(response: &'a HttpResponse) -> Self {
        let why = response.extensions().get::<egress::Why>();
        Self { status: response.status(), error: why.map(|why| why.text.as_str()) }
    }
}

pub(super) fn count(
    context: &Context,
    model: Option<&Model>,
    Counted { endpoint, ok }: Counted,
    id: &RequestId,
    ended: Ended<'_>,
) {
    let Ended { status, error } = ended;
    match model {
        Some(model) if status == StatusCode::OK => ok(&model.metrics),
        model => {
            let name = model.map_or("", |model| &model.name);
            context.metrics.requests(name, endpoint, status.as_u16()).inc();
        }
    }
    let model = model.map_or("", |model| model.name.as_str());
    if status.is_server_error() {
        tracing::warn!(request_id = %id, endpoint, model, status = status.as_u16(), error, "request failed");
    } else {
        tracing::debug!(request_id = %id, endpoint, model, status = status.as_u16(), "request answered");
    }
}
