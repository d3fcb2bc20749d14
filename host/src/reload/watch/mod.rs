//! Watches one volume on a thread of its own and reports what has changed and settled: plugin files as private copies, model data
//! by name. Events are hints that something may have happened; what did is found by a scan. It never opens a plugin as a
//! library, and never knows models.
//!
//! A plugin file has settled when it is whole (its ELF section table lies within it) and its writer has closed or renamed it, or
//! it has held still for `settle_ms`. One that events show being written waits for its end, for `settle_timeout` at most; one
//! that was written over in place, without an event of its writer, must hold still for longer. So must model data, whose format is unknown.

mod files;
mod scan;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use modalkit_engine::{LoadError, Staged};
use notify::{
    EventKind, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, ModifyKind, RenameMode},
};
use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc;

use super::build::Builder;
use crate::config::{Server, Volume, Watching};
use files::Completeness;
use scan::{Hints, Scanner};

/// Scans start at least this far apart, however many events come.
const SCAN_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// How often a volume with events is scanned without any: an overflowed queue of the kernel's doesn't say which events were lost.
const NATIVE_SCAN_INTERVAL: Duration = Duration::from_secs(60);
/// Between two looks whether the first scan may begin, where nothing wakes the thread.
const READY_INTERVAL: Duration = Duration::from_secs(1);
/// Events that were not received yet; the watch waits where there are more.
const EVENTS_MAX: usize = 16;

/// What a watch found.
pub(super) enum VolumeEvent {
    /// A plugin file is new or has changed: a private copy of it, or why there is none.
    Plugin { name: String, path: PathBuf, staged: Result<Staged, Arc<LoadError>> },
    /// A plugin file is gone.
    Gone { name: String, path: PathBuf },
    /// Model data changed: files relative to the mount point.
    Data { changed: Vec<String> },
    /// A scan is over. Everything that it found was sent before this.
    ScanDone {
        /// No plugin file is on its way.
        quiet: bool,
        /// The last scan that was requested before it began; see [`WatchHandle::request_scan`].
        requested: u64,
    },
}

/// Wakes the thread that watches a volume.
pub(super) struct WatchHandle {
    wake: SyncSender<()>,
    requested: Arc<AtomicU64>,
}

impl WatchHandle {
    /// Requests a scan now.
    pub(super) fn wake(&self) {
        // Full: a wake-up is pending already, and its scan covers this one.
        let _ = self.wake.try_send(());
    }

    /// Requests a scan now that waits for no file to settle. A [`VolumeEvent::ScanDone`] with this number or a higher one
    /// follows.
    pub(super) fn request_scan(&self) -> u64 {
        let number = self.requested.fetch_add(1, Ordering::SeqCst) + 1;
        self.wake();
        number
    }
}

/// What the watch of a mirrored volume holds on to.
#[derive(Clone)]
pub(super) struct Snapshots {
    /// Held while the volume is looked through.
    pub(super) shown: Arc<RwLock<()>>,
    /// Nothing needs to be waited for any more before the first scan.
    pub(super) ready: Arc<AtomicBool>,
}

impl Snapshots {
    pub(super) fn new(shown: Arc<RwLock<()>>) -> Self {
        Self { shown, ready: Arc::default() }
    }
}

/// Starts to watch a volume. The thread ends after the receiver.
pub(super) fn start(
    volume: &Volume,
    server: &Server,
    builder: Arc<Builder>,
    snapshots: Option<Snapshots>,
) -> Result<(WatchHandle, mpsc::Receiver<VolumeEvent>), LoadError> {
    let (events, receiver) = mpsc::channel(EVENTS_MAX);
    let (wake, woken) = sync_channel(1);
    let requested = Arc::new(AtomicU64::new(0));
    let scanner = Scanner::new(volume, server, builder);
    let thread = Thread {
        scanner,
        events,
        finished: Arc::default(),
        written: Arc::default(),
        requested: Arc::clone(&requested),
        events_lost: Arc::default(),
        watching: fitting(volume),
        volume: volume.clone(),
        warned_no_events: false,
        poll_interval: server.poll_interval,
        snapshots,
    };
    let wakes = wake.clone();
    thread::Builder::new().name("watch".into()).spawn(move || thread.run(&woken, &wakes)).map_err(
        |source| LoadError::Io {
            doing: "start the thread that watches",
            path: volume.mount_point.clone(),
            source,
        },
    )?;
    Ok((WatchHandle { wake, requested }, receiver))
}

