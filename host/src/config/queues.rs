//! From what is written of queues to brokers that can be reached. It never knows what is sent to them.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use modalkit_queue::{
    AwsCredentials, MemorySpec, ModelSpec, PluginSpec, RedisShape, RedisSpec, Spec, SqsSpec, TaskIqSpec,
};

use super::{
    ConsumeSpec, Environment, Fault, Place, QueueSpec, Secrets, Volume, Warning,
    auth::{self, DEFAULT_REGION},
    fault::listed,
    keys::{Consume, QueueBackend, QueueConfig, Root},
    layer::{Setting, child},
    types::{QueueKind, RedisType, Url},
};

const KEY: &str = "app_settings.queue_config";
/// What the Python library writes where there is no broker.
const NO_BROKER: &str = "memory://";
const REDIS: &str = "redis://127.0.0.1:6379";
/// Bytes of a message: what the brokers themselves take.
const REDIS_BYTES_MAX: usize = 512 << 20;
const SQS_BYTES_MAX: usize = 1 << 20;
/// Messages in one call of a plugin.
const PLUGIN_BATCH_MAX: usize = 256;
/// Where the Python library delivers to.
const PYTHON_DEFAULT: &str = "sqs";

/// What doesn't fit together is added to the faults.
pub(super) fn resolve(
    written: &Root,
    environment: &Environment,
    volumes: &[Volume],
    faults: &mut Vec<Fault>,
    warnings: &mut Vec<Warning>,
) -> QueueSpec {
    let app = written.app_settings();
    let config = app.queue_config();
    let mut context = Resolver { written, environment, volumes, faults, warnings };
    let entries = config.backends.value().cloned().unwrap_or_default();
    let mut backends = BTreeMap::new();
    for (name, (backend, at)) in &entries.entries {
        let key = child(&child(KEY, "backends"), name);
        if name.is_empty() || name.contains("://") || name.starts_with("http") {
            let expected = "a name for each backend, without :// and other than http and https";
            context.faults.push(Fault::new(at, &key, expected, format!("{name:?}")));
        }
        if let Some(spec) = context.backend(name, backend, (&key, at)) {
            backends.insert(name.clone(), spec);
        }
    }
    let usual = config.backend();
    let known_kind =
        QueueKind::of(&usual).filter(|kind| !matches!(kind, QueueKind::Plugin | QueueKind::Model));
    if !entries.entries.contains_key(&usual) {
        let at = config.backend.at();
        match known_kind {
            Some(kind) => {
                let url = config.broker_url.value().filter(|url| url.0 != NO_BROKER);
                if let (QueueKind::Memory, Some(url)) = (kind, url) {
                    let near = if url.0.starts_with("redis") { "redis or taskiq" } else { "sqs" };
                    let why = format!("nobody reads it: results stay in memory unless backend says {near}");
                    let at = config.broker_url.at();
                    context.warnings.push(Warning { at, key: child(KEY, "broker_url"), why });
                }
                let implied =
                    QueueBackend { broker_url: config.broker_url.clone(), ..QueueBackend::default() };
                if let Some(spec) = context.backend(&usual, &implied, (KEY, &at)) {
                    backends.insert(usual.clone(), spec);
                }
            }
            None => {
                let names = entries.entries.keys().map(String::as_str);
                let known: Vec<&str> =
                    ["memory", "redis", "sqs", "taskiq"].into_iter().chain(names).collect();
                let expected =
                    format!("one of {}, or a backend in {KEY}.backends", listed(known.iter().copied()));
                let fault = Fault::new(&at, &child(KEY, "backend"), expected, format!("{usual:?}"));
                context.faults.push(fault.meant(&usual, known.iter().copied()));
            }
        }
    } else if let Some(url) = config.broker_url.value().filter(|url| url.0 != NO_BROKER) {
        let why = format!("{KEY}.backends.{usual} says where its broker answers; {url:?} is not read");
        context.warnings.push(Warning { at: config.broker_url.at(), key: child(KEY, "broker_url"), why });
    }
    // Always there: a queue can be looked at without any broker.
    backends.entry("memory".to_owned()).or_insert_with(|| memory(&QueueBackend::default()));
    let names = context.names(&config, &backends);
    let consume = context.consume(&config, &names, &usual, &backends);
    context.dead_letter(&config, &consume, &backends);
    let allowed = config.allowed_queues.value().cloned();
    context.check_allowed(&config, &backends);
    if allowed.is_none() && names.is_empty() && !matches!(backends.get(&usual), Some(Spec::Memory(_)) | None)
    {
        let why = format!(
            "jobs may name queues in memory only: say which of {usual:?} they may name, \"*\" for all"
        );
        let at = config.backend.at();
        context.warnings.push(Warning { at, key: child(KEY, "allowed_queues"), why });
    }
    QueueSpec {
        usual,
        names,
        allowed,
        deadline: Duration::from_secs(config.delivery_deadline_seconds().0),
        dead_letter: config.dead_letter_queue.value().filter(|name| !name.is_empty()).cloned(),
        consume,
        backends,
    }
}

