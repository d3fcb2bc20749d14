//! Whose files are taken for code. A dropped file is code, so whose it is and who may change it, or put another one in its place,
//! is asked here, of the very file that is copied and of all folders above it.

use std::{
    collections::HashSet,
    ffi::OsString,
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use rustix::io::Errno;

use modalkit_engine::LoadError;

/// Whose files are taken for code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trust {
    /// Files and folders of other users than this process's and root.
    pub any_owner: bool,
    /// Files and folders that the group or everybody may write.
    pub any_mode: bool,
}

/// Permission bits that let others than the owner write.
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;
/// In a folder with it, only its owner and theirs may rename or remove entries.
const STICKY: u32 = 0o1000;
const ROOT: u32 = 0;
/// Symbolic links that one path may lead through, as the kernel counts.
const LINKS_MAX: usize = 40;

const FILE: &str = "the file";
const FOLDER: &str = "the folder";

impl Trust {
    /// Asks the open file, which nobody can exchange any more, and all folders in which something is looked up on the way to it,
    /// by its name, by each link and to where it really lies: who may write to one of these may put another file there.
    pub(crate) fn check_file(self, file: &Path, open: &File) -> Result<(), LoadError> {
        let unreadable = |source| LoadError::Io { doing: "look at", path: file.to_owned(), source };
        let metadata = open.metadata().map_err(unreadable)?;
        self.check(FILE, file, &metadata)?;
        let (lookups, real) = lookups(file).map_err(unreadable)?;
        let found = real.metadata().map_err(unreadable)?;
        if (found.dev(), found.ino()) != (metadata.dev(), metadata.ino()) {
            // Replaced between the two looks: the next one finds the new one.
            return Err(unreadable(io::Error::other("it was replaced while it was read")));
        }
        let written = std::path::absolute(file).map_err(unreadable)?;
        for path in [&written, &real] {
            let Some(folder) = path.parent() else { continue };
            self.check(FOLDER, folder, &folder.metadata().map_err(unreadable)?)?;
        }
        // The nearest is told first.
        for lookup in lookups.iter().rev() {
            self.check_lookup(lookup).map_err(unreadable)??;
        }
        Ok(())
    }

    /// Asks everything below a folder, through links as well, and the folders in which something is looked up on the way to it.
    pub(crate) fn check_tree(self, root: &Path) -> Result<(), LoadError> {
        let unreadable =
            |path: &Path, source| LoadError::Io { doing: "look at", path: path.to_owned(), source };
        let (mut folders, mut entered) = (vec![self.check_way(root)?], HashSet::new());
        while let Some(folder) = folders.pop() {
            let metadata = folder.metadata().map_err(|error| unreadable(&folder, error))?;
            if !entered.insert((metadata.dev(), metadata.ino())) {
                continue;
            }
            self.check(FOLDER, &folder, &metadata)?;
            for entry in folder.read_dir().map_err(|error| unreadable(&folder, error))? {
                let entry = entry.map_err(|error| unreadable(&folder, error))?;
                let (path, kind) = (entry.path(), entry.file_type());
                let kind = kind.map_err(|error| unreadable(&path, error))?;
                if kind.is_dir() {
                    folders.push(path);
                } else if !kind.is_symlink() {
                    let metadata = entry.metadata().map_err(|error| unreadable(&path, error))?;
                    self.check(FILE, &path, &metadata)?;
                } else if path.is_dir() {
                    folders.push(self.check_way(&path)?);
                } else if let Ok(open) = File::open(&path) {
                    self.check_file(&path, &open)?;
                }
            }
        }
        Ok(())
    }

    /// Asks the folders in which something is looked up on the way to this one; its path without links.
    fn check_way(self, folder: &Path) -> Result<PathBuf, LoadError> {
        let unreadable = |source| LoadError::Io { doing: "look at", path: folder.to_owned(), source };
        let (lookups, real) = lookups(folder).map_err(unreadable)?;
        for lookup in lookups.iter().rev() {
            self.check_lookup(lookup).map_err(unreadable)??;
        }
        Ok(real)
    }

    /// A folder on the way. Others may write to it, as to `/tmp`, where they can't put anything else in the place of what leads to
    /// the file.
    fn check_lookup(self, Lookup { folder, entry }: &Lookup) -> io::Result<Result<(), LoadError>> {
        let metadata = folder.metadata()?;
        let guarded = metadata.mode() & STICKY != 0 && self.has_owner(&entry.symlink_metadata()?);
        Ok(Self { any_mode: self.any_mode || guarded, ..self }.check(FOLDER, folder, &metadata))
    }

