//! The mirror's own folder: snapshots, which of them is shown, and how the next one takes its place. Blocking. It never asks a store.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::RwLock;

use crate::{
    error::{MirrorError, local},
    local::differences,
    manifest::{Entry, Manifest, Stamp, source},
    spec::BucketSpec,
};

const SNAPSHOTS: &str = "snapshots";
const CURRENT: &str = "current";
const INCOMING: &str = "incoming";
const CONFLICTS: &str = "conflicts";
/// How long a snapshot stays after another one has taken its place: whoever is reading it gets to the end.
const SNAPSHOT_KEPT: Duration = Duration::from_secs(60);

/// The mirror's own folder, which this process alone uses.
pub(crate) struct Snapshots {
    folder: PathBuf,
    read_only: bool,
    source: String,
    /// What is shown.
    pub(crate) current: Option<Snapshot>,
    /// What was shown, and until when it stays.
    replaced: Vec<(Snapshot, Instant)>,
    /// Conflicts that nobody was told of yet.
    pub(crate) untold: Vec<String>,
    /// Held to read whoever looks through the folder, to write while another snapshot takes its place: a look sees one.
    shown: Arc<RwLock<()>>,
    _lock: File,
}

/// One snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) number: u64,
    pub(crate) folder: PathBuf,
    pub(crate) manifest: Manifest,
}

/// What became of one that took its place.
#[derive(Debug, Default)]
pub(crate) struct Change {
    /// Files that were written here and have changed in the bucket as well: they lie among the conflicts now.
    pub(crate) conflicts: Vec<String>,
}

impl Snapshots {
    /// Takes the folder, with what an earlier process left in it, and has the mount point lead there.
    pub(crate) fn open(spec: &BucketSpec, shown: Arc<RwLock<()>>) -> Result<Self, MirrorError> {
        let folder = std::path::absolute(&spec.folder).map_err(local("find", &spec.folder))?;
        for inside in [SNAPSHOTS, INCOMING] {
            make_folder(&folder.join(inside))?;
        }
        let lock = take_lock(&folder)?;
        lead(&spec.mount_point, &folder.join(CURRENT))?;
        let mut this = Self {
            current: None,
            read_only: spec.read_only,
            source: source(spec),
            replaced: Vec::new(),
            untold: Vec::new(),
            shown,
            _lock: lock,
            folder,
        };
        this.current = this.left_behind()?;
        this.remove_others()?;
        Ok(this)
    }

    /// Where what is fetched lies until it is whole.
    pub(crate) fn incoming(&self) -> PathBuf {
        self.folder.join(INCOMING)
    }

    /// Bytes that the disk has for it.
    pub(crate) fn free_bytes(&self) -> Result<u64, MirrorError> {
        let disk = rustix::fs::statvfs(&self.folder)
            .map_err(|errno| local("look at the disk of", &self.folder)(errno.into()))?;
        Ok(disk.f_bavail * disk.f_frsize)
    }

