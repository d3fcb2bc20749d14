//! Private copies of plugin files, named by content. The user's own file is never opened by the linker: it may be
//! overwritten at any moment, and a mapped file that changes takes the process down. A dropped file is code, so whose it is
//! and who may change it is asked here, of the very file that is copied.

use std::{
    collections::HashMap,
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::LoadError;

/// A private folder of copies; it vanishes with this value.
#[derive(Debug)]
pub struct Store {
    folder: TempDir,
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
        if all.get(&self.sha256).is_some_and(|copy| copy.strong_count() > 0) {
            return;
        }
        all.remove(&self.sha256);
        // It is gone with the store at the latest.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whose files are taken for code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trust {
    /// Files and folders of other users than this process's and root.
    pub any_owner: bool,
    /// Files and folders that the group or everybody may write.
    pub any_mode: bool,
}

/// A private copy. Its file is removed with the last clone; a library that is mapped keeps one, so that debuggers and
/// profilers find it by its path.
#[derive(Clone)]
pub struct Staged {
    copy: Arc<Copy>,
    origin: PathBuf,
}

impl Store {
    /// Makes a folder that only this user can enter, in the system's folder for temporary files.
    ///
    /// # Errors
    /// The folder can't be made.
    pub fn new(trust: Trust) -> Result<Self, LoadError> {
        let folder = tempfile::Builder::new().prefix("modalkit-").tempdir().map_err(|source| {
            LoadError::Io { doing: "make a private folder in", path: std::env::temp_dir(), source }
        })?;
        Ok(Self { folder, trust, copies: Copies::default() })
    }

    /// Removes the folder with every copy; what is mapped stays mapped.
    pub fn close(&self) {
        // The system's folder for temporary files is where it lies, if it can't be removed.
        let _ = fs::remove_dir_all(self.folder.path());
    }

    /// Copies a file. The same content gives the same copy, which the linker maps once.
    ///
    /// # Errors
    /// The file can't be read, somebody else could have changed it, or the copy can't be written.
    pub fn stage(&self, file: &Path) -> Result<Staged, LoadError> {
        let unreadable = |source| LoadError::Io { doing: "read", path: file.to_owned(), source };
        let unwritable = |source| LoadError::Io {
            doing: "write a private copy in",
            path: self.folder.path().to_owned(),
            source,
        };
        let mut source = File::open(file).map_err(unreadable)?;
        self.check_trust(file, &source)?;
        let mut copy = tempfile::NamedTempFile::new_in(&self.folder).map_err(unwritable)?;
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
        let path = self.folder.path().join(format!("{sha256}.so"));
        let mut all = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all.get(&sha256).and_then(Weak::upgrade);
        let copy = match known {
            Some(copy) => copy,
            None => {
                copy.persist(&path).map_err(|error| unwritable(error.error))?;
                let copy = Arc::new(Copy { path, sha256: sha256.clone(), all: Arc::clone(&self.copies) });
                all.insert(sha256, Arc::downgrade(&copy));
                copy
            }
        };
        Ok(Staged { copy, origin: file.to_owned() })
    }

    /// Asks the open file, which nobody can exchange any more, the folder that its name lies in, and the one that it really
    /// lies in: who may write to one of these may put another file there.
    fn check_trust(&self, file: &Path, open: &File) -> Result<(), LoadError> {
        let unreadable = |source| LoadError::Io { doing: "look at", path: file.to_owned(), source };
        let metadata = open.metadata().map_err(unreadable)?;
        self.trust.check("the file", file, &metadata)?;
        let real = file.canonicalize().map_err(unreadable)?;
        let found = real.metadata().map_err(unreadable)?;
        if (found.dev(), found.ino()) != (metadata.dev(), metadata.ino()) {
            // Replaced between the two looks: the next one finds the new one.
            return Err(unreadable(io::Error::other("it was replaced while it was read")));
        }
        for folder in [file.parent(), real.parent()].into_iter().flatten() {
            self.trust.check("the folder", folder, &folder.metadata().map_err(unreadable)?)?;
        }
        Ok(())
    }
}

const COPY_CHUNK_BYTES: usize = 256 * 1024;

/// Permission bits that let others than the owner write.
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;
const ROOT: u32 = 0;

impl Trust {
    fn check(&self, what: &'static str, path: &Path, metadata: &fs::Metadata) -> Result<(), LoadError> {
        let refused = |found: String, hint: String| {
            Err(LoadError::Untrusted { what, path: path.to_owned(), found, hint })
        };
        let this_user = rustix::process::geteuid().as_raw();
        let owner = metadata.uid();
        if !self.any_owner && owner != this_user && owner != ROOT {
            return refused(
                format!("belongs to user {owner}"),
                format!(
                    "expected user {this_user}, who runs the host, or root: `chown` it, or set server.plugins_of_any_owner = true where everybody who can write there is trusted"
                ),
            );
        }
        let mode = metadata.mode() & 0o7777;
        if !self.any_mode && mode & (GROUP_WRITES | OTHERS_WRITE) != 0 {
            let who = if mode & OTHERS_WRITE != 0 { "everybody" } else { "its group" };
            return refused(
                format!("may be written by {who} (mode {mode:04o})"),
                "expected its owner alone: `chmod go-w` it, or set server.plugins_of_any_mode = true where everybody who can write there is trusted".into(),
            );
        }
        Ok(())
    }
}

impl Staged {
    /// A file that was staged by the parent of this process.
    pub(crate) fn in_place(file: &Path) -> Self {
        // The parent's to remove: this process ends without dropping it.
        let copy = Copy { path: file.to_owned(), sha256: String::new(), all: Copies::default() };
        let copy = std::mem::ManuallyDrop::new(Arc::new(copy));
        Self { copy: Arc::clone(&copy), origin: file.to_owned() }
    }

    /// The file that was copied.
    #[must_use]
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// The copy.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.copy.path
    }

    /// SHA-256 of the content, in hexadecimal.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.copy.sha256
    }
}

