//! What was written below a mirror's folder goes up, in the mirror's rests. It never lists the bucket.

use std::{
    collections::BTreeMap,
    path::Path,
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    request::{Request, SyncReply},
    task::Task,
};
use crate::{
    error::{MirrorError, local},
    listing::Object,
    local::{ancestors, differences, is_finished},
    manifest::{Entry, Manifest, Stamp},
    upload::{Uploaded, upload},
};

/// Between two looks for files that were written here, which is also how long they must hold still.
const LOCAL_INTERVAL: Duration = Duration::from_secs(2);
/// At most this share of the time is spent on such looks: one over many files takes longer.
const LOCAL_INTERVAL_RATIO: u32 = 20;
/// After failures in a row, the wait until the next try, twice as long after each up to this many.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const DOUBLINGS_MAX: u32 = 6;
/// How long files that were written here may take to go up when the process ends; the rest goes up when it starts again.
const LAST_UPLOADS_TIME_MAX: Duration = Duration::from_secs(5);

/// What a mirror remembers of files that were written here.
#[derive(Default)]
pub(super) struct WriteBack {
    /// Since when each has been as it is.
    still: BTreeMap<String, (Stamp, Instant)>,
    /// Files that can't go up as they are, and are not tried again before they change.
    unfit: BTreeMap<String, Stamp>,
    failures: u32,
    /// When a failed one is tried again.
    again: Option<Instant>,
    /// What was told of it.
    told: Option<String>,
}

/// Why a mirror's rest is over.
pub(super) enum Rested {
    Due,
    Asked(Vec<SyncReply>),
    Stopped(oneshot::Sender<()>),
}

impl Task {
    /// Waits for the next listing, and sends up what was written here meanwhile.
    pub(super) async fn rest(&mut self, pause: Duration, requests: &mut mpsc::Receiver<Request>) -> Rested {
        let due = Instant::now() + pause;
        let mut next_look = Instant::now();
        loop {
            let wake = if self.spec.read_only { due } else { due.min(next_look) };
            tokio::select! {
                request = requests.recv() => return asked(request),
                () = tokio::time::sleep_until(wake.into()) => {}
            }
            if Instant::now() >= due {
                return Rested::Due;
            }
            let begun = Instant::now();
            let (enough, mut waiting) = (AtomicBool::new(false), Vec::new());
            let conflicted = {
                let mut work = pin!(self.write_back(false, &enough));
                loop {
                    tokio::select! {
                        conflicted = &mut work => break conflicted,
                        // The file under way goes up first: it is noted then.
                        request = requests.recv() => match asked(request) {
                            Rested::Asked(replies) => {
                                waiting.extend(replies);
                                enough.store(true, Ordering::Relaxed);
                            }
                            stopped => return stopped,
                        },
                        () = tokio::time::sleep_until(due.into()), if !enough.load(Ordering::Relaxed) => {
                            enough.store(true, Ordering::Relaxed);
                        }
                    }
                }
            };
            if !waiting.is_empty() {
                return Rested::Asked(waiting);
            }
            if conflicted {
                return Rested::Due;
            }
            next_look = Instant::now() + LOCAL_INTERVAL.max(begun.elapsed() * LOCAL_INTERVAL_RATIO);
        }
    }

    /// Sends up what was written here and holds still, until it is `enough`; `all`: also what doesn't hold still yet. Says whether the bucket had
    /// other content in a place: the next listing shows it, and keeps the file among the conflicts.
    pub(super) async fn write_back(&mut self, all: bool, enough: &AtomicBool) -> bool {
        if self.write_back.again.is_some_and(|again| Instant::now() < again) && !all {
            return false;
        }
        let found = self
            .on_snapshots(|snapshots| {
                let Some(current) = &snapshots.current else { return Ok(None) };
                let found = differences(&current.folder, &current.manifest)
                    .map_err(local("look through", &current.folder))?;
                Ok(Some((current.folder.clone(), current.manifest.clone(), found.written)))
            })
            .await;
        let (folder, manifest, mut written) = match found {
            Ok(Some(found)) => found,
            Ok(None) => return false,
            Err(error) => {
                self.tell_write_failure("", &error);
                return false;
            }
        };
        written.retain(|path, _| is_finished(path));
        let state = &mut self.write_back;
        state.still.retain(|path, _| written.contains_key(path));
        state.unfit.retain(|path, stamp| written.get(path) == Some(stamp));
        let mut left = written.len() as u64;
        let (mut conflicted, mut failed) = (false, false);
        for (path, stamp) in written {
            if enough.load(Ordering::Relaxed) {
                break;
            }
            if self.write_back.unfit.contains_key(&path) || !self.holds_still(&path, stamp) && !all {
                continue;
            }
            if let Some(object) = in_the_way(&manifest, &path) {
                let said = format!(
                    "expected {path:?} to fit beside the bucket's objects, found {object:?} in its way"
                );
                self.write_back.unfit.insert(path.clone(), stamp);
                self.tell_write_failure(&path, &MirrorError::Key(said));
                continue;
            }
            let base = manifest.files.get(&path).map(|entry| entry.object.clone());
            match self.write_one(&folder, &path, stamp, base).await {
                Ok(Uploaded::Done(_)) => left -= 1,
                Ok(Uploaded::Conflict) => conflicted = true,
                Ok(Uploaded::Moves) => {}
                Err(error @ (MirrorError::Key(_) | MirrorError::Local { .. })) => {
                    // It is this file's doing, and no other's.
                    self.write_back.unfit.insert(path.clone(), stamp);
                    self.tell_write_failure(&path, &error);
                }
                Err(error) => {
                    failed = true;
                    self.tell_write_failure(&path, &error);
                    // A store that can't be reached would be waited for with each of them.
                    if matches!(error, MirrorError::Store(_) | MirrorError::Setup(_)) {
                        break;
                    }
                }
            }
        }
        self.note_failures(failed);
        self.status.send_if_modified(|status| std::mem::replace(&mut status.unwritten, left) != left);
        conflicted
    }

