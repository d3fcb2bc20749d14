//! From what was written to what it means: which settings lie over which, and what must fit together. Single values were looked
//! at when they were read. It never knows who uses them.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use modalkit_device::{Preference, Wanted};
use modalkit_engine::{self as engine, Confinement, Isolation, Sandbox};

use super::{
    BatchPolicy, BatchWait, Config, ContainerSpec, Environment, Fault, GoldenSpec, ModelSpec, Mount, Place,
    Probation, Recycle, ReloadDevices, ReloadPolicy, Replicas, Secrets, Settings, Task, Volume, Warning,
    Watching, auth, buckets,
    fault::listed,
    keys::{self, AppSettings, BatchConfig, DeploymentConfig, ModelEntry, Root},
    layer::{Row, Setting, child},
    queues,
    resolve_server::{check_allowed_hosts, check_cors_origins, server, state_folder},
    types::{Amount, BatchWaitMs, IsolationKind, MountKind, Named, ReloadGpu, TaskKind, Watch},
};

const DEFAULT_VOLUME: &str = "volume";
/// Where what counts for all models is written.
const APPLICATION: &str = "app_settings";
/// The application's name ends with the value of this, or else with that.
const POSTFIX: (&str, &str) = ("MODALKIT_APP_POSTFIX", "-dev");
/// Keys of a deployment that count for the whole host.
pub(super) const OF_THE_HOST: [&str; 6] =
    ["volumes", "cloud_bucket_mounts", "allow_concurrent_inputs_handler", "mounts", "secure", "region"];

/// What doesn't fit together is added to the faults; what comes back then is of no use.
pub(super) fn resolve(
    written: &Root,
    environment: &Environment,
    faults: &mut Vec<Fault>,
    warnings: &mut Vec<Warning>,
) -> Config {
    let (app, models) = (written.app_settings(), written.model_settings());
    let deployment = app.deployment_config();
    let folder = models.local_model_repository_folder.value().map(PathBuf::from);
    let state_folder = state_folder(&written.server(), environment, warnings);
    let mirrored = buckets::resolve(&mut buckets::Context {
        deployment: &deployment,
        server: &written.server(),
        state_folder: &state_folder,
        environment,
        faults,
        warnings,
    });
    let volumes = volumes(&deployment, folder.as_ref(), &written.server(), mirrored, faults);
    let all_model_data_folder = folder.or_else(|| volumes.first().map(|volume| volume.mount_point.clone()));
    let mut context = Resolver {
        app: &app,
        common: models.common().0.json().to_string(),
        folder: all_model_data_folder.unwrap_or_else(|| DEFAULT_VOLUME.into()),
        volumes: &volumes,
        environment,
        secrets_folder: written.server().secrets_folder().into(),
        faults,
        warnings,
    };
    let defaults = context.model("", &ModelEntry::default(), "app_settings");
    let entries = models.model_entries.value().cloned().unwrap_or_default();
    let specs: BTreeMap<String, ModelSpec> = entries
        .iter()
        .map(|(name, entry)| {
            let key = child("model_settings.model_entries", name);
            (name.to_owned(), context.model(name, entry, &key))
        })
        .collect();
    let pipelines = pipelines_outside(&entries, &specs);
    if ![&defaults].into_iter().chain(specs.values()).any(|spec| !spec.isolation.in_process) {
        context.warnings.extend(without_isolation(&deployment, APPLICATION));
    }
    let max = written.server().request_timeout_ms_max().0;
    if written.server().request_timeout_ms.value().is_some_and(|timeout| timeout.0 > max) {
        faults.push(Fault::new(
            &written.server().request_timeout_ms.at(),
            "server.request_timeout_ms",
            format!(
                "at most request_timeout_ms_max, which is {max} ({})",
                written.server().request_timeout_ms_max.at()
            ),
            format!("the number {}", written.server().request_timeout_ms().0),
        ));
    }
    let body_max = written.server().body_bytes_max().0;
    if written.server().bytes_in_flight_max().0 < body_max {
        faults.push(Fault::new(
            &written.server().bytes_in_flight_max.at(),
            "server.bytes_in_flight_max",
            format!(
                "at least body_bytes_max, which is {body_max} ({})",
                written.server().body_bytes_max.at()
            ),
            format!("the number {}", written.server().bytes_in_flight_max().0),
        ));
    }
    if written.server().traces.value().is_some_and(|traces| traces.endpoint.value().is_none()) {
        let why = "nothing is exported without an endpoint".to_owned();
        warnings.push(Warning { at: written.server().traces.at(), key: "server.traces".to_owned(), why });
    }
    if let Some((_, at)) = entries.entries.get("") {
        faults.push(Fault::new(at, "model_settings.model_entries", "a name for each model", "an empty one"));
    }
    let auth = auth::resolve(written, environment, faults, warnings);
    let queues = queues::resolve(written, environment, &volumes, faults, warnings);
    auth::check_exposure(written, &auth, faults);
    check_allowed_hosts(&written.server(), faults);
    check_cors_origins(&written.server(), auth.asks(), faults);
    Config {
        app_name: app_name(&app, environment),
        server: server(&written.server(), auth::tls(written, faults), state_folder),
        auth,
        requests_max: deployment.allow_concurrent_inputs_handler().0 as usize,
        mounts: mounts(&deployment, faults),
        volumes: volumes.iter().cloned().chain(pipelines).collect(),
        models: specs,
        defaults,
        queues,
        container: container(&app, &deployment, warnings),
    }
}

