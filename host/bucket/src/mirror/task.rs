//! One mirror's loop: list, fetch, show. It owns the order of these; each is done elsewhere.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    request::{Request, SyncReply, Synced},
    write_back::{Rested, WriteBack},
};
use crate::{
    error::{MirrorError, local},
    fetch::{FetchError, Fetcher, bytes_there, forget_others},
    listing::{Listing, Object, list},
    local::differences,
    manifest::Entry,
    progress::Progress,
    snapshot::Snapshots,
    spec::{BucketSpec, Credentials},
    status::{Counters, Status},
    store::Store,
};

/// Bytes of the disk that are left to others.
const FREE_BYTES_MIN: u64 = 64 << 20;
/// After a failure the next try comes earlier than the next listing, and later after each further one.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Objects that were written longer ago than this are not being uploaded beside others now; clocks may differ by that much.
const SETTLED_AGE: Duration = Duration::from_secs(300);
/// Times that objects may change while they are fetched, until the rest of what is shown goes on without the change.
const ROUNDS_MAX: usize = 20;

pub(super) struct Task {
    pub(super) spec: BucketSpec,
    pub(super) credentials: Credentials,
    pub(super) counters: Arc<dyn Counters>,
    pub(super) store: Option<Store>,
    /// Locked by threads that may block.
    pub(super) snapshots: Arc<Mutex<Snapshots>>,
    pub(super) status: watch::Sender<Status>,
    pub(super) write_back: WriteBack,
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

impl Task {
    pub(super) fn new(
        spec: BucketSpec,
        credentials: Credentials,
        counters: Arc<dyn Counters>,
        snapshots: Snapshots,
        status: watch::Sender<Status>,
    ) -> Self {
        let snapshots = Arc::new(Mutex::new(snapshots));
        Self { spec, credentials, counters, store: None, snapshots, status, write_back: WriteBack::default() }
    }

    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        self.tell_found();
        let mut waiting: Vec<SyncReply> = Vec::new();
        // What an earlier process left goes up before the bucket is compared: it may be there already.
        if !self.spec.read_only {
            let no_end = AtomicBool::new(false);
            tokio::select! {
                _ = self.write_back(false, &no_end) => {}
                stop = collect(&mut requests, &mut waiting) => return self.end(stop).await,
            }
        }
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
                Rested::Asked(replies) => waiting = replies,
                Rested::Stopped(stop) => return self.end(stop).await,
            }
        }
    }

    /// Lists the prefix, and shows what it holds.
    async fn pass(&mut self) -> Result<Synced, MirrorError> {
        let store = self.open_store()?;
        let begun = Instant::now();
        let untold = self
            .on_snapshots(|snapshots| {
                snapshots.remove_replaced(false)?;
                Ok(std::mem::take(&mut snapshots.untold))
            })
            .await?;
        untold.iter().for_each(|path| self.tell_conflict(path));
        let mut listing = list(&store, &self.spec).await?;
        let mut listed = Instant::now();
        let mut fetched: BTreeMap<String, (Object, Option<PathBuf>)> = BTreeMap::new();
        let (mut changes, mut unsettled_since, mut is_last) = (0, None, false);
        let plan = loop {
            let mut plan = self.plan(&listing).await?;
            if plan.wanted.is_empty() && plan.removed == 0 && plan.shows {
                self.status.send_modify(|status| status.confirmed = Some(listed));
                // What an earlier fetch left of objects that have gone meanwhile.
                self.on_snapshots(|snapshots| {
                    forget_others(&snapshots.incoming(), &BTreeMap::new());
                    Ok(())
                })
                .await?;
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
            if is_last || self.is_settled(&listing, &plan) {
                break plan;
            }
            // Half an upload isn't shown: a second listing has to show the same.
            let since = *unsettled_since.get_or_insert_with(Instant::now);
            tokio::time::sleep_until((listed + self.spec.settle).into()).await;
            let again = list(&store, &self.spec).await?;
            if again.is_same(&listing) {
                break plan;
            }
            (listing, listed) = (again, Instant::now());
            // What never holds still is shown as this listing has it.
            is_last = since.elapsed() >= self.spec.settle_timeout;
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
    pub(super) fn open_store(&mut self) -> Result<Store, MirrorError> {
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
                .map_err(local("look through", &current.folder))?;
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

    /// Runs work that may block.
    pub(super) async fn on_snapshots<T: Send + 'static>(
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

    pub(super) fn tell_conflict(&self, path: &str) {
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
