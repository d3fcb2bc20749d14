//! Paths of Unix sockets. The system takes 107 bytes of them; this makes a path of any length one that can be bound or connected to. It
//! never knows what is said over the socket.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, open};

/// Bytes of a path in `sun_path`, which ends with a zero.
const PATH_BYTES_MAX: usize = 107;

/// A path that fits, as long as this lives.
pub struct ShortPath {
    path: PathBuf,
    /// The folder that `path` leads through, where that isn't the path itself.
    _folder: Option<OwnedFd>,
}

impl ShortPath {
    /// Of this path. Its folder must be there.
    ///
    /// # Errors
    /// The folder can't be opened, or the file's own name is too long.
    pub fn of(path: &Path) -> io::Result<Self> {
        if path.as_os_str().len() <= PATH_BYTES_MAX {
            return Ok(Self { path: path.to_owned(), _folder: None });
        }
        let unfit =
            || io::Error::new(io::ErrorKind::InvalidInput, "expected a path that ends with a file's name");
        let (folder, name) = path.parent().zip(path.file_name()).ok_or_else(unfit)?;
        let folder = open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let path = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
        if path.as_os_str().len() > PATH_BYTES_MAX {
            let found = format!("expected a file's name of some 80 bytes, found {}", name.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, found));
        }
        Ok(Self { path, _folder: Some(folder) })
    }
}

impl AsRef<Path> for ShortPath {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::net::{UnixListener, UnixStream},
    };

    use super::*;

    #[test]
    fn a_socket_is_bound_and_found_behind_a_path_of_any_length() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("d".repeat(100)).join("e".repeat(100));
        fs::create_dir_all(&deep).unwrap();
        for folder in [folder.path(), &deep] {
            let path = folder.join("manage.sock");
            let _listener = UnixListener::bind(ShortPath::of(&path).unwrap()).unwrap();
            UnixStream::connect(ShortPath::of(&path).unwrap()).unwrap();
        }
        assert!(UnixStream::connect(deep.join("manage.sock")).is_err(), "the path itself is too long");
        assert!(ShortPath::of(&deep.join("n".repeat(100))).is_err());
    }
}
