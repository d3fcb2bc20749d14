//! The mirrors of a process: their threads, and how each is asked. What one does is its task's.

mod request;
mod task;
mod write_back;

use std::{sync::Arc, time::Duration};

use parking_lot::RwLock;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    error::MirrorError,
    snapshot::Snapshots,
    spec::{BucketSpec, Credentials},
    status::{Counters, Status},
};
use request::Request;
use task::Task;

pub use request::Synced;

/// Threads that fetch, for all mirrors together.
const THREADS: usize = 2;
/// Requests that wait; all are answered by the next listing.
const REQUESTS_MAX: usize = 64;
/// How long mirrors may take to end, with what goes up last.
const STOP_TIME_MAX: Duration = Duration::from_secs(8);

/// All mirrors of a process, with the threads that they share.
pub struct Mirrors {
    mirrors: Vec<Mirror>,
    runtime: Option<tokio::runtime::Runtime>,
}

/// One mirror, running.
pub struct Mirror {
    /// Its volume's name.
    pub name: String,
    requests: mpsc::Sender<Request>,
    status: watch::Receiver<Status>,
    shown: Arc<RwLock<()>>,
}

impl Mirrors {
    /// Starts a mirror for each specification, with what reads its credentials and what counts for it, on threads that begin with `on_thread_start`.
    /// Whatever is wrong with a bucket is tried again; only the host's own folder must be usable.
    ///
    /// # Errors
    /// A mirror's own folder, or its mount point, can't be used; or threads can't be started.
    pub fn start(
        specs: Vec<(BucketSpec, Credentials, Arc<dyn Counters>)>,
        on_thread_start: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, MirrorError> {
        if specs.is_empty() {
            return Ok(Self { mirrors: Vec::new(), runtime: None });
        }
        // Before there are threads: a runtime can't be dropped where this is called.
        let mut opened = Vec::new();
        for (spec, credentials, counters) in specs {
            let shown = Arc::new(RwLock::new(()));
            opened.push((Snapshots::open(&spec, Arc::clone(&shown))?, shown, spec, credentials, counters));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("bucket")
            .on_thread_start(on_thread_start)
            .enable_all()
            .build()
            .map_err(crate::error::local("start threads for", "buckets"))?;
        let mut mirrors = Vec::new();
        for (snapshots, shown, spec, credentials, counters) in opened {
            let (requests, requested) = mpsc::channel(REQUESTS_MAX);
            let (publish, status) = watch::channel(Status::default());
            mirrors.push(Mirror { name: spec.name.clone(), requests, status, shown });
            let task = Task::new(spec, credentials, counters, snapshots, publish);
            runtime.spawn(task.run(requested));
        }
        Ok(Self { mirrors, runtime: Some(runtime) })
    }

    /// The mirrors.
    #[must_use]
    pub fn all(&self) -> &[Mirror] {
        &self.mirrors
    }

    /// Ends them: what was written here goes up, within a limit.
    pub async fn stop(mut self) {
        let stopping = self.mirrors.drain(..).map(|mirror| async move {
            let (reply, stopped) = oneshot::channel();
            if mirror.requests.send(Request::Stop(reply)).await.is_ok() {
                // One that has ended says nothing.
                let _ = stopped.await;
            }
        });
        let all = futures_util::future::join_all(stopping.collect::<Vec<_>>());
        // A disk that hangs doesn't keep the host.
        if tokio::time::timeout(STOP_TIME_MAX, all).await.is_err() {
            tracing::warn!(
                "the mirrors of buckets did not end in time; the next start goes on from what they left"
            );
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Mirrors {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A runtime may not wait for itself, and a process that ends needs no order.
            runtime.shutdown_background();
        }
    }
}

impl Mirror {
    /// How it is, now and at each change.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Held to read while somebody looks through the folder: no snapshot takes another's place meanwhile.
    #[must_use]
    pub fn shown(&self) -> Arc<RwLock<()>> {
        Arc::clone(&self.shown)
    }

    /// What asks for a listing now, whenever that is wanted.
    #[must_use]
    pub fn handle(&self) -> SyncHandle {
        SyncHandle(self.requests.clone())
    }
}

/// Asks a mirror for a listing.
#[derive(Clone)]
pub struct SyncHandle(mpsc::Sender<Request>);

impl SyncHandle {
    /// Lists the prefix now, and waits until what it holds is shown.
    ///
    /// # Errors
    /// Why that isn't shown, or that the host is going away.
    pub async fn sync(&self) -> Result<Synced, String> {
        let (reply, synced) = oneshot::channel();
        let ended = || "the mirror has ended".to_owned();
        self.0.send(Request::Sync(reply)).await.map_err(|_| ended())?;
        synced.await.unwrap_or_else(|_| Err(ended()))
    }
}

#[cfg(test)]
pub(crate) use task::tests;
