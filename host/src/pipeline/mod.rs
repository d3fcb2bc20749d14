//! Served models: a generation (a loaded plugin with a model's settings), its replicas (instances with threads that run
//! stages) and the fleet that keeps as many of them as are wanted. It never knows HTTP, nor where a plugin came from.

mod batch_stats;
mod fleet;
mod generation;
mod golden;
mod input_faults;
mod order;
mod queue;
mod replica;
mod scale;
mod settings;
mod walk;

use std::sync::Arc;

use arc_swap::{ArcSwap, ArcSwapOption};
use modalkit_device::Devices;
use serde::Serialize;

use crate::{
    config::ModelSpec,
    insight::metrics::{Metrics, ModelMetrics},
    work::JobError,
};

pub use batch_stats::StatsSnapshot;
pub use fleet::{Fleet, Progress, examine};
pub use generation::{Generation, SharedInstance};
pub use golden::{Golden, GoldenError};
pub use input_faults::malformed;
pub use order::{Leases, VolumeChange};
pub use queue::{Lane, LaneState, Load, Queue, Queued, Taken, too_many};
pub use settings::check_settings;

/// A model by its name: what callers see of it while generations and replicas come and go.
pub struct Model {
    /// Its name.
    pub name: String,
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

impl Model {
    /// A model whose plugin hasn't been found yet.
    #[must_use]
    pub fn new(spec: ModelSpec, metrics: &Metrics, devices: Arc<Devices>) -> Arc<Self> {
        let metrics = Arc::new(metrics.model(&spec.name));
        let expected = format!("{}.so", spec.plugin);
        Arc::new(Self {
            queue: Arc::new(Queue::new(spec.batch, Arc::clone(&metrics))),
            metrics,
            devices,
            serving: ArcSwapOption::empty(),
            status: ArcSwap::from_pointee(Status::Waiting { expected }),
            name: spec.name.clone(),
            spec: ArcSwap::from_pointee(spec),
        })
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

    /// Says where it stands; jobs are taken while that is [`Status::Ready`].
    pub fn set_status(&self, status: Status, generation: Option<&Arc<Generation>>) {
        let ready = status == Status::Ready;
        if ready {
            // Open first: who finds a generation finds the queue open, and who is told that it is ready finds a generation.
            self.queue.open();
            self.serving.store(generation.cloned());
        }
        self.metrics.ready.set(i64::from(ready));
        self.status.store(Arc::new(status));
        if !ready {
            self.serving.store(None);
            self.fail_waiting();
        }
    }

    /// Lets a fleet take the jobs from now on, and the one before no more: at once for all lanes, so that nobody who was
    /// answered by the new one is answered by the old one afterwards.
    pub fn swap(&self, from: Option<&Fleet>, to: &Fleet) {
        self.queue.update_lane_states(|| {
            if let Some(from) = from {
                from.generation.set_serves(false);
            }
            to.generation.set_serves(true);
        });
        self.metrics.replicas.set(to.replicas() as i64);
        self.set_status(Status::Ready, Some(&to.generation));
    }

    /// Answers the jobs that nobody will run.
    fn fail_waiting(&self) {
        for job in self.queue.close() {
            job.reply.send(Err(JobError::Unavailable(format!("the model {} stopped serving", self.name))));
        }
    }
}