/// Events come from local file systems; others may have writers that this kernel never hears of.
fn fitting(volume: &Volume) -> Watching {
    const OVERLAY: u64 = 0x794c_7630;
    const FUSE: u64 = 0x6573_5546;
    const NFS: u64 = 0x6969;
    const CIFS: u64 = 0xff53_4d42;
    const SMB2: u64 = 0xfe53_4d42;
    const V9FS: u64 = 0x0102_1997;
    const CEPH: u64 = 0x00c3_6400;
    const LUSTRE: u64 = 0x0bd0_0bd0;
    match volume.watch {
        Watching::Fitting => match rustix::fs::statfs(&volume.mount_point).map(|system| system.f_type as u64)
        {
            Ok(OVERLAY | FUSE | NFS | CIFS | SMB2 | V9FS | CEPH | LUSTRE) | Err(_) => Watching::Both,
            Ok(_) => Watching::Native,
        },
        said => said,
    }
}

struct Thread {
    scanner: Scanner,
    events: mpsc::Sender<VolumeEvent>,
    /// Files whose writers have closed or renamed them.
    finished: Arc<Mutex<BTreeSet<PathBuf>>>,
    /// Files that were written to and are open still, as far as events tell.
    written: Arc<Mutex<BTreeSet<PathBuf>>>,
    requested: Arc<AtomicU64>,
    /// The watcher could not watch all that came, as where the kernel had no more watches.
    events_lost: Arc<AtomicBool>,
    volume: Volume,
    watching: Watching,
    warned_no_events: bool,
    poll_interval: Duration,
    /// Of a volume that is mirrored.
    snapshots: Option<Snapshots>,
}

impl Thread {
    fn run(mut self, woken: &Receiver<()>, wake: &SyncSender<()>) {
        while self.snapshots.as_ref().is_some_and(|snapshots| !snapshots.ready.load(Ordering::Acquire)) {
            if self.events.is_closed() {
                return;
            }
            let _ = woken.recv_timeout(READY_INTERVAL);
        }
        let mut watcher = self.watcher(wake);
        // After the watcher, whose thread only wakes this one: what it starts inherits the priority.
        self.scanner.builder.engine.lower_thread_priority();
        let mut reported_quiet = false;
        let mut completed = 0;
        let mut watched = self.scanner.identity();
        let mut was_partial = false;
        while !self.events.is_closed() {
            // No other snapshot takes this one's place until what the scan found is sent; the loop that takes it waits for no mirror.
            let shown = self.snapshots.as_ref().map(|snapshots| snapshots.shown.read_arc());
            // Taken before the scan, which therefore sees at least what they refer to.
            let finished = std::mem::take(&mut *self.finished.lock());
            let requested = self.requested.load(Ordering::SeqCst);
            let writing = self.written.lock().clone();
            let now = Instant::now();
            let hints =
                Hints { finished: &finished, writing: &writing, skip_settling: requested > completed };
            let files = self.scanner.collect();
            let completeness = files.completeness;
            let (found, next) = self.scanner.plugins(now, &hints, &files);
            if !self.send(found) {
                return;
            }
            // After the plugins: there may be much of it.
            let (found, later) = self.scanner.data(now, &hints, files);
            if !self.send(found) {
                return;
            }
            drop(shown);
            let next = [next, later].into_iter().flatten().min();
            let quiet = self.scanner.is_quiet();
            if (quiet && !reported_quiet || requested > completed)
                && self.events.blocking_send(VolumeEvent::ScanDone { quiet, requested }).is_err()
            {
                return;
            }
            reported_quiet |= quiet;
            completed = requested;
            let now_there = self.scanner.identity();
            let another = std::mem::replace(&mut watched, now_there) != now_there;
            if another {
                self.watching = fitting(&self.volume);
            }
            // What could not be read was not watched either.
            let readable_now =
                std::mem::replace(&mut was_partial, completeness.partial) && !completeness.partial;
            let events_lost = self.events_lost.swap(false, Ordering::SeqCst);
            if watcher.is_none() || another || readable_now || events_lost {
                // The folder may have come meanwhile, or another one may have taken its place.
                watcher = self.watcher(wake);
            }
            let pause = pause(self.watching, watcher.is_some(), completeness, self.poll_interval);
            // Woken or not, the next scan finds what changed. Many events wake it once.
            let _ = woken.recv_timeout(next.map_or(pause, |next| next.min(pause)));
            thread::sleep(SCAN_INTERVAL_MIN);
        }
    }