/// The Python library delivers to SQS where nothing is said; this host doesn't, and says so where its files are read.
pub(super) fn warn_of_the_default(written: &Root, is_yaml: bool, warnings: &mut Vec<Warning>) {
    let config = written.app_settings().queue_config();
    let says_nothing = matches!(config.backend.at(), Place::Default);
    // The library has no file without one, and this host has no use for it.
    let of_the_library = written.app_settings().build_config.value().is_some();
    if is_yaml && of_the_library && says_nothing {
        let why = format!(
            "results are kept in memory where nothing is said; the Python library delivers to {PYTHON_DEFAULT}: write backend = \"{PYTHON_DEFAULT}\" for that"
        );
        warnings.push(Warning { at: Place::Default, key: child(KEY, "backend"), why });
    }
}

struct Resolver<'a> {
    written: &'a Root,
    environment: &'a Environment,
    volumes: &'a [Volume],
    faults: &'a mut Vec<Fault>,
    warnings: &'a mut Vec<Warning>,
}

impl Resolver<'_> {
    fn backend(&mut self, name: &str, backend: &QueueBackend, (key, at): (&str, &Place)) -> Option<Spec> {
        let kind = backend.kind.value().copied().or_else(|| QueueKind::of(name));
        let Some(kind) = kind else {
            let expected = format!("kind, which is {}", QueueKind::expected());
            self.faults.push(Fault::new(
                at,
                &child(key, "kind"),
                expected,
                "none, and a name that is no kind",
            ));
            return None;
        };
        Some(match kind {
            QueueKind::Memory => memory(backend),
            QueueKind::Redis => Spec::Redis(self.redis(backend, key)?),
            QueueKind::TaskIq => Spec::TaskIq(TaskIqSpec {
                redis: self.redis(backend, key)?,
                task: backend.task(),
                tasks: named(backend.tasks.value()),
            }),
            QueueKind::Sqs => Spec::Sqs(self.sqs(backend, key)?),
            QueueKind::Model => Spec::Model(ModelSpec {
                model: backend.model.value().cloned().unwrap_or_else(|| name.to_owned()),
            }),
            QueueKind::Plugin => {
                let folder = PathBuf::from(self.written.server().secrets_folder());
                let names = backend.secrets();
                let (secrets, missing, unreadable) = Secrets::find(&names, self.environment, &folder);
                for (name, error) in unreadable {
                    let key = child(&child(key, "secrets"), name);
                    self.faults.push(Fault::unreadable(&backend.secrets.at(), &key, &error));
                }
                for name in missing {
                    let why = format!("there is no secret {name:?}");
                    self.warnings.push(Warning { at: backend.secrets.at(), key: child(key, "secrets"), why });
                }
                Spec::Plugin(PluginSpec {
                    name: name.to_owned(),
                    plugin: backend.plugin.value().cloned().unwrap_or_else(|| name.to_owned()),
                    sha256: backend.plugin_sha256.value().map(|digest| digest.0.clone()),
                    folders: self.volumes.iter().map(|volume| volume.mount_point.clone()).collect(),
                    settings: backend.settings().0.json().to_string(),
                    secrets: secrets.values().clone(),
                    batch_max: PLUGIN_BATCH_MAX,
                })
            }
        })
    }

    /// Where a broker answers, as one of these schemes.
    fn url(&mut self, url: Option<&Url>, key: &str, at: &Place, schemes: &[&str]) -> Option<Option<String>> {
        let Some(url) = url.filter(|url| url.0 != NO_BROKER) else { return Some(None) };
        if schemes.iter().any(|scheme| url.0.starts_with(&format!("{scheme}://"))) {
            return Some(Some(url.0.clone()));
        }
        let expected = format!("an address that begins with {}", listed(schemes.iter().copied()));
        self.faults.push(Fault::new(at, &child(key, "broker_url"), expected, format!("{url:?}")));
        None
    }

    fn redis(&mut self, backend: &QueueBackend, key: &str) -> Option<RedisSpec> {
        let at = backend.broker_url.at();
        let url =
            self.url(backend.broker_url.value(), key, &at, &["redis", "rediss", "unix", "redis+unix"])?;
        Some(RedisSpec {
            url: url.unwrap_or_else(|| REDIS.to_owned()),
            username: backend.username.value().cloned(),
            password: backend.password.value().map(|secret| secret.0.clone()),
            ca: backend.ca.value().map(PathBuf::from),
            shape: match backend.redis_type() {
                RedisType::List => RedisShape::List,
                RedisType::Stream => RedisShape::Stream,
            },
            stream_length_max: backend.stream_length_max.value().map(|length| length.0),
            message_bytes_max: backend
                .message_bytes_max
                .value()
                .map_or(REDIS_BYTES_MAX, |bytes| bytes.0 as usize),
            // The host puts its own name here.
            consumer: String::new(),
        })
    }

    fn sqs(&mut self, backend: &QueueBackend, key: &str) -> Option<SqsSpec> {
        let at = backend.broker_url.at();
        let endpoint = self.url(backend.broker_url.value(), key, &at, &["http", "https"])?;
        let app = self.written.app_settings();
        let region =
            backend.region.value().cloned().or_else(|| app.deployment_config().region.value().cloned());
        let region = region.or_else(|| self.environment.get("AWS_REGION").map(ToOwned::to_owned));
        let credentials = match (backend.access_key_id.value(), backend.secret_access_key.value()) {
            (Some(key_id), Some(secret)) => Some(AwsCredentials {
                key_id: key_id.0.clone(),
                secret: secret.0.clone(),
                token: backend.session_token.value().map(|token| token.0.clone()),
            }),
            (None, None) => None,
            (one, _) => {
                let (there, missing) = if one.is_some() {
                    ("access_key_id", "secret_access_key")
                } else {
                    ("secret_access_key", "access_key_id")
                };
                let at =
                    if one.is_some() { backend.access_key_id.at() } else { backend.secret_access_key.at() };
                let fault = Fault::new(
                    &at,
                    &child(key, there),
                    format!("{missing} beside it"),
                    format!("{there} alone"),
                );
                self.faults.push(fault);
                return None;
            }
        };
        Some(SqsSpec {
            endpoint,
            region: region.unwrap_or_else(|| DEFAULT_REGION.to_owned()),
            credentials,
            ca: backend.ca.value().map(PathBuf::from),
            message_bytes_max: backend
                .message_bytes_max
                .value()
                .map_or(SQS_BYTES_MAX, |bytes| bytes.0 as usize),
            create_missing: backend.create_missing(),
        })
    }

    /// Lists of queues that may be named, of all callers and of single keys: each leads to a backend that there is.
    fn check_allowed(&mut self, config: &QueueConfig, backends: &BTreeMap<String, Spec>) {
        let auth = self.written.app_settings().auth_config.value().cloned().unwrap_or_default();
        let of_keys = auth
            .keys
            .value()
            .into_iter()
            .flat_map(|keys| &keys.entries)
            .map(|(name, (key, _))| (child(&child(auth::KEY, "keys"), name), &key.allowed_queues));
        for (key, list) in std::iter::once((KEY.to_owned(), &config.allowed_queues)).chain(of_keys) {
            for (index, entry) in list.value().into_iter().flatten().enumerate() {
                let key = format!("{}[{index}]", child(&key, "allowed_queues"));
                let backend = entry.split_once("://").map(|(backend, _)| backend);
                let is_known = |backend: &str| {
                    backend.starts_with("http") || backend.contains('*') || backends.contains_key(backend)
                };
                if entry.is_empty() || backend.is_some_and(|backend| !is_known(backend)) {
                    let known: Vec<&str> = backends.keys().map(String::as_str).collect();
                    let expected = format!(
                        "a queue, or BACKEND://QUEUE with one of the backends {}, or *",
                        listed(known.iter().copied())
                    );
                    self.faults.push(Fault::new(&list.at(), &key, expected, format!("{entry:?}")));
                }
            }
        }
    }

    fn names(&mut self, config: &QueueConfig, backends: &BTreeMap<String, Spec>) -> BTreeMap<String, String> {
        let names = config.queues.value().cloned().unwrap_or_default();
        for (queue, (backend, at)) in &names.entries {
            if !backends.contains_key(backend) {
                let key = child(&child(KEY, "queues"), queue);
                let known: Vec<&str> = backends.keys().map(String::as_str).collect();
                let expected = format!("a backend: {}", listed(known.iter().copied()));
                let fault = Fault::new(at, &key, expected, format!("{backend:?}"));
                self.faults.push(fault.meant(backend, known.iter().copied()));
            }
        }
        named(Some(&names))
    }

    fn consume(
        &mut self,
        config: &QueueConfig,
        names: &BTreeMap<String, String>,
        usual: &str,
        backends: &BTreeMap<String, Spec>,
    ) -> Vec<ConsumeSpec> {
        let at = config.consume.at();
        let (mut specs, mut seen) = (Vec::new(), Vec::new());
        for (index, consume) in config.consume().iter().enumerate() {
            let key = format!("{KEY}.consume[{index}]");
            let (Some(queue), Some(model)) = (consume.queue.value(), consume.model.value()) else {
                self.faults.push(Fault::new(&at, &key, "queue and model", "one of them at most"));
                continue;
            };
            let backend = match queue.split_once("://") {
                Some(("http" | "https", _)) | None => names.get(queue).map_or(usual, String::as_str),
                Some((backend, _)) => backend,
            };
            let can_be_taken_from = match backends.get(backend) {
                Some(Spec::Redis(redis)) => redis.shape == RedisShape::Stream,
                Some(Spec::Sqs(_)) => true,
                _ => false,
            };
            if !can_be_taken_from {
                let expected = "a queue of SQS, or a stream of Redis (redis_type = \"stream\")";
                self.faults.push(Fault::new(
                    &at,
                    &child(&key, "queue"),
                    expected,
                    format!("{queue:?} of {backend:?}"),
                ));
            }
            let of_broker = (backend.to_owned(), queue.rsplit("://").next().unwrap_or(queue).to_owned());
            if seen.contains(&of_broker) {
                let expected = "each queue once: two would take each other's messages";
                self.faults.push(Fault::new(
                    &at,
                    &child(&key, "queue"),
                    expected,
                    format!("{queue:?} again"),
                ));
            }
            seen.push(of_broker);
            specs.push(consumed(consume, queue, model));
        }
        specs
    }

    /// A queue for what is no request must be there, and must not be one that requests are taken from.
    fn dead_letter(
        &mut self,
        config: &QueueConfig,
        consume: &[ConsumeSpec],
        backends: &BTreeMap<String, Spec>,
    ) {
        let Some(queue) = config.dead_letter_queue.value() else { return };
        let (at, key) = (config.dead_letter_queue.at(), child(KEY, "dead_letter_queue"));
        if consume.iter().any(|consume| consume.queue == *queue) {
            let found = format!("{queue:?}, from which requests are taken");
            self.faults.push(Fault::new(&at, &key, "another queue than those in consume", found));
        }
        if let Some((backend, _)) = queue.split_once("://")
            && !backend.starts_with("http")
            && !backends.contains_key(backend)
        {
            let known: Vec<&str> = backends.keys().map(String::as_str).collect();
            let expected = format!("a queue of one of the backends {}", listed(known.iter().copied()));
            self.faults.push(Fault::new(&at, &key, expected, format!("{queue:?}")));
        }
    }
}

fn consumed(consume: &Consume, queue: &str, model: &str) -> ConsumeSpec {
    ConsumeSpec {
        queue: queue.to_owned(),
        model: model.to_owned(),
        in_flight_max: consume.in_flight_max().0 as usize,
        visibility: Duration::from_secs(consume.visibility_seconds().0),
    }
}

fn memory(backend: &QueueBackend) -> Spec {
    Spec::Memory(MemorySpec {
        messages_max: backend.messages_max().0 as usize,
        bytes_max: backend.bytes_max().0 as usize,
    })
}

fn named(names: Option<&super::types::Named<String>>) -> BTreeMap<String, String> {
    let entries = names.into_iter().flat_map(super::types::Named::iter);
    entries.map(|(name, value)| (name.to_owned(), value.clone())).collect()
}
