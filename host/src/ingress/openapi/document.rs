//! The OpenAPI document: every path there is, from the list of endpoints, and the models that serve, with their own schemas. It never knows who asks for it.

use hyper::Method;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Map, Value, json};

use super::{
    DescribedModel,
    operations::{self, Header, JSON, Operation, name_of},
    plugin_schema::{Components, component_name, reference},
    shapes::{count, delivery, job_state, text, word},
};
use crate::ingress::endpoints::{Endpoint, OpenTo, Prediction, Route, V1, V2, V2Call, endpoints};

/// What may stand in a path as it is.
const IN_PATHS: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// An id of a job: a UUID of version 7.
const JOB_ID: &str = "^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$";

/// Puts the document together. Where callers show keys, `key_header` names the header that they may be in.
pub(super) fn document(
    models: &[DescribedModel],
    mut components: Components,
    key_header: Option<&str>,
) -> Value {
    components.extend(super::shapes::components());
    let mut paths = Map::new();
    let writer = Writer { models, has_keys: key_header.is_some() };
    for endpoint in endpoints() {
        let methods = writer.methods(endpoint, endpoint.route, models, None);
        if methods.is_empty() {
            continue;
        }
        if endpoint.versioned {
            let versioned = endpoint.pattern.replacen("{name}", "{name}/versions/{version}", 1);
            let methods = writer.methods(endpoint, endpoint.route, models, Some(VERSIONED));
            paths.insert(versioned, methods.into());
        }
        paths.insert(endpoint.pattern.to_owned(), methods.into());
    }
    if let Some(sync) = endpoints().find(|endpoint| endpoint.route == Route::Predict(Prediction::Sync)) {
        for model in models {
            let path = format!("/models/{}/predict", utf8_percent_encode(&model.name, IN_PATHS));
            let alone = std::slice::from_ref(model);
            paths.insert(path, writer.methods(sync, sync.route, alone, Some(&model.component)).into());
        }
    }
    let mut whole = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "modalkit", "version": env!("CARGO_PKG_VERSION"),
            "description": "Machine-learning pipelines over HTTP. Schemas of models are those of the generations that serve now.",
            "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
        },
        "tags": TAGS.map(|(name, description)| json!({"name": name, "description": description})),
        "paths": paths,
        "components": {"schemas": components},
    });
    if let Some(header) = key_header {
        whole["components"]["securitySchemes"] = json!({
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": header},
        });
    }
    whole
}

const TAGS: [(&str, &str); 7] = [
    ("models", "each model by its own path, with its own schemas"),
    ("predictions", "any model, named in the query"),
    ("openai", "as OpenAI's clients ask, of models with a task"),
    ("open-inference", "the Open Inference Protocol, KServe's V2 with Triton's extensions"),
    ("jobs", "asynchronous requests, and queues in memory"),
    ("health", "whether the host serves"),
    ("management", "for keys that manage"),
];
/// What a model's own path does.
const OF_MODEL: &str = "one input in, its output with `status` out";
/// What stands in an operation's id for one that names a version.
const VERSIONED: &str = "of_version";

struct Writer<'a> {
    models: &'a [DescribedModel],
    has_keys: bool,
}

/// Those of a model's own path are its own.
fn tag(endpoint: &Endpoint, is_of_model: bool) -> &'static str {
    match endpoint.route {
        _ if is_of_model => "models",
        _ if endpoint.pattern.starts_with(V2) => "open-inference",
        _ if endpoint.pattern.starts_with(V1) => "openai",
        Route::Predict(_) => "predictions",
        Route::Jobs | Route::Job | Route::Redeliver | Route::Queue | Route::Queues => "jobs",
        Route::Health | Route::Live | Route::Ready | Route::OpenApi => "health",
        _ => "management",
    }
}

