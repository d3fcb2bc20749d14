//! From what was written to what it means: defaults, ranges, and which settings lie over which. It never knows who uses them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    BatchPolicy, Config, ConfigError, GoldenSpec, ModelSpec, Probation, ReloadPolicy, Replicas, Server,
    Volume, Watching,
    raw::{self, Raw},
    values::{milliseconds, number, real, seconds},
};

const MAX_BATCH_SIZE_MAX: u64 = 1000;
const WAIT_MS_MAX: u64 = 600_000;
const REPLICAS_MAX: u64 = 256;
const THREADS_MAX: u64 = 1024;
/// Each library that touches a thread-local keeps a pthread key, of which a process has 1,024; others need some too.
const GENERATIONS_MAX: u64 = 768;

pub(super) fn resolve(raw: Raw) -> Result<Config, ConfigError> {
    let app = raw.app_settings.unwrap_or_default();
    let models = raw.model_settings.unwrap_or_default();
    let batch = app.batch_config.clone().unwrap_or_default();
    let deployment = app.deployment_config.clone().unwrap_or_default();

    let mut without_effect = Vec::new();
    note_unused(
        "app_settings",
        &[
            ("auth_config", &app.auth_config),
            ("build_config", &app.build_config),
            ("queue_config", &app.queue_config),
        ],
        &mut without_effect,
    );
    note_unused_deployment("app_settings.deployment_config", &deployment, &mut without_effect);
    if app.app_prefix.is_some() {
        without_effect.push("app_settings.app_prefix".into());
    }

    let folder = models.local_model_repository_folder.map(PathBuf::from);
    let raw_server = raw.server.unwrap_or_default();
    let volumes = volumes(deployment.volumes.clone(), folder.as_ref(), raw_server.volumes.as_ref())?;
    let all_model_data_folder = folder.or_else(|| volumes.first().map(|volume| volume.mount_point.clone()));
    let defaults = ModelSpec {
        name: String::new(),
        plugin: String::new(),
        batch: batch_policy("app_settings.batch_config", &batch, &raw::BatchConfig::default())?,
        replicas: replicas(
            "app_settings.deployment_config",
            &deployment,
            &raw::DeploymentConfig::default(),
            batch_size(&batch, None),
        )?,
        all_model_data_folder: all_model_data_folder.unwrap_or_else(|| DEFAULT_VOLUME.into()),
        common_settings: json(&models.common.unwrap_or_default()),
        settings: "{}".into(),
        plugin_sha256: None,
        volumes: None,
        golden: None,
        reload: reload_policy(
            "app_settings.deployment_config",
            &deployment,
            &raw::DeploymentConfig::default(),
        )?,
    };
    let mut specs = BTreeMap::new();
    for (name, entry) in models.model_entries.unwrap_or_default() {
        let key = format!("model_settings.model_entries.{name}");
        let own_batch = entry.batch_config.unwrap_or_default();
        let own = entry.deployment_config.unwrap_or_default();
        note_unused_deployment(&format!("{key}.deployment_config"), &own, &mut without_effect);
        let batch_size = batch_size(&own_batch, Some(&batch));
        let spec = ModelSpec {
            plugin: entry.plugin.unwrap_or_else(|| name.clone()),
            batch: batch_policy(&format!("{key}.batch_config"), &own_batch, &batch)?,
            replicas: replicas(&format!("{key}.deployment_config"), &own, &deployment, batch_size)?,
            reload: reload_policy(&format!("{key}.deployment_config"), &own, &deployment)?,
            settings: json(&entry.settings),
            plugin_sha256: entry.plugin_sha256.map(|found| sha256(&key, &found)).transpose()?,
            volumes: entry.volumes.map(|names| known_volumes(&key, names, &volumes)).transpose()?,
            golden: golden(&key, entry.golden, entry.golden_latency_ms, &defaults.all_model_data_folder)?,
            ..defaults.named(&name)
        };
        specs.insert(name, spec);
    }
    Ok(Config {
        server: server(&raw_server)?,
        volumes,
        models: specs,
        defaults,
        requests_max: number(
            "app_settings.deployment_config.allow_concurrent_inputs_handler",
            deployment.allow_concurrent_inputs_handler,
            1024,
            1,
            u64::from(u32::MAX),
        )?,
        without_effect,
    })
}

const DEFAULT_VOLUME: &str = "volume";

