//! Private copies of plugin files, and of the code of folders, named by content. The user's own file is never opened by the linker: it may be
//! overwritten at any moment, and a mapped file that changes takes the process down. It never knows what is done with them.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use modalkit_engine::{LoadError, Staged, tree};
use sha2::{Digest, Sha256};

use crate::{
    Trust,
    folder::{self, PrivateFolder},
};

/// Copies in a private folder, which vanishes with the last clone of this value.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    /// `None` once it is closed. Made again where somebody has taken it away.
    folder: Arc<Mutex<Option<PrivateFolder>>>,
    trust: Trust,
    copies: Copies,
}

/// The copies that somebody holds, by content.
type Copies = Arc<Mutex<HashMap<String, Weak<Copy>>>>;

/// A file that goes with the last one who holds it.
#[derive(Debug)]
struct Copy {
    path: PathBuf,
    sha256: String,
    all: Copies,
}

impl Drop for Copy {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        // Where another copy of the same content has come meanwhile, the file is that one's.
        if all.get(&self.sha256).is_none_or(|copy| std::ptr::eq(copy.as_ptr(), self)) {
            all.remove(&self.sha256);
            // It is gone with the store at the latest.
            let _ =
                if self.path.is_dir() { fs::remove_dir_all(&self.path) } else { fs::remove_file(&self.path) };
        }
    }
}

impl Store {
    /// Makes a folder that only this user can enter, in the system's folder for temporary files, and removes those that
    /// processes of this user left there when they were killed.
    ///
    /// # Errors
    /// The folder can't be made.
    pub(crate) fn new(trust: Trust) -> Result<Self, LoadError> {
        let temporary = std::env::temp_dir();
        folder::sweep(&temporary);
        let folder = PrivateFolder::make(&temporary).map_err(no_folder)?;
        Ok(Self { folder: Arc::new(Mutex::new(Some(folder))), trust, copies: Copies::default() })
    }

    /// Removes the folder with every copy; what is mapped stays mapped.
    pub(crate) fn close(&self) {
        *self.folder.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Copies a file. The same content gives the same copy, which the linker maps once.
    ///
    /// # Errors
    /// The file can't be read, somebody else could have changed it, or the copy can't be written.
    pub(crate) fn stage(&self, file: &Path) -> Result<Staged, LoadError> {
        let unreadable = |source| LoadError::Io { doing: "read", path: file.to_owned(), source };
        if file.is_dir() {
            return self.stage_tree(file);
        }
        let folder = self.folder()?;
        let unwritable =
            |source| LoadError::Io { doing: "write a private copy in", path: folder.clone(), source };
        let mut source = File::open(file).map_err(unreadable)?;
        self.trust.check_file(file, &source)?;
        let mut copy = tempfile::NamedTempFile::new_in(&folder).map_err(unwritable)?;
        let mut hasher = Sha256::new();
        let mut chunk = vec![0; COPY_CHUNK_BYTES];
        loop {
            let length = match source.read(&mut chunk) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(unreadable(error)),
            };
            hasher.update(&chunk[..length]);
            copy.write_all(&chunk[..length]).map_err(unwritable)?;
        }
        let sha256 = hex(&hasher.finalize());
        let path = folder.join(format!("{sha256}.so"));
        let place = || copy.persist(&path).map(drop).map_err(|error| error.error);
        let copy = self.keep(sha256, path.clone(), place).map_err(unwritable)?;
        Ok(Staged::new(file, &copy.path.clone(), &copy.sha256.clone(), copy))
    }

