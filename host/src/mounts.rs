//! Puts files and folders in place, as the configuration's `mounts` say. It never knows what they are for.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use crate::config::Mount;

/// What is compared at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Puts all of them in place. One that can't be is logged, and the host serves on: a pipeline that needs it says so when it loads.
pub async fn put_in_place(mounts: &[Mount]) {
    if mounts.is_empty() {
        return;
    }
    let mounts = mounts.to_vec();
    let all = move || {
        for mount in &mounts {
            match put(mount) {
                Ok(changed) => {
                    tracing::info!(from = %mount.from.display(), to = %mount.to.display(), changed, "put in place")
                }
                Err(error) => tracing::error!(
                    from = %mount.from.display(), to = %mount.to.display(), %error,
                    "can't put a mount in place (app_settings.deployment_config.mounts)"
                ),
            }
        }
    };
    if tokio::task::spawn_blocking(all).await.is_err() {
        tracing::error!("putting mounts in place failed inside the host");
    }
}

/// Says how many files were written: those that are as they should be are left alone, so that nobody takes them for changed.
fn put(mount: &Mount) -> io::Result<usize> {
    let about = fs::metadata(&mount.from)?;
    if about.is_dir() != mount.folder {
        let expected = if mount.folder { "a folder (type = \"dir\")" } else { "a file (type = \"file\")" };
        return Err(io::Error::other(format!("expected {expected}, found the other")));
    }
    if mount.folder {
        put_folder(&mount.from, &mount.to)
    } else {
        put_file(&mount.from, &mount.to).map(usize::from)
    }
}

fn put_folder(from: &Path, to: &Path) -> io::Result<usize> {
    fs::create_dir_all(to)?;
    let mut written = 0;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        // Links are followed, as a copy would be.
        written += if fs::metadata(&from)?.is_dir() {
            put_folder(&from, &to)?
        } else {
            usize::from(put_file(&from, &to)?)
        };
    }
    Ok(written)
}

/// Written under another name first: nobody sees a half of it, neither of the copy nor of what is just being written.
fn put_file(from: &Path, to: &Path) -> io::Result<bool> {
    if is_same(from, to)? {
        return Ok(false);
    }
    let before = fs::metadata(from)?;
    if before.len() == 0 && fs::metadata(to).is_ok_and(|old| old.len() > 0) {
        return Err(io::Error::other(format!(
            "expected content in {}, found an empty file, and what is in place has some; remove that where this is meant",
            from.display()
        )));
    }
    let folder = to
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .map_or_else(|| PathBuf::from("."), Path::to_owned);
    fs::create_dir_all(&folder)?;
    let half = tempfile::Builder::new().prefix(".modalkit-").tempfile_in(&folder)?;
    fs::copy(from, half.path())?;
    let after = fs::metadata(from)?;
    if (before.len(), before.modified().ok()) != (after.len(), after.modified().ok()) {
        return Err(io::Error::other(format!(
            "{} was written while it was copied; read the configuration again once it is whole",
            from.display()
        )));
    }
    half.persist(to).map_err(|error| error.error)?;
    Ok(true)
}

fn is_same(from: &Path, to: &Path) -> io::Result<bool> {
    let (Ok(old), new) = (fs::metadata(to), fs::metadata(from)?) else { return Ok(false) };
    Ok(old.is_file() && old.len() == new.len() && same_content(File::open(from)?, File::open(to)?)?)
}

/// Piece by piece: weights may be larger than memory.
fn same_content(mut from: File, mut to: File) -> io::Result<bool> {
    let (mut one, mut other) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    loop {
        let read = from.read(&mut one)?;
        if read == 0 {
            return Ok(true);
        }
        match to.read_exact(&mut other[..read]) {
            Ok(()) if one[..read] == other[..read] => {}
            Ok(()) => return Ok(false),
            // It has become shorter.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_folders_are_put_in_place_once() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("labels.json"), "[]").unwrap();
        fs::create_dir_all(at("from/deep")).unwrap();
        fs::write(at("from/deep/a"), "a").unwrap();
        let file = Mount { from: at("labels.json"), to: at("app/new/labels.json"), folder: false };
        let tree = Mount { from: at("from"), to: at("to"), folder: true };
        assert_eq!((put(&file).unwrap(), put(&tree).unwrap()), (1, 1));
        assert_eq!((put(&file).unwrap(), put(&tree).unwrap()), (0, 0));
        assert_eq!(fs::read_to_string(at("app/new/labels.json")).unwrap(), "[]");
        assert_eq!(fs::read_to_string(at("to/deep/a")).unwrap(), "a");
        fs::write(at("labels.json"), "[1]").unwrap();
        assert_eq!(put(&file).unwrap(), 1);
        // An emptied file is most likely one that is being written.
        fs::write(at("labels.json"), "").unwrap();
        assert!(put(&file).unwrap_err().to_string().contains("found an empty file"));
        assert_eq!(fs::read_to_string(at("app/new/labels.json")).unwrap(), "[1]");
        let wrong = Mount { from: at("from"), to: at("x"), folder: false };
        assert!(put(&wrong).unwrap_err().to_string().contains("expected a file"));
        assert!(put(&Mount { from: at("none"), ..wrong }).is_err());
    }
}