fn volumes(
    written: Option<BTreeMap<String, String>>,
    folder: Option<&PathBuf>,
    settings: Option<&BTreeMap<String, raw::ServerVolume>>,
) -> Result<Vec<Volume>, ConfigError> {
    let mut mounts: Vec<(PathBuf, String)> =
        written.unwrap_or_default().into_iter().map(|(mount, name)| (mount.into(), name)).collect();
    if mounts.is_empty() {
        let mount = folder.cloned().unwrap_or_else(|| DEFAULT_VOLUME.into());
        mounts.push((mount, DEFAULT_VOLUME.to_owned()));
    }
    let mut seen = BTreeSet::new();
    if let Some((_, twice)) = mounts.iter().find(|(_, name)| !seen.insert(name)) {
        return Err(ConfigError::Range {
            key: "app_settings.deployment_config.volumes".into(),
            found: format!("two volumes named {twice:?}"),
            expected: "a name of its own for each".into(),
        });
    }
    let names: Vec<&String> = mounts.iter().map(|(_, name)| name).collect();
    if let Some(unknown) = settings.iter().flat_map(|map| map.keys()).find(|name| !names.contains(name)) {
        return Err(ConfigError::Range {
            key: "server.volumes".into(),
            found: format!("{unknown:?}"),
            expected: format!("one of the names in app_settings.deployment_config.volumes: {names:?}"),
        });
    }
    let watching = |name: &str| match settings.and_then(|map| map.get(name)?.watch.as_deref()) {
        None => Ok(Watching::Fitting),
        Some("native") => Ok(Watching::Native),
        Some("poll") => Ok(Watching::Poll),
        Some("both") => Ok(Watching::Both),
        Some(other) => Err(ConfigError::Range {
            key: format!("server.volumes.{name}.watch"),
            found: format!("{other:?}"),
            expected: "\"native\", \"poll\" or \"both\"".into(),
        }),
    };
    let volume =
        |(mount_point, name): (PathBuf, String)| Ok(Volume { watch: watching(&name)?, name, mount_point });
    mounts.into_iter().map(volume).collect()
}

fn reload_policy(
    key: &str,
    own: &raw::DeploymentConfig,
    over: &raw::DeploymentConfig,
) -> Result<ReloadPolicy, ConfigError> {
    let interval = own.volume_reload_interval_seconds.or(over.volume_reload_interval_seconds);
    // The Python library says -1 for "only on change".
    let hook_interval = interval.filter(|seconds| *seconds != -1.0);
    let share = own.probation_failed_share_max.or(over.probation_failed_share_max);
    let ratio = own.probation_p99_ratio_max.or(over.probation_p99_ratio_max);
    let time = own.probation_seconds.or(over.probation_seconds).unwrap_or(10.0);
    Ok(ReloadPolicy {
        hook_interval: hook_interval
            .map(|found| seconds(&format!("{key}.volume_reload_interval_seconds"), Some(found), found))
            .transpose()?,
        probation: Probation {
            time: match time {
                0.0 => Duration::ZERO,
                time => seconds(&format!("{key}.probation_seconds"), Some(time), time)?,
            },
            batches_min: number(
                &format!("{key}.probation_batches_min"),
                own.probation_batches_min.or(over.probation_batches_min),
                10,
                1,
                1 << 32,
            )? as u64,
            failed_share_max: real(&format!("{key}.probation_failed_share_max"), share, 0.1, 0.0, 1.0)?,
            p99_ratio_max: real(&format!("{key}.probation_p99_ratio_max"), ratio, 3.0, 1.0, 1e6)?,
        },
    })
}

fn sha256(key: &str, found: &str) -> Result<String, ConfigError> {
    if found.len() == 64 && found.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Ok(found.to_ascii_lowercase());
    }
    Err(ConfigError::Range {
        key: format!("{key}.plugin_sha256"),
        found: format!("{found:?}"),
        expected: "64 hexadecimal digits, as `sha256sum` prints them".into(),
    })
}

fn known_volumes(key: &str, names: Vec<String>, volumes: &[Volume]) -> Result<Vec<String>, ConfigError> {
    let known: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
    match names.iter().find(|name| !known.contains(&name.as_str())) {
        None => Ok(names),
        Some(unknown) => Err(ConfigError::Range {
            key: format!("{key}.volumes"),
            found: format!("{unknown:?}"),
            expected: format!("names of volumes: {known:?}"),
        }),
    }
}

fn golden(
    key: &str,
    file: Option<String>,
    latency_ms: Option<u64>,
    folder: &Path,
) -> Result<Option<GoldenSpec>, ConfigError> {
    match (file, latency_ms) {
        (None, None) => Ok(None),
        (None, Some(found)) => Err(ConfigError::Range {
            key: format!("{key}.golden_latency_ms"),
            found: found.to_string(),
            expected: "golden beside it: the file with the requests that are timed".into(),
        }),
        (Some(file), latency) => Ok(Some(GoldenSpec {
            // What stands with the model's data moves with it.
            file: folder.join(file),
            latency_max: latency
                .map(|found| milliseconds(&format!("{key}.golden_latency_ms"), Some(found), found))
                .transpose()?,
        })),
    }
}

