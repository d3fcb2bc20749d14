//! Objects into files: several at a time, large ones in parts, each on the condition that it is still what the listing said. What is there when
//! a fetch ends early is not fetched again.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use futures_util::TryStreamExt;
use object_store::{Error as StoreError, GetOptions, GetRange};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

use crate::{
    error::{MirrorError, local},
    listing::{Object, location},
    progress::Progress,
    spec::BucketSpec,
    store::Store,
};

/// Requests at once.
const REQUESTS_MAX: usize = 16;
/// Objects larger than this are fetched in parts of as many bytes.
const PART_BYTES: u64 = 8 << 20;
/// Bytes that are written at once.
const WRITE_BYTES: usize = 256 << 10;
/// Tries of a part whose transfer was cut off.
const TRIES: usize = 3;
/// What the system says of its start: parts that were written before it may not have reached the disk.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Tries of objects of one part.
static ATTEMPTS: AtomicU64 = AtomicU64::new(0);

/// Asks a store for objects.
pub(crate) struct Fetcher {
    pub(crate) store: Store,
    pub(crate) spec: BucketSpec,
    /// Where files lie until they are put in place.
    pub(crate) incoming: PathBuf,
    pub(crate) progress: Progress,
}

/// Why objects were not fetched.
#[derive(Debug)]
pub(crate) enum FetchError {
    /// One isn't any more what the listing said.
    Changed(String),
    /// It failed.
    Failed(MirrorError),
}

impl From<MirrorError> for FetchError {
    fn from(error: MirrorError) -> Self {
        Self::Failed(error)
    }
}

/// One request's worth of an object.
struct Part {
    path: String,
    range: Option<Range<u64>>,
    target: Arc<Target>,
}

/// The file that an object becomes.
struct Target {
    object: Object,
    half: PathBuf,
    whole: PathBuf,
    file: File,
    parts_left: AtomicUsize,
    /// Which parts are there, for a process that goes on; `None` for an object of one part.
    journal: Option<Mutex<File>>,
}

impl Fetcher {
    /// Fetches these objects: the files that they became. One without a file is the marker of a folder.
    pub(crate) async fn fetch(
        self: Arc<Self>,
        wanted: BTreeMap<String, Object>,
    ) -> Result<BTreeMap<String, Option<PathBuf>>, FetchError> {
        let mut files = BTreeMap::new();
        let mut missing = VecDeque::new();
        for (path, object) in wanted {
            let whole = self.incoming.join(format!("{}.whole", name_of(&path, &object)));
            if fs::metadata(&whole).is_ok_and(|found| found.len() == object.bytes) {
                self.progress.had(object.bytes);
                self.progress.files_done.fetch_add(1, Ordering::Relaxed);
                files.insert(path, Some(whole));
            } else {
                missing.push_back((path, object));
            }
        }
        // Dropped, it ends its requests.
        let (mut requests, mut parts) = (JoinSet::new(), VecDeque::new());
        loop {
            while requests.len() < REQUESTS_MAX {
                if let Some(part) = parts.pop_front() {
                    requests.spawn(Arc::clone(&self).fetch_part(part));
                } else if let Some((path, object)) = missing.pop_front() {
                    // Files are opened when their turn comes, and not all at once.
                    parts.extend(self.parts(&path, &object)?);
                } else {
                    break;
                }
            }
            let Some(fetched) = requests.join_next().await else { return Ok(files) };
            let failed = |error| MirrorError::Setup(format!("a request failed inside the host: {error}"));
            if let Some((path, file)) = fetched.map_err(failed)?? {
                files.insert(path, file);
            }
        }
    }

