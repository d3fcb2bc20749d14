//! Watches one volume on a thread of its own and says what has changed and settled: plugin files as private copies, model data
//! by name. Events are hints that something may have happened; what did is found by looking. It never opens a plugin as a
//! library, and never knows models.
//!
//! A plugin file has settled when it is whole (its ELF section table lies within it) and its writer has closed or renamed it, or
//! it has held still for `settle_ms`. Model data says nothing of itself: without such an event it must hold still for longer.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use modalkit_loader::{LoadError, Staged, be_modest};
use notify::{
    EventKind, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, ModifyKind, RenameMode},
};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::build::Builder;
use crate::config::{Server, Volume, Watching};

/// Looks are at least this far apart, however many events come.
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);
/// How often a volume with events is looked at without any: a queue of the kernel's that overflowed tells nobody which.
const NATIVE_LOOK: Duration = Duration::from_secs(60);
/// Model data whose writer nobody saw ending has settled after this.
const DATA_SETTLE: Duration = Duration::from_secs(2);
/// Data files up to this are compared by content: a touch or a rewrite with the same bytes is no change. Larger ones are
/// compared by size, time and inode.
const CONTENT_COMPARED_BYTES_MAX: u64 = 16 << 20;
/// Files and folders in a volume beyond these are not watched.
const FILES_MAX: usize = 100_000;
const DEPTH_MAX: usize = 16;
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
    let watching = fitting(volume);
    let thread = Thread {
        look,
        told,
        finished: Arc::default(),
        asked: Arc::clone(&asked),
        pause: match watching {
            Watching::Native => NATIVE_LOOK,
            _ => server.poll_interval,
        },
        native: watching != Watching::Poll,
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
    asked: Arc<AtomicU64>,
    native: bool,
    pause: Duration,
    poll_interval: Duration,
}

impl Thread {
    fn run(mut self, bell: &Receiver<()>, ring: &SyncSender<()>) {
        let mut watcher = self.watcher(ring);
        // After the watcher, whose thread only rings.
        be_modest();
        let mut said_quiet = false;
        let mut answered = 0;
        while !self.told.is_closed() {
            // Taken before the look, which sees at least what they speak of.
            let finished = std::mem::take(&mut *self.finished.lock());
            let asked = self.asked.load(Ordering::SeqCst);
            let (found, next) = self.look.look(Instant::now(), &finished, asked > answered);
            for told in found {
                if self.told.blocking_send(told).is_err() {
                    return;
                }
            }
            let quiet = self.look.is_quiet();
            if (quiet && !said_quiet || asked > answered)
                && self.told.blocking_send(Told::Looked { quiet, asked }).is_err()
            {
                return;
            }
            said_quiet |= quiet;
            answered = asked;
            if self.native && watcher.is_none() {
                // The folder may have come meanwhile.
                watcher = self.watcher(ring);
            }
            let pause = if watcher.is_some() || !self.native { self.pause } else { self.poll_interval };
            // Whether something rang or the time is over: the next look tells. Many events ring once.
            let _ = bell.recv_timeout(next.map_or(pause, |next| next.min(pause)));
            thread::sleep(BETWEEN_LOOKS);
        }
    }

    fn watcher(&self, ring: &SyncSender<()>) -> Option<notify::RecommendedWatcher> {
        if !self.native {
            return None;
        }
        let (ring, finished) = (ring.clone(), Arc::clone(&self.finished));
        // Looking at a folder is an event as well: without these filters the watch would wake itself for ever.
        let on_event = move |event: notify::Result<notify::Event>| {
            let Ok(event) = event else { return };
            if finishes(event.kind) {
                // A file that the look doesn't know is forgotten with it.
                finished.lock().extend(event.paths.last().cloned());
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
                tracing::debug!(volume = self.look.volume, %error, every = ?self.poll_interval, "no events from this volume; it is polled");
            })
            .ok()
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

/// What was seen of a volume, and what of it was told. Time is an argument.
struct Look {
    volume: String,
    mount_point: PathBuf,
    settle: Duration,
    settle_timeout: Duration,
    builder: Arc<Builder>,
    plugins: HashMap<PathBuf, Seen>,
    data: HashMap<PathBuf, Seen>,
    /// The first look finds what was there before: that is no change.
    data_known: bool,
    /// What was said once, and is not said again before it is over.
    complaint: Option<String>,
}

struct Seen {
    stamp: Stamp,
    since: Instant,
    told: bool,
    /// Something was told of it before.
    known: bool,
    finished: bool,
    /// SHA-256 of what was told last, for data that is compared by content.
    content: Option<[u8; 32]>,
}

/// What changes when a file does.
#[derive(Clone, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
    inode: u64,
    /// Owner and mode change this one alone: a file that could not be read may be readable now.
    changed: (i64, i64),
}

#[derive(Default)]
struct Files {
    /// By the plugin's name: the first path is the one that counts.
    plugins: BTreeMap<String, (PathBuf, Stamp)>,
    data: Vec<(PathBuf, Stamp)>,
    complaint: Option<String>,
}

impl Look {
    fn new(volume: &Volume, server: &Server, builder: Arc<Builder>) -> Self {
        Self {
            volume: volume.name.clone(),
            mount_point: std::path::absolute(&volume.mount_point).unwrap_or(volume.mount_point.clone()),
            settle: server.settle,
            settle_timeout: server.settle_timeout,
            builder,
            plugins: HashMap::new(),
            data: HashMap::new(),
            data_known: false,
            complaint: None,
        }
    }

