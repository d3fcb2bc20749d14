//! What the Open Inference Protocol asks beside inference, for HTTP and gRPC alike: the server, models, statistics, the repository, settings. It asks those who
//! know, and never knows how it was asked.

mod rest;
mod settings;

use std::sync::Arc;

use modalkit_engine::Signature;
use modalkit_proto::{
    InferBatchStatistics, InferStatistics, ModelConfig, ModelMetadataResponse, ModelStatistics,
    ServerMetadataResponse, StatisticDuration, repository_index_response::ModelIndex,
};

use super::Context;
use crate::{
    access::Visibility,
    admin::Readiness,
    config::BatchWait,
    egress::{self, Refusal},
    pipeline::{Generation, InferenceTotals, Model, Status, Total},
    protocol::v2::{self, Form, ModelFacts},
    reload::Outcome,
    work::JobError,
};

pub(super) use rest::answer;
pub(super) use settings::{
    LogSettings, TraceSettings, change_log, change_traces, check_fixed, invalid_setting, log_settings,
    trace_settings,
};

/// Where a model stands, in the repository's words.
const READY: &str = "READY";
const LOADING: &str = "LOADING";
const UNAVAILABLE: &str = "UNAVAILABLE";

/// A model that serves.
pub(super) struct Served {
    model: Arc<Model>,
    generation: Arc<Generation>,
    signature: Arc<Signature>,
}

impl Served {
    /// The model of this name, where the generation that serves is of this version.
    pub(super) fn find(context: &Context, name: &str, version: Option<&str>) -> Result<Self, JobError> {
        let model = context.models.find(Some(name))?;
        let generation = model.serving()?;
        generation.check_version(version)?;
        let signature = Arc::clone(Form::of(generation.signature()?).signature());
        Ok(Self { model, generation, signature })
    }

    pub(super) fn metadata(&self) -> ModelMetadataResponse {
        v2::metadata(&self.facts(), &self.signature)
    }

    pub(super) fn config(&self) -> ModelConfig {
        v2::config(&self.facts(), &self.signature)
    }

    fn facts(&self) -> ModelFacts<'_> {
        let spec = self.model.spec();
        let description = self.generation.plugin.description();
        ModelFacts {
            name: &self.model.name,
            version: self.generation.number,
            plugin: &self.generation.spec.plugin,
            batch_max: spec.batch.max_batch_size,
            wait_us: match spec.batch.wait {
                BatchWait::Fixed(wait) => u64::try_from(wait.as_micros()).unwrap_or(u64::MAX),
                BatchWait::Adaptive => 0,
            },
            replicas: self.model.metrics.replicas.get(),
            on_gpu: spec.gpu.is_some(),
            parameters: vec![
                ("plugin_name", description.name.clone()),
                ("plugin_version", description.version.clone()),
                ("plugin_sha256", description.sha256().to_owned()),
                ("input_schema", description.input_schema.clone()),
                ("output_schema", description.output_schema.clone()),
            ],
        }
    }
}

pub(super) fn server(context: &Context) -> ServerMetadataResponse {
    v2::server(context.metrics.traces.is_exporting())
}

/// Whether new requests are taken.
pub(super) fn is_ready(context: &Context) -> bool {
    readiness(context).is_host_ready()
}

/// Whether new requests for a model are taken.
///
/// # Errors
/// There is no such model, or another version of it serves.
pub(super) fn is_model_ready(context: &Context, name: &str, version: Option<&str>) -> Result<bool, JobError> {
    let model = context.models.find(Some(name))?;
    let Ok(generation) = model.serving() else { return Ok(false) };
    generation.check_version(version)?;
    Ok(readiness(context).is_model_ready(&model))
}

fn readiness(context: &Context) -> Readiness<'_> {
    let Context { models, gate, access, jobs, devices, .. } = context;
    Readiness { models, gate, access, jobs, devices }
}

/// What a model has done, or each that serves.
///
/// # Errors
/// There is no such model, it doesn't serve, or another version of it serves.
pub(super) fn statistics(
    context: &Context,
    name: Option<&str>,
    version: Option<&str>,
) -> Result<Vec<ModelStatistics>, JobError> {
    if let Some(name) = name {
        let model = context.models.find(Some(name))?;
        let generation = model.serving()?;
        generation.check_version(version)?;
        return Ok(vec![of_generation(&model.name, &generation)]);
    }
    let all = context.models.all();
    Ok(all.values().filter_map(|model| Some(of_generation(&model.name, &*model.serving().ok()?))).collect())
}

