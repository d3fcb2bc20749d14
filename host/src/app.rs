//! The composition root: chooses the engine, puts the parts together and takes them apart in order. It never knows what they do.

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use modalkit_device::Devices;
use modalkit_engine::{Engine, Isolation, LoadError, OpenTimings, Plugin, PluginLog};
use modalkit_journal::FolderLock;
pub use modalkit_loader::abi;
use modalkit_loader::{Libraries, Preflight, Settings, Trust};
use modalkit_worker::{Program, Workers, child::Loader};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
};

use crate::{
    access::{self, Access, Keys},
    audit::Audit,
    buckets,
    config::{Loaded, Server, Sources, Volume},
    death_note::DeathNote,
    identity,
    ingress::{self, Certificate, Context, ManagementSocket},
    insight::{
        log::{self, LogLevels},
        metrics::Metrics,
        traces::Traces,
    },
    jobs::{self, Jobs},
    models::Models,
    mounts,
    queues::{self, Queues},
    reconfigure,
    reload::Reload,
    work::Gate,
};

/// How long threads get to leave after the last answer: plugins close files and devices meanwhile.
const LEAVE_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(2);

/// How long answers that are being written get, after the last one was made.
const WRITE_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(5);

/// Between two looks at devices' free memory and utilisation.
const BETWEEN_LOOKS_AT_DEVICES: std::time::Duration = std::time::Duration::from_secs(5);

/// This very program, even where its file has been replaced since it started.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// The argument that makes this program the preflight's child.
const PREFLIGHT_COMMAND: &str = "preflight";

/// The argument that makes this program a worker.
const WORKER_COMMAND: &str = "worker";

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Everything that was admitted was answered.
    Drained,
    /// `drain_timeout_seconds` passed first.
    CutOff,
    /// A device failed in a way that lasts until the process ends; what could be answered was.
    DeviceLost,
}