/// What all models have in common, and where faults go.
struct Resolver<'a> {
    app: &'a AppSettings,
    common: String,
    folder: PathBuf,
    volumes: &'a [Volume],
    environment: &'a Environment,
    secrets_folder: PathBuf,
    faults: &'a mut Vec<Fault>,
    warnings: &'a mut Vec<Warning>,
}

impl Resolver<'_> {
    fn model(&mut self, name: &str, entry: &ModelEntry, key: &str) -> ModelSpec {
        let own_deployment = entry.deployment_config.value().cloned().unwrap_or_default().0;
        self.warn_of_the_host(&own_deployment, &child(key, "deployment_config"));
        let batch = entry.batch_config.value().cloned().unwrap_or_default().0.over(&self.app.batch_config());
        let deployment = own_deployment.over(&self.app.deployment_config());
        let batch_policy = batch_policy(&batch);
        ModelSpec {
            name: name.to_owned(),
            configured: !name.is_empty(),
            required: !name.is_empty() && entry.required(),
            enforce_schema: entry.enforce_schema(),
            task: entry.task.value().map(|task| match task {
                TaskKind::Embedding => Task::Embedding,
                TaskKind::Completion => Task::Completion,
                TaskKind::Chat => Task::Chat,
            }),
            plugin: entry.plugin.value().cloned().unwrap_or_else(|| name.to_owned()),
            batch: batch_policy,
            replicas: self.replicas(&deployment, batch_policy.max_batch_size as u64, key),
            all_model_data_folder: self.folder.clone(),
            common_settings: self.common.clone(),
            application: self.application(&batch, &deployment),
            settings: Settings::new(entry.settings.0.clone(), key),
            secrets: self.secrets(&deployment, key),
            plugin_sha256: entry.plugin_sha256.value().map(|digest| digest.0.clone()),
            volumes: self.known_volumes(entry, key),
            golden: self.golden(entry, key),
            reload: reload_policy(&deployment),
            retries: deployment.retries().0 as u32,
            gpu: self.gpu(&deployment, key),
            isolation: self.isolation(&own_deployment, &deployment, entry, key),
            recycle: Recycle {
                after_batches: deployment.recycle_after_batches.value().map(|count| count.0),
                after_bytes: deployment.recycle_after_mb.value().map(|memory| memory.0 << 20),
            },
        }
    }

    /// The application's settings in the names of configuration files, with what counts for this model, and without who may call.
    fn application(&self, batch: &BatchConfig, deployment: &DeploymentConfig) -> String {
        let mut settings = serde_json::json!({
            "app_prefix": self.app.app_prefix(),
            "batch_config": batch.json(true),
            "deployment_config": deployment.json(true),
            "queue_config": {"backend": self.app.queue_config().backend()},
        });
        if let Some(build) = self.app.build_config.value() {
            settings["build_config"] = build.json(true);
        }
        serde_json::json!({"app_name": app_name(self.app, self.environment), "app_settings": settings})
            .to_string()
    }

    fn isolation(
        &mut self,
        own: &DeploymentConfig,
        deployment: &DeploymentConfig,
        entry: &ModelEntry,
        key: &str,
    ) -> Isolation {
        let python = entry.python.value();
        if let Some(python) = python
            && let (Some(app), Some(_)) = (python.app.value(), python.pipeline.value())
        {
            self.faults.push(Fault::new(
                &python.app.at(),
                &child(key, "python.app"),
                "either python.pipeline or python.app",
                format!("both, and app = {app:?}"),
            ));
        }
        let in_process = deployment.isolation() == IsolationKind::InProcess && python.is_none();
        if in_process {
            self.warnings.extend(without_isolation(own, key));
        }
        // Those that its entry names, where it names any.
        let is_its_own =
            |volume: &&Volume| entry.volumes.value().is_none_or(|names| names.contains(&volume.name));
        let its_own = self.volumes.iter().filter(is_its_own);
        let mut readable: Vec<PathBuf> = its_own.flat_map(folders_of).collect();
        readable.push(self.folder.clone());
        let sandbox = Sandbox { readable, network: deployment.sandbox_network() };
        let amount = |amount: Option<&Amount>| amount.map(|amount| amount.0).filter(|amount| *amount > 0.0);
        let confinement = Confinement {
            memory_bytes: amount(deployment.memory.value()).map(|megabytes| (megabytes * 1e6) as u64),
            cores: amount(deployment.cpu.value()),
            sandbox: deployment.sandbox().then_some(sandbox),
            python: python.map_or_else(engine::Python::default, python_of),
        };
        Isolation { in_process, confinement }
    }

    fn warn_of_the_host(&mut self, own: &DeploymentConfig, key: &str) {
        let mut rows = Vec::new();
        own.rows("", &Place::Default, false, &mut rows);
        for name in OF_THE_HOST {
            let of_name = |row: &&Row| row.key.split(['.', '[']).next() == Some(name);
            if let Some(row) = rows.iter().find(of_name) {
                let why = "it counts for the whole host: say it in app_settings.deployment_config".to_owned();
                self.warnings.push(Warning { at: row.at.clone(), key: child(key, name), why });
            }
        }
    }

    fn replicas(&mut self, deployment: &DeploymentConfig, batch_size: u64, key: &str) -> Replicas {
        let min = deployment.min_replicas().0;
        let least = min.max(1);
        let max = deployment.concurrency_limit.value().map_or(least, |limit| limit.0);
        if max < least {
            self.faults.push(Fault::new(
                &deployment.concurrency_limit.at(),
                &format!("{}.concurrency_limit", deployment_of(key)),
                format!("at least min_replicas, which is {min} ({})", deployment.min_replicas.at()),
                format!("the number {max}"),
            ));
        }
        if deployment.gpu.value().is_some() && deployment.spare_replicas().0 > 0 {
            self.warnings.push(Warning {
                at: deployment.spare_replicas.at(),
                key: format!("{}.spare_replicas", deployment_of(key)),
                why: "it has no effect on a model with a GPU, which a spare replica would keep from others"
                    .to_owned(),
            });
        }
        // Inputs at once count only where they are more than a batch.
        let whole_batches = (deployment.allow_concurrent_inputs().0 / batch_size).clamp(1, 1024);
        let batches = deployment.batches_in_flight.value().map_or(whole_batches, |batches| batches.0);
        Replicas {
            min: min as usize,
            max: max as usize,
            spare: if deployment.gpu.value().is_none() { deployment.spare_replicas().0 as usize } else { 0 },
            batches_in_flight: batches as usize,
            idle_timeout: Duration::from_secs(deployment.container_idle_timeout().0),
            batch_timeout: deployment.batch_timeout_seconds().duration(),
            stream_wait: deployment.stream_wait_seconds().duration(),
            stuck_max: deployment.stuck_replicas_max().0 as usize,
            load_timeout: deployment.load_timeout_seconds().duration(),
        }
    }

    fn gpu(&mut self, deployment: &DeploymentConfig, key: &str) -> Option<Wanted> {
        let preferences: Vec<Preference> =
            deployment.gpu.value().into_iter().flat_map(|gpu| &gpu.0).map(|gpu| gpu.0.clone()).collect();
        let memory_mb = deployment.gpu_memory_mb.value().map(|memory| memory.0);
        if preferences.is_empty() {
            if memory_mb.is_some() && deployment.gpu.at() == Place::Default {
                self.faults.push(Fault::new(
                    &deployment.gpu_memory_mb.at(),
                    &format!("{}.gpu_memory_mb", deployment_of(key)),
                    "gpu beside it: the device whose memory that is, or \"any\"",
                    "gpu_memory_mb alone",
                ));
            }
            return None;
        }
        Some(Wanted { preferences, memory_mb })
    }

    fn secrets(&mut self, deployment: &DeploymentConfig, key: &str) -> Secrets {
        let names = deployment.secrets();
        let (secrets, missing, unreadable) = Secrets::find(&names, self.environment, &self.secrets_folder);
        for (name, error) in unreadable {
            let key = child(&format!("{}.secrets", deployment_of(key)), name);
            self.faults.push(Fault::unreadable(&deployment.secrets.at(), &key, &error));
        }
        for name in missing {
            let why = format!(
                "there is no secret {name:?}: neither a variable of the environment nor a file or folder in {}",
                self.secrets_folder.display()
            );
            let warning =
                Warning { at: deployment.secrets.at(), key: format!("{}.secrets", deployment_of(key)), why };
            // What the application says holds for many models, and is said once.
            if !self.warnings.iter().any(|known| (&known.at, &known.why) == (&warning.at, &warning.why)) {
                self.warnings.push(warning);
            }
        }
        secrets
    }

    fn known_volumes(&mut self, entry: &ModelEntry, key: &str) -> Option<Vec<String>> {
        let names = entry.volumes.value()?;
        let known = || self.volumes.iter().map(|volume| volume.name.as_str());
        for unknown in names.iter().filter(|name| !known().any(|known| known == *name)) {
            let expected = format!("names of volumes: {}", listed(known()));
            let fault =
                Fault::new(&entry.volumes.at(), &child(key, "volumes"), expected, format!("{unknown:?}"));
            let fault = fault.meant(unknown, known());
            self.faults.push(fault);
        }
        Some(names.clone())
    }

    fn golden(&mut self, entry: &ModelEntry, key: &str) -> Option<GoldenSpec> {
        let latency = entry.golden_latency_ms.value().map(|latency| Duration::from_millis(latency.0));
        match (entry.golden.value(), latency) {
            (Some(file), latency_max) => {
                // What stands with the model's data moves with it.
                Some(GoldenSpec { file: self.folder.join(file), latency_max })
            }
            (None, None) => None,
            (None, Some(_)) => {
                self.faults.push(Fault::new(
                    &entry.golden_latency_ms.at(),
                    &child(key, "golden_latency_ms"),
                    "golden beside it: the file of requests that are to be timed",
                    "golden_latency_ms alone",
                ));
                None
            }
        }
    }
}