    /// Objects that are shown, and their bytes.
    pub(crate) fn size(&self) -> (u64, u64) {
        let manifest = self.current.as_ref().map(|current| &current.manifest);
        manifest.map_or((0, 0), |manifest| (manifest.files.len() as u64, manifest.bytes()))
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes a snapshot of these objects, from what was `fetched` and from the current one, and shows it.
    pub(crate) fn show(
        &mut self,
        files: BTreeMap<String, Entry>,
        fetched: &BTreeMap<String, PathBuf>,
    ) -> Result<Change, MirrorError> {
        let number = self.current.as_ref().map_or(1, |current| current.number + 1);
        let folder = self.folder.join(SNAPSHOTS).join(format!("{number:06}"));
        // Of a process that ended over it.
        let _ = fs::remove_dir_all(&folder);
        make_folder(&folder)?;
        let manifest = Manifest { source: self.source.clone(), files, ..Manifest::default() };
        let mut next = Snapshot { number, folder, manifest };
        let mut change = Change::default();
        // Before the files that were written here since: those that both have are conflicts.
        self.fill(&mut next, fetched)?;
        let mut before = self.current.clone();
        if let Some(before) = &mut before {
            self.carry(before, &next, &mut change)?;
        }
        next.manifest.write(&self.manifest_of(number)).map_err(local("write", self.manifest_of(number)))?;
        let link = self.folder.join("current.tmp");
        let _ = fs::remove_file(&link);
        symlink(Path::new(SNAPSHOTS).join(format!("{number:06}")), &link).map_err(local("make", &link))?;
        {
            let _nobody_looks = self.shown.write();
            // The point of no return.
            fs::rename(&link, self.folder.join(CURRENT))
                .map_err(local("replace", self.folder.join(CURRENT)))?;
        }
        self.current = Some(next.clone());
        if let Some(mut before) = before {
            // What was written after it was looked through.
            self.carry(&mut before, &next, &mut change)?;
            self.replaced.push((before, Instant::now() + SNAPSHOT_KEPT));
        }
        Ok(change)
    }

    /// Notes that files of the current snapshot went up as these objects.
    pub(crate) fn note(&mut self, path: &str, entry: Entry) -> Result<(), MirrorError> {
        let Some(current) = &mut self.current else { return Ok(()) };
        current.manifest.files.insert(path.to_owned(), entry);
        let manifest = self.folder.join(SNAPSHOTS).join(format!("{:06}.json", current.number));
        current.manifest.write(&manifest).map_err(local("write", manifest))
    }

    /// Removes snapshots that nobody reads any more; `now`: all that aren't shown.
    pub(crate) fn remove_replaced(&mut self, now: bool) -> Result<(), MirrorError> {
        let worked_in = if self.replaced.is_empty() { Vec::new() } else { working_folders() };
        let is_due = |(snapshot, until): &(Snapshot, Instant)| {
            let is_left = !worked_in.iter().any(|folder| folder.starts_with(&snapshot.folder));
            is_left && (now || *until <= Instant::now())
        };
        let (mut due, kept) = std::mem::take(&mut self.replaced).into_iter().partition::<Vec<_>, _>(is_due);
        self.replaced = kept;
        while let Some((mut snapshot, until)) = due.pop() {
            let mut change = Change::default();
            let removed = match self.current.clone() {
                Some(current) => self.carry(&mut snapshot, &current, &mut change),
                None => Ok(()),
            };
            let removed = removed.and_then(|()| self.remove(snapshot.number));
            self.untold.extend(change.conflicts);
            if let Err(error) = removed {
                // None of them is forgotten.
                self.replaced.push((snapshot, until));
                self.replaced.append(&mut due);
                return Err(error);
            }
        }
        Ok(())
    }

    fn manifest_of(&self, number: u64) -> PathBuf {
        self.folder.join(SNAPSHOTS).join(format!("{number:06}.json"))
    }

    /// The snapshot that an earlier process showed.
    fn left_behind(&self) -> Result<Option<Snapshot>, MirrorError> {
        let Ok(target) = fs::read_link(self.folder.join(CURRENT)) else { return Ok(None) };
        let number = target.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        let Some(number) = number else { return Ok(None) };
        let mut manifest = match Manifest::read(&self.manifest_of(number)) {
            Ok(manifest) => manifest,
            // What was written here could not be told from what was mirrored.
            Err(error) if !self.read_only => {
                return Err(MirrorError::Setup(format!(
                    "{} can't be read ({error}), which says what of {} was mirrored; move that folder away, with what was written into it, and start again",
                    self.manifest_of(number).display(),
                    self.folder.display()
                )));
            }
            Err(_) => return Ok(None),
        };
        // Of a process that ended before the snapshot that took these along was shown.
        manifest.carried.clear();
        let snapshot = Snapshot { number, folder: self.folder.join(target), manifest };
        if snapshot.manifest.source == self.source {
            return Ok(Some(snapshot));
        }
        let written = differences(&snapshot.folder, &snapshot.manifest).unwrap_or_default().written;
        match written.keys().next() {
            Some(path) if !self.read_only => Err(MirrorError::Setup(format!(
                "{} holds files of {} that have not gone up, {path:?} among them, and {} is to be mirrored there now; move that folder away, or give this mount another name",
                self.folder.display(),
                snapshot.manifest.source,
                self.source
            ))),
            _ => {
                // Another bucket's objects are not shown as this one's.
                let link = self.folder.join(CURRENT);
                fs::remove_file(&link).map_err(local("remove", link))?;
                Ok(None)
            }
        }
    }

    /// What an earlier process was making, or had replaced. What was written there in its last moments is kept.
    fn remove_others(&mut self) -> Result<(), MirrorError> {
        let mut change = Change::default();
        let folder = self.folder.join(SNAPSHOTS);
        let shown = self.current.as_ref().map(|current| current.number);
        for entry in fs::read_dir(&folder).map_err(local("read", &folder))? {
            let path = entry.map_err(local("read", &folder))?.path();
            let number = path.file_stem().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            let Some(number) = number.filter(|number| Some(*number) != shown) else { continue };
            if path.extension().is_some() {
                continue;
            }
            // Without a manifest it was never shown.
            if let (Some(current), Ok(manifest)) = (&self.current, Manifest::read(&self.manifest_of(number)))
            {
                let mut old = Snapshot { number, folder: path.clone(), manifest };
                self.carry(&mut old, current, &mut change)?;
            }
            self.remove(number)?;
        }
        self.untold.append(&mut change.conflicts);
        Ok(())
    }

    fn remove(&self, number: u64) -> Result<(), MirrorError> {
        let folder = self.folder.join(SNAPSHOTS).join(format!("{number:06}"));
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(local("remove", folder)(error)),
            _ => {
                let _ = fs::remove_file(self.manifest_of(number));
                Ok(())
            }
        }
    }

