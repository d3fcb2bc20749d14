//! From connections to jobs: connections, routes, bodies, the predict endpoints, management, and requests from queues. It never knows how a batch is
//! run, and leaves the statuses of job errors to egress.

mod body;
mod connection;
mod connection_slots;
mod content_coding;
mod cors;
mod cross_site;
mod docs_page;
mod endpoints;
mod envelope;
mod exchange;
mod grpc;
mod grpc_text;
mod io_threads;
mod io_watchdog;
mod jobs;
mod lingering_close;
mod listener;
mod management;
mod management_socket;
mod openapi;
mod peer;
mod predict;
mod query;
pub mod queue_consumer;
mod refusal;
mod request_headers;
mod request_timings;
mod response_body;
mod router;
mod task_models;
mod ticks;
mod timer;
mod tls;
mod v2;
mod write_limit;

use std::sync::Arc;

use modalkit_device::Devices;
use tokio::{runtime::Handle, sync::Semaphore};

use crate::{
    access::Access,
    audit::Audit,
    buckets::Buckets,
    config::Server,
    insight::metrics::Metrics,
    jobs::Jobs,
    models::Models,
    reconfigure,
    reload::Control,
    work::{Budget, Gate},
};

use cors::Cors;
use cross_site::PageRules;
pub use listener::Listener;
pub use management_socket::{ManagementSocket, Serving, SocketError};
use request_headers::RequestIds;
pub use tls::{Certificate, TlsError};

/// Inputs that are parsed at once on the blocking pool, of all models together. Plugins that hang there hold their threads until they
/// come back: the pool must have more.
pub const DECODES_MAX: usize = 256;

/// What every request needs.
pub struct Context {
    /// Limits and timeouts.
    pub server: Server,
    /// Access control.
    pub access: Arc<Access>,
    /// The audit log.
    pub audit: Arc<Audit>,
    /// The limit on requests in flight, and the drain.
    pub gate: Arc<Gate>,
    /// The limit on bytes in flight.
    pub budget: Arc<Budget>,
    /// The served models.
    pub models: Arc<Models>,
    /// Asynchronous jobs.
    pub jobs: Arc<Jobs>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// The GPUs.
    pub devices: Arc<Devices>,
    /// The mirrors of buckets.
    pub buckets: Arc<Buckets>,
    /// Takes orders to the reload loop.
    pub control: Control,
    /// The configuration in force; it takes requests to read it again.
    pub configuration: reconfigure::Handle,
    pages: PageRules,
    cors: Cors,
    openapi: openapi::Cache,
    ids: RequestIds,
    /// Where large inputs are parsed.
    blocking: Handle,
    /// Inputs that are parsed there at once.
    decoding: Arc<Semaphore>,
    /// Bodies that are compressed or decompressed there at once: as many as there are cores.
    coding: Arc<Semaphore>,
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
        buckets: Arc<Buckets>,
        control: Control,
        configuration: reconfigure::Handle,
    ) -> Arc<Self> {
        Arc::new(Self {
            pages: PageRules::new(&server),
            cors: Cors::new(&server),
            budget: Arc::new(Budget::new(server.bytes_in_flight_max)),
            server,
            access,
            audit,
            gate,
            models,
            jobs,
            metrics,
            devices,
            buckets,
            control,
            configuration,
            openapi: openapi::Cache::default(),
            ids: RequestIds::new(),
            blocking: Handle::current(),
            decoding: Arc::new(Semaphore::new(DECODES_MAX)),
            coding: Arc::new(Semaphore::new(
                std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            )),
        })
    }
}
