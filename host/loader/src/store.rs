//! Private copies of plugin files, named by content. The user's own file is never opened by the linker: it may be
//! overwritten at any moment, and a mapped file that changes takes the process down.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::LoadError;

/// A private folder of copies; it vanishes with this value.
#[derive(Debug)]
pub struct Store {
    folder: TempDir,
}

/// A private copy.
#[derive(Clone, PartialEq, Eq)]
pub struct Staged {
    path: PathBuf,
    sha256: String,
}

impl Store {
    /// Makes a folder that only this user can enter, in the system's folder for temporary files.
    ///
    /// # Errors
    /// The folder can't be made.
    pub fn new() -> Result<Self, LoadError> {
        let folder = tempfile::Builder::new().prefix("modalkit-").tempdir().map_err(|source| {
            LoadError::Io { doing: "make a private folder in", path: std::env::temp_dir(), source }
        })?;
        Ok(Self { folder })
    }

    /// Copies a file. The same content gives the same copy, which the linker maps once.
    ///
    /// # Errors
    /// The file can't be read or the copy can't be written.
    pub fn stage(&self, file: &Path) -> Result<Staged, LoadError> {
        let unreadable = |source| LoadError::Io { doing: "read", path: file.to_owned(), source };
        let unwritable = |source| LoadError::Io {
            doing: "write a private copy in",
            path: self.folder.path().to_owned(),
            source,
        };
        let mut source = File::open(file).map_err(unreadable)?;
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
        if fs::exists(&path).map_err(unwritable)? {
            return Ok(Staged { path, sha256 });
        }
        copy.persist(&path).map_err(|error| unwritable(error.error))?;
        Ok(Staged { path, sha256 })
    }
}

const COPY_CHUNK_BYTES: usize = 256 * 1024;

impl Staged {
    /// A file that was staged by the parent of this process.
    pub(crate) fn in_place(file: &Path) -> Self {
        Self { path: file.to_owned(), sha256: String::new() }
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
    use super::*;

    #[test]
    fn the_same_content_is_one_copy_and_a_change_is_another() {
        let store = Store::new().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one.so"), folder.path().join("two.so"));
        fs::write(&one, b"content").unwrap();
        fs::write(&two, b"content").unwrap();
        let first = store.stage(&one).unwrap();
        assert_eq!(first, store.stage(&two).unwrap());
        fs::write(&one, b"changed").unwrap();
        assert_ne!(first, store.stage(&one).unwrap());
        assert_eq!(fs::read(first.path()).unwrap(), b"content", "a copy outlives its source");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Store::new().unwrap().stage(Path::new("/nowhere/echo.so")).unwrap_err();
        assert_eq!(error.to_string(), "can't read /nowhere/echo.so");
    }
}
