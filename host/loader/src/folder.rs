//! The private folder of this process's copies. A lock on the folder itself says that its owner lives: programs that clean up
//! temporary files, such as systemd-tmpfiles, respect it, and other hosts remove folders without. It never knows what copies are of.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// What these folders' names begin with.
const PREFIX: &str = "modalkit-plugins-";
/// How often another folder is made, where another host takes the new one for one of the dead.
const TRIES_MAX: usize = 16;
/// The permissions that such a folder has.
const MODE: u32 = 0o700;
/// Letters of a SHA-256, which copies are named by.
const DIGEST_LETTERS: usize = 64;

/// A folder that only this user can enter; it vanishes with this value.
#[derive(Debug)]
pub(crate) struct PrivateFolder {
    path: PathBuf,
    /// Held as long as this process lives.
    lock: File,
}

impl PrivateFolder {
    /// Makes one in a folder for temporary files.
    pub(crate) fn make(temporary: &Path) -> io::Result<Self> {
        for _ in 0..TRIES_MAX {
            // Where anything fails it is removed again.
            let mode = fs::Permissions::from_mode(MODE);
            let made = tempfile::Builder::new().prefix(PREFIX).permissions(mode).tempdir_in(temporary)?;
            let lock = match File::open(made.path()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened?,
            };
            // Another host that is just starting may have seen it before it was locked, and is about to remove it. Where a file system
            // has no locks, nobody removes anything.
            if matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock)) {
                continue;
            }
            let folder = Self { path: made.keep(), lock };
            // It may have been removed between the two. From here on nobody does.
            if folder.is_there() {
                return Ok(folder);
            }
        }
        Err(io::Error::other(format!("{TRIES_MAX} new folders were removed at once by somebody else")))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its name still leads to it.
    pub(crate) fn is_there(&self) -> bool {
        is_same(&self.lock, &self.path).unwrap_or(false)
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        if self.is_there() {
            // It is removed by another host's start where this fails.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Removes the folders of this user's processes that were killed. What can't be removed, or isn't certain to be one, stays.
pub(crate) fn sweep(temporary: &Path) {
    for entry in fs::read_dir(temporary).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX)) {
            // It is in nobody's way, and the next start tries again.
            let _ = sweep_one(&entry.path());
        }
    }
}

fn sweep_one(path: &Path) -> io::Result<()> {
    let about = fs::symlink_metadata(path)?;
    let is_ours = about.uid() == rustix::process::geteuid().as_raw() && about.mode() & 0o7777 == MODE;
    if !about.is_dir() || !is_ours {
        return Ok(());
    }
    let lock = File::open(path)?;
    // Its owner lives, or another host is removing it.
    if lock.try_lock().is_err() || !is_same(&lock, path)? {
        return Ok(());
    }
    let entries: Vec<fs::DirEntry> = fs::read_dir(path)?.collect::<io::Result<_>>()?;
    if entries.iter().all(is_copy) {
        entries.iter().try_for_each(|entry| match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path()),
            false => fs::remove_file(entry.path()),
        })?;
        fs::remove_dir(path)?;
    }
    Ok(())
}

/// Whether it is a copy, or one that was being written.
fn is_copy(entry: &fs::DirEntry) -> bool {
    let name = entry.file_name();
    let is_named = name.to_str().is_some_and(|name| {
        let digest = name.strip_suffix(".so").unwrap_or(name);
        let is_digest = digest.len() == DIGEST_LETTERS && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_digest || name.starts_with(".tmp")
    });
    is_named && entry.file_type().is_ok_and(|kind| kind.is_file() || kind.is_dir())
}

fn is_same(open: &File, path: &Path) -> io::Result<bool> {
    let (open, named) = (open.metadata()?, fs::symlink_metadata(path)?);
    Ok((open.dev(), open.ino()) == (named.dev(), named.ino()))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn copy_in(folder: &Path) {
        fs::write(folder.join(format!("{}.so", "0a".repeat(32))), b"x").unwrap();
        fs::write(folder.join(".tmpAbCdEf"), b"x").unwrap();
    }

    /// As a process that was killed leaves it.
    fn left_behind(temporary: &Path) -> PathBuf {
        let made = PrivateFolder::make(temporary).unwrap();
        copy_in(made.path());
        let (path, kept) = (made.path().to_owned(), std::mem::ManuallyDrop::new(made));
        kept.lock.unlock().unwrap();
        path
    }

    #[test]
    fn folders_of_the_dead_are_removed_and_those_of_the_living_stay() {
        let temporary = tempfile::tempdir().unwrap();
        let alive = PrivateFolder::make(temporary.path()).unwrap();
        assert_eq!(fs::metadata(alive.path()).unwrap().mode() & 0o7777, MODE);
        copy_in(alive.path());
        let dead = left_behind(temporary.path());
        sweep(temporary.path());
        assert!(alive.is_there() && !dead.exists());
        assert_eq!(fs::read_dir(alive.path()).unwrap().count(), 2);
        let path = alive.path().to_owned();
        drop(alive);
        assert!(!path.exists());
    }

    #[test]
    fn what_may_be_somebody_elses_is_left_alone() {
        let (temporary, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let with_more = left_behind(temporary.path());
        fs::write(with_more.join("notes.txt"), b"mine").unwrap();
        let entered = left_behind(temporary.path());
        fs::set_permissions(&entered, fs::Permissions::from_mode(0o755)).unwrap();
        let other_name = temporary.path().join("modalkit-models");
        fs::create_dir(&other_name).unwrap();
        fs::set_permissions(&other_name, fs::Permissions::from_mode(MODE)).unwrap();
        let target = left_behind(elsewhere.path());
        let link = temporary.path().join(format!("{PREFIX}link"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        sweep(temporary.path());
        for kept in [&with_more, &entered, &other_name, &target, &link] {
            assert!(kept.exists(), "{}", kept.display());
        }
        assert_eq!(fs::read_dir(with_more).unwrap().count(), 3);
    }

    #[test]
    fn hosts_that_start_at_once_never_remove_each_others_folders() {
        let temporary = tempfile::tempdir().unwrap();
        let start = || {
            for _ in 0..200 {
                sweep(temporary.path());
                let folder = PrivateFolder::make(temporary.path()).unwrap();
                copy_in(folder.path());
                assert!(folder.is_there());
                assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
            }
        };
        thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(start))));
        assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
    }
}
