//! What may be written: every key optional, types as in the files. It never knows defaults or ranges.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Value;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    pub(super) server: Option<Server>,
    pub(super) app_settings: Option<AppSettings>,
    pub(super) model_settings: Option<ModelSettings>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Server {
    pub(super) listen: Option<String>,
    pub(super) insecure: Option<bool>,
    pub(super) io_threads: Option<u64>,
    pub(super) connections_max: Option<u64>,
    pub(super) header_timeout_ms: Option<u64>,
    pub(super) body_timeout_ms: Option<u64>,
    pub(super) body_bytes_max: Option<u64>,
    pub(super) decode_inline_bytes_max: Option<u64>,
    pub(super) request_timeout_ms: Option<u64>,
    pub(super) request_timeout_ms_max: Option<u64>,
    pub(super) drain_timeout_seconds: Option<u64>,
    pub(super) preflight_timeout_seconds: Option<u64>,
    pub(super) settle_ms: Option<u64>,
    pub(super) settle_timeout_seconds: Option<u64>,
    pub(super) poll_interval_ms: Option<u64>,
    pub(super) generations_max: Option<u64>,
    pub(super) plugins_of_any_owner: Option<bool>,
    pub(super) plugins_of_any_mode: Option<bool>,
    pub(super) volumes: Option<BTreeMap<String, ServerVolume>>,
    pub(super) jobs_max: Option<u64>,
    pub(super) log: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServerVolume {
    pub(super) watch: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AppSettings {
    pub(super) app_prefix: Option<String>,
    pub(super) batch_config: Option<BatchConfig>,
    pub(super) deployment_config: Option<DeploymentConfig>,
    pub(super) auth_config: Option<Value>,
    pub(super) build_config: Option<Value>,
    pub(super) queue_config: Option<Value>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BatchConfig {
    pub(super) max_batch_size: Option<u64>,
    pub(super) wait_ms: Option<u64>,
    pub(super) queue_max: Option<u64>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeploymentConfig {
    pub(super) volumes: Option<BTreeMap<String, String>>,
    pub(super) min_replicas: Option<u64>,
    pub(super) concurrency_limit: Option<u64>,
    pub(super) allow_concurrent_inputs: Option<u64>,
    pub(super) batches_in_flight: Option<u64>,
    pub(super) allow_concurrent_inputs_handler: Option<u64>,
    pub(super) container_idle_timeout: Option<u64>,
    pub(super) batch_timeout_seconds: Option<f64>,
    pub(super) stuck_replicas_max: Option<u64>,
    pub(super) load_timeout_seconds: Option<f64>,
    pub(super) volume_reload_interval_seconds: Option<f64>,
    pub(super) probation_seconds: Option<f64>,
    pub(super) probation_batches_min: Option<u64>,
    pub(super) probation_failed_share_max: Option<f64>,
    pub(super) probation_p99_ratio_max: Option<f64>,
    // Known keys whose feature isn't here yet: accepted, and said to have no effect.
    pub(super) gpu: Option<Value>,
    pub(super) region: Option<Value>,
    pub(super) retries: Option<Value>,
    pub(super) secrets: Option<Value>,
    pub(super) mounts: Option<Value>,
    pub(super) cloud_bucket_mounts: Option<Value>,
    pub(super) secure: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ModelSettings {
    pub(super) local_model_repository_folder: Option<String>,
    pub(super) common: Option<toml::Table>,
    pub(super) model_entries: Option<BTreeMap<String, ModelEntry>>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct ModelEntry {
    pub(super) plugin: Option<String>,
    pub(super) plugin_sha256: Option<String>,
    pub(super) volumes: Option<Vec<String>>,
    pub(super) golden: Option<String>,
    pub(super) golden_latency_ms: Option<u64>,
    pub(super) batch_config: Option<BatchConfig>,
    pub(super) deployment_config: Option<DeploymentConfig>,
    /// The pipeline's own keys, which only the pipeline can check.
    #[serde(flatten)]
    pub(super) settings: toml::Table,
}