/// Where a volume's files lie: of a mirrored one, each snapshot in a folder of its own.
fn folders_of(volume: &Volume) -> impl Iterator<Item = PathBuf> {
    let mirror = volume.bucket.as_ref().map(|bucket| bucket.spec.folder.clone());
    [volume.mount_point.clone()].into_iter().chain(mirror)
}

/// What is said of processes of their own, and has no effect on a pipeline in the host's.
fn python_of(written: &keys::Python) -> engine::Python {
    engine::Python {
        pipeline: written.pipeline.value().cloned().or_else(|| written.app.value().map(|app| module_of(app))),
        interpreter: written.interpreter.value().map(PathBuf::from),
        input_model: written.input_model.value().cloned(),
        output_model: written.output_model.value().cloned(),
        environment: written
            .env()
            .entries
            .iter()
            .map(|(name, (value, _))| (name.clone(), value.clone()))
            .collect(),
        threads: written.threads.value().map(|threads| threads.0 as u32),
        shim: written.shim(),
    }
}

/// The module that a file of a pipeline's folder is.
fn module_of(file: &str) -> String {
    let file = file.strip_prefix("./").unwrap_or(file);
    file.strip_suffix(".py").unwrap_or(file).replace('/', ".")
}

fn without_isolation(deployment: &DeploymentConfig, key: &str) -> Vec<Warning> {
    let mut written = Vec::new();
    let mut note = |name: &str, at: Option<Place>| written.extend(at.map(|at| (name.to_owned(), at)));
    // Of the whole application they are also what its container asks for (`modalkit deploy render`).
    if key != APPLICATION {
        note("memory", deployment.memory.value().map(|_| deployment.memory.at()));
        note("cpu", deployment.cpu.value().map(|_| deployment.cpu.at()));
    }
    note("sandbox_network", deployment.sandbox_network().then(|| deployment.sandbox_network.at()));
    note("sandbox", deployment.sandbox().then(|| deployment.sandbox.at()));
    note(
        "recycle_after_batches",
        deployment.recycle_after_batches.value().map(|_| deployment.recycle_after_batches.at()),
    );
    note("spare_replicas", (deployment.spare_replicas().0 > 0).then(|| deployment.spare_replicas.at()));
    note("recycle_after_mb", deployment.recycle_after_mb.value().map(|_| deployment.recycle_after_mb.at()));
    let warning = |(name, at): (String, Place)| Warning {
        at,
        key: format!("{}.{name}", deployment_of(key)),
        why: "it has no effect on a compiled plugin without isolation = \"process\"".to_owned(),
    };
    written.into_iter().map(warning).collect()
}

