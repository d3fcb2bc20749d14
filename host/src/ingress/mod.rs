//! From the outside world to jobs: connections, routes, bodies and the predict endpoints. It never knows how a batch is
//! run, and leaves statuses to egress.

mod body;
mod connection;
pub mod consume;
mod envelope;
mod exchange;
mod follow;
mod front;
mod io_threads;
mod io_watch;
mod jobs;
mod manage;
mod outgoing;
mod pages;
mod places;
mod predict;
mod request;
mod routes;
mod socket;
mod timer;
mod tls;
mod write_limit;

use std::sync::Arc;

use modalkit_device::Devices;
use tokio::{runtime::Handle, sync::Semaphore};

use crate::{
    access::Access,
    admission::{Budget, Gate},
    audit::Audit,
    config::Server,
    dispatch::Models,
    jobs::Jobs,
    reconfigure,
    reload::Control,
    telemetry::Metrics,
};

pub use front::Listener;
use pages::PageRules;
use request::RequestIds;
pub use socket::{ManagementSocket, Serving, SocketError};
pub use tls::{Certificate, TlsError};

/// Inputs that are parsed at once on the blocking pool, of all models together. Plugins that hang there hold their threads until they
/// come back: the pool must have more.
pub const DECODES_MAX: usize = 256;

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
    /// Bytes in flight.
    pub budget: Budget,
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
    /// Inputs that are parsed there at once.
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
        Arc::new(Self {
            pages: PageRules::new(&server),
            budget: Budget::new(server.bytes_in_flight_max),
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
            decoding: Arc::new(Semaphore::new(DECODES_MAX)),
        })
    }
}
