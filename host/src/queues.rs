//! Which queue's name leads to which broker, and how each broker is. It owns the adapters, and never knows what is sent.

use std::{collections::BTreeMap, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::join_all};
use modalkit_queue::{Backend, BackendContext, Memory, Message, QueueError, open};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::time::timeout;

use crate::config::QueueSpec;

mod allowed;
mod of_model;

pub use allowed::Allowed;
pub use of_model::opener;

/// The longest that a broker may take for one call.
const CALL_TIME_MAX: Duration = Duration::from_secs(30);
/// Between two looks at a broker that isn't used.
const BETWEEN_CHECKS: Duration = Duration::from_secs(15);
/// Bytes of a queue's name.
const NAME_BYTES_MAX: usize = 1024;

/// The brokers of this host.
pub struct Queues {
    spec: QueueSpec,
    backends: BTreeMap<String, Broker>,
}

struct Broker {
    adapter: Arc<dyn Backend>,
    /// What went wrong last, by what was done: one that answers may still refuse to be sent to.
    faults: Mutex<BTreeMap<&'static str, QueueError>>,
}

/// A queue, found by its name.
#[derive(Clone)]
pub struct Route {
    /// The backend's name.
    pub backend: Arc<str>,
    /// The queue's name, as the broker knows it.
    pub queue: String,
    /// The broker.
    pub adapter: Arc<dyn Backend>,
}

/// A name that leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RouteError(String);

/// How a broker is.
#[derive(Clone, Debug, Serialize)]
pub struct Fault {
    /// What happened.
    pub error: String,
    /// Whether it doesn't let this host in, which only somebody can mend.
    pub denied: bool,
}

impl Queues {
    /// Makes the adapters; none connects yet.
    ///
    /// # Errors
    /// One can't ever be used as it is configured.
    pub fn open(spec: &QueueSpec, context: &BackendContext) -> anyhow::Result<Arc<Self>> {
        let backend = |(name, backend)| {
            let adapter = open(backend, context)
                .map_err(|error| anyhow::Error::new(error).context(format!("the queue backend {name:?}")))?;
            Ok((String::clone(name), Broker { adapter, faults: Mutex::default() }))
        };
        let backends = spec.backends.iter().map(backend).collect::<anyhow::Result<_>>()?;
        Ok(Arc::new(Self { spec: spec.clone(), backends }))
    }

    /// Of a host with no broker but its own memory.
    #[cfg(test)]
    pub fn of_nobody() -> Arc<Self> {
        Arc::new(Self { spec: QueueSpec::default(), backends: BTreeMap::new() })
    }

    /// Finds the broker of a queue: `BACKEND://QUEUE`, a name from `queue_config.queues`, or any other for the usual backend.
    ///
    /// # Errors
    /// It names a backend that there isn't.
    pub fn route(&self, name: &str) -> Result<Route, RouteError> {
        let known = || self.backends.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        if name.len() > NAME_BYTES_MAX {
            return Err(RouteError(format!("expected at most {NAME_BYTES_MAX} bytes, found {}", name.len())));
        }
        let (backend, queue) = self.spec.parts_of(name);
        if queue.is_empty() || queue.contains('\0') {
            return Err(RouteError(format!("expected a queue's name, found {name:?}")));
        }
        match self.backends.get_key_value(backend) {
            Some((backend, broker)) => Ok(Route {
                backend: backend.as_str().into(),
                queue: queue.to_owned(),
                adapter: Arc::clone(&broker.adapter),
            }),
            None => Err(RouteError(format!(
                "there is no queue backend {backend:?}; expected one of {} (app_settings.queue_config)",
                known()
            ))),
        }
    }

    /// Sends messages, in order; one result each.
    pub async fn send(&self, route: &Route, messages: &[Message]) -> Vec<Result<(), QueueError>> {
        let sent = AssertUnwindSafe(timeout(CALL_TIME_MAX, route.adapter.send(&route.queue, messages)));
        let mut results = match sent.catch_unwind().await {
            Ok(Ok(results)) => results,
            Ok(Err(_)) => vec![Err(no_answer()); messages.len()],
            Err(_) => vec![
                Err(QueueError::Unavailable("the host failed over it; see its log".to_owned()));
                messages.len()
            ],
        };
        // Whatever an adapter says, each message has its result.
        results.resize(messages.len(), Err(no_answer()));
        let fault = results.iter().find_map(|result| match result {
            Err(error @ (QueueError::Unavailable(_) | QueueError::Denied(_))) => Some(error.clone()),
            _ => None,
        });
        self.note(&route.backend, "send", fault);
        results
    }

    /// Notes how a broker is to whoever does something, and says so where that has changed.
    pub fn note(&self, backend: &str, doing: &'static str, fault: Option<QueueError>) {
        let Some(broker) = self.backends.get(backend) else { return };
        let mut faults = broker.faults.lock();
        let known = faults.get(doing);
        match (known, &fault) {
            (None, Some(QueueError::Denied(error))) => {
                tracing::error!(
                    backend,
                    doing,
                    error,
                    "the queue backend does not let this host in; results wait in the journal"
                );
            }
            (None, Some(error)) => {
                tracing::warn!(backend, doing, %error, "the queue backend can't be used; results wait in the journal");
            }
            (Some(_), None) => tracing::info!(backend, doing, "the queue backend can be used again"),
            _ => {}
        }
        match fault {
            Some(fault) => drop(faults.insert(doing, fault)),
            None => drop(faults.remove(doing)),
        }
    }

    /// How the brokers are that aren't well.
    #[must_use]
    pub fn faults(&self) -> BTreeMap<String, Fault> {
        let fault = |(name, broker): (&String, &Broker)| {
            let faults = broker.faults.lock();
            let denied = faults.values().find(|fault| matches!(fault, QueueError::Denied(_)));
            let fault = denied.or_else(|| faults.values().next())?;
            Some((name.clone(), Fault { error: fault.to_string(), denied: denied.is_some() }))
        };
        self.backends.iter().filter_map(fault).collect()
    }

    /// Looks at the brokers now and then, for ever: one that refuses is known of before the first result.
    pub async fn watch(&self) -> std::convert::Infallible {
        let check = async |(name, broker): (&String, &Broker)| {
            let checked = timeout(CALL_TIME_MAX, broker.adapter.check()).await;
            self.note(name, "check", checked.unwrap_or_else(|_| Err(no_answer())).err());
        };
        loop {
            // At once: one that hangs hides no other.
            join_all(self.backends.iter().map(check)).await;
            tokio::time::sleep(BETWEEN_CHECKS).await;
        }
    }

    /// The queues that are kept in this process.
    pub fn memories(&self) -> impl Iterator<Item = (&str, &Memory)> {
        self.backends.iter().filter_map(|(name, broker)| Some((name.as_str(), broker.adapter.memory()?)))
    }

    /// The queue for messages that are no requests.
    #[must_use]
    pub fn dead_letter(&self) -> Option<&str> {
        self.spec.dead_letter.as_deref()
    }

    /// How long a message is tried to be delivered.
    #[must_use]
    pub fn deadline(&self) -> Duration {
        self.spec.deadline
    }
}

fn no_answer() -> QueueError {
    QueueError::Unavailable(format!("no answer within {CALL_TIME_MAX:?}"))
}