    /// The parts of an object that are not there yet.
    fn parts(&self, path: &str, object: &Object) -> Result<Vec<Part>, FetchError> {
        let name = name_of(path, object);
        let whole = self.incoming.join(format!("{name}.whole"));
        let ranges = ranges(object.bytes);
        let (half, journal, done) = match ranges.len() {
            // A name of its own for each try: the end of one that was given up may still be under way.
            1 => {
                let attempt = ATTEMPTS.fetch_add(1, Ordering::Relaxed);
                (self.incoming.join(format!("{name}.{attempt}.half")), None, Vec::new())
            }
            _ => {
                let half = self.incoming.join(format!("{name}.half"));
                let (journal, done) = journal(&half, object)?;
                (half, Some(journal), done)
            }
        };
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(done.is_empty());
        let file = options.open(&half).map_err(local("make", &half))?;
        file.set_len(object.bytes).map_err(local("make", &half))?;
        let left: Vec<Range<u64>> = ranges
            .iter()
            .enumerate()
            .filter(|(at, _)| !done.contains(at))
            .map(|(_, range)| range.clone())
            .collect();
        let had: u64 = ranges.iter().map(|range| range.end - range.start).sum::<u64>()
            - left.iter().map(|range| range.end - range.start).sum::<u64>();
        self.progress.had(had);
        let single = journal.is_none();
        let target = Arc::new(Target {
            object: object.clone(),
            half,
            whole,
            file,
            // All are there, but for the end of the work: one more is fetched to get it done.
            parts_left: AtomicUsize::new(left.len().max(1)),
            journal: journal.map(Mutex::new),
        });
        let left = if left.is_empty() { vec![ranges[0].clone()] } else { left };
        let part = |range: Range<u64>| Part {
            path: path.to_owned(),
            range: (!single).then_some(range),
            target: Arc::clone(&target),
        };
        Ok(left.into_iter().map(part).collect())
    }

    /// Fetches a part; with an object's last one, says which file it became.
    async fn fetch_part(
        self: Arc<Self>,
        part: Part,
    ) -> Result<Option<(String, Option<PathBuf>)>, FetchError> {
        let Part { path, range, target } = part;
        let mut tries = 0;
        loop {
            tries += 1;
            match self.transfer(&path, range.clone(), &target).await {
                Ok(()) => break,
                // The marker of an empty folder: its key ends with a stroke, which paths have not.
                Err(Transfer::Store(StoreError::NotFound { .. })) if target.object.bytes == 0 => {
                    let _ = fs::remove_file(&target.half);
                    self.progress.files_done.fetch_add(1, Ordering::Relaxed);
                    return Ok(Some((path, None)));
                }
                Err(Transfer::Store(StoreError::Precondition { .. } | StoreError::NotFound { .. }))
                | Err(Transfer::Changed) => return Err(FetchError::Changed(path)),
                Err(Transfer::Cut(_)) if tries < TRIES => {}
                Err(Transfer::Cut(why)) => {
                    return Err(FetchError::Failed(MirrorError::Store(format!(
                        "the transfer of {path:?} was cut off {tries} times: {}",
                        self.store.secret.hide_in(why)
                    ))));
                }
                Err(Transfer::Store(error)) => {
                    return Err(FetchError::Failed(self.store.error(&error)));
                }
                Err(Transfer::Local(error)) => return Err(FetchError::Failed(error)),
            }
        }
        if let Some(journal) = &target.journal {
            let line = format!("{}\n", range.map_or(0, |range| range.start / PART_BYTES));
            // In one call: a process that ends leaves whole lines.
            let written = journal.lock().write_all(line.as_bytes());
            written.map_err(local("write", journal_of(&target.half)))?;
        }
        if target.parts_left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return Ok(None);
        }
        let whole = target.whole.clone();
        let finish = move || -> Result<(), MirrorError> {
            target.file.sync_data().map_err(local("write", &target.half))?;
            match fs::rename(&target.half, &target.whole) {
                // An earlier try that was given up has ended after all.
                Err(error)
                    if error.kind() == ErrorKind::NotFound
                        && fs::metadata(&target.whole)
                            .is_ok_and(|there| there.len() == target.object.bytes) => {}
                renamed => renamed.map_err(local("put in place", &target.whole))?,
            }
            let _ = fs::remove_file(journal_of(&target.half));
            Ok(())
        };
        let finished = tokio::task::spawn_blocking(finish).await;
        finished.unwrap_or_else(|error| {
            Err(MirrorError::Setup(format!("a file's end failed inside the host: {error}")))
        })?;
        self.progress.files_done.fetch_add(1, Ordering::Relaxed);
        Ok(Some((path, Some(whole))))
    }

    async fn transfer(&self, path: &str, range: Option<Range<u64>>, target: &Target) -> Result<(), Transfer> {
        let expected = range.clone().unwrap_or(0..target.object.bytes);
        let options = GetOptions {
            if_match: target.object.condition(),
            range: range.map(GetRange::Bounded),
            ..GetOptions::default()
        };
        let location = location(&self.spec, path).map_err(Transfer::Local)?;
        let answer = self.store.objects.get_opts(&location, options).await.map_err(Transfer::Store)?;
        // Some stores pass over conditions.
        if !Object::of(&answer.meta).is_same(&target.object) {
            return Err(Transfer::Changed);
        }
        let mut chunks = answer.into_stream();
        let (mut at, mut buffer) = (expected.start, Vec::with_capacity(WRITE_BYTES));
        let mut counted = 0;
        let written = async {
            while let Some(chunk) = chunks.try_next().await.map_err(|error| match error {
                error @ (StoreError::Precondition { .. } | StoreError::NotFound { .. }) => {
                    Transfer::Store(error)
                }
                error => Transfer::Cut(error.to_string()),
            })? {
                buffer.extend_from_slice(&chunk);
                counted += chunk.len() as u64;
                self.progress.bytes_done.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                if buffer.len() >= WRITE_BYTES {
                    at = write(target, at, &mut buffer)?;
                }
            }
            at = write(target, at, &mut buffer)?;
            if at == expected.end {
                Ok(())
            } else {
                let (found, wanted) = (at - expected.start, expected.end - expected.start);
                Err(Transfer::Cut(format!("expected {wanted} bytes, found {found}")))
            }
        }
        .await;
        if written.is_err() {
            // It is fetched again.
            self.progress.bytes_done.fetch_sub(counted, Ordering::Relaxed);
        }
        written
    }
}

