//! `POST /predict_stream`: one bare input; chunks of its output as server-sent events, then its end. Until the first event it is a request as any
//! other, with a status of its own; from there on it goes on as the body of its answer, which is dropped when its caller leaves.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{Arc, LazyLock},
    task::{Context as Task, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::StatusCode;
use modalkit_engine::Payload;
use tokio::time::{Instant as TokioInstant, Sleep, sleep};

use super::{Call, CancelOnDrop, Counted, Ended, count, decode_body, say_if_lost};
use crate::{
    egress::{self, BodyStream, HttpResponse, LastError},
    ingress::{
        Context,
        exchange::Exchange,
        request_timings::{RequestTimings, put_trace},
        timer::Limit,
    },
    pipeline::{Generation, Model},
    protocol::{HEARTBEAT, put_event},
    work::{Deaths, Job, JobError, PendingStream, Received, Reply, stream_reply},
};

/// The events' names.
const CHUNK: &str = "chunk";
const EXPLAIN: &str = "explain";
const END: &str = "end";
/// What a stream counts as whose caller left: nobody gets this status, which other servers use for the same.
static CALLER_LEFT: LazyLock<StatusCode> =
    LazyLock::new(|| StatusCode::from_u16(499).expect("a number of three digits"));
/// Times that chunks may come which say nothing to their caller, until others on the thread have their turn.
const SILENT_ROUNDS_MAX: usize = 4;
/// What stands around a chunk's bytes.
const EVENT_BYTES: usize = 24;

/// A stream whose first event has come, or that has been silent for as long as one may be.
pub(in crate::ingress) struct StartedStream {
    pending: PendingStream,
    first: Option<Received>,
    cancel_on_drop: CancelOnDrop<Arc<Model>>,
}

/// Queues the job and waits for its first event.
///
/// # Errors
/// What became of it before there was one: its answer has a status of its own then.
pub(in crate::ingress) async fn begin(
    exchange: &Exchange,
    call: &Call,
    generation: &Arc<Generation>,
    input: Bytes,
) -> Result<StartedStream, JobError> {
    let measured = call.is_measured(generation);
    let (bytes, input) = (generation.bytes_to_parse(input.len(), measured), Payload::Json(input));
    let decode = move |generation: &Generation, input: &Payload| generation.decode_to_queue(input, measured);
    let decoded = decode_body(exchange, generation, &input, bytes, decode).await?;
    let (handle, mut pending) = stream_reply(&exchange.io.mailbox, &exchange.context.budget, call.deadline);
    let timings = call.timings();
    let job = Job {
        request_id: call.id.clone(),
        input,
        decoded: Some(decoded),
        reply: handle,
        timings,
        deaths: Deaths::default(),
    };
    let queued = call.model.queue.push([job], Some(call.deadline))?;
    let cancel_on_drop = CancelOnDrop::queue(exchange, Arc::clone(&call.model), queued, 1);
    let heartbeat = pin!(sleep(exchange.context.server.stream_heartbeat));
    let first = tokio::select! {
        biased;
        received = poll_fn(|task| pending.poll_next(task)) => Some(received),
        () = heartbeat => None,
    };
    match first {
        Some(Received { chunks, end: Some(Err(error)) }) if chunks.is_empty() => {
            cancel_on_drop.done();
            Err(error)
        }
        first => Ok(StartedStream { pending, first, cancel_on_drop }),
    }
}

/// The answer that goes on with what has begun.
pub(super) fn respond(
    exchange: &Exchange,
    call: Call,
    begun: StartedStream,
    counted: Counted,
    writer: Box<dyn EventWriter>,
) -> HttpResponse {
    let interval = exchange.context.server.stream_heartbeat;
    let trace = call.timings.as_deref().and_then(RequestTimings::traceparent);
    // Where there was silence until now, the caller hears so at once.
    let first = if begun.first.is_some() { interval } else { Duration::ZERO };
    let mut response = egress::events(Box::new(EventBody {
        interval,
        heartbeat: Box::pin(sleep(first)),
        stream: CountedStream::new(exchange, call, begun, counted),
        writer,
    }));
    if let Some(trace) = trace {
        put_trace(&mut response, &trace);
    }
    response
}

/// A stream on its way to its caller, which is counted by how it ends. Dropped before that, its caller has left.
pub(in crate::ingress) struct CountedStream {
    context: Arc<Context>,
    counted: Counted,
    /// The request's deadline.
    limit: Limit,
    /// No event has come yet.
    is_first: bool,
    /// What came while the answer's headers were waited for.
    first: Option<Received>,
    /// `None` once the end has come.
    open: Option<OpenStream>,
    /// Once the end has come, until it is counted.
    ended: Option<Call>,
}

/// Dropped, it says that the caller has left.
struct OpenStream {
    call: Call,
    pending: PendingStream,
    cancel_on_drop: CancelOnDrop<Arc<Model>>,
}

impl CountedStream {
    pub(in crate::ingress) fn new(
        exchange: &Exchange,
        call: Call,
        begun: StartedStream,
        counted: Counted,
    ) -> Self {
        let StartedStream { pending, first, cancel_on_drop } = begun;
        call.model.metrics.streams.inc();
        Self {
            context: Arc::clone(&exchange.context),
            counted,
            limit: exchange.timer.limit(call.deadline.0),
            is_first: true,
            first,
            open: Some(OpenStream { call, pending, cancel_on_drop }),
            ended: None,
        }
    }

    /// What has come; `None` once its end has. At the request's deadline it ends, whether or not its caller has kept up.
    pub(in crate::ingress) fn poll_next(&mut self, task: &mut Task<'_>) -> Poll<Option<Received>> {
        let Some(open) = &mut self.open else { return Poll::Ready(None) };
        let received = match self.first.take() {
            Some(received) => Poll::Ready(received),
            None => open.pending.poll_next(task),
        };
        let mut received = match received {
            Poll::Pending if Pin::new(&mut self.limit).poll(task).is_ready() => Received::default(),
            received => ready!(received),
        };
        if std::mem::take(&mut self.is_first) {
            open.call.model.metrics.first_event.observe(open.call.begun.elapsed().as_secs_f64());
        }
        let is_late = received.end.is_none() && Instant::now() >= open.call.deadline.0;
        if (received.end.is_some() || is_late)
            && let Some(OpenStream { call, cancel_on_drop, .. }) = self.open.take()
        {
            if is_late {
                // What is dropped takes the job along, wherever it is.
                received.end = Some(Err(JobError::DeadlinePassed));
            } else {
                cancel_on_drop.done();
            }
            self.ended = Some(call);
        }
        Poll::Ready(Some(received))
    }

    /// Counts what the request came to, with the status that its end has or would have; says where the time went, where its caller wants to know.
    pub(in crate::ingress) fn count_end(&mut self, end: &StreamEnd<'_>) -> Option<serde_json::Value> {
        let Call { model, timings, id, begun, .. } = self.ended.take()?;
        let StreamEnd { status, error, is_slow, is_lost } = *end;
        if is_lost {
            say_if_lost(&JobError::Lost, &model, &id);
        }
        let metrics = &model.metrics;
        match status {
            StatusCode::OK => metrics.streams_complete.inc(),
            _ if is_slow => metrics.streams_slow.inc(),
            _ => metrics.streams_failed.inc(),
        }
        metrics.streams.dec();
        metrics.stream.observe(begun.elapsed().as_secs_f64());
        let explanation =
            timings.and_then(|timings| timings.end(&self.context, begun, &model.name, &id, status));
        let ended = Ended { status, error: error.filter(|_| status.is_server_error()) };
        count(&self.context, Some(&model), self.counted, &id, ended);
        explanation
    }
}

/// How a stream ended.
pub(in crate::ingress) struct StreamEnd<'a> {
    status: StatusCode,
    error: Option<&'a str>,
    /// Its caller read none of its chunks.
    is_slow: bool,
    is_lost: bool,
}