    /// Whether no plugin file is on its way.
    fn is_quiet(&self) -> bool {
        self.plugins.values().all(|seen| seen.told)
    }

    /// What has settled since the last look, and when to look again where something hasn't. `hurry`: nothing needs to hold
    /// still.
    fn look(
        &mut self,
        now: Instant,
        finished: &BTreeSet<PathBuf>,
        hurry: bool,
    ) -> (Vec<Told>, Option<Duration>) {
        let mut files = Files::default();
        let readable = match files.collect(&self.mount_point, 0) {
            Ok(()) => true,
            Err(error) => {
                files.complaint = Some(format!("can't read the volume: {error}"));
                false
            }
        };
        if self.complaint != files.complaint {
            if let Some(complaint) = &files.complaint {
                tracing::warn!(volume = self.volume, folder = %self.mount_point.display(), "{complaint}");
            }
            self.complaint.clone_from(&files.complaint);
        }
        let mut told = Vec::new();
        let mut next = None;
        self.look_at_plugins(now, finished, hurry, &files.plugins, &mut told, &mut next);
        // A folder that can't be read has lost nothing, as far as anybody knows.
        if readable {
            self.plugins.retain(|path, seen| {
                let there = files.plugins.values().any(|(known, _)| known == path);
                if !there && seen.known {
                    let name = plugin_name(path).unwrap_or_default();
                    told.push(Told::Gone { name, path: path.clone() });
                }
                there
            });
        }
        if readable {
            self.look_at_data(now, finished, hurry, files.data, &mut told, &mut next);
        }
        (told, next)
    }

    fn look_at_plugins(
        &mut self,
        now: Instant,
        finished: &BTreeSet<PathBuf>,
        hurry: bool,
        files: &BTreeMap<String, (PathBuf, Stamp)>,
        told: &mut Vec<Told>,
        next: &mut Option<Duration>,
    ) {
        for (name, (path, stamp)) in files {
            let seen = self
                .plugins
                .entry(path.clone())
                .or_insert_with(|| Seen::new(stamp.clone(), now, self.settle));
            seen.see(stamp, now, finished.contains(path));
            if seen.told {
                continue;
            }
            let still = now.saturating_duration_since(seen.since);
            let mut wait = if seen.finished || hurry { Duration::ZERO } else { self.settle };
            if still >= wait && !modalkit_loader::is_whole(path).unwrap_or(true) {
                wait = self.settle_timeout;
            }
            if still < wait {
                sooner(next, wait - still);
                continue;
            }
            let staged = self.builder.stage(path);
            // What was written while it was copied is no copy of anything.
            if Stamp::of_file(path).ok().as_ref() != Some(stamp) {
                sooner(next, self.settle);
                continue;
            }
            seen.told = true;
            seen.known = true;
            told.push(Told::Plugin {
                name: name.clone(),
                path: path.clone(),
                staged: staged.map_err(Arc::new),
            });
        }
    }

