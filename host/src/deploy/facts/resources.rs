//! How much a pod needs, and by what pods are added: sums over the models. It knows no manifest.

use serde::Serialize;

use super::secrets::SecretVariable;
use crate::config::{Loaded, ModelSpec};

const REDIS_PORT: u16 = 6379;
const STATE_GIB_MIN: u64 = 2;
const GIB: u64 = 1 << 30;

/// What a pod asks for, of all models with as many replicas as they keep.
#[derive(Default)]
pub(super) struct Needs {
    pub(super) gpus: u64,
    pub(super) memory_bytes: u64,
    pub(super) cores: f64,
}

pub(super) fn needs(loaded: &Loaded) -> Needs {
    let config = &loaded.config;
    let all: Vec<&ModelSpec> =
        if config.models.is_empty() { vec![&config.defaults] } else { config.models.values().collect() };
    let mut needs = Needs::default();
    let mut shares = false;
    for spec in all {
        let replicas = spec.replicas.min.max(1) as u64;
        if let Some(wanted) = &spec.gpu {
            let count = wanted.preferences.iter().map(|one| one.count).max().unwrap_or(1) as u64;
            match wanted.memory_mb {
                None => needs.gpus += count * replicas,
                // Those that say how much memory they need share a device.
                Some(_) => shares = true,
            }
        }
        needs.memory_bytes += spec.isolation.confinement.memory_bytes.unwrap_or_default() * replicas;
        needs.cores += spec.isolation.confinement.cores.unwrap_or_default() * replicas as f64;
    }
    needs.gpus += u64::from(shares);
    needs
}

/// Room for accepted jobs, with some beside.
pub(super) fn state_storage(loaded: &Loaded) -> String {
    let bytes = loaded.config.server.jobs.bytes_max;
    format!("{}Gi", (bytes + bytes / 4).div_ceil(GIB).saturating_add(1).max(STATE_GIB_MIN))
}

/// A queue whose length adds pods.
#[derive(Clone, Debug, Serialize)]
pub(in crate::deploy) struct QueueFacts {
    /// KEDA's name of its kind.
    kind: &'static str,
    queue: String,
    /// Requests that one pod takes at once.
    length: usize,
    /// `host:port` of Redis.
    address: Option<String>,
    database: Option<String>,
    tls: bool,
    /// The variable of the pods with its password.
    password: Option<String>,
    region: Option<String>,
}

pub(super) fn queues(loaded: &Loaded, variables: &[SecretVariable]) -> Vec<QueueFacts> {
    let spec = &loaded.config.queues;
    let consumed = spec.consume.iter().filter_map(|consumed| {
        let (backend, queue) = spec.parts_of(&consumed.queue);
        let facts = QueueFacts {
            kind: "redis-streams",
            queue: queue.to_owned(),
            length: consumed.in_flight_max,
            address: None,
            database: None,
            tls: false,
            password: None,
            region: None,
        };
        match spec.backends.get(backend)? {
            modalkit_queue::Spec::Redis(redis) => {
                let (scheme, rest) = redis.url.split_once("://")?;
                let place = rest.rsplit('@').next().unwrap_or(rest);
                let (address, database) =
                    place.split_once('/').map_or((place, ""), |(address, rest)| (address, rest));
                let address = match address.rsplit_once(':') {
                    Some((_, port)) if port.parse::<u16>().is_ok() => address.to_owned(),
                    _ => format!("{address}:{REDIS_PORT}"),
                };
                let own = format!("BACKENDS__{}__PASSWORD", backend.to_uppercase());
                let password = variables.iter().find(|variable| variable.variable.ends_with(&own));
                Some(QueueFacts {
                    address: Some(address),
                    database: Some(database.to_owned())
                        .filter(|database| !database.is_empty() && database != "0"),
                    tls: scheme == "rediss",
                    password: password.map(|variable| variable.variable.clone()),
                    ..facts
                })
            }
            modalkit_queue::Spec::Sqs(sqs) => {
                Some(QueueFacts { kind: "aws-sqs-queue", region: Some(sqs.region.clone()), ..facts })
            }
            _ => None,
        }
    });
    consumed.collect()
}