impl<'a> StreamEnd<'a> {
    /// That of a stream which ends with this error, or well.
    pub(in crate::ingress) fn of(
        error: Option<&JobError>,
        status: StatusCode,
        text: Option<&'a str>,
    ) -> Self {
        Self {
            status,
            error: text,
            is_slow: matches!(error, Some(JobError::StoppedReading(_))),
            is_lost: matches!(error, Some(JobError::Lost)),
        }
    }
}

impl Drop for CountedStream {
    fn drop(&mut self) {
        let Some(OpenStream { call, pending, .. }) = self.open.take() else { return };
        let Call { model, timings, id, begun, .. } = call;
        let (counter, status) = if pending.is_cut_off() {
            (&model.metrics.streams_slow, StatusCode::REQUEST_TIMEOUT)
        } else {
            (&model.metrics.streams_left, *CALLER_LEFT)
        };
        counter.inc();
        model.metrics.streams.dec();
        model.metrics.stream.observe(begun.elapsed().as_secs_f64());
        if let Some(timings) = timings {
            let _ = timings.end(&self.context, begun, &model.name, &id, status);
        }
        let ended = Ended { status, error: None };
        count(&self.context, Some(&model), self.counted, &id, ended);
    }
}

/// How the events of a stream are written.
pub(in crate::ingress) trait EventWriter: Send {
    /// Writes a chunk.
    fn put_chunk(&mut self, chunk: &[u8], text: &mut Vec<u8>);

