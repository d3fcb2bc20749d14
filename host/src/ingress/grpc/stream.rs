//! `ModelStreamInfer`: any number of requests at once, each answered when it is. One input of a pipeline without tensors is answered in chunks as they
//! come, and then by its output. A caller that leaves takes all of them along.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context as Task, Poll, ready},
    time::Instant,
};

use futures_util::{
    FutureExt, Stream, StreamExt,
    stream::{self, BoxStream, SelectAll},
};
use hyper::StatusCode;
use modalkit_engine::Payload;
use modalkit_proto::{
    InferParameter, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse,
    infer_parameter::ParameterChoice,
};
use tokio::time::{Interval, timeout_at};
use tonic::Status;

use super::{
    body::drain_look,
    call::{GrpcCall, http_status},
    infer::{bytes_to_read, find, finish, infer_message, serving},
    reader::{Message, MessageReader, Next},
    writer,
};
use crate::{
    access::Caller,
    egress::{self, job_status},
    ingress::{
        predict::{
            Call, Counted, Ended, count,
            infer::elsewhere_if_large,
            say_if_lost,
            stream::{CountedStream, StreamEnd, begin},
        },
        response_body::Messages,
        timer::Limit,
    },
    insight::metrics::GRPC_STREAM_INFER,
    pipeline::{Generation, Model},
    protocol::{
        Answer, describe, describe_whole,
        v2::{self, Form, InferOutputs, InferRequest, Wanted},
    },
    work::{Deadline, JobError, Received, Reply},
};

const COUNTED: Counted = Counted { endpoint: GRPC_STREAM_INFER, ok: |metrics| metrics.ok_grpc_stream.inc() };
/// Requests of one stream that are under way; further ones are read when one of these has ended.
const UNDER_WAY_MAX: usize = 64;
/// Says that no answer to its request follows.
const IS_FINAL: &str = "triton_final_response";
/// Asks for a last answer, also where it has nothing to say but that.
const WANTS_EMPTY_FINAL: &str = "triton_enable_empty_final_response";

type Answers = BoxStream<'static, ModelStreamInferResponse>;
type Requests = BoxStream<'static, Result<Next, Status>>;

/// The answers to a caller's requests, as messages.
pub(super) struct InferStream {
    call: Arc<GrpcCall>,
    /// `None` once the last has come.
    requests: Option<Requests>,
    under_way: SelectAll<Answers>,
    /// Where its caller has set one.
    limit: Option<Limit>,
    drain_look: Interval,
}

impl InferStream {
    pub(super) fn new(call: Arc<GrpcCall>, reader: MessageReader) -> Self {
        let limit = call.ends_at.map(|at| call.exchange.timer.limit(at));
        let requests = stream::unfold(reader, async |mut reader| {
            let message = reader.next().await.transpose()?;
            Some((message, reader))
        });
        let requests = Some(requests.boxed());
        Self { call, requests, under_way: SelectAll::new(), limit, drain_look: drain_look() }
    }

    fn poll(&mut self, task: &mut Task<'_>) -> Poll<Option<Result<ModelStreamInferResponse, Status>>> {
        loop {
            if let Poll::Ready(Some(answer)) = self.under_way.poll_next_unpin(task) {
                return Poll::Ready(Some(Ok(answer)));
            }
            if let Some(limit) = &mut self.limit
                && limit.poll_unpin(task).is_ready()
            {
                return Poll::Ready(Some(Err(job_status(&JobError::DeadlinePassed))));
            }
            let under_way = self.under_way.len();
            match &mut self.requests {
                None if under_way == 0 => return Poll::Ready(None),
                Some(requests) if under_way < UNDER_WAY_MAX => match requests.poll_next_unpin(task) {
                    Poll::Ready(Some(Ok(next))) => {
                        let answers = answers(Arc::clone(&self.call), next);
                        self.under_way.push(answers);
                        continue;
                    }
                    Poll::Ready(Some(Err(status))) => return Poll::Ready(Some(Err(status))),
                    Poll::Ready(None) => {
                        self.requests = None;
                        continue;
                    }
                    Poll::Pending => {}
                },
                _ => return Poll::Pending,
            }
            if under_way > 0 {
                return Poll::Pending;
            }
            ready!(self.drain_look.poll_tick(task));
            if self.call.context().gate.is_closed() {
                let error = JobError::Unavailable("the server is shutting down".into());
                return Poll::Ready(Some(Err(job_status(&error))));
            }
        }
    }
}