fn server(raw: &raw::Server) -> Result<Server, ConfigError> {
    let listen = raw.listen.as_deref().unwrap_or("127.0.0.1:8000");
    let listen: SocketAddr = listen.parse().map_err(|_| ConfigError::Range {
        key: "server.listen".into(),
        found: format!("{listen:?}"),
        expected: "an IP address and a port, such as 127.0.0.1:8000 or [::1]:0".into(),
    })?;
    if !listen.ip().is_loopback() && raw.insecure != Some(true) {
        return Err(ConfigError::Range {
            key: "server.listen".into(),
            found: listen.to_string(),
            expected: "a loopback address, since anybody who reaches another one could use this server; where a proxy or a firewall guards it, set server.insecure = true".into(),
        });
    }
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let request_timeout_max =
        milliseconds("server.request_timeout_ms_max", raw.request_timeout_ms_max, 600_000)?;
    let request_timeout = milliseconds("server.request_timeout_ms", raw.request_timeout_ms, 60_000)?;
    Ok(Server {
        listen,
        io_threads: number("server.io_threads", raw.io_threads, cores, 1, THREADS_MAX)?,
        connections_max: number("server.connections_max", raw.connections_max, 4096, 1, 1 << 20)?,
        header_timeout: milliseconds("server.header_timeout_ms", raw.header_timeout_ms, 30_000)?,
        body_timeout: milliseconds("server.body_timeout_ms", raw.body_timeout_ms, 30_000)?,
        body_bytes_max: number("server.body_bytes_max", raw.body_bytes_max, 8 << 20, 1, 1 << 32)?,
        decode_inline_bytes_max: number(
            "server.decode_inline_bytes_max",
            raw.decode_inline_bytes_max,
            16 << 10,
            0,
            1 << 32,
        )?,
        request_timeout: request_timeout.min(request_timeout_max),
        request_timeout_max,
        drain_timeout: Duration::from_secs(number(
            "server.drain_timeout_seconds",
            raw.drain_timeout_seconds,
            30,
            0,
            86_400,
        )? as u64),
        preflight_timeout: Duration::from_secs(number(
            "server.preflight_timeout_seconds",
            raw.preflight_timeout_seconds,
            30,
            1,
            3_600,
        )? as u64),
        settle: Duration::from_millis(number("server.settle_ms", raw.settle_ms, 200, 1, 60_000)? as u64),
        settle_timeout: Duration::from_secs(number(
            "server.settle_timeout_seconds",
            raw.settle_timeout_seconds,
            10,
            1,
            86_400,
        )? as u64),
        poll_interval: milliseconds("server.poll_interval_ms", raw.poll_interval_ms, 2_000)?,
        generations_max: number("server.generations_max", raw.generations_max, 256, 1, GENERATIONS_MAX)?,
        plugins_of_any_owner: raw.plugins_of_any_owner.unwrap_or(false),
        plugins_of_any_mode: raw.plugins_of_any_mode.unwrap_or(false),
        jobs_max: number("server.jobs_max", raw.jobs_max, 10_000, 1, 1 << 32)?,
        log: raw.log.clone().unwrap_or_else(|| "info".into()),
    })
}

fn batch_size(own: &raw::BatchConfig, over: Option<&raw::BatchConfig>) -> u64 {
    own.max_batch_size.or(over.and_then(|over| over.max_batch_size)).unwrap_or(1).max(1)
}

fn batch_policy(
    key: &str,
    own: &raw::BatchConfig,
    over: &raw::BatchConfig,
) -> Result<BatchPolicy, ConfigError> {
    let max_batch_size = own.max_batch_size.or(over.max_batch_size);
    let max_batch_size = number(&format!("{key}.max_batch_size"), max_batch_size, 1, 1, MAX_BATCH_SIZE_MAX)?;
    let wait_ms = number(&format!("{key}.wait_ms"), own.wait_ms.or(over.wait_ms), 0, 0, WAIT_MS_MAX)?;
    let queue_max = number(&format!("{key}.queue_max"), own.queue_max.or(over.queue_max), 4096, 1, 1 << 24)?;
    Ok(BatchPolicy { max_batch_size, wait: Duration::from_millis(wait_ms as u64), queue_max })
}

