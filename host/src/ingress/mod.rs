//! From the outside world to jobs: connections, routes, bodies and the predict endpoints. It never knows how a batch is
//! run, and leaves statuses to egress.

mod body;
mod connection;
mod envelope;
mod io_threads;
mod manage;
mod predict;
mod request;
mod routes;
mod timer;

use std::sync::Arc;

use tokio::{runtime::Handle, sync::Semaphore};

use crate::{
    admission::Gate, config::Server, dispatch::Models, jobs::Jobs, reload::Control, telemetry::Metrics,
};

pub use connection::Listener;
use request::RequestIds;

/// What every request needs.
pub struct Context {
    /// Limits and timeouts.
    pub server: Server,
    /// Who may enter.
    pub gate: Arc<Gate>,
    /// Who answers.
    pub models: Arc<Models>,
    /// Asynchronous jobs.
    pub jobs: Arc<Jobs>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Where changes are asked for.
    pub control: Control,
    ids: RequestIds,
    /// Where large inputs are parsed.
    blocking: Handle,
    /// Large inputs that are parsed at once: as many as there are cores.
    decoding: Arc<Semaphore>,
}

impl Context {
    /// Puts it together. The runtime it is called on parses large inputs.
    #[must_use]
    pub fn new(
        server: Server,
        gate: Arc<Gate>,
        models: Arc<Models>,
        jobs: Arc<Jobs>,
        metrics: Arc<Metrics>,
        control: Control,
    ) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Arc::new(Self {
            server,
            gate,
            models,
            jobs,
            metrics,
            control,
            ids: RequestIds::new(),
            blocking: Handle::current(),
            decoding: Arc::new(Semaphore::new(cores)),
        })
    }
}
