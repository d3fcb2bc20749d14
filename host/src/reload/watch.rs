//! Watches volumes for plugin files and says which have settled. It compares what it sees with what it saw, and never
//! opens a file.

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use notify::{
    EventKind, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use tokio::sync::Notify;

use super::PluginFiles;
use crate::config::Volume;

/// How often volumes are looked at without any event: some file systems send none.
const RESCAN: Duration = Duration::from_secs(2);

pub(super) struct Watch {
    volumes: Vec<Volume>,
    settle: Duration,
    events: Arc<Notify>,
    seen: HashMap<PathBuf, Seen>,
    /// Volumes of which it was said that they can't be read.
    unreadable: Vec<PathBuf>,
    looked: bool,
    /// Ends the watch with this value.
    _watcher: Option<notify::RecommendedWatcher>,
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
}

impl Watch {
    pub(super) fn start(volumes: &[Volume], settle: Duration) -> Self {
        let events = Arc::new(Notify::new());
        let watcher = native(volumes, Arc::clone(&events))
            .inspect_err(|error| tracing::warn!(%error, every = ?RESCAN, "no events from the file system; volumes are looked at regularly"))
            .ok();
        Self {
            volumes: volumes.to_vec(),
            settle,
            events,
            seen: HashMap::new(),
            unreadable: Vec::new(),
            looked: false,
            _watcher: watcher,
        }
    }

    /// Waits for plugin files that are new or changed, and have held still since; the first look may find none.
    /// Cancel-safe: what was seen is kept.
    pub(super) async fn settled(&mut self) -> PluginFiles {
        loop {
            let (files, pause) = self.look();
            let first = !std::mem::replace(&mut self.looked, true);
            if first || !files.is_empty() {
                return files;
            }
            let _ = tokio::time::timeout(pause, self.events.notified()).await;
        }
    }

    /// Whether no file is on its way.
    pub(super) fn is_quiet(&self) -> bool {
        self.seen.values().all(|seen| seen.reported)
    }

    /// The files that have settled since the last look, and when to look again.
    fn look(&mut self) -> (PluginFiles, Duration) {
        let now = Instant::now();
        let mut settled = PluginFiles::new();
        let mut pause = RESCAN;
        for (name, path, stamp) in self.plugin_files() {
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
        Self { bytes: metadata.len(), modified: metadata.modified().ok(), inode: metadata.ino() }
    }
}

fn native(volumes: &[Volume], events: Arc<Notify>) -> notify::Result<notify::RecommendedWatcher> {
    // Looking at a folder is an event as well: without this filter the watch would wake itself for ever.
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| changes_something(event.kind)) {
            events.notify_one();
        }
    })?;
    for volume in volumes {
        watcher.watch(&volume.mount_point, RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
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

    #[tokio::test(start_paused = true)]
    async fn a_file_is_reported_once_after_it_held_still() {
        let folder = tempfile::tempdir().unwrap();
        let volume = Volume { name: "v".into(), mount_point: folder.path().to_owned() };
        let mut watch = Watch::start(&[volume], Duration::ZERO);
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
