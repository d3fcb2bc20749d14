//! What lies in a volume at one moment, and how much of it could be read. It reads folders and small files, and never knows what was
//! there before.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use modalkit_engine::tree;
use sha2::{Digest, Sha256};

/// Data files up to this are compared by content: a touch or a rewrite with the same bytes is no change. Larger ones are
/// compared by size, time and inode.
const CONTENT_COMPARED_BYTES_MAX: u64 = 16 << 20;
/// Files and folders in a volume beyond these are not watched.
const FILES_MAX: usize = 100_000;
const DEPTH_MAX: usize = 16;

/// What changes when a file does.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) bytes: u64,
    pub(super) modified: Option<SystemTime>,
    pub(super) inode: u64,
    /// Owner and mode change this one alone: a file that could not be read may be readable now.
    changed: (i64, i64),
}

#[derive(Default)]
pub(super) struct Files {
    /// By the plugin's name: the first path is the one that counts.
    pub(super) plugins: BTreeMap<String, (PathBuf, Stamp)>,
    pub(super) data: Vec<(PathBuf, Stamp)>,
    pub(super) warning: Option<String>,
    pub(super) completeness: Completeness,
    /// The folder with the plugins could not be read, or one of its files not be examined.
    pub(super) plugins_partial: bool,
    /// Folders that were entered: links may lead in circles.
    entered: BTreeSet<(u64, u64)>,
}

/// How much of the volume a scan could read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Completeness {
    /// Something could not be read: what isn't here may still be there.
    pub(super) partial: bool,
    /// The volume, or something in it, is a link: what changes behind it is no event.
    pub(super) linked: bool,
}

