//! Which files of a folder are the code of a pipeline in Python: what of it is copied, pinned and watched as one. It reads folders, and never knows
//! what is done with them.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Files by which a folder is known as a pipeline's.
const MAIN_FILES: [&str; 2] = ["pipeline.py", "app.py"];
/// Endings of what an interpreter imports, and names of files that say what it needs.
const ENDINGS: [&str; 3] = ["py", "pyi", "so"];
const NAMES: [&str; 6] =
    ["pyproject.toml", "requirements.txt", "uv.lock", "poetry.lock", "pylock.toml", "Pipfile.lock"];
/// Folders that hold what was installed or made, and not what was written.
const MADE: [&str; 3] = ["__pycache__", "node_modules", "site-packages"];
/// What marks the folder of a virtual environment, and says which interpreter it is of.
pub const VENV: &str = "pyvenv.cfg";
/// Where a pipeline's own environment lies in its folder; the first one counts.
const ENVIRONMENTS: [&str; 2] = [".venv", "venv"];
const INTERPRETER: &str = "bin/python";
/// What a package leaves in an environment: a folder with its name and version in its name.
const INSTALLED: &str = ".dist-info";
/// Files beyond which a folder is none of a pipeline, and folders below which no code is looked for.
const FILES_MAX: usize = 10_000;
const DEPTH_MAX: usize = 16;

/// Whether a folder holds a pipeline in Python, without an entry that says so.
#[must_use]
pub fn is_pipeline(folder: &Path) -> bool {
    MAIN_FILES.iter().any(|name| folder.join(name).is_file())
}

/// The files of code below a folder, by their paths in it, in order. Links are followed; what is hidden is passed over, and environments are.
///
/// # Errors
/// A folder can't be read, or holds more than any pipeline does.
pub fn code_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let (mut files, mut entered) = (Vec::new(), HashSet::new());
    collect(folder, Path::new(""), 0, &mut files, &mut entered)?;
    files.sort();
    Ok(files)
}

/// Whether a file of this path in a pipeline's folder is code.
#[must_use]
pub fn is_code(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    ENDINGS.contains(&ending) || NAMES.contains(&name)
}

/// Whether a folder of this name is passed over.
#[must_use]
pub fn is_passed_over(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with('.') || MADE.contains(&name) || path.join(VENV).exists()
}

/// The interpreter of a folder's own environment.
#[must_use]
pub fn interpreter(folder: &Path) -> Option<PathBuf> {
    ENVIRONMENTS.iter().map(|name| folder.join(name).join(INTERPRETER)).find(|path| path.is_file())
}

/// What a folder's own environment is: its interpreter, and the names and versions of what is installed. `None` where it has none.
#[must_use]
pub fn environment(folder: &Path) -> Option<String> {
    let interpreter = interpreter(folder)?;
    let root = interpreter.parent()?.parent()?;
    let mut said = vec![fs::read_to_string(root.join(VENV)).unwrap_or_default()];
    if let (Ok(path), Ok(metadata)) = (interpreter.canonicalize(), fs::metadata(&interpreter)) {
        said.push(format!("{} {} {}", path.display(), metadata.len(), metadata.mtime()));
    }
    let names = |folder: &Path| -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    };
    let mut installed: Vec<String> = import_folders(root).iter().flat_map(|folder| names(folder)).collect();
    installed.retain(|name| name.ends_with(INSTALLED));
    installed.sort();
    said.extend(installed);
    Some(said.join("\n"))
}

/// The folders below the root of an environment, or of an installation, from which its interpreter imports what was installed.
#[must_use]
pub fn import_folders(root: &Path) -> Vec<PathBuf> {
    let libraries = ["lib", "lib64"].map(|name| root.join(name));
    // Where one of them is a link to the other, what is below is the same.
    let libraries = libraries.iter().filter(|path| !path.is_symlink());
    let entries = libraries.flat_map(|path| fs::read_dir(path).into_iter().flatten().flatten());
    let of_python = entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"python3"));
    // The second name is Debian's.
    let folders =
        of_python.flat_map(|entry| ["site-packages", "dist-packages"].map(|name| entry.path().join(name)));
    folders.filter(|path| path.is_dir()).collect()
}

fn collect(
    root: &Path,
    below: &Path,
    depth: usize,
    files: &mut Vec<PathBuf>,
    entered: &mut HashSet<(u64, u64)>,
) -> io::Result<()> {
    let this = fs::metadata(root.join(below))?;
    // Links may lead in circles, and nobody imports from so deep.
    if depth > DEPTH_MAX || !entered.insert((this.dev(), this.ino())) {
        return Ok(());
    }
    for entry in fs::read_dir(root.join(below))? {
        let name = entry?.file_name();
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let inside = below.join(&name);
        let path = root.join(&inside);
        // Links are followed; one to nothing is nothing.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.is_dir() && !is_passed_over(&path) {
            collect(root, &inside, depth + 1, files, entered)?;
        } else if metadata.is_file() && is_code(&path) {
            files.push(inside);
        }
        if files.len() > FILES_MAX {
            return Err(io::Error::other(format!("it holds more than {FILES_MAX} files of code")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_what_was_written_and_can_be_imported() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        };
        for name in [
            "model.py",
            "pyproject.toml",
            "weights.bin",
            ".env",
            ".venv/lib/a.py",
            "env/pyvenv.cfg",
            "env/lib/a.py",
            "package/__init__.py",
            "package/fast.cpython-311-x86_64-linux-gnu.so",
            "package/__pycache__/a.py",
        ] {
            put(name);
        }
        let files = code_files(folder.path()).unwrap();
        let expected = [
            "model.py",
            "package/__init__.py",
            "package/fast.cpython-311-x86_64-linux-gnu.so",
            "pyproject.toml",
        ];
        assert_eq!(files, expected.map(PathBuf::from).to_vec());
        assert!(!is_pipeline(folder.path()));
        std::os::unix::fs::symlink(".", folder.path().join("package/latest")).unwrap();
        assert_eq!(code_files(folder.path()).unwrap(), files, "once");
        put("pipeline.py");
        assert!(is_pipeline(folder.path()));
    }
}