fn app_name(app: &AppSettings, environment: &Environment) -> String {
    format!("{}{}", app.app_prefix(), environment.get(POSTFIX.0).unwrap_or(POSTFIX.1))
}

/// The deployment's key for a model's, or for all.
fn deployment_of(key: &str) -> String {
    child(key, "deployment_config")
}

/// The folders of pipelines in Python that lie in no volume: each is watched like one.
fn pipelines_outside(entries: &Named<ModelEntry>, specs: &BTreeMap<String, ModelSpec>) -> Vec<Volume> {
    let mut found: BTreeMap<String, Volume> = BTreeMap::new();
    for (name, entry) in entries.iter() {
        let python = entry.python.value();
        let (Some(folder), Some(spec)) = (python.and_then(|python| python.folder.value()), specs.get(name))
        else {
            continue;
        };
        found.entry(spec.plugin.clone()).or_insert_with(|| Volume {
            name: format!("python-{}", spec.plugin),
            mount_point: folder.into(),
            watch: Watching::Fitting,
            pipeline: Some(spec.plugin.clone()),
            bucket: None,
        });
    }
    found.into_values().collect()
}

fn volumes(
    deployment: &DeploymentConfig,
    folder: Option<&PathBuf>,
    server: &keys::Server,
    mirrored: Vec<(Volume, Place)>,
    faults: &mut Vec<Fault>,
) -> Vec<Volume> {
    let key = "app_settings.deployment_config.volumes";
    let written = deployment.volumes.value().cloned().unwrap_or_default();
    let mut mounts: Vec<(PathBuf, String, Place)> =
        written.entries.into_iter().map(|(mount, (name, at))| (mount.into(), name, at)).collect();
    // A folder that a bucket is mirrored into needs no other name.
    let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    let lies_in_bucket = |folder: Option<&PathBuf>| {
        folder.map_or(!mirrored.is_empty(), |folder| {
            mirrored.iter().any(|(volume, _)| absolute(folder).starts_with(&volume.mount_point))
        })
    };
    if mounts.is_empty() && !lies_in_bucket(folder) {
        let mount = folder.cloned().unwrap_or_else(|| DEFAULT_VOLUME.into());
        mounts.push((mount, DEFAULT_VOLUME.to_owned(), Place::Default));
    }
    let mut seen: BTreeMap<&str, &Place> = BTreeMap::new();
    let of_bucket =
        |(volume, at): &(Volume, Place)| (volume.mount_point.clone(), volume.name.clone(), at.clone());
    let all: Vec<(PathBuf, String, Place)> =
        mounts.iter().cloned().chain(mirrored.iter().map(of_bucket)).collect();
    for (index, (mount, name, at)) in all.iter().enumerate() {
        let nested = |(other, ..): &&(PathBuf, String, Place)| {
            let (other, mount) = (absolute(other), absolute(mount));
            other.starts_with(&mount) || mount.starts_with(&other)
        };
        if let Some((other, ..)) = all[..index].iter().find(nested)
            && index >= mounts.len()
        {
            let expected = "a mount_point that no other volume lies in, or is";
            let found = format!("{} beside {}", mount.display(), other.display());
            faults.push(Fault::new(
                at,
                "app_settings.deployment_config.cloud_bucket_mounts",
                expected,
                found,
            ));
        }
        if let Some(first) = seen.insert(name, at) {
            let found = format!("a second volume named {name:?}; the first is at {first}");
            faults.push(Fault::new(at, key, "a name of its own for each volume", found));
        }
        if name.is_empty() || name.contains('/') {
            let expected = "folders and the names of their volumes, such as \"/mnt/models\" = \"models\"";
            faults.push(Fault::new(at, key, expected, format!("the name {name:?} for {}", mount.display())));
        }
    }
    let names: Vec<&str> = all.iter().map(|(_, name, _)| name.as_str()).collect();
    let settings = server.volumes.value().cloned().unwrap_or_default();
    for (name, (_, at)) in settings.entries.iter().filter(|(name, _)| !names.contains(&name.as_str())) {
        let expected = format!("the name of a volume in {key}: {}", listed(names.iter().copied()));
        let fault = Fault::new(at, &child("server.volumes", name), expected, format!("{name:?}"));
        faults.push(fault.meant(name, names.iter().copied()));
    }
    let watch = |name: &str| match settings.entries.get(name).and_then(|(volume, _)| volume.watch.value()) {
        None => Watching::Fitting,
        Some(Watch::Native) => Watching::Native,
        Some(Watch::Poll) => Watching::Poll,
        Some(Watch::Both) => Watching::Both,
    };
    let volume = |(mount_point, name, _): &(PathBuf, String, Place)| Volume {
        watch: watch(name),
        name: name.clone(),
        mount_point: mount_point.clone(),
        pipeline: None,
        bucket: None,
    };
    let mirrored =
        mirrored.into_iter().map(|(mirrored, _)| Volume { watch: watch(&mirrored.name), ..mirrored });
    mounts.iter().map(volume).chain(mirrored).collect()
}