impl Stamp {
    /// Of a plugin: its file, or all code of its folder.
    pub(super) fn of_plugin(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        if !metadata.is_dir() {
            return Ok(Self::of(&metadata));
        }
        let mut whole = Self::of(&metadata);
        let mut hasher = Sha256::new();
        for inside in tree::code_files(path)? {
            let stamp = Self::of(&fs::metadata(path.join(&inside))?);
            let modified = stamp.modified.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
            hasher.update(inside.as_os_str().as_encoded_bytes());
            for number in [stamp.bytes, stamp.inode, modified.unwrap_or_default().as_nanos() as u64] {
                hasher.update(number.to_le_bytes());
            }
            whole.bytes += stamp.bytes;
            whole.changed = whole.changed.max(stamp.changed);
        }
        hasher.update(tree::environment(path).unwrap_or_default());
        // What was added to a folder that holds no code changes nothing.
        (whole.modified, whole.inode) = (None, u64::from_le_bytes(first_eight(&hasher.finalize())));
        whole.bytes -= metadata.len();
        whole.changed = (0, 0);
        Ok(whole)
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
    pub(super) fn collect(&mut self, folder: &Path) -> io::Result<()> {
        self.collect_below(folder, 0, false)
    }

    /// Of a folder that is a plugin itself.
    pub(super) fn collect_pipeline(&mut self, name: &str, folder: &Path) -> io::Result<()> {
        fs::metadata(folder)?;
        self.add_pipeline(name, folder);
        Ok(())
    }

    /// `of_pipeline`: what is code, or was installed, is no data.
    fn collect_below(&mut self, folder: &Path, depth: usize, of_pipeline: bool) -> io::Result<()> {
        use std::os::unix::fs::MetadataExt;
        let this = fs::metadata(folder)?;
        if !self.entered.insert((this.dev(), this.ino())) {
            return Ok(());
        }
        let is_link = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_symlink());
        let entries: io::Result<Vec<(PathBuf, bool)>> =
            fs::read_dir(folder)?.map(|entry| entry.map(|entry| (entry.path(), is_link(&entry)))).collect();
        let mut entries = entries?;
        entries.sort();
        for (path, is_link) in entries {
            if path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b".")) {
                continue;
            }
            self.completeness.linked |= is_link;
            // Links are followed.
            let metadata = match fs::metadata(&path) {
                Ok(metadata) => metadata,
                Err(error) => {
                    if !is_nothing(&error) {
                        self.warning = Some(format!("can't look at {}: {error}", path.display()));
                        self.miss(depth);
                    }
                    continue;
                }
            };
            if metadata.is_dir() && depth == 0 && tree::is_pipeline(&path) {
                self.add_pipeline(&plugin_name(&path).unwrap_or_default(), &path);
            } else if of_pipeline && metadata.is_dir() && tree::is_passed_over(&path) {
                continue;
            } else if metadata.is_dir() {
                if depth >= DEPTH_MAX {
                    self.warning = Some(format!("folders deeper than {DEPTH_MAX} are not watched"));
                    continue;
                }
                if let Err(error) = self.collect_below(&path, depth + 1, of_pipeline) {
                    self.warning = Some(format!("can't read {} in the volume: {error}", path.display()));
                    self.miss(depth + 1);
                }
            } else if metadata.is_file() && !(of_pipeline && tree::is_code(&path)) {
                self.add(path, Stamp::of(&metadata), depth);
            }
        }
        Ok(())
    }

    /// Something at this depth could not be seen.
    pub(super) fn miss(&mut self, depth: usize) {
        self.completeness.partial = true;
        self.plugins_partial |= depth == 0;
    }

    /// A folder of Python: its code is a plugin, and what else it holds is data.
    fn add_pipeline(&mut self, name: &str, folder: &Path) {
        match Stamp::of_plugin(folder) {
            Ok(stamp) => self.add_plugin(name.to_owned(), folder.to_owned(), stamp),
            Err(error) => {
                self.warning = Some(format!("can't read the pipeline in {}: {error}", folder.display()));
                self.miss(0);
            }
        }
        if let Err(error) = self.collect_below(folder, 1, true) {
            self.warning = Some(format!("can't read {} in the volume: {error}", folder.display()));
            self.miss(1);
        }
    }

    fn add_plugin(&mut self, name: String, path: PathBuf, stamp: Stamp) {
        let first = self.plugins.entry(name).or_insert_with(|| (path.clone(), stamp));
        if first.0 != path {
            self.warning = Some(format!(
                "{} and {} are the same plugin's; the first counts, remove one",
                first.0.display(),
                path.display()
            ));
        }
    }

    fn add(&mut self, path: PathBuf, stamp: Stamp, depth: usize) {
        match name_of_library(&path).filter(|_| depth == 0) {
            Some(name) => self.add_plugin(name, path, stamp),
            None if is_unfinished(&path) => {}
            None if self.data.len() >= FILES_MAX => {
                self.warning = Some(format!("files beyond the first {FILES_MAX} are not watched"));
            }
            None => self.data.push((path, stamp)),
        }
    }
}

fn first_eight(digest: &[u8]) -> [u8; 8] {
    std::array::from_fn(|at| digest.get(at).copied().unwrap_or_default())
}

/// The name of a plugin that lies in a volume: its library's, or its folder's.
pub(super) fn plugin_name(path: &Path) -> Option<String> {
    name_of_library(path).or_else(|| Some(path.file_name()?.to_str()?.to_owned()))
}

/// `NAME` of `NAME.so` or `libNAME.so`.
pub(super) fn name_of_library(path: &Path) -> Option<String> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".so")?;
    let name = stem.strip_prefix("lib").unwrap_or(stem);
    (!name.is_empty()).then(|| name.to_owned())
}

/// Names under which files are written before they are renamed.
fn is_unfinished(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    ["part", "partial", "tmp", "swp", "crdownload"].contains(&ending) || path.to_string_lossy().ends_with('~')
}

/// SHA-256 of a file; `None` where it is too large to be compared by that.
pub(super) fn content(path: &Path, stamp: &Stamp) -> io::Result<Option<[u8; 32]>> {
    if stamp.bytes > CONTENT_COMPARED_BYTES_MAX {
        return Ok(None);
    }
    fs::read(path).map(|bytes| Some(Sha256::digest(bytes).into()))
}

/// Whether an error says that nothing is there: it vanished since its folder was read, or is a link to nothing.
fn is_nothing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP))
}