    fn look_at_data(
        &mut self,
        now: Instant,
        finished: &BTreeSet<PathBuf>,
        hurry: bool,
        files: Vec<(PathBuf, Stamp)>,
        told: &mut Vec<Told>,
        next: &mut Option<Duration>,
    ) {
        let there: BTreeSet<&PathBuf> = files.iter().map(|(path, _)| path).collect();
        // What is loaded doesn't need its files any more: a file that is gone is no change.
        self.data.retain(|path, _| there.contains(path));
        let mut on_its_way = false;
        for (path, stamp) in files {
            let finished = finished.contains(&path);
            let Some(seen) = self.data.get_mut(&path) else {
                let mut seen = Seen::new(stamp, now, DATA_SETTLE);
                seen.finished = finished;
                if !self.data_known {
                    seen.told = true;
                    seen.content = content(&path, &seen.stamp);
                }
                self.data.insert(path, seen);
                continue;
            };
            seen.see(&stamp, now, finished);
        }
        self.data_known = true;
        for seen in self.data.values().filter(|seen| !seen.told) {
            let wait = match (hurry, seen.finished) {
                (true, _) => Duration::ZERO,
                (_, true) => self.settle,
                (_, false) => DATA_SETTLE.max(self.settle),
            };
            let still = now.saturating_duration_since(seen.since);
            if still < wait {
                sooner(next, wait - still);
                on_its_way = true;
            }
        }
        // What belongs together is told together: weights and the labels beside them.
        if on_its_way {
            return;
        }
        let mut changed = Vec::new();
        for (path, seen) in self.data.iter_mut().filter(|(_, seen)| !seen.told) {
            seen.told = true;
            let content = content(path, &seen.stamp);
            if content.is_none() || content != seen.content {
                let name = path.strip_prefix(&self.mount_point).unwrap_or(path);
                changed.push(name.to_string_lossy().into_owned());
            }
            seen.content = content;
        }
        if !changed.is_empty() {
            changed.sort();
            told.push(Told::Data { changed });
        }
    }
}

fn sooner(next: &mut Option<Duration>, wait: Duration) {
    *next = Some(next.map_or(wait, |next| next.min(wait)));
}

impl Seen {
    /// A file that says it was changed long ago has held still as long.
    fn new(stamp: Stamp, now: Instant, settle: Duration) -> Self {
        let age = stamp.modified.and_then(|modified| modified.elapsed().ok()).unwrap_or_default();
        let since = now.checked_sub(age.min(settle)).unwrap_or(now);
        Self { stamp, since, told: false, known: false, finished: false, content: None }
    }

    fn see(&mut self, stamp: &Stamp, now: Instant, finished: bool) {
        if self.stamp != *stamp {
            self.stamp = stamp.clone();
            self.since = now;
            self.told = false;
            self.finished = false;
        }
        self.finished |= finished;
    }
}

impl Stamp {
    fn of_file(path: &Path) -> io::Result<Self> {
        Ok(Self::of(&fs::metadata(path)?))
    }

    fn of(metadata: &fs::Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        Self {
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
            inode: metadata.ino(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl Files {
    /// Hidden files and folders are somebody's half-written ones, or the inside of a volume such as Kubernetes' `..data`.
    fn collect(&mut self, folder: &Path, depth: usize) -> io::Result<()> {
        let mut entries: Vec<PathBuf> = fs::read_dir(folder)?.flatten().map(|entry| entry.path()).collect();
        entries.sort();
        for path in entries {
            if path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b".")) {
                continue;
            }
            // Links are followed. A file that vanished in between is none any more.
            let Ok(metadata) = fs::metadata(&path) else { continue };
            if metadata.is_dir() {
                if depth >= DEPTH_MAX {
                    self.complaint = Some(format!("folders deeper than {DEPTH_MAX} are not watched"));
                    continue;
                }
                // One that can't be read is told of at the top only.
                let _ = self.collect(&path, depth + 1);
            } else if metadata.is_file() {
                self.add(path, Stamp::of(&metadata), depth);
            }
        }
        Ok(())
    }

    fn add(&mut self, path: PathBuf, stamp: Stamp, depth: usize) {
        match plugin_name(&path).filter(|_| depth == 0) {
            Some(name) => {
                let first = self.plugins.entry(name).or_insert_with(|| (path.clone(), stamp));
                if first.0 != path {
                    self.complaint = Some(format!(
                        "{} and {} are the same plugin's; the first counts, remove one",
                        first.0.display(),
                        path.display()
                    ));
                }
            }
            None if is_unfinished(&path) => {}
            None if self.data.len() >= FILES_MAX => {
                self.complaint = Some(format!("files beyond the first {FILES_MAX} are not watched"));
            }
            None => self.data.push((path, stamp)),
        }
    }
}

/// `NAME` of `NAME.so` or `libNAME.so`.
fn plugin_name(path: &Path) -> Option<String> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".so")?;
    let name = stem.strip_prefix("lib").unwrap_or(stem);
    (!name.is_empty()).then(|| name.to_owned())
}

/// Names under which files are written before they are renamed.
fn is_unfinished(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    ["part", "partial", "tmp", "swp", "crdownload"].contains(&ending) || path.to_string_lossy().ends_with('~')
}

fn content(path: &Path, stamp: &Stamp) -> Option<[u8; 32]> {
    if stamp.bytes > CONTENT_COMPARED_BYTES_MAX {
        return None;
    }
    fs::read(path).ok().map(|bytes| Sha256::digest(bytes).into())
}