    /// `false` when nobody listens any more.
    fn send(&self, found: Vec<VolumeEvent>) -> bool {
        found.into_iter().all(|event| self.events.blocking_send(event).is_ok())
    }

    fn watcher(&mut self, wake: &SyncSender<()>) -> Option<notify::RecommendedWatcher> {
        if self.watching == Watching::Poll {
            return None;
        }
        let (wake, finished, written) = (wake.clone(), Arc::clone(&self.finished), Arc::clone(&self.written));
        let events_lost = Arc::clone(&self.events_lost);
        // Reading a folder is an event as well: without these filters the watch would wake itself for ever.
        let on_event = move |event: notify::Result<notify::Event>| {
            let Ok(event) = event else {
                events_lost.store(true, Ordering::SeqCst);
                let _ = wake.try_send(());
                return;
            };
            if let Some(path) = event.paths.last() {
                if finishes(event.kind) {
                    written.lock().remove(path);
                    finished.lock().insert(path.clone());
                } else if matches!(event.kind, EventKind::Modify(ModifyKind::Data(_))) {
                    written.lock().insert(path.clone());
                    finished.lock().remove(path);
                } else if matches!(event.kind, EventKind::Remove(_)) {
                    written.lock().remove(path);
                }
            }
            if changes_something(event.kind) {
                let _ = wake.try_send(());
            }
        };
        let mount_point = &self.scanner.mount_point;
        let watcher = notify::recommended_watcher(on_event)
            .and_then(|mut watcher| watcher.watch(mount_point, RecursiveMode::Recursive).map(|()| watcher));
        watcher
            .inspect_err(|error| {
                // It is tried again and again, for the folder may come.
                if !std::mem::replace(&mut self.warned_no_events, true) {
                    tracing::warn!(volume = self.scanner.volume, %error, every = ?self.poll_interval, "no events from this volume; it is polled");
                }
            })
            .ok()
            .inspect(|_| self.warned_no_events = false)
    }
}

/// How long until the next scan where nothing wakes the thread before. A minute is enough only where events tell of every change and this scan
/// covered everything.
fn pause(
    watching: Watching,
    has_events: bool,
    completeness: Completeness,
    poll_interval: Duration,
) -> Duration {
    match watching {
        Watching::Native if has_events && !completeness.partial && !completeness.linked => {
            NATIVE_SCAN_INTERVAL
        }
        Watching::Native => poll_interval.min(NATIVE_SCAN_INTERVAL),
        _ => poll_interval,
    }
}

fn finishes(kind: EventKind) -> bool {
    matches!(
        kind,
        EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(ModifyKind::Name(RenameMode::To | RenameMode::Both))
    )
}

fn changes_something(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests;
