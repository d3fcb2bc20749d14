//! Private copies of plugin files, named by content. The user's own file is never opened by the linker: it may be
//! overwritten at any moment, and a mapped file that changes takes the process down. A dropped file is code, so whose it is
//! and who may change it is asked here, of the very file that is copied.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::LoadError;

/// A private folder of copies; it vanishes with this value.
#[derive(Debug)]
pub struct Store {
    folder: TempDir,
    trust: Trust,
}

/// Whose files are taken for code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trust {
    /// Files and folders of other users than this process's and root.
    pub any_owner: bool,
    /// Files and folders that the group or everybody may write.
    pub any_mode: bool,
}

/// A private copy.
#[derive(Clone, PartialEq, Eq)]
pub struct Staged {
    path: PathBuf,
    sha256: String,
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
        Ok(Self { folder, trust })
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
        let staged = Staged { path, sha256, origin: file.to_owned() };
        if fs::exists(&staged.path).map_err(unwritable)? {
            return Ok(staged);
        }
        copy.persist(&staged.path).map_err(|error| unwritable(error.error))?;
        Ok(staged)
    }

    /// Asks the open file, which nobody can exchange any more, and the folder that it really lies in.
    fn check_trust(&self, file: &Path, open: &File) -> Result<(), LoadError> {
        let unreadable = |source| LoadError::Io { doing: "look at", path: file.to_owned(), source };
        let real = file.canonicalize().map_err(unreadable)?;
        let folder = real.parent().unwrap_or(&real);
        self.trust.check("the file", file, &open.metadata().map_err(unreadable)?)?;
        self.trust.check("the folder", folder, &folder.metadata().map_err(unreadable)?)
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
        Self { path: file.to_owned(), sha256: String::new(), origin: file.to_owned() }
    }

    /// The file that was copied.
    #[must_use]
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// Removes the copy. To be called only where nothing has opened it: a library that is mapped is found by its path in
    /// debuggers and profilers.
    pub fn discard(&self) {
        // It is gone with the store at the latest.
        let _ = fs::remove_file(&self.path);
    }

    /// The copy.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of the content, in hexadecimal.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}

impl fmt::Debug for Staged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Staged({})", self.sha256)
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
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Store::new(STRICT).unwrap().stage(Path::new("/nowhere/echo.so")).unwrap_err();
        assert_eq!(error.to_string(), "can't read /nowhere/echo.so");
    }
}
