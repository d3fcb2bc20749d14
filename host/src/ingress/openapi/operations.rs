//! What each path takes and gives: of every route its body and its answers, and the statuses of what goes wrong. It never knows how the document is put
//! together.

use hyper::Method;
use serde_json::{Value, json};

use super::{
    DescribedModel,
    plugin_schema::reference,
    shapes::{closed, count, list, map, shape, text, truth, word},
};
use crate::{
    config::Task,
    ingress::endpoints::{Prediction, Route, V2Call},
};

pub(super) const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";
const OCTETS: &str = "application/octet-stream";

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
}

/// What may go wrong with a request that runs a pipeline.
const OF_PREDICTIONS: &[u16] = &[400, 404, 408, 413, 415, 422, 429, 500, 503, 504];
/// The same where a protocol has no 422.
const OF_PROTOCOLS: &[u16] = &[400, 404, 408, 413, 415, 429, 500, 503, 504];
/// What may go wrong with one whose small body is read.
const OF_SMALL_BODIES: &[u16] = &[400, 404, 408, 413, 415, 429, 503];
const OF_MODELS: &[u16] = &[404, 429, 503];

fn answer(status: u16, about: &'static str, schema: Value) -> Answer {
    Answer { status, about, content_type: JSON, schema }
}

fn ok(schema: Value) -> Vec<Answer> {
    vec![answer(200, "the answer", schema)]
}

/// What a model's input, or answer, may be: one of those there are.
fn any_of(models: &[DescribedModel], which: fn(&DescribedModel) -> &Value) -> Value {
    match models {
        [] => json!({}),
        [only] => which(only).clone(),
        several => json!({"anyOf": several.iter().map(which).collect::<Vec<_>>()}),
    }
}

/// What a method of a path takes and gives; `None` of one that isn't described: pages, and what isn't there.
pub(super) fn of(route: Route, method: &Method, models: &[DescribedModel]) -> Option<Operation> {
    let posts = method == Method::POST;
    let simple = |schema: Value, errors: &'static [u16]| Operation {
        answers: ok(schema),
        errors,
        ..Operation::default()
    };
    Some(match route {
        Route::Predict(Prediction::Task(task)) => of_task(task, models),
        Route::Predict(prediction) => of_prediction(prediction, models),
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
                answer(200, "it is", shape(json!({"ready": word_true()}))),
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
            simple(shape(json!({"memory": map(map(count())), "not_usable": map(json!({}))})), &[422])
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
            ],
            errors: &[404, 503],
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
            errors: &[429, 503],
            ..Operation::default()
        },
        Route::Docs | Route::DocsAsset => return None,
        Route::V2(call) => of_v2(call, posts)?,
    })
}

fn word_true() -> Value {
    json!({"const": true})
}

fn of_prediction(prediction: Prediction, models: &[DescribedModel]) -> Operation {
    let input = any_of(models, |model| &model.input);
    let output = any_of(models, |model| &model.answer);
    let whole = Operation { errors: OF_PREDICTIONS, headers: &[Header::Timeout], ..Operation::default() };
    match prediction {
        Prediction::Sync => Operation {
            body: Some((input, true)),
            examples: models
                .iter()
                .filter_map(|model| Some((model.name.clone(), model.example.clone()?)))
                .collect(),
            answers: ok(output),
            ..whole
        },
        Prediction::Batch => Operation {
            body: Some((list(input), true)),
            answers: ok(list(json!({"anyOf": [output, reference("FailedItem")]}))),
            ..whole
        },
        Prediction::Stream => Operation {
            body: Some((input, true)),
            answers: vec![Answer {
                status: 200,
                about: "its events",
                content_type: EVENTS,
                schema: json!({"description": "server-sent events"}),
            }],
            ..whole
        },
        Prediction::Async => Operation {
            body: Some((
                closed(json!({
                    "message": input, "success_queue?": text(), "failure_queue?": text(), "meta?": {"type": ["object", "null"]},
                })),
                true,
            )),
            answers: ok(closed(json!({"job_id": text()}))),
            errors: &[400, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504],
            headers: &[Header::Timeout, Header::IdempotencyKey],
            ..whole
        },
        Prediction::Infer | Prediction::Task(_) => Operation {
            body: Some((reference("InferRequest"), true)),
            other_body: Some(OCTETS),
            examples: models
                .iter()
                .filter_map(|model| Some((model.name.clone(), model.infer_example.clone()?)))
                .collect(),
            answers: vec![
                answer(
                    200,
                    "the answer; its elements stand behind it as bytes where that was asked for",
                    reference("InferResponse"),
                ),
                Answer {
                    status: 200,
                    about: "",
                    content_type: OCTETS,
                    schema: json!({"type": "string", "format": "binary"}),
                },
            ],
            errors: OF_PROTOCOLS,
            ..whole
        },
    }
}

