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
    access::{Access, Visibility},
    buckets::Buckets,
    config::{BatchWait, ModelSpec},
    egress::{HttpResponse, RETRY_AFTER_TIME, object_response, text_response},
    insight::metrics::{METRICS_CONTENT_TYPE, Metrics},
    jobs::Jobs,
    models::Models,
    pipeline::{Generation, Model, Status},
    reconfigure,
    reload::Report,
    work::Gate,
};

/// `GET /health`: the process answers, and how its models are.
#[must_use]
pub fn health(models: &Models, buckets: &Buckets, visibility: Visibility) -> HttpResponse {
    let all = models.all();
    let healthy = all.values().all(|model| is_ready(model)) && buckets.are_current();
    let status = if healthy { "ok" } else { "degraded" };
    if visibility == Visibility::Status {
        return object_response(StatusCode::OK, &json!({"status": status}));
    }
    let reasons = visibility == Visibility::Reasons;
    let models: BTreeMap<&String, Value> =
        all.iter().map(|(name, model)| (name, shown(model, reasons))).collect();
    let mut body = json!({"status": status, "models": models});
    let buckets = buckets.shown(reasons);
    if !buckets.is_empty() {
        body["buckets"] = json!(buckets);
    }
    object_response(StatusCode::OK, &body)
}

/// `GET /livez`: the process answers.
#[must_use]
pub fn live() -> HttpResponse {
    object_response(StatusCode::OK, &json!({"live": true}))
}

/// What `/readyz` looks at.
pub struct Readiness<'a> {
    /// The models.
    pub models: &'a Models,
    /// Whether requests are let in.
    pub gate: &'a Gate,
    /// Whether all keys are there.
    pub access: &'a Access,
    /// The journal and the queues.
    pub jobs: &'a Jobs,
    /// Whether a device is lost.
    pub devices: &'a Devices,
}

impl Readiness<'_> {
    /// Whether the host takes requests, as [`Readiness::of_host`] tells it.
    #[must_use]
    pub fn is_host_ready(&self) -> bool {
        let all = self.models.all();
        let none_serves = !all.is_empty() && !all.values().any(|model| is_ready(model));
        let one_is_required = all.values().any(|model| model.spec().required && !is_ready(model));
        self.models.have_settled() && !none_serves && !one_is_required && self.takes_requests()
    }

    /// Whether new requests for a model are taken.
    #[must_use]
    pub fn is_model_ready(&self, model: &Model) -> bool {
        is_ready(model) && self.takes_requests()
    }

    fn takes_requests(&self) -> bool {
        let lost = self.devices.lost().borrow().is_some();
        self.access.missing().is_empty() && !self.gate.is_leaving() && !lost
    }

    /// `GET /readyz`: the volumes have been scanned and what lay in them has been loaded or refused, every required model serves
    /// and at least one does where there are any, new requests are taken, and no device is lost. A model that isn't required, a broker
    /// that is away or refuses this host, and a journal that can't be written are told of, and no reason to send all callers elsewhere.
    #[must_use]
    pub fn of_host(&self, visibility: Visibility) -> HttpResponse {
        let Self { models, gate, access, jobs, devices } = self;
        let reasons = visibility == Visibility::Reasons;
        let all = models.all();
        let waiting: BTreeMap<&String, Value> = all
            .iter()
            .filter(|(_, model)| !is_ready(model))
            .map(|(name, model)| (name, shown(model, reasons)))
            .collect();
        let keys = access.missing();
        let faults = jobs.queues().faults();
        let journal = jobs.failing();
        let lost = devices.lost().borrow().clone();
        let ready = self.is_host_ready();
        let mut body = json!({"ready": ready});
        if visibility != Visibility::Status {
            let mut tell = |name: &str, value: Value, is_news: bool| {
                if is_news || !ready {
                    body[name] = value;
                }
            };
            tell("looking_through_volumes", json!(!models.are_complete()), false);
            tell("shutting_down", json!(gate.is_leaving()), false);
            tell("not_ready", json!(waiting), !waiting.is_empty());
            tell("keys_missing", if reasons { json!(keys) } else { json!(keys.len()) }, false);
            let queues = if reasons { json!(faults) } else { json!(faults.keys().collect::<Vec<_>>()) };
            tell("queues_not_usable", queues, !faults.is_empty());
            let why = journal.as_deref().filter(|_| reasons);
            let journal = why.map_or(json!(journal.is_some()), |why| json!(why));
            tell("journal_not_writable", journal.clone(), journal != json!(false));
            tell("device_lost", if reasons { json!(lost) } else { json!(lost.is_some()) }, false);
        }
        ready_or_not(ready, &body)
    }

    /// `GET /readyz?model=NAME`: new requests for this model are taken.
    #[must_use]
    pub fn of_model(&self, name: &str, visibility: Visibility) -> HttpResponse {
        let all = self.models.all();
        let Some(model) = all.get(name) else {
            let known: Vec<&String> = all.keys().collect();
            let detail = format!("no model named {name:?}; expected one of {known:?}");
            return object_response(StatusCode::NOT_FOUND, &json!({"detail": detail}));
        };
        let ready = self.is_model_ready(model);
        let mut body = shown(model, visibility == Visibility::Reasons);
        body["ready"] = json!(ready);
        body["shutting_down"] = json!(self.gate.is_leaving());
        ready_or_not(ready, &body)
    }
}

