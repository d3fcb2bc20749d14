//! JSON Schemas of what this host itself takes and gives, beside what models do. It never knows paths.

use modalkit_journal::{Delivery, State};
use serde_json::{Map, Value, json};

use super::plugin_schema::{Components, reference};

/// An object with these members; a name that ends with `?` may be left out.
pub(super) fn shape(members: Value) -> Value {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    if let Value::Object(members) = members {
        for (name, schema) in members {
            let plain = name.trim_end_matches('?');
            if plain == name {
                required.push(json!(plain));
            }
            properties.insert(plain.to_owned(), schema);
        }
    }
    json!({"type": "object", "properties": properties, "required": required})
}

/// The same, and nothing else in it.
pub(super) fn closed(members: Value) -> Value {
    let mut whole = shape(members);
    whole["additionalProperties"] = json!(false);
    whole
}

pub(super) fn text() -> Value {
    json!({"type": "string"})
}

pub(super) fn count() -> Value {
    json!({"type": "integer", "minimum": 0})
}

pub(super) fn truth() -> Value {
    json!({"type": "boolean"})
}

pub(super) fn word(words: &[&str]) -> Value {
    json!({"type": "string", "enum": words})
}

pub(super) fn list(of: Value) -> Value {
    json!({"type": "array", "items": of})
}

pub(super) fn map(of: Value) -> Value {
    json!({"type": "object", "additionalProperties": of})
}

fn or_null(schema: Value) -> Value {
    json!({"anyOf": [schema, {"type": "null"}]})
}

const STATES: [&str; 7] = ["waiting", "loading", "ready", "failed", "stuck", "removed", "stopping"];
const DATATYPES: [&str; 14] = [
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32",
    "FP64", "BYTES",
];

/// Where a job stands. That it runs isn't written.
pub(super) fn job_state() -> Value {
    let written = State::ALL.map(State::word);
    word(&[&written[..], &["running"]].concat())
}

pub(super) fn delivery() -> Value {
    word(&Delivery::ALL.map(Delivery::word))
}