/// One of these models' names.
pub(super) fn name_of<'m>(models: impl Iterator<Item = &'m DescribedModel>) -> Value {
    let names: Vec<&str> = models.map(|model| model.name.as_str()).collect();
    if names.is_empty() { text() } else { word(&names) }
}

fn of_task(task: Task, models: &[DescribedModel]) -> Operation {
    let of_task: Vec<&DescribedModel> = models.iter().filter(|model| model.task == Some(task)).collect();
    let model = name_of(of_task.iter().copied());
    let texts = json!({"anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "maxItems": 2048, "items": {"type": "string"}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": u32::MAX}},
        {"type": "array", "minItems": 1, "maxItems": 2048, "items": {
            "type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": u32::MAX},
        }},
    ]});
    let choices = json!({"anyOf": [{"type": "integer", "minimum": 1, "maximum": 128}, {"type": "null"}]});
    let streams = json!({"type": ["boolean", "null"]});
    let options =
        json!({"type": ["object", "null"], "properties": {"include_usage": {"type": ["boolean", "null"]}}});
    let (body, object_name, choice) = match task {
        Task::Embedding => {
            let format = json!({"enum": ["float", "base64", null]});
            let numbers = json!({"anyOf": [list(json!({"type": "number"})), text()]});
            let data = shape(json!({"object": word(&["embedding"]), "index": count(), "embedding": numbers}));
            let body = shape(json!({"model": model, "input": texts, "encoding_format?": format}));
            let answer = shape(json!({
                "object": word(&["list"]), "data": list(data), "model": text(), "usage?": reference("Usage"),
            }));
            return Operation {
                body: Some((body, true)),
                examples: examples(&of_task, "input", &json!("hello")),
                answers: ok(answer),
                errors: OF_PROTOCOLS,
                headers: &[Header::Timeout],
                ..Operation::default()
            };
        }
        Task::Completion => {
            let body = shape(json!({
                "model": model, "prompt": texts, "n?": choices, "stream?": streams, "stream_options?": options,
            }));
            (body, "text_completion", json!({"text": text()}))
        }
        Task::Chat => {
            let message = json!({"type": "object", "properties": {"role": text(), "content": {}}, "required": ["role"]});
            let messages = json!({"type": "array", "minItems": 1, "items": message});
            let body = shape(json!({
                "model": model, "messages": messages, "n?": choices, "stream?": streams, "stream_options?": options,
            }));
            (body, "chat.completion", json!({"message": {"type": "object"}}))
        }
    };
    let mut members = json!({"index": count(), "finish_reason": text(), "logprobs": {}});
    if let (Value::Object(members), Value::Object(choice)) = (&mut members, choice) {
        members.extend(choice);
    }
    let whole = shape(json!({
        "id": text(), "object": word(&[object_name]), "created": count(), "model": text(), "choices": list(shape(members)),
        "usage?": reference("Usage"),
    }));
    let said = json!([{"role": "user", "content": "hello"}]);
    Operation {
        body: Some((body, true)),
        examples: if task == Task::Chat {
            examples(&of_task, "messages", &said)
        } else {
            examples(&of_task, "prompt", &json!("hello"))
        },
        answers: vec![
            answer(200, "the text; with `stream`, its chunks as they come", whole),
            Answer {
                status: 200,
                about: "",
                content_type: EVENTS,
                schema: json!({"description": "server-sent events"}),
            },
        ],
        errors: OF_PROTOCOLS,
        headers: &[Header::Timeout],
        ..Operation::default()
    }
}

