//! What the paths that run pipelines take and give: as plain inputs, as tensors, and as OpenAI's clients ask.

use serde_json::{Value, json};

use super::{Answer, Header, Operation, answer, ok};
use crate::{
    config::Task,
    ingress::{
        endpoints::Prediction,
        openapi::{
            Described, DescribedModel,
            plugin_schema::reference,
            shapes::{closed, count, list, shape, text, word},
        },
    },
};

const EVENTS: &str = "text/event-stream";
const OCTETS: &str = "application/octet-stream";
/// What may go wrong with a request that runs a pipeline.
const OF_PREDICTIONS: &[u16] = &[400, 404, 408, 413, 415, 422, 429, 500, 503, 504];
/// The same where a protocol has no 422.
const OF_PROTOCOLS: &[u16] = &[400, 404, 408, 413, 415, 429, 500, 503, 504];

/// What a model's input, or answer, may be: one of those there are.
fn any_of(models: &[DescribedModel], which: fn(&DescribedModel) -> &Value) -> Value {
    match models {
        [] => json!({}),
        [only] => which(only).clone(),
        several => json!({"anyOf": several.iter().map(which).collect::<Vec<_>>()}),
    }
}

/// Of paths that take what a model takes.
pub(super) fn of_prediction(prediction: Prediction, models: &[DescribedModel]) -> Operation {
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
            headers: &[Header::Timeout, Header::JsonBytes],
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
        },
    }
}

/// Of paths that take what OpenAI's clients ask of a task.
pub(super) fn of_task(task: Task, described: &Described) -> Operation {
    let of_task: Vec<&DescribedModel> =
        described.models.iter().filter(|model| model.task == Some(task)).collect();
    let model = described.name_of(|known| known == Some(task));
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
