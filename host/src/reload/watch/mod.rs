//! Watches one volume on a thread of its own and says what has changed and settled: plugin files as private copies, model data
//! by name. Events are hints that something may have happened; what did is found by looking. It never opens a plugin as a
//! library, and never knows models.
//!
//! A plugin file has settled when it is whole (its ELF section table lies within it) and its writer has closed or renamed it, or
//! it has held still for `settle_ms`. One that events show being written waits for its end, for `settle_timeout` at most; one
//! that was written over in place, with nobody seen, holds still for longer. So does model data, which says nothing of itself.

mod files;
mod look;

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

use modalkit_loader::{LoadError, Staged, be_modest};
use notify::{
    EventKind, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, ModifyKind, RenameMode},
};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::build::Builder;
use crate::config::{Server, Volume, Watching};
use files::Sight;
use look::{Hints, Look};

/// Looks are at least this far apart, however many events come.
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);
/// How often a volume with events is looked at without any: a queue of the kernel's that overflowed tells nobody which.
const NATIVE_LOOK: Duration = Duration::from_secs(60);
/// What was told and not yet heard; the watch waits then.
const TOLD_MAX: usize = 16;

/// What a watch says.
pub(super) enum Told {
    /// A plugin file is new or has changed: a private copy of it, or why there is none.
    Plugin { name: String, path: PathBuf, staged: Result<Staged, Arc<LoadError>> },
    /// A plugin file is gone.
    Gone { name: String, path: PathBuf },
    /// Model data changed: files relative to the mount point.
    Data { changed: Vec<String> },
    /// A look is over. Everything that it found was told before this.
    Looked {
        /// No plugin file is on its way.
        quiet: bool,
        /// The last look that was asked for before it began; see [`Bell::ask`].
        asked: u64,
    },
}

/// Wakes a watch.
pub(super) struct Bell {
    ring: SyncSender<()>,
    asked: Arc<AtomicU64>,
}

impl Bell {
    /// Asks for a look now.
    pub(super) fn ring(&self) {
        // A bell that rings already rings for this too.
        let _ = self.ring.try_send(());
    }

    /// Asks for a look now, at which nothing needs to hold still. A [`Told::Looked`] with this number or a higher one
    /// follows.
    pub(super) fn ask(&self) -> u64 {
        let number = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        self.ring();
        number
    }
}

/// Starts to watch a volume. The thread ends after the receiver.
pub(super) fn start(
    volume: &Volume,
    server: &Server,
    builder: Arc<Builder>,
) -> Result<(Bell, mpsc::Receiver<Told>), LoadError> {
    let (told, receiver) = mpsc::channel(TOLD_MAX);
    let (ring, bell) = sync_channel(1);
    let asked = Arc::new(AtomicU64::new(0));
    let look = Look::new(volume, server, builder);
    let thread = Thread {
        look,
        told,
        finished: Arc::default(),
        written: Arc::default(),
        asked: Arc::clone(&asked),
        events_lost: Arc::default(),
        watching: fitting(volume),
        volume: volume.clone(),
        told_no_events: false,
        poll_interval: server.poll_interval,
    };
    let rings = ring.clone();
    thread::Builder::new().name("watch".into()).spawn(move || thread.run(&bell, &rings)).map_err(
        |source| LoadError::Io {
            doing: "start the thread that watches",
            path: volume.mount_point.clone(),
            source,
        },
    )?;
    Ok((Bell { ring, asked }, receiver))
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
    look: Look,
    told: mpsc::Sender<Told>,
    /// Files whose writers have closed or renamed them.
    finished: Arc<Mutex<BTreeSet<PathBuf>>>,
    /// Files that were written to and are open still, as far as events tell.
    written: Arc<Mutex<BTreeSet<PathBuf>>>,
    asked: Arc<AtomicU64>,
    /// The watcher could not watch all that came, as where the kernel had no more watches.
    events_lost: Arc<AtomicBool>,
    volume: Volume,
    watching: Watching,
    told_no_events: bool,
    poll_interval: Duration,
}