/// Serves until `stop` is ready, then drains. With `set_journal_aside` a journal that can't be read doesn't keep it from starting. The
/// configuration is read again when its files change and at each hang-up, and
/// applied as far as it can be without a restart.
///
/// # Errors
/// The address is taken, or the private folder for plugins can't be made.
pub async fn run(
    sources: Sources,
    loaded: Loaded,
    log: LogLevels,
    set_journal_aside: bool,
    hang_ups: mpsc::Receiver<()>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<Ended> {
    let loaded = Arc::new(loaded);
    let config = loaded.config.clone();
    let files = loaded.snapshot.names();
    let files = if files.is_empty() { "none".to_owned() } else { files.join(", ") };
    tracing::info!(files, "the configuration was read");
    loaded.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    mounts::put_in_place(&config.mounts).await;
    let server = config.server.clone();
    install_cryptography();
    let certificate = server.tls.clone().map(Certificate::read).transpose()?;
    let listener = bind(server.listen).await?;
    let address = listener.local_addr()?;

    let traces = match &server.traces {
        Some(spec) => Traces::export(spec, &config.app_name)?,
        None => Traces::default(),
    };
    let metrics = Metrics::new(traces.clone());
    let models = Arc::new(Models::default());
    let all_models = Arc::clone(&models);
    let gate = Gate::new(config.requests_max);
    let engine = engine(&server, Some(PluginLog { level: log::plugin_level, sink: log::plugin_line }))?;
    let context = modalkit_queue::BackendContext {
        open_plugin: queue_opener(Arc::clone(&engine), config.volumes.clone()),
        open_model: queues::opener(Arc::clone(&models)),
    };
    if set_journal_aside {
        jobs::set_aside_if_damaged(&server.state_folder)?;
    }
    // First: a host that is refused it changes nothing in it.
    let state_folder = FolderLock::take(&server.state_folder).map_err(journal_error)?;
    let death_note = DeathNote::open(&server.state_folder);
    let queues = Queues::open(&config.queues.named(&identity::host_name(&state_folder)?), &context)?;
    let context = jobs::JobsContext {
        models: Arc::clone(&models),
        gate: Arc::clone(&gate),
        queues: Arc::clone(&queues),
        metrics: Arc::clone(&metrics),
        death: death_note.death().clone(),
    };
    tracing::info!(folder = %server.state_folder.display(), "accepted jobs are kept here");
    let jobs = Jobs::open(state_folder, server.jobs, context).map_err(journal_error)?;
    // Once the journal has counted the last one, and before any job runs.
    note_death(death_note);
    // After the journal: whoever holds its lock is the only host of this state folder.
    let socket = server.management_socket.as_deref().map(ManagementSocket::bind).transpose()?;
    let consumed = config.queues.consume.clone();
    let devices = tokio::task::spawn_blocking(Devices::find).await?;
    tell_of(&devices);
    let lowers = Arc::clone(&engine);
    let (mirrors, buckets) =
        buckets::start(&config.volumes, &metrics, move || lowers.lower_thread_priority())?;
    let (reload, control) = Reload::start(
        config,
        engine,
        Arc::clone(&models),
        Arc::clone(&metrics),
        Arc::clone(&devices),
        &mirrors,
    )?;
    let access = Access::new(loaded.config.auth.clone(), metrics.calls_by_key.clone());
    let (keys, specs) = Keys::new(Arc::clone(&access), loaded.config.auth.clone());
    let running = reconfigure::Running {
        control: control.clone(),
        models: Arc::clone(&models),
        gate: Arc::clone(&gate),
        keys,
        log,
    };
    let (reconfigure, configuration) = reconfigure::prepare(sources, loaded, running);
    let of_consumers = Arc::clone(&metrics);
    let audit: Arc<Audit> = Arc::default();
    let context = Context::new(
        server.clone(),
        Arc::clone(&access),
        Arc::clone(&audit),
        Arc::clone(&gate),
        models,
        Arc::clone(&jobs),
        metrics,
        Arc::clone(&devices),
        buckets,
        control,
        configuration,
    );
    let (shut_down, shutdown) = watch::channel(false);
    let (take_no_more, takes_no_more) = watch::channel(false);
    let (finish, finished) = watch::channel(false);
    let mut consumers = JoinSet::new();
    for spec in consumed {
        consumers.spawn(ingress::queue_consumer::run(
            spec,
            Arc::clone(&jobs),
            Arc::clone(&of_consumers),
            takes_no_more.clone(),
            finished.clone(),
        ));
    }
    let scheme = if certificate.is_some() { "https" } else { "http" };
    let acceptor = certificate.as_ref().map(Certificate::acceptor);
    let url = format!("{scheme}://{address}");
    let socket = socket.map(|socket| socket.serve(Arc::clone(&context), url.clone())).transpose()?;
    let listener = ingress::Listener::new(listener, context, acceptor)?;
    let serving = tokio::spawn(listener.serve(shutdown));
    let follow = async {
        match certificate {
            Some(certificate) => certificate.follow().await,
            None => std::future::pending().await,
        }
    };
    let management_socket = server.management_socket.as_ref().map(|path| path.display().to_string());
    tracing::info!(%address, url, management_socket, "listening");

    let mut lost = devices.lost();
    // Everything else goes on meanwhile.
    let stop_after_delay = async {
        stop.await;
        if !server.drain_delay.is_zero() {
            tracing::info!(delay = ?server.drain_delay, "not ready any more; the drain begins after server.drain_delay_seconds");
            gate.leave_soon();
            tokio::time::sleep(server.drain_delay).await;
        }
    };
    tokio::select! {
        never = reconfigure.run(hang_ups) => match never {},
        never = follow => match never {},
        never = access::refresh(access, specs) => match never {},
        never = queues.watch() => match never {},
        never = watch_devices(&devices) => match never {},
        never = audit.run() => match never {},
        () = stop_after_delay => {}
        _ = lost.wait_for(Option::is_some) => {
            tracing::error!("a device is lost: this host drains and ends, to be started again by its supervisor");
        }
    }

    let begun = Instant::now();
    tracing::info!(inside = gate.inside(), limit = ?server.drain_timeout, "shutting down");
    gate.close();
    let _ = take_no_more.send(true);
    // Durable jobs whose batches haven't begun leave the models' queues, and stay in the journal.
    jobs.drain().await;
    // After these and the gate: nothing comes any more that a batch could wait for.
    all_models.drain();
    let lost = lost.borrow().is_some();
    if !lost {
        // The accept loop ends and closes the port; connections end with the request they are in.
        let _ = shut_down.send(true);
    }
    let drained = tokio::time::timeout(server.drain_timeout, gate.emptied()).await.is_ok();
    // Who asks why a host with a lost device takes nothing more is told so, as long as something is inside.
    let _ = shut_down.send(true);
    let (threads, connections) = serving.await?;
    if !drained {
        tracing::warn!(inside = gate.inside(), "drain_timeout_seconds passed; what is inside is cut off");
    }
    // What was taken from queues and has ended is acknowledged; the rest comes again.
    let _ = finish.send(true);
    let acknowledged = async { while consumers.join_next().await.is_some() {} };
    if tokio::time::timeout(LEAVE_TIME_MAX, acknowledged).await.is_err() {
        tracing::warn!("requests from queues were not acknowledged in time; they come again");
    }
    // What was answered last may be on its way to a slow reader; and who waits for a reload hears that it is over.
    let written = tokio::time::timeout(WRITE_TIME_MAX.min(server.drain_timeout), connections.closed());
    let left = tokio::time::timeout(LEAVE_TIME_MAX, reload.stop());
    let (_, left) = tokio::join!(written, left);
    if left.is_err() {
        tracing::warn!("threads that run plugin code did not leave; the process ends with them");
    }
    drop(threads);
    // After the pipelines have ended, which may have written files.
    mirrors.stop().await;
    // Whoever manages could look and ask until here.
    if let Some(socket) = socket {
        socket.stop().await;
    }
    audit.flush();
    // What has ended is written; a disk that hangs doesn't keep the host.
    let closing = tokio::task::spawn_blocking(move || jobs.close());
    if tokio::time::timeout(LEAVE_TIME_MAX, closing).await.is_err() {
        tracing::warn!("the journal was not closed in time; the next start takes it as it is");
    }
    // It waits for the collector, at most for a named time; a pool that is full of hung work doesn't keep the host.
    let _ = tokio::time::timeout(LEAVE_TIME_MAX, tokio::task::spawn_blocking(move || traces.stop())).await;
    tracing::info!(took = ?begun.elapsed(), drained, "stopped");
    if lost {
        return Ok(Ended::DeviceLost);
    }
    Ok(if drained { Ended::Drained } else { Ended::CutOff })
}

fn tell_of(devices: &Devices) {
    if let Some(why) = devices.why_none() {
        tracing::info!(why, "no GPU");
    }
    for device in devices.all() {
        tracing::info!(
            device = device.ordinal,
            name = device.name,
            uuid = device.uuid,
            memory_bytes = device.memory_bytes,
            compute_capability = device.compute_capability,
            pci_address = device.pci_address,
            "GPU"
        );
    }
}

/// Keeps what is known of devices' memory and work up to date.
async fn watch_devices(devices: &Arc<Devices>) -> Infallible {
    if devices.all().is_empty() {
        return std::future::pending().await;
    }
    loop {
        let looking = Arc::clone(devices);
        // A look that failed is made up for by the next; one that hangs ends them.
        let _ = tokio::task::spawn_blocking(move || looking.look()).await;
        tokio::time::sleep(BETWEEN_LOOKS_AT_DEVICES).await;
    }
}

/// What takes plugin files: libraries, which are opened in this process, or in worker processes where a model is isolated.
///
/// # Errors
/// The private folder for their copies can't be made.
pub fn engine(server: &Server, log: Option<PluginLog>) -> Result<Arc<dyn Engine>, LoadError> {
    let libraries = Libraries::new(Settings {
        trust: Trust { any_owner: server.plugins_of_any_owner, any_mode: server.plugins_of_any_mode },
        preflight: Preflight {
            program: THIS_PROGRAM.into(),
            argument: PREFLIGHT_COMMAND,
            limit: server.preflight_timeout,
        },
        libraries_max: server.generations_max,
        log,
    })?;
    let program = Program { path: THIS_PROGRAM.into(), argument: WORKER_COMMAND };
    Ok(Arc::new(Workers::new(Arc::new(libraries), program, server.preflight_timeout, log)))
}

/// What a worker process does, with what the host has put on its command line: its exit code.
///
/// # Errors
/// The system refuses what every worker needs.
pub fn worker(host: i32, connections: usize, cgroup: Option<PathBuf>) -> io::Result<u8> {
    keep_freed_memory();
    let loader = Loader {
        open: |copy, file, log| {
            modalkit_loader::open_in_place(copy, file, log).map_err(|error| error.chain())
        },
        note_endings: modalkit_loader::ending::note_all,
    };
    let ended = modalkit_worker::child::run(host, connections, cgroup, loader);
    mark_end_planned();
    ended
}

/// What opens queue plugins.
fn queue_opener(engine: Arc<dyn Engine>, volumes: Vec<Volume>) -> modalkit_queue::OpenPlugin {
    Arc::new(move |file, pin| {
        let is_from_bucket = |volume: &&Volume| !volume.takes_any_plugin() && volume.holds(file);
        match volumes.iter().find(is_from_bucket).filter(|_| pin.is_none()) {
            Some(volume) => Err(format!(
                "{} lies in a bucket (volume {:?}), and nobody names its content; expected plugin_sha256 in the backend, or plugins_from_buckets = true for the mount",
                file.display(),
                volume.name
            )),
            None => engine.open_queue(file, pin).map_err(|error| error.chain()),
        }
    })
}

/// Opens a plugin as a host would, in a process of its own first, where it has the content that is pinned; the file is not served.
///
/// # Errors
/// Why a host would not take it.
pub fn inspect(
    file: &Path,
    pin: Option<&str>,
    isolation: &Isolation,
    server: &Server,
    log: Option<PluginLog>,
) -> Result<Arc<dyn Plugin>, LoadError> {
    // Without a log, a plugin that panics says so on standard error.
    let engine = engine(server, log)?;
    let staged = engine.stage(file)?;
    staged.check_pin(pin, "the model's entry")?;
    engine.open(&staged, isolation, &mut OpenTimings::default())
}

/// What the child process does that tries a library: opens it, and says in a line how that went.
#[must_use]
pub fn preflight(file: &Path) -> String {
    modalkit_loader::preflight_child(file)
}

/// Has the allocator keep some of the memory that was freed, as a process wants that serves.
pub fn keep_freed_memory() {
    modalkit_loader::keep_freed_memory();
}

/// From here on an end of this process by plugin code is logged, and its exit code is not 0.
///
/// # Errors
/// The system takes no signal handler.
pub fn watch_endings() -> io::Result<()> {
    modalkit_loader::ending::watch()
}

/// Has the end of this process noted, should plugin code bring it about.
fn note_death(note: DeathNote) {
    match note.begin() {
        // For the rest of the process: a handler of signals writes into it.
        Ok(file) => modalkit_loader::ending::note_threads(Box::leak(Box::new(file))),
        Err(error) => {
            tracing::warn!(%error, "how this host ends can't be noted; a job that ends it is found later");
        }
    }
}

/// The process ends because it is meant to.
pub fn mark_end_planned() {
    modalkit_loader::ending::planned();
}

/// For connections that this program opens itself.
pub fn install_cryptography() {
    // Another may have been installed before by whoever runs it.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A journal that can't be read may hold jobs that were accepted: going on without it is for people to decide.
fn journal_error(error: modalkit_journal::OpenError) -> anyhow::Error {
    let hint = match &error {
        modalkit_journal::OpenError::Damaged { .. } => Some(
            "it may hold jobs that were accepted; `modalkit serve --set-journal-aside` renames it and begins an empty one",
        ),
        modalkit_journal::OpenError::InUse(_) => {
            Some("server.state_folder, or MODALKIT_SERVER__STATE_FOLDER")
        }
        _ => None,
    };
    match hint {
        Some(hint) => anyhow::anyhow!("{error}; {hint}"),
        None => anyhow::Error::new(error),
    }
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        anyhow::Error::new(error).context(format!(
            "can't listen on {address}; choose another with server.listen or MODALKIT_SERVER__LISTEN"
        ))
    })
}
