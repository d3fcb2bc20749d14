//! A model by its name: what callers see of it while generations and replicas come and go. It owns where the model stands, which one
//! writer says, and never decides it.

use std::{sync::Arc, time::SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use modalkit_device::Devices;
use serde::Serialize;

use super::{Fleet, Generation, Queue};
use crate::{
    config::ModelSpec,
    insight::metrics::{Metrics, ModelMetrics},
    work::JobError,
};

/// A model by its name.
pub struct Model {
    /// Its name.
    pub name: String,
    /// When this host first knew of it.
    pub created: SystemTime,
    /// Its jobs.
    pub queue: Arc<Queue>,
    /// Its metrics.
    pub metrics: Arc<ModelMetrics>,
    /// What its replicas may lease.
    pub devices: Arc<Devices>,
    spec: ArcSwap<ModelSpec>,
    serving: ArcSwapOption<Generation>,
    status: ArcSwap<Status>,
}

/// Where a model stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Status {
    /// No volume holds its plugin yet.
    Waiting {
        /// The file that is waited for.
        expected: String,
    },
    /// Its plugin is being opened or its first replica loaded.
    Loading,
    /// It serves.
    Ready,
    /// Its plugin was refused, or its pipeline didn't load.
    Failed {
        /// Why, and what to do.
        reason: String,
    },
    /// Too many threads hang in batches, loads or hooks that overran their time.
    Stuck {
        /// How many, and what to do.
        reason: String,
    },
    /// It was unloaded.
    Removed,
    /// The host is shutting down.
    Stopping,
}

/// The only handle that changes what serves: the status, the generation that takes jobs, and whether the queue is open.
pub struct StatusWriter(Arc<Model>);

impl Status {
    /// That of a model which has no plugin yet.
    #[must_use]
    pub fn waiting(spec: &ModelSpec) -> Self {
        Self::Waiting { expected: format!("{}.so", spec.plugin) }
    }

    /// That of a model which would need a device that is lost.
    #[must_use]
    pub fn lost_device() -> Self {
        Self::Failed { reason: "its device is lost until this host has been started again".to_owned() }
    }
}

impl Model {
    /// A model whose plugin hasn't been found yet, and the one who says where it stands.
    #[must_use]
    pub fn new(spec: ModelSpec, metrics: &Metrics, devices: Arc<Devices>) -> (Arc<Self>, StatusWriter) {
        let metrics = Arc::new(metrics.model(&spec.name));
        let model = Arc::new(Self {
            queue: Arc::new(Queue::new(spec.batch, Arc::clone(&metrics))),
            metrics,
            devices,
            serving: ArcSwapOption::empty(),
            status: ArcSwap::from_pointee(Status::waiting(&spec)),
            name: spec.name.clone(),
            created: SystemTime::now(),
            spec: ArcSwap::from_pointee(spec),
        });
        let writer = StatusWriter(Arc::clone(&model));
        (model, writer)
    }

    /// How it is served now. A generation keeps what it was loaded with.
    #[must_use]
    pub fn spec(&self) -> Arc<ModelSpec> {
        self.spec.load_full()
    }

    /// Serves it like this from now on: its batches at once, its replicas as they come and go. What its pipeline is loaded with
    /// reaches generations that are loaded later.
    pub fn respec(&self, spec: ModelSpec) {
        self.queue.set_policy(spec.batch);
        self.spec.store(Arc::new(spec));
    }

    /// The generation that takes jobs now.
    ///
    /// # Errors
    /// [`JobError::Unavailable`], with the reason.
    pub fn serving(&self) -> Result<Arc<Generation>, JobError> {
        self.serving.load_full().ok_or_else(|| {
            let name = &self.name;
            JobError::Unavailable(match &*self.status() {
                Status::Waiting { expected } => {
                    format!("the model {name} waits for its plugin {expected} in a volume")
                }
                Status::Loading | Status::Ready => format!("the model {name} is loading"),
                Status::Failed { .. } => {
                    format!(
                        "the model {name} could not be loaded; the host's log and `modalkit models {name}` say why"
                    )
                }
                Status::Stuck { .. } => {
                    format!("the model {name} hangs; the host's log and `modalkit models {name}` say where")
                }
                Status::Removed => format!("the model {name} was unloaded"),
                Status::Stopping => "the server is shutting down".to_owned(),
            })
        })
    }

    /// Where it stands.
    #[must_use]
    pub fn status(&self) -> Arc<Status> {
        self.status.load_full()
    }

    /// Answers the jobs that nobody will run.
    fn fail_waiting(&self) {
        for job in self.queue.close() {
            job.reply.send(Err(JobError::Unavailable(format!("the model {} stopped serving", self.name))));
        }
    }
}

impl StatusWriter {
    /// Says where the model stands; jobs are taken while that is [`Status::Ready`], for which there is a generation. To say the same again
    /// changes nothing.
    pub fn publish(&self, status: Status, generation: Option<&Arc<Generation>>) {
        let model = &*self.0;
        let ready = status == Status::Ready;
        let generation = generation.filter(|_| ready);
        let is_same = model.serving.load().as_ref().map(Arc::as_ptr) == generation.map(Arc::as_ptr);
        if is_same && *model.status() == status {
            return;
        }
        if ready {
            // Open first: who finds a generation finds the queue open, and who is told that it is ready finds a generation.
            model.queue.open();
            model.serving.store(generation.cloned());
        }
        model.metrics.ready.set(i64::from(ready));
        model.status.store(Arc::new(status));
        if !ready {
            model.serving.store(None);
            model.fail_waiting();
        }
    }

    /// Lets a fleet take the jobs from now on, and the one before no more: at once for all lanes, so that nobody who was
    /// answered by the new one is answered by the old one afterwards.
    pub fn swap(&self, from: Option<&Fleet>, to: &Fleet) {
        self.0.queue.update_lane_states(|| {
            if let Some(from) = from {
                from.generation.set_serves(false);
            }
            to.generation.set_serves(true);
        });
        self.0.metrics.replicas.set(to.replicas() as i64);
        self.publish(Status::Ready, Some(&to.generation));
    }
}