impl Writer<'_> {
    /// What each method of a path takes and gives. A path that is a variant of its endpoint's has that in its operations' names.
    fn methods(
        &self,
        endpoint: &Endpoint,
        route: Route,
        models: &[DescribedModel],
        variant: Option<&str>,
    ) -> Map<String, Value> {
        let is_of_model = variant.is_some_and(|variant| variant != VERSIONED);
        let mut methods = Map::new();
        for name in endpoint.methods.split(", ").filter(|name| *name != "HEAD") {
            let Ok(method) = Method::from_bytes(name.as_bytes()) else { continue };
            let Some(operation) = operations::of(route, &method, models) else { continue };
            let mut id = operation_id(endpoint, &method);
            let mut parameters = self.parameters(endpoint, &method, is_of_model, variant == Some(VERSIONED));
            parameters.extend(operation.headers.iter().map(|header| header_parameter(*header)));
            match variant {
                Some(component) if is_of_model => id = format!("predict_{component}"),
                Some(variant) => id = format!("{id}_{variant}"),
                None => {}
            }
            methods
                .insert(name.to_lowercase(), self.written(endpoint, operation, &id, parameters, is_of_model));
        }
        methods
    }

    fn written(
        &self,
        endpoint: &Endpoint,
        operation: Operation,
        id: &str,
        parameters: Vec<Value>,
        is_of_model: bool,
    ) -> Value {
        let Operation { body, other_body, examples, answers, errors, .. } = operation;
        let mut responses = Map::new();
        for answer in answers {
            let response = responses
                .entry(answer.status.to_string())
                .or_insert_with(|| json!({"description": answer.about, "content": {}}));
            response["content"][answer.content_type] = json!({"schema": answer.schema});
        }
        for status in self.errors(endpoint, errors) {
            responses.entry(status.to_string()).or_insert_with(|| problem(endpoint, status));
        }
        let mut whole = json!({
            "operationId": id, "tags": [tag(endpoint, is_of_model)], "summary": id.replace('_', " "),
            "description": if is_of_model { OF_MODEL.to_owned() } else { without_links(endpoint.about) }, "parameters": parameters, "responses": responses,
        });
        if let Some((schema, required)) = body {
            let mut content = json!({"schema": schema});
            if !examples.is_empty() {
                let examples = examples
                    .into_iter()
                    .map(|(name, value)| (component_name(&name), json!({"value": value})));
                content["examples"] = examples.collect::<Map<_, _>>().into();
            }
            whole["requestBody"] = json!({"required": required, "content": {JSON: content}});
            if let Some(other) = other_body {
                whole["requestBody"]["content"][other] =
                    json!({"schema": {"type": "string", "format": "binary"}});
            }
        }
        if self.has_keys && endpoint.open_to != OpenTo::Everybody {
            whole["security"] = json!([{"bearer": []}, {"key": []}]);
        }
        whole
    }

    /// Those of the operation, and those of callers who aren't let in.
    fn errors(&self, endpoint: &Endpoint, of_operation: &[u16]) -> Vec<u16> {
        let of_access: &[u16] = match (endpoint.open_to, self.has_keys) {
            (OpenTo::Everybody, _) => &[],
            (OpenTo::Callers, true) => &[401, 429, 503],
            (OpenTo::Callers, false) => &[],
            (OpenTo::Management, _) => &[401, 403, 429, 503],
        };
        // A page of another site is answered so wherever there are no keys.
        let of_pages: &[u16] = if self.has_keys { &[] } else { &[403] };
        [of_operation, of_access, of_pages].concat()
    }

    fn parameters(
        &self,
        endpoint: &Endpoint,
        method: &Method,
        is_of_model: bool,
        is_versioned: bool,
    ) -> Vec<Value> {
        let mut parameters = Vec::new();
        if endpoint.pattern.contains("{name}") {
            let of_models = matches!(endpoint.route, Route::Predict(_) | Route::V2(_) | Route::Model)
                || matches!(endpoint.route, Route::ReloadModel | Route::RollBack | Route::Unload);
            let schema = match endpoint.route {
                Route::TaskModel => name_of(self.models.iter().filter(|model| model.task.is_some())),
                _ if of_models => name_of(self.models.iter()),
                _ => json!({"type": "string", "minLength": 1}),
            };
            parameters.push(in_path("name", &schema, "whose"));
        }
        if endpoint.pattern.contains("{id}") {
            parameters.push(in_path(
                "id",
                &json!({"type": "string", "minLength": 1}),
                "as `/predict_async` answered it",
            ));
        }
        if is_versioned {
            let version = json!({"type": "string", "pattern": "^[0-9]+$", "examples": ["1"]});
            parameters.push(in_path("version", &version, "the number of the generation that serves"));
        }
        // In the path already.
        let known = endpoint.parameters.iter().filter(|name| !(is_of_model && **name == "model_name"));
        parameters.extend(known.filter_map(|name| self.in_query(endpoint.route, method, name)));
        parameters
    }

    fn in_query(&self, route: Route, method: &Method, name: &str) -> Option<Value> {
        let number = |least: u64| json!({"type": "integer", "minimum": least});
        let deletes = method == Method::DELETE;
        let (schema, about) = match name {
            "model_name" => (name_of(self.models.iter()), "which model; may be left out where there is one"),
            "model" if route == Route::Ready => {
                (name_of(self.models.iter()), "one model, in place of the host")
            }
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
        let required = name == "model_name" && self.models.len() > 1;
        Some(
            json!({"name": name, "in": "query", "required": required, "schema": schema, "description": about}),
        )
    }
}

