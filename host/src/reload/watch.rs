//! Watches volumes for plugin files and says which have settled. It compares what it sees with what it saw, and never
//! opens a file.

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    sync::mpsc::SyncSender,
    thread,
    time::{Duration, Instant, SystemTime},
};

use notify::{
    EventKind, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use tokio::sync::mpsc;

use super::PluginFiles;
use crate::config::Volume;
use modalkit_loader::LoadError;

/// How often volumes are looked at without any event: some file systems send none.
const RESCAN: Duration = Duration::from_secs(2);

/// Looks are at least this far apart, however many events come.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// What a look found.
pub(super) struct Found {
    /// Plugin files that are new or changed, and have held still since.
    pub(super) files: PluginFiles,
    /// No file is on its way.
    pub(super) quiet: bool,
}

/// Starts watching on a thread of its own: a volume on a mount that hangs holds up nothing else. The first look is always
/// told, later ones where they found something. The thread ends after the receiver.
pub(super) fn start(volumes: &[Volume], settle: Duration) -> Result<mpsc::Receiver<Found>, LoadError> {
    let (found, receiver) = mpsc::channel(1);
    let (ring, bell) = std::sync::mpsc::sync_channel(1);
    let mut watch = Watch::new(volumes, settle);
    let volumes = volumes.to_vec();
    let run = move || {
        let _watchers = native(&volumes, &ring);
        let mut told_quiet = false;
        loop {
            let (files, pause) = watch.look();
            let quiet = watch.is_quiet();
            if !files.is_empty() || quiet && !told_quiet {
                told_quiet = quiet;
                if found.blocking_send(Found { files, quiet }).is_err() {
                    return;
                }
            }
            thread::sleep(BETWEEN_LOOKS);
            // Whether something rang or the time is over: the next look tells.
            let _ = bell.recv_timeout(pause);
            if found.is_closed() {
                return;
            }
        }
    };
    thread::Builder::new().name("watch".into()).spawn(run).map_err(|source| LoadError::Io {
        doing: "start the thread that watches",
        path: PathBuf::from("the volumes"),
        source,
    })?;
    Ok(receiver)
}

struct Watch {
    volumes: Vec<Volume>,
    settle: Duration,
    seen: HashMap<PathBuf, Seen>,
    /// Volumes of which it was said that they can't be read.
    unreadable: Vec<PathBuf>,
}

struct Seen {
    stamp: Stamp,
    since: Instant,
    reported: bool,
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

impl Watch {
    fn new(volumes: &[Volume], settle: Duration) -> Self {
        Self { volumes: volumes.to_vec(), settle, seen: HashMap::new(), unreadable: Vec::new() }
    }

    /// Whether no file is on its way.
    fn is_quiet(&self) -> bool {
        self.seen.values().all(|seen| seen.reported)
    }

    /// The files that have settled since the last look, and when to look again.
    fn look(&mut self) -> (PluginFiles, Duration) {
        let now = Instant::now();
        let mut settled = PluginFiles::new();
        let mut pause = RESCAN;
        let files = self.plugin_files();
        self.seen.retain(|path, _| files.iter().any(|(_, file, _)| file == path));
        for (name, path, stamp) in files {
            let seen = self.seen.entry(path.clone()).or_insert_with(|| Seen {
                since: now.checked_sub(age(&stamp).min(self.settle)).unwrap_or(now),
                stamp: stamp.clone(),
                reported: false,
            });
            if seen.stamp != stamp {
                *seen = Seen { stamp, since: now, reported: false };
            }
            let quiet = now - seen.since;
            if seen.reported {
                continue;
            }
            if quiet < self.settle {
                pause = pause.min(self.settle - quiet);
                continue;
            }
            seen.reported = true;
            settled.insert(name, path);
        }
        (settled, pause)
    }

    fn plugin_files(&mut self) -> Vec<(String, PathBuf, Stamp)> {
        let mut files = Vec::new();
        for volume in &self.volumes {
            let entries = match fs::read_dir(&volume.mount_point) {
                Ok(entries) => entries,
                Err(error) => {
                    if !self.unreadable.contains(&volume.mount_point) {
                        tracing::warn!(volume = volume.name, folder = %volume.mount_point.display(), %error, "can't read the volume");
                        self.unreadable.push(volume.mount_point.clone());
                    }
                    continue;
                }
            };
            self.unreadable.retain(|folder| *folder != volume.mount_point);
            for path in entries.flatten().map(|entry| entry.path()) {
                let Some(name) = plugin_name(&path) else { continue };
                // A file that vanished in between is no plugin any more.
                let Ok(metadata) = fs::metadata(&path) else { continue };
                if metadata.is_file() {
                    files.push((name, path, Stamp::of(&metadata)));
                }
            }
        }
        files.sort_by(|a, b| a.1.cmp(&b.1));
        files
    }
}

/// `NAME` of `NAME.so` or `libNAME.so`; hidden files are somebody's half-written ones.
fn plugin_name(path: &std::path::Path) -> Option<String> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".so")?;
    let name = stem.strip_prefix("lib").unwrap_or(stem);
    (!name.is_empty() && !stem.starts_with('.')).then(|| name.to_owned())
}

/// How long ago the file says it was changed.
fn age(stamp: &Stamp) -> Duration {
    stamp.modified.and_then(|modified| modified.elapsed().ok()).unwrap_or_default()
}

impl Stamp {
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

/// One watcher a volume: where one can't be watched, the others' events still come. They end with what is returned.
fn native(volumes: &[Volume], ring: &SyncSender<()>) -> Vec<notify::RecommendedWatcher> {
    let watch = |volume: &Volume| {
        let ring = ring.clone();
        // Looking at a folder is an event as well: without this filter the watch would wake itself for ever.
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| changes_something(event.kind)) {
                // A bell that rings already rings for this event too.
                let _ = ring.try_send(());
            }
        })?;
        watcher.watch(&volume.mount_point, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    };
    let said = |volume: &Volume, error: &notify::Error| {
        tracing::warn!(volume = volume.name, %error, every = ?RESCAN, "no events from this volume; it is looked at regularly");
    };
    volumes.iter().filter_map(|volume| watch(volume).inspect_err(|error| said(volume, error)).ok()).collect()
}

fn changes_something(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_from_files_and_hidden_ones_are_passed_over() {
        let name = |path: &str| plugin_name(std::path::Path::new(path));
        assert_eq!(name("/v/echo.so").as_deref(), Some("echo"));
        assert_eq!(name("/v/libecho.so").as_deref(), Some("echo"));
        assert_eq!(name("/v/.echo.so"), None);
        assert_eq!(name("/v/echo.so.part"), None);
    }

    #[test]
    fn a_file_is_reported_once_after_it_held_still() {
        let folder = tempfile::tempdir().unwrap();
        let volume = Volume { name: "v".into(), mount_point: folder.path().to_owned() };
        let mut watch = Watch::new(&[volume], Duration::ZERO);
        fs::write(folder.path().join("echo.so"), b"one").unwrap();
        assert_eq!(watch.look().0.len(), 1);
        assert!(watch.look().0.is_empty());
        fs::write(folder.path().join("echo.so"), b"longer").unwrap();
        assert_eq!(watch.look().0.len(), 1);
        watch.settle = Duration::from_secs(3600);
        fs::write(folder.path().join("other.so"), b"half").unwrap();
        let (settled, pause) = watch.look();
        assert!(settled.is_empty() && pause <= RESCAN);
    }
}
