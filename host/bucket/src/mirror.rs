//! One loop a mirror: list, fetch, show, and what was written here goes up. It owns the order of these; each is done elsewhere.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    error::MirrorError,
    fetch::{FetchError, Fetcher, bytes_there, forget_others},
    listing::{Listing, Object, list},
    local::{below, differences, is_finished},
    manifest::{Entry, Stamp},
    progress::Progress,
    snapshot::Snapshots,
    spec::{BucketSpec, Credentials},
    status::{Counters, Status},
    store::Store,
    upload::{Uploaded, upload},
};

/// Between two looks for files that were written here.
const LOCAL_INTERVAL: Duration = Duration::from_secs(2);
/// At most this share of the time is spent on such looks: one over many files takes longer.
const LOCAL_INTERVAL_RATIO: u32 = 20;
/// Bytes of the disk that are left to others.
const FREE_BYTES_MIN: u64 = 64 << 20;
/// After a failure the next try comes earlier than the next listing, and later after each further one.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Objects that were written longer ago than this are not being uploaded beside others now; clocks may differ by that much.
const SETTLED_AGE: Duration = Duration::from_secs(300);
/// Times that objects may change while they are fetched, until the rest of what is shown goes on without the change.
const ROUNDS_MAX: usize = 20;
/// Threads that fetch, for all mirrors together.
const THREADS: usize = 2;
/// Requests that wait; all are answered by the next listing.
const REQUESTS_MAX: usize = 64;
/// How long files that were written here may take to go up when the process ends; the rest goes up when it starts again.
const LAST_UPLOADS_TIME_MAX: Duration = Duration::from_secs(5);

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

/// What a requested listing led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Synced {
    /// The snapshot that is shown now.
    pub snapshot: u64,
    /// Objects that were fetched for it.
    pub fetched: usize,
    /// Objects that it has no more.
    pub removed: usize,
}

type SyncReply = oneshot::Sender<Result<Synced, String>>;