fn in_path(name: &str, schema: &Value, about: &str) -> Value {
    json!({"name": name, "in": "path", "required": true, "schema": schema, "description": about})
}

fn header_parameter(header: Header) -> Value {
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
    };
    json!({"name": name, "in": "header", "required": false, "schema": schema, "description": about})
}

/// An error's answer, in the form of its path.
fn problem(endpoint: &Endpoint, status: u16) -> Value {
    let about = match status {
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
        500 => "the pipeline failed",
        501 => "this host doesn't have that",
        502 => "the bucket can't be mirrored",
        503 => "it doesn't serve now",
        504 => "the deadline has passed",
        _ => "an error",
    };
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

/// A text without the links of the README, which lead nowhere from here.
fn without_links(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('[')
        && let Some((name, target)) = after.split_once("](")
        && let Some((_, after)) = target.split_once(')')
    {
        plain.push_str(before);
        plain.push_str(name);
        rest = after;
    }
    plain + rest
}

/// A name for generated code.
fn operation_id(endpoint: &Endpoint, method: &Method) -> String {
    let name = match endpoint.route {
        Route::Predict(Prediction::Sync) => "predict_sync",
        Route::Predict(Prediction::Batch) => "predict_batch",
        Route::Predict(Prediction::Stream) => "predict_stream",
        Route::Predict(Prediction::Async) => "predict_async",
        Route::Predict(Prediction::Infer) => "infer",
        Route::Predict(Prediction::Task(task)) => return format!("create_{}", task.name()),
        Route::Jobs => "list_jobs",
        Route::Job if method == Method::DELETE => "cancel_job",
        Route::Job => "get_job",
        Route::Redeliver => "redeliver_job",
        Route::Health => "health",
        Route::Live => "live",
        Route::Ready => "ready",
        Route::Queues => "list_queues",
        Route::Queue if method == Method::DELETE => "take_messages",
        Route::Queue => "list_messages",
        Route::Models => "list_models",
        Route::Model => "get_model",
        Route::ReloadModel => "reload_model",
        Route::RollBack => "roll_back_model",
        Route::Unload => "unload_model",
        Route::ReloadVolume => "reload_volume",
        Route::Devices => "list_devices",
        Route::Metrics => "metrics",
        Route::Config => "get_configuration",
        Route::ReloadConfig => "reload_configuration",
        Route::TaskModels => "list_task_models",
        Route::TaskModel => "get_task_model",
        Route::OpenApi => "openapi",
        Route::Docs => "docs",
        Route::DocsAsset => "docs_asset",
        Route::V2(call) => return format!("v2_{}", v2_name(call, method)),
    };
    name.to_owned()
}

fn v2_name(call: V2Call, method: &Method) -> &'static str {
    let posts = method == Method::POST;
    match call {
        V2Call::Server => "server",
        V2Call::Live => "live",
        V2Call::Ready => "ready",
        V2Call::Models => "models",
        V2Call::Model => "model",
        V2Call::ModelReady => "model_ready",
        V2Call::ModelConfig => "model_config",
        V2Call::ModelStatistics => "model_statistics",
        V2Call::Statistics => "statistics",
        V2Call::Index => "repository_index",
        V2Call::Load => "load_model",
        V2Call::Unload => "unload_model",
        V2Call::Trace if posts => "change_trace_settings",
        V2Call::Trace => "trace_settings",
        V2Call::ModelTrace if posts => "change_model_trace_settings",
        V2Call::ModelTrace => "model_trace_settings",
        V2Call::Log if posts => "change_log_settings",
        V2Call::Log => "log_settings",
        V2Call::SystemSharedMemory => "system_shared_memory",
        V2Call::CudaSharedMemory => "cuda_shared_memory",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_the_readme_are_their_names() {
        assert_eq!(without_links("a ([`b`](c/d.md)): [e](f), g[h] (i)"), "a (`b`): e, g[h] (i)");
        assert!(endpoints().all(|endpoint| !without_links(endpoint.about).contains("](")));
    }
}
