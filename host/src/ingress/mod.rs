//! From the outside world to jobs: connections, routes, bodies and the predict endpoints. It never knows how a batch is
//! run, and leaves statuses to egress.

mod body;
mod connection;
pub mod consume;
mod envelope;
mod follow;
mod io_threads;
mod jobs;
mod manage;
mod pages;
mod predict;
mod request;
mod routes;
mod socket;
mod timer;
mod tls;

use std::sync::Arc;

use modalkit_device::Devices;
use tokio::{runtime::Handle, sync::Semaphore};

use crate::{
    access::Access, admission::Gate, audit::Audit, config::Server, dispatch::Models, jobs::Jobs, reconfigure,
    reload::Control, telemetry::Metrics,
};

pub use connection::Listener;
use pages::PageRules;
use request::RequestIds;
pub use socket::{ManagementSocket, Serving, SocketError};
pub use tls::{Certificate, TlsError};

/// What every request needs.
pub struct Context {
    /// Limits and timeouts.
    pub server: Server,
    /// Who may call.
    pub access: Arc<Access>,
    /// Who did what, and who was refused.
    pub audit: Arc<Audit>,
    /// Who may enter.
    pub gate: Arc<Gate>,
    /// Who answers.
    pub models: Arc<Models>,
    /// Asynchronous jobs.
    pub jobs: Arc<Jobs>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// The GPUs.
    pub devices: Arc<Devices>,
    /// Where changes of plugins are asked for.
    pub control: Control,
    /// The configuration in force, and where a new look at it is asked for.
    pub configuration: reconfigure::Handle,
    pages: PageRules,
    ids: RequestIds,
    /// Where large inputs are parsed.
    blocking: Handle,
    /// Large inputs that are parsed at once: as many as there are cores.
    decoding: Arc<Semaphore>,
}

impl Context {
    /// Puts it together. The runtime it is called on parses large inputs.
    #[must_use]
    #[expect(clippy::too_many_arguments, reason = "the composition root names each part once")]
    pub fn new(
        server: Server,
        access: Arc<Access>,
        audit: Arc<Audit>,
        gate: Arc<Gate>,
        models: Arc<Models>,
        jobs: Arc<Jobs>,
        metrics: Arc<Metrics>,
        devices: Arc<Devices>,
        control: Control,
        configuration: reconfigure::Handle,
    ) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Arc::new(Self {
            pages: PageRules::new(&server),
            server,
            access,
            audit,
            gate,
            models,
            jobs,
            metrics,
            devices,
            control,
            configuration,
            ids: RequestIds::new(),
            blocking: Handle::current(),
            decoding: Arc::new(Semaphore::new(cores)),
        })
    }
}