/// How a transfer failed.
enum Transfer {
    Store(StoreError),
    /// The object is another one.
    Changed,
    /// It ended early.
    Cut(String),
    Local(MirrorError),
}

fn write(target: &Target, at: u64, buffer: &mut Vec<u8>) -> Result<u64, Transfer> {
    let end = at + buffer.len() as u64;
    if end > target.object.bytes {
        return Err(Transfer::Changed);
    }
    target
        .file
        .write_all_at(buffer, at)
        .map_err(|error| Transfer::Local(local("write", &target.half)(error)))?;
    buffer.clear();
    Ok(end)
}

/// The same for the same object, and for no other.
fn name_of(path: &str, object: &Object) -> String {
    let identity = (path, object.bytes, &object.etag, object.etag.is_none().then_some(object.modified_ms));
    let digest = Sha256::digest(format!("{identity:?}"));
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

fn ranges(bytes: u64) -> Vec<Range<u64>> {
    let parts = bytes.div_ceil(PART_BYTES).max(1);
    (0..parts).map(|part| part * PART_BYTES..((part + 1) * PART_BYTES).min(bytes)).collect()
}

fn journal_of(half: &Path) -> PathBuf {
    half.with_extension("parts")
}

/// The journal of a large object's parts, and those that are there. It begins with what must be as it was for that to count.
fn journal(half: &Path, object: &Object) -> Result<(File, Vec<usize>), MirrorError> {
    let path = journal_of(half);
    let boot = fs::read_to_string(BOOT_ID).unwrap_or_default();
    let head = format!("{} {}", boot.trim(), object.bytes);
    let known = fs::read_to_string(&path).ok().filter(|_| half.is_file()).unwrap_or_default();
    // A line without its end is none.
    let whole = known.rfind('\n').map_or("", |end| &known[..=end]);
    let mut lines = whole.lines();
    if lines.next() == Some(head.as_str()) {
        let parts = ranges(object.bytes).len();
        let done: Vec<usize> = lines.filter_map(|line| line.parse().ok()).filter(|at| *at < parts).collect();
        if !done.is_empty() {
            let file = OpenOptions::new().append(true).open(&path).map_err(local("open", &path))?;
            file.set_len(whole.len() as u64).map_err(local("open", path))?;
            return Ok((file, done));
        }
    }
    let mut file = File::create(&path).map_err(local("make", &path))?;
    writeln!(file, "{head}").map_err(local("write", path))?;
    Ok((file, Vec::new()))
}

/// Removes what belongs to no object that is wanted any more.
pub(crate) fn forget_others(incoming: &Path, wanted: &BTreeMap<String, Object>) {
    let names: HashSet<String> = wanted.iter().map(|(path, object)| name_of(path, object)).collect();
    for entry in fs::read_dir(incoming).into_iter().flatten().flatten() {
        let path = entry.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if !names.contains(stem) {
            // What can't be removed now is tried the next time.
            let _ = fs::remove_file(path);
        }
    }
}

/// Bytes of these objects that are there already.
pub(crate) fn bytes_there(incoming: &Path, wanted: &BTreeMap<String, Object>) -> u64 {
    let there = |(path, object): (&String, &Object)| {
        let name = name_of(path, object);
        let blocks = |ending: &str| {
            use std::os::unix::fs::MetadataExt;
            fs::metadata(incoming.join(format!("{name}.{ending}"))).map_or(0, |found| found.blocks() * 512)
        };
        (blocks("whole") + blocks("half")).min(object.bytes)
    };
    wanted.iter().map(there).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_objects_have_parts_and_empty_ones_have_one() {
        let ends =
            |bytes| ranges(bytes).into_iter().map(|range| (range.start, range.end)).collect::<Vec<_>>();
        assert_eq!(ends(0), [(0, 0)]);
        assert_eq!(ends(PART_BYTES), [(0, PART_BYTES)]);
        assert_eq!(ends(PART_BYTES + 1), [(0, PART_BYTES), (PART_BYTES, PART_BYTES + 1)]);
    }

    #[test]
    fn parts_that_are_there_are_known_to_the_next_process_of_the_same_boot() {
        let folder = tempfile::tempdir().unwrap();
        let half = folder.path().join("a.half");
        let object = Object { bytes: PART_BYTES * 3, etag: Some("a".into()), modified_ms: 0 };
        let (mut file, done) = journal(&half, &object).unwrap();
        assert!(done.is_empty());
        writeln!(file, "1").unwrap();
        // Without its file it says nothing.
        assert!(journal(&half, &object).unwrap().1.is_empty());
        fs::write(&half, "").unwrap();
        let (mut file, _) = journal(&half, &object).unwrap();
        write!(file, "2\n9\n0\n1").unwrap();
        let (mut file, done) = journal(&half, &object).unwrap();
        assert_eq!(done, [2, 0], "a line without its end is none");
        writeln!(file, "1").unwrap();
        assert_eq!(journal(&half, &object).unwrap().1, [2, 0, 1]);
        fs::write(journal_of(&half), "another boot 25165824\n1\n").unwrap();
        assert!(journal(&half, &object).unwrap().1.is_empty());
    }

    #[test]
    fn what_nobody_wants_any_more_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let object = Object { bytes: 3, etag: Some("a".into()), modified_ms: 0 };
        let name = name_of("kept", &object);
        for file in [format!("{name}.whole"), format!("{name}.parts"), "other.half".to_owned()] {
            fs::write(folder.path().join(file), "abc").unwrap();
        }
        let wanted = BTreeMap::from([("kept".to_owned(), object)]);
        forget_others(folder.path(), &wanted);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        assert_eq!(bytes_there(folder.path(), &wanted), 3);
    }
}