    /// Puts every object of a new snapshot in its place.
    fn fill(&self, next: &mut Snapshot, fetched: &BTreeMap<String, PathBuf>) -> Result<(), MirrorError> {
        let mode = fs::Permissions::from_mode(if self.read_only { 0o444 } else { 0o644 });
        for (path, entry) in &mut next.manifest.files {
            let to = next.folder.join(path);
            if entry.stamp.is_none() && !fetched.contains_key(path) {
                make_folder(&to)?;
                continue;
            }
            if let Some(parent) = to.parent() {
                make_folder(parent)?;
            }
            match (fetched.get(path), &self.current) {
                (Some(from), _) => {
                    fs::set_permissions(from, mode.clone()).map_err(local("change the mode of", from))?;
                    fs::rename(from, &to).map_err(local("put in place", &to))?;
                    let metadata = fs::symlink_metadata(&to).map_err(local("look at", &to))?;
                    entry.stamp = Some(Stamp::of(&metadata));
                }
                (None, Some(current)) => {
                    let from = current.folder.join(path);
                    fs::hard_link(&from, &to).map_err(local("link", from))?;
                }
                (None, None) => {}
            }
        }
        Ok(())
    }

    /// Takes along what was written into one snapshot since it was made or last looked through, and isn't in another. Where that has other
    /// content by now, it is a conflict.
    fn carry(&self, from: &mut Snapshot, to: &Snapshot, change: &mut Change) -> Result<(), MirrorError> {
        if self.read_only {
            return Ok(());
        }
        let found = differences(&from.folder, &from.manifest).map_err(local("look through", &from.folder))?;
        for path in found.folders {
            let _ = make_folder(&to.folder.join(path));
        }
        if found.written.is_empty() {
            return Ok(());
        }
        for (path, stamp) in found.written {
            let (file, target) = (from.folder.join(&path), to.folder.join(&path));
            let there = fs::symlink_metadata(&target).ok().map(|there| Stamp::of(&there));
            if there != Some(stamp) && !self.take_along(from, to, &path, there)? {
                self.keep_conflict(&file, &path)?;
                change.conflicts.push(path.clone());
            }
            from.manifest.carried.insert(path, stamp);
        }
        let manifest = self.manifest_of(from.number);
        from.manifest.write(&manifest).map_err(local("write", manifest))
    }