fn ready_or_not(ready: bool, body: &Value) -> HttpResponse {
    if ready {
        return object_response(StatusCode::OK, body);
    }
    let mut response = object_response(StatusCode::SERVICE_UNAVAILABLE, body);
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(RETRY_AFTER_TIME.as_secs()));
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
pub fn metrics(metrics: &Metrics, devices: &Devices, buckets: &Buckets) -> HttpResponse {
    buckets.measure(metrics);
    devices.standing().iter().for_each(|standing| metrics.devices.set(standing));
    text_response(METRICS_CONTENT_TYPE, metrics.render())
}

#[derive(Serialize)]
struct ModelReport<'a> {
    name: &'a str,
    #[serde(flatten)]
    status: &'a Status,
    configured: bool,
    required: bool,
    plugin: &'a str,
    replicas: i64,
    replicas_stuck: i64,
    queued: i64,
    max_batch_size: usize,
    max_batch_cost: Option<u64>,
    /// A number, or "adaptive".
    wait_ms: Value,
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
    let snapshot: Vec<_> = all.values().map(ModelSnapshot::of).collect();
    let reports: Vec<ModelReport<'_>> = snapshot.iter().map(ModelSnapshot::report).collect();
    object_response(StatusCode::OK, &json!({"models": reports}))
}

/// `GET /models/{name}`: the same of one model, and how its reloads stand.
#[must_use]
pub fn model(models: &Models, name: &str, reloads: &Report) -> HttpResponse {
    let model = models.all().get(name).cloned();
    let snapshot = model.as_ref().map(ModelSnapshot::of);
    let whole = WholeReport { model: snapshot.as_ref().map(ModelSnapshot::report), reloads };
    object_response(StatusCode::OK, &whole)
}

#[derive(Serialize)]
struct WholeReport<'a> {
    #[serde(flatten)]
    model: Option<ModelReport<'a>>,
    #[serde(flatten)]
    reloads: &'a Report,
}

/// A model, and its state at one moment.
struct ModelSnapshot<'a> {
    model: &'a Model,
    spec: Arc<ModelSpec>,
    status: Arc<Status>,
    serving: Option<Arc<Generation>>,
}

impl<'a> ModelSnapshot<'a> {
    fn of(model: &'a Arc<Model>) -> Self {
        Self { model, spec: model.spec(), status: model.status(), serving: model.serving().ok() }
    }

    fn report(&self) -> ModelReport<'_> {
        let Self { model, spec, status, serving } = self;
        ModelReport {
            name: &model.name,
            status,
            configured: spec.configured,
            required: spec.required,
            plugin: &spec.plugin,
            replicas: model.metrics.replicas.get(),
            replicas_stuck: model.metrics.replicas_stuck.get(),
            queued: model.metrics.queued.get(),
            max_batch_size: spec.batch.max_batch_size,
            max_batch_cost: spec.batch.max_batch_cost,
            wait_ms: match spec.batch.wait {
                BatchWait::Fixed(wait) => json!(wait.as_millis()),
                BatchWait::Adaptive => json!("adaptive"),
            },
            generation: serving.as_ref().map(|generation| GenerationReport {
                number: generation.number,
                plugin_name: &generation.plugin.description().name,
                plugin_version: &generation.plugin.description().version,
                plugin_sha256: generation.plugin.description().sha256(),
                sdk_version: &generation.plugin.description().sdk,
                rustc_version: &generation.plugin.description().rustc,
            }),
        }
    }
}

/// Where a model stands, and whether it has an entry in the configuration and is required; for those who may not look inside, without the reason.
fn shown(model: &Model, reasons: bool) -> Value {
    let mut whole = json!(*model.status());
    if let Some(members) = whole.as_object_mut().filter(|_| !reasons) {
        members.retain(|key, _| key == "state");
    }
    let spec = model.spec();
    whole["configured"] = json!(spec.configured);
    whole["required"] = json!(spec.required);
    whole
}

fn is_ready(model: &Model) -> bool {
    *model.status() == Status::Ready
}