enum Request {
    Sync(SyncReply),
    Stop(oneshot::Sender<()>),
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
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("bucket")
            .on_thread_start(on_thread_start)
            .enable_all()
            .build()
            .map_err(crate::error::local("start threads for", "buckets"))?;
        let mut mirrors = Vec::new();
        for (spec, credentials, counters) in specs {
            let shown = Arc::new(RwLock::new(()));
            let snapshots = Snapshots::open(&spec, Arc::clone(&shown))?;
            let (requests, requested) = mpsc::channel(REQUESTS_MAX);
            let (publish, status) = watch::channel(Status::default());
            mirrors.push(Mirror { name: spec.name.clone(), requests, status, shown });
            let task = Task {
                spec,
                credentials,
                counters,
                store: None,
                snapshots: Arc::new(Mutex::new(snapshots)),
                status: publish,
                write_back: WriteBack::default(),
            };
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
        futures_util::future::join_all(stopping.collect::<Vec<_>>()).await;
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

struct Task {
    spec: BucketSpec,
    credentials: Credentials,
    counters: Arc<dyn Counters>,
    store: Option<Store>,
    /// Locked by threads that may block.
    snapshots: Arc<Mutex<Snapshots>>,
    status: watch::Sender<Status>,
    write_back: WriteBack,
}

/// What a mirror remembers of files that were written here.
#[derive(Default)]
struct WriteBack {
    /// Since when each has been as it is.
    still: BTreeMap<String, (Stamp, Instant)>,
    failures: u32,
    /// When a failed one is tried again.
    again: Option<Instant>,
    /// What was told of it.
    told: Option<String>,
}

/// What a listing asks for, beside what is shown.
struct Plan {
    /// What the next snapshot has, as far as it is there.
    files: BTreeMap<String, Entry>,
    /// What has to be fetched.
    wanted: BTreeMap<String, Object>,
    /// Objects that the next snapshot has no more.
    removed: usize,
    /// Something is shown.
    shows: bool,
}

/// Why a mirror's rest is over.
enum Rested {
    Due,
    Asked(SyncReply),
    Stopped(oneshot::Sender<()>),
}

impl Task {
    async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        self.tell_found();
        let mut waiting: Vec<SyncReply> = Vec::new();
        loop {
            // Whoever asked before the listing begins is answered by it; who asks meanwhile, by the next one.
            let asked = std::mem::take(&mut waiting);
            let outcome = tokio::select! {
                outcome = self.pass() => outcome,
                stop = collect(&mut requests, &mut waiting) => return self.end(stop).await,
            };
            let failures = self.tell(&outcome);
            let said = outcome.map_err(|error| error.to_string());
            for reply in asked {
                // Whoever asked may have left.
                let _ = reply.send(said.clone());
            }
            if !waiting.is_empty() {
                continue;
            }
            match self.rest(self.pause(failures), &mut requests).await {
                Rested::Due => {}
                Rested::Asked(reply) => waiting.push(reply),
                Rested::Stopped(stop) => return self.end(stop).await,
            }
        }
    }

    /// Lists the prefix, and shows what it holds.
    async fn pass(&mut self) -> Result<Synced, MirrorError> {
        let store = self.open_store()?;
        let begun = Instant::now();
        self.on_snapshots(|snapshots| snapshots.remove_replaced(false)).await?;
        let mut listing = list(&store, &self.spec).await?;
        let mut listed = Instant::now();
        let mut fetched: BTreeMap<String, (Object, Option<PathBuf>)> = BTreeMap::new();
        let mut changes = 0;
        let plan = loop {
            let mut plan = self.plan(&listing).await?;
            if plan.wanted.is_empty() && plan.removed == 0 && plan.shows {
                self.status.send_modify(|status| status.confirmed = Some(listed));
                let snapshot = self.status.borrow().snapshot;
                return Ok(Synced { snapshot, fetched: 0, removed: 0 });
            }
            let is_there = |path: &String, object: &Object| {
                fetched.get(path).is_some_and(|(fetched, _)| fetched.is_same(object))
            };
            let all = plan.wanted.clone();
            plan.wanted.retain(|path, object| !is_there(path, object));
            match self.fetch(&store, &plan.wanted, &all).await {
                Ok(files) => fetched.extend(
                    files
                        .into_iter()
                        .filter_map(|(path, file)| Some((path.clone(), (all.get(&path)?.clone(), file)))),
                ),
                Err(FetchError::Failed(error)) => return Err(error),
                Err(FetchError::Changed(path)) => {
                    changes += 1;
                    if changes > ROUNDS_MAX {
                        return Err(MirrorError::Changing(format!("{path:?}")));
                    }
                    listing = list(&store, &self.spec).await?;
                    listed = Instant::now();
                    continue;
                }
            }
            plan.wanted = all;
            if self.is_settled(&listing, &plan) || begun.elapsed() >= self.spec.settle_timeout {
                break plan;
            }
            // Half an upload isn't shown: a second listing has to show the same.
            tokio::time::sleep_until((listed + self.spec.settle).into()).await;
            let again = list(&store, &self.spec).await?;
            if again.is_same(&listing) {
                break plan;
            }
            (listing, listed) = (again, Instant::now());
        };
        self.show(plan, fetched, listed, begun).await
    }

    async fn show(
        &mut self,
        plan: Plan,
        fetched: BTreeMap<String, (Object, Option<PathBuf>)>,
        listed: Instant,
        begun: Instant,
    ) -> Result<Synced, MirrorError> {
        let Plan { mut files, wanted, removed, .. } = plan;
        files.extend(
            wanted.iter().map(|(path, object)| (path.clone(), Entry { object: object.clone(), stamp: None })),
        );
        // What was fetched and isn't wanted any more stays where it is, to be forgotten.
        let of_wanted = fetched.into_iter().filter(|(path, _)| wanted.contains_key(path));
        let paths = of_wanted.filter_map(|(path, (_, file))| Some((path, file?))).collect();
        let (change, number, (objects, bytes)) = self
            .on_snapshots(move |snapshots| {
                let change = snapshots.show(files, &paths)?;
                Ok((change, snapshots.current.as_ref().map_or(0, |current| current.number), snapshots.size()))
            })
            .await?;
        for path in &change.conflicts {
            self.tell_conflict(path);
        }
        self.status.send_modify(|status| {
            status.snapshot = number;
            status.shown_at = Some(SystemTime::now());
            (status.objects, status.bytes) = (objects, bytes);
            status.confirmed = Some(listed);
        });
        tracing::info!(
            volume = self.spec.name,
            snapshot = number,
            objects,
            bytes,
            fetched = wanted.len(),
            removed,
            took = ?begun.elapsed(),
            "the mirror shows what the bucket has"
        );
        Ok(Synced { snapshot: number, fetched: wanted.len(), removed })
    }

    /// The store with the credentials as they are now.
    fn open_store(&mut self) -> Result<Store, MirrorError> {
        let secret = (self.credentials)().map_err(MirrorError::Setup)?;
        match &self.store {
            Some(store) if store.secret == secret => Ok(store.clone()),
            _ => {
                let store = Store::open(&self.spec, secret)?;
                self.store = Some(store.clone());
                Ok(store)
            }
        }
    }

    /// Holds a listing against what is shown.
    async fn plan(&self, listing: &Listing) -> Result<Plan, MirrorError> {
        let (read_only, volume) = (self.spec.read_only, self.spec.name.clone());
        let listing = listing.clone();
        self.on_snapshots(move |snapshots| {
            let Some(current) = &snapshots.current else {
                return Ok(Plan { files: BTreeMap::new(), wanted: listing.0, removed: 0, shows: false });
            };
            let found = differences(&current.folder, &current.manifest)
                .map_err(crate::error::local("look through", &current.folder))?;
            if let (true, Some(path)) = (read_only, found.written.keys().next()) {
                tracing::warn!(
                    volume,
                    path,
                    files = found.written.len(),
                    "files were written below a mount that is read only: they are replaced by what the bucket has"
                );
            }
            let is_lost = |path: &String| {
                found.missing.contains(path) || read_only && found.written.contains_key(path)
            };
            let (mut files, mut wanted) = (BTreeMap::new(), BTreeMap::new());
            let known = &current.manifest.files;
            let removed = known.keys().filter(|path| !listing.0.contains_key(*path)).count();
            for (path, object) in listing.0 {
                match known.get(&path).filter(|entry| entry.object.is_same(&object) && !is_lost(&path)) {
                    Some(entry) => drop(files.insert(path, Entry { object, stamp: entry.stamp })),
                    None => drop(wanted.insert(path, object)),
                }
            }
            Ok(Plan { files, wanted, removed, shows: true })
        })
        .await
    }

    /// Fetches what isn't there; `all` is what will be put in place together, of which nothing is forgotten.
    async fn fetch(
        &self,
        store: &Store,
        wanted: &BTreeMap<String, Object>,
        all: &BTreeMap<String, Object>,
    ) -> Result<BTreeMap<String, Option<PathBuf>>, FetchError> {
        let (incoming, free, folder) = {
            let mut snapshots = self.snapshots.lock();
            let incoming = snapshots.incoming();
            forget_others(&incoming, all);
            let bytes: u64 = wanted.values().map(|object| object.bytes).sum();
            let needed = bytes.saturating_sub(bytes_there(&incoming, wanted)) + FREE_BYTES_MIN;
            let mut free = snapshots.free_bytes()?;
            if free < needed {
                snapshots.remove_replaced(true)?;
                free = snapshots.free_bytes()?;
            }
            (incoming, (free, needed), snapshots.folder().to_owned())
        };
        if free.0 < free.1 {
            return Err(MirrorError::NoSpace { needed: free.1, free: free.0, folder }.into());
        }
        let progress = Progress::new(wanted.len() as u64, wanted.values().map(|object| object.bytes).sum());
        let (store, spec) = (store.clone(), self.spec.clone());
        let fetcher = Arc::new(Fetcher { store, spec, incoming, progress });
        let files = tokio::select! {
            files = Arc::clone(&fetcher).fetch(wanted.clone()) => files,
            never = fetcher.progress.tell(&self.spec.name, &self.status) => match never {},
        };
        self.status.send_modify(|status| status.fetching = None);
        for path in files.iter().flat_map(BTreeMap::keys) {
            self.counters.fetched(wanted.get(path).map_or(0, |object| object.bytes));
        }
        files
    }

    /// Whether nothing of a change is so young that more of it may be under way.
    fn is_settled(&self, listing: &Listing, plan: &Plan) -> bool {
        let now =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as i64;
        let oldest = now - SETTLED_AGE.as_millis() as i64;
        // A removal leaves no time behind.
        plan.removed == 0
            && plan
                .wanted
                .keys()
                .all(|path| listing.0.get(path).is_some_and(|object| object.modified_ms < oldest))
    }

    /// Waits for the next listing, and sends up what was written here meanwhile.
    async fn rest(&mut self, pause: Duration, requests: &mut mpsc::Receiver<Request>) -> Rested {
        let due = Instant::now() + pause;
        let mut next_look = Instant::now();
        loop {
            let wake = if self.spec.read_only { due } else { due.min(next_look) };
            let request = tokio::select! {
                request = requests.recv() => request,
                () = tokio::time::sleep_until(wake.into()) => {
                    if Instant::now() >= due {
                        return Rested::Due;
                    }
                    let begun = Instant::now();
                    // It runs to its end: what went up has to be noted.
                    if self.write_back(false).await {
                        return Rested::Due;
                    }
                    next_look = Instant::now() + LOCAL_INTERVAL.max(begun.elapsed() * LOCAL_INTERVAL_RATIO);
                    continue;
                }
            };
            return match request {
                Some(Request::Sync(reply)) => Rested::Asked(reply),
                Some(Request::Stop(reply)) => Rested::Stopped(reply),
                // Nobody is left to ask or to stop it.
                None => Rested::Stopped(oneshot::channel().0),
            };
        }
    }

    /// Sends up what was written here and holds still; `all`: also what doesn't yet. Says whether the bucket had other content in a place.
    async fn write_back(&mut self, all: bool) -> bool {
        if self.write_back.again.is_some_and(|again| Instant::now() < again) && !all {
            return false;
        }
        let found = self
            .on_snapshots(|snapshots| {
                let Some(current) = &snapshots.current else { return Ok(None) };
                let found = differences(&current.folder, &current.manifest)
                    .map_err(crate::error::local("look through", &current.folder))?;
                Ok(Some((current.folder.clone(), current.manifest.clone(), found.written)))
            })
            .await;
        let (folder, manifest, mut written) = match found {
            Ok(Some(found)) => found,
            Ok(None) => return false,
            Err(error) => {
                self.tell_write_failure(&error);
                return false;
            }
        };
        written.retain(|path, _| is_finished(path));
        let now = Instant::now();
        self.write_back.still.retain(|path, _| written.contains_key(path));
        let mut left = written.len() as u64;
        let mut conflicted = false;
        for (path, stamp) in written {
            let since = self.write_back.still.entry(path.clone()).or_insert((stamp, now));
            if since.0 != stamp {
                *since = (stamp, now);
            }
            if !all && now.duration_since(since.1) < LOCAL_INTERVAL {
                continue;
            }
            let base = manifest.files.get(&path).map(|entry| entry.object.clone());
            match self.write_one(&folder, &path, stamp, base).await {
                Ok(Uploaded::Done(_)) => left -= 1,
                Ok(Uploaded::Conflict) => (left, conflicted) = (left - 1, true),
                Ok(Uploaded::Moves) => {}
                Err(error) => {
                    self.tell_write_failure(&error);
                    break;
                }
            }
        }
        self.status.send_if_modified(|status| std::mem::replace(&mut status.unwritten, left) != left);
        conflicted
    }

    async fn write_one(
        &mut self,
        folder: &std::path::Path,
        path: &str,
        stamp: Stamp,
        base: Option<Object>,
    ) -> Result<Uploaded, MirrorError> {
        let store = self.open_store()?;
        let file = below(folder, path);
        let uploaded = upload(&store, &self.spec, path, &file, base.as_ref()).await?;
        let (name, key) = (path.to_owned(), path.to_owned());
        match &uploaded {
            Uploaded::Done(object) => {
                let entry = Entry { object: object.clone(), stamp: Some(stamp) };
                let (objects, bytes) = self
                    .on_snapshots(move |snapshots| {
                        snapshots.note(&name, entry)?;
                        Ok(snapshots.size())
                    })
                    .await?;
                self.status.send_modify(|status| (status.objects, status.bytes) = (objects, bytes));
                self.counters.written("ok");
                self.write_back.still.remove(path);
                (self.write_back.failures, self.write_back.again) = (0, None);
                if self.write_back.told.take().is_some() {
                    tracing::info!(volume = self.spec.name, "files go up again");
                }
                tracing::info!(
                    volume = self.spec.name,
                    path,
                    bytes = stamp.bytes,
                    "a file went up into the bucket"
                );
            }
            Uploaded::Conflict => {
                self.on_snapshots(move |snapshots| snapshots.set_aside(&key)).await?;
                self.tell_conflict(path);
            }
            Uploaded::Moves => {}
        }
        Ok(uploaded)
    }

    /// The last thing that it does.
    async fn end(mut self, stop: oneshot::Sender<()>) {
        if !self.spec.read_only {
            let last = tokio::time::timeout(LAST_UPLOADS_TIME_MAX, self.write_back(true)).await;
            let left = self.status.borrow().unwritten;
            if last.is_err() || left > 0 {
                tracing::warn!(
                    volume = self.spec.name,
                    files = left,
                    "files that were written below the mount have not gone up; they do when a host starts again with this folder"
                );
            }
        }
        // Whoever stopped it may have left.
        let _ = stop.send(());
    }

    /// Runs work that may block.
    async fn on_snapshots<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Snapshots) -> Result<T, MirrorError> + Send + 'static,
    ) -> Result<T, MirrorError> {
        let snapshots = Arc::clone(&self.snapshots);
        let done = tokio::task::spawn_blocking(move || work(&mut snapshots.lock())).await;
        done.unwrap_or_else(|error| {
            Err(MirrorError::Setup(format!("the mirror failed inside the host: {error}")))
        })
    }

    /// Until the next listing.
    fn pause(&self, failures: u32) -> Duration {
        match failures.checked_sub(1) {
            None => self.spec.poll_interval,
            Some(doublings) => {
                RETRY_FIRST.saturating_mul(1 << doublings.min(10)).min(self.spec.poll_interval)
            }
        }
    }

    /// What an earlier process has left to show.
    fn tell_found(&self) {
        let snapshots = self.snapshots.lock();
        let Some(current) = &snapshots.current else { return };
        let (objects, bytes) = snapshots.size();
        let made = std::fs::metadata(&current.folder).and_then(|metadata| metadata.modified());
        self.status.send_modify(|status| {
            (status.snapshot, status.objects, status.bytes) = (current.number, objects, bytes);
            status.shown_at = made.ok();
        });
        tracing::info!(
            volume = self.spec.name,
            snapshot = current.number,
            objects,
            bytes,
            "what was mirrored before is there"
        );
    }

    /// Tells how a listing ended, where that is news: how many have failed in a row.
    fn tell(&self, outcome: &Result<Synced, MirrorError>) -> u32 {
        let volume = &self.spec.name;
        match outcome {
            Ok(_) => {
                self.counters.listed("ok");
                if self.status.borrow().error.is_some() {
                    tracing::info!(volume, "the bucket can be mirrored again");
                }
                self.status.send_if_modified(|status| {
                    status.failures = 0;
                    status.error.take().is_some()
                });
                0
            }
            Err(error) => {
                self.counters.listed(error.reason());
                let (said, known) = (error.to_string(), self.status.borrow().clone());
                if known.error.as_ref().is_none_or(|(reason, _)| *reason != error.reason()) {
                    let age_seconds = known.confirmed.map(|confirmed| confirmed.elapsed().as_secs());
                    let (reason, snapshot) = (error.reason(), known.snapshot);
                    tracing::warn!(
                        volume,
                        reason,
                        error = said,
                        snapshot,
                        age_seconds,
                        "the bucket can't be mirrored; what was mirrored before goes on being served"
                    );
                }
                self.status.send_modify(|status| {
                    status.failures += 1;
                    status.error = Some((error.reason(), said));
                });
                known.failures + 1
            }
        }
    }

    fn tell_conflict(&self, path: &str) {
        self.counters.written("conflict");
        self.status.send_modify(|status| {
            status.conflicts += 1;
            status.last_conflict = Some(path.to_owned());
        });
        tracing::warn!(
            volume = self.spec.name,
            path,
            kept = %self.spec.folder.join("conflicts").display(),
            "a file was written below the mount, and the bucket has other content in its place by now: the bucket's is shown, and the file is kept"
        );
    }

    fn tell_write_failure(&mut self, error: &MirrorError) {
        self.counters.written(error.reason());
        let state = &mut self.write_back;
        state.failures += 1;
        let doublings = (state.failures - 1).min(6);
        state.again = Some(Instant::now() + RETRY_FIRST * (1 << doublings));
        let said = error.to_string();
        if state.told.is_none() {
            tracing::warn!(
                volume = self.spec.name,
                reason = error.reason(),
                error = said,
                "files that were written below the mount can't go up; they are kept, and tried again"
            );
            state.told = Some(said);
        }
    }
}

/// Takes requests until one is to stop.
async fn collect(
    requests: &mut mpsc::Receiver<Request>,
    waiting: &mut Vec<SyncReply>,
) -> oneshot::Sender<()> {
    loop {
        match requests.recv().await {
            Some(Request::Sync(reply)) => waiting.push(reply),
            Some(Request::Stop(reply)) => return reply,
            None => return oneshot::channel().0,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
