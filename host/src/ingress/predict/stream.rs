//! `POST /predict_stream`: one bare input; chunks of its output as server-sent events, then its end. Until the first event it is a request as any
//! other, with a status of its own; from there on it goes on as the body of its answer, which is dropped when its caller leaves.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context as Task, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use hyper::StatusCode;
use modalkit_engine::Payload;
use tokio::time::{Instant as TokioInstant, Sleep, sleep};

use super::{Call, CancelOnDrop, Ended, count, decode_body};
use crate::{
    egress::{self, HttpResponse, LastError, Stream},
    ingress::{
        Context,
        endpoints::{Endpoint, Prediction},
        exchange::Exchange,
        request_timings::{RequestTimings, put_trace},
        timer::Limit,
    },
    pipeline::{Generation, Model},
    protocol::{HEARTBEAT, put_event},
    work::{Job, JobError, PendingStream, Received, Reply, stream_reply},
};

/// The events' names.
const CHUNK: &str = "chunk";
const EXPLAIN: &str = "explain";
const END: &str = "end";
/// What stands around a chunk's bytes.
const EVENT_BYTES: usize = 24;

/// A stream whose first event has come, or that has been silent for as long as one may be.
pub(super) struct Begun {
    pending: PendingStream,
    first: Option<Received>,
    cancel_on_drop: CancelOnDrop<Arc<Model>>,
}

/// Queues the job and waits for its first event.
///
/// # Errors
/// What became of it before there was one: its answer has a status of its own then.
pub(super) async fn begin(
    exchange: &Exchange,
    call: &Call,
    generation: &Arc<Generation>,
    input: Bytes,
) -> Result<Begun, JobError> {
    let (bytes, input) = (input.len(), Payload::Json(input));
    let decode = |generation: &Generation, input: &Payload| generation.decode(input);
    let decoded = decode_body(exchange, generation, &input, bytes, decode).await?;
    let (handle, mut pending) = stream_reply(&exchange.io.mailbox, &exchange.context.budget);
    let timings = call.timings();
    let job = Job { request_id: call.id.clone(), input, decoded: Some(decoded), reply: handle, timings };
    let queued = call.model.queue.push([job], Some(call.deadline))?;
    let cancel_on_drop = CancelOnDrop::queue(exchange, Arc::clone(&call.model), queued, 1);
    let silence = pin!(sleep(exchange.context.server.stream_heartbeat));
    let first = tokio::select! {
        biased;
        received = poll_fn(|task| pending.poll_next(task)) => Some(received),
        () = silence => None,
    };
    match first {
        Some(Received { chunks, end: Some(Err(error)) }) if chunks.is_empty() => {
            cancel_on_drop.done();
            Err(error)
        }
        first => Ok(Begun { pending, first, cancel_on_drop }),
    }
}

/// The answer that goes on with what has begun.
pub(super) fn respond(
    exchange: &Exchange,
    call: Call,
    begun: Begun,
    endpoint: &'static Endpoint,
) -> HttpResponse {
    let Begun { pending, first, cancel_on_drop } = begun;
    let heartbeat = exchange.context.server.stream_heartbeat;
    call.model.metrics.streams.inc();
    let trace = call.timings.as_deref().and_then(RequestTimings::traceparent);
    let mut response = egress::events(Box::new(Events {
        context: Arc::clone(&exchange.context),
        endpoint,
        limit: exchange.timer.limit(call.deadline.0),
        // Where there was silence until now, the caller hears so at once.
        silence: Box::pin(sleep(if first.is_some() { heartbeat } else { Duration::ZERO })),
        is_first: true,
        first,
        answering: Some(Answering { call, pending, cancel_on_drop }),
    }));
    if let Some(trace) = trace {
        put_trace(&mut response, &trace);
    }
    response
}

/// A stream on its way to its caller.
struct Events {
    context: Arc<Context>,
    endpoint: &'static Endpoint,
    /// The request's deadline.
    limit: Limit,
    /// When there was nothing to say for too long.
    silence: Pin<Box<Sleep>>,
    /// No event has come yet.
    is_first: bool,
    /// What came while the answer's headers were waited for.
    first: Option<Received>,
    /// `None` once the last event is written.
    answering: Option<Answering>,
}

/// Dropped, it says that the caller has left.
struct Answering {
    call: Call,
    pending: PendingStream,
    cancel_on_drop: CancelOnDrop<Arc<Model>>,
}

impl Stream for Events {
    fn poll_next(&mut self, task: &mut Task<'_>) -> Poll<Option<Bytes>> {
        let Some(answering) = &mut self.answering else { return Poll::Ready(None) };
        let received = match self.first.take() {
            Some(received) => received,
            None => match answering.pending.poll_next(task) {
                Poll::Ready(received) => received,
                Poll::Pending if Pin::new(&mut self.limit).poll(task).is_ready() => {
                    Received { chunks: Vec::new(), end: Some(Err(JobError::DeadlinePassed)) }
                }
                Poll::Pending => {
                    ready!(self.silence.as_mut().poll(task));
                    self.be_silent_again();
                    return Poll::Ready(Some(HEARTBEAT.into()));
                }
            },
        };
        self.be_silent_again();
        Poll::Ready(Some(self.write(received)))
    }
}

impl Events {
    fn be_silent_again(&mut self) {
        let at = TokioInstant::now() + self.context.server.stream_heartbeat;
        self.silence.as_mut().reset(at);
    }

    fn write(&mut self, Received { chunks, end }: Received) -> Bytes {
        if let Some(Answering { call, .. }) = self.answering.as_ref().filter(|_| self.is_first) {
            call.model.metrics.first_event.observe(call.begun.elapsed().as_secs_f64());
            self.is_first = false;
        }
        let mut text = Vec::with_capacity(chunks.iter().map(|chunk| chunk.len() + EVENT_BYTES).sum());
        chunks.iter().for_each(|chunk| put_event(&mut text, CHUNK, chunk));
        if let Some(reply) = end
            && let Some(Answering { call, cancel_on_drop, .. }) = self.answering.take()
        {
            cancel_on_drop.done();
            self.end(call, reply, &mut text);
        }
        text.into()
    }

    /// Writes the last event and counts what the request came to.
    fn end(&self, call: Call, reply: Reply, text: &mut Vec<u8>) {
        let Call { model, timings, id, begun, .. } = call;
        let metrics = &model.metrics;
        match &reply {
            Ok(_) => metrics.streams_complete.inc(),
            Err(JobError::ReadTooSlowly(_)) => metrics.streams_slow.inc(),
            Err(_) => metrics.streams_failed.inc(),
        }
        metrics.streams.dec();
        metrics.request.observe(begun.elapsed().as_secs_f64());
        let (status, error, event) = match egress::last_event(reply) {
            Ok(answer) => (StatusCode::OK, None, answer.into_bytes()),
            Err(LastError { status, error, event }) => (status, Some(error), event),
        };
        let told = timings.and_then(|timings| timings.end(&self.context, begun, &model.name, &id, status));
        if let Some(told) = told {
            put_event(text, EXPLAIN, told.to_string().as_bytes());
        }
        put_event(text, END, &event);
        let ended = Ended { status, error: error.as_deref().filter(|_| status.is_server_error()) };
        count(&self.context, Some(&model), (self.endpoint, Prediction::Stream), &id, ended);
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if let Some(Answering { call, .. }) = &self.answering {
            call.model.metrics.streams.dec();
            call.model.metrics.streams_left.inc();
        }
    }
}
