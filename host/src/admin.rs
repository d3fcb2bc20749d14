//! What operators and supervisors ask: health, metrics, the models and where they stand. It changes nothing.

use std::{collections::BTreeMap, sync::Arc};

use hyper::{
    StatusCode,
    header::{HeaderValue, RETRY_AFTER},
};
use modalkit_device::Devices;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    access::{Access, Sight},
    admission::Gate,
    config::ModelSpec,
    dispatch::{self, Models},
    egress::{HttpResponse, object_response, text_response},
    jobs::Jobs,
    pipeline::{Generation, Model, Status},
    reconfigure,
    reload::Report,
    telemetry::{METRICS_CONTENT_TYPE, Metrics},
};

/// `GET /health`: the process answers, and how its models are.
#[must_use]
pub fn health(models: &Models, sight: Sight) -> HttpResponse {
    let all = models.all();
    let healthy = all.values().all(|model| is_ready(model));
    let status = if healthy { "ok" } else { "degraded" };
    if sight == Sight::Status {
        return object_response(StatusCode::OK, &json!({"status": status}));
    }
    let reasons = sight == Sight::Reasons;
    let models: BTreeMap<&String, Value> =
        all.iter().map(|(name, model)| (name, shown(model, reasons))).collect();
    object_response(StatusCode::OK, &json!({"status": status, "models": models}))
}

/// `GET /livez`: the process answers.
#[must_use]
pub fn live() -> HttpResponse {
    object_response(StatusCode::OK, &json!({"live": true}))
}

/// `GET /readyz`: the volumes have been looked through, every model serves, new requests are taken, no device is lost, and no broker
/// refuses this host. One that is away is told of and no reason to send callers elsewhere: results wait in the journal.
#[must_use]
pub fn ready(
    models: &Models,
    gate: &Gate,
    access: &Access,
    jobs: &Jobs,
    devices: &Devices,
    sight: Sight,
) -> HttpResponse {
    let reasons = sight == Sight::Reasons;
    let all = models.all();
    let waiting: BTreeMap<&String, Value> = all
        .iter()
        .filter(|(_, model)| !is_ready(model))
        .map(|(name, model)| (name, shown(model, reasons)))
        .collect();
    let keys = access.missing();
    let faults = jobs.queues().faults();
    let journal = jobs.failing();
    let denied = faults.values().any(|fault| fault.denied);
    let lost = devices.lost().borrow().clone();
    let queues = if reasons { json!(faults) } else { json!(faults.keys().collect::<Vec<_>>()) };
    if waiting.is_empty()
        && keys.is_empty()
        && models.are_complete()
        && !gate.is_closed()
        && !denied
        && lost.is_none()
    {
        let mut body = json!({"ready": true});
        if sight == Sight::Status {
            return object_response(StatusCode::OK, &body);
        }
        if !faults.is_empty() {
            body["queues_not_usable"] = queues;
        }
        if let Some(why) = journal {
            // Other requests are served as before.
            body["journal_not_writable"] = if reasons { json!(*why) } else { json!(true) };
        }
        return object_response(StatusCode::OK, &body);
    }
    let looking = !models.are_complete();
    let keys = if reasons { json!(keys) } else { json!(keys.len()) };
    let whole = json!({"ready": false, "looking_through_volumes": looking, "shutting_down": gate.is_closed(), "not_ready": waiting, "keys_missing": keys, "queues_not_usable": queues, "journal_not_writable": journal.is_some(), "device_lost": if reasons { json!(lost) } else { json!(lost.is_some()) }});
    let body = if sight == Sight::Status { json!({"ready": false}) } else { whole };
    let mut response = object_response(StatusCode::SERVICE_UNAVAILABLE, &body);
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(dispatch::RETRY_AFTER.as_secs()));
    response
}

/// `GET /config`: every setting with its value and where that comes from, and what became of the last change. Secrets are hidden.
#[must_use]
pub fn config(now: &reconfigure::Now) -> HttpResponse {
    let rows: Vec<Value> = now
        .loaded
        .rows()
        .into_iter()
        .map(|row| json!({"key": row.key, "value": row.value, "from": row.at}))
        .collect();
    let body = json!({
        "app_name": now.loaded.config.app_name, "settings": rows, "warnings": now.loaded.warnings, "last_change": now.last,
    });
    object_response(StatusCode::OK, &body)
}

/// `GET /devices`: the GPUs, how each stands and who holds it.
#[must_use]
pub fn devices(devices: &Devices) -> HttpResponse {
    let body = json!({"devices": devices.standing(), "why_none": devices.why_none()});
    object_response(StatusCode::OK, &body)
}

/// `GET /metrics`.
#[must_use]
pub fn metrics(metrics: &Metrics, devices: &Devices) -> HttpResponse {
    devices.standing().iter().for_each(|standing| metrics.devices.set(standing));
    text_response(METRICS_CONTENT_TYPE, metrics.render())
}

#[derive(Serialize)]
struct ModelReport<'a> {
    name: &'a str,
    #[serde(flatten)]
    status: &'a Status,
    configured: bool,
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
    spec: Arc<ModelSpec>,
    status: Arc<Status>,
    serving: Option<Arc<Generation>>,
}

impl<'a> Seen<'a> {
    fn of(model: &'a Arc<Model>) -> Self {
        Self { model, spec: model.spec(), status: model.status(), serving: model.serving().ok() }
    }

    fn report(&self) -> ModelReport<'_> {
        let Self { model, spec, status, serving } = self;
        ModelReport {
            name: &model.name,
            status,
            configured: spec.configured,
            plugin: &spec.plugin,
            replicas: model.metrics.replicas.get(),
            replicas_stuck: model.metrics.replicas_stuck.get(),
            queued: model.metrics.queued.get(),
            max_batch_size: spec.batch.max_batch_size,
            wait_ms: spec.batch.wait.as_millis(),
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

/// Where a model stands, and whether it has an entry in the configuration; for those who may not look inside, without the reason.
fn shown(model: &Model, reasons: bool) -> Value {
    let mut whole = json!(*model.status());
    if let Some(members) = whole.as_object_mut().filter(|_| !reasons) {
        members.retain(|key, _| key == "state");
    }
    whole["configured"] = json!(model.spec().configured);
    whole
}

fn is_ready(model: &Model) -> bool {
    *model.status() == Status::Ready
}