impl fmt::Debug for Staged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Staged({})", self.sha256())
    }
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
    fn what_others_may_write_is_no_code_of_ours_unless_said_so() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("echo.so");
        let text = |store: &Store| store.stage(&file).unwrap_err().to_string();
        let strict = Store::new(STRICT).unwrap();
        put(&file, b"x", 0o664);
        assert!(text(&strict).contains("may be written by its group (mode 0664)"), "{}", text(&strict));
        put(&file, b"x", 0o646);
        assert!(text(&strict).contains("by everybody"), "{}", text(&strict));
        put(&file, b"x", 0o644);
        assert!(strict.stage(&file).is_ok());
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o770)).unwrap();
        assert!(text(&strict).starts_with("the folder "), "{}", text(&strict));
        assert!(Store::new(Trust { any_mode: true, ..STRICT }).unwrap().stage(&file).is_ok());
    }

    #[test]
    fn a_file_of_another_user_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("echo.so");
        put(&file, b"x", 0o644);
        // Only root can give files away; as anybody else, the owner's own file is all that there is to ask.
        if std::os::unix::fs::chown(&file, Some(12_345), None).is_err() {
            assert!(Store::new(STRICT).unwrap().stage(&file).is_ok());
            return;
        }
        let error = Store::new(STRICT).unwrap().stage(&file).unwrap_err().to_string();
        assert!(error.contains("belongs to user 12345") && error.contains("plugins_of_any_owner"), "{error}");
        assert!(Store::new(Trust { any_owner: true, ..STRICT }).unwrap().stage(&file).is_ok());
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
    fn a_missing_file_is_named() {
        let error = Store::new(STRICT).unwrap().stage(Path::new("/nowhere/echo.so")).unwrap_err();
        assert_eq!(error.to_string(), "can't read /nowhere/echo.so");
    }
}
