//! Where one request's time went: noted on its way by those who know, for callers that ask and for requests that are traced. Others
//! carry no timings and pay nothing.

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use modalkit_batch::Closed;
pub use opentelemetry::trace::SpanContext;
use serde_json::{Value, json};

/// One job's timings.
#[derive(Debug)]
pub struct JobTimings {
    /// The span of its request, where that is traced.
    pub span: Option<SpanContext>,
    ran: OnceLock<JobRun>,
}

/// How a job ran.
#[derive(Clone, Debug)]
pub struct JobRun {
    /// When it came to the queue.
    pub arrived: Instant,
    /// With whom.
    pub batch: Arc<BatchTimings>,
}

/// One batch's way.
#[derive(Clone, Debug)]
pub struct BatchTimings {
    /// Why it closed.
    pub closed: Closed,
    /// Its items.
    pub size: usize,
    /// The generation that ran it.
    pub generation: u64,
    /// The replica that ran it.
    pub replica: u64,
    /// Since when a replica was free for it.
    pub free_since: Instant,
    /// When it was taken from the queue.
    pub taken: Instant,
    /// When its stages began.
    pub begun: Instant,
    /// When `preprocess` returned; `None` where it failed.
    pub preprocessed: Option<Instant>,
    /// When `predict` returned.
    pub predicted: Option<Instant>,
    /// When its last stage returned.
    pub ended: Instant,
    /// Its span, where it is traced.
    pub span: Option<SpanContext>,
}

impl JobTimings {
    /// Of a job that hasn't run yet.
    #[must_use]
    pub fn new(span: Option<SpanContext>) -> Self {
        Self { span, ran: OnceLock::new() }
    }

    /// Notes how the job ran.
    pub fn note(&self, ran: JobRun) {
        // Only one lane ever runs a job.
        let _ = self.ran.set(ran);
    }

    /// How it ran; `None` where it didn't.
    #[must_use]
    pub fn ran(&self) -> Option<&JobRun> {
        self.ran.get()
    }
}

impl BatchTimings {
    /// The three stages: name, begin and end of each that was begun.
    pub fn stages(&self) -> impl Iterator<Item = (&'static str, Instant, Instant)> {
        let (preprocessed, predicted) = (self.preprocessed, self.predicted);
        let second = preprocessed.map(|begun| ("predict", begun, predicted.unwrap_or(self.ended)));
        let third = predicted.map(|begun| ("postprocess", begun, self.ended));
        [Some(("preprocess", self.begun, preprocessed.unwrap_or(self.ended))), second, third]
            .into_iter()
            .flatten()
    }
}

/// What a caller is told of a request that began then: times in milliseconds. Jobs of one batch are told together.
#[must_use]
pub fn explain(begun: Instant, jobs: &[Arc<JobTimings>]) -> Value {
    let now = Instant::now();
    let mut batches: Vec<(Arc<BatchTimings>, Instant, usize)> = Vec::new();
    for ran in jobs.iter().filter_map(|timings| timings.ran()) {
        match batches.iter_mut().find(|(batch, ..)| Arc::ptr_eq(batch, &ran.batch)) {
            Some((_, arrived, items)) => {
                *arrived = (*arrived).min(ran.arrived);
                *items += 1;
            }
            None => batches.push((Arc::clone(&ran.batch), ran.arrived, 1)),
        }
    }
    let admitted = batches.iter().map(|(_, arrived, _)| *arrived).min();
    let answered = batches.iter().map(|(batch, ..)| batch.ended).max();
    let batches: Vec<Value> =
        batches.iter().map(|(batch, arrived, items)| explain_batch(batch, *arrived, *items)).collect();
    json!({
        "total_ms": milliseconds(begun, now),
        "admission_ms": admitted.map(|admitted| milliseconds(begun, admitted)),
        "answer_ms": answered.map(|answered| milliseconds(answered, now)),
        "batches": batches,
    })
}

fn explain_batch(batch: &BatchTimings, arrived: Instant, items: usize) -> Value {
    let closed = match batch.closed {
        Closed::Full => "full",
        Closed::Costly => "costly",
        Closed::Waited => "waited",
        Closed::Drained => "drained",
        Closed::Alone => "alone",
    };
    let mut told = json!({
        "items": items,
        "queue_ms": milliseconds(arrived, batch.taken),
        // Of that time, what passed while a replica was free and the batch waited to be filled.
        "batch_wait_ms": milliseconds(arrived.max(batch.free_since), batch.taken),
        "closed": closed,
        "size": batch.size,
        "replica": batch.replica,
        "generation": batch.generation,
    });
    for (stage, begun, ended) in batch.stages() {
        told[format!("{stage}_ms")] = json!(milliseconds(begun, ended));
    }
    told
}

/// Whole microseconds: more digits would say nothing.
fn milliseconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_micros() as f64 / 1e3
}
