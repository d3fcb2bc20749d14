//! What each path takes and gives: of every route its body and its answers, and the statuses of what goes wrong. It never knows how the document is put
//! together.

mod predictions;
mod v2;

use hyper::Method;
use serde_json::{Value, json};

use super::{
    Described, DescribedModel,
    plugin_schema::reference,
    shapes::{closed, count, list, map, shape, text, truth, word},
};
use crate::ingress::endpoints::{Prediction, Route};

pub(super) const JSON: &str = "application/json";

/// What one method of a path takes and gives.
#[derive(Default)]
pub(super) struct Operation {
    /// The body's schema, and whether there must be one.
    pub(super) body: Option<(Value, bool)>,
    /// What else a body may be.
    pub(super) other_body: Option<&'static str>,
    pub(super) examples: Vec<(String, Value)>,
    pub(super) answers: Vec<Answer>,
    /// Statuses of what goes wrong, beside those of who isn't let in.
    pub(super) errors: &'static [u16],
    /// Names of headers that say something.
    pub(super) headers: &'static [Header],
}

/// An answer that is none of an error.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) about: &'static str,
    pub(super) content_type: &'static str,
    pub(super) schema: Value,
}

/// A header of a request.
#[derive(Clone, Copy)]
pub(super) enum Header {
    Timeout,
    IdempotencyKey,
    JsonBytes,
}

fn answer(status: u16, about: &'static str, schema: Value) -> Answer {
    Answer { status, about, content_type: JSON, schema }
}

fn ok(schema: Value) -> Vec<Answer> {
    vec![answer(200, "the answer", schema)]
}

/// One that has no body and one answer.
fn simple(schema: Value, errors: &'static [u16]) -> Operation {
    Operation { answers: ok(schema), errors, ..Operation::default() }
}

/// What a method of a path takes and gives; `None` of one that isn't described: pages, and what isn't there.
pub(super) fn of(
    route: Route,
    method: &Method,
    models: &[DescribedModel],
    described: &Described,
) -> Option<Operation> {
    Some(match route {
        Route::Predict(Prediction::Task(task)) => predictions::of_task(task, described),
        Route::Predict(prediction) => predictions::of_prediction(prediction, models),
        Route::Jobs => simple(
            closed(json!({"jobs": list(reference("Job")), "next": {"type": ["string", "null"]}})),
            &[422, 429, 503, 504],
        ),
        Route::Job if method == Method::DELETE => Operation {
            answers: vec![
                answer(200, "it was taken back", shape(json!({"job_id": text(), "state": text()}))),
                answer(
                    202,
                    "it will be",
                    shape(json!({"job_id": text(), "state?": text(), "detail": text()})),
                ),
            ],
            errors: &[404, 409, 422, 503],
            ..Operation::default()
        },
        Route::Job => simple(reference("Job"), &[404, 422, 429, 503]),
        Route::Redeliver => Operation {
            answers: vec![answer(
                202,
                "it is on its way",
                shape(json!({"job_id": text(), "delivery": text()})),
            )],
            errors: &[404, 409, 503],
            ..Operation::default()
        },
        Route::Health => simple(
            shape(json!({
                "status": word(&["ok", "degraded"]), "models?": map(reference("ModelStatus")), "buckets?": map(json!({})),
            })),
            &[],
        ),
        Route::Live => simple(shape(json!({"live": truth()})), &[]),
        Route::Ready => Operation {
            answers: vec![
                answer(200, "it is", shape(json!({"ready": {"const": true}}))),
                answer(
                    503,
                    "it isn't",
                    json!({"anyOf": [shape(json!({"ready": {"const": false}})), reference("Problem")]}),
                ),
            ],
            errors: &[401, 404, 422],
            ..Operation::default()
        },
        Route::Queues => {
            simple(shape(json!({"memory": map(map(count())), "not_usable": map(json!({}))})), &[])
        }
        Route::Queue => simple(reference("Messages"), &[404, 422, 503]),
        Route::Models => simple(shape(json!({"models": list(reference("Model"))})), &[503]),
        Route::Model => simple(
            json!({"allOf": [reference("Model"), shape(json!({"reload": text(), "last": {"type": ["object", "null"]}}))]}),
            &[404, 503],
        ),
        Route::ReloadModel | Route::RollBack => Operation {
            answers: vec![
                answer(200, "what came of it", reference("Reload")),
                answer(409, "what serves stayed", reference("Reload")),
                answer(
                    503,
                    "the host goes away",
                    json!({"anyOf": [reference("Reload"), reference("Problem")]}),
                ),
            ],
            errors: &[404],
            ..Operation::default()
        },
        Route::Unload => {
            simple(shape(json!({"model": text(), "file": {"type": ["string", "null"]}})), &[404, 409, 503])
        }
        Route::ReloadVolume => Operation {
            answers: vec![
                answer(200, "what came of it", reference("VolumeReload")),
                answer(409, "a plugin was refused, or a hook failed", reference("VolumeReload")),
            ],
            errors: &[404, 502, 503],
            ..Operation::default()
        },
        Route::Devices => {
            simple(shape(json!({"devices": list(json!({})), "why_none": {"type": ["string", "null"]}})), &[])
        }
        Route::Metrics => Operation {
            answers: vec![Answer {
                status: 200,
                about: "all metrics, in Prometheus' text format",
                content_type: "text/plain",
                schema: text(),
            }],
            ..Operation::default()
        },
        Route::Config => simple(reference("Configuration"), &[]),
        Route::ReloadConfig => Operation {
            answers: vec![
                answer(200, "what came of it", shape(json!({"outcome": text()}))),
                answer(
                    409,
                    "it is wrong, and everything is as it was",
                    shape(json!({"outcome": text(), "errors": list(json!({}))})),
                ),
            ],
            errors: &[503],
            ..Operation::default()
        },
        Route::TaskModels => simple(
            shape(json!({"object": word(&["list"]), "data": list(reference("TaskModel"))})),
            &[429, 503],
        ),
        Route::TaskModel => simple(reference("TaskModel"), &[404, 429, 503]),
        Route::OpenApi => Operation {
            answers: vec![answer(200, "this document", json!({"type": "object"}))],
            errors: &[304, 429, 500, 503],
            ..Operation::default()
        },
        Route::Docs | Route::DocsAsset => return None,
        Route::V2(call) => v2::of(call, method == Method::POST)?,
    })
}