fn mounts(deployment: &DeploymentConfig, faults: &mut Vec<Fault>) -> Vec<Mount> {
    let mut mounts = Vec::new();
    for (index, mount) in deployment.mounts().iter().enumerate() {
        let key = format!("app_settings.deployment_config.mounts[{index}]");
        let at = deployment.mounts.at();
        let (Some(from), Some(to)) = (mount.local_path.value(), mount.remote_path.value()) else {
            faults.push(Fault::new(&at, &key, "local_path and remote_path", "one of them at most"));
            continue;
        };
        let (from, to) = (PathBuf::from(from), PathBuf::from(to));
        if to.starts_with(&from) {
            let found = format!("{}, which lies in {}", to.display(), from.display());
            faults.push(Fault::new(&at, &key, "a remote_path outside of local_path", found));
            continue;
        }
        mounts.push(Mount { from, to, folder: mount.r#type() == MountKind::Dir });
    }
    mounts
}

fn container(app: &AppSettings, deployment: &DeploymentConfig, warnings: &mut Vec<Warning>) -> ContainerSpec {
    let build = app.build_config.value().cloned().unwrap_or_default();
    if build.image.value().is_none() && build.tag.value().is_some() {
        warnings.push(Warning {
            at: build.tag.at(),
            key: "app_settings.build_config.tag".to_owned(),
            why: "nothing follows from a tag without an image beside it".to_owned(),
        });
    }
    let base = build.image.value().map(|image| match build.tag.value() {
        Some(tag) => format!("{image}:{tag}"),
        None => image.clone(),
    });
    let amount = |amount: Option<&Amount>| amount.map(|amount| amount.0).filter(|amount| *amount > 0.0);
    let environment = build.env();
    let environment = environment.entries.into_iter().map(|(name, (value, _))| (name, value));
    ContainerSpec {
        name: app.app_prefix(),
        base,
        workdir: build.workdir().into(),
        environment: environment.collect(),
        commands: build.extra_run_commands.value().map(|commands| commands.0.clone()).unwrap_or_default(),
        region: deployment.region.value().cloned(),
        memory_mb: amount(deployment.memory.value()),
        cores: amount(deployment.cpu.value()),
        secrets: deployment.secrets(),
        secure: deployment.secure(),
    }
}

fn batch_policy(batch: &BatchConfig) -> BatchPolicy {
    BatchPolicy {
        max_batch_size: batch.max_batch_size().0 as usize,
        max_batch_cost: batch.max_batch_cost.value().map(|cost| cost.0),
        wait: match batch.wait_ms() {
            BatchWaitMs::Milliseconds(wait) => BatchWait::Fixed(Duration::from_millis(wait)),
            BatchWaitMs::Adaptive => BatchWait::Adaptive,
        },
        queue_max: batch.queue_max().0 as usize,
    }
}

fn reload_policy(deployment: &DeploymentConfig) -> ReloadPolicy {
    let interval = deployment.volume_reload_interval_seconds().0;
    ReloadPolicy {
        // Below zero it is -1, for "only on change".
        hook_interval: (interval > 0.0).then(|| Duration::from_secs_f64(interval)),
        probation: Probation {
            time: Duration::from_secs_f64(deployment.probation_seconds().0),
            batches_min: deployment.probation_batches_min().0,
            failed_share_max: deployment.probation_failed_share_max().0,
            p99_ratio_max: deployment.probation_p99_ratio_max().0,
        },
        devices: match deployment.reload_gpu() {
            ReloadGpu::Share => ReloadDevices::Share,
            ReloadGpu::Wait => ReloadDevices::Wait,
            ReloadGpu::StopFirst => ReloadDevices::StopFirst,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Faults, Loaded, load};

    fn from(text: &str) -> Result<Loaded, Faults> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("modalkit.toml");
        std::fs::write(&file, text).unwrap();
        load(&[file], &Environment::default())
    }

    #[test]
    fn a_model_overrides_the_application() {
        let loaded = from(
            "[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 5\n\
             [app_settings.deployment_config]\nconcurrency_limit = 4\ngpu = \"any\"\n\
             [model_settings.common]\ndevice = \"cpu\"\n\
             [model_settings.model_entries.digits]\nplugin = \"onnx\"\ntop_k = 3\nbatch_config = { wait_ms = 1 }\n\
             deployment_config = { allow_concurrent_inputs = 32 }\n",
        )
        .unwrap();
        let config = &loaded.config;
        let digits = &config.models["digits"];
        assert_eq!((digits.plugin.as_str(), digits.settings.json()), ("onnx", r#"{"top_k":3}"#.to_owned()));
        assert_eq!(
            (digits.batch.max_batch_size, digits.batch.wait),
            (8, BatchWait::Fixed(Duration::from_millis(1)))
        );
        assert_eq!((digits.replicas.max, digits.replicas.batches_in_flight), (4, 4));
        assert_eq!(digits.common_settings, r#"{"device":"cpu"}"#);
        assert_eq!(loaded.warnings, []);
        assert_eq!(digits.gpu.as_ref().unwrap().to_string(), "any");
        assert_eq!(config.defaults.named("echo").replicas.batches_in_flight, 1);
        assert_eq!(config.app_name, "modalkit-dev");
    }

    #[test]
    fn a_budget_that_a_single_body_can_exceed_is_refused() {
        let error = from("[server]\nbody_bytes_max = 1073741824\n").err().unwrap().to_string();
        assert!(error.contains("server.bytes_in_flight_max") && error.contains("1073741824"), "{error}");
        let both = "[server]\nbody_bytes_max = 1073741824\nbytes_in_flight_max = 1073741824\n";
        assert!(from(both).is_ok());
    }

    #[test]
    fn an_address_has_half_of_the_connections_where_nothing_is_said() {
        let server = |text: &str| from(text).unwrap().config.server.clone();
        assert_eq!(server("").connections_per_address_max, 2048);
        assert_eq!(server("[server]\nconnections_max = 1\n").connections_per_address_max, 1);
        assert_eq!(server("[server]\nconnections_per_address_max = 9\n").connections_per_address_max, 9);
    }

    #[test]
    fn state_lies_where_it_is_written_or_where_the_platform_keeps_it() {
        let folder = |variables: &[(&str, &str)]| {
            let set = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            let environment: Environment = variables.iter().map(set).collect();
            load(&[], &environment).unwrap().config.server.state_folder.display().to_string()
        };
        let (systemd, xdg, home) =
            (("STATE_DIRECTORY", "/var/lib/a:/var/lib/b"), ("XDG_STATE_HOME", "/x"), ("HOME", "/home/me"));
        assert_eq!(folder(&[systemd, xdg, home]), "/var/lib/a");
        assert_eq!(folder(&[xdg, home]), "/x/modalkit");
        assert_eq!(folder(&[("XDG_STATE_HOME", "relative"), home]), "/home/me/.local/state/modalkit");
        assert_eq!(folder(&[("HOME", "/")]), "/var/lib/modalkit");
        assert_eq!(folder(&[]), "/var/lib/modalkit");
        let loaded = from("[server]\nstate_folder = \"here/state\"\n").unwrap();
        let here = std::env::current_dir().unwrap().join("here/state");
        assert_eq!(loaded.config.server.state_folder, here);
        let rows = loaded.rows();
        let row = rows.iter().find(|row| row.key == "server.state_folder").unwrap();
        assert_eq!(row.value, format!("{:?}", here.display().to_string()));
        assert!(from("[server]\nstate_folder = \"\"\n").is_err());
    }

    #[test]
    fn only_loopback_is_served_unless_said_otherwise() {
        let error = from("[server]\nlisten = \"0.0.0.0:8000\"\n").err().unwrap().to_string();
        assert!(error.contains("server.insecure = true"), "{error}");
        assert!(from("[server]\nlisten = \"0.0.0.0:8000\"\ninsecure = true\n").is_ok());
        assert!(from("[server]\nlisten = \"[::1]:0\"\n").is_ok());
    }
}
