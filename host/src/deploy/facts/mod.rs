//! What a configuration says of what is around a host, in the terms of containers and clusters. It renders nothing.

mod container;
mod names;
mod resources;
mod secrets;

use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{Autoscaler, DeployError, Options};
use crate::config::{Loaded, Volume};
use container::claims;
use names::name_of;
use resources::{QueueFacts, needs, queues, state_storage};
use secrets::{SecretFolder, SecretVariable};

pub(super) use container::{BUCKETS_FOLDER, IN_IMAGE, TLS_FOLDER};

/// Where the folder of secrets is in a container.
const SECRETS_FOLDER: &str = "/run/secrets";
/// Where a machine's state lies, unless the configuration says otherwise.
const STATE_FOLDER: &str = "/var/lib/modalkit";
/// Periods of the readiness probe until a pod's endpoints are forgotten.
const DRAIN_DELAY_SECONDS: u64 = 5;
/// What a host needs after its drain, to end.
const END_SECONDS: u64 = 10;
/// Ports below this want a right that containers don't have.
const PRIVILEGED_PORTS: u16 = 1024;
const PORT: u16 = 8000;

/// What templates are filled with.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Facts {
    pub(super) version: &'static str,
    /// The application's prefix, as the name of things in a cluster.
    pub(super) name: String,
    pub(super) image: String,
    pub(super) port: u16,
    /// HTTPS.
    pub(super) tls: bool,
    pub(super) tls_folder: &'static str,
    /// The configuration, without secrets, in TOML.
    pub(super) configuration: String,
    /// The same, as the lines of a block in YAML.
    pub(super) configuration_block: String,
    pub(super) configuration_sha256: String,
    pub(super) secret_variables: Vec<SecretVariable>,
    /// Secrets with one value, each in a file.
    pub(super) secret_files: Vec<String>,
    pub(super) secret_folders: Vec<SecretFolder>,
    pub(super) secrets_folder: &'static str,
    pub(super) volumes: Vec<VolumeFacts>,
    pub(super) buckets: Vec<BucketFacts>,
    pub(super) buckets_folder: &'static str,
    /// Mebibytes that mirrors may take up, where their sizes are limited: twice, for a change.
    pub(super) buckets_mib: Option<u64>,
    /// Plugins may lie in buckets.
    pub(super) plugins_in_buckets: bool,
    pub(super) drain_delay_seconds: u64,
    pub(super) grace_seconds: u64,
    pub(super) state_storage: String,
    pub(super) stateless: bool,
    pub(super) replicas: u64,
    pub(super) replicas_max: u64,
    /// Whether pods are added and taken away with the work.
    pub(super) scales: bool,
    pub(super) keda: bool,
    pub(super) prometheus: Option<String>,
    pub(super) queues: Vec<QueueFacts>,
    pub(super) gpus: Option<u64>,
    pub(super) memory: Option<String>,
    pub(super) cpu: Option<String>,
    /// The same in cores, for compose.
    pub(super) cpu_cores: Option<String>,
    /// What a scaler on CPU time measures by, where nothing is said.
    pub(super) cpu_request: Option<String>,
    pub(super) region: Option<String>,
    pub(super) kserve: bool,
    /// Folders of a machine that a unit's process writes, beside those that systemd makes for it.
    pub(super) written_folders: Vec<PathBuf>,
    /// Whether the port wants a right of its own, on a machine.
    pub(super) privileged_port: bool,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct VolumeFacts {
    /// As a claim's name.
    pub(super) name: String,
    pub(super) mount_point: PathBuf,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct BucketFacts {
    pub(super) mount_point: PathBuf,
    pub(super) parent: PathBuf,
    /// Where the mount point leads in a container.
    pub(super) target: String,
    /// The same on a machine.
    pub(super) target_of_machine: PathBuf,
}

impl Facts {
    /// `in_container`: it listens to others than its own machine, and has folders that are the image's.
    pub(super) fn of(loaded: &Loaded, options: &Options, in_container: bool) -> Result<Self, DeployError> {
        let config = &loaded.config;
        let (mut written, hidden) = loaded.written();
        if let Some(key) = hidden.iter().find_map(|(variable, key)| variable.is_empty().then_some(key)) {
            return Err(DeployError::Unfit(format!(
                "expected no secret in {key}, which no variable of the environment can set alone; found one: give it as a secret"
            )));
        }
        let secret_variables = secrets::variables(loaded, &mut written, hidden, in_container)?;
        let secret_folders = secrets::folders(loaded, &written);
        let volumes = claims(loaded, &written);
        // Where nothing is written, they would be those of whoever renders.
        let said = |key: &str| written["server"][key].as_str().map(PathBuf::from);
        let own_folders: Vec<PathBuf> =
            ["state_folder", "buckets_folder"].into_iter().filter_map(said).collect();
        let own_port = config.server.listen.port();
        let port = if in_container && own_port < PRIVILEGED_PORTS { PORT } else { own_port };
        if in_container {
            container::place(&mut written, loaded, port);
        }
        let configuration = toml::to_string(&written).map_err(|error| {
            DeployError::Unfit(format!("the configuration can't be written as TOML: {error}"))
        })?;
        let queues = queues(loaded, &secret_variables);
        let keda = options.autoscaler == Autoscaler::Keda;
        let replicas_max = config.defaults.replicas.max as u64;
        if replicas_max > 1 && keda && queues.is_empty() && options.prometheus.is_none() {
            return Err(DeployError::Unfit(
                "expected something for KEDA to scale by: a queue in app_settings.queue_config.consume, or --prometheus with the address of the one that scrapes these pods; found neither".to_owned(),
            ));
        }
        let needs = needs(loaded);
        let cores = Some(needs.cores).filter(|cores| *cores > 0.0);
        let mirrored: Vec<&Volume> = config.volumes.iter().filter(|volume| volume.bucket.is_some()).collect();
        let limits: Option<Vec<u64>> =
            mirrored.iter().map(|volume| volume.bucket.as_ref()?.spec.bytes_max).collect();
        let drain_delay = config.server.drain_delay.as_secs().max(DRAIN_DELAY_SECONDS);
        Ok(Self {
            version: env!("CARGO_PKG_VERSION"),
            name: name_of(&config.container.name),
            image: options.image.clone().unwrap_or_else(|| image_name(loaded)),
            port,
            tls: config.server.tls.is_some(),
            tls_folder: TLS_FOLDER,
            configuration_block: block(&configuration),
            configuration_sha256: Sha256::digest(&configuration)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
            configuration,
            secret_variables,
            secret_files: secrets::files(loaded),
            secret_folders,
            secrets_folder: SECRETS_FOLDER,
            volumes,
            buckets: mirrored.iter().map(|volume| bucket(volume, !own_folders.is_empty())).collect(),
            buckets_folder: BUCKETS_FOLDER,
            buckets_mib: limits
                .filter(|_| !mirrored.is_empty())
                .map(|all| all.iter().sum::<u64>().div_ceil(1 << 19)),
            plugins_in_buckets: mirrored.iter().any(|volume| volume.takes_any_plugin())
                || !mirrored.is_empty() && config.models.values().any(|spec| spec.plugin_sha256.is_some()),
            drain_delay_seconds: drain_delay,
            grace_seconds: drain_delay + config.server.drain_timeout.as_secs() + END_SECONDS,
            state_storage: state_storage(loaded),
            stateless: options.stateless,
            replicas: 1,
            replicas_max,
            scales: replicas_max > 1,
            keda,
            prometheus: options.prometheus.clone(),
            queues,
            gpus: Some(needs.gpus).filter(|gpus| *gpus > 0),
            memory: Some(needs.memory_bytes)
                .filter(|bytes| *bytes > 0)
                .map(|bytes| format!("{}M", bytes.div_ceil(1_000_000))),
            cpu: cores.map(|cores| format!("{}m", (cores * 1000.0).ceil())),
            cpu_cores: cores.map(|cores| cores.to_string()),
            cpu_request: (replicas_max > 1 && !keda && cores.is_none()).then(|| "1".to_owned()),
            region: config.container.region.clone(),
            kserve: options.kserve,
            written_folders: written_folders(loaded, own_folders),
            privileged_port: own_port < PRIVILEGED_PORTS,
        })
    }
}

pub(super) fn image_name(loaded: &Loaded) -> String {
    format!("{}:{}", name_of(&loaded.config.container.name), env!("CARGO_PKG_VERSION"))
}

fn bucket(volume: &Volume, is_said: bool) -> BucketFacts {
    let own = volume.bucket.as_ref().map(|bucket| bucket.spec.folder.clone()).unwrap_or_default();
    let own = if is_said { own } else { Path::new(STATE_FOLDER).join("buckets").join(&volume.name) };
    BucketFacts {
        mount_point: volume.mount_point.clone(),
        parent: volume.mount_point.parent().map_or_else(|| "/".into(), Path::to_owned),
        target: format!("{BUCKETS_FOLDER}/{}/current", volume.name),
        target_of_machine: own.join("current"),
    }
}

/// Folders of state that are said to be elsewhere, and those that something is put in place in.
fn written_folders(loaded: &Loaded, own: Vec<PathBuf>) -> Vec<PathBuf> {
    let targets = loaded.config.mounts.iter().map(|mount| match mount.folder {
        true => mount.to.clone(),
        false => mount.to.parent().map(Path::to_owned).unwrap_or_default(),
    });
    own.into_iter().chain(targets).filter(|folder| folder.is_absolute()).collect()
}

/// A text as the lines of a block in YAML, four blanks deep.
fn block(text: &str) -> String {
    text.lines().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("\n    {line}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_no_trailing_blanks() {
        assert_eq!(block("a = 1\n\n[b]\n"), "\n    a = 1\n\n    [b]");
    }
}
