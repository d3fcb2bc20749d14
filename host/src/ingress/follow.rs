//! Requests that somebody follows: callers that ask where their time went, and those whose trace is sampled. All others pass by.

use std::{sync::Arc, time::Instant};

use hyper::{
    HeaderMap,
    header::{HeaderName, HeaderValue},
    http::request::Parts,
};
use opentelemetry::propagation::Extractor;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{Context, connection::Peer};
use crate::{
    access::Caller,
    egress::HttpResponse,
    job::RequestId,
    traces::{Ended, RequestSpan, SpanContext, traceparent},
    trail::{Trail, explain},
};

/// Asks where the time went, and says so in the answer.
const EXPLAIN: HeaderName = HeaderName::from_static("x-modalkit-explain");
/// The trace that an answer belongs to.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Bytes of an explanation: longer ones are told without their batches, since many clients take no long headers.
const EXPLANATION_BYTES_MAX: usize = 6 << 10;

/// One request that is followed.
pub(super) struct Follower {
    span: Option<(RequestSpan, SpanContext)>,
    /// Whether its caller asked; and if so, whether it may know.
    explain: Option<bool>,
    trails: Mutex<Vec<Arc<Trail>>>,
}

impl Follower {
    /// `None` where nobody follows.
    pub(super) fn of(
        peer: &Peer,
        head: &Parts,
        caller: &Caller,
        endpoint: &'static str,
    ) -> Option<Box<Self>> {
        let context = &*peer.context;
        let asked = head.headers.get(EXPLAIN).is_some_and(|value| value.as_bytes() == b"1");
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
            trails: Mutex::default(),
        }))
    }

    /// A trail for one more job.
    pub(super) fn trail(&self) -> Arc<Trail> {
        let span = self.span.as_ref().map(|(_, context)| context.clone());
        let trail = Arc::new(Trail::new(span));
        self.trails.lock().push(Arc::clone(&trail));
        trail
    }

    /// The trace, for those who go on with it elsewhere.
    pub(super) fn traceparent(&self) -> Option<String> {
        self.span.as_ref().map(|(_, context)| traceparent(context))
    }

    /// Ends the span and writes the explanation.
    pub(super) fn conclude(
        self: Box<Self>,
        context: &Context,
        begun: Instant,
        model: &str,
        id: &RequestId,
        mut response: HttpResponse,
    ) -> HttpResponse {
        let trails = self.trails.into_inner();
        if let Some(may) = self.explain {
            let told = if may {
                explain(begun, &trails)
            } else {
                json!({"denied": "this caller may not ask: expected a key with explain = true"})
            };
            put(response.headers_mut(), EXPLAIN, &shortened(told));
        }
        if let Some((span, span_context)) = self.span {
            let status = response.status().as_u16();
            let ended = Ended { status, model, request_id: id.to_string(), trails: &trails };
            context.metrics.traces.end(span, &ended);
            put(response.headers_mut(), TRACEPARENT, &traceparent(&span_context));
        }
        response
    }
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
