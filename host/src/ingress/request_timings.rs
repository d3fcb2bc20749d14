//! Timings of requests whose callers ask for them, or whose trace is sampled. All others have none.

use std::{sync::Arc, time::Instant};

use hyper::{
    HeaderMap, StatusCode,
    header::{HeaderName, HeaderValue},
};
use opentelemetry::propagation::Extractor;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{Context, peer::Peer, request_headers::Head};
use crate::{
    access::Caller,
    egress::HttpResponse,
    insight::{
        JobTimings, SpanContext, explain,
        traces::{Ended, RequestSpan, traceparent},
    },
    work::RequestId,
};

/// Asks where the time went, and says so in the answer.
const EXPLAIN: HeaderName = HeaderName::from_static("x-modalkit-explain");
/// The trace that an answer belongs to.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Bytes of an explanation: longer ones are told without their batches, since many clients take no long headers.
const EXPLANATION_BYTES_MAX: usize = 6 << 10;

/// Where one request's time goes, for its caller or for a trace.
pub(super) struct RequestTimings {
    span: Option<(RequestSpan, SpanContext)>,
    /// Whether its caller asked; and if so, whether it may know.
    explain: Option<bool>,
    jobs: Mutex<Vec<Arc<JobTimings>>>,
}

impl RequestTimings {
    /// `None` where nobody wants to know.
    pub(super) fn of(
        peer: &Peer,
        head: &Head<'_>,
        caller: &Caller,
        endpoint: &'static str,
    ) -> Option<Box<Self>> {
        let context = &*peer.context;
        let asked = head.known.explain.is_some_and(|value| value.as_bytes() == b"1");
        let span = context.metrics.traces.begin(endpoint, &TraceHeaders(&head.headers));
        if !asked && span.is_none() {
            return None;
        }
        Some(Box::new(Self {
            span: span.map(|span| {
                let context = span.context();
                (span, context)
            }),
            explain: asked.then_some(caller.explains),
            jobs: Mutex::default(),
        }))
    }

    /// Timings of one more job.
    pub(super) fn of_job(&self) -> Arc<JobTimings> {
        let span = self.span.as_ref().map(|(_, context)| context.clone());
        let timings = Arc::new(JobTimings::new(span));
        self.jobs.lock().push(Arc::clone(&timings));
        timings
    }

    /// The `traceparent` to pass on.
    pub(super) fn traceparent(&self) -> Option<String> {
        self.span.as_ref().map(|(_, context)| traceparent(context))
    }

    /// Ends the span and writes the explanation into the answer.
    pub(super) fn conclude(
        self: Box<Self>,
        context: &Context,
        begun: Instant,
        model: &str,
        id: &RequestId,
        mut response: HttpResponse,
    ) -> HttpResponse {
        if let Some(trace) = self.traceparent() {
            put_trace(&mut response, &trace);
        }
        if let Some(told) = self.end(context, begun, model, id, response.status()) {
            put(response.headers_mut(), EXPLAIN, &shortened(told));
        }
        response
    }

    /// Ends the span; returns the explanation, where the caller asked for one.
    pub(super) fn end(
        self: Box<Self>,
        context: &Context,
        begun: Instant,
        model: &str,
        id: &RequestId,
        status: StatusCode,
    ) -> Option<Value> {
        let jobs = self.jobs.into_inner();
        if let Some((span, _)) = self.span {
            let ended = Ended { status: status.as_u16(), model, request_id: id.to_string(), jobs: &jobs };
            context.metrics.traces.end(span, &ended);
        }
        Some(if self.explain? {
            explain(begun, &jobs)
        } else {
            json!({"denied": "this caller may not ask: expected a key with explain = true"})
        })
    }
}

/// Says in an answer which trace it belongs to.
pub(super) fn put_trace(response: &mut HttpResponse, traceparent: &str) {
    put(response.headers_mut(), TRACEPARENT, traceparent);
}

fn shortened(mut told: Value) -> String {
    let whole = told.to_string();
    if whole.len() <= EXPLANATION_BYTES_MAX {
        return whole;
    }
    told["batches"] = json!(told["batches"].as_array().map(Vec::len));
    told.to_string()
}

fn put(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    // What this host writes there is visible ASCII.
    if let Ok(value) = HeaderValue::from_str(text) {
        headers.insert(name, value);
    }
}

/// What a trace's context is read from.
struct TraceHeaders<'a>(&'a HeaderMap);

impl Extractor for TraceHeaders<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}