impl Thread {
    fn run(mut self, bell: &Receiver<()>, ring: &SyncSender<()>) {
        let mut watcher = self.watcher(ring);
        // After the watcher, whose thread only rings.
        be_modest();
        let mut said_quiet = false;
        let mut answered = 0;
        let mut watched = self.look.identity();
        let mut was_partial = false;
        while !self.told.is_closed() {
            // Taken before the look, which sees at least what they speak of.
            let finished = std::mem::take(&mut *self.finished.lock());
            let asked = self.asked.load(Ordering::SeqCst);
            let writing = self.written.lock().clone();
            let now = Instant::now();
            let hints = Hints { finished: &finished, writing: &writing, hurry: asked > answered };
            let files = self.look.collect();
            let sight = files.sight;
            let (found, next) = self.look.plugins(now, &hints, &files);
            if !self.tell(found) {
                return;
            }
            // After the plugins: there may be much of it.
            let (found, later) = self.look.data(now, &hints, files);
            if !self.tell(found) {
                return;
            }
            let next = [next, later].into_iter().flatten().min();
            let quiet = self.look.is_quiet();
            if (quiet && !said_quiet || asked > answered)
                && self.told.blocking_send(Told::Looked { quiet, asked }).is_err()
            {
                return;
            }
            said_quiet |= quiet;
            answered = asked;
            let now_there = self.look.identity();
            let another = std::mem::replace(&mut watched, now_there) != now_there;
            if another {
                self.watching = fitting(&self.volume);
            }
            // What could not be read was not watched either.
            let readable_now = std::mem::replace(&mut was_partial, sight.partial) && !sight.partial;
            let events_lost = self.events_lost.swap(false, Ordering::SeqCst);
            if watcher.is_none() || another || readable_now || events_lost {
                // The folder may have come meanwhile, or another one may have taken its place.
                watcher = self.watcher(ring);
            }
            let pause = pause(self.watching, watcher.is_some(), sight, self.poll_interval);
            // Whether something rang or the time is over: the next look tells. Many events ring once.
            let _ = bell.recv_timeout(next.map_or(pause, |next| next.min(pause)));
            thread::sleep(BETWEEN_LOOKS);
        }
    }

    /// `false` when nobody listens any more.
    fn tell(&self, found: Vec<Told>) -> bool {
        found.into_iter().all(|told| self.told.blocking_send(told).is_ok())
    }

    fn watcher(&mut self, ring: &SyncSender<()>) -> Option<notify::RecommendedWatcher> {
        if self.watching == Watching::Poll {
            return None;
        }
        let (ring, finished, written) = (ring.clone(), Arc::clone(&self.finished), Arc::clone(&self.written));
        let events_lost = Arc::clone(&self.events_lost);
        // Looking at a folder is an event as well: without these filters the watch would wake itself for ever.
        let on_event = move |event: notify::Result<notify::Event>| {
            let Ok(event) = event else {
                events_lost.store(true, Ordering::SeqCst);
                let _ = ring.try_send(());
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
                let _ = ring.try_send(());
            }
        };
        let mount_point = &self.look.mount_point;
        let watcher = notify::recommended_watcher(on_event)
            .and_then(|mut watcher| watcher.watch(mount_point, RecursiveMode::Recursive).map(|()| watcher));
        watcher
            .inspect_err(|error| {
                // It is tried again and again, for the folder may come.
                if !std::mem::replace(&mut self.told_no_events, true) {
                    tracing::warn!(volume = self.look.volume, %error, every = ?self.poll_interval, "no events from this volume; it is polled");
                }
            })
            .ok()
            .inspect(|_| self.told_no_events = false)
    }
}

/// How long until the next look where nothing rings before. A minute is enough only where events tell of every change and this look
/// saw everything.
fn pause(watching: Watching, has_events: bool, sight: Sight, poll_interval: Duration) -> Duration {
    match watching {
        Watching::Native if has_events && !sight.partial && !sight.linked => NATIVE_LOOK,
        Watching::Native => poll_interval.min(NATIVE_LOOK),
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