    /// The copy of this content that somebody holds, or else the one that is put into place now.
    fn keep(
        &self,
        sha256: String,
        path: PathBuf,
        place: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Arc<Copy>> {
        // Goes after the lock: its other holders may leave meanwhile, and the last one to drop it takes the lock.
        let known;
        let mut all = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        known = all.get(&sha256).and_then(Weak::upgrade);
        match &known {
            Some(copy) if copy.path.exists() => Ok(Arc::clone(copy)),
            // Somebody may have taken the file away, alone or with the folder.
            _ => {
                place()?;
                let copy = Arc::new(Copy { path, sha256: sha256.clone(), all: Arc::clone(&self.copies) });
                all.insert(sha256, Arc::downgrade(&copy));
                Ok(copy)
            }
        }
    }

    /// Asks of what is used where it lies whose it is.
    ///
    /// # Errors
    /// As [`Store::stage`].
    pub(crate) fn trust(&self, files: &[PathBuf], folders: &[PathBuf]) -> Result<(), LoadError> {
        for file in files {
            let unreadable = |source| LoadError::Io { doing: "read", path: file.to_owned(), source };
            self.trust.check_file(file, &File::open(file).map_err(unreadable)?)?;
        }
        folders.iter().try_for_each(|folder| self.trust.check_tree(folder))
    }

    /// Copies the code below a folder, each file of which is asked whose it is.
    fn stage_tree(&self, origin: &Path) -> Result<Staged, LoadError> {
        let unreadable = |path: &Path, source| LoadError::Io { doing: "read", path: path.to_owned(), source };
        let mut files = Vec::new();
        let mut bytes = 0;
        for inside in tree::code_files(origin).map_err(|error| unreadable(origin, error))? {
            let path = origin.join(&inside);
            let mut source = File::open(&path).map_err(|error| unreadable(&path, error))?;
            self.trust.check_file(&path, &source)?;
            let mut content = Vec::new();
            source.read_to_end(&mut content).map_err(|error| unreadable(&path, error))?;
            bytes += content.len();
            if bytes > TREE_BYTES_MAX {
                let source = io::Error::other(format!("its code has more than {TREE_BYTES_MAX} bytes"));
                return Err(unreadable(origin, source));
            }
            files.push((inside, content));
        }
        Ok(self.put(origin, &files)?.with_environment(tree::environment(origin)))
    }

    /// Puts files into a folder of their own, which is named by all that they say.
    ///
    /// # Errors
    /// They can't be written.
    pub(crate) fn put(&self, origin: &Path, files: &[(PathBuf, Vec<u8>)]) -> Result<Staged, LoadError> {
        let folder = self.folder()?;
        let unwritable =
            |source| LoadError::Io { doing: "write a private copy in", path: folder.clone(), source };
        let mut hasher = Sha256::new();
        let copy = tempfile::tempdir_in(&folder).map_err(unwritable)?;
        for (inside, content) in files {
            // Lengths, so that nothing of one file can pass for a part of another.
            let name = inside.as_os_str().as_encoded_bytes();
            hasher.update((name.len() as u64).to_le_bytes());
            hasher.update(name);
            hasher.update((content.len() as u64).to_le_bytes());
            hasher.update(content);
            let path = copy.path().join(inside);
            path.parent().map_or(Ok(()), fs::create_dir_all).map_err(unwritable)?;
            fs::write(path, content).map_err(unwritable)?;
        }
        let sha256 = hex(&hasher.finalize());
        let path = folder.join(&sha256);
        let place = || {
            // A rest of one that somebody took apart.
            let _ = fs::remove_dir_all(&path);
            fs::rename(copy.keep(), &path)
        };
        let copy = self.keep(sha256, path.clone(), place).map_err(unwritable)?;
        Ok(Staged::new(origin, &copy.path.clone(), &copy.sha256.clone(), copy))
    }

    /// This copy where it is still there, and otherwise another one of the same file.
    ///
    /// # Errors
    /// As [`Store::stage`], or the file has changed since.
    pub(crate) fn find_again(&self, staged: &Staged) -> Result<Staged, LoadError> {
        if staged.path().exists() {
            return Ok(staged.clone());
        }
        let again = self.stage(staged.origin())?;
        if again.sha256() != staged.sha256() {
            let source = io::Error::other("its private copy is gone, and it has another content by now");
            return Err(LoadError::Io { doing: "copy again", path: staged.origin().to_owned(), source });
        }
        Ok(again)
    }

    /// Where copies go; made again where somebody has taken it away.
    fn folder(&self) -> Result<PathBuf, LoadError> {
        let mut folder = self.folder.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(found) = folder.as_mut() else { return Err(no_folder(io::Error::other("the host ends"))) };
        if !found.is_there() {
            *found = PrivateFolder::make(&std::env::temp_dir()).map_err(no_folder)?;
        }
        Ok(found.path().to_owned())
    }
}

fn no_folder(source: io::Error) -> LoadError {
    LoadError::Io {
        doing: "make a private folder (its place is TMPDIR) in",
        path: std::env::temp_dir(),
        source,
    }
}

const COPY_CHUNK_BYTES: usize = 256 * 1024;
/// Bytes of all code of a folder.
const TREE_BYTES_MAX: usize = 256 << 20;

/// A file that was staged by the parent of this process, which removes it.
pub(crate) fn staged_in_place(file: &Path) -> Staged {
    Staged::new(file, file, "", Arc::new(()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const STRICT: Trust = Trust { any_owner: false, any_mode: false };

    fn put(file: &Path, content: &[u8], mode: u32) {
        fs::write(file, content).unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn the_same_content_is_one_copy_and_a_change_is_another() {
        let store = Store::new(STRICT).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one.so"), folder.path().join("two.so"));
        put(&one, b"content", 0o644);
        put(&two, b"content", 0o644);
        let first = store.stage(&one).unwrap();
        assert_eq!(first.path(), store.stage(&two).unwrap().path());
        put(&one, b"changed", 0o644);
        assert_ne!(first.sha256(), store.stage(&one).unwrap().sha256());
        assert_eq!(fs::read(first.path()).unwrap(), b"content", "a copy outlives its source");
        let (path, other) = (first.path().to_owned(), first.clone());
        drop(first);
        assert!(path.exists(), "somebody holds it still");
        drop(other);
        assert!(!path.exists());
    }

    #[test]
    fn what_a_cleaner_takes_away_is_made_again() {
        let store = Store::new(STRICT).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("one.so");
        put(&file, b"content", 0o644);
        let first = store.stage(&file).unwrap();
        // A file alone.
        fs::remove_file(first.path()).unwrap();
        let second = store.stage(&file).unwrap();
        assert_eq!(fs::read(second.path()).unwrap(), b"content");
        // Both name the same file, which is the second's.
        drop(first);
        assert!(second.path().exists());
        // The folder with all that is in it.
        fs::remove_dir_all(second.path().parent().unwrap()).unwrap();
        let third = store.stage(&file).unwrap();
        assert_eq!(fs::read(third.path()).unwrap(), b"content");
        assert_eq!(store.find_again(&second).unwrap().path(), third.path());
        put(&file, b"changed", 0o644);
        assert!(store.find_again(&second).unwrap_err().chain().contains("another content"));
        let path = third.path().parent().unwrap().to_owned();
        store.close();
        assert!(!path.exists());
        assert!(store.stage(&file).is_err(), "a host that ends leaves nothing");
    }

    #[test]
    fn a_copy_may_lose_its_file_and_its_last_holder_while_it_is_asked_for() {
        let (store, folder) = (Store::new(STRICT).unwrap(), tempfile::tempdir().unwrap());
        let file = folder.path().join("one.so");
        put(&file, b"content", 0o644);
        let (done, all_done) = std::sync::mpsc::sync_channel(STAGING_THREADS);
        for _ in 0..STAGING_THREADS {
            let (store, file, done) = (store.clone(), file.clone(), done.clone());
            std::thread::spawn(move || {
                for _ in 0..STAGES_OF_A_THREAD {
                    let staged = store.stage(&file).unwrap();
                    // As a cleaner of temporary files; another thread may have been quicker.
                    let _ = fs::remove_file(staged.path());
                }
                done.send(()).unwrap();
            });
        }
        for _ in 0..STAGING_THREADS {
            all_done.recv_timeout(STAGES_TIME_MAX).expect("a thread waits for a lock that it holds itself");
        }
    }

    const STAGING_THREADS: usize = 4;
    const STAGES_OF_A_THREAD: usize = 1_000;
    const STAGES_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(60);

    #[test]
    fn code_of_a_folder_is_one_copy_named_by_all_of_it_and_goes_with_its_last_holder() {
        let store = Store::new(STRICT).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let put_in = |name: &str, content: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            put(&path, content.as_bytes(), 0o644);
        };
        put_in("pipeline.py", "a = 1");
        put_in("inside/__init__.py", "");
        put_in("weights.bin", "w");
        let first = store.stage(folder.path()).unwrap();
        assert_eq!(fs::read_to_string(first.path().join("pipeline.py")).unwrap(), "a = 1");
        assert!(
            first.path().join("inside/__init__.py").exists() && !first.path().join("weights.bin").exists()
        );
        put_in("weights.bin", "other");
        assert_eq!(store.stage(folder.path()).unwrap().path(), first.path());
        put_in("inside/__init__.py", "b = 2");
        let second = store.stage(folder.path()).unwrap();
        assert_ne!(second.sha256(), first.sha256());
        let gone = first.path().to_owned();
        drop(first);
        assert!(!gone.exists() && second.path().exists());
        // Any of its files may be exchanged by whoever can write it.
        put(&folder.path().join("inside/__init__.py"), b"", 0o666);
        assert!(store.stage(folder.path()).unwrap_err().chain().contains("chmod go-w"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Store::new(STRICT).unwrap().stage(Path::new("/nowhere/echo.so")).unwrap_err();
        assert_eq!(error.to_string(), "can't read /nowhere/echo.so");
    }
}