    /// Links a written file into another snapshot; `false` where that has something else in its place.
    fn take_along(
        &self,
        from: &Snapshot,
        to: &Snapshot,
        path: &str,
        there: Option<Stamp>,
    ) -> Result<bool, MirrorError> {
        let (file, target) = (from.folder.join(path), to.folder.join(path));
        let (old, new) = (from.manifest.files.get(path), to.manifest.files.get(path));
        let same_object = match (old, new) {
            (None, None) => true,
            (Some(old), Some(new)) => old.object.is_same(&new.object),
            _ => false,
        };
        // Nobody has written it there since.
        let untouched = there.is_none() || new.is_some_and(|entry| entry.stamp == there);
        if !same_object || !untouched {
            return Ok(false);
        }
        // A file of the bucket's may stand where a folder of this one's did.
        if target.parent().is_some_and(|parent| fs::create_dir_all(parent).is_err()) {
            return Ok(false);
        }
        // Beside it first: there is never a moment without a file.
        let beside = to.folder.with_extension("carried");
        let _ = fs::remove_file(&beside);
        match fs::hard_link(&file, &beside) {
            // Its writer has taken it away again.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            linked => linked.map_err(local("link", file))?,
        }
        match fs::rename(&beside, &target) {
            // A folder of the bucket's stands there.
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                fs::remove_file(&beside).map_err(local("remove", beside))?;
                Ok(false)
            }
            renamed => renamed.map(|()| true).map_err(local("put in place", target)),
        }
    }

    fn keep_conflict(&self, file: &Path, path: &str) -> Result<(), MirrorError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let kept = self.folder.join(CONFLICTS).join(format!("{path}.{now}"));
        if let Some(parent) = kept.parent() {
            fs::create_dir_all(parent).map_err(local("make", parent))?;
        }
        match fs::hard_link(file, &kept) {
            Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {
                Err(local("keep a conflicting file as", kept)(error))
            }
            _ => Ok(()),
        }
    }
}

/// A folder, and those above it, that nobody but its owner may write: plugins may lie in it.
fn make_folder(path: &Path) -> Result<(), MirrorError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(path);
    made.map_err(local("make", path))
}

/// Where processes of this user work: a snapshot that one of them works in stays.
fn working_folders() -> Vec<PathBuf> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|process| fs::read_link(process.path().join("cwd")).ok()).collect()
}

fn take_lock(folder: &Path) -> Result<File, MirrorError> {
    let path = folder.join("lock");
    let lock = File::create(&path).map_err(local("make", &path))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(_) => Err(MirrorError::Setup(format!(
            "another process mirrors into {}; give each host a folder of its own (server.buckets_folder)",
            folder.display()
        ))),
    }
}

/// Has a mount point lead to what is shown. Where it does already, as in an image that was built for it, nothing has to be writable.
fn lead(mount_point: &Path, current: &Path) -> Result<(), MirrorError> {
    let refuse = |found: &str| {
        Err(MirrorError::Setup(format!(
            "expected nothing at the mount point {}, an empty folder that may be removed, or a link to {}; found {found}",
            mount_point.display(),
            current.display()
        )))
    };
    match fs::symlink_metadata(mount_point) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(local("look at", mount_point)(error)),
        Ok(found) if found.is_symlink() => {
            return match fs::read_link(mount_point) {
                Ok(target) if target == current => Ok(()),
                Ok(target) => refuse(&format!("a link to {}", target.display())),
                Err(error) => Err(local("read", mount_point)(error)),
            };
        }
        Ok(found) if found.is_dir() => {
            if let Err(error) = fs::remove_dir(mount_point) {
                return refuse(&format!("a folder that can't be removed ({error})"));
            }
        }
        Ok(_) => return refuse("a file"),
    }
    if let Some(parent) = mount_point.parent() {
        fs::create_dir_all(parent).map_err(local("make", parent))?;
    }
    match symlink(current, mount_point) {
        Ok(()) => Ok(()),
        Err(error) => refuse(&format!("nothing, and a link can't be made there ({error})")),
    }
}
