//! What the paths of the Open Inference Protocol beside inference take and give.

use serde_json::{Value, json};

use super::{Operation, answer, ok, simple};
use crate::ingress::{
    endpoints::V2Call,
    openapi::{
        plugin_schema::reference,
        shapes::{closed, count, list, map, shape, text, truth, word},
    },
};

const OF_MODELS: &[u16] = &[404, 429, 503];
/// What may go wrong where a small body is read.
const OF_SETTINGS: &[u16] = &[400, 408, 413, 415, 429, 503];
const OF_LOADING: &[u16] = &[400, 404, 408, 409, 413, 415, 429, 501, 503];
const OF_UNLOADING: &[u16] = &[400, 404, 408, 409, 413, 415, 429, 503];

/// Of the protocol's paths beside inference.
pub(super) fn of(call: V2Call, posts: bool) -> Option<Operation> {
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
            errors: OF_SETTINGS,
            ..Operation::default()
        },
        V2Call::Load | V2Call::Unload => Operation {
            body: Some((shape(json!({"parameters?": {"type": "object"}})), false)),
            answers: ok(empty()),
            errors: if call == V2Call::Load { OF_LOADING } else { OF_UNLOADING },
            ..Operation::default()
        },
        V2Call::Trace if !posts => simple(reference("TraceSettings"), &[429, 503]),
        V2Call::ModelTrace if !posts => simple(reference("TraceSettings"), OF_MODELS),
        V2Call::Trace => Operation {
            body: Some((
                closed(json!({
                    "trace_level?": {"type": ["array", "null"], "items": word(&["OFF", "TIMESTAMPS"])},
                    "trace_rate?": {"type": ["string", "null"]}, "trace_count?": {"enum": ["-1", null]},
                    "log_frequency?": {"enum": ["0", null]}, "trace_file?": {"enum": ["", null]},
                    "trace_mode?": {"type": ["string", "null"]},
                })),
                false,
            )),
            answers: ok(reference("TraceSettings")),
            errors: OF_SETTINGS,
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
            errors: OF_SETTINGS,
            ..Operation::default()
        },
        V2Call::ModelTrace => {
            Operation { errors: &[400, 408, 413, 415, 429, 501, 503], ..Operation::default() }
        }
        // Whoever asks is told that there is none.
        V2Call::SystemSharedMemory | V2Call::CudaSharedMemory => return None,
    })
}