    /// What the end comes to, and its events.
    fn end(&mut self, reply: Reply) -> Result<Vec<u8>, LastError>;

    /// Says where the time went; the end follows.
    fn put_explanation(&self, explanation: &str, text: &mut Vec<u8>);
}

/// Events as `/predict_stream` has them.
pub(super) struct Events;

impl EventWriter for Events {
    fn put_chunk(&mut self, chunk: &[u8], text: &mut Vec<u8>) {
        put_event(text, CHUNK, chunk);
    }

    fn end(&mut self, reply: Reply) -> Result<Vec<u8>, LastError> {
        let mut text = Vec::new();
        let answer =
            egress::last_event(reply).map_err(|error| LastError { event: as_end(&error.event), ..error })?;
        put_event(&mut text, END, &answer.into_bytes());
        Ok(text)
    }

    fn put_explanation(&self, explanation: &str, text: &mut Vec<u8>) {
        put_event(text, EXPLAIN, explanation.as_bytes());
    }
}

fn as_end(json: &[u8]) -> Bytes {
    let mut text = Vec::new();
    put_event(&mut text, END, json);
    text.into()
}

/// A stream as server-sent events.
struct EventBody {
    interval: Duration,
    /// When there was nothing to say for too long.
    heartbeat: Pin<Box<Sleep>>,
    stream: CountedStream,
    writer: Box<dyn EventWriter>,
}

impl BodyStream for EventBody {
    fn poll_next(&mut self, task: &mut Task<'_>) -> Poll<Option<Bytes>> {
        for _ in 0..SILENT_ROUNDS_MAX {
            let received = match self.stream.poll_next(task) {
                Poll::Ready(Some(received)) => received,
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return self.poll_heartbeat(task),
            };
            let text = self.write(received);
            // A chunk that says nothing in this form is none.
            if !text.is_empty() {
                self.reset_heartbeat();
                return Poll::Ready(Some(text));
            }
        }
        // Others on this thread go first.
        task.waker().wake_by_ref();
        self.poll_heartbeat(task)
    }
}

impl EventBody {
    fn poll_heartbeat(&mut self, task: &mut Task<'_>) -> Poll<Option<Bytes>> {
        ready!(self.heartbeat.as_mut().poll(task));
        self.reset_heartbeat();
        Poll::Ready(Some(HEARTBEAT.into()))
    }

    fn reset_heartbeat(&mut self) {
        let at = TokioInstant::now() + self.interval;
        self.heartbeat.as_mut().reset(at);
    }

    /// Writes what has come.
    fn write(&mut self, Received { chunks, end }: Received) -> Bytes {
        let mut text = Vec::with_capacity(chunks.iter().map(|chunk| chunk.len() + EVENT_BYTES).sum());
        chunks.iter().for_each(|chunk| self.writer.put_chunk(chunk, &mut text));
        if let Some(reply) = end {
            self.end(reply, &mut text);
        }
        text.into()
    }

    /// Writes the last events.
    fn end(&mut self, reply: Reply, text: &mut Vec<u8>) {
        let end = StreamEnd::of(reply.as_ref().err(), StatusCode::OK, None);
        let (status, error, events) = match self.writer.end(reply) {
            Ok(events) => (StatusCode::OK, None, events.into()),
            Err(LastError { status, error, event }) => (status, Some(error), event),
        };
        let explanation = self.stream.count_end(&StreamEnd { status, error: error.as_deref(), ..end });
        if let Some(explanation) = explanation {
            self.writer.put_explanation(&explanation.to_string(), text);
        }
        text.extend_from_slice(&events);
    }
}