/// All of them that have a name.
pub(super) fn components() -> Components {
    let detail = shape(json!({
        "loc": list(json!({"type": ["string", "integer"]})), "msg": text(), "type": text(),
    }));
    let duration = || reference("StatisticDuration");
    let tensor = |members: Value| shape(members);
    let shape_of_tensor = || list(json!({"type": "integer"}));
    let of_model = json!({
        "state": word(&STATES), "expected?": text(), "reason?": text(), "configured": truth(), "required": truth(),
    });
    let mut with_name = of_model.clone();
    for (name, schema) in [
        ("name", text()),
        ("plugin", text()),
        ("replicas", count()),
        ("replicas_stuck", count()),
        ("queued", count()),
        ("max_batch_size", count()),
        ("max_batch_cost", or_null(count())),
        ("wait_ms", json!({"anyOf": [count(), {"const": "adaptive"}]})),
        ("generation?", map(json!({}))),
    ] {
        with_name[name] = schema;
    }
    let hook = shape(json!({
        "at_unix_ms": count(), "volume": text(), "changed": list(text()), "errors": list(json!({"type": ["string", "null"]})),
    }));
    let all = [
        ("Problem", shape(json!({"detail": {"anyOf": [text(), list(reference("Detail"))]}}))),
        ("Detail", detail),
        ("V2Problem", shape(json!({"error": text()}))),
        (
            "OpenAIProblem",
            shape(json!({"error": shape(json!({
                "message": text(), "type": text(), "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
            }))})),
        ),
        (
            "FailedItem",
            shape(json!({"status": word(&["error"]), "error": text(), "detail?": list(reference("Detail"))})),
        ),
        (
            "Job",
            shape(json!({
                "job_id": text(), "model": text(), "state": job_state(), "result?": {}, "error?": text(),
                "attempts": count(), "crashes?": count(), "accepted_unix_ms": count(), "started_unix_ms?": count(),
                "finished_unix_ms?": count(), "next_attempt_unix_ms?": count(),
                "delivery": shape(json!({
                    "state": delivery(), "queue?": text(), "attempts?": count(), "error?": text(), "ended_unix_ms?": count(),
                })),
            })),
        ),
        ("ModelStatus", shape(of_model)),
        ("Model", shape(with_name)),
        (
            "Reload",
            shape(json!({
                "at_unix_ms": count(), "cause": text(), "generation?": count(), "plugin_sha256?": text(),
                "outcome": word(&["swapped", "rolled_back", "refused", "superseded", "stopped"]), "reason?": text(),
                "phase?": text(), "phases": map(json!({"type": "number"})),
            })),
        ),
        (
            "VolumeReload",
            shape(json!({
                "volume": text(), "mirrored?": map(count()),
                "models": map(shape(json!({"reload": or_null(reference("Reload")), "hook": or_null(hook)}))),
            })),
        ),
        (
            "Messages",
            shape(json!({
                "length": count(), "messages": list(shape(json!({"job_id": text(), "body": {}}))), "receipt?": text(),
                "lease_seconds?": count(), "acknowledged?": count(),
            })),
        ),
        (
            "Configuration",
            shape(json!({
                "app_name": text(), "settings": list(shape(json!({"key": text(), "value": text(), "from": text()}))),
                "warnings": list(json!({})), "last_change": {"type": ["object", "null"]},
            })),
        ),
        (
            "TensorMetadata",
            tensor(json!({"name": text(), "datatype": word(&DATATYPES), "shape": shape_of_tensor()})),
        ),
        (
            "ModelMetadata",
            shape(json!({
                "name": text(), "versions": list(text()), "platform": text(), "inputs": list(reference("TensorMetadata")),
                "outputs": list(reference("TensorMetadata")),
            })),
        ),
        ("StatisticDuration", shape(json!({"count": count(), "ns": count()}))),
        (
            "ModelStatistics",
            shape(json!({
                "name": text(), "version": text(), "last_inference": count(), "inference_count": count(), "execution_count": count(),
                "inference_stats": shape(json!({
                    "success": duration(), "fail": duration(), "queue": duration(), "compute_input": duration(),
                    "compute_infer": duration(), "compute_output": duration(), "cache_hit": duration(), "cache_miss": duration(),
                })),
                "batch_stats": list(shape(json!({
                    "batch_size": count(), "compute_input": duration(), "compute_infer": duration(), "compute_output": duration(),
                }))),
            })),
        ),
        (
            "InferTensor",
            tensor(json!({
                "name": text(), "shape": shape_of_tensor(), "datatype": word(&DATATYPES), "parameters?": {"type": ["object", "null"]},
                "data?": {"type": ["array", "null"], "items": {}, "description": "elements, nested or flat, in row-major order; left out where they stand behind the JSON"},
            })),
        ),
        (
            "InferRequest",
            shape(json!({
                "id?": {"type": ["string", "null"]}, "parameters?": {"type": ["object", "null"]}, "inputs": list(reference("InferTensor")),
                "outputs?": or_null(list(shape(json!({"name": text(), "parameters?": {"type": ["object", "null"]}})))),
            })),
        ),
        (
            "InferResponse",
            shape(json!({
                "model_name": text(), "model_version": text(), "id?": text(), "parameters?": {"type": "object"},
                "outputs": list(reference("InferTensor")),
            })),
        ),
        (
            "TraceSettings",
            shape(json!({
                "trace_level": list(text()), "trace_rate": text(), "trace_count": text(), "log_frequency": text(), "trace_file": text(),
                "trace_mode": text(),
            })),
        ),
        (
            "LogSettings",
            shape(json!({
                "log_file": text(), "log_info": truth(), "log_warning": truth(), "log_error": truth(), "log_verbose_level": count(),
                "log_format": text(),
            })),
        ),
        (
            "TaskModel",
            shape(json!({
                "id": text(), "object": word(&["model"]), "created": count(), "owned_by": text(),
                "task": word(&["embedding", "completion", "chat"]),
            })),
        ),
        (
            "Usage",
            shape(json!({"prompt_tokens": count(), "completion_tokens?": count(), "total_tokens": count()})),
        ),
    ];
    all.into_iter().map(|(name, schema)| (name.to_owned(), schema)).collect()
}