fn of_generation(name: &str, generation: &Generation) -> ModelStatistics {
    let InferenceTotals { last_ms, succeeded, failed, queue, stages, by_size } =
        generation.inference_stats.totals();
    let [input, infer, output] = stages.map(duration);
    let batches: u64 = by_size.values().map(|[stage, ..]| stage.count).sum();
    let of_size = |(size, stages): (usize, [Total; 3])| {
        let [input, infer, output] = stages.map(duration);
        InferBatchStatistics {
            batch_size: size as u64,
            compute_input: input,
            compute_infer: infer,
            compute_output: output,
        }
    };
    ModelStatistics {
        name: name.to_owned(),
        version: generation.number.to_string(),
        last_inference: last_ms,
        inference_count: succeeded.count,
        execution_count: batches,
        inference_stats: Some(InferStatistics {
            success: duration(succeeded),
            fail: duration(failed),
            queue: duration(queue),
            compute_input: input,
            compute_infer: infer,
            compute_output: output,
            cache_hit: duration(Total::default()),
            cache_miss: duration(Total::default()),
        }),
        batch_stats: by_size.into_iter().map(of_size).collect(),
    }
}

fn duration(total: Total) -> Option<StatisticDuration> {
    let ns = u64::try_from(total.time.as_nanos()).unwrap_or(u64::MAX);
    Some(StatisticDuration { count: total.count, ns })
}

/// The models and whether they serve.
pub(super) fn index(context: &Context, only_ready: bool, visibility: Visibility) -> Vec<ModelIndex> {
    let reasons = visibility == Visibility::Reasons;
    let of_model = |model: &Arc<Model>| {
        let status = model.status();
        let state = match *status {
            Status::Ready => READY,
            Status::Loading => LOADING,
            Status::Waiting { .. }
            | Status::Failed { .. }
            | Status::Stuck { .. }
            | Status::Removed
            | Status::Stopping => UNAVAILABLE,
        };
        let reason = match &*status {
            Status::Failed { reason } | Status::Stuck { reason } if reasons => reason.clone(),
            Status::Waiting { expected } if reasons => format!("it waits for {expected} in a volume"),
            _ => String::new(),
        };
        let version = model.serving().map_or_else(|_| String::new(), |serving| serving.number.to_string());
        ModelIndex { name: model.name.clone(), version, state: state.to_owned(), reason }
    };
    let all = context.models.all();
    let listed = all.values().filter(|model| !only_ready || *model.status() == Status::Ready);
    listed.map(of_model).collect()
}

/// Takes a model's plugin from its volume again; waits for the outcome.
///
/// # Errors
/// There is no such model, what the volume holds was not taken, or `parameters` say what the model should be instead.
pub(super) async fn load(
    context: &Context,
    name: &str,
    mut parameters: impl Iterator<Item = &str>,
) -> Result<(), Refusal> {
    if let Some(found) = parameters.find(|name| *name == "config" || name.starts_with("file:")) {
        return Err(Refusal::Unsupported(format!(
            "expected no parameter {found}: a model's files lie in its volume, and its settings are in this host's configuration"
        )));
    }
    let record = context.control.reload(name).await.map_err(Refusal::Control)?;
    match record.outcome {
        Outcome::Swapped => Ok(()),
        Outcome::Refused { reason, .. } | Outcome::RolledBack { reason } => {
            Err(Refusal::NotTaken(format!("{name} was not loaded: {reason}")))
        }
        Outcome::Superseded => {
            Err(Refusal::NotTaken(format!("{name} was not loaded: another change of it came in between")))
        }
        Outcome::Stopped => Err(Refusal::Job(JobError::Unavailable(egress::GOING.into()))),
    }
}

/// Unloads a model without an entry in the configuration; waits until it has left.
///
/// # Errors
/// There is no such model, or it has an entry.
pub(super) async fn unload(context: &Context, name: &str) -> Result<(), Refusal> {
    context.control.unload(name).await.map(drop).map_err(Refusal::Control)
}

/// Why a call about shared memory has no answer.
pub(super) fn no_shared_memory() -> Refusal {
    Refusal::Unsupported("this host has no shared memory: send the elements in the request".into())
}

/// Why the traces of one model can't be changed.
pub(super) fn no_model_settings() -> Refusal {
    Refusal::Unsupported("expected a change for all models: none has trace settings of its own".into())
}
