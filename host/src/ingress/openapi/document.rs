//! The OpenAPI document: every path there is, from the list of endpoints, and the models that serve, with their own schemas. It never knows who asks for it.

use hyper::Method;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Map, Value, json};

use super::{
    Described, DescribedModel,
    operations::{self, JSON, Operation},
    parameters::{self, Variant},
    plugin_schema::{Components, component_name},
    problems::problem,
    shapes,
};
use crate::{
    access::AskedFor,
    ingress::endpoints::{Endpoint, OpenTo, Prediction, Route, V1, V2, V2Call, endpoints},
};

/// What may stand in a path as it is.
const IN_PATHS: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Puts the document together.
pub(super) fn document(described: &Described, mut components: Components) -> Value {
    components.extend(shapes::components());
    let mut paths = Map::new();
    let writer = Writer { described, security: security(&described.asked_for) };
    for endpoint in endpoints() {
        let methods = writer.methods(endpoint, &described.models, Variant::Plain);
        if methods.is_empty() {
            continue;
        }
        if endpoint.versioned {
            let versioned = endpoint.pattern.replacen("{name}", "{name}/versions/{version}", 1);
            let methods = writer.methods(endpoint, &described.models, Variant::Versioned);
            paths.insert(versioned, methods.into());
        }
        paths.insert(endpoint.pattern.to_owned(), methods.into());
    }
    // A path with such a step is another one to every client.
    let models = described.models.iter().filter(|model| !matches!(model.name.as_str(), "." | ".."));
    for (model, sync) in models.flat_map(|model| sync().map(move |endpoint| (model, endpoint))) {
        let path = format!("/models/{}/predict", utf8_percent_encode(&model.name, IN_PATHS));
        let alone = std::slice::from_ref(model);
        paths.insert(path, writer.methods(sync, alone, Variant::OfModel(&model.component)).into());
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
    let schemes = schemes(&described.asked_for);
    if !schemes.is_empty() {
        whole["components"]["securitySchemes"] = schemes.into();
    }
    whole
}

fn sync() -> impl Iterator<Item = &'static Endpoint> {
    endpoints().filter(|endpoint| endpoint.route == Route::Predict(Prediction::Sync))
}

/// Where a key stands in any host.
const BEARER: &str = "bearer";
const KEY: &str = "key";
/// The names of schemes for the two headers that may have to be sent, as the page at `/docs` knows them.
const MODAL: [&str; 2] = ["modal_key", "modal_secret"];

/// The ways in which callers show who they are.
fn schemes(asked_for: &AskedFor) -> Map<String, Value> {
    let in_header = |name: &str| json!({"type": "apiKey", "in": "header", "name": name});
    let mut schemes = Map::new();
    if let Some(header) = &asked_for.key_header {
        schemes.insert(BEARER.to_owned(), json!({"type": "http", "scheme": "bearer"}));
        if !header.eq_ignore_ascii_case("authorization") {
            schemes.insert(KEY.to_owned(), in_header(header));
        }
    }
    for (scheme, header) in MODAL.iter().zip(asked_for.modal_headers.iter().flatten()) {
        schemes.insert((*scheme).to_owned(), in_header(header));
    }
    schemes
}

/// What a request must show: one of these, with all that each names.
fn security(asked_for: &AskedFor) -> Vec<Value> {
    let schemes = schemes(asked_for);
    let modal: Vec<(String, Value)> = MODAL
        .iter()
        .filter(|name| schemes.contains_key(**name))
        .map(|name| ((*name).to_owned(), json!([])))
        .collect();
    let with_modal = |key: Option<&str>| -> Value {
        let key = key.map(|key| (key.to_owned(), json!([])));
        key.into_iter().chain(modal.clone()).collect::<Map<_, _>>().into()
    };
    let keys: Vec<Value> = [BEARER, KEY]
        .into_iter()
        .filter(|key| schemes.contains_key(*key))
        .map(|key| with_modal(Some(key)))
        .collect();
    match (keys.is_empty(), modal.is_empty()) {
        (true, true) => Vec::new(),
        (true, false) => vec![with_modal(None)],
        (false, _) => keys,
    }
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

struct Writer<'a> {
    described: &'a Described,
    /// What callers must show, where anything.
    security: Vec<Value>,
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
        models: &[DescribedModel],
        variant: Variant<'_>,
    ) -> Map<String, Value> {
        let mut methods = Map::new();
        for name in endpoint.methods.split(", ").filter(|name| *name != "HEAD") {
            let Ok(method) = Method::from_bytes(name.as_bytes()) else { continue };
            let operation = operations::of(endpoint.route, &method, models, self.described);
            let Some(operation) = operation else { continue };
            let id = match variant {
                Variant::Plain => operation_id(endpoint, &method),
                Variant::Versioned => format!("{}_of_version", operation_id(endpoint, &method)),
                // No route's begins so.
                Variant::OfModel(component) => format!("run_{component}"),
            };
            let mut parameters = parameters::of(endpoint, &method, variant, self.described);
            parameters.extend(operation.headers.iter().map(|header| parameters::in_header(*header)));
            methods.insert(name.to_lowercase(), self.written(endpoint, operation, &id, parameters, variant));
        }
        methods
    }

    fn written(
        &self,
        endpoint: &Endpoint,
        operation: Operation,
        id: &str,
        parameters: Vec<Value>,
        variant: Variant<'_>,
    ) -> Value {
        let is_of_model = matches!(variant, Variant::OfModel(_));
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
                let mut named = Map::new();
                for (number, (name, value)) in examples.into_iter().enumerate() {
                    let plain = component_name(&name);
                    let name = if named.contains_key(&plain) { format!("{plain}_{number}") } else { plain };
                    named.insert(name, json!({ "value": value }));
                }
                content["examples"] = named.into();
            }
            whole["requestBody"] = json!({"required": required, "content": {JSON: content}});
            if let Some(other) = other_body {
                whole["requestBody"]["content"][other] =
                    json!({"schema": {"type": "string", "format": "binary"}});
            }
        }
        let shows_more = matches!(endpoint.route, Route::Health | Route::Ready);
        if !self.security.is_empty() && (shows_more || endpoint.open_to != OpenTo::Everybody) {
            // Who shows nothing is told less.
            let nothing = shows_more.then(|| json!({}));
            whole["security"] = nothing.into_iter().chain(self.security.clone()).collect();
        }
        whole
    }

    /// Those of the operation, and those of callers who aren't let in.
    fn errors(&self, endpoint: &Endpoint, of_operation: &[u16]) -> Vec<u16> {
        let has_keys = !self.security.is_empty();
        let of_access: &[u16] = match (endpoint.open_to, has_keys) {
            (OpenTo::Everybody, _) => &[],
            (OpenTo::Callers, true) => &[401, 429, 503],
            (OpenTo::Callers, false) => &[],
            (OpenTo::Management, _) => &[401, 403, 429, 503],
        };
        // A page of another site is answered so wherever there are no keys.
        let of_pages: &[u16] = if has_keys { &[] } else { &[403] };
        [of_operation, of_access, of_pages].concat()
    }
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