impl Messages for InferStream {
    fn poll_next(&mut self, task: &mut Task<'_>) -> Poll<Option<Result<Answer, Status>>> {
        let next = ready!(self.poll(task));
        if let Some(Err(status)) = &next {
            let call = &self.call;
            call.context().metrics.requests("", call.method.path, http_status(status)).inc();
        }
        Poll::Ready(next.map(|answer| answer.map(|message| writer::message(&message))))
    }
}

/// The answers to one request.
fn answers(call: Arc<GrpcCall>, next: Next) -> Answers {
    let message = match next {
        Next::Message(message) => message,
        Next::Refused(id, refused) => {
            let status = refused.status();
            call.context().metrics.requests("", call.method.path, http_status(&status)).inc();
            return once(error_answer(brief(&id), status.message().to_owned()));
        }
    };
    let Message { request: message, taken, cost, admitted } = message;
    let id = brief(&message.id).to_owned();
    let begun = async move {
        let caller = admitted.as_ref().map(|admitted| admitted.caller.clone()).unwrap_or_default();
        match begin_request(&call, caller, message, cost).await {
            Ok(begun) => begun.held_with((taken, admitted)),
            Err(error) => once(failed(&id, &error)),
        }
    };
    stream::once(begun).flatten().boxed()
}

/// An id that answers repeat; a longer one is refused, and its answer has none.
fn brief(id: &str) -> &str {
    if id.len() <= v2::ID_BYTES_MAX { id } else { "" }
}

/// A request that has begun, or ended.
enum Begun {
    Whole(ModelStreamInferResponse),
    Chunks(Box<Chunks>),
}

impl Begun {
    /// Its answers; what is held until the last one is given back then.
    fn held_with(self, held: impl Send + 'static) -> Answers {
        match self {
            Self::Whole(answer) => once(answer),
            Self::Chunks(chunks) => chunks
                .map(move |answers| {
                    let _held = &held;
                    stream::iter(answers)
                })
                .flatten()
                .boxed(),
        }
    }
}

fn once(answer: ModelStreamInferResponse) -> Answers {
    stream::once(async { answer }).boxed()
}

/// The answer of a request that failed.
fn failed(id: &str, error: &JobError) -> ModelStreamInferResponse {
    error_answer(id, describe_whole(error))
}

fn error_answer(id: &str, message: String) -> ModelStreamInferResponse {
    // One without a text would be none.
    let error_message = if message.is_empty() { "the request failed".to_owned() } else { message };
    let response = ModelInferResponse { id: id.to_owned(), ..ModelInferResponse::default() };
    ModelStreamInferResponse { error_message, infer_response: Some(with_final(response, true)) }
}

fn succeeded(response: ModelInferResponse, is_final: bool) -> ModelStreamInferResponse {
    let infer_response = Some(with_final(response, is_final));
    ModelStreamInferResponse { error_message: String::new(), infer_response }
}

fn with_final(mut response: ModelInferResponse, is_final: bool) -> ModelInferResponse {
    let parameter = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(is_final)) };
    response.parameters.insert(IS_FINAL.to_owned(), parameter);
    response
}

fn count_error(call: &GrpcCall, model: Option<&Model>, error: &JobError) {
    let (status, text) = (egress::status_of(error), describe(error));
    let ended = Ended { status, error: Some(text.as_str()).filter(|_| status.is_server_error()) };
    if let Some(model) = model {
        say_if_lost(error, model, &call.id);
    }
    count(call.context(), model, COUNTED, &call.id, ended);
}

/// Runs a request to its end, or to its first chunk.
async fn begin_request(
    call: &GrpcCall,
    caller: Caller,
    message: ModelInferRequest,
    cost: usize,
) -> Result<Begun, JobError> {
    let begun = Instant::now();
    let model = find(call, &message).inspect_err(|error| count_error(call, None, error))?;
    let usual = begun + call.context().server.request_timeout;
    let deadline = Deadline(call.ends_at.map_or(usual, |at| at.min(usual)));
    let request = Call {
        caller,
        model: Arc::clone(&model),
        deadline,
        partial: false,
        timings: None,
        id: call.id.clone(),
        begun,
    };
    let work = async {
        let generation = serving(&model, &message)?;
        match Form::of(generation.signature()?) {
            form @ Form::Json => in_chunks(call, request, &generation, &form, message, cost).await,
            Form::Tensors(_) => {
                let outputs = infer_message(call, &request, message, cost).await?;
                Ok(whole(call, &request, outputs))
            }
        }
    };
    let worked = timeout_at(deadline.0.into(), Box::pin(work)).await;
    worked.unwrap_or(Err(JobError::DeadlinePassed)).inspect_err(|error| {
        model.metrics.request.observe(begun.elapsed().as_secs_f64());
        count_error(call, Some(&model), error);
    })
}

