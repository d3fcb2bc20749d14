//! Watches one volume on a thread of its own and says what has changed and settled: plugin files as private copies, model data
//! by name. Events are hints that something may have happened; what did is found by looking. It never opens a plugin as a
//! library, and never knows models.
//!
//! A plugin file has settled when it is whole (its ELF section table lies within it) and its writer has closed or renamed it, or
//! it has held still for `settle_ms`. One that events show being written waits for its end, for `settle_timeout` at most; one
//! that was written over in place, with nobody seen, holds still for longer. So does model data, which says nothing of itself.

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
/// Between two tries to copy a file that could not be copied for reasons outside of it.
const RETRY: Duration = Duration::from_secs(1);
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
        written: Arc::default(),
        asked: Arc::clone(&asked),
        pause: match watching {
            Watching::Native => NATIVE_LOOK,
            _ => server.poll_interval,
        },
        native: watching != Watching::Poll,
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
    native: bool,
    told_no_events: bool,
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
        let mut watched = self.look.identity();
        while !self.told.is_closed() {
            // Taken before the look, which sees at least what they speak of.
            let finished = std::mem::take(&mut *self.finished.lock());
            let asked = self.asked.load(Ordering::SeqCst);
            let writing = self.written.lock().clone();
            let now = Instant::now();
            let hints = Hints { finished: &finished, writing: &writing, hurry: asked > answered };
            let files = self.look.collect();
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
            if self.native && (watcher.is_none() || watched != now_there) {
                // The folder may have come meanwhile, or another one may have taken its place.
                watcher = self.watcher(ring);
                watched = now_there;
            }
            let pause = if watcher.is_some() || !self.native { self.pause } else { self.poll_interval };
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
        if !self.native {
            return None;
        }
        let (ring, finished, written) = (ring.clone(), Arc::clone(&self.finished), Arc::clone(&self.written));
        // Looking at a folder is an event as well: without these filters the watch would wake itself for ever.
        let on_event = move |event: notify::Result<notify::Event>| {
            let Ok(event) = event else { return };
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

/// What a look knows beside what it sees.
struct Hints<'h> {
    /// Files whose writers have closed or renamed them since the last look.
    finished: &'h BTreeSet<PathBuf>,
    /// Files that are being written.
    writing: &'h BTreeSet<PathBuf>,
    /// Somebody waits: nothing needs to hold still.
    hurry: bool,
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
    /// Since when some data has been on its way.
    data_moves_since: Option<Instant>,
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
    /// It was written over since it was told: the same file with other content.
    in_place: bool,
    /// When to try again what may pass.
    again: Option<Instant>,
    /// Why it could not be copied.
    complaint: Option<String>,
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
    /// Some folder could not be read: what isn't here may still be there.
    partial: bool,
    /// Folders that were entered: links may lead in circles.
    entered: BTreeSet<(u64, u64)>,
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
            data_moves_since: None,
            complaint: None,
        }
    }

    /// Whether no plugin file is on its way.
    fn is_quiet(&self) -> bool {
        self.plugins.values().all(|seen| seen.told)
    }

    /// Which folder it is now, however it is called.
    fn identity(&self) -> Option<(u64, u64)> {
        use std::os::unix::fs::MetadataExt;
        let metadata = fs::metadata(&self.mount_point).ok()?;
        Some((metadata.dev(), metadata.ino()))
    }

    /// What lies in the volume.
    fn collect(&mut self) -> Files {
        let mut files = Files::default();
        if let Err(error) = files.collect(&self.mount_point, 0) {
            files.complaint = Some(format!("can't read the volume: {error}"));
            files.partial = true;
        }
        if self.complaint != files.complaint {
            if let Some(complaint) = &files.complaint {
                tracing::warn!(volume = self.volume, folder = %self.mount_point.display(), "{complaint}");
            }
            self.complaint.clone_from(&files.complaint);
        }
        files
    }

    /// The plugins that have settled since the last look or are gone, and when to look again where something hasn't settled.
    fn plugins(&mut self, now: Instant, hints: &Hints<'_>, files: &Files) -> (Vec<Told>, Option<Duration>) {
        let mut told = Vec::new();
        let mut next = None;
        // What can't be read isn't gone, as far as anybody knows. What is gone is told first: a plugin may have another name now.
        if !files.partial {
            self.plugins.retain(|path, seen| {
                let there = files.plugins.values().any(|(known, _)| known == path);
                if !there && seen.known {
                    let name = plugin_name(path).unwrap_or_default();
                    told.push(Told::Gone { name, path: path.clone() });
                }
                there
            });
        }
        self.look_at_plugins(now, hints, &files.plugins, &mut told, &mut next);
        (told, next)
    }

    fn look_at_plugins(
        &mut self,
        now: Instant,
        hints: &Hints<'_>,
        files: &BTreeMap<String, (PathBuf, Stamp)>,
        told: &mut Vec<Told>,
        next: &mut Option<Duration>,
    ) {
        for (name, (path, stamp)) in files {
            let seen = self
                .plugins
                .entry(path.clone())
                .or_insert_with(|| Seen::new(stamp.clone(), now, self.settle));
            seen.see(stamp, now, hints.finished.contains(path));
            let again = seen.again.is_some_and(|again| again <= now);
            if seen.told && !again {
                if let Some(again) = seen.again {
                    sooner(next, again - now);
                }
                continue;
            }
            let still = now.saturating_duration_since(seen.since);
            let mut wait = match seen.finished || hints.hurry {
                true => Duration::ZERO,
                // Written over without an end that anybody saw: there is nothing in the file that would tell.
                false if seen.in_place => DATA_SETTLE.max(self.settle),
                false => self.settle,
            };
            let unfinished = hints.writing.contains(path) && !seen.finished;
            if still >= wait && (unfinished || !modalkit_loader::is_whole(path).unwrap_or(true)) {
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
            let complaint = staged.as_ref().err().filter(|error| error.may_pass()).map(LoadError::chain);
            // The file may be as it was when its folder's mode, or the room for the copy, has changed.
            seen.again = complaint.as_ref().map(|_| now + RETRY);
            let same = complaint.is_some() && complaint == seen.complaint;
            seen.complaint = complaint;
            seen.told = true;
            seen.known = true;
            let is_queue = staged.as_ref().is_ok_and(|staged| modalkit_loader::exports_queue(staged.path()));
            if is_queue {
                // Whoever delivers results looks for it by its name; it is no model.
                tracing::info!(
                    plugin = name,
                    "a queue backend is in the volume; backends of queue_config with kind = \"plugin\" can name it"
                );
            } else if !same {
                told.push(Told::Plugin {
                    name: name.clone(),
                    path: path.clone(),
                    staged: staged.map_err(Arc::new),
                });
            }
        }
    }

    /// The data that has settled since the last look.
    fn data(&mut self, now: Instant, hints: &Hints<'_>, files: Files) -> (Vec<Told>, Option<Duration>) {
        if !files.partial {
            let there: BTreeSet<&PathBuf> = files.data.iter().map(|(path, _)| path).collect();
            // What is loaded doesn't need its files any more: a file that is gone is no change.
            self.data.retain(|path, _| there.contains(path));
        }
        for (path, stamp) in files.data {
            let finished = hints.finished.contains(&path);
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
        self.data_known |= !files.partial;
        let wait_of = |seen: &Seen| match (hints.hurry, seen.finished) {
            (true, _) => Duration::ZERO,
            (_, true) => self.settle,
            (_, false) => DATA_SETTLE.max(self.settle),
        };
        let waits = |seen: &Seen| {
            wait_of(seen)
                .checked_sub(now.saturating_duration_since(seen.since))
                .filter(|wait| !wait.is_zero())
        };
        let longest = self.data.values().filter(|seen| !seen.told).filter_map(waits).max();
        // What belongs together is told together: weights and the labels beside them. A file that never holds still holds up
        // the others for so long only.
        let since = *self.data_moves_since.get_or_insert(now);
        if longest.is_some() && now.saturating_duration_since(since) < self.settle_timeout {
            return (Vec::new(), longest);
        }
        self.data_moves_since = longest.map(|_| now);
        let mut changed = Vec::new();
        for (path, seen) in &mut self.data {
            if seen.told || waits(seen).is_some() {
                continue;
            }
            seen.told = true;
            let content = content(path, &seen.stamp);
            if content.is_none() || content != seen.content {
                let name = path.strip_prefix(&self.mount_point).unwrap_or(path);
                changed.push(name.to_string_lossy().into_owned());
            }
            seen.content = content;
        }
        changed.sort();
        let told = if changed.is_empty() { Vec::new() } else { vec![Told::Data { changed }] };
        (told, longest)
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
        Self {
            stamp,
            since,
            told: false,
            known: false,
            finished: false,
            in_place: false,
            again: None,
            complaint: None,
            content: None,
        }
    }

    fn see(&mut self, stamp: &Stamp, now: Instant, finished: bool) {
        if self.stamp != *stamp {
            self.in_place = self.known && self.stamp.inode == stamp.inode;
            self.again = None;
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
        use std::os::unix::fs::MetadataExt;
        let this = fs::metadata(folder)?;
        if !self.entered.insert((this.dev(), this.ino())) {
            return Ok(());
        }
        let entries: io::Result<Vec<PathBuf>> =
            fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect();
        let mut entries = entries?;
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
                if let Err(error) = self.collect(&path, depth + 1) {
                    self.complaint = Some(format!("can't read {} in the volume: {error}", path.display()));
                    self.partial = true;
                }
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use modalkit_loader::{Store, Trust};

    use super::*;
    use crate::config;

    struct Watched {
        look: Look,
        folder: tempfile::TempDir,
        begun: Instant,
    }

    impl Watched {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let server = config::load(&[], &config::Environment::default()).unwrap().config.server;
            let store = Store::new(Trust { any_owner: false, any_mode: false }).unwrap();
            let gauge = crate::telemetry::Metrics::new(crate::traces::Traces::default()).libraries.clone();
            let builder = Arc::new(Builder::new(store, Duration::from_secs(1), 1, gauge));
            let volume =
                Volume { name: "v".into(), mount_point: folder.path().to_owned(), watch: Watching::Poll };
            Self { look: Look::new(&volume, &server, builder), folder, begun: Instant::now() }
        }

        /// Written at a moment from which it has not held still at all.
        fn write(&self, name: &str, content: &[u8]) -> PathBuf {
            let path = self.folder.path().join(name);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
            let later = SystemTime::now() + Duration::from_secs(3600);
            fs::File::options().append(true).open(&path).unwrap().set_modified(later).unwrap();
            path
        }

        /// What is told after this many milliseconds.
        fn told(&mut self, after_ms: u64, finished: &[&PathBuf]) -> Vec<String> {
            let finished = finished.iter().map(|path| (*path).clone()).collect();
            let hints = Hints { finished: &finished, writing: &BTreeSet::new(), hurry: false };
            let now = self.begun + Duration::from_millis(after_ms);
            let files = self.look.collect();
            let (mut told, _) = self.look.plugins(now, &hints, &files);
            told.extend(self.look.data(now, &hints, files).0);
            let words = |told: Told| match told {
                Told::Plugin { name, staged: Ok(_), .. } => name,
                Told::Plugin { name, staged: Err(error), .. } => format!("{name}: {error}"),
                Told::Gone { name, .. } => format!("{name} is gone"),
                Told::Data { changed } => changed.join(" "),
                Told::Looked { .. } => unreachable!("the thread tells that"),
            };
            told.into_iter().map(words).collect()
        }
    }

    #[test]
    fn names_are_read_from_files() {
        let name = |path: &str| plugin_name(Path::new(path));
        assert_eq!(name("/v/echo.so").as_deref(), Some("echo"));
        assert_eq!(name("/v/libecho.so").as_deref(), Some("echo"));
        assert_eq!((name("/v/lib.so"), name("/v/echo.so.part")), (None, None));
    }

    #[test]
    fn a_plugin_is_told_once_when_it_has_held_still_or_its_writer_has_ended() {
        let mut watched = Watched::new();
        let text = [b'x'; 100];
        watched.write("echo.so", &text);
        watched.write(".hidden.so", &text);
        assert!(watched.told(0, &[]).is_empty() && watched.told(199, &[]).is_empty());
        assert_eq!(watched.told(200, &[]), ["echo"]);
        assert!(watched.told(900, &[]).is_empty());
        let path = watched.write("echo.so", &[b'y'; 101]);
        assert_eq!(watched.told(1000, &[&path]), ["echo"]);
        // What was told of isn't gone before it is; another name for it comes after.
        fs::rename(&path, watched.folder.path().join("libecho.so")).unwrap();
        let new = watched.folder.path().join("libecho.so");
        assert_eq!(watched.told(1100, &[&new]), ["echo is gone", "echo"]);
    }

    #[test]
    fn half_a_library_waits_for_the_rest_up_to_the_timeout() {
        let mut watched = Watched::new();
        let whole = fs::read(std::env::current_exe().unwrap()).unwrap();
        watched.write("half.so", &whole[..5000]);
        assert!(watched.told(0, &[]).is_empty() && watched.told(9_999, &[]).is_empty());
        assert_eq!(watched.told(10_000, &[]), ["half"]);
    }

    #[test]
    fn a_refusal_for_its_folder_is_looked_at_again() {
        let mut watched = Watched::new();
        let path = watched.write("echo.so", &[b'x'; 100]);
        let mode = |mode| {
            fs::set_permissions(path.parent().unwrap(), fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(0o777);
        assert!(watched.told(0, &[&path])[0].contains("may be written by everybody"));
        assert!(watched.told(1500, &[]).is_empty(), "the same is told once");
        mode(0o755);
        assert_eq!(watched.told(3000, &[]), ["echo"]);
    }

    #[test]
    fn data_is_told_together_and_by_content() {
        let mut watched = Watched::new();
        watched.write("weights.bin", b"one");
        assert!(watched.told(0, &[]).is_empty(), "what was there before is no change");
        let weights = watched.write("weights.bin", b"two");
        watched.write("labels.txt", b"new");
        assert!(watched.told(100, &[&weights]).is_empty(), "the labels are on their way");
        assert_eq!(watched.told(2_100, &[]), ["labels.txt weights.bin"]);
        watched.write("weights.bin", b"two");
        fs::remove_file(watched.folder.path().join("labels.txt")).unwrap();
        assert!(watched.told(3_000, &[]).is_empty() && watched.told(9_000, &[]).is_empty());
        // A file that never holds still holds up the others for so long only.
        watched.write("weights.bin", b"three");
        for moment in 0..10 {
            watched.write("log.bin", &vec![0; moment + 1]);
            assert!(watched.told(10_000 + 1_000 * moment as u64, &[]).is_empty());
        }
        watched.write("log.bin", &[1; 99]);
        assert_eq!(watched.told(20_500, &[]), ["weights.bin"]);
    }
}
