//! What this host is called among those that share a queue: the same as long as it keeps its state folder, and another one where that was
//! copied. It owns the file with the name, and never knows what the name is for.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
};

use modalkit_journal::{FolderLock, OpenError};
use sha2::{Digest, Sha256};

/// The file: the name, and on a second line what the file itself and its machine are known by.
const NAME_FILE: &str = "host";
/// What a machine is known by, or else by its name.
const MACHINE_FILES: [&str; 2] = ["/etc/machine-id", "/proc/sys/kernel/hostname"];
/// Bytes of that file's digest: the file doesn't disclose which machine it is.
const MACHINE_BYTES: usize = 8;
/// Letters of the name of a container that was given none.
const MADE_UP_LETTERS: usize = 12;
/// Permission bits of others than the owner.
const OF_OTHERS: u32 = 0o077;

/// This host's name. The folder is this process's: another host, that would be refused it, gives it no other name.
///
/// # Errors
/// The folder can't be used.
pub fn host_name(folder: &FolderLock) -> Result<String, OpenError> {
    let state_folder = folder.path();
    let of_folder = |source| OpenError::Folder { folder: state_folder.to_owned(), source };
    let mode = fs::metadata(state_folder).map_err(of_folder)?.mode() & 0o7777;
    if mode & OF_OTHERS != 0 {
        tracing::warn!(
            folder = %state_folder.display(),
            mode = format!("{mode:04o}"),
            "the state folder is open to other users, and holds what callers send: `chmod 700` it"
        );
    }
    name_in(state_folder, &machine()).map_err(of_folder)
}

fn name_in(folder: &Path, machine: &str) -> io::Result<String> {
    let mut file = match File::open(folder.join(NAME_FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return write(folder, &new_name(), machine);
        }
        opened => opened?,
    };
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let mut lines = text.lines().map(str::trim);
    let Some(name) = lines.next().filter(|name| !name.is_empty()) else {
        return write(folder, &new_name(), machine);
    };
    // A version before made no mark.
    let Some(found) = lines.next() else { return write(folder, name, machine) };
    let expected = mark(&file, machine)?;
    if found == expected {
        return Ok(name.to_owned());
    }
    tracing::warn!(
        folder = %folder.display(),
        name,
        expected,
        found,
        "the state folder was copied from another one, or moved to another machine or file system: this host takes another name; where the other still runs, jobs that were not done with when it was copied run twice"
    );
    write(folder, &new_name(), machine)
}

fn new_name() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// Puts the file in place in one step, for this user alone.
fn write(folder: &Path, name: &str, machine: &str) -> io::Result<String> {
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    let mark = mark(file.as_file(), machine)?;
    writeln!(file, "{name}\n{mark}")?;
    file.as_file().sync_all()?;
    file.persist(folder.join(NAME_FILE)).map_err(|error| error.error)?;
    Ok(name.to_owned())
}

/// What no copy of this file has in common with it.
fn mark(file: &File, machine: &str) -> io::Result<String> {
    let about = file.metadata()?;
    // File systems without a device of their own (NFS, btrfs, overlay) have another number after each mount.
    let device = if rustix::fs::major(about.dev()) == 0 { 0 } else { about.dev() };
    Ok(format!("device {device} inode {} machine {machine}", about.ino()))
}

fn machine() -> String {
    let text =
        |file: &&str| Some(fs::read_to_string(file).ok()?.trim().to_owned()).filter(|text| says_which(text));
    let text = MACHINE_FILES.iter().find_map(text).unwrap_or_default();
    let digest = Sha256::digest(format!("modalkit {text}"));
    digest[..MACHINE_BYTES].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether it is a machine's own: a container that is given no name has the beginning of an id that it alone has, and the next one on the
/// same folder another.
fn says_which(text: &str) -> bool {
    let is_made_up = text.len() == MADE_UP_LETTERS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    !text.is_empty() && !is_made_up
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_until_its_folder_is_copied() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let name = name_in(one.path(), "a").unwrap();
        let file = one.path().join(NAME_FILE);
        assert_eq!(name_in(one.path(), "a").unwrap(), name);
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
        // Moved as a whole it is the same one.
        let moved = one.path().with_extension("moved");
        fs::rename(one.path(), &moved).unwrap();
        assert_eq!(name_in(&moved, "a").unwrap(), name);
        fs::rename(&moved, one.path()).unwrap();
        // A copy has another name, and keeps that.
        fs::copy(&file, two.path().join(NAME_FILE)).unwrap();
        let other = name_in(two.path(), "a").unwrap();
        assert_ne!(other, name);
        assert_eq!(name_in(two.path(), "a").unwrap(), other);
        assert_eq!(name_in(one.path(), "a").unwrap(), name);
        // As a disk that was cloned for another machine.
        assert_ne!(name_in(one.path(), "b").unwrap(), name);
    }

    #[test]
    fn a_made_up_name_of_a_container_is_no_machine() {
        assert!(says_which("modalkit-0") && says_which("0f5e1d9c8b7a40d2a1b2c3d4e5f60718"));
        assert!(!says_which("4f9a1c7be2d8") && !says_which(""));
    }

    #[test]
    fn a_name_without_a_mark_is_taken_over_and_an_empty_file_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(NAME_FILE);
        fs::write(&file, "a-name\n").unwrap();
        assert_eq!(name_in(folder.path(), "a").unwrap(), "a-name");
        assert_eq!(name_in(folder.path(), "a").unwrap(), "a-name");
        for broken in ["", "\n", "\ndevice 1 inode 2 machine a\n"] {
            fs::write(&file, broken).unwrap();
            let name = name_in(folder.path(), "a").unwrap();
            assert!(name.len() == 36 && name_in(folder.path(), "a").unwrap() == name, "{broken:?}: {name}");
        }
    }
}