fn replicas(
    key: &str,
    own: &raw::DeploymentConfig,
    over: &raw::DeploymentConfig,
    batch_size: u64,
) -> Result<Replicas, ConfigError> {
    let min =
        number(&format!("{key}.min_replicas"), own.min_replicas.or(over.min_replicas), 1, 0, REPLICAS_MAX)?;
    let limit = own.concurrency_limit.or(over.concurrency_limit);
    let least = min.max(1) as u64;
    let max = number(&format!("{key}.concurrency_limit"), limit, least, least, REPLICAS_MAX)?;
    // Inputs at once count only where they are more than a batch.
    let inputs = own.allow_concurrent_inputs.or(over.allow_concurrent_inputs);
    let inputs = number(&format!("{key}.allow_concurrent_inputs"), inputs, 1, 1, u64::from(u32::MAX))? as u64;
    let batches = own.batches_in_flight.or(over.batches_in_flight);
    let batches_in_flight = number(
        &format!("{key}.batches_in_flight"),
        batches,
        (inputs / batch_size).clamp(1, THREADS_MAX),
        1,
        THREADS_MAX,
    )?;
    let idle = own.container_idle_timeout.or(over.container_idle_timeout);
    let stuck_max = own.stuck_replicas_max.or(over.stuck_replicas_max);
    Ok(Replicas {
        min,
        max,
        batches_in_flight,
        idle_timeout: Duration::from_secs(number(
            &format!("{key}.container_idle_timeout"),
            idle,
            180,
            1,
            u64::from(u32::MAX),
        )? as u64),
        batch_timeout: seconds(
            &format!("{key}.batch_timeout_seconds"),
            own.batch_timeout_seconds.or(over.batch_timeout_seconds),
            300.0,
        )?,
        stuck_max: number(&format!("{key}.stuck_replicas_max"), stuck_max, 2, 0, REPLICAS_MAX)?,
        load_timeout: seconds(
            &format!("{key}.load_timeout_seconds"),
            own.load_timeout_seconds.or(over.load_timeout_seconds),
            600.0,
        )?,
    })
}

fn json(table: &toml::Table) -> String {
    serde_json::to_string(table).expect("TOML tables have string keys and finite or nameable values")
}

fn note_unused(parent: &str, keys: &[(&str, &Option<toml::Value>)], into: &mut Vec<String>) {
    into.extend(keys.iter().filter(|(_, value)| value.is_some()).map(|(key, _)| format!("{parent}.{key}")));
}

fn note_unused_deployment(parent: &str, raw: &raw::DeploymentConfig, into: &mut Vec<String>) {
    let keys = [
        ("gpu", &raw.gpu),
        ("region", &raw.region),
        ("retries", &raw.retries),
        ("secrets", &raw.secrets),
        ("mounts", &raw.mounts),
        ("cloud_bucket_mounts", &raw.cloud_bucket_mounts),
        ("secure", &raw.secure),
    ];
    note_unused(parent, &keys, into);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(text: &str) -> Result<Config, ConfigError> {
        resolve(toml::from_str(text).unwrap())
    }

    #[test]
    fn a_model_overrides_the_application() {
        let config = from(
            "[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 5\n\
             [app_settings.deployment_config]\nconcurrency_limit = 4\ngpu = \"any\"\n\
             [model_settings.common]\ndevice = \"cpu\"\n\
             [model_settings.model_entries.digits]\nplugin = \"onnx\"\ntop_k = 3\nbatch_config = { wait_ms = 1 }\n\
             deployment_config = { allow_concurrent_inputs = 32 }\n",
        )
        .unwrap();
        let digits = &config.models["digits"];
        assert_eq!((digits.plugin.as_str(), digits.settings.as_str()), ("onnx", r#"{"top_k":3}"#));
        assert_eq!((digits.batch.max_batch_size, digits.batch.wait), (8, Duration::from_millis(1)));
        assert_eq!((digits.replicas.max, digits.replicas.batches_in_flight), (4, 4));
        assert_eq!(digits.common_settings, r#"{"device":"cpu"}"#);
        assert_eq!(config.without_effect, ["app_settings.deployment_config.gpu"]);
        assert_eq!(config.defaults.named("echo").replicas.batches_in_flight, 1);
    }

    #[test]
    fn only_loopback_is_served_unless_said_otherwise() {
        let error = from("[server]\nlisten = \"0.0.0.0:8000\"\n").unwrap_err().to_string();
        assert!(error.contains("server.insecure = true"), "{error}");
        assert!(from("[server]\nlisten = \"0.0.0.0:8000\"\ninsecure = true\n").is_ok());
        assert!(from("[server]\nlisten = \"[::1]:0\"\n").is_ok());
    }

    #[test]
    fn a_value_out_of_range_says_what_is_expected() {
        let error = from("[app_settings.batch_config]\nmax_batch_size = 0\n").unwrap_err().to_string();
        assert_eq!(error, "app_settings.batch_config.max_batch_size is 0; expected a number from 1 to 1000");
        assert!(from("[app_settings.deployment_config]\nmin_replicas = 3\nconcurrency_limit = 2\n").is_err());
        assert!(from("[app_settings.deployment_config]\nbatch_timeout_seconds = nan\n").is_err());
    }
}