fn examples(models: &[&DescribedModel], member: &str, value: &Value) -> Vec<(String, Value)> {
    models.iter().map(|model| (model.name.clone(), json!({"model": model.name, member: value}))).collect()
}

fn of_v2(call: V2Call, posts: bool) -> Option<Operation> {
    let simple = |schema: Value, errors: &'static [u16]| Operation {
        answers: ok(schema),
        errors,
        ..Operation::default()
    };
    let ready = |members: Value| {
        vec![
            answer(200, "it is", shape(members.clone())),
            answer(503, "it isn't", json!({"anyOf": [shape(members), reference("V2Problem")]})),
        ]
    };
    let statistics = || shape(json!({"model_stats": list(reference("ModelStatistics"))}));
    let empty = || json!({"type": "object", "maxProperties": 0});
    Some(match call {
        V2Call::Server => {
            simple(shape(json!({"name": text(), "version": text(), "extensions": list(text())})), &[429, 503])
        }
        V2Call::Live => simple(shape(json!({"live": truth()})), &[]),
        V2Call::Ready => Operation { answers: ready(json!({"ready": truth()})), ..Operation::default() },
        V2Call::Models => simple(shape(json!({"models": list(text())})), &[429, 503]),
        V2Call::Model => simple(reference("ModelMetadata"), OF_MODELS),
        V2Call::ModelReady => Operation {
            answers: ready(json!({"name": text(), "ready": truth()})),
            errors: &[404, 429],
            ..Operation::default()
        },
        V2Call::ModelConfig => simple(
            shape(json!({
                "name": text(), "platform": text(), "max_batch_size": count(), "input": list(map(json!({}))),
                "output": list(map(json!({}))),
            })),
            OF_MODELS,
        ),
        V2Call::ModelStatistics => simple(statistics(), OF_MODELS),
        V2Call::Statistics => simple(statistics(), &[429, 503]),
        V2Call::Index => Operation {
            body: Some((shape(json!({"ready?": truth()})), false)),
            answers: ok(list(shape(
                json!({"name": text(), "version": text(), "state": text(), "reason": text()}),
            ))),
            errors: OF_SMALL_BODIES,
            ..Operation::default()
        },
        V2Call::Load | V2Call::Unload => Operation {
            body: Some((shape(json!({"parameters?": {"type": "object"}})), false)),
            answers: ok(empty()),
            errors: &[400, 404, 408, 409, 413, 415, 429, 501, 503],
            ..Operation::default()
        },
        V2Call::Trace | V2Call::ModelTrace if !posts => simple(reference("TraceSettings"), OF_MODELS),
        V2Call::Trace => Operation {
            body: Some((
                closed(json!({
                    "trace_level?": {"type": ["array", "null"], "items": word(&["OFF", "TIMESTAMPS"])}, "trace_rate?": {"type": ["string", "null"]},
                })),
                false,
            )),
            answers: ok(reference("TraceSettings")),
            errors: &[400, 408, 413, 415, 429, 501, 503],
            ..Operation::default()
        },
        V2Call::Log if !posts => simple(reference("LogSettings"), &[429, 503]),
        V2Call::Log => Operation {
            body: Some((
                closed(json!({
                    "log_info?": truth(), "log_warning?": truth(), "log_error?": truth(), "log_verbose_level?": count(),
                    "log_file?": {"enum": ["", null]}, "log_format?": {"enum": ["default", null]},
                })),
                false,
            )),
            answers: ok(reference("LogSettings")),
            errors: &[400, 408, 413, 415, 429, 501, 503],
            ..Operation::default()
        },
        V2Call::ModelTrace => Operation { errors: &[404, 429, 501, 503], ..Operation::default() },
        // Whoever asks is told that there is none.
        V2Call::SystemSharedMemory | V2Call::CudaSharedMemory => return None,
    })
}
