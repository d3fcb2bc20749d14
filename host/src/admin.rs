//! What operators and supervisors ask: health, metrics, the models and where they stand. It changes nothing.

use std::{collections::BTreeMap, sync::Arc};

use hyper::{
    StatusCode,
    header::{HeaderValue, RETRY_AFTER},
};
use serde::Serialize;
use serde_json::json;

use crate::{
    admission::Gate,
    dispatch::{self, Models},
    egress::{HttpResponse, object_response, text_response},
    pipeline::{Generation, Model, Status},
    reload::Report,
    telemetry::{METRICS_CONTENT_TYPE, Metrics},
};

/// `GET /health`: the process answers, and how its models are.
#[must_use]
pub fn health(models: &Models) -> HttpResponse {
    let all = models.all();
    let healthy = all.values().all(|model| is_ready(model));
    let models: BTreeMap<&String, Arc<Status>> =
        all.iter().map(|(name, model)| (name, model.status())).collect();
    let status = if healthy { "ok" } else { "degraded" };
    object_response(StatusCode::OK, &json!({"status": status, "models": models}))
}

/// `GET /livez`: the process answers.
#[must_use]
pub fn live() -> HttpResponse {
    object_response(StatusCode::OK, &json!({"live": true}))
}

/// `GET /readyz`: the volumes have been looked through, every model serves and new requests are taken.
#[must_use]
pub fn ready(models: &Models, gate: &Gate) -> HttpResponse {
    let all = models.all();
    let waiting: BTreeMap<&String, Arc<Status>> = all
        .iter()
        .filter(|(_, model)| !is_ready(model))
        .map(|(name, model)| (name, model.status()))
        .collect();
    if waiting.is_empty() && models.are_complete() && !gate.is_closed() {
        return object_response(StatusCode::OK, &json!({"ready": true}));
    }
    let looking = !models.are_complete();
    let body = json!({"ready": false, "looking_through_volumes": looking, "shutting_down": gate.is_closed(), "not_ready": waiting});
    let mut response = object_response(StatusCode::SERVICE_UNAVAILABLE, &body);
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(dispatch::RETRY_AFTER.as_secs()));
    response
}

/// `GET /metrics`.
#[must_use]
pub fn metrics(metrics: &Metrics) -> HttpResponse {
    text_response(METRICS_CONTENT_TYPE, metrics.render())
}

#[derive(Serialize)]
struct ModelReport<'a> {
    name: &'a str,
    #[serde(flatten)]
    status: &'a Status,
    plugin: &'a str,
    replicas: i64,
    replicas_stuck: i64,
    queued: i64,
    max_batch_size: usize,
    wait_ms: u128,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<GenerationReport<'a>>,
}

#[derive(Serialize)]
struct GenerationReport<'a> {
    number: u64,
    plugin_name: &'a str,
    plugin_version: &'a str,
    plugin_sha256: &'a str,
    sdk_version: &'a str,
    rustc_version: &'a str,
}

/// `GET /models`.
#[must_use]
pub fn models(models: &Models) -> HttpResponse {
    let all = models.all();
    let seen: Vec<_> = all.values().map(Seen::of).collect();
    let reports: Vec<ModelReport<'_>> = seen.iter().map(Seen::report).collect();
    object_response(StatusCode::OK, &json!({"models": reports}))
}

/// `GET /models/{name}`: the same of one model, and how its reloads stand.
#[must_use]
pub fn model(models: &Models, name: &str, reloads: &Report) -> HttpResponse {
    let model = models.all().get(name).cloned();
    let seen = model.as_ref().map(Seen::of);
    let whole = WholeReport { model: seen.as_ref().map(Seen::report), reloads };
    object_response(StatusCode::OK, &whole)
}

#[derive(Serialize)]
struct WholeReport<'a> {
    #[serde(flatten)]
    model: Option<ModelReport<'a>>,
    #[serde(flatten)]
    reloads: &'a Report,
}

/// A model, and what was seen of it at one moment.
struct Seen<'a> {
    model: &'a Model,
    status: Arc<Status>,
    serving: Option<Arc<Generation>>,
}

impl<'a> Seen<'a> {
    fn of(model: &'a Arc<Model>) -> Self {
        Self { model, status: model.status(), serving: model.serving().ok() }
    }

    fn report(&self) -> ModelReport<'_> {
        let Self { model, status, serving } = self;
        ModelReport {
            name: &model.spec.name,
            status,
            plugin: &model.spec.plugin,
            replicas: model.metrics.replicas.get(),
            replicas_stuck: model.metrics.replicas_stuck.get(),
            queued: model.metrics.queued.get(),
            max_batch_size: model.spec.batch.max_batch_size,
            wait_ms: model.spec.batch.wait.as_millis(),
            generation: serving.as_ref().map(|generation| GenerationReport {
                number: generation.number,
                plugin_name: generation.plugin.name(),
                plugin_version: generation.plugin.version(),
                plugin_sha256: generation.plugin.sha256(),
                sdk_version: generation.plugin.sdk(),
                rustc_version: generation.plugin.rustc(),
            }),
        }
    }
}

fn is_ready(model: &Model) -> bool {
    *model.status() == Status::Ready
}
