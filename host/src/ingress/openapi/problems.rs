//! What goes wrong, in the form of its path. It never knows why it does.

use serde_json::{Value, json};

use super::{operations::JSON, plugin_schema::reference};
use crate::ingress::endpoints::{Endpoint, V1, V2};

/// The answer with such a status; 304 goes with them, which has no body either way.
pub(super) fn problem(endpoint: &Endpoint, status: u16) -> Value {
    let about = match status {
        304 => "it is as it was (`if-none-match`)",
        400 => "it isn't what this path takes",
        401 => "no key, or a wrong one",
        403 => "a key that may not, or a page of another site",
        404 => "no such thing",
        408 => "it didn't come in time",
        409 => "it doesn't fit what there is",
        413 => "too large",
        415 => "no known content-encoding",
        422 => "it isn't what the pipeline takes: each detail says where and what",
        429 => "busy, or more than the key may ask",
        500 => "the pipeline, or the host, failed",
        501 => "this host doesn't have that",
        502 => "the bucket can't be mirrored",
        503 => "it doesn't serve now",
        504 => "the deadline has passed",
        _ => "an error",
    };
    if status == 304 {
        return json!({ "description": about });
    }
    let form = match endpoint.pattern {
        pattern if pattern.starts_with(V2) => "V2Problem",
        pattern if pattern.starts_with(V1) => "OpenAIProblem",
        _ => "Problem",
    };
    let mut response = json!({"description": about, "content": {JSON: {"schema": reference(form)}}});
    if matches!(status, 429 | 503) {
        response["headers"] =
            json!({"retry-after": {"schema": {"type": "integer", "minimum": 0}, "description": "seconds"}});
    }
    response
}