    fn has_owner(self, metadata: &Metadata) -> bool {
        let owner = metadata.uid();
        self.any_owner || owner == ROOT || owner == rustix::process::geteuid().as_raw()
    }

    fn check(self, what: &'static str, path: &Path, metadata: &Metadata) -> Result<(), LoadError> {
        let refused = |found: String, hint: String| {
            Err(LoadError::Untrusted { what, path: path.to_owned(), found, hint })
        };
        if !self.has_owner(metadata) {
            let this_user = rustix::process::geteuid().as_raw();
            return refused(
                format!("belongs to user {}", metadata.uid()),
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

/// An entry of a folder that leads to a file: a folder, a link, or at last the file itself.
struct Lookup {
    /// The folder, by a path without links.
    folder: PathBuf,
    /// The entry.
    entry: PathBuf,
}

/// Every entry that the kernel looks up for a path, through all links, in its order; and the path without links.
fn lookups(path: &Path) -> io::Result<(Vec<Lookup>, PathBuf)> {
    let mut found = Vec::new();
    let mut links = 0;
    let mut real = PathBuf::from("/");
    // What is yet to be looked up: the next is last.
    let mut names = names_from_last(&std::path::absolute(path)?);
    while let Some(name) = names.pop() {
        match Path::new(&name).components().next() {
            Some(Component::RootDir) => real = PathBuf::from("/"),
            Some(Component::ParentDir) => {
                real.pop();
            }
            Some(Component::Normal(name)) => {
                let entry = real.join(name);
                let is_link = entry.symlink_metadata()?.is_symlink();
                found.push(Lookup { folder: real.clone(), entry: entry.clone() });
                if !is_link {
                    real = entry;
                    continue;
                }
                links += 1;
                if links > LINKS_MAX {
                    return Err(Errno::LOOP.into());
                }
                names.extend(names_from_last(&entry.read_link()?));
            }
            Some(Component::CurDir | Component::Prefix(_)) | None => {}
        }
    }
    Ok((found, real))
}

fn names_from_last(path: &Path) -> Vec<OsString> {
    path.components().rev().map(|name| name.as_os_str().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, chown, symlink},
        path::PathBuf,
    };

    use super::*;

    const STRICT: Trust = Trust { any_owner: false, any_mode: false };

    fn put(file: &Path, content: &[u8], mode: u32) {
        fs::write(file, content).unwrap();
        set_mode(file, mode);
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn ask(trust: Trust, file: &Path) -> Result<(), String> {
        trust.check_file(file, &File::open(file).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_others_may_write_is_no_code_of_ours_unless_said_so() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("echo.so");
        let text = || ask(STRICT, &file).unwrap_err();
        put(&file, b"x", 0o664);
        assert!(text().contains("may be written by its group (mode 0664)"), "{}", text());
        put(&file, b"x", 0o646);
        assert!(text().contains("by everybody"), "{}", text());
        put(&file, b"x", 0o644);
        assert_eq!(ask(STRICT, &file), Ok(()));
        set_mode(folder.path(), 0o770);
        assert!(text().starts_with("the folder "), "{}", text());
        assert_eq!(ask(Trust { any_mode: true, ..STRICT }, &file), Ok(()));
        // The sticky bit keeps files from being replaced, and not from being added: a plugin's own folder has no use for others.
        set_mode(folder.path(), 0o1777);
        assert!(text().contains("may be written by everybody (mode 1777)"), "{}", text());
    }

    #[test]
    fn of_a_folder_whose_modules_are_imported_where_they_lie_everything_is_asked() {
        let folder = tempfile::tempdir().unwrap();
        let (root, elsewhere) = (folder.path().join("packages"), folder.path().join("elsewhere"));
        for path in [root.join("one"), root.join("two"), elsewhere.clone()] {
            fs::create_dir_all(&path).unwrap();
            put(&path.join("module.py"), b"x", 0o644);
            set_mode(&path, 0o755);
        }
        symlink(&elsewhere, root.join("linked")).unwrap();
        symlink("..", root.join("one/circle")).unwrap();
        symlink("nothing", root.join("two/broken")).unwrap();
        let ask = || STRICT.check_tree(&root).map_err(|error| error.to_string());
        assert_eq!(ask(), Ok(()));
        for (path, mode) in [
            (root.join("one"), 0o775),
            (root.join("two/module.py"), 0o666),
            (elsewhere.join("module.py"), 0o664),
            (elsewhere.clone(), 0o777),
        ] {
            let before = fs::metadata(&path).unwrap().permissions();
            set_mode(&path, mode);
            let error = ask().unwrap_err();
            assert!(
                error.contains(&path.display().to_string()) && error.contains("may be written"),
                "{error}"
            );
            fs::set_permissions(&path, before).unwrap();
        }
    }

    /// A file three folders down, and the folders above it.
    fn nested(folder: &Path) -> (PathBuf, PathBuf, PathBuf) {
        let (above, direct) = (folder.join("above"), folder.join("above/between/direct"));
        fs::create_dir_all(&direct).unwrap();
        for path in [&above, &above.join("between"), &direct] {
            set_mode(path, 0o755);
        }
        let file = direct.join("echo.so");
        put(&file, b"x", 0o644);
        (above, direct, file)
    }

    #[test]
    fn whoever_may_exchange_a_folder_further_up_may_exchange_the_plugin() {
        let folder = tempfile::tempdir().unwrap();
        let (above, direct, file) = nested(folder.path());
        assert_eq!(ask(STRICT, &file), Ok(()));
        set_mode(&above, 0o777);
        let text = ask(STRICT, &file).unwrap_err();
        let named = format!("the folder {} may be written by everybody (mode 0777)", above.display());
        assert!(text.starts_with(&named), "{text}");
        assert_eq!(ask(Trust { any_mode: true, ..STRICT }, &file), Ok(()));
        // As in /tmp: others can't rename what isn't theirs.
        set_mode(&above, 0o1777);
        assert_eq!(ask(STRICT, &file), Ok(()));
        // By a link from a safe place: where it really lies counts as well.
        set_mode(&above, 0o777);
        symlink(&direct, folder.path().join("link")).unwrap();
        assert!(ask(STRICT, &folder.path().join("link/echo.so")).is_err());
        // By a link in a place where others may put another link.
        let (_, direct, _) = nested(&folder.path().join("safe"));
        symlink(&direct, above.join("link")).unwrap();
        assert!(ask(STRICT, &above.join("link/echo.so")).is_err());
    }

    #[test]
    fn each_link_of_a_chain_lies_where_nobody_else_may_put_another() {
        let folder = tempfile::tempdir().unwrap();
        let [safe, between, end] = ["safe", "between", "end"].map(|name| folder.path().join(name));
        for path in [&safe, &between, &end] {
            fs::create_dir(path).unwrap();
            set_mode(path, 0o755);
        }
        let (file, middle) = (end.join("echo.so"), between.join("link"));
        put(&file, b"x", 0o644);
        symlink("../end/echo.so", &middle).unwrap();
        symlink(&middle, safe.join("echo.so")).unwrap();
        // The same with a link to a folder.
        symlink(&end, between.join("folder")).unwrap();
        symlink("../between/folder", safe.join("folder")).unwrap();
        for link in ["echo.so", "folder/echo.so"].map(|name| safe.join(name)) {
            set_mode(&between, 0o755);
            assert_eq!(ask(STRICT, &link), Ok(()));
            set_mode(&between, 0o777);
            let text = ask(STRICT, &link).unwrap_err();
            assert!(text.contains("between may be written by everybody (mode 0777)"), "{text}");
            assert_eq!(ask(Trust { any_mode: true, ..STRICT }, &link), Ok(()));
            // As in /tmp: others can't exchange a link that isn't theirs.
            set_mode(&between, 0o1777);
            assert_eq!(ask(STRICT, &link), Ok(()));
        }
    }

    #[test]
    fn as_many_links_are_followed_as_the_kernel_follows() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("echo.so");
        put(&file, b"x", 0o644);
        let mut last = file;
        for number in 0..=LINKS_MAX {
            let link = folder.path().join(number.to_string());
            symlink(&last, &link).unwrap();
            last = link;
            assert_eq!(lookups(&last).is_ok(), number < LINKS_MAX, "{number}");
        }
    }

    #[test]
    fn a_file_of_another_user_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("echo.so");
        put(&file, b"x", 0o644);
        // Only root can give files away; as anybody else, the owner's own file is all that there is to ask.
        if chown(&file, Some(12_345), None).is_err() {
            assert_eq!(ask(STRICT, &file), Ok(()));
            return;
        }
        let error = ask(STRICT, &file).unwrap_err();
        assert!(error.contains("belongs to user 12345") && error.contains("plugins_of_any_owner"), "{error}");
        assert_eq!(ask(Trust { any_owner: true, ..STRICT }, &file), Ok(()));
        // The same of a folder further up, also where the sticky bit guards what is above that.
        let (above, _, file) = nested(folder.path());
        chown(above.join("between"), Some(12_345), None).unwrap();
        for mode in [0o755, 0o1777] {
            set_mode(&above, mode);
            let error = ask(STRICT, &file).unwrap_err();
            assert!(error.contains("between belongs to user 12345"), "{error}");
        }
    }
}
