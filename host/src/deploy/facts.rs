//! What a configuration says of what is around a host, in the terms of containers and clusters. It renders nothing.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Serialize;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

use super::{Autoscaler, DeployError, Options};
use crate::config::{KeySource, Loaded, Volume};

/// Where an image has what belongs to it.
pub(super) const IN_IMAGE: &str = "/opt/modalkit/plugins";
/// The volume that that is.
const IN_IMAGE_NAME: &str = "image";
/// Mirrors of buckets lie in a folder of their own: they are large, and can be fetched again.
pub(super) const BUCKETS_FOLDER: &str = "/var/lib/modalkit-buckets";
/// Where the folder of secrets is in a container, unless the configuration says otherwise.
const SECRETS_FOLDER: &str = "/run/secrets";
/// Periods of the readiness probe until a pod's endpoints are forgotten.
const DRAIN_DELAY_SECONDS: u64 = 5;
/// What a host needs after its drain, to end.
const END_SECONDS: u64 = 10;
const STATE_STORAGE: &str = "2Gi";
/// Names in a cluster have at most so many letters; some are followed by others.
const NAME_CHARS_MAX: usize = 40;

/// What templates are filled with.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Facts {
    pub(super) version: &'static str,
    /// The application's prefix, as the name of things in a cluster.
    pub(super) name: String,
    pub(super) image: String,
    pub(super) port: u16,
    /// The configuration, without secrets, in TOML.
    pub(super) configuration: String,
    /// The same, as the lines of a block in YAML.
    pub(super) configuration_block: String,
    pub(super) configuration_sha256: String,
    /// Variables of the environment that hold secrets: each the member of one secret of the application's.
    pub(super) secret_variables: Vec<SecretVariable>,
    /// Secrets with one value, each in a file.
    pub(super) secret_files: Vec<String>,
    /// Secrets with several values: a folder of files each.
    pub(super) secret_folders: Vec<String>,
    pub(super) secrets_folder: PathBuf,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) volumes: Vec<VolumeFacts>,
    pub(super) buckets: Vec<BucketFacts>,
    pub(super) buckets_folder: &'static str,
    /// Mebibytes that mirrors may take up, where their sizes are limited: twice, for a change.
    pub(super) buckets_mib: Option<u64>,
    pub(super) drain_delay_seconds: u64,
    pub(super) grace_seconds: u64,
    pub(super) state_storage: &'static str,
    pub(super) stateless: bool,
    pub(super) replicas: u64,
    pub(super) replicas_max: u64,
    pub(super) keda: bool,
    pub(super) prometheus: Option<String>,
    pub(super) queues: Vec<QueueFacts>,
    pub(super) gpus: Option<u64>,
    pub(super) gpu_names: Vec<String>,
    pub(super) memory: Option<String>,
    pub(super) cpu: Option<String>,
    /// The same in cores, for compose.
    pub(super) cpu_cores: Option<String>,
    /// What a scaler on CPU time measures by, where nothing is said.
    pub(super) cpu_request: Option<String>,
    /// Whether pods are added and taken away with the work.
    pub(super) scales: bool,
    pub(super) region: Option<String>,
    pub(super) kserve: bool,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct SecretVariable {
    pub(super) variable: String,
    /// In the application's secret.
    pub(super) key: String,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct VolumeFacts {
    /// As a claim's name.
    pub(super) name: String,
    pub(super) mount_point: PathBuf,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct BucketFacts {
    pub(super) name: String,
    pub(super) mount_point: PathBuf,
    pub(super) parent: PathBuf,
    /// Where the mount point leads in a container.
    pub(super) target: String,
    /// The same on a machine, where mirrors lie in the state folder.
    pub(super) target_of_state: PathBuf,
}

/// A queue whose length scales pods.
#[derive(Clone, Debug, Serialize)]
pub(super) struct QueueFacts {
    /// KEDA's name of its kind.
    pub(super) kind: &'static str,
    pub(super) queue: String,
    /// `host:port` of Redis.
    pub(super) address: Option<String>,
    pub(super) region: Option<String>,
    /// Requests that one pod takes at once.
    pub(super) length: usize,
}

impl Facts {
    /// `in_container`: it listens to others than its own machine, and so has to ask who calls.
    pub(super) fn of(loaded: &Loaded, options: &Options, in_container: bool) -> Result<Self, DeployError> {
        let config = &loaded.config;
        let name = name_of(&config.container.name);
        let (mut written, hidden) = loaded.written();
        let mut secret_variables: Vec<SecretVariable> = hidden
            .into_iter()
            .map(|(variable, key)| SecretVariable { key: letters(&key), variable })
            .collect();
        if config.container.secure {
            let of = |name: &str| SecretVariable {
                variable: name.replace('-', "_").to_uppercase(),
                key: name.to_owned(),
            };
            secret_variables.extend(["modal-key", "modal-secret"].map(of));
        }
        secret_variables.extend(named_variables(&written));
        if in_container && !asks_who_calls(loaded) {
            // A host asks nobody but those on its own machine unless it is told to.
            let of = |variable: &str, key: &str| SecretVariable {
                variable: variable.to_owned(),
                key: key.to_owned(),
            };
            secret_variables.push(of("MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY", "api-key"));
            secret_variables
                .push(of("MODALKIT_APP_SETTINGS__AUTH_CONFIG__KEYS__OPERATOR__API_KEY", "operator-key"));
            written["app_settings"]["auth_config"]["keys"]["operator"]["management"] = true.into();
        }
        place_in_container(&mut written, config.server.listen.port(), &config.volumes);
        let configuration = toml::to_string(&written).map_err(|error| {
            DeployError::Unfit(format!("the configuration can't be written as TOML: {error}"))
        })?;
        let defaults = &config.defaults;
        let wanted = defaults.gpu.as_ref();
        let drain_delay = config.server.drain_delay.as_secs().max(DRAIN_DELAY_SECONDS);
        let in_pod = defaults.replicas.min.max(1) as f64;
        let bucket_secrets = config.volumes.iter().filter_map(|volume| volume.bucket.as_ref()?.secret());
        let mut secret_folders: Vec<String> = config
            .container
            .secrets
            .iter()
            .map(String::as_str)
            .chain(bucket_secrets)
            .map(str::to_owned)
            .collect();
        secret_folders.sort();
        secret_folders.dedup();
        let mirrored: Vec<&Volume> = config.volumes.iter().filter(|volume| volume.bucket.is_some()).collect();
        let limits: Option<Vec<u64>> =
            mirrored.iter().map(|volume| volume.bucket.as_ref()?.spec.bytes_max).collect();
        let queues = queues(loaded);
        let keda = options.autoscaler == Autoscaler::Keda;
        let scales = defaults.replicas.max as u64 > 1;
        if scales && keda && queues.is_empty() && options.prometheus.is_none() {
            return Err(DeployError::Unfit(
                "expected something for KEDA to scale by: a queue in app_settings.queue_config.consume, or --prometheus with the address of the one that scrapes these pods; found neither".to_owned(),
            ));
        }
        let cores = config.container.cores.map(|cores| cores * in_pod);
        Ok(Self {
            version: env!("CARGO_PKG_VERSION"),
            image: options.image.clone().unwrap_or_else(|| image_name(loaded)),
            name,
            port: config.server.listen.port(),
            configuration_block: block(&configuration),
            configuration_sha256: Sha256::digest(&configuration)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
            configuration,
            secret_variables,
            secret_files: files_of_keys(loaded),
            secret_folders,
            secrets_folder: SECRETS_FOLDER.into(),
            environment: config.container.environment.clone(),
            volumes: claims(loaded),
            buckets: mirrored.iter().map(|volume| bucket(volume)).collect(),
            buckets_folder: BUCKETS_FOLDER,
            buckets_mib: limits
                .filter(|_| !mirrored.is_empty())
                .map(|all| all.iter().sum::<u64>().div_ceil(1 << 19)),
            drain_delay_seconds: drain_delay,
            grace_seconds: drain_delay + config.server.drain_timeout.as_secs() + END_SECONDS,
            state_storage: STATE_STORAGE,
            stateless: options.stateless,
            replicas: 1,
            replicas_max: defaults.replicas.max as u64,
            keda,
            prometheus: options.prometheus.clone(),
            queues,
            gpus: wanted.map(|wanted| {
                wanted.preferences.iter().map(|one| one.count).max().unwrap_or(1) as u64 * in_pod as u64
            }),
            gpu_names: wanted
                .map(|wanted| wanted.preferences.iter().map(ToString::to_string).collect())
                .unwrap_or_default(),
            memory: config.container.memory_mb.map(|megabytes| format!("{}M", (megabytes * in_pod).ceil())),
            cpu: cores.map(|cores| format!("{}m", (cores * 1000.0).ceil())),
            cpu_cores: cores.map(|cores| cores.to_string()),
            cpu_request: (scales && !keda && cores.is_none()).then(|| "1".to_owned()),
            scales,
            region: config.container.region.clone(),
            kserve: options.kserve,
        })
    }
}

pub(super) fn image_name(loaded: &Loaded) -> String {
    format!("{}:{}", name_of(&loaded.config.container.name), env!("CARGO_PKG_VERSION"))
}

/// Variables of the environment that keys are said to be in.
fn named_variables(written: &Json) -> Vec<SecretVariable> {
    let keys = written["app_settings"]["auth_config"]["keys"].as_object();
    let variables = keys.into_iter().flatten().filter_map(|(_, key)| key["variable"].as_str());
    variables
        .map(|variable| SecretVariable { variable: variable.to_owned(), key: letters(variable) })
        .collect()
}

/// Whether a configuration says who may call.
fn asks_who_calls(loaded: &Loaded) -> bool {
    loaded.config.server.insecure || !loaded.config.auth.keys.is_empty() || loaded.config.container.secure
}

fn files_of_keys(loaded: &Loaded) -> Vec<String> {
    let keys = loaded.config.auth.keys.iter();
    let files = keys.filter_map(|key| match &key.source {
        KeySource::Secret(name) => Some(name.clone()),
        KeySource::Value(_) | KeySource::Ssm(_) => None,
    });
    files.collect()
}

/// What differs in a container: it listens to all, and each pod has the replicas that there are at least, since the cluster adds pods.
fn place_in_container(written: &mut Json, port: u16, volumes: &[Volume]) {
    let root = written;
    root["server"]["listen"] = format!("0.0.0.0:{port}").into();
    for key in ["state_folder", "buckets_folder", "management_socket", "secrets_folder"] {
        if let Some(server) = root["server"].as_object_mut() {
            server.remove(key);
        }
    }
    if let Some(deployment) = root["app_settings"]["deployment_config"].as_object_mut() {
        deployment.remove("concurrency_limit");
        deployment.insert("volumes".to_owned(), volumes_in_container(volumes));
    } else {
        root["app_settings"]["deployment_config"] =
            serde_json::json!({"volumes": volumes_in_container(volumes)});
    }
}

fn volumes_in_container(volumes: &[Volume]) -> Json {
    let watched = volumes.iter().filter(|volume| volume.bucket.is_none() && volume.pipeline.is_none());
    let mut all: serde_json::Map<String, Json> = watched
        .map(|volume| (in_container(&volume.mount_point).display().to_string(), volume.name.clone().into()))
        .collect();
    all.insert(IN_IMAGE.to_owned(), IN_IMAGE_NAME.into());
    all.into()
}

/// Where a volume's folder is in a container: one that is written without its beginning has none there.
pub(super) fn in_container(mount_point: &Path) -> PathBuf {
    match mount_point.is_absolute() {
        true => mount_point.to_owned(),
        false => Path::new("/mnt").join(mount_point.file_name().unwrap_or_default()),
    }
}

fn claims(loaded: &Loaded) -> Vec<VolumeFacts> {
    let watched =
        loaded.config.volumes.iter().filter(|volume| volume.bucket.is_none() && volume.pipeline.is_none());
    watched
        .map(|volume| VolumeFacts {
            name: name_of(&volume.name),
            mount_point: in_container(&volume.mount_point),
        })
        .collect()
}

fn bucket(volume: &Volume) -> BucketFacts {
    BucketFacts {
        name: volume.name.clone(),
        mount_point: volume.mount_point.clone(),
        parent: volume.mount_point.parent().map(Path::to_owned).unwrap_or_else(|| "/".into()),
        target: format!("{BUCKETS_FOLDER}/{}/current", volume.name),
        target_of_state: Path::new("/var/lib/modalkit/buckets").join(&volume.name).join("current"),
    }
}

fn queues(loaded: &Loaded) -> Vec<QueueFacts> {
    let spec = &loaded.config.queues;
    let consumed = spec.consume.iter().filter_map(|consumed| {
        let (backend, queue) = spec.parts_of(&consumed.queue);
        let (kind, address, region) = match spec.backends.get(backend)? {
            modalkit_queue::Spec::Redis(redis) => {
                let rest = redis.url.split_once("://").map_or(redis.url.as_str(), |(_, rest)| rest);
                let place = rest.rsplit('@').next().unwrap_or(rest);
                ("redis-streams", Some(place.split('/').next().unwrap_or(place).to_owned()), None)
            }
            modalkit_queue::Spec::Sqs(sqs) => ("aws-sqs-queue", None, Some(sqs.region.clone())),
            _ => return None,
        };
        Some(QueueFacts { kind, queue: queue.to_owned(), address, region, length: consumed.in_flight_max })
    });
    consumed.collect()
}

/// A text as the lines of a block in YAML, four blanks deep.
fn block(text: &str) -> String {
    text.lines().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("\n    {line}") }).collect()
}

/// A name as clusters take them: small letters, digits and hyphens.
fn name_of(text: &str) -> String {
    let name: String = letters(text).chars().take(NAME_CHARS_MAX).collect();
    let name = name.trim_matches('-').to_owned();
    if name.is_empty() { "modalkit".to_owned() } else { name }
}

fn letters(text: &str) -> String {
    let letter =
        |letter: char| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '-' };
    text.chars().map(letter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_such_as_clusters_take() {
        assert_eq!(name_of("Demo_App.v2"), "demo-app-v2");
        assert_eq!(name_of("--"), "modalkit");
        assert_eq!(name_of(&"x".repeat(100)).len(), NAME_CHARS_MAX);
    }

    #[test]
    fn blocks_have_no_trailing_blanks() {
        assert_eq!(block("a = 1\n\n[b]\n"), "\n    a = 1\n\n    [b]");
    }
}