/// Counts a request that is answered at once.
fn whole(call: &GrpcCall, request: &Call, outputs: InferOutputs) -> Begun {
    request.model.metrics.request.observe(request.begun.elapsed().as_secs_f64());
    let ended = Ended { status: StatusCode::OK, error: None };
    count(call.context(), Some(&request.model), COUNTED, &call.id, ended);
    Begun::Whole(succeeded(outputs.into_message(&request.model.name), true))
}

/// Runs a request of JSON: in chunks, where it is one input and they are wanted.
async fn in_chunks(
    call: &GrpcCall,
    mut request: Call,
    generation: &Arc<Generation>,
    form: &Form,
    message: ModelInferRequest,
    cost: usize,
) -> Result<Begun, JobError> {
    let wants_empty_final = message
        .parameters
        .get(WANTS_EMPTY_FINAL)
        .is_some_and(|wants| matches!(wants.parameter_choice, Some(ParameterChoice::BoolParam(true))));
    let queue_max = request.model.spec().batch.queue_max;
    let signature = Arc::clone(form.stream_signature());
    let bytes = bytes_to_read(&message, cost);
    let read = move || v2::read_message(message, &signature, queue_max);
    let mut read = elsewhere_if_large(call.exchange.peer(), bytes, read).await??;
    let wants_chunks = read.wanted.take_chunks();
    if !wants_chunks || read.tensors.inputs() != 1 {
        // Chunks are those of one input; of several each has its whole output.
        let outputs = finish(call, &request, generation, form, read, bytes).await?;
        return Ok(whole(call, &request, outputs));
    }
    let InferRequest { tensors, wanted, timeout } = read;
    if let Some(timeout) = timeout {
        let limit = timeout.min(call.context().server.request_timeout_max);
        request.deadline = Deadline(request.deadline.0.min(request.begun + limit));
    }
    let Some(Payload::Json(input)) = form.inputs(tensors).pop() else { return Err(JobError::Lost) };
    let begun = Box::pin(begin(&call.exchange, &request, generation, input));
    let begun =
        timeout_at(request.deadline.0.into(), begun).await.unwrap_or(Err(JobError::DeadlinePassed))?;
    let (name, version) = (request.model.name.clone(), generation.number);
    let stream = CountedStream::new(&call.exchange, request, begun, COUNTED);
    let chunks =
        Chunks { stream, form: form.clone(), name, version, wanted: Some(wanted), wants_empty_final };
    Ok(Begun::Chunks(Box::new(chunks)))
}

/// The answers to a request that is answered in chunks, as they come.
struct Chunks {
    stream: CountedStream,
    form: Form,
    name: String,
    version: u64,
    /// Until the end has come.
    wanted: Option<Wanted>,
    wants_empty_final: bool,
}

impl Stream for Chunks {
    type Item = Vec<ModelStreamInferResponse>;

    fn poll_next(mut self: Pin<&mut Self>, task: &mut Task<'_>) -> Poll<Option<Self::Item>> {
        let received = ready!(self.stream.poll_next(task));
        Poll::Ready(received.map(|received| self.write(received)))
    }
}

impl Chunks {
    fn write(&mut self, Received { chunks, end }: Received) -> Vec<ModelStreamInferResponse> {
        let id = self.wanted.as_ref().map(Wanted::id).unwrap_or_default();
        let chunk = |chunk: &bytes::Bytes| v2::chunk_message(&self.name, self.version, id, chunk).ok();
        let mut answers: Vec<ModelStreamInferResponse> =
            chunks.iter().filter_map(chunk).map(|response| succeeded(response, false)).collect();
        if let Some((reply, wanted)) = end.and_then(|reply| Some((reply, self.wanted.take()?))) {
            answers.extend(self.end(reply, wanted));
        }
        answers
    }

    fn end(&mut self, reply: Reply, wanted: Wanted) -> Option<ModelStreamInferResponse> {
        let id = wanted.id().to_owned();
        let is_silent = wanted.is_empty() && !self.wants_empty_final;
        let answer = reply.and_then(|output| {
            let output = self.form.output(output).map_err(JobError::Failed)?;
            InferOutputs::of(self.version, wanted, &[output]).map_err(JobError::Failed)
        });
        let (answer, error) = match answer {
            Ok(outputs) => {
                let response = outputs.into_message(&self.name);
                (Some(succeeded(response, true)).filter(|_| !is_silent), None)
            }
            Err(error) => (Some(failed(&id, &error)), Some(error)),
        };
        let status = error.as_ref().map_or(StatusCode::OK, egress::status_of);
        let text = error.as_ref().map(describe);
        let end = StreamEnd::of(error.as_ref(), status, text.as_deref());
        let _ = self.stream.count_end(&end);
        answer
    }
}