    fn holds_still(&mut self, path: &str, stamp: Stamp) -> bool {
        let now = Instant::now();
        // One that says that it was written long ago has held still as long.
        let modified =
            SystemTime::UNIX_EPOCH + Duration::new(stamp.modified.0.max(0) as u64, stamp.modified.1 as u32);
        let age = modified.elapsed().unwrap_or_default().min(LOCAL_INTERVAL);
        let first = now.checked_sub(age).unwrap_or(now);
        let since = self.write_back.still.entry(path.to_owned()).or_insert((stamp, first));
        if since.0 != stamp {
            *since = (stamp, now);
        }
        now.duration_since(since.1) >= LOCAL_INTERVAL
    }

    async fn write_one(
        &mut self,
        folder: &Path,
        path: &str,
        stamp: Stamp,
        base: Option<Object>,
    ) -> Result<Uploaded, MirrorError> {
        let store = self.open_store()?;
        let file = folder.join(path);
        let uploaded = upload(&store, &self.spec, path, (&file, stamp), base.as_ref()).await?;
        if let Uploaded::Done(object) = &uploaded {
            let (name, entry) = (path.to_owned(), Entry { object: object.clone(), stamp: Some(stamp) });
            let (objects, bytes) = self
                .on_snapshots(move |snapshots| {
                    snapshots.note(&name, entry)?;
                    Ok(snapshots.size())
                })
                .await?;
            self.status.send_modify(|status| (status.objects, status.bytes) = (objects, bytes));
            self.counters.written("ok");
            self.write_back.still.remove(path);
            tracing::info!(
                volume = self.spec.name,
                path,
                bytes = stamp.bytes,
                "a file went up into the bucket"
            );
        }
        Ok(uploaded)
    }

    /// The last thing that it does.
    pub(super) async fn end(mut self, stop: oneshot::Sender<()>) {
        if !self.spec.read_only {
            let never = AtomicBool::new(false);
            let last = tokio::time::timeout(LAST_UPLOADS_TIME_MAX, self.write_back(true, &never)).await;
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

    fn note_failures(&mut self, failed: bool) {
        let state = &mut self.write_back;
        if failed {
            state.again = Some(Instant::now() + RETRY_FIRST * (1 << state.failures.min(DOUBLINGS_MAX)));
            state.failures += 1;
        } else {
            (state.failures, state.again) = (0, None);
            if state.unfit.is_empty() && state.told.take().is_some() {
                tracing::info!(volume = self.spec.name, "files go up again");
            }
        }
    }

    fn tell_write_failure(&mut self, path: &str, error: &MirrorError) {
        self.counters.written(error.reason());
        let said = error.to_string();
        if self.write_back.told.as_ref() != Some(&said) {
            tracing::warn!(
                volume = self.spec.name,
                path,
                reason = error.reason(),
                error = said,
                "files that were written below the mount can't go up; they are kept, and tried again"
            );
            self.write_back.told = Some(said);
        }
    }
}

/// An object that is a folder where this path is a file, or the other way round.
fn in_the_way<'m>(manifest: &'m Manifest, path: &str) -> Option<&'m str> {
    let is_file = |name: &&str| manifest.files.get(*name).is_some_and(|entry| entry.stamp.is_some());
    if let Some(above) = ancestors(path).find(is_file) {
        return manifest.files.get_key_value(above).map(|(name, _)| name.as_str());
    }
    let inside = format!("{path}/");
    let next = manifest.files.range(inside.clone()..).next();
    next.map(|(name, _)| name.as_str()).filter(|name| name.starts_with(&inside))
}

fn asked(request: Option<Request>) -> Rested {
    match request {
        Some(Request::Sync(reply)) => Rested::Asked(vec![reply]),
        Some(Request::Stop(reply)) => Rested::Stopped(reply),
        // Nobody is left to ask or to stop it.
        None => Rested::Stopped(oneshot::channel().0),
    }
}
