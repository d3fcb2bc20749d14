//! What lies in a snapshot beside what was mirrored: files that were written there, changed or removed. It reads names and sizes, no content.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    path::Path,
};

use crate::manifest::{Entry, Manifest, Stamp};

/// Names under which files are written before they get their own.
const UNFINISHED: [&str; 5] = ["part", "partial", "tmp", "swp", "crdownload"];
/// Folders deeper than this are not looked into.
const DEPTH_MAX: usize = 32;

/// How a snapshot differs from what was mirrored.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Differences {
    /// Files that are new or have other content, by their paths.
    pub(crate) written: BTreeMap<String, Stamp>,
    /// Mirrored files that are gone, or are something else by now.
    pub(crate) missing: Vec<String>,
    /// Folders that were made there, and hold nothing that was mirrored.
    pub(crate) folders: Vec<String>,
}

/// Compares a snapshot with its manifest.
///
/// # Errors
/// A folder of it can't be read.
pub(crate) fn differences(folder: &Path, manifest: &Manifest) -> io::Result<Differences> {
    let mut found = Differences::default();
    let mut seen = 0;
    let mirrored: HashSet<&str> = manifest.files.keys().flat_map(|path| ancestors(path)).collect();
    walk(folder, String::new(), 0, &mut |path, metadata| {
        if metadata.is_dir() {
            if !mirrored.contains(path.as_str()) && !manifest.files.contains_key(&path) {
                found.folders.push(path);
            }
            return;
        }
        let stamp = Stamp::of(metadata);
        match manifest.files.get(&path) {
            Some(entry) => {
                seen += 1;
                if entry.stamp != Some(stamp) {
                    found.written.insert(path, stamp);
                }
            }
            None => drop(found.written.insert(path, stamp)),
        }
    })?;
    found.written.retain(|path, stamp| manifest.carried.get(path) != Some(stamp));
    // Only where some are missing does anybody ask which.
    if seen < manifest.files.len() {
        let is_missing = |(path, entry): &(&String, &Entry)| match fs::symlink_metadata(folder.join(path)) {
            Ok(there) => there.is_dir() == entry.stamp.is_some(),
            Err(_) => true,
        };
        found.missing = manifest.files.iter().filter(is_missing).map(|(path, _)| path.clone()).collect();
    }
    Ok(found)
}

/// The folders that a path lies in, from the innermost on.
pub(crate) fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    path.rmatch_indices('/').map(|(at, _)| &path[..at])
}

/// Every file and folder below a folder, by its path in it. Links, and what has no name yet, are passed over.
fn walk(
    folder: &Path,
    above: String,
    depth: usize,
    each: &mut dyn FnMut(String, &fs::Metadata),
) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // A path that isn't UTF-8 is no key.
        let Ok(name) = entry.file_name().into_string() else { continue };
        let metadata = match fs::symlink_metadata(entry.path()) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let path = if above.is_empty() { name } else { format!("{above}/{name}") };
        if metadata.is_dir() && depth < DEPTH_MAX {
            each(path.clone(), &metadata);
            match walk(&entry.path(), path, depth + 1, each) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                walked => walked?,
            }
        } else if metadata.is_file() {
            each(path, &metadata);
        }
    }
    Ok(())
}

/// Whether a file of this path goes up: what is hidden, or has the name of something unfinished, stays.
pub(crate) fn is_finished(path: &str) -> bool {
    let ending = Path::new(path).extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    !UNFINISHED.contains(&ending)
        && !path.ends_with('~')
        && !path.split('/').any(|name| name.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listing::Object;

    #[test]
    fn what_was_written_changed_or_removed_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let mut manifest = Manifest::default();
        for path in ["same", "deep/changed", "gone"] {
            let file = folder.path().join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, path).unwrap();
            let stamp = Some(Stamp::of(&fs::metadata(&file).unwrap()));
            let object = Object { bytes: path.len() as u64, etag: None, modified_ms: 0 };
            manifest.files.insert(path.to_owned(), Entry { object, stamp });
        }
        assert_eq!(differences(folder.path(), &manifest).unwrap(), Differences::default());
        fs::write(folder.path().join("deep/changed"), "other").unwrap();
        fs::write(folder.path().join("deep/new"), "new").unwrap();
        fs::remove_file(folder.path().join("gone")).unwrap();
        fs::create_dir_all(folder.path().join("made/empty")).unwrap();
        let found = differences(folder.path(), &manifest).unwrap();
        assert_eq!(found.written.keys().collect::<Vec<_>>(), ["deep/changed", "deep/new"]);
        assert_eq!(found.missing, ["gone"]);
        assert_eq!(found.folders, ["made", "made/empty"]);
        // A folder in a file's place.
        fs::create_dir(folder.path().join("gone")).unwrap();
        assert_eq!(differences(folder.path(), &manifest).unwrap().missing, ["gone"]);
    }

    #[test]
    fn what_is_hidden_or_unfinished_stays() {
        for path in ["a/.b", ".a/b", "a.tmp", "b.part", "c~"] {
            assert!(!is_finished(path), "{path}");
        }
        assert!(is_finished("a/b.json") && is_finished("tmp/a"));
    }
}
