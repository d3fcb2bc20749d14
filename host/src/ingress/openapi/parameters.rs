//! Parameters of paths: in the path itself, in the query, in headers. It never knows what an operation does.

use hyper::Method;
use serde_json::{Value, json};

use super::{
    Described,
    operations::Header,
    shapes::{count, delivery, job_state, text, word},
};
use crate::ingress::endpoints::{Endpoint, Route};

/// An id of a job: a UUID of version 7.
const JOB_ID: &str = "^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$";

/// Which of an endpoint's paths it is.
#[derive(Clone, Copy)]
pub(super) enum Variant<'a> {
    Plain,
    /// With a version behind the model's name.
    Versioned,
    /// A model's own, whose component is this.
    OfModel(&'a str),
}

impl Described {
    /// One of the models' names, of those with such a task.
    pub(super) fn name_of(&self, has: impl Fn(Option<crate::config::Task>) -> bool) -> Value {
        let names: Vec<&str> =
            self.known.iter().filter(|(_, task)| has(*task)).map(|(name, _)| name.as_str()).collect();
        if names.is_empty() { text() } else { word(&names) }
    }
}

/// Those of a path and its query.
pub(super) fn of(
    endpoint: &Endpoint,
    method: &Method,
    variant: Variant<'_>,
    described: &Described,
) -> Vec<Value> {
    let mut parameters = Vec::new();
    if endpoint.pattern.contains("{name}") {
        let schema = match endpoint.route {
            Route::TaskModel => described.name_of(|task| task.is_some()),
            Route::Predict(_) | Route::V2(_) | Route::Model => described.name_of(|_| true),
            Route::ReloadModel | Route::RollBack | Route::Unload => described.name_of(|_| true),
            _ => json!({"type": "string", "minLength": 1}),
        };
        parameters.push(in_path("name", &schema, "whose"));
    }
    if endpoint.pattern.contains("{id}") {
        let id = json!({"type": "string", "minLength": 1});
        parameters.push(in_path("id", &id, "as `/predict_async` answered it"));
    }
    if matches!(variant, Variant::Versioned) {
        let version = json!({"type": "string", "pattern": "^[0-9]+$", "examples": ["1"]});
        parameters.push(in_path("version", &version, "the number of the generation that serves"));
    }
    // In the path already.
    let is_in_path = |name: &str| matches!(variant, Variant::OfModel(_)) && name == "model_name";
    let known = endpoint.parameters.iter().filter(|name| !is_in_path(name));
    parameters.extend(known.filter_map(|name| in_query(endpoint.route, method, name, described)));
    parameters
}

fn in_query(route: Route, method: &Method, name: &str, described: &Described) -> Option<Value> {
    let number = |least: u64| json!({"type": "integer", "minimum": least});
    let deletes = method == Method::DELETE;
    let (schema, about) = match name {
        "model_name" => (described.name_of(|_| true), "which model; may be left out where there is one"),
        "model" if route == Route::Ready => (described.name_of(|_| true), "one model, in place of the host"),
        "model" => (text(), "of this model"),
        "partial" => (word(&["true", "false"]), "whether an item that isn't an input fails alone"),
        "state" => (job_state(), "that stand so"),
        "delivery" => (delivery(), "whose results stand so"),
        "after" => (json!({"type": "string", "pattern": JOB_ID}), "`next` of the answer before"),
        "limit" => (number(0), "how many; 1000 at most"),
        "wait_ms" if deletes => return None,
        "wait_ms" => (number(0), "how long the answer may wait for the job's end"),
        "receipt" | "lease_seconds" if !deletes => return None,
        "receipt" => (text(), "acknowledges what was taken before"),
        "lease_seconds" => (number(0), "how long what is taken is the caller's"),
        _ => (text(), ""),
    };
    let required = name == "model_name" && described.known.len() > 1;
    Some(json!({"name": name, "in": "query", "required": required, "schema": schema, "description": about}))
}

fn in_path(name: &str, schema: &Value, about: &str) -> Value {
    json!({"name": name, "in": "path", "required": true, "schema": schema, "description": about})
}

/// A header of a request.
pub(super) fn in_header(header: Header) -> Value {
    let (name, schema, about) = match header {
        Header::Timeout => {
            let mut milliseconds = count();
            milliseconds["minimum"] = json!(1);
            ("x-request-timeout-ms", milliseconds, "milliseconds after which nobody wants the answer: 504")
        }
        Header::IdempotencyKey => {
            let name = json!({"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"});
            ("idempotency-key", name, "the same request under the same name is one job")
        }
        Header::JsonBytes => {
            ("inference-header-content-length", count(), "where bytes follow the JSON: how long the JSON is")
        }
    };
    json!({"name": name, "in": "header", "required": false, "schema": schema, "description": about})
}
